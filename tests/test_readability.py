"""tools/readability.py: what it counts, and that the repository keeps within its limits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
specification = importlib.util.spec_from_file_location(
    "readability", ROOT / "tools" / "readability.py"
)
readability = importlib.util.module_from_spec(specification)
sys.modules["readability"] = readability
specification.loader.exec_module(readability)


def count(tmp_path, source):
    path = tmp_path / "code.py"
    path.write_text(source)
    counts = readability.Counts()
    counts.add_file(path)
    return counts


def test_tokens_are_those_of_code_alone(tmp_path):
    counts = count(tmp_path, '"""A module of many words."""\nx = f(1, 2)  # six and two more\n\n')
    assert counts.tokens == [8] and counts.widths == [29, 31]


def test_wide_and_dense_lines_are_reported_with_their_place(tmp_path):
    line = "values = [" + ", ".join(map(str, range(30))) + "]"
    counts = count(tmp_path, line + "\n")
    assert counts.widths == [len(line)] and len(line) > 100
    ((n_tokens, place),) = counts.dense_lines
    assert n_tokens == 63 and place.startswith(f"{tmp_path}/code.py:1: values")


def test_vague_names_are_found_wherever_a_name_is_given(tmp_path):
    source = (
        "def made(told, image):\n    found, images = told\n    for each in images:\n        pass\n"
    )
    counts = count(tmp_path, source + "class Worth:\n    _kept = 1 if made else 2\n")
    names = [place.rpartition(" ")[2] for place in counts.vague_names]
    assert sorted(names) == ["_kept", "each", "found", "made", "told"] and counts.n_ternaries == 1
    assert counts.n_names == 8


def test_a_figure_over_its_limit_fails_the_check(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "module.py").write_text("found = 1\n")
    command = [sys.executable, str(ROOT / "tools" / "readability.py"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "vague names" in done.stdout and "over the limit" in done.stdout


def test_this_repository_is_within_the_limits():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "readability.py"), str(ROOT), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
