"""What several readers need: spooled rows, pictures, the choice of validation images, and files
that their authors pickled.

Conventions of the prepared table of trials, whatever the source counts from: `trial`, `session`,
`run` and `repeat` count from 0 (-1 where a source does not tell a run), `image` is the source's own
number of the image (NSD: the row of imgBrick, from 0).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from src.data.layout import write_image_table
from src.utils import PerceptError


class Spool:
    """Rows of one shape and dtype, appended to an unnamed temporary file in `folder` and then
    memory-mapped.
    """

    def __init__(self, folder: Path):
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder)
        self.shape: tuple[int, ...] | None = None
        self.dtype, self.count = np.dtype(np.float32), 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, row: np.ndarray, what: str) -> None:
        """Add one row (...); `what` names it in the error for a row unlike those before it."""
        self.extend(row[None], what)

    def extend(self, rows: np.ndarray, what: str) -> None:
        """Add rows (rows, ...).

        Raises:
            PerceptError: if they are unlike the rows before them.
        """
        if self.shape is None:
            self.shape, self.dtype = rows.shape[1:], rows.dtype
        if (rows.shape[1:], rows.dtype) != (self.shape, self.dtype):
            raise PerceptError(
                f"{what} is {rows.dtype} {rows.shape[1:]}, the ones before it are {self.dtype}"
                f" {self.shape}: all must be alike."
            )
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def array(self) -> np.ndarray:
        """All rows (rows, ...).

        Raises:
            PerceptError: if there are none.
        """
        if self.shape is None:
            raise PerceptError("The source holds no samples.")
        self.file.flush()
        return np.memmap(self.file, self.dtype, "r", 0, (self.count, *self.shape))


def shrink(image: np.ndarray, image_size: int) -> np.ndarray:
    """An image uint8 (height, width, 3) whose shorter side is at most `image_size`, cut to its
    central square.

    0 keeps the image as it is. A square image that is small enough is returned unchanged; nothing
    is enlarged.
    """
    height, width = image.shape[:2]
    if not image_size or height == width <= image_size:
        return image
    return np.asarray(_square(Image.fromarray(image), image_size))


def _square(image: Image.Image, image_size: int) -> Image.Image:
    side = min(image.size)
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return (
        image
        if side <= image_size
        else image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    )


def picture(source: str | Path | BinaryIO, what: str, image_size: int = 0) -> np.ndarray:
    """Decode a picture file: uint8 (height, width, 3), through `shrink`.

    Raises:
        PerceptError: if it is missing or cannot be decoded; `what` names it.
    """
    try:
        with Image.open(source) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
            return np.asarray(_square(rgb, image_size) if image_size else rgb)
    except FileNotFoundError as error:
        raise PerceptError(f"{what} is missing: there is no {source}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise PerceptError(f"{what} cannot be decoded ({error}): fetch it again.") from error


def pictures(files: Iterable[str | Path], what: str, image_size: int = 0) -> Iterator[np.ndarray]:
    """Decode picture files, some at a time but in their order: blocks uint8 (1, height, width, 3),
    through `picture`; few are held at once.
    """
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for file in files:
            ahead.append(pool.submit(picture, file, f"{what} {file}", image_size))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()[None]
        while ahead:
            yield ahead.popleft().result()[None]


def affordable(wanted: int, there: int, what: str, default: int = 300) -> int:
    """The default number of images to set aside, or a tenth, with a warning, where the default
    would take more than half of what is there.

    A number that was chosen, and so differs from the default, is returned as it is.
    """
    if wanted != default or 2 * default <= there:
        return wanted
    fewer = there // 10 or int(there > 2)
    warnings.warn(
        f"There are only {there} training images: {fewer} of them instead of {default} become"
        f" {what} images; {what}_images sets their number.",
        stacklevel=4,
    )
    return fewer


def choose_validation(trials: pd.DataFrame, val_images: int, seed: int = 42) -> pd.Series:
    """The column `split` with so many of the training images, chosen at random by image, moved to
    "val".

    Args:
        trials: columns image and split (train, test, exclude or already val).
        val_images: number of images; 0 moves none. Where the default, 300, would be more than half
            of them, a tenth is taken.
        seed: of the choice, which depends on the set of training images alone, not on their order.

    Raises:
        PerceptError: if fewer than two training images would be left.
    """
    candidates = np.unique(trials.loc[trials["split"] == "train", "image"])
    val_images = affordable(val_images, len(candidates), "val")
    if val_images < 0 or len(candidates) - val_images < 2:
        raise PerceptError(
            f"val_images is {val_images}, but there are {len(candidates)} training images: choose"
            f" from 0 to {max(0, len(candidates) - 2)}."
        )
    chosen = np.random.default_rng(seed).choice(candidates, val_images, replace=False)
    return trials["split"].mask((trials["split"] == "train") & trials["image"].isin(chosen), "val")


def own_split(source: Path, trials: pd.DataFrame) -> pd.Series | None:
    """The column `split` as <source>/splits.csv (columns image and split) wants it, or nothing
    where there is no such file.

    Trials of images that it does not name are excluded.

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
    return trials["image"].map(table.set_index("image")["split"]).fillna("exclude").astype(str)


def split_of(source: Path, trials: pd.DataFrame, val_images: int, seed: int) -> pd.Series:
    """The column `split` of <source>/splits.csv, or where there is none, with validation images
    chosen; see `own_split` and `choose_validation`.
    """
    own = own_split(source, trials)
    return choose_validation(trials, val_images, seed) if own is None else own


def copy_tables(source: Path, folder: Path, image_ids: Collection[int]) -> None:
    """Take captions.parquet and labels.parquet (column image) beside a source over into the
    dataset's folder, where there are any.
    """
    for name in ("captions.parquet", "labels.parquet"):
        if (source / name).exists():
            table = pd.read_parquet(source / name)
            write_image_table(
                folder / name, table[table["image"].isin(image_ids)] if "image" in table else table
            )


def roi_columns(regions: dict[str, np.ndarray], n_voxels: int) -> pd.DataFrame:
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
    return pd.DataFrame(
        {name: mask.astype(bool) for name, mask in regions.items() if mask.any()},
        index=range(n_voxels),
    )


def check_rois(wanted: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse regions that the source does not have.

    Raises:
        PerceptError: naming the unknown and the known.
    """
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise PerceptError(
            f"{where} has no region {', '.join(unknown)}: it has {', '.join(sorted(known))}."
        )
