"""Image files on this machine: folders, tar files of a webdataset, and images of an index.

Every image is decoded by `src.files.images.decode_image`. One that cannot be read is left out by
itself, as is a text beside it.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from src.files import images as image_files
from src.files.foreign import READ_ERRORS, shorten, walk_files
from src.files.images import IMAGE_SUFFIXES
from src.search.tables import clean_fields, clean_text
from src.utils import PerceptError, atomic

MAX_FILE_BYTES = 500_000_000  # of an image file

MAX_TEXT_BYTES = 1_000_000  # of a text beside an image

# A tar ends with zeros up to the end of a record, 10 kB where nothing else was asked for. Megabytes
# of them are what a download leaves that had reserved its place and did not finish.
MAX_END_ZEROS = 16 * 2**20

BLOCK = 512  # bytes of a block of a tar


# ----------------------------------------------------------------------------------------- sources
@dataclass
class SourcePart:
    """Images that are embedded together.

    Attributes:
        paths: image files; empty if the part is a tar file.
        tar: tar file of which all images belong to the part; None if the part is of image files.
        name: of the tar or the first image, relative to the source.
    """

    paths: list[Path]
    tar: Path | None
    name: str


@dataclass
class SourceFiles:
    """What a folder holds for an index, sorted by path.

    Attributes:
        root: the folder.
        tars: its tar files.
        images: its image files, if there are no tar files.
    """

    root: Path
    tars: list[Path]
    images: list[Path]

    def group(self, part_rows: int, finished: Iterable[str] = ()) -> list[SourcePart]:
        """Group the files that are not `finished` (names relative to the root) into parts."""
        finished = set(finished)

        def is_new(path: Path) -> bool:
            return str(path.relative_to(self.root)) not in finished

        if self.tars:
            new_tars = filter(is_new, self.tars)
            return [SourcePart([], path, str(path.relative_to(self.root))) for path in new_tars]
        new_images = list(filter(is_new, self.images))
        parts = []
        for start in range(0, len(new_images), part_rows):
            name = str(new_images[start].relative_to(self.root))
            parts.append(SourcePart(new_images[start : start + part_rows], None, name))
        return parts


def list_source(source: str | Path) -> SourceFiles:
    """List the tar files of a folder if there are any, else its images.

    Linked folders below it are searched too, each once.

    Raises:
        PerceptError: there is no such folder, or it holds neither tars nor images.

    Warns:
        UserWarning: images lie beside the tar files, or packed tar files, neither of which is read.
    """
    root = Path(os.path.abspath(source))
    paths = walk_files(root) if root.is_dir() else []
    tars = [path for path in paths if path.suffix.lower() == ".tar"]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    packed = [path for path in paths if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz"))]
    if not tars and not images:
        raise PerceptError(
            f"{source} holds no .tar files and no images ({', '.join(IMAGE_SUFFIXES)}): give a"
            " folder of either, or one with img_emb/ in it."
        )
    for passed_over, remedy in (
        (images if tars else [], "move them to a folder of their own"),
        (packed, "unpack it (gunzip)"),
    ):
        if passed_over:
            warnings.warn(
                f"{len(passed_over)} files in {source} are passed over, such as"
                f" {clean_text(passed_over[0].name)}, as only its .tar files are read, or only its"
                f" images where there are none: {remedy}.",
                stacklevel=2,
            )
    return SourceFiles(root, tars, images)


def find_new_parts(
    source: str | Path, part_rows: int = 10_000, finished: Iterable[str] = ()
) -> list[SourcePart]:
    """Find what a folder holds and an index does not: tar files if there are any, else images.

    Args:
        source: folder, searched with all below it, linked folders too.
        part_rows: images a part; a tar file (of a webdataset, as img2dataset writes it) is one
            part.
        finished: names of tars, and paths of images below `source`, that are in the index.

    Raises:
        PerceptError: there is no such folder, or it holds neither tars nor images.
    """
    return list_source(source).group(part_rows, finished)


def write_tars(
    samples: Iterable[tuple[np.ndarray, str, dict[str, Any]]],
    folder: str | Path,
    count: int,
    rows: int = 2_500,
) -> Path:
    """Write images as tar files such as img2dataset writes.

    A sample becomes key.png, key.txt (the caption) and key.json (all else). Tars that exist are
    left as they are.

    Args:
        samples: (height, width, 3) uint8, caption, and further fields of each image.
        folder: for 00000.tar, 00001.tar, ...
        count: number of samples.
        rows: images a tar.
    """
    folder, samples = Path(folder), iter(samples)
    for start in tqdm(range(0, count, rows), desc="writing tars", mininterval=2):
        tar_samples = list(islice(samples, min(rows, count - start)))
        path = folder / f"{start // rows:05d}.tar"
        if path.exists():
            continue
        with atomic(path) as temporary, tarfile.open(temporary, "w") as tar:
            for row, (pixels, caption, fields) in enumerate(tar_samples, start):
                _add_sample(tar, f"{row:09d}", pixels, caption, fields)
    return folder


def _add_sample(
    tar: tarfile.TarFile, key: str, pixels: np.ndarray, caption: str, fields: dict[str, Any]
) -> None:
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "png")
    contents = {
        "png": image.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps({"key": key} | fields).encode(),
    }
    for suffix, content in contents.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


# ----------------------------------------------------------------------------------------- samples
@dataclass
class Sample:
    """An image file of a part, and the texts beside it.

    Attributes:
        name: of the image, for messages.
        location: where the image is, columns of its line of metadata.
        content: of the image file; None if it could not be read or is too large.
        texts: contents of its .txt and .json files. Those of a tar are complete when the tar has
            been read to its end.
    """

    name: str
    location: dict[str, Any]
    content: bytes | None
    texts: dict[str, bytes]

    def to_line(self) -> tuple[dict[str, Any], bool]:
        """Return the line of metadata, and whether all its texts could be used."""
        fields, usable = _parse_texts(self.texts)
        return fields | self.location, usable


def iterate_samples(part: SourcePart) -> Iterator[Sample]:
    """Yield every image of a part.

    Raises:
        tarfile.TarError, OSError: a tar file cannot be read, or does not end where it should.
    """
    if part.tar is not None:
        yield from _iterate_tar(part.tar)
        return
    for path in part.paths:
        yield _read_sample(path)


def _read_sample(path: Path) -> Sample:
    texts, content = {}, None
    name = clean_text(str(path))
    for suffix in ("txt", "json"):
        text_path = path.with_suffix(f".{suffix}")
        if text_path.exists():
            texts[suffix] = _read_file(text_path, MAX_TEXT_BYTES) or b""
    location: dict[str, Any] = {"image_path": name}
    if name == str(path):  # another name could not be kept in the index
        content = _read_file(path, MAX_FILE_BYTES)
        location |= describe_file(path)
    return Sample(name, location, content, texts)


def _read_file(path: Path, max_bytes: int) -> bytes | None:
    """Content of a file; None if it cannot be read or is larger."""
    try:
        if path.stat().st_size > max_bytes:
            return None
        return path.read_bytes()
    except OSError:
        return None


def describe_file(path: Path) -> dict[str, int]:
    """Return size and time of a file, by which another one under its name is told from it."""
    try:
        status = path.stat()
    except OSError:
        return {"file_size": -1, "file_time": -1}
    return {"file_size": status.st_size, "file_time": status.st_mtime_ns}


@dataclass
class _Group:
    """Files of a tar that share a key: images and their texts, each suffix once."""

    suffixes: set[str] = field(default_factory=set)
    texts: dict[str, bytes] = field(default_factory=dict)


def _iterate_tar(path: Path) -> Iterator[Sample]:
    """Yield the images of a tar; files of one key may lie anywhere in it, in any order.

    A suffix that comes a second time under a key begins another sample of that key.
    """
    groups: dict[tuple[int, str], _Group] = {}
    with open(path, "rb") as file:
        for number, tar, member in _iterate_members(file):
            name = Path(clean_text(member.name))
            suffix = name.suffix.lower().removeprefix(".")
            is_image, is_text = f".{suffix}" in IMAGE_SUFFIXES, suffix in ("txt", "json")
            is_hidden = name.name.startswith("._")  # of a Mac
            if not member.isfile() or is_hidden or not (is_image or is_text):
                continue
            key = str(name.parent / name.stem)
            group = groups.get((number, key))
            if group is None or suffix in group.suffixes:
                group = groups[number, key] = _Group()
            group.suffixes.add(suffix)
            content = _read_member(tar, member, MAX_FILE_BYTES if is_image else MAX_TEXT_BYTES)
            if is_text:
                group.texts[suffix] = content or b""
                continue
            location = {
                "image_path": key,
                "tar": str(path),
                "tar_offset": member.offset_data,
                "tar_size": member.size,
            }
            yield Sample(f"{path.name}:{name}", location, content, group.texts)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes | None:
    """Content of a file of a tar; None if it is larger, or sparse, which no image is."""
    if member.size > max_bytes or member.issparse():
        return None
    file = tar.extractfile(member)
    return None if file is None else file.read()


def _iterate_members(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield (number of the tar, tar, member) of a file that may hold several tars, one by one.

    Raises:
        tarfile.ReadError: a tar does not end with a block of zeros, so that it was cut off, or is
            damaged; or what follows it is no tar.
    """
    start: int | None = 0
    number = 0
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    yield number, tar, member
                end = tar.offset
        except READ_ERRORS as error:
            raise tarfile.ReadError(shorten(error)) from error
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise tarfile.ReadError(f"it is cut off after {end + len(block):,} bytes")
        if any(block):
            raise tarfile.ReadError(f"what begins at byte {end:,} is not of a tar file")
        start = _find_next_tar(file)
        number += 1


def _find_next_tar(file: BinaryIO) -> int | None:
    """Skip blocks of zeros; return where another block begins, None at the end of the file."""
    n_zeros = BLOCK
    while content := file.read(2**16):
        n_leading = len(content) - len(content.lstrip(b"\0"))
        if n_leading < len(content):
            return file.tell() - len(content) + n_leading // BLOCK * BLOCK
        n_zeros += len(content)
    if n_zeros > MAX_END_ZEROS:
        raise tarfile.ReadError(
            f"its last {n_zeros / 2**20:.0f} MB are zeros, as of a download that did not finish"
        )
    return None


def _parse_texts(texts: Mapping[str, bytes]) -> tuple[dict[str, Any], bool]:
    """Return caption and fields of a sample's .txt and .json files, and whether all were usable."""
    fields, usable = {}, True
    if "json" in texts:
        try:
            content = json.loads(texts["json"])
        except (ValueError, RecursionError):  # also where it is no UTF-8
            content = None
        usable = isinstance(content, dict)
        fields = clean_fields(content)
    if "txt" in texts:
        fields["caption"] = texts["txt"].decode("utf-8", "replace").strip()
    return fields, usable


# ------------------------------------------------------------------------------------------ pixels
def decode_image(content: bytes, size: int) -> np.ndarray | None:
    """Decode an image file into (size, size, 3) uint8.

    The shorter side is resized bicubically, and the centre is cropped. None if the content is no
    image, or one that `src.files.images` refuses.
    """
    try:
        return fit_image(image_files.decode_image(content, "the image", shorter_side=size), size)
    except PerceptError:
        return None


def fit_image(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side of (height, width, 3) uint8 to `size`, and crop the centre."""
    rgb = Image.fromarray(pixels)
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def load_local_images(metadata: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the images of some rows that lie on this machine.

    Args:
        metadata: of `get_metadata`, a line a row.
        size: shorter side and centre crop, pixels.

    Returns:
        Images (rows, size, size, 3) uint8, grey where there is none, and whether there is one
        (rows,). There is none where the file is gone, is no image, or where another file of its tar
        lies where the image should be. Grey ones are to fill the array, and not to be scored.
    """

    def load(line: dict[str, Any]) -> np.ndarray | None:
        content = _read_location(line)
        return None if content is None else decode_image(content, size)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return stack_images(list(pool.map(load, metadata.to_dict("records"))), size)


def _read_location(line: dict[str, Any]) -> bytes | None:
    """Content of the image file that a line of metadata tells of; None if there is none."""
    try:
        if isinstance(line.get("tar"), str):
            return _read_from_tar(line)
        path = line.get("image_path")
        if not isinstance(path, str) or not Path(path).is_file():
            return None
        return _read_file(Path(path), MAX_FILE_BYTES)
    except (OSError, ValueError, TypeError, OverflowError, tarfile.TarError):
        return None


def _read_from_tar(line: dict[str, Any]) -> bytes | None:
    """Content of an image file in a tar, if that very file lies at its place."""
    offset, size = int(line["tar_offset"]), int(line["tar_size"])
    if offset < BLOCK or not 0 < size <= MAX_FILE_BYTES:
        return None
    with open(line["tar"], "rb") as file:
        file.seek(offset - BLOCK)
        member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        if member.size != size or not _has_key(member.name, line.get("image_path")):
            return None
        content = file.read(size)
    return content if len(content) == size else None


def _has_key(name: str, key: Any) -> bool:
    """Whether the name in a tar's head is that of a key; long and foreign names are cut there."""
    path = Path(clean_text(name))
    if len(name) >= 99 or not isinstance(key, str) or not key.isascii():
        return True
    return key in (str(path.parent / path.stem), str(path.parent / path.name.partition(".")[0]))


def stack_images(images: Sequence[np.ndarray | None], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack images (size, size, 3) uint8 into one array, grey where there is none.

    Returns:
        (images, size, size, 3) uint8, and whether there is one (images,).
    """
    pixels = np.full((len(images), size, size, 3), 128, np.uint8)
    for position, image in enumerate(images):
        if image is not None:
            pixels[position] = image
    return pixels, np.array([image is not None for image in images], bool)
