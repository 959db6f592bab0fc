"""How well pictures agree with measured voxels, as the encoding model of a run sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.encoding.measuring import Instrument, open_run_encoder
from src.encoding.store import MODEL_FILE, read_encoder_config
from src.pretrained import Clipper
from src.similarity import BrainLikelihood
from src.utils import PerceptError

# what an encoding model must share with a decoder whose pictures it judges: the training images
SAME_IMAGES = ("split", "n_clusters", "num_sessions")

PICTURES_AT_ONCE = 256


@dataclass(frozen=True)
class BrainAgreement:
    """Likelihood of measured voxels given pictures.

    The encoding model predicts the response to a picture; what is measured beyond that is judged by
    the covariance of the model's out-of-fold residuals. The images that were seen play no part
    unless they are among the pictures.

    Attributes:
        instrument: the encoding model.
        clipper: CLIP whose tokens it reads.
        normaliser: of the voxels that it predicts.
        likelihood: of measured given predicted voxels.
    """

    instrument: Instrument
    clipper: Clipper
    normaliser: Normaliser
    likelihood: BrainLikelihood

    def measure(self, subject: Subject, split: str, repeats: int = 0) -> np.ndarray:
        """Voxels (images, voxels) of a split as the encoding model predicts them.

        Args:
            subject: whose brain it is.
            split: of its images, whose order is that of `Subject.image_ids`.
            repeats: that are averaged, 0 for all.
        """
        return subject.get_mean_betas(split, repeats or None, self.normaliser)[0]

    @torch.no_grad()
    def predict(self, pictures: Tensor) -> Tensor:
        """Responses (n, voxels) to pictures (n, 3, height, width) in [0, 1], on the CPU."""
        responses = []
        for block in pictures.split(PICTURES_AT_ONCE):
            block = block.float().clamp(0, 1)
            pixels = (255 * block).round().to(torch.uint8).permute(0, 2, 3, 1)
            tokens = self.clipper.embed_image(block).float().cpu().numpy()
            responses.append(self.instrument.measure(pixels.cpu().numpy(), tokens).cpu())
        return torch.cat(responses)

    def score_samples(self, measured: np.ndarray, candidates: Tensor) -> Tensor:
        """Log-likelihood, up to a constant, of each brain given its encoder_training candidates.

        Args:
            measured: voxels (images, voxels), of `measure`.
            candidates: (images, samples, 3, height, width) in [0, 1].

        Returns:
            (images, samples).
        """
        responses = self.predict(candidates.flatten(0, 1)).unflatten(0, candidates.shape[:2])
        return self.likelihood.score_samples(torch.from_numpy(measured), responses)

    def select_best(self, measured: np.ndarray, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image's candidates, the one that makes the measured voxels most likely.

        Args:
            measured: voxels (images, voxels), of `measure`.
            candidates: (images, samples, 3, height, width) in [0, 1].

        Returns:
            The chosen images (images, 3, height, width) and their index (images,).
        """
        best = torch.zeros(len(candidates), dtype=torch.long)
        if candidates.shape[1] > 1:
            best = self.score_samples(measured, candidates).argmax(1)
        return candidates[torch.arange(len(candidates)), best], best

    def compare(self, measured: np.ndarray, pictures: Tensor, center: str = "training") -> Tensor:
        """Correlation of whitened measured and predicted responses, (brains, pictures).

        Args:
            measured: voxels (brains, voxels), of `measure`.
            pictures: candidates (m, 3, height, width) in [0, 1].
            center: as `BrainLikelihood.compare`; "queries" is transductive.
        """
        return self.likelihood.compare(torch.from_numpy(measured), self.predict(pictures), center)


def open_brain_agreement(
    logs: str | Path,
    subject: Subject,
    weights: str,
    device: str = "cpu",
    training: Mapping[str, Any] | None = None,
) -> BrainAgreement:
    """The encoding model of a run as a judge of pictures.

    Args:
        logs: train_logs/<run> of notebook 01_train_encoder.
        subject: with its training split.
        weights: pretrained models, "hub", "mini" or a folder.
        device: torch device.
        training: parameters with which the decoder was trained whose pictures are judged; None
            where there is none.

    Raises:
        PerceptError: if there is no encoding model, or it was trained on other data, on other
            training images than the decoder, or reads what pictures do not come with.
    """
    config = read_encoder_config(logs)
    encoder_training = dict(config.get("training", {}))
    if training is not None:
        _check_same_images(encoder_training, training, logs)
    options = dict(config.get("clip", {}))
    clipper = Clipper(weights, device=device, **options)
    normaliser = Normaliser.for_checkpoint(Path(logs) / MODEL_FILE)
    assert normaliser is not None  # of a file of this repository
    defaults = {"clip_variant": options.get("variant"), "norm_embs": options.get("norm_embs")}
    parameters = encoder_training | defaults | {"weights": weights}
    instrument, noise = open_run_encoder(logs, subject, normaliser, parameters, device)
    # with an intercept, predictions have the mean of what they were fitted to
    mean = subject.get_mean_betas("train", normaliser=normaliser)[0].mean(0)
    covariance = noise.covariance().cpu()
    likelihood = BrainLikelihood.from_covariance(covariance, mean, mean)
    return BrainAgreement(instrument, clipper, normaliser, likelihood)


def _check_same_images(
    encoder_training: Mapping[str, Any], training: Mapping[str, Any], logs: str | Path
) -> None:
    """Refuse an encoding model that has seen images which were held out of the decoder."""
    for name in SAME_IMAGES:
        before, now = encoder_training.get(name), training.get(name)
        if before is not None and now is not None and before != now:
            raise PerceptError(
                f"The encoding model in {logs} was trained with {name} {before!r} and the decoder"
                f" with {now!r}: train both on the same images."
            )


@dataclass(frozen=True)
class BrainSelection:
    """Chooses among samples of test images the one that makes the measured voxels most likely.

    Attributes:
        agreement: the encoding model.
        voxels: measured, (images, voxels) by number of repeats averaged, 0 for as many as are
            asked for.
    """

    agreement: BrainAgreement
    voxels: dict[int, np.ndarray]

    def select(self, repeats: int, rows: slice, samples: Tensor) -> Tensor:
        """Samples (images, samples, 3, height, width) of some test images -> one an image."""
        return self.agreement.select_best(self.voxels[repeats][rows], samples)[0]


def open_brain_selection(
    agreement: BrainAgreement,
    subject: Subject,
    n_images: int,
    repeats: int = 0,
    fewer_repeats: Sequence[int] = (),
) -> BrainSelection:
    """What was measured of the first test images, for a choice among their samples.

    Args:
        agreement: from `open_brain_agreement`.
        subject: whose test images are reconstructed.
        n_images: the first so many of them.
        repeats: number of repeats averaged, 0 for all.
        fewer_repeats: smaller numbers of repeats that are reconstructed beside.
    """
    voxels = {
        k: agreement.measure(subject, "test", k or repeats)[:n_images] for k in (0, *fewer_repeats)
    }
    return BrainSelection(agreement, voxels)
