"""What an index costs a row, and what it finds: the constants from which docs/large_index.md
computes 100 million to 5.5 billion images.

    python benchmarks/large_index.py                                  # 20,000 rows, two minutes
    python benchmarks/large_index.py 1000000 --folder /big/disk/li    # the table of the page: 5 GB of disk; what is there already is not made again
    python benchmarks/large_index.py 100000 --kinds Flat,IVF-PQ

Rows are random, 768 numbers as of CLIP ViT-L/14, and clustered as its embeddings are: unit(sqrt(.5)
m + sqrt(.3) c + sqrt(.2) e), with one m for all, a centre c for every 100 rows (sizes by Zipf's
law), an e of each row's own. c and e have length one on average, and a spectrum that falls with the
square root of the number of the component, in a random rotation. Two rows have a cosine of .5, two
of a cluster .8. The 982 queries are fresh draws of the same. Each index is built by one thread, and
each search runs in a process of its own.
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

DIM, QUERIES, K, AGAIN, BLOCK, SINGLE, COLD = 768, 982, 16, 10, 10_000, 100, 32
PROBES = (1, 4, 16, 64, 256)
KINDS = ("Flat", "SQfp16", "SQ8", "IVF-PQ", "Qdrant", "Qdrant scalar", "Qdrant product")


# -------------------------------------------------------------------------------------------- rows
class Model:
    """The random rows. `draw` gives (n, DIM) float32 of length one."""

    def __init__(self, rows: int):
        rng = np.random.default_rng(0)
        spread = (1.0 + np.arange(DIM)) ** -0.5
        spread /= np.linalg.norm(spread)
        self.turn = (np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] * spread).T.astype(
            np.float32
        )  # (component, dim)
        self.mean = rng.standard_normal(DIM).astype(np.float32)
        self.mean /= np.linalg.norm(self.mean)
        clusters = max(2, rows // 100)
        self.centres = rng.standard_normal((clusters, DIM), np.float32) @ self.turn
        self.share = 1.0 / (10 + np.arange(clusters))
        self.share /= self.share.sum()

    def draw(self, n: int, seed: int) -> np.ndarray:
        """Rows (n, DIM), always the same for a seed."""
        rng = np.random.default_rng(seed)
        own = rng.standard_normal((n, DIM), np.float32) @ self.turn
        x = (
            0.5**0.5 * self.mean
            + 0.3**0.5 * self.centres[rng.choice(len(self.centres), n, p=self.share)]
            + 0.2**0.5 * own
        )
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def drawn(folder: Path, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (BLOCK, DIM) float16) of all rows; behind the last, queries.npy (QUERIES, DIM)
    float32 and true.npy (QUERIES, K), the truly nearest, are written.
    """
    model = Model(rows)
    queries = model.draw(QUERIES, 1)
    np.save(folder / "queries.npy", queries)
    best, found = np.full((QUERIES, K), -np.inf, np.float32), np.zeros((QUERIES, K), np.int64)
    for start in range(0, rows, BLOCK):
        block = model.draw(min(BLOCK, rows - start), 2 + start // BLOCK).astype(np.float16)
        yield start, block
        similarity = np.concatenate([best, queries @ block.astype(np.float32).T], 1)
        places = np.concatenate(
            [found, np.tile(np.arange(start, start + len(block)), (QUERIES, 1))], 1
        )
        top = np.argpartition(-similarity, K, axis=1)[:, :K]
        best, found = np.take_along_axis(similarity, top, 1), np.take_along_axis(places, top, 1)
    np.save(folder / "true.npy", found)


def make(folder: Path, rows: int) -> None:
    """rows.npy (rows, DIM) float16, and what `drawn` leaves, of what is in rows.npy."""
    if (folder / "true.npy").exists():
        return
    out = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, DIM))
    for start, block in drawn(folder, rows):
        out[start : start + len(block)] = block
    out.flush()
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    last = np.einsum("qd,qkd->qk", queries, out[true].astype(np.float32)).min(1)
    one, two = out[:200].astype(np.float32), out[-200:].astype(np.float32)
    print(
        f"{rows:,} rows; cosine of two rows {float((one @ two.T).mean()):.2f}, of a query with its"
        f" {K}th nearest {float(last.mean()):.2f}",
        flush=True,
    )


# --------------------------------------------------------------------------------------- one index
def factories(rows: int) -> tuple[dict[str, str], int]:
    """What src.search builds for so many rows, by kind, and in how many rounds OPQ learns its
    rotation there.
    """
    from src.search import OPQ_ITERATIONS, list_index_plans

    return {plan.kind: plan.factory for plan in list_index_plans(rows, DIM, 1e9)}, OPQ_ITERATIONS


def build(folder: Path, kind: str, factory: str, rounds: int) -> dict[str, float]:
    """Make one index; seconds of CPU for training and for adding, bytes on disk."""
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    begun = time.process_time()
    if kind.startswith("Qdrant"):
        with qdrant(folder, kind) as index:
            index.fill((rows[i : i + BLOCK], None) for i in range(0, len(rows), BLOCK))
        size = sum(
            file.stat().st_blocks * 512 for file in (folder / kind).rglob("*") if file.is_file()
        )
        return {"train": 0.0, "add": time.process_time() - begun, "disk": size}
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if "OPQ" in factory:
            faiss.downcast_VectorTransform(index.chain.at(0)).niter = rounds
        sample = min(
            len(rows),
            max(64 * faiss.extract_index_ivf(index).nlist, 20_000) if "IVF" in factory else 20_000,
        )
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), sample, replace=False))
        index.train(rows[chosen].astype(np.float32))
    trained = time.process_time()
    for start in range(0, len(rows), BLOCK):
        index.add(rows[start : start + BLOCK].astype(np.float32))
    added = time.process_time()
    faiss.write_index(index, str(folder / f"{kind}.index"))
    return {
        "train": trained - begun,
        "add": added - trained,
        "disk": (folder / f"{kind}.index").stat().st_size,
    }


def qdrant(folder: Path, kind: str) -> Any:
    """The engine in this process, opened or made."""
    from src.search import QdrantIndex

    return QdrantIndex(folder, kind, kind.partition(" ")[2] or "none")


def resident(process: int | str = "self") -> tuple[int, int]:
    """Bytes of a process in memory: its own, and pages of files that could be dropped; 0 where it
    has ended.
    """
    try:
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{process}/status").read_text().splitlines()
            if ":" in line
        )
    except OSError:
        status = {}
    own, files = (
        int(status.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile")
    )
    return own, files


def forget(folder: Path) -> None:
    """Let the operating system drop its cached pages of all files here, so that the next read is
    from the disk.
    """
    for file in (file for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def ways(
    folder: Path, kind: str, mapped: bool
) -> tuple[dict[str, Callable[[np.ndarray], np.ndarray]], Any]:
    """Searches of an index by name, queries (n, DIM) -> rows (n, K); and what must stay open."""
    if kind.startswith("Qdrant"):
        index = qdrant(folder, kind)
        return {"": lambda queries: index.search(queries, K).row}, index
    import faiss

    index = faiss.read_index(
        str(folder / f"{kind}.index"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mapped else 0
    )
    if kind != "IVF-PQ":
        return {"": lambda queries: index.search(queries, K)[1]}, index
    rows = np.load(folder / "rows.npy", mmap_mode="r")

    def probed(probes: int, again: int) -> Callable[[np.ndarray], np.ndarray]:
        def search(queries: np.ndarray) -> np.ndarray:
            found = index.search(
                queries,
                K * again,
                params=faiss.SearchParametersPreTransform(
                    index_params=faiss.SearchParametersIVF(nprobe=probes)
                ),
            )[1]
            if again == 1:
                return found
            out = np.empty((len(queries), K), np.int64)
            for i, near in enumerate(found):
                near = near[near >= 0]
                best = near[
                    np.argsort(-(rows[near].astype(np.float32) @ queries[i]), kind="stable")[:K]
                ]
                out[i] = np.pad(best, (0, K - len(best)), constant_values=-1)
            return out

        return search

    lists = faiss.extract_index_ivf(index).nlist
    return {
        f"{probes} of {lists}{', again' * (again > 1)}": probed(probes, again)
        for again in (1, AGAIN)
        for probes in PROBES
        if probes <= lists
    }, index


def measure(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """Memory, latency and recall of one index with the threads that the environment gives."""
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    if kind.startswith("Qdrant"):
        import qdrant_edge  # noqa: F401 - their memory is not the index's

        import src.search  # noqa: F401
    else:
        import faiss  # noqa: F401

    if mapped:
        forget(folder)
    before = resident()
    searches, opened = ways(folder, kind, mapped)
    own = resident()[0] - before[0]
    found, rows = [], len(np.load(folder / "rows.npy", mmap_mode="r"))
    for name, search in searches.items():
        cold = []
        if mapped and name.endswith("again"):
            forget(folder)
            cold = [_seconds(search, queries[-i - 1 : len(queries) - i]) for i in range(COLD)]
        single = [_seconds(search, queries[i : i + 1]) for i in range(SINGLE)]
        clock = (
            time.process_time if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter
        )  # of one thread, other programs do not count
        begun = clock()
        got = search(queries)
        batch = (clock() - begun) / len(queries)
        recall = float(
            np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(got, true, strict=True)])
        )
        times = {
            "single": float(np.median(single)),
            "cold": float(np.median(cold)) if cold else None,
            "batch": batch,
        }
        found.append({"probes": name, "own": own / rows, "recall": recall} | times)
    found[-1]["pages"] = (resident()[1] - before[1]) / rows
    if hasattr(opened, "close"):
        opened.close()
    return found


def _seconds(search: Callable[[np.ndarray], np.ndarray], query: np.ndarray) -> float:
    begun = time.perf_counter()
    search(query)
    return time.perf_counter() - begun


# --------------------------------------------------------------------------------------- the table
def apart(threads: int, *arguments: str) -> Any:
    """Run one piece in a process of its own; its last line is JSON."""
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(folder: Path, rows: int, kinds: list[str]) -> None:
    """Build and measure everything, as Markdown."""
    make(folder, rows)
    cores, built = len(os.sched_getaffinity(0)), {}
    factory, rounds = factories(rows)
    print(
        "\n| index | bytes a row on disk | training (s of CPU) | adding a million rows (s of CPU)"
        " |\n|---|---|---|---|"
    )
    for kind in kinds:
        note = folder / f"{kind}.json"
        if not note.exists():
            note.write_text(
                json.dumps(apart(1, "build", str(folder), kind, factory.get(kind, ""), str(rounds)))
            )
        built[kind] = json.loads(note.read_text())
        print(
            f"| {factory.get(kind, kind)} | {built[kind]['disk'] / rows:.0f} |"
            f" {built[kind]['train']:.0f} | {built[kind]['add'] / rows * 1e6:.0f} |",
            flush=True,
        )
    head = ["index", "lists probed", "bytes a row in memory", "file pages in memory", f"recall@{K}"]
    for threads in sorted({1, cores}):
        head += [
            f"one query, {threads} thread{'s' * (threads > 1)} (ms)",
            f"each of {QUERIES} (ms)",
        ]
    print("\n| " + " | ".join([*head, "one query, cold (ms)"]) + " |\n|" + "---|" * (len(head) + 1))
    for kind in kinds:
        for mapped in (False, True) if kind == "IVF-PQ" else (False,):
            sides = [
                apart(threads, "measure", str(folder), kind, str(int(mapped)))
                for threads in sorted({1, cores})
            ]
            for lines in zip(*sides, strict=True):
                pages = f"{lines[0]['pages']:.0f}" if "pages" in lines[0] else ""
                cells = [
                    kind + ", mapped" * mapped,
                    lines[0]["probes"],
                    f"{lines[0]['own']:.0f}",
                    pages,
                    f"{lines[0]['recall']:.3f}",
                ]
                for line in lines:
                    cells += [f"{1e3 * line['single']:.2f}", f"{1e3 * line['batch']:.2f}"]
                print(
                    "| "
                    + " | ".join(
                        [*cells, f"{1e3 * lines[0]['cold']:.1f}" if lines[0]["cold"] else ""]
                    )
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        what, place, *rest = sys.argv[2:]
        if os.environ["OMP_NUM_THREADS"] == "1":  # which Qdrant does not look at
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(
            json.dumps(
                build(Path(place), *rest[:2], int(rest[2]))
                if what == "build"
                else measure(Path(place), rest[0], rest[1] == "1")
            )
        )
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("rows", type=int, nargs="?", default=20_000)
        parser.add_argument(
            "--folder", help="kept, with all that was made; by default a temporary one"
        )
        parser.add_argument("--kinds", default=",".join(KINDS), help="by default all: %(default)s")
        told = parser.parse_args()
        with tempfile.TemporaryDirectory() as temporary:
            where = Path(told.folder or temporary) / str(told.rows)
            where.mkdir(parents=True, exist_ok=True)
            table(where, told.rows, told.kinds.split(","))
