"""Readers: one module for each source format, with `read(source, dataset, subj, **options)` and
`write(...)`.

`read` turns a source into the prepared layout of `src.data` and returns the folder of the subject;
`write` makes the source format from arrays (the mini world is written in any of the formats, and
tests read what they wrote); `TERMS` says under which terms the data may be used. To add a format,
add a module with these three and name it here.
"""

import fcntl
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from src.data.layout import subject_folder
from src.parameters import check_parameter_names
from src.readers import algonauts, bold5000, digits69, god, mindeye, mindeye2, npz, nsd, things
from src.utils import PerceptError, resolve

READERS: dict[str, ModuleType] = {
    "mindeye": mindeye,
    "mindeye2": mindeye2,
    "nsd": nsd,
    "algonauts": algonauts,
    "bold5000": bold5000,
    "god": god,
    "things": things,
    "digits69": digits69,
    "npz": npz,
}

__all__ = [
    "READERS",
    "digits69",
    "mindeye",
    "npz",
    "default_options",
    "read_source",
    "prepare_if_missing",
    "parse_options",
]


def default_options(source: str) -> dict[str, Any]:
    """The options of a source's reader and their defaults.

    Raises:
        PerceptError: for a source without a reader.
    """
    if source not in READERS:
        raise PerceptError(f"There is no reader of '{source}': choose one of {', '.join(READERS)}.")
    return {
        name: p.default
        for name, p in inspect.signature(READERS[source].read).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }


def parse_options(source: str, options: str, **given: Any) -> dict[str, Any]:
    """What a source's reader is called with.

    Args:
        source: name of the reader.
        options: YAML mapping of options, e.g. "{protocol: nsd-982, rois: 'V1v,V1d'}".
        given: options that many readers have; those that this one does not have are left out.

    Raises:
        PerceptError: for text that is no mapping, an option that the reader does not have, or a
            value of another type.
    """
    known = default_options(source)
    try:
        chosen = yaml.safe_load(options) or {}
    except yaml.YAMLError as error:
        raise PerceptError(
            f"options is {options!r}, which is not YAML ({error}): write it as {{name: value,"
            " ...}."
        ) from error
    if not isinstance(chosen, dict):
        raise PerceptError(
            f"options is {options!r}: write it as {{name: value, ...}}; {source} knows"
            f" {', '.join(known)}."
        )
    check_parameter_names(chosen, known, f"options for {source}")
    for name, value in chosen.items():
        wanted = type(known[name])
        if (
            known[name] is not None
            and not isinstance(value, wanted)
            and not (wanted is float and isinstance(value, int))
        ):
            raise PerceptError(
                f"Option {name} of {source} is {value!r}: it must be of the type of its default"
                f" {known[name]!r}."
            )
    return {name: value for name, value in given.items() if name in known} | chosen


def prepare_if_missing(
    source: str, data_path: str, dataset: str, subj: int, options: str = "", **given: Any
) -> None:
    """`read_source` for whoever begins with a later notebook: nothing happens without a `data_path`, or
    when the subject is prepared.

    Args:
        source: name of the reader.
        data_path: where the source's files lie, absolute or relative to the repository; "" for
            none.
        dataset: name of the prepared dataset.
        subj: number of the subject.
        options, given: see `parse_options`.
    """
    folder = subject_folder(dataset, subj)
    if not data_path or folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".subj{subj:02d}.lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # of several processes, one reads and the others find it done
        if not folder.exists():
            read_source(source, resolve(data_path), dataset, subj, options, **given)


def read_source(
    source: str,
    data_path: str | Path,
    dataset: str | Path,
    subj: int,
    options: str = "",
    **given: Any,
) -> Path:
    """Read one subject of a source into the prepared layout.

    Args:
        source: name of the reader.
        data_path: where the source's files lie.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        options, given: see `parse_options`.

    Returns:
        The folder of the subject.
    """
    return READERS[source].read(data_path, dataset, subj, **parse_options(source, options, **given))
