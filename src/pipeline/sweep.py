"""Running a recipe at every point of a grid (docs/sweeps.md)."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src import parameters, utils
from src.files.ownership import LOCK_NAME, is_owned, lock_folder
from src.pipeline.console import show
from src.pipeline.grid import Point, fill_levels, missing_requirement, read_grid
from src.pipeline.jobs import Job, JobResult, assign_devices, run_jobs
from src.pipeline.recipes import (
    check_overrides,
    drop_stages,
    list_stages,
    read_declared_parameters,
    read_defaults,
    read_stage_parameters,
)
from src.pipeline.runs import print_plan, run_recipe
from src.pipeline.stages import (
    StageRun,
    check_environment,
    find_stamp,
    fingerprint_stage,
    iterate_stages,
    parse_launcher,
    read_execution_id,
    register_kernel,
    run_stage,
)
from src.utils import UsageError

log = logging.getLogger(__name__)

REPORT = "07_sweep"  # the notebook that every sweep ends with

LOG_NAME = "log.txt"  # of a point, beside its results

# what is shown of a job that did not run here, and the state of its point
MESSAGES = {
    "elsewhere": "is being run by another process",
    "before": "finished meanwhile by another process",
}
STATES = {"before": "finished", "elsewhere": "running", "stopped": "begun"}


class Sweep:
    """A grid file, checked against the stages of its recipe, and the state of its runs.

    The data are prepared once, by the run <sweep>/prepare; every point is a run <sweep>/<label>
    that begins after that.

    Attributes:
        path: of the grid file.
        grid: its content.
        preparing: the stage 00 of the recipe as a list, empty where it has none.
        stages: all later stages, less those that the grid leaves out.
        first: index in `stages` of the one that points begin with.
        folder: results/<sweep>/.
        prepare: name of the run that prepares the data.

    Raises:
        UsageError: for whatever of the grid file cannot be run.
    """

    def __init__(self, path: str | Path):
        self.path, self.grid = Path(path), read_grid(path)
        stages = list_stages(self.grid.recipe.split("/")[0])
        self.preparing = [stage for stage in stages if stage.startswith("00")]
        self.stages = drop_stages(stages, ["00"])
        self._check_names(stages)
        for prefix in self.grid.skip:
            self._find_stage(prefix, "without")
        self.stages = drop_stages(self.stages, self.grid.skip)
        self.first = self._find_stage(self.grid.first, "from")
        settings = [self._read_settings(point.overrides) for point in self.grid.points]
        for launch in dict.fromkeys(point.launch for point in self.grid.points):
            parse_launcher(launch)
        self._check_settings_differ(settings)
        points = []
        for point, by_stage in zip(self.grid.points, settings, strict=True):
            effective: dict[str, Any] = {}
            for values in by_stage.values():
                effective |= values
            effective["launch"] = point.launch
            points.append(fill_levels(point, self.grid.factors, effective))
        self.grid = replace(self.grid, points=points)
        self.folder = utils.HOME / "results" / self.grid.name
        self.prepare = f"{self.grid.name}/prepare"

    def _find_stage(self, prefix: str, key: str) -> int:
        """The index of the stage that an entry of the grid file names.

        Raises:
            UsageError: if there is none.
        """
        for index, stage in enumerate(self.stages):
            if stage.startswith(prefix):
                return index
        raise UsageError(
            f"{key}: {prefix} in {self.path} names no stage that comes after the preparation:"
            f" choose among {', '.join(self.stages)}."
        )

    def _check_names(self, stages: list[str]) -> None:
        """Refuse names that no stage has, and to vary what is one for all points."""
        varied = [name for name in self.grid.factors if name != "launch"]
        names = [*self.grid.fixed, *varied]
        for name in names:
            if name in ("recipe", "model_name"):
                raise UsageError(
                    f"'{name}' in {self.path} is the sweep's own: leave it out there, and set"
                    " `name` or `recipe` of the file instead."
                )
        check_overrides(stages, names, str(self.path))
        later_names: set[str] = set()
        for stage in self.stages:
            later_names |= read_declared_parameters(stage).keys()
        for name in varied:
            is_of_the_data = name not in later_names or name in ("dataset", "subj")
            if self.preparing and is_of_the_data:
                raise UsageError(
                    f"'{name}' in {self.path} is of the data, which are prepared once for a sweep:"
                    " put it under `fixed`, and make a sweep for each value."
                )
        declared, origin = read_declared_parameters(REPORT), f"report of {self.path}"
        parameters.check_parameter_names(self.grid.report, declared, origin)
        for name, value in self.grid.report.items():
            parameters.coerce(declared[name], value, origin)

    def _read_settings(self, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """All parameters of the later stages at a point, by stage; refuses values of a wrong
        type.
        """
        settings: dict[str, dict[str, Any]] = {}
        for stage in [*self.preparing, *self.stages]:
            declared = read_declared_parameters(stage)
            values = {
                name: parameters.coerce(declared[name], value, str(self.path))
                for name, value in (self.grid.fixed | overrides).items()
                if name in declared
            }
            if stage in self.stages:
                recipe_values = read_stage_parameters(stage, self.grid.recipe, values)
                settings[stage] = read_defaults(stage) | recipe_values
        return settings

    def _check_settings_differ(self, settings: Sequence[dict[str, dict[str, Any]]]) -> None:
        """Refuse two points with the same setting."""
        labels: dict[str, str] = {}
        for point, values in zip(self.grid.points, settings, strict=True):
            key = json.dumps([values, point.launch], sort_keys=True)
            other = labels.setdefault(key, point.label)
            if other != point.label:
                raise UsageError(
                    f"The points {other} and {point.label} of {self.path} are the same setting:"
                    " leave one out."
                )

    def merge_overrides(self, point: Point) -> dict[str, Any]:
        """All overrides of a point's run."""
        run = {"model_name": self.grid.name_point_run(point)}
        return self.grid.fixed | point.overrides | run

    def find_prepared(self) -> list[Path]:
        """The stamp of the preparation, if it is finished."""
        overrides = self.grid.fixed | {"model_name": self.prepare}
        runs = iterate_stages(self.grid.recipe, overrides, self.preparing)
        return [run.stamp for run in runs if run.is_finished()]

    def is_done(self, point: Point) -> bool:
        """Whether all stages of a point are finished, from their stamps."""
        stamps = [find_stamp(self.prepare, stage) for stage in self.preparing]
        previous = "".join(read_execution_id(stamp) for stamp in stamps)
        overrides = self.merge_overrides(point)
        runs = list(iterate_stages(self.grid.recipe, overrides, self.stages, previous))
        return all(run.is_finished() for run in runs[self.first :])

    def find_state(self, point: Point) -> str:
        """One of finished, skipped (the machine cannot start it), running (in some process),
        failed, begun, missing.
        """
        results = self.folder / point.label
        if self.is_done(point):
            return "finished"
        if missing_requirement(point.launch):
            return "skipped"
        if is_owned(results / LOCK_NAME):
            return "running"
        if not (results / LOG_NAME).exists():
            return "missing"
        return "failed" if list(results.glob("*.failed.ipynb")) else "begun"

    def write_ledger(self, states: dict[str, str]) -> list[str]:
        """Write results/<sweep>/points.json, in the order of the grid; returns points of an earlier
        grid of this name that are left as they are.
        """
        path, grid = self.folder / "points.json", self.grid
        earlier_labels = _read_labels(path) if path.exists() else []
        labels = {point.label for point in grid.points}
        removed = [
            label
            for label in dict.fromkeys(earlier_labels)
            if label not in labels and (self.folder / label).is_dir()
        ]
        entries = [
            {
                "number": number,
                "label": point.label,
                "state": states[point.label],
                "levels": point.levels,
                "overrides": point.overrides,
                "run": grid.name_point_run(point),
            }
            for number, point in enumerate(grid.points)
        ]
        content = {
            "sweep": grid.name,
            "recipe": grid.recipe,
            "fixed": grid.fixed,
            "factors": list(grid.factors),
            "removed": removed,
            "points": entries,
        }
        utils.write_json(path, content)
        return removed

    def make_job(self, point: Point, force: bool, launch: str) -> Job:
        """The command that runs a point, with its overrides in a file beside its results and the
        stamp of the preparation as that of its own stage 00.
        """
        results = self.folder / point.label
        overrides = results / "overrides.yaml"
        values = self.grid.fixed | point.overrides
        texts = {name: parameters.as_written(value) for name, value in values.items()}
        utils.write_json(overrides, texts)  # JSON is YAML
        for stamp in self.find_prepared():
            utils.write_json(results / ".stages" / stamp.name, utils.read_json(stamp))
        command = [sys.executable, "-u", str(utils.ROOT / "run.py"), self.grid.recipe]
        command += ["-f", str(overrides), "-p", "model_name", self.grid.name_point_run(point)]
        if self.preparing or self.first:
            command += ["--from", self.stages[self.first]]
        if self.grid.skip:
            command += ["--without", ",".join(self.grid.skip)]
        if force:
            command.append("--force")
        launch = point.launch or launch
        if launch:
            command += ["--launch", launch]
        return Job(point.label, command, results / LOG_NAME, results / LOCK_NAME)


def _read_labels(ledger: Path) -> list[str]:
    """Labels of the points in a ledger, those of earlier grids first; none of a damaged one, which
    is written anew.
    """
    try:
        content = utils.read_json(ledger, ("points", "removed"))
        points = [str(entry["label"]) for entry in content["points"]]
        return [str(label) for label in content["removed"]] + points
    except (utils.PerceptError, TypeError, KeyError) as error:
        log.warning("%s is written anew, as it cannot be used (%s)", ledger, error)
        return []


def run_sweep(
    sweep: Sweep,
    numbers: Sequence[int] = (),
    jobs: int = 0,
    force: bool = False,
    launch: str = "",
) -> dict[str, str]:
    """Prepare the data of a sweep, run its points that are not finished, and write its report.

    Args:
        sweep: which.
        numbers: of the points to run, without a report; empty for all, with the report.
        jobs: number of points at a time; 0 for one a GPU, without GPUs one a core.
        force: whether to run finished points and the report again.
        launch: how stages that train are started, as --launch of run.py.

    Returns:
        Why points failed, in one sentence each, by their labels.
    """
    check_environment()
    prepare_data(sweep)
    points = sweep.grid.points
    states = {point.label: sweep.find_state(point) for point in points}
    _show_skipped(points, states)
    removed = sweep.write_ledger(states)
    if removed:
        show(f"No longer in {sweep.path}, left as they are: {', '.join(removed)}")
    chosen = [points[number] for number in numbers] or points
    failures = run_points(sweep, chosen, states, jobs, force, launch)
    if not numbers and "finished" in states.values():
        write_report(sweep, force)
    return failures


def _show_skipped(points: Sequence[Point], states: dict[str, str]) -> None:
    """Print which points this machine cannot run, and why."""
    skipped = [point for point in points if states[point.label] == "skipped"]
    labels = ", ".join(point.label for point in skipped)
    for reason in dict.fromkeys(missing_requirement(point.launch) for point in skipped):
        show(f"Skipped, as {reason}: {labels}")


def prepare_data(sweep: Sweep) -> None:
    """Run stage 00 of a sweep unless it is finished, one process at a time for a data set: others
    wait for it.
    """
    if not sweep.preparing:
        return
    overrides = sweep.grid.fixed | {"model_name": sweep.prepare}
    values = read_stage_parameters(sweep.preparing[0], sweep.grid.recipe, overrides)
    dataset = values.get("dataset", "nsd")
    folder = utils.HOME / "data" / str(dataset)
    with lock_folder(folder, f"preparing {dataset}", wait=True, as_sibling=True):
        if not sweep.find_prepared():
            run_recipe(sweep.grid.recipe, overrides, last=sweep.preparing[-1])


def run_points(
    sweep: Sweep,
    points: Sequence[Point],
    states: dict[str, str],
    jobs: int,
    force: bool,
    launch: str,
) -> dict[str, str]:
    """Run points side by side, a line for each that ends; returns why points failed, by label.

    `states` is kept up to date.
    """
    by_label = {point.label: point for point in points}
    skipped = [point for point in points if states[point.label] == "skipped"]
    waiting = []
    for point in points:
        state = states[point.label]
        if state != "skipped" and (force or state != "finished"):
            waiting.append(point)
    cores, gpus = count_cores(), list_gpus()
    at_a_time = min(jobs or len(gpus) or cores, max(1, len(waiting)))
    counts = f"{len(points) - len(waiting) - len(skipped)} finished before"
    if skipped:
        counts += f", {len(skipped)} skipped"
    shown_jobs = at_a_time if waiting else 0
    show(f"{sweep.grid.name}: {len(points)} points, {counts}, {shown_jobs} at a time")
    register_kernel()  # once, not by all at the same moment
    failures: dict[str, str] = {}
    results = run_jobs(
        [sweep.make_job(point, force, launch) for point in waiting],
        assign_devices(at_a_time, gpus, cores),
        lambda label: not force and sweep.is_done(by_label[label]),
    )
    for number, result in enumerate(results, 1):
        remaining = len(waiting) - number
        message = _describe_result(result)
        show(f"[{number}/{len(waiting)}] {result.name}: {message}; {remaining} left")
        states[result.name] = STATES.get(result.outcome, result.outcome)
        if result.outcome == "failed":
            failures[result.name] = result.message
        sweep.write_ledger(states)
    return failures


def _describe_result(result: JobResult) -> str:
    """How a point ended, in a few words."""
    if result.outcome in MESSAGES:
        return MESSAGES[result.outcome]
    message = f"{result.seconds:.0f} s"
    if result.outcome != "finished":
        message = f"{result.outcome} after {message}"
    if result.message:
        message += f": {result.message}"
    return message


def count_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def list_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [name for name in visible if name]
    return names[:count] or [str(number) for number in range(count)]


def write_report(sweep: Sweep, force: bool) -> None:
    """Execute notebook 07_sweep into results/<sweep>/, and its page without code, unless nothing
    has changed since.
    """
    values = sweep.grid.report | {"recipe": sweep.grid.recipe, "model_name": sweep.grid.name}
    point_stamps = [
        sweep.folder / point.label / ".stages" / f"{sweep.stages[-1]}.json"
        for point in sweep.grid.points
    ]
    previous = " ".join(read_execution_id(stamp) for stamp in point_stamps)
    stamp = find_stamp(sweep.grid.name, REPORT)
    run = StageRun(REPORT, values, stamp, fingerprint_stage(REPORT, values, previous))
    page = sweep.folder / "report.html"
    with lock_folder(sweep.folder, f"reporting on {sweep.grid.name}", wait=True):
        if force or not run.is_finished() or not page.exists():
            run_stage(run)
            _export_page(sweep.folder / f"{REPORT}.ipynb", page)
        show(f"Look at:\n  {page}\n  {sweep.folder / 'sweep.csv'}")


def _export_page(notebook: Path, page: Path) -> None:
    """Write an executed notebook as one HTML file, without its code."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        mathjax_url="",
        require_js_url="",
        embed_images=True,
    )
    text, _ = exporter.from_filename(str(notebook))
    with utils.atomic(page) as temporary:
        temporary.write_text(text)


def print_point_plan(sweep: Sweep) -> None:
    """Print what one point will need, the first: parameters, memory, disk."""
    overrides = sweep.merge_overrides(sweep.grid.points[0])
    first = sweep.stages[0]
    print_plan(sweep.grid.recipe, overrides, first, skip=sweep.grid.skip)


def parse_point_numbers(text: str, n_points: int) -> list[int]:
    """The numbers in --only, separated by commas.

    Raises:
        UsageError: for one that no point has.
    """
    numbers = []
    for part in text.split(",") if text else []:
        if not part.strip().isdecimal() or int(part) >= n_points:
            raise UsageError(
                f"--only takes numbers of points, 0 to {n_points - 1} and separated by commas (it"
                f" was {text!r})."
            )
        numbers.append(int(part))
    return numbers


def show_points(sweep: Sweep) -> None:
    """Print number, label and state of every point, and the line that runs the unfinished ones on a
    cluster.
    """
    unfinished = []
    for number, point in enumerate(sweep.grid.points):
        state = sweep.find_state(point)
        show(f"{number:4d}  {state:9}  {point.label}")
        # those that are skipped on this machine belong to it: a node may have what they need
        if state not in ("finished", "running"):
            unfinished.append(number)
    if unfinished:
        show(f"sbatch --array={format_ranges(unfinished)} launch/sweep.slurm {sweep.path}")


def format_ranges(numbers: Iterable[int]) -> str:
    """Numbers as sbatch takes them: [0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
