"""Reading and writing files whole: under a temporary name that is renamed at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.files.errors import PerceptError
from src.files.write_errors import write_errors

MAKE_AGAIN = "copy it again, or run the stage that writes it again"
unfinished: set[Path] = set()  # what this process is writing under temporary names


def require_file(
    path: str | Path, description: str, remedy: str = "fetch it, or give the folder that holds it"
) -> Path:
    """Return `path` if there is such a file or folder.

    Args:
        path: file or folder.
        description: what it holds, for the message.
        remedy: what to do where it is missing, for the message.

    Raises:
        PerceptError: naming the file, what it holds and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(f"{path} ({description}) is missing: {remedy}.")
    return path


def make_folder(path: str | Path) -> Path:
    """Make a folder, and those above it, unless it is there.

    Raises:
        PerceptError: as `write_errors`.
    """
    with write_errors(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def name_temporary(path: str | Path, kind: str = "tmp") -> Path:
    """The name beside `path` under which this process writes before it renames."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def check_writable(folder: str | Path) -> None:
    """Refuse to begin long work whose result could not be written.

    Raises:
        PerceptError: as `write_errors`, if a file cannot be made in the folder.
    """
    probe = name_temporary(make_folder(folder) / "probe")
    with write_errors(Path(folder) / "files"):
        probe.touch()
        probe.unlink()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`.

    The file is renamed to `path` on success and removed on failure. Its permissions are those of
    any new file.

    Raises:
        PerceptError: as `write_errors`.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = name_temporary(path)
    unfinished.add(temporary.absolute())
    try:
        with write_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:  # safetensors writes for the owner alone
                temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        unfinished.discard(temporary.absolute())
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path: str | Path, keys: Sequence[str] | None = None, remedy: str = MAKE_AGAIN) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        keys: that it must have, as an object; None: it may hold anything.
        remedy: what to do where it cannot be used, for the message.

    Raises:
        PerceptError: naming the file, if it is missing, may not be read, is empty, damaged, cut off
            or something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise explain_unopened(path, error, remedy) from error
    except (ValueError, RecursionError) as error:
        raise PerceptError(
            f"{path} is no JSON file, or is damaged or cut off ({error}): {remedy}."
        ) from error
    if keys is None:
        return content
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise PerceptError(
            f"{path} is no such file as is expected here: it has no {', '.join(missing)} in it;"
            f" {remedy}."
        )
    return content


def explain_unopened(path: str | Path, error: OSError, remedy: str) -> PerceptError:
    """The error to raise for a file that could not be opened."""
    if isinstance(error, FileNotFoundError):
        return PerceptError(f"{path} is missing: {remedy}.")
    if isinstance(error, PermissionError):
        return PerceptError(f"{path} may not be read by this user: ask its owner for the right.")
    reason = error.strerror or error
    return PerceptError(f"{path} cannot be read ({reason}): {remedy}.")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
