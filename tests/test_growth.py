"""Work and memory that must not grow faster than the data, each looked at in two sizes."""

import time

import numpy as np
import pytest
import torch

from src import metrics, retrieval
from src.data.targets import TargetCache
from src.decoding import selection
from src.metrics import two_way_each
from src.retrieval import compute_retrieval_by_pool_size, evaluate_published_protocol
from src.utils import PerceptError


def open_targets(images):
    """Targets of so many images, of which only the numbers are there."""
    targets = object.__new__(TargetCache)
    targets.folder, targets.image_ids = "targets", np.arange(0, 2 * images, 2)
    return targets


def test_a_batch_is_checked_in_a_time_that_does_not_grow_with_the_images():
    seconds = []
    for images in (10_000, 1_000_000):
        targets = open_targets(images)
        ids = np.random.default_rng(0).choice(targets.image_ids, 32)
        targets.check(ids)
        durations = []
        for _ in range(50):
            start = time.perf_counter()
            targets.check(ids)
            durations.append(time.perf_counter() - start)
        seconds.append(min(durations))
    assert seconds[1] < 10 * seconds[0]  # of a hundred times as many; sorting them took 1.1 s


@pytest.mark.parametrize("image", [-1, 3, 2_000])
def test_an_image_without_a_target_is_refused(image):
    with pytest.raises(PerceptError, match=f"of 1 images, the first is {image}"):
        open_targets(1_000).check([4, image, 6])
    with pytest.raises(PerceptError, match="of 1 images, the first is 4"):
        open_targets(0).check([4, 4])


@pytest.mark.parametrize("n", [40, 160])
def test_two_way_correlates_a_bounded_block_with_all_images(n, monkeypatch):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(n, 6)).astype(np.float32)
    recon = (real + rng.normal(size=(n, 6))).astype(np.float32)
    expected = two_way_each(real, recon)
    sizes, count = [], metrics._count_beaten

    def watch(features, recon_features, at, targets):
        sizes.append(n * len(targets))
        return count(features, recon_features, at, targets)

    monkeypatch.setattr(metrics, "_count_beaten", watch)
    monkeypatch.setattr(metrics, "BLOCK", 4 * 1000)
    assert np.array_equal(two_way_each(real, recon), expected)
    assert max(sizes) <= 1000 and sum(sizes) == n * n


def test_similarities_are_computed_once_for_all_pools(monkeypatch):
    brain = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    clip = brain + torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    seen, score = [], retrieval._score_pools
    monkeypatch.setattr(
        retrieval, "_score_pools", lambda *args: seen.append(args[0]) or score(*args)
    )
    table = compute_retrieval_by_pool_size(brain, clip, (10, 30))
    assert len(seen) == 3 and len({similarity.data_ptr() for similarity in seen}) == 1
    for size in (10, 30, 60):
        alone = evaluate_published_protocol(brain, clip, size)
        rows = table[table.pool == size].reset_index(drop=True)
        assert rows.equals(alone)


class Squares:
    """A CLIP whose tokens are the pixels."""

    def __init__(self):
        self.batches = []

    def embed_image(self, images):
        self.batches.append(len(images))
        return images.flatten(1)


@pytest.mark.parametrize("images", [30, 90])
@pytest.mark.parametrize("samples", [2, 3, 16])
def test_samples_are_chosen_in_blocks_of_images(images, samples, monkeypatch):
    candidates = torch.rand(images, samples, 3, 2, 2)
    projected = torch.rand(images, 4, 3)
    vectors = torch.nn.functional.normalize(candidates.flatten(2), dim=-1)
    expected = (vectors * projected.flatten(1)[:, None]).sum(-1).argmax(1)
    sizes, embed = [], selection._embed_candidates

    def watch(clipper, part):
        sizes.append(part.shape[0] * samples)
        return embed(clipper, part)

    monkeypatch.setattr(selection, "_embed_candidates", watch)
    _, best = selection.select_best(Squares(), projected, candidates)
    assert torch.equal(best, expected) and max(sizes) <= 16 * selection.EMBEDDED
    cosines = torch.einsum("isf,itf->ist", vectors, vectors)
    pairs = torch.triu_indices(samples, samples, 1)
    spread = 1 - cosines[:, pairs[0], pairs[1]].mean(1)
    result = selection.compute_sample_spread(Squares(), candidates)
    torch.testing.assert_close(result, spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 3, 16, 100])
def test_blocks_of_images_do_not_change_the_batches_of_clip(samples):
    candidates = torch.zeros(2000, samples, 1)
    clipper = Squares()
    for at in selection._split_images(candidates):
        selection._embed_candidates(clipper, candidates[at])
    whole = [64] * (2000 * samples // 64)
    assert clipper.batches[: len(whole)] == whole
