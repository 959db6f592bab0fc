"""bdpy's HDF5 format (BData): samples with columns of voxels and labels, and which is which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from src.data.files import BLOCK_BYTES
from src.files.foreign import read_errors
from src.readers.hdf5 import find_dataset, open_h5
from src.utils import PerceptError, progress


class BData:
    """A file in bdpy's format; columns are looked up by key, rows are read in blocks.

    Args:
        path: the file.
        data_type: DataType of all rows, where the file has no such column.

    Attributes:
        shape: (samples, columns) of the data.
        metadata: for each key its row of metadata/value (columns,).
        stimulus_names: name of each value of stimulus_name, where vmap has them.

    Raises:
        PerceptError: for a damaged file, or one that is no BData.
    """

    def __init__(self, path: Path, data_type: int = 0):
        self.path, self.data_type = path, data_type
        with open_h5(path, "samples in bdpy's format") as file, read_errors(path):
            is_new = "dataset" in file
            self._name = "dataset" if is_new else "dataSet"
            group = "metadata" if is_new else "metaData"
            stored, marks = find_dataset(file, self._name), find_dataset(file, f"{group}/value")
            self.shape, self._itemsize = stored.shape, stored.dtype.itemsize
            keys, values = file[f"{group}/key"].asstr()[:], marks[:]
            names = file.get("vmap/stimulus_name", {})
            self.stimulus_names = {float(value): names[value].asstr()[()] for value in names}
        if len(self.shape) != 2 or values.shape != (len(keys), self.shape[1]):
            raise PerceptError(
                f"{path}: dataset {self.shape} and metadata {values.shape} of {len(keys)} keys do"
                " not fit; they must be (samples, columns) and (keys, columns), with their axes in"
                " this order."
            )
        self.metadata = dict(zip(keys.tolist(), values, strict=True))

    def find_columns(self, key: str) -> np.ndarray:
        """Which columns a key marks, bool (columns,)."""
        return self.metadata[key] == 1

    def load_label(self, key: str) -> np.ndarray | None:
        """A label of every row, float64 (samples,), or None without such a key."""
        if key not in self.metadata:
            return None
        columns = np.flatnonzero(self.find_columns(key))
        return self.load(slice(None), columns[:1])[:, 0] if len(columns) else None

    def load(self, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Load (rows, chosen columns) in the file's dtype.

        Only the stretch from the first to the last of the columns is read.
        """
        first, last = int(columns.min()), int(columns.max()) + 1
        with read_errors(self.path), h5py.File(self.path, "r") as file:
            block = file[self._name][rows, first:last]
        return block if last - first == len(columns) else block[:, columns - first]

    def iterate_blocks(self, columns: np.ndarray, is_used: np.ndarray) -> Iterator[np.ndarray]:
        """The rows that are used, float32 (rows, chosen columns), in blocks."""
        stretch = int(columns.max() - columns.min() + 1)
        step = max(1, BLOCK_BYTES // (self._itemsize * stretch))
        starts = range(0, self.shape[0], step)
        for start in progress(starts, f"samples of {self.path.name}", len(starts)):
            used = is_used[start : start + step]
            if used.any():
                block = self.load(slice(start, start + step), columns)
                yield (block if used.all() else block[used]).astype(np.float32)

    def has_same_metadata(self, other: BData, keys: list[str]) -> bool:
        """Whether this file marks the same columns with each of the keys as another file."""
        for key in keys:
            values = self.metadata.get(key, np.empty(0))
            if not np.array_equal(values, other.metadata[key], equal_nan=True):
                return False
        return True
