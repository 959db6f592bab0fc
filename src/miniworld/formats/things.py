"""The mini world in the format of THINGS-fMRI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES
from src.miniworld.formats.source_data import SourceData, save_png, write_split, write_tables
from src.readers.things import FIGSHARE
from src.utils import atomic, write_errors


def write(source: str | Path, subj: int, data: SourceData, *, concept: str = "kind") -> Path:
    """Write one subject in the figshare layout.

    Images are named by their zero-padded ids (.png), so that reading gives these ids again.

    Args:
        source: folder in which betas_csv/ and images/ are made; other subjects already there stay.
        subj: number of the subject.
        data: of the subject. Trials need session and run; they are written in the order of `trial`,
            which is not stored otherwise. Validation and excluded images become train, and
            splits.csv tells the difference. Of voxels the Boolean columns (regions), x, y, z and
            noise_ceiling (fraction) are kept.
        concept: column of the labels that is the concept; without it each image is a concept of its
            own.

    Returns:
        `source`.

    Raises:
        PerceptError: for a table of trials that lacks a column, or a full disk.
    """
    root, ordered = Path(source), data.sort_trials(("session", "run"))
    concepts: dict[int, Any] = {}
    if data.labels is not None and concept in data.labels:
        concepts = dict(zip(data.labels["image"], data.labels[concept], strict=True))
    stimuli = _stimulus_metadata(ordered, subj, concepts)
    concept_of_image = dict(zip(ordered["image"], stimuli["concept"], strict=True))
    names = [name.format(f"{subj:02d}") for name in FIGSHARE]
    responses_path, stimuli_path, voxels_path = (root / "betas_csv" / name for name in names)
    with write_errors(root):
        with atomic(responses_path) as temporary:
            _write_frame(temporary, data.betas, ordered.index.to_numpy())
        _write_csv(stimuli_path, stimuli)
        _write_csv(voxels_path, _voxel_metadata(data, subj))
        for image, pixels in zip(data.image_ids, data.images, strict=True):
            if image in concept_of_image:
                save_png(root / "images" / concept_of_image[image] / _file_name(image), pixels)
        write_split(root, data.trials)
        write_tables(root, data.captions, data.labels)
    return root


def _file_name(image: int) -> str:
    return f"{image:09d}.png"


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def _stimulus_metadata(ordered: pd.DataFrame, subj: int, concepts: dict[int, Any]) -> pd.DataFrame:
    """One row a trial, in their order."""
    images = ordered["image"]
    return pd.DataFrame(
        {
            "trial_type": np.where(ordered["split"] == "test", "test", "train"),
            "session": ordered["session"] + 1,
            "run": ordered["run"] + 1,
            "subject_id": subj,
            "trial_id": ordered["trial"],
            "stimulus": [_file_name(image) for image in images],
            "concept": [str(concepts.get(image, f"{image:09d}")) for image in images],
        }
    )


def _voxel_metadata(data: SourceData, subj: int) -> pd.DataFrame:
    """One row a voxel; without a table of voxels all of them are V1."""
    voxels = pd.DataFrame({"V1": np.ones(data.n_voxels, bool)})
    if data.voxels is not None:
        voxels = data.voxels.reset_index(drop=True)
    table = pd.DataFrame({"voxel_id": np.arange(data.n_voxels), "subject_id": subj})
    for axis in "xyz":
        table[f"voxel_{axis}"] = voxels[axis] if axis in voxels else 0
    if "noise_ceiling" in voxels:
        table["nc_singletrial"] = 100 * voxels["noise_ceiling"]
    return table.assign(**voxels.select_dtypes("bool").astype(int))


def _write_frame(path: Path, betas: np.ndarray, order: np.ndarray) -> None:
    """Write a frame voxel_id, 0, 1, ... (voxels, 1 + trials) as pandas and PyTables store it.

    Args:
        path: the file.
        betas: (trials, voxels).
        order: (trials,) row of betas of each column.
    """
    n_trials, n_voxels = betas.shape
    items = [str(trial).encode() for trial in range(n_trials)]
    with h5py.File(path, "w") as file:
        _set_texts(file, CLASS="GROUP", PYTABLES_FORMAT_VERSION="2.1", VERSION="1.0")
        group = file.create_group("ResponseData")
        _set_texts(group, CLASS="GROUP", VERSION="1.0", pandas_type="frame")
        _set_texts(group, encoding="UTF-8", errors="strict")
        for name in ("axis0", "axis1", "block0_items", "block1_items"):
            _set_texts(group, **{f"{name}_variety": "regular"})
        group.attrs.update({"ndim": np.int64(2), "nblocks": np.int64(2)})
        group["axis0"], group["axis1"] = np.array([b"voxel_id", *items]), np.arange(n_voxels)
        group["block0_items"], group["block1_items"] = np.array(items), np.array([b"voxel_id"])
        group["block1_values"] = np.arange(n_voxels)[:, None]
        values = group.create_dataset("block0_values", (n_voxels, n_trials), betas.dtype)
        step = max(1, BLOCK_BYTES // (n_trials * betas.dtype.itemsize))
        for start in range(0, n_voxels, step):
            values[start : start + step] = betas[:, start : start + step][order].T
        for name, array in group.items():
            _set_array_attributes(name, array)


def _set_array_attributes(name: str, array: h5py.Dataset) -> None:
    _set_texts(array, CLASS="ARRAY", FLAVOR="numpy", VERSION="2.4")
    array.attrs["transposed"] = np.uint8(1)
    if not name.endswith("values"):
        _set_texts(array, kind="integer" if name == "axis1" else "string")
        array.attrs["name"] = np.bytes_(b"N.")  # None, as PyTables pickles it


def _set_texts(node: h5py.Group | h5py.Dataset, **texts: str) -> None:
    """Set attributes as PyTables writes texts: UTF-8 of fixed length."""
    for name, text in texts.items():
        node.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", len(text)))
