"""Unpickling that runs no code: the only unpicklers of the project, in one file to audit."""

from __future__ import annotations

import collections
import pickle
import re
import types
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError as UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch

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


_TRUSTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
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
        PerceptError: if the file is missing or damaged.
    """
    if not Path(path).exists():
        raise PerceptError(
            f"There is no checkpoint at {path}: download it, or correct the name of the run."
        )
    damage = (RuntimeError, UnpicklingError, EOFError, ValueError, TypeError, AttributeError)
    try:
        return torch.load(
            path,
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=TENSORS_ONLY_PICKLE,
        )
    except damage as error:
        raise PerceptError(
            f"{path} cannot be read as a PyTorch checkpoint ({str(error).splitlines()[0]}):"
            " download it again."
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
