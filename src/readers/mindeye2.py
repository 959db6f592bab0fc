"""MindEye2's data (webdataset tars + HDF5).

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
- COCO_73k_annots_curated.npy and evals/ (`coco_captions`): sentences of people and of GIT about the
  images, as far as they are there.
- Not published, picked up where they exist: captions.parquet, labels.parquet, voxels_subj01.parquet
  (instead of the masks), splits.csv (columns image, split; otherwise validation images are chosen
  among the training images) and image_ids.csv (columns coco, image), which says what image a row of
  the images is where that is not the row itself.
- With sessions=k the training trials are those of the first k tars and the test set stays whole, as
  published. With min_sessions=k at least these tars must be there, and all that follow them are
  read. Validation images are chosen among the training images of all sessions, as far as the tables
  name them, so that they are the same however many sessions are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES
from src.data.layout import number_repeats
from src.files.foreign import load_csv, load_parquet, read_errors
from src.readers.coco_captions import (
    ANNOTATIONS,
    GIT,
    PEOPLE,
    load_curated_captions,
    load_shared_captions,
)
from src.readers.common import (
    center_crop_resize,
    load_image_table,
    make_roi_columns,
    make_split_column,
    map_npy,
    to_integers,
    to_mask,
)
from src.readers.hdf5 import load_array, open_dataset, open_h5
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.shards import decode_array, read_samples
from src.utils import PerceptError, progress, require_file

TERMS = (
    "Derived from the Natural Scenes Dataset and under the same terms: agree to them at"
    " https://naturalscenesdataset.org before use; neither data nor images may be passed on. The"
    " files are the dataset pscotti/mindeyev2 on the Hugging Face hub."
)

TEST_FOLDERS = {"nsd-1000": "new_test", "nsd-982": "test"}  # of each protocol

IMAGES = "coco_images_224_float16.hdf5"

INDICES = "COCO_73k_subj_indices.hdf5"

MASKS = "brain_region_masks.hdf5"

SHARED = "shared1000.npy"

# options that say what must be there, and change nothing of what is read
REQUIREMENTS = ("min_sessions",)

IMAGE_IDS = "image_ids.csv"

NORMALISATION = {
    "betas_all_subj{subj:02d}_fp32_renorm.hdf5": (
        "per voxel with statistics of the training trials, by the source"
    ),
    "betas_subj{subj:02d}.hdf5": "per voxel and session, test trials included, by the source",
}


@dataclass(frozen=True)
class Tar:
    """A tar of trials, and their split."""

    split: str
    path: Path


class TrialRecord(NamedTuple):
    """What a sample says of its trial, all counted from 0; run is -1 where it is unknown."""

    trial: int
    image: int
    session: int
    run: int


@dataclass(frozen=True)
class StoredRows:
    """Some rows (ascending) of a dataset in an HDF5 file.

    Attributes:
        path: the file.
        name: of the dataset.
        rows: (n,) which of its rows.
    """

    path: Path
    name: str
    rows: np.ndarray

    def iterate_blocks(self) -> Iterator[np.ndarray]:
        """Read the rows in blocks of about 64 MB; rows that follow one another are read at once.

        Raises:
            PerceptError: if they cannot be read.
        """
        with open_dataset(self.path, self.name, rows=self.rows) as stored:
            row_bytes = int(np.prod(stored.shape[1:])) * stored.dtype.itemsize
            step = max(1, BLOCK_BYTES // max(1, row_bytes))
            starts = range(0, len(self.rows), step)
            for start in progress(starts, self.name, len(starts)):
                yield self._read(stored, self.rows[start : start + step])

    def _read(self, stored: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
        block = np.empty((len(rows), *stored.shape[1:]), stored.dtype)
        gaps = np.flatnonzero(np.diff(rows) != 1) + 1
        with read_errors(self.path):
            for first, end in pairwise([0, *gaps, len(rows)]):
                stretch = slice(rows[first], rows[end - 1] + 1)
                stored.read_direct(block, np.s_[stretch], np.s_[first:end])
        return block


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    protocol: str = "nsd-1000",
    sessions: int = 0,
    min_sessions: int = 0,
    image_size: int = 224,
    val_images: int = 300,
    seed: int = 42,
    bad_voxels: str = "refuse",
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
        min_sessions: training sessions that must be there, the first so many; 0 for all that the
            tables name. Without effect where `sessions` is given.
        image_size: longest side of the images kept; 0 keeps them as they are.
        val_images: validation images chosen among the training images, unless splits.csv decides;
            MindEye2 had none.
        seed: of that choice.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the betas where it is not what was published (source,
            units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or truncated files, trials that do not fit the betas,
            images, masks or the table of images (naming the trial), or data that `store_recording`
            refuses.
    """
    if protocol not in TEST_FOLDERS or min(sessions, min_sessions, image_size) < 0:
        raise PerceptError(
            f"protocol={protocol!r} must be one of {', '.join(TEST_FOLDERS)}, sessions={sessions},"
            f" min_sessions={min_sessions} and image_size={image_size} not negative."
        )
    source = Path(source)
    tars = _find_tars(source, subj, protocol, sessions, min_sessions)
    betas_path = _find_betas(source, subj)
    trials = _load_trials(tars, subj)
    must_be_complete = not (sessions or min_sessions)
    _check_against_tables(source, subj, trials, must_be_complete)
    n_sessions = len(tars) - 1
    seen_in_all, shared = _list_images(source, subj, trials)
    image_rows = np.unique(trials["image"])
    image_ids, ids = image_rows, load_image_ids(source)
    if ids is not None:
        reason = f"shows image {{image}}, which {source / IMAGE_IDS} does not name"
        _refuse(~trials["image"].isin(ids.index), trials, reason)
        trials["image"] = trials["image"].map(ids)
        image_ids = ids[image_rows].to_numpy()
        seen_in_all = ids.reindex(seen_in_all).dropna().to_numpy(np.int64)
    trials["split"] = make_split_column(source, trials, val_images, seed, seen_in_all)
    betas = StoredRows(betas_path, "betas", trials["trial"].to_numpy())
    images = StoredRows(source / IMAGES, "images", image_rows)
    n_voxels = _check_shapes(betas, images)
    published = {
        "source": f"MindEye2 {betas_path.name}",
        "units": "z-score",
        "normalisation": NORMALISATION[betas_path.name.replace(f"{subj:02d}", "{subj:02d}")],
        "protocol": protocol,
        "sessions": n_sessions,
    }
    n_published = int(trials["session"].max()) + 1  # test trials are of all sessions
    if n_sessions < n_published and not sessions:
        published["of_sessions"] = n_published
    recording = Recording(
        betas=RowBlocks((len(trials), n_voxels), betas.iterate_blocks()),
        trials=trials,
        images=_iterate_images(images, image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=_load_voxels(source, subj, n_voxels),
        captions=_load_captions(source, image_rows, image_ids, shared),
        git_captions=_load_shared(source, GIT, image_rows, image_ids, shared),
        labels=load_image_table("labels", image_ids, source),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


# ------------------------------------------------------------------------------------------- files
def _find_tars(
    source: Path, subj: int, protocol: str, sessions: int, min_sessions: int
) -> list[Tar]:
    """The first `sessions` training tars, then the test tar.

    With sessions=0 these are all there are, without gaps, and at least `min_sessions`.
    """
    root = require_file(
        source / "wds" / f"subj{subj:02d}",
        f"the tars of subject {subj}",
        "fetch it, or give the folder that holds wds/ and the HDF5 files",
    )
    stems = [path.stem for path in (root / "train").glob("*.tar")]
    numbers = [int(stem) for stem in stems if stem.isdigit()]
    tars = []
    n_present = max(max(numbers, default=0) + 1, min_sessions)
    for number in range(sessions or n_present):
        what = f"training trials of session {number + 1} of subject {subj}"
        tars.append(Tar("train", require_file(root / "train" / f"{number}.tar", what)))
    what = f"test trials of subject {subj} in protocol {protocol}"
    tars.append(Tar("test", require_file(root / TEST_FOLDERS[protocol] / "0.tar", what)))
    return tars


def _find_betas(source: Path, subj: int) -> Path:
    usual, other = (source / name.format(subj=subj) for name in NORMALISATION)
    if other.exists() and not usual.exists():
        return other
    return require_file(usual, f"betas of subject {subj}")


def load_image_ids(source: Path) -> pd.Series | None:
    """Load the image of each row of the file of images, where image_ids.csv says so, else None.

    Raises:
        PerceptError: if that file lacks a column, or has a number twice.
    """
    path = source / IMAGE_IDS
    if not path.exists():
        return None
    columns = ["coco", "image"]
    table = load_csv(path, columns, "write the dataset again")
    is_whole = all(pd.api.types.is_integer_dtype(table[column]) for column in columns)
    if not is_whole or any(table[column].duplicated().any() for column in columns):
        raise PerceptError(
            f"{path} needs the columns coco and image, whole numbers each of which occurs once: it"
            f" has {list(table.columns)}."
        )
    return table.set_index("coco")["image"]


def _load_is_shared(path: Path) -> np.ndarray:
    """Whether an image is a test image, bool (images,); empty where there is no such file."""
    if not path.exists():
        return np.array([], bool)
    return to_mask(map_npy(path), str(path))


def _load_image_of_trial(path: Path, subj: int) -> np.ndarray:
    """Image of each trial (trials,); empty where there is no such file or subject in it."""
    if not path.exists():
        return np.array([], int)
    name = f"subj{subj:02d}"
    with open_h5(path) as file:
        if name not in file:
            return np.array([], int)
    return to_integers(load_array(path, name).ravel(), f"{name} of {path}")


def _list_images(source: Path, subj: int, trials: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the subject's training images in all sessions, and of all shared images, ascending.

    As far as the tables beside the tars name them, else those of the trials that are there.
    """
    is_shared = _load_is_shared(source / SHARED)
    test_images = trials.loc[trials["split"] == "test", "image"].to_numpy()
    shared = np.flatnonzero(is_shared) if len(is_shared) else np.unique(test_images)
    image_of_trial = _load_image_of_trial(source / INDICES, subj)
    image_numbers = np.unique(np.concatenate([trials["image"].to_numpy(), image_of_trial]))
    return np.setdiff1d(image_numbers[image_numbers >= 0], np.union1d(shared, test_images)), shared


def _load_captions(
    source: Path, image_rows: np.ndarray, image_ids: np.ndarray, shared: np.ndarray
) -> pd.DataFrame | None:
    """Sentences of people: captions.parquet, else the curated ones, else those of evals/."""
    table = load_image_table("captions", image_ids, source)
    if table is not None:
        return table
    if (source / ANNOTATIONS).exists():
        return load_curated_captions(source / ANNOTATIONS, image_rows, image_ids)
    return _load_shared(source, PEOPLE, image_rows, image_ids, shared)


def _load_shared(
    source: Path, name: str, image_rows: np.ndarray, image_ids: np.ndarray, shared: np.ndarray
) -> pd.DataFrame | None:
    """Sentences of evals/ about those of the shared images that are among some images."""
    table = load_shared_captions(source / "evals", name, shared, source / IMAGES)
    if table is None:
        return None
    id_of_row = pd.Series(image_ids, index=image_rows)
    table = table[table["image"].isin(image_rows)]
    return table.assign(image=table["image"].map(id_of_row)).reset_index(drop=True)


def _load_voxels(source: Path, subj: int, n_voxels: int) -> pd.DataFrame | None:
    """voxels_subj0N.parquet, else a table with the masks of regions, else None."""
    path = source / f"voxels_subj{subj:02d}.parquet"
    if path.exists():
        return load_parquet(path)
    if not (source / MASKS).exists():
        return None
    with open_h5(source / MASKS) as file:
        folder = f"subj{subj:02d}"
        names = list(file[folder]) if folder in file else []
    regions = {name: load_array(source / MASKS, f"{folder}/{name}") for name in names}
    if not any(mask.any() for mask in regions.values()):
        return None
    return make_roi_columns(regions, n_voxels, str(source / MASKS))


# ------------------------------------------------------------------------------------------ trials
def _load_trials(tars: list[Tar], subj: int) -> pd.DataFrame:
    """The table of trials in their global order; its images are rows of the file of images."""
    records, splits = [], []
    for tar in progress(tars, f"tars of subject {subj}", len(tars)):
        for key, fields in read_samples(tar.path, {"behav.npy"}):
            what = f"Sample {key} of {tar.path}"
            behaviour = decode_array(fields, "behav", what)
            records.append(_parse_behaviour(behaviour, subj, what))
            splits.append(tar.split)
    trials = pd.DataFrame(records, columns=list(TrialRecord._fields), dtype=np.int64)
    trials = trials.assign(split=splits)
    trials = trials.sort_values("trial", kind="stable").reset_index(drop=True)
    return trials.assign(repeat=number_repeats(trials))


def _parse_behaviour(behaviour: np.ndarray, subj: int, what: str) -> TrialRecord:
    """Parse behav.npy of a sample; `what` names the sample in errors."""
    values = behaviour.ravel()[:6]
    is_row = behaviour.shape in ((1, 17), (17,))
    if not is_row or behaviour.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise PerceptError(
            f"behav.npy of {what} is {behaviour.dtype} {behaviour.shape}: it must be (1, 17)"
            " numbers."
        )
    image, person, session, run, _, trial = to_integers(values, f"behav.npy of {what}").tolist()
    if person != subj:
        raise PerceptError(
            f"{what} is of subject {person}, not {subj}: fetch the tars of this very subject."
        )
    if min(image, session - 1, trial) < 0:
        raise PerceptError(
            f"{what} names image {image}, session {session}, trial {trial}: image and trial"
            " count from 0, sessions from 1."
        )
    return TrialRecord(trial, image, session - 1, max(run - 1, -1))


def _check_against_tables(source: Path, subj: int, trials: pd.DataFrame, is_complete: bool) -> None:
    """Compare the trials of the tars with one another and with the tables beside them.

    These are COCO_73k_subj_indices.hdf5 and shared1000.npy.

    Args:
        source: folder of the files.
        subj: number of the subject.
        trials: of the tars.
        is_complete: no session was left out.
    """
    _refuse(trials["trial"].duplicated(), trials, "is twice in the tars")
    image_of_trial = _load_image_of_trial(source / INDICES, subj)
    if len(image_of_trial):
        n_trials = len(image_of_trial)
        reason = f"is in the tars, but {source / INDICES} has {n_trials} trials"
        _refuse(~trials["trial"].isin(range(n_trials)), trials, reason)
        reason = f"shows image {{image}} in the tars, another in {source / INDICES}"
        _refuse(trials["image"] != image_of_trial[trials["trial"]], trials, reason)
    is_shared = _load_is_shared(source / SHARED)
    if len(is_shared):
        reason = f"shows image {{image}}, but {source / SHARED} has {len(is_shared)} images"
        _refuse(~trials["image"].isin(range(len(is_shared))), trials, reason)
        reason = f"is in split {{split}}, of which {source / SHARED} says otherwise"
        _refuse(is_shared[trials["image"]] != (trials["split"] == "test"), trials, reason)
    if is_complete:
        _check_completeness(subj, trials, image_of_trial, is_shared)


def _check_completeness(
    subj: int, trials: pd.DataFrame, image_of_trial: np.ndarray, is_shared: np.ndarray
) -> None:
    """Refuse tars that lack training trials, as far as the tables tell which there are."""
    is_test = trials["split"] == "test"
    train_sessions = set(trials.loc[~is_test, "session"])
    n_sessions = len(train_sessions)
    remedy = (
        "fetch them (python run.py download mindeye2 -p num_sessions 0), or set num_sessions to"
        f" at most {n_sessions}, which takes the first {n_sessions} sessions for what they are"
    )
    if len(image_of_trial) and len(is_shared):
        expected = np.flatnonzero((image_of_trial >= 0) & ~is_shared[image_of_trial])
        lost = np.setdiff1d(expected, trials.loc[~is_test, "trial"])
        if len(lost):
            raise PerceptError(
                f"Trial {lost[0]} and {len(lost) - 1} more of subject {subj} are in no training"
                f" tar: {remedy}."
            )
        return
    absent = set(trials.loc[is_test, "session"]) - train_sessions
    if absent:
        raise PerceptError(
            f"Session {min(absent) + 1} of subject {subj} has test trials but no training tar:"
            f" {remedy}."
        )


def _refuse(is_invalid: pd.Series | np.ndarray, trials: pd.DataFrame, reason: str) -> None:
    """Refuse invalid trials, naming the first of them."""
    if np.any(is_invalid):
        row = trials[np.asarray(is_invalid)].iloc[0]
        raise PerceptError(
            f"Trial {row['trial']} {reason.format(**row)}: take all files from one release."
        )


# ------------------------------------------------------------------------------- betas and images
def _check_shapes(betas: StoredRows, images: StoredRows) -> int:
    """Refuse arrays whose axes are not those of the tables; the number of voxels."""
    last_trial, last_image = int(betas.rows.max()), images.rows[-1]
    with open_dataset(betas.path, betas.name, rows=betas.rows) as stored:
        shape = stored.shape
        has_rows = len(shape) == 2 and shape[0] > last_trial
        n_needed = last_trial + 1
        if not has_rows or (shape[0] != n_needed and shape[1] == n_needed):
            raise PerceptError(
                f"Betas of {betas.path} are {shape}: they must be (trials, voxels) with"
                f" a row for each trial up to {last_trial}."
            )
        n_voxels = shape[1]
    with open_dataset(images.path, images.name, rows=images.rows) as stored:
        shape, dtype = stored.shape, stored.dtype
        has_axes = len(shape) == 4 and shape[1] == 3 and shape[0] > last_image
        if not has_axes or not np.issubdtype(dtype, np.floating):
            raise PerceptError(
                f"Images of {images.path} are {dtype} {shape}: they must be"
                f" floats (images, 3, height, width) with a row for each up to {last_image}."
            )
    return n_voxels


def _iterate_images(images: StoredRows, image_size: int) -> Iterator[np.ndarray]:
    """Blocks of images uint8 (images, height, width, 3)."""
    for block in images.iterate_blocks():
        pixels = block.astype(np.float32)
        np.rint(np.multiply(pixels, 255, out=pixels), out=pixels)
        if not (pixels.min() >= 0 and pixels.max() <= 255):
            raise PerceptError(
                f"{images.path} has values from {block.min()} to {block.max()}: images"
                " must be in [0, 1]."
            )
        channels_last = pixels.astype(np.uint8).transpose(0, 2, 3, 1)
        yield np.stack([center_crop_resize(image, image_size) for image in channels_last])
