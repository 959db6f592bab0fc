"""Fixtures shared by the tests: where the reference material lies, and one thread for torch so that
results do not depend on load.
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from pretend_gpu import pretend_gpu

torch.set_num_threads(1)
SHARED = Path(os.environ.get("PERCEPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _reference(path: Path) -> Path:
    if not path.exists():
        pytest.skip(
            f"reference material is absent ({path.relative_to(SHARED.parent)}); it is not part of"
            " the repository"
        )
    return path


def pytest_collection_modifyitems(items):
    """Every slow test says why it is slow: `@pytest.mark.slow(reason="runs a whole recipe")`."""
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is not None and not mark.kwargs.get("reason"):
            raise pytest.UsageError(f"{item.nodeid} is marked slow without a reason")


@pytest.fixture(autouse=True)
def ordinary_kernels(request, monkeypatch):
    """Fast tests, and those of sweeps, run stages that import little: a server with all libraries
    would cost more.
    """
    file = request.path.name
    is_slow = request.node.get_closest_marker("slow") is not None
    if file == "test_sweep.py" or (not is_slow and file != "test_warm.py"):
        monkeypatch.setenv("PERCEPT_FORK_SERVER", "0")


@pytest.fixture(autouse=True)
def figures_closed():
    """Close what a test drew: test_figures counts open figures, whichever file ran before it on the
    same worker.
    """
    yield
    plt.close("all")


@pytest.fixture(
    params=[
        "pretended",
        pytest.param(
            "real", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ]
)
def gpu(request):
    """A GPU under the name "cuda": pretended on every machine, real where there is one. What the
    pretended one counts, None of the real one.
    """
    if request.param == "real":
        yield None
        return
    with pretend_gpu() as counts:
        yield counts


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of arrays computed by the published systems on seeded inputs."""
    return _reference(SHARED / "golden")


@pytest.fixture(scope="session")
def digits69_path() -> Path:
    """The digits69 MATLAB file, which its terms forbid us to ship."""
    return _reference(SHARED / "digits69" / "digit69_28x28.mat")
