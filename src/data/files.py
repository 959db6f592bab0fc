"""Writing large arrays: disk space, atomic replacement, blocks of rows, memory maps of HDF5 files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from src.utils import PerceptError

BLOCK_BYTES = 64 << 20  # rows are read, checked and written in blocks of about this size

SPARE_BYTES = 32 << 20  # space that must remain on the disk after a write


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
def replace_folder(folder: Path) -> Iterator[Path]:
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


def iterate_row_blocks(rows: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """An array (rows, ...) in blocks of about 64 MB; an iterable of blocks passes through."""
    if not isinstance(rows, np.ndarray):
        yield from rows
        return
    step = max(1, BLOCK_BYTES // max(1, int(np.prod(rows.shape[1:])) * rows.itemsize))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def write_rows(
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


def memory_map_h5(path: Path, name: str) -> tuple[np.memmap, dict[str, Any]]:
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


def find_rows(
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


def gather_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a memory-mapped array in the order asked for, read in the order of the file."""
    order = np.argsort(rows, kind="stable")
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    taken[order] = array[rows[order]]
    return taken
