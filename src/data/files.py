"""Large arrays on disk: space, blocks of rows, memory maps of HDF5 files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from src.utils import PerceptError

BLOCK_BYTES = 64 << 20  # rows are read, checked and written in blocks of about this size

SPARE_BYTES = 32 << 20  # space that must remain on the disk after a write

Ids = Sequence[int] | np.ndarray

BlockCheck = Callable[[np.ndarray, int], np.ndarray]


def check_space(folder: Path, n_bytes: int) -> None:
    """Refuse to begin a write that the disk of `folder` cannot hold.

    Args:
        folder: where the file will lie.
        n_bytes: size of the write.

    Raises:
        PerceptError: with the space needed and the space there is.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes + SPARE_BYTES > free:
        raise PerceptError(
            f"No space for {n_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: "
            "free some, or set PERCEPT_HOME to a folder on a larger disk."
        )


def iterate_row_blocks(rows: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Iterate over an array (rows, ...) in blocks of about 64 MB.

    An iterable of blocks passes through.
    """
    if not isinstance(rows, np.ndarray):
        yield from rows
        return
    row_bytes = int(np.prod(rows.shape[1:])) * rows.itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def write_rows(
    path: Path, name: str, blocks: Iterable[np.ndarray], n_rows: int, check_block: BlockCheck
) -> tuple[int, ...]:
    """Write blocks of rows as one contiguous dataset of a new HDF5 file.

    Args:
        path: the file.
        name: of the dataset.
        blocks: arrays (rows, ...).
        n_rows: number of all rows.
        check_block: is given a block and the number of its first row; checks the block and returns
            it in the dtype to be stored.

    Returns:
        Shape of the dataset.

    Raises:
        PerceptError: for blocks of unlike shapes or dtypes, another number of rows, or a full disk.
    """
    n_written = 0
    with h5py.File(path, "w") as file:
        for raw in blocks:
            block = np.ascontiguousarray(check_block(np.asarray(raw), n_written))
            row_shape, stop = block.shape[1:], n_written + len(block)
            if name not in file:
                check_space(path.parent, n_rows * int(np.prod(row_shape)) * block.itemsize)
                file.create_dataset(name, (n_rows, *row_shape), block.dtype)
            dataset = file[name]
            if (row_shape, block.dtype) != (dataset.shape[1:], dataset.dtype):
                raise PerceptError(
                    f"Row {n_written} of {name} is {block.dtype} {row_shape}, the rows before"
                    f" it are {dataset.dtype} {dataset.shape[1:]}: all rows must be alike."
                )
            if stop > n_rows:
                raise PerceptError(
                    f"There are more than the {n_rows} rows of {name} that were announced: check"
                    " the table against the array."
                )
            dataset[n_written:stop] = block
            n_written = stop
        if n_written != n_rows:
            raise PerceptError(
                f"There are {n_written} rows of {name} where {n_rows} were announced: check the"
                " table against the array."
            )
        if name not in file:
            raise PerceptError(f"There is not one row of {name}: nothing to write.")
        return tuple(file[name].shape)


def memory_map_h5(path: Path, name: str) -> tuple[np.memmap, dict[str, Any]]:
    """Memory-map a contiguous dataset of an HDF5 file, read-only.

    Returns:
        The array and its attributes.

    Raises:
        PerceptError: if the file is damaged, or the dataset is missing or not contiguous.
    """
    try:
        with h5py.File(path, "r") as file:
            if name not in file:
                raise PerceptError(f"{path} has no dataset {name}: prepare the data again.")
            stored = file[name]
            shape, dtype, offset = stored.shape, stored.dtype, stored.id.get_offset()
            attributes = {key: _to_python(value) for key, value in stored.attrs.items()}
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


def _to_python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def find_rows(stored_ids: np.ndarray, order: np.ndarray, ids: Ids, origin: str) -> np.ndarray:
    """Find the rows at which images are stored.

    Args:
        stored_ids: (rows,) id of the image in each row.
        order: (rows,) that sorts them.
        ids: (n,) ids of the images to find.
        origin: what the rows are of, for the message.

    Returns:
        int64 (n,) rows.

    Raises:
        PerceptError: for an image that is not stored.
    """
    ids = np.atleast_1d(np.asarray(ids, dtype=np.int64))
    positions = np.searchsorted(stored_ids, ids, sorter=order)
    rows: np.ndarray = order[positions.clip(max=len(stored_ids) - 1)]
    absent = ids[stored_ids[rows] != ids]
    if len(absent):
        raise PerceptError(
            f"Image {absent[0]} is not in {origin} ({len(absent)} of the {len(ids)} images asked"
            " for are not): prepare the data again."
        )
    return rows


def gather_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a memory-mapped array in the order asked for, read in the order of the file."""
    order = np.argsort(rows, kind="stable")
    gathered = np.empty((len(rows), *array.shape[1:]), array.dtype)
    gathered[order] = array[rows[order]]
    return gathered
