"""Loading reconstructions, and the images that serve as baselines."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.files.foreign import load_npz, natural_key, read_errors
from src.files.images import IMAGE_SUFFIXES, decode_image
from src.metrics import CHUNK, apply_resizing, resize
from src.safe_pickle import load_plain_torch_file
from src.utils import PerceptError

TORCH_SUFFIXES = (".pt", ".pth")
NUMPY_SUFFIXES = (".npz", ".npy")

PLAIN = "save it as plain numbers, no Python objects"  # what to do with a file that is refused

SMALL_SIDE = 32  # pixels a side at which images are compared with each other
SEARCH_BLOCK = 512  # images whose neighbours are searched at once


@dataclass(frozen=True)
class ImagePairs:
    """Seen images and their reconstructions, (n, 3, height, width) each, in the same order."""

    seen: Tensor
    recons: Tensor


def load_images(path: str | Path) -> Tensor:
    """Load anyone's images as they are stored; large files are mapped, not read.

    Args:
        path: a .pt file that holds one tensor (as the published repositories write), an .npz or
            .npy file that holds one array, or a folder of PNG or JPEG files, read in the order of
            the numbers in their names. Axes (n, 3, height, width) or (n, height, width, 3); bytes,
            or floats in [0, 1].

    Returns:
        (n, 3, height, width), uint8 or floats in [0, 1].

    Raises:
        PerceptError: the file is missing, holds something else, or images of several sizes.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(
            f"There are no images at {path}: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    return _to_channels_first(_read_folder(path) if path.is_dir() else _read_array(path), path)


def _to_channels_first(stored: Any, path: Path) -> Tensor:
    images = torch.as_tensor(stored)
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3:
        raise PerceptError(
            f"{path} holds an array of shape {tuple(images.shape)}: images are (n, 3, height,"
            " width) or (n, height, width, 3)."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise PerceptError(
            f"{path} holds {str(images.dtype).removeprefix('torch.')} numbers: images are bytes, or"
            " floats in [0, 1]."
        )
    return images


def load_image_pairs(seen_path: str | Path, recon_path: str | Path) -> ImagePairs:
    """Load seen images and anyone's reconstructions of them, each beside its own.

    Files of two folders are paired by name: by the whole name without its ending, else by the
    numbers in it, so that seen_003.png belongs to recon_3.png. Where one side is an array, whose
    rows have no names, the files of a folder must be numbered from 0 or 1 without a gap. Rows of
    two arrays are paired in their order.

    Args:
        seen_path, recon_path: as for `load_images`.

    Raises:
        PerceptError: as `load_images`; for names that do not pair one to one, for another number of
            images, or fewer than two.
    """
    folders = [Path(path) for path in (seen_path, recon_path) if Path(path).is_dir()]
    if len(folders) == 2:
        seen_files, recon_files = _pair_files(*folders)
        pairs = ImagePairs(
            seen=_to_channels_first(_decode_files(seen_files, folders[0]), folders[0]),
            recons=_to_channels_first(_decode_files(recon_files, folders[1]), folders[1]),
        )
    else:
        for folder in folders:
            _check_numbering(_list_images(folder), folder)
        pairs = ImagePairs(seen=load_images(seen_path), recons=load_images(recon_path))
    if not 2 <= len(pairs.seen) == len(pairs.recons):
        raise PerceptError(
            f"{seen_path} holds {len(pairs.seen)} seen images and {recon_path} {len(pairs.recons)}"
            " reconstructions: give as many of both, and at least two."
        )
    return pairs


def _read_folder(folder: Path) -> np.ndarray:
    """The image files of a folder, uint8 (n, height, width, 3)."""
    return _decode_files(_list_images(folder), folder)


def _list_images(folder: Path) -> list[Path]:
    """The image files of a folder in natural order, each name once."""
    with read_errors(folder):
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    files = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise PerceptError(f"The folder {folder} holds no PNG or JPEG files: put all images there.")
    files.sort(key=lambda path: natural_key(path.name))
    stems = Counter(path.stem for path in files)
    if stems.most_common(1)[0][1] > 1:
        raise PerceptError(
            f"The folder {folder} holds {stems.most_common(1)[0][0]} in several formats: keep one"
            " file an image."
        )
    return files


def _decode_files(files: list[Path], folder: Path) -> np.ndarray:
    """Decode image files of one size; those that cannot be read are counted, and the first named.

    Raises:
        PerceptError: if one of them cannot be read, or they are of several sizes.
    """
    images, failures = [], []
    for path in files:
        try:
            images.append(decode_image(path, str(path)))
        except PerceptError as error:
            failures.append(str(error))
    if failures:
        raise PerceptError(
            f"{len(failures)} of {len(files)} images in {folder} cannot be read: {failures[0]}"
        )
    if len({image.shape for image in images}) != 1:
        raise PerceptError(
            f"The folder {folder} holds images of several sizes: bring all of them to one size."
        )
    return np.stack(images)


def _pair_files(seen_folder: Path, recon_folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of two folders in the same order, by their names or else the numbers in these."""
    seen, recons = _list_images(seen_folder), _list_images(recon_folder)
    for get_key in (_get_name, _get_numbers):
        by_key = {get_key(path): path for path in recons}
        keys = [get_key(path) for path in seen]
        if len(by_key) == len(recons) == len(seen) and set(keys) == set(by_key):
            return seen, [by_key[key] for key in keys]
    alone = _find_unpaired(seen, recons) or _find_unpaired(recons, seen)
    raise PerceptError(
        f"{len(seen)} images in {seen_folder} and {len(recons)} in {recon_folder} do not pair by"
        f" their names: {alone or seen[0]} has no other side; give both the same names or numbers."
    )


def _find_unpaired(files: list[Path], partners: list[Path]) -> Path | None:
    """The first file that has no other one of its name or numbers."""
    names = {_get_name(path) for path in partners} | {_get_numbers(path) for path in partners}
    unpaired = (path for path in files if not {_get_name(path), _get_numbers(path)} & names)
    return next(unpaired, None)


def _get_name(path: Path) -> str | tuple[int, ...]:
    return path.stem


def _get_numbers(path: Path) -> str | tuple[int, ...]:
    """The numbers in a file's name, or the name where it has none."""
    return tuple(map(int, re.findall(r"[0-9]+", path.stem))) or path.stem


def _check_numbering(files: list[Path], folder: Path) -> None:
    """Refuse names of files that do not say their rows: numbers from 0 or 1, without a gap."""
    numbers = [_get_numbers(path) for path in files]
    rows = [number[-1] if isinstance(number, tuple) else -1 for number in numbers]
    if rows not in ([*range(len(files))], [*range(1, len(files) + 1)]):
        raise PerceptError(
            f"The files in {folder}, such as {files[0].name}, are not numbered from 0 or 1 without"
            " a gap, so that their rows in the other file cannot be told: give two folders of the"
            " same names."
        )


def _read_array(path: Path) -> Any:
    """The one array of a file."""
    if path.suffix not in (*TORCH_SUFFIXES, *NUMPY_SUFFIXES):
        raise PerceptError(
            f"{path} cannot be read as images: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    content = _open_array(path)
    arrays = list(content.values()) if isinstance(content, Mapping) else [content]
    if len(arrays) != 1 or not hasattr(arrays[0], "shape"):
        raise PerceptError(
            f"{path} holds {len(arrays)} entries where one array of images is expected."
        )
    return arrays[0]


def _open_array(path: Path) -> Any:
    """The content of a file of torch or numpy, mapped where the format allows it."""
    if path.suffix in TORCH_SUFFIXES:
        return load_plain_torch_file(path, PLAIN)
    if path.suffix == ".npz":
        return load_npz(path, PLAIN)
    with read_errors(path, PLAIN):
        return np.load(path, allow_pickle=False, mmap_mode="c")


def hash_pixels(images: Any) -> str:
    """Identity of images (n, 3, height, width) in [0, 1], whoever stored them: number, size, and a
    hash of their bytes at 8 bits.
    """
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for start in range(0, len(images), CHUNK):
        part = torch.as_tensor(images[start : start + CHUNK])
        if part.dtype != torch.uint8:
            part = (part.float() * 255).round().clamp(0, 255)
            part = part.to(torch.uint8)
        digest.update(part.contiguous().numpy().tobytes())
    return f"{len(images)}-pixels-{digest.hexdigest()[:12]}"


def compute_mean_image(images: Any) -> Tensor:
    """The mean of images (n, 3, height, width), repeated for each of them (a view); float32, bytes
    become [0, 1].
    """
    floats = apply_resizing(images, "straight")
    starts = range(0, len(images), CHUNK)
    total: Any = sum(floats[start : start + CHUNK].double().sum(0) for start in starts)
    mean = (total / len(images)).float()
    return mean.expand(len(images), -1, -1, -1)


def find_most_similar(images: Any) -> np.ndarray:
    """For each image the other one that looks most like it, by the correlation of all pixels at
    32 x 32.

    Args:
        images: (n, 3, height, width) in [0, 1], or bytes.

    Returns:
        int64 (n,), positions of the others.

    Raises:
        PerceptError: there is one image only.
    """
    if len(images) < 2:
        raise PerceptError("One image has no other that could look like it: score at least two.")
    floats = apply_resizing(images, "straight")
    parts = [
        resize(floats[start : start + CHUNK], SMALL_SIDE, antialias=True).flatten(1)
        for start in range(0, len(images), CHUNK)
    ]
    small = torch.cat(parts)
    small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    starts = range(0, len(small), SEARCH_BLOCK)
    return torch.cat([_find_nearest_other(small, start) for start in starts]).numpy()


def _find_nearest_other(rows: Tensor, start: int) -> Tensor:
    """For each row of the block that begins at `start` the most similar row but itself."""
    similarity = rows[start : start + SEARCH_BLOCK] @ rows.T
    block = torch.arange(len(similarity))
    similarity[block, block + start] = -2.0  # a row is not its own neighbour
    return similarity.argmax(1)
