"""The mini world in the format of the Natural Scenes Dataset."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import scipy.io

from src.data.files import disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.nsd import (
    SHARED,
    _betas_folder,
    _check_options,
    _experiment,
    _functional,
    _image_ids,
    _stimuli,
)
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
    space: str = "func1pt8mm",
    file_format: str = "hdf5",
    grid: tuple[int, int, int] | None = None,
    betas_version: str = "betas_fithrf_GLMdenoise_RR",
) -> Path:
    """Write one subject as a small NSD: the voxels spread over a grid, everything else where NSD
    has it.

    Other than in NSD, sessions may have any number of trials, masterordering counts the trials
    through (each trial is a column of subjectim, as the order of the images may differ between
    subjects), and image_ids.csv beside imgBrick says which image each of its rows is.

    Args:
        source: the root; other subjects already in it stay.
        subj: 1 to 8.
        betas: (trials, voxels), percent signal change; stored as int16 of 300 times that.
        trials: one row for each row of betas: trial (0 to n - 1), image, session (from 0, none left
            out), run, split. At most 1000 test images.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each.
        voxels: Boolean columns become ROI files, noise_ceiling (single trial, fraction) becomes
            ncsnr.
        captions: columns image and caption.
        labels: column image and categories.
        space: func1pt8mm or func1mm.
        file_format: hdf5 or nii.gz.
        grid: (x, y, z) with room for the voxels, by default a small one.
        betas_version: as for `read`.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other or the format, or a full
            disk.
    """
    root = Path(source)
    _check_options(subj, space, betas_version, file_format)
    if file_format == "auto":
        raise PerceptError(
            "file_format is 'auto', which says nothing for writing: choose hdf5 or nii.gz."
        )
    ordered = _check_arrays(betas, trials, images, image_ids)
    grid = grid or _small_grid(betas.shape[1])
    if len(grid) != 3 or np.prod(grid) < betas.shape[1]:
        raise PerceptError(
            f"A grid {grid} has no room for {betas.shape[1]} voxels: give a larger (x, y, z)."
        )
    n_voxels = betas.shape[1]
    places = (
        np.arange(n_voxels) * int(np.prod(grid))
    ) // n_voxels  # C order of (x, y, z), as `read` has it
    with disk_errors(root):
        rows = _write_images(root, images, image_ids)
        _write_design(root, subj, ordered, ordered["image"].map(rows).to_numpy() + 1)
        _write_regions(root, subj, space, voxels, n_voxels, grid, places)
        folder = _betas_folder(root, subj, space, betas_version)
        for session in range(int(ordered["session"].max()) + 1):
            part = ordered[ordered["session"] == session]
            volumes = np.zeros((len(part), int(np.prod(grid))), np.int16)
            volumes[:, places] = _integers(betas[part.index.to_numpy()])
            _write_session(
                folder / f"betas_session{session + 1:02d}.{file_format}",
                volumes.reshape(len(part), *grid),
            )
        if voxels is not None and "noise_ceiling" in voxels:
            ceiling = voxels["noise_ceiling"].to_numpy()
            _write_volume(
                folder / "ncsnr.nii.gz",
                np.sqrt(ceiling / (1 - ceiling)).astype(np.float32),
                grid,
                places,
                np.nan,
            )
        write_split(root, ordered)
        write_tables(root, captions, labels)
    return root


def _check_arrays(
    betas: np.ndarray, trials: pd.DataFrame, images: np.ndarray, image_ids: np.ndarray
) -> pd.DataFrame:
    """The trials in their order; the index says the row of betas."""
    ordered = check_aligned(
        betas, trials, images, image_ids, ("trial", "image", "session", "run", "split")
    )
    if betas.ndim != 2:
        raise PerceptError(f"Betas have shape {betas.shape}: they must be (trials, voxels).")
    steps = np.diff(ordered["session"], prepend=-1)
    if (
        not np.array_equal(ordered["trial"], np.arange(len(ordered)))
        or not np.isin(steps, (0, 1)).all()
    ):
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


def _integers(betas: np.ndarray) -> np.ndarray:
    scaled = np.rint(np.asarray(betas, np.float64) * 300)
    if not (np.abs(scaled) <= np.iinfo(np.int16).max).all():
        raise PerceptError(
            "A beta is not finite or above 109 percent signal change, which NSD's int16 cannot"
            " hold: leave it out."
        )
    return scaled.astype(np.int16)


def _small_grid(n_voxels: int) -> tuple[int, int, int]:
    """Three different sides, so that the order of the axes can be told from a shape, with some room
    beside the voxels.
    """
    side = int(np.ceil((1.3 * n_voxels) ** (1 / 3)))
    return side, side + 1, side + 2


def _write_images(root: Path, images: np.ndarray, image_ids: np.ndarray) -> dict[int, int]:
    """Append images to imgBrick; the row of each image id that is in it then."""
    path, table = _stimuli(root) / "nsd_stimuli.hdf5", _image_ids(root)
    rows = {} if table is None else {int(image): int(row) for row, image in table.items()}  # type: ignore[call-overload]
    stored = np.empty((0, *images.shape[1:]), np.uint8)
    if path.exists():
        with h5py.File(path, "r") as file:
            stored = file["imgBrick"][:]
    known = np.array([int(i) in rows for i in image_ids], bool)
    if stored.shape[1:] != images.shape[1:] or not all(
        np.array_equal(stored[rows[int(image_ids[i])]], images[i]) for i in np.flatnonzero(known)
    ):
        raise PerceptError(
            f"{path} has images of another size, or another picture under one of these image ids:"
            " write into another folder."
        )
    rows |= {int(image): len(stored) + n for n, image in enumerate(np.asarray(image_ids)[~known])}
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file["imgBrick"] = np.concatenate([stored, images[~known]])
    with atomic(path.with_name("image_ids.csv")) as temporary:
        pd.DataFrame({"row": list(rows.values()), "image": list(rows)}).to_csv(
            temporary, index=False
        )
    return rows


def _write_design(root: Path, subj: int, trials: pd.DataFrame, ids73k: np.ndarray) -> None:
    """Write responses.tsv and this subject's row of nsd_expdesign.mat."""
    test = (trials["split"] == "test").to_numpy()
    rank = {image: n for n, image in enumerate(np.unique(ids73k[test]), 1)} | {
        image: SHARED + n for n, image in enumerate(np.unique(ids73k[~test]), 1)
    }
    within = trials.groupby(["session", "run"]).cumcount() + 1
    table = pd.DataFrame(
        {
            "SUBJECT": subj,
            "SESSION": trials["session"] + 1,
            "RUN": trials["run"] + 1,
            "TRIAL": within,
            "73KID": ids73k,
            "10KID": [rank[image] for image in ids73k],
        }
    )
    with atomic(
        root / "nsddata" / "ppdata" / f"subj{subj:02d}" / "behav" / "responses.tsv"
    ) as temporary:
        table.to_csv(temporary, sep="\t", index=False)
    path = _experiment(root) / "nsd_expdesign.mat"
    old = (
        scipy.io.loadmat(path)
        if path.exists()
        else {"subjectim": np.zeros((8, 0), np.int64), "sharedix": np.zeros((1, 0), np.int64)}
    )
    images = np.zeros((8, max(len(ids73k), old["subjectim"].shape[1])), np.int64)
    images[:, : old["subjectim"].shape[1]] = old["subjectim"]
    images[subj - 1] = 0
    images[subj - 1, : len(ids73k)] = ids73k
    design = {
        "masterordering": np.arange(1, images.shape[1] + 1)[None],
        "subjectim": images,
        "sharedix": np.union1d(old["sharedix"], ids73k[test])[None].astype(np.int64),
    }
    with atomic(path) as temporary:
        scipy.io.savemat(temporary, design, appendmat=False)


def _write_regions(
    root: Path,
    subj: int,
    space: str,
    voxels: pd.DataFrame | None,
    n_voxels: int,
    grid: tuple[int, int, int],
    places: np.ndarray,
) -> None:
    """Write nsdgeneral, and the Boolean columns as the labels of as few ROI files as keep them
    apart, with their .ctab.
    """
    folder = _functional(root, subj, space) / "roi"
    _write_volume(folder / "nsdgeneral.nii.gz", np.ones(n_voxels, np.int16), grid, places, -1)
    layers: list[tuple[np.ndarray, list[str]]] = []
    for name in [] if voxels is None else voxels.select_dtypes("bool").columns:
        member = voxels[name].to_numpy()  # type: ignore[index]
        if name == "nsdgeneral":
            continue
        layer = next((one for one in layers if not (one[0][member] > 0).any()), None)
        if layer is None:
            layers.append(layer := (np.zeros(n_voxels, np.int16), []))
        layer[1].append(str(name))
        layer[0][member] = len(layer[1])
    for n, (values, names) in enumerate(layers, 1):
        _write_volume(folder / f"areas-{n}.nii.gz", values, grid, places, -1)
        with atomic(
            root / "nsddata" / "freesurfer" / f"subj{subj:02d}" / "label" / f"areas-{n}.mgz.ctab"
        ) as temporary:
            temporary.write_text(
                "0 Unknown\n" + "".join(f"{value} {name}\n" for value, name in enumerate(names, 1))
            )


def _affine(size: float, grid: tuple[int, ...]) -> np.ndarray:
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = -size * (np.array(grid[:3]) - 1) / 2
    return affine


def _write_volume(
    path: Path, values: np.ndarray, grid: tuple[int, int, int], places: np.ndarray, elsewhere: float
) -> None:
    """Write values (voxels,) at their places of a grid, `elsewhere` around them."""
    volume = np.full(int(np.prod(grid)), elsewhere, values.dtype)
    volume[places] = values
    _save_nifti(path, volume.reshape(grid))


def _save_nifti(path: Path, array: np.ndarray) -> None:
    size = 1.0 if "func1mm" in path.parts else 1.8
    with atomic(path) as temporary, gzip.open(temporary, "wb", compresslevel=6) as file:
        file.write(nibabel.Nifti1Image(array, _affine(size, array.shape)).to_bytes())


def _write_session(path: Path, volumes: np.ndarray) -> None:
    """Write volumes int16 (trials, x, y, z) as NSD does: hdf5 (trials, z, y, x) with one chunk a
    voxel, or NIfTI (x, y, z, trials).
    """
    if path.suffix == ".gz":
        _save_nifti(path, np.moveaxis(volumes, 0, -1))
        return
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset(
            "betas", data=volumes.transpose(0, 3, 2, 1), chunks=(len(volumes), 1, 1, 1)
        )
