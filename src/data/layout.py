"""The prepared layout: folders, tables and their checks, and writing one subject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import disk_errors, iterate_row_blocks, replace_folder, write_rows
from src.utils import HOME, PerceptError, atomic

SPLITS = ("train", "val", "test", "exclude")

TRIAL_COLUMNS = ("trial", "image", "session", "run", "repeat", "split")

REQUIRED_ATTRIBUTES = ("source", "units", "normalisation", "protocol")


def check_trials(trials: pd.DataFrame) -> None:
    """Check the table of trials: columns trial, image, session, run, repeat (integers) and split
    (train, val, test or exclude).

    Raises:
        PerceptError: naming the missing column, the unknown split, the trial or repeat that occurs
            twice, or the image that lies on both sides of a split. Trials of an image may be
            excluded one by one.
    """
    missing = [c for c in TRIAL_COLUMNS if c not in trials.columns]
    if missing:
        raise PerceptError(
            f"The table of trials lacks the columns {missing}: it needs {list(TRIAL_COLUMNS)}."
        )
    for column in TRIAL_COLUMNS[:-1]:
        if not pd.api.types.is_integer_dtype(trials[column]):
            raise PerceptError(
                f"Column {column} of the table of trials is {trials[column].dtype}, it must hold"
                " whole numbers without gaps."
            )
    unknown = sorted(set(trials["split"].astype(str)) - set(SPLITS))
    if unknown:
        raise PerceptError(
            f"The table of trials has the splits {unknown}: only {list(SPLITS)} are known."
        )
    twice = trials["trial"][trials["trial"].duplicated()]
    if len(twice):
        raise PerceptError(
            f"Trial {twice.iloc[0]} is twice in the table of trials: each row must be a trial of"
            " its own."
        )
    again = trials[trials.duplicated(["image", "repeat"])]
    if len(again):
        row = again.iloc[0]
        raise PerceptError(
            f"Image {row['image']} has its repeat {row['repeat']} twice (again in trial"
            f" {row['trial']}): number its repeats 0, 1, 2..."
        )
    _check_sides(trials[trials["split"] != "exclude"])


def _check_sides(trials: pd.DataFrame) -> None:
    sides = trials.drop_duplicates(["image", "split"])
    both = sides[sides["image"].duplicated(keep=False)].sort_values(["image", "trial"])
    if len(both):
        image, rows = both["image"].iloc[0], both[both["image"] == both["image"].iloc[0]]
        where = " and ".join(
            f"{s} (trial {t})" for s, t in zip(rows["split"], rows["trial"], strict=True)
        )
        others = both["image"].nunique() - 1
        raise PerceptError(
            f"Image {image} is in {where}"
            + (f", and {others} more images are on two sides" if others else "")
            + ": split by image, never by trial, or mark its trials as exclude."
        )


def number_repeats(trials: pd.DataFrame) -> pd.Series:
    """Repeat of each row, 0 for the first presentation of its image in the order of column `trial`."""
    order = trials["trial"].argsort(kind="stable").to_numpy()
    return (
        trials["image"]
        .iloc[order]
        .groupby(trials["image"].iloc[order])
        .cumcount()
        .reindex(trials.index)
    )


def write_image_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table about images (captions or labels, with a column `image`) as parquet; rows of
    other images already there are kept.

    Raises:
        PerceptError: if there is no column `image`, or the disk is full.
    """
    path = Path(path)
    if "image" not in table.columns:
        raise PerceptError(
            f"The table for {path.name} has no column image (it has {list(table.columns)})."
        )
    if path.exists():
        old = pd.read_parquet(path)
        table = pd.concat([old[~old["image"].isin(table["image"])], table], ignore_index=True)
    with disk_errors(path.parent), atomic(path) as temporary:
        table.sort_values("image", kind="stable").reset_index(drop=True).to_parquet(temporary)


def _finite_block(
    trials: pd.DataFrame, n_voxels: int | None, digest: Any
) -> Callable[[np.ndarray, int], np.ndarray]:
    """The check of a block of betas (rows, voxels) or (rows, x, y, z), which also settles its dtype
    and adds it to a checksum.
    """
    numbers = trials["trial"].to_numpy()

    def inspect(block: np.ndarray, row: int) -> np.ndarray:
        if not np.issubdtype(block.dtype, np.number) or np.iscomplexobj(block):
            raise PerceptError(f"Betas must be numbers, they are {block.dtype}.")
        if block.ndim not in (2, 4):
            raise PerceptError(
                "Betas must be (trials, voxels) or (trials, x, y, z), a block of them has shape "
                f"{block.shape}."
            )
        if n_voxels is not None and int(np.prod(block.shape[1:])) != n_voxels:
            raise PerceptError(
                f"Betas have {int(np.prod(block.shape[1:]))} voxels, the table of voxels has"
                f" {n_voxels} rows."
            )
        block = np.ascontiguousarray(
            block if block.dtype == np.float16 else block.astype(np.float32, copy=False)
        )
        flat = block.reshape(len(block), -1)
        finite = np.isfinite(flat)
        if not finite.all():
            at, voxel = np.argwhere(~finite)[0]
            trial = numbers[row + at] if row + at < len(numbers) else row + at
            raise PerceptError(
                f"The beta of trial {trial} (row {row + at}), voxel {voxel} is {flat[at, voxel]}: "
                "leave out such voxels or trials, or mend them, before preparing the data."
            )
        digest.update(block.data)
        return block

    return inspect


def _check_attributes(attributes: dict[str, Any]) -> None:
    missing = [k for k in REQUIRED_ATTRIBUTES if not attributes.get(k)]
    if missing:
        raise PerceptError(
            f"Betas need the attributes {list(REQUIRED_ATTRIBUTES)}, of which {missing} are"
            " missing."
        )
    wrong = [
        k
        for k, v in attributes.items()
        if not isinstance(v, str | int | float | np.integer | np.floating)
    ]
    if wrong:
        raise PerceptError(
            f"Attributes are texts and numbers, {wrong[0]} is a"
            f" {type(attributes[wrong[0]]).__name__}."
        )


def write_subject(
    folder: str | Path,
    betas: np.ndarray | Iterable[np.ndarray],
    trials: pd.DataFrame,
    voxels: pd.DataFrame | None,
    attributes: dict[str, Any],
) -> Path:
    """Write one subject: betas.h5, trials.parquet, voxels.parquet.

    The folder appears, or is replaced, only when all of it is written.

    Args:
        folder: data/<dataset>/subjNN.
        betas: (trials, voxels) or (trials, x, y, z), or an iterable of blocks of these rows;
            float16 is kept, anything else becomes float32.
        trials: one row for each row of betas, see `check_trials`.
        voxels: one row a voxel (ROI flags, x y z, noise ceiling), or None where nothing is known.
        attributes: texts and numbers; source, units, normalisation and protocol are required.
            checksum, n_trials, n_voxels are added.

    Returns:
        The folder.

    Raises:
        PerceptError: for a bad table, a NaN or infinite beta (naming its trial and voxel), wrong
            shapes, or a full disk.
    """
    folder = Path(folder)
    check_trials(trials)
    _check_attributes(attributes)
    digest = hashlib.blake2b(digest_size=16)
    inspect = _finite_block(trials, None if voxels is None else len(voxels), digest)
    with disk_errors(folder.parent), replace_folder(folder) as temporary:
        shape = write_rows(
            temporary / "betas.h5", "betas", iterate_row_blocks(betas), len(trials), inspect
        )
        n_voxels = int(np.prod(shape[1:]))
        with h5py.File(temporary / "betas.h5", "r+") as file:
            file["betas"].attrs.update(
                {
                    **attributes,
                    "checksum": digest.hexdigest(),
                    "n_trials": shape[0],
                    "n_voxels": n_voxels,
                }
            )
        table = (
            trials[list(TRIAL_COLUMNS)]
            .reset_index(drop=True)
            .astype({c: np.int64 for c in TRIAL_COLUMNS[:-1]} | {"split": str})
        )
        table.to_parquet(temporary / "trials.parquet")
        voxels = (
            pd.DataFrame({"voxel": np.arange(n_voxels)})
            if voxels is None
            else voxels.reset_index(drop=True)
        )
        voxels.to_parquet(temporary / "voxels.parquet")
    return folder


def dataset_folder(dataset: str | Path) -> Path:
    """Folder of a prepared dataset: a bare name lies under HOME/data, any other relative path hangs
    on HOME.
    """
    path = Path(dataset).expanduser()
    if path.is_absolute():
        return path
    return HOME / "data" / path if len(path.parts) == 1 else HOME / path


def subject_folder(dataset: str | Path, subj: int) -> Path:
    """Folder of one subject of a prepared dataset."""
    return dataset_folder(dataset) / f"subj{int(subj):02d}"
