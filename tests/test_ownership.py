"""One owner of a folder while it is written."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from src.files import ownership
from src.files.ownership import lock_folder, read_owner, remove_leftovers
from src.utils import PerceptError

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ownership, "_warned", set())


def run_owner(folder, seconds=60.0, **options):
    """A process that owns a folder for a while; returns when it does."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            with lock_folder(folder, "the first", **options):
                os.write(write, b"owned")
                time.sleep(seconds)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"owned"
    os.close(read)
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("beside", [False, True])
def test_a_second_process_is_refused_and_told_who_the_owner_is(tmp_path, beside):
    first = run_owner(tmp_path / "run", as_sibling=beside)
    try:
        with (
            pytest.raises(PerceptError) as refusal,
            lock_folder(tmp_path / "run", "x", as_sibling=beside),
        ):
            pass
        message = str(refusal.value)
        assert f"process {first} on {socket.gethostname()} (the first, since 2" in message
        assert str(tmp_path / "run") in message and "\n" not in message
    finally:
        kill(first)


def test_the_system_frees_the_lock_of_a_process_that_is_killed(tmp_path):
    kill(run_owner(tmp_path / "run"))
    assert (tmp_path / "run" / ".lock").exists()
    with lock_folder(tmp_path / "run", "second"):
        assert read_owner(tmp_path / "run" / ".lock").purpose == "second"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_that_waits_is_next(tmp_path, caplog):
    first = run_owner(tmp_path / "run", seconds=0.6)
    start = time.monotonic()
    with lock_folder(tmp_path / "run", "second", wait=True):
        assert time.monotonic() - start > 0.3
        assert read_owner(tmp_path / "run" / ".lock").process == os.getpid()
    os.waitpid(first, 0)
    assert f"waiting for process {first}" in caplog.text


def test_many_that_wait_take_turns(tmp_path):
    """Each adds one to a number that it has read before."""
    number = tmp_path / "number"
    number.write_text("0")
    processes = []
    for _ in range(4):
        process = os.fork()
        if not process:
            try:
                for _ in range(5):
                    with lock_folder(tmp_path / "run", "counting", wait=True):
                        value = int(number.read_text())
                        time.sleep(0.002)
                        number.write_text(str(value + 1))
            finally:
                os._exit(0)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    assert number.read_text() == "20"


def test_one_thread_may_own_twice_and_another_thread_may_not(tmp_path):
    outcomes = []

    def try_to_own():
        try:
            with lock_folder(tmp_path, "thread"):
                outcomes.append("owned")
        except PerceptError:
            outcomes.append("refused")

    with lock_folder(tmp_path, "outer"):
        with lock_folder(tmp_path, "inner"):
            pass
        thread = threading.Thread(target=try_to_own)
        thread.start()
        thread.join()
    try_to_own()
    assert outcomes == ["refused", "owned"]


def test_a_process_that_the_owner_forked_does_not_keep_the_lock(tmp_path):
    """Loaders of batches live on for a while when a training is killed."""
    read, write = os.pipe()
    first = os.fork()
    if not first:
        with lock_folder(tmp_path / "run", "training"):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            os.write(write, child.to_bytes(8, "little"))
            time.sleep(60)
    child = int.from_bytes(os.read(read, 8), "little")
    try:
        kill(first)
        with lock_folder(tmp_path / "run", "again"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_command_may_inherit_a_lock(tmp_path):
    lock = ownership.acquire(tmp_path / "lock", "sweeping")
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    lock.abandon()
    assert ownership.is_owned(tmp_path / "lock")
    child.kill()
    child.wait()
    assert not ownership.is_owned(tmp_path / "lock")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("one", "two"):
        with lock_folder(tmp_path / name, "writing"):
            (tmp_path / name / "file").touch()
    assert len(caplog.records) == 1 and "no flock" in caplog.text


def test_a_system_without_flock_is_warned_of_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for _ in range(2):
        with lock_folder(tmp_path / "run", "writing"):
            pass
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    """Then nothing else can be written there, either, and what only reads works."""
    real = os.open

    def open_nothing_for_writing(path, flags, *rest, **options):
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", open_nothing_for_writing)
    with lock_folder(tmp_path, "reading"):
        assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_lock_has_ordinary_permissions(tmp_path):
    mask = os.umask(0o002)
    try:
        with lock_folder(tmp_path, "writing"):
            assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o664
    finally:
        os.umask(mask)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    kept = [f".a.{os.getppid()}.tmp", "a.tmp", ".hidden", ".a.tmp", "state.pt"]
    for name in (f".a.{dead}.tmp", f".b.c.{dead}.tmp", ".tmpAb12xY", *kept):
        (tmp_path / name).write_text("x")
    for name in ("subj01", f".subj01.{dead}.old", f".subj02.{dead}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "betas.h5").write_text(name)
    remove_leftovers(tmp_path, "a")
    assert not (tmp_path / f".a.{dead}.tmp").exists()
    assert (tmp_path / f".b.c.{dead}.tmp").exists()
    with lock_folder(tmp_path, "writing"):
        pass
    expected = [*kept, "subj01", "subj02"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    assert (tmp_path / "subj01" / "betas.h5").read_text() == "subj01"
    assert (tmp_path / "subj02" / "betas.h5").read_text() == f".subj02.{dead}.old"
