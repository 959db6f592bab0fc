"""Webdataset shards: tars whose members are the parts of samples, and the arrays in them.

The members of a sample follow one another; its key is their name up to the first dot, the rest is
their extension. Places in a tar are listed first, so that what is missing or cut off is found
before anything large is read.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from src.files.foreign import (
    READ_ERRORS,
    NpyHeader,
    explain_unreadable,
    parse_npy_header,
    shorten,
)
from src.utils import PerceptError

TAR_BLOCK = 512  # bytes that members of a tar are padded to

MAX_PADDING = 1 << 20  # bytes of zeros after the end of a tar

HEADER_BYTES = 4096  # more than the header of any .npy in a shard


class Place(NamedTuple):
    """Where the bytes of a member lie in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Member:
    """A member of a shard; `what` names its sample in errors."""

    path: Path
    place: Place
    what: str


def list_samples(path: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """List the samples of a tar without reading them; their members may be in any order.

    What a Mac adds to a tar (._ files) is passed over.

    Yields:
        Key of the sample, and the place of each of its members by extension.

    Raises:
        PerceptError: if the tar is damaged, cut off, or two tars in one file, naming the last
            sample, or a sample has a member twice.
    """
    samples: dict[str, dict[str, Place]] = {}
    key, end = "", 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or name.startswith("."):
                    continue
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}".strip("./")
                places = samples.setdefault(key, {})
                if extension in places or member.issparse():
                    raise PerceptError(
                        f"Sample {key} of {path} has {extension} twice, or with gaps: fetch the"
                        " shard again."
                    )
                places[extension] = Place(member.offset_data, member.size)
        _check_end(path, end, key)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        cause = explain_unreadable(path, error) if isinstance(error, OSError) else None
        if cause is not None and "damaged" not in str(cause):
            raise cause from error
        raise PerceptError(
            f"Shard {path} is damaged or cut off at sample {key or '(the first)'} ({error}): fetch"
            " it again."
        ) from error
    yield from samples.items()


def _check_end(path: Path, end: int, key: str) -> None:
    """Refuse a tar that does not end with two blocks of zeros, or that goes on after them."""
    with open(path, "rb") as file:
        # without these blocks the download stopped between two members
        file.seek(end)
        if file.read(2 * TAR_BLOCK) != bytes(2 * TAR_BLOCK):
            raise PerceptError(f"Shard {path} is cut off after sample {key}: fetch it again.")
        n_after = 0
        while block := file.read(1 << 20):
            n_after += len(block)
            if block.strip(b"\0"):
                raise PerceptError(
                    f"Shard {path} goes on after its end behind sample {key}, as if two tars were"
                    " joined: fetch it again, or unpack them and pack one."
                )
    if n_after > MAX_PADDING:
        raise PerceptError(
            f"Shard {path} ends with {n_after:,} bytes of zeros behind sample {key}, so a download"
            " stopped there: fetch it again."
        )


def read_samples(path: Path, extensions: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read some members of the samples of a tar: key, and bytes by extension."""
    with open(path, "rb", buffering=0) as file:
        for key, places in list_samples(path):
            fields = {name: place for name, place in places.items() if name in extensions}
            yield key, {name: read_place(file, place) for name, place in fields.items()}


def read_members(members: Iterable[Member]) -> Iterator[bytes]:
    """Read the bytes of members; a shard is opened once for those that follow one another."""
    for path, group in groupby(members, key=lambda member: member.path):
        with open(path, "rb", buffering=0) as file:
            for member in group:
                yield read_place(file, member.place)


def read_place(file: BinaryIO, place: Place) -> bytes:
    """Read the bytes at a place of an open tar."""
    return os.pread(file.fileno(), place.size, place.offset)


def read_npy_header(file: BinaryIO, place: Place, what: str) -> NpyHeader:
    """Read the header of an .npy in a tar.

    Raises:
        PerceptError: if it is damaged, or the array does not fit into the member; `what` names it.
    """
    head = read_place(file, Place(place.offset, min(place.size, HEADER_BYTES)))
    try:
        header, begin = _split_npy(head)
    except READ_ERRORS as error:
        raise PerceptError(
            f"{what} cannot be read ({shorten(error)}): fetch the shard again."
        ) from error
    if begin + math.prod(header.shape) * header.dtype.itemsize > place.size:
        raise PerceptError(
            f"{what} cannot be read ({header.dtype} {header.shape} do not fit into its"
            f" {place.size} bytes): fetch the shard again."
        )
    return header


def decode_array(fields: dict[str, bytes], name: str, what: str) -> np.ndarray:
    """Decode the member <name>.npy of a sample.

    Args:
        fields: bytes of the sample's members by extension.
        name: of the array.
        what: names the sample in errors.

    Raises:
        PerceptError: if it is missing, damaged or pickled.
    """
    if f"{name}.npy" not in fields:
        raise PerceptError(f"{what} has no {name}.npy: it has {sorted(fields)}.")
    data = fields[f"{name}.npy"]
    try:
        header, begin = _split_npy(data)
        flat = np.frombuffer(data, header.dtype, math.prod(header.shape), begin)
        return flat.reshape(header.shape, order="F" if header.is_fortran else "C")
    except READ_ERRORS as error:
        raise PerceptError(
            f"{name}.npy of {what} cannot be read ({shorten(error)}): fetch the shard again."
        ) from error


def _split_npy(data: bytes) -> tuple[NpyHeader, int]:
    """Header of an .npy, and where its data begin."""
    is_version_1 = data[6:7] == b"\x01"
    if is_version_1:
        begin = 10 + int.from_bytes(data[8:10], "little")
    else:
        begin = 12 + int.from_bytes(data[8:12], "little")
    return _parse_header(data[:begin]), begin


# NumPy's parsing takes longer than the rest of a small array, and samples share a few headers
@lru_cache(maxsize=256)
def _parse_header(data: bytes) -> NpyHeader:
    header = parse_npy_header(io.BytesIO(data))
    if header.dtype.hasobject:
        raise ValueError("it is pickled, and allow_pickle is False")
    return header
