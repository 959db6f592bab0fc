"""Pictures that trials name: a folder of image files, or an HDF5 file of images and their names.

- A folder is searched with its subfolders. A name may be the path below it, the file name, or the
  file name without ending; upper and lower case differ. The id of a picture is its name as a number
  where all names are distinct numbers, else its place in the sorted list.
- An HDF5 file has the dataset `images`: uint8 (n, height, width, 3), or one encoded file (JPEG,
  PNG) of variable length a row. The names are in its dataset `names`, or in the column image_name
  (or name) of a table, .csv or .tsv. The id of a picture is its row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from src.files.foreign import load_csv, read_errors, walk_files
from src.files.images import IMAGE_SUFFIXES, decode_image
from src.readers.common import center_crop_resize, load_images
from src.readers.hdf5 import check_dataset, open_h5
from src.utils import PerceptError, progress, require_file

MAX_DIGITS = 15  # of a name that is taken as a number

NAME_COLUMNS = ("image_name", "name", "image", "filename")


class Pictures(ABC):
    """Pictures that are found by name.

    Attributes:
        path: the folder or file.
        names: of all pictures, in the order of their rows.
    """

    def __init__(self, path: Path, names: list[str]):
        self.path = path
        self.names = names
        self._rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            for key in list_keys(name):
                self._rows.setdefault(key, []).append(row)

    def find_row(self, name: str) -> int:
        """Row of a picture.

        Raises:
            PerceptError: if there is none of this name, or more than one.
        """
        for key in (name, PurePosixPath(name).name):
            rows = self._rows.get(key, [])
            if len(rows) == 1:
                return rows[0]
            if rows:
                raise PerceptError(
                    f"{self.path} has {self.names[rows[0]]!r} and {self.names[rows[1]]!r}, and the"
                    f" trials name {name!r}: write the path below that folder into their table."
                )
        raise PerceptError(
            f"{self.path} has no picture {name!r}, which was shown: put it there, or list its name"
            " in the option skip where it is no stimulus."
        )

    def number(self, row: int) -> int:
        """Image id of a row."""
        return row

    @abstractmethod
    def iterate(self, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
        """Blocks uint8 (1, height, width, 3) of the pictures in some rows, cut to squares."""


def list_keys(name: str) -> set[str]:
    """What a picture may be called: its path, its file name, and each without ending."""
    path = PurePosixPath(name)
    keys = {name, path.name}
    if path.suffix.lower() in IMAGE_SUFFIXES:
        keys |= {path.stem, str(path.with_suffix(""))}
    return keys


def open_pictures(path: Path, names: Path | None = None) -> Pictures:
    """Open a folder or an HDF5 file of pictures.

    Args:
        path: the folder or file.
        names: table of the names of an HDF5 file, None for its own.

    Raises:
        PerceptError: if it is missing, damaged, or holds no pictures.
    """
    require_file(path, "the pictures that were shown")
    return FolderPictures(path) if path.is_dir() else StackedPictures(path, names)


class FolderPictures(Pictures):
    """Image files of a folder and its subfolders."""

    def __init__(self, path: Path):
        self.files = [file for file in walk_files(path) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise PerceptError(f"{path} holds no image files: give the folder of the pictures.")
        super().__init__(path, [file.relative_to(path).as_posix() for file in self.files])
        stems = [file.stem for file in self.files]
        is_number = all(stem.isdecimal() and len(stem) <= MAX_DIGITS for stem in stems)
        self.numbers: list[int] | None = None
        if is_number and len({int(stem) for stem in stems}) == len(stems):
            self.numbers = [int(stem) for stem in stems]

    def number(self, row: int) -> int:
        """Image id of a row: its name as a number, or the row."""
        return row if self.numbers is None else self.numbers[row]

    def iterate(self, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
        """See `Pictures.iterate`."""
        files = [self.files[row] for row in rows]
        yield from load_images(progress(files, "images", len(files)), "Picture", image_size)


class StackedPictures(Pictures):
    """The dataset `images` of an HDF5 file."""

    def __init__(self, path: Path, names: Path | None):
        with open_h5(path, "the pictures that were shown") as file:
            dataset = _find_images(file, path)
            n_images = len(dataset)
            if names is None:
                name_list = _load_own_names(file, path)
            else:
                name_list = load_names(names)
        if len(name_list) != n_images:
            raise PerceptError(
                f"{path} has {n_images} images, {names or 'its dataset names'} has"
                f" {len(name_list)} names: give the two of one version."
            )
        super().__init__(path, name_list)

    def iterate(self, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
        """See `Pictures.iterate`."""
        with open_h5(self.path) as file:
            dataset = _find_images(file, self.path)
            for row in progress(rows.tolist(), "images"):
                with read_errors(self.path):
                    content = dataset[row]
                if content.ndim == 1:
                    origin = f"Picture {self.names[row]} of {self.path}"
                    content = decode_image(content.tobytes(), origin)
                yield center_crop_resize(content, image_size)[None]


def _find_images(file: h5py.File, path: Path) -> h5py.Dataset:
    """The dataset `images`, checked."""
    dataset = file.get("images")
    is_encoded = isinstance(dataset, h5py.Dataset) and h5py.check_vlen_dtype(dataset.dtype) == "u1"
    if is_encoded and dataset.ndim == 1:
        return dataset
    is_array = isinstance(dataset, h5py.Dataset) and dataset.dtype == np.uint8
    if not is_array or dataset.ndim != 4 or dataset.shape[-1] != 3:
        raise PerceptError(
            f"{path} has no dataset images of uint8 (n, height, width, 3), or of one encoded image"
            " a row: give the file of the pictures."
        )
    check_dataset(dataset)
    return dataset


def _load_own_names(file: h5py.File, path: Path) -> list[str]:
    with read_errors(path):
        dataset = file.get("names")
        if isinstance(dataset, h5py.Dataset) and dataset.ndim == 1:
            return [str(name) for name in dataset.asstr()[:]]
    raise PerceptError(
        f"{path} has no dataset names, which says what each image is called: give the table of the"
        " names with the option image_names."
    )


def load_names(path: Path) -> list[str]:
    """The names of pictures in a table, .csv or .tsv, row by row.

    Raises:
        PerceptError: if it cannot be read, or has no column of names.
    """
    separator = "\t" if path.suffix == ".tsv" else ","
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "sep": separator}
    table = load_csv(require_file(path, "the names of the pictures"), **options)
    column = next((name for name in NAME_COLUMNS if name in table), None)
    if column is None:
        raise PerceptError(
            f"{path} has no column {' or '.join(NAME_COLUMNS)}: it has {list(table)[:12]}."
        )
    return list(table[column])
