"""Batches on their way to the device.

While a GPU computes, a thread reads the next batch into pinned memory, from which it is copied
without waiting. On the CPU a batch is read when its step begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate.utils import send_to_device

from src.training.types import Batch

# what the host reads of a batch: it stays there, as reading it back would wait for the device
HOST_ENTRIES = ("seed", "subject")


def send_batch(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device, but for HOST_ENTRIES."""
    sent: Batch = {}
    for name, values in batch.items():
        if name not in HOST_ENTRIES:
            values = send_to_device(values, device, non_blocking=True)
        sent[name] = values
    return sent


def iterate_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, on a device; for a GPU the next one is read while one is in use."""
    if device.type != "cuda":
        for batch in batches:
            yield send_batch(batch, device)
        return
    source = iter(batches)
    with ThreadPoolExecutor(1, "feed") as thread:
        ahead = thread.submit(next, source, None)
        while (following := ahead.result()) is not None:
            ahead = thread.submit(next, source, None)
            yield send_batch(following, device)
