"""launch/: accelerate's own loader reads the configs, Slurm takes the scripts and queues them
again; the Dockerfile names what is there.
"""

import ast
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from test_run import ROOT, project  # noqa: F401  # two tiny stages and a recipe

from src.pipeline import runs, stages
from src.utils import PerceptError

pytestmark = pytest.mark.slow(reason="starts trainings under launchers and Slurm")

LAUNCH = ROOT / "launch"
CONFIGS = sorted(LAUNCH.glob("*.yaml"))
JOBS = sorted(LAUNCH.glob("*.slurm"))


def run_command(*command, **other):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=200, **other
    )


# -------------------------------------------------------------------------------------- accelerate
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))
    expected = {
        "cpu": (1, 2, True),
        "one_gpu": (1, 1, False),
        "eight_gpus": (1, 8, False),
        "several_nodes": (2, 16, False),
        "deepspeed_zero2_offload": (1, 8, False),
    }
    assert (config.num_machines, config.num_processes, config.use_cpu) == expected[path.stem]
    alone = (
        path.stem == "deepspeed_zero2_offload"
    )  # accelerate refuses to start where both it and DeepSpeed's own file could say
    assert config.mixed_precision == (None if alone else "no")  # the notebooks' parameter decides
    kind = {"one_gpu": "NO", "deepspeed_zero2_offload": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert config.distributed_type.value == kind


def test_deepspeed_is_stage_2_with_the_optimizer_on_the_cpu():
    config = load_config_from_file(str(LAUNCH / "deepspeed_zero2_offload.yaml"))
    settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert (
        settings["zero_optimization"]["stage"] == 2
        and settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    )
    assert (
        not {"fp16", "bf16", "optimizer", "scheduler"} & settings.keys()
    )  # these are the notebooks' own


def test_the_cpu_config_starts_two_processes(tmp_path):
    """Which the locked accelerate does not do for MULTI_CPU, nor for --cpu --num_processes 2."""
    script = tmp_path / "who.py"
    script.write_text(
        "import os, sys, pathlib\npathlib.Path(sys.argv[1],"
        " os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
    )
    done = run_command(*stages.parse_launcher(str(LAUNCH / "cpu.yaml")), script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]


def test_a_config_or_program_that_is_missing_is_named():
    for launch, message in (
        ("launch/nine.yaml", "no file launch/nine.yaml"),
        ("no-such-program --x", "no program no-such-program"),
    ):
        with pytest.raises(PerceptError, match=message):
            stages.parse_launcher(launch)
    assert stages.parse_launcher("") == [] and stages.parse_launcher(f"{sys.executable} -u") == [
        sys.executable,
        "-u",
    ]


# --------------------------------------------------------------------------------- run.py --launch
@pytest.fixture
def training(project):  # noqa: F811
    """The second stage can be resumed; its script notes its flags, and its notebook too."""
    notebook = project / "notebooks" / "01_second.ipynb"
    notebook.write_text(
        notebook.read_text().replace(
            "fail = False  # fail on purpose", "resume_from_ckpt = False  # go on"
        )
    )
    script = (
        "import json, os, pathlib, sys, time\nhome = pathlib.Path(os.environ['NOTES'])\n(home /"
        " 'flags.json').write_text(json.dumps(sys.argv[1:]))\n"
    )
    (project / "notebooks" / "01_second.py").write_text(
        script
        + "while '--subj=9' in sys.argv: time.sleep(.1)\nsys.exit(3 if '--subj=8' in sys.argv else"
        " 0)\n"
    )
    return project


def test_a_training_stage_runs_under_the_launcher_and_then_its_notebook(training, monkeypatch):
    monkeypatch.setenv("NOTES", str(training))
    monkeypatch.setattr(
        stages, "fingerprint_stage", lambda stage, values, before: f"{stage} {values} {before}"
    )  # whoever edits src/ meanwhile
    results = runs.run_recipe("sys/mini", {"subj": "3"}, launch=sys.executable)
    assert "--subj=3" in json.loads((training / "flags.json").read_text())
    cells = json.loads((results / "01_second.ipynb").read_text())["cells"]
    assert any("resume_from_ckpt = True" in "".join(cell["source"]) for cell in cells)
    (training / "flags.json").unlink()
    runs.run_recipe("sys/mini", {"subj": "3"}, launch=sys.executable)
    assert not (training / "flags.json").exists()  # finished before
    with pytest.raises(PerceptError, match=r"Stage 01_second stopped under .*exit code 3"):
        runs.run_recipe("sys/mini", {"subj": "8"}, launch=sys.executable)


def test_sigterm_is_passed_on_and_ends_with_143(training, monkeypatch):
    monkeypatch.setenv("NOTES", str(training))
    (training / "flags.json").unlink(missing_ok=True)
    script = (
        "import threading, os, signal, time, pathlib\nnote ="
        f" pathlib.Path({str(training / 'flags.json')!r})\n"
        + "def later():\n    while not note.exists(): time.sleep(.05)\n    os.kill(os.getpid(),"
        " signal.SIGTERM)\nthreading.Thread(target=later).start()\nfrom src import"
        " parameters\nfrom src.pipeline import stages\nparameters.NOTEBOOKS ="
        f" pathlib.Path({str(training / 'notebooks')!r})\nstages.launch_training('01_second',"
        f" {{'subj': 9}}, [{sys.executable!r}])\n"
    )
    assert run_command(sys.executable, "-c", script, cwd=ROOT).returncode == 143


# ------------------------------------------------------------------------------------------- Slurm
def directives(path):
    return re.findall(r"^#SBATCH (--\S+)$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [*JOBS, *sorted(LAUNCH.glob("*.sh"))], ids=lambda path: path.name)
def test_scripts_are_bash_and_name_what_is_there(path):
    assert run_command("bash", "-n", path).returncode == 0
    text = path.read_text()
    for named in re.findall(r"launch/\w+\.\w+", text):
        assert (ROOT / named).exists(), named
    assert not re.search(
        r"--(account|partition|qos|mail-user)", text
    )  # those are the cluster's, given to sbatch


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_jobs_can_be_queued_again_and_keep_their_log(path):
    options = directives(path)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(options)
    assert any(word.startswith("--output=train_logs/slurm-%") for word in options)
    assert len(options) == path.read_text().count("#SBATCH")


def test_the_array_of_a_sweep_is_over_its_points():
    assert (
        'sweep "$@" --only "$SLURM_ARRAY_TASK_ID" --launch python'
        in (LAUNCH / "sweep.slurm").read_text()
    )
    assert any(word.startswith("--array=") for word in directives(LAUNCH / "sweep.slurm"))


def test_the_array_is_over_subjects_and_the_nodes_fit_their_configs():
    assert (
        "--array=1,2,5,7" in directives(LAUNCH / "subjects.slurm")
        and '-p subj "$SLURM_ARRAY_TASK_ID"' in (LAUNCH / "subjects.slurm").read_text()
    )
    for name, nodes in (("one_node", 1), ("several_nodes", 2)):
        assert {f"--nodes={nodes}", "--gpus-per-node=8", "--ntasks-per-node=1"} <= set(
            directives(LAUNCH / f"{name}.slurm")
        )


@pytest.fixture(scope="module")
def slurm():
    if not shutil.which("scontrol") or " UP" not in run_command("scontrol", "ping").stdout:
        pytest.skip("no Slurm controller answers here: the scripts are checked without one")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_sbatch_takes_the_job(slurm, path):
    done = run_command("sbatch", "--test-only", "--nodes=1", path, "mindeye", cwd=ROOT)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def wait_for(path, text, job, seconds=150):
    """Of a job that was queued again Slurm itself waits two minutes; five seconds are needed, since
    at once the job's credential is still revoked.
    """
    start_time = time.time()
    while text not in (path.read_text() if path.exists() else ""):
        assert time.time() - start_time < seconds, (
            path.read_text() if path.exists() else "the job did not start"
        )
        if time.time() - start_time > 5:
            run_command("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)


@pytest.fixture
def stand_in(tmp_path):
    """A repository whose run.py is told to stop the first time, as a training is, and finishes the
    second time.
    """
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "run.py").write_text(
        "import os, pathlib, signal, sys, time\nstate = pathlib.Path('state-' +"
        " os.environ['SLURM_JOB_ID'])\ndef stop(*_):\n    state.write_text('saved')\n   "
        " print('saved', flush=True)\n    sys.exit(143)\nif state.exists():\n   "
        " sys.exit(print('went on', sys.argv[1:]))\nsignal.signal(signal.SIGTERM,"
        " stop)\nprint('begun', sys.argv[1:], flush=True)\ntime.sleep(120)\n"
    )
    return tmp_path


@pytest.mark.parametrize("stop_by", ["time limit", "requeued"])
def test_a_stopped_job_goes_on_in_a_real_slurm(slurm, stand_in, stop_by):
    log = stand_in / "log"
    flags = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=50M", f"--output={log}", "--parsable"]
    job = run_command(
        "sbatch",
        *flags,
        stand_in / "launch" / "recipe.slurm",
        "mindeye",
        "-p",
        "subj",
        "5",
        cwd=stand_in,
    ).stdout.strip()
    try:
        wait_for(log, "begun ['--launch', 'python', 'mindeye', '-p', 'subj', '5']", job)
        signal_command = (
            ("scancel", "--batch", "--signal=USR1", job)
            if stop_by == "time limit"
            else ("scontrol", "requeue", job)
        )
        assert run_command(*signal_command).returncode == 0
        wait_for(log, "saved", job)
        wait_for(log, "went on", job)
        assert ("is queued again" in log.read_text()) == (stop_by == "time limit")
    finally:
        run_command("scancel", job)


# ------------------------------------------------------------------------------------------ Docker
def instructions():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    return [
        line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")
    ]


def test_the_image_starts_jupyterlab_for_the_outside_and_runs_recipes():
    steps = instructions()
    allowed = {
        "FROM",
        "RUN",
        "COPY",
        "WORKDIR",
        "USER",
        "ENV",
        "VOLUME",
        "EXPOSE",
        "CMD",
    }  # no ENTRYPOINT, so that another command can take CMD's place
    assert {name for name, _ in steps} <= allowed
    only = {name: value for name, value in steps}
    command = ast.literal_eval(only["CMD"])
    assert command[:2] == ["jupyter", "lab"] and {
        "--ip=0.0.0.0",
        f"--port={only['EXPOSE']}",
        "--no-browser",
    } <= set(command)
    assert not re.search(r"token|password|allow-root", only["CMD"]) and only["USER"] == "percept"
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-\S+", only["FROM"])  # a version that stays
    assert (
        f"PERCEPT_HOME={only['VOLUME']}" in only["ENV"]
        and f"PATH={only['WORKDIR']}/.venv/bin" in only["ENV"]
    )
    assert (ROOT / command[-1]).is_dir() and any(
        "setup.sh" in value for name, value in steps if name == "RUN"
    )


def test_the_image_has_the_code_and_none_of_the_data():
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().split() if not line.startswith("!")
    ]
    left_out = {
        name for name in os.listdir(ROOT) if any(fnmatch.fnmatch(name, p) for p in patterns)
    }
    assert {".git", ".venv", "data/*", "results/*", "train_logs/*"} <= set(patterns)
    tracked = {
        line.split("/")[0] for line in run_command("git", "ls-files", cwd=ROOT).stdout.splitlines()
    }
    assert (
        not left_out & tracked
        and torch.__version__.split("+")[0] in (ROOT / "requirements.lock").read_text()
    )
