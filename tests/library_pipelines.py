"""The library's own pipelines with the miniature weights, to compare our generators with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.pretrained.base import load_frozen, locate_model
from src.pretrained.generators import TEXT_UNET


def load_versatile_pipeline(
    weights: str = "hub",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dual: bool = False,
) -> Any:
    """The library's `VersatileDiffusionPipeline` (`.image_variation`, `.text_to_image`).

    With `dual` its `VersatileDiffusionDualGuidedPipeline`: an image and a sentence together, mixed
    by `text_to_image_strength`. It is assembled from its parts, because the library no longer finds
    the class of the text network by the name in the saved pipeline.
    """
    import diffusers
    import transformers
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
    from diffusers.pipelines import deprecated
    from diffusers.pipelines.deprecated.versatile_diffusion import modeling_text_unet

    location = locate_model("versatile_diffusion", weights)

    def load(folder: str, cls: Any, **options: Any) -> Any:
        return load_frozen(cls, location, **{"subfolder": folder, **options})

    text_unet = modeling_text_unet.UNetFlatConditionModel
    parts = {
        "tokenizer": load("tokenizer", transformers.CLIPTokenizer),
        "image_feature_extractor": load("image_feature_extractor", transformers.CLIPImageProcessor),
        "text_encoder": load("text_encoder", transformers.CLIPTextModelWithProjection, dtype=dtype),
        "image_encoder": load(
            "image_encoder", transformers.CLIPVisionModelWithProjection, dtype=dtype
        ),
        "image_unet": load("image_unet", diffusers.UNet2DConditionModel, torch_dtype=dtype),
        "text_unet": load("text_unet", text_unet, torch_dtype=dtype, **TEXT_UNET),
        "vae": load("vae", diffusers.AutoencoderKL, torch_dtype=dtype),
        "scheduler": load(
            "scheduler", diffusers.UniPCMultistepScheduler, final_sigmas_type="sigma_min"
        ),
    }
    pipeline_class: Any = deprecated.VersatileDiffusionPipeline
    if dual:
        pipeline_class = deprecated.VersatileDiffusionDualGuidedPipeline
    pipeline = pipeline_class(**parts)
    for module in pipeline.image_unet.modules():
        # the blocks around it pass an argument that this class does not take
        if isinstance(module, DualTransformer2DModel):
            module.forward = partial(_call_without_mask, module.forward)  # type: ignore[method-assign]
    return pipeline.to(device)


def _call_without_mask(
    forward: Any, *args: Any, encoder_attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Call `forward` without the attention mask, which must be None."""
    assert encoder_attention_mask is None
    return forward(*args, **kwargs)


def load_image_variation_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImageVariationPipeline`, the 1x768 model's generator.

    It is conditioned on one CLIP embedding.
    """
    from diffusers import StableDiffusionImageVariationPipeline

    location = locate_model("image_variation", weights)
    pipeline = load_frozen(StableDiffusionImageVariationPipeline, location, dtype=dtype)
    return pipeline.to(device)
