"""Optimisers, parameter groups and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, OneCycleLR

from src.utils import PerceptError


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
