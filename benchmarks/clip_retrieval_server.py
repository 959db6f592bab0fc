"""clip-retrieval's own server without CLIP's weights, for asking it by embedding: what
src/remote.py was checked against.

    ENV/bin/python benchmarks/clip_retrieval_server.py FOLDER [PORT]      # serve an index that src.index.join has joined
    .venv/bin/python benchmarks/clip_retrieval_server.py FOLDER PORT ask  # ask for rows of it by their embeddings, with and without the server's filter of doubles

ENV is an environment with clip-retrieval and "setuptools<81" installed (it needs numpy 1). Percept
must be importable for `ask` (PYTHONPATH=.).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path


def serve(folder: str, port: int) -> None:
    """Start the server; it asks for a model when it starts, and needs it for queries of words
    alone.
    """
    import all_clip
    from clip_retrieval.clip_back import clip_back

    all_clip.load_clip = lambda *_, **__: (None, None, None)
    paths = Path(tempfile.mkdtemp()) / "indices.json"
    paths.write_text(json.dumps({"it": folder}))
    clip_back(
        str(paths),
        port,
        enable_faiss_memory_mapping=True,
        enable_mclip_option=False,
        provide_aesthetic_embeddings=False,
    )


def ask(folder: str, port: int) -> None:
    """Rows found by `RemoteIndex` against those of `LocalIndex`, and what each takes."""
    from src.search import LocalIndex, RemoteIndex

    here = LocalIndex(folder)
    queries = here.embeddings.get_rows(range(0, len(here), len(here) // 50))[:50]
    for deduplicate in (False, True):
        there = RemoteIndex(
            f"http://localhost:{port}/knn-service", "it", deduplicate=deduplicate, num_images=64
        )
        begun = time.perf_counter()
        found = there.search(queries, 16)
        seconds = time.perf_counter() - begun
        own = here.search(queries, 16)
        urls = [there.get_metadata(rows)["url"].tolist() for rows in found.row]
        same = sum(
            a == b
            for rows, some in zip(own.row, urls, strict=True)
            for a, b in zip(here.get_metadata(rows)["url"], some, strict=True)
        )
        gap, each = abs(found.similarity - own.similarity).max(), 1e3 * seconds / len(queries)
        print(
            f"deduplicate={deduplicate}: {same} of {own.row.size} results as the local index has"
            f" them, similarities within {gap:.1e}, {each:.1f} ms a query"
        )


if __name__ == "__main__":
    {"ask": ask}.get("".join(sys.argv[3:]), serve)(sys.argv[1], int((sys.argv[2:] or ["1234"])[0]))
