"""The base class of all networks that train."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from src.utils import PerceptError


class Network(nn.Module):
    """A module that remembers its arguments.

    `config` is {"name": name of the class, "kwargs": all arguments, defaults included};
    `src.networks.registry.build_network` makes the same network of it.
    """

    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Network:
        """Note the arguments before `__init__` sees them."""
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(network, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        network.__dict__["config"] = {"name": cls.__name__, "kwargs": arguments}
        return network


def flatten_voxels(x: Tensor, layer: nn.Module) -> Tensor:
    """Voxels (batch, ...) as (batch, voxels), for the layer that reads them.

    Raises:
        PerceptError: if there are not as many voxels as the layer was made for.
    """
    x = x.flatten(1)
    expected = layer.in_features
    if x.shape[1] != expected:
        raise PerceptError(
            f"The network reads {expected} voxels but was given {x.shape[1]}: use the subject and"
            " the voxels that it was made for."
        )
    return x
