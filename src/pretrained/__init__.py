"""Everything that is frozen.

The names below are looked up when they are first used, so that a program loads only the libraries
of the models that it uses (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from src.pretrained.autoencoder import LatentAutoencoder, make_untrained_vae
    from src.pretrained.base import (
        CLIP_MEAN,
        CLIP_STD,
        HUB,
        MINI_MODELS,
        REVISIONS,
        FrozenModel,
        locate_model,
        make_fixed_image,
        normalise_for_clip,
    )
    from src.pretrained.captioners import (
        MAX_LENGTH,
        BrainCaptioner,
        Captioner,
        PrecomputedTokens,
        strip_word,
    )
    from src.pretrained.category_classifier import CategoryClassifier, prepare_classifier_input
    from src.pretrained.clip import Clipper, PatchClip
    from src.pretrained.clip_variants import CLIP_VARIANTS, PATCH_VARIANTS, find_patch_variant
    from src.pretrained.generators import (
        ImageGenerator,
        ImageVariation,
        StableDiffusion,
        TextGenerator,
        VersatileDiffusion,
        VersatileDiffusionText,
        cache_condition,
        load_stable_diffusion_pipeline,
        replace_transformer_blocks,
    )
    from src.pretrained.gnet import (
        GNetEncoder,
        GNetReadout,
        GNetTrunk,
        load_gnet,
        prepare_gnet_images,
    )
    from src.pretrained.metric_networks import (
        METRIC_NETWORKS,
        RESIZING_MODES,
        FeatureNetwork,
        locate_weights,
    )
    from src.pretrained.teacher import (
        TEACHER_FILE,
        TEACHER_MEAN,
        TEACHER_STD,
        ConvNeXtMaps,
        Teacher,
    )
    from src.pretrained.unclip import UnclipDecoder, compute_euler_timesteps

# module of this package -> the names that it hands on
_EXPORTS = {
    "autoencoder": ["LatentAutoencoder", "make_untrained_vae"],
    "base": [
        "CLIP_MEAN",
        "CLIP_STD",
        "HUB",
        "MINI_MODELS",
        "REVISIONS",
        "FrozenModel",
        "locate_model",
        "make_fixed_image",
        "normalise_for_clip",
    ],
    "captioners": [
        "MAX_LENGTH",
        "BrainCaptioner",
        "Captioner",
        "PrecomputedTokens",
        "strip_word",
    ],
    "category_classifier": ["CategoryClassifier", "prepare_classifier_input"],
    "clip": ["Clipper", "PatchClip"],
    "clip_variants": ["CLIP_VARIANTS", "PATCH_VARIANTS", "find_patch_variant"],
    "generators": [
        "ImageGenerator",
        "ImageVariation",
        "StableDiffusion",
        "TextGenerator",
        "VersatileDiffusion",
        "VersatileDiffusionText",
        "cache_condition",
        "load_stable_diffusion_pipeline",
        "replace_transformer_blocks",
    ],
    "gnet": ["GNetEncoder", "GNetReadout", "GNetTrunk", "load_gnet", "prepare_gnet_images"],
    "metric_networks": ["METRIC_NETWORKS", "RESIZING_MODES", "FeatureNetwork", "locate_weights"],
    "teacher": ["TEACHER_FILE", "TEACHER_MEAN", "TEACHER_STD", "ConvNeXtMaps", "Teacher"],
    "unclip": ["UnclipDecoder", "compute_euler_timesteps"],
}

__all__ = [
    "BrainCaptioner",
    "CLIP_MEAN",
    "CLIP_STD",
    "CLIP_VARIANTS",
    "Captioner",
    "CategoryClassifier",
    "Clipper",
    "ConvNeXtMaps",
    "FeatureNetwork",
    "FrozenModel",
    "GNetEncoder",
    "GNetReadout",
    "GNetTrunk",
    "HUB",
    "ImageGenerator",
    "ImageVariation",
    "LatentAutoencoder",
    "MAX_LENGTH",
    "METRIC_NETWORKS",
    "MINI_MODELS",
    "PATCH_VARIANTS",
    "PatchClip",
    "PrecomputedTokens",
    "RESIZING_MODES",
    "REVISIONS",
    "StableDiffusion",
    "TEACHER_FILE",
    "TEACHER_MEAN",
    "TEACHER_STD",
    "Teacher",
    "TextGenerator",
    "UnclipDecoder",
    "VersatileDiffusion",
    "VersatileDiffusionText",
    "cache_condition",
    "compute_euler_timesteps",
    "find_patch_variant",
    "load_gnet",
    "load_stable_diffusion_pipeline",
    "locate_model",
    "locate_weights",
    "make_fixed_image",
    "make_untrained_vae",
    "normalise_for_clip",
    "prepare_classifier_input",
    "prepare_gnet_images",
    "replace_transformer_blocks",
    "strip_word",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines `name`, when the name is first asked for."""
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
