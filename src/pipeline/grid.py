"""The grid file of a sweep: its factors, levels and points (docs/sweeps.md)."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.command_line import split_command
from src.parameters import read_recipe
from src.utils import UsageError, check_name, to_device

KEYS = ("name", "recipe", "from", "without", "fixed", "grid", "points", "report")  # of a grid file

RESERVED = ("prepare", "figures", "parameters")  # folders of results/<sweep>/ that are no points

MAX_FOLDER_NAME = 120  # characters of a point's folder; file systems allow 255 bytes


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes:
        label: its name in tables and the name of its folder.
        levels: the label of each varied parameter's value.
        overrides: its values by name.
        launch: how its trainings are started (as --launch of run.py), "" for in the notebook.
    """

    label: str
    levels: dict[str, str]
    overrides: dict[str, Any]
    launch: str = ""


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        name: of the sweep.
        recipe: e.g. "mindeye/mini".
        fixed: overrides of all points.
        factors: values by label of each varied parameter (and of `launch`, where that is varied).
        points: in order.
        report: parameters of 07_sweep.
        first: number of the stage that a point begins with, "" for the one after the preparation.
        skip: numbers of stages that no point has.
    """

    name: str
    recipe: str
    fixed: dict[str, Any]
    factors: dict[str, dict[str, Any]]
    points: list[Point]
    report: dict[str, Any] = field(default_factory=dict)
    first: str = ""
    skip: Sequence[str] = ()

    def name_point_run(self, point: Point) -> str:
        """Name of the point's run: <sweep>/<label>."""
        return f"{self.name}/{point.label}"


def read_grid(path: str | Path) -> Grid:
    """Read a grid file and make its points, in order: every combination of `grid`, the last factor
    changing fastest, then `points`.

    Names and types of parameters are not checked here: `Sweep` checks them against the stages of
    the recipe.

    Raises:
        UsageError: for a missing or malformed file, an empty grid, a value given twice, points
            whose folders would have one name.
    """
    path = Path(path)
    content = _read_content(path)
    name, recipe = str(content.get("name") or path.stem), str(content.get("recipe") or "")
    if not recipe or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(
            f"{path} needs `recipe: mindeye/mini` or another, and a name of letters, digits, - and"
            f" . (it is {name!r})."
        )
    check_name(name, f"The name of the sweep in {path}")
    fixed = _read_mapping(content, "fixed", path)
    factors = {}
    for parameter, values in _read_mapping(content, "grid", path).items():
        factors[parameter] = _read_levels(parameter, values, path)
    points = [*_combine_levels(factors), *_read_listed_points(content, path)]
    _check_points(points, fixed, path)
    return Grid(
        name,
        recipe,
        fixed,
        factors | _find_further_factors(points, factors),
        points,
        _read_mapping(content, "report", path),
        first=_format_stage(content.get("from", "")),
        skip=_read_skipped_stages(content),
    )


def _read_content(path: Path) -> dict[str, Any]:
    """The entries of a grid file."""
    if not path.is_file():
        raise UsageError(
            f"There is no grid file {path}: launch/sweeps/ holds some, and docs/sweeps.md says how"
            " to write one."
        )
    content = read_recipe(path)
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise UsageError(
            f"{path} has the entry '{unknown[0]}', which a grid file has not: choose among"
            f" {', '.join(KEYS)}."
        )
    return content


def _read_mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """An entry of a grid file that must be lines `name: value`; empty where it is missing."""
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UsageError(
            f"'{key}' in {path} must hold lines `name: value`, not {type(value).__name__}."
        )
    return {str(name): entry for name, entry in value.items()}


def _read_levels(name: str, values: Any, path: Path) -> dict[str, Any]:
    """Values by label of one parameter of `grid`."""
    levels: dict[Any, Any] = {}
    if isinstance(values, dict):
        levels = values
    elif isinstance(values, list):
        levels = {str(value): value for value in values}
    if not levels:
        raise UsageError(
            f"'{name}' of grid in {path} must be a list of values, or a mapping label: value, with"
            " at least one."
        )
    if len(levels) != len(values):
        raise UsageError(
            f"'{name}' of grid in {path} has a value twice: {', '.join(map(str, values))}; give"
            " each once."
        )
    for value in levels.values():
        _check_plain(name, value, path)
    return {str(label): value for label, value in levels.items()}


def _check_plain(name: str, value: Any, path: Path) -> None:
    """Refuse a value that no parameter can have, such as a list or an empty entry."""
    if not isinstance(value, bool | int | float | str):
        raise UsageError(
            f"'{name}' in {path} is {value!r}, but must be a number, a text or true/false; put a"
            " text such as - or !V1 in quotes."
        )


def _combine_levels(factors: Mapping[str, Mapping[str, Any]]) -> Iterator[Point]:
    """The points of all combinations of levels; none where there are no factors."""
    if not factors:
        return
    for labels in itertools.product(*factors.values()):
        levels = dict(zip(factors, labels, strict=True))
        overrides = {name: factors[name][label] for name, label in levels.items()}
        launch = str(overrides.pop("launch", ""))
        yield Point(make_folder_name(_join_levels(levels)), levels, overrides, launch)


def _read_listed_points(content: Mapping[str, Any], path: Path) -> list[Point]:
    """The points that the entry `points` lists."""
    entries = content.get("points") or []
    if not isinstance(entries, list):
        raise UsageError(
            f"'points' in {path} must be a list of overrides, not {type(entries).__name__}."
        )
    return [_read_listed_point(entry, path) for entry in entries]


def _read_listed_point(entry: Any, path: Path) -> Point:
    """One entry of `points`."""
    if not isinstance(entry, dict) or not set(entry) - {"label"}:
        raise UsageError(
            f"An entry of points in {path} is {entry!r}, but must be overrides `name: value`, with"
            " a label where you like."
        )
    for name, value in entry.items():
        _check_plain(str(name), value, path)
    overrides = {str(name): value for name, value in entry.items()}
    label = overrides.pop("label", "")
    launch = str(overrides.pop("launch", ""))
    levels = {name: str(value) for name, value in overrides.items()}
    if launch:
        levels["launch"] = launch
    folder = make_folder_name(str(label or _join_levels(levels)))
    return Point(folder, levels, overrides, launch)


def _join_levels(levels: Mapping[str, str]) -> str:
    """Levels in one line: "rate=low,seed=0"."""
    return ",".join(f"{name}={make_folder_name(level)}" for name, level in levels.items())


def make_folder_name(text: str) -> str:
    """A label as the name of a folder: "rois=V1,V2" stays as it is but for characters that shells
    and file systems read otherwise; a long one is cut and marked with a hash.
    """
    plain = re.sub(r"[^\w.+,=@-]+", "-", text.replace("!", "not-")).strip(".")
    if len(plain) <= MAX_FOLDER_NAME:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{plain[:MAX_FOLDER_NAME]}-{digest[:8]}"


def _find_further_factors(
    points: Sequence[Point], factors: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Parameters that only listed points set; their values have no labels."""
    further: dict[str, dict[str, Any]] = {}
    for point in points:
        names = list(point.overrides)
        if point.launch:
            names.append("launch")
        further |= {name: {} for name in names if name not in factors}
    return further


def _format_stage(number: Any) -> str:
    """The number of a stage as its name begins: YAML reads 02 as the number 2."""
    return f"{number:02d}" if isinstance(number, int) else str(number)


def _read_skipped_stages(content: Mapping[str, Any]) -> list[str]:
    """The entry `without`: one number of a stage or a list of them."""
    numbers = content.get("without") or []
    if not isinstance(numbers, list):
        numbers = [numbers]
    return [_format_stage(number) for number in numbers]


def _check_points(points: Sequence[Point], fixed: Mapping[str, Any], path: Path) -> None:
    """Refuse a grid without points, and points that cannot be told apart."""
    if not points:
        raise UsageError(
            f"{path} has no points: give `grid`, with a list of values a parameter, or `points`."
        )
    labels = [point.label for point in points]
    duplicates = [label for label in labels if labels.count(label) > 1]
    if duplicates:
        raise UsageError(
            f"Two points of {path} would both be called {duplicates[0]}: give values other labels,"
            " or leave one out."
        )
    reserved = [label for label in labels if label in RESERVED or not label]
    if reserved:
        raise UsageError(
            f"A point of {path} cannot be called {reserved[0]!r}: give it another label."
        )
    for point in points:
        check_name(point.label, f"The label of a point of {path}")
        for name in point.overrides:
            if name in fixed:
                raise UsageError(
                    f"'{name}' is both fixed and varied in {path}: leave it in one place."
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
    levels = {}
    for name, values in factors.items():
        label = point.levels.get(name, "")
        if name not in point.levels or label not in values:
            default = str(point.overrides.get(name, effective[name]))
            label = _find_label(values, effective[name]) or default
        levels[name] = label
    return replace(point, levels=levels)


def _find_label(values: Mapping[str, Any], value: Any) -> str:
    """The label of a value, "" if it has none."""
    for label, labelled in values.items():
        if str(labelled) == str(value):
            return label
    return ""


def missing_requirement(launch: str) -> str:
    """Why this machine cannot start trainings so, "" where it can: a config of DeepSpeed needs that
    package, and a GPU.

    Args:
        launch: as `Point.launch`.
    """
    config = next(iter(split_command(launch, "launch")), "")
    if not config.endswith((".yaml", ".yml")):
        return ""
    if read_recipe(config).get("distributed_type") != "DEEPSPEED":
        return ""
    if importlib.util.find_spec("deepspeed") is None:
        return 'deepspeed is not installed (uv pip install -e ".[scale]")'
    if to_device("auto").startswith("cuda"):
        return ""
    return "deepspeed needs a GPU, and there is none"
