"""Small helpers that everything else relies on: paths, errors, files, checkpoints, devices.

- Every path hangs on ROOT (the repository) or HOME (where data/, train_logs/ and results/ lie:
  PERCEPT_HOME, by default ROOT).
- Files are written under a temporary name and renamed. Bad input raises PerceptError with one
  sentence.
- Importing this module is fast: heavy libraries such as torch are imported by the functions that
  use them, so that a command line answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

HOME = Path(os.environ.get("PERCEPT_HOME", ROOT)).expanduser().resolve()

FEATURE_TOLERANCE = 0.02  # of the largest feature, see `same_features`

MAX_NAME_BYTES = 150  # of a run, a data set, ...; file systems allow 255 with all that is added

SEEDS = range(2**32)  # what numpy takes


class PerceptError(Exception):
    """Bad input, in one sentence."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback."""
        return [f"PerceptError: {self}"]


class UsageError(PerceptError):
    """A command line, recipe or parameter that cannot be used; programs end with exit code 2."""


# ------------------------------------------------------------------------------------------- paths
def check_name(name: object, what: str, parts: int = 1) -> str:
    """Return a name that becomes part of a path, if it cannot lead anywhere else.

    Args:
        name: of a run, a data set, a cache entry, a file on a server, ...
        what: what it names, for the message, e.g. "model_name".
        parts: how many names it may hold, separated by slashes, as in the run <sweep>/<point>.

    Raises:
        UsageError: if a part is empty, begins with a dot, a dash, a tilde or a space, ends with a
            space, holds a backslash or a character that cannot be printed (such as the end of a
            line), or has more than MAX_NAME_BYTES bytes; or if there are too many parts.
    """
    text = str(name)
    names = text.split("/")
    reason = next(filter(None, map(_find_fault_of_name, names)), "")
    if len(names) > parts:
        reason = "holds a slash" if parts == 1 else f"has more than {parts} parts between slashes"
    if reason:
        shown = repr(text if len(text) <= 80 else f"{text[:80]}...")
        raise UsageError(
            f"{what} is {shown}, which {reason}, so it cannot name a file or folder: choose"
            f" a name of at most {MAX_NAME_BYTES} letters, digits and - _ . that begins with a"
            " letter or a digit."
        )
    return text


def _find_fault_of_name(name: str) -> str:
    """Why a name cannot be that of a file or folder, "" if it can."""
    if not name:
        return "is empty or absolute, or has an empty part"
    if name in (".", ".."):
        return "leads to another folder"
    if name[0] in ".-~":
        return f"has a part that begins with {name[0]!r}"
    if "\\" in name:
        return "holds a backslash"
    if not name.isprintable():
        return "holds a character that cannot be printed"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return ""


def require_file(
    path: str | Path, description: str, remedy: str = "fetch it, or give the folder that holds it"
) -> Path:
    """Return `path` if there is such a file or folder.

    Args:
        path: file or folder.
        description: what it holds, for the message.
        remedy: what to do where it is missing, for the message.

    Raises:
        PerceptError: naming the file, what it holds and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(f"{path} ({description}) is missing: {remedy}.")
    return path


def resolve(path: str) -> Path:
    """Resolve a path that is a parameter.

    An absolute path stays as it is. A relative one hangs on HOME, or on the repository where it
    exists only there.
    """
    expanded = Path(path).expanduser()
    if expanded.is_absolute():
        return expanded
    in_home, in_repository = HOME / expanded, ROOT / expanded
    if in_repository.exists() and not in_home.exists():
        return in_repository
    return in_home


# ------------------------------------------------------------------------------------------- files
@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`.

    The file is renamed to `path` on success and removed on failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


# ------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(
    path: str | Path, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    """Write a state dict and its config into one safetensors file.

    Of the tensors, only those that share memory with others are copied.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(config)})


def load_checkpoint(
    path: str | Path, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`: state dict and config."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(device)) as file:
        state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    return state_dict, json.loads(metadata.get("config", "{}"))


def load_strictly(module: nn.Module, state_dict: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: receives the weights.
        state_dict: the weights, under the keys of the module.
        origin: where they come from, for the message.

    Raises:
        PerceptError: naming keys that are missing or unexpected, and weights of another shape.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(state_dict))
    unexpected = sorted(set(state_dict) - set(expected))
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise PerceptError(
            f"{origin} does not fit {type(module).__name__}: missing {missing[:5]}, unexpected"
            f" {unexpected[:5]}, wrong shape {misshapen[:5]}; take the checkpoint of this very"
            " model."
        )
    module.load_state_dict(state_dict)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def same_features(recorded: Sequence[float], current: Sequence[float]) -> bool:
    """Whether a frozen model still gives the features that were recorded of it.

    No feature may be off by more than 2 % of the largest one (of 1, if that is more).
    """
    if len(recorded) != len(current):
        return False
    largest = max(map(abs, recorded), default=0.0)
    tolerance = FEATURE_TOLERANCE * max(1.0, largest)
    return all(abs(a - b) <= tolerance for a, b in zip(recorded, current, strict=True))


# --------------------------------------------------------------------------- devices and randomness
def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch.

    Raises:
        UsageError: for a seed below 0 or beyond 32 bits.
    """
    if seed not in SEEDS:
        raise UsageError(f"seed is {seed}, but must be at least 0 and at most {SEEDS[-1]}.")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from `seed` within this context.

    Afterwards the generator is as it was before.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def to_device(device: str = "auto") -> str:
    """Device that "auto" stands for: "cuda" where there is one, else "cpu".

    Of several processes each has a GPU, e.g. "cuda:1". Any other device is returned as it is.
    """
    if device != "auto":
        return device
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")  # set by torchrun and accelerate launch
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank else "cuda"


def mixed_precision(use_mp: bool, precision: str, device: str = "auto") -> str:
    """Precision of a training: `precision`, or where it is "no" the one that `use_mp` stands for.

    That is "fp16" on a GPU and "bf16" on a CPU.
    """
    if not use_mp or precision != "no":
        return precision
    return "fp16" if to_device(device).startswith("cuda") else "bf16"


def peak_memory(device: str = "auto") -> float:
    """Largest memory that this process has used so far, in bytes.

    Of the GPU where there is one (device "auto"), else resident memory (also with "cpu"); 0 on a
    system that does not tell.
    """
    if to_device(device).startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    # on Linux, ru_maxrss also holds what the process that started this one had
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    if peak is not None:
        return 1024.0 * int(peak[1])
    try:
        import resource  # here, as Windows has none and must be able to import this module
    except ModuleNotFoundError:
        return 0.0
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------- notebook and log
def progress(iterable: Iterable[T], desc: str = "", total: int | None = None) -> Iterable[T]:
    """Show the progress of a loop, in a notebook and in a log."""
    from tqdm.auto import tqdm

    interval = 0.5 if sys.stderr.isatty() else 5.0
    bar: Iterable[T] = tqdm(iterable, desc=desc, total=total, mininterval=interval)
    return bar


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
