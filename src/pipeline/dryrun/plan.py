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
from src.pipeline.download.bundles import BUNDLES
from src.pipeline.download.files import Bundle
from src.pipeline.dryrun.memory import measure_base_memory
from src.pipeline.dryrun.needs import (
    NEEDS,
    Needs,
    estimate_kernel_memory,
    estimate_ridge_memory,
)
from src.pipeline.dryrun.sizes import (
    FLOAT_BYTES,
    HALF_BYTES,
    Sizes,
    count_inputs,
    find_sizes,
)
from src.pipeline.needs import list_bundles
from src.pipeline.recipes import list_stages
from src.pretrained.base import HUB, locate_model
from src.pretrained.clip_variants import PATCH_VARIANTS
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

# of an image, in half precision: bigG's patch tokens, and GIT-large's hidden states
DECODED_BYTES, CAPTIONER_BYTES = HALF_BYTES * 256 * 1664, HALF_BYTES * 257 * 1024

UNCLIP_BYTES = 5.5e9  # of the network in half precision and its autoencoder

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
    plan.disk |= _estimate_caches(stage, parameters, sizes)
    if needs.parameters:
        plan.memory = {"interpreter and libraries": base} | needs.memory
        plan.memory |= _estimate_preparation(stage, parameters, sizes, needs.memory)
        plan.disk |= _estimate_checkpoints(stage, parameters, needs)
    plan.warnings.extend(_find_missing_inputs(stage, parameters))
    plan.warnings.extend(_find_missing_resources(plan))
    return plan


def _estimate_caches(stage: str, parameters: Mapping[str, Any], sizes: Sizes) -> dict[str, float]:
    """Disk of what MindEye2's later stages cache and rewrite, in bytes, beside their results."""
    target = _find_patch_model(str(parameters.get("recipe", "")))
    if not target or parameters.get("weights") != "hub":
        return {}
    images = sizes.data.all_images
    caches = {}
    if stage == "03_reconstruct":
        if target != PATCH_VARIANTS["bigG"]:
            caches["tokens that the decoder reads"] = images * DECODED_BYTES
        if not (utils.HOME / "data" / "unclip").exists():
            caches["unCLIP decoder, rewritten"] = UNCLIP_BYTES
    if stage == "04_refine" and parameters["caption"]:
        caches["tokens of the captioner"] = images * CAPTIONER_BYTES
    return caches


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


def _list_local_models(stage: str, parameters: Mapping[str, Any]) -> list[str]:
    """Names of the models of a folder that a stage loads, as `locate_model` knows them."""
    names = list_bundles(stage, {**parameters, "weights": "hub"}, [stage])
    if parameters["weights"] == "mini":  # of which there is one CLIP
        names = ["clip" if name.startswith("clip") else name for name in names]
    return [name for name in dict.fromkeys(n.removesuffix("_vae") for n in names) if name in HUB]


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
    weights = parameters.get("weights", "")
    if weights != "hub":
        for name in _list_local_models(stage, parameters) if weights else ():
            try:
                locate_model(name, weights)
            except PerceptError as error:
                yield str(error)
        return
    names = [name for name in list_bundles(stage, parameters, _list_stages(stage, parameters))]
    if names and not _has_gpu():
        yield "There is no GPU here: at full size this stage would take weeks."
    for name in names:
        bundle = BUNDLES[name]
        if bundle.in_hub_cache and not _is_in_cache(bundle, parameters.get("vd_cache_dir")):
            yield f"{bundle.repo} is not in the hub's cache: it will be downloaded."
        elif bundle.folder and not bundle.is_of_subjects and not _is_in_folder(bundle):
            yield f"{bundle.folder} lacks {bundle.title}: run 'python run.py download {name}'."


def _list_stages(stage: str, parameters: Mapping[str, Any]) -> list[str]:
    """The stages of the recipe; this stage alone where there is none."""
    recipe = str(parameters.get("recipe", "")).partition("/")[0]
    return list_stages(recipe) if recipe else [stage]


def _has_gpu() -> bool:
    return to_device("auto").startswith("cuda")


def _is_in_cache(bundle: Bundle, folder: str | None) -> bool:
    """Whether a model is in the hub's cache."""
    patterns = bundle.patterns(subj=1)
    places = [place for place in (pattern.folder for pattern in patterns) if place != "**"]
    names = [f"{place}/{name}".lstrip("/") for place in places or [""] for name in INDEX_FILES]
    options = {"cache_dir": folder or None, "revision": bundle.revision}
    paths = [try_to_load_from_cache(bundle.repo, name, **options) for name in names]
    return any(isinstance(path, str) for path in paths)


def _is_in_folder(bundle: Bundle) -> bool:
    """Whether the files of a bundle lie where the stages look for them."""
    names = [pattern.description for pattern in bundle.patterns(subj=1)]
    return all((resolve(bundle.folder) / name.rpartition("/")[2]).exists() for name in names)


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
