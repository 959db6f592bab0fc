"""Names that become folders: of runs, data sets, sweeps, recipes. None may lead anywhere else."""

import pytest

from src import parameters, utils
from src.parameters import NAME_PARTS, Parameter, coerce
from src.pipeline import grid, recipes
from src.utils import MAX_NAME_BYTES, PerceptError, check_name

BAD_NAMES = [
    "..",
    ".",
    "../x",
    "x/..",
    "x/../../y",
    "/absolute",
    "a//b",
    "a/",
    "a\nb",
    "a\tb",
    "a\0b",
    "a\x1b[31m",
    "a\u202eb",  # writes backwards
    "\ud800",  # half a character
    "-rf",
    ".hidden",
    "~",
    "~/x",
    "a\\..\\b",
    " a",
    "a ",
    "x" * 300,
    "é" * MAX_NAME_BYTES,
]
GOOD_NAMES = ["mindeye-mini-subj01", "a b", "é", "1.10", "rate=low,seed=0", "x" * MAX_NAME_BYTES]


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_a_name_that_leads_out_is_refused_in_one_line(name):
    with pytest.raises(PerceptError, match="^model_name is ") as caught:
        check_name(name, "model_name", parts=2)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and text.isprintable()


def test_ordinary_names_pass_and_slashes_are_counted():
    assert [check_name(name, "it") for name in GOOD_NAMES] == GOOD_NAMES
    assert check_name("sweep/rate=low,seed=0", "it", parts=2) == "sweep/rate=low,seed=0"
    with pytest.raises(PerceptError, match="holds a slash"):
        check_name("a/b", "it")
    with pytest.raises(PerceptError, match="more than 2 parts"):
        check_name("a/b/c", "it", parts=2)


@pytest.mark.parametrize("name", [*NAME_PARTS, "runs", "voters"])
def test_parameters_that_name_runs_are_checked(name):
    parameter = Parameter(name, "", "")
    assert coerce(parameter, "mine", "-p") == "mine" and coerce(parameter, "", "-p") == ""
    for value in ("../../out", "/etc", "a\nb", "x" * 300):
        with pytest.raises(PerceptError, match=name):
            coerce(parameter, value, "-p")


def test_lists_of_runs_may_have_patterns_and_spaces():
    runs = Parameter("runs", "", "")
    assert coerce(runs, "a, sweep/*,b/", "-p") == "a, sweep/*,b/"
    with pytest.raises(PerceptError, match="A name in runs is '..'"):
        coerce(runs, "a,..", "-p")


@pytest.mark.parametrize("name", ["..", "../out", "a/b/c", "a\nb", "x" * 300])
def test_run_py_refuses_a_run_that_leads_out(name, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    with pytest.raises(PerceptError, match="model_name"):
        recipes.select_stages("mindeye/mini", {"model_name": name})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["..", "mindeye/../mindeye", "mindeye//mini", "mindeye/.git"])
def test_recipes_are_looked_for_below_their_folder(recipe):
    with pytest.raises(PerceptError, match="The name of a recipe is"):
        parameters.find_recipe_files(recipe, "06_metrics")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: ../x\n", "a name of letters, digits"),
        (f"name: {'x' * 200}\n", "longer than"),
        ("points: [{label: -x, seed: 1}]\n", "The label of a point of .* is '-x'"),
        (f"points: [{{label: {'é' * 100}, seed: 1}}]\n", "longer than"),
    ],
)
def test_sweeps_and_their_points_have_names_of_folders(text, message, tmp_path):
    (tmp_path / "grid.yaml").write_text(f"recipe: mindeye/mini\n{text}", encoding="utf-8")
    with pytest.raises(PerceptError, match=message):
        grid.read_grid(tmp_path / "grid.yaml")
