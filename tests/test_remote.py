"""A clip-retrieval server and hosts of pictures, played on this machine: what is asked, what comes
back, and that nothing hangs or reaches inside.
"""

import base64
import io
import json
import socket
import ssl
import threading
import time
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from servers import serving

from src.search import (
    PUBLISHED_OPTIONS,
    FetchOptions,
    ImageCache,
    RemoteIndex,
    RequestOptions,
    decode_sent_images,
    fetch_images,
    fetching,
    http_client,
    is_public,
    select_available_images,
)
from src.utils import PerceptError

DIM, ROWS = 8, 60
PUBLISHED = {"options": PUBLISHED_OPTIONS, "on_failure": "published"}


def rows_of(seed=0):
    rows = np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


# ------------------------------------------------------------------------------------- the service
class Service(Quiet):
    """Answers as clip-retrieval does; `fault(number, fields)` gives another answer (status, body)
    to a request, or None; `change` edits the lines.
    """

    state: dict

    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state["lock"]:
            self.state["requests"].append(fields)
            number = len(self.state["requests"]) - 1
        if (fault := self.state.get("fault")) and (answer := fault(number, fields)):
            return self.send(answer[0], answer[1], Content_Type="text/html")
        scores = rows_of() @ np.array(fields["embedding_input"], np.float32)
        order = np.argsort(-scores, kind="stable")[: fields["num_images"]]
        lines = [
            {
                "id": int(i),
                "similarity": float(scores[i]),
                "url": f"http://pictures.test/{i}.jpg",
                "caption": f"picture {i}",
            }
            for i in order
        ]
        self.send(
            200,
            json.dumps(self.state.get("change", list)(lines)).encode(),
            Content_Type="application/json",
        )


@pytest.fixture
def service():
    """(url, state) of a server of `ROWS` rows."""
    state = {"requests": [], "lock": threading.Lock()}
    with serving(Service, state=state) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/knn-service", state


@pytest.fixture
def nobody():
    """A url where nothing listens."""
    with closing(socket.socket()) as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/knn-service"


def index_of(url, name="mine", **options):
    return RemoteIndex(url, name, **{"timeout": 30.0} | options)


def queries_of(n=5, seed=3):
    return 7 * np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def exact(queries, k, exclude=()):
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ rows_of().T
    scores[:, list(exclude)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def test_search_is_that_of_the_server(service):
    url, state = service
    queries = queries_of(9)
    result = index_of(url, dim=DIM).search(queries, 4)
    similarity, row = exact(queries, 4)
    assert result.row.dtype == np.int64 and result.similarity.dtype == np.float32
    np.testing.assert_array_equal(result.row, row)
    np.testing.assert_allclose(result.similarity, similarity, atol=1e-5)
    assert len(state["requests"]) == 9  # one request a query
    assert all(
        len(fields["embedding_input"]) == DIM and fields["num_images"] > 4
        for fields in state["requests"]
    )


def test_every_field_is_sent(service):
    url, state = service
    index_of(url).search(queries_of(1), 2)
    assert {**state["requests"][0], "embedding_input": 0} == {
        "text": None,
        "image": None,
        "image_url": None,
        "embedding_input": 0,
        "deduplicate": True,
        "use_safety_model": True,
        "use_violence_detector": True,
        "indice_name": "mine",
        "use_mclip": False,
        "aesthetic_score": "",
        "aesthetic_weight": "",
        "modality": "image",
        "num_images": 8,
        "num_result_ids": 8,
    }
    np.testing.assert_allclose(
        np.linalg.norm(state["requests"][0]["embedding_input"]), 1, atol=1e-6
    )
    index_of(url, "laion5B-L-14", options=PUBLISHED_OPTIONS).search(queries_of(1), 2)
    sent = state["requests"][1]
    assert (sent["num_images"], sent["num_result_ids"], sent["indice_name"]) == (
        300,
        300,
        "laion5B-L-14",
    )
    assert (
        sent["use_safety_model"],
        sent["use_violence_detector"],
        sent["aesthetic_score"],
        sent["aesthetic_weight"],
    ) == (False, False, 9, 0.5)


def test_excluded_rows_and_doubles_never_come_back(service):
    url, state = service
    queries = queries_of(3)
    excluded = np.unique(exact(queries, 30)[1])  # so many that the first answer has too few others
    state["change"] = lambda lines: [line for line in lines for _ in range(2)]
    result = index_of(url).search(queries, 5, exclude=excluded)
    left = ROWS - len(excluded)
    similarity, row = exact(queries, min(5, left), excluded)
    np.testing.assert_array_equal(result.row[:, : row.shape[1]], row)
    assert len(state["requests"]) > 3 and not np.isin(result.row, excluded).any()
    for line in result.row:
        assert len(set(line[line >= 0])) == min(5, left) == (line >= 0).sum()


def test_fewer_rows_than_asked_for_and_equal_similarities(service):
    url, state = service
    state["change"] = lambda lines: [line | {"similarity": 0.5} for line in lines[:3]]
    result = index_of(url).search(queries_of(2), 5)
    for row, similarity in zip(result.row, result.similarity, strict=True):
        assert list(row[:3]) == sorted(row[:3]) and list(row[3:]) == [-1, -1]
        assert list(similarity) == [0.5] * 3 + [-np.inf] * 2


def test_metadata_is_what_the_answers_said(service):
    url, _ = service
    index = index_of(url)
    result = index.search(queries_of(2), 3)
    metadata = index.get_metadata([result.row[1, 2], -1, result.row[0, 0]])
    assert list(metadata.columns) == ["url", "caption"] and len(metadata) == 3
    assert metadata["caption"][0] == f"picture {result.row[1, 2]}"
    assert metadata["url"][2] == f"http://pictures.test/{result.row[0, 0]}.jpg"
    assert metadata.loc[1].isna().all()
    unseen = next(row for row in range(ROWS) if row not in result.row)
    with pytest.raises(PerceptError, match=f"row {unseen} of mine"):
        index.get_metadata([unseen])
    assert len(index.get_metadata([])) == 0 and len(index.get_metadata([-1, -1])) == 2
    assert index.count is None


def test_bad_queries_are_refused_before_anything_is_asked(service):
    url, state = service
    index = index_of(url, dim=DIM)
    for queries, k in (
        (np.ones((1, DIM + 1)), 1),
        (np.full((1, DIM), np.nan), 1),
        (np.ones((1, DIM)), 0),
    ):
        with pytest.raises(PerceptError):
            index.search(queries, k)
    with pytest.raises(PerceptError, match="on_failure"):
        index_of(url, on_failure="hope")
    with pytest.raises(PerceptError, match="modality"):
        RequestOptions(modality="sound")
    assert index.search(np.empty((0, DIM)), 3).row.shape == (0, 3) and not state["requests"]


def test_a_service_that_is_down_is_one_sentence_at_once(nobody, monkeypatch):
    tries, connect = [], http_client.open_connection
    monkeypatch.setattr(
        http_client, "open_connection", lambda *args: (tries.append(args), connect(*args))[1]
    )
    for options in ({}, PUBLISHED | {"wait": 0.0}):
        with pytest.raises(PerceptError, match="refused the connection") as error:
            RemoteIndex(nobody, "mine", **options).search(queries_of(982), 4)
        assert nobody in str(error.value)
        assert "05_search_index" in str(error.value)
        assert "December 2023" in str(error.value)
        assert "\n" not in str(error.value)
    assert len(tries) == 1 + 2


@pytest.mark.parametrize(
    "answer, message",
    [
        ((500, b"{}"), "HTTP 500"),
        ((200, b"<html>maintenance</html>"), "JSON"),
        ((200, b'{"message": "no"}'), "list of rows"),
        ((200, b'[{"id": 1}]'), "list of rows"),
        ((200, b'[{"id": 1, "similarity": NaN}]'), "list of rows"),
        ((200, b'[{"id": 1, "similarity": 1' + b"0" * 400 + b"}]"), "list of rows"),
        ((200, b'[{"id": 1, "similarity": 1' + b"0" * 5000 + b"}]"), "JSON"),
        ((200, b'[{"id": 1, "similarity": 1e300}]'), "which is no cosine"),
        ((200, b'[{"id": 9223372036854775808, "similarity": 0.5}]'), "list of rows"),
        ((200, b'[{"id": true, "similarity": 0.5}]'), "list of rows"),
        ((200, b'[{"id": 1, "similarity": 0.5, "caption": "caf\xe9"}]'), "JSON"),
        ((200, b"[" * 100_000), "JSON"),
        ((301, b""), "HTTP 301"),
    ],
)
def test_what_is_no_answer_stops_at_the_first_query(service, answer, message):
    url, state = service
    state["fault"] = lambda number, fields: answer
    with pytest.raises(PerceptError, match=message) as error:
        index_of(url).search(queries_of(50), 4)
    assert len(state["requests"]) == 1 and url in str(error.value)


def test_distances_of_a_service_are_not_ranked_as_cosines(service):
    url, state = service
    state["change"] = lambda lines: [
        line | {"similarity": 2 - 2 * line["similarity"]} for line in lines[:3]
    ]
    with pytest.raises(PerceptError, match="smallest similarities first|no cosine"):
        index_of(url).search(queries_of(2), 3)


def test_odd_metadata_of_an_answer_can_be_kept(service, tmp_path):
    url, state = service
    odd = [{"url": 5}, {"url": "\ud800"}, {"url": 2**70, "similar": [1], "tar": "/etc/passwd"}]
    state["change"] = lambda lines: [line | odd[i % 3] for i, line in enumerate(lines)]
    index = index_of(url)
    result = index.search(queries_of(2), 6)
    metadata = index.get_metadata(result.row.ravel())
    metadata.to_parquet(tmp_path / "x.parquet")
    assert set(metadata["url"]) == {"5", "\\ud800", str(2**70)}
    assert list(metadata.columns) == ["url", "caption"]


def test_a_failure_later_stops_the_rest(service):
    url, state = service
    state["fault"] = lambda number, fields: (502, b"") if number == 4 else None
    with pytest.raises(PerceptError, match="HTTP 502"):
        index_of(url, workers=2).search(queries_of(400), 4)
    assert len(state["requests"]) < 390


@pytest.mark.parametrize("silent", [True, False])
def test_a_service_that_is_too_slow_is_cut_off(silent):
    """Silent, and one that sends a byte now and then, so that a time-out of the socket begins anew
    each time.
    """
    with raw(b"" if silent else b"HTTP/1.1 200 OK\r\nX-Slow: ", b"" if silent else b"a") as port:
        begin = time.monotonic()
        with pytest.raises(PerceptError, match=r"took longer than 0\.3 s"):
            RemoteIndex(f"http://127.0.0.1:{port}/", "mine", timeout=0.3).search(queries_of(20), 4)
        assert time.monotonic() - begin < 5


def test_published_fallback_asks_again_with_aesthetics(service):
    url, state = service
    queries = queries_of(4)
    bad = queries[2] / np.linalg.norm(queries[2])
    state["fault"] = lambda number, fields: (
        (500, b"")
        if np.allclose(fields["embedding_input"], bad) and fields["aesthetic_score"] != 5
        else None
    )
    index = index_of(url, **PUBLISHED | {"wait": 0.05})
    start = time.monotonic()
    result = index.search(queries, 3)
    assert time.monotonic() - start >= 0.05
    np.testing.assert_array_equal(result.row, exact(queries, 3)[1])
    second_requests = [fields for fields in state["requests"] if fields["aesthetic_score"] == 5]
    assert len(second_requests) == 1
    assert second_requests[0]["aesthetic_weight"] == 1
    assert np.allclose(second_requests[0]["embedding_input"], bad)
    assert second_requests[0]["num_images"] == 300
    assert index.retried.tolist() == [2] and index.failed.tolist() == []


def test_published_fallback_counts_what_failed_twice(service):
    url, state = service
    queries = queries_of(4)
    # the first one too: the service did answer
    bad = queries[:2] / np.linalg.norm(queries[:2], axis=1, keepdims=True)
    state["fault"] = lambda number, fields: (
        (500, b"") if np.isclose(fields["embedding_input"], bad).all(1).any() else None
    )
    index = index_of(url, **PUBLISHED | {"wait": 0.0})
    with pytest.warns(UserWarning, match="2 of 4 queries failed twice"):
        result = index.search(queries, 3)
    assert index.failed.tolist() == [0, 1]
    assert (result.row[:2] == -1).all()
    assert np.isneginf(result.similarity[:2]).all()
    np.testing.assert_array_equal(result.row[2:], exact(queries, 3)[1][2:])
    state["fault"] = lambda number, fields: (500, b"")
    with pytest.raises(PerceptError, match="HTTP 500"):
        index.search(queries, 3)


# --------------------------------------------------------------------------------------- addresses
@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.0.8", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("4000::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_private_addresses_are_not_connected_to(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("connected"))
    urls = [
        "http://127.0.0.1:9/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://10.0.0.1/",
        "http://2130706433/a.png",
        "http://[::ffff:10.0.0.1]/",
    ]
    got = fetch_images(urls, tmp_path, FetchOptions(size=8))
    assert not got.ok.any() and all("not a public address" in reason for reason in got.reasons)


def test_the_checked_address_is_the_connected_one(tmp_path, monkeypatch):
    """A name that answers with a public address first and a private one from then on."""
    lookups, connected = [], []

    def lookup(host, port, **options):
        lookups.append(host)
        address = "93.184.216.34" if len(lookups) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self, address):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(http_client.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert fetch_images(
        ["http://rebinding.test/a.png"], tmp_path, FetchOptions(size=8)
    ).reasons == ["refused the connection"]
    assert connected == [("93.184.216.34", 80)] and lookups == ["rebinding.test"]
    assert (
        "127.0.0.1, which is not a public"
        in fetch_images(["http://rebinding.test/b.png"], tmp_path, FetchOptions(size=8)).reasons[0]
    )
    assert len(connected) == 1


def test_one_private_address_among_several_is_enough_to_refuse(tmp_path, monkeypatch):
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("93.184.216.34", "10.0.0.1")
    ]
    monkeypatch.setattr(http_client.socket, "getaddrinfo", lambda *args, **options: addresses)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("connected"))
    assert (
        "10.0.0.1"
        in fetch_images(["http://both.test/a.png"], tmp_path, FetchOptions(size=8)).reasons[0]
    )


# ---------------------------------------------------------------------------------------- pictures
def noise(width=40, height=30):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def picture(mode="RGB", size=(40, 30), kind="PNG", value=None):
    content = io.BytesIO()
    image = (
        Image.fromarray(noise(*size)).convert(mode)
        if value is None
        else Image.new(mode, size, value)
    )
    image.save(content, kind)
    return content.getvalue()


class Host(Quiet):
    """A host of pictures; every path says what is wrong with it."""

    requested: list

    def do_GET(self):
        self.requested.append(self.path)
        name = urlsplit(self.path).path.strip("/")
        if name.isdigit() or name.startswith("ok"):
            self.send(
                200,
                picture(value=(int(name) if name.isdigit() else 9, 0, 255)),
                Content_Type="image/png",
            )
        elif name == "to":
            self.send(302, Location=base64.urlsafe_b64decode(urlsplit(self.path).query).decode())
        elif name == "round":
            self.send(302, Location="/round")
        elif name == "html":
            self.send(200, b"<html></html>", Content_Type="text/html")
        elif name == "liar":
            self.send(200, b"<html></html>", Content_Type="image/png")
        elif name == "svg":
            self.send(
                200, b'<svg xmlns="http://www.w3.org/2000/svg"/>', Content_Type="image/svg+xml"
            )
        elif name == "tiff":
            self.send(200, picture(kind="TIFF"), Content_Type="image/tiff")
        elif name in ("half.png", "half.jpg"):
            complete = picture(kind="PNG" if name.endswith("png") else "JPEG")
            self.send(200, complete[: len(complete) // 2], Content_Type="image/png")
        elif name == "short":
            self.send(200, picture()[:200], Content_Type="image/png", Content_Length="5000")
        elif name == "huge":
            self.send(200, b"", Content_Type="image/png", Content_Length=str(10**12))
        elif name == "endless":
            self.send(200, b"", Content_Type="image/png", Content_Length=None)
            self.forever(b"0" * 65536, 0)
        elif name == "drip":
            self.send(200, b"", Content_Type="image/png", Content_Length="100000")
            self.forever(b"0", 0.02)
        elif name == "bomb":
            self.send(200, picture("1", (3_000, 3_000), value=0), Content_Type="image/png")
        elif name == "narrow":
            self.send(200, picture("1", (60_000, 1), value=0), Content_Type="image/png")
        elif name == "packed":
            self.send(200, picture(), Content_Type="image/png", Content_Encoding="gzip")
        elif name in MODES:
            self.send(
                200,
                picture(name, kind="GIF" if name == "P" else "JPEG" if name == "CMYK" else "PNG"),
                Content_Type="image/png; charset=binary",
            )
        elif name == "päth with space":
            self.send(500)
        elif name == "p%C3%A4th%20with%20space":
            self.send(200, picture(), Content_Type="image/png")
        else:
            self.send(404)

    def forever(self, block, pause):
        try:
            while not self.over.wait(pause):
                self.wfile.write(block)
        except OSError:
            pass


MODES = ("RGB", "L", "LA", "RGBA", "P", "CMYK")


@pytest.fixture
def host():
    """(url, paths that were asked for) of a host."""
    requested, over = [], threading.Event()
    with serving(Host, requested=requested, over=over) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}", requested
        over.set()


@contextmanager
def raw(first, then, pause=0.02):
    """A server that sends `first` at once, and `then` again and again; yields its port."""
    over = threading.Event()

    def answer(line):
        with closing(line):
            try:
                line.sendall(first)
                while not over.wait(pause):
                    line.sendall(then)
            except OSError:
                pass

    def accept():
        while not over.is_set():
            try:
                line, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(line,), daemon=True).start()

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            over.set()


def get(urls, cache, **options):
    fetch_options = FetchOptions(**{"size": 16, "timeout": 30.0, "allow_private": True} | options)
    return fetch_images(urls, cache, fetch_options)


def test_pictures_in_order_and_from_the_cache(host, tmp_path):
    url, requested = host
    urls = [f"{url}/{i}" for i in range(20)] + [f"{url}/gone", f"{url}/3", None, float("nan"), ""]
    got = get(urls, tmp_path)
    assert got.images.shape == (25, 3, 16, 16) and got.images.dtype == torch.float32
    assert got.ok.tolist() == [True] * 20 + [False, True, False, False, False]
    assert got.reasons[20] == "answered with HTTP 404"
    assert got.reasons[22] == got.reasons[23] == "is no url"
    assert got.reasons[24] == "is no http or https address"
    for i in [*range(20), 21]:
        expected = np.array([3 if i == 21 else i, 0, 255], np.float32) / 255
        np.testing.assert_allclose(
            got.images[i], np.broadcast_to(expected[:, None, None], (3, 16, 16))
        )
    assert (got.images[20] == 0.5).all()
    assert sorted(requested) == sorted([*(f"/{i}" for i in range(20)), "/gone"])
    cached = get(urls[:20], tmp_path)
    assert len(requested) == 21 and torch.equal(cached.images, got.images[:20])
    # only pictures, and no temporary files
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 20
    get(urls[20:21], tmp_path)
    assert len(requested) == 22  # another call, with no memory of failures


def test_a_dead_url_is_asked_once_in_a_session_and_a_broken_file_again(host, tmp_path):
    url, requested = host
    cache = ImageCache(tmp_path)
    for _ in range(3):
        assert get([f"{url}/gone", f"{url}/1"], cache).ok.tolist() == [False, True]
    assert sorted(requested) == ["/1", "/gone"]
    assert cache.failures == {f"{url}/gone": "answered with HTTP 404"}
    cache.path(f"{url}/1").write_bytes(b"half a pic")
    assert get([f"{url}/1"], cache).ok.all() and sorted(requested) == ["/1", "/1", "/gone"]
    assert get([f"{url}/1"], cache).ok.all() and len(requested) == 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("html", "sent text/html and no image"),
        ("liar", "no image that can be read"),
        ("svg", "no image that can be read"),
        ("tiff", "no image that can be read"),
        ("half.png", "no image that can be read"),
        ("half.jpg", "no image that can be read"),
        ("short", "broke off"),
        ("huge", "more than 0.1 MB"),
        ("endless", "more than 0.1 MB"),
        ("bomb", "3000 x 3000 pixels"),
        ("narrow", "too narrow"),
        ("packed", "compressed"),
        ("round", "redirects more than 5 times"),
        ("gone", "HTTP 404"),
    ],
)
def test_what_is_no_good_picture(host, tmp_path, name, message):
    url, _ = host
    got = get([f"{url}/{name}"], tmp_path, max_bytes=1e5, max_pixels=1e6)
    assert not got.ok[0] and message in got.reasons[0], got.reasons
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_drips_ends(host, tmp_path, scheme):
    """A byte every 20 ms: of the content, of the headers, or (https) of what should be the
    handshake.
    """
    url, _ = host
    beginnings = (
        [b"\x16\x03\x03\x40\x00"]
        if scheme == "https"
        else [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", b""]
    )
    for beginning in beginnings:
        with raw(beginning, b"a" if beginning else b"") as port:
            begin = time.monotonic()
            got = get([f"{scheme}://127.0.0.1:{port}/a.png"], tmp_path, timeout=0.3)
            assert got.reasons == ["took longer than 0.3 s"] and 0.25 < time.monotonic() - begin < 5
    assert get([f"{url}/drip"], tmp_path, timeout=0.3).reasons == ["took longer than 0.3 s"]


def test_redirects_are_checked_one_by_one(host, tmp_path, monkeypatch):
    """This server plays a public one; where it leads to must be public too."""
    url, requested = host

    def leading(target):
        return f"{url}/to?{base64.urlsafe_b64encode(target.encode()).decode()}"

    monkeypatch.setattr(
        http_client, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )
    inside = [
        "http://10.0.0.1/a.png",
        "http://127.0.0.2/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/a.png",
    ]
    urls = [
        leading(target)
        for target in [
            *inside,
            "file:///etc/passwd",
            "ftp://127.0.0.1/a.png",
            f"{url}/7",
            "/8",
            leading("/9"),
        ]
    ]
    got = get(urls, tmp_path, allow_private=False)
    assert got.ok.tolist() == [False] * 6 + [True] * 3
    for target, reason in zip(inside, got.reasons, strict=False):
        assert "not a public address" in reason and urlsplit(target).hostname in reason
    assert got.reasons[4] == "leads to file:///etc/passwd, which is no http or https address"
    assert got.reasons[5].endswith(", which is no http or https address")
    assert [round(255 * float(image[0, 0, 0])) for image in got.images[6:]] == [7, 8, 9]
    assert len(requested) == 9 + 4  # four of the redirects lead back here


@pytest.mark.parametrize("target", ["http://[", "http://[::1/", "//a:b:c", "http://x:99999/", "\\"])
def test_a_redirect_to_nonsense_costs_no_other_image(host, tmp_path, target):
    url, _ = host
    leading = f"{url}/to?{base64.urlsafe_b64encode(target.encode()).decode()}"
    got = get([f"{url}/1", leading, f"{url}/2"], tmp_path)
    assert got.ok.tolist() == [True, False, True]
    assert "leads to" in got.reasons[1]


def test_modes_sizes_and_centre_crop(host, tmp_path):
    url, _ = host
    got = get([f"{url}/{mode}" for mode in MODES], tmp_path, size=30)
    assert got.ok.all(), got.reasons
    by_mode = dict(zip(MODES, got.images, strict=True))
    expected = noise()[:, 5:35].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_allclose(by_mode["RGB"], expected)
    np.testing.assert_allclose(by_mode["RGBA"], expected)
    for mode in ("L", "LA"):
        assert (by_mode[mode] == by_mode[mode][:1]).all() and by_mode[mode].std() > 0.1
    assert get([f"{url}/RGB"], tmp_path, size=64).images.shape == (1, 3, 64, 64)


def test_urls_with_spaces_and_other_letters(host, tmp_path):
    url, requested = host
    assert get([f"{url}/päth with space?q=ö&r=a%20b"], tmp_path).ok.all()
    assert requested == ["/p%C3%A4th%20with%20space?q=%C3%B6&r=a%20b"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a",
        "data:image/png;base64,AAAA",
        "http://",
        "http://a:b:c/",
        "http://a..b/",
        "x",
        "http://[1::2/",
    ],
)
def test_what_is_no_url(tmp_path, url):
    assert get([url], tmp_path).reasons == ["is no http or https address"]


def test_unknown_names_and_closed_doors(tmp_path, nobody, monkeypatch):
    assert get([nobody], tmp_path).reasons == ["refused the connection"]

    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(http_client.socket, "getaddrinfo", unknown)
    assert get(["http://nowhere.test/a.png"], tmp_path).reasons == [
        "could not be found, as its name is unknown"
    ]


def test_available_images_are_selected_down_the_lists(host, tmp_path):
    url, requested = host
    lists = [
        [f"{url}/{i}" for i in range(50)],
        [f"{url}/gone{i}" if i % 2 else f"{url}/{i}" for i in range(12)],
        [f"{url}/gone1", None, f"{url}/5"],
        [],
        [f"{url}/gone{i}" for i in range(7)],
    ]
    cache = ImageCache(tmp_path)
    result = select_available_images(
        lists, 3, cache, FetchOptions(size=8, timeout=30.0, allow_private=True)
    )
    assert result.dtype == np.int64
    np.testing.assert_array_equal(
        result, [[0, 1, 2], [0, 2, 4], [2, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    )
    assert len(requested) == len(set(requested))
    assert "/10" not in requested  # nothing twice, and no list further than needed
    before = len(requested)
    assert get([lists[q][p] for q, p in ((0, 2), (1, 4), (2, 2))], cache).ok.all()
    assert len(requested) == before
    with pytest.raises(PerceptError, match="at least one"):
        select_available_images(lists, 0, cache)


def test_interrupting_leaves_what_has_not_begun(tmp_path, monkeypatch):
    requested = []

    def slow(url, *args):
        requested.append(url)
        time.sleep(0.005)
        raise http_client.RequestFailed("is slow")

    def interrupted(iterable, *args, **options):
        yield next(iter(iterable))
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "request", slow)
    monkeypatch.setattr(http_client, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get([f"http://slow.test/{i}" for i in range(400)], tmp_path, workers=2)
    before = -1
    while before != (before := len(requested)):  # until nothing is asked for any more
        time.sleep(0.1)
    assert before < 300


def certificate(folder):
    """A certificate for localhost that signs itself: (file with it and its key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]),
    )
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    )
    now = datetime.now()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .add_extension(names, False)
    )
    signed = (
        builder.not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=2))
        .sign(key, hashes.SHA256())
    )
    plain = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "both.pem").write_bytes(
        signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*plain)
    )
    return folder / "both.pem"


def test_https_checks_certificates(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    file, requested, over = certificate(tmp_path), [], threading.Event()
    with serving(Host, requested=requested, over=over) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_address[1]}"
        assert get([f"{url}/1"], tmp_path / "cache").reasons == ["has no valid certificate"]
        assert not requested
        trusting = ssl.create_default_context(cafile=file)
        monkeypatch.setattr(http_client, "tls_context", lambda: trusting)
        assert get([f"{url}/1"], tmp_path / "cache").ok.all()
        assert get([f"{url}/drip"], tmp_path / "cache", timeout=0.5).reasons == [
            "took longer than 0.5 s"
        ]
        over.set()


def test_pictures_that_the_server_sends_with_its_answers():
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (255, 0, 0)).save(file, "png")
    metadata = pd.DataFrame(
        {
            "image": [
                base64.b64encode(file.getvalue()).decode(),
                None,
                base64.b64encode(b"no picture").decode(),
                "abcde",  # no base64
                "\u00e9",
                5,
            ]
        }
    )
    pixels, ok = decode_sent_images(metadata, 8)
    assert ok.tolist() == [True] + [False] * 5
    assert (pixels[0] == [255, 0, 0]).all()
    assert (pixels[1:] == 128).all()
