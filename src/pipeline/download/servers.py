"""The places that files come from: the hub, S3, and folders; what they hold, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from src.pipeline.download.answers import (
    ANSWER_SECONDS,
    MAX_PAGES,
    TIMEOUT_SECONDS,
    Entry,
    begin_within,
    open_answer,
    read_commit,
    read_entries,
    read_json_pages,
)
from src.pipeline.download.errors import explain_errors
from src.pipeline.download.files import CHUNK_BYTES, Bundle, RemoteFile
from src.utils import PerceptError, require_extra

S3_REGION = "us-east-2"  # NSD's

LOCAL_COMMIT = "0" * 40  # stands for the commit of a model that came from a folder

TOP_LEVEL = ("", "**")  # folders of a FilePattern that are the repository itself


class Server(Protocol):
    """A place that holds the files of one bundle.

    Attributes:
        kind: of the files that come from it, as in `RemoteFile`.
        endpoint: address of a mirror, or "".
        commit: what the files belong to, "" for a bucket.
        label: what it is called in a sentence.
    """

    kind: str
    endpoint: str
    commit: str
    label: str

    def list_folder(self, folder: str) -> list[Entry]:
        """The files in a folder of the repository, with all below it."""

    def locate(self, path: str) -> str:
        """What a file is asked for with."""


class HubServer:
    """A repository of the hub, or of a mirror that speaks its protocol."""

    def __init__(self, bundle: Bundle, revision: str, endpoint: str):
        self.repo, self.kind, self.endpoint = bundle.repo, bundle.kind, endpoint
        self.label = f"{bundle.repo} at {revision}"
        self.subject = f"{self.kind} {self.label}"
        address = endpoint or constants.ENDPOINT
        self.url = f"{address}/api/{self.kind}s/{self.repo}"
        # A token of the user's is for the hub (or for what HF_ENDPOINT names), not for a mirror
        # that was named on the way.
        self.headers = build_hf_headers(token=False if endpoint else None)
        with explain_errors(self.subject):
            validate_repo_id(self.repo)
            address = f"{self.url}/revision/{quote(revision, safe='')}"
            answer = next(read_json_pages(address, self.headers, self.subject))
        self.commit = read_commit(answer, self.subject)

    def list_folder(self, folder: str) -> list[Entry]:
        """The files in a folder; "" is the top level alone, "**" everything."""
        path = "" if folder in TOP_LEVEL else f"/{quote(folder, safe='')}"
        address = f"{self.url}/tree/{self.commit}{path}?recursive={bool(folder)}&expand=False"
        entries: list[Entry] = []
        with explain_errors(self.subject):
            try:
                for page in read_json_pages(address, self.headers, self.subject):
                    entries += read_entries(page, self.subject)
            except EntryNotFoundError:
                return []
        return entries

    def locate(self, path: str) -> str:
        """The path in the repository."""
        return path


class BucketServer:
    """A bucket of S3, or of a mirror that speaks its protocol."""

    kind = "bucket"
    commit = ""

    def __init__(self, bundle: Bundle, endpoint: str):
        self.label, self.endpoint = bundle.repo, endpoint
        self.client = make_s3_client(endpoint)

    def list_folder(self, folder: str) -> list[Entry]:
        """The files in a folder, without those of folders below it."""
        subject = f"bucket {self.label}"
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.label, Prefix=f"{folder}/", Delimiter="/"
        )
        waiting = iter(pages)
        entries: list[Entry] = []
        for _ in range(MAX_PAGES):
            with explain_errors(subject):
                page = begin_within(ANSWER_SECONDS, lambda: next(waiting, None), subject)
            if page is None:
                return entries
            entries += [self._read_entry(content) for content in page.get("Contents", [])]
        raise PerceptError(f"{subject} lists more than {MAX_PAGES} pages: take another mirror.")

    def _read_entry(self, content: dict[str, Any]) -> Entry:
        """One file of a listing."""
        path, size, tag = (content.get(name) for name in ("Key", "Size", "ETag"))
        if not isinstance(path, str) or not isinstance(size, int) or size < 0:
            raise PerceptError(
                f"The listing of bucket {self.label} has a file without its path or size"
                f" ({repr(content)[:120]}): take another mirror."
            )
        tag = str(tag).strip('"')
        is_md5 = re.fullmatch("[0-9a-f]{32}", tag)  # not of what was uploaded in parts
        return Entry(path, size, f"md5:{tag}" if is_md5 else "")

    def locate(self, path: str) -> str:
        """The key in the bucket."""
        return path


class WebServer:
    """Plain addresses of files, or a mirror that has them under <address>/<host>/<path>."""

    kind = "web"
    commit = ""

    def __init__(self, bundle: Bundle, endpoint: str):
        self.label, self.endpoint = bundle.repo, endpoint
        self.address = f"{endpoint}/{bundle.repo}" if endpoint else f"https://{bundle.repo}"

    def list_folder(self, folder: str) -> list[Entry]:
        """The file of a name, with the beginning of its SHA-256 where the name holds that."""
        url = self.locate(folder)
        with explain_errors(url), open_answer(url, {}, url) as response:
            size = response.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise PerceptError(f"The server does not tell the size of {url}: take a mirror.")
        digest = re.search(r"-([0-9a-f]{8,})\.", folder)
        return [Entry(folder, int(size), f"sha256:{digest[1]}" if digest else "")]

    def locate(self, path: str) -> str:
        """The whole address."""
        return f"{self.address}/{quote(path)}"


class FolderServer:
    """A mirror that is a folder on this machine."""

    kind = "folder"
    commit = LOCAL_COMMIT
    endpoint = ""

    def __init__(self, root: Path):
        self.root, self.label = root, str(root)

    def list_folder(self, folder: str) -> list[Entry]:
        """The files in a folder; "" is the top level alone, "**" everything."""
        top = self.root if folder in TOP_LEVEL else self.root / folder
        with explain_errors(f"The mirror {top}"):
            paths = sorted(top.rglob("*") if folder else top.glob("*"))
            if top.is_file():
                paths = [top]
            return [
                Entry(str(path.relative_to(self.root)), path.stat().st_size, "")
                for path in paths
                if path.is_file()
            ]

    def locate(self, path: str) -> str:
        """The absolute path."""
        return str(self.root / path)


def make_s3_client(endpoint: str) -> Any:
    """A client of S3 without credentials.

    Raises:
        PerceptError: if boto3 is not installed.
    """
    boto3 = require_extra("boto3", "nsd")
    botocore = require_extra("botocore", "nsd")
    client = require_extra("botocore.client", "nsd")
    options = client.Config(
        signature_version=botocore.UNSIGNED,
        s3={"addressing_style": "path"} if endpoint else {},
        read_timeout=TIMEOUT_SECONDS,
        connect_timeout=TIMEOUT_SECONDS,
        retries={"max_attempts": 2},
    )
    address = endpoint or None
    return boto3.client("s3", region_name=S3_REGION, endpoint_url=address, config=options)


@contextmanager
def open_remote(file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Bytes of a remote file from `start` on, and where they really begin (at 0 where the server
    cannot do better).
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    if file.kind == "folder":
        with open(file.path, "rb") as source:
            source.seek(start)
            yield start, iter(lambda: source.read(CHUNK_BYTES), b"")
    elif file.kind == "bucket":
        client = make_s3_client(file.endpoint)
        answer = begin_within(
            ANSWER_SECONDS,
            lambda: client.get_object(Bucket=file.repo, Key=file.path, **headers),
            file.path,
        )
        with closing(answer["Body"]) as body:
            offset = _read_offset(file, start, answer.get("ContentRange"))
            yield offset, body.iter_chunks(CHUNK_BYTES)
    else:
        url = file.path
        if file.kind != "web":
            url = hf_hub_url(
                file.repo,
                file.path,
                repo_type=file.kind,
                revision=file.revision,
                endpoint=file.endpoint or None,
            )
            headers |= build_hf_headers(token=False if file.endpoint else None)
        with open_answer(url, headers, file.path) as response:
            content_range = response.headers.get("Content-Range", "")
            offset = 0
            if response.status_code == 206:
                offset = _read_offset(file, start, content_range)
            yield offset, response.iter_raw()  # as they arrive: a break costs nothing


def _read_offset(file: RemoteFile, start: int, content_range: str | None) -> int:
    """Where an answer begins, by its header Content-Range; without one, at 0.

    Raises:
        PerceptError: if it is another part than was asked for.
    """
    if content_range is None:
        return 0
    if not content_range.startswith(f"bytes {start}-"):
        raise PerceptError(
            f"The server was asked for {file.path} from byte {start} on, and sends"
            f" {content_range[:40]!r}: take another mirror, or remove {file.part}."
        )
    return start
