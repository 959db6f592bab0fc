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
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
from sklearn.model_selection import StratifiedKFold, train_test_split

from src.data.images import write_images
from src.data.layout import dataset_folder, subject_folder, write_image_table, write_subject
from src.utils import PerceptError

KEYS = ("fmriTrn", "fmriTest", "stimTrn", "stimTest", "labelTrn", "labelTest")
DIGITS = {1: "six", 2: "nine"}
WHERE = (
    "request 'Handwritten digits in fMRI (69 data set)' from the Donders Repository "
    "(hdl.handle.net/11633/di.dcc.DSC_2018.00112_485), "
    "accept its data use agreement, and give the path of digit69_28x28.mat"
)
TERMS = (
    "Data use agreement of the Donders Repository (DSC_2018.00112_485), accepted on request: no"
    " redistribution, so the file never becomes part of this project."
)
ACKNOWLEDGEMENT = (
    "Data were provided (in part) by the Donders Institute for Brain, Cognition and Behaviour, "
    "Radboud University Nijmegen."
)


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int = 1,
    *,
    split: str = "official",
    val: int = 10,
    seed: int = 42,
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

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: if the file is absent (saying where to ask for it) or something else, or an
            option makes no sense.
    """
    if subj != 1:
        raise PerceptError(f"digits69 has one subject, 1, not {subj}: set subj to 1.")
    betas, images, labels, official = load(source)
    splits, protocol = _splits(labels, official, split, val, seed)
    n, folder = len(betas), dataset_folder(dataset)
    numbers = np.arange(n)
    trials = pd.DataFrame(
        {"trial": numbers, "image": numbers, "session": 0, "run": 0, "repeat": 0, "split": splits}
    )
    attributes = {
        "source": "digits69, van Gerven, de Lange & Heskes 2010",
        "units": "as in the file",
        "normalisation": "as in the file",
        "protocol": protocol,
        "acknowledgement": ACKNOWLEDGEMENT,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images.h5", images, numbers)
    write_image_table(
        folder / "labels.parquet",
        pd.DataFrame({"image": numbers, "digit": [DIGITS[int(d)] for d in labels]}),
    )
    return write_subject(subject_folder(dataset, subj), betas, trials, None, attributes)


def load(source: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of the file, training images first.

    Returns:
        betas float32 (images, voxels), images uint8 (images, 28, 28, 3) upright, labels int
        (images,) 1 = six, 2 = nine, and test bool (images,).

    Raises:
        PerceptError: as `read`.
    """
    path = Path(source).expanduser()
    path = path / "digit69_28x28.mat" if path.is_dir() else path
    if not path.exists():
        raise PerceptError(f"{path} is absent: {WHERE}.")
    try:
        content = scipy.io.loadmat(path)
    except (
        ValueError,
        NotImplementedError,
        OSError,
        TypeError,
        scipy.io.matlab.MatReadError,
    ) as error:
        raise PerceptError(
            f"{path} is no MATLAB 5 file that can be read ({error}): {WHERE}."
        ) from error
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise PerceptError(f"{path} lacks {missing}, it is another file than expected: {WHERE}.")
    fmri, pixels, labels = (
        np.concatenate([content[k + "Trn"], content[k + "Test"]]) for k in ("fmri", "stim", "label")
    )
    labels = labels.ravel().astype(np.int64)
    if (
        not len(fmri) == len(pixels) == len(labels)
        or pixels.shape[1:] != (784,)
        or not set(labels) <= set(DIGITS)
    ):
        raise PerceptError(
            f"{path}: fmri {fmri.shape}, stim {pixels.shape} and label {labels.shape} are not those"
            " of digits69."
        )
    upright = (
        pixels.astype(np.uint8).reshape(-1, 28, 28).transpose(0, 2, 1)
    )  # (images, columns, rows) -> (images, rows, columns)
    images = np.repeat(upright[..., None], 3, axis=-1)  # (images, 28, 28, 3)
    return fmri.astype(np.float32), images, labels, np.arange(len(fmri)) >= len(content["fmriTrn"])


def _splits(
    labels: np.ndarray, official: np.ndarray, split: str, val: int, seed: int
) -> tuple[np.ndarray, str]:
    """Split of each image, and the name of the protocol."""
    test, protocol = official, "digits69-official"
    if split != "official":
        match = re.fullmatch(r"fold-(\d+)-of-(\d+)", split)
        fold, of = (int(x) for x in match.groups()) if match else (0, 0)
        if not 1 <= fold <= of or not 2 <= of <= np.bincount(labels)[1:].min():
            raise PerceptError(
                f"split {split!r} must be official, or e.g. fold-3-of-10 with folds counted from 1."
            )
        parts = StratifiedKFold(of, shuffle=True, random_state=seed).split(labels, labels)
        test = np.isin(np.arange(len(labels)), [test for _, test in parts][fold - 1])
        protocol = f"digits69-{of}fold-{fold}"
    splits, rest = np.where(test, "test", "train").astype(object), np.flatnonzero(~test)
    if val:
        if not 2 <= val <= len(rest) - 2:
            raise PerceptError(
                f"val is {val}: of {len(rest)} images between 2 and {len(rest) - 2} can be"
                " validation, or 0."
            )
        splits[
            train_test_split(rest, test_size=val, random_state=seed, stratify=labels[rest])[1]
        ] = "val"
    return splits, protocol
