"""The mini world in the format of Algonauts 2023."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from src.files.ownership import replace_folder
from src.miniworld.formats.source_data import SourceData, write_split, write_tables
from src.readers.algonauts import FLAVOURS, HEMISPHERES, REGIONS
from src.utils import PerceptError


@dataclass(frozen=True)
class _Averages:
    """Responses averaged over repeats.

    Attributes:
        ids: images in the order of their first showing.
        responses: float32 (images, vertices), in this order.
        images: their pixels, in this order.
        split: columns image and split.
    """

    ids: list[int]
    responses: np.ndarray
    images: list[np.ndarray]
    split: pd.DataFrame


def write(
    source: str | Path,
    subj: int,
    data: SourceData,
    *,
    flavour: str = "official",
    n_left: int | None = None,
) -> Path:
    """Write one subject; repeats are averaged, as they are in the published files.

    Rows follow the first showing of each image. The split goes to splits.csv, captions and labels
    to parquet files in the subject's folder. The format has no place for sessions, positions or
    noise ceilings.

    Args:
        source: folder in which subj01/ is made; other subjects already there stay.
        subj: number of the subject.
        data: of the subject, the vertices of the left hemisphere first; trials of split "exclude"
            are left out. Boolean columns of voxels are the regions.
        flavour: "official", which writes image ids into names, or "course", which names images by
            their row.
        n_left: vertices of the left hemisphere, by default the sum of voxels' column left, or the
            first half.

    Returns:
        `source`.

    Raises:
        PerceptError: for an unknown flavour, regions that overlap, or a full disk.
    """
    if flavour not in FLAVOURS:
        raise PerceptError(
            f"flavour={flavour!r} is not known: choose one of {', '.join(FLAVOURS)}."
        )
    averages = _average_repeats(data)
    if n_left is None:
        n_left = _count_left(data)
    new_id = {image: image for image in averages.ids}
    if flavour == "course":
        new_id = {image: row for row, image in enumerate(averages.ids)}
    root = Path(source)
    with replace_folder(root / f"subj{subj:02d}") as temporary:
        _write_training(temporary / "training_split", averages, n_left, flavour)
        _write_masks(temporary / "roi_masks", data, n_left, flavour)
        write_split(temporary, _renumber(averages.split, new_id))
        captions, labels = (
            None if table is None else _renumber(table, new_id)
            for table in (data.captions, data.labels)
        )
        write_tables(temporary, captions, labels)
    return root


def _count_left(data: SourceData) -> int:
    if data.voxels is not None and "left" in data.voxels:
        return int(data.voxels["left"].sum())
    return data.n_voxels // 2


def _average_repeats(data: SourceData) -> _Averages:
    ordered = data.sort_trials(())
    row_of_image = {int(image): row for row, image in enumerate(data.image_ids)}
    included = ordered.query("split != 'exclude'")
    split = included.drop_duplicates("image")[["image", "split"]]
    ids = [int(image) for image in split["image"]]
    rows = included.groupby("image").groups
    means = []
    for image in ids:
        repeats = np.asarray(data.betas[np.sort(rows[image])], np.float64)
        means.append(repeats.mean(axis=0))
    return _Averages(
        ids=ids,
        responses=np.stack(means).astype(np.float32),
        images=[data.images[row_of_image[image]] for image in ids],
        split=split,
    )


def _renumber(table: pd.DataFrame, new_id: dict[int, int]) -> pd.DataFrame:
    """The rows of images that are written, under their new ids."""
    rows = table[table["image"].isin(new_id)]
    return rows.assign(image=rows["image"].map(new_id))


def _write_training(folder: Path, averages: _Averages, n_left: int, flavour: str) -> None:
    for name in ("training_fmri", "training_images"):
        (folder / name).mkdir(parents=True)
    halves = (averages.responses[:, :n_left], averages.responses[:, n_left:])
    for side, half in zip(HEMISPHERES, halves, strict=True):
        np.save(folder / "training_fmri" / f"{side}_training_fmri.npy", half)
    for row, (image, pixels) in enumerate(zip(averages.ids, averages.images, strict=True)):
        name = f"{row}.png"
        if flavour == "official":
            name = f"train-{row + 1:04d}_nsd-{image:05d}.png"
        Image.fromarray(pixels).save(folder / "training_images" / name)


def _write_masks(folder: Path, data: SourceData, n_left: int, flavour: str) -> None:
    """Write label files of the published classes; each other region is a class of its own."""
    folder.mkdir()
    if data.voxels is None:
        return
    columns = [name for name in data.roi_names if name not in ("left", "right")]
    published = {name for names in REGIONS.values() for name in names}
    classes = dict(REGIONS)
    classes |= {name: (name,) for name in columns if name not in published}
    for roi_class, names in classes.items():
        available = [name for name in names if name in columns]
        if not available:
            continue
        masks = data.voxels[available].to_numpy()  # (vertices, regions)
        if (masks.sum(axis=1) > 1).any():
            raise PerceptError(
                f"The regions {', '.join(available)} of {roi_class} overlap: one label a vertex is"
                " stored."
            )
        labels = np.zeros(data.n_voxels, np.int64)
        for name, is_member in zip(available, masks.T, strict=True):
            labels += is_member * (names.index(name) + 1)
        for side, half in zip(HEMISPHERES, (labels[:n_left], labels[n_left:]), strict=True):
            np.save(folder / FLAVOURS[flavour].format(f"{side}.{roi_class}"), half)
        mapping: Any = {0: "Unknown", **dict(enumerate(names, 1))}
        np.save(folder / f"mapping_{roi_class}.npy", mapping, allow_pickle=True)
