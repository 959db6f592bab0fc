"""Networks are loaded whole or not at all.

`from_pretrained` fills what a file lacks with random numbers and passes over what it has beside.
Both are refused here, but for names that are known to be harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from src.utils import PerceptError

# buffers that older versions of transformers stored and that are computed now
HARMLESS = r"(?:^|.*\.)position_ids"

SHOWN_KEYS = 3


def load_whole(
    cls: Any, location: str, unused: str = "", unfilled: str = "", **options: Any
) -> Any:
    """`cls.from_pretrained` of a network, with all weights of the file and no others.

    Args:
        cls: a network's class of transformers or diffusers.
        location: hub id or folder.
        unused: regular expression for keys of the file that belong to another network in it.
        unfilled: regular expression for keys of the network that are never run, and may be missing.
        options: of `from_pretrained`.

    Raises:
        PerceptError: naming weights that are missing, left over, or of another shape.
    """
    network, report = cls.from_pretrained(location, output_loading_info=True, **options)
    check_report(report, f"{cls.__name__} of '{location}'", unused, unfilled)
    return network


def is_network(cls: Any) -> bool:
    """Whether a class of the libraries is a network, of whose loading they report."""
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def check_report(
    report: Mapping[str, Any], name: str, unused: str = "", unfilled: str = ""
) -> None:
    """Refuse what the libraries report of loading a network.

    Args:
        report: "missing_keys", "unexpected_keys" and "mismatched_keys".
        name: of the network, for the message.
        unused, unfilled: as `load_whole`.

    Raises:
        PerceptError: see `load_whole`.
    """
    missing = _drop_matching(report.get("missing_keys", ()), unfilled)
    left_over = _drop_matching(report.get("unexpected_keys", ()), f"{HARMLESS}|{unused}")
    different = [str(key) for key in report.get("mismatched_keys", ())]
    complaints = [
        f"{verb} {_list_keys(keys)}"
        for verb, keys in (
            ("lack", missing),
            ("hold beside", left_over),
            ("have another shape in", different),
        )
        if keys
    ]
    if complaints:
        raise PerceptError(
            f"The weights of {name} {' and '.join(complaints)}: the file is of another model, or of"
            " another version of the library; fetch it again, and install the versions of"
            " requirements.lock."
        )


def check_filled(network: nn.Module, name: str) -> None:
    """Refuse a network of which some weights were never read.

    Raises:
        PerceptError: naming them.
    """
    missing = [key for key, weight in network.state_dict().items() if weight.is_meta]
    check_report({"missing_keys": missing}, name)


def _drop_matching(keys: Iterable[str], pattern: str) -> list[str]:
    """Keys that a regular expression does not describe, "" describing none, in order."""
    return sorted(key for key in keys if not pattern or not re.fullmatch(pattern, key))


def _list_keys(keys: list[str]) -> str:
    """Some keys, and how many more."""
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more
