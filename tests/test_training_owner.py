"""Two trainings never write into one folder; what killed ones leave goes."""

import os
import signal
import subprocess
import time

import pytest
import torch
from torch import nn

from src.files import ownership
from src.training import Batching, Checkpointing, Execution, Optimisation, fit
from src.utils import PerceptError, read_json


class Samples:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def set_epoch(self, epoch):
        pass

    def __getitems__(self, rows):
        return {"x": self.x[rows]}


def train(folder, step=None, seed=0, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    plain = lambda model, batch, epoch: (model(batch["x"]).square().mean(), {})  # noqa: E731
    checkpointing = Checkpointing(save_steps=2, **options)
    return fit(
        model,
        step or plain,
        Samples(),
        folder=folder,
        config={},
        batching=Batching(2, 8, seed=seed),
        optimisation=Optimisation(1e-2),
        execution=Execution("cpu"),
        checkpointing=checkpointing,
        validate=lambda model: {"val/loss": float(model(Samples.x).square().mean())},
    )


def list_files(folder):
    return sorted(path.name for path in folder.iterdir())


WRITTEN = ["best.safetensors", "history.csv", "last.safetensors", "state.pt"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_training_of_a_folder_is_refused_and_changes_nothing(
    tmp_path, monkeypatch, resume
):
    monkeypatch.setattr(ownership, "GRACE_SECONDS", 0.1)
    folder, refusals = tmp_path / "high_level", []
    read, write = os.pipe()

    def step(model, batch, epoch):
        if not refusals:
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            child = os.fork()
            if not child:
                try:
                    train(folder, seed=1, resume=resume)
                except PerceptError as error:
                    os.write(write, str(error).encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            refusals.append(os.read(read, 4096).decode())
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        return model(batch["x"]).square().mean(), {}

    assert len(train(folder, step)) == 2
    assert f"is being written by process {os.getpid()} on " in refusals[0]
    assert list_files(folder) == WRITTEN


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_training_goes_on_after_a_kill_and_leaves_nothing_behind(tmp_path, monkeypatch, writer):
    """A second later, as the system has freed the folder."""
    import safetensors.torch

    module, name = (torch, "save") if writer == "torch" else (safetensors.torch, "save_file")
    real = getattr(module, name)

    def write_and_die(*args, **options):
        real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        child = os.fork()
        if not child:
            setattr(module, name, write_and_die)
            train(tmp_path / "run")
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (tmp_path / "run" / ".tmpAb12xY").write_text("of safetensors, killed within its own write")
    assert any(name.endswith(".tmp") for name in list_files(tmp_path / "run"))
    train(tmp_path / "run")
    assert list_files(tmp_path / "run") == WRITTEN


def test_a_finished_training_is_read_where_nothing_can_be_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        history = train(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert train(disk / "run").equals(history)
        with pytest.raises(PerceptError, match=r"could not be written: .* read-only"):
            train(disk / "other", step=lambda *_: pytest.fail("it has begun"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_the_owner_is_named_while_it_trains(tmp_path):
    owners = []

    def step(model, batch, epoch):
        owners.append(read_json(tmp_path / "run" / ownership.LOCK_NAME))
        return model(batch["x"]).square().mean(), {}

    train(tmp_path / "run", step)
    assert owners[0]["process"] == os.getpid() and owners[0]["purpose"] == "training run"
    assert (
        abs(time.mktime(time.strptime(owners[0]["since"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    )
