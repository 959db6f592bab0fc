"""Encoding models on disk: train_logs/<run>/encoder.safetensors, and the residuals beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.encoding.model import EncodingModel, build_encoding_model
from src.encoding.noise import NoiseModel
from src.files.weights import plan_network
from src.utils import PerceptError, load_checkpoint, load_strictly, save_checkpoint

MODEL_FILE = "encoder.safetensors"

NOISE_FILE = "encoder_residuals.safetensors"

REMEDY = "run notebook 01_train_encoder of this run"


def save_encoder(
    folder: str | Path,
    model: EncodingModel,
    noise: NoiseModel,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoding model and its noise into the folder of a run.

    Args:
        folder: train_logs/<run>.
        model: fitted.
        noise: of its out-of-fold residuals.
        config: stored with it: "data" ({"subj01": identity of the prepared subject}), "training"
            (parameters), "clip" and whatever a later stage needs to compute the same features.
    """
    content = {**(config or {}), "encoder": model.config}
    save_checkpoint(Path(folder) / MODEL_FILE, model.state_dict(), content)
    residuals = {"residuals": noise.residuals}
    save_checkpoint(Path(folder) / NOISE_FILE, residuals, {"data": content.get("data", {})})


def load_encoder(folder: str | Path, device: str = "cpu") -> tuple[EncodingModel, NoiseModel]:
    """Read what `save_encoder` wrote.

    Args:
        folder: train_logs/<run>.
        device: torch device of both.

    Returns:
        The model in eval mode, and the noise of its measurements.

    Raises:
        PerceptError: if a file is missing, damaged, of something else, or the two do not belong
            together.
    """
    path = Path(folder) / MODEL_FILE
    model, _ = _load_model(path)
    noise_path = Path(folder) / NOISE_FILE
    state, _ = load_checkpoint(_require(noise_path))
    residuals = state.get("residuals")
    if residuals is None or residuals.ndim != 2 or residuals.shape[1] != model.n_voxels:
        raise PerceptError(
            f"{noise_path} does not hold the residuals of the {model.n_voxels} voxels of {path}:"
            f" {REMEDY} again."
        )
    return model.to(device), NoiseModel(residuals).to(device)


def read_encoder_config(folder: str | Path) -> dict[str, Any]:
    """The config that is stored with an encoding model.

    Raises:
        PerceptError: if it is missing or damaged.
    """
    return load_checkpoint(_require(Path(folder) / MODEL_FILE))[1]


def _load_model(path: Path) -> tuple[EncodingModel, dict[str, Any]]:
    state, config = load_checkpoint(_require(path))
    sizes = config.get("encoder")
    if not isinstance(sizes, dict):
        raise PerceptError(f"{path} is no encoding model, its config has no 'encoder': {REMEDY}.")
    model = plan_network(lambda: build_encoding_model(sizes), state, str(path))
    model.to_empty(device="cpu")
    load_strictly(model, state, str(path))
    assert isinstance(model, EncodingModel)
    return model.eval().requires_grad_(False), config


def _require(path: Path) -> Path:
    if not path.exists():
        raise PerceptError(f"There is no encoding model at {path}: {REMEDY} first.")
    return path
