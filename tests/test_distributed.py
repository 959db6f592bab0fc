"""Two processes with the same global batch do what one does."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch

from src.utils import PerceptError

pytestmark = pytest.mark.slow(reason="starts several training processes for each case")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return launched(tmp_path_factory.mktemp("two"), launch, "plain")


def launched(folder, launch, what, **variables):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | variables
    command = [
        sys.executable,
        "-m",
        *launch,
        str(ROOT / "tests" / "distributed_worker.py"),
        str(folder),
        what,
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
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
            assert np.allclose(values, two[rank][name]["history"][column], rtol=1e-5, atol=1e-6), (
                column
            )


def test_the_step_of_notebook_01_gives_the_same_losses(two, tmp_path):
    """MixCo over the whole batch, SoftCLIP with gathered negatives, the prior's noise from seeds:
    20 steps in double precision, without dropout.
    """
    alone = worker.mind_eye(tmp_path, torch.float64)
    together = np.mean([two[rank]["mind_eye"]["losses"] for rank in (0, 1)], axis=0)
    assert len(together) == 20 and np.abs(together - alone["losses"]).max() < 1e-8
    assert largest_difference(alone["weights"], two[0]["mind_eye"]["weights"]) < 1e-8
    assert max(alone["losses"]) > min(alone["losses"]) + 0.1


def test_without_gather_they_would_not_agree(one, two):
    assert largest_difference(one["local"]["gradients"], two[0]["local"]["gradients"]) > 1e-3


def test_a_part_is_trained_when_its_epoch_comes_and_unused_ones_never(two):
    start, end = worker.Model(0).state_dict(), two[0]["mean"]["weights"]
    assert not torch.equal(start["late.weight"], end["late.weight"]) and torch.equal(
        start["never.weight"], end["never.weight"]
    )


def test_learning_rate_and_steps_are_not_scaled(one, two):
    history = two[0]["mean"]["history"]
    assert (
        history["train/num_steps"] == [2, 4]
        and history["train/lr"] == one["mean"]["history"]["train/lr"]
    )
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
        assert (
            largest_difference(two[rank]["resumed"]["weights"], two[rank]["noisy"]["weights"]) == 0
        )
        assert two[rank]["resumed"]["history"] == two[rank]["noisy"]["history"]


def test_what_cannot_be_shared_is_refused(two):
    assert "cannot be split over 2 processes: choose a multiple of 2" in two[1]["refusals"]["odd"]
    assert "Batch norms" in two[0]["refusals"]["norm"]


# --------------------------------------------------------------------------------------- DeepSpeed
@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """What two processes of launch/deepspeed_zero2_offload.yaml found, on the CPU."""
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed here (the optional packages 'scale')")
    folder = tmp_path_factory.mktemp("zero")
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        "launch/deepspeed_zero2_offload.yaml",
        "--num_processes",
        "2",
    ]
    return folder, launched(folder, launch, "zero", DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def without(zero, tmp_path_factory):
    """The same without DeepSpeed, in one process."""
    return worker.cases(tmp_path_factory.mktemp("without"), worker.with_zeros)


@pytest.mark.parametrize("case", worker.CASES)
def test_deepspeed_does_what_is_done_without(zero, without, case):
    tolerance = 1e-3 if case == "bf16" else 1e-5
    for results in zero[1]:
        assert largest_difference(without[case]["weights"], results[case]["weights"]) < tolerance
        assert all(w.dtype == torch.float32 for w in results[case]["weights"].values())
        for column, values in without[case]["history"].items():
            assert np.allclose(
                values,
                results[case]["history"][column],
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
            ), column


def test_with_deepspeed_the_step_of_notebook_01_gives_the_same_losses(zero, without):
    together = np.mean([results["mind_eye"]["losses"] for results in zero[1]], axis=0)
    assert np.allclose(together, without["mind_eye"]["losses"], rtol=1e-5)
    assert (
        largest_difference(without["mind_eye"]["weights"], zero[1][0]["mind_eye"]["weights"]) < 1e-5
    )


def test_deepspeed_skips_what_is_not_finite_and_goes_back(zero):
    for results in zero[1]:
        assert (
            results["inf"]["history"]["skipped"]
            == results["bad gradient"]["history"]["skipped"]
            == [1, 0]
        )
        assert sum(results["often bad"]["history"]["skipped"]) == worker.PATIENCE
    assert all(
        largest_difference(zero[1][0][case]["weights"], zero[1][1][case]["weights"]) == 0
        for case in worker.CASES
    )


def test_resuming_with_deepspeed_is_exact_and_leaves_no_pieces(zero):
    folder, processes = zero
    for results in processes:
        assert results["interrupted after"] == 2
        assert largest_difference(results["resumed"]["weights"], results["noisy"]["weights"]) == 0
        assert results["resumed"]["history"] == results["noisy"]["history"]
    assert sorted(path.name for path in (folder / "copy" / "noisy").glob("state*")) == [
        "state-2-0.pt",
        "state-2-1.pt",
        "state.pt",
    ]
    assert [path.name for path in (folder / "interrupted" / "noisy").glob("state*")] == ["state.pt"]


def test_what_deepspeed_began_is_not_resumed_without_but_begun_anew(zero, tmp_path):
    shutil.copytree(zero[0] / "copy", tmp_path / "run")
    with pytest.raises(
        PerceptError,
        match=(
            "was saved by 2 processes under DeepSpeed and cannot be resumed without DeepSpeed:"
            " launch as before"
        ),
    ):
        worker.train(tmp_path / "run", "noisy")
    worker.train(tmp_path / "run", "noisy", resume=False)
    assert [path.name for path in (tmp_path / "run" / "noisy").glob("state*")] == ["state.pt"]


def test_what_a_finished_run_with_deepspeed_has_is_there_without(zero, tmp_path):
    shutil.copytree(zero[0] / "noisy", tmp_path / "noisy")
    assert (
        largest_difference(
            worker.train(tmp_path, "noisy", seed=3)["weights"], zero[1][0]["noisy"]["weights"]
        )
        == 0
    )


def test_what_does_not_go_together_with_deepspeed_is_refused(zero):
    for results in zero[1]:
        assert (
            "DeepSpeed does not go together with step_in_backward"
            in results["refusals"]["step_in_backward"]
        )
        assert (
            "ZeRO stage 3 is not supported: choose stage 1 or 2" in results["refusals"]["stage 3"]
        )
