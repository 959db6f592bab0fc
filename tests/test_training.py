"""The training loop: learning, order, schedules, exact resuming, non-finite steps, checkpoints."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from training_options import group_options

from src import parameters, training, utils
from src.files.ownership import LOCK_NAME
from src.training import processes
from src.training.batches import draw_epoch_order, evaluate, iterate_batches
from src.training.loop import fit, load_best
from src.training.optim import DECAYS, SCHEDULERS, group_parameters
from src.training.processes import gather
from src.utils import PerceptError, load_checkpoint, peak_memory

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, BATCH, EPOCHS = 26, 4, 3  # six steps an epoch, two samples left over
STEPS = SAMPLES // BATCH


class Data:
    """Noisy lines; the noise is a pure function of (epoch, index)."""

    def __init__(self, samples: int = SAMPLES):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 5, generator=generator)
        self.y = self.x @ torch.randn(5, 3, generator=generator)
        self.epoch, self.seen = 0, []

    def __len__(self):
        return len(self.x)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitems__(self, indices):
        self.seen.append((self.epoch, list(indices)))
        noise = torch.stack(
            [
                torch.randn(5, generator=torch.Generator().manual_seed(1000 * self.epoch + i))
                for i in indices
            ]
        )
        return {
            "voxels": self.x[indices] + 0.1 * noise,
            "target": self.y[indices],
            "image": torch.tensor(indices),
        }


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def step(model, batch, epoch):
    """Draws from every generator."""
    shift = random.random() + np.random.rand() + torch.rand(())
    loss = (model(batch["voxels"] + 0.01 * shift) - batch["target"]).square().mean()
    return loss, {"shift": shift, "train/twice": 2 * loss.item()}


def plain_step(model, batch, epoch):
    return (model(batch["voxels"]) - batch["target"]).square().mean(), {}


def validate(model):
    data, device = Data(), next(model.parameters()).device
    error = (model(data.x.to(device)) - data.y.to(device)).square().mean()
    return {"val/loss": error.item() + 0.01 * torch.rand(()).item()}


def train(folder, model=None, do=step, data=None, config=None, **other):
    model = network() if model is None else model
    arguments = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "max_lr": 1e-2,
        "validate": validate,
        "device": "cpu",
    } | other
    history = fit(
        model,
        do,
        data or Data(),
        folder=folder,
        config=config or {"model": {"name": "tiny", "kwargs": {"h": 16}}},
        **group_options(**arguments),
    )
    return model, history


def same(a, b) -> bool:
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_time(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns=["seconds", "memory"])


def call_at(count: int, action, do=step):
    """A step that does something before its call number `count`, counted from 0."""
    calls = []

    def wrapped(model, batch, epoch):
        calls.append(1)
        if len(calls) == count + 1:
            action()
        return do(model, batch, epoch)

    wrapped.calls = calls
    return wrapped


# ---------------------------------------------------------------------------------------- learning
def test_history_and_files(tmp_path):
    model, history = train(tmp_path, epochs=20)
    assert history["memory"].is_monotonic_increasing and history["memory"].iloc[
        -1
    ] * 1e9 == pytest.approx(peak_memory("cpu"), rel=0.05)
    assert list(history["epoch"]) == list(range(20)) and list(history["train/num_steps"]) == [
        STEPS * (e + 1) for e in range(20)
    ]
    assert history["train/loss"].iloc[-1] < 0.3 * history["train/loss"].iloc[0]
    assert (
        np.allclose(history["train/twice"], 2 * history["train/loss"])
        and (history["skipped"] == 0).all()
    )
    assert history["train/shift"].between(0, 3).all() and not model.training
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history, check_exact=False)
    state, config = load_checkpoint(tmp_path / "last.safetensors")
    assert (
        same(model, state)
        and config["model"] == {"name": "tiny", "kwargs": {"h": 16}}
        and config["epoch"] == 19
    )
    assert (
        load_checkpoint(tmp_path / "best.safetensors")[1]["epoch"] == history["val/loss"].idxmin()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "history.csv",
        "last.safetensors",
        "state.pt",
    ]


def test_equals_a_bare_loop(tmp_path):
    model, history = train(
        tmp_path, do=plain_step, model=network().eval(), validate=None, decay="published"
    )
    torch.manual_seed(42)
    bare, data = network(), Data()
    torch.manual_seed(42)
    groups = [
        [p for n, p in bare.named_parameters() if ("bias" in n) == has] for has in (False, True)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 1e-2}, {"params": groups[1], "weight_decay": 0}],
        lr=1e-2,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=EPOCHS * STEPS, pct_start=0.5, final_div_factor=1000
    )
    losses = []
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        order = np.random.default_rng([42, epoch]).permutation(SAMPLES)
        for i in range(STEPS):
            loss, _ = plain_step(
                bare, data.__getitems__(order[i * BATCH : (i + 1) * BATCH].tolist()), epoch
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert same(model, bare)
    assert np.allclose(
        history["train/loss"], np.reshape(losses, (EPOCHS, STEPS)).mean(1), rtol=1e-12
    )


def test_each_epoch_shows_each_sample_at_most_once_in_an_order_of_its_own(tmp_path):
    data = Data()
    train(tmp_path, data=data, validate=None)
    image_ids = {
        epoch: [i for e, batch in data.seen if e == epoch for i in batch] for epoch in range(EPOCHS)
    }
    assert all(len(set(ids)) == len(ids) == STEPS * BATCH for ids in image_ids.values())
    assert (
        image_ids[0] != image_ids[1]
        and image_ids[0] == draw_epoch_order(SAMPLES, 42, 0)[: STEPS * BATCH].tolist()
    )
    assert sorted(draw_epoch_order(100, 1, 2)) == list(range(100))
    assert not np.array_equal(draw_epoch_order(100, 1, 2), draw_epoch_order(100, 2, 2))


def test_workers_change_nothing(tmp_path):
    assert same(
        train(tmp_path / "a", epochs=1)[0], train(tmp_path / "b", epochs=1, num_workers=1)[0]
    )


def test_bf16_trains_in_the_same_process_as_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "has_fast_bf16", lambda: True)
    seen = []

    def look(model, batch, epoch):
        seen.append(model[0](batch["voxels"]).dtype)
        return step(model, batch, epoch)

    _, half = train(tmp_path / "half", do=look, precision="bf16")
    _, full = train(tmp_path / "full", do=look)
    assert set(seen[: len(seen) // 2]) == {torch.bfloat16} and set(seen[len(seen) // 2 :]) == {
        torch.float32
    }
    assert np.allclose(half["train/loss"], full["train/loss"], rtol=0.1)


def test_a_cpu_without_bf16_trains_in_single_precision_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(processes, "has_fast_bf16", lambda: False)
    _, half = train(tmp_path / "half", precision="bf16")
    assert "This CPU has no bf16 of its own" in caplog.text
    _, full = train(tmp_path / "full")
    assert half["train/loss"].tolist() == full["train/loss"].tolist()


def test_clipping_bounds_the_gradient(tmp_path):
    norms = []

    class Watched(nn.Linear):
        pass

    model = Watched(5, 3)
    before = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        norms.append(
            torch.nn.utils.get_total_norm(
                [p.grad for g in self.param_groups for p in g["params"]]
            ).item()
        )
        return before(self, *args, **kwargs)

    torch.optim.AdamW.step = watch
    try:
        train(tmp_path, model=model, do=plain_step, clip_grad=0.1, validate=None)
    finally:
        torch.optim.AdamW.step = before
    assert len(norms) == EPOCHS * STEPS and max(norms) == pytest.approx(0.1, rel=1e-3)


# ----------------------------------------------------------------------------- optimizer, schedule
def rates(name: str, epochs: int, steps: int, max_lr: float = 3e-4):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=max_lr)
    scheduler, results = SCHEDULERS[name](optimizer, max_lr, epochs, steps), []
    for _ in range(epochs * steps):
        results.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        if len(results) < epochs * steps:
            scheduler.step()
    return np.array(results)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 3), (3, 1), (10, 7)])
def test_schedules_cover_a_run_and_stay_below_the_peak(name, epochs, steps):
    results = rates(name, epochs, steps)[:, 0]
    assert np.isfinite(results).all() and (results > 0).all() and results.max() <= 3e-4 * (1 + 1e-9)


def test_cycle_is_the_published_one():
    epochs, steps, peak = 12, 10, 3e-4
    total, top = epochs * steps, 2 * steps - 1  # warm-up of two epochs
    at = np.arange(total)
    up, down = np.cos(np.pi * at / top), np.cos(np.pi * (at - top) / (total - 1 - top))
    start, end = peak / 25, peak / 25 / 1000
    expected = np.where(
        at <= top, peak + (start - peak) * (1 + up) / 2, end + (peak - end) * (1 + down) / 2
    )
    results = rates("cycle", epochs, steps, peak)
    assert np.allclose(results[:, 0], expected, rtol=1e-6)
    assert (
        results[0, 1] == pytest.approx(0.95)
        and results[top, 1] == pytest.approx(0.85)
        and results[-1, 1] == pytest.approx(0.95)
    )


def test_linear_and_fixed():
    results = rates("linear", 4, 5)[:, 0]
    assert (
        np.allclose(results, 3e-4 * (1 / 3 + 2 / 3 * np.arange(20) / 20))
        and (rates("fixed", 4, 5)[:, 0] == 3e-4).all()
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_weight_decay_spares_biases_and_norms(decay):
    class GainNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict(
        {
            "lin": nn.Linear(4, 4),
            "norms": nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), GainNorm()),
            "frozen": nn.Linear(4, 4),
        }
    )
    model["relative_attention_bias"] = nn.Embedding(3, 2)
    model["null"] = nn.ParameterList([torch.zeros(4)])
    model["frozen"].requires_grad_(False)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = (
        {name_of[id(p)] for p in group["params"]} for group in group_parameters(model, 0.3, decay)
    )
    gains = {"norms.0.weight", "norms.1.weight", "norms.2.g"}
    assert decayed == {"lin.weight", "null.0"} | (gains if decay == "published" else set())
    assert spared == {
        "lin.bias",
        "norms.0.bias",
        "norms.1.bias",
        "relative_attention_bias.weight",
    } | (set() if decay == "published" else gains)
    assert [g["weight_decay"] for g in group_parameters(model, 0.3, decay)] == [0.3, 0.0]


# ---------------------------------------------------------------------------------------- resuming
KILLED = """
    import os, signal, torch
    torch.set_num_threads(1)
    from test_training import call_at, train
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    train({folder!r}, do=call_at({at}, kill), save_steps={every})
"""


def in_a_fresh_process(request) -> bool:
    """Run the asking test alone in a new interpreter, and say so; False in that one.

    Bits are compared between processes, and libraries that other tests load may have changed how
    this one rounds (numba lets denormals be flushed).
    """
    if os.environ.get("PERCEPT_FRESH") == "1":
        return False
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"{Path(__file__)}::{request.node.name}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PERCEPT_FRESH": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return True


@pytest.mark.slow(reason="trains, is killed and trains again in processes of its own")
@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, every, request):
    if in_a_fresh_process(request):
        return
    full, expected = train(tmp_path / "whole", save_steps=every)
    folder = tmp_path / "killed"
    done = 0
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for at in (8, 1):  # the second time early in what is left
        code = textwrap.dedent(KILLED.format(folder=str(folder), at=at, every=every))
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr
        position = torch.load(folder / "state.pt", weights_only=True)["position"]
        done = position["epoch"] * STEPS + position["step"]
        assert done == 8 + (every == 1 and at == 1)
    assert not list(folder.glob("*.tmp"))
    assert [path.name for path in folder.glob(".*")] == [LOCK_NAME]  # its owner is dead
    rest = call_at(-2, None)
    killed, history = train(folder, model=network(seed=9), do=rest, save_steps=every)
    assert len(rest.calls) == EPOCHS * STEPS - done
    assert same(full, killed)
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)
    for name in ("best", "last"):
        assert same(
            load_checkpoint(folder / f"{name}.safetensors")[0],
            load_checkpoint(tmp_path / "whole" / f"{name}.safetensors")[0],
        )


@pytest.mark.slow(reason="trains several times over")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.parametrize("at", [0, STEPS - 1, STEPS + 2, EPOCHS * STEPS - 1])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, number, error, at, caplog):
    handler = signal.getsignal(number)
    full, expected = train(tmp_path / "whole")
    with pytest.raises(error):
        train(tmp_path / "stopped", do=call_at(at, lambda: signal.raise_signal(number)))
    assert "the same call goes on" in caplog.text and signal.getsignal(number) == handler
    rest = call_at(-2, None)
    stopped, history = train(tmp_path / "stopped", model=network(seed=9), do=rest)
    assert len(rest.calls) == EPOCHS * STEPS - at - 1 and same(full, stopped)
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)


def test_an_interruption_while_validating_is_kept(tmp_path):
    full, _ = train(tmp_path / "whole")

    def interrupted(model):
        signal.raise_signal(signal.SIGINT)
        return validate(model)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", validate=interrupted)
    assert same(full, train(tmp_path / "stopped", model=network(9))[0])


def test_averaged_weights_are_what_a_training_gives(tmp_path):
    """The average over the steps by its formula, in the model, its checkpoints and validation."""
    decay, seen = 0.7, []

    def noting(model, batch, epoch):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return plain_step(model, batch, epoch)

    model, history = train(tmp_path / "mean", do=noting, weight_average=decay)
    plain, plain_history = train(tmp_path / "plain", do=plain_step)
    assert history["train/loss"].tolist() == plain_history["train/loss"].tolist()
    for name, last in plain.state_dict().items():
        average = seen[0][name]
        for weights in [*seen[1:], {name: last}]:
            average = decay * average + (1 - decay) * weights[name]
        torch.testing.assert_close(model.state_dict()[name], average)
    assert same(model, load_checkpoint(tmp_path / "mean" / "last.safetensors")[0])
    data = Data()
    error = (model(data.x) - data.y).square().mean().item()
    assert 0 < history["val/loss"].iloc[-1] - error < 0.01


def test_a_run_with_averaged_weights_resumes(tmp_path):
    full, _ = train(tmp_path / "whole", weight_average=0.9)
    with pytest.raises(KeyboardInterrupt):
        interrupt = call_at(STEPS + 2, lambda: signal.raise_signal(signal.SIGINT))
        train(tmp_path / "stopped", do=interrupt, weight_average=0.9)
    assert same(full, train(tmp_path / "stopped", network(9), weight_average=0.9)[0])
    assert same(full, train(tmp_path / "stopped", network(8), weight_average=0.9)[0])  # finished
    with pytest.raises(PerceptError, match="weight_average was 0.9"):
        train(tmp_path / "stopped", weight_average=0.8)
    with pytest.raises(PerceptError, match="choose a decay between 0 and 1"):
        train(tmp_path / "other", weight_average=1.5)


def test_a_cycle_warms_up_for_as_long_as_is_asked():
    optimizer, rates = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3), []
    scheduler = SCHEDULERS["cycle"](optimizer, 1e-3, 5, 20, 15)
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert np.argmax(rates) == 14 and rates[14] == pytest.approx(1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_schedule_resumes(tmp_path, scheduler):
    full, _ = train(tmp_path / "whole", scheduler=scheduler)
    with pytest.raises(RuntimeError, match="a crash"):
        train(
            tmp_path / "crashed",
            scheduler=scheduler,
            save_steps=3,
            do=call_at(10, lambda: (_ for _ in ()).throw(RuntimeError("a crash"))),
        )
    assert same(
        full, train(tmp_path / "crashed", model=network(9), scheduler=scheduler, save_steps=3)[0]
    )


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    model, history = train(tmp_path)
    stored = (tmp_path / "last.safetensors").stat().st_mtime_ns
    repeated, counted = network(9), call_at(-2, None)
    _, same_history = train(tmp_path, model=repeated, do=counted)
    assert (
        not counted.calls
        and same(model, repeated)
        and (tmp_path / "last.safetensors").stat().st_mtime_ns == stored
    )
    pd.testing.assert_frame_equal(history, same_history)
    assert (tmp_path / "state.pt").stat().st_size < 30_000  # no second copy of the weights
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(PerceptError, match="gone"):
        train(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path)
    config = {"model": {"name": "tiny", "kwargs": {"h": 17}}}
    with pytest.raises(
        PerceptError,
        match=r"model.kwargs.h was 16, now it is 17.*model_name.*resume_from_ckpt to False",
    ):
        train(tmp_path, config=config)
    for name, value in {
        "max_lr": 2e-2,
        "epochs": 9,
        "batch_size": 2,
        "seed": 1,
        "scheduler": "linear",
        "precision": "bf16",
    }.items():
        with pytest.raises(PerceptError, match=f"in which {name} was"):
            train(tmp_path, **{name: value})
    with pytest.raises(PerceptError, match="samples was 26, now it is 30"):
        train(tmp_path, data=Data(30))


def test_resume_false_begins_anew(tmp_path):
    train(tmp_path, epochs=2, max_lr=1e-3)
    with pytest.raises(
        RuntimeError, match="a crash"
    ):  # before anything is written: the old run must not be taken up again
        train(
            tmp_path,
            resume=False,
            do=call_at(0, lambda: (_ for _ in ()).throw(RuntimeError("a crash"))),
        )
    assert not list(tmp_path.iterdir())
    fresh, _ = train(tmp_path / "fresh")
    assert same(train(tmp_path)[0], fresh)


def test_a_damaged_state_is_refused_in_a_sentence(tmp_path):
    train(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"no zip")
    with pytest.raises(PerceptError, match="state.pt cannot be read"):
        train(tmp_path)


def test_another_network_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="a crash"):
        train(
            tmp_path,
            save_steps=1,
            do=call_at(5, lambda: (_ for _ in ()).throw(RuntimeError("a crash"))),
        )
    with pytest.raises(PerceptError, match="state.pt"):
        train(tmp_path, model=nn.Linear(5, 3), do=plain_step)


# -------------------------------------------------------------------------------- non-finite steps
def spoil(steps, what="nan", do=plain_step):
    """A step whose loss or gradient is not finite at the calls in `steps`."""
    calls = []

    def wrapped(model, batch, epoch):
        calls.append(1)
        loss, logs = do(model, batch, epoch)
        if len(calls) - 1 in steps:
            zero = sum(p.square().sum() for p in model.parameters()) * 0
            loss = (
                loss * math.nan
                if what == "nan"
                else loss + (zero.sqrt() if what == "gradient" else math.inf)
            )
        return loss, logs | {"one": 1.0}

    return wrapped


@pytest.mark.parametrize("what", ["nan", "gradient", "inf"])
def test_a_non_finite_step_is_skipped_and_counted(tmp_path, what):
    model, history = train(tmp_path, do=spoil({2, 3, STEPS + 1}, what))
    assert (
        list(history["skipped"]) == [2, 1, 0]
        and np.isfinite(history.drop(columns=["epoch"]).to_numpy()).all()
    )
    assert all(torch.isfinite(p).all() for p in model.parameters()) and list(
        history["train/one"]
    ) == [1, 1, 1]


def test_a_skipped_step_leaves_the_weights(tmp_path):
    start, states = {k: v.clone() for k, v in network().state_dict().items()}, []

    def watch(model, batch, epoch):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return plain_step(model, batch, epoch)

    _, history = train(tmp_path, do=spoil(set(range(STEPS)), do=watch))
    assert same(states[STEPS], start) and not same(states[STEPS + 1], start)
    assert history["skipped"][0] == STEPS and math.isnan(history["train/loss"][0])


def test_a_run_of_skipped_updates_does_not_end_as_finished(tmp_path):
    most = set(range(0, EPOCHS * STEPS)) - {epoch * STEPS for epoch in range(EPOCHS)}
    with pytest.raises(PerceptError, match=rf"{len(most)} of the {EPOCHS * STEPS} updates"):
        train(tmp_path, do=spoil(most))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["position"]["epoch"] == EPOCHS - 1
    assert len(pd.read_csv(tmp_path / "history.csv")) == EPOCHS - 1
    with pytest.raises(PerceptError, match="does not count as finished"):  # again, and no sooner
        train(tmp_path)


def test_many_in_a_row_go_back_and_on_with_other_batches(tmp_path, caplog):
    patience, states = training.PATIENCE, []

    def watch(model, batch, epoch):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return plain_step(model, batch, epoch)

    last_saved = 7  # steps 7.. are good and not saved, kept.. are bad
    model, history = train(
        tmp_path,
        do=spoil(set(range(10, 10 + patience)), do=watch),
        epochs=5,
        save_steps=last_saved,
        save_every=1e9,
    )
    assert "back to the last saved weights" in caplog.text and history["skipped"].sum() == patience
    assert same(states[10 + patience], states[last_saved]) and not same(
        states[10], states[last_saved]
    )
    assert len(states) == 5 * STEPS and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("save_steps", [0, 5])
def test_it_gives_up_in_a_sentence(tmp_path, save_steps):
    step_ = spoil(set(range(6, 10_000)))
    with pytest.raises(PerceptError, match="cannot be kept finite.*lower max_lr"):
        train(tmp_path, do=step_, epochs=100, save_steps=save_steps)


def test_spoiled_batch_norms_go_back(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    data, bad = Data(), draw_epoch_order(SAMPLES, 42, 1)[BATCH + 1]

    class Spoiled(Data):
        def __getitems__(self, indices):
            batch = data.__getitems__(indices)
            return (
                batch | {"voxels": batch["voxels"] * math.nan}
                if bad in indices and self.epoch == 1
                else batch
            )

    _, history = train(tmp_path, model=model, do=plain_step, data=Spoiled(), save_steps=1)
    assert list(history["skipped"]) == [0, 1, 0] and all(
        torch.isfinite(b).all() for b in model.buffers()
    )


# ------------------------------------------------------------------------- validation, checkpoints
def test_validation_takes_no_noise_from_training_and_has_the_same_each_time(tmp_path):
    noise = []

    def noisy(model):
        assert not model.training and not torch.is_grad_enabled()
        noise.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return {"val/loss": 1.0}

    assert same(train(tmp_path / "a", validate=noisy)[0], train(tmp_path / "b", validate=None)[0])
    assert (
        len(noise) == EPOCHS
        and len(set(noise)) == 1
        and not (tmp_path / "b" / "best.safetensors").exists()
    )


def test_the_best_epoch_is_that_of_the_monitor(tmp_path):
    values, states = iter([math.nan, 3.0, 1.0, 2.0]), []

    def scripted(model):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"val/other": next(values), "val/loss": 0.0}

    train(tmp_path, validate=scripted, epochs=4, monitor="val/other")
    best, config = load_checkpoint(tmp_path / "best.safetensors")
    assert (
        same(best, states[2])
        and config["epoch"] == 2
        and same(load_best(network(9), tmp_path), states[2])
    )
    with pytest.raises(PerceptError, match="no 'val/nothing'"):
        train(tmp_path / "b", monitor="val/nothing")
    with pytest.raises(PerceptError, match="There is no"):
        load_best(network(), tmp_path / "c")


def test_a_finished_run_without_checkpoints_still_has_its_weights(tmp_path):
    trained, before = train(tmp_path, checkpoints=False)
    assert not list(tmp_path.glob("*.safetensors"))
    repeated, after = train(tmp_path, model=network(9), checkpoints=False)
    assert same(trained, repeated)
    pd.testing.assert_frame_equal(before, after)


def test_kept_epochs_and_save_at_end(tmp_path):
    train(tmp_path / "a", epochs=5, ckpt_interval=2, keep_epochs=True)
    assert sorted(p.stem for p in (tmp_path / "a").glob("epoch*")) == [
        "epoch002",
        "epoch004",
        "epoch005",
    ]
    stored = []

    def look(model):
        stored.extend((tmp_path / "b").glob("*.safetensors"))
        return validate(model)

    model, _ = train(tmp_path / "b", save_at_end=True, validate=look)
    assert not stored and same(model, load_checkpoint(tmp_path / "b" / "last.safetensors")[0])
    assert not (tmp_path / "b" / "best.safetensors").exists()


def test_logger_gets_each_epoch(tmp_path):
    got = []
    _, history = train(tmp_path, logger=lambda row, step: got.append((step, row["val/loss"])))
    assert got == list(zip(history["train/num_steps"], history["val/loss"], strict=True))


def test_evaluate_counts_every_sample(tmp_path):
    model, data = network().eval(), Data(10)
    model.train()
    results = evaluate(
        model,
        lambda m, b, e: (plain_step(m, b, e)[0], {"train/index": b["image"].float().mean()}),
        data,
        4,
    )
    assert [len(indices) for _, indices in data.seen] == [4, 4, 2] and model.training
    full = data.__getitems__(list(range(10)))
    assert results["val/loss"] == pytest.approx(
        plain_step(model.eval(), full, 0)[0].item(), rel=1e-6
    ) and results["val/index"] == pytest.approx(4.5)
    assert torch.equal(torch.cat([b["image"] for b in iterate_batches(data, 3)]), torch.arange(10))
    with pytest.raises(PerceptError, match="empty"):
        evaluate(model, plain_step, Data(0), 4)


def test_gather_alone_gives_back_what_it_got():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x and gather(torch.arange(3), rows=True).tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheduler": "step"}, "There is no scheduler 'step': choose one of cycle, linear, fixed"),
        ({"decay": "all"}, "There is no decay 'all'"),
        ({"precision": "fp8"}, "There is no precision 'fp8'"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"batch_size": 27}, "26 training samples, fewer than one batch of 27"),
        ({"batch_size": 0}, "at least one epoch and a batch of one"),
        ({"epochs": 0}, "at least one epoch"),
        ({"config": {"x": object()}}, "cannot be stored as JSON"),
        ({"model": network().requires_grad_(False)}, "no trainable parameter"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, wrong, message):
    with pytest.raises(PerceptError, match=message):
        train(tmp_path, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path):
    with pytest.raises(PerceptError, match="'cuda' is not there"):
        train(tmp_path, device="cuda")


@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_on_a_gpu_it_learns_and_resumes(tmp_path, precision, gpu):
    _, history = train(tmp_path / "whole", device="cuda", precision=precision, epochs=10)
    assert history["train/loss"].iloc[-1] < 0.7 * history["train/loss"].iloc[0]
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / "stopped",
            device="cuda",
            precision=precision,
            epochs=10,
            do=call_at(20, lambda: signal.raise_signal(signal.SIGINT)),
        )
    _, resumed = train(
        tmp_path / "stopped", model=network(9), device="cuda", precision=precision, epochs=10
    )
    assert np.allclose(history["train/loss"], resumed["train/loss"], rtol=1e-3)


def test_the_state_is_plain(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, do=call_at(3, lambda: signal.raise_signal(signal.SIGINT)))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (
        json.loads(json.dumps(state["identity"]))["fit"]["max_lr"] == 1e-2
        and len(state["processes"]) == 1
    )
    assert os.listdir(tmp_path) == ["state.pt"]


# ----------------------------------------------------------------------- figures, tracking, orders
def test_an_order_with_replacement_misses_about_a_third():
    order = training.ORDERS["resampled"](1000, 0, 3)
    assert np.array_equal(order, training.ORDERS["resampled"](1000, 0, 3)) and not np.array_equal(
        order, training.ORDERS["resampled"](1000, 0, 4)
    )
    assert 0.6 < len(np.unique(order)) / 1000 < 0.66
    assert sorted(training.ORDERS["shuffled"](1000, 0, 3)) == list(range(1000))


def test_figures_are_drawn_at_their_interval_and_reach_the_logger_without_changing_the_training(
    tmp_path,
):
    seen, rows = [], []

    def draw(model, epoch):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(7)
        seen.append(epoch)
        return {"figure": f"drawn at {epoch}"}

    _, plain = train(tmp_path / "plain", epochs=5)
    _, with_figures = train(
        tmp_path / "drawn",
        epochs=5,
        draw=draw,
        ckpt_interval=2,
        logger=lambda row, step: rows.append(row.get("figure")),
    )
    assert seen == [1, 3, 4] and rows == [None, "drawn at 1", None, "drawn at 3", "drawn at 4"]
    pd.testing.assert_frame_equal(without_time(plain), without_time(with_figures))


def test_without_checkpoints_only_the_state_is_kept(tmp_path):
    train(tmp_path / "run", epochs=1, checkpoints=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["history.csv", "state.pt"]


def test_weights_and_biases_gets_history_and_figures_offline(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(utils, "HOME", tmp_path)
    started = parameters.Run("toy", "01_train_high_level", "", {"seed": 1}, {"seed": "cell"})
    logger = training.open_tracker(started, True, "a project")
    _, history = train(
        tmp_path / "run",
        epochs=2,
        logger=logger,
        draw=lambda model, epoch: {"umap": plt.figure()},
        ckpt_interval=1,
    )
    logger.finish()
    written = list(
        (tmp_path / "train_logs" / "toy" / "wandb").glob("offline-run-*-toy-01_train_high_level")
    )
    assert len(written) == 1 and len(history) == 2
    for _ in range(60):  # a process of its own writes the file
        stored = b"".join(path.read_bytes() for path in written[0].rglob("*.wandb"))
        if b"train/loss" in stored:
            break
        time.sleep(0.5)
    assert (
        b"train/loss" in stored
        and b"a project" in stored
        and len(list(written[0].rglob("*.png"))) == 2
    )
    assert training.open_tracker(started, False, "a project") is None
    monkeypatch.setenv("RANK", "1")
    assert (
        training.open_tracker(started, True, "a project") is None
    )  # the main process alone opens a run


# ---------------------------------------------------------------- updates within the backward pass
def test_stepping_as_gradients_arrive_changes_nothing(tmp_path):
    usual, before = train(tmp_path / "usual")
    early, after = train(tmp_path / "early", step_in_backward=True)
    assert same(usual, early)
    pd.testing.assert_frame_equal(without_time(before), without_time(after))


def test_a_run_may_change_over_when_it_is_resumed(tmp_path):
    usual, _ = train(tmp_path / "usual")
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / "mixed",
            do=call_at(STEPS + 2, lambda: signal.raise_signal(signal.SIGINT)),
            step_in_backward=True,
        )
    mixed, _ = train(tmp_path / "mixed")
    assert same(usual, mixed)


def test_gradients_are_never_held_together(tmp_path):
    model, gradients_in_memory = network(), []
    for p in model.parameters():
        p.register_hook(
            lambda grad: gradients_in_memory.append(
                sum(q.grad is not None for q in model.parameters())
            )
        )
    train(tmp_path / "run", model, epochs=1, step_in_backward=True)
    assert gradients_in_memory and max(gradients_in_memory) <= 1


def test_a_gradient_that_is_not_finite_is_counted_and_its_parameter_left(tmp_path):
    def spoiled(model, batch, epoch):
        loss, logs = plain_step(model, batch, epoch)
        if not hasattr(model, "spoiled"):
            model.spoiled = True
            loss = (
                loss + (model[0].bias * 0).sqrt().sum()
            )  # its gradient is not finite, its value is
        return loss, logs

    model, history = train(tmp_path / "run", do=spoiled, epochs=1, step_in_backward=True)
    assert history["skipped"].tolist() == [1] and all(
        torch.isfinite(p).all() for p in model.parameters()
    )


@pytest.mark.parametrize(("option", "named"), [({"clip_grad": 1.0}, "clip_grad")])
def test_what_needs_all_gradients_at_once_is_refused(tmp_path, option, named):
    with pytest.raises(PerceptError, match=f"step_in_backward does not go together with {named}"):
        train(tmp_path / "run", step_in_backward=True, **option)


@pytest.mark.parametrize(
    "named, options",
    [("step_in_backward", {"step_in_backward": True}), ("precision 'fp16'", {"precision": "fp16"})],
)
def test_what_does_not_go_together_with_deepspeed_is_refused_before_anything_starts(
    tmp_path, monkeypatch, named, options
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as its launcher says
    with pytest.raises(
        PerceptError, match=f"DeepSpeed does not go together with {named}: leave that"
    ):
        train(tmp_path, **options)
