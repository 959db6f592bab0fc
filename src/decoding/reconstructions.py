"""Reconstructions on disk: computed in chunks that survive an interruption, and read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from src.utils import PerceptError, atomic


def compute_in_chunks(
    compute: Callable[[slice], dict[str, Tensor]], n: int, size: int, folder: Path, mark: Any
) -> dict[str, Tensor]:
    """Call `compute` for slices of n images and join its results; finished slices are stored, so
    that an interrupted call goes on where it stopped.

    Args:
        compute: slice of images -> tensors (images, ...) by name.
        n: number of images.
        size: images at a time.
        folder: for the finished slices; delete it when their result is stored.
        mark: whatever the result depends on, as JSON values; slices with another mark are not used.

    Returns:
        Tensors (n, ...) by name.
    """
    described = json.dumps([n, size, mark], sort_keys=True, default=str)
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    chunks: list[dict[str, Tensor]] = []
    with tqdm(total=n, desc="reconstructing", unit="image", mininterval=2) as bar:
        for start in range(0, n, size):
            path = folder / f"{key}-{start:06d}.safetensors"
            rows = slice(start, min(start + size, n))
            if not path.exists():
                tensors = {name: value.contiguous() for name, value in compute(rows).items()}
                with atomic(path) as temporary:
                    save_file(tensors, temporary)
            chunks.append(load_file(path))
            bar.update(rows.stop - rows.start)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def load_reconstructions(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What notebook 03 left in results/<run>/: tensors (images, ...) by name, and metadata
    (protocol, test_set, main, repeats).

    Images are in half precision.

    Raises:
        PerceptError: there is no such file.
    """
    path = Path(folder) / "reconstructions.safetensors"
    if not path.exists():
        raise PerceptError(f"{path} is missing: run notebook 03 for this run first.")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        return tensors, dict(file.metadata() or {})


def load_condition(folder: str | Path, condition: str, image_ids: np.ndarray) -> Tensor:
    """The images of one condition of another run, of the same test images or of more.

    Args:
        folder: results/<run> of that run.
        condition: e.g. "retrieved".
        image_ids: (images,) of the test images.

    Returns:
        (images, 3, height, width) in [0, 1].

    Raises:
        PerceptError: the run has no reconstructions, no such condition, or not all of these images.
    """
    tensors, _ = load_reconstructions(folder)
    run = Path(folder).name
    if condition not in tensors:
        raise PerceptError(
            f"{run} has no images '{condition}': run notebook 05_search_index for it first."
        )
    positions = {image: i for i, image in enumerate(tensors["image_ids"].tolist())}
    missing = [image for image in image_ids.tolist() if image not in positions]
    if missing:
        raise PerceptError(
            f"{run} has no test image {missing[0]}: reconstruct both runs with the same dataset,"
            " subj and first_images."
        )
    rows = [positions[image] for image in image_ids.tolist()]
    return tensors[condition][rows].float()
