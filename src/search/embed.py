"""Embedding the images of a folder or a webdataset into the folder of an index.

The file index.json of that folder records what made the embeddings, which tar files are done and
how many images could not be read; `src.search.building` adds the type and the shards of the index.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from src.search.embeddings import Embeddings
from src.search.images import SourcePart, decode_image, find_new_parts, iterate_samples
from src.utils import PerceptError, atomic, read_json, write_json

Encode = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _EmbeddedPart:
    """Embeddings (rows, dim) float16 of a part, a line of metadata a row, and unreadable images."""

    embeddings: np.ndarray
    metadata: pd.DataFrame
    n_unread: int


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
    Images that cannot be read are left out and counted (`index.json`).

    Args:
        source: folder of images or of tar files (`find_new_parts`).
        folder: of the index.
        encode: uint8 images (batch, size, size, 3) -> (batch, dim) or (batch, 1, dim).
        encoder: what the embeddings depend on, as JSON values; an index is of one encoder.
        size: of the encoder's images, pixels.
        part_rows: images a part.
        batch_size: images at a time.

    Raises:
        PerceptError: the folder holds embeddings of another encoder, or none of the images can be
            read.
    """
    folder = Path(folder)
    state = read_state(folder)
    if state.setdefault("encoder", encoder) != encoder:
        stored_name, new_name = _encoder_name(state["encoder"]), _encoder_name(encoder)
        raise PerceptError(
            f"{folder} holds embeddings of another encoder, {stored_name} and not {new_name}: give"
            " another folder, or the weights that made it."
        )
    finished = [*state["done"], *_embedded_paths(folder, Path(source))]
    parts = find_new_parts(source, part_rows, finished)
    prepare_folder(folder / "img_emb")
    prepare_folder(folder / "metadata")
    n_images = sum(len(part.paths) for part in parts) or None
    with tqdm(desc="embedding", unit="image", mininterval=2, total=n_images) as bar:
        for part in parts:
            try:
                embedded = _embed_part(part, size, encode, batch_size, bar)
            except (tarfile.TarError, json.JSONDecodeError) as error:
                raise PerceptError(
                    f"The part of {source} that begins with {part.name} cannot be read ({error}):"
                    " fetch it again, or take it away."
                ) from error
            if len(embedded.embeddings):
                _write_part(folder, embedded)
            if part.tar is not None:
                state["done"].append(part.name)
            state["unread"] += embedded.n_unread
            write_json(folder / "index.json", state)
    if not _count_parts(folder):
        raise PerceptError(
            f"None of the {state['unread']} files in {source} could be read as an image: look at"
            " one of them."
        )
    return Embeddings(folder)


def _embed_part(
    part: SourcePart, size: int, encode: Encode, batch_size: int, bar: Any
) -> _EmbeddedPart:
    embeddings, lines, n_unread = [], [], 0
    samples = iterate_samples(part)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        while True:
            batch = list(islice(samples, batch_size))
            decoded = pool.map(lambda sample: decode_image(sample[0], size), batch)
            images = []
            for image, (_, line) in zip(decoded, batch, strict=True):
                if image is not None:
                    images.append(image)
                    lines.append(line)
            n_unread += len(batch) - len(images)
            if images:
                embeddings.append(_embed_batch(images, encode))
            bar.update(len(batch))
            if len(batch) < batch_size:
                break
    if not embeddings:
        return _EmbeddedPart(np.empty((0, 0), np.float16), pd.DataFrame(), n_unread)
    return _EmbeddedPart(np.concatenate(embeddings), pd.DataFrame(lines), n_unread)


def _embed_batch(images: list[np.ndarray], encode: Encode) -> np.ndarray:
    """Images (size, size, 3) -> (images, dim) float16 of length one."""
    encoded = np.asarray(encode(np.stack(images)))
    embeddings = encoded.reshape(len(images), -1).astype(np.float32)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (embeddings / length).astype(np.float16)


def _write_part(folder: Path, part: _EmbeddedPart) -> None:
    """Write metadata first: without embeddings beside it, a metadata file does not count."""
    number = _count_parts(folder)
    with atomic(folder / "metadata" / f"metadata_{number:06d}.parquet") as path:
        part.metadata.to_parquet(path, index=False)
    with atomic(folder / "img_emb" / f"img_emb_{number:06d}.npy") as path, open(path, "wb") as file:
        np.save(file, part.embeddings)


def _count_parts(folder: Path) -> int:
    return len(list((folder / "img_emb").glob("*.npy")))


def _embedded_paths(folder: Path, source: Path) -> Iterator[str]:
    """Yield the images of a source that have embeddings already, relative to it."""
    for table_path in sorted((folder / "metadata").glob("*.parquet")):
        embeddings_name = table_path.name.replace("metadata", "img_emb")
        if not (folder / "img_emb" / embeddings_name).with_suffix(".npy").exists():
            continue
        for path in pq.read_table(table_path, columns=["image_path"])["image_path"].to_pylist():
            if Path(path).is_relative_to(source):
                yield str(Path(path).relative_to(source))


def _encoder_name(encoder: dict[str, Any]) -> str:
    return str(encoder.get("model", encoder.get("name", "unknown")))


# ------------------------------------------------------------------------------ state of a folder
def read_state(folder: Path) -> dict[str, Any]:
    """Read index.json of an index, or begin it where there is none."""
    path = folder / "index.json"
    return read_json(path) if path.exists() else {"done": [], "unread": 0}


def prepare_folder(folder: Path) -> None:
    """Make a folder, or remove the half-written files that a killed call left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)
