"""Unpickling that runs no code: the only unpicklers of the project, in one file to audit."""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import re
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError as UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from src.files.foreign import READ_ERRORS, explain_head, explain_unreadable, shorten
from src.utils import PerceptError, require_file


# --------------------------------------------------------------------- released PyTorch checkpoints
class InertObject:
    """Stands for whatever a file holds besides tensors, numbers and containers.

    It takes anything and does nothing.
    """

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __call__(self, *args: object, **kwargs: object) -> InertObject:
        """Called like a function or as a method."""
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    append = extend = add = __call__  # the file fills a container of a type that is not rebuilt


class _InertDtype(InertObject):
    """What numpy pickles of the type of a number: its code, e.g. "f8", and then its byte order."""

    def __init__(self, code: object = "", *flags: object):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "?"
        self.order = order if order in ("<", ">", "|") else "?"

    @property
    def is_plain_number(self) -> bool:
        return self.order != "?" and bool(re.fullmatch(r"f[248]|[iu][1248]|b1", self.code))


def _rebuild_number(dtype: object = None, data: object = b"") -> object:
    """A numpy scalar as a number of Python; anything else stays inert."""
    if not isinstance(dtype, _InertDtype) or not dtype.is_plain_number:
        return InertObject()
    if not isinstance(data, bytes) or len(data) != int(dtype.code[1]):
        return InertObject()
    number: object = np.frombuffer(data, np.dtype(dtype.order + dtype.code))[0].item()
    return number


def _encode_latin1(text: object = "", encoding: object = "") -> object:
    """Bytes, which older pickles spell as text."""
    if isinstance(text, str) and encoding == "latin1":
        return text.encode("latin1")
    return InertObject()


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *further: Any) -> Tensor:
    """A tensor of a file, unless it announces more numbers than the file holds for it."""
    stored = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if math.prod(size) > stored:
        raise UnpicklingError(
            f"a tensor of {' x '.join(map(str, size))} numbers has {stored} in the file"
        )
    tensor: Tensor = torch._utils._rebuild_tensor_v2(  # type: ignore[no-untyped-call]
        storage, offset, size, stride, *further
    )
    return tensor


_TRUSTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("numpy", "dtype"): _InertDtype,
    ("numpy.core.multiarray", "scalar"): _rebuild_number,  # numpy 1
    ("numpy._core.multiarray", "scalar"): _rebuild_number,  # numpy 2
    ("_codecs", "encode"): _encode_latin1,
    ("torch", "Size"): torch.Size,
}


class TensorsOnlyUnpickler(pickle.Unpickler):
    """Builds tensors, numbers and containers; anything else becomes an InertObject."""

    def find_class(self, module: str, name: str) -> Any:
        """What the file is given for a name that it asks for."""
        return _TRUSTED.get((module, name), InertObject)


def _load_tensors_only(file: BinaryIO, **options: Any) -> Any:
    return TensorsOnlyUnpickler(file, **options).load()


TENSORS_ONLY_PICKLE = types.ModuleType("tensors_only")  # torch.load wants a module
TENSORS_ONLY_PICKLE.__dict__.update(Unpickler=TensorsOnlyUnpickler, load=_load_tensors_only)


def load_torch_file(path: str | Path) -> Any:
    """Load the whole of a released file: its containers, numbers and tensors.

    The tensors are mapped and not yet read; anything else is inert.

    Raises:
        PerceptError: if the file is missing, damaged, a TorchScript archive, or of a format that
            was given up before the files of these systems were released.
    """
    path, remedy = Path(path), "download it again"
    if not path.exists():
        raise PerceptError(
            f"There is no checkpoint at {path}: download it, or correct the name of the run."
        )
    is_zip = _check_archive(path, remedy)
    with _file_errors(path, remedy):
        if not is_zip:
            raise UnpicklingError("it is no archive that PyTorch 1.6 or later writes")
        return torch.load(
            path,
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=TENSORS_ONLY_PICKLE,
        )


def load_plain_torch_file(
    path: str | Path, remedy: str = "fetch it again", mapped: bool = True
) -> Any:
    """Load a file that must hold nothing but plain tensors, numbers, texts and containers.

    Args:
        path: the file, also in the format from before PyTorch 1.6.
        remedy: what to do where it cannot be read, for the message.
        mapped: map the tensors instead of reading them, where the format allows it.

    Raises:
        PerceptError: if it is missing, damaged, holds anything else, or is a TorchScript archive.
    """
    path = Path(path)
    is_zip = _check_archive(path, remedy)
    with _file_errors(path, remedy):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, which is a program: torch would run it on loading.

    Raises:
        PerceptError: if the file is missing or damaged.
    """
    with _file_errors(Path(path), "fetch it again"):
        return _is_zip(Path(path)) and _holds_program(Path(path))


def _check_archive(path: Path, remedy: str) -> bool:
    """Refuse files of which torch.load would do more than unpickle.

    Returns:
        Whether it is a zip archive, the format since PyTorch 1.6.

    Raises:
        PerceptError: for a TorchScript archive, an archive that was packed again (its tensors
            cannot be mapped), a tar archive (the format of 2016), and a file that is damaged.
    """
    with _file_errors(path, remedy):
        is_zip = _is_zip(path)
        is_program = is_zip and _holds_program(path)
        is_packed = is_zip and _holds_packed_members(path)
        is_tar = not is_zip and _is_tar(path)
    if is_program:
        raise PerceptError(
            f"{path} is a TorchScript archive, a program that would run while it is loaded: take"
            " the file with the weights alone."
        )
    if is_packed or is_tar:
        kind = "compressed again since PyTorch wrote it" if is_packed else "a tar archive"
        raise PerceptError(
            f"{path} cannot be read as a PyTorch checkpoint, it is {kind}: take the file as it was"
            " released."
        )
    return is_zip


def _is_zip(path: Path) -> bool:
    """Whether torch.load takes a file for a zip archive."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _holds_program(path: Path) -> bool:
    """Whether torch.load takes a zip archive for TorchScript; read by torch's own reader."""
    records = torch._C.PyTorchFileReader(str(path)).get_all_records()
    return any(name == "constants.pkl" or name.startswith("code/") for name in records)


def _holds_packed_members(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())


def _is_tar(path: Path) -> bool:
    """Whether torch.load takes a file for a tar archive."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


@contextmanager
def _file_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turn what torch raises over a file into one sentence, without advice to trust the file."""
    try:
        yield
    except (*READ_ERRORS, pickle.PickleError) as error:
        if isinstance(error, OSError) or not os.access(path, os.R_OK):
            raise explain_unreadable(path, error, remedy) from error
        with open(path, "rb") as file:
            head = file.read(512)
        kind, _, _ = (explain_head(head) or "").partition(":")
        if kind:
            raise PerceptError(f"{path} {kind}: {remedy}.") from error
        reason = "it is damaged, cut off or of another kind"
        if isinstance(error, RuntimeError | pickle.PickleError):
            reason = shorten(error)
        raise PerceptError(
            f"{path} cannot be read as a PyTorch checkpoint ({reason}): {remedy}."
        ) from error


# -------------------------------------------------------------------------- pickled .npy of authors
class _DtypeStandIn:
    """Stands for a pickled dtype: of its state the byte order alone is used."""

    def __init__(self, name: object, *_: object):
        self.dtype: np.dtype[Any] = np.dtype(str(name))
        if self.dtype.kind not in "OSUbiufc":
            raise UnpicklingError(f"it has the dtype {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _ArrayStandIn:
    """Stands for a pickled array, which is made of its checked dtype and its plain content."""

    def __init__(self, *_: object):
        self.array: np.ndarray[Any, Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, stand_in, fortran, data = state
        if stand_in.dtype.hasobject:
            flat = np.empty(len(data), object)
            flat[:] = _replace_stand_ins(data)
        else:
            flat = np.frombuffer(data, stand_in.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _rebuild_scalar(stand_in: _DtypeStandIn, data: bytes) -> Any:
    return np.frombuffer(data, stand_in.dtype, 1)[0]  # refuses a dtype of objects


def _replace_stand_ins(content: Any) -> Any:
    """Put arrays and dtypes in the place of what stood for them, in containers too."""
    if isinstance(content, dict):
        return {key: _replace_stand_ins(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(_replace_stand_ins, content))
    if isinstance(content, _ArrayStandIn):
        return content.array
    return content.dtype if isinstance(content, _DtypeStandIn) else content


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ArrayStandIn,
    ("numpy", "dtype"): _DtypeStandIn,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy.core.multiarray", "_reconstruct"): _ArrayStandIn,  # numpy 1
    ("numpy.core.multiarray", "scalar"): _rebuild_scalar,
    ("numpy._core.multiarray", "_reconstruct"): _ArrayStandIn,  # numpy 2
    ("numpy._core.multiarray", "scalar"): _rebuild_scalar,
    ("_codecs", "encode"): _encode_latin1,
}


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Builds containers, texts and numbers, and NumPy arrays and scalars of these; nothing else.

    NumPy's own unpickling is not used: it trusts the shapes and states that a file tells, so that a
    forged one can end the process.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def unpickle_npy(path: str | Path) -> Any:
    """Read an .npy whose authors pickled it (a dict, or an array of texts), running no code of it.

    Raises:
        PerceptError: if it is missing, damaged, or asks for anything but containers, texts, numbers
            and arrays.
    """
    try:
        with open(require_file(path, "a pickled .npy"), "rb") as file:
            return _read_npy(file)
    except PerceptError:
        raise
    except Exception as error:  # whatever a damaged or forged file provokes
        raise PerceptError(
            f"{path} cannot be read safely ({error}): fetch it again, or save it as plain arrays."
        ) from error


def load_texts(path: str | Path) -> list[str]:
    """Load the texts of a file that torch.save wrote: a list, or an array of one axis.

    Raises:
        PerceptError: if it is missing, damaged, or holds anything but texts.
    """
    path, remedy = Path(path), "fetch it again"
    is_zip = _check_archive(require_file(path, "a file of texts"), remedy)
    with _file_errors(path, remedy):
        if not is_zip:
            raise UnpicklingError("it is no archive that PyTorch 1.6 or later writes")
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            stored = _ArraysOnlyUnpickler(io.BytesIO(archive.read(name))).load()
    content = np.asarray(_replace_stand_ins(stored), dtype=object)
    if content.ndim != 1 or not all(isinstance(text, str) for text in content):
        raise PerceptError(f"{path} holds no list of texts: {remedy}.")
    return [str(text) for text in content]


def _read_npy(file: BinaryIO) -> Any:
    """Content of an .npy; an array without axes is given as what it holds."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    loaded = _ArraysOnlyUnpickler(file).load()
    content = np.asarray(_replace_stand_ins(loaded), dtype=object).reshape(shape)
    return content.item() if shape == () else content
