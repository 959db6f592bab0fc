"""What an index costs a row, and what it finds: the constants from which docs/large_index.md
computes 100 million to 5.5 billion images.

    python benchmarks/large_index.py                                  # 20,000 rows, two minutes
    python benchmarks/large_index.py 1000000 --folder /big/disk/li    # the table: 5 GB of disk
    python benchmarks/large_index.py 100000 --kinds Flat,IVF-PQ

With --folder, what an earlier call has made is used again.

Rows are random, 768 numbers as of CLIP ViT-L/14, and clustered as its embeddings are: unit(sqrt(.5)
m + sqrt(.3) c + sqrt(.2) e), with one m for all, a centre c for every 100 rows (sizes by Zipf's
law), a residual e of each row. c and e have length one on average, and a spectrum that falls with
the square root of the number of the component, in a random rotation. Two rows have a cosine of .5,
two of a cluster .8. The 982 queries are fresh draws of the same. Each index is built by one thread,
and each search runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIM, QUERIES, K = 768, 982, 16

BLOCK = 10_000  # rows at a time

RERANKED = 10  # times K rows are compared exactly, where an index is reranked

SINGLE, COLD = 100, 32  # queries that are timed one by one, with files in the cache and without
Search = Callable[[np.ndarray], np.ndarray]  # queries (n, DIM) -> rows (n, K)

PROBES = (1, 4, 16, 64, 256)
KINDS = ("Flat", "SQfp16", "SQ8", "IVF-PQ", "Qdrant", "Qdrant scalar", "Qdrant product")


# -------------------------------------------------------------------------------------------- rows
class RowModel:
    """The random rows. `draw` gives (n, DIM) float32 of length one."""

    def __init__(self, rows: int):
        rng = np.random.default_rng(0)
        spread = (1.0 + np.arange(DIM)) ** -0.5
        spread /= np.linalg.norm(spread)
        rotation, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
        self.turn = (rotation * spread).T.astype(np.float32)  # (component, dim)
        self.mean = rng.standard_normal(DIM).astype(np.float32)
        self.mean /= np.linalg.norm(self.mean)
        clusters = max(2, rows // 100)
        self.centres = rng.standard_normal((clusters, DIM), np.float32) @ self.turn
        self.share = 1.0 / (10 + np.arange(clusters))
        self.share /= self.share.sum()

    def draw(self, n: int, seed: int) -> np.ndarray:
        """Rows (n, DIM), always the same for a seed."""
        rng = np.random.default_rng(seed)
        residual = rng.standard_normal((n, DIM), np.float32) @ self.turn
        centre = self.centres[rng.choice(len(self.centres), n, p=self.share)]
        x = 0.5**0.5 * self.mean + 0.3**0.5 * centre + 0.2**0.5 * residual
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def draw_rows(folder: Path, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (BLOCK, DIM) float16) of all rows; behind the last, queries.npy (QUERIES, DIM)
    float32 and true.npy (QUERIES, K), the truly nearest, are written.
    """
    model = RowModel(rows)
    queries = model.draw(QUERIES, 1)
    np.save(folder / "queries.npy", queries)
    best = np.full((QUERIES, K), -np.inf, np.float32)
    nearest = np.zeros((QUERIES, K), np.int64)
    for start in range(0, rows, BLOCK):
        block = model.draw(min(BLOCK, rows - start), 2 + start // BLOCK)
        block = block.astype(np.float16)
        yield start, block
        similarity = np.concatenate([best, queries @ block.astype(np.float32).T], 1)
        numbers = np.tile(np.arange(start, start + len(block)), (QUERIES, 1))
        numbers = np.concatenate([nearest, numbers], 1)
        top = np.argpartition(-similarity, K, axis=1)[:, :K]
        best = np.take_along_axis(similarity, top, 1)
        nearest = np.take_along_axis(numbers, top, 1)
    np.save(folder / "true.npy", nearest)


def write_rows(folder: Path, rows: int) -> None:
    """rows.npy (rows, DIM) float16, and what `draw_rows` leaves, of what is in rows.npy."""
    if (folder / "true.npy").exists():
        return
    out = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, DIM))
    for start, block in draw_rows(folder, rows):
        out[start : start + len(block)] = block
    out.flush()
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    last = np.einsum("qd,qkd->qk", queries, out[true].astype(np.float32)).min(1)
    cosines = out[:200].astype(np.float32) @ out[-200:].astype(np.float32).T
    print(
        f"{rows:,} rows; cosine of two rows {float(cosines.mean()):.2f}, of a query with its"
        f" {K}th nearest {float(last.mean()):.2f}",
        flush=True,
    )


# --------------------------------------------------------------------------------------- one index
def list_factories(rows: int) -> tuple[dict[str, str], int]:
    """What src.search builds for so many rows, by kind, and in how many rounds OPQ learns its
    rotation there.
    """
    from src.search import OPQ_ITERATIONS, list_index_plans

    return {plan.kind: plan.factory for plan in list_index_plans(rows, DIM, 1e9)}, OPQ_ITERATIONS


def build_index(folder: Path, kind: str, factory: str, rounds: int) -> dict[str, float]:
    """Make one index; seconds of CPU for training and for adding, bytes on disk."""
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    start_time = time.process_time()
    if kind.startswith("Qdrant"):
        blocks = [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]
        with open_qdrant(folder, kind) as index:
            index.fill((block, None) for block in blocks)
        files = [file for file in (folder / kind).rglob("*") if file.is_file()]
        size = sum(file.stat().st_blocks * 512 for file in files)
        return {"train": 0.0, "add": time.process_time() - start_time, "disk": size}
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if "OPQ" in factory:
            faiss.downcast_VectorTransform(index.chain.at(0)).niter = rounds
        sample = 20_000
        if "IVF" in factory:
            sample = max(64 * faiss.extract_index_ivf(index).nlist, sample)
        sample = min(len(rows), sample)
        chosen = np.random.default_rng(0).choice(len(rows), sample, replace=False)
        chosen.sort()
        index.train(rows[chosen].astype(np.float32))
    trained = time.process_time()
    for start in range(0, len(rows), BLOCK):
        index.add(rows[start : start + BLOCK].astype(np.float32))
    added = time.process_time()
    faiss.write_index(index, str(folder / f"{kind}.index"))
    return {
        "train": trained - start_time,
        "add": added - trained,
        "disk": (folder / f"{kind}.index").stat().st_size,
    }


def open_qdrant(folder: Path, kind: str) -> Any:
    """The engine in this process, opened or made."""
    from src.search import QdrantIndex

    return QdrantIndex(folder, kind, kind.partition(" ")[2] or "none")


def read_resident_memory(process: int | str = "self") -> tuple[int, int]:
    """Bytes of a process in memory: its own, and pages of files that could be dropped; 0 where it
    has ended.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    anonymous, files = status.get("RssAnon", "0 kB"), status.get("RssFile", "0 kB")
    return int(anonymous.split()[0]) * 1024, int(files.split()[0]) * 1024


def drop_cached_pages(folder: Path) -> None:
    """Let the operating system drop its cached pages of all files here, so that the next read is
    from the disk.
    """
    for file in (file for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def list_searches(folder: Path, kind: str, mapped: bool) -> tuple[dict[str, Search], Any]:
    """Searches of an index by name, queries (n, DIM) -> rows (n, K); and what must stay open."""
    if kind.startswith("Qdrant"):
        index = open_qdrant(folder, kind)
        return {"": lambda queries: index.search(queries, K).row}, index
    import faiss

    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0
    index = faiss.read_index(str(folder / f"{kind}.index"), flags)
    if kind != "IVF-PQ":
        return {"": lambda queries: index.search(queries, K)[1]}, index
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    lists = faiss.extract_index_ivf(index).nlist
    searches = {}
    for suffix, factor in (("", 1), (", reranked", RERANKED)):
        for probes in PROBES:
            if probes <= lists:
                name = f"{probes} of {lists}{suffix}"
                searches[name] = make_search(index, rows, probes, factor)
    return searches, index


def make_search(index: Any, rows: np.ndarray, probes: int, factor: int) -> Search:
    """A search of an inverted index.

    Args:
        index: of faiss.
        rows: (rows, DIM) the embeddings, to rerank with.
        probes: number of lists that are looked into.
        factor: times K rows are taken from the index and reranked; 1 for no reranking.
    """
    import faiss

    inverted = faiss.SearchParametersIVF(nprobe=probes)
    parameters = faiss.SearchParametersPreTransform(index_params=inverted)

    def search(queries: np.ndarray) -> np.ndarray:
        _, candidates = index.search(queries, K * factor, params=parameters)
        if factor == 1:
            return candidates
        out = np.full((len(queries), K), -1, np.int64)
        for i, numbers in enumerate(candidates):
            numbers = numbers[numbers >= 0]
            similarity = rows[numbers].astype(np.float32) @ queries[i]
            best = numbers[np.argsort(-similarity, kind="stable")[:K]]
            out[i, : len(best)] = best
        return out

    return search


def measure(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """Memory, latency and recall of one index with the threads that the environment gives."""
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    if kind.startswith("Qdrant"):
        import qdrant_edge  # noqa: F401 - their memory is not the index's

        import src.search  # noqa: F401
    else:
        import faiss  # noqa: F401

    if mapped:
        drop_cached_pages(folder)
    memory, pages = read_resident_memory()
    searches, index = list_searches(folder, kind, mapped)
    index_memory = read_resident_memory()[0] - memory
    lines, rows = [], len(np.load(folder / "rows.npy", mmap_mode="r"))
    for name, search in searches.items():
        times = time_search(folder, search, queries, is_cold=mapped and "reranked" in name)
        recall = compute_recall(search(queries), true)
        lines.append({"probes": name, "memory": index_memory / rows, "recall": recall} | times)
    lines[-1]["pages"] = (read_resident_memory()[1] - pages) / rows
    if hasattr(index, "close"):
        index.close()
    return lines


def compute_recall(rows: np.ndarray, nearest: np.ndarray) -> float:
    """The share of the truly nearest rows (queries, K) that were found."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(rows, nearest, strict=True)]
    return float(np.mean(hits)) / K


def time_search(
    folder: Path, search: Search, queries: np.ndarray, is_cold: bool
) -> dict[str, float | None]:
    """Seconds of one query (median), with files in the cache and (`is_cold`) without, and of each
    query of one batch.
    """
    cold = []
    if is_cold:
        drop_cached_pages(folder)
        for i in range(COLD):
            cold.append(time_query(search, queries[-i - 1 : len(queries) - i]))
    single = [time_query(search, queries[i : i + 1]) for i in range(SINGLE)]
    # of one thread, other programs do not count
    is_alone = os.environ["OMP_NUM_THREADS"] == "1"
    clock = time.process_time if is_alone else time.perf_counter
    start_time = clock()
    search(queries)
    batch = (clock() - start_time) / len(queries)
    return {
        "single": float(np.median(single)),
        "cold": float(np.median(cold)) if cold else None,
        "batch": batch,
    }


def time_query(search: Search, query: np.ndarray) -> float:
    """Seconds of one query."""
    start_time = time.perf_counter()
    search(query)
    return time.perf_counter() - start_time


# --------------------------------------------------------------------------------------- the table
def run_apart(threads: int, *arguments: str) -> Any:
    """Run one piece in a process of its own; its last line is JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(folder: Path, rows: int, kinds: list[str]) -> None:
    """Build and measure everything, as Markdown."""
    write_rows(folder, rows)
    factory, rounds = list_factories(rows)
    print(
        "\n| index | bytes a row on disk | training (s of CPU) | adding a million rows (s of CPU)"
        " |\n|---|---|---|---|"
    )
    for kind in kinds:
        note = folder / f"{kind}.json"
        if not note.exists():
            arguments = [str(folder), kind, factory.get(kind, ""), str(rounds)]
            note.write_text(json.dumps(run_apart(1, "build", *arguments)))
        built = json.loads(note.read_text())
        print(
            f"| {factory.get(kind, kind)} | {built['disk'] / rows:.0f} | {built['train']:.0f} |"
            f" {built['add'] / rows * 1e6:.0f} |",
            flush=True,
        )
    head = ["index", "lists probed", "bytes a row in memory", "file pages in memory", f"recall@{K}"]
    thread_counts = sorted({1, len(os.sched_getaffinity(0))})
    for threads in thread_counts:
        unit = "thread" if threads == 1 else "threads"
        head += [f"one query, {threads} {unit} (ms)", f"each of {QUERIES} (ms)"]
    head.append("one query, cold (ms)")
    print_row(head)
    print("|" + "---|" * len(head))
    for kind in kinds:
        for mapped in (False, True) if kind == "IVF-PQ" else (False,):
            arguments = ["measure", str(folder), kind, str(int(mapped))]
            measured = [run_apart(threads, *arguments) for threads in thread_counts]
            title = f"{kind}, mapped" if mapped else kind
            for lines in zip(*measured, strict=True):
                print_row([title, *format_line(list(lines))])


def format_line(lines: list[dict[str, Any]]) -> list[str]:
    """The cells of one search, from its measurements with each number of threads."""
    first = lines[0]
    cells = [first["probes"], f"{first['memory']:.0f}"]
    cells.append(f"{first['pages']:.0f}" if "pages" in first else "")
    cells.append(f"{first['recall']:.3f}")
    for line in lines:
        cells += [f"{1e3 * line['single']:.2f}", f"{1e3 * line['batch']:.2f}"]
    cells.append(f"{1e3 * first['cold']:.1f}" if first["cold"] else "")
    return cells


def print_row(cells: list[str]) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def run_one(action: str, folder: str, kind: str, *rest: str) -> None:
    """One piece of `run_apart`: build an index, or measure it."""
    if os.environ["OMP_NUM_THREADS"] == "1":  # which Qdrant does not look at
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if action == "build":
        factory, rounds = rest
        print(json.dumps(build_index(Path(folder), kind, factory, int(rounds))))
    else:
        print(json.dumps(measure(Path(folder), kind, rest[0] == "1")))


def main() -> None:
    """Parse the command line, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int, nargs="?", default=20_000)
    folder_help = "kept, with all that is written; by default a temporary one"
    parser.add_argument("--folder", help=folder_help)
    parser.add_argument("--kinds", default=",".join(KINDS), help="by default all: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / str(args.rows)
        folder.mkdir(parents=True, exist_ok=True)
        print_table(folder, args.rows, args.kinds.split(","))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_one(*sys.argv[2:])
    else:
        main()
