"""Notebook 05_search_index's own index on a million and on ten million rows: recall against latency
against memory, and clip-retrieval's backend beside it.

    python benchmarks/million_rows.py                                                # 20,000 rows, two minutes
    python benchmarks/million_rows.py 1000000 --folder DIR                           # Flat, SQfp16, SQ8, IVF-PQ; 9 GB of disk
    python benchmarks/million_rows.py 1000000 --folder DIR --other ENV/bin/python    # ... and clip-retrieval, installed in an environment of its own
    python benchmarks/million_rows.py 10000000 --folder DIR --kinds IVF-PQ --limit 4 # built and searched with 4 GB of memory at most; 16 GB of disk

The rows are those of large_index.py, in seeded parts; what is in DIR is kept and used again. Each
index is built by `src.search.build_index`, and asked by `LocalIndex.search`, in processes of their own.
With `--limit` these are stopped when they have more than so many GB of memory of their own
(RssAnon; pages of mapped files can be dropped by the operating system, and do not count).
clip-retrieval's `KnnService.knn_search` is asked on the very same index, joined by
`src.search.merge_shards`, one query at a time, without its HTTP server, filters and metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from large_index import BLOCK, K, drawn, resident

PART, SINGLE = 100_000, 100
KINDS = "Flat,SQfp16,SQ8,IVF-PQ"


# -------------------------------------------------------------------------------------------- rows
def make(folder: Path, rows: int) -> None:
    """img_emb/ and metadata/ in clip-retrieval's layout, and the queries and their truly nearest
    rows that large_index.drawn leaves.
    """
    import pandas as pd
    from tqdm import tqdm

    if (folder / "true.npy").exists():
        return
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(exist_ok=True)
    waiting: list[np.ndarray] = []
    for start, block in tqdm(
        drawn(folder, rows), desc="drawing rows", total=-(-rows // BLOCK), mininterval=10
    ):
        waiting.append(block)
        stop = start + len(block)
        if stop % PART and stop < rows:
            continue
        part, first = (stop - 1) // PART, stop - sum(map(len, waiting))
        np.save(folder / "img_emb" / f"img_emb_{part:06d}.npy", np.concatenate(waiting))
        urls = pd.DataFrame(
            {"url": [f"http://pictures.example/{row}.jpg" for row in range(first, stop)]}
        )
        urls.to_parquet(folder / "metadata" / f"metadata_{part:06d}.parquet", index=False)
        waiting.clear()


# -------------------------------------------------------------------------------------------- ours
def build(folder: Path, kind: str) -> dict[str, float]:
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
    begun, cpu = time.perf_counter(), time.process_time()
    index.build_index(place, plan, shard_rows=1_000_000)
    shards = [file.stat().st_size for file in (place / "image.index").glob("[0-9]*.index")]
    whole = index.merge_shards(place).stat().st_size if len(shards) == 1 else sum(shards)
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "disk": whole}


def asked(search: Any, queries: np.ndarray, true: np.ndarray, every: int = 1) -> dict[str, float]:
    """Recall, milliseconds of one query (median) and of each in one batch, for search (n, dim) ->
    rows (n, K).
    """
    search(queries[:1])
    single = []
    for i in range(SINGLE):
        begun = time.perf_counter()
        search(queries[i : i + 1])
        single.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    got = search(queries[::every])
    batch = (time.perf_counter() - begun) / len(got)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(got, true[::every], strict=True)]
    return {
        "recall": float(np.mean(hits)) / K,
        "single": 1e3 * float(np.median(single)),
        "batch": 1e3 * batch,
    }


def ours(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """What `LocalIndex` answers: for IVF-PQ with several numbers of lists looked into."""
    from src import search as index
    from src.utils import read_json, write_json

    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    state = read_json(folder / kind / "index.json")
    write_json(folder / kind / "index.json", state | {"index": state["index"] | {"mapped": mapped}})
    before = resident()[0]
    opened = index.LocalIndex(folder / kind)
    lines, chosen = [], opened.probes
    for probes in sorted({4, 8, 16, chosen, 64, 128, 256}) if kind == "IVF-PQ" else [0]:
        opened.probes = probes
        line = {
            "who": "ours",
            "kind": kind + ", on disk" * mapped,
            "probes": probes,
            "chosen": probes == chosen,
        }
        lines.append(
            line
            | asked(lambda q: opened.search(q, K).row, queries, true)
            | {"memory": resident()[0] - before}
        )
    return lines


# ---------------------------------------------------------------------------------- clip-retrieval
def theirs(folder: Path, kind: str, mapped: bool) -> list[dict[str, Any]]:
    """What clip-retrieval's service answers on the same file; runs under its own interpreter."""
    import importlib

    import faiss

    back = importlib.import_module("clip_retrieval.clip_back")
    queries, true = np.load(folder / "queries.npy"), np.load(folder / "true.npy")
    before = resident()[0]
    file = str(folder / kind / "image.index" / "populated.index")
    index = back.load_index(file, mapped)
    told = SimpleNamespace(
        image_index=index,
        text_index=None,
        metadata_is_ordered_by_ivf=False,
        safety_model=None,
        violence_detector=None,
    )
    service = back.KnnService(clip_resources={"it": told})

    def search(some: np.ndarray) -> np.ndarray:
        rows = [
            service.knn_search(query[None], "image", K, told, False, False, False)[1]
            for query in some
        ]
        return np.array(
            [
                np.pad(np.array(found, np.int64), (0, K - len(found)), constant_values=-1)
                for found in rows
            ]
        )

    lines = []
    for probes in (8, 32, 128) if kind == "IVF-PQ" else (0,):
        if probes:
            faiss.extract_index_ivf(index).nprobe = probes
        line = {
            "who": "clip-retrieval",
            "kind": kind + ", on disk" * mapped,
            "probes": probes,
            "chosen": False,
        }
        lines.append(
            line
            | asked(search, queries, true, every=1 if probes else 10)
            | {"memory": resident()[0] - before}
        )
    return lines


# --------------------------------------------------------------------------------- table and chart
def apart(python: str, limit: float, *arguments: str) -> tuple[Any, int]:
    """Run one piece in a process of its own: what its last line says as JSON, and the most memory
    of its own that it had, looked at five times a second.
    """
    most = 0
    with subprocess.Popen(
        [python, __file__, "--one", *arguments], stdout=subprocess.PIPE, text=True
    ) as running:
        while running.poll() is None:
            most = max(most, resident(running.pid)[0])
            if limit and most > limit * 1e9:
                running.kill()
                sys.exit(
                    f"{' '.join(arguments)} took {most / 1e9:.2f} GB of memory, and {limit:g} are"
                    " allowed."
                )
            time.sleep(0.2)
        lines = running.stdout.read().splitlines()  # type: ignore[union-attr]  # a pipe
    if running.returncode:
        sys.exit(f"{' '.join(arguments)} failed: see above.")
    return json.loads(lines[-1]), most


def chart(lines: list[dict[str, Any]], rows: int, path: Path) -> None:
    """Recall against the time of one query and of each in a batch; a marker's area is the memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    for axis, what, title in zip(
        axes,
        ("single", "batch"),
        ("one query at a time", "each of 982 queries at once"),
        strict=True,
    ):
        for (who, marker), kind in (
            (pair, kind) for pair in (("ours", "o"), ("clip-retrieval", "X")) for kind in kinds
        ):
            some = [line for line in lines if line["who"] == who and line["kind"] == kind]
            if not some:
                continue
            x, y, area = [[line[name] for line in some] for name in (what, "recall", "memory")]
            colour = f"C{kinds.index(kind)}"
            axis.plot(x, y, "-" if who == "ours" else ":", color=colour, lw=1)
            axis.scatter(
                x,
                y,
                [25 + 200 * a / 3e9 for a in area],
                color=colour,
                marker=marker,
                alpha=0.8,
                label=f"{kind}, {who} ({area[-1] / 1e9:.2f} GB)",
            )
        axis.set(
            xscale="log",
            xlabel=f"milliseconds, {title}",
            ylabel="recall@16" if axis is axes[0] else "",
        )
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=1.2)
    figure.suptitle(f"{rows:,} rows of 768 numbers; area: memory")
    figure.savefig(path, dpi=110)


def table(folder: Path, rows: int, kinds: list[str], limit: float, other: str) -> None:
    """Build and ask everything; Markdown, and chart.png in the folder."""
    make(folder, rows)
    print(
        "| index | built in (s) | of CPU | most memory (GB) | on disk (GB) |\n|---|---|---|---|---|"
    )
    for kind in kinds:
        note = folder / f"{kind}.json"
        if not note.exists():
            built, most = apart(sys.executable, limit, "build", str(folder), kind)
            note.write_text(json.dumps(built | {"most": most}))
        built = json.loads(note.read_text())
        print(
            f"| {kind} | {built['seconds']:.0f} | {built['cpu']:.0f} | {built['most'] / 1e9:.2f} |"
            f" {built['disk'] / 1e9:.2f} |",
            flush=True,
        )
    print(
        "\n| index | lists looked into | recall@16 | one query (ms) | each of 982 (ms) | memory"
        " (GB) |\n|---|---|---|---|---|---|"
    )
    lines = []
    for kind in kinds:
        for mapped in (False, True) if kind == "IVF-PQ" else (False,):
            for python, who in ((sys.executable, "ours"), (other, "theirs")):
                if not python or (who == "theirs" and rows > 1_000_000):
                    continue
                for line in apart(python, limit, who, str(folder), kind, str(int(mapped)))[0]:
                    lines.append(line)
                    name = f"{line['kind']}, {line['who']}"
                    cells = [
                        name,
                        str(line["probes"] or "") + " (default)" * line["chosen"],
                        f"{line['recall']:.3f}",
                        f"{line['single']:.2f}",
                        f"{line['batch']:.2f}",
                    ]
                    print(
                        "| " + " | ".join([*cells, f"{line['memory'] / 1e9:.2f}"]) + " |",
                        flush=True,
                    )
    chart(lines, rows, folder / "chart.png")
    print(f"\n{folder / 'chart.png'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        what, place, kind, *rest = sys.argv[2:]
        print(
            json.dumps(
                build(Path(place), kind)
                if what == "build"
                else {"ours": ours, "theirs": theirs}[what](Path(place), kind, rest[0] == "1")
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
        parser.add_argument("--kinds", default=KINDS, help="by default all: %(default)s")
        parser.add_argument(
            "--limit",
            type=float,
            default=0,
            help="GB of memory that each process may have; 0 for no limit",
        )
        parser.add_argument(
            "--other",
            default="",
            help="interpreter of an environment in which clip-retrieval is installed",
        )
        told = parser.parse_args()
        with tempfile.TemporaryDirectory() as temporary:
            where = Path(told.folder or temporary) / str(told.rows)
            where.mkdir(parents=True, exist_ok=True)
            os.environ["PYTHONPATH"] = os.pathsep.join(
                [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            )
            table(where, told.rows, told.kinds.split(","), told.limit, told.other)
