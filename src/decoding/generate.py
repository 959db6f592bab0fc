"""From tokens, latents and captions to images.

- Randomness is drawn per image from (seed, image id, sample), so a reconstruction does not depend
  on the batch that it was generated in.
- Nothing here sees the images that were shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.decoding.predict import derive_image_seed
from src.pretrained.clip import Clipper, PatchClip
from src.pretrained.generators import (
    ImageGenerator,
    ImageVariation,
    VersatileDiffusion,
    cache_condition,
)
from src.pretrained.unclip import UnclipDecoder
from src.utils import PerceptError

# of the diffusion library, by the name that the early system gave them
SAMPLERS = {"unipcm": "UniPCMultistepScheduler", "pndms": "PNDMScheduler"}


def draw_latent_noise(
    image_ids: np.ndarray,
    shape: tuple[int, int, int],
    seed: int = 42,
    sample: int = 0,
    shared_noise: bool = False,
) -> Tensor:
    """Standard normal noise (images, channels, h, w), one draw an image from (seed, image, sample);
    `shared_noise`: the same for all images, as published.
    """
    draws = []
    for image in image_ids:
        rng = np.random.default_rng([seed, sample, 0 if shared_noise else int(image)])
        draws.append(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)))
    return torch.stack(draws)


def set_sampler(diffusion: ImageGenerator, sampler: str) -> ImageGenerator:
    """The generator, sampling from now on by a key of SAMPLERS; it is loaded with "unipcm". "pndms"
    begins at noise alone (no img2img).
    """
    if sampler not in SAMPLERS:
        raise PerceptError(
            f"There is no sampler '{sampler}' for the generator: choose one of"
            f" {', '.join(SAMPLERS)}."
        )
    current: Any = diffusion.scheduler
    name = SAMPLERS[sampler]
    if type(current).__name__ == name:
        return diffusion
    scheduler_class = next(cls for cls in current.compatibles if cls.__name__ == name)
    scheduler = scheduler_class.from_config(current.config, skip_prk_steps=True)
    # it counts its steps itself, and has no such method
    scheduler.set_begin_index = lambda start: None
    diffusion.scheduler = scheduler
    return diffusion


def load_encoder(
    config: Mapping[str, Any], weights: str, device: str = "cpu"
) -> Clipper | PatchClip:
    """The CLIP whose tokens a checkpoint predicts, from the config that it carries."""
    options = dict(config.get("clip", {}))
    if options.pop("patch_tokens", False):
        return PatchClip(weights, device=device, **options)
    hidden = config["tokens"][0] > 1
    defaults = {"variant": "ViT-L/14", "hidden": hidden, "norm_embs": hidden}
    return Clipper(weights, device=device, **(defaults | options))


def load_generator(
    tokens: int, weights: str, device: str = "cpu", clip: Clipper | PatchClip | None = None
) -> ImageGenerator:
    """The generator that the published systems feed with such tokens: one goes to image variations,
    all of them to Versatile Diffusion, and patch tokens alone to MindEye2's unCLIP.
    """
    if isinstance(clip, PatchClip):
        return UnclipDecoder(weights, device=device, squeezed=clip.squeezed)
    if tokens > 1:
        return VersatileDiffusion(weights, device=device)
    return ImageVariation(weights, device=device)


def generate_images(
    diffusion: ImageGenerator,
    tokens: Tensor,
    image_ids: np.ndarray,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
    seed: int = 42,
    batch_size: int = 50,
    shared_noise: bool = False,
    n_samples: int = 0,
    **options: Any,
) -> Tensor:
    """Generate every sample of every image.

    Args:
        diffusion: the frozen generator.
        tokens: (images, samples, tokens, dim).
        image_ids: (images,), from which the noise is drawn.
        init_latents: scaled latents (images, channels, h, w) to start from, or None.
        strength: as `ImageGenerator.generate`.
        seed: of the noise.
        batch_size: generated images at a time, images times samples.
        shared_noise: the same noise for all images, as published.
        n_samples: samples an image, where `tokens` has one to share; by default as many as it has.
        options: guidance_scale, num_inference_steps.

    Returns:
        (images, samples, 3, height, width) in [0, 1].
    """
    images, samples = len(tokens), n_samples or tokens.shape[1]
    condition = tokens.expand(-1, samples, -1, -1).flatten(0, 1)  # (images * samples, tokens, dim)
    draws = []
    for sample in range(samples):
        shape = diffusion.latent_shape
        draws.append(draw_latent_noise(image_ids, shape, seed, sample, shared_noise))
    noise = torch.stack(draws, 1).flatten(0, 1)  # (images * samples, channels, h, w)
    init = None if init_latents is None else init_latents.repeat_interleave(samples, 0)
    generated = []
    for start in range(0, len(noise), batch_size):
        rows = slice(start, start + batch_size)
        batch_init = None if init is None else init[rows]
        batch = diffusion.generate(condition[rows], noise[rows], batch_init, strength, **options)
        generated.append(batch.cpu())
    return torch.cat(generated).unflatten(0, (images, samples))


def repaint_images(
    pipeline: Any,
    captions: Sequence[str],
    images: Tensor,
    image_ids: np.ndarray,
    strength: float = 0.75,
    seed: int = 42,
    batch_size: int = 16,
    **options: Any,
) -> Tensor:
    """Repaint images after sentences with the library's `StableDiffusionImg2ImgPipeline`.

    Args:
        pipeline: from `pretrained.load_stable_diffusion_pipeline`.
        captions: (images,), one sentence an image.
        images: (images, 3, height, width) in [0, 1], from which it begins.
        image_ids: (images,), from which each image's noise is drawn, whatever batch it is in.
        strength: share of the steps that are run; where that is less than one step, the images come
            back as they are.
        seed: of the noise.
        batch_size: images at a time.
        options: guidance_scale, num_inference_steps.

    Returns:
        (images, 3, height, width) in [0, 1].

    Source: Meng et al. 2022 (SDEdit), arXiv 2108.01073; as in the 2023 ROI project.
    """
    if int(options.get("num_inference_steps", 50) * strength) < 1:
        return images.clone()
    repainted = []
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        generators = []
        for image in image_ids[batch]:
            image_seed = derive_image_seed(seed, int(image))
            generators.append(torch.Generator().manual_seed(image_seed))
        with cache_condition(pipeline.unet):
            output = pipeline(
                prompt=list(captions[batch]),
                image=images[batch].float(),
                strength=strength,
                generator=generators,
                output_type="pt",
                **options,
            )
        repainted.append(output.images.float().clamp(0, 1).cpu())
    return torch.cat(repainted)
