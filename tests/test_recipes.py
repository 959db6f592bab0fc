"""Recipes: every stage exists, every key is a parameter of it and has its type; papermill itself
would only warn.
"""

import pytest

from src import parameters
from src.pipeline import recipes

FILES = sorted(parameters.RECIPES.rglob("*.yaml"))


def test_there_are_recipes():
    assert (parameters.RECIPES / "mindeye" / "mini").is_dir() and FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(parameters.RECIPES)))
def test_keys_are_parameters_of_the_right_type(path):
    notebook = parameters.NOTEBOOKS / f"{path.stem}.ipynb"
    definitions = parameters.parse_parameters(parameters.read_parameters_cell(notebook), path.stem)
    content = parameters.read_recipe(path)
    parameters.check_parameter_names(content, definitions, str(path))
    assert (
        content.get("recipe") == path.parent.relative_to(parameters.RECIPES).as_posix()
    )  # papermill -f tells a notebook no file names
    for name, value in content.items():
        assert type(parameters.coerce(definitions[name], value, str(path))) is type(
            definitions[name].default
        )
        if isinstance(definitions[name].default, float):
            assert not isinstance(value, str), (
                f"{name}: YAML reads {value!r} as a text; write 1.0e-3"
            )


@pytest.mark.parametrize("recipe", sorted(p.parent.name for p in parameters.RECIPES.glob("*/mini")))
def test_mini_overlays_only_stages_of_the_recipe(recipe):
    folder = parameters.RECIPES / recipe
    assert {p.name for p in (folder / "mini").glob("*.yaml")} <= {
        p.name for p in folder.glob("*.yaml")
    }


@pytest.mark.parametrize(
    "recipe", sorted(p.name for p in parameters.RECIPES.iterdir() if p.is_dir())
)
def test_stages_of_a_recipe_agree_on_what_they_share(recipe):
    shared: dict[str, set] = {}
    for path in (parameters.RECIPES / recipe).rglob("*.yaml"):
        for name in ("dataset", "subj", "model_name"):
            if (value := parameters.read_recipe(path).get(name)) is not None:
                shared.setdefault(f"{path.parent.name} {name}", set()).add(value)
    assert all(len(values) == 1 for values in shared.values()), shared


def test_recipes_that_read_other_sources_do_not_share_a_data_set():
    origins: dict[str, set] = {}
    for folder in recipes.list_recipes():
        stages = recipes.list_stages(folder.name)
        if not stages[0].startswith("00"):
            continue
        values = recipes.read_defaults(stages[0])
        values |= recipes.read_stage_parameters(stages[0], folder.name, {})
        origin = (values["source"], values["data_path"], values["options"])
        origins.setdefault(values["dataset"], set()).add(origin)
        for stage in stages[1:]:
            others = recipes.read_defaults(stage)
            others |= recipes.read_stage_parameters(stage, folder.name, {})
            assert others.get("dataset", values["dataset"]) == values["dataset"], stage
    assert len(origins) > 3 and all(len(sources) == 1 for sources in origins.values()), origins
