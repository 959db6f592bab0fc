"""THINGS-fMRI (Hebart et al. 2023): single-trial responses in table format, of 3 subjects in 12
sessions.

- <source>/betas_csv/sub-01_ResponseData.h5, sub-01_StimulusMetadata.csv, sub-01_VoxelMetadata.csv
  (figshare plus 20492835), or OpenNeuro's names for the same,
  derivatives/ICA-betas/sub-01/voxel-metadata/sub-01_task-things_{voxel-wise-responses.h5,
  stimulus-metadata.tsv,voxel-metadata.tsv} (these names from public code that reads them).
- ResponseData.h5 is a pandas frame in PyTables' fixed format under the key ResponseData: a row a
  voxel, a column a trial, after the column voxel_id. That format keeps columns by dtype: one block
  of floats (voxels, trials) and one of integers (voxels, 1), the voxel_id. It is read with h5py;
  which block is which is told by dtype and shape, and voxel_id is compared with the metadata. The
  labels of the float columns are pickled in the published files and are not read: that the columns
  follow the rows of the stimulus metadata is inferred, as all public code takes it so.
- The stimulus metadata has a row a trial: trial_type (train or test; catch trials are not in the
  table), session and run (from 1), stimulus (file name) and perhaps concept, else the file name up
  to its last "_". `trial` here is the row. The 100 test images were presented in each of the 12
  sessions, the 8,640 training images (720 concepts, 12 images each) once. Concepts of the test
  images occur in training with other images; zero_shot=True excludes these training trials, which
  leaves 7,440.
- The voxel metadata has a row a voxel: voxel_id, voxel_x, voxel_y, voxel_z (indices of the volume),
  noise ceilings in percent (noise_ceiling here is nc_singletrial / 100), pRF parameters, and a
  column of 0 and 1 a region; those that begin with "glasser-" cover the whole cortex.
- A voxel's trials are contiguous. Only the voxels asked for are read, in blocks, and spooled
  transposed: memory does not grow with the data.
- The responses are GLM betas of each trial as published (in percent signal change: inferred). They
  are not z-scored here: sessions are normalised later, with statistics of training trials only.
- Images are a download of their own: <source>/images/<concept>/<file> or <source>/images/<file>, or
  `images_path`. The id of an image is its name as a number where all names are numbers (the mini
  world), else its place among the sorted names of all subjects' metadata that are there;
  labels.parquet keeps image, name and concept.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES, check_space
from src.data.layout import dataset_folder, number_repeats
from src.files.foreign import load_csv, read_errors
from src.readers.common import (
    check_numbering,
    check_rois,
    choose_validation,
    count_test_images,
    find_gap,
    join_labels,
    load_image_table,
    load_images,
    load_split_column,
    parse_name_list,
    to_mask,
)
from src.readers.hdf5 import find_dataset, open_h5
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import PerceptError, progress, require_file

TERMS = (
    "The fMRI data of THINGS are CC0. The images are not: they belong to many owners, are for"
    " research only, come from osf.io/jum2f once one has agreed to the terms there, and may not be"
    " passed on."
)

FIGSHARE = ("sub-{}_ResponseData.h5", "sub-{}_StimulusMetadata.csv", "sub-{}_VoxelMetadata.csv")

OPENNEURO = (
    "sub-{}_task-things_voxel-wise-responses.h5",
    "sub-{}_task-things_stimulus-metadata.tsv",
    "sub-{}_task-things_voxel-metadata.tsv",
)

PLACES = {
    "betas_csv": FIGSHARE,
    "": FIGSHARE,
    "derivatives/betas_csv": FIGSHARE,
    "derivatives/ICA-betas/sub-{}/voxel-metadata": OPENNEURO,
}

SUBJECTS = range(1, 9)

VISUAL = set(
    "V1,V2,V3,hV4,VO1,VO2,LO1 (prf),LO2 (prf),TO1,TO2,V3a,V3b,IT,LO,"
    "EBA,FFA,OFA,STS,PPA,RSC,TOS,OPA,LOC".split(",")
)

NO_REGION = re.compile(r"voxel_|subject_id|nc_|splithalf_|prf-")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a subject, and the folder that holds betas_csv/ and images/."""

    root: Path
    responses: Path
    stimuli: Path
    voxels: Path


@dataclass(frozen=True)
class ResponseMatrix:
    """The betas of a subject in ResponseData.h5, open.

    Attributes:
        values: (voxels, columns), memory-mapped where the file stores it in one piece.
        first_trial: column of the first trial; a column before it holds voxel_id.
    """

    values: h5py.Dataset | np.memmap
    first_trial: int

    def load_trials(self, rows: np.ndarray) -> np.ndarray:
        """The betas (trials, rows) of the voxels in some rows, ascending."""
        if isinstance(self.values, np.memmap):
            selected = self.values[rows]
        else:
            with read_errors(self.values.file.filename):
                selected = self.values[rows[0] : rows[-1] + 1][rows - rows[0]]
        return selected[:, self.first_trial :].T

    def group_rows(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in groups of about 64 MB.

        Of a chunked matrix a group holds rows that lie together, since whole chunks are decoded.
        """
        size = max(1, BLOCK_BYTES // (self.values.shape[1] * self.values.dtype.itemsize))
        if isinstance(self.values, np.memmap):
            group = np.arange(len(rows)) // size
        else:
            chunk = self.values.chunks[0] if self.values.chunks else 1
            group = rows // (max(1, size // chunk) * chunk)
        return np.split(rows, np.flatnonzero(np.diff(group)) + 1)


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    rois: str = "",
    zero_shot: bool = False,
    images_path: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "refuse",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder that holds betas_csv/ and images/, or the folder betas_csv itself (images/ is
            then beside it).
        dataset: name or folder of the prepared dataset.
        subj: number of the subject, 1 to 3.
        rois: regions separated by commas, the union of which is kept (FFA stands for lFFA and
            rFFA); "" for all visual regions, without those of the Glasser atlas; "all" for every
            voxel (211,339 of subject 1).
        zero_shot: whether training trials of concepts that are tested are excluded.
        images_path: folder of the images, by default <source>/images.
        image_size: side of the stored images, cut to squares; 0 for the originals.
        val_images: number of validation images, drawn from the training images; not used with
            splits.csv.
        seed: of that choice.
        protocol: name of the protocol, by default things-<number of test images>, with -zeroshot
            where it applies.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the betas where it differs from the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or damaged file, tables and responses that do not fit each
            other, another subject's metadata, an unknown region, a missing image, or an image on
            both sides of the split.
    """
    files = _find_files(Path(source), subj)
    stimuli = _load_stimuli(files.stimuli, subj)
    metadata = _load_table(files.voxels, {"voxel_id", "voxel_x", "voxel_y", "voxel_z"}, subj)
    voxel_ids = metadata["voxel_id"].to_numpy()
    with _open_responses(files.responses, voxel_ids, len(stimuli)):
        pass  # a matrix that does not fit is refused before anything is written
    rows, voxels = _select_voxels(metadata, rois, files.voxels)
    number_of_name = _number_images(files.root, stimuli)
    trials = _trials(stimuli, number_of_name)
    trials["split"] = _split(trials, stimuli["concept"], files.root, zero_shot, val_images, seed)
    published = {
        "source": "THINGS-fMRI, betas_csv",
        "units": "single-trial GLM beta (percent signal change, inferred)",
        "normalisation": "none",
        "protocol": protocol or _protocol(trials, zero_shot),
        "rois": rois or "visual",
    }
    presented = stimuli.drop_duplicates("stimulus")
    names = pd.DataFrame(
        {
            "image": presented["stimulus"].map(number_of_name),
            "name": presented["stimulus"],
            "concept": presented["concept"],
        }
    )
    folder = dataset_folder(dataset)
    check_numbering(folder / "labels.parquet", names)
    images_folder = Path(images_path).expanduser() if images_path else files.root / "images"
    image_files = _find_images(images_folder, names)
    image_ids = names["image"].to_numpy()
    blocks = _transposed_blocks(files.responses, voxel_ids, rows, len(trials), folder)
    recording = Recording(
        betas=RowBlocks((len(trials), len(rows)), blocks),
        trials=trials,
        images=load_images(progress(image_files, "images", len(image_files)), "Image", image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=voxels,
        captions=load_image_table("captions", image_ids, files.root),
        labels=join_labels(files.root, names),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _protocol(trials: pd.DataFrame, zero_shot: bool) -> str:
    suffix = "-zeroshot" if zero_shot else ""
    return f"things-{count_test_images(trials)}{suffix}"


# ------------------------------------------------------------------------------------------- files
def _find_files(source: Path, subj: int) -> SourceFiles:
    source, code = source.expanduser(), f"{subj:02d}"
    root = source.parent if source.name == "betas_csv" else source
    for place, names in PLACES.items():
        paths = [source / place.format(code) / name.format(code) for name in names]
        if any(path.exists() for path in paths):
            contents = ("responses", "stimulus metadata", "voxel metadata")
            for path, content in zip(paths, contents, strict=True):
                require_file(path, f"{content} of subject {subj}")
            return SourceFiles(root, *paths)
    raise PerceptError(
        f"There is no sub-{code}_ResponseData.h5 in {source} or its betas_csv/: fetch subject"
        f" {subj}, or give the folder that holds it."
    )


def _load_table(path: Path, columns: set[str], subj: int) -> pd.DataFrame:
    """A table of metadata, separated by commas or tabs whatever its name says."""
    texts = {"stimulus": str, "concept": str}  # names, also those that look like numbers
    with read_errors(path), open(path, encoding="utf-8-sig") as file:
        separator = "\t" if "\t" in file.readline() else ","
    table = load_csv(path, sep=separator, dtype=texts)
    missing = sorted(columns - set(table.columns))
    if missing:
        raise PerceptError(
            f"{path} lacks the columns {missing}: it has {list(table.columns)[:12]}."
        )
    if "subject_id" in table and set(table["subject_id"]) != {subj}:
        raise PerceptError(
            f"{path} is of subject {table['subject_id'].iloc[0]}, not of subject {subj}: give this"
            " subject's own files."
        )
    return table


def _load_stimuli(path: Path, subj: int) -> pd.DataFrame:
    """The stimulus metadata, one row a trial, checked; with a column concept."""
    stimuli = _load_table(path, {"trial_type", "session", "run", "stimulus"}, subj)
    unknown = sorted(set(stimuli["trial_type"].astype(str)) - {"train", "test"})
    if unknown:
        raise PerceptError(
            f"{path} has trials of the type {unknown[0]}: only train and test are known in the"
            " table format."
        )
    for column in ("session", "run"):
        if not pd.api.types.is_integer_dtype(stimuli[column]):
            raise PerceptError(
                f"Column {column} of {path} must hold whole numbers from 1, in every row: fetch it"
                " again."
            )
    sessions = set(stimuli["session"])
    gap = find_gap(sessions, 1)
    if gap is not None:
        raise PerceptError(
            f"Session {gap} of subject {subj} is missing in {path}, which goes on to"
            f" {stimuli['session'].max()}: fetch it again."
        )
    stimuli["stimulus"] = stimuli["stimulus"].astype(str)
    if "concept" not in stimuli:
        stems = [Path(name).stem for name in stimuli["stimulus"]]
        stimuli["concept"] = [stem.rpartition("_")[0] or stem for stem in stems]
    return stimuli.astype({"concept": str})


def _find_images(folder: Path, names: pd.DataFrame) -> list[Path]:
    """The file of each image, <concept>/<name> or <name> below the folder."""
    remedy = "fetch them from osf.io/jum2f, or give their folder as images_path"
    require_file(folder, "the THINGS images", remedy)
    files = []
    for name, concept in zip(names["name"], names["concept"], strict=True):
        nested, flat = folder / concept / name, folder / name
        files.append(nested if nested.exists() or not flat.exists() else flat)
    missing = [file for file in files if not file.exists()]
    if missing:
        raise PerceptError(
            f"Image {missing[0]} is missing ({len(missing)} of {len(files)} are): fetch the THINGS"
            " images, or give images_path."
        )
    return files


# --------------------------------------------------------------------------------------- image ids
def _number_images(root: Path, stimuli: pd.DataFrame) -> dict[str, int]:
    """Id of each image by file name.

    It is the name where all are numbers, else the place among the sorted names of all subjects.
    """
    names = set(stimuli["stimulus"])
    for other in SUBJECTS:
        for place, (_, stimulus_file, _) in PLACES.items():
            path = root / place.format(f"{other:02d}") / stimulus_file.format(f"{other:02d}")
            if path.exists():
                names |= set(_load_table(path, {"stimulus"}, other)["stimulus"].astype(str))
    stems = {name: Path(name).stem for name in sorted(names)}
    if all(stem.isdecimal() for stem in stems.values()):
        numbers = {name: int(stem) for name, stem in stems.items()}
        if len(set(numbers.values())) == len(numbers):
            return numbers
    return {name: place for place, name in enumerate(stems)}


# ------------------------------------------------------------------------------------------ tables
def _trials(stimuli: pd.DataFrame, number_of_name: dict[str, int]) -> pd.DataFrame:
    """The table of trials, split into train and test as published."""
    images = stimuli["stimulus"].map(number_of_name)
    trials = pd.DataFrame({"trial": np.arange(len(stimuli)), "image": images})
    trials["session"] = stimuli["session"] - 1
    trials["run"] = stimuli["run"] - 1
    trials["split"] = stimuli["trial_type"]
    trials["repeat"] = number_repeats(trials)
    return trials


def _split(
    trials: pd.DataFrame,
    concepts: pd.Series,
    root: Path,
    zero_shot: bool,
    val_images: int,
    seed: int,
) -> pd.Series:
    """The column `split`: of splits.csv, else with validation images chosen at random."""
    given_split = load_split_column(root, trials)
    split = trials["split"] if given_split is None else given_split
    if zero_shot:
        is_test = split == "test"
        in_tested_concept = concepts.isin(concepts[is_test])
        split = split.mask(in_tested_concept & ~is_test, "exclude")
    if given_split is None:
        return choose_validation(trials.assign(split=split), val_images, seed)
    return split


def _select_voxels(
    metadata: pd.DataFrame, rois: str, path: Path
) -> tuple[np.ndarray, pd.DataFrame]:
    """Rows of the selected voxels, and their table.

    Its columns are the regions (Boolean), x, y, z, noise_ceiling and whatever else there is.
    """
    regions = _region_columns(metadata, path)
    rows = np.arange(len(metadata))
    if rois.strip() != "all":
        rows = np.flatnonzero(metadata[_selected_columns(regions, rois, path)].any(axis=1))
        if not len(rows):
            raise PerceptError(
                f"{path} has no voxels of {rois or 'the visual regions'}: choose other regions, or"
                " rois='all' for every voxel."
            )
    table = metadata.iloc[rows].drop(columns="subject_id", errors="ignore")
    table = table.astype({name: bool for name in regions})
    table = table.rename(columns={f"voxel_{axis}": axis for axis in "xyz"})
    if "nc_singletrial" in table:
        table = table.assign(noise_ceiling=table["nc_singletrial"] / 100)
    return rows, table


def _region_columns(metadata: pd.DataFrame, path: Path) -> list[str]:
    """Names of the columns that are regions: those of zeros and ones.

    Raises:
        PerceptError: if one that is known to be a region holds anything else.
    """
    names = [str(name) for name in metadata if not NO_REGION.match(str(name))]
    for name in names:
        if {name, _without_side(name)} & VISUAL:
            to_mask(metadata[name].to_numpy(), f"Region {name} of {path}")
    return [name for name in names if metadata[name].isin((0, 1)).all()]


def _selected_columns(regions: list[str], rois: str, path: Path) -> list[str]:
    """The region columns that `rois` names; FFA stands for lFFA and rFFA, "" for all visual."""
    columns_of_name: dict[str, list[str]] = {}  # FFA: [lFFA, rFFA]; V1: [V1]
    for column in regions:
        for name in {column, _without_side(column)}:
            columns_of_name.setdefault(name, []).append(column)
    visual = [column for column in regions if {column, _without_side(column)} & VISUAL]
    requested = parse_name_list(rois)
    check_rois([name for name in requested if name not in columns_of_name], visual, str(path))
    selected: list[str] = []
    for name in requested:
        selected += columns_of_name[name]
    return selected or visual


def _without_side(column: str) -> str:
    """The name of a region without the l or r of its hemisphere."""
    return column[1:] if column[:1] in ("l", "r") else column


# ------------------------------------------------------------------------------------------- betas
@contextmanager
def _open_responses(path: Path, voxel_ids: np.ndarray, n_trials: int) -> Iterator[ResponseMatrix]:
    """The block of betas of a pandas frame in fixed format."""
    with open_h5(path, "responses") as file:
        with read_errors(path):
            group = file["ResponseData"] if "ResponseData" in file else {}
            names = [name for name in group if re.fullmatch(r"block\d+_values", name)]
        blocks = [find_dataset(file, f"ResponseData/{name}") for name in names]
        floats = [block for block in blocks if np.issubdtype(block.dtype, np.floating)]
        ids = [block for block in blocks if np.issubdtype(block.dtype, np.integer)]
        if len(floats) != 1:
            raise PerceptError(
                f"{path} has {len(floats)} tables of betas where one is expected,"
                " ResponseData/block0_values: fetch it again."
            )
        betas = floats[0]
        # without a block of integers, voxel_id is a float and the first column of the betas
        has_id_column = not ids and betas.shape == (len(voxel_ids), n_trials + 1)
        if has_id_column:
            ids = [betas[:, :1]]
        else:
            _check_matrix_shape(betas.shape, (len(voxel_ids), n_trials), path)
        with read_errors(path):
            stored_ids = [block[:].ravel() for block in ids]
        if ids and not np.array_equal(stored_ids[0], voxel_ids):
            raise PerceptError(
                f"The voxel_id of {path} are not those of the voxel metadata: give one subject's"
                " own files."
            )
        offset = betas.id.get_offset()
        if offset is not None:
            betas = np.memmap(path, betas.dtype, "r", offset, betas.shape)
        yield ResponseMatrix(betas, int(has_id_column))


def _check_matrix_shape(shape: tuple[int, ...], expected: tuple[int, int], path: Path) -> None:
    if shape == expected:
        return
    hint = ""
    if shape == expected[::-1]:
        hint = ", it is trials x voxels and must be turned"
    raise PerceptError(
        f"The betas of {path} are {shape}, the metadata tell (voxels, trials) ="
        f" {expected}{hint}: give one subject's own files."
    )


def _transposed_blocks(
    path: Path, voxel_ids: np.ndarray, rows: np.ndarray, n_trials: int, folder: Path
) -> Iterator[np.ndarray]:
    """Blocks (trials, voxels) of the voxels in some rows.

    They go by way of a temporary file of transposed tiles in `folder`, so that memory does not grow
    with the data.
    """
    with (
        _open_responses(path, voxel_ids, n_trials) as matrix,
        tempfile.TemporaryFile(dir=folder) as spool,
    ):
        dtype = np.dtype(np.float16 if matrix.values.dtype == np.float16 else np.float32)
        # the tiles, and the betas that are written from them
        check_space(folder, 2 * len(rows) * n_trials * dtype.itemsize)
        shapes = []
        for group in progress(matrix.group_rows(rows), "voxels"):
            tile = np.ascontiguousarray(matrix.load_trials(group), dtype)
            spool.write(tile.data)
            shapes.append(tile.shape)
        spool.flush()
        tiles, offset = [], 0
        for shape in shapes:
            tiles.append(np.memmap(spool, dtype, "r", offset, shape))
            offset += int(np.prod(shape)) * dtype.itemsize
        step = max(1, BLOCK_BYTES // (len(rows) * dtype.itemsize))
        for start in range(0, n_trials, step):
            yield np.concatenate([tile[start : start + step] for tile in tiles], axis=1)
