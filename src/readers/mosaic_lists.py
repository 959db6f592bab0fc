"""MOSAIC's lists of stimuli: which pictures train, test, or are artificial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.files.foreign import read_errors
from src.utils import PerceptError, require_file

SEPARATOR = "_stimulus-"


def list_stimuli(path: Path, owner: str) -> set[str]:
    """File names of a subject's pictures in a list.

    The list is JSON: objects (in a list, or one) whose keys are sub-01_NSD_stimulus-<file name>.

    Args:
        path: the list.
        owner: sub-01_NSD, whose pictures are returned.

    Raises:
        PerceptError: if it is missing, of another form, or names none of this subject.
    """
    require_file(path, "a list of stimuli")
    with read_errors(path):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    entries = content if isinstance(content, list) else [content]
    keys = [key for entry in entries if isinstance(entry, dict) for key in entry]
    keys += [entry for entry in entries if isinstance(entry, str)]
    start = f"{owner}{SEPARATOR}"
    names = {key.removeprefix(start) for key in keys if key.startswith(start)}
    if not names:
        raise PerceptError(
            f"{path} names no stimulus {start}...: give the list that holds this subject, as MOSAIC"
            " publishes it."
        )
    return names
