"""src.data.batches: repeats, seeds, targets and pixels in a batch."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from src.data.batches import BrainDataset
from src.data.draws import choose_repeats
from src.data.layout import write_subject
from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.data.targets import cache_augmented_targets, cache_targets
from src.utils import PerceptError
from tests.toy_data import ATTRIBUTES, N_VOXELS, make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_repeats_are_uniform_and_pure():
    ids, counts = np.arange(3000), np.full(3000, 3)
    chosen = choose_repeats(42, 5, ids, counts)
    np.testing.assert_array_equal(
        chosen[[7, 2000]], choose_repeats(42, 5, ids[[7, 2000]], counts[:2])
    )
    assert np.all(np.abs(np.bincount(chosen, minlength=3) - 1000) < 120)
    for other in (choose_repeats(42, 6, ids, counts), choose_repeats(43, 5, ids, counts)):
        assert (
            abs((other == chosen).mean() - 1 / 3) < 0.05
        )  # independent of the first, not a shift of it
    epochs = np.stack([choose_repeats(42, e, ids, counts) for e in range(60)])
    assert all(len(np.unique(column)) == 3 for column in epochs.T)


def test_random_repeat_is_a_trial_of_that_image(world):
    normaliser = Normaliser.fit(world.subject)
    dataset = BrainDataset(world.subject, "train", {}, normaliser, "random", seed=3)
    all_betas, trial_ids = world.subject.get_trials("train", normaliser)
    seen = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__([3, 0, 5, 0])
        assert batch["image"].tolist() == dataset.image_ids[[3, 0, 5, 0]].tolist()
        for voxels, image in zip(batch["voxels"].numpy(), batch["image"].tolist(), strict=True):
            matches = (all_betas[trial_ids == image] == voxels).all(1)
            assert matches.sum() == 1
        seen.append(batch["voxels"][0].numpy())
        torch.testing.assert_close(batch["voxels"][0], dataset[3]["voxels"], rtol=0, atol=0)
    assert len(np.unique(np.stack(seen), axis=0)) == 3


def test_mean_and_all(world):
    uneven = world.trials[
        ~((world.trials["image"] == 103) & (world.trials["repeat"] == 2))
    ].reset_index(drop=True)
    keep = ~((world.trials["image"] == 103) & (world.trials["repeat"] == 2)).to_numpy()
    write_subject(world.folder / "subj02", world.betas[keep], uneven, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    normaliser = Normaliser.fit(subject)
    average, ids = subject.get_mean_betas("train", normaliser=normaliser)
    mean = BrainDataset(subject, "train", {}, normaliser, "mean").__getitems__(range(len(ids)))
    np.testing.assert_allclose(mean["voxels"], average, rtol=1e-6)
    batch = BrainDataset(subject, "train", {}, normaliser, "all").__getitems__([1, 0])
    assert batch["voxels"].shape == (2, 3, N_VOXELS) and batch["image"].tolist() == [103, 100]
    torch.testing.assert_close(
        batch["voxels"][0, 2], batch["voxels"][0, 0], rtol=0, atol=0
    )  # cycled
    torch.testing.assert_close(batch["voxels"][0, :2].mean(0), mean["voxels"][1])
    torch.testing.assert_close(batch["voxels"][1].mean(0), mean["voxels"][0])


def test_each_trial_is_a_sample_with_its_own_image_and_target(world):
    normaliser = Normaliser.fit(world.subject)
    all_betas, ids = world.subject.get_trials("train", normaliser)
    cached = cache_targets(
        world.folder, "first", {}, world.ids, lambda x: x[:, 0, 0] / 255, (3,), "float32"
    )
    dataset = BrainDataset(
        world.subject, "train", {"first": cached}, normaliser, "each", pixels=True
    )
    assert len(dataset) == len(all_betas) == 3 * len(world.subject.image_ids("train"))
    batch = dataset.__getitems__(range(len(dataset)))
    assert sorted(map(tuple, batch["voxels"].numpy())) == sorted(
        map(tuple, all_betas)
    )  # every trial, once
    for voxels, image in zip(batch["voxels"].numpy(), batch["image"].tolist(), strict=True):
        assert (all_betas[ids == image] == voxels).all(1).sum() == 1
    torch.testing.assert_close(batch["first"], batch["pixels"][:, :, 0, 0].float() / 255)
    dataset.set_epoch(3)
    torch.testing.assert_close(
        dataset.__getitems__([4])["voxels"], batch["voxels"][4:5], rtol=0, atol=0
    )


def test_targets_follow_their_images_in_a_loader(world):
    ids = world.subject.image_ids("train")
    cached = cache_targets(
        world.folder, "first", {}, world.ids, lambda x: x[:, 0, 0] / 255, (3,), "float32"
    )
    targets = {"plain": np.stack([ids, -ids], 1), "cached": cached}
    dataset = BrainDataset(world.subject, "train", targets, None, "mean")
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, generator=generator, collate_fn=lambda batch: batch
    )
    batches = list(loader)
    assert sorted(sum((b["image"].tolist() for b in batches), [])) == ids.tolist()
    for batch in batches:
        assert (
            batch["voxels"].dtype == batch["plain"].dtype == batch["cached"].dtype == torch.float32
        )
        torch.testing.assert_close(batch["plain"][:, 0], batch["image"].float())
        expected = world.subject.images(batch["image"].numpy())[:, 0, 0] / 255
        np.testing.assert_allclose(batch["cached"], expected, rtol=1e-6)


def test_dataset_refusals(world):
    with pytest.raises(PerceptError, match="one of"):
        BrainDataset(world.subject, "train", {}, None, "some")
    with pytest.raises(PerceptError, match="Target x has 2 rows for the 6 images"):
        BrainDataset(world.subject, "train", {"x": np.zeros((2, 3))}, None)
    with pytest.raises(PerceptError, match="cannot be called voxels"):
        BrainDataset(world.subject, "train", {"voxels": np.zeros((6, 3))}, None)
    incomplete = cache_targets(world.folder, "few", {}, world.ids[:2], lambda x: x[:, 0, 0], (3,))
    with pytest.raises(PerceptError, match="lacks the targets of 4 images"):
        BrainDataset(world.subject, "train", {"x": incomplete}, None)
    with pytest.raises(PerceptError, match="no trials in split exclude"):
        BrainDataset(world.subject, "exclude", {}, None)
    with pytest.raises(IndexError):
        BrainDataset(world.subject, "train")[6]


def test_seeds_depend_on_seed_epoch_and_image_alone(world):
    dataset = BrainDataset(world.subject, "train", seed=3)
    seeds = dataset.__getitems__([0, 1, 2])["seed"]
    assert (
        torch.equal(dataset.__getitems__([2, 0])["seed"], seeds[[2, 0]])
        and len(seeds.unique()) == 3
        and (seeds >= 0).all()
    )
    dataset.set_epoch(1)
    assert not (dataset.__getitems__([0, 1, 2])["seed"] == seeds).any()


def test_pixels_are_those_of_the_images(world):
    batch = BrainDataset(world.subject, "train", pixels=True).__getitems__([1, 0])
    assert batch["pixels"].dtype == torch.uint8
    np.testing.assert_array_equal(
        batch["pixels"].permute(0, 2, 3, 1).numpy(), world.subject.images(batch["image"].numpy())
    )


def test_a_batch_may_show_one_number_of_repeat(world):
    dataset = BrainDataset(world.subject, "train", repeats="batch", seed=1)
    table = np.stack(world.subject.rows_by_image("train"))
    used = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        voxels = dataset.__getitems__([2, 0, 1])["voxels"].numpy()
        matching = [
            r
            for r in range(table.shape[1])
            if np.array_equal(voxels, world.subject.get_betas(table[[2, 0, 1], r]))
        ]
        assert len(matching) == 1
        used |= set(matching)
    assert used == set(range(table.shape[1]))


def test_splits_can_be_joined(world):
    dataset = BrainDataset(world.subject, "train+val")
    ids = np.union1d(world.subject.image_ids("train"), world.subject.image_ids("val"))
    np.testing.assert_array_equal(dataset.image_ids, ids)
    with pytest.raises(PerceptError, match="There is no split 'tset'"):
        world.subject.image_ids("train+tset")


def test_views_are_made_once_and_shown_in_turn(world):
    calls = []

    def encode(images, seed):
        calls.append(seed)
        return images[:, 0, 0].astype(np.float32) / 255 + np.random.default_rng(seed).random()

    options = {
        "fingerprint": {},
        "image_ids": world.ids,
        "encode": encode,
        "shape": (3,),
        "views": 3,
        "dtype": "float32",
    }
    views = cache_augmented_targets(world.folder, "colour", **options)
    assert len(calls) == 3 == len(set(calls))
    reopened = cache_augmented_targets(world.folder, "colour", **options)
    assert len(calls) == 3
    versions = np.stack([v.rows(world.ids) for v in reopened.versions])  # (versions, images, 3)
    dataset, used = BrainDataset(world.subject, "train", {"colour": views}, seed=5), set()
    rows_in_store = [int(np.flatnonzero(world.ids == image)[0]) for image in dataset.image_ids]
    for epoch in range(12):
        dataset.set_epoch(epoch)
        rows = dataset.__getitems__(range(len(dataset)))["colour"].numpy()
        chosen = [
            int(np.flatnonzero((versions[:, i] == row).all(1))[0])
            for i, row in zip(rows_in_store, rows, strict=True)
        ]
        used |= set(chosen)
        np.testing.assert_array_equal(rows[:1], dataset.__getitems__([0])["colour"].numpy())
    assert used == {0, 1, 2}
    with pytest.raises(PerceptError, match="choose at least 1"):
        cache_augmented_targets(world.folder, "colour", **options | {"views": 0})
