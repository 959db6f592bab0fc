"""Image files on this machine: folders, tar files of a webdataset, and how an image is decoded."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from src.utils import PerceptError, atomic

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ----------------------------------------------------------------------------------------- sources
@dataclass
class SourcePart:
    """Images that are embedded together.

    Attributes:
        paths: image files; empty if the part is a tar file.
        tar: tar file of which all images belong to the part; None if the part is of image files.
        name: of the tar or the first image, relative to the source; the index keeps it to know
            which tars are done.
    """

    paths: list[Path]
    tar: Path | None
    name: str


def find_new_parts(
    source: str | Path, part_rows: int = 10_000, finished: Iterable[str] = ()
) -> list[SourcePart]:
    """Find what a folder holds and an index does not: tar files if there are any, else images.

    Args:
        source: folder, searched with all below it.
        part_rows: images a part; a tar file (of a webdataset, as img2dataset writes it) is one
            part.
        finished: names of tars, and paths of images below `source`, that are in the index.

    Raises:
        PerceptError: there is no such folder, or it holds neither tars nor images.
    """
    source, finished = Path(source), set(finished)
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    tars = [path for path in paths if path.suffix == ".tar"]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not tars and not images:
        raise PerceptError(
            f"{source} holds no .tar files and no images ({', '.join(IMAGE_SUFFIXES)}): give a"
            " folder of either, or one with img_emb/ in it."
        )

    def is_new(path: Path) -> bool:
        return str(path.relative_to(source)) not in finished

    if tars:
        new_tars = filter(is_new, tars)
        return [SourcePart([], path, str(path.relative_to(source))) for path in new_tars]
    new_images = list(filter(is_new, images))
    parts = []
    for start in range(0, len(new_images), part_rows):
        name = str(new_images[start].relative_to(source))
        parts.append(SourcePart(new_images[start : start + part_rows], None, name))
    return parts


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
def iterate_samples(part: SourcePart) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (content of the image file, its metadata) for every image of a part."""
    if part.tar is not None:
        yield from _iterate_tar(part.tar)
        return
    for path in part.paths:
        texts = {}
        for suffix in ("txt", "json"):
            text_path = path.with_suffix(f".{suffix}")
            if text_path.exists():
                texts[suffix] = text_path.read_bytes()
        yield path.read_bytes(), _parse_texts(texts) | {"image_path": str(path)}


@dataclass
class _TarSample:
    """Files of a tar that share a key: an image, at an offset of the tar, and its texts."""

    key: str
    image: bytes | None = None
    offset: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)

    def to_row(self, tar: Path) -> tuple[bytes, dict[str, Any]]:
        """Return the content of the image and its metadata."""
        assert self.image is not None
        location = {
            "image_path": self.key,
            "tar": str(tar),
            "tar_offset": self.offset,
            "tar_size": len(self.image),
        }
        return self.image, _parse_texts(self.texts) | location


def _iterate_tar(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the samples of a webdataset, in which the files of one sample follow each other."""
    sample = _TarSample("")
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name, _, suffix = Path(member.name).name.partition(".")
            key = str(Path(member.name).parent / name)
            if key != sample.key:
                if sample.image is not None:
                    yield sample.to_row(path)
                sample = _TarSample(key)
            file = tar.extractfile(member) if member.isfile() else None
            if file is None:  # a folder
                continue
            content = file.read()
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                sample.image, sample.offset = content, member.offset_data
            else:
                sample.texts[suffix] = content
        if sample.image is not None:
            yield sample.to_row(path)


def _parse_texts(texts: Mapping[str, bytes]) -> dict[str, Any]:
    """Return caption and fields of a sample's .txt and .json files, as img2dataset writes them."""
    fields: dict[str, Any] = {}
    if "json" in texts:
        for name, value in json.loads(texts["json"]).items():
            if isinstance(value, str | int | float | bool) or value is None:
                fields[name] = value
    if "txt" in texts:
        fields["caption"] = texts["txt"].decode("utf-8", "replace").strip()
    return fields


# ------------------------------------------------------------------------------------------ pixels
def decode_image(content: bytes, size: int) -> np.ndarray | None:
    """Decode an image file into (size, size, 3) uint8.

    The shorter side is resized bicubically, and the centre is cropped. None if the content is no
    image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (size, size))  # a JPEG is decoded no larger than needed
            rgb = _to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits a pixel to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def load_local_images(metadata: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the images of some rows that lie on this machine.

    Args:
        metadata: of `get_metadata`, a line a row.
        size: shorter side and centre crop, pixels.

    Returns:
        Images (rows, size, size, 3) uint8, grey where there is none, and whether there is one
        (rows,).
    """

    def load(line: dict[str, Any]) -> np.ndarray | None:
        in_tar = isinstance(line.get("tar"), str)
        path = line["tar"] if in_tar else line.get("image_path")
        if not isinstance(path, str) or not Path(path).is_file():
            return None
        with open(path, "rb") as file:
            if not in_tar:
                return decode_image(file.read(), size)
            file.seek(int(line["tar_offset"]))
            return decode_image(file.read(int(line["tar_size"])), size)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return stack_images(list(pool.map(load, metadata.to_dict("records"))), size)


def stack_images(images: Sequence[np.ndarray | None], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack images (size, size, 3) uint8 into one array, grey where there is none.

    Returns:
        (images, size, size, 3) uint8, and whether there is one (images,).
    """
    grey = np.full((size, size, 3), 128, np.uint8)
    pixels = np.stack([grey if image is None else image for image in images])
    return pixels, np.array([image is not None for image in images], bool)
