"""An index of many images on one machine: made from a folder, a webdataset or embeddings that
exist, and searched by cosine similarity.

An index is a folder, in the layout of clip-retrieval (github.com/rom1504/clip-retrieval), which can
serve it:

    img_emb/img_emb_000000.npy         embeddings (rows, dim), float16, of length one
    metadata/metadata_000000.parquet   a line a row: image_path, caption, url, key, ... image.index
    faiss's file, or a folder of shards 0000.index, 0001.index, ... of `shard_rows` rows each
    index.json                       what made the embeddings, which faiss type the index is, how
    many rows each shard has

- `collect` says what a source holds, `embed` makes embeddings of what is new in it, `build` makes
  the shards that are missing, `LocalIndex` searches.
- Whatever the type of the index, what it finds is scored again with the embeddings themselves, so
  that similarities are cosines, and candidates that a compressed index put in the wrong order
  change places.
- `find_near_duplicates` finds the rows that show a test image, or nearly so: they are kept out of every
  search unless somebody asks for them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from faiss.contrib.ondisk import merge_ondisk
from PIL import Image
from tqdm.auto import tqdm

from src.utils import PerceptError, atomic, read_json, write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

BLOCK = 65_536  # rows read at a time

# cosine from which two embeddings are of the same picture, half precision and another resizing
# forgiven
SAME_IMAGE_COSINE = 0.999

# rows up to which near duplicates are searched for in every row, and not with a compressed index
MAX_EXACT_ROWS = 5_000_000

OPQ_ITERATIONS = (
    10  # steps in which a compressed index turns its axes (OPQ); faiss's 50 take five times as long
)

MIN_TRAINING_ROWS = (
    10_000  # rows that a compressed index is learnt from: 39 for each of the 256 centres of a code
)

INDEX_KINDS = ("Flat", "SQfp16", "SQ8", "IVF-PQ")


class SearchResult(NamedTuple):
    """What a search found.

    similarity: (queries, k) float32, cosine, best first; -inf where there are fewer than k. row:
    (queries, k) int64, the row of the index; -1 where there are fewer.
    """

    similarity: np.ndarray
    row: np.ndarray


def check_queries(queries: Any, dim: int, k: int) -> np.ndarray:
    """Queries (queries, dim) as float32 of length one.

    Raises:
        PerceptError: another dim, numbers that are not finite, a query that is all 0, or k below 1.
    """
    queries = np.atleast_2d(np.asarray(queries, np.float32))
    if queries.shape[1] != dim:
        raise PerceptError(
            f"Queries have {queries.shape[1]} numbers and the index {dim}: both must come from the"
            " same encoder."
        )
    length = np.linalg.norm(queries, axis=1, keepdims=True)
    if not np.isfinite(queries).all() or not length.all():
        raise PerceptError(
            "A query holds NaN or infinite values, or nothing but zeros: look at the embeddings"
            " that the brain predicted."
        )
    if k < 1:
        raise PerceptError(f"{k} neighbours were asked for: ask for at least one.")
    return queries / length


def select_top_k(similarity: np.ndarray, row: np.ndarray, k: int) -> SearchResult:
    """The k best of candidates (queries, candidates), equal ones in the order of their rows; row -1
    is no candidate.
    """
    similarity = np.where(row < 0, -np.inf, similarity).astype(np.float32)
    order = np.lexsort((row, -similarity), axis=1)[:, :k]
    found = SearchResult(
        np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)
    )
    if (short := k - found.row.shape[1]) > 0:
        found = SearchResult(
            *(
                np.pad(x, ((0, 0), (0, short)), constant_values=fill)
                for x, fill in zip(found, (-np.inf, -1), strict=True)
            )
        )
    return SearchResult(found.similarity, np.where(np.isneginf(found.similarity), -1, found.row))


def read_checked(
    path: Path, remedy: str, read: Callable[..., Any], *arguments: Any, **named: Any
) -> Any:
    """What `read` reads from a file, or a sentence where that is cut short or is something else."""
    try:
        return read(str(path), *arguments, **named)
    except (
        RuntimeError,
        ValueError,
        EOFError,
    ) as error:  # of faiss, of numpy and pyarrow, of an empty file
        raise PerceptError(
            f"{path} cannot be read, as it is cut short or of another kind: {remedy}."
        ) from error


class Metadata:
    """What is known of each row: the files metadata/*.parquet of a folder, read where rows are
    asked for.

    Args:
        folder: of an index.
        parts: number of files that count, the first ones by name; one more is of a part that was
            interrupted.
    """

    def __init__(self, folder: str | Path, parts: int | None = None):
        self.tables = sorted((Path(folder) / "metadata").glob("*.parquet"))[:parts]
        self.lengths = [
            read_checked(table, "make that part again", pq.read_metadata).num_rows
            for table in self.tables
        ]
        self.start = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self.start[-1])

    def get_rows(self, rows: Any) -> pd.DataFrame:
        """A line for each of some rows (n,), in that order; of row -1, and where there are no
        files, nothing is known.
        """
        rows = np.asarray(rows, np.int64)
        which, found = np.searchsorted(self.start, rows, side="right") - 1, []
        for part in np.unique(which[rows >= 0]) if self.tables else ():
            at = np.flatnonzero((which == part) & (rows >= 0))
            found.append(
                pq.read_table(self.tables[part])
                .take(rows[at] - self.start[part])
                .to_pandas()
                .set_axis(at)
            )
        return (pd.concat(found) if found else pd.DataFrame()).reindex(range(len(rows)))


class Embeddings:
    """Embeddings of many images, memory-mapped: the files img_emb/*.npy of a folder.

    Attributes: parts, the arrays (rows, dim) in the order of their names; start, first row of each,
    and behind the last.

    Raises:
        PerceptError: there are none, a file is cut short, they are not of one dim, or metadata has
            other rows.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files = sorted((self.folder / "img_emb").glob("*.npy"))
        if not files:
            raise PerceptError(
                f"{self.folder / 'img_emb'} holds no .npy files: give a folder that clip-retrieval,"
                " or notebook 05_search_index, wrote embeddings into."
            )
        self.parts = [
            read_checked(file, "make that part again", np.load, mmap_mode="r", allow_pickle=False)
            for file in files
        ]
        if {part.ndim for part in self.parts} != {2} or len(
            dims := {part.shape[-1] for part in self.parts}
        ) != 1:
            raise PerceptError(
                f"The embeddings in {self.folder / 'img_emb'} are not all (rows, dim) with one dim:"
                f" {sorted({part.shape for part in self.parts})[:3]}."
            )
        self.dim = dims.pop()
        self.start = np.cumsum([0, *(len(part) for part in self.parts)])
        lengths = Metadata(folder, len(files)).lengths
        if lengths and lengths != [len(part) for part in self.parts]:
            wrong = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(lengths, map(len, self.parts), strict=False))
                    if a != b
                ),
                len(lengths),
            )
            raise PerceptError(
                f"Embeddings and metadata of {self.folder} differ in their rows from part {wrong}"
                " on: make that part again."
            )

    def __len__(self) -> int:
        return int(self.start[-1])

    def get_rows(self, rows: Any) -> np.ndarray:
        """Some rows (n,) as (n, dim) float32 of length one."""
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), self.dim), np.float32)
        which = np.searchsorted(self.start, rows, side="right") - 1
        for part in np.unique(which):
            at = which == part
            out[at] = self.parts[part][rows[at] - self.start[part]]
        out /= np.maximum(
            np.einsum("ij,ij->i", out, out)[:, None] ** 0.5, 1e-12
        )  # without a copy: a sample to learn from may be gigabytes
        return out

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, (rows, dim) float32 of length one) from one row to another, in pieces."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, BLOCK):
            yield first, self.get_rows(np.arange(first, min(first + BLOCK, stop)))

    def search_exact(
        self, queries: Any, k: int, exclude: Any = None, device: str = "cpu"
    ) -> SearchResult:
        """The k nearest by looking at every row: exact, and what a GPU does best.

        Arguments as `LocalIndex.search`.
        """
        queries = check_queries(queries, self.dim, k)
        asked = torch.from_numpy(queries).to(device)
        barred = np.unique(np.asarray([] if exclude is None else exclude, np.int64))
        near = SearchResult(
            np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        )
        for first, block in self.blocks():
            scores = asked @ torch.from_numpy(block).to(device).T  # (queries, rows)
            scores[
                :,
                torch.from_numpy(
                    barred[(barred >= first) & (barred < first + len(block))] - first
                ).to(device),
            ] = -torch.inf
            values, places = (x.cpu().numpy() for x in scores.topk(min(k, len(block)), dim=1))
            near = select_top_k(
                np.concatenate([near.similarity, values], 1),
                np.concatenate([near.row, places + first], 1),
                k,
            )
        return near


@dataclass
class SourcePart:
    """Images that are embedded together: paths of files, or all pictures of a tar file.

    Attributes: files; tar (None for files); name, by which it is known to be done.
    """

    files: list[Path]
    tar: Path | None
    name: str


def find_new_parts(
    source: str | Path, part_rows: int = 10_000, known: Iterable[str] = ()
) -> list[SourcePart]:
    """What a folder holds that is not known yet: its tar files one by one (a webdataset, as
    img2dataset writes it), else its pictures.

    Args:
        source: folder, searched with all below it.
        part_rows: pictures a part; a tar file is one part.
        known: names of tars, and paths of pictures below `source`, that are done.

    Raises:
        PerceptError: there is no such folder, or it holds neither tars nor pictures.
    """
    source, known = Path(source), set(known)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else []
    tars = [path for path in files if path.suffix == ".tar"]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not tars and not pictures:
        raise PerceptError(
            f"{source} holds no .tar files and no pictures ({', '.join(SUFFIXES)}): give a folder"
            " of either, or one with img_emb/ in it."
        )
    if tars:
        return [
            SourcePart([], path, name)
            for path in tars
            if (name := str(path.relative_to(source))) not in known
        ]
    new = [path for path in pictures if str(path.relative_to(source)) not in known]
    return [
        SourcePart(new[i : i + part_rows], None, str(new[i].relative_to(source)))
        for i in range(0, len(new), part_rows)
    ]


def write_tars(
    samples: Iterable[tuple[np.ndarray, str, dict[str, Any]]],
    folder: str | Path,
    count: int,
    rows: int = 2_500,
) -> Path:
    """Images as tar files such as img2dataset writes: key.png, key.txt (the caption), key.json (all
    else).

    Tars that are there are kept.

    Args:
        samples: (height, width, 3) uint8, caption, and what else is known.
        folder: for 00000.tar, 00001.tar, ...
        count: samples there are.
        rows: images a tar.
    """
    folder, samples = Path(folder), iter(samples)
    for start in tqdm(range(0, count, rows), desc="writing tars", mininterval=2):
        some = [sample for _, sample in zip(range(min(rows, count - start)), samples, strict=False)]
        place = folder / f"{start // rows:05d}.tar"
        if place.exists():
            continue
        with atomic(place) as path, tarfile.open(path, "w") as tar:
            for i, (pixels, caption, about) in enumerate(some, start):
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "png")
                files = {
                    "png": picture.getvalue(),
                    "txt": caption.encode(),
                    "json": json.dumps({"key": f"{i:09d}"} | about).encode(),
                }
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _described(text: dict[str, bytes]) -> dict[str, Any]:
    """Caption and fields of a sample's .txt and .json, which img2dataset writes beside the picture."""
    told: dict[str, Any] = {}
    if "json" in text:
        told = {
            name: value
            for name, value in json.loads(text["json"]).items()
            if isinstance(value, str | int | float | bool) or value is None
        }
    if "txt" in text:
        told["caption"] = text["txt"].decode("utf-8", "replace").strip()
    return told


def _samples(part: SourcePart) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(bytes of a picture, what is known of it) for every picture of a part."""
    if part.tar is None:
        for path in part.files:
            beside = {
                suffix: file.read_bytes()
                for suffix in ("txt", "json")
                if (file := path.with_suffix(f".{suffix}")).exists()
            }
            yield path.read_bytes(), _described(beside) | {"image_path": str(path)}
        return
    key, picture = "", None
    text: dict[str, bytes] = {}
    with tarfile.open(part.tar, "r:") as tar:
        for member in (*tar, None):
            name, _, suffix = (Path(member.name).name if member else "").partition(".")
            own = str(Path(member.name).parent / name) if member else ""
            if member is None or own != key:  # the files of a sample stand together
                if picture is not None:
                    yield (
                        picture[0],
                        _described(text)
                        | {
                            "image_path": key,
                            "tar": str(part.tar),
                            "tar_offset": picture[1],
                            "tar_size": len(picture[0]),
                        },
                    )
                key, picture, text = own, None, {}
            if member is not None and member.isfile():
                # a file has a content
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if f".{suffix.lower()}" in SUFFIXES:
                    picture = content, member.offset_data
                else:
                    text[suffix] = content


def decode_image(content: bytes, size: int) -> np.ndarray | None:
    """Bytes of a picture -> (size, size, 3) uint8: shorter side resized bicubically, centre crop;
    None where it is no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.draft("RGB", (size, size))  # a JPEG is decoded no larger than needed
            deep = picture.mode.startswith("I;16")  # which Pillow would clip to white
            rgb = (
                Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if deep else picture
            ).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    scale = size / min(rgb.size)
    width, height = (max(size, round(side * scale)) for side in rgb.size)
    if (width, height) != rgb.size:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _embed_part(
    part: SourcePart,
    size: int,
    encode: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    bar: Any,
) -> tuple[np.ndarray, pd.DataFrame, int]:
    """Embeddings (rows, dim) of a part's pictures, their metadata, and how many could not be read."""
    embeddings, told, unread = [], [], 0
    samples, more = _samples(part), True
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        while more:
            batch = [sample for _, sample in zip(range(batch_size), samples, strict=False)]
            more = len(batch) == batch_size
            pictures = list(pool.map(lambda sample: decode_image(sample[0], size), batch))
            good = [
                (picture, about)
                for picture, (_, about) in zip(pictures, batch, strict=True)
                if picture is not None
            ]
            unread += len(batch) - len(good)
            if good:
                made = (
                    np.asarray(encode(np.stack([picture for picture, _ in good])))
                    .reshape(len(good), -1)
                    .astype(np.float32)
                )
                embeddings.append(
                    (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)
                )
                told += [about for _, about in good]
            bar.update(len(batch))
    return (
        np.concatenate(embeddings) if embeddings else np.empty((0, 0), np.float16),
        pd.DataFrame(told),
        unread,
    )


def embed_images(
    source: str | Path,
    folder: str | Path,
    encode: Callable[[np.ndarray], np.ndarray],
    encoder: dict[str, Any],
    size: int,
    part_rows: int = 10_000,
    batch_size: int = 64,
) -> Embeddings:
    """Embeddings of all images of a source, in an index's folder; only of what is new since the
    last time.

    Each part is complete on disk before the next one begins, so that an interrupted call goes on.
    Pictures that cannot be read are left out and counted (`index.json`).

    Args:
        source: folder of pictures or of tar files (`collect`).
        folder: of the index.
        encode: uint8 images (batch, size, size, 3) -> (batch, dim) or (batch, 1, dim).
        encoder: what the embeddings depend on, as JSON values; an index is of one encoder.
        size: of the encoder's pictures, pixels.
        part_rows: pictures a part.
        batch_size: pictures at a time.

    Raises:
        PerceptError: the folder holds embeddings of another encoder, or none of the pictures can be
            read.
    """
    folder = Path(folder)
    state = _state(folder)
    if state.setdefault("encoder", encoder) != encoder:
        before, now = _name(state["encoder"]), _name(encoder)
        raise PerceptError(
            f"{folder} holds embeddings of another encoder, {before} and not {now}: give another"
            " folder, or the weights that made it."
        )
    parts = find_new_parts(source, part_rows, [*state["done"], *_paths(folder, Path(source))])
    _tidy(folder / "img_emb")
    _tidy(folder / "metadata")
    with tqdm(
        desc="embedding",
        unit="image",
        mininterval=2,
        total=sum(len(part.files) for part in parts) or None,
    ) as bar:
        for part in parts:
            try:
                made, told, unread = _embed_part(part, size, encode, batch_size, bar)
            except (tarfile.TarError, json.JSONDecodeError) as error:
                raise PerceptError(
                    f"The part of {source} that begins with {part.name} cannot be read ({error}):"
                    " fetch it again, or take it away."
                ) from error
            number = len(list((folder / "img_emb").glob("*.npy")))
            if len(made):
                with atomic(folder / "metadata" / f"metadata_{number:06d}.parquet") as path:
                    told.to_parquet(path, index=False)
                with (
                    atomic(folder / "img_emb" / f"img_emb_{number:06d}.npy") as path,
                    open(path, "wb") as file,
                ):
                    np.save(file, made)
            state["done"] += [part.name] if part.tar else []
            state["unread"] += unread
            write_json(folder / "index.json", state)
    if not list((folder / "img_emb").glob("*.npy")):
        raise PerceptError(
            f"None of the {state['unread']} files in {source} could be read as a picture: look at"
            " one of them."
        )
    return Embeddings(folder)


def _state(folder: Path) -> dict[str, Any]:
    return (
        read_json(folder / "index.json")
        if (folder / "index.json").exists()
        else {"done": [], "unread": 0}
    )


def _name(encoder: dict[str, Any]) -> str:
    return str(encoder.get("model", encoder.get("name", "unknown")))


def _paths(folder: Path, source: Path) -> Iterator[str]:
    """Pictures of a source that have embeddings already, relative to it."""
    for table in sorted((folder / "metadata").glob("*.parquet")):
        if (
            (folder / "img_emb" / table.name.replace("metadata", "img_emb"))
            .with_suffix(".npy")
            .exists()
        ):
            paths = pq.read_table(table, columns=["image_path"])["image_path"].to_pylist()
            yield from (
                str(Path(path).relative_to(source))
                for path in paths
                if Path(path).is_relative_to(source)
            )


def load_local_images(metadata: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of some rows that lie on this machine.

    Args:
        metadata: of `metadata`, a line a row.
        size: shorter side and centre crop, pixels.

    Returns:
        (rows, size, size, 3) uint8, grey where there is none, and (rows,) whether there is one.
    """

    def one(line: dict[str, Any]) -> np.ndarray | None:
        place = line.get("tar") if isinstance(line.get("tar"), str) else line.get("image_path")
        if not isinstance(place, str) or not Path(place).is_file():
            return None
        with open(place, "rb") as file:
            if place != line.get("image_path"):
                file.seek(int(line["tar_offset"]))
                return decode_image(file.read(int(line["tar_size"])), size)
            return decode_image(file.read(), size)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return stack_images(list(pool.map(one, metadata.to_dict("records"))), size)


def stack_images(pictures: Sequence[np.ndarray | None], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (size, size, 3) uint8 as one array, grey where there is none, and (pictures,)
    whether there is one.
    """
    grey = np.full((size, size, 3), 128, np.uint8)
    return np.stack([grey if picture is None else picture for picture in pictures]), np.array(
        [picture is not None for picture in pictures], bool
    )


@dataclass(frozen=True)
class IndexPlan:
    """A type of index for so many rows, and what it will take.

    Attributes: kind, one of INDEX_KINDS; factory, the same for faiss.index_factory; mapped, whether
    searches read it from disk; memory and disk, in
        bytes (metadata apart); candidates, how many rows are scored again with their embeddings for
        each one asked for; lists, of IVF-PQ, and probes, how many of them a query looks into; fits,
        within the memory that was given.
    """

    kind: str
    factory: str
    mapped: bool
    memory: float
    disk: float
    candidates: int
    lists: int
    probes: int
    fits: bool


def list_index_plans(rows: int, dim: int, memory_gb: float) -> list[IndexPlan]:
    """What each type of index takes, the most exact one first.

    Bytes a row are faiss's: 4 dim (Flat), 2 dim (SQfp16), dim (SQ8), and a code of about dim / 12
    bytes with an 8-byte id (IVF-PQ, whose lists have a centre of 4 dim bytes each). Embeddings, 2
    dim bytes a row, are on disk besides. docs/large_index.md has measurements.
    """
    lists = int(2 ** np.clip(np.floor(np.log2(max(rows, 1) ** 0.5 * 4)), 4, 18))
    code = next(
        (m for m in (64, 48, 32, 24, 16, 8, 4, 2, 1) if dim % m == 0 and m <= max(1, dim // 8)), 1
    )
    centres, stored = (
        4 * dim * (lists + dim + 256),
        2.0 * dim * rows,
    )  # of lists, the rotation, and codes
    factory, packed = f"OPQ{code},IVF{lists},PQ{code}x8", rows * (code + 8.0)
    rough = [
        ("Flat", "Flat", 4.0 * dim * rows, 1),
        ("SQfp16", "SQfp16", 2.0 * dim * rows, 2),
        ("SQ8", "SQ8", 1.0 * dim * rows, 4),
    ]
    made = [
        IndexPlan(kind, name, False, size, size + stored, again, 0, 0, size <= memory_gb * 1e9)
        for kind, name, size, again in rough
    ]
    probes = int(np.clip(lists // 64, 8, 256))
    for mapped, memory in ((False, packed + centres), (True, float(centres))):
        made.append(
            IndexPlan(
                "IVF-PQ",
                factory,
                mapped,
                memory,
                packed + centres + stored,
                16,
                lists,
                probes,
                memory <= memory_gb * 1e9,
            )
        )
    return made


def choose_index(
    rows: int, dim: int, memory_gb: float = 4.0, kind: str = "auto", mapped: bool = False
) -> tuple[IndexPlan, pd.DataFrame]:
    """The most exact index that fits, or the one that was asked for, and the table of all with what
    each takes.

    Args:
        rows: images.
        dim: of an embedding.
        memory_gb: for the index, in GB (10^9 bytes).
        kind: auto or one of INDEX_KINDS.
        mapped: read it from disk while searching, whatever its type.

    Raises:
        PerceptError: an unknown kind, or nothing fits.
    """
    if kind != "auto" and kind not in INDEX_KINDS:
        raise PerceptError(
            f"There is no index of the kind {kind!r}: choose auto or one of {', '.join(INDEX_KINDS)}."
        )
    known = list_index_plans(rows, dim, memory_gb)
    fitting = [
        plan
        for plan in known
        if (
            plan.fits
            if kind == "auto"
            else plan.kind == kind and (plan.fits or mapped or plan is known[-1])
        )
    ]
    if not fitting:
        least = min(plan.memory for plan in known if kind in ("auto", plan.kind)) / 1e9
        need = f"{rows:,} rows of {dim} numbers need at least {least:.2g} GB as {kind}"
        raise PerceptError(
            f"{need}, and {memory_gb:g} GB are given: give more, or another kind (IVF-PQ is"
            " smallest)."
        )
    taken = fitting[0]
    lines = [
        [
            p.kind,
            p.factory,
            "disk" if p.mapped else "memory",
            p.memory / 1e9,
            p.disk / 1e9,
            p.fits,
            p is taken,
        ]
        for p in known
    ]
    table = pd.DataFrame(
        lines,
        columns=[
            "kind",
            "faiss",
            "searched in",
            "memory (GB)",
            "disk with embeddings (GB)",
            "fits",
            "chosen",
        ],
    )
    return (
        taken if taken.mapped or not mapped else IndexPlan(**{**taken.__dict__, "mapped": True})
    ), table


def _train(embeddings: Embeddings, plan: IndexPlan, seed: int) -> Any:
    """An empty index that knows its centres and codes, from a sample of the rows."""
    if plan.kind == "IVF-PQ" and len(embeddings) < MIN_TRAINING_ROWS:
        raise PerceptError(
            f"{len(embeddings):,} images are too few to learn {plan.factory} from, which takes"
            f" {MIN_TRAINING_ROWS:,}: choose Flat."
        )
    index: Any = faiss.index_factory(embeddings.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if plan.kind == "IVF-PQ":
            rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter = OPQ_ITERATIONS
        n = min(len(embeddings), 1_000_000, max(48 * plan.lists, 20_000))
        index.train(
            embeddings.get_rows(
                np.sort(np.random.default_rng(seed).choice(len(embeddings), n, replace=False))
            )
        )
    return index


def _build_shard(folder: str, trained: str, start: int, stop: int, path: str, threads: int) -> int:
    """Fill one shard with rows [start, stop); works in a process of its own."""
    faiss.omp_set_num_threads(threads)
    index, embeddings = faiss.read_index(trained), Embeddings(folder)
    for _, block in embeddings.blocks(start, stop):
        index.add(block)
    with atomic(path) as temporary:
        faiss.write_index(index, str(temporary))
    return stop - start


def build_index(
    folder: str | Path, plan: IndexPlan, shard_rows: int = 1_000_000, jobs: int = 1, seed: int = 0
) -> LocalIndex:
    """The shards of an index that are missing or have grown; finished ones are kept, so that an
    interrupted call goes on.

    Args:
        folder: of the index, with its embeddings.
        plan: of `choose`. Where the index exists and its type is the same, what was learnt for it
            (centres, codes) is kept; with another type it is built anew.
        shard_rows: rows a shard.
        jobs: processes that build shards side by side.
        seed: of the sample that centres and codes are learnt from.

    Raises:
        PerceptError: too few rows for this type.
    """
    folder, embeddings = Path(folder), Embeddings(folder)
    state = _state(folder)
    wanted = {"kind": plan.kind, "shard_rows": shard_rows} | {
        name: getattr(plan, name) for name in ("factory", "mapped", "candidates", "probes")
    }
    place, before = folder / "image.index", state.get("index", {})
    if before.get("kind") != plan.kind or not place.is_dir():
        _remove(place)
        state["index"], state["shards"] = wanted, []
    elif before["shard_rows"] != shard_rows:
        state["index"]["shard_rows"], state["shards"] = shard_rows, []
        for shard in place.glob("[0-9]*.index"):
            shard.unlink()
    _tidy(place)
    state["index"] |= {"mapped": plan.mapped}
    trained = place / "trained.index"
    if not trained.exists():
        with atomic(trained) as temporary:
            faiss.write_index(_train(embeddings, plan, seed), str(temporary))
    write_json(folder / "index.json", state)
    ranges = [
        (start, min(start + shard_rows, len(embeddings)))
        for start in range(0, len(embeddings), shard_rows)
    ]
    missing = [
        i
        for i, r in enumerate(ranges)
        if list(r) not in state["shards"][i : i + 1] or not (place / f"{i:04d}.index").exists()
    ]
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))
    with tqdm(
        desc="indexing",
        unit="row",
        unit_scale=True,
        mininterval=2,
        total=sum(ranges[i][1] - ranges[i][0] for i in missing),
    ) as bar:

        def done(i: int, rows: int) -> None:
            state["shards"][i : i + 1] = [list(ranges[i])]
            write_json(folder / "index.json", state)
            bar.update(rows)

        _run(
            missing,
            lambda i: (
                str(folder),
                str(trained),
                *ranges[i],
                str(place / f"{i:04d}.index"),
                threads,
            ),
            done,
            jobs,
        )
    return LocalIndex(folder)


def _tidy(place: Path) -> None:
    """A folder that is there, without what a call that was killed left half-written in it."""
    place.mkdir(parents=True, exist_ok=True)
    for unfinished in place.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _run(
    missing: Sequence[int],
    arguments: Callable[[int], tuple[Any, ...]],
    done: Callable[[int, int], None],
    jobs: int,
) -> None:
    """Build shards here, or several at a time in processes of their own."""
    if jobs <= 1 or len(missing) <= 1:
        for i in missing:
            done(i, _build_shard(*arguments(i)))
        return
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_build_shard, *arguments(i)): i for i in missing}
        for future in as_completed(running):
            done(running[future], future.result())


def merge_shards(folder: str | Path) -> Path:
    """All shards in one file for `clip-retrieval back`: image.index/populated.index, with lists
    that stay on disk (merged_index.ivfdata) for IVF-PQ.

    Raises:
        PerceptError: shards are missing.
    """
    folder = Path(folder)
    state, place = _state(folder), folder / "image.index"
    files = [place / f"{i:04d}.index" for i in range(len(state.get("shards", [])))]
    if not files or not all(file.exists() for file in files):
        raise PerceptError(f"{folder} has no finished index to join: build it first.")
    whole = place / "populated.index"
    _remove(whole)
    if len(files) == 1:
        os.link(files[0], whole)
        return whole
    index = faiss.read_index(str(place / "trained.index"))
    if state["index"]["kind"] == "IVF-PQ":
        merge_ondisk(
            index,
            [str(file) for file in files],
            str(place / "merged_index.ivfdata"),
            shift_ids=True,
        )
    else:
        for file in files:
            index.merge_from(faiss.read_index(str(file)))
    with atomic(whole) as temporary:
        faiss.write_index(index, str(temporary))
    return whole


def _options(index: Any, barred: np.ndarray, probes: int) -> Any:
    """Search parameters of faiss for an index of any of the usual types: rows that are left out,
    lists that are looked into.
    """
    made: Any = faiss  # whose stubs know no keywords
    selector = made.IDSelectorNot(made.IDSelectorBatch(barred)) if len(barred) else None
    chosen: Any
    if isinstance(index, faiss.IndexPreTransform):
        inner = _options(faiss.downcast_index(index.index), barred, probes)
        chosen = made.SearchParametersPreTransform(index_params=inner)
        chosen.inner = inner  # faiss does not keep it alive
    elif isinstance(index, faiss.IndexIVF):
        chosen = made.SearchParametersIVF(sel=selector, nprobe=probes or index.nprobe)
    elif isinstance(index, faiss.IndexHNSW):
        chosen = made.SearchParametersHNSW(sel=selector, efSearch=max(64, index.hnsw.efSearch))
    else:
        chosen = made.SearchParameters(sel=selector)
    chosen.kept = selector
    return chosen


class LocalIndex:
    """An index on this machine, made by `build` or by clip-retrieval (image.index a file, or a
    folder with populated.index).

    Args:
        folder: of the index.
        device: a GPU ("cuda") compares queries with all embeddings, exactly; on the CPU, or without
            embeddings, faiss searches.

    Attributes: dim; kind, of faiss; encoder, what made the embeddings ({} where that is not
    recorded); embeddings (None where the folder has none).

    Raises:
        PerceptError: there is no index in the folder, a file is cut short, or its parts have other
            numbers of rows.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        state, place = _state(self.folder), self.folder / "image.index"
        self.encoder, about = state.get("encoder", {}), state.get("index", {})
        shards = sorted(place.glob("[0-9]*.index")) or (
            [place / "populated.index"] if place.is_dir() else [place]
        )
        if not shards[0].exists():
            raise PerceptError(
                f"{self.folder} holds no image.index: build one with notebook 05_search_index, or"
                " give the folder of an index."
            )
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if about.get("mapped") else 0
        if shards[0].name == "populated.index":
            flags |= faiss.IO_FLAG_ONDISK_SAME_DIR
        self.shards = [
            read_checked(shard, "delete it, and build the index again", faiss.read_index, flags)
            for shard in shards
        ]
        self._pool = ThreadPoolExecutor(
            min(len(shards), os.cpu_count() or 1)
        )  # kept, as each new thread would make faiss begin new ones
        self.start = np.cumsum([0, *(shard.ntotal for shard in self.shards)])
        self.kind, self.dim = about.get("kind", type(self.shards[0]).__name__), self.shards[0].d
        self.candidates, self.probes = about.get("candidates", 4), about.get("probes", 0)
        self.embeddings = Embeddings(self.folder) if (self.folder / "img_emb").is_dir() else None
        self._metadata = Metadata(
            self.folder, len(self.embeddings.parts) if self.embeddings is not None else None
        )
        for what, rows in (("embeddings", self.embeddings), ("lines of metadata", self._metadata)):
            if rows is not None and len(rows) not in (0, len(self)):
                raise PerceptError(
                    f"{self.folder} has {len(rows):,} {what} and an index of {len(self):,} rows:"
                    " build the index again."
                )

    def __len__(self) -> int:
        return int(self.start[-1])

    def __repr__(self) -> str:
        how = "on the GPU" if self.device != "cpu" and self.embeddings is not None else self.kind
        return (
            f"{self.folder.name}: {len(self):,} rows of {self.dim} numbers, {how},"
            f" {len(self.shards)} shard{'s' * (len(self.shards) > 1)}"
        )

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """The k most similar rows.

        Args:
            queries: (queries, dim), of any length.
            k: rows a query, at least 1.
            exclude: (n,) rows that are never returned.

        Raises:
            PerceptError: another dim, numbers that are not finite, or k below 1.
        """
        if self.device != "cpu" and self.embeddings is not None:
            return self.embeddings.search_exact(queries, k, exclude, self.device)
        queries = check_queries(queries, self.dim, k)
        barred = np.unique(np.asarray([] if exclude is None else exclude, np.int64))
        more = k * (self.candidates if self.embeddings is not None else 1)
        side_by_side = (
            self._pool.map if len(queries) == 1 < len(self.shards) else map
        )  # several queries are shared out over the cores by faiss itself
        found = list(
            side_by_side(
                lambda i: self._search_shard(i, queries, more, barred), range(len(self.shards))
            )
        )
        near = select_top_k(
            np.concatenate([part.similarity for part in found], 1),
            np.concatenate([part.row for part in found], 1),
            more,
        )
        return (
            near
            if self.embeddings is None
            else select_top_k(self._cosines(queries, near.row), near.row, k)
        )

    def _search_shard(
        self, i: int, queries: np.ndarray, k: int, barred: np.ndarray
    ) -> SearchResult:
        """The k nearest of one shard, numbered as rows of the whole index."""
        shard, first = self.shards[i], self.start[i]
        own = barred[(barred >= first) & (barred < self.start[i + 1])] - first
        values, rows = shard.search(
            queries, min(k, shard.ntotal), params=_options(shard, own, self.probes)
        )
        return SearchResult(values, np.where(rows < 0, -1, rows + first))

    def _cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Cosines (queries, candidates) of candidates with their own query, from the embeddings;
        -inf for row -1.
        """
        out = np.full(rows.shape, -np.inf, np.float32)
        for q in range(len(rows)):
            there = rows[q] >= 0
            # only called with embeddings
            out[q, there] = self.embeddings.get_rows(rows[q, there]) @ queries[q]  # type: ignore[union-attr]
        return out

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """What is known of some rows (n,), a line each in that order; of row -1 nothing."""
        return self._metadata.get_rows(rows)

    def measure_recall(self, k: int = 16, queries: int = 200, seed: int = 0) -> float:
        """Share of the k truly nearest rows that a search finds, with embeddings of the index
        itself as queries, each without itself.

        Raises:
            PerceptError: the index has no embeddings to compare with.
        """
        if self.embeddings is None:
            raise PerceptError(
                f"{self.folder} has no embeddings, so that nothing tells which rows are truly"
                " nearest: keep img_emb/ beside the index."
            )
        rows = np.random.default_rng(seed).choice(len(self), min(queries, len(self)), replace=False)
        asked, hits = self.embeddings.get_rows(rows), 0
        k = min(k, len(self) - 1)
        found, true = (
            np.asarray(near.row)
            for near in (self.search(asked, k + 1), self.embeddings.search_exact(asked, k + 1))
        )
        for row, a, b in zip(rows, found, true, strict=True):
            hits += len((set(a[a != row][:k])) & set(b[b != row][:k]))
        return hits / (k * len(rows))


def find_near_duplicates(
    index: Any, images: Any, image_ids: Any, near: float = 0.94
) -> pd.DataFrame:
    """Rows of an index that show one of some images, or nearly so.

    Args:
        index: with `search`.
        images: embeddings (images, dim) of test images, by the encoder of the index.
        image_ids: (images,).
        near: cosine from which a row counts as nearly the same.

    Returns:
        [image, row, similarity, exact], a line for every pair; exact: from `SAME_IMAGE_COSINE` on.
    """
    images, ids, k = np.asarray(images, np.float32), np.asarray(image_ids), 16
    pairs, left = [], np.arange(len(images))
    stored = getattr(index, "embeddings", None)
    search = (
        stored.search_exact
        if stored is not None and len(stored) <= MAX_EXACT_ROWS
        else index.search
    )
    while len(left):
        found = search(images[left], k)
        full = (found.similarity >= near).all(1) & (found.row >= 0).all(
            1
        )  # there may be more of these
        for q, similarity, row in zip(
            left[~full], found.similarity[~full], found.row[~full], strict=True
        ):
            pairs += [
                (ids[q], r, float(s)) for s, r in zip(similarity, row, strict=True) if s >= near
            ]
        left, k = left[full], k * 4
    table = pd.DataFrame(pairs, columns=["image", "row", "similarity"])
    return table.assign(exact=table["similarity"] >= SAME_IMAGE_COSINE)
