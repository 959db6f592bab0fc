"""Checkpoints: files of tensors with the configuration of their network, loaded strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.files.errors import PerceptError
from src.files.writing import MAKE_AGAIN, atomic, explain_unopened, require_file

if TYPE_CHECKING:
    import torch
    from torch import nn


def save_checkpoint(
    path: str | Path, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    """Write a state dict and its config into one safetensors file.

    Of the tensors, only those that share memory with others are copied.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(config)})


@contextmanager
def open_tensors(
    path: str | Path, framework: str = "pt", device: str = "cpu", remedy: str = MAKE_AGAIN
) -> Iterator[Any]:
    """Open a safetensors file; yields the handle of safetensors' `safe_open`.

    The file's own head is checked against its size, so that none can announce more than it holds.

    Args:
        path: the file.
        framework: "pt" for tensors of torch, "np" for arrays.
        device: where tensors go.
        remedy: what to do where it cannot be used, for the message.

    Raises:
        PerceptError: naming the file, if it is missing, may not be read, is damaged, cut off or
            something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        try:
            handle = safe_open(require_file(path, "tensors", remedy), framework, device=device)
        except OSError as error:
            raise explain_unopened(path, error, remedy) from error
        with handle as file:
            yield file
    except SafetensorError as error:
        raise PerceptError(
            f"{path} is no safetensors file, or is damaged or cut off ({error}): {remedy}."
        ) from error


def read_tensors(
    path: str | Path,
    required: Iterable[str] = (),
    device: str = "cpu",
    remedy: str = MAKE_AGAIN,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all of a safetensors file: tensors by name, and the texts stored with them.

    Raises:
        PerceptError: as `open_tensors`, or if a tensor that is required is not in it.
    """
    with open_tensors(path, device=device, remedy=remedy) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        texts = dict(file.metadata() or {})
    missing = [name for name in required if name not in tensors]
    if missing:
        raise PerceptError(f"{path} has no {', '.join(missing)} in it: {remedy}.")
    return tensors, texts


def parse_config(texts: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    """The config among the texts that a checkpoint stores, {} where it has none.

    Raises:
        PerceptError: naming the file, if the config is no JSON object.
    """
    try:
        config = json.loads((texts or {}).get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise PerceptError(
            f"{path} carries a config that is no JSON ({error}): take the checkpoint as it was"
            " written."
        ) from error
    if not isinstance(config, dict):
        raise PerceptError(
            f"{path} carries a config that is a {type(config).__name__}, not an object: take the"
            " checkpoint as it was written."
        )
    return config


def load_checkpoint(
    path: str | Path, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `save_checkpoint`: state dict and config.

    Raises:
        PerceptError: as `open_tensors` and `parse_config`.
    """
    remedy = "copy it again, or train again"
    state_dict, texts = read_tensors(path, device=str(device), remedy=remedy)
    return state_dict, parse_config(texts, path)


def load_strictly(module: nn.Module, state_dict: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly.

    Args:
        module: receives the weights.
        state_dict: the weights, under the keys of the module.
        origin: where they come from, for the message.

    Raises:
        PerceptError: naming keys that are missing or unexpected, and weights of another shape, of
            another kind (whole numbers for fractions), or that are not finite.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(state_dict))
    unexpected = sorted(set(state_dict) - set(expected))
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        raise PerceptError(
            f"{origin} does not fit {type(module).__name__}: missing {missing[:5]}, unexpected"
            f" {unexpected[:5]}, wrong shape {misshapen[:5]}; take the checkpoint of this very"
            " model."
        )
    check_weights(state_dict, expected, origin)
    module.load_state_dict(state_dict)


def check_weights(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], origin: str
) -> None:
    """Refuse weights that torch would convert without a word, and those that are not finite.

    Args:
        state_dict: the weights by key.
        expected: those of the network that takes them, by the same keys.
        origin: where they come from, for the message.

    Raises:
        PerceptError: naming the first such weight.
    """
    for key, tensor in state_dict.items():
        kind, expected_kind = _name_kind(tensor), _name_kind(expected[key])
        if kind != expected_kind and not _is_counter(tensor, expected[key]):
            raise PerceptError(
                f"{origin} holds {key} as {kind} ({tensor.dtype}) where the network has"
                f" {expected_kind}: take the checkpoint as it was written."
            )
        if not is_finite(tensor):
            raise PerceptError(
                f"{origin} holds NaN or infinity in {key}: its training had broken down, or the"
                " file is damaged; take another checkpoint, or train again."
            )


def _is_counter(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a tensor holds one whole number that was stored as a fraction, such as the number of
    batches that a batch norm has seen.
    """
    is_number = tensor.numel() == 1 and not expected.is_floating_point()
    return is_number and not tensor.is_complex() and float(tensor).is_integer()


def _name_kind(tensor: torch.Tensor) -> str:
    """What a tensor holds, in words."""
    if tensor.is_floating_point():
        return "fractions"
    if tensor.is_complex():
        return "complex numbers"
    return "whole numbers"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, without a copy of the tensor."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.itemsize == 1:  # of which torch has no extremes
        tensor = tensor.float()
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
