"""Answers of servers, which may be wrong, endless or slow: limits of size, time and number.

A mirror is a stranger. What it lists is checked before it is used, an answer in JSON may have
MAX_JSON_BYTES, a listing MAX_PAGES pages, and an answer that does not begin or hardly moves is
given up with a sentence.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_session
from huggingface_hub.utils import hf_raise_for_status

from src.utils import PerceptError

T = TypeVar("T")

TIMEOUT_SECONDS = 20.0  # without a byte

ANSWER_SECONDS = 60.0  # until an answer has begun

MIN_SPEED = 1000.0  # bytes a second, on average over SPEED_SECONDS

SPEED_SECONDS = 30.0

MAX_JSON_BYTES = 2**26  # of one page of a listing; the hub's have 1000 files, about 400 kB

MAX_PAGES = 1000

COMMIT = re.compile(r"[0-9a-f]{40}")

SHA256 = re.compile(r"[0-9a-f]{64}")


class Entry(NamedTuple):
    """A file of a repository: its path there, its bytes, and its checksum or ""."""

    path: str
    size: int
    checksum: str


class SpeedCheck:
    """Gives up a transfer that hardly moves.

    Args:
        subject: what is transferred, for the message.
    """

    def __init__(self, subject: str):
        self.subject = subject
        self.start_time, self.n_bytes = time.monotonic(), 0

    def add(self, n_bytes: int) -> None:
        """Count bytes that have arrived.

        Raises:
            PerceptError: if the last SPEED_SECONDS brought less than MIN_SPEED.
        """
        self.n_bytes += n_bytes
        seconds = time.monotonic() - self.start_time
        if seconds < SPEED_SECONDS:
            return
        speed = self.n_bytes / seconds
        if speed < MIN_SPEED:
            raise PerceptError(
                f"{self.subject} arrives at {speed:.0f} bytes a second, less than the"
                f" {MIN_SPEED:.0f} that are waited for: run this again later, it goes on where it"
                " stopped, or take another mirror."
            )
        self.start_time, self.n_bytes = time.monotonic(), 0


def begin_within(seconds: float, call: Callable[[], T], subject: str) -> T:
    """Call a function of a library that waits for a server, and give up when that takes too long.

    Timeouts of the libraries are for the time without a byte; a server that sends the head of its
    answer byte by byte keeps them waiting for ever.

    Args:
        seconds: the longest that it may take.
        call: the function.
        subject: what is asked for, for the message.

    Raises:
        PerceptError: when the time is over; the call goes on in a thread that ends with the
            process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # is raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise PerceptError(
            f"The server did not begin to send {subject} within {seconds:.0f} seconds: run this"
            " again later, or take another mirror."
        )
    return results[0]


@contextmanager
def open_answer(url: str, headers: Mapping[str, str], subject: str) -> Iterator[Any]:
    """Ask for an address, redirected where the server says so, and yield the answer of httpx.

    Its content is not read yet, and is to be read with `iter_raw`: what is compressed is refused.

    Raises:
        PerceptError: for an answer that is compressed, and as `begin_within`.
        HfHubHTTPError: for an answer that is an error; its content is not read.
    """
    session = get_session()
    request = session.build_request(
        "GET", url, headers={**headers, "Accept-Encoding": "identity"}, timeout=TIMEOUT_SECONDS
    )
    response = begin_within(
        ANSWER_SECONDS,
        lambda: session.send(request, stream=True, follow_redirects=True),
        subject,
    )
    try:
        if response.status_code >= 400:
            response.close()  # or the hub's client reads it, however long it is
        hf_raise_for_status(response)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("", "identity"):
            raise PerceptError(
                f"The server sends {subject} compressed ({encoding[:40]}), although it was asked"
                " for as it is: take another mirror."
            )
        yield response
    finally:
        response.close()


def read_json_pages(url: str, headers: Mapping[str, str], subject: str) -> Iterator[Any]:
    """Read an answer in JSON, then those that its header "Link" names as the next pages.

    Next pages are asked for on the same server, so that no token goes to another.

    Args:
        url: address of the first page.
        headers: of the requests.
        subject: what is asked for, for messages.

    Raises:
        PerceptError: for an answer that is no JSON, is longer than MAX_JSON_BYTES or too slow, for
            pages that lead in a circle, and for more than MAX_PAGES.
    """
    seen_urls = set[str]()
    while url:
        if url in seen_urls:
            raise PerceptError(
                f"The listing of {subject} names a page as the next one that it had before: take"
                " another mirror."
            )
        if len(seen_urls) >= MAX_PAGES:
            raise PerceptError(
                f"The listing of {subject} has more than {MAX_PAGES} pages: take another mirror."
            )
        seen_urls.add(url)
        with open_answer(url, headers, subject) as response:
            content = _read_limited(response, subject)
            link = response.links.get("next", {}).get("url", "")
        try:
            yield json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PerceptError(
                f"What the server answers for {subject} is no JSON: take another mirror, or run"
                " this again later."
            ) from error
        url = _find_next_page(url, link, subject) if link else ""


def _find_next_page(url: str, link: str, subject: str) -> str:
    """The address of the next page, on the server of this one."""
    server = urlsplit(url)
    try:
        page = urlsplit(urljoin(url, link))
    except ValueError as error:
        raise PerceptError(
            f"The listing of {subject} names {link[:80]!r} as its next page, which is no address:"
            " take another mirror."
        ) from error
    return page._replace(scheme=server.scheme, netloc=server.netloc).geturl()


def _read_limited(response: Any, subject: str) -> bytes:
    """The content of an answer in JSON."""
    content, speed = bytearray(), SpeedCheck(f"The listing of {subject}")
    for chunk in response.iter_raw():
        speed.add(len(chunk))
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise PerceptError(
                f"What the server answers for {subject} is longer than {MAX_JSON_BYTES:,} bytes:"
                " take another mirror."
            )
    return bytes(content)


# --------------------------------------------------------------------------------- what is answered
def read_commit(answer: Any, subject: str) -> str:
    """The commit that a hub tells for a revision.

    Raises:
        PerceptError: if it tells none, or something else in its place.
    """
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        shortened = repr(commit)[:80]
        raise PerceptError(
            f"The server tells {shortened} as the commit of {subject}, which is none (40 digits"
            " from 0 to f): take another mirror."
        )
    return commit


def read_entries(answer: Any, subject: str) -> list[Entry]:
    """The files on a page of a hub's listing.

    Raises:
        PerceptError: if it is no list, or a file lacks its path, its size or its checksum.
    """
    if not isinstance(answer, list):
        raise PerceptError(
            f"The listing of {subject} is no list but {type(answer).__name__}: take another mirror."
        )
    files = [item for item in answer if not isinstance(item, dict) or item.get("type") == "file"]
    return [_read_entry(item, subject) for item in files]


def _read_entry(item: Any, subject: str) -> Entry:
    """One file of a hub's listing, which tells the SHA-256 of large ones, git's SHA-1 of others."""
    content = item if isinstance(item, dict) else {}
    path, size, checksum = content.get("path"), content.get("size"), _read_checksum(content)
    is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    if isinstance(path, str) and is_size and checksum:
        return Entry(path, int(size or 0), checksum)
    raise PerceptError(
        f"The listing of {subject} has a file without its path, size or checksum"
        f" ({repr(item)[:120]}): take another mirror."
    )


def _read_checksum(item: dict[str, Any]) -> str:
    """The checksum of a file in a hub's listing, "" if it has none."""
    large_file, git_sum = item.get("lfs"), str(item.get("oid"))
    if not large_file:
        return f"git:{git_sum}" if COMMIT.fullmatch(git_sum) else ""
    sha256 = str(large_file.get("oid")) if isinstance(large_file, dict) else ""
    return f"sha256:{sha256}" if SHA256.fullmatch(sha256) else ""
