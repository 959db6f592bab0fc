"""Files that others wrote: finding them, and saying what is wrong with one that cannot be read.

That a file cannot be opened has many causes, of which damage is one. `explain_unreadable` tells
them apart, so that nobody fetches 40 GB again because another process has the file open.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from src.files.errors import PerceptError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

FETCH_AGAIN = "fetch it again"

# what libraries raise over a file that they cannot read
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,  # also UnicodeDecodeError, and what pandas and pyarrow derive from it
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,  # also RecursionError, and zipfile's for a password
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)

# beginnings of files that often lie where others are expected
HEADS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex, not the file itself: run `datalad get` or"
    " `git annex get`",
    b"\x00\x05\x16\x07": "what a Mac keeps beside a file (AppleDouble), not the file itself: take"
    " the one without ._ in its name",
    b"MATLAB 7.3 MAT-file": "saved by MATLAB as v7.3: save it again with save(name, '-v7')",
}

WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)

# by error number, for causes that are neither damage nor absence
CAUSES = {
    errno.EACCES: "may not be read by this user: ask its owner for the right (chmod a+r)",
    errno.EPERM: "may not be read by this user: ask its owner for the right (chmod a+r)",
    errno.ELOOP: "is a link that leads back to itself: mend the link",
    errno.EISDIR: "is a folder, where a file is expected: give the file",
    errno.ENAMETOOLONG: "has a name that is too long for this disk: shorten it",
    errno.EMFILE: "cannot be opened, as this process has too many files open: raise `ulimit -n`",
    errno.EIO: "cannot be read because the disk gives errors: check the disk, then try again",
    errno.ESTALE: "has been moved or replaced on its server meanwhile: try again",
    errno.ETIMEDOUT: "cannot be read because its server does not answer: try again",
    errno.ENOTCONN: "cannot be read because its disk is not connected: mount it again",
}

LOCKED = "is open for writing in another process: wait until that has closed it"

UNSAFE_ADVICE = re.compile(
    r"weights_only|allow_pickle|pickle\.load|add_safe_globals|trust_remote_code"
)

# a file may unpack to so many times its size, or to so many bytes whatever its size is
MAX_EXPANSION = 200
FREE_EXPANSION = 1 << 30

NATURAL = re.compile(r"(\d+)")


# ---------------------------------------------------------------------------------------- messages
@contextmanager
def read_errors(path: str | Path, remedy: str = FETCH_AGAIN) -> Iterator[None]:
    """Turn what libraries raise over a file into one PerceptError, see `explain_unreadable`.

    Only the calls that read belong inside, as a mistake of one's own would be taken for damage.
    """
    try:
        yield
    except PerceptError:
        raise
    except Exception as error:  # libraries have errors of their own beside READ_ERRORS
        raise explain_unreadable(path, error, remedy) from error


def explain_unreadable(
    path: str | Path, error: BaseException, remedy: str = FETCH_AGAIN
) -> PerceptError:
    """Return the error to raise for a file that cannot be read, with its cause in one sentence.

    Args:
        path: the file.
        error: what was raised over it.
        remedy: what to do where the file is damaged or of another kind.
    """
    cause = find_cause(path, error)
    if cause is not None and cause.endswith(FETCH_AGAIN):
        cause = cause.removesuffix(FETCH_AGAIN) + remedy
    if cause is None:
        cause = _explain_message(error, remedy)
    return PerceptError(f"{path} {cause}.")


def find_cause(path: str | Path, error: BaseException) -> str | None:
    """Why a file cannot be read, where it is neither damaged nor of another kind, else None."""
    path = Path(path)
    return _explain_absence(path) or _explain_system_error(path, error) or _explain_content(path)


def _explain_absence(path: Path) -> str | None:
    try:
        path.stat()
    except OSError as error:
        if error.errno in CAUSES:
            return CAUSES[error.errno]
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which is not there: mend the link"
        return "is missing: fetch it, or give the folder that holds it"
    if path.is_dir():
        return CAUSES[errno.EISDIR]
    return None if os.access(path, os.R_OK) else CAUSES[errno.EACCES]


def _explain_system_error(path: Path, error: BaseException) -> str | None:
    """The cause that an error of the system, or of HDF5, tells."""
    text = str(error)
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"errno = (\d+)", text)):
        number = int(match[1])
    if "unable to lock file" in text or number in (errno.EAGAIN, errno.EWOULDBLOCK):
        return f"{LOCKED}, or set HDF5_USE_FILE_LOCKING=FALSE if its disk has no locks"
    if "already open for" in text:
        return f"{LOCKED}, or run `h5clear -s` on it if it was left open by one that died"
    if "external file" in text:
        match = re.search(r"external link file name = '([^']*)'", text)
        target = match[1] if match else "another file"
        return f"holds a link to {target}, which cannot be opened: put that file beside it"
    if "too many links" in text:
        return "holds a link that leads back to itself: fetch it again"
    if isinstance(error, MemoryError):
        return "announces more than fits into memory: fetch it again, or use a larger machine"
    return CAUSES.get(number) if number is not None else None


def _explain_content(path: Path) -> str | None:
    """The cause that the first bytes of a file tell."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return CAUSES.get(error.errno or 0)
    return explain_head(head)


def explain_head(head: bytes) -> str | None:
    """What a file is by its first bytes, where that explains why it cannot be read, else None."""
    if not head:
        return "is empty (0 bytes): fetch it again"
    for beginning, meaning in HEADS.items():
        if head.startswith(beginning):
            return f"is {meaning}"
    if WEB_PAGE.match(head):
        return "is a web page, such as a server sends in place of a file: fetch it again"
    return None


def _explain_message(error: BaseException, remedy: str) -> str:
    """The cause that is left: the file is damaged, or of another kind."""
    text = shorten(error)
    if isinstance(error, UnicodeDecodeError):
        return f"is no text in UTF-8 ({text}): save it as such, or {remedy}"
    if "password" in text or "encrypted" in text:
        return "is protected by a password: save it without one"
    if isinstance(error, NotImplementedError):
        return f"is packed in a way that is not known here ({text}): save it again, or {remedy}"
    return f"is damaged or cut off, or of another kind, and cannot be read ({text}): {remedy}"


def shorten(error: BaseException | str, length: int = 200) -> str:
    """The message of an error on one line, of at most `length` characters.

    Libraries advise to load what they refuse without their protection: that is not passed on.
    """
    text = " ".join(str(error).split()).strip(". ") or type(error).__name__
    if UNSAFE_ADVICE.search(text):
        refused_name = re.search(r"GLOBAL ([\w.]+)", text)
        text = "it is damaged, or holds more than plain arrays, numbers and texts"
        text += f", namely {refused_name[1]}" if refused_name else ""
    return text if len(text) <= length else text[: length - 3] + "..."


# ----------------------------------------------------------------------------- tables and arrays
def load_parquet(
    path: str | Path, remedy: str = FETCH_AGAIN, columns: Collection[str] = ()
) -> pd.DataFrame:
    """Load a table, whose size is compared first with what is stored.

    Args:
        path: the file.
        remedy: what to do where it cannot be read, for the message.
        columns: that it must have.

    Raises:
        PerceptError: if it cannot be read, announces more than it can hold, or lacks a column.
    """
    import pandas as pd
    from pyarrow.parquet import read_metadata

    with read_errors(path, remedy):
        head = read_metadata(path)
        n_bytes = 8 * head.num_rows * head.num_columns
        check_expansion(path, "a table", n_bytes, Path(path).stat().st_size)
        table = pd.read_parquet(path)
    missing = [name for name in columns if name not in table]
    if missing:
        names = shorten(", ".join(map(str, table)))
        raise PerceptError(
            f"{path} lacks the columns {', '.join(missing)}: it has {names}, so {remedy}."
        )
    return table


def load_csv(
    path: str | Path, columns: Collection[str | int] = (), remedy: str = FETCH_AGAIN, **options: Any
) -> pd.DataFrame:
    """Load a table of text in UTF-8.

    Args:
        path: the file.
        columns: that it must have.
        remedy: what to do where it cannot be read, for the message.
        options: of pandas.read_csv.

    Raises:
        PerceptError: if it cannot be read, or lacks a column.
    """
    import pandas as pd

    with read_errors(path, remedy):
        read: Any = pd.read_csv  # whose overloads do not know of options in a dictionary
        table: pd.DataFrame = read(path, **{"encoding": "utf-8-sig"} | options)
    missing = [name for name in columns if name not in table]
    if missing:
        names = shorten(", ".join(map(str, table)))
        columns = ", ".join(map(str, missing))
        raise PerceptError(f"{path} lacks the columns {columns}: it has {names}, so {remedy}.")
    return table


def load_json(path: str | Path, remedy: str = FETCH_AGAIN) -> dict[str, Any]:
    """Load a JSON file that holds an object.

    Raises:
        PerceptError: if it cannot be read, or holds something else.
    """
    with read_errors(path, remedy):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise PerceptError(
            f"{path} holds a {type(content).__name__}, where an object in braces is expected:"
            f" {remedy}."
        )
    return content


def load_npz(path: str | Path, remedy: str = FETCH_AGAIN) -> dict[str, np.ndarray]:
    """Load the plain arrays of an .npz, whose sizes are compared first with what is stored.

    Raises:
        PerceptError: if it cannot be read, is protected by a password, packed in an unknown way, or
            announces more than it can hold.
    """
    import numpy as np

    with read_errors(path, remedy), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            check_expansion(path, member.filename, member.file_size, member.compress_size)
            with archive.open(member) as file:
                _check_npy_size(path, member.filename, file, member.file_size)
    with read_errors(path, remedy), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def load_npy(
    path: str | Path, remedy: str = FETCH_AGAIN, mode: Literal["r", "c"] | None = None
) -> np.ndarray:
    """Load a plain array, whose size is compared first with what is stored.

    Args:
        path: an .npy.
        remedy: what to do where it cannot be read, for the message.
        mode: None reads it; "r" and "c" map it, read-only or with changes that stay in memory.

    Raises:
        PerceptError: if it cannot be read, is pickled, or announces more than it can hold.
    """
    import numpy as np

    with read_errors(path, remedy):
        with open(path, "rb") as file:
            _check_npy_size(path, "its array", file, Path(path).stat().st_size)
        array: np.ndarray = np.load(path, mmap_mode=mode, allow_pickle=False)
    return array


class NpyHeader(NamedTuple):
    """Header of an .npy."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]


def parse_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header of an .npy from its open content, up to where the array begins."""
    import numpy as np

    if np.lib.format.read_magic(file) == (1, 0):
        return NpyHeader(*np.lib.format.read_array_header_1_0(file))
    return NpyHeader(*np.lib.format.read_array_header_2_0(file))


def _check_npy_size(path: str | Path, name: str, file: IO[bytes], n_stored: int) -> None:
    """Refuse an .npy that announces a larger array than there are bytes, before it is read."""
    header = parse_npy_header(file)
    n_bytes = math.prod(header.shape) * header.dtype.itemsize
    if not header.dtype.hasobject and n_bytes > n_stored:
        raise PerceptError(
            f"{path} announces {n_bytes / 1e9:,.1f} GB for {name}, {header.dtype} {header.shape},"
            f" and stores {n_stored:,} bytes: fetch it again, or save it again."
        )


# ------------------------------------------------------------------------------------------ limits
def check_expansion(path: str | Path, what: str, n_bytes: int, n_stored: int) -> None:
    """Refuse a file that would unpack to far more than it can hold, before memory is taken.

    Args:
        path: the file.
        what: the part of it that is unpacked, for the message.
        n_bytes: size that it announces.
        n_stored: bytes that are stored of it.

    Raises:
        PerceptError: if it announces more than 200 times what is stored, and more than 1 GiB.
    """
    if n_bytes > max(FREE_EXPANSION, MAX_EXPANSION * n_stored):
        raise PerceptError(
            f"{path} announces {n_bytes / 1e9:,.1f} GB of {what}, but stores {n_stored:,} bytes of"
            f" it; the limit is {MAX_EXPANSION} times what is stored: fetch it again."
        )


# ----------------------------------------------------------------------------------------- folders
def natural_key(name: str | Path) -> list[tuple[int, int, str]]:
    """A sort key that puts recon_10 after recon_9: the digits of a name are compared as numbers."""
    parts = NATURAL.split(str(name))
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def walk_files(root: str | Path) -> list[Path]:
    """Find all files below a folder, those in linked folders too, sorted by path.

    A folder that several links lead to is searched once; links may lead in circles. What begins
    with a dot is passed over, such as the ._ files that a Mac puts beside others.

    Args:
        root: the folder.

    Raises:
        PerceptError: for a folder that cannot be listed.

    Warns:
        UserWarning: with the number of links that lead nowhere.
    """
    files: list[Path] = []
    broken: list[Path] = []
    folders, linked = [Path(root)], list[Path]()
    searched: set[tuple[int, int]] = set()
    while folders or linked:
        # folders of the root itself come before linked ones, whose content may be the same
        folder = folders.pop() if folders else linked.pop(0)
        with read_errors(folder, "give a folder that can be listed"):
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if (status.st_dev, status.st_ino) in searched:
            continue
        searched.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not path.exists():
                broken.append(path)
            elif path.is_dir():
                (linked if entry.is_symlink() else folders).append(path)
            elif path.is_file():
                files.append(path)
    if broken:
        warnings.warn(
            f"{len(broken)} links below {root} lead nowhere and are passed over, such as"
            f" {min(broken)}.",
            stacklevel=2,
        )
    return sorted(files)
