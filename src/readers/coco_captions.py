"""Captions that the published releases of NSD's images bring along.

- COCO_73k_annots_curated.npy: a row an image of the 73,000, up to five sentences of people each.
- evals/ of MindEye2's dataset: of the thousand shared images, in ascending order of their rows,
  all_captions.pt (one sentence of a person each), all_git_generated_captions.pt (what GIT wrote
  while looking at the image) and all_images.pt (the images, by which the order is checked).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from src.readers.hdf5 import open_dataset
from src.utils import PerceptError

ANNOTATIONS = "COCO_73k_annots_curated.npy"

PEOPLE, GIT, PICTURES = "all_captions.pt", "all_git_generated_captions.pt", "all_images.pt"

CHECKED_IMAGES = 20  # of the thousand, evenly spread

LARGEST_DIFFERENCE = 0.02  # mean over pixels in [0, 1], of one picture stored in two precisions


def load_curated_captions(
    path: Path, rows: Sequence[int] | np.ndarray, image_ids: Sequence[int] | np.ndarray
) -> pd.DataFrame:
    """All sentences of people about some images, columns image and caption.

    Args:
        path: of COCO_73k_annots_curated.npy.
        rows: (images,) row of each image in that file.
        image_ids: (images,) ids that the images get.

    Raises:
        PerceptError: if the file cannot be read, or has no row for an image.
    """
    from src.safe_pickle import unpickle_npy  # here, as it imports torch

    texts = np.asarray(unpickle_npy(path))
    if texts.ndim not in (1, 2) or len(texts) <= max(rows):
        raise PerceptError(
            f"{path} has shape {texts.shape}: it needs a row of captions for each image up to"
            f" {max(rows)}."
        )
    captions = []
    for row, image in zip(rows, image_ids, strict=True):
        for text in np.atleast_1d(texts[row]):
            caption = str(text).strip()
            if caption not in ("", "None"):
                captions.append((image, caption))
    return pd.DataFrame(captions, columns=["image", "caption"])


def load_shared_captions(
    evals: Path, name: str, shared: np.ndarray, images: Path
) -> pd.DataFrame | None:
    """One sentence about each shared image, columns image (its row) and caption.

    Args:
        evals: folder of the files.
        name: PEOPLE or GIT.
        shared: (shared images,) their rows, ascending.
        images: the HDF5 file of all images, whose dataset `images` is (images, 3, height, width).

    Returns:
        The table; None where the file is not there, or does not fit, which a warning says.
    """
    from src.safe_pickle import load_texts  # here, as it imports torch

    path = evals / name
    if not path.exists():
        return None
    texts = load_texts(path)
    reason = f"it has {len(texts)} sentences for {len(shared)} shared images"
    if len(texts) == len(shared):
        reason = _find_other_pictures(evals / PICTURES, shared, images)
    if reason:
        warnings.warn(
            f"The captions of {path} are left out, as whose they are cannot be told: {reason}.",
            stacklevel=4,
        )
        return None
    return pd.DataFrame({"image": shared, "caption": [text.strip() for text in texts]})


def _find_other_pictures(path: Path, shared: np.ndarray, images: Path) -> str:
    """Say what tells that all_images.pt shows other images than the shared ones, "" if nothing."""
    from src.safe_pickle import load_plain_torch_file

    if not path.exists():
        return ""
    pictures = load_plain_torch_file(path)
    if getattr(pictures, "ndim", 0) != 4 or len(pictures) != len(shared):
        return f"{path} does not hold {len(shared)} pictures"
    step = max(1, len(shared) // CHECKED_IMAGES)
    with open_dataset(images, "images") as stored:
        for number in range(0, len(shared), step):
            expected = stored[int(shared[number])].astype(np.float32)
            picture = pictures[number].float().numpy()
            if picture.shape != expected.shape:
                return f"pictures of {path} are {picture.shape}, those of {images} another size"
            if np.abs(picture - expected).mean() > LARGEST_DIFFERENCE:
                return f"{path} shows other images than {images} has in the rows of shared images"
    return ""
