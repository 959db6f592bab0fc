"""Scores of several runs in one tidy table, and their paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from src.evaluation.compare.runs import ScoredRun
from src.evaluation.statistics import Difference, bootstrap_mean, paired_bootstrap
from src.utils import PerceptError

COLUMNS = [  # of comparison.csv
    "run",
    "row",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "protocol",
    "test_set",
    "better",
]

DIFFERENCE_COLUMNS = [  # of differences.csv
    "run",
    "baseline",
    "row",
    "metric",
    "value",
    "low",
    "high",
    "p",
    "n",
    "verdict",
]


def comparison(runs: Sequence[ScoredRun], metrics: Sequence[str]) -> pd.DataFrame:
    """All scores of some metrics, one line a run, condition and metric: `COLUMNS`.

    Values and intervals of the system, its baselines and its upper bound are those of metrics.json;
    those of other conditions are computed in the same way from scores.parquet
    (`statistics.bootstrap_mean`).
    """
    lines = []
    for run in runs:
        for metric in metrics:
            if metric not in run.records:
                continue
            record = run.records[metric]
            ending = [record["n"], run.protocol, run.test_set, record["better"]]
            for condition, entry in _collect_entries(run, metric).items():
                if "value" in entry:
                    numbers = [entry["value"], entry["low"], entry["high"]]
                    lines.append([run.name, condition, metric, *numbers, *ending])
    return pd.DataFrame(lines, columns=COLUMNS)


def _collect_entries(run: ScoredRun, metric: str) -> dict[str, dict[str, Any]]:
    """Value and interval of every condition of a metric."""
    record = run.records[metric]
    entries = {"system": record, **record["floors"], "ceiling": record["ceiling"]}
    for condition in run.conditions:
        if condition not in entries:
            values = run.values(metric, condition)
            if len(values):
                entries[condition] = bootstrap_mean(values)._asdict()
    return entries


def is_paired(a: pd.Series, b: pd.Series) -> bool:
    """Whether two series of scores (n,) are of the same images."""
    has_scores = len(a) > 0 and len(a) == len(b)
    return has_scores and set(a.index) == set(b.index)


def paired_difference(a: pd.Series, b: pd.Series, seed: int = 0) -> Difference:
    """`statistics.paired_bootstrap` of a - b, both (n,) indexed by image, over the same images in
    the order of their ids.
    """
    a = a.sort_index()
    return paired_bootstrap(a.to_numpy(), b.loc[a.index].to_numpy(), seed=seed)


def classify_difference(difference: Difference, better: str) -> str:
    """ "better", "worse", or "undecided" where the interval includes 0."""
    if difference.low <= 0 <= difference.high:
        return "undecided"
    is_better = (difference.low > 0) == (better == "higher")
    return "better" if is_better else "worse"


def differences(
    runs: Sequence[ScoredRun],
    metrics: Sequence[str],
    reference: str,
    condition: str = "system",
    seed: int = 0,
) -> pd.DataFrame:
    """Paired differences of every run to one of them, on the same images.

    Args:
        runs: comparable ones.
        metrics: of these.
        reference: name of the run that the others are compared with.
        condition: that is compared.
        seed: of the bootstrap.

    Returns:
        [run, baseline, row, metric, value, low, high, p, n, verdict], baseline being the reference,
        row the condition and value run - reference; a metric that two runs have on different images
        has no line.

    Raises:
        PerceptError: there is no such run.
    """
    by_name = {run.name: run for run in runs}
    if reference not in by_name:
        raise PerceptError(
            f"The baseline {reference!r} is not among the runs that are compared: choose one of"
            f" {', '.join(by_name)}."
        )
    lines = []
    for run in runs:
        if run.name == reference:
            continue
        for metric in metrics:
            values = run.values(metric, condition)
            reference_values = by_name[reference].values(metric, condition)
            if not is_paired(values, reference_values):
                continue
            difference = paired_difference(values, reference_values, seed)
            verdict = classify_difference(difference, run.records[metric]["better"])
            line = [run.name, reference, condition, metric, *difference, len(values), verdict]
            lines.append(line)
    return pd.DataFrame(lines, columns=DIFFERENCE_COLUMNS)


def clear_best(
    runs: Sequence[ScoredRun],
    metric: str,
    conditions: Mapping[str, Sequence[str]],
    seed: int = 0,
) -> tuple[str, str] | None:
    """The (run, condition) with the best mean, if its paired difference to the second best excludes
    0.

    Args:
        runs: comparable ones.
        metric: of these.
        conditions: by run those that take part.
        seed: of the bootstrap.
    """
    candidates = []
    for run in runs:
        for condition in conditions[run.name]:
            values = run.values(metric, condition)
            if len(values):
                candidates.append(((run.name, condition), values))
    direction = next(run.records[metric]["better"] for run in runs if metric in run.records)
    candidates.sort(key=lambda entry: entry[1].mean(), reverse=direction == "higher")
    if len(candidates) < 2:
        return None
    (best, best_values), (_, second_values) = candidates[:2]
    if not is_paired(best_values, second_values):
        return None
    difference = paired_difference(best_values, second_values, seed)
    includes_zero = difference.low <= 0 <= difference.high
    return None if includes_zero else best
