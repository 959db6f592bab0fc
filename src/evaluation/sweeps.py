"""What a sweep says: which level of a factor is best, and is that more than the luck of a seed?

- `read_*` collect what the points of a sweep left: histories, scores, costs (docs/sweeps.md).
- Levels are compared within the cells that all of them have (same other factors, same seed); a seed
  is one observation, so intervals are over seeds, never over images or runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from src.evaluation.compare.runs import ScoredRun, choose_metrics, read_runs, select_same_images
from src.evaluation.statistics import CONFIDENCE
from src.files.foreign import load_csv, shorten
from src.utils import PerceptError, open_tensors, read_json

SEEDS = ("seed", "bag_seeds")  # parameters that are the luck of a run

# parameters with which the validation images change, so that no level can be named the best by them
VALIDATION_FACTORS = ("num_sessions", "split")

REMEDY = "run `python run.py sweep GRID.yaml` again"

RECORD_COLUMNS = ("value", "better", "n", "protocol", "test_set", "chance")
CONTROL_COLUMNS = ("shuffled", "mean_image", "nearest_train", "ceiling")
SCORE_COLUMNS = ["label", "metric", *RECORD_COLUMNS, *CONTROL_COLUMNS]

COST_COLUMNS = ("label", "weights", "memory", "gpu_memory", "training")

REGION_COLUMNS = ["metric", "region", "kind", "value", "low", "high", "better", "shuffled"]


# ---------------------------------------------------------------------------- what the points left
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
    path = folder / "points.json"
    ledger = read_json(path, ("points", "factors"), REMEDY)
    try:
        rows = []
        for point in ledger["points"]:
            columns = {name: point[name] for name in ("number", "label", "state")}
            rows.append(columns | point["levels"])
        return ledger, pd.DataFrame(rows).astype(dict.fromkeys(ledger["factors"], str))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PerceptError(
            f"{path} holds no points of a sweep ({shorten(repr(error))}): {REMEDY}."
        ) from error


def choose_factor(varied: Sequence[str], factor: str = "", seed_name: str = "") -> tuple[str, str]:
    """The varied parameter whose levels are compared, and the one that is the luck of a run.

    Where nothing but a seed varies, its values are the levels, and there is no luck beside them.

    Args:
        varied: parameters of the grid.
        factor: "" for the first that is no seed.
        seed_name: "" for the first of `SEEDS` that varies.

    Raises:
        PerceptError: if the grid does not vary what is named.
    """
    for name in (factor, seed_name):
        if name and name not in varied:
            raise PerceptError(
                f"The sweep does not vary '{name}': choose among {', '.join(varied)}."
            )
    seed_name = seed_name or next((name for name in SEEDS if name in varied), "")
    factor = factor or next((name for name in varied if name != seed_name), seed_name)
    return factor, "" if factor == seed_name else seed_name


def read_histories(logs: Path, labels: Sequence[str]) -> pd.DataFrame:
    """Histories of all trainings of some points: [label, kind, model, epoch, train/loss, val/loss,
    ...], kind being the folder (low_level, high_level, ...).

    Args:
        logs: train_logs/<sweep>/, below which a point's models lie at any depth (e.g.
            <point>/<voter>/low_level/history.csv).
        labels: of the points.
    """
    tables = []
    for label in labels:
        for path in sorted((logs / label).rglob("history.csv")):
            model = path.parent.relative_to(logs / label).as_posix()
            table = load_csv(path, ("epoch",), "train that point again")
            tables.append(table.assign(label=label, kind=path.parent.name, model=model))
    if not tables:
        return pd.DataFrame(columns=["label", "kind", "model", "epoch"])
    return pd.concat(tables, ignore_index=True)


def select_best_epoch(histories: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of each training the epoch with the least validation loss, the one that is used later, and of
    several models of a point their mean.

    Returns:
        [label, kind, epoch, train/loss, val/loss, `by`]; columns that no history has are absent,
        trainings without a validation loss too.
    """
    if "val/loss" not in histories:
        return pd.DataFrame(columns=["label", "kind"])
    validated = histories.dropna(subset="val/loss")
    best = validated.groupby(["label", "model"], sort=False)["val/loss"].idxmin()
    names = dict.fromkeys(("epoch", "train/loss", "val/loss", by))
    columns = [name for name in names if name in histories]
    rows = histories.loc[best]
    return rows.groupby(["label", "kind"], sort=False)[columns].mean().reset_index()


def read_scores(folder: Path, labels: Sequence[str], metrics: str = "") -> pd.DataFrame:
    """Scores on the test images of the points that have any, which must be one test set of one
    protocol.

    Args:
        folder: results/<sweep>/.
        labels: of the points.
        metrics: names separated by commas, "" for all that every point has.

    Returns:
        `SCORE_COLUMNS`: [label, metric, value, better, n, protocol, test_set, and of its record
        where there: chance, shuffled, mean_image, nearest_train, ceiling].

    Raises:
        PerceptError: points were scored on different test sets or protocols, or a named metric is
            missing.
    """
    if not any((folder / label / "metrics.json").exists() for label in labels):
        return pd.DataFrame(columns=SCORE_COLUMNS)
    runs = [run for run in read_runs(folder) if run.name in labels]
    if not runs:
        return pd.DataFrame(columns=SCORE_COLUMNS)
    protocols = list(dict.fromkeys(run.protocol for run in runs))
    if len(protocols) > 1:
        raise PerceptError(
            f"The points of {folder} were scored under different protocols"
            f" ({', '.join(protocols)}): they cannot be compared."
        )
    runs, _ = select_same_images(runs, refuse=True)
    names = choose_metrics(runs, metrics)
    rows = [_collect_scores(run, name) for run in runs for name in names]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def _collect_scores(run: ScoredRun, metric: str) -> dict[str, Any]:
    """The score of one point, with chance, baselines and upper bound."""
    record = run.records[metric]
    row: dict[str, Any] = {"label": run.name, "metric": metric}
    row |= {name: record.get(name) for name in RECORD_COLUMNS}
    controls = record["floors"] | {"ceiling": record["ceiling"]}
    for name, entry in controls.items():
        if name in SCORE_COLUMNS and "value" in entry:
            row[name] = entry["value"]
    return row


def read_costs(results: Path, logs: Path, labels: Sequence[str]) -> pd.DataFrame:
    """The memory and time of each point.

    Args:
        results: results/<sweep>/.
        logs: train_logs/<sweep>/.
        labels: of the points.

    Returns:
        [label, weights, memory, gpu_memory, training, one column a stage, all stages]: numbers
        stored in the checkpoints of its networks (their parameters and buffers); GB, the most that
        the process of a training had resident, and on the GPU; seconds, of all its trainings and of
        each stage, as they ran last. Columns that no point has are absent; a point without a
        trained network has no weights, memory or training.
    """
    rows = []
    for label in labels:
        seconds = {}
        for path in sorted((results / label / ".stages").glob("*.json")):
            if not path.stem.startswith("00"):  # the data are prepared once for all
                seconds[path.stem] = read_json(path, ("seconds",), REMEDY)["seconds"]
        total = {"all stages": round(sum(seconds.values()), 1)}
        rows.append({"label": label} | _read_training_costs(logs, label) | seconds | total)
    if not rows:
        return pd.DataFrame(columns=["label"])
    table = pd.DataFrame(rows)
    first = [name for name in COST_COLUMNS if name in table]
    stages = sorted(str(name) for name in table if name not in (*first, "all stages"))
    return table[[*first, *stages, "all stages"]]


def _read_training_costs(logs: Path, label: str) -> dict[str, Any]:
    """Weights, memory and seconds of a point's trainings, none where it trained no network."""
    histories = read_histories(logs, [label])
    if not len(histories):
        return {}
    models = dict.fromkeys(histories["model"])
    costs: dict[str, Any] = {
        "weights": sum(_count_weights(logs / label / model) for model in models)
    }
    for name in ("memory", "gpu_memory"):
        if name in histories:
            costs[name] = histories[name].max()
    if "seconds" in histories:
        costs["training"] = round(histories["seconds"].sum(), 1)
    return costs


def _count_weights(folder: Path) -> int:
    """Numbers in the last checkpoint of a training, 0 where there is none."""
    for name in ("last", "best"):
        path = folder / f"{name}.safetensors"
        if path.exists():
            with open_tensors(path, framework="np", remedy="train that point again") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
            return sum(math.prod(shape) for shape in shapes)
    return 0


# ------------------------------------------------------------------------------------------- levels
class Gap(NamedTuple):
    """How far another level is behind the best one: mean over seeds, at least 0 whether higher or
    lower is better, its 95 % t interval, and the number of seeds.
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
    half = np.nan
    if len(values) > 1:
        quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
        half = quantile * stats.sem(values)
    mean = values.mean()
    return float(mean), float(mean - half), float(mean + half)


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
    groups = table.groupby([seeds.rename("seed"), factor], sort=False)
    wide = groups[value].mean().unstack()
    return wide.reindex(columns=list(dict.fromkeys(table[factor])))


def level_table(table: pd.DataFrame, factor: str, seed: str, value: str = "value") -> pd.DataFrame:
    """One row a level: [factor, value, low, high, sd, seeds, runs], value being the mean over seeds
    of the means over the other factors; sd that of these means.
    """
    means = average_by_seed(table, factor, seed, value)
    n_runs = table.groupby(factor)[value].count().to_dict()
    rows = []
    for level in means:
        of_level = means[level].dropna()
        n_seeds = len(of_level)
        sd = float(of_level.std(ddof=1)) if n_seeds > 1 else np.nan
        rows.append([level, *t_interval(of_level), sd, n_seeds, int(n_runs[level])])
    return pd.DataFrame(rows, columns=[factor, "value", "low", "high", "sd", "seeds", "runs"])


def gaps_to_best(
    table: pd.DataFrame, factor: str, seed: str, better: str, value: str = "value"
) -> list[Gap]:
    """How far each other level is behind the best one, the nearest first.

    Differences are taken within cells (`table` must be of `select_complete_cells`), averaged over
    the other factors to one a seed, and a t interval is put over the seeds, which are the only
    independent repetitions.
    """
    means = average_by_seed(table, factor, seed, value).dropna()
    sign = -1 if better == "higher" else 1
    best = str((sign * means.mean()).idxmin())
    gaps = []
    for level in means:
        if level != best:
            interval = t_interval(sign * (means[level] - means[best]))
            gaps.append(Gap(best, str(level), *interval, len(means)))
    return sorted(gaps, key=lambda gap: gap.value)


def seed_sd(table: pd.DataFrame, factor: str, seed: str, value: str = "value") -> float:
    """Standard deviation over seeds of a level's mean, pooled over the levels; not a number with
    one seed.
    """
    variances = average_by_seed(table, factor, seed, value).var(ddof=1)
    if not variances.notna().any():
        return float("nan")
    return float(np.sqrt(variances.mean()))


def format_significant(number: float) -> str:
    """Two significant digits, without the zero before the point: .012, -.0031, 1.3."""
    places = 0
    if number != 0 and np.isfinite(number):
        magnitude = np.floor(np.log10(abs(number)))
        places = int(np.clip(1 - magnitude, 0, 6))
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{places}f}")


def describe_gaps(gaps: Sequence[Gap], sd: float, score: str, paired_by: Sequence[str]) -> str:
    """The sentence: which level is best by how much over the next, and whether the seed's luck
    could explain it.

    It is "more than seed noise" only where the intervals to all other levels exclude 0, so that
    naming the best of many costs no correction.

    Args:
        gaps: of `gaps_to_best`.
        sd: of `seed_sd`.
        score: its name for a reader.
        paired_by: the other varied parameters.
    """
    if not gaps:
        return f"there is one level only, and no other one to hold its {score} against"
    nearest = gaps[0]
    paired = f", paired by {' and '.join(paired_by)}" if paired_by else ""
    value = format_significant(nearest.value)
    head = f"{nearest.best} is best in {score}, by {value} over {nearest.other}"
    if nearest.seeds < 2:
        return f"{head}{paired}; with one seed it cannot be told from seed noise"
    low, high = format_significant(nearest.low), format_significant(nearest.high)
    head += f", the next [{low}, {high}]{paired}"
    if sd == 0:
        return f"{head}; the seed changes nothing here, so nothing is said of luck"
    unclear = [gap.other for gap in gaps if not gap.clear]
    conclusion = "more than seed noise"
    if unclear:
        conclusion = f"not more than seed noise (cannot be told from {', '.join(unclear)})"
    return f"{head}; seeds differ by {format_significant(sd)} (sd): {conclusion}"


def describe_seeds(values: Sequence[float], score: str) -> str:
    """The sentence about runs that differ in their seed alone: none of them is the best.

    Args:
        values: scores (runs,).
        score: its name for a reader.
    """
    mean, low, high = t_interval(values)
    text = f"{score} is {format_significant(mean)} over {len(values)} seeds"
    if len(values) < 2:
        return f"{text}, whose luck one seed does not tell"
    sd = format_significant(float(np.std(values, ddof=1)))
    interval = f"[{format_significant(low)}, {format_significant(high)}]"
    return f"{text} {interval}; they differ by {sd} (sd), and no seed is better than another"


# ------------------------------------------------------------------------------------------ regions
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

    Returns:
        empty unless at least two regions are there both alone and left out.
    """
    regions: dict[str, tuple[str, str]] = {}
    kinds: dict[str, set[str]] = {}
    for level, value in rois.items():
        parsed = parse_region(value)
        if parsed:
            regions[level] = parsed
            kinds.setdefault(parsed[0], set()).add(parsed[1])
    compared = [region for region, of_region in kinds.items() if of_region == {"alone", "left out"}]
    if len(compared) < 2:
        return pd.DataFrame(columns=REGION_COLUMNS)
    tables = []
    selected = table[table[factor].isin(regions)]
    for metric, part in selected.groupby("metric", sort=False):
        levels = level_table(part, factor, seed)
        names, kind_names = zip(*(regions[level] for level in levels[factor]), strict=True)
        levels = levels.assign(region=names, kind=kind_names, metric=metric)
        better = part["better"].iloc[0]
        tables.append(levels.assign(better=better, shuffled=part["shuffled"].mean()))
    if not tables:
        return pd.DataFrame(columns=REGION_COLUMNS)
    scores = pd.concat(tables, ignore_index=True)[REGION_COLUMNS]
    return scores[scores["region"].isin([*compared, ""])].reset_index(drop=True)
