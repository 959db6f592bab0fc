"""The state of a training that an interrupted one goes on from."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.training.types import log
from src.utils import PerceptError


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
