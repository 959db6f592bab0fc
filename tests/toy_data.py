"""A handful of synthetic trials in the prepared layout, for the tests of src.data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from src import data
from src.data.images import write_images
from src.data.layout import write_subject
from src.data.subject import Subject, open_subject

ATTRIBUTES = {"source": "test", "units": "a.u.", "normalisation": "none", "protocol": "toy"}
N_VOXELS = 7
FLAGS = {"V1": [0, 2], "V2": [2, 5], "FFA": [6], "PPA": []}  # voxels of each region


@dataclass(frozen=True)
class World:
    """A prepared subject and what it was written from."""

    folder: Path
    betas: np.ndarray
    trials: pd.DataFrame
    images: np.ndarray
    ids: np.ndarray
    subject: Subject


def make_trials(n_images=12, repeats=3, sessions=2, seed=0):
    """Every image `repeats` times in random order; ids 100, 103, 106...; the last three images
    test, the three before val.
    """
    rng = np.random.default_rng(seed)
    image = 100 + 3 * rng.permutation(np.repeat(np.arange(n_images), repeats))
    trials = pd.DataFrame({"trial": np.arange(len(image)), "image": image})
    trials["session"] = trials["trial"] * sessions // len(trials)
    trials["run"] = 0
    trials["repeat"] = data.number_repeats(trials)
    position = (trials["image"] - 100) // 3
    trials["split"] = np.select(
        [position >= n_images - 3, position >= n_images - 6], ["test", "val"], "train"
    )
    return trials


def prepare(folder, dtype=np.float32, subj=1, **options):
    trials = make_trials(**options)
    rng = np.random.default_rng(1)
    betas = (
        rng.standard_normal((len(trials), N_VOXELS)) * 3 + 5 * trials["session"].to_numpy()[:, None]
    ).astype(dtype)
    ids = np.unique(trials["image"])
    images = rng.integers(0, 256, (len(ids), 4, 6, 3), dtype=np.uint8)
    if not (folder / "images.h5").exists():
        write_images(folder / "images.h5", images, ids)
    write_subject(folder / f"subj{subj:02d}", betas, trials, None, ATTRIBUTES)
    return betas, trials, images, ids


def make_world(folder):
    """Subject 1, opened."""
    betas, trials, images, ids = prepare(folder)
    return World(folder, betas, trials, images, ids, open_subject(folder, 1))


def add_regions(world):
    """Subject 2: the same betas with regions; two share a voxel and one has none."""
    voxels = np.arange(N_VOXELS)
    flags = {name: np.isin(voxels, columns) for name, columns in FLAGS.items()}
    table = pd.DataFrame(flags | {"x": voxels})
    write_subject(world.folder / "subj02", world.betas, world.trials, table, ATTRIBUTES)
    return open_subject(world.folder, 2)
