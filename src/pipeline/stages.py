"""One stage: executing its notebook, and the stamp of a finished one."""

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
from pathlib import Path
from typing import Any

from src import parameters, utils
from src.pipeline.fingerprints import fingerprint_code
from src.pipeline.recipes import find_notebook, read_stage_parameters
from src.utils import PerceptError


def list_outputs(values: dict[str, Any], run: str) -> dict[str, int]:
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


def parse_launcher(how: str) -> list[str]:
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


def launch_training(stage: str, values: dict[str, Any], launcher: list[str]) -> None:
    """Run a training stage's script under a launcher.

    SIGTERM is passed on, so that the training saves its state before it ends.

    Raises:
        PerceptError: if the launcher fails; what its processes said is on stderr.
        SystemExit: after SIGTERM.
    """
    keep_freed_memory()
    flags = [f"--{name}={value}" for name, value in values.items()]
    process = subprocess.Popen(
        [*launcher, str(parameters.NOTEBOOKS / f"{stage}.py"), *flags], cwd=utils.ROOT
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
    before, begun = list_outputs(values, run), time.time()
    if launcher and "resume_from_ckpt" in parameters.parse_parameters(
        parameters.read_parameters_cell(find_notebook(stage)), stage
    ):
        launch_training(stage, values, list(launcher))
        execute_stage(
            stage, values | {"resume_from_ckpt": True}, results
        )  # the notebook finds the training finished, and shows it
    else:
        execute_stage(stage, values, results)
    seconds = round(time.time() - begun, 1)
    wrote = [
        path for path, changed in list_outputs(values, run).items() if before.get(path) != changed
    ]
    record = {
        "fingerprint": mark,
        "finished": time.time_ns(),
        "seconds": seconds,
        "parameters": values,
        "wrote": wrote,
    }
    utils.write_json(stamp, record)
    return seconds


def read_execution_id(stamp: Path) -> str:
    """What the next stage's fingerprint takes from this one: which execution its files are of."""
    made = utils.read_json(stamp) if stamp.exists() else {}
    return f"{made.get('fingerprint', '')} {made.get('finished', '')}"


def fingerprint_stage(stage: str, values: dict[str, Any], before: str) -> str:
    """Hash of everything that a stage's result depends on: its code, parameters, and the stages
    before.
    """
    digest = hashlib.sha256(before.encode())
    digest.update(fingerprint_code(find_notebook(stage), utils.ROOT).encode())
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


def execute_stage(stage: str, values: dict[str, Any], results: Path) -> None:
    """Execute a stage's notebook into results/<run>/; a failed one is kept as <stage>.failed.ipynb.

    Raises:
        PerceptError: with the sentence of the stage, or its last line.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target, running = results / f"{stage}.ipynb", results / f".{stage}.running.ipynb"
    failed = results / f"{stage}.failed.ipynb"
    register_kernel()
    try:
        papermill.execute_notebook(
            find_notebook(stage),
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


def register_kernel() -> None:
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
    keep_freed_memory()
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")


def keep_freed_memory() -> None:
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


def iterate_stages(
    recipe: str, overrides: dict[str, Any], stages: Iterable[str], before: str = ""
) -> Iterator[tuple[str, dict[str, Any], Path, str]]:
    """Stage, parameters, stamp and fingerprint of each stage of a run, in order; each fingerprint
    is taken when the stage before has been dealt with.
    """
    for stage in stages:
        values = read_stage_parameters(stage, recipe, overrides)
        stamp = utils.HOME / "results" / overrides["model_name"] / ".stages" / f"{stage}.json"
        yield stage, values, stamp, fingerprint_stage(stage, values, before)
        before = read_execution_id(stamp)
