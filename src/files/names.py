"""Names of runs, data sets, subjects and cache entries, which become names of folders."""

from __future__ import annotations

from src.files.errors import UsageError

MAX_NAME_BYTES = 150  # of a run, a data set, ...; file systems allow 255 with all that is added


def check_name(name: object, what: str, parts: int = 1) -> str:
    """Return a name that becomes part of a path, if it cannot lead anywhere else.

    Args:
        name: of a run, a data set, a cache entry, a file on a server, ...
        what: what it names, for the message, e.g. "model_name".
        parts: how many names it may hold, separated by slashes, as in the run <sweep>/<point>.

    Raises:
        UsageError: if a part is empty, begins with a dot, a dash, a tilde or a space, ends with a
            space, holds a backslash or a character that cannot be printed (such as the end of a
            line), or has more than MAX_NAME_BYTES bytes; or if there are too many parts.
    """
    text = str(name)
    names = text.split("/")
    reason = next(filter(None, map(find_fault_of_name, names)), "")
    if len(names) > parts:
        reason = "holds a slash" if parts == 1 else f"has more than {parts} parts between slashes"
    if reason:
        shortened = repr(text if len(text) <= 80 else f"{text[:80]}...")
        raise UsageError(
            f"{what} is {shortened}, which {reason}, so it cannot name a file or folder: choose"
            f" a name of at most {MAX_NAME_BYTES} letters, digits and - _ . that begins with a"
            " letter or a digit."
        )
    return text


def find_fault_of_name(name: str) -> str:
    """Why a name cannot be that of a file or folder, "" if it can."""
    if not name:
        return "is empty or absolute, or has an empty part"
    if name in (".", ".."):
        return "leads to another folder"
    if name[0] in ".-~":
        return f"has a part that begins with {name[0]!r}"
    if "\\" in name:
        return "holds a backslash"
    if not name.isprintable():
        return "holds a character that cannot be printed"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return ""
