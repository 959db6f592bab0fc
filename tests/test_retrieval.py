"""Retrieval against the published similarity and top-k code, written out plainly, and its protocol
and refusals.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
    # brain 1 looks like image 0, but is the best there is for image 1
    brain = torch.tensor([[1.0, 0.2], [1.0, 0.4], [-1.0, 0.1]])
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
    assert "fwd" in retrieval.REFERENCE_NAMES["brain_from_image"]
    assert "bwd" in retrieval.REFERENCE_NAMES["image_from_brain"]


@pytest.mark.parametrize("direction", retrieval.REFERENCE_NAMES)
def test_ranks(direction, monkeypatch):
    brain, clip = embeddings()
    similarity = cosines(brain, clip)
    similarity = similarity if direction == "image_from_brain" else similarity.T
    expected = 1 + (similarity > np.diag(similarity)[:, None]).sum(1)
    for chunk in (256, 7):
        monkeypatch.setattr(retrieval, "CHUNK", chunk)
        np.testing.assert_array_equal(retrieval.rank_each(brain, clip, direction), expected)


def test_scale_does_not_matter_and_perfect_is_one():
    brain, clip = embeddings()
    scale = torch.rand(60, 1, 1) + 0.1
    np.testing.assert_array_equal(
        retrieval.rank_each(brain * scale, clip), retrieval.rank_each(brain, clip)
    )
    assert retrieval.top1_image_from_brain(clip * scale, clip) == 1


def test_collapsed_embeddings_do_not_score():
    _, clip = embeddings()
    same = torch.ones_like(clip)
    assert retrieval.top1_image_from_brain(same, same) == 0
    assert retrieval.top1_image_from_brain(same, clip) == pytest.approx(1 / 60)


def test_published_protocol_draws_pools():
    brain, clip = embeddings()
    table = retrieval.evaluate_published_protocol(brain, clip, pool_size=20, n_pools=12, seed=3)
    similarity, rng, hits = cosines(brain, clip), np.random.default_rng(3), []
    for _ in range(12):
        chosen = rng.choice(60, 20, replace=False)
        hits.append(np.mean(similarity[np.ix_(chosen, chosen)].argmax(1) == np.arange(20)))
    row = table.set_index("direction").loc["image_from_brain"]
    assert row["value"] == pytest.approx(np.mean(hits))
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * np.std(hits) / np.sqrt(12))
    assert row["chance"] == 1 / 20 and set(table["direction"]) == set(retrieval.REFERENCE_NAMES)
    with pytest.raises(PerceptError, match="60 images"):
        retrieval.evaluate_published_protocol(brain, clip, pool_size=300)


def test_accuracy_falls_with_the_pool():
    brain, clip = embeddings(noise=2.0)
    table = retrieval.compute_retrieval_by_pool_size(brain, clip, pool_sizes=(5, 20, 1000))
    rows = table[table["direction"] == "brain_from_image"]
    assert rows["pool"].tolist() == [5, 20, 60] and rows["value"].is_monotonic_decreasing
    assert rows["value"].iloc[-1] == pytest.approx(retrieval.top1_brain_from_image(brain, clip))


def test_hard_negatives_compare_within_groups_only():
    brain, clip = embeddings(n=12)
    groups = ["a"] * 5 + ["b"] * 4 + ["c"] * 2 + ["alone"]
    result = retrieval.compute_hard_negative_top1(brain, clip, groups)
    similarity = cosines(brain, clip)
    for start, stop in ((0, 5), (5, 9), (9, 11)):
        block = similarity[start:stop, start:stop]
        np.testing.assert_array_equal(
            result.scores[start:stop], block.argmax(1) == np.arange(stop - start)
        )
    assert np.isnan(result.scores[11]) and result.n == 11
    assert result.value == pytest.approx(np.nanmean(result.scores))
    assert result.chance == pytest.approx((5 / 5 + 4 / 4 + 2 / 2) / 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, c: retrieval.compute_hard_negative_top1(b, c, range(60)), "No two images"),
        (lambda b, c: retrieval.compute_hard_negative_top1(b, c, ["a"]), "1 group labels"),
        (lambda b, c: retrieval.top1_image_from_brain(b[:5], c), "differ once flattened"),
        (lambda b, c: retrieval.top1_image_from_brain(b * float("nan"), c), "NaN"),
        (lambda b, c: retrieval.rank_each(b, c, "fwd"), "unknown"),
        (
            lambda b, c: retrieval.rerank_second_order(b, c, b[:, :1], c[:, :1], 61),
            "61 of 60 candidates",
        ),
        (
            lambda b, c: retrieval.rerank_second_order(b, c, b[:5], c[:5], 3),
            "of 5 candidates cannot be re-ranked by embeddings of 60",
        ),
        (
            lambda b, c: retrieval.evaluate_published_protocol(b, c, 20, sampling="all"),
            "choose one of random, consecutive",
        ),
        (lambda b, c: retrieval.evaluate_published_protocol(b, c, 20, shards=61), "1 to 60 shards"),
        (lambda b, c: retrieval.find_nearest(b, c, 61), "holds 60 rows"),
        (lambda b, c: retrieval.find_nearest(b, c[:, :2]), "same encoder"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(PerceptError, match=message):
        call(*embeddings())


def test_consecutive_pools_are_runs_of_a_resampled_stream_of_shards():
    pools = retrieval._sample_consecutive_pools(60, 20, 2, np.random.default_rng(0))
    stream = np.concatenate([next(pools) for _ in range(30)])
    shards = stream[: len(stream) // 30 * 30].reshape(-1, 30)
    # whole, in order, drawn again and again
    assert {tuple(part) for part in shards} == {
        tuple(range(30)),
        tuple(range(30, 60)),
    }
    brain, clip = embeddings()
    table = retrieval.evaluate_published_protocol(
        brain, clip, pool_size=20, n_pools=400, sampling="consecutive"
    )
    similarity = cosines(brain, clip)
    # within a shard, or over the end of one
    blocks = [np.r_[a : a + 20] % 60 for a in (0, 20, 10, 30, 50, 40)]
    every = [np.mean(similarity[np.ix_(b, b)].argmax(1) == np.arange(20)) for b in blocks]
    assert (
        min(every) - 0.1
        < table.set_index("direction").loc["image_from_brain", "value"]
        < max(every) + 0.1
    )


def test_a_copy_in_a_consecutive_pool_is_found_once():
    clip = torch.eye(4)
    table = retrieval.evaluate_published_protocol(
        clip, clip, pool_size=4, n_pools=50, sampling="consecutive", shards=4
    )
    expected = []
    pools = retrieval._sample_consecutive_pools(4, 4, 4, np.random.default_rng(0))
    for pool in (next(pools) for _ in range(50)):
        # as the published top-k
        order = np.argsort(clip.numpy()[np.ix_(pool, pool)], axis=1, kind="stable")
        expected.append(np.mean(order[:, -1] == np.arange(4)))
    assert min(expected) < 1 and table["value"].tolist() == pytest.approx([np.mean(expected)] * 2)


@pytest.mark.parametrize("direction", retrieval.REFERENCE_NAMES)
@pytest.mark.parametrize("chunk", [256, 7])
def test_second_order_reranks_the_k_nearest(direction, chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    brain, clip = embeddings(noise=1.0)
    one_brain, one_clip = (x[:, :1] for x in embeddings(noise=2.0, seed=1))
    result = retrieval.rerank_second_order(
        brain, clip, one_brain, one_clip, k=9, direction=direction
    )
    tokens, single = (
        cosines(*pair) if direction == "image_from_brain" else cosines(*pair).T
        for pair in ((brain, clip), (one_brain, one_clip))
    )
    for i in range(60):
        nearest = np.argsort(-single[i])[:9]
        reranked = nearest[np.argsort(-tokens[i][nearest])]
        assert result.candidates[i].tolist() == reranked.tolist()
        assert result.first_ranks[i] == 1 + list(np.argsort(-single[i])).index(i)
        assert result.final_ranks[i] == (
            1 + list(reranked).index(i) if i in reranked else result.first_ranks[i]
        )
    np.testing.assert_array_equal(result.second_ranks, retrieval.rank_each(brain, clip, direction))
    assert (result.final_ranks == 1).mean() > (result.first_ranks == 1).mean()
    all_candidates = retrieval.rerank_second_order(
        brain, clip, one_brain, one_clip, k=60, direction=direction
    )
    np.testing.assert_array_equal(all_candidates.final_ranks, all_candidates.second_ranks)


def test_second_order_does_not_reward_ties():
    _, clip = embeddings()
    same = torch.ones_like(clip)
    assert (retrieval.rerank_second_order(same, same, same, same, k=5).final_ranks == 1).sum() == 0


def test_embeddings_of_another_run_must_be_of_the_same_images(tmp_path):
    with pytest.raises(PerceptError, match="is missing: run notebook 03 for the run first"):
        retrieval.load_run_embeddings(tmp_path / "first", [1, 2])
    (tmp_path / "first").mkdir()
    path, content = (
        tmp_path / "first" / "reconstructions.safetensors",
        {"true_tokens": torch.ones(3, 1, 4), "image_ids": torch.tensor([5, 6, 7])},
    )
    save_file(content, path)
    with pytest.raises(
        PerceptError, match="has no projected_network: .* decoder = network or both"
    ):
        retrieval.load_run_embeddings(tmp_path / "first", [5, 6, 7])
    save_file(content | {"projected_network": torch.zeros(3, 1, 4)}, path)
    brain, clip = retrieval.load_run_embeddings(tmp_path / "first", [5, 6, 7])
    assert not brain.any() and clip.all() and brain.shape == clip.shape == (3, 1, 4)
    for ids, message in (
        ([7, 6, 5], "the same ones in another order"),
        ([5, 6], "2 of them the same"),
        ([8, 9, 1], "0 of them the same"),
    ):
        with pytest.raises(PerceptError, match=message):
            retrieval.load_run_embeddings(tmp_path / "first", ids)


def test_nearest_is_exact():
    queries, index = embeddings()
    values, rows = retrieval.find_nearest(queries[:9], index, k=4)
    similarity = cosines(queries[:9], index)
    np.testing.assert_array_equal(rows, np.argsort(-similarity, axis=1)[:, :4])
    np.testing.assert_allclose(values, -np.sort(-similarity, axis=1)[:, :4], atol=1e-5)


def test_an_index_with_nan_is_refused():
    rows = torch.eye(4).repeat(100, 1)
    rows[300, 2] = torch.nan
    with pytest.raises(PerceptError, match="rows from 256 on of the index hold NaN"):
        retrieval.find_nearest(torch.eye(4), rows)
    with pytest.raises(PerceptError, match="queries hold NaN"):
        retrieval.find_nearest(rows[299:301], torch.eye(4))
