"""Configs of decoders, one table for all stages: from the parameters of a training notebook and the
sizes of its data to what `src.networks.build_decoder` builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src import models
from src.utils import PerceptError

Config = dict[str, Any]

Parameters = Mapping[str, Any]

# (tokens, dim) that released MindEye2 networks predict
PATCHES = {"bigG": (256, 1664), "ViT-B/32": (49, 768)}

BACKBONES = {"mixer": "MixerBrainNetwork", "residual": "ResidualBrainNetwork"}


@dataclass(frozen=True)
class DecoderSizes:
    """What a decoder reads and predicts.

    Attributes:
        voxels: of each subject.
        tokens: CLIP tokens of an image.
        dim: dim of a token.
        latent: (channels, height, width) of the autoencoder's latent.
        latent_scale: the autoencoder's scaling factor.
        volume: (x, y, z) where the betas are whole volumes.
        components: principal components that are predicted, of "clip_tokens" and "vae_latents".
    """

    voxels: tuple[int, ...]
    tokens: int = 1
    dim: int = 0
    latent: tuple[int, ...] = ()
    latent_scale: float = 1.0
    volume: Sequence[int] | None = None
    components: Mapping[str, int] | None = None


def build_decoder_config(stage: str, parameters: Parameters, sizes: DecoderSizes) -> Config:
    """The config of the network that a stage trains.

    Args:
        stage: name of the training notebook, key of DECODERS.
        parameters: of that notebook; a size of 0 stands for what the published model has.
        sizes: of data and frozen models.

    Raises:
        PerceptError: for an encoder of volumes without volumes, or lists that are no numbers.
    """
    return DECODERS[stage](parameters, sizes)


def _describe(name: str, **kwargs: Any) -> Config:
    return {"name": name, "kwargs": kwargs}


def _high_level(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """MindEye: hidden tokens, or the 1x768 variant for large indexes."""
    p, hidden, dim = parameters, parameters["hidden"], sizes.dim
    timesteps = p["timesteps"] or (100 if hidden else 1000)
    depth = p["prior_depth"] or (6 if hidden else 12)
    size = {"dim": dim, "depth": depth, "dim_head": p["prior_dim_head"], "heads": p["prior_heads"]}
    if hidden:
        net = _describe(
            "VersatileDiffusionPriorNetwork",
            **size,
            num_tokens=sizes.tokens,
            learned_query_mode="pos_emb",
        )
    else:
        net = _describe(
            "DiffusionPriorNetwork",
            **size,
            num_timesteps=timesteps,
            max_text_len=p["max_text_len"],
            normformer=True,
        )
    prior = _describe(
        "BrainDiffusionPrior",
        image_embed_dim=dim,
        timesteps=timesteps,
        cond_drop_prob=0.2 if hidden else 0.0,
    )
    voxel2clip = _describe(
        "BrainNetwork",
        in_dim=sizes.voxels[0],
        out_dim=sizes.tokens * dim,
        clip_size=dim,
        h=p["h"],
        n_blocks=p["n_blocks"],
        use_projector=p["use_projector"],
        projector_dim=p["projector_dim"],
    )
    return prior | {"voxel2clip": voxel2clip, "net": net}


def _combined(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """The early system: an encoder of voxels or volumes, and LAION's prior."""
    p, dim = parameters, sizes.dim
    prior = _describe(
        "BrainDiffusionPrior", image_embed_dim=dim, timesteps=p["timesteps"], cond_drop_prob=0.0
    )
    if p["image_embed_scale"]:  # 0: sqrt(dim), as published
        prior["kwargs"]["image_embed_scale"] = p["image_embed_scale"]
    net = _describe(
        "DiffusionPriorNetwork",
        dim=dim,
        depth=p["prior_depth"],
        dim_head=p["prior_dim_head"],
        heads=p["prior_heads"],
        normformer=True,
        num_timesteps=p["timesteps"],
        max_text_len=p["max_text_len"],
    )
    return prior | {"voxel2clip": _combined_encoder(p, sizes), "net": net}


def _combined_encoder(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """The entry of `ENCODERS` that parameter arch names, with its sizes."""
    p, dim = parameters, sizes.dim
    name, kwargs = models.ENCODERS[p["arch"]]
    if name == "BrainNetwork":
        size = {"in_dim": sizes.voxels[0], "out_dim": dim, "clip_size": dim}
        return _describe(name, **kwargs | size | {"h": p["h"], "n_blocks": p["n_blocks"]})
    if sizes.volume is None:
        raise PerceptError(
            f"arch '{p['arch']}' reads whole volumes, but the betas are (trials, voxels): prepare"
            " betas (trials, x, y, z), or choose brainnet."
        )
    dims = [int(side) for side in sizes.volume]
    config = _describe(name, **kwargs | {"dims": dims, "out_dim": dim, "clip_size": dim})
    for key in ("channels", "strides"):
        text = p[f"conv_{key}"]
        if text:
            config["kwargs"][key] = _parse_integers(text, f"conv_{key}")
    return config


def _mindeye2(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """MindEye2: a ridge layer a subject, a shared backbone, a prior of tokens as they are."""
    p, dim = parameters, sizes.dim
    prior = _describe(
        "MindEye2",
        image_embed_dim=dim,
        timesteps=p["timesteps"],
        cond_drop_prob=0.2,
        image_embed_scale=1.0,  # as published
    )
    ridge = _describe(
        "RidgeRegression",
        input_sizes=[int(voxels) for voxels in sizes.voxels],
        out_features=p["hidden_dim"],
    )
    backbone = _describe(
        BACKBONES[p["backbone"]],
        h=p["hidden_dim"],
        out_dim=sizes.tokens * dim,
        clip_size=dim,
        seq_len=1 + p["seq_past"] + p["seq_future"],
        n_blocks=p["n_blocks"],
        blurry_recon=p["blurry_recon"],
        clip_scale=p["clip_scale"],
        latent_size=sizes.latent[1],
        folded="dead_mixer" not in p["faithful"],
    )
    net = None
    if p["prior"]:
        net = _describe(
            "PriorNetwork",
            dim=dim,
            depth=p["prior_depth"],
            dim_head=p["prior_dim_head"],
            num_tokens=sizes.tokens,
        )
    return prior | {"ridge": ridge, "backbone": backbone, "net": net}


def _percept(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """Percept's MLP to components of tokens and latents."""
    p, counts = parameters, sizes.components or {}
    latent_components = counts.get("vae_latents", 0)
    return _describe(
        "PerceptDecoder",
        in_dim=sizes.voxels[0],
        token_shape=[sizes.tokens, sizes.dim],
        token_components=counts["clip_tokens"],
        latent_shape=list(sizes.latent) if latent_components else [],
        latent_components=latent_components,
        h=p["h"],
        n_blocks=p["n_blocks"],
        dropout=p["dropout"],
    )


def _low_level(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """MindEye's low level, also that of the voters."""
    config = _describe("Voxel2StableDiffusionModel", in_dim=sizes.voxels[0])
    for name in ("h", "n_blocks", "use_cont", "ups_mode", "latent_size", "dropout"):
        if name in parameters:
            config["kwargs"][name] = parameters[name]
    channels = parameters["block_out_channels"]
    if channels:
        config["kwargs"]["block_out_channels"] = _parse_integers(channels, "block_out_channels")
    return config


def _basic(parameters: Parameters, sizes: DecoderSizes) -> Config:
    """The encoder of the basic autoencoder."""
    channels, side = sizes.latent[:2]
    return _describe(
        "BasicEncoder",
        in_dim=sizes.voxels[0],
        size=parameters["encoder"],
        latent_size=side,
        latent_channels=channels,
        factor=1.0 if parameters["scaled_latents"] else sizes.latent_scale,
    )


DECODERS: dict[str, Callable[[Parameters, DecoderSizes], Config]] = {
    "01_train_high_level": _high_level,
    "01_train_combined": _combined,
    "01_train_mindeye2": _mindeye2,
    "02_train_autoencoder": _low_level,
    "02_train_percept": _percept,
    "02_train_roi_models": _low_level,
    "02_train_basic_autoencoder": _basic,
}


def _parse_integers(text: str, parameter: str) -> list[int]:
    """Whole numbers that a parameter gives separated by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise PerceptError(
            f"{parameter} is '{text}': give whole numbers separated by commas, e.g. 64,128,256."
        ) from None
