"""One stage of a run: executing its notebook, and the stamp that says it is finished.

A stamp is results/<run>/.stages/<stage>.json. It holds the fingerprint of the stage (of its code,
parameters and earlier stages), what the stage read (the identity of the prepared data, and the
files that its parameters name), the parameters that the stage itself says that it ran with, when it
ended, and the files that it wrote for later stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import parameters, utils
from src.command_line import split_command
from src.pipeline.fingerprints import fingerprint_code
from src.pipeline.inputs import describe_inputs
from src.pipeline.recipes import (
    find_notebook,
    read_declared_parameters,
    read_defaults,
    read_stage_parameters,
)
from src.pipeline.warm import get_kernel_options
from src.utils import PerceptError, UsageError

# glibc's allocator gives large blocks back at once and asks for them again in the next step, which
# costs page faults on a CPU: it shall keep them. Huge pages take a step of the full-size model from
# 11 s to 6 s (benchmarks/full_size_step.py).
ALLOCATOR_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "THP_MEM_ALLOC_ENABLE": "1",
}


@dataclass(frozen=True)
class StageRun:
    """A stage of a run, finished or not.

    Attributes:
        stage: name of the notebook.
        parameters: what papermill passes to it.
        stamp: the file that says that it is finished.
        fingerprint: hash of all that its result depends on.
    """

    stage: str
    parameters: dict[str, Any]
    stamp: Path
    fingerprint: str

    @property
    def results(self) -> Path:
        """results/<run>/."""
        return self.stamp.parents[1]

    @property
    def all_parameters(self) -> dict[str, Any]:
        """The parameters with the defaults of the notebook."""
        return read_defaults(self.stage) | self.parameters

    def is_finished(self) -> bool:
        """Whether the stage was finished with what it reads now."""
        if not is_finished(self.stamp, self.fingerprint):
            return False
        return bool(
            _read_stamp(self.stamp).get("inputs", {}) == describe_inputs(self.all_parameters)
        )


def find_stamp(run: str, stage: str) -> Path:
    """The place of a stage's stamp."""
    return utils.HOME / "results" / run / ".stages" / f"{stage}.json"


def iterate_stages(
    recipe: str, overrides: dict[str, Any], stages: Iterable[str], previous: str = ""
) -> Iterator[StageRun]:
    """The stages of a run in order; each fingerprint is taken when the stage before it has been
    dealt with, as it depends on that.

    Args:
        recipe: e.g. "mindeye/mini".
        overrides: of `select_stages`, with `model_name`.
        stages: names of the notebooks.
        previous: execution of what came before the first of them (`read_execution_id`).
    """
    for stage in stages:
        values = read_stage_parameters(stage, recipe, overrides)
        stamp = find_stamp(overrides["model_name"], stage)
        yield StageRun(stage, values, stamp, fingerprint_stage(stage, values, previous))
        previous = read_execution_id(stamp)


def fingerprint_stage(stage: str, values: dict[str, Any], previous: str) -> str:
    """Hash of everything that a stage's result depends on: its code, its parameters, and the
    execution of the stage before it (`read_execution_id`). Of a comparison, also the scores that it
    reads.
    """
    digest = hashlib.sha256(previous.encode())
    digest.update(fingerprint_code(find_notebook(stage), utils.ROOT).encode())
    for path in _find_compared_scores(values):
        digest.update(path.relative_to(utils.HOME).as_posix().encode() + path.read_bytes())
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def _find_compared_scores(values: dict[str, Any]) -> list[Path]:
    """metrics.json and scores.parquet of all runs that a comparison may read: all in results/, and
    those in a folder of runs that its parameter `runs` names.
    """
    if "runs" not in values:
        return []
    names = [part.strip(" /") for part in values["runs"].split(",")]
    patterns = ["*", *(name for name in names if "/" in name)]
    paths: list[Path] = []
    for pattern in patterns:
        for name in ("metrics.json", "scores.parquet"):
            paths.extend((utils.HOME / "results").glob(f"{pattern}/{name}"))
    return sorted(paths)


def _read_stamp(stamp: Path) -> dict[str, Any]:
    """The content of a stamp, {} where it is missing or damaged: such a stage is not finished."""
    try:
        content = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_execution_id(stamp: Path) -> str:
    """What the next stage's fingerprint takes from this one: which execution its files are of."""
    record = _read_stamp(stamp)
    return f"{record.get('fingerprint', '')} {record.get('finished', '')}"


def is_finished(stamp: Path, fingerprint: str) -> bool:
    """Whether a stamp has this fingerprint, and all that the stage wrote is still there."""
    record = _read_stamp(stamp)
    if not record or record.get("fingerprint") != fingerprint:
        return False
    outputs = [stamp.parents[1] / f"{stamp.stem}.ipynb"]
    outputs += [utils.HOME / path for path in record.get("wrote", [])]
    return all(path.exists() for path in outputs)


def list_outputs(values: dict[str, Any], run: str) -> dict[str, int]:
    """The files that stages hand on to each other (checkpoints, prepared data; not caches).

    Returns:
        When each was last changed, in nanoseconds, by its path below HOME.
    """
    folders = [utils.HOME / "train_logs" / run]
    if values.get("dataset"):
        folders.append(utils.HOME / "data" / str(values["dataset"]))
    outputs = {}
    for folder in folders:
        for path in folder.rglob("*"):
            relative = path.relative_to(utils.HOME)
            if path.is_file() and not _is_cache(relative):
                outputs[str(relative)] = path.stat().st_mtime_ns
    return outputs


def _is_cache(path: Path) -> bool:
    """Whether a path is hidden, or lies among the cached targets."""
    return any(part.startswith(".") or part == "targets" for part in path.parts)


def run_stage(run: StageRun, launcher: Sequence[str] = ()) -> float:
    """Execute a stage and stamp it; return the seconds.

    The old stamp is removed first: a stage that fails half-way has changed its files. One that
    refuses its parameters has not, and gets its stamp back.

    Args:
        run: what to execute.
        launcher: command that a stage that trains is started with, from `parse_launcher`.
    """
    old_stamp, recorded_before = _read_stamp(run.stamp), _find_record_time(run)
    run.stamp.unlink(missing_ok=True)
    name = run.results.relative_to(utils.HOME / "results").as_posix()
    before, start_time = list_outputs(run.all_parameters, name), time.time()
    try:
        values = _execute_launched(run, launcher)
    except BaseException:
        if old_stamp and recorded_before and _find_record_time(run) == recorded_before:
            utils.write_json(run.stamp, old_stamp)
        raise
    parameters_used = run.parameters
    if _find_record_time(run) != recorded_before:
        parameters_used = _read_own_record(run, values)
    after = list_outputs(run.all_parameters, name)
    seconds = round(time.time() - start_time, 1)
    record = {
        "fingerprint": run.fingerprint,
        "inputs": describe_inputs(run.all_parameters),
        "finished": time.time_ns(),
        "seconds": seconds,
        "parameters": parameters_used,
        "wrote": [path for path, changed in after.items() if before.get(path) != changed],
    }
    utils.write_json(run.stamp, record)
    return seconds


def _execute_launched(run: StageRun, launcher: Sequence[str]) -> dict[str, Any]:
    """Execute a stage, one that trains under a launcher first; returns what it was given."""
    values = run.parameters
    if launcher and "resume_from_ckpt" in read_declared_parameters(run.stage):
        launch_training(run.stage, values, launcher)
        # the notebook then loads the finished training, and shows it
        values = values | {"resume_from_ckpt": True}
    with utils.write_errors(run.results / f"{run.stage}.ipynb"):
        execute_stage(run.stage, values, run.results)
    return values


def _find_record(run: StageRun) -> Path:
    """Where a stage writes down its parameters (`Run.record_parameters`)."""
    return run.results / "parameters" / f"{run.stage}.json"


def _find_record_time(run: StageRun) -> int:
    """When a stage has last written down its parameters, 0 for never."""
    path = _find_record(run)
    return path.stat().st_mtime_ns if path.exists() else 0


def _read_own_record(run: StageRun, values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a stage says that it ran with.

    Raises:
        PerceptError: if it was given others.
    """
    record = utils.read_json(_find_record(run))
    used = {name: entry["value"] for name, entry in record.items()}
    for name, value in values.items():
        if name in used and used[name] != value:
            raise PerceptError(
                f"Stage {run.stage} ran with {name} {used[name]!r}, where {value!r} was asked for"
                f" (its value came from {record[name]['from']}): remove that, and run it again."
            )
    return used


def check_environment() -> None:
    """Refuse settings of the environment that would give the stages other values than run.py says.

    Raises:
        UsageError: for a PERCEPT_ARGS, or a PERCEPT_HOME that is relative.
    """
    utils.check_home()
    if arguments := os.environ.get("PERCEPT_ARGS", "").strip():
        raise UsageError(
            f"PERCEPT_ARGS is set ({arguments[:100]!r}) and would override what run.py gives the"
            " stages: unset it, and give values with -p."
        )


def execute_stage(stage: str, values: dict[str, Any], results: Path) -> None:
    """Execute a stage's notebook into results/<run>/; a failed one is left as <stage>.failed.ipynb.

    Raises:
        PerceptError: with the sentence of the stage, or its last line.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    running, failed = results / f".{stage}.running.ipynb", results / f"{stage}.failed.ipynb"
    register_kernel()
    try:
        executed = papermill.execute_notebook(
            find_notebook(stage),
            running,
            values,
            kernel_name="percept",
            progress_bar=sys.stderr.isatty(),
            log_output=False,
            cwd=str(utils.ROOT),
            **get_kernel_options(),
        )
        _check_complete(executed.cells, stage, failed, running)
        os.replace(running, results / f"{stage}.ipynb")
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        os.replace(running, failed)
        reason = f"{error.ename}: {error.evalue}"
        if any(line.startswith("PerceptError: ") for line in error.traceback):  # a kind of it
            reason = str(error.evalue).strip()
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


def _check_complete(
    cells: Sequence[dict[str, Any]], stage: str, failed: Path, running: Path
) -> None:
    """Refuse a notebook that has ended before its last cell, as by `sys.exit()`, without an error.

    Raises:
        PerceptError: if a cell of code was not run to its end.
    """
    states = [
        cell["metadata"].get("papermill", {}).get("status")
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    if set(states) - {"completed"}:
        os.replace(running, failed)
        raise PerceptError(
            f"Stage {stage} ended before its last cell, without an error, so it is not finished"
            f" (the notebook is {failed})."
        )


def register_kernel() -> None:
    """Register this interpreter as the kernel "percept", so that no other python3 kernel of the
    machine is used: beside the interpreter, or below HOME where its folder may not be written.

    A registration that is right is left alone: another process may be about to start a kernel from
    it.

    Raises:
        PerceptError: if neither place can be written.
    """
    from ipykernel.kernelspec import get_kernel_dict

    # the kernel's own log lines would stand between ours
    command = [*get_kernel_dict()["argv"], "--log-level=ERROR"]
    content = get_kernel_dict() | {"display_name": "Percept", "argv": command}
    jupyter = Path(sys.prefix) / "share" / "jupyter"
    try:
        _write_kernel(jupyter, content)
    except PerceptError:
        jupyter = utils.HOME / ".jupyter"
        _write_kernel(jupyter, content)
    set_allocator()
    os.environ["JUPYTER_PATH"] = str(jupyter)


def _write_kernel(jupyter: Path, content: dict[str, Any]) -> None:
    """Write the kernel "percept" below a folder of Jupyter's, unless it is there."""
    path = jupyter / "kernels" / "percept" / "kernel.json"
    if not path.exists() or utils.read_json(path, ["argv"])["argv"] != content["argv"]:
        utils.write_json(path, content)


def set_allocator() -> None:
    """Let processes that are started from here keep large blocks of memory (ALLOCATOR_SETTINGS)."""
    for name, value in ALLOCATOR_SETTINGS.items():
        os.environ.setdefault(name, value)


def parse_launcher(launch: str) -> list[str]:
    """The command that --launch stands for: an accelerate config, or what is put before a script.

    Raises:
        UsageError: for a config or a program that is not there, a config that is not YAML, or a
            quote that is not closed.
    """
    command = split_command(launch, "--launch")
    if not command:
        return []
    program = command[0]
    if program.endswith((".yaml", ".yml")):
        if not Path(program).is_file():
            raise UsageError(
                f"--launch {launch}: there is no file {program}: choose a config of launch/, or"
                " give the path of your own."
            )
        parameters.read_recipe(program)  # accelerate would end with a traceback
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *command]
    if not shutil.which(program):
        raise UsageError(
            f"--launch {launch}: there is no program {program}: give an accelerate config (.yaml),"
            " or activate .venv and give a command."
        )
    return command


def launch_training(stage: str, values: dict[str, Any], launcher: Sequence[str]) -> None:
    """Run a training stage's script under a launcher.

    SIGTERM is passed on, so that the training saves its state before it ends.

    Raises:
        PerceptError: if the launcher fails; what its processes said is on stderr.
        SystemExit: after SIGTERM.
    """
    set_allocator()
    script = parameters.NOTEBOOKS / f"{stage}.py"
    flags = [f"--{name}={value}" for name, value in values.items()]
    process = subprocess.Popen([*launcher, str(script), *flags], cwd=utils.ROOT)
    received = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        process.send_signal(number)

    handler = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # a terminal sent it to the processes, too: they save and end
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    if received:
        raise SystemExit(128 + signal.SIGTERM)
    if code:
        raise PerceptError(
            f"Stage {stage} stopped under `{shlex.join(launcher)}` (exit code {code}): the lines"
            " above say why."
        )
