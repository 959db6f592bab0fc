"""What every reader hands on, a `Recording`, and the one function that stores it.

A reader finds the files of a source and parses them into a `Recording`: one subject's responses
with the tables and images that belong to them. `store_recording` writes it into the prepared layout
of `src.data`.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.files import check_space, iterate_row_blocks
from src.data.images import check_sides, write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.utils import PerceptError, make_folder, write_errors

BAD_VOXELS = ("refuse", "drop", "keep")


@dataclass(frozen=True)
class RowBlocks:
    """Rows of an array that are read block by block, so that they need not fit into memory.

    Attributes:
        shape: of all rows together, (trials, voxels) or (trials, x, y, z).
        blocks: arrays (rows, ...) in the order of the rows; they can be read once.
    """

    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


@dataclass(frozen=True)
class Recording:
    """One subject's responses to images, with everything that is known about them.

    Attributes:
        betas: (trials, voxels) or (trials, x, y, z), an array or `RowBlocks`; float16 is stored as
            it is, anything else as float32.
        trials: one row for each row of betas: trial, image, session, run, repeat, split (see
            `src.data.check_trials`).
        images: uint8 (images, height, width, 3), an array or an iterable of blocks of it.
        image_ids: (images,) the id of each image, in the same order.
        attributes: texts and numbers about the betas; source, units, normalisation and protocol are
            required.
        voxels: one row a voxel (regions as Boolean columns, x, y, z, noise_ceiling), or None. It is
            stored after the last block of betas, so that these may still fill in a column.
        captions: columns image and caption, one row a caption, or None.
        labels: column image and one column for each kind of label, one row an image, or None.
        git_captions: columns image and caption, what GIT wrote of the image, or None.

    Raises:
        PerceptError: for parts that do not belong together, or a table without a column it needs.
    """

    betas: np.ndarray | RowBlocks
    trials: pd.DataFrame
    images: np.ndarray | Iterable[np.ndarray]
    image_ids: np.ndarray
    attributes: dict[str, Any]
    voxels: pd.DataFrame | None = None
    captions: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    git_captions: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        check_trials(self.trials)
        n_trials, n_voxels = self.betas.shape[0], math.prod(self.betas.shape[1:])
        if n_trials != len(self.trials):
            raise PerceptError(
                f"There are {n_trials} rows of betas for {len(self.trials)} trials: each trial"
                " needs one."
            )
        if self.voxels is not None and len(self.voxels) != n_voxels:
            raise PerceptError(
                f"Betas have {n_voxels} voxels, the table of voxels has {len(self.voxels)} rows."
            )
        if isinstance(self.images, np.ndarray) and len(self.images) != len(self.image_ids):
            raise PerceptError(
                f"There are {len(self.images)} images for {len(self.image_ids)} image ids."
            )
        check_images_of_trials(self.trials, self.image_ids)
        for name, table in self.image_tables.items():
            if "image" not in table:
                raise PerceptError(
                    f"The table of {name} has no column image (it has {list(table.columns)})."
                )

    @property
    def image_tables(self) -> dict[str, pd.DataFrame]:
        """The tables about images that there are, by name."""
        tables = {
            "captions": self.captions,
            "labels": self.labels,
            "git_captions": self.git_captions,
        }
        return {name: table for name, table in tables.items() if table is not None}


def check_images_of_trials(trials: pd.DataFrame, image_ids: Iterable[int]) -> None:
    """Refuse trials whose image is missing.

    Raises:
        PerceptError: naming the first such image.
    """
    absent = trials.loc[~trials["image"].isin(list(image_ids)), "image"]
    if len(absent):
        raise PerceptError(
            f"Image {absent.iloc[0]} of the trials is not among the images given: give it, or leave"
            " out its trials."
        )


def store_recording(
    recording: Recording, dataset: str | Path, subj: int, bad_voxels: str = "refuse"
) -> Path:
    """Write a subject into the prepared layout: images, captions, labels, betas, trials, voxels.

    Images, captions and labels are added to those that the dataset has from other subjects. The
    folder of the subject appears, or is replaced, only when all of it is written, and nothing is
    added where something is refused.

    Args:
        recording: of the subject.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        bad_voxels: what becomes of voxels that are constant over all trials, or NaN or infinite in
            one: "refuse"; "drop", which leaves them out and says how many; or "keep", which keeps
            constant ones.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for values that `src.data.write_subject` or `src.data.write_images` refuses,
            bad voxels, the same picture on two sides of the split, or a full disk.

    Warns:
        UserWarning: with the number of voxels that were dropped.
    """
    if bad_voxels not in BAD_VOXELS:
        raise PerceptError(f"bad_voxels is {bad_voxels!r}: choose one of {', '.join(BAD_VOXELS)}.")
    folder = dataset_folder(dataset)

    def write_beside() -> None:
        check = partial(check_sides, trials=recording.trials)
        write_images(folder / "images.h5", recording.images, recording.image_ids, check)
        for name, table in recording.image_tables.items():
            write_image_table(folder / f"{name}.parquet", table)

    betas, is_volume = recording.betas, len(recording.betas.shape) != 2
    blocks = betas.blocks if isinstance(betas, RowBlocks) else iterate_row_blocks(betas)
    if bad_voxels == "refuse" and not is_volume:
        blocks = _refuse_constant_voxels(blocks)
    with ExitStack() as stack:
        voxels, attributes = recording.voxels, recording.attributes
        if bad_voxels == "drop":
            stored = stack.enter_context(_spool(blocks, betas.shape, folder))
            blocks, selected = _drop_bad_voxels(stored)
            attributes = attributes | {"dropped_voxels": betas.shape[1] - len(selected)}
            voxels = None if voxels is None else voxels.iloc[selected]
        path = subject_folder(dataset, subj)
        return write_subject(path, blocks, recording.trials, voxels, attributes, write_beside)


# --------------------------------------------------------------------------------------- bad voxels
class _VariationCheck:
    """Finds the columns of blocks of betas (rows, voxels) that have one value in all rows."""

    def __init__(self) -> None:
        self.first: np.ndarray | None = None
        self.n_rows = 0

    def add(self, block: np.ndarray) -> None:
        """Take a block into account; only columns that have not varied yet are looked at."""
        if self.first is None:
            self.first = np.array(block[0])
            self.constant = np.arange(len(self.first))
        self.n_rows += len(block)
        if len(self.constant):
            columns = slice(None) if len(self.constant) == block.shape[1] else self.constant
            varies = (block[:, columns] != self.first[columns]).any(axis=0)
            self.constant = self.constant[~varies]

    def find_constant(self) -> np.ndarray:
        """The columns that are constant; none of fewer than two rows."""
        return self.constant if self.n_rows > 1 else np.empty(0, np.int64)


def _refuse_constant_voxels(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass blocks on, and refuse them at their end if a voxel has one value in all trials."""
    check, n_voxels = _VariationCheck(), 0
    for block in blocks:
        block = np.asarray(block)
        if block.ndim == 2 and len(block):
            check.add(block)
            n_voxels = block.shape[1]
        yield block
    constant = check.find_constant() if n_voxels else np.empty(0, np.int64)
    if len(constant):
        raise PerceptError(
            f"{len(constant)} of {n_voxels} voxels have the same value in all trials, the first is"
            f" voxel {constant[0]}: read with the option bad_voxels=drop to leave them out, or"
            " bad_voxels=keep to keep them."
        )


@contextmanager
def _spool(
    blocks: Iterable[np.ndarray], shape: tuple[int, ...], folder: Path
) -> Iterator[np.ndarray]:
    """Write blocks into a temporary file of a folder, which no other process sees, and map it."""
    if len(shape) != 2:
        raise PerceptError(
            f"bad_voxels=drop needs betas (trials, voxels), these are {shape}: choose refuse or"
            " keep."
        )
    with tempfile.TemporaryFile(dir=make_folder(folder)) as file, write_errors(folder):
        dtype, n_rows = None, 0
        for block in blocks:
            dtype = np.dtype(np.float16 if block.dtype == np.float16 else np.float32)
            if not n_rows:
                check_space(folder, 2 * math.prod(shape) * dtype.itemsize)
            file.write(np.ascontiguousarray(block, dtype).data)
            n_rows += len(block)
        if dtype is None or n_rows != shape[0]:
            raise PerceptError(f"There are {n_rows} rows of betas for {shape[0]} trials.")
        file.flush()
        yield np.memmap(file, dtype, "r", shape=shape)


def _drop_bad_voxels(stored: np.ndarray) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Blocks of betas without bad voxels, and the places of the voxels that remain."""
    check, is_finite = _VariationCheck(), np.ones(stored.shape[1], bool)
    for block in iterate_row_blocks(stored):
        check.add(block)
        is_finite &= np.isfinite(block).all(axis=0)
    is_good = is_finite.copy()
    is_good[check.find_constant()] = False
    selected = np.flatnonzero(is_good)
    if not len(selected):
        raise PerceptError(
            f"All {len(is_good)} voxels are constant, NaN or infinite: nothing is left to read."
        )
    if len(selected) < len(is_good):
        warnings.warn(
            f"{len(is_good) - len(selected)} of {len(is_good)} voxels are left out:"
            f" {int((~is_finite).sum())} are NaN or infinite in a trial, the others constant.",
            stacklevel=4,
        )
    return (block[:, selected] for block in iterate_row_blocks(stored)), selected
