"""MindEye2's data (webdataset tars + HDF5), read and written.

- wds/subj01/train/{0..N-1}.tar: one tar a session, its trials of images that only this subject saw.
  wds/subj01/new_test/0.tar: the trials of the shared images in all sessions (protocol nsd-1000);
  wds/subj01/test/0.tar: those in all but the last three sessions (the older test split, nsd-982). A
  sample is a trial: behav.npy (1, 17) float64, of which the columns image (0), subject (1), session
  from 1 (2), run from 1 (3) and global trial from 0 (5, the row of the betas) are used; past_behav,
  future_behav and olds_behav are not decoded.
- betas_all_subj01_fp32_renorm.hdf5, or betas_subj01.hdf5 (float16 is kept): `betas` (trials,
  voxels). They are z-scored by the source, with statistics of the training trials as the paper says
  (inferred); betas_subj01.hdf5 per session, test trials included, as the script that made it does.
- coco_images_224_float16.hdf5: `images` (73000, 3, 224, 224) in [0, 1]; only the images that were
  shown are read, rounded to uint8.
- brain_region_masks.hdf5: subj01/<region> (voxels,), the ROI columns. COCO_73k_subj_indices.hdf5:
  subj01 (trials,), the image of each trial, and shared1000.npy (images,), true for test images:
  both are checked against the tars. Each of the three may be absent.
- Not published, picked up where they exist: captions.parquet, labels.parquet, voxels_subj01.parquet
  (instead of the masks), splits.csv (columns image, split; otherwise validation images are chosen
  among the training images) and image_ids.csv (columns coco, image), which says what image a row of
  the images is where that is not the row itself.
- With sessions=k the training trials are those of the first k tars and the test set stays whole, as
  published.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES, disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_subject,
)
from src.readers.common import center_crop_resize, copy_tables, make_roi_columns, make_split_column
from src.readers.mindeye import array_of, samples
from src.utils import PerceptError, progress, require_file

TERMS = (
    "Derived from the Natural Scenes Dataset and under the same terms: agree to them at"
    " https://naturalscenesdataset.org before use; neither data nor images may be passed on. The"
    " files are the dataset pscotti/mindeyev2 on the Hugging Face hub."
)

TEST = {"nsd-1000": "new_test", "nsd-982": "test"}  # folder of the test trials of each protocol

IMAGES, INDICES, MASKS, SHARED = (
    "coco_images_224_float16.hdf5",
    "COCO_73k_subj_indices.hdf5",
    "brain_region_masks.hdf5",
    "shared1000.npy",
)

NORMALISATION = {
    "betas_all_subj{subj:02d}_fp32_renorm.hdf5": (
        "per voxel with statistics of the training trials, by the source"
    ),
    "betas_subj{subj:02d}.hdf5": "per voxel and session, test trials included, by the source",
}

NEIGHBOURS = {
    "past_behav": 15,
    "future_behav": 15,
    "olds_behav": 3,
}  # rows of the arrays about other trials


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    protocol: str = "nsd-1000",
    sessions: int = 0,
    image_size: int = 224,
    val_images: int = 300,
    seed: int = 42,
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder that holds wds/ and the HDF5 files.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        protocol: nsd-1000 (the test trials of all sessions, as MindEye2 reports) or nsd-982 (of all
            but the last three).
        sessions: training sessions, the first so many; 0 for all.
        image_size: longest side of the images kept; 0 keeps them as they are.
        val_images: validation images chosen among the training images, unless splits.csv decides;
            MindEye2 had none.
        seed: of that choice.
        attributes: what is to be said about the betas where it is not what was published (source,
            units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or truncated files, trials that do not fit the betas,
            images, masks or the table of images (naming the trial), or data that `write_subject`
            refuses.
    """
    if protocol not in TEST or sessions < 0 or image_size < 0:
        raise PerceptError(
            f"protocol={protocol!r} must be one of {', '.join(TEST)}, sessions={sessions} and"
            f" image_size={image_size} not negative."
        )
    source = Path(source)
    tars = _tars(source, subj, protocol, sessions)
    path = _betas_file(source, subj)
    trials = _read_trials(tars, subj)
    _check_sources(source, subj, trials, complete=not sessions)
    ids, rows = _image_ids(source), np.unique(trials["image"])
    if ids is not None:
        _refuse(
            ~trials["image"].isin(ids.index),
            trials,
            f"shows image {{image}}, which {source / 'image_ids.csv'} does not name",
        )
        trials["image"] = trials["image"].map(ids)
    trials["split"] = make_split_column(source, trials, val_images, seed)
    check_trials(trials)
    folder = dataset_folder(dataset)
    with (
        _dataset(path, "betas") as betas,
        _dataset(source / IMAGES, "images") as images,
        disk_errors(folder),
    ):
        _check_shapes(betas, images, trials, rows)
        voxels = _voxel_table(source, subj, betas.shape[1])
        about: dict[str, Any] = {
            "source": f"MindEye2 {path.name}",
            "units": "z-score",
            "normalisation": NORMALISATION[path.name.replace(f"{subj:02d}", "{subj:02d}")],
            "protocol": protocol,
            "sessions": len(tars) - 1,
            **(attributes or {}),
        }
        image_ids = rows if ids is None else ids[rows].to_numpy()
        write_images(folder / "images.h5", _pictures(images, rows, image_size), image_ids)
        copy_tables(source, folder, image_ids)
        return write_subject(
            subject_folder(dataset, subj),
            _taken(betas, trials["trial"].to_numpy(), "betas"),
            trials,
            voxels,
            about,
        )


def _tars(source: Path, subj: int, protocol: str, sessions: int) -> list[tuple[str, Path]]:
    """(split, tar): the first `sessions` training tars (0: all there are, without gaps), then the
    test tar.
    """
    root = require_file(
        source / "wds" / f"subj{subj:02d}",
        f"the tars of subject {subj}",
        "fetch it, or give the folder that holds wds/ and the HDF5 files",
    )
    numbers = {int(path.stem) for path in (root / "train").glob("*.tar") if path.stem.isdigit()}
    wanted = range(sessions or max(numbers, default=0) + 1)
    train = [
        require_file(
            root / "train" / f"{n}.tar", f"training trials of session {n + 1} of subject {subj}"
        )
        for n in wanted
    ]
    test = require_file(
        root / TEST[protocol] / "0.tar", f"test trials of subject {subj} in protocol {protocol}"
    )
    return [("train", path) for path in train] + [("test", test)]


def _betas_file(source: Path, subj: int) -> Path:
    paths = [source / name.format(subj=subj) for name in NORMALISATION]
    return next(
        (path for path in paths[1:] if path.exists() and not paths[0].exists()), None
    ) or require_file(paths[0], f"betas of subject {subj}")


def _read_trials(tars: list[tuple[str, Path]], subj: int) -> pd.DataFrame:
    """The table of trials in their global order; its images are rows of the file of images."""
    lines, origin = [], []
    for split, path in progress(tars, f"tars of subject {subj}", len(tars)):
        for key, fields in samples(path, {"behav.npy"}):
            what = f"Sample {key} of {path}"
            behav = array_of(fields, "behav", what)
            if behav.shape not in ((1, 17), (17,)) or not np.isfinite(behav.ravel()[:6]).all():
                raise PerceptError(
                    f"behav.npy of {what} is {behav.dtype} {behav.shape}: it must be (1, 17)"
                    " numbers."
                )
            image, person, session, run, _, trial = behav.ravel()[:6].astype(int)
            if person != subj:
                raise PerceptError(
                    f"{what} is of subject {person}, not {subj}: fetch the tars of this very"
                    " subject."
                )
            if min(image, session - 1, trial) < 0:
                raise PerceptError(
                    f"{what} names image {image}, session {session}, trial {trial}: image and trial"
                    " count from 0, sessions from 1."
                )
            lines.append((trial, image, session - 1, max(run - 1, -1)))
            origin.append(split)
    trials = pd.DataFrame(
        lines, columns=["trial", "image", "session", "run"], dtype=np.int64
    ).assign(split=origin)
    trials = trials.sort_values("trial", kind="stable").reset_index(drop=True)
    return trials.assign(repeat=number_repeats(trials))


def _image_ids(source: Path) -> pd.Series | None:
    """Image of each row of the images, where image_ids.csv says so."""
    path = source / "image_ids.csv"
    if not path.exists():
        return None
    table = pd.read_csv(path)
    if (
        not {"coco", "image"} <= set(table.columns)
        or table["coco"].duplicated().any()
        or table["image"].duplicated().any()
    ):
        raise PerceptError(
            f"{path} needs the columns coco and image, whole numbers each of which occurs once: it"
            f" has {list(table.columns)}."
        )
    return table.set_index("coco")["image"]


def _check_sources(source: Path, subj: int, trials: pd.DataFrame, complete: bool) -> None:
    """Compare the trials of the tars with one another, with COCO_73k_subj_indices.hdf5 and with
    shared1000.npy; `complete`: no session was left out.
    """
    _refuse(trials["trial"].duplicated(), trials, "is twice in the tars")
    test = trials["split"] == "test"
    table = _arrays_of(source / INDICES, f"subj{subj:02d}").get("", np.array([], int))
    if len(table):
        _refuse(
            ~trials["trial"].isin(range(len(table))),
            trials,
            f"is in the tars, but {source / INDICES} has {len(table)} trials",
        )
        seen = table[trials["trial"]]
        _refuse(
            trials["image"] != seen,
            trials,
            f"shows image {{image}} in the tars, another in {source / INDICES}",
        )
    shared = _shared(source / SHARED)
    if len(shared):
        _refuse(
            ~trials["image"].isin(range(len(shared))),
            trials,
            f"shows image {{image}}, but {source / SHARED} has {len(shared)} images",
        )
        _refuse(
            shared[trials["image"]] != test,
            trials,
            f"is in split {{split}}, of which {source / SHARED} says otherwise",
        )
    if complete:
        remedy = (
            "fetch the tars that are missing, or read the first"
            f" {trials.loc[~test, 'session'].nunique()} sessions with the option sessions"
        )
        absent = set(trials.loc[test, "session"]) - set(trials.loc[~test, "session"])
        if len(table) and len(shared):
            expected = np.flatnonzero((table >= 0) & ~shared[table])
            lost = np.setdiff1d(expected, trials.loc[~test, "trial"])
            if len(lost):
                raise PerceptError(
                    f"Trial {lost[0]} and {len(lost) - 1} more of subject {subj} are in no training"
                    f" tar: {remedy}."
                )
        elif absent:
            raise PerceptError(
                f"Session {min(absent) + 1} of subject {subj} has test trials but no training tar:"
                f" {remedy}."
            )


def _shared(path: Path) -> np.ndarray:
    """Whether an image is a test image, Boolean (images,); empty where there is no such file."""
    try:
        return (
            np.load(path, allow_pickle=False).astype(bool) if path.exists() else np.array([], bool)
        )
    except (ValueError, EOFError, OSError) as error:
        raise PerceptError(f"{path} is damaged or cut off ({error}): fetch it again.") from error


def _refuse(wrong: pd.Series | np.ndarray, trials: pd.DataFrame, why: str) -> None:
    """Name the first of the wrong trials."""
    if np.any(wrong):
        row = trials[np.asarray(wrong)].iloc[0]
        raise PerceptError(
            f"Trial {row['trial']} {why.format(**row)}: take all files from one release."
        )


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(require_file(path, "an HDF5 file"), "r", rdcc_nbytes=BLOCK_BYTES)
    except OSError as error:
        raise PerceptError(
            f"{path} is cut off or no HDF5 file ({error}): fetch it again."
        ) from error


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[h5py.Dataset]:
    """A dataset of an HDF5 file, open."""
    with _open(path) as file:
        if name not in file:
            raise PerceptError(f"{path} has no dataset {name}: it has {', '.join(file)}.")
        yield file[name]


def _arrays_of(path: Path, key: str) -> dict[str, np.ndarray]:
    """Array(s) of a subject in a file that holds all subjects: {"": array} or {name: array}; empty
    where there is none.
    """
    if not path.exists():
        return {}
    with _open(path) as file:
        found = file.get(key)
        if found is None:
            return {}
        return (
            {"": found[()]}
            if isinstance(found, h5py.Dataset)
            else {name: array[()] for name, array in found.items()}
        )


def _check_shapes(
    betas: h5py.Dataset, images: h5py.Dataset, trials: pd.DataFrame, rows: np.ndarray
) -> None:
    """Refuse arrays whose axes are not those of the tables."""
    last = int(trials["trial"].max())
    if betas.ndim != 2 or len(betas) <= last or len(betas) != last + 1 == betas.shape[1]:
        raise PerceptError(
            f"Betas of {betas.file.filename} are {betas.shape}: they must be (trials, voxels) with"
            f" a row for each trial up to {last}."
        )
    if (
        images.ndim != 4
        or images.shape[1] != 3
        or len(images) <= rows[-1]
        or not np.issubdtype(images.dtype, np.floating)
    ):
        raise PerceptError(
            f"Images of {images.file.filename} are {images.dtype} {images.shape}: they must be"
            f" floats (images, 3, height, width) with a row for each up to {rows[-1]}."
        )


def _voxel_table(source: Path, subj: int, n_voxels: int) -> pd.DataFrame | None:
    path = source / f"voxels_subj{subj:02d}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    regions = _arrays_of(source / MASKS, f"subj{subj:02d}")
    return (
        make_roi_columns(regions, n_voxels)
        if any(mask.any() for mask in regions.values())
        else None
    )


def _taken(stored: h5py.Dataset, rows: np.ndarray, what: str) -> Iterator[np.ndarray]:
    """Some rows (ascending) of a dataset in blocks of about 64 MB; rows that follow one another are
    read at once.

    Raises:
        PerceptError: if they cannot be read.
    """
    step = max(1, BLOCK_BYTES // max(1, int(np.prod(stored.shape[1:])) * stored.dtype.itemsize))
    for start in progress(range(0, len(rows), step), what, -(-len(rows) // step)):
        part = rows[start : start + step]
        block = np.empty((len(part), *stored.shape[1:]), stored.dtype)
        try:
            for first, end in pairwise([0, *(np.flatnonzero(np.diff(part) != 1) + 1), len(part)]):
                stored.read_direct(block, np.s_[part[first] : part[end - 1] + 1], np.s_[first:end])
        except OSError as error:
            raise PerceptError(
                f"{stored.file.filename} is damaged at row {part[0]} or after it ({error}): fetch"
                " it again."
            ) from error
        yield block


def _pictures(images: h5py.Dataset, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    """Blocks of images uint8 (images, height, width, 3)."""
    for block in _taken(images, rows, "images"):
        pixels = block.astype(np.float32)
        np.rint(np.multiply(pixels, 255, out=pixels), out=pixels)
        if not (pixels.min() >= 0 and pixels.max() <= 255):
            raise PerceptError(
                f"{images.file.filename} has values from {block.min()} to {block.max()}: images"
                " must be in [0, 1]."
            )
        upright = pixels.astype(np.uint8).transpose(0, 2, 3, 1)
        yield np.stack([center_crop_resize(image, image_size) for image in upright])
