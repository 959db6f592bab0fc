"""The encoding model of a run as an instrument: image in, response out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from src.data.identity import check_trained_on
from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.encoding.features import Extractor, build_extractors, compute_features
from src.encoding.model import EncodingModel
from src.encoding.noise import NoiseModel
from src.encoding.store import load_encoder, read_encoder_config
from src.utils import PerceptError

# what an encoding model and a decoder trained on its measurements must have in common
SHARED = ("split", "n_clusters", "num_sessions", "rois")

NEEDS_LABELS = ("categories", "captions")


class Instrument:
    """An encoding model with all that it needs to answer to images that come without labels.

    Args:
        model: fitted.
        extractors: of feature spaces other than "tokens" and "gabor".

    Raises:
        PerceptError: if the model reads labels or captions, which a pool does not have.
    """

    def __init__(self, model: EncodingModel, extractors: Mapping[str, Extractor] | None = None):
        self.model, self.extractors = model, dict(extractors or {})
        needed = [name for name in model.spaces if name in NEEDS_LABELS]
        if needed:
            raise PerceptError(
                f"The encoding model reads {', '.join(needed)}, which images of a pool do not come"
                " with: train one without them (feature_spaces of notebook 01_train_encoder)."
            )

    @property
    def spaces(self) -> list[str]:
        """Names of the feature spaces that the model reads."""
        return self.model.spaces

    def measure(self, images: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Responses to images, without noise.

        Args:
            images: uint8 (n, height, width, 3).
            tokens: CLIP tokens of these images, (n, ...).

        Returns:
            float32 (n, voxels), z-scored.
        """
        known_features = {"tokens": tokens}
        features = compute_features(self.spaces, images, known_features, self.extractors)
        return self.model.predict(features)


def open_run_encoder(
    logs: str | Path,
    subject: Subject,
    normaliser: Normaliser,
    parameters: Mapping[str, Any],
    device: str = "cpu",
) -> tuple[Instrument, NoiseModel]:
    """The encoding model of a run and the noise of its measurements, if they are of these voxels.

    Args:
        logs: train_logs/<run> of notebook 01_train_encoder.
        subject: with its training split.
        normaliser: of the voxels that a decoder will read.
        parameters: of the decoder's training: SHARED, `clip_variant` and `norm_embs` of the tokens
            that `Instrument.measure` will be given, and `weights` of GNet.
        device: torch device.

    Raises:
        PerceptError: if there is none, or it was trained on other data, other voxels or other
            tokens.
    """
    model, noise = load_encoder(logs, device)
    check_trained_on(logs, subject.key, subject.identity)
    if model.n_voxels != normaliser.n_features:
        raise PerceptError(
            f"The encoding model in {logs} predicts {model.n_voxels} voxels and the decoder reads"
            f" {normaliser.n_features}: train both with the same rois."
        )
    _check_training(read_encoder_config(logs), parameters, logs)
    extractors = build_extractors(model.spaces, parameters["weights"], subject.subj, device)
    return Instrument(model, extractors), noise


def _check_training(
    config: Mapping[str, Any], parameters: Mapping[str, Any], logs: str | Path
) -> None:
    """Refuse an encoding model of other images, voxels or tokens than a decoder is trained with."""
    before = dict(config.get("training", {}))
    clip = config.get("clip", {})
    for name, value in (("clip_variant", "variant"), ("norm_embs", "norm_embs")):
        if value in clip:
            before[name] = clip[value]
    for name in (*SHARED, "clip_variant", "norm_embs"):
        if name in before and before[name] != parameters[name]:
            raise PerceptError(
                f"The encoding model in {logs} was trained with {name} {before[name]!r}, here it is"
                f" {parameters[name]!r}: set both alike."
            )
