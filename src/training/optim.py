"""Optimisers, parameter groups and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, OneCycleLR

from src.training.options import Optimisation
from src.utils import PerceptError


def _cycle(
    optimizer: Optimizer, max_lr: float, epochs: int, steps: int, warmup: int = 0, length: int = 0
) -> LRScheduler:
    """One cycle; where no warm-up is asked for it lasts two epochs, but never more than half of the
    run.

    `length`: steps of the cycle, where it is longer than the run.
    """
    total = length or epochs * steps
    # torch divides by zero where a warm-up lasts one step
    share = min(0.5, 2 / epochs) if total > 2 else 0.1
    if warmup:
        share = min(0.9, warmup / total)
    return OneCycleLR(optimizer, max_lr, total_steps=total, pct_start=share, final_div_factor=1000)


def _linear(
    optimizer: Optimizer, max_lr: float, epochs: int, steps: int, warmup: int = 0, length: int = 0
) -> LRScheduler:
    """From max_lr / 3 to max_lr, over the run."""
    return LinearLR(optimizer, total_iters=epochs * steps)


def _fixed(
    optimizer: Optimizer, max_lr: float, epochs: int, steps: int, warmup: int = 0, length: int = 0
) -> LRScheduler:
    return ConstantLR(optimizer, factor=1.0)


def _warmup(
    optimizer: Optimizer, max_lr: float, epochs: int, steps: int, warmup: int = 0, length: int = 0
) -> LRScheduler:
    """Up to max_lr in `warmup` steps, then fixed."""
    return LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)


# of optimizer, max_lr, epochs, steps an epoch, steps of the warm-up, steps of the cycle
SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "cycle": _cycle,
    "linear": _linear,
    "fixed": _fixed,
    "warmup": _warmup,
}


def _find_norm_gains(model: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers."""
    gains = set()
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for parameter, _ in module.named_parameters(recurse=False):
                gains.add(f"{name}.{parameter}".lstrip("."))
    return gains


def _find_no_gains(model: nn.Module) -> set[str]:
    """None: the published systems let the gains of their norms decay."""
    return set()


# model -> names that weight decay leaves out, beside those that contain "bias"
DECAYS: dict[str, Callable[[nn.Module], set[str]]] = {
    "no_norms": _find_norm_gains,
    "published": _find_no_gains,
}


def group_parameters(
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
    spared = find_entry(DECAYS, decay, "decay")(model)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = undecayed if "bias" in name or name in spared else decayed
            group.append(parameter)
    if not decayed and not undecayed:
        raise PerceptError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad on what shall be"
            " trained."
        )
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, Any]], optimisation: Optimisation) -> Optimizer:
    """AdamW over groups of parameters, fused where all of them allow it."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    betas = (optimisation.betas[0], optimisation.betas[1])
    return torch.optim.AdamW(
        groups, lr=optimisation.max_lr, betas=betas, eps=optimisation.eps, fused=fused
    )


def build_scheduler(
    optimizer: Optimizer, optimisation: Optimisation, epochs: int, steps_per_epoch: int
) -> LRScheduler:
    """The learning-rate schedule of a run.

    Raises:
        PerceptError: for an unknown schedule, or a length that this one does not have.
    """
    name, length = optimisation.scheduler, optimisation.cycle_steps
    warmup_steps, total = optimisation.warmup_steps, epochs * steps_per_epoch
    make_scheduler = find_entry(SCHEDULERS, name, "scheduler")
    if warmup_steps and name not in ("warmup", "cycle"):
        raise PerceptError(
            f"The schedule '{name}' has no warmup_steps to set: choose 'warmup' or 'cycle', or"
            " leave them at 0."
        )
    if length and (name != "cycle" or length < total):
        raise PerceptError(
            f"cycle_steps is {length}: it is for the schedule 'cycle' and at least the {total}"
            " steps of the run."
        )
    scheduler: LRScheduler = make_scheduler(
        optimizer, optimisation.max_lr, epochs, steps_per_epoch, warmup_steps, length
    )
    return scheduler


def find_entry(registry: dict[str, Any], name: str, title: str) -> Any:
    """The entry of that name.

    Raises:
        PerceptError: for an unknown one, with those to choose from.
    """
    if name not in registry:
        raise PerceptError(f"There is no {title} '{name}': choose one of {', '.join(registry)}.")
    return registry[name]
