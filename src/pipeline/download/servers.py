"""The places that files come from: the hub, S3, and folders; what they hold, and its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from src.pipeline.download.errors import explain_errors
from src.pipeline.download.files import CHUNK_BYTES, Bundle, RemoteFile
from src.utils import require_extra

TIMEOUT_SECONDS = 30.0  # without a byte

S3_REGION = "us-east-2"  # NSD's

LOCAL_COMMIT = "0" * 40  # stands for the commit of a model that came from a folder

TOP_LEVEL = ("", "**")  # folders of a FilePattern that are the repository itself


class Entry(NamedTuple):
    """A file of a repository: its path there, its bytes, and its checksum or ""."""

    path: str
    size: int
    checksum: str


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
        # A token of the user's is for the hub (or for what HF_ENDPOINT names), not for a mirror
        # that was named on the way.
        token = False if endpoint else None
        self.api = HfApi(endpoint=endpoint or None, token=token)
        with explain_errors(f"{self.kind} {self.label}"):
            info = self.api.repo_info(self.repo, repo_type=self.kind, revision=revision)
        self.commit = info.sha or revision

    def list_folder(self, folder: str) -> list[Entry]:
        """The files in a folder; "" is the top level alone, "**" everything."""
        with explain_errors(f"{self.kind} {self.label}"):
            try:
                tree = self.api.list_repo_tree(
                    self.repo,
                    None if folder in TOP_LEVEL else folder,
                    recursive=bool(folder),
                    revision=self.commit,
                    repo_type=self.kind,
                )
                files = [file for file in tree if isinstance(file, RepoFile)]
            except EntryNotFoundError:
                return []
        entries = []
        for file in files:
            checksum = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            entries.append(Entry(file.path, file.size, checksum))
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
        with explain_errors(f"bucket {self.label}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.label, Prefix=f"{folder}/", Delimiter="/"
            )
            objects = [entry for page in pages for entry in page.get("Contents", [])]
        entries = []
        for entry in objects:
            tag = entry["ETag"].strip('"')
            is_md5 = re.fullmatch("[0-9a-f]{32}", tag)  # not of what was uploaded in parts
            entries.append(Entry(entry["Key"], entry["Size"], f"md5:{tag}" if is_md5 else ""))
        return entries

    def locate(self, path: str) -> str:
        """The key in the bucket."""
        return path


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
        paths = top.rglob("*") if folder else top.glob("*")
        return [
            Entry(str(path.relative_to(self.root)), path.stat().st_size, "")
            for path in sorted(paths)
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
        answer = client.get_object(Bucket=file.repo, Key=file.path, **headers)
        offset = start if "ContentRange" in answer else 0
        with closing(answer["Body"]) as body:
            yield offset, body.iter_chunks(CHUNK_BYTES)
    else:
        url = hf_hub_url(
            file.repo,
            file.path,
            repo_type=file.kind,
            revision=file.revision,
            endpoint=file.endpoint or None,
        )
        headers |= build_hf_headers(token=False if file.endpoint else None)
        headers["Accept-Encoding"] = "identity"
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
            hf_raise_for_status(response)
            offset = start if response.status_code == 206 else 0
            yield offset, response.iter_bytes()  # as they arrive: a break costs nothing
