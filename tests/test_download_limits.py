"""Mirrors that send something else than they announced: refused in one sentence, and nothing is
left under a final name or outside of the folder.
"""

import gzip
import json
import time
from types import SimpleNamespace

import pytest
from servers import Hub, _Handler, serving

from src import utils
from src.pipeline.download import answers, fetch, servers, transfer
from src.pipeline.download.files import RemoteFile
from src.utils import PerceptError

MODEL = ("model", "openai/clip-vit-large-patch14")
WEIGHTS = "model.safetensors"
FILES = {"config.json": b"{}", WEIGHTS: b"x" * 2000}
GIT_SUM = "0" * 40


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(answers, "SPEED_SECONDS", 0.3)
    monkeypatch.setattr(answers, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(answers, "TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")


def refuse(handler, tmp_path, message, revision=""):
    """Fetch a model from a server, which must be refused; no file may lie where it does not belong,
    and no weights under their final name.
    """
    with serving(handler, hub=Hub({MODEL: dict(FILES)})) as server:
        server.RequestHandlerClass.hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(PerceptError, match=message) as caught:
            url = server.RequestHandlerClass.hub.url
            fetch("clip", tmp_path / "a" / "b" / "to", mirror=url, revision=revision)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "to") for path in files)
    assert not [path for path in files if path.name == WEIGHTS]
    return files


def send_endlessly(handler, block, status=200, **headers):
    """An answer without an end, until the other side has had enough."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    try:
        for _ in range(4000):
            handler.wfile.write(block)
    except OSError:
        pass


def drip(handler, content):
    """Send a byte every now and then."""
    try:
        for byte in content:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        pass


class OddContent(_Handler):
    """Sends the weights in its own way, `send_weights`; the other files as announced."""

    def content(self, content, path, commit, what):
        if what == "file" or path != WEIGHTS:
            return super().content(content, path, commit, what)
        return self.send_weights(content)


# ------------------------------------------------------------------------------ content of a file
def test_more_bytes_than_announced_are_not_written(tmp_path, monkeypatch):
    class Endless(OddContent):
        def send_weights(self, content):
            send_endlessly(self, bytes(10**5))

    sizes = []
    discard = transfer._discard_part
    monkeypatch.setattr(
        transfer,
        "_discard_part",
        lambda file, reason: (sizes.append(file.part.stat().st_size), discard(file, reason)),
    )
    left = refuse(Endless, tmp_path, f"{WEIGHTS} has more than the 2,000 bytes .* was removed")
    assert sizes == [0] and not [path for path in left if path.name == f"{WEIGHTS}.part"]


def test_compressed_content_is_refused_before_it_is_read(tmp_path):
    class Bomb(OddContent):
        def send_weights(self, content):
            self.send(200, gzip.compress(bytes(10**6)), Content_Encoding="gzip")

    left = refuse(Bomb, tmp_path, f"sends {WEIGHTS} compressed \\(gzip\\)")
    assert all(path.stat().st_size < 10 for path in left if path.suffix == ".part")


def test_a_transfer_that_hardly_moves_is_given_up(tmp_path):
    class Slow(OddContent):
        def send_weights(self, content):
            self.send_response(200)
            self.send_header("Content-Length", "2000")
            self.end_headers()
            drip(self, content)

    start_time = time.monotonic()
    refuse(Slow, tmp_path, f"{WEIGHTS} arrives at .* bytes a second, less than the 1000")
    assert time.monotonic() - start_time < 3


def test_another_part_than_was_asked_for_is_refused(tmp_path):
    class OtherPart(OddContent):
        def send_weights(self, content):
            self.send(206, content[5:], Content_Range="bytes 5-1999/2000")

    refuse(
        OtherPart, tmp_path, f"asked for {WEIGHTS} from byte 0 on, and sends 'bytes 5-1999/2000'"
    )


@pytest.mark.parametrize(
    "location",
    ["http://[", "file:///etc/passwd", "ftp://x/y", "::::", f"http://{'a' * 300}.com/", "//", ""],
)
def test_redirects_to_nonsense_are_one_sentence(tmp_path, location):
    class Redirect(OddContent):
        def send_weights(self, content):
            self.send(302, Location=location)

    refuse(Redirect, tmp_path, f"{WEIGHTS}.* (check the network|take another mirror)")


def test_an_endless_error_is_not_read(tmp_path):
    class Failing(_Handler):
        def answer(self):
            send_endlessly(self, bytes(10**5), status=500)

    refuse(Failing, tmp_path, "answered 500 for model .*try again later")


# -------------------------------------------------------------------------------- what is announced
@pytest.mark.parametrize(
    "commit", ["../../../../evil", "/tmp/evil", "a\nb", "", "abc", "g" * 40, 7, None, ["x"]]
)
def test_a_commit_that_is_none_is_refused(tmp_path, commit):
    class Evil(_Handler):
        def send_json(self, value, **headers):
            if isinstance(value, dict) and "sha" in value:
                value = value | {"sha": commit}
            super().send_json(value, **headers)

    refuse(Evil, tmp_path, "as the commit of model openai/.*, which is none")


@pytest.mark.parametrize("revision", ["../../x", "/abs", "a\nb", "-x", "x" * 300, "a/./b"])
def test_a_revision_that_leads_out_is_refused(tmp_path, revision):
    refuse(_Handler, tmp_path, "^revision is ", revision=revision)


def file_entry(**changes):
    return {"type": "file", "oid": GIT_SUM, "path": "config.json", "size": 2} | changes


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'["\xff"]', "is no JSON"),
        ({"a": 1}, "no list but dict"),
        (None, "no list but NoneType"),
        ([1], "without its path, size or checksum"),
        ([{"type": "file", "oid": "0", "path": "config.json"}], "without its path, size"),
        ([file_entry(size=-1)], "without its path, size"),
        ([file_entry(size="12")], "without its path, size"),
        ([file_entry(size=True)], "without its path, size"),
        ([file_entry(path=["x"])], "without its path, size"),
        ([file_entry(oid="../x")], "without its path, size or checksum"),
        ([file_entry(lfs={"oid": "x"})], "without its path, size or checksum"),
        ([file_entry(size=10**30)], "No space for"),
        ([], "has no configuration and weights"),
    ],
)
def test_a_listing_of_another_form_is_refused(tmp_path, listing, message):
    class Listing(_Handler):
        def tree(self, files, folder, query):
            self.send(200, listing if isinstance(listing, bytes) else json.dumps(listing).encode())

    refuse(Listing, tmp_path, message)


@pytest.mark.parametrize(
    "path", ["../config.json", "/config.json", ".config.json", "-config.json", "..\\config.json"]
)
def test_a_listed_name_that_leads_out_is_refused(tmp_path, path):
    class Listing(_Handler):
        def tree(self, files, folder, query):
            self.send_json([file_entry(path=path)])

    # a name that no pattern of the bundle takes is passed over
    refuse(Listing, tmp_path, "lists the file .*take another mirror|has no configuration")


def test_a_path_of_a_whole_model_stays_in_its_folder(tmp_path):
    listing = [file_entry(path="../config.json")]

    class Listing(_Handler):
        def tree(self, files, folder, query):
            self.send_json(listing)

    with serving(Listing, hub=Hub({("model", "a/b"): dict(FILES)})) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(PerceptError, match=r"lists the file '\.\./config.json', which leads"):
            fetch("a/b", tmp_path / "to", mirror=url)
    assert not list(tmp_path.rglob("*.json*"))


def test_pages_that_lead_in_a_circle_or_never_end_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MAX_PAGES", 5)

    class Circle(_Handler):
        def tree(self, files, folder, query):
            self.send_json([], Link=f'<{self.hub.url}{self.path}>; rel="next"')

    refuse(Circle, tmp_path, "names a page as the next one that it had before")
    asked = []

    class Endless(_Handler):
        def tree(self, files, folder, query):
            asked.append(self.path)
            address = f"http://elsewhere.invalid{self.path}&page={len(asked)}"
            self.send_json([], Link=f'<{address}>; rel="next"')

    refuse(Endless, tmp_path, "more than 5 pages")
    assert len(asked) == 5  # all of this server, whatever address the pages name

    class NoAddress(_Handler):
        def tree(self, files, folder, query):
            self.send_json([], Link='<http://[>; rel="next"')

    refuse(NoAddress, tmp_path, "'http://\\[' as its next page, which is no address")


def test_a_listing_is_limited_in_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MAX_JSON_BYTES", 10**6)

    class Long(_Handler):
        def tree(self, files, folder, query):
            send_endlessly(self, b" " * 10**5)

    refuse(Long, tmp_path, "is longer than 1,000,000 bytes")

    class Slow(_Handler):
        def tree(self, files, folder, query):
            self.send_response(200)
            self.send_header("Content-Length", "2000")
            self.end_headers()
            drip(self, b"[" * 2000)

    refuse(Slow, tmp_path, "The listing of model .* arrives at .* bytes a second")


def test_an_answer_whose_head_does_not_end_is_given_up(tmp_path):
    class Slow(_Handler):
        def answer(self):
            drip(self, b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 100)

    refuse(Slow, tmp_path, "did not begin to send model .* within")


# --------------------------------------------------------------------------------------------- S3
def test_what_a_bucket_lists_is_checked(monkeypatch):
    pages = [{"Contents": [{"Key": "a/b", "Size": 3, "ETag": f'"{"0" * 32}"'}]}, {}]
    paginator = SimpleNamespace(paginate=lambda **_: pages)
    client = SimpleNamespace(get_paginator=lambda _: paginator)
    monkeypatch.setattr(servers, "make_s3_client", lambda _: client)
    bucket = servers.BucketServer(SimpleNamespace(repo="nsd"), "")
    assert bucket.list_folder("a") == [answers.Entry("a/b", 3, f"md5:{'0' * 32}")]
    for content in ({"Key": "a"}, {"Size": 1}, {"Key": "a", "Size": -1}):
        pages[1] = {"Contents": [content]}
        with pytest.raises(PerceptError, match="without its path or size"):
            bucket.list_folder("a")
    monkeypatch.setattr(servers, "MAX_PAGES", 1)
    with pytest.raises(PerceptError, match="more than 1 pages"):
        bucket.list_folder("a")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "sub").write_text("a file where a folder should be")
    local = tmp_path / "to" / "sub" / "x"
    file = RemoteFile("folder", "r", "", str(source), "", local, 1, "")
    with pytest.raises(PerceptError, match="could not be read or written .*File exists"):
        transfer.fetch_files([file], tmp_path / "to")
