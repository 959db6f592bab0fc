"""BOLD5000, release 2 (Chang et al. 2019, doi 10.1038/s41597-019-0052-3), read and written.

Files are found by name anywhere below the source.

- Volumes (figshare article 14456124): CSIx_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_ses-NN.nii.gz, (x,
  y, z, trials), one a session; CSIx_brainmask.nii.gz. Regions:
  sub-CSIx/sub-CSIx_mask-{LH,RH}{EarlyVis,LOC,OPA,PPA,RSC}.nii.gz (openneuro ds001499,
  derivatives/spm); some are published as LHLO, RHLO and RHRRSC, which are taken for LOC and RSC.
  The affine of the volumes is known to be wrong: x, y, z (mm) of a voxel come from the masks.
- Matrices, read where there are no volumes: CSIx_..._allses_{LH,RH}<region>.npy, (trials, voxels),
  beside one another. A voxel of two regions is twice in them, they tell no places, and no sessions:
  the option `sessions` does.
- CSIx_imgnames.txt: the picture of each trial, over all sessions in order. The lists of the first
  release put "rep_" before a repeated one; both are read.
- Pictures: .../Presented_Stimuli/{COCO,ImageNet,Scene}/<name>. The image id is the place in the
  sorted names of all of them, which is the same for every subject, or the name itself where all are
  numbers. labels.parquet tells name and source.
- A run is 37 trials; run is -1 where a session is no multiple of that. That the trials of a session
  file follow its runs in order is inferred.
- Test set: the pictures that any subject whose list is there saw more than once (published: 113;
  112 of them four times, one three times), so that no subject is trained on another's test
  pictures; CSI4, with 9 of the 15 sessions, saw some of them only once.
- Betas are percent signal change as published; nothing is z-scored here.
"""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from nibabel.filebasedimages import ImageFileError

from src.data.files import disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.readers.common import (
    check_rois,
    copy_tables,
    load_images,
    make_roi_columns,
    make_split_column,
)
from src.utils import PerceptError, progress, require_file

TERMS = (
    "BOLD5000 (Chang, Pyles, Marcus, Gupta, Tarr and Aminoff) is published as CC0 on figshare"
    " (14456124) and OpenNeuro (ds001499): see bold5000.org and cite it. Its pictures belong to"
    " COCO, ImageNet and SUN, whose own terms hold: do not redistribute them."
)

BETAS = "GLMbetas-TYPED-FITHRF-GLMDENOISE-RR"

REGIONS = ("EarlyVis", "LOC", "OPA", "PPA", "RSC")

MISNAMED = {"LO": "LOC", "RRSC": "RSC"}

PRESENTED = "Presented_Stimuli"

PICTURES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}

SUBJECTS, TRIALS_PER_RUN, BLOCK_ROWS = range(1, 5), 37, 64


@dataclass(frozen=True)
class _Measured:
    """What a flavour gives: trials of each session (None where it cannot tell), the table of
    voxels, and blocks of rows (trials, voxels).
    """

    per_session: list[int] | None
    n_trials: int
    voxels: pd.DataFrame
    blocks: Callable[[], Iterator[np.ndarray]]
    where: str


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    rois: str = "",
    sessions: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder below which the files lie.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 4, for CSI1 to CSI4.
        rois: regions whose voxels are taken, separated by commas; "" for all regions (the brain
            mask where there are no masks of regions), "brain" for the brain mask.
        sessions: numbers of trials of the sessions, separated by commas, for the matrices, which do
            not tell them.
        image_size: longest side of the pictures kept, 0 as they are.
        val_images: training images chosen for validation.
        seed: of that choice.
        protocol: name of the protocol, by default bold5000-repeated<number of test images>.
        attributes: what is to be said about the betas where they are not the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, truncated or unfitting file, an unknown region, or data that
            `write_subject` refuses.
    """
    name, root = _participant(subj), require_file(source, "the folder of BOLD5000")
    files = _files(root)
    stimuli = _stimuli(files, root)
    wanted = [roi.strip() for roi in rois.split(",") if roi.strip()]
    measured = _volumes(files, name, wanted) or _matrices(files, name, wanted, root)
    trials = _trials(files, name, stimuli, measured, sessions)
    trials["split"] = make_split_column(root, trials, val_images, seed)
    check_trials(trials)
    about: dict[str, Any] = {
        "source": f"BOLD5000 release 2, {name}, {BETAS}",
        "units": "percent signal change",
        "normalisation": "none",
        "protocol": (
            protocol
            or f"bold5000-repeated{trials.loc[trials['split'] == 'test', 'image'].nunique()}"
        ),
        "rois": rois or "all",
        **(attributes or {}),
    }
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        _store_pictures(root, folder, stimuli[stimuli["image"].isin(trials["image"])], image_size)
        return write_subject(
            subject_folder(folder, subj), measured.blocks(), trials, measured.voxels, about
        )


def _store_pictures(root: Path, folder: Path, shown: pd.DataFrame, image_size: int) -> None:
    """Write the pictures, and the tables about them, into the dataset's folder."""
    todo = progress(shown["path"], "pictures", len(shown))
    write_images(
        folder / "images.h5", load_images(todo, "Picture", image_size), shown["image"].to_numpy()
    )
    copy_tables(root, folder, set(shown["image"]))
    if not (root / "labels.parquet").exists():
        write_image_table(folder / "labels.parquet", shown[["image", "name", "source"]])


def _participant(subj: int) -> str:
    if subj not in SUBJECTS:
        raise PerceptError(
            f"BOLD5000 has the subjects 1 to 4 (CSI1 to CSI4), not {subj}: choose subj among them."
        )
    return f"CSI{subj}"


def _files(root: Path) -> dict[str, list[Path]]:
    """All files below the source by name, the least deep first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*"), key=lambda path: (len(path.parts), path)):
        if not path.name.startswith(".") and path.is_file():
            found.setdefault(path.name, []).append(path)
    return found


def _stimuli(files: dict[str, list[Path]], root: Path) -> pd.DataFrame:
    """Columns image, name (of the file, without its ending), source and path, one row a presented
    picture.
    """
    paths = [
        path
        for same in files.values()
        for path in same
        if PRESENTED in path.parts and path.suffix.lower() in PICTURES
    ]
    if not paths:
        raise PerceptError(
            f"{root} holds no pictures below a folder {PRESENTED}: fetch BOLD5000_Stimuli.zip and"
            " unpack it there."
        )
    table = pd.DataFrame(
        {
            "name": [path.stem for path in paths],
            "source": [path.parent.name for path in paths],
            "path": paths,
        }
    )
    table = table.sort_values("name", kind="stable").reset_index(drop=True)
    twice = table[table["name"].duplicated(keep=False)]
    if len(twice):
        raise PerceptError(
            f"{twice['path'].iloc[0]} and {twice['path'].iloc[1]} have the same name: keep one of"
            " them."
        )
    numbers = table["name"].str.fullmatch(r"\d{1,18}").all()
    table["image"] = table["name"].astype(np.int64) if numbers else np.arange(len(table))
    return table


def _shown(path: Path, stimuli: pd.DataFrame) -> np.ndarray:
    """Image of each trial (trials,) int64 from a list of file names."""
    known = stimuli.set_index("name")["image"].to_dict()
    images = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise PerceptError(
            f"{path} is no text ({error}): it must name a picture in each line, fetch it again."
        ) from error
    for number, line in enumerate(filter(None, map(str.strip, lines)), 1):
        stem = Path(line).stem
        image = known.get(stem, known.get(stem.removeprefix("rep_")))
        if image is None:
            raise PerceptError(
                f"{path} names {line} in line {number}, which is not below {PRESENTED}: fetch the"
                " stimuli again."
            )
        images.append(image)
    return np.array(images, np.int64)


def _trials(
    files: dict[str, list[Path]],
    name: str,
    stimuli: pd.DataFrame,
    measured: _Measured,
    sessions: str,
) -> pd.DataFrame:
    """The table of trials, split into train and test."""
    lists = {
        who: _shown(files[f"{who}_imgnames.txt"][0], stimuli)
        for who in map(_participant, SUBJECTS)
        if f"{who}_imgnames.txt" in files
    }
    if name not in lists:
        raise PerceptError(
            f"{name}_imgnames.txt (the picture of each trial) is missing beside {measured.where}:"
            " fetch it."
        )
    images = lists[name]
    if len(images) != measured.n_trials:
        raise PerceptError(
            f"There are {measured.n_trials} trials of {name} in {measured.where}, while"
            f" {files[f'{name}_imgnames.txt'][0]} names {len(images)}: a session is missing, or the"
            " files do not belong together."
        )
    per_session = _per_session(measured, sessions)
    session = np.repeat(np.arange(len(per_session)), per_session)
    within = np.concatenate([np.arange(count) for count in per_session])
    whole = (np.array(per_session) % TRIALS_PER_RUN == 0)[session]
    repeated = np.concatenate([_more_than_once(shown) for shown in lists.values()])
    if not np.isin(repeated, images).any():
        warnings.warn(
            f"{name} saw no picture that was shown more than once: there is no test set, unless"
            " splits.csv in the source names one.",
            stacklevel=3,
        )
    trials = pd.DataFrame(
        {
            "trial": np.arange(len(images)),
            "image": images,
            "session": session,
            "run": np.where(whole, within // TRIALS_PER_RUN, -1),
        }
    )
    trials["repeat"] = number_repeats(trials)
    trials["split"] = np.where(np.isin(images, repeated), "test", "train")
    return trials


def _per_session(measured: _Measured, sessions: str) -> list[int]:
    if measured.per_session is not None:
        return measured.per_session
    if not sessions:
        warnings.warn(
            "The matrices do not tell sessions: all trials are taken as one, 0; give their numbers"
            " of trials as sessions='370,333,...'.",
            stacklevel=4,
        )
        return [measured.n_trials]
    counts = [int(count) if count.strip().isdigit() else 0 for count in sessions.split(",")]
    if min(counts) < 1 or sum(counts) != measured.n_trials:
        raise PerceptError(
            f"sessions={sessions!r} must be numbers of trials, separated by commas, that add up to"
            f" {measured.n_trials}."
        )
    return counts


def _more_than_once(shown: np.ndarray) -> np.ndarray:
    images, counts = np.unique(shown, return_counts=True)
    return images[counts > 1]


def _volumes(files: dict[str, list[Path]], name: str, wanted: list[str]) -> _Measured | None:
    """The betas of the session files, or nothing where there are none."""
    pattern = re.compile(rf"{name}_{BETAS}_ses-(\d+)\.nii(\.gz)?")
    numbered = sorted(
        (int(match.group(1)), same[0])
        for file, same in files.items()
        if (match := pattern.fullmatch(file))
    )
    if not numbered:
        return None
    missing = sorted(set(range(1, numbered[-1][0] + 1)) - {number for number, _ in numbered})
    if missing:
        raise PerceptError(
            f"Session {missing[0]} of {name} ({name}_{BETAS}_ses-{missing[0]:02d}.nii.gz) is"
            f" missing in {numbered[0][1].parent}: fetch it."
        )
    paths = [path for _, path in numbered]
    headers = [_header(path) for path in paths]
    grid = headers[0].shape[:3]
    for path, header in zip(paths, headers, strict=True):
        if len(header.shape) != 4 or header.shape[:3] != grid:
            raise PerceptError(
                f"{path} has shape {header.shape}, it must be (x, y, z, trials) with (x, y, z) ="
                f" {grid}: fetch it again."
            )
    at, voxels = _voxels(files, name, wanted, grid)
    finite = np.logical_and.reduce([np.isfinite(next(_rows(path, at))) for path in paths])
    if not finite.all():
        warnings.warn(
            f"{int((~finite).sum())} voxels of {name} have no value in some session: they are left"
            " out.",
            stacklevel=3,
        )
        at, voxels = at[finite], voxels[finite].reset_index(drop=True)
    per_session = [int(header.shape[3]) for header in headers]
    return _Measured(
        per_session,
        sum(per_session),
        voxels,
        lambda: _blocks(paths, at, name),
        f"{len(paths)} session files in {paths[0].parent}",
    )


def _header(path: Path) -> Any:
    """nibabel's array proxy: shape, dtype, offset, slope and inter."""
    try:
        return nibabel.load(path).dataobj  # type: ignore[attr-defined]
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise PerceptError(f"{path} cannot be read as NIfTI ({error}): fetch it again.") from error


def _mask(path: Path, grid: tuple[int, ...]) -> np.ndarray:
    """A mask in the order of the file (x fastest), bool (x * y * z,)."""
    proxy = _header(path)
    if proxy.shape[:3] != grid or int(np.prod(proxy.shape)) != int(np.prod(grid)):
        raise PerceptError(
            f"{path} has shape {proxy.shape}, the betas have (x, y, z) = {grid}: take the mask of"
            " this subject, with its axes in this order."
        )
    return next(_rows(path, slice(None))) != 0


def _voxels(
    files: dict[str, list[Path]], name: str, wanted: list[str], grid: tuple[int, ...]
) -> tuple[np.ndarray, pd.DataFrame]:
    """Places of the chosen voxels in a volume (voxels,), and their table: regions, x, y, z (mm)."""
    pattern = re.compile(rf"sub-{name}_mask-(LH|RH)(\w+)\.nii(\.gz)?")
    regions: dict[str, np.ndarray] = {}
    matches = [match for match in map(pattern.fullmatch, sorted(files)) if match]
    masks = [(match[1], MISNAMED.get(match[2], match[2]), files[match[0]][0]) for match in matches]
    _check_hemispheres({mask[:2] for mask in masks}, f"masks of {name}")
    for _, region, path in masks:
        regions[region] = regions.get(region, False) | _mask(path, grid)
    if wanted == ["brain"] or (not wanted and not regions):
        brain = files.get(f"{name}_brainmask.nii.gz", [None])[0]
        if brain is None:
            raise PerceptError(
                f"{name} has neither masks of regions"
                f" (sub-{name}/sub-{name}_mask-LHEarlyVis.nii.gz, ...) nor {name}_brainmask.nii.gz:"
                " fetch them."
            )
        chosen, reference = _mask(brain, grid), brain
    else:
        check_rois(wanted, regions, name)
        chosen, reference = (
            np.logical_or.reduce([regions[region] for region in wanted or regions]),
            masks[0][2],
        )
    at = np.flatnonzero(chosen)
    if not len(at):
        raise PerceptError(
            f"The masks of {name} for {','.join(wanted) or 'all regions'} hold no voxel: choose"
            " other rois."
        )
    places = np.stack(np.unravel_index(at, grid, order="F"), axis=1)
    xyz = nibabel.affines.apply_affine(nibabel.load(reference).affine, places)  # type: ignore[attr-defined]
    table = make_roi_columns({region: mask[at] for region, mask in regions.items()}, len(at))
    return at, table.assign(x=xyz[:, 0], y=xyz[:, 1], z=xyz[:, 2])


def _check_hemispheres(found: set[tuple[str, str]], what: str) -> None:
    """Warn of regions, given as (hemisphere, region), of which one hemisphere alone is there."""
    for side, region in sorted(found):
        other = "RH" if side == "LH" else "LH"
        if (other, region) not in found:
            warnings.warn(
                f"Of the {what}, {other}{region} is missing: {region} is read from one hemisphere,"
                " fetch the other.",
                stacklevel=4,
            )


def _rows(path: Path, at: np.ndarray | slice) -> Iterator[np.ndarray]:
    """The chosen voxels of each volume of a file in turn, float32 (voxels,); one volume is held at
    a time.
    """
    proxy = _header(path)
    grid, count = proxy.shape[:3], int(np.prod(proxy.shape[3:]))
    size, done = int(np.prod(grid)) * proxy.dtype.itemsize, 0
    scale = (proxy.slope, proxy.inter)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(proxy.offset)
            while done < count:
                raw = file.read(size)
                if len(raw) < size:
                    raise EOFError("end of file")
                done += 1
                if done == count:
                    file.read(1)  # gzip compares its sum at the end of the file only
                row = np.frombuffer(raw, proxy.dtype)[at]
                yield (
                    row.astype(np.float32)
                    if scale == (1, 0)
                    else (row * scale[0] + scale[1]).astype(np.float32)
                )
    except (OSError, EOFError, zlib.error) as error:
        raise PerceptError(
            f"{path} is damaged or cut off at trial {done} of {count} ({error}): fetch it again."
        ) from error


def _blocks(paths: list[Path], at: np.ndarray, name: str) -> Iterator[np.ndarray]:
    for path in progress(paths, f"sessions of {name}", len(paths)):
        rows: list[np.ndarray] = []
        for row in _rows(path, at):
            rows.append(row)
            if len(rows) == BLOCK_ROWS:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)


def _matrices(files: dict[str, list[Path]], name: str, wanted: list[str], root: Path) -> _Measured:
    """The betas of the matrices of regions, left and right of each region beside one another."""
    pattern = re.compile(rf"{name}_{BETAS}_allses_(LH|RH)(\w+)\.npy")
    found = {
        (match.group(2), match.group(1)): same[0]
        for file, same in files.items()
        if (match := pattern.fullmatch(file))
    }
    if not found:
        raise PerceptError(
            f"{root} holds no betas of {name}: fetch {name}_{BETAS}_ses-NN.nii.gz of all sessions,"
            f" or {name}_{BETAS}_allses_LHEarlyVis.npy, ..."
        )
    if wanted == ["brain"]:
        raise PerceptError(
            f"rois='brain' needs the volumes ({name}_{BETAS}_ses-NN.nii.gz) and"
            f" {name}_brainmask.nii.gz: {root} holds matrices of regions only."
        )
    check_rois(wanted, {region for region, _ in found}, name)
    _check_hemispheres({(side, region) for region, side in found}, f"matrices of {name}")
    chosen = sorted(key for key in found if not wanted or key[0] in wanted)
    arrays = [_matrix(found[key]) for key in chosen]
    n_trials = len(arrays[0])
    for key, array in zip(chosen, arrays, strict=True):
        if len(array) != n_trials:
            raise PerceptError(
                f"{found[key]} has shape {array.shape}, the one before it {n_trials} trials: it"
                " must be (trials, voxels), with its axes in this order."
            )
    column = np.concatenate(
        [np.full(array.shape[1], key[0]) for key, array in zip(chosen, arrays, strict=True)]
    )
    voxels = make_roi_columns(
        {region: column == region for region in dict.fromkeys(column.tolist())}, len(column)
    )

    def blocks() -> Iterator[np.ndarray]:
        starts = range(0, n_trials, BLOCK_ROWS)
        for start in progress(starts, f"trials of {name}", len(starts)):
            yield np.concatenate([array[start : start + BLOCK_ROWS] for array in arrays], axis=1)

    return _Measured(
        None, n_trials, voxels, blocks, f"{len(chosen)} matrices in {found[chosen[0]].parent}"
    )


def _matrix(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise PerceptError(f"{path} is damaged or cut off ({error}): fetch it again.") from error
    if array.ndim != 2:
        raise PerceptError(f"{path} has shape {array.shape}: it must be (trials, voxels).")
    return array
