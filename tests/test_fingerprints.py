"""src.pipeline.fingerprints: what makes a finished stage old, and what does not."""

import json
from pathlib import Path

import pytest

from src.pipeline import fingerprints
from src.pipeline.fingerprints import (
    find_import_closure,
    fingerprint_code,
    list_versions,
    normalise_code,
    read_notebook_code,
)

ROOT = Path(__file__).resolve().parents[1]
LATE = '''"""Names that are imported when they are first used."""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.frozen.clip import SIZE
    from src.frozen.vae import SCALE

_EXPORTS = {"clip": ["SIZE"], "vae": ["SCALE"]}
__all__ = ["SCALE", "SIZE"]


def __getattr__(name):
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(name)
'''
FILES = {
    "src/__init__.py": "",
    "src/models.py": (
        '"""Names."""\nfrom src.networks.encoder import Encoder\nfrom src.networks.decoder import'
        " Decoder\n"
    ),
    "src/networks/__init__.py": "",
    "src/networks/encoder.py": (
        "import numpy as np\nfrom .layers import width\n\nclass Encoder:\n    size = width()\n"
    ),
    "src/networks/decoder.py": "import scipy\n\nclass Decoder:\n    pass\n",
    "src/networks/layers.py": "def width():\n    from src import shapes\n    return shapes.WIDTH\n",
    "src/shapes.py": "WIDTH = 4\n",
    "src/frozen/__init__.py": LATE,
    "src/frozen/clip.py": "SIZE = 224\n",
    "src/frozen/vae.py": "SCALE = 0.18\n",
    "src/report.py": "from pathlib import Path\nPAGE = Path(__file__).with_name('page.html')\n",
    "src/page.html": "<p>",
    "src/remote.py": "PORT = 80\n",
}


def write_notebook(path: Path, *cells: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = [{"cell_type": "code", "source": cell, "metadata": {}} for cell in cells]
    text = [{"cell_type": "markdown", "source": "# Question", "metadata": {}}]
    path.write_text(json.dumps({"cells": text + code}))


@pytest.fixture
def house(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    write_notebook(
        tmp_path / "stage.ipynb",
        "%matplotlib inline\nfrom src.models import Encoder",
        "Encoder().size",
    )
    return tmp_path


def fingerprint(house: Path) -> str:
    return fingerprint_code(house / "stage.ipynb", house)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("src/networks/encoder.py", "class Encoder:", "# a network\nclass Encoder:"),
        ("src/networks/encoder.py", "class Encoder:", 'class Encoder:\n    """A network."""\n'),
        ("src/networks/encoder.py", "size = width()", "size = (\n        width()\n    )"),
        ("src/shapes.py", "WIDTH = 4", "WIDTH = 4  # tokens"),
        ("src/networks/decoder.py", "pass", "depth = 3"),
        ("src/remote.py", "80", "443"),
        ("src/page.html", "<p>", "<b>"),
        ("src/models.py", "import Decoder", "import Decoder as Decoder"),
        ("stage.ipynb", "# Question", "# Another question"),
        ("stage.ipynb", "Encoder().size", "Encoder().size  # tokens"),
    ],
)
def test_what_changes_no_result_keeps_the_stage_finished(house, name, old, new):
    before = fingerprint(house)
    edit(house / name, old, new)
    assert fingerprint(house) == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("src/networks/encoder.py", "size = width()", "size = 2 * width()"),
        ("src/networks/layers.py", "shapes.WIDTH", "shapes.WIDTH + 1"),
        ("src/shapes.py", "WIDTH = 4", "WIDTH = 5"),
        (
            "src/models.py",
            "src.networks.encoder import Encoder",
            "src.networks.decoder import Decoder as Encoder",
        ),
        ("stage.ipynb", "Encoder().size", "Encoder().size + 1"),
    ],
)
def test_changed_code_that_is_imported_makes_the_stage_old(house, name, old, new):
    before = fingerprint(house)
    edit(house / name, old, new)
    assert fingerprint(house) != before


def test_a_package_that_imports_late_is_looked_through(house):
    write_notebook(house / "stage.ipynb", "from src.frozen import SIZE")
    before = fingerprint(house)
    edit(house / "src/frozen/vae.py", "0.18", "0.13")
    edit(house / "src/frozen/__init__.py", "raise AttributeError(name)", "raise AttributeError")
    assert fingerprint(house) == before
    edit(house / "src/frozen/clip.py", "224", "336")
    assert fingerprint(house) != before


def test_a_package_with_code_of_its_own_is_not_looked_through(house):
    write_notebook(house / "stage.ipynb", "from src.frozen import SIZE")
    edit(house / "src/frozen/__init__.py", "__all__", "RATE = 3\n__all__")
    before = fingerprint(house)
    edit(house / "src/frozen/vae.py", "0.18", "0.13")
    assert fingerprint(house) != before


def test_the_template_of_an_imported_module_counts(house):
    write_notebook(house / "stage.ipynb", "from src.report import PAGE")
    before = fingerprint(house)
    edit(house / "src/page.html", "<p>", "<b>")
    assert fingerprint(house) != before


def test_versions_of_imported_libraries_count_and_of_others_do_not(house, monkeypatch):
    installed = {"numpy": "2.0", "scipy": "1.0"}
    monkeypatch.setattr(fingerprints, "version", lambda name: installed[name])
    before = fingerprint(house)
    installed["scipy"] = "1.1"
    assert fingerprint(house) == before
    installed["numpy"] = "2.1"
    assert fingerprint(house) != before


def test_a_library_that_is_not_installed_is_absent(monkeypatch):
    assert list_versions(["json", "os"]).keys() == {"python"}
    monkeypatch.setitem(fingerprints.NUMERIC_LIBRARIES, "nowhere", "percept-no-such-package")
    assert list_versions(["nowhere"])["nowhere"] == "absent"


def test_docstrings_are_not_code_but_other_texts_are():
    assert normalise_code('def f():\n    """A."""\n    return 1') == normalise_code(
        "def f():\n    return 1"
    )
    assert normalise_code("x = 'a'") != normalise_code("x = 'b'")


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_real_notebooks_depend_on_their_own_code(notebook):
    import ast

    closure = find_import_closure(ast.parse(read_notebook_code(notebook)), ROOT)
    names = {path.relative_to(ROOT).as_posix() for path in closure.modules}
    assert "src/utils.py" in names and "torch" in closure.libraries
    assert not any(name.startswith("src/pipeline/fingerprints") for name in names)
