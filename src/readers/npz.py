"""Plain arrays in one .npz: bring your own data.

Keys (n trials, m images, v voxels):

- betas (n, v): required. images (m, height, width, 3) or grey (m, height, width), uint8: required.
- image_index (n,): which row of `images` each trial showed; default: trial i showed image i (then n
  = m).
- image_ids (m,): your ids of the images; default 0..m-1.
- session, run (n,): default 0. repeat (n,): default counted in the order of the rows. trial (n,):
  default 0..n-1.
- split (n,): train, val, test or exclude for each trial, all trials of an image alike; default: a
  random split of the images, 80/10/10.
- captions (m,), labels (m,): texts. roi_<name> (v,): Boolean; xyz (v, 3): positions. units,
  normalisation, protocol: texts.

Nothing pickled is read: texts must be NumPy string arrays, not object arrays.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.utils import PerceptError

TERMS = "Your own data, under your own terms."
PER_TRIAL = ("image_index", "session", "run", "repeat", "trial", "split")
PER_IMAGE = ("image_ids", "captions", "labels")
TEXTS = ("units", "normalisation", "protocol")


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int = 1,
    *,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 42,
) -> Path:
    """Read an .npz (keys: see the module) into the prepared layout.

    Args:
        source: the file.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        val, test: shares of the images, used where the file has no split.
        seed: of the random split of images.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or unknown key, a wrong shape, or data that `write_subject`
            refuses.
    """
    path = Path(source).expanduser()
    arrays = _load(path)
    betas, images = arrays["betas"], _images(arrays["images"], path)
    _check_lengths(arrays, path)
    ids = arrays.get("image_ids", np.arange(len(images))).astype(np.int64)
    protocol = str(arrays.get("protocol", path.stem))
    trials = _trials(arrays, ids, len(betas), path)
    if "split" not in arrays:
        trials["split"] = _random_split(trials["image"].to_numpy(), val, test, seed)
        protocol += f"-random-seed{seed}"
    trials["repeat"] = arrays["repeat"] if "repeat" in arrays else number_repeats(trials)
    check_trials(trials)
    attributes: dict[str, Any] = {"source": f"npz: {path.name}", "protocol": protocol}
    attributes |= {key: str(arrays.get(key, "unknown")) for key in ("units", "normalisation")}
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images.h5", images, ids)
    for key, column in (("captions", "caption"), ("labels", "label")):
        if key in arrays:
            write_image_table(
                folder / f"{key}.parquet",
                pd.DataFrame({"image": ids, column: arrays[key].astype(str)}),
            )
    return write_subject(
        subject_folder(dataset, subj), betas, trials, _voxels(arrays, betas.shape[1]), attributes
    )


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise PerceptError(
            f"{path} is missing: give the path of an .npz with the arrays betas and images."
        )
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise PerceptError(
                f"{path} holds one bare array: save an .npz with the arrays betas and images."
            )
        with file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PerceptError(
            f"{path} cannot be read, it is damaged, cut off or no .npz of plain arrays ({error}):"
            " save it again with np.savez, texts as arrays of strings."
        ) from error
    missing = [key for key in ("betas", "images") if key not in arrays]
    known = {"betas", "images", "xyz", *PER_TRIAL, *PER_IMAGE, *TEXTS}
    unknown = [key for key in arrays if key not in known and not key.startswith("roi_")]
    if missing:
        raise PerceptError(
            f"{path} lacks the arrays {missing}: it has {sorted(arrays)}, add those that are"
            " missing."
        )
    if unknown:
        raise PerceptError(
            f"{path} has the unknown {unknown}: known are {', '.join(sorted(known))} and"
            " roi_<name>."
        )
    if arrays["betas"].ndim != 2:
        raise PerceptError(
            f"betas of {path} have shape {arrays['betas'].shape}: they must be (trials, voxels)."
        )
    return arrays


def _images(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 (n, height, width, 3), grey ones repeated."""
    images = np.repeat(images[..., None], 3, axis=-1) if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise PerceptError(
            f"images of {path} are {images.dtype} {images.shape}: they must be uint8 (n, height,"
            " width, 3) or (n, height, width)."
        )
    return images


def _check_lengths(arrays: dict[str, np.ndarray], path: Path) -> None:
    n, m, v = len(arrays["betas"]), len(arrays["images"]), arrays["betas"].shape[1]
    rois = [key for key in arrays if key.startswith("roi_")]
    for keys, length, what in (
        (PER_TRIAL, n, "trials"),
        (PER_IMAGE, m, "images"),
        (rois, v, "voxels"),
    ):
        for key in keys:
            if key in arrays and arrays[key].shape != (length,):
                raise PerceptError(
                    f"{key} of {path} has shape {arrays[key].shape}, there are {length} {what}"
                    f" (betas {n} x {v} are trials x voxels, {m} images): it must be ({length},)."
                )
    if "xyz" in arrays and arrays["xyz"].shape != (v, 3):
        raise PerceptError(f"xyz of {path} has shape {arrays['xyz'].shape}: it must be ({v}, 3).")
    if "image_index" not in arrays and n != m:
        raise PerceptError(
            f"{path} has {n} trials of {m} images and no image_index: add the row of `images` that"
            " each trial showed."
        )
    ids, counts = np.unique(arrays.get("image_ids", np.arange(m)), return_counts=True)
    if (counts > 1).any():
        raise PerceptError(
            f"image_ids of {path} has {ids[counts.argmax()]} {counts.max()} times: give each image"
            " its own."
        )
    for key in ("image_index", "image_ids", "session", "run", "repeat", "trial"):
        if key in arrays and not np.issubdtype(arrays[key].dtype, np.integer):
            raise PerceptError(f"{key} of {path} is {arrays[key].dtype}: it must hold integers.")


def _trials(arrays: dict[str, np.ndarray], ids: np.ndarray, n: int, path: Path) -> pd.DataFrame:
    index = arrays.get("image_index", np.arange(n))
    wrong = np.flatnonzero((index < 0) | (index >= len(ids)))
    if len(wrong):
        raise PerceptError(
            f"image_index of {path} is {index[wrong[0]]} in row {wrong[0]}: the rows of `images`"
            f" are 0 to {len(ids) - 1}."
        )
    trials = pd.DataFrame({"trial": arrays.get("trial", np.arange(n)), "image": ids[index]})
    for key in ("session", "run"):
        trials[key] = arrays.get(key, np.zeros(n, np.int64))
    if "split" in arrays:
        trials["split"] = arrays["split"].astype(str)
    return trials


def _random_split(image: np.ndarray, val: float, test: float, seed: int) -> np.ndarray:
    """Split of each trial: images at random, by image."""
    unique, position = np.unique(image, return_inverse=True)
    least = len(unique) >= 4  # of which one each can be set aside
    n_val, n_test = (max(round(share * len(unique)), least and share > 0) for share in (val, test))
    if min(val, test) < 0 or len(unique) - n_val - n_test < 2:
        raise PerceptError(
            f"val={val} and test={test} of {len(unique)} images leave too few to train on: choose"
            " smaller shares."
        )
    split = np.full(len(unique), "train", dtype=object)
    order = np.random.default_rng(seed).permutation(len(unique))
    split[order[:n_test]], split[order[n_test : n_test + n_val]] = "test", "val"
    return split[position]


def _voxels(arrays: dict[str, np.ndarray], n_voxels: int) -> pd.DataFrame:
    voxels = pd.DataFrame({"voxel": np.arange(n_voxels)})
    for key in sorted(k for k in arrays if k.startswith("roi_")):
        voxels[key.removeprefix("roi_")] = arrays[key].astype(bool)
    if "xyz" in arrays:
        voxels[["x", "y", "z"]] = arrays["xyz"]
    return voxels
