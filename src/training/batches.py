"""Batches of a training, in an order that depends on seed and epoch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Subset, default_collate

from src.training.state import RunningMeans
from src.training.types import Batch, Step
from src.utils import PerceptError


def draw_epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples (samples,) in an epoch: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def draw_with_replacement(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Samples (samples,) of an epoch as the published loader draws its shards: about a third of the
    images is missed in an epoch.
    """
    return np.random.default_rng([seed, epoch]).integers(0, samples, samples)


ORDERS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "shuffled": draw_epoch_order,
    "resampled": draw_with_replacement,
}


def collate(batch: Any) -> Batch:
    """A batch as a dataset returns it, or stacked from its samples."""
    if isinstance(batch, dict):
        return batch
    collated: Batch = default_collate(batch)
    return collated


def set_epoch(dataset: Any, epoch: int) -> None:
    """Tell a dataset, or the one that a `torch.utils.data.Subset` is of, which epoch begins."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    dataset.set_epoch(epoch)


def iterate_batches(
    dataset: Any, batch_size: int, device: str | torch.device = "cpu"
) -> Iterator[Batch]:
    """Every sample of a dataset once, in order; the last batch may be smaller.

    Args:
        dataset: with `__len__` and `__getitems__`.
        batch_size: samples a batch.
        device: where the batches go.
    """
    for start in range(0, len(dataset), batch_size):
        indices = list(range(start, min(start + batch_size, len(dataset))))
        yield send_to_device(collate(dataset.__getitems__(indices)), device)


def count_samples(batch: Batch) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in equal parts, one after the other."""
    if parts == 1:
        yield batch
        return
    for rows in torch.arange(count_samples(batch)).chunk(parts):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        yield {name: values[part] for name, values in batch.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, step: Step, dataset: Any, batch_size: int, epoch: int = 0
) -> dict[str, float]:
    """Means over all the samples of what a training step reports: {"val/loss": ..., "val/<log>":
    ...}.

    Each batch counts by its number of samples. Meant for
    `validate=lambda model: evaluate(model, step, data, 300)`.

    Raises:
        PerceptError: for an empty dataset.
    """
    if not len(dataset):
        raise PerceptError("There is nothing to evaluate: the dataset is empty.")
    means, was_training = RunningMeans(), model.training
    model.eval()
    for batch in iterate_batches(dataset, batch_size, next(model.parameters()).device):
        loss, logs = step(model, batch, epoch)
        means.add({"loss": loss, **logs}, weight=count_samples(batch))
    model.train(was_training)
    return {f"val/{name.removeprefix('train/')}": value for name, value in means.values().items()}
