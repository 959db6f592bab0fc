"""What the writers of several formats share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from src.data.layout import write_image_table
from src.utils import PerceptError, atomic


def write_split(source: Path, trials: pd.DataFrame) -> None:
    """Write <source>/splits.csv for `load_split_column`; images of other subjects already in it are kept."""
    path, table = source / "splits.csv", trials.drop_duplicates("image")[["image", "split"]]
    if path.exists():
        old = pd.read_csv(path)
        table = pd.concat([old[~old["image"].isin(table["image"])], table])
    with atomic(path) as temporary:
        table.sort_values("image").to_csv(temporary, index=False)


def check_aligned(
    betas: np.ndarray,
    trials: pd.DataFrame,
    images: np.ndarray,
    image_ids: Collection[int],
    needed: Collection[str],
    voxels: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table of trials in the order of `trial`, its index the row of betas (trials, ...), if it,
    betas, images and voxels belong together.

    Raises:
        PerceptError: if they do not: another number of rows, a column of `needed` that is missing,
            or a trial whose image is not given.
    """
    if missing := set(needed) - set(trials.columns):
        raise PerceptError(
            f"The table of trials lacks the columns {sorted(missing)}: it has"
            f" {list(trials.columns)}."
        )
    unlike = voxels is not None and len(voxels) != betas.shape[1]
    if unlike or len(trials) != len(betas) or len(images) != len(image_ids):
        table = (
            ""
            if voxels is None
            else f", {len(voxels)} rows of voxels for {betas.shape[1]} columns of betas"
        )
        raise PerceptError(
            f"{len(betas)} betas, {len(trials)} trials, {len(images)} images, {len(image_ids)}"
            f" image ids{table} do not fit each other: give one row a trial, one id an image, one"
            " row a voxel."
        )
    ordered = trials.reset_index(drop=True).sort_values("trial")
    absent = ordered.loc[~ordered["image"].isin(image_ids), "image"]
    if len(absent):
        raise PerceptError(
            f"Image {absent.iloc[0]} of the trials is not among the images given: give it, or leave"
            " out its trials."
        )
    return ordered


def write_tables(source: Path, captions: pd.DataFrame | None, labels: pd.DataFrame | None) -> None:
    """Write captions.parquet and labels.parquet beside a source for `copy_tables`."""
    for name, table in (("captions", captions), ("labels", labels)):
        if table is not None:
            write_image_table(source / f"{name}.parquet", table)
