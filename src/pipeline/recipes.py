"""Recipes: their stages, parameters and run names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src import parameters
from src.utils import PerceptError


def list_stages(recipe: str) -> list[str]:
    """The stages of a recipe, in order: the names of its YAML files."""
    folder = parameters.RECIPES / recipe
    names = sorted(path.stem for path in folder.glob("[0-9][0-9]_*.yaml"))
    if not names:
        known = sorted(path.name for path in parameters.RECIPES.iterdir() if path.is_dir())
        raise PerceptError(f"There is no recipe '{recipe}': choose one of {', '.join(known)}.")
    return names


def find_notebook(stage: str) -> Path:
    """The notebook of a stage."""
    path = parameters.NOTEBOOKS / f"{stage}.ipynb"
    if not path.exists():
        raise PerceptError(
            f"The recipe asks for the stage {stage}, but there is no {path}: rename the recipe file"
            " or restore the notebook."
        )
    return path


def read_cost(stage: str) -> str:
    """The line "Cost: ..." of a notebook's first cell."""
    text = "".join(json.loads(find_notebook(stage).read_text())["cells"][0]["source"])
    found = re.search(r"^Cost: (.*(?:\n[^\n#]+)*)", text, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def read_stage_parameters(stage: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What papermill passes to a stage: the recipe's files in order, then the overrides that it has
    a parameter for.
    """
    known = parameters.parse_parameters(
        parameters.read_parameters_cell(find_notebook(stage)), stage
    )
    values: dict[str, Any] = {}
    for path in parameters.find_recipe_files(recipe, stage):
        content = parameters.read_recipe(path)
        parameters.check_parameter_names(content, known, str(path))
        values |= {k: parameters.coerce(known[k], v, str(path)) for k, v in content.items()}
    values |= {k: parameters.coerce(known[k], v, "-p") for k, v in overrides.items() if k in known}
    if "recipe" in known:
        values["recipe"] = recipe
    return values


def name_run(recipe: str, stages: Iterable[str], overrides: dict[str, Any]) -> str:
    """The run's name, from the parameters of all its stages: what only a training has names the
    folder of every stage.
    """
    defaults: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for stage in stages:
        known = parameters.parse_parameters(
            parameters.read_parameters_cell(find_notebook(stage)), stage
        )
        defaults |= {name: p.default for name, p in known.items()}
        given |= {
            name: value
            for name, value in read_stage_parameters(stage, recipe, overrides).items()
            if value != ""
        }
    return parameters.make_run_name(recipe, defaults | given)


def check_overrides(stages: list[str], overrides: Iterable[str], origin: str) -> None:
    """Refuse an override that no stage has."""
    everything: dict[str, parameters.Parameter] = {}
    for stage in stages:
        everything |= parameters.parse_parameters(
            parameters.read_parameters_cell(find_notebook(stage)), stage
        )
    parameters.check_parameter_names(overrides, everything, origin)


def select_stages(
    recipe: str,
    overrides: dict[str, Any],
    first: str,
    files: Sequence[str],
    last: str = "",
    without: Sequence[str] = (),
) -> tuple[list[str], dict[str, Any]]:
    """The stages of a recipe, and the overrides of files and command line in one, with the run's
    name; refuses what no stage has.
    """
    stages = list_stages(recipe.split("/")[0])
    contents = [parameters.read_recipe(file) for file in files]
    for content, origin in zip([*contents, overrides], [*files, "-p"], strict=True):
        check_overrides(stages, content, origin)
    for flag, given in (
        ("--from", first),
        ("--to", last),
        *(("--without", stage) for stage in without),
    ):
        if given and not any(stage.startswith(given) for stage in stages):
            raise PerceptError(
                f"{flag} {given} names no stage of {recipe}: choose among {', '.join(stages)}."
            )
    merged = {name: value for content in [*contents, overrides] for name, value in content.items()}
    return drop_stages(stages, without), merged | {"model_name": name_run(recipe, stages, merged)}


def drop_stages(stages: Sequence[str], without: Sequence[str]) -> list[str]:
    """Stages less those whose names begin with one of some numbers or names."""
    return [stage for stage in stages if not stage.startswith(tuple(without))]
