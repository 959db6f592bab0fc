"""Render the executed notebooks of a run into docs/gallery, to be read on a web page.

    python tools/make_gallery.py                                  # of the demo
    python tools/make_gallery.py results/mindeye-mini-subj01 results/roi_voting-mini-subj01

Each notebook becomes a Markdown page with its figures as PNG files beside it. Of further runs only
the notebooks that the first does not have are rendered. docs/contact_sheet.png is the image of the
README.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import MarkdownExporter
from PIL import Image

from src.files.ownership import replace_folder
from src.utils import HOME, ROOT, PerceptError, atomic

GALLERY = ROOT / "docs" / "gallery"
CONTACT_SHEET = "contact_sheet.png"
LARGE = 10**6  # bytes of an image

# Lines of progress bars and warnings.
NOISE = re.compile(r"^.*(it/s|s/it|\?it|Warning:|warn\().*\n?", re.MULTILINE)
STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.DOTALL)


def reduce_colours(folder: Path) -> None:
    """Give large images a palette of 256 colours: a fifth of the bytes, and hardly visible."""
    for path in folder.glob("*.png"):
        if path.stat().st_size > LARGE:
            with Image.open(path) as image:
                image.convert("RGB").quantize(256).save(path, optimize=True)


def has_tag(cell: Any, tag: str) -> bool:
    """Whether a cell of a notebook has a tag."""
    return tag in cell.metadata.get("tags", [])


def is_rendered(output: Any) -> bool:
    """Whether an output of a cell belongs on the page: no stderr, no images inside HTML."""
    html = output.get("data", {}).get("text/html", "")
    return output.get("name") != "stderr" and "data:image" not in html


def find_title(cells: list[Any], default: str) -> str:
    """The first heading of a notebook."""
    for cell in cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("# "):
                    return line.removeprefix("# ")
    return default


def clean_text(body: str) -> str:
    """Leave out styles, progress bars and warnings, and shorten paths of this machine."""
    body = NOISE.sub("", STYLE.sub("", body))
    for folder in (ROOT, HOME):
        body = body.replace(f"{folder}/", "")
    return body


def render_notebook(path: Path, folder: Path) -> str:
    """Write one executed notebook as Markdown with PNG figures into `folder`.

    Returns:
        Its title.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not has_tag(cell, "injected-parameters")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_rendered(output)]
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources.get("outputs", {}).items():
        figure = f"{path.stem}_{name}"
        (folder / figure).write_bytes(content)
        body = body.replace(f"({name})", f"({figure})")
    (folder / f"{path.stem}.md").write_text(clean_text(body))
    return find_title(notebook.cells, path.stem)


def render_run(run: Path, notebooks: list[Path], folder: Path) -> list[str]:
    """Render the notebooks of a run that are not in `folder` yet.

    Returns:
        Lines of the gallery's README that link to them.
    """
    lines = [f"**{run.name}**", ""]
    new = [path for path in notebooks if not (folder / f"{path.stem}.md").exists()]
    for path in new:
        lines.append(f"- [{render_notebook(path, folder)}]({path.stem}.md)")
    return [*lines, ""]


def find_notebooks(runs: list[Path]) -> dict[Path, list[Path]]:
    """Executed notebooks of each run.

    Raises:
        PerceptError: if a run has none.
    """
    notebooks = {run: sorted(run.glob("[0-9][0-9]_*.ipynb")) for run in runs}
    for run, paths in notebooks.items():
        if not paths:
            raise PerceptError(
                f"No executed notebooks in {run}: run its recipe first, e.g. `python run.py"
                " mindeye --mini`."
            )
    return notebooks


def make_gallery(runs: list[Path]) -> None:
    """Replace the gallery by the executed notebooks of some runs.

    Args:
        runs: folders under results/; the contact sheet of the first is the image of the README.

    Raises:
        PerceptError: if a run has no executed notebooks.
    """
    notebooks = find_notebooks(runs)
    with replace_folder(GALLERY) as folder:
        lines = ["# Gallery", ""]
        lines += ["Executed notebooks of the mini world. Made by `make gallery`; do not edit.", ""]
        for run, paths in notebooks.items():
            lines += render_run(run, paths, folder)
            sheet = run / CONTACT_SHEET
            if sheet.exists() and run != runs[0]:
                name = f"{run.name}_{CONTACT_SHEET}"
                shutil.copy(sheet, folder / name)
                lines += [f"![Seen images and what was decoded]({name})", ""]
        (folder / "README.md").write_text("\n".join(lines))
        reduce_colours(folder)
    with atomic(ROOT / "docs" / CONTACT_SHEET) as temporary:
        shutil.copyfile(runs[0] / CONTACT_SHEET, temporary)


if __name__ == "__main__":
    demo = HOME / "results" / "mindeye-mini-subj01"
    make_gallery([Path(folder) for folder in sys.argv[1:]] or [demo])
