"""The files of NSD: where they lie, which sessions there are, and what was shown in them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.files.foreign import load_csv
from src.readers.common import list_files, load_mat, parse_number_ranges, to_integers
from src.utils import PerceptError

PROTOCOLS = {  # sessions of each subject
    "nsd-1000": (40, 40, 32, 30, 40, 32, 40, 30),
    "nsd-982": (37, 37, 29, 27, 37, 29, 37, 27),
}

VOLUMES = ("func1pt8mm", "func1mm")

SURFACES = {"fsaverage": ("mgh", "mgz"), "nativesurface": ("hdf5",)}  # formats of each

SPACES = (*VOLUMES, *SURFACES)

VERSIONS = ("betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR")

FORMATS = ("hdf5", "nii.gz")

SUBJECTS = range(1, 9)


@dataclass(frozen=True)
class NsdFolders:
    """The folders of one subject below NSD's root.

    Attributes:
        root: with nsddata/, nsddata_betas/ and nsddata_stimuli/.
        subj: number of the subject.
        space: func1pt8mm, func1mm, fsaverage or nativesurface.
        version: of the betas.
    """

    root: Path
    subj: int
    space: str
    version: str

    @property
    def subject(self) -> str:
        """NSD's name of the subject."""
        return f"subj{self.subj:02d}"

    @property
    def betas(self) -> Path:
        """Folder of the session files and of ncsnr.nii.gz."""
        return self.root / "nsddata_betas" / "ppdata" / self.subject / self.space / self.version

    @property
    def rois(self) -> Path:
        """Folder of the ROI files on the functional grid."""
        return self.root / "nsddata" / "ppdata" / self.subject / self.space / "roi"

    @property
    def responses(self) -> Path:
        """The file of the subject's trials."""
        return self.root / "nsddata" / "ppdata" / self.subject / "behav" / "responses.tsv"

    @property
    def experiment(self) -> Path:
        """Folder of the design and of the information about the stimuli."""
        return self.root / "nsddata" / "experiments" / "nsd"

    @property
    def design(self) -> Path:
        """The file of the design."""
        return self.experiment / "nsd_expdesign.mat"

    @property
    def stimuli(self) -> Path:
        """Folder of the images."""
        return self.root / "nsddata_stimuli" / "stimuli" / "nsd"

    @property
    def labels(self) -> Path:
        """Folder of the ROI files on the surface of the betas."""
        owner = "fsaverage" if self.space == "fsaverage" else self.subject
        return self.root / "nsddata" / "freesurfer" / owner / "label"

    @property
    def native_labels(self) -> Path:
        """Folder of the ROI files on the surface of the subject."""
        return self.root / "nsddata" / "freesurfer" / self.subject / "label"

    @property
    def transforms(self) -> Path:
        """Folder of the maps between spaces."""
        return self.root / "nsddata" / "ppdata" / self.subject / "transforms"

    def label_names(self, owner: str, roi: str) -> Path:
        """The file that names the labels of a ROI file; owner is a subject or fsaverage."""
        return self.root / "nsddata" / "freesurfer" / owner / "label" / f"{roi}.mgz.ctab"


@dataclass(frozen=True)
class Design:
    """What nsd_expdesign.mat says of a subject.

    Attributes:
        rows: int64 (trials,), row of imgBrick that each trial showed, from 0.
        shared: rows of the shared images.
    """

    rows: np.ndarray
    shared: np.ndarray


def check_options(subj: int, space: str, version: str, file_format: str) -> None:
    """Refuse a subject, space, version or format that NSD does not have.

    Raises:
        PerceptError: naming those it has.
    """
    choices: dict[str, tuple[Any, Collection[Any]]] = {
        "subj": (subj, SUBJECTS),
        "space": (space, SPACES),
        "betas_version": (version, VERSIONS),
        "file_format": (file_format, ("auto", *SURFACES.get(space, FORMATS))),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise PerceptError(f"{name} is {value!r}: NSD has {', '.join(map(str, allowed))}.")


def find_last_session(folders: NsdFolders, responses: pd.DataFrame | None) -> int:
    """The last session that responses.tsv or, without it, a file of betas is about; 0 for none."""
    if responses is not None:
        return int(responses["SESSION"].max())
    numbers = [0]
    for path in list_files(folders.betas, "*betas_session*"):
        match = re.match(r"(?:[lr]h\.)?betas_session(\d{1,4})\.", path.name)
        if match:
            numbers.append(int(match[1]))
    return max(numbers)


def select_sessions(protocol: str, sessions: str, subj: int, last_recorded: int) -> list[int]:
    """Numbers of the sessions to read, from 1, ascending.

    Args:
        protocol: a key of PROTOCOLS, or a name of one's own for all sessions that are there.
        sessions: numbers and ranges, such as "1-10" or "1,2,5"; "" for all of the protocol.
        subj: number of the subject.
        last_recorded: the last session that is there.

    Raises:
        PerceptError: for an unknown protocol, or sessions that it does not have.
    """
    if not protocol or (protocol.startswith("nsd-") and protocol not in PROTOCOLS):
        raise PerceptError(
            f"protocol is {protocol!r}: choose {', '.join(PROTOCOLS)} or a name of your own that"
            " does not begin with nsd-."
        )
    last = max(last_recorded, 1)
    if protocol in PROTOCOLS:
        last = PROTOCOLS[protocol][subj - 1]
    if not sessions:
        return list(range(1, last + 1))
    available = f"{protocol} has sessions 1 to {last} of subject {subj}"
    return parse_number_ranges(sessions, last, available)


def find_session_files(
    folder: Path,
    sessions: list[int],
    file_format: str,
    available_formats: tuple[str, ...] = FORMATS,
    side: str = "",
) -> dict[int, Path]:
    """The file of each session.

    Args:
        folder: of the betas.
        sessions: numbers of the sessions.
        file_format: one of the formats, or auto for what is there, the first format first.
        available_formats: that the space has.
        side: lh or rh on a surface, "" otherwise.

    Raises:
        PerceptError: naming the first that is missing, and how to read those that are there.
    """
    formats = available_formats if file_format == "auto" else (file_format,)
    start = f"{side}.betas_session" if side else "betas_session"
    files: dict[int, Path] = {}
    for session in sessions:
        candidates = (folder / f"{start}{session:02d}.{suffix}" for suffix in formats)
        path = next((path for path in candidates if path.exists()), None)
        if path is not None:
            files[session] = path
    if len(files) < len(sessions):
        _refuse_missing_session(folder / start, sessions, files, formats)
    return files


def _refuse_missing_session(
    start: Path, sessions: list[int], files: dict[int, Path], formats: tuple[str, ...]
) -> None:
    available = list(files)
    missing = next(session for session in sessions if session not in files)
    is_stretch = len(available) > 1 and available == list(range(1, len(available) + 1))
    text = f"1-{len(available)}" if is_stretch else ",".join(map(str, available))
    remedy = "fetch the betas of this subject"
    if available:
        remedy = (
            f'fetch what is missing, or read the sessions that are there with sessions="{text}"'
        )
    other_format = f" (and so is the .{formats[1]})" if len(formats) > 1 else ""
    raise PerceptError(
        f"{start}{missing:02d}.{formats[0]} is missing{other_format}, of"
        f" {len(sessions)} sessions {len(available)} are there: {remedy}."
    )


def load_responses(folders: NsdFolders) -> pd.DataFrame | None:
    """Load responses.tsv, one row a trial in their order, or None where it is absent.

    Raises:
        PerceptError: if it is damaged, of another subject, or not in the order of the sessions.
    """
    path = folders.responses
    if not path.exists():
        return None
    columns = ["SESSION", "RUN", "73KID"]
    table = load_csv(path, columns, sep="\t")
    for column in columns:
        table[column] = to_integers(table[column].to_numpy(), f"Column {column} of {path}")
    if not len(table):
        raise PerceptError(f"{path} has no rows: fetch it again.")
    if "SUBJECT" in table and (table["SUBJECT"] != folders.subj).any():
        raise PerceptError(
            f"{path} is of subject {table['SUBJECT'].iloc[0]}, not {folders.subj}: put each"
            " subject's file in its own folder."
        )
    is_step = np.isin(np.diff(table["SESSION"], prepend=0), (0, 1))
    if not is_step.all():
        row = int(np.argmax(~is_step))
        raise PerceptError(
            f"{path} is not in the order of the sessions from 1 on (row {row}): fetch it again."
        )
    return table


def load_design(folders: NsdFolders) -> Design | None:
    """Load nsd_expdesign.mat, or None where it is absent.

    Raises:
        PerceptError: if it is damaged.
    """
    path = folders.design
    if not path.exists():
        return None
    # all of it, so that a file that was cut off is noticed
    content = load_mat(path, ("masterordering", "subjectim", "sharedix"))
    order, images, shared = (
        to_integers(content[name], f"{name} of {path}") - 1  # MATLAB counts from 1
        for name in ("masterordering", "subjectim", "sharedix")
    )
    has_subject = images.ndim == 2 and len(images) >= folders.subj
    if not has_subject or not order.size or not 0 <= order.min() <= order.max() < images.shape[1]:
        raise PerceptError(
            f"{path} is not NSD's design: masterordering {order.shape} must name columns of"
            f" subjectim {images.shape}, which has a row a subject; fetch it again."
        )
    return Design(images[folders.subj - 1][order.ravel()], shared.ravel())


def load_image_ids(folders: NsdFolders) -> pd.Series | None:
    """Image id of each row of imgBrick, where a miniature of NSD has ids of its own, else None."""
    path = folders.stimuli / "image_ids.csv"
    if not path.exists():
        return None
    return load_csv(path, ("row", "image"), "write the dataset again").set_index("row")["image"]
