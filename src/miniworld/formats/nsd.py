"""The mini world in the format of the Natural Scenes Dataset."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io

from src.miniworld.formats.nsd_surfaces import (
    group_disjoint_rois,
    to_scaled_integers,
    write_surfaces,
)
from src.miniworld.formats.source_data import SourceData, write_split, write_tables
from src.miniworld.formats.voxel_grid import VoxelGrid, choose_small_grid
from src.readers.nsd import SHARED
from src.readers.nsd_files import (
    SUBJECTS,
    SURFACES,
    NsdFolders,
    check_options,
    load_image_ids,
)
from src.utils import PerceptError, atomic, require_extra, write_errors


def write(
    source: str | Path,
    subj: int,
    data: SourceData,
    *,
    space: str = "func1pt8mm",
    file_format: str = "hdf5",
    grid: tuple[int, int, int] | None = None,
    betas_version: str = "betas_fithrf_GLMdenoise_RR",
) -> Path:
    """Write one subject as a small NSD: the voxels on a grid, everything else where NSD has it.

    Other than in NSD, sessions may have any number of trials, masterordering counts the trials
    through (each trial is a column of subjectim, as the order of the images may differ between
    subjects), and image_ids.csv beside imgBrick says which image each of its rows is.

    Args:
        source: the root; other subjects already in it stay.
        subj: 1 to 8.
        data: of the subject. Betas are (trials, voxels) in percent signal change, stored as int16
            of 300 times that. Trials are 0 to n - 1 and need session (from 0, none left out) and
            run; at most 1000 test images. Boolean columns of voxels become ROI files,
            noise_ceiling (single trial, fraction) becomes ncsnr.
        space: func1pt8mm, func1mm, fsaverage or nativesurface; on a surface the first half of the
            voxels are vertices of the left hemisphere.
        file_format: hdf5 or nii.gz; mgh on fsaverage, where betas are stored as they are.
        grid: (x, y, z) with room for the voxels, by default a small one.
        betas_version: as for `src.readers.nsd.read`.

    Returns:
        `source`.

    Raises:
        PerceptError: for data that do not fit the format, or a full disk.
    """
    root = Path(source)
    check_options(subj, space, betas_version, file_format)
    if file_format == "auto":
        raise PerceptError(
            "file_format is 'auto', which says nothing for writing: choose hdf5 or nii.gz."
        )
    ordered = _sort_trials(data)
    folders = NsdFolders(root, subj, space, betas_version)
    with write_errors(root):
        row_of_image = _add_images(folders, data.images, data.image_ids)
        _write_trials(folders, ordered, ordered["image"].map(row_of_image).to_numpy() + 1)
        if space in SURFACES:
            write_surfaces(folders, data, ordered, file_format)
        else:
            _write_volumes(folders, data, ordered, file_format, grid)
        write_split(root, ordered)
        write_tables(root, data.captions, data.labels)
    return root


def _sort_trials(data: SourceData) -> pd.DataFrame:
    """The trials in their order, numbered as NSD numbers them; the index is the row of betas."""
    ordered = data.sort_trials(("session", "run"))
    data.check_two_axes()
    is_step = np.isin(np.diff(ordered["session"], prepend=-1), (0, 1))
    if not np.array_equal(ordered["trial"], np.arange(len(ordered))) or not is_step.all():
        raise PerceptError(
            "Trials must count from 0 on and sessions must follow one another from 0 on: number"
            " them so, as NSD does."
        )
    if ordered.loc[ordered["split"] == "test", "image"].nunique() > SHARED:
        raise PerceptError(
            f"There are more than {SHARED} test images, which NSD's shared images have to be: write"
            " fewer."
        )
    return ordered


def _write_volumes(
    folders: NsdFolders,
    data: SourceData,
    ordered: pd.DataFrame,
    file_format: str,
    grid: tuple[int, int, int] | None,
) -> None:
    """Write regions, betas and ncsnr on a functional grid."""
    voxel_grid = VoxelGrid(grid or choose_small_grid(data.n_voxels), data.n_voxels)
    write_rois(folders, data, voxel_grid)
    for number, (_, trials) in enumerate(ordered.groupby("session"), 1):
        volumes = np.zeros((len(trials), voxel_grid.size), np.int16)
        volumes[:, voxel_grid.places] = to_scaled_integers(data.betas[trials.index.to_numpy()])
        path = folders.betas / f"betas_session{number:02d}.{file_format}"
        write_session(path, volumes.reshape(len(trials), *voxel_grid.shape))
    if data.voxels is not None and "noise_ceiling" in data.voxels:
        ceiling = data.voxels["noise_ceiling"].to_numpy()
        ncsnr = np.sqrt(ceiling / (1 - ceiling)).astype(np.float32)
        save_nifti(folders.betas / "ncsnr.nii.gz", voxel_grid.fill(ncsnr, np.nan))


def _add_images(folders: NsdFolders, images: np.ndarray, image_ids: np.ndarray) -> dict[int, int]:
    """Append images to imgBrick; the row of each image id that is in it then."""
    path, stored_ids = folders.stimuli / "nsd_stimuli.hdf5", load_image_ids(folders)
    row_of_image: dict[int, int] = {}
    if stored_ids is not None:
        row_of_image = {int(image): int(row) for row, image in stored_ids.items()}  # type: ignore[call-overload]
    stored = np.empty((0, *images.shape[1:]), np.uint8)
    if path.exists():
        with h5py.File(path, "r") as file:
            stored = file["imgBrick"][:]
    is_stored = np.array([int(image) in row_of_image for image in image_ids], bool)
    same_size = stored.shape[1:] == images.shape[1:]
    if not same_size or not all(
        np.array_equal(stored[row_of_image[int(image_ids[index])]], images[index])
        for index in np.flatnonzero(is_stored)
    ):
        raise PerceptError(
            f"{path} has images of another size, or another image under one of these image ids:"
            " write into another folder."
        )
    for row, image in enumerate(np.asarray(image_ids)[~is_stored], len(stored)):
        row_of_image[int(image)] = row
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file["imgBrick"] = np.concatenate([stored, images[~is_stored]])
    with atomic(path.with_name("image_ids.csv")) as temporary:
        table = pd.DataFrame({"row": list(row_of_image.values()), "image": list(row_of_image)})
        table.to_csv(temporary, index=False)
    return row_of_image


def _write_trials(folders: NsdFolders, trials: pd.DataFrame, ids_73k: np.ndarray) -> None:
    """Write responses.tsv and this subject's row of nsd_expdesign.mat."""
    is_test = (trials["split"] == "test").to_numpy()
    id_10k = {image: rank for rank, image in enumerate(np.unique(ids_73k[is_test]), 1)}
    unshared = np.unique(ids_73k[~is_test])
    id_10k |= {image: rank for rank, image in enumerate(unshared, SHARED + 1)}
    table = pd.DataFrame(
        {
            "SUBJECT": folders.subj,
            "SESSION": trials["session"] + 1,
            "RUN": trials["run"] + 1,
            "TRIAL": trials.groupby(["session", "run"]).cumcount() + 1,
            "73KID": ids_73k,
            "10KID": [id_10k[image] for image in ids_73k],
        }
    )
    with atomic(folders.responses) as temporary:
        table.to_csv(temporary, sep="\t", index=False)
    _write_design(folders, ids_73k, ids_73k[is_test])


def _write_design(folders: NsdFolders, ids_73k: np.ndarray, shared: np.ndarray) -> None:
    stored_images = np.zeros((len(SUBJECTS), 0), np.int64)
    stored_shared = np.zeros((1, 0), np.int64)
    if folders.design.exists():
        content = scipy.io.loadmat(folders.design)
        stored_images, stored_shared = content["subjectim"], content["sharedix"]
    n_stored = stored_images.shape[1]
    images = np.zeros((len(SUBJECTS), max(len(ids_73k), n_stored)), np.int64)
    images[:, :n_stored] = stored_images
    images[folders.subj - 1] = 0
    images[folders.subj - 1, : len(ids_73k)] = ids_73k
    design = {
        "masterordering": np.arange(1, images.shape[1] + 1)[None],
        "subjectim": images,
        "sharedix": np.union1d(stored_shared, shared)[None].astype(np.int64),
    }
    with atomic(folders.design) as temporary:
        scipy.io.savemat(temporary, design, appendmat=False)


def write_rois(folders: NsdFolders, data: SourceData, grid: VoxelGrid) -> None:
    """Write nsdgeneral, and the Boolean columns as the labels of ROI files, with their .ctab."""
    mask = grid.fill(np.ones(data.n_voxels, np.int16), -1)
    save_nifti(folders.rois / "nsdgeneral.nii.gz", mask)
    for number, names in enumerate(group_disjoint_rois(data), 1):
        labels = np.zeros(data.n_voxels, np.int16)
        for label, name in enumerate(names, 1):
            labels[data.voxels[name].to_numpy()] = label  # type: ignore[index]
        save_nifti(folders.rois / f"areas-{number}.nii.gz", grid.fill(labels, -1))
        lines = [f"{label} {name}\n" for label, name in enumerate(names, 1)]
        with atomic(folders.label_names(folders.subject, f"areas-{number}")) as temporary:
            temporary.write_text("0 Unknown\n" + "".join(lines))


def save_nifti(path: Path, array: np.ndarray) -> None:
    """Save an array (x, y, z) or (x, y, z, trials) with the affine of NSD's functional grids."""
    nibabel = require_extra("nibabel", "nsd")
    size = 1.0 if "func1mm" in path.parts else 1.8
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = -size * (np.array(array.shape[:3]) - 1) / 2
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=6) as file:
        file.write(nibabel.Nifti1Image(array, affine).to_bytes())


def write_session(path: Path, volumes: np.ndarray) -> None:
    """Write volumes int16 (trials, x, y, z) as NSD does.

    These are hdf5 (trials, z, y, x) with one chunk a voxel, or NIfTI (x, y, z, trials).
    """
    if path.suffix == ".gz":
        save_nifti(path, np.moveaxis(volumes, 0, -1))
        return
    reversed_axes = volumes.transpose(0, 3, 2, 1)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("betas", data=reversed_axes, chunks=(len(volumes), 1, 1, 1))
