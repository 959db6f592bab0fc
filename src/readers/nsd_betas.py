"""The betas of NSD: one file a session, of which only the voxels of a mask are read."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import iterate_row_blocks
from src.files.foreign import read_errors
from src.readers.hdf5 import open_dataset
from src.readers.volumes import open_nifti
from src.utils import PerceptError, progress

SCALE = np.float32(300)  # stored integers a percent signal change

# orders of the axes that a file of betas may have, the documented one first
AXES = ("tzyx", "txyz", "xyzt")

GAP = 2  # voxels on a line that lie this close are read in one call


@dataclass
class SessionBetas:
    """The file of one session's betas, opened for its shape only.

    Attributes:
        path: the file.
        session: its number, from 1.
        format: hdf5 or nii.gz.
        shape: of the stored array.
        dtype: of the stored array.
        offset: bytes before the array of a .nii.gz.
        axes: one of AXES, once `settle_axes` knows the grid.
    """

    path: Path
    session: int
    format: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    axes: str = ""

    @classmethod
    def open(cls, path: Path, session: int) -> SessionBetas:
        """Read the header of a session's file.

        Raises:
            PerceptError: if it is damaged, or holds something else than betas.
        """
        open_format = cls._open_h5 if path.suffix == ".hdf5" else cls._open_nifti
        betas = open_format(path, session)
        is_number = betas.dtype == np.int16 or betas.dtype.kind == "f"
        if len(betas.shape) != 4 or not is_number:
            raise PerceptError(
                f"{path} holds {betas.dtype} {betas.shape}: betas are int16 (percent signal change"
                " x 300) or float, with four axes."
            )
        return betas

    @classmethod
    def _open_h5(cls, path: Path, session: int) -> SessionBetas:
        with open_dataset(path, "betas", f"betas of session {session}") as stored:
            return cls(path, session, "hdf5", stored.shape, stored.dtype)

    @classmethod
    def _open_nifti(cls, path: Path, session: int) -> SessionBetas:
        stored: Any = open_nifti(path, f"betas of session {session}").dataobj
        if (stored.slope, stored.inter) != (1.0, 0.0):
            raise PerceptError(
                f"{path} has a scaling of {stored.slope} and {stored.inter} in its header, NSD's"
                " betas have none: fetch it again."
            )
        return cls(path, session, "nii.gz", stored.shape, stored.dtype, stored.offset)

    @property
    def n_trials(self) -> int:
        """Trials of the session."""
        return self.shape[self.axes.index("t")]

    def settle_axes(self, grid: tuple[int, ...]) -> None:
        """Find the order of the axes from the grid (x, y, z) of the mask.

        Where several orders fit, the documented one is taken.

        Raises:
            PerceptError: if no order fits.
        """
        for axes in AXES if self.format == "hdf5" else ("xyzt",):
            spatial_shape = tuple(
                size for axis, size in zip(axes, self.shape, strict=True) if axis != "t"
            )
            expected = tuple(grid["xyz".index(axis)] for axis in axes if axis != "t")
            if spatial_shape == expected:
                self.axes = axes
                return
        raise PerceptError(
            f"{self.path} of shape {self.shape} does not fit the mask's grid (x, y, z) ="
            f" {grid}: take betas and mask of the same subject and space."
        )

    def load(self, mask: np.ndarray) -> np.ndarray:
        """Load the betas (trials, voxels) of a mask's voxels in the stored dtype.

        Args:
            mask: bool (x, y, z); its voxels come in C order.

        Raises:
            PerceptError: if the file is damaged or cut off.
        """
        with read_errors(self.path):
            return self._load_lines(mask) if self.format == "hdf5" else self._load_stream(mask)

    def _load_lines(self, mask: np.ndarray) -> np.ndarray:
        """Read pieces of lines along the file's fastest spatial axis.

        NSD keeps the trials of a voxel together, so that only the ROI is read.
        """
        spatial = [axis for axis in self.axes if axis != "t"]
        axis_order = ["xyz".index(axis) for axis in spatial]
        places = np.argwhere(mask)[:, axis_order]  # (voxels, 3) in the order of the file's axes
        order = np.lexsort(places.T[::-1])
        places = places[order]
        steps = np.diff(places, axis=0)
        is_other_line = (steps[:, :2] != 0).any(1)
        breaks = np.flatnonzero(is_other_line | (steps[:, 2] > GAP)) + 1
        betas = np.empty((self.n_trials, len(places)), self.dtype)  # in the order of the file
        with h5py.File(self.path, "r") as file:
            stored = file["betas"]
            for start, stop in itertools.pairwise([0, *breaks.tolist(), len(places)]):
                slow, middle, first = (int(place) for place in places[start])
                line = slice(first, int(places[stop - 1, 2]) + 1)
                if self.axes[0] == "t":
                    block = stored[:, slow, middle, line]
                else:
                    block = stored[slow, middle, line].T
                betas[:, start:stop] = block[:, places[start:stop, 2] - first]
        return betas[:, np.argsort(order)]

    def _load_stream(self, mask: np.ndarray) -> np.ndarray:
        """Decompress one volume (x, y, z) after the other, in Fortran order, and keep the ROI."""
        places = np.ravel_multi_index(tuple(np.argwhere(mask).T), mask.shape, order="F")
        betas = np.empty((self.n_trials, int(mask.sum())), self.dtype)
        size = mask.size * self.dtype.itemsize
        start, n_read, buffer = self.offset, 0, bytearray()
        # to the end of the stream, where its checksum is compared
        for piece in decompress(self.path):
            buffer += piece
            while n_read < self.n_trials and len(buffer) >= start + size:
                volume = np.frombuffer(buffer, self.dtype, mask.size, start)
                np.take(volume, places, out=betas[n_read])
                del volume  # a buffer that is looked into cannot be made shorter
                del buffer[: start + size]
                start, n_read = 0, n_read + 1
        if n_read < self.n_trials:
            raise EOFError(f"it ends after {n_read} of {self.n_trials} trials")
        return betas


def decompress(path: Path) -> Iterator[bytes]:
    """The content of a .gz, of one or more members, piece by piece; gzip.open takes 25 % longer.

    Raises:
        EOFError: if it ends too early.
    """
    decoder = zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while data := file.read(1 << 16):
            while data:
                if decoder.eof:
                    decoder = zlib.decompressobj(wbits=31)
                yield decoder.decompress(data)
                data = decoder.unused_data
    if not decoder.eof:
        raise EOFError("the compressed stream ends too early")


def iterate_betas(
    files: list[SessionBetas], mask: np.ndarray, voxels: pd.DataFrame
) -> Iterator[np.ndarray]:
    """Read betas in blocks float32 (rows, voxels) in percent signal change.

    One session is in memory at a time. A voxel that does not vary within a session is set to 0 in
    it.

    Args:
        files: of the sessions, in their order.
        mask: bool (x, y, z) of the voxels.
        voxels: table of the voxels, whose column flat_sessions receives the number of sessions in
            which each does not vary.
    """
    flat_sessions = np.zeros(len(voxels), np.int64)
    for file in progress(files, "sessions"):
        rows = file.load(mask)
        is_flat = (rows.max(0) == rows.min(0)) & (len(rows) > 1)
        flat_sessions += is_flat
        voxels["flat_sessions"] = flat_sessions
        for block in iterate_row_blocks(rows):
            percent = block.astype(np.float32)
            if rows.dtype == np.int16:
                percent /= SCALE
            percent[:, is_flat] = 0
            yield percent
        del rows, block, percent  # before the next session is read
