"""From a run's checkpoints to decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from src.decoding.configs import PATCHES
from src.networks.rebuild import build_decoder, check_config, infer_published_config
from src.networks.released import read_published
from src.utils import PerceptError, load_checkpoint, load_strictly, open_tensors, parse_config


def _is_released(path: str | Path) -> bool:
    """Whether a checkpoint is one that others released (.pth, or a folder that DeepSpeed wrote),
    and not of this repository; refused where there is none.
    """
    if not Path(path).exists():
        raise PerceptError(
            f"No checkpoint at {path}: train that stage first (notebooks 01 and 02), or name the"
            " run that has it."
        )
    return Path(path).suffix == ".pth" or Path(path).is_dir()


def load_decoder(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a trained decoder from one file: of this repository (.safetensors), or a released one
    (.pth, or a folder that DeepSpeed wrote).

    Returns:
        The module in eval mode, and the config stored with it (of a released file: read from its
            weights).

    Raises:
        PerceptError: if the file is missing or damaged, does not fit the model that it names, or
            holds weights that are not finite.
    """
    if _is_released(path):
        state, config = _read_released(path)
    else:
        state, config = load_checkpoint(path)  # on the CPU, where the network is made
        check_config(config, state, str(path))
    decoder = build_decoder(config["model"])
    load_strictly(decoder, state, str(path))
    return decoder.to(device).eval().requires_grad_(False), config


def read_decoder_config(path: str | Path) -> dict[str, Any]:
    """The config that comes with a decoder's file, without its weights; as `load_decoder` gives it.

    Raises:
        PerceptError: if the file is missing or damaged.
    """
    if _is_released(path):
        return _read_released(path)[1]
    with open_tensors(path, remedy="copy it again, or train again") as file:
        return parse_config(file.metadata(), path)


def find_decoder(folder: str | Path, level: str, checkpoint: str = "last") -> Path:
    """Where a run keeps a decoder: `level`/<checkpoint>.safetensors of this repository, or else a
    released file as its authors name it.

    Args:
        folder: train_logs/<run>.
        level: "high_level" or "low_level".
        checkpoint: "last" or "best".
    """
    folder = Path(folder)
    trained = folder / level / f"{checkpoint}.safetensors"
    released = folder / "epoch120.pth"
    if level == "high_level":
        released = folder / f"{checkpoint}.pth"
        if not released.exists() and (folder / checkpoint).is_dir():
            released = folder / checkpoint  # of MindEye2 under DeepSpeed
    return released if released.exists() and not trained.exists() else trained


def find_decoders(
    logs: str | Path, low_logs: str | Path, checkpoint: str = "last"
) -> dict[str, tuple[Path, Path]]:
    """Where a run keeps the two levels of each decoder: network, ridge, kernel.

    Args:
        logs: train_logs/<run>, which holds the high levels, and the low levels that are solved.
        low_logs: the same, or that of the run whose low-level network is used.
        checkpoint: "last" or "best", of the networks.

    Returns:
        By name of the decoder its high and its low level, whether or not there are such files.
    """
    high = find_decoder(logs, "high_level", checkpoint)
    low = find_decoder(low_logs, "low_level", checkpoint)
    files = {"network": (high, low)}
    for name in ("ridge", "kernel"):
        high = Path(logs) / f"high_level_{name}.safetensors"
        low = Path(logs) / f"low_level_{name}.safetensors"
        files[name] = (high, low)
    return files


def _read_released(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config of a released file, the config as `fit` would have stored it."""
    state = read_published(path)
    model = infer_published_config(state, str(path))
    config: dict[str, Any] = {"model": model}
    if model["name"] == "MindEye2":
        sizes = model["backbone"]["kwargs"]
        dim = sizes["clip_size"]
        config["tokens"] = [sizes["out_dim"] // dim, dim]
        config["clip"] = {"patch_tokens": True, "variant": _find_variant(dim), "squeezed": True}
    elif model["name"] == "BrainDiffusionPrior":
        tokens = model["net"]["kwargs"].get("num_tokens", 1)
        config["tokens"] = [tokens, model["kwargs"]["image_embed_dim"]]
    return state, config


def _find_variant(dim: int) -> str:
    """The CLIP whose patch tokens have `dim` numbers."""
    for name, (_, patch_dim) in PATCHES.items():
        if patch_dim == dim:
            return name
    return "bigG"
