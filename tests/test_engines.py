"""Qdrant as the index: the engine itself in this process, and the client of a server in its local
mode, against numpy.
"""

import json
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from servers import serving

from src.search import QdrantIndex, iterate_parts, qdrant, qdrant_engines
from src.search.http_client import RequestLimits
from src.utils import PerceptError

edge = pytest.importorskip(
    "qdrant_edge", reason="qdrant-edge-py is not installed (the extra `search`)"
)
qdrant_client = pytest.importorskip(
    "qdrant_client", reason="qdrant-client is not installed (the extra `search`)"
)
ROWS, DIM = 600, 32


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(rows=ROWS, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dim))
    return unit(centres[rng.integers(0, 20, rows)] + 0.7 * rng.standard_normal((rows, dim))).astype(
        np.float16
    )


def table(rows=ROWS, first=0):
    return pd.DataFrame(
        {
            "image_path": [f"{first + i}.jpg" for i in range(rows)],
            "width": np.arange(rows),
            "similarity": np.linspace(0, 1, rows) / 3,
        }
    )


def parts(x, size=150):
    return [(x[i : i + size], table(len(x[i : i + size]), i)) for i in range(0, len(x), size)]


def exact(x, queries, k, exclude=()):
    """An independent search: all cosines, a stable sort, which keeps the lower row first."""
    similarity = unit(queries.astype(np.float64)) @ unit(x.astype(np.float64)).T
    similarity[:, list(exclude)] = -np.inf
    rows = np.argsort(-np.round(similarity, 9), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, 1), rows


pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")


class Server(BaseHTTPRequestHandler):
    """Qdrant's REST interface in front of a client in local mode, so that requests and answers
    travel as they do to a server.
    """

    def answer(self):
        local, m = self.server.local, qdrant_client.models
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert len(raw) < 32e6, "a server takes no more"
        body, name = (
            json.loads(raw or "{}"),
            self.path.split("/")[2] if self.path.startswith("/collections/") else "",
        )
        match self.command, urlsplit(self.path).path.removeprefix(f"/collections/{name}"):
            case "GET", "/":
                return self.reply(
                    {"title": "qdrant", "version": version("qdrant-client")}, bare=True
                )
            case "GET", "/exists":
                result = {"exists": local.collection_exists(name)}
            case "GET", "":
                result = local.get_collection(name)
            case "PUT", "":
                # which refuses what the interface does not know
                self.server.created = m.CreateCollection(**body)
                result = local.create_collection(name, vectors_config=self.server.created.vectors)
            case "PUT", "/points":
                assert "wait=true" in self.path
                result = local.upsert(name, m.Batch(**body["batch"]))
            case "POST", "/points":
                result = local.retrieve(
                    name,
                    body["ids"],
                    with_payload=body["with_payload"],
                    with_vectors=body["with_vector"],
                )
            case "POST", "/points/count":
                result = local.count(name, exact=body["exact"])
            case "POST", "/points/query/batch":
                result = local.query_batch_points(
                    name, [m.QueryRequest(**query) for query in body["searches"]]
                )
            case _:
                return self.send_error(404)
        self.reply(result)

    do_GET = do_PUT = do_POST = answer

    def reply(self, result, bare=False):
        plain = lambda value: value.model_dump(mode="json")  # noqa: E731
        content = json.dumps(
            result if bare else {"result": result, "status": "ok", "time": 0}, default=plain
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Server) as running:
        running.local = qdrant_client.QdrantClient(":memory:")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(params=["edge", "client", "server"])
def location(request, tmp_path):
    """The engine in a folder; a client in its local mode; the address of a server."""
    if request.param == "server":
        return f"http://127.0.0.1:{request.getfixturevalue('server').server_port}"
    return tmp_path if request.param == "edge" else qdrant_client.QdrantClient(":memory:")


@pytest.fixture
def queries():
    return np.random.default_rng(1).standard_normal((70, DIM)) * 5


def test_finds_what_numpy_finds(location, queries):
    x = embeddings()
    with QdrantIndex(location) as index:
        assert index.fill(parts(x)) == len(index) == ROWS and index.dim == DIM
        for k, exclude in (
            (1, None),
            (10, None),
            (10, [3, 17, -1, *range(200, 400)]),
            (10, np.array([], int)),
        ):
            result = index.search(queries, k, exclude)
            similarity, rows = exact(
                x, queries, k + 1, [e for e in ([] if exclude is None else exclude) if e >= 0]
            )
            np.testing.assert_allclose(result.similarity, similarity[:, :k], atol=1e-3)
            # the engine's half precision may swap two rows whose cosines differ by less
            apart = np.abs(np.diff(similarity, axis=1)).min(1) > 5e-4
            assert apart.mean() > 0.3 and np.array_equal(result.row[apart], rows[apart, :k])
            assert result.row.dtype == np.int64 and result.similarity.dtype == np.float32
            assert exclude is None or not np.isin(result.row, exclude).any()


def test_fewer_rows_than_asked_for(location):
    x = embeddings(5)
    with QdrantIndex(location) as index:
        index.fill(parts(x))
        result = index.search(x[:2], 7, exclude=[4])
        assert (result.row[:, 4:] == -1).all()
        assert np.isneginf(result.similarity[:, 4:]).all()
        assert sorted(result.row[0, :4]) == [0, 1, 2, 3]


def test_of_equal_rows_the_lower_ones_come_first(location):
    x = embeddings(100)
    x[[90, 40, 60, *range(10, 35)]] = x[5]
    with QdrantIndex(location) as index:
        index.fill([(x, None)])
        assert index.search(x[5:6], 4).row.tolist() == [[5, 10, 11, 12]]


def test_an_interrupted_fill_goes_on(location, queries, monkeypatch):
    monkeypatch.setattr(qdrant, "BATCH_ROWS", 100)
    x, sent = embeddings(), []

    def broken():
        yield from parts(x)[:2]
        raise KeyboardInterrupt

    index = QdrantIndex(location)
    with pytest.raises(KeyboardInterrupt):
        index.fill(broken())
    assert len(index) == 300
    if not isinstance(location, qdrant_client.QdrantClient):
        index.close()
        index = QdrantIndex(location)
    add = index._engine.add
    index._engine.add = lambda rows, *rest: (sent.extend(rows), add(rows, *rest))
    assert index.fill(iter(parts(x)), total=ROWS) == len(index) == ROWS
    assert min(sent) == 200
    assert sorted(set(sent)) == list(range(200, ROWS))  # the last batch again, and no row before it
    np.testing.assert_allclose(
        index.search(queries, 5).similarity, exact(x, queries, 5)[0], atol=1e-3
    )
    sent.clear()
    index.fill(parts(x))
    assert min(sent) == ROWS - 100 and len(index) == ROWS
    index.close()


def test_what_was_sent_survives_the_process(tmp_path):
    def copied():  # what a process that is killed here leaves behind
        yield from parts(embeddings())[:3]
        for _ in range(
            20
        ):  # the engine renames files of its log in the background, now and then under the copy
            try:
                return shutil.copytree(tmp_path / "running", tmp_path / "killed")
            except shutil.Error:
                shutil.rmtree(tmp_path / "killed")
        pytest.fail("no copy of the running collection could be made")

    with QdrantIndex(tmp_path / "running") as index:
        index.fill(copied())
    with QdrantIndex(tmp_path / "killed") as index:
        assert len(index) == 450
        index.fill(parts(embeddings()))
        assert len(index) == ROWS and index.search(embeddings()[590:591], 1).row == 590


def test_rows_of_something_else_are_refused(location):
    x = embeddings()
    with QdrantIndex(location) as index:
        index.fill(parts(x)[:2])
        with pytest.raises(PerceptError, match="another embedding at row 0"):
            index.fill(parts(embeddings(seed=3)))
        with pytest.raises(PerceptError, match="another embedding at row 150"):
            index.fill([parts(x)[0], parts(x)[2]])
        with pytest.raises(PerceptError, match="holds 300 rows, but only 150"):
            index.fill(parts(x)[:1])
        with pytest.raises(PerceptError, match="embeddings of 16 numbers and the index 32"):
            index.fill([(x[:, :16], None)])
        assert len(index) == 300


@pytest.mark.parametrize("bad_value", [np.nan, np.inf, 0.0])
def test_bad_embeddings_are_refused_by_row(location, bad_value):
    x = embeddings(200)
    x[130] = bad_value
    with QdrantIndex(location) as index, pytest.raises(PerceptError, match="embedding of row 130"):
        index.fill(parts(x, 50))


def test_parts_that_do_not_fit(location):
    x = embeddings(10)
    with QdrantIndex(location) as index:
        with pytest.raises(PerceptError, match="10 embeddings and 9 lines"):
            index.fill([(x, table(9))])
        with pytest.raises(PerceptError, match=r"must be \(rows, dim\)"):
            index.fill([(x[0], None)])


def test_bad_queries(location, queries):
    with QdrantIndex(location) as index:
        with pytest.raises(PerceptError, match="fill it first"):
            index.search(queries, 3)
        assert len(index) == 0
        index.fill(parts(embeddings(40)))
        with pytest.raises(PerceptError, match="16 numbers and the index 32"):
            index.search(queries[:, :16], 3)
        with pytest.raises(PerceptError, match="NaN"):
            index.search(np.full((1, DIM), np.nan), 3)
        with pytest.raises(PerceptError, match="at least one"):
            index.search(queries, 0)


def test_metadata_comes_back_as_it_went_in(location):
    metadata = table(40).assign(
        url=[f"http://x/{i}" if i % 3 else None for i in range(40)],
        good=[i % 2 == 0 for i in range(40)],
        tags=[[i, "ä"] for i in range(40)],
    )
    metadata["seen"], metadata["score"] = (
        pd.Timestamp("2020-01-02"),
        np.where(np.arange(40) % 4, 0.1 + 0.2, np.nan),
    )
    with QdrantIndex(location) as index:
        index.fill([(embeddings(40), metadata)])
        rows = [39, 0, -1, 7, 0]
        back = index.get_metadata(rows)
        assert len(back) == 5 and back.loc[2].isna().all()
        for line, row in zip(back.drop(2).to_dict("records"), [39, 0, 7, 0], strict=True):
            for name in ("image_path", "width", "similarity", "good", "tags"):
                assert line[name] == metadata[name][row]
            assert (line["url"] == metadata["url"][row]) if row % 3 else pd.isna(line["url"])
            assert (line["score"] == 0.1 + 0.2) if row % 4 else pd.isna(line["score"])
            assert line["seen"].startswith("2020-01-02")
        assert len(index.get_metadata([])) == 0
        with pytest.raises(PerceptError, match="no row 40, as it has 40"):
            index.get_metadata([3, 40])


def test_a_folder_of_embeddings(tmp_path):
    x = embeddings(90)
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    for i, (part, lines) in enumerate(parts(x, 40)):
        np.save(tmp_path / "img_emb" / f"img_emb_{i:04d}.npy", part)
        lines.to_parquet(tmp_path / "metadata" / f"metadata_{i:04d}.parquet")
    with QdrantIndex(tmp_path / "qdrant") as index:
        assert index.fill(iterate_parts(tmp_path)) == 90
        assert index.get_metadata([85]).image_path[0] == "85.jpg"
        assert index.search(x[85:86], 1).row == 85


@pytest.mark.parametrize("quantization", qdrant.QUANTIZATION)
@pytest.mark.parametrize("on_disk", [True, False])
def test_graph_and_codes_find_nearly_all(tmp_path, monkeypatch, quantization, on_disk):
    monkeypatch.setattr(qdrant_engines, "INDEXING_KB", 50)
    x = embeddings(3000, 64)
    queries = x[:100].astype(np.float32) + 0.05 * np.random.default_rng(2).standard_normal(
        (100, 64)
    )
    with QdrantIndex(tmp_path, "quick", quantization, on_disk) as index:
        index.fill(parts(x, 1000))
        assert index._engine.shard.info().indexed_vectors_count == 3000  # a graph there is
        similarity, rows = exact(x, queries, 10)
        result = index.search(queries, 10)
        assert (
            np.mean([len(set(a) & set(b)) / 10 for a, b in zip(result.row, rows, strict=True)])
            > 0.95
        )
        cosines = np.take_along_axis(unit(queries) @ unit(x.astype(float)).T, result.row, 1)
        # cosines of the embeddings, not of codes
        np.testing.assert_allclose(result.similarity, cosines, atol=1e-3)
        index.exact = True
        np.testing.assert_allclose(index.search(queries, 10).similarity, similarity, atol=1e-3)
        result = index.search(queries, 10, exclude=rows[:, 0])
        assert not np.isin(result.row, rows[:, 0]).any()


def test_names_hold_indices_apart(location):
    first, second = QdrantIndex(location, "one"), QdrantIndex(location, "two")
    first.fill([(embeddings(20), None)])
    second.fill([(embeddings(30, 16), None)])
    assert (len(first), first.dim, len(second), second.dim) == (20, 32, 30, 16)
    first.close()
    second.close()


def test_what_cannot_be_opened(tmp_path):
    with QdrantIndex(tmp_path) as index:
        index.fill([(embeddings(20), None)])
        with pytest.raises(PerceptError, match="close"):
            QdrantIndex(tmp_path)
    with pytest.raises(PerceptError, match="choose one of none, scalar, product"):
        QdrantIndex(tmp_path, quantization="8 bit")
    with (
        QdrantIndex(tmp_path, "more", shards=4) as index,
        pytest.raises(PerceptError, match="address of a Qdrant server"),
    ):
        index.fill([(embeddings(20), None)])
    client = qdrant_client.QdrantClient(":memory:")
    client.create_collection("dots", qdrant_client.models.VectorParams(size=4, distance="Dot"))
    with pytest.raises(PerceptError, match="compared by cosine"):
        QdrantIndex(client, "dots")


def test_what_a_server_is_told_of_a_new_index(server):
    with QdrantIndex(
        f"http://127.0.0.1:{server.server_port}", quantization="product", shards=12
    ) as index:
        index.fill([(embeddings(20), None)])
    config = server.created.model_dump(mode="json", exclude_none=True)
    assert config["shard_number"] == 12
    assert config["on_disk_payload"]
    assert config["hnsw_config"]["on_disk"]
    assert config["vectors"] == {
        "size": 32,
        "distance": "Cosine",
        "on_disk": True,
        "datatype": "float16",
    }
    assert config["quantization_config"] == {"product": {"compression": "x32", "always_ram": True}}


@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_is_not_there():
    with pytest.raises(PerceptError, match="look whether the server runs"):
        QdrantIndex("http://127.0.0.1:9")


class OddServer(BaseHTTPRequestHandler):
    """Answers every request with `content`, at once or a byte at a time, without end."""

    content = b""
    drips = False

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        try:
            self.wfile.write(self.content)
            while self.drips:
                self.wfile.write(b" ")
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("content", "drips", "reason"),
    [
        (b"", False, ""),
        (b"[1]", False, ""),
        (b'{"result": null}', False, ""),
        (b'{"result": {"exists": "perhaps"}}', False, ""),
        (b"\xff\xfe{", False, ""),
        (b'{"result": 1' + b"0" * 5000 + b"}", False, ""),
        (b" " * 200_000, False, "more than 0.1 MB"),
        (b'{"result": ', True, "took longer than 0.5 s"),
    ],
)
def test_odd_answers_of_a_server_are_one_sentence(monkeypatch, content, drips, reason):
    limits = RequestLimits(0.5, 1e5, allow_private=True)
    monkeypatch.setattr(qdrant_engines, "LIMITS", limits)
    with (
        serving(OddServer, content=content, drips=drips) as server,
        pytest.raises(PerceptError, match=f"does not answer as it should .*{reason}") as error,
    ):
        QdrantIndex(f"http://127.0.0.1:{server.server_address[1]}")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_points_that_are_no_rows_are_refused():
    client = qdrant_client.QdrantClient(":memory:")
    params = qdrant_client.models.VectorParams(size=4, distance="Cosine")
    client.create_collection("named", params)
    name = "5f9a1c3e-0000-4000-8000-000000000000"
    client.upsert("named", [qdrant_client.models.PointStruct(id=name, vector=[1, 0, 0, 0])])
    index = QdrantIndex(client, "named")
    with pytest.raises(PerceptError, match=f"has a point {name}, which is no number"):
        index.search(np.ones((1, 4)), 1)


def test_odd_metadata_becomes_plain_json():
    table = pd.DataFrame({"n": [2**70, 1], "f": [np.inf, 0.5], "t": ["\ud800", "x"]}, dtype=object)
    lines = qdrant._to_payloads(table)
    assert lines == [{"n": str(2**70), "f": None, "t": "?"}, {"n": 1, "f": 0.5, "t": "x"}]


@pytest.mark.parametrize(
    ("package", "location"), [("qdrant_edge", "folder"), ("qdrant_client", "http://127.0.0.1:9")]
)
def test_a_missing_package_is_one_sentence(monkeypatch, package, location):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PerceptError, match=f"needs the package {package}.*--extra search"):
        QdrantIndex(location)
