"""What is fetched: bundles of files, patterns for the files of a repository, single files."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 2**17  # the most that a broken connection to S3 costs

# bytes up to which the checksum of a file that is there is computed again at every call
ALWAYS_CHECKED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FilePattern:
    """Files of a repository.

    Attributes:
        description: in words, for the sentence when there are none.
        folder: what is listed, with all below it; "" is the top level alone, "**" everything.
        pattern: regular expression for the whole path; a group `n` numbers files, of which none may
            be missing.
        local_path: template for the path below the local folder.
        optional: whether it is left out where there is no such file.
    """

    description: str
    folder: str
    pattern: str
    local_path: str = r"\g<0>"
    optional: bool = False


@dataclass(frozen=True)
class Bundle:
    """Files that belong together.

    Attributes:
        title: in words.
        kind: "dataset" or "model" of the hub, "bucket" of S3, or "web" for plain addresses.
        repo: id of the repository, name of the bucket, or address without https://.
        folder: below HOME, where the recipes look for the files; "" is the hub's cache, in its own
            layout.
        patterns: which files, called with `subj` and the bundle's options, which are its other
            keywords.
        terms: one sentence on whose they are and what may be done with them.
        folder_parameter: parameter that puts them elsewhere.
        revision: branch, tag or commit.
        optional: whether it is left out of a recipe where the subject has none.
    """

    title: str
    kind: str
    repo: str
    folder: str
    patterns: Callable[..., list[FilePattern]]
    terms: str
    folder_parameter: str = ""
    revision: str = "main"
    optional: bool = False

    @property
    def is_of_subjects(self) -> bool:
        """Whether each subject has files of its own."""
        return self.folder_parameter in ("data_path", "cache_dir") or self.optional

    @property
    def in_hub_cache(self) -> bool:
        """Whether the files go into the hub's cache, in its layout."""
        return not self.folder and self.kind != "web"

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options, and their defaults."""
        keywords = inspect.signature(self.patterns).parameters
        return {name: keyword.default for name, keyword in keywords.items() if name != "subj"}


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    Attributes:
        kind, repo, revision, path: as for Bundle; of a mirror that is a folder, `kind` is "folder"
            and `path` absolute.
        endpoint: address of a mirror, or "".
        local: where it goes.
        size: bytes.
        checksum: "sha256:..." (or its beginning), "git:..." (SHA-1 of a git blob), "md5:...", or ""
            where the server gives none.
    """

    kind: str
    repo: str
    revision: str
    path: str
    endpoint: str
    local: Path
    size: int
    checksum: str

    @property
    def part(self) -> Path:
        """The file that collects what has been fetched so far."""
        return self.local.with_name(f"{self.local.name}.part")

    @property
    def fetched_bytes(self) -> int:
        """Bytes that need not be fetched any more."""
        if self.is_complete:
            return self.size
        if not self.part.exists():
            return 0
        return min(self.part.stat().st_size, self.size)

    @property
    def is_complete(self) -> bool:
        """Whether it lies in its place with the right size and, where that is computed quickly, the
        right checksum.
        """
        if not self.local.is_file() or self.local.stat().st_size != self.size:
            return False
        return self.size > ALWAYS_CHECKED_BYTES or has_checksum(self.local, self.checksum)


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has a checksum; always where there is none to compare with ("")."""
    if not checksum:
        return True
    kind, _, expected = checksum.partition(":")
    algorithm = "sha1" if kind == "git" else kind
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(8 * CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest().startswith(expected)
