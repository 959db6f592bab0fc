"""The prepared layout of brain data, and everything that reads it.

- One layout for every source: `images.h5`, `captions.parquet` and `labels.parquet` for a dataset,
  `betas.h5`, `trials.parquet` and `voxels.parquet` for each of its subjects. Readers
  (`src.readers`) write it, everything else opens it with `open_subject`.
- Large arrays are contiguous and uncompressed inside HDF5, so that they are memory-mapped at their
  offset: no decoding, no copies, true shuffles.
- A split is a property of an image. `check_trials` refuses an image on both sides, on writing and
  again on opening.
- Everything is written under a temporary name and renamed, so that a failure leaves earlier results
  as they were.
- Which repeat an image shows is a pure function of (seed, epoch, image): independent of batch size,
  workers and resuming.
- Statistics are accumulated in float64 over blocks of rows: 30,000 trials of 15,724 voxels never
  need to fit in memory.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.cluster import KMeans
from sklearn.utils.extmath import randomized_svd
from torch.utils.data import Dataset

from src.utils import HOME, PerceptError, atomic, progress, read_json, same_features, write_json

SPLITS = ("train", "val", "test", "exclude")
TRIAL_COLUMNS = ("trial", "image", "session", "run", "repeat", "split")
REQUIRED_ATTRIBUTES = ("source", "units", "normalisation", "protocol")
REPEATS = ("random", "batch", "mean", "all", "each")
BLOCK_BYTES = 64 << 20  # rows are read, checked and written in blocks of about this size
SPARE_BYTES = 32 << 20  # space that must remain on the disk after a write
CLUSTERS, SESSIONS = (
    "clusters.parquet",
    "sessions.json",
)  # what a training was given less than everything, in the folder of its run
# share of the clusters, and about that of the images, that a cluster-held-out training is not given
HELD_OUT = 0.25
# of the 2023 ROI project, by the names that its tables use (there 1, 2 and 3; "-" is no selection)
ROI_SETS = {
    "set1": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4", "FFA-1", "FFA-2", "PPA"),
    "set2": (
        "EBA",
        "FBA-1",
        "FBA-2",
        "mTL-bodies",
        "OFA",
        "FFA-1",
        "FFA-2",
        "mTL-faces",
        "aTL-faces",
        "OPA",
        "PPA",
        "RSC",
    ),
    "set3": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
}
SAME_IMAGE = 8.0  # mean absolute difference (of 255) up to which two copies count as the same image


# -------------------------------------------------------------------------------- writing safely
def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin a write of `needed` bytes that the disk of `folder` cannot hold.

    Raises:
        PerceptError: with the space needed and the space there is.
    """
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise PerceptError(
            f"No space for {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: "
            "free some, or set PERCEPT_HOME to a folder on a larger disk."
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that fills up during a write into one clear PerceptError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise PerceptError(
                f"The disk of {folder} filled up during the write: free some space and run this"
                " again (earlier files are intact)."
            ) from error
        raise


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place on success and disappears on
    failure.
    """
    temporary, old = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old")
    )
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def row_blocks(rows: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """An array (rows, ...) in blocks of about 64 MB; an iterable of blocks passes through."""
    if not isinstance(rows, np.ndarray):
        yield from rows
        return
    step = max(1, BLOCK_BYTES // max(1, int(np.prod(rows.shape[1:])) * rows.itemsize))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _store_rows(
    path: Path,
    name: str,
    blocks: Iterable[np.ndarray],
    n_rows: int,
    inspect: Callable[[np.ndarray, int], np.ndarray],
) -> tuple[int, ...]:
    """Write row blocks as one contiguous dataset and return its shape.

    `inspect(block, first_row)` checks a block and returns it in the dtype to be stored.
    """
    written = 0
    with h5py.File(path, "w") as file:
        for raw in blocks:
            block = np.ascontiguousarray(inspect(np.asarray(raw), written))
            if name not in file:
                check_space(path.parent, n_rows * int(np.prod(block.shape[1:])) * block.itemsize)
                file.create_dataset(name, (n_rows, *block.shape[1:]), block.dtype)
            target = file[name]
            if (block.shape[1:], block.dtype) != (target.shape[1:], target.dtype):
                raise PerceptError(
                    f"Row {written} of {name} is {block.dtype} {block.shape[1:]}, the rows before"
                    f" it are {target.dtype} {target.shape[1:]}: all rows must be alike."
                )
            if written + len(block) > n_rows:
                raise PerceptError(
                    f"There are more than the {n_rows} rows of {name} that were announced: check"
                    " the table against the array."
                )
            target[written : written + len(block)] = block
            written += len(block)
        if written != n_rows:
            raise PerceptError(
                f"There are {written} rows of {name} where {n_rows} were announced: check the table"
                " against the array."
            )
        if name not in file:
            raise PerceptError(f"There is not one row of {name}: nothing to write.")
        return file[name].shape


# -------------------------------------------------------------------------------- tables
def check_trials(trials: pd.DataFrame) -> None:
    """Check the table of trials: columns trial, image, session, run, repeat (integers) and split
    (train, val, test or exclude).

    Raises:
        PerceptError: naming the missing column, the unknown split, the trial or repeat that occurs
            twice, or the image that lies on both sides of a split. Trials of an image may be
            excluded one by one.
    """
    missing = [c for c in TRIAL_COLUMNS if c not in trials.columns]
    if missing:
        raise PerceptError(
            f"The table of trials lacks the columns {missing}: it needs {list(TRIAL_COLUMNS)}."
        )
    for column in TRIAL_COLUMNS[:-1]:
        if not pd.api.types.is_integer_dtype(trials[column]):
            raise PerceptError(
                f"Column {column} of the table of trials is {trials[column].dtype}, it must hold"
                " whole numbers without gaps."
            )
    unknown = sorted(set(trials["split"].astype(str)) - set(SPLITS))
    if unknown:
        raise PerceptError(
            f"The table of trials has the splits {unknown}: only {list(SPLITS)} are known."
        )
    twice = trials["trial"][trials["trial"].duplicated()]
    if len(twice):
        raise PerceptError(
            f"Trial {twice.iloc[0]} is twice in the table of trials: each row must be a trial of"
            " its own."
        )
    again = trials[trials.duplicated(["image", "repeat"])]
    if len(again):
        row = again.iloc[0]
        raise PerceptError(
            f"Image {row['image']} has its repeat {row['repeat']} twice (again in trial"
            f" {row['trial']}): number its repeats 0, 1, 2..."
        )
    _check_sides(trials[trials["split"] != "exclude"])


def _check_sides(trials: pd.DataFrame) -> None:
    sides = trials.drop_duplicates(["image", "split"])
    both = sides[sides["image"].duplicated(keep=False)].sort_values(["image", "trial"])
    if len(both):
        image, rows = both["image"].iloc[0], both[both["image"] == both["image"].iloc[0]]
        where = " and ".join(
            f"{s} (trial {t})" for s, t in zip(rows["split"], rows["trial"], strict=True)
        )
        others = both["image"].nunique() - 1
        raise PerceptError(
            f"Image {image} is in {where}"
            + (f", and {others} more images are on two sides" if others else "")
            + ": split by image, never by trial, or mark its trials as exclude."
        )


def number_repeats(trials: pd.DataFrame) -> pd.Series:
    """Repeat of each row, 0 for the first presentation of its image in the order of column `trial`."""
    order = trials["trial"].argsort(kind="stable").to_numpy()
    return (
        trials["image"]
        .iloc[order]
        .groupby(trials["image"].iloc[order])
        .cumcount()
        .reindex(trials.index)
    )


def write_image_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table about images (captions or labels, with a column `image`) as parquet; rows of
    other images already there are kept.

    Raises:
        PerceptError: if there is no column `image`, or the disk is full.
    """
    path = Path(path)
    if "image" not in table.columns:
        raise PerceptError(
            f"The table for {path.name} has no column image (it has {list(table.columns)})."
        )
    if path.exists():
        old = pd.read_parquet(path)
        table = pd.concat([old[~old["image"].isin(table["image"])], table], ignore_index=True)
    with disk_errors(path.parent), atomic(path) as temporary:
        table.sort_values("image", kind="stable").reset_index(drop=True).to_parquet(temporary)


# -------------------------------------------------------------------------------- images
def _map_h5(path: Path, name: str) -> tuple[np.memmap, dict[str, Any]]:
    """Memory-map a contiguous dataset of an HDF5 file, read-only, with its attributes."""
    try:
        with h5py.File(path, "r") as file:
            if name not in file:
                raise PerceptError(f"{path} has no dataset {name}: prepare the data again.")
            stored = file[name]
            shape, dtype, offset = stored.shape, stored.dtype, stored.id.get_offset()
            attributes = {
                k: v.item() if isinstance(v, np.generic) else v for k, v in stored.attrs.items()
            }
    except (OSError, RuntimeError) as error:  # h5py raises either for a damaged file
        raise PerceptError(
            f"{path} cannot be read, it is damaged or incomplete ({error}): prepare the data again."
        ) from error
    if offset is None or offset + int(np.prod(shape)) * dtype.itemsize > path.stat().st_size:
        raise PerceptError(
            f"Dataset {name} of {path} is compressed, chunked or cut off, so it cannot be"
            " memory-mapped: prepare the data again."
        )
    return np.memmap(path, dtype, "r", offset, shape), attributes


class ImageStore:
    """The images of a dataset, memory-mapped.

    Attributes:
        image_ids: int64 (images,), in the order in which they are stored.
        crc: int64 (images,), CRC-32 of the pixels of each.

    Raises:
        PerceptError: if the file is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise PerceptError(
                f"{self.path} is missing: prepare the data with notebook 00_prepare_data."
            )
        self.shape = self.pixels.shape
        with h5py.File(self.path, "r") as file:
            self.image_ids, self.crc = file["image_id"][:], file["crc"][:]
        self._order = np.argsort(self.image_ids)

    @cached_property
    def pixels(self) -> np.memmap:
        """uint8 (images, height, width, 3)."""
        return _map_h5(self.path, "images")[0]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "pixels"}

    def positions(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows at which images are stored. Raises PerceptError for an image that is not."""
        return _positions(self.image_ids, self._order, image_ids, str(self.path))

    def rows(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3), in the order asked for."""
        return _gather(self.pixels, self.positions(image_ids))


def _positions(
    stored: np.ndarray, order: np.ndarray, wanted: Sequence[int] | np.ndarray, where: str
) -> np.ndarray:
    ids = np.atleast_1d(np.asarray(wanted, dtype=np.int64))
    found = order[np.searchsorted(stored, ids, sorter=order).clip(max=len(stored) - 1)]
    wrong = ids[stored[found] != ids]
    if len(wrong):
        raise PerceptError(
            f"Image {wrong[0]} is not in {where} ({len(wrong)} of the {len(ids)} images asked for"
            " are not): prepare the data again."
        )
    return found


def _gather(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a memory-mapped array in the order asked for, read in the order of the file."""
    order = np.argsort(rows, kind="stable")
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    taken[order] = array[rows[order]]
    return taken


def _check_image_block(block: np.ndarray, size: tuple[int, ...] | None) -> None:
    if block.dtype != np.uint8 or block.ndim != 4 or block.shape[-1] != 3:
        raise PerceptError(
            f"Images must be uint8 (n, height, width, 3), these are {block.dtype} {block.shape}."
        )
    if size is not None and block.shape[1:3] != size:
        raise PerceptError(
            f"Images of {block.shape[1]} x {block.shape[2]} do not fit the {size[0]} x {size[1]}"
            " images of this dataset: resize them, or prepare them under another dataset name."
        )


def _new_images(
    images: np.ndarray | Iterable[np.ndarray], ids: np.ndarray, old: ImageStore | None
) -> Iterator[np.ndarray]:
    """Blocks of those images that are not stored yet; those that are must look the same."""
    start, recompressed = 0, 0
    known = np.isin(ids, old.image_ids) if old else np.zeros(len(ids), bool)
    for block in row_blocks(images):
        _check_image_block(block, tuple(old.shape[1:3]) if old else None)
        part = slice(start, start + len(block))
        start += len(block)
        if start > len(ids):
            raise PerceptError(
                f"There are more images than the {len(ids)} image ids given for them."
            )
        if old and known[part].any():
            stored, again = old.rows(ids[part][known[part]]), block[known[part]]
            difference = np.abs(stored.astype(np.int16) - again).mean(axis=(1, 2, 3))
            recompressed += int(((difference > 0) & (difference <= SAME_IMAGE)).sum())
            if (difference > SAME_IMAGE).any():
                image = ids[part][known[part]][difference.argmax()]
                raise PerceptError(
                    f"Image {image} is already in {old.path} and looks different there: use another"
                    " dataset name, or delete that file."
                )
        if not known[part].all():
            yield block[~known[part]]
    if start != len(ids):
        raise PerceptError(f"There are {start} images for {len(ids)} image ids.")
    if recompressed:
        warnings.warn(
            f"{recompressed} images were stored already with slightly different pixels; the stored"
            " ones are kept.",
            stacklevel=4,
        )


def write_images(
    path: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    image_ids: Sequence[int] | np.ndarray,
) -> None:
    """Write the images of a dataset, or add to those already there (several subjects share one
    file).

    Args:
        path: the file, data/<dataset>/images.h5.
        images: uint8 (n, height, width, 3), or an iterable of blocks of these.
        image_ids: (n,) unique integers.

    Raises:
        PerceptError: for another dtype or shape, ids that occur twice, an id that is stored with
            other pixels, or a full disk. What was there stays.
    """
    path, ids = Path(path), np.asarray(image_ids, dtype=np.int64)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise PerceptError(
            f"Image id {unique[counts.argmax()]} is given for {counts.max()} images: ids must be"
            " unique."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    old = ImageStore(path) if path.exists() else None
    new_ids = ids[~np.isin(ids, old.image_ids)] if old else ids
    if old and not len(new_ids):
        for _ in _new_images(images, ids, old):  # nothing to add: the comparison alone
            pass
        return
    stored_ids = np.concatenate([old.image_ids, new_ids]) if old else new_ids
    crc: list[int] = []

    def inspect(block: np.ndarray, _row: int) -> np.ndarray:
        crc.extend(zlib.crc32(np.ascontiguousarray(image).data) for image in block)
        return block

    blocks = chain(row_blocks(old.pixels) if old else (), _new_images(images, ids, old))
    with disk_errors(path.parent), atomic(path) as temporary:
        _store_rows(temporary, "images", blocks, len(stored_ids), inspect)
        with h5py.File(temporary, "r+") as file:
            file["image_id"], file["crc"] = stored_ids, np.array(crc, dtype=np.int64)


# -------------------------------------------------------------------------------- writing a subject
def _finite_block(
    trials: pd.DataFrame, n_voxels: int | None, digest: Any
) -> Callable[[np.ndarray, int], np.ndarray]:
    """The check of a block of betas (rows, voxels) or (rows, x, y, z), which also settles its dtype
    and adds it to a checksum.
    """
    numbers = trials["trial"].to_numpy()

    def inspect(block: np.ndarray, row: int) -> np.ndarray:
        if not np.issubdtype(block.dtype, np.number) or np.iscomplexobj(block):
            raise PerceptError(f"Betas must be numbers, they are {block.dtype}.")
        if block.ndim not in (2, 4):
            raise PerceptError(
                "Betas must be (trials, voxels) or (trials, x, y, z), a block of them has shape "
                f"{block.shape}."
            )
        if n_voxels is not None and int(np.prod(block.shape[1:])) != n_voxels:
            raise PerceptError(
                f"Betas have {int(np.prod(block.shape[1:]))} voxels, the table of voxels has"
                f" {n_voxels} rows."
            )
        block = np.ascontiguousarray(
            block if block.dtype == np.float16 else block.astype(np.float32, copy=False)
        )
        flat = block.reshape(len(block), -1)
        finite = np.isfinite(flat)
        if not finite.all():
            at, voxel = np.argwhere(~finite)[0]
            trial = numbers[row + at] if row + at < len(numbers) else row + at
            raise PerceptError(
                f"The beta of trial {trial} (row {row + at}), voxel {voxel} is {flat[at, voxel]}: "
                "leave out such voxels or trials, or mend them, before preparing the data."
            )
        digest.update(block.data)
        return block

    return inspect


def _check_attributes(attributes: dict[str, Any]) -> None:
    missing = [k for k in REQUIRED_ATTRIBUTES if not attributes.get(k)]
    if missing:
        raise PerceptError(
            f"Betas need the attributes {list(REQUIRED_ATTRIBUTES)}, of which {missing} are"
            " missing."
        )
    wrong = [
        k
        for k, v in attributes.items()
        if not isinstance(v, str | int | float | np.integer | np.floating)
    ]
    if wrong:
        raise PerceptError(
            f"Attributes are texts and numbers, {wrong[0]} is a"
            f" {type(attributes[wrong[0]]).__name__}."
        )


def write_subject(
    folder: str | Path,
    betas: np.ndarray | Iterable[np.ndarray],
    trials: pd.DataFrame,
    voxels: pd.DataFrame | None,
    attributes: dict[str, Any],
) -> Path:
    """Write one subject: betas.h5, trials.parquet, voxels.parquet.

    The folder appears, or is replaced, only when all of it is written.

    Args:
        folder: data/<dataset>/subjNN.
        betas: (trials, voxels) or (trials, x, y, z), or an iterable of blocks of these rows;
            float16 is kept, anything else becomes float32.
        trials: one row for each row of betas, see `check_trials`.
        voxels: one row a voxel (ROI flags, x y z, noise ceiling), or None where nothing is known.
        attributes: texts and numbers; source, units, normalisation and protocol are required.
            checksum, n_trials, n_voxels are added.

    Returns:
        The folder.

    Raises:
        PerceptError: for a bad table, a NaN or infinite beta (naming its trial and voxel), wrong
            shapes, or a full disk.
    """
    folder = Path(folder)
    check_trials(trials)
    _check_attributes(attributes)
    digest = hashlib.blake2b(digest_size=16)
    inspect = _finite_block(trials, None if voxels is None else len(voxels), digest)
    with disk_errors(folder.parent), _replacing(folder) as temporary:
        shape = _store_rows(
            temporary / "betas.h5", "betas", row_blocks(betas), len(trials), inspect
        )
        n_voxels = int(np.prod(shape[1:]))
        with h5py.File(temporary / "betas.h5", "r+") as file:
            file["betas"].attrs.update(
                {
                    **attributes,
                    "checksum": digest.hexdigest(),
                    "n_trials": shape[0],
                    "n_voxels": n_voxels,
                }
            )
        table = (
            trials[list(TRIAL_COLUMNS)]
            .reset_index(drop=True)
            .astype({c: np.int64 for c in TRIAL_COLUMNS[:-1]} | {"split": str})
        )
        table.to_parquet(temporary / "trials.parquet")
        voxels = (
            pd.DataFrame({"voxel": np.arange(n_voxels)})
            if voxels is None
            else voxels.reset_index(drop=True)
        )
        voxels.to_parquet(temporary / "voxels.parquet")
    return folder


# -------------------------------------------------------------------------------- reading a subject
def dataset_folder(dataset: str | Path) -> Path:
    """Folder of a prepared dataset: a bare name lies under HOME/data, any other relative path hangs
    on HOME.
    """
    path = Path(dataset).expanduser()
    if path.is_absolute():
        return path
    return HOME / "data" / path if len(path.parts) == 1 else HOME / path


def subject_folder(dataset: str | Path, subj: int) -> Path:
    """Folder of one subject of a prepared dataset."""
    return dataset_folder(dataset) / f"subj{int(subj):02d}"


def open_subject(dataset: str | Path, subj: int) -> Subject:
    """Open a prepared subject.

    Args:
        dataset: name of a folder under HOME/data, or a path.
        subj: number of the subject.

    Raises:
        PerceptError: if files are missing, damaged, or do not belong together.
    """
    return Subject(dataset_folder(dataset), subj)


class Subject:
    """One subject's measurements and what was seen.

    Made by `open_subject`; can be pickled (memory maps are opened again).

    Attributes:
        trials: one row for each row of `betas`: trial (global order), image, session, run, repeat,
            split.
        voxels: one row a voxel.
        attributes: source, units, normalisation, protocol, checksum, n_trials, n_voxels and what
            the reader added.
        protocol: name of the protocol, for every row of results.
        volume_shape: (x, y, z) where the betas are whole volumes, else None.
        clusters: what `image_clusters` gave, where clusters of images are held out, else None.
    """

    clusters: pd.DataFrame | None = None

    def __init__(self, folder: str | Path, subj: int):
        self.folder, self.subj = Path(folder), int(subj)
        self.path = subject_folder(self.folder, subj)
        for file in (
            *(self.path / name for name in ("betas.h5", "trials.parquet", "voxels.parquet")),
            self.folder / "images.h5",
        ):
            if not file.exists():
                raise PerceptError(
                    f"Subject {subj} of dataset {self.folder.name} is not prepared, {file} is"
                    " missing: run notebook 00_prepare_data (with the recipe mindeye/mini for the"
                    " embedded mini world, which needs no data)."
                )
        stored, self.attributes = _map_h5(self.path / "betas.h5", "betas")
        self.volume_shape = stored.shape[1:] if stored.ndim == 4 else None
        self.trials, self.voxels = (
            pd.read_parquet(self.path / "trials.parquet"),
            pd.read_parquet(self.path / "voxels.parquet"),
        )
        check_trials(self.trials)
        tables = (len(self.trials), len(self.voxels))
        if tables != (len(stored), int(np.prod(stored.shape[1:]))):
            raise PerceptError(
                f"{self.path}: betas are {stored.shape}, the tables have {tables} (trials, voxels):"
                " prepare the data again."
            )
        self.protocol = str(self.attributes.get("protocol", ""))
        self.neighbours: np.ndarray | None = (
            None  # (trials, trials read together), rows of the betas, -1 for none
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("betas", "_store")}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.image_ids(s))} {s}" for s in SPLITS[:3])
        size = f"(trials, voxels) = {self.betas.shape}"
        return (
            f"Subject {self.subj} of {self.folder.name}: {size}, images: {counts}, protocol"
            f" {self.protocol}"
        )

    @cached_property
    def betas(self) -> np.ndarray:
        """(trials, voxels) float16 or float32, read-only."""
        stored = _map_h5(self.path / "betas.h5", "betas")[0]
        return stored.reshape(len(stored), -1)

    @cached_property
    def _store(self) -> ImageStore:
        return ImageStore(self.folder / "images.h5")

    @property
    def captions(self) -> pd.DataFrame | None:
        """Columns image and caption, or None."""
        return self._table("captions.parquet")

    @property
    def labels(self) -> pd.DataFrame | None:
        """Column image and one column for each kind of category, or None."""
        return self._table("labels.parquet")

    def categories(self, image_ids: Sequence[int] | np.ndarray, columns: str) -> np.ndarray:
        """Labels (n,) of images, from one or several columns of `labels` (names separated by
        commas; their values are joined by a space).

        Raises:
            PerceptError: there are no labels, or no such column.
        """
        table = self.labels
        known = [] if table is None else [str(name) for name in table.columns if name != "image"]
        wanted = [name.strip() for name in columns.split(",")]
        if table is None or (unknown := sorted(set(wanted) - set(known))):
            what = (
                f"labels have no column {', '.join(unknown)}: choose among {', '.join(known)}"
                if known
                else "images have no labels: leave this empty"
            )
            raise PerceptError(
                f"'{columns}' cannot be looked up in {self.folder.name}, whose {what}."
            )
        return (
            table.set_index("image")
            .loc[np.asarray(image_ids)][wanted]
            .astype(str)
            .agg(" ".join, axis=1)
            .to_numpy()
        )

    def _table(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return pd.read_parquet(path) if path.exists() else None

    @property
    def sessions(self) -> np.ndarray:
        """Sessions of all trials that are not excluded, ascending."""
        return np.unique(self.trials.loc[self.trials["split"] != "exclude", "session"].to_numpy())

    @property
    def all_images(self) -> np.ndarray:
        """Ids of all images of train, val and test, ascending, int64 (images,)."""
        return np.unique(self.trials.loc[self.trials["split"] != "exclude", "image"].to_numpy())

    @property
    def test_set(self) -> str:
        """Identity of the test set: number of images and a hash of their sorted ids, e.g.
        300-1a2b3c4d.
        """
        ids = self.image_ids("test")
        return f"{len(ids)}-{hashlib.sha256(','.join(map(str, ids)).encode()).hexdigest()[:8]}"

    def image_ids(self, split: str) -> np.ndarray:
        """Unique ids of the images of a split, or of several joined by "+", ascending, int64
        (images,).
        """
        return np.unique(self.trials.loc[self._within(split), "image"].to_numpy())

    def holding_out(self, clusters: pd.DataFrame) -> Subject:
        """This subject without the training and validation images of held-out clusters: their
        trials are excluded, the test set stays as it is, and the protocol ends in
        "+cluster-held-out".

        Args:
            clusters: from `image_clusters`: columns image, cluster, held_out.

        Raises:
            PerceptError: if no training image, or none of the validation images, is left.
        """
        held_out, made = clusters.loc[clusters["held_out"], "image"], copy.copy(self)
        gone = self._within("train+val") & self.trials["image"].isin(held_out)
        made.trials = self.trials.assign(split=self.trials["split"].mask(gone, "exclude"))
        made.clusters, made.protocol = clusters, f"{self.protocol}+cluster-held-out"
        for split in ("train", "val"):
            if len(self.image_ids(split)) and not len(made.image_ids(split)):
                raise PerceptError(
                    f"Without the held-out clusters no {split} image is left: ask for more clusters"
                    " (n_clusters)."
                )
        return made

    def held_out(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which images are in held-out clusters, bool (n,); none of them where no clusters are held
        out.

        Raises:
            PerceptError: for an image that is in no cluster.
        """
        ids = np.asarray(image_ids, np.int64)
        if self.clusters is None:
            return np.zeros(len(ids), bool)
        stored = self.clusters["image"].to_numpy()
        return self.clusters["held_out"].to_numpy()[
            _positions(stored, np.argsort(stored), ids, "the table of clusters")
        ]

    def columns_of(self, rois: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Voxels of a set of regions, by the Boolean columns of `voxels`.

        Args:
            rois: terms separated by commas, e.g. "V1v,V1d,hV4": a region; a published set of
                ROI_SETS ("set1"); "-" for all voxels; "!V1" for all but these, or, beside other
                terms, for those without these. A voxel of several regions counts once.

        Returns:
            Columns of the betas, ascending, int64 (selected,), and the terms that were found, in
            their order, sets as their regions.

        Raises:
            PerceptError: if none of the regions is there, or none of those to leave out, or no
                voxel is left.

        Warns:
            UserWarning: naming the regions that are not there, or have no voxel; the others are
                taken.
        """
        terms = dict.fromkeys(
            region
            for term in rois.split(",")
            if term.strip()
            for region in ROI_SETS.get(term.strip(), (term.strip(),))
        )
        known = [
            str(name)
            for name in self.voxels.select_dtypes("bool").columns
            if self.voxels[name].any()
        ]
        found, missing = (
            tuple(term for term in terms if (term.removeprefix("!") in [*known, "-"]) is there)
            for there in (True, False)
        )
        where = f"Subject {self.subj} of {self.folder.name}"
        out = [term[1:] for term in found if term.startswith("!")]
        taken = [term for term in found if not term.startswith("!")]
        asked = [
            any(term.startswith("!") is left_out for term in terms) for left_out in (False, True)
        ]
        if asked[0] > bool(taken) or asked[1] > bool(out) or not found:
            raise PerceptError(
                f"{where} has none of the regions '{rois}': it has"
                f" {', '.join(known) or 'no named region'}."
            )
        if missing:
            warnings.warn(
                f"{where} has no region {', '.join(term.removeprefix('!') for term in missing)}:"
                f" '{','.join(found)}' is what is taken.",
                stacklevel=2,
            )
        everything = not taken or "-" in taken
        chosen = (
            np.ones(len(self.voxels), bool)
            if everything
            else self.voxels[taken].any(axis=1).to_numpy()
        )
        columns = np.flatnonzero(
            chosen & ~self.voxels[out].any(axis=1).to_numpy() if out else chosen
        )
        if not len(columns):
            raise PerceptError(
                f"{where} has no voxel in '{rois}': every one of them is left out again."
            )
        return columns.astype(np.int64), found

    def bagged(self, share: float, seed: int) -> Subject:
        """This subject with a share of its training images, drawn by seed; the others of them
        become the validation images, and the prepared validation images are excluded, so that
        models with different bags have these and the test images in common, which none of them saw.

        Args:
            share: of the training images that stay, between 0 and 1; 1 leaves the subject as it is.
            seed: of the draw.

        Raises:
            PerceptError: for a share that leaves one side empty.

        Source: the 2023 ROI project, which splits all its images 70 / 30 by a seed a model.
        """
        ids, made = self.image_ids("train"), copy.copy(self)
        if share == 1.0:
            return made
        kept = round(share * len(ids))
        if not 0 < kept < len(ids):
            raise PerceptError(
                f"A share of {share} of {len(ids)} training images leaves nothing to train on or"
                " nothing to validate on: choose one between 0 and 1."
            )
        drawn = np.random.default_rng(seed).permutation(ids)[:kept]
        ours, theirs = self._within("train"), self._within("val")
        out_of_bag = ours & ~self.trials["image"].isin(drawn)
        made.trials = self.trials.assign(
            split=self.trials["split"].mask(theirs, "exclude").mask(out_of_bag, "val")
        )
        return made

    def limited(self, n_train: int, seed: int = 42) -> Subject:
        """This subject with at most n_train training images, drawn by seed; the trials of the
        others are excluded.

        Raises:
            PerceptError: for fewer than one image.
        """
        ids, made = self.image_ids("train"), copy.copy(self)
        if n_train < 1:
            raise PerceptError(f"n_train is {n_train}: keep at least 1 training image.")
        gone = self.trials["image"].isin(
            np.random.default_rng(seed).permutation(ids)[n_train:]
        ) & self._within("train")
        made.trials = self.trials.assign(split=self.trials["split"].mask(gone, "exclude"))
        return made

    def first_sessions(self, n: int) -> Subject:
        """This subject as its first n sessions alone would have trained it: the training and
        validation trials of later sessions are excluded, and with them images that were not shown
        before.

        The test set stays whole, with its protocol. A session counts if it has training trials.

        Args:
            n: number of sessions, in ascending order; 0 for all of them, which is the subject as it
                is.

        Raises:
            PerceptError: for fewer sessions than 0 or more than there are, or if no validation
                image is left.

        Source: MindEye2, arXiv 2403.11207, section 3.
        """
        theirs = np.unique(self.trials.loc[self._within("train"), "session"].to_numpy())
        where = f"Subject {self.subj} of {self.folder.name}"
        if not 0 <= n <= len(theirs):
            raise PerceptError(
                f"num_sessions is {n}, but {where} has {len(theirs)} sessions with training trials:"
                " choose at most that, or 0 for all."
            )
        if n == 0:
            return self
        made, later = (
            copy.copy(self),
            self._within("train+val") & ~self.trials["session"].isin(theirs[:n]),
        )
        made.trials = self.trials.assign(split=self.trials["split"].mask(later, "exclude"))
        if len(self.image_ids("val")) and not len(made.image_ids("val")):
            raise PerceptError(
                f"The first {n} of the {len(theirs)} sessions of {where} show no validation image:"
                " choose more (num_sessions)."
            )
        return made

    def width(self, normaliser: Normaliser | None = None) -> int:
        """Columns that `read` gives: voxels (those of a normaliser's regions, if it has some), or
        the components of a normaliser that has some.
        """
        return self.betas.shape[1] if normaliser is None else normaliser.width

    def _within(self, split: str) -> pd.Series:
        """Which trials (trials,) belong to a split, or to one of several joined by "+"."""
        parts = split.split("+")
        if unknown := set(parts) - set(SPLITS):
            raise PerceptError(
                f"There is no split {sorted(unknown)[0]!r}: choose one of {list(SPLITS)}."
            )
        return self.trials["split"].isin(parts)

    def images(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3)."""
        return self._store.rows(image_ids)

    def mean_image(self, split: str) -> np.ndarray:
        """Mean picture of a split, float64 (height, width, 3) in 0 to 255, about 500 images in
        memory at a time.
        """
        ids = self.image_ids(split)
        return np.mean(
            [self.images(part).mean(0) for part in np.array_split(ids, max(1, len(ids) // 500))], 0
        )

    def rows_by_image(self, split: str) -> list[np.ndarray]:
        """For each image of `image_ids(split)`, the rows of its trials in the order of their
        repeats.
        """
        ids = self.image_ids(split)
        table = self.trials[self._within(split)].sort_values(["image", "repeat"])
        if not len(table):
            raise PerceptError(
                f"Subject {self.subj} of {self.folder.name} has no trials in split {split}."
            )
        return np.split(table.index.to_numpy(), np.searchsorted(table["image"].to_numpy(), ids[1:]))

    def read(self, rows: np.ndarray, normaliser: Normaliser | None = None) -> np.ndarray:
        """Rows of betas as float32 (rows, voxels), normalised if asked; here and below (rows,
        components) for a normaliser that has some.

        Of a subject `with_neighbours` (rows, trials, voxels), zeros where there is no such trial.
        """
        if self.neighbours is None:
            return self._read(rows, normaliser)
        near = self.neighbours[rows]  # (rows, trials)
        betas = self._read(near.clip(0).ravel(), normaliser).reshape(*near.shape, -1)
        betas[near < 0] = 0
        return betas

    def _read(self, rows: np.ndarray, normaliser: Normaliser | None) -> np.ndarray:
        betas = _gather(self.betas, rows)
        return (
            betas.astype(np.float32)
            if normaliser is None
            else normaliser.apply(betas, self.trials["session"].to_numpy()[rows])
        )

    def with_neighbours(self, past: int, future: int) -> Subject:
        """This subject, each of whose trials is read together with those before and after it in its
        session (MindEye2's past and future tokens).

        Order: the trial itself, the `past` trials before it, the nearest first, then the `future`
        trials after it. A trial is shown none of a later split (train, val, test), so that no brain
        data of a test image is seen in training; excluded trials are shown to none.

        Args:
            past: trials before it.
            future: trials after it.

        Raises:
            PerceptError: for negative numbers.
        """
        if past < 0 or future < 0:
            raise PerceptError(
                f"seq_past is {past} and seq_future is {future}: give 0 or more trials."
            )
        made, trials = copy.copy(self), self.trials
        made.neighbours = None
        if past or future:
            row_of = {
                (s, t): row
                for row, (s, t) in enumerate(zip(trials["session"], trials["trial"], strict=True))
            }
            steps = [0, *(-k for k in range(1, past + 1)), *range(1, future + 1)]
            near = [
                [row_of.get((s, t + step), -1) for step in steps]
                for s, t in zip(trials["session"], trials["trial"], strict=True)
            ]
            made.neighbours = np.array(near)
            rank = (
                trials["split"]
                .map({"train": 0, "val": 1, "test": 2, "exclude": 3})
                .to_numpy(np.int64)
            )
            unseen = (rank[made.neighbours] > rank[:, None]) | (rank[made.neighbours] == 3)
            unseen[:, 0] = False
            made.neighbours[unseen] = -1
        return made

    def averaged(
        self, split: str, repeats: int | None = None, normaliser: Normaliser | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the first `repeats` repeats of each image (all when None); an image with fewer
        gives those it has, with a warning.

        Returns:
            voxels float32 (images, voxels) and image_ids (images,).
        """
        if repeats is not None and repeats < 1:
            raise PerceptError(f"repeats is {repeats}: average at least 1 repeat, or None for all.")
        rows, ids = self.rows_by_image(split), self.image_ids(split)
        fewer = sum(len(r) < (repeats or 1) for r in rows)
        if fewer:
            warnings.warn(
                f"{fewer} of {len(ids)} {split} images have fewer than {repeats} repeats; the mean"
                " is over those they have.",
                stacklevel=2,
            )
        parts = [
            self.mean_of([r[:repeats] for r in rows[start : start + 128]], normaliser)
            for start in range(0, len(ids), 128)
        ]
        return np.concatenate(parts), ids

    def mean_of(self, rows: list[np.ndarray], normaliser: Normaliser | None) -> np.ndarray:
        """Mean over each group of rows, float32 (groups, voxels)."""
        sizes = np.array([len(r) for r in rows])
        sums = np.add.reduceat(
            self.read(np.concatenate(rows), normaliser), np.cumsum(sizes) - sizes, axis=0
        )
        return sums / sizes.reshape(-1, *[1] * (sums.ndim - 1)).astype(np.float32)

    def trials_of(
        self, split: str, normaliser: Normaliser | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All single trials of a split in the order of the table: voxels float32 (trials, voxels),
        image_ids (trials,).
        """
        self.rows_by_image(split)  # refuses an empty split
        rows = np.flatnonzero((self.trials["split"] == split).to_numpy())
        voxels = np.concatenate(
            [self.read(rows[start : start + 512], normaliser) for start in range(0, len(rows), 512)]
        )
        return voxels, self.trials["image"].to_numpy()[rows]

    def noise_ceiling(self, repeats: int = 1, normaliser: Normaliser | None = None) -> pd.DataFrame:
        """How much of each voxel's variance is due to the image, from the repeats of training
        images (Allen et al. 2022, Nat.

        Neurosci.).

        Betas are z-scored (per session by default). The noise variance is the variance over the
        repeats of an image, pooled over images; what remains of the total variance is signal: ncsnr
        = signal sd / noise sd, rectified at 0. For the
            mean of n repeats the ceiling is
        ncsnr^2 / (ncsnr^2 + 1 / n).

        Returns:
            One row a voxel (of a normaliser's regions, if it has some): ncsnr, noise_ceiling
            (fraction of variance, for the mean of `repeats` repeats), noise_ceiling_percent.

        Raises:
            PerceptError: if no training image was shown twice, or the normaliser gives components
                in place of voxels.
        """
        if normaliser is not None and normaliser.components is not None:
            raise PerceptError(
                "A noise ceiling is of voxels, and this normaliser gives components: fit one with"
                " n_components=0."
            )
        if repeats < 1:
            raise PerceptError(
                f"repeats is {repeats}: a noise ceiling is for the mean of at least 1 repeat."
            )
        groups = [rows for rows in self.rows_by_image("train") if len(rows) > 1]
        if not groups:
            raise PerceptError(
                f"No training image of subject {self.subj} was shown twice, so its noise ceiling"
                " cannot be known."
            )
        signal, noise = self._variances(groups, normaliser or Normaliser.fit(self))
        with np.errstate(divide="ignore", invalid="ignore"):
            ncsnr = np.where(signal > 0, np.sqrt(signal / noise), 0.0)
            ceiling = np.where(signal > 0, signal / (signal + noise / repeats), 0.0)
        return pd.DataFrame(
            {"ncsnr": ncsnr, "noise_ceiling": ceiling, "noise_ceiling_percent": 100 * ceiling}
        )

    def _variances(
        self, groups: list[np.ndarray], normaliser: Normaliser
    ) -> tuple[np.ndarray, np.ndarray]:
        """Variance of signal and of noise of each voxel, float64 (voxels,)."""
        total, square, within = np.zeros((3, self.width(normaliser)))
        for start in range(0, len(groups), 64):
            chunk = groups[start : start + 64]
            sizes = np.array([len(r) for r in chunk])
            x = self.read(np.concatenate(chunk), normaliser).astype(np.float64)
            sums = np.add.reduceat(x, np.cumsum(sizes) - sizes, axis=0)
            total += x.sum(0)
            square += (x**2).sum(0)
            within += ((x - np.repeat(sums / sizes[:, None], sizes, axis=0)) ** 2).sum(0)
        n = sum(map(len, groups))
        noise = within / (n - len(groups))
        return np.maximum(square / n - (total / n) ** 2 - noise, 0.0), noise

    def verify(self) -> None:
        """Compare the betas with the checksum that was stored with them.

        Raises PerceptError if they differ.
        """
        digest = hashlib.blake2b(digest_size=16)
        for block in row_blocks(self.betas):
            digest.update(np.ascontiguousarray(block).data)
        if digest.hexdigest() != self.attributes["checksum"]:
            raise PerceptError(
                f"{self.path / 'betas.h5'} is not what was written (its checksum differs): prepare"
                " the data again."
            )


# -------------------------------------------------------------------------------- normalisation
class Normaliser:
    """z-score of each voxel with the mean and standard deviation of training trials, for each
    session or for all together; if asked, of the voxels of some regions alone, and followed by a
    projection on the first principal components of the training trials.

    It is given whole rows of betas whatever it selects, and stored with the model: each network
    finds its own voxels.

    Args:
        mean: float32 (sessions, selected), selected being all voxels unless `columns` says which.
        std: float32 (sessions, selected), 1 where a voxel is constant.
        sessions: int64 (sessions,), or None for one row that holds for every session.
        components: float32 (selected, components), which z-scored voxels are multiplied with, or
            None.
        columns: int64 (selected,), the voxels that are taken, or None for all.
        rois: names of the regions that these are of.
        n_voxels: voxels of the rows that `apply` is given; needed with `columns`.
        masked: `apply` gives all voxels, those that are not taken as 0, instead of the selected
            ones.
    """

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        sessions: np.ndarray | None,
        components: np.ndarray | None = None,
        columns: np.ndarray | None = None,
        rois: tuple[str, ...] = (),
        n_voxels: int = 0,
        masked: bool = False,
    ):
        self.mean, self.std, self.sessions, self.components = mean, std, sessions, components
        self.columns, self.rois, self.n_voxels, self.masked = (
            columns,
            rois,
            n_voxels or mean.shape[1],
            masked,
        )

    @property
    def width(self) -> int:
        """Columns that `apply` gives: voxels (the selected ones; all if masked) or components."""
        if self.masked:
            return self.n_voxels
        return self.mean.shape[1] if self.components is None else self.components.shape[1]

    @classmethod
    def fit(
        cls,
        subject: Subject,
        by_session: bool = True,
        n_components: int = 0,
        seed: int = 42,
        rois: str = "",
        masked: bool = False,
    ) -> Normaliser:
        """Fit on trials of split train only, in float64 (the components in float32).

        Args:
            subject: from `open_subject`.
            by_session: z-score each session by itself.
            n_components: number of principal components (of the selected voxels), 0 for the voxels
                themselves.
            seed: of the randomised search for components.
            rois: regions whose voxels are taken, as for `Subject.columns_of`, "" or "-" for all
                voxels.
            masked: keep all voxels, those of no such region as 0 (the published form of the ROI
                project), instead of the selected ones alone.

        Raises:
            PerceptError: for components of a masked selection, if there are fewer than two training
                trials, or fewer dimensions in them than components are asked for, or none of the
                regions.

        Warns:
            UserWarning: naming sessions with fewer than two training trials, which are z-scored
                with the training trials of all sessions; with the number of voxels that are
                constant in some session, which become 0. Also as `Subject.columns_of`.
        """
        if masked and n_components:
            raise PerceptError(
                "Components are made of the selected voxels: leave masked at False, or n_components"
                " at 0."
            )
        columns, found = subject.columns_of(rois) if rois.strip() not in ("", "-") else (None, ())
        trials = subject.trials
        train, session = (trials["split"] == "train").to_numpy(), trials["session"].to_numpy()
        if not train.any():
            raise PerceptError(
                f"Subject {subject.subj} of {subject.folder.name} has no training trials to fit a "
                "normaliser on."
            )
        sessions = subject.sessions if by_session else None
        if train.sum() < 2:
            raise PerceptError(
                f"Subject {subject.subj} of {subject.folder.name} has one training trial, too few"
                " for a z-score."
            )
        groups = (
            [np.flatnonzero(train)]
            if sessions is None
            else [np.flatnonzero(train & (session == s)) for s in sessions]
        )
        few = [i for i, rows in enumerate(groups) if len(rows) < 2]
        if (
            few and sessions is not None
        ):  # sessions of test trials alone, as in GOD: their own statistics would be the test set's
            warnings.warn(
                f"Sessions {sessions[few].tolist()[:10]} have fewer than two training trials: they"
                " are z-scored with all training trials.",
                stacklevel=2,
            )
            groups = [np.flatnonzero(train) if i in few else rows for i, rows in enumerate(groups)]
        moments = [_moments(subject.betas, rows, columns) for rows in groups]
        mean, std = (np.stack(values) for values in zip(*moments, strict=True))
        constant = std <= 1e-7 * np.abs(mean)
        if constant.any():
            warnings.warn(
                f"{int(constant.any(0).sum())} of {mean.shape[1]} voxels do not vary over the"
                " training trials of some session; they become 0.",
                stacklevel=2,
            )
        std[constant] = 1.0
        made = cls(
            mean.astype(np.float32),
            std.astype(np.float32),
            sessions,
            None,
            columns,
            found,
            subject.betas.shape[1],
            masked and columns is not None,
        )
        if n_components:
            made.components = _components(subject, made, n_components, seed)
        return made

    def apply(self, betas: np.ndarray, sessions: Sequence[int] | np.ndarray) -> np.ndarray:
        """z-score, and project where there are components.

        Args:
            betas: (trials, voxels), all of the subject's.
            sessions: (trials,) the session of each.

        Returns:
            float32 (trials, selected), (trials, components), or (trials, voxels) if masked.

        Raises:
            PerceptError: if the number of voxels is another one than that of the fit, or a session
                was not there.
        """
        betas, sessions = np.asarray(betas), np.asarray(sessions)
        if betas.ndim != 2 or betas.shape[1] != self.n_voxels or sessions.shape != betas.shape[:1]:
            raise PerceptError(
                f"The normaliser is for (trials, {self.n_voxels}) voxels, these are {betas.shape} "
                f"with {sessions.shape} sessions: "
                "they belong to another subject or another selection of voxels."
            )
        row = np.zeros(len(betas), np.int64)
        if self.sessions is not None:
            row = np.searchsorted(self.sessions, sessions).clip(max=len(self.sessions) - 1)
            unseen = sessions[self.sessions[row] != sessions]
            if len(unseen):
                raise PerceptError(
                    f"The normaliser was fitted without session {unseen[0]}: fit it again with "
                    "by_session=False."
                )
        out = (
            betas.astype(np.float32)
            if self.columns is None
            else betas[:, self.columns].astype(np.float32)
        )
        for r in np.unique(row):  # one session after the other: no copy of mean and std a trial
            mine = row == r
            out[mine] = (out[mine] - self.mean[r]) / self.std[r]
        if self.masked:
            whole = np.zeros((len(out), self.n_voxels), np.float32)
            whole[:, self.columns] = out
            return whole
        return out if self.components is None else out @ self.components

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"mean": self.mean, "std": self.std}
        if self.sessions is not None:
            tensors["sessions"] = np.asarray(self.sessions, np.int64)
        if self.components is not None:
            tensors["components"] = np.ascontiguousarray(self.components)
        if self.columns is not None:
            tensors["columns"] = np.asarray(self.columns, np.int64)
        with atomic(path) as temporary:
            told = {
                "rois": ",".join(self.rois),
                "n_voxels": str(self.n_voxels),
                "masked": "yes" if self.masked else "",
            }
            save_file(tensors, temporary, metadata=told)

    @classmethod
    def beside(cls, path: str | Path) -> Normaliser | None:
        """The normaliser that a decoder was trained with, from the folder of its file or the one
        above (train_logs/<run>/low_level/last.safetensors); None for a released file (.pth), which
        is for betas as they are.

        Raises PerceptError as `load`.
        """
        if Path(path).suffix == ".pth":
            return None
        near = [folder / "normaliser.safetensors" for folder in Path(path).parents[:2]]
        return cls.load(next((file for file in near if file.exists()), near[-1]))

    @classmethod
    def load(cls, path: str | Path) -> Normaliser:
        """Read a file of `save`. Raises PerceptError if it is missing or something else."""
        if not Path(path).exists():
            raise PerceptError(
                f"The normaliser {path} is missing: run the training notebook of this run first."
            )
        try:
            with safe_open(path, framework="np") as file:
                # noqa: SIM118 (the file is no dict)
                tensors, told = (
                    {key: file.get_tensor(key) for key in file.keys()},
                    file.metadata() or {},
                )
        except SafetensorError as error:
            raise PerceptError(
                f"{path} is no safetensors file ({error}): run the training notebook of this run"
                " again."
            ) from error
        if not {"mean", "std"} <= set(tensors):
            raise PerceptError(
                f"{path} holds {sorted(tensors)}, not the mean and std of a normaliser."
            )
        rois = tuple(name for name in told.get("rois", "").split(",") if name)
        sessions, components, columns = (
            tensors.get(name) for name in ("sessions", "components", "columns")
        )
        return cls(
            tensors["mean"],
            tensors["std"],
            sessions,
            components,
            columns,
            rois,
            int(told.get("n_voxels", 0)),
            bool(told.get("masked")),
        )


def _moments(
    betas: np.ndarray, rows: np.ndarray, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (of the population) over rows, float64 (voxels,), in blocks and
    shifted by the first row; of some columns where they are given.
    """
    chosen = slice(None) if columns is None else columns
    shift = betas[rows[0]][chosen].astype(np.float64)
    total, square = np.zeros_like(shift), np.zeros_like(shift)
    for start in range(0, len(rows), 256):
        x = betas[rows[start : start + 256]][:, chosen].astype(np.float64) - shift
        total += x.sum(0)
        square += np.einsum("tv,tv->v", x, x)
    mean = total / len(rows)
    return shift + mean, np.sqrt(np.maximum(square / len(rows) - mean**2, 0.0))


def _components(subject: Subject, zscore: Normaliser, n_components: int, seed: int) -> np.ndarray:
    """First principal components of the z-scored training trials, each divided by its standard
    deviation over them, float32 (voxels, components).

    All training trials are held once, in float32. Their mean is 0 already. The search is that of
    Halko, Martinsson & Tropp 2011, with so many iterations that the variance kept is the most there
    is also where the spectrum falls slowly (tests/test_data.py).
    """
    size = (int((subject.trials["split"] == "train").sum()), zscore.width)
    if not 1 <= n_components <= min(size):
        raise PerceptError(
            f"n_components is {n_components}: choose 0 for all voxels, or at most {min(size)}, as"
            f" there are {size} (training trials, voxels)."
        )
    z, _ = subject.trials_of("train", zscore)
    _, _, axes = randomized_svd(
        z, n_components, n_oversamples=n_components + 10, n_iter=10, random_state=seed
    )  # axes (components, voxels)
    spread = (z @ axes.T).std(0, dtype=np.float64)
    if empty := int((spread <= 1e-4 * spread.max()).sum()):
        raise PerceptError(
            f"n_components is {n_components}, but the training trials vary in"
            f" {n_components - empty} dimensions only: choose at most that."
        )
    return np.ascontiguousarray((axes / spread[:, None]).T.astype(np.float32))


# ------------------------------------------------------------------------------ clusters of images
def image_clusters(
    subject: Subject,
    features: np.ndarray,
    made_by: dict[str, Any],
    n_clusters: int = 20,
    seed: int = 42,
) -> pd.DataFrame:
    """Clusters of a subject's images, a quarter of which is held out; found once and stored as
    data/<dataset>/clusters-<hash>.parquet.

    k-means of the features divided by their length. Of 2000 random quarters of the clusters that
    one is held out which holds most nearly a quarter of the test images and a quarter of the
    training images. Source: Shirakawa et al. 2024, arXiv 2405.10078.

    Args:
        subject: with all its images.
        features: (images, dim), in the order of `subject.all_images`.
        made_by: fingerprint of the model that made them. Other features, images or settings are
            another file.
        n_clusters: number of clusters, at least 4.
        seed: of k-means and of the choice.

    Returns:
        One row an image, ascending: image, cluster (0 to n_clusters - 1), held_out (bool). Its
            `attrs` say how it was made.

    Raises:
        PerceptError: for features of another length, fewer images than clusters, or clusters of
            which no quarter holds test images and leaves some.
    """
    ids, test = subject.all_images, subject.image_ids("test")
    if len(features) != len(ids) or not 4 <= n_clusters <= len(ids):
        raise PerceptError(
            f"{len(features)} features of {len(ids)} images for {n_clusters} clusters: give one an"
            " image, and choose 4 clusters to one an image."
        )
    store = subject._store
    shown = hashlib.sha256(np.stack([ids, store.crc[store.positions(ids)]]).tobytes()).hexdigest()[
        :16
    ]
    meta = json.loads(
        json.dumps(
            {
                "fingerprint": made_by,
                "images": shown,
                "test_set": subject.test_set,
                "n_clusters": n_clusters,
                "seed": seed,
            },
            default=str,
        )
    )
    path = subject.folder / f"clusters-{_key(meta)}.parquet"
    with open(subject.folder / ".clusters.lock", "w") as lock, disk_errors(subject.folder):
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that ask at once take turns
        if not path.exists():
            unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            cluster = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(
                unit.astype(np.float32)
            )
            held = _quarter(
                cluster,
                np.isin(ids, test),
                np.isin(ids, subject.image_ids("train")),
                n_clusters,
                seed,
            )
            table = pd.DataFrame(
                {
                    "image": ids,
                    "cluster": cluster.astype(np.int64),
                    "held_out": np.isin(cluster, held),
                }
            )
            table.attrs = meta
            with atomic(path) as temporary:
                table.to_parquet(temporary)
    return pd.read_parquet(path)


def _quarter(
    cluster: np.ndarray, test: np.ndarray, train: np.ndarray, n_clusters: int, seed: int
) -> np.ndarray:
    """A quarter of the clusters with about a quarter of the images.

    Args:
        cluster: (images,) cluster of each.
        test, train: bool (images,).
        n_clusters: number of clusters.
        seed: of the quarters that are tried.
    """
    counts = np.stack(
        [np.bincount(cluster[part], minlength=n_clusters) for part in (test, train)]
    )  # (test and train, clusters)
    rng, best = np.random.default_rng(seed), (np.inf, np.empty(0, np.int64))
    for _ in range(2000):
        chosen = np.sort(rng.permutation(n_clusters)[: round(HELD_OUT * n_clusters)])
        inside = counts[:, chosen].sum(1)
        if (inside > 0).all() and (inside < counts.sum(1)).all():
            miss = float(np.abs(inside / counts.sum(1) - HELD_OUT).sum())
            best = min(best, (miss, chosen), key=lambda each: each[0])
    if not len(best[1]):
        raise PerceptError(
            f"No quarter of the {n_clusters} clusters holds test and training images and leaves"
            " some: ask for more clusters (n_clusters)."
        )
    return best[1]


def select_images(
    subject: Subject,
    split: str,
    logs: str | Path,
    encoder: Callable[[], Any],
    n_clusters: int = 20,
    num_sessions: int = 0,
) -> Subject:
    """The subject with the images that a training may see, written down in the run's folder for
    `open_split`.

    Args:
        subject: from `open_subject`.
        split: "images" (all of them), or "cluster-held-out" (no training or validation image of a
            quarter of the clusters).
        logs: folder of the run, train_logs/<run>/; receives clusters.parquet where clusters are
            held out, and loses it where they are not; sessions.json likewise, where the first
            sessions alone are used.
        encoder: gives the frozen model whose features are clustered, as `pretrained.Clipper`; not
            called for "images".
        n_clusters: as for `image_clusters`. Clusters are of the images of all sessions, so that
            they are the same however many are used.
        num_sessions: the first so many sessions, as for `Subject.first_sessions`, 0 for all.

    Raises:
        PerceptError: for an unknown split, and as `image_clusters`, `Subject.holding_out` and
            `Subject.first_sessions`.
    """
    if split not in ("images", "cluster-held-out"):
        raise PerceptError(f"split is {split!r}: choose one of images, cluster-held-out.")
    limited = subject.first_sessions(num_sessions)  # refuses before anything is written
    if split == "images":
        (Path(logs) / CLUSTERS).unlink(missing_ok=True)
    else:
        limited = _without_clusters(subject, logs, encoder(), n_clusters).first_sessions(
            num_sessions
        )
    if num_sessions:
        write_json(Path(logs) / SESSIONS, {"num_sessions": num_sessions})
    else:
        (Path(logs) / SESSIONS).unlink(missing_ok=True)
    return limited


def _without_clusters(subject: Subject, logs: str | Path, model: Any, n_clusters: int) -> Subject:
    """The subject without a quarter of its clusters, which are written down."""
    ids, made_by = subject.all_images, model.fingerprint()
    targets = cached_targets(
        subject.folder, "clip_tokens", made_by, ids, model.encode_pixels, model.target_shape
    )
    clusters = image_clusters(
        subject, targets.rows(ids).reshape(len(ids), -1).astype(np.float32), made_by, n_clusters
    )
    made = subject.holding_out(clusters)
    with atomic(Path(logs) / CLUSTERS) as temporary:
        clusters.to_parquet(temporary)
    return made


def open_split(dataset: str | Path, subj: int, logs: str | Path) -> Subject:
    """Open a prepared subject as the training of a run saw it: `open_subject`, less what
    `select_images` has written down in `logs`.

    Args:
        dataset, subj: as for `open_subject`.
        logs: folder of the run, train_logs/<run>/.

    Raises:
        PerceptError: as `open_subject`, or if there is no such folder, or if the clusters are of
            other test images than the subject has, or it has fewer sessions.
    """
    subject, record, told = (
        open_subject(dataset, subj),
        Path(logs) / CLUSTERS,
        Path(logs) / SESSIONS,
    )
    if not record.parent.is_dir():
        raise PerceptError(
            f"There is no run at {record.parent}: give the folder of a run under train_logs/."
        )
    num_sessions = int(read_json(told)["num_sessions"]) if told.exists() else 0
    if not record.exists():
        return subject.first_sessions(num_sessions)
    clusters = pd.read_parquet(record)
    if clusters.attrs.get("test_set") != subject.test_set:
        raise PerceptError(
            f"{record} is of other test images than {subject.folder.name} has now: run the training"
            " notebook of this run again."
        )
    return subject.holding_out(clusters).first_sessions(num_sessions)


def open_pictures(dataset: str | Path, subj: int, subject: Subject) -> Subject:
    """The subject whose pictures teach what needs no brain: with those of all sessions, however few
    of them the decoder saw; clusters held out of training stay out.

    Args:
        dataset, subj: as for `open_subject`.
        subject: of `open_split`.
    """
    return subject if subject.clusters is not None else open_subject(dataset, subj)


# -------------------------------------------------------------------------------- torch dataset
def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): uint64 -> well mixed uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _hashed(seed: int, epoch: int, image_ids: np.ndarray) -> np.ndarray:
    """Well mixed uint64 (batch,), a pure function of (seed, epoch, image)."""
    state = np.zeros(1, np.uint64)
    for value in (seed, epoch):
        state = _mix(state + np.uint64(value % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(
        _mix(state + np.asarray(image_ids).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    )


def choose_repeats(seed: int, epoch: int, image_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A repeat for each image, uniform over 0..count-1 and a pure function of (seed, epoch, image).

    Args:
        seed, epoch: integers.
        image_ids: (batch,) ids.
        counts: (batch,) number of repeats of each.

    Returns:
        int64 (batch,).
    """
    return (_hashed(seed, epoch, image_ids) % np.asarray(counts).astype(np.uint64)).astype(np.int64)


class BrainDataset(Dataset):
    """Map-style dataset over the images of a split.

    Item i is image `image_ids[i]`, or with repeats="each" a trial of it. `__getitems__` reads a
    whole batch at once: {"voxels": float32 (batch, voxels), or (batch, repeats, voxels) for
    repeats="all"; "image": int64 (batch,); "seed": int64 (batch,), for whatever a step draws for a
    sample, a pure function of (seed, epoch, image); "pixels": uint8 (batch, 3, height, width), with
    pixels=True; each target: float32 (batch, ...)}. In a DataLoader pass `collate_fn=lambda batch:
    batch`.

    Args:
        subject: from `open_subject`.
        split: train, val or test, or several joined by "+".
        targets: for each name what `cached_targets` or `cached_views` gives, or an array whose rows
            are in the order of the samples, `dataset.image_ids`.
        normaliser: fitted on training trials, or None for the betas as they are.
        repeats: "random" (one, chosen by seed, epoch and image), "batch" (the published way: one
            number of repeat for all images of a batch), "mean", "all" (images with fewer than the
            most repeats start over), or "each" (every trial is a sample by itself, with the image
            that it shows).
        seed: of everything random.
        pixels: also read the images themselves.

    Raises:
        PerceptError: for an unknown option, an empty split, or targets of another length.
    """

    def __init__(
        self,
        subject: Subject,
        split: str,
        targets: dict[str, Any] | None = None,
        normaliser: Normaliser | None = None,
        repeats: str = "random",
        seed: int = 42,
        pixels: bool = False,
    ):
        if repeats not in REPEATS:
            raise PerceptError(f"repeats is {repeats!r}: choose one of {list(REPEATS)}.")
        self.subject, self.split, self.normaliser, self.repeats = (
            subject,
            split,
            normaliser,
            repeats,
        )
        self.pixels = pixels
        self.seed, self.epoch, self.targets = seed, 0, dict(targets or {})
        self._rows, self.image_ids = subject.rows_by_image(split), subject.image_ids(split)
        if repeats == "each":
            self.image_ids = np.repeat(self.image_ids, [len(rows) for rows in self._rows])
            self._rows = [row[None] for rows in self._rows for row in rows]
        self.counts = np.array([len(rows) for rows in self._rows])
        self._table = np.stack(
            [np.resize(rows, self.counts.max()) for rows in self._rows]
        )  # (images, repeats), cycled
        for name, target in self.targets.items():
            if name in ("voxels", "image", "seed", "pixels"):
                raise PerceptError(f"A target cannot be called {name}: the batch has that already.")
            if hasattr(target, "check"):
                target.check(self.image_ids)
            elif len(target) != len(self):
                raise PerceptError(
                    f"Target {name} has {len(target)} rows for the {len(self)} images of split"
                    f" {split}."
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw other repeats, views and seeds from now on."""
        self.epoch = int(epoch)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch of images by their positions in the split."""
        at = np.asarray(indices, dtype=np.int64)
        ids = self.image_ids[at]
        seeds = (_hashed(self.seed + 1, self.epoch, ids) >> np.uint64(1)).astype(np.int64)
        batch = {
            "voxels": torch.from_numpy(self._voxels(at)),
            "image": torch.from_numpy(ids),
            "seed": torch.from_numpy(seeds),
        }
        if self.pixels:
            batch["pixels"] = torch.from_numpy(self.subject.images(ids)).permute(0, 3, 1, 2)
        for name, target in self.targets.items():
            if isinstance(target, Views):
                rows = target.rows(ids, self.seed, self.epoch)
            else:
                rows = target.rows(ids) if hasattr(target, "rows") else target[at]
            batch[name] = torch.as_tensor(np.asarray(rows, dtype=np.float32))
        return batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One image, without the batch axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def _voxels(self, at: np.ndarray) -> np.ndarray:
        if self.repeats == "mean":
            return self.subject.mean_of([self._rows[i] for i in at], self.normaliser)
        if self.repeats == "all":
            rows = self._table[at]  # (batch, repeats)
            read = self.subject.read(rows.ravel(), self.normaliser)
            return read.reshape(*rows.shape, *read.shape[1:])
        ids = (
            self.image_ids[at]
            if self.repeats == "random"
            else np.full(len(at), self.image_ids[at[0]])
        )
        chosen = choose_repeats(self.seed, self.epoch, ids, self.counts[at])
        return self.subject.read(self._table[at, chosen], self.normaliser)


# -------------------------------------------------------------------------------- cached targets
class Targets:
    """Frozen targets of images, memory-mapped. Made by `cached_targets`.

    Attributes:
        folder: where they are stored.
        image_ids: int64 (images,), ascending.
        shape: shape of one target.
        dtype: as stored.
    """

    def __init__(self, folder: Path, store: ImageStore):
        meta = read_json(folder / "meta.json")
        self.folder, self.shape, self.dtype = folder, tuple(meta["shape"]), np.dtype(meta["dtype"])
        self.parts = sorted(folder.glob("part-???.npy"))
        place: dict[
            int, tuple[int, int]
        ] = {}  # image -> (part, row); a later part, made from newer pixels, wins
        crc = dict(zip(store.image_ids.tolist(), store.crc.tolist(), strict=True))
        for number, part in enumerate(self.parts):
            for row, (image, pixels) in enumerate(
                np.load(_ids_file(part), allow_pickle=False).tolist()
            ):
                if crc.get(image) == pixels:
                    place[image] = (number, row)
        self.image_ids = np.array(sorted(place), dtype=np.int64)
        self._place = np.array([place[i] for i in self.image_ids.tolist()], dtype=np.int64).reshape(
            -1, 2
        )
        self._order = np.arange(len(self.image_ids))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_maps"}

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(part, mmap_mode="r", allow_pickle=False) for part in self.parts]

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if the target of one of these images is missing."""
        missing = np.setdiff1d(image_ids, self.image_ids)
        if len(missing):
            raise PerceptError(
                f"{self.folder} lacks the targets of {len(missing)} images, the first is"
                f" {missing[0]}: make them with cached_targets."
            )

    def rows(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Targets by image id, (n, *shape) in the stored dtype.

        Raises PerceptError for an image without one.
        """
        self.check(image_ids)
        place = self._place[_positions(self.image_ids, self._order, image_ids, str(self.folder))]
        out = np.empty((len(place), *self.shape), self.dtype)
        for number in np.unique(place[:, 0]):
            mine = place[:, 0] == number
            out[mine] = _gather(self._maps[number], place[mine, 1])
        return out


class LatentFile:
    """Latents of images that somebody else computed, a row an image, memory-mapped: `fMRI_VAE.npy`
    of the course's NSD subset, for instance.

    Args:
        path: .npy of floats (images, channels, h, w) or (images, 1, channels, h, w), already
            scaled; row i is of the image with id i.
        shape: (channels, h, w) that is expected.

    Raises:
        PerceptError: if the file is missing, is no such array, or is of latents of another shape.
    """

    def __init__(self, path: str | Path, shape: tuple[int, ...]):
        self.path, self.shape = Path(path), tuple(shape)
        try:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise PerceptError(
                f"{path} is no array of latents that can be read ({error}): give the .npy file, or"
                " leave latents_file empty."
            ) from None
        if self._array.dtype.kind != "f" or self._array.shape[1:] not in (
            self.shape,
            (1, *self.shape),
        ):
            expected = f"floats (images, {', '.join(map(str, self.shape))})"
            raise PerceptError(
                f"{path} holds {self._array.dtype} {self._array.shape}, not {expected}: it is of"
                " another autoencoder or of something else."
            )

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if the latent of one of these images is missing."""
        beyond = np.asarray(image_ids)[
            (np.asarray(image_ids) < 0) | (np.asarray(image_ids) >= len(self._array))
        ]
        if len(beyond):
            raise PerceptError(
                f"{self.path} has {len(self._array)} rows, none for image {beyond[0]}: its rows"
                " have to be the images 0, 1, 2 and so on."
            )

    def rows(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Latents by image id, (n, channels, h, w)."""
        self.check(image_ids)
        return np.asarray(self._array[np.asarray(image_ids, np.int64)]).reshape(-1, *self.shape)


class Views:
    """Several versions of every image's target, of which an epoch shows one.

    Made by `cached_views`.

    Attributes:
        versions: one `Targets` a version.
    """

    def __init__(self, versions: Sequence[Targets]):
        self.versions = list(versions)

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if a version of one of these images is missing."""
        for targets in self.versions:
            targets.check(image_ids)

    def rows(self, image_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Of each image the version that (seed, epoch, image) choose, (n, *shape) in the stored
        dtype.
        """
        chosen = choose_repeats(
            seed + 2, epoch, image_ids, np.full(len(image_ids), len(self.versions))
        )
        first = self.versions[0]
        out = np.empty((len(image_ids), *first.shape), first.dtype)
        for number in np.unique(chosen):
            mine = chosen == number
            out[mine] = self.versions[number].rows(np.asarray(image_ids)[mine])
        return out


def _ids_file(part: Path) -> Path:
    return part.with_suffix(".ids")


def cached_targets(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Sequence[int] | np.ndarray,
    encode: Callable[[np.ndarray], np.ndarray],
    shape: Sequence[int],
    dtype: str = "float16",
    batch_size: int = 64,
) -> Targets:
    """Targets of a frozen model, computed once for each image and stored under
    data/<dataset>/targets/<name>-<hash>/.

    An interrupted run goes on where it stopped; images asked for later, or whose pixels have
    changed since, are added as a further part. Processes that ask at once take turns: the first
    computes, the others find the result.

    Args:
        dataset: as for `open_subject`.
        name: what the targets are, e.g. clip_tokens.
        fingerprint: all that they depend on (model, revision, options, versions), as JSON values;
            another fingerprint is another folder.
        image_ids: (n,) images whose targets are needed.
        encode: uint8 images (batch, height, width, 3) -> (batch, *shape).
        shape: shape of one target.
        dtype: dtype on disk.
        batch_size: images given to `encode` at once.

    Raises:
        PerceptError: for an unknown image, an `encode` that gives another shape or numbers that are
            not finite in `dtype`, or a full disk.
    """
    store = ImageStore(dataset_folder(dataset) / "images.h5")
    meta = json.loads(
        json.dumps(
            {"name": name, "fingerprint": fingerprint, "shape": list(shape), "dtype": dtype},
            default=str,
        )
    )
    folder = dataset_folder(dataset) / "targets" / f"{name}-{_key(meta)}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, disk_errors(folder):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "meta.json").exists():
            write_json(folder / "meta.json", meta)
        _check_meta(read_json(folder / "meta.json"), meta, folder)
        targets = Targets(folder, store)
        missing = np.setdiff1d(image_ids, targets.image_ids)
        if len(missing):
            _add_part(
                folder, store, missing, encode, (len(missing), *shape), np.dtype(dtype), batch_size
            )
            targets = Targets(folder, store)
    return targets


def _key(meta: dict[str, Any]) -> str:
    """Name of a fingerprint without its golden features, whose last digits differ between devices."""
    fingerprint = {name: value for name, value in meta["fingerprint"].items() if name != "golden"}
    return hashlib.sha256(
        json.dumps(meta | {"fingerprint": fingerprint}, sort_keys=True).encode()
    ).hexdigest()[:12]


def _check_meta(stored: dict[str, Any], meta: dict[str, Any], folder: Path) -> None:
    """Refuse targets of another fingerprint, or of a model that gave other features than it gives
    now.
    """
    if _key(stored) != _key(meta):
        raise PerceptError(
            f"{folder} was made with another fingerprint than its name says: delete it."
        )
    if not same_features(*(each["fingerprint"].get("golden", []) for each in (stored, meta))):
        raise PerceptError(
            f"{folder} was made by a model that no longer gives the same features: delete it, so"
            " that the targets are made again."
        )


def cached_views(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Sequence[int] | np.ndarray,
    encode: Callable[[np.ndarray, int], np.ndarray],
    shape: Sequence[int],
    views: int,
    **options: Any,
) -> Views:
    """Targets of augmented images: `views` versions of each, computed once.

    Args:
        dataset, name, fingerprint, image_ids, shape, options: as for `cached_targets`; the
            fingerprint says how images are augmented.
        encode: (uint8 images (batch, height, width, 3), seed) -> (batch, *shape); the seed is that
            of the version and of the pixels, so that a version is made again as it was.
        views: number of versions.
    """

    def version(number: int) -> Targets:
        def one(images: np.ndarray) -> np.ndarray:
            return encode(images, zlib.crc32(images.tobytes(), number))

        return cached_targets(
            dataset, name, fingerprint | {"version": number}, image_ids, one, shape, **options
        )

    if views < 1:
        raise PerceptError(
            f"{views} views of the targets {name} were asked for: choose at least 1."
        )
    return Views([version(number) for number in range(views)])


def _add_part(
    folder: Path,
    store: ImageStore,
    ids: np.ndarray,
    encode: Callable,
    shape: tuple[int, ...],
    dtype: np.dtype,
    batch_size: int,
) -> None:
    """Compute and store the targets of `ids` as the next part, going on with an interrupted one."""
    known = np.stack(
        [ids, store.crc[store.positions(ids)]], axis=1
    )  # (images, 2): id and CRC of the pixels
    part = folder / f"part-{len(list(folder.glob('part-???.npy'))):03d}.npy"
    partial, state = part.with_suffix(".partial"), folder / "progress.json"
    key, done = hashlib.sha256(known.tobytes()).hexdigest(), 0
    if partial.exists() and state.exists() and read_json(state)["key"] == key:
        done = read_json(state)["done"]
    else:
        check_space(folder, int(np.prod(shape)) * dtype.itemsize)
    array = np.lib.format.open_memmap(
        partial, "r+" if done else "w+", None if done else dtype, None if done else shape
    )
    starts, saved = range(done, len(ids), batch_size), done
    for start in progress(starts, f"targets {folder.name}", len(starts)):
        batch = ids[start : start + batch_size]
        array[start : start + len(batch)] = _encoded(
            encode, store.rows(batch), batch, shape[1:], dtype
        )
        if start + len(batch) - saved >= 8 * batch_size:
            array.flush()
            saved = start + len(batch)
            write_json(state, {"key": key, "done": saved})
    array.flush()
    with atomic(_ids_file(part)) as temporary, open(temporary, "wb") as file:
        np.save(file, known, allow_pickle=False)
    os.replace(partial, part)
    state.unlink(missing_ok=True)


def _encoded(
    encode: Callable, images: np.ndarray, ids: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """What `encode` gives, checked, in the dtype to be stored."""
    rows = np.asarray(encode(images))
    if rows.shape != (len(ids), *shape):
        raise PerceptError(
            f"The targets of {len(ids)} images have shape {rows.shape}, {(len(ids), *shape)} was"
            " announced."
        )
    with np.errstate(over="ignore"):
        rows = rows.astype(dtype)
    good = np.isfinite(rows.reshape(len(rows), -1)).all(1)
    if not good.all():
        raise PerceptError(
            f"The target of image {ids[~good][0]} is not finite in {dtype}: encode in float32, or"
            " store it with dtype='float32'."
        )
    return rows
