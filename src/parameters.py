"""The parameters of a stage and of a recipe, from one source: the notebook's `parameters` cell.

The precedence is the same everywhere: cell < recipe files in order < single overrides
(papermill, flags of the exported script, PERCEPT_ARGS).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import yaml

from src import utils
from src.utils import ROOT, PerceptError, resolve, seed_everything, to_device, write_json

NOTEBOOKS, RECIPES = ROOT / "notebooks", ROOT / "recipes"

Value = bool | int | float | str

IN_CELL = "cell"  # origin of a value that nothing has overridden

LIMITS: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, limit: value >= limit,
    "at most": lambda value, limit: value <= limit,
    "more than": lambda value, limit: value > limit,
}


@dataclass(frozen=True)
class Parameter:
    """One line `name = literal  # comment` of a parameters cell."""

    name: str
    default: Value
    comment: str

    @property
    def choices(self) -> list[str]:
        """Values that a comment "one of a, b" allows; empty where any value is allowed."""
        match = re.search(r"one of ([^;]+?)(?:;|$)", self.comment)
        if match is None:
            return []
        return [choice.strip() for choice in match.group(1).split(",")]

    def violated_limits(self, value: float) -> str:
        """Limits of the comment that a number is outside of, joined by "and"; empty if none.

        A comment gives limits as "at least 1", "at most 1" or "more than 0".
        """
        limits = re.findall(r"\b(at least|at most|more than) (-?[\d.]*\d)", self.comment)
        violated = [
            f"{relation} {limit}"
            for relation, limit in limits
            if not LIMITS[relation](value, float(limit))
        ]
        return " and ".join(violated)


@dataclass(frozen=True)
class Run:
    """What a stage knows of its run.

    Attributes:
        name: of the run, which names its folders.
        stage: e.g. "01_train_high_level".
        recipe: e.g. "mindeye/mini", "" where there is none.
        parameters: the effective parameters.
        origins: where each of them comes from, "cell" for the notebook's default.
    """

    name: str
    stage: str
    recipe: str
    parameters: dict[str, Value]
    origins: dict[str, str]

    @property
    def logs(self) -> Path:
        """train_logs/<run>/, created on first use."""
        return _create_folder(utils.HOME / "train_logs" / self.name)

    @property
    def results(self) -> Path:
        """results/<run>/, created on first use."""
        return _create_folder(utils.HOME / "results" / self.name)

    @property
    def device(self) -> str:
        """Torch device of this machine, see `to_device`."""
        return to_device("auto")

    @property
    def _overridden(self) -> dict[str, Value]:
        return {k: v for k, v in self.parameters.items() if self.origins[k] != IN_CELL}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><b>{escape(name)}</b></td><td>{escape(str(value))}</td>"
            f"<td>{escape(self.origins[name])}</td></tr>"
            for name, value in self._overridden.items()
        )
        head = (
            f"<p>run <b>{escape(self.name)}</b>, stage {escape(self.stage)}, on {self.device}</p>"
        )
        return head + f"<table><tr><th>parameter</th><th>value</th><th>from</th></tr>{rows}</table>"

    def __repr__(self) -> str:
        return (
            f"run {self.name}, stage {self.stage}, on {self.device}; not the notebook's defaults:"
            f" {self._overridden}"
        )


def _create_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------ the parameters cell
def read_parameters_cell(path: Path) -> str:
    """Read the source of the cell tagged `parameters`.

    Args:
        path: a notebook (.ipynb) or its export (.py).

    Raises:
        PerceptError: if there is no such cell, or it is empty.
    """
    text = path.read_text()
    source = _find_cell_of_notebook(text) if path.suffix == ".ipynb" else _find_cell_of_script(text)
    if not source.strip():
        raise PerceptError(
            f"{path} has no cell tagged 'parameters': add the tag to the cell that holds them."
        )
    return source


def _find_cell_of_notebook(text: str) -> str:
    for cell in json.loads(text)["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return "".join(cell["source"])
    return ""


def _find_cell_of_script(text: str) -> str:
    pattern = r'^# %% tags=\["parameters"\]\n(.*?)(?=^# %%|\Z)'
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    return match.group(1) if match else ""


def parse_parameters(source: str, origin: str = "the parameters cell") -> dict[str, Parameter]:
    """Parse the lines `name = literal  # comment` of a parameters cell.

    Args:
        source: of the cell.
        origin: what it is called in a message.

    Raises:
        PerceptError: for a line of another form.
    """
    definitions = {}
    for number, line in enumerate(source.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            parameter = _parse_line(line)
        except (SyntaxError, ValueError) as error:
            raise PerceptError(
                f"Line {number} of {origin} is not `name = number, text or True/False  # comment`:"
                f" {line.strip()!r}."
            ) from error
        definitions[parameter.name] = parameter
    return definitions


def _parse_line(line: str) -> Parameter:
    """Parse one line. Raises SyntaxError or ValueError for another form."""
    (statement,) = ast.parse(line).body
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        raise ValueError("not one assignment")
    target = statement.targets[0]
    default = ast.literal_eval(statement.value)
    if not isinstance(target, ast.Name) or not isinstance(default, Value):
        raise ValueError("not a name and a number, text or True/False")
    comment = line[statement.end_col_offset or len(line) :].strip().lstrip("#").strip()
    return Parameter(target.id, default, comment)


# --------------------------------------------------------------------------------- values and names
def coerce(parameter: Parameter, value: object, origin: str) -> Value:
    """Bring a value to the type of the parameter's default, or refuse it.

    Args:
        parameter: says type, choices and limits.
        value: from a recipe, a flag or a cell.
        origin: where it comes from, for the message.

    Raises:
        PerceptError: naming parameter, value, origin and what is expected.
    """
    complaint = f"Parameter '{parameter.name}' from {origin} is"
    convert, expected = CONVERSIONS[type(parameter.default)]
    converted = convert(value)
    if converted is None:
        raise PerceptError(
            f"{complaint} {value!r}, but must be {expected} like its default {parameter.default!r}."
        )
    if parameter.choices and str(converted) not in parameter.choices:
        raise PerceptError(
            f"{complaint} {converted!r}: choose one of {', '.join(parameter.choices)}."
        )
    if isinstance(converted, bool | str):
        return converted
    if limits := parameter.violated_limits(converted):
        raise PerceptError(f"{complaint} {converted!r}, but must be {limits}.")
    return converted


def _to_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(str(value).lower())


def _to_text(value: object) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, str) else None


def _to_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | SupportsFloat):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _to_int(value: object) -> int | None:
    if re.fullmatch(r"[+-]?\d+", str(value)):
        return int(str(value))  # not by way of float, which holds 53 bits only
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


CONVERSIONS: dict[type, tuple[Callable[[object], Value | None], str]] = {
    bool: (_to_bool, "True or False"),
    str: (_to_text, "a text"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
}


def check_parameter_names(names: Iterable[str], allowed: Collection[str], origin: str) -> None:
    """Refuse names that no parameter has, suggesting the nearest.

    Raises:
        PerceptError: for the first such name.
    """
    for name in names:
        if name not in allowed:
            matches = difflib.get_close_matches(name, allowed, 1)
            known_names = f"known are {', '.join(allowed)}."
            hint = f"did you mean '{matches[0]}'?" if matches else known_names
            raise PerceptError(f"There is no parameter '{name}' (from {origin}): {hint}")


def parse_names(text: str, choices: Sequence[str], parameter: str) -> set[str]:
    """Split the value of a parameter that takes several names, separated by commas.

    Args:
        text: the value.
        choices: names that it may hold.
        parameter: its name, for the message.

    Raises:
        PerceptError: for a name that is not among `choices`.
    """
    names = {part.strip() for part in text.split(",")} - {""}
    unknown = sorted(names - set(choices))
    if unknown:
        raise PerceptError(
            f"{parameter} does not know '{unknown[0]}': choose among {', '.join(choices)}."
        )
    return names


# ------------------------------------------------------------------------------------------ recipes
def find_recipe_files(recipe: str, stage: str) -> list[Path]:
    """Find the files of a recipe for a stage, in the order in which they apply.

    "mindeye/mini" gives recipes/mindeye/<stage>.yaml and recipes/mindeye/mini/<stage>.yaml, as far
    as they exist.

    Raises:
        PerceptError: for a recipe that does not exist.
    """
    folder, files = RECIPES, []
    for part in recipe.strip("/").split("/"):
        folder = folder / part
        if not folder.is_dir():
            recipes = sorted(str(d.relative_to(RECIPES)) for d in RECIPES.rglob("*") if d.is_dir())
            raise PerceptError(
                f"There is no recipe '{recipe}': choose one of {', '.join(recipes)}."
            )
        files.append(folder / f"{stage}.yaml")
    return [file for file in files if file.exists()]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the parameters in one YAML file.

    Raises:
        PerceptError: if the file is missing or is not a mapping.
    """
    if not Path(path).exists():
        raise PerceptError(
            f"There is no recipe file {path}: give the path of a YAML file, e.g."
            " recipes/mindeye/mini/01_train_high_level.yaml."
        )
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise PerceptError(
            f"The recipe file {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PerceptError(
            f"The recipe file {path} must hold lines `name: value`, not {type(values).__name__}."
        )
    return {str(name): value for name, value in values.items()}


def _find_recipe_of(files: Sequence[str]) -> str:
    """Recipe that -f files belong to.

    E.g. "mindeye/mini" for recipes/mindeye/mini/01_train_high_level.yaml; "" for files elsewhere.
    """
    folders = [Path(file).resolve().parent for file in files]
    inside = [str(f.relative_to(RECIPES)) for f in folders if f.is_relative_to(RECIPES)]
    return inside[-1] if inside else ""


def _count_sessions(recipe: str) -> int:
    """`num_sessions` as a recipe's own training has it, 0 where it says nothing."""
    levels = (str(Path(recipe).parent), recipe)
    n_sessions = 0
    for folder in [RECIPES / level for level in levels if level not in (".", "")]:
        for file in sorted(folder.glob("01_*.yaml")):
            n_sessions = read_recipe(file).get("num_sessions", 0) or n_sessions
    return int(n_sessions)


def make_run_name(recipe: str, parameters: Mapping[str, Any]) -> str:
    """Name of a run: `model_name`, by default <recipe>[-mini]-subj01.

    The default is followed by -cluster-held-out, -4sessions and -pca30 where the training differs
    in these. The number of sessions that the recipe itself asks for is not part of the name.
    """
    if parameters.get("model_name"):
        return str(parameters["model_name"])
    name = recipe.strip("/").replace("/", "-") or "mindeye"
    if "subj" in parameters:
        name += f"-subj{int(parameters['subj']):02d}"
    if parameters.get("split", "images") != "images":
        name += f"-{parameters['split']}"
    if "num_sessions" in parameters:
        n_sessions = int(parameters["num_sessions"])
        if n_sessions != _count_sessions(recipe):
            name += f"-{n_sessions or 'all'}sessions"
    if parameters.get("n_components"):
        name += f"-pca{int(parameters['n_components'])}"
    return name


# ------------------------------------------------------------------------------------ command line
@dataclass(frozen=True)
class _Flags:
    """Recipe files and single overrides that a list of flags asks for, and where it comes from."""

    files: list[str]
    values: dict[str, Any]
    origin: str


def _build_flag_parser(definitions: Mapping[str, Parameter], stage: str) -> argparse.ArgumentParser:
    """Command line of a stage: -f FILE (repeatable), -p NAME VALUE, and a flag for each parameter.

    A flag has the type of the parameter; its help has comment and default.
    """
    description = f"Stage {stage}; see the notebook for what it does."
    parser = argparse.ArgumentParser(f"{stage}.py", description=description, allow_abbrev=False)
    parser.add_argument(
        "-f",
        dest="_files",
        action="append",
        default=[],
        metavar="FILE",
        help="recipe file (YAML); later ones win",
    )
    parser.add_argument(
        "-p",
        dest="_pairs",
        action="append",
        default=[],
        nargs=2,
        metavar=("NAME", "VALUE"),
        help="one parameter, as papermill has it",
    )
    for parameter in definitions.values():
        _add_flag(parser, parameter)
    return parser


def _add_flag(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    """Add --name VALUE; for a boolean --name, --no-name, --name=True and --name False."""
    flag, default = f"--{parameter.name}", parameter.default
    description = f"{parameter.comment} (default: {default!r})".replace("%", "%%")
    if not isinstance(default, bool):
        kind = type(default).__name__
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar=kind, help=description)
        return
    parser.add_argument(
        flag,
        nargs="?",
        const=True,
        default=argparse.SUPPRESS,
        metavar="True|False",
        help=description,
    )
    parser.add_argument(
        f"--no-{parameter.name}",
        dest=parameter.name,
        action="store_false",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def _read_flags(is_script: bool, definitions: Mapping[str, Parameter], stage: str) -> _Flags:
    """Parse the command line of a script, or PERCEPT_ARGS where a notebook runs."""
    if is_script:
        arguments, origin = sys.argv[1:], "the command line"
    else:
        arguments, origin = shlex.split(os.environ.get("PERCEPT_ARGS", "")), "PERCEPT_ARGS"
    parsed, unparsed = _build_flag_parser(definitions, stage).parse_known_args(arguments)
    if unparsed:
        name = unparsed[0].lstrip("-").split("=")[0]
        positive = name.removeprefix("no-")
        check_parameter_names([positive if positive in definitions else name], definitions, origin)
        raise PerceptError(
            f"{origin} has {unparsed[0]!r}, which is not a flag with a value: write --name value."
        )
    values = dict(vars(parsed))
    files, pairs = values.pop("_files"), dict(values.pop("_pairs"))
    check_parameter_names(pairs, definitions, f"-p of {origin}")
    return _Flags(files, values | pairs, origin)


def _read_injected(
    scope: Mapping[str, Any], definitions: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Overrides of papermill, from the cell that it has put into the running kernel.

    That cell begins with "# Parameters".
    """
    history = [cell for cell in scope.get("In", []) if isinstance(cell, str)]
    cells = [cell for cell in history if cell.startswith("# Parameters")]
    names = []
    for statement in ast.parse(cells[-1]).body if cells else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names.append(statement.targets[0].id)
    check_parameter_names(names, definitions, "papermill")
    return {name: scope[name] for name in names}


# ------------------------------------------------------------------------------- the start of a run
class _Settings:
    """Values of all parameters and where each comes from, while they are overridden one by one."""

    def __init__(self, definitions: Mapping[str, Parameter], scope: Mapping[str, Any]):
        self.definitions = definitions
        self.values = {name: scope.get(name, p.default) for name, p in definitions.items()}
        self.origins = dict.fromkeys(definitions, IN_CELL)

    def apply_recipe(self, path: Path) -> None:
        """Take over the values of a recipe file."""
        content, folder = read_recipe(path), path.parent.name
        check_parameter_names(content, self.definitions, str(path))
        for name, value in content.items():
            parameter = self.definitions[name]
            self.values[name] = coerce(parameter, value, f"{path.name} of {folder}")
            self.origins[name] = f"{folder}/{path.name}"

    def override(self, name: str, value: object, origin: str) -> None:
        """Take over one value; one that only restates a recipe's keeps its origin.

        run.py passes the values of the recipe, too.
        """
        from_recipe = self.origins[name] != IN_CELL
        if from_recipe and coerce(self.definitions[name], value, origin) == self.values[name]:
            origin = self.origins[name]
        self.values[name], self.origins[name] = value, origin

    def coerce_all(self) -> dict[str, Value]:
        """Bring all values to their types."""
        return {
            name: coerce(self.definitions[name], value, self.origins[name])
            for name, value in self.values.items()
        }


def configure(scope: dict[str, Any], stage: str) -> Run:
    """Give a stage its effective parameters: cell < recipe files in order < single overrides.

    Call it as `run = configure(globals(), "01_train_high_level")` in the cell after the parameters.
    Recipe files come from the parameter `recipe` (or the environment variable PERCEPT_RECIPE, as
    `make lab` sets it) and from -f; overrides from papermill, from the flags of the script, or from
    the environment variable PERCEPT_ARGS. The globals are updated in place.

    Raises:
        PerceptError: for unknown names, wrong types, missing recipes, or data that have not been
            prepared.
    """
    is_script = scope.get("__name__") == "__main__" and "In" not in scope
    script = scope.get("__file__") if is_script else None
    if script:
        sys.excepthook = _report_error
    source = Path(script) if script else NOTEBOOKS / f"{stage}.ipynb"
    definitions = parse_parameters(read_parameters_cell(source), stage)
    settings = _Settings(definitions, scope)
    injected = _read_injected(scope, definitions)
    flags = _read_flags(bool(script), definitions, stage)
    overrides = injected | flags.values

    recipe = str(overrides.get("recipe", settings.values.get("recipe", "")))
    recipe = recipe or os.environ.get("PERCEPT_RECIPE", "")
    for path in find_recipe_files(recipe, stage) if recipe else []:
        settings.apply_recipe(path)
    for file in flags.files:
        settings.apply_recipe(Path(file) if Path(file).exists() else ROOT / file)
    for name, value in overrides.items():
        settings.override(name, value, flags.origin if name in flags.values else "papermill")

    values = settings.coerce_all()
    scope.update(values)
    recipe = recipe or _find_recipe_of(flags.files) or str(values.get("recipe", ""))
    run = Run(make_run_name(recipe, values), stage, recipe, values, settings.origins)
    _start(run)
    return run


def _report_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What a script prints when it stops.

    Our own errors are for the reader of the sentence, all others for a developer.
    """
    if issubclass(kind, PerceptError):
        sys.stderr.write(f"error: {error}\n")
    elif issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _start(run: Run) -> None:
    """Check that data are prepared, seed, and record the parameters in the results of the run."""
    values = run.parameters
    if values.get("vd_cache_dir"):
        _keep_hub_in(resolve(str(values["vd_cache_dir"])))
    brings_data = any(values.get(name) for name in ("data_path", "recon_path", "remote_data"))
    if "dataset" in values and not run.stage.startswith("00") and not brings_data:
        _check_prepared(str(values["dataset"]), int(values["subj"]))
    if "seed" in values:
        seed_everything(int(values["seed"]))
    if int(os.environ.get("RANK", 0)) == 0:
        record = {
            name: {"value": value, "from": run.origins[name]} for name, value in values.items()
        }
        write_json(run.results / "parameters" / f"{run.stage}.json", record)


def _check_prepared(dataset: str, subj: int) -> None:
    """Raise PerceptError if the data of a subject are not prepared."""
    folder = utils.HOME / "data" / dataset / f"subj{subj:02d}"
    if not folder.is_dir():
        raise PerceptError(
            f"There are no prepared data at {folder}: either prepare your own (notebook 00,"
            ' data_path is where your copy of NSD lies), or set recipe = "mindeye/mini" in the'
            " parameters cell for the embedded mini world and begin with notebook 00."
        )


def _keep_hub_in(folder: Path) -> None:
    """Let the hub's client keep its files in `folder`; it reads that once, when it is imported."""
    if "huggingface_hub" in sys.modules and os.environ.get("HF_HUB_CACHE") != str(folder):
        raise PerceptError(
            f"vd_cache_dir cannot become {folder} any more, as the hub's client is loaded: restart"
            " the kernel and run this cell first."
        )
    os.environ["HF_HUB_CACHE"] = str(folder)
