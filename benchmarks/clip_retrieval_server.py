"""clip-retrieval's own server without CLIP's weights, for asking it by embedding: what
`RemoteIndex` was checked against.

    ENV/bin/python benchmarks/clip_retrieval_server.py FOLDER [PORT]      # serve an index
    .venv/bin/python benchmarks/clip_retrieval_server.py FOLDER PORT ask  # ask it

The index is one that src.search.merge_shards has joined. It is asked for rows of it by their
embeddings, with and without the server's filter of doubles.

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
    from src.search import LocalIndex, RemoteIndex, RequestOptions

    local = LocalIndex(folder)
    queries = local.embeddings.get_rows(range(0, len(local), len(local) // 50))[:50]
    for deduplicate in (False, True):
        options = RequestOptions(num_images=64, deduplicate=deduplicate)
        url = f"http://localhost:{port}/knn-service"
        remote = RemoteIndex(url, "it", options=options)
        start_time = time.perf_counter()
        remote_results = remote.search(queries, 16)
        milliseconds = 1e3 * (time.perf_counter() - start_time) / len(queries)
        results = local.search(queries, 16)
        same = 0
        for rows, remote_rows in zip(results.row, remote_results.row, strict=True):
            urls = local.get_metadata(rows)["url"].to_numpy()
            same += int((urls == remote.get_metadata(remote_rows)["url"].to_numpy()).sum())
        gap = abs(remote_results.similarity - results.similarity).max()
        print(
            f"deduplicate={deduplicate}: {same} of {results.row.size} results as the local index"
            f" has them, similarities within {gap:.1e}, {milliseconds:.1f} ms a query"
        )


def main(folder: str, port: str = "1234", action: str = "serve") -> None:
    """Serve an index, or ask the server."""
    function = ask if action == "ask" else serve
    function(folder, int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
