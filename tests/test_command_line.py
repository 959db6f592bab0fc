"""Command lines: one sentence and exit code 2 for what cannot be used, and values with a dash."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from src import parameters
from src.command_line import CommandLine, split_command
from src.pipeline import grid, stages
from src.utils import ROOT, PerceptError, UsageError

SCOPE = {"recipe": "mindeye/mini"}


@pytest.fixture
def make_parser():
    parser = CommandLine("it.py")
    parser.add_pairs("a parameter")
    parser.add_argument("name", nargs="?")
    parser.add_argument("-f", dest="files", action="append", default=[])
    parser.add_argument("--rois")
    parser.add_argument("--prior", nargs="?", const=True)
    parser.add_argument("--force", action="store_true")
    return parser


def test_a_value_may_begin_with_a_dash(make_parser):
    parsed = make_parser.parse_args(
        ["x", "-p", "rois", "-;V1", "--rois", "-1e-4", "-f", "-a.yaml", "-p", "b", "-1", "--force"]
    )
    assert parsed.pairs == [("rois", "-;V1"), ("b", "-1")]
    assert (parsed.name, parsed.rois, parsed.files, parsed.force) == (
        "x",
        "-1e-4",
        ["-a.yaml"],
        True,
    )
    assert make_parser.parse_args(["--rois="]).rois == ""
    assert make_parser.parse_args(["--rois", ""]).rois == ""
    assert make_parser.parse_args(["--prior", "False"]).prior == "False"
    assert make_parser.parse_args([]).pairs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p"], "-p takes a NAME and a VALUE"),
        (["-p", "seed"], "-p seed has no value"),
        (["-p", "seed", "--force"], "-p seed has no value"),
        (["-p", "-p", "seed"], "-p takes a NAME and a VALUE"),
        (["--rois"], "--rois has no value"),
        (["--rois", "--force"], "--rois has no value"),
        (["--rois", "--rois=x"], "--rois has no value"),
        (["-f"], "-f has no value"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--wrong", "1"], "unrecognized arguments"),
    ],
)
def test_what_lacks_is_one_sentence(make_parser, arguments, message):
    with pytest.raises(UsageError, match=f"^{message}.*; `it.py --help` lists") as caught:
        make_parser.parse_args(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["--model_name 'abc", '--rois "a', "a\\"])
def test_quotes_are_closed_wherever_commands_are_split(text, monkeypatch):
    with pytest.raises(UsageError, match="^it is .*close every quote"):
        split_command(text, "it")
    with pytest.raises(UsageError, match="^--launch is "):
        stages.parse_launcher(text)
    with pytest.raises(UsageError, match="^launch is "):
        grid.missing_requirement(text)
    monkeypatch.setenv("PERCEPT_ARGS", text)
    with pytest.raises(UsageError, match="^PERCEPT_ARGS is "):
        parameters.configure(dict(SCOPE), "06_metrics")


def test_a_config_of_a_launcher_is_read_before_it_is_used(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError, match="bad.yaml is not valid YAML"):
        stages.parse_launcher(str(tmp_path / "bad.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="there is no file"):
        stages.parse_launcher(str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p seed", "PERCEPT_ARGS: -p seed has no value"),
        ("--seed", "PERCEPT_ARGS: --seed has no value"),
        ("--seed --subj 1", "PERCEPT_ARGS: --seed has no value"),
        ("--seed=-1", "'seed' from PERCEPT_ARGS is -1"),
        ("--seed -1", "'seed' from PERCEPT_ARGS is -1"),
        ("-p seed 1099511627776", "'seed' from PERCEPT_ARGS is 1099511627776"),
        ("--blend -1e-4", "'blend' from PERCEPT_ARGS is -0.0001, but must be at least 0"),
        ("--blend inf", "'blend' from PERCEPT_ARGS is 'inf', but must be a number, finite"),
        ("-p subj 1 x", "PERCEPT_ARGS has 'x', which is not a flag"),
        ("-f nowhere.yaml", "There is no recipe file"),
    ],
)
def test_percept_args_in_a_kernel(arguments, message, monkeypatch):
    monkeypatch.setenv("PERCEPT_ARGS", arguments)
    with pytest.raises(UsageError, match=message) as caught:
        parameters.configure(dict(SCOPE), "06_metrics")
    assert caught.value._render_traceback_() == [f"PerceptError: {caught.value}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: recipe"),
        (["mindeye", "-p", "seed"], "-p seed has no value"),
        (["mindeye", "--to"], "--to has no value"),
        (["mindeye", "--launch", "python -c 'x"], "--launch is "),
        (["mindeye", "--dry-run", "-p", "max_lr", "-1e-4"], "'max_lr' from -p is -0.0001"),
        (["mindeye", "--dry-run", "-p", "seed", "4294967296"], "'seed' from -p is 4294967296"),
        (["mindeye", "--dry-run", "-p", "model_name", ".."], "model_name is '..'"),
        (["mindeye", "--dry-run", "--to", "99"], "--to 99 names no stage"),
        (["no_such"], "There is no recipe 'no_such'"),
        (["sweep"], "required: grid"),
        (["sweep", "x.yaml", "--jobs", "many"], "--jobs: invalid int value"),
        (["sweep", "x.yaml"], "There is no grid file"),
        (["download"], "required: name"),
        (["download", "mindy"], "Nothing is known to download for 'mindy'"),
        (["download", "../x"], "The id of a model on the hub is '../x'"),
    ],
)
def test_run_py_refuses_its_command_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        run.main(arguments)
    assert "\n" not in str(caught.value)


def start(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_the_exit_code_is_2_and_nothing_but_the_sentence_is_said(tmp_path):
    done = start("run.py", "mindeye", "-p", "seed", PERCEPT_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "run.py: -p seed has no value; `run.py --help` lists what can be given.\n"


def test_a_script_ends_with_2_as_well(tmp_path):
    cell = (
        'recipe = ""  # a\nmodel_name = ""  # b\nrois = ""  # c\nmax_lr = 1.0  # d, more than 0\n'
    )
    code = "from src.parameters import configure\nrun = configure(globals(), '01_x')\nprint(rois)\n"
    script = tmp_path / "01_x.py"
    script.write_text(f'# %% tags=["parameters"]\n{cell}\n# %%\n{code}')
    home = {"PERCEPT_HOME": str(tmp_path)}
    for arguments in (["--max_lr", "-1e-4"], ["-p", "rois"], ["--recipe", "none"]):
        done = start(str(script), *arguments, **home)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = start(str(script), "--rois", "-;V1,V2", **home)
    assert done.returncode == 0 and done.stdout.strip() == "-;V1,V2", done.stderr


# ----------------------------------------------------------------------------------- papermill
def inject(monkeypatch, command, **values):
    """Configure a stage as in a kernel that papermill started with a command line."""
    if command is not None:
        monkeypatch.setenv("JPY_PARENT_PID", "12345")
        process = SimpleNamespace(cmdline=lambda: command)
        monkeypatch.setattr("psutil.Process", lambda number: process)
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    definitions = parameters.parse_parameters('label = ""  # a text\nsubj = 1  # a number\n')
    return parameters._read_injected({"In": [cell], **values}, definitions)


@pytest.mark.parametrize(
    ("typed", "value"),
    [("007", 7), ("1e3", 1000.0), ("1_000", 1000), ("True", True), ("None", None)],
)
def test_a_text_that_papermill_took_for_a_number_is_restored(typed, value, monkeypatch):
    command = ["python", "/venv/bin/papermill", "a.ipynb", "b.ipynb", "-p", "subj", "2"]
    command += ["-p", "label", "no", "--parameters", "label", typed]
    assert inject(monkeypatch, command, subj=2, label=value) == {"subj": 2, "label": typed}


def test_a_number_for_a_text_that_cannot_be_restored_is_refused(monkeypatch):
    message = "'label' from papermill is 1000.0, but must be a text.*-r label VALUE"
    for command in (["python", "-m", "pytest", "-p", "label", "x"], None):
        monkeypatch.setenv("JPY_PARENT_PID", "")
        with pytest.raises(UsageError, match=message):
            inject(monkeypatch, command, label=1000.0)
    assert inject(monkeypatch, None, label="007", subj=1) == {"label": "007", "subj": 1}


@pytest.mark.slow(reason="starts papermill and a kernel")
def test_papermill_itself_gives_the_text_that_was_typed(tmp_path):
    import nbformat

    source = 'recipe = ""  # a\nmodel_name = ""  # b\nlabel = ""  # c\n'
    code = (
        "from src import parameters\nfrom pathlib import Path\nparameters.NOTEBOOKS = Path('.')\n"
    )
    code += "run = parameters.configure(globals(), '01_x')\nprint('VALUE', label, run.name)\n"
    cells = [
        nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "01_x.ipynb")
    command = [sys.executable, "-m", "papermill", "01_x.ipynb", "out.ipynb"]
    command += ["-p", "label", "007", "-p", "model_name", "1e3"]
    home = {"PERCEPT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    home["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | home, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "VALUE 007 1e3" in (tmp_path / "out.ipynb").read_text()


def test_errors_of_a_stage_are_told_by_their_sentence():
    assert issubclass(UsageError, PerceptError)
    assert UsageError("x")._render_traceback_() == ["PerceptError: x"]
