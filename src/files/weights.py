"""Networks from the configs of files: never larger than the file that holds their weights.

A config is a few numbers, and can ask for more memory than there is, or for layers without end. So
a network is made without memory for its weights first, with no more layers than there are weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from src.files.errors import PerceptError
from src.files.foreign import shorten

Module = TypeVar("Module", bound=nn.Module)

# what building a network raises over sizes that are no sizes
BUILD_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
)


def build_within(build: Callable[[], Module], weights: int) -> Module:
    """Make a network on the meta device, without memory for its weights.

    Args:
        build: makes it.
        weights: how many tensors there are for it.

    Raises:
        ValueError: if it has far more layers than `weights`; and whatever `build` raises.
    """
    with _limit_layers(weights), torch.device("meta"):
        return build()


def plan_network(build: Callable[[], Module], state: Mapping[str, Tensor], origin: str) -> Module:
    """The network that a file asks for, without memory for its weights.

    Args:
        build: makes it from the file's config.
        state: the file's weights.
        origin: the file, for the message.

    Raises:
        PerceptError: if no network can be made of the config, or only one of far more layers.
    """
    try:
        return build_within(build, len(state))
    except (PerceptError, *BUILD_ERRORS) as error:
        raise PerceptError(
            f"{origin} carries a config of which no network can be made ({shorten(error)}): take"
            " the file as it was written."
        ) from error


@contextmanager
def _limit_layers(weights: int) -> Iterator[None]:
    """Context in which not many more layers and parameters are made than there are weights.

    Some networks make layers that they replace, and most have layers without weights.
    """
    limit, count = 10 * weights + 1000, 0

    def count_one(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError(f"it asks for more than {limit} layers, there are {weights} weights")

    handles = [
        nn.modules.module.register_module_parameter_registration_hook(count_one),
        nn.modules.module.register_module_module_registration_hook(count_one),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
