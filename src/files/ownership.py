"""One owner of a folder while it is written: two processes never write into one folder at once.

- The owner holds a lock (`flock`) on the file .lock in the folder, or beside a folder that is
  replaced as a whole. The system frees it when the process ends, however it ends. The file says who
  the owner is, and goes when the owner is done.
- A folder that is only read needs no owner, so that data can be shared read-only.
- On a disk without flock there is one warning, and nothing is locked.
- What a process that was killed has left behind is removed by the next owner.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from src.files.errors import PerceptError
from src.files.write_errors import write_errors
from src.files.writing import name_temporary, unfinished

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"

GRACE_SECONDS = 1.5  # a process that was killed, or only looks whether a lock is free, is soon gone

POLL_SECONDS = 0.1

# what a disk without locks answers, e.g. some of NFS, Lustre without "flock", and FUSE
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

# the owner could not write anything else there, either: the first write says so
NO_WRITES = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}

# of `atomic`, `replace_folder` and downloads: .<name>.<process>.<kind>
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old|link)")

LEFTOVER_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # it does not say whose it is


class FolderInUse(PerceptError):
    """Another process writes the folder."""


@dataclass(frozen=True)
class Owner:
    """Who writes a folder, as the lock file says.

    Attributes:
        host: name of the machine.
        process: number of the process there.
        purpose: what it does, e.g. "training".
        since: when it began, "2030-01-31 12:00:00", local time.
    """

    host: str
    process: int
    purpose: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} ({self.purpose}, since {self.since})"


@dataclass
class Lock:
    """A lock that this process holds, until `release`.

    Attributes:
        path: the lock file.
        descriptor: of the open file, which a child process may inherit (`pass_fds`): the lock is
            free when all that have it open have ended. None where nothing could be locked.
        thread: the thread that took it; to others of this process it is as taken as to other
            processes.
        depth: how often it was taken and not released.
    """

    path: Path
    descriptor: int | None
    thread: int = field(default_factory=threading.get_ident)
    depth: int = 1

    def release(self) -> None:
        """Free the lock, and remove its file."""
        self.depth -= 1
        if self.depth:
            return
        _locks.pop(self.path, None)
        if self.descriptor is None:
            return
        if _is_file_of(self.path, self.descriptor):
            with suppress(OSError):  # it is in nobody's way
                self.path.unlink()
        self.abandon()

    def abandon(self) -> None:
        """Close the file of the lock; it stays locked by the processes that have inherited it."""
        _locks.pop(self.path, None)
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


_locks: dict[Path, Lock] = {}  # by lock file, of this process

_warned: set[str] = set()


def _forget_locks() -> None:
    """In a process that was forked off the owner: it owns nothing, also when the owner dies."""
    for lock in list(_locks.values()):
        lock.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def lock_folder(
    folder: str | Path, purpose: str, wait: bool = False, as_sibling: bool = False
) -> Iterator[None]:
    """Own a folder while it is written; what processes that were killed left there is removed.

    Within one thread a folder can be owned more than once. Of the processes of one launch, the one
    that writes is the owner: the others do not call this (or with `wait`, and take turns).

    Args:
        folder: made where it is missing, unless the lock lies beside it.
        purpose: what is done, for the message to a second process, e.g. "training".
        wait: whether to wait until another owner is done; otherwise this is refused.
        as_sibling: whether the folder (or file) is replaced as a whole, so that the lock must lie
            beside it.

    Raises:
        PerceptError: naming the owner, if there is one and `wait` is not set.
    """
    folder = Path(folder)
    place = folder.parent if as_sibling else folder
    path = place / f".{folder.name}.lock" if as_sibling else place / LOCK_NAME
    with suppress(OSError):  # the first write says why
        place.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(path, purpose, wait, subject=folder)
    except FolderInUse as error:
        raise PerceptError(str(error)) from None
    try:
        if lock.depth == 1 and lock.descriptor is not None:
            remove_leftovers(place, folder.name if as_sibling else "")
        yield
    finally:
        lock.release()


def acquire(
    path: Path,
    purpose: str,
    wait: bool = False,
    subject: str | Path | None = None,
    grace: float | None = None,
) -> Lock:
    """Take a lock file; the caller releases what comes back. See `lock_folder`.

    Args:
        path: the lock file, made where it is missing; its folder exists.
        purpose, wait: as for `lock_folder`.
        subject: what is locked, for the message; by default the folder of the lock file.
        grace: seconds until another owner counts as one; by default GRACE_SECONDS.

    Raises:
        FolderInUse: naming the owner, if there is one and `wait` is not set.
    """
    path = Path(os.path.abspath(path))
    existing = _locks.get(path)
    if existing is not None and existing.thread == threading.get_ident():
        existing.depth += 1
        return existing
    seconds = GRACE_SECONDS if grace is None else grace
    descriptor = _lock_file(path, wait, subject or path.parent, seconds)
    lock = Lock(path, descriptor)
    _locks[path] = lock
    if descriptor is not None:
        _write_owner(descriptor, purpose)
    return lock


def is_owned(path: Path) -> bool:
    """Whether a process holds a lock file; only looks."""
    if not path.exists():
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _try_flock(descriptor, path, only_look=True) is False
    finally:
        os.close(descriptor)


def read_owner(path: Path) -> Owner | None:
    """The owner that a lock file names, if it names one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**{name: content[name] for name in Owner.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock_file(path: Path, wait: bool, subject: str | Path, grace: float) -> int | None:
    """Open and lock a file, as soon as it is free; None where nothing can be locked."""
    deadline, is_announced = time.monotonic() + grace, False
    while True:
        descriptor = _open(path)
        if descriptor is None:
            return None
        is_locked = _try_flock(descriptor, path)
        if is_locked is None:  # this disk has no locks
            os.close(descriptor)
            return None
        if is_locked and _is_file_of(path, descriptor):
            return descriptor
        os.close(descriptor)
        if is_locked:  # its last owner has removed the file meanwhile
            continue
        if time.monotonic() > deadline:
            owner = read_owner(path) or "another process"
            if not wait:
                raise FolderInUse(
                    f"{subject} is being written by {owner}: wait until that has ended, or stop"
                    " it, and run this again."
                )
            if not is_announced:
                log.warning("waiting for %s, which writes %s", owner, subject)
                is_announced = True
        time.sleep(POLL_SECONDS)


def _open(path: Path) -> int | None:
    """Open a lock file for reading and writing; for reading where it is another user's; None where
    nothing can be written.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in NO_WRITES | {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
            raise PerceptError(
                f"{path} could not be opened to lock the folder ({error.strerror}): check the"
                " folder and its permissions."
            ) from error
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if path.exists():
            _warn_once(f"{path.name} cannot be opened ({error.strerror})", path)
        return None


def _try_flock(descriptor: int, path: Path, only_look: bool = False) -> bool | None:
    """Lock an open file if it is free; None on a disk, or a system, without locks.

    Those that only look share the lock.
    """
    try:
        import fcntl  # here, as Windows has none and must be able to import this module

        kind = fcntl.LOCK_SH if only_look else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except ModuleNotFoundError:
        _warn_once("this system has no flock", path)
        return None
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
            return False
        if error.errno in NO_LOCKS | {errno.EBADF}:  # NFS locks no file that is open for reading
            _warn_once(f"its disk has no flock ({error.strerror})", path)
            return None
        raise PerceptError(
            f"{path} could not be locked ({error.strerror}): check the disk of this folder."
        ) from error


def _warn_once(reason: str, path: Path) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    log.warning(
        "%s is not locked, as %s: see to it yourself that no two processes write one folder",
        path.parent,
        reason,
    )


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _write_owner(descriptor: int, purpose: str) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = Owner(socket.gethostname(), os.getpid(), purpose, since)
    with suppress(OSError):  # another user's file, or a full disk: it is locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)


# ------------------------------------------------------------------------------------ whole folders
@contextmanager
def replace_folder(folder: str | Path, wait: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder that replaces `folder` on success and disappears on failure.

    This process owns the folder meanwhile. Killed at any moment it leaves the old folder or the new
    one: they change places in one step, or where the disk cannot do that, `restore_folder` brings
    the old one back.

    Args:
        folder: that is written.
        wait: whether to wait for another process that is writing it.

    Raises:
        PerceptError: if another process writes the folder, and as `write_errors`.
    """
    folder = Path(folder)
    temporary, old = name_temporary(folder), name_temporary(folder, "old")
    with lock_folder(folder, f"writing {folder.name}", wait, as_sibling=True):
        unfinished.add(temporary.absolute())
        try:
            with write_errors(folder):
                _remove_folder(temporary)
                temporary.mkdir(parents=True)
                yield temporary
                _open_to_others(temporary)
                _put_in_place(temporary, folder, old)
        finally:
            unfinished.discard(temporary.absolute())
            _remove_folder(temporary)
            if folder.exists():
                _remove_folder(old)


def _open_to_others(folder: Path) -> None:
    """Give files that a library has made for the owner alone the permissions of any new file."""
    ordinary = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.lstat(path).st_mode & 0o777 == 0o600:
                os.chmod(path, ordinary)


def _put_in_place(temporary: Path, folder: Path, old: Path) -> None:
    """Give a folder the name of another one; that one, if there is any, takes its name or `old`."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    if _exchange(temporary, folder):
        return
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change names in one step; whether this system and disk can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return bool(rename(folder, os.fsencode(first), folder, os.fsencode(second), exchange) == 0)


def _remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Bring back a missing folder of which a process that was killed has only changed the name.

    Nothing happens while another process writes it.
    """
    if folder.exists() or not list(folder.parent.glob(f".{glob.escape(folder.name)}.*.old")):
        return
    with suppress(PerceptError), lock_folder(folder, f"restoring {folder.name}", as_sibling=True):
        pass  # what was left behind is dealt with by every owner


# --------------------------------------------------------------------------------------- leftovers
def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove temporary files and folders of processes that have ended; the folder must be owned.

    Args:
        folder: where they lie, not below.
        name: of the file or folder that they were to become; "" for any.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if not name and LEFTOVER_OF_SAFETENSORS.fullmatch(entry.name):
            _remove(entry)
            continue
        match = LEFTOVER.fullmatch(entry.name)
        if match is None or (name and match["name"] != name):
            continue
        if Path(entry.path).absolute() in unfinished or _is_alive(int(match["process"])):
            continue
        target = folder / match["name"]
        if match["kind"] == "old" and not target.exists():  # its successor has not come
            with suppress(OSError):
                os.replace(entry.path, target)
            continue
        _remove(entry)


def remove_leftovers_below(folder: Path) -> None:
    """`remove_leftovers` of a folder and of those below it that no other process is writing."""
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not LEFTOVER.fullmatch(name)]
        if not is_owned(Path(place, LOCK_NAME)):
            remove_leftovers(Path(place))


def _remove(entry: os.DirEntry[str]) -> None:
    log.info("removing %s, which a process that was stopped has left", entry.path)
    if entry.is_dir():
        _remove_folder(Path(entry.path))
    else:
        with suppress(OSError):
            os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    """Whether another process of this number runs on this machine.

    Not this one: in a container the one that was killed may have had the same number.
    """
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
