"""MindEye's webdataset shards, read and written: three releases, one folder each.

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
  written; betas and pictures are then read at their places, straight into the prepared files.
  Pickled arrays are refused.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import pandas as pd

from src.data.files import disk_errors
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.readers.common import choose_validation, copy_tables, load_image, load_split_column
from src.safe_pickle import unpickle_npy
from src.utils import PerceptError, progress, read_json

TERMS = (
    "Derived from the Natural Scenes Dataset: agree to its terms at"
    " https://naturalscenesdataset.org before use; neither data nor images may be passed on. The"
    " shards are the dataset pscotti/naturalscenesdataset on the Hugging Face hub."
)

PAPER, NEW, EARLY = "webdataset_avg_split", "webdataset_avg_new", "webdataset"

LAYOUTS = (PAPER, NEW, EARLY)

IMAGES = ("png", "jpg", "jpeg")

INDICES, ANNOTATIONS = "COCO_73k_subj_indices.hdf5", "COCO_73k_annots_curated.npy"

BETAS = ("nsdgeneral", "wholebrain_3d")

PICTURES, BLOCK = (
    32,
    6 << 20,
)  # images, and bytes of betas, in a block: it stays in the processor's cache until it is written

SPLITS = {
    PAPER: ("train", "val", "test"),
    NEW: ("train", "val", "test"),
    EARLY: ("train", "val"),
}  # folders of a release


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
        attributes: what is to be said about the betas where it is not what the published shards are
            (source, units, normalisation), e.g. for the mini world.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for missing, damaged or truncated shards (naming shard and sample), or data
            that `write_subject` refuses.
    """
    if val not in ("val", "train") or betas not in BETAS or trials_per_session < 1:
        raise PerceptError(
            f"val={val!r} must be val or train, betas={betas!r} one of {list(BETAS)},"
            " trials_per_session at least 1."
        )
    root = _root(Path(source), layout)
    early = root.name == EARLY
    shards = {split: _shards(root, split, subj) for split in SPLITS[root.name]}
    names = {"train": "train", "val": "test" if early else val, "test": "test"}
    trials, pictures, responses = _listed(shards, names, betas, _images_of_trials(root, subj))
    _check_totals(root, subj, trials)
    trials = _finish_trials(trials, trials_per_session)
    if early:
        trials["split"] = _early_split(root, trials, val_images, seed)
    check_trials(trials)
    n_test = trials.loc[trials["split"] == "test", "image"].nunique()
    about: dict[str, Any] = {
        "source": f"MindEye {root.name}",
        "units": "z-score",
        "normalisation": "by the source",
        "layout": root.name,
        "protocol": (
            protocol
            or {PAPER: f"nsd-{n_test}", NEW: "nsd-1000", EARLY: f"nsd-early-{n_test}"}[root.name]
        ),
        "val_shards": names["val"],
        "betas": betas,
        "trials_per_session": trials_per_session,
        **(
            {"volume_shape": ",".join(map(str, responses[0].shape[1:]))}
            if betas == "wholebrain_3d"
            else {}
        ),
        **(attributes or {}),
    }
    voxels = _voxel_table(root, subj) if betas == "nsdgeneral" else None
    folder, image_ids = dataset_folder(dataset), list(pictures)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        write_images(folder / "images.h5", _images(list(pictures.values())), image_ids)
        copy_tables(root, folder, image_ids)
        _copy_captions(root, folder, image_ids)
        return write_subject(
            subject_folder(dataset, subj), _blocks(responses, betas), trials, voxels, about
        )


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
        raise PerceptError(
            f"There are no MindEye shards in {source}: give the folder that holds"
            f" {' or '.join(f'{name}/' for name in wanted)}."
        )
    if len(found) > 1:
        raise PerceptError(
            f"{source} holds the releases {', '.join(path.name for path in found)}, which differ in"
            " their test images: name one of them as layout."
        )
    return found[0]


def _shards(root: Path, split: str, subj: int) -> list[Path]:
    """Shards of a split in the order of their numbers, none missing."""
    pattern = re.compile(rf"{split}_subj{subj:02d}_(\d+)\.tar")
    numbered = sorted(
        (int(m.group(1)), p)
        for p in (root / split).glob("*.tar")
        if (m := pattern.fullmatch(p.name))
    )
    missing = (
        sorted(set(range(max(numbered)[0] + 1)) - {n for n, _ in numbered}) if numbered else [0]
    )
    if missing:
        raise PerceptError(
            f"Shard {root / split}/{split}_subj{subj:02d}_{missing[0]}.tar is missing: fetch all"
            f" shards of subject {subj}, or choose a subject that is there."
        )
    return [path for _, path in numbered]


class Member(NamedTuple):
    """Where a member of a shard lies; `what` names its sample."""

    path: Path
    offset: int
    size: int
    what: str


class Responses(NamedTuple):
    """The betas of a sample: `distinct` rows of the array of `shape` (repeats, ...) and `dtype`
    that `member` holds.
    """

    member: Member
    shape: tuple[int, ...]
    dtype: np.dtype
    distinct: list[int]


def _listed(
    shards: dict[str, list[Path]], names: dict[str, str], betas: str, seen: np.ndarray | None
) -> tuple[pd.DataFrame, dict[int, Member], list[Responses]]:
    """What the shards hold and where, with nothing large read.

    Args:
        shards: of each folder.
        names: the split that each folder is.
        betas: nsdgeneral or wholebrain_3d.
        seen: (trials,) image of each trial, where it is known.

    Returns:
        A table with image, split, trial (-1 where unknown), one line a row of betas; the picture of
        each image; the betas of each sample.
    """
    records: list[tuple[int, str, int]] = []
    pictures: dict[int, Member] = {}
    responses: list[Responses] = []
    todo = [(names[split], path) for split in shards for path in shards[split]]
    for split, path in progress(todo, "shards", len(todo)):
        with open(path, "rb", buffering=0) as file:
            for key, places in members(path):
                what = f"Sample {key} of {path}"
                found = [e for e in IMAGES if e in places]
                if not found:
                    raise PerceptError(
                        f"{what} has no image (png or jpg): it has {', '.join(sorted(places))}."
                    )
                fields: dict[str, bytes] = {
                    e: _bytes(file, *places[e])
                    for e in ("trial.npy", "coco73k.npy", "num_uniques.npy")
                    if e in places
                }
                trial = (
                    array_of(fields, "trial", what).ravel()
                    if "trial.npy" in fields
                    else np.array([], int)
                )
                one = _responses(file, places, fields, betas, len(trial), path, what)
                if responses and (one.shape[1:], one.dtype) != (
                    responses[0].shape[1:],
                    responses[0].dtype,
                ):
                    raise PerceptError(
                        f"A row of {betas}.npy of {what} is {one.dtype} {one.shape[1:]}, those"
                        f" before it are {responses[0].dtype} {responses[0].shape[1:]}: all must be"
                        " alike."
                    )
                responses.append(one)
                image = _image_id(fields, trial, seen, what)
                pictures.setdefault(image, Member(path, *places[found[0]], what))
                records += [
                    (image, split, int(trial[i]) if len(trial) == one.shape[0] else -1)
                    for i in one.distinct
                ]
    if not records:
        raise PerceptError(
            f"The shards of {todo[0][1].parent.parent} hold no samples: fetch them again."
        )
    trials = pd.DataFrame(records, columns=["image", "split", "trial"])
    if seen is not None:
        _compare(trials, seen)
    return trials, pictures, responses


def _compare(trials: pd.DataFrame, seen: np.ndarray) -> None:
    """Warn where the shards and the table of the images of trials differ."""
    known = trials[trials["trial"].between(0, len(seen) - 1)]
    wrong = known[known["image"] != seen[known["trial"]]]
    if len(wrong):
        row = wrong.iloc[0]
        warnings.warn(
            f"Trial {row['trial']} shows image {row['image']} in the shards, but"
            f" {seen[row['trial']]} in {INDICES} ({len(wrong)} trials differ): the shards are"
            " followed, but check that both are of one release.",
            stacklevel=4,
        )


def _responses(
    file: BinaryIO,
    places: dict[str, tuple[int, int]],
    fields: dict[str, bytes],
    betas: str,
    trials: int,
    path: Path,
    what: str,
) -> Responses:
    """The shape of a sample's betas and which of its rows are no copies; `trials` are the trial
    numbers that it has, 0 where it has none.
    """
    name = f"{betas}.npy"
    if name not in places:
        raise PerceptError(f"{what} has no {name}: it has {', '.join(sorted(places))}.")
    offset, size = places[name]
    shape, dtype = _shape_of(_bytes(file, offset, min(size, 4096)), size, f"{name} of {what}")
    single = len(shape) in (1, 3)  # the early release: a sample is a trial
    shape = (1, *shape) if single else shape
    if len(shape) not in (2, 4) or not np.issubdtype(dtype, np.floating):
        raise PerceptError(
            f"{name} of {what} is {dtype} {shape}: it must be (repeats, voxels) or (repeats, x,"
            " y, z)."
        )
    if shape[0] != trials == shape[-1] or (len(shape) == 2 and shape[0] > shape[1]):
        raise PerceptError(
            f"{name} of {what} is {shape} with {trials} trial numbers: the first axis must be that"
            " of the repeats, so fetch the shard again or turn the array."
        )
    repeats = claimed = shape[0]
    if "num_uniques.npy" in fields:
        claimed = int(array_of(fields, "num_uniques", what).ravel()[0])
        if not 1 <= claimed <= repeats:
            raise PerceptError(
                f"num_uniques.npy of {what} is {claimed}, with {repeats} repeats in {name}."
            )
    distinct = list(range(claimed))
    if repeats > 1 and (
        claimed < repeats or "num_uniques.npy" not in fields
    ):  # only the betas tell where the copies lie
        rows = array_of({name: _bytes(file, offset, size)}, betas, what)
        distinct = [
            i for i, r in enumerate(rows) if not any(np.array_equal(r, s) for s in rows[:i])
        ][:claimed]
    return Responses(Member(path, offset, size, what), shape, dtype, distinct)


def _image_id(
    fields: dict[str, bytes], trial: np.ndarray, seen: np.ndarray | None, what: str
) -> int:
    if "coco73k.npy" in fields:
        coco = np.unique(array_of(fields, "coco73k", what))
    elif seen is not None and len(trial) and 0 <= trial.min() <= trial.max() < len(seen):
        coco = np.unique(seen[trial.astype(int)])
    else:
        raise PerceptError(
            f"{what} has no coco73k.npy, so its image is unknown: put {INDICES}, which names the"
            " image of each trial, beside the shards."
        )
    if len(coco) != 1:
        raise PerceptError(
            f"coco73k.npy of {what} names the images {coco.tolist()[:5]}: it must name one."
        )
    return int(coco[0])


def _early_split(root: Path, trials: pd.DataFrame, val_images: int, seed: int) -> pd.Series:
    own = load_split_column(root, trials)
    if own is not None:
        return own
    test = trials["split"] == "test"
    both = np.intersect1d(trials.loc[test, "image"], trials.loc[~test, "image"])
    if len(both):
        raise PerceptError(
            f"Image {both[0]} is in both the train and the val shards of {root} ({len(both)} such"
            f" images): settle it with {root / 'splits.csv'} (columns image and split), one side an"
            " image."
        )
    return choose_validation(trials, val_images, seed)


def _contents(wanted: Iterable[Member]) -> Iterator[bytes]:
    """The bytes of members, those of a shard after one another."""
    for path, group in groupby(wanted, key=lambda member: member.path):
        with open(path, "rb", buffering=0) as file:
            for member in group:
                yield _bytes(file, member.offset, member.size)


def _images(wanted: list[Member]) -> Iterator[np.ndarray]:
    """Blocks of images uint8 (images, height, width, 3), decoded some blocks ahead: Pillow works
    outside the interpreter's lock.
    """
    threads = min(8, os.cpu_count() or 1)
    shape = _decoded(wanted[:1], None).shape[1:]
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for start in progress(
            range(0, len(wanted), PICTURES), "images", -(-len(wanted) // PICTURES)
        ):
            ahead.append(pool.submit(_decoded, wanted[start : start + PICTURES], shape))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _decoded(wanted: list[Member], shape: tuple[int, ...] | None) -> np.ndarray:
    """Images uint8 (images, height, width, 3), all of `shape`."""
    images = []
    for member, content in zip(wanted, _contents(wanted), strict=True):
        images.append(load_image(io.BytesIO(content), f"The image of {member.what}"))
        if shape and images[-1].shape != shape:
            raise PerceptError(
                f"The image of {member.what} is {images[-1].shape}, the first is {shape}: all must"
                " be alike."
            )
    return np.stack(images)


def _blocks(responses: list[Responses], betas: str) -> Iterator[np.ndarray]:
    """Blocks of distinct rows (rows, voxels) or (rows, x, y, z), float16 as stored or float32."""
    contents = _contents(one.member for one in responses)
    dtype = np.float16 if responses[0].dtype == np.float16 else np.float32
    step = max(1, BLOCK // max(one.member.size for one in responses))  # samples
    for start in progress(range(0, len(responses), step), "betas", -(-len(responses) // step)):
        part = responses[start : start + step]
        block, filled = (
            np.empty((sum(len(one.distinct) for one in part), *part[0].shape[1:]), dtype),
            0,
        )
        for one in part:
            rows = array_of({f"{betas}.npy": next(contents)}, betas, one.member.what).reshape(
                one.shape
            )
            block[filled : filled + len(one.distinct)] = (
                rows if len(one.distinct) == len(rows) else rows[one.distinct]
            )
            filled += len(one.distinct)
        yield block


def _beside(root: Path, name: str) -> Path | None:
    """A file in the folder of the release or in the one above."""
    return next((folder / name for folder in (root, root.parent) if (folder / name).exists()), None)


def _images_of_trials(root: Path, subj: int) -> np.ndarray | None:
    """Image of each trial int64 (trials,) from COCO_73k_subj_indices.hdf5, where it lies beside the
    shards and has this subject.
    """
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
    """Captions of the images from COCO_73k_annots_curated.npy (images, up to 5), unless
    captions.parquet gave them.
    """
    path = _beside(root, ANNOTATIONS)
    if path is None or (root / "captions.parquet").exists():
        return
    texts = unpickle_npy(path)
    if texts.ndim not in (1, 2) or len(texts) <= max(image_ids):
        raise PerceptError(
            f"{path} has shape {texts.shape}: it needs a row of captions for each image up to"
            f" {max(image_ids)}."
        )
    lines = [
        (image, str(text).strip()) for image in image_ids for text in np.atleast_1d(texts[image])
    ]
    table = pd.DataFrame(
        [line for line in lines if line[1] not in ("", "None")], columns=["image", "caption"]
    )
    write_image_table(folder / "captions.parquet", table)


def members(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Samples of a tar: (key, {extension: (offset, size) of its bytes}).

    The members of a sample follow one another; the key ends at the first dot.

    Raises:
        PerceptError: if the tar is damaged or cut off, naming the sample.
    """
    key, places, end = "", {}, 0  # type: str, dict[str, tuple[int, int]], int
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, extension = member.name.rpartition("/")[2].partition(".")
                if key and name != key:
                    yield key, places
                    places = {}
                key, end = name, member.offset_data + -(-member.size // 512) * 512
                places[extension] = member.offset_data, member.size
        with (
            open(path, "rb") as file
            # a tar ends with two blocks of zeros; without them the download stopped between two
            # members
        ):
            file.seek(end)
            if file.read(1024) != bytes(1024):
                raise PerceptError(f"Shard {path} is cut off after sample {key}: fetch it again.")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PerceptError(
            f"Shard {path} is damaged or cut off at sample {key or '(the first)'} ({error}): fetch"
            " it again."
        ) from error
    if key:
        yield key, places


def samples(path: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar: (key, {extension: bytes}) for the extensions wanted."""
    with open(path, "rb", buffering=0) as file:
        for key, places in members(path):
            yield key, {e: _bytes(file, *place) for e, place in places.items() if e in wanted}


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


@lru_cache(
    maxsize=256
    # NumPy's parsing takes longer than the rest of a small array, and samples have the same few
    # headers
)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = (
        np.lib.format.read_array_header_1_0(file)
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0(file)
    )
    if header[2].hasobject:
        raise ValueError("it is pickled, and allow_pickle is False")
    return header


def _split_npy(data: bytes) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """Header (shape, Fortran order, dtype) of an .npy, and where its data begin."""
    begin = (
        10 + int.from_bytes(data[8:10], "little")
        if data[6:7] == b"\x01"
        else 12 + int.from_bytes(data[8:12], "little")
    )
    return _header(data[:begin]), begin


def _shape_of(head: bytes, size: int, what: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy of `size` bytes by the first of them."""
    try:
        (shape, _, dtype), begin = _split_npy(head)
    except (ValueError, EOFError) as error:
        raise PerceptError(f"{what} cannot be read ({error}): fetch the shard again.") from error
    if begin + math.prod(shape) * dtype.itemsize > size:
        raise PerceptError(
            f"{what} cannot be read ({dtype} {shape} do not fit into its {size} bytes): fetch the"
            " shard again."
        )
    return shape, dtype


def array_of(fields: dict[str, bytes], name: str, what: str) -> np.ndarray:
    """Decode the member <name>.npy of a sample; `what` names the sample in errors."""
    if f"{name}.npy" not in fields:
        raise PerceptError(f"{what} has no {name}.npy: it has {sorted(fields)}.")
    data = fields[f"{name}.npy"]
    try:
        (shape, fortran, dtype), begin = _split_npy(data)
        return np.frombuffer(data, dtype, math.prod(shape), begin).reshape(
            shape, order="F" if fortran else "C"
        )
    except (ValueError, EOFError) as error:
        raise PerceptError(
            f"{name}.npy of {what} cannot be read ({error}): fetch the shard again."
        ) from error


def _finish_trials(trials: pd.DataFrame, trials_per_session: int) -> pd.DataFrame:
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
        warnings.warn(
            f"{path} is missing, so whether all shards are there cannot be told.", stacklevel=3
        )
        return
    try:
        totals, single = read_json(path).get("totals", {}), root.name == EARLY
    except ValueError as error:
        raise PerceptError(
            f"{path} cannot be read ({error}): fetch it again, or remove it."
        ) from error
    announced = sum(totals.get(split, 0) for split in ("train", "val"))
    found = len(trials) if single else trials.loc[trials["split"] != "test", "image"].nunique()
    said = (
        f"{path} announces {announced} {'trials' if single else 'training and validation images'},"
        f" the shards hold {found}"
    )
    if found < announced and not single:  # what the early release counts is not documented
        raise PerceptError(
            f"{said}: fetch the shards that are missing, or remove that file to read those there"
            " are."
        )
    if announced and announced != found:
        warnings.warn(f"{said}.", stacklevel=3)


def _voxel_table(root: Path, subj: int) -> pd.DataFrame | None:
    for name in (f"voxels_subj{subj:02d}.parquet", "voxels.parquet"):
        if (root / name).exists():
            return pd.read_parquet(root / name)
    return None
