"""The mini world on surfaces, as the Natural Scenes Dataset has them."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.miniworld.formats.source_data import SourceData
from src.readers.nsd_files import NsdFolders
from src.utils import PerceptError, atomic, require_extra

SCALE = 300  # stored integers a percent signal change

LARGEST_BETA = 109  # percent signal change that an int16 can hold

N_OUTSIDE = 3  # vertices of a hemisphere that have no voxel


@dataclass(frozen=True)
class _Hemispheres:
    """Voxels as vertices: the first half on the left, each side after vertices without voxels."""

    n_voxels: int

    def split(self, values: np.ndarray, background: float) -> dict[str, np.ndarray]:
        """Values (..., vertices) of lh and rh, from values (..., voxels)."""
        middle = self.n_voxels // 2
        padding = ((0, 0),) * (values.ndim - 1) + ((N_OUTSIDE, 0),)
        sides = {"lh": values[..., :middle], "rh": values[..., middle:]}
        return {
            side: np.pad(part, padding, constant_values=background) for side, part in sides.items()
        }


def to_scaled_integers(betas: np.ndarray) -> np.ndarray:
    """Betas as NSD stores them in int16: 300 times percent signal change.

    Raises:
        PerceptError: for a beta that is not finite, or too large.
    """
    scaled = np.rint(np.asarray(betas, np.float64) * SCALE)
    if not (np.abs(scaled) <= np.iinfo(np.int16).max).all():
        raise PerceptError(
            f"A beta is not finite or above {LARGEST_BETA} percent signal change, which NSD's int16"
            " cannot hold: leave it out."
        )
    return scaled.astype(np.int16)


def write_surfaces(
    folders: NsdFolders, data: SourceData, ordered: pd.DataFrame, file_format: str
) -> None:
    """Write betas, regions and ncsnr on fsaverage (float32) or the native surface (int16).

    Args:
        folders: of the subject; their space says which surface.
        data: of the subject.
        ordered: its trials in their order; the index is the row of betas.
        file_format: mgh, mgz or hdf5.
    """
    sides = _Hemispheres(data.n_voxels)
    for number, (_, trials) in enumerate(ordered.groupby("session"), 1):
        betas = np.asarray(data.betas[trials.index.to_numpy()], np.float32)
        is_native = file_format == "hdf5"
        stored = to_scaled_integers(betas) if is_native else betas
        for side, rows in sides.split(stored, 0 if is_native else np.nan).items():
            path = folders.betas / f"{side}.betas_session{number:02d}.{file_format}"
            save = _save_native if is_native else _save_mgh
            save(path, rows)
    if data.voxels is not None and "noise_ceiling" in data.voxels:
        ceiling = data.voxels["noise_ceiling"].to_numpy()
        ncsnr = np.sqrt(ceiling / (1 - ceiling)).astype(np.float32)
        for side, values in sides.split(ncsnr, np.nan).items():
            _save_mgh(folders.betas / f"{side}.ncsnr.mgh", values[None])
    _write_labels(folders, data, sides)


def _write_labels(folders: NsdFolders, data: SourceData, sides: _Hemispheres) -> None:
    """Write nsdgeneral, and the regions as the labels of files, with their names in .ctab."""
    label_files = {"nsdgeneral": ["nsdgeneral"]}
    for number, names in enumerate(group_disjoint_rois(data), 1):
        label_files[f"areas-{number}"] = names
    for roi, names in label_files.items():
        labels = np.zeros(data.n_voxels, np.int32)
        if roi == "nsdgeneral":
            labels[:] = 1
        else:
            for label, name in enumerate(names, 1):
                labels[data.voxels[name].to_numpy()] = label  # type: ignore[index]
        for side, values in sides.split(labels, 0).items():
            _save_mgh(folders.labels / f"{side}.{roi}.mgz", values[None])
        lines = [f"{label} {name}\n" for label, name in enumerate(names, 1)]
        with atomic(folders.labels / f"{roi}.mgz.ctab") as temporary:
            temporary.write_text("0 Unknown\n" + "".join(lines))


def group_disjoint_rois(data: SourceData) -> list[list[str]]:
    """Regions in as few groups as keep those that overlap apart."""
    groups: list[list[str]] = []
    occupied: list[np.ndarray] = []  # for each group the voxels (voxels,) of its regions
    for name in data.roi_names:
        if name == "nsdgeneral":
            continue
        is_member = data.voxels[name].to_numpy()  # type: ignore[index]
        for group, voxels in zip(groups, occupied, strict=True):
            if not voxels[is_member].any():
                group.append(name)
                voxels |= is_member
                break
        else:
            groups.append([name])
            occupied.append(is_member.copy())
    return groups


def _save_mgh(path: Path, rows: np.ndarray) -> None:
    """Save rows (trials, vertices) as (vertices, 1, 1, trials), without the last axis for one."""
    nibabel = require_extra("nibabel", "nsd")
    values = np.ascontiguousarray(rows.T)[:, None, None, :]
    if len(rows) == 1:
        values = values[..., 0]
    image = nibabel.MGHImage(values, np.eye(4))
    content = image.to_bytes()
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(content) if path.suffix == ".mgz" else content)


def _save_native(path: Path, rows: np.ndarray) -> None:
    """Save rows int16 (trials, vertices), a chunk a vertex."""
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("betas", data=rows, chunks=(len(rows), 1))
