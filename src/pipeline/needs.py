"""What the stages of a recipe load: collected by walking the recipe with its parameters.

One function a stage says which frozen models and files that stage loads with some parameters, by
the names of `src.pipeline.download.bundles`. The download fetches what is collected here and the
dry run looks for it; tests/test_offline.py runs recipes from what was fetched, without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.pipeline.recipes import read_defaults, read_stage_parameters, select_stages
from src.pretrained.clip_variants import CLIP_VARIANTS, PATCH_VARIANTS, find_patch_variant

Values = Mapping[str, Any]

CAPTION_STAGE = "04_refine"

# options of `00_prepare_data` that choose a release of MindEye's shards
RELEASES = {"webdataset_avg_new": "mindeye_new", "webdataset": "mindeye_early"}

EARLY_DATASET = "nsd_early"

LAION_PRIOR = "data/laion_prior/"

CAPTION_CONVERTER = "data/mindeye2_models/"

# networks of the metrics that are CLIP's, and bundles of the others
METRIC_BUNDLES = {
    "AlexNet(2)": "alexnet",
    "AlexNet(5)": "alexnet",
    "InceptionV3": "inception_v3",
    "EffNet-B1": "efficientnet_b1",
    "SwAV": "swav_resnet50",
}


@dataclass(frozen=True)
class RecipeNeeds:
    """What a recipe loads.

    Attributes:
        bundles: names, in the order in which they are needed.
        subjects: numbers of the subjects whose data are read.
        num_sessions: of training data, 0 for all.
        values: parameters of all its stages; later stages win.
    """

    bundles: list[str]
    subjects: list[int]
    num_sessions: int
    values: dict[str, Any]


def collect_needs(
    recipe: str,
    overrides: Mapping[str, Any],
    first: str = "",
    last: str = "",
    skip: Sequence[str] = (),
) -> RecipeNeeds:
    """Walk the stages of a recipe and collect what they load.

    Args:
        recipe, overrides, first, last, skip: as `select_stages`.

    Raises:
        UsageError: for a recipe or override that there is not.
    """
    stages, merged = select_stages(recipe, dict(overrides), first, last, skip)
    bundles: dict[str, None] = {}
    for stage, values in walk_stages(recipe, stages, merged):
        bundles |= dict.fromkeys(list_bundles(stage, values, stages))
    # a part of a model where the whole is needed anyway
    parts = [f"{name}_vae" for name in bundles]
    also = [int(number) for number in str(values.get("also", "")).split(",") if number.strip()]
    return RecipeNeeds(
        bundles=[name for name in bundles if name not in parts],
        subjects=sorted({int(values.get("subj", 1)), *also}),
        num_sessions=int(values.get("num_sessions", 0)),
        values=values,
    )


def walk_stages(
    recipe: str, stages: Sequence[str], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage with the parameters of all stages up to it, its own winning.

    Decoding depends on what was trained: its models follow from the parameters of the training.
    """
    values: dict[str, Any] = {}
    for stage in stages:
        values = values | read_defaults(stage)
        values |= read_stage_parameters(stage, recipe, dict(overrides))
        yield stage, dict(values)


def list_bundles(stage: str, values: Values, stages: Sequence[str]) -> list[str]:
    """Names of the bundles that a stage loads.

    Args:
        stage: name of the notebook.
        values: parameters of this stage and of those before it.
        stages: of the recipe.
    """
    if stage == "00_prepare_data":
        return _list_data(values)
    if values.get("weights", "hub") != "hub" or stage not in STAGE_BUNDLES:
        return []
    return list(dict.fromkeys(STAGE_BUNDLES[stage](values, stages)))


def _list_data(values: Values) -> list[str]:
    """The files of the source, where a server hands them out."""
    source = values["source"]
    if source == "mindeye":
        if values["dataset"] == EARLY_DATASET:
            return ["mindeye_early"]
        for layout, bundle in RELEASES.items():
            if f"layout: {layout}" in values["options"]:
                return [bundle]
    return [source] if source in ("mindeye", "mindeye2", "nsd") else []


def _list_target_clip(values: Values) -> str:
    """The CLIP whose tokens a training predicts."""
    variant = values.get("clip_variant", "ViT-L/14")
    if _is_mindeye2(values):
        size = values["clip_seq_dim"], values["clip_emb_dim"]
        return PATCH_VARIANTS[find_patch_variant(variant, *size)]
    return CLIP_VARIANTS[variant]


def _is_mindeye2(values: Values) -> bool:
    return "clip_seq_dim" in values


def _list_high_level(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)
    if values.get("split") == "cluster-held-out":
        yield "clip"
    if str(values.get("laion_prior", "")).startswith(LAION_PRIOR):
        yield "laion_prior"
    if values.get("n_samples_save", 0):
        yield _find_generator(values)


def _list_combined(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield from _list_high_level({**values, "n_samples_save": 0}, stages)
    if values["n_samples_save"] or values["clip_aug_mode"] != "none":
        yield "image_variation"
    if values["n_samples_save"] >= 2:
        yield "inception_v3"


def _list_mindeye2(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)
    yield "image_variation_vae"
    if values["blurry_recon"] and values["use_cont"]:
        yield "teacher"


def _list_low_level(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield "versatile_diffusion_vae"
    if values["use_cont"]:
        yield "teacher"
    if values.get("split") == "cluster-held-out":
        yield "clip"


def _list_encoding(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)
    names = {name.strip() for name in values["feature_spaces"].split(",")}
    if "captions" in names:
        yield "sentence_encoder"
    if "gnet" in names:
        yield "gnet"
    yield from (bundle for name, bundle in METRIC_BUNDLES.items() if name in names)


def _list_percept(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)
    if values["latent_components"]:
        yield "versatile_diffusion_vae"


def _list_latents(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield "stable_diffusion_vae"


def _find_generator(values: Values) -> str:
    """The generator that reads what the training predicts."""
    is_single = "voxel_dims" in values or not values.get("hidden", True)
    return "image_variation" if is_single else "versatile_diffusion"


def _list_reconstruction(values: Values, stages: Sequence[str]) -> Iterator[str]:
    has_tokens = any(stage.startswith("01_train") for stage in stages)
    if not has_tokens:
        yield "stable_diffusion_vae"
        return
    yield _list_target_clip(values)
    if _is_mindeye2(values):
        yield from ("image_variation_vae", PATCH_VARIANTS["bigG"], "unclip")
    else:
        yield _find_generator(values)


def _list_votes(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield from ("clip", "stable_diffusion")
    if values["strength"] > 0:
        yield "blip"


def _list_refinement(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)
    if values["caption"]:
        yield "git"
        if values["caption_converter"].startswith(CAPTION_CONVERTER):
            yield "caption_converter"
    if values["refine"] and not values["refiner_weights"]:
        yield from ("refiner", "sdxl_configuration")


def _list_encoder(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield _list_target_clip(values)


def _list_metrics(values: Values, stages: Sequence[str]) -> Iterator[str]:
    yield "clip"
    names = values["metrics"]
    if names == "published":
        names = ",".join(METRIC_BUNDLES)
    for name in names.split(","):
        if name.strip() in METRIC_BUNDLES:
            yield METRIC_BUNDLES[name.strip()]
    if values["brain_corr"]:
        yield "gnet"
    if CAPTION_STAGE not in stages or not values["caption_metrics"]:
        return
    chosen_metrics = values["caption_metrics"]
    if chosen_metrics == "all" or "Sentence" in chosen_metrics:
        yield "sentence_encoder"
    if chosen_metrics == "all" or "CLIP-B" in chosen_metrics:
        yield "clip-ViT-B-32"


STAGE_BUNDLES: dict[str, Callable[[Values, Sequence[str]], Iterator[str]]] = {
    "01_train_encoder": _list_encoding,
    "01_train_high_level": _list_high_level,
    "01_train_combined": _list_combined,
    "01_train_mindeye2": _list_mindeye2,
    "02_train_autoencoder": _list_low_level,
    "02_train_basic_autoencoder": _list_latents,
    "02_train_percept": _list_percept,
    "02_train_roi_models": _list_latents,
    "03_reconstruct": _list_reconstruction,
    "03_vote": _list_votes,
    "04_refine": _list_refinement,
    "05_attribution": _list_encoder,
    "05_search_index": _list_encoder,
    "06_metrics": _list_metrics,
    "08_small_data": _list_encoder,
}
