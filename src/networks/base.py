"""The base class of all networks that train."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from src.utils import PerceptError


class Network(nn.Module):
    """A module that remembers how it was made: `config` = {"name": its class, "kwargs": all
    arguments, defaults included}.
    """

    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Network:
        """Note the arguments before `__init__` sees them."""
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(network, *args, **kwargs)
        bound.apply_defaults()
        made_of = {name: value for name, value in bound.arguments.items() if name != "self"}
        network.__dict__["config"] = {"name": cls.__name__, "kwargs": made_of}
        return network


def flatten_voxels(x: Tensor, first: nn.Module) -> Tensor:
    """Voxels (batch, ...) as (batch, voxels), refused when they are not as many as the layer
    `first` was made for.
    """
    x, expected = x.flatten(1), first.in_features
    if x.shape[1] != expected:
        raise PerceptError(
            f"The network reads {expected} voxels but was given {x.shape[1]}: use the subject and"
            " the voxels that it was made for."
        )
    return x
