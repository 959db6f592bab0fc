"""Scores over a parameter of the training: the number of voxel components or of sessions; and what
pretraining on other subjects adds (docs/sweeps.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from src.evaluation.compare.differences import (
    COLUMNS,
    classify_difference,
    comparison,
    differences,
    is_paired,
    paired_difference,
)
from src.evaluation.compare.runs import ScoredRun
from src.evaluation.records import BASELINES

SWEPT = ("n_components", "num_sessions")  # parameters of a training, 0 for all there is

SUFFICIENT_COLUMN = "not clearly worse than all voxels from"

NOT_COMPARED = ("multisubject_ckpt", "model_name", "recipe")  # in which a pretrained run may differ

GAIN_COLUMNS = [  # of pretraining.csv
    "run",
    "plain",
    "num_sessions",
    "metric",
    "value",
    "low",
    "high",
    "p",
    "n",
    "verdict",
]


def _put_all_last(counts: pd.Series) -> pd.Series:
    """Sort keys of numbers of components or sessions, of which 0 stands for all and comes last."""
    return counts.replace(0, np.iinfo(np.int32).max)


def curves(runs: Sequence[ScoredRun], metrics: Sequence[str], by: str) -> pd.DataFrame:
    """Scores by the number of principal components that replaced the voxels, or of training
    sessions, for recipes and decoders with at least two such numbers.

    Runs that differ in another of `SWEPT` from what is usual, or that pretrain for others, take no
    part; of several runs of one curve and number the first is taken.

    Args:
        runs: comparable ones.
        metrics: of these.
        by: one of `SWEPT`.

    Returns:
        [curve, run, row, metric, `by`, value, low, high, better] of the decoders and of their runs'
        baselines and upper bounds (row, where "system" is the decoder); 0 stands for all voxels or
        sessions; ascending, these last. Empty where there is no such curve.
    """
    parts = []
    points = set()
    # a run of one decoder comes before one of both, which has it as a second condition
    ordered = sorted(runs, key=lambda run: run.training.get("decoder") == "both")
    for run in ordered:
        if not _is_usual(run, by):
            continue
        for decoder, condition in run.decoded().items():
            curve = _name_curve(run, decoder)
            count = int(run.training.get(by, 0))
            if (curve, count) in points or condition not in run.conditions:
                continue
            points.add((curve, count))
            part = _select_curve_conditions(comparison([run], metrics), condition)
            parts.append(part.assign(curve=curve).assign(**{by: count}))
    table = pd.DataFrame(columns=[*COLUMNS, "curve", by])
    if parts:
        table = pd.concat(parts, ignore_index=True)
    n_counts = table.groupby("curve")[by].nunique()
    table = table[table["curve"].isin(n_counts[n_counts > 1].index)]
    counts = _put_all_last(table[by]).to_numpy(dtype=np.int64)
    table = table.iloc[np.lexsort((counts, table["curve"]))]
    columns = ["curve", "run", "row", "metric", by, "value", "low", "high", "better"]
    return table[columns].reset_index(drop=True)


def _is_usual(run: ScoredRun, by: str) -> bool:
    """Whether a training differs from the usual one in the parameter `by` at most."""
    usually_absent = [name for name in (*SWEPT, "multi_subject") if name != by]
    if any(run.training.get(name) for name in usually_absent):
        return False
    return run.training.get("split", "images") == "images"


def _name_curve(run: ScoredRun, decoder: str) -> str:
    """Recipe and decoder, e.g. "mindeye/mini, ridge"; pretrained networks have their own curve."""
    is_pretrained = decoder == "network" and run.training.get("multisubject_ckpt")
    start = "pretrained " if is_pretrained else ""
    return f"{run.training.get('recipe', '')}, {start}{decoder}"


def _select_curve_conditions(table: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The decoder's condition as "system", and the controls where it is the run's system."""
    selected = [condition]
    if condition == "system":
        selected += [*BASELINES, "chance", "ceiling"]
    part = table[table["row"].isin(selected)]
    return part.assign(row=part["row"].replace(condition, "system"))


def smallest_sufficient(
    points: pd.DataFrame, runs: Sequence[ScoredRun], seed: int = 0
) -> pd.DataFrame:
    """The fewest components from which on no number of them is worse than all voxels, in paired
    differences.

    Args:
        points: of `curves` by n_components.
        runs: those it was computed from.
        seed: of the bootstrap.

    Returns:
        [curve, metric, not clearly worse than all voxels from]; curves without a run of all voxels
        are absent.
    """
    by_name = {run.name: run for run in runs}
    lines = []
    system = points[points["row"] == "system"]
    for (curve, metric), part in system.groupby(["curve", "metric"], sort=False):
        decoder = str(curve).rsplit(", ", 1)[1]
        values = {}
        for count, name in zip(part["n_components"], part["run"], strict=True):
            run = by_name[name]
            values[count] = run.values(str(metric), run.decoded()[decoder])
        text = _describe_sufficient(values, part["better"].iloc[0], seed)
        if text:
            lines.append([curve, metric, text])
    return pd.DataFrame(lines, columns=["curve", "metric", SUFFICIENT_COLUMN])


def _describe_sufficient(values: Mapping[int, pd.Series], better: str, seed: int) -> str:
    """The least sufficient number of components of one curve, "" where nothing can be compared.

    Args:
        values: scores (n,) by number of components, 0 for all voxels.
        better: "higher" or "lower".
        seed: of the bootstrap.
    """
    if 0 not in values:
        return ""
    counts = [count for count in values if count and is_paired(values[count], values[0])]
    if not counts:
        return ""
    counts.sort(reverse=True)
    smallest = 0
    for count in counts:
        difference = paired_difference(values[count], values[0], seed)
        if classify_difference(difference, better) == "worse":
            break
        smallest = count
    return f"{smallest} components" if smallest else f"more than {counts[0]}"


def pretraining_gain(
    runs: Sequence[ScoredRun], metrics: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """What a start from weights that were pretrained on other subjects adds: paired differences, on
    the same images, to the run that is the same in all but that.

    The two have the same values of all parameters of their training but `multisubject_ckpt` and the
    names of run and recipe.

    Args:
        runs: comparable ones.
        metrics: of these.
        seed: of the bootstrap.

    Returns:
        [run, plain, num_sessions, metric, value, low, high, p, n, verdict], value being run -
        plain; all sessions are 0, and last.
    """
    parts = []
    for run in runs:
        plain = _find_without_pretraining(runs, run)
        if plain is None:
            continue
        shared = [name for name in metrics if name in run.records and name in plain.records]
        part = differences([plain, run], shared, plain.name, seed=seed)
        part = part.assign(num_sessions=int(run.training.get("num_sessions", 0)))
        parts.append(part.rename(columns={"baseline": "plain"}))
    table = pd.DataFrame(columns=GAIN_COLUMNS)
    if parts:
        table = pd.concat(parts, ignore_index=True)[GAIN_COLUMNS]
    ordered = table.sort_values("num_sessions", key=_put_all_last, kind="stable")
    return ordered.reset_index(drop=True)


def _find_without_pretraining(runs: Sequence[ScoredRun], run: ScoredRun) -> ScoredRun | None:
    """The first run with the same training but for the pretraining; none for a run without one."""
    if not run.training.get("multisubject_ckpt"):
        return None

    def list_parameters(run: ScoredRun) -> dict:
        return {name: v for name, v in run.training.items() if name not in NOT_COMPARED}

    for other in runs:
        is_plain = not other.training.get("multisubject_ckpt")
        if is_plain and list_parameters(other) == list_parameters(run):
            return other
    return None
