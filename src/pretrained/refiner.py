"""MindEye2's refiner: SDXL's img2img pipeline with weights of its users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from src import utils
from src.pretrained.base import load_frozen, prefer_cache, silence_libraries
from src.pretrained.generators import load_stable_diffusion_pipeline
from src.pretrained.strict import check_filled
from src.utils import PerceptError

CHECKPOINT = "zavychromaxl_v30.safetensors"

# whose configuration and tokenizers a single file needs
BASE = "stabilityai/stable-diffusion-xl-base-1.0"

# those of the pipeline, by their folders
NETWORKS = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


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
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
    if weights == "mini":
        return load_stable_diffusion_pipeline("mini", device, dtype)
    location = weights
    if weights == "hub":
        location = str(utils.HOME / "data" / "mindeye2_models" / CHECKPOINT)
    if location.endswith(".safetensors"):
        pipeline = _load_single_file(location, base, dtype)
    else:
        pipeline = _load_folder(location, dtype)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=False, final_sigmas_type="zero"
    )
    pipeline.watermark = None  # the published images have none
    return pipeline.to(device)


def _load_folder(location: str, dtype: torch.dtype) -> Any:
    """An SDXL pipeline of a folder or of the hub, each of its networks whole."""
    networks = {}
    for name, cls in NETWORKS.items():
        option = "dtype" if name.startswith("text") else "torch_dtype"
        networks[name] = load_frozen(cls, location, subfolder=name, **{option: dtype})
    return load_frozen(StableDiffusionXLImg2ImgPipeline, location, torch_dtype=dtype, **networks)


def _load_single_file(path: str, base: str, dtype: torch.dtype) -> Any:
    if not Path(path).is_file():
        raise PerceptError(
            f"The refiner is not at {path}: run 'python run.py download refiner', or set its"
            " weights to a file or folder."
        )
    try:
        with silence_libraries():
            load = StableDiffusionXLImg2ImgPipeline.from_single_file
            pipeline = prefer_cache(
                lambda config, **options: load(path, config=config, **options),
                base,
                torch_dtype=dtype,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PerceptError(
            f"{path} cannot be read as an SDXL model with the configuration of '{base}'"
            f" ({reason}): check the file, and fetch the configuration (run.py download refiner)."
        ) from error
    for name in NETWORKS:
        check_filled(getattr(pipeline, name), f"the {name} in {path}")
    return pipeline
