"""What goes wrong while a file is written, in one sentence, whatever library writes it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.files.errors import PerceptError

LITTLE_SPACE = 1 << 20  # bytes; a disk with less free is full to a library that does not say why
# how libraries write that the system refused a write
NAMED_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ESTALE,
    errno.EIO,
)
ERROR_NUMBER = re.compile(r"(?:\[Errno |\berrno = |\bos error |\berrno: )(\d+)")
QUOTED_NAME = re.compile(r"name = '([^']+)'")  # h5py
WRITE_FAILED = re.compile(
    r"PytorchStreamWriter|enforce fail|iostream error|write failed|write error"
    r"|requested and \d+ written|disk is full|readonly database"
)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence, whatever library raises it.

    A full or read-only disk, a quota, a folder that has vanished or may not be written, and a name
    that is too long are meant; other errors pass.

    Args:
        path: the file or folder that is written.

    Raises:
        PerceptError: naming it, the reason and what to do.
    """
    try:
        yield
    except PerceptError:
        raise
    except Exception as error:
        reason = _explain_failed_write(Path(path), error)
        if not reason:
            raise
        raise PerceptError(f"{path} could not be written: {reason}.") from error


def _explain_failed_write(path: Path, error: Exception) -> str:
    """Why a write failed and what to do, "" if it is not for the disk or the folder."""
    number, folder = _find_error_number(error), path.parent
    if _is_about_other_file(error, path):
        return ""
    if number is None and WRITE_FAILED.search(str(error)):  # torch, for instance, tells no more
        number = _probe_folder(folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if number in (errno.EEXIST, errno.ENOTDIR) and not existing.is_dir():
        return f"{existing} is a file where a folder is needed: move it away"
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return _explain_absence(path, error, number)
    place, free = f"the disk that holds {folder}", _measure_free(existing)
    elsewhere = "set PERCEPT_HOME to a folder on"
    advice = {
        0: f"{_first_line(error)} ({free} on {place}): run this again",
        errno.ENOSPC: f"{place} filled up ({free}): free some space, or {elsewhere} a larger disk,"
        " and run this again (earlier files are intact)",
        errno.EDQUOT: f"your quota on {place} is used up: free some space, or {elsewhere} another"
        " disk, and run this again (earlier files are intact)",
        errno.EFBIG: f"it is larger than {place}, or a limit (ulimit -f), allows: {elsewhere}"
        " another disk",
        errno.EROFS: f"{place} is read-only: {elsewhere} a disk that you may write",
        errno.EACCES: f"you may not write there, on {place}: ask the owner of the folder, or"
        f" {elsewhere} a disk that you may write",
        errno.ENAMETOOLONG: f"its name is longer than {place} allows: choose a shorter one",
        errno.EIO: f"{place} reports an error ({_first_line(error)}): check the disk, and run this"
        " again",
        errno.EISDIR: "there is a folder of that name: move it away",
        errno.EEXIST: "there is a file of that name: move it away",
    }
    advice[errno.EPERM] = advice[errno.EACCES]
    return "" if number is None else advice.get(number, "")


def _explain_absence(path: Path, error: Exception, number: int) -> str:
    """Why something was not there that a write needs, "" if that was not its folder."""
    folder, named = path.parent, Path(str(getattr(error, "filename", "")))
    if not folder.is_dir() or number == errno.ESTALE:
        return f"the folder {folder} has vanished: see whether its disk is there, then try again"
    if named.name.startswith(f".{path.name}."):
        return "what was written of it has vanished: see that no other program cleans its folder"
    return ""


def _measure_free(folder: Path) -> str:
    """How much a disk has free, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        return "it does not say what is free"


def _find_error_number(error: BaseException) -> int | None:
    """The number that the system gave to an error: its own, or one that its text holds."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    numbered = ERROR_NUMBER.search(str(error))
    if numbered:
        return int(numbered[1])
    return next((n for n in NAMED_ERRORS if os.strerror(n) in str(error)), None)


def _is_about_other_file(error: Exception, path: Path) -> bool:
    """Whether an error is about a file that is not in the folder of `path`, such as one to read."""
    quoted = QUOTED_NAME.search(str(error))
    name = getattr(error, "filename", None) or (quoted and quoted[1])
    if not isinstance(name, str | os.PathLike):
        return False
    folder, named = path.parent.absolute(), Path(os.path.abspath(name))
    return named not in (folder, *folder.parents) and not named.is_relative_to(folder)


def _probe_folder(folder: Path) -> int:
    """Number of the error that a write to a folder would meet, 0 if none is seen."""
    if not folder.is_dir():
        return errno.ENOENT
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return errno.EROFS
    if not os.access(folder, os.W_OK | os.X_OK):
        return errno.EACCES
    return errno.ENOSPC if shutil.disk_usage(folder).free < LITTLE_SPACE else 0


def _first_line(error: BaseException) -> str:
    """Beginning of an error's message, for a sentence."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line[:200].rstrip(". ")
