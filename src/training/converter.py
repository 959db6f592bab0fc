"""The map from one token space to another that captions need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from src.data.splits import open_all_sessions
from src.data.subject import Subject
from src.data.targets import TargetCache, cache_encoder_targets
from src.networks.linear import CaptionConverter
from src.pretrained.clip import PatchClip
from src.training.batches import iterate_batches
from src.training.loop import fit, load_best
from src.training.options import Batching, Checkpointing, Execution, Optimisation
from src.training.types import Batch


class TokenPairs:
    """Tokens of two image encoders for images, as `fit` takes them: {"source": (batch, tokens,
    dim), "target": (batch, tokens, dim)}.

    Args:
        source: tokens to convert, from `cache_targets`.
        target: tokens to convert them into.
        image_ids: (images,).
    """

    def __init__(self, source: TargetCache, target: TargetCache, image_ids: np.ndarray):
        self.source, self.target, self.image_ids = source, target, image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Nothing is random here."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of pairs."""
        ids = self.image_ids[np.asarray(indices)]
        return {
            "source": torch.from_numpy(self.source.rows(ids)).float(),
            "target": torch.from_numpy(self.target.rows(ids)).float(),
        }


def fit_patch_converter(
    source: PatchClip,
    target: PatchClip,
    subject: Subject,
    folder: str | Path,
    epochs: int,
    seed: int = 42,
    device: str = "cpu",
) -> tuple[CaptionConverter, float]:
    """Teach the map from the patch tokens of one CLIP to those of another, on training images.

    Args:
        source: CLIP whose tokens a decoder predicts.
        target: CLIP whose tokens a generator reads.
        subject: whose images are used, those of all sessions.
        folder: for checkpoints, as `fit`.
        epochs: passes over the training images.
        seed: of the order of the images.
        device: torch device.

    Returns:
        The converter of the best epoch, and the share of the variance of the target tokens that it
        explains on validation images.
    """
    subject = open_all_sessions(subject.folder, subject.subj, subject)
    from_tokens, to_tokens = (
        cache_encoder_targets(subject.folder, "patch_tokens", encoder, subject.all_images)
        for encoder in (source, target)
    )
    made_by = {"from": source.fingerprint()["model"], "to": target.fingerprint()["model"]}
    made_by["images"] = subject.identity["images"]
    converter, history = fit_converter(
        TokenPairs(from_tokens, to_tokens, subject.image_ids("train")),
        TokenPairs(from_tokens, to_tokens, subject.image_ids("val")),
        folder,
        made_by,
        Batching(epochs, batch_size=128, seed=seed),
        execution=Execution(device),
    )
    return converter, float(history["val/r2"].max())


def _step(model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Any]]:
    """Squared error of the converted tokens."""
    return (model(batch["source"]) - batch["target"]).square().mean(), {}


def _score(model: nn.Module, pairs: TokenPairs) -> dict[str, float]:
    """Squared error, and the share of the variance over images that is explained."""
    converted, targets = [], []
    for batch in iterate_batches(pairs, 250, next(model.parameters()).device):
        converted.append(model(batch["source"]))
        targets.append(batch["target"])
    predicted, true = torch.cat(converted), torch.cat(targets)
    mse = (predicted - true).square().mean()
    variance = (true - true.mean(0)).square().mean()
    return {"val/loss": mse.item(), "val/r2": 1 - (mse / variance).item()}


def fit_converter(
    train: TokenPairs,
    val: TokenPairs,
    folder: str | Path,
    provenance: dict[str, Any],
    batching: Batching,
    optimisation: Optimisation | None = None,
    execution: Execution | None = None,
    resume: bool = True,
) -> tuple[CaptionConverter, pd.DataFrame]:
    """Teach a `CaptionConverter` by squared error, on images alone: no brain is in it.

    Args:
        train: tokens of the training images.
        val: tokens of the validation images, on which the best epoch is chosen.
        folder: for checkpoints, as `fit`.
        provenance: whatever else it depends on, as JSON values, e.g. the fingerprints of both
            encoders.
        batching, execution: as `fit`; a batch has at most as many samples as there are.
        optimisation: as `fit`, by default one cycle up to 3e-4.
        resume: go on with what is in the folder.

    Returns:
        The converter of the best epoch, in eval mode, and its history with the column val/r2, the
        share of the variance over images that it explains.

    Source: MindEye2 (arXiv 2403.11207), appendix A.6.
    """
    (source_tokens, source_dim), (target_tokens, target_dim) = (
        train.source.shape,
        train.target.shape,
    )
    converter = CaptionConverter(source_tokens, target_tokens, source_dim, target_dim)
    with torch.no_grad():
        # from random signs training can end with the signs of some tokens reversed
        converter.linear1.weight.abs_()
    history = fit(
        converter,
        _step,
        train,
        folder=folder,
        config={"model": converter.config} | provenance,
        batching=replace(batching, batch_size=min(batching.batch_size, len(train))),
        optimisation=optimisation or Optimisation(max_lr=3e-4),
        execution=execution,
        checkpointing=Checkpointing(resume=resume, ckpt_interval=0),
        validate=lambda model: _score(model, val),
    )
    load_best(converter, folder)
    return converter.requires_grad_(False), history
