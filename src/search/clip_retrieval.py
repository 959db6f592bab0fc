"""An index on another machine: a clip-retrieval server is asked over HTTP, and the pictures that it
names are fetched from wherever they lie.

- `RemoteIndex` is searched as any index of `src.index`; what goes wrong with the service is said in
  one sentence, after seconds and not hours.
- `fetch_images` and `select_available_images` get pictures by their urls, which strangers wrote: only http and
  https, only from public addresses (the address that is connected to is the one that was checked,
  for every redirect anew), within a time that holds for a picture as a whole, of limited size, and
  only what is a picture by its type and by its content. A picture that was had once is in a cache.
- No proxy of the environment is used: a proxy looks names up itself, so that addresses could not be
  checked.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import json
import math
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from functools import cache as once
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from src.search.local import SearchResult, check_queries, decode_image, select_top_k, stack_images
from src.utils import PerceptError, atomic, progress

AGENT = "Mozilla/5.0 (compatible; Percept)"  # some hosts refuse all that is not called a browser

ANSWER_BYTES = 200e6  # of a service: with pictures in it, an answer is large

REDIRECTS = 5

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
)  # what the web shows; decoders that nobody tests with hostile files stay shut

ON_FAILURE = ("stop", "published")

PUBLISHED_SETTINGS: dict[str, Any] = {
    "num_images": 300,
    "use_safety_model": False,
    "use_violence_detector": False,
    "aesthetic_score": 9,
    "aesthetic_weight": 0.5,
    "on_failure": "published",
}

SECOND_TRY = {"aesthetic_score": 5, "aesthetic_weight": 1}

INSTEAD = (
    "see that it runs, that its url is right and timeout long enough, or build a local index with"
    " notebook 05_search_index (the public knn.laion.ai has been down since December 2023)"
)

# Addresses that Python (of some version) calls global and that lead to others: 6to4's relays and
# addresses, Teredo and other IETF uses, documentation,
# shared carrier addresses.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "100.64.0.0/10",
            "192.0.0.0/24",
            "192.88.99.0/24",
            "2001::/23",
            "2001:db8::/32",
            "2002::/16",
            "3fff::/20",
        ),
    )
)

_UNICAST = ipaddress.ip_network(
    "2000::/3"
    # all of IPv6 that is given out for the public; what embeds IPv4 addresses (mapped, NAT64) is
    # outside
)


class _Failed(Exception):
    """Why something could not be had, as words that follow its url.

    `reached`: the other side did answer.
    """

    def __init__(self, reason: str, reached: bool = True):
        super().__init__(reason)
        self.reached = reached


@dataclass(frozen=True)
class _Limits:
    """What a request may take: seconds in all, bytes of content; whether private addresses may be
    asked; how the content's type must begin.
    """

    timeout: float
    max_bytes: float
    allow_private: bool
    kind: str = ""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: not private, loopback, link-local,
    multicast or reserved, and no way around to such a one.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6 and ip not in _UNICAST:
        return False
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or any(ip in network for network in _NOT_PUBLIC)
    )


@once
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(host: str, port: int, deadline: float, allow_private: bool) -> socket.socket:
    """A connection to an address of the host; the name is looked up once, so that what was checked
    is what is connected to.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not allow_private and (
        inside := [str(place[4][0]) for place in found if not is_public(str(place[4][0]))]
    ):
        raise _Failed(f"is at {inside[0]}, which is not a public address")
    error: OSError = TimeoutError()
    for family, kind, protocol, _, address in found:
        line = socket.socket(family, kind, protocol)
        try:
            line.settimeout(max(deadline - time.monotonic(), 1e-3))
            line.connect(address)
            return line
        except OSError as refused:
            line.close()
            error = refused
    raise error


@contextmanager
def _cut_at(deadline: float, line: socket.socket) -> Iterator[None]:
    """At the deadline the connection is cut, whatever is waited for; a socket's own time-out would
    begin anew with every byte.
    """
    watch = line.dup()  # TLS takes the socket itself away

    def cut() -> None:
        with suppress(OSError):
            watch.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        watch.close()


def _read(response: http.client.HTTPResponse, limits: _Limits) -> bytes:
    """The content of an answer, as far as the limits allow."""
    if not (kind := response.headers.get_content_type()).startswith(limits.kind):
        raise _Failed(f"sent {kind} and no picture")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Failed("sent a compressed answer, which was not asked for")
    blocks, size = [], 0
    while (response.length or 0) + size <= limits.max_bytes and (block := response.read(65_536)):
        blocks.append(block)
        size += len(block)
    if (response.length or 0) + size > limits.max_bytes:
        raise _Failed(f"sent more than {limits.max_bytes / 1e6:g} MB")
    if response.length:
        raise _Failed("broke off in the middle")
    return b"".join(blocks)


def _converse(
    url: str, deadline: float, limits: _Limits, body: bytes | None
) -> tuple[int, Message, bytes]:
    """Status, headers and content (read where the status is 200) of a GET, or of a POST of JSON;
    redirects are not followed.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _Failed("is no http or https address")
    secure, host = parts.scheme == "https", parts.hostname.encode("idna").decode()
    port = parts.port or (443 if secure else 80)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
        f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else ""
    )
    headers = {"User-Agent": AGENT, "Accept": "application/json" if body else "image/*"} | (
        {"Content-Type": "application/json"} if body else {}
    )
    line = _connect(host, port, deadline, limits.allow_private)
    connection = (
        http.client.HTTPSConnection(host, port, context=_tls())
        if secure
        else http.client.HTTPConnection(host, port)
    )
    try:
        with _cut_at(deadline, line):
            connection.sock = line = (
                _tls().wrap_socket(line, server_hostname=host) if secure else line
            )
            connection.request("POST" if body else "GET", target, body, headers)
            with connection.getresponse() as response:
                return (
                    response.status,
                    response.headers,
                    _read(response, limits) if response.status == 200 else b"",
                )
    finally:
        connection.close()
        line.close()


def _request(
    url: str, deadline: float, limits: _Limits, body: bytes | None = None
) -> tuple[int, Message, bytes]:
    """`_converse`, with all that may go wrong turned into words."""
    try:
        answer = _converse(url, deadline, limits, body)
        if (
            time.monotonic() < deadline
        ):  # a connection that was cut can look like one that came to its end
            return answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() < deadline and not isinstance(error, TimeoutError):
            raise _Failed(_words(error), reached=False) from error
    except _Failed:
        if time.monotonic() < deadline:
            raise
    raise _Failed(f"took longer than {limits.timeout:g} s", reached=False)


def _words(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection"
    if isinstance(error, socket.gaierror):
        return "could not be found, as its name is unknown"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "has no valid certificate"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return "is no http or https address"
    return f"broke off the connection ({type(error).__name__})"


def _in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, desc: str
) -> list[Any]:
    """work(item) of every item, in their order; when it stops early (an error, Ctrl-C), what has
    not begun is left.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(progress(pool.map(work, items), desc, total=len(items)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Answer(NamedTuple):
    """What became of one query: the lines that count, best first; why it failed; whether it was
    asked a second time.
    """

    lines: list[dict[str, Any]]
    failure: _Failed | None = None
    retried: bool = False


class RemoteIndex:
    """An index that a clip-retrieval server (github.com/rom1504/clip-retrieval, `clip-retrieval
    back`) searches.

    The server's encoder must be that of the queries: LAION-5B's was CLIP ViT-L/14, one embedding of
    768 numbers an image. Similarities are what the server says: inner products with rows of length
    one, which its index may store compressed. With an aesthetic score they are those of a query
    that was moved.

    Args:
        url: of its knn-service, e.g. "http://localhost:1234/knn-service".
        indice_name: of the index on the server.
        dim: numbers an embedding; 0: not known, and whatever comes is sent.
        timeout: seconds that one request may take in all.
        num_images: rows asked for at a query, at least k; 0: four times k, as the server leaves out
            doubles and what is unsafe after it has searched.
        deduplicate, use_safety_model, use_violence_detector: leave out near doubles, unsafe and
            violent pictures, as far as the server has models for it.
        use_mclip: for text queries, which are not made here; sent along.
        aesthetic_score: 0 to 9: the server moves the query towards pictures of this score; None: it
            does not.
        aesthetic_weight: how far.
        modality: "image" or "text", what the rows embed.
        workers: requests at a time.
        on_failure: "stop", or "published": wait, ask once more with an aesthetic score of 5 of
            weight 1, and if that fails too leave the query without rows. MindEye's scripts then
            take white pictures, ones(16, 3, 512, 512); here such queries have row -1, are counted
            in `failed` and said. A service that gives no answer at all to the first query stops the
            search all the same.
        wait: seconds before the second request.

    `PUBLISHED_SETTINGS` has the settings of MindEye's scripts: RemoteIndex(url, "laion5B-L-14",
    **PUBLISHED_SETTINGS).

    Attributes:
        count: None, as a server does not say how many rows it has.
        failed: (n,) numbers of the queries of the last search that got no answer.
        retried: (n,) numbers of those that were answered at the second request.

    Raises:
        PerceptError: an unknown modality or on_failure.

    Source: clip-retrieval's clip_client.py and clip_back.py for the fields; MindEye (arXiv
    2305.18274), appendix A.7 and src/utils.py, for `PUBLISHED_SETTINGS`.
    """

    count: None = None

    def __init__(
        self,
        url: str,
        indice_name: str,
        dim: int = 0,
        timeout: float = 5.0,
        num_images: int = 0,
        deduplicate: bool = True,
        use_safety_model: bool = True,
        use_violence_detector: bool = True,
        use_mclip: bool = False,
        aesthetic_score: int | None = None,
        aesthetic_weight: float = 0.5,
        modality: str = "image",
        workers: int = 4,
        on_failure: str = "stop",
        wait: float = 2.0,
    ):
        for name, value, known in (
            ("modality", modality, ("image", "text")),
            ("on_failure", on_failure, ON_FAILURE),
        ):
            if value not in known:
                raise PerceptError(
                    f"{name} = {value!r} is unknown: choose one of {', '.join(known)}."
                )
        self.url, self.indice_name, self.dim, self.num_images, self.workers = (
            url,
            indice_name,
            dim,
            num_images,
            workers,
        )
        self.on_failure, self.wait = on_failure, wait
        self.failed, self.retried = np.empty(0, np.int64), np.empty(0, np.int64)
        self._limits = _Limits(
            timeout, ANSWER_BYTES, allow_private=True
        )  # the user names this address, no stranger
        self._fields: dict[str, Any] = {
            "text": None,
            "image": None,
            "image_url": None,
            "deduplicate": deduplicate,
            "use_safety_model": use_safety_model,
            "use_violence_detector": use_violence_detector,
            "indice_name": indice_name,
            "use_mclip": use_mclip,
            "modality": modality,
            "aesthetic_score": "" if aesthetic_score is None else aesthetic_score,
            "aesthetic_weight": "" if aesthetic_score is None else aesthetic_weight,
        }
        self._told: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"{self.indice_name} at {self.url}"

    def search(self, queries: Any, k: int, exclude: Any = None) -> SearchResult:
        """The k most similar rows, with one request a query (more where excluded rows left too
        few).

        The first query goes alone: where the service is down, that is known after one time-out.

        Args:
            queries: (queries, dim), of any length.
            k: rows a query, at least 1.
            exclude: (n,) rows that are never returned.

        Raises:
            PerceptError: another dim, numbers that are not finite, or k below 1; the service is
                down, too slow, or answers with an error or something else than rows (with
                on_failure = "published": with no answer at all to the first query, or to all
                queries).
        """
        asked = np.atleast_2d(np.asarray(queries, np.float32))
        asked = check_queries(asked, self.dim or asked.shape[1], k)
        barred = frozenset(
            np.asarray([] if exclude is None else exclude, np.int64).ravel().tolist()
        )
        answers: list[_Answer] = []
        if len(asked):
            answers = [first := self._answer(asked[0], k, barred)]
            if first.failure and not first.failure.reached:
                raise self._sentence(first.failure)
            answers += _in_parallel(
                lambda query: self._answer(query, k, barred),
                list(asked[1:]),
                self.workers,
                "asking the retrieval service",
            )
        self._count_failures(answers)
        width = max([k, *(len(answer.lines) for answer in answers)])
        similarity, row = (
            np.full((len(asked), width), -np.inf, np.float32),
            np.full((len(asked), width), -1, np.int64),
        )
        for q, answer in enumerate(answers):
            similarity[q, : len(answer.lines)] = [line["similarity"] for line in answer.lines]
            row[q, : len(answer.lines)] = [line["id"] for line in answer.lines]
        found = select_top_k(similarity, row, k)
        for answer, rows in zip(
            answers, found.row.tolist(), strict=True
        ):  # of all the others nothing is kept: an answer may hold 300 pictures
            kept = set(rows)
            self._told |= {
                line["id"]: {k: v for k, v in line.items() if k not in ("id", "similarity")}
                for line in answer.lines
                if line["id"] in kept
            }
        return found

    def get_metadata(self, rows: Any) -> pd.DataFrame:
        """What the answers said of some rows (n,), a line each in that order: url, caption, ...; of
        row -1 nothing.

        Raises:
            PerceptError: a row that no search has found; a server cannot be asked for it.
        """
        wanted = np.asarray(rows, np.int64).ravel().tolist()
        if unknown := [row for row in wanted if row != -1 and row not in self._told]:
            raise PerceptError(
                f"Nothing is known of row {unknown[0]} of {self!r}: ask for rows that a search of"
                " this session has found."
            )
        return pd.DataFrame([self._told.get(row, {}) for row in wanted], index=range(len(wanted)))

    def _answer(self, query: np.ndarray, k: int, barred: frozenset[int]) -> _Answer:
        """What becomes of one query (dim,)."""
        try:
            return _Answer(self._enough(query, k, barred))
        except _Failed as failure:
            if self.on_failure == "stop":
                raise self._sentence(failure) from failure
        time.sleep(self.wait)
        try:
            return _Answer(self._enough(query, k, barred, **SECOND_TRY), retried=True)
        except _Failed as failure:
            return _Answer([], failure)

    def _enough(
        self, query: np.ndarray, k: int, barred: frozenset[int], **changed: Any
    ) -> list[dict[str, Any]]:
        """Lines of an answer, each row once and none that is barred; asks for more while barred
        rows are why there are fewer than k.
        """
        wanted, enough = max(k, self.num_images or 4 * k), k + len(barred)
        while True:
            lines = self._post(query, wanted, **changed)
            different = {line["id"]: line for line in reversed(lines)}  # of doubles the first
            kept = [line for row, line in reversed(different.items()) if row not in barred]
            if len(kept) >= k or len(kept) == len(different) or wanted >= enough:
                return kept
            wanted = min(4 * wanted, enough)

    def _post(self, query: np.ndarray, wanted: int, **changed: Any) -> list[dict[str, Any]]:
        """One request: the lines of the server's answer, after a look at what they are."""
        fields = (
            self._fields
            | {"embedding_input": query.tolist(), "num_images": wanted, "num_result_ids": wanted}
            | changed
        )
        status, _, content = _request(
            self.url,
            time.monotonic() + self._limits.timeout,
            self._limits,
            json.dumps(fields).encode(),
        )
        if status != 200:
            raise _Failed(
                f"answered with HTTP {status} to a query of {len(query)} numbers in the index"
                f" {self.indice_name!r}"
            )
        try:
            lines = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Failed("did not answer with JSON") from error
        if not isinstance(lines, list) or not all(map(_is_line, lines)):
            raise _Failed("did not answer with a list of rows that have an id and a similarity")
        return lines

    def _count_failures(self, answers: list[_Answer]) -> None:
        self.failed = np.flatnonzero([answer.failure is not None for answer in answers])
        self.retried = np.flatnonzero([answer.retried for answer in answers])
        if len(self.failed):
            failure = answers[self.failed[0]].failure
            if len(self.failed) == len(answers):
                raise self._sentence(failure)
            warnings.warn(
                f"{len(self.failed)} of {len(answers)} queries failed twice and have no rows (the"
                f" service {failure}), where the published scripts take white pictures.",
                stacklevel=3,
            )

    def _sentence(self, failure: _Failed | None) -> PerceptError:
        return PerceptError(f"The retrieval service at {self.url} {failure}: {INSTEAD}.")


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("id")) is not int or not 0 <= line["id"] < 2**63:
        return False
    return type(line.get("similarity")) in (int, float) and math.isfinite(line["similarity"])


class ImageCache:
    """Files of pictures by the sha256 of their url, as they were received, and what could not be
    had in this session.

    Args:
        folder: of the files.

    Attributes: failures, why by url.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.failures = Path(folder), dict[str, str]()

    def path(self, url: str) -> Path:
        """Where the picture of a url lies, or would lie."""
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name


class FetchedImages(NamedTuple):
    """Pictures by their urls.

    images: (n, 3, size, size) float32 in [0, 1], grey (0.5) where there is none; ok: (n,) bool;
    reasons: n, "" where ok.
    """

    images: Tensor
    ok: np.ndarray
    reasons: list[str]


@dataclass
class _Fetcher:
    """Pictures within limits, from the cache or from where they lie."""

    cache: ImageCache
    size: int
    max_pixels: float
    workers: int
    limits: _Limits

    def many(
        self, urls: Sequence[Any], keep: bool = True
    ) -> tuple[dict[str, np.ndarray | None], dict[str, str]]:
        """By url: (size, size, 3) uint8 (None unless `keep`), and why not."""
        different = list(dict.fromkeys(url for url in urls if isinstance(url, str)))
        made = _in_parallel(
            self._one if keep else self._had, different, self.workers, "fetching pictures"
        )
        good = {
            url: picture
            for url, picture in zip(different, made, strict=True)
            if not isinstance(picture, _Failed)
        }
        bad = {
            url: str(picture)
            for url, picture in zip(different, made, strict=True)
            if isinstance(picture, _Failed)
        }
        self.cache.failures |= bad
        return good, bad

    def _had(self, url: str) -> _Failed | None:
        return found if isinstance(found := self._one(url), _Failed) else None

    def _one(self, url: str) -> np.ndarray | _Failed:
        if url in self.cache.failures:
            return _Failed(self.cache.failures[url])
        path = self.cache.path(url)
        try:
            with suppress(_Failed, FileNotFoundError):  # a file that is not whole is fetched again
                return self._picture(path.read_bytes())
            picture = self._picture(content := self._download(url))
        except _Failed as failure:
            return failure
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        return picture

    def _download(self, url: str) -> bytes:
        """The content behind a url and at most `REDIRECTS` redirects, all within one time."""
        deadline, place = time.monotonic() + self.limits.timeout, url
        for _ in range(REDIRECTS + 1):
            try:
                status, headers, content = _request(place, deadline, self.limits)
                if status == 200:
                    return content
                if status not in (301, 302, 303, 307, 308) or not headers["Location"]:
                    raise _Failed(f"answered with HTTP {status}")
                place = urljoin(place, headers["Location"])
            except _Failed as failure:
                raise (
                    failure if place == url else _Failed(f"leads to {place}, which {failure}")
                ) from failure
        raise _Failed(f"redirects more than {REDIRECTS} times")

    def _picture(self, content: bytes) -> np.ndarray:
        """(size, size, 3) uint8 of a file; how large the picture would be is read from its head,
        before it is unpacked.
        """
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as picture:
                width, height = picture.size
                if (
                    max(
                        width * height,
                        self.size**2 * max(width, height) / max(1, min(width, height)),
                    )
                    > self.max_pixels
                ):
                    raise _Failed(
                        f"holds a picture of {width} x {height} pixels, which is too large or too"
                        " narrow"
                    )
                picture.verify()
            made = decode_image(content, self.size)
        except Image.DecompressionBombError as error:
            raise _Failed("holds a picture that is far too large") from error
        except _Failed:
            raise
        except (
            Exception
        ) as error:  # a decoder may raise anything over a file that was made to break it
            raise _Failed("holds no picture that can be read") from error
        if made is None:
            raise _Failed("holds no picture that can be read")
        return made


def _fetcher(
    cache: ImageCache | str | Path,
    size: int,
    timeout: float,
    max_bytes: float,
    max_pixels: float,
    workers: int,
    allow_private: bool,
) -> _Fetcher:
    kept = cache if isinstance(cache, ImageCache) else ImageCache(cache)
    return _Fetcher(
        kept, size, max_pixels, workers, _Limits(timeout, max_bytes, allow_private, "image/")
    )


def fetch_images(
    urls: Sequence[Any],
    cache: ImageCache | str | Path,
    size: int = 512,
    timeout: float = 5.0,
    max_bytes: float = 20e6,
    max_pixels: float = 50e6,
    workers: int = 16,
    allow_private: bool = False,
) -> FetchedImages:
    """Pictures by their urls, in their order.

    Args:
        urls: n; what is no text counts as a url that cannot be had, and one that is there twice is
            fetched once.
        cache: folder, or a `ImageCache`, which also knows between two calls what could not be
            had.
        size: shorter side and centre crop, pixels (512 in MindEye's scripts).
        timeout: seconds that one picture may take in all, with its redirects. Only the look-up of a
            name is limited by the system instead.
        max_bytes: of a file.
        max_pixels: of a picture, as it is and after its shorter side is `size`.
        workers: pictures at a time.
        allow_private: also from addresses that are not public, e.g. a server of one's own.

    Returns:
        images, whether each was had, and why not. Grey pictures are RGB, transparency is dropped.
    """
    fetcher = _fetcher(cache, size, timeout, max_bytes, max_pixels, workers, allow_private)
    good, bad = fetcher.many(urls)
    images = torch.full((len(urls), 3, size, size), 0.5)
    for i, url in enumerate(urls):
        if isinstance(url, str) and url in good:
            images[i] = (
                torch.from_numpy(np.array(good[url])).permute(2, 0, 1).float() / 255
            )  # PIL's array cannot be written to
    reasons = [bad.get(url, "") if isinstance(url, str) else "is no url" for url in urls]
    return FetchedImages(images, np.array([not reason for reason in reasons], bool), reasons)


def decode_sent_images(metadata: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that a server sent with its answers, in base64, as clip-retrieval does where the
    pictures lie on its own disk.

    Args:
        metadata: a line a row; `image` is base64.
        size: shorter side and centre crop, pixels.

    Returns:
        (rows, size, size, 3) uint8, grey where there is none, and (rows,) whether there is one.
    """
    return stack_images(
        [
            decode_image(base64.b64decode(text), size) if isinstance(text, str) else None
            for text in metadata["image"]
        ],
        size,
    )


def select_available_images(
    urls_by_query: Sequence[Sequence[Any]],
    n: int,
    cache: ImageCache | str | Path,
    size: int = 512,
    timeout: float = 5.0,
    max_bytes: float = 20e6,
    max_pixels: float = 50e6,
    workers: int = 16,
    allow_private: bool = False,
) -> np.ndarray:
    """For every query the first n pictures of its list that can be had, as MindEye's scripts take
    them (n = 16).

    In rounds: each one tries the next n urls of all queries that have too few, so that it is
    parallel and one dead url holds up nobody. The pictures are in the cache then, and
    `fetch_images` reads them from there; they are not returned, as 982 x 16 of them would take 49
    GB.

    Args:
        urls_by_query: a list of urls for each query, best first.
        n: pictures a query.
        cache, size, timeout, max_bytes, max_pixels, workers, allow_private: as `fetch_images`.

    Returns:
        (queries, n) int64 places in the lists, ascending; -1 where there are fewer.

    Raises:
        PerceptError: n below 1.
    """
    if n < 1:
        raise PerceptError(f"{n} pictures a query were asked for: ask for at least one.")
    fetcher = _fetcher(cache, size, timeout, max_bytes, max_pixels, workers, allow_private)
    had: list[list[int]] = [[] for _ in urls_by_query]
    for start in range(0, max(map(len, urls_by_query), default=0), n):
        tried = {
            q: urls[start : start + n]
            for q, urls in enumerate(urls_by_query)
            if len(had[q]) < n and start < len(urls)
        }
        if not tried:
            break
        good, _ = fetcher.many([url for urls in tried.values() for url in urls], keep=False)
        for q, urls in tried.items():
            had[q] += [
                start + i for i, url in enumerate(urls) if isinstance(url, str) and url in good
            ]
    return np.array([(places + [-1] * n)[:n] for places in had], np.int64).reshape(len(had), n)
