"""The fingerprint of a stage's code: the code that its notebook runs, and nothing else.

A finished stage is run again when its code changes. Its code is that of the notebook and of every
module of `src` that the notebook imports, directly or through other modules. What counts is the
parsed code: comments, docstrings, formatting and the text of a notebook do not. The versions of the
libraries that decide numbers, of those that this code imports, belong to it.

Modules that only hand on names of others (the `__init__` of a package, `src/models.py`) are looked
through: `from src.data import Subject` depends on the module that defines `Subject`, not on its
siblings. So are packages that import a module when one of its names is first used (PEP 562): a
table `_EXPORTS` {module of the package: [names]}, and a `__getattr__` that reads it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
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


def fingerprint_code(notebook: Path, root: Path) -> str:
    """Hash of all code that a notebook runs.

    Args:
        notebook: the .ipynb file.
        root: folder that holds the package `src`.

    Returns:
        A sha256 in hexadecimal digits.
    """
    source = read_notebook_code(notebook)
    closure = find_import_closure(ast.parse(source), root)
    digest = hashlib.sha256(normalise_code(source).encode())
    for path in sorted(closure.modules):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(normalise_code(path.read_text()).encode())
        for template in _find_templates(path):
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
    return _normalise_cached(source)


@lru_cache(maxsize=1024)
def _normalise_cached(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def find_import_closure(tree: ast.AST, root: Path) -> ImportClosure:
    """Follow the imports of a piece of code, wherever in it they stand, through the modules of
    `src`.
    """
    closure = ImportClosure()
    waiting = list(_list_imports(tree, package=""))
    seen = set(waiting)
    while waiting:
        step = waiting.pop()
        for further in _follow(step, root, closure):
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return closure


def list_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of some libraries that decide numbers."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for library in sorted(set(libraries) & set(NUMERIC_LIBRARIES)):
        try:
            versions[library] = version(NUMERIC_LIBRARIES[library])
        except PackageNotFoundError:
            versions[library] = "absent"
    return versions


def _follow(step: _Import, root: Path, closure: ImportClosure) -> Iterator[_Import]:
    """Add what one import leads to; yields the imports that have to be followed in turn."""
    if step.module.split(".")[0] != "src":
        closure.libraries.add(step.module.split(".")[0])
        return
    submodule = f"{step.module}.{step.name}"
    if step.name and _find_module(submodule, root):
        yield _Import(submodule, "")
        return
    path = _find_module(step.module, root)
    if path is None:
        return
    tree = _parse(path.read_text())
    package = step.module if path.name == "__init__.py" else step.module.rpartition(".")[0]
    passed_on = _list_passed_on(tree, package) if step.name and _only_hands_on(tree) else {}
    if step.name in passed_on:
        yield passed_on[step.name]
        return
    closure.modules.add(path)
    yield from _list_imports(tree, package)


def _find_module(name: str, root: Path) -> Path | None:
    """The file of a module, None if there is none."""
    place = root.joinpath(*name.split("."))
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.exists():
            return path
    return None


@lru_cache(maxsize=1024)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def _list_imports(tree: ast.AST, package: str) -> Iterator[_Import]:
    """All imports of a syntax tree; relative ones are spelt out from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _Import(alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            module = _spell_out(node, package)
            for alias in node.names:
                yield _Import(module, alias.name)


def _spell_out(node: ast.ImportFrom, package: str) -> str:
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) + 1 - node.level]
    return ".".join([*base, *filter(None, [node.module])])


def _only_hands_on(tree: ast.Module) -> bool:
    """Whether a module holds nothing but imports, a docstring, `__all__`, and what a package needs
    that imports its modules late: `_EXPORTS`, `__getattr__`, imports for the type checker.
    """
    return all(_is_plain(node) for node in tree.body)


def _is_plain(node: ast.stmt) -> bool:
    """Whether a statement only hands on names."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    if isinstance(node, ast.If):
        return _is_for_type_checker(node) and all(_is_plain(inner) for inner in node.body)
    return _is_assignment_to(node, "__all__") or _is_assignment_to(node, "_EXPORTS")


def _is_for_type_checker(node: ast.If) -> bool:
    """Whether a statement is `if TYPE_CHECKING:` without an else."""
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse


def _is_assignment_to(node: ast.stmt, name: str) -> bool:
    """Whether a statement is `name = ...`."""
    if not isinstance(node, ast.Assign):
        return False
    target = node.targets[0]
    return isinstance(target, ast.Name) and target.id == name


def _list_passed_on(tree: ast.Module, package: str) -> dict[str, _Import]:
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
        elif isinstance(node, ast.Assign) and _is_assignment_to(node, "_EXPORTS"):
            names |= _list_late_names(node.value, package)
    return names


def _list_late_names(table: ast.expr, package: str) -> dict[str, _Import]:
    """The names of a table {module of the package: [names]}, and where they are defined.

    Raises:
        ValueError: if the table is not written out in the source.
    """
    names: dict[str, _Import] = {}
    for module, exported in ast.literal_eval(table).items():
        for name in exported:
            names[name] = _Import(f"{package}.{module}", name)
    return names


def _find_templates(path: Path) -> list[Path]:
    """Files beside a module that its code names, such as the template of the report."""
    others = [
        other
        for other in sorted(path.parent.iterdir())
        if other.is_file() and other.suffix != ".py"
    ]
    if not others:
        return []
    texts = {
        node.value
        for node in ast.walk(_parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return [other for other in others if other.name in texts]
