"""The parameters of a stage and of a recipe, from one source: the notebook's `parameters` cell.

The precedence is the same everywhere: cell < recipe files in order < single overrides
(papermill, flags of the exported script, PERCEPT_ARGS).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from src import utils
from src.command_line import PAIR_FLAG, CommandLine, split_command
from src.files.yaml_files import UnclearNumber, WrittenFloat, read_yaml
from src.utils import (
    ROOT,
    SEEDS,
    PerceptError,
    UsageError,
    check_name,
    make_folder,
    resolve,
    seed_everything,
    to_device,
    write_json,
)

NOTEBOOKS, RECIPES = ROOT / "notebooks", ROOT / "recipes"

Value = bool | int | float | str

DEFAULT_DATASET = "nsd"  # of notebooks that read prepared data, where a recipe names no other

IN_CELL = "cell"  # origin of a value that nothing has overridden

LIMITS: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, limit: value >= limit,
    "at most": lambda value, limit: value <= limit,
    "more than": lambda value, limit: value > limit,
}

INTEGERS = range(-(2**63), 2**63)  # what arrays hold

# Parameters that name runs or data sets, which become folders, and how many names each may hold
# between slashes: a point of a sweep is <sweep>/<point>, a voter is <run>/<voter>.
NAME_PARTS = {
    "dataset": 1,
    "model_name": 2,
    "model_name2": 2,
    "autoencoder_name": 3,
    "start_run": 2,
    "token_run": 2,
    "tokens_from": 2,
    "reference_run": 2,
}

# the same for parameters that name several, separated by commas; * stands for any letters
LIST_PARTS = {"runs": 2, "voters": 3}


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
        return make_folder(utils.HOME / "train_logs" / self.name)

    @property
    def results(self) -> Path:
        """results/<run>/, created on first use."""
        return make_folder(utils.HOME / "results" / self.name)

    def record_parameters(self) -> None:
        """Write the parameters down, results/<run>/parameters/<stage>.json: the stage has checked
        them and goes on to work with them. A stage that refuses them leaves what is there.
        """
        if int(os.environ.get("RANK", 0)) == 0:
            record = {
                name: {"value": value, "from": self.origins[name]}
                for name, value in self.parameters.items()
            }
            write_json(self.results / "parameters" / f"{self.stage}.json", record)

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
        raise UsageError(
            f"{complaint} {_show(value)}, but must be {expected} like its default"
            f" {_show(parameter.default)}."
        )
    if parameter.choices and str(converted) not in parameter.choices:
        raise UsageError(
            f"{complaint} {_show(converted)}: choose one of {', '.join(parameter.choices)}."
        )
    if isinstance(converted, str):
        check_names_of(parameter.name, converted)
    if isinstance(converted, bool | str):
        return converted
    if parameter.name == "seed" and converted not in SEEDS:
        raise UsageError(
            f"{complaint} {converted!r}, but must be at least 0 and at most {SEEDS[-1]}."
        )
    if limits := parameter.violated_limits(converted):
        raise UsageError(f"{complaint} {converted!r}, but must be {limits}.")
    return converted


def check_names_of(parameter: str, value: str) -> None:
    """Refuse names of runs and data sets that lead to other folders (NAME_PARTS, LIST_PARTS).

    Args:
        parameter: its name; any may be given.
        value: its value.

    Raises:
        UsageError: see `check_name`.
    """
    if parameter in NAME_PARTS and value:
        check_name(value, parameter, NAME_PARTS[parameter])
    if parameter in LIST_PARTS:
        for name in filter(None, (part.strip().rstrip("/") for part in value.split(","))):
            check_name(name, f"A name in {parameter}", LIST_PARTS[parameter])


def _show(value: object) -> str:
    """A value for a message, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _to_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(str(value).lower())


def _to_text(value: object) -> str | None:
    value = as_written(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = str(value) if is_number or isinstance(value, str) else None
    return None if text is None or "\0" in text else text


def as_written(value: object) -> object:
    """A value of a YAML file as it was written there, for a parameter that is a text: 1.10."""
    return value.text if isinstance(value, WrittenFloat) else value


def _to_float(value: object) -> float | None:
    if isinstance(value, bool | UnclearNumber) or not isinstance(value, str | SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_int(value: object) -> int | None:
    if isinstance(value, UnclearNumber):
        return None
    number: float | int | None = _to_float(value)
    if re.fullmatch(r"[+-]?\d{1,30}", str(value)):
        number = int(str(value))  # not by way of float, which holds 53 bits only
    if number is None or number != int(number) or int(number) not in INTEGERS:
        return None
    return int(number)


CONVERSIONS: dict[type, tuple[Callable[[object], Value | None], str]] = {
    bool: (_to_bool, "True or False"),
    str: (_to_text, "a text"),
    int: (_to_int, "a whole number in decimals, of at most 64 bits,"),
    float: (_to_float, "a number, finite and in decimals,"),
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
            raise UsageError(f"There is no parameter {_show(name)} (from {origin}): {hint}")


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
        raise UsageError(
            f"{parameter} does not know {_show(unknown[0])}: choose among {', '.join(choices)}."
        )
    return names


# ------------------------------------------------------------------------------------------ recipes
# what a parameter `decoder` stands for: the first one is the system, others are scored beside it
DECODERS = {
    "network": ["network"],
    "ridge": ["ridge"],
    "kernel": ["kernel"],
    "both": ["network", "ridge"],
    "all": ["network", "ridge", "kernel"],
}


def list_decoders(decoder: str) -> list[str]:
    """The decoders that a parameter `decoder` asks for: of network, ridge, kernel.

    Raises:
        PerceptError: for a name that is no key of DECODERS.
    """
    if decoder not in DECODERS:
        raise PerceptError(f"decoder is '{decoder}': choose one of {', '.join(DECODERS)}.")
    return list(DECODERS[decoder])


def list_closed_forms(decoder: str) -> list[str]:
    """Those of `list_decoders` that are solved and not trained: of ridge, kernel."""
    return [name for name in list_decoders(decoder) if name != "network"]


def find_recipe_files(recipe: str, stage: str) -> list[Path]:
    """Find the files of a recipe for a stage, in the order in which they apply.

    "mindeye/mini" gives recipes/mindeye/<stage>.yaml and recipes/mindeye/mini/<stage>.yaml, as far
    as they exist.

    Raises:
        PerceptError: for a recipe that does not exist.
    """
    folder, files = RECIPES, []
    for part in recipe.strip("/").split("/"):
        folder = folder / check_name(part, "The name of a recipe")
        if not folder.is_dir():
            recipes = sorted(str(d.relative_to(RECIPES)) for d in RECIPES.rglob("*") if d.is_dir())
            raise UsageError(f"There is no recipe '{recipe}': choose one of {', '.join(recipes)}.")
        files.append(folder / f"{stage}.yaml")
    return [file for file in files if file.exists()]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the parameters in one YAML file, see `read_yaml`.

    Raises:
        UsageError: if the file is missing, is not a mapping, or is unclear.
        PerceptError: if it cannot be read.
    """
    if not Path(path).exists():
        raise UsageError(
            f"There is no recipe file {path}: give the path of a YAML file, e.g."
            " recipes/mindeye/mini/01_train_high_level.yaml."
        )
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(
            f"The recipe file {path} must hold lines `name: value`, not {type(values).__name__}."
        )
    return values


def _find_recipe_of(files: Sequence[str]) -> str:
    """Recipe that -f files belong to.

    E.g. "mindeye/mini" for recipes/mindeye/mini/01_train_high_level.yaml; "" for files elsewhere.
    """
    folders = [Path(file).resolve().parent for file in files]
    inside = [str(f.relative_to(RECIPES)) for f in folders if f.is_relative_to(RECIPES)]
    return inside[-1] if inside else ""


def _list_levels(recipe: str) -> list[Path]:
    """The folders of a recipe, the miniature last: recipes/mindeye, recipes/mindeye/mini."""
    if not recipe.strip("/"):
        return []
    levels = (Path(recipe.strip("/")).parent.as_posix(), recipe.strip("/"))
    return [RECIPES / level for level in levels if level != "."]


def _count_sessions(recipe: str) -> int:
    """`num_sessions` as a recipe's own training has it, 0 where it says nothing."""
    n_sessions = 0
    for folder in _list_levels(recipe):
        for file in sorted(folder.glob("01_*.yaml")):
            n_sessions = read_recipe(file).get("num_sessions", 0) or n_sessions
    return int(n_sessions)


def _find_own_dataset(recipe: str) -> str:
    """The data set that a recipe's files name, else DEFAULT_DATASET."""
    dataset = DEFAULT_DATASET
    for folder in _list_levels(recipe):
        for file in sorted(folder.glob("[0-9][0-9]_*.yaml")):
            named = read_recipe(file).get("dataset")
            if named:
                dataset = str(named)
                break
    return dataset


def make_run_name(recipe: str, parameters: Mapping[str, Any]) -> str:
    """Name of a run: `model_name`, by default `<recipe>[-mini][-<dataset>]-subj01`.

    The data set is part of it where it is not the recipe's own. The default is followed by
    -cluster-held-out, -4sessions and -pca30 where the training differs in these. The number of
    sessions that the recipe itself asks for is not part of the name.
    """
    if parameters.get("model_name"):
        return check_name(parameters["model_name"], "model_name", NAME_PARTS["model_name"])
    name = recipe.strip("/").replace("/", "-") or "mindeye"
    dataset = str(parameters.get("dataset", ""))
    if dataset and dataset != _find_own_dataset(recipe):
        name += f"-{dataset}"
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


def _build_flag_parser(definitions: Mapping[str, Parameter], stage: str) -> CommandLine:
    """Command line of a stage: -f FILE (repeatable), -p NAME VALUE, and a flag for each parameter.

    A flag has the type of the parameter; its help has comment and default.
    """
    description = f"Stage {stage}; see the notebook for what it does."
    parser = CommandLine(f"{stage}.py", description=description, allow_abbrev=False)
    parser.add_argument(
        "-f",
        dest="_files",
        action="append",
        default=[],
        metavar="FILE",
        help="recipe file (YAML); later ones win",
    )
    parser.add_pairs("one parameter, as papermill has it")
    for parameter in definitions.values():
        _add_flag(parser, parameter)
    return parser


def _add_flag(parser: CommandLine, parameter: Parameter) -> None:
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
    """Parse the command line of a script, or PERCEPT_ARGS where a notebook runs.

    Raises:
        UsageError: for what is not a flag with a value, an unknown name, or a quote that is not
            closed.
    """
    parser = _build_flag_parser(definitions, stage)
    arguments, origin = sys.argv[1:], "the command line"
    if not is_script:
        origin = parser.origin = "PERCEPT_ARGS"
        arguments = split_command(os.environ.get(origin, ""), origin)
    parsed, unparsed = parser.parse_known_args(arguments)
    if unparsed:
        name = unparsed[0].split("=")[0].removeprefix("--")
        positive = name.removeprefix("no-")
        if unparsed[0].startswith("--") and positive not in definitions:
            check_parameter_names([name], definitions, origin)
        raise UsageError(
            f"{origin} has {_show(unparsed[0])}, which is not a flag with a value: write --name"
            " value."
        )
    values = dict(vars(parsed))
    files, pairs = values.pop("_files"), dict(values.pop("pairs"))
    check_parameter_names(pairs, definitions, f"{PAIR_FLAG} of {origin}")
    return _Flags(files, values | pairs, origin)


def _read_injected(
    scope: Mapping[str, Any], definitions: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Overrides of papermill, from the cell that it has put into the running kernel.

    That cell begins with "# Parameters".

    Raises:
        UsageError: for an unknown name, or a number where a text should be.
    """
    history = [cell for cell in scope.get("In", []) if isinstance(cell, str)]
    cells = [cell for cell in history if cell.startswith("# Parameters")]
    names = []
    for statement in ast.parse(cells[-1]).body if cells else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names.append(statement.targets[0].id)
    check_parameter_names(names, definitions, "papermill")
    values = {name: scope[name] for name in names}
    if any(_is_number_for_text(definitions[name], values[name]) for name in names):
        values |= _restore_texts(values, definitions)
    return values


def _is_number_for_text(parameter: Parameter, value: object) -> bool:
    return isinstance(parameter.default, str) and not isinstance(value, str)


def _restore_texts(
    values: Mapping[str, Any], definitions: Mapping[str, Parameter]
) -> dict[str, str]:
    """Values of parameters that are texts, of which papermill has made numbers, True or None.

    `papermill -p` makes 7 of 007, and 1000.0 of 1e3; its command line tells what was typed.

    Raises:
        UsageError: where that cannot be found out.
    """
    typed_texts, texts = _read_papermill_command(), {}
    for name, value in values.items():
        if not _is_number_for_text(definitions[name], value):
            continue
        if name not in typed_texts:
            raise UsageError(
                f"Parameter '{name}' from papermill is {_show(value)}, but must be a text, and"
                f" papermill does not tell how it was written: give it with -r {name} VALUE"
                " instead of -p, or in quotes."
            )
        texts[name] = typed_texts[name]
    return texts


def _read_papermill_command() -> dict[str, str]:
    """Values of -p on the command line of the papermill that started this kernel, by name.

    Empty where the kernel was started by another program.
    """
    import psutil

    try:
        arguments = psutil.Process(int(os.environ.get("JPY_PARENT_PID", ""))).cmdline()
    except (ValueError, psutil.Error):
        return {}
    if not any("papermill" in argument for argument in arguments[:4]):
        return {}
    triples = zip(arguments, arguments[1:], arguments[2:], strict=False)
    return {name: value for flag, name, value in triples if flag in ("-p", "--parameters")}


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
        UsageError: for unknown names, values that a parameter cannot have, missing recipes, a
            relative PERCEPT_HOME.
        PerceptError: for data that have not been prepared.
    """
    is_script = scope.get("__name__") == "__main__" and "In" not in scope
    script = scope.get("__file__") if is_script else None
    if script:
        sys.excepthook = _report_error
    utils.check_home()
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

    Raises:
        SystemExit: with 2 after a command line that cannot be used; after others Python ends with
            1.
    """
    if issubclass(kind, PerceptError):
        sys.stderr.write(f"error: {error}\n")
        if issubclass(kind, UsageError):
            raise SystemExit(2)
    elif issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _start(run: Run) -> None:
    """Check that data are prepared, and seed."""
    values = run.parameters
    if values.get("vd_cache_dir"):
        _keep_hub_in(resolve(str(values["vd_cache_dir"])))
    brings_data = any(values.get(name) for name in ("data_path", "recon_path", "remote_data"))
    if "dataset" in values and not run.stage.startswith("00") and not brings_data:
        _check_prepared(str(values["dataset"]), int(values["subj"]))
    if values.get("weights") == "hub":
        utils.check_gpu_is_usable()
    utils.allow_tf32()
    if "seed" in values:
        seed_everything(int(values["seed"]))


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
