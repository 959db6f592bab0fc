"""The options of `fit`, grouped by concern, and the ones that a resumed run must share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from src.training.types import Draw, Logger
from src.utils import PerceptError


@dataclass(frozen=True)
class Batching:
    """How a training walks through its samples.

    Attributes:
        epochs: passes over the dataset.
        batch_size: samples a step, over all processes.
        seed: of the order and of everything random in the steps (process n has seed + n).
        order: key of `ORDERS`: "shuffled", or "resampled" (drawn with replacement, as published).
        accumulate: parts in which a batch is worked through before the one update, to save memory;
            a loss must then be a mean over samples.
    """

    epochs: int
    batch_size: int
    seed: int = 42
    order: str = "shuffled"
    accumulate: int = 1


@dataclass(frozen=True)
class Optimisation:
    """AdamW and its learning rate.

    Attributes:
        max_lr: peak learning rate; never scaled.
        scheduler: key of `SCHEDULERS`: "cycle" (MindEye's), "linear", "fixed", or "warmup" (rises
            to max_lr, then fixed); it advances once a step.
        warmup_steps: of the schedules "warmup" and "cycle"; 0: two epochs of a cycle, at most half.
        cycle_steps: length of the schedule "cycle" in steps, where the run walks through a part of
            it only; 0: as many as the run has.
        betas, eps, weight_decay: of AdamW.
        decay: key of `DECAYS`: which parameters weight decay leaves out.
        clip_grad: largest norm of the gradient; None or 0: any.
        weight_average: decay of an exponential average of the weights over steps, which is then
            validated, written and given back; 0: none.
    """

    max_lr: float
    scheduler: str = "cycle"
    warmup_steps: int = 0
    cycle_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay: str = "no_norms"
    clip_grad: float | None = None
    weight_average: float = 0.0


@dataclass(frozen=True)
class Execution:
    """On what a training runs.

    Attributes:
        device: "auto", "cuda" or "cpu".
        precision: "no", "bf16" or "fp16" (the whole step runs under autocast).
        num_workers: processes that read batches.
        step_in_backward: update each parameter as its gradient arrives, so that gradients need no
            more memory than the largest of them; the result is the same. A gradient that is not
            finite then keeps its own parameter from the update, not the others.
    """

    device: str = "auto"
    precision: str = "no"
    num_workers: int = 0
    step_in_backward: bool = False


@dataclass(frozen=True)
class Checkpointing:
    """What a training writes, and when.

    Attributes:
        resume: go on from state.pt where there is one; False: remove it and the checkpoints, and
            begin anew.
        monitor: the column of the history whose smallest value makes best.safetensors.
        save_every: seconds between saves of the state: what a crash can cost.
        save_steps: also save every so many steps; 0: by the clock only.
        ckpt_interval: epochs between the files epochNNN.safetensors (with `keep_epochs`; NNN are
            done by then) and between figures.
        keep_epochs: keep these files; each is as large as the model.
        save_at_end: write last.safetensors at the end only, and no best.safetensors.
        checkpoints: write best, last and epochNNN; the state from which a run is resumed is written
            in any case, and keeps the weights when it is done.
    """

    resume: bool = True
    monitor: str = "val/loss"
    save_every: float = 300.0
    save_steps: int = 0
    ckpt_interval: int = 5
    keep_epochs: bool = False
    save_at_end: bool = False
    checkpoints: bool = True


@dataclass(frozen=True)
class Reporting:
    """What a training shows while it runs; by the main process alone.

    Attributes:
        logger: called with (row of the history and figures of the epoch, steps so far) after each
            epoch, e.g. from `open_tracker`.
        draw: (model, epoch) -> figures by name, called in eval mode and without gradient, every
            `draw_interval` epochs and at the end.
        draw_interval: by default `ckpt_interval`; 0: at the end alone.
    """

    logger: Logger | None = None
    draw: Draw | None = None
    draw_interval: int | None = None


def describe_run(
    batching: Batching, optimisation: Optimisation, execution: Execution, samples: int
) -> dict[str, Any]:
    """The settings that must be the same for a run to be resumed, by name.

    Settings that came later than the first runs are left out at their defaults: such a run is what
    it was without them.
    """
    settings: dict[str, Any] = {
        "epochs": batching.epochs,
        "batch_size": batching.batch_size,
        "max_lr": optimisation.max_lr,
        "seed": batching.seed,
        "scheduler": optimisation.scheduler,
        "weight_decay": optimisation.weight_decay,
        "decay": optimisation.decay,
        "precision": execution.precision,
        "clip_grad": optimisation.clip_grad or None,
        "samples": samples,
        "order": batching.order,
    }
    later = {
        "warmup_steps": (optimisation.warmup_steps, Optimisation.warmup_steps),
        "betas": (tuple(optimisation.betas), Optimisation.betas),
        "eps": (optimisation.eps, Optimisation.eps),
        "accumulate": (batching.accumulate, Batching.accumulate),
        "cycle_steps": (optimisation.cycle_steps, Optimisation.cycle_steps),
        "weight_average": (optimisation.weight_average, Optimisation.weight_average),
    }
    changed = {name: value for name, (value, default) in later.items() if value != default}
    return settings | changed


def count_steps(batching: Batching, samples: int, processes: int) -> int:
    """Steps of an epoch, an incomplete last batch left out.

    Raises:
        PerceptError: for no epoch, or a batch that samples, processes or parts do not allow.
    """
    batch_size, accumulate = batching.batch_size, batching.accumulate
    if batching.epochs < 1 or batch_size < 1:
        raise PerceptError(
            f"Training needs at least one epoch and a batch of one, not {batching.epochs} and"
            f" {batch_size}."
        )
    if batch_size % processes:
        raise PerceptError(
            f"A batch_size of {batch_size} cannot be split over {processes} processes: choose a"
            f" multiple of {processes}."
        )
    if accumulate < 1 or batch_size // processes % accumulate:
        parts = f"{accumulate} equal parts"
        if processes > 1:
            parts += f" on each of {processes} processes"
        raise PerceptError(
            f"A batch_size of {batch_size} cannot be worked through in {parts}: choose a multiple."
        )
    if samples < batch_size:
        raise PerceptError(
            f"There are {samples} training samples, fewer than one batch of {batch_size}: choose a"
            " smaller batch_size."
        )
    return samples // batch_size
