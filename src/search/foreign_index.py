"""What a faiss index that somebody else built measures: it is looked at before it is believed.

Similarities must be cosines. An index of inner products gives them if its rows are of length one;
one of squared Euclidean distances d too, as 1 - d / 2. Any other index is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src.search.embeddings import Embeddings
from src.utils import PerceptError, require_extra

N_PROBES = 8  # queries by which an index is looked at

N_NEIGHBOURS = 8  # rows that each of them finds

LENGTH_TOLERANCE = 0.05  # of rows of length one

# Codes of a row are shorter than the row, on average over a list by about a tenth.
SHORTEST_CODE = 0.5


def check_metric(index: Any, path: Path) -> bool:
    """Check that an index without embeddings beside it tells cosines.

    Args:
        index: of faiss.
        path: its file, for messages.

    Returns:
        Whether it tells squared distances, to be turned into cosines by `to_cosines`.

    Raises:
        PerceptError: another measure, or rows that are not of length one, or of unknown length
            where distances are told.
    """
    faiss = require_extra("faiss", "search")
    is_distance = index.metric_type == faiss.METRIC_L2
    if not is_distance and index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise PerceptError(
            f"{path} compares by faiss's metric {index.metric_type}, neither inner products nor L2"
            " distances: build it again with one of those, or put img_emb/ beside it."
        )
    lengths = _sample_lengths(index)
    if lengths is None:
        if is_distance:
            raise PerceptError(
                f"{path} tells L2 distances, and not its rows, so that nobody knows whether these"
                " are of length one: put img_emb/ beside it, or build it with inner products."
            )
        return False
    shortest = SHORTEST_CODE if _is_compressed(index) and not is_distance else 1 - LENGTH_TOLERANCE
    if len(lengths) and not (shortest <= lengths.min() and lengths.max() <= 1 + LENGTH_TOLERANCE):
        raise PerceptError(
            f"{path} has rows of lengths from {lengths.min():.3g} to {lengths.max():.3g}, where"
            " only rows of length one can be ranked by cosine: put img_emb/ beside it, or build it"
            " of rows of length one."
        )
    return is_distance


def to_cosines(distances: np.ndarray) -> np.ndarray:
    """Turn squared distances of vectors of length one into cosines."""
    return 1 - distances / 2


def _sample_lengths(index: Any) -> np.ndarray | None:
    """Lengths of some rows of an index, NaN as infinity; None if it does not tell its rows."""
    if not index.ntotal:
        return np.empty(0)
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((N_PROBES, index.d)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    try:
        _, rows, vectors = index.search_and_reconstruct(queries, min(N_NEIGHBOURS, index.ntotal))
    except (RuntimeError, AttributeError):  # faiss, for types that keep no rows
        return None
    lengths = np.linalg.norm(vectors, axis=-1)[rows >= 0]
    return np.where(np.isfinite(lengths), lengths, np.inf)


def _is_compressed(index: Any) -> bool:
    """Whether an index keeps codes in place of rows."""
    faiss = require_extra("faiss", "search")
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        return _is_compressed(index.index)
    name = type(index).__name__
    return "Flat" not in name


def check_same_rows(search: Any, embeddings: Embeddings, path: Path) -> None:
    """Check that an index is of the embeddings that lie beside it.

    Some rows are looked up by their embeddings; most must be among what is found, or something
    equal to them.

    Args:
        search: queries (queries, dim), k -> rows (queries, k).
        embeddings: beside the index.
        path: of the index, for messages.

    Raises:
        PerceptError: the index is of other rows, or of rows in another order.
    """
    probe_rows = np.unique(np.linspace(0, len(embeddings) - 1, N_PROBES).astype(np.int64))
    queries = embeddings.get_rows(probe_rows)
    n_right = 0
    for query, rows in zip(queries, search(queries, 4 * N_NEIGHBOURS), strict=True):
        existing = rows[(rows >= 0) & (rows < len(embeddings))]
        if len(existing) and (embeddings.get_rows(existing) @ query).max() > 1 - LENGTH_TOLERANCE:
            n_right += 1
    if 2 * n_right < len(probe_rows):
        raise PerceptError(
            f"{path} is not of the embeddings in {embeddings.folder / 'img_emb'}: only {n_right} of"
            f" {len(probe_rows)} rows are found by their own embeddings; put the files of one index"
            " together, or take this one away and build it again."
        )
