"""Render the executed notebooks of a run into docs/gallery, so that a reader on a web page sees them.

    python tools/make_gallery.py [results/mindeye-mini-subj01]

Each notebook becomes a Markdown page with its figures as PNG files beside it; docs/contact_sheet.png is the picture of the README.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from src.utils import HOME, ROOT, PerceptError

GALLERY = ROOT / "docs" / "gallery"
NOISE = re.compile(r"^.*(it/s|s/it|\?it|Warning:|warn\().*\n?", re.MULTILINE)  # progress bars and warnings


def render(notebook: Path, folder: Path) -> str:
    """Write one executed notebook as Markdown with PNG figures into `folder`; returns its title."""
    node = nbformat.read(notebook, as_version=4)
    node.cells = [cell for cell in node.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr" and "data:image" not in out.get("data", {}).get("text/html", "")]
    exporter = MarkdownExporter()
    body, resources = exporter.from_notebook_node(node)
    stem = notebook.stem
    for name, data in resources.get("outputs", {}).items():
        renamed = f"{stem}_{name}"
        (folder / renamed).write_bytes(data)
        body = body.replace(f"({name})", f"({renamed})")
    body = re.sub(r"<style scoped>.*?</style>\n?", "", body, flags=re.DOTALL)
    body = NOISE.sub("", body).replace(str(ROOT) + "/", "").replace(str(HOME) + "/", "")
    (folder / f"{stem}.md").write_text(body)
    titles = [line[2:] for cell in node.cells if cell.cell_type == "markdown" for line in cell.source.splitlines() if line.startswith("# ")]
    return titles[0] if titles else stem


def main(results: Path) -> None:
    """Remake the gallery from the executed notebooks in `results`."""
    notebooks = sorted(results.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise PerceptError(f"No executed notebooks in {results}: run `python run.py mindeye --mini` first.")
    with tempfile.TemporaryDirectory(dir=ROOT / "docs") as temporary:
        folder = Path(temporary) / "gallery"
        folder.mkdir()
        lines = [f"- [{render(notebook, folder)}]({notebook.stem}.md)" for notebook in notebooks]
        text = ["# Gallery", "", f"The notebooks of the run `{results.name}`, executed. Made by `make gallery`; do not edit.", "", *lines, ""]
        (folder / "README.md").write_text("\n".join(text))
        shutil.rmtree(GALLERY, ignore_errors=True)
        shutil.move(folder, GALLERY)
    shutil.copy(results / "contact_sheet.png", ROOT / "docs" / "contact_sheet.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME / "results" / "mindeye-mini-subj01")
