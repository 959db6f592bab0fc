"""Memory of a training: a step is traced with tensors that have shapes and no memory."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

# what a training imports besides the modules of the dry run
TRAINING_MODULES = (
    "src.training",
    "src.training.augment",
    "src.figures",
    "src.metrics",
    "src.networks.released",
)

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

Event = tuple[str, int]  # "activation" or "parameter", and its bytes


def measure_base_memory() -> float:
    """Memory of this process with the libraries that a stage imports, before it has a model, in
    bytes.
    """
    for name in TRAINING_MODULES:
        importlib.import_module(name)
    return float(psutil.Process(os.getpid()).memory_info().rss)


def estimate_training_memory(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    precision: str = "no",
    step_in_backward: bool = False,
) -> dict[str, float]:
    """Memory of training a model with AdamW, in bytes: weights, optimizer, activations and
    gradients at their peak.

    Args:
        build: makes the model.
        loss: model -> scalar loss of a batch, made of tensors that it makes itself.
        precision: as `fit`.
        step_in_backward: as `fit`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build()
        autocast = HALF_PRECISIONS.get(precision)
        events = trace_step(model, lambda: loss(model), autocast)
        weights = trained = 0
        for parameter in model.parameters():
            size = parameter.numel() * parameter.element_size()
            weights += size
            trained += size if parameter.requires_grad else 0
    return {
        "weights": weights,
        "optimizer state": 2 * trained,
        "activations and gradients": find_backward_peak(events, step_in_backward),
    }


def trace_step(
    model: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None
) -> list[Event]:
    """What autograd keeps in the forward pass, in order, each storage once.

    Args:
        model: made of tensors without memory (under a FakeTensorMode, which must be active).
        loss: runs the forward pass.
        autocast: precision of the forward pass, if not single.
    """
    parameters = {p.untyped_storage()._cdata: p for p in model.parameters()}
    tensors: dict[int, Tensor] = {}  # by storage; held, so that no later storage takes its place
    events: list[Event] = []

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key in tensors:
            return x
        tensors[key] = x
        if key not in parameters:
            events.append(("activation", x.untyped_storage().nbytes()))
        elif parameters[key].requires_grad:
            events.append(_list_parameter(parameters[key]))
        return x

    context = torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), context:
        loss()
    # of some parameters the value is not needed on the way back, as of the first layer's
    further = [p for key, p in parameters.items() if key not in tensors and p.requires_grad]
    return [_list_parameter(p) for p in further] + events


def _list_parameter(parameter: nn.Parameter) -> Event:
    return ("parameter", parameter.numel() * parameter.element_size())


def find_backward_peak(events: list[Event], step_in_backward: bool) -> int:
    """Largest sum of activations and gradients on the way back through the events of `trace_step`,
    in bytes.

    Args:
        events: of the forward pass.
        step_in_backward: whether a gradient is applied and freed as soon as it is there.
    """
    current = sum(size for kind, size in events if kind == "activation")
    peak = current
    for kind, size in reversed(events):
        if kind == "activation":
            current -= size
            continue
        peak = max(peak, current + size)
        if not step_in_backward:
            current += size
    return max(peak, current)
