"""NSD-synthetic (Gifford et al. 2024): 284 artificial pictures, one session, for tests only.

- <source>/nsddata_betas/ppdata/subjAA/<space>/nsdsyntheticbetas_<version>/betas_nsdsynthetic.hdf5
  or .nii.gz: 744 trials as int16 of percent signal change x 300.
- nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat: masterordering (744 numbers from 1 to
  284), the same for all subjects. Eight runs of 93 trials, in turn with a fixation task (the first)
  and a one-back task.
- nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_stimuli.hdf5: imgBrick (220, 714, 1360, 3);
  nsdsynthetic_colorstimuli_subjAA.hdf5: the 64 colour pictures of each subject.

All trials are test: these pictures are nothing that a decoder may train on. The image id is the
number from 0 of the first 220; colour pictures, which differ between subjects, have 220 + 64 times
(subj - 1) + their own number. Pictures are cut to the central square, as published analyses do, so
that words shown at the far sides vanish. A picture that equals the one before it in the run was the
one-back target: these trials are kept, or excluded with one_back="exclude".

Inferred: the axes of the betas, as for NSD; nothing of NSD's own could be tried here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import number_repeats
from src.files.foreign import read_errors
from src.readers.common import center_crop_resize, load_mat, to_integers
from src.readers.hdf5 import open_dataset
from src.readers.nsd import TERMS as NSD_TERMS
from src.readers.nsd_evaluation import (
    check_evaluation_options,
    describe_zscore,
    load_evaluation_betas,
)
from src.readers.nsd_files import NsdFolders
from src.readers.recording import Recording, store_recording
from src.utils import PerceptError, require_file

TERMS = NSD_TERMS

N_IMAGES, N_COMMON, N_COLOUR = 284, 220, 64

N_RUNS = 8

TASKS = ("both", "fixation", "one-back")


@dataclass(frozen=True)
class SyntheticFiles:
    """Where the files lie."""

    root: Path
    subj: int

    @property
    def design(self) -> Path:
        """The order of the pictures."""
        return self.root / "nsddata/experiments/nsdsynthetic/nsdsynthetic_expdesign.mat"

    @property
    def stimuli(self) -> Path:
        """The pictures of all subjects."""
        return self.root / "nsddata_stimuli/stimuli/nsdsynthetic/nsdsynthetic_stimuli.hdf5"

    @property
    def colour_stimuli(self) -> Path:
        """The colour pictures of this subject."""
        return self.stimuli.with_name(f"nsdsynthetic_colorstimuli_subj{self.subj:02d}.hdf5")


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    task: str = "both",
    one_back: str = "keep",
    roi: str = "nsdgeneral",
    rois: str = "",
    space: str = "func1pt8mm",
    betas_version: str = "betas_fithrf_GLMdenoise_RR",
    zscore: str = "session",
    linear_display: bool = False,
    image_size: int = 256,
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout, as a test set.

    Args:
        source: NSD root, with nsddata/, nsddata_betas/ and nsddata_stimuli/.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 8.
        task: both, fixation or one-back: trials of the other task are excluded.
        one_back: keep, or exclude trials whose picture equals the one before.
        roi, rois, space: as for `src.readers.nsd.read`, volumes only; take those of the trained
            decoder.
        betas_version: betas_fithrf or betas_fithrf_GLMdenoise_RR.
        zscore: run, session or none, with the statistics of these trials themselves.
        linear_display: show pixels as the square root of their share of white, as some analyses do
            for NSD's linear display.
        image_size: side of the images, 0 for the 714 pixels of the source.
        bad_voxels: see `store_recording`.
        attributes: what is to be said about the betas where they are not NSD's.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, damaged or unfitting file, or an unknown option.
    """
    root = require_file(source, "the root of NSD")
    check_evaluation_options(subj, space, betas_version, zscore, image_size)
    if task not in TASKS or one_back not in ("keep", "exclude"):
        raise PerceptError(
            f"task is {task!r} and one_back {one_back!r}: choose one of {', '.join(TASKS)}, and"
            " keep or exclude."
        )
    files = SyntheticFiles(root, subj)
    numbers = _load_order(files.design)
    folders = NsdFolders(
        root, subj, space, f"nsdsyntheticbetas_{betas_version.removeprefix('betas_')}"
    )
    betas = load_evaluation_betas(folders, "betas_nsdsynthetic", len(numbers), roi, rois)
    trials = _make_trials(numbers, subj, task, one_back)
    shown_numbers = np.unique(numbers)
    image_ids = _to_image_ids(shown_numbers, subj)
    rows = np.arange(len(trials))
    n_tested = trials.loc[trials["split"] == "test", "image"].nunique()
    published = {
        "source": f"NSD-synthetic {betas_version} {space}",
        "units": "percent signal change",
        "normalisation": describe_zscore(zscore),
        "protocol": f"nsd-synthetic-{n_tested}" + ("" if task == "both" else f"-{task}"),
        "evaluation_only": "True",
        **betas.attributes,
    }
    recording = Recording(
        betas=betas.select(rows, trials["run"].to_numpy(), zscore),
        trials=trials,
        images=_iterate_images(files, shown_numbers, image_size, linear_display),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=betas.voxels,
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _load_order(path: Path) -> np.ndarray:
    """Number of the picture of each trial, from 0."""
    require_file(path, "the order of the pictures")
    content = load_mat(path, ("masterordering",))
    numbers = to_integers(content["masterordering"], f"masterordering of {path}").ravel() - 1
    if not numbers.size or not 0 <= numbers.min() <= numbers.max() < N_IMAGES:
        raise PerceptError(
            f"masterordering of {path} must hold numbers from 1 to {N_IMAGES}: fetch it again."
        )
    if len(numbers) % N_RUNS:
        raise PerceptError(
            f"masterordering of {path} has {len(numbers)} trials, which are not {N_RUNS} runs of"
            " the same length: fetch it again."
        )
    return numbers


def _to_image_ids(numbers: np.ndarray, subj: int) -> np.ndarray:
    """Image ids, which are other ones for the colour pictures of each subject."""
    return np.where(numbers < N_COMMON, numbers, numbers + N_COLOUR * (subj - 1))


def _make_trials(numbers: np.ndarray, subj: int, task: str, one_back: str) -> pd.DataFrame:
    """The table of trials, all of them test or excluded."""
    n_trials = len(numbers)
    run = np.arange(n_trials) // (n_trials // N_RUNS)
    is_same_run = np.diff(run, prepend=-1) == 0
    is_target = is_same_run & (np.diff(numbers, prepend=-1) == 0)
    task_of_run = np.where(run % 2 == 0, "fixation", "one-back")
    is_tested = np.full(n_trials, True) if task == "both" else task_of_run == task
    if one_back == "exclude":
        is_tested &= ~is_target
    trials = pd.DataFrame({"trial": np.arange(n_trials), "image": _to_image_ids(numbers, subj)})
    trials["session"], trials["run"] = 0, run
    trials["repeat"] = number_repeats(trials)
    trials["split"] = np.where(is_tested, "test", "exclude")
    return trials


def _iterate_images(
    files: SyntheticFiles, numbers: np.ndarray, image_size: int, linear_display: bool
) -> Iterator[np.ndarray]:
    """Blocks uint8 (1, side, side, 3) of the pictures of some numbers, ascending."""
    parts = {
        files.stimuli: numbers[numbers < N_COMMON],
        files.colour_stimuli: numbers[numbers >= N_COMMON] - N_COMMON,
    }
    for path, rows in parts.items():
        if not len(rows):
            continue
        with open_dataset(path, "imgBrick", "the pictures", rows) as brick:
            has_axes = brick.ndim == 4 and brick.shape[-1] == 3 and brick.dtype == np.uint8
            if not has_axes or len(brick) <= rows.max():
                raise PerceptError(
                    f"imgBrick of {path} is {brick.dtype} {brick.shape}, where uint8 (more than"
                    f" {rows.max()}, height, width, 3) is expected: fetch it again."
                )
            for row in rows:
                with read_errors(path):
                    image = brick[row]
                if linear_display:
                    image = np.rint(np.sqrt(image / 255) * 255).astype(np.uint8)
                yield _cut_square(image, image_size)[None]


def _cut_square(image: np.ndarray, image_size: int) -> np.ndarray:
    """The central square, shrunk to `image_size`, or whole for 0."""
    return center_crop_resize(image, image_size or min(image.shape[:2]))
