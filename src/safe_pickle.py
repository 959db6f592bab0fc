"""Unpickling that runs no code: the only unpicklers of the project, in one file to audit."""

from __future__ import annotations

import collections
import pickle
import re
import types
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError as UnpicklingError
from typing import Any

import numpy as np
import torch

from src.utils import PerceptError, require_file


class InertObject:
    """Stands for whatever a file holds besides tensors, numbers and containers; takes anything and
    does nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> InertObject:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    append = extend = add = (
        __call__  # where the file fills a container of a type that is not rebuilt
    )


class _InertDtype(InertObject):
    """What numpy pickles of the type of a number: its code, e.g. "f8", and then its byte order."""

    def __init__(self, code: Any = "", *flags: Any):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = (
            state[1]
            if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|")
            else "?"
        )


def _number(dtype: Any = None, data: Any = b"") -> Any:
    """A numpy scalar as a number of Python; whatever is none stays inert."""
    plain = (
        isinstance(dtype, _InertDtype)
        and re.fullmatch(r"f[248]|[iu][1248]|b1", dtype.code)
        and dtype.order != "?"
    )
    if not plain or not isinstance(data, bytes) or len(data) != int(dtype.code[1]):
        return InertObject()
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code))[0].item()


def _latin1(text: Any = "", encoding: Any = "") -> Any:
    """Bytes, which older pickles spell as text."""
    return (
        text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else InertObject()
    )


_TRUSTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("numpy", "dtype"): _InertDtype,
    ("numpy.core.multiarray", "scalar"): _number,  # numpy 1
    ("numpy._core.multiarray", "scalar"): _number,  # numpy 2
    ("_codecs", "encode"): _latin1,
    ("torch", "Size"): torch.Size,
}


class TensorsOnlyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _TRUSTED.get((module, name), InertObject)


TENSORS_ONLY_PICKLE = types.ModuleType("tensors_only")
TENSORS_ONLY_PICKLE.__dict__.update(
    Unpickler=TensorsOnlyUnpickler,
    load=lambda file, **options: TensorsOnlyUnpickler(file, **options).load(),
)


def load_torch_file(path: str | Path) -> Any:
    """The whole of a released file: its containers, numbers and tensors, these mapped and not yet
    read; whatever else it holds is inert.

    Raises:
        PerceptError: if the file is missing or damaged.
    """
    if not Path(path).exists():
        raise PerceptError(
            f"There is no checkpoint at {path}: download it, or correct the name of the run."
        )
    try:
        return torch.load(
            path,
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=TENSORS_ONLY_PICKLE,
        )
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise PerceptError(
            f"{path} cannot be read as a PyTorch checkpoint ({str(error).splitlines()[0]}):"
            " download it again."
        ) from error


class _ArrayDtype:
    """Stands for a pickled dtype: of its state the byte order alone is taken."""

    def __init__(self, name: str, *_: object):
        self.made = np.dtype(str(name))
        if self.made.kind not in "OSUbiufc":
            raise pickle.UnpicklingError(f"it has the dtype {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.made = self.made.newbyteorder(">")

    def scalar(self, data: bytes) -> Any:
        return np.frombuffer(data, self.made, 1)[0]  # refuses a dtype of objects


class _Array:
    """Stands for a pickled array, which is made of its checked dtype and its plain content."""

    def __init__(self, *_: object):
        self.made = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.made.hasobject:
            flat = np.empty(len(data), object)
            flat[:] = _settled(data)
        else:
            flat = np.frombuffer(data, dtype.made)
        self.made = flat.reshape(shape, order="F" if fortran else "C")


def _settled(content: Any) -> Any:
    """Containers with arrays in the place of what stood for them."""
    if isinstance(content, dict):
        return {key: _settled(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_settled, content))
    return content.made if isinstance(content, (_Array, _ArrayDtype)) else content


class _Restricted(pickle.Unpickler):
    """Builds plain containers, texts and numbers, and NumPy arrays and scalars of these; nothing
    else.

    NumPy's own unpickling is not used: it trusts the shapes and states that a file tells, so that a
    forged one can end the process.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _ArrayDtype,
            ("collections", "OrderedDict"): OrderedDict,
        }
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            allowed |= {
                (core, "_reconstruct"): _Array,
                (core, "scalar"): lambda dtype, data: dtype.scalar(data),
            }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


def unpickle_npy(path: str | Path) -> Any:
    """The content of an .npy whose authors pickled it (a dict, or an array of texts), without
    running code from it.

    Raises:
        PerceptError: if it is missing, damaged, or asks for anything but containers, texts, numbers
            and arrays.
    """
    try:
        with open(require_file(path, "a pickled .npy"), "rb") as file:
            version = np.lib.format.read_magic(file)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = header(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
            content = np.asarray(_settled(_Restricted(file).load()), dtype=object).reshape(shape)
    except PerceptError:
        raise
    except Exception as error:  # whatever a damaged or forged file provokes
        raise PerceptError(
            f"{path} cannot be read safely ({error}): fetch it again, or save it as plain arrays."
        ) from error
    return content.item() if shape == () else content
