"""The contract of parameters: cell < recipe files in order < single overrides, by every way into a
stage.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from src import parameters, utils
from src.utils import PerceptError

CELL = """recipe = ""  # a recipe folder
model_name = ""  # name of the run
subj = 1  # subject
max_lr = 3.0e-4  # peak learning rate
prior = True  # train the prior
kind = "network"  # one of network, ridge
"""
SHOW = (
    'print("VALUES", {"subj": subj, "max_lr": max_lr, "prior": prior, "kind": kind, "run":'
    " run.name})"
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A notebook with its export and two recipe files, in a folder of its own; kernels and scripts
    are pointed there by a small preamble.
    """
    notebooks, recipes = tmp_path / "notebooks", tmp_path / "recipes" / "sys" / "mini"
    notebooks.mkdir()
    recipes.mkdir(parents=True)
    (recipes.parent / "01_stage.yaml").write_text("subj: 2\nmax_lr: 1e-3\n")
    (recipes / "01_stage.yaml").write_text("subj: 5\n")
    where = (
        "from pathlib import Path\nfrom src import parameters\nparameters.NOTEBOOKS ="
        f" Path({str(notebooks)!r})\nparameters.RECIPES = Path({str(tmp_path / 'recipes')!r})\n"
    )
    configure = (
        where + 'from src.parameters import configure\nrun = configure(globals(), "01_stage")\n'
        "run.record_parameters()"
    )
    cells = [
        nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(configure),
        nbformat.v4.new_code_cell(SHOW),
    ]
    nb = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )
    nbformat.write(nb, notebooks / "01_stage.ipynb")
    (notebooks / "01_stage.py").write_text(
        f'# %% tags=["parameters"]\n{CELL}\n# %%\n{configure}\n\n# %%\n{SHOW}\n'
    )
    monkeypatch.setenv("PERCEPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    for name in ("PERCEPT_ARGS", "PERCEPT_RECIPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parameters, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(parameters, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    return tmp_path


def values(text: str) -> dict:
    line = next(line for line in text.splitlines() if line.startswith("VALUES"))
    return eval(line.removeprefix("VALUES "))


def printed(notebook) -> dict:
    return values(
        "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    )


def script(project, *flags, launcher=(sys.executable,)):
    command = [*launcher, str(project / "notebooks" / "01_stage.py"), *flags]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


# -------------------------------------------------------------------------------- the five ways in
def test_jupyterlab_kernel_takes_the_recipe_named_in_the_cell(project):
    nb = nbformat.read(project / "notebooks" / "01_stage.ipynb", 4)
    nb.cells[0].source = CELL.replace('recipe = ""', 'recipe = "sys/mini"').replace(
        'kind = "network"', 'kind = "ridge"'
    )
    printed_values = printed(NotebookClient(nb, timeout=120).execute())
    assert printed_values == {
        "subj": 5,
        "max_lr": 1e-3,
        "prior": True,
        "kind": "ridge",
        "run": "sys-mini-subj05",
    }


def test_papermill_overrides_win_over_recipe_and_unknown_names_are_refused(project):
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source, target = project / "notebooks" / "01_stage.ipynb", project / "out.ipynb"
    papermill.execute_notebook(
        source, target, {"recipe": "sys/mini", "subj": 1, "max_lr": "2e-3"}, progress_bar=False
    )
    assert printed(nbformat.read(target, 4)) == {
        "subj": 1,
        "max_lr": 2e-3,
        "prior": True,
        "kind": "network",
        "run": "sys-mini-subj01",
    }
    record = json.loads(
        (project / "home/results/sys-mini-subj01/parameters/01_stage.json").read_text()
    )
    assert record["subj"]["from"] == "papermill" and record["prior"]["from"] == "cell"
    with pytest.raises(PapermillExecutionError, match="no parameter 'sbuj'.*did you mean 'subj'"):
        papermill.execute_notebook(source, target, {"sbuj": 1}, progress_bar=False)


def test_nbconvert_takes_percept_args(project, monkeypatch):
    monkeypatch.setenv(
        "PERCEPT_ARGS", f"-f {project}/recipes/sys/01_stage.yaml -p subj 7 --no-prior"
    )
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--execute",
        "--to",
        "notebook",
        str(project / "notebooks" / "01_stage.ipynb"),
    ]
    done = subprocess.run(
        [*command, "--output", str(project / "out.ipynb")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert printed(nbformat.read(project / "out.ipynb", 4)) == {
        "subj": 7,
        "max_lr": 1e-3,
        "prior": False,
        "kind": "network",
        "run": "sys-subj07",
    }


def test_python_script_takes_flags(project):
    done = script(
        project,
        "-f",
        str(project / "recipes/sys/01_stage.yaml"),
        "--max_lr=5e-4",
        "--no-prior",
        "--kind",
        "ridge",
    )
    assert values(done.stdout) == {
        "subj": 2,
        "max_lr": 5e-4,
        "prior": False,
        "kind": "ridge",
        "run": "sys-subj02",
    }, done.stderr
    record = json.loads((project / "home/results/sys-subj02/parameters/01_stage.json").read_text())
    assert (
        record["max_lr"] == {"value": 5e-4, "from": "the command line"}
        and record["subj"]["from"] == "sys/01_stage.yaml"
    )


def test_accelerate_launch_passes_the_flags_on(project):
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    )
    done = script(
        project, "--prior=False", "-p", "subj", "7", "--model_name", "mine", launcher=launcher
    )
    assert values(done.stdout) == {
        "subj": 7,
        "max_lr": 3e-4,
        "prior": False,
        "kind": "network",
        "run": "mine",
    }, done.stderr


def test_help_lists_every_parameter_with_comment_and_default(project):
    text = script(project, "--help").stdout
    assert all(
        name in text for name in ("--subj", "--max_lr", "--prior", "peak learning rate", "0.0003")
    )


def test_lab_chooses_the_recipe_by_environment(project, monkeypatch):
    monkeypatch.setenv("PERCEPT_RECIPE", "sys/mini")
    scope = {name: p.default for name, p in parameters.parse_parameters(CELL).items()} | {
        "In": [],
        "__name__": "__main__",
    }
    assert parameters.configure(scope, "01_stage").name == "sys-mini-subj05" and scope["subj"] == 5


def test_a_value_that_papermill_only_restates_keeps_its_origin(project):
    scope = {name: p.default for name, p in parameters.parse_parameters(CELL).items()}
    injected = '# Parameters\nrecipe = "sys/mini"\nsubj = 5\nmax_lr = 2.0e-3\n'
    exec(injected, scope)
    origins = parameters.configure(
        scope | {"In": ["", CELL, injected], "__name__": "__main__"}, "01_stage"
    ).origins
    assert (
        origins["subj"] == "mini/01_stage.yaml"
        and origins["max_lr"] == "papermill"
        and origins["kind"] == "cell"
    )


# --------------------------------------------------------------------------------- what is refused
@pytest.fixture
def definitions():
    return parameters.parse_parameters(CELL)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("subj", "3", 3),
        ("subj", 3.0, 3),
        ("subj", "9007199254740993", 9007199254740993),
        ("max_lr", 1, 1.0),
        ("max_lr", "1e-3", 1e-3),
        ("prior", "false", False),
        ("prior", True, True),
        ("recipe", 3, "3"),
    ],
)
def test_values_come_to_the_type_of_the_default(definitions, name, value, expected):
    coerced = parameters.coerce(definitions[name], value, "here")
    assert coerced == expected and type(coerced) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("subj", 1.5),
        ("subj", "one"),
        ("subj", True),
        ("max_lr", "fast"),
        ("prior", "maybe"),
        ("kind", "forest"),
        ("recipe", [1]),
    ],
)
def test_wrong_types_and_choices_are_refused_by_name(definitions, name, value):
    with pytest.raises(PerceptError, match=f"Parameter '{name}' from here"):
        parameters.coerce(definitions[name], value, "here")


@pytest.mark.parametrize(
    ("value", "limits"),
    [(0, "must be at least 1"), (5, "must be at most 4"), (-1, "must be at least 1")],
)
def test_numbers_out_of_the_range_that_the_comment_gives_are_refused(value, limits):
    share = parameters.parse_parameters(
        '# %% tags=["parameters"]\nsize = 2  # of something, at least 1, at most 4; more\nrate ='
        " 0.1  # more than 0\n"
    )
    assert parameters.coerce(share["size"], 4, "here") == 4
    with pytest.raises(PerceptError, match=f"Parameter 'size' from here is {value}, but {limits}"):
        parameters.coerce(share["size"], value, "here")
    with pytest.raises(PerceptError, match="must be more than 0"):
        parameters.coerce(share["rate"], 0, "here")


def test_unknown_names_in_recipe_and_flags_are_refused(project):
    (project / "recipes/sys/mini/01_stage.yaml").write_text("max_rl: 3\n")
    done = script(project, "--recipe", "sys/mini")
    assert (
        done.returncode != 0
        and "no parameter 'max_rl'" in done.stderr
        and "did you mean 'max_lr'" in done.stderr
    )
    done = script(project, "--pior")
    assert done.returncode != 0 and "did you mean 'prior'" in done.stderr


def test_missing_or_broken_recipes_are_named(project, tmp_path):
    with pytest.raises(PerceptError, match="no recipe 'system'.*sys"):
        parameters.find_recipe_files("system", "01_stage")
    with pytest.raises(PerceptError, match="no recipe file"):
        parameters.read_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(PerceptError, match="not valid YAML"):
        parameters.read_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(PerceptError, match="must hold lines"):
        parameters.read_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    "line", ["a = None", "a = [1]", "a = b = 1", "a = 1; b = 2", "a: int = 1", "import os", "a ="]
)
def test_a_cell_of_another_form_is_refused(line):
    with pytest.raises(PerceptError, match="Line 1"):
        parameters.parse_parameters(line)


def test_without_data_the_first_cell_names_both_ways_on(project, monkeypatch):
    source = CELL + 'dataset = "nsd"  # prepared dataset\n'
    shutil.rmtree(project / "notebooks")
    (project / "notebooks").mkdir()
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})]
    )
    nbformat.write(nb, project / "notebooks" / "01_stage.ipynb")
    scope = {name: p.default for name, p in parameters.parse_parameters(source).items()} | {
        "In": []
    }
    with pytest.raises(PerceptError, match='notebook 00.*recipe = "mindeye/mini"') as caught:
        parameters.configure(scope, "01_stage")
    assert caught.value._render_traceback_() == [f"PerceptError: {caught.value}"]


# ------------------------------------------------------------------------------ what is changed
def test_a_call_that_is_refused_leaves_the_record_of_the_parameters(project):
    path = project / "home" / "results" / "sys-subj01" / "parameters" / "01_stage.json"
    scope = {name: p.default for name, p in parameters.parse_parameters(CELL).items()}
    scope |= {"In": [], "__name__": "__main__", "recipe": "sys", "subj": 1}
    run = parameters.configure(dict(scope, model_name="sys-subj01"), "01_stage")
    assert not path.exists()
    run.record_parameters()
    before = path.read_bytes()
    parameters.configure(dict(scope, model_name="sys-subj01", kind="ridge"), "01_stage")
    assert path.read_bytes() == before and json.loads(before)["kind"]["value"] == "network"


def test_a_relative_home_is_refused_by_a_stage(project, monkeypatch):
    monkeypatch.setenv("PERCEPT_HOME", "home")
    done = script(project)
    assert done.returncode and "PERCEPT_HOME is 'home', a relative path" in done.stderr


@pytest.mark.parametrize(
    ("recipe", "dataset", "name"),
    [
        ("mindeye", "nsd", "mindeye-subj01"),
        ("mindeye", "nsd_fithrf", "mindeye-nsd_fithrf-subj01"),
        ("mindeye/mini", "mini", "mindeye-mini-subj01"),
        ("mindeye/mini", "mine", "mindeye-mini-mine-subj01"),
        ("mindeye2_small", "nsd_mindeye2", "mindeye2_small-1sessions-subj01"),
        ("mindeye2_small", "nsd", "mindeye2_small-nsd-subj01"),
        ("", "nsd", "mindeye-subj01"),
        ("", "mine", "mindeye-mine-subj01"),
    ],
)
def test_a_data_set_that_is_not_the_recipes_own_is_in_the_name(recipe, dataset, name):
    made = parameters.make_run_name(recipe, {"dataset": dataset, "subj": 1})
    assert made == name.replace("-1sessions", "")
