"""Notebook 05_search_index's own index on a million and on ten million rows: recall against latency
against memory, and clip-retrieval's backend beside it.

    python benchmarks/million_rows.py                               # 20,000 rows, two minutes
    python benchmarks/million_rows.py 1000000 --folder DIR          # four indexes; 9 GB of disk
    python benchmarks/million_rows.py 1000000 --folder DIR --other ENV/bin/python
    python benchmarks/million_rows.py 10000000 --folder DIR --kinds IVF-PQ --limit 4

- The rows are those of large_index.py, in seeded parts; what is in DIR is used again. Each index is
  built by `src.search.build_index`, and searched by `LocalIndex.search`, in separate processes.
- With `--limit` these are stopped when they have more than so many GB of memory of their own
  (RssAnon; pages of mapped files can be dropped by the operating system, and do not count). Ten
  million rows take 16 GB of disk.
- With `--other`, clip-retrieval's `KnnService.knn_search` is asked on the very same index, joined
  by `src.search.merge_shards`, one query at a time, without its HTTP server, filters and metadata.
  ENV is an environment in which clip-retrieval is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from large_index import BLOCK, K, compute_recall, draw_rows, print_row, read_resident_memory

PART = 100_000  # rows of a file of embeddings

SINGLE = 100  # queries that are timed one by one

OUR_NAME, OTHER_NAME = "ours", "clip-retrieval"

KINDS = "Flat,SQfp16,SQ8,IVF-PQ"


# -------------------------------------------------------------------------------------------- rows
def write_rows(folder: Path, rows: int) -> None:
    """img_emb/ and metadata/ in clip-retrieval's layout, and the queries and their truly nearest
    rows that large_index.draw_rows leaves.
    """
    import pandas as pd
    from tqdm import tqdm

    if (folder / "true.npy").exists():
        return
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(exist_ok=True)
    waiting: list[np.ndarray] = []
    blocks = draw_rows(folder, rows)
    for start, block in tqdm(blocks, "drawing rows", -(-rows // BLOCK), mininterval=10):
        waiting.append(block)
        stop = start + len(block)
        if stop % PART and stop < rows:
            continue
        part, first = (stop - 1) // PART, stop - sum(map(len, waiting))
        np.save(folder / "img_emb" / f"img_emb_{part:06d}.npy", np.concatenate(waiting))
        urls = [f"http://pictures.example/{row}.jpg" for row in range(first, stop)]
        table = pd.DataFrame({"url": urls})
        table.to_parquet(folder / "metadata" / f"metadata_{part:06d}.parquet", index=False)
        waiting.clear()


# -------------------------------------------------------------------------------------------- ours
def build_index(folder: Path, kind: str) -> dict[str, float]:
    """The index of a kind in a folder of its own, with links to the embeddings; seconds, and bytes
    of its files.
    """
    from src import search as index

    place = folder / kind
    place.mkdir(exist_ok=True)
    for name in ("img_emb", "metadata"):
        if not (place / name).exists():
            (place / name).symlink_to(f"../{name}")
    stored = index.Embeddings(place)
    plan, _ = index.choose_index(len(stored), stored.dim, 1e3, kind)
    start_time, start_cpu = time.perf_counter(), time.process_time()
    index.build_index(place, plan, shard_rows=1_000_000)
    shards = [file.stat().st_size for file in (place / "image.index").glob("[0-9]*.index")]
    size = sum(shards)
    if len(shards) == 1:
        size = index.merge_shards(place).stat().st_size
    seconds, cpu = time.perf_counter() - start_time, time.process_time() - start_cpu
    return {"seconds": seconds, "cpu": cpu, "disk": size}


def measure_search(
    search: Callable[[np.ndarray], np.ndarray],
    queries: np.ndarray,
    nearest: np.ndarray,
    every: int = 1,
) -> dict[str, float]:
    """Recall, milliseconds of one query (median) and of each in one batch.

    Args:
        search: queries (n, dim) -> rows (n, K).
        queries: (queries, dim).
        nearest: (queries, K) the truly nearest rows.
        every: how many queries there are for each one of the batch.
    """
    search(queries[:1])
    single = []
    for i in range(SINGLE):
        start_time = time.perf_counter()
        search(queries[i : i + 1])
        single.append(time.perf_counter() - start_time)
    start_time = time.perf_counter()
    rows = search(queries[::every])
    batch = (time.perf_counter() - start_time) / len(rows)
    return {
        "recall": compute_recall(rows, nearest[::every]),
        "single": 1e3 * float(np.median(single)),
        "batch": 1e3 * batch,
    }


def search_locally(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """What `LocalIndex` answers: for IVF-PQ with several numbers of lists looked into."""
    from src import search as index
    from src.utils import read_json, write_json

    queries, nearest = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    state = read_json(folder / kind / "index.json")
    state["index"] |= {"mapped": mapped}
    write_json(folder / kind / "index.json", state)
    memory = read_resident_memory()[0]
    opened = index.LocalIndex(folder / kind)
    default = opened.probes
    numbers = [0]
    if kind == "IVF-PQ":
        numbers = sorted({4, 8, 16, default, 64, 128, 256})
    lines = []
    for probes in numbers:
        opened.probes = probes
        line = describe_case(OUR_NAME, kind, mapped, probes) | {"chosen": probes == default}
        line |= measure_search(lambda q: opened.search(q, K).row, queries, nearest)
        lines.append(line | {"memory": read_resident_memory()[0] - memory})
    return lines


def describe_case(who: str, kind: str, mapped: bool, probes: int) -> dict[str, Any]:
    """What is measured: by whom, on which index, looking into how many lists."""
    title = f"{kind}, on disk" if mapped else kind
    return {"who": who, "kind": title, "probes": probes, "chosen": False}


# ---------------------------------------------------------------------------------- clip-retrieval
def search_with_clip_retrieval(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """What clip-retrieval's service answers on the same file; runs under its own interpreter."""
    import importlib

    import faiss

    clip_back = importlib.import_module("clip_retrieval.clip_back")
    queries, nearest = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    memory = read_resident_memory()[0]
    file = str(folder / kind / "image.index" / "populated.index")
    index = clip_back.load_index(file, mapped)
    resource = SimpleNamespace(
        image_index=index,
        text_index=None,
        metadata_is_ordered_by_ivf=False,
        safety_model=None,
        violence_detector=None,
    )
    service = clip_back.KnnService(clip_resources={"it": resource})

    def search(queries: np.ndarray) -> np.ndarray:
        out = np.full((len(queries), K), -1, np.int64)
        for i, query in enumerate(queries):
            options = ("image", K, resource, False, False, False)
            _, rows, *_ = service.knn_search(query[None], *options)
            out[i, : len(rows)] = rows
        return out

    lines = []
    for probes in (8, 32, 128) if kind == "IVF-PQ" else (0,):
        if probes:
            faiss.extract_index_ivf(index).nprobe = probes
        line = describe_case(OTHER_NAME, kind, mapped, probes)
        line |= measure_search(search, queries, nearest, every=1 if probes else 10)
        lines.append(line | {"memory": read_resident_memory()[0] - memory})
    return lines


# --------------------------------------------------------------------------------- table and chart
def run_apart(python: str, limit: float, *arguments: str) -> tuple[Any, int]:
    """Run one piece in a process of its own: what its last line says as JSON, and the highest
    memory of its own that it had, looked at five times a second.
    """
    peak = 0
    command = [python, __file__, "--one", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, read_resident_memory(process.pid)[0])
            if limit and peak > limit * 1e9:
                process.kill()
                sys.exit(
                    f"{' '.join(arguments)} took {peak / 1e9:.2f} GB of memory, and {limit:g} are"
                    " allowed."
                )
            time.sleep(0.2)
        lines = process.stdout.read().splitlines()  # type: ignore[union-attr]  # a pipe
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed: see above.")
    return json.loads(lines[-1]), peak


def draw_chart(lines: list[dict[str, Any]], rows: int, path: Path) -> None:
    """Recall against the time of one query and of each in a batch; areas of markers are memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    titles = {"single": "one query at a time", "batch": "each of 982 queries at once"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        draw_curves(axis, lines, column)
        axis.set(xscale="log", xlabel=f"milliseconds, {title}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("recall@16")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=1.2)
    figure.suptitle(f"{rows:,} rows of 768 numbers; area: memory")
    figure.savefig(path, dpi=110)


def draw_curves(axis: Any, lines: list[dict[str, Any]], column: str) -> None:
    """One curve for each index and who searched it: recall against a column of milliseconds."""
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    for who, marker, style in ((OUR_NAME, "o", "-"), (OTHER_NAME, "X", ":")):
        for number, kind in enumerate(kinds):
            curve = [line for line in lines if line["who"] == who and line["kind"] == kind]
            if not curve:
                continue
            x, y = [line[column] for line in curve], [line["recall"] for line in curve]
            areas = [25 + 200 * line["memory"] / 3e9 for line in curve]
            label = f"{kind}, {who} ({curve[-1]['memory'] / 1e9:.2f} GB)"
            colour = f"C{number}"
            axis.plot(x, y, style, color=colour, lw=1)
            axis.scatter(x, y, areas, color=colour, marker=marker, alpha=0.8, label=label)


def print_builds(folder: Path, kinds: list[str], limit: float) -> None:
    """Build what is not built yet; Markdown of what that took."""
    print_row(["index", "built in (s)", "of CPU", "highest memory (GB)", "on disk (GB)"])
    print("|---|---|---|---|---|")
    for kind in kinds:
        note = folder / f"{kind}.json"
        if not note.exists():
            built, peak = run_apart(sys.executable, limit, "build", str(folder), kind)
            note.write_text(json.dumps(built | {"most": peak}))
        built = json.loads(note.read_text())
        memory, size = f"{built['most'] / 1e9:.2f}", f"{built['disk'] / 1e9:.2f}"
        print_row([kind, f"{built['seconds']:.0f}", f"{built['cpu']:.0f}", memory, size])


def print_tables(folder: Path, rows: int, kinds: list[str], limit: float, other: str) -> None:
    """Build and ask everything; Markdown, and chart.png in the folder."""
    write_rows(folder, rows)
    print_builds(folder, kinds, limit)
    head = ["index", "lists looked into", "recall@16", "one query (ms)", "each of 982 (ms)"]
    print()
    print_row([*head, "memory (GB)"])
    print("|---|---|---|---|---|---|")
    programs = {"ours": sys.executable}
    if other and rows <= 1_000_000:
        programs["other"] = other
    lines = []
    for kind in kinds:
        for mapped in (False, True) if kind == "IVF-PQ" else (False,):
            for action, python in programs.items():
                arguments = [action, str(folder), kind, str(int(mapped))]
                measured, _ = run_apart(python, limit, *arguments)
                lines += measured
                for line in measured:
                    print_row(format_line(line))
    draw_chart(lines, rows, folder / "chart.png")
    print(f"\n{folder / 'chart.png'}")


def format_line(line: dict[str, Any]) -> list[str]:
    """The cells of one measurement."""
    probes = str(line["probes"] or "")
    if line["chosen"]:
        probes += " (default)"
    numbers = [f"{line['recall']:.3f}", f"{line['single']:.2f}", f"{line['batch']:.2f}"]
    return [f"{line['kind']}, {line['who']}", probes, *numbers, f"{line['memory'] / 1e9:.2f}"]


def run_one(action: str, folder: str, kind: str, mapped: str = "0") -> None:
    """One piece of `run_apart`: build an index, or search it."""
    if action == "build":
        print(json.dumps(build_index(Path(folder), kind)))
        return
    search = search_locally if action == "ours" else search_with_clip_retrieval
    print(json.dumps(search(Path(folder), kind, mapped == "1")))


def main() -> None:
    """Parse the command line, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int, nargs="?", default=20_000)
    folder_help = "kept, with all that is written; by default a temporary one"
    parser.add_argument("--folder", help=folder_help)
    parser.add_argument("--kinds", default=KINDS, help="by default all: %(default)s")
    limit_help = "GB of memory that each process may have; 0 for no limit"
    parser.add_argument("--limit", type=float, default=0, help=limit_help)
    other_help = "interpreter of an environment in which clip-retrieval is installed"
    parser.add_argument("--other", default="", help=other_help)
    args = parser.parse_args()
    repository = str(Path(__file__).parents[1])
    search_path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([repository, search_path])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / str(args.rows)
        folder.mkdir(parents=True, exist_ok=True)
        print_tables(folder, args.rows, args.kinds.split(","), args.limit, args.other)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_one(*sys.argv[2:])
    else:
        main()
