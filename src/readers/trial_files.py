"""Single-trial betas in the files that neuroimaging tools write, read a block of trials at a time.

`open_trials` opens a file for its header only: NIfTI (x, y, z, trials) or a folder of 3D NIfTI
files, FreeSurfer's MGH (vertices, 1, 1, trials), CIFTI (trials, grayordinates), GIFTI (one array a
trial, or one (vertices, trials)), .npy (trials, columns), and GLMsingle's own output
(`src.readers.glmsingle`). `iterate_sessions` reads them session by session: memory does not grow
with the number of sessions, nor, but for GIFTI and GLMsingle's .npy, with the size of a file.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES, check_space
from src.files.foreign import load_npy, natural_key, read_errors
from src.readers.common import list_files
from src.readers.nsd_betas import decompress
from src.readers.places import (
    Places,
    check_same_places,
    find_hemisphere,
    is_cifti,
    join_hemispheres,
    read_cifti_places,
)
from src.readers.volumes import open_nifti
from src.utils import PerceptError, make_folder, progress, require_extra

SUFFIXES = (".nii", ".nii.gz", ".gii", ".mgh", ".mgz", ".npy")


class TrialFile(ABC):
    """The betas of some trials, opened for their shape only.

    Attributes:
        path: the file or folder.
        n_trials: number of trials.
        places: of the columns.
    """

    path: Path
    n_trials: int
    places: Places

    @abstractmethod
    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """Blocks float32 (n_rows, columns) of the trials in their order; the last may be shorter.

        Args:
            columns: of the places, ascending.
            n_rows: trials of a block.

        Raises:
            PerceptError: if the file is damaged or cut off.
        """


@dataclass(frozen=True)
class FrameFile(TrialFile):
    """A NIfTI or MGH file, whose volumes follow one another; one of them is in memory at a time.

    Attributes:
        dtype: of the stored numbers.
        offset: bytes before the first volume.
        slope, inter: value = slope * stored + inter.
    """

    path: Path
    n_trials: int
    places: Places
    dtype: np.dtype
    offset: int
    slope: float
    inter: float

    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """See `TrialFile.iterate`."""
        positions = self._find_positions(columns)
        rows: list[np.ndarray] = []
        with read_errors(self.path):
            for frame in self._iterate_frames():
                values = frame[positions].astype(np.float32)
                rows.append(values * np.float32(self.slope) + np.float32(self.inter))
                if len(rows) == n_rows:
                    yield np.stack(rows)
                    rows = []
        if rows:
            yield np.stack(rows)

    def _find_positions(self, columns: np.ndarray) -> np.ndarray:
        """Place of each column in a stored volume, whose first axis runs fastest."""
        if self.places.kind != "volume":
            return columns
        xyz = np.unravel_index(columns, self.places.shape)
        return np.ravel_multi_index(xyz, self.places.shape, order="F")

    def _iterate_frames(self) -> Iterator[np.ndarray]:
        size = math.prod(self.places.shape) * self.dtype.itemsize
        if self.path.suffix in (".gz", ".mgz"):
            yield from self._iterate_compressed(size)
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for number in range(self.n_trials):
                content = file.read(size)
                if len(content) < size:
                    raise EOFError(f"it ends after {number} of {self.n_trials} trials")
                yield np.frombuffer(content, self.dtype)

    def _iterate_compressed(self, size: int) -> Iterator[np.ndarray]:
        """Volumes of a compressed file, which is read to its end, where its checksum is."""
        start, n_read, buffer = self.offset, 0, bytearray()
        for piece in decompress(self.path):
            buffer += piece
            while n_read < self.n_trials and len(buffer) >= start + size:
                yield np.frombuffer(bytes(buffer[start : start + size]), self.dtype)
                del buffer[: start + size]
                start, n_read = 0, n_read + 1
        if n_read < self.n_trials:
            raise EOFError(f"it ends after {n_read} of {self.n_trials} trials")


Loader = Callable[[], AbstractContextManager[Any]]  # gives an array that can be sliced


@dataclass(frozen=True)
class ArrayFile(TrialFile):
    """An array that can be sliced: mapped, in memory, or a dataset of HDF5.

    Attributes:
        load: opens the array.
        axes: "t..." for (trials, columns) or (trials, x, y, z); "tzyx" for (trials, z, y, x);
            "...t" for (columns, trials) or (x, y, z, trials).
    """

    path: Path
    n_trials: int
    places: Places
    load: Loader
    axes: str

    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """See `TrialFile.iterate`."""
        positions = self._find_positions(columns)
        with read_errors(self.path), self.load() as array:
            if self.axes == "...t":
                selected = self._gather(array, positions)
                for start in range(0, self.n_trials, n_rows):
                    yield selected[start : start + n_rows]
                return
            for start in range(0, self.n_trials, n_rows):
                stop = min(start + n_rows, self.n_trials)
                block = np.empty((stop - start, len(columns)), np.float32)
                for row in range(start, stop):
                    block[row - start] = np.asarray(array[row]).ravel()[positions]
                yield block

    def _find_positions(self, columns: np.ndarray) -> np.ndarray:
        """Place of each column in a stored row."""
        if self.axes != "tzyx" or self.places.kind != "volume":
            return columns
        grid = self.places.shape
        xyz = np.unravel_index(columns, grid)
        return np.ravel_multi_index(xyz[::-1], grid[::-1])

    def _gather(self, array: Any, positions: np.ndarray) -> np.ndarray:
        """The betas (trials, columns), read in slabs of the first axis."""
        selected = np.empty((self.n_trials, len(positions)), np.float32)
        n_inner = math.prod(array.shape[1:-1])
        step = max(1, BLOCK_BYTES // (n_inner * self.n_trials * array.dtype.itemsize))
        for start in range(0, array.shape[0], step):
            bounds = np.array([start, start + step]) * n_inner
            first, last = np.searchsorted(positions, bounds)
            if first == last:
                continue
            slab = np.asarray(array[start : start + step]).reshape(-1, self.n_trials)
            selected[:, first:last] = slab[positions[first:last] - bounds[0]].T
        return selected


@dataclass(frozen=True)
class HemisphereFiles(TrialFile):
    """The files of the left and the right hemisphere, side by side."""

    parts: tuple[TrialFile, ...]
    path: Path
    n_trials: int
    places: Places

    @classmethod
    def join(cls, files: Sequence[TrialFile]) -> HemisphereFiles:
        """Join files of the same trials, left before right.

        Raises:
            PerceptError: if one has other trials, or a hemisphere is there twice.
        """
        ordered = sorted(files, key=lambda file: find_hemisphere(file.path))
        sides = [find_hemisphere(file.path) for file in ordered]
        first = ordered[0]
        for file in ordered[1:]:
            if file.n_trials != first.n_trials:
                raise PerceptError(
                    f"{file.path} has {file.n_trials} trials, {first.path} has {first.n_trials}:"
                    " both hemispheres must have the same."
                )
        if len(set(sides)) < len(sides):
            raise PerceptError(
                f"{ordered[0].path} and {ordered[1].path} are of the same hemisphere and session:"
                " narrow the pattern `betas` to one space and one map."
            )
        pairs = [(side or "L", file.places) for side, file in zip(sides, ordered, strict=True)]
        return cls(tuple(ordered), first.path, first.n_trials, join_hemispheres(pairs))

    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """See `TrialFile.iterate`."""
        edges = np.cumsum([0, *(part.places.size for part in self.parts)])
        bounds = np.searchsorted(columns, edges)
        blocks = [
            part.iterate(columns[bounds[number] : bounds[number + 1]] - edges[number], n_rows)
            for number, part in enumerate(self.parts)
        ]
        for sides in zip(*blocks, strict=True):
            yield np.concatenate(sides, axis=1)


@dataclass(frozen=True)
class JoinedFiles(TrialFile):
    """Files of the same places, one after the other: volumes of a folder, or runs of a session."""

    parts: tuple[TrialFile, ...]
    path: Path
    n_trials: int
    places: Places

    @classmethod
    def join(cls, files: Sequence[TrialFile], path: Path) -> JoinedFiles:
        """Join files in their order.

        Raises:
            PerceptError: if one lies on other places.
        """
        for file in files:
            check_same_places(file.places, file.path, files[0].places, files[0].path)
        n_trials = sum(file.n_trials for file in files)
        return cls(tuple(files), path, n_trials, files[0].places)

    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """See `TrialFile.iterate`; a block holds trials of one file."""
        for part in self.parts:
            yield from part.iterate(columns, n_rows)


# ---------------------------------------------------------------------------------------- opening
def open_trials(path: Path) -> TrialFile:
    """Open a file, or a folder of 3D NIfTI files, for its header.

    GLMsingle's own output is opened by `src.readers.glmsingle.open_glmsingle`.

    Raises:
        PerceptError: if it is missing or damaged, or has no axis of trials.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.suffix == ".gii":
        return _open_gifti(path)
    image = open_nifti(path, "betas")
    if is_cifti(path):
        return _open_cifti(image, path)
    proxy = image.dataobj
    shape = (*proxy.shape, 1) if proxy.ndim == 3 else proxy.shape
    if len(shape) != 4:
        raise PerceptError(
            f"{path} has the shape {proxy.shape}: betas have the axes (x, y, z, trials)."
        )
    is_surface = path.suffix in (".mgh", ".mgz") and shape[1:3] == (1, 1)
    places = Places(tuple(map(int, shape[:3])), np.asarray(image.affine, float))
    if is_surface:
        places = join_hemispheres([(find_hemisphere(path) or "L", Places((int(shape[0]),)))])
    slope, inter = (float(number) for number in (proxy.slope, proxy.inter))
    return FrameFile(path, int(shape[3]), places, proxy.dtype, int(proxy.offset), slope, inter)


def _open_folder(path: Path) -> TrialFile:
    files = sorted(
        [*list_files(path, "*.nii"), *list_files(path, "*.nii.gz")],
        key=lambda file: natural_key(file.name),
    )
    if not files:
        raise PerceptError(f"{path} holds no .nii or .nii.gz files: give a folder of one a trial.")
    return JoinedFiles.join([open_trials(file) for file in files], path)


def _open_npy(path: Path) -> TrialFile:
    array = load_npy(path, mode="r")
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise PerceptError(
            f"{path} holds {array.dtype} {array.shape}: betas in .npy are numbers of (trials,"
            " columns)."
        )
    places = Places((array.shape[1],))
    return ArrayFile(
        path, len(array), places, lambda: nullcontext(load_npy(path, mode="r")), "t..."
    )


def _open_cifti(image: Any, path: Path) -> TrialFile:
    proxy, places = image.dataobj, read_cifti_places(image, path)
    n_trials, n_places = (int(size) for size in proxy.shape)

    def load() -> AbstractContextManager[Any]:
        # of a CIFTI matrix the trials of a grayordinate lie together
        shape = (n_places, n_trials)
        array = np.memmap(path, proxy.dtype, "r", proxy.offset, shape)
        return nullcontext(array)

    if (proxy.slope, proxy.inter) != (1.0, 0.0):
        raise PerceptError(
            f"{path} has a scaling of {proxy.slope} and {proxy.inter} in its header, which CIFTI"
            " files do not have: save it again as float32."
        )
    return ArrayFile(path, n_trials, places, load, "...t")


def _open_gifti(path: Path) -> TrialFile:
    shape = _load_gifti(path).shape
    places = join_hemispheres([(find_hemisphere(path) or "L", Places((shape[1],)))])
    return ArrayFile(path, shape[0], places, lambda: nullcontext(_load_gifti(path)), "t...")


def _load_gifti(path: Path) -> np.ndarray:
    """Betas (trials, vertices) of a GIFTI file."""
    nibabel = require_extra("nibabel", "nsd")
    with read_errors(path):
        arrays = [np.asarray(array.data) for array in nibabel.load(path).darrays]
        if len(arrays) == 1 and arrays[0].ndim == 2:
            return arrays[0].T
        return np.stack(arrays)


# ---------------------------------------------------------------------------------------- reading
def iterate_sessions(
    sessions: Sequence[TrialFile],
    columns: np.ndarray,
    voxels: pd.DataFrame,
    folder: Path,
    scale: float = 1.0,
) -> Iterator[np.ndarray]:
    """Read betas session by session, in blocks float32 (trials, columns).

    A session goes by way of a temporary file, since only at its end is it known which columns vary.
    A column that does not vary in a session, or is NaN or infinite in one of its trials, is 0 in
    it.

    Args:
        sessions: in their order.
        columns: of the places, ascending.
        voxels: table of the columns, whose column flat_sessions receives the number of sessions in
            which each is 0.
        folder: for the temporary file.
        scale: what betas are divided by.
    """
    flat_sessions = np.zeros(len(columns), np.int64)
    n_rows = max(1, BLOCK_BYTES // (4 * len(columns)))
    for session in progress(sessions, "sessions"):
        check_space(make_folder(folder), 4 * session.n_trials * len(columns))
        with tempfile.TemporaryFile(dir=folder) as file:
            check = _ColumnCheck()
            for block in session.iterate(columns, n_rows):
                block = block if scale == 1.0 else block / np.float32(scale)
                check.add(block)
                file.write(np.ascontiguousarray(block, np.float32).data)
            is_flat = check.find_flat()
            flat_sessions += is_flat
            voxels["flat_sessions"] = flat_sessions
            file.flush()
            file.seek(0)
            for start in range(0, session.n_trials, n_rows):
                count = min(n_rows, session.n_trials - start)
                block = np.fromfile(file, np.float32, count * len(columns))
                block = block.reshape(count, len(columns))
                block[:, is_flat] = 0
                yield block


class _ColumnCheck:
    """Finds the columns of a session that do not vary, or are NaN or infinite in a trial."""

    def __init__(self) -> None:
        self.n_rows = 0

    def add(self, block: np.ndarray) -> None:
        """Take a block (trials, columns) into account."""
        if not self.n_rows:
            self.first = block[0].copy()
            self.varies = np.zeros(block.shape[1], bool)
            self.is_finite = np.ones(block.shape[1], bool)
        self.n_rows += len(block)
        self.varies |= (block != self.first).any(axis=0)
        self.is_finite &= np.isfinite(block).all(axis=0)

    def find_flat(self) -> np.ndarray:
        """Whether each column holds no data."""
        is_constant = ~self.varies & (self.n_rows > 1)
        return is_constant | ~self.is_finite


def find_filled_columns(file: TrialFile) -> np.ndarray:
    """The columns that are finite and not 0 in the first trial, where no one gives a mask."""
    columns = np.arange(file.places.size)
    blocks = file.iterate(columns, 1)
    first = next(blocks)[0]
    return np.flatnonzero(np.isfinite(first) & (first != 0))
