"""What the combined system has besides the networks: checks of its parameters, and images that are
generated while it trains.

- The early system that trains voxel2clip and LAION's prior end to end; its model is described in
  configs.py, its losses are in src/losses.py, the training is notebook 01_train_combined.
  docs/combined.md says where it differs from the published code.
- Nothing here sees a test image: samples are of training and validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.decoding.generate import generate_images
from src.decoding.predict import PriorSampling, predict_tokens
from src.networks.encoders import ENCODERS
from src.pretrained.clip import Clipper
from src.pretrained.generators import ImageVariation
from src.pretrained.metric_networks import FeatureNetwork
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError


def check_combined_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters of the notebook that do not go together.

    Raises:
        PerceptError: what does not go together, and what to change.
    """
    for sentence, is_refused in _list_conflicts(parameters):
        if is_refused:
            raise PerceptError(sentence)


def _list_conflicts(p: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(what does not go together and what to change, whether it is so)."""
    is_augmented = p["clip_aug_mode"] != "none"
    is_text, is_volume = p["modality"] == "text", p["voxel_dims"] == 3
    is_volume_encoder = ENCODERS[p["arch"]][0] == "VolumeEncoder"
    return [
        (
            "combine_models is False, so voxel2clip stays as it is: say with voxel2clip_path which"
            " trained one to take.",
            not p["combine_models"] and not p["voxel2clip_path"],
        ),
        (
            "clip_aug_mode changes what a frozen voxel2clip is paired with: set combine_models to"
            " False, or clip_aug_mode to none.",
            is_augmented and p["combine_models"],
        ),
        (
            "clip_aug_mode paints images: it goes with modality image, not with text.",
            is_augmented and is_text,
        ),
        (
            "use_image_aug changes images, and the targets of modality text are captions: leave one"
            " of them.",
            p["use_image_aug"] and is_text,
        ),
        (
            f"arch '{p['arch']}' reads whole volumes: set voxel_dims to 3, or choose brainnet.",
            is_volume_encoder and not is_volume,
        ),
        (
            "remote_data fetches the voxels of nsdgeneral: for whole volumes (voxel_dims 3) prepare"
            " betas (trials, x, y, z) yourself.",
            p["remote_data"] and is_volume,
        ),
        (
            "use_mixco mixes voxels for a contrastive loss, which combine_losses False leaves out:"
            " leave one of them.",
            p["use_mixco"] and not p["combine_losses"],
        ),
    ]


def check_volumes(voxel_dims: int, volume: Sequence[int] | None) -> None:
    """Refuse data of another kind than voxel_dims says; `volume` is (x, y, z) of the betas, or None
    where they are (trials, voxels).
    """
    if (voxel_dims == 3) == (volume is not None):
        return
    shape, fitting_dims = "(trials, voxels)", 1
    if volume is not None:
        shape, fitting_dims = f"volumes (trials, {', '.join(map(str, volume))})", 3
    raise PerceptError(
        f"voxel_dims is {voxel_dims}, but the prepared betas are {shape}: set voxel_dims to"
        f" {fitting_dims}, or prepare others."
    )


def embed_variations(
    diffusion: ImageVariation,
    clipper: Clipper,
    condition: Tensor,
    image_ids: Tensor,
    seed: int,
    steps: int = 30,
) -> Tensor:
    """CLIP embeddings of image variations generated from embeddings, both (batch, dim)."""
    variations = generate_images(
        diffusion,
        condition.view(len(condition), 1, 1, -1),
        image_ids.cpu().numpy(),
        seed=seed,
        num_inference_steps=steps,
    )
    return clipper.embed_image(variations[:, 0]).to(condition)


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
    """Images for a grid of samples, (images, 3, height, width) by title: from the true embedding,
    and several from the brain.

    The first sample from the brain begins at the same noise as that from the true embedding.

    Args:
        model: with its voxel2clip.
        diffusion: the generator.
        voxels: (images, voxels), normalised.
        targets: true embeddings (images, dim).
        image_ids: (images,), from which noise is drawn.
        samples: samples from the brain an image.
        timesteps: sampling steps of the prior, 0 for all of its schedule.
        steps: of the generator.
        seed: of the noise.
    """
    truth = torch.as_tensor(targets, dtype=torch.float32)[:, None, None]  # (images, 1, 1, dim)
    tokens, _ = predict_tokens(
        model,
        voxels,
        (1, truth.shape[-1]),
        PriorSampling(samples, timesteps=timesteps, seed=seed),
        image_ids=image_ids,
        device=str(next(model.parameters()).device),
    )
    options: dict[str, Any] = {"seed": seed, "num_inference_steps": steps}
    from_brain = generate_images(diffusion, tokens, image_ids, **options)
    from_truth = generate_images(diffusion, truth, image_ids, **options)
    grid = {"true embedding": from_truth[:, 0]}
    for sample in range(samples):
        grid[f"brain {sample + 1}"] = from_brain[:, sample]
    return grid


class _Features(nn.Module):
    """A `FeatureNetwork` in the form that torchmetrics takes."""

    def __init__(self, network: FeatureNetwork):
        super().__init__()
        self.network, self.num_features = network, network.dim

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self.network(images)))


def compute_fid(network: FeatureNetwork, real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between the features of real and of generated images, (n, 3, height, width)
    each in [0, 1].

    Of a few dozen images it is far from what thousands would give: it compares epochs of one
    training, and nothing else.

    Raises:
        PerceptError: for fewer than two images of a kind, which have no covariance.

    Source: Heusel et al. 2017, arXiv 1706.08500; computed by torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    if min(len(real), len(generated)) < 2:
        raise PerceptError(
            f"FID compares spreads and needs at least two images of each kind, not {len(real)}"
            f" and {len(generated)}."
        )
    distance = FrechetInceptionDistance(feature=_Features(network))
    distance.update(real.float(), real=True)
    distance.update(generated.float(), real=False)
    return float(distance.compute())
