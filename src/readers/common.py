"""What several readers share: images, tables beside a source, the split, and regions.

Conventions of the prepared table of trials, whatever the source counts from: `trial`, `session`,
`run` and `repeat` count from 0 (-1 where a source does not record the run), `image` is the source's
own number of the image (NSD: the row of imgBrick, from 0).
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import scipy.io
from PIL import Image

from src.files.foreign import (
    FETCH_AGAIN,
    check_expansion,
    load_csv,
    load_parquet,
    read_errors,
    shorten,
)
from src.files.images import decode_image
from src.utils import PerceptError

COMPRESSED = 15  # type of an element of a MATLAB file

DEFAULT_SPLIT_SIZE = 300  # images that become validation (or test) images where no one says more


# ------------------------------------------------------------------------------------------ images
def center_crop_resize(image: np.ndarray, image_size: int) -> np.ndarray:
    """Cut an image to its central square, of at most `image_size` pixels a side.

    Args:
        image: uint8 (height, width, 3).
        image_size: largest side of the result; 0 keeps the image as it is. Nothing is enlarged.

    Returns:
        uint8 (side, side, 3); a square image that is small enough is returned unchanged.
    """
    height, width = image.shape[:2]
    if not image_size or height == width <= image_size:
        return image
    return np.asarray(_crop_resize(Image.fromarray(image), image_size))


def _crop_resize(image: Image.Image, image_size: int) -> Image.Image:
    side = min(image.size)
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side <= image_size:
        return image
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def load_image(source: str | Path | BinaryIO, what: str, image_size: int = 0) -> np.ndarray:
    """Decode an image file into uint8 (height, width, 3), through `center_crop_resize`.

    Args:
        source: the file, or its open content.
        what: name of the image in errors.
        image_size: largest side, 0 to keep the image as it is.

    Raises:
        PerceptError: if it is missing or cannot be decoded, see `decode_image`.
    """
    return center_crop_resize(decode_image(source, what), image_size)


def load_images(
    files: Iterable[str | Path], what: str, image_size: int = 0
) -> Iterator[np.ndarray]:
    """Decode image files in parallel, in their order, with few of them in memory.

    Args:
        files: the image files.
        what: word that names an image in errors, before its path.
        image_size: as for `load_image`.

    Yields:
        Blocks uint8 (1, height, width, 3).
    """
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for file in files:
            ahead.append(pool.submit(load_image, file, f"{what} {file}", image_size))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()[None]
        while ahead:
            yield ahead.popleft().result()[None]


# ------------------------------------------------------------------------- tables beside a source
def load_image_table(
    name: str, image_ids: Collection[int] | np.ndarray, *folders: Path
) -> pd.DataFrame | None:
    """Load captions.parquet or labels.parquet that lies beside a source.

    Args:
        name: captions or labels.
        image_ids: images whose rows are loaded.
        folders: where the file is looked for; rows of a later folder replace those of an earlier
            one.

    Returns:
        The table with a column image, or None where no folder has the file.

    Raises:
        PerceptError: if a file has no column image, labels name an image twice, or one of the
            images has no row.
    """
    combined, paths = None, [folder / f"{name}.parquet" for folder in folders]
    for path in filter(Path.exists, paths):
        table = load_parquet(path, f"write it again, or remove it to read without {name}")
        _check_image_column(table, path, is_unique=name == "labels")
        table = table[table["image"].isin(list(image_ids))]
        if combined is not None:
            earlier = combined[~combined["image"].isin(table["image"])]
            table = pd.concat([earlier, table], ignore_index=True)
        combined = table
    if combined is not None:
        _check_completeness(name, combined, np.asarray(image_ids), folders[0])
    return combined


def _check_completeness(
    name: str, table: pd.DataFrame, image_ids: np.ndarray, folder: Path
) -> None:
    """Refuse labels of some of the images only; warn of captions of some only."""
    absent = np.setdiff1d(image_ids, table["image"])
    if not len(absent):
        return
    complaint = (
        f"{name}.parquet in {folder} has no row of image {absent[0]} ({len(absent)} of"
        f" {len(image_ids)} are missing)"
    )
    if name == "labels":
        raise PerceptError(f"{complaint}: complete it, or remove it to read without labels.")
    warnings.warn(f"{complaint}: they are left without captions.", stacklevel=4)


def _check_image_column(table: pd.DataFrame, path: Path, is_unique: bool) -> None:
    """Refuse a table without whole numbers in a column image, or with an image twice in labels."""
    if "image" not in table:
        raise PerceptError(f"{path} has no column image (it has {list(table.columns)}).")
    if not pd.api.types.is_integer_dtype(table["image"]):
        raise PerceptError(
            f"Column image of {path} is {table['image'].dtype}: it must hold whole numbers, the ids"
            " of the images."
        )
    repeated = table["image"][table["image"].duplicated()]
    if is_unique and len(repeated):
        raise PerceptError(
            f"{path} has image {repeated.iloc[0]} in more than one row: keep one row an image."
        )


def check_numbering(path: Path, names: pd.DataFrame) -> None:
    """Refuse to add to a dataset whose images were numbered differently.

    Args:
        path: labels.parquet of the dataset.
        names: columns image and name of the images to add.

    Raises:
        PerceptError: naming an image that has another id there.
    """
    stored = load_parquet(path) if path.exists() else pd.DataFrame()
    if "name" not in stored:
        return
    common = names.merge(stored[["image", "name"]], on="name", suffixes=("", "_stored"))
    different = common[common["image"] != common["image_stored"]]
    if len(different):
        name, new, old = different.iloc[0][["name", "image", "image_stored"]]
        raise PerceptError(
            f"{name} would be image {new}, but is image {int(old)} in {path}: read all subjects"
            " from one folder that holds the metadata of all, under another dataset name."
        )


def join_labels(root: Path, names: pd.DataFrame) -> pd.DataFrame:
    """The names of images, with the columns of the labels.parquet beside a source, if any.

    Args:
        root: of the source.
        names: one row an image, with the columns image, name and perhaps others.
    """
    stored = load_image_table("labels", names["image"].tolist(), root)
    if stored is None:
        return names
    own_columns = [name for name in names if name != "image"]
    labels = names.merge(stored.drop(columns=own_columns, errors="ignore"), on="image", how="left")
    return labels[list(dict.fromkeys([*stored, *labels]))]  # columns in the order of the source


def find_in_folders(names: Iterable[str], *folders: Path) -> Path | None:
    """The first file of these names that one of the folders has, or None."""
    names = list(names)
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.exists()), None)


def map_npy(path: Path) -> np.ndarray:
    """Memory-map an .npy file; pickled arrays are refused.

    Raises:
        PerceptError: if it is damaged.
    """
    with read_errors(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def load_mat(
    path: Path, names: Collection[str], remedy: str = FETCH_AGAIN
) -> dict[str, np.ndarray]:
    """Load the numeric arrays of a MATLAB file, version 7 or older.

    Args:
        path: the file.
        names: of the arrays; others are read as well, so that a file that was cut off is noticed.
        remedy: what to do where it cannot be read, for the message.

    Raises:
        PerceptError: if it cannot be read, announces more than it can hold, lacks an array, or has
            something else under its name.
    """
    with read_errors(path, remedy):
        _check_mat_sizes(path)
        content = scipy.io.loadmat(path)
    for name in names:
        array = content.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            kind = "which is needed" if array is None else "or has no plain numbers in it"
            raise PerceptError(f"{path} lacks {name}, {kind}: {remedy}.")
    return {name: content[name] for name in names}


def _check_mat_sizes(path: Path) -> None:
    """Refuse a MATLAB file whose compressed arrays announce more than they can hold."""
    with open(path, "rb") as file:
        head = file.read(128)
        order = "<" if head[126:128] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            if kind == COMPRESSED:
                inner = zlib.decompressobj().decompress(file.read(min(size, 256)), 8)
                n_bytes = struct.unpack(f"{order}II", inner)[1] if len(inner) == 8 else 0
                check_expansion(path, "compressed arrays", n_bytes, size)
                file.seek(size - min(size, 256), os.SEEK_CUR)
            else:
                file.seek(size, os.SEEK_CUR)


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by pattern, sorted; not those that begin with a dot, as a Mac adds them."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def find_gap(numbers: Iterable[int], first: int) -> int | None:
    """The first number that is missing of those that count from `first`, or None."""
    for expected, number in enumerate(sorted(set(numbers)), first):
        if number != expected:
            return expected
    return None


# ---------------------------------------------------------------------------------------- numbers
def to_integers(values: np.ndarray, what: str) -> np.ndarray:
    """Whole numbers as int64, of the same shape.

    Args:
        values: numbers of any type.
        what: names them in errors.

    Raises:
        PerceptError: for a text, NaN, a fraction, or a number beyond int64.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise PerceptError(f"{what} is of type {values.dtype}: it must hold whole numbers.")
    if values.dtype.kind == "f":
        is_whole = np.isfinite(values) & (np.rint(values) == values) & (np.abs(values) < 2**63)
    else:
        is_whole = values <= np.iinfo(np.int64).max
    if not is_whole.all():
        raise PerceptError(
            f"{what} has the value {values[~is_whole].flat[0]}: it must hold whole numbers within"
            " 64 bits."
        )
    return values.astype(np.int64)


def to_mask(values: np.ndarray, what: str) -> np.ndarray:
    """A mask as Booleans, of the same shape: True and False, or 1 and 0 but for rounding.

    Args:
        values: the mask.
        what: names it in errors.

    Raises:
        PerceptError: for any other value, such as -1, NaN or a text.
    """
    values = np.asarray(values)
    if values.dtype.kind == "b":
        return values
    is_number = values.dtype.kind in "iuf"
    is_valid = np.isin(np.round(values, 3), (0, 1)) if is_number else np.zeros(values.shape, bool)
    if not is_valid.all():
        raise PerceptError(
            f"{what} holds the value {values[~is_valid].flat[0]}: a mask must be True and False,"
            " or 1 inside and 0 outside."
        )
    return np.round(values) == 1


def parse_number_ranges(text: str, last: int, available: str) -> list[int]:
    """The numbers that a text such as "1-10" or "1,2,5" selects, ascending.

    Args:
        text: numbers and ranges, counted from 1.
        last: the largest number that there is.
        available: what there is, for errors: "nsd-982 has sessions 1 to 37 of subject 1".

    Raises:
        PerceptError: for another text, or a number that there is not.
    """
    selected: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if not match:
            raise PerceptError(
                f"sessions is {shorten(text)!r}: write numbers and ranges from 1, e.g. 1-10 or"
                " 1,2,5."
            )
        first, last_of_range = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last_of_range <= last:  # before a range of any size is made
            raise PerceptError(f"sessions is {shorten(text)!r}, but {available}.")
        selected |= set(range(first, last_of_range + 1))
    return sorted(selected)


# ----------------------------------------------------------------------------------------- splits
def default_split_size(
    requested: int, n_images: int, split: str, default: int = DEFAULT_SPLIT_SIZE
) -> int:
    """The number of images to set aside: a tenth, with a warning, where the default is too large.

    The default is too large where it is more than half of the images. A number that was chosen,
    and so differs from the default, is returned as it is.

    Args:
        requested: the number that was asked for.
        n_images: number of training images.
        split: val or test, for the warning.
        default: number that stands for "not chosen".
    """
    if requested != default or 2 * default <= n_images:
        return requested
    tenth = n_images // 10 or int(n_images > 2)
    warnings.warn(
        f"There are only {n_images} training images: {tenth} of them instead of {default} become"
        f" {split} images; {split}_images sets their number.",
        stacklevel=4,
    )
    return tenth


def choose_validation(
    trials: pd.DataFrame, val_images: int, seed: int = 42, candidates: np.ndarray | None = None
) -> pd.Series:
    """The column `split` with some training images, chosen at random by image, moved to "val".

    Args:
        trials: columns image and split (train, test, exclude or already val).
        val_images: number of images; 0 moves none. Where the default, 300, would be more than half
            of them, a tenth is moved.
        seed: of the choice, which depends on the set of training images alone, not on their order.
        candidates: training images, where there are others than those of the trials (sessions that
            are not there); the choice is among them all.

    Raises:
        PerceptError: if fewer than two training images would be left.
    """
    is_train = trials["split"] == "train"
    if candidates is None:
        candidates = trials.loc[is_train, "image"].to_numpy()
    candidates = np.unique(candidates)
    val_images = default_split_size(val_images, len(candidates), "val")
    if val_images < 0 or len(candidates) - val_images < 2:
        raise PerceptError(
            f"val_images is {val_images}, but there are {len(candidates)} training images: choose"
            f" from 0 to {max(0, len(candidates) - 2)}."
        )
    chosen = np.random.default_rng(seed).choice(candidates, val_images, replace=False)
    return trials["split"].mask(is_train & trials["image"].isin(chosen), "val")


def load_split_column(
    source: Path, trials: pd.DataFrame, number_of_name: dict[str, int] | None = None
) -> pd.Series | None:
    """The column `split` as <source>/splits.csv (columns image and split) gives it.

    Args:
        source: folder of the file.
        trials: column image.
        number_of_name: image id of each name, for a file that names images in place of their ids.

    Returns:
        The column, "exclude" for trials of images that the file does not name; None where there is
        no such file.

    Raises:
        PerceptError: if the file cannot be read, lacks a column, names an image twice, or none that
            was shown.
    """
    path = source / "splits.csv"
    if not path.exists():
        return None
    table = load_csv(path, ("image", "split"), "write it again, or remove it")
    if number_of_name and not pd.api.types.is_integer_dtype(table["image"]):
        is_shown = table["image"].isin(list(number_of_name))
        table = table[is_shown].assign(image=table["image"].map(number_of_name))
        table = table.astype({"image": np.int64})
    _check_image_column(table, path, is_unique=True)
    if not trials["image"].isin(table["image"]).any():
        raise PerceptError(
            f"{path} names none of the {trials['image'].nunique()} images that were shown, whose"
            f" ids are such as {trials['image'].iloc[0]}: write these ids into its column image."
        )
    split_of_image = table.set_index("image")["split"]
    return trials["image"].map(split_of_image).fillna("exclude").astype(str)


def make_split_column(
    source: Path,
    trials: pd.DataFrame,
    val_images: int,
    seed: int,
    candidates: np.ndarray | None = None,
) -> pd.Series:
    """The column `split` of <source>/splits.csv, or else with validation images chosen at random.

    See `load_split_column` and `choose_validation`.
    """
    split = load_split_column(source, trials)
    if split is not None:
        return split
    return choose_validation(trials, val_images, seed, candidates)


def count_test_images(trials: pd.DataFrame) -> int:
    """Number of images in the test set."""
    return trials.loc[trials["split"] == "test", "image"].nunique()


# ---------------------------------------------------------------------------------------- regions
def parse_name_list(text: str) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_roi_columns(
    regions: dict[str, np.ndarray], n_voxels: int, origin: str = ""
) -> pd.DataFrame:
    """Boolean columns of the table of voxels, one a region, none for a region without voxels.

    Args:
        regions: mask (voxels,) of each region, see `to_mask`.
        n_voxels: number of voxels.
        origin: where the masks are from, for errors.

    Raises:
        PerceptError: if a region's mask has another length, or values that are no mask's.
    """
    columns = {}
    for name, values in regions.items():
        place = f" in {origin}" if origin else ""
        if values.shape != (n_voxels,):
            raise PerceptError(
                f"The mask of {name} has shape {values.shape}, there are {n_voxels} voxels: take"
                f" the masks of this very subject{place}."
            )
        mask = to_mask(values, f"The mask of {name}{place}")
        if mask.any():
            columns[name] = mask
    return pd.DataFrame(columns, index=range(n_voxels))


def check_rois(rois: Iterable[str], available: Collection[str], owner: str) -> None:
    """Refuse regions that the source does not have.

    Raises:
        PerceptError: naming the unknown ones and those of `owner`.
    """
    unknown = [name for name in rois if name not in available]
    if unknown:
        raise PerceptError(
            f"{owner} has no region {', '.join(unknown)}: it has {', '.join(sorted(available))}."
        )
