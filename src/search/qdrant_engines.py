"""What `src.search.qdrant.QdrantIndex` needs of Qdrant: the engine in this process, or a server.

Both hold a point a row, whose id is the row's number, with the embedding in half precision and the
row's metadata as payload.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from src.search.http_client import Outgoing, RequestFailed, RequestLimits, exchange
from src.utils import PerceptError, read_json, require_extra

# A segment with fewer kilobytes of embeddings has no graph and is searched exactly.
INDEXING_KB = 10_000

OVERSAMPLING = 4.0  # candidates that quantised codes propose for each one asked for

GRAPH = {"m": 16, "ef_construct": 100}  # neighbours a node, candidates while building

# A request to a server in all. The user names its address, and no stranger: it may be private.
LIMITS = RequestLimits(timeout=60.0, max_bytes=200e6, allow_private=True)

# what the client raises, besides its own errors, over an answer without the parts that it reads
ODD_ANSWERS = (RequestFailed, ValueError, TypeError, AttributeError, AssertionError)

Vectors = list[list[float]]
Payload = dict[str, Any]  # metadata of a row
Hits = list[list[tuple[int, float]]]  # (row, similarity) of each query, best first


@dataclass(frozen=True)
class CollectionOptions:
    """How a new index is laid out. Attributes as in `QdrantIndex`."""

    quantization: str = "none"
    on_disk: bool = True
    shards: int = 1


@dataclass(frozen=True)
class SearchOptions:
    """How an index is searched.

    Attributes:
        limit: hits a query.
        excluded: rows that are never returned.
        exact: compare each query with every row.
        ef: candidates that a search of the graph keeps at least.
    """

    limit: int
    excluded: Sequence[int]
    exact: bool
    ef: int


class Engine(Protocol):
    """The operations of an index of Qdrant.

    Attributes:
        location: where the index is, for messages.
        dim: numbers an embedding; None if the index does not exist yet.
    """

    location: str
    dim: int | None

    def create(self, dim: int, options: CollectionOptions) -> None:
        """Make the index."""

    def count(self) -> int:
        """Return the number of rows."""

    def add(self, rows: list[int], vectors: Vectors, payloads: list[Payload]) -> None:
        """Add rows, or replace them, and wait until they are stored."""

    def finish(self) -> None:
        """Finish filling: build graphs, write everything to disk."""

    def find_nearest(self, queries: Vectors, options: SearchOptions) -> Hits:
        """Find the rows that are most similar to each query."""

    def read_vectors(self, rows: list[int]) -> dict[int, list[float]]:
        """Return the embeddings of those of `rows` that exist."""

    def read_payloads(self, rows: list[int]) -> dict[int, Payload | None]:
        """Return the metadata of those of `rows` that exist."""

    def close(self) -> None:
        """Close the folder, or the connection."""


class EmbeddedEngine:
    """Qdrant's engine in this process: one shard in a folder.

    Raises:
        PerceptError: the package is missing, the folder is open elsewhere, or what it holds is not
            compared by cosine.
    """

    def __init__(self, folder: Path):
        self.edge = require_extra("qdrant_edge", "search")
        self.folder, self.location = folder, str(folder)
        self.shard: Any = None
        self.dim: int | None = None
        config_path = folder / "edge_config.json"
        if not config_path.exists():
            return
        try:
            self.shard = self.edge.EdgeShard.load(str(folder))
        except Exception as error:  # the engine raises nothing more special
            raise PerceptError(
                f"Qdrant cannot open {folder} ({' '.join(str(error).split())}); an index is open in"
                " one place at a time: close() it there."
            ) from error
        self.dim = _check_cosine(read_json(config_path)["vectors"].get(""), self.location)

    def create(self, dim: int, options: CollectionOptions) -> None:
        """Make the index."""
        edge = self.edge
        if options.shards != 1:
            raise PerceptError(
                f"An index in a folder is one shard, not {options.shards}: give the address of a"
                " Qdrant server to have more."
            )
        memory = edge.Memory.Cold if options.on_disk else edge.Memory.Cached
        vectors = edge.EdgeVectorParams(
            size=dim,
            distance=edge.Distance.Cosine,
            datatype=edge.VectorStorageDatatype.Float16,
            memory=memory,
        )
        graph = edge.HnswIndexConfig(full_scan_threshold=INDEXING_KB, memory=memory, **GRAPH)
        config = edge.EdgeConfig(
            vectors=vectors,
            hnsw_config=graph,
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=INDEXING_KB),
            payload_memory=edge.Memory.Cold,
            quantization_config=self._make_quantization(options.quantization),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard, self.dim = edge.EdgeShard.create(str(self.folder), config), dim

    def _make_quantization(self, quantization: str) -> Any:
        edge = self.edge
        if quantization == "scalar":
            return edge.ScalarQuantizationConfig(
                type=edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Pinned
            )
        if quantization == "product":
            return edge.ProductQuantizationConfig(
                compression=edge.CompressionRatio.X32, memory=edge.Memory.Pinned
            )
        return None

    def count(self) -> int:
        """Return the number of rows."""
        if not self.shard:
            return 0
        return int(self.shard.count(self.edge.CountRequest(exact=True)))

    def add(self, rows: list[int], vectors: Vectors, payloads: list[Payload]) -> None:
        """Add rows, or replace them, and wait until they are stored."""
        edge = self.edge
        points = [edge.Point(*point) for point in zip(rows, vectors, payloads, strict=True)]
        self.shard.update(edge.UpdateOperation.upsert_points(points))

    def finish(self) -> None:
        """Build the graphs, and write everything to disk."""
        if self.shard:
            self.shard.optimize()
            self.shard.flush()

    def find_nearest(self, queries: Vectors, options: SearchOptions) -> Hits:
        """Find the rows that are most similar to each query."""
        edge = self.edge
        codes = edge.QuantizationSearchParams(
            ignore=options.exact, rescore=True, oversampling=OVERSAMPLING
        )
        params = edge.SearchParams(hnsw_ef=options.ef, exact=options.exact, quantization=codes)
        row_filter = None
        if options.excluded:
            row_filter = edge.Filter(must_not=[edge.HasIdCondition(set(options.excluded))])
        requests = [
            edge.QueryRequest(
                limit=options.limit,
                query=edge.Query.Nearest(query),
                filter=row_filter,
                params=params,
            )
            for query in queries
        ]
        answers = self.shard.query_batch(edge.QueryBatchRequest(requests))
        return [[(hit.id, hit.score) for hit in hits] for hits in answers]

    def read_vectors(self, rows: list[int]) -> dict[int, list[float]]:
        """Return the embeddings of those of `rows` that exist."""
        records = self.shard.retrieve(rows, False, True)
        return {record.id: record.vector for record in records}

    def read_payloads(self, rows: list[int]) -> dict[int, Payload | None]:
        """Return the metadata of those of `rows` that exist."""
        records = self.shard.retrieve(rows, True, False)
        return {record.id: record.payload for record in records}

    def close(self) -> None:
        """Close the folder."""
        if self.shard:
            self.shard.close()
        self.shard = None


def _make_transport() -> Any:
    """Return what sends the requests of a client: each within LIMITS as a whole."""
    httpx = require_extra("httpx", "search")

    class LimitedTransport(httpx.BaseTransport):  # type: ignore[misc, name-defined]
        def handle_request(self, request: Any) -> Any:
            skipped = ("host", "connection", "accept-encoding", "content-length")
            headers = {k: v for k, v in request.headers.items() if k.lower() not in skipped}
            outgoing = Outgoing(request.method, request.read() or None, headers)
            deadline = time.monotonic() + LIMITS.timeout
            answer = exchange(str(request.url), deadline, LIMITS, outgoing)
            content_type = answer.headers.get_content_type()
            return httpx.Response(
                answer.status, headers={"Content-Type": content_type}, content=answer.content
            )

    return LimitedTransport()


class ServerEngine:
    """A collection of a Qdrant server, or of any QdrantClient.

    Raises:
        PerceptError: the package is missing, the server does not answer, or the collection is not
            compared by cosine.
    """

    def __init__(self, location: Any, name: str):
        qdrant_client = require_extra("qdrant_client", "search")
        exceptions = require_extra("qdrant_client.http.exceptions", "search")
        grpc = require_extra("grpc", "search")
        self.models: Any = qdrant_client.models
        self.name, self.failures = name, (exceptions.ApiException, grpc.RpcError)
        self.client: Any = location
        self.location = f"collection {name} of the Qdrant server"
        if isinstance(location, str):
            self.location = f"collection {name} of {location}"
            transport = _make_transport()
            self.client = qdrant_client.QdrantClient(
                url=location,
                timeout=int(LIMITS.timeout),
                transport=transport,
                check_compatibility=False,  # which would ask without these limits
            )
        self.dim = self._read_dim()

    def _read_dim(self) -> int | None:
        with self._answering():
            if not self.client.collection_exists(self.name):
                return None
            vectors = self.client.get_collection(self.name).config.params.vectors
        is_single = isinstance(vectors, self.models.VectorParams)
        return _check_cosine(vectors.model_dump(mode="json") if is_single else None, self.location)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn failures of the client into one sentence."""
        try:
            yield
        except (*self.failures, *ODD_ANSWERS) as error:
            reason = " ".join(str(error).split())[:300]
            raise PerceptError(
                f"The {self.location} does not answer as it should ({reason}): look whether the"
                " server runs at this address."
            ) from error

    def create(self, dim: int, options: CollectionOptions) -> None:
        """Make the index."""
        models = self.models
        vectors = models.VectorParams(
            size=dim,
            distance=models.Distance.COSINE,
            on_disk=options.on_disk,
            datatype=models.Datatype.FLOAT16,
        )
        graph = models.HnswConfigDiff(
            full_scan_threshold=INDEXING_KB, on_disk=options.on_disk, **GRAPH
        )
        with self._answering():
            self.client.create_collection(
                self.name,
                vectors_config=vectors,
                hnsw_config=graph,
                optimizers_config=models.OptimizersConfigDiff(indexing_threshold=INDEXING_KB),
                quantization_config=self._make_quantization(options.quantization),
                on_disk_payload=True,
                shard_number=options.shards,
            )
        self.dim = dim

    def _make_quantization(self, quantization: str) -> Any:
        models = self.models
        if quantization == "scalar":
            scalar = models.ScalarQuantizationConfig(
                type=models.ScalarType.INT8, quantile=0.99, always_ram=True
            )
            return models.ScalarQuantization(scalar=scalar)
        if quantization == "product":
            product = models.ProductQuantizationConfig(
                compression=models.CompressionRatio.X32, always_ram=True
            )
            return models.ProductQuantization(product=product)
        return None

    def count(self) -> int:
        """Return the number of rows."""
        if not self.dim:
            return 0
        with self._answering():
            return int(self.client.count(self.name, exact=True).count)

    def add(self, rows: list[int], vectors: Vectors, payloads: list[Payload]) -> None:
        """Add rows, or replace them, and wait until they are stored."""
        batch = self.models.Batch(ids=rows, vectors=vectors, payloads=payloads)
        with self._answering():
            self.client.upsert(self.name, batch, wait=True)

    def finish(self) -> None:
        """Do nothing: a server builds its graphs on its own."""

    def find_nearest(self, queries: Vectors, options: SearchOptions) -> Hits:
        """Find the rows that are most similar to each query."""
        models = self.models
        codes = models.QuantizationSearchParams(
            ignore=options.exact, rescore=True, oversampling=OVERSAMPLING
        )
        params = models.SearchParams(hnsw_ef=options.ef, exact=options.exact, quantization=codes)
        row_filter = None
        if options.excluded:
            excluded = models.HasIdCondition(has_id=list(options.excluded))
            row_filter = models.Filter(must_not=[excluded])
        requests = [
            models.QueryRequest(query=query, limit=options.limit, filter=row_filter, params=params)
            for query in queries
        ]
        with self._answering():
            answers = self.client.query_batch_points(self.name, requests)
        return [[(hit.id, hit.score) for hit in answer.points] for answer in answers]

    def read_vectors(self, rows: list[int]) -> dict[int, list[float]]:
        """Return the embeddings of those of `rows` that exist."""
        with self._answering():
            records = self.client.retrieve(self.name, rows, with_payload=False, with_vectors=True)
        return {record.id: record.vector for record in records}

    def read_payloads(self, rows: list[int]) -> dict[int, Payload | None]:
        """Return the metadata of those of `rows` that exist."""
        with self._answering():
            records = self.client.retrieve(self.name, rows, with_payload=True, with_vectors=False)
        return {record.id: record.payload for record in records}

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def _check_cosine(vectors: dict[str, Any] | None, location: str) -> int:
    """Return the numbers an embedding of an existing index.

    It must hold one unnamed vector a point, compared by cosine.
    """
    if not vectors or vectors.get("distance") != "Cosine":
        raise PerceptError(
            f"The {location} is not of one unnamed vector a point, compared by cosine: give another"
            " name, under which `fill` makes a new one."
        )
    return int(vectors["size"])
