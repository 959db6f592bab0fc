"""Small helpers that everything else relies on: paths, errors, files, checkpoints, and the
parameters of a stage.

- Every path hangs on ROOT (the repository) or HOME (where data/, train_logs/ and results/ lie:
  PERCEPT_HOME, by default ROOT).
- Files are written under a temporary name and renamed. Bad input raises PerceptError with one
  sentence.
- The parameters of a stage have one source, the notebook's cell tagged `parameters`, and one
  precedence everywhere: cell < recipe files in order < single overrides (papermill, flags of the
  exported script, PERCEPT_ARGS).
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm


def require_file(
    path: str | Path, what: str, remedy: str = "fetch it, or give the folder that holds it"
) -> Path:
    """`path`, if it is there.

    Raises:
        PerceptError: naming the file, what it holds and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(f"{path} ({what}) is missing: {remedy}.")
    return path


ROOT = Path(__file__).resolve().parents[1]

HOME = Path(os.environ.get("PERCEPT_HOME", ROOT)).expanduser().resolve()


class PerceptError(Exception):
    """Bad input, in one sentence."""

    def _render_traceback_(self) -> list[str]:
        return [f"PerceptError: {self}"]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` on success and removed on
    failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this context torch's CPU generator starts from `seed`; afterwards it is as it was
    before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def peak_memory(device: str = "auto") -> float:
    """The most memory that this process has had so far, in bytes: on the GPU where there is one
    (device "auto"), else resident (or with "cpu").
    """
    if to_device(device).startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    if (
        status := Path("/proc/self/status")
    ).exists():  # on Linux, ru_maxrss also holds what the process that started this one had
        return 1024.0 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1.0 if sys.platform == "darwin" else 1024.0
    )


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def save_checkpoint(
    path: str | Path, state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Write a state dict and its config into one safetensors file; of tensors, only those that
    share memory with others are copied.
    """
    tensors: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for key, value in state_dict.items():
        plain = value.detach().cpu().contiguous()
        tensors[key] = plain.clone() if plain.untyped_storage().data_ptr() in places else plain
        places.add(plain.untyped_storage().data_ptr())
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(config)})


def load_checkpoint(
    path: str | Path, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`: state dict and config."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(
            (file.metadata() or {}).get("config", "{}")
        )  # noqa: SIM118


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly."""
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if missing or extra or wrong:
        differs = f"missing {missing[:5]}, unexpected {extra[:5]}, wrong shape {wrong[:5]}"
        raise PerceptError(
            f"{origin} does not fit {type(module).__name__}: {differs}; take the checkpoint of this"
            " very model."
        )
    module.load_state_dict(state)


def progress(iterable: Iterable, desc: str = "", total: int | None = None) -> Iterable:
    """tqdm for a notebook and for a log."""
    return tqdm(iterable, desc=desc, total=total, mininterval=0.5 if sys.stderr.isatty() else 5)


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def to_device(device: str = "auto") -> str:
    """ "auto" -> "cuda" where there is one (of several processes, the GPU of this one, e.g.
    "cuda:1"), else "cpu".
    """
    if device != "auto":
        return device
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")  # set by torchrun and accelerate launch
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank else "cuda"


def same_features(recorded: Sequence[float], now: Sequence[float]) -> bool:
    """Whether a frozen model still gives what it gave: no feature is off by more than 2 % of the
    largest (of 1, if that is more).
    """
    most = 0.02 * max(1.0, max(map(abs, recorded), default=0.0))
    return len(recorded) == len(now) and all(
        abs(a - b) <= most for a, b in zip(recorded, now, strict=True)
    )


def mixed_precision(use_mp: bool, precision: str, device: str = "auto") -> str:
    """The precision that `use_mp` stands for where none is named: "fp16" on a GPU, "bf16" on a CPU."""
    return (
        ("fp16" if to_device(device).startswith("cuda") else "bf16")
        if use_mp and precision == "no"
        else precision
    )


def resolve(path: str) -> Path:
    """A path of a parameter: absolute as it is, else relative to HOME, else (if only there) to the
    repository.
    """
    given = Path(path).expanduser()
    if given.is_absolute():
        return given
    return ROOT / given if not (HOME / given).exists() and (ROOT / given).exists() else HOME / given


def require_extra(module: str, extra: str) -> ModuleType:
    """Import a module of a package that only some uses need.

    Args:
        module: full name of the module, e.g. "faiss".
        extra: the extra of pyproject.toml that installs it, e.g. "search".

    Raises:
        PerceptError: if the package is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PerceptError(
            f"This needs the package {error.name}, which is not installed: run"
            f" `bash setup.sh --extra {extra}`."
        ) from error
