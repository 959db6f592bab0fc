"""The pool: images that the encoding model measures, and the checks that none of them is a test.

- A pool is the training images themselves ("train", which needs nothing), the images on which the
  mini models were trained ("mini"), or a folder of image files or of a webdataset's tars.
- A pool of other images is kept as images.h5 among the cached targets of its data set, so that its
  own targets are cached beside it as any others.
- No label of a pool is trained on. Where images come with labels, as those of a webdataset may,
  they are used for one thing: to refuse combinations that are held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from src import miniworld
from src.data.identity import survey_files
from src.data.images import ImageStore, write_images
from src.data.subject import Subject
from src.files.ownership import lock_folder
from src.search.images import Sample, decode_image, find_new_parts, iterate_samples
from src.utils import PerceptError, atomic, progress, resolve

POOLS = ("train", "mini")  # any other name is a folder

MINI_POOL_SEED = 7_000  # of the images on which the mini models were trained

MINI_POOL_IMAGES = 40_000

MAX_SIDE = 256  # pixels a side that images of a pool are kept with, at most

THUMBNAIL = 16  # pixels a side, at which images are compared

# Mean absolute difference of thumbnails (of 255) up to which two images are copies of each other.
# Different images of the mini world, which share scenes and objects, are never so alike.
SAME_PICTURE = 4.0

BLOCK_IMAGES = 500

OVERLAPS = ("refuse", "drop")


@dataclass(frozen=True)
class ImagePool:
    """Images that the encoding model measures.

    Attributes:
        name: "train", "mini" or the folder.
        folder: of images.h5, and of targets that `cache_targets` makes for these images.
        image_ids: int64 (images,).
        labels: one row an image, of those columns that the pool has; None where it has none.
    """

    name: str
    folder: Path
    image_ids: np.ndarray
    labels: pd.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def images(self, image_ids: np.ndarray) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3)."""
        return ImageStore(self.folder / "images.h5").rows(image_ids)

    @property
    def identity(self) -> dict[str, object]:
        """What the images are, for the record of a training."""
        store = ImageStore(self.folder / "images.h5")
        checksums = store.crc[store.positions(self.image_ids)]
        digest = hashlib.blake2b(np.ascontiguousarray(checksums).tobytes(), digest_size=16)
        return {"name": self.name, "images": len(self), "pixels": digest.hexdigest()}

    def leave_out(self, image_ids: np.ndarray) -> ImagePool:
        """This pool without some images."""
        is_kept = ~np.isin(self.image_ids, image_ids)
        labels = None if self.labels is None else self.labels[is_kept].reset_index(drop=True)
        return ImagePool(self.name, self.folder, self.image_ids[is_kept], labels)


def open_pool(name: str, subject: Subject, count: int = 0) -> ImagePool:
    """Open a pool; one of other images is read and stored on first use.

    Args:
        name: "train", "mini", or a folder of images or of tars, relative to PERCEPT_HOME or to the
            repository.
        subject: with its training split; the pool's images are resized to the size of its images,
            at most 256 pixels a side.
        count: the first so many images, 0 for all.

    Raises:
        PerceptError: if a folder is missing or holds no image that can be read; if "mini" is asked
            for images that are not of the mini world's size.
    """
    if name == "train":
        ids = subject.image_ids("train")
        return ImagePool(name, subject.folder, ids[: count or None])
    side = min(subject.image_store.shape[1], MAX_SIDE)
    columns = list_label_columns(subject)
    if name == "mini":
        if side != miniworld.IMAGE_SIZE:
            raise PerceptError(
                f"The pool 'mini' has images of {miniworld.IMAGE_SIZE} pixels a side and the data"
                f" set {side}: it is for the mini world; take 'train', or a folder of images."
            )
        count = count or MINI_POOL_IMAGES
        key: list[object] = [name, MINI_POOL_SEED, count, miniworld.IMAGE_SIZE]
        return _store_pool(name, key, subject.folder, lambda: _draw_mini_images(count, columns))
    source = resolve(name)
    key = [str(source), survey_files(source), count, side, columns]
    return _store_pool(
        name, key, subject.folder, lambda: _read_folder(source, side, count, columns)
    )


def list_label_columns(subject: Subject) -> list[str]:
    """Kinds of categories that the images of a data set are labelled with; [] for none."""
    table = subject.labels
    return [] if table is None else [str(name) for name in table.columns if name != "image"]


# ---------------------------------------------------------------------------------- reading pools
# pixels, and what gives the labels that came with them, once all of a tar is read
Samples = Iterator[tuple[np.ndarray, Callable[[], dict[str, str]]]]


def _draw_mini_images(count: int, columns: Sequence[str]) -> Samples:
    """The images on which the mini models were trained, of training combinations alone."""
    blocks = miniworld.render_blocks(MINI_POOL_SEED, "train", count)
    row = 0
    for block in blocks:
        for pixels in block:
            content = miniworld.compose_image(MINI_POOL_SEED, row, "train")
            labels = miniworld.make_label_row(content)
            yield pixels, partial(_select_labels, columns, partial(dict, labels))
            row += 1


def _select_labels(
    columns: Sequence[str], read_fields: Callable[[], Mapping[str, Any]]
) -> dict[str, str]:
    """Those of the columns that an image has a label for."""
    fields = read_fields()
    return {name: str(fields[name]) for name in columns if name in fields}


def _read_folder(source: Path, side: int, count: int, columns: Sequence[str]) -> Samples:
    """Images of a folder or of its tars, those that can be read, with what their .json says of the
    columns.
    """
    number = 0
    for part in find_new_parts(source):
        for sample in iterate_samples(part):
            pixels = None if sample.content is None else decode_image(sample.content, side)
            if pixels is None:
                continue
            sample.content = None  # its texts alone are needed later
            yield pixels, partial(_select_labels, columns, partial(_read_fields, sample))
            number += 1
            if count and number == count:
                return


def _read_fields(sample: Sample) -> dict[str, Any]:
    """What the .json file beside an image says."""
    return sample.to_line()[0]


def _store_pool(
    name: str, key: list[object], dataset: Path, read: Callable[[], Samples]
) -> ImagePool:
    """The pool of a key, made where it is not there yet."""
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]
    folder = dataset / "targets" / f"pool-{digest}"
    if not (folder / "images.h5").exists():
        with lock_folder(folder, f"reading the pool {name}", wait=True):
            if not (folder / "images.h5").exists():
                _write_pool(name, folder, read())
    store = ImageStore(folder / "images.h5")
    labels_path = folder / "labels.parquet"
    labels = pd.read_parquet(labels_path) if labels_path.exists() else None
    return ImagePool(name, folder, np.sort(store.image_ids), labels)


def _write_pool(name: str, folder: Path, samples: Samples) -> None:
    """Write images.h5 and, where all images have labels, labels.parquet.

    Blocks are first written to a file of their own, as the number of images is not known before.
    """
    scratch, readers, shape = folder / "pixels.partial", [], ()
    with atomic(scratch) as temporary, open(temporary, "wb") as file:
        for block in iter(lambda: list(islice(samples, BLOCK_IMAGES)), []):
            pixels = np.stack([sample[0] for sample in block])
            shape = pixels.shape[1:]
            file.write(pixels.tobytes())
            readers += [sample[1] for sample in block]
    if not readers:
        scratch.unlink()
        raise PerceptError(f"The pool {name} holds no image that can be read: give another folder.")
    rows = [read_labels() for read_labels in readers]
    stored = np.memmap(scratch, np.uint8, "r", shape=(len(rows), *shape))
    if all(rows):
        with atomic(folder / "labels.parquet") as temporary:
            pd.DataFrame(rows).to_parquet(temporary)
    write_images(folder / "images.h5", stored, np.arange(len(rows)))
    del stored
    scratch.unlink()


# --------------------------------------------------------------------------------------- checking
@dataclass(frozen=True)
class PoolOverlap:
    """Images of a pool that decoders must not be trained on.

    Attributes:
        by_pixels: ids of images with nearly the pixels of a held-out image, or of its mirror image.
        by_embedding: ids of images whose embedding is nearly that of a held-out image.
        by_combination: ids of images whose combination of labels is held out.
    """

    by_pixels: np.ndarray
    by_embedding: np.ndarray
    by_combination: np.ndarray

    @property
    def image_ids(self) -> np.ndarray:
        """Ids of all of them."""
        return np.unique(np.concatenate([self.by_pixels, self.by_embedding, self.by_combination]))

    def describe(self) -> str:
        """How many there are of each kind, in words."""
        return (
            f"{len(self.by_pixels)} with nearly the pixels of a validation or test image,"
            f" {len(self.by_embedding)} with nearly its embedding,"
            f" {len(self.by_combination)} with a combination of labels that is held out"
        )


def find_overlap(
    pool: ImagePool,
    subject: Subject,
    embed: Callable[[np.ndarray], np.ndarray],
    near_duplicate: float = 0.94,
    combination: str = "",
) -> PoolOverlap:
    """Images of a pool that show a validation or test image, or what is held out.

    Pixels are compared as thumbnails of 16 x 16: copies that were compressed, resized or mirrored
    differ by a mean of at most 4 of 255 steps. Embeddings are compared by their cosine, after the
    mean of the training images has been taken off: all images of a data set have much in common,
    and two that share that alone are no duplicates.

    Args:
        pool: to be checked.
        subject: whose validation and test images are held out.
        embed: uint8 images (n, height, width, 3) -> one embedding an image (n, dim).
        near_duplicate: cosine from which two images count as the same.
        combination: columns of the labels, separated by commas, whose combination may be held out;
            "" for none.

    Raises:
        PerceptError: if a combination is asked for of images without such labels.
    """
    by_combination = _find_held_out_combinations(pool, subject, combination)
    if pool.name == "train":
        empty = np.empty(0, np.int64)
        return PoolOverlap(empty, empty, by_combination)
    held_out = subject.images(subject.image_ids("val+test"))
    thumbnails = _shrink(held_out)
    thumbnails = torch.cat([thumbnails, _shrink(held_out[:, :, ::-1])])
    mean = _embed_sample(subject, embed)
    embeddings = _centre(embed(held_out), mean)
    by_pixels, by_embedding = [], []
    for start in progress(range(0, len(pool), BLOCK_IMAGES), "checking the pool"):
        ids = pool.image_ids[start : start + BLOCK_IMAGES]
        images = pool.images(ids)
        distances = torch.cdist(_shrink(images), thumbnails, p=1) / thumbnails.shape[1]
        by_pixels.append(ids[(distances <= SAME_PICTURE).any(1).numpy()])
        similarity = _centre(embed(images), mean) @ embeddings.T
        by_embedding.append(ids[(similarity >= near_duplicate).any(1).numpy()])
    return PoolOverlap(np.concatenate(by_pixels), np.concatenate(by_embedding), by_combination)


def _shrink(images: np.ndarray) -> Tensor:
    """Thumbnails of images (n, height, width, 3), float32 (n, numbers)."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)


def _embed_sample(subject: Subject, embed: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Mean embedding of training images, of at most 1,000."""
    ids = subject.image_ids("train")
    chosen = ids[:: max(1, len(ids) // 1000)]
    rows = np.asarray(embed(subject.images(chosen)), np.float32).reshape(len(chosen), -1)
    return torch.from_numpy(rows.mean(0))


def _centre(embeddings: np.ndarray, mean: Tensor) -> Tensor:
    """Embeddings (n, dim) less their mean, at unit length."""
    rows = torch.as_tensor(np.asarray(embeddings, np.float32)).reshape(len(embeddings), -1)
    return F.normalize(rows - mean, dim=1)


def _find_held_out_combinations(pool: ImagePool, subject: Subject, combination: str) -> np.ndarray:
    """Ids of images of a pool whose combination of labels is in validation or test images, and in
    no training image.
    """
    columns = [name.strip() for name in combination.split(",") if name.strip()]
    if not columns:
        return np.empty(0, np.int64)
    held_out, trained = (
        set(subject.categories(subject.image_ids(split), combination))
        for split in ("val+test", "train")
    )
    if pool.name == "train":
        return np.empty(0, np.int64)
    missing = set(columns) - set([] if pool.labels is None else pool.labels.columns)
    if missing:
        raise PerceptError(
            f"The images of the pool {pool.name} have no labels {', '.join(sorted(missing))}, so"
            " that held-out combinations cannot be told: give .json files with them beside the"
            " images, or set held_out_combination to '' if none is held out."
        )
    assert pool.labels is not None
    combinations = pool.labels[columns].astype(str).agg(" ".join, axis=1)
    return pool.image_ids[combinations.isin(held_out - trained).to_numpy()]


def check_pool(
    pool: ImagePool,
    subject: Subject,
    embed: Callable[[np.ndarray], np.ndarray],
    near_duplicate: float = 0.94,
    combination: str = "",
    overlap: str = "refuse",
) -> ImagePool:
    """Refuse a pool that holds what is to be tested, or leave those images out.

    Args:
        pool, subject, embed, near_duplicate, combination: as for `find_overlap`.
        overlap: "refuse" or "drop": what is done where there are such images.

    Returns:
        The pool, without these images.

    Raises:
        PerceptError: with "refuse" where there are such images, or where nothing else is left.
    """
    if overlap not in OVERLAPS:
        raise PerceptError(f"pool_overlap is '{overlap}': choose one of {', '.join(OVERLAPS)}.")
    overlapping = find_overlap(pool, subject, embed, near_duplicate, combination)
    ids = overlapping.image_ids
    if not len(ids):
        return pool
    if overlap == "refuse":
        raise PerceptError(
            f"The pool {pool.name} holds {len(ids)} of its {len(pool)} images that must not be"
            f" trained on ({overlapping.describe()}; the first is image {ids[0]}): take these out"
            " of it, or set pool_overlap to 'drop' to leave them out."
        )
    if len(ids) == len(pool):
        raise PerceptError(
            f"Nothing is left of the pool {pool.name} without {overlapping.describe()}: give other"
            " images."
        )
    return pool.leave_out(ids)
