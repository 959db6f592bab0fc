"""YAML of users: what is unclear is refused, in one sentence that names the file."""

import math
import time

import pytest

from src import parameters
from src.files.yaml_files import MAX_BYTES, MAX_ENTRIES, UnclearNumber, parse_yaml, read_yaml
from src.parameters import Parameter, coerce
from src.utils import PerceptError

BOMB = "dataset: [" + ", ".join(
    ["&a [" + ",".join("x" * 10) + "]"]
    + [f"&{chr(98 + i)} [" + ",".join(["*" + chr(97 + i)] * 10) + "]" for i in range(9)]
)

REFUSED = {
    "a name twice": (b"seed: 1\nseed: 2\n", "gives 'seed' twice, the second time in line 2"),
    "a name twice below": (b"a: {b: 1, b: 2}\n", "gives 'b' twice"),
    "Latin-1": ("# Grüße\nseed: 1\n".encode("latin-1"), "line 1 has the byte 0xfc"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("seed: 1\n".encode("utf-16-le"), "UTF-16"),
    "aliases": (f"{BOMB}]\n".encode(), "'dataset' in .* stands for 12,345,679,011 entries"),
    "an alias to itself": (b"a: &a [*a]\n", "'a' in .* stands for endlessly many"),
    "too many entries": (b"a: [" + b"1," * (MAX_ENTRIES + 1) + b"]", "'a' in .* 20,002 entries"),
    "too long": (b"# " + b"x" * MAX_BYTES, "larger than 128 KiB"),
    "too deep": (b"[" * 5000, "nested too deep"),
    "a tab": (b"a:\n\tb: 1\n", "not valid YAML"),
    "a control character": (b"a: \x07\n", "not valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "not valid YAML"),
    "an open quote": (b"a: 'x\n", "not valid YAML"),
    "an unknown alias": (b"a: *b\n", "not valid YAML"),
    "a tag that runs code": (b"a: !!python/object/apply:os.system [x]\n", "has the tag"),
    "a tag": (b"a: !x 1\n", "Line 1 of .* has the tag !x"),
    "a wrong tag": (b"a: !!bool maybe\n", "has the tag"),
    "a list as a name": (b"[a]: 1\n", "list or mapping where a name should be"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unclear_files_are_refused(kind, tmp_path):
    content, message = REFUSED[kind]
    (tmp_path / "r.yaml").write_bytes(content)
    start_time = time.monotonic()
    with pytest.raises(PerceptError, match=message) as caught:
        read_yaml(tmp_path / "r.yaml")
    text = str(caught.value)
    assert "r.yaml" in text and "\n" not in text and len(text) < 700
    assert time.monotonic() - start_time < 20


def test_files_that_cannot_be_opened_have_their_own_sentence(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name, message in {"folder.yaml": "is a folder", "link.yaml": "is a link to"}.items():
        with pytest.raises(PerceptError, match=message):
            read_yaml(tmp_path / name)


def test_a_mark_of_utf_8_is_no_content(tmp_path):
    (tmp_path / "r.yaml").write_bytes("é: 1\n".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "r.yaml") == {"é": 1}


def test_values_are_read_as_they_look():
    text = "a: 1\nb: -2.5\nc: 1.0e-3\nd: yes\ne: no\nf: ~\ng: 2024-01-01\nh: [x, {1: y}]\ni: 1e3\n"
    expected = {"a": 1, "b": -2.5, "c": 1e-3, "d": True, "e": False, "f": None, "g": "2024-01-01"}
    assert parse_yaml(text, "it") == expected | {"h": ["x", {"1": "y"}], "i": "1e3"}
    assert parse_yaml("", "it") is None and parse_yaml("- 1", "it") == [1]
    assert parse_yaml("{a: .inf, b: -.inf}", "it") == {"a": math.inf, "b": -math.inf}
    assert parse_yaml("a: &x 3\nb: *x\n", "it") == {"a": 3, "b": 3}


@pytest.mark.parametrize("text", ["010", "0x10", "0b1", "1:30", "190:20:30.15", "1_000", "1_0.5"])
def test_a_number_that_is_not_in_decimals_is_text_and_no_number(text):
    value = parse_yaml(f"a: {text}", "it")["a"]
    assert isinstance(value, UnclearNumber) and value == text
    assert coerce(Parameter("name", "", ""), value, "r.yaml") == text
    for default in (1, 1.0):
        with pytest.raises(PerceptError, match=f"'size' from r.yaml is '{text}', but must be a"):
            coerce(Parameter("size", default, ""), value, "r.yaml")


@pytest.mark.parametrize("text", ["1.10", "1.0e+3", "-0.50", "007", "+5"])
def test_a_text_keeps_how_a_number_was_written(text, tmp_path):
    (tmp_path / "r.yaml").write_text(f"label: {text}\n")
    value = parameters.read_recipe(tmp_path / "r.yaml")["label"]
    written = coerce(Parameter("label", "", ""), value, "r.yaml")
    assert written == text.removeprefix("+") if text == "+5" else written == text
    assert type(written) is str


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1.0e+999", "'inf'", "nan"])
def test_a_learning_rate_is_finite(text):
    value = parse_yaml(f"max_lr: {text}", "it")["max_lr"]
    with pytest.raises(PerceptError, match="'max_lr' from r.yaml is .* must be a number, finite"):
        coerce(Parameter("max_lr", 3e-4, "more than 0"), value, "r.yaml")


@pytest.mark.parametrize("text", ["9" * 30, "9" * 5000, str(2**63), "1e30", "nan", "inf", "1.5"])
def test_a_whole_number_has_at_most_64_bits(text):
    with pytest.raises(PerceptError, match="must be a whole number") as caught:
        coerce(Parameter("h", 1, ""), text, "-p")
    assert len(str(caught.value)) < 400
    assert coerce(Parameter("h", 1, ""), str(2**63 - 1), "-p") == 2**63 - 1


@pytest.mark.parametrize("text", ["-1", "4294967296", "1099511627776"])
def test_a_seed_has_32_bits(text):
    with pytest.raises(PerceptError, match=f"'seed' from -p is {text}, but must be at least 0"):
        coerce(Parameter("seed", 0, ""), text, "-p")
    assert coerce(Parameter("seed", 0, ""), "4294967295", "-p") == 2**32 - 1
