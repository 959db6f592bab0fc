"""What run.py knows of the data of a stage: prepared again, or their source changed."""

import re

import numpy as np
import pytest

from src import parameters, readers
from src.pipeline import recipes
from src.pipeline.inputs import FILE_PARAMETERS, RUN_PARAMETERS, describe_inputs
from tests.test_identity import write_npz

PREPARE = {"dataset": "mine", "subj": 1, "source": "npz"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("src.utils.HOME", tmp_path)
    write_npz(tmp_path / "my.npz")
    readers.read_source("npz", tmp_path / "my.npz", "mine", 1)
    return tmp_path


def test_data_that_are_prepared_again_are_another_input_of_later_stages(home):
    train = {"dataset": "mine", "subj": 1}
    before = describe_inputs(train)
    assert before == describe_inputs(train) and set(before) == {"data"}
    write_npz(home / "my.npz", seed=1)
    assert describe_inputs(train) == before  # not yet prepared
    readers.read_source("npz", home / "my.npz", "mine", 1)
    assert describe_inputs(train) != before
    assert describe_inputs(train | {"subj": 2}) == {}


def test_a_source_that_changes_under_its_name_is_another_input_of_the_preparation(home):
    prepare = PREPARE | {"data_path": str(home / "my.npz")}
    before = describe_inputs(prepare)
    assert "changed_source" not in before
    write_npz(home / "my.npz", seed=1)
    assert describe_inputs(prepare)["changed_source"] == {"subj01": "my.npz"}
    (home / "my.npz").unlink()
    assert describe_inputs(prepare) == before


def test_damaged_data_do_not_stop_run_py(home):
    (home / "data" / "mine" / "subj01" / "betas.h5").write_bytes(b"")
    assert "betas.h5" in describe_inputs({"dataset": "mine", "subj": 1})["data"]["subj01"]


def test_pretraining_reads_the_data_of_all_its_subjects(home):
    readers.read_source("npz", home / "my.npz", "mine", 2)
    values = {"dataset": "mine", "subj": 1, "multi_subject": True, "subjects": "1,2,3"}
    assert set(describe_inputs(values)["data"]) == {"subj01", "subj02"}
    assert set(describe_inputs(values | {"multi_subject": False})["data"]) == {"subj01"}
    assert set(describe_inputs({**PREPARE, "data_path": "", "also": "2"})["data"]) == {
        "subj01",
        "subj02",
    }


def test_every_parameter_that_names_a_file_or_a_run_is_looked_at():
    """By their comments; the others name what the stage writes, or a cache."""
    own = {"model_name", "wandb_run_name", "runs", "reference_run", "multisubject_ckpt"}
    named = re.compile(r"^(run (of|whose|or)|weights of|checkpoint of|latents that|a released)")
    for notebook in sorted(parameters.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        for parameter in recipes.read_declared_parameters(notebook.stem).values():
            if named.search(parameter.comment) and parameter.name not in own:
                assert parameter.name in FILE_PARAMETERS + RUN_PARAMETERS, parameter.name


def test_an_npz_of_the_same_betas_is_the_same_input(home):
    with np.load(home / "my.npz") as file:
        arrays = dict(file)
    before = describe_inputs({"dataset": "mine", "subj": 1})
    np.savez(home / "my.npz", **arrays)
    readers.read_source("npz", home / "my.npz", "mine", 1)
    assert describe_inputs({"dataset": "mine", "subj": 1}) == before
