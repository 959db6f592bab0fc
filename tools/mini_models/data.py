"""What the mini models learn from: images of the mini world, their captions and labels.

Also the folders: `WORK` for checkpoints, logs and caches, `OUT` for the models that are shipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import miniworld
from src.utils import HOME

ROOT = Path(__file__).resolve().parents[2]
WORK = HOME / "train_logs" / "mini_models"
OUT = ROOT / "data" / "mini_models"

# The mini world of the demo uses another seed: its images differ as well as the combinations.
SEED = 7_000
CLASSIFIER_SEED = 9_000

Channels = tuple[float, ...]  # a number for each of the three channels

# Sizes that the mini CLIP and everything that reads its tokens share.
PATCH_SIZE, DIM, CONTEXT_LENGTH = 8, 128, 40
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

ANSWERS = {  # of the questions that the category classifier answers, in the order of the labels
    "scene": list(miniworld.SCENES),
    "kind": list(miniworld.CATEGORIES),
    "colour": list(miniworld.COLOURS),
}


class ImageSource(NamedTuple):
    """Where images are drawn from: seed, split of the combinations, number of images."""

    seed: int
    split: str
    count: int


# The category classifier knows every combination, in their natural shares, so that it leans towards
# none. No model that encodes or generates sees its images; the miniatures of the metrics' networks,
# which only look at results too, are trained on them as well.
IMAGE_SETS: dict[str, list[ImageSource]] = {
    "train": [ImageSource(SEED, "train", 40_000)],
    "check": [ImageSource(SEED, "val", 512)],
    "laion": [ImageSource(SEED, "train", 12_000)],  # the first of these, for the text-image prior
    "judge": [
        ImageSource(CLASSIFIER_SEED, "train", 30_000),
        ImageSource(CLASSIFIER_SEED, "val", 5_000),
        ImageSource(CLASSIFIER_SEED, "test", 5_000),
    ],
    "judge_check": [
        ImageSource(CLASSIFIER_SEED + 1, "train", 1_500),
        ImageSource(CLASSIFIER_SEED + 1, "val", 250),
        ImageSource(CLASSIFIER_SEED + 1, "test", 250),
    ],
}


def shrink_image_sets(share: float) -> None:
    """Shrink every set of images to a share of its size, for a quick look at a stage."""
    for name, sources in IMAGE_SETS.items():
        IMAGE_SETS[name] = [
            source._replace(count=max(64, int(source.count * share))) for source in sources
        ]


def load_images(name: str) -> np.ndarray:
    """uint8 (images, height, width, 3) of one of `IMAGE_SETS`, drawn once."""
    path = WORK / f"images_{name}.npy"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        blocks: list[np.ndarray] = []
        for source in IMAGE_SETS[name]:
            blocks += miniworld.render_blocks(*source)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, np.concatenate(blocks))
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def split_images(images: np.ndarray, size: int) -> list[np.ndarray]:
    """Split images into nearly equal parts of about `size`."""
    return np.array_split(images, max(1, len(images) // size))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (batch, height, width, 3) -> float (batch, 3, height, width) in [0, 1]."""
    channels_last = torch.from_numpy(np.ascontiguousarray(images))
    return channels_last.permute(0, 3, 1, 2).float() / 255


def normalize_images(x: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Images (batch, 3, height, width) minus a mean of each channel, over a standard deviation."""
    means = torch.tensor(mean, device=x.device).view(1, 3, 1, 1)
    deviations = torch.tensor(std, device=x.device).view(1, 3, 1, 1)
    return (x - means) / deviations


def normalize_for_clip(pixels: Tensor) -> Tensor:
    """Images (batch, 3, height, width) in [0, 1] as CLIP's processor would give them."""
    return normalize_images(pixels, CLIP_MEAN, CLIP_STD)


def draw_per_image(n: int, low: float, high: float, channels: int = 1) -> Tensor:
    """Uniform random numbers (n, channels, 1, 1) between two limits."""
    return torch.empty(n, channels, 1, 1).uniform_(low, high)


def compose_scenes(name: str) -> Iterator[miniworld.ImageContent]:
    """What is on each image of one of `IMAGE_SETS`, in order."""
    for seed, split, count in IMAGE_SETS[name]:
        for i in range(count):
            yield miniworld.compose_image(seed, i, split)


def load_descriptions(name: str) -> tuple[list[list[str]], np.ndarray]:
    """Captions and labels of the images of one of `IMAGE_SETS`.

    Returns:
        Five captions an image, and labels (images, 6) as indices: scene, category, colour, pattern,
        light, place.
    """
    captions, labels = [], []
    for scene in compose_scenes(name):
        main = scene.objects[-1]
        captions.append(miniworld.write_captions(scene))
        named = [scene.scene, main.category, main.colour]
        labels.append([*named, main.pattern, scene.light, scene.place])
    return captions, np.array(labels)


def load_question_labels(name: str) -> Tensor:
    """Labels (images, 3) of scene, category and colour, as indices into `ANSWERS`."""
    return torch.from_numpy(load_descriptions(name)[1][:, :3])


def draw_indices(rng: np.random.Generator, n: int, batch_size: int) -> np.ndarray:
    """Random indices of a batch below `n`, sorted, so that files are read in order."""
    return np.sort(rng.integers(n, size=batch_size))


def compute_share(hits: Tensor) -> float:
    """Share of the elements that are true."""
    return float(hits.float().mean())


def get_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
