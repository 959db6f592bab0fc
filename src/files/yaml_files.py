"""Reading YAML that users write: recipes, grids of sweeps, options. What is unclear is refused.

YAML 1.1, which PyYAML reads, takes a name that is given twice without a word, reads 010 as 8 and
1:30 as 90, makes dates of texts, and lets 500 bytes stand for millions of entries. Here

- a name that is given twice is refused,
- a number that is not written in plain decimals stays text (`UnclearNumber`), which a parameter
  that is a number refuses,
- a number in decimals remembers how it was written (`WrittenFloat`), for a parameter that is a
  text: 1.10 stays 1.10,
- dates, merges (<<) and tags have no meaning, and size, entries and depth are limited.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from src.files.errors import UsageError
from src.files.foreign import read_errors, shorten

MAX_BYTES = 2**17  # of a file; recipes have some hundred

MAX_ENTRIES = 20_000  # of a file, those that aliases stand for included

PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9]\d{0,19})")

PLAIN_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?")

INFINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on"), ("false", "no", "off")

TAG = "tag:yaml.org,2002:"


class UnclearNumber(str):
    """A number that YAML 1.1 reads otherwise than it looks: 010, 0x10, 1:30, 1_000."""


class WrittenFloat(float):
    """A number that remembers how it was written.

    Attributes:
        text: as it stands in the file, e.g. "1.10".
    """

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Read a number in decimals."""
        number = super().__new__(cls, text)
        number.text = text
        return number


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, less dates, merges and the value sign =."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.removeprefix(TAG) in ("bool", "int", "float", "null")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file: a mapping, list, text, number, True, False or None.

    Raises:
        UsageError: if it is longer than MAX_BYTES, not in UTF-8, or as `parse_yaml`.
        PerceptError: if it cannot be read.
    """
    path = Path(path)
    with read_errors(path, "write it again"), open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UsageError(
            f"{path} is larger than {MAX_BYTES // 1024} KiB: it is no file of settings."
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise UsageError(f"{path} is in UTF-16 or no text at all: save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")  # the mark that some editors put first is no content
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path} is not in UTF-8 (line {line} has the byte 0x{content[error.start]:02x}): save"
            " it as UTF-8."
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Parse a YAML text: a mapping, list, text, number, True, False or None.

    Args:
        text: one document; of numbers see `UnclearNumber` and `WrittenFloat`.
        origin: what it is called in a message.

    Raises:
        UsageError: if it is not YAML, gives a name twice, has a name that is a list or mapping, has
            a tag, or stands for more than MAX_ENTRIES entries.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return None
        _check_size(root, origin)
        return _convert(root, origin)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{origin} is not valid YAML: {shorten(error, 300)}.") from error
    except RecursionError as error:
        raise UsageError(f"{origin} is nested too deep: write it flat.") from error


# -------------------------------------------------------------------------------- size with aliases
def _check_size(root: yaml.Node, origin: str) -> None:
    """Refuse a document that stands for too many entries, naming the entry of the top level."""
    counts: dict[int, float] = {}
    entries = root.value if isinstance(root, yaml.MappingNode) else [(root, root)]
    total = 0.0
    for name, value in entries:
        count = _count_entries(value, counts)
        total += count
        if total > MAX_ENTRIES:
            subject = f"'{name.value}' in {origin}" if value is not root else origin
            number = f"{count:,.0f}" if count < float("inf") else "endlessly many"
            raise UsageError(
                f"{subject} stands for {number} entries, those of its aliases (& and *) included,"
                f" and a file may hold {MAX_ENTRIES:,}: write out what it needs."
            )


def _count_entries(node: yaml.Node, counts: dict[int, float]) -> float:
    """Number of entries that a node stands for, infinite for one that contains itself.

    Args:
        node: of the document.
        counts: those that are known, by `id` of the node.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1.0
    if id(node) not in counts:
        counts[id(node)] = float("inf")  # while it is counted: an alias to itself
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1.0 + sum(_count_entries(child, counts) for child in children)
    return counts[id(node)]


# --------------------------------------------------------------------------------------- conversion
def _convert(node: yaml.Node, origin: str) -> Any:
    kind = node.tag.removeprefix(TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_convert(child, origin) for child in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _convert_mapping(node, origin)
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
        if kind != "bool" or node.value.lower() in (*TRUE_WORDS, *FALSE_WORDS):
            return _convert_scalar(kind, node.value)
    raise UsageError(
        f"Line {node.start_mark.line + 1} of {origin} has the tag {node.tag}, which means nothing"
        " here: leave it out."
    )


def _convert_mapping(node: yaml.MappingNode, origin: str) -> dict[str, Any]:
    """A mapping; its names are texts, as they are written."""
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(
                f"Line {line} of {origin} has a list or mapping where a name should be: write lines"
                " `name: value`."
            )
        if key.value in mapping:
            raise UsageError(
                f"{origin} gives '{key.value}' twice, the second time in line {line}: leave one"
                " out."
            )
        mapping[key.value] = _convert(value, origin)
    return mapping


def _convert_scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in TRUE_WORDS
    if kind == "int":
        return int(text) if PLAIN_INTEGER.fullmatch(text) else UnclearNumber(text)
    if kind == "float" and text.lower() in INFINITE:
        return float(INFINITE[text.lower()])
    if kind == "float":
        return WrittenFloat(text) if PLAIN_FLOAT.fullmatch(text) else UnclearNumber(text)
    return text
