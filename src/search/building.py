"""Building the faiss index of a folder of embeddings, in shards that can be built side by side.

    image.index/trained.index                 centres and codes, learnt once for all shards
    image.index/0000.index, 0001.index, ...   `shard_rows` rows each

What is built, and how many rows each shard has, is recorded in index.json. An image.index that
somebody else built is left as it is: ours lies in percept.index then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from src.files.ownership import lock_folder
from src.search.embeddings import Embeddings
from src.search.local import LocalIndex
from src.search.plans import IndexPlan
from src.search.records import (
    check_writable,
    choose_index_folder,
    find_own_index,
    list_own_shards,
    list_visible,
    prepare_folder,
    read_state,
)
from src.utils import PerceptError, atomic, require_extra, write_json

# Steps in which a compressed index turns its axes (OPQ). faiss's own 50 take five times as long.
OPQ_ITERATIONS = 10

# Rows that a compressed index is learnt from: 39 for each of the 256 centres of a code.
MIN_TRAINING_ROWS = 10_000

MERGED = ("populated.index", "merged_index.ivfdata")  # files of `merge_shards`


def build_index(
    folder: str | Path, plan: IndexPlan, shard_rows: int = 1_000_000, jobs: int = 1, seed: int = 0
) -> LocalIndex:
    """Build the shards of an index that are missing or have grown.

    Finished shards are left as they are, so that an interrupted call goes on.

    Args:
        folder: of the index, with its embeddings.
        plan: of `choose_index`. If we built an index of the same type, what was learnt for it
            (centres, codes) stays; an index of ours of another type is replaced.
        shard_rows: rows a shard.
        jobs: processes that build shards side by side.
        seed: of the sample that centres and codes are learnt from.

    Raises:
        PerceptError: too few rows for this type, embeddings that are none, another process writes
            the folder, or faiss is not installed.
    """
    require_extra("faiss", "search")
    folder, embeddings = Path(folder), Embeddings(folder)
    check_writable(folder)
    _check_trainable(plan, len(embeddings))
    with lock_folder(folder, "building the index"):
        _build_own_index(folder, embeddings, plan, shard_rows, jobs, seed)
    return LocalIndex(folder)


def _build_own_index(
    folder: Path, embeddings: Embeddings, plan: IndexPlan, shard_rows: int, jobs: int, seed: int
) -> None:
    faiss = require_extra("faiss", "search")
    state = _prepare_state(folder, plan, shard_rows)
    index_folder = folder / state["index"]["folder"]
    prepare_folder(index_folder)
    trained = index_folder / "trained.index"
    if not (state["index"]["trained"] and trained.exists()):
        with atomic(trained) as temporary:
            faiss.write_index(_train(embeddings, plan, seed), str(temporary))
        state["index"]["trained"] = True
    write_json(folder / "index.json", state)
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))
    missing = []
    for number, start in enumerate(range(0, len(embeddings), shard_rows)):
        path = index_folder / f"{number:04d}.index"
        stop = min(start + shard_rows, len(embeddings))
        shard = _Shard(number, start, stop, path, str(folder), str(trained), threads)
        if [start, stop] not in state["shards"] or not path.exists():
            missing.append(shard)
    if missing:  # what was merged is of other rows
        for name in MERGED:
            (index_folder / name).unlink(missing_ok=True)
    n_rows = sum(shard.stop - shard.start for shard in missing)
    with tqdm(desc="indexing", unit="row", unit_scale=True, mininterval=2, total=n_rows) as bar:

        def record(shard: _Shard) -> None:
            other_shards = [rows for rows in state["shards"] if rows[0] != shard.start]
            state["shards"] = sorted([*other_shards, [shard.start, shard.stop]])
            write_json(folder / "index.json", state)
            bar.update(shard.stop - shard.start)

        _build_shards(missing, record, jobs)


def _prepare_state(folder: Path, plan: IndexPlan, shard_rows: int) -> dict[str, Any]:
    """Return the new content of index.json, after removing what of our index does not fit it."""
    state = {"shards": []} | read_state(folder)
    index_folder = choose_index_folder(folder, state)
    previous = state.get("index", {})
    is_same = previous.get("kind") == plan.kind and index_folder.is_dir()
    is_outdated = not is_same or previous.get("shard_rows") != shard_rows
    old_files = _list_own_files(index_folder, state) if is_outdated else []
    if not is_same:
        state["index"] = {
            "kind": plan.kind,
            "factory": plan.factory,
            "candidates": plan.candidates,
            "probes": plan.probes,
            "trained": False,
        }
    if is_outdated:
        state["shards"] = []
    state["index"].setdefault("trained", True)  # of earlier versions, which recorded nothing before
    state["index"] |= {
        "folder": index_folder.name,
        "shard_rows": shard_rows,
        "mapped": plan.mapped,
    }
    # recorded first, so that nothing of ours is ever taken for somebody else's, or for finished
    write_json(folder / "index.json", state)
    for path in old_files:
        if is_same and path.name == "trained.index":
            continue
        path.unlink(missing_ok=True)
    return state


def _list_own_files(index_folder: Path, state: dict[str, Any]) -> list[Path]:
    """List the files of our index: none in a folder that is not recorded as ours."""
    if find_own_index(index_folder.parent, state) != index_folder:
        return []
    return [index_folder / name for name in ("trained.index", *MERGED)] + list_visible(
        index_folder, "[0-9]*.index"
    )


def _check_trainable(plan: IndexPlan, rows: int) -> None:
    if plan.kind == "IVF-PQ" and rows < MIN_TRAINING_ROWS:
        raise PerceptError(
            f"{rows:,} images are too few to learn {plan.factory} from, which takes"
            f" {MIN_TRAINING_ROWS:,}: choose Flat."
        )


def _train(embeddings: Embeddings, plan: IndexPlan, seed: int) -> Any:
    """Return an empty index that has learnt its centres and codes from a sample of the rows."""
    faiss = require_extra("faiss", "search")
    index = faiss.index_factory(embeddings.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if plan.kind == "IVF-PQ":
            rotation = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter = OPQ_ITERATIONS
        n_sample = min(len(embeddings), 1_000_000, max(48 * plan.lists, 20_000))
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(len(embeddings), n_sample, replace=False))
        index.train(embeddings.get_rows(sample))
    return index


@dataclass(frozen=True)
class _Shard:
    """Rows [start, stop) of the embeddings in `folder`, indexed in the file `path`."""

    number: int
    start: int
    stop: int
    path: Path
    folder: str
    trained: str
    threads: int


def _build_shards(shards: list[_Shard], record: Callable[[_Shard], None], jobs: int) -> None:
    """Build shards here, or several at a time in processes of their own; `record` each one."""
    if jobs <= 1 or len(shards) <= 1:
        for shard in shards:
            _build_shard(shard)
            record(shard)
        return
    with ProcessPoolExecutor(min(jobs, len(shards)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_build_shard, shard): shard for shard in shards}
        for future in as_completed(running):
            future.result()
            record(running[future])


def _build_shard(shard: _Shard) -> None:
    faiss = require_extra("faiss", "search")
    faiss.omp_set_num_threads(shard.threads)
    index, embeddings = faiss.read_index(shard.trained), Embeddings(shard.folder)
    for _, block in embeddings.iterate_blocks(shard.start, shard.stop):
        index.add(block)
    with atomic(shard.path) as temporary:
        faiss.write_index(index, str(temporary))


def merge_shards(folder: str | Path) -> Path:
    """Merge all shards of our index into one file, populated.index, for `clip-retrieval back`.

    The lists of IVF-PQ stay on disk, in merged_index.ivfdata.

    Raises:
        PerceptError: shards are missing, another process writes the folder, or faiss is not
            installed.
    """
    faiss = require_extra("faiss", "search")
    folder = Path(folder)
    state = read_state(folder)
    index_folder, paths = find_own_index(folder, state), list_own_shards(folder, state)
    if index_folder is None or not paths or not all(path.exists() for path in paths):
        raise PerceptError(f"{folder} has no finished index to join: build it first.")
    merged = index_folder / "populated.index"
    with lock_folder(folder, "merging the index"):
        if len(paths) == 1:
            with atomic(merged) as temporary:
                os.link(paths[0], temporary)
            return merged
        index = faiss.read_index(str(index_folder / "trained.index"))
        if state["index"]["kind"] == "IVF-PQ":
            ondisk = require_extra("faiss.contrib.ondisk", "search")
            lists = str(index_folder / "merged_index.ivfdata")
            ondisk.merge_ondisk(index, [str(path) for path in paths], lists, shift_ids=True)
        else:
            for path in paths:
                index.merge_from(faiss.read_index(str(path)))
        with atomic(merged) as temporary:
            faiss.write_index(index, str(temporary))
    return merged
