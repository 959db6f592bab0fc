"""An average of the weights over the last steps, which is what a training then gives back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the trainable parameters of a model.

    After each update: average = decay * average + (1 - decay) * parameter. It begins at the
    parameters before the first update. Buffers are not averaged.

    Args:
        model: whose parameters are averaged.
        decay: between 0 and 1; about 1 / (1 - decay) steps are averaged over.

    Source: Polyak & Juditsky 1992; as an exponential average e.g. Tarvainen & Valpola 2017.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, counts: Tensor | None = None) -> None:
        """Take in the parameters as they are now.

        Args:
            counts: whether they count at all, a Boolean on their device, which only that knows.
        """
        current = [parameter.detach() for parameter in self.parameters.values()]
        averages = list(self.values.values())
        if counts is None:
            torch._foreach_lerp_(averages, current, 1 - self.decay)
            return
        for average, parameter in zip(averages, current, strict=True):
            average.lerp_(parameter, (1 - self.decay) * counts.to(average.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name of the parameter."""
        return self.values

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError, RuntimeError: if it is of other parameters.
        """
        for name, value in self.values.items():
            value.copy_(state[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Give the averages to the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averages."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(trained[name])
