"""MindEye's webdataset shards (the published layout), read and written.

- <source>/webdataset_avg_split/{train,val,test}/<split>_subj01_0.tar ..., metadata_subj01.json (totals of
  images). A sample is an image with
  all its repeats: <key>.png or .jpg, nsdgeneral.npy (repeats, voxels), trial.npy, coco73k.npy,
      num_uniques.npy, perhaps wholebrain_3d.npy.
- The published arrays always have three rows: repeats beyond num_uniques are copies. They are not stored as
  trials.
- MindEye trained on its val shards as well (val="train"); here they stay validation by default. The test
  shards are the test set.
- The image id is coco73k; the session is trial // trials_per_session. The published shards have no captions,
  ROIs or categories: captions.parquet, labels.parquet and voxels_subj01.parquet beside the shards are picked
  up where they exist.
- One pass over each tar, its rows spooled to an unnamed temporary file; arrays are decoded with
  allow_pickle=False.
"""

from __future__ import annotations

import fcntl
import io
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from src.data import (
    check_trials,
    dataset_folder,
    disk_errors,
    number_repeats,
    subject_folder,
    write_images,
    write_subject,
)
from src.readers.common import Spool, copy_tables, write_tables
from src.utils import PerceptError, atomic, progress, read_json, resolve, write_json

LAYOUT = "webdataset_avg_split"
IMAGES = ("png", "jpg", "jpeg")
BETAS = ("nsdgeneral", "wholebrain_3d")
SPLITS = ("train", "val", "test")


# -------------------------------------------------------------------------------- reading
def read_if_missing(source: str, dataset: str, subj: int) -> None:
    """`read` for whoever begins with a later notebook: nothing happens without a source, or when the subject is prepared.

    Args:
        source: as for `read`, absolute or relative to the repository; "" for none.
        dataset: name of the prepared dataset.
        subj: number of the subject.
    """
    folder = subject_folder(dataset, subj)
    if not source or folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".subj{subj:02d}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one reads and the others find it done
        if not folder.exists():
            read(resolve(source), dataset, subj)


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    val: str = "val",
    trials_per_session: int = 750,
    betas: str = "nsdgeneral",
    protocol: str = "",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject's shards into the prepared layout.

    Args:
        source: folder that holds webdataset_avg_split/, or that folder itself.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        val: split of the val shards: "val", or "train" as MindEye did.
        trials_per_session: 750 in NSD.
        betas: "nsdgeneral", or "wholebrain_3d" where the shards have it.
        protocol: name of the protocol, by default nsd-<number of test images>.
        attributes: what is to be said about the betas where it is not what the published shards are (source,
            units, normalisation), e.g. for the mini world.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or truncated shards (naming shard and sample), or data that
            `write_subject` refuses.
    """
    if val not in ("val", "train") or betas not in BETAS or trials_per_session < 1:
        raise PerceptError(
            f"val={val!r} must be val or train, betas={betas!r} one of {list(BETAS)}, trials_per_session "
            "at least 1."
        )
    root = _root(Path(source))
    shards = {split: _shards(root, split, subj) for split in SPLITS}
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), Spool(folder) as rows, Spool(folder) as pixels:
        trials, image_ids = _read_shards(shards, subj, val, betas, rows, pixels)
        _check_totals(root, subj, trials)
        trials = _finish_trials(trials, trials_per_session)
        check_trials(trials)
        n_test = trials.loc[trials["split"] == "test", "image"].nunique()
        about: dict[str, Any] = {
            "source": "MindEye webdataset_avg_split", "units": "z-score", "normalisation": "by the source",
            "protocol": protocol or f"nsd-{n_test}", "val_shards": val, "betas": betas,
            "trials_per_session": trials_per_session, **(attributes or {}),
        }  # fmt: skip
        write_images(folder / "images.h5", pixels.array(), image_ids)
        copy_tables(root, folder, image_ids)
        voxels = _voxel_table(root, subj) if betas == "nsdgeneral" else None
        return write_subject(subject_folder(dataset, subj), rows.array(), trials, voxels, about)


def _root(source: Path) -> Path:
    root = source if source.name == LAYOUT else source / LAYOUT
    if not root.is_dir():
        raise PerceptError(f"There are no MindEye shards in {source}: give the folder that holds {LAYOUT}/.")
    return root


def _shards(root: Path, split: str, subj: int) -> list[Path]:
    """Shards of a split in the order of their numbers, none missing."""
    pattern = re.compile(rf"{split}_subj{subj:02d}_(\d+)\.tar")
    numbered = sorted(
        (int(m.group(1)), p) for p in (root / split).glob("*.tar") if (m := pattern.fullmatch(p.name))
    )
    missing = sorted(set(range(max(numbered)[0] + 1)) - {n for n, _ in numbered}) if numbered else [0]
    if missing:
        raise PerceptError(
            f"Shard {root / split}/{split}_subj{subj:02d}_{missing[0]}.tar is missing: fetch it again."
        )
    return [path for _, path in numbered]


def _read_shards(
    shards: dict[str, list[Path]], subj: int, val: str, betas: str, rows: Spool, pixels: Spool
) -> tuple[pd.DataFrame, list[int]]:
    """Spool betas and images: a table with image, split, trial (-1 where unknown) a row of betas, and the
    ids of the images."""
    records: list[tuple[int, str, int]] = []
    image_ids: dict[int, None] = {}
    todo = [(split, path) for split in SPLITS for path in shards[split]]
    for split, path in progress(todo, f"shards of subject {subj}", len(todo)):
        for key, fields in _samples(
            path, {f"{betas}.npy", "trial.npy", "coco73k.npy", "num_uniques.npy"} | set(IMAGES)
        ):
            what = f"Sample {key} of {path}"
            image, trial_numbers, repeats = _decode(fields, betas, what)
            if image not in image_ids:
                image_ids[image] = None
                pixels.append(_picture(fields, what), f"The image of {what}")
            for number, repeat in zip(trial_numbers, repeats, strict=True):
                rows.append(repeat, f"A row of {betas}.npy of {what}")
                records.append((image, val if split == "val" else split, number))
    return pd.DataFrame(records, columns=["image", "split", "trial"]), list(image_ids)


def _samples(path: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar: (key, {extension: bytes}). The members of a sample follow one another; the key ends
    at the first dot."""
    key, fields, end = "", {}, 0  # type: str, dict[str, bytes], int
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, extension = Path(member.name).name.partition(".")
                if key and name != key:
                    yield key, fields
                    fields = {}
                key, end = name, member.offset_data + -(-member.size // 512) * 512
                if extension in wanted:
                    file = tar.extractfile(member)
                    fields[extension] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PerceptError(
            f"Shard {path} is damaged or cut off at sample {key or '(the first)'} ({error}): fetch it again."
        ) from error
    with open(
        path, "rb"
    ) as file:  # a tar ends with two blocks of zeros; without them the download stopped between two members
        file.seek(end)
        if file.read(1024) != bytes(1024):
            raise PerceptError(f"Shard {path} is cut off after sample {key}: fetch it again.")
    if key:
        yield key, fields


def _array(fields: dict[str, bytes], name: str, what: str) -> np.ndarray:
    if f"{name}.npy" not in fields:
        raise PerceptError(f"{what} has no {name}.npy: it has {sorted(fields)}.")
    try:
        return np.load(io.BytesIO(fields[f"{name}.npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PerceptError(
            f"{name}.npy of {what} cannot be read ({error}): fetch the shard again."
        ) from error


def _decode(fields: dict[str, bytes], betas: str, what: str) -> tuple[int, list[int], np.ndarray]:
    """Image id, trial numbers (-1 where unknown), and the distinct repeats (repeats, voxels) or (repeats, x,
    y, z)."""
    coco = np.unique(_array(fields, "coco73k", what))
    if len(coco) != 1:
        raise PerceptError(f"coco73k.npy of {what} names the images {coco.tolist()[:5]}: it must name one.")
    responses = _array(fields, betas, what)
    responses = (
        responses[None] if responses.ndim in (1, 3) else responses
    )  # the early layout: a sample is a trial
    if responses.ndim not in (2, 4) or not np.issubdtype(responses.dtype, np.floating):
        raise PerceptError(
            f"{betas}.npy of {what} is {responses.dtype} {responses.shape}: it must be (repeats, voxels)."
        )
    distinct = [i for i, r in enumerate(responses) if not any(np.array_equal(r, s) for s in responses[:i])]
    if "num_uniques.npy" in fields:
        claimed = int(_array(fields, "num_uniques", what).ravel()[0])
        if not 1 <= claimed <= len(responses):
            raise PerceptError(
                f"num_uniques.npy of {what} is {claimed}, with {len(responses)} repeats in {betas}.npy."
            )
        distinct = distinct[:claimed]
    trial = _array(fields, "trial", what).ravel() if "trial.npy" in fields else np.array([])
    numbers = [int(trial[i]) for i in distinct] if len(trial) == len(responses) else [-1] * len(distinct)
    kept = responses[distinct]
    return int(coco[0]), numbers, kept if kept.dtype == np.float16 else kept.astype(np.float32)


def _picture(fields: dict[str, bytes], what: str) -> np.ndarray:
    """The image of a sample, uint8 (height, width, 3)."""
    found = [e for e in IMAGES if e in fields]
    if not found:
        raise PerceptError(f"{what} has no image (png or jpg): it has {sorted(fields)}.")
    try:
        return np.array(Image.open(io.BytesIO(fields[found[0]])).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise PerceptError(
            f"The image of {what} cannot be decoded ({error}): fetch the shard again."
        ) from error


def _finish_trials(trials: pd.DataFrame, trials_per_session: int) -> pd.DataFrame:
    """Add session, run and repeat. Where trial numbers are missing or occur twice, trials are numbered as
    they were read."""
    trials = trials.copy()
    if (trials["trial"] < 0).any() or trials["trial"].duplicated().any():
        warnings.warn(
            "The shards do not give a trial number to every repeat: all trials are taken as one session, 0.",
            stacklevel=3,
        )
        trials["trial"], trials["session"] = np.arange(len(trials)), 0
    else:
        trials["session"] = trials["trial"] // trials_per_session
    trials["run"] = -1  # not in the shards
    trials["repeat"] = number_repeats(trials)
    return trials


def _check_totals(root: Path, subj: int, trials: pd.DataFrame) -> None:
    """Compare the number of images with the metadata, as far as they tell it."""
    path = root / f"metadata_subj{subj:02d}.json"
    if not path.exists():
        warnings.warn(f"{path} is missing, so whether all shards are there cannot be told.", stacklevel=3)
        return
    totals = read_json(path).get("totals", {})
    announced, found = (
        sum(totals.get(s, 0) for s in ("train", "val")),
        trials.loc[trials["split"] != "test", "image"].nunique(),
    )
    if announced and announced != found:
        warnings.warn(
            f"{path.name} announces {announced} training and validation images, the shards hold {found}.",
            stacklevel=3,
        )


def _voxel_table(root: Path, subj: int) -> pd.DataFrame | None:
    for name in (f"voxels_subj{subj:02d}.parquet", "voxels.parquet"):
        if (root / name).exists():
            return pd.read_parquet(root / name)
    return None


# -------------------------------------------------------------------------------- writing
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
    repeats: int | None = None,
    samples_per_shard: int = 500,
    image_format: str = "png",
) -> Path:
    """Write one subject as MindEye's shards.

    Args:
        source: folder in which webdataset_avg_split/ is made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, voxels) float, or (trials, x, y, z), stored as wholebrain_3d beside the flattened
            nsdgeneral.
        trials: one row for each row of betas: trial, image, split; trials of split "exclude" are left out.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each; it becomes coco73k.
        voxels: ROI table, one row a voxel.
        captions: columns image and caption.
        labels: column image and categories.
        repeats: rows of a sample's array, by default the most repeats that an image has; filled up with
            copies as the published shards are.
        samples_per_shard: images a tar.
        image_format: png (exact) or jpg.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    if image_format not in ("png", "jpg") or samples_per_shard < 1:
        raise PerceptError(
            f"image_format={image_format!r} must be png or jpg, samples_per_shard={samples_per_shard} at "
            "least 1."
        )
    missing = {"trial", "image", "split"} - set(trials.columns)
    if missing or len(trials) != len(betas) or len(images) != len(image_ids):
        raise PerceptError(
            f"{len(betas)} betas, {len(trials)} trials (missing columns {sorted(missing)}), {len(images)} "
            "images and "
            f"{len(image_ids)} image ids do not fit each other."
        )
    root = Path(source) / LAYOUT
    place = {int(image): row for row, image in enumerate(image_ids)}
    ordered = trials.reset_index(drop=True).sort_values("trial")
    absent = ordered.loc[~ordered["image"].isin(place), "image"]
    if len(absent):
        raise PerceptError(f"Image {absent.iloc[0]} of the trials is not among the images given.")
    repeats = repeats or int(ordered.groupby("image").size().max())
    totals = {}
    with disk_errors(Path(source)):
        for split in SPLITS:
            groups = [
                (int(rows["image"].iloc[0]), rows)
                for _, rows in ordered[ordered["split"] == split].groupby("image")
            ]
            totals[split] = len(groups)
            samples = (
                (
                    image,
                    images[place[image]],
                    rows["trial"].to_numpy(),
                    np.asarray(betas[rows.index.to_numpy()]),
                )
                for image, rows in groups
            )
            _write_shards(
                root / split, f"{split}_subj{subj:02d}", samples, repeats, samples_per_shard, image_format
            )
        write_json(root / f"metadata_subj{subj:02d}.json", {"totals": totals})
        if voxels is not None:
            with atomic(root / f"voxels_subj{subj:02d}.parquet") as temporary:
                voxels.to_parquet(temporary)
        write_tables(root, captions, labels)
    return Path(source)


Sample = tuple[
    int, np.ndarray, np.ndarray, np.ndarray
]  # image id, pixels, trial numbers, responses of its trials


def _write_shards(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    repeats: int,
    samples_per_shard: int,
    image_format: str,
) -> None:
    """Write the shards of a split in place of those that were there, one empty shard if there are no samples."""
    shards = 0
    numbered = enumerate(samples)
    while (chunk := list(islice(numbered, samples_per_shard))) or not shards:
        with atomic(folder / f"{name}_{shards}.tar") as temporary, tarfile.open(temporary, "w") as tar:
            for number, sample in chunk:
                _add_sample(tar, f"{number:09d}", sample, repeats, image_format)
        shards += 1
    for old in folder.glob(f"{name}_*.tar"):
        if int(old.stem.rsplit("_", 1)[1]) >= shards:
            old.unlink()


def _add_sample(tar: tarfile.TarFile, key: str, sample: Sample, repeats: int, image_format: str) -> None:
    """Add one image with its trials to a shard; copies of its repeats fill its arrays up to `repeats` rows."""
    image, picture, trials, responses = sample
    unique = min(len(trials), repeats)
    filled = np.resize(np.arange(unique), repeats)
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(picture).save(buffer, "PNG")
    else:
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    arrays = {
        "nsdgeneral": responses[filled].reshape(repeats, -1),
        "trial": trials[filled],
        "coco73k": np.array([image]),
        "num_uniques": np.array([unique]),
    }
    if responses.ndim == 4:
        arrays["wholebrain_3d"] = responses[filled]
    members = {image_format: buffer.getvalue()}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
