"""Fetching images by their urls, which strangers wrote.

Only http and https, only from public addresses (checked for every redirect anew), within a time
that holds for an image as a whole, of limited size, and only what is an image by its type and by
its content. An image that was fetched once is in a cache.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from src.files import images as image_files
from src.search.http_client import RequestFailed, RequestLimits, request, run_in_parallel
from src.search.images import decode_image, fit_image, stack_images
from src.search.tables import clean_text
from src.utils import PerceptError, atomic

MAX_REDIRECTS = 5

# What the web shows. Decoders of other formats, which few test with hostile files, stay shut.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageCache:
    """Image files by the sha256 of their url, as they were received.

    Args:
        folder: of the files.

    Attributes:
        failures: by url, why an image could not be fetched in this session.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.failures = Path(folder), dict[str, str]()

    def path(self, url: str) -> Path:
        """Return the path of the image of a url, which need not exist."""
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name


@dataclass(frozen=True)
class FetchOptions:
    """How images are fetched.

    Attributes:
        size: shorter side and centre crop, pixels (512 in MindEye's scripts).
        timeout: seconds that one image may take in all, with its redirects. Only the look-up of a
            name is limited by the system instead.
        max_bytes: of a file.
        max_pixels: of an image, as it is and after its shorter side is `size`.
        workers: images at a time.
        allow_private: also from addresses that are not public, e.g. a server of your own.
    """

    size: int = 512
    timeout: float = 5.0
    max_bytes: float = 20e6
    max_pixels: float = 50e6
    workers: int = 16
    allow_private: bool = False


@dataclass(frozen=True)
class FetchedImages:
    """Images by their urls.

    Attributes:
        images: (n, 3, size, size) float32 in [0, 1], grey (0.5) where there is none, to fill the
            array: it is not to be scored.
        ok: (n,) bool, whether there is one.
        reasons: n texts, why there is none; "" where there is one.
    """

    images: Tensor
    ok: np.ndarray
    reasons: list[str]


def fetch_images(
    urls: Sequence[Any], cache: ImageCache | str | Path, options: FetchOptions | None = None
) -> FetchedImages:
    """Fetch images by their urls, in their order.

    Every kind of pixels becomes RGB, see `src.files.images`.

    Args:
        urls: n. What is no text counts as a url that cannot be fetched; the same url is fetched
            once.
        cache: folder, or an `ImageCache`, which also remembers between two calls what could not be
            fetched.
        options: by default those of `FetchOptions`.
    """
    fetcher = _Fetcher(cache, options)
    images_by_url, failures = fetcher.fetch_all(urls)
    size = fetcher.options.size
    images = torch.full((len(urls), 3, size, size), 0.5)
    reasons = []
    for position, url in enumerate(urls):
        if not isinstance(url, str):
            reasons.append("is no url")
            continue
        reasons.append(failures.get(url, ""))
        pixels = images_by_url.get(url)
        if pixels is not None:  # copied, as PIL's array cannot be written to
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
            images[position] = image.float() / 255
    return FetchedImages(images, np.array([not reason for reason in reasons], bool), reasons)


def select_available_images(
    urls_by_query: Sequence[Sequence[Any]],
    n: int,
    cache: ImageCache | str | Path,
    options: FetchOptions | None = None,
) -> np.ndarray:
    """Select for every query the first n images of its list that can be fetched.

    MindEye's scripts do so (n = 16). Each round tries the next n urls of all queries that have too
    few, so that rounds are parallel and one dead url does not delay other queries. Images are in
    the cache afterwards, and `fetch_images` reads them from there; they are not returned, as
    982 x 16 of them would take 49 GB.

    Args:
        urls_by_query: a list of urls for each query, best first.
        n: images a query.
        cache: as in `fetch_images`.
        options: as in `fetch_images`.

    Returns:
        (queries, n) int64 positions in the lists, ascending; -1 where there are fewer.

    Raises:
        PerceptError: n below 1.
    """
    if n < 1:
        raise PerceptError(f"{n} images a query were asked for: ask for at least one.")
    fetcher = _Fetcher(cache, options)
    selected: list[list[int]] = [[] for _ in urls_by_query]
    longest = max(map(len, urls_by_query), default=0)
    for start in range(0, longest, n):
        tried = {}
        for q, urls in enumerate(urls_by_query):
            if len(selected[q]) < n and start < len(urls):
                tried[q] = urls[start : start + n]
        if not tried:
            break
        available = fetcher.find_available([url for urls in tried.values() for url in urls])
        for q, urls in tried.items():
            for position, url in enumerate(urls, start):
                if isinstance(url, str) and url in available:
                    selected[q].append(position)
    padded = [(positions + [-1] * n)[:n] for positions in selected]
    return np.array(padded, np.int64).reshape(len(selected), n)


def decode_sent_images(metadata: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode images that a server sent with its answers.

    clip-retrieval sends them in base64 if the images lie on its own disk.

    Args:
        metadata: a line a row; the column `image` is base64.
        size: shorter side and centre crop, pixels.

    Returns:
        Images (rows, size, size, 3) uint8, grey where there is none, and whether there is one
        (rows,).
    """
    images = []
    for text in metadata["image"]:
        try:
            content = base64.b64decode(text) if isinstance(text, str) else b""
        except ValueError:  # no base64
            content = b""
        images.append(decode_image(content, size))
    return stack_images(images, size)


class _Fetcher:
    """Loads images from the cache, or fetches them within limits."""

    def __init__(self, cache: ImageCache | str | Path, options: FetchOptions | None):
        self.cache = cache if isinstance(cache, ImageCache) else ImageCache(cache)
        self.options = options or FetchOptions()
        self.limits = RequestLimits(
            self.options.timeout, self.options.max_bytes, self.options.allow_private, "image/"
        )

    def fetch_all(self, urls: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return, by url, images (size, size, 3) uint8, and why others could not be fetched."""
        unique_urls = _unique_texts(urls)
        outcomes = self._run(self._fetch, unique_urls)
        images, failures = {}, {}
        for url, outcome in zip(unique_urls, outcomes, strict=True):
            if isinstance(outcome, RequestFailed):
                failures[url] = str(outcome)
            else:
                images[url] = outcome
        self.cache.failures |= failures
        return images, failures

    def find_available(self, urls: Sequence[Any]) -> set[str]:
        """Return the urls whose images can be fetched; they are in the cache afterwards."""
        unique_urls = _unique_texts(urls)
        failures = self._run(self._find_failure, unique_urls)
        available = set()
        for url, failure in zip(unique_urls, failures, strict=True):
            if failure is None:
                available.add(url)
            else:
                self.cache.failures[url] = failure
        return available

    def _run(self, work: Any, urls: list[str]) -> list[Any]:
        return run_in_parallel(work, urls, self.options.workers, "fetching images")

    def _find_failure(self, url: str) -> str | None:
        outcome = self._fetch(url)
        return str(outcome) if isinstance(outcome, RequestFailed) else None

    def _fetch(self, url: str) -> np.ndarray | RequestFailed:
        if url in self.cache.failures:
            return RequestFailed(self.cache.failures[url])
        path = self.cache.path(url)
        try:
            # a cached file that is incomplete is fetched again
            with suppress(RequestFailed, OSError):
                return self._decode(path.read_bytes())
            content = self._download(url)
            pixels = self._decode(content)
        except RequestFailed as failure:
            return failure
        with atomic(path) as temporary:
            temporary.write_bytes(content)
        return pixels

    def _download(self, url: str) -> bytes:
        """Return the content behind a url and at most MAX_REDIRECTS redirects, within one time."""
        deadline, address = time.monotonic() + self.limits.timeout, url
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = request(address, deadline, self.limits)
                if response.status == 200:
                    return response.content
                location = response.headers["Location"]
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    raise RequestFailed(f"answered with HTTP {response.status}")
                address = _join_address(address, location)
            except RequestFailed as failure:
                if address == url:
                    raise
                raise RequestFailed(f"leads to {address}, which {failure}") from failure
        raise RequestFailed(f"redirects more than {MAX_REDIRECTS} times")

    def _decode(self, content: bytes) -> np.ndarray:
        """Decode an image file into (size, size, 3) uint8.

        Its size is read from its head before it is unpacked.
        """
        size = self.options.size
        try:
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                self._check_size(*image.size)
            pixels = image_files.decode_image(
                content, "it", self.options.max_pixels, size, formats=FORMATS
            )
        except RequestFailed:
            raise
        except Image.DecompressionBombError as error:
            raise RequestFailed("holds an image that is far too large") from error
        # a decoder may raise anything over a file that was made to break it
        except Exception as error:
            raise RequestFailed("holds no image that can be read") from error
        return fit_image(pixels, size)

    def _check_size(self, width: int, height: int) -> None:
        longer, shorter = max(width, height), max(1, min(width, height))
        resized = self.options.size**2 * longer / shorter
        if max(width * height, resized) > self.options.max_pixels:
            raise RequestFailed(
                f"holds an image of {width} x {height} pixels, which is too large or too narrow"
            )


def _join_address(address: str, location: str) -> str:
    """Address that a redirect leads to, which may be relative."""
    try:
        return urljoin(address, location)
    except ValueError as error:
        place = clean_text(location[:100])
        raise RequestFailed(f"leads to {place}, which is no http or https address") from error


def _unique_texts(urls: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(url for url in urls if isinstance(url, str)))
