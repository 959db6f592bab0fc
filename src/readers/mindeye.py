"""MindEye's webdataset shards, read and written: three releases, one folder each.

- webdataset_avg_split (what the paper used: 982 test images) and webdataset_avg_new (the same with the three sessions that were withheld until the
  Algonauts 2023 challenge was over: 1000 test images): {train,val,test}/<split>_subj01_0.tar ..., metadata_subj01.json (totals of images). A sample is
  an image with all its repeats: <key>.png or .jpg, nsdgeneral.npy (repeats, voxels), trial.npy, coco73k.npy, num_uniques.npy, perhaps wholebrain_3d.npy.
  The arrays always have three rows: repeats beyond num_uniques are copies, and are not stored as trials. MindEye trained on its val shards as well
  (val="train"); here they stay validation by default. The test shards are the test set.
- webdataset (the early system, subject 1): train/train_subj01_{0..49}.tar and val/val_subj01_0.tar, no test shards. A sample is a single trial, so an
  image may occur in several. Its val shards (492 trials) are all that was held out, so here they are the test set; validation images are chosen
  among the training images (val_images, seed), unless a splits.csv (columns image, split) in that folder decides. Inferred: that no image lies on both sides
  (if one does, reading refuses and splits.csv is the way to settle it), and that samples may lack coco73k.npy: the image then is that of the trial in
  COCO_73k_subj_indices.hdf5, which must lie beside the shards.
- wholebrain_3d is kept as stored. Its axes are ambiguous: the early system's network asserts (81, 104, 83), its configuration lists (83, 104, 81).
  The shape that was read is in the attributes.
- The image id is coco73k, the session is trial // trials_per_session. The published shards have no ROIs or categories: captions.parquet,
  labels.parquet and voxels_subj01.parquet in the folder of the release are picked up where they exist. Without captions.parquet, captions come from
  COCO_73k_annots_curated.npy (a row an image, up to five texts; inferred) in that folder or the one above. COCO_73k_subj_indices.hdf5 in either is
  compared with the shards.
- One pass over each tar, its rows spooled to an unnamed temporary file; arrays are decoded with allow_pickle=False.
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

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from src.data import (
    check_trials,
    dataset_folder,
    disk_errors,
    number_repeats,
    subject_folder,
    write_image_table,
    write_images,
    write_subject,
)
from src.readers.common import Spool, choose_validation, copy_tables, own_split, picture, unpickle_npy, write_split, write_tables
from src.utils import PerceptError, atomic, progress, read_json, resolve, write_json

TERMS = (
    "Derived from the Natural Scenes Dataset: agree to its terms at https://naturalscenesdataset.org before use; neither data nor images may be passed on. "
    "The shards are the dataset pscotti/naturalscenesdataset on the Hugging Face hub."
)
PAPER, NEW, EARLY = "webdataset_avg_split", "webdataset_avg_new", "webdataset"
LAYOUTS = (PAPER, NEW, EARLY)
IMAGES = ("png", "jpg", "jpeg")
INDICES, ANNOTATIONS = "COCO_73k_subj_indices.hdf5", "COCO_73k_annots_curated.npy"
BETAS = ("nsdgeneral", "wholebrain_3d")
SPLITS = {PAPER: ("train", "val", "test"), NEW: ("train", "val", "test"), EARLY: ("train", "val")}  # folders of a release


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
    layout: str = "auto",
    val_images: int = 300,
    seed: int = 42,
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject's shards into the prepared layout.

    Args:
        source: folder that holds webdataset_avg_split/ (or another release), or that folder itself.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        val: split of the val shards: "val", or "train" as MindEye did; in the early release they are the test set whatever this says.
        trials_per_session: 750 in NSD.
        betas: "nsdgeneral", or "wholebrain_3d" where the shards have it.
        protocol: name of the protocol, by default nsd-1000 for webdataset_avg_new, nsd-<number of test images> for webdataset_avg_split,
            nsd-early-<number of test images> for the early release.
        layout: the release: webdataset_avg_split, webdataset_avg_new, webdataset, or "auto" for the one that is there.
        val_images: validation images chosen among the training images, for the early release only.
        seed: of that choice.
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
    root = _root(Path(source), layout)
    early = root.name == EARLY
    shards = {split: _shards(root, split, subj) for split in SPLITS[root.name]}
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), Spool(folder) as rows, Spool(folder) as pixels:
        names = {"train": "train", "val": "test" if early else val, "test": "test"}
        trials, image_ids = _read_shards(shards, names, betas, _images_of_trials(root, subj), rows, pixels)
        _check_totals(root, subj, trials)
        trials = _finish_trials(trials, trials_per_session)
        if early:
            own = own_split(root, trials)
            trials["split"] = choose_validation(trials, val_images, seed) if own is None else own
        check_trials(trials)
        n_test = trials.loc[trials["split"] == "test", "image"].nunique()
        about: dict[str, Any] = {
            "source": f"MindEye {root.name}", "units": "z-score", "normalisation": "by the source", "layout": root.name,
            "protocol": protocol or {PAPER: f"nsd-{n_test}", NEW: "nsd-1000", EARLY: f"nsd-early-{n_test}"}[root.name],
            "val_shards": names["val"], "betas": betas, "trials_per_session": trials_per_session,
            **({"volume_shape": ",".join(map(str, rows.array().shape[1:]))} if betas == "wholebrain_3d" else {}), **(attributes or {}),
        }  # fmt: skip
        write_images(folder / "images.h5", pixels.array(), image_ids)
        copy_tables(root, folder, image_ids)
        _copy_captions(root, folder, image_ids)
        voxels = _voxel_table(root, subj) if betas == "nsdgeneral" else None
        return write_subject(subject_folder(dataset, subj), rows.array(), trials, voxels, about)


def _root(source: Path, layout: str) -> Path:
    """Folder of the release that was named, or of the only one there is."""
    if layout not in ("auto", *LAYOUTS):
        raise PerceptError(f"layout is {layout!r}: choose auto or one of {', '.join(LAYOUTS)}.")
    wanted = LAYOUTS if layout == "auto" else (layout,)
    if source.name in wanted:
        found = [source] if source.is_dir() else []
    else:
        found = [source / name for name in wanted if (source / name).is_dir()]
    if not found:
        raise PerceptError(f"There are no MindEye shards in {source}: give the folder that holds {' or '.join(f'{name}/' for name in wanted)}.")
    if len(found) > 1:
        raise PerceptError(f"{source} holds the releases {', '.join(path.name for path in found)}, which differ in their test images: name one of them as layout.")
    return found[0]


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
    shards: dict[str, list[Path]], names: dict[str, str], betas: str, seen: np.ndarray | None, rows: Spool, pixels: Spool
) -> tuple[pd.DataFrame, list[int]]:
    """Spool betas and images.

    Args:
        shards: of each folder.
        names: the split that each folder is.
        betas: nsdgeneral or wholebrain_3d.
        seen: (trials,) image of each trial, where it is known.
        rows: takes the betas.
        pixels: takes the images.

    Returns:
        A table with image, split, trial (-1 where unknown), one line a row of betas; and the ids of the images.
    """
    records: list[tuple[int, str, int]] = []
    image_ids: dict[int, None] = {}
    wanted = {f"{betas}.npy", "trial.npy", "coco73k.npy", "num_uniques.npy"} | set(IMAGES)
    todo = [(names[split], path) for split in shards for path in shards[split]]
    for split, path in progress(todo, "shards", len(todo)):
        for key, fields in samples(path, wanted):
            what = f"Sample {key} of {path}"
            image, trial_numbers, repeats = _decode(fields, betas, seen, what)
            if image not in image_ids:
                image_ids[image] = None
                pixels.append(_picture(fields, what), f"The image of {what}")
            rows.extend(repeats, f"A row of {betas}.npy of {what}")
            records += [(image, split, number) for number in trial_numbers]
    trials = pd.DataFrame(records, columns=["image", "split", "trial"])
    if seen is not None:
        known = trials[trials["trial"].between(0, len(seen) - 1)]
        wrong = known[known["image"] != seen[known["trial"]]]
        if len(wrong):
            row = wrong.iloc[0]
            warnings.warn(
                f"Trial {row['trial']} shows image {row['image']} in the shards, but {seen[row['trial']]} in {INDICES} ({len(wrong)} trials differ): "
                "the shards are followed, but check that both are of one release.",
                stacklevel=3,
            )
    return trials, list(image_ids)


def _beside(root: Path, name: str) -> Path | None:
    """A file in the folder of the release or in the one above."""
    return next((folder / name for folder in (root, root.parent) if (folder / name).exists()), None)


def _images_of_trials(root: Path, subj: int) -> np.ndarray | None:
    """Image of each trial int64 (trials,) from COCO_73k_subj_indices.hdf5, where it lies beside the shards and has this subject."""
    path = _beside(root, INDICES)
    if path is None:
        return None
    try:
        with h5py.File(path, "r") as file:
            name = f"subj{subj:02d}"
            return file[name][:] if name in file else None
    except OSError as error:
        raise PerceptError(f"{path} cannot be read ({error}): fetch it again.") from error


def _copy_captions(root: Path, folder: Path, image_ids: list[int]) -> None:
    """Captions of the images from COCO_73k_annots_curated.npy (images, up to 5), unless captions.parquet gave them."""
    path = _beside(root, ANNOTATIONS)
    if path is None or (root / "captions.parquet").exists():
        return
    texts = unpickle_npy(path)
    if texts.ndim not in (1, 2) or len(texts) <= max(image_ids):
        raise PerceptError(f"{path} has shape {texts.shape}: it needs a row of captions for each image up to {max(image_ids)}.")
    lines = [(image, str(text).strip()) for image in image_ids for text in np.atleast_1d(texts[image])]
    table = pd.DataFrame([line for line in lines if line[1] not in ("", "None")], columns=["image", "caption"])
    write_image_table(folder / "captions.parquet", table)


def samples(path: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
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


def array_of(fields: dict[str, bytes], name: str, what: str) -> np.ndarray:
    """Decode the member <name>.npy of a sample; `what` names the sample in errors."""
    if f"{name}.npy" not in fields:
        raise PerceptError(f"{what} has no {name}.npy: it has {sorted(fields)}.")
    try:
        return np.load(io.BytesIO(fields[f"{name}.npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise PerceptError(
            f"{name}.npy of {what} cannot be read ({error}): fetch the shard again."
        ) from error


def _decode(fields: dict[str, bytes], betas: str, seen: np.ndarray | None, what: str) -> tuple[int, list[int], np.ndarray]:
    """Image id, trial numbers (-1 where unknown), and the distinct repeats (repeats, voxels) or (repeats, x,
    y, z)."""
    trial = array_of(fields, "trial", what).ravel() if "trial.npy" in fields else np.array([], int)
    if "coco73k.npy" not in fields and seen is not None and len(trial) and 0 <= trial.min() <= trial.max() < len(seen):
        coco = np.unique(seen[trial.astype(int)])
    else:
        coco = np.unique(array_of(fields, "coco73k", what))
    if len(coco) != 1:
        raise PerceptError(f"coco73k.npy of {what} names the images {coco.tolist()[:5]}: it must name one.")
    responses = array_of(fields, betas, what)
    responses = (
        responses[None] if responses.ndim in (1, 3) else responses
    )  # the early layout: a sample is a trial
    if responses.ndim not in (2, 4) or not np.issubdtype(responses.dtype, np.floating):
        raise PerceptError(
            f"{betas}.npy of {what} is {responses.dtype} {responses.shape}: it must be (repeats, voxels)."
        )
    distinct = [i for i, r in enumerate(responses) if not any(np.array_equal(r, s) for s in responses[:i])]
    if "num_uniques.npy" in fields:
        claimed = int(array_of(fields, "num_uniques", what).ravel()[0])
        if not 1 <= claimed <= len(responses):
            raise PerceptError(
                f"num_uniques.npy of {what} is {claimed}, with {len(responses)} repeats in {betas}.npy."
            )
        distinct = distinct[:claimed]
    numbers = [int(trial[i]) for i in distinct] if len(trial) == len(responses) else [-1] * len(distinct)
    kept = responses[distinct]
    return int(coco[0]), numbers, kept if kept.dtype == np.float16 else kept.astype(np.float32, copy=False)


def _picture(fields: dict[str, bytes], what: str) -> np.ndarray:
    """The image of a sample, uint8 (height, width, 3)."""
    found = [e for e in IMAGES if e in fields]
    if not found:
        raise PerceptError(f"{what} has no image (png or jpg): it has {sorted(fields)}.")
    return picture(io.BytesIO(fields[found[0]]), f"The image of {what}")


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
    totals, single = read_json(path).get("totals", {}), root.name == EARLY
    announced = sum(totals.get(split, 0) for split in ("train", "val"))
    found = len(trials) if single else trials.loc[trials["split"] != "test", "image"].nunique()
    if announced and announced != found:
        what = "trials" if single else "training and validation images"
        warnings.warn(f"{path.name} announces {announced} {what}, the shards hold {found}.", stacklevel=3)


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
    layout: str = PAPER,
    repeats: int | None = None,
    samples_per_shard: int = 500,
    image_format: str = "png",
) -> Path:
    """Write one subject as MindEye's shards.

    Args:
        source: folder in which that of the release is made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, voxels) float, or (trials, x, y, z), stored as wholebrain_3d beside the flattened nsdgeneral.
        trials: one row for each row of betas: trial, image, split; trials of split "exclude" are left out.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each; it becomes coco73k.
        voxels: ROI table, one row a voxel.
        captions: columns image and caption.
        labels: column image and categories.
        layout: the release: webdataset_avg_split, webdataset_avg_new, or webdataset (a sample a trial: test trials become its val shards,
            splits.csv tells training from validation).
        repeats: rows of a sample's array, by default the most repeats that an image has; filled up with copies as the published shards are.
        samples_per_shard: samples a tar.
        image_format: png (exact) or jpg.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    if image_format not in ("png", "jpg") or samples_per_shard < 1 or layout not in LAYOUTS:
        raise PerceptError(
            f"image_format={image_format!r} must be png or jpg, samples_per_shard={samples_per_shard} at least 1, layout={layout!r} one of {', '.join(LAYOUTS)}."
        )
    missing = {"trial", "image", "split"} - set(trials.columns)
    if missing or len(trials) != len(betas) or len(images) != len(image_ids):
        raise PerceptError(
            f"{len(betas)} betas, {len(trials)} trials (missing columns {sorted(missing)}), {len(images)} images and "
            f"{len(image_ids)} image ids do not fit each other."
        )
    root, early = Path(source) / layout, layout == EARLY
    place = {int(image): row for row, image in enumerate(image_ids)}
    ordered = trials.reset_index(drop=True).sort_values("trial")
    absent = ordered.loc[~ordered["image"].isin(place), "image"]
    if len(absent):
        raise PerceptError(f"Image {absent.iloc[0]} of the trials is not among the images given.")
    repeats = 0 if early else repeats or int(ordered.groupby("image").size().max())
    folders = ordered["split"].replace({"val": "train", "test": "val"} if early else {})
    totals = {}
    with disk_errors(Path(source)):
        for split in SPLITS[layout]:
            groups = [rows for _, rows in ordered[folders == split].groupby("trial" if early else "image")]
            totals[split] = len(groups)
            parts = ((int(rows["image"].iloc[0]), rows["trial"].to_numpy(), np.asarray(betas[rows.index.to_numpy()])) for rows in groups)
            pictured = ((image, images[place[image]], numbers, responses) for image, numbers, responses in parts)
            _write_shards(root / split, f"{split}_subj{subj:02d}", pictured, repeats, samples_per_shard, image_format)
        if early:
            write_split(root, ordered)
        write_json(root / f"metadata_subj{subj:02d}.json", {"totals": totals})
        if voxels is not None:
            with atomic(root / f"voxels_subj{subj:02d}.parquet") as temporary:
                voxels.to_parquet(temporary)
        write_tables(root, captions, labels)
    return Path(source)


# image id, pixels, trial numbers, responses of its trials
Sample = tuple[int, np.ndarray, np.ndarray, np.ndarray]


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
    """Add one image with its trials to a shard; copies of its repeats fill its arrays up to `repeats` rows (0: one trial, without that axis)."""
    image, pixels, trials, responses = sample
    single, repeats = not repeats, repeats or 1
    unique = min(len(trials), repeats)
    filled = np.resize(np.arange(unique), repeats)
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    arrays = {"nsdgeneral": responses[filled].reshape(repeats, -1), "trial": trials[filled], "coco73k": np.array([image]), "num_uniques": np.array([unique])}
    if responses.ndim == 4:
        arrays["wholebrain_3d"] = responses[filled]
    if single:
        arrays |= {name: array[0] for name, array in arrays.items() if name in BETAS}
    add_members(tar, key, {image_format: buffer.getvalue()}, arrays)


def add_members(tar: tarfile.TarFile, key: str, files: dict[str, bytes], arrays: dict[str, np.ndarray]) -> None:
    """Add the members of one sample to a tar: `files` by extension, and `arrays` as <name>.npy."""
    files = dict(files)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files[f"{name}.npy"] = buffer.getvalue()
    for extension, content in files.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
