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

from src.metrics import CHUNK, as_compared, resize
from src.utils import PerceptError


def _number(path: Path) -> list[Any]:
    """Files in the order of the numbers in their names."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def load_pictures(path: str | Path) -> Tensor:
    """Pictures of anyone: (n, 3, height, width), uint8 or floats in [0, 1], as they are stored;
    large files are mapped, not read.

    Args:
        path: a .pt file that holds one tensor (as the published repositories write), an .npz or
            .npy file that holds one array, or a folder of PNG or JPEG files, read in the order of
            the numbers in their names. Axes (n, 3, height, width) or (n, height, width, 3); bytes,
            or floats in [0, 1].

    Raises:
        PerceptError: the file is missing, holds something else, or pictures of several sizes.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(
            f"There are no pictures at {path}: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    if path.is_dir():
        files = sorted(
            (f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg")),
            key=_number,
        )
        arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        if len({array.shape for array in arrays}) != 1:
            what = "no PNG or JPEG files" if not arrays else "pictures of several sizes"
            raise PerceptError(
                f"The folder {path} holds {what}: put all pictures there, numbered, in one size."
            )
        found = np.stack(arrays)
    else:
        found = _stored(path)
    pictures = torch.as_tensor(found)
    if pictures.ndim == 4 and pictures.shape[1] != 3 and pictures.shape[3] == 3:
        pictures = pictures.permute(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise PerceptError(
            f"{path} holds an array of shape {tuple(pictures.shape)}: pictures are (n, 3, height,"
            " width) or (n, height, width, 3)."
        )
    return pictures


def _stored(path: Path) -> Any:
    """The one array of a file."""
    if path.suffix not in (".pt", ".pth", ".npz", ".npy"):
        raise PerceptError(
            f"{path} cannot be read as pictures: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    try:
        if path.suffix in (".pt", ".pth"):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )  # the older format cannot be mapped
        else:
            content = np.load(
                path, allow_pickle=False, mmap_mode="c" if path.suffix == ".npy" else None
            )
        arrays = list(content.values()) if isinstance(content, Mapping) else [content]
    except Exception as error:
        raise PerceptError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it must hold plain numbers, no"
            " Python objects."
        ) from error
    if len(arrays) != 1 or not hasattr(arrays[0], "shape"):
        raise PerceptError(
            f"{path} holds {len(arrays)} entries where one array of pictures is expected."
        )
    return arrays[0]


def pixel_hash(images: Any) -> str:
    """Identity of pictures (n, 3, height, width) in [0, 1], whoever stored them: number, size, and
    a hash of their bytes at 8 bits.
    """
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for start in range(0, len(images), CHUNK):
        part = torch.as_tensor(images[start : start + CHUNK])
        part = (
            part
            if part.dtype == torch.uint8
            else (part.float() * 255).round().clamp(0, 255).to(torch.uint8)
        )
        digest.update(part.contiguous().numpy().tobytes())
    return f"{len(images)}-pixels-{digest.hexdigest()[:12]}"


def mean_picture(images: Any) -> Tensor:
    """The mean of pictures (n, 3, height, width), once for each of them (a view); float32, bytes
    become [0, 1].
    """
    floats = as_compared(images, "straight")
    total: Any = sum(floats[i : i + CHUNK].double().sum(0) for i in range(0, len(images), CHUNK))
    return (total / len(images)).float().expand(len(images), -1, -1, -1)


def most_alike(pictures: Any) -> np.ndarray:
    """For each picture (n, 3, height, width) the other one that looks most like it, (n,):
    correlation of all pixels at 32 x 32.
    """
    if len(pictures) < 2:
        raise PerceptError("One picture has no other that could look like it: score at least two.")
    floats = as_compared(pictures, "straight")
    small = torch.cat(
        [
            resize(floats[i : i + CHUNK], 32, antialias=True).flatten(1)
            for i in range(0, len(pictures), CHUNK)
        ]
    )
    small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    return torch.cat([_others(small, slice(i, i + 512)) for i in range(0, len(small), 512)]).numpy()


def _others(rows: Tensor, mine: slice) -> Tensor:
    alike = rows[mine] @ rows.T
    alike[
        torch.arange(len(alike)), torch.arange(mine.start, mine.start + len(alike))
    ] = -2.0  # not itself
    return alike.argmax(1)
