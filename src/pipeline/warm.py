"""Kernels of the stages of a run that do not import the libraries anew: see fork_server.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("fork_server.py")

NVIDIA = Path("/dev/nvidiactl")  # there where a GPU is

# module of an ordinary kernel, as it stands in the command after the interpreter
KERNEL = ["-m", "ipykernel_launcher"]

SWITCH = "PERCEPT_FORK_SERVER"  # environment variable: 0 lets every stage import anew


class ForkServer:
    """A fork server of this process, started when it is first asked for.

    Attributes:
        socket: where it listens once it is ready.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="percept-")
        self.socket = Path(self._folder) / "server"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs already; its first kernels are ordinary ones, until it is
        ready.
        """
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "serve", str(self.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the kernels, which are told by their `launch`
        )

    def stop(self) -> None:
        """End it and its kernels."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


_current: ContextVar[ForkServer | None] = ContextVar("fork server", default=None)


@contextmanager
def warm_kernels(stages: int) -> Iterator[None]:
    """Within this context stages that are executed share their imports.

    On Linux and without a GPU: elsewhere libraries do not allow a fork, or a GPU that one of them
    has looked at cannot be used in its child. There, and for one stage alone, nothing is changed;
    nor is it with PERCEPT_FORK_SERVER=0 in the environment.

    Args:
        stages: that may be executed.
    """
    is_off = os.environ.get(SWITCH) == "0"
    if is_off or sys.platform != "linux" or NVIDIA.exists() or stages < 2:
        yield
        return
    server = ForkServer()
    token = _current.set(server)
    try:
        yield
    finally:
        _current.reset(token)
        server.stop()


def get_kernel_options() -> dict[str, Any]:
    """Options of papermill's engine by which it starts kernels that share their imports, {} outside
    of `warm_kernels`; the server is started.
    """
    server = _current.get()
    if server is None:
        return {}
    server.start()
    return {"kernel_manager_class": _make_manager_class(str(server.socket))}


def _make_manager_class(socket_path: str) -> type:
    """A kernel manager that starts `launch` in place of an ordinary kernel."""
    from jupyter_client.manager import AsyncKernelManager

    class WarmKernelManager(AsyncKernelManager):
        """As its base, with another command."""

        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            """The command of a kernel."""
            command = super().format_kernel_cmd(extra_arguments)
            if command[1:3] != KERNEL:
                return command
            return [command[0], os.fspath(SCRIPT), "launch", socket_path, *command[3:]]

    return WarmKernelManager
