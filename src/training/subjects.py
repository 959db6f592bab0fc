"""MindEye2's training: batches of several subjects, a start from what was trained on others, and
maps between the tokens of two image encoders.

- A batch mixes subjects freely: each sample says whose it is, and its voxels are filled up to those
  of the largest brain, so that an epoch shows every image of every subject once, whatever their
  numbers.
- Source: MindEye2 (arXiv 2403.11207), sections 2.1 and 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.data.batches import BrainDataset
from src.networks.mindeye2 import MindEye2
from src.networks.released import read_weights
from src.utils import PerceptError

FRESH = {
    "ridge": ("ridge.",),
    "inherited_bias": ("ridge.linears.0.weight",),
}  # what a new subject does not take over; the latter as published


class MultiSubjectDataset:
    """The datasets of several subjects as one, for `fit` and `batches`.

    A batch is that of `BrainDataset` with "subject" (batch,), the position in `datasets`, and voxels
    (batch, [trials,] most voxels), zeros beyond a subject's own.

    Args:
        datasets: one dataset a subject, with the same targets.
    """

    def __init__(self, datasets: Sequence[BrainDataset]):
        self.datasets = list(datasets)
        self.starts = np.cumsum([0, *(len(part) for part in self.datasets)])
        self.most = max(part.subject.n_features(part.normaliser) for part in self.datasets)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def set_epoch(self, epoch: int) -> None:
        """As `BrainDataset.set_epoch`."""
        for part in self.datasets:
            part.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch, its samples in the order asked for."""
        at = np.asarray(indices, dtype=np.int64)
        whose = np.searchsorted(self.starts, at, side="right") - 1
        found, order = [], []
        for number in np.unique(whose):
            mine = np.flatnonzero(whose == number)
            batch = self.datasets[number].__getitems__((at[mine] - self.starts[number]).tolist())
            voxels = batch["voxels"]
            batch["voxels"] = torch.nn.functional.pad(voxels, (0, self.most - voxels.shape[-1]))
            found.append(batch | {"subject": torch.full((len(mine),), int(number))})
            order.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return {name: torch.cat([batch[name] for batch in found])[back] for name in found[0]}

    def preview_batch(self, count: int) -> dict[str, Tensor]:
        """A batch of about `count` samples from all subjects alike, at least one of each: to look
        at before training.
        """
        each = max(1, count // len(self.datasets))
        return self.__getitems__(
            [
                int(start + i)
                for start, part in zip(self.starts, self.datasets, strict=False)
                for i in range(min(each, len(part)))
            ]
        )


def load_pretrained(path: str | Path, model: MindEye2, fresh: str = "ridge") -> list[str]:
    """Give a model for new subjects what was trained on others: everything but the ridge layers,
    which belong to brains.

    Args:
        path: a checkpoint of ours (.safetensors), or a released one as
            `src.published.read_published` takes it.
        model: changed in place.
        fresh: key of FRESH: "ridge" leaves weights and biases of the ridge layers as they were
            initialised; "inherited_bias" is the published defect, by which the new subject starts
            with the bias of another one.

    Returns:
        Names of the tensors that stayed as they were initialised.

    Raises:
        PerceptError: if the file is missing, or its other networks are not of the model's sizes;
            the first difference is named.
    """
    state = read_weights(path)
    own = model.state_dict()
    kept = [key for key in own if key.startswith(FRESH[fresh])]
    taken = {key: value for key, value in state.items() if key in own and key not in kept}
    for key in own:
        if key not in kept and (key not in taken or taken[key].shape != own[key].shape):
            there = f"has it as {tuple(taken[key].shape)}" if key in taken else "does not have it"
            raise PerceptError(
                f"{path} does not fit this model: {key} is {tuple(own[key].shape)} here, but the"
                f" file {there}: pretrain with the same networks."
            )
    if beyond := [key for key in state if key not in own and not key.startswith("ridge.")]:
        raise PerceptError(
            f"{path} does not fit this model, which has no {beyond[0]} ({len(beyond)} such"
            " tensors): pretrain with the same networks."
        )
    model.load_state_dict(taken | {key: own[key] for key in kept})
    return kept


def check_gradients(
    model: nn.Module, step: Any, batch: dict[str, Tensor], epochs: Sequence[int] = (0,)
) -> int:
    """Whether a step teaches all that shall be trained, asked before long work: one backward pass,
    no update, nothing changed.

    Args:
        model: on its device.
        step: as `src.training.fit` takes it.
        batch: tensors (batch, ...) by name, from every subject.
        epochs: in which the step is tried, where it changes with them.

    Returns:
        Number of parameters that a gradient reached.

    Raises:
        PerceptError: naming the parameters that no gradient reaches, or whose gradient is not
            finite, or a loss that is not.
    """
    device, was_training = next(model.parameters()).device, model.training
    batch = {name: x.to(device) for name, x in batch.items()}
    before = torch.get_rng_state()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached: set[str] = set()
    model.train()
    for epoch in epochs:
        loss, _ = step(model, batch, epoch)
        if not torch.isfinite(loss):
            raise PerceptError(
                f"The loss of the first batch is {loss.item()} (epoch {epoch}): look for values"
                " that are not finite in voxels and targets."
            )
        loss.backward()
        for name, p in wanted.items():
            if p.grad is not None and not torch.isfinite(p.grad).all():
                raise PerceptError(
                    f"The gradient of {name} is not finite in the first batch (epoch {epoch}):"
                    " choose precision 'no', or lower the loss weights."
                )
        reached |= {name for name, p in wanted.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    torch.set_rng_state(before)
    model.train(was_training)
    if lost := [name for name in wanted if name not in reached]:
        raise PerceptError(
            f"No gradient reaches {lost[0]} ({len(lost)} of {len(wanted)} tensors): these would"
            " never be trained; switch their part off."
        )
    return sum(wanted[name].numel() for name in reached)
