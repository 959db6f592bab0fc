"""NSD-Imagery (Kneeland et al. 2025): seeing and imagining 18 stimuli, one session, for tests only.

- <source>/nsddata_betas/ppdata/subjAA/<space>/nsdimagerybetas_<version>/betas_nsdimagery.hdf5 or
  .nii.gz: 720 betas as int16 of percent signal change x 300, of 12 runs one after the other (RUNS).
  The attention runs (96 betas each) are not read.
- nsddata/bdata/nsdimagery/nsdimagery_subjAA_<run>.tsv, a row a trial. What was seen in a vision run
  is CONDITION (the cue was wrong in half of its trials); what was imagined in an imagery run is
  CUE.
- nsddata/experiments/nsdimagery/{A,B,C}_pair_list.mat: pair_list (6, 3), number, target and cue
  letter of each stimulus. CONDITION is matched with the number, the letter or the target.
- rawtargetimages/set{A,B}/ has the pictures. Set C are words, which have none: it is left out, as
  the published scores of images do, unless a folder setC is put there.

All trials are test. The image id is 0 to 5 for set A, 6 to 11 for B, 12 to 17 for C, in the order
of their numbers. Betas are z-scored within each run by default, with these data's own statistics,
as in the benchmark (MedARC-AI/MIRAGE).

That betas lie in the order of time within a run follows from GLMsingle's definition; one published
script takes them as grouped by condition. Both orders are compared on the vision runs (how often
the nearest mean of the other trials is the right one of six), and a warning tells if the grouped
order fits better. Inferred: what CONDITION holds. Nothing of NSD's own could be tried here.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import scipy.io

from src.data.layout import number_repeats
from src.files.foreign import load_csv, read_errors
from src.readers.common import load_image_table, load_images, parse_name_list
from src.readers.nsd import TERMS as NSD_TERMS
from src.readers.nsd_evaluation import (
    EvaluationBetas,
    check_evaluation_options,
    describe_zscore,
    load_evaluation_betas,
)
from src.readers.nsd_files import NsdFolders
from src.readers.pictures import FolderPictures
from src.readers.recording import Recording, store_recording
from src.utils import PerceptError, require_file

TERMS = NSD_TERMS

RUNS = {  # number of betas of each run, in their order
    "visA": 48,
    "attA": 96,
    "imgA_1": 48,
    "visB": 48,
    "attB": 96,
    "imgB_1": 48,
    "visC": 48,
    "attC": 96,
    "imgC_1": 48,
    "imgA_2": 48,
    "imgB_2": 48,
    "imgC_2": 48,
}

SETS = ("A", "B", "C")

N_STIMULI = 6  # of a set

TASKS = {"vision": "vis", "imagery": "img"}

LABEL_COLUMNS = {"vision": "CONDITION", "imagery": "CUE"}

BETTER = 0.05  # by so much must the grouped order identify more, for a warning


@dataclass(frozen=True)
class Stimulus:
    """One of the six stimuli of a set.

    Attributes:
        number: in the pair list, from 1.
        target: name of its picture, or its word.
        cue: letter.
    """

    number: int
    target: str
    cue: str

    def is_called(self, text: str) -> bool:
        """Whether a table means this stimulus: by its number, letter or target."""
        if text.replace(".0", "").isdecimal():
            return int(float(text)) == self.number
        target = PurePosixPath(self.target)
        return text.upper() == self.cue.upper() or text in (target.name, target.stem)


@dataclass(frozen=True)
class ImageryFiles:
    """Where the files lie."""

    root: Path
    subj: int

    @property
    def experiment(self) -> Path:
        """Folder of the pair lists and pictures."""
        return self.root / "nsddata/experiments/nsdimagery"

    def pairs(self, set_name: str) -> Path:
        """The pair list of a set."""
        return self.experiment / f"{set_name}_pair_list.mat"

    def pictures(self, set_name: str) -> Path:
        """Folder of the pictures of a set."""
        return self.experiment / "rawtargetimages" / f"set{set_name}"

    def trials(self, run: str) -> Path:
        """The table of the trials of a run."""
        return self.root / f"nsddata/bdata/nsdimagery/nsdimagery_subj{self.subj:02d}_{run}.tsv"


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    task: str = "vision",
    sets: str = "A,B",
    roi: str = "nsdgeneral",
    rois: str = "",
    space: str = "func1pt8mm",
    betas_version: str = "betas_fithrf_GLMdenoise_RR",
    zscore: str = "run",
    image_size: int = 256,
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout, as a test set.

    Args:
        source: NSD root, with nsddata/ and nsddata_betas/.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 8.
        task: vision (8 trials a stimulus) or imagery (16).
        sets: of the stimuli, separated by commas.
        roi, rois, space: as for `src.readers.nsd.read`, volumes only; take those of the trained
            decoder.
        betas_version: betas_fithrf or betas_fithrf_GLMdenoise_RR.
        zscore: run, session or none, with the statistics of these trials themselves.
        image_size: side of the images, 0 for that of the source.
        bad_voxels: see `store_recording`.
        attributes: what is to be said about the betas where they are not NSD's.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, damaged or unfitting file, an unknown option, or a trial whose
            stimulus is not in the pair list.

    Warns:
        UserWarning: if the betas seem to be grouped by condition.
    """
    root = require_file(source, "the root of NSD")
    check_evaluation_options(subj, space, betas_version, zscore, image_size)
    set_names = parse_name_list(sets)
    if task not in TASKS or not set_names or not set(set_names) <= set(SETS):
        raise PerceptError(
            f"task is {task!r} and sets {sets!r}: choose {' or '.join(TASKS)}, and sets of"
            f" {', '.join(SETS)}."
        )
    files = ImageryFiles(root, subj)
    stimuli = {name: _load_pairs(files.pairs(name)) for name in set_names}
    version = f"nsdimagerybetas_{betas_version.removeprefix('betas_')}"
    folders = NsdFolders(root, subj, space, version)
    betas = load_evaluation_betas(folders, "betas_nsdimagery", sum(RUNS.values()), roi, rois)
    trials = _make_trials(files, stimuli, task)
    accuracy = _check_order(files, stimuli, betas)
    run_of_beta = np.repeat(np.arange(len(RUNS)), list(RUNS.values()))
    image_files = _find_images(files, stimuli)
    image_ids = np.array(list(image_files))
    published = {
        "source": f"NSD-Imagery {betas_version} {space}",
        "units": "percent signal change",
        "normalisation": describe_zscore(zscore),
        "protocol": f"nsd-imagery-{task}" + ("" if sets == "A,B" else f"-{''.join(set_names)}"),
        "evaluation_only": "True",
        "order_check": json.dumps(accuracy),
        **betas.attributes,
    }
    recording = Recording(
        betas=betas.select(trials["trial"].to_numpy(), run_of_beta, zscore),
        trials=trials,
        images=load_images(image_files.values(), "Picture", image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=betas.voxels,
        captions=load_image_table("captions", image_ids, files.experiment),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


# ---------------------------------------------------------------------------------------- stimuli
def _load_pairs(path: Path) -> list[Stimulus]:
    """The stimuli of a set, in the order of their numbers."""
    with read_errors(require_file(path, "the stimuli of a set")):
        table = np.atleast_2d(scipy.io.loadmat(path, simplify_cells=True)["pair_list"])
        stimuli = [
            Stimulus(int(float(number)), str(target), str(cue)) for number, target, cue in table
        ]
    numbers = sorted(stimulus.number for stimulus in stimuli)
    if numbers != list(range(1, N_STIMULI + 1)):
        raise PerceptError(
            f"pair_list of {path} has the numbers {numbers}, where 1 to {N_STIMULI} are expected:"
            " fetch it again."
        )
    return sorted(stimuli, key=lambda stimulus: stimulus.number)


def _find_images(files: ImageryFiles, stimuli: dict[str, list[Stimulus]]) -> dict[int, Path]:
    """The picture of each image id."""
    images = {}
    for name, members in stimuli.items():
        folder = require_file(
            files.pictures(name),
            f"the pictures of set {name}",
            "set C are words without pictures: read sets=A,B, or put pictures there"
            if name == "C"
            else "fetch it",
        )
        pictures = FolderPictures(folder)
        for stimulus in members:
            row = pictures.find_row(stimulus.target)
            images[_to_image_id(name, stimulus.number)] = pictures.files[row]
    return dict(sorted(images.items()))


def _to_image_id(set_name: str, number: int) -> int:
    return N_STIMULI * SETS.index(set_name) + number - 1


# ----------------------------------------------------------------------------------------- trials
def _find_first_beta(run: str) -> int:
    """Number of the first beta of a run."""
    names = list(RUNS)
    return sum(RUNS[name] for name in names[: names.index(run)])


def _load_labels(files: ImageryFiles, run: str, column: str, stimuli: list[Stimulus]) -> np.ndarray:
    """Number of the stimulus of each trial of a run, from 1."""
    path = require_file(files.trials(run), f"the trials of run {run}")
    table = load_csv(path, (column,), sep="\t", dtype=str, keep_default_na=False)
    if len(table) != RUNS[run]:
        raise PerceptError(
            f"{path} has {len(table)} rows, run {run} has {RUNS[run]} betas: fetch it again."
        )
    if "TRIAL" in table:
        order = pd.to_numeric(table["TRIAL"], errors="coerce").to_numpy()
        if not np.array_equal(order, np.arange(1, len(table) + 1)):
            raise PerceptError(f"TRIAL of {path} does not count from 1 on: fetch it again.")
    numbers = []
    for text in table[column].str.strip():
        matches = [stimulus.number for stimulus in stimuli if stimulus.is_called(text)]
        if len(matches) != 1:
            names = ", ".join(f"{s.number} {s.target} {s.cue}" for s in stimuli)
            raise PerceptError(
                f"{path} has {text!r} in {column}, which is none of the stimuli {names}: fetch it"
                " and the pair lists again."
            )
        numbers += matches
    return np.array(numbers)


def _make_trials(
    files: ImageryFiles, stimuli: dict[str, list[Stimulus]], task: str
) -> pd.DataFrame:
    """The table of the trials of a task; trial is the number of the beta, from 0."""
    tables = []
    for number, run in enumerate(RUNS):
        set_name = run[3]
        if run[:3] != TASKS[task] or set_name not in stimuli:
            continue
        labels = _load_labels(files, run, LABEL_COLUMNS[task], stimuli[set_name])
        table = pd.DataFrame({"image": [_to_image_id(set_name, label) for label in labels]})
        table["trial"] = _find_first_beta(run) + np.arange(len(labels))
        tables.append(table.assign(run=number))
    trials = pd.concat(tables, ignore_index=True).assign(session=0, split="test")
    trials["repeat"] = number_repeats(trials)
    return trials


# ---------------------------------------------------------------------------------- order of betas
def _check_order(
    files: ImageryFiles, stimuli: dict[str, list[Stimulus]], betas: EvaluationBetas
) -> dict[str, float]:
    """How often vision trials are identified among six, if betas are in the order of time, and if
    they are grouped by condition; warns if the latter is more often.
    """
    hits: dict[str, list[np.ndarray]] = {"chronological": [], "grouped": []}
    for set_name, members in stimuli.items():
        run = f"vis{set_name}"
        labels = _load_labels(files, run, LABEL_COLUMNS["vision"], members)
        first = _find_first_beta(run)
        rows = betas.values[first : first + RUNS[run]]
        hits["chronological"].append(identify_among_means(rows, labels))
        hits["grouped"].append(identify_among_means(rows, np.sort(labels)))
    accuracy = {order: float(np.concatenate(parts).mean()) for order, parts in hits.items()}
    if accuracy["grouped"] > accuracy["chronological"] + BETTER:
        warnings.warn(
            f"Of the vision trials of NSD-Imagery {accuracy['chronological']:.0%} are identified"
            f" among {N_STIMULI} if betas are in the order of time, as they are read, and"
            f" {accuracy['grouped']:.0%} if they are grouped by condition: check the order of this"
            " release before any score is believed.",
            stacklevel=3,
        )
    return accuracy


def identify_among_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each trial correlates most with the mean of the other trials of its own stimulus.

    Args:
        rows: (trials, voxels).
        labels: (trials,) stimulus of each; each has at least two trials.

    Returns:
        bool (trials,).
    """
    spread = rows.std(axis=0)
    scored = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1)
    names = np.unique(labels)
    hits = np.zeros(len(rows), bool)
    for trial, row in enumerate(scored):
        is_other = np.arange(len(rows)) != trial
        means = [scored[(labels == name) & is_other].mean(axis=0) for name in names]
        scores = [np.corrcoef(row, mean)[0, 1] for mean in means]
        hits[trial] = names[int(np.argmax(scores))] == labels[trial]
    return hits
