"""Jobs of a sweep, run side by side under locks."""

from __future__ import annotations

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
from typing import Any, NamedTuple

from src.files.ownership import FolderInUse, Lock, acquire
from src.utils import make_folder, write_errors

STOP_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

STOP_SIGNALS = [getattr(signal, name) for name in STOP_NAMES if hasattr(signal, name)]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

POLL_SECONDS = 0.1

LOCK_SECONDS = 0.5  # `sweep --list` holds a point's lock for a moment


@dataclass(frozen=True)
class Job:
    """The command of one point.

    Attributes:
        name: label of the point.
        command: program and arguments.
        log: file that the output is added to.
        lock_path: file that is locked while the command runs.
    """

    name: str
    command: list[str]
    log: Path
    lock_path: Path


class JobResult(NamedTuple):
    """How a job ended.

    Attributes:
        name: label of the point.
        outcome: "finished"; "failed"; "stopped", by a signal that was passed on; or not started,
            because another process is running the job ("elsewhere") or has finished it ("before").
        seconds: how long it ran.
        message: for a failed job, one sentence that says why.
    """

    name: str
    outcome: str
    seconds: float = 0.0
    message: str = ""


@dataclass
class _RunningJob:
    """A job whose process has been started.

    Attributes:
        job: the job.
        process: its process.
        environment: what `assign_devices` gave to it.
        lock: that the process has inherited.
        log_offset: length of the log before the job, in bytes.
        start_time: by the monotonic clock, in seconds.
    """

    job: Job
    process: subprocess.Popen
    environment: dict[str, str]
    lock: Lock
    log_offset: int
    start_time: float


def lock_job(job: Job) -> Lock | None:
    """Lock a job; None where another process, or the command of one that was killed, runs it.

    The command inherits the lock, so that it is free when this process and the command have both
    ended, however they ended.
    """
    make_folder(job.lock_path.parent)
    try:
        return acquire(job.lock_path, f"running {job.name}", grace=LOCK_SECONDS)
    except FolderInUse:
        return None


def assign_devices(jobs: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """Share GPUs and cores among processes that run side by side.

    A smaller OMP_NUM_THREADS of the caller's holds for BLAS, too: torch takes MKL's number for all
    of its threads.

    Args:
        jobs: number of processes.
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them; processes take them in turn.
        cores: number of cores, shared out evenly.

    Returns:
        For each process, the environment variables that tell it its share.
    """
    share = max(1, cores // jobs)
    share = min(share, int(os.environ.get("OMP_NUM_THREADS") or share))
    threads = {}
    for name in THREAD_VARIABLES:
        limit = int(os.environ.get(name) or share)
        threads[name] = str(min(share, limit))
    environments = []
    for number in range(jobs):
        environment = dict(threads)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        environments.append(environment)
    return environments


@contextmanager
def _pass_on_signals(running: list[_RunningJob]) -> Iterator[list[int]]:
    """Within this context SIGINT, SIGTERM and SIGHUP ask the running processes to end (the second
    time, at once); yields the list of the signals that came.
    """
    received: list[int] = []
    last_time = 0.0

    def pass_on(number: int, frame: Any) -> None:
        nonlocal last_time
        # a terminal and a launcher may both send the same signal
        if received and time.monotonic() - last_time < 1:
            return
        signal_to_send = signal.SIGKILL if received else signal.SIGTERM
        for entry in running:
            entry.process.send_signal(signal_to_send)
        received.append(number)
        last_time = time.monotonic()

    handlers = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for entry in running:  # still there after an error in this process
            entry.process.terminate()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(job: Job, environment: dict[str, str], lock: Lock) -> _RunningJob:
    """Start the process of a job, its output added to the job's log."""
    make_folder(job.log.parent)
    with write_errors(job.log), open(job.log, "ab") as log:
        log_offset = log.tell()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            pass_fds=[] if lock.descriptor is None else [lock.descriptor],
        )
    return _RunningJob(job, process, environment, lock, log_offset, time.monotonic())


def _collect_result(entry: _RunningJob, is_stopping: bool) -> JobResult:
    """Free the lock of a process that has ended, and say how it ended."""
    entry.lock.release()
    name = entry.job.name
    code = entry.process.returncode
    seconds = time.monotonic() - entry.start_time
    if not code:
        return JobResult(name, "finished", seconds)
    if is_stopping:
        return JobResult(name, "stopped", seconds)
    return JobResult(name, "failed", seconds, _read_error(entry))


def _read_error(entry: _RunningJob) -> str:
    """The last sentence that run.py wrote to the log of a job that failed."""
    with open(entry.job.log, "rb") as log:
        log.seek(entry.log_offset)
        output = log.read().decode(errors="replace")
    messages = re.findall(r"^run\.py: (.*)$", output, re.MULTILINE)
    if messages:
        return messages[-1]
    return f"its process ended with code {entry.process.returncode}; {entry.job.log} says more"


def run_jobs(
    jobs: Sequence[Job],
    environments: Sequence[dict[str, str]],
    is_finished: Callable[[str], bool],
) -> Iterator[JobResult]:
    """Run jobs side by side, one in each environment, and yield how each ended as it ends.

    A signal that asks this process to stop is passed on: no more jobs are started, and those that
    it stopped are yielded.

    Args:
        jobs: in order.
        environments: of the processes that may run at the same time, from `assign_devices`.
        is_finished: whether another process has finished the job of that name meanwhile; called
            once the job's lock is ours.

    Raises:
        SystemExit: with 128 + the number of the signal, after a signal.
    """
    waiting, free = deque(jobs), deque(environments)
    running: list[_RunningJob] = []
    with _pass_on_signals(running) as received:
        while running or (waiting and not received):
            while waiting and free and not received:
                job = waiting.popleft()
                lock = lock_job(job)
                if lock is None:
                    yield JobResult(job.name, "elsewhere")
                elif is_finished(job.name):
                    lock.release()
                    yield JobResult(job.name, "before")
                else:
                    running.append(_start(job, free.popleft(), lock))
                    if received:  # between the check above and the start
                        running[-1].process.terminate()
            for entry in list(running):
                if entry.process.poll() is not None:
                    running.remove(entry)
                    free.append(entry.environment)
                    yield _collect_result(entry, bool(received))
            time.sleep(POLL_SECONDS)
    if received:
        raise SystemExit(128 + received[0])
