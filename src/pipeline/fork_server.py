"""A process that has imported the libraries, and becomes the kernel of a stage by forking.

A stage spends ten seconds and more on imports. Here they are paid once for all stages of a run:

    python fork_server.py serve SOCKET            imports LIBRARIES, then forks at each request
    python fork_server.py launch SOCKET -f FILE   stands for one kernel: asks for it, passes signals
                                                  on, ends as it ends

- `launch` is what Jupyter takes for the kernel. Where the server is not ready yet, or is gone, it
  becomes an ordinary kernel itself.
- The server imports other people's libraries only. What is in `src` every stage imports anew, as it
  is then.
- The server ends when its standard input does, that is, with the process that started it. A kernel
  ends when its `launch` does, and `launch` with the process that started it.
- This file is run by its path and uses the standard library alone, so that `launch` starts quickly.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# matplotlib without pyplot, which asks at its import in which notebook it is
LIBRARIES = (
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "h5py",
    "pandas",
    "pyarrow.parquet",
    "scipy.stats",
    "sklearn.decomposition",
    "sklearn.model_selection",
    "himalaya.ridge",
    "matplotlib.figure",
    "matplotlib.lines",
    "mpl_toolkits.mplot3d",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.data",
    "torchvision.transforms.v2",
    "kornia",
    "accelerate",
    "webdataset",
    "transformers.image_processing_utils",
    "transformers.models.clip.modeling_clip",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.pipeline_utils",
)

# as a kernel sets it, which matplotlib reads when it is imported
MATPLOTLIB_BACKEND = ("MPLBACKEND", "module://matplotlib_inline.backend_inline")

HEADER = struct.Struct("!Q")  # length of a request, in bytes

POLL_SECONDS = 0.2

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Request = dict[str, Any]  # arguments, folder and environment of a kernel


def main(arguments: list[str]) -> None:
    """`serve` or `launch`."""
    action, path, *rest = arguments
    if action == "serve":
        request = serve(Path(path))
        if request is not None:  # this is a child, and the request is its own
            become_kernel(request)
        return
    launch(path, rest)


# ----------------------------------------------------------------------------------------- server
def serve(path: Path) -> Request | None:
    """Import the libraries, then fork at each request until standard input ends.

    Returns:
        In a child its request, in the server itself None at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault(*MATPLOTLIB_BACKEND)
    for name in LIBRARIES:
        with suppress(ImportError):  # whoever needs it will say so
            importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    unfinished = path.with_suffix(".starting")
    listener.bind(str(unfinished))
    listener.listen()
    os.rename(unfinished, path)  # from here on `launch` finds it
    children: dict[int, socket.socket] = {}
    while True:
        waiting = [sys.stdin, listener, *children.values()]
        ready = select.select(waiting, [], [], POLL_SECONDS)[0]
        if listener in ready:
            connection = listener.accept()[0]
            request, descriptors = receive_request(connection)
            pid = os.fork()
            if not pid:
                for other in (listener, connection, *children.values()):
                    other.close()
                take_over(descriptors)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
            connection.sendall(f"{pid}\n".encode())
            children[pid] = connection
        for pid, connection in list(children.items()):
            if connection in ready and not _receive(connection):  # its `launch` is gone
                os.kill(pid, signal.SIGKILL)
            if _report_end(pid, connection):
                del children[pid]
        if sys.stdin in ready and not os.read(0, 1024):
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return None


def _receive(connection: socket.socket) -> bytes:
    """What a `launch` has sent, b"" where it is gone."""
    try:
        return connection.recv(1024)
    except OSError:
        return b""


def _report_end(pid: int, connection: socket.socket) -> bool:
    """Whether a child has ended; its `launch` is told how."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        return False
    with suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    connection.close()
    return True


def receive_request(connection: socket.socket) -> tuple[Request, list[int]]:
    """A request, and the standard streams that came with it."""
    content, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 3)
    while len(content) < HEADER.size:
        content += connection.recv(HEADER.size - len(content))
    size = HEADER.unpack(content)[0]
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), list(descriptors)


def take_over(descriptors: list[int]) -> None:
    """Make these the standard streams of this process, which leads a session of its own."""
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)


def become_kernel(request: Request) -> None:
    """Run the kernel that was asked for, to its end."""
    import random

    import numpy as np
    from ipykernel import kernelapp

    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.pop("JPY_PARENT_PID", None)  # `launch` looks after that
    os.chdir(request["folder"])
    random.seed()
    np.random.seed()
    # with a parent, a kernel ends when that does, and does not print how to connect to it
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    sys.argv = ["ipykernel_launcher", *request["arguments"], parent]
    # as of a kernel that was started by `python -m`, without the folder of this file
    sys.path[0] = request["folder"]
    kernelapp.launch_new_instance()


# ------------------------------------------------------------------------------------------ launch
def launch(path: str, arguments: list[str]) -> None:
    """Stand for one kernel until it ends, and end in the same way."""
    parent = os.getppid()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        send_request(connection, arguments)
        pid = int(_read_line(connection))
    except (OSError, ValueError):  # no server, or none any more
        command = [sys.executable, "-m", "ipykernel_launcher", *arguments]
        os.execv(sys.executable, command)
    for number in PASSED_ON:
        signal.signal(number, lambda received, frame: _kill(pid, received))
    while not select.select([connection], [], [], POLL_SECONDS)[0]:
        if os.getppid() != parent:  # whoever started this is gone
            _kill(pid, signal.SIGTERM)
            return
    code = int(_read_line(connection) or -signal.SIGKILL)
    if code < 0:
        with suppress(OSError):  # that of SIGKILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def send_request(connection: socket.socket, arguments: list[str]) -> None:
    """Ask for a kernel with this process's folder, environment and standard streams."""
    request = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    text = json.dumps(request).encode()
    socket.send_fds(connection, [HEADER.pack(len(text))], [0, 1, 2])
    connection.sendall(text)


def _read_line(connection: socket.socket) -> str:
    """A line that the server sent, "" where it is gone."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            return ""
        line += part
    return line.decode().strip()


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main(sys.argv[1:])
