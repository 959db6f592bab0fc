"""What every writer of a source format is given, and what the writers share."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from src.data.layout import write_image_table
from src.readers.recording import check_images_of_trials
from src.utils import PerceptError, atomic


@dataclass(frozen=True)
class SourceData:
    """One subject's data, to be written in a source format.

    Attributes:
        betas: (trials, voxels) or (trials, x, y, z).
        trials: one row for each row of betas: trial, image, split, and what else the format stores
            (session, run, repeat).
        images: uint8 (images, height, width, 3).
        image_ids: (images,) the id of each; every image of the trials is among them.
        voxels: one row a voxel, or None: regions as Boolean columns, x, y, z, noise_ceiling.
        captions: columns image and caption, or None.
        labels: column image and categories, or None.

    Raises:
        PerceptError: for parts that do not belong together.
    """

    betas: np.ndarray
    trials: pd.DataFrame
    images: np.ndarray
    image_ids: np.ndarray
    voxels: pd.DataFrame | None = None
    captions: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        _require_columns(self.trials, ("trial", "image", "split"))
        n_trials, n_images = len(self.betas), len(self.images)
        counts = (
            f"{n_trials} betas, {len(self.trials)} trials, {n_images} images,"
            f" {len(self.image_ids)} image ids"
        )
        is_aligned = n_trials == len(self.trials) and n_images == len(self.image_ids)
        if self.voxels is not None:
            counts += f", {len(self.voxels)} rows of voxels for {self.n_voxels} columns of betas"
            is_aligned = is_aligned and len(self.voxels) == self.n_voxels
        if not is_aligned:
            raise PerceptError(
                f"{counts} do not fit each other: give one row a trial, one id an image, one row a"
                " voxel."
            )
        check_images_of_trials(self.trials, self.image_ids)

    @classmethod
    def from_world(cls, world: Any) -> SourceData:
        """The data of a simulated subject, from `src.miniworld.simulate`."""
        return cls(
            betas=world.scan.betas,
            trials=world.scan.trials,
            images=world.images,
            image_ids=world.image_ids,
            voxels=world.scan.voxels,
            captions=world.captions,
            labels=world.labels,
        )

    @property
    def n_voxels(self) -> int:
        """Number of voxels of a row of betas."""
        return math.prod(self.betas.shape[1:])

    @property
    def roi_names(self) -> list[str]:
        """Names of the Boolean columns of the table of voxels."""
        return [] if self.voxels is None else list(self.voxels.select_dtypes("bool").columns)

    def sort_trials(self, columns: Collection[str]) -> pd.DataFrame:
        """The table of trials in the order of `trial`; its index is the row of betas.

        Args:
            columns: that the format needs, besides trial, image and split.

        Raises:
            PerceptError: if one of them is missing.
        """
        _require_columns(self.trials, columns)
        return self.trials.reset_index(drop=True).sort_values("trial")

    def check_two_axes(self) -> None:
        """Refuse betas that are volumes.

        Raises:
            PerceptError: saying the shape.
        """
        if self.betas.ndim != 2:
            raise PerceptError(
                f"Betas have shape {self.betas.shape}: they must be (trials, voxels)."
            )


def _require_columns(trials: pd.DataFrame, columns: Collection[str]) -> None:
    missing = set(columns) - set(trials.columns)
    if missing:
        raise PerceptError(
            f"The table of trials lacks the columns {sorted(missing)}: it has"
            f" {list(trials.columns)}."
        )


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Save an image uint8 (height, width, 3)."""
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def write_split(source: Path, trials: pd.DataFrame) -> None:
    """Write <source>/splits.csv, which readers follow; other images already in it stay."""
    path, table = source / "splits.csv", trials.drop_duplicates("image")[["image", "split"]]
    if path.exists():
        stored = pd.read_csv(path)
        table = pd.concat([stored[~stored["image"].isin(table["image"])], table])
    with atomic(path) as temporary:
        table.sort_values("image").to_csv(temporary, index=False)


def write_tables(source: Path, captions: pd.DataFrame | None, labels: pd.DataFrame | None) -> None:
    """Write captions.parquet and labels.parquet beside a source, which readers pick up."""
    for name, table in (("captions", captions), ("labels", labels)):
        if table is not None:
            write_image_table(source / f"{name}.parquet", table)
