"""The form of the notebooks: no outputs, one parameters cell, short cells, and the same code in the
.py export.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from src import parameters

NOTEBOOKS = sorted(parameters.NOTEBOOKS.glob("*.ipynb"))
STAGES = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def test_there_are_notebooks():
    assert {p.stem[:2] for p in NOTEBOOKS} >= {"00", "01", "02", "03", "05", "06", "07"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_and_no_execution_counts(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short_and_magics_absent(path):
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            assert len(source.splitlines()) <= 25, source[:80]
            assert not any(line.lstrip().startswith(("%", "!")) for line in source.splitlines())


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_parameters_cell_is_well_formed_and_configured(path):
    known = parameters.parse_parameters(parameters.read_parameters_cell(path), path.stem)
    assert {"recipe", "model_name"} <= set(known) and all(p.comment for p in known.values())
    code = "".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "code")
    assert f'configure(globals(), "{path.stem}")' in code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_cell_says_what_it_asks_reads_writes_and_costs(path):
    text = "".join(cells(path)[0]["source"])
    assert all(word in text for word in ("**Question.**", "**Reads**", "**Writes**", "\nCost: "))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_export_is_the_notebook(path, tmp_path):
    options = ["--opt", "notebook_metadata_filter=-all", "--opt", "cell_metadata_filter=tags,-all"]
    command = [
        sys.executable,
        "-m",
        "jupytext",
        "--quiet",
        "--to",
        "py:percent",
        *options,
        "-o",
        str(tmp_path / "out.py"),
        str(path),
    ]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "out.py").read_text() == path.with_suffix(".py").read_text(), (
        "run `make notebooks`"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_ends_with_what_was_seen_and_what_to_try(path):
    sources = ["".join(cell["source"]) for cell in cells(path)]
    heads = [i for i, source in enumerate(sources) if "## What we saw" in source]
    assert len(heads) == 1 and "## Try this next" in sources[-1]
    assert "print(" in sources[heads[0] + 1]  # computed, not written in advance


@pytest.mark.parametrize(
    "stem", ["quickstart", "01_train_high_level", "03_reconstruct", "06_metrics"]
)
def test_lessons_have_one_path(stem):
    """At most eight branches, filters of comprehensions counted, and 30 imported names."""
    nodes = list(ast.walk(ast.parse((parameters.NOTEBOOKS / f"{stem}.py").read_text())))
    n_branches = sum(isinstance(node, ast.If | ast.IfExp) for node in nodes)
    n_branches += sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert n_branches <= 8 and sum(len(node.names) for node in imports) <= 30
