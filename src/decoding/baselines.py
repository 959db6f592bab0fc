"""What stands beside reconstructions: baselines that need no generator, and held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.normaliser import Normaliser
from src.data.targets import TargetCache
from src.decoding.levels import Decoder
from src.decoding.systems import System, TokenSystem
from src.retrieval import find_nearest


def make_lookup_baselines(
    system: System, targets: TargetCache, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Images (images, 3, height, width), in half precision, that anyone could show without a
    generator.

    Args:
        system: whose main decoder is scored.
        targets: frozen targets of the training images.
        tensors: what was stored of the main decoder.

    Returns:
        "nearest_train": the training image whose targets are nearest to those predicted;
        "mean_image": the mean of the training images, without brain data; and, where there are true
        tokens, "train_distance" (images,): one minus the cosine of the tokens of each seen image
        and of the training image that is most like it.
    """
    subject = system.seen.subject
    train_ids = subject.image_ids("train")
    train_targets = targets.rows(train_ids)
    predictions = system.get_retrieval_rows(tensors)
    rows = find_nearest(predictions, train_targets, k=1)[1][:, 0]
    nearest = torch.from_numpy(subject.images(train_ids[np.asarray(rows)]))
    mean = torch.from_numpy(subject.mean_image("train")).permute(2, 0, 1) / 255
    baselines = {
        "nearest_train": (nearest.permute(0, 3, 1, 2).float() / 255).half(),
        "mean_image": mean.half().expand(len(system.seen), -1, -1, -1).contiguous(),
    }
    if "true_tokens" in tensors:
        similarities, _ = find_nearest(tensors["true_tokens"], train_targets, k=1)
        baselines["train_distance"] = 1 - similarities[:, 0]
    return baselines


def predict_held_out_tokens(
    system: System, targets: TargetCache, decoders: Mapping[str, Decoder], max_images: int
) -> dict[str, Any] | None:
    """Predictions for the first validation images, from which measures of retrieval take their
    scale: the fields of `src.evaluation.likeness.HeldOutTokens`.

    None where there are no tokens or no validation images.
    """
    subject = system.seen.subject
    ids = subject.image_ids("val")[:max_images]
    if not isinstance(system, TokenSystem) or not len(ids):
        return None
    projected = {}
    for name, decoder in decoders.items():
        normaliser = Normaliser.for_checkpoint(decoder.files[0])
        voxels, _ = subject.get_mean_betas("val", normaliser=normaliser)
        projected[name] = system.predict_held_out(decoder, voxels[: len(ids)], ids)
    true_tokens = torch.from_numpy(targets.rows(ids).astype(np.float32))
    train_tokens = targets.rows(subject.image_ids("train"))
    mean_tokens = torch.from_numpy(train_tokens.mean(0, dtype=np.float32))
    return {
        "image_ids": ids,
        "projected": projected,
        "true_tokens": true_tokens.view(-1, *system.shape),
        "mean_tokens": mean_tokens.view(system.shape),
    }
