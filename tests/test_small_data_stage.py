"""Notebook 08 for real: on digits that are drawn here, on the real ones where they lie, and on
arrays of every kind that a user may bring.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_stages import launch

from src.miniworld.formats import digits69 as digits69_format

pytestmark = pytest.mark.slow(reason="runs notebook 08 over all folds")

TOY = ("--folds", "3", "--inner_folds", "2", "--num_epochs", "1", "--networks", "1")
DECODERS = {"ridge", "kernel", "bayesian", "network", "mean"}


def run_stages(home: Path, recipe: str, source: Path, *flags: str) -> Path:
    """Prepare a file and run notebook 08 on it; returns the folder of its results."""
    prepared = launch(
        home,
        "notebooks/00_prepare_data.py",
        "-f",
        f"recipes/{recipe.split('/')[0]}/00_prepare_data.yaml",
        "-f",
        f"recipes/{recipe}/00_prepare_data.yaml",
        "--data_path",
        str(source),
    )
    assert prepared.returncode == 0, prepared.stderr
    done = launch(
        home,
        "notebooks/08_small_data.py",
        "-f",
        f"recipes/{recipe.split('/')[0]}/08_small_data.yaml",
        "-f",
        f"recipes/{recipe}/08_small_data.yaml",
        *TOY,
        *flags,
    )
    assert done.returncode == 0, done.stderr
    return next((home / "results").iterdir())


def test_both_splits_all_decoders_and_baselines_are_in_one_table(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 28, 28), dtype=np.uint8)
    labels = np.tile([1, 2], 20)
    images[labels == 1, :14] //= 8  # two classes that differ
    betas = images.reshape(40, -1)[:, :60] / 255 + rng.normal(0, 0.05, (40, 60))
    digits69_format.write(tmp_path / "digits.mat", betas, images, labels, n_test=8)
    results = run_stages(tmp_path, "small_data/digits69", tmp_path / "digits.mat")
    table = pd.read_csv(results / "small_data.csv")
    assert set(table["split"]) == {"official", "3-fold"}
    pcc = table[(table.metric == "pcc") & (table.split == "3-fold")].set_index("row")["value"]
    assert DECODERS | {"class_mean", "mean_image", "shuffled"} == set(pcc.index)
    assert pcc["ridge"] > pcc["mean_image"] and pcc["mean"] > pcc["shuffled"]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert set(table[table.split == "3-fold"].n) == {40}
    choices = pd.read_csv(results / "choices.csv")
    assert len(choices) == 2 * (3 + 1) and choices["mean of"].notna().all()
    assert (results / "contact_sheet.png").exists() and (results / "report.html").exists()
    names = {
        record["name"] for record in json.loads((results / "metrics.json").read_text())["metrics"]
    }
    assert {"pcc (mean, 3-fold)", "clip two-way (mean, official)"} <= names


def few_uneven_colour(rng):
    """20 images in colour, not square, as floats; 1 to 4 repeats in any order, in two sessions."""
    index = rng.permutation(np.repeat(np.arange(20), rng.integers(1, 5, 20)))
    sessions = np.arange(len(index)) * 2 // len(index)
    return {"images": rng.random((20, 9, 14, 3)), "image_index": index, "session": sessions}, 30


def one_picture_a_trial(rng):
    """Each trial brings its picture, so that pictures are repeated; labels, one of them rare."""
    images = rng.integers(0, 256, (24, 10, 10), dtype=np.uint8)[np.arange(48) % 24]
    labels = np.where(np.arange(48) % 24 == 0, "rare", np.where(np.arange(48) % 2, "a", "b"))
    return {"images": images, "image_index": np.arange(48), "labels": labels}, 30


def many_voxels_large_images(rng):
    """50,000 voxels, grey float images of 300 pixels, labels that name each image."""
    images = rng.random((20, 300, 200)).astype(np.float32)
    names = np.array([f"image {i}" for i in range(20)])
    return {"images": images, "image_index": np.arange(20), "labels": names}, 50_000


def official_split_and_dead_voxels(rng):
    """A split of its own; a voxel that is constant and one that is NaN in a trial."""
    index = rng.permutation(np.repeat(np.arange(30), 2))
    split = np.where(index < 6, "test", np.where(index < 9, "val", "train"))
    images = rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    images[3] = 128  # a blank picture
    ids = np.arange(30) * 7 + 5
    return {"images": images, "image_index": index, "split": split, "image_ids": ids}, 12


KINDS = (
    few_uneven_colour,
    one_picture_a_trial,
    many_voxels_large_images,
    official_split_and_dead_voxels,
)


def make_arrays(make):
    rng = np.random.default_rng(0)
    arrays, n_voxels = make(rng)
    shown = arrays["images"][arrays["image_index"]].reshape(len(arrays["image_index"]), -1)
    weights = rng.normal(size=(min(64, shown.shape[1]), n_voxels))
    betas = shown[:, : len(weights)] / shown.max() @ weights
    betas += 0.1 * rng.normal(size=betas.shape)
    if make is official_split_and_dead_voxels:
        betas[:, 3] = 2.5
        betas[4, 7] = np.nan
    return arrays | {"betas": betas.astype(np.float32)}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_arrays_of_any_kind_are_decoded(tmp_path, make):
    arrays = make_arrays(make)
    np.savez(tmp_path / "mine.npz", **arrays)
    results = run_stages(tmp_path, "small_data", tmp_path / "mine.npz")
    table = pd.read_csv(results / "small_data.csv")
    folds = table[table.split == "3-fold"]
    n_pictures = 24 if make is one_picture_a_trial else len(arrays["images"])
    assert set(folds.n) == {n_pictures} and np.isfinite(table.value).all()
    assert set(folds.row) >= DECODERS
    assert ("class_mean" in set(folds.row)) == (make is one_picture_a_trial)
    assert ("official" in set(table.split)) == ("split" in arrays)
    assert (results / "report.html").exists()


def test_one_image_is_left_out_at_a_time_and_parts_can_be_asked_for(tmp_path):
    arrays = make_arrays(few_uneven_colour)
    np.savez(tmp_path / "mine.npz", **arrays)
    flags = ("--folds", "0", "--targets", "pixels", "--decoders", "kernel")
    results = run_stages(tmp_path, "small_data", tmp_path / "mine.npz", *flags)
    table = pd.read_csv(results / "small_data.csv")
    assert set(table.split) == {"leave-one-out"} and set(table.metric) == {"pcc", "ssim", "mse"}
    assert set(table.row) == {"mean", "ridge", "kernel", "mean_image", "shuffled"}
    assert len(pd.read_csv(results / "choices.csv")) == 20


@pytest.mark.filterwarnings("ignore")
def test_real_digits_beat_every_baseline_on_the_official_split(tmp_path, digits69_path):
    results = run_stages(tmp_path, "small_data/digits69", digits69_path, "--targets", "pixels")
    table = pd.read_csv(results / "small_data.csv")
    pcc = table[(table.metric == "pcc") & (table.split == "official")].set_index("row")["value"]
    assert (
        pcc["ridge"] > 0.79
        and pcc["mean_image"] == pytest.approx(0.655, abs=2e-3)
        and pcc["class_mean"] == pytest.approx(0.736, abs=5e-3)
    )
