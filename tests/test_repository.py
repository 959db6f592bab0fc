"""The repository's own files agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-all.lock"])
def test_lock_pins_everything_with_hashes_and_names_no_host(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    pins = [line for line in lines if not line.startswith(" ")]
    assert all("==" in line for line in pins)
    assert all(line.lstrip().startswith("--hash=sha256:") for line in lines if line not in pins)
    assert all(line.endswith("\\") for line in pins), "every package has a hash"


def test_locks_have_what_pyproject_asks_for_in_one_version():
    core, everything = (
        dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements.lock", "requirements-all.lock")
    )
    extras = project()["optional-dependencies"]
    wanted = names(project()["dependencies"])
    assert wanted <= names(core)
    for extra in ("nsd", "search", "captions", "attribution", "tracking", "docs", "dev"):
        wanted |= names(extras[extra])
    assert wanted - {"percept"} <= names(everything)
    assert core.items() <= everything.items()


def test_the_core_is_small_and_has_what_users_named():
    core = names(project()["dependencies"])
    assert len(core) <= 24
    assert {
        "torch",
        "jupyterlab",
        "papermill",
        "webdataset",
        "clip-anytorch",
        "diffusers",
        "huggingface-hub",
        "h5py",
        "matplotlib",
        "umap-learn",
        "scikit-image",
    } <= core


def test_setup_knows_every_extra():
    text = (ROOT / "setup.sh").read_text()
    for extra in set(project()["optional-dependencies"]) - {"all", "dev"}:
        assert f"{extra} " in text or f" {extra})" in text


def test_readme_has_every_folder_and_the_repository_page_every_notebook_and_module():
    readme = (ROOT / "README.md").read_text()
    tracked = subprocess.run(
        ["git", "ls-tree", "-d", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for folder in (name for name in tracked if not name.startswith(".")):
        assert f"\n{folder}/ " in readme, f"README's tree lacks {folder}/"
    page = (ROOT / "docs" / "repository.md").read_text()
    for module in (ROOT / "src").glob("[a-z]*"):
        assert f"`{module.name}" in page, f"docs/repository.md lacks src/{module.name}"
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"`{notebook.stem}`" in page, f"docs/repository.md lacks {notebook.stem}"


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
        for target in (
            "demo",
            "test",
            "test-slow",
            "lab",
            "lint",
            "docs",
            "lock",
            "build",
            "push",
        )
    )


def test_scripts_are_valid_shell():
    for script in ("setup.sh", ".ci/run"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_committed_weights_stay_small():
    files = [p for p in (ROOT / "data" / "mini_models").rglob("*") if p.is_file()]
    assert 0 < sum(p.stat().st_size for p in files) < 64 * 2**20
