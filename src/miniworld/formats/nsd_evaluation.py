"""The mini world's test images as NSD-synthetic and NSD-Imagery, to evaluate a trained mini run."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io

from src.miniworld.formats.nsd import write_rois, write_session
from src.miniworld.formats.nsd_surfaces import to_scaled_integers
from src.miniworld.formats.source_data import SourceData, save_png
from src.miniworld.formats.voxel_grid import VoxelGrid, choose_small_grid
from src.readers.nsd_files import NsdFolders, check_options
from src.readers.nsd_imagery import N_STIMULI, RUNS, SETS, ImageryFiles
from src.readers.nsd_synthetic import N_COLOUR, N_COMMON, N_RUNS, SyntheticFiles
from src.utils import PerceptError, atomic, write_errors

SPACE = "func1pt8mm"

VERSION = "betas_fithrf_GLMdenoise_RR"

CUES = {"A": "HRVLPE", "B": "WKBCDT", "C": "SZMYNF"}


def write_synthetic(source: str | Path, subj: int, data: SourceData) -> Path:
    """Write the test trials of one subject as NSD-synthetic.

    Picture k of the test set is number k + 1, up to 284; the last trials are left out, so that
    eight runs are equally long.

    Args:
        source: the root; other subjects already in it must have seen the same trials.
        subj: 1 to 8.
        data: of the subject.

    Returns:
        `source`.

    Raises:
        PerceptError: for too few test trials, or a full disk.
    """
    check_options(subj, SPACE, VERSION, "auto")
    data.check_two_axes()
    trials = _select_test(data, N_COMMON + N_COLOUR)
    n_trials = len(trials) // N_RUNS * N_RUNS
    if not n_trials:
        raise PerceptError(f"There are {len(trials)} test trials: write at least {N_RUNS}.")
    trials = trials.iloc[:n_trials]
    files, root = SyntheticFiles(Path(source), subj), Path(source)
    images = np.unique(trials["image"])
    row_of_image = {image: row for row, image in enumerate(images)}
    numbers = trials["image"].map(row_of_image).to_numpy() + 1
    pixels = data.images[_find_rows(data, images)]
    with write_errors(root):
        with atomic(files.design) as temporary:
            content = {"masterordering": numbers[None].astype(float)}
            scipy.io.savemat(temporary, content, appendmat=False)
        parts = {files.stimuli: pixels[:N_COMMON], files.colour_stimuli: pixels[N_COMMON:]}
        for path, part in parts.items():
            with atomic(path) as temporary, h5py.File(temporary, "w") as file:
                file["imgBrick"] = part
        betas = data.betas[trials.index.to_numpy()]
        _write_betas(root, subj, data, betas, "nsdsynthetic")
    return root


def write_imagery(source: str | Path, subj: int, data: SourceData) -> Path:
    """Write the first twelve test images of one subject as NSD-Imagery.

    Vision trials are the trials of an image in turn; imagery trials are half of these, without any
    claim that imagery is so. Attention runs and set C are zeros.

    Args:
        source: the root.
        subj: 1 to 8.
        data: of the subject, with at least twelve test images.

    Returns:
        `source`.

    Raises:
        PerceptError: for too few test images, or a full disk.
    """
    check_options(subj, SPACE, VERSION, "auto")
    data.check_two_axes()
    trials = _select_test(data, 2 * N_STIMULI)
    images = np.unique(trials["image"])
    if len(images) < 2 * N_STIMULI:
        raise PerceptError(f"There are {len(images)} test images: write at least {2 * N_STIMULI}.")
    files, root = ImageryFiles(Path(source), subj), Path(source)
    labels_of_run = _draw_labels(np.random.default_rng(subj))
    betas = [_draw_run(data, trials, images, run, labels) for run, labels in labels_of_run.items()]
    with write_errors(root):
        for set_name in SETS:
            _write_set(files, set_name, data, images)
        for run, labels in labels_of_run.items():
            if not run.startswith("att"):
                _write_run(files, run, labels)
        _write_betas(root, subj, data, np.concatenate(betas), "nsdimagery")
    return root


def _select_test(data: SourceData, n_images: int) -> pd.DataFrame:
    """The trials of the first test images, in their order; the index is the row of betas."""
    ordered = data.sort_trials(("session", "run"))
    tested = ordered[ordered["split"] == "test"]
    images = np.unique(tested["image"])[:n_images]
    return tested[tested["image"].isin(images)]


def _find_rows(data: SourceData, images: np.ndarray) -> np.ndarray:
    """Row of each image id."""
    row_of_image = {image: row for row, image in enumerate(np.asarray(data.image_ids).tolist())}
    return np.array([row_of_image[image] for image in images.tolist()])


def _draw_labels(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Number of the stimulus of each beta of each run, from 1, in random order."""
    return {run: rng.permutation(np.arange(length) % N_STIMULI) + 1 for run, length in RUNS.items()}


def _draw_run(
    data: SourceData, trials: pd.DataFrame, images: np.ndarray, run: str, labels: np.ndarray
) -> np.ndarray:
    """The betas (betas of the run, voxels)."""
    if run.startswith("att") or run[3] == "C":
        return np.zeros((len(labels), data.n_voxels))
    first = N_STIMULI * SETS.index(run[3])
    share = 1.0 if run.startswith("vis") else 0.5
    rows, n_used = [], dict.fromkeys(range(1, N_STIMULI + 1), 0)
    for label in labels.tolist():
        repeats = trials.index[trials["image"] == images[first + label - 1]]
        rows.append(repeats[n_used[label] % len(repeats)])
        n_used[label] += 1
    return share * np.asarray(data.betas[np.array(rows)], np.float64)


def _write_set(files: ImageryFiles, set_name: str, data: SourceData, images: np.ndarray) -> None:
    """Write the pair list of a set, and of A and B the pictures."""
    pairs = np.empty((N_STIMULI, 3), object)
    for index, cue in enumerate(CUES[set_name]):
        pairs[index] = [float(index + 1), f"target{set_name}{index + 1}.png", cue]
    with atomic(files.pairs(set_name)) as temporary:
        scipy.io.savemat(temporary, {"pair_list": pairs}, appendmat=False)
    if set_name == "C":
        return
    first = N_STIMULI * SETS.index(set_name)
    members = images[first : first + N_STIMULI]
    for target, row in zip(pairs[:, 1], _find_rows(data, members), strict=True):
        save_png(files.pictures(set_name) / target, data.images[row])


def _write_run(files: ImageryFiles, run: str, labels: np.ndarray) -> None:
    """Write the trials of a run; in vision runs half of the cues are wrong."""
    cues = CUES[run[3]]
    table = pd.DataFrame({"TRIAL": np.arange(1, len(labels) + 1)})
    table = table.assign(SUBJECT=files.subj, SESSION=1, RUN=list(RUNS).index(run) + 1)
    table["CONDITION"] = labels
    cued = labels.copy()
    if run.startswith("vis"):
        cued[::2] = cued[::2] % N_STIMULI + 1
    table["CUE"] = [cues[label - 1] for label in cued]
    with atomic(files.trials(run)) as temporary:
        table.to_csv(temporary, sep="\t", index=False)


def _write_betas(
    root: Path, subj: int, data: SourceData, betas: np.ndarray, experiment: str
) -> None:
    """Write regions, and betas (trials, voxels) in percent signal change."""
    folders = NsdFolders(root, subj, SPACE, f"{experiment}{VERSION}")
    grid = VoxelGrid(choose_small_grid(data.n_voxels), data.n_voxels)
    write_rois(folders, data, grid)
    volumes = np.zeros((len(betas), grid.size), np.int16)
    volumes[:, grid.places] = to_scaled_integers(betas)
    path = folders.betas / f"betas_{experiment}.hdf5"
    write_session(path, volumes.reshape(len(betas), *grid.shape))
