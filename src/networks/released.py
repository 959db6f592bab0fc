"""Checkpoints as others released them: read without running code from them, rebuild the network
they hold, load it strictly, write such files.

- MindEye's high-level files (`last.pth` of prior_257_... and prior_1x768_...), its low-level files
  (`epoch120.pth` of autoencoder_...), MindEye2's `last.pth` or DeepSpeed folder, and LAION's text
  -> image prior, which initialises the prior of the 1x768 model.
- The files are pickles with a gigabyte of weights and two of optimizer state. Only tensors and
  numbers are rebuilt, everything else becomes an inert object, and the file is mapped: what is not
  asked for is not read.
- Sizes are inferred from the weights, so there is nothing to configure and nothing to get wrong.
- Forgiven are the prefix of data parallelism, the attention's old names and one stray scalar
  (`src.models.rename_published_keys`), and nothing else: a file that does not fit is refused with the
  difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.networks.low_level import UPS_MODES
from src.networks.mindeye2 import MindEye2
from src.networks.registry import build_network, rename_published_keys
from src.prior import BrainDiffusionPrior
from src.safe_pickle import load_torch_file
from src.utils import PerceptError, atomic, load_checkpoint

FRESH_IN_LAION = ("net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed")

STRAY = (
    "temp",
    "voxel2clip.temp",
)  # a number that early voxel2clip networks carried and never used

CURVES = ("train_losses", "val_losses", "lrs")

NAMED = 3  # keys of a difference that are named; the others are counted


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The weights of a released file under today's keys, mapped from the file and not yet read.

    Args:
        path: a .pth file: a state dict, or a dictionary that holds one as "model_state_dict" or
            "model"; or a folder that DeepSpeed has written (ZeRO stages 1 and 2), whose weights are
            then put together from the pieces of its processes, in single precision.

    Raises:
        PerceptError: if the file is missing, damaged, or holds no state dict, or one with a weight
            under two names.
    """
    content = _deepspeed(Path(path)) if Path(path).is_dir() else load_torch_file(path)
    for key in ("model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise PerceptError(
            f"{path} holds no state dict, neither at its top nor as 'model_state_dict' or 'model':"
            " take the file with the weights."
        )
    stray = {key: value for key, value in content.items() if key.removeprefix("module.") in STRAY}
    state = rename_published_keys(dict(content)) | {
        key: value for key, value in stray.items() if value.numel() > 1
    }  # only a number is forgiven
    if len(state) + sum(value.numel() == 1 for value in stray.values()) < len(content):
        raise PerceptError(
            f"{path} holds {len(content)} weights under {len(state)} names, some of them twice (old"
            " and new names, with and without 'module.'): take the file as it was released."
        )
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours (.safetensors), or of a released one as `read_published`
    takes it.
    """
    return load_checkpoint(path)[0] if Path(path).suffix == ".safetensors" else read_published(path)


def _deepspeed(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder of DeepSpeed's: those of the model as they were computed with, then in
    their place the optimizer's in single precision.
    """
    tag = folder / "latest"
    folder = folder / tag.read_text().strip() if tag.exists() else folder
    models = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(models) != 1:
        raise PerceptError(
            f"{folder} holds {len(models)} files mp_rank_*_model_states.pt, not one: give the"
            " folder of a checkpoint that DeepSpeed's stage 1 or 2 wrote."
        )
    model = load_torch_file(models[0])
    state = (
        dict(model["module"])
        if isinstance(model, Mapping) and isinstance(model.get("module"), Mapping)
        else {}
    )
    pieces = sorted(
        folder.glob("*zero_pp_rank_*_optim_states.pt"),
        key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]),
    )
    groups = [
        load_torch_file(path)["optimizer_state_dict"].get("single_partition_of_fp32_groups", [])
        for path in pieces
    ]
    for number, shapes in enumerate(model.get("param_shapes", []) if pieces else []):
        flat = torch.cat([group[number].flatten() for group in groups])
        for name, shape in shapes.items():
            size = math.prod(shape)
            state[name], flat = (
                flat[:size].view(*shape),
                flat[size:],
            )  # what is left at the end fills up the last piece
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read_history(path: str | Path) -> dict[str, Any]:
    """How a released network was trained, as far as its file tells; no weights are read.

    Returns:
        {"epoch": the last epoch (counted from 0) or None, "train_losses": [float], "val_losses":
        [float], "lrs": [float]}; lists that the file does not have, or that hold something else
        than numbers, are empty.

    Raises:
        PerceptError: if the file is missing or damaged.
    """
    content = load_torch_file(path)
    content = content if isinstance(content, Mapping) else {}
    history: dict[str, Any] = {
        "epoch": content["epoch"] if isinstance(content.get("epoch"), int) else None
    }
    for name in CURVES:
        values = content.get(name)
        values = (
            [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in values]
            if isinstance(values, list)
            else []
        )
        history[name] = (
            [float(v) for v in values] if all(isinstance(v, int | float) for v in values) else []
        )
    return history


def infer_published_config(
    state: dict[str, Tensor], origin: str = "This state dict"
) -> dict[str, Any]:
    """What `src.reconstruct.build_decoder` needs to make the network of a released state dict, its
    sizes read from the weights.

    Two things leave no trace in weights and are taken as released: the prior's attention (causal in
    the 1x768 network only), and a learned query as long as the tokens is added to them ("pos_emb").

    Raises:
        PerceptError: if the keys belong to none of the released networks, or are not exactly those
            of the network that they ask for.
    """
    try:
        config = _inferred(state, origin)
        network = _on_meta(config)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        what = (
            f"has no {error.args[0]}"
            if isinstance(error, KeyError)
            else f"has weights of a shape that no such network has ({error})"
        )
        raise PerceptError(
            f"{origin} is of a released network but {what}, so its sizes cannot be read: take the"
            " file as it was released."
        ) from error
    _check_fits(state, network, origin)
    return config


def _inferred(state: dict[str, Tensor], origin: str) -> dict[str, Any]:
    """The config that the weights tell, unchecked."""
    if "net.causal_transformer.project_out.weight" in state and "voxel2clip.lin1.weight" in state:
        net, voxel2clip = _part(state, "net."), _part(state, "voxel2clip.")
        dim = net["causal_transformer.project_out.weight"].shape[0]
        drop = (
            0.0 if "null_text_encodings" in net else 0.2
        )  # of training, as released; weights do not tell
        kwargs = {
            "image_embed_dim": dim,
            "timesteps": len(state["noise_scheduler.betas"]),
            "cond_drop_prob": drop,
        }
        return {
            "name": "BrainDiffusionPrior",
            "kwargs": kwargs,
            "net": _prior_network(net),
            "voxel2clip": _brain_network(voxel2clip, dim),
        }
    if "backbone.backbone_linear.weight" in state:
        return _mindeye2(state)
    if "upsampler.conv_in.weight" in state:
        return _low_level(state, origin)
    if "lin1.weight" in state:
        return _brain_network(state, 768)
    raise PerceptError(
        f"{origin} holds no released MindEye network (its keys begin with {sorted(state)[:3]}):"
        " take a last.pth of a prior_... run, or an epoch120.pth of an autoencoder_... run."
    )


def _on_meta(config: dict[str, Any]) -> nn.Module:
    """The network of a config, without memory for its weights."""
    with torch.device("meta"):
        return build_decoder(config)


def build_decoder(config: dict[str, Any]) -> nn.Module:
    """Make an untrained decoder from the config that its checkpoint carries.

    Args:
        config: {"name", "kwargs"} of `src.models.MODELS`; {"name": "BrainDiffusionPrior", "kwargs",
            "net", "voxel2clip"}; or {"name": "MindEye2", "kwargs" and "net" (of its prior, or
            None), "ridge", "backbone"}.
    """
    if config["name"] == "MindEye2":
        prior = (
            BrainDiffusionPrior(build_network(config["net"]), **config["kwargs"])
            if config["net"]
            else None
        )
        return MindEye2(build_network(config["ridge"]), build_network(config["backbone"]), prior)
    if config["name"] != "BrainDiffusionPrior":
        return build_network(config)
    net, voxel2clip = build_network(config["net"]), build_network(config["voxel2clip"])
    return BrainDiffusionPrior(net, voxel2clip=voxel2clip, **config["kwargs"])


MISSING, UNEXPECTED, RESHAPED = "missing", "unexpected", "of another shape"

_ADVICE = [  # kind of difference, the keys that it consists of, what to do
    (
        RESHAPED,
        r"(voxel2clip\.)?lin0\.0\.weight",
        "it was trained on other voxels: take the file of this subject",
    ),
    (UNEXPECTED, r"maps_projector\.", "make the network with use_cont=True"),
    (MISSING, r"maps_projector\.", "make the network with use_cont=False"),
    (UNEXPECTED, r"voxel2clip\.", "make the prior with its voxel2clip"),
    (MISSING, r"voxel2clip\.", "the file holds a prior alone: make it without voxel2clip"),
    (
        MISSING,
        r"voxel2clip\.|" + "|".join(FRESH_IN_LAION),
        "if this is LAION's prior, use load_laion_prior",
    ),
]


def describe_mismatch(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, list[str]]:
    """What keeps a state dict from fitting a network: the keys that are "missing", "unexpected" or
    "of another shape", each kind only where there are any.
    """
    own = network.state_dict()
    found = {
        MISSING: [key for key in own if key not in state],
        UNEXPECTED: [key for key in state if key not in own],
        RESHAPED: [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    return {kind: keys for kind, keys in found.items() if keys}


def _check_fits(state: Mapping[str, Tensor], network: nn.Module, origin: str) -> None:
    """Refuse a state dict that is not exactly the network's, naming a few keys of each kind and
    counting the others.
    """
    found = describe_mismatch(state, network)
    if not found:
        return
    own = network.state_dict()
    told = []
    for kind, keys in found.items():
        named = [
            f"{key} {_shape(state[key])} for {_shape(own[key])}" if kind == RESHAPED else key
            for key in keys[:NAMED]
        ]
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        told.append(f"{len(keys)} {kind} ({', '.join(named)}{more})")
    todo = (
        "take the file of this very model, or let load_decoder make the network that the file holds"
    )
    for kind, pattern, advice in _ADVICE:
        if found == {
            kind: [key for key in (state if kind == UNEXPECTED else own) if re.match(pattern, key)]
        }:
            todo = advice
    raise PerceptError(
        f"{origin} does not fit {type(network).__name__} with its {len(own)} keys:"
        f" {', '.join(told)}; {todo}."
    )


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a number"


def load_published(path: str | Path, model: nn.Module) -> None:
    """Load a released file strictly into a module.

    Raises:
        PerceptError: if the file cannot be read or its keys and shapes are not those of the module;
            a few are named, and what to do.
    """
    state = read_published(path)
    _check_fits(state, model, str(path))
    model.load_state_dict(state)


def load_laion_prior(path: str | Path, prior: BrainDiffusionPrior) -> list[str]:
    """Initialise the prior of the 1x768 model with LAION's text -> image prior.

    Returns:
        Names of the tensors that the file does not have and that stay as they were initialised: the
            null embeddings (random, and used
        as they are by the published system too) and the voxel2clip network.

    Raises:
        PerceptError: if anything else is missing, too much, or of another shape.
    """
    state, own = read_published(path), prior.state_dict()
    fresh = [
        key
        for key in own
        if key not in state and (key in FRESH_IN_LAION or key.startswith("voxel2clip."))
    ]
    state |= {key: own[key] for key in fresh}
    _check_fits(state, prior, str(path))
    prior.load_state_dict(state)
    return fresh


def load_voxel2clip(path: str | Path, network: nn.Module) -> None:
    """Give a voxel2clip the weights of a file: a released .pth (a state dict, bare or as
    "model_state_dict"), or a checkpoint of ours.

    Of a file that holds a whole prior, its voxel2clip is taken.

    Raises:
        PerceptError: if the file cannot be read, or its keys and shapes are not those of the
            network; a few are named, and what to do.
    """
    state = read_weights(path)
    state = _part(state, "voxel2clip.") or state
    _check_fits(state, network, str(path))
    network.load_state_dict(state)


_UNTOLD = (
    "causal",
    "learned_query_mode",
    "clip_size",
)  # arguments that leave no trace in the weights


def write_published(
    path: str | Path, decoder: nn.Module, epoch: int = 0, old_attention: bool = False
) -> None:
    """Write a decoder of ours in the released layout, for code that reads MindEye's files; reading
    it gives the same bits.

    The file holds {"epoch", "model_state_dict", "train_losses", "val_losses", "lrs"}, the last
    three empty, and no optimizer: one reconstructs with it, but cannot resume a training. Nor does
    it hold how voxels were normalised: whoever reads the file must give the network voxels
    normalised as in its training (the released networks were trained on betas as the shards hold
    them, ours on z-scores).

    Args:
        path: where to, e.g. train_logs/<run>/last.pth, or epoch120.pth for a low-level network.
        decoder: a `BrainDiffusionPrior` with its voxel2clip, a `BrainNetwork`, or a
            `Voxel2StableDiffusionModel`, of any size.
        epoch: what the file says of it.
        old_attention: name the low-level attention as diffusers 0.13 did, which the released
            environment pins.

    Raises:
        PerceptError: if a reader could not make this network from the file: one that was never
            released, or that differs from the released ones in what weights do not tell.
    """
    what, state = (
        type(decoder).__name__,
        {key: value.detach().cpu() for key, value in decoder.state_dict().items()},
    )
    try:
        rebuilt = _on_meta(infer_published_config(state, f"This {what}"))
    except PerceptError as error:
        raise PerceptError(
            f"This {what} cannot be written as a released file, from whose weights alone a"
            " BrainDiffusionPrior with its voxel2clip, a BrainNetwork or a"
            " Voxel2StableDiffusionModel is made again: keep it in our own format."
        ) from error
    if unlike := _unlike(decoder, rebuilt):
        raise PerceptError(
            f"This {what} has {', '.join(unlike)}, which a released file does not tell its reader:"
            " keep it in our own format."
        )
    state = {to_old_key(key): value for key, value in state.items()} if old_attention else state
    with atomic(path) as temporary:
        torch.save(
            {"epoch": epoch, "model_state_dict": state} | {name: [] for name in CURVES}, temporary
        )


def to_old_key(key: str) -> str:
    """A key of today as diffusers 0.13 had it: the attention of an autoencoder's middle block;
    others stay.
    """
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        key = re.sub(rf"(mid_block\.attentions\.0\.){re.escape(new)}\.", rf"\g<1>{old}.", key)
    return key


def _unlike(decoder: nn.Module, rebuilt: nn.Module) -> list[str]:
    """What weights do not tell, and the network that is made from them would have otherwise, e.g.
    "causal=True".
    """
    if isinstance(decoder, BrainDiffusionPrior) and isinstance(rebuilt, BrainDiffusionPrior):
        parts = [(decoder.net, rebuilt.net), (decoder.voxel2clip, rebuilt.voxel2clip)]
        scale = (
            []
            if decoder.image_embed_scale == rebuilt.image_embed_scale
            else [f"image_embed_scale={decoder.image_embed_scale:g}"]
        )
        return scale + [text for ours, theirs in parts for text in _unlike(ours, theirs)]
    if isinstance(decoder, MindEye2) and isinstance(rebuilt, MindEye2):
        prior = (
            _unlike(decoder.diffusion_prior, rebuilt.diffusion_prior)
            if decoder.diffusion_prior is not None and rebuilt.diffusion_prior is not None
            else []
        )
        names = [type(network.backbone).__name__ for network in (decoder, rebuilt)]
        return prior + ([f"a {names[0]}"] if names[0] != names[1] else [])
    ours, theirs = (
        getattr(network, "config", {}).get("kwargs", {}) for network in (decoder, rebuilt)
    )
    return [
        f"{name}={ours[name]}"
        for name in _UNTOLD
        if name in ours and ours[name] != theirs.get(name)
    ]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """How many numbered parts there are: one more than the largest number that the pattern finds."""
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _brain_network(state: dict[str, Tensor], clip_size: int) -> dict[str, Any]:
    h, in_dim = state["lin0.0.weight"].shape
    projector = "projector.2.weight" in state
    kwargs = {
        "in_dim": in_dim,
        "out_dim": state["lin1.weight"].shape[0],
        "clip_size": state["projector.0.weight"].shape[0] if projector else clip_size,
        "h": h,
        "n_blocks": _count(state, r"mlp\.(\d+)\."),
        "norm_type": "bn" if any("running_mean" in key for key in state) else "ln",
        "act_first": "lin0.2.weight" in state,
        "use_projector": projector,
    }
    return {
        "name": "BrainNetwork",
        "kwargs": (
            kwargs | ({"projector_dim": state["projector.2.weight"].shape[0]} if projector else {})
        ),
    }


def _prior_network(state: dict[str, Tensor]) -> dict[str, Any]:
    dim_head = state["causal_transformer.layers.0.0.null_kv"].shape[1]
    heads = state["causal_transformer.layers.0.0.to_q.weight"].shape[0] // dim_head
    dim = state["causal_transformer.project_out.weight"].shape[0]
    kwargs = {
        "dim": dim,
        "depth": _count(state, r"causal_transformer\.layers\.(\d+)\."),
        "dim_head": dim_head,
        "heads": heads,
    }
    if "null_text_encodings" in state:
        more = {
            "num_timesteps": len(state["to_time_embeds.0.weight"]),
            "max_text_len": state["null_text_encodings"].shape[1],
        }
        return {
            "name": "DiffusionPriorNetwork",
            "kwargs": kwargs | more | {"normformer": "causal_transformer.layers.0.1.3.g" in state},
        }
    tokens, query = len(state["null_image_embed"]), state.get("learned_query")
    mode = "none" if query is None else "pos_emb" if len(query) == tokens else "all_pos_emb"
    return {
        "name": "VersatileDiffusionPriorNetwork",
        "kwargs": kwargs | {"num_tokens": tokens, "learned_query_mode": mode},
    }


def _mindeye2(state: dict[str, Tensor]) -> dict[str, Any]:
    """Of a MindEye2 checkpoint: ridge layers of as many subjects as it has, backbone with or
    without the blurry branch, prior or none.
    """
    backbone, net = _part(state, "backbone."), _part(state, "diffusion_prior.net.")
    subjects = _count(state, r"ridge\.linears\.(\d+)\.")
    layers = [state[f"ridge.linears.{i}.weight"] for i in range(subjects)]
    h, dim = layers[0].shape[0], len(backbone["clip_proj.0.weight"])
    seq_len = len(backbone["mixer_blocks2.0.0.weight"])
    kwargs = {
        "h": h,
        "out_dim": len(backbone["backbone_linear.weight"]),
        "clip_size": dim,
        "seq_len": seq_len,
        "n_blocks": _count(backbone, r"mixer_blocks1\.(\d+)\."),
        "blurry_recon": "blin1.weight" in backbone,
    }
    if kwargs["blurry_recon"]:
        kwargs["latent_size"] = 4 * round((len(backbone["blin1.weight"]) / 64) ** 0.5)
    prior = _prior_network(net) if net else None
    if prior:
        prior = {"name": "PriorNetwork", "kwargs": prior["kwargs"]}
    steps = len(state["diffusion_prior.noise_scheduler.betas"]) if net else 100
    return {
        "name": "MindEye2",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": steps,
            "cond_drop_prob": 0.2,
            "image_embed_scale": 1.0,
        },
        "ridge": {
            "name": "RidgeRegression",
            "kwargs": {"input_sizes": [layer.shape[1] for layer in layers], "out_features": h},
        },
        "backbone": {"name": "MixerBrainNetwork", "kwargs": kwargs},
        "net": prior,
    }


def _low_level(state: dict[str, Tensor], origin: str) -> dict[str, Any]:
    channels, factors = (
        len(state["norm.weight"]),
        {parts[0]: (mode, parts[1]) for mode, parts in UPS_MODES.items()},
    )
    if channels not in factors:
        raise PerceptError(
            f"{origin} holds a low-level network with {channels} channels, which is none of the"
            f" released modes ({', '.join(UPS_MODES)}): build the network that it was made for, and"
            " use load_published."
        )
    mode, factor = factors[channels]
    h, in_dim = state["lin0.0.weight"].shape
    levels = _count(state, r"upsampler\.up_blocks\.(\d+)\.")
    widths = [
        state[f"upsampler.up_blocks.{i}.resnets.0.conv1.weight"].shape[0]
        for i in reversed(range(levels))
    ]
    side = round((state["lin1.weight"].shape[0] // channels) ** 0.5)
    kwargs = {
        "in_dim": in_dim,
        "h": h,
        "n_blocks": _count(state, r"mlp\.(\d+)\."),
        "use_cont": "maps_projector.0.weight" in state,
        "ups_mode": mode,
        "latent_size": side * factor,
        "block_out_channels": widths,
        "latent_channels": state["upsampler.conv_out.weight"].shape[0],
    }
    return {"name": "Voxel2StableDiffusionModel", "kwargs": kwargs}
