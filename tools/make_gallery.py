"""Render the executed notebooks of a run into docs/gallery, so that a reader on a web page sees
them.

    python tools/make_gallery.py                                  # of the demo
    python tools/make_gallery.py results/mindeye-mini-subj01 results/roi_voting-mini-subj01 results/compare results/roi_sets_mini

Each notebook becomes a Markdown page with its figures as PNG files beside it;
docs/contact_sheet.png is the picture of the README.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from PIL import Image

from src.utils import HOME, ROOT, PerceptError

GALLERY = ROOT / "docs" / "gallery"
LARGE = 10**6  # bytes of a picture
NOISE = re.compile(
    r"^.*(it/s|s/it|\?it|Warning:|warn\().*\n?", re.MULTILINE
)  # progress bars and warnings


def lighten(folder: Path) -> None:
    """Give large pictures a palette of 256 colours, which takes a fifth of the space and hardly
    shows.
    """
    for path in folder.glob("*.png"):
        if path.stat().st_size > LARGE:
            with Image.open(path) as image:
                image.convert("RGB").quantize(256).save(path, optimize=True)


def render(notebook: Path, folder: Path) -> str:
    """Write one executed notebook as Markdown with PNG figures into `folder`; returns its title."""
    node = nbformat.read(notebook, as_version=4)
    node.cells = [
        cell for cell in node.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                out
                for out in cell.outputs
                if out.get("name") != "stderr"
                and "data:image" not in out.get("data", {}).get("text/html", "")
            ]
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
    titles = [
        line[2:]
        for cell in node.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    return titles[0] if titles else stem


def main(results: list[Path]) -> None:
    """Remake the gallery from the executed notebooks of the first run, and from those of further
    runs that the first does not have.
    """
    runs = {run: sorted(run.glob("[0-9][0-9]_*.ipynb")) for run in results}
    if missing := [run for run, notebooks in runs.items() if not notebooks]:
        raise PerceptError(
            f"No executed notebooks in {missing[0]}: run its recipe first, e.g. `python run.py"
            " mindeye --mini`."
        )
    with tempfile.TemporaryDirectory(dir=ROOT / "docs") as temporary:
        folder = Path(temporary) / "gallery"
        folder.mkdir()
        text = [
            "# Gallery",
            "",
            "Executed notebooks of the mini world. Made by `make gallery`; do not edit.",
            "",
        ]
        for run, notebooks in runs.items():
            new = [
                notebook for notebook in notebooks if not (folder / f"{notebook.stem}.md").exists()
            ]
            text += [
                f"**{run.name}**",
                "",
                *(f"- [{render(notebook, folder)}]({notebook.stem}.md)" for notebook in new),
                "",
            ]
            if (sheet := run / "contact_sheet.png").exists() and run != results[
                0
            ]:  # whose sheet is the picture of the README
                shutil.copy(sheet, folder / f"{run.name}_contact_sheet.png")
                text += [f"![Seen images and what was decoded]({run.name}_contact_sheet.png)", ""]
        (folder / "README.md").write_text("\n".join(text))
        lighten(folder)
        shutil.rmtree(GALLERY, ignore_errors=True)
        shutil.move(folder, GALLERY)
    shutil.copy(results[0] / "contact_sheet.png", ROOT / "docs" / "contact_sheet.png")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or [HOME / "results" / "mindeye-mini-subj01"])
