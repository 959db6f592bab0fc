"""The parameters of a stage and of a recipe, from one source: the notebook's cell tagged `parameters`.

The precedence is the same everywhere: cell < recipe files in order < single overrides
(papermill, flags of the exported script, PERCEPT_ARGS)."""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from src import utils
from src.utils import ROOT, PerceptError, resolve, seed_everything, to_device, write_json

NOTEBOOKS, RECIPES = ROOT / "notebooks", ROOT / "recipes"

Literal = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One line `name = literal  # comment` of a parameters cell."""

    name: str
    default: Literal
    comment: str

    @property
    def choices(self) -> list[str]:
        """What a comment "one of a, b" allows; empty when anything is."""
        found = re.search(r"one of ([^;]+?)(?:;|$)", self.comment)
        return [choice.strip() for choice in found.group(1).split(",")] if found else []

    def refuses(self, value: float) -> str:
        """What of "at least 1", "at most 1" or "more than 0" in the comment a number breaks; empty
        when nothing.
        """
        limits = {
            "at least": lambda low: value >= low,
            "at most": lambda high: value <= high,
            "more than": lambda low: value > low,
        }
        found = re.findall(r"\b(at least|at most|more than) (-?[\d.]*\d)", self.comment)
        return " and ".join(
            f"{words} {limit}" for words, limit in found if not limits[words](float(limit))
        )


@dataclass(frozen=True)
class Run:
    """What a stage knows of its run: names, folders (made when asked for), and the effective
    parameters with their origin.
    """

    name: str
    stage: str
    recipe: str
    parameters: dict[str, Literal]
    origins: dict[str, str]

    @property
    def logs(self) -> Path:
        """train_logs/<run>/."""
        return _made(utils.HOME / "train_logs" / self.name)

    @property
    def results(self) -> Path:
        """results/<run>/."""
        return _made(utils.HOME / "results" / self.name)

    @property
    def device(self) -> str:
        """What `to_device` finds."""
        return to_device("auto")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><b>{escape(k)}</b></td><td>{escape(str(v))}</td><td>{escape(self.origins[k])}</td></tr>"
            for k, v in self.parameters.items()
            if self.origins[k] != "cell"
        )
        head = (
            f"<p>run <b>{escape(self.name)}</b>, stage {escape(self.stage)}, on {self.device}</p>"
        )
        return head + f"<table><tr><th>parameter</th><th>value</th><th>from</th></tr>{rows}</table>"

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.parameters.items() if self.origins[k] != "cell"}
        return (
            f"run {self.name}, stage {self.stage}, on {self.device}; not the notebook's defaults:"
            f" {changed}"
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_parameters_cell(path: Path) -> str:
    """Source of the cell tagged `parameters` of a notebook (.ipynb) or of its .py export."""
    if path.suffix == ".ipynb":
        cells = [
            c
            for c in json.loads(path.read_text())["cells"]
            if "parameters" in c["metadata"].get("tags", [])
        ]
        text = "".join(cells[0]["source"]) if cells else ""
    else:
        found = re.search(
            r'^# %% tags=\["parameters"\]\n(.*?)(?=^# %%|\Z)',
            path.read_text(),
            re.MULTILINE | re.DOTALL,
        )
        text = found.group(1) if found else ""
    if not text.strip():
        raise PerceptError(
            f"{path} has no cell tagged 'parameters': add the tag to the cell that holds them."
        )
    return text


def parse_parameters(source: str, where: str = "the parameters cell") -> dict[str, Parameter]:
    """Parse `name = literal  # comment` lines.

    Raises:
        PerceptError: for a line of another form.
    """
    found = {}
    for number, line in enumerate(source.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            (node,) = ast.parse(line).body
            assert (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            )
            value = ast.literal_eval(node.value)
            assert isinstance(value, bool | int | float | str)
        except (SyntaxError, ValueError, AssertionError) as error:
            raise PerceptError(
                f"Line {number} of {where} is not `name = number, text or True/False  # comment`:"
                f" {line.strip()!r}."
            ) from error
        end = node.end_col_offset or len(line)
        found[node.targets[0].id] = Parameter(
            node.targets[0].id, value, line[end:].strip().lstrip("#").strip()
        )
    return found


def coerce(parameter: Parameter, value: Any, origin: str) -> Literal:
    """Bring a value to the type of the parameter's default, or refuse it.

    Raises:
        PerceptError: naming parameter, value, origin and what is expected.
    """
    kind = type(parameter.default)
    made: Literal | None = None
    if kind is bool:
        made = (
            value
            if isinstance(value, bool)
            else {"true": True, "false": False}.get(str(value).lower())
        )
    elif kind is str:
        made = (
            value
            if isinstance(value, str)
            else (
                str(value)
                if isinstance(value, int | float) and not isinstance(value, bool)
                else None
            )
        )
    elif kind is int and re.fullmatch(r"[+-]?\d+", str(value)):
        made = int(value)  # not by way of float, which holds 53 bits only
    elif not isinstance(value, bool):
        try:
            number = float(value)
            made = number if kind is float else int(number) if number == int(number) else None
        except (TypeError, ValueError, OverflowError):
            made = None
    if made is None:
        names = {bool: "True or False", str: "a text", int: "a whole number", float: "a number"}
        raise PerceptError(
            f"Parameter '{parameter.name}' from {origin} is {value!r}, but must be {names[kind]}"
            f" like its default {parameter.default!r}."
        )
    if parameter.choices and str(made) not in parameter.choices:
        raise PerceptError(
            f"Parameter '{parameter.name}' from {origin} is {made!r}: choose one of"
            f" {', '.join(parameter.choices)}."
        )
    if kind in (int, float) and (limit := parameter.refuses(made)):  # type: ignore[arg-type]
        raise PerceptError(
            f"Parameter '{parameter.name}' from {origin} is {made!r}, but must be {limit}."
        )
    return made


def check_parameter_names(names: Iterable[str], known: Collection[str], origin: str) -> None:
    """Refuse names that no parameter has, suggesting the nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."
            raise PerceptError(f"There is no parameter '{name}' (from {origin}): {hint}")


def parse_names(text: str, known: Sequence[str], parameter: str) -> set[str]:
    """The names in a parameter that takes several, separated by commas.

    Raises:
        PerceptError: for one that is not among `known`.
    """
    names = {part.strip() for part in text.split(",")} - {""}
    if unknown := sorted(names - set(known)):
        raise PerceptError(
            f"{parameter} does not know '{unknown[0]}': choose among {', '.join(known)}."
        )
    return names


def find_recipe_files(recipe: str, stage: str) -> list[Path]:
    """The files of a recipe for a stage, in order: "mindeye/mini" -> recipes/mindeye/<stage>.yaml,
    recipes/mindeye/mini/<stage>.yaml.

    Raises:
        PerceptError: for a recipe that does not exist.
    """
    folder = RECIPES
    found = []
    for part in recipe.strip("/").split("/"):
        folder = folder / part
        if not folder.is_dir():
            known = sorted(str(d.relative_to(RECIPES)) for d in RECIPES.rglob("*") if d.is_dir())
            raise PerceptError(f"There is no recipe '{recipe}': choose one of {', '.join(known)}.")
        found.append(folder / f"{stage}.yaml")
    return [file for file in found if file.exists()]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The parameters in one YAML file.

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
    if values is not None and not isinstance(values, dict):
        raise PerceptError(
            f"The recipe file {path} must hold lines `name: value`, not {type(values).__name__}."
        )
    return {str(k): v for k, v in (values or {}).items()}


def flag_parser(known: dict[str, Parameter], stage: str) -> argparse.ArgumentParser:
    """Command line of a stage: -f FILE (repeatable), -p NAME VALUE, and a flag a parameter with its
    type, default and comment.
    """
    parser = argparse.ArgumentParser(
        prog=f"{stage}.py",
        allow_abbrev=False,
        description=f"Stage {stage}; see the notebook for what it does.",
    )
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
    for p in known.values():
        text = f"{p.comment} (default: {p.default!r})".replace("%", "%%")
        if isinstance(p.default, bool):  # --x, --no-x, --x=True, --x False
            parser.add_argument(
                f"--{p.name}",
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                metavar="True|False",
                help=text,
            )
            parser.add_argument(
                f"--no-{p.name}",
                dest=p.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        else:
            parser.add_argument(
                f"--{p.name}",
                default=argparse.SUPPRESS,
                metavar=type(p.default).__name__,
                help=text,
            )
    return parser


def _from_flags(
    arguments: list[str], known: dict[str, Parameter], stage: str, origin: str
) -> tuple[list[str], dict[str, Any]]:
    """Recipe files and single overrides in a list of flags."""
    parsed, rest = flag_parser(known, stage).parse_known_args(arguments)
    if rest:
        name = rest[0].lstrip("-").split("=")[0]
        check_parameter_names(
            [name.removeprefix("no-") if name.removeprefix("no-") in known else name], known, origin
        )
        raise PerceptError(
            f"{origin} has {rest[0]!r}, which is not a flag with a value: write --name value."
        )
    values = dict(vars(parsed))
    files, pairs = values.pop("_files"), dict(values.pop("_pairs"))
    check_parameter_names(pairs, known, f"-p of {origin}")
    return files, values | pairs


def _injected(scope: dict[str, Any], known: dict[str, Parameter]) -> dict[str, Any]:
    """Overrides that papermill has put into a cell of its own, which begins with "# Parameters", of
    the running kernel.
    """
    cells = [c for c in scope.get("In", []) if isinstance(c, str) and c.startswith("# Parameters")]
    names = (
        [
            n.targets[0].id
            for n in ast.parse(cells[-1]).body
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        ]
        if cells
        else []
    )
    check_parameter_names(names, known, "papermill")
    return {name: scope[name] for name in names}


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
    script = (
        scope.get("__file__") if scope.get("__name__") == "__main__" and "In" not in scope else None
    )
    if script:
        sys.excepthook = _say_plainly
    known = parse_parameters(
        read_parameters_cell(Path(script) if script else NOTEBOOKS / f"{stage}.ipynb"), stage
    )
    values: dict[str, Any] = {name: scope.get(name, p.default) for name, p in known.items()}
    origins = dict.fromkeys(known, "cell")
    overrides = _injected(scope, known)
    arguments, origin = (
        (sys.argv[1:], "the command line")
        if script
        else (shlex.split(os.environ.get("PERCEPT_ARGS", "")), "PERCEPT_ARGS")
    )
    files, flags = _from_flags(arguments, known, stage, origin)
    recipe = str(
        flags.get("recipe", overrides.get("recipe", values.get("recipe", "")))
    ) or os.environ.get("PERCEPT_RECIPE", "")
    named = find_recipe_files(recipe, stage) if recipe else []
    for path in [*named, *(Path(f) if Path(f).exists() else ROOT / f for f in files)]:
        content = read_recipe(path)
        check_parameter_names(content, known, str(path))
        for name, value in content.items():
            values[name], origins[name] = (
                coerce(known[name], value, f"{path.name} of {path.parent.name}"),
                f"{path.parent.name}/{path.name}",
            )
    for name, value in {**overrides, **flags}.items():
        restated = (
            origins[name] != "cell" and coerce(known[name], value, origin) == values[name]
        )  # run.py passes the recipe's values too
        values[name], origins[name] = (
            value,
            origins[name] if restated else origin if name in flags else "papermill",
        )
    values = {name: coerce(known[name], value, origins[name]) for name, value in values.items()}
    scope.update(values)
    return _start(
        stage, values, origins, recipe or _recipe_of(files) or str(values.get("recipe", ""))
    )


def _say_plainly(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What a script prints when it stops: our own errors are for the reader of the sentence, all
    others for a developer.
    """
    if issubclass(kind, PerceptError):
        sys.stderr.write(f"error: {error}\n")
    elif issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted; the same command goes on where it stopped\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _recipe_of(files: list[str]) -> str:
    """The recipe that -f files belong to, e.g. "mindeye/mini" for
    recipes/mindeye/mini/01_train_high_level.yaml.
    """
    folders = [Path(f).resolve().parent for f in files]
    inside = [str(f.relative_to(RECIPES)) for f in folders if f.is_relative_to(RECIPES)]
    return inside[-1] if inside else ""


def _sessions_of(recipe: str) -> int:
    """`num_sessions` as a recipe's own training has it, 0 where it says nothing."""
    folders = [
        RECIPES / folder for folder in (Path(recipe).parent, recipe) if str(folder) not in (".", "")
    ]
    told = [
        read_recipe(file).get("num_sessions", 0)
        for folder in folders
        for file in sorted(folder.glob("01_*.yaml"))
    ]
    return int(next((number for number in reversed(told) if number), 0))


def make_run_name(recipe: str, parameters: dict[str, Any]) -> str:
    """`model_name`, or <recipe>[-mini]-subj01, followed by -cluster-held-out, -4sessions and -pca30
    where the training differs in these.

    Of the sessions, those that the recipe itself asks for are not named.
    """
    if parameters.get("model_name"):
        return str(parameters["model_name"])
    name = recipe.strip("/").replace("/", "-") or "mindeye"
    if "subj" in parameters:
        name += f"-subj{int(parameters['subj']):02d}"
    if parameters.get("split", "images") != "images":
        name += f"-{parameters['split']}"
    if "num_sessions" in parameters and int(parameters["num_sessions"]) != _sessions_of(recipe):
        name += f"-{int(parameters['num_sessions']) or 'all'}sessions"
    return (
        f"{name}-pca{int(parameters['n_components'])}" if parameters.get("n_components") else name
    )


def _start(stage: str, values: dict[str, Any], origins: dict[str, str], recipe: str) -> Run:
    run = Run(make_run_name(recipe, values), stage, recipe, values, origins)
    if values.get("vd_cache_dir"):
        _keep_hub_in(resolve(str(values["vd_cache_dir"])))
    fetched_or_given = any(values.get(name) for name in ("data_path", "recon_path", "remote_data"))
    if "dataset" in values and not stage.startswith("00") and not fetched_or_given:
        folder = utils.HOME / "data" / values["dataset"] / f"subj{int(values['subj']):02d}"
        if not folder.is_dir():
            raise PerceptError(
                f"There are no prepared data at {folder}: either prepare your own (notebook 00,"
                ' data_path is where your copy of NSD lies), or set recipe = "mindeye/mini" in the'
                " parameters cell for the embedded mini world and begin with notebook 00."
            )
    if "seed" in values:
        seed_everything(int(values["seed"]))
    if int(os.environ.get("RANK", 0)) == 0:
        record = {name: {"value": value, "from": origins[name]} for name, value in values.items()}
        write_json(run.results / "parameters" / f"{stage}.json", record)
    return run


def _keep_hub_in(folder: Path) -> None:
    """Let the hub's client keep its files in `folder`; it reads that once, when it is imported."""
    if "huggingface_hub" in sys.modules and os.environ.get("HF_HUB_CACHE") != str(folder):
        raise PerceptError(
            f"vd_cache_dir cannot become {folder} any more, as the hub's client is loaded: restart"
            " the kernel and run this cell first."
        )
    os.environ["HF_HUB_CACHE"] = str(folder)
