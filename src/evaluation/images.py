"""Loading reconstructions, and the images that serve as baselines."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src.metrics import CHUNK, apply_resizing, resize
from src.utils import PerceptError

TORCH_SUFFIXES = (".pt", ".pth")
NUMPY_SUFFIXES = (".npz", ".npy")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

SMALL_SIDE = 32  # pixels a side at which images are compared with each other
SEARCH_BLOCK = 512  # images whose neighbours are searched at once


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
    stored = _read_folder(path) if path.is_dir() else _read_array(path)
    images = torch.as_tensor(stored)
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3:
        raise PerceptError(
            f"{path} holds an array of shape {tuple(images.shape)}: images are (n, 3, height,"
            " width) or (n, height, width, 3)."
        )
    return images


def _read_folder(folder: Path) -> np.ndarray:
    """The image files of a folder, uint8 (n, height, width, 3)."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    arrays = [
        np.asarray(Image.open(file).convert("RGB")) for file in sorted(files, key=_split_numbers)
    ]
    if len({array.shape for array in arrays}) != 1:
        problem = "images of several sizes" if arrays else "no PNG or JPEG files"
        raise PerceptError(
            f"The folder {folder} holds {problem}: put all images there, numbered, in one size."
        )
    return np.stack(arrays)


def _split_numbers(path: Path) -> list[Any]:
    """A sort key that puts recon_10 after recon_9: parts of a file's name, digits as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdigit() else part for part in parts]


def _read_array(path: Path) -> Any:
    """The one array of a file."""
    if path.suffix not in (*TORCH_SUFFIXES, *NUMPY_SUFFIXES):
        raise PerceptError(
            f"{path} cannot be read as images: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    try:
        content = _open_array(path)
        arrays = list(content.values()) if isinstance(content, Mapping) else [content]
    except Exception as error:
        raise PerceptError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it must hold plain numbers, no"
            " Python objects."
        ) from error
    if len(arrays) != 1 or not hasattr(arrays[0], "shape"):
        raise PerceptError(
            f"{path} holds {len(arrays)} entries where one array of images is expected."
        )
    return arrays[0]


def _open_array(path: Path) -> Any:
    """The content of a file of torch or numpy, mapped where the format allows it."""
    if path.suffix in TORCH_SUFFIXES:
        can_map = zipfile.is_zipfile(path)  # torch's older format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    mode: Any = "c" if path.suffix == ".npy" else None
    return np.load(path, allow_pickle=False, mmap_mode=mode)


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
