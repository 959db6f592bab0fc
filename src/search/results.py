"""What is checked between a search and its scores: the encoder, and that pictures can be had."""

from __future__ import annotations

from typing import Any

import numpy as np

from src.search.images import load_local_images
from src.utils import PerceptError

N_TRIED = 64  # rows whose pictures are looked for on this machine

SMALLEST = 8  # pixels, of pictures that are only looked for


def describe_encoder(index: Any, encoder: dict[str, Any]) -> str:
    """Say how sure it is that an index is of the encoder of the queries.

    Args:
        index: that is searched.
        encoder: of the queries, as the index of `embed_images` records it.

    Raises:
        PerceptError: the index records another encoder.
    """
    recorded = getattr(index, "encoder", {})
    if recorded and recorded != encoder:
        raise PerceptError(
            f"{index} holds embeddings of {recorded}, and the brain's are of {encoder}: search an"
            " index of the same encoder."
        )
    if recorded:
        return f"recorded: {encoder.get('model')}"
    return f"not recorded, and taken for {encoder.get('model')}: see that the index was made by it"


def find_picture_source(index: Any, rows: Any = None) -> str:
    """Find out where the pictures of an index are.

    Args:
        index: that is searched.
        rows: of a server, (queries, k) that it found, -1 for none: files of this machine are not
            read because it names them. None: rows of an index that knows its length.

    Returns:
        "local": files on this machine; "sent": with the answers of a server; "url": addresses.

    Raises:
        PerceptError: there are no rows, the index says nowhere where its pictures are, or those are
            files that are not on this machine.
    """
    is_remote = rows is not None
    known_rows = np.unique(np.asarray(rows)) if is_remote else _spread_rows(len(index))
    known_rows = known_rows[known_rows >= 0]
    if not len(known_rows):
        raise PerceptError(f"No rows of {index} were found: search a larger index.")
    metadata = index.get_metadata(known_rows[_spread_rows(len(known_rows))])
    if not is_remote and load_local_images(metadata, SMALLEST)[1].any():
        return "local"
    for column, source in (("image", "sent"), ("url", "url")):
        if column in metadata and metadata[column].map(lambda value: isinstance(value, str)).any():
            return source
    if is_remote or not {"image_path", "tar"} & set(metadata):
        raise PerceptError(
            f"{index} says of no row where its picture is (image_path, url): put its metadata/"
            " beside the index."
        )
    file = metadata["tar" if "tar" in metadata else "image_path"].dropna().iloc[0]
    raise PerceptError(
        f"None of {len(metadata)} pictures that were looked for in {index} is on this machine, such"
        f" as {file}: give the folder where they lie now (pool), or an index with their urls."
    )


def _spread_rows(n: int) -> np.ndarray:
    """At most N_TRIED of n rows, from the first to the last."""
    if not n:
        return np.empty(0, int)
    return np.unique(np.linspace(0, n - 1, N_TRIED).astype(int))


def check_pictures(available: Any, image_ids: Any, name: str) -> None:
    """Refuse to score a search of which test images have no picture.

    Args:
        available: (images,) bool, whether one of the rows that were found has a picture.
        image_ids: (images,) of the test images.
        name: of the search, for the message.

    Raises:
        PerceptError: naming how many have none, and the first of them.
    """
    missing = np.asarray(image_ids)[~np.asarray(available)]
    if len(missing):
        listed = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise PerceptError(
            f"{len(missing)} of {len(available)} test images are without a picture ({name}:"
            f" {listed}), and nothing else is scored in its place: give more candidates or a larger"
            " k, see that the pictures of the pool can be had, and run this again (what was fetched"
            " is kept)."
        )


def check_neighbours(index: Any, barred: Any, k: int) -> None:
    """Refuse to look for more neighbours than an index has rows.

    Args:
        index: with a length.
        barred: rows that are left out.
        k: neighbours of each query.

    Raises:
        PerceptError: k is too large.
    """
    n_rows = len(index) - len(barred)
    if k > n_rows:
        raise PerceptError(
            f"k = {k} pictures a test image were asked for, and {n_rows} rows of {index} may be"
            " found: lower k, or search a larger index."
        )
