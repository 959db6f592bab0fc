"""The repository's own files agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from src.readers import READERS, default_options

ROOT = Path(__file__).resolve().parents[1]


def names(requirements) -> set[str]:
    return {re.split(r"[<>=!\[; ]", r)[0].lower().replace("_", "-") for r in requirements}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yaml_names_what_pyproject_names():
    content = yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"]
    assert names(next(d["pip"] for d in content if isinstance(d, dict))) == names(
        project()["dependencies"]
    )


def test_lock_pins_everything_and_names_no_host():
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert all("==" in line for line in lines) and not any(
        "://" in line or line.startswith("-") for line in lines
    )
    wanted = names(project()["dependencies"]) | names(project()["optional-dependencies"]["dev"])
    assert wanted <= names(line.split("==")[0] for line in lines)


def test_readme_tree_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for module in (ROOT / "src").glob("[a-z]*.py"):
        assert module.name in text, f"README's tree lacks src/{module.name}"
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in text, f"README's tree lacks {notebook.stem}"


def test_no_page_has_a_gap_left_to_fill():
    for page in [
        ROOT / "README.md",
        ROOT / "LOG.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
    ]:
        assert not re.search(r"EFFECT_|TODO|FIXME|XXX", page.read_text()), page


def test_docs_name_every_reader_and_option():
    rows = {
        line.split("`")[1]: line
        for line in (ROOT / "docs" / "data.md").read_text().splitlines()
        if line.startswith("| `")
    }
    assert set(rows) == {*READERS, "mini"}
    for source in READERS:
        assert all(f"`{option}`" in rows[source] for option in default_options(source)), source


def test_make_targets():
    text = (ROOT / "Makefile").read_text()
    assert all(
        re.search(rf"^{target}:", text, re.MULTILINE)
        for target in ("demo", "test", "lab", "lint", "gallery", "build", "push")
    )


def test_scripts_are_valid_shell():
    for script in ("setup.sh", ".ci/run"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_committed_weights_stay_small():
    files = [p for p in (ROOT / "data" / "mini_models").rglob("*") if p.is_file()]
    assert 0 < sum(p.stat().st_size for p in files) < 64 * 2**20
