"""One training loop for every stage: `fit(model, step, dataset, ...)`.

- The science is in the notebook's `step(model, batch, epoch) -> (loss, logs)`; here is what surrounds it: order, optimizer, schedule, checkpoints.
- Resuming is exact: a run that is killed and started again ends with bitwise the weights of one that was not (on CPU). The order of an epoch is a pure
  function of (seed, epoch), and a state file holds model, optimizer, schedule and every random generator.
- `batch_size` is global and the learning rate is what it says: nothing is scaled by the number of processes. Gradients are averaged over
  processes after the backward pass, so a step may call any part of a model; losses over the batch use `gather`.
- A non-finite loss or gradient skips the step and is counted; too many in a row roll back to the last good state.
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from src.utils import PerceptError, atomic, load_checkpoint, save_checkpoint, seed_everything

logger = logging.getLogger(__name__)
PATIENCE, ROLLBACKS = 10, 3  # non-finite steps in a row before a roll-back; roll-backs before giving up

Batch = dict[str, Tensor]
Step = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Any]]]


class ImageDataset(Protocol):
    """What `fit` needs of a dataset (`src.data.BrainDataset`)."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitems__(self, indices: list[int]) -> Batch: ...  # noqa: D105
    def set_epoch(self, epoch: int) -> None: ...  # noqa: D102


def _cycle(optimizer: Optimizer, max_lr: float, epochs: int, steps: int) -> LRScheduler:
    share = min(0.5, 2 / epochs)  # the warm-up lasts two epochs
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=epochs * steps, pct_start=share, final_div_factor=1000)


SCHEDULES: dict[str, Callable[[Optimizer, float, int, int], LRScheduler]] = {
    "cycle": _cycle,
    "linear": lambda optimizer, max_lr, epochs, steps: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=epochs * steps),
    "fixed": lambda optimizer, max_lr, epochs, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
}


def parameter_groups(model: nn.Module, weight_decay: float, published: bool = False) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Args:
        model: whose trainable parameters are grouped.
        weight_decay: of the first group.
        published: exempt only names that contain "bias", as the published code does, which lets norms decay; ours exempts every vector.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = [("bias" in name) if published else ("bias" in name or p.ndim < 2) for name, p in named]
    decayed = [p for (_, p), free in zip(named, exempt, strict=True) if not free]
    free_of_it = [p for (_, p), free in zip(named, exempt, strict=True) if free]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free_of_it, "weight_decay": 0.0}]


def gather(x: Tensor) -> Tensor:
    """All processes' rows (batch / processes, ...) -> (batch, ...), with gradient; for losses that compare samples of the whole batch.

    Every process then computes the loss of the whole batch, and `fit` averages the gradients, so one and several processes agree.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


@dataclass
class _State:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0  # within the epoch
    sums: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    best: float = float("inf")
    history: list[dict[str, float]] = field(default_factory=list)


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss], "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip


def _restore_random(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


class _Trainer:
    """The state of one `fit` and the steps it is made of."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        dataset: ImageDataset,
        folder: Path,
        config: dict[str, Any],
        epochs: int,
        batch_size: int,
        max_lr: float,
        seed: int,
        scheduler: str,
        weight_decay: float,
        precision: str,
        clip_grad: float,
        published_decay: bool,
        device: str,
    ):
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if scheduler not in SCHEDULES:
            raise PerceptError(f"The schedule '{scheduler}' is unknown: choose one of {', '.join(SCHEDULES)}.")
        if batch_size % self.world:
            raise PerceptError(f"batch_size {batch_size} cannot be shared by {self.world} processes: choose a multiple of {self.world}.")
        if len(dataset) < batch_size:
            raise PerceptError(f"There are {len(dataset)} training images, fewer than one batch of {batch_size}: choose a smaller batch_size.")
        self.model, self.step, self.dataset, self.folder, self.config = model.to(self.accelerator.device), step, dataset, folder, config
        self.epochs, self.batch_size, self.seed, self.clip_grad = epochs, batch_size, seed, clip_grad
        self.steps = len(dataset) // batch_size
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, weight_decay, published_decay)
        optimizer = torch.optim.AdamW(groups, lr=max_lr, fused=True)
        self.scheduler = SCHEDULES[scheduler](optimizer, max_lr, epochs, self.steps)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.state, self.saved_at, self.bad, self.rollbacks = _State(), time.time(), 0, 0

    # -------------------------------------------------------------------------------------------- state on disk
    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the state atomically (rank 0)."""
        self.saved_at = time.time()
        if not self.accelerator.is_main_process:
            return
        content = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "random": _random_states(), "state": dict(vars(self.state)), "config": self.config, "epochs": self.epochs, "batch_size": self.batch_size,
        }  # fmt: skip
        with atomic(self.path) as temporary:
            torch.save(content, temporary)

    def restore(self) -> None:
        """Go on from the state on disk.

        Raises:
            PerceptError: if it belongs to another config, or cannot be read.
        """
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError) as error:
            raise PerceptError(f"{self.path} cannot be read ({str(error).splitlines()[0]}): delete it to begin anew.") from error
        for key, now in (("config", self.config), ("epochs", self.epochs), ("batch_size", self.batch_size)):
            if content[key] != now:
                what = _difference(content[key], now) if isinstance(now, dict) else f"{key} was {content[key]}, is {now}"
                raise PerceptError(f"{self.folder} holds a run with other settings ({what}): choose another model_name, or resume_from_ckpt False to begin anew.")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.state = _State(**content["state"])
        _restore_random(content["random"])

    # -------------------------------------------------------------------------------------------- one step
    def batch(self, order: np.ndarray, number: int) -> Batch:
        """This process's share of global batch `number`."""
        share = self.batch_size // self.world
        start = number * self.batch_size + self.rank * share
        batch = self.dataset.__getitems__([int(i) for i in order[start : start + share]])
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    def train_step(self, batch: Batch) -> None:
        """Forward, backward, average over processes, check, update."""
        state = self.state
        self.optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():
            loss, logs = self.step(self.model, batch, state.epoch)
        self.accelerator.backward(loss)
        self._average_gradients()
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.clip_grad or float("inf"))
        if torch.isfinite(loss) and torch.isfinite(norm):
            self.optimizer.step()
            self.bad = 0
            for key, value in {"loss": loss, **logs}.items():
                state.sums[key] = state.sums.get(key, 0.0) + float(torch.as_tensor(value).detach())
        else:
            state.skipped += 1
            self.bad += 1
            self.optimizer.step() if self.accelerator.scaler is not None else None  # lets the scaler lower its scale; it skips the update
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            self.scheduler.step()

    def _average_gradients(self) -> None:
        if self.world > 1:
            for p in self.trainable:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.world

    def roll_back(self) -> None:
        """After too many non-finite steps: the last good state, or an end with a sentence."""
        self.rollbacks += 1
        if self.rollbacks > ROLLBACKS or not self.path.exists():
            raise PerceptError(
                f"Loss or gradient was not finite in {PATIENCE} steps in a row (epoch {self.state.epoch}): lower max_lr, use precision 'no', or check the data for NaN."
            )
        skipped = self.state.skipped
        logger.warning("non-finite loss or gradient in %d steps in a row: back to the last good state", PATIENCE)
        self.restore()
        self.state.skipped, self.bad = skipped, 0

    # -------------------------------------------------------------------------------------------- one epoch
    def train_epoch(self, save_every: float, save_steps: int) -> None:
        """The rest of the present epoch."""
        state = self.state
        epoch = state.epoch
        self.model.train()
        self.dataset.set_epoch(epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        while self.state.step < self.steps:
            self.train_step(self.batch(order, self.state.step))
            self.state.step += 1
            if self.bad >= PATIENCE:
                self.roll_back()
                if self.state.epoch != epoch:
                    return self.train_epoch(save_every, save_steps)
            if not self.bad and (time.time() - self.saved_at > save_every or (save_steps and self.state.step % save_steps == 0)):
                self.save()

    def end_epoch(self, validate: Callable[[nn.Module], dict[str, float]] | None, monitor: str, save_at_end: bool, keep: bool) -> dict[str, float]:
        """Validate, write checkpoints, and move to the next epoch."""
        state = self.state
        good = max(1, self.steps - state.skipped)
        row = {"epoch": float(state.epoch), **{f"train/{k}": v / good for k, v in state.sums.items()}, "train/lr": self.scheduler.get_last_lr()[0]}
        row["skipped"] = float(state.skipped)
        if validate is not None:
            self.model.eval()
            row |= {k: float(v) for k, v in validate(self.model).items()}
        state.history.append(row)
        if self.accelerator.is_main_process:
            weights = self.model.state_dict()
            if validate is not None and not save_at_end and np.isfinite(row[monitor]) and row[monitor] < state.best:
                state.best = row[monitor]
                save_checkpoint(self.folder / "best.safetensors", weights, self.config | {"epoch": state.epoch})
            save_checkpoint(self.folder / "last.safetensors", weights, self.config | {"epoch": state.epoch})
            if keep:
                save_checkpoint(self.folder / f"epoch{state.epoch:03d}.safetensors", weights, self.config | {"epoch": state.epoch})
            with atomic(self.folder / "history.csv") as temporary:
                pd.DataFrame(state.history).to_csv(temporary, index=False)
        state.epoch, state.step, state.sums, state.skipped = state.epoch + 1, 0, {}, 0
        self.save()
        return row


def _difference(before: Any, now: Any, name: str = "") -> str:
    """The first entry in which two configs differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    return f"{name} was {before}, is {now}"


def fit(
    model: nn.Module,
    step: Step,
    dataset: ImageDataset,
    *,
    folder: Path,
    config: dict[str, Any],
    epochs: int,
    batch_size: int,
    max_lr: float,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    seed: int = 42,
    scheduler: str = "cycle",
    weight_decay: float = 1e-2,
    precision: str = "no",
    resume: bool = True,
    ckpt_interval: int = 0,
    save_at_end: bool = False,
    monitor: str = "val/loss",
    clip_grad: float = 0.0,
    published_decay: bool = False,
    save_every: float = 300.0,
    save_steps: int = 0,
    device: str = "auto",
) -> pd.DataFrame:
    """Train a model.

    Args:
        model: trained in place, on the device of accelerate.
        step: (model, batch, epoch) -> (loss, logs); a batch is what the dataset's `__getitems__` gives, on the device.
        dataset: training images; an epoch shows each once, but for an incomplete last batch.
        folder: best.safetensors, last.safetensors, history.csv and state.pt are written here.
        config: JSON-like; stored with every checkpoint, and must agree when resuming.
        epochs: passes over the dataset.
        batch_size: images a step, over all processes.
        max_lr: peak learning rate.
        validate: model -> numbers of the validation split, "val/..."; smaller `monitor` is better.
        seed: of the order, and of everything random in the steps.
        scheduler: key of SCHEDULES.
        weight_decay: of AdamW.
        precision: "no", "bf16" or "fp16".
        resume: go on from folder/state.pt if it is there; otherwise begin anew.
        ckpt_interval: also keep epochNNN.safetensors every so many epochs; 0: never.
        save_at_end: write no best.safetensors.
        monitor: the number that chooses the best epoch.
        clip_grad: largest norm of the gradient; 0: no clipping.
        published_decay: see `parameter_groups`.
        save_every: seconds between saves of the state within an epoch.
        save_steps: steps between them; 0: by time only.
        device: "auto" or "cpu".

    Returns:
        The history, one row an epoch.

    Raises:
        PerceptError: for settings that do not fit together or the run on disk, or when training cannot be kept finite.
    """
    folder = Path(folder)
    seed_everything(seed)
    trainer = _Trainer(
        model, step, dataset, folder, config, epochs, batch_size, max_lr, seed, scheduler, weight_decay, precision, clip_grad, published_decay, device
    )
    if resume and trainer.path.exists():
        trainer.restore()
        if trainer.state.epoch:
            logger.info("resuming %s at epoch %d", folder, trainer.state.epoch)
    elif trainer.rank:
        torch.manual_seed(seed + trainer.rank)  # dropout and noise differ between processes
    bar = tqdm(total=epochs, initial=trainer.state.epoch, desc=f"training {folder.name}", unit="epoch", mininterval=5, disable=trainer.rank > 0)
    try:
        while trainer.state.epoch < epochs:
            trainer.train_epoch(save_every, save_steps)
            keep = bool(ckpt_interval) and (trainer.state.epoch + 1) % ckpt_interval == 0
            row = trainer.end_epoch(validate, monitor, save_at_end, keep)
            bar.update()
            bar.set_postfix({k.split("/")[-1]: f"{v:.4g}" for k, v in row.items() if k in ("train/loss", monitor)})
    except KeyboardInterrupt:
        trainer.save()
        logger.warning("interrupted at epoch %d; the same call goes on from %s", trainer.state.epoch, trainer.path)
        raise
    finally:
        bar.close()
    model.eval()
    return pd.DataFrame(trainer.state.history)


def load_best(model: nn.Module, folder: Path) -> nn.Module:
    """Load the weights of the best validation epoch into a model that `fit` has just trained."""
    state, _ = load_checkpoint(Path(folder) / "best.safetensors")
    model.load_state_dict(state)
    return model.eval()
