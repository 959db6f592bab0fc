"""What a stage reads beside its code and its parameters: the prepared data, the files of their
source, and the files and runs that its parameters name.

A stage that is finished is run again when one of them has changed under the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from src import utils
from src.utils import PerceptError

# parameters that name a file or a folder of files
FILE_PARAMETERS = (
    "weights",
    "latents_file",
    "voxel2clip_path",
    "laion_prior",
    "caption_converter",
    "refiner_weights",
    "multisubject_ckpt",
    "recon_path",
    "all_images_path",
    "pool",
)

# parameters that name other runs, or several separated by commas
RUN_PARAMETERS = (
    "multisubject_ckpt",
    "autoencoder_name",
    "encoder_name",
    "start_run",
    "tokens_from",
    "token_run",
    "model_name2",
    "voters",
)

WORDS = ("hub", "mini")  # values of FILE_PARAMETERS that name no file

Values = dict[str, Any]


def describe_inputs(values: Values) -> dict[str, Any]:
    """What a stage reads, as JSON values that change when it changes.

    Args:
        values: all parameters of the stage, with its defaults.

    Returns:
        {"data": identity of each prepared subject, "changed_source": of each subject the files of
        its source that are others than when it was prepared, "files": of each parameter}, each
        where there is something.
    """
    entries = {
        "data": dict(_iterate_identities(values)),
        "changed_source": dict(_iterate_changed_sources(values)),
        "files": dict(_iterate_files(values)) | dict(_iterate_runs(values)),
    }
    return {name: entry for name, entry in entries.items() if entry}


def _list_subjects(values: Values) -> list[int]:
    """The subjects whose data a stage reads."""
    listed = str(values.get("also", ""))
    if values.get("multi_subject"):
        listed += f",{values.get('subjects', '')}"
    other_subjects = {int(part) for part in listed.split(",") if part.strip().isdigit()}
    return sorted({int(values["subj"]), *other_subjects})


def _iterate_identities(values: Values) -> Iterator[tuple[str, Any]]:
    """(subj01, identity) of the subjects that are prepared."""
    if not values.get("dataset") or "subj" not in values:
        return
    from src.data.layout import dataset_folder, subject_folder

    for subj in _list_subjects(values):
        folder = subject_folder(values["dataset"], subj)
        if folder.exists():
            files = [*sorted(folder.iterdir()), dataset_folder(values["dataset"]) / "images.h5"]
            times = tuple(path.stat().st_mtime_ns for path in files if path.exists())
            yield folder.name, _read_identity(str(values["dataset"]), subj, times)


@cache
def _read_identity(dataset: str, subj: int, times: tuple[int, ...]) -> Any:
    """Identity of a prepared subject, or why it cannot be read; looked up once for files of the
    same times.
    """
    from src.data.subject import open_subject

    try:
        return open_subject(dataset, subj).identity
    except PerceptError as error:  # the stage says so, or prepares the data again
        return str(error)


def _iterate_changed_sources(values: Values) -> Iterator[tuple[str, str]]:
    """(subj01, files) of the subjects whose source has changed since they were prepared."""
    if not {"dataset", "subj", "source", "data_path"} <= set(values):
        return  # it does not prepare data
    from src.data.identity import find_changed_files, read_preparation
    from src.data.layout import subject_folder

    for subj in _list_subjects(values):
        folder = subject_folder(values["dataset"], subj)
        preparation = read_preparation(folder)
        if preparation is None or preparation.world:
            continue
        if changed := find_changed_files(preparation, utils.resolve(values["data_path"]), subj):
            yield folder.name, changed


def _iterate_files(values: Values) -> Iterator[tuple[str, Any]]:
    """(parameter, size and time of its files) of the parameters that name files that there are."""
    from src.data.identity import survey_files

    for name in FILE_PARAMETERS:
        value = str(values.get(name, ""))
        if value and value not in WORDS and utils.resolve(value).exists():
            yield name, survey_files(utils.resolve(value))


def _iterate_runs(values: Values) -> Iterator[tuple[str, Any]]:
    """(parameter and run, size and time of its files) of the other runs that parameters name."""
    from src.data.identity import survey_files

    for name in RUN_PARAMETERS:
        for run in filter(None, (part.strip() for part in str(values.get(name, "")).split(","))):
            logs = utils.HOME / "train_logs" / run
            if run == values.get("model_name") or not logs.is_dir():
                continue
            reconstructions = utils.HOME / "results" / run / "reconstructions.safetensors"
            yield f"{name} {run}", {**survey_files(logs), **_survey_file(reconstructions)}


def _survey_file(path: Path) -> dict[str, list[Any]]:
    from src.data.identity import survey_files

    return survey_files(path) if path.is_file() else {}
