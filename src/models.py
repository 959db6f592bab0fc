"""The networks that train, under the names of the published systems.

- `BrainNetwork` (voxels -> CLIP tokens), the networks of the prior, MindEye2's networks for several
  subjects, the low-level networks (voxels -> latents), ridge regression, and maps from one frozen
  model's tokens to another's. They are defined in `src.networks`.
- Every network has `config` = {"name", "kwargs"}, and `build_network(config)` makes it again, so
  that a checkpoint can rebuild its model.
- `rename_published_keys` brings the keys of released files to ours.
"""

from src.networks.base import Network
from src.networks.encoders import ENCODERS, NORMS, BrainNetwork, Encoder, VolumeEncoder
from src.networks.kernels import KernelRidge
from src.networks.linear import ALPHAS, CaptionConverter, RidgeBaseline, TokenMap
from src.networks.low_level import BASIC_SIZES, UPS_MODES, BasicEncoder, Voxel2StableDiffusionModel
from src.networks.mindeye2 import MindEye2, MixerBrainNetwork, ResidualBrainNetwork, RidgeRegression
from src.networks.percept import PerceptDecoder
from src.networks.priors import (
    Denoiser,
    DiffusionPriorNetwork,
    PriorNetwork,
    VersatileDiffusionPriorNetwork,
)
from src.networks.registry import MODELS, build_network, rename_published_keys
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
    "GainNorm",
    "KernelRidge",
    "MODELS",
    "MindEye2",
    "MixerBrainNetwork",
    "NORMS",
    "Network",
    "PerceptDecoder",
    "PriorNetwork",
    "RelativePositionBias",
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
    "rename_published_keys",
]
