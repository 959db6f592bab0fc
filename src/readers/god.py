"""Generic Object Decoding (Horikawa and Kamitani 2017, doi 10.1038/ncomms15037) and Deep Image
Reconstruction, in bdpy's HDF5 (BData); read and written.

- Subject1.h5 to Subject5.h5 (figshare 7387130): `dataset` (samples, columns) holds voxels and
  labels; `metadata/key`, `metadata/description` and `metadata/value` (keys, columns; 1 marks the
  columns of a key) say which is which; `vmap/<key>/<value>` may name the values of a label. Older
  files write dataSet and metaData. Taken: VoxelData, ROI_*, voxel_x, voxel_y, voxel_z, DataType (1
  training, 2 test, 3 imagery), Session, Run.
- The picture of a row, from the first that is there: stimulus_id or Label (1443537.022563 is
  n01443537_22563), stimulus_name through vmap, or image_index through stimulus_ImageNetTraining.tsv
  and stimulus_ImageNetTest.tsv (of the authors' repository) below the source. Which of these the
  present files of figshare hold is inferred from code that reads them.
- The image id is the number of the category times 10**6 plus that of the picture, so 1443537022563;
  an id below 10**6 is picture n00000000_<id>.
- Pictures: n01443537_22563.JPEG (or .jpg, .png) anywhere below the source; the authors give them on
  request. Else MinD-Vis's images_256.npz with the lists beside it (inferred from its code: row i of
  train_images is line i of imagenet_training_label.csv or imageID_training.csv; values from 0 to
  1).
- Training pictures are shown once, test pictures 35 times. Imagery is left out, or kept as excluded
  trials; an imagery row that names a category alone takes the test picture of this category, and
  its repeats are numbered after those seen.
- Where there is no Subject<n>.h5: sub-0n_perceptionNaturalImage{Training,Test}_original_VC.h5
  (figshare 7033577; subjects 1 to 3; 5 and 24 repeats), whose sessions and runs follow one another.
- Training and test are sessions of their own: a z-score by session finds no training trials in the
  latter, so normalise all sessions together (by_session=False), as the authors do. Nothing is
  z-scored here. Without a column Session all trials are session 0.
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from src.data.files import BLOCK_BYTES, disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.readers.common import (
    center_crop_resize,
    check_rois,
    copy_tables,
    load_images,
    make_roi_columns,
    make_split_column,
)
from src.utils import PerceptError, progress, require_file

TERMS = (
    "The fMRI data of Generic Object Decoding and Deep Image Reconstruction (Kamitani Lab) are"
    " public on figshare (7387130, 7033577); cite the papers. The pictures are ImageNet's: ask the"
    " authors for them (forms.gle/ujvA34948Xg49jdn9), accept ImageNet's terms, and do not"
    " redistribute them."
)

KINDS = {1: "train", 2: "test", 3: "exclude"}

PICTURES = {".jpeg", ".jpg", ".png"}

UNIT = 10**6  # one category in image ids

DEEP = "sub-{:02d}_perceptionNaturalImage{}_original_VC.h5"

LISTS = {
    "train_images": ("imagenet_training_label.csv", "imageID_training.csv"),
    "test_images": ("imagenet_testing_label.csv", "imageID_test.csv"),
}

TABLES = {
    1: "stimulus_ImageNetTraining.tsv",
    2: "stimulus_ImageNetTest.tsv",
    3: "stimulus_ImageNetTest.tsv",
}


class BData:
    """A file in bdpy's format; columns are looked up by key, rows are read in blocks.

    Args:
        path: the file.
        kind: DataType of all rows, where the file has no such column.

    Raises:
        PerceptError: for a damaged file, or one that is no BData.
    """

    def __init__(self, path: Path, kind: int = 0):
        self.path, self.kind = path, kind
        try:
            with h5py.File(path, "r") as file:
                self.name, group = (
                    ("dataset", "metadata") if "dataset" in file else ("dataSet", "metaData")
                )
                self.shape, self.itemsize = file[self.name].shape, file[self.name].dtype.itemsize
                keys, values = file[f"{group}/key"].asstr()[:], file[f"{group}/value"][:]
                names = file.get("vmap/stimulus_name", {})
                self.stimulus_names = {float(value): names[value].asstr()[()] for value in names}
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            raise PerceptError(
                f"{path} cannot be read as BData, it is damaged, cut off or of another format"
                f" ({error}): fetch it again."
            ) from error
        if len(self.shape) != 2 or values.shape != (len(keys), self.shape[1]):
            raise PerceptError(
                f"{path}: dataset {self.shape} and metadata {values.shape} of {len(keys)} keys do"
                " not fit; they must be (samples, columns) and (keys, columns), with their axes in"
                " this order."
            )
        self.metadata = dict(zip(keys.tolist(), values, strict=True))

    def member(self, key: str) -> np.ndarray:
        """Which columns a key marks, bool (columns,)."""
        return self.metadata[key] == 1

    def column(self, key: str) -> np.ndarray | None:
        """A label of every row, float64 (samples,), or None without such a key."""
        at = np.flatnonzero(self.member(key)) if key in self.metadata else np.array([], int)
        return self.read(slice(None), at[:1])[:, 0] if len(at) else None

    def read(self, rows: slice, columns: np.ndarray) -> np.ndarray:
        """(rows, chosen columns) in the file's dtype; only the stretch from the first to the last
        column is read.
        """
        first, last = int(columns.min()), int(columns.max()) + 1
        try:
            with h5py.File(self.path, "r") as file:
                block = file[self.name][rows, first:last]
        except (OSError, RuntimeError) as error:
            raise PerceptError(
                f"{self.path} is damaged or cut off ({error}): fetch it again."
            ) from error
        return block if last - first == len(columns) else block[:, columns - first]

    def blocks(self, columns: np.ndarray, keep: np.ndarray) -> Iterator[np.ndarray]:
        """The kept rows, float32 (rows, chosen columns), in blocks."""
        step = max(1, BLOCK_BYTES // (self.itemsize * int(columns.max() - columns.min() + 1)))
        starts = range(0, self.shape[0], step)
        for start in progress(starts, f"samples of {self.path.name}", len(starts)):
            kept = keep[start : start + step]
            if kept.any():
                block = self.read(slice(start, start + step), columns)
                yield (block if kept.all() else block[kept]).astype(np.float32)


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
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: folder below which Subject<n>.h5 and the pictures lie.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 5.
        rois: regions whose voxels are taken, separated by commas (V1, LOC, ...); "" for VC, the
            whole visual cortex (all voxels where there is no VC).
        imagery: keep the imagery trials, as split exclude.
        image_size: longest side of the pictures kept, 0 as they are.
        val_images: training images chosen for validation.
        seed: of that choice.
        protocol: name of the protocol, by default god-<number of test images>, or
            deeprecon-<number>.
        attributes: what is to be said about the betas where they are not the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, truncated or unfitting file, an unknown region or picture, or
            data that `write_subject` refuses.
    """
    root, files = _files(require_file(source, "the folder of Generic Object Decoding"))
    parts = _parts(files, root, subj)
    columns, voxels = _voxels(parts, rois)
    trials = pd.concat(
        [_trials(part, files) for part in parts], keys=range(len(parts)), names=["part", "row"]
    )
    trials, keep = _finish(trials, root, imagery, val_images, seed)
    named = "deeprecon" if len(parts) > 1 else "god"
    about: dict[str, Any] = {
        "source": " and ".join(part.path.name for part in parts),
        "units": "mean BOLD amplitude of a trial",
        "normalisation": "within runs, by the source (inferred)",
        "protocol": (
            protocol or f"{named}-{trials.loc[trials['split'] == 'test', 'image'].nunique()}"
        ),
        "rois": rois or "VC",
        **(attributes or {}),
    }
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        _store_pictures(root, files, folder, np.unique(trials["image"]), image_size)
        blocks = (
            block
            for number, part in enumerate(parts)
            for block in part.blocks(columns, keep.loc[number].to_numpy())
        )
        return write_subject(subject_folder(folder, subj), blocks, trials, voxels, about)


def _files(source: Path) -> tuple[Path, dict[str, Path]]:
    """The folder, and all files below it by name, the least deep of those of one name."""
    root = source if source.is_dir() else source.parent
    paths = sorted(root.rglob("*"), key=lambda path: (-len(path.parts), path))
    return root, {
        path.name: path for path in paths if not path.name.startswith(".") and path.is_file()
    }


def _parts(files: dict[str, Path], root: Path, subj: int) -> list[BData]:
    """The files of a subject, in the order of their trials."""
    if f"Subject{subj}.h5" in files:
        return [BData(files[f"Subject{subj}.h5"])]
    deep = {kind: DEEP.format(subj, name) for kind, name in ((1, "Training"), (2, "Test"))}
    absent = [name for name in deep.values() if name not in files]
    if len(absent) == 2:
        raise PerceptError(
            f"{root} holds neither Subject{subj}.h5 nor {absent[0]}: fetch it (GOD has the subjects"
            " 1 to 5, Deep Image Reconstruction 1 to 3)."
        )
    if absent:
        raise PerceptError(
            f"{absent[0]} is missing in {root}: training and test of Deep Image Reconstruction are"
            " two files, fetch both."
        )
    return [BData(files[name], kind) for kind, name in deep.items()]


def _voxels(parts: list[BData], rois: str) -> tuple[np.ndarray, pd.DataFrame]:
    """Columns of the chosen voxels (voxels,), and their table: regions, x, y, z."""
    first = parts[0]
    if "VoxelData" not in first.metadata:
        raise PerceptError(
            f"{first.path} has no key VoxelData: it has {', '.join(sorted(first.metadata))}."
        )
    regions = {
        key.removeprefix("ROI_"): first.member(key)
        for key in first.metadata
        if key.startswith("ROI_")
    }
    wanted = [roi.strip().removeprefix("ROI_") for roi in rois.split(",") if roi.strip()]
    check_rois(wanted, regions, str(first.path))
    wanted = wanted or [region for region in ("VC",) if region in regions]
    chosen = (
        np.logical_or.reduce([regions[region] for region in wanted])
        if wanted
        else first.member("VoxelData")
    )
    columns = np.flatnonzero(chosen & first.member("VoxelData"))
    if not len(columns):
        raise PerceptError(
            f"{first.path} has no voxels of {','.join(wanted) or 'VoxelData'}: choose other rois."
        )
    places = {
        axis: first.metadata[f"voxel_{axis}"] for axis in "xyz" if f"voxel_{axis}" in first.metadata
    }
    for part in parts[1:]:
        same = all(
            np.array_equal(part.metadata.get(key, np.empty(0)), first.metadata[key], equal_nan=True)
            for key in ["VoxelData", *(f"voxel_{axis}" for axis in places)]
        )
        if part.shape[1] != first.shape[1] or not same:
            raise PerceptError(
                f"{part.path} and {first.path} have other voxels: take the files of one subject."
            )
    table = make_roi_columns(
        {region: member[columns] for region, member in regions.items()}, len(columns)
    )
    return columns, table.assign(**{axis: place[columns] for axis, place in places.items()})


def _trials(part: BData, files: dict[str, Path]) -> pd.DataFrame:
    """Columns kind, image, session and run (from 0), one row a sample of a file."""
    stored = part.column("DataType")
    kind = stored if stored is not None else np.full(part.shape[0], float(part.kind))
    wrong = ~np.isin(kind, list(KINDS))
    if wrong.any():
        raise PerceptError(
            f"Sample {np.flatnonzero(wrong)[0]} of {part.path} has DataType {kind[wrong][0]:g}: it"
            " must be 1 (training), 2 (test) or 3 (imagery)."
        )
    trials = pd.DataFrame(
        {"kind": kind.astype(int), "image": _image_ids(part, kind.astype(int), files)}
    )
    session, run = part.column("Session"), part.column("Run")
    if session is None:
        warnings.warn(
            f"{part.path.name} does not tell sessions: all its trials are taken as one, 0.",
            stacklevel=4,
        )
        session = np.zeros(len(trials))
    if np.isnan(session).any():
        raise PerceptError(
            f"Sample {np.flatnonzero(np.isnan(session))[0]} of {part.path} has no Session: fetch"
            " the file again."
        )
    trials["session"] = np.unique(session, return_inverse=True)[1]
    # Run may go on counting from one session to the next, so that its rank within the session is
    # taken.
    trials["run"] = (
        -1
        if run is None
        else pd.Series(run).groupby(trials["session"]).rank("dense").fillna(0).astype(int) - 1
    )
    return trials


def _finish(
    trials: pd.DataFrame, root: Path, imagery: bool, val_images: int, seed: int
) -> tuple[pd.DataFrame, pd.Series]:
    """The table of trials, and which samples are kept, by part and row."""
    first = trials.groupby("part")["session"].max().add(1).cumsum().shift(fill_value=0)
    trials["session"] += trials.index.get_level_values("part").map(first.to_dict())
    trials["trial"] = np.arange(len(trials))
    trials["split"] = trials["kind"].map(KINDS)
    keep = trials["kind"].ne(3) | imagery
    trials = trials[keep].reset_index(drop=True)
    seen = trials["kind"].ne(3)
    trials["image"] = _imagined(trials["image"], seen)
    if (trials["image"] < 0).any():
        raise PerceptError(
            f"Trial {trials.loc[trials['image'] < 0, 'trial'].iloc[0]} imagines a category of which"
            " no picture was tested: read with imagery=False."
        )
    trials["repeat"] = number_repeats(
        trials.assign(trial=trials["trial"] + np.where(seen, 0, len(keep)))
    )
    trials["split"] = make_split_column(root, trials, val_images, seed).where(seen, "exclude")
    check_trials(trials)
    return trials, keep


def _imagined(image: pd.Series, seen: pd.Series) -> pd.Series:
    """Ids in which an imagined category (number of the picture 0) is the one test picture of this
    category, -1 without any.
    """
    category = ~seen & image.mod(UNIT).eq(0)
    pictures = {int(shown) // UNIT: int(shown) for shown in image[seen]}
    return image.mask(category, (image // UNIT).map(lambda number: pictures.get(number, -1)))


def image_id(name: str) -> int:
    """The id of a picture by its file name, n01443537_22563.JPEG -> 1443537022563.

    Raises:
        PerceptError: if it is no such name.
    """
    found = re.fullmatch(r"n(\d{8})_(\d{1,6})", Path(name).stem)
    if not found:
        raise PerceptError(
            f"{name} is no name of an ImageNet picture: it must be like n01443537_22563."
        )
    return int(found.group(1)) * UNIT + int(found.group(2))


def image_name(image: int) -> str:
    """The file name, without ending, of a picture by its id."""
    return f"n{image // UNIT:08d}_{image % UNIT}"


def _image_ids(part: BData, kind: np.ndarray, files: dict[str, Path]) -> np.ndarray:
    """Image of each sample, int64 (samples,); 0 as the number of the picture where an imagery row
    names a category alone.
    """
    for key in ("stimulus_id", "Label"):
        numbers = part.column(key)
        if numbers is not None:
            if numbers.dtype.itemsize < 8:
                raise PerceptError(
                    f"{part.path} is stored as {numbers.dtype}, which cannot hold {key} such as"
                    " 1443537.022563: fetch it again, or save it as float64."
                )
            return _from_numbers(numbers, kind, f"{key} of {part.path}")
    names = part.column("stimulus_name")
    if names is not None and part.stimulus_names:
        ids = {
            value: UNIT * int(name[1:]) if re.fullmatch(r"n\d{8}", name) else image_id(name)
            for value, name in part.stimulus_names.items()
        }
        return _looked_up(names, ids, kind, f"stimulus_name of {part.path}")
    index = part.column("image_index")
    if index is None:
        raise PerceptError(
            f"{part.path} names no pictures (stimulus_id, Label, stimulus_name or image_index): it"
            f" has {', '.join(sorted(part.metadata))}."
        )
    images = np.zeros(len(index), np.int64)
    for number in np.unique(kind):
        path = require_file(
            files.get(TABLES[number], part.path.parent / TABLES[number]),
            "the pictures by image_index",
            "fetch it from the authors' repository, folder data",
        )
        table = pd.read_csv(
            path, sep="\t", header=None
        )  # name, stimulus_id, index of the category, index of the image
        ids = dict(zip(table[3].astype(float), table[0].map(image_id), strict=True))
        images[kind == number] = _looked_up(
            index[kind == number], ids, kind[kind == number], f"image_index of {part.path}"
        )
    return images


def _looked_up(
    values: np.ndarray, ids: dict[float, int], kind: np.ndarray, where: str
) -> np.ndarray:
    images = np.array([ids.get(value, -1) for value in values.tolist()], np.int64)
    unknown = (images < 0) & (kind != 3)
    if unknown.any():
        raise PerceptError(
            f"Sample {np.flatnonzero(unknown)[0]} has {values[unknown][0]:g} as {where}, which no"
            " table names: fetch the files again."
        )
    return np.where(images < 0, 0, images)


def _from_numbers(numbers: np.ndarray, kind: np.ndarray, where: str) -> np.ndarray:
    """category.picture with six decimals -> ids; the decimals of a float64 are good to about 1e-9,
    so rounding is exact.
    """
    scaled = np.nan_to_num(numbers * UNIT)
    images = np.rint(scaled).astype(np.int64)
    wrong = (np.abs(scaled - images) > 0.05) | (images < 0) | ((images % UNIT == 0) & (kind != 3))
    if wrong.any():
        at = np.flatnonzero(wrong)[0]
        raise PerceptError(
            f"Sample {at} has {float(numbers[at])!r} as {where}: it must be like 1443537.022563, a"
            " category and a picture with six decimals in float64."
        )
    return images


def _store_pictures(
    root: Path, files: dict[str, Path], folder: Path, images: np.ndarray, image_size: int
) -> None:
    """Write the pictures, and the tables about them, into the dataset's folder."""
    stems = {path.stem: path for path in files.values() if path.suffix.lower() in PICTURES}
    missing = [image for image in images if image_name(image) not in stems]
    if missing and "images_256.npz" in files:
        order, blocks = _repacked(files, images, image_size)
    elif missing:
        raise PerceptError(
            f"Picture {image_name(missing[0])}.JPEG ({len(missing)} of {len(images)}) is missing"
            f" below {root}: ask the authors for the pictures (see TERMS), or put MinD-Vis's"
            " images_256.npz and its lists there."
        )
    else:
        paths = (stems[image_name(image)] for image in progress(images, "pictures", len(images)))
        order, blocks = images, load_images(paths, "Picture", image_size)
    write_images(folder / "images.h5", blocks, order)
    copy_tables(root, folder, set(images))
    if not (root / "labels.parquet").exists():
        names = [image_name(image) for image in images]
        write_image_table(
            folder / "labels.parquet",
            pd.DataFrame(
                {"image": images, "name": names, "category": [name.split("_")[0] for name in names]}
            ),
        )


def _repacked(
    files: dict[str, Path], images: np.ndarray, image_size: int
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Ids in the order of images_256.npz, and those of its pictures, read one at a time."""
    path = files["images_256.npz"]
    wanted: dict[str, list[tuple[int, int]]] = {}
    for array, lists in LISTS.items():
        listed = [files[name] for name in lists if name in files]
        if not listed:
            raise PerceptError(
                f"{path} needs {lists[0]} or {lists[1]} below the same source, which tells its"
                " pictures: fetch it."
            )
        ids = [image_id(name) for name in pd.read_csv(listed[0], header=None)[1]]
        wanted[array] = [
            (row, image) for row, image in enumerate(ids) if image in set(images.tolist())
        ]
    order = np.array([image for rows in wanted.values() for _, image in rows], np.int64)
    if len(absent := np.setdiff1d(images, order)):
        raise PerceptError(
            f"Picture {image_name(absent[0])} is not in the lists of {path}: ask the authors for"
            " the pictures."
        )

    def blocks() -> Iterator[np.ndarray]:
        for array, rows in wanted.items():
            yield from (
                center_crop_resize(pixels, image_size)[None]
                for pixels in _rows(path, array, {row for row, _ in rows})
            )

    return order, blocks()


def _rows(path: Path, name: str, wanted: set[int]) -> Iterator[np.ndarray]:
    """Some rows of an array of an .npz in turn, uint8 (height, width, 3), without loading the
    whole.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            header = (
                np.lib.format.read_array_header_1_0
                if np.lib.format.read_magic(file) == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = header(file)
            if fortran or dtype.hasobject or len(shape) != 4:
                raise ValueError(f"{name} is {dtype} {shape}")
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for row in progress(range(shape[0]), name, shape[0]):
                raw = file.read(size)
                if row in wanted:
                    pixels = np.frombuffer(raw, dtype).reshape(shape[1:])
                    yield (
                        pixels
                        if dtype == np.uint8
                        else np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
                    )
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError) as error:
        raise PerceptError(
            f"{path} is damaged, or not as MinD-Vis publishes it ({error}): fetch it again."
        ) from error
