"""What a training that was interrupted goes on from: position, running means, random generators."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.utils import PerceptError


class RunningMeans:
    """Weighted means of logged values, by name.

    Tensors are summed where they are, so that adding does not wait for a GPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}

    def add(self, values: dict[str, Any], weight: float = 1, counts: Tensor | None = None) -> None:
        """Take in one value by name, each a scalar tensor or a number.

        `counts`: whether they count at all, a Boolean on the device, which only that knows yet.
        """
        share: Any = weight if counts is None else weight * counts.double()
        for name, value in values.items():
            number = value.detach().double() if isinstance(value, Tensor) else float(value)
            if counts is not None:  # what is not finite must not be multiplied by 0
                number = torch.where(counts, number, 0.0)
            self.sums[name] = self.sums.get(name, 0.0) + number * share
            self.weights[name] = self.weights.get(name, 0) + share

    def state(self) -> dict[str, list[float]]:
        """[sum, weight] by name, without those that nothing counted for."""
        state = {}
        for name, total in self.sums.items():
            weight = float(self.weights[name])
            if weight:
                state[name] = [float(total), weight]
        return state

    def load(self, states: list[dict[str, list[float]]]) -> None:
        """Replace the sums by those of several processes together."""
        self.sums, self.weights = {}, {}
        for state in states:
            for name, (total, weight) in state.items():
                self.sums[name] = self.sums.get(name, 0.0) + total
                self.weights[name] = self.weights.get(name, 0) + weight

    def values(self) -> dict[str, float]:
        """The means by name."""
        return {name: total / weight for name, (total, weight) in self.state().items()}


@dataclass
class Position:
    """Where a run stands; its fields are what state.pt holds.

    Attributes:
        epoch: the epoch that is being trained.
        step: steps done within the epoch.
        skipped: steps of the epoch without a finite loss and gradient.
        bad: such steps in a row.
        rollbacks: returns to the last saved weights since the state was saved.
        best: smallest value of the monitored column.
        lr: learning rate of the last step.
        seconds: spent in the epoch.
        history: one row an epoch.
    """

    epoch: int = 0
    step: int = 0
    skipped: int = 0
    bad: int = 0
    rollbacks: int = 0
    best: float = math.inf
    lr: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of python, numpy, torch and CUDA, as types that load without
    pickle's dangers.
    """
    _, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Bring all generators back to what `get_random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{name}.{key}".lstrip("."))
    return flat


def check_same_settings(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run under other settings or with other data, naming the first that
    differs. A run of an earlier version, which did not record its data, is taken as it is.
    """
    before, after = _flatten(saved), _flatten(current)
    missing = "not there"
    names = list({**before, **after})
    if "data" not in saved:
        names = [name for name in names if not name.startswith("data.")]
    differing = [k for k in names if before.get(k, missing) != after.get(k, missing)]
    if differing:
        first = differing[0]
        further = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise PerceptError(
            f"{folder} holds a run in which {first} was {before.get(first, missing)!r}, now it is"
            f" {after.get(first, missing)!r}{further}: choose another model_name, or set"
            " resume_from_ckpt to False to begin anew."
        )
