"""Kernels that share their imports: forked from one server, otherwise as any kernel."""

import os
import re
import signal
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import DeadKernelError

from src.pipeline import stages, warm

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="forks on Linux alone")

SHOW = "import os, sys; print(os.getpid(), os.getppid(), 'colorsys' in sys.modules, os.getcwd())"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of two small libraries, that is ready."""
    text = warm.SCRIPT.read_text()
    libraries = 'LIBRARIES = ("ipykernel.kernelapp", "colorsys")'
    script = tmp_path / "fork_server.py"
    script.write_text(re.sub(r"LIBRARIES = \(.*?\n\)", libraries, text, flags=re.DOTALL))
    monkeypatch.setattr(warm, "SCRIPT", script)
    monkeypatch.setattr(warm, "NVIDIA", tmp_path / "no GPU")
    stages.register_kernel()
    with warm.warm_kernels(2):
        warm.get_kernel_options()
        server = warm._current.get()
        deadline = time.monotonic() + 30
        while not server.socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield server
    assert server._process.poll() is not None and not server.socket.parent.exists()


def execute(folder, *cells, **options):
    """Output of the cells of a notebook, as text."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, folder / "in.ipynb")
    executed = papermill.execute_notebook(
        folder / "in.ipynb",
        folder / "out.ipynb",
        kernel_name="percept",
        progress_bar=False,
        cwd=str(folder),
        **options,
    )
    return [cell["outputs"][0]["text"].strip() for cell in executed.cells if cell["outputs"]]


@pytest.mark.slow(reason="starts kernels")
def test_kernels_are_forked_with_the_libraries_of_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEPT_TEST", "seen")
    texts = [
        execute(tmp_path, SHOW, "print(os.environ['PERCEPT_TEST'])", **warm.get_kernel_options())
        for _ in range(2)
    ]
    kernels = [text[0].split() for text in texts]
    assert [kernel[1] for kernel in kernels] == [str(server._process.pid)] * 2
    assert kernels[0][0] != kernels[1][0] and kernels[0][2] == "True"
    assert kernels[0][3] == str(tmp_path) and texts[0][1] == "seen"
    monkeypatch.delenv("PERCEPT_TEST")
    (output,) = execute(
        tmp_path, "import os; print('PERCEPT_TEST' in os.environ)", **warm.get_kernel_options()
    )
    assert output == "False"


@pytest.mark.slow(reason="starts kernels")
def test_a_kernel_that_is_killed_or_fails_says_so_as_any_other(server, tmp_path):
    with pytest.raises(DeadKernelError):
        execute(tmp_path, "import os; os.kill(os.getpid(), 9)", **warm.get_kernel_options())
    with pytest.raises(papermill.PapermillExecutionError, match="division by zero"):
        execute(tmp_path, "1 / 0", **warm.get_kernel_options())


@pytest.mark.slow(reason="starts kernels")
def test_without_a_server_the_kernel_is_an_ordinary_one(server, tmp_path):
    options = warm.get_kernel_options()
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()
    (text,) = execute(tmp_path, SHOW, **options)
    assert text.split()[2] == "False"


def test_one_stage_a_gpu_or_the_switch_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "NVIDIA", tmp_path / "no GPU")
    with warm.warm_kernels(1):
        assert warm.get_kernel_options() == {}
    (tmp_path / "GPU").touch()
    monkeypatch.setattr(warm, "NVIDIA", tmp_path / "GPU")
    with warm.warm_kernels(6):
        assert warm.get_kernel_options() == {}
    monkeypatch.setattr(warm, "NVIDIA", tmp_path / "no GPU")
    monkeypatch.setenv("PERCEPT_FORK_SERVER", "0")
    with warm.warm_kernels(6):
        assert warm.get_kernel_options() == {}
