"""Two processes with the same global batch do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*launch, str(ROOT / "tests" / "distributed_worker.py"), str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {name: worker.train(folder, name) for name in ("mean", "contrastive", "local")}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("name", ["mean", "contrastive"])
def test_losses_gradients_and_weights_agree(one, two, name):
    for rank in (0, 1):
        assert largest_difference(one[name]["gradients"], two[rank][name]["gradients"]) < 1e-6
        assert largest_difference(one[name]["weights"], two[rank][name]["weights"]) < 1e-5
        for column, values in one[name]["history"].items():
            assert np.allclose(values, two[rank][name]["history"][column], rtol=1e-5, atol=1e-6), column


def test_the_step_of_notebook_01_gives_the_same_losses(two, tmp_path):
    """MixCo over the whole batch, SoftCLIP with gathered negatives, the prior's noise from seeds: 20 steps in double precision, without dropout."""
    alone = worker.mind_eye(tmp_path, torch.float64)
    together = np.mean([two[rank]["mind_eye"]["losses"] for rank in (0, 1)], axis=0)
    assert len(together) == 20 and np.abs(together - alone["losses"]).max() < 1e-8
    assert largest_difference(alone["weights"], two[0]["mind_eye"]["weights"]) < 1e-8
    assert max(alone["losses"]) > min(alone["losses"]) + 0.1


def test_without_gather_they_would_not_agree(one, two):
    assert largest_difference(one["local"]["gradients"], two[0]["local"]["gradients"]) > 1e-3


def test_a_part_is_trained_when_its_epoch_comes_and_unused_ones_never(two):
    start, end = worker.Model(0).state_dict(), two[0]["mean"]["weights"]
    assert not torch.equal(start["late.weight"], end["late.weight"]) and torch.equal(start["never.weight"], end["never.weight"])


def test_learning_rate_and_steps_are_not_scaled(one, two):
    history = two[0]["mean"]["history"]
    assert history["train/num_steps"] == [2, 4] and history["train/lr"] == one["mean"]["history"]["train/lr"]
    assert two[0]["contrastive"]["history"]["train/rows"] == [worker.BATCH] * worker.EPOCHS


def test_processes_have_noise_of_their_own_and_the_same_weights(two):
    noise = two[0]["noisy"]["history"]["train/noise"]
    assert noise == two[1]["noisy"]["history"]["train/noise"]  # the mean over both
    assert largest_difference(two[0]["noisy"]["weights"], two[1]["noisy"]["weights"]) == 0
    torch.manual_seed(42)
    first = torch.randn(worker.BATCH // 2, 5)
    assert abs(noise[0] - float(first.mean())) > 1e-3


def test_a_non_finite_loss_in_one_process_skips_the_step_in_both(two):
    for rank in (0, 1):
        assert two[rank]["inf"]["history"]["skipped"] == [1, 0]
    assert largest_difference(two[0]["inf"]["weights"], two[1]["inf"]["weights"]) == 0


def test_ctrl_c_in_one_process_stops_both_and_resuming_is_exact(two):
    for rank in (0, 1):
        assert two[rank]["interrupted after"] == 2
        assert largest_difference(two[rank]["resumed"]["weights"], two[rank]["noisy"]["weights"]) == 0
        assert two[rank]["resumed"]["history"] == two[rank]["noisy"]["history"]


def test_what_cannot_be_shared_is_refused(two):
    assert "cannot be split over 2 processes: choose a multiple of 2" in two[1]["refusals"]["odd"]
    assert "Batch norms" in two[0]["refusals"]["norm"]
