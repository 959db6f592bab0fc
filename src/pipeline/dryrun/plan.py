"""The plan of a stage: what it needs, and a warning for everything that is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from src import utils
from src.data.layout import subject_folder
from src.parameters import find_recipe_files, list_decoders, read_recipe
from src.pipeline.dryrun.memory import measure_base_memory
from src.pipeline.dryrun.needs import (
    NEEDS,
    Needs,
    estimate_kernel_memory,
    estimate_ridge_memory,
)
from src.pipeline.dryrun.sizes import FLOAT_BYTES, Sizes, count_inputs, find_sizes
from src.pretrained.base import HUB, locate_model
from src.pretrained.clip import CLIP_VARIANTS, PATCH_VARIANTS
from src.utils import PerceptError, resolve, to_device

TRAININGS = (
    "01_train_high_level",
    "01_train_combined",
    "01_train_mindeye2",
    "02_train_autoencoder",
    "02_train_basic_autoencoder",
    "02_train_percept",
    "02_train_roi_models",
)

INDEX_FILES = ("config.json", "model_index.json")  # one of these is among a model's files


@dataclass
class Plan:
    """What a stage needs, in bytes.

    Attributes:
        stage: name of the notebook.
        parameters: number of trainable ones, by network.
        memory: by what it is for.
        disk: by what it is for.
        warnings: a sentence for each thing that is not there.
    """

    stage: str
    parameters: dict[str, int]
    memory: dict[str, float]
    disk: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line an item, and the warnings."""
        lines = [f"{self.stage} trains no network"]
        if self.parameters:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
            total = sum(self.parameters.values())
            lines = [f"{self.stage} will train {total:,} parameters ({counts})"]
        for title, parts in (("memory", self.memory), ("disk", self.disk)):
            if parts:
                details = [f"{name} {_format_size(size)}" for name, size in parts.items() if size]
                total_size = _format_size(sum(parts.values()))
                lines.append(f"  {title} {total_size}: {', '.join(details)}")
        return "\n".join(lines + [f"  warning: {sentence}" for sentence in self.warnings])


def _format_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plan_stage(stage: str, parameters: Mapping[str, Any]) -> Plan | None:
    """What a stage needs, or None for one that writes little and trains no network.

    Args:
        stage: name of the notebook.
        parameters: its effective parameters, all of them.
    """
    if stage not in NEEDS or (
        stage in TRAININGS and "network" not in list_decoders(parameters["decoder"])
    ):
        return None
    # of decoding stages: a parameter that their training alone has
    hidden = _predicts_all_tokens(str(parameters.get("recipe", "")))
    parameters = {"hidden": hidden} | dict(parameters)
    base = measure_base_memory()
    sizes = find_sizes(parameters)
    needs = NEEDS[stage](parameters, sizes)
    plan = Plan(stage, needs.parameters, needs.memory, needs.disk)
    if needs.parameters:
        plan.memory = {"interpreter and libraries": base} | needs.memory
        plan.memory |= _estimate_preparation(stage, parameters, sizes, needs.memory)
        plan.disk |= _estimate_checkpoints(stage, parameters, needs)
    plan.warnings.extend(_find_missing_inputs(stage, parameters))
    plan.warnings.extend(_find_missing_resources(plan))
    return plan


def _estimate_preparation(
    stage: str, parameters: Mapping[str, Any], sizes: Sizes, memory: Mapping[str, float]
) -> dict[str, float]:
    """Memory of what is computed before and after the training, beyond what that takes at the same
    place.
    """
    data, width = sizes.data, count_inputs(parameters, sizes.data)
    components = 0.0
    if parameters.get("n_components"):  # over before there is a network
        components = FLOAT_BYTES * data.train_trials * (data.voxels + 2 * width)
    network = sum(size for name, size in memory.items() if name != "mapped data")
    beyond = {"finding components, beyond that": max(0.0, components - network)}
    # fitted after the training, in what that has left
    freed = memory["optimizer state"] + memory["activations and gradients"]
    decoders = list_decoders(parameters["decoder"])
    if "ridge" in decoders:
        ridge = estimate_ridge_memory(stage, sizes, width)
        beyond["ridge baseline, beyond that"] = max(0.0, ridge - freed)
    if "kernel" in decoders:
        kernel = estimate_kernel_memory(stage, sizes, width)
        beyond["kernel decoder, beyond that"] = max(0.0, kernel - freed)
    return beyond


def _estimate_checkpoints(
    stage: str, parameters: Mapping[str, Any], needs: Needs
) -> dict[str, float]:
    """Disk of what a training writes: best and last weights, those of every few epochs, and its
    state, of which a new one is written beside the former before it takes its place.
    """
    weights, interval = FLOAT_BYTES * sum(needs.parameters.values()), parameters["ckpt_interval"]
    checkpoints = 2
    if interval and stage.startswith("02"):
        checkpoints += -(-parameters["num_epochs"] // interval)
    return {"checkpoints": weights * checkpoints, "state for resuming": 2 * 3 * weights}


def _predicts_all_tokens(recipe: str) -> bool:
    """Whether a recipe trains on all of CLIP's tokens, not on its one final embedding."""
    if not recipe:
        return True
    if find_recipe_files(recipe, "01_train_combined"):
        return False
    files = find_recipe_files(recipe, "01_train_high_level")
    return all(read_recipe(file).get("hidden", True) for file in files)


def _list_models(stage: str, parameters: Mapping[str, Any]) -> list[str]:
    """Names of the pretrained models that a stage loads."""
    if "clip_seq_dim" in parameters:
        patch_model = PATCH_VARIANTS[parameters["clip_variant"]]
    else:
        patch_model = _find_patch_model(str(parameters.get("recipe", "")))
    if patch_model:
        return _list_mindeye2_models(stage, parameters.get("weights", ""), patch_model)
    clip = CLIP_VARIANTS[parameters.get("clip_variant", "ViT-L/14")]
    hidden = parameters.get("hidden", True)
    generator = "versatile_diffusion" if hidden else "image_variation"
    decoding = ["stable_diffusion"]  # of the low level alone
    if parameters.get("img2img_strength", 1):
        decoding = [clip, generator]
    samples = ["image_variation"] if parameters.get("n_samples_save") else []
    captioner = ["blip"] if parameters.get("strength", 0) > 0 else []
    models = {
        "01_train_high_level": [clip],
        "01_train_combined": [clip, *samples],
        "01_train_encoder": [clip],
        "02_train_autoencoder": ["versatile_diffusion"],
        "02_train_basic_autoencoder": ["stable_diffusion"],
        "02_train_percept": [clip, "versatile_diffusion"],
        "03_reconstruct": decoding,
        "02_train_roi_models": ["stable_diffusion"],
        "03_vote": ["clip", "stable_diffusion", *captioner],
    }
    return models.get(stage, [])


def _list_mindeye2_models(stage: str, weights: str, patch_model: str) -> list[str]:
    """Names of the pretrained models that a stage of a MindEye2 recipe loads."""
    target, decoded = patch_model, "clip-bigG"
    if weights == "mini":
        target, decoded = "clip", "clip"
    clips = list(dict.fromkeys([target, decoded]))
    models = {
        "01_train_mindeye2": [target, "image_variation"],
        "03_reconstruct": [*clips, "image_variation", "unclip"],
        "04_refine": [target, "git"],
    }
    return models.get(stage, [])


def _find_patch_model(recipe: str) -> str:
    """The model whose patch tokens a recipe's training predicts, "" if it is none of MindEye2's."""
    files = find_recipe_files(recipe, "01_train_mindeye2") if recipe else []
    if not files:
        return ""
    variant = "bigG"
    for file in files:
        variant = read_recipe(file).get("clip_variant", "") or variant
    return PATCH_VARIANTS[variant]


def _find_missing_inputs(stage: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for data, models and devices that are not there."""
    if stage == "00_prepare_data" and parameters["source"] != "mini":
        prepared = subject_folder(parameters["dataset"], parameters["subj"])
        if not resolve(parameters["data_path"]).exists() and not prepared.exists():
            yield (
                f"There is nothing at {parameters['data_path']}: set data_path to where the files"
                f" of '{parameters['source']}' lie (README, Your own fMRI)."
            )
    models = _list_models(stage, parameters)
    weights = parameters.get("weights", "")
    if models and weights == "hub" and not _has_gpu():
        yield "There is no GPU here: at full size this stage would take weeks."
    for name in models:
        try:
            location = locate_model(name, weights)
        except PerceptError as error:
            if name in HUB:  # others come with a package of their own
                yield str(error)
            continue
        if weights == "hub" and not _is_in_cache(location, parameters.get("vd_cache_dir")):
            yield f"{location} is not in the hub's cache: it will be downloaded."


def _has_gpu() -> bool:
    return to_device("auto").startswith("cuda")


def _is_in_cache(repo: str, folder: str | None) -> bool:
    """Whether a model is in the hub's cache."""
    paths = [try_to_load_from_cache(repo, file, cache_dir=folder or None) for file in INDEX_FILES]
    return any(isinstance(path, str) for path in paths)


def _find_missing_resources(plan: Plan) -> Iterator[str]:
    """A sentence for memory and disk that are needed and not free."""
    place, free = "memory", psutil.virtual_memory().available
    if _has_gpu():
        place, free = "GPU memory", torch.cuda.mem_get_info()[0]
    # there already, or given back when others need it
    shared = ("interpreter and libraries", "mapped data")
    needed = sum(size for name, size in plan.memory.items() if name not in shared)
    if needed > free:
        yield (
            f"{_format_size(needed)} of {place} are needed besides libraries and mapped files, and"
            f" {_format_size(free)} are free: lower batch_size or h, or set step_in_backward."
        )
    folder = utils.HOME if utils.HOME.exists() else utils.HOME.parent
    needed, free = sum(plan.disk.values()), shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"{_format_size(needed)} of disk are needed at {folder} and {_format_size(free)} are"
            " free: make room, or set PERCEPT_HOME to another disk."
        )
