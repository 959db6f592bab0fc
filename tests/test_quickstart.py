"""The quickstart: a notebook without recipe machinery, which runs from nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.miniworld import open_mini_subject
from src.utils import PerceptError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def read_cells(path: Path, cell_type: str) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == cell_type]


def test_it_needs_no_recipe_and_no_parameters():
    code = "\n".join(read_cells(NOTEBOOK, "code"))
    assert "configure(" not in code and "recipe" not in code and "if " not in code
    assert all(len(cell.splitlines()) <= 20 for cell in read_cells(NOTEBOOK, "code"))


def test_the_ridge_is_five_lines():
    cell = next(cell for cell in read_cells(NOTEBOOK, "code") if cell.startswith("alpha ="))
    assert len(cell.splitlines()) == 5 and "np.linalg.solve" in cell


def test_make_lab_opens_it():
    assert "jupyter lab notebooks/quickstart.ipynb" in (ROOT / "Makefile").read_text()


@pytest.mark.slow(reason="simulates a subject and reconstructs images")
def test_it_runs_from_nothing_and_beats_its_baselines(tmp_path):
    environment = os.environ | {"PERCEPT_HOME": str(tmp_path)}
    convert = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    command = [*convert, str(NOTEBOOK), "--output-dir", str(tmp_path), "--output", "done.ipynb"]
    subprocess.run(command, check=True, timeout=900, env=environment, cwd=tmp_path)
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "A linear map from 1,572 voxels predicts" in text
    assert "Reconstruction minus nearest training image: 0." in text  # better, by the kind named


@pytest.mark.slow(reason="simulates a subject")
def test_another_number_of_training_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("src.utils.HOME", tmp_path)
    subject = open_mini_subject(n_train=20)
    assert len(subject.image_ids("train")) == 20 and subject.protocol == "mini-300"
    assert open_mini_subject(n_train=20).identity == subject.identity
    with pytest.raises(PerceptError, match="20 training images, and 30 are asked for"):
        open_mini_subject(n_train=30)
