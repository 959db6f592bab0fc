"""Run a recipe: its stages in order, each a notebook executed by papermill.

    python run.py list                                   # recipes, stages, cost
    python run.py mindeye --mini                         # the miniature, no data and no GPU needed
    python run.py mindeye -p subj 5 -p data_path /nsd    # an override goes to every stage that has the name
    python run.py mindeye --dry-run                      # what it will need: parameters, memory, disk
    python run.py mindeye --mini -f my.yaml              # a file of overrides, laid over the recipe and under -p
    python run.py mindeye --mini --from 03 --force       # again from stage 03
    python run.py mindeye --mini --to 02                 # end with stage 02; the same without --to goes on from there
    python run.py mindeye2_small --mini --without 04     # leave a stage out
    python run.py download mindeye -p subj 5 --dry-run   # list what the recipe needs from the hub; without --dry-run, fetch it
    python run.py mindeye --launch launch/eight_gpus.yaml  # stages that train do so in several processes (docs/launching.md)
    python run.py sweep launch/sweeps/roi_sets_mini.yaml # a recipe at every point of a grid, side by side (docs/sweeps.md)

- The listing of recipes/<system>/ is the pipeline; with --mini, recipes/<system>/mini/ is laid over
  it.
- Each executed notebook lands in results/<run>/. A stage whose notebook, parameters, code and
  earlier stages are unchanged, and whose files are still there, is skipped, so an interrupted run
  goes on where it stopped. When a stage runs, those after it run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from src import utils
from src.pipeline.fingerprints import fingerprint_code
from src.utils import PerceptError

REPORT = "07_sweep"  # the notebook that every sweep ends with


def stages_of(recipe: str) -> list[str]:
    """The stages of a recipe, in order: the names of its YAML files."""
    folder = utils.RECIPES / recipe
    names = sorted(path.stem for path in folder.glob("[0-9][0-9]_*.yaml"))
    if not names:
        known = sorted(path.name for path in utils.RECIPES.iterdir() if path.is_dir())
        raise PerceptError(f"There is no recipe '{recipe}': choose one of {', '.join(known)}.")
    return names


def notebook_of(stage: str) -> Path:
    """The notebook of a stage."""
    path = utils.NOTEBOOKS / f"{stage}.ipynb"
    if not path.exists():
        raise PerceptError(
            f"The recipe asks for the stage {stage}, but there is no {path}: rename the recipe file"
            " or restore the notebook."
        )
    return path


def cost_of(stage: str) -> str:
    """The line "Cost: ..." of a notebook's first cell."""
    text = "".join(json.loads(notebook_of(stage).read_text())["cells"][0]["source"])
    found = re.search(r"^Cost: (.*(?:\n[^\n#]+)*)", text, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def parameters_of(stage: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What papermill passes to a stage: the recipe's files in order, then the overrides that it has
    a parameter for.
    """
    known = utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
    values: dict[str, Any] = {}
    for path in utils.recipe_files(recipe, stage):
        content = utils.read_recipe(path)
        utils.check_known(content, known, str(path))
        values |= {k: utils.coerce(known[k], v, str(path)) for k, v in content.items()}
    values |= {k: utils.coerce(known[k], v, "-p") for k, v in overrides.items() if k in known}
    if "recipe" in known:
        values["recipe"] = recipe
    return values


def name_of(recipe: str, stages: Iterable[str], overrides: dict[str, Any]) -> str:
    """The run's name, from the parameters of all its stages: what only a training has names the
    folder of every stage.
    """
    defaults: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for stage in stages:
        known = utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
        defaults |= {name: p.default for name, p in known.items()}
        given |= {
            name: value
            for name, value in parameters_of(stage, recipe, overrides).items()
            if value != ""
        }
    return utils.run_name(recipe, defaults | given)


def check_overrides(stages: list[str], overrides: Iterable[str], origin: str) -> None:
    """Refuse an override that no stage has."""
    everything: dict[str, utils.Parameter] = {}
    for stage in stages:
        everything |= utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
    utils.check_known(overrides, everything, origin)


def written(values: dict[str, Any], run: str) -> dict[str, int]:
    """Files under HOME that stages hand on to each other (checkpoints, prepared data; not caches),
    and when each was last changed.
    """
    folders = [
        utils.HOME / "train_logs" / run,
        *([utils.HOME / "data" / str(values["dataset"])] if values.get("dataset") else []),
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [
        path
        for path in files
        if not any(
            part.startswith(".") or part == "targets" for part in path.relative_to(utils.HOME).parts
        )
    ]
    return {str(path.relative_to(utils.HOME)): path.stat().st_mtime_ns for path in kept}


def is_finished(stamp: Path, mark: str) -> bool:
    """Whether the stamp is of this very work, and all that the stage wrote is still there."""
    if not stamp.exists():
        return False
    made = utils.read_json(stamp)
    notebook = stamp.parents[1] / f"{stamp.stem}.ipynb"
    return (
        made["fingerprint"] == mark
        and notebook.exists()
        and all((utils.HOME / path).exists() for path in made.get("wrote", []))
    )


def launcher_of(how: str) -> list[str]:
    """The command that --launch stands for: an accelerate config, or what is put before a script.

    Raises:
        PerceptError: for a config or a program that is not there.
    """
    words = shlex.split(how)
    if words and words[0].endswith((".yaml", ".yml")):
        if not Path(words[0]).exists():
            raise PerceptError(
                f"--launch {how}: there is no file {words[0]}: choose a config of launch/, or give"
                " the path of your own."
            )
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *words]
    if words and not shutil.which(words[0]):
        raise PerceptError(
            f"--launch {how}: there is no program {words[0]}: give an accelerate config (.yaml), or"
            " activate .venv and give a command."
        )
    return words


def train_launched(stage: str, values: dict[str, Any], launcher: list[str]) -> None:
    """Run a training stage's script under a launcher.

    SIGTERM is passed on, so that the training saves its state before it ends.

    Raises:
        PerceptError: if the launcher fails; what its processes said is on stderr.
        SystemExit: after SIGTERM.
    """
    keep_memory()
    flags = [f"--{name}={value}" for name, value in values.items()]
    process = subprocess.Popen(
        [*launcher, str(utils.NOTEBOOKS / f"{stage}.py"), *flags], cwd=utils.ROOT
    )
    asked = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # a terminal has sent it to the processes, too: they save and end
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:
        raise SystemExit(128 + signal.SIGTERM)
    if code:
        raise PerceptError(
            f"Stage {stage} stopped under `{shlex.join(launcher)}` (exit code {code}): the lines"
            " above say why."
        )


def run_stage(
    stage: str, values: dict[str, Any], results: Path, mark: str, launcher: Sequence[str] = ()
) -> float:
    """Execute a stage and stamp it; return the seconds.

    The old stamp goes first: a stage that fails half-way has changed its files.
    """
    stamp = results / ".stages" / f"{stage}.json"
    stamp.unlink(missing_ok=True)
    run = results.relative_to(utils.HOME / "results").as_posix()
    before, begun = written(values, run), time.time()
    if launcher and "resume_from_ckpt" in utils.read_parameters(
        utils.parameters_source(notebook_of(stage)), stage
    ):
        train_launched(stage, values, list(launcher))
        execute(
            stage, values | {"resume_from_ckpt": True}, results
        )  # the notebook finds the training finished, and shows it
    else:
        execute(stage, values, results)
    seconds = round(time.time() - begun, 1)
    wrote = [path for path, changed in written(values, run).items() if before.get(path) != changed]
    record = {
        "fingerprint": mark,
        "finished": time.time_ns(),
        "seconds": seconds,
        "parameters": values,
        "wrote": wrote,
    }
    utils.write_json(stamp, record)
    return seconds


def identity(stamp: Path) -> str:
    """What the next stage's fingerprint takes from this one: which execution its files are of."""
    made = utils.read_json(stamp) if stamp.exists() else {}
    return f"{made.get('fingerprint', '')} {made.get('finished', '')}"


def fingerprint(stage: str, values: dict[str, Any], before: str) -> str:
    """Hash of everything that a stage's result depends on: its code, parameters, and the stages
    before.
    """
    digest = hashlib.sha256(before.encode())
    digest.update(fingerprint_code(notebook_of(stage), utils.ROOT).encode())
    folders = (
        ["*", *(name for part in values["runs"].split(",") if "/" in (name := part.strip(" /")))]
        if "runs" in values
        else []
    )
    for path in sorted(
        path for name in folders for path in (utils.HOME / "results").glob(f"{name}/metrics.json")
    ):  # of a comparison, the scores it reads
        digest.update(path.parent.name.encode() + path.read_bytes())
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def execute(stage: str, values: dict[str, Any], results: Path) -> None:
    """Execute a stage's notebook into results/<run>/; a failed one is kept as <stage>.failed.ipynb.

    Raises:
        PerceptError: with the sentence of the stage, or its last line.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target, running = results / f"{stage}.ipynb", results / f".{stage}.running.ipynb"
    failed = results / f"{stage}.failed.ipynb"
    use_this_kernel()
    try:
        papermill.execute_notebook(
            notebook_of(stage),
            running,
            values,
            kernel_name="percept",
            progress_bar=sys.stderr.isatty(),
            log_output=False,
            cwd=str(utils.ROOT),
        )
        os.replace(running, target)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        os.replace(running, failed)
        reason = (
            str(error.evalue).strip()
            if error.ename == "PerceptError"
            else f"{error.ename}: {error.evalue}"
        )
        raise PerceptError(
            f"Stage {stage} stopped: {reason} (the notebook with its traceback is {failed})"
        ) from None
    except DeadKernelError:
        os.replace(running, failed)
        raise PerceptError(
            f"Stage {stage} stopped: its Python process was killed, most often for want of memory;"
            f" try a smaller batch_size ({failed})."
        ) from None
    finally:
        running.unlink(missing_ok=True)


def use_this_kernel() -> None:
    """Register this interpreter as the kernel "percept", so that no other python3 kernel of the
    machine is taken.

    A registration that is right is left alone: another process may be about to start a kernel from
    it.
    """
    from ipykernel.kernelspec import get_kernel_dict, install

    wanted = get_kernel_dict()["argv"] + [
        "--log-level=ERROR"
    ]  # no lines of the kernel's own between ours
    known = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "percept" / "kernel.json"
    if not known.exists() or utils.read_json(known)["argv"] != wanted:
        folder = Path(install(kernel_name="percept", display_name="Percept", prefix=sys.prefix))
        utils.write_json(
            folder / "kernel.json", utils.read_json(folder / "kernel.json") | {"argv": wanted}
        )
    keep_memory()
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")


def keep_memory() -> None:
    """Let processes that are started from here keep large blocks: glibc gives them back at once and
    asks again in the next step, costly page faults on a CPU.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE",
        "1",
        # huge pages: a step of the full-size model in 6 s instead of 11
        # (benchmarks/full_size_step.py)
    )


def asked(
    recipe: str,
    overrides: dict[str, Any],
    first: str,
    files: Sequence[str],
    last: str = "",
    without: Sequence[str] = (),
) -> tuple[list[str], dict[str, Any]]:
    """The stages of a recipe, and the overrides of files and command line in one, with the run's
    name; refuses what no stage has.
    """
    stages = stages_of(recipe.split("/")[0])
    contents = [utils.read_recipe(file) for file in files]
    for content, origin in zip([*contents, overrides], [*files, "-p"], strict=True):
        check_overrides(stages, content, origin)
    for flag, given in (
        ("--from", first),
        ("--to", last),
        *(("--without", stage) for stage in without),
    ):
        if given and not any(stage.startswith(given) for stage in stages):
            raise PerceptError(
                f"{flag} {given} names no stage of {recipe}: choose among {', '.join(stages)}."
            )
    merged = {name: value for content in [*contents, overrides] for name, value in content.items()}
    return left(stages, without), merged | {"model_name": name_of(recipe, stages, merged)}


def left(stages: Sequence[str], without: Sequence[str]) -> list[str]:
    """Stages less those whose names begin with one of some numbers or names."""
    return [stage for stage in stages if not stage.startswith(tuple(without))]


def chain(
    recipe: str, overrides: dict[str, Any], stages: Iterable[str], before: str = ""
) -> Iterator[tuple[str, dict[str, Any], Path, str]]:
    """Stage, parameters, stamp and fingerprint of each stage of a run, in order; each fingerprint
    is taken when the stage before has been dealt with.
    """
    for stage in stages:
        values = parameters_of(stage, recipe, overrides)
        stamp = utils.HOME / "results" / overrides["model_name"] / ".stages" / f"{stage}.json"
        yield stage, values, stamp, fingerprint(stage, values, before)
        before = identity(stamp)


def run_recipe(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    force: bool = False,
    files: Sequence[str] = (),
    launch: str = "",
    last: str = "",
    without: Sequence[str] = (),
) -> Path:
    """Run every stage of a recipe that is not finished, and return results/<run>/."""
    launcher = launcher_of(launch)
    stages, overrides = asked(recipe, overrides, first, files, last, without)
    results = utils.HOME / "results" / overrides["model_name"]
    reached, begun = not first, time.time()
    for number, (stage, values, stamp, mark) in enumerate(chain(recipe, overrides, stages), 1):
        results.mkdir(parents=True, exist_ok=True)
        reached = reached or stage.startswith(first)
        done = is_finished(stamp, mark)
        if (done and not (force and reached)) or not reached:
            print(
                f"[{number}/{len(stages)}] {stage}:"
                f" {'finished before, skipped' if done else 'skipped, as --from asks'}",
                flush=True,
            )
        else:
            print(f"[{number}/{len(stages)}] {stage} ...", flush=True)
            seconds = run_stage(stage, values, results, mark, launcher)
            print(f"[{number}/{len(stages)}] {stage}: {seconds:.0f} s", flush=True)
        if last and stage.startswith(last):
            break
    print(f"Finished in {time.time() - begun:.0f} s. Look at:")
    for name in (
        "contact_sheet.png",
        "report.html",
        "metrics.json",
        "comparison.csv",
        "figures/comparison.png",
    ):
        if (results / name).exists():
            print(f"  {results / name}")
    print(f"  {results}/*.ipynb (the executed notebooks)")
    return results


def dry_run(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    files: Sequence[str] = (),
    last: str = "",
    without: Sequence[str] = (),
) -> None:
    """Print what the stages of a recipe will need; nothing is loaded, downloaded or written."""
    from src.dryrun import plan

    stages, overrides = asked(recipe, overrides, first, files, last, without)
    earlier: dict[str, Any] = {}  # what reconstructs is told by what was trained
    for stage in stages:
        known = utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
        earlier |= {name: p.default for name, p in known.items()} | parameters_of(
            stage, recipe, overrides
        )
        if first and stage < first:
            continue
        needed = plan(stage, earlier)
        print(needed or f"{stage} trains no network and writes little", flush=True)
        print(f"  time: {cost_of(stage)}", flush=True)
        if last and stage.startswith(last):
            break


def list_recipes() -> None:
    """Print recipes, their stages and what these cost."""
    for folder in sorted(path for path in utils.RECIPES.iterdir() if path.is_dir()):
        print(f"{folder.name}{'  (also --mini)' if (folder / 'mini').is_dir() else ''}")
        for stage in stages_of(folder.name):
            print(f"  {stage:24} {cost_of(stage)}")


def download(arguments: Sequence[str]) -> int:
    """Parse the command line of `run.py download`, say what would be fetched, and fetch it."""
    from src.download import carry_out, describe, plan

    parser = argparse.ArgumentParser(
        prog="run.py download",
        description="Fetch what a recipe needs; files that are there are left (docs/downloads.md).",
    )
    parser.add_argument(
        "what", help="a recipe, a bundle (docs/downloads.md), or the id of a model on the hub"
    )
    parser.add_argument(
        "-p",
        dest="pairs",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="subj, data_path, vd_cache_dir, num_sessions, ...",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PARTS",
        help="some parts of a recipe, e.g. shards,checkpoints",
    )
    parser.add_argument(
        "--mirror",
        default="",
        help="a folder with the files, or the address of a mirror of the hub or of S3",
    )
    parser.add_argument(
        "--to",
        default="",
        metavar="FOLDER",
        help="folder that takes the place of PERCEPT_HOME, e.g. to carry away",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list files and sizes")
    args = parser.parse_args(arguments)
    # the sentence alone
    warnings.showwarning = lambda message, *_: print(f"run.py: {message}", file=sys.stderr)  # type: ignore[assignment]
    planned = plan(
        args.what, only=args.only, to=args.to, mirror=args.mirror, overrides=dict(args.pairs)
    )
    print(describe(planned), flush=True)
    for one in planned if not args.dry_run else []:
        carry_out(one)
    return 0


# ------------------------------------------------------------------------------------------ sweeps
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
        from src.sweep import read_grid, with_levels

        self.path, self.grid = Path(path), read_grid(path)
        stages = stages_of(self.grid.recipe.split("/")[0])
        self.preparing, self.stages = (
            [s for s in stages if s.startswith("00")],
            left(stages, ["00"]),
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
        self.stages = left(self.stages, self.grid.without)
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
            launcher_of(how)
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
            with_levels(point, self.grid.factors, values)
            for point, values in zip(self.grid.points, merged, strict=True)
        ]
        self.grid = replace(self.grid, points=points)
        self.folder = utils.HOME / "results" / self.grid.name
        self.prepare = f"{self.grid.name}/prepare"

    def _known(self, stages: Iterable[str]) -> dict[str, dict[str, utils.Parameter]]:
        return {
            stage: utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
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
        utils.check_known(self.grid.report, known, f"report of {self.path}")
        for name, value in self.grid.report.items():
            utils.coerce(known[name], value, f"report of {self.path}")

    def _effective(self, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """All parameters of the later stages at a point; refuses values of a wrong type."""
        values: dict[str, dict[str, Any]] = {}
        for stage, known in self._known([*self.preparing, *self.stages]).items():
            given = {
                name: utils.coerce(known[name], value, str(self.path))
                for name, value in (self.grid.fixed | overrides).items()
                if name in known
            }
            if stage in self.stages:
                values[stage] = {name: p.default for name, p in known.items()} | parameters_of(
                    stage, self.grid.recipe, given
                )
        return values

    def overrides_of(self, point: Any) -> dict[str, Any]:
        """All overrides of a point's run."""
        return self.grid.fixed | point.overrides | {"model_name": self.grid.run_of(point)}

    def prepared(self) -> list[Path]:
        """The stamp of the preparation, if it is finished."""
        marks = chain(
            self.grid.recipe, self.grid.fixed | {"model_name": self.prepare}, self.preparing
        )
        return [stamp for _, _, stamp, mark in marks if is_finished(stamp, mark)]

    def is_done(self, point: Any) -> bool:
        """Whether all stages of a point are finished, from their stamps."""
        before = "".join(
            identity(utils.HOME / "results" / self.prepare / ".stages" / f"{stage}.json")
            for stage in self.preparing
        )
        marks = [
            (stamp, mark)
            for _, _, stamp, mark in chain(
                self.grid.recipe, self.overrides_of(point), self.stages, before
            )
        ]
        return all(is_finished(stamp, mark) for stamp, mark in marks[self.begin :])

    def state(self, point: Any) -> str:
        """One of finished, skipped (what it is launched with is not there), running (somewhere),
        failed, begun, missing.
        """
        from src.sweep import lacks, take

        results = self.folder / point.label
        if self.is_done(point):
            return "finished"
        if lacks(point.launch):
            return "skipped"
        if not (results / ".lock").exists():
            return "missing"
        if (lock := take(results / ".lock")) is None:
            return "running"
        lock.close()
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
                "run": grid.run_of(p),
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
        from src.sweep import Job

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
            [*command, "-p", "model_name", self.grid.run_of(point), *more],
            results / "log.txt",
            results / ".lock",
        )


def prepare_data(sweep: Sweep) -> None:
    """Run stage 00 of a sweep unless it is finished, one process at a time for a data set: others
    wait for it.
    """
    from src.sweep import take

    if not sweep.preparing:
        return
    overrides = sweep.grid.fixed | {"model_name": sweep.prepare}
    dataset = parameters_of(sweep.preparing[0], sweep.grid.recipe, overrides).get("dataset", "nsd")
    lock = take(utils.HOME / "data" / f".{dataset}.lock", wait=True)
    try:
        if not sweep.prepared():
            run_recipe(sweep.grid.recipe, overrides, last=sweep.preparing[-1])
    finally:
        assert lock is not None
        lock.close()


def in_ranges(numbers: Iterable[int]) -> str:
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
    from src.sweep import places, work

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
    where = places(min(jobs or len(devices) or cores, max(1, len(todo))), devices, cores)
    skipped = sum(states[point.label] == "skipped" for point in points)
    before = f"{len(points) - len(todo) - skipped} finished before" + (
        f", {skipped} skipped" if skipped else ""
    )
    print(
        f"{sweep.grid.name}: {len(points)} points, {before}, {len(where) if todo else 0} at a time",
        flush=True,
    )
    use_this_kernel()  # once, not by all at the same moment
    failed: dict[str, str] = {}
    left = len(todo)
    for end in work(
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
        print(f"[{len(todo) - left}/{len(todo)}] {end.name}: {words}; {left} left", flush=True)
        states[end.name] = {"before": "finished", "elsewhere": "running", "stopped": "begun"}.get(
            end.how, end.how
        )
        if end.how == "failed":
            failed[end.name] = end.sentence
        sweep.write_ledger(states)
    return failed


def report_on(sweep: Sweep, force: bool) -> None:
    """Execute notebook 07_sweep into results/<sweep>/, and its page without code, unless nothing
    has changed since.
    """
    from nbconvert import HTMLExporter

    from src.sweep import take

    lock = take(sweep.folder / ".lock", wait=True)
    values = sweep.grid.report | {"recipe": sweep.grid.recipe, "model_name": sweep.grid.name}
    stamps = [
        sweep.folder / point.label / ".stages" / f"{sweep.stages[-1]}.json"
        for point in sweep.grid.points
    ]
    mark, stamp = (
        fingerprint(REPORT, values, " ".join(map(identity, stamps))),
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
    print(f"Look at:\n  {page}\n  {sweep.folder / 'sweep.csv'}", flush=True)
    assert lock is not None
    lock.close()


def show_points(sweep: Sweep) -> None:
    """Print number, label and state of every point, and the line that runs the unfinished ones on a
    cluster.
    """
    states = [sweep.state(point) for point in sweep.grid.points]
    for number, (point, state) in enumerate(zip(sweep.grid.points, states, strict=True)):
        print(f"{number:4d}  {state:9}  {point.label}")
    if todo := [
        number for number, state in enumerate(states) if state not in ("finished", "running")
    ]:  # skipped is what is not to be had here; a node may
        print(f"sbatch --array={in_ranges(todo)} launch/sweep.slurm {sweep.path}")


def sweep(arguments: Sequence[str]) -> int:
    """Parse the command line of `run.py sweep`, and run the points of a grid file that are not
    finished.
    """
    parser = argparse.ArgumentParser(
        prog="run.py sweep",
        description=(
            "Run a recipe at every point of a grid; called again it goes on (docs/sweeps.md)."
        ),
    )
    parser.add_argument("grid", help="YAML file, e.g. launch/sweeps/roi_sets_mini.yaml")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="points at a time, by default one a GPU, without GPUs one a core",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="I[,J]",
        help="only the points of these numbers (--list shows them), and no report",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="only show the points with their state, and the sbatch line",
    )
    parser.add_argument(
        "--force", action="store_true", help="run finished points and the report again"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell what one point will need, the first: parameters, memory, disk",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="HOW",
        help=(
            "as without sweep: how stages that train are started, e.g. python, which lets SIGTERM"
            " save any state"
        ),
    )
    args = parser.parse_args(arguments)
    from src.sweep import lacks

    told = Sweep(args.grid)
    points, numbers = told.grid.points, args.only.split(",") if args.only else []
    if args.jobs < 0 or [n for n in numbers if not n.strip().isdecimal() or int(n) >= len(points)]:
        raise PerceptError(
            f"--only takes numbers of points, 0 to {len(points) - 1} and separated by commas (it"
            f" was {args.only!r}), --jobs a number of at least 1."
        )
    launcher_of(args.launch)
    if args.list or args.dry_run:
        (
            show_points(told)
            if args.list
            else dry_run(
                told.grid.recipe,
                told.overrides_of(points[0]),
                told.stages[0],
                without=told.grid.without,
            )
        )
        return 0
    prepare_data(told)
    states = {point.label: told.state(point) for point in points}
    for reason in dict.fromkeys(
        lacks(point.launch) for point in points if states[point.label] == "skipped"
    ):
        print(
            f"Skipped, as {reason}:"
            f" {', '.join(point.label for point in points if states[point.label] == 'skipped')}",
            flush=True,
        )
    if removed := told.write_ledger(states):
        print(f"No longer in {args.grid}, left as they are: {', '.join(removed)}", flush=True)
    failed = run_points(
        told,
        [points[int(n)] for n in numbers] or points,
        states,
        args.jobs,
        args.force,
        args.launch,
    )
    if not args.only and "finished" in states.values():
        report_on(told, args.force)
    for label, sentence in failed.items():
        print(f"failed: {label}: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Parse the command line and run."""
    if sys.argv[1:2] == ["download"]:
        return download(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:
        return sweep(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a recipe, or `list`; `download` and `sweep` have a --help of their own"
    )
    parser.add_argument(
        "--mini", action="store_true", help="lay the recipe's miniature overlay over it"
    )
    parser.add_argument(
        "-f",
        dest="files",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of overrides (repeatable; later ones win, -p wins over all)",
    )
    parser.add_argument(
        "-p",
        dest="pairs",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="override one parameter",
    )
    parser.add_argument(
        "--from",
        dest="first",
        default="",
        metavar="NN",
        help="begin at this stage, taking the earlier ones as they are",
    )
    parser.add_argument("--to", dest="last", default="", metavar="NN", help="end with this stage")
    parser.add_argument("--without", default="", metavar="NN,NN", help="leave out these stages")
    parser.add_argument(
        "--force",
        action="store_true",
        help="run finished stages again (with --from: from there on)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell what the stages will need: parameters, memory, disk",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="HOW",
        help=(
            "train in several processes: an accelerate config of launch/, or a command before the"
            " script"
        ),
    )
    args = parser.parse_args()
    if args.recipe == "list":
        list_recipes()
        sys.stdout.flush()
        return 0
    recipe, without = (
        args.recipe + ("/mini" if args.mini else ""),
        list(filter(None, args.without.split(","))),
    )
    if args.dry_run:
        dry_run(recipe, dict(args.pairs), args.first, args.files, args.last, without)
        return 0
    run_recipe(
        recipe,
        dict(args.pairs),
        args.first,
        args.force,
        args.files,
        args.launch,
        args.last,
        without,
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PerceptError as error:
        sys.exit(f"run.py: {error}")
    except BrokenPipeError:  # the reader of `run.py list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command goes on where it stopped.")
