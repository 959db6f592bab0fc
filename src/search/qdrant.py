"""Qdrant as the index, for more images than one machine holds: a server of many shards, or the same
engine embedded in this process.

- A server (`docker run -p 6333:6333 -v images:/qdrant/storage qdrant/qdrant`, or a cluster) is
  reached through the package qdrant-client.
- A folder is opened with the package qdrant-edge-py, which is Qdrant's engine as a library: one
  shard, one process at a time, no server.

Both hold the same: a point a row, whose id is the row's number, with the embedding in half
precision and the row's metadata as payload. `QdrantIndex` searches them as `src.index.LocalIndex`
does its own. Similarities are cosines with the embeddings themselves, whatever the quantisation
finds them by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from src.search.local import (
    SAME_IMAGE_COSINE,
    Embeddings,
    Metadata,
    SearchResult,
    check_queries,
    select_top_k,
)
from src.utils import PerceptError, read_json

BATCH = 256  # rows sent at a time: 4 MB of JSON at 768 numbers a row, where a server takes 32 MB

QUERIES = 64  # queries asked at a time

SPARE = 8  # candidates asked for beyond k, so that rows equal to the k-th are seen

# a segment with less than so many kilobytes of embeddings has no graph and is searched exactly
INDEXING_KB = 10_000

OVERSAMPLING = 4.0  # candidates that quantised codes propose for each one asked for

QUANTIZATION = ("none", "scalar", "product")

Hits = list[list[tuple[int, float]]]  # a query's (row, similarity), best first


@dataclass(frozen=True)
class Options:
    """How a new index is laid out. Attributes as in `QdrantIndex`."""

    quantization: str = "none"
    on_disk: bool = True
    shards: int = 1


def _missing(package: str, error: ImportError) -> PerceptError:
    return PerceptError(
        f"Qdrant needs the package {package}, which is not installed ({error}): pip install"
        f" {package}."
    )


class _Edge:
    """One shard in a folder."""

    def __init__(self, folder: Path):
        try:
            import qdrant_edge
        except ImportError as error:
            raise _missing("qdrant-edge-py", error) from error
        self.q: Any = qdrant_edge
        self.folder, self.where = folder, str(folder)
        self.shard: Any = None
        self.dim: int | None = None
        if (config := folder / "edge_config.json").exists():
            try:
                self.shard = qdrant_edge.EdgeShard.load(str(folder))
            except Exception as error:  # the engine raises nothing more special
                raise PerceptError(
                    f"Qdrant cannot open {folder} ({' '.join(str(error).split())}); an index is"
                    " open in one place at a time: close() it there."
                ) from error
            self.dim = _cosine_dim(read_json(config)["vectors"].get(""), self.where)

    def create(self, dim: int, options: Options) -> None:
        q = self.q
        if options.shards != 1:
            raise PerceptError(
                f"An index in a folder is one shard, not {options.shards}: give the address of a"
                " Qdrant server to have more."
            )
        kept = q.Memory.Cold if options.on_disk else q.Memory.Cached
        codes: Any = None
        if options.quantization == "scalar":
            codes = q.ScalarQuantizationConfig(
                type=q.ScalarType.Int8, quantile=0.99, memory=q.Memory.Pinned
            )
        elif options.quantization == "product":
            codes = q.ProductQuantizationConfig(
                compression=q.CompressionRatio.X32, memory=q.Memory.Pinned
            )
        config = q.EdgeConfig(
            vectors=q.EdgeVectorParams(
                size=dim,
                distance=q.Distance.Cosine,
                datatype=q.VectorStorageDatatype.Float16,
                memory=kept,
            ),
            hnsw_config=q.HnswIndexConfig(
                m=16, ef_construct=100, full_scan_threshold=INDEXING_KB, memory=kept
            ),
            optimizers=q.EdgeOptimizersConfig(indexing_threshold=INDEXING_KB),
            payload_memory=q.Memory.Cold,
            quantization_config=codes,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard, self.dim = q.EdgeShard.create(str(self.folder), config), dim

    def count(self) -> int:
        return int(self.shard.count(self.q.CountRequest(exact=True))) if self.shard else 0

    def add(
        self, rows: list[int], vectors: list[list[float]], payloads: list[dict[str, Any]]
    ) -> None:
        assert self.shard is not None
        self.shard.update(
            self.q.UpdateOperation.upsert_points(
                [self.q.Point(*point) for point in zip(rows, vectors, payloads, strict=True)]
            )
        )

    def settle(self) -> None:
        if self.shard:
            self.shard.optimize()
            self.shard.flush()

    def nearest(
        self, queries: list[list[float]], limit: int, barred: Sequence[int], exact: bool, ef: int
    ) -> Hits:
        q, shard = self.q, self.shard
        assert shard is not None
        codes = q.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
        params = q.SearchParams(hnsw_ef=ef, exact=exact, quantization=codes)
        keep = q.Filter(must_not=[q.HasIdCondition(set(barred))]) if barred else None
        asked = [
            q.QueryRequest(limit=limit, query=q.Query.Nearest(query), filter=keep, params=params)
            for query in queries
        ]
        return [
            [(hit.id, hit.score) for hit in hits]
            for hits in shard.query_batch(q.QueryBatchRequest(asked))
        ]

    def read(self, rows: list[int], vectors: bool) -> dict[int, Any]:
        assert self.shard is not None
        return {
            r.id: r.vector if vectors else r.payload
            for r in self.shard.retrieve(rows, not vectors, vectors)
        }

    def close(self) -> None:
        if self.shard:
            self.shard.close()
        self.shard = None


class _Server:
    """A collection of a server, or of any QdrantClient."""

    def __init__(self, where: Any, name: str):
        try:
            import grpc
            import qdrant_client
            from qdrant_client.http.exceptions import ApiException
        except ImportError as error:
            raise _missing("qdrant-client", error) from error
        self.m: Any = qdrant_client.models
        self.name, self.failures = name, (ApiException, grpc.RpcError)
        self.where = (
            f"collection {name} of {where if isinstance(where, str) else 'the Qdrant server'}"
        )
        self.client: Any = (
            qdrant_client.QdrantClient(url=where, timeout=60) if isinstance(where, str) else where
        )
        self.dim: int | None = None
        with self._answering():
            if self.client.collection_exists(name):
                vectors = self.client.get_collection(name).config.params.vectors
                self.dim = _cosine_dim(
                    (
                        vectors.model_dump(mode="json")
                        if isinstance(vectors, self.m.VectorParams)
                        else None
                    ),
                    self.where,
                )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            told = " ".join(str(error).split())[:300]
            raise PerceptError(
                f"The {self.where} does not answer as it should ({told}): look whether the server"
                " runs at this address."
            ) from error

    def create(self, dim: int, options: Options) -> None:
        m = self.m
        codes: Any = None
        if options.quantization == "scalar":
            codes = m.ScalarQuantization(
                scalar=m.ScalarQuantizationConfig(
                    type=m.ScalarType.INT8, quantile=0.99, always_ram=True
                )
            )
        elif options.quantization == "product":
            codes = m.ProductQuantization(
                product=m.ProductQuantizationConfig(
                    compression=m.CompressionRatio.X32, always_ram=True
                )
            )
        with self._answering():
            self.client.create_collection(
                self.name,
                vectors_config=m.VectorParams(
                    size=dim,
                    distance=m.Distance.COSINE,
                    on_disk=options.on_disk,
                    datatype=m.Datatype.FLOAT16,
                ),
                hnsw_config=m.HnswConfigDiff(
                    m=16, ef_construct=100, full_scan_threshold=INDEXING_KB, on_disk=options.on_disk
                ),
                optimizers_config=m.OptimizersConfigDiff(indexing_threshold=INDEXING_KB),
                quantization_config=codes,
                on_disk_payload=True,
                shard_number=options.shards,
            )
        self.dim = dim

    def count(self) -> int:
        with self._answering():
            return int(self.client.count(self.name, exact=True).count) if self.dim else 0

    def add(
        self, rows: list[int], vectors: list[list[float]], payloads: list[dict[str, Any]]
    ) -> None:
        with self._answering():
            self.client.upsert(
                self.name, self.m.Batch(ids=rows, vectors=vectors, payloads=payloads), wait=True
            )

    def settle(self) -> None:
        """A server builds its graphs on its own."""

    def nearest(
        self, queries: list[list[float]], limit: int, barred: Sequence[int], exact: bool, ef: int
    ) -> Hits:
        m = self.m
        codes = m.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
        params = m.SearchParams(hnsw_ef=ef, exact=exact, quantization=codes)
        keep = m.Filter(must_not=[m.HasIdCondition(has_id=list(barred))]) if barred else None
        asked = [
            m.QueryRequest(query=query, limit=limit, filter=keep, params=params)
            for query in queries
        ]
        with self._answering():
            return [
                [(hit.id, hit.score) for hit in answer.points]
                for answer in self.client.query_batch_points(self.name, asked)
            ]

    def read(self, rows: list[int], vectors: bool) -> dict[int, Any]:
        with self._answering():
            records = self.client.retrieve(
                self.name, rows, with_payload=not vectors, with_vectors=vectors
            )
        return {r.id: r.vector if vectors else r.payload for r in records}

    def close(self) -> None:
        self.client.close()


def _cosine_dim(vectors: dict[str, Any] | None, where: str) -> int:
    """Numbers of an embedding of an index that exists, which must hold one unnamed vector a point,
    compared by cosine.
    """
    if not vectors or vectors.get("distance") != "Cosine":
        raise PerceptError(
            f"The {where} is not of one unnamed vector a point, compared by cosine: give another"
            " name, under which `fill` makes a new one."
        )
    return int(vectors["size"])


class QdrantIndex:
    """An index in Qdrant, with the methods of `src.index.LocalIndex`: `search`, `metadata`, `len`,
    `dim`.

    Args:
        where: address of a server ("http://..."); or a QdrantClient of your own, for keys and gRPC,
            which fills faster (`QdrantClient(url, api_key=..., prefer_grpc=True)`); or a folder, in
            which the engine runs in this process.
        name: of the collection, or of the folder's subfolder.
        quantization: one of QUANTIZATION: codes in memory that propose candidates, "scalar" of dim
            bytes a row, "product" of dim / 8 bytes. Counts when the index is made, as do the next
            two.
        on_disk: embeddings and graph are memory-mapped files; otherwise they are in memory.
        shards: of a new collection on a server, which spreads them over its nodes.
        exact: compare each query with every row.
        ef: candidates that a search of the graph keeps at least; more finds better and takes
            longer.

    Raises:
        PerceptError: the package is missing, the server does not answer, the folder is open
            elsewhere, or what is there is of another kind.

    Source: Malkov and Yashunin 2018 (arXiv 1603.09320) for the graph; qdrant.tech/documentation for
    the rest.
    """

    def __init__(
        self,
        where: Any,
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
        self.options, self.exact, self.ef = Options(quantization, on_disk, shards), exact, ef
        served = not isinstance(where, str | Path) or str(where).startswith(("http://", "https://"))
        self._engine: _Edge | _Server = (
            _Server(where, name) if served else _Edge(Path(where) / name)
        )

    @property
    def dim(self) -> int:
        """Numbers of an embedding.

        Raises:
            PerceptError: the index is not filled yet.
        """
        if self._engine.dim is None:
            raise PerceptError(f"There is no index in {self._engine.where} yet: fill it first.")
        return self._engine.dim

    def __len__(self) -> int:
        return self._engine.count()

    def __enter__(self) -> QdrantIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, or of the server."""
        self._engine.close()

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """The k most similar rows.

        A search that is not exact may miss some: recall is a matter of `ef` and of the
        quantisation.

        Args:
            queries: (queries, dim), any length.
            k: rows a query.
            exclude: rows (n,) that are never returned.

        Raises:
            PerceptError: the index is not filled, another dim, numbers that are not finite, or k
                below 1.
        """
        queries = check_queries(queries, self.dim, k)
        barred = [] if exclude is None else np.unique(np.asarray(exclude, np.int64)).tolist()
        barred = [row for row in barred if row >= 0]
        hits: Hits = []
        for start in range(0, len(queries), QUERIES):
            hits += self._nearest(queries[start : start + QUERIES].tolist(), k, barred)
        most = max(map(len, hits), default=0)
        similarity, row = (
            np.full((len(queries), most), -np.inf, np.float32),
            np.full((len(queries), most), -1, np.int64),
        )
        for i, found in enumerate(hits):
            if found:
                row[i, : len(found)], similarity[i, : len(found)] = zip(*found, strict=True)
        return select_top_k(similarity, row, k)

    def _nearest(self, queries: list[list[float]], k: int, barred: list[int]) -> Hits:
        """At least k hits a query, and all that are as similar as the k-th, as of equal ones the
        lowest rows are wanted.
        """
        hits = self._engine.nearest(queries, k + SPARE, barred, self.exact, self.ef)
        for i, query in enumerate(queries):
            limit = k + SPARE
            while len(hits[i]) == limit and hits[i][-1][1] == hits[i][k - 1][1]:
                limit *= 2
                hits[i] = self._engine.nearest([query], limit, barred, self.exact, self.ef)[0]
        return hits

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """What is known of some rows (n,), a line each in that order; row -1 has no entries.

        Raises:
            PerceptError: the index is not filled, or has no such row.
        """
        wanted, dim = np.asarray(rows, np.int64), self.dim
        known = (
            self._engine.read(np.unique(wanted[wanted >= 0]).tolist(), vectors=False)
            if dim and (wanted >= 0).any()
            else {}
        )
        if unknown := [row for row in wanted.tolist() if row >= 0 and row not in known]:
            raise PerceptError(
                f"{self._engine.where} has no row {unknown[0]}, as it has {len(self)} rows: ask for"
                " rows that a search returned."
            )
        return pd.DataFrame(
            [known.get(row) or {} for row in wanted.tolist()], index=range(len(wanted))
        )

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
                all of them, from row 0 on and always in the same order; `iterate_parts` gives those of a
                folder.
            total: rows in all, for the progress bar.

        Returns:
            rows that are now in the index.

        Raises:
            PerceptError: a part's metadata has other rows, embeddings of another dim, not finite or
                all 0, or the index holds other rows than these.
        """
        stored, row = len(self), 0
        again = max(0, stored - BATCH)
        with tqdm(
            desc="filling", unit="row", unit_scale=True, mininterval=2, initial=again, total=total
        ) as bar:
            for embeddings, table in parts:
                rows = self._checked(embeddings, table, row)
                if row < stored:
                    self._same(row, np.asarray(embeddings[0], np.float32))
                for start in range(max(0, again - row), rows, BATCH):
                    piece = slice(start, min(start + BATCH, rows))
                    self._add(
                        row + start,
                        np.asarray(embeddings[piece], np.float32),
                        None if table is None else table.iloc[piece],
                    )
                    bar.update(piece.stop - start)
                row += rows
        if row < stored:
            raise PerceptError(
                f"{self._engine.where} holds {stored} rows, but only {row} were given: give all"
                " parts, or another name."
            )
        self._engine.settle()
        return row

    def _checked(self, embeddings: Any, table: pd.DataFrame | None, row: int) -> int:
        """How many rows a part has; makes the index where there is none."""
        if np.ndim(embeddings) != 2 or not len(embeddings):
            raise PerceptError(
                f"The part from row {row} on has embeddings of shape {np.shape(embeddings)}: they"
                " must be (rows, dim)."
            )
        rows, dim = embeddings.shape
        if table is not None and len(table) != rows:
            raise PerceptError(
                f"The part from row {row} on has {rows} embeddings and {len(table)} lines of"
                " metadata: they must be of the same rows."
            )
        if self._engine.dim is None:
            self._engine.create(dim, self.options)
        if dim != self.dim:
            raise PerceptError(
                f"The part from row {row} on has embeddings of {dim} numbers and the index"
                f" {self.dim}: all must come from one encoder."
            )
        return int(rows)

    def _add(self, row: int, vectors: np.ndarray, table: pd.DataFrame | None) -> None:
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(length) & (length > 0)).all():
            wrong = row + int(np.flatnonzero(~(np.isfinite(length) & (length > 0)))[0])
            raise PerceptError(
                f"The embedding of row {wrong} holds NaN or infinite values, or nothing but zeros:"
                " make it again, or leave the row out."
            )
        rows = list(range(row, row + len(vectors)))
        self._engine.add(
            rows,
            (vectors / length).tolist(),
            [{}] * len(rows) if table is None else _payloads(table),
        )

    def _same(self, row: int, vector: np.ndarray) -> None:
        """Refuse to go on with other rows than those that are there."""
        there = np.asarray(
            self._engine.read([row], vectors=True).get(row, np.zeros_like(vector)), np.float32
        )
        if (
            there.shape != vector.shape
            or there @ vector < SAME_IMAGE_COSINE * np.linalg.norm(there) * np.linalg.norm(vector)
            or not there.any()
        ):
            raise PerceptError(
                f"{self._engine.where} holds another embedding at row {row} than the one given:"
                " give the same parts in the same order, or another name."
            )


def _payloads(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Lines of a table as JSON objects; what is missing is null, and what JSON does not know
    becomes text.
    """
    plain = table.astype(object).where(table.notna(), None).to_dict("records")

    def told(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    return json.loads(
        json.dumps(
            [{str(name): value for name, value in line.items()} for line in plain], default=told
        )
    )


def iterate_parts(folder: str | Path) -> Iterator[tuple[np.ndarray, pd.DataFrame | None]]:
    """The parts of a folder of embeddings (clip-retrieval's layout, or an index of `src.index`),
    for `QdrantIndex.fill`.

    Raises:
        PerceptError: there are none, or metadata has other rows.
    """
    embeddings = Embeddings(folder)
    metadata = Metadata(folder, len(embeddings.parts))
    for part, start in zip(embeddings.parts, embeddings.start, strict=False):
        yield (
            part,
            metadata.get_rows(np.arange(start, start + len(part))) if len(metadata) else None,
        )
