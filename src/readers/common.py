"""What several readers need: spooled rows, pictures, the choice of validation images, and files
that their authors pickled.

Conventions of the prepared table of trials, whatever the source counts from: `trial`, `session`,
`run` and `repeat` count from 0 (-1 where a source does not tell a run), `image` is the source's own
number of the image (NSD: the row of imgBrick, from 0).
"""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from src.data import write_image_table
from src.utils import PerceptError, atomic


# -------------------------------------------------------------------------------- files
def present(
    path: str | Path, what: str, remedy: str = "fetch it, or give the folder that holds it"
) -> Path:
    """`path`, if it is there.

    Raises:
        PerceptError: naming the file, what it holds and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(f"{path} ({what}) is missing: {remedy}.")
    return path


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


# -------------------------------------------------------------------------------- pictures
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


# -------------------------------------------------------------------------------- splits
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


def write_split(source: Path, trials: pd.DataFrame) -> None:
    """Write <source>/splits.csv for `own_split`; images of other subjects already in it are kept."""
    path, table = source / "splits.csv", trials.drop_duplicates("image")[["image", "split"]]
    if path.exists():
        old = pd.read_csv(path)
        table = pd.concat([old[~old["image"].isin(table["image"])], table])
    with atomic(path) as temporary:
        table.sort_values("image").to_csv(temporary, index=False)


# ------------------------------------------------------------------- what a source is written from
def fitting(
    betas: np.ndarray,
    trials: pd.DataFrame,
    images: np.ndarray,
    image_ids: Collection[int],
    needed: Collection[str],
    voxels: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table of trials in the order of `trial`, its index the row of betas (trials, ...), if it,
    betas, images and voxels belong together.

    Raises:
        PerceptError: if they do not: another number of rows, a column of `needed` that is missing,
            or a trial whose image is not given.
    """
    if missing := set(needed) - set(trials.columns):
        raise PerceptError(
            f"The table of trials lacks the columns {sorted(missing)}: it has"
            f" {list(trials.columns)}."
        )
    unlike = voxels is not None and len(voxels) != betas.shape[1]
    if unlike or len(trials) != len(betas) or len(images) != len(image_ids):
        table = (
            ""
            if voxels is None
            else f", {len(voxels)} rows of voxels for {betas.shape[1]} columns of betas"
        )
        raise PerceptError(
            f"{len(betas)} betas, {len(trials)} trials, {len(images)} images, {len(image_ids)}"
            f" image ids{table} do not fit each other: give one row a trial, one id an image, one"
            " row a voxel."
        )
    ordered = trials.reset_index(drop=True).sort_values("trial")
    absent = ordered.loc[~ordered["image"].isin(image_ids), "image"]
    if len(absent):
        raise PerceptError(
            f"Image {absent.iloc[0]} of the trials is not among the images given: give it, or leave"
            " out its trials."
        )
    return ordered


# ------------------------------------------------------------------- what a source may bring along
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


def write_tables(source: Path, captions: pd.DataFrame | None, labels: pd.DataFrame | None) -> None:
    """Write captions.parquet and labels.parquet beside a source for `copy_tables`."""
    for name, table in (("captions", captions), ("labels", labels)):
        if table is not None:
            write_image_table(source / f"{name}.parquet", table)


# ---------------------------------------------------------------- files that their authors pickled
class _Dtype:
    """Stands for a pickled dtype: of its state the byte order alone is taken."""

    def __init__(self, name: str, *_: object):
        self.made = np.dtype(str(name))
        if self.made.kind not in "OSUbiufc":
            raise pickle.UnpicklingError(f"it has the dtype {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.made = self.made.newbyteorder(">")

    def scalar(self, data: bytes) -> Any:
        return np.frombuffer(data, self.made, 1)[0]  # refuses a dtype of objects


class _Array:
    """Stands for a pickled array, which is made of its checked dtype and its plain content."""

    def __init__(self, *_: object):
        self.made = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.made.hasobject:
            flat = np.empty(len(data), object)
            flat[:] = _settled(data)
        else:
            flat = np.frombuffer(data, dtype.made)
        self.made = flat.reshape(shape, order="F" if fortran else "C")


def _settled(content: Any) -> Any:
    """Containers with arrays in the place of what stood for them."""
    if isinstance(content, dict):
        return {key: _settled(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_settled, content))
    return content.made if isinstance(content, (_Array, _Dtype)) else content


class _Restricted(pickle.Unpickler):
    """Builds plain containers, texts and numbers, and NumPy arrays and scalars of these; nothing
    else.

    NumPy's own unpickling is not used: it trusts the shapes and states that a file tells, so that a
    forged one can end the process.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("collections", "OrderedDict"): OrderedDict,
        }
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            allowed |= {
                (core, "_reconstruct"): _Array,
                (core, "scalar"): lambda dtype, data: dtype.scalar(data),
            }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]


def unpickle_npy(path: str | Path) -> Any:
    """The content of an .npy whose authors pickled it (a dict, or an array of texts), without
    running code from it.

    Raises:
        PerceptError: if it is missing, damaged, or asks for anything but containers, texts, numbers
            and arrays.
    """
    try:
        with open(present(path, "a pickled .npy"), "rb") as file:
            version = np.lib.format.read_magic(file)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = header(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.lib.format.read_array(file, allow_pickle=False)
            content = np.asarray(_settled(_Restricted(file).load()), dtype=object).reshape(shape)
    except PerceptError:
        raise
    except Exception as error:  # whatever a damaged or forged file provokes
        raise PerceptError(
            f"{path} cannot be read safely ({error}): fetch it again, or save it as plain arrays."
        ) from error
    return content.item() if shape == () else content


# -------------------------------------------------------------------------------- regions
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
