"""The grid file of a sweep: its factors, levels and points."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.parameters import read_recipe
from src.utils import PerceptError, to_device

KEYS = ("name", "recipe", "from", "without", "fixed", "grid", "points", "report")  # of a grid file

RESERVED = ("prepare", "figures", "parameters")  # folders of results/<sweep>/ that are no points

LABEL = 120  # characters of a point's folder; file systems allow 255 bytes


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes: label, its name in tables and the name of its folder; levels, the label of each
    varied parameter's value; overrides, its values by name; launch, how its trainings are started
    (as --launch of run.py), "" for in the notebook.
    """

    label: str
    levels: dict[str, str]
    overrides: dict[str, Any]
    launch: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes: name of the sweep; recipe; fixed overrides; factors, values by label of each varied
    parameter (and of `launch`, where that is varied); points; report, parameters of 07_sweep;
    first, the number of the stage that a point begins with, "" for the one after the preparation;
    without, numbers of stages that no point has.
    """

    name: str
    recipe: str
    fixed: dict[str, Any]
    factors: dict[str, dict[str, Any]]
    points: list[Point]
    report: dict[str, Any] = field(default_factory=dict)
    first: str = ""
    without: Sequence[str] = ()

    def name_point_run(self, point: Point) -> str:
        """Name of the point's run: <sweep>/<label>."""
        return f"{self.name}/{point.label}"


def file_name(text: str) -> str:
    """A label as the name of a folder: "rois=V1,V2" stays as it is but for characters that shells
    and file systems read otherwise; a long one is cut and marked.
    """
    plain = re.sub(r"[^\w.+,=@-]+", "-", text.replace("!", "not-")).strip(".")
    return (
        plain
        if len(plain) <= LABEL
        else f"{plain[:LABEL]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def _levels(name: str, values: Any, path: Path) -> dict[str, Any]:
    """Values by label of one parameter of `grid`."""
    named = (
        values
        if isinstance(values, dict)
        else {str(v): v for v in values}
        if isinstance(values, list)
        else None
    )
    if not named:
        raise PerceptError(
            f"'{name}' of grid in {path} must be a list of values, or a mapping label: value, with"
            " at least one."
        )
    if len(named) != len(values):
        raise PerceptError(
            f"'{name}' of grid in {path} has a value twice: {', '.join(map(str, values))}; give"
            " each once."
        )
    for value in named.values():
        _check_plain(name, value, path)
    return {str(label): value for label, value in named.items()}


def _check_plain(name: str, value: Any, path: Path) -> None:
    if not isinstance(value, bool | int | float | str):
        raise PerceptError(
            f"'{name}' in {path} is {value!r}, but must be a number, a text or true/false; put a"
            " text such as - or !V1 in quotes."
        )


def _explicit(entry: Any, path: Path) -> Point:
    """One entry of `points`."""
    if not isinstance(entry, dict) or not set(entry) - {"label"}:
        raise PerceptError(
            f"An entry of points in {path} is {entry!r}, but must be overrides `name: value`, with"
            " a label where you like."
        )
    overrides = {str(k): v for k, v in entry.items() if k not in ("label", "launch")}
    for name, value in entry.items():
        _check_plain(str(name), value, path)
    levels = {name: str(value) for name, value in overrides.items()} | (
        {"launch": str(entry["launch"])} if entry.get("launch") else {}
    )
    return Point(
        file_name(str(entry.get("label") or _joined(levels))),
        levels,
        overrides,
        str(entry.get("launch", "")),
    )


def _combined(choice: Mapping[str, tuple[str, Any]]) -> Point:
    """One combination of `grid`, (label, value) by parameter."""
    levels, values = ({name: pair[i] for name, pair in choice.items()} for i in (0, 1))
    return Point(
        file_name(_joined(levels)),
        levels,
        {name: value for name, value in values.items() if name != "launch"},
        str(values.get("launch", "")),
    )


def _joined(levels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={file_name(level)}" for name, level in levels.items())


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise PerceptError(
            f"'{key}' in {path} must hold lines `name: value`, not {type(value).__name__}."
        )
    return {str(k): v for k, v in value.items()}


def read_grid(path: str | Path) -> Grid:
    """Read a grid file and make its points, in order: every combination of `grid`, the last factor
    changing fastest, then `points`.

    Names and types of parameters are not known here: run.py checks them against the stages of the
    recipe.

    Raises:
        PerceptError: for a missing or malformed file, an empty grid, a value given twice, points
            whose folders would have one name.
    """
    path = Path(path)
    if not path.is_file():
        raise PerceptError(
            f"There is no grid file {path}: launch/sweeps/ holds some, and docs/sweeps.md says how"
            " to write one."
        )
    content = read_recipe(path)
    if unknown := [key for key in content if key not in KEYS]:
        raise PerceptError(
            f"{path} has the entry '{unknown[0]}', which a grid file has not: choose among"
            f" {', '.join(KEYS)}."
        )
    name, recipe = str(content.get("name") or path.stem), str(content.get("recipe") or "")
    if not recipe or not re.fullmatch(r"\w[\w.+-]*", name):
        raise PerceptError(
            f"{path} needs `recipe: mindeye/mini` or another, and a name of letters, digits, - and"
            f" . (it is {name!r})."
        )
    fixed, explicit = _mapping(content, "fixed", path), content.get("points") or []
    factors = {
        parameter: _levels(parameter, values, path)
        for parameter, values in _mapping(content, "grid", path).items()
    }
    combinations = (
        itertools.product(*(levels.items() for levels in factors.values())) if factors else ()
    )
    points = [_combined(dict(zip(factors, choice, strict=True))) for choice in combinations]
    if not isinstance(explicit, list):
        raise PerceptError(
            f"'points' in {path} must be a list of overrides, not {type(explicit).__name__}."
        )
    points += [_explicit(entry, path) for entry in explicit]
    _check_points(points, fixed, path)
    factors |= {
        name: {}
        for point in points
        for name in [*point.overrides, *(["launch"] if point.launch else [])]
        if name not in factors
    }
    first, without = content.get("from", ""), content.get("without") or []
    numbers = [
        f"{given:02d}" if isinstance(given, int) else str(given)
        for given in (first, *(without if isinstance(without, list) else [without]))
    ]
    return Grid(
        name,
        recipe,
        fixed,
        factors,
        points,
        _mapping(content, "report", path),
        numbers[0],
        numbers[1:],
    )


def _check_points(points: Sequence[Point], fixed: Mapping[str, Any], path: Path) -> None:
    labels = [point.label for point in points]
    if not points:
        raise PerceptError(
            f"{path} has no points: give `grid`, with a list of values a parameter, or `points`."
        )
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise PerceptError(
            f"Two points of {path} would both be called {twice[0]}: give values other labels, or"
            " leave one out."
        )
    if taken := [label for label in labels if label in RESERVED or not label]:
        raise PerceptError(
            f"A point of {path} cannot be called {taken[0]!r}: give it another label."
        )
    if both := [name for point in points for name in point.overrides if name in fixed]:
        raise PerceptError(
            f"'{both[0]}' is both fixed and varied in {path}: leave it in one place."
        )


def fill_levels(
    point: Point, factors: Mapping[str, Mapping[str, Any]], effective: Mapping[str, Any]
) -> Point:
    """The point with a level of every varied parameter: of those that it does not name, the
    recipe's own value.

    Args:
        point: of `read_grid`.
        factors: values by label of each varied parameter.
        effective: the value that each of them has at this point.
    """
    own = {
        name: next(
            (label for label, value in levels.items() if str(value) == str(effective[name])), ""
        )
        for name, levels in factors.items()
    }
    own = {
        name: level or str(point.overrides.get(name, effective[name]))
        for name, level in own.items()
    }
    return replace(
        point,
        levels={
            name: point.levels[name] if point.levels.get(name) in levels else own[name]
            for name, levels in factors.items()
        },
    )


def missing_requirement(launch: str) -> str:
    """Why this machine cannot start trainings so, "" where it can: a config of DeepSpeed needs that
    package, and a GPU.

    Args:
        launch: as `Point.launch`.
    """
    config = next(iter(shlex.split(launch)), "")
    if (
        not config.endswith((".yaml", ".yml"))
        or read_recipe(config).get("distributed_type") != "DEEPSPEED"
    ):
        return ""
    if importlib.util.find_spec("deepspeed") is None:
        return 'deepspeed is not installed (uv pip install -e ".[scale]")'
    return (
        "" if to_device("auto").startswith("cuda") else "deepspeed needs a GPU, and there is none"
    )
