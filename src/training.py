"""One training loop for every stage: `fit(model, step, dataset, ...)`.

- The science is in the notebook's `step(model, batch, epoch) -> (loss, logs)`; here is what
  surrounds it: order, optimizer, schedule, checkpoints.
- Resuming is exact: on CPU, a run that was killed and started again ends with bitwise the weights
  of one that was not. The order of an epoch is a pure function of (seed, epoch); state.pt holds
  weights, optimizer, schedule and the random generators of every process.
- Launched with DeepSpeed, the optimizer's state is in pieces, one file a process beside state.pt,
  and such a run is resumed by as many processes.
- `batch_size` is global and the learning rate is what it says: nothing is scaled by the number of
  processes. The whole step runs inside accelerate's wrapper, so it may call any part of the model;
  a loss that compares samples uses `gather`.
- A non-finite loss or gradient skips the update and is counted; too many in a row go back to the
  weights of the last state, on the batches to come.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, send_to_device
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from src.utils import (
    PerceptError,
    Run,
    atomic,
    load_checkpoint,
    load_strictly,
    peak_memory,
    save_checkpoint,
    seed_everything,
    to_device,
)

log = logging.getLogger(__name__)
PATIENCE, ROLLBACKS = (
    10,
    3,
)  # non-finite steps in a row before going back; times to go back to one state before giving up
PRECISIONS = ("no", "bf16", "fp16")

Batch = dict[str, Tensor]
Step = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Any]]]
Validate = Callable[[nn.Module], dict[str, float]]
Draw = Callable[[nn.Module, int], dict[str, Any]]
Logger = Callable[[dict[str, Any], int], None]


class TrainingData(Protocol):
    """What `fit` needs of a dataset (`src.data.BrainDataset` has it)."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitems__(self, indices: list[int]) -> Batch:
        """One batch: tensors (batch, ...) by name, anything random in it a pure function of (epoch,
        index).
        """

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""


# -------------------------------------------------------------------------- optimizer and schedule
def _cycle(
    optimizer: Optimizer, max_lr: float, epochs: int, steps: int, warmup: int = 0, whole: int = 0
) -> LRScheduler:
    """One cycle; the warm-up lasts two epochs, but never more than half of the run.

    `whole`: its steps, where it is longer than the run.
    """
    total = whole or epochs * steps
    share = (
        min(0.5, 2 / epochs) if total > 2 else 0.1
    )  # torch divides by zero where a warm-up lasts one step
    return OneCycleLR(optimizer, max_lr, total_steps=total, pct_start=share, final_div_factor=1000)


SCHEDULERS: dict[
    str, Callable[..., LRScheduler]
] = {  # of optimizer, max_lr, epochs, steps an epoch, steps of warm-up, and of the whole cycle
    "cycle": _cycle,
    "linear": lambda optimizer, max_lr, epochs, steps, *_: LinearLR(
        optimizer, total_iters=epochs * steps
    ),  # max_lr / 3 -> max_lr
    "fixed": lambda optimizer, max_lr, epochs, steps, *_: ConstantLR(optimizer, factor=1.0),
    "warmup": lambda optimizer, max_lr, epochs, steps, warmup=0, *_: LinearLR(
        optimizer, 1 / (warmup + 1), total_iters=warmup
    ),  # then fixed
}


def _norm_gains(model: nn.Module) -> set[str]:
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
    ]
    return {
        f"{name}.{own}".lstrip(".")
        for name, module in norms
        for own, _ in module.named_parameters(recurse=False)
    }


DECAYS: dict[
    str, Callable[[nn.Module], set[str]]
] = {  # names, beside those that contain "bias", without weight decay
    "no_norms": _norm_gains,
    "published": (lambda model: set()),  # the published systems let the gains of their norms decay
}


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "no_norms"
) -> list[dict[str, Any]]:
    """Trainable parameters with weight decay, and those without: names that contain "bias", and
    what `decay` adds.

    Args:
        model: whose trainable parameters are grouped.
        weight_decay: of the first group.
        decay: key of DECAYS: "no_norms" also spares the gains of norms, "published" does not.

    Raises:
        PerceptError: for an unknown `decay`, or a model without trainable parameters.
    """
    spared = _choose(DECAYS, decay, "decay")(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise PerceptError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad on what shall be"
            " trained."
        )
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, p in named:
        groups["bias" in name or name in spared].append(p)
    both = [
        {"params": groups[False], "weight_decay": weight_decay},
        {"params": groups[True], "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def _adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def _choose(registry: dict[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise PerceptError(f"There is no {what} '{name}': choose one of {', '.join(registry)}.")
    return registry[name]


# ----------------------------------------------------------------------------------------- batches
def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples (samples,) in an epoch: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def _resampled_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).integers(0, samples, samples)


ORDERS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "shuffled": epoch_order,
    # with replacement, as the published loader draws its shards: about a third of the images is
    # missed in an epoch
    "resampled": _resampled_order,
}


def _collate(batch: Any) -> Batch:
    return batch if isinstance(batch, dict) else default_collate(batch)


class FirstSamples:
    """The first n samples of a dataset, as `fit` takes them: whoever cannot overfit these has a
    fault elsewhere.
    """

    def __init__(self, dataset: Any, n: int):
        self.dataset, self.n, self.set_epoch = dataset, min(n, len(dataset)), dataset.set_epoch

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, indices: list[int]) -> Batch:
        """As the dataset's."""
        return self.dataset.__getitems__(indices)


def batches(dataset: Any, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
    """Every sample of a dataset once, in order; the last batch may be smaller.

    Args:
        dataset: with `__len__` and `__getitems__`.
        batch_size: samples a batch.
        device: where the batches go.
    """
    for start in range(0, len(dataset), batch_size):
        indices = list(range(start, min(start + batch_size, len(dataset))))
        yield send_to_device(_collate(dataset.__getitems__(indices)), device)


def _parts(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in equal parts, one after the other."""
    for rows in torch.arange(len(next(iter(batch.values())))).chunk(parts):
        yield (
            batch if parts == 1 else {name: x[rows[0] : rows[-1] + 1] for name, x in batch.items()}
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, step: Step, dataset: Any, batch_size: int, epoch: int = 0
) -> dict[str, float]:
    """Means over all the samples of what a training step reports: {"val/loss": ..., "val/<log>":
    ...}.

    Each batch counts by its number of samples. Made for `validate=lambda model: evaluate(model,
    step, data, 300)`.

    Raises:
        PerceptError: for an empty dataset.
    """
    if not len(dataset):
        raise PerceptError("There is nothing to evaluate: the dataset is empty.")
    means, was_training = _Means(), model.training
    model.eval()
    for batch in batches(dataset, batch_size, next(model.parameters()).device):
        loss, logs = step(model, batch, epoch)
        means.add({"loss": loss, **logs}, weight=len(next(iter(batch.values()))))
    model.train(was_training)
    return {f"val/{name.removeprefix('train/')}": value for name, value in means.values().items()}


# ------------------------------------------------------------------------------- several processes
class _Gather(torch.autograd.Function):
    """Rows of all processes; backward adds up what all processes want of the own rows."""

    active = False  # only within a training step does a process hold a share of the batch

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (batch / processes, ...) -> (batch, ...)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather(x: Tensor, rows: bool = False) -> Tensor:
    """Rows of all processes, (batch / processes, ...) -> (batch, ...), with gradient: for losses
    that compare the samples of a batch.

    Every process then computes the loss of the whole batch, and as `fit` averages gradients, 1 and
    n processes agree. With one process, and outside a training step (in validation each process has
    all the samples), `x` comes back as it is.

    Args:
        x: what this process has, with the same shape in each.
        rows: `x` holds numbers of rows of this process's share, such as a permutation; they become
            numbers of rows of the whole batch.
    """
    if not _Gather.active or torch.distributed.get_world_size() == 1:
        return x
    if rows:
        x = x + torch.distributed.get_rank() * len(x)
    return _Gather.apply(x)


@contextmanager
def _shared_batch(processes: int) -> Iterator[None]:
    _Gather.active = processes > 1
    try:
        yield
    finally:
        _Gather.active = False


def own_rows(x: Tensor) -> Tensor:
    """The rows of this process in a tensor of the whole batch, (batch, ...) -> (batch / processes,
    ...): undoes `gather`.
    """
    if not _Gather.active or torch.distributed.get_world_size() == 1:
        return x
    return x.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


class _Stepper(nn.Module):
    """Makes a module of model and step, so that accelerate wraps all that a step does, and not just
    the model's forward.
    """

    def __init__(self, model: nn.Module, step: Step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Any]]:
        return self.step(self.model, batch, epoch)


def check_precision(device: str, precision: str, step_in_backward: bool = False) -> str:
    """The kind of a device, "cuda" or "cpu", when precision and device go together: to be asked
    before long work, as `fit` asks, too.

    Raises:
        PerceptError: for an unknown or impossible combination.
    """
    kind = to_device(str(device)).split(":")[0]
    if precision not in PRECISIONS:
        raise PerceptError(
            f"There is no precision '{precision}': choose one of {', '.join(PRECISIONS)}."
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise PerceptError("The device 'cuda' is not there: choose device 'cpu' or 'auto'.")
    if kind == "cpu" and precision == "fp16":
        raise PerceptError("Precision 'fp16' needs a GPU: choose 'no' or 'bf16' on the CPU.")
    if step_in_backward and precision == "fp16":
        raise PerceptError(
            "step_in_backward does not go together with precision 'fp16', which needs all the"
            " gradients at once: leave one of them."
        )
    return kind


class _Sharded(Accelerator):
    """Accelerate where it was launched with DeepSpeed: each process keeps and updates its piece of
    the optimizer's state (ZeRO stages 1 and 2).

    The weights stay whole, and in single precision: precision "bf16" is autocast, as elsewhere. A
    parameter without a gradient counts as one with zeros.
    """

    def __init__(self, settings: _Settings):
        self.settings = settings
        super().__init__(mixed_precision="no", gradient_accumulation_steps=settings.accumulate)
        stage = self.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise PerceptError(
                f"DeepSpeed's ZeRO stage {stage} is not supported: choose stage 1 or 2 in its"
                " config, as launch/deepspeed_zero2_offload.json has."
            )

    def autocast(self, autocast_handler: Any = None) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
        )

    def prepare(self, stepper: _Stepper, optimizer: Optimizer) -> Any:  # type: ignore[override]
        s = self.settings
        self.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": s.batch_size // self.num_processes // s.accumulate,
            "gradient_accumulation_steps": s.accumulate,
            "gradient_clipping": s.clip_grad or 0.0,
        }
        stepper.step = self.autocast()(stepper.step)
        self.own = optimizer  # its groups become this process's pieces
        self.engine, idle = super().prepare(stepper, optimizer)
        self.engine.optimizer.check_grad_overflow = True  # by default not in single precision
        return self.engine, idle

    def backward(self, loss: Tensor, **other: Any) -> None:
        """Of one part of a batch; that of the last part updates the weights, unless a loss or
        gradient of any process is not finite.
        """
        spoil = torch.where(
            torch.isfinite(loss.detach()), 1.0, math.nan
        )  # also the gradients: these are what the processes agree about
        self.engine.backward(loss * spoil, scale_wrt_gas=False)
        self.engine.step()

    def gradient_norm(self) -> Tensor:
        """Of the batch whose backward is done; infinite where there was no update."""
        self.own.zero_grad(
            set_to_none=False
        )  # else a parameter without a gradient would find that of the step before
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else math.inf
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)


def _accelerator(device: str, settings: _Settings, step_in_backward: bool) -> Accelerator:
    """Accelerate's handle on device, precision and processes; each `fit` gets a fresh one."""
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    for name, there in (
        ("step_in_backward", step_in_backward),
        ("precision 'fp16'", settings.precision == "fp16"),
    ):
        if sharded and there:
            raise PerceptError(
                f"DeepSpeed does not go together with {name}: leave that, or launch with a plain"
                " multi-GPU config."
            )
    kind = check_precision(device, settings.precision, step_in_backward)
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as published
    AcceleratorState._reset_state(
        reset_partial_state=not torch.distributed.is_initialized()
    )  # else a second precision is refused
    if sharded:
        if kind == "cpu":
            PartialState(
                cpu=True
                # else accelerate, which knows DeepSpeed on GPUs alone, would take each process for
                # the
                # only one
            )
        return _Sharded(settings)
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # a phase of training may leave parts of a model alone
    accelerator = Accelerator(
        mixed_precision=settings.precision, cpu=kind == "cpu", kwargs_handlers=[ddp]
    )
    if accelerator.distributed_type.value in ("FSDP", "MEGATRON_LM"):
        raise PerceptError(
            f"Sharded training ({accelerator.distributed_type.value}) is not supported: launch with"
            " a plain multi-GPU config, or DeepSpeed's."
        )
    return accelerator


def _share_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let batch norms see the whole batch, also when it is spread over processes."""
    found = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if accelerator.num_processes == 1 or not found:
        return model
    if accelerator.device.type == "cpu":
        raise PerceptError(
            "Batch norms cannot be shared by several CPU processes: use one process, or GPUs."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


# ---------------------------------------------------------------------------- what a run remembers
class _Means:
    """Running means by name.

    Tensors are summed where they are, so that adding does not wait for a GPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.weights: dict[str, float] = {}

    def add(self, values: dict[str, Any], weight: float = 1) -> None:
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0) + weight

    def state(self) -> dict[str, list[float]]:
        return {name: [float(total), self.weights[name]] for name, total in self.sums.items()}

    def load(self, states: list[dict[str, list[float]]]) -> None:
        self.sums, self.weights = {}, {}
        for state in states:
            for name, (total, weight) in state.items():
                self.sums[name] = self.sums.get(name, 0.0) + total
                self.weights[name] = self.weights.get(name, 0) + weight

    def values(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.state().items()}


@dataclass(frozen=True)
class _Settings:
    """What must be the same for a run to be resumed.

    Those with a default came later: a run at their defaults is what it was without them.
    """

    epochs: int
    batch_size: int
    max_lr: float
    seed: int
    scheduler: str
    weight_decay: float
    decay: str
    precision: str
    clip_grad: float | None
    samples: int
    order: str
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    accumulate: int = 1
    cycle_steps: int = 0

    def identity(self) -> dict[str, Any]:
        """What is compared when a run is resumed."""
        late = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in late or value != late[name]
        }


@dataclass(frozen=True)
class _Saving:
    """When and what to write."""

    monitor: str
    save_every: float
    save_steps: int
    ckpt_interval: int
    keep_epochs: bool
    save_at_end: bool
    checkpoints: bool
    draw_interval: int


@dataclass
class _Position:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0  # steps done within the epoch
    skipped: int = 0  # non-finite steps of the epoch
    bad: int = 0  # non-finite steps in a row
    rollbacks: int = 0  # since the state was last saved
    best: float = math.inf
    lr: float = 0.0  # of the last step
    seconds: float = 0.0  # spent in the epoch
    history: list[dict[str, float]] = field(default_factory=list)


def _random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of python, numpy, torch and CUDA, as types that load without
    pickle's dangers.
    """
    _, words, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(words, dtype=np.int64)), rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        k: v
        for key, part in value.items()
        for k, v in _flat(part, f"{name}.{key}".lstrip(".")).items()
    }


def _check_same(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run under other settings, naming the first that differs."""
    before, after = _flat(saved), _flat(now)
    missing = "not there"
    differ = [k for k in {**before, **after} if before.get(k, missing) != after.get(k, missing)]
    if differ:
        first = differ[0]
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise PerceptError(
            f"{folder} holds a run in which {first} was {before.get(first, missing)!r}, now it is"
            f" {after.get(first, missing)!r}{more}: choose another model_name, or set"
            " resume_from_ckpt to False to begin anew."
        )


class _Stop:
    """Turns Ctrl-C, or the signal by which a cluster ends a job, into a request to stop after the
    step; asked again, it stops at once.
    """

    def __init__(self) -> None:
        self.asked: int = 0
        self._since = 0.0

    def __enter__(self) -> _Stop:
        usable = threading.current_thread() is threading.main_thread()
        wanted = [
            s
            for s in (signal.SIGINT, signal.SIGTERM)
            if usable and signal.getsignal(s) not in (signal.SIG_IGN, None)
        ]
        self._before = {s: signal.signal(s, self._ask) for s in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if (
            self.asked and time.monotonic() - self._since > 1
        ):  # a launcher passes on what the terminal has sent already
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            log.warning("stopping after this step; once more to stop at once")


# ----------------------------------------------------------------------------------------- the run
class _Training:
    """One run: what changes while training, and how it is saved together."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        dataset: Any,
        folder: Path,
        config: dict[str, Any],
        settings: _Settings,
        saving: _Saving,
        device: str,
        step_in_backward: bool = False,
    ):
        self.accelerator = _accelerator(device, settings, step_in_backward)
        self.sharded = self.accelerator if isinstance(self.accelerator, _Sharded) else None
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.dataset, self.folder, self.config, self.settings, self.saving = (
            dataset,
            folder,
            config,
            settings,
            saving,
        )
        _choose(ORDERS, settings.order, "order")
        self.steps = self._steps_per_epoch()
        self.model = _share_norms(model.to(self.device), self.accelerator)
        groups = parameter_groups(self.model, settings.weight_decay, settings.decay)
        self.raw_optimizer = _adamw(groups, settings.max_lr, settings.betas, settings.eps)
        make = _choose(SCHEDULERS, settings.scheduler, "scheduler")
        if settings.warmup_steps and settings.scheduler != "warmup":
            raise PerceptError(
                f"The schedule '{settings.scheduler}' has no warmup_steps to set: choose 'warmup',"
                " or leave them at 0."
            )
        if settings.cycle_steps and (
            settings.scheduler != "cycle" or settings.cycle_steps < settings.epochs * self.steps
        ):
            raise PerceptError(
                f"cycle_steps is {settings.cycle_steps}: it is for the schedule 'cycle' and at"
                f" least the {settings.epochs * self.steps} steps of the run."
            )
        shape = (settings.epochs, self.steps, settings.warmup_steps, settings.cycle_steps)
        self.scheduler = make(
            self.raw_optimizer, settings.max_lr, *shape
        )  # not prepared: one step a step
        self.stepper, self.optimizer = self.accelerator.prepare(
            _Stepper(self.model, step), self.raw_optimizer
        )
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.at, self.means, self.stop = _Position(), _Means(), _Stop()
        self.saved = self.clock = time.monotonic()
        self.in_backward, self.broken_gradient = step_in_backward, False
        if step_in_backward:
            self._step_as_gradients_arrive()

    def _step_as_gradients_arrive(self) -> None:
        """Update each parameter as soon as its gradient is there and free that: the gradients of
        the whole model are never held together.
        """
        s = self.settings
        for name, there in (
            ("several processes", self.world > 1),
            ("clip_grad", bool(s.clip_grad)),
            ("accumulate", s.accumulate > 1),
        ):
            if there:
                raise PerceptError(
                    f"step_in_backward does not go together with {name}, which needs all the"
                    " gradients at once: leave one of them."
                )

        def update(p: Tensor) -> None:
            # unlike isfinite of the gradient, without copies of it
            if torch.isfinite(torch.linalg.vector_norm(p.grad)):  # type: ignore[arg-type]
                self.raw_optimizer.step()  # of all parameters this one alone has a gradient now
            else:
                self.broken_gradient = True
            p.grad = None

        for p in self.trainable:
            p.register_post_accumulate_grad_hook(update)

    def _steps_per_epoch(self) -> int:
        s = self.settings
        if s.epochs < 1 or s.batch_size < 1:
            raise PerceptError(
                f"Training needs at least one epoch and a batch of one, not {s.epochs} and"
                f" {s.batch_size}."
            )
        if s.batch_size % self.world:
            raise PerceptError(
                f"A batch_size of {s.batch_size} cannot be split over {self.world} processes:"
                f" choose a multiple of {self.world}."
            )
        if s.accumulate < 1 or s.batch_size // self.world % s.accumulate:
            parts = f"{s.accumulate} equal parts" + (
                f" on each of {self.world} processes" if self.world > 1 else ""
            )
            raise PerceptError(
                f"A batch_size of {s.batch_size} cannot be worked through in {parts}: choose a"
                " multiple."
            )
        if s.samples < s.batch_size:
            raise PerceptError(
                f"There are {s.samples} training samples, fewer than one batch of {s.batch_size}:"
                " choose a smaller batch_size."
            )
        return s.samples // s.batch_size

    # ------------------------------------------------------------------------------- state on disk
    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def finished(self) -> bool:
        return self.at.epoch >= self.settings.epochs

    def _identity(self) -> dict[str, Any]:
        try:
            return json.loads(json.dumps({"config": self.config, "fit": self.settings.identity()}))
        except TypeError as error:
            raise PerceptError(
                f"The config cannot be stored as JSON ({error}): keep numbers, texts, lists and"
                " dicts in it."
            ) from error

    def save(self) -> None:
        """Write the state; all processes take part.

        Of a finished run it keeps the history alone, as the weights are in last.safetensors, if
        anywhere.
        """
        self._tick()
        if self.sharded and not self.finished:
            with atomic(self._piece(vars(self.at), self.rank)) as temporary:
                torch.save(self.raw_optimizer.state_dict(), temporary)
        own = {"random": _random_state(self.device), "means": self.means.state()}
        content = {
            "identity": self._identity(),
            "position": vars(self.at),
            "processes": gather_object([own]),
        }
        if self.main:
            if not self.finished:
                scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
                content |= {
                    "model": self.model.state_dict(),
                    "optimizer": None if self.sharded else self.raw_optimizer.state_dict(),
                }
                content |= {
                    "pieces": self.pieces,
                    "scheduler": self.scheduler.state_dict(),
                    "scaler": scaler,
                }
            elif not self.saving.checkpoints:
                content |= {"model": self.model.state_dict()}
            with atomic(self.path) as temporary:
                torch.save(content, temporary)
            self._remove_pieces("" if self.finished else self._piece(vars(self.at), "*").name)
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    @property
    def pieces(self) -> int:
        """In how many files beside state.pt the optimizer's state is; 0 where state.pt holds it."""
        return self.world if self.sharded else 0

    def _piece(self, position: dict[str, Any], rank: int | str) -> Path:
        """The optimizer's state in one process; state.pt is written after those of its step, and
        those of the one before are removed last.
        """
        return self.folder / f"state-{position['epoch'] * self.steps + position['step']}-{rank}.pt"

    def _remove_pieces(self, but: str = "") -> None:
        for old in self.folder.glob("state-*.pt"):
            if not but or not old.match(but):
                old.unlink()

    def _load(self, path: Path) -> dict[str, Any]:
        # mapped for a GPU, whose process then reads only what it copies; the optimizer may keep its
        # piece as it is
        try:
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=self.device.type == "cuda" and path == self.path,
            )
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            state = "it" if path == self.path else self.path
            raise PerceptError(
                f"{path} cannot be read ({str(error).splitlines()[0]}): delete {state}, or set"
                " resume_from_ckpt to False to begin anew."
            ) from error

    def begin(self, resume: bool) -> None:
        """Go on from the state on disk, or begin anew."""
        self.accelerator.wait_for_everyone()
        seed_everything(
            self.settings.seed + self.rank
        )  # dropout and noise differ between processes
        identity = self._identity()
        if resume and self.path.exists():
            content = self._load(self.path)
            _check_same(content["identity"]["config"], identity["config"], self.folder)
            _check_same(content["identity"]["fit"], identity["fit"], self.folder)
            self._restore(content)
        elif not resume and self.main:
            for name in ("state.pt", "history.csv", "best.safetensors", "last.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
            self._remove_pieces()
        self.accelerator.wait_for_everyone()

    def _restore(self, content: dict[str, Any]) -> None:
        self.at = _Position(**content["position"])
        if self.finished:
            return self._restore_finished(content.get("model"))
        if content.get("pieces", 0) != self.pieces:
            before, now = (
                f"by {n} processes under DeepSpeed" if n else "without DeepSpeed"
                for n in (content.get("pieces", 0), self.pieces)
            )
            raise PerceptError(
                f"{self.path} was saved {before} and cannot be resumed {now}: launch as before, or"
                " set resume_from_ckpt to False to begin anew."
            )
        self._restore_weights(content)
        self.scheduler.load_state_dict(content["scheduler"])
        if content["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self._restore_process(content["processes"])
        log.info("resuming %s at epoch %d, step %d", self.folder, self.at.epoch, self.at.step)

    def _restore_finished(self, weights: dict[str, Tensor] | None) -> None:
        last = self.folder / "last.safetensors"
        if weights is None and not last.exists():
            raise PerceptError(
                f"The run in {self.folder} is finished, but its last.safetensors is gone: put it"
                " back, or set resume_from_ckpt to False to train again."
            )
        load_strictly(
            self.model,
            load_checkpoint(last)[0] if weights is None else weights,
            str(last if weights is None else self.path),
        )
        log.info("%s is finished: %d epochs", self.folder, self.at.epoch)

    def _restore_process(self, processes: list[dict[str, Any]]) -> None:
        """Random state and running means of this process, or a fair substitute when their number
        has changed.
        """
        if len(processes) == self.world:
            self.means.load([processes[self.rank]["means"]])
            return _set_random_state(processes[self.rank]["random"], self.device)
        log.warning(
            "%d processes go on with a run of %d: random numbers differ from here",
            self.world,
            len(processes),
        )
        self.means.load([p["means"] for p in processes] if self.main else [])
        seed_everything(
            self.settings.seed + self.rank + 1000 * (self.at.epoch * self.steps + self.at.step)
        )

    def _restore_weights(self, content: dict[str, Any]) -> None:
        load_strictly(self.model, content["model"], str(self.path))
        if self.sharded:
            # what it updates is a copy of the weights
            self.sharded.engine.optimizer.refresh_fp32_params()
        self.raw_optimizer.load_state_dict(
            self._load(self._piece(content["position"], self.rank))
            if self.sharded
            else content["optimizer"]
        )

    def _tick(self) -> None:
        now = time.monotonic()
        self.at.seconds, self.clock = self.at.seconds + now - self.clock, now

    # ------------------------------------------------------------------------------------ one step
    def _train_step(self, batch: Batch) -> tuple[bool, bool]:
        """Forward, backward, check, update.

        Returns what all the processes agree on: whether to save now, and to stop.
        """
        self.at.lr = self.raw_optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        self.broken_gradient = False
        told, parts = [], self.settings.accumulate
        finite = torch.tensor(True, device=self.device)
        with _shared_batch(self.world):
            for part in _parts(batch, parts):
                loss, logs = self.stepper(part, self.at.epoch)
                told.append({"loss": loss.detach(), **logs})
                finite = finite & torch.isfinite(loss.detach())
                if not self.in_backward or bool(finite):
                    self.accelerator.backward(loss / parts)
        norm = self.sharded.gradient_norm() if self.sharded else self._gradient_norm()
        flags = [finite, torch.isfinite(norm) & (not self.broken_gradient)]
        bad_loss, bad_grad, save, stop = self._agree(flags, [self._due(), bool(self.stop.asked)])
        if bad_loss or bad_grad:
            self._skip(bad_loss)
        else:
            self._update(norm)
            for values in told:
                self.means.add(values, weight=1 / parts)
        self.at.step += 1
        return save and not self.at.bad, stop

    def _gradient_norm(self) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None]).to(
            self.device
        )  # of none at all, it is on the CPU

    def _agree(self, finite: list[Tensor], flags: list[bool]) -> list[bool]:
        """What holds in any process: [not finite..., flags...].

        The one place where a step waits for the device.
        """
        bad = (
            torch.stack([~f for f in finite]).float()
            if finite
            else torch.empty(0, device=self.device)
        )
        if self.world == 1:
            return [bool(value) for value in bad.tolist()] + flags
        both = torch.cat([bad, torch.tensor(flags, dtype=torch.float32, device=self.device)])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        return [bool(value) for value in both.tolist()]

    def _due(self) -> bool:
        steps = self.saving.save_steps
        by_steps = bool(steps) and (self.at.epoch * self.steps + self.at.step + 1) % steps == 0
        return by_steps or (self.main and time.monotonic() - self.saved > self.saving.save_every)

    def _update(self, norm: Tensor) -> None:
        if self.settings.clip_grad:
            nn.utils.clip_grads_with_norm_(self.trainable, self.settings.clip_grad, norm)
        if not self.in_backward:
            self.optimizer.step()
        self.scheduler.step()
        self.at.bad = 0

    def _skip(self, bad_loss: bool) -> None:
        """No update; the schedule goes on, so that the learning rate depends on the position alone."""
        scaler = self.accelerator.scaler
        searching = (
            scaler is not None and not bad_loss and scaler.get_scale() > 1
        )  # fp16 overflow: the scaler looks for its scale
        if scaler is not None:
            scaler.update()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*lr_scheduler.step.*"
            )  # torch minds when the very first update is skipped
            self.scheduler.step()
        self.at.skipped += 1
        self.at.bad += not searching
        broken = any(
            b.is_floating_point() and not torch.isfinite(b).all() for b in self.model.buffers()
        )
        if self.at.bad >= PATIENCE or broken:
            self._roll_back()

    def _roll_back(self) -> None:
        """Weights of the last state, for the batches to come (to see the same ones again would end
        in the same place).
        """
        self.at.rollbacks += 1
        if self.at.rollbacks > ROLLBACKS or not self.path.exists():
            raise PerceptError(
                f"Training cannot be kept finite (epoch {self.at.epoch}, step {self.at.step}:"
                f" {self.at.skipped} steps without a finite loss and gradient in this epoch,"
                f" {self.at.rollbacks - 1} roll-backs): lower max_lr, choose precision 'no', or"
                " look for NaN in the data."
            )
        log.warning(
            "loss or gradient is not finite (epoch %d, step %d): back to the last saved weights",
            self.at.epoch,
            self.at.step,
        )
        now = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.raw_optimizer.param_groups
        ]
        self._restore_weights(self._load(self.path))
        for group, values in zip(self.raw_optimizer.param_groups, now, strict=True):
            group.update(values)  # the learning rate belongs to the position, which stays
        self.at.bad = 0

    # ----------------------------------------------------------------------------------- one epoch
    def _loader(self, workers: int) -> DataLoader:
        """What is left of this process's share of the epoch."""
        s, share = self.settings, self.settings.batch_size // self.world
        order = ORDERS[s.order](s.samples, s.seed, self.at.epoch)
        starts = range(
            self.at.step * s.batch_size + self.rank * share, self.steps * s.batch_size, s.batch_size
        )
        own = torch.Generator()  # else the loader would draw from the generator of the steps
        return DataLoader(
            self.dataset,
            batch_sampler=[order[i : i + share].tolist() for i in starts],
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=own,
        )

    def train_epoch(self, workers: int) -> None:
        """Train for the rest of the present epoch."""
        self.model.train()
        self.dataset.set_epoch(self.at.epoch)
        for batch in self._loader(workers):
            save, stop = self._train_step(send_to_device(batch, self.device, non_blocking=True))
            if stop:
                self._leave()
            if save:
                self.at.rollbacks = 0
                self.save()

    def _leave(self) -> None:
        self.save()
        log.warning(
            "stopped at epoch %d, step %d; the same call goes on from %s",
            self.at.epoch,
            self.at.step,
            self.path,
        )
        if self.stop.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def end_epoch(self, validate: Validate | None) -> dict[str, float]:
        """Validate, write history and checkpoints, move on."""
        row = self._row(validate)
        self.at.history.append(row)
        self._write(row)
        self.at.epoch, self.at.step, self.at.skipped, self.at.seconds = self.at.epoch + 1, 0, 0, 0.0
        self.means = _Means()
        save, stop = self._agree([], [self._due() or self.finished, bool(self.stop.asked)])
        if stop:
            self._leave()
        if save and (self.finished or not self.at.bad):
            self.at.rollbacks = 0
            self.save()
        return row

    def _row(self, validate: Validate | None) -> dict[str, float]:
        everywhere = _Means()
        everywhere.load(gather_object([self.means.state()]))
        row: dict[str, float] = {"epoch": self.at.epoch, "train/loss": math.nan}
        row |= {
            name if "/" in name else f"train/{name}": value
            for name, value in everywhere.values().items()
        }
        row |= {"train/lr": self.at.lr, "train/num_steps": (self.at.epoch + 1) * self.steps}
        if validate is not None:
            row |= {name: float(value) for name, value in self._apart(validate, self.model).items()}
            if self.saving.monitor not in row:
                raise PerceptError(
                    f"validate gives no '{self.saving.monitor}' to choose the best epoch by: it"
                    f" gives {', '.join(row)}."
                )
        self._tick()
        row |= {
            "skipped": self.at.skipped,
            "seconds": round(self.at.seconds, 3),
            "memory": round(peak_memory("cpu") / 1e9, 3),
        }
        return row | (
            {"gpu_memory": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)}
            if self.device.type == "cuda"
            else {}
        )

    def _apart(self, look: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """Look at the model under a seed of its own: the same noise at each epoch, and none taken
        from training.
        """
        before = _random_state(self.device)
        seed_everything(self.settings.seed)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            values = look(*args)
        self.model.train()
        _set_random_state(before, self.device)
        return values

    def _write(self, row: dict[str, float]) -> None:
        if not self.main:
            return
        saving, done = self.saving, self.at.epoch + 1
        last = done == self.settings.epochs
        names = ["last"] if last or not saving.save_at_end else []
        if row.get(saving.monitor, math.nan) < self.at.best:
            self.at.best = row[saving.monitor]
            names += [] if saving.save_at_end else ["best"]
        if (
            saving.keep_epochs
            and saving.ckpt_interval
            and (last or done % saving.ckpt_interval == 0)
        ):
            names.append(f"epoch{done:03d}")  # as published, the number of epochs that are done
        for name in names if saving.checkpoints else []:
            save_checkpoint(
                self.folder / f"{name}.safetensors",
                self.model.state_dict(),
                self.config | {"epoch": self.at.epoch},
            )
        with atomic(self.folder / "history.csv") as temporary:
            pd.DataFrame(self.at.history).to_csv(temporary, index=False)

    def _figures(self, draw: Draw | None) -> dict[str, Any]:
        """What `draw` makes of the epoch that has just ended, where its turn has come."""
        every = self.saving.draw_interval
        if (
            draw is None
            or not self.main
            or not (self.finished or (every and self.at.epoch % every == 0))
        ):
            return {}
        return self._apart(draw, self.model, self.at.epoch - 1)

    def run(
        self, validate: Validate | None, workers: int, logger: Logger | None, draw: Draw | None
    ) -> None:
        """All the epochs that are left, with one bar."""
        bar = tqdm(
            total=self.settings.epochs,
            initial=self.at.epoch,
            desc=f"training {self.folder.name}",
            unit="epoch",
            mininterval=2,
            disable=not self.main,
        )
        self.saved = self.clock = time.monotonic()
        with bar, self.stop:
            while not self.finished:
                self.train_epoch(workers)
                row = self.end_epoch(validate)
                figures = self._figures(draw)
                shown = {
                    k.removeprefix("train/"): f"{row[k]:.4g}"
                    for k in ("train/loss", self.saving.monitor, "train/lr")
                    if k in row
                }
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if logger is not None and self.main:
                    logger(row | figures, int(row["train/num_steps"]))


def fit(
    model: nn.Module,
    step: Step,
    dataset: TrainingData,
    *,
    folder: str | Path,
    config: dict[str, Any],
    epochs: int,
    batch_size: int,
    max_lr: float,
    validate: Validate | None = None,
    seed: int = 42,
    scheduler: str = "cycle",
    warmup_steps: int = 0,
    cycle_steps: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: str = "no_norms",
    accumulate: int = 1,
    precision: str = "no",
    clip_grad: float | None = None,
    resume: bool = True,
    monitor: str = "val/loss",
    save_every: float = 300.0,
    save_steps: int = 0,
    ckpt_interval: int = 5,
    keep_epochs: bool = False,
    save_at_end: bool = False,
    checkpoints: bool = True,
    order: str = "shuffled",
    step_in_backward: bool = False,
    num_workers: int = 0,
    device: str = "auto",
    logger: Logger | None = None,
    draw: Draw | None = None,
    draw_interval: int | None = None,
) -> pd.DataFrame:
    """Train a model; called again after an interruption, it goes on where it was, and for a
    finished run it returns at once.

    Args:
        model: trained in place, moved to the device; afterwards it has the last weights and is in
            eval mode.
        step: (model, batch, epoch) -> (scalar loss, logs); a batch is what `dataset.__getitems__`
            gives, on the device. With several processes a batch is a share of the global one, and a
            loss must be a mean over samples, or be made of `gather`ed tensors.
        dataset: training samples; an epoch shows each once, but for an incomplete last batch.
        folder: for best.safetensors, last.safetensors, history.csv and state.pt.
        config: JSON-like; stored with each checkpoint (with the epoch beside it), and checked when
            resuming.
        epochs: passes over the dataset.
        batch_size: samples a step, over all processes.
        max_lr: peak learning rate; never scaled.
        validate: model -> {"val/loss": ...} on the validation split (never the test split), called
            in eval mode, without gradient, in every process.
        seed: of the order and of everything random in the steps (process n has seed + n).
        scheduler: key of SCHEDULERS: "cycle" (MindEye's), "linear", "fixed", or "warmup" (rises to
            max_lr, then fixed); it advances once a step.
        warmup_steps: of the schedule "warmup".
        cycle_steps: of the whole of the schedule "cycle", where the run shall walk through a part
            of it only; 0: as many as the run has.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        decay: key of DECAYS: what it leaves out.
        accumulate: parts in which a batch is worked through before the one update, to save memory;
            a loss must be a mean over samples.
        precision: "no", "bf16" or "fp16" (the whole step runs under autocast).
        clip_grad: largest norm of the gradient.
        resume: go on from folder/state.pt where there is one; False: remove it and the checkpoints,
            and begin anew.
        monitor: the column whose smallest value makes best.safetensors.
        save_every: seconds between saves of the state: what a crash can cost.
        save_steps: also every so many steps; 0: by the clock only.
        ckpt_interval: epochs between the files epochNNN.safetensors (with `keep_epochs`; NNN are
            done by then) and between figures.
        keep_epochs: keep them; each is as large as the model.
        save_at_end: write last.safetensors at the end only, and no best.safetensors.
        checkpoints: write best, last and epochNNN; the state from which a run is resumed is written
            in any case, and keeps the weights when it is done.
        order: key of ORDERS: "shuffled", or "resampled" (drawn with replacement, as published).
        step_in_backward: update each parameter as its gradient arrives, so that gradients need no
            more memory than the largest of them; the result is the same. A gradient that is not
            finite then keeps its own parameter from the update, not the others.
        num_workers: processes that read batches.
        device: "auto", "cuda" or "cpu".
        logger: called with (row of the history and figures of the epoch, steps so far) after each
            epoch, e.g. a `tracker`.
        draw: (model, epoch) -> figures by name, called as `validate` is, but by the main process
            alone, every `draw_interval` epochs and at the end.
        draw_interval: by default `ckpt_interval`; 0: at the end alone.

    Returns:
        The history, one row an epoch: epoch, train/..., val/..., train/lr, train/num_steps, skipped
            (non-finite steps), seconds, memory (GB, the most that this process has had resident so
            far, with all that it holds beside the training) and, on a GPU, gpu_memory (GB, there).

    Raises:
        PerceptError: for settings that are impossible or that differ from the run on disk, or when
            training cannot be kept finite.
        KeyboardInterrupt: after Ctrl-C, when the step is done and the state saved (SystemExit after
            SIGTERM).
    """
    settings = _Settings(
        epochs,
        batch_size,
        max_lr,
        seed,
        scheduler,
        weight_decay,
        decay,
        precision,
        clip_grad or None,
        len(dataset),
        order,
        warmup_steps,
        (betas[0], betas[1]),
        eps,
        accumulate,
        cycle_steps,
    )
    figures_every = ckpt_interval if draw_interval is None else draw_interval
    saving = _Saving(
        monitor,
        save_every,
        save_steps,
        ckpt_interval,
        keep_epochs,
        save_at_end,
        checkpoints,
        figures_every,
    )
    training = _Training(
        model, step, dataset, Path(folder), config, settings, saving, device, step_in_backward
    )
    training.begin(resume)
    if not training.finished:
        training.run(validate, num_workers, logger, draw)
    if training.sharded:
        training.sharded.engine.destroy()  # takes its hooks off the model
    model.eval()
    return pd.DataFrame(training.at.history)


class Tracker:
    """Sends the history and the figures of a training to Weights & Biases; as its own client does,
    it obeys WANDB_MODE=offline.

    Args:
        run: whose name, stage and parameters are sent along; a run that is resumed goes on under
            the same id.
        project: of Weights & Biases.
        name: shown for this run, by default the run's own.
        notes: about this run.
        host: address of a server of one's own, e.g. https://wandb.example.org; by default what
            `wandb login` or WANDB_BASE_URL say.
    """

    def __init__(self, run: Run, project: str, name: str = "", notes: str = "", host: str = ""):
        self.run, self.project, self.name, self.notes, self.host = (
            run,
            project,
            name or run.name,
            notes,
            host,
        )
        self._open: Any = None

    def __call__(self, row: dict[str, Any], step: int) -> None:
        """Log what `fit` gives after an epoch."""
        import wandb  # takes a second to import: only where it is used

        if self._open is None:
            settings = wandb.Settings(base_url=self.host) if self.host else None
            self._open = wandb.init(
                project=self.project,
                name=self.name,
                notes=self.notes or None,
                settings=settings,
                id=f"{self.run.name}-{self.run.stage}",
                resume="allow",
                dir=self.run.logs,
                job_type=self.run.stage,
                config=dict(self.run.parameters),
            )
        self._open.log(
            {k: wandb.Image(v) if isinstance(v, Figure) else v for k, v in row.items()}, step=step
        )

    def finish(self) -> None:
        """Send what is left."""
        if self._open is not None:
            self._open.finish()


def tracker(run: Run, wandb_log: bool, project: str, **options: str) -> Tracker | None:
    """A `Tracker` (with its `options`) for `fit`'s `logger`, or None where none is wanted: not at
    all, or not in this one of several processes.
    """
    return (
        Tracker(run, project, **options)
        if wandb_log and os.environ.get("RANK", "0") == "0"
        else None
    )


def load_best(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a model the weights of the best validation epoch in a folder of `fit`.

    Raises:
        PerceptError: if there are none, or they do not fit.
    """
    path = Path(folder) / "best.safetensors"
    if not path.exists():
        raise PerceptError(
            f"There is no {path}: train with a validate function and without save_at_end."
        )
    load_strictly(model, load_checkpoint(path)[0], str(path))
    return model.eval()
