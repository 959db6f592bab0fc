"""The mini world in the format of BOLD5000."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd

from src.miniworld.formats.source_data import SourceData, save_png, write_split, write_tables
from src.readers.bold5000 import BETAS, IMAGE_LIST, PRESENTED, subject_name
from src.utils import PerceptError, atomic, require_extra, write_errors


def write(source: str | Path, subj: int, data: SourceData) -> Path:
    """Write one subject as volumes: session files, masks, list of images, images, splits.csv.

    Args:
        source: folder to write in; other subjects already there stay.
        subj: 1 to 4.
        data: of the subject. Betas are stored as float32 in a cube of 2 mm voxels, in this order
            (x fastest). Trials need session, from 0, without gaps, in the order of trial; runs are
            not stored. Boolean columns of voxels become masks of regions (LO comes back as LOC),
            left where column x is below 0. Images are named by their ids.

    Returns:
        `source`.

    Raises:
        PerceptError: for another subject, sessions with gaps, or a full disk.
    """
    name, root = subject_name(subj), Path(source)
    ordered = data.sort_trials(("session",))
    session = ordered["session"].to_numpy()
    is_step = np.isin(np.diff(session), (0, 1))
    if session[0] != 0 or not is_step.all():
        raise PerceptError(
            "Sessions must count from 0 without gaps in the order of the trials, as the session"
            " files do: number them so."
        )
    images_folder = root / "BOLD5000_Stimuli" / "Scene_Stimuli" / PRESENTED / "Scene"
    with write_errors(root):
        _write_sessions(root, name, data.betas, ordered)
        _write_masks(root, name, data)
        with atomic(root / IMAGE_LIST.format(name)) as temporary:
            temporary.write_text("".join(f"{image}.png\n" for image in ordered["image"]))
        for pixels, image in zip(data.images, data.image_ids, strict=True):
            save_png(images_folder / f"{image}.png", pixels)
        write_split(root, data.trials)
        write_tables(root, data.captions, data.labels)
    return root


def _cube_side(n_voxels: int) -> int:
    """Side of the cube that holds so many voxels."""
    return int(np.ceil(np.cbrt(n_voxels)))


def _save_nifti(path: Path, flat: np.ndarray, side: int) -> None:
    """Save (volumes, side ** 3) or (side ** 3,) as .nii.gz, x fastest."""
    nibabel = require_extra("nibabel", "nsd")
    volume = flat.T.reshape((side, side, side, *flat.shape[:-1]), order="F")
    image = nibabel.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0]))
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(image.to_bytes())


def _write_sessions(root: Path, name: str, betas: np.ndarray, ordered: pd.DataFrame) -> None:
    """Write one file a session; files of later sessions that were there before go."""
    n_voxels = betas.shape[1]
    side = _cube_side(n_voxels)
    groups = list(ordered.groupby("session"))
    for number, (_, rows) in enumerate(groups, 1):
        flat = np.zeros((len(rows), side**3), np.float32)
        flat[:, :n_voxels] = betas[rows.index.to_numpy()]
        _save_nifti(root / f"{name}_{BETAS}_ses-{number:02d}.nii.gz", flat, side)
    for stale in root.glob(f"{name}_{BETAS}_ses-*.nii.gz"):
        number = int(stale.name.removesuffix(".nii.gz").rsplit("-", 1)[1])
        if number > len(groups):
            stale.unlink()


def _write_masks(root: Path, name: str, data: SourceData) -> None:
    """Write the brain mask, and a mask for each region and hemisphere."""
    _save_mask(root / f"{name}_brainmask.nii.gz", np.ones(data.n_voxels, bool))
    folder = root / f"sub-{name}"
    for stale in folder.glob(f"sub-{name}_mask-*.nii.gz"):
        stale.unlink()
    if data.voxels is None:
        return
    is_left = np.ones(data.n_voxels, bool)
    if "x" in data.voxels:
        is_left = data.voxels["x"].to_numpy() < 0
    for region in data.roi_names:
        is_member = data.voxels[region].to_numpy()
        _save_mask(folder / f"sub-{name}_mask-LH{region}.nii.gz", is_member & is_left)
        _save_mask(folder / f"sub-{name}_mask-RH{region}.nii.gz", is_member & ~is_left)


def _save_mask(path: Path, is_member: np.ndarray) -> None:
    side = _cube_side(len(is_member))
    mask = np.zeros(side**3, np.uint8)
    mask[: len(is_member)] = is_member
    _save_nifti(path, mask, side)
