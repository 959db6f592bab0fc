"""The map from one token space to another that captions need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from src.data.targets import TargetCache
from src.networks.linear import CaptionConverter
from src.training.batches import iterate_batches
from src.training.loop import fit, load_best


class TokenPairs:
    """Tokens of two image encoders for images, as `fit` takes them: {"given": (batch, tokens, dim),
    "wanted": (batch, tokens, dim)}.

    Args:
        source, target: what `cache_targets` gave.
        image_ids: (images,).
    """

    def __init__(self, source: TargetCache, target: TargetCache, image_ids: np.ndarray):
        self.source, self.target, self.image_ids = source, target, image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Nothing is random here."""

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of pairs."""
        ids = self.image_ids[np.asarray(indices)]
        return {
            "given": torch.from_numpy(self.source.rows(ids)).float(),
            "wanted": torch.from_numpy(self.target.rows(ids)).float(),
        }


def fit_converter(
    source: TargetCache,
    target: TargetCache,
    train_ids: np.ndarray,
    val_ids: np.ndarray,
    folder: str | Path,
    made_by: dict[str, Any],
    epochs: int = 60,
    batch_size: int = 128,
    max_lr: float = 3e-4,
    seed: int = 42,
    device: str = "auto",
    resume: bool = True,
) -> tuple[CaptionConverter, pd.DataFrame]:
    """Teach a `CaptionConverter` by squared error, on images alone: no brain is in it.

    Args:
        source: tokens that are given, from `cache_targets`.
        target: tokens that are wanted.
        train_ids: (images,) training images.
        val_ids: (images,) validation images, on which the best epoch is chosen.
        folder: for checkpoints, as `fit`.
        made_by: whatever else it depends on, as JSON values, e.g. the fingerprints of both
            encoders.
        epochs, batch_size, max_lr, seed, device, resume: as `fit`.

    Returns:
        The converter of the best epoch, in eval mode, and its history with the column val/r2, the
        share of the variance over images that it explains.

    Source: MindEye2 (arXiv 2403.11207), appendix A.6.
    """
    converter = CaptionConverter(source.shape[0], target.shape[0], source.shape[1], target.shape[1])
    with torch.no_grad():
        # from random signs training can end with some tokens turned round
        converter.linear1.weight.abs_()
    val = TokenPairs(source, target, val_ids)

    def step(
        model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Any]]:
        return (model(batch["given"]) - batch["wanted"]).square().mean(), {}

    def validate(model: nn.Module) -> dict[str, float]:
        pairs = [
            (model(batch["given"]), batch["wanted"])
            for batch in iterate_batches(val, 250, next(model.parameters()).device)
        ]
        predicted, true = (torch.cat(x) for x in zip(*pairs, strict=True))
        mse = (predicted - true).square().mean()
        return {
            "val/loss": mse.item(),
            "val/r2": 1 - (mse / (true - true.mean(0)).square().mean()).item(),
        }

    history = fit(
        converter,
        step,
        TokenPairs(source, target, train_ids),
        folder=folder,
        config={"model": converter.config} | made_by,
        epochs=epochs,
        batch_size=min(batch_size, len(train_ids)),
        max_lr=max_lr,
        validate=validate,
        seed=seed,
        resume=resume,
        device=device,
        ckpt_interval=0,
    )
    return load_best(converter, folder).requires_grad_(False), history  # type: ignore[return-value]
