"""The documentation: README's limits, links, navigation, glossary and the generated pages."""

import re
from pathlib import Path

import pytest
import yaml

from src.parameters import parse_parameters, read_parameters_cell
from tools import build_docs, render_notebook

ROOT = Path(__file__).resolve().parents[1]
NO_REPOSITORY = build_docs.Repository("")
SOURCES = [
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")),
    *build_docs.COPIED,
    "README.md",
]
TERMS = """
beta, trial, repeat, session, voxel, region of interest, noise ceiling, normaliser, reader,
prepared data, split, validation images, protocol, embedding, token, latent, generator, img2img,
target, decoder, encoding model, high level, low level, backbone, diffusion prior,
ridge regression, condition, baseline, upper bound, shuffled, retrieval, two-way identification,
R2, confidence interval, category classifier, sanity check, stage, recipe, run, mini world, pool,
sweep, fingerprint
"""
GENERATED = {"recipes.md", "tutorials/", "parameters/", "api/"}
WIDTH = 120  # columns of a line of prose


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def make_anchor(heading: str) -> str:
    """The anchor that mkdocs and GitHub give a heading of plain words."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def list_anchors(text: str) -> set[str]:
    return {make_anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}


def drop_code(text: str) -> str:
    """A page without its code blocks, fenced or indented."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def list_navigation(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in list_navigation(value)]


def test_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("path", SOURCES)
def test_links_lead_to_files_and_headings(path):
    folder = (ROOT / path).parent
    for _, _, target, anchor in build_docs.LINK.findall(drop_code(read(path))):
        linked = folder / target
        assert linked.exists(), f"{path} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor.lstrip("#") in list_anchors(linked.read_text(encoding="utf-8")), anchor
    for anchor in re.findall(r"\]\(#([^)]+)\)", read(path)):
        assert anchor in list_anchors(read(path)), f"{path} has no heading #{anchor}"


def test_every_page_is_in_the_navigation_and_in_the_list_of_pages():
    navigation = list_navigation(yaml.safe_load(read("mkdocs.yml"))["nav"])
    pages = {build_docs.find_page(path) for path in SOURCES}
    assert set(navigation) == pages | GENERATED
    assert len(navigation) == len(set(navigation))
    index = read("docs/README.md")
    for path in ROOT.glob("docs/*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


@pytest.mark.parametrize("path", SOURCES)
def test_prose_is_wrapped(path):
    text = re.sub(r"^```.*?^```$", "", read(path), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert not [line for line in lines if len(line) > WIDTH]


@pytest.mark.parametrize("path", SOURCES)
def test_tables_have_at_most_six_columns(path):
    for line in read(path).splitlines():
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            assert line.count("|") - 1 <= 6, f"{path}: {line}"


def test_glossary_defines_every_term_once():
    headings = re.findall(r"^### (.+)$", read("docs/glossary.md"), re.MULTILINE)
    assert sorted(headings) == sorted(term.strip() for term in TERMS.split(","))


def test_tables_hold_every_parameter_of_every_notebook():
    for notebook in filter(build_docs.has_parameters, build_docs.list_notebooks()):
        cell = parse_parameters(read_parameters_cell(notebook), notebook.stem)
        page = build_docs.make_parameter_page(notebook)
        rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", page, re.MULTILINE)
        expected = [
            (name, *map(build_docs.escape_cell, (repr(parameter.default), parameter.comment)))
            for name, parameter in cell.items()
        ]
        assert rows == expected, notebook.stem


def test_recipe_page_holds_every_file():
    page = build_docs.make_recipe_page()
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"`{path.relative_to(ROOT)}`" in page


def test_links_become_links_between_pages():
    def convert(text, page="prior.md", repository=NO_REPOSITORY):
        return build_docs.convert_links(text, f"docs/{page}", page, repository)

    assert convert("[log](../LOG.md)") == "[log](log.md)"
    assert convert("[how](metrics.md#files)") == "[how](metrics.md#files)"
    assert (
        convert("[01](../notebooks/01_train_encoder.py)") == "[01](tutorials/01_train_encoder.md)"
    )
    assert convert("[loop](../src/training/loop.py)") == "loop"
    named = build_docs.Repository("owner/name")
    address = "https://github.com/owner/name/blob/HEAD/src/losses.py"
    assert convert("[loss](../src/losses.py)", repository=named) == f"[loss]({address})"
    assert convert("[x](https://arxiv.org)") == "[x](https://arxiv.org)"


def test_badges_need_the_name_of_the_repository():
    assert NO_REPOSITORY.make_badges() == ""
    badges = build_docs.Repository("owner/name").make_badges()
    assert "mybinder.org/v2/gh/owner/name" in badges
    assert "quickstart.ipynb" in badges


def test_the_site_loads_nothing_from_other_hosts():
    settings = yaml.safe_load(read("mkdocs.yml"))
    assert settings["theme"]["font"] is False
    assert settings["extra"]["polyfills"] == ["iframe-worker.js"]


def test_binder_installs_the_locked_core():
    assert "-r ../requirements.lock" in read("binder/requirements.txt").splitlines()
    assert (ROOT / "binder" / "postBuild").stat().st_mode & 0o111


def test_outputs_are_cleaned_of_progress_bars_and_paths():
    bars = "before\n  3%|#  | 1/30 [00:01<00:29, 1.01it/s]\n\n\n\nafter"
    assert render_notebook.clean_text(bars) == "before\n\nafter"
    path = f"written to {ROOT}/results/x"
    assert render_notebook.clean_text(path) == "written to results/x"


def test_an_executed_copy_is_taken_from_the_preferred_run(tmp_path):
    assert render_notebook.find_executed("06_metrics", tmp_path) is None
    for run in ("a-run", "mindeye-mini-subj01"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "06_metrics.ipynb").touch()
    copy = render_notebook.find_executed("06_metrics", tmp_path)
    assert copy == tmp_path / "mindeye-mini-subj01" / "06_metrics.ipynb"
