"""Configs of networks, from the parameters of a training notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src import models
from src.utils import PerceptError


def high_level_config(
    parameters: Mapping[str, Any], in_dim: int, tokens: int, dim: int
) -> dict[str, Any]:
    """The config of notebook 01's model, from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: hidden, h, n_blocks, use_projector, projector_dim, prior_depth,
            prior_heads, prior_dim_head, timesteps, max_text_len; 0 stands for what the published
            model of that kind has.
        in_dim: voxels.
        tokens: tokens of an image; 1 unless hidden.
        dim: dim of a token.
    """
    p, hidden = parameters, parameters["hidden"]
    net = {
        "dim": dim,
        "depth": p["prior_depth"] or (6 if hidden else 12),
        "dim_head": p["prior_dim_head"],
        "heads": p["prior_heads"],
    }
    steps = p["timesteps"] or (100 if hidden else 1000)
    brain = {
        "in_dim": in_dim,
        "out_dim": tokens * dim,
        "clip_size": dim,
        "h": p["h"],
        "n_blocks": p["n_blocks"],
    }
    networks = {
        True: {
            "name": "VersatileDiffusionPriorNetwork",
            "kwargs": net | {"num_tokens": tokens, "learned_query_mode": "pos_emb"},
        },
        False: {
            "name": "DiffusionPriorNetwork",
            "kwargs": (
                net
                | {
                    "num_timesteps": steps,
                    "max_text_len": p["max_text_len"],
                    "normformer": True,
                }
            ),
        },
    }
    return {
        "name": "BrainDiffusionPrior",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": steps,
            "cond_drop_prob": 0.2 if hidden else 0.0,
        },
        "voxel2clip": {
            "name": "BrainNetwork",
            "kwargs": (
                brain | {"use_projector": p["use_projector"], "projector_dim": p["projector_dim"]}
            ),
        },
        "net": networks[hidden],
    }


def combined_config(
    parameters: Mapping[str, Any], in_dim: int, dim: int, volume: Sequence[int] | None = None
) -> dict[str, Any]:
    """The config of the combined model (notebook 01_train_combined), from which `build_decoder`
    makes it.

    Args:
        parameters: of the notebook: arch, h, n_blocks, conv_channels, conv_strides, prior_depth,
            prior_heads, prior_dim_head, timesteps, max_text_len, image_embed_scale (0: sqrt(dim), as
            published).
        in_dim: voxels.
        dim: of CLIP's final embedding.
        volume: (x, y, z) where the betas are whole volumes.

    Raises:
        PerceptError: for an encoder of volumes without volumes, or channels and strides that are no
            numbers.
    """
    p = parameters
    name, kwargs = models.ENCODERS[p["arch"]]
    if name == "BrainNetwork":
        kwargs = kwargs | {
            "in_dim": in_dim,
            "out_dim": dim,
            "clip_size": dim,
            "h": p["h"],
            "n_blocks": p["n_blocks"],
        }
    elif volume is None:
        raise PerceptError(
            f"arch '{p['arch']}' reads whole volumes, but the betas are (trials, voxels): prepare"
            " betas (trials, x, y, z), or choose brainnet."
        )
    else:
        kwargs = kwargs | {"dims": [int(side) for side in volume], "out_dim": dim, "clip_size": dim}
        given = {key: p[f"conv_{key}"] for key in ("channels", "strides") if p[f"conv_{key}"]}
        kwargs |= {key: _numbers(text, f"conv_{key}") for key, text in given.items()}
    net = {
        "dim": dim,
        "depth": p["prior_depth"],
        "dim_head": p["prior_dim_head"],
        "heads": p["prior_heads"],
        "normformer": True,
    }
    prior = {"image_embed_dim": dim, "timesteps": p["timesteps"], "cond_drop_prob": 0.0} | (
        {"image_embed_scale": p["image_embed_scale"]} if p["image_embed_scale"] else {}
    )
    return {
        "name": "BrainDiffusionPrior",
        "kwargs": prior,
        "voxel2clip": {"name": name, "kwargs": kwargs},
        "net": {
            "name": "DiffusionPriorNetwork",
            "kwargs": net | {"num_timesteps": p["timesteps"], "max_text_len": p["max_text_len"]},
        },
    }


PATCHES = {
    "bigG": (256, 1664),
    "ViT-B/32": (49, 768),
}  # (tokens, dim) that released MindEye2 networks predict

BACKBONES = {"mixer": "MixerBrainNetwork", "residual": "ResidualBrainNetwork"}


def mindeye2_config(
    parameters: Mapping[str, Any], voxels: Sequence[int], tokens: int, dim: int, latent: int
) -> dict[str, Any]:
    """The config of MindEye2 (notebook 01_train_mindeye2), from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: hidden_dim, n_blocks, backbone, blurry_recon, clip_scale,
            seq_past, seq_future, prior, prior_depth, prior_dim_head, timesteps, faithful.
        voxels: of each subject.
        tokens: tokens of an image.
        dim: dim of a token.
        latent: height and width of the blurry picture's latent.
    """
    p = parameters
    backbone = {
        "h": p["hidden_dim"],
        "out_dim": tokens * dim,
        "clip_size": dim,
        "seq_len": 1 + p["seq_past"] + p["seq_future"],
        "n_blocks": p["n_blocks"],
        "blurry_recon": p["blurry_recon"],
        "clip_scale": p["clip_scale"],
        "latent_size": latent,
        "folded": "dead_mixer" not in p["faithful"],
    }
    net = {
        "dim": dim,
        "depth": p["prior_depth"],
        "dim_head": p["prior_dim_head"],
        "num_tokens": tokens,
    }
    return {
        "name": "MindEye2",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": p["timesteps"],
            "cond_drop_prob": 0.2,
            "image_embed_scale": 1.0,
        },  # tokens as they are, as published
        "ridge": {
            "name": "RidgeRegression",
            "kwargs": {"input_sizes": [int(n) for n in voxels], "out_features": p["hidden_dim"]},
        },
        "backbone": {"name": BACKBONES[p["backbone"]], "kwargs": backbone},
        "net": {"name": "PriorNetwork", "kwargs": net} if p["prior"] else None,
    }


def _numbers(text: str, parameter: str) -> list[int]:
    """Whole numbers that a parameter gives separated by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise PerceptError(
            f"{parameter} is '{text}': give whole numbers separated by commas, e.g. 64,128,256."
        ) from None


def low_level_config(parameters: Mapping[str, Any], in_dim: int) -> dict[str, Any]:
    """The config of notebook 02's model, from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: h, n_blocks, use_cont, ups_mode, latent_size,
            block_out_channels, and, where it has one, dropout.
        in_dim: voxels.
    """
    kwargs = {
        name: parameters[name]
        for name in ("h", "n_blocks", "use_cont", "ups_mode", "latent_size", "dropout")
        if name in parameters
    }
    if parameters["block_out_channels"]:
        kwargs["block_out_channels"] = _numbers(
            parameters["block_out_channels"], "block_out_channels"
        )
    return {"name": "Voxel2StableDiffusionModel", "kwargs": {"in_dim": in_dim} | kwargs}


def basic_config(
    parameters: Mapping[str, Any], in_dim: int, latent: tuple[int, ...], scale: float
) -> dict[str, Any]:
    """The config of the basic autoencoder's encoder (notebook 02_train_basic_autoencoder), from
    which `build_decoder` makes it.

    Args:
        parameters: of the notebook: encoder, scaled_latents.
        in_dim: voxels.
        latent: (channels, height, width) of the autoencoder's latent.
        scale: its scaling factor.
    """
    factor = 1.0 if parameters["scaled_latents"] else scale
    return {
        "name": "BasicEncoder",
        "kwargs": {
            "in_dim": in_dim,
            "size": parameters["encoder"],
            "latent_size": latent[1],
            "latent_channels": latent[0],
            "factor": factor,
        },
    }
