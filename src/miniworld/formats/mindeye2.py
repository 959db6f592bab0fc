"""The mini world in the format of MindEye2's files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.data.files import iterate_row_blocks
from src.miniworld.formats.mindeye import add_members
from src.miniworld.formats.source_data import SourceData, write_split, write_tables
from src.readers.hdf5 import open_dataset, open_h5
from src.readers.mindeye2 import (
    IMAGE_IDS,
    IMAGES,
    INDICES,
    MASKS,
    NORMALISATION,
    SHARED,
    load_image_ids,
)
from src.utils import PerceptError, atomic, progress, write_errors

# rows of the arrays about other trials
NEIGHBOURS = {"past_behav": 15, "future_behav": 15, "olds_behav": 3}


def write(
    source: str | Path,
    subj: int,
    data: SourceData,
    *,
    withheld: int = 3,
) -> Path:
    """Write one subject as MindEye2's tars and HDF5 files.

    Args:
        source: folder in which wds/ and the files are made; other subjects already there stay.
        subj: number of the subject.
        data: of the subject. Betas are (trials, voxels) float32, or float16, which makes
            betas_subj0N.hdf5; trial becomes their row. Trials need session, run and repeat; test
            trials go to new_test, the others to the tar of their session, those of split "exclude"
            to none. Images become float16 and are read back exactly; their ids are any whole
            numbers, since image_ids.csv tells which row is which. Boolean columns of voxels become
            the masks, all of it voxels_subj0N.parquet.
        withheld: last sessions without trials in the older test split.

    Returns:
        `source`.

    Raises:
        PerceptError: for betas or trial numbers that do not fit the format, or a full disk.
    """
    source, name = Path(source), f"subj{subj:02d}"
    ordered = data.sort_trials(("session", "run", "repeat")).reset_index(drop=True)
    data.check_two_axes()
    if ordered["trial"].min() < 0 or ordered["trial"].duplicated().any():
        raise PerceptError(
            "Trial numbers are rows of the betas: they must count from 0, each once."
        )
    with write_errors(source):
        source.mkdir(parents=True, exist_ok=True)
        row_of_image = _add_images(source, data.images, data.image_ids)
        ordered["coco"] = ordered["image"].map(row_of_image)
        _write_betas(source, subj, data.betas, data.trials["trial"].to_numpy())
        image_of_trial = np.full(ordered["trial"].max() + 1, -1)
        image_of_trial[ordered["trial"]] = ordered["coco"]
        _replace_subject(source / INDICES, name, {name: image_of_trial})
        if data.voxels is not None:
            masks = {f"{name}/{roi}": data.voxels[roi].to_numpy() for roi in data.roi_names}
            _replace_subject(source / MASKS, name, masks)
            with atomic(source / f"voxels_{name}.parquet") as temporary:
                data.voxels.to_parquet(temporary)
        _mark_shared(source / SHARED, ordered, len(row_of_image))
        _write_tars(source / "wds" / name, subj, ordered, withheld)
        write_split(source, ordered)
        write_tables(source, data.captions, data.labels)
    return source


def _add_images(source: Path, images: np.ndarray, image_ids: np.ndarray) -> pd.Series:
    """Add images to the file of images, or put them in place of those with their ids.

    Returns:
        Row of each image id, (images,) of all that are in the file then.
    """
    stored_ids = load_image_ids(source)
    ids = [] if stored_ids is None else stored_ids.to_list()
    ids = list(dict.fromkeys([*ids, *map(int, image_ids)]))
    row_of_image = pd.Series(range(len(ids)), index=ids)
    with atomic(source / IMAGES) as temporary, h5py.File(temporary, "w") as file:
        shape = (len(ids), 3, *images.shape[1:3])
        stored = file.create_dataset("images", shape, np.float16)
        if stored_ids is not None:
            _copy_images(source / IMAGES, stored)
        for image, pixels in zip(image_ids, images, strict=True):
            scaled = pixels.astype(np.float32) / 255
            stored[row_of_image[int(image)]] = scaled.transpose(2, 0, 1)
    with atomic(source / IMAGE_IDS) as temporary:
        table = pd.DataFrame({"coco": row_of_image.to_numpy(), "image": ids})
        table.to_csv(temporary, index=False)
    return row_of_image


def _copy_images(path: Path, target: h5py.Dataset) -> None:
    """Copy all images of a file to the first rows of a dataset."""
    with open_dataset(path, "images") as stored:
        if stored.shape[1:] != target.shape[1:]:
            raise PerceptError(
                f"Images of {path} are {stored.shape[1:]}, these are {target.shape[1:]}: take"
                " another folder."
            )
        for row in range(len(stored)):
            target[row] = stored[row]


def _write_betas(source: Path, subj: int, betas: np.ndarray, numbers: np.ndarray) -> None:
    """Write the betas of a trial into the row of its number."""
    single, half = (source / name.format(subj=subj) for name in NORMALISATION)
    is_half = betas.dtype == np.float16
    path, other = (half, single) if is_half else (single, half)
    dtype = np.float16 if is_half else np.float32
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset("betas", (numbers.max() + 1, betas.shape[1]), dtype)
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
    remaining: dict[str, np.ndarray] = {}

    def collect(key: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and key.split("/")[0] != name:
            remaining[key] = item[()]

    if path.exists():
        with open_h5(path) as file:
            file.visititems(collect)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        for key, array in (remaining | arrays).items():
            file[key] = array


def _mark_shared(path: Path, trials: pd.DataFrame, n_images: int) -> None:
    """Mark the images of test trials in shared1000.npy; marks of other subjects' images stay."""
    stored = np.load(path, allow_pickle=False) if path.exists() else np.zeros(0, bool)
    is_shared = np.zeros(max(n_images, len(stored)), bool)
    is_shared[: len(stored)] = stored
    is_shared[trials["coco"]] = False
    is_shared[trials.loc[trials["split"] == "test", "coco"]] = True
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, is_shared, allow_pickle=False)


def _write_tars(root: Path, subj: int, trials: pd.DataFrame, withheld: int) -> None:
    """Write the tars of all sessions and the two of test trials; stale tars of sessions go."""
    n_sessions = int(trials["session"].max()) + 1
    behaviour = _behaviour(trials, subj)
    rows_of_image: dict[int, np.ndarray] = trials.groupby("image").indices  # type: ignore[assignment]
    split, session = trials["split"], trials["session"]
    is_train, is_test = split.isin(("train", "val")), split == "test"
    parts = {f"train/{number}.tar": is_train & (session == number) for number in range(n_sessions)}
    parts["test/0.tar"] = is_test & (session < n_sessions - withheld)
    parts["new_test/0.tar"] = is_test
    for name, is_part in progress(parts.items(), f"tars of subject {subj}", len(parts)):
        with atomic(root / name) as temporary, tarfile.open(temporary, "w") as tar:
            for number, row in enumerate(np.flatnonzero(is_part).tolist()):
                same_image = rows_of_image[trials["image"].iloc[row]]
                arrays = _sample_arrays(behaviour, row, same_image[same_image != row])
                add_members(tar, f"sample{number:09d}", {}, arrays)
    for path in (root / "train").glob("*.tar"):
        if path.stem.isdigit() and int(path.stem) >= n_sessions:
            path.unlink()


def _behaviour(trials: pd.DataFrame, subj: int) -> np.ndarray:
    """The columns of behav.npy for all trials, float64 (trials, 17); -1 for what is unknown."""
    behaviour = np.full((len(trials), 17), -1.0)
    columns = {
        0: trials["coco"],
        1: subj,
        2: trials["session"] + 1,
        3: (trials["run"] + 1).where(trials["run"] >= 0, -1),
        4: trials.groupby(["session", "run"]).cumcount() + 1,
        5: trials["trial"],
        7: trials["repeat"] > 0,
        16: trials["split"] == "test",
    }
    for column, values in columns.items():
        behaviour[:, column] = values
    return behaviour


def _sample_arrays(
    behaviour: np.ndarray, row: int, same_image: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of a trial: its behaviour, and that of its neighbours, -1 where there are fewer.

    Args:
        behaviour: of all trials.
        row: of the trial.
        same_image: rows of the other trials of its image.
    """
    first = max(0, row - 15)
    is_same_session = behaviour[first : row + 16, 2] == behaviour[row, 2]
    session_rows = np.flatnonzero(is_same_session) + first
    rows = {
        "past_behav": session_rows[session_rows < row][::-1],
        "future_behav": session_rows[session_rows > row],
        "olds_behav": same_image,
    }
    arrays = {"behav": behaviour[row : row + 1]}
    for name, size in NEIGHBOURS.items():
        neighbours = behaviour[rows[name][:size]]
        arrays[name] = np.full((size, behaviour.shape[1]), -1.0)
        arrays[name][: len(neighbours)] = neighbours
    return arrays
