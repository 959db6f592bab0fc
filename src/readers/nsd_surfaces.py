"""NSD's betas on cortical surfaces: fsaverage, and the subject's own (nativesurface).

- fsaverage: {lh,rh}.betas_sessionNN.mgh, float32 (163842, 1, 1, trials), percent signal change as
  it is (nothing is divided by 300), NaN where there are no valid data.
- nativesurface: {lh,rh}.betas_sessionNN.hdf5, `betas` int16 (trials, vertices) of percent signal
  change x 300, a chunk a vertex; where there are no valid data it is 0.
- Beside them {lh,rh}.ncsnr.mgh. Regions are {lh,rh}.<roi>.mgz with their names in <roi>.mgz.ctab,
  below nsddata/freesurfer/{fsaverage,subjAA}/label. Those that were drawn by subject
  (prf-visualrois, floc-*) are on the native surface only: for fsaverage they are looked up with
  nsddata/ppdata/subjAA/transforms/{lh,rh}.white-to-fsaverage.mgz (vertex numbers from 1), where
  that is there.

Columns are the vertices of the left hemisphere and then of the right, each in its order. A vertex
that is NaN, or does not vary, in a session is 0 in it and is counted in flat_sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.files.foreign import read_errors
from src.readers.common import (
    check_rois,
    list_files,
    make_roi_columns,
    parse_name_list,
    to_integers,
)
from src.readers.hdf5 import open_dataset
from src.readers.nsd_betas import GAP, SCALE
from src.readers.nsd_files import SURFACES, NsdFolders, find_session_files
from src.readers.nsd_voxels import add_labels, load_label_names
from src.readers.places import Places, load_map
from src.readers.trial_files import HemisphereFiles, TrialFile, open_trials
from src.readers.volumes import open_nifti
from src.utils import PerceptError

SIDES = ("lh", "rh")

ALL_VERTICES = "all"


@dataclass(frozen=True)
class SurfaceSession:
    """The two files of a session's betas.

    Attributes:
        path: of the left hemisphere.
        session: its number, from 1.
        format: mgh, mgz or hdf5.
        betas: of both hemispheres, side by side.
    """

    path: Path
    session: int
    format: str
    betas: TrialFile

    @property
    def n_trials(self) -> int:
        """Trials of the session."""
        return self.betas.n_trials


@dataclass(frozen=True)
class NativeFile(TrialFile):
    """Betas of one hemisphere on the native surface, of which only the vertices asked for are read.

    Attributes:
        is_scaled: whether values are integers of percent signal change x 300.
    """

    path: Path
    n_trials: int
    places: Places
    is_scaled: bool

    @classmethod
    def open(cls, path: Path) -> NativeFile:
        """Read the header of a file.

        Raises:
            PerceptError: if it is damaged, or holds something else than betas.
        """
        with open_dataset(path, "betas", "betas of a hemisphere") as stored:
            shape, dtype = stored.shape, stored.dtype
        if len(shape) != 2 or not (dtype == np.int16 or dtype.kind == "f"):
            raise PerceptError(
                f"{path} holds {dtype} {shape}: betas of the native surface are int16 (trials,"
                " vertices), percent signal change x 300."
            )
        return cls(path, shape[0], Places((shape[1],)), dtype == np.int16)

    def iterate(self, columns: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
        """See `TrialFile.iterate`."""
        with read_errors(self.path):
            selected = self._load(columns)
        for start in range(0, self.n_trials, n_rows):
            block = selected[start : start + n_rows].astype(np.float32)
            yield block / SCALE if self.is_scaled else block

    def _load(self, columns: np.ndarray) -> np.ndarray:
        """The stored numbers (trials, columns), read in stretches of vertices that lie close."""
        breaks = np.flatnonzero(np.diff(columns) > GAP) + 1
        with h5py.File(self.path, "r") as file:
            stored = file["betas"]
            selected = np.empty((self.n_trials, len(columns)), stored.dtype)
            position = 0
            for stretch in np.split(columns, breaks):
                if not len(stretch):
                    continue
                block = stored[:, stretch[0] : stretch[-1] + 1]
                stop = position + len(stretch)
                selected[:, position:stop] = block[:, stretch - stretch[0]]
                position = stop
        return selected


def open_surface_sessions(
    folders: NsdFolders, numbers: list[int], file_format: str
) -> list[SurfaceSession]:
    """Open the betas of some sessions for their shape.

    Raises:
        PerceptError: for a missing or damaged file, or hemispheres that do not fit each other.
    """
    paths = [
        find_session_files(folders.betas, numbers, file_format, SURFACES[folders.space], side)
        for side in SIDES
    ]
    sessions = []
    for number in numbers:
        files = [_open_hemisphere(side_paths[number]) for side_paths in paths]
        betas = HemisphereFiles.join(files)
        path = paths[0][number]
        sessions.append(SurfaceSession(path, number, path.name.split(".")[-1], betas))
    for session in sessions:
        if session.betas.places.size != sessions[0].betas.places.size:
            raise PerceptError(
                f"{session.path} and its right hemisphere have {session.betas.places.size}"
                f" vertices, those of session {sessions[0].session} have"
                f" {sessions[0].betas.places.size}: take files of one subject and space."
            )
    return sessions


def _open_hemisphere(path: Path) -> TrialFile:
    if path.suffix == ".hdf5":
        return NativeFile.open(path)
    file = open_trials(path)
    dtype = getattr(file, "dtype", np.dtype(float))
    if file.places.kind != "surface" or dtype.kind != "f":
        raise PerceptError(
            f"{path} holds {dtype} on a {file.places.kind}: betas on fsaverage are float (vertices,"
            " 1, 1, trials) in percent signal change, which is not divided by 300; fetch it again."
        )
    return file


def select_vertices(
    folders: NsdFolders, betas: TrialFile, roi: str, rois: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """The columns to read, and their table: hemi, vertex, regions, ncsnr and noise_ceiling.

    Args:
        folders: of the subject.
        betas: of a session, for the number of vertices.
        roi: name of a ROI file, whose vertices above 0 are taken, or "all".
        rois: names of labels to keep of these, separated by commas; "" for all.

    Raises:
        PerceptError: for an unknown region, or one without vertices.
    """
    places = betas.places
    is_selected = np.ones(places.size, bool)
    if roi != ALL_VERTICES:
        is_selected = _load_roi(folders, roi, betas) > 0
    columns = np.flatnonzero(is_selected)
    labels = _load_labels(folders, betas, columns)
    requested = parse_name_list(rois)
    check_rois(requested, labels, f"Subject {folders.subj} of NSD on {folders.space}")
    if requested:
        is_member = np.any([labels[name] for name in requested], axis=0)
        columns = columns[is_member]
        labels = {name: mask[is_member] for name, mask in labels.items()}
    if not len(columns):
        raise PerceptError(
            f"No vertex of {roi} is in {rois or roi} on {folders.space} of subject {folders.subj}:"
            " choose other rois."
        )
    table = make_roi_columns(labels, len(columns)).join(places.describe(columns))
    paths = [folders.betas / f"{side}.ncsnr.mgh" for side in SIDES]
    if all(path.exists() for path in paths):
        values = load_map(paths, places, betas.path).values[columns].astype(np.float64)
        is_valid = np.isfinite(values) & (values >= 0)
        table["ncsnr"] = np.where(is_valid, values, 0.0)
        table["noise_ceiling"] = table["ncsnr"] ** 2 / (table["ncsnr"] ** 2 + 1)
    return columns, table.assign(flat_sessions=0)


def _load_roi(folders: NsdFolders, roi: str, betas: TrialFile) -> np.ndarray:
    """Labels (vertices,) of a ROI on the surface of the betas.

    Raises:
        PerceptError: if there is no such ROI, on fsaverage with a hint at the transform.
    """
    label_paths = [folders.labels / f"{side}.{roi}.mgz" for side in SIDES]
    label_paths = [path for path in label_paths if path.exists()]
    if label_paths:
        return load_map(label_paths, betas.places, betas.path).values
    mapped = _map_to_fsaverage(folders, roi, betas) if folders.space == "fsaverage" else None
    if mapped is None:
        hint = ""
        if folders.space == "fsaverage":
            hint = ", or the labels of the subject with its transforms white-to-fsaverage"
        raise PerceptError(
            f"There is no ROI file {folders.labels / f'lh.{roi}.mgz'}: choose one of"
            f" {', '.join(_list_rois(folders)) or 'none'}, or fetch it{hint}."
        )
    return mapped


def _map_to_fsaverage(folders: NsdFolders, roi: str, betas: TrialFile) -> np.ndarray | None:
    """Labels that were drawn on the native surface, on fsaverage; None without the files."""
    parts = []
    for side in SIDES:
        label_path = folders.native_labels / f"{side}.{roi}.mgz"
        transform_path = folders.transforms / f"{side}.white-to-fsaverage.mgz"
        if not label_path.exists() or not transform_path.exists():
            return None
        labels = _load_vector(label_path)
        vertices = to_integers(_load_vector(transform_path), f"A vertex in {transform_path}") - 1
        is_inside = (vertices >= 0) & (vertices < len(labels))
        parts.append(np.where(is_inside, labels[vertices.clip(0, len(labels) - 1)], 0))
    mapped = np.concatenate(parts)
    if len(mapped) != betas.places.size:
        raise PerceptError(
            f"The transforms in {folders.transforms} have {len(mapped)} vertices of fsaverage,"
            f" {betas.path} and its right hemisphere have {betas.places.size}: fetch both again."
        )
    return mapped


def _load_vector(path: Path) -> np.ndarray:
    """The values (vertices,) of an MGH file of one hemisphere."""
    image = open_nifti(path, "labels or a transform of a hemisphere")
    with read_errors(path):
        return np.asanyarray(image.dataobj).ravel()


def _list_rois(folders: NsdFolders) -> list[str]:
    """Names of the ROI files of the surface, with those that can be brought to fsaverage."""
    owners = [folders.labels]
    if folders.space == "fsaverage" and (folders.transforms / "lh.white-to-fsaverage.mgz").exists():
        owners.append(folders.native_labels)
    names = [
        path.name[3:].removesuffix(".mgz")
        for folder in owners
        for path in list_files(folder, "?h.*.mgz")
    ]
    return sorted(set(names), key=lambda name: (name != "prf-visualrois", name))


def _load_labels(
    folders: NsdFolders, betas: TrialFile, columns: np.ndarray
) -> dict[str, np.ndarray]:
    """For each label of each ROI file whether each column has it."""
    labels: dict[str, np.ndarray] = {}
    for roi in _list_rois(folders):
        values = _load_roi(folders, roi, betas)[columns]
        label_of_vertex = to_integers(np.nan_to_num(values, nan=0), f"A label of {roi}")
        add_labels(labels, roi, label_of_vertex, load_label_names(folders, roi))
    return labels
