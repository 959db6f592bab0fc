"""The fingerprint of a stage's code: the code that its notebook runs, and nothing else.

A finished stage is run again when its code changes. Its code is that of the notebook and of every
module of `src` that the notebook imports, directly or through other modules. What counts is the
parsed code: comments, docstrings, formatting and the text of a notebook do not. The versions of the
libraries that decide numbers, of those that this code imports, belong to it.

Modules that only hand on names of others (the `__init__` of a package, `src/models.py`) are looked
through: `from src.data import Subject` depends on the module that defines `Subject`, not on its
siblings. So are packages that import a module when one of its names is first used (PEP 562): a
table `_EXPORTS` {module of the package: [names]}, and a `__getattr__` that reads it.

Each module is parsed and walked through once in a process, whatever the number of stages: the
fingerprints of a whole recipe take about a second.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Top-level modules whose version can change a number, and the packages that they are installed
# from.
NUMERIC_LIBRARIES = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "captum": "captum",
    "clip": "clip-anytorch",
    "deepspeed": "deepspeed",
    "diffusers": "diffusers",
    "faiss": "faiss-cpu",
    "himalaya": "himalaya",
    "kornia": "kornia",
    "nibabel": "nibabel",
    "nilearn": "nilearn",
    "nltk": "nltk",
    "numba": "numba",
    "numpy": "numpy",
    "open_clip": "open-clip-torch",
    "pandas": "pandas",
    "pycocoevalcap": "pycocoevalcap",
    "qdrant_client": "qdrant-client",
    "qdrant_edge": "qdrant-edge-py",
    "rouge_score": "rouge-score",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "umap": "umap-learn",
}

# Modules that tell what a stage will need and decide nothing of what it does.
INFORMATIVE_MODULES = ("src.pipeline.dryrun",)

# Functions that import the module that their first argument names.
IMPORT_FUNCTIONS = ("import_module", "require_extra")

IMPORTING_NODES = {ast.Import, ast.ImportFrom, ast.Call}

FILE_NAME = re.compile(r"[\w-]+\.(?!py$)\w+")  # of what may be a template beside a module


@dataclass
class ImportClosure:
    """What a piece of code imports, directly and through the modules that it imports.

    Attributes:
        modules: files of `src`, each once.
        libraries: top-level names of the modules imported from elsewhere.
    """

    modules: set[Path] = field(default_factory=set)
    libraries: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Import:
    """One imported name: `from module import name`, or `import module` where the name is empty."""

    module: str
    name: str


@dataclass(frozen=True)
class _Code:
    """What one walk through a piece of code finds.

    Attributes:
        normalised: the syntax tree as text.
        imports: all that it imports, wherever that stands, but for type checkers.
        exports: where the names come from that it hands on, if it does nothing else.
        file_names: string constants that may name a file beside it.
    """

    normalised: str
    imports: tuple[_Import, ...]
    exports: dict[str, _Import]
    file_names: tuple[str, ...]


def fingerprint_code(notebook: Path, root: Path) -> str:
    """Hash of all code that a notebook runs.

    Args:
        notebook: the .ipynb file.
        root: folder that holds the package `src`.

    Returns:
        A sha256 in hexadecimal digits.
    """
    source = read_notebook_code(notebook)
    modules = _Modules(root)
    closure = _find_closure(source, modules)
    digest = hashlib.sha256(normalise_code(source).encode())
    for path in sorted(closure.modules):
        code = modules.read(path)
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(code.normalised.encode())
        for template in _find_templates(path, code):
            digest.update(template.read_bytes())
    digest.update(json.dumps(list_versions(closure.libraries), sort_keys=True).encode())
    return digest.hexdigest()


def read_notebook_code(notebook: Path) -> str:
    """The code cells of a notebook in one text, without the lines that speak to IPython (%, !)."""
    cells = json.loads(notebook.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return "\n".join(lines)


def normalise_code(source: str) -> str:
    """The syntax tree of a source as text: no comments, no docstrings, no line breaks.

    Raises:
        SyntaxError: if the source is not Python.
    """
    return _read_code(source, package="").normalised


def find_import_closure(source: str, root: Path) -> ImportClosure:
    """Follow the imports of a piece of code, wherever in it they stand, through the modules of
    `src`.
    """
    return _find_closure(source, _Modules(root))


def list_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of some libraries that decide numbers."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for library in sorted(set(libraries) & set(NUMERIC_LIBRARIES)):
        try:
            versions[library] = version(NUMERIC_LIBRARIES[library])
        except PackageNotFoundError:
            versions[library] = "absent"
    return versions


class _Modules:
    """The modules of `src` below a folder, each read from disk at most once.

    Attributes:
        root: folder that holds the package `src`.
        paths: the files of the modules, by their full names.
    """

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, Path] = {}
        self._codes: dict[Path, _Code] = {}
        for path in (root / "src").rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            self.paths[".".join(parts).removesuffix(".__init__")] = path

    def read(self, path: Path) -> _Code:
        """The code of one of the files."""
        if path not in self._codes:
            package = ".".join(path.relative_to(self.root).parent.parts)
            self._codes[path] = _read_code(path.read_text(), package)
        return self._codes[path]


def _find_closure(source: str, modules: _Modules) -> ImportClosure:
    """As `find_import_closure`, through modules that are read already."""
    closure = ImportClosure()
    waiting = list(_read_code(source, package="").imports)
    seen = set(waiting)
    while waiting:
        step = waiting.pop()
        for further in _follow(step, modules, closure):
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return closure


def _follow(step: _Import, modules: _Modules, closure: ImportClosure) -> Iterable[_Import]:
    """Add what one import leads to; returns the imports that have to be followed in turn."""
    package = step.module.split(".")[0]
    if package != "src":
        closure.libraries.add(package)
        return []
    submodule = f"{step.module}.{step.name}"
    if submodule in modules.paths:
        return [_Import(submodule, "")]
    if step.module not in modules.paths or step.module.startswith(INFORMATIVE_MODULES):
        return []
    path = modules.paths[step.module]
    code = modules.read(path)
    if step.name in code.exports:
        return [code.exports[step.name]]
    if path in closure.modules:
        return []
    closure.modules.add(path)
    return code.imports


def _find_templates(path: Path, code: _Code) -> list[Path]:
    """Files beside a module that its code names, such as the template of the report."""
    templates = [path.with_name(name) for name in code.file_names]
    return [template for template in templates if template.is_file()]


@cache
def _read_code(source: str, package: str) -> _Code:
    """Parse a source and walk through it; `package` is what relative imports begin at."""
    tree = ast.parse(source)
    walk = _Walk(package)
    walk.visit(tree)
    late_exports = _list_late_exports(tree, package)
    imports = (*walk.imports, *late_exports.values())
    exports: dict[str, _Import] = {}
    if all(_is_plain(node) for node in tree.body):
        exports = _list_exports(tree, package) | late_exports
    file_names = sorted(text for text in walk.texts if FILE_NAME.fullmatch(text))
    return _Code(" ".join(walk.tokens), imports, exports, tuple(file_names))


class _Walk:
    """One walk through a syntax tree that collects everything that is needed of it.

    The tree is written as text by hand, as `ast.dump` and further walks would take three times as
    long.

    Attributes:
        tokens: classes of the nodes and values of their fields, in order, without docstrings.
        imports: what is imported, but for type checkers.
        texts: the string constants.
    """

    def __init__(self, package: str):
        self.package = package
        self.tokens: list[str] = []
        self.imports: list[_Import] = []
        self.texts: set[str] = set()

    def visit(self, node: ast.AST) -> None:
        """Add a node and all below it."""
        kind = type(node)
        if kind in IMPORTING_NODES:
            self.imports.extend(_list_imports(node, self.package))
        elif kind is ast.Constant and isinstance(node.value, str):  # type: ignore[attr-defined]
            self.texts.add(node.value)  # type: ignore[attr-defined]
        elif kind is ast.If and _is_for_type_checker(node):
            return
        self.tokens.append(kind.__name__)
        for name in kind._fields:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                self.visit(value)
            elif isinstance(value, list):
                self._visit_list(value[1:] if name == "body" and _has_docstring(node) else value)
            else:
                self.tokens.append(repr(value))
        self.tokens.append(")")

    def _visit_list(self, items: list) -> None:
        self.tokens.append("[")
        for item in items:
            if isinstance(item, ast.AST):
                self.visit(item)
            else:
                self.tokens.append(repr(item))
        self.tokens.append("]")


def _has_docstring(node: ast.AST) -> bool:
    """Whether a module, class or function begins with a docstring."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = node.body[0] if node.body else None
    if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
        return False
    return isinstance(first.value.value, str)


def _list_imports(node: ast.AST, package: str) -> Iterator[_Import]:
    """What a statement, or a call of one of IMPORT_FUNCTIONS, imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield _Import(alias.name, "")
    elif isinstance(node, ast.ImportFrom):
        module = _spell_out(node, package)
        for alias in node.names:
            yield _Import(module, alias.name)
    elif isinstance(node, ast.Call) and _is_import_function(node.func) and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield _Import(argument.value, "")


def _is_import_function(function: ast.expr) -> bool:
    """Whether a called function imports a module: `require_extra`, `importlib.import_module`."""
    if isinstance(function, ast.Attribute):
        return function.attr in IMPORT_FUNCTIONS
    return isinstance(function, ast.Name) and function.id in IMPORT_FUNCTIONS


def _spell_out(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) + 1 - node.level]
    return ".".join([*base, *filter(None, [node.module])])


def _is_plain(node: ast.stmt) -> bool:
    """Whether a statement only hands on names: it is an import, a docstring, `__all__`, or what a
    package needs that imports its modules late.
    """
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    if isinstance(node, ast.If):
        return _is_for_type_checker(node) and all(_is_plain(inner) for inner in node.body)
    return _is_assignment_to(node, "__all__") or _is_assignment_to(node, "_EXPORTS")


def _is_for_type_checker(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:` without an else."""
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_assignment_to(node: ast.stmt, name: str) -> bool:
    """Whether a statement is `name = ...`."""
    if not isinstance(node, ast.Assign):
        return False
    target = node.targets[0]
    return isinstance(target, ast.Name) and target.id == name


def _list_exports(tree: ast.Module, package: str) -> dict[str, _Import]:
    """The names that a module hands on, and where it has them from."""
    names: dict[str, _Import] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = _spell_out(node, package)
            for alias in node.names:
                names[alias.asname or alias.name] = _Import(module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = _Import(alias.name, "")
    return names


def _list_late_exports(tree: ast.Module, package: str) -> dict[str, _Import]:
    """The names of a table `_EXPORTS` {module of the package: [names]}, and where they are defined.

    Raises:
        ValueError: if the table is not written out in the source.
    """
    names: dict[str, _Import] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and _is_assignment_to(node, "_EXPORTS"):
            for module, exported in ast.literal_eval(node.value).items():
                for name in exported:
                    names[name] = _Import(f"{package}.{module}", name)
    return names
