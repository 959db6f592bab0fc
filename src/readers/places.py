"""Where the columns of betas lie: voxels of a grid, vertices of a surface, or grayordinates.

`Places` says it for a file of betas; `load_map` loads one value a place (a mask, an atlas, a noise
ceiling) and refuses a map of another grid, affine or mesh. Nothing is resampled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.files.foreign import load_csv, load_npy, read_errors
from src.readers.common import to_integers
from src.readers.volumes import open_nifti
from src.utils import PerceptError, require_extra, require_file

AFFINE_TOLERANCE = 1e-3  # mm, of an entry of the affine

MAP_SUFFIXES = (".nii", ".nii.gz", ".gii", ".mgh", ".mgz", ".annot", ".npy")

HEMISPHERE = re.compile(r"hemi-([LR])(?![A-Za-z0-9])|(?:^|[._])([lr])h(?=[._])")

CORTEX = {"CIFTI_STRUCTURE_CORTEX_LEFT": "L", "CIFTI_STRUCTURE_CORTEX_RIGHT": "R"}


@dataclass(frozen=True)
class Places:
    """The voxels, vertices or grayordinates of betas, in the order of their columns.

    Attributes:
        shape: (x, y, z) of a grid, whose voxels are counted in C order, or (n,) of anything else.
        affine: (4, 4), voxel indices -> mm; None where it is not known.
        index: place in the grid, counted in C order, of each column; None where every voxel of the
            grid has a column.
        table: of vertices (hemi, vertex) and grayordinates (structure, hemi, vertex, i, j, k; -1
            for what does not apply) one row a column, else None.
    """

    shape: tuple[int, ...]
    affine: np.ndarray | None = None
    index: np.ndarray | None = None
    table: pd.DataFrame | None = None

    @cached_property
    def size(self) -> int:
        """Number of columns."""
        return int(np.prod(self.shape)) if self.index is None else len(self.index)

    @property
    def kind(self) -> str:
        """volume, surface, grayordinates, or columns, of which nothing is known."""
        if len(self.shape) == 3:
            return "volume"
        if self.table is None:
            return "columns"
        return "grayordinates" if "structure" in self.table else "surface"

    def describe(self, columns: np.ndarray) -> pd.DataFrame:
        """The table of voxels of some columns: i, j, k (and x, y, z in mm), or hemi and vertex."""
        if self.table is not None:
            return self.table.iloc[columns].reset_index(drop=True)
        if self.kind == "columns":
            return pd.DataFrame({"column": columns})
        flat = columns if self.index is None else self.index[columns]
        ijk = np.stack(np.unravel_index(flat, self.shape), axis=1)
        table = pd.DataFrame(ijk, columns=["i", "j", "k"])
        if self.affine is not None:
            table[["x", "y", "z"]] = ijk @ self.affine[:3, :3].T + self.affine[:3, 3]
        return table

    def list_attributes(self) -> dict[str, str]:
        """What a map on these places needs besides the table of voxels, as texts."""
        attributes = {"space_kind": self.kind}
        if self.kind == "volume":
            attributes["grid"] = json.dumps(list(self.shape))
        if self.affine is not None:
            attributes["affine"] = json.dumps(np.asarray(self.affine, float).tolist())
        if self.kind == "surface" and self.table is not None:
            counts = self.table.groupby("hemi", sort=True).size()
            attributes["vertices"] = json.dumps({str(k): int(n) for k, n in counts.items()})
        return attributes


@dataclass(frozen=True)
class PlaceMap:
    """One value a place, as a file has it.

    Attributes:
        values: (n,) for each column of the places.
        names: of labels, where the file or the table beside it gives them.
    """

    values: np.ndarray
    names: dict[int, str]


@dataclass(frozen=True)
class _Content:
    """Values of one file, (x, y, z) or (n,), and what it says of their places."""

    values: np.ndarray
    names: dict[int, str]
    affine: np.ndarray | None = None
    table: pd.DataFrame | None = None


def join_hemispheres(parts: Sequence[tuple[str, Places]]) -> Places:
    """The places of several hemispheres ("L" or "R" and their places), one after the other."""
    tables = [
        pd.DataFrame({"hemi": side, "vertex": np.arange(places.size)}) for side, places in parts
    ]
    table = pd.concat(tables, ignore_index=True)
    return Places((len(table),), table=table)


def check_same_places(
    places: Places, path: Path, reference: Places, reference_path: Path | str
) -> None:
    """Refuse places that are not those of a reference.

    Raises:
        PerceptError: naming both files, and what differs: the shape, the affine or the order.
    """
    remedy = "take files of the same subject and space, as nothing is resampled"
    if places.shape != reference.shape:
        raise PerceptError(
            f"{path} has the shape {places.shape}, {reference_path} has {reference.shape}:"
            f" {remedy}."
        )
    check_affine(places.affine, path, reference.affine, reference_path)
    is_same = places.table is None or places.table.equals(reference.table)  # type: ignore[arg-type]
    if not is_same:
        raise PerceptError(
            f"{path} has its vertices or grayordinates in another order than {reference_path}:"
            f" {remedy}."
        )


def check_affine(
    affine: np.ndarray | None, path: Path, reference: np.ndarray | None, reference_path: Path | str
) -> None:
    """Refuse an affine that differs from a reference by more than a thousandth of a millimetre.

    Raises:
        PerceptError: naming both files and the largest difference.
    """
    if affine is None or reference is None:
        return
    difference = float(np.abs(affine - reference).max())
    if not difference <= AFFINE_TOLERANCE:
        raise PerceptError(
            f"The affine of {path} differs from that of {reference_path} by up to {difference:.4g}:"
            " take files on the same grid, as nothing is resampled."
        )


def find_hemisphere(path: Path | str) -> str:
    """The hemisphere that a file name says, "L" or "R"; "" for none (hemi-L, lh.)."""
    match = HEMISPHERE.search(Path(path).name)
    if match is None:
        return ""
    return (match[1] or match[2]).upper()


def strip_hemisphere(path: Path | str) -> str:
    """The file name without the part that says the hemisphere."""
    return HEMISPHERE.sub("", Path(path).name)


# ------------------------------------------------------------------------------- headers of files
def read_cifti_places(image: Any, path: Path) -> Places:
    """The grayordinates of a CIFTI file, as the second axis of its matrix names them.

    Raises:
        PerceptError: for a file whose second axis is none of brain models.
    """
    nibabel = require_extra("nibabel", "nsd")
    with read_errors(path):
        axis = image.header.get_axis(1)
    if not isinstance(axis, nibabel.cifti2.BrainModelAxis):
        raise PerceptError(
            f"{path} has {type(axis).__name__} as its second axis, where grayordinates are expected"
            ": give a dscalar, dtseries or dlabel file."
        )
    table = pd.DataFrame({"structure": np.asarray(axis.name, str), "vertex": axis.vertex})
    table["hemi"] = table["structure"].map(CORTEX).fillna("")
    table[["i", "j", "k"]] = axis.voxel
    columns = ["structure", "hemi", "vertex", "i", "j", "k"]
    return Places((len(table),), affine=axis.affine, table=table[columns])


def is_cifti(path: Path) -> bool:
    """Whether a file is CIFTI by its name, such as x.dscalar.nii."""
    return bool(re.search(r"\.d(scalar|tseries|label)\.nii$", path.name))


# ------------------------------------------------------------------------------------------- maps
def load_map(paths: Iterable[Path], places: Places, betas_path: Path | str) -> PlaceMap:
    """Load a map: one file, or one a hemisphere.

    Args:
        paths: of the files; a hemisphere without a file has zeros.
        places: of the betas.
        betas_path: whose places they are, for errors.

    Raises:
        PerceptError: for a missing or damaged file, or one on other places.
    """
    paths = sorted(paths, key=find_hemisphere)
    contents = [_load_content(path) for path in paths]
    names = {label: name for content in contents for label, name in content.names.items()}
    if places.kind != "surface":
        return PlaceMap(_to_columns(contents[0], paths[0], places, betas_path), names)
    table = places.table
    values = np.zeros(places.size, np.result_type(*(content.values for content in contents)))
    for path, content in zip(paths, contents, strict=True):
        side = find_hemisphere(path)
        is_side = np.ones(places.size, bool)
        if side and table is not None:
            is_side = (table["hemi"] == side).to_numpy()
        _check_size(content.values.size, int(is_side.sum()), path, betas_path)
        values[is_side] = content.values.ravel()
    return PlaceMap(values, names)


def _to_columns(
    content: _Content, path: Path, places: Places, betas_path: Path | str
) -> np.ndarray:
    """The values of a map in the order of the columns of the betas."""
    values = content.values
    if places.kind == "volume":
        if values.shape != places.shape:
            raise PerceptError(
                f"{path} has the shape {values.shape}, {betas_path} has {places.shape}: take files"
                " of the same subject and space, as nothing is resampled."
            )
        check_affine(content.affine, path, places.affine, betas_path)
        flat = values.ravel()
        return flat if places.index is None else flat[places.index]
    if content.table is not None:
        own_places = Places((values.size,), content.affine, table=content.table)
        check_same_places(own_places, path, places, betas_path)
    _check_size(values.size, places.size, path, betas_path)
    return values.ravel()


def _check_size(n_values: int, n_places: int, path: Path, betas_path: Path | str) -> None:
    if n_values != n_places:
        raise PerceptError(
            f"{path} has {n_values} values, {betas_path} has {n_places} places for them: take files"
            " of the same subject and surface."
        )


def _load_content(path: Path) -> _Content:
    """The values of a map's file, with the names of labels that it or the table beside it has."""
    require_file(path, "a mask or map")
    if path.suffix == ".annot":
        return _load_annotation(path)
    if path.suffix == ".npy":
        return _Content(np.asarray(load_npy(path)), {})
    if path.suffix == ".gii":
        return _load_gifti_map(path)
    image = open_nifti(path, "a mask or map")
    names = load_label_names(path)
    if is_cifti(path):
        return _load_cifti_map(image, path, names)
    with read_errors(path):
        values = np.asanyarray(image.dataobj)
    is_surface = path.suffix in (".mgh", ".mgz") and values.shape[1:3] == (1, 1)
    if is_surface:
        return _Content(values.ravel(), names)
    if values.ndim < 3 or values.size != np.prod(values.shape[:3]):
        raise PerceptError(
            f"{path} has the shape {values.shape}: a mask or map has one value a voxel, (x, y, z)."
        )
    return _Content(values.reshape(values.shape[:3]), names, image.affine)


def _load_annotation(path: Path) -> _Content:
    nibabel = require_extra("nibabel", "nsd")
    with read_errors(path):
        labels, _, names = nibabel.freesurfer.read_annot(path)
    texts = [name.decode() for name in names]
    return _Content(labels, {label: name for label, name in enumerate(texts) if label > 0})


def _load_gifti_map(path: Path) -> _Content:
    nibabel = require_extra("nibabel", "nsd")
    with read_errors(path):
        image = nibabel.load(path)
        values = np.asarray(image.darrays[0].data)
        names = image.labeltable.get_labels_as_dict()
    return _Content(values, {int(label): str(name) for label, name in names.items()})


def _load_cifti_map(image: Any, path: Path, names: dict[int, str]) -> _Content:
    nibabel = require_extra("nibabel", "nsd")
    places = read_cifti_places(image, path)
    with read_errors(path):
        values = np.asarray(image.dataobj[0])
        first = image.header.get_axis(0)
        if isinstance(first, nibabel.cifti2.LabelAxis):
            names = {int(label): name for label, (name, _) in first.label[0].items()}
    return _Content(values, names, places.affine, places.table)


def load_label_names(path: Path) -> dict[int, str]:
    """Names of the labels of an atlas, from the table of index and name beside it; {} for none.

    The table has the name of the atlas with .tsv, or is <seg-, atlas- or desc- entity>_dseg.tsv in
    its folder or a folder above, as fMRIPrep writes it.
    """
    stem = path.name.split(".")[0]
    candidates = [path.with_name(f"{stem}.tsv")]
    entity = re.search(r"(?:seg|atlas|desc)-[A-Za-z0-9]+", stem)
    if entity is not None and stem.endswith("_dseg"):
        candidates += [folder / f"{entity[0]}_dseg.tsv" for folder in list(path.parents)[:5]]
    table_path = next((candidate for candidate in candidates if candidate.exists()), None)
    if table_path is None:
        return {}
    table = load_csv(table_path, ("index", "name"), sep="\t")
    indices = to_integers(table["index"].to_numpy(), f"Column index of {table_path}")
    return dict(zip(indices.tolist(), table["name"].astype(str), strict=True))


# ---------------------------------------------------------------------------------------- regions
def load_regions(
    paths: Iterable[Path], places: Places, betas_path: Path | str
) -> dict[str, np.ndarray]:
    """Masks (n,) of all regions in some files of masks and atlases.

    A file of zeros and ones is one region, called as `name_region` says; any other is an atlas,
    each label above 0 a region, called by its name, or <file>-<label> without one. Files of the two
    hemispheres belong together.

    Raises:
        PerceptError: as `load_map`; for labels that are no whole numbers.
    """
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(f"{path.parent}/{strip_hemisphere(path)}", []).append(path)
    regions: dict[str, np.ndarray] = {}
    for members in groups.values():
        content = load_map(members, places, betas_path)
        values, region = np.nan_to_num(content.values, nan=0), name_region(members[0])
        labels = to_integers(values, f"A label in {members[0]}")
        present_labels = np.unique(labels[labels > 0]).tolist()
        is_mask = not any(
            label in content.names for label in present_labels
        ) and present_labels in ([], [1])
        for label in present_labels or [1]:
            default = region if is_mask else f"{region}-{label}"
            name = content.names.get(label, default)
            if name in regions:
                name = f"{region}:{name}"
            regions[name] = labels == label
    return regions


def name_region(path: Path) -> str:
    """Name of the region of a mask: its entity label-, else desc-, else the file without ending."""
    stem = strip_hemisphere(path)
    for entity in ("label", "desc"):
        match = re.search(rf"{entity}-([^_.]+)", stem)
        if match:
            return match[1]
    return stem.split(".nii")[0].split(".gii")[0].strip("._")


def load_coordinates(paths: Iterable[Path], places: Places, betas_path: Path | str) -> np.ndarray:
    """Coordinates (n, 3) in mm of the vertices, from one GIFTI mesh a hemisphere.

    Raises:
        PerceptError: for a damaged file, or meshes of other numbers of vertices.
    """
    nibabel = require_extra("nibabel", "nsd")
    parts = []
    for path in sorted(paths, key=find_hemisphere):
        with read_errors(path):
            mesh = nibabel.load(path)
            parts.append(mesh.agg_data("NIFTI_INTENT_POINTSET"))
    coordinates = np.concatenate(parts)
    _check_size(len(coordinates), places.size, Path(path), betas_path)
    return coordinates
