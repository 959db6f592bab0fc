"""The samples of MindEye's shards: an image with the responses to all its repeats.

`list_shards` says what the shards hold and where, reading nothing large; `iterate_images` and
`iterate_betas` then read images and betas at their places.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from src.readers.common import load_image, to_integers
from src.readers.shards import (
    Member,
    Place,
    decode_array,
    list_samples,
    read_members,
    read_npy_header,
    read_place,
)
from src.utils import PerceptError, progress

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")

SMALL_ARRAYS = ("trial.npy", "coco73k.npy", "num_uniques.npy")

INDICES = "COCO_73k_subj_indices.hdf5"

# a block stays in the processor's cache until it is written
BLOCK_IMAGES = 32
BLOCK_BETAS = 6 << 20  # bytes


@dataclass(frozen=True)
class SampleResponses:
    """The betas of a sample.

    Attributes:
        member: the .npy that holds them.
        shape: (repeats, voxels) or (repeats, x, y, z) of the array in it.
        dtype: of that array.
        rows: its rows that are no copies of one another.
    """

    member: Member
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: list[int]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row, (voxels,) or (x, y, z)."""
        return self.shape[1:]


@dataclass(frozen=True)
class ShardListing:
    """What the shards of a subject hold.

    Attributes:
        trials: image, split, trial (-1 where unknown), one row for each row of betas.
        images: image file of each image id.
        responses: betas of each sample, in the order of `trials`.
    """

    trials: pd.DataFrame
    images: dict[int, Member]
    responses: list[SampleResponses]


@dataclass(frozen=True)
class _Sample:
    """A sample of an open shard.

    Attributes:
        path: of the shard.
        file: the shard.
        places: of its members, by extension.
        fields: bytes of its small arrays, by extension.
        what: names it in errors.
    """

    path: Path
    file: BinaryIO
    places: dict[str, Place]
    fields: dict[str, bytes]
    what: str

    def decode_integers(self, name: str) -> np.ndarray:
        """One of its small arrays of whole numbers, int64 (values,)."""
        array = decode_array(self.fields, name, self.what)
        return to_integers(array.ravel(), f"{name}.npy of {self.what}")

    def member(self, extension: str) -> Member:
        """One of its members."""
        return Member(self.path, self.places[extension], self.what)


def list_shards(
    shards: dict[str, list[Path]],
    splits: dict[str, str],
    betas: str,
    image_of_trial: np.ndarray | None,
) -> ShardListing:
    """List what the shards hold and where, with nothing large read.

    Args:
        shards: of each folder.
        splits: the split that each folder is.
        betas: nsdgeneral or wholebrain_3d.
        image_of_trial: (trials,) image of each trial, where it is known from elsewhere.

    Raises:
        PerceptError: for a damaged shard or a sample that lacks something, naming both.
    """
    records: list[tuple[int, str, int]] = []
    images: dict[int, Member] = {}
    responses: list[SampleResponses] = []
    todo = [(splits[folder], path) for folder, paths in shards.items() for path in paths]
    for split, path in progress(todo, "shards", len(todo)):
        for sample in _open_samples(path):
            image_member = _find_image(sample)
            trial = np.array([], int)
            if "trial.npy" in sample.fields:
                trial = sample.decode_integers("trial")
            sample_responses = _find_responses(sample, betas, len(trial))
            _check_alike(sample_responses, responses, betas)
            responses.append(sample_responses)
            image = _find_image_id(sample, trial, image_of_trial)
            images.setdefault(image, image_member)
            has_numbers = len(trial) == sample_responses.shape[0]
            for row in sample_responses.rows:
                records.append((image, split, int(trial[row]) if has_numbers else -1))
    if not records:
        raise PerceptError(
            f"The shards of {todo[0][1].parent.parent} hold no samples: fetch them again."
        )
    trials = pd.DataFrame(records, columns=["image", "split", "trial"])
    if image_of_trial is not None:
        _warn_of_differences(trials, image_of_trial)
    return ShardListing(trials, images, responses)


def _open_samples(path: Path) -> Iterator[_Sample]:
    with open(path, "rb", buffering=0) as file:
        for key, places in list_samples(path):
            fields = {
                name: read_place(file, places[name]) for name in SMALL_ARRAYS if name in places
            }
            yield _Sample(path, file, places, fields, f"Sample {key} of {path}")


def _find_image(sample: _Sample) -> Member:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.places:
            return sample.member(extension)
    raise PerceptError(
        f"{sample.what} has no image (png or jpg): it has {', '.join(sorted(sample.places))}."
    )


def _find_image_id(sample: _Sample, trial: np.ndarray, image_of_trial: np.ndarray | None) -> int:
    if "coco73k.npy" in sample.fields:
        ids = np.unique(sample.decode_integers("coco73k"))
    elif _has_all(image_of_trial, trial):
        ids = np.unique(image_of_trial[trial])  # type: ignore[index]
    else:
        raise PerceptError(
            f"{sample.what} has no coco73k.npy, so its image is unknown: put {INDICES}, which names"
            " the image of each trial, beside the shards."
        )
    if len(ids) != 1 or ids[0] < 0:
        raise PerceptError(
            f"coco73k.npy of {sample.what} names the images {ids.tolist()[:5]}: it must name one."
        )
    return int(ids[0])


def _has_all(image_of_trial: np.ndarray | None, trial: np.ndarray) -> bool:
    """Whether the table of images has each of the trials, of which there is at least one."""
    if image_of_trial is None or not len(trial):
        return False
    return bool(0 <= trial.min() <= trial.max() < len(image_of_trial))


def _find_responses(sample: _Sample, betas: str, n_numbers: int) -> SampleResponses:
    """The shape of a sample's betas, and which of its rows are no copies.

    Args:
        sample: the sample.
        betas: nsdgeneral or wholebrain_3d.
        n_numbers: trial numbers that the sample has, 0 where it has none.
    """
    name = f"{betas}.npy"
    if name not in sample.places:
        raise PerceptError(
            f"{sample.what} has no {name}: it has {', '.join(sorted(sample.places))}."
        )
    header = read_npy_header(sample.file, sample.places[name], f"{name} of {sample.what}")
    is_single_trial = len(header.shape) in (1, 3)  # the early release
    shape = (1, *header.shape) if is_single_trial else header.shape
    if len(shape) not in (2, 4) or not np.issubdtype(header.dtype, np.floating):
        raise PerceptError(
            f"{name} of {sample.what} is {header.dtype} {shape}: it must be (repeats, voxels) or"
            " (repeats, x, y, z)."
        )
    is_transposed = len(shape) == 2 and shape[0] > shape[1]
    if is_transposed or (shape[0] != n_numbers and n_numbers == shape[-1]):
        raise PerceptError(
            f"{name} of {sample.what} is {shape} with {n_numbers} trial numbers: the first axis"
            " must be that of the repeats, so fetch the shard again or turn the array."
        )
    rows = _find_distinct_rows(sample, betas, shape[0])
    return SampleResponses(sample.member(name), shape, header.dtype, rows)


def _find_distinct_rows(sample: _Sample, betas: str, n_repeats: int) -> list[int]:
    """Rows of a sample's betas that are no copies of an earlier one."""
    name, n_distinct = f"{betas}.npy", n_repeats
    has_count = "num_uniques.npy" in sample.fields
    if has_count:
        counts = sample.decode_integers("num_uniques")
        n_distinct = int(counts[0]) if len(counts) else 0
        if not 1 <= n_distinct <= n_repeats:
            raise PerceptError(
                f"num_uniques.npy of {sample.what} is {n_distinct}, with {n_repeats} repeats in"
                f" {name}."
            )
    if n_repeats == 1 or (has_count and n_distinct == n_repeats):
        return list(range(n_distinct))
    # only the betas say which rows are the copies
    content = read_place(sample.file, sample.places[name])
    array = decode_array({name: content}, betas, sample.what)
    distinct: list[int] = []
    for index, row in enumerate(array):
        if not any(np.array_equal(row, earlier) for earlier in array[:index]):
            distinct.append(index)
    return distinct[:n_distinct]


def _check_alike(new: SampleResponses, responses: list[SampleResponses], betas: str) -> None:
    """Refuse rows of another shape or dtype than those of the samples before."""
    if not responses:
        return
    first = responses[0]
    if (new.row_shape, new.dtype) != (first.row_shape, first.dtype):
        raise PerceptError(
            f"A row of {betas}.npy of {new.member.what} is {new.dtype} {new.row_shape}, those"
            f" before it are {first.dtype} {first.row_shape}: all must be alike."
        )


def _warn_of_differences(trials: pd.DataFrame, image_of_trial: np.ndarray) -> None:
    """Warn where the shards and the table of the images of trials differ."""
    numbered = trials[trials["trial"].between(0, len(image_of_trial) - 1)]
    different = numbered[numbered["image"] != image_of_trial[numbered["trial"]]]
    if len(different):
        row = different.iloc[0]
        warnings.warn(
            f"Trial {row['trial']} shows image {row['image']} in the shards, but"
            f" {image_of_trial[row['trial']]} in {INDICES} ({len(different)} trials differ): the"
            " shards are followed, but check that both are of one release.",
            stacklevel=4,
        )


def iterate_images(members: list[Member]) -> Iterator[np.ndarray]:
    """Decode images in blocks uint8 (images, height, width, 3), some blocks ahead in threads.

    Pillow works outside the interpreter's lock.
    """
    threads = min(8, os.cpu_count() or 1)
    shape = _decode_images(members[:1], None).shape[1:]
    starts = range(0, len(members), BLOCK_IMAGES)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for start in progress(starts, "images", len(starts)):
            block = members[start : start + BLOCK_IMAGES]
            ahead.append(pool.submit(_decode_images, block, shape))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _decode_images(members: list[Member], shape: tuple[int, ...] | None) -> np.ndarray:
    """Images uint8 (images, height, width, 3), all of `shape`."""
    images = []
    for member, content in zip(members, read_members(members), strict=True):
        image = load_image(io.BytesIO(content), f"The image of {member.what}")
        if shape and image.shape != shape:
            raise PerceptError(
                f"The image of {member.what} is {image.shape}, the first is {shape}: all must be"
                " alike."
            )
        images.append(image)
    return np.stack(images)


def iterate_betas(responses: list[SampleResponses], betas: str) -> Iterator[np.ndarray]:
    """Read distinct rows in blocks (rows, voxels) or (rows, x, y, z).

    float16 stays as it is stored, anything else becomes float32.
    """
    contents = read_members(sample.member for sample in responses)
    dtype = np.float16 if responses[0].dtype == np.float16 else np.float32
    largest = max(sample.member.place.size for sample in responses)
    step = max(1, BLOCK_BETAS // largest)  # samples
    starts = range(0, len(responses), step)
    for start in progress(starts, "betas", len(starts)):
        part = responses[start : start + step]
        n_rows = sum(len(sample.rows) for sample in part)
        block, first = np.empty((n_rows, *part[0].row_shape), dtype), 0
        for sample in part:
            fields = {f"{betas}.npy": next(contents)}
            rows = decode_array(fields, betas, sample.member.what).reshape(sample.shape)
            if len(sample.rows) < len(rows):
                rows = rows[sample.rows]
            block[first : first + len(rows)] = rows
            first += len(rows)
        yield block
