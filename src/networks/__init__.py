"""Everything that trains."""

from src.networks.base import Network
from src.networks.encoders import ENCODERS, NORMS, BrainNetwork, Encoder, VolumeEncoder
from src.networks.kernels import KERNELS, KernelRidge, RepeatNoise
from src.networks.linear import ALPHAS, CaptionConverter, RidgeBaseline, TokenMap
from src.networks.low_level import BASIC_SIZES, UPS_MODES, BasicEncoder, Voxel2StableDiffusionModel
from src.networks.mindeye2 import MindEye2, MixerBrainNetwork, ResidualBrainNetwork, RidgeRegression
from src.networks.mismatch import FRESH_IN_LAION, describe_mismatch
from src.networks.percept import PerceptDecoder
from src.networks.priors import (
    Denoiser,
    DiffusionPriorNetwork,
    PriorNetwork,
    VersatileDiffusionPriorNetwork,
)
from src.networks.rebuild import build_decoder, infer_published_config
from src.networks.registry import MODELS, build_network, rename_published_keys
from src.networks.released import (
    load_laion_prior,
    load_published,
    load_voxel2clip,
    read_history,
    read_published,
    read_weights,
    write_published,
)
from src.networks.transformer import (
    Attention,
    CausalTransformer,
    GainNorm,
    RelativePositionBias,
    Rotary,
    SinusoidalTime,
    SwiGLU,
)

__all__ = [
    "ALPHAS",
    "Attention",
    "BASIC_SIZES",
    "BasicEncoder",
    "BrainNetwork",
    "CaptionConverter",
    "CausalTransformer",
    "Denoiser",
    "DiffusionPriorNetwork",
    "ENCODERS",
    "Encoder",
    "FRESH_IN_LAION",
    "GainNorm",
    "KERNELS",
    "KernelRidge",
    "MODELS",
    "MindEye2",
    "MixerBrainNetwork",
    "NORMS",
    "Network",
    "PerceptDecoder",
    "PriorNetwork",
    "RelativePositionBias",
    "RepeatNoise",
    "ResidualBrainNetwork",
    "RidgeBaseline",
    "RidgeRegression",
    "Rotary",
    "SinusoidalTime",
    "SwiGLU",
    "TokenMap",
    "UPS_MODES",
    "VersatileDiffusionPriorNetwork",
    "VolumeEncoder",
    "Voxel2StableDiffusionModel",
    "build_network",
    "build_decoder",
    "describe_mismatch",
    "load_laion_prior",
    "load_published",
    "load_voxel2clip",
    "infer_published_config",
    "rename_published_keys",
    "read_history",
    "read_published",
    "read_weights",
    "write_published",
]
