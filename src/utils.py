"""Small helpers that everything else relies on: paths, devices, random numbers, progress.

- Every path hangs on ROOT (the repository) or HOME (where data/, train_logs/ and results/ lie:
  PERCEPT_HOME, by default ROOT).
- Files are written under a temporary name and renamed. Bad input raises PerceptError with one
  sentence. Both live in `src/files` and are handed on here.
- Importing this module is fast: heavy libraries such as torch are imported by the functions that
  use them, so that a command line answers at once.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from src.files.errors import PerceptError, UsageError
from src.files.names import MAX_NAME_BYTES, check_name, find_fault_of_name
from src.files.tensors import (
    check_weights,
    is_finite,
    load_checkpoint,
    load_strictly,
    open_tensors,
    parse_config,
    read_tensors,
    save_checkpoint,
)
from src.files.write_errors import write_errors
from src.files.writing import (
    atomic,
    check_writable,
    make_folder,
    read_json,
    require_file,
    write_json,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FEATURE_TOLERANCE",
    "HOME",
    "MAX_NAME_BYTES",
    "ROOT",
    "SEEDS",
    "PerceptError",
    "UsageError",
    "atomic",
    "check_home",
    "check_name",
    "allow_tf32",
    "check_gpu_is_usable",
    "check_weights",
    "check_writable",
    "count_parameters",
    "describe_peak_memory",
    "exact_products",
    "find_fault_of_name",
    "is_finite",
    "is_out_of_memory",
    "load_checkpoint",
    "load_strictly",
    "make_folder",
    "memory_errors",
    "mixed_precision",
    "open_tensors",
    "parse_config",
    "peak_memory",
    "progress",
    "read_json",
    "read_tensors",
    "require_extra",
    "require_file",
    "resolve",
    "same_features",
    "save_checkpoint",
    "seed_everything",
    "seeded",
    "to_device",
    "write_errors",
    "write_json",
]

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

HOME = Path(os.environ.get("PERCEPT_HOME") or ROOT).expanduser().resolve()

FEATURE_TOLERANCE = 0.02  # of the largest feature, see `same_features`

SEEDS = range(2**32)  # what numpy takes

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


# ------------------------------------------------------------------------------------------- paths
def check_home() -> None:
    """Refuse a PERCEPT_HOME that means another folder to each process.

    The kernels of notebooks stand in other folders than the commands that start them.

    Raises:
        UsageError: if it is a relative path.
    """
    home = os.environ.get("PERCEPT_HOME", "")
    if home and not Path(home).expanduser().is_absolute():
        raise UsageError(
            f"PERCEPT_HOME is {home!r}, a relative path, which is another folder to every process"
            f" that stands elsewhere: give it as an absolute one, here {HOME}."
        )


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


# ---------------------------------------------------------------------------------------- networks
def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def same_features(recorded: Sequence[float], current: Sequence[float]) -> bool:
    """Whether a frozen model still gives the features that were recorded of it.

    No feature may be off by more than 2 % of the largest one (of .005, if that is more: they are
    recorded to four decimals).
    """
    if len(recorded) != len(current):
        return False
    largest = max(map(abs, recorded), default=0.0)
    tolerance = FEATURE_TOLERANCE * max(0.005, largest)
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


def check_gpu_is_usable() -> None:
    """Refuse to run on the CPU beside a GPU that torch cannot use: its driver is too old for the
    CUDA of this torch, for instance. With CUDA_VISIBLE_DEVICES="" the CPU is meant.

    Raises:
        PerceptError: saying what was found.
    """
    import torch

    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if is_hidden or torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", NVIDIA_DRIVER.read_text())
    driver = version[1] if version else "of an unknown version"
    raise PerceptError(
        f"This machine has an NVIDIA driver ({driver}), but torch {torch.__version__} cannot use"
        f" its GPU (it was built for CUDA {torch.version.cuda or 'no version'}), and at full size"
        " the CPU would take weeks: update the driver, install the torch that fits it (README), or"
        ' set CUDA_VISIBLE_DEVICES="" to run on the CPU.'
    )


def allow_tf32() -> None:
    """Let a GPU multiply single-precision matrices in TF32, as published: for every stage alike.

    What is solved or compared leaves it out, see `exact_products`.
    """
    import torch

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


@contextmanager
def exact_products() -> Iterator[None]:
    """Context in which matrix products have all the digits of single precision: for equations that
    are solved and for similarities that are compared.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def describe_peak_memory(device: str = "auto") -> str:
    """The most memory used so far in words, e.g. "the peak was 71.3 of 80.0 GB"."""
    peak = f"the peak was {peak_memory(device) / 1e9:.1f}"
    if to_device(device).startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(to_device(device)).total_memory
            return f"{peak} of {total / 1e9:.1f} GB"
    return f"{peak} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or in this process."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    messages = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in messages)


@contextmanager
def memory_errors(doing: str, remedy: str, device: str = "auto") -> Iterator[None]:
    """Turn running out of memory into one PerceptError.

    Args:
        doing: what needs the memory, for the message, e.g. "generating images".
        remedy: what to lower, for the message.
        device: where it runs, for the peak.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PerceptError(
            f"Memory ran out while {doing} ({describe_peak_memory(device)}): {remedy}."
        ) from error


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
