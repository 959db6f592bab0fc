"""The mini world in the format of Algonauts 2023."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from src.data.files import disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.algonauts import FLAVOURS, HEMISPHERES, REGIONS
from src.utils import PerceptError


def write(
    source: str | Path,
    subj: int,
    betas: np.ndarray,
    trials: pd.DataFrame,
    images: np.ndarray,
    image_ids: np.ndarray,
    *,
    voxels: pd.DataFrame | None = None,
    captions: pd.DataFrame | None = None,
    labels: pd.DataFrame | None = None,
    flavour: str = "official",
    n_left: int | None = None,
) -> Path:
    """Write one subject; repeats are averaged, as they are in the published files, and rows follow
    the first showing of each image.

    The split goes to splits.csv, captions and labels to parquet files in the subject's folder. The
    format has no place for sessions, positions or noise ceilings.

    Args:
        source: folder in which subj01/ is made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, vertices), the left hemisphere first.
        trials: one row for each row of betas: trial, image, split; trials of split "exclude" are
            left out.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each; "official" writes them into the names, "course" names images
            by their row.
        voxels: its Boolean columns are the regions.
        captions: columns image and caption.
        labels: column image and categories.
        flavour: "official" or "course".
        n_left: vertices of the left hemisphere, by default the sum of voxels' column left, or the
            first half.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    if flavour not in FLAVOURS:
        raise PerceptError(
            f"flavour={flavour!r} is not known: choose one of {', '.join(FLAVOURS)}."
        )
    ids, mean, pictures, table = _averaged(betas, trials, images, image_ids)
    if n_left is None:
        n_left = (
            int(voxels["left"].sum())
            if voxels is not None and "left" in voxels
            else mean.shape[1] // 2
        )
    new_id = {image: image if flavour == "official" else row for row, image in enumerate(ids)}
    root = Path(source)
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".subj{subj:02d}.", dir=root))
    try:
        with disk_errors(root):
            _write_training(temporary / "training_split", mean, n_left, pictures, ids, flavour)
            _write_masks(temporary / "roi_masks", voxels, mean.shape[1], n_left, flavour)
            write_split(temporary, _renumber(table, new_id))
            write_tables(
                temporary,
                *(None if t is None else _renumber(t, new_id) for t in (captions, labels)),
            )
            folder = root / f"subj{subj:02d}"
            shutil.rmtree(folder, ignore_errors=True)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _averaged(
    betas: np.ndarray, trials: pd.DataFrame, images: np.ndarray, image_ids: np.ndarray
) -> tuple[list[int], np.ndarray, list[np.ndarray], pd.DataFrame]:
    """Ids in the order of their first showing, mean responses (images, vertices), pictures, and the
    split of each image.
    """
    ordered = check_aligned(betas, trials, images, image_ids, ("trial", "image", "split"))
    place = {int(image): row for row, image in enumerate(image_ids)}
    kept = ordered.query("split != 'exclude'")
    table = kept.drop_duplicates("image")[["image", "split"]]
    ids = [int(image) for image in table["image"]]
    rows = kept.groupby("image").groups
    mean = np.stack(
        [np.asarray(betas[np.sort(rows[image])], np.float64).mean(axis=0) for image in ids]
    ).astype(np.float32)
    return ids, mean, [images[place[image]] for image in ids], table


def _renumber(table: pd.DataFrame, new_id: dict[int, int]) -> pd.DataFrame:
    known = table[table["image"].isin(new_id)]
    return known.assign(image=known["image"].map(new_id))


def _write_training(
    folder: Path,
    mean: np.ndarray,
    n_left: int,
    pictures: list[np.ndarray],
    ids: list[int],
    flavour: str,
) -> None:
    for name in ("training_fmri", "training_images"):
        (folder / name).mkdir(parents=True)
    for side, part in zip(HEMISPHERES, (mean[:, :n_left], mean[:, n_left:]), strict=True):
        np.save(folder / "training_fmri" / f"{side}_training_fmri.npy", part)
    for row, (image, pixels) in enumerate(zip(ids, pictures, strict=True)):
        name = f"train-{row + 1:04d}_nsd-{image:05d}.png" if flavour == "official" else f"{row}.png"
        Image.fromarray(pixels).save(folder / "training_images" / name)


def _write_masks(
    folder: Path, voxels: pd.DataFrame | None, n_vertices: int, n_left: int, flavour: str
) -> None:
    """Label files: the regions of the published classes, and a class of its own for each other
    Boolean column.
    """
    folder.mkdir()
    columns = (
        []
        if voxels is None
        else [c for c in voxels.select_dtypes("bool").columns if c not in ("left", "right")]
    )
    listed = {name for names in REGIONS.values() for name in names}
    kinds = {kind: [n for n in names if n in columns] for kind, names in REGIONS.items()} | {
        c: [c] for c in columns if c not in listed
    }
    for kind, names in kinds.items():
        if voxels is None or not names:
            continue
        masks = voxels[names].to_numpy()
        if masks.shape != (n_vertices, len(names)) or (masks.sum(axis=1) > 1).any():
            raise PerceptError(
                f"The regions {', '.join(names)} of {kind} overlap or do not fit {n_vertices}"
                " vertices: one label a vertex is stored."
            )
        order = REGIONS.get(kind, (kind,))
        labels = sum(
            (mask * (order.index(name) + 1) for name, mask in zip(names, masks.T, strict=True)),
            start=np.zeros(n_vertices, np.int64),
        )
        for side, part in zip(HEMISPHERES, (labels[:n_left], labels[n_left:]), strict=True):
            np.save(folder / FLAVOURS[flavour].format(f"{side}.{kind}"), part)
        mapping: Any = {0: "Unknown"} | {label: name for label, name in enumerate(order, 1)}
        np.save(folder / f"mapping_{kind}.npy", mapping, allow_pickle=True)
