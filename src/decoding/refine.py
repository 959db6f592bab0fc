"""MindEye2's refinement: SDXL repaints a reconstruction after the caption that was predicted with
it.

- The pipeline is diffusers' own, `StableDiffusionXLImg2ImgPipeline`; in the mini world the mini
  Stable Diffusion's takes its place.
- As published the schedule has 25 Euler steps, of which the last twelve are run: from sigma 1.5092,
  so that what is coarse stays.
- Nothing here sees the images that were shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from src.decoding.generate import repaint_images
from src.pretrained.unclip import compute_euler_timesteps
from src.utils import PerceptError, progress

SIZE = 768  # pixels a side of what is repainted

TARGET = 1024  # pixels a side that the network is told its image is meant for

# In our own words; the published one, which is as long and as general, can be passed instead.
NEGATIVE_PROMPT = (
    "drawing, illustration, cartoon, painted, 3d render, blurry, out of focus, low resolution,"
    " noisy, grainy, overexposed, watermark, signature, text, frame, cropped, deformed, disfigured,"
    " extra limbs, extra fingers, fused fingers, bad anatomy, bad hands, distorted face, duplicate,"
    " ugly"
)


@dataclass(frozen=True)
class Refinement:
    """How an image is repainted.

    Attributes:
        steps: of the whole schedule.
        run: the last of them that are run, at least one.
        guidance_scale: of classifier-free guidance.
        negative_prompt: what guidance leads away from; the miniature, whose captions have no such
            words, is led away from an empty sentence.
        size: pixels a side of what is repainted; 0: 768 as published, or the miniature's.
    """

    steps: int = 25
    run: int = 12
    guidance_scale: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    size: int = 0


def refine_images(
    pipeline: Any,
    captions: Sequence[str],
    images: Tensor,
    image_ids: np.ndarray,
    refinement: Refinement | None = None,
    seed: int = 42,
    batch_size: int = 4,
) -> Tensor:
    """Repaint reconstructions after their captions.

    Args:
        pipeline: from `load_refiner`.
        captions: (images,), one predicted sentence an image.
        images: reconstructions (images, 3, height, width) in [0, 1].
        image_ids: (images,), from which each image's noise is drawn, whatever batch it is in.
        refinement: steps, guidance, size.
        seed: of the noise.
        batch_size: images at a time.

    Returns:
        (images, 3, height, width) in [0, 1] float32, as large as the reconstructions.

    Raises:
        PerceptError: if captions, images and ids differ in number, or for steps that do not exist.
    """
    refinement = refinement or Refinement()
    steps, run = refinement.steps, refinement.run
    if not len(captions) == len(images) == len(image_ids):
        raise PerceptError(
            f"There are {len(captions)} captions for {len(images)} images and {len(image_ids)}"
            " ids: give one of each for every image."
        )
    if not 1 <= run <= steps:
        raise PerceptError(
            f"The refinement is to run {run} of {steps} steps: run at least one and not more than"
            " there are."
        )
    size, options = _choose_options(pipeline, refinement)
    strength = min(1.0, (run + 0.5) / steps)  # half a step more, because the library rounds down
    refined = []
    for start in progress(range(0, len(images), batch_size), "refining"):
        rows = slice(start, start + batch_size)
        repainted = repaint_images(
            pipeline,
            captions[rows],
            _resize(images[rows], (size, size)),
            image_ids[rows],
            strength,
            seed,
            batch_size,
            **options,
        )
        refined.append(_resize(repainted, tuple(images.shape[-2:])))
    return torch.cat(refined)


def _choose_options(pipeline: Any, refinement: Refinement) -> tuple[int, dict[str, Any]]:
    """Pixels a side, and the options that this pipeline takes."""
    options: dict[str, Any] = {
        "num_inference_steps": refinement.steps,
        "guidance_scale": refinement.guidance_scale,
    }
    if not isinstance(pipeline, StableDiffusionXLImg2ImgPipeline):
        return refinement.size or pipeline.vae.config.sample_size, options
    size = refinement.size or SIZE
    return size, options | {
        "timesteps": compute_euler_timesteps(refinement.steps),
        "negative_prompt": refinement.negative_prompt,
        "original_size": (size, size),
        "crops_coords_top_left": (0, 0),
        "target_size": (TARGET, TARGET),
    }


def _resize(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images (images, 3, height, width) of another size, antialiased; those that have it stay as
    they are.
    """
    images = images.float()
    if tuple(images.shape[-2:]) == shape:
        return images
    return F.interpolate(images, shape, mode="bilinear", antialias=True).clamp(0, 1)
