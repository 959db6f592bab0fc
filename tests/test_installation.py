"""Where Percept may lie: systems without POSIX modules, and folders that may not be written."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src import utils
from src.pipeline import stages
from src.utils import ROOT

POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "src").rglob("*.py")), ROOT / "run.py"], ids=lambda p: p.name
)
def test_posix_modules_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {child for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if node in inside:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & POSIX_MODULES, node.lineno


def test_what_users_import_needs_no_posix_module():
    code = (
        "import sys, signal\n"
        f"for name in {sorted(POSIX_MODULES - {'posix'})}: sys.modules[name] = None\n"
        "del signal.SIGHUP\n"
        "import run, src.utils, src.parameters, src.files.ownership, src.pipeline.sweep\n"
        "from src.utils import peak_memory\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_the_systems():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Linux and macOS are supported, Windows through WSL" in text


def test_the_kernel_is_registered_at_home_where_the_interpreter_may_not_be_written(
    tmp_path, monkeypatch
):
    (tmp_path / "prefix").write_text("a file: nothing can be written below it")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    monkeypatch.setenv("JUPYTER_PATH", "")
    stages.register_kernel()
    kernel = tmp_path / "home" / ".jupyter" / "kernels" / "percept" / "kernel.json"
    assert "--log-level=ERROR" in kernel.read_text()
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "home" / ".jupyter")
    before = kernel.stat().st_mtime_ns
    stages.register_kernel()
    assert kernel.stat().st_mtime_ns == before


READ_ONLY = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
if touch "$1/probe" 2> /dev/null; then exit 77; fi
"$2" "$1/run.py" mindeye --mini --to 00 -p mini_images 40 -p trials_per_session 40
"$2" -c 'from src.pretrained.base import locate_model
import torch
from src import metrics
locate_model("clip", "mini")
images = torch.rand(3, 3, 32, 32)
metrics.ssim(images, images)'
"""


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    )


@pytest.mark.slow(reason="prepares a small mini world with the repository mounted read-only")
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_a_repository_that_may_not_be_written_works(tmp_path):
    environment = {
        "PERCEPT_HOME": str(tmp_path / "percept"),
        "HOME": str(tmp_path / "user"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", str(ROOT), sys.executable],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    if done.returncode == 77:
        pytest.skip("the mount is not read-only here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "percept" / "data" / "mini" / "subj01" / "betas.h5").exists()
    assert not Path(ROOT / "probe").exists()
