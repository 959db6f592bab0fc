"""Export: every model into data/mini_models, in the libraries' own format and half precision."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.deprecated import VersatileDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from src import miniworld, pretrained
from src.pretrained import replace_transformer_blocks

from . import data
from .autoencoder import build_vae
from .blip import export_blip
from .category_classifier import build_classifier
from .clip import build_clip_tokenizer, load_trained_clip
from .data import CLIP_MEAN, CLIP_STD
from .flows import SCHEDULE, build_text_unet, load_finished_flow, load_flow_data
from .git import export_git
from .gnet import export_gnet
from .golden import write_golden_features
from .laion_prior import export_laion_prior
from .metric_networks import export_metric_networks
from .sentence import export_sentence
from .teacher import export_teacher
from .training import load_averaged
from .unclip import export_unclip

# Models that can be exported alone, by the name of the command's stage.
SINGLE_EXPORTS = {
    "export_blip": export_blip,
    "export_unclip": export_unclip,
    "export_git": export_git,
    "export_metric_networks": export_metric_networks,
    "export_laion_prior": export_laion_prior,
    "export_sentence": export_sentence,
    "export_gnet": export_gnet,
}


def export_all() -> None:
    """Write every model but unCLIP with the libraries' save_pretrained."""
    clip, tokenizer = load_trained_clip(), build_clip_tokenizer()
    vae = load_averaged("vae", build_vae())
    vae.register_to_config(scaling_factor=load_flow_data("image", "train").scale)
    side = miniworld.IMAGE_SIZE
    size: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    processor = CLIPImageProcessor(image_mean=CLIP_MEAN, image_std=CLIP_STD, **size)
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    text = CLIPTextModelWithProjection(clip.config.text_config)
    for encoder in (vision, text):
        expected = encoder.state_dict()
        weights = {k: v for k, v in clip.state_dict().items() if k in expected}
        encoder.load_state_dict(weights)
    clip.half().save_pretrained(data.OUT / "clip")
    processor.save_pretrained(data.OUT / "clip")
    tokenizer.save_pretrained(data.OUT / "clip")
    load_averaged("judge", build_classifier()).half().save_pretrained(data.OUT / "judge")
    export_blip()
    export_git()
    export_sentence()
    export_teacher()
    export_metric_networks()
    export_laion_prior()
    export_gnet()
    shared = {"vae": vae.half(), "scheduler": DDIMScheduler(**SCHEDULE)}
    encoders = {"text_encoder": text.half(), "image_encoder": vision.half()}
    _export_versatile_diffusion(shared | encoders, tokenizer, processor)
    StableDiffusionImageVariationPipeline(
        **shared,
        image_encoder=vision,
        unet=load_finished_flow("variation"),
        feature_extractor=processor,
        safety_checker=None,
        requires_safety_checker=False,
    ).save_pretrained(data.OUT / "image_variation")
    StableDiffusionImg2ImgPipeline(
        **shared,
        text_encoder=_build_text_model(clip).half(),
        tokenizer=tokenizer,
        unet=load_finished_flow("stable"),
        safety_checker=None,
        feature_extractor=processor,
        requires_safety_checker=False,
    ).save_pretrained(data.OUT / "stable_diffusion")
    write_shared_golden_features()


def _build_text_model(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text encoder without its projection."""
    encoder = CLIPTextModel(clip.config.text_config)
    prefix = "text_model."
    weights = {}
    for name, value in clip.state_dict().items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = value
    encoder.load_state_dict(weights)
    return encoder


def _export_versatile_diffusion(
    parts: dict[str, nn.Module], tokenizer: Any, processor: CLIPImageProcessor
) -> None:
    """Save Versatile Diffusion.

    Of the text flow's own network only the transformer blocks, which are all that is ever run.

    Args:
        parts: VAE, scheduler and encoders, by the pipeline's names.
        tokenizer: of CLIP.
        processor: of CLIP.
    """
    text_unet = build_text_unet()
    replace_transformer_blocks(text_unet, load_finished_flow("text"))
    VersatileDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        image_feature_extractor=processor,
        image_unet=load_finished_flow("robust"),
        text_unet=text_unet.half(),
    ).save_pretrained(data.OUT / "versatile_diffusion")
    folder = data.OUT / "versatile_diffusion" / "text_unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "attentions" in k}
    save_file(weights, file, metadata={"format": "pt"})


def write_shared_golden_features() -> None:
    """Record the golden features of CLIP and of the VAE of each pipeline."""
    clippers = []
    for hidden in (True, False):
        for norm in (True, False):
            clippers.append(pretrained.Clipper("mini", hidden, norm))
    write_golden_features("clip", clippers)
    for name in ("versatile_diffusion", "image_variation", "stable_diffusion"):
        write_golden_features(name, [pretrained.LatentAutoencoder("mini", name)])
