"""The mini world in the format of THINGS-fMRI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from src.data.files import BLOCK_BYTES, disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.things import FIGSHARE
from src.utils import atomic


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
    concept: str = "kind",
) -> Path:
    """Write one subject in the figshare layout; images are named by their zero-padded ids (.png),
    so that reading gives these ids again.

    Args:
        source: folder in which betas_csv/ and images/ are made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, voxels).
        trials: one row for each row of betas: trial, image, session, run, split. Rows are written
            in the order of `trial`, which is not stored otherwise; validation and excluded images
            become train, and splits.csv tells the difference.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each.
        voxels: one row a voxel: Boolean columns are regions; x, y, z and noise_ceiling (fraction)
            are kept.
        captions, labels: columns image and caption; column image and categories.
        concept: column of `labels` that is the concept; without it each image is a concept of its
            own.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    root, ordered = (
        Path(source),
        check_aligned(
            betas, trials, images, image_ids, ("trial", "image", "session", "run", "split"), voxels
        ),
    )
    concepts = (
        dict(zip(labels["image"], labels[concept], strict=True))
        if labels is not None and concept in labels
        else {}
    )
    stimuli = _stimulus_metadata(ordered, subj, concepts)
    with disk_errors(root):
        responses, seen, about = (
            root / "betas_csv" / name.format(f"{subj:02d}") for name in FIGSHARE
        )
        with atomic(responses) as temporary:
            _write_frame(temporary, betas, ordered.index.to_numpy())
        for path, table in (
            (seen, stimuli),
            (about, _voxel_metadata(voxels, betas.shape[1], subj)),
        ):
            with atomic(path) as temporary:
                table.to_csv(temporary, index=False)
        used = dict(zip(ordered["image"], stimuli["concept"], strict=True))
        for image, pixels in zip(image_ids, images, strict=True):
            if image in used:
                with atomic(root / "images" / used[image] / f"{image:09d}.png") as temporary:
                    Image.fromarray(pixels).save(temporary, "PNG")
        write_split(root, trials)
        write_tables(root, captions, labels)
    return root


def _stimulus_metadata(ordered: pd.DataFrame, subj: int, concepts: dict[int, Any]) -> pd.DataFrame:
    stimuli = pd.DataFrame(
        {
            "trial_type": np.where(ordered["split"] == "test", "test", "train"),
            "session": ordered["session"] + 1,
        }
    )
    stimuli["run"], stimuli["subject_id"], stimuli["trial_id"] = (
        ordered["run"] + 1,
        subj,
        ordered["trial"],
    )
    stimuli["stimulus"] = [f"{image:09d}.png" for image in ordered["image"]]
    stimuli["concept"] = [str(concepts.get(image, f"{image:09d}")) for image in ordered["image"]]
    return stimuli


def _voxel_metadata(voxels: pd.DataFrame | None, n_voxels: int, subj: int) -> pd.DataFrame:
    voxels = (
        pd.DataFrame({"V1": np.ones(n_voxels, bool)})
        if voxels is None
        else voxels.reset_index(drop=True)
    )
    table = pd.DataFrame({"voxel_id": np.arange(n_voxels), "subject_id": subj})
    for axis in "xyz":
        table[f"voxel_{axis}"] = voxels[axis] if axis in voxels else 0
    if "noise_ceiling" in voxels:
        table["nc_singletrial"] = 100 * voxels["noise_ceiling"]
    return table.assign(**voxels.select_dtypes("bool").astype(int))


def _texts(node: h5py.Group | h5py.Dataset, **texts: str) -> None:
    """Attributes as PyTables writes texts: UTF-8 of fixed length."""
    for name, text in texts.items():
        node.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", len(text)))


def _write_frame(path: Path, betas: np.ndarray, order: np.ndarray) -> None:
    """A frame voxel_id, 0, 1, ... (voxels, 1 + trials) as pandas and PyTables store it in fixed
    format.
    """
    n_trials, n_voxels = betas.shape
    items = [str(trial).encode() for trial in range(n_trials)]
    with h5py.File(path, "w") as file:
        _texts(file, CLASS="GROUP", PYTABLES_FORMAT_VERSION="2.1", VERSION="1.0")
        group = file.create_group("ResponseData")
        _texts(
            group,
            CLASS="GROUP",
            VERSION="1.0",
            pandas_type="frame",
            encoding="UTF-8",
            errors="strict",
        )
        _texts(
            group,
            **{
                f"{name}_variety": "regular"
                for name in ("axis0", "axis1", "block0_items", "block1_items")
            },
        )
        group.attrs.update({"ndim": np.int64(2), "nblocks": np.int64(2)})
        group["axis0"], group["axis1"] = np.array([b"voxel_id", *items]), np.arange(n_voxels)
        group["block0_items"], group["block1_items"] = np.array(items), np.array([b"voxel_id"])
        group["block1_values"] = np.arange(n_voxels)[:, None]
        values = group.create_dataset("block0_values", (n_voxels, n_trials), betas.dtype)
        step = max(1, BLOCK_BYTES // (n_trials * betas.dtype.itemsize))
        for start in range(0, n_voxels, step):
            values[start : start + step] = betas[:, start : start + step][order].T
        for name, array in group.items():
            _texts(array, CLASS="ARRAY", FLAVOR="numpy", VERSION="2.4")
            array.attrs["transposed"] = np.uint8(1)
            if not name.endswith("values"):
                _texts(array, kind="integer" if name == "axis1" else "string")
                array.attrs["name"] = np.bytes_(b"N.")  # None, as PyTables pickles it
