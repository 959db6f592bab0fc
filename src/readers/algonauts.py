"""Algonauts 2023 (NSD on the fsaverage surface, one response an image), and the smaller subset of
it that a course handed out.

- <source>/subj01/training_split/training_fmri/{lh,rh}_training_fmri.npy (images, vertices), and
  training_images/ in the order of these rows: train-0001_nsd-00013.png (row from 1, then the
  image's NSD number from 0), or in the course's subset 0.png, 1.png, ... (the row; it is the
  image's id then, so that each subject of that subset needs a dataset of its own).
- roi_masks/{lh,rh}.{class}_challenge_space.npy (the course: {class}_space.npy), one label a vertex,
  and mapping_{class}.npy, a pickled dictionary from label to name. Every mapping that is there is
  read; label 0 is no region. Not every subject has every region.
- Features are the vertices of the left, then of the right hemisphere. voxels.parquet says for each:
  its place among all of them (vertex), left, right and one Boolean column a region.
- The responses have been z-scored within each session and averaged over an image's repeats by the
  organisers: one row an image, session 0, run -1, repeat 0. Nothing is normalised here again.
- The responses to the official test images (test_split) were withheld. So `test` says where the
  test set comes from: "official", test_split/test_fmri/{lh,rh}_test_fmri.npy of those who have it
  (layout as the organisers' own scripts write it; inferred); "shared1000", those training images
  that NSD showed to all subjects, which is the test set of most NSD work (982 of subject 1);
  "random", `test_images` training images drawn with `seed`; "auto" (default), the first that is
  possible of splits.csv beside the source, "official", "shared1000" and "random", the last with a
  warning. The protocol names what was done: algonauts-official, -shared982, -random300-seed42, or
  -own300 for splits.csv.
- fMRI_VAE.npy of the course's subset (latents of the images) is not read here: latents are made by
  our own autoencoder, unless notebook 02_train_roi_models is told of that file (latents_file).
- splits.csv, captions.parquet and labels.parquet are looked for in the subject's folder, then
  beside it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES
from src.data.layout import number_repeats
from src.files.foreign import read_errors
from src.readers.common import (
    check_rois,
    choose_validation,
    default_split_size,
    find_in_folders,
    list_files,
    load_image_table,
    load_images,
    load_mat,
    load_split_column,
    make_roi_columns,
    map_npy,
    parse_name_list,
    to_integers,
    to_mask,
)
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import PerceptError, progress, require_file

TERMS = (
    "The responses and images are NSD's: agree to the NSD Data Access Agreement"
    " (naturalscenesdataset.org) and the Algonauts 2023 form (algonauts.csail.mit.edu) first."
    " Neither responses nor images may be passed on."
)

REGIONS = {
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
    "streams": (
        "early",
        "midventral",
        "midlateral",
        "midparietal",
        "ventral",
        "lateral",
        "parietal",
    ),
}

HEMISPHERES = ("lh", "rh")

USUAL_VERTICES = (19004, 20544)  # (left, right) of subjects 1-5 and 7

OTHER_VERTICES = {6: (18978, 20220), 8: (18981, 20530)}  # by subject

TESTS = ("auto", "official", "shared1000", "random")

FLAVOURS = {"official": "{}_challenge_space.npy", "course": "{}_space.npy"}

SHARED_FILES = ("nsd_expdesign.mat", "shared1000.txt", "shared1000.npy")

NSD_IMAGES = 73000


@dataclass(frozen=True)
class SourceFolders:
    """Where a source lies: the folder of all subjects, and that of this subject."""

    root: Path
    subject: Path


@dataclass(frozen=True)
class SplitOptions:
    """How the test and validation images are chosen; see the arguments of `read`."""

    test: str
    test_images: int
    val_images: int
    seed: int


@dataclass(frozen=True)
class StimulusFiles:
    """Image files in the order of the rows of responses, and their ids."""

    paths: list[Path]
    ids: list[int]
    has_nsd_numbers: bool  # whether the ids are NSD numbers, else they are the rows


@dataclass(frozen=True)
class ResponsePart:
    """The responses and images of training_split or test_split.

    Attributes:
        left, right: (images, vertices) of each hemisphere, memory-mapped.
        stimuli: the images of the rows.
    """

    left: np.ndarray
    right: np.ndarray
    stimuli: StimulusFiles

    @property
    def widths(self) -> tuple[int, int]:
        """Vertices of the left and of the right hemisphere."""
        return self.left.shape[1], self.right.shape[1]


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    test: str = "auto",
    shared_path: str = "",
    test_images: int = 300,
    rois: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "refuse",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder that holds subj01/ ..., or the folder of this subject itself.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject, 1 to 8.
        test: where the test set comes from: auto, official, shared1000 or random (see the module).
        shared_path: for shared1000, NSD's nsd_expdesign.mat (its sharedix), or NSD numbers of
            images from 0 as text or .npy (integers, or a Boolean array of 73,000); by default
            nsd_expdesign.mat, shared1000.txt or shared1000.npy beside the source.
        test_images: number of test images, for random.
        rois: names of regions separated by commas, the union of which is kept; "" keeps all
            vertices.
        image_size: side of the stored images, 0 for the original 425.
        val_images: number of validation images, drawn from the training images; not used with
            splits.csv.
        seed: of the random choices of images.
        protocol: name of the protocol, by default what was done.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the responses where it differs from the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or another subject's files, ones that do not fit each
            other, unknown or absent regions, no test set.
    """
    if test not in TESTS:
        raise PerceptError(f"test={test!r} is not known: choose one of {', '.join(TESTS)}.")
    folders = _find_folders(Path(source), subj)
    parts = [_load_part(folders.subject, part, subj) for part in _part_names(folders, test)]
    voxels, columns = _select_vertices(folders.subject, parts[0].widths, rois)
    trials = _trials(parts)
    options = SplitOptions(test, test_images, val_images, seed)
    shared = _find_shared_images(folders, parts[0], shared_path)
    trials["split"], default_protocol = _split(trials, folders, shared, options)
    published = {
        "source": "Algonauts 2023",
        "units": "z-score",
        "protocol": protocol or default_protocol,
        "rois": rois or "all",
        "normalisation": "by the source: z-scored within each session, then averaged over repeats",
    }
    files = [path for part in parts for path in part.stimuli.paths]
    image_ids = trials["image"].to_numpy()
    places = (folders.root, folders.subject)
    recording = Recording(
        betas=RowBlocks((len(trials), len(voxels)), _response_blocks(parts, columns)),
        trials=trials,
        images=load_images(progress(files, f"images of subject {subj}"), "Image", image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=voxels,
        captions=load_image_table("captions", image_ids, *places),
        labels=load_image_table("labels", image_ids, *places),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


# ------------------------------------------------------------------------------------------- files
def _find_folders(source: Path, subj: int) -> SourceFolders:
    source, name = source.expanduser(), f"subj{subj:02d}"
    if (source / "training_split").is_dir():
        if re.fullmatch(r"subj\d+", source.name) and source.name != name:
            raise PerceptError(
                f"{source} is the folder of {source.name}, not of subject {subj}: give the folder"
                f" of {name}, or the one above it."
            )
        return SourceFolders(source.parent, source)
    what = f"subject {subj} of Algonauts 2023"
    folder = require_file(source / name, what, f"give the folder that holds {name}/")
    return SourceFolders(source, folder)


def _part_names(folders: SourceFolders, test: str) -> list[str]:
    """The parts to read: training, and test where the official test set is to be used."""
    test_files = list_files(folders.subject / "test_split" / "test_fmri", "*.npy")
    if test == "official" or (test == "auto" and test_files):
        return ["training", "test"]
    return ["training"]


def _load_part(folder: Path, part: str, subj: int) -> ResponsePart:
    place = folder / f"{part}_split"
    prefix = "train" if part == "training" else part
    stimuli = _find_stimuli(place / f"{part}_images", prefix)
    remedy = "fetch it again"
    if part == "test":
        remedy = (
            'the organisers withhold it from participants, choose test="shared1000" or "random"'
        )
    responses = []
    for side in HEMISPHERES:
        path = place / f"{part}_fmri" / f"{side}_{part}_fmri.npy"
        array = map_npy(require_file(path, f"{part} responses", remedy))
        _check_responses(array, path, len(stimuli.paths), place)
        responses.append(array)
    loaded = ResponsePart(responses[0], responses[1], stimuli)
    _check_vertices(loaded.widths, subj, place)
    return loaded


def _check_responses(array: np.ndarray, path: Path, n_images: int, place: Path) -> None:
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise PerceptError(
            f"{path} is {array.dtype} {array.shape}: it must be floating-point (images, vertices)."
        )
    if len(array) != n_images:
        hint = ", it seems to be transposed" if array.shape[1] == n_images else ""
        raise PerceptError(
            f"{path} has {len(array)} rows for {n_images} images{hint}: it must be (images,"
            f" vertices) of the images in {place}."
        )


def _check_vertices(widths: tuple[int, int], subj: int, place: Path) -> None:
    """Refuse the vertices of another subject.

    Numbers that no subject has (such as the mini world's) pass.
    """
    expected = OTHER_VERTICES.get(subj, USUAL_VERTICES)
    owners = {USUAL_VERTICES: "subjects 1-5 and 7"}
    owners |= {vertices: f"subject {number}" for number, vertices in OTHER_VERTICES.items()}
    if widths[::-1] in owners:
        raise PerceptError(
            f"The hemispheres in {place} are swapped: lh has {widths[0]} vertices, which is the"
            " number of rh. Rename the files."
        )
    if widths in owners and widths != expected:
        raise PerceptError(
            f"The responses in {place} have {widths[0]} + {widths[1]} vertices, which fits"
            f" {owners[widths]}, not subject {subj} ({expected[0]} + {expected[1]}): give this"
            " subject's own files."
        )


def _find_stimuli(folder: Path, prefix: str) -> StimulusFiles:
    """Image files in the order of the rows, with NSD numbers or rows as their ids."""
    require_file(folder, "images")
    files = {path.name: path for path in list_files(folder, "*.png")}
    official = re.compile(rf"{prefix}-(?P<row>\d+)_nsd-(?P<id>\d+)\.png")
    course = re.compile(r"(?P<id>(?P<row>\d+))\.png")
    for pattern, first in ((official, 1), (course, 0)):
        matches = [match for match in map(pattern.fullmatch, files) if match]
        if not matches or len(matches) < len(files):
            continue
        by_row = {int(match["row"]): match for match in matches}
        missing = sorted(set(range(first, first + len(files))) - set(by_row))
        if missing:
            raise PerceptError(
                f"Image {missing[0]} of {folder} is missing among its {len(files)} files,"
                f" numbered from {first}: fetch it again."
            )
        ordered = [by_row[row] for row in sorted(by_row)]
        return StimulusFiles(
            paths=[files[match[0]] for match in ordered],
            ids=[int(match["id"]) for match in ordered],
            has_nsd_numbers=pattern is official,
        )
    raise PerceptError(
        f"{folder} must hold images all named like {prefix}-0001_nsd-00013.png, or all like 0.png:"
        f" it has {sorted(files)[:3]}."
    )


def _response_blocks(parts: list[ResponsePart], columns: np.ndarray | None) -> Iterator[np.ndarray]:
    """Blocks (rows, vertices) of all parts, left beside right, of about 64 MB."""
    for part in parts:
        step = max(1, BLOCK_BYTES // (sum(part.widths) * part.left.itemsize))
        for start in progress(range(0, len(part.left), step), "responses"):
            rows = slice(start, start + step)
            block = np.concatenate([part.left[rows], part.right[rows]], axis=1)
            yield block if columns is None else block[:, columns]


# ------------------------------------------------------------------------------------------ tables
def _trials(parts: list[ResponsePart]) -> pd.DataFrame:
    """The table of trials, one row an image; split is train or test."""
    ids = np.concatenate([part.stimuli.ids for part in parts])
    numbers = np.arange(len(ids))
    trials = pd.DataFrame({"trial": numbers, "image": ids, "session": 0, "run": -1})
    sizes = [len(part.stimuli.ids) for part in parts]
    trials["split"] = np.repeat(["train", "test"][: len(parts)], sizes)
    trials["repeat"] = number_repeats(trials)
    return trials


def _select_vertices(
    folder: Path, widths: tuple[int, int], rois: str
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """The table of the selected vertices, and their places among all (None for all of them)."""
    vertices = np.arange(sum(widths))
    is_left = vertices < widths[0]
    sides = pd.DataFrame({"vertex": vertices, "left": is_left, "right": ~is_left})
    regions = _load_regions(folder / "roi_masks", widths)
    voxels = pd.concat([sides, make_roi_columns(regions, len(vertices))], axis=1)
    requested = list(dict.fromkeys(parse_name_list(rois)))
    if not requested:
        return voxels, None
    published = {name for names in REGIONS.values() for name in names}
    check_rois(requested, {*regions, *published}, str(folder))
    absent = [name for name in requested if name not in voxels]
    if len(absent) == len(requested):
        raise PerceptError(
            f"{folder} has no vertices of {', '.join(absent)}: choose other regions, or rois='' for"
            " all vertices."
        )
    if absent:
        warnings.warn(
            f"{folder.name} has no vertices of {', '.join(absent)}: the other regions are kept.",
            stacklevel=3,
        )
    in_region = voxels[[name for name in requested if name in voxels]].any(axis=1)
    columns = np.flatnonzero(in_region)
    return voxels.iloc[columns], columns


def _load_regions(folder: Path, widths: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks (vertices,) of all regions, empty ones included."""
    from src.safe_pickle import unpickle_npy  # here, as it imports torch

    masks: dict[str, np.ndarray] = {}
    for path in list_files(folder, "mapping_*.npy"):
        roi_class, names = path.stem.removeprefix("mapping_"), unpickle_npy(path)
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise PerceptError(f"{path} must hold a dictionary from label to name: fetch it again.")
        if not any(_find_labels(folder, side, roi_class) for side in HEMISPHERES):
            continue  # a mapping alone: this subject has none of these regions
        halves = [
            _load_labels(folder, side, roi_class, width)
            for side, width in zip(HEMISPHERES, widths, strict=True)
        ]
        labels = np.concatenate(halves)
        masks.update({name: labels == label for label, name in names.items() if label != 0})
    return masks


def _find_labels(folder: Path, side: str, roi_class: str) -> Path | None:
    names = (pattern.format(f"{side}.{roi_class}") for pattern in FLAVOURS.values())
    return find_in_folders(names, folder)


def _load_labels(folder: Path, side: str, roi_class: str, width: int) -> np.ndarray:
    """Labels (vertices,) of one hemisphere."""
    path = _find_labels(folder, side, roi_class)
    if path is None:
        official = folder / FLAVOURS["official"].format(f"{side}.{roi_class}")
        path = require_file(official, "labels of the vertices")
    labels = map_npy(path)
    if labels.shape != (width,):
        raise PerceptError(
            f"{path} has shape {labels.shape}, the responses have {width} vertices there: take the"
            " masks of this very subject."
        )
    return to_integers(labels, f"A label in {path}")


# ------------------------------------------------------------------------------------------ splits
def _find_shared_images(
    folders: SourceFolders, training: ResponsePart, shared_path: str
) -> Path | None:
    """The list of NSD's shared images, or None where there is none or the ids are rows."""
    if not training.stimuli.has_nsd_numbers:
        return None
    if shared_path:
        return Path(shared_path).expanduser()
    return find_in_folders(SHARED_FILES, folders.root, folders.subject)


def _split(
    trials: pd.DataFrame, folders: SourceFolders, shared: Path | None, options: SplitOptions
) -> tuple[pd.Series, str]:
    """The column `split`, and the name of the protocol."""
    if options.test == "auto":
        for folder in (folders.subject, folders.root):
            split = load_split_column(folder, trials)
            if split is not None:
                return split, f"algonauts-own{_count_test(split)}"
    if _count_test(trials["split"]):
        split, protocol = trials["split"], "algonauts-official"
    elif options.test == "shared1000" or (options.test == "auto" and shared):
        split = _shared_test_split(trials, folders, shared)
        protocol = f"algonauts-shared{_count_test(split)}"
    else:
        split, protocol = _random_test_split(trials, options)
    trials = trials.assign(split=split)
    return choose_validation(trials, options.val_images, options.seed), protocol


def _count_test(split: pd.Series) -> int:
    return int((split == "test").sum())


def _shared_test_split(
    trials: pd.DataFrame, folders: SourceFolders, shared: Path | None
) -> pd.Series:
    if shared is None:
        raise PerceptError(
            'test="shared1000" needs images named by their NSD numbers, and NSD\'s'
            f" nsd_expdesign.mat as shared_path or in {folders.root}: give it, or choose"
            ' test="random".'
        )
    split = trials["split"].mask(trials["image"].isin(_load_shared_ids(shared)), "test")
    if not _count_test(split):
        raise PerceptError(
            f"None of the {len(trials)} training images is among the shared images of {shared}:"
            " these must be NSD numbers from 0."
        )
    return split


def _random_test_split(trials: pd.DataFrame, options: SplitOptions) -> tuple[pd.Series, str]:
    if options.test == "auto":
        warnings.warn(
            "There are no test responses and no list of NSD's shared images: the test images"
            " are drawn at random.",
            stacklevel=4,
        )
    n_test = default_split_size(options.test_images, len(trials), "test")
    if not 1 <= n_test <= len(trials) - 2:
        raise PerceptError(
            f"test_images is {n_test}, but there are {len(trials)} images: choose from 1"
            f" to {max(1, len(trials) - 2)}."
        )
    split = choose_validation(trials, n_test, options.seed).replace("val", "test")
    return split, f"algonauts-random{n_test}-seed{options.seed}"


def _load_shared_ids(path: Path) -> np.ndarray:
    """NSD numbers, from 0, of the images that all subjects were to see."""
    remedy = "give nsd_expdesign.mat, or their numbers as text or .npy"
    require_file(path, "the list of NSD's shared images", remedy)
    if path.suffix == ".mat":
        shared = load_mat(path, ["sharedix"], remedy)["sharedix"]
        return to_integers(shared.ravel(), f"sharedix of {path}") - 1  # MATLAB counts from 1
    with read_errors(path, remedy):
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.loadtxt(path, dtype=np.int64, ndmin=1)
    if values.dtype == bool or values.shape == (NSD_IMAGES,):
        return np.flatnonzero(to_mask(values, str(path)))
    return to_integers(values.ravel(), str(path))
