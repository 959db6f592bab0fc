"""The mini world in the format of LAION-fMRI."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from src.miniworld.formats.source_data import SourceData, write_split, write_tables
from src.miniworld.formats.voxel_grid import VoxelGrid, choose_small_grid
from src.readers.laion_fmri import SUBJECTS, LaionFolders
from src.utils import PerceptError, atomic, require_extra, write_errors

AFFINE = np.diag([1.8, 1.8, 1.8, 1.0])

NC_REPEATS = 12  # of which the published noise ceiling is the mean

STACK = "task-images_stimuli.h5"


def write(source: str | Path, subj: int, data: SourceData) -> Path:
    """Write one subject; other subjects already there stay.

    Pictures are stored as PNG where the original has JPEG, so that they come back exactly, and
    image_ids.csv beside the metadata says which image each row is. The split `tau` has all images
    but those of the test set in training, and splits.csv says which of them validate.

    Args:
        source: the root of the bucket.
        subj: 1, 3, 5, 6 or 7.
        data: of the subject. Trials need session (from 0) and run, and are written in the order of
            `trial`, which is not stored. Of voxels the Boolean columns (regions) and noise_ceiling
            (single trial, fraction) are kept.

    Returns:
        `source`.

    Raises:
        PerceptError: for another subject, a table of trials that lacks a column, or a full disk.
    """
    if subj not in SUBJECTS:
        raise PerceptError(f"subj is {subj}: LAION-fMRI has {', '.join(map(str, SUBJECTS))}.")
    folders, ordered = LaionFolders(Path(source), subj), data.sort_trials(("session", "run"))
    data.check_two_axes()
    grid = VoxelGrid(choose_small_grid(data.n_voxels), data.n_voxels)
    with write_errors(folders.root):
        name_of_image = _write_stimuli(folders, data)
        names = ordered["image"].map(name_of_image)
        for session, trials in ordered.groupby(ordered["session"].to_numpy() + 1):
            betas = np.asarray(data.betas[trials.index.to_numpy()], np.float32)
            _write_session(folders, session, trials.assign(label=names), betas, grid)
        _write_maps(folders, data, grid)
        _write_bundled_split(folders, ordered.assign(label=names))
        write_split(folders.root, data.trials)
        write_tables(folders.root, data.captions, data.labels)
    return folders.root


def _write_stimuli(folders: LaionFolders, data: SourceData) -> dict[int, str]:
    """Add pictures to the stack, their names to the metadata; the name of each image id."""
    path = folders.metadata.with_name(STACK)
    stored = pd.DataFrame({"image_name": pd.Series(dtype=str), "image": pd.Series(dtype=int)})
    contents: list[np.ndarray] = []
    if path.exists():
        stored["image_name"] = pd.read_csv(folders.metadata)["image_name"]
        stored["image"] = pd.read_csv(folders.image_ids)["image"]
        with h5py.File(path, "r") as file:
            contents = list(file["images"][:])
    is_new = ~np.isin(data.image_ids, stored["image"])
    new_ids = np.asarray(data.image_ids)[is_new]
    new_names = [f"shared_4rep_mini_{image:09d}.png" for image in new_ids]
    added = pd.DataFrame({"image_name": new_names, "image": new_ids})
    table = pd.concat([stored, added], ignore_index=True)
    contents += [_encode_png(pixels) for pixels in data.images[is_new]]
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        bytes_of_image = h5py.vlen_dtype(np.uint8)
        dataset = file.create_dataset("images", (len(contents),), bytes_of_image)
        for row, content in enumerate(contents):
            dataset[row] = content
    metadata = table[["image_name"]].assign(
        dataset="mini", participant="", unique_or_shared="shared", n_reps="4rep"
    )
    ids = pd.DataFrame({"row": range(len(table)), "image": table["image"]})
    for file_path, content_table in ((folders.metadata, metadata), (folders.image_ids, ids)):
        with atomic(file_path) as temporary:
            content_table.to_csv(temporary, index=False)
    return dict(zip(table["image"].tolist(), table["image_name"], strict=True))


def _encode_png(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _write_session(
    folders: LaionFolders, session: Any, trials: pd.DataFrame, betas: np.ndarray, grid: VoxelGrid
) -> None:
    """Write the betas (trials, voxels) of a session, and its table."""
    folder = folders.betas / f"ses-{session:02d}" / "func"
    start = f"{folders.label}_ses-{session:02d}_task-images"
    volumes = np.stack([grid.fill(row, 0) for row in betas], axis=-1)  # (x, y, z, trials)
    name = f"{start}_space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz"
    _save_nifti(folder / name, volumes)
    table = pd.DataFrame({"session": f"ses-{session:02d}", "run": trials["run"] + 1})
    table["beta_index"] = np.arange(len(table))
    table["label"] = trials["label"]
    with atomic(folder / f"{start}_desc-SingletrialBetas_trials.tsv") as temporary:
        table.to_csv(temporary, sep="\t", index=False)


def _write_maps(folders: LaionFolders, data: SourceData, grid: VoxelGrid) -> None:
    """Write mean R2, the noise ceiling of 12 repeats, and the regions with laion-general."""
    start = f"{folders.label}_task-images_space-T1w"
    everywhere = np.ones(data.n_voxels, np.float32)
    r2 = folders.betas / f"{start}_stat-rsquare_desc-R2mean_statmap.nii.gz"
    _save_nifti(r2, grid.fill(20 * everywhere, 0))
    if data.voxels is not None and "noise_ceiling" in data.voxels:
        single = data.voxels["noise_ceiling"].to_numpy()
        mean = NC_REPEATS * single / (NC_REPEATS * single + 1 - single)
        path = folders.betas / f"{start}_desc-Noiseceiling{NC_REPEATS}rep_statmap.nii.gz"
        _save_nifti(path, grid.fill((100 * mean).astype(np.float32), 0))
    regions = {"laion-general": everywhere.astype(np.uint8)}
    for name in data.roi_names:
        regions[name] = data.voxels[name].to_numpy().astype(np.uint8)  # type: ignore[index]
    folder = folders.root / "derivatives" / "rois" / folders.label / "laion"
    for name, mask in regions.items():
        path = folder / f"{folders.label}_space-T1w_res-1pt8_label-{name}_mask.nii.gz"
        _save_nifti(path, grid.fill(mask, 0))


def _write_bundled_split(folders: LaionFolders, trials: pd.DataFrame) -> None:
    """Write the split tau of the subject's own pool."""
    is_test = trials["split"] == "test"
    sides = {"train": trials.loc[~is_test, "label"], "test": trials.loc[is_test, "label"]}
    ids = {f"{side}_ids": sorted(set(labels)) for side, labels in sides.items()}
    content = {
        "name": "tau",
        "pool": folders.label,
        "splitter": "mini",
        "params": {},
        "n_train": len(ids["train_ids"]),
        "n_test": len(ids["test_ids"]),
        "variants": [{"variant_id": 0, **ids}],
    }
    with atomic(folders.root / "splits" / folders.label / "tau.json") as temporary:
        temporary.write_text(json.dumps(content))


def _save_nifti(path: Path, array: np.ndarray) -> None:
    nibabel = require_extra("nibabel", "nsd")
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(nibabel.Nifti1Image(array, AFFINE).to_bytes())
