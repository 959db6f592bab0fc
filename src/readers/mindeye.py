"""MindEye's webdataset shards: three releases, one folder each.

- webdataset_avg_split (what the paper used: 982 test images) and webdataset_avg_new (the same with
  the three sessions that were withheld until the Algonauts 2023 challenge was over: 1000 test
  images): {train,val,test}/<split>_subj01_0.tar ..., metadata_subj01.json (totals of images). A
  sample is an image with all its repeats: <key>.png or .jpg, nsdgeneral.npy (repeats, voxels),
  trial.npy, coco73k.npy, num_uniques.npy, perhaps wholebrain_3d.npy. The arrays always have three
  rows: repeats beyond num_uniques are copies, and are not stored as trials. MindEye trained on its
  val shards as well (val="train"); here they stay validation by default. The test shards are the
  test set.
- webdataset (the early system, subject 1): train/train_subj01_{0..49}.tar and val/val_subj01_0.tar,
  no test shards. A sample is a single trial, so an image may occur in several. Its val shards (492
  trials) are all that was held out, so here they are the test set; validation images are chosen
  among the training images (val_images, seed), unless a splits.csv (columns image, split) in that
  folder decides. Inferred: that no image lies on both sides (if one does, reading refuses and
  splits.csv is the way to settle it), and that samples may lack coco73k.npy: the image then is that
  of the trial in COCO_73k_subj_indices.hdf5, which must lie beside the shards.
- wholebrain_3d is kept as stored. Its axes are ambiguous: the early system's network asserts (81,
  104, 83), its configuration lists (83, 104, 81). The shape that was read is in the attributes.
- The image id is coco73k, the session is trial // trials_per_session. The published shards have no
  ROIs or categories: captions.parquet, labels.parquet and voxels_subj01.parquet in the folder of
  the release are picked up where they exist. Without captions.parquet, captions come from
  COCO_73k_annots_curated.npy (a row an image, up to five texts; inferred) in that folder or the one
  above. COCO_73k_subj_indices.hdf5 in either is compared with the shards.
- The shards are listed first, so that all that is missing or cut off is found before anything is
  written; betas and images are then read at their places, straight into the prepared files.
  Pickled arrays are refused.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import number_repeats
from src.files.foreign import load_json, load_parquet, shorten
from src.readers.coco_captions import ANNOTATIONS, load_curated_captions
from src.readers.common import (
    choose_validation,
    count_test_images,
    find_gap,
    find_in_folders,
    load_image_table,
    load_split_column,
    to_integers,
)
from src.readers.hdf5 import load_array, open_h5
from src.readers.mindeye_samples import INDICES, iterate_betas, iterate_images, list_shards
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import PerceptError

TERMS = (
    "Derived from the Natural Scenes Dataset: agree to its terms at"
    " https://naturalscenesdataset.org before use; neither data nor images may be passed on. The"
    " shards are the dataset pscotti/naturalscenesdataset on the Hugging Face hub."
)

PAPER, NEW, EARLY = "webdataset_avg_split", "webdataset_avg_new", "webdataset"

LAYOUTS = (PAPER, NEW, EARLY)

SPLITS = {  # folders of a release
    PAPER: ("train", "val", "test"),
    NEW: ("train", "val", "test"),
    EARLY: ("train", "val"),
}

BETAS = ("nsdgeneral", "wholebrain_3d")


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    val: str = "val",
    trials_per_session: int = 750,
    betas: str = "nsdgeneral",
    protocol: str = "",
    layout: str = "auto",
    val_images: int = 300,
    seed: int = 42,
    bad_voxels: str = "refuse",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject's shards into the prepared layout.

    Args:
        source: folder that holds webdataset_avg_split/ (or another release), or that folder itself.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        val: split of the val shards: "val", or "train" as MindEye did; in the early release they
            are the test set whatever this says.
        trials_per_session: 750 in NSD.
        betas: "nsdgeneral", or "wholebrain_3d" where the shards have it.
        protocol: name of the protocol, by default nsd-1000 for webdataset_avg_new, nsd-<number of
            test images> for webdataset_avg_split, nsd-early-<number of test images> for the early
            release.
        layout: the release: webdataset_avg_split, webdataset_avg_new, webdataset, or "auto" for the
            one that is there.
        val_images: validation images chosen among the training images, for the early release only.
        seed: of that choice.
        bad_voxels: refuse, drop or keep constant voxels and those that are NaN in a trial, see
            `store_recording`.
        attributes: what is to be said about the betas where it is not what the published shards are
            (source, units, normalisation), e.g. for the mini world.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or truncated shards (naming shard and sample), or data
            that `store_recording` refuses.
    """
    if val not in ("val", "train") or betas not in BETAS or trials_per_session < 1:
        raise PerceptError(
            f"val={val!r} must be val or train, betas={betas!r} one of {list(BETAS)},"
            " trials_per_session at least 1."
        )
    root = _find_release(Path(source), layout)
    is_early = root.name == EARLY
    val_split = "test" if is_early else val
    shards = {folder: _find_shards(root, folder, subj) for folder in SPLITS[root.name]}
    splits = {"train": "train", "val": val_split, "test": "test"}
    listing = list_shards(shards, splits, betas, _load_image_of_trial(root, subj))
    _check_totals(root, subj, listing.trials)
    trials = _add_sessions(listing.trials, trials_per_session)
    if is_early:
        trials["split"] = _early_split(root, trials, val_images, seed)
    published: dict[str, Any] = {
        "source": f"MindEye {root.name}",
        "units": "z-score",
        "normalisation": "by the source",
        "layout": root.name,
        "protocol": protocol or _default_protocol(root.name, count_test_images(trials)),
        "val_shards": val_split,
        "betas": betas,
        "trials_per_session": trials_per_session,
    }
    row_shape = listing.responses[0].row_shape
    if betas == "wholebrain_3d":
        published["volume_shape"] = ",".join(map(str, row_shape))
    image_ids = list(listing.images)
    recording = Recording(
        betas=RowBlocks((len(trials), *row_shape), iterate_betas(listing.responses, betas)),
        trials=trials,
        images=iterate_images(list(listing.images.values())),
        image_ids=np.array(image_ids),
        attributes={**published, **(attributes or {})},
        voxels=_load_voxels(root, subj) if betas == "nsdgeneral" else None,
        captions=_load_captions(root, image_ids),
        labels=load_image_table("labels", image_ids, root),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _default_protocol(layout: str, n_test: int) -> str:
    names = {PAPER: f"nsd-{n_test}", NEW: "nsd-1000", EARLY: f"nsd-early-{n_test}"}
    return names[layout]


# ------------------------------------------------------------------------------------------- files
def _find_release(source: Path, layout: str) -> Path:
    """Folder of the release that was named, or of the only one there is."""
    if layout not in ("auto", *LAYOUTS):
        raise PerceptError(f"layout is {layout!r}: choose auto or one of {', '.join(LAYOUTS)}.")
    names = LAYOUTS if layout == "auto" else (layout,)
    candidates = [source] if source.name in names else [source / name for name in names]
    folders = [folder for folder in candidates if folder.is_dir()]
    if not folders:
        choice = " or ".join(f"{name}/" for name in names)
        raise PerceptError(
            f"There are no MindEye shards in {source}: give the folder that holds {choice}."
        )
    if len(folders) > 1:
        raise PerceptError(
            f"{source} holds the releases {', '.join(path.name for path in folders)}, which differ"
            " in their test images: name one of them as layout."
        )
    return folders[0]


def _find_shards(root: Path, split: str, subj: int) -> list[Path]:
    """Shards of a split in the order of their numbers, none missing."""
    name = f"{split}_subj{subj:02d}"
    paths: dict[int, Path] = {}
    for path in (root / split).glob("*.tar"):
        match = re.fullmatch(rf"{name}_(\d+)\.tar", path.name)
        if match:
            paths[int(match[1])] = path
    gap = find_gap(paths, 0) if paths else 0
    if gap is not None:
        raise PerceptError(
            f"Shard {root / split}/{name}_{gap}.tar is missing: fetch all"
            f" shards of subject {subj}, or choose a subject that is there."
        )
    return [paths[number] for number in sorted(paths)]


def _load_image_of_trial(root: Path, subj: int) -> np.ndarray | None:
    """Image of each trial int64 (trials,) from COCO_73k_subj_indices.hdf5, or None.

    None where the file does not lie in the release's folder or the one above, or lacks the subject.
    """
    path = find_in_folders([INDICES], root, root.parent)
    if path is None:
        return None
    name = f"subj{subj:02d}"
    with open_h5(path) as file:
        if name not in file:
            return None
    return to_integers(load_array(path, name).ravel(), f"{name} of {path}")


def _load_voxels(root: Path, subj: int) -> pd.DataFrame | None:
    path = find_in_folders([f"voxels_subj{subj:02d}.parquet", "voxels.parquet"], root)
    return None if path is None else load_parquet(path, "write it again, or remove it")


def _load_captions(root: Path, image_ids: list[int]) -> pd.DataFrame | None:
    """Captions of captions.parquet, else of COCO_73k_annots_curated.npy (images, up to 5)."""
    table = load_image_table("captions", image_ids, root)
    path = find_in_folders([ANNOTATIONS], root, root.parent)
    if table is not None or path is None:
        return table
    return load_curated_captions(path, image_ids, image_ids)


# ------------------------------------------------------------------------------------------ trials
def _check_totals(root: Path, subj: int, trials: pd.DataFrame) -> None:
    """Compare the number of images with the metadata, as far as these count them."""
    path = root / f"metadata_subj{subj:02d}.json"
    if not path.exists():
        warnings.warn(
            f"{path} is missing, so whether all shards are there cannot be told.", stacklevel=3
        )
        return
    remedy = "fetch it again, or remove it"
    totals = load_json(path, remedy).get("totals", {})
    counts = (
        [totals.get(split, 0) for split in ("train", "val")] if isinstance(totals, dict) else []
    )
    if not counts or not all(isinstance(count, int) and 0 <= count < 2**63 for count in counts):
        raise PerceptError(
            f"{path} must give whole numbers of images as totals of train and val, it gives"
            f" {shorten(repr(totals))}: {remedy}."
        )
    announced = sum(counts)
    is_early = root.name == EARLY
    unit = "trials" if is_early else "training and validation images"
    count = len(trials)
    if not is_early:
        count = trials.loc[trials["split"] != "test", "image"].nunique()
    difference = f"{path} announces {announced} {unit}, the shards hold {count}"
    if count < announced and not is_early:  # what the early release counts is not documented
        raise PerceptError(
            f"{difference}: fetch the shards that are missing, or remove that file to read those"
            " there are."
        )
    if announced and announced != count:
        warnings.warn(f"{difference}.", stacklevel=3)


def _add_sessions(trials: pd.DataFrame, trials_per_session: int) -> pd.DataFrame:
    """Add session, run and repeat.

    Where trial numbers are missing or occur twice, trials are numbered as they were read.
    """
    trials = trials.copy()
    if (trials["trial"] < 0).any() or trials["trial"].duplicated().any():
        warnings.warn(
            "The shards do not give a trial number to every repeat: all trials are taken as one"
            " session, 0.",
            stacklevel=3,
        )
        trials["trial"] = np.arange(len(trials))
        trials["session"] = 0
    else:
        trials["session"] = trials["trial"] // trials_per_session
    trials["run"] = -1  # not in the shards
    trials["repeat"] = number_repeats(trials)
    return trials


def _early_split(root: Path, trials: pd.DataFrame, val_images: int, seed: int) -> pd.Series:
    split = load_split_column(root, trials)
    if split is not None:
        return split
    is_test = trials["split"] == "test"
    leaked = np.intersect1d(trials.loc[is_test, "image"], trials.loc[~is_test, "image"])
    if len(leaked):
        raise PerceptError(
            f"Image {leaked[0]} is in both the train and the val shards of {root} ({len(leaked)}"
            f" such images): settle it with {root / 'splits.csv'} (columns image and split), one"
            " side an image."
        )
    return choose_validation(trials, val_images, seed)
