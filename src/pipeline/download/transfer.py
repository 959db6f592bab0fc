"""Fetching files: some at a time, resumed where they stopped, checked when they are whole."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from src.files.ownership import lock_folder
from src.pipeline.download.answers import SpeedCheck
from src.pipeline.download.errors import (
    explain_errors,
    is_temporary,
    list_transfer_errors,
    read_status,
)
from src.pipeline.download.files import RemoteFile, has_checksum
from src.pipeline.download.servers import open_remote
from src.utils import PerceptError

FILES_AT_ONCE = 4

MAX_ATTEMPTS = 4  # connections that bring nothing, before giving up

WAIT_SECONDS = 1.0  # before the second attempt, doubled each time

SPARE_BYTES = 2**28  # of disk that are left alone


def fetch_files(files: list[RemoteFile], folder: Path) -> None:
    """Fetch the files that are not complete; of several processes one does, and the others find it
    done.

    An interrupt, or the first file that fails, ends all transfers; the parts stay and are continued
    by the next call.

    Raises:
        PerceptError: for a full disk, and as `_fetch_file`.
    """
    with explain_errors(f"The folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "downloading", wait=True):
        with explain_errors(f"The folder {folder}"):
            missing = [file for file in files if not file.is_complete]
            check_space(missing)
        stop = threading.Event()
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            try:
                futures = [pool.submit(_fetch_file, file, stop) for file in missing]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def check_space(files: Iterable[RemoteFile]) -> None:
    """Refuse to begin what the disks cannot hold; files of a mirror on the same disk are linked and
    take no space.

    Raises:
        PerceptError: with the space needed and the space that is free.
    """
    needed: dict[int, int] = {}  # bytes by disk
    places: dict[int, Path] = {}  # a folder on each disk
    for file in files:
        place = next(folder for folder in file.local.parents if folder.exists())
        disk = place.stat().st_dev
        if file.kind == "folder" and os.stat(file.path).st_dev == disk:
            continue
        places[disk] = place
        needed[disk] = needed.get(disk, 0) + file.size - file.fetched_bytes
    for disk, size in needed.items():
        free = shutil.disk_usage(places[disk]).free
        if size and size + SPARE_BYTES > free:
            raise PerceptError(
                f"No space for {size / 1e9:.2f} GB on the disk of {places[disk]}, where"
                f" {free / 1e9:.2f} GB are free: free some, or choose another folder."
            )


def _fetch_file(file: RemoteFile, stop: threading.Event) -> None:
    """Bring one file into its place.

    Raises:
        PerceptError: with a sentence; the part stays, except when its checksum or size is wrong.
    """
    with explain_errors(file.path):
        _fetch_into_place(file, stop)


def _fetch_into_place(file: RemoteFile, stop: threading.Event) -> None:
    """Bring one file into its place, with the errors of the libraries."""
    file.local.parent.mkdir(parents=True, exist_ok=True)
    if file.kind == "folder" and _link_file(file):
        return
    file.part.touch()
    if file.part.stat().st_size > file.size:
        file.part.write_bytes(b"")  # of another version
    bar = tqdm(
        total=file.size,
        initial=file.part.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=file.local.name,
        mininterval=0.5 if sys.stderr.isatty() else 5,
    )
    with bar:
        _fill_part(file, stop, bar)
    if stop.is_set():
        return
    size = file.part.stat().st_size
    if size != file.size:
        _discard_part(file, f"{size} bytes instead of {file.size}")
    if not has_checksum(file.part, file.checksum):
        kind = file.checksum.partition(":")[0]
        _discard_part(file, f"not the {kind} sum that the server tells")
    os.replace(file.part, file.local)


def _discard_part(file: RemoteFile, reason: str) -> None:
    """Remove what arrived of a file.

    Raises:
        PerceptError: with the reason.
    """
    file.part.unlink()
    raise PerceptError(
        f"What arrived of {file.path} has {reason} and was removed: run this again, or take another"
        " mirror."
    )


def _link_file(file: RemoteFile) -> bool:
    """Link a file of a mirror on the same disk instead of copying it; returns whether that was
    possible.
    """
    temporary = file.local.with_name(f".{file.local.name}.{os.getpid()}.link")
    try:
        os.link(Path(file.path).resolve(), temporary)
        os.replace(temporary, file.local)
    except OSError:  # another disk, or one without links
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _fill_part(file: RemoteFile, stop: threading.Event, bar: Any) -> None:
    """Fetch into the part until it is whole, over as many connections as that takes while each
    brings something.
    """
    attempts = 0  # in a row that brought nothing
    while (size := file.part.stat().st_size) < file.size and not stop.is_set():
        last_error: BaseException | None = None
        try:
            _append_to_part(file, stop, bar)
        except list_transfer_errors() as error:
            if not is_temporary(error):
                raise
            last_error = error
        new_size = file.part.stat().st_size
        attempts = attempts + 1 if new_size <= size else 0
        if attempts >= MAX_ATTEMPTS:
            if last_error is not None and read_status(last_error) != 416:
                raise last_error
            raise PerceptError(
                f"The server ended {file.path} after {new_size} of {file.size} bytes: run this"
                " again, it goes on where it stopped; if that does not help, take another mirror"
                f" and remove {file.part}."
            )
        if attempts:
            stop.wait(WAIT_SECONDS * 2 ** (attempts - 1))


def _append_to_part(file: RemoteFile, stop: threading.Event, bar: Any) -> None:
    """Add to the part what one connection gives, up to the size that was announced.

    Raises:
        PerceptError: if it gives more, or hardly anything.
    """
    size, speed = file.part.stat().st_size, SpeedCheck(file.path)
    with open_remote(file, size) as (offset, chunks), open(file.part, "r+b") as part:
        part.truncate(offset)
        part.seek(offset)
        bar.update(offset - size)
        for chunk in chunks:
            if stop.is_set():
                return
            speed.add(len(chunk))
            if part.tell() + len(chunk) > file.size:
                _discard_part(file, f"more than the {file.size:,} bytes that were announced")
            part.write(chunk)
            bar.update(len(chunk))
