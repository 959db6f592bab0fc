"""Networks from configs, and configs from the weights of released files.

- Every network that trains has a `config`, and `build_decoder` makes the same network of it.
- Released files hold weights alone. `LAYOUTS` is one table: for each released class the keys by
  which its state dict is recognised, and how each argument of the class is read from the weights.
  So there is nothing to configure, and nothing to get wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from src.files.foreign import shorten
from src.files.weights import BUILD_ERRORS, build_within, plan_network
from src.networks.low_level import UPS_MODES
from src.networks.mindeye2 import MindEye2
from src.networks.mismatch import check_fits
from src.networks.registry import build_network
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError

State = Mapping[str, Tensor]
Reader = Callable[[State], Any]


def build_decoder(config: Mapping[str, Any]) -> nn.Module:
    """Make an untrained decoder from the config that its checkpoint carries.

    Args:
        config: {"name", "kwargs"} of `src.models.MODELS`; {"name": "BrainDiffusionPrior", "kwargs",
            "net", "voxel2clip"}; or {"name": "MindEye2", "kwargs" and "net" (of its prior, or
            None), "ridge", "backbone"}.
    """
    if config["name"] == "MindEye2":
        prior = None
        if config["net"]:
            prior = BrainDiffusionPrior(build_network(config["net"]), **config["kwargs"])
        return MindEye2(build_network(config["ridge"]), build_network(config["backbone"]), prior)
    if config["name"] == "BrainDiffusionPrior":
        net, voxel2clip = build_network(config["net"]), build_network(config["voxel2clip"])
        return BrainDiffusionPrior(net, voxel2clip=voxel2clip, **config["kwargs"])
    return build_network(dict(config))


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config, without memory for its weights."""
    with torch.device("meta"):
        return build_decoder(config)


def check_config(config: Mapping[str, Any], state: State, origin: str) -> None:
    """Refuse a checkpoint whose config and weights do not go together.

    The network is made without memory for its weights, so that a config cannot ask for more than
    the file holds.

    Args:
        config: of the checkpoint.
        state: its weights by key.
        origin: where both come from, for the message.

    Raises:
        PerceptError: if the config has no network, one that cannot be made, or one that the weights
            do not fit; or if its number of tokens is none.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise PerceptError(
            f"{origin} carries no config of the network that it is of: take a checkpoint that the"
            " training notebooks wrote, or build the network and use load_strictly."
        )
    tokens = config.get("tokens", [1, 1])
    is_shape = isinstance(tokens, list) and len(tokens) == 2
    if not is_shape or not all(type(size) is int and size > 0 for size in tokens):
        raise PerceptError(
            f"{origin} carries a config whose tokens are {shorten(repr(tokens), 80)}, not their"
            " number and dim: take the checkpoint as it was written."
        )
    network = plan_network(lambda: build_decoder(model), state, origin)
    check_fits(state, network, origin)


def infer_published_config(state: State, origin: str = "This state dict") -> dict[str, Any]:
    """The config of a released state dict, for `build_decoder`; sizes are read from the weights.

    Two things leave no trace in weights and are taken as released: the prior's attention (causal in
    the 1x768 network only), and a learned query as long as the tokens is added to them ("pos_emb").

    Args:
        state: weights under today's keys (`src.models.rename_published_keys`).
        origin: what a message calls the state dict, e.g. its file.

    Raises:
        PerceptError: if the keys belong to none of the released networks, or are not exactly those
            of the network that they ask for.
    """
    name = _recognise(state, RELEASED_CLASSES)
    if name is None:
        raise PerceptError(
            f"{origin} holds no released MindEye network (its keys begin with {sorted(state)[:3]}):"
            " take a last.pth of a prior_... run, or an epoch120.pth of an autoencoder_... run."
        )
    try:
        config = _read_config(name, state)
        network = build_within(lambda: build_decoder(config), len(state))
    except _NotReleased as error:
        raise PerceptError(f"{origin} {error}") from error
    except BUILD_ERRORS as error:
        problem = f"has weights of a shape that no such network has ({shorten(error)})"
        if isinstance(error, KeyError):
            problem = f"has no {error.args[0]}"
        raise PerceptError(
            f"{origin} is of a released network but {problem}, so its sizes cannot be read: take"
            " the file as it was released."
        ) from error
    check_fits(state, network, origin)
    return config


def select_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """The weights whose keys begin with a prefix, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


class _NotReleased(Exception):
    """The weights are of a network of a size that was never released."""


@dataclass(frozen=True)
class _Part:
    """A part of a network that has a config of its own.

    Attributes:
        prefix: of its keys.
        classes: that it may be of; the last where no other is recognised.
        optional: whether it may be missing, which makes its config None.
        arguments: that are read from the weights of the whole.
    """

    prefix: str
    classes: tuple[str, ...]
    optional: bool = False
    arguments: Mapping[str, Reader] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """How a released class stands in its state dict.

    Attributes:
        keys: that are all there where a state dict is of this class.
        arguments: argument of the class -> function that reads it from the state dict; None leaves
            it at its default.
        parts: entry of the config -> the part that it describes.
    """

    keys: tuple[str, ...]
    arguments: Mapping[str, Reader]
    parts: Mapping[str, _Part] = field(default_factory=dict)


def _recognise(state: State, names: tuple[str, ...]) -> str | None:
    """The first of these classes that a state dict has the keys of."""
    for name in names:
        if all(key in state for key in LAYOUTS[name].keys):
            return name
    return None


def _read_config(name: str, state: State) -> dict[str, Any]:
    """The config of a class, as its weights tell it; unchecked."""
    layout = LAYOUTS[name]
    config: dict[str, Any] = {"name": name, "kwargs": _read_kwargs(layout.arguments, state)}
    for entry, part in layout.parts.items():
        weights = select_prefix(state, part.prefix)
        if part.optional and not weights:
            config[entry] = None
            continue
        part_name = _recognise(weights, part.classes) or part.classes[-1]
        config[entry] = _read_config(part_name, weights)
        config[entry]["kwargs"] |= _read_kwargs(part.arguments, state)
    return config


def _read_kwargs(readers: Mapping[str, Reader], state: State) -> dict[str, Any]:
    """The arguments that can be read; a reader's None leaves one out."""
    values = {argument: read(state) for argument, read in readers.items()}
    return {argument: value for argument, value in values.items() if value is not None}


def _size(key: str, axis: int = 0) -> Reader:
    """Reads the length of an axis of a weight."""
    return lambda state: state[key].shape[axis]


def _has(key: str) -> Reader:
    """Reads whether there is a weight."""
    return lambda state: key in state


def _constant(value: Any) -> Reader:
    """Reads nothing: what weights do not tell, as released."""
    return lambda state: value


def _count(pattern: str) -> Reader:
    """Counts numbered parts: one more than the largest number that the pattern finds in keys."""

    def count(state: State) -> int:
        matches = [re.match(pattern, key) for key in state]
        numbers = [int(match[1]) for match in matches if match]
        return max(numbers, default=-1) + 1

    return count


def _read_norm_type(state: State) -> str:
    return "bn" if any("running_mean" in key for key in state) else "ln"


def _read_clip_size(state: State) -> int:
    """Width of the projector's input; without one, that of the released 257x768 network."""
    return state["projector.0.weight"].shape[0] if "projector.2.weight" in state else 768


def _read_prior_clip_size(state: State) -> int | None:
    """Without a projector, the dim of the prior's tokens is that of the voxel2clip's."""
    if "voxel2clip.projector.2.weight" in state:
        return None
    return state["net.causal_transformer.project_out.weight"].shape[0]


def _read_projector_dim(state: State) -> int | None:
    return state["projector.2.weight"].shape[0] if "projector.2.weight" in state else None


def _read_heads(state: State) -> int:
    width = state["causal_transformer.layers.0.0.to_q.weight"].shape[0]
    return width // state["causal_transformer.layers.0.0.null_kv"].shape[1]


def _read_query_mode(state: State) -> str:
    if "learned_query" not in state:
        return "none"
    if len(state["learned_query"]) == len(state["null_image_embed"]):
        return "pos_emb"
    return "all_pos_emb"


def _read_dropping(state: State) -> float:
    """Probability of dropping a condition in training, as released."""
    return 0.0 if "net.null_text_encodings" in state else 0.2


def _read_mindeye2_steps(state: State) -> int:
    betas = state.get("diffusion_prior.noise_scheduler.betas")
    has_prior = any(key.startswith("diffusion_prior.net.") for key in state)
    if not has_prior:
        return 100
    if betas is None:
        raise KeyError("diffusion_prior.noise_scheduler.betas")
    return len(betas)


def _read_voxels(state: State) -> list[int]:
    """Voxels of each subject."""
    subjects = _count(r"linears\.(\d+)\.")(state)
    return [state[f"linears.{i}.weight"].shape[1] for i in range(subjects)]


def _read_shared_width(state: State) -> int:
    seq_len = len(state["mixer_blocks2.0.0.weight"])
    return state["backbone_linear.weight"].shape[1] // seq_len


def _read_blurry_size(state: State) -> int | None:
    if "blin1.weight" not in state:
        return None
    return 4 * round((len(state["blin1.weight"]) / 64) ** 0.5)


def _read_ups_mode(state: State) -> str:
    channels = len(state["norm.weight"])
    for name, mode in UPS_MODES.items():
        if mode.channels == channels:
            return name
    raise _NotReleased(
        f"holds a low-level network with {channels} channels, which is none of the released modes"
        f" ({', '.join(UPS_MODES)}): build the network that it was made for, and use"
        " load_published."
    )


def _read_latent_size(state: State) -> int:
    mode = UPS_MODES[_read_ups_mode(state)]
    side = round((state["lin1.weight"].shape[0] // mode.channels) ** 0.5)
    return side * mode.factor


def _read_upsampler_widths(state: State) -> list[int]:
    levels = _count(r"upsampler\.up_blocks\.(\d+)\.")(state)
    keys = [f"upsampler.up_blocks.{i}.resnets.0.conv1.weight" for i in reversed(range(levels))]
    return [state[key].shape[0] for key in keys]


_TRANSFORMER: dict[str, Reader] = {
    "dim": _size("causal_transformer.project_out.weight"),
    "depth": _count(r"causal_transformer\.layers\.(\d+)\."),
    "dim_head": _size("causal_transformer.layers.0.0.null_kv", 1),
    "heads": _read_heads,
}

_TOKEN_PRIOR: dict[str, Reader] = {
    **_TRANSFORMER,
    "num_tokens": _size("null_image_embed"),
    "learned_query_mode": _read_query_mode,
}

LAYOUTS = {
    "BrainNetwork": _Layout(
        keys=("lin1.weight",),
        arguments={
            "in_dim": _size("lin0.0.weight", 1),
            "out_dim": _size("lin1.weight"),
            "clip_size": _read_clip_size,
            "h": _size("lin0.0.weight"),
            "n_blocks": _count(r"mlp\.(\d+)\."),
            "norm_type": _read_norm_type,
            "act_first": _has("lin0.2.weight"),
            "use_projector": _has("projector.2.weight"),
            "projector_dim": _read_projector_dim,
        },
    ),
    "DiffusionPriorNetwork": _Layout(
        keys=("null_text_encodings",),
        arguments={
            **_TRANSFORMER,
            "num_timesteps": _size("to_time_embeds.0.weight"),
            "max_text_len": _size("null_text_encodings", 1),
            "normformer": _has("causal_transformer.layers.0.1.3.g"),
        },
    ),
    "VersatileDiffusionPriorNetwork": _Layout(keys=("null_brain_embeds",), arguments=_TOKEN_PRIOR),
    "PriorNetwork": _Layout(keys=("null_brain_embeds",), arguments=_TOKEN_PRIOR),
    "BrainDiffusionPrior": _Layout(
        keys=("net.causal_transformer.project_out.weight", "voxel2clip.lin1.weight"),
        arguments={
            "image_embed_dim": _size("net.causal_transformer.project_out.weight"),
            "timesteps": _size("noise_scheduler.betas"),
            "cond_drop_prob": _read_dropping,
        },
        parts={
            "net": _Part("net.", ("DiffusionPriorNetwork", "VersatileDiffusionPriorNetwork")),
            "voxel2clip": _Part(
                "voxel2clip.",
                ("BrainNetwork",),
                arguments={"clip_size": _read_prior_clip_size},
            ),
        },
    ),
    "RidgeRegression": _Layout(
        keys=("linears.0.weight",),
        arguments={"input_sizes": _read_voxels, "out_features": _size("linears.0.weight")},
    ),
    "MixerBrainNetwork": _Layout(
        keys=("backbone_linear.weight",),
        arguments={
            "h": _read_shared_width,
            "out_dim": _size("backbone_linear.weight"),
            "clip_size": _size("clip_proj.0.weight"),
            "seq_len": _size("mixer_blocks2.0.0.weight"),
            "n_blocks": _count(r"mixer_blocks1\.(\d+)\."),
            "blurry_recon": _has("blin1.weight"),
            "latent_size": _read_blurry_size,
        },
    ),
    "MindEye2": _Layout(
        keys=("backbone.backbone_linear.weight",),
        arguments={
            "image_embed_dim": _size("backbone.clip_proj.0.weight"),
            "timesteps": _read_mindeye2_steps,
            "cond_drop_prob": _constant(0.2),
            "image_embed_scale": _constant(1.0),
        },
        parts={
            "ridge": _Part("ridge.", ("RidgeRegression",)),
            "backbone": _Part("backbone.", ("MixerBrainNetwork",)),
            "net": _Part("diffusion_prior.net.", ("PriorNetwork",), optional=True),
        },
    ),
    "Voxel2StableDiffusionModel": _Layout(
        keys=("upsampler.conv_in.weight",),
        arguments={
            "in_dim": _size("lin0.0.weight", 1),
            "h": _size("lin0.0.weight"),
            "n_blocks": _count(r"mlp\.(\d+)\."),
            "use_cont": _has("maps_projector.0.weight"),
            "ups_mode": _read_ups_mode,
            "latent_size": _read_latent_size,
            "block_out_channels": _read_upsampler_widths,
            "latent_channels": _size("upsampler.conv_out.weight"),
        },
    ),
}

# what a released file may hold; the last has a key that the others have too
RELEASED_CLASSES = (
    "BrainDiffusionPrior",
    "MindEye2",
    "Voxel2StableDiffusionModel",
    "BrainNetwork",
)
