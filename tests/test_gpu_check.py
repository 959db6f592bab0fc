"""tools/gpu_check.py, rehearsed at toy size: time on a machine with a GPU is too short to find
slips there.
"""

import importlib.util
import json
import sys

import pytest
import torch

from src.utils import ROOT

spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check
spec.loader.exec_module(gpu_check)


def rehearse(folder, parts):
    code = gpu_check.main(["--rehearse", "--parts", parts, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    return code, json.loads(path.read_text())


@pytest.mark.slow(reason="rehearses a part of the check")
@pytest.mark.parametrize("part", [p for p in gpu_check.PARTS if p not in ("tests", "generators")])
def test_each_part_ends_with_figures(part, tmp_path):
    code, content = rehearse(tmp_path, part)
    assert code == 0 and {"commit", "card", "versions", "date"} <= set(content)
    rows = content["rows"]
    assert rows[-1]["name"] == f"all of {part}"
    problems = [row for row in rows if row["value"] is None]
    assert len(rows) > 1 and (not problems or part == "recipe"), problems


@pytest.mark.slow(reason="loads generators, and runs pytest in a process of its own")
def test_the_parts_that_take_longer_end_with_figures(tmp_path):
    code, content = rehearse(tmp_path, "tests,generators")
    rows = {row["name"]: row for row in content["rows"]}
    assert code == 0 and rows["GPU tests passed"]["value"] > 0
    assert not [row for row in content["rows"] if row["value"] is None]


def test_what_is_missing_or_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def import_what_is_missing(check):
        import no_such_package  # noqa: F401

    def run_out_of_memory(check):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(check):
        raise ValueError("one\ntwo")

    parts = {"a": import_what_is_missing, "b": run_out_of_memory, "c": fail}
    monkeypatch.setattr(gpu_check, "PARTS", parts | {"d": lambda check: check.add("d", 1.0)})
    code, content = rehearse(tmp_path, "a,b,c,d")
    notes = {row["name"]: row["note"] for row in content["rows"]}
    assert notes["a"] == "not run: no_such_package is not installed"
    assert notes["b"] == "out of memory" and notes["c"] == "failed: ValueError: two"
    assert code == 1 and notes["d"] == "" and "no_such_package" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_up(tmp_path):
    arguments = ["--rehearse", "--minutes", "0", "--parts", "clip", "--output", str(tmp_path)]
    assert gpu_check.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["note"].startswith("not run: the time was up")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_found(capsys):
    assert gpu_check.main(["--parts", "clip"]) == 2
    assert capsys.readouterr().err.startswith("There is no GPU for torch: nvidia-smi finds")


def test_counts_of_pytest_are_read():
    line = "....\n2 failed, 81 passed, 44 skipped, 12 xfailed, 1 error in 107.85s (0:01:47)"
    counts = gpu_check.parse_counts(line)
    assert counts["failed"] == 2 and counts["passed"] == 81 and counts["error"] == 1
    rows = [gpu_check.Row("tests", "GPU tests failed", 2.0)]
    assert gpu_check.has_failures(rows) and not gpu_check.has_failures([])


def test_scores_of_gpu_and_cpu_are_compared():
    check = gpu_check.Check("cuda", True, 0.0)
    gpu_check.compare_scores(check, {"cuda": {"ssim": 0.5, "x": 1.0}, "cpu": {"ssim": 0.4}})
    (row,) = check.rows
    assert row.name == "score ssim" and row.value == 0.5 and row.note == "CPU 0.4"
