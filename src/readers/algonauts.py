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
import scipy.io

from src.data.files import BLOCK_BYTES, disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_subject,
)
from src.readers.common import (
    check_rois,
    choose_validation,
    copy_tables,
    default_split_size,
    load_images,
    load_split_column,
    make_roi_columns,
)
from src.safe_pickle import unpickle_npy
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

MOST_SUBJECTS = (19004, 20544)  # vertices (left, right) of subjects 1-5 and 7

VERTICES = {6: (18978, 20220), 8: (18981, 20530)}

TESTS = ("auto", "official", "shared1000", "random")

FLAVOURS = {"official": "{}_challenge_space.npy", "course": "{}_space.npy"}

SHARED_FILES = ("nsd_expdesign.mat", "shared1000.txt", "shared1000.npy")

NSD_IMAGES = 73000


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
    root, folder = _folders(Path(source), subj)
    held_out = test == "official" or (
        test == "auto" and any((folder / "test_split" / "test_fmri").glob("*.npy"))
    )
    parts = [_part(folder, part, subj) for part in ("training", "test")[: 1 + held_out]]
    voxels, kept = _voxels(folder, parts[0].widths, rois)
    trials = _trials(parts)
    shared = Path(shared_path).expanduser() if shared_path else _find(SHARED_FILES, root, folder)
    trials["split"], made = _split(
        trials,
        (folder, root),
        test,
        shared if parts[0].named else None,
        test_images,
        val_images,
        seed,
    )
    check_trials(trials)
    about: dict[str, Any] = {
        "source": "Algonauts 2023",
        "units": "z-score",
        "protocol": protocol or made,
        "rois": rois or "all",
        "normalisation": "by the source: z-scored within each session, then averaged over repeats",
        **(attributes or {}),
    }
    target, ids = dataset_folder(dataset), trials["image"].to_numpy()
    target.mkdir(parents=True, exist_ok=True)
    with disk_errors(target):
        files = progress(
            [file for part in parts for file in part.files], f"images of subject {subj}"
        )
        write_images(target / "images.h5", load_images(files, "Image", image_size), ids)
        for place in (root, folder):
            copy_tables(place, target, ids)
        return write_subject(
            subject_folder(dataset, subj), _blocks(parts, kept), trials, voxels, about
        )


def _folders(source: Path, subj: int) -> tuple[Path, Path]:
    """The folder that holds all subjects, and that of this subject."""
    source, name = source.expanduser(), f"subj{subj:02d}"
    if (source / "training_split").is_dir():
        if re.fullmatch(r"subj\d+", source.name) and source.name != name:
            raise PerceptError(
                f"{source} is the folder of {source.name}, not of subject {subj}: give the folder"
                f" of {name}, or the one above it."
            )
        return source.parent, source
    folder = require_file(
        source / name, f"subject {subj} of Algonauts 2023", f"give the folder that holds {name}/"
    )
    return source, folder


@dataclass(frozen=True)
class _Part:
    """Responses and images of training_split or test_split: memory maps (images, vertices) left and
    right, image files and ids in their order.
    """

    responses: tuple[np.ndarray, np.ndarray]
    files: list[Path]
    ids: list[int]
    named: bool  # by NSD numbers

    @property
    def widths(self) -> tuple[int, int]:
        return self.responses[0].shape[1], self.responses[1].shape[1]


def _part(folder: Path, part: str, subj: int) -> _Part:
    place = folder / f"{part}_split"
    files, ids, named = _image_files(
        place / f"{part}_images", "train" if part == "training" else part
    )
    remedy = (
        "fetch it again"
        if part == "training"
        else 'the organisers withhold it from participants, choose test="shared1000" or "random"'
    )
    maps = []
    for side in HEMISPHERES:
        path = require_file(
            place / f"{part}_fmri" / f"{side}_{part}_fmri.npy", f"{part} responses", remedy
        )
        array = _array(path)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
            raise PerceptError(
                f"{path} is {array.dtype} {array.shape}: it must be floating-point (images,"
                " vertices)."
            )
        if len(array) != len(files):
            turned = ", it seems to be transposed" if array.shape[1] == len(files) else ""
            raise PerceptError(
                f"{path} has {len(array)} rows for {len(files)} images{turned}: it must be (images,"
                f" vertices) of the images in {place}."
            )
        maps.append(array)
    found = _Part((maps[0], maps[1]), files, ids, named)
    _check_vertices(found.widths, subj, place)
    return found


def _array(path: Path) -> np.ndarray:
    """Memory-map an .npy file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PerceptError(f"{path} is damaged or cut off ({error}): fetch it again.") from error


def _check_vertices(widths: tuple[int, int], subj: int, place: Path) -> None:
    """Refuse the vertices of another subject; numbers that fit none (such as the mini world's)
    pass.
    """
    expected = VERTICES.get(subj, MOST_SUBJECTS)
    fits = {
        MOST_SUBJECTS: "subjects 1-5 and 7",
        **{pair: f"subject {number}" for number, pair in VERTICES.items()},
    }
    if widths[::-1] in fits:
        raise PerceptError(
            f"The hemispheres in {place} are swapped: lh has {widths[0]} vertices, which is the"
            " number of rh. Rename the files."
        )
    if widths in fits and widths != expected:
        raise PerceptError(
            f"The responses in {place} have {widths[0]} + {widths[1]} vertices, which fits"
            f" {fits[widths]}, not subject {subj} ({expected[0]} + {expected[1]}): give this"
            " subject's own files."
        )


def _image_files(folder: Path, prefix: str) -> tuple[list[Path], list[int], bool]:
    """Image files in the order of the rows, their ids, and whether these are NSD numbers (else the
    rows).
    """
    require_file(folder, "images")
    official, course = re.compile(rf"{prefix}-(\d+)_nsd-(\d+)\.png"), re.compile(r"(\d+)\.png")
    files = {path.name: path for path in folder.glob("*.png")}
    for pattern, first in ((official, 1), (course, 0)):
        matches = [m for m in map(pattern.fullmatch, files) if m]
        if matches and len(matches) == len(files):
            by_number = {int(m[1]): m for m in matches}
            missing = sorted(set(range(first, first + len(files))) - set(by_number))
            if missing:
                raise PerceptError(
                    f"Image {missing[0]} of {folder} is missing among its {len(files)} files,"
                    f" numbered from {first}: fetch it again."
                )
            ordered = [by_number[number] for number in sorted(by_number)]
            return (
                [files[m[0]] for m in ordered],
                [int(m[pattern.groups]) for m in ordered],
                pattern is official,
            )
    raise PerceptError(
        f"{folder} must hold images all named like {prefix}-0001_nsd-00013.png, or all like 0.png:"
        f" it has {sorted(files)[:3]}."
    )


def _trials(parts: list[_Part]) -> pd.DataFrame:
    ids = np.concatenate([part.ids for part in parts])
    trials = pd.DataFrame({"trial": np.arange(len(ids)), "image": ids, "session": 0, "run": -1})
    trials["split"] = np.repeat(["train", "test"][: len(parts)], [len(part.ids) for part in parts])
    trials["repeat"] = number_repeats(trials)
    return trials


def _blocks(parts: list[_Part], kept: np.ndarray | None) -> Iterator[np.ndarray]:
    """Blocks (rows, vertices) of all parts, left beside right, of about 64 MB."""
    for part in parts:
        left, right = part.responses
        step = max(1, BLOCK_BYTES // (sum(part.widths) * left.itemsize))
        for start in progress(range(0, len(left), step), "responses"):
            block = np.concatenate(
                [left[start : start + step], right[start : start + step]], axis=1
            )
            yield block if kept is None else block[:, kept]


def _voxels(
    folder: Path, widths: tuple[int, int], rois: str
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """The table of the vertices kept, and where they are among all of them (None for all)."""
    n_left, n_vertices = widths[0], sum(widths)
    sides = pd.DataFrame(
        {
            "vertex": np.arange(n_vertices),
            "left": np.arange(n_vertices) < n_left,
            "right": np.arange(n_vertices) >= n_left,
        }
    )
    regions = _regions(folder / "roi_masks", widths)
    voxels = pd.concat([sides, make_roi_columns(regions, n_vertices)], axis=1)
    wanted = list(dict.fromkeys(name.strip() for name in rois.split(",") if name.strip()))
    if not wanted:
        return voxels, None
    check_rois(
        wanted, {*regions, *(name for names in REGIONS.values() for name in names)}, str(folder)
    )
    absent = [name for name in wanted if name not in voxels]
    if len(absent) == len(wanted):
        raise PerceptError(
            f"{folder} has no vertices of {', '.join(absent)}: choose other regions, or rois='' for"
            " all vertices."
        )
    if absent:
        warnings.warn(
            f"{folder.name} has no vertices of {', '.join(absent)}: the other regions are kept.",
            stacklevel=3,
        )
    kept = np.flatnonzero(voxels[[name for name in wanted if name in voxels]].any(axis=1))
    return voxels.iloc[kept], kept


def _regions(folder: Path, widths: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks (vertices,) of all regions, empty ones included."""
    masks = {}
    for path in sorted(folder.glob("mapping_*.npy")):
        kind, names = path.stem.removeprefix("mapping_"), unpickle_npy(path)
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise PerceptError(f"{path} must hold a dictionary from label to name: fetch it again.")
        if not any(_labels_files(folder, f"{side}.{kind}") for side in HEMISPHERES):
            continue  # a mapping alone: this subject has none of these regions
        labels = np.concatenate(
            [
                _labels(folder, f"{side}.{kind}", width)
                for side, width in zip(HEMISPHERES, widths, strict=True)
            ]
        )
        masks.update({name: labels == label for label, name in names.items() if label != 0})
    return masks


def _labels_files(folder: Path, name: str) -> list[Path]:
    return [
        path for pattern in FLAVOURS.values() if (path := folder / pattern.format(name)).exists()
    ]


def _labels(folder: Path, name: str, width: int) -> np.ndarray:
    """Labels (vertices,) of one hemisphere."""
    found = _labels_files(folder, name)
    path = (
        found[0]
        if found
        else require_file(folder / FLAVOURS["official"].format(name), "labels of the vertices")
    )
    labels = _array(path)
    if labels.shape != (width,):
        raise PerceptError(
            f"{path} has shape {labels.shape}, the responses have {width} vertices there: take the"
            " masks of this very subject."
        )
    return labels


def _find(names: tuple[str, ...], *folders: Path) -> Path | None:
    return next(
        (folder / name for folder in folders for name in names if (folder / name).exists()), None
    )


def _split(
    trials: pd.DataFrame,
    places: tuple[Path, Path],
    test: str,
    shared: Path | None,
    test_images: int,
    val_images: int,
    seed: int,
) -> tuple[pd.Series, str]:
    """The column `split`, and the name of the protocol."""
    for place in places if test == "auto" else ():
        if (own := load_split_column(place, trials)) is not None:
            return own, f"algonauts-own{(own == 'test').sum()}"
    if "test" in set(trials["split"]):
        return choose_validation(trials, val_images, seed), "algonauts-official"
    if test == "shared1000" or (test == "auto" and shared):
        if shared is None:
            raise PerceptError(
                'test="shared1000" needs images named by their NSD numbers, and NSD\'s'
                f" nsd_expdesign.mat as shared_path or in {places[1]}: give it, or choose"
                ' test="random".'
            )
        made = trials["split"].mask(trials["image"].isin(_shared_ids(shared)), "test")
        if "test" not in set(made):
            raise PerceptError(
                f"None of the {len(trials)} training images is among the shared images of {shared}:"
                " these must be NSD numbers from 0."
            )
        name = f"algonauts-shared{(made == 'test').sum()}"
    else:
        if test == "auto":
            warnings.warn(
                "There are no test responses and no list of NSD's shared images: the test images"
                " are drawn at random.",
                stacklevel=3,
            )
        test_images = default_split_size(test_images, len(trials), "test")
        if not 1 <= test_images <= len(trials) - 2:
            raise PerceptError(
                f"test_images is {test_images}, but there are {len(trials)} images: choose from 1"
                f" to {max(1, len(trials) - 2)}."
            )
        made, name = (
            choose_validation(trials, test_images, seed).replace("val", "test"),
            f"algonauts-random{test_images}-seed{seed}",
        )
    return choose_validation(trials.assign(split=made), val_images, seed), name


def _shared_ids(path: Path) -> np.ndarray:
    """NSD numbers, from 0, of the images that all subjects were to see."""
    require_file(
        path,
        "the list of NSD's shared images",
        "give nsd_expdesign.mat, or their numbers as text or .npy",
    )
    try:
        if path.suffix == ".mat":
            return (
                scipy.io.loadmat(path, variable_names=["sharedix"])["sharedix"]
                .ravel()
                .astype(np.int64)
                - 1
            )  # MATLAB counts from 1
        values = (
            np.load(path, allow_pickle=False)
            if path.suffix == ".npy"
            else np.loadtxt(path, dtype=np.int64, ndmin=1)
        )
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise PerceptError(
            f"The shared images cannot be read from {path} ({error}): give nsd_expdesign.mat, or"
            " numbers as text or .npy."
        ) from error
    return (
        np.flatnonzero(values)
        if values.dtype == bool or values.shape == (NSD_IMAGES,)
        else values.ravel().astype(np.int64)
    )
