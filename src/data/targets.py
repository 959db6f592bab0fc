"""Targets of frozen models, computed once for each image and memory-mapped."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.data.draws import choose_repeats
from src.data.files import Ids, check_space, find_rows, gather_rows
from src.data.images import ImageStore
from src.data.layout import dataset_folder
from src.files.foreign import load_npy, shorten
from src.files.ownership import lock_folder
from src.utils import (
    PerceptError,
    atomic,
    memory_errors,
    progress,
    read_json,
    same_features,
    write_errors,
    write_json,
)

log = logging.getLogger(__name__)

Encode = Callable[[np.ndarray], np.ndarray]

REMEDY = "its targets are computed again"


# --------------------------------------------------------------------------------- reading targets
class TargetCache:
    """Frozen targets of images, memory-mapped. Made by `cache_targets`.

    Attributes:
        folder: where they are stored.
        image_ids: int64 (images,), ascending.
        shape: shape of one target.
        dtype: as stored.
        damaged: parts that cannot be read, whose images count as missing.
    """

    def __init__(self, folder: Path, store: ImageStore):
        meta = read_json(folder / "meta.json")
        self.folder, self.shape, self.dtype = folder, tuple(meta["shape"]), np.dtype(meta["dtype"])
        self.parts: list[Path] = []
        self.damaged: list[Path] = []
        crc = dict(zip(store.image_ids.tolist(), store.crc.tolist(), strict=True))
        locations: dict[int, tuple[int, int]] = {}  # image -> (part, row)
        for part in sorted(folder.glob("part-???.npy")):
            stored = self._read_identities(part)
            if stored is None:
                self.damaged.append(part)
                continue
            for row, (image, checksum) in enumerate(stored):
                if crc.get(image) == checksum:
                    # a later part, made from newer pixels, wins
                    locations[image] = (len(self.parts), row)
            self.parts.append(part)
        images = sorted(locations)
        self.image_ids = np.array(images, dtype=np.int64)
        pairs = [locations[image] for image in images]
        self._locations = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._order = np.arange(len(images))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_maps"}

    def _read_identities(self, part: Path) -> list[list[int]] | None:
        """The images of a part, [id, CRC-32 of the pixels] each; None where the part is damaged."""
        try:
            stored = load_npy(_ids_file(part), REMEDY)
            array = load_npy(part, REMEDY, mode="r")
        except PerceptError as error:
            log.warning("%s", error)
            return None
        is_table = stored.ndim == 2 and stored.shape[1] == 2 and stored.dtype == np.int64
        expected = (stored.shape[0] if stored.ndim else 0, *self.shape)
        if not is_table or array.shape != expected or array.dtype != self.dtype:
            log.warning("%s is not %s %s: %s", part, self.dtype, expected, REMEDY)
            return None
        identities: list[list[int]] = stored.tolist()
        return identities

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [load_npy(part, REMEDY, mode="r") for part in self.parts]

    def check(self, image_ids: Ids) -> None:
        """Raise PerceptError if the target of one of these images is missing."""
        ids = np.atleast_1d(np.asarray(image_ids, dtype=np.int64))
        missing = ids[~self._has(ids)]
        if len(missing):
            missing = np.unique(missing)
            raise PerceptError(
                f"{self.folder} lacks the targets of {len(missing)} images, the first is"
                f" {missing[0]}: make them with cache_targets."
            )

    def _has(self, ids: np.ndarray) -> np.ndarray:
        """Whether the target of each image is there: (n,) Boolean, by halving the sorted ids."""
        if not len(self.image_ids):
            return np.zeros(len(ids), dtype=bool)
        positions = np.searchsorted(self.image_ids, ids)
        is_known: np.ndarray = self.image_ids[positions.clip(max=len(self.image_ids) - 1)] == ids
        return is_known

    def rows(self, image_ids: Ids) -> np.ndarray:
        """Targets by image id, (n, *shape) in the stored dtype.

        Raises:
            PerceptError: for an image without one.
        """
        self.check(image_ids)
        positions = find_rows(self.image_ids, self._order, image_ids, str(self.folder))
        part_numbers, rows = self._locations[positions].T
        targets = np.empty((len(positions), *self.shape), self.dtype)
        for number in np.unique(part_numbers):
            in_part = part_numbers == number
            targets[in_part] = gather_rows(self._maps[number], rows[in_part])
        return targets


class LatentFile:
    """Latents of images that somebody else computed, a row an image, memory-mapped.

    `fMRI_VAE.npy` of the course's NSD subset, for instance.

    Args:
        path: .npy of floats (images, channels, h, w) or (images, 1, channels, h, w), already
            scaled; row i is of the image with id i.
        shape: (channels, h, w) that is expected.

    Raises:
        PerceptError: if the file is missing, is no such array, or is of latents of another shape.
    """

    def __init__(self, path: str | Path, shape: tuple[int, ...]):
        self.path, self.shape = Path(path), tuple(shape)
        try:
            self._array = load_npy(self.path, mode="r")
        except PerceptError as error:
            raise PerceptError(
                f"{path} is no array of latents that can be read ({shorten(error)}): give the .npy"
                " file, or leave latents_file empty."
            ) from error
        row_shapes = (self.shape, (1, *self.shape))
        if self._array.dtype.kind != "f" or self._array.shape[1:] not in row_shapes:
            expected = f"floats (images, {', '.join(map(str, self.shape))})"
            raise PerceptError(
                f"{path} holds {self._array.dtype} {self._array.shape}, not {expected}: it is of"
                " another autoencoder or of something else."
            )

    def check(self, image_ids: Ids) -> None:
        """Raise PerceptError if the latent of one of these images is missing."""
        ids = np.asarray(image_ids)
        missing = ids[(ids < 0) | (ids >= len(self._array))]
        if len(missing):
            raise PerceptError(
                f"{self.path} has {len(self._array)} rows, none for image {missing[0]}: its rows"
                " have to be the images 0, 1, 2 and so on."
            )

    def rows(self, image_ids: Ids) -> np.ndarray:
        """Latents by image id, (n, channels, h, w)."""
        self.check(image_ids)
        latents = np.asarray(self._array[np.asarray(image_ids, np.int64)])
        return latents.reshape(-1, *self.shape)


class AugmentedTargets:
    """Several versions of every image's target, of which an epoch shows one.

    Made by `cache_augmented_targets`.

    Attributes:
        versions: one `TargetCache` a version.
    """

    def __init__(self, versions: Sequence[TargetCache]):
        self.versions = list(versions)

    def check(self, image_ids: Ids) -> None:
        """Raise PerceptError if a version of one of these images is missing."""
        for targets in self.versions:
            targets.check(image_ids)

    def rows(self, image_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Targets by image id, (n, *shape) in the stored dtype.

        Each is of the version that (seed, epoch, image) choose.
        """
        counts = np.full(len(image_ids), len(self.versions))
        chosen = choose_repeats(seed + 2, epoch, image_ids, counts)
        first = self.versions[0]
        targets = np.empty((len(image_ids), *first.shape), first.dtype)
        for number in np.unique(chosen):
            is_chosen = chosen == number
            targets[is_chosen] = self.versions[number].rows(np.asarray(image_ids)[is_chosen])
        return targets


def _ids_file(part: Path) -> Path:
    """File with the images of a part: int64 (images, 2), id and CRC-32 of the pixels."""
    return part.with_suffix(".ids")


# ------------------------------------------------------------------------------- computing targets
@dataclass(frozen=True)
class _TargetEncoder:
    """How targets are computed, and the form that they must have."""

    encode: Encode
    shape: tuple[int, ...]  # of one target
    dtype: np.dtype
    batch_size: int

    def compute(self, images: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Targets of images (n, height, width, 3), checked, in the dtype to be stored."""
        with memory_errors("computing targets", "free memory, or choose another device"):
            targets = np.asarray(self.encode(images))
        expected = (len(ids), *self.shape)
        if targets.shape != expected:
            raise PerceptError(
                f"The targets of {len(ids)} images have shape {targets.shape}, {expected} was"
                " announced."
            )
        with np.errstate(over="ignore"):
            targets = targets.astype(self.dtype)
        finite = np.isfinite(targets.reshape(len(targets), -1)).all(1)
        if not finite.all():
            raise PerceptError(
                f"The target of image {ids[~finite][0]} is not finite in {self.dtype}: encode in"
                " float32, or store it with dtype='float32'."
            )
        return targets


def cache_targets(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Ids,
    encode: Encode,
    shape: Sequence[int],
    dtype: str = "float16",
    batch_size: int = 64,
) -> TargetCache:
    """Compute the targets of a frozen model once for each image.

    They are stored under data/<dataset>/targets/<name>-<hash>/. An interrupted run goes on where it
    stopped; images asked for later, or whose pixels have changed since, are added as a further
    part. Processes that ask at once take turns: the first computes, the others find the result.
    Where all of them are there, nothing is written, so that data may be shared read-only.

    Args:
        dataset: as for `open_subject`.
        name: what the targets are, e.g. clip_tokens.
        fingerprint: all that they depend on (model, revision, options, versions), as JSON values;
            another fingerprint is another folder.
        image_ids: (n,) images whose targets are needed.
        encode: uint8 images (batch, height, width, 3) -> (batch, *shape).
        shape: shape of one target.
        dtype: dtype on disk.
        batch_size: images given to `encode` at once.

    Raises:
        PerceptError: for an unknown image, an `encode` that gives another shape or numbers that are
            not finite in `dtype`, or a full disk.
    """
    store = ImageStore(dataset_folder(dataset) / "images.h5")
    record = {"name": name, "fingerprint": fingerprint, "shape": list(shape), "dtype": dtype}
    meta = json.loads(json.dumps(record, default=str))
    folder = dataset_folder(dataset) / "targets" / f"{name}-{hash_fingerprint(meta)}"
    targets = _open_complete(folder, store, meta, image_ids)
    if targets is not None:
        return targets
    with lock_folder(folder, f"making the targets {name}", wait=True):
        if not (folder / "meta.json").exists():
            write_json(folder / "meta.json", meta)
        _check_meta(folder, meta)
        targets = TargetCache(folder, store)
        for part in targets.damaged:
            part.unlink()
            _ids_file(part).unlink(missing_ok=True)
        missing = np.setdiff1d(image_ids, targets.image_ids)
        if len(missing):
            encoder = _TargetEncoder(encode, tuple(shape), np.dtype(dtype), batch_size)
            _add_part(folder, store, missing, encoder)
            targets = TargetCache(folder, store)
    return targets


class ImageEncoder(Protocol):
    """What the cache asks of a frozen model; `src.pretrained.base.FrozenModel` has it."""

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of one target."""

    def fingerprint(self) -> dict[str, Any]:
        """All that the targets depend on."""

    def encode_pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (batch, height, width, 3) -> (batch, *target_shape)."""


def cache_encoder_targets(
    dataset: str | Path, name: str, encoder: ImageEncoder, image_ids: Ids
) -> TargetCache:
    """`cache_targets` of what a frozen model makes of images as they are, not augmented.

    Args:
        dataset: as for `open_subject`.
        name: what the targets are, e.g. clip_tokens.
        encoder: the frozen model.
        image_ids: (n,) images whose targets are needed.
    """
    return cache_targets(
        dataset,
        name,
        encoder.fingerprint(),
        image_ids,
        encoder.encode_pixels,
        encoder.target_shape,
    )


def _open_complete(
    folder: Path, store: ImageStore, meta: dict[str, Any], image_ids: Ids
) -> TargetCache | None:
    """The targets in a folder, if it has those of all these images; nothing is written."""
    if not (folder / "meta.json").exists():
        return None
    _check_meta(folder, meta)
    targets = TargetCache(folder, store)
    return None if len(np.setdiff1d(image_ids, targets.image_ids)) else targets


def cache_augmented_targets(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Ids,
    encode: Callable[[np.ndarray, int], np.ndarray],
    shape: Sequence[int],
    views: int,
    **options: Any,
) -> AugmentedTargets:
    """Compute the targets of augmented images: `views` versions of each, once.

    Args:
        dataset, name, fingerprint, image_ids, shape, options: as for `cache_targets`; the
            fingerprint says how images are augmented.
        encode: (uint8 images (batch, height, width, 3), seed) -> (batch, *shape); the seed is that
            of the version and of the pixels, so that a version is made again as it was.
        views: number of versions.

    Raises:
        PerceptError: for fewer than one version, and as `cache_targets`.
    """
    if views < 1:
        raise PerceptError(
            f"{views} views of the targets {name} were asked for: choose at least 1."
        )

    def cache_version(number: int) -> TargetCache:
        def encode_version(images: np.ndarray) -> np.ndarray:
            return encode(images, zlib.crc32(images.tobytes(), number))

        version = fingerprint | {"version": number}
        return cache_targets(dataset, name, version, image_ids, encode_version, shape, **options)

    return AugmentedTargets([cache_version(number) for number in range(views)])


def hash_fingerprint(meta: dict[str, Any]) -> str:
    """Hash of a fingerprint without its golden features.

    The last digits of those differ between devices.
    """
    fingerprint = {name: value for name, value in meta["fingerprint"].items() if name != "golden"}
    text = json.dumps(meta | {"fingerprint": fingerprint}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Refuse targets of another fingerprint, or of a model whose features have changed."""
    remedy = f"delete {folder}, so that the targets are made again"
    path = folder / "meta.json"
    stored = read_json(path, ("name", "fingerprint", "shape", "dtype"), remedy)
    if not isinstance(stored["fingerprint"], dict):
        raise PerceptError(f"{path} holds no fingerprint of the targets: {remedy}.")
    if hash_fingerprint(stored) != hash_fingerprint(meta):
        raise PerceptError(
            f"{folder} was made with another fingerprint than its name says: delete it."
        )
    recorded, current = (part["fingerprint"].get("golden", []) for part in (stored, meta))
    is_list = isinstance(recorded, list) and all(isinstance(v, int | float) for v in recorded)
    if not is_list:
        raise PerceptError(f"{path} holds no features of its model: {remedy}.")
    if not same_features(recorded, current):
        raise PerceptError(
            f"{folder} was made by a model that no longer gives the same features: delete it, so"
            " that the targets are made again."
        )


def _add_part(folder: Path, store: ImageStore, ids: np.ndarray, encoder: _TargetEncoder) -> None:
    """Compute and store the targets of `ids` as the next part, going on with an interrupted one."""
    checksums = store.crc[store.positions(ids)]
    identities = np.stack([ids, checksums], axis=1)
    numbers = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-[0-9]??.npy")]
    part = folder / f"part-{max(numbers, default=-1) + 1:03d}.npy"
    partial, state = part.with_suffix(".partial"), folder / "progress.json"
    key = hashlib.sha256(identities.tobytes()).hexdigest()
    rows = _RowFile(partial, (len(ids), *encoder.shape), encoder.dtype)
    done = rows.open(_count_done(partial, state, key))
    n_saved = done
    starts = range(done, len(ids), encoder.batch_size)
    with rows:
        for start in progress(starts, f"targets {folder.name}", len(starts)):
            batch = ids[start : start + encoder.batch_size]
            stop = start + len(batch)
            rows.append(encoder.compute(store.rows(batch), batch))
            if stop - n_saved >= 8 * encoder.batch_size:
                rows.flush()
                n_saved = stop
                write_json(state, {"key": key, "done": n_saved})
        rows.flush()
    with atomic(_ids_file(part)) as temporary, open(temporary, "wb") as file:
        np.save(file, identities, allow_pickle=False)
    with write_errors(part):
        os.replace(partial, part)  # from here on the part counts
        state.unlink(missing_ok=True)


def _count_done(partial: Path, state: Path, key: str) -> int:
    """Number of targets that an interrupted run of the same images has stored."""
    if not partial.exists() or not state.exists():
        return 0
    try:
        content = read_json(state, ("key", "done"))
    except PerceptError:  # damaged: all of them are made again
        return 0
    done = content["done"] if content["key"] == key else 0
    return done if isinstance(done, int) and done >= 0 else 0


class _RowFile:
    """An .npy file that is written row by row.

    It is written and not memory-mapped: on a full disk a memory map ends the process by a signal.

    Args:
        path: of the file.
        shape: (rows, ...) of the whole array.
        dtype: of the array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype
        self.row_bytes = int(np.prod(shape[1:])) * dtype.itemsize

    def open(self, n_rows: int) -> int:
        """Open the file to go on after `n_rows`, or from the first where it holds fewer.

        Returns:
            Number of rows that it has.

        Raises:
            PerceptError: if the disk cannot hold the rest, and as `write_errors`.
        """
        head = self._make_head()
        if n_rows and not self._holds(head, n_rows):
            n_rows = 0
        size = self.path.stat().st_size if self.path.exists() else 0
        full_size = len(head) + self.shape[0] * self.row_bytes
        with write_errors(self.path):
            check_space(self.path.parent, full_size - min(size, full_size))
            self.file = open(self.path, "r+b" if n_rows else "wb")  # noqa: SIM115
            if not n_rows:
                self.file.write(head)
            self.file.seek(len(head) + n_rows * self.row_bytes)
            self.file.truncate()
        return n_rows

    def _make_head(self) -> bytes:
        stream = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        content = {"descr": descr, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(stream, content)
        return stream.getvalue()

    def _holds(self, head: bytes, n_rows: int) -> bool:
        """Whether the file is of this array and has so many rows."""
        with open(self.path, "rb") as file:
            is_same = file.read(len(head)) == head
        return is_same and self.path.stat().st_size >= len(head) + n_rows * self.row_bytes

    def append(self, rows: np.ndarray) -> None:
        """Write the next rows."""
        with write_errors(self.path):
            self.file.write(np.ascontiguousarray(rows).data)

    def flush(self) -> None:
        """Bring to the disk what was written so far."""
        with write_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> _RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # that of the write counts
            self.file.close()
