"""How much a reader has to hold in the head: width, density and names of the code.

    python tools/readability.py [FOLDER]            figures, and the worst places
    python tools/readability.py [FOLDER] --check    exit with 1 where a figure is over its limit

The sources (src/, run.py, tools/) and the exported notebooks are measured apart; tests are not. The
limits are what well-kept code of this field and of research code at large keeps: himalaya,
voxelwise_tutorials, nanochat, papermill.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 100  # columns
DENSE = 25  # tokens of a line from which on it is dense
COUNTED = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}

# Words that name nothing: a reader learns no more from `found` than from `x`.
VAGUE_NAMES = frozenset(
    """
    made told found given begun known wanted said shown kept taken drawn asked held turned looked
    spoken written each both some own mine theirs ours of there here beside within without unlike
    alike worth present affordable lacking enough words everything everyone nothing others many
    several again once whole most least fewer far near wrong
    """.split()
)


@dataclass(frozen=True)
class Measure:
    """One figure and what it may be.

    Attributes:
        name: what is measured, with its unit.
        value: the figure.
        limit: the most that it may be.
    """

    name: str
    value: float
    limit: float

    @property
    def is_over(self) -> bool:
        """Whether the figure is over its limit."""
        return self.value > self.limit


@dataclass
class Counts:
    """What is counted in some files.

    Attributes:
        widths: columns of each line that is not blank.
        tokens: tokens of each line of code, docstrings apart.
        n_names: names that the code gives.
        n_ternaries: conditional expressions.
        dense_lines: tokens and place of the lines of more than DENSE tokens.
        vague_names: places of names that are in VAGUE_NAMES.
    """

    widths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    n_names: int = 0
    n_ternaries: int = 0
    dense_lines: list[tuple[int, str]] = field(default_factory=list)
    vague_names: list[str] = field(default_factory=list)

    def add_file(self, path: Path) -> None:
        """Count one Python file.

        Raises:
            SyntaxError: if it is not Python.
        """
        text = path.read_text()
        lines = text.splitlines()
        tree = ast.parse(text)
        self.widths += [len(line) for line in lines if line.strip()]
        self.n_ternaries += sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))
        for line_number, n_tokens in count_tokens(text, find_docstring_lines(tree)).items():
            self.tokens.append(n_tokens)
            if n_tokens > DENSE:
                code = lines[line_number - 1].strip()[:80]
                self.dense_lines.append((n_tokens, f"{path}:{line_number}: {code}"))
        for name, line_number in list_names(tree):
            self.n_names += 1
            if name.strip("_") in VAGUE_NAMES:
                self.vague_names.append(f"{path}:{line_number}: {name}")

    def to_measures(self) -> list[Measure]:
        """The figures of all files that were added."""
        n_wide = sum(width > WIDTH for width in self.widths)
        n_lines = len(self.tokens)
        percentile = sorted(self.tokens)[int(0.9 * n_lines)] if n_lines else 0
        return [
            Measure("lines over 100 columns, %", percent(n_wide, len(self.widths)), 1.0),
            Measure("tokens a line, 90th percentile", percentile, 20),
            Measure("lines over 25 tokens, %", percent(len(self.dense_lines), n_lines), 4.0),
            Measure(
                "ternaries a 1000 lines", round(1000 * self.n_ternaries / max(1, n_lines), 1), 30
            ),
            Measure("vague names, %", percent(len(self.vague_names), self.n_names), 0.0),
        ]


def percent(part: int, total: int) -> float:
    """A share in percent, to one digit; 0 of nothing."""
    return round(100 * part / max(1, total), 1)


def find_docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings stand on."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def count_tokens(text: str, skipped_lines: set[int]) -> dict[int, int]:
    """Tokens of each line of a source by the line's number; comments do not count."""
    counts: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line_number = token.start[0]
        if token.type in COUNTED and line_number not in skipped_lines:
            counts[line_number] = counts.get(line_number, 0) + 1
    return counts


def list_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names that the code gives, with their lines: variables, parameters, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def find_longest_cell(folder: Path) -> tuple[int, str]:
    """Lines and place of the longest code cell of the notebooks, cells of parameters apart."""
    longest = (0, "no cell")
    for path in sorted(folder.glob("notebooks/*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            is_parameters = "parameters" in cell["metadata"].get("tags", [])
            if cell["cell_type"] == "code" and not is_parameters:
                n_lines = len("".join(cell["source"]).splitlines())
                longest = max(longest, (n_lines, f"{path.name}, cell {number}"))
    return longest


def list_files(folder: Path) -> dict[str, list[Path]]:
    """The Python files that are measured together."""
    sources = [*folder.glob("src/**/*.py"), *folder.glob("run.py"), *folder.glob("tools/**/*.py")]
    return {"sources": sorted(sources), "notebooks": sorted(folder.glob("notebooks/*.py"))}


def main() -> int:
    """Measure a folder, print the figures, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."))
    parser.add_argument("--check", action="store_true", help="exit with 1 where a limit is passed")
    parser.add_argument("--worst", type=int, default=5, metavar="N", help="places shown of a kind")
    arguments = parser.parse_args()
    any_over = False
    for group, paths in list_files(arguments.folder).items():
        counts = Counts()
        for path in paths:
            counts.add_file(path)
        print(f"{group} ({len(paths)} files)")
        for measure in counts.to_measures():
            any_over |= measure.is_over
            remark = f"  over the limit of {measure.limit:g}" if measure.is_over else ""
            print(f"  {measure.name:32} {measure.value:6g}{remark}")
        dense_places = [place for _, place in sorted(counts.dense_lines, reverse=True)]
        for place in dense_places[: arguments.worst] + counts.vague_names[: arguments.worst]:
            print(f"    {place}")
    n_lines, place = find_longest_cell(arguments.folder)
    print(f"longest cell: {n_lines} lines ({place})")
    return int(any_over and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
