"""The mini world in the format of BOLD5000."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from PIL import Image

from src.data.files import disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.bold5000 import BETAS, PRESENTED, _participant
from src.utils import PerceptError, atomic


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
) -> Path:
    """Write one subject as volumes: session files, brain mask, masks of regions, imgnames, pictures
    named by their ids, and splits.csv.

    Args:
        source: folder to write in; other subjects already there stay.
        subj: 1 to 4.
        betas: (trials, voxels); stored as float32 in a cube of 2 mm voxels, in this order (x
            fastest).
        trials: one row for each row of betas: trial, image, session (from 0, without gaps, in the
            order of trial), split. Runs are not stored.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each.
        voxels: table of voxels; its Boolean columns become masks of regions (LO comes back as LOC),
            left where column x is below 0.
        captions: columns image and caption.
        labels: column image and categories.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    name, root = _participant(subj), Path(source)
    ordered = check_aligned(
        betas, trials, images, image_ids, ("trial", "image", "session", "split"), voxels
    )
    session = ordered["session"].to_numpy()
    if session[0] != 0 or not np.isin(np.diff(session), (0, 1)).all():
        raise PerceptError(
            "Sessions must count from 0 without gaps in the order of the trials, as the session"
            " files do: number them so."
        )
    with disk_errors(root):
        _write_volumes(root, name, betas, ordered)
        _write_masks(root, name, betas.shape[1], voxels)
        with atomic(root / f"{name}_imgnames.txt") as temporary:
            temporary.write_text("".join(f"{image}.png\n" for image in ordered["image"]))
        for pixels, image in zip(images, image_ids, strict=True):
            with atomic(
                root / "BOLD5000_Stimuli" / "Scene_Stimuli" / PRESENTED / "Scene" / f"{image}.png"
            ) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
        write_split(root, trials)
        write_tables(root, captions, labels)
    return root


def _side(n_voxels: int) -> int:
    """Side of the cube that holds so many voxels."""
    return int(np.ceil(np.cbrt(n_voxels)))


def _save(path: Path, flat: np.ndarray, side: int) -> None:
    """Save (volumes, side ** 3) or (side ** 3,) as .nii.gz, x fastest."""
    volume = flat.T.reshape((side, side, side, *flat.shape[:-1]), order="F")
    image = nibabel.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0]))
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(image.to_bytes())


def _write_volumes(root: Path, name: str, betas: np.ndarray, ordered: pd.DataFrame) -> None:
    side = _side(betas.shape[1])
    groups = list(ordered.groupby("session"))
    for number, (_, rows) in enumerate(groups, 1):
        flat = np.zeros((len(rows), side**3), np.float32)
        flat[:, : betas.shape[1]] = betas[rows.index.to_numpy()]
        _save(root / f"{name}_{BETAS}_ses-{number:02d}.nii.gz", flat, side)
    for old in root.glob(f"{name}_{BETAS}_ses-*.nii.gz"):
        if int(old.name.removesuffix(".nii.gz").rsplit("-", 1)[1]) > len(groups):
            old.unlink()


def _write_masks(root: Path, name: str, n_voxels: int, voxels: pd.DataFrame | None) -> None:
    side = _side(n_voxels)

    def save(path: Path, member: np.ndarray) -> None:
        mask = np.zeros(side**3, np.uint8)
        mask[:n_voxels] = member
        _save(path, mask, side)

    save(root / f"{name}_brainmask.nii.gz", np.ones(n_voxels, bool))
    folder = root / f"sub-{name}"
    for old in folder.glob(f"sub-{name}_mask-*.nii.gz"):
        old.unlink()
    if voxels is not None:
        left = voxels["x"].to_numpy() < 0 if "x" in voxels else np.ones(n_voxels, bool)
        for region in voxels.select_dtypes("bool").columns:
            for side_name, half in (("LH", left), ("RH", ~left)):
                save(
                    folder / f"sub-{name}_mask-{side_name}{region}.nii.gz",
                    voxels[region].to_numpy() & half,
                )
