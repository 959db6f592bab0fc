"""The stages for real: data that change under a run, and calls that are refused."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src import miniworld
from src.miniworld.formats import WRITERS, SourceData

pytestmark = pytest.mark.slow(reason="runs whole notebooks in processes of their own")

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"num_epochs": "1", "batch_size": "16", "h": "32", "decoder": "network"}


def launch(home: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")}
    environment |= {"PERCEPT_HOME": str(home), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def hash_files(*paths: Path) -> dict[str, str]:
    files = [path for path in paths if path.is_file()]
    files += [file for path in paths if path.is_dir() for file in path.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_one_session_of_mindeye2_is_not_taken_for_mindeyes_shards(tmp_path):
    world = miniworld.simulate(1, 60, trials_per_session=60)
    WRITERS["mindeye2"](tmp_path / "source", 1, SourceData.from_world(world))
    source = ("--source", "mindeye2", "--data_path", str(tmp_path / "source"))
    prepare = ("notebooks/00_prepare_data.py", "--dataset", "nsd", *source)
    done = launch(tmp_path, *prepare, "--options", "{sessions: 1}")
    assert done.returncode == 0, done.stderr
    before = hash_files(tmp_path / "data" / "nsd")
    finished = launch(tmp_path, "run.py", "mindeye", "--to", "00")
    assert finished.returncode == 1, finished.stdout
    for text in ("read by mindeye2", "read by mindeye is asked for", "-p overwrite True"):
        assert text in finished.stderr, finished.stderr
    assert not list((tmp_path / "results" / "mindeye-subj01").glob(".stages/*.json"))
    assert not list(tmp_path.glob("results/*/parameters/00_*"))[1:]  # of the first call alone
    more_sessions = launch(tmp_path, *prepare)
    assert "sessions=1, and sessions='its default' is asked for" in more_sessions.stderr
    assert hash_files(tmp_path / "data" / "nsd") == before


def write_npz(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    np.savez(
        path,
        betas=rng.standard_normal((160, 40)).astype(np.float32),
        images=np.random.default_rng(9).integers(0, 256, (80, 32, 32, 3), np.uint8),
        image_index=np.repeat(np.arange(80), 2),
        session=np.tile(np.arange(4), 40),
    )


def train(home: Path, name: str, **more: str) -> subprocess.CompletedProcess:
    values = {"source": "npz", "data_path": str(home / name), "dataset": "mine"} | SMALL | more
    flags = [text for pair in values.items() for text in ("-p", *pair)]
    recipe = ("mindeye", "--mini", "--to", "01", "--without", "02")
    return launch(home, "run.py", *recipe, *flags, "-p", "model_name", "mine")


def test_a_run_whose_data_change_is_refused_as_it_was_or_trained_anew(tmp_path):
    logs, records = tmp_path / "train_logs" / "mine", tmp_path / "results" / "mine" / "parameters"
    write_npz(tmp_path / "my.npz", seed=0)
    done = train(tmp_path, "my.npz")
    assert done.returncode == 0, done.stderr
    weights = logs / "high_level" / "last.safetensors"
    first = hash_files(weights)
    before = hash_files(logs, records)

    # other settings of a finished run
    flags = [text for name, value in SMALL.items() for text in (f"--{name}", value)]
    stage = ("notebooks/01_train_high_level.py", "--recipe", "mindeye/mini", *flags)
    refused = launch(
        tmp_path, *stage, "--dataset", "mine", "--model_name", "mine", "--num_sessions", "2"
    )
    assert refused.returncode == 1 and "num_sessions" in refused.stderr
    assert hash_files(logs, records) == before

    # another file under the same name: refused, and with overwrite prepared, but not trained on
    write_npz(tmp_path / "my.npz", seed=1)
    changed = train(tmp_path, "my.npz")
    assert changed.returncode == 1 and "has other files now: my.npz" in changed.stderr
    assert hash_files(logs, records) == before
    prepared = train(tmp_path, "my.npz", overwrite="True")
    assert prepared.returncode == 1 and "trained on other data" in prepared.stderr
    assert hash_files(logs) == {k: v for k, v in before.items() if k.startswith(str(logs))}
    anew = train(tmp_path, "my.npz", overwrite="True", resume_from_ckpt="False")
    assert anew.returncode == 0, anew.stderr
    assert hash_files(weights) != first
