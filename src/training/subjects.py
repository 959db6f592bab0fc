"""MindEye2's training: batches of several subjects, a start from what was trained on others, and
the check that every part of a model is trained.

- A batch mixes subjects freely: each sample says which subject's it is, and its voxels are padded
  to those of the largest brain, so that an epoch shows every image of every subject once, whatever
  their numbers.
- Source: MindEye2 (arXiv 2403.11207), sections 2.1 and 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from src.data.batches import BrainDataset
from src.data.identity import Identity
from src.networks.mindeye2 import MindEye2
from src.networks.released import read_weights
from src.training.types import Batch, Step
from src.utils import PerceptError

# prefixes of what a new subject does not take over from pretraining; the latter as published
FRESH = {"ridge": ("ridge.",), "inherited_bias": ("ridge.linears.0.weight",)}


class MultiSubjectDataset:
    """The datasets of several subjects as one, for `fit` and `iterate_batches`.

    A batch is that of `BrainDataset` with "subject" (batch,), the position in `datasets`, and
    voxels (batch, [trials,] most voxels), zeros beyond a subject's own.

    Args:
        datasets: one a subject, with the same targets.
    """

    def __init__(self, datasets: Sequence[BrainDataset]):
        self.datasets = list(datasets)
        self.starts = np.cumsum([0, *(len(dataset) for dataset in self.datasets)])
        self.max_voxels = max(d.subject.n_features(d.normaliser) for d in self.datasets)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def identity(self) -> Identity:
        """What the prepared data of all subjects are, {"subj01": `Subject.identity`, ...}."""
        identities: Identity = {}
        for dataset in self.datasets:
            identities |= dataset.identity
        return identities

    def set_epoch(self, epoch: int) -> None:
        """As `BrainDataset.set_epoch`."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch, its samples in the order of the indices."""
        samples = np.asarray(indices, dtype=np.int64)
        subjects = np.searchsorted(self.starts, samples, side="right") - 1
        batches, positions = [], []
        for subject in np.unique(subjects):
            rows = np.flatnonzero(subjects == subject)
            batches.append(self._read(int(subject), samples[rows]))
            positions.append(rows)
        order = torch.from_numpy(np.argsort(np.concatenate(positions)))
        return {name: torch.cat([batch[name] for batch in batches])[order] for name in batches[0]}

    def _read(self, subject: int, samples: np.ndarray) -> Batch:
        """Samples of one subject, their voxels padded."""
        batch = self.datasets[subject].__getitems__((samples - self.starts[subject]).tolist())
        padding = self.max_voxels - batch["voxels"].shape[-1]
        batch["voxels"] = nn.functional.pad(batch["voxels"], (0, padding))
        return batch | {"subject": torch.full((len(samples),), subject)}

    def preview_batch(self, count: int) -> Batch:
        """The first samples of every subject, about `count` in all and at least one of each: to
        look at before training.
        """
        share = max(1, count // len(self.datasets))
        indices: list[int] = []
        for start, dataset in zip(self.starts[:-1].tolist(), self.datasets, strict=True):
            indices += range(start, start + min(share, len(dataset)))
        return self.__getitems__(indices)


def load_pretrained(path: str | Path, model: MindEye2, fresh: str = "ridge") -> list[str]:
    """Give a model for new subjects what was trained on others: everything but the ridge layers,
    which belong to brains.

    Args:
        path: a checkpoint of this repository (.safetensors), or a released one as
            `src.networks.released.read_published` takes it.
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
    pretrained, initial = read_weights(path), model.state_dict()
    fresh_keys = [key for key in initial if key.startswith(FRESH[fresh])]
    _check_networks(path, pretrained, initial, fresh_keys)
    state = {key: pretrained.get(key, value) for key, value in initial.items()}
    model.load_state_dict(state | {key: initial[key] for key in fresh_keys})
    return fresh_keys


def _check_networks(
    path: str | Path,
    pretrained: dict[str, Tensor],
    initial: dict[str, Tensor],
    fresh_keys: list[str],
) -> None:
    """Refuse weights that lack a tensor of the model, have it in another shape, or have others."""
    for key, value in initial.items():
        if key in fresh_keys:
            continue
        if key not in pretrained:
            difference = "does not have it"
        elif pretrained[key].shape != value.shape:
            difference = f"has it as {tuple(pretrained[key].shape)}"
        else:
            continue
        raise PerceptError(
            f"{path} does not fit this model: {key} is {tuple(value.shape)} here, but the file"
            f" {difference}: pretrain with the same networks."
        )
    beyond = [k for k in pretrained if k not in initial and not k.startswith("ridge.")]
    if beyond:
        raise PerceptError(
            f"{path} does not fit this model, which has no {beyond[0]} ({len(beyond)} such"
            " tensors): pretrain with the same networks."
        )


def check_gradients(
    model: nn.Module, step: Step, batch: Batch, epochs: Sequence[int] = (0,)
) -> int:
    """Whether a step teaches all that shall be trained, before long work: one backward pass, no
    update, nothing changed.

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
    on_device = {name: values.to(device) for name, values in batch.items()}
    random_state = torch.get_rng_state()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached: set[str] = set()
    model.train()
    for epoch in epochs:
        loss, _ = step(model, on_device, epoch)
        if not torch.isfinite(loss):
            raise PerceptError(
                f"The loss of the first batch is {loss.item()} (epoch {epoch}): look for values"
                " that are not finite in voxels and targets."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        _check_finite_gradients(trainable, epoch)
        reached |= {name for name, p in trainable.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state)
    model.train(was_training)
    unreached = [name for name in trainable if name not in reached]
    if unreached:
        raise PerceptError(
            f"No gradient reaches {unreached[0]} ({len(unreached)} of {len(trainable)} tensors):"
            " these would never be trained; switch their part off."
        )
    return sum(trainable[name].numel() for name in reached)


def _check_finite_gradients(parameters: dict[str, nn.Parameter], epoch: int) -> None:
    for name, parameter in parameters.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise PerceptError(
                f"The gradient of {name} is not finite in the first batch (epoch {epoch}):"
                " choose precision 'no', or lower the loss weights."
            )
