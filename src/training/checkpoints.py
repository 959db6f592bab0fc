"""The checkpoints of a training: best.safetensors, last.safetensors and those of single epochs.

On the CPU they are written when their epoch ends. A full-size model has 4 GB and an epoch on a GPU
takes seconds, so there the weights are copied to pinned memory, which the device does not wait for,
and a thread writes them: at most once a minute, and always before the state is saved and at the
end. So no checkpoint is older than the state from which the training would go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.utils import save_checkpoint

WRITE_EVERY = 60.0  # seconds between two writings, on a GPU


class CheckpointWriter:
    """Writes the weights of a model in training.

    Args:
        folder: for <name>.safetensors.
        device: of the model.
        write_every: seconds between two writings, on a GPU.
    """

    def __init__(self, folder: Path, device: torch.device, write_every: float = WRITE_EVERY):
        self.folder, self.write_every = folder, write_every
        self.is_late = device.type == "cuda"
        self._pending: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._written_at = time.monotonic()

    def put(self, names: list[str], weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        """Write the weights under these names, now or a little later."""
        if not self.is_late:
            for name in names:
                save_checkpoint(self.folder / f"{name}.safetensors", weights, config)
            return
        copied = _copy_to_host(weights) if names else {}
        for name in names:
            self._pending[name] = copied, config
        is_due = time.monotonic() - self._written_at > self.write_every
        if is_due and (self._writing is None or self._writing.done()):
            self._begin()

    def finish(self) -> None:
        """Write all that is kept, and wait until it is on the disk.

        Raises:
            PerceptError: if a file could not be written.
        """
        self._begin()
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Also after an error no epoch's checkpoint is lost."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()

    def _begin(self) -> None:
        """Let the thread write what is kept, after what it is writing."""
        if self._writing is not None:
            self._writing.result()
        pending, self._pending = self._pending, {}
        self._written_at = time.monotonic()
        if pending:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._writing = self._thread.submit(self._write, pending, arrived)

    def _write(
        self,
        pending: dict[str, tuple[dict[str, Tensor], dict[str, Any]]],
        arrived: torch.cuda.Event,
    ) -> None:
        arrived.synchronize()
        for name, (weights, config) in pending.items():
            save_checkpoint(self.folder / f"{name}.safetensors", weights, config)


def _copy_to_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in pinned memory, which is complete when the device comes to it; what shares memory
    is copied once.
    """
    copies: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    copied = {}
    for name, weight in weights.items():
        key = weight.data_ptr(), tuple(weight.shape)
        if key not in copies:
            copies[key] = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
            copies[key].copy_(weight.detach(), non_blocking=True)
        copied[name] = copies[key]
    return copied
