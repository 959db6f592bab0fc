"""The mini world as BIDS derivatives: single-trial betas, events, masks and pictures."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.miniworld.formats.source_data import SourceData, save_png, write_split, write_tables
from src.miniworld.formats.voxel_grid import VoxelGrid, choose_small_grid
from src.utils import PerceptError, atomic, require_extra, write_errors

FORMATS = ("nii.gz", "func.gii", "glmsingle")

AFFINE = np.diag([1.8, 1.8, 1.8, 1.0])

GLMSINGLE = "TYPED_FITHRF_GLMDENOISE_RR.hdf5"


@dataclass(frozen=True)
class _Folders:
    """Where the files of a subject lie."""

    root: Path
    subj: int

    @property
    def label(self) -> str:
        return f"sub-{self.subj:02d}"

    def session(self, kind: Path, session: Any) -> Path:
        """Folder of a session below the raw data or a derivative."""
        return self.root / kind / self.label / f"ses-{session:02d}" / "func"

    def name(self, session: Any, rest: str) -> str:
        """A file name of a session, with further entities, suffix and ending."""
        return f"{self.label}_ses-{session:02d}_task-images_{rest}"

    @property
    def regions(self) -> Path:
        return self.root / "derivatives" / "rois" / self.label


def write(source: str | Path, subj: int, data: SourceData, *, file_format: str = "nii.gz") -> Path:
    """Write one subject; other subjects already there stay.

    Images are named by their zero-padded ids (.png), so that reading gives these ids again.

    Args:
        source: folder with stimuli/, sub-XX/ (events, one table a run) and derivatives/.
        subj: number of the subject.
        data: of the subject. Trials need session and run, and are written in the order of `trial`,
            which is not stored. Of voxels the Boolean columns (regions) are kept.
        file_format: nii.gz (4D, a volume a trial), func.gii (voxels as vertices, the first half in
            the left hemisphere) or glmsingle (its .hdf5, a folder a session).

    Returns:
        `source`.

    Raises:
        PerceptError: for a table of trials that lacks a column, or a full disk.
    """
    if file_format not in FORMATS:
        raise PerceptError(f"file_format is {file_format!r}: choose one of {', '.join(FORMATS)}.")
    folders, ordered = _Folders(Path(source), subj), data.sort_trials(("session", "run"))
    data.check_two_axes()
    grid = VoxelGrid(choose_small_grid(data.n_voxels), data.n_voxels)
    with write_errors(folders.root):
        for session, trials in ordered.groupby(ordered["session"].to_numpy() + 1):
            _write_events(folders, session, trials)
            betas = np.asarray(data.betas[trials.index.to_numpy()], np.float32)
            _write_betas(folders, session, betas, grid, file_format)
        for name in data.roi_names:
            mask = data.voxels[name].to_numpy()  # type: ignore[index]
            _write_region(folders, name, mask.astype(np.int16), grid, file_format)
        is_shown = np.isin(data.image_ids, ordered["image"])
        for image, pixels in zip(data.image_ids[is_shown], data.images[is_shown], strict=True):
            save_png(folders.root / "stimuli" / _file_name(image), pixels)
        _write_json(folders.root / "dataset_description.json", {"Name": "mini world"})
        write_split(folders.root, data.trials)
        write_tables(folders.root, data.captions, data.labels)
    return folders.root


def _file_name(image: int) -> str:
    return f"{image:09d}.png"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"BIDSVersion": "1.10.0"} | content))


def _write_events(folders: _Folders, session: Any, trials: pd.DataFrame) -> None:
    """One table a run, with a blank trial at its end that has no volume."""
    for run, rows in trials.groupby(trials["run"].to_numpy() + 1):
        names = [_file_name(image) for image in rows["image"]]
        table = pd.DataFrame({"onset": 4.0 * np.arange(len(names) + 1), "duration": 3.0})
        table["trial_type"] = ["image"] * len(names) + ["blank"]
        table["stim_file"] = [*names, "n/a"]
        folder = folders.session(Path(), session)
        with atomic(folder / folders.name(session, f"run-{run}_events.tsv")) as temporary:
            table.to_csv(temporary, sep="\t", index=False)


def _write_betas(
    folders: _Folders, session: Any, betas: np.ndarray, grid: VoxelGrid, file_format: str
) -> None:
    """Write the betas (trials, voxels) of a session."""
    folder = folders.session(Path("derivatives/betas"), session)
    volumes = np.stack([grid.fill(row, 0) for row in betas], axis=-1)  # (x, y, z, trials)
    if file_format == "glmsingle":
        with atomic(folder / GLMSINGLE) as temporary, h5py.File(temporary, "w") as file:
            file["betasmd"] = volumes
    elif file_format == "nii.gz":
        name = folders.name(session, "space-T1w_stat-effect_desc-betas_statmap.nii.gz")
        _save_nifti(folder / name, volumes)
    else:
        for side, part in _halve(betas.T).items():
            name = folders.name(session, f"hemi-{side}_space-fsnative_desc-betas.func.gii")
            _save_gifti(folder / name, list(np.ascontiguousarray(part.T)))


def _write_region(
    folders: _Folders, name: str, mask: np.ndarray, grid: VoxelGrid, file_format: str
) -> None:
    """Write the mask (voxels,) of a region."""
    start = f"{folders.label}_"
    if file_format != "func.gii":
        path = folders.regions / f"{start}space-T1w_label-{name}_mask.nii.gz"
        _save_nifti(path, grid.fill(mask, 0))
        return
    for side, part in _halve(mask).items():
        end = f"space-fsnative_label-{name}_mask.func.gii"
        _save_gifti(folders.regions / f"{start}hemi-{side}_{end}", [part.astype(np.float32)])


def _halve(values: np.ndarray) -> dict[str, np.ndarray]:
    """The values (voxels, ...) of each hemisphere."""
    middle = len(values) // 2
    return {"L": values[:middle], "R": values[middle:]}


def _save_nifti(path: Path, array: np.ndarray) -> None:
    nibabel = require_extra("nibabel", "nsd")
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(nibabel.Nifti1Image(array, AFFINE).to_bytes())


def _save_gifti(path: Path, arrays: list[np.ndarray]) -> None:
    nibabel = require_extra("nibabel", "nsd")
    data = [nibabel.gifti.GiftiDataArray(array, "NIFTI_INTENT_NONE") for array in arrays]
    with atomic(path) as temporary:
        temporary.write_bytes(nibabel.GiftiImage(darrays=data).to_xml())
