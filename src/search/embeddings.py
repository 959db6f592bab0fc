"""Stored embeddings of many images, their metadata, and exact search by cosine similarity.

Embeddings lie in a folder in the layout of clip-retrieval (github.com/rom1504/clip-retrieval):

    img_emb/img_emb_000000.npy         embeddings (rows, dim), float16, of length one
    metadata/metadata_000000.parquet   one line a row: image_path, caption, url, key, ...

Rows are numbered through all files, in the order of the file names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from src.files.foreign import READ_ERRORS, explain_unreadable
from src.search.records import list_embeddings, list_metadata
from src.utils import PerceptError

MAKE_AGAIN = "make that part again"

MAX_NEIGHBOURS = 2**20  # that a search may ask for

BLOCK_ROWS = 65_536  # rows read at a time

# Two embeddings with this cosine are of the same image: it allows for half precision and for
# another way of resizing.
SAME_IMAGE_COSINE = 0.999

# Up to this many rows, near duplicates are searched exactly and not with a compressed index.
MAX_EXACT_ROWS = 5_000_000


# ------------------------------------------------------------------------------------------ search
@dataclass(frozen=True)
class SearchResult:
    """The nearest rows of each query.

    Attributes:
        similarity: (queries, k) float32, cosine, highest first; -inf where there are fewer than k.
        row: (queries, k) int64, row of the index; -1 where there are fewer than k.
    """

    similarity: np.ndarray
    row: np.ndarray


def check_queries(queries: Any, dim: int, k: int) -> np.ndarray:
    """Return queries (queries, dim) as float32 of length one.

    Raises:
        PerceptError: another dim, numbers that are not finite, a query that is all 0, or k below 1
            or above MAX_NEIGHBOURS.
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
    if not 1 <= k <= MAX_NEIGHBOURS:
        raise PerceptError(
            f"{k} neighbours were asked for: ask for at least one, and at most {MAX_NEIGHBOURS:,}."
        )
    return queries / length


def unique_rows(rows: Any) -> np.ndarray:
    """Return the different row numbers among `rows` (n,), sorted; None counts as no rows."""
    if rows is None:
        return np.empty(0, np.int64)
    return np.unique(np.asarray(rows, np.int64))


def select_top_k(similarity: np.ndarray, row: np.ndarray, k: int) -> SearchResult:
    """Select the k most similar of the candidates (queries, candidates).

    Equally similar ones come in the order of their rows. A candidate of row -1 does not count.
    """
    similarity = np.where(row < 0, -np.inf, similarity).astype(np.float32)
    order = np.lexsort((row, -similarity), axis=1)[:, :k]
    top_similarity = np.take_along_axis(similarity, order, 1)
    top_row = np.take_along_axis(row, order, 1)
    n_missing = k - top_row.shape[1]
    if n_missing > 0:
        padding = ((0, 0), (0, n_missing))
        top_similarity = np.pad(top_similarity, padding, constant_values=-np.inf)
        top_row = np.pad(top_row, padding, constant_values=-1)
    return SearchResult(top_similarity, np.where(np.isneginf(top_similarity), -1, top_row))


def concatenate_results(results: list[SearchResult], k: int) -> SearchResult:
    """Merge results of the same queries on different rows: the k most similar of all."""
    similarity = np.concatenate([result.similarity for result in results], 1)
    row = np.concatenate([result.row for result in results], 1)
    return select_top_k(similarity, row, k)


# ------------------------------------------------------------------------------------------- files
def read_checked(
    path: Path, remedy: str, read: Callable[..., Any], *arguments: Any, **options: Any
) -> Any:
    """Read a file with `read`.

    Raises:
        PerceptError: the file may not be read, is cut short or of another format; the sentence ends
            with `remedy`.
    """
    try:
        return read(str(path), *arguments, **options)
    except (PermissionError, FileNotFoundError, MemoryError) as error:
        raise explain_unreadable(path, error, remedy) from error
    # faiss raises RuntimeError, numpy and pyarrow ValueError, an empty file EOFError
    except READ_ERRORS as error:
        if not os.access(path, os.R_OK):
            raise explain_unreadable(path, error, remedy) from error
        raise PerceptError(
            f"{path} cannot be read, as it is cut short or of another kind: {remedy}."
        ) from error


class Metadata:
    """The files metadata/*.parquet of a folder, read when their rows are asked for.

    Args:
        folder: of an index.
        n_files: number of files that count, the first ones by name. One more belongs to a part
            whose embeddings were interrupted.

    Attributes:
        lengths: rows of each file.
        offsets: number of the first row of each file, and the number of all rows.
    """

    def __init__(self, folder: str | Path, n_files: int | None = None):
        self.folder = Path(folder)
        self.paths = list_metadata(folder)[:n_files]
        self.lengths = [self._count_rows(path) for path in self.paths]
        self.offsets = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @staticmethod
    def _count_rows(path: Path) -> int:
        return int(read_checked(path, MAKE_AGAIN, pq.read_metadata).num_rows)

    def get_rows(self, rows: Any) -> pd.DataFrame:
        """Return one line for each of `rows` (n,), in that order.

        All columns are missing for row -1, and there are none if the folder has no files.

        Raises:
            PerceptError: a row that does not exist, or a file cannot be read.
        """
        rows = np.asarray(rows, np.int64)
        if self.paths and len(rows) and not -1 <= rows.min() <= rows.max() < len(self):
            outside = rows[(rows < -1) | (rows >= len(self))][0]
            raise PerceptError(
                f"{self.folder} has no row {outside}, as its metadata is of {len(self):,} rows: ask"
                " for rows that a search returned."
            )
        tables = []
        if self.paths:
            file_of_row = np.searchsorted(self.offsets, rows, side="right") - 1
            for file in np.unique(file_of_row[rows >= 0]):
                positions = np.flatnonzero((file_of_row == file) & (rows >= 0))
                table = read_checked(self.paths[file], MAKE_AGAIN, pq.read_table)
                lines = table.take(rows[positions] - self.offsets[file]).to_pandas()
                tables.append(lines.set_axis(positions))
        table = pd.concat(tables) if tables else pd.DataFrame()
        return table.reindex(range(len(rows)))


class Embeddings:
    """Embeddings of many images, memory-mapped: the files img_emb/*.npy of a folder.

    Attributes:
        arrays: (rows, dim) of each file, in the order of their names.
        offsets: number of the first row of each file, and the number of all rows.
        dim: numbers an embedding.
        paths: of the files.

    Raises:
        PerceptError: there are none, a file is cut short or not of floating-point numbers, they are
            not of one dim, or metadata has other rows.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.paths = list_embeddings(folder)
        if not self.paths:
            raise PerceptError(
                f"{self.folder / 'img_emb'} holds no .npy files: give a folder that clip-retrieval,"
                " or notebook 05_search_index, wrote embeddings into."
            )
        options = {"mmap_mode": "r", "allow_pickle": False}
        self.arrays = [read_checked(path, MAKE_AGAIN, np.load, **options) for path in self.paths]
        self._check_types()
        self.dim = self._check_shapes()
        lengths = [len(array) for array in self.arrays]
        self.offsets = np.cumsum([0, *lengths])
        self._check_metadata(lengths)

    def _check_types(self) -> None:
        """Refuse files of anything but floating-point numbers."""
        for path, array in zip(self.paths, self.arrays, strict=True):
            kind = getattr(array, "dtype", type(array).__name__)
            if getattr(kind, "kind", "") != "f":
                raise PerceptError(
                    f"{path} holds {kind} and no floating-point numbers, so that it is no file of"
                    f" embeddings: {MAKE_AGAIN}."
                )

    def _check_shapes(self) -> int:
        """Return the common dim of all files."""
        axes = {array.ndim for array in self.arrays}
        dims = {array.shape[-1:] for array in self.arrays}
        if axes != {2} or len(dims) != 1:
            shapes = sorted({array.shape for array in self.arrays})[:3]
            raise PerceptError(
                f"The embeddings in {self.folder / 'img_emb'} are not all (rows, dim) with one dim:"
                f" {shapes}."
            )
        if not any(array.size for array in self.arrays):
            raise PerceptError(
                f"The embeddings in {self.folder / 'img_emb'} are empty, {self.arrays[0].shape}:"
                f" {MAKE_AGAIN}."
            )
        return int(dims.pop()[0])

    def _check_metadata(self, lengths: list[int]) -> None:
        """Refuse metadata files whose rows are not those of the embeddings."""
        metadata = Metadata(self.folder, len(lengths))
        metadata_lengths = metadata.lengths
        if not metadata_lengths:
            return
        if metadata_lengths == lengths:
            self._check_numbers(metadata.paths)
            return
        pairs = zip(metadata_lengths, lengths, strict=False)
        differing = [file for file, pair in enumerate(pairs) if pair[0] != pair[1]]
        first = differing[0] if differing else len(metadata_lengths)
        raise PerceptError(
            f"Embeddings and metadata of {self.folder} differ in their rows from part {first}"
            " on: make that part again."
        )

    def _check_numbers(self, metadata_paths: list[Path]) -> None:
        """Refuse files of embeddings and metadata that belong to parts of other numbers."""
        for path, metadata_path in zip(self.paths, metadata_paths, strict=True):
            numbers = [re.findall(r"\d+", file.stem)[-1:] for file in (path, metadata_path)]
            if all(numbers) and int(numbers[0][0]) != int(numbers[1][0]):
                raise PerceptError(
                    f"{path} and {metadata_path} would be of the same rows by their order, and are"
                    " not by their numbers: add the file that is missing, or take the other away."
                )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def get_rows(self, rows: Any) -> np.ndarray:
        """Return the embeddings of `rows` (n,) as (n, dim) float32 of length one.

        Raises:
            PerceptError: an embedding is NaN, infinite, or nothing but zeros.
        """
        rows = np.asarray(rows, np.int64)
        embeddings = np.empty((len(rows), self.dim), np.float32)
        file_of_row = np.searchsorted(self.offsets, rows, side="right") - 1
        for file in np.unique(file_of_row):
            selected = file_of_row == file
            embeddings[selected] = self.arrays[file][rows[selected] - self.offsets[file]]
        # without a copy of the embeddings, as a sample to learn from may take gigabytes
        length = np.einsum("ij,ij->i", embeddings, embeddings)[:, None] ** 0.5
        if not (np.isfinite(length) & (length > 0)).all():
            self._name_unusable(rows, length[:, 0])
        embeddings /= length
        return embeddings

    def _name_unusable(self, rows: np.ndarray, length: np.ndarray) -> None:
        """Raise over the first embedding whose length says that it is none."""
        row = int(rows[np.flatnonzero(~(np.isfinite(length) & (length > 0)))[0]])
        file = int(np.searchsorted(self.offsets, row, side="right") - 1)
        raise PerceptError(
            f"{self.paths[file]} holds NaN, infinite values or nothing but zeros as embedding"
            f" {row - int(self.offsets[file])} (row {row} of the index): {MAKE_AGAIN}."
        )

    def iterate_blocks(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first row, (rows, dim) float32 of length one) of rows [start, stop).

        By default all rows.
        """
        stop = len(self) if stop is None else stop
        for first in range(start, stop, BLOCK_ROWS):
            yield first, self.get_rows(np.arange(first, min(first + BLOCK_ROWS, stop)))

    def search_exact(
        self, queries: Any, k: int, exclude: Any = None, device: str = "cpu"
    ) -> SearchResult:
        """Find the k most similar rows by comparing each query with every row.

        Args:
            queries: (queries, dim), of any length.
            k: rows a query, at least 1.
            exclude: (n,) rows that are never returned.
            device: that compares, where a GPU is fastest.

        Raises:
            PerceptError: another dim, numbers that are not finite, or k below 1.
        """
        queries = check_queries(queries, self.dim, k)
        query_tensor = torch.from_numpy(queries).to(device)
        excluded = unique_rows(exclude)
        shape = (len(queries), 0)
        result = SearchResult(np.empty(shape, np.float32), np.empty(shape, np.int64))
        for first, block in self.iterate_blocks():
            scores = query_tensor @ torch.from_numpy(block).to(device).T  # (queries, rows)
            in_block = excluded[(excluded >= first) & (excluded < first + len(block))] - first
            scores[:, torch.from_numpy(in_block).to(device)] = -torch.inf
            top = scores.topk(min(k, len(block)), dim=1)
            similarity, row = top.values.cpu().numpy(), top.indices.cpu().numpy() + first
            result = concatenate_results([result, SearchResult(similarity, row)], k)
        return result


# --------------------------------------------------------------------------------- near duplicates
def find_near_duplicates(
    index: Any, images: Any, image_ids: Any, threshold: float = 0.94
) -> pd.DataFrame:
    """Find the rows of an index that show one of the given images, or nearly so.

    Args:
        index: with `search`.
        images: embeddings (images, dim) of test images, by the encoder of the index.
        image_ids: (images,).
        threshold: cosine from which a row counts as nearly the same.

    Returns:
        Table [image, row, similarity, exact] with a line for every pair of an image and a row;
        exact: whether the cosine is at least `SAME_IMAGE_COSINE`.
    """
    images, ids = np.asarray(images, np.float32), np.asarray(image_ids)
    stored = getattr(index, "embeddings", None)
    search = index.search
    if stored is not None and len(stored) <= MAX_EXACT_ROWS:
        search = stored.search_exact
    pairs = []
    remaining, k = np.arange(len(images)), 16
    while len(remaining):
        k = min(k, MAX_NEIGHBOURS)
        result = search(images[remaining], k)
        similar = result.similarity >= threshold
        # where all k rows are near duplicates there may be more: search again with a larger k
        incomplete = similar.all(1) & (result.row >= 0).all(1) & (k < MAX_NEIGHBOURS)
        for position in np.flatnonzero(~incomplete):
            image = ids[remaining[position]]
            for column in np.flatnonzero(similar[position]):
                row = result.row[position, column]
                pairs.append((image, row, float(result.similarity[position, column])))
        remaining, k = remaining[incomplete], k * 4
    table = pd.DataFrame(pairs, columns=["image", "row", "similarity"])
    return table.assign(exact=table["similarity"] >= SAME_IMAGE_COSINE)
