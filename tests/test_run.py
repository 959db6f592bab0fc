"""run.py: order, overrides, skipping, resuming, and what it says when a stage fails."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest

import run
from src import parameters, utils
from src.files import ownership
from src.pipeline import recipes, runs, stages
from src.utils import PerceptError, UsageError

ROOT = Path(run.__file__).parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two tiny stages and a recipe with a miniature."""
    notebooks, recipes = tmp_path / "notebooks", tmp_path / "recipes" / "sys" / "mini"
    notebooks.mkdir()
    recipes.mkdir(parents=True)
    checkpoint = (
        f"from pathlib import Path\npath = Path({str(tmp_path / 'home' / 'train_logs')!r}) /"
        " model_name / 'number.txt'\n"
    )
    hand_on = (
        checkpoint
        + "if 'number' in globals():\n    path.parent.mkdir(parents=True, exist_ok=True)\n   "
        " path.write_text(str(number))\nelif die:\n    import os\n    os.kill(os.getpid(),"
        " 9)\nelse:\n    print('read', path.read_text())"
    )
    for stage, body in (
        ("00_first", "number = 1  # a number"),
        ("01_second", "fail = False  # fail on purpose\ndie = False  # be killed"),
    ):
        cells = [
            nbformat.v4.new_markdown_cell(f"# {stage}\n\nCost: nothing\nat all"),
            nbformat.v4.new_code_cell(
                f'model_name = ""  # run\nsubj = 1  # subject\n{body}',
                metadata={"tags": ["parameters"]},
            ),
            nbformat.v4.new_code_cell(
                "if 'fail' in globals() and fail:\n    raise ValueError('on purpose')\nprint(subj,"
                " model_name)"
            ),
            nbformat.v4.new_code_cell(hand_on),
        ]
        meta = {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=meta), notebooks / f"{stage}.ipynb"
        )
        (recipes.parent / f"{stage}.yaml").write_text("# defaults\n")
    (recipes / "00_first.yaml").write_text("number: 7\n")
    monkeypatch.setattr(parameters, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(parameters, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    return tmp_path


def test_runs_in_order_skips_what_is_finished_and_resumes_after_a_failure(project, capsys):
    with pytest.raises(PerceptError, match="Stage 01_second stopped: ValueError: on purpose"):
        runs.run_recipe("sys/mini", {"fail": "true"})
    results = project / "home" / "results" / "sys-mini-subj01"
    assert (
        (results / "00_first.ipynb").exists()
        and (results / "01_second.failed.ipynb").exists()
        and not (results / "01_second.ipynb").exists()
    )
    assert (
        json.loads((results / ".stages" / "00_first.json").read_text())["parameters"]["number"] == 7
    )
    capsys.readouterr()
    runs.run_recipe("sys/mini", {})
    output = capsys.readouterr().out
    assert (
        "00_first: finished before" in output
        and "01_second ..." in output
        and not (results / "01_second.failed.ipynb").exists()
    )
    assert not list(results.glob(".*running*"))
    runs.run_recipe("sys/mini", {})
    assert capsys.readouterr().out.count("finished before") == 2


def test_an_override_goes_to_every_stage_that_has_the_name(project):
    results = runs.run_recipe("sys", {"subj": "5"})
    assert results.name == "sys-subj05"
    for stage in ("00_first", "01_second"):
        outputs = nbformat.read(results / f"{stage}.ipynb", 4).cells[-2].outputs
        assert outputs[0]["text"].strip() == "5 sys-subj05"


def test_a_change_of_parameters_or_notebook_runs_the_stage_and_those_after_it_again(
    project, capsys
):
    runs.run_recipe("sys", {"model_name": "x"})
    capsys.readouterr()
    runs.run_recipe("sys", {"model_name": "x", "number": "3"})
    assert "finished before" not in capsys.readouterr().out


def test_all_stages_land_in_the_folder_that_one_stage_names(project):
    notebook = project / "notebooks" / "01_second.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[1].source += "\nn_components = 0  # of the second stage alone, at least 0"
    nbformat.write(content, notebook)
    plain = runs.run_recipe("sys", {"number": "1"})
    results = runs.run_recipe("sys", {"n_components": "30"})
    assert (plain.name, results.name) == ("sys-subj01", "sys-subj01-pca30")
    assert {path.name for path in results.glob("*.ipynb")} == {"00_first.ipynb", "01_second.ipynb"}
    assert (
        read_by_second(results) == "read 1"
        and (project / "home" / "train_logs" / "sys-subj01-pca30" / "number.txt").exists()
    )
    assert runs.run_recipe("sys", {"n_components": "30", "model_name": "mine"}).name == "mine"
    (project / "recipes" / "sys" / "01_second.yaml").write_text(
        "n_components: 5\n"
    )  # a recipe's own value counts, too
    assert recipes.select_stages("sys", {})[1] == {"model_name": "sys-subj01-pca5"}
    with pytest.raises(PerceptError, match="must be at least 0"):
        runs.run_recipe("sys", {"n_components": "-1"})


def read_by_second(results):
    return nbformat.read(results / "01_second.ipynb", 4).cells[-1].outputs[0]["text"].strip()


def test_from_does_not_make_stale_results_look_finished(project):
    runs.run_recipe("sys", {"number": "1"})
    results = runs.run_recipe("sys", {"number": "2"}, first="01")
    assert read_by_second(results) == "read 1"  # --from takes the earlier stage as it is
    runs.run_recipe("sys", {"number": "2"})
    assert read_by_second(results) == "read 2"


def test_a_stage_that_failed_half_way_is_not_taken_for_finished(project, capsys):
    runs.run_recipe("sys", {})
    with pytest.raises(PerceptError):
        runs.run_recipe("sys", {"fail": "true"})
    capsys.readouterr()
    runs.run_recipe("sys", {})
    assert "01_second ..." in capsys.readouterr().out


def test_deleting_what_a_stage_wrote_runs_it_again_and_those_after_it(project, capsys):
    runs.run_recipe("sys", {})
    (project / "home" / "train_logs" / "sys-subj01" / "number.txt").unlink()
    capsys.readouterr()
    runs.run_recipe("sys", {})
    assert "finished before" not in capsys.readouterr().out


def test_a_run_in_a_folder_of_runs_knows_what_it_wrote(project, capsys):
    results = runs.run_recipe("sys", {"model_name": "many/one"})
    assert (
        results == project / "home" / "results" / "many" / "one"
        and read_by_second(results) == "read 1"
    )
    assert json.loads((results / ".stages" / "00_first.json").read_text())["wrote"] == [
        "train_logs/many/one/number.txt"
    ]
    (project / "home" / "train_logs" / "many" / "one" / "number.txt").unlink()
    capsys.readouterr()
    runs.run_recipe("sys", {"model_name": "many/one"})
    assert "finished before" not in capsys.readouterr().out


def test_to_ends_with_a_stage_and_the_same_without_it_goes_on(project, capsys):
    results = runs.run_recipe("sys", {}, last="00")
    assert (results / "00_first.ipynb").exists() and not (results / "01_second.ipynb").exists()
    runs.run_recipe("sys", {})
    output = capsys.readouterr().out
    assert "00_first: finished before" in output and "01_second ..." in output
    with pytest.raises(PerceptError, match="--to 07 names no stage"):
        runs.run_recipe("sys", {}, last="07")


def test_without_leaves_stages_out_and_refuses_what_is_none(project, capsys):
    results = runs.run_recipe("sys", {}, skip=["01"])
    assert (results / "00_first.ipynb").exists() and not (results / "01_second.ipynb").exists()
    assert "[1/1] 00_first ..." in capsys.readouterr().out
    with pytest.raises(PerceptError, match="--without 07 names no stage"):
        runs.run_recipe("sys", {}, skip=["01", "07"])


def test_percept_args_and_a_relative_home_are_refused_before_anything_runs(project, monkeypatch):
    for name, value in (("PERCEPT_ARGS", "--number 2"), ("PERCEPT_HOME", "work")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            with pytest.raises(UsageError, match=f"{name} is "):
                runs.run_recipe("sys", {})
    assert not (project / "home").exists()


def add_to_second(project, text):
    """Put a line at the end of the second stage's third cell."""
    notebook = project / "notebooks" / "01_second.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[2].source += f"\n{text}"
    nbformat.write(content, notebook)


def test_a_stage_that_ends_early_is_not_finished(project):
    add_to_second(project, "raise SystemExit(0)")
    with pytest.raises(PerceptError, match="01_second ended before its last cell"):
        runs.run_recipe("sys", {})
    results = project / "home" / "results" / "sys-subj01"
    assert not (results / ".stages" / "01_second.json").exists()
    assert not (results / "01_second.ipynb").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint"', "\xff"])
def test_a_damaged_stamp_is_that_of_a_stage_to_run(tmp_path, damage):
    stamp = tmp_path / ".stages" / "00_first.json"
    stamp.parent.mkdir()
    stamp.write_bytes(damage.encode("latin-1"))
    assert not stages.is_finished(stamp, "x")
    assert stages.read_execution_id(stamp) == stages.read_execution_id(tmp_path / "none")


def record(project, kind):
    """A line that writes down parameters of the second stage, as `Run.record_parameters` does."""
    path = project / "home" / "results" / "sys-subj01" / "parameters" / "01_second.json"
    content = {"subj": {"value": kind, "from": "the environment"}}
    return (
        "import json, pathlib\n"
        f"record = pathlib.Path({str(path)!r})\n"
        "record.parent.mkdir(parents=True, exist_ok=True)\n"
        f"record.write_text(json.dumps({content!r}))"
    )


def test_a_stamp_says_what_the_stage_says(project):
    add_to_second(project, record(project, 3))
    with pytest.raises(PerceptError, match="ran with subj 3, where 1 was asked for .*environment"):
        runs.run_recipe("sys", {"subj": "1", "model_name": "sys-subj01"})
    stamp = project / "home" / "results" / "sys-subj01" / ".stages" / "01_second.json"
    assert not stamp.exists()
    runs.run_recipe("sys", {"subj": "3", "model_name": "sys-subj01"})
    assert json.loads(stamp.read_text())["parameters"] == {"subj": 3}


def test_a_stage_that_refuses_keeps_its_stamp(project, capsys):
    add_to_second(project, record(project, 1))  # after the line that fails on purpose
    runs.run_recipe("sys", {})
    with pytest.raises(PerceptError, match="on purpose"):
        runs.run_recipe("sys", {"fail": "true"})
    capsys.readouterr()
    runs.run_recipe("sys", {})
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_file_or_run_that_a_parameter_names_makes_the_stage_old_when_it_changes(
    project, capsys, tmp_path
):
    notebook = project / "notebooks" / "01_second.ipynb"
    content = nbformat.read(notebook, 4)
    content.cells[1].source += '\nlatents_file = ""  # a file\ntoken_run = ""  # a run'
    nbformat.write(content, notebook)
    file, weights = tmp_path / "latents.npy", project / "home" / "train_logs" / "other" / "w.pt"
    weights.parent.mkdir(parents=True)
    given = {"latents_file": str(file), "token_run": "other"}
    for path in (file, weights):
        for text in ("one", "two!"):
            path.write_text(text)
            capsys.readouterr()
            runs.run_recipe("sys", given)
            assert "01_second ..." in capsys.readouterr().out
    runs.run_recipe("sys", given)
    assert "01_second: finished before" in capsys.readouterr().out


def test_a_right_kernel_is_not_registered_again():
    stages.register_kernel()
    kernel_file = Path(sys.prefix) / "share" / "jupyter" / "kernels" / "percept" / "kernel.json"
    before = kernel_file.stat().st_mtime_ns
    stages.register_kernel()
    assert (
        kernel_file.stat().st_mtime_ns == before
        and "--log-level=ERROR" in json.loads(kernel_file.read_text())["argv"]
    )


def test_a_killed_kernel_is_one_sentence(project):
    with pytest.raises(
        PerceptError, match="Stage 01_second stopped: its Python process was killed"
    ):
        runs.run_recipe("sys", {"die": "true"})
    results = project / "home" / "results" / "sys-subj01"
    assert (results / "01_second.failed.ipynb").exists() and not list(results.glob(".*running*"))


def test_a_run_that_another_process_is_running_is_refused(project, monkeypatch):
    """Another thread of this process stands for it."""
    monkeypatch.setattr(ownership, "GRACE_SECONDS", 0.1)
    stamps = project / "home" / "results" / "sys-subj01" / ".stages"
    refusals = []

    def run_again():
        with pytest.raises(PerceptError) as refusal:
            runs.run_recipe("sys", {})
        refusals.append(str(refusal.value))

    with ownership.lock_folder(stamps, "running sys"):
        thread = threading.Thread(target=run_again)
        thread.start()
        thread.join()
    assert f"is being written by process {os.getpid()} on " in refusals[0]
    assert list(stamps.parent.iterdir()) == [stamps] and not list(stamps.iterdir())


def test_an_executed_notebook_that_cannot_be_written_is_one_sentence(project, monkeypatch):
    def execute_notebook(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)
    with pytest.raises(PerceptError, match=r"00_first.ipynb could not be written: .* filled up"):
        runs.run_recipe("sys", {})


def test_a_file_of_overrides_lies_over_the_recipe_and_under_single_ones(project):
    (project / "more.yaml").write_text("number: 3\nsubj: 2\n")
    results = runs.run_recipe("sys/mini", {"subj": "5"}, files=[str(project / "more.yaml")])
    assert results.name == "sys-mini-subj05" and read_by_second(results) == "read 3"
    (project / "more.yaml").write_text("numbr: 3\n")
    with pytest.raises(PerceptError, match="no parameter 'numbr'.*more.yaml"):
        runs.run_recipe("sys/mini", {}, files=[str(project / "more.yaml")])


def test_refusals(project):
    with pytest.raises(PerceptError, match="no parameter 'numbr'.*did you mean 'number'"):
        runs.run_recipe("sys", {"numbr": "1"})
    with pytest.raises(PerceptError, match="no recipe 'system'.*sys"):
        runs.run_recipe("system", {})
    with pytest.raises(PerceptError, match="must be a whole number"):
        runs.run_recipe("sys", {"subj": "one"})
    with pytest.raises(PerceptError, match="names no stage"):
        runs.run_recipe("sys", {}, first="07")


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["download", "--help"]])
def test_what_needs_no_network_does_not_import_torch(arguments):
    script = (
        "import sys, run\n"
        "try:\n"
        "    run.main(sys.argv[1:])\n"
        "except SystemExit:\n"  # --help
        "    pass\n"
        "slow = {'torch', 'transformers', 'diffusers', 'h5py', 'pandas', 'papermill', 'boto3'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_list_shows_recipes_stages_and_cost():
    done = command("list")
    assert done.returncode == 0 and "mindeye  (also --mini)" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "01_train_high_level" in line)
    assert "H200" in line and "mini" in line
