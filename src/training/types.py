"""Types of the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]

Step = Callable[[nn.Module, Batch, int], tuple[Tensor, dict[str, Any]]]

Validate = Callable[[nn.Module], dict[str, float]]

Draw = Callable[[nn.Module, int], dict[str, Any]]

Logger = Callable[[dict[str, Any], int], None]


class TrainingData(Protocol):
    """The methods that `fit` needs of a dataset (`src.data.BrainDataset` has them)."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitems__(self, indices: list[int]) -> Batch:
        """One batch: tensors (batch, ...) by name; anything random in it is a pure function of
        (epoch, index).
        """

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
