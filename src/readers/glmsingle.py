"""GLMsingle's output (Prince et al. 2022): betas of single trials, and the order of its conditions.

- The Python version writes TYPEB_FITHRF, TYPEC_FITHRF_GLMDENOISE and TYPED_FITHRF_GLMDENOISE_RR as
  .npy (a pickled dictionary, which is read by an unpickler that runs nothing) or .hdf5, with
  `betasmd` (x, y, z, trials) in percent signal change; data of other shapes are (voxels, 1, 1,
  trials). TYPEA_ONOFF has no single trials and is refused.
- The MATLAB version writes .mat, v7.3, which is HDF5 with reversed axes: `modelmd` (trials, z, y,
  x).
- DESIGNINFO beside it has `stimorder`, the condition of each trial in order of time, counted from 0
  in Python and from 1 in MATLAB, and `numtrialrun`, the trials of each run.

The .npy is in memory as a whole while it is read; the other two are read piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.files.foreign import read_errors
from src.readers.common import find_in_folders, to_integers
from src.readers.hdf5 import load_array, open_dataset
from src.readers.places import Places
from src.readers.trial_files import ArrayFile
from src.safe_pickle import unpickle_npy
from src.utils import PerceptError

KINDS = ("TYPEB_FITHRF", "TYPEC_FITHRF_GLMDENOISE", "TYPED_FITHRF_GLMDENOISE_RR")

SUFFIXES = (".npy", ".hdf5", ".mat")

DESIGN = "DESIGNINFO"


@dataclass(frozen=True)
class Design:
    """What DESIGNINFO says.

    Attributes:
        conditions: (trials,) condition of each trial, counted from 0.
        runs: (trials,) run of each trial, counted from 0; -1 where the file does not say it.
        path: the file.
    """

    conditions: np.ndarray
    runs: np.ndarray
    path: Path


def is_glmsingle(path: Path) -> bool:
    """Whether a file is output of GLMsingle, by its name."""
    return path.suffix in SUFFIXES and path.name.startswith(("TYPE", "RUNWISEFIR", DESIGN))


def open_glmsingle(path: Path) -> ArrayFile:
    """Open a file of GLMsingle's output for its shape.

    Raises:
        PerceptError: for a damaged file, one without betas of single trials, or other axes.
    """
    if not path.name.startswith(KINDS):
        raise PerceptError(
            f"{path} has no betas of single trials: take {KINDS[-1]} (or"
            f" {' or '.join(KINDS[:-1])}) of the same output."
        )
    if path.suffix == ".npy":
        shape = _load_betas(path).shape
        return _describe(path, shape, "...t", lambda: nullcontext(_load_betas(path)))
    name, axes = ("modelmd", "tzyx") if path.suffix == ".mat" else ("betasmd", "...t")
    with open_dataset(path, name, "GLMsingle's output") as dataset:
        shape = dataset.shape
    return _describe(path, shape, axes, lambda: _open_betas(path, name))


@contextmanager
def _open_betas(path: Path, name: str) -> Iterator[Any]:
    with open_dataset(path, name, "GLMsingle's output") as dataset:
        yield dataset


def _load_betas(path: Path) -> np.ndarray:
    """The betas of a pickled .npy."""
    content = unpickle_npy(path)
    betas = content.get("betasmd") if isinstance(content, dict) else None
    if not isinstance(betas, np.ndarray) or betas.dtype.kind not in "fiu":
        raise PerceptError(
            f"{path} has no array betasmd: give GLMsingle's output with single-trial betas."
        )
    return betas


def _describe(path: Path, shape: tuple[int, ...], axes: str, load: Any) -> ArrayFile:
    if len(shape) not in (2, 4):
        raise PerceptError(
            f"The betas of {path} have the shape {shape}: GLMsingle's have the axes (x, y, z,"
            " trials) or (voxels, trials)."
        )
    n_trials, spatial = shape[-1], shape[:-1]
    if axes == "tzyx":
        n_trials, spatial = shape[0], shape[:0:-1]
    is_flat = len(spatial) == 1 or spatial[1:] == (1, 1)
    places = Places((int(spatial[0]),)) if is_flat else Places(tuple(map(int, spatial)))
    return ArrayFile(path, int(n_trials), places, load, axes)


def load_design(folder: Path) -> Design | None:
    """Load DESIGNINFO of an output folder, or None where it is absent.

    Raises:
        PerceptError: if it cannot be read, or has no order of conditions.
    """
    path = find_in_folders([f"{DESIGN}{suffix}" for suffix in SUFFIXES], folder)
    if path is None:
        return None
    order, n_of_run = _load_order(path)
    conditions = to_integers(order, f"stimorder of {path}").ravel()
    if path.suffix == ".mat":
        conditions = conditions - 1  # MATLAB counts from 1
    counts = to_integers(n_of_run, f"numtrialrun of {path}").ravel()
    runs = np.full(len(conditions), -1)
    if counts.sum() == len(conditions):
        runs = np.repeat(np.arange(len(counts)), counts)
    return Design(conditions, runs, path)


def _load_order(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """stimorder and numtrialrun as stored; the latter is empty where it is absent."""
    if path.suffix != ".npy":
        order = load_array(path, "stimorder", "GLMsingle's design")
        try:
            return order, load_array(path, "numtrialrun", "GLMsingle's design")
        except PerceptError:
            return order, np.empty(0, int)
    content = unpickle_npy(path)
    if not isinstance(content, dict) or "stimorder" not in content:
        raise PerceptError(
            f"{path} has no stimorder, the condition of each trial: give the trials as a table with"
            " the option events."
        )
    with read_errors(path):
        return np.asarray(content["stimorder"]), np.asarray(content.get("numtrialrun", []), int)
