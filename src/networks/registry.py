"""All networks by name, and the state dicts that were published for them."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor

from src.networks.base import Network
from src.networks.encoders import BrainNetwork, VolumeEncoder
from src.networks.kernels import KernelRidge
from src.networks.linear import CaptionConverter, RidgeBaseline, TokenMap
from src.networks.low_level import BasicEncoder, Voxel2StableDiffusionModel
from src.networks.mindeye2 import MixerBrainNetwork, ResidualBrainNetwork, RidgeRegression
from src.networks.percept import PerceptDecoder
from src.networks.priors import DiffusionPriorNetwork, PriorNetwork, VersatileDiffusionPriorNetwork
from src.utils import PerceptError

MODELS: dict[str, type[Network]] = {
    cls.__name__: cls
    for cls in (
        BrainNetwork,
        VolumeEncoder,
        VersatileDiffusionPriorNetwork,
        DiffusionPriorNetwork,
        PriorNetwork,
        RidgeRegression,
        MixerBrainNetwork,
        ResidualBrainNetwork,
        CaptionConverter,
        Voxel2StableDiffusionModel,
        BasicEncoder,
        RidgeBaseline,
        KernelRidge,
        TokenMap,
        PerceptDecoder,
    )
}


def build_network(config: dict[str, Any]) -> Network:
    """Make a network from its config.

    Args:
        config: {"name": key of MODELS, "kwargs": arguments}, as every network has in `config`.

    Raises:
        PerceptError: for an unknown name or argument.
    """
    name, kwargs = config.get("name", ""), config.get("kwargs", {})
    if name not in MODELS:
        raise PerceptError(f"No network is called '{name}': choose one of {', '.join(MODELS)}.")
    try:
        inspect.signature(MODELS[name]).bind(**kwargs)
    except TypeError as error:
        raise PerceptError(
            f"{name} cannot be built from its config: {error}; correct the kwargs."
        ) from error
    return MODELS[name](**kwargs)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_published_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under today's keys, its values untouched.

    Three things differ in released files, and nothing else is forgiven:

    - the attention of an autoencoder's middle block was called query, key, value, proj_attn before
      diffusers 0.15;
    - weights saved under data parallelism carry the prefix "module.";
    - the scalar `temp` of early voxel2clip networks was never used, and is dropped.
    """
    renamed = {}
    for key, value in state.items():
        key = re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.",
            key.removeprefix("module."),
        )
        if key not in ("temp", "voxel2clip.temp"):
            renamed[key] = value
    return renamed
