"""Qdrant as the index, for more images than one machine holds.

- A server (`docker run -p 6333:6333 -v images:/qdrant/storage qdrant/qdrant`, or a cluster) of many
  shards is reached through the package qdrant-client.
- A folder is opened with the package qdrant-edge-py, which is Qdrant's engine as a library: one
  shard, one process at a time, no server.

`QdrantIndex` searches both as `src.search.local.LocalIndex` searches its own. Similarities are
cosines with the embeddings themselves, whatever quantisation finds them by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.search.clip_retrieval import LARGEST_COSINE
from src.search.embeddings import (
    MAX_NEIGHBOURS,
    SAME_IMAGE_COSINE,
    Embeddings,
    Metadata,
    SearchResult,
    check_queries,
    select_top_k,
    unique_rows,
)
from src.search.qdrant_engines import (
    CollectionOptions,
    EmbeddedEngine,
    Engine,
    Hits,
    Payload,
    SearchOptions,
    ServerEngine,
    Vectors,
)
from src.search.tables import clean_text
from src.utils import PerceptError

# Rows sent at a time: 4 MB of JSON at 768 numbers a row, where a server takes 32 MB.
BATCH_ROWS = 256

BATCH_QUERIES = 64  # queries sent at a time

SPARE_HITS = 8  # candidates asked for beyond k, so that rows equal to the k-th are seen

QUANTIZATION = ("none", "scalar", "product")


class QdrantIndex:
    """An index in Qdrant, with `search`, `get_metadata`, `len` and `dim` of a local index.

    Args:
        location: address of a server ("http://..."); or a QdrantClient of your own, for keys and
            gRPC, which fills faster (`QdrantClient(url, api_key=..., prefer_grpc=True)`); or a
            folder, in which the engine runs in this process.
        name: of the collection, or of the folder's subfolder.
        quantization: one of QUANTIZATION: codes in memory that propose candidates, "scalar" of dim
            bytes a row, "product" of dim / 8 bytes. It counts when the index is made, as do the
            next two.
        on_disk: embeddings and graph are memory-mapped files; otherwise they are in memory.
        shards: of a new collection on a server, which spreads them over its nodes.
        exact: compare each query with every row.
        ef: candidates that a search of the graph keeps at least; a higher number finds better and
            takes longer.

    Raises:
        PerceptError: the package is missing, the server does not answer, the folder is open
            elsewhere, or the existing index is of another kind.

    Source: Malkov and Yashunin 2018 (arXiv 1603.09320) for the graph; qdrant.tech/documentation for
    the rest.
    """

    def __init__(
        self,
        location: Any,
        name: str = "images",
        quantization: str = "none",
        on_disk: bool = True,
        shards: int = 1,
        exact: bool = False,
        ef: int = 128,
    ):
        if quantization not in QUANTIZATION:
            raise PerceptError(
                f"There is no quantization {quantization!r}: choose one of"
                f" {', '.join(QUANTIZATION)}."
            )
        self.options = CollectionOptions(quantization, on_disk, shards)
        self.exact, self.ef = exact, ef
        is_folder = isinstance(location, str | Path)
        if is_folder and not str(location).startswith(("http://", "https://")):
            self._engine: Engine = EmbeddedEngine(Path(location) / name)
        else:
            self._engine = ServerEngine(location, name)

    @property
    def dim(self) -> int:
        """Numbers of an embedding.

        Raises:
            PerceptError: the index is not filled yet.
        """
        if self._engine.dim is None:
            raise PerceptError(f"There is no index in {self._engine.location} yet: fill it first.")
        return self._engine.dim

    def __len__(self) -> int:
        return self._engine.count()

    def __enter__(self) -> QdrantIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder, or the connection to the server."""
        self._engine.close()

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """Find the k most similar rows.

        A search that is not exact may miss some: recall depends on `ef` and on the quantisation.

        Args:
            queries: (queries, dim), any length.
            k: rows a query.
            exclude: rows (n,) that are never returned.

        Raises:
            PerceptError: the index is not filled, another dim, numbers that are not finite, or k
                below 1.
        """
        queries = check_queries(queries, self.dim, k)
        excluded = [row for row in unique_rows(exclude).tolist() if row >= 0]
        hits: Hits = []
        for start in range(0, len(queries), BATCH_QUERIES):
            batch = queries[start : start + BATCH_QUERIES].tolist()
            hits += self._find_nearest(batch, k, excluded)
        width = max(map(len, hits), default=0)
        similarity = np.full((len(queries), width), -np.inf, np.float32)
        row = np.full((len(queries), width), -1, np.int64)
        self._check_hits(hits)
        for q, query_hits in enumerate(hits):
            for position, (hit_row, hit_similarity) in enumerate(query_hits):
                row[q, position], similarity[q, position] = hit_row, hit_similarity
        return select_top_k(similarity, row, k)

    def _check_hits(self, hits: Hits) -> None:
        """Refuse hits that are no rows, such as points with names, or that have no similarity."""
        for row, similarity in (hit for query_hits in hits for hit in query_hits):
            if type(row) is not int or not 0 <= row < 2**63:
                raise PerceptError(
                    f"{self._engine.location} has a point {clean_text(str(row))[:60]}, which is no"
                    " number of a row: fill an index of another name."
                )
            if not -LARGEST_COSINE <= similarity <= LARGEST_COSINE:
                raise PerceptError(
                    f"{self._engine.location} answers with a similarity of {similarity:g} for row"
                    f" {row}, which is no cosine: see that it is a Qdrant server."
                )

    def _find_nearest(self, queries: Vectors, k: int, excluded: list[int]) -> Hits:
        """Find at least k hits a query, and all that are as similar as the k-th.

        Among equal rows, the lowest ones must come first.
        """

        def ask(batch: Vectors, limit: int) -> Hits:
            options = SearchOptions(limit, excluded, self.exact, self.ef)
            return self._engine.find_nearest(batch, options)

        hits = ask(queries, k + SPARE_HITS)
        if len(hits) != len(queries):
            raise PerceptError(
                f"{self._engine.location} answers {len(queries)} queries with {len(hits)} results:"
                " see that it is a Qdrant server."
            )
        for i, query in enumerate(queries):
            limit = k + SPARE_HITS
            while limit < MAX_NEIGHBOURS and len(hits[i]) == limit and _is_tied(hits[i], k):
                limit *= 2
                hits[i] = ask([query], limit)[0]
        return hits

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """Return the metadata of `rows` (n,), a line each in that order; empty for row -1.

        Raises:
            PerceptError: the index is not filled, or has no such row.
        """
        row_list = np.asarray(rows, np.int64).tolist()
        existing = sorted({row for row in row_list if row >= 0})
        payloads: dict[int, Payload | None] = {}
        if self.dim and existing:
            payloads = self._engine.read_payloads(existing)
        unknown = [row for row in row_list if row >= 0 and row not in payloads]
        if unknown:
            raise PerceptError(
                f"{self._engine.location} has no row {unknown[0]}, as it has {len(self)} rows: ask"
                " for rows that a search returned."
            )
        lines = [payloads.get(row) or {} for row in row_list]
        return pd.DataFrame(lines, index=range(len(row_list)))

    # ---------------------------------------------------------------------------------------- fill
    def fill(
        self, parts: Iterable[tuple[Any, pd.DataFrame | None]], total: int | None = None
    ) -> int:
        """Put rows into the index, or go on where an interrupted call stopped.

        Rows go in one after the other, so that their number says where to go on; the last batch, of
        which a part may be missing, is sent again. A server builds its graph meanwhile and for some
        time after (its dashboard says "green" when done); until then it searches correctly but
        slowly.

        Args:
            parts: (embeddings (rows, dim) float16 or float32, metadata with a line a row or None),
                all of them, from row 0 on and always in the same order; `iterate_parts` gives those
                of a folder.
            total: rows in all, for the progress bar.

        Returns:
            Number of rows that are now in the index.

        Raises:
            PerceptError: a part's metadata has other rows, embeddings of another dim, not finite or
                all 0, or the index holds other rows than these.
        """
        stored, first_row = len(self), 0
        resume_row = max(0, stored - BATCH_ROWS)
        with tqdm(
            desc="filling",
            unit="row",
            unit_scale=True,
            mininterval=2,
            initial=resume_row,
            total=total,
        ) as bar:
            for embeddings, metadata in parts:
                n_rows = self._check_part(embeddings, metadata, first_row)
                if first_row < stored:
                    self._check_same_row(first_row, np.asarray(embeddings[0], np.float32))
                for start in range(max(0, resume_row - first_row), n_rows, BATCH_ROWS):
                    batch = slice(start, min(start + BATCH_ROWS, n_rows))
                    lines = None if metadata is None else metadata.iloc[batch]
                    vectors = np.asarray(embeddings[batch], np.float32)
                    self._add_rows(first_row + start, vectors, lines)
                    bar.update(len(vectors))
                first_row += n_rows
        if first_row < stored:
            raise PerceptError(
                f"{self._engine.location} holds {stored} rows, but only {first_row} were given:"
                " give all parts, or another name."
            )
        self._engine.finish()
        return first_row

    def _check_part(self, embeddings: Any, metadata: pd.DataFrame | None, first_row: int) -> int:
        """Return how many rows a part has, and make the index if there is none."""
        if np.ndim(embeddings) != 2 or not len(embeddings):
            raise PerceptError(
                f"The part from row {first_row} on has embeddings of shape {np.shape(embeddings)}:"
                " they must be (rows, dim)."
            )
        n_rows, dim = embeddings.shape
        if metadata is not None and len(metadata) != n_rows:
            raise PerceptError(
                f"The part from row {first_row} on has {n_rows} embeddings and {len(metadata)}"
                " lines of metadata: they must be of the same rows."
            )
        if self._engine.dim is None:
            self._engine.create(dim, self.options)
        if dim != self.dim:
            raise PerceptError(
                f"The part from row {first_row} on has embeddings of {dim} numbers and the index"
                f" {self.dim}: all must come from one encoder."
            )
        return int(n_rows)

    def _add_rows(self, first: int, vectors: np.ndarray, metadata: pd.DataFrame | None) -> None:
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        usable = np.isfinite(length) & (length > 0)
        if not usable.all():
            bad_row = first + int(np.flatnonzero(~usable)[0])
            raise PerceptError(
                f"The embedding of row {bad_row} holds NaN or infinite values, or nothing but"
                " zeros: make it again, or leave the row out."
            )
        rows = list(range(first, first + len(vectors)))
        payloads: list[Payload] = [{}] * len(rows)
        if metadata is not None:
            payloads = _to_payloads(metadata)
        self._engine.add(rows, (vectors / length).tolist(), payloads)

    def _check_same_row(self, row: int, vector: np.ndarray) -> None:
        """Refuse to go on with other rows than those in the index."""
        stored = self._engine.read_vectors([row]).get(row)
        if stored is not None:
            stored_vector = np.asarray(stored, np.float32)
            if stored_vector.shape == vector.shape and stored_vector.any():
                lengths = np.linalg.norm(stored_vector) * np.linalg.norm(vector)
                if not stored_vector @ vector < SAME_IMAGE_COSINE * lengths:
                    return
        raise PerceptError(
            f"{self._engine.location} holds another embedding at row {row} than the one given:"
            " give the same parts in the same order, or another name."
        )


def _is_tied(hits: list[tuple[int, float]], k: int) -> bool:
    """Whether the last hit is as similar as the k-th."""
    return hits[-1][1] == hits[k - 1][1]


def _to_payloads(table: pd.DataFrame) -> list[Payload]:
    """Turn the lines of a table into JSON objects.

    Missing values become null, and what JSON does not know becomes text.
    """
    plain = table.astype(object).where(table.notna(), None).rename(columns=str)
    lines = plain.to_dict("records")

    def to_plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    content = json.dumps(lines, default=to_plain, ensure_ascii=False)
    content = content.encode("utf-8", "replace").decode()
    # what JSON does not know (NaN, infinity) is null, and integers beyond 64 bits are text
    return json.loads(content, parse_constant=lambda _: None, parse_int=_parse_integer)


def _parse_integer(digits: str) -> int | str:
    return int(digits) if len(digits) < 19 or -(2**63) <= int(digits) < 2**63 else digits


def iterate_parts(folder: str | Path) -> Iterator[tuple[np.ndarray, pd.DataFrame | None]]:
    """Yield the embeddings and metadata of a folder file by file, for `QdrantIndex.fill`.

    The folder is in clip-retrieval's layout, as that of a `LocalIndex`.

    Raises:
        PerceptError: there are none, or metadata has other rows.
    """
    embeddings = Embeddings(folder)
    metadata = Metadata(folder, len(embeddings.arrays))
    for array, start in zip(embeddings.arrays, embeddings.offsets, strict=False):
        lines = None
        if len(metadata):
            lines = metadata.get_rows(np.arange(start, start + len(array)))
        yield array, lines
