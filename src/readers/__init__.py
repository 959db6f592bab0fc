"""Readers: one module for each source format, with `read(source, dataset, subj, **options)`.

A reader parses a source into a `Recording`, which `store_recording` writes into the prepared layout
of `src.data`; TERMS of its module says under which terms the data may be used. Writers of the
formats are in `src.miniworld.formats`: the mini world is written in any of them, and tests read
what they wrote. To add a format, add a module with `read` and `TERMS` and name it in READERS.
"""

import inspect
import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from src.data.identity import (
    Preparation,
    explain_difference,
    find_changed_files,
    preparing,
    read_preparation,
    survey_files,
)
from src.data.layout import dataset_folder, subject_folder
from src.data.subject import Subject
from src.files.ownership import lock_folder
from src.files.yaml_files import UnclearNumber, parse_yaml
from src.parameters import check_parameter_names
from src.readers import (
    algonauts,
    bids,
    bold5000,
    digits69,
    god,
    laion_fmri,
    mindeye,
    mindeye2,
    mosaic,
    npz,
    nsd,
    nsd_imagery,
    nsd_synthetic,
    things,
)
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import SEEDS, PerceptError, UsageError, resolve

READERS: dict[str, ModuleType] = {
    "mindeye": mindeye,
    "mindeye2": mindeye2,
    "nsd": nsd,
    "algonauts": algonauts,
    "bold5000": bold5000,
    "god": god,
    "things": things,
    "bids": bids,
    "laion_fmri": laion_fmri,
    "mosaic": mosaic,
    "nsd_synthetic": nsd_synthetic,
    "nsd_imagery": nsd_imagery,
    "digits69": digits69,
    "npz": npz,
}

__all__ = [
    "READERS",
    "Recording",
    "RowBlocks",
    "algonauts",
    "bids",
    "bold5000",
    "check_protocol",
    "default_options",
    "describe_preparation",
    "digits69",
    "god",
    "laion_fmri",
    "mindeye",
    "mindeye2",
    "mosaic",
    "needs_preparing",
    "npz",
    "nsd",
    "nsd_imagery",
    "nsd_synthetic",
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
        UsageError: for text that is no mapping, an option that the reader does not have, or a
            value of another type.
    """
    defaults = default_options(source)
    shortened = repr(options if len(options) <= 200 else f"{options[:200]}...")
    try:
        chosen = parse_yaml(options, "it") or {}
    except UsageError as error:
        raise UsageError(
            f"options is {shortened}, which is not YAML that can be used"
            f" ({str(error).rstrip('.')}): write it as {{name: value, ...}}."
        ) from error
    if not isinstance(chosen, dict):
        raise UsageError(
            f"options is {shortened}: write it as {{name: value, ...}}; {source} knows"
            f" {', '.join(defaults)}."
        )
    check_parameter_names(chosen, defaults, f"options for {source}")
    for name, value in chosen.items():
        if not _has_type_of(value, defaults[name]):
            raise UsageError(
                f"Option {name} of {source} is {repr(value)[:100]}: it must be of the type of its"
                f" default {defaults[name]!r}."
            )
        if name == "seed" and value not in SEEDS:
            raise UsageError(f"Option seed of {source} is {value}: choose 0 to {SEEDS[-1]}.")
    applicable = {name: value for name, value in common.items() if name in defaults}
    return applicable | chosen


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether a value is of the type of a default; None is of any, a float may be an int.

    A number is finite, and written in decimals.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if default is None:
        return True
    if isinstance(value, UnclearNumber) or isinstance(value, bool) != isinstance(default, bool):
        return False
    return isinstance(value, type(default) | int if isinstance(default, float) else type(default))


def describe_preparation(
    source: str,
    data_path: str | Path,
    options: str = "",
    world: dict[str, Any] | None = None,
    **common: Any,
) -> Preparation:
    """What is asked for when a source is to be prepared.

    Args:
        source: name of the reader.
        data_path: where the source's files lie.
        options, common: see `parse_options`.
        world: size of the mini world, where that is simulated and written in this format.
    """
    defaults = default_options(source)
    chosen = parse_options(source, options, **common)
    for name in getattr(READERS[source], "REQUIREMENTS", ()):
        chosen.pop(name, None)
    changed = {name: value for name, value in chosen.items() if value != defaults[name]}
    as_stored = json.loads(json.dumps(changed, default=str))
    return Preparation(source, str(data_path), as_stored, world or {})


def needs_preparing(
    requested: Preparation, dataset: str | Path, subj: int, overwrite: bool = False
) -> bool:
    """Whether a subject has to be prepared: it is not there, or is to be overwritten.

    Raises:
        PerceptError: if it is there, but prepared in another way than is asked for, or from files
            that have changed since; both are named.
    """
    folder = subject_folder(dataset, subj)
    if overwrite or not folder.exists():
        return True
    if difference := explain_difference(read_preparation(folder), requested, subj):
        raise PerceptError(
            f"{folder} holds other data than are asked for: {difference}. Set overwrite to True"
            " (-p overwrite True) to prepare them again, or choose another dataset."
        )
    return False


def prepare_if_missing(
    source: str, data_path: str, dataset: str, subj: int, options: str = "", **common: Any
) -> None:
    """Read a subject that is not prepared yet, for whoever begins with a later notebook.

    Nothing is read without a `data_path`, or when the subject is prepared. Of several processes one
    reads, and the others wait for it.

    Args:
        source: name of the reader.
        data_path: where the source's files lie, absolute or relative to the repository; "" for
            none.
        dataset: name of the prepared dataset.
        subj: number of the subject.
        options, common: see `parse_options`.

    Raises:
        PerceptError: if the subject is prepared, but from other files than those of `data_path`, or
            with another protocol than is asked for.
    """
    folder = subject_folder(dataset, subj)
    if folder.exists():
        _check_same_source(folder, resolve(data_path) if data_path else None, subj)
        return
    if not data_path:
        return
    with lock_folder(folder, f"preparing {folder.name}", wait=True, as_sibling=True):
        if not folder.exists():
            read_source(source, resolve(data_path), dataset, subj, options, **common)


def _check_same_source(folder: Path, data_path: Path | None, subj: int) -> None:
    """Refuse prepared data that were read from other files than those of a path."""
    prepared = read_preparation(folder)
    if prepared is None or prepared.world or data_path is None:
        return
    if changed := find_changed_files(prepared, data_path, subj):
        raise PerceptError(
            f"{folder} is {prepared.describe()}, but {data_path} has other files: {changed}. Run"
            " notebook 00_prepare_data with overwrite True to prepare them, or choose another"
            " dataset."
        )


def check_protocol(subject: Subject, protocol: str, choices: Collection[str]) -> None:
    """Refuse a subject that was prepared with another protocol than is asked for.

    Args:
        subject: prepared.
        protocol: that is asked for.
        choices: protocols that exclude each other; a subject of any other is taken as it is.
    """
    if subject.protocol in choices and subject.protocol != protocol:
        raise PerceptError(
            f"{subject.path} was prepared with protocol {subject.protocol}, {protocol} is asked"
            " for: run notebook 00_prepare_data with that protocol and overwrite True, or choose"
            " another dataset."
        )


def read_source(
    source: str,
    data_path: str | Path,
    dataset: str | Path,
    subj: int,
    options: str = "",
    world: dict[str, Any] | None = None,
    **common: Any,
) -> Path:
    """Read one subject of a source into the prepared layout, and record how.

    Args:
        source: name of the reader.
        data_path: where the source's files lie.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        options, common: see `parse_options`.
        world: size of the mini world, where that was simulated and written in this format.

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: if another process prepares the subject, and as the reader.
    """
    preparation = describe_preparation(source, data_path, options, world, **common)
    if not world:  # taken first: a file that changes meanwhile is another one afterwards
        files = survey_files(data_path, subj, dataset_folder(dataset))
        preparation = replace(preparation, files=files)
    reader_options = parse_options(source, options, **common)
    folder = subject_folder(dataset, subj)
    with lock_folder(folder, f"preparing {folder.name}", as_sibling=True), preparing(preparation):
        return READERS[source].read(data_path, dataset, subj, **reader_options)
