"""Which files of a public repository a bundle consists of.

Each function takes the number of the subject and the options of its bundle, and returns patterns
for paths in the repository.
"""

from __future__ import annotations

import re
from dataclasses import replace

from src.pipeline.download.files import FilePattern
from src.utils import PerceptError

# of a model on the hub: weights, in one file or in numbered pieces, and what else is read with them
WEIGHTS = r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"

MODEL_FILE = rf"(?:{WEIGHTS}|[\w.-]+\.json|merges\.txt|vocab\.txt|spiece\.model)"

# folders of the regions of LAION-fMRI
LAION_CATEGORIES = (
    "body",
    "character",
    "face",
    "laion",
    "motion",
    "object",
    "place",
    "retinotopy",
)

LAION_PRIOR = "vit-l-14/aesthetic"  # folder of the prior that the published code begins with


def list_shards(layout: str, subj: int) -> list[FilePattern]:
    """MindEye's shards of one subject.

    Args:
        layout: folder of the repository, one for each way in which the data were averaged.
        subj: number of the subject.
    """
    patterns = []
    for split in ("train", "val", "test"):
        folder = f"{layout}/{split}"
        pattern = rf"{folder}/{split}_subj{subj:02d}_(?P<n>\d+)\.tar"
        patterns.append(FilePattern(f"{split} shards of subject {subj}", folder, pattern))
    metadata = rf"{layout}/metadata_subj{subj:02d}\.json"
    return [*patterns, FilePattern(f"metadata of subject {subj}", layout, metadata)]


def list_early_shards(subj: int) -> list[FilePattern]:
    """Single trials, in two splits; there is no metadata of one subject."""
    train, val, *_ = list_shards("webdataset", subj)
    return [train, val]


def list_checkpoints(subj: int, names: str = "") -> list[FilePattern]:
    """MindEye's released networks, less the copies for replications.

    Args:
        subj: number of the subject.
        names: beginnings of the folders' names, separated by commas; by default all of the subject.
    """
    prefixes = "|".join(re.escape(name.strip()) for name in names.split(","))
    run = rf"(?P<run>(?=[^/]*subj{subj:02d})(?:{prefixes})[^/]*)"
    pattern = rf"(?:[^/]+/)*{run}/(?P<file>last|epoch120)\.pth"
    description = f"released checkpoints of subject {subj}"
    return [FilePattern(description, "mindeye_models", pattern, r"\g<run>/\g<file>.pth")]


def list_prior(subj: int) -> list[FilePattern]:
    """LAION's prior and its config."""
    patterns = []
    for name in ("best.pth", "prior_config.json"):
        path = f"{LAION_PRIOR}/{name}"
        patterns.append(FilePattern(path, LAION_PRIOR, re.escape(path), name))
    return patterns


def list_file(path: str, subj: int) -> list[FilePattern]:
    """A single file of the top level."""
    return [FilePattern(path, "", re.escape(path))]


def list_mindeye2(subj: int, num_sessions: int = 1, checkpoint: str = "") -> list[FilePattern]:
    """The minimal part of MindEye2's data.

    Args:
        subj: number of the subject.
        num_sessions: of the training data, 0 for all.
        checkpoint: a folder of train_logs that is fetched as well.
    """
    train, test = f"wds/subj{subj:02d}/train", f"wds/subj{subj:02d}/new_test"
    patterns = []
    for number in range(num_sessions):
        description = f"session {number + 1} of subject {subj}"
        patterns.append(FilePattern(description, train, re.escape(f"{train}/{number}.tar")))
    if not num_sessions:
        description = f"training sessions of subject {subj}"
        patterns.append(FilePattern(description, train, rf"{train}/(?P<n>\d+)\.tar"))
    patterns.append(FilePattern(f"test data of subject {subj}", test, rf"{test}/\d+\.tar"))
    paths = [
        f"betas_all_subj{subj:02d}_fp32_renorm.hdf5",
        "coco_images_224_float16.hdf5",
        "COCO_73k_subj_indices.hdf5",
        "brain_region_masks.hdf5",
    ]
    patterns += [_list_path(path) for path in paths]
    # what the reader can do without
    optional = ["shared1000.npy", "COCO_73k_annots_curated.npy"]
    names = ("all_images.pt", "all_captions.pt", "all_git_generated_captions.pt")
    optional += [f"evals/{name}" for name in names]
    patterns += [replace(_list_path(path), optional=True) for path in optional]
    if checkpoint:
        folder = f"train_logs/{checkpoint}"
        pattern = re.escape(f"{folder}/last.pth")
        patterns.append(FilePattern(f"checkpoint {checkpoint}", folder, pattern))
    return patterns


def list_nsd(
    subj: int,
    rois: str = "nsdgeneral",
    num_sessions: int = 0,
    beta_version: str = "betas_fithrf_GLMdenoise_RR",
    beta_format: str = "hdf5",
    space: str = "func1pt8mm",
    anatomical: bool = False,
) -> list[FilePattern]:
    """Raw NSD of one subject.

    Args:
        subj: number of the subject.
        rois: names of files of ROIs, separated by commas. With those of a localiser (floc-...)
            comes the table of their names, which the reader knows of the other files by itself.
        num_sessions: 0 for all.
        beta_version: folder of the betas.
        beta_format: hdf5 or nii.gz.
        space: functional grid.
        anatomical: whether to fetch the ROIs on the anatomical grid, too, with the transformation
            to the functional one.

    Raises:
        PerceptError: for another format.
    """
    if beta_format not in ("hdf5", "nii.gz"):
        raise PerceptError(f"beta_format is '{beta_format}': choose hdf5 or nii.gz.")
    subject_folder = f"nsddata/ppdata/subj{subj:02d}"
    betas = f"nsddata_betas/ppdata/subj{subj:02d}/{space}/{beta_version}"
    sessions = []
    for number in range(1, num_sessions + 1):
        path = f"{betas}/betas_session{number:02d}.{beta_format}"
        sessions.append(FilePattern(f"session {number}", betas, re.escape(path)))
    if not num_sessions:
        description = f"betas of subject {subj} as {beta_format}"
        pattern = rf"{betas}/betas_session\d\d\.{re.escape(beta_format)}"
        sessions.append(FilePattern(description, betas, pattern))
    names = [name.strip() for name in rois.split(",") if name.strip()]
    paths = [f"{subject_folder}/{space}/roi/{name}.nii.gz" for name in names]
    for name in names:
        if name.startswith("floc-"):
            paths.append(f"nsddata/freesurfer/subj{subj:02d}/label/{name}.mgz.ctab")
    if anatomical:
        transform = f"anat0pt8-to-{space.removesuffix('mm')}.nii.gz"
        paths += [f"{subject_folder}/anat/roi/{name}.nii.gz" for name in names]
        paths.append(f"{subject_folder}/transforms/{transform}")
    paths += [
        f"{betas}/ncsnr.nii.gz",
        "nsddata/experiments/nsd/nsd_expdesign.mat",
        f"{subject_folder}/behav/responses.tsv",
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
    ]
    return [*sessions, *(_list_path(path) for path in paths)]


def list_laion_fmri(
    subj: int, num_sessions: int = 1, categories: str = "laion,retinotopy"
) -> list[FilePattern]:
    """The public part of LAION-fMRI that a reading needs; the pictures need an agreement.

    Args:
        subj: 1, 3, 5, 6 or 7.
        num_sessions: the first so many; each is a file of about 1 to 2 GB.
        categories: of regions, separated by commas: body, character, face, laion, motion, object,
            place, retinotopy.

    Raises:
        PerceptError: for another category, or no session.
    """
    chosen = [name.strip() for name in categories.split(",") if name.strip()]
    unknown = sorted(set(chosen) - set(LAION_CATEGORIES))
    if unknown or not 1 <= num_sessions <= 30:
        raise PerceptError(
            f"categories is '{categories}' and num_sessions {num_sessions}: choose of"
            f" {', '.join(LAION_CATEGORIES)}, and from 1 to 30 sessions."
        )
    label = f"sub-{subj:02d}"
    betas = f"derivatives/glmsingle-tedana/{label}"
    patterns = []
    for number in range(1, num_sessions + 1):
        folder = f"{betas}/ses-{number:02d}/func"
        for what, ending in (("betas", r"statmap\.nii\.gz"), ("trials", r"trials\.tsv")):
            pattern = rf"{folder}/[^/]*[Ss]ingletrialBetas_{ending}"
            patterns.append(FilePattern(f"{what} of session {number}", folder, pattern))
    for name in ("R2mean", "Noiseceiling12rep"):
        pattern = rf"{betas}/[^/]*desc-{name}_statmap\.nii\.gz"
        patterns.append(FilePattern(f"map {name} of {label}", betas, pattern))
    for category in chosen:
        folder = f"derivatives/rois/{label}/{category}"
        pattern = rf"{folder}/[^/]*space-T1w[^/]*_mask\.nii\.gz"
        patterns.append(FilePattern(f"regions {category} of {label}", folder, pattern))
    stimuli = ("task-images_metadata.csv", "task-images_desc-captions.csv")
    return [*patterns, *(_list_path(f"stimuli/{name}") for name in stimuli)]


def _list_path(path: str) -> FilePattern:
    """One file, wherever it lies."""
    return FilePattern(path, path.rpartition("/")[0], re.escape(path))


def list_model(folders: tuple[str, ...], subj: int) -> list[FilePattern]:
    """What `from_pretrained` reads of these folders; of the top level where there are none."""
    if not folders:
        return [FilePattern("configuration and weights", "", MODEL_FILE)]
    return [
        FilePattern(f"configuration and weights in {folder}/", folder, f"{folder}/{MODEL_FILE}")
        for folder in folders
    ]


def list_configuration(subj: int) -> list[FilePattern]:
    """Configuration and tokenizers of a pipeline, without weights."""
    pattern = r"(?:[\w.-]+/)?[\w.-]+\.(?:json|txt)"
    return [FilePattern("configuration and tokenizers", "**", pattern)]


def list_address(name: str, subj: int) -> list[FilePattern]:
    """A single file of a plain address."""
    return [FilePattern(name, name, re.escape(name))]


def list_whole_model(subj: int) -> list[FilePattern]:
    """What `from_pretrained` reads of a whole repository."""
    return [FilePattern("configuration and weights", "**", rf"(?:[\w.-]+/)?{MODEL_FILE}")]
