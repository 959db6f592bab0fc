"""Jobs of a sweep, run side by side under locks."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO


@dataclass(frozen=True)
class Job:
    """A command of one point, the file that its output is added to, and its lock."""

    name: str
    command: list[str]
    log: Path
    lock: Path


class Ended(NamedTuple):
    """What became of a job: "finished", "failed", "stopped" (by a signal that was passed on), or
    not begun as another process has it ("elsewhere") or had ("before").
    """

    name: str
    how: str
    seconds: float = 0.0
    sentence: str = ""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    place: dict[str, str]
    lock: TextIO
    offset: int
    begun: float


def lock(path: Path, wait: bool = False) -> TextIO | None:
    """The lock `path`, to be closed by the caller; None where another process has it, unless
    `wait`.

    It belongs to the open file, which a child inherits: it is free when this process and the child
    have both ended, however they ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")  # noqa: SIM115
    for attempt in range(5):  # `sweep --list` holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return file
        except BlockingIOError:
            time.sleep(0.1 * (attempt < 4))
    file.close()
    return None


def assign_devices(jobs: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Environment of each of `jobs` processes that run side by side: a GPU each, in turn, and their
    share of the cores for OpenMP and BLAS.

    A smaller OMP_NUM_THREADS of the caller's holds for BLAS, too: torch takes MKL's number for all
    of its threads.
    """
    share = max(1, cores // jobs)
    share = min(share, int(os.environ.get("OMP_NUM_THREADS") or share))
    threads = {
        name: str(min(share, int(os.environ.get(name) or share)))
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})
        for i in range(jobs)
    ]


@contextmanager
def _passing_on(running: list[_Running]) -> Iterator[list[int]]:
    """Within this context SIGINT, SIGTERM and SIGHUP ask the running processes to end (the second
    time, at once); yields the signals that came.
    """
    asked: list[int] = []
    since = [0.0]

    def pass_on(number: int, frame: Any) -> None:
        if asked and time.monotonic() - since[0] < 1:  # a terminal and a launcher may both send it
            return
        for one in running:
            one.process.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
        asked.append(number)
        since[0] = time.monotonic()

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield asked
    finally:
        for one in running:  # left by an error here
            one.process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(job: Job, place: dict[str, str], lock: TextIO) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place},
            pass_fds=[lock.fileno()],
        )
    return _Running(job, process, place, lock, offset, time.monotonic())


def _ended(one: _Running, asked: bool) -> Ended:
    one.lock.close()
    code, seconds = one.process.returncode, time.monotonic() - one.begun
    if not code:
        return Ended(one.job.name, "finished", seconds)
    if asked:
        return Ended(one.job.name, "stopped", seconds)
    with open(one.job.log, "rb") as log:
        log.seek(one.offset)
        said = re.findall(r"^run\.py: (.*)$", log.read().decode(errors="replace"), re.MULTILINE)
    return Ended(
        one.job.name,
        "failed",
        seconds,
        said[-1] if said else f"its process ended with code {code}; {one.job.log} says more",
    )


def run_jobs(
    jobs: Sequence[Job], where: Sequence[dict[str, str]], finished: Callable[[str], bool]
) -> Iterator[Ended]:
    """Run jobs side by side, one in each place, and yield what became of each as it ends.

    Asked to stop by a signal, it passes that on, starts no more and yields those that it stopped.

    Args:
        jobs: in order.
        where: environment of each place, of `assign_devices`.
        finished: whether the job of that name has been done meanwhile; asked once its lock is held.

    Raises:
        SystemExit: with 128 + its number, after a signal.
    """
    waiting, free, running = deque(jobs), deque(where), list[_Running]()
    with _passing_on(running) as asked:
        while running or (waiting and not asked):
            while waiting and free and not asked:
                job = waiting.popleft()
                if (lock_file := lock(job.lock)) is None:
                    yield Ended(job.name, "elsewhere")
                elif finished(job.name):
                    lock_file.close()
                    yield Ended(job.name, "before")
                else:
                    running.append(_started(job, free.popleft(), lock_file))
                    if asked:  # between the two lines above
                        running[-1].process.terminate()
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.place)
                yield _ended(one, bool(asked))
            time.sleep(0.1)
    if asked:
        raise SystemExit(128 + asked[0])
