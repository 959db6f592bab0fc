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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from src.decoding.generate import repaint_images
from src.pretrained.base import load_frozen, silence_libraries
from src.pretrained.generators import load_stable_diffusion_pipeline
from src.pretrained.unclip import compute_euler_timesteps
from src.utils import HOME, PerceptError, progress

CHECKPOINT = "zavychromaxl_v30.safetensors"

# whose configuration and tokenizers a single file needs
BASE = "stabilityai/stable-diffusion-xl-base-1.0"

SIZE, TARGET = (
    768,
    1024,
)  # pixels a side: of what is repainted, and what the network is told that it was meant for

STEPS, RUN = 25, 12

# In our own words; the published one, which is as long and as general, can be passed instead.
NEGATIVE_PROMPT = (
    "drawing, illustration, cartoon, painted, 3d render, blurry, out of focus, low resolution,"
    " noisy, grainy, overexposed, watermark, signature, text, frame, cropped, deformed, disfigured,"
    " extra limbs, extra fingers, fused fingers, bad anatomy, bad hands, distorted face, duplicate,"
    " ugly"
)


def load_refiner(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None, base: str = BASE
) -> Any:
    """The pipeline that repaints.

    Args:
        weights: "mini"; a folder that holds an SDXL pipeline; a single file (.safetensors); an id
            of the hub; or "hub": the published file,
            data/mindeye2_models/zavychromaxl_v30.safetensors.
        device: torch device.
        dtype: half precision on a GPU by default, as published.
        base: folder or id of the hub with the configuration of a single file.

    Raises:
        PerceptError: if the weights are missing or are of another kind.

    Source: Podell et al. 2023 (SDXL), arXiv 2307.01952; MindEye2 (arXiv 2403.11207), section 2.6.
    """
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    if weights == "mini":
        return load_stable_diffusion_pipeline("mini", device, dtype)
    place = str(HOME / "data" / "mindeye2_models" / CHECKPOINT) if weights == "hub" else weights
    made = (
        _from_file(place, base, dtype)
        if place.endswith(".safetensors")
        else load_frozen(StableDiffusionXLImg2ImgPipeline, place, torch_dtype=dtype)
    )
    made.scheduler = EulerDiscreteScheduler.from_config(
        made.scheduler.config, use_karras_sigmas=False, final_sigmas_type="zero"
    )
    made.watermark = None  # the published pictures have none
    return made.to(device)


def _from_file(place: str, base: str, dtype: torch.dtype) -> Any:
    if not Path(place).is_file():
        raise PerceptError(
            f"The refiner is not at {place}: run 'python run.py download refiner', or set its"
            " weights to a file or folder."
        )
    try:
        with silence_libraries():
            return StableDiffusionXLImg2ImgPipeline.from_single_file(
                place, config=base, torch_dtype=dtype
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PerceptError(
            f"{place} cannot be read as an SDXL model with the configuration of '{base}'"
            f" ({reason}): check file and connection."
        ) from error


def refine_images(
    pipeline: Any,
    captions: Sequence[str],
    pictures: Tensor,
    image_ids: np.ndarray,
    seed: int = 42,
    batch_size: int = 4,
    guidance_scale: float = 5.0,
    negative_prompt: str = NEGATIVE_PROMPT,
    steps: int = STEPS,
    run: int = RUN,
    size: int = 0,
) -> Tensor:
    """Repaint reconstructions after their captions.

    Args:
        pipeline: from `refiner`.
        captions: (images,), one predicted sentence a picture.
        pictures: reconstructions (images, 3, height, width) in [0, 1].
        image_ids: (images,), from which each picture's noise is drawn, whatever batch it is in.
        seed: of the noise.
        batch_size: pictures at a time.
        guidance_scale: of classifier-free guidance.
        negative_prompt: what guidance leads away from; the miniature, whose captions have no such
            words, is led away from an empty sentence.
        steps: of the whole schedule.
        run: the last of them that are run, at least one.
        size: pixels a side of what is repainted; 0: 768 as published, or the miniature's.

    Returns:
        (images, 3, height, width) in [0, 1] float32, as large as they were given.

    Raises:
        PerceptError: if captions, pictures and ids differ in number, or for steps that there are
            none of.
    """
    if not len(captions) == len(pictures) == len(image_ids):
        raise PerceptError(
            f"There are {len(captions)} captions for {len(pictures)} pictures and {len(image_ids)}"
            " ids: give one of each for every picture."
        )
    if not 1 <= run <= steps:
        raise PerceptError(
            f"The refinement is to run {run} of {steps} steps: run at least one and not more than"
            " there are."
        )
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    if isinstance(pipeline, StableDiffusionXLImg2ImgPipeline):
        size = size or SIZE
        options |= {"timesteps": compute_euler_timesteps(steps), "negative_prompt": negative_prompt}
        options |= {
            "original_size": (size, size),
            "crops_coords_top_left": (0, 0),
            "target_size": (TARGET, TARGET),
        }
    else:
        size = size or pipeline.vae.config.sample_size
    made, strength = (
        [],
        min(1.0, (run + 0.5) / steps),
    )  # half a step more, because the library rounds down
    for start in progress(range(0, len(pictures), batch_size), "refining"):
        rows = slice(start, start + batch_size)
        large = repaint_images(
            pipeline,
            captions[rows],
            _resized(pictures[rows], (size, size)),
            image_ids[rows],
            strength,
            seed,
            batch_size,
            **options,
        )
        made.append(_resized(large, tuple(pictures.shape[-2:])))
    return torch.cat(made)


def _resized(pictures: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pictures (images, 3, height, width) of another size, antialiased; those that have it stay as
    they are.
    """
    return (
        pictures.float()
        if tuple(pictures.shape[-2:]) == shape
        else F.interpolate(pictures.float(), shape, mode="bilinear", antialias=True).clamp(0, 1)
    )
