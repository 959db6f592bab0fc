"""Targets of frozen models, computed once for each image and memory-mapped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from src.data.draws import choose_repeats
from src.data.files import check_space, disk_errors, find_rows, gather_rows
from src.data.images import ImageStore
from src.data.layout import dataset_folder
from src.utils import PerceptError, atomic, progress, read_json, same_features, write_json


class TargetCache:
    """Frozen targets of images, memory-mapped. Made by `cache_targets`.

    Attributes:
        folder: where they are stored.
        image_ids: int64 (images,), ascending.
        shape: shape of one target.
        dtype: as stored.
    """

    def __init__(self, folder: Path, store: ImageStore):
        meta = read_json(folder / "meta.json")
        self.folder, self.shape, self.dtype = folder, tuple(meta["shape"]), np.dtype(meta["dtype"])
        self.parts = sorted(folder.glob("part-???.npy"))
        place: dict[
            int, tuple[int, int]
        ] = {}  # image -> (part, row); a later part, made from newer pixels, wins
        crc = dict(zip(store.image_ids.tolist(), store.crc.tolist(), strict=True))
        for number, part in enumerate(self.parts):
            for row, (image, pixels) in enumerate(
                np.load(_ids_file(part), allow_pickle=False).tolist()
            ):
                if crc.get(image) == pixels:
                    place[image] = (number, row)
        self.image_ids = np.array(sorted(place), dtype=np.int64)
        self._place = np.array([place[i] for i in self.image_ids.tolist()], dtype=np.int64).reshape(
            -1, 2
        )
        self._order = np.arange(len(self.image_ids))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_maps"}

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        return [np.load(part, mmap_mode="r", allow_pickle=False) for part in self.parts]

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if the target of one of these images is missing."""
        missing = np.setdiff1d(image_ids, self.image_ids)
        if len(missing):
            raise PerceptError(
                f"{self.folder} lacks the targets of {len(missing)} images, the first is"
                f" {missing[0]}: make them with cache_targets."
            )

    def rows(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Targets by image id, (n, *shape) in the stored dtype.

        Raises PerceptError for an image without one.
        """
        self.check(image_ids)
        place = self._place[find_rows(self.image_ids, self._order, image_ids, str(self.folder))]
        out = np.empty((len(place), *self.shape), self.dtype)
        for number in np.unique(place[:, 0]):
            mine = place[:, 0] == number
            out[mine] = gather_rows(self._maps[number], place[mine, 1])
        return out


class LatentFile:
    """Latents of images that somebody else computed, a row an image, memory-mapped: `fMRI_VAE.npy`
    of the course's NSD subset, for instance.

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
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise PerceptError(
                f"{path} is no array of latents that can be read ({error}): give the .npy file, or"
                " leave latents_file empty."
            ) from None
        if self._array.dtype.kind != "f" or self._array.shape[1:] not in (
            self.shape,
            (1, *self.shape),
        ):
            expected = f"floats (images, {', '.join(map(str, self.shape))})"
            raise PerceptError(
                f"{path} holds {self._array.dtype} {self._array.shape}, not {expected}: it is of"
                " another autoencoder or of something else."
            )

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if the latent of one of these images is missing."""
        beyond = np.asarray(image_ids)[
            (np.asarray(image_ids) < 0) | (np.asarray(image_ids) >= len(self._array))
        ]
        if len(beyond):
            raise PerceptError(
                f"{self.path} has {len(self._array)} rows, none for image {beyond[0]}: its rows"
                " have to be the images 0, 1, 2 and so on."
            )

    def rows(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Latents by image id, (n, channels, h, w)."""
        self.check(image_ids)
        return np.asarray(self._array[np.asarray(image_ids, np.int64)]).reshape(-1, *self.shape)


class AugmentedTargets:
    """Several versions of every image's target, of which an epoch shows one.

    Made by `cache_augmented_targets`.

    Attributes:
        versions: one `TargetCache` a version.
    """

    def __init__(self, versions: Sequence[TargetCache]):
        self.versions = list(versions)

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if a version of one of these images is missing."""
        for targets in self.versions:
            targets.check(image_ids)

    def rows(self, image_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Of each image the version that (seed, epoch, image) choose, (n, *shape) in the stored
        dtype.
        """
        chosen = choose_repeats(
            seed + 2, epoch, image_ids, np.full(len(image_ids), len(self.versions))
        )
        first = self.versions[0]
        out = np.empty((len(image_ids), *first.shape), first.dtype)
        for number in np.unique(chosen):
            mine = chosen == number
            out[mine] = self.versions[number].rows(np.asarray(image_ids)[mine])
        return out


def _ids_file(part: Path) -> Path:
    return part.with_suffix(".ids")


def cache_targets(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Sequence[int] | np.ndarray,
    encode: Callable[[np.ndarray], np.ndarray],
    shape: Sequence[int],
    dtype: str = "float16",
    batch_size: int = 64,
) -> TargetCache:
    """Targets of a frozen model, computed once for each image and stored under
    data/<dataset>/targets/<name>-<hash>/.

    An interrupted run goes on where it stopped; images asked for later, or whose pixels have
    changed since, are added as a further part. Processes that ask at once take turns: the first
    computes, the others find the result.

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
    meta = json.loads(
        json.dumps(
            {"name": name, "fingerprint": fingerprint, "shape": list(shape), "dtype": dtype},
            default=str,
        )
    )
    folder = dataset_folder(dataset) / "targets" / f"{name}-{hash_fingerprint(meta)}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, disk_errors(folder):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "meta.json").exists():
            write_json(folder / "meta.json", meta)
        _check_meta(read_json(folder / "meta.json"), meta, folder)
        targets = TargetCache(folder, store)
        missing = np.setdiff1d(image_ids, targets.image_ids)
        if len(missing):
            _add_part(
                folder, store, missing, encode, (len(missing), *shape), np.dtype(dtype), batch_size
            )
            targets = TargetCache(folder, store)
    return targets


def hash_fingerprint(meta: dict[str, Any]) -> str:
    """Name of a fingerprint without its golden features, whose last digits differ between devices."""
    fingerprint = {name: value for name, value in meta["fingerprint"].items() if name != "golden"}
    return hashlib.sha256(
        json.dumps(meta | {"fingerprint": fingerprint}, sort_keys=True).encode()
    ).hexdigest()[:12]


def _check_meta(stored: dict[str, Any], meta: dict[str, Any], folder: Path) -> None:
    """Refuse targets of another fingerprint, or of a model that gave other features than it gives
    now.
    """
    if hash_fingerprint(stored) != hash_fingerprint(meta):
        raise PerceptError(
            f"{folder} was made with another fingerprint than its name says: delete it."
        )
    if not same_features(*(each["fingerprint"].get("golden", []) for each in (stored, meta))):
        raise PerceptError(
            f"{folder} was made by a model that no longer gives the same features: delete it, so"
            " that the targets are made again."
        )


def cache_augmented_targets(
    dataset: str | Path,
    name: str,
    fingerprint: dict[str, Any],
    image_ids: Sequence[int] | np.ndarray,
    encode: Callable[[np.ndarray, int], np.ndarray],
    shape: Sequence[int],
    views: int,
    **options: Any,
) -> AugmentedTargets:
    """Targets of augmented images: `views` versions of each, computed once.

    Args:
        dataset, name, fingerprint, image_ids, shape, options: as for `cache_targets`; the
            fingerprint says how images are augmented.
        encode: (uint8 images (batch, height, width, 3), seed) -> (batch, *shape); the seed is that
            of the version and of the pixels, so that a version is made again as it was.
        views: number of versions.
    """

    def version(number: int) -> TargetCache:
        def one(images: np.ndarray) -> np.ndarray:
            return encode(images, zlib.crc32(images.tobytes(), number))

        return cache_targets(
            dataset, name, fingerprint | {"version": number}, image_ids, one, shape, **options
        )

    if views < 1:
        raise PerceptError(
            f"{views} views of the targets {name} were asked for: choose at least 1."
        )
    return AugmentedTargets([version(number) for number in range(views)])


def _add_part(
    folder: Path,
    store: ImageStore,
    ids: np.ndarray,
    encode: Callable,
    shape: tuple[int, ...],
    dtype: np.dtype,
    batch_size: int,
) -> None:
    """Compute and store the targets of `ids` as the next part, going on with an interrupted one."""
    known = np.stack(
        [ids, store.crc[store.positions(ids)]], axis=1
    )  # (images, 2): id and CRC of the pixels
    part = folder / f"part-{len(list(folder.glob('part-???.npy'))):03d}.npy"
    partial, state = part.with_suffix(".partial"), folder / "progress.json"
    key, done = hashlib.sha256(known.tobytes()).hexdigest(), 0
    if partial.exists() and state.exists() and read_json(state)["key"] == key:
        done = read_json(state)["done"]
    else:
        check_space(folder, int(np.prod(shape)) * dtype.itemsize)
    array = np.lib.format.open_memmap(
        partial, "r+" if done else "w+", None if done else dtype, None if done else shape
    )
    starts, saved = range(done, len(ids), batch_size), done
    for start in progress(starts, f"targets {folder.name}", len(starts)):
        batch = ids[start : start + batch_size]
        array[start : start + len(batch)] = _encoded(
            encode, store.rows(batch), batch, shape[1:], dtype
        )
        if start + len(batch) - saved >= 8 * batch_size:
            array.flush()
            saved = start + len(batch)
            write_json(state, {"key": key, "done": saved})
    array.flush()
    with atomic(_ids_file(part)) as temporary, open(temporary, "wb") as file:
        np.save(file, known, allow_pickle=False)
    os.replace(partial, part)
    state.unlink(missing_ok=True)


def _encoded(
    encode: Callable, images: np.ndarray, ids: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """What `encode` gives, checked, in the dtype to be stored."""
    rows = np.asarray(encode(images))
    if rows.shape != (len(ids), *shape):
        raise PerceptError(
            f"The targets of {len(ids)} images have shape {rows.shape}, {(len(ids), *shape)} was"
            " announced."
        )
    with np.errstate(over="ignore"):
        rows = rows.astype(dtype)
    good = np.isfinite(rows.reshape(len(rows), -1)).all(1)
    if not good.all():
        raise PerceptError(
            f"The target of image {ids[~good][0]} is not finite in {dtype}: encode in float32, or"
            " store it with dtype='float32'."
        )
    return rows
