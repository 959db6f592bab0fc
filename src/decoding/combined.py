"""What the combined system has besides the networks: choices that go together, captions as targets,
and what is looked at while it trains.

- The early system that trains voxel2clip and LAION's prior end to end; the model is
  `src.reconstruct.combined_config`, its losses are in src/losses.py, the training is notebook
  01_train_combined. docs/combined.md says where it differs from the published code.
- Nothing here sees a test image: samples are of training and validation images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from src.data.draws import choose_repeats
from src.data.layout import dataset_folder
from src.data.targets import AugmentedTargets
from src.decoding.generate import generate_images
from src.decoding.predict import predict_tokens
from src.networks.encoders import ENCODERS
from src.pretrained.clip import Clipper
from src.pretrained.generators import ImageVariation
from src.pretrained.metric_networks import FeatureNetwork
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError, atomic


def check_combined_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters of the notebook that do not go together.

    Raises:
        PerceptError: what does not go together, and what to change.
    """
    p = parameters
    augmented = p["clip_aug_mode"] != "none"
    refused = {
        "combine_losses needs combine_models, as a frozen voxel2clip has no loss of its own: set combine_models to True, or combine_losses to False.": (
            p["combine_losses"] and not p["combine_models"]
        ),
        "combine_models is False, so voxel2clip stays as it is: say with voxel2clip_path which trained one to take.": (
            not p["combine_models"] and not p["voxel2clip_path"]
        ),
        "clip_aug_mode changes what a frozen voxel2clip is paired with: set combine_models to False, or clip_aug_mode to none.": (
            augmented and p["combine_models"]
        ),
        "clip_aug_mode paints images: it goes with modality image, not with text.": (
            augmented and p["modality"] == "text"
        ),
        "use_image_aug changes images, and the targets of modality text are captions: leave one of them.": (
            p["use_image_aug"] and p["modality"] == "text"
        ),
        f"arch '{p['arch']}' reads whole volumes: set voxel_dims to 3, or choose brainnet.": (
            ENCODERS[p["arch"]][0] == "VolumeEncoder" and p["voxel_dims"] != 3
        ),
        "remote_data fetches the voxels of nsdgeneral: for whole volumes (voxel_dims 3) prepare betas (trials, x, y, z) yourself.": (
            p["remote_data"] and p["voxel_dims"] == 3
        ),
        "use_mixco mixes voxels for a contrastive loss, which combine_losses False leaves out: leave one of them.": (
            p["use_mixco"] and not p["combine_losses"]
        ),
    }
    for sentence, holds in refused.items():
        if holds:
            raise PerceptError(sentence)


def check_volumes(voxel_dims: int, volume: Sequence[int] | None) -> None:
    """Refuse data of another kind than voxel_dims says; `volume` is (x, y, z) of the betas, or None
    where they are (trials, voxels).
    """
    if (voxel_dims == 3) != (volume is not None):
        there = (
            "(trials, voxels)"
            if volume is None
            else f"volumes (trials, {', '.join(map(str, volume))})"
        )
        raise PerceptError(
            f"voxel_dims is {voxel_dims}, but the prepared betas are {there}: set voxel_dims to"
            f" {1 if volume is None else 3}, or prepare others."
        )


class CaptionTargets(AugmentedTargets):
    """Embeddings of the captions of images, as `src.data.BrainDataset` takes them: an epoch shows
    one caption of each image.

    Args:
        table: columns image and caption; empty captions are left out.
        embeddings: (captions, dim), in the order of the captions that are left.
    """

    def __init__(self, table: pd.DataFrame, embeddings: np.ndarray):
        self.table = select_captions(table)
        if len(embeddings) != len(self.table):
            raise PerceptError(
                f"There are {len(embeddings)} embeddings for {len(self.table)} captions: embed them"
                " again."
            )
        ids = self.table["image"].to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self.image_ids, self._first, self._counts = np.unique(
            ids[self._order], return_index=True, return_counts=True
        )
        self.embeddings = embeddings

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if one of these images has no caption."""
        missing = np.setdiff1d(image_ids, self.image_ids)
        if len(missing):
            raise PerceptError(
                f"{len(missing)} images have no caption, the first is {missing[0]}: add some to"
                " captions.parquet, or set modality to image."
            )

    def rows(self, image_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Of each image the caption that (seed, epoch, image) choose, (n, dim)."""
        at = np.searchsorted(self.image_ids, image_ids)
        return self.embeddings[
            self._order[
                self._first[at]
                + choose_repeats(seed + 3, epoch, np.asarray(image_ids), self._counts[at])
            ]
        ]

    def first(self, image_ids: np.ndarray) -> np.ndarray:
        """Of each image its first caption, (n, dim)."""
        self.check(image_ids)
        return self.embeddings[self._order[self._first[np.searchsorted(self.image_ids, image_ids)]]]


def select_captions(table: pd.DataFrame | None) -> pd.DataFrame:
    """The captions that are not empty, columns image and caption.

    Raises:
        PerceptError: there is none.
    """
    left = (
        pd.DataFrame({"image": [], "caption": []})
        if table is None
        else table[table["caption"].fillna("").str.strip() != ""]
    )
    if not len(left):
        raise PerceptError(
            "This dataset has no captions (captions.parquet): prepare it with some, or set modality"
            " to image."
        )
    return left.reset_index(drop=True)


def embed_captions(
    dataset: str | Path, table: pd.DataFrame | None, clipper: Clipper
) -> CaptionTargets:
    """The embedding of every caption of a dataset, computed once and stored beside its other
    targets.

    Args:
        dataset: as for `src.data.open_subject`.
        table: `Subject.captions`.
        clipper: whose text half embeds them.
    """
    left = select_captions(table)
    made_by = {
        k: v for k, v in clipper.fingerprint().items() if k != "golden"
    }  # whose last digits differ between devices
    key = hashlib.sha256(
        json.dumps([made_by, left["caption"].tolist()], sort_keys=True).encode()
    ).hexdigest()[:12]
    path = dataset_folder(dataset) / "targets" / f"captions-{key}.npy"
    if not path.exists():
        texts = left["caption"].tolist()
        parts = [
            clipper.embed_text(texts[start : start + 256]).half().cpu().numpy()
            for start in range(0, len(texts), 256)
        ]
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(parts))
    return CaptionTargets(left, np.load(path, mmap_mode="r", allow_pickle=False))


def embed_variations(
    diffusion: ImageVariation,
    clipper: Clipper,
    condition: Tensor,
    image_ids: Tensor,
    seed: int,
    steps: int = 30,
) -> Tensor:
    """CLIP embeddings of image variations painted from embeddings, both (batch, dim)."""
    pictures = generate_images(
        diffusion,
        condition.view(len(condition), 1, 1, -1),
        image_ids.cpu().numpy(),
        seed=seed,
        num_inference_steps=steps,
    )[:, 0]
    return clipper.embed_image(pictures).to(condition)


def generate_sample_grid(
    model: BrainDiffusionPrior,
    diffusion: ImageVariation,
    voxels: np.ndarray,
    targets: np.ndarray,
    image_ids: np.ndarray,
    samples: int = 4,
    timesteps: int = 0,
    steps: int = 50,
    seed: int = 42,
) -> dict[str, Tensor]:
    """Pictures for a grid of samples, (images, 3, height, width) by title: from the true embedding,
    and several from the brain.

    The first sample from the brain begins at the same noise as that from the true embedding.

    Args:
        model: with its voxel2clip.
        diffusion: the generator.
        voxels: (images, voxels), normalised.
        targets: true embeddings (images, dim).
        image_ids: (images,), from which noise is drawn.
        samples: pictures from the brain.
        timesteps: sampling steps of the prior, 0 for all of its schedule.
        steps: of the generator.
        seed: of the noise.
    """
    truth = torch.as_tensor(targets, dtype=torch.float32)[:, None, None]  # (images, 1, 1, dim)
    device = str(next(model.parameters()).device)
    tokens, _ = predict_tokens(
        model,
        voxels,
        (1, truth.shape[-1]),
        samples,
        timesteps=timesteps,
        seed=seed,
        device=device,
        image_ids=image_ids,
    )
    made = generate_images(
        diffusion, tokens, image_ids, seed=seed, num_inference_steps=steps
    )  # (images, samples, 3, height, width)
    best = generate_images(diffusion, truth, image_ids, seed=seed, num_inference_steps=steps)[:, 0]
    return {"true embedding": best} | {f"brain {k + 1}": made[:, k] for k in range(samples)}


class _Features(nn.Module):
    """A `FeatureNetwork` as torchmetrics asks for it."""

    def __init__(self, network: FeatureNetwork):
        super().__init__()
        self.network, self.num_features = network, network.dim

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.network(images)))


def compute_fid(network: FeatureNetwork, real: Tensor, made: Tensor) -> float:
    """Fréchet distance between the features of real and of generated pictures, (n, 3, height,
    width) each in [0, 1].

    Of a few dozen pictures it is far from what thousands would give: it compares epochs of one
    training, and nothing else.

    Raises:
        PerceptError: for fewer than two pictures of a kind, which have no covariance.

    Source: Heusel et al. 2017, arXiv 1706.08500; computed by torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    if min(len(real), len(made)) < 2:
        raise PerceptError(
            f"FID compares spreads and needs at least two pictures of each kind, not {len(real)}"
            f" and {len(made)}."
        )
    distance = FrechetInceptionDistance(feature=_Features(network))
    distance.update(real.float(), real=True)
    distance.update(made.float(), real=False)
    return float(distance.compute())
