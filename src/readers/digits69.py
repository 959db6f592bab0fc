"""digits69: handwritten sixes and nines in V1-V3 at 3 T (van Gerven, de Lange & Heskes 2010), read
from the MATLAB file that the user has.

- The data use agreement forbids redistribution, so the file is never part of this project: the user
  gives its path.
- The file's own split is an easy one (a ridge regression scores better on it than on any of 40
  random ones), so folds over all 100 images are here beside it, as a protocol with another name.
- Images are stored column by column, as MATLAB does; they come out upright.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, train_test_split

from src.readers.common import load_mat, to_integers
from src.readers.recording import Recording, store_recording
from src.utils import PerceptError

FILE = "digit69_28x28.mat"
KEYS = ("fmriTrn", "fmriTest", "stimTrn", "stimTest", "labelTrn", "labelTest")
DIGITS = {1: "six", 2: "nine"}
WHERE = (
    "request 'Handwritten digits in fMRI (69 data set)' from the Donders Repository "
    "(hdl.handle.net/11633/di.dcc.DSC_2018.00112_485), "
    f"accept its data use agreement, and give the path of {FILE}"
)
TERMS = (
    "Data use agreement of the Donders Repository (DSC_2018.00112_485), accepted on request: no"
    " redistribution, so the file never becomes part of this project."
)
ACKNOWLEDGEMENT = (
    "Data were provided (in part) by the Donders Institute for Brain, Cognition and Behaviour, "
    "Radboud University Nijmegen."
)


@dataclass(frozen=True)
class DigitArrays:
    """The arrays of the file, training images first.

    Attributes:
        betas: float32 (images, voxels).
        images: uint8 (images, 28, 28, 3), upright.
        labels: int64 (images,), 1 = six, 2 = nine.
        official_test: bool (images,), the test images of the file's own split.
    """

    betas: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    official_test: np.ndarray


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int = 1,
    *,
    split: str = "official",
    val: int = 10,
    seed: int = 42,
    bad_voxels: str = "refuse",
) -> Path:
    """Read digits69 into the prepared layout: one trial an image, one session.

    Args:
        source: the MATLAB file, or the folder that holds digit69_28x28.mat.
        dataset: name or folder of the prepared dataset; one for each split, as the images keep
            their ids.
        subj: 1, the only one.
        split: "official" (the 10 test images of the file), or "fold-3-of-10": the third part of all
            images, stratified by digit, is the test set.
        val: number of the remaining images that become validation, stratified by digit; 0 for none.
        seed: of the folds and of the choice of validation images.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: if the file is absent (saying where to ask for it) or something else, or an
            option makes no sense.
    """
    if subj != 1:
        raise PerceptError(f"digits69 has one subject, 1, not {subj}: set subj to 1.")
    digits = load_arrays(source)
    splits, protocol = split_images(digits.labels, digits.official_test, split, val, seed)
    numbers = np.arange(len(digits.betas))
    columns = {"trial": numbers, "image": numbers, "session": 0, "run": 0, "repeat": 0}
    attributes = {
        "source": "digits69, van Gerven, de Lange & Heskes 2010",
        "units": "as in the file",
        "normalisation": "as in the file",
        "protocol": protocol,
        "acknowledgement": ACKNOWLEDGEMENT,
        "seed": seed,
    }
    names = [DIGITS[int(label)] for label in digits.labels]
    recording = Recording(
        betas=digits.betas,
        trials=pd.DataFrame({**columns, "split": splits}),
        images=digits.images,
        image_ids=numbers,
        attributes=attributes,
        labels=pd.DataFrame({"image": numbers, "digit": names}),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def load_arrays(source: str | Path) -> DigitArrays:
    """Load the arrays of the file.

    Raises:
        PerceptError: as `read`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / FILE
    if not path.exists():
        raise PerceptError(f"{path} is absent: {WHERE}.")
    content = load_mat(path, KEYS, WHERE)
    _check_halves(content, path)
    fmri, pixels, labels = (
        np.concatenate([content[f"{name}Trn"], content[f"{name}Test"]])
        for name in ("fmri", "stim", "label")
    )
    labels = to_integers(labels.ravel(), f"label of {path}")
    same_length = len(fmri) == len(pixels) == len(labels)
    if not same_length or pixels.shape[1:] != (784,) or not set(labels) <= set(DIGITS):
        raise PerceptError(
            f"{path}: fmri {fmri.shape}, stim {pixels.shape} and label {labels.shape} are not those"
            " of digits69."
        )
    _check_pixels(pixels, path)
    by_column = pixels.astype(np.uint8).reshape(-1, 28, 28)  # (images, columns, rows)
    upright = by_column.transpose(0, 2, 1)  # (images, rows, columns)
    return DigitArrays(
        betas=fmri.astype(np.float32),
        images=np.repeat(upright[..., None], 3, axis=-1),
        labels=labels,
        official_test=np.arange(len(fmri)) >= len(content["fmriTrn"]),
    )


def _check_halves(content: dict[str, np.ndarray], path: Path) -> None:
    """Refuse training and test arrays that do not go below one another."""
    for name in ("fmri", "stim", "label"):
        train, test = content[f"{name}Trn"], content[f"{name}Test"]
        if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
            raise PerceptError(
                f"{name}Trn and {name}Test of {path} have shapes {train.shape} and {test.shape}:"
                " both must be (images, columns) with the same columns, so take the file as it is"
                " given out."
            )


def _check_pixels(pixels: np.ndarray, path: Path) -> None:
    """Refuse pixels that are not the grey levels 0 to 255."""
    lowest, largest = pixels.min(), pixels.max()
    if not (lowest >= 0 and 1 < largest <= 255) or (np.rint(pixels) != pixels).any():
        raise PerceptError(
            f"stimTrn and stimTest of {path} hold values from {lowest:g} to {largest:g}: pixels are"
            " whole grey levels from 0 to 255, so multiply or round them before they are saved."
        )


def split_images(
    labels: np.ndarray, official_test: np.ndarray, split: str, val: int, seed: int
) -> tuple[np.ndarray, str]:
    """Split of each image (images,), and the name of the protocol; arguments as in `read`."""
    is_test, protocol = _choose_test(labels, official_test, split, seed)
    return _choose_validation(labels, is_test, val, seed), protocol


def _choose_test(
    labels: np.ndarray, official_test: np.ndarray, split: str, seed: int
) -> tuple[np.ndarray, str]:
    if split == "official":
        return official_test, "digits69-official"
    match = re.fullmatch(r"fold-(\d+)-of-(\d+)", split)
    fold, n_folds = (int(match[1]), int(match[2])) if match else (0, 0)
    rarest = np.bincount(labels)[1:].min()
    if not 1 <= fold <= n_folds or not 2 <= n_folds <= rarest:
        raise PerceptError(
            f"split {split!r} must be official, or e.g. fold-3-of-10 with folds counted from 1."
        )
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)
    test_rows = [test for _, test in folds][fold - 1]
    return np.isin(np.arange(len(labels)), test_rows), f"digits69-{n_folds}fold-{fold}"


def _choose_validation(labels: np.ndarray, is_test: np.ndarray, val: int, seed: int) -> np.ndarray:
    """Split of each image, with `val` of those that are not in the test set for validation."""
    splits = np.where(is_test, "test", "train").astype(object)
    remaining = np.flatnonzero(~is_test)
    if not val:
        return splits
    if not 2 <= val <= len(remaining) - 2:
        raise PerceptError(
            f"val is {val}: of {len(remaining)} images between 2 and {len(remaining) - 2} can be"
            " validation, or 0."
        )
    _, val_rows = train_test_split(
        remaining, test_size=val, random_state=seed, stratify=labels[remaining]
    )
    splits[val_rows] = "val"
    return splits
