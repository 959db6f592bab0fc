"""Retrieval by other measures than the plain cosine, both ways, from the files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.data.subject import Subject
from src.encoding.agreement import BrainAgreement
from src.similarity import (
    NEIGHBOURS,
    combine_similarities,
    compute_centred_cosine,
    correct_hubs,
)
from src.utils import PerceptError, atomic, read_tensors

FILE_NAME = "held_out.safetensors"

MAX_IMAGES = 300  # held-out images that are kept

DIRECTIONS = ("image_from_brain", "brain_from_image")

# similarities (brains, images) by measure and direction
Similarities = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class HeldOutTokens:
    """Predictions for validation images, from which a measure takes its scale.

    Attributes:
        image_ids: (images,), ascending.
        projected: tokens predicted from the brain by decoder, (images, tokens, dim) each.
        true_tokens: (images, tokens, dim).
        mean_tokens: mean over training images (tokens, dim).
    """

    image_ids: np.ndarray
    projected: Mapping[str, Tensor]
    true_tokens: Tensor
    mean_tokens: Tensor

    def save(self, folder: str | Path) -> None:
        """Write results/<run>/held_out.safetensors, tokens in half precision."""
        tensors = {
            "image_ids": torch.from_numpy(self.image_ids.astype(np.int64)),
            "true_tokens": self.true_tokens.half(),
            "mean_tokens": self.mean_tokens.float(),
        }
        tensors |= {f"projected_{name}": rows.half() for name, rows in self.projected.items()}
        with atomic(Path(folder) / FILE_NAME) as path:
            save_file({name: rows.contiguous() for name, rows in tensors.items()}, path)


def load_held_out(folder: str | Path, decoders: list[str]) -> HeldOutTokens | None:
    """What `HeldOutTokens.save` wrote, or None where there is no such file.

    Args:
        folder: results/<run>.
        decoders: whose predictions are needed.

    Raises:
        PerceptError: if it is damaged, or a decoder is not in it.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    required = ["image_ids", "true_tokens", "mean_tokens"]
    required += [f"projected_{name}" for name in decoders]
    tensors, _ = read_tensors(path, required, remedy="run notebook 03 for this run again")
    projected = {name: tensors[f"projected_{name}"].float() for name in decoders}
    return HeldOutTokens(
        tensors["image_ids"].numpy(),
        projected,
        tensors["true_tokens"].float(),
        tensors["mean_tokens"],
    )


def compare_embeddings(
    brain: Tensor, clip: Tensor, held_out: HeldOutTokens, decoder: str
) -> Similarities:
    """The centred cosine, and the same corrected for hubs (CSLS), in both directions.

    Args:
        brain: tokens predicted from the brain (n, tokens, dim).
        clip: true tokens (n, tokens, dim).
        held_out: validation images. Each direction finds hubs with held-out queries of its own
            kind: brains where images are candidates, images where brains are.
        decoder: which made `brain`.
    """
    mean, predicted = held_out.mean_tokens, held_out.projected[decoder]
    cosine = compute_centred_cosine(brain, clip, mean)
    k = min(NEIGHBOURS, len(predicted))
    of_images = compute_centred_cosine(predicted, clip, mean)  # (held-out brains, images)
    of_brains = compute_centred_cosine(
        held_out.true_tokens, brain, mean
    )  # (held-out images, brains)
    without_hubs = {
        "image_from_brain": correct_hubs(cosine, of_images, k),
        "brain_from_image": correct_hubs(cosine.T, of_brains, k).T,
    }
    similarities = {("centred cosine", direction): cosine for direction in DIRECTIONS}
    return similarities | {("CSLS", d): matrix for d, matrix in without_hubs.items()}


def compare_by_likelihood(
    agreement: BrainAgreement,
    subject: Subject,
    image_ids: np.ndarray,
    repeats: int,
    cosine: Any,
    held_out: HeldOutTokens,
    decoder: str,
) -> Similarities:
    """The encoding model's likelihood, alone and with the centred cosine.

    Both are z-scored by their pairs of validation images before they are added, so that no test
    query looks at another one.

    Args:
        agreement: of the run's encoding model.
        subject: whose test images these are.
        image_ids: of the test images (n,), ascending.
        repeats: averaged at test, 0 for all.
        cosine: centred cosine of test brains and images (n, n).
        held_out: validation images.
        decoder: which made the cosine.
    """
    likelihood = _compare_split(agreement, subject, "test", image_ids, repeats)
    reference = _compare_split(agreement, subject, "val", held_out.image_ids, 0)
    held_out_cosine = compute_centred_cosine(
        held_out.projected[decoder], held_out.true_tokens, held_out.mean_tokens
    )
    combined = combine_similarities([likelihood, cosine], [reference, held_out_cosine])
    measures = {"likelihood": likelihood, "likelihood and cosine": combined}
    return {(name, d): matrix for name, matrix in measures.items() for d in DIRECTIONS}


def compare_transductively(
    agreement: BrainAgreement, subject: Subject, image_ids: np.ndarray, repeats: int
) -> Similarities:
    """The likelihood, centred over the test brains and images themselves.

    TRANSDUCTIVE: the answer to a query depends on the other queries, which a real use does not
    have. To be reported apart.
    """
    matrix = _compare_split(agreement, subject, "test", image_ids, repeats, "queries")
    return {("likelihood, transductive", d): matrix for d in DIRECTIONS}


def _compare_split(
    agreement: BrainAgreement,
    subject: Subject,
    split: str,
    image_ids: np.ndarray,
    repeats: int,
    center: str = "training",
) -> Tensor:
    """Likelihood of brains given images of a split, (n, n)."""
    split_ids = subject.image_ids(split)
    rows = np.searchsorted(split_ids, image_ids).clip(0, len(split_ids) - 1)
    if not np.array_equal(split_ids[rows], image_ids):
        raise PerceptError(
            f"Images of the run are not in the {split} split of subject {subject.subj}: run"
            " notebook 03 again."
        )
    measured = agreement.measure(subject, split, repeats)[rows]
    pictures = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
    return agreement.compare(measured, pictures, center)
