"""What every reader hands on, a `Recording`, and the one function that stores it.

A reader finds the files of a source and parses them into a `Recording`: one subject's responses
with the tables and images that belong to them. `store_recording` writes it into the prepared layout
of `src.data`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.utils import PerceptError


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
        tables = {"captions": self.captions, "labels": self.labels}
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


def store_recording(recording: Recording, dataset: str | Path, subj: int) -> Path:
    """Write a subject into the prepared layout: images, captions, labels, betas, trials, voxels.

    Images, captions and labels are added to those that the dataset has from other subjects. The
    folder of the subject appears, or is replaced, only when all of it is written.

    Args:
        recording: of the subject.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for values that `src.data.write_subject` or `src.data.write_images` refuses,
            or a full disk.
    """
    folder = dataset_folder(dataset)
    betas = recording.betas
    write_images(folder / "images.h5", recording.images, recording.image_ids)
    for name, table in recording.image_tables.items():
        write_image_table(folder / f"{name}.parquet", table)
    return write_subject(
        subject_folder(dataset, subj),
        betas.blocks if isinstance(betas, RowBlocks) else betas,
        recording.trials,
        recording.voxels,
        recording.attributes,
    )
