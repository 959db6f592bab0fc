"""Readers: one module for each source format, with `read(source, dataset, subj, **options)`.

A reader parses a source into a `Recording`, which `store_recording` writes into the prepared layout
of `src.data`; TERMS of its module says under which terms the data may be used. Writers of the
formats are in `src.miniworld.formats`: the mini world is written in any of them, and tests read
what they wrote. To add a format, add a module with `read` and `TERMS` and name it in READERS.
"""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from src.data.files import exclusive_lock
from src.data.layout import subject_folder
from src.parameters import check_parameter_names
from src.readers import algonauts, bold5000, digits69, god, mindeye, mindeye2, npz, nsd, things
from src.readers.recording import Recording, RowBlocks, store_recording
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
    "Recording",
    "RowBlocks",
    "algonauts",
    "bold5000",
    "default_options",
    "digits69",
    "god",
    "mindeye",
    "mindeye2",
    "npz",
    "nsd",
    "parse_options",
    "prepare_if_missing",
    "read_source",
    "store_recording",
    "things",
]


def default_options(source: str) -> dict[str, Any]:
    """The options of a source's reader and their defaults.

    Raises:
        PerceptError: for a source without a reader.
    """
    if source not in READERS:
        raise PerceptError(f"There is no reader of '{source}': choose one of {', '.join(READERS)}.")
    parameters = inspect.signature(READERS[source].read).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def parse_options(source: str, options: str, **common: Any) -> dict[str, Any]:
    """Parse the options that a source's reader is called with.

    Args:
        source: name of the reader.
        options: YAML mapping of options, e.g. "{protocol: nsd-982, rois: 'V1v,V1d'}".
        common: options that many readers have; those that this one does not have are left out.

    Returns:
        The options by name; those of the text go before the common ones.

    Raises:
        PerceptError: for text that is no mapping, an option that the reader does not have, or a
            value of another type.
    """
    defaults = default_options(source)
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
            f" {', '.join(defaults)}."
        )
    check_parameter_names(chosen, defaults, f"options for {source}")
    for name, value in chosen.items():
        if not _has_type_of(value, defaults[name]):
            raise PerceptError(
                f"Option {name} of {source} is {value!r}: it must be of the type of its default"
                f" {defaults[name]!r}."
            )
    applicable = {name: value for name, value in common.items() if name in defaults}
    return applicable | chosen


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether a value is of the type of a default; None is of any, a float may be an int."""
    if default is None or isinstance(value, type(default)):
        return True
    return isinstance(default, float) and isinstance(value, int)


def prepare_if_missing(
    source: str, data_path: str, dataset: str, subj: int, options: str = "", **common: Any
) -> None:
    """Read a subject that is not prepared yet, for whoever begins with a later notebook.

    Nothing happens without a `data_path`, or when the subject is prepared. Of several processes one
    reads, and the others wait for it.

    Args:
        source: name of the reader.
        data_path: where the source's files lie, absolute or relative to the repository; "" for
            none.
        dataset: name of the prepared dataset.
        subj: number of the subject.
        options, common: see `parse_options`.
    """
    folder = subject_folder(dataset, subj)
    if not data_path or folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.parent / f".subj{subj:02d}.lock"):
        if not folder.exists():
            read_source(source, resolve(data_path), dataset, subj, options, **common)


def read_source(
    source: str,
    data_path: str | Path,
    dataset: str | Path,
    subj: int,
    options: str = "",
    **common: Any,
) -> Path:
    """Read one subject of a source into the prepared layout.

    Args:
        source: name of the reader.
        data_path: where the source's files lie.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        options, common: see `parse_options`.

    Returns:
        The folder of the subject.
    """
    reader_options = parse_options(source, options, **common)
    return READERS[source].read(data_path, dataset, subj, **reader_options)
