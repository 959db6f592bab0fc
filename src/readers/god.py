"""Generic Object Decoding (Horikawa and Kamitani 2017, doi 10.1038/ncomms15037) and Deep Image
Reconstruction, in bdpy's HDF5 (BData).

- Subject1.h5 to Subject5.h5 (figshare 7387130): `dataset` (samples, columns) holds voxels and
  labels; `metadata/key`, `metadata/description` and `metadata/value` (keys, columns; 1 marks the
  columns of a key) say which is which; `vmap/<key>/<value>` may name the values of a label. Older
  files write dataSet and metaData. Taken: VoxelData, ROI_*, voxel_x, voxel_y, voxel_z, DataType (1
  training, 2 test, 3 imagery), Session, Run.
- The image of a row, from the first of these that the file has: stimulus_id or Label
  (1443537.022563 is n01443537_22563), stimulus_name through vmap, or image_index through
  stimulus_ImageNetTraining.tsv and stimulus_ImageNetTest.tsv (of the authors' repository) below the
  source. Which of these the present files of figshare hold is inferred from code that reads them.
- The image id is the number of the category times 10**6 plus that of the image, so 1443537022563;
  an id below 10**6 is image n00000000_<id>.
- Images: n01443537_22563.JPEG (or .jpg, .png) anywhere below the source; the authors give them on
  request. Else MinD-Vis's images_256.npz with the lists beside it (inferred from its code: row i of
  train_images is line i of imagenet_training_label.csv or imageID_training.csv; values from 0 to
  1).
- Training images are shown once, test images 35 times. Imagery is left out, or kept as excluded
  trials; an imagery row that names a category alone takes the test image of this category, and
  its repeats are numbered after those seen.
- Where there is no Subject<n>.h5: sub-0n_perceptionNaturalImage{Training,Test}_original_VC.h5
  (figshare 7033577; subjects 1 to 3; 5 and 24 repeats), whose sessions and runs follow one another.
- Training and test are sessions of their own: a z-score by session finds no training trials in the
  latter, so normalise all sessions together (by_session=False), as the authors do. Nothing is
  z-scored here. Without a column Session all trials are session 0.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import number_repeats
from src.files.foreign import (
    check_expansion,
    load_csv,
    parse_npy_header,
    read_errors,
    walk_files,
)
from src.readers.bdata import BData
from src.readers.common import (
    center_crop_resize,
    check_rois,
    count_test_images,
    load_image_table,
    load_images,
    make_roi_columns,
    make_split_column,
    parse_name_list,
    to_integers,
)
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import PerceptError, progress, require_file

TERMS = (
    "The fMRI data of Generic Object Decoding and Deep Image Reconstruction (Kamitani Lab) are"
    " public on figshare (7387130, 7033577); cite the papers. The images are ImageNet's: ask the"
    " authors for them (forms.gle/ujvA34948Xg49jdn9), accept ImageNet's terms, and do not"
    " redistribute them."
)

TRAINING, TEST, IMAGERY = 1, 2, 3  # values of DataType

SPLITS = {TRAINING: "train", TEST: "test", IMAGERY: "exclude"}

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}

UNIT = 10**6  # one category in image ids

DEEP = "sub-{:02d}_perceptionNaturalImage{}_original_VC.h5"  # Deep Image Reconstruction

REPACKED = "images_256.npz"  # the images as MinD-Vis publishes them

LISTS = {
    "train_images": ("imagenet_training_label.csv", "imageID_training.csv"),
    "test_images": ("imagenet_testing_label.csv", "imageID_test.csv"),
}

TABLES = {
    TRAINING: "stimulus_ImageNetTraining.tsv",
    TEST: "stimulus_ImageNetTest.tsv",
    IMAGERY: "stimulus_ImageNetTest.tsv",
}


@dataclass(frozen=True)
class SourceFiles:
    """The folder of a source, and all files below it by name."""

    root: Path
    by_name: dict[str, Path]


@dataclass(frozen=True)
class StimulusImages:
    """Images uint8 (1, height, width, 3) one after the other, and their ids in this order."""

    ids: np.ndarray
    blocks: Iterator[np.ndarray]


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    rois: str = "",
    imagery: bool = False,
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "refuse",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder below which Subject<n>.h5 and the images lie.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 5.
        rois: regions whose voxels are taken, separated by commas (V1, LOC, ...); "" for VC, the
            whole visual cortex (all voxels where there is no VC).
        imagery: keep the imagery trials, as split exclude.
        image_size: longest side of the stored images, 0 as they are.
        val_images: training images chosen for validation.
        seed: of that choice.
        protocol: name of the protocol, by default god-<number of test images>, or
            deeprecon-<number>.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the betas where they are not the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, truncated or unfitting file, an unknown region or image, or
            data that `store_recording` refuses.
    """
    files = _list_files(require_file(source, "the folder of Generic Object Decoding"))
    parts = _open_parts(files, subj)
    columns, voxels = _select_voxels(parts, rois)
    samples = _load_samples(parts, files)
    is_used = samples["data_type"].ne(IMAGERY) | imagery
    trials = _trials(samples, is_used)
    split = make_split_column(files.root, trials, val_images, seed)
    trials["split"] = split.where(trials["data_type"].ne(IMAGERY), "exclude")
    prefix = "deeprecon" if len(parts) > 1 else "god"
    published = {
        "source": " and ".join(part.path.name for part in parts),
        "units": "mean BOLD amplitude of a trial",
        "normalisation": "within runs, by the source (inferred)",
        "protocol": protocol or f"{prefix}-{count_test_images(trials)}",
        "rois": rois or "VC",
    }
    image_ids = np.unique(trials["image"])
    images = _open_images(files, image_ids, image_size)
    labels = load_image_table("labels", image_ids, files.root)
    recording = Recording(
        betas=RowBlocks((len(trials), len(columns)), _beta_blocks(parts, columns, is_used)),
        trials=trials,
        images=images.blocks,
        image_ids=images.ids,
        attributes={**published, **(attributes or {})},
        voxels=voxels,
        captions=load_image_table("captions", image_ids, files.root),
        labels=_name_labels(image_ids) if labels is None else labels,
    )
    return store_recording(recording, dataset, subj, bad_voxels)


# ------------------------------------------------------------------------------------------- files
def _list_files(source: Path) -> SourceFiles:
    """All files below the source's folder; of those of one name, the least deep."""
    root = source if source.is_dir() else source.parent
    paths = sorted(walk_files(root), key=lambda path: (-len(path.parts), path))
    return SourceFiles(root, {path.name: path for path in paths})


def _open_parts(files: SourceFiles, subj: int) -> list[BData]:
    """The files of a subject, in the order of their trials."""
    if f"Subject{subj}.h5" in files.by_name:
        return [BData(files.by_name[f"Subject{subj}.h5"])]
    names = {TRAINING: DEEP.format(subj, "Training"), TEST: DEEP.format(subj, "Test")}
    absent = [name for name in names.values() if name not in files.by_name]
    if len(absent) == 2:
        raise PerceptError(
            f"{files.root} holds neither Subject{subj}.h5 nor {absent[0]}: fetch it (GOD has the"
            " subjects 1 to 5, Deep Image Reconstruction 1 to 3)."
        )
    if absent:
        raise PerceptError(
            f"{absent[0]} is missing in {files.root}: training and test of Deep Image"
            " Reconstruction are two files, fetch both."
        )
    return [BData(files.by_name[name], data_type) for data_type, name in names.items()]


def _beta_blocks(
    parts: list[BData], columns: np.ndarray, is_used: pd.Series
) -> Iterator[np.ndarray]:
    for number, part in enumerate(parts):
        yield from part.iterate_blocks(columns, is_used.loc[number].to_numpy())


# ------------------------------------------------------------------------------------------ voxels
def _select_voxels(parts: list[BData], rois: str) -> tuple[np.ndarray, pd.DataFrame]:
    """Columns of the chosen voxels (voxels,), and their table: regions, x, y, z."""
    first = parts[0]
    if "VoxelData" not in first.metadata:
        raise PerceptError(
            f"{first.path} has no key VoxelData: it has {', '.join(sorted(first.metadata))}."
        )
    is_voxel = first.find_columns("VoxelData")
    roi_keys = [key for key in first.metadata if key.startswith("ROI_")]
    regions = {key.removeprefix("ROI_"): first.find_columns(key) for key in roi_keys}
    chosen = [name.removeprefix("ROI_") for name in parse_name_list(rois)]
    check_rois(chosen, regions, str(first.path))
    if not chosen and "VC" in regions:
        chosen = ["VC"]
    in_region = is_voxel
    if chosen:
        in_region = np.logical_or.reduce([regions[region] for region in chosen])
    columns = np.flatnonzero(in_region & is_voxel)
    if not len(columns):
        raise PerceptError(
            f"{first.path} has no voxels of {','.join(chosen) or 'VoxelData'}: choose other rois."
        )
    axes = [axis for axis in "xyz" if f"voxel_{axis}" in first.metadata]
    _check_same_voxels(parts, ["VoxelData", *(f"voxel_{axis}" for axis in axes)])
    members = {region: member[columns] for region, member in regions.items()}
    places = {axis: first.metadata[f"voxel_{axis}"][columns] for axis in axes}
    return columns, make_roi_columns(members, len(columns)).assign(**places)


def _check_same_voxels(parts: list[BData], keys: list[str]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1] or not part.has_same_metadata(first, keys):
            raise PerceptError(
                f"{part.path} and {first.path} have other voxels: take the files of one subject."
            )


# ------------------------------------------------------------------------------------------ trials
def _load_samples(parts: list[BData], files: SourceFiles) -> pd.DataFrame:
    """Columns data_type, image, session and run (from 0), indexed by part and row of its file."""
    tables = [_load_samples_of_part(part, files) for part in parts]
    samples = pd.concat(tables, keys=range(len(parts)), names=["part", "row"])
    n_sessions = samples.groupby("part")["session"].max().add(1)
    first_session = n_sessions.cumsum().shift(fill_value=0)  # sessions of the parts before
    part_of_sample = samples.index.get_level_values("part")
    samples["session"] += part_of_sample.map(first_session.to_dict())
    return samples


def _load_samples_of_part(part: BData, files: SourceFiles) -> pd.DataFrame:
    stored = part.load_label("DataType")
    if stored is None:
        stored = np.full(part.shape[0], float(part.data_type))
    invalid = ~np.isin(stored, list(SPLITS))
    if invalid.any():
        raise PerceptError(
            f"Sample {np.flatnonzero(invalid)[0]} of {part.path} has DataType"
            f" {stored[invalid][0]:g}: it must be 1 (training), 2 (test) or 3 (imagery)."
        )
    data_type = stored.astype(int)
    images = _load_image_ids(part, data_type, files)
    samples = pd.DataFrame({"data_type": data_type, "image": images})
    session, run = part.load_label("Session"), part.load_label("Run")
    if session is None:
        warnings.warn(
            f"{part.path.name} does not tell sessions: all its trials are taken as one, 0.",
            stacklevel=5,
        )
        session = np.zeros(len(samples))
    if np.isnan(session).any():
        raise PerceptError(
            f"Sample {np.flatnonzero(np.isnan(session))[0]} of {part.path} has no Session: fetch"
            " the file again."
        )
    samples["session"] = np.unique(session, return_inverse=True)[1]
    if run is None:
        return samples.assign(run=-1)
    # Run may go on counting from one session to the next: its rank within the session is taken
    rank = pd.Series(run).groupby(samples["session"]).rank("dense")
    return samples.assign(run=rank.fillna(0).astype(int) - 1)


def _trials(samples: pd.DataFrame, is_used: pd.Series) -> pd.DataFrame:
    """The table of trials from the samples that are used, with their DataType as data_type."""
    numbered = samples.assign(trial=np.arange(len(samples)), split=samples["data_type"].map(SPLITS))
    trials = numbered[is_used].reset_index(drop=True)
    is_seen = trials["data_type"].ne(IMAGERY)
    trials["image"] = _resolve_imagined(trials["image"], is_seen)
    unresolved = trials.loc[trials["image"] < 0, "trial"]
    if len(unresolved):
        raise PerceptError(
            f"Trial {unresolved.iloc[0]} imagines a category of which no image was tested: read"
            " with imagery=False."
        )
    # repeats of imagery come after those that were seen
    order = trials["trial"] + np.where(is_seen, 0, len(samples))
    trials["repeat"] = number_repeats(trials.assign(trial=order))
    return trials


def _resolve_imagined(image: pd.Series, is_seen: pd.Series) -> pd.Series:
    """Ids in which an imagined category (image number 0) is the one test image of this category.

    -1 where there is none.
    """
    is_category = ~is_seen & image.mod(UNIT).eq(0)
    image_of_category = {int(seen) // UNIT: int(seen) for seen in image[is_seen]}
    resolved = (image // UNIT).map(lambda category: image_of_category.get(category, -1))
    return image.mask(is_category, resolved)


# --------------------------------------------------------------------------------------- image ids
def parse_image_name(name: str) -> int:
    """The id of an image by its file name, n01443537_22563.JPEG -> 1443537022563.

    Raises:
        PerceptError: if it is no such name.
    """
    match = re.fullmatch(r"n(\d{8})_(\d{1,6})", Path(name).stem)
    if not match:
        raise PerceptError(
            f"{name} is no name of an ImageNet image: it must be like n01443537_22563."
        )
    return int(match[1]) * UNIT + int(match[2])


def format_image_name(image: int) -> str:
    """The file name, without ending, of an image by its id."""
    return f"n{image // UNIT:08d}_{image % UNIT}"


def _load_image_ids(part: BData, data_type: np.ndarray, files: SourceFiles) -> np.ndarray:
    """Image of each sample, int64 (samples,).

    The number of the image is 0 where an imagery row names a category alone.
    """
    for key in ("stimulus_id", "Label"):
        numbers = part.load_label(key)
        if numbers is None:
            continue
        if numbers.dtype.itemsize < 8:
            raise PerceptError(
                f"{part.path} is stored as {numbers.dtype}, which cannot hold {key} such as"
                " 1443537.022563: fetch it again, or save it as float64."
            )
        return convert_stimulus_ids(numbers, data_type, f"{key} of {part.path}")
    codes = part.load_label("stimulus_name")
    if codes is not None and part.stimulus_names:
        ids = {value: _parse_stimulus_name(name) for value, name in part.stimulus_names.items()}
        return _look_up_ids(codes, ids, data_type, f"stimulus_name of {part.path}")
    index = part.load_label("image_index")
    if index is None:
        raise PerceptError(
            f"{part.path} names no images (stimulus_id, Label, stimulus_name or image_index): it"
            f" has {', '.join(sorted(part.metadata))}."
        )
    images = np.zeros(len(index), np.int64)
    for number in np.unique(data_type):
        rows = data_type == number
        ids = _load_index_table(files, part, number)
        owner = f"image_index of {part.path}"
        images[rows] = _look_up_ids(index[rows], ids, data_type[rows], owner)
    return images


def _parse_stimulus_name(name: str) -> int:
    if re.fullmatch(r"n\d{8}", name):
        return UNIT * int(name[1:])  # a category alone
    return parse_image_name(name)


def _load_index_table(files: SourceFiles, part: BData, data_type: int) -> dict[float, int]:
    """Image of each image_index, from the authors' table."""
    name = TABLES[data_type]
    path = require_file(
        files.by_name.get(name, part.path.parent / name),
        "the images by image_index",
        "fetch it from the authors' repository, folder data",
    )
    # columns: name, stimulus_id, index of the category, index of the image
    table = load_csv(path, range(4), sep="\t", header=None, dtype={0: str})
    index = to_integers(table[3].to_numpy(), f"The fourth column of {path}").astype(float)
    images = table[0].astype(str).map(parse_image_name)
    return dict(zip(index, images, strict=True))


def _look_up_ids(
    values: np.ndarray, ids: dict[float, int], data_type: np.ndarray, owner: str
) -> np.ndarray:
    images = np.array([ids.get(value, -1) for value in values.tolist()], np.int64)
    unknown = (images < 0) & (data_type != IMAGERY)
    if unknown.any():
        raise PerceptError(
            f"Sample {np.flatnonzero(unknown)[0]} has {values[unknown][0]:g} as {owner}, which no"
            " table names: fetch the files again."
        )
    return np.where(images < 0, 0, images)


def convert_stimulus_ids(numbers: np.ndarray, data_type: np.ndarray, owner: str) -> np.ndarray:
    """Convert numbers category.image with six decimals to image ids.

    The decimals of a float64 are good to about 1e-9, so rounding is exact.

    Args:
        numbers: float64 (samples,).
        data_type: (samples,) 1 training, 2 test, 3 imagery, which may name a category alone.
        owner: what has these numbers, for errors.

    Raises:
        PerceptError: for a number that is no such id.
    """
    scaled = np.nan_to_num(numbers * UNIT)
    images = np.rint(scaled).astype(np.int64)
    lacks_image = (images % UNIT == 0) & (data_type != IMAGERY)
    invalid = (np.abs(scaled - images) > 0.05) | (images < 0) | lacks_image
    if invalid.any():
        sample = np.flatnonzero(invalid)[0]
        raise PerceptError(
            f"Sample {sample} has {float(numbers[sample])!r} as {owner}: it must be like"
            " 1443537.022563, a category and an image with six decimals in float64."
        )
    return images


# ------------------------------------------------------------------------------------------ images
def _open_images(files: SourceFiles, image_ids: np.ndarray, image_size: int) -> StimulusImages:
    """The images from their files, or where these are missing from MinD-Vis's images_256.npz."""
    suffixed = [path for path in files.by_name.values() if path.suffix.lower() in IMAGE_SUFFIXES]
    by_stem = {path.stem: path for path in suffixed}
    missing = [image for image in image_ids if format_image_name(image) not in by_stem]
    if missing and REPACKED in files.by_name:
        return _open_repacked(files, image_ids, image_size)
    if missing:
        raise PerceptError(
            f"Image {format_image_name(missing[0])}.JPEG ({len(missing)} of {len(image_ids)}) is"
            f" missing below {files.root}: ask the authors for the images (see TERMS), or put"
            " MinD-Vis's images_256.npz and its lists there."
        )
    numbered = progress(image_ids, "images", len(image_ids))
    paths = (by_stem[format_image_name(image)] for image in numbered)
    return StimulusImages(image_ids, load_images(paths, "Image", image_size))


def _name_labels(image_ids: np.ndarray) -> pd.DataFrame:
    """Name and category of each image."""
    names = [format_image_name(image) for image in image_ids]
    categories = [name.split("_")[0] for name in names]
    return pd.DataFrame({"image": image_ids, "name": names, "category": categories})


def _open_repacked(files: SourceFiles, image_ids: np.ndarray, image_size: int) -> StimulusImages:
    """The images from images_256.npz, in its order, read one at a time."""
    path = files.by_name[REPACKED]
    rows_of_array: dict[str, list[int]] = {}
    order: list[int] = []
    for array, list_names in LISTS.items():
        lists = [files.by_name[name] for name in list_names if name in files.by_name]
        if not lists:
            raise PerceptError(
                f"{path} needs {list_names[0]} or {list_names[1]} below the same source, which"
                " tells its images: fetch it."
            )
        names = load_csv(lists[0], range(2), header=None)[1]
        ids = np.array([parse_image_name(str(name)) for name in names], np.int64)
        rows = np.flatnonzero(np.isin(ids, image_ids))
        rows_of_array[array] = rows.tolist()
        order += ids[rows].tolist()
    absent = np.setdiff1d(image_ids, order)
    if len(absent):
        raise PerceptError(
            f"Image {format_image_name(absent[0])} is not in the lists of {path}: ask the authors"
            " for the images."
        )
    blocks = _repacked_blocks(path, rows_of_array, image_size)
    return StimulusImages(np.array(order, np.int64), blocks)


def _repacked_blocks(
    path: Path, rows_of_array: dict[str, list[int]], image_size: int
) -> Iterator[np.ndarray]:
    for array, rows in rows_of_array.items():
        for pixels in _iterate_npz_rows(path, array, set(rows)):
            yield center_crop_resize(pixels, image_size)[None]


def _iterate_npz_rows(path: Path, name: str, rows: set[int]) -> Iterator[np.ndarray]:
    """Some rows of an array of an .npz in turn, uint8 (height, width, 3), one in memory."""
    with read_errors(path), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        check_expansion(path, member.filename, member.file_size, member.compress_size)
        file = archive.open(member)
        header = parse_npy_header(file)
    if header.is_fortran or header.dtype.kind not in "uf" or len(header.shape) != 4:
        raise PerceptError(
            f"{name} of {path} is {header.dtype} {header.shape}, not as MinD-Vis publishes it:"
            " fetch it again."
        )
    size = math.prod(header.shape[1:]) * header.dtype.itemsize
    if size * header.shape[0] > member.file_size:
        raise PerceptError(
            f"{name} of {path} announces {header.shape} and stores {member.file_size:,} bytes:"
            " fetch it again."
        )
    with file:
        for row in progress(range(header.shape[0]), name, header.shape[0]):
            with read_errors(path):
                content = file.read(size)
                pixels = np.frombuffer(content, header.dtype).reshape(header.shape[1:])
            if row in rows:
                yield _to_bytes(pixels, f"{name}[{row}] of {path}")


def _to_bytes(pixels: np.ndarray, what: str) -> np.ndarray:
    """Pixels as uint8; floats must be from 0 to 1."""
    if pixels.dtype == np.uint8:
        return pixels
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise PerceptError(
            f"{what} has values from {pixels.min():g} to {pixels.max():g}: floats must be from 0 to"
            " 1, so fetch the file again."
        )
    return np.rint(pixels * 255).astype(np.uint8)
