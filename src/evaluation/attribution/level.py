"""One level of a decoder with the test images that it is explained on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError

BATCH = 128  # images (times steps) that a decoder sees at a time


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of rows, (n, features) twice -> (n,)."""
    centred_a = a - a.mean(1, keepdim=True)
    centred_b = b - b.mean(1, keepdim=True)
    return F.cosine_similarity(centred_a, centred_b)


class Similarity(NamedTuple):
    """What is explained at a level: a name for a reader, and rows (n, features) twice -> (n,)."""

    description: str
    compute: Callable[[Tensor, Tensor], Tensor]


SIMILARITIES: dict[str, Similarity] = {  # by level
    "high_level": Similarity("cosine of predicted and true CLIP tokens", F.cosine_similarity),
    "low_level": Similarity("correlation of predicted and true latent", _correlation),
}


@dataclass(frozen=True)
class Level:
    """One level of a decoder with the test images that it is explained on, of `open_level`.

    Attributes:
        kind: "high_level" or "low_level".
        decoder: the trained module, in eval mode.
        voxels: float32 (images, selected), z-scored, repeats averaged; selected are the voxels that
            this decoder was trained on.
        columns: int64 (selected,), which voxels of the subject these are.
        baseline: float32 (selected,), where integrated gradients begin.
        truth: (images, ...) true tokens or latents.
        components: (selected, components) that the voxels are multiplied with before the decoder
            sees them, or None.
        device: torch device.
    """

    kind: str
    decoder: nn.Module
    voxels: np.ndarray
    columns: np.ndarray
    baseline: np.ndarray
    truth: Tensor
    components: Tensor | None = None
    device: str = "cpu"

    @property
    def title(self) -> str:
        """The kind for a reader."""
        return self.kind.replace("_", " ")

    def output(self, voxels: Tensor) -> Tensor:
        """What the decoder predicts from voxels (n, selected), differentiable: latents, tokens of a
        ridge, or projected tokens, (n, features).
        """
        x = voxels if self.components is None else voxels @ self.components.to(voxels)
        if isinstance(self.decoder, BrainDiffusionPrior):
            voxel2clip: Any = self.decoder.voxel2clip
            return voxel2clip.predict_tokens(x)[1].flatten(1)
        prediction = self.decoder(x)
        if isinstance(prediction, tuple):  # the low-level network also returns contrastive maps
            prediction = prediction[0]
        return prediction.flatten(1)

    @torch.no_grad()
    def predict(self, voxels: np.ndarray) -> Tensor:
        """Predictions (n, ...), shaped as the truth, from voxels (n, selected)."""
        batches = np.array_split(voxels, max(1, -(-len(voxels) // BATCH)))
        parts = []
        for batch in batches:
            rows = torch.as_tensor(batch, device=self.device)
            parts.append(self.output(rows).cpu())
        return torch.cat(parts).view(len(voxels), *self.truth.shape[1:])


def open_level(
    subject: Subject,
    kind: str,
    decoder: nn.Module,
    path: str | Path,
    truth: Any,
    first: int = 0,
    baseline: str = "zero",
    device: str = "cpu",
) -> Level:
    """A trained decoder and the test images' voxels as it was trained on them.

    Args:
        subject: from `open_training_split`.
        kind: "high_level" or "low_level".
        decoder: from `load_decoder`.
        path: its file; the normaliser.safetensors nearest above it is its own. A released file
            (.pth) is for betas as they are.
        truth: true tokens or latents of the test images (images, ...).
        first: only so many test images, 0 for all.
        baseline: key of GRADIENT_BASELINES.
        device: torch device.

    Raises:
        PerceptError: for an unknown baseline, a missing normaliser, or one of other voxels than the
            subject has.
    """
    if baseline not in GRADIENT_BASELINES:
        raise PerceptError(
            f"The baseline '{baseline}' is unknown: choose one of {', '.join(GRADIENT_BASELINES)}."
        )
    n_voxels = subject.betas.shape[1]
    scale = Normaliser.for_checkpoint(path)
    components = None
    columns = np.arange(n_voxels)
    if scale is not None:
        if scale.n_voxels != n_voxels:
            raise PerceptError(
                f"{path} was trained on rows of {scale.n_voxels} voxels and the subject has"
                f" {n_voxels}: name its own dataset and subj."
            )
        if scale.components is not None:
            # voxels are attributed; the decoder is reached through the components
            components = torch.from_numpy(scale.components)
            scale = copy.copy(scale)
            scale.components = None
        # masked: voxels outside the regions are 0 here and in the baseline, and add nothing
        if not scale.masked and scale.columns is not None:
            columns = scale.columns
    voxels = subject.get_mean_betas("test", normaliser=scale)[0][: first or None]
    return Level(
        kind,
        decoder,
        voxels,
        columns,
        GRADIENT_BASELINES[baseline](subject, scale, voxels.shape[1]),
        torch.as_tensor(truth).float()[: first or None],
        components,
        device,
    )


def _zeros(subject: Subject, scale: Normaliser | None, width: int) -> np.ndarray:
    """The mean of the z-scored training trials, float32 (selected,)."""
    return np.zeros(width, np.float32)


def _mean_of_training(subject: Subject, scale: Normaliser | None, width: int) -> np.ndarray:
    """Mean of the training images' voxels, float32 (selected,)."""
    return subject.get_mean_betas("train", normaliser=scale)[0].mean(0)


GRADIENT_BASELINES: dict[str, Callable[[Subject, Normaliser | None, int], np.ndarray]] = {
    "zero": _zeros,
    "train": _mean_of_training,
}
