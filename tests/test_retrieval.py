"""Retrieval against the published similarity and top-k code, written out plainly, and its protocol and
refusals.
"""

import numpy as np
import pytest
import torch

from src import retrieval
from src.utils import PerceptError


def embeddings(n=60, noise=1.5, seed=0):
    rng = np.random.default_rng(seed)
    clip = rng.normal(size=(n, 4, 6))
    return torch.tensor(clip + noise * rng.normal(size=clip.shape)), torch.tensor(clip)


def cosines(brain, clip):
    """Similarity [brain, image] by the formula."""
    a, b = (x.flatten(1).double().numpy() for x in (brain, clip))
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


def test_orientation_on_a_case_where_the_directions_differ():
    clip = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    brain = torch.tensor(
        [[1.0, 0.2], [1.0, 0.4], [-1.0, 0.1]]
    )  # brain 1 looks like image 0, but is the best there is for image 1
    assert retrieval.top1_image_from_brain(brain, clip) == pytest.approx(2 / 3)
    assert retrieval.top1_brain_from_image(brain, clip) == 1
    assert retrieval.top1_image_from_brain_each(brain, clip).tolist() == [1, 0, 1]


def test_reference_names_are_swapped_as_documented():
    # the published top-k looks along columns of a matrix that its cosine function has transposed
    brain, clip = embeddings()
    transposed = cosines(
        brain, clip
    ).T  # what batchwise_cosine_similarity(brain, clip) returns: [image, brain]
    fwd = np.mean(np.argsort(transposed, axis=1)[:, -1] == np.arange(60))
    bwd = np.mean(np.argsort(transposed.T, axis=1)[:, -1] == np.arange(60))
    assert fwd != bwd
    assert retrieval.top1_brain_from_image(brain, clip) == pytest.approx(fwd)
    assert retrieval.top1_image_from_brain(brain, clip) == pytest.approx(bwd)
    assert (
        "fwd" in retrieval.REFERENCE_NAMES["brain_from_image"]
        and "bwd" in retrieval.REFERENCE_NAMES["image_from_brain"]
    )


@pytest.mark.parametrize("direction", retrieval.REFERENCE_NAMES)
def test_ranks_and_top_k(direction, monkeypatch):
    brain, clip = embeddings()
    similarity = cosines(brain, clip)
    similarity = similarity if direction == "image_from_brain" else similarity.T
    expected = 1 + (similarity > np.diag(similarity)[:, None]).sum(1)
    for chunk in (256, 7):
        monkeypatch.setattr(retrieval, "CHUNK", chunk)
        np.testing.assert_array_equal(retrieval.rank_each(brain, clip, direction), expected)
    assert retrieval.top_k(brain, clip, 5, direction) == pytest.approx((expected <= 5).mean())
    assert retrieval.top_k(brain, clip, 60, direction) == 1


def test_scale_does_not_matter_and_perfect_is_one():
    brain, clip = embeddings()
    scale = torch.rand(60, 1, 1) + 0.1
    np.testing.assert_array_equal(retrieval.rank_each(brain * scale, clip), retrieval.rank_each(brain, clip))
    assert retrieval.top1_image_from_brain(clip * scale, clip) == 1


def test_collapsed_embeddings_do_not_score():
    _, clip = embeddings()
    same = torch.ones_like(clip)
    assert retrieval.top1_image_from_brain(same, same) == 0
    assert retrieval.top1_image_from_brain(same, clip) == pytest.approx(1 / 60)


def test_published_protocol_draws_pools():
    brain, clip = embeddings()
    table = retrieval.published_protocol(brain, clip, pool=20, draws=12, seed=3)
    similarity, rng, hits = cosines(brain, clip), np.random.default_rng(3), []
    for _ in range(12):
        chosen = rng.choice(60, 20, replace=False)
        hits.append(np.mean(similarity[np.ix_(chosen, chosen)].argmax(1) == np.arange(20)))
    row = table.set_index("direction").loc["image_from_brain"]
    assert row["value"] == pytest.approx(np.mean(hits))
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * np.std(hits) / np.sqrt(12))
    assert row["chance"] == 1 / 20 and set(table["direction"]) == set(retrieval.REFERENCE_NAMES)
    with pytest.raises(PerceptError, match="60 images"):
        retrieval.published_protocol(brain, clip, pool=300)


def test_accuracy_falls_with_the_pool():
    brain, clip = embeddings(noise=2.0)
    table = retrieval.retrieval_by_pool_size(brain, clip, pools=(5, 20, 1000))
    mine = table[table["direction"] == "brain_from_image"]
    assert mine["pool"].tolist() == [5, 20, 60] and mine["value"].is_monotonic_decreasing
    assert mine["value"].iloc[-1] == pytest.approx(retrieval.top1_brain_from_image(brain, clip))


def test_hard_negatives_compare_within_groups_only():
    brain, clip = embeddings(n=12)
    groups = ["a"] * 5 + ["b"] * 4 + ["c"] * 2 + ["alone"]
    result = retrieval.hard_negative_top1(brain, clip, groups)
    similarity = cosines(brain, clip)
    for start, stop in ((0, 5), (5, 9), (9, 11)):
        block = similarity[start:stop, start:stop]
        np.testing.assert_array_equal(result.each[start:stop], block.argmax(1) == np.arange(stop - start))
    assert np.isnan(result.each[11]) and result.n == 11
    assert result.value == pytest.approx(np.nanmean(result.each))
    assert result.chance == pytest.approx((5 / 5 + 4 / 4 + 2 / 2) / 11)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b, c: retrieval.hard_negative_top1(b, c, range(60)), "No two images"),
        (lambda b, c: retrieval.hard_negative_top1(b, c, ["a"]), "1 group labels"),
        (lambda b, c: retrieval.top1_image_from_brain(b[:5], c), "differ once flattened"),
        (lambda b, c: retrieval.top1_image_from_brain(b * float("nan"), c), "NaN"),
        (lambda b, c: retrieval.rank_each(b, c, "fwd"), "unknown"),
        (lambda b, c: retrieval.nearest(b, c, 61), "holds 60 rows"),
        (lambda b, c: retrieval.nearest(b, c[:, :2]), "same encoder"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(PerceptError, match=words):
        call(*embeddings())


def test_nearest_is_exact():
    queries, index = embeddings()
    values, rows = retrieval.nearest(queries[:9], index, k=4)
    similarity = cosines(queries[:9], index)
    np.testing.assert_array_equal(rows, np.argsort(-similarity, axis=1)[:, :4])
    np.testing.assert_allclose(values, -np.sort(-similarity, axis=1)[:, :4], atol=1e-5)
