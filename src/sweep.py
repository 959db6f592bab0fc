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

import fcntl
import hashlib
import importlib.util
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pandas as pd
from safetensors import safe_open
from scipy import stats

from src.utils import PerceptError, read_json, read_recipe, to_device

KEYS = ("name", "recipe", "from", "without", "fixed", "grid", "points", "report")  # of a grid file
RESERVED = ("prepare", "figures", "parameters")  # folders of results/<sweep>/ that are no points
SEEDS = ("seed", "bag_seeds")  # parameters that are the luck of a run
OTHER_IMAGES = (
    "num_sessions",
    "split",
    # parameters with which the validation images change, so that no level can be named the best by
    # them
)
CONFIDENCE = 0.95  # of intervals
LABEL = 120  # characters of a point's folder; file systems allow 255 bytes


# ---------------------------------------------------------------------------------------- the grid
@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes: label, its name in tables and the name of its folder; levels, the label of each
    varied parameter's value; overrides, its values by name; launch, how its trainings are started
    (as --launch of run.py), "" for in the notebook.
    """

    label: str
    levels: dict[str, str]
    overrides: dict[str, Any]
    launch: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes: name of the sweep; recipe; fixed overrides; factors, values by label of each varied
    parameter (and of `launch`, where that is varied); points; report, parameters of 07_sweep;
    first, the number of the stage that a point begins with, "" for the one after the preparation;
    without, numbers of stages that no point has.
    """

    name: str
    recipe: str
    fixed: dict[str, Any]
    factors: dict[str, dict[str, Any]]
    points: list[Point]
    report: dict[str, Any] = field(default_factory=dict)
    first: str = ""
    without: Sequence[str] = ()

    def run_of(self, point: Point) -> str:
        """Name of the point's run: <sweep>/<label>."""
        return f"{self.name}/{point.label}"


def file_name(text: str) -> str:
    """A label as the name of a folder: "rois=V1,V2" stays as it is but for characters that shells
    and file systems read otherwise; a long one is cut and marked.
    """
    plain = re.sub(r"[^\w.+,=@-]+", "-", text.replace("!", "not-")).strip(".")
    return (
        plain
        if len(plain) <= LABEL
        else f"{plain[:LABEL]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def _levels(name: str, values: Any, path: Path) -> dict[str, Any]:
    """Values by label of one parameter of `grid`."""
    named = (
        values
        if isinstance(values, dict)
        else {str(v): v for v in values}
        if isinstance(values, list)
        else None
    )
    if not named:
        raise PerceptError(
            f"'{name}' of grid in {path} must be a list of values, or a mapping label: value, with"
            " at least one."
        )
    if len(named) != len(values):
        raise PerceptError(
            f"'{name}' of grid in {path} has a value twice: {', '.join(map(str, values))}; give"
            " each once."
        )
    for value in named.values():
        _check_plain(name, value, path)
    return {str(label): value for label, value in named.items()}


def _check_plain(name: str, value: Any, path: Path) -> None:
    if not isinstance(value, bool | int | float | str):
        raise PerceptError(
            f"'{name}' in {path} is {value!r}, but must be a number, a text or true/false; put a"
            " text such as - or !V1 in quotes."
        )


def _explicit(entry: Any, path: Path) -> Point:
    """One entry of `points`."""
    if not isinstance(entry, dict) or not set(entry) - {"label"}:
        raise PerceptError(
            f"An entry of points in {path} is {entry!r}, but must be overrides `name: value`, with"
            " a label where you like."
        )
    overrides = {str(k): v for k, v in entry.items() if k not in ("label", "launch")}
    for name, value in entry.items():
        _check_plain(str(name), value, path)
    levels = {name: str(value) for name, value in overrides.items()} | (
        {"launch": str(entry["launch"])} if entry.get("launch") else {}
    )
    return Point(
        file_name(str(entry.get("label") or _joined(levels))),
        levels,
        overrides,
        str(entry.get("launch", "")),
    )


def _combined(choice: Mapping[str, tuple[str, Any]]) -> Point:
    """One combination of `grid`, (label, value) by parameter."""
    levels, values = ({name: pair[i] for name, pair in choice.items()} for i in (0, 1))
    return Point(
        file_name(_joined(levels)),
        levels,
        {name: value for name, value in values.items() if name != "launch"},
        str(values.get("launch", "")),
    )


def _joined(levels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={file_name(level)}" for name, level in levels.items())


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise PerceptError(
            f"'{key}' in {path} must hold lines `name: value`, not {type(value).__name__}."
        )
    return {str(k): v for k, v in value.items()}


def read_grid(path: str | Path) -> Grid:
    """Read a grid file and make its points, in order: every combination of `grid`, the last factor
    changing fastest, then `points`.

    Names and types of parameters are not known here: run.py checks them against the stages of the
    recipe.

    Raises:
        PerceptError: for a missing or malformed file, an empty grid, a value given twice, points
            whose folders would have one name.
    """
    path = Path(path)
    if not path.is_file():
        raise PerceptError(
            f"There is no grid file {path}: launch/sweeps/ holds some, and docs/sweeps.md says how"
            " to write one."
        )
    content = read_recipe(path)
    if unknown := [key for key in content if key not in KEYS]:
        raise PerceptError(
            f"{path} has the entry '{unknown[0]}', which a grid file has not: choose among"
            f" {', '.join(KEYS)}."
        )
    name, recipe = str(content.get("name") or path.stem), str(content.get("recipe") or "")
    if not recipe or not re.fullmatch(r"\w[\w.+-]*", name):
        raise PerceptError(
            f"{path} needs `recipe: mindeye/mini` or another, and a name of letters, digits, - and"
            f" . (it is {name!r})."
        )
    fixed, explicit = _mapping(content, "fixed", path), content.get("points") or []
    factors = {
        parameter: _levels(parameter, values, path)
        for parameter, values in _mapping(content, "grid", path).items()
    }
    combinations = (
        itertools.product(*(levels.items() for levels in factors.values())) if factors else ()
    )
    points = [_combined(dict(zip(factors, choice, strict=True))) for choice in combinations]
    if not isinstance(explicit, list):
        raise PerceptError(
            f"'points' in {path} must be a list of overrides, not {type(explicit).__name__}."
        )
    points += [_explicit(entry, path) for entry in explicit]
    _check_points(points, fixed, path)
    factors |= {
        name: {}
        for point in points
        for name in [*point.overrides, *(["launch"] if point.launch else [])]
        if name not in factors
    }
    first, without = content.get("from", ""), content.get("without") or []
    numbers = [
        f"{given:02d}" if isinstance(given, int) else str(given)
        for given in (first, *(without if isinstance(without, list) else [without]))
    ]
    return Grid(
        name,
        recipe,
        fixed,
        factors,
        points,
        _mapping(content, "report", path),
        numbers[0],
        numbers[1:],
    )


def _check_points(points: Sequence[Point], fixed: Mapping[str, Any], path: Path) -> None:
    labels = [point.label for point in points]
    if not points:
        raise PerceptError(
            f"{path} has no points: give `grid`, with a list of values a parameter, or `points`."
        )
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise PerceptError(
            f"Two points of {path} would both be called {twice[0]}: give values other labels, or"
            " leave one out."
        )
    if taken := [label for label in labels if label in RESERVED or not label]:
        raise PerceptError(
            f"A point of {path} cannot be called {taken[0]!r}: give it another label."
        )
    if both := [name for point in points for name in point.overrides if name in fixed]:
        raise PerceptError(
            f"'{both[0]}' is both fixed and varied in {path}: leave it in one place."
        )


def with_levels(
    point: Point, factors: Mapping[str, Mapping[str, Any]], effective: Mapping[str, Any]
) -> Point:
    """The point with a level of every varied parameter: of those that it does not name, the
    recipe's own value.

    Args:
        point: of `read_grid`.
        factors: values by label of each varied parameter.
        effective: the value that each of them has at this point.
    """
    own = {
        name: next(
            (label for label, value in levels.items() if str(value) == str(effective[name])), ""
        )
        for name, levels in factors.items()
    }
    own = {
        name: level or str(point.overrides.get(name, effective[name]))
        for name, level in own.items()
    }
    return replace(
        point,
        levels={
            name: point.levels[name] if point.levels.get(name) in levels else own[name]
            for name, levels in factors.items()
        },
    )


def lacks(launch: str) -> str:
    """Why this machine cannot start trainings so, "" where it can: a config of DeepSpeed needs that
    package, and a GPU.

    Args:
        launch: as `Point.launch`.
    """
    config = next(iter(shlex.split(launch)), "")
    if (
        not config.endswith((".yaml", ".yml"))
        or read_recipe(config).get("distributed_type") != "DEEPSPEED"
    ):
        return ""
    if importlib.util.find_spec("deepspeed") is None:
        return 'deepspeed is not installed (uv pip install -e ".[scale]")'
    return (
        "" if to_device("auto").startswith("cuda") else "deepspeed needs a GPU, and there is none"
    )


# -------------------------------------------------------------------------- processes side by side
@dataclass(frozen=True)
class Job:
    """A command of one point, the file that its output is added to, and its lock."""

    name: str
    command: list[str]
    log: Path
    lock: Path


class Ended(NamedTuple):
    """What became of a job: "finished", "failed", "stopped" (by a signal that was passed on), or
    not begun as another process has it ("elsewhere") or had ("before").
    """

    name: str
    how: str
    seconds: float = 0.0
    sentence: str = ""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    place: dict[str, str]
    lock: TextIO
    offset: int
    begun: float


def take(path: Path, wait: bool = False) -> TextIO | None:
    """The lock `path`, to be closed by the caller; None where another process has it, unless
    `wait`.

    It belongs to the open file, which a child inherits: it is free when this process and the child
    have both ended, however they ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115
    for attempt in range(5):  # `sweep --list` holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return file
        except BlockingIOError:
            time.sleep(0.1 * (attempt < 4))
    file.close()
    return None


def places(jobs: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Environment of each of `jobs` processes that run side by side: a GPU each, in turn, and their
    share of the cores for OpenMP and BLAS.

    A smaller OMP_NUM_THREADS of the caller's holds for BLAS, too: torch takes MKL's number for all
    of its threads.
    """
    share = max(1, cores // jobs)
    share = min(share, int(os.environ.get("OMP_NUM_THREADS") or share))
    threads = {
        name: str(min(share, int(os.environ.get(name) or share)))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})
        for i in range(jobs)
    ]


@contextmanager
def _passing_on(running: list[_Running]) -> Iterator[list[int]]:
    """Within this context SIGINT, SIGTERM and SIGHUP ask the running processes to end (the second
    time, at once); yields the signals that came.
    """
    asked: list[int] = []
    since = [0.0]

    def pass_on(number: int, frame: Any) -> None:
        if asked and time.monotonic() - since[0] < 1:  # a terminal and a launcher may both send it
            return
        for one in running:
            one.process.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
        asked.append(number)
        since[0] = time.monotonic()

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield asked
    finally:
        for one in running:  # left by an error here
            one.process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(job: Job, place: dict[str, str], lock: TextIO) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place},
            pass_fds=[lock.fileno()],
        )
    return _Running(job, process, place, lock, offset, time.monotonic())


def _ended(one: _Running, asked: bool) -> Ended:
    one.lock.close()
    code, seconds = one.process.returncode, time.monotonic() - one.begun
    if not code:
        return Ended(one.job.name, "finished", seconds)
    if asked:
        return Ended(one.job.name, "stopped", seconds)
    with open(one.job.log, "rb") as log:
        log.seek(one.offset)
        said = re.findall(r"^run\.py: (.*)$", log.read().decode(errors="replace"), re.MULTILINE)
    return Ended(
        one.job.name,
        "failed",
        seconds,
        said[-1] if said else f"its process ended with code {code}; {one.job.log} says more",
    )


def work(
    jobs: Sequence[Job], where: Sequence[dict[str, str]], finished: Callable[[str], bool]
) -> Iterator[Ended]:
    """Run jobs side by side, one in each place, and yield what became of each as it ends.

    Asked to stop by a signal, it passes that on, starts no more and yields those that it stopped.

    Args:
        jobs: in order.
        where: environment of each place, of `places`.
        finished: whether the job of that name has been done meanwhile; asked once its lock is held.

    Raises:
        SystemExit: with 128 + its number, after a signal.
    """
    waiting, free, running = deque(jobs), deque(where), list[_Running]()
    with _passing_on(running) as asked:
        while running or (waiting and not asked):
            while waiting and free and not asked:
                job = waiting.popleft()
                if (lock := take(job.lock)) is None:
                    yield Ended(job.name, "elsewhere")
                elif finished(job.name):
                    lock.close()
                    yield Ended(job.name, "before")
                else:
                    running.append(_started(job, free.popleft(), lock))
                    if asked:  # between the two lines above
                        running[-1].process.terminate()
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.place)
                yield _ended(one, bool(asked))
            time.sleep(0.1)
    if asked:
        raise SystemExit(128 + asked[0])


# ------------------------------------------------------------------------------ what the runs left
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


def at_best_epoch(histories: pd.DataFrame, by: str) -> pd.DataFrame:
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
    from src.compare import (
        choose_metrics,
        read_runs,
        same_pictures,
    )  # seconds of imports, which `run.py sweep` need not wait for

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
    runs, _ = same_pictures(runs, refuse=True)
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


# ---------------------------------------------------------------------------- levels against seeds
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


def complete(table: pd.DataFrame, factor: str, cell: Sequence[str]) -> pd.DataFrame:
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


def by_seed(table: pd.DataFrame, factor: str, seed: str, value: str = "value") -> pd.DataFrame:
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
        by_seed(table, factor, seed, value),
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

    Differences are taken within cells (`table` must be `complete`), averaged over the other factors
    to one a seed, and a t interval is put over the seeds, which are the only independent
    repetitions.
    """
    means = by_seed(table, factor, seed, value).dropna()
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
    variances = by_seed(table, factor, seed, value).var(ddof=1)
    return float(np.sqrt(variances.mean())) if variances.notna().any() else float("nan")


def decimals(number: float) -> str:
    """Two digits that count, without the zero before the point: .012, -.0031, 1.3."""
    places = (
        0
        if number == 0 or not np.isfinite(number)
        else int(np.clip(1 - np.floor(np.log10(abs(number))), 0, 6))
    )
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{places}f}")


def verdict(gaps: Sequence[Gap], sd: float, what: str, paired_by: Sequence[str]) -> str:
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
    head = f"{near.best} is best in {what}, by {decimals(near.value)} over {near.other}"
    if near.seeds < 2:
        return f"{head}{paired}; with one seed it cannot be told from seed noise"
    head += f", the next [{decimals(near.low)}, {decimals(near.high)}]{paired}"
    if sd == 0:
        return f"{head}; the seed changes nothing here, so nothing is said of luck"
    unclear = [gap.other for gap in gaps if not gap.clear]
    words = (
        "more than seed noise"
        if not unclear
        else f"not more than seed noise (cannot be told from {', '.join(unclear)})"
    )
    return f"{head}; seeds differ by {decimals(sd)} (sd): {words}"


# ---------------------------------------------------------------------- regions alone and left out
def region_of(rois: str) -> tuple[str, str] | None:
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
    known = {level: found for level, value in rois.items() if (found := region_of(value))}
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
