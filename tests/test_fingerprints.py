"""src.pipeline.fingerprints: what makes a finished stage old, and what does not."""

import json
import shutil
import time
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
def repository(tmp_path):
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


def fingerprint(repository: Path) -> str:
    return fingerprint_code(repository / "stage.ipynb", repository)


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
def test_what_changes_no_result_keeps_the_stage_finished(repository, name, old, new):
    before = fingerprint(repository)
    edit(repository / name, old, new)
    assert fingerprint(repository) == before


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
def test_changed_code_that_is_imported_makes_the_stage_old(repository, name, old, new):
    before = fingerprint(repository)
    edit(repository / name, old, new)
    assert fingerprint(repository) != before


def test_a_package_that_imports_late_is_looked_through(repository):
    write_notebook(repository / "stage.ipynb", "from src.frozen import SIZE")
    before = fingerprint(repository)
    edit(repository / "src/frozen/vae.py", "0.18", "0.13")
    edit(
        repository / "src/frozen/__init__.py", "raise AttributeError(name)", "raise AttributeError"
    )
    assert fingerprint(repository) == before
    edit(repository / "src/frozen/clip.py", "224", "336")
    assert fingerprint(repository) != before


def test_a_package_with_code_of_its_own_is_not_looked_through(repository):
    write_notebook(repository / "stage.ipynb", "from src.frozen import SIZE")
    edit(repository / "src/frozen/__init__.py", "__all__", "RATE = 3\n__all__")
    before = fingerprint(repository)
    edit(repository / "src/frozen/vae.py", "0.18", "0.13")
    assert fingerprint(repository) != before


def test_the_template_of_an_imported_module_counts(repository):
    write_notebook(repository / "stage.ipynb", "from src.report import PAGE")
    before = fingerprint(repository)
    edit(repository / "src/page.html", "<p>", "<b>")
    assert fingerprint(repository) != before


def test_versions_of_imported_libraries_count_and_of_others_do_not(repository, monkeypatch):
    installed = {"numpy": "2.0", "scipy": "1.0"}
    monkeypatch.setattr(fingerprints, "version", lambda name: installed[name])
    before = fingerprint(repository)
    installed["scipy"] = "1.1"
    assert fingerprint(repository) == before
    installed["numpy"] = "2.1"
    assert fingerprint(repository) != before


def test_a_library_that_is_not_installed_is_absent(monkeypatch):
    assert list_versions(["json", "os"]).keys() == {"python"}
    monkeypatch.setitem(fingerprints.NUMERIC_LIBRARIES, "nowhere", "percept-no-such-package")
    assert list_versions(["nowhere"])["nowhere"] == "absent"


def test_docstrings_are_not_code_but_other_texts_are():
    assert normalise_code('def f():\n    """A."""\n    return 1') == normalise_code(
        "def f():\n    return 1"
    )
    assert normalise_code("x = 'a'") != normalise_code("x = 'b'")


def test_libraries_and_modules_that_are_imported_by_name_count(repository):
    code = (
        "from importlib import import_module\n"
        "from src.utils import require_extra\n"
        "faiss = require_extra('faiss', 'search')\n"
        "shapes = import_module('src.shapes')\n"
    )
    closure = find_import_closure(code, repository)
    assert "faiss" in closure.libraries
    assert closure.modules == {repository / "src/shapes.py"}


def test_what_only_type_checkers_import_does_not_count(repository):
    code = "if TYPE_CHECKING:\n    import scipy\n    from src.shapes import WIDTH\n"
    closure = find_import_closure(code, repository)
    assert not closure.modules and not closure.libraries


def test_a_package_that_is_imported_as_a_whole_depends_on_all_of_it(repository):
    for code in ("from src import frozen", "import src.frozen as frozen"):
        closure = find_import_closure(code, repository)
        names = {path.name for path in closure.modules}
        assert names == {"__init__.py", "clip.py", "vae.py"}


def test_what_a_training_will_need_does_not_make_it_old(repository):
    write_notebook(repository / "stage.ipynb", "from src.pipeline.dryrun import plan_stage")
    plan = repository / "src/pipeline/dryrun.py"
    plan.parent.mkdir()
    plan.write_text("def plan_stage():\n    return 1\n")
    before = fingerprint(repository)
    edit(plan, "return 1", "return 2")
    assert fingerprint(repository) == before


# ------------------------------------------------------------------------------ the real notebooks
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def list_closure(stage: str) -> set[str]:
    source = read_notebook_code(ROOT / "notebooks" / f"{stage}.ipynb")
    closure = find_import_closure(source, ROOT)
    return {path.relative_to(ROOT).as_posix() for path in closure.modules}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_real_notebooks_depend_on_their_own_code(notebook):
    closure = find_import_closure(read_notebook_code(notebook), ROOT)
    names = {path.relative_to(ROOT).as_posix() for path in closure.modules}
    assert "src/utils.py" in names and "torch" in closure.libraries
    assert not any(name.startswith("src/pipeline/fingerprints") for name in names)
    assert not any(name.startswith("src/pipeline/dryrun") for name in names)


def test_reconstructing_does_not_depend_on_search_downloads_or_reports():
    names = list_closure("03_reconstruct")
    unrelated = ("src/search", "src/pipeline", "src/evaluation/report", "src/miniworld/formats")
    assert not [name for name in names if name.startswith(unrelated)]
    assert {"src/data/subject.py", "src/decoding/generate.py", "src/prior.py"} <= names


@pytest.mark.parametrize("stage", ["01_train_high_level", "03_reconstruct"])
def test_packages_that_hand_on_names_are_looked_through(stage):
    names = list_closure(stage)
    for package in ("data", "networks", "training", "decoding", "pretrained"):
        assert f"src/{package}/__init__.py" not in names
        assert any(name.startswith(f"src/{package}/") for name in names)
    assert "src/pretrained/captioners.py" not in names


def test_preparing_depends_on_every_reader_that_can_be_chosen():
    from src.readers import READERS

    names = list_closure("00_prepare_data")
    readers = {Path(module.__file__).relative_to(ROOT).as_posix() for module in READERS.values()}
    assert len(readers) >= 9 and readers <= names
    assert "src/readers/common.py" in names


def test_a_change_makes_only_those_real_stages_old_that_run_it(tmp_path):
    for folder in ("src", "notebooks"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    stages = ("00_prepare_data", "03_reconstruct", "05_search_index")

    def change(name: str) -> set[str]:
        """The stages that a change of one module makes old."""

        def hash_all():
            return {
                s: fingerprint_code(tmp_path / f"notebooks/{s}.ipynb", tmp_path) for s in stages
            }

        before, path = hash_all(), tmp_path / name
        path.write_text(path.read_text() + "\nCHANGED = True\n")
        after = hash_all()
        return {stage for stage in stages if before[stage] != after[stage]}

    assert change("src/search/qdrant.py") == {"05_search_index"}
    assert "00_prepare_data" not in change("src/decoding/generate.py")
    assert "00_prepare_data" in change("src/readers/npz.py")
    assert change("src/utils.py") == set(stages)
    assert change("src/evaluation/report/page.py") == set()


def test_the_fingerprints_of_a_recipe_are_quick():
    start = time.process_time()
    for stage in sorted((ROOT / "recipes" / "mindeye").glob("*.yaml")):
        fingerprint_code(ROOT / "notebooks" / f"{stage.stem}.ipynb", ROOT)
    assert time.process_time() - start < 3  # 1.2 s, and as much again for slow machines
