"""Checkpoints that others released: read without running code from them, rebuild the network they hold, load it strictly.

- MindEye's high-level files (`last.pth` of prior_257_... and prior_1x768_...), its low-level files (`epoch120.pth` of autoencoder_...), and
  LAION's text -> image prior, which initialises the prior of the 1x768 model.
- The files are pickles with a gigabyte of weights and two of optimizer state. Only tensors are rebuilt, everything else becomes an inert
  object, and the file is mapped: what is not asked for is not read.
- Sizes are inferred from the weights, so there is nothing to configure and nothing to get wrong.
"""

from __future__ import annotations

import collections
import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.models import UPS_MODES, published_state
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError, load_strictly

FRESH_IN_LAION = ("net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed")


class _Inert:
    """Stands for whatever a file holds besides tensors and containers; takes any argument and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass


_TRUSTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _TRUSTED.get((module, name), _Inert)


_PICKLE = types.ModuleType("tensors_only")
_PICKLE.__dict__.update(Unpickler=_TensorsOnly, load=lambda file, **options: _TensorsOnly(file, **options).load())


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The weights of a released file under today's keys.

    Args:
        path: a .pth file: a state dict, or a dictionary that holds one as "model_state_dict" or "model".

    Raises:
        PerceptError: if the file is missing, damaged, or holds no state dict.
    """
    if not Path(path).exists():
        raise PerceptError(f"There is no checkpoint at {path}: download it, or correct the name of the run.")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise PerceptError(f"{path} cannot be read as a PyTorch checkpoint ({str(error).splitlines()[0]}): download it again.") from error
    for key in ("model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise PerceptError(f"{path} holds no state dict, neither at its top nor as 'model_state_dict' or 'model': take the file with the weights.")
    return published_state(dict(content))


def published_config(state: dict[str, Tensor], origin: str = "This state dict") -> dict[str, Any]:
    """What `src.reconstruct.build_decoder` needs to make the network of a released state dict, its sizes read from the weights.

    Two things leave no trace in weights and are taken as released: the prior's attention (causal in the 1x768 network only), and a learned
    query as long as the tokens is added to them ("pos_emb").

    Raises:
        PerceptError: if the keys belong to none of the released networks.
    """
    if "net.causal_transformer.project_out.weight" in state and "voxel2clip.lin1.weight" in state:
        net, voxel2clip = _part(state, "net."), _part(state, "voxel2clip.")
        dim = net["causal_transformer.project_out.weight"].shape[0]
        kwargs = {"image_embed_dim": dim, "timesteps": len(state["noise_scheduler.betas"]), "cond_drop_prob": 0.2}
        return {"name": "BrainDiffusionPrior", "kwargs": kwargs, "net": _prior_network(net), "voxel2clip": _brain_network(voxel2clip, dim)}
    if "upsampler.conv_in.weight" in state:
        return _low_level(state, origin)
    if "lin1.weight" in state:
        return _brain_network(state, 768)
    raise PerceptError(
        f"{origin} holds no released MindEye network (its keys begin with {sorted(state)[:3]}): take a last.pth of a prior_... run, or an epoch120.pth of an "
        "autoencoder_... run."
    )


def load_published(path: str | Path, model: torch.nn.Module) -> None:
    """Load a released file strictly into a module.

    Raises:
        PerceptError: if the file cannot be read or its keys and shapes are not those of the module.
    """
    load_strictly(model, read_published(path), str(path))


def load_laion_prior(path: str | Path, prior: BrainDiffusionPrior) -> list[str]:
    """Initialise the prior of the 1x768 model with LAION's text -> image prior.

    Returns:
        Names of the tensors that the file does not have and that stay as they were initialised: the null embeddings (random, and used
        as they are by the published system too) and the voxel2clip network.

    Raises:
        PerceptError: if anything else is missing, too much, or of another shape.
    """
    state, own = read_published(path), prior.state_dict()
    fresh = [key for key in own if key not in state and (key in FRESH_IN_LAION or key.startswith("voxel2clip."))]
    load_strictly(prior, state | {key: own[key] for key in fresh}, str(path))
    return fresh


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """How many numbered parts there are: one more than the largest number that the pattern finds."""
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _brain_network(state: dict[str, Tensor], clip_size: int) -> dict[str, Any]:
    h, in_dim = state["lin0.0.weight"].shape
    projector = "projector.2.weight" in state
    kwargs = {
        "in_dim": in_dim, "out_dim": state["lin1.weight"].shape[0], "clip_size": state["projector.0.weight"].shape[0] if projector else clip_size,
        "h": h, "n_blocks": _count(state, r"mlp\.(\d+)\."), "norm_type": "bn" if any("running_mean" in key for key in state) else "ln",
        "act_first": "lin0.2.weight" in state, "use_projector": projector,
    }  # fmt: skip
    return {"name": "BrainNetwork", "kwargs": kwargs | ({"projector_dim": state["projector.2.weight"].shape[0]} if projector else {})}


def _prior_network(state: dict[str, Tensor]) -> dict[str, Any]:
    dim_head = state["causal_transformer.layers.0.0.null_kv"].shape[1]
    heads = state["causal_transformer.layers.0.0.to_q.weight"].shape[0] // dim_head
    dim = state["causal_transformer.project_out.weight"].shape[0]
    kwargs = {"dim": dim, "depth": _count(state, r"causal_transformer\.layers\.(\d+)\."), "dim_head": dim_head, "heads": heads}
    if "null_text_encodings" in state:
        more = {"num_timesteps": len(state["to_time_embeds.0.weight"]), "max_text_len": state["null_text_encodings"].shape[1]}
        return {"name": "DiffusionPriorNetwork", "kwargs": kwargs | more | {"normformer": "causal_transformer.layers.0.1.3.g" in state}}
    tokens, query = len(state["null_image_embed"]), state.get("learned_query")
    mode = "none" if query is None else "pos_emb" if len(query) == tokens else "all_pos_emb"
    return {"name": "VersatileDiffusionPriorNetwork", "kwargs": kwargs | {"num_tokens": tokens, "learned_query_mode": mode}}


def _low_level(state: dict[str, Tensor], origin: str) -> dict[str, Any]:
    channels, factors = len(state["norm.weight"]), {parts[0]: (mode, parts[1]) for mode, parts in UPS_MODES.items()}
    if channels not in factors:
        raise PerceptError(
            f"{origin} holds a low-level network with {channels} channels, which is none of the released modes ({', '.join(UPS_MODES)}): build the "
            "network that it was made for, and use load_published."
        )
    mode, factor = factors[channels]
    h, in_dim = state["lin0.0.weight"].shape
    levels = _count(state, r"upsampler\.up_blocks\.(\d+)\.")
    widths = [state[f"upsampler.up_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in reversed(range(levels))]
    side = round((state["lin1.weight"].shape[0] // channels) ** 0.5)
    kwargs = {
        "in_dim": in_dim, "h": h, "n_blocks": _count(state, r"mlp\.(\d+)\."), "use_cont": "maps_projector.0.weight" in state, "ups_mode": mode,
        "latent_size": side * factor, "block_out_channels": widths, "latent_channels": state["upsampler.conv_out.weight"].shape[0],
    }  # fmt: skip
    return {"name": "Voxel2StableDiffusionModel", "kwargs": kwargs}
