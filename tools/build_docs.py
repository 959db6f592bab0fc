"""Build the documentation site from the repository's own files, without a network.

    python -m tools.build_docs                     # `make docs`: into build/site
    python -m tools.build_docs --repository owner/name    # with links to the code and launch badges

Three things are put together in build/docs, from which mkdocs makes the site:

- the pages of docs/, and those Markdown files that lie beside what they describe (COPIED);
- the notebooks, executed where results/ holds an executed copy, with a page of parameters each,
  made of the notebook's `parameters` cell;
- a page for every package of src/, made of its docstrings, and a page for the recipes.

Links between Markdown files of the repository become links between pages; a link to any other file
becomes one to the code on GitHub, or plain text where no repository is named. Warnings are errors.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import yaml

from src.parameters import Parameter, parse_parameters, read_parameters_cell
from src.utils import HOME, ROOT
from tools.render_notebook import (
    find_executed,
    insert_below_title,
    reduce_colours,
    render_notebook,
)

BUILD = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
QUICKSTART = "quickstart"

# Markdown files outside docs/ that have a page, and its name.
COPIED = {
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/README.md": "data_layout.md",
    "data/mini_models/README.md": "mini_models.md",
    "launch/README.md": "launch_files.md",
    "results/README.md": "results_files.md",
    "train_logs/README.md": "checkpoint_files.md",
    "benchmarks/README.md": "benchmarks.md",
}
# Options of mkdocstrings: of a package the docstring alone, as its members are shown with the
# modules that they come from; of a module that has a page for itself no second title.
PACKAGE_OPTIONS = ["    options:", "      members: false", "      show_if_no_docstring: true"]
PAGE_OPTIONS = ["    options:", "      show_root_heading: false"]
PAGE_NAME = re.compile(r"(?<![\w/(\[`])docs/(\w+)\.md\b(?!\))")  # a page that a sentence names
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Repository:
    """Where the code lies on GitHub.

    Attributes:
        name: owner and name, "" where it is not known.
    """

    name: str

    def link_file(self, text: str, path: str) -> str:
        """A link to a file of the repository, or its text alone."""
        if not self.name:
            return text
        return f"[{text}](https://github.com/{self.name}/blob/HEAD/{path})"

    def make_badges(self) -> str:
        """Badges that open the quickstart in Binder and Colab; "" where the name is not known."""
        if not self.name:
            return ""
        notebook = f"notebooks/{QUICKSTART}.ipynb"
        binder = f"https://mybinder.org/v2/gh/{self.name}/HEAD?urlpath=lab/tree/{notebook}"
        colab = f"https://colab.research.google.com/github/{self.name}/blob/HEAD/{notebook}"
        return (
            f"[Open in Binder]({binder}){{ .md-button }} [Open in Colab]({colab}){{ .md-button }}"
        )


# ------------------------------------------------------------------------------------------- links
def find_page(path: str) -> str | None:
    """The page of the site that shows a file of the repository, None where none does.

    Args:
        path: relative to the repository, with slashes.
    """
    if path in COPIED:
        return COPIED[path]
    parts = PurePosixPath(path).parts
    if parts[0] == "docs":
        page = posixpath.join(*parts[1:]) if len(parts) > 1 else "README.md"
        return "index.md" if page == "README.md" else page
    if parts[0] == "notebooks" and path.endswith((".ipynb", ".py")):
        return f"tutorials/{PurePosixPath(path).stem}.md"
    if path == "README.md":
        return "index.md"
    return None


def convert_links(text: str, path: str, page: str, repository: Repository) -> str:
    """Make the links of a Markdown file those of its page.

    Args:
        text: of the file.
        path: of the file, relative to the repository.
        page: that it becomes, relative to the site.
        repository: for links to files that have no page.
    """

    def convert(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.groups()
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        linked_page = find_page(linked)
        if linked_page is None:
            return repository.link_file(label, linked)
        relative = posixpath.relpath(linked_page, posixpath.dirname(page) or ".")
        return f"{mark}[{label}]({relative}{anchor or ''})"

    return LINK.sub(convert, link_page_names(text, page))


def link_page_names(text: str, page: str) -> str:
    """Make a link of every page of docs/ that a text names, e.g. docs/prior.md.

    Args:
        text: Markdown.
        page: that the text stands on, relative to the site.
    """

    def link(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (ROOT / "docs" / f"{name}.md").exists():
            return match.group(0)
        target = posixpath.relpath(f"{name}.md", posixpath.dirname(page) or ".")
        return f"[{name}]({target})"

    return PAGE_NAME.sub(link, text)


# ------------------------------------------------------------------------------------------- pages
def write_page(page: str, text: str) -> None:
    """Write a page below build/docs/pages."""
    path = BUILD / "pages" / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy_pages(repository: Repository) -> None:
    """Copy docs/ and the pages that lie elsewhere, with their links converted."""
    shutil.copytree(ROOT / "docs", BUILD / "pages")
    (BUILD / "pages" / "README.md").unlink()
    sources = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
    for path in [*sources, *COPIED]:
        page = find_page(path)
        assert page is not None, path
        text = (ROOT / path).read_text(encoding="utf-8")
        if page == "index.md":
            text = text.replace("<!-- badges -->", repository.make_badges())
        write_page(page, convert_links(text, path, page, repository))


def escape_cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def make_parameter_table(parameters: Iterable[Parameter]) -> str:
    """A table of parameters: name, default value, meaning."""
    rows = ["| parameter | default | meaning |", "|---|---|---|"]
    for parameter in parameters:
        default, meaning = escape_cell(repr(parameter.default)), escape_cell(parameter.comment)
        rows.append(f"| `{parameter.name}` | `{default}` | {meaning} |")
    return "\n".join(rows)


def split_by_heading(cell: str) -> dict[str, str]:
    """Split a parameters cell at its headings, lines such as `# data`."""
    groups: dict[str, list[str]] = {}
    heading = "run"
    for line in cell.splitlines():
        if line.startswith("# "):
            heading = line.removeprefix("# ")
        elif line.strip():
            groups.setdefault(heading, []).append(line)
    return {name: "\n".join(lines) for name, lines in groups.items()}


def make_parameter_page(notebook: Path) -> str:
    """The page of a notebook's parameters, a table for each heading of its parameters cell."""
    stem = notebook.stem
    lines = [f"# {stem}", ""]
    lines += [f"Parameters of the notebook [{stem}](../tutorials/{stem}.md), from its first cell."]
    lines += [f"The same list in a terminal: `python notebooks/{stem}.py --help`.", ""]
    for heading, source in split_by_heading(read_parameters_cell(notebook)).items():
        table = make_parameter_table(parse_parameters(source, stem).values())
        lines += [f"## {heading}", "", table, ""]
    return "\n".join(lines)


def has_parameters(notebook: Path) -> bool:
    """Whether a notebook has a parameters cell; the quickstart has none."""
    return '"parameters"' in notebook.read_text(encoding="utf-8")


def list_notebooks() -> list[Path]:
    """The notebooks in their order, the quickstart first."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return sorted(paths, key=lambda path: path.stem != QUICKSTART)


def write_notebooks(repository: Repository) -> None:
    """Write a page for each notebook and one for its parameters."""
    folder = BUILD / "pages" / "tutorials"
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in list_notebooks():
        executed = find_executed(notebook.stem, HOME / "results")
        state = (
            f"Executed in `results/{executed.parent.name}`." if executed else "Not executed here."
        )
        parts = [state]
        if repository.name:
            parts.append(repository.link_file("Notebook file", f"notebooks/{notebook.name}") + ".")
        if has_parameters(notebook):
            page = f"parameters/{notebook.stem}.md"
            write_page(page, link_page_names(make_parameter_page(notebook), page))
            parts.append(f"Its parameters [as tables](../parameters/{notebook.stem}.md).")
        if notebook.stem == QUICKSTART:
            parts.append(repository.make_badges())
        page = f"tutorials/{notebook.stem}.md"
        body = render_notebook(notebook, executed, folder, partial(link_page_names, page=page))
        write_page(page, insert_below_title(body, " ".join(filter(None, parts))))
    reduce_colours(folder)


def make_recipe_page() -> str:
    """The page of all recipes, with the files of each."""
    lines = ["# Recipes", ""]
    lines += ["A recipe holds only what differs from the defaults of the notebooks."]
    lines += ["[Running recipes](running.md) says how they are used.", ""]
    for folder in sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir()):
        lines += [f"## {folder.name}", ""]
        for path in sorted(folder.rglob("*.yaml")):
            source = path.read_text(encoding="utf-8").strip()
            lines += [f"`{path.relative_to(ROOT)}`", "", "```yaml", source, "```", ""]
    return "\n".join(lines)


def list_modules(unit: Path) -> list[str]:
    """Names of the public modules of a package, or the name of a module.

    Args:
        unit: a folder or a file of src/.
    """
    paths = [unit] if unit.is_file() else sorted(unit.rglob("*.py"))
    names = []
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(part for part in parts if part != "__init__"))
    return names


def is_package(name: str) -> bool:
    """Whether a module is a package, whose members are shown with the modules they come from."""
    return (ROOT / name.replace(".", "/")).is_dir()


def write_reference() -> None:
    """Write a page for each package and module of src/, for mkdocstrings to fill."""
    units = [path for path in (ROOT / "src").iterdir() if not path.name.startswith("_")]
    for unit in sorted(unit for unit in units if unit.is_dir() or unit.suffix == ".py"):
        lines = [f"# src.{unit.stem}", ""]
        for name in list_modules(unit):
            options = PACKAGE_OPTIONS if is_package(name) else []
            lines += [f"::: {name}", *(options if unit.is_dir() else PAGE_OPTIONS), ""]
        write_page(f"api/{unit.stem}.md", "\n".join(lines))


# ------------------------------------------------------------------------------------------- mkdocs
def expand_navigation(entry: object) -> object:
    """Replace a folder in the navigation, such as `api/`, by the list of its pages."""
    if isinstance(entry, dict):
        return {title: expand_navigation(value) for title, value in entry.items()}
    if isinstance(entry, list):
        return [expand_navigation(value) for value in entry]
    if isinstance(entry, str) and entry.endswith("/"):
        pages = {
            path.stem: f"{entry}{path.name}" for path in (BUILD / "pages" / entry).glob("*.md")
        }
        first = [name for name in (QUICKSTART,) if name in pages]
        return [pages[name] for name in first + sorted(set(pages) - set(first))]
    return entry


def write_settings(repository: Repository) -> Path:
    """Write mkdocs.yml for build/docs: its folders, its navigation, its repository."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["docs_dir"] = str(BUILD / "pages")
    settings["site_dir"] = str(SITE)
    settings["nav"] = expand_navigation(settings["nav"])
    if repository.name:
        settings["repo_url"] = f"https://github.com/{repository.name}"
    path = BUILD / "mkdocs.yml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def assemble(repository: Repository) -> Path:
    """Write all pages anew below build/docs.

    Returns:
        The settings file for mkdocs.
    """
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    copy_pages(repository)
    write_notebooks(repository)
    write_page("recipes.md", make_recipe_page())
    write_reference()
    return write_settings(repository)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    repository_help = "owner/name on GitHub, by default that of the workflow that runs, or none"
    default = os.environ.get("GITHUB_REPOSITORY", "")
    parser.add_argument("--repository", default=default, help=repository_help)
    settings = assemble(Repository(parser.parse_args().repository))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run([*command, "-f", str(settings)], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"The documentation is in {SITE}: open index.html there.")


if __name__ == "__main__":
    main()
