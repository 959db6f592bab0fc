"""What several readers share: images, tables beside a source, the split, and regions.

Conventions of the prepared table of trials, whatever the source counts from: `trial`, `session`,
`run` and `repeat` count from 0 (-1 where a source does not record the run), `image` is the source's
own number of the image (NSD: the row of imgBrick, from 0).
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from PIL import Image

from src.image_files import decode_image
from src.utils import PerceptError

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
        PerceptError: if a file has no column image.
    """
    combined = None
    for path in (folder / f"{name}.parquet" for folder in folders):
        if not path.exists():
            continue
        table = pd.read_parquet(path)
        if "image" not in table:
            raise PerceptError(f"{path} has no column image (it has {list(table.columns)}).")
        table = table[table["image"].isin(list(image_ids))]
        if combined is not None:
            earlier = combined[~combined["image"].isin(table["image"])]
            table = pd.concat([earlier, table], ignore_index=True)
        combined = table
    return combined


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
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PerceptError(f"{path} is damaged or cut off ({error}): fetch it again.") from error


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


def choose_validation(trials: pd.DataFrame, val_images: int, seed: int = 42) -> pd.Series:
    """The column `split` with some training images, chosen at random by image, moved to "val".

    Args:
        trials: columns image and split (train, test, exclude or already val).
        val_images: number of images; 0 moves none. Where the default, 300, would be more than half
            of them, a tenth is moved.
        seed: of the choice, which depends on the set of training images alone, not on their order.

    Raises:
        PerceptError: if fewer than two training images would be left.
    """
    is_train = trials["split"] == "train"
    candidates = np.unique(trials.loc[is_train, "image"])
    val_images = default_split_size(val_images, len(candidates), "val")
    if val_images < 0 or len(candidates) - val_images < 2:
        raise PerceptError(
            f"val_images is {val_images}, but there are {len(candidates)} training images: choose"
            f" from 0 to {max(0, len(candidates) - 2)}."
        )
    chosen = np.random.default_rng(seed).choice(candidates, val_images, replace=False)
    return trials["split"].mask(is_train & trials["image"].isin(chosen), "val")


def load_split_column(source: Path, trials: pd.DataFrame) -> pd.Series | None:
    """The column `split` as <source>/splits.csv (columns image and split) gives it.

    Returns:
        The column, "exclude" for trials of images that the file does not name; None where there is
        no such file.

    Raises:
        PerceptError: if the file lacks a column or names an image twice.
    """
    path = source / "splits.csv"
    if not path.exists():
        return None
    table = pd.read_csv(path)
    if not {"image", "split"} <= set(table.columns) or table["image"].duplicated().any():
        raise PerceptError(
            f"{path} needs the columns image and split, one row an image: it has"
            f" {list(table.columns)} and {len(table)} rows."
        )
    split_of_image = table.set_index("image")["split"]
    return trials["image"].map(split_of_image).fillna("exclude").astype(str)


def make_split_column(source: Path, trials: pd.DataFrame, val_images: int, seed: int) -> pd.Series:
    """The column `split` of <source>/splits.csv, or else with validation images chosen at random.

    See `load_split_column` and `choose_validation`.
    """
    split = load_split_column(source, trials)
    return choose_validation(trials, val_images, seed) if split is None else split


def count_test_images(trials: pd.DataFrame) -> int:
    """Number of images in the test set."""
    return trials.loc[trials["split"] == "test", "image"].nunique()


# ---------------------------------------------------------------------------------------- regions
def parse_name_list(text: str) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_roi_columns(regions: dict[str, np.ndarray], n_voxels: int) -> pd.DataFrame:
    """Boolean columns of the table of voxels, one a region, none for a region without voxels.

    Raises:
        PerceptError: if a region's mask has another length.
    """
    for name, mask in regions.items():
        if mask.shape != (n_voxels,):
            raise PerceptError(
                f"The mask of {name} has shape {mask.shape}, there are {n_voxels} voxels: take the"
                " masks of this very subject."
            )
    columns = {name: mask.astype(bool) for name, mask in regions.items() if mask.any()}
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
