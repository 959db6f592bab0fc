"""Runs with their scores: reading them, and finding those that can be compared.

Only runs that were scored on the same images are compared (`select_same_images`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.records import CONTROLS, REMEDY, read_metrics
from src.evaluation.sanity_checks import check_same_test
from src.files.foreign import load_parquet
from src.parameters import list_decoders
from src.utils import PerceptError, check_name, read_json

NO_BRAIN = ("autoencoder",)  # a condition that no brain takes part in: the low level's upper bound

TRAININGS = (  # stages that train a decoder; the first with recorded parameters describes the run
    "02_train_roi_models",
    "01_train_high_level",
    "01_train_mindeye2",
    "01_train_combined",
    "02_train_basic_autoencoder",
)

HELD_OUT = "+cluster-held-out"  # the end of the protocol of a run trained without some clusters


@dataclass(frozen=True)
class ScoredRun:
    """A run with its scores.

    Attributes:
        name: path below results/.
        records: of metrics.json by metric.
        scores: the table of scores.parquet.
        pixels: identity of the test images, "" where it was not recorded.
        training: parameters of its training by name; none for reconstructions made elsewhere.
        resizing: of images before scoring.
    """

    name: str
    records: dict[str, dict[str, Any]]
    scores: pd.DataFrame
    pixels: str
    training: dict[str, Any]
    resizing: str = ""

    @property
    def test_set(self) -> str:
        """Id of the test set."""
        return str(next(iter(self.records.values()))["test_set"])

    @property
    def protocol(self) -> str:
        """Name of the data protocol."""
        return str(next(iter(self.records.values()))["protocol"])

    @property
    def conditions(self) -> list[str]:
        """Conditions that were scored, e.g. system, ridge, shuffled."""
        return list(dict.fromkeys(self.scores["row"]))

    @property
    def decoders(self) -> list[str]:
        """Conditions that decode the brain in another way: neither the system, nor a control, nor
        the system with fewer repeats.
        """
        excluded = {*CONTROLS, *NO_BRAIN}
        return [
            name
            for name in self.conditions
            if name not in excluded and not name.startswith("repeats_")
        ]

    def values(self, metric: str, condition: str = "system") -> pd.Series:
        """Scores (n,) indexed by image; those of several draws are averaged.

        Empty where there are none.
        """
        is_metric = self.scores["metric"] == metric
        selected = self.scores[is_metric & (self.scores["row"] == condition)]
        return selected.groupby("image", sort=False)["value"].mean()

    def has(self, metric: str, condition: str) -> bool:
        """Whether the condition was scored by the metric."""
        return len(self.values(metric, condition)) > 0

    def decoded(self) -> dict[str, str]:
        """Condition by decoder that was trained: {"network": "system", "ridge": "ridge"}, or
        {"ridge": "system"}.
        """
        decoder = str(self.training.get("decoder", ""))
        if not decoder:
            return {}
        main, *alternatives = list_decoders(decoder)
        return {main: "system"} | {name: name for name in alternatives}


# ------------------------------------------------------------------------------------------ reading
def read_runs(results: str | Path, runs: str = "") -> list[ScoredRun]:
    """All runs under results/ that have scores, by name, or those that are named, in that order.

    Args:
        results: the folder that holds a folder a run.
        runs: names separated by commas, "" for all. A point of a sweep is <sweep>/<label>; * stands
            for any letters, so that <sweep>/* are its points.

    Raises:
        PerceptError: a named run has no scores or damaged ones, or nothing has.

    Warns:
        UserWarning: naming a run that is left out, as its files are damaged.
    """
    results = Path(results)
    parts = [part.strip(" /") for part in runs.split(",")]
    names = list(dict.fromkeys(filter(None, parts)))
    for name in names:
        check_name(name, "A name in runs", parts=2)
    by_name: dict[str, ScoredRun] = {}
    damaged: list[PerceptError] = []
    for pattern in names or ["*"]:
        matches = _read_matching(results, pattern, damaged)
        if damaged and pattern in names and not matches:
            raise damaged[-1]  # what was asked for is not left out
        if names and not matches:
            scored = sorted(folder.parent.name for folder in results.glob("*/metrics.json"))
            raise PerceptError(
                f"{results / pattern} holds no scores (metrics.json and scores.parquet of notebook"
                f" 06); runs with scores: {', '.join(scored) or 'none'}."
            )
        for run in matches:
            by_name.setdefault(run.name, run)
    if not by_name and damaged:
        raise damaged[0]
    if not by_name:
        raise PerceptError(
            f"There are no scores under {results} to compare: run `python run.py mindeye --mini`"
            " first."
        )
    for error in damaged:
        warnings.warn(f"A run is left out: {error}", stacklevel=2)
    return list(by_name.values())


def _read_matching(results: Path, pattern: str, damaged: list[PerceptError]) -> list[ScoredRun]:
    """The runs with scores in the folders that match a pattern.

    Args:
        results: folder of the results.
        pattern: of names of runs.
        damaged: gets the error of each run that cannot be read; the others are read all the same.
    """
    runs = []
    for folder in sorted(results.glob(f"{pattern}/")):
        try:
            run = _read_run(folder, folder.relative_to(results).as_posix())
        except PerceptError as error:
            damaged.append(error)
            continue
        if run is not None:
            runs.append(run)
    return runs


def _read_run(folder: Path, name: str) -> ScoredRun | None:
    """The scores of a run; none where it has not been scored.

    Raises:
        PerceptError: if one of its files is damaged or of something else.
    """
    if not (folder / "metrics.json").exists() or not (folder / "scores.parquet").exists():
        return None
    content = read_metrics(folder / "metrics.json")
    scores = load_parquet(folder / "scores.parquet", REMEDY)
    if not {"metric", "row", "image", "value"} <= set(scores.columns):
        return None
    if not pd.api.types.is_numeric_dtype(scores["value"]):
        path = folder / "scores.parquet"
        raise PerceptError(f"{path} holds values that are no numbers: {REMEDY}.")
    metrics = set(scores["metric"])  # "top1 (ridge)" is a condition of top1, not a metric
    records = {record["name"]: record for record in content["metrics"] if record["name"] in metrics}
    if not records:
        return None
    about = content["provenance"]
    tested = about.get("test_set")
    pixels = str(tested.get("pixels", "")) if isinstance(tested, dict) else ""
    settings = about.get("settings", {})
    resizing = str(settings.get("resizing", "")).split(":")[0]
    return ScoredRun(name, records, scores, pixels, _read_training(folder), resizing)


def _read_training(folder: Path) -> dict[str, Any]:
    """Parameters of a run's training by name, none where they were not recorded."""
    for stage in TRAININGS:
        path = folder / "parameters" / f"{stage}.json"
        if path.exists():
            parameters = read_json(path, keys=(), remedy="run that stage again")
            values = parameters.items()
            return {name: entry["value"] for name, entry in values if "value" in entry}
    return {}


# -------------------------------------------------------------------------------------- same images
def select_same_images(
    runs: Sequence[ScoredRun], test_set: str = "", refuse: bool = False
) -> tuple[list[ScoredRun], list[str]]:
    """The runs that were scored on one test set, with images numbered alike.

    Test sets are the same where their ids are, or where the images are: reconstructions that were
    made elsewhere number their images by place, and take the ids of the run whose images they
    share.

    Args:
        runs: of `read_runs`.
        test_set: id of the test set, "" for that of most runs.
        refuse: whether runs of another test set are an error; otherwise they are left out.

    Returns:
        The comparable runs, and a sentence that names those left out, none when all are there.

    Raises:
        PerceptError: no run has the test set; or, with refuse, test sets differ.
    """
    set_of_pixels = {}
    for run in reversed(runs):
        if run.pixels and run.test_set != run.pixels:
            set_of_pixels[run.pixels] = run.test_set
    ids = {run.name: set_of_pixels.get(run.pixels or run.test_set, run.test_set) for run in runs}
    selected = set_of_pixels.get(test_set, test_set) or _find_most_frequent(ids)
    alarms = check_same_test(ids)
    if selected not in ids.values():
        raise PerceptError(
            f"No run was scored on the test set {selected}: choose among"
            f" {', '.join(dict.fromkeys(ids.values()))}."
        )
    if alarms and refuse:
        raise PerceptError(alarms[0])
    comparable = [run for run in runs if ids[run.name] == selected]
    excluded = [run.name for run in runs if ids[run.name] != selected]
    sentences = []
    if excluded:
        names = ", ".join(excluded)
        sentences = [f"{alarms[0]} Left out: {names}; compared are those of {selected}."]
    model = next((run for run in comparable if run.test_set == selected), comparable[0])
    renumbered = [run if run.test_set == selected else _renumber(run, model) for run in comparable]
    return renumbered, sentences


def _find_most_frequent(ids: Mapping[str, str]) -> str:
    """The test set of most runs, of several the first."""
    values = list(ids.values())
    return max(dict.fromkeys(values), key=values.count)


def _renumber(run: ScoredRun, model: ScoredRun) -> ScoredRun:
    """A run of the same images under other ids, with the ids of `model`."""
    old_ids = _image_order(run)
    new_ids = _image_order(model)
    if len(old_ids) != len(new_ids):
        raise PerceptError(
            f"{run.name} and {model.name} are said to have the same images, but have"
            f" {len(old_ids)} and {len(new_ids)}: score both again."
        )
    new_of_old = dict(zip(old_ids, new_ids, strict=True))
    return replace(run, scores=run.scores.assign(image=run.scores["image"].map(new_of_old)))


def _image_order(run: ScoredRun) -> np.ndarray:
    """Image ids in the order of the images: that in which a metric of all images was written."""
    system = run.scores[run.scores["row"] == "system"]
    groups = system.groupby(["stage", "metric"], sort=False)
    per_metric = [part["image"].to_numpy() for _, part in groups]
    return max(reversed(per_metric), key=len)  # the stage that scored the images is the last


# ----------------------------------------------------------------------------------- shared metrics
def choose_metrics(
    runs: Sequence[ScoredRun], metrics: str = "", condition: str = "system"
) -> list[str]:
    """The metrics to show: those named (separated by commas), else all that every run has.

    Raises:
        PerceptError: no run has one that is named, or the runs have none in common.
    """
    available = _list_metrics(runs, condition)
    named = [part.strip() for part in metrics.split(",") if part.strip()]
    unknown = [name for name in named if name not in available]
    if unknown:
        raise PerceptError(
            f"No run has the metric {unknown[0]!r} of '{condition}': choose among"
            f" {', '.join(available) or 'none'}."
        )
    if named:
        return named
    shared = [name for name in available if all(_has_record(run, name, condition) for run in runs)]
    if not shared:
        raise PerceptError(
            f"The runs {', '.join(run.name for run in runs)} have no metric of '{condition}' in"
            " common: name some in `metrics`, or fewer runs."
        )
    return shared


def _has_record(run: ScoredRun, metric: str, condition: str) -> bool:
    return metric in run.records and run.has(metric, condition)


def _list_metrics(runs: Sequence[ScoredRun], condition: str) -> list[str]:
    """All metrics that any run has of a condition, in the order of the runs."""
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(name for name in run.records if run.has(name, condition))
    return list(names)


def missing_metrics(
    runs: Sequence[ScoredRun], metrics: Sequence[str], condition: str = "system"
) -> list[str]:
    """A sentence that names metrics which are not shown because some runs lack them, so that a run
    that was not finished does not shorten the table unnoticed.
    """
    available = _list_metrics(runs, condition)
    hidden = [name for name in available if name not in metrics]
    gaps = []
    for run in runs:
        n_missing = sum(not run.has(name, condition) for name in available)
        if n_missing:
            gaps.append(f"{run.name} lacks {n_missing}")
    if not hidden or not gaps:
        return []
    return [f"Not shown, as not every run has them: {', '.join(hidden)} ({', '.join(gaps)})."]


def setting_differences(runs: Sequence[ScoredRun]) -> list[str]:
    """A sentence where runs were scored under different settings, e.g. of resizing, which moves
    scores by itself; else none.
    """
    by_setting: dict[str, list[str]] = {}
    for run in runs:
        by_setting.setdefault(run.resizing or "not recorded", []).append(run.name)
    if len(by_setting) < 2:
        return []
    groups = "; ".join(f"{setting}: {', '.join(names)}" for setting, names in by_setting.items())
    return [
        f"These runs' images were resized in {len(by_setting)} ways before they were scored"
        f" ({groups}): score them again with one `resizing`."
    ]
