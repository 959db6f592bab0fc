"""Embedding the images of a folder or a webdataset into the folder of an index.

What is done is recorded in index.json, see `src.search.records`. Images that cannot be read are
left out one by one, tar files that do not end where they should as a whole; both are named.
"""

from __future__ import annotations

import os
import tarfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.files.foreign import shorten
from src.files.ownership import lock_folder
from src.search.embeddings import Embeddings
from src.search.images import (
    Sample,
    SourcePart,
    decode_image,
    describe_file,
    iterate_samples,
    list_source,
)
from src.search.known_parts import adopt_parts, compare_parts
from src.search.records import (
    check_writable,
    embeddings_path,
    find_foreign_index,
    list_visible,
    metadata_path,
    prepare_folder,
    read_state,
    remove_unwritten,
)
from src.search.tables import make_table
from src.utils import PerceptError, atomic, write_json

Encode = Callable[[np.ndarray], np.ndarray]

MAX_NAMES = 20  # of unreadable images that index.json lists


@dataclass
class _EmbeddedPart:
    """What came of a part.

    Attributes:
        embeddings: (rows, dim) float16, in blocks.
        samples: of each row, without its content.
        unread: names of the images that could not be read or embedded.
        n_seen: images in all.
    """

    embeddings: list[np.ndarray] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    n_seen: int = 0


@dataclass
class _Report:
    """What was left out of this call, for its last words."""

    n_seen: int = 0
    unread: list[str] = field(default_factory=list)
    ignored_texts: list[str] = field(default_factory=list)
    bad_tars: list[tuple[str, str]] = field(default_factory=list)

    def warn(self, source: Any) -> None:
        """Warn of the images that were left out, and of texts that were not used."""
        for names, what in (
            (self.unread, "images could not be read and are left out"),
            (self.ignored_texts, "images have a .json beside them that is no JSON object"),
        ):
            if names:
                listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                warnings.warn(
                    f"{source}: {len(names)} of {self.n_seen} {what} ({listed}).", stacklevel=4
                )

    def check_tars(self, source: Any) -> None:
        """Refuse a source of which tar files could not be read; all others are embedded."""
        if not self.bad_tars:
            return
        name, reason = self.bad_tars[0]
        other_tars = ""
        if len(self.bad_tars) > 1:
            other_tars = f", nor can {len(self.bad_tars) - 1} more of its tar files"
        raise PerceptError(
            f"The part of {source} that begins with {name} cannot be read ({reason}){other_tars}:"
            " fetch it again, or take it away; all that could be read is embedded."
        )


def embed_images(
    source: str | Path,
    folder: str | Path,
    encode: Encode,
    encoder: dict[str, Any],
    size: int,
    part_rows: int = 10_000,
    batch_size: int = 64,
) -> Embeddings:
    """Embed all images of a source that the folder of an index does not hold yet.

    Each part is complete on disk before the next one begins, so that an interrupted call goes on.
    Images that cannot be read are left out, counted and named (`index.json`, and a warning). Files
    that were replaced since they were embedded are embedded again.

    Args:
        source: folder of images or of tar files (`find_new_parts`).
        folder: of the index.
        encode: uint8 images (batch, size, size, 3) -> (batch, dim) or (batch, 1, dim).
        encoder: what the embeddings depend on, as JSON values; an index is of one encoder.
        size: of the encoder's images, pixels.
        part_rows: images a part.
        batch_size: images at a time.

    Raises:
        PerceptError: the folder holds embeddings of another encoder, or of one that is not
            recorded, or another process writes it; none of the images can be read; a tar file
            cannot be read or does not end where it should (all others are embedded then).
    """
    folder = Path(folder)
    files = list_source(source)
    _check_encoder(folder, encoder)
    with lock_folder(folder, "embedding images"):
        state = _open_state(folder, encoder)
        state, finished = compare_parts(folder, state, files)
        write_json(folder / "index.json", state)
        remove_unwritten(folder, state)
        parts = files.group(part_rows, finished)
        report = _Report()
        n_tar_unread = sum(part.get("unread", 0) for part in state["parts"])
        n_images = sum(len(part.paths) for part in parts) or None
        with tqdm(desc="embedding", unit="image", mininterval=2, total=n_images) as bar:
            for part in parts:
                try:
                    embedded = _embed_part(part, size, encode, batch_size, bar)
                except (tarfile.TarError, OSError) as error:
                    report.bad_tars.append((part.name, shorten(error)))
                    continue
                _write_part(folder, state, part, files.root, embedded, report)
                state["unread"] = n_tar_unread + len(report.unread)
                state["unread_names"] = report.unread[:MAX_NAMES]
                write_json(folder / "index.json", state)
    report.warn(source)
    report.check_tars(source)
    if not any(part["rows"] for part in state["parts"]):
        raise PerceptError(
            f"None of the {state['unread']} files in {source} could be read as an image: look at"
            " one of them."
        )
    return Embeddings(folder)


# -------------------------------------------------------------------------------- one part
def _embed_part(
    part: SourcePart, size: int, encode: Encode, batch_size: int, bar: Any
) -> _EmbeddedPart:
    embedded = _EmbeddedPart()
    samples = iterate_samples(part)

    def decode(sample: Sample) -> np.ndarray | None:
        return None if sample.content is None else decode_image(sample.content, size)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        while batch := list(islice(samples, batch_size)):
            pixels = list(pool.map(decode, batch))
            for sample in batch:
                sample.content = None
            _embed_batch(embedded, batch, pixels, encode)
            bar.update(len(batch))
    return embedded


def _embed_batch(
    embedded: _EmbeddedPart,
    samples: Sequence[Sample],
    pixels: Sequence[np.ndarray | None],
    encode: Encode,
) -> None:
    """Embed those samples that have pixels (size, size, 3), and name the others."""
    readable = [sample for sample, image in zip(samples, pixels, strict=True) if image is not None]
    images = [image for image in pixels if image is not None]
    embedded.n_seen += len(samples)
    usable = np.empty(0, bool)
    if images:
        rows = np.asarray(encode(np.stack(images))).reshape(len(images), -1).astype(np.float32)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        usable = (np.isfinite(length) & (length > 0))[:, 0]
        if not usable.any():
            raise PerceptError(
                f"The encoder gives NaN, infinite values or nothing but zeros for {len(images)}"
                f" images, such as {readable[0].name}: look at its weights."
            )
        embedded.embeddings.append((rows[usable] / length[usable]).astype(np.float16))
    usable_samples = [readable[row] for row in np.flatnonzero(usable)]
    embedded.samples += usable_samples
    kept_ids = set(map(id, usable_samples))
    embedded.unread += [sample.name for sample in samples if id(sample) not in kept_ids]


def _write_part(
    folder: Path,
    state: dict[str, Any],
    part: SourcePart,
    root: Path,
    embedded: _EmbeddedPart,
    report: _Report,
) -> None:
    """Write a part and add it to the state, which the caller records: only then it counts."""
    report.n_seen += embedded.n_seen
    report.unread += embedded.unread
    number = None
    if embedded.samples:
        number = _next_number(folder, state)
        state["unwritten"] = [number]
        write_json(folder / "index.json", state)
        with atomic(metadata_path(folder, number)) as path:
            _make_metadata(embedded.samples, report).to_parquet(path, index=False)
        with atomic(embeddings_path(folder, number)) as path, open(path, "wb") as file:
            np.save(file, np.concatenate(embedded.embeddings))
        state["unwritten"] = []
    record: dict[str, Any] = {"number": number, "rows": len(embedded.samples), "name": part.name}
    if part.tar is not None:
        record |= {"tar": str(part.tar), "unread": len(embedded.unread)} | describe_file(part.tar)
    if number is not None or part.tar is not None:
        state["parts"].append(record | {"source": str(root)})


def _make_metadata(samples: Sequence[Sample], report: _Report) -> pd.DataFrame:
    lines = []
    for sample in samples:
        line, usable = sample.to_line()
        lines.append(line)
        if not usable:
            report.ignored_texts.append(sample.name)
    return make_table(lines)


def _next_number(folder: Path, state: dict[str, Any]) -> int:
    """Return a number that no file of the folder has."""
    numbers = [part["number"] for part in state["parts"] if part["number"] is not None]
    for path in list_visible(folder / "img_emb", "img_emb_*.npy"):
        digits = path.stem.removeprefix("img_emb_")
        numbers += [int(digits)] if digits.isdecimal() else []
    return max(numbers, default=-1) + 1


# ------------------------------------------------------------------------------------ what is done
def _check_encoder(folder: Path, encoder: dict[str, Any]) -> None:
    """Refuse to mix images into embeddings of another encoder, or of one that is not recorded."""
    check_writable(folder)
    recorded = read_state(folder).get("encoder")
    if recorded is None and (
        list_visible(folder / "img_emb", "*.npy") or find_foreign_index(folder) is not None
    ):
        raise PerceptError(
            f"{folder} holds an index whose encoder is not recorded, so that images cannot be added"
            " to it: give another folder for the images (index)."
        )
    if recorded is not None and recorded != encoder:
        raise PerceptError(
            f"{folder} holds embeddings of another encoder, {_encoder_name(recorded)} and not"
            f" {_encoder_name(encoder)}: give another folder, or the weights that made it."
        )


def _open_state(folder: Path, encoder: dict[str, Any]) -> dict[str, Any]:
    """Read the record of a folder that this process owns, and remove what does not count."""
    _check_encoder(folder, encoder)
    state = {"encoder": encoder, "unread": 0} | read_state(folder)
    prepare_folder(folder / "img_emb")
    prepare_folder(folder / "metadata")
    if "parts" not in state:
        state["parts"] = adopt_parts(folder)
    remove_unwritten(folder, state)
    return state


def _encoder_name(encoder: dict[str, Any]) -> str:
    return str(encoder.get("model", encoder.get("name", "unknown")))
