"""Datasets of HDF5 files that others wrote, checked before they are read.

HDF5 gives zeros where nothing was ever written, and where a virtual dataset (a view of other files)
lacks its source: `open_dataset` refuses both, as well as groups, links into nothing, and sizes that
no file holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from src.data.files import BLOCK_BYTES
from src.files.foreign import explain_unreadable, read_errors, shorten
from src.utils import PerceptError, require_file

MAX_TABLE_BYTES = 1 << 30  # of an array that is loaded whole, and of one row of any other

MAX_VIEWS = 8  # virtual datasets may be views of others


def open_h5(path: Path, what: str = "an HDF5 file") -> h5py.File:
    """Open an HDF5 file for reading.

    Raises:
        PerceptError: if it is missing, or cannot be opened, see `explain_unreadable`.
    """
    with read_errors(require_file(path, what)):
        return h5py.File(path, "r", rdcc_nbytes=BLOCK_BYTES)


@contextmanager
def open_dataset(
    path: Path, name: str, what: str = "an HDF5 file", rows: np.ndarray | None = None
) -> Iterator[h5py.Dataset]:
    """Open a numeric dataset of an HDF5 file.

    Args:
        path: the file.
        name: of the dataset.
        what: content of the file, for errors.
        rows: those that will be read, None for all.

    Raises:
        PerceptError: if the file cannot be opened, lacks the dataset, or `check_dataset` refuses
            it.
    """
    with open_h5(path, what) as file:
        yield find_dataset(file, name, rows)


def find_dataset(file: h5py.File, name: str, rows: np.ndarray | None = None) -> h5py.Dataset:
    """A dataset of an open file, through `check_dataset`.

    Raises:
        PerceptError: also if there is no such dataset, or a link or a group in its place.
    """
    path = Path(file.filename)
    try:
        item = file[name]
    except (KeyError, RuntimeError, OSError) as error:
        raise _explain_missing(file, name, error) from error
    if not isinstance(item, h5py.Dataset):
        raise PerceptError(
            f"{name} of {path} is a {type(item).__name__.lower()}, where a dataset is expected:"
            " fetch the file again."
        )
    check_dataset(item, rows)
    return item


def _explain_missing(file: h5py.File, name: str, error: Exception) -> PerceptError:
    """The error to raise for a dataset that cannot be opened: it is absent, or a link."""
    path = Path(file.filename)
    with read_errors(path):
        parent, _, last = name.rpartition("/")
        link = file[parent or "/"].get(last, getlink=True) if (parent or "/") in file else None
    if isinstance(link, h5py.ExternalLink):
        return PerceptError(
            f"{name} of {path} is a link into {link.filename}, which cannot be opened"
            f" ({shorten(error)}): put that file beside it."
        )
    if isinstance(link, h5py.SoftLink):
        return PerceptError(
            f"{name} of {path} is a link to {link.path}, which leads nowhere or in a circle: fetch"
            " the file again."
        )
    if link is not None:
        return explain_unreadable(path, error)
    names = ", ".join(map(str, file)) or "nothing"
    return PerceptError(f"{path} has no dataset {name}: it has {shorten(names)}.")


def load_array(path: Path, name: str, what: str = "an HDF5 file") -> np.ndarray:
    """Load a whole dataset, of at most 1 GiB; errors as of `open_dataset`."""
    with open_dataset(path, name, what) as stored, read_errors(path):
        if stored.size * stored.dtype.itemsize > MAX_TABLE_BYTES:
            raise PerceptError(
                f"{name} of {path} announces {_describe_size(stored)}, more than such a table can"
                " hold: fetch the file again."
            )
        return stored[()]


# ----------------------------------------------------------------------------------------- checks
def check_dataset(dataset: h5py.Dataset, rows: np.ndarray | None = None) -> None:
    """Refuse a dataset that holds no numbers, is not there as a whole, or announces too much.

    Args:
        dataset: of an open file.
        rows: those that must be there, None for all.

    Raises:
        PerceptError: naming the file.
    """
    place = f"{dataset.name.lstrip('/')} of {dataset.file.filename}"
    if dataset.shape is None or dataset.dtype.kind not in "biuf":
        raise PerceptError(
            f"{place} holds {dataset.dtype} {dataset.shape}, where numbers are expected: fetch the"
            " file again."
        )
    row_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if row_bytes > MAX_TABLE_BYTES:
        raise PerceptError(
            f"{place} announces {_describe_size(dataset)}, {row_bytes / 1e9:,.1f} GB in a row: the"
            " file is damaged, or its axes are in another order; fetch it again."
        )
    if dataset.is_virtual:
        _check_view(dataset, place)
        return
    n_missing = _count_missing_pieces(dataset)
    if n_missing and not _has_rows(dataset, rows):
        raise PerceptError(
            f"{place} announces {_describe_size(dataset)}, of which {n_missing:,} pieces were never"
            " written and would be read as zeros: fetch the file again."
        )


def _describe_size(dataset: h5py.Dataset) -> str:
    n_bytes = dataset.size * dataset.dtype.itemsize
    return f"{dataset.dtype} {dataset.shape}, {n_bytes / 1e9:,.1f} GB"


def _count_missing_pieces(dataset: h5py.Dataset) -> int:
    """Chunks of a dataset that were never written (of one that has none, 1 for the whole)."""
    if not dataset.size or dataset.external:
        return 0
    if dataset.chunks is None:
        return int(dataset.id.get_storage_size() == 0)
    sizes = zip(dataset.shape, dataset.chunks, strict=True)
    n_chunks = math.prod(-(-length // chunk) for length, chunk in sizes)
    return n_chunks - int(dataset.id.get_num_chunks())


def _has_rows(dataset: h5py.Dataset, rows: np.ndarray | None) -> bool:
    """Whether all chunks of some rows were written, though others were not."""
    if rows is None or dataset.chunks is None or not dataset.id.get_num_chunks():
        return False
    starts: list[int] = []
    dataset.id.chunk_iter(lambda chunk: starts.append(chunk.chunk_offset[0]))
    sizes = zip(dataset.shape[1:], dataset.chunks[1:], strict=True)
    n_beside = math.prod(-(-length // chunk) for length, chunk in sizes)
    values, counts = np.unique(starts, return_counts=True)
    whole_chunks = values[counts == n_beside] // dataset.chunks[0]
    return bool(np.isin(np.asarray(rows) // dataset.chunks[0], whole_chunks).all())


def _check_view(dataset: h5py.Dataset, place: str, depth: int = 0) -> None:
    """Refuse a virtual dataset of which a part has no source."""
    n_values = 0
    folder = Path(dataset.file.filename).parent
    for source in dataset.virtual_sources():
        own_file = source.file_name == "."
        path = Path(dataset.file.filename) if own_file else folder / source.file_name
        n_values += source.vspace.get_select_npoints()
        remedy = "put that file back, or fetch one that holds the values itself"
        complaint = f"{place} shows values of {source.dset_name} in {path}"
        if not path.exists():
            raise PerceptError(
                f"{complaint}, which is not there, so that they would be zeros: {remedy}."
            )
        with open_h5(path) as file:
            stored = file.get(source.dset_name)
            needed = source.src_space.shape
            if not isinstance(stored, h5py.Dataset) or not _contains(stored.shape, needed):
                raise PerceptError(f"{complaint}, which does not hold them: {remedy}.")
            if stored.is_virtual and depth < MAX_VIEWS:
                _check_view(stored, place, depth + 1)
            elif stored.is_virtual or _count_missing_pieces(stored):
                raise PerceptError(f"{complaint}, where they were never written: {remedy}.")
    if n_values < dataset.size:
        raise PerceptError(
            f"{place} is a view of other files that lacks {dataset.size - n_values:,} of its"
            f" {dataset.size:,} values: fetch a file that holds the values itself."
        )


def _contains(shape: tuple[int, ...] | None, needed: tuple[int, ...]) -> bool:
    """Whether an array of a shape holds one of another shape."""
    if shape is None or len(shape) != len(needed):
        return False
    return all(length >= minimum for length, minimum in zip(shape, needed, strict=True))
