"""THINGS-fMRI (Hebart et al. 2023): single-trial responses in table format, of 3 subjects in 12
sessions.

- <source>/betas_csv/sub-01_ResponseData.h5, sub-01_StimulusMetadata.csv, sub-01_VoxelMetadata.csv
  (figshare plus 20492835), or OpenNeuro's names for the same,
  derivatives/ICA-betas/sub-01/voxel-metadata/sub-01_task-things_{voxel-wise-responses.h5,stimulus-metadata.tsv,
  voxel-metadata.tsv} (these names from public code that reads them).
- ResponseData.h5 is a pandas frame in PyTables' fixed format under the key ResponseData: a row a
  voxel, a column a trial, after the column voxel_id. That format keeps columns by dtype: one block
  of floats (voxels, trials) and one of integers (voxels, 1), the voxel_id. It is read with h5py;
  which block is which is told by dtype and shape, and voxel_id is compared with the metadata. The
  labels of the float columns are pickled in the published files and are not read: that the columns
  follow the rows of the stimulus metadata is inferred, as all public code takes it so.
- The stimulus metadata has a row a trial: trial_type (train or test; catch trials are not in the
  table), session and run (from 1), stimulus (file name) and perhaps concept, else the file name up
  to its last "_". `trial` here is the row. The 100 test images were shown in each of the 12
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
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES, check_space, disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.readers.common import (
    check_rois,
    choose_validation,
    copy_tables,
    load_images,
    load_split_column,
)
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

VISUAL = {
    "V1",
    "V2",
    "V3",
    "hV4",
    "VO1",
    "VO2",
    "LO1 (prf)",
    "LO2 (prf)",
    "TO1",
    "TO2",
    "V3a",
    "V3b",
    "IT",
    "LO",
    "EBA",
    "FFA",
    "OFA",
    "STS",
    "PPA",
    "RSC",
    "TOS",
    "OPA",
    "LOC",
}

NO_REGION = re.compile(r"voxel_|subject_id|nc_|splithalf_|prf-")


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
        attributes: what is to be said about the betas where it differs from the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or damaged file, tables and responses that do not fit each
            other, another subject's metadata, an unknown region, a missing image, or an image on
            both sides of the split.
    """
    root, paths = _find(Path(source), subj)
    target = dataset_folder(dataset)
    stimuli, voxels = (
        _stimuli(paths[1], subj),
        _table(paths[2], {"voxel_id", "voxel_x", "voxel_y", "voxel_z"}, subj),
    )
    with _matrix(paths[0], voxels["voxel_id"].to_numpy(), len(stimuli)):
        pass  # what does not fit is said before anything is made
    kept, table = _voxels(voxels, rois, paths[2])
    names = stimuli.drop_duplicates("stimulus")[["stimulus", "concept"]]
    number = _numbers(root, stimuli)
    trials = _trials(stimuli, number, root, zero_shot, val_images, seed)
    check_trials(trials)
    n_test = trials.loc[trials["split"] == "test", "image"].nunique()
    about: dict[str, Any] = {
        "source": "THINGS-fMRI, betas_csv",
        "units": "single-trial GLM beta (percent signal change, inferred)",
        "normalisation": "none",
        "protocol": protocol or f"things-{n_test}{'-zeroshot' if zero_shot else ''}",
        "rois": rois or "visual",
        **(attributes or {}),
    }
    labels = pd.DataFrame(
        {
            "image": names["stimulus"].map(number),
            "name": names["stimulus"],
            "concept": names["concept"],
        }
    )
    _check_numbers(target / "labels.parquet", labels)
    files = _image_files(Path(images_path).expanduser() if images_path else root / "images", names)
    target.mkdir(parents=True, exist_ok=True)
    with disk_errors(target):
        write_images(
            target / "images.h5",
            load_images(progress(files, "images", len(files)), "Image", image_size),
            labels["image"].to_numpy(),
        )
        _write_labels(root, target, labels)
        betas = _transposed(paths[0], voxels["voxel_id"].to_numpy(), kept, len(trials), target)
        return write_subject(subject_folder(dataset, subj), betas, trials, table, about)


def _find(source: Path, subj: int) -> tuple[Path, list[Path]]:
    """The root of the data, and the subject's files: responses, stimuli, voxels."""
    source, code = source.expanduser(), f"{subj:02d}"
    for place, names in PLACES.items():
        paths = [source / place.format(code) / name.format(code) for name in names]
        if any(path.exists() for path in paths):
            for path, what in zip(
                paths, ("responses", "stimulus metadata", "voxel metadata"), strict=True
            ):
                require_file(path, f"{what} of subject {subj}")
            return source.parent if source.name == "betas_csv" else source, paths
    raise PerceptError(
        f"There is no sub-{code}_ResponseData.h5 in {source} or its betas_csv/: fetch subject"
        f" {subj}, or give the folder that holds it."
    )


def _table(path: Path, columns: set[str], subj: int) -> pd.DataFrame:
    """A table of metadata, separated by commas or tabs whatever its name says."""
    try:
        with open(path) as file:
            separator = "\t" if "\t" in file.readline() else ","
        table = pd.read_csv(
            path, sep=separator, dtype={"stimulus": str, "concept": str}
        )  # names, also those that look like numbers
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise PerceptError(f"{path} cannot be read ({error}): fetch it again.") from error
    if missing := sorted(columns - set(table.columns)):
        raise PerceptError(
            f"{path} lacks the columns {missing}: it has {list(table.columns)[:12]}."
        )
    if "subject_id" in table and set(table["subject_id"]) != {subj}:
        raise PerceptError(
            f"{path} is of subject {table['subject_id'].iloc[0]}, not of subject {subj}: give this"
            " subject's own files."
        )
    return table


def _stimuli(path: Path, subj: int) -> pd.DataFrame:
    stimuli = _table(path, {"trial_type", "session", "run", "stimulus"}, subj)
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
    if missing := sorted(set(range(1, stimuli["session"].max() + 1)) - set(stimuli["session"])):
        raise PerceptError(
            f"Session {missing[0]} of subject {subj} is missing in {path}, which goes on to"
            f" {stimuli['session'].max()}: fetch it again."
        )
    stimuli["stimulus"] = stimuli["stimulus"].astype(str)
    if "concept" not in stimuli:
        stimuli["concept"] = [
            Path(name).stem.rpartition("_")[0] or Path(name).stem for name in stimuli["stimulus"]
        ]
    return stimuli.astype({"concept": str})


def _numbers(root: Path, stimuli: pd.DataFrame) -> dict[str, int]:
    """Id of each image by file name: the name where all are numbers, else the place among the
    sorted names of all subjects.
    """
    names = set(stimuli["stimulus"])
    for other in SUBJECTS:
        for place, parts in PLACES.items():
            path = root / place.format(f"{other:02d}") / parts[1].format(f"{other:02d}")
            if path.exists():
                names |= set(_table(path, {"stimulus"}, other)["stimulus"].astype(str))
    stems = {name: Path(name).stem for name in sorted(names)}
    if all(stem.isdecimal() for stem in stems.values()) and len(
        {int(stem) for stem in stems.values()}
    ) == len(stems):
        return {name: int(stem) for name, stem in stems.items()}
    return {name: place for place, name in enumerate(stems)}


def _check_numbers(path: Path, labels: pd.DataFrame) -> None:
    """Refuse to add to a dataset whose images were numbered differently."""
    known = pd.read_parquet(path) if path.exists() else pd.DataFrame()
    if "name" not in known:
        return
    both = labels.merge(known[["image", "name"]], on="name", suffixes=("", "_known"))
    wrong = both[both["image"] != both["image_known"]]
    if len(wrong):
        name, new, old = wrong.iloc[0][["name", "image", "image_known"]]
        raise PerceptError(
            f"{name} would be image {new}, but is image {int(old)} in {path}: read all subjects"
            " from one folder that holds the metadata of all, under another dataset name."
        )


def _trials(
    stimuli: pd.DataFrame,
    number: dict[str, int],
    root: Path,
    zero_shot: bool,
    val_images: int,
    seed: int,
) -> pd.DataFrame:
    trials = pd.DataFrame(
        {"trial": np.arange(len(stimuli)), "image": stimuli["stimulus"].map(number)}
    )
    trials["session"], trials["run"], trials["split"] = (
        stimuli["session"] - 1,
        stimuli["run"] - 1,
        stimuli["trial_type"],
    )
    trials["repeat"] = number_repeats(trials)
    own = load_split_column(root, trials)
    trials["split"] = trials["split"] if own is None else own
    if zero_shot:
        tested = stimuli["concept"].isin(stimuli.loc[trials["split"] == "test", "concept"])
        trials["split"] = trials["split"].mask(tested & (trials["split"] != "test"), "exclude")
    if own is None:
        trials["split"] = choose_validation(trials, val_images, seed)
    return trials


def _voxels(voxels: pd.DataFrame, rois: str, path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Rows of the voxels kept, and their table: regions as Boolean columns, x, y, z, noise_ceiling
    and what else there is.
    """
    regions = [
        name
        for name in map(str, voxels)
        if not NO_REGION.match(name) and voxels[name].isin((0, 1)).all()
    ]
    members: dict[str, list[str]] = {}  # FFA: [lFFA, rFFA]; V1: [V1]
    for name in regions:
        for key in {name, name[1:] if name[0] in "lr" else name}:
            members.setdefault(key, []).append(name)
    wanted = [name.strip() for name in rois.split(",") if name.strip()]
    if rois.strip() != "all":
        visual = [
            name for name in regions if name in VISUAL or (name[0] in "lr" and name[1:] in VISUAL)
        ]
        check_rois([name for name in wanted if name not in members], visual, str(path))
        columns = [column for name in wanted for column in members[name]] or visual
        kept = np.flatnonzero(voxels[columns].any(axis=1))
        if not len(kept):
            raise PerceptError(
                f"{path} has no voxels of {rois or 'the visual regions'}: choose other regions, or"
                " rois='all' for every voxel."
            )
    else:
        kept = np.arange(len(voxels))
    table = (
        voxels.iloc[kept]
        .drop(columns="subject_id", errors="ignore")
        .astype({name: bool for name in regions})
    )
    table = table.rename(columns={f"voxel_{axis}": axis for axis in "xyz"})
    return kept, (
        table.assign(noise_ceiling=table["nc_singletrial"] / 100)
        if "nc_singletrial" in table
        else table
    )


@contextmanager
def _matrix(
    path: Path, voxel_ids: np.ndarray, n_trials: int
) -> Iterator[tuple[h5py.Dataset | np.memmap, int]]:
    """The block of betas of a pandas frame in fixed format, memory-mapped where it is contiguous,
    and which of its columns is the first trial.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise PerceptError(f"{path} is damaged or cut off ({error}): fetch it again.") from error
    with file:
        blocks = (
            [
                d
                for name, d in file["ResponseData"].items()
                if re.fullmatch(r"block\d+_values", name)
            ]
            if "ResponseData" in file
            else []
        )
        betas = [d for d in blocks if np.issubdtype(d.dtype, np.floating)]
        ids = [d for d in blocks if np.issubdtype(d.dtype, np.integer)]
        if len(betas) != 1:
            raise PerceptError(
                f"{path} has {len(betas)} tables of betas where one is expected,"
                " ResponseData/block0_values: fetch it again."
            )
        shape, expected = betas[0].shape, (len(voxel_ids), n_trials)
        first = int(
            not ids and shape == (len(voxel_ids), n_trials + 1)
        )  # voxel_id is a float and in the same block
        if first:
            ids = [betas[0][:, :1]]
        elif shape != expected:
            turned = ", it is trials x voxels and must be turned" if shape == expected[::-1] else ""
            raise PerceptError(
                f"The betas of {path} are {shape}, the metadata tell (voxels, trials) ="
                f" {expected}{turned}: give one subject's own files."
            )
        if ids and not np.array_equal(ids[0][:].ravel(), voxel_ids):
            raise PerceptError(
                f"The voxel_id of {path} are not those of the voxel metadata: give one subject's"
                " own files."
            )
        offset = betas[0].id.get_offset()
        yield (
            betas[0] if offset is None else np.memmap(path, betas[0].dtype, "r", offset, shape),
            first,
        )


def _groups(matrix: h5py.Dataset | np.memmap, rows: np.ndarray) -> list[np.ndarray]:
    """Rows in groups of about 64 MB; of a chunked matrix, rows that lie together, since whole
    chunks are decoded.
    """
    size = max(1, BLOCK_BYTES // (matrix.shape[1] * matrix.dtype.itemsize))
    if isinstance(matrix, np.memmap):
        key = np.arange(len(rows)) // size
    else:
        chunk = matrix.chunks[0] if matrix.chunks else 1
        key = rows // (max(1, size // chunk) * chunk)
    return np.split(rows, np.flatnonzero(np.diff(key)) + 1)


def _transposed(
    path: Path, voxel_ids: np.ndarray, rows: np.ndarray, n_trials: int, folder: Path
) -> Iterator[np.ndarray]:
    """Blocks (trials, voxels) of the voxels at `rows`, by way of a temporary file of transposed
    tiles in `folder`.
    """
    with (
        _matrix(path, voxel_ids, n_trials) as (matrix, first),
        tempfile.TemporaryFile(dir=folder) as spool,
    ):
        dtype = np.dtype(np.float16 if matrix.dtype == np.float16 else np.float32)
        check_space(
            folder, 2 * len(rows) * n_trials * dtype.itemsize
        )  # the tiles, and what is made of them
        shapes = []
        for group in progress(_groups(matrix, rows), "voxels"):
            taken = (
                matrix[group]
                if isinstance(matrix, np.memmap)
                else matrix[group[0] : group[-1] + 1][group - group[0]]
            )
            tile = np.ascontiguousarray(taken[:, first:].T, dtype)
            spool.write(tile.data)
            shapes.append(tile.shape)
        spool.flush()
        starts = np.cumsum([0, *(np.prod(shape) * dtype.itemsize for shape in shapes)])
        tiles = [
            np.memmap(spool, dtype, "r", int(start), shape)
            for start, shape in zip(starts, shapes, strict=False)
        ]
        step = max(1, BLOCK_BYTES // (len(rows) * dtype.itemsize))
        for start in range(0, n_trials, step):
            yield np.concatenate([tile[start : start + step] for tile in tiles], axis=1)


def _image_files(folder: Path, names: pd.DataFrame) -> list[Path]:
    require_file(
        folder,
        "the THINGS images",
        "fetch them from osf.io/jum2f, or give their folder as images_path",
    )
    files = []
    for name, concept in names.itertuples(index=False):
        nested, flat = folder / concept / name, folder / name
        files.append(nested if nested.exists() or not flat.exists() else flat)
    missing = [file for file in files if not file.exists()]
    if missing:
        raise PerceptError(
            f"Image {missing[0]} is missing ({len(missing)} of {len(files)} are): fetch the THINGS"
            " images, or give images_path."
        )
    return files


def _write_labels(root: Path, target: Path, labels: pd.DataFrame) -> None:
    """labels.parquet with name and concept, beside the columns that the source's own labels.parquet
    has.
    """
    copy_tables(root, target, labels["image"].tolist())
    if (root / "labels.parquet").exists():
        own = pd.read_parquet(root / "labels.parquet").drop(
            columns=["name", "concept"], errors="ignore"
        )
        labels = labels.merge(own, on="image", how="left")
    write_image_table(target / "labels.parquet", labels)
