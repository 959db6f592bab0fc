"""An index on another machine: a clip-retrieval server (github.com/rom1504/clip-retrieval).

`RemoteIndex` is searched as `src.search.local.LocalIndex` is. If something goes wrong with the
service, one sentence says so, after seconds and not hours.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from src.search.embeddings import SearchResult, check_queries, select_top_k, unique_rows
from src.search.http_client import RequestFailed, RequestLimits, request, run_in_parallel
from src.search.tables import clean_fields, make_table
from src.utils import PerceptError

# Cosines are at most 1; an index that stores rows compressed may tell a little more.
LARGEST_COSINE = 1.1

ANSWER_BYTES = 200e6  # of an answer of the service, which is large if it holds images

ON_FAILURE = ("stop", "published")

MODALITIES = ("image", "text")

SECOND_REQUEST = {"aesthetic_score": 5, "aesthetic_weight": 1}

REMEDY = (
    "see that it runs, that its url is right and timeout long enough, or build a local index with"
    " notebook 05_search_index (the public knn.laion.ai has been down since December 2023)"
)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PerceptError(f"{name} = {value!r} is unknown: choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class RequestOptions:
    """What a request asks of the server, besides the query.

    Attributes:
        num_images: rows asked for at a query, at least k. 0: four times k, as the server leaves out
            doubles and unsafe images after it has searched.
        deduplicate: leave out near doubles.
        use_safety_model: leave out unsafe images, if the server has a model for it.
        use_violence_detector: leave out violent images, if the server has a model for it.
        use_mclip: for text queries, which are not made here; sent along.
        aesthetic_score: 0 to 9: the server moves the query towards images of this score. None: it
            does not.
        aesthetic_weight: how far.
        modality: "image" or "text", what the rows embed.

    Raises:
        PerceptError: an unknown modality.

    Source: clip-retrieval's clip_client.py and clip_back.py.
    """

    num_images: int = 0
    deduplicate: bool = True
    use_safety_model: bool = True
    use_violence_detector: bool = True
    use_mclip: bool = False
    aesthetic_score: int | None = None
    aesthetic_weight: float = 0.5
    modality: str = "image"

    def __post_init__(self) -> None:
        _check_choice("modality", self.modality, MODALITIES)

    def to_fields(self, indice_name: str) -> dict[str, Any]:
        """Return the fields of a request as JSON values, without the query."""
        moves_query = self.aesthetic_score is not None
        return {
            "text": None,
            "image": None,
            "image_url": None,
            "deduplicate": self.deduplicate,
            "use_safety_model": self.use_safety_model,
            "use_violence_detector": self.use_violence_detector,
            "indice_name": indice_name,
            "use_mclip": self.use_mclip,
            "modality": self.modality,
            "aesthetic_score": self.aesthetic_score if moves_query else "",
            "aesthetic_weight": self.aesthetic_weight if moves_query else "",
        }


# What MindEye's scripts ask for, with on_failure = "published".
# Source: MindEye (arXiv 2305.18274), appendix A.7 and src/utils.py.
PUBLISHED_OPTIONS = RequestOptions(
    num_images=300, use_safety_model=False, use_violence_detector=False, aesthetic_score=9
)


@dataclass(frozen=True)
class _QueryOutcome:
    """Rows that the server found for one query, or why there are none.

    Attributes:
        lines: of the answer, best first.
        failure: why the query failed; None if it did not.
        retried: whether a second request was needed.
    """

    lines: list[dict[str, Any]]
    failure: RequestFailed | None = None
    retried: bool = False


class RemoteIndex:
    """An index that a clip-retrieval server searches (`clip-retrieval back`).

    The server's encoder must be that of the queries: LAION-5B's was CLIP ViT-L/14, one embedding of
    768 numbers an image. Similarities are the server's: inner products with rows of length one,
    which its index may store compressed. With an aesthetic score they are those of a query that was
    moved.

    Args:
        url: of its knn-service, e.g. "http://localhost:1234/knn-service".
        indice_name: of the index on the server.
        dim: numbers an embedding; 0: not checked.
        options: what a request asks for; MindEye's scripts ask for `PUBLISHED_OPTIONS` of the index
            "laion5B-L-14".
        timeout: seconds that one request may take in all.
        workers: requests at a time.
        on_failure: "stop", or "published": wait, ask once more with an aesthetic score of 5 of
            weight 1, and if that fails too leave the query without rows. MindEye's scripts then
            take white images, ones(16, 3, 512, 512); here such queries have row -1, are counted
            in `failed` and a warning is given. A service that gives no answer at all to the first
            query stops the search all the same.
        wait: seconds before the second request.

    Attributes:
        count: None, as a server does not say how many rows it has.
        failed: (n,) numbers of the queries of the last search that got no answer.
        retried: (n,) numbers of those that were answered at the second request.

    Raises:
        PerceptError: an unknown on_failure.
    """

    count: None = None

    def __init__(
        self,
        url: str,
        indice_name: str,
        dim: int = 0,
        options: RequestOptions | None = None,
        timeout: float = 5.0,
        workers: int = 4,
        on_failure: str = "stop",
        wait: float = 2.0,
    ):
        _check_choice("on_failure", on_failure, ON_FAILURE)
        self.url, self.indice_name, self.dim = url, indice_name, dim
        self.options = options or RequestOptions()
        self.workers, self.on_failure, self.wait = workers, on_failure, wait
        self.failed = np.empty(0, np.int64)
        self.retried = np.empty(0, np.int64)
        # the user names this address, and no stranger: it may be private
        self._limits = RequestLimits(timeout, ANSWER_BYTES, allow_private=True)
        self._metadata: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"{self.indice_name} at {self.url}"

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """Find the k most similar rows, with one request a query.

        There are further requests if the excluded rows leave too few. The first query goes alone:
        if the service is down, that is known after one time-out.

        Args:
            queries: (queries, dim), of any length.
            k: rows a query, at least 1.
            exclude: (n,) rows that are never returned.

        Raises:
            PerceptError: another dim, numbers that are not finite, or k below 1; the service is
                down, too slow, or answers with an error or something else than rows (with
                on_failure = "published": with no answer at all to the first query, or to all
                queries).
        """
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        queries = check_queries(queries, self.dim or queries.shape[1], k)
        excluded = frozenset(unique_rows(exclude).tolist())

        def ask(query: np.ndarray) -> _QueryOutcome:
            return self._ask(query, k, excluded)

        outcomes: list[_QueryOutcome] = []
        if len(queries):
            first = ask(queries[0])
            if first.failure and not first.failure.reached:
                raise self._to_error(first.failure)
            desc = "asking the retrieval service"
            outcomes = [first, *run_in_parallel(ask, list(queries[1:]), self.workers, desc)]
        self._count_failures(outcomes)
        result = _select_lines(outcomes, k)
        self._store_metadata(outcomes, result)
        return result

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """Return what the answers said of `rows` (n,), a line each in that order.

        Columns are url, caption, ...; a line is empty for row -1.

        Raises:
            PerceptError: a row that no search has returned; a server cannot be asked for it.
        """
        row_list = np.asarray(rows, np.int64).ravel().tolist()
        unknown = [row for row in row_list if row != -1 and row not in self._metadata]
        if unknown:
            raise PerceptError(
                f"Nothing is known of row {unknown[0]} of {self!r}: ask for rows that a search of"
                " this session has found."
            )
        lines = [self._metadata.get(row, {}) for row in row_list]
        return make_table(lines)

    def _store_metadata(self, outcomes: list[_QueryOutcome], result: SearchResult) -> None:
        """Store the metadata of the rows of a result.

        Other lines of the answers are dropped: an answer may hold 300 images.
        """
        for outcome, rows in zip(outcomes, result.row.tolist(), strict=True):
            for line in outcome.lines:
                if line["id"] in rows:
                    fields = {k: v for k, v in line.items() if k not in ("id", "similarity")}
                    self._metadata[line["id"]] = clean_fields(fields)

    def _ask(self, query: np.ndarray, k: int, excluded: frozenset[int]) -> _QueryOutcome:
        """Ask for the rows of one query (dim,), twice if `on_failure` says so."""
        try:
            return _QueryOutcome(self._get_lines(query, k, excluded))
        except RequestFailed as failure:
            if self.on_failure == "stop":
                raise self._to_error(failure) from failure
        time.sleep(self.wait)
        try:
            lines = self._get_lines(query, k, excluded, **SECOND_REQUEST)
        except RequestFailed as failure:
            return _QueryOutcome([], failure)
        return _QueryOutcome(lines, retried=True)

    def _get_lines(
        self, query: np.ndarray, k: int, excluded: frozenset[int], **fields: Any
    ) -> list[dict[str, Any]]:
        """Return the lines of an answer, each row once and without the excluded ones.

        If fewer than k are left because rows are excluded, more are asked for.
        """
        n_rows = max(k, self.options.num_images or 4 * k)
        sufficient = k + len(excluded)
        while True:
            line_by_row: dict[int, dict[str, Any]] = {}
            for line in self._post(query, n_rows, **fields):
                line_by_row.setdefault(line["id"], line)
            lines = [line for row, line in line_by_row.items() if row not in excluded]
            none_excluded = len(lines) == len(line_by_row)
            if len(lines) >= k or none_excluded or n_rows >= sufficient:
                return lines
            n_rows = min(4 * n_rows, sufficient)

    def _post(self, query: np.ndarray, n_rows: int, **fields: Any) -> list[dict[str, Any]]:
        """Send one request and check that the server answers with lines."""
        query_fields = {
            "embedding_input": query.tolist(),
            "num_images": n_rows,
            "num_result_ids": n_rows,
        }
        body = json.dumps(self.options.to_fields(self.indice_name) | query_fields | fields)
        deadline = time.monotonic() + self._limits.timeout
        response = request(self.url, deadline, self._limits, body.encode())
        if response.status != 200:
            raise RequestFailed(
                f"answered with HTTP {response.status} to a query of {len(query)} numbers in the"
                f" index {self.indice_name!r}"
            )
        try:
            lines = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise RequestFailed("did not answer with JSON") from error
        if not isinstance(lines, list) or not all(map(_is_line, lines)):
            raise RequestFailed(
                "did not answer with a list of rows that have an id and a similarity"
            )
        _check_similarities(lines)
        return lines

    def _count_failures(self, outcomes: list[_QueryOutcome]) -> None:
        self.failed = np.flatnonzero([outcome.failure is not None for outcome in outcomes])
        self.retried = np.flatnonzero([outcome.retried for outcome in outcomes])
        if not len(self.failed):
            return
        failure = outcomes[self.failed[0]].failure
        if len(self.failed) == len(outcomes):
            raise self._to_error(failure)
        warnings.warn(
            f"{len(self.failed)} of {len(outcomes)} queries failed twice and have no rows (the"
            f" service {failure}), where the published scripts take white images.",
            stacklevel=3,
        )

    def _to_error(self, failure: RequestFailed | None) -> PerceptError:
        return PerceptError(f"The retrieval service at {self.url} {failure}: {REMEDY}.")


def _select_lines(outcomes: list[_QueryOutcome], k: int) -> SearchResult:
    """Select the k most similar rows of each answer."""
    width = max([k, *(len(outcome.lines) for outcome in outcomes)])
    similarity = np.full((len(outcomes), width), -np.inf, np.float32)
    row = np.full((len(outcomes), width), -1, np.int64)
    for q, outcome in enumerate(outcomes):
        n = len(outcome.lines)
        similarity[q, :n] = [line["similarity"] for line in outcome.lines]
        row[q, :n] = [line["id"] for line in outcome.lines]
    return select_top_k(similarity, row, k)


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    row: Any = line.get("id")
    similarity: Any = line.get("similarity")
    if type(row) is not int or not 0 <= row < 2**63:
        return False
    if type(similarity) not in (int, float):
        return False
    try:
        return math.isfinite(float(similarity))
    except OverflowError:  # an integer of hundreds of digits
        return False


def _check_similarities(lines: list[dict[str, Any]]) -> None:
    """Refuse lines whose similarities are no cosines, such as distances, best first."""
    similarities = np.array([line["similarity"] for line in lines], float)
    if not len(lines):
        return
    furthest = similarities[np.abs(similarities).argmax()]
    if abs(furthest) > LARGEST_COSINE:
        raise RequestFailed(f"answered with a similarity of {furthest:.6g}, which is no cosine")
    steps = np.diff(similarities)
    if len(steps) > 1 and steps.min() >= 0 and steps.max() > 0:
        raise RequestFailed(
            "answered with the smallest similarities first, as an index of distances does"
        )
