"""Notebooks as Markdown pages of the documentation, with their figures as files beside them.

An executed copy, where a run has left one under results/, is shown with its outputs. Otherwise the
notebook is shown as it is in the repository, without outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import MarkdownExporter
from PIL import Image

from src.utils import HOME, ROOT

LARGE = 10**6  # bytes of an image
FIRST_RUNS = ["percept-mini-subj01", "mindeye-mini-subj01"]  # their notebooks are preferred

# Lines of progress bars and warnings.
NOISE = re.compile(r"^.*(it/s|s/it|\?it|Warning:|warn\().*\n?", re.MULTILINE)
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")  # as progress bars leave them
TABLE_STYLE = ' border="1" class="dataframe"'  # of pandas; without it tables look like the others
STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.DOTALL)


def find_executed(stem: str, results: Path) -> Path | None:
    """The executed copy of a notebook, of the preferred run that has one.

    Args:
        stem: name of the notebook without its ending.
        results: the folder of results, a folder a run.
    """
    copies = {path.parent.name: path for path in sorted(results.glob(f"*/{stem}.ipynb"))}
    names = [name for name in FIRST_RUNS if name in copies] + list(copies)
    return copies[names[0]] if names else None


def has_tag(cell: Any, tag: str) -> bool:
    """Whether a cell of a notebook has a tag."""
    return tag in cell.metadata.get("tags", [])


def is_rendered(output: Any) -> bool:
    """Whether an output of a cell belongs on the page: no stderr, no images inside HTML."""
    html = output.get("data", {}).get("text/html", "")
    return output.get("name") != "stderr" and "data:image" not in html


def clean_text(body: str) -> str:
    """Leave out styles, progress bars and warnings, and shorten paths of this machine."""
    body = NOISE.sub("", STYLE.sub("", body)).replace(TABLE_STYLE, "")
    for folder in (ROOT, HOME):
        body = body.replace(f"{folder}/", "")
    return BLANK_LINES.sub("\n\n", body)


def reduce_colours(folder: Path) -> None:
    """Give large images a palette of 256 colours: a fifth of the bytes, and hardly visible."""
    for path in folder.glob("*.png"):
        if path.stat().st_size > LARGE:
            with Image.open(path) as image:
                image.convert("RGB").quantize(256).save(path, optimize=True)


def insert_below_title(body: str, note: str) -> str:
    """Put a paragraph below the first heading of a page."""
    title, _, rest = body.lstrip().partition("\n")
    return f"{title}\n\n{note}\n{rest}"


def render_notebook(
    source: Path, executed: Path | None, folder: Path, convert: Callable[[str], str]
) -> str:
    """A notebook as Markdown; its figures are written as files.

    Args:
        source: the notebook of the repository.
        executed: its executed copy, None where there is none.
        folder: where the figures go.
        convert: what is done to the text of its Markdown cells.
    """
    notebook = nbformat.read(executed or source, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not has_tag(cell, "injected-parameters")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_rendered(output)]
        else:
            cell.source = convert(cell.source)
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources.get("outputs", {}).items():
        figure = f"{source.stem}_{name}"
        (folder / figure).write_bytes(content)
        body = body.replace(f"({name})", f"({figure})")
    return clean_text(body)
