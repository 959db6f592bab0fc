"""The training loop that every stage shares: a budget of wall time, checkpoints, averaged weights.

Every stage logs its quality on held-out images to train_logs/mini_models/<stage>.jsonl, writes a
checkpoint every two minutes, and goes on from it when it is started again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data
from .data import SEED, get_device

SAVE_SECONDS, LOG_SECONDS = 120, 180

Evaluation = Callable[[nn.Module], dict[str, Any]]  # of a module with averaged weights


@dataclass(frozen=True)
class Options:
    """Options of the command that a stage may read.

    Args:
        minutes: wall time in all, earlier runs of the stage counted in.
        processes: that share the gradients.
        threads: of each process.
        batch: samples a process and step, of the diffusion stages.
        lr: learning rate of the diffusion stages.
        bf16: train under bfloat16 autocast.
        share: of the images, for a quick look.
    """

    minutes: float = 10
    processes: int = 1
    threads: int = 1
    batch: int = 64
    lr: float = 1e-3
    bf16: bool = True
    share: float = 1.0


class AveragedWeights:
    """Moving average of a module's parameters (decay .999, quicker at the beginning)."""

    def __init__(self, module: nn.Module):
        state = module.state_dict()
        self.shadow = {name: value.detach().clone() for name, value in state.items()}

    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's weights of this step."""
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            average = self.shadow[name]
            if value.is_floating_point():
                average.lerp_(value.detach().to(average.dtype), 1 - decay)
            else:
                average.copy_(value)


class StageRun:
    """State of one stage's training: module, optimiser, averaged weights, steps and time so far.

    Args:
        stage: its name, by which its files are called.
        module: what is trained; its weights are loaded from the stage's checkpoint if there is one.
        lr: learning rate.
    """

    def __init__(self, stage: str, module: nn.Module, lr: float):
        self.path, self.log_path = data.WORK / f"{stage}.pt", data.WORK / f"{stage}.jsonl"
        self.module = module
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {"weight_decay": 1e-2, "betas": (0.9, 0.99)}
        self.optimizer = torch.optim.AdamW(self.trainable, lr=lr, **options)
        self.average = AveragedWeights(module)
        self.step = 0
        self.seconds_before = 0.0  # of earlier runs
        self.losses: list[float] = []  # since the last line of the log
        if self.path.exists():
            self._resume()
        self.started = time.time() - self.seconds_before

    def _resume(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.shadow = state["average"]
        self.step, self.seconds_before = state["step"], state["spent"]

    def get_seconds(self) -> float:
        """Wall time of this stage so far, earlier runs counted in."""
        return time.time() - self.started

    def take_step(self, loss: Tensor) -> None:
        """One step of the optimiser and of the average; gradients are shared by all processes."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(self.trainable)
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        self.average.update(self.module, self.step)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.shadow,
            "step": self.step,
            "spent": self.get_seconds(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(self.path)

    def log(self, evaluate: Evaluation, batch_size: int) -> None:
        """Evaluate the averaged weights and append a line to the log."""
        seconds = self.get_seconds()
        state = self.module.state_dict()
        weights = {name: value.clone() for name, value in state.items()}
        self.module.load_state_dict(self.average.shadow)
        self.module.eval()
        with torch.no_grad():
            scores = evaluate(self.module)
        self.module.train()
        self.module.load_state_dict(weights)
        row = {
            "step": self.step,
            "minutes": round(seconds / 60, 2),
            "batch": batch_size,
            "loss": round(float(np.mean(self.losses or [0])), 5),
            **scores,
        }
        self.losses = []
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(self.log_path.stem, row, flush=True)


def train(
    stage: str,
    module: nn.Module,
    compute_loss: Callable[[np.random.Generator, int], Tensor],
    evaluate: Evaluation,
    options: Options,
    lr: float,
    batch_size: int,
    rank: int = 0,
) -> None:
    """Train a module for `options.minutes` of wall time and leave its averaged weights in a file.

    Args:
        stage: its name; the checkpoint is <stage>.pt.
        module: what is trained.
        compute_loss: (rng, batch size) -> scalar loss.
        evaluate: module with averaged weights -> numbers to log.
        options: of the command.
        lr: learning rate; it warms up, and falls linearly over the last third of the time.
        batch_size: samples a process and step.
        rank: of this process; only the first saves and logs.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # time is taken when all are ready
    run = StageRun(stage, module, lr)
    budget = options.minutes * 60
    rng = np.random.default_rng([SEED, run.step, rank])
    torch.manual_seed(SEED + run.step * 7 + rank)
    saved, logged = time.time(), time.time()
    while (elapsed := agree_on_seconds(run.get_seconds())) < budget:
        warm_up = min(1.0, (run.step + 1) / 200)
        decay = min(1.0, (1 - elapsed / budget) / 0.35 + 0.01)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * warm_up * decay
        with torch.autocast(get_device().type, dtype=torch.bfloat16, enabled=options.bf16):
            loss = compute_loss(rng, batch_size)
        run.take_step(loss)
        if rank == 0 and time.time() - saved > SAVE_SECONDS:
            run.save()
            saved = time.time()
        if rank == 0 and time.time() - logged > LOG_SECONDS:
            run.log(evaluate, batch_size)
            logged = time.time()
    if rank == 0:
        run.save()
        run.log(evaluate, batch_size)


def agree_on_seconds(seconds: float) -> float:
    """The first process's clock, for all.

    The learning rate and the last step depend on it, and they must be the same everywhere.
    """
    if not torch.distributed.is_initialized():
        return seconds
    clock = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.broadcast(clock, 0)
    return float(clock)


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all processes."""
    if not torch.distributed.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad.copy_(piece.view_as(parameter))


def load_averaged(stage: str, module: nn.Module) -> nn.Module:
    """Load the averaged weights of a finished stage; the module is in eval mode and frozen."""
    path = data.WORK / f"{stage}.pt"
    if not path.exists():
        sys.exit(f"{path} is missing: run the stage '{stage}' first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return module.eval().requires_grad_(False)
