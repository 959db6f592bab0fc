"""A pretended GPU: tensors of the CPU that remember on which device they would lie.

    with pretend_gpu() as gpu:
        train(device="cuda")
    print(gpu.waits)

Inside, torch says that there is one GPU. Numbers are real and come from the CPU's kernels. What
CUDA would refuse is refused: two devices in one operation, a tensor of the GPU that is read as a
numpy array or pinned, a generator, a gradient or an index of the wrong device. Where the host would
wait for the GPU is counted by line.

How it works:
- Each storage carries a mark, its device (none: the CPU). Views, `.data`, detached tensors and
  parameters share their storage, and so have the same device.
- A mode of torch sees every call of its Python functions, checks the devices of what goes in, and
  marks what comes out. Threads that are started inside have the mode, too; so have backward hooks.

What it cannot see: kernels that a GPU lacks, their speed and last digits, several GPUs, what C++
code does by itself. Half precision of autocast is computed as bf16, since CPUs are very slow in it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.autograd
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 141 * 10**9  # bytes, of an H200

# operations at which the host waits for what the device computes
WAITING = {
    *("item", "tolist", "is_nonzero", "equal", "allclose", "__contains__", "__format__"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "histc"),
    *("quantile", "nanquantile", "one_hot", "inverse", "cholesky", "logdet", "slogdet"),
}
WAITING_LINALG = re.compile("linalg_(?!vector_norm|norm|cross|multi_dot|vecdot|diagonal)")
DRAWING = re.compile(
    "rand|dropout|normal|bernoulli|multinomial|poisson|gamma|dirichlet|uniform_|random_"
    "|exponential_|gumbel|rrelu|scaled_dot_product"
)
# those that make a tensor on the CPU where no device is named, whatever numbers they are given
FACTORIES = {
    *("arange", "linspace", "logspace", "eye", "full", "zeros", "ones", "empty", "scalar_tensor"),
    *("rand", "randn", "randint", "randperm", "tensor", "empty_strided", "tril_indices"),
    *("triu_indices", "hann_window", "normal"),
}
# those that take no scalars of the CPU beside tensors of the GPU
STRICT = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
# those that compare tensors, whatever devices they lie on
ANYWHERE = {"_has_compatible_shallow_copy_type", "is_same_size", "__repr__"}
# those that autocast of the CPU promotes and CUDA's leaves alone
NOT_AUTOCAST = STRICT | {"index_copy", "index_copy_", "index_add", "index_add_"}


class CudaRefusal(RuntimeError):
    """What CUDA would not do."""


def parse_device(device: Any) -> torch.device:
    """A torch device; a GPU always has its number."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def get_device(tensor: Tensor) -> torch.device:
    """Where a tensor would lie."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return tensor.device
    return getattr(tensor.untyped_storage(), "pretended", CPU)


def set_device(tensor: Any, device: torch.device) -> Any:
    """The same tensor, which from now on lies on that device; anything else is left as it is."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
        tensor.untyped_storage().pretended = device
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that a GPU copies from by itself."""
    return getattr(tensor.untyped_storage(), "pinned", False)


def list_tensors(*values: Any) -> list[Tensor]:
    """All the tensors in nested lists and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def describe(tensors: list[Tensor]) -> str:
    """Devices and shapes, for a message."""
    return ", ".join(sorted({f"{get_device(x)} {tuple(x.shape)}" for x in tensors}))


def find_line() -> str:
    """The line of the repository that is running, e.g. "src/prior.py:93"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if is_ours and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


_RealGenerator = torch.Generator


class PretendedGenerator(_RealGenerator):
    """A generator of the CPU that says on which device it would draw."""

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        generator = super().__new__(cls, "cpu")
        generator.pretended = parse_device(device)
        return generator

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return self.pretended

    def manual_seed(self, seed: int) -> PretendedGenerator:
        """Begin at a seed; the GPU's numbers are others than the CPU's, as they really are."""
        super().manual_seed(seed ^ 0x5EED if self.pretended.type == "cuda" else seed)
        return self


class PretendedGpu(TorchFunctionMode):
    """The rules of CUDA, applied to each call of torch.

    Attributes:
        waits: how often the host would have waited for the device, by line and operation.
        copies: how often it would have waited for a copy to the device.
        operations: calls on the device, by name.
        generator: the device's own random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.generator = PretendedGenerator("cuda").manual_seed(0)
        self.special: dict[str, Callable[..., Any]] = {
            "__get__": self._read_attribute,
            "__set__": self._write_attribute,
            "to": self._move,
            "cpu": self._move,
            "cuda": self._move,
            "copy_": self._copy_into,
            "as_tensor": self._convert,
            "asarray": self._convert,
            "type_as": lambda f, args, kwargs: args[0].to(args[1]),
            "numpy": self._read_array,
            "__array__": self._read_array,
            "__dlpack__": self._read_array,
            "pin_memory": self._pin,
            "is_pinned": lambda f, args, kwargs: is_pinned(args[0]),
            "record_stream": lambda f, args, kwargs: None,
            "get_device": lambda f, args, kwargs: -1 if is_on_cpu(args[0]) else 0,
            "__getitem__": self._index,
            "__setitem__": self._index,
            "index_put": self._index,
            "index_put_": self._index,
            "grad": self._differentiate,
        }

    def reset(self) -> None:
        """Count from zero."""
        for counter in (self.waits, self.copies, self.operations):
            counter.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in self.special:
            return self.special[name](func, args, kwargs)
        return self._run(func, name, args, kwargs)

    # -------------------------------------------------------------------------------- any function
    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check, count, call and mark."""
        device = self._choose_device(name, args, kwargs)
        if device.type == "cuda":
            self._count(name, args, kwargs)
        self._check_generators(name, device, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu" if device.type == "cuda" else device
        is_pinned = kwargs.pop("pin_memory", False)
        result = self._call(func, name, device, args, kwargs)
        if is_pinned:
            result.untyped_storage().pinned = True
        return self._mark(result, device, args, kwargs)

    def _choose_device(self, name: str, args: Any, kwargs: dict[str, Any]) -> torch.device:
        """The device on which a function runs."""
        tensors = list_tensors(args, kwargs)
        if kwargs.get("device") is not None:
            target = parse_device(kwargs["device"])
            for source in {get_device(x) for x in tensors} - {target}:
                self._count_copy(f"{name} of a tensor", source, target)
            is_host_data = name in ("tensor", "as_tensor") and not tensors
            if is_host_data and target.type == "cuda":
                self._count_copy(name, CPU, target)
            return target
        if name in FACTORIES:
            if any(not is_on_cpu(x) for x in tensors):
                self._wait(name)
            return CPU
        if name in ANYWHERE:
            return get_device(tensors[0])
        return self.find_common_device(name, tensors)

    def find_common_device(self, name: str, tensors: list[Tensor]) -> torch.device:
        """The one device of all tensors.

        Raises:
            CudaRefusal: if there are two; single numbers of the CPU may stand beside the GPU's.
        """
        devices = {get_device(x) for x in tensors}
        if len(devices) < 2:
            return devices.pop() if devices else CPU
        if name not in STRICT:
            devices = {get_device(x) for x in tensors if x.dim() or not is_on_cpu(x)}
        if len(devices) > 1:
            raise CudaRefusal(
                f"{name}: Expected all tensors to be on the same device, but got"
                f" {describe(tensors)} (at {find_line()})"
            )
        return devices.pop()

    def _check_generators(self, name: str, device: torch.device, *values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, _RealGenerator):
                own = getattr(leaf, "pretended", CPU)
                if own.type != device.type and device.type != "meta":
                    raise CudaRefusal(
                        f"{name}: Expected a '{device.type}' device type for generator but found"
                        f" '{own.type}' (at {find_line()})"
                    )

    def _count(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Count a call on the device, and whether the host waits for it."""
        self.operations[name] += 1
        if name in WAITING or WAITING_LINALG.match(name):
            self._wait(name)
        elif name == "where" and len(args) == 1 and not kwargs:
            self._wait("where of one argument")
        elif name == "repeat_interleave" and len(list_tensors(args, kwargs)) > 1:
            if "output_size" not in kwargs:
                self._wait(name)

    def _wait(self, name: str) -> None:
        self.waits[f"{find_line()} {name}"] += 1

    def _count_copy(self, name: str, source: torch.device, target: torch.device) -> None:
        """A copy between the devices, for which the host waits."""
        if "cuda" in (source.type, target.type) and "meta" not in (source.type, target.type):
            counter = self.waits if target.type == "cpu" else self.copies
            counter[f"{find_line()} {name}"] += 1

    def _call(
        self, func: Any, name: str, device: torch.device, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The function itself; what it draws on the device comes from the device's generator."""
        if device.type != "cuda":
            return func(*args, **kwargs)
        leave_alone = name in NOT_AUTOCAST and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if leave_alone else contextlib.nullcontext():
            if kwargs.get("generator") is not None or not DRAWING.search(name):
                return func(*args, **kwargs)
            before = torch.default_generator.get_state()
            torch.default_generator.set_state(self.generator.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                self.generator.set_state(torch.default_generator.get_state())
                torch.default_generator.set_state(before)

    def _mark(self, result: Any, device: torch.device, *inputs: Any) -> Any:
        """Mark what a function has made; what shares memory with its inputs stays as it is."""
        if not isinstance(result, Tensor | tuple | list | dict):
            return result
        known = {x.untyped_storage()._cdata for x in list_tensors(inputs) if has_memory(x)}
        for tensor in list_tensors(result):
            if has_memory(tensor) and tensor.untyped_storage()._cdata not in known:
                set_device(tensor, device)
        return result

    # ------------------------------------------------------------------------------ one at a time
    def _read_attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, name = args[0], getattr(func.__self__, "__name__", "")
        if name == "device":
            return get_device(tensor)
        if name in ("is_cuda", "is_cpu"):
            return get_device(tensor).type == name.removeprefix("is_")
        value = func(*args, **kwargs)
        if name == "grad" and value is not None:  # backward is C++, and made it without a mark
            set_device(value, get_device(tensor))
        return value

    def _write_attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, value, *_ = *args, None
        is_grad = getattr(func.__self__, "__name__", "") == "grad"
        if is_grad and isinstance(value, Tensor) and get_device(value) != get_device(tensor):
            raise CudaRefusal(
                f"assigned grad has data located on a different device: {get_device(value)} for"
                f" {get_device(tensor)} (at {find_line()})"
            )
        return func(*args, **kwargs)

    def _read_array(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not is_on_cpu(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the"
                f" tensor to host memory first (at {find_line()})."
            )
        return func(*args, **kwargs)

    def _pin(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if not is_on_cpu(args[0]):
            raise CudaRefusal(
                f"cannot pin a tensor of cuda: only CPU tensors can be pinned (at {find_line()})"
            )
        pinned = args[0].detach().clone()
        pinned.untyped_storage().pinned = True
        return pinned

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`to`, `cpu` and `cuda`."""
        tensor, source = args[0], get_device(args[0])
        target, dtype, layout, copy = source, None, None, kwargs.pop("copy", False)
        if func.__name__ != "to":
            target, is_quick = parse_device(func.__name__), kwargs.get("non_blocking", False)
        else:
            other = kwargs.pop("other", args[1] if len(args) > 1 else None)
            if isinstance(other, Tensor):
                args = (tensor, get_device(other), other.dtype, *args[2:])
            device, dtype, is_quick, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
            target = source if device is None else parse_device(device)
        options = {"copy": copy} | ({} if layout is None else {"memory_format": layout})
        if target.type == "meta":
            return tensor.to("meta", dtype or tensor.dtype)
        result = tensor.to(dtype or tensor.dtype, **options)
        if target == source:
            return result if result is tensor else set_device(result, target)
        if not (is_quick and target.type == "cuda" and is_pinned(tensor)):
            self._count_copy(f"copy to {target.type}", source, target)
        return set_device(result.clone() if result is tensor else result, target)

    def _convert(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`as_tensor` and `asarray`; of a tensor they are `to`."""
        if not isinstance(args[0], Tensor):
            return self._run(func, func.__name__, args, kwargs)
        names = [kwargs.get("device"), kwargs.get("dtype")]
        target = (get_device(args[0]) if names[0] is None else names[0], names[1] or args[0].dtype)
        return self._move(Tensor.to, (args[0], *target), {})

    def _copy_into(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, target = get_device(args[1]), get_device(args[0])
        is_quick = kwargs.get("non_blocking", len(args) > 2 and args[2])
        host = args[1] if target.type == "cuda" else args[0]
        if source != target and not (is_quick and is_pinned(host)):
            self._count_copy("copy_", source, target)
        return func(*args, **kwargs)

    def _index(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Reading and writing by index: indices may lie on the CPU, values may be copied."""
        tensor, device = args[0], get_device(args[0])
        indices = list_tensors(args[1])
        for index in indices:
            if get_device(index) not in (device, CPU):
                raise CudaRefusal(
                    f"indices should be either on cpu or on the same device as the indexed tensor"
                    f" ({device}), not {describe([index])} (at {find_line()})"
                )
        values = [x for x in list_tensors(args[2:]) if get_device(x) != device]
        for value in values:
            if indices and (value.dim() or device == CPU):
                raise CudaRefusal(
                    f"{func.__name__}: value on {describe([value])}, indexed tensor on {device}"
                    f" (at {find_line()})"
                )
            self._count_copy("copy by index", get_device(value), device)
        if device.type == "cuda":
            self._count_index(func.__name__, indices, writes_number=not list_tensors(args[2:]))
        return self._mark(func(*args, **kwargs), device, [tensor])

    def _count_index(self, name: str, indices: list[Tensor], writes_number: bool) -> None:
        self.operations[name] += 1
        is_fill = name == "__setitem__" and writes_number and len(indices) == 1
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        if masks and not is_fill:
            self._wait("index by a mask")
        elif any(is_on_cpu(i) and i.dim() for i in indices):
            self.copies[f"{find_line()} index of the CPU"] += 1
        elif any(not i.dim() and not is_on_cpu(i) for i in indices):
            self._wait("index by a number of the device")

    def _differentiate(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`torch.autograd.grad`: gradients lie where the inputs do."""
        gradients = func(*args, **kwargs)
        inputs = list_tensors(kwargs["inputs"] if "inputs" in kwargs else args[1])
        for gradient, x in zip(gradients, inputs, strict=True):
            set_device(gradient, get_device(x))
        return gradients


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor would lie on the CPU."""
    return get_device(tensor).type == "cpu"


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has a storage."""
    return tensor.layout is torch.strided and not tensor.is_meta


# ---------------------------------------------------------------------------- what torch says of it
class PretendedStream:
    """A stream or an event: everything has happened at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.device, self.stream_id, self.cuda_stream = GPU, 0, 0

    def __enter__(self) -> PretendedStream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _do_nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = record_event = wait = _do_nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def list_cuda_functions(gpu: PretendedGpu) -> dict[str, Any]:
    """What stands for the functions of torch.cuda."""
    nothing = {name: lambda *args, **kwargs: None for name in (
        *("set_device", "empty_cache", "reset_peak_memory_stats", "_lazy_init", "init"),
        *("ipc_collect", "reset_max_memory_allocated", "_lazy_call"),
    )}  # fmt: skip
    numbers = {"device_count": 1, "current_device": 0, "_exchange_device": -1}
    numbers |= {"_maybe_exchange_device": -1, "memory_allocated": 0, "max_memory_allocated": 0}
    numbers |= {"max_memory_reserved": 0, "memory_reserved": 0}
    answers = numbers | {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "mem_get_info": (MEMORY, MEMORY),
        "get_device_name": "a pretended GPU",
        "get_device_capability": (9, 0),
    }
    functions = {}
    for name, answer in answers.items():
        functions[name] = lambda *args, answer=answer, **kwargs: answer

    def seed(number: int) -> None:
        gpu.generator.manual_seed(int(number))

    return nothing | functions | {
        "manual_seed": seed,
        "manual_seed_all": seed,
        "synchronize": lambda *args: gpu._wait("synchronize"),
        "get_rng_state": lambda *args: gpu.generator.get_state().clone(),
        "set_rng_state": lambda state, *args: gpu.generator.set_state(state.clone()),
        "Stream": PretendedStream,
        "Event": PretendedStream,
        "current_stream": PretendedStream,
        "default_stream": PretendedStream,
        "stream": lambda stream: stream or PretendedStream(),
    }  # fmt: skip


def redirect_autocast(patch: Callable[..., None]) -> None:
    """Autocast of the GPU is that of the CPU; half precision becomes bf16."""
    autocast = torch.amp.autocast_mode.autocast
    begin = autocast.__init__

    def begin_on_cpu(
        self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if str(device_type).startswith("cuda"):
            device_type = "cpu"
            dtype = torch.bfloat16 if dtype in (None, torch.float16) else dtype
        begin(self, device_type, dtype, *args, **kwargs)

    patch(autocast, "__init__", begin_on_cpu)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        ask = getattr(torch, name)

        def ask_of_cpu(*device: Any, ask: Any = ask) -> Any:
            return ask(*("cpu" if str(d).startswith("cuda") else d for d in device))

        patch(torch, name, ask_of_cpu)


def redirect_loading(patch: Callable[..., None]) -> None:
    """`torch.load` to the GPU."""
    load = torch.load

    def load_marked(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        is_named = isinstance(map_location, str | torch.device)
        target = parse_device(map_location) if is_named else CPU
        if target.type != "cuda":
            return load(*args, map_location=map_location, **kwargs)
        content = load(*args, map_location="cpu", **kwargs)
        return tree_map(lambda leaf: set_device(leaf, target), content)

    patch(torch, "load", load_marked)


optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim hides the name
_group_tensors = optimizers._group_tensors_by_device_and_dtype


def group_by_device(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """An optimizer's tensors by device and type: C++ code would say that all lie on the CPU."""
    groups = {}
    for (device, dtype), (lists, indices) in _group_tensors(*args, **kwargs).items():
        parameters = [x for x in lists[0] if x is not None]
        if parameters and not is_on_cpu(parameters[0]):
            device = get_device(parameters[0])
        groups[device, dtype] = lists, indices
    return groups


def carry_mode(gpu: PretendedGpu, patch: Callable[..., None]) -> None:
    """Let backward passes, with their hooks, and threads be watched, too."""

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with gpu:
                return function(*args, **kwargs)

        return watched

    patch(torch.autograd, "_engine_run_backward", watch(torch.autograd._engine_run_backward))
    patch(threading.Thread, "run", watch(threading.Thread.run))


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendedGpu]:
    """A context in which there is one GPU, see above."""
    gpu = PretendedGpu()
    seed_cpu = torch.manual_seed

    def seed_all(number: int) -> Any:
        gpu.generator.manual_seed(int(number))
        return seed_cpu(number)

    with contextlib.ExitStack() as stack:

        def patch(*names_and_value: Any) -> None:
            stack.enter_context(mock.patch.object(*names_and_value))

        for name, function in list_cuda_functions(gpu).items():
            patch(torch.cuda, name, function)
        patch(torch, "manual_seed", seed_all)
        patch(torch.random, "manual_seed", seed_all)
        patch(torch, "Generator", PretendedGenerator)
        patch(torch.accelerator, "is_available", lambda: True)
        patch(torch.accelerator, "current_accelerator", lambda *args, **kwargs: GPU)
        patch(torch.accelerator, "set_device_index", lambda *args: None)
        patch(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda this: None)
        patch(optimizers, "_group_tensors_by_device_and_dtype", group_by_device)
        redirect_autocast(patch)
        redirect_loading(patch)
        carry_mode(gpu, patch)
        stack.enter_context(gpu)
        yield gpu


if __name__ == "__main__":
    import json
    import runpy

    sys.argv = sys.argv[1:]  # a program and its arguments
    with pretend_gpu() as watched:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            counts = (watched.waits, watched.copies, watched.operations)
            print(json.dumps([dict(counter.most_common(25)) for counter in counts]))
