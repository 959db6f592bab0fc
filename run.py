"""Run a recipe: its stages in order, each a notebook executed by papermill.

    python run.py list                                   # recipes, stages, cost
    python run.py mindeye --mini                         # the miniature, no data and no GPU needed
    python run.py mindeye -p subj 5 -p data_path /nsd    # an override goes to every stage that has the name
    python run.py mindeye --dry-run                      # what it will need: parameters, memory, disk
    python run.py mindeye --mini -f my.yaml              # a file of overrides, laid over the recipe and under -p
    python run.py mindeye --mini --from 03 --force       # again from stage 03
    python run.py download mindeye -p subj 5 --dry-run   # list what the recipe needs from the hub; without --dry-run, fetch it
    python run.py mindeye --launch launch/eight_gpus.yaml  # stages that train do so in several processes (docs/launching.md)

- The listing of recipes/<system>/ is the pipeline; with --mini, recipes/<system>/mini/ is laid over it.
- Each executed notebook lands in results/<run>/. A stage whose notebook, parameters, code and earlier stages are unchanged, and whose files are
  still there, is skipped, so an interrupted run goes on where it stopped. When a stage runs, those after it run again.
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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src import utils
from src.utils import PerceptError


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
        raise PerceptError(f"The recipe asks for the stage {stage}, but there is no {path}: rename the recipe file or restore the notebook.")
    return path


def cost_of(stage: str) -> str:
    """The line "Cost: ..." of a notebook's first cell."""
    text = "".join(json.loads(notebook_of(stage).read_text())["cells"][0]["source"])
    found = re.search(r"^Cost: (.*(?:\n[^\n#]+)*)", text, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def parameters_of(stage: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What papermill passes to a stage: the recipe's files in order, then the overrides that it has a parameter for."""
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
    """The run's name, from the parameters of all its stages: what only a training has names the folder of every stage."""
    defaults: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for stage in stages:
        known = utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
        defaults |= {name: p.default for name, p in known.items()}
        given |= {name: value for name, value in parameters_of(stage, recipe, overrides).items() if value != ""}
    return utils.run_name(recipe, defaults | given)


def check_overrides(stages: list[str], overrides: Iterable[str], origin: str) -> None:
    """Refuse an override that no stage has."""
    everything: dict[str, utils.Parameter] = {}
    for stage in stages:
        everything |= utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
    utils.check_known(overrides, everything, origin)


def written(values: dict[str, Any], run: str) -> dict[str, int]:
    """Files under HOME that stages hand on to each other (checkpoints, prepared data; not caches), and when each was last changed."""
    folders = [utils.HOME / "train_logs" / run, *([utils.HOME / "data" / str(values["dataset"])] if values.get("dataset") else [])]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if not any(part.startswith(".") or part == "targets" for part in path.relative_to(utils.HOME).parts)]
    return {str(path.relative_to(utils.HOME)): path.stat().st_mtime_ns for path in kept}


def is_finished(stamp: Path, mark: str) -> bool:
    """Whether the stamp is of this very work, and all that the stage wrote is still there."""
    if not stamp.exists():
        return False
    made = utils.read_json(stamp)
    notebook = stamp.parents[1] / f"{stamp.stem}.ipynb"
    return made["fingerprint"] == mark and notebook.exists() and all((utils.HOME / path).exists() for path in made.get("wrote", []))


def launcher_of(how: str) -> list[str]:
    """The command that --launch stands for: an accelerate config, or what is put before a script.

    Raises:
        PerceptError: for a config or a program that is not there.
    """
    words = shlex.split(how)
    if words and words[0].endswith((".yaml", ".yml")):
        if not Path(words[0]).exists():
            raise PerceptError(f"--launch {how}: there is no file {words[0]}: choose a config of launch/, or give the path of your own.")
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *words]
    if words and not shutil.which(words[0]):
        raise PerceptError(f"--launch {how}: there is no program {words[0]}: give an accelerate config (.yaml), or activate .venv and give a command.")
    return words


def train_launched(stage: str, values: dict[str, Any], launcher: list[str]) -> None:
    """Run a training stage's script under a launcher. SIGTERM is passed on, so that the training saves its state before it ends.

    Raises:
        PerceptError: if the launcher fails; what its processes said is on stderr.
        SystemExit: after SIGTERM.
    """
    keep_memory()
    flags = [f"--{name}={value}" for name, value in values.items()]
    process = subprocess.Popen([*launcher, str(utils.NOTEBOOKS / f"{stage}.py"), *flags], cwd=utils.ROOT)
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
        raise PerceptError(f"Stage {stage} stopped under `{shlex.join(launcher)}` (exit code {code}): the lines above say why.")


def run_stage(stage: str, values: dict[str, Any], results: Path, mark: str, launcher: Sequence[str] = ()) -> float:
    """Execute a stage and stamp it; return the seconds. The old stamp goes first: a stage that fails half-way has changed its files."""
    stamp = results / ".stages" / f"{stage}.json"
    stamp.unlink(missing_ok=True)
    before, begun = written(values, results.name), time.time()
    if launcher and "resume_from_ckpt" in utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage):
        train_launched(stage, values, list(launcher))
        execute(stage, values | {"resume_from_ckpt": True}, results)  # the notebook finds the training finished, and shows it
    else:
        execute(stage, values, results)
    seconds = round(time.time() - begun, 1)
    wrote = [path for path, changed in written(values, results.name).items() if before.get(path) != changed]
    record = {"fingerprint": mark, "finished": time.time_ns(), "seconds": seconds, "parameters": values, "wrote": wrote}
    utils.write_json(stamp, record)
    return seconds


def identity(stamp: Path) -> str:
    """What the next stage's fingerprint takes from this one: which execution its files are of."""
    made = utils.read_json(stamp) if stamp.exists() else {}
    return f"{made.get('fingerprint', '')} {made.get('finished', '')}"


def fingerprint(stage: str, values: dict[str, Any], before: str) -> str:
    """Hash of everything that a stage's result depends on: notebook, code, parameters, and the stages before."""
    digest = hashlib.sha256(before.encode())
    for path in [notebook_of(stage), *sorted((utils.ROOT / "src").rglob("*.py"))]:
        digest.update(path.read_bytes())
    for path in sorted((utils.HOME / "results").glob("*/metrics.json")) if "runs" in values else []:  # of a comparison, the scores it reads
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
            notebook_of(stage), running, values, kernel_name="percept", progress_bar=sys.stderr.isatty(), log_output=False, cwd=str(utils.ROOT)
        )
        os.replace(running, target)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        os.replace(running, failed)
        reason = str(error.evalue).strip() if error.ename == "PerceptError" else f"{error.ename}: {error.evalue}"
        raise PerceptError(f"Stage {stage} stopped: {reason} (the notebook with its traceback is {failed})") from None
    except DeadKernelError:
        os.replace(running, failed)
        raise PerceptError(f"Stage {stage} stopped: its Python process was killed, most often for want of memory; try a smaller batch_size ({failed}).") from None
    finally:
        running.unlink(missing_ok=True)


def use_this_kernel() -> None:
    """Register this interpreter as the kernel "percept", so that no other python3 kernel of the machine is taken."""
    from ipykernel.kernelspec import install

    folder = Path(install(kernel_name="percept", display_name="Percept", prefix=sys.prefix))
    spec = utils.read_json(folder / "kernel.json")
    spec["argv"].append("--log-level=ERROR")  # no lines of the kernel's own between ours
    utils.write_json(folder / "kernel.json", spec)
    keep_memory()
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")


def keep_memory() -> None:
    """Let processes that are started from here keep large blocks: glibc gives them back at once and asks again in the next step, costly page faults on a CPU."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a step of the full-size model in 6 s instead of 11 (benchmarks/full_size_step.py)


def asked(recipe: str, overrides: dict[str, Any], first: str, files: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The stages of a recipe, and the overrides of files and command line in one, with the run's name; refuses what no stage has."""
    stages = stages_of(recipe.split("/")[0])
    contents = [utils.read_recipe(file) for file in files]
    for content, origin in zip([*contents, overrides], [*files, "-p"], strict=True):
        check_overrides(stages, content, origin)
    if first and not any(stage.startswith(first) for stage in stages):
        raise PerceptError(f"--from {first} names no stage of {recipe}: choose among {', '.join(stages)}.")
    merged = {name: value for content in [*contents, overrides] for name, value in content.items()}
    return stages, merged | {"model_name": name_of(recipe, stages, merged)}


def run_recipe(recipe: str, overrides: dict[str, Any], first: str = "", force: bool = False, files: Sequence[str] = (), launch: str = "") -> Path:
    """Run every stage of a recipe that is not finished, and return results/<run>/."""
    launcher = launcher_of(launch)
    stages, overrides = asked(recipe, overrides, first, files)
    before, results = "", utils.HOME
    reached, begun = not first, time.time()
    for number, stage in enumerate(stages, 1):
        values = parameters_of(stage, recipe, overrides)
        results = utils.HOME / "results" / overrides["model_name"]
        results.mkdir(parents=True, exist_ok=True)
        mark = fingerprint(stage, values, before)
        stamp = results / ".stages" / f"{stage}.json"
        reached = reached or stage.startswith(first)
        done = is_finished(stamp, mark)
        if (done and not (force and reached)) or not reached:
            print(f"[{number}/{len(stages)}] {stage}: {'finished before, skipped' if done else 'skipped, as --from asks'}", flush=True)
        else:
            print(f"[{number}/{len(stages)}] {stage} ...", flush=True)
            seconds = run_stage(stage, values, results, mark, launcher)
            print(f"[{number}/{len(stages)}] {stage}: {seconds:.0f} s", flush=True)
        before = identity(stamp)
    print(f"Finished in {time.time() - begun:.0f} s. Look at:")
    for name in ("contact_sheet.png", "report.html", "metrics.json", "comparison.csv", "figures/comparison.png"):
        if (results / name).exists():
            print(f"  {results / name}")
    print(f"  {results}/*.ipynb (the executed notebooks)")
    return results


def dry_run(recipe: str, overrides: dict[str, Any], first: str = "", files: Sequence[str] = ()) -> None:
    """Print what the stages of a recipe will need; nothing is loaded, downloaded or written."""
    from src.dryrun import plan

    stages, overrides = asked(recipe, overrides, first, files)
    earlier: dict[str, Any] = {}  # what reconstructs is told by what was trained
    for stage in stages:
        known = utils.read_parameters(utils.parameters_source(notebook_of(stage)), stage)
        earlier |= {name: p.default for name, p in known.items()} | parameters_of(stage, recipe, overrides)
        if first and stage < first:
            continue
        needed = plan(stage, earlier)
        print(needed or f"{stage} trains no network and writes little", flush=True)
        print(f"  time: {cost_of(stage)}", flush=True)


def list_recipes() -> None:
    """Print recipes, their stages and what these cost."""
    for folder in sorted(path for path in utils.RECIPES.iterdir() if path.is_dir()):
        print(f"{folder.name}{'  (also --mini)' if (folder / 'mini').is_dir() else ''}")
        for stage in stages_of(folder.name):
            print(f"  {stage:24} {cost_of(stage)}")


def download(arguments: Sequence[str]) -> int:
    """Parse the command line of `run.py download`, say what would be fetched, and fetch it."""
    from src.download import carry_out, describe, plan

    parser = argparse.ArgumentParser(prog="run.py download", description="Fetch what a recipe needs; files that are there are left (docs/downloads.md).")
    parser.add_argument("what", help="a recipe, a bundle (docs/downloads.md), or the id of a model on the hub")
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="subj, data_path, vd_cache_dir, num_sessions, ...")
    parser.add_argument("--only", default="", metavar="PARTS", help="some parts of a recipe, e.g. shards,checkpoints")
    parser.add_argument("--mirror", default="", help="a folder with the files, or the address of a mirror of the hub or of S3")
    parser.add_argument("--to", default="", metavar="FOLDER", help="folder that takes the place of PERCEPT_HOME, e.g. to carry away")
    parser.add_argument("--dry-run", action="store_true", help="only list files and sizes")
    args = parser.parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"run.py: {message}", file=sys.stderr)  # type: ignore[assignment]  # the sentence alone
    planned = plan(args.what, only=args.only, to=args.to, mirror=args.mirror, overrides=dict(args.pairs))
    print(describe(planned), flush=True)
    for one in planned if not args.dry_run else []:
        carry_out(one)
    return 0


def main() -> int:
    """Parse the command line and run."""
    if sys.argv[1:2] == ["download"]:
        return download(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe, or `list`")
    parser.add_argument("--mini", action="store_true", help="lay the recipe's miniature overlay over it")
    parser.add_argument("-f", dest="files", action="append", default=[], metavar="FILE", help="YAML file of overrides (repeatable; later ones win, -p wins over all)")
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override one parameter")
    parser.add_argument("--from", dest="first", default="", metavar="NN", help="begin at this stage, taking the earlier ones as they are")
    parser.add_argument("--force", action="store_true", help="run finished stages again (with --from: from there on)")
    parser.add_argument("--dry-run", action="store_true", help="only tell what the stages will need: parameters, memory, disk")
    parser.add_argument("--launch", default="", metavar="HOW", help="train in several processes: an accelerate config of launch/, or a command before the script")
    args, rest = parser.parse_known_args()
    if args.recipe == "sweep":
        raise PerceptError("`run.py sweep` is not there yet: run the recipe once for each value with -p, under different model_name.")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.recipe == "list":
        list_recipes()
        sys.stdout.flush()
        return 0
    recipe = args.recipe + ("/mini" if args.mini else "")
    if args.dry_run:
        dry_run(recipe, dict(args.pairs), args.first, args.files)
        return 0
    run_recipe(recipe, dict(args.pairs), args.first, args.force, args.files, args.launch)
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
