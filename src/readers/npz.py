"""Plain arrays in one .npz: bring your own data.

Keys (n trials, m images, v voxels):

- betas (n, v): required. images (m, height, width, 3) or grey (m, height, width) or (m, height,
  width, 1): required; pixels are from 0 to 255, or from 0 to 1 where none is larger.
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

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from src.data.layout import number_repeats
from src.files.foreign import load_npz
from src.readers.common import to_integers, to_mask
from src.readers.recording import Recording, store_recording
from src.utils import PerceptError

TERMS = "Your own data, under your own terms."

REQUIRED_KEYS = ("betas", "images")
TRIAL_KEYS = ("image_index", "session", "run", "repeat", "trial", "split")
IMAGE_KEYS = ("image_ids", "captions", "labels")
TEXT_KEYS = ("units", "normalisation", "protocol")
INTEGER_KEYS = ("image_index", "image_ids", "session", "run", "repeat", "trial")
ROI_PREFIX = "roi_"

Arrays = dict[str, np.ndarray]


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int = 1,
    *,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 42,
    bad_voxels: str = "refuse",
) -> Path:
    """Read an .npz (keys: see the module) into the prepared layout.

    Args:
        source: the file.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        val, test: shares of the images, used where the file has no split.
        seed: of the random split of images.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or unknown key, a wrong shape, or data that `store_recording`
            refuses.
    """
    path = Path(source).expanduser()
    arrays = _load(path)
    betas, images = arrays["betas"], _images(arrays["images"], path)
    _check_shapes(arrays, path)
    if "image_ids" not in arrays:
        _merge_equal_images(arrays, images, path)
    image_ids = arrays.get("image_ids", np.arange(len(images)))
    protocol = str(arrays.get("protocol", path.stem))
    trials = _trials(arrays, image_ids, path)
    if "split" not in arrays:
        trials["split"] = _random_split(trials["image"].to_numpy(), val, test, seed)
        protocol += f"-random-seed{seed}"
    trials["repeat"] = arrays["repeat"] if "repeat" in arrays else number_repeats(trials)
    attributes = {
        "source": f"npz: {path.name}",
        "protocol": protocol,
        "units": str(arrays.get("units", "unknown")),
        "normalisation": str(arrays.get("normalisation", "unknown")),
    }
    recording = Recording(
        betas=betas,
        trials=trials,
        images=images,
        image_ids=image_ids,
        attributes=attributes,
        voxels=_voxels(arrays, betas.shape[1], path),
        captions=_image_table(arrays, "captions", "caption", image_ids),
        labels=_image_table(arrays, "labels", "label", image_ids),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _load(path: Path) -> Arrays:
    """The arrays of the file, all of them with keys that are known."""
    if not path.exists():
        raise PerceptError(
            f"{path} is missing: give the path of an .npz with the arrays betas and images."
        )
    if path.suffix == ".npy":
        raise PerceptError(
            f"{path} holds one bare array: save an .npz with the arrays betas and images."
        )
    remedy = "save it again with np.savez, texts as arrays of strings"
    arrays = load_npz(path, remedy)
    _check_keys(arrays, path)
    return arrays


def _check_keys(arrays: Arrays, path: Path) -> None:
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise PerceptError(
            f"{path} lacks the arrays {missing}: it has {sorted(arrays)}, add those that are"
            " missing."
        )
    allowed = {*REQUIRED_KEYS, "xyz", *TRIAL_KEYS, *IMAGE_KEYS, *TEXT_KEYS}
    unknown = [key for key in arrays if key not in allowed and not key.startswith(ROI_PREFIX)]
    if unknown:
        raise PerceptError(
            f"{path} has the unknown {unknown}: known are {', '.join(sorted(allowed))} and"
            " roi_<name>."
        )
    if arrays["betas"].ndim != 2:
        raise PerceptError(
            f"betas of {path} have shape {arrays['betas'].shape}: they must be (trials, voxels)."
        )


def _images(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 (n, height, width, 3), grey ones repeated.

    Warns:
        UserWarning: where pixels are only 0 and 1, which are taken as black and white.
    """
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in shape:
        raise PerceptError(
            f"images of {path} have shape {shape}: they must be (n, height, width), (n, height,"
            " width, 1) or (n, height, width, 3)."
        )
    levels = _to_grey_levels(images, path)
    return np.repeat(levels, 3, axis=-1) if levels.shape[-1] == 1 else levels


def _to_grey_levels(images: np.ndarray, path: Path) -> np.ndarray:
    """Pixels as uint8, 0 to 255; where the largest is 1 or less they are multiplied by 255."""
    if images.dtype.kind not in "buif":
        raise PerceptError(
            f"images of {path} are {images.dtype}: pixels must be numbers, from 0 to 255 or from 0"
            " to 1."
        )
    if images.dtype == bool:
        return images.astype(np.uint8) * 255
    lowest, largest = images.min(), images.max()
    if not (lowest >= 0 and largest <= 255):  # NaN is refused, too
        raise PerceptError(
            f"images of {path} hold values from {lowest:g} to {largest:g}: pixels must be from 0 to"
            " 255 or from 0 to 1, so shift and scale them before they are saved."
        )
    if largest > 1:
        return images if images.dtype == np.uint8 else np.rint(images).astype(np.uint8)
    if images.dtype.kind in "ui":
        warnings.warn(
            f"images of {path.name} hold only 0 and 1, which are taken as black and white.",
            stacklevel=4,
        )
    return np.rint(images.astype(np.float32) * 255).astype(np.uint8)


def _check_shapes(arrays: Arrays, path: Path) -> None:
    """Refuse arrays whose length is not that of the trials, images or voxels they belong to."""
    n_trials, n_voxels = arrays["betas"].shape
    n_images = len(arrays["images"])
    rois = [key for key in arrays if key.startswith(ROI_PREFIX)]
    lengths = {key: (n_trials, "trials") for key in TRIAL_KEYS}
    lengths |= {key: (n_images, "images") for key in IMAGE_KEYS}
    lengths |= {key: (n_voxels, "voxels") for key in rois}
    for key, (length, unit) in lengths.items():
        if key in arrays and arrays[key].shape != (length,):
            raise PerceptError(
                f"{key} of {path} has shape {arrays[key].shape}, there are {length} {unit}"
                f" (betas {n_trials} x {n_voxels} are trials x voxels, {n_images} images): it must"
                f" be ({length},)."
            )
    if "xyz" in arrays and arrays["xyz"].shape != (n_voxels, 3):
        raise PerceptError(
            f"xyz of {path} has shape {arrays['xyz'].shape}: it must be ({n_voxels}, 3)."
        )
    if "image_index" not in arrays and n_trials != n_images:
        raise PerceptError(
            f"{path} has {n_trials} trials of {n_images} images and no image_index: add the row of"
            " `images` that each trial showed."
        )
    _check_integers(arrays, n_images, path)


def _check_integers(arrays: Arrays, n_images: int, path: Path) -> None:
    ids, counts = np.unique(arrays.get("image_ids", np.arange(n_images)), return_counts=True)
    if (counts > 1).any():
        raise PerceptError(
            f"image_ids of {path} has {ids[counts.argmax()]} {counts.max()} times: give each image"
            " its own."
        )
    for key in INTEGER_KEYS:
        if key in arrays and not np.issubdtype(arrays[key].dtype, np.integer):
            raise PerceptError(f"{key} of {path} is {arrays[key].dtype}: it must hold integers.")
        if key in arrays:
            arrays[key] = to_integers(arrays[key], f"{key} of {path}")


def _merge_equal_images(arrays: Arrays, images: np.ndarray, path: Path) -> None:
    """Let trials that showed equal pictures show one image, the first of them.

    So it is where a file has one picture a trial: a random split must not put the same picture on
    both sides.

    Warns:
        UserWarning: with the number of pictures that are repeated.
    """
    first_of_picture: dict[bytes, int] = {}
    first_rows = np.arange(len(images))
    for row, image in enumerate(images):
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        first_rows[row] = first_of_picture.setdefault(digest, row)
    n_repeated = len(images) - len(first_of_picture)
    if not n_repeated:
        return
    for key in ("captions", "labels"):
        if key in arrays and (arrays[key] != arrays[key][first_rows]).any():
            row = int(np.argmax(arrays[key] != arrays[key][first_rows]))
            raise PerceptError(
                f"Images {first_rows[row]} and {row} of {path} are the same picture with other"
                f" {key}: give each picture once, and image_index."
            )
    index = arrays.get("image_index", np.arange(len(arrays["betas"])))
    _check_index(index, len(images), path)
    arrays["image_index"] = first_rows[index]
    warnings.warn(
        f"{n_repeated} of the {len(images)} images of {path.name} repeat another one: trials that"
        " showed the same picture are taken as repeats of one image.",
        stacklevel=3,
    )


def _check_index(index: np.ndarray, n_images: int, path: Path) -> None:
    invalid = np.flatnonzero((index < 0) | (index >= n_images))
    if len(invalid):
        raise PerceptError(
            f"image_index of {path} is {index[invalid[0]]} in row {invalid[0]}: the rows of"
            f" `images` are 0 to {n_images - 1}."
        )


def _trials(arrays: Arrays, image_ids: np.ndarray, path: Path) -> pd.DataFrame:
    """The table of trials, without repeat, and without split where the file has none."""
    n_trials = len(arrays["betas"])
    index = arrays.get("image_index", np.arange(n_trials))
    _check_index(index, len(image_ids), path)
    numbers = arrays.get("trial", np.arange(n_trials))
    trials = pd.DataFrame({"trial": numbers, "image": image_ids[index]})
    for key in ("session", "run"):
        trials[key] = arrays.get(key, np.zeros(n_trials, np.int64))
    if "split" in arrays:
        trials["split"] = arrays["split"].astype(str)
    return trials


def _random_split(image: np.ndarray, val: float, test: float, seed: int) -> np.ndarray:
    """Split of each trial: images at random, by image."""
    unique, position = np.unique(image, return_inverse=True)
    n_images = len(unique)
    n_val, n_test = _split_size(val, n_images), _split_size(test, n_images)
    if min(val, test) < 0 or n_images - n_val - n_test < 2:
        raise PerceptError(
            f"val={val} and test={test} of {n_images} images leave too few to train on: choose"
            " smaller shares."
        )
    split = np.full(n_images, "train", dtype=object)
    order = np.random.default_rng(seed).permutation(n_images)
    split[order[:n_test]] = "test"
    split[order[n_test : n_test + n_val]] = "val"
    return split[position]


def _split_size(share: float, n_images: int) -> int:
    """Number of images for a share of them: at least one where there are four images or more."""
    size = round(share * n_images)
    if share > 0 and n_images >= 4:
        return max(size, 1)
    return max(size, 0)


def _voxels(arrays: Arrays, n_voxels: int, path: Path) -> pd.DataFrame:
    voxels = pd.DataFrame({"voxel": np.arange(n_voxels)})
    for key in sorted(arrays):
        if key.startswith(ROI_PREFIX):
            voxels[key.removeprefix(ROI_PREFIX)] = to_mask(arrays[key], f"{key} of {path}")
    if "xyz" in arrays:
        voxels[["x", "y", "z"]] = arrays["xyz"]
    return voxels


def _image_table(
    arrays: Arrays, key: str, column: str, image_ids: np.ndarray
) -> pd.DataFrame | None:
    """The texts of a key as a table with one row an image, or None where there are none."""
    if key not in arrays:
        return None
    return pd.DataFrame({"image": image_ids, column: arrays[key].astype(str)})
