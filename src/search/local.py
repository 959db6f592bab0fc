"""The index of many images on one machine, searched by cosine similarity.

An index is a folder, in the layout of clip-retrieval (github.com/rom1504/clip-retrieval), which can
serve it:

    img_emb/, metadata/   see `src.search.embeddings`
    image.index           faiss's file, or a folder of shards, see `src.search.building`
    percept.index         our shards, where image.index is somebody else's
    index.json            what of it is ours, see `src.search.records`

Candidates that faiss finds are scored again with the embeddings themselves. So similarities are
cosines whatever the type of the index, and a compressed index's order is corrected. Without
embeddings, what faiss tells must be cosines, see `src.search.foreign_index`. Searching writes
nothing.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.files.foreign import natural_key
from src.search.embeddings import (
    Embeddings,
    Metadata,
    SearchResult,
    check_queries,
    concatenate_results,
    read_checked,
    select_top_k,
    unique_rows,
)
from src.search.foreign_index import check_metric, check_same_rows, to_cosines
from src.search.records import (
    INDEX_FOLDERS,
    find_own_index,
    list_own_shards,
    list_visible,
    read_state,
)
from src.utils import PerceptError, require_extra


class LocalIndex:
    """An index on this machine, made by `build_index` or by clip-retrieval.

    clip-retrieval's image.index is a file, or a folder with populated.index. Where there is one and
    an index of ours too, ours is searched.

    Args:
        folder: of the index.
        device: where `measure_recall` compares queries with all rows; a search is faiss's, on the
            CPU, whatever it is.

    Attributes:
        dim: numbers an embedding.
        kind: type of the index.
        encoder: what made the embeddings; {} if that is not recorded.
        embeddings: None if the folder has none.
        probes: lists of IVF-PQ that a query looks into.

    Raises:
        PerceptError: there is no index in the folder, a file is cut short, its parts have other
            numbers of rows, it tells no cosines, it is not of the embeddings beside it, or faiss is
            not installed.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        state = read_state(self.folder)
        self.encoder, settings = state.get("encoder", {}), state.get("index", {})
        self.paths = self._list_shards(state)
        self.shards = self._open_shards(settings.get("mapped", False))
        # kept open, as each new thread would make faiss begin new threads
        self._pool = ThreadPoolExecutor(min(len(self.shards), os.cpu_count() or 1))
        self.offsets = np.cumsum([0, *(shard.ntotal for shard in self.shards)])
        self.kind = settings.get("kind", type(self.shards[0]).__name__)
        self.dim = self.shards[0].d
        self.candidates, self.probes = settings.get("candidates", 4), settings.get("probes", 0)
        self.embeddings: Embeddings | None = None
        n_files = None
        if (self.folder / "img_emb").is_dir():
            self.embeddings = Embeddings(self.folder)
            n_files = len(self.embeddings.arrays)
        self._metadata = Metadata(self.folder, n_files)
        self._check_rows()
        self._tells_distances = [False] * len(self.shards)
        if self.embeddings is None:
            pairs = zip(self.shards, self.paths, strict=True)
            self._tells_distances = [check_metric(shard, path) for shard, path in pairs]
        else:
            check_same_rows(self._find_rows, self.embeddings, self.paths[0].parent)

    def _list_shards(self, state: dict[str, Any]) -> list[Path]:
        """List the files of our index, or of somebody else's if there is none of ours."""
        own_index = find_own_index(self.folder, state)
        if own_index is not None:
            return list_own_shards(self.folder, state) or [own_index / "0000.index"]
        path = self.folder / "image.index"
        if not path.is_dir():
            return [path]
        if (path / "populated.index").exists():
            return [path / "populated.index"]
        shards = sorted(list_visible(path, "*.index"), key=natural_key)
        return [shard for shard in shards if shard.name != "trained.index"] or [path / "*.index"]

    def _open_shards(self, mapped: bool) -> list[Any]:
        faiss = require_extra("faiss", "search")
        for path in self.paths:
            if not path.exists():
                raise PerceptError(
                    f"{self.folder} holds no image.index, or not all of it ({path.name} is"
                    " missing): build one with notebook 05_search_index, or give the folder of an"
                    " index."
                )
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0
        if self.paths[0].name == "populated.index":
            flags |= faiss.IO_FLAG_ONDISK_SAME_DIR
        remedy = "delete it, and build the index again"
        shards = [read_checked(path, remedy, faiss.read_index, flags) for path in self.paths]
        if not sum(shard.ntotal for shard in shards):
            raise PerceptError(f"{self.paths[0]} holds no rows: build it again.")
        return shards

    def _check_rows(self) -> None:
        n_embeddings = len(self.embeddings) if self.embeddings is not None else 0
        for name, rows in (
            ("embeddings", n_embeddings),
            ("lines of metadata", len(self._metadata)),
        ):
            if rows not in (0, len(self)):
                raise PerceptError(
                    f"{self.folder} has {rows:,} {name} and an index of {len(self):,} rows:"
                    f" {self._explain_rebuilding()}."
                )
        dims = {shard.d for shard in self.shards}
        dims |= {self.embeddings.dim} if self.embeddings is not None else set()
        if len(dims) > 1:
            raise PerceptError(
                f"{self.folder} has an index and embeddings of different numbers a row"
                f" ({', '.join(map(str, sorted(dims)))}): {self._explain_rebuilding()}."
            )

    def _explain_rebuilding(self) -> str:
        if self.paths[0].parent.name == INDEX_FOLDERS[1] or self.paths[0].name == "0000.index":
            return "build the index again"
        return "build the index again, beside this one with an index_kind other than auto"

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __repr__(self) -> str:
        plural = "s" if len(self.shards) > 1 else ""
        return (
            f"{self.folder.name}: {len(self):,} rows of {self.dim} numbers, {self.kind},"
            f" {len(self.shards)} shard{plural}"
        )

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """Find the k most similar rows.

        Args:
            queries: (queries, dim), of any length.
            k: rows a query, at least 1.
            exclude: (n,) rows that are never returned.

        Raises:
            PerceptError: another dim, numbers that are not finite, or k below 1.
        """
        queries = check_queries(queries, self.dim, k)
        excluded = unique_rows(exclude)
        n_candidates = k * (self.candidates if self.embeddings is not None else 1)

        def search_shard(number: int) -> SearchResult:
            return self._search_shard(number, queries, n_candidates, excluded)

        numbers = range(len(self.shards))
        if len(queries) == 1 < len(self.shards):
            results = list(self._pool.map(search_shard, numbers))
        else:  # faiss itself shares several queries out over the cores
            results = [search_shard(number) for number in numbers]
        result = concatenate_results(results, n_candidates)
        if self.embeddings is None:
            return result
        return select_top_k(self._compute_cosines(queries, result.row), result.row, k)

    def _search_shard(
        self, number: int, queries: np.ndarray, k: int, excluded: np.ndarray
    ) -> SearchResult:
        """Find the k nearest of one shard, numbered as rows of the whole index."""
        shard = self.shards[number]
        if not shard.ntotal:
            empty = np.empty((len(queries), 0), np.float32)
            return SearchResult(empty, empty.astype(np.int64))
        first, stop = self.offsets[number : number + 2]
        in_shard = excluded[(excluded >= first) & (excluded < stop)] - first
        parameters = _search_parameters(shard, in_shard, self.probes)
        values, rows = shard.search(queries, min(k, shard.ntotal), params=parameters)
        if rows.max(initial=-1) >= stop - first:
            raise PerceptError(
                f"{self.paths[number]} finds row {rows.max()}, and has {stop - first:,} rows: its"
                " rows have ids of their own, so build it again without."
            )
        if self._tells_distances[number]:
            values = to_cosines(values)
        elif shard.metric_type == require_extra("faiss", "search").METRIC_L2:
            values = -values  # scored again with the embeddings
        return SearchResult(values, np.where(rows < 0, -1, rows + first))

    def _find_rows(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows (queries, k) that faiss finds."""
        results = [
            self._search_shard(number, queries, k, np.empty(0, np.int64))
            for number in range(len(self.shards))
        ]
        return concatenate_results(results, k).row

    def _compute_cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Cosines (queries, candidates) of each query with its candidates; -inf for row -1."""
        assert self.embeddings is not None
        cosines = np.full(rows.shape, -np.inf, np.float32)
        for q in range(len(rows)):
            exists = rows[q] >= 0
            cosines[q, exists] = self.embeddings.get_rows(rows[q, exists]) @ queries[q]
        return cosines

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """Return a line of metadata for each of `rows` (n,), in that order; empty for row -1."""
        return self._metadata.get_rows(rows)

    def measure_recall(self, k: int = 16, queries: int = 200, seed: int = 0) -> float:
        """Measure the share of the k truly nearest rows that a search finds.

        Queries are embeddings of the index itself; each one is left out of its own result.

        Raises:
            PerceptError: the index has no embeddings to compare with.
        """
        if self.embeddings is None:
            raise PerceptError(
                f"{self.folder} has no embeddings, so that nothing tells which rows are truly"
                " nearest: keep img_emb/ beside the index."
            )
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(self), min(queries, len(self)), replace=False)
        query_rows = self.embeddings.get_rows(rows)
        k = min(k, len(self) - 1)
        result_rows = self.search(query_rows, k + 1).row
        nearest_rows = self.embeddings.search_exact(query_rows, k + 1, device=self.device).row
        n_hits = 0
        for row, results, nearest in zip(rows, result_rows, nearest_rows, strict=True):
            other_results = results[results != row][:k]
            other_nearest = nearest[nearest != row][:k]
            n_hits += len(set(other_results) & set(other_nearest))
        return n_hits / (k * len(rows))


def _search_parameters(index: Any, excluded: np.ndarray, probes: int) -> Any:
    """Return faiss's search parameters for an index of any of the usual types.

    Args:
        index: of faiss.
        excluded: (n,) rows that are left out.
        probes: lists that a query looks into; 0: as many as the index says.
    """
    faiss = require_extra("faiss", "search")
    index = faiss.downcast_index(index)
    selector = None
    if len(excluded):
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(faiss.downcast_index(index.index), excluded, probes)
        parameters = faiss.SearchParametersPreTransform(index_params=inner)
        parameters.inner = inner  # faiss does not keep it alive
    elif isinstance(index, faiss.IndexIDMap):
        return _search_parameters(index.index, excluded, probes)
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes or index.nprobe)
    elif isinstance(index, faiss.IndexHNSW):
        ef = max(64, index.hnsw.efSearch)
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=ef)
    else:
        parameters = faiss.SearchParameters(sel=selector)
    parameters.selector = selector  # faiss does not keep it alive
    return parameters
