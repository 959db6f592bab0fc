"""run.py: order, overrides, skipping, resuming, and what it says when a stage fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import run
from src import utils
from src.utils import PerceptError

ROOT = Path(run.__file__).parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two tiny stages and a recipe with a miniature."""
    notebooks, recipes = tmp_path / "notebooks", tmp_path / "recipes" / "sys" / "mini"
    notebooks.mkdir()
    recipes.mkdir(parents=True)
    for stage, body in (("00_first", "number = 1  # a number"), ("01_second", "fail = False  # fail on purpose")):
        cells = [
            nbformat.v4.new_markdown_cell(f"# {stage}\n\nCost: nothing\nat all"),
            nbformat.v4.new_code_cell(f'model_name = ""  # run\nsubj = 1  # subject\n{body}', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("if 'fail' in globals() and fail:\n    raise ValueError('on purpose')\nprint(subj, model_name)"),
        ]
        meta = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), notebooks / f"{stage}.ipynb")
        (recipes.parent / f"{stage}.yaml").write_text("# defaults\n")
    (recipes / "00_first.yaml").write_text("number: 7\n")
    monkeypatch.setattr(utils, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(utils, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    return tmp_path


def test_runs_in_order_skips_what_is_finished_and_resumes_after_a_failure(project, capsys):
    with pytest.raises(PerceptError, match="Stage 01_second stopped: ValueError: on purpose"):
        run.run_recipe("sys/mini", {"fail": "true"})
    results = project / "home" / "results" / "sys-mini-subj01"
    assert (results / "00_first.ipynb").exists() and (results / "01_second.failed.ipynb").exists() and not (results / "01_second.ipynb").exists()
    assert json.loads((results / ".stages" / "00_first.json").read_text())["parameters"]["number"] == 7
    capsys.readouterr()
    run.run_recipe("sys/mini", {})
    said = capsys.readouterr().out
    assert "00_first: finished before" in said and "01_second ..." in said and not (results / "01_second.failed.ipynb").exists()
    assert not list(results.glob(".*running*"))
    run.run_recipe("sys/mini", {})
    assert capsys.readouterr().out.count("finished before") == 2


def test_an_override_goes_to_every_stage_that_has_the_name(project):
    results = run.run_recipe("sys", {"subj": "5"})
    assert results.name == "sys-subj05"
    for stage in ("00_first", "01_second"):
        outputs = nbformat.read(results / f"{stage}.ipynb", 4).cells[-1].outputs
        assert outputs[0]["text"].strip() == "5 sys-subj05"


def test_a_change_of_parameters_or_notebook_runs_the_stage_and_those_after_it_again(project, capsys):
    run.run_recipe("sys", {"model_name": "x"})
    capsys.readouterr()
    run.run_recipe("sys", {"model_name": "x", "number": "3"})
    assert "finished before" not in capsys.readouterr().out


def test_refusals(project):
    with pytest.raises(PerceptError, match="no parameter 'numbr'.*did you mean 'number'"):
        run.run_recipe("sys", {"numbr": "1"})
    with pytest.raises(PerceptError, match="no recipe 'system'.*sys"):
        run.run_recipe("system", {})
    with pytest.raises(PerceptError, match="must be a whole number"):
        run.run_recipe("sys", {"subj": "one"})
    with pytest.raises(PerceptError, match="names no stage"):
        run.run_recipe("sys", {}, first="07")


def command(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "run.py"), *arguments], capture_output=True, text=True, timeout=120, env=os.environ)


def test_list_shows_recipes_stages_and_cost():
    done = command("list")
    assert done.returncode == 0 and "mindeye  (also --mini)" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "01_train_high_level" in line)
    assert "A100" in line and "mini" in line


def test_sweep_is_reserved():
    done = command("sweep")
    assert done.returncode != 0 and "not there yet" in done.stderr
