"""Recipes: their stages, parameters and run names.

A recipe is a folder of recipes/: one YAML file for each stage, with what differs from the defaults
of that stage's notebook. A folder mini/ in it is laid over it: the recipe "mindeye/mini".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src import parameters
from src.utils import UsageError


def list_recipes() -> list[Path]:
    """The folders of all recipes, by name."""
    return sorted(path for path in parameters.RECIPES.iterdir() if path.is_dir())


def list_stages(recipe: str) -> list[str]:
    """The stages of a recipe, in order: the names of its YAML files.

    Raises:
        UsageError: if there is no such recipe.
    """
    folder = parameters.RECIPES / recipe
    stages = sorted(path.stem for path in folder.glob("[0-9][0-9]_*.yaml"))
    if not stages:
        names = ", ".join(path.name for path in list_recipes())
        raise UsageError(f"There is no recipe '{recipe}': choose one of {names}.")
    return stages


def find_notebook(stage: str) -> Path:
    """The notebook of a stage.

    Raises:
        UsageError: if there is none.
    """
    path = parameters.NOTEBOOKS / f"{stage}.ipynb"
    if not path.exists():
        raise UsageError(
            f"The recipe asks for the stage {stage}, but there is no {path}: rename the recipe file"
            " or restore the notebook."
        )
    return path


def read_cost(stage: str) -> str:
    """What a stage costs: the line "Cost: ..." of its notebook's first cell, "" if it has none."""
    cells = json.loads(find_notebook(stage).read_text())["cells"]
    introduction = "".join(cells[0]["source"])
    match = re.search(r"^Cost: (.*(?:\n[^\n#]+)*)", introduction, re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""


def read_declared_parameters(stage: str) -> dict[str, parameters.Parameter]:
    """The parameters that a stage's notebook declares, by name."""
    cell = parameters.read_parameters_cell(find_notebook(stage))
    return parameters.parse_parameters(cell, stage)


def list_parameters(recipe: str) -> list[str]:
    """Names of the parameters of all stages of a recipe."""
    names: dict[str, None] = {}
    for stage in list_stages(recipe):
        names |= dict.fromkeys(read_declared_parameters(stage))
    return list(names)


def read_defaults(stage: str) -> dict[str, Any]:
    """The default values of a stage's parameters, by name."""
    declared = read_declared_parameters(stage)
    return {name: parameter.default for name, parameter in declared.items()}


def read_stage_parameters(stage: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What papermill passes to a stage: the recipe's files in order, then the overrides that it has
    a parameter for.
    """
    declared = read_declared_parameters(stage)
    values: dict[str, Any] = {}
    for path in parameters.find_recipe_files(recipe, stage):
        content = parameters.read_recipe(path)
        parameters.check_parameter_names(content, declared, str(path))
        values |= _coerce_all(content, declared, str(path))
    own_overrides = {name: value for name, value in overrides.items() if name in declared}
    values |= _coerce_all(own_overrides, declared, "-p")
    if "recipe" in declared:
        values["recipe"] = recipe
    return values


def _coerce_all(
    values: dict[str, Any], declared: dict[str, parameters.Parameter], origin: str
) -> dict[str, Any]:
    """Bring values to the types of their parameters."""
    return {
        name: parameters.coerce(declared[name], value, origin) for name, value in values.items()
    }


def name_run(recipe: str, stages: Iterable[str], overrides: dict[str, Any]) -> str:
    """The run's name, made of the parameters of all its stages.

    All stages share one folder, so a parameter that only a training has names the folder of the
    other stages, too.
    """
    defaults: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for stage in stages:
        defaults |= read_defaults(stage)
        for name, value in read_stage_parameters(stage, recipe, overrides).items():
            if value != "":
                values[name] = value
    return parameters.make_run_name(recipe, defaults | values)


def check_overrides(stages: Iterable[str], overrides: Iterable[str], origin: str) -> None:
    """Refuse an override that no stage has.

    Raises:
        UsageError: naming the override and `origin`, the file or flag that it comes from.
    """
    declared: dict[str, parameters.Parameter] = {}
    for stage in stages:
        declared |= read_declared_parameters(stage)
    parameters.check_parameter_names(overrides, declared, origin)


def select_stages(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    last: str = "",
    skip: Sequence[str] = (),
    files: Sequence[str] = (),
) -> tuple[list[str], dict[str, Any]]:
    """The stages of a recipe that a run consists of, and all its overrides.

    Args:
        recipe: e.g. "mindeye/mini".
        overrides: single values, from -p.
        first: number or name of the stage to begin with, only checked here.
        last: of the stage to end with, only checked here.
        skip: of stages that are left out.
        files: YAML files of overrides; later ones win, and `overrides` win over all.

    Returns:
        The stages without those to skip, and the overrides in one dictionary, with `model_name`.

    Raises:
        UsageError: for an override or a stage that the recipe does not have.
    """
    stages = list_stages(recipe.split("/")[0])
    merged: dict[str, Any] = {}
    for file in files:
        content = parameters.read_recipe(file)
        check_overrides(stages, content, file)
        merged |= content
    check_overrides(stages, overrides, "-p")
    merged |= overrides
    _check_stage(first, "--from", recipe, stages)
    _check_stage(last, "--to", recipe, stages)
    for prefix in skip:
        _check_stage(prefix, "--without", recipe, stages)
    run = {"model_name": name_run(recipe, stages, merged)}
    return drop_stages(stages, skip), merged | run


def _check_stage(prefix: str, flag: str, recipe: str, stages: Sequence[str]) -> None:
    """Refuse a number or name that no stage begins with."""
    if prefix and not any(stage.startswith(prefix) for stage in stages):
        raise UsageError(
            f"{flag} {prefix} names no stage of {recipe}: choose among {', '.join(stages)}."
        )


def drop_stages(stages: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """Stages less those whose names begin with one of some numbers or names."""
    return [stage for stage in stages if not stage.startswith(tuple(prefixes))]
