"""Checkpoints as others released them: read them without running code, load them, write them.

- MindEye's high-level files (`last.pth` of prior_257_... and prior_1x768_...), its low-level files
  (`epoch120.pth` of autoencoder_...), MindEye2's `last.pth` or DeepSpeed folder, and LAION's text
  -> image prior, which initialises the prior of the 1x768 model.
- The files are pickles with a gigabyte of weights and two of optimizer state. Only tensors and
  numbers are rebuilt, everything else becomes an inert object. The file is memory-mapped: what is
  not used is not read.
- Three differences are forgiven, and nothing else: the prefix of data parallelism, the attention's
  old names and one stray scalar (`src.models.rename_published_keys`). A file that does not fit is
  refused with what differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.files.foreign import explain_unreadable
from src.networks.mindeye2 import MindEye2
from src.networks.mismatch import FRESH_IN_LAION, check_fits
from src.networks.rebuild import build_on_meta, infer_published_config, select_prefix
from src.networks.registry import rename_published_keys
from src.prior import BrainDiffusionPrior
from src.safe_pickle import load_torch_file
from src.utils import PerceptError, atomic, check_name, load_checkpoint, load_strictly

# a number that early voxel2clip networks carried and never used
STRAY_KEYS = ("temp", "voxel2clip.temp")

DEEPSPEED_REMEDY = "copy the whole folder again, as DeepSpeed wrote it"

CURVES = ("train_losses", "val_losses", "lrs")

# arguments that leave no trace in the weights
_UNTRACED_ARGUMENTS = ("causal", "learned_query_mode", "clip_size")


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The weights of a released file under today's keys, mapped from the file and not yet read.

    Args:
        path: a .pth file: a state dict, or a dictionary that holds one as "model_state_dict" or
            "model"; or a folder that DeepSpeed has written (ZeRO stages 1 and 2), whose weights are
            then joined from the pieces of its processes, in single precision.

    Raises:
        PerceptError: if the file is missing, damaged, or holds no state dict, or one with a weight
            under two names.
    """
    content = _read_deepspeed(Path(path)) if Path(path).is_dir() else load_torch_file(path)
    for key in ("model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not _is_state_dict(content):
        raise PerceptError(
            f"{path} holds no state dict, neither at its top nor as 'model_state_dict' or 'model':"
            " take the file with the weights."
        )
    stray = {
        key: value for key, value in content.items() if key.removeprefix("module.") in STRAY_KEYS
    }
    unlike_released = {key: value for key, value in stray.items() if value.numel() > 1}
    state = rename_published_keys(dict(content)) | unlike_released
    forgiven = sum(value.numel() == 1 for value in stray.values())
    if len(state) + forgiven < len(content):
        raise PerceptError(
            f"{path} holds {len(content)} weights under {len(state)} names, some of them twice (old"
            " and new names, with and without 'module.'): take the file as it was released."
        )
    return state


def _is_state_dict(content: Any) -> bool:
    """Whether something read from a file is a dictionary of tensors, with at least one."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours (.safetensors), or of a released file.

    Raises:
        PerceptError: as `read_published` for a released file.
    """
    if Path(path).suffix == ".safetensors":
        return load_checkpoint(path)[0]
    return read_published(path)


def _read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder of DeepSpeed's.

    First those of the model in the precision of the computation, then, in their place, the
    optimizer's in single precision.
    """
    folder = _follow_tag(folder)
    models = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(models) != 1:
        raise PerceptError(
            f"{folder} holds {len(models)} files mp_rank_*_model_states.pt, not one: give the"
            " folder of a checkpoint that DeepSpeed's stage 1 or 2 wrote."
        )
    model = load_torch_file(models[0])
    if not isinstance(model, Mapping) or not isinstance(model.get("module"), Mapping):
        raise PerceptError(f"{models[0]} holds no 'module' with weights: {DEEPSPEED_REMEDY}.")
    state = {name: value for name, value in model["module"].items() if isinstance(value, Tensor)}
    pieces = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_read_rank)
    if pieces:
        state |= _join_pieces(model.get("param_shapes"), models[0], pieces)
    return state


def _follow_tag(folder: Path) -> Path:
    """The folder with the files of a checkpoint, which a file "latest" names."""
    tag = folder / "latest"
    if not tag.exists():
        return folder
    try:
        with open(tag, encoding="utf-8") as file:
            name = file.read(1000).strip()
    except (OSError, ValueError) as error:
        raise explain_unreadable(tag, error, DEEPSPEED_REMEDY) from error
    return folder / check_name(name, f"The folder that {tag} names")


def _join_pieces(shapes: Any, origin: Path, pieces: list[Path]) -> dict[str, Tensor]:
    """Weights in single precision, of which each process of a training had a piece.

    Args:
        shapes: of each group of parameters, the shape of a parameter by its name.
        origin: the file that holds them.
        pieces: files of the processes, in their order.
    """
    is_list = isinstance(shapes, list) and all(isinstance(group, Mapping) for group in shapes)
    if not is_list or not all(_is_shape(shape) for group in shapes for shape in group.values()):
        raise PerceptError(f"{origin} holds no shapes of its parameters: {DEEPSPEED_REMEDY}.")
    flat_groups = [_read_piece(path, len(shapes)) for path in pieces]
    state: dict[str, Tensor] = {}
    for number, group in enumerate(shapes):
        flat = torch.cat([groups[number].flatten() for groups in flat_groups])
        needed = sum(math.prod(shape) for shape in group.values())
        if needed > len(flat):
            raise PerceptError(
                f"{pieces[0].parent} holds {len(flat):,} of the {needed:,} numbers of its weights"
                f" in {len(pieces)} files *_optim_states.pt: {DEEPSPEED_REMEDY}."
            )
        for name, shape in group.items():
            size = math.prod(shape)
            state[str(name)] = flat[:size].view(*shape)
            flat = flat[size:]  # what is left at the end fills up the last piece
    return state


def _read_piece(path: Path, groups: int) -> list[Tensor]:
    """What one process held of each group of parameters, in single precision."""
    content = load_torch_file(path)
    optimizer = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    partitions: Any = []
    if isinstance(optimizer, Mapping):
        partitions = optimizer.get("single_partition_of_fp32_groups")
    is_list = isinstance(partitions, list) and len(partitions) >= groups
    if not is_list or not all(isinstance(part, Tensor) for part in partitions):
        raise PerceptError(
            f"{path} holds no weights in single precision of {groups} groups of parameters:"
            f" {DEEPSPEED_REMEDY}."
        )
    weights: list[Tensor] = partitions
    return weights


def _is_shape(value: Any) -> bool:
    """Whether something read from a file is a shape."""
    return isinstance(value, list | tuple) and all(
        isinstance(size, int) and size >= 0 for size in value
    )


def _read_rank(path: Path) -> int:
    """Number of the process in a file's name, ..zero_pp_rank_<number>_mp_rank_...

    Raises:
        PerceptError: if there is none.
    """
    rank = path.name.partition("pp_rank_")[2].partition("_")[0]
    if not rank.isdecimal():
        raise PerceptError(f"{path} names no number of a process: {DEEPSPEED_REMEDY}.")
    return int(rank)


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
    if not isinstance(content, Mapping):
        content = {}
    epoch = content.get("epoch")
    history: dict[str, Any] = {"epoch": epoch if isinstance(epoch, int) else None}
    for name in CURVES:
        history[name] = _read_curve(content.get(name))
    return history


def _read_curve(values: Any) -> list[float]:
    """A list of numbers, or an empty one for anything else."""
    if not isinstance(values, list):
        return []
    values = [_unwrap_number(value) for value in values]
    if not all(isinstance(value, int | float) for value in values):
        return []
    return [float(value) for value in values]


def _unwrap_number(value: Any) -> Any:
    """The number in a tensor of one number; anything else as it is."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value


def load_published(path: str | Path, model: nn.Module) -> None:
    """Load a released file strictly into a module.

    Raises:
        PerceptError: if the file cannot be read or its keys and shapes are not those of the module;
            a few are named, and what to do.
    """
    state = read_published(path)
    check_fits(state, model, str(path))
    load_strictly(model, state, str(path))


def load_laion_prior(path: str | Path, prior: BrainDiffusionPrior) -> list[str]:
    """Initialise the prior of the 1x768 model with LAION's text -> image prior.

    Returns:
        Names of the tensors that the file does not have and that stay as they were initialised: the
            null embeddings (random, and used as they are by the published system too) and the
            voxel2clip network.

    Raises:
        PerceptError: if anything else is missing, too much, or of another shape.
    """
    state, initial = read_published(path), prior.state_dict()
    fresh = []
    for key in initial:
        may_be_absent = key in FRESH_IN_LAION or key.startswith("voxel2clip.")
        if key not in state and may_be_absent:
            fresh.append(key)
    state |= {key: initial[key] for key in fresh}
    check_fits(state, prior, str(path))
    load_strictly(prior, state, str(path))
    return fresh


def load_voxel2clip(path: str | Path, network: nn.Module) -> None:
    """Give a voxel2clip the weights of a file; of a whole prior, its voxel2clip is taken.

    Args:
        path: a released .pth (a state dict, bare or as "model_state_dict"), or a checkpoint of
            ours.
        network: that takes the weights.

    Raises:
        PerceptError: if the file cannot be read, or its keys and shapes are not those of the
            network; a few are named, and what to do.
    """
    state = read_weights(path)
    state = select_prefix(state, "voxel2clip.") or state
    check_fits(state, network, str(path))
    load_strictly(network, state, str(path))


def write_published(
    path: str | Path, decoder: nn.Module, epoch: int = 0, old_attention: bool = False
) -> None:
    """Write a decoder of ours in the released layout, for code that reads MindEye's files.

    Reading the file gives the same bits.

    The file holds {"epoch", "model_state_dict", "train_losses", "val_losses", "lrs"}, the last
    three empty, and no optimizer: one reconstructs with it, but cannot resume a training. Nor does
    it hold how voxels were normalised: a reader of the file must give the network voxels normalised
    as in its training (the released networks were trained on betas as the shards hold them, ours on
    z-scores).

    Args:
        path: where to, e.g. train_logs/<run>/last.pth, or epoch120.pth for a low-level network.
        decoder: a `BrainDiffusionPrior` with its voxel2clip, a `BrainNetwork`, or a
            `Voxel2StableDiffusionModel`, of any size.
        epoch: number of the last epoch, which the file records.
        old_attention: name the low-level attention as diffusers 0.13 did, which the released
            environment pins.

    Raises:
        PerceptError: if a reader could not make this network from the file: one that was never
            released, or that differs from the released ones in what weights do not tell.
    """
    name = type(decoder).__name__
    state = {key: value.detach().cpu() for key, value in decoder.state_dict().items()}
    try:
        rebuilt = build_on_meta(infer_published_config(state, f"This {name}"))
    except PerceptError as error:
        raise PerceptError(
            f"This {name} cannot be written as a released file, from whose weights alone a"
            " BrainDiffusionPrior with its voxel2clip, a BrainNetwork or a"
            " Voxel2StableDiffusionModel is made again: keep it in our own format."
        ) from error
    differences = _list_untraced_differences(decoder, rebuilt)
    if differences:
        raise PerceptError(
            f"This {name} has {', '.join(differences)}, which a released file does not tell its"
            " reader: keep it in our own format."
        )
    if old_attention:
        state = {to_old_key(key): value for key, value in state.items()}
    content = {"epoch": epoch, "model_state_dict": state} | {curve: [] for curve in CURVES}
    with atomic(path) as temporary:
        torch.save(content, temporary)


def to_old_key(key: str) -> str:
    """A key of today as diffusers 0.13 had it.

    The attention of an autoencoder's middle block was renamed since; other keys stay.
    """
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items():
        pattern = rf"(mid_block\.attentions\.0\.){re.escape(new)}\."
        key = re.sub(pattern, rf"\g<1>{old}.", key)
    return key


def _list_untraced_differences(decoder: nn.Module | None, rebuilt: nn.Module | None) -> list[str]:
    """What a network has otherwise than the one made again from its weights, e.g. "causal=True"."""
    if isinstance(decoder, BrainDiffusionPrior) and isinstance(rebuilt, BrainDiffusionPrior):
        differences = []
        if decoder.image_embed_scale != rebuilt.image_embed_scale:
            differences.append(f"image_embed_scale={decoder.image_embed_scale:g}")
        differences += _list_untraced_differences(decoder.net, rebuilt.net)
        return differences + _list_untraced_differences(decoder.voxel2clip, rebuilt.voxel2clip)
    if isinstance(decoder, MindEye2) and isinstance(rebuilt, MindEye2):
        differences = []
        if decoder.diffusion_prior is not None and rebuilt.diffusion_prior is not None:
            differences += _list_untraced_differences(
                decoder.diffusion_prior, rebuilt.diffusion_prior
            )
        name = type(decoder.backbone).__name__
        if name != type(rebuilt.backbone).__name__:
            differences.append(f"a {name}")
        return differences
    kwargs, rebuilt_kwargs = _get_kwargs(decoder), _get_kwargs(rebuilt)
    return [
        f"{name}={kwargs[name]}"
        for name in _UNTRACED_ARGUMENTS
        if name in kwargs and kwargs[name] != rebuilt_kwargs.get(name)
    ]


def _get_kwargs(network: nn.Module | None) -> dict[str, Any]:
    """The arguments that a network was made with; none for a module that does not record them."""
    return getattr(network, "config", {}).get("kwargs", {})
