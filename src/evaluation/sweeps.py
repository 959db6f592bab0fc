"""Sweeps: one recipe at every point of a grid, and what the grid then says.

- `read_grid` makes the points of a grid file (docs/sweeps.md); run.py checks them against the
  stages and runs them.
- `work` runs commands side by side, each under a lock that the kernel releases when its process
  dies.
- The rest answers notebook 07_sweep: which level of a factor is best, and is that more than the
  luck of a seed? Levels are compared within the cells that all of them have (same other factors,
  same seed); a seed is one observation, so intervals are over seeds, never over images or runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors import safe_open
from scipy import stats

from src.utils import PerceptError, read_json

SEEDS = ("seed", "bag_seeds")  # parameters that are the luck of a run

VALIDATION_FACTORS = (
    "num_sessions",
    "split",
    # parameters with which the validation images change, so that no level can be named the best by
    # them
)

CONFIDENCE = 0.95  # of intervals


def read_points(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The ledger results/<sweep>/points.json, and its points: [number, label, state, a column a
    varied parameter], the levels being texts.

    Raises:
        PerceptError: there is no sweep of that name.
    """
    if not (folder / "points.json").exists():
        raise PerceptError(
            f"{folder} holds no sweep (points.json): run `python run.py sweep GRID.yaml` first, and"
            " give its name as model_name."
        )
    ledger = read_json(folder / "points.json")
    rows = [
        {"number": p["number"], "label": p["label"], "state": p["state"]} | p["levels"]
        for p in ledger["points"]
    ]
    return ledger, pd.DataFrame(rows).astype(dict.fromkeys(ledger["factors"], str))


def read_histories(logs: Path, labels: Sequence[str]) -> pd.DataFrame:
    """Histories of all trainings of some points: [label, kind, model, epoch, train/loss, val/loss,
    ...], kind being the folder (low_level, high_level, ...).

    Args:
        logs: train_logs/<sweep>/, below which a point's models lie at any depth (e.g.
            <point>/<voter>/low_level/history.csv).
        labels: of the points.
    """
    found = [
        (label, path) for label in labels for path in sorted((logs / label).rglob("history.csv"))
    ]
    tables = [
        pd.read_csv(path).assign(
            label=label,
            kind=path.parent.name,
            model=path.parent.relative_to(logs / label).as_posix(),
        )
        for label, path in found
    ]
    return (
        pd.concat(tables, ignore_index=True)
        if tables
        else pd.DataFrame(columns=["label", "kind", "model", "epoch"])
    )


def select_best_epoch(histories: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of each training the epoch with the least validation loss, the one that is used later, and of
    several models of a point their mean.

    Returns: [label, kind, epoch, train/loss, val/loss, `by`]; columns that no history has are
    absent, trainings without a validation loss too.
    """
    if "val/loss" not in histories:
        return pd.DataFrame(columns=["label", "kind"])
    rows = histories.loc[
        histories.dropna(subset="val/loss")
        .groupby(["label", "model"], sort=False)["val/loss"]
        .idxmin()
    ]
    wanted = list(
        dict.fromkeys(name for name in ("epoch", "train/loss", "val/loss", by) if name in rows)
    )
    return rows.groupby(["label", "kind"], sort=False)[wanted].mean().reset_index()


def read_scores(folder: Path, labels: Sequence[str], metrics: str = "") -> pd.DataFrame:
    """Scores on the test images of the points that have any, which must be one test set of one
    protocol.

    Args:
        folder: results/<sweep>/.
        labels: of the points.
        metrics: names separated by commas, "" for all that every point has.

    Returns: [label, metric, value, better, n, protocol, test_set, and of its record where there:
    chance, shuffled, mean_image, nearest_train, ceiling].

    Raises:
        PerceptError: points were scored on different test sets or protocols, or a named metric is
            missing.
    """
    from src.evaluation.compare import (  # seconds of imports, which `run.py sweep` need not wait for
        choose_metrics,
        read_runs,
        select_same_images,
    )

    runs = (
        [run for run in read_runs(folder) if run.name in labels]
        if any((folder / label / "metrics.json").exists() for label in labels)
        else []
    )
    columns = [
        "label",
        "metric",
        "value",
        "better",
        "n",
        "protocol",
        "test_set",
        "chance",
        "shuffled",
        "mean_image",
        "nearest_train",
        "ceiling",
    ]
    if not runs:
        return pd.DataFrame(columns=columns)
    if len(protocols := list(dict.fromkeys(run.protocol for run in runs))) > 1:
        raise PerceptError(
            f"The points of {folder} were scored under different protocols"
            f" ({', '.join(protocols)}): they cannot be compared."
        )
    runs, _ = select_same_images(runs, refuse=True)
    rows = []
    for run in runs:
        for metric in choose_metrics(runs, metrics):
            record = run.records[metric]
            beside = {
                name: entry["value"]
                for name, entry in (record["floors"] | {"ceiling": record["ceiling"]}).items()
                if "value" in entry
            }
            told = {
                k: record.get(k) for k in ("value", "better", "n", "protocol", "test_set", "chance")
            }
            rows.append(
                {"label": run.name, "metric": metric}
                | told
                | {k: v for k, v in beside.items() if k in columns}
            )
    return pd.DataFrame(rows, columns=columns)


def read_costs(results: Path, logs: Path, labels: Sequence[str]) -> pd.DataFrame:
    """What each point took.

    Args:
        results: results/<sweep>/.
        logs: train_logs/<sweep>/.
        labels: of the points.

    Returns: [label, weights, memory, gpu_memory, training, one column a stage, all stages]: numbers
    stored in the checkpoints of its networks (their
        parameters and buffers); GB, the most that the process of a training had resident, and on
        the GPU; seconds, of all its trainings and of each stage, as they ran last. Columns that no
        point has are absent; a point without a trained network has no weights, memory or training.
    """
    rows = []
    for label in labels:
        row: dict[str, Any] = {"label": label}
        trained = read_histories(logs, [label])
        if len(trained):
            row["weights"] = sum(
                _weights(logs / label / model) for model in dict.fromkeys(trained["model"])
            )
            row |= {
                name: trained[name].max() for name in ("memory", "gpu_memory") if name in trained
            }
            row |= {"training": round(trained["seconds"].sum(), 1)} if "seconds" in trained else {}
        stamps = sorted((results / label / ".stages").glob("*.json"))
        seconds = {
            path.stem: read_json(path)["seconds"]
            for path in stamps
            if not path.stem.startswith("00")
        }  # the data are prepared once for all
        rows.append(row | seconds | {"all stages": round(sum(seconds.values()), 1)})
    table = pd.DataFrame(rows, columns=None if rows else ["label"])
    first = [
        name for name in ("label", "weights", "memory", "gpu_memory", "training") if name in table
    ]
    stages = sorted(str(name) for name in table if name not in (*first, "all stages"))
    return table[[*first, *stages, *(["all stages"] if rows else [])]]


def _weights(folder: Path) -> int:
    """Numbers in the last checkpoint of a training, 0 where none was kept."""
    path = next(
        (
            path
            for path in (folder / f"{name}.safetensors" for name in ("last", "best"))
            if path.exists()
        ),
        None,
    )
    if path is None:
        return 0
    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


class Gap(NamedTuple):
    """What another level lacks to the best one: mean over seeds, at least 0 whether higher or lower
    is better, its 95 % t interval, and the number of seeds.
    """

    best: str
    other: str
    value: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0


def t_interval(values: Any) -> tuple[float, float, float]:
    """Mean of values (n,) with its 95 % interval of Student's t, n - 1 degrees of freedom; of one
    value the interval is not a number.
    """
    values = np.asarray(values, dtype=np.float64)
    half = (
        stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)
        if len(values) > 1
        else np.nan
    )
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def select_complete_cells(table: pd.DataFrame, factor: str, cell: Sequence[str]) -> pd.DataFrame:
    """The rows of the cells (same other factors, same seed) that every level of the factor has, so
    that levels differ in nothing else.

    Args:
        table: one row a run: the factor, the columns of `cell`, ...
        factor: the parameter that is compared.
        cell: all other varied parameters, the seed among them; none for a grid of one factor.
    """
    if not cell:
        return table
    counts = table.groupby(list(cell))[factor].transform("nunique")
    return table[counts == table[factor].nunique()]


def average_by_seed(
    table: pd.DataFrame, factor: str, seed: str, value: str = "value"
) -> pd.DataFrame:
    """Means over the other factors: (seeds, levels), levels in order of appearance; without a seed
    parameter there is one row.
    """
    seeds = table[seed] if seed else pd.Series("", index=table.index)
    return (
        table.groupby([seeds.rename("seed"), factor], sort=False)[value]
        .mean()
        .unstack()
        .reindex(columns=list(dict.fromkeys(table[factor])))
    )


def level_table(table: pd.DataFrame, factor: str, seed: str, value: str = "value") -> pd.DataFrame:
    """One row a level: [factor, value, low, high, sd, seeds, runs], value being the mean over seeds
    of the means over the other factors; sd that of these means.
    """
    means, runs, rows = (
        average_by_seed(table, factor, seed, value),
        table.groupby(factor)[value].count().to_dict(),
        [],
    )
    for level in means:
        own = means[level].dropna()
        sd = float(own.std(ddof=1)) if len(own) > 1 else np.nan
        rows.append([level, *t_interval(own), sd, len(own), int(runs[level])])
    return pd.DataFrame(rows, columns=[factor, "value", "low", "high", "sd", "seeds", "runs"])


def gaps_to_best(
    table: pd.DataFrame, factor: str, seed: str, better: str, value: str = "value"
) -> list[Gap]:
    """What each other level lacks to the best one, the nearest first.

    Differences are taken within cells (`table` must be `select_complete_cells`), averaged over the other factors
    to one a seed, and a t interval is put over the seeds, which are the only independent
    repetitions.
    """
    means = average_by_seed(table, factor, seed, value).dropna()
    sign = -1 if better == "higher" else 1
    best = str((sign * means.mean()).idxmin())
    gaps = [
        Gap(best, str(level), *t_interval(sign * (means[level] - means[best])), len(means))
        for level in means
        if level != best
    ]
    return sorted(gaps, key=lambda gap: gap.value)


def seed_sd(table: pd.DataFrame, factor: str, seed: str, value: str = "value") -> float:
    """Standard deviation over seeds of a level's mean, pooled over the levels; not a number with
    one seed.
    """
    variances = average_by_seed(table, factor, seed, value).var(ddof=1)
    return float(np.sqrt(variances.mean())) if variances.notna().any() else float("nan")


def format_significant(number: float) -> str:
    """Two digits that count, without the zero before the point: .012, -.0031, 1.3."""
    places = (
        0
        if number == 0 or not np.isfinite(number)
        else int(np.clip(1 - np.floor(np.log10(abs(number))), 0, 6))
    )
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{places}f}")


def describe_gaps(gaps: Sequence[Gap], sd: float, what: str, paired_by: Sequence[str]) -> str:
    """The sentence: which level is best by how much over the next, and whether the seed's luck
    could have done it.

    It is "more than seed noise" only where the intervals to all other levels exclude 0, so that
    naming the best of many costs no correction.

    Args:
        gaps: of `gaps_to_best`.
        sd: of `seed_sd`.
        what: the score, in words.
        paired_by: the other varied parameters.
    """
    if not gaps:
        return f"there is one level only, and no other one to hold its {what} against"
    near = gaps[0]
    paired = f", paired by {' and '.join(paired_by)}" if paired_by else ""
    head = f"{near.best} is best in {what}, by {format_significant(near.value)} over {near.other}"
    if near.seeds < 2:
        return f"{head}{paired}; with one seed it cannot be told from seed noise"
    head += f", the next [{format_significant(near.low)}, {format_significant(near.high)}]{paired}"
    if sd == 0:
        return f"{head}; the seed changes nothing here, so nothing is said of luck"
    unclear = [gap.other for gap in gaps if not gap.clear]
    words = (
        "more than seed noise"
        if not unclear
        else f"not more than seed noise (cannot be told from {', '.join(unclear)})"
    )
    return f"{head}; seeds differ by {format_significant(sd)} (sd): {words}"


def parse_region(rois: str) -> tuple[str, str] | None:
    """("V1", "alone") of "V1", ("V1", "left out") of "!V1", ("", "all") of "-" and of "", None of a
    set of several.
    """
    rois = rois.strip()
    if rois in ("", "-"):
        return "", "all"
    if "," in rois or ";" in rois or rois.lstrip("!").startswith("set"):
        return None
    return (rois[1:].strip(), "left out") if rois.startswith("!") else (rois, "alone")


def region_table(
    table: pd.DataFrame, rois: Mapping[str, str], factor: str, seed: str
) -> pd.DataFrame:
    """Scores by region, alone and left out: [metric, region, kind (alone, left out, all), value,
    low, high, better, shuffled].

    Args:
        table: scores, [factor, seed, metric, value, better, shuffled], one row a run and metric.
        rois: value of the factor by level.
        factor: the parameter whose values are regions.
        seed: that of the seeds, "" for none.

    Returns: empty unless at least two regions are there both alone and left out.
    """
    known = {level: found for level, value in rois.items() if (found := parse_region(value))}
    kinds: dict[str, set[str]] = {}
    for region, kind in known.values():
        kinds.setdefault(region, set()).add(kind)
    both = [region for region, has in kinds.items() if has == {"alone", "left out"}]
    tables = []
    for metric, part in (
        table[table[factor].isin(known)].groupby("metric", sort=False) if len(both) > 1 else ()
    ):
        told = level_table(part, factor, seed)
        regions, kinds_of = zip(*(known[level] for level in told[factor]), strict=True)
        tables.append(
            told.assign(
                region=regions,
                kind=kinds_of,
                metric=metric,
                better=part["better"].iloc[0],
                shuffled=part["shuffled"].mean(),
            )
        )
    columns = ["metric", "region", "kind", "value", "low", "high", "better", "shuffled"]
    made = (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )
    return made[made["region"].isin([*both, ""])].reset_index(drop=True)
