"""The files of a bundle, as a server or a mirror has them now."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from src.pipeline.download.answers import Entry
from src.pipeline.download.files import Bundle, FilePattern, RemoteFile
from src.pipeline.download.servers import (
    TOP_LEVEL,
    BucketServer,
    FolderServer,
    HubServer,
    Server,
    WebServer,
)
from src.utils import PerceptError, UsageError, check_name, find_fault_of_name

SUBJECTS = range(1, 9)  # of NSD


class FilesNotFound(PerceptError):
    """A repository does not have the files that a pattern describes."""


def list_files(
    bundle: Bundle,
    folder: Path,
    *,
    subj: int = 1,
    mirror: str = "",
    revision: str = "",
    **options: Any,
) -> list[RemoteFile]:
    """The files of a bundle with their sizes, checksums and places, as the server (or the mirror)
    has them now.

    Args:
        bundle: which.
        folder: where the files are to lie.
        subj: number of the subject, 1 to 8.
        mirror: address or folder that stands for the original; "" for the original.
        revision: branch, tag or commit of the hub, by default the bundle's.
        options: those of the bundle.

    Raises:
        PerceptError: where the server cannot be reached or refuses, and where something is missing,
            saying what.
    """
    if revision:
        check_name(revision, "revision", parts=4)
    if subj not in SUBJECTS:
        raise UsageError(f"subj is {subj}: NSD has the subjects 1 to 8.")
    unknown = sorted(set(options) - set(bundle.options))
    if unknown:
        raise UsageError(
            f"'{unknown[0]}' is no option of {bundle.title}: choose among"
            f" {', '.join(['subj', *bundle.options])}."
        )
    server = open_server(bundle, mirror, revision or bundle.revision)
    target = folder
    if bundle.in_hub_cache:
        target = find_cache_folder(folder, bundle.repo) / "snapshots" / server.commit
    entries: dict[str, list[Entry]] = {}
    files: dict[str, RemoteFile] = {}
    for pattern in bundle.patterns(subj=subj, **options):
        if pattern.folder not in entries:
            entries[pattern.folder] = server.list_folder(pattern.folder)
        if pattern.optional and not _has_any(pattern, entries[pattern.folder]):
            continue
        for match, entry in _match_entries(pattern, entries[pattern.folder], server.label):
            files[entry.path] = RemoteFile(
                server.kind,
                bundle.repo,
                server.commit,
                server.locate(entry.path),
                server.endpoint,
                target / _check_path(match.expand(pattern.local_path), server.label),
                entry.size,
                entry.checksum,
            )
    if not bundle.in_hub_cache:
        return list(files.values())
    return [file for path, file in files.items() if not _is_superseded(path, files)]


def _check_path(path: str, label: str) -> str:
    """A path below a folder, as a server tells it.

    Raises:
        PerceptError: if it may lead out of the folder, or cannot be the name of a file.
    """
    fault = next(filter(None, map(find_fault_of_name, path.split("/"))), "")
    if fault:
        raise PerceptError(
            f"{label} lists the file {path[:80]!r}, which {fault}: take another mirror."
        )
    return path


def open_server(bundle: Bundle, mirror: str, revision: str) -> Server:
    """The place that a bundle's files come from.

    Args:
        bundle: which.
        mirror: address or folder that stands for the original; "" for the original.
        revision: branch, tag or commit of the hub.

    Raises:
        PerceptError: if a mirror is neither an address nor a folder, or cannot be reached.
    """
    is_address = re.match(r"https?://", mirror) is not None
    if mirror and not is_address:
        return FolderServer(_find_mirror_folder(mirror, bundle))
    endpoint = mirror.rstrip("/")
    if bundle.kind == "bucket":
        return BucketServer(bundle, endpoint)
    if bundle.kind == "web":
        return WebServer(bundle, endpoint)
    return HubServer(bundle, revision, endpoint)


def _find_mirror_folder(mirror: str, bundle: Bundle) -> Path:
    """The folder of a mirror that stands for a repository: one of its name, or the mirror."""
    top = Path(mirror).expanduser().resolve()
    if not top.is_dir():
        raise UsageError(
            f"The mirror {mirror} is neither a folder nor an address that begins with http:// or"
            " https://: correct it."
        )
    return top / bundle.repo if (top / bundle.repo).is_dir() else top


def _has_any(pattern: FilePattern, entries: list[Entry]) -> bool:
    """Whether there is a file that a pattern describes."""
    return any(re.fullmatch(pattern.pattern, entry.path) for entry in entries)


def _match_entries(
    pattern: FilePattern, entries: list[Entry], label: str
) -> Iterator[tuple[re.Match[str], Entry]]:
    """Entries that a pattern describes, each with its match.

    Raises:
        FilesNotFound: if there are none.
        PerceptError: if one of several that are numbered is missing.
    """
    matches = [(re.fullmatch(pattern.pattern, entry.path), entry) for entry in entries]
    matching = [(match, entry) for match, entry in matches if match]
    if not matching:
        folder = "its top level" if pattern.folder in TOP_LEVEL else pattern.folder
        raise FilesNotFound(
            f"{label} has no {pattern.description} (sought in {folder}): check subject, options and"
            " revision, or what the mirror holds."
        )
    if "n" in matching[0][0].groupdict():
        numbers = {int(match["n"]) for match, _ in matching}
        missing = sorted(set(range(max(numbers) + 1)) - numbers)
        if missing:
            raise PerceptError(
                f"{label} has {pattern.description} up to number {max(numbers)}, but not number"
                f" {missing[0]}: complete it there, or take another mirror."
            )
    yield from matching


def _is_superseded(path: str, paths: Collection[str]) -> bool:
    """Whether a model's file is a .bin beside safetensors, which are read first and cannot run
    code.
    """
    if not path.endswith((".bin", ".bin.index.json")):
        return False
    folder = path.rpartition("/")[0]
    return any(
        other.endswith(".safetensors") and other.rpartition("/")[0] == folder for other in paths
    )


def find_cache_folder(cache: Path, repo: str) -> Path:
    """The folder of a model in the hub's cache."""
    return cache / f"models--{repo.replace('/', '--')}"
