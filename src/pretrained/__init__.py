"""Everything that is frozen."""

from src.pretrained.autoencoder import LatentAutoencoder, untrained_vae
from src.pretrained.base import (
    CLIP_MEAN,
    CLIP_STD,
    HUB,
    REVISIONS,
    Frozen,
    clip_normalise,
    fixed_image,
    locate,
)
from src.pretrained.captioners import MAX_LENGTH, BrainCaptioner, Captioner, GivenTokens, without
from src.pretrained.clip import CLIP_VARIANTS, PATCH_VARIANTS, Clipper, PatchClip
from src.pretrained.generators import (
    Generator,
    ImageVariation,
    StableDiffusion,
    TextGenerator,
    VersatileDiffusion,
    VersatileDiffusionText,
    constant_condition,
    image_variation_pipeline,
    stable_diffusion_pipeline,
    take_transformers,
    versatile_pipeline,
)
from src.pretrained.gnet import GNetEncoder, GNetReadout, GNetTrunk, gnet_input, load_gnet
from src.pretrained.judge import Judge, judge_input
from src.pretrained.metric_networks import NETWORKS, RESIZING, FeatureNetwork, weight_file
from src.pretrained.teacher import TEACHER_FILE, TEACHER_MEAN, TEACHER_STD, ConvNeXtMaps, Teacher
from src.pretrained.unclip import UnclipDecoder, euler_timesteps

__all__ = [
    "BrainCaptioner",
    "CLIP_MEAN",
    "CLIP_STD",
    "CLIP_VARIANTS",
    "Captioner",
    "Clipper",
    "ConvNeXtMaps",
    "FeatureNetwork",
    "Frozen",
    "GNetEncoder",
    "GNetReadout",
    "GNetTrunk",
    "Generator",
    "GivenTokens",
    "HUB",
    "ImageVariation",
    "Judge",
    "LatentAutoencoder",
    "MAX_LENGTH",
    "NETWORKS",
    "PATCH_VARIANTS",
    "PatchClip",
    "RESIZING",
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
    "clip_normalise",
    "constant_condition",
    "euler_timesteps",
    "fixed_image",
    "gnet_input",
    "image_variation_pipeline",
    "judge_input",
    "load_gnet",
    "locate",
    "stable_diffusion_pipeline",
    "take_transformers",
    "untrained_vae",
    "versatile_pipeline",
    "weight_file",
    "without",
]
