"""MOSAIC (Lahner et al. 2025): eight fMRI data sets of pictures, preprocessed alike, on 91,282
grayordinates (fsLR 32k cortex and subcortical voxels).

- One file a subject, sub-01_NSD.hdf5: group `betas` with one dataset a trial, named
  sub-01_NSD_stimulus-<name>_phase-<train|test>_rep-<n>, whose attributes say
  presented_stimulus_filename, phase and repetition; group `noiseceilings`.
- Merged files have these groups below /sub-01_NSD, or there `betas` (trials, grayordinates) with
  presented_stimulus_filename (trials,), and perhaps phase and repetition.
- Values are GLMsingle's betas, z-scored by the authors within each session with the statistics of
  the training trials. Sessions and runs are not stored: the session is 0, the run -1, and the order
  of the trials is that of their names. A value that is NaN in a trial is 0, the mean of its
  session; the column nan_trials counts them.
- Pictures are not part of MOSAIC: `images` is the folder of those of the data set's owner. The id
  of a picture is its name as a number where all are numbers, else its place among the sorted names.
- Artificial pictures (of NSD-synthetic and deeprecon) are stored as test pictures; those that the
  list `artificial_list` names are excluded.
- Regions come from `atlas`, a dlabel file on these grayordinates, such as the Glasser parcels.

Written from the description and the authors' scripts; no real file was seen. Inferred: the names of
phase and repetition in merged files, and that noise ceilings above 1.5 are percent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES
from src.data.layout import dataset_folder, number_repeats
from src.files.foreign import natural_key, read_errors
from src.readers.common import (
    check_numbering,
    check_rois,
    choose_validation,
    count_test_images,
    join_labels,
    load_image_table,
    load_split_column,
    make_roi_columns,
    parse_name_list,
)
from src.readers.hdf5 import find_dataset, open_h5
from src.readers.mosaic_lists import list_stimuli
from src.readers.pictures import Pictures, list_keys, open_pictures
from src.readers.places import Places, is_cifti, load_regions, read_cifti_places
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.volumes import open_nifti
from src.utils import PerceptError, progress, require_file

TERMS = (
    "MOSAIC's betas come from eight data sets, each of which keeps its owner's terms: for NSD the"
    " NSD Data Access Agreement, by which nothing may be passed on. The pictures are the owners'"
    " and are not part of MOSAIC."
)

PARTS = {  # participants of each data set
    "NSD": 8,
    "BOLD5000": 4,
    "THINGS": 3,
    "GOD": 5,
    "deeprecon": 3,
    "NOD": 30,
    "HAD": 30,
    "BMD": 10,
}

VIDEOS = ("HAD", "BMD")

TRIAL_NAME = re.compile(r"_stimulus-(?P<stem>.+)_phase-(?P<phase>[a-z]+)_rep-(?P<rep>\d+)$")

LARGEST_FRACTION = 1.5  # a noise ceiling above it is in percent


@dataclass(frozen=True)
class MosaicFile:
    """Betas of a subject in an HDF5 file.

    Attributes:
        path: the file.
        group: that holds betas, "" for the whole file.
        table: a row a trial: key (of its dataset, or "" in a matrix), row, stimulus, phase.
        n_places: number of grayordinates.
    """

    path: Path
    group: str
    table: pd.DataFrame
    n_places: int

    def iterate(self, columns: np.ndarray, nan_trials: np.ndarray) -> Iterator[np.ndarray]:
        """Blocks float32 (trials, columns), with 0 for NaN, which `nan_trials` counts."""
        n_rows = max(1, BLOCK_BYTES // (4 * len(columns)))
        with open_h5(self.path) as file:
            betas = file[f"{self.group}/betas"]
            numbers = range(0, len(self.table), n_rows)
            for start in progress(numbers, "trials"):
                part = self.table.iloc[start : start + n_rows]
                block = np.empty((len(part), len(columns)), np.float32)
                with read_errors(self.path):
                    for position, trial in enumerate(part.itertuples()):
                        values = betas[trial.key][:] if trial.key else betas[trial.row]
                        block[position] = values[columns]
                is_nan = ~np.isfinite(block)
                nan_trials += is_nan.sum(axis=0)
                block[is_nan] = 0
                yield block


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    part: str = "NSD",
    file: str = "",
    images: str = "images",
    atlas: str = "",
    rois: str = "",
    train_list: str = "",
    test_list: str = "",
    artificial_list: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject of one of the data sets into the prepared layout.

    Args:
        source: folder that holds the files.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject within its data set.
        part: the data set: NSD, BOLD5000, THINGS, GOD, deeprecon or NOD.
        file: the HDF5 file, by default sub-XX_<part>.hdf5 anywhere below `source`.
        images: folder of the pictures.
        atlas: dlabel file whose labels become regions.
        rois: names of regions, separated by commas, to keep only their grayordinates.
        train_list, test_list, artificial_list: MOSAIC's JSON lists of stimuli: pictures that train,
            test, or are artificial and left out; by default the phase of each trial decides.
        image_size: side of the stored images, cut to squares; 0 for the originals.
        val_images: number of validation images, drawn from the training images; not used with
            splits.csv in `source`.
        seed: of that choice.
        protocol: name of the protocol, by default mosaic-<part>-<number of test images>.
        bad_voxels: see `store_recording`.
        attributes: what is to be said about the betas where they are not the published ones.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or damaged file, an unknown region, trials whose picture is not
            there, or an image on two sides of the split.
    """
    root = require_file(source, "the folder of MOSAIC's files").expanduser()
    if part not in PARTS or part in VIDEOS:
        pictures_only = ", ".join(name for name in PARTS if name not in VIDEOS)
        raise PerceptError(
            f"part is {part!r}: choose one of {pictures_only}; the others show videos."
        )
    betas = open_betas(_find_file(root, subj, part, file), f"sub-{subj:02d}_{part}")
    pictures = open_pictures(root / Path(images).expanduser())
    trials, names = _number_trials(betas, pictures)
    list_paths = {"train": train_list, "test": test_list, "artificial": artificial_list}
    lists = {
        side: list_stimuli(root / Path(path).expanduser(), f"sub-{subj:02d}_{part}")
        for side, path in list_paths.items()
        if path
    }
    trials["split"] = _split(root, trials, betas.table, names, lists, val_images, seed)
    columns, voxels = _select_columns(root, betas, atlas, rois)
    _add_ceilings(betas, columns, voxels)
    nan_trials = np.zeros(len(columns), np.int64)
    voxels["nan_trials"] = nan_trials
    published = {
        "source": f"MOSAIC, {part}",
        "units": "z-scores of single-trial betas",
        "normalisation": "z-score by session, statistics of training trials, as published",
        "protocol": protocol or f"mosaic-{part}-{count_test_images(trials)}",
        "rois": rois,
        "space_kind": "grayordinates",
        "grayordinates": betas.n_places,
    }
    check_numbering(dataset_folder(dataset) / "labels.parquet", names)
    image_ids = names["image"].to_numpy()
    blocks = _count_while_reading(betas, columns, voxels, nan_trials)
    recording = Recording(
        # these blocks count NaN in the table of voxels, which is stored after them
        betas=RowBlocks((len(trials), len(columns)), blocks),
        trials=trials,
        images=pictures.iterate(names["row"].to_numpy(), image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=voxels,
        captions=load_image_table("captions", image_ids, root),
        labels=join_labels(root, names.drop(columns="row")),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _count_while_reading(
    betas: MosaicFile, columns: np.ndarray, voxels: pd.DataFrame, nan_trials: np.ndarray
) -> Iterator[np.ndarray]:
    for block in betas.iterate(columns, nan_trials):
        voxels["nan_trials"] = nan_trials
        yield block


# ------------------------------------------------------------------------------------------- file
def _find_file(root: Path, subj: int, part: str, file: str) -> Path:
    if file:
        return require_file(root / Path(file).expanduser(), "betas")
    name = f"sub-{subj:02d}_{part}.hdf5"
    paths = sorted(root.glob(f"**/{name}"))
    if not paths:
        raise PerceptError(
            f"{root} has no {name}: fetch it from the bucket mosaicfmri, or give a merged file with"
            " the option file."
        )
    return paths[0]


def open_betas(path: Path, owner: str) -> MosaicFile:
    """Open a file for its table of trials, in the order of their names.

    Args:
        path: the file.
        owner: sub-XX_<data set>, whose group is taken in a merged file.

    Raises:
        PerceptError: if it is damaged, has nothing of this subject, or trials of other lengths.
    """
    with open_h5(path, "betas") as file:
        group = f"/{owner}" if owner in file else ""
        betas = file.get(f"{group}/betas")
        if isinstance(betas, h5py.Group):
            with read_errors(path):
                return _open_group(path, group, betas)
        if isinstance(betas, h5py.Dataset) and group:
            return _open_matrix(path, group, file)
    raise PerceptError(
        f"{path} has neither betas nor {owner}/betas: give the file of this subject and data set."
    )


def _open_group(path: Path, group: str, betas: h5py.Group) -> MosaicFile:
    """A file with one dataset a trial."""
    rows = []
    for key in sorted(betas, key=natural_key):
        trial = betas[key]
        match = TRIAL_NAME.search(key)
        stimulus = trial.attrs.get("presented_stimulus_filename", match["stem"] if match else "")
        phase = trial.attrs.get("phase", match["phase"] if match else "")
        rows.append((key, 0, _to_text(stimulus), _to_text(phase), trial.shape))
    table = pd.DataFrame(rows, columns=["key", "row", "stimulus", "phase", "shape"])
    shapes = table["shape"].unique()
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise PerceptError(
            f"The trials of {path} have the shapes {', '.join(map(str, shapes[:3]))}: all must have"
            " one value a grayordinate; fetch it again."
        )
    _check_stimuli(table, path)
    return MosaicFile(path, group, table.drop(columns="shape"), shapes[0][0])


def _open_matrix(path: Path, group: str, file: h5py.File) -> MosaicFile:
    """A merged file with one matrix a subject."""
    betas = find_dataset(file, f"{group}/betas")
    columns = {}
    for name in ("presented_stimulus_filename", "phase"):
        values = file.get(f"{group}/{name}")
        if isinstance(values, h5py.Dataset):
            with read_errors(path):
                columns[name] = [_to_text(value) for value in values[:]]
    n_stimuli = len(columns.get("presented_stimulus_filename", []))
    if betas.ndim != 2 or n_stimuli != len(betas):
        raise PerceptError(
            f"{group}/betas of {path} has the shape {betas.shape}, and presented_stimulus_filename"
            f" {n_stimuli} names: there must be one name a row; fetch it again."
        )
    table = pd.DataFrame({"key": "", "row": np.arange(n_stimuli)})
    table["stimulus"] = columns["presented_stimulus_filename"]
    table["phase"] = columns.get("phase", ["train"] * n_stimuli)
    _check_stimuli(table, path)
    return MosaicFile(path, group, table, betas.shape[1])


def _to_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_stimuli(table: pd.DataFrame, path: Path) -> None:
    is_bad = (table["stimulus"] == "") | ~table["phase"].isin(("train", "test"))
    if is_bad.any():
        trial = table[is_bad].iloc[0]
        raise PerceptError(
            f"Trial {trial['key'] or trial['row']} of {path} has the stimulus {trial['stimulus']!r}"
            f" and the phase {trial['phase']!r}: train or test is expected; fetch it again."
        )


# ----------------------------------------------------------------------------------------- trials
def _number_trials(betas: MosaicFile, pictures: Pictures) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of trials, and the pictures that were shown: row, image (id) and name."""
    stimuli = betas.table["stimulus"]
    row_of_name = {name: pictures.find_row(name) for name in stimuli.unique()}
    rows = sorted(set(row_of_name.values()))
    names = pd.DataFrame({"row": rows, "image": [pictures.number(row) for row in rows]})
    names["name"] = [pictures.names[row] for row in rows]
    image_of_row = dict(zip(names["row"], names["image"], strict=True))
    trials = pd.DataFrame({"trial": np.arange(len(stimuli))})
    trials["image"] = stimuli.map(row_of_name).map(image_of_row)
    trials = trials.assign(session=0, run=-1)
    trials["repeat"] = number_repeats(trials)
    return trials, names


def _split(
    root: Path,
    trials: pd.DataFrame,
    table: pd.DataFrame,
    names: pd.DataFrame,
    lists: dict[str, set[str]],
    val_images: int,
    seed: int,
) -> pd.Series:
    """The column `split`: of splits.csv, of MOSAIC's lists, or the phase of each trial."""
    number_of_name = {
        key: image
        for name, image in zip(names["name"], names["image"], strict=True)
        for key in list_keys(name)
    }
    column = load_split_column(root, trials, number_of_name)
    is_artificial = table["stimulus"].isin(lists.get("artificial", set()))
    if column is not None:
        return column.mask(is_artificial, "exclude")
    column = table["phase"]
    if "train" in lists or "test" in lists:
        column = pd.Series("exclude", table.index)
        for side in ("train", "test"):
            column = column.mask(table["stimulus"].isin(lists.get(side, set())), side)
    column = column.mask(is_artificial, "exclude")
    return choose_validation(trials.assign(split=column), val_images, seed)


# ----------------------------------------------------------------------------------------- voxels
def _select_columns(
    root: Path, betas: MosaicFile, atlas: str, rois: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """The grayordinates that are read, and their table."""
    columns = np.arange(betas.n_places)
    places, masks = Places((betas.n_places,)), dict[str, np.ndarray]()
    if atlas:
        path = root / Path(atlas).expanduser()
        if is_cifti(path):
            places = _read_atlas_places(path, betas)
        masks = load_regions([path], places, betas.path)
    requested: Sequence[str] = parse_name_list(rois)
    available = list(masks) or ["none, as no atlas is given"]
    check_rois([name for name in requested if name not in masks], available, str(betas.path))
    if requested:
        columns = np.flatnonzero(np.any([masks[name] for name in requested], axis=0))
    table = make_roi_columns({name: mask[columns] for name, mask in masks.items()}, len(columns))
    return columns, table.join(places.describe(columns))


def _read_atlas_places(path: Path, betas: MosaicFile) -> Places:
    """The grayordinates of an atlas, which must be as many as the betas have."""
    places = read_cifti_places(open_nifti(path, "the atlas"), path)
    if places.size != betas.n_places:
        raise PerceptError(
            f"{path} has {places.size} grayordinates, the betas of {betas.path} have"
            f" {betas.n_places}: take an atlas of the same space (fsLR 91k)."
        )
    return places


def _add_ceilings(betas: MosaicFile, columns: np.ndarray, voxels: pd.DataFrame) -> None:
    """Add the noise ceiling of a single trial, of test pictures if there is one, else of training
    pictures.
    """
    with open_h5(betas.path) as file:
        group = file.get(f"{betas.group}/noiseceilings")
        keys = sorted(group) if isinstance(group, h5py.Group) else []
        for phase in ("test", "train"):
            matches = [key for key in keys if f"phase-{phase}_n-1" in key]
            if not matches:
                continue
            values = find_dataset(file, f"{betas.group}/noiseceilings/{matches[0]}")
            with read_errors(betas.path):
                ceiling = np.nan_to_num(values[:][columns].astype(np.float64), nan=0).clip(0)
            if ceiling.max() > LARGEST_FRACTION:
                ceiling = ceiling / 100
            voxels["noise_ceiling"] = ceiling.clip(0, 1)
            return
