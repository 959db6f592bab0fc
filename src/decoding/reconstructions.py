"""Reconstructions on disk: computed in chunks that survive an interruption, and read again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from src.files.ownership import lock_folder
from src.utils import PerceptError, atomic, check_writable, is_finite, memory_errors, read_tensors

log = logging.getLogger(__name__)

REMEDY = "run notebook 03 for this run again, or copy the file again"

MEMORY_REMEDY = (
    "lower generator_batch or recons_per_sample, and run again: finished images are kept, unless"
    " those change"
)

ABOUT = ("main", "protocol", "test_set")  # texts that come with reconstructions


def compute_in_chunks(
    compute: Callable[[slice], dict[str, Tensor]], n: int, size: int, folder: Path, mark: Any
) -> dict[str, Tensor]:
    """Call `compute` for slices of n images and join its results; finished slices are stored, so
    that an interrupted call goes on where it stopped.

    Args:
        compute: slice of images -> tensors (images, ...) by name.
        n: number of images.
        size: images at a time.
        folder: for the finished slices; made where it is missing. Delete it when their result is
            stored.
        mark: whatever the result depends on, as JSON values; slices with another mark are not used.

    Returns:
        Tensors (n, ...) by name.

    Raises:
        PerceptError: if memory runs out, with what to lower; or if the folder cannot be written,
            or another process is computing into it.
    """
    with lock_folder(folder, "computing reconstructions"):
        check_writable(folder)
        return _compute_in_chunks(compute, n, size, folder, mark)


def _compute_in_chunks(
    compute: Callable[[slice], dict[str, Tensor]], n: int, size: int, folder: Path, mark: Any
) -> dict[str, Tensor]:
    described = json.dumps([n, size, mark], sort_keys=True, default=str)
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    joined: dict[str, Tensor] = {}
    with tqdm(total=n, desc="reconstructing", unit="image", mininterval=2) as bar:
        for start in range(0, n, size):
            path = folder / f"{key}-{start:06d}.safetensors"
            rows = slice(start, min(start + size, n))
            tensors = _read_chunk(path, rows.stop - rows.start)
            if tensors is None:
                with memory_errors("reconstructing", MEMORY_REMEDY):
                    computed = compute(rows)
                tensors = {name: value.contiguous() for name, value in computed.items()}
                with atomic(path) as temporary:
                    save_file(tensors, temporary)
                tensors = read_tensors(path)[0]
            for name, values in tensors.items():
                if name not in joined:  # slices are put into the result as they come
                    joined[name] = values.new_empty((n, *values.shape[1:]))
                joined[name][rows] = values
            bar.update(rows.stop - rows.start)
    return joined


def _read_chunk(path: Path, images: int) -> dict[str, Tensor] | None:
    """The finished slice in a file; None where there is none, or a damaged one, which is then
    computed again.
    """
    if not path.exists():
        return None
    try:
        tensors = read_tensors(path)[0]
    except PerceptError as error:
        log.warning("%s It is computed again.", error)
        return None
    if not tensors or any(tensor.shape[:1] != (images,) for tensor in tensors.values()):
        log.warning("%s does not hold %d images: it is computed again.", path, images)
        return None
    return tensors


def load_reconstructions(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What notebook 03 left in results/<run>/: tensors (images, ...) by name, and metadata
    (protocol, test_set, main, repeats).

    Images are in half precision.

    Raises:
        PerceptError: there is no such file, it is damaged, or it is of something else: without the
            ids of the images or the main row, with another number of rows than ids, or with images
            that are not finite.
    """
    path = Path(folder) / "reconstructions.safetensors"
    if not path.exists():
        raise PerceptError(f"{path} is missing: run notebook 03 for this run first.")
    tensors, about = read_tensors(path, required=("image_ids", "seen"), remedy=REMEDY)
    missing = [name for name in ABOUT if name not in about]
    if missing or about["main"] not in tensors:
        what = f"no {', '.join(missing)} among its texts"
        if not missing:
            what = f"no row '{about['main']}', which it calls the main one"
        raise PerceptError(f"{path} has {what}: {REMEDY}.")
    _check_rows(tensors, path)
    return tensors, about


def _check_rows(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse reconstructions whose rows are not one an image, or not finite."""
    ids = tensors["image_ids"]
    is_list_of_ids = ids.ndim == 1 and not ids.is_floating_point()
    if not is_list_of_ids or len(ids.unique()) < len(ids):
        raise PerceptError(f"{path} has image_ids that are not one id an image: {REMEDY}.")
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            continue
        if len(tensor) != len(ids):
            raise PerceptError(
                f"{path} has {len(ids)} image_ids and {len(tensor)} images '{name}': {REMEDY}."
            )
        if not is_finite(tensor):
            raise PerceptError(f"{path} has images '{name}' with NaN or infinity: {REMEDY}.")


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
