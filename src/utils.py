"""Small helpers that everything else relies on: paths, errors, files, checkpoints, devices.

- Every path hangs on ROOT (the repository) or HOME (where data/, train_logs/ and results/ lie:
  PERCEPT_HOME, by default ROOT).
- Files are written under a temporary name and renamed. Bad input raises PerceptError with one
  sentence.
- Importing this module is fast: heavy libraries such as torch are imported by the functions that
  use them, so that a command line answers at once.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

HOME = Path(os.environ.get("PERCEPT_HOME") or ROOT).expanduser().resolve()

MAKE_AGAIN = "copy it again, or run the stage that writes it again"

FEATURE_TOLERANCE = 0.02  # of the largest feature, see `same_features`

MAX_NAME_BYTES = 150  # of a run, a data set, ...; file systems allow 255 with all that is added

SEEDS = range(2**32)  # what numpy takes

LITTLE_SPACE = 1 << 20  # bytes; a disk with less free is full to a library that does not say why

# how libraries write that the system refused a write
NAMED_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ESTALE,
    errno.EIO,
)
ERROR_NUMBER = re.compile(r"(?:\[Errno |\berrno = |\bos error |\berrno: )(\d+)")
QUOTED_NAME = re.compile(r"name = '([^']+)'")  # h5py
WRITE_FAILED = re.compile(
    r"PytorchStreamWriter|enforce fail|iostream error|write failed|write error"
    r"|requested and \d+ written|disk is full|readonly database"
)


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
    reason = next(filter(None, map(find_fault_of_name, names)), "")
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


def find_fault_of_name(name: str) -> str:
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


def check_home() -> None:
    """Refuse a PERCEPT_HOME that means another folder to each process.

    The kernels of notebooks stand in other folders than the commands that start them.

    Raises:
        UsageError: if it is a relative path.
    """
    given = os.environ.get("PERCEPT_HOME", "")
    if given and not Path(given).expanduser().is_absolute():
        raise UsageError(
            f"PERCEPT_HOME is {given!r}, a relative path, which is another folder to every process"
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


# ------------------------------------------------------------------------------------------- files
@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence, whatever library raises it.

    A full or read-only disk, a quota, a folder that has vanished or may not be written, and a name
    that is too long are meant; other errors pass.

    Args:
        path: the file or folder that is written.

    Raises:
        PerceptError: naming it, the reason and what to do.
    """
    try:
        yield
    except PerceptError:
        raise
    except Exception as error:
        reason = _explain_failed_write(Path(path), error)
        if not reason:
            raise
        raise PerceptError(f"{path} could not be written: {reason}.") from error


def _explain_failed_write(path: Path, error: Exception) -> str:
    """Why a write failed and what to do, "" if it is not for the disk or the folder."""
    number, folder = _find_error_number(error), path.parent
    if _is_about_other_file(error, path):
        return ""
    if number is None and WRITE_FAILED.search(str(error)):  # torch, for instance, tells no more
        number = _probe_folder(folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if number in (errno.EEXIST, errno.ENOTDIR) and not existing.is_dir():
        return f"{existing} is a file where a folder is needed: move it away"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return _explain_absence(path, error, number)
    place, free = f"the disk that holds {folder}", _measure_free(existing)
    elsewhere = "set PERCEPT_HOME to a folder on"
    advice = {
        0: f"{_first_line(error)} ({free} on {place}): run this again",
        errno.ENOSPC: f"{place} filled up ({free}): free some space, or {elsewhere} a larger disk,"
        " and run this again (earlier files are intact)",
        errno.EDQUOT: f"your quota on {place} is used up: free some space, or {elsewhere} another"
        " disk, and run this again (earlier files are intact)",
        errno.EFBIG: f"it is larger than {place}, or a limit (ulimit -f), allows: {elsewhere}"
        " another disk",
        errno.EROFS: f"{place} is read-only: {elsewhere} a disk that you may write",
        errno.EACCES: f"you may not write there, on {place}: ask the owner of the folder, or"
        f" {elsewhere} a disk that you may write",
        errno.ENAMETOOLONG: f"its name is longer than {place} allows: choose a shorter one",
        errno.EIO: f"{place} reports an error ({_first_line(error)}): check the disk, and run this"
        " again",
        errno.EISDIR: "there is a folder of that name: move it away",
        errno.EEXIST: "there is a file of that name: move it away",
    }
    advice[errno.EPERM] = advice[errno.EACCES]
    return "" if number is None else advice.get(number, "")


def _explain_absence(path: Path, error: Exception, number: int) -> str:
    """Why something was not there that a write needs, "" if that was not its folder."""
    folder, named = path.parent, Path(str(getattr(error, "filename", "")))
    if not folder.is_dir() or number == errno.ESTALE:
        return f"the folder {folder} has vanished: see whether its disk is there, then try again"
    if named.name.startswith(f".{path.name}."):
        return "what was written of it has vanished: see that no other program cleans its folder"
    return ""


def _measure_free(folder: Path) -> str:
    """How much a disk has free, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        return "it does not say what is free"


def _find_error_number(error: BaseException) -> int | None:
    """The number that the system gave to an error: its own, or one that its text holds."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    numbered = ERROR_NUMBER.search(str(error))
    if numbered:
        return int(numbered[1])
    return next((n for n in NAMED_ERRORS if os.strerror(n) in str(error)), None)


def _is_about_other_file(error: Exception, path: Path) -> bool:
    """Whether an error is about a file that is not in the folder of `path`, such as one to read."""
    quoted = QUOTED_NAME.search(str(error))
    name = getattr(error, "filename", None) or (quoted and quoted[1])
    if not isinstance(name, str | os.PathLike):
        return False
    folder, named = path.parent.absolute(), Path(os.path.abspath(name))
    return named not in (folder, *folder.parents) and not named.is_relative_to(folder)


def _probe_folder(folder: Path) -> int:
    """Number of the error that a write to a folder would meet, 0 if none is seen."""
    if not folder.is_dir():
        return errno.ENOENT
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return errno.EROFS
    if not os.access(folder, os.W_OK | os.X_OK):
        return errno.EACCES
    return errno.ENOSPC if shutil.disk_usage(folder).free < LITTLE_SPACE else 0


def _first_line(error: BaseException) -> str:
    """Beginning of an error's message, for a sentence."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line[:200].rstrip(". ")


def make_folder(path: str | Path) -> Path:
    """Make a folder, and those above it, unless it is there.

    Raises:
        PerceptError: as `write_errors`.
    """
    with write_errors(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def name_temporary(path: str | Path, kind: str = "tmp") -> Path:
    """The name beside `path` under which this process writes before it renames."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


unfinished: set[Path] = set()  # what this process is writing under temporary names


def check_writable(folder: str | Path) -> None:
    """Refuse to begin long work whose result could not be written.

    Raises:
        PerceptError: as `write_errors`, if a file cannot be made in the folder.
    """
    probe = name_temporary(make_folder(folder) / "probe")
    with write_errors(Path(folder) / "files"):
        probe.touch()
        probe.unlink()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`.

    The file is renamed to `path` on success and removed on failure. Its permissions are those of
    any new file.

    Raises:
        PerceptError: as `write_errors`.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = name_temporary(path)
    unfinished.add(temporary.absolute())
    try:
        with write_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:  # safetensors writes for the owner alone
                temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        unfinished.discard(temporary.absolute())
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path: str | Path, keys: Sequence[str] | None = None, remedy: str = MAKE_AGAIN) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        keys: that it must have, as an object; None: it may hold anything.
        remedy: what to do where it cannot be used, for the message.

    Raises:
        PerceptError: naming the file, if it is missing, may not be read, is empty, damaged, cut off
            or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _explain_unopened(path, error, remedy) from error
    except (ValueError, RecursionError) as error:
        raise PerceptError(
            f"{path} is no JSON file, or is damaged or cut off ({error}): {remedy}."
        ) from error
    if keys is None:
        return content
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise PerceptError(
            f"{path} is no such file as is expected here: it has no {', '.join(missing)} in it;"
            f" {remedy}."
        )
    return content


def _explain_unopened(path: str | Path, error: OSError, remedy: str) -> PerceptError:
    """The error to raise for a file that could not be opened."""
    if isinstance(error, FileNotFoundError):
        return PerceptError(f"{path} is missing: {remedy}.")
    if isinstance(error, PermissionError):
        return PerceptError(f"{path} may not be read by this user: ask its owner for the right.")
    reason = error.strerror or error
    return PerceptError(f"{path} cannot be read ({reason}): {remedy}.")


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


@contextmanager
def open_tensors(
    path: str | Path, framework: str = "pt", device: str = "cpu", remedy: str = MAKE_AGAIN
) -> Iterator[Any]:
    """Open a safetensors file; yields the handle of safetensors' `safe_open`.

    The file's own head is checked against its size, so that none can announce more than it holds.

    Args:
        path: the file.
        framework: "pt" for tensors of torch, "np" for arrays.
        device: where tensors go.
        remedy: what to do where it cannot be used, for the message.

    Raises:
        PerceptError: naming the file, if it is missing, may not be read, is damaged, cut off or
            something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        try:
            handle = safe_open(require_file(path, "tensors", remedy), framework, device=device)
        except OSError as error:
            raise _explain_unopened(path, error, remedy) from error
        with handle as file:
            yield file
    except SafetensorError as error:
        raise PerceptError(
            f"{path} is no safetensors file, or is damaged or cut off ({error}): {remedy}."
        ) from error


def read_tensors(
    path: str | Path,
    required: Iterable[str] = (),
    device: str = "cpu",
    remedy: str = MAKE_AGAIN,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all of a safetensors file: tensors by name, and the texts stored with them.

    Raises:
        PerceptError: as `open_tensors`, or if a tensor that is required is not in it.
    """
    with open_tensors(path, device=device, remedy=remedy) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        texts = dict(file.metadata() or {})
    missing = [name for name in required if name not in tensors]
    if missing:
        raise PerceptError(f"{path} has no {', '.join(missing)} in it: {remedy}.")
    return tensors, texts


def parse_config(texts: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    """The config among the texts that a checkpoint stores, {} where it has none.

    Raises:
        PerceptError: naming the file, if the config is no JSON object.
    """
    try:
        config = json.loads((texts or {}).get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise PerceptError(
            f"{path} carries a config that is no JSON ({error}): take the checkpoint as it was"
            " written."
        ) from error
    if not isinstance(config, dict):
        raise PerceptError(
            f"{path} carries a config that is a {type(config).__name__}, not an object: take the"
            " checkpoint as it was written."
        )
    return config


def load_checkpoint(
    path: str | Path, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`: state dict and config.

    Raises:
        PerceptError: as `open_tensors` and `parse_config`.
    """
    remedy = "copy it again, or train again"
    state_dict, texts = read_tensors(path, device=str(device), remedy=remedy)
    return state_dict, parse_config(texts, path)


def load_strictly(module: nn.Module, state_dict: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: receives the weights.
        state_dict: the weights, under the keys of the module.
        origin: where they come from, for the message.

    Raises:
        PerceptError: naming keys that are missing or unexpected, and weights of another shape, of
            another kind (whole numbers for fractions), or that are not finite.
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
    check_weights(state_dict, expected, origin)
    module.load_state_dict(state_dict)


def check_weights(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], origin: str
) -> None:
    """Refuse weights that torch would convert without a word, and those that are not finite.

    Args:
        state_dict: the weights by key.
        expected: those of the network that takes them, by the same keys.
        origin: where they come from, for the message.

    Raises:
        PerceptError: naming the first such weight.
    """
    for key, tensor in state_dict.items():
        kind, expected_kind = _name_kind(tensor), _name_kind(expected[key])
        if kind != expected_kind and not _is_counter(tensor, expected[key]):
            raise PerceptError(
                f"{origin} holds {key} as {kind} ({tensor.dtype}) where the network has"
                f" {expected_kind}: take the checkpoint as it was written."
            )
        if not is_finite(tensor):
            raise PerceptError(
                f"{origin} holds NaN or infinity in {key}: its training had broken down, or the"
                " file is damaged; take another checkpoint, or train again."
            )


def _is_counter(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a tensor holds one whole number that was stored as a fraction, such as the number of
    batches that a batch norm has seen.
    """
    is_number = tensor.numel() == 1 and not expected.is_floating_point()
    return is_number and not tensor.is_complex() and float(tensor).is_integer()


def _name_kind(tensor: torch.Tensor) -> str:
    """What a tensor holds, in words."""
    if tensor.is_floating_point():
        return "fractions"
    if tensor.is_complex():
        return "complex numbers"
    return "whole numbers"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, without a copy of the tensor."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.itemsize == 1:  # of which torch has no extremes
        tensor = tensor.float()
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


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
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


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
