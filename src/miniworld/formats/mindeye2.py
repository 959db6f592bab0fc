"""The mini world in the format of MindEye2's files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.data.files import disk_errors, iterate_row_blocks
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.miniworld.formats.mindeye import add_members
from src.readers.mindeye2 import (
    IMAGES,
    INDICES,
    MASKS,
    NEIGHBOURS,
    NORMALISATION,
    SHARED,
    _dataset,
    _image_ids,
    _open,
)
from src.utils import PerceptError, atomic, progress


def write(
    source: str | Path,
    subj: int,
    betas: np.ndarray,
    trials: pd.DataFrame,
    images: np.ndarray,
    image_ids: np.ndarray,
    *,
    voxels: pd.DataFrame | None = None,
    captions: pd.DataFrame | None = None,
    labels: pd.DataFrame | None = None,
    withheld: int = 3,
) -> Path:
    """Write one subject as MindEye2's tars and HDF5 files.

    Args:
        source: folder in which wds/ and the files are made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, voxels) float32, or float16, which makes betas_subj0N.hdf5.
        trials: one row for each row of betas: trial (which becomes its row of the betas), image,
            session, run, repeat, split. Test trials go to new_test, the others to the tar of their
            session; those of split "exclude" are in no tar.
        images: uint8 (n, height, width, 3); they become float16 and are read back exactly.
        image_ids: (n,) the id of each; any whole numbers, since image_ids.csv tells which row is
            which.
        voxels: one row a voxel; its boolean columns become the masks, all of it
            voxels_subj0N.parquet.
        captions: columns image and caption.
        labels: column image and categories.
        withheld: last sessions without trials in the older test split.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    source, name = Path(source), f"subj{subj:02d}"
    check_aligned(
        betas, trials, images, image_ids, ("trial", "image", "session", "run", "repeat", "split")
    )
    if betas.ndim != 2:
        raise PerceptError(f"Betas have shape {betas.shape}: they must be (trials, voxels).")
    numbers = trials["trial"].to_numpy()
    if numbers.min() < 0 or trials["trial"].duplicated().any():
        raise PerceptError(
            "Trial numbers are rows of the betas: they must count from 0, each once."
        )
    ordered = trials.sort_values("trial").reset_index(drop=True)
    with disk_errors(source):
        source.mkdir(parents=True, exist_ok=True)
        coco = _add_images(source, images, image_ids)
        ordered["coco"] = ordered["image"].map(coco)
        _write_betas(source, subj, betas, numbers)
        table = np.full(numbers.max() + 1, -1)
        table[ordered["trial"]] = ordered["coco"]
        _replace_subject(source / INDICES, name, {name: table})
        if voxels is not None:
            regions = {
                f"{name}/{column}": voxels[column].to_numpy()
                for column in voxels
                if voxels[column].dtype == bool
            }
            _replace_subject(source / MASKS, name, regions)
            with atomic(source / f"voxels_{name}.parquet") as temporary:
                voxels.to_parquet(temporary)
        _mark_shared(source / SHARED, ordered, len(coco))
        _write_tars(source / "wds" / name, subj, ordered, withheld)
        write_split(source, ordered)
        write_tables(source, captions, labels)
    return source


def _add_images(source: Path, images: np.ndarray, image_ids: np.ndarray) -> pd.Series:
    """Add images to the file of images, or put them in place of those with their ids: the row of
    each image.
    """
    known = _image_ids(source)
    ids = [] if known is None else known.to_list()
    ids = list(dict.fromkeys([*ids, *map(int, image_ids)]))
    place = pd.Series(range(len(ids)), index=ids)
    with atomic(source / IMAGES) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset("images", (len(ids), 3, *images.shape[1:3]), np.float16)
        if known is not None:
            with _dataset(source / IMAGES, "images") as old:
                if old.shape[1:] != stored.shape[1:]:
                    raise PerceptError(
                        f"Images of {source / IMAGES} are {old.shape[1:]}, these are"
                        f" {stored.shape[1:]}: take another folder."
                    )
                for row in range(len(old)):
                    stored[row] = old[row]
        for image, pixels in zip(image_ids, images, strict=True):
            stored[place[int(image)]] = (pixels.astype(np.float32) / 255).transpose(2, 0, 1)
    with atomic(source / "image_ids.csv") as temporary:
        pd.DataFrame({"coco": place.to_numpy(), "image": ids}).to_csv(temporary, index=False)
    return place


def _write_betas(source: Path, subj: int, betas: np.ndarray, numbers: np.ndarray) -> None:
    """Write the betas of a trial into the row of its number."""
    single, half = (source / name.format(subj=subj) for name in NORMALISATION)
    path, other = (half, single) if betas.dtype == np.float16 else (single, half)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset(
            "betas", (numbers.max() + 1, betas.shape[1]), np.float16 if path == half else np.float32
        )
        order, start = np.argsort(numbers), 0
        if len(numbers) == len(stored):
            for block in iterate_row_blocks(betas[order]):
                stored[start : start + len(block)] = block
                start += len(block)
        else:
            for row in order:
                stored[numbers[row]] = betas[row]
    other.unlink(missing_ok=True)


def _replace_subject(path: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Put the arrays of a subject in place of those it has in a file of all subjects."""
    kept: dict[str, np.ndarray] = {}

    def keep(key: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and key.split("/")[0] != name:
            kept[key] = item[()]

    if path.exists():
        with _open(path) as file:
            file.visititems(keep)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        for key, array in (kept | arrays).items():
            file[key] = array


def _mark_shared(path: Path, trials: pd.DataFrame, n_images: int) -> None:
    """Mark the images of test trials in shared1000.npy; marks of other subjects' images stay."""
    old = np.load(path, allow_pickle=False) if path.exists() else np.zeros(0, bool)
    shared = np.zeros(max(n_images, len(old)), bool)
    shared[: len(old)] = old
    shared[trials["coco"]] = False
    shared[trials.loc[trials["split"] == "test", "coco"]] = True
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, shared, allow_pickle=False)


def _write_tars(root: Path, subj: int, trials: pd.DataFrame, withheld: int) -> None:
    """Write the tars of all sessions and the two of test trials; tars of sessions that there were
    before go.
    """
    sessions = int(trials["session"].max()) + 1
    behav = _behaviour(trials, subj)
    images: dict[int, np.ndarray] = trials.groupby("image").indices  # type: ignore[assignment]
    splits, when = trials["split"], trials["session"]
    parts = {
        f"train/{session}.tar": splits.isin(("train", "val")) & (when == session)
        for session in range(sessions)
    }
    parts |= {
        "test/0.tar": (splits == "test") & (when < sessions - withheld),
        "new_test/0.tar": splits == "test",
    }
    for name, chosen in progress(parts.items(), f"tars of subject {subj}", len(parts)):
        with atomic(root / name) as temporary, tarfile.open(temporary, "w") as tar:
            for number, row in enumerate(np.flatnonzero(chosen).tolist()):
                others = images[trials["image"].iloc[row]]
                add_members(
                    tar, f"sample{number:09d}", {}, _sample(behav, row, others[others != row])
                )
    for path in (root / "train").glob("*.tar"):
        if path.stem.isdigit() and int(path.stem) >= sessions:
            path.unlink()


def _behaviour(trials: pd.DataFrame, subj: int) -> np.ndarray:
    """The columns of behav.npy for all trials, float64 (trials, 17); what the tables do not tell is
    -1.
    """
    behav = np.full((len(trials), 17), -1.0)
    within = trials.groupby(["session", "run"]).cumcount()
    columns = {
        0: trials["coco"],
        1: subj,
        2: trials["session"] + 1,
        3: (trials["run"] + 1).where(trials["run"] >= 0, -1),
        4: within + 1,
    }
    columns |= {5: trials["trial"], 7: trials["repeat"] > 0, 16: trials["split"] == "test"}
    for column, values in columns.items():
        behav[:, column] = values
    return behav


def _sample(behav: np.ndarray, row: int, others: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a trial: its behaviour, and that of the trials before it, after it and of the
    same image, -1 where there are fewer.
    """
    session = np.flatnonzero(behav[max(0, row - 15) : row + 16, 2] == behav[row, 2]) + max(
        0, row - 15
    )
    rows = {
        "past_behav": session[session < row][::-1],
        "future_behav": session[session > row],
        "olds_behav": others,
    }
    arrays = {"behav": behav[row : row + 1]}
    for name, size in NEIGHBOURS.items():
        arrays[name] = np.full((size, behav.shape[1]), -1.0)
        chosen = behav[rows[name][:size]]
        arrays[name][: len(chosen)] = chosen
    return arrays
