"""The prepared layout: folders, tables and their checks, and writing one subject."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src import utils
from src.data.files import iterate_row_blocks, write_rows
from src.data.identity import write_preparation
from src.files.ownership import lock_folder, replace_folder
from src.utils import PerceptError, atomic

SPLITS = ("train", "val", "test", "exclude")

TRIAL_COLUMNS = ("trial", "image", "session", "run", "repeat", "split")

REQUIRED_ATTRIBUTES = ("source", "units", "normalisation", "protocol")


# ------------------------------------------------------------------------------------------ folders
def dataset_folder(dataset: str | Path) -> Path:
    """Folder of a prepared dataset.

    A bare name lies under HOME/data, any other relative path hangs on HOME.
    """
    path = Path(dataset).expanduser()
    if path.is_absolute():
        return path
    return utils.HOME / "data" / path if len(path.parts) == 1 else utils.HOME / path


def subject_folder(dataset: str | Path, subj: int) -> Path:
    """Folder of one subject of a prepared dataset."""
    return dataset_folder(dataset) / f"subj{int(subj):02d}"


# ------------------------------------------------------------------------------------------- tables
def check_trials(trials: pd.DataFrame) -> None:
    """Check the table of trials.

    Its columns are trial, image, session, run, repeat (integers) and split (train, val, test or
    exclude). Trials of an image may be excluded one by one.

    Raises:
        PerceptError: naming the missing column, the unknown split, the trial or repeat that occurs
            twice, or the image that lies on both sides of a split.
    """
    missing = [column for column in TRIAL_COLUMNS if column not in trials.columns]
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
    duplicates = trials["trial"][trials["trial"].duplicated()]
    if len(duplicates):
        raise PerceptError(
            f"Trial {duplicates.iloc[0]} is twice in the table of trials: each row must be a trial"
            " of its own."
        )
    repeated = trials[trials.duplicated(["image", "repeat"])]
    if len(repeated):
        row = repeated.iloc[0]
        raise PerceptError(
            f"Image {row['image']} has its repeat {row['repeat']} twice (again in trial"
            f" {row['trial']}): number its repeats 0, 1, 2..."
        )
    _check_sides(trials[trials["split"] != "exclude"])


def _check_sides(trials: pd.DataFrame) -> None:
    """Raise PerceptError if an image lies in two splits."""
    sides = trials.drop_duplicates(["image", "split"])
    mixed = sides[sides["image"].duplicated(keep=False)].sort_values(["image", "trial"])
    if not len(mixed):
        return
    image = mixed["image"].iloc[0]
    rows = mixed[mixed["image"] == image]
    pairs = zip(rows["split"], rows["trial"], strict=True)
    message = f"Image {image} is in " + " and ".join(f"{s} (trial {t})" for s, t in pairs)
    n_more = mixed["image"].nunique() - 1
    if n_more:
        message += f", and {n_more} more images are on two sides"
    raise PerceptError(f"{message}: split by image, never by trial, or mark its trials as exclude.")


def number_repeats(trials: pd.DataFrame) -> pd.Series:
    """Number the repeats of each image, from 0 for its first presentation.

    Returns:
        Repeat of each row; presentations are in the order of column `trial`.
    """
    order = trials["trial"].argsort(kind="stable").to_numpy()
    images = trials["image"].iloc[order]
    return images.groupby(images).cumcount().reindex(trials.index)


def write_image_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table about images (captions or labels, with a column `image`) as parquet.

    Rows of other images already there are kept. Processes that write it at once take turns.

    Raises:
        PerceptError: if there is no column `image`, or the disk is full.
    """
    path = Path(path)
    if "image" not in table.columns:
        raise PerceptError(
            f"The table for {path.name} has no column image (it has {list(table.columns)})."
        )
    with lock_folder(path, f"writing {path.name}", wait=True, as_sibling=True):
        if path.exists():
            old = pd.read_parquet(path)
            remaining = old[~old["image"].isin(table["image"])]
            table = pd.concat([remaining, table], ignore_index=True)
        table = table.sort_values("image", kind="stable").reset_index(drop=True)
        with atomic(path) as temporary:
            table.to_parquet(temporary)


# ------------------------------------------------------------------------------------- one subject
class _BetaCheck:
    """Checks blocks of betas, brings them to their dtype and adds them to a checksum.

    Args:
        trials: table of trials.
        n_voxels: number of voxels of the table of voxels, None where there is none.
    """

    def __init__(self, trials: pd.DataFrame, n_voxels: int | None):
        self.trial_numbers, self.n_voxels = trials["trial"].to_numpy(), n_voxels
        self.digest = hashlib.blake2b(digest_size=16)

    def __call__(self, block: np.ndarray, first_row: int) -> np.ndarray:
        """Return a block (rows, voxels) or (rows, x, y, z) as float16 or float32."""
        self._check_form(block)
        if block.dtype != np.float16:
            block = block.astype(np.float32, copy=False)
        block = np.ascontiguousarray(block)
        self._check_finite(block.reshape(len(block), -1), first_row)
        self.digest.update(block.data)
        return block

    def _check_form(self, block: np.ndarray) -> None:
        if not np.issubdtype(block.dtype, np.number) or np.iscomplexobj(block):
            raise PerceptError(f"Betas must be numbers, they are {block.dtype}.")
        if block.ndim not in (2, 4):
            raise PerceptError(
                "Betas must be (trials, voxels) or (trials, x, y, z), a block of them has shape "
                f"{block.shape}."
            )
        n_voxels = int(np.prod(block.shape[1:]))
        if self.n_voxels is not None and n_voxels != self.n_voxels:
            raise PerceptError(
                f"Betas have {n_voxels} voxels, the table of voxels has {self.n_voxels} rows."
            )

    def _check_finite(self, betas: np.ndarray, first_row: int) -> None:
        finite = np.isfinite(betas)
        if finite.all():
            return
        position, voxel = np.argwhere(~finite)[0]
        row = first_row + position
        trial = self.trial_numbers[row] if row < len(self.trial_numbers) else row
        raise PerceptError(
            f"The beta of trial {trial} (row {row}), voxel {voxel} is {betas[position, voxel]}: "
            "leave out such voxels (the option bad_voxels=drop of a reader) or trials, or mend"
            " them, before preparing the data."
        )


def _check_attributes(attributes: dict[str, Any]) -> None:
    missing = [name for name in REQUIRED_ATTRIBUTES if not attributes.get(name)]
    if missing:
        raise PerceptError(
            f"Betas need the attributes {list(REQUIRED_ATTRIBUTES)}, of which {missing} are"
            " missing."
        )
    for name, value in attributes.items():
        if not isinstance(value, str | int | float | np.integer | np.floating):
            raise PerceptError(
                f"Attributes are texts and numbers, {name} is a {type(value).__name__}."
            )


def write_subject(
    folder: str | Path,
    betas: np.ndarray | Iterable[np.ndarray],
    trials: pd.DataFrame,
    voxels: pd.DataFrame | None,
    attributes: dict[str, Any],
    write_beside: Callable[[], None] | None = None,
) -> Path:
    """Write one subject: betas.h5, trials.parquet, voxels.parquet.

    Where `read_source` has called the reader, also prepared.json, which says how.

    The folder appears, or is replaced, only when all of it is written.

    Args:
        folder: data/<dataset>/subjNN.
        betas: (trials, voxels) or (trials, x, y, z), or an iterable of blocks of these rows;
            float16 is kept, anything else becomes float32.
        trials: one row for each row of betas, see `check_trials`.
        voxels: one row a voxel (ROI flags, x y z, noise ceiling), or None where nothing is known.
        attributes: texts and numbers; source, units, normalisation and protocol are required.
            checksum, n_trials, n_voxels are added.
        write_beside: writes what belongs to the subject outside its folder; called when all of the
            folder is written, before it gets its place, so that neither appears without the other
            if one is refused.

    Returns:
        The folder.

    Raises:
        PerceptError: for a bad table, a NaN or infinite beta (naming its trial and voxel), wrong
            shapes, or a full disk.
    """
    folder = Path(folder)
    check_trials(trials)
    _check_attributes(attributes)
    check = _BetaCheck(trials, None if voxels is None else len(voxels))
    with replace_folder(folder) as temporary:
        path = temporary / "betas.h5"
        shape = write_rows(path, "betas", iterate_row_blocks(betas), len(trials), check)
        n_voxels = int(np.prod(shape[1:]))
        counted = {
            "checksum": check.digest.hexdigest(),
            "n_trials": shape[0],
            "n_voxels": n_voxels,
        }
        with h5py.File(path, "r+") as file:
            file["betas"].attrs.update(attributes | counted)
        if voxels is None:
            voxels = pd.DataFrame({"voxel": np.arange(n_voxels)})
        dtypes = dict.fromkeys(TRIAL_COLUMNS[:-1], np.int64) | {"split": str}
        table = trials[list(TRIAL_COLUMNS)].reset_index(drop=True).astype(dtypes)
        table.to_parquet(temporary / "trials.parquet")
        voxels.reset_index(drop=True).to_parquet(temporary / "voxels.parquet")
        write_preparation(temporary)
        if write_beside is not None:
            write_beside()
    return folder
