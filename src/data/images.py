"""The images of a prepared data set, images.h5."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import (
    Ids,
    find_rows,
    gather_rows,
    iterate_row_blocks,
    memory_map_h5,
    write_rows,
)
from src.files.ownership import lock_folder
from src.utils import PerceptError, atomic

SAME_IMAGE = 8.0  # mean absolute difference (of 255) up to which two copies count as the same image


class ImageStore:
    """The images of a dataset, memory-mapped.

    Attributes:
        image_ids: int64 (images,), in the order in which they are stored.
        crc: int64 (images,), CRC-32 of the pixels of each.
        shape: (images, height, width, 3).

    Raises:
        PerceptError: if the file is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise PerceptError(
                f"{self.path} is missing: prepare the data with notebook 00_prepare_data."
            )
        self.shape = self.pixels.shape
        with h5py.File(self.path, "r") as file:
            self.image_ids: np.ndarray = file["image_id"][:]
            self.crc: np.ndarray = file["crc"][:]
        self._order = np.argsort(self.image_ids)

    @cached_property
    def pixels(self) -> np.memmap:
        """uint8 (images, height, width, 3)."""
        return memory_map_h5(self.path, "images")[0]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "pixels"}

    def positions(self, image_ids: Ids) -> np.ndarray:
        """Rows at which images are stored. Raises PerceptError for an image that is not."""
        return find_rows(self.image_ids, self._order, image_ids, str(self.path))

    def rows(self, image_ids: Ids) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3), in the order asked for."""
        return gather_rows(self.pixels, self.positions(image_ids))


def _check_image_block(block: np.ndarray, store: ImageStore | None) -> None:
    if block.dtype != np.uint8 or block.ndim != 4 or block.shape[-1] != 3:
        raise PerceptError(
            f"Images must be uint8 (n, height, width, 3), these are {block.dtype} {block.shape}."
        )
    if store is not None and block.shape[1:3] != store.shape[1:3]:
        height, width = store.shape[1:3]
        raise PerceptError(
            f"Images of {block.shape[1]} x {block.shape[2]} do not fit the {height} x {width}"
            " images of this dataset: resize them, or prepare them under another dataset name."
        )


def _count_recompressed(store: ImageStore, ids: np.ndarray, images: np.ndarray) -> int:
    """Number of images whose stored copies have slightly different pixels.

    Raises:
        PerceptError: for an image that looks different.
    """
    stored = store.rows(ids).astype(np.int16)
    difference = np.abs(stored - images).mean(axis=(1, 2, 3))
    if (difference > SAME_IMAGE).any():
        raise PerceptError(
            f"Image {ids[difference.argmax()]} is already in {store.path} and looks different"
            " there: use another dataset name, or delete that file."
        )
    return int((difference > 0).sum())


def _select_new_images(
    images: np.ndarray | Iterable[np.ndarray], ids: np.ndarray, store: ImageStore | None
) -> Iterator[np.ndarray]:
    """Blocks of those images that are not stored yet; those that are must look the same."""
    start, n_recompressed = 0, 0
    stored = np.zeros(len(ids), bool) if store is None else np.isin(ids, store.image_ids)
    for block in iterate_row_blocks(images):
        _check_image_block(block, store)
        stop = start + len(block)
        if stop > len(ids):
            raise PerceptError(
                f"There are more images than the {len(ids)} image ids given for them."
            )
        block_ids, old = ids[start:stop], stored[start:stop]
        start = stop
        if store is not None and old.any():
            n_recompressed += _count_recompressed(store, block_ids[old], block[old])
        if not old.all():
            yield block[~old]
    if start != len(ids):
        raise PerceptError(f"There are {start} images for {len(ids)} image ids.")
    if n_recompressed:
        warnings.warn(
            f"{n_recompressed} images were stored already with slightly different pixels; the"
            " stored ones are kept.",
            stacklevel=5,
        )


def write_images(
    path: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    image_ids: Ids,
    check: Callable[[ImageStore], None] | None = None,
) -> None:
    """Write the images of a dataset, or add to those already there.

    Several subjects share one file; processes that add to it at once take turns.

    Args:
        path: the file, data/<dataset>/images.h5.
        images: uint8 (n, height, width, 3), or an iterable of blocks of these.
        image_ids: (n,) unique integers.
        check: called with all images of the file before it is put in place; may refuse them.

    Raises:
        PerceptError: for another dtype or shape, ids that occur twice, an id that is stored with
            other pixels, or a full disk. What was there stays.
    """
    path, ids = Path(path), np.asarray(image_ids, dtype=np.int64)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise PerceptError(
            f"Image id {unique[counts.argmax()]} is given for {counts.max()} images: ids must be"
            " unique."
        )
    with lock_folder(path, f"adding images to {path.name}", wait=True, as_sibling=True):
        _add_images(path, images, ids, check or (lambda store: None))


def _add_images(
    path: Path,
    images: np.ndarray | Iterable[np.ndarray],
    ids: np.ndarray,
    check: Callable[[ImageStore], None],
) -> None:
    store = ImageStore(path) if path.exists() else None
    new_images = _select_new_images(images, ids, store)
    if store is None:
        _write_store(path, new_images, ids, check)
        return
    new_ids = ids[~np.isin(ids, store.image_ids)]
    if not len(new_ids):
        for _ in new_images:  # nothing to add: the comparison alone
            pass
        check(store)
        return
    blocks = chain(iterate_row_blocks(store.pixels), new_images)
    _write_store(path, blocks, np.concatenate([store.image_ids, new_ids]), check)


def _write_store(
    path: Path,
    blocks: Iterable[np.ndarray],
    ids: np.ndarray,
    check: Callable[[ImageStore], None],
) -> None:
    """Write images and their ids as a new file in the place of `path`."""
    crc: list[int] = []

    def add_checksums(block: np.ndarray, _first_row: int) -> np.ndarray:
        crc.extend(zlib.crc32(np.ascontiguousarray(image).data) for image in block)
        return block

    with atomic(path) as temporary:
        write_rows(temporary, "images", blocks, len(ids), add_checksums)
        with h5py.File(temporary, "r+") as file:
            file["image_id"], file["crc"] = ids, np.array(crc, dtype=np.int64)
        check(ImageStore(temporary))


def check_sides(store: ImageStore, trials: pd.DataFrame) -> None:
    """Refuse the same picture under two ids on two sides of a split.

    Pictures are compared by their checksums, and those whose checksums are equal by their pixels.

    Args:
        store: the images.
        trials: columns image and split; those of split exclude do not count.

    Raises:
        PerceptError: naming two such images.
    """
    used_trials = trials[trials["split"] != "exclude"].drop_duplicates("image")
    crc = store.crc[store.positions(used_trials["image"].to_numpy())]
    used_trials = used_trials.assign(crc=crc)[["image", "split", "crc"]]
    is_mixed = used_trials.groupby("crc")["split"].transform("nunique") > 1
    for _, candidates in used_trials[is_mixed].groupby("crc"):
        pixels = store.rows(candidates["image"].to_numpy())
        pairs = combinations(range(len(candidates)), 2)
        for first, second in pairs:
            one, other = candidates.iloc[first], candidates.iloc[second]
            if one["split"] == other["split"] or (pixels[first] != pixels[second]).any():
                continue
            raise PerceptError(
                f"Image {one['image']} ({one['split']}) and image {other['image']}"
                f" ({other['split']}) are the same picture, so that it would be on two sides of the"
                " split: give both one id, or mark the trials of one of them as exclude."
            )
