"""Running a recipe at every point of a grid."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src import parameters, utils
from src.pipeline.console import show
from src.pipeline.recipes import (
    check_overrides,
    drop_stages,
    find_notebook,
    list_stages,
    read_stage_parameters,
)
from src.pipeline.runs import run_recipe
from src.pipeline.stages import (
    fingerprint_stage,
    is_finished,
    iterate_stages,
    parse_launcher,
    read_execution_id,
    register_kernel,
    run_stage,
)
from src.utils import PerceptError

REPORT = "07_sweep"  # the notebook that every sweep ends with


class Sweep:
    """A grid file, checked against the stages of its recipe, and what is there of its runs.

    The data are prepared once, by the run <sweep>/prepare; every point is a run <sweep>/<label>
    that begins after that.

    Attributes: path of the grid file; grid; preparing, the stage 00 of the recipe as a list (empty
    where it has none); stages, all later ones; begin, the
        place among these at which points begin.

    Raises:
        PerceptError: for whatever of the grid file cannot be run.
    """

    def __init__(self, path: str | Path):
        from src.pipeline.grid import fill_levels, read_grid

        self.path, self.grid = Path(path), read_grid(path)
        stages = list_stages(self.grid.recipe.split("/")[0])
        self.preparing, self.stages = (
            [s for s in stages if s.startswith("00")],
            drop_stages(stages, ["00"]),
        )
        self._check_names(stages)
        if unknown := [
            given
            for given in self.grid.without
            if not any(stage.startswith(given) for stage in self.stages)
        ]:
            raise PerceptError(
                f"without: {unknown[0]} in {path} names no stage that comes after the preparation:"
                f" choose among {', '.join(self.stages)}."
            )
        self.stages = drop_stages(self.stages, self.grid.without)
        self.begin = next(
            (i for i, stage in enumerate(self.stages) if stage.startswith(self.grid.first)), -1
        )
        if self.begin < 0:
            raise PerceptError(
                f"from: {self.grid.first} in {path} names no stage that comes after the"
                f" preparation: choose among {', '.join(self.stages)}."
            )
        effective = [self._effective(point.overrides) for point in self.grid.points]
        for how in dict.fromkeys(point.launch for point in self.grid.points):
            parse_launcher(how)
        seen: dict[str, str] = {}
        for point, values in zip(self.grid.points, effective, strict=True):
            other = seen.setdefault(json.dumps([values, point.launch], sort_keys=True), point.label)
            if other != point.label:
                raise PerceptError(
                    f"The points {other} and {point.label} of {path} are the same setting: leave"
                    " one out."
                )
        merged = [
            {k: v for of_stage in values.values() for k, v in of_stage.items()}
            for values in effective
        ]
        merged = [
            values | {"launch": point.launch}
            for point, values in zip(self.grid.points, merged, strict=True)
        ]
        points = [
            fill_levels(point, self.grid.factors, values)
            for point, values in zip(self.grid.points, merged, strict=True)
        ]
        self.grid = replace(self.grid, points=points)
        self.folder = utils.HOME / "results" / self.grid.name
        self.prepare = f"{self.grid.name}/prepare"

    def _known(self, stages: Iterable[str]) -> dict[str, dict[str, parameters.Parameter]]:
        return {
            stage: parameters.parse_parameters(
                parameters.read_parameters_cell(find_notebook(stage)), stage
            )
            for stage in stages
        }

    def _check_names(self, stages: list[str]) -> None:
        """Refuse names that no stage has, and to vary what is one for all points."""
        fixed, varied = self.grid.fixed, [name for name in self.grid.factors if name != "launch"]
        if own := [name for name in [*fixed, *varied] if name in ("recipe", "model_name")]:
            raise PerceptError(
                f"'{own[0]}' in {self.path} is the sweep's own: leave it out there, and set `name`"
                " or `recipe` of the file instead."
            )
        check_overrides(stages, [*fixed, *varied], str(self.path))
        later = {name for known in self._known(self.stages).values() for name in known}
        for name in varied:
            if self.preparing and (name not in later or name in ("dataset", "subj")):
                raise PerceptError(
                    f"'{name}' in {self.path} is of the data, which are prepared once for a sweep:"
                    " put it under `fixed`, and make a sweep for each value."
                )
        known = self._known([REPORT])[REPORT]
        parameters.check_parameter_names(self.grid.report, known, f"report of {self.path}")
        for name, value in self.grid.report.items():
            parameters.coerce(known[name], value, f"report of {self.path}")

    def _effective(self, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """All parameters of the later stages at a point; refuses values of a wrong type."""
        values: dict[str, dict[str, Any]] = {}
        for stage, known in self._known([*self.preparing, *self.stages]).items():
            given = {
                name: parameters.coerce(known[name], value, str(self.path))
                for name, value in (self.grid.fixed | overrides).items()
                if name in known
            }
            if stage in self.stages:
                values[stage] = {
                    name: p.default for name, p in known.items()
                } | read_stage_parameters(stage, self.grid.recipe, given)
        return values

    def merge_overrides(self, point: Any) -> dict[str, Any]:
        """All overrides of a point's run."""
        return self.grid.fixed | point.overrides | {"model_name": self.grid.name_point_run(point)}

    def prepared(self) -> list[Path]:
        """The stamp of the preparation, if it is finished."""
        marks = iterate_stages(
            self.grid.recipe, self.grid.fixed | {"model_name": self.prepare}, self.preparing
        )
        return [stamp for _, _, stamp, mark in marks if is_finished(stamp, mark)]

    def is_done(self, point: Any) -> bool:
        """Whether all stages of a point are finished, from their stamps."""
        before = "".join(
            read_execution_id(utils.HOME / "results" / self.prepare / ".stages" / f"{stage}.json")
            for stage in self.preparing
        )
        marks = [
            (stamp, mark)
            for _, _, stamp, mark in iterate_stages(
                self.grid.recipe, self.merge_overrides(point), self.stages, before
            )
        ]
        return all(is_finished(stamp, mark) for stamp, mark in marks[self.begin :])

    def state(self, point: Any) -> str:
        """One of finished, skipped (what it is launched with is not there), running (somewhere),
        failed, begun, missing.
        """
        from src.pipeline.grid import missing_requirement
        from src.pipeline.jobs import lock

        results = self.folder / point.label
        if self.is_done(point):
            return "finished"
        if missing_requirement(point.launch):
            return "skipped"
        if not (results / ".lock").exists():
            return "missing"
        if (lock_file := lock(results / ".lock")) is None:
            return "running"
        lock_file.close()
        return "failed" if list(results.glob("*.failed.ipynb")) else "begun"

    def write_ledger(self, states: dict[str, str]) -> list[str]:
        """Write results/<sweep>/points.json, in the order of the grid; returns points of an earlier
        grid of this name that are left as they are.
        """
        path, grid = self.folder / "points.json", self.grid
        before = utils.read_json(path) if path.exists() else {"points": [], "removed": []}
        labels = {point.label for point in grid.points}
        removed = [
            label
            for label in dict.fromkeys(
                [*before["removed"], *(p["label"] for p in before["points"])]
            )
            if label not in labels
        ]
        entries = [
            {
                "number": i,
                "label": p.label,
                "state": states[p.label],
                "levels": p.levels,
                "overrides": p.overrides,
                "run": grid.name_point_run(p),
            }
            for i, p in enumerate(grid.points)
        ]
        removed = [label for label in removed if (self.folder / label).is_dir()]
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

    def job(self, point: Any, force: bool, launch: str) -> Any:
        """The command that runs a point, with its overrides in a file beside its results and the
        stamp of the preparation as that of its own stage 00.
        """
        from src.pipeline.jobs import Job

        results = self.folder / point.label
        utils.write_json(
            results / "overrides.yaml", self.grid.fixed | point.overrides
        )  # JSON is YAML
        for stamp in self.prepared():
            utils.write_json(results / ".stages" / stamp.name, utils.read_json(stamp))
        more = ["--from", self.stages[self.begin]] if self.preparing or self.begin else []
        how = point.launch or launch
        more += ["--without", ",".join(self.grid.without)] if self.grid.without else []
        more += [*(["--force"] if force else []), *(["--launch", how] if how else [])]
        command = [
            sys.executable,
            "-u",
            str(utils.ROOT / "run.py"),
            self.grid.recipe,
            "-f",
            str(results / "overrides.yaml"),
        ]
        return Job(
            point.label,
            [*command, "-p", "model_name", self.grid.name_point_run(point), *more],
            results / "log.txt",
            results / ".lock",
        )


def prepare_data(sweep: Sweep) -> None:
    """Run stage 00 of a sweep unless it is finished, one process at a time for a data set: others
    wait for it.
    """
    from src.pipeline.jobs import lock

    if not sweep.preparing:
        return
    overrides = sweep.grid.fixed | {"model_name": sweep.prepare}
    dataset = read_stage_parameters(sweep.preparing[0], sweep.grid.recipe, overrides).get(
        "dataset", "nsd"
    )
    lock_file = lock(utils.HOME / "data" / f".{dataset}.lock", wait=True)
    try:
        if not sweep.prepared():
            run_recipe(sweep.grid.recipe, overrides, last=sweep.preparing[-1])
    finally:
        assert lock_file is not None
        lock_file.close()


def format_ranges(numbers: Iterable[int]) -> str:
    """Numbers as sbatch takes them: [0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]


def run_points(
    sweep: Sweep, points: Sequence[Any], states: dict[str, str], jobs: int, force: bool, launch: str
) -> dict[str, str]:
    """Run points side by side, a line for each that ends; returns the sentences of those that
    failed.

    `states` is kept up to date.
    """
    from src.pipeline.jobs import assign_devices, run_jobs

    by_label = {point.label: point for point in points}
    todo = [
        point
        for point in points
        if (force or states[point.label] != "finished") and states[point.label] != "skipped"
    ]
    cores, devices = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus(),
    )
    where = assign_devices(min(jobs or len(devices) or cores, max(1, len(todo))), devices, cores)
    skipped = sum(states[point.label] == "skipped" for point in points)
    before = f"{len(points) - len(todo) - skipped} finished before" + (
        f", {skipped} skipped" if skipped else ""
    )
    show(
        f"{sweep.grid.name}: {len(points)} points, {before}, {len(where) if todo else 0} at a time",
    )
    register_kernel()  # once, not by all at the same moment
    failed: dict[str, str] = {}
    left = len(todo)
    for end in run_jobs(
        [sweep.job(point, force, launch) for point in todo],
        where,
        lambda label: not force and sweep.is_done(by_label[label]),
    ):
        left -= 1
        told = {
            "elsewhere": "is being run by another process",
            "before": "finished meanwhile by another process",
        }
        words = told.get(
            end.how
        ) or f"{'' if end.how == 'finished' else end.how + ' after '}{end.seconds:.0f} s" + (
            f": {end.sentence}" if end.sentence else ""
        )
        show(f"[{len(todo) - left}/{len(todo)}] {end.name}: {words}; {left} left")
        states[end.name] = {"before": "finished", "elsewhere": "running", "stopped": "begun"}.get(
            end.how, end.how
        )
        if end.how == "failed":
            failed[end.name] = end.sentence
        sweep.write_ledger(states)
    return failed


def write_report(sweep: Sweep, force: bool) -> None:
    """Execute notebook 07_sweep into results/<sweep>/, and its page without code, unless nothing
    has changed since.
    """
    from nbconvert import HTMLExporter

    from src.pipeline.jobs import lock

    lock_file = lock(sweep.folder / ".lock", wait=True)
    values = sweep.grid.report | {"recipe": sweep.grid.recipe, "model_name": sweep.grid.name}
    stamps = [
        sweep.folder / point.label / ".stages" / f"{sweep.stages[-1]}.json"
        for point in sweep.grid.points
    ]
    mark, stamp = (
        fingerprint_stage(REPORT, values, " ".join(map(read_execution_id, stamps))),
        sweep.folder / ".stages" / f"{REPORT}.json",
    )
    page = sweep.folder / "report.html"
    if force or not is_finished(stamp, mark) or not page.exists():
        run_stage(REPORT, values, sweep.folder, mark)
        exporter = HTMLExporter(
            exclude_input=True,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            mathjax_url="",
            require_js_url="",
            embed_images=True,
        )
        with utils.atomic(page) as temporary:
            temporary.write_text(exporter.from_filename(str(sweep.folder / f"{REPORT}.ipynb"))[0])
    show(f"Look at:\n  {page}\n  {sweep.folder / 'sweep.csv'}")
    assert lock_file is not None
    lock_file.close()


def show_points(sweep: Sweep) -> None:
    """Print number, label and state of every point, and the line that runs the unfinished ones on a
    cluster.
    """
    states = [sweep.state(point) for point in sweep.grid.points]
    for number, (point, state) in enumerate(zip(sweep.grid.points, states, strict=True)):
        show(f"{number:4d}  {state:9}  {point.label}")
    if todo := [
        number for number, state in enumerate(states) if state not in ("finished", "running")
    ]:  # skipped is what is not to be had here; a node may
        show(f"sbatch --array={format_ranges(todo)} launch/sweep.slurm {sweep.path}")
