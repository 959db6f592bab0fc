"""Sweeps: grid files and what is refused of them, runs side by side that lose and repeat nothing,
and the statistics against computations made otherwise.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats
from test_run import ROOT

import run
from src import figures, parameters, utils
from src.evaluation import sweeps
from src.pipeline import grid as grid_file
from src.pipeline import jobs as job_queue
from src.pipeline import recipes
from src.pipeline import stages as stage_running
from src.pipeline import sweep as sweeping
from src.utils import PerceptError, save_checkpoint

STUB = """from pathlib import Path
import os, time
home = Path(os.environ["PERCEPT_HOME"])


def note(what):
    with open(home / "notes.txt", "a") as file:
        file.write(f"{what} {model_name} {time.time()}\\n")
"""
PREPARE = (
    STUB + 'note("prepared")\nassert number == 7\nfolder = home / "data" /'
    ' dataset\nfolder.mkdir(parents=True, exist_ok=True)\n(folder / "x").write_text("data")'
)
TRAIN = (
    STUB
    + 'note("begun")\nassert (home / "data" / dataset / "x").exists()\ntime.sleep(wait)\nif fail:\n'
    '    raise ValueError("on purpose")\nfolder = home / "train_logs" /'
    " model_name\nfolder.mkdir(parents=True, exist_ok=True)\n(folder /"
    ' "weights").write_text(f"{rate} {seed}")\n(folder /'
    ' "threads.txt").write_text(os.environ["OMP_NUM_THREADS"])\nnote("ended")'
)
SHARED = 'recipe = ""  # a recipe\nmodel_name = ""  # run\n'
STAGES = {
    "00_prepare_data": (
        SHARED + 'dataset = "d"  # data\nnumber = 1  # of the data alone\nseed = 0  # random',
        PREPARE,
    ),
    "02_train": (
        SHARED
        + 'dataset = "d"  # data\nrate = 0.1  # more than 0\nseed = 0  # random\nwait = 0.0  #'
        " seconds\nfail = False  # on purpose",
        TRAIN,
    ),
    "07_sweep": (SHARED + 'by = "val/loss"  # a score', STUB + 'note("reported")'),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of run.py and src/ with tiny stages, so that runs are processes of their own and
    nobody changes the code meanwhile.
    """
    root = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "run.py", root)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    (root / "recipes" / "tiny" / "mini").mkdir(parents=True)
    for stage, (parameters_cell, code) in STAGES.items():
        cells = [nbformat.v4.new_markdown_cell(f"# {stage}\n\nCost: nothing")]
        cells += [
            nbformat.v4.new_code_cell(parameters_cell, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code),
        ]
        meta = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=meta),
            root / "notebooks" / f"{stage}.ipynb",
        )
        if stage != "07_sweep":
            (root / "recipes" / "tiny" / f"{stage}.yaml").write_text("recipe: tiny\n")
    (root / "recipes" / "tiny" / "mini" / "00_prepare_data.yaml").write_text("number: 7\n")
    return root


@pytest.fixture
def tiny(repository, tmp_path, monkeypatch):
    """The same as this process sees it, and a grid of four points."""
    monkeypatch.setattr(utils, "ROOT", repository)
    monkeypatch.setattr(parameters, "NOTEBOOKS", repository / "notebooks")
    monkeypatch.setattr(parameters, "RECIPES", repository / "recipes")
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    monkeypatch.setenv("PERCEPT_HOME", str(tmp_path / "home"))  # for kernels of this process
    (tmp_path / "home").mkdir()
    return tmp_path / "tiny.yaml"


def write(path, **content):
    path.write_text(yaml.safe_dump({"recipe": "tiny/mini"} | content, sort_keys=False))
    return path


def environment(path):
    return {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
        "PERCEPT_HOME": str(path.parent / "home"),
        "PYTHONPATH": "",
    }


def start_sweep(path, *arguments, **other):
    command = [sys.executable, "-u", str(utils.ROOT / "run.py"), "sweep", str(path), *arguments]
    return subprocess.Popen(
        command,
        env=environment(path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **other,
    )


def run_sweep(path, *arguments):
    process = start_sweep(path, *arguments)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def notes(path):
    file = path.parent / "home" / "notes.txt"
    return [
        (what, name, float(at))
        for what, name, at in (
            line.split() for line in (file.read_text() if file.exists() else "").splitlines()
        )
    ]


def stamps(path):
    return {
        str(stamp): stamp.read_text()
        for stamp in (path.parent / "home" / "results").rglob(".stages/*.json")
    }


# -------------------------------------------------------------------------------------------- runs
@pytest.mark.slow(reason="kills runs of whole recipes at many moments")
def test_a_sweep_killed_at_any_moment_loses_and_repeats_nothing(tiny, capsys):
    write(tiny, fixed={"wait": 0.4}, grid={"rate": {"low": 0.1, "high": 0.2}, "seed": [0, 1]})
    seed = random.SystemRandom().randrange(10**6)
    print("moment drawn by seed", seed)
    process = start_sweep(tiny, "--jobs", "2", start_new_session=True)
    while not any(what == "ended" for what, _, _ in notes(tiny)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(random.Random(seed).uniform(0, 5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed, before = (
        time.time(),
        {path: text for path, text in stamps(tiny).items() if "07_sweep" not in path},
    )
    processes = [
        start_sweep(tiny, "--jobs", "1"),
        start_sweep(tiny, "--jobs", "1", "--only", "3,2,1,0"),
    ]  # two go on at the same time
    output = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    after, records = stamps(tiny), notes(tiny)
    assert {path: after[path] for path in before} == before
    assert [name for what, name, _ in records if what == "prepared"] == ["tiny/prepare"]
    for rate, number in itertools.product(("low", "high"), (0, 1)):
        name = f"tiny/rate={rate},seed={number}"
        start_times = [at for what, other, at in records if (what, other) == ("begun", name)]
        stamped = any(name in path and "02_train" in path for path in before)
        assert sum(at < killed for at in start_times) <= 1 and sum(
            at > killed for at in start_times
        ) == (not stamped), (seed, name, start_times, killed)
        assert (
            tiny.parent / "home/train_logs" / name / "weights"
        ).read_text() == f"{ {'low': 0.1, 'high': 0.2}[rate] } {number}"
    assert (
        run.main(["sweep", str(tiny)]) == 0
        and "4 points, 4 finished before" in capsys.readouterr().out
    )
    ledger = json.loads((tiny.parent / "home/results/tiny/points.json").read_text())
    assert [p["state"] for p in ledger["points"]] == ["finished"] * 4 and ledger["points"][1][
        "levels"
    ] == {"rate": "low", "seed": "1"}
    assert (tiny.parent / "home/results/tiny/report.html").exists() and (
        tiny.parent / "home/results/tiny/07_sweep.ipynb"
    ).exists()
    records = notes(tiny)
    assert run.main(["sweep", str(tiny)]) == 0 and notes(tiny) == records  # no kernel at all
    write(
        tiny,
        fixed={"wait": 0.4},
        grid={"rate": {"low": 0.1, "high": 0.2}, "seed": [0]},
        points=[{"label": "slow", "rate": 1}],
    )
    changed = sweeping.Sweep(tiny)
    assert [changed.find_state(point) for point in changed.grid.points] == [
        "finished",
        "finished",
        "missing",
    ]
    assert changed.write_ledger(
        dict.fromkeys(["rate=low,seed=0", "rate=high,seed=0", "slow"], "")
    ) == ["rate=low,seed=1", "rate=high,seed=1"]
    assert changed.grid.points[2].levels == {"rate": "1", "seed": "0"}
    write(tiny, fixed={"wait": 0.5}, grid={"seed": [0]})
    assert sweeping.Sweep(tiny).find_state(sweeping.Sweep(tiny).grid.points[0]) == "missing"


@pytest.mark.slow(reason="runs a sweep and interrupts it")
def test_a_failed_point_stops_no_other_and_ctrl_c_ends_the_sweep(tiny):
    write(
        tiny,
        points=[
            {"label": "bad", "fail": True},
            {"label": "slow", "wait": 60},
            {"label": "never", "rate": 0.5},
        ],
    )
    process = start_sweep(tiny, "--jobs", "1")
    while ("begun", "tiny/slow") not in [(what, name) for what, name, _ in notes(tiny)]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.SIGINT
        and "[2/3] slow: stopped after" in output
        and "[3/3]" not in output
    )
    assert (
        "[1/3] bad: failed after" in output
        and "s: Stage 02_train stopped: ValueError: on purpose" in output
    )
    assert "ValueError: on purpose" in (tiny.parent / "home/results/tiny/bad/log.txt").read_text()
    assert [
        sweeping.Sweep(tiny).find_state(point) for point in sweeping.Sweep(tiny).grid.points
    ] == [
        "failed",
        "begun",
        "missing",
    ]
    sweeping.show_points(sweeping.Sweep(tiny))


# -------------------------------------------------------------------------- processes side by side
def job(folder, name, script):
    return job_queue.Job(
        name, ["sh", "-c", script], folder / name / "log.txt", folder / name / ".lock"
    )


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (4, 4, 4)),
        ({"OMP_NUM_THREADS": "1"}, (1, 1, 1)),
        ({"OMP_NUM_THREADS": "64"}, (4, 4, 4)),
        ({"MKL_NUM_THREADS": "2"}, (4, 2, 4)),
    ],
)
def test_cores_are_shared_out_and_fewer_threads_hold_for_every_library(
    monkeypatch, variables, expected
):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, number in variables.items():
        monkeypatch.setenv(name, number)
    where = job_queue.assign_devices(2, ["4", "7"], 8)
    assert [p["CUDA_VISIBLE_DEVICES"] for p in where] == ["4", "7"]
    assert all(tuple(int(p[name]) for name in THREADS) == expected for p in where)
    assert (
        "CUDA_VISIBLE_DEVICES" not in job_queue.assign_devices(3, [], 2)[2]
        and job_queue.assign_devices(3, [], 2)[2]["MKL_NUM_THREADS"] == "1"
    )


def test_jobs_share_places_and_failures_are_told(tmp_path):
    where = job_queue.assign_devices(2, ["4", "7"], 8)
    script = (
        f"date +%s.%N >> {tmp_path}/times; echo $CUDA_VISIBLE_DEVICES; sleep .3; date +%s.%N >>"
        f" {tmp_path}/times"
    )
    jobs = [
        *(job(tmp_path, str(i), script) for i in range(4)),
        job(tmp_path, "bad", "echo 'run.py: too bad'; exit 1"),
        job(tmp_path, "dead", "kill -9 $$"),
    ]
    ended = {one.name: one for one in job_queue.run_jobs(jobs, where, lambda name: name == "3")}
    assert {name: one.outcome for name, one in ended.items()} == {
        "0": "finished",
        "1": "finished",
        "2": "finished",
        "3": "before",
        "bad": "failed",
        "dead": "failed",
    }
    assert ended["bad"].message == "too bad" and "code -9" in ended["dead"].message
    assert {(tmp_path / name / "log.txt").read_text().strip() for name in "01"} == {"4", "7"}


def test_a_lock_lives_as_long_as_the_process_that_inherited_it(tmp_path):
    one_job = job_queue.Job("x", ["true"], tmp_path / "log", tmp_path / "lock")
    lock = job_queue.lock_job(one_job)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    lock.abandon()
    assert job_queue.lock_job(one_job) is None
    assert [one.outcome for one in job_queue.run_jobs([one_job], [{}], lambda _: False)] == [
        "elsewhere"
    ]
    child.kill()
    child.wait()
    job_queue.lock_job(one_job).release()


def test_sigterm_is_passed_on_and_no_more_is_begun(tmp_path):
    script = (
        f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; kill -TERM $PPID; sleep 30 & wait"
    )
    jobs = [job(tmp_path, "one", script), job(tmp_path, "two", "true")]
    ended = []
    with pytest.raises(SystemExit) as stopped:
        for one in job_queue.run_jobs(jobs, [{}], lambda _: False):
            ended.append((one.name, one.outcome))
    assert (
        stopped.value.code == 143
        and ended == [("one", "stopped")]
        and (tmp_path / "saved").exists()
    )


# -------------------------------------------------------------------------------------- grid files
def test_points_are_all_combinations_in_order_with_names_for_folders(tiny):
    write(
        tiny,
        name="mine",
        grid={"rate": {"a b/c": 0.5, "!V1": 1}, "seed": [3, 4]},
        points=[{"rate": 2, "wait": 1.5}],
        report={"by": "val/r2"},
    )
    grid = grid_file.read_grid(tiny)
    assert [p.label for p in grid.points] == [
        "rate=a-b-c,seed=3",
        "rate=a-b-c,seed=4",
        "rate=not-V1,seed=3",
        "rate=not-V1,seed=4",
        "rate=2,wait=1.5",
    ]
    assert grid.points[2].levels == {"rate": "!V1", "seed": "3"} and grid.points[2].overrides == {
        "rate": 1,
        "seed": 3,
    }
    assert (
        list(grid.factors) == ["rate", "seed", "wait"]
        and grid.report == {"by": "val/r2"}
        and grid.name_point_run(grid.points[4]) == "mine/rate=2,wait=1.5"
    )
    assert len(grid_file.make_folder_name("x" * 300)) < 140 and grid_file.make_folder_name(
        "x" * 300
    ) != grid_file.make_folder_name("x" * 301)
    assert sweeping.Sweep(tiny).grid.points[0].levels["wait"] == "0.0"  # what the recipe has


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {}}, "has no points"),
        ({"grid": {"rate": []}}, "'rate' of grid .* at least one"),
        ({"grid": {"rate": [1, 1]}}, "a value twice"),
        ({"grid": {"rate": [None]}}, "in quotes"),
        ({"grid": {"rate": {"a": 1, "b": 1.0}}}, "are the same setting"),
        ({"grid": {"rate": [1]}, "points": [{"rate": 1}]}, "both be called rate=1"),
        (
            {"grid": {"rate": [1]}, "points": [{"label": "x", "rate": 1}]},
            "rate=1 and x of .* same setting",
        ),
        (
            {"grid": {"rate": [1]}, "points": [{"label": "prepare", "rate": 2}]},
            "cannot be called 'prepare'",
        ),
        ({"points": [{"label": "x"}]}, "entry of points"),
        ({"grid": {"rat": [1]}}, "no parameter 'rat'.*did you mean 'rate'"),
        ({"grid": {"rate": ["fast"]}}, "must be a number"),
        ({"grid": {"rate": [0]}}, "must be more than 0"),
        ({"grid": {"number": [1, 2]}}, "'number' .* is of the data, which are prepared once"),
        ({"grid": {"dataset": ["a"]}}, "is of the data"),
        ({"grid": {"model_name": ["a"]}}, "sweep's own"),
        ({"fixed": {"rate": 1}, "grid": {"rate": [2]}}, "both fixed and varied"),
        ({"fixed": {"numbr": 1}, "grid": {"rate": [2]}}, "did you mean 'number'"),
        ({"recipe": "tny", "grid": {"rate": [2]}}, "no recipe 'tny'"),
        ({"recipe": "tiny/min", "grid": {"rate": [2]}}, "no recipe 'tiny/min'"),
        ({"recipe": "", "grid": {"rate": [2]}}, "needs `recipe"),
        ({"name": "../up", "grid": {"rate": [2]}}, "a name of letters"),
        ({"grids": {"rate": [2]}}, "the entry 'grids'"),
        ({"grid": {"rate": [2]}, "report": {"factr": "rate"}}, "no parameter 'factr'"),
        ({"grid": {"rate": [2]}, "from": "00"}, "from: 00 .* names no stage that comes after"),
        (
            {"grid": {"rate": [2]}, "without": ["00"]},
            "without: 00 .* names no stage that comes after",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(tiny, content, message):
    write(tiny, **content)
    with pytest.raises(PerceptError, match=message):
        run.main(["sweep", str(tiny)])
    assert not list((tiny.parent / "home").iterdir())


def test_a_missing_file_and_numbers_that_no_point_has(tiny):
    with pytest.raises(PerceptError, match="no grid file"):
        run.main(["sweep", "nothing.yaml"])
    write(tiny, grid={"rate": [1, 2]})
    for only in ("2", "a", "-1"):
        with pytest.raises(PerceptError, match="0 to 1"):
            run.main(["sweep", str(tiny), f"--only={only}"])


def test_the_list_names_points_states_and_the_sbatch_line(tiny, capsys):
    write(tiny, grid={"rate": [1, 2], "seed": [0, 1]})
    assert run.main(["sweep", str(tiny), "--list"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert (
        output[1].split() == ["1", "missing", "rate=1,seed=1"]
        and output[-1] == f"sbatch --array=0-3 launch/sweep.slurm {tiny}"
    )
    assert sweeping.format_ranges([5, 0, 1, 2]) == "0-2,5"


def test_points_begin_where_the_grid_says(tmp_path, monkeypatch):
    """A stage that is skipped or left out is neither run nor asked for, and later fingerprints are
    those that the run itself takes.
    """
    monkeypatch.setattr(utils, "HOME", tmp_path)
    path = tmp_path / "late.yaml"
    path.write_text("recipe: roi_voting/mini\nfrom: 02\nwithout: [06]\ngrid: {num_epochs: [1]}\n")
    sweep = sweeping.Sweep(path)
    assert (
        sweep.stages[sweep.first] == "02_train_roi_models"
        and sweep.stages[0].startswith("01")
        and "06_metrics" not in sweep.stages
    )
    point = sweep.grid.points[0]
    command = sweep.make_job(point, False, "").command
    assert (
        command[command.index("--from") + 1] == "02_train_roi_models"
        and command[command.index("--without") + 1] == "06"
    )
    stages, overrides = recipes.select_stages(
        sweep.grid.recipe, sweep.merge_overrides(point), first="02", skip=["06"]
    )
    for step in stage_running.iterate_stages(
        sweep.grid.recipe, overrides, stages
    ):  # as the point's run goes through them
        if step.stage >= "02":
            assert not sweep.is_done(point)
            (step.results / f"{step.stage}.ipynb").write_text("{}")
            record = {"fingerprint": step.fingerprint, "finished": 1, "wrote": []}
            utils.write_json(step.stamp, record)
    assert sweep.is_done(point)


def test_how_trainings_are_launched_can_be_varied(tiny, capsys, monkeypatch):
    config = tiny.parent / "offload.yaml"
    config.write_text("distributed_type: DEEPSPEED\n")
    write(
        tiny,
        grid={"rate": [1, 2], "launch": {"plain": "", "offload": f"{config} --num_processes 1"}},
        points=[{"label": "third", "rate": 3}],
    )
    sweep = sweeping.Sweep(tiny)
    assert [p.label for p in sweep.grid.points] == [
        *(f"rate={r},launch={how}" for r in (1, 2) for how in ("plain", "offload")),
        "third",
    ]
    assert [p.levels["launch"] for p in sweep.grid.points] == ["plain", "offload"] * 2 + [
        "plain"
    ] and sweep.grid.points[1].overrides == {"rate": 1}
    commands = [sweep.make_job(point, False, "python").command for point in sweep.grid.points]
    assert [command[command.index("--launch") + 1] for command in commands] == [
        "python",
        f"{config} --num_processes 1",
    ] * 2 + ["python"]
    monkeypatch.setattr(grid_file.importlib.util, "find_spec", lambda name: None)
    assert (
        sweep.find_state(sweep.grid.points[0]) == "missing"
        and sweep.find_state(sweep.grid.points[1]) == "skipped"
    )
    monkeypatch.setattr(sweeping, "prepare_data", lambda sweep: None)
    assert run.main(["sweep", str(tiny), "--only", "1,3"]) == 0 and not notes(tiny)
    output = capsys.readouterr().out
    assert (
        "Skipped, as deepspeed is not installed" in output
        and "): rate=1,launch=offload, rate=2,launch=offload" in output
    )
    assert "2 points, 0 finished before, 2 skipped" in output
    assert (
        run.main(["sweep", str(tiny), "--list"]) == 0 and "--array=0-4 " in capsys.readouterr().out
    )
    monkeypatch.setattr(grid_file.importlib.util, "find_spec", lambda name: name)
    assert (
        grid_file.missing_requirement(str(config))
        == ("" if torch.cuda.is_available() else "deepspeed needs a GPU, and there is none")
        and grid_file.missing_requirement("python") == ""
    )
    write(tiny, grid={"launch": {"plain": "", "gone": "launch/none.yaml"}})
    with pytest.raises(PerceptError, match="no file launch/none.yaml"):
        sweeping.Sweep(tiny)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_grids_can_be_run(path):
    sweep = sweeping.Sweep(path)
    points = {
        "roi_sets_mini": 36,
        "experiment1": 12,
        "rois_alone_mini": 19,
        "low_compute_mini": 32,
        "low_compute": 72,
    }
    assert len(sweep.grid.points) == points.get(path.stem, 5)  # else a curve over sessions


# ---------------------------------------------------------------------------- levels against seeds
def table_of(
    levels=("a", "b", "c"), batches=("16", "32"), seeds=("0", "1", "2"), seed=0, noise=0.02
):
    rng = np.random.default_rng(seed)
    effect, seed_effect = (
        dict(zip(levels, (0.0, 0.1, 0.3), strict=False)),
        {s: rng.normal(0, 0.5) for s in seeds},
    )
    cells = itertools.product(levels, batches, seeds)
    return pd.DataFrame(
        [
            (a, b, s, effect[a] + 0.2 * (b == "32") + seed_effect[s] + rng.normal(0, noise))
            for a, b, s in cells
        ],
        columns=["rois", "batch", "seed", "value"],
    )


def test_t_interval_is_scipys():
    values = np.random.default_rng(1).normal(size=7)
    result = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert sweeps.t_interval(values) == pytest.approx((values.mean(), result.low, result.high))
    assert np.isnan(sweeps.t_interval([1.0])[1:]).all() and sweeps.t_interval([1.0])[0] == 1.0


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_gaps_are_a_paired_t_test_over_seeds(better):
    table = table_of()
    gaps = sweeps.gaps_to_best(table, "rois", "seed", better)
    best = "a" if better == "lower" else "c"
    assert [gap.best for gap in gaps] == [best] * 2 and [gap.other for gap in gaps] == (
        ["b", "c"] if better == "lower" else ["b", "a"]
    )
    for gap in gaps:
        pair = [
            table[table["rois"] == level]
            .sort_values(["seed", "batch"])["value"]
            .to_numpy()
            .reshape(3, 2)
            .mean(1)
            for level in (gap.other, best)
        ]
        expected = stats.ttest_rel(*pair)
        low, high = expected.confidence_interval(0.95)
        ends = (low, high) if better == "lower" else (-high, -low)
        assert (gap.value, gap.low, gap.high) == pytest.approx(
            (abs((pair[0] - pair[1]).mean()), *ends)
        ) and gap.seeds == 3


def test_pairing_takes_the_luck_of_the_seed_out():
    gaps = sweeps.gaps_to_best(table_of(noise=0.002), "rois", "seed", "lower")
    assert all(gap.clear for gap in gaps)  # although seeds differ by five times the effect
    assert not all(
        gap.clear for gap in sweeps.gaps_to_best(table_of(noise=0.5), "rois", "seed", "lower")
    )


def test_more_than_noise_is_seldom_said_of_nothing():
    """Levels that do not differ: the best of four is called better than all others in at most 5 %
    of sweeps.
    """
    rng, clear = np.random.default_rng(0), 0
    cells = pd.DataFrame(list(itertools.product("abcd", "012")), columns=["rois", "seed"])
    for _ in range(300):
        gaps = sweeps.gaps_to_best(
            cells.assign(value=rng.normal(size=len(cells))), "rois", "seed", "lower"
        )
        clear += all(gap.clear for gap in gaps)
    assert clear / 300 <= 0.05


def test_levels_and_their_spread_are_those_of_pandas():
    table = table_of()
    result = sweeps.level_table(table, "rois", "seed").set_index("rois")
    means = table.pivot_table(index="seed", columns="rois", values="value", aggfunc="mean")
    assert result["value"].to_dict() == pytest.approx(means.mean().to_dict()) and result[
        "sd"
    ].to_dict() == pytest.approx(means.std().to_dict())
    assert (
        (result["seeds"] == 3).all()
        and (result["runs"] == 6).all()
        and list(result.index) == ["a", "b", "c"]
    )
    assert result.loc["b", "high"] == pytest.approx(
        stats.t.interval(0.95, 2, means["b"].mean(), stats.sem(means["b"]))[1]
    )
    assert sweeps.seed_sd(table, "rois", "seed") == pytest.approx(
        np.sqrt((means.std() ** 2).mean())
    )
    alone = sweeps.level_table(table[table["seed"] == "0"], "rois", "seed")
    assert alone["low"].isna().all() and np.isnan(
        sweeps.seed_sd(table[table["seed"] == "0"], "rois", "seed")
    )
    assert len(sweeps.average_by_seed(table, "rois", "")) == 1


def test_only_cells_that_every_level_has_are_compared():
    table = table_of()
    holes = table.drop(table.query("rois == 'b' and batch == '16' and seed == '1'").index)
    complete_rows = sweeps.select_complete_cells(holes, "rois", ["batch", "seed"])
    assert len(complete_rows) == 15 and not len(
        complete_rows.query("batch == '16' and seed == '1'")
    )
    assert (
        sweeps.select_complete_cells(table, "rois", ["batch", "seed"]).equals(table)
        and len(sweeps.select_complete_cells(table[:2], "batch", [])) == 2
    )


def test_the_verdict_says_by_how_much_and_whether_it_is_luck():
    close_gap, wide_gap = (
        sweeps.Gap("early", "all", 0.0123, 0.009, 0.0156, 3),
        sweeps.Gap("early", "V1", 0.05, 0.04, 0.06, 3),
    )
    expected = (
        "early is best in validation loss, by .012 over all, the next [.0090, .016], paired by"
        " batch and seed; seeds differ by .0030 (sd): more than seed noise"
    )
    assert (
        sweeps.describe_gaps([close_gap, wide_gap], 0.003, "validation loss", ["batch", "seed"])
        == expected
    )
    assert sweeps.describe_gaps([close_gap._replace(low=-0.001), wide_gap], 0.03, "x", []).endswith(
        "not more than seed noise (cannot be told from all)"
    )
    assert sweeps.describe_gaps(
        [close_gap._replace(low=np.nan, high=np.nan, seeds=1)], np.nan, "x", []
    ).endswith("with one seed it cannot be told from seed noise")
    assert "changes nothing" in sweeps.describe_gaps(
        [close_gap], 0.0, "x", []
    ) and "one level only" in sweeps.describe_gaps([], np.nan, "x", [])
    assert [sweeps.format_significant(x) for x in (0.0, 12.34, -0.5, 0.00456)] == [
        "0",
        "12",
        "-.50",
        ".0046",
    ]


def test_regions_are_drawn_where_they_are_alone_and_left_out():
    assert [sweeps.parse_region(x) for x in ("V1", " !V1", "-", "")] == [
        ("V1", "alone"),
        ("V1", "left out"),
        ("", "all"),
        ("", "all"),
    ]
    assert [sweeps.parse_region(x) for x in ("V1,V2", "!V1,!V2", "set1", "V1;V2")] == [None] * 4
    rois = {
        "V1": "V1",
        "no V1": "!V1",
        "V2": "V2",
        "no V2": "!V2",
        "all": "-",
        "V3": "V3",
        "early": "V1,V2",
    }
    rows = [
        (level, s, "pixcorr", i + 0.1 * s, "higher", 0.02)
        for i, level in enumerate(rois)
        for s in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["rois", "seed", "metric", "value", "better", "shuffled"])
    result = sweeps.region_table(table, rois, "rois", "seed").set_index(["region", "kind"])
    assert set(result.index) == {
        ("V1", "alone"),
        ("V1", "left out"),
        ("V2", "alone"),
        ("V2", "left out"),
        ("", "all"),
    }
    assert result.loc[("V2", "left out"), "value"] == pytest.approx(3.05) and result.loc[
        ("V1", "alone"), "shuffled"
    ] == pytest.approx(0.02)
    assert sweeps.region_table(
        table, {"V1": "V1", "no V1": "!V1", "early": "V1,V2"}, "rois", "seed"
    ).empty


# ------------------------------------------------------------------------------------ the notebook
REGIONS = "V1,V2,V3,hV4,LO,EBA,FFA,PPA,OPA".split(",")
EARLY = {
    "early": (0.60, "V1,V2,V3"),
    "higher": (0.64, "LO,EBA"),
    "V1": (0.62, "V1"),
    "all": (0.603, "-"),
}
ALONE = (
    {r: (0.66 - 0.008 * i, r) for i, r in enumerate(REGIONS)}
    | {f"without {r}": (0.60 + 0.004 * i, f"!{r}") for i, r in enumerate(REGIONS)}
    | {"all": (0.59, "-")}
)


def made_up(home, levels, batches=(16, 32, 64), seeds=(0, 1, 2), test_set="t"):
    """What a finished sweep leaves, with known effects: loss = level + batch + luck, and a score of
    .9 - loss.
    """
    rng, points = np.random.default_rng(0), []
    seed_effect = {s: rng.normal(0, 0.004) for s in seeds}
    for i, ((level, (effect, rois)), batch, s) in enumerate(
        itertools.product(levels.items(), batches, seeds)
    ):
        loss, label = (
            effect + 0.01 * (batch == 64) + seed_effect[s] + rng.normal(0, 0.001),
            f"rois={level},batch={batch},seed={s}".replace(" ", "-"),
        )
        points.append(
            {
                "number": i,
                "label": label,
                "state": "finished",
                "levels": {"rois": level, "batch": str(batch), "seed": str(s)},
                "overrides": {"rois": rois},
            }
        )
        curve = loss + 0.3 * np.exp(-np.arange(12) / 2)
        logs = home / "train_logs" / "made" / label / "one" / "low_level"
        logs.mkdir(parents=True)
        history = pd.DataFrame(
            {
                "epoch": range(12),
                "train/loss": curve - 0.02 * np.arange(12),
                "val/loss": curve,
                "seconds": 2.5,
                "memory": 1 + 0.1 * i,
            }
        )
        history.to_csv(logs / "history.csv", index=False)
        save_checkpoint(
            logs / "last.safetensors", {"w": torch.zeros(3, batch), "b": torch.zeros(3)}, {}
        )
        folder, value = home / "results" / "made" / label, 0.9 - loss
        folder.mkdir(parents=True)
        floors = {
            "shuffled": {"value": 0.21, "low": 0.2, "high": 0.22},
            "mean_image": {"value": 0.15, "low": 0.1, "high": 0.2},
        }
        record = {
            "value": value,
            "better": "higher",
            "n": 4,
            "protocol": "p",
            "test_set": test_set if i else "t",
            "floors": floors,
            "ceiling": {"value": 0.95},
        }
        scores = [
            {"metric": m, "row": "system", "image": k, "value": value, "stage": "06"}
            for m in ("pixcorr", "CLIP-cosine")
            for k in range(4)
        ]
        pd.DataFrame(scores).to_parquet(folder / "scores.parquet")
        utils.write_json(folder / ".stages" / "00_prepare_data.json", {"seconds": 99.0})
        for stage, seconds in (("02_train", 31.0), ("06_metrics", 4.0)):
            utils.write_json(folder / ".stages" / f"{stage}.json", {"seconds": seconds + i})
        utils.write_json(
            folder / "metrics.json",
            {
                "metrics": [record | {"name": m} for m in ("pixcorr", "CLIP-cosine")],
                "provenance": {},
            },
        )
    ledger = {
        "sweep": "made",
        "recipe": "tiny",
        "fixed": {},
        "factors": ["rois", "batch", "seed"],
        "removed": [],
        "points": points,
    }
    utils.write_json(home / "results" / "made" / "points.json", ledger)
    return ledger


def notebook(home, *flags):
    command = [
        sys.executable,
        str(ROOT / "notebooks" / "07_sweep.py"),
        "--model_name",
        "made",
        *flags,
    ]
    env = os.environ | {"PERCEPT_HOME": str(home), "MPLBACKEND": "agg"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow(reason="executes notebook 07")
def test_the_notebook_names_the_winner_on_validation_images(tmp_path):
    ledger = made_up(tmp_path, EARLY)
    ledger["points"][0]["state"] = "missing"
    utils.write_json(tmp_path / "results" / "made" / "points.json", ledger)
    done = notebook(tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"early is best in validation loss, by \.00\d+ over all, the next .* paired by batch and"
        r" seed; .* \(sd\): more than seed noise",
        done.stdout,
    )
    assert "35 of 36 points" in done.stdout and "3 runs without a pair" in done.stdout
    levels = pd.read_csv(tmp_path / "results/made/levels.csv").set_index(["score", "rois"])
    points = pd.read_csv(tmp_path / "results/made/sweep.csv")
    paired = points[~((points["batch"] == 16) & (points["seed"] == 0))]
    expected = paired[paired["rois"] == "early"].groupby("seed")["val/loss"].mean().mean()
    assert levels.loc[("val/loss", "early"), "value"] == pytest.approx(expected) and levels.loc[
        ("pixcorr, test", "V1"), "shuffled"
    ] == pytest.approx(0.21)
    assert {p.name for p in (tmp_path / "results/made/figures").iterdir()} == {
        "curves.png",
        "look.png",
    }
    assert (
        len(points) == 36 and points["pixcorr"].isna().sum() == 1 and "pixcorr, ceiling" in points
    )
    costs = pd.read_csv(tmp_path / "results/made/costs.csv")
    assert (
        list(costs)[:7] == ["label", "rois", "batch", "seed", "val/loss", "pixcorr", "CLIP-cosine"]
        and len(costs) == 35
    )
    last = costs.iloc[-1]
    assert last[
        ["weights", "memory", "training", "02_train", "06_metrics", "all stages"]
    ].tolist() == pytest.approx([3 * 64 + 3, 4.5, 30, 66, 39, 105])
    assert "pixcorr: shuffled 0.210, mean image 0.150, ceiling 0.950" in done.stdout


def test_the_factor_is_what_varies_beside_the_seed():
    assert sweeps.choose_factor(["rois", "seed"]) == ("rois", "seed")
    assert sweeps.choose_factor(["seed", "rois"], factor="seed") == ("seed", "")
    assert sweeps.choose_factor(["rois"]) == ("rois", "")
    assert sweeps.choose_factor(["seed"]) == sweeps.choose_factor(["seed"], "seed") == ("seed", "")
    assert sweeps.choose_factor(["seed", "bag_seeds"]) == ("bag_seeds", "seed")
    with pytest.raises(PerceptError, match="does not vary 'depth': choose among rois, seed"):
        sweeps.choose_factor(["rois", "seed"], "depth")


def test_seeds_alone_have_a_spread_and_no_winner():
    text = sweeps.describe_seeds([0.5, 0.6, 0.7], "loss")
    assert text.startswith("loss is .60 over 3 seeds [.35, .85]; they differ by .10 (sd)")
    assert "one seed does not tell" in sweeps.describe_seeds([0.5], "loss")


@pytest.mark.slow(reason="executes notebook 07")
def test_a_sweep_of_seeds_alone_is_reported(tmp_path):
    ledger = made_up(tmp_path, {"V1": (0.5, "V1")}, batches=(16,))
    ledger["factors"] = ["seed"]
    for point in ledger["points"]:
        point["levels"] = {"seed": point["levels"]["seed"]}
    utils.write_json(tmp_path / "results" / "made" / "points.json", ledger)
    done = notebook(tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"validation loss is \.\d+ over 3 seeds .* no seed is better", done.stdout)
    assert (tmp_path / "results/made/figures/look.png").exists()
    assert len(pd.read_csv(tmp_path / "results/made/sweep.csv")) == 3


@pytest.mark.slow(reason="executes a notebook")
def test_other_sessions_have_other_validation_images_and_name_no_winner(tmp_path):
    ledger = made_up(
        tmp_path, {"1": (0.7, ""), "5": (0.6, ""), "all": (0.5, "")}, batches=(16,), seeds=(0, 1)
    )
    for point in ledger["points"]:
        epochs = {"1": "90", "5": "60", "all": "48"}[
            point["levels"]["rois"]
        ]  # goes with the sessions, and pairs nothing
        point["levels"] = {
            "num_sessions": point["levels"]["rois"],
            "num_epochs": epochs,
            "seed": point["levels"]["seed"],
        }
        point["overrides"] = {"num_sessions": 0}
    utils.write_json(
        tmp_path / "results" / "made" / "points.json",
        ledger | {"factors": ["num_sessions", "num_epochs", "seed"]},
    )
    done = notebook(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "No level is named the best: with another num_sessions the validation images are others"
        in done.stdout
        and "is best in" not in done.stdout
    )
    assert (
        "in pairs of equal seed" in done.stdout
        and (tmp_path / "results/made/figures/look.png").exists()
    )
    levels = pd.read_csv(tmp_path / "results/made/levels.csv").set_index(["score", "num_sessions"])
    assert levels.loc[("pixcorr, test", "5"), ["value", "seeds"]].tolist() == pytest.approx(
        [0.3, 2], abs=0.02
    )


def test_costs_of_points_that_trained_nothing(tmp_path):
    utils.write_json(tmp_path / "results" / "a" / ".stages" / "01_fit.json", {"seconds": 3.25})
    table = sweeps.read_costs(tmp_path / "results", tmp_path / "logs", ["a"])
    assert table.to_dict("records") == [{"label": "a", "01_fit": 3.25, "all stages": 3.2}] and list(
        sweeps.read_costs(tmp_path, tmp_path, [])
    ) == ["label"]


@pytest.mark.slow(reason="executes notebook 07")
def test_the_notebook_draws_regions_and_refuses_what_does_not_belong_together(tmp_path):
    made_up(tmp_path / "regions", ALONE, batches=(16,), seeds=(0, 1))
    assert (
        notebook(tmp_path / "regions").returncode == 0
        and (tmp_path / "regions/results/made/figures/regions.png").exists()
    )
    made_up(
        tmp_path / "mixed",
        {"V1": (0.6, "V1"), "V2": (0.6, "V2")},
        batches=(16,),
        seeds=(0,),
        test_set="other",
    )
    refused = notebook(tmp_path / "mixed")
    assert refused.returncode and "error:" in refused.stderr and "test" in refused.stderr
    unknown = notebook(tmp_path / "regions", "--factor", "rate")
    assert "does not vary 'rate'" in unknown.stderr


def test_nothing_to_draw_is_said():
    for draw in (figures.plot_sweep_levels, figures.plot_region_curves):
        with pytest.raises(PerceptError, match="to draw"):
            draw(*([pd.DataFrame()] if draw is figures.plot_region_curves else [[], "x"]))
    with pytest.raises(PerceptError, match="to draw"):
        figures.plot_sweep_curves(pd.DataFrame({"epoch": [1]}), "x")
