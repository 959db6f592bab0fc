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
- CSIx_imgnames.txt: the image of each trial, over all sessions in order. The lists of the first
  release put "rep_" before a repeated one; both are read.
- Images: .../Presented_Stimuli/{COCO,ImageNet,Scene}/<name>. The image id is the place in the
  sorted names of all of them, which is the same for every subject, or the name itself where all are
  numbers. labels.parquet holds name and source.
- A run is 37 trials; run is -1 where a session is no multiple of that. That the trials of a session
  file follow its runs in order is inferred.
- Test set: the images that any subject whose list is there saw more than once (published: 113;
  112 of them four times, one three times), so that no subject is trained on another's test
  images; CSI4, with 9 of the 15 sessions, saw some of them only once.
- Betas are percent signal change as published; nothing is z-scored here.
"""

from __future__ import annotations

import gzip
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import number_repeats
from src.files.foreign import read_errors, shorten, walk_files
from src.readers.common import (
    check_rois,
    count_test_images,
    find_gap,
    load_image_table,
    load_images,
    make_roi_columns,
    make_split_column,
    map_npy,
    parse_name_list,
    to_mask,
)
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.volumes import open_nifti
from src.utils import PerceptError, progress, require_extra, require_file

TERMS = (
    "BOLD5000 (Chang, Pyles, Marcus, Gupta, Tarr and Aminoff) is published as CC0 on figshare"
    " (14456124) and OpenNeuro (ds001499): see bold5000.org and cite it. Its images belong to"
    " COCO, ImageNet and SUN, whose own terms hold: do not redistribute them."
)

BETAS = "GLMbetas-TYPED-FITHRF-GLMDENOISE-RR"

MISNAMED = {"LO": "LOC", "RRSC": "RSC"}

PRESENTED = "Presented_Stimuli"

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}

IMAGE_LIST = "{}_imgnames.txt"

SUBJECTS = range(1, 5)

TRIALS_PER_RUN = 37

BLOCK_ROWS = 64  # trials that are in memory at a time

FilesByName = dict[str, list[Path]]


@dataclass(frozen=True)
class BetaSource:
    """Where the betas of a subject come from: session files, or matrices of regions.

    Attributes:
        n_trials: number of trials.
        voxels: table of the voxels.
        blocks: rows (trials, voxels) block by block.
        description: the files, for errors.
        session_sizes: trials of each session, or None where the files do not tell sessions.
    """

    n_trials: int
    voxels: pd.DataFrame
    blocks: Iterator[np.ndarray]
    description: str
    session_sizes: list[int] | None = None


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
    bad_voxels: str = "refuse",
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
        image_size: longest side of the stored images, 0 as they are.
        val_images: training images chosen for validation.
        seed: of that choice.
        protocol: name of the protocol, by default bold5000-repeated<number of test images>.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the betas where they are not the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, truncated or unfitting file, an unknown region, or data that
            `store_recording` refuses.
    """
    name, root = subject_name(subj), require_file(source, "the folder of BOLD5000")
    files = _list_files(root)
    stimuli = _list_stimuli(files, root)
    roi_names = parse_name_list(rois)
    betas = _open_volumes(files, name, roi_names)
    if betas is None:
        betas = _open_matrices(files, name, roi_names, root)
    trials = _trials(files, name, stimuli, betas, sessions)
    trials["split"] = make_split_column(root, trials, val_images, seed)
    published = {
        "source": f"BOLD5000 release 2, {name}, {BETAS}",
        "units": "percent signal change",
        "normalisation": "none",
        "protocol": protocol or f"bold5000-repeated{count_test_images(trials)}",
        "rois": rois or "all",
    }
    seen = stimuli[stimuli["image"].isin(trials["image"])]
    image_ids = seen["image"].to_numpy()
    labels = load_image_table("labels", image_ids, root)
    recording = Recording(
        betas=RowBlocks((betas.n_trials, len(betas.voxels)), betas.blocks),
        trials=trials,
        images=load_images(progress(seen["path"], "images", len(seen)), "Image", image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=betas.voxels,
        captions=load_image_table("captions", image_ids, root),
        labels=seen[["image", "name", "source"]] if labels is None else labels,
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def subject_name(subj: int) -> str:
    """The authors' name of a subject, CSI1 to CSI4.

    Raises:
        PerceptError: for another number.
    """
    if subj not in SUBJECTS:
        raise PerceptError(
            f"BOLD5000 has the subjects 1 to 4 (CSI1 to CSI4), not {subj}: choose subj among them."
        )
    return f"CSI{subj}"


# ------------------------------------------------------------------------------------------- files
def _list_files(root: Path) -> FilesByName:
    """All files below the source by name, the least deep first."""
    files: FilesByName = {}
    for path in sorted(walk_files(root), key=lambda path: (len(path.parts), path)):
        files.setdefault(path.name, []).append(path)
    return files


def _match_files(files: FilesByName, pattern: str) -> list[tuple[re.Match[str], Path]]:
    """Files whose name has a pattern, with the match."""
    matches = ((re.fullmatch(pattern, name), paths[0]) for name, paths in files.items())
    return [(match, path) for match, path in matches if match]


@lru_cache
def _is_presented(folder: Path) -> bool:
    """Whether a folder is that of the presented images or below it, perhaps through a link."""
    return PRESENTED in folder.parts or PRESENTED in folder.resolve().parts


def _list_stimuli(files: FilesByName, root: Path) -> pd.DataFrame:
    """Columns image, name (of the file, without its ending), source and path, one row an image."""
    paths = [
        path
        for same_name in files.values()
        for path in same_name
        if _is_presented(path.parent) and path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not paths:
        raise PerceptError(
            f"{root} holds no images below a folder {PRESENTED}: fetch BOLD5000_Stimuli.zip and"
            " unpack it there."
        )
    names = [path.stem for path in paths]
    sources = [path.parent.name for path in paths]
    table = pd.DataFrame({"name": names, "source": sources, "path": paths})
    table = table.sort_values("name", kind="stable").reset_index(drop=True)
    duplicates = table[table["name"].duplicated(keep=False)]
    if len(duplicates):
        first, second = duplicates["path"].iloc[:2]
        raise PerceptError(f"{first} and {second} have the same name: keep one of them.")
    all_numbers = table["name"].str.fullmatch(r"\d{1,18}").all()
    table["image"] = table["name"].astype(np.int64) if all_numbers else np.arange(len(table))
    return table


# ------------------------------------------------------------------------------------------ trials
def _load_image_list(path: Path, stimuli: pd.DataFrame) -> np.ndarray:
    """Image of each trial (trials,) int64 from a list of file names."""
    image_of_name = stimuli.set_index("name")["image"].to_dict()
    images = []
    with read_errors(path, "it must name an image in each line, so fetch it again"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(filter(None, map(str.strip, lines)), 1):
        stem = Path(line).stem
        image = image_of_name.get(stem, image_of_name.get(stem.removeprefix("rep_")))
        if image is None:
            raise PerceptError(
                f"{path} names {line} in line {number}, which is not below {PRESENTED}: fetch the"
                " stimuli again."
            )
        images.append(image)
    return np.array(images, np.int64)


def _load_image_lists(files: FilesByName, stimuli: pd.DataFrame) -> dict[str, np.ndarray]:
    """Image of each trial, for each subject whose list is there."""
    lists = {}
    for name in map(subject_name, SUBJECTS):
        paths = files.get(IMAGE_LIST.format(name))
        if paths:
            lists[name] = _load_image_list(paths[0], stimuli)
    return lists


def _trials(
    files: FilesByName, name: str, stimuli: pd.DataFrame, betas: BetaSource, sessions: str
) -> pd.DataFrame:
    """The table of trials, split into train and test."""
    lists = _load_image_lists(files, stimuli)
    list_name = IMAGE_LIST.format(name)
    if name not in lists:
        raise PerceptError(
            f"{list_name} (the image of each trial) is missing beside {betas.description}: fetch"
            " it."
        )
    images = lists[name]
    if len(images) != betas.n_trials:
        raise PerceptError(
            f"There are {betas.n_trials} trials of {name} in {betas.description}, while"
            f" {files[list_name][0]} names {len(images)}: a session is missing, or the files do"
            " not belong together."
        )
    session_sizes = _session_sizes(betas, sessions)
    session = np.repeat(np.arange(len(session_sizes)), session_sizes)
    trials = pd.DataFrame({"trial": np.arange(len(images)), "image": images, "session": session})
    trials["run"] = _runs(session_sizes)
    trials["repeat"] = number_repeats(trials)
    repeated = np.concatenate([_find_repeated(images) for images in lists.values()])
    is_test = np.isin(images, repeated)
    if not is_test.any():
        warnings.warn(
            f"{name} saw no image that was shown more than once: there is no test set, unless"
            " splits.csv in the source names one.",
            stacklevel=3,
        )
    trials["split"] = np.where(is_test, "test", "train")
    return trials


def _runs(session_sizes: list[int]) -> np.ndarray:
    """Run of each trial (trials,), from 0; -1 in a session that is no multiple of 37 trials."""
    runs = []
    for size in session_sizes:
        if size % TRIALS_PER_RUN == 0:
            runs.append(np.arange(size) // TRIALS_PER_RUN)
        else:
            runs.append(np.full(size, -1))
    return np.concatenate(runs)


def _session_sizes(betas: BetaSource, sessions: str) -> list[int]:
    if betas.session_sizes is not None:
        return betas.session_sizes
    if not sessions:
        warnings.warn(
            "The matrices do not tell sessions: all trials are taken as one, 0; give their numbers"
            " of trials as sessions='370,333,...'.",
            stacklevel=4,
        )
        return [betas.n_trials]
    texts = [text.strip() for text in sessions.split(",")]
    sizes = [int(text) for text in texts if re.fullmatch("[0-9]{1,9}", text)]
    is_valid = len(sizes) == len(texts) and min(sizes) >= 1
    if not is_valid or sum(sizes) != betas.n_trials:
        raise PerceptError(
            f"sessions={sessions!r} must be numbers of trials, separated by commas, that add up to"
            f" {betas.n_trials}."
        )
    return sizes


def _find_repeated(image_list: np.ndarray) -> np.ndarray:
    """Images that occur more than once."""
    images, counts = np.unique(image_list, return_counts=True)
    return images[counts > 1]


# ----------------------------------------------------------------------------------------- volumes
def _open_volumes(files: FilesByName, name: str, roi_names: list[str]) -> BetaSource | None:
    """The betas of the session files, or None where there are none."""
    paths = _find_session_files(files, name)
    if not paths:
        return None
    shapes = [_open_nifti(path).shape for path in paths]
    grid = shapes[0][:3]
    for path, shape in zip(paths, shapes, strict=True):
        if len(shape) != 4 or shape[:3] != grid:
            raise PerceptError(
                f"{path} has shape {shape}, it must be (x, y, z, trials) with (x, y, z) ="
                f" {grid}: fetch it again."
            )
    places, voxels = _select_voxels(files, name, roi_names, grid)
    # a voxel without a value has none in any volume of a session, so the first one tells
    first_volumes = [next(_iterate_volumes(path, places)) for path in paths]
    finite = np.logical_and.reduce([np.isfinite(volume) for volume in first_volumes])
    if not finite.all():
        warnings.warn(
            f"{int((~finite).sum())} voxels of {name} have no value in some session: they are left"
            " out.",
            stacklevel=3,
        )
        places, voxels = places[finite], voxels[finite].reset_index(drop=True)
    session_sizes = [int(shape[3]) for shape in shapes]
    return BetaSource(
        n_trials=sum(session_sizes),
        voxels=voxels,
        blocks=_volume_blocks(paths, places, name),
        description=f"{len(paths)} session files in {paths[0].parent}",
        session_sizes=session_sizes,
    )


def _find_session_files(files: FilesByName, name: str) -> list[Path]:
    """The session files in their order, none missing."""
    matches = _match_files(files, rf"{name}_{BETAS}_ses-(\d+)\.nii(?:\.gz)?")
    numbered = sorted((int(match[1]), path) for match, path in matches)
    if not numbered:
        return []
    gap = find_gap((session for session, _ in numbered), 1)
    if gap is not None:
        raise PerceptError(
            f"Session {gap} of {name} ({name}_{BETAS}_ses-{gap:02d}.nii.gz) is"
            f" missing in {numbered[0][1].parent}: fetch it."
        )
    return [path for _, path in numbered]


def _open_nifti(path: Path) -> Any:
    """nibabel's array proxy: shape, dtype, offset, slope and inter."""
    return open_nifti(path, "voxels").dataobj


def _load_mask(path: Path, grid: tuple[int, ...]) -> np.ndarray:
    """A mask in the order of the file (x fastest), bool (x * y * z,)."""
    proxy = _open_nifti(path)
    is_single_volume = math.prod(proxy.shape) == math.prod(grid)
    if proxy.shape[:3] != grid or not is_single_volume:
        raise PerceptError(
            f"{path} has shape {proxy.shape}, the betas have (x, y, z) = {grid}: take the mask of"
            " this subject, with its axes in this order."
        )
    return to_mask(next(_iterate_volumes(path, slice(None))), str(path))


def _select_voxels(
    files: FilesByName, name: str, roi_names: list[str], grid: tuple[int, ...]
) -> tuple[np.ndarray, pd.DataFrame]:
    """Places of the chosen voxels in a volume (voxels,), and their table: regions, x, y, z (mm)."""
    nibabel = require_extra("nibabel", "nsd")
    masks = sorted(
        _match_files(files, rf"sub-{name}_mask-(LH|RH)(\w+)\.nii(?:\.gz)?"),
        key=lambda mask: mask[0].string,
    )
    matches = [match for match, _ in masks]
    halves = [(match[1], MISNAMED.get(match[2], match[2])) for match in matches]
    _warn_of_missing_halves(set(halves), f"masks of {name}")
    regions: dict[str, np.ndarray] = {}
    for (_, region), (_, path) in zip(halves, masks, strict=True):
        regions[region] = regions.get(region, False) | _load_mask(path, grid)
    if roi_names == ["brain"] or (not roi_names and not regions):
        reference = _find_brain_mask(files, name)
        is_chosen = _load_mask(reference, grid)
    else:
        check_rois(roi_names, regions, name)
        reference = masks[0][1]
        chosen_regions = [regions[region] for region in roi_names or regions]
        is_chosen = np.logical_or.reduce(chosen_regions)
    places = np.flatnonzero(is_chosen)
    if not len(places):
        raise PerceptError(
            f"The masks of {name} for {','.join(roi_names) or 'all regions'} hold no voxel: choose"
            " other rois."
        )
    members = {region: mask[places] for region, mask in regions.items()}
    ijk = np.stack(np.unravel_index(places, grid, order="F"), axis=1)
    affine = nibabel.load(reference).affine
    xyz = nibabel.affines.apply_affine(affine, ijk)
    table = make_roi_columns(members, len(places))
    table[["x", "y", "z"]] = xyz
    return places, table


def _find_brain_mask(files: FilesByName, name: str) -> Path:
    paths = files.get(f"{name}_brainmask.nii.gz")
    if not paths:
        raise PerceptError(
            f"{name} has neither masks of regions"
            f" (sub-{name}/sub-{name}_mask-LHEarlyVis.nii.gz, ...) nor {name}_brainmask.nii.gz:"
            " fetch them."
        )
    return paths[0]


def _warn_of_missing_halves(halves: set[tuple[str, str]], owner: str) -> None:
    """Warn of regions, given as (hemisphere, region), of which one hemisphere alone is there."""
    for side, region in sorted(halves):
        other = "RH" if side == "LH" else "LH"
        if (other, region) not in halves:
            warnings.warn(
                f"Of the {owner}, {other}{region} is missing: {region} is read from one hemisphere,"
                " fetch the other.",
                stacklevel=4,
            )


def _iterate_volumes(path: Path, places: np.ndarray | slice) -> Iterator[np.ndarray]:
    """The chosen voxels of each volume of a file in turn, float32 (voxels,), one in memory."""
    proxy = _open_nifti(path)
    grid, n_volumes = proxy.shape[:3], int(np.prod(proxy.shape[3:]))
    size = int(np.prod(grid)) * proxy.dtype.itemsize
    n_read = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(proxy.offset)
            while n_read < n_volumes:
                content = file.read(size)
                if len(content) < size:
                    raise EOFError("end of file")
                n_read += 1
                if n_read == n_volumes:
                    file.read(1)  # gzip compares its sum at the end of the file only
                row = np.frombuffer(content, proxy.dtype)[places]
                if (proxy.slope, proxy.inter) != (1, 0):
                    row = row * proxy.slope + proxy.inter
                yield row.astype(np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise PerceptError(
            f"{path} is damaged or cut off at trial {n_read} of {n_volumes} ({shorten(error)}):"
            " fetch it again."
        ) from error


def _volume_blocks(paths: list[Path], places: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Blocks of rows (trials, voxels) of the session files."""
    for path in progress(paths, f"sessions of {name}", len(paths)):
        rows: list[np.ndarray] = []
        for row in _iterate_volumes(path, places):
            rows.append(row)
            if len(rows) == BLOCK_ROWS:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)


# ---------------------------------------------------------------------------------------- matrices
def _open_matrices(files: FilesByName, name: str, roi_names: list[str], root: Path) -> BetaSource:
    """The betas of the matrices of regions, left and right of each region beside one another."""
    matches = _match_files(files, rf"{name}_{BETAS}_allses_(LH|RH)(\w+)\.npy")
    paths = {(match[2], match[1]): path for match, path in matches}  # by (region, hemisphere)
    if not paths:
        raise PerceptError(
            f"{root} holds no betas of {name}: fetch {name}_{BETAS}_ses-NN.nii.gz of all sessions,"
            f" or {name}_{BETAS}_allses_LHEarlyVis.npy, ..."
        )
    if roi_names == ["brain"]:
        raise PerceptError(
            f"rois='brain' needs the volumes ({name}_{BETAS}_ses-NN.nii.gz) and"
            f" {name}_brainmask.nii.gz: {root} holds matrices of regions only."
        )
    check_rois(roi_names, {region for region, _ in paths}, name)
    _warn_of_missing_halves({(side, region) for region, side in paths}, f"matrices of {name}")
    chosen = sorted(key for key in paths if not roi_names or key[0] in roi_names)
    arrays = [_load_matrix(paths[key]) for key in chosen]
    n_trials = len(arrays[0])
    for key, array in zip(chosen, arrays, strict=True):
        if len(array) != n_trials:
            raise PerceptError(
                f"{paths[key]} has shape {array.shape}, the one before it {n_trials} trials: it"
                " must be (trials, voxels), with its axes in this order."
            )
    widths = [array.shape[1] for array in arrays]
    region_of_voxel = np.repeat([region for region, _ in chosen], widths)
    members = {region: region_of_voxel == region for region, _ in chosen}
    return BetaSource(
        n_trials=n_trials,
        voxels=make_roi_columns(members, len(region_of_voxel)),
        blocks=_matrix_blocks(arrays, name),
        description=f"{len(chosen)} matrices in {paths[chosen[0]].parent}",
    )


def _load_matrix(path: Path) -> np.ndarray:
    array = map_npy(path)
    if array.ndim != 2:
        raise PerceptError(f"{path} has shape {array.shape}: it must be (trials, voxels).")
    return array


def _matrix_blocks(arrays: list[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """Blocks of rows (trials, voxels) of matrices beside one another."""
    starts = range(0, len(arrays[0]), BLOCK_ROWS)
    for start in progress(starts, f"trials of {name}", len(starts)):
        rows = [array[start : start + BLOCK_ROWS] for array in arrays]
        yield np.concatenate(rows, axis=1)
