"""The Natural Scenes Dataset as its authors publish it: betas, ROIs, design and stimuli, all eight
subjects, read and written.

- `source` is the root with nsddata/, nsddata_betas/ and nsddata_stimuli/. Taken are
  nsddata_betas/ppdata/subjAA/<space>/<version>/betas_sessionNN.hdf5 or .nii.gz (percent signal
  change x 300 as int16; floats are taken as percent signal change), ncsnr.nii.gz beside them, the
  ROI files of nsddata/ppdata/subjAA/<space>/roi/, their names in
  nsddata/freesurfer/subjAA/label/<roi>.mgz.ctab, the design from nsd_expdesign.mat and behav/
  responses.tsv (each alone suffices, both are compared), and the images this subject saw from
  imgBrick of nsd_stimuli.hdf5.
- Betas stay percent signal change: the per-session z-score that users expect is the Normaliser's
  work, on training trials only.
- A test image is one of the shared 1000 (sharedix) that was seen in the sessions read. The image id
  is 73KID - 1, the row of imgBrick.
- Voxels are in the order of a NumPy mask (C order of (x, y, z)), the order of MindEye's arrays. The
  table of voxels has a Boolean column for every label in every ROI file; where two files share a
  name (V1v of prf-visualrois and of Kastner2015), the later file's is called <file>:<label>. i, j,
  k are voxel indices from 0, x, y, z are mm by the mask's affine (NSD puts the origin about the
  centre of the grid), which is kept as the attribute "affine", as JSON. noise_ceiling is ncsnr^2 /
  (ncsnr^2 + 1), that of a single trial, as a fraction.
- A voxel that does not vary within a session holds no data there: it becomes 0 in that session and
  is counted in the column flat_sessions.
- The HDF5 files are said to have reversed axes (trials, z, y, x); which order a file has is found
  by comparing its shape with the mask. Where several fit, it is taken to be this one. Inferred:
  that order, and the layout of the .ctab files. Everything NSD's own could not be tried here, as
  its terms forbid passing it on.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pandas as pd
import scipy.io

from src.data.files import disk_errors, iterate_row_blocks
from src.data.images import write_images
from src.data.layout import (
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.readers.common import (
    center_crop_resize,
    check_rois,
    choose_validation,
    copy_tables,
    load_split_column,
    make_roi_columns,
)
from src.readers.volumes import load_anat_roi, load_nifti
from src.utils import PerceptError, progress, require_file

TERMS = (
    "NSD belongs to its authors (Allen et al. 2022): fill in and accept the NSD Data Access"
    " Agreement before use, and do not pass on the data or anything that contains them. The stimuli"
    " are COCO images, which are under the terms of COCO and of the photographers."
)

PROTOCOLS = {
    "nsd-1000": (40, 40, 32, 30, 40, 32, 40, 30),
    "nsd-982": (37, 37, 29, 27, 37, 29, 37, 27),
}  # sessions of each subject

SPACES = ("func1pt8mm", "func1mm")

VERSIONS = ("betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR")

FORMATS = ("hdf5", "nii.gz")

SCALE = np.float32(300)  # stored integers a percent signal change

SHARED = 1000  # 10KIDs up to this are the shared images

NAMES = {  # documented labels, for where the .ctab is absent
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "streams": (
        "early",
        "midventral",
        "midlateral",
        "midparietal",
        "ventral",
        "lateral",
        "parietal",
    ),
}

AXES = (
    "tzyx",
    "txyz",
    "xyzt",
)  # orders of the axes that a file of betas may have, the documented one first

GAP = 2  # voxels on a line that lie this close are read in one call


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    roi: str = "nsdgeneral",
    rois: str = "",
    space: str = "func1pt8mm",
    betas_version: str = "betas_fithrf_GLMdenoise_RR",
    file_format: str = "auto",
    protocol: str = "nsd-1000",
    sessions: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject of NSD into the prepared layout; one session is in memory at a time.

    Args:
        source: NSD root, with nsddata/, nsddata_betas/ and nsddata_stimuli/.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 8.
        roi: the voxels: a file of the roi folder (value > 0), "anat:<name>" for a ROI of the
            anatomical grid brought to the functional one, or the path of a NIfTI mask of one's own
            on the functional grid.
        rois: names of labels in the ROI files, comma-separated, to keep only their voxels within
            `roi`.
        space: func1pt8mm or func1mm.
        betas_version: betas_assumehrf, betas_fithrf or betas_fithrf_GLMdenoise_RR.
        file_format: hdf5, nii.gz, or auto for what is there (hdf5 first, of which only the ROI is
            read).
        protocol: nsd-1000 (all sessions), nsd-982 (those released before August 2023), or a name of
            one's own for all the sessions that are there.
        sessions: other sessions than the protocol's, counted from 1, e.g. "1-10" or "1,2,5"; the
            protocol is then called <protocol>+sessions-<these>.
        image_size: side of the images, 0 for the 425 pixels of the source.
        val_images: training images set aside for validation, where there is no splits.csv in
            `source`.
        seed: of that choice.
        attributes: what is to be said about the betas where they are not NSD's (source, units,
            normalisation, protocol).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, damaged or unfitting file (naming it), an unknown option,
            session or ROI, a design that contradicts itself (naming the trial), or data that
            `write_subject` refuses.

    Warns:
        UserWarning: with the number of voxels that are constant in every session; they are 0.
    """
    root = require_file(source, "the root of NSD")
    protocol = (attributes or {}).get("protocol", protocol)
    _check_options(subj, space, betas_version, file_format)
    if image_size < 0:
        raise PerceptError(
            f"image_size is {image_size}: give the side of the images in pixels, or 0 for the whole"
            " size."
        )
    responses, design = _responses(root, subj), _design(root, subj)
    wanted = _wanted_sessions(
        protocol, sessions, subj, _recorded(root, subj, space, betas_version, responses)
    )
    files = [
        Betas.open(path, s)
        for s, path in _files(
            _betas_folder(root, subj, space, betas_version), wanted, file_format
        ).items()
    ]
    mask, affine = _mask(root, subj, space, roi)
    voxels, mask = _voxels(root, subj, space, betas_version, mask, affine, rois)
    for file in files:
        file.settle_axes(mask.shape)
    trials = _trials(files, responses, design)
    ids = _image_ids(root)
    trials = _split(root, trials, ids, val_images, seed)
    about: dict[str, Any] = {
        "source": f"NSD {betas_version} {space}",
        "units": "percent signal change",
        "normalisation": "none",
        "protocol": f"{protocol}+sessions-{sessions.replace(' ', '')}" if sessions else protocol,
        "roi": roi,
        "rois": rois,
        "space": space,
        "betas_version": betas_version,
        "file_format": files[0].format,
        "sessions": len(files),
        "affine": json.dumps(np.asarray(affine, float).tolist()),
        **(attributes or {}),
    }
    folder = dataset_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder):
        rows = np.unique(trials["row"])
        images = trials.drop_duplicates("row").sort_values("row")["image"].to_numpy()
        write_images(folder / "images.h5", _images(root, rows, image_size), images)
        _captions(root, folder, dict(zip(rows.tolist(), images.tolist(), strict=True)))
        # write_subject stores `voxels` after the last block, when the blocks have filled in its
        # column flat_sessions
        made = write_subject(
            subject_folder(dataset, subj), _blocks(files, mask, voxels), trials, voxels, about
        )
    dead = int((voxels["flat_sessions"] == len(files)).sum())
    if dead:
        warnings.warn(
            f"{dead} of {len(voxels)} voxels of subject {subj} do not vary in any session: they"
            " are 0.",
            stacklevel=2,
        )
    return made


def _check_options(subj: int, space: str, version: str, file_format: str) -> None:
    for name, value, known in (
        ("subj", subj, range(1, 9)),
        ("space", space, SPACES),
        ("betas_version", version, VERSIONS),
        ("file_format", file_format, ("auto", *FORMATS)),
    ):
        if value not in known:  # type: ignore[operator]
            raise PerceptError(f"{name} is {value!r}: NSD has {', '.join(map(str, known))}.")  # type: ignore[attr-defined]


def _betas_folder(root: Path, subj: int, space: str, version: str) -> Path:
    return root / "nsddata_betas" / "ppdata" / f"subj{subj:02d}" / space / version


def _functional(root: Path, subj: int, space: str) -> Path:
    return root / "nsddata" / "ppdata" / f"subj{subj:02d}" / space


def _experiment(root: Path) -> Path:
    return root / "nsddata" / "experiments" / "nsd"


def _stimuli(root: Path) -> Path:
    return root / "nsddata_stimuli" / "stimuli" / "nsd"


def _recorded(
    root: Path, subj: int, space: str, version: str, responses: pd.DataFrame | None
) -> int:
    """The last session that responses.tsv or, without it, a file of betas tells of."""
    if responses is not None:
        return int(responses["SESSION"].max())
    names = (
        re.match(r"betas_session(\d+)\.", p.name)
        for p in _betas_folder(root, subj, space, version).glob("betas_session*")
    )
    return max((int(m.group(1)) for m in names if m), default=0)


def _wanted_sessions(protocol: str, sessions: str, subj: int, recorded: int) -> list[int]:
    """Numbers of the sessions to read, from 1, ascending."""
    if not protocol or (protocol.startswith("nsd-") and protocol not in PROTOCOLS):
        raise PerceptError(
            f"protocol is {protocol!r}: choose {', '.join(PROTOCOLS)} or a name of your own that"
            " does not begin with nsd-."
        )
    last = PROTOCOLS[protocol][subj - 1] if protocol in PROTOCOLS else max(recorded, 1)
    if not sessions:
        return list(range(1, last + 1))
    wanted: set[int] = set()
    for part in sessions.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise PerceptError(
                f"sessions is {sessions!r}: write numbers and ranges from 1, e.g. 1-10 or 1,2,5."
            )
        wanted |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not wanted or min(wanted) < 1 or max(wanted) > last:
        raise PerceptError(
            f"sessions is {sessions!r}, but {protocol} has sessions 1 to {last} of subject {subj}."
        )
    return sorted(wanted)


def _files(folder: Path, wanted: list[int], file_format: str) -> dict[int, Path]:
    """The file of each session."""
    formats = FORMATS if file_format == "auto" else (file_format,)
    candidates = {s: [folder / f"betas_session{s:02d}.{f}" for f in formats] for s in wanted}
    found = {
        s: next((path for path in paths if path.exists()), None) for s, paths in candidates.items()
    }
    there = [s for s, path in found.items() if path]
    if len(there) < len(wanted):
        first = next(s for s, path in found.items() if not path)
        unbroken = there == list(range(1, len(there) + 1)) and len(there) > 1
        read = f"1-{len(there)}" if unbroken else ",".join(map(str, there))
        remedy = (
            f'fetch what is missing, or read the sessions that are there with sessions="{read}"'
            if there
            else "fetch the betas of this subject"
        )
        raise PerceptError(
            f"{candidates[first][0]} is"
            f" missing{' (and so is the .nii.gz)' if len(formats) > 1 else ''}, of {len(wanted)}"
            f" sessions {len(there)} are there: {remedy}."
        )
    return {s: path for s, path in found.items() if path}


def _responses(root: Path, subj: int) -> pd.DataFrame | None:
    """responses.tsv, one row a trial in their order, or None where it is absent."""
    path = root / "nsddata" / "ppdata" / f"subj{subj:02d}" / "behav" / "responses.tsv"
    if not path.exists():
        return None
    needed = ["SESSION", "RUN", "73KID"]
    try:
        table = pd.read_csv(path, sep="\t")
        table[needed] = table[needed].astype(np.int64)
    except (KeyError, ValueError) as error:
        raise PerceptError(
            f"{path} is damaged, cut off or lacks whole numbers in {', '.join(needed)} ({error}):"
            " fetch it again."
        ) from error
    if not len(table):
        raise PerceptError(f"{path} has no rows: fetch it again.")
    if "SUBJECT" in table and (table["SUBJECT"] != subj).any():
        raise PerceptError(
            f"{path} is of subject {table['SUBJECT'].iloc[0]}, not {subj}: put each subject's file"
            " in its own folder."
        )
    steps = np.diff(table["SESSION"], prepend=0)
    if not np.isin(steps, (0, 1)).all():
        raise PerceptError(
            f"{path} is not in the order of the sessions from 1 on (row"
            f" {int(np.argmax(~np.isin(steps, (0, 1))))}): fetch it again."
        )
    return table


@dataclass
class Design:
    """What nsd_expdesign.mat says of a subject.

    Attributes:
        rows: int64 (trials,), row of imgBrick that each trial showed, from 0.
        shared: rows of the shared images.
    """

    rows: np.ndarray
    shared: np.ndarray


def _design(root: Path, subj: int) -> Design | None:
    path = _experiment(root) / "nsd_expdesign.mat"
    if not path.exists():
        return None
    try:
        content = scipy.io.loadmat(path)  # all of it, so that a file that was cut off is noticed
        order, images, shared = (
            np.asarray(content[k]).astype(np.int64)
            for k in ("masterordering", "subjectim", "sharedix")
        )
        return Design(images[subj - 1, order.ravel() - 1] - 1, shared.ravel() - 1)
    except (
        KeyError,
        ValueError,
        IndexError,
        TypeError,
        OSError,
        NotImplementedError,
        zlib.error,
        scipy.io.matlab.MatReadError,
    ) as error:
        raise PerceptError(
            f"{path} is damaged or not NSD's design ({error}): fetch it again."
        ) from error


def _runs(trials: int) -> np.ndarray:
    """Run of each trial of a session, from 0: NSD's 12 runs have 63 and 62 trials in turn; -1 for a
    session of another length.
    """
    return np.repeat(np.arange(12), [63, 62] * 6) if trials == 750 else np.full(trials, -1)


def _trials(
    files: list[Betas], responses: pd.DataFrame | None, design: Design | None
) -> pd.DataFrame:
    """Columns trial, session, run, row (of imgBrick) and shared of the sessions read."""
    if responses is None and design is None:
        raise PerceptError(
            "Neither nsd_expdesign.mat nor responses.tsv is there, so what was shown in"
            f" {files[0].path} is unknown: fetch one of them."
        )
    longest, parts = max(f.trials for f in files), []
    for file in files:
        if responses is not None:
            at = np.flatnonzero(responses["SESSION"] == file.session)
            if len(at) != file.trials:
                raise PerceptError(
                    f"{file.path} has {file.trials} trials, responses.tsv has {len(at)} of session"
                    f" {file.session}: fetch the two again."
                )
            runs, rows = responses["RUN"].to_numpy()[at] - 1, responses["73KID"].to_numpy()[at] - 1
        else:
            at = (file.session - 1) * longest + np.arange(
                file.trials
            )  # all sessions are alike, but for a shorter last one
            if file.trials < longest and file is not files[-1]:
                raise PerceptError(
                    f"{file.path} has {file.trials} trials where others have {longest}: fetch it"
                    " again."
                )
            runs, rows = _runs(file.trials), _designed(design, at)
        shared = np.isin(rows, design.shared) if design else _shared(responses, at)
        parts.append(
            pd.DataFrame(
                {
                    "trial": at,
                    "session": file.session - 1,
                    "run": runs,
                    "row": rows,
                    "shared": shared,
                }
            )
        )
    trials = pd.concat(parts, ignore_index=True)
    if responses is not None and design is not None:
        _compare(trials, design)
    return trials


def _designed(design: Design | None, at: np.ndarray) -> np.ndarray:
    if design is None or at.max() >= len(design.rows) or (design.rows[at] < 0).any():
        raise PerceptError(
            f"nsd_expdesign.mat does not say what trial {at.max()} showed: fetch it again, and the"
            " betas of this subject."
        )
    return design.rows[at]


def _shared(responses: pd.DataFrame | None, at: np.ndarray) -> np.ndarray:
    if responses is None or "10KID" not in responses:
        raise PerceptError(
            "responses.tsv has no column 10KID and nsd_expdesign.mat is absent, so the shared"
            " images are unknown: fetch the latter."
        )
    return responses["10KID"].to_numpy()[at] <= SHARED


def _compare(trials: pd.DataFrame, design: Design) -> None:
    """Refuse a responses.tsv that says something else than the design."""
    for trial, expected, found, what in (
        (
            trials["trial"],
            _designed(design, trials["trial"].to_numpy()) + 1,
            trials["row"] + 1,
            "73KID",
        ),
        *(
            (part["trial"], _runs(len(part)) + 1, part["run"] + 1, "run")
            for _, part in trials.groupby("session")
            if len(part) == 750
        ),
    ):
        wrong = np.flatnonzero(np.asarray(expected) != found.to_numpy())
        if len(wrong):
            i = wrong[0]
            where = trials.loc[trials["trial"] == trial.iloc[i], "session"].iloc[0] + 1
            raise PerceptError(
                f"Trial {trial.iloc[i]} (from 0, session {where}) has {what} {found.iloc[i]} in"
                f" responses.tsv and {np.asarray(expected)[i]} by nsd_expdesign.mat: fetch the two"
                " again."
            )


def _image_ids(root: Path) -> pd.Series | None:
    """Image id of each row of imgBrick, where a miniature of NSD has ids of its own
    (image_ids.csv).
    """
    path = _stimuli(root) / "image_ids.csv"
    return pd.read_csv(path).set_index("row")["image"] if path.exists() else None


def _split(
    root: Path, trials: pd.DataFrame, ids: pd.Series | None, val_images: int, seed: int
) -> pd.DataFrame:
    """Add image, repeat and split."""
    trials = trials.assign(
        image=trials["row"] if ids is None else trials["row"].map(ids).fillna(-1).astype(np.int64)
    )
    if (trials["image"] < 0).any():
        raise PerceptError(
            f"image_ids.csv does not name row {trials.loc[trials['image'] < 0, 'row'].iloc[0]} of"
            " imgBrick: write the dataset again."
        )
    trials["split"] = np.where(trials["shared"], "test", "train")
    trials["repeat"] = number_repeats(trials)
    own = load_split_column(root, trials)
    if own is not None:
        leaked = trials["shared"] & own.isin(("train", "val"))
        if leaked.any():
            image = trials.loc[leaked, "image"].iloc[0]
            raise PerceptError(
                f"{root / 'splits.csv'} puts image {image} of the shared test images into training"
                " or validation: take it out."
            )
    trials["split"] = choose_validation(trials, val_images, seed) if own is None else own
    check_trials(trials)
    return trials


def _mask(root: Path, subj: int, space: str, roi: str) -> tuple[np.ndarray, np.ndarray]:
    """Boolean mask (x, y, z) and its affine (4, 4)."""
    folder = _functional(root, subj, space) / "roi"
    if roi.startswith("anat:"):
        values = load_anat_roi(root, subj, roi.removeprefix("anat:"), space)
        size = 1.8 if space == "func1pt8mm" else 1.0
        affine = np.diag([size, size, size, 1.0])
        affine[:3, 3] = (
            -size * (np.array(values.shape) - 1) / 2
        )  # as NSD's own tool: the origin is the centre of the grid
    elif roi.endswith((".nii", ".nii.gz")):
        values, affine = load_nifti(Path(roi).expanduser(), "a mask of your own")
    else:
        known = sorted(p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz"))
        if known and roi not in known:
            raise PerceptError(
                f"There is no ROI file {folder / roi}.nii.gz: choose one of {', '.join(known)}."
            )
        values, affine = load_nifti(folder / f"{roi}.nii.gz", "the ROI that selects the voxels")
    if values.ndim != 3 or not (values > 0).any():
        raise PerceptError(
            f"ROI {roi} of subject {subj} has shape {values.shape} and {int((values > 0).sum())}"
            " voxels: it must be (x, y, z) with some > 0."
        )
    return values > 0, affine


def _label_names(root: Path, subj: int, roi: str) -> dict[int, str]:
    """Names of the labels in a ROI file: lines "<number> <name> ..." of its .ctab, else the
    documented ones; lh. and rh. go before those of a half.
    """
    side, base = (roi[:3], roi[3:]) if roi.startswith(("lh.", "rh.")) else ("", roi)
    for owner in (f"subj{subj:02d}", "fsaverage"):
        path = root / "nsddata" / "freesurfer" / owner / "label" / f"{base}.mgz.ctab"
        if path.exists():
            lines = (line.split() for line in path.read_text().splitlines())
            return {
                int(parts[0]): side + parts[1]
                for parts in lines
                if len(parts) > 1 and parts[0].lstrip("-").isdigit()
            }
    return {value: side + name for value, name in enumerate(NAMES.get(base, ()), 1)}


def _labels(root: Path, subj: int, space: str, mask: np.ndarray) -> dict[str, np.ndarray]:
    """For each label of each ROI file whether a voxel of the mask (voxels,) has it; prf-visualrois
    names its labels first.
    """
    found: dict[str, np.ndarray] = {}
    paths = sorted(
        (_functional(root, subj, space) / "roi").glob("*.nii.gz"),
        key=lambda p: (not p.name.startswith("prf-visualrois"), p.name),
    )
    names = {p.name for p in paths}
    for path in paths:
        if path.name[:3] in ("lh.", "rh.") and path.name[3:] in names:
            continue  # the halves of a file that is there as a whole
        values, roi = load_nifti(path, "a ROI file")[0], path.name.removesuffix(".nii.gz")
        if values.shape != mask.shape:
            raise PerceptError(
                f"{path} has shape {values.shape}, the mask of the voxels {mask.shape}: they must"
                " be on the same grid, of this very subject."
            )
        known, inside = _label_names(root, subj, roi), np.rint(values[mask]).astype(np.int64)
        for value in sorted(
            set(np.unique(inside[inside > 0]).tolist()) | {v for v in known if v > 0}
        ):
            name = known.get(value, roi if value == 1 and not known else f"{roi}-{value}")
            found[f"{roi}:{name}" if name in found else name] = inside == value
    return found


def _voxels(
    root: Path, subj: int, space: str, version: str, mask: np.ndarray, affine: np.ndarray, rois: str
) -> tuple[pd.DataFrame, np.ndarray]:
    """The table of voxels, and the mask (x, y, z) narrowed to `rois`."""
    labels = _labels(root, subj, space, mask)
    wanted = [name.strip() for name in rois.split(",") if name.strip()]
    check_rois(wanted, labels, f"Subject {subj} of NSD")
    keep = (
        np.any([labels[name] for name in wanted], axis=0)
        if wanted
        else np.ones(int(mask.sum()), bool)
    )
    if not keep.any():
        raise PerceptError(
            f"No voxel of the ROI is in {rois} of subject {subj}: choose other rois."
        )
    places = np.argwhere(mask)[keep]
    narrowed = np.zeros_like(mask)
    narrowed[tuple(places.T)] = True
    table = make_roi_columns({name: member[keep] for name, member in labels.items()}, len(places))
    table[["i", "j", "k"]] = places
    table[["x", "y", "z"]] = nibabel.affines.apply_affine(affine, places)
    path = _betas_folder(root, subj, space, version) / "ncsnr.nii.gz"
    if path.exists():
        values = load_nifti(path, "the noise ceiling's signal-to-noise ratio")[0]
        if values.shape != mask.shape:
            raise PerceptError(
                f"{path} has shape {values.shape}, the mask {mask.shape}: it must be of this very"
                " subject."
            )
        table["ncsnr"] = np.nan_to_num(
            values[narrowed].astype(np.float64)
        )  # NaN where a voxel has no valid data
        table["noise_ceiling"] = table["ncsnr"] ** 2 / (table["ncsnr"] ** 2 + 1)
    table["flat_sessions"] = 0
    return table, narrowed


@dataclass
class Betas:
    """The file of one session's betas, opened for its shape only.

    Attributes:
        path: the file.
        session: its number, from 1.
        format: hdf5 or nii.gz.
        shape: of the stored array.
        dtype: of the stored array.
        offset: bytes before the array of a .nii.gz.
        axes: one of AXES, once `settle_axes` knows the grid.
    """

    path: Path
    session: int
    format: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int = 0
    axes: str = ""

    @classmethod
    def open(cls, path: Path, session: int) -> Betas:
        """Read the header of a session's file.

        Raises:
            PerceptError: if it is damaged, or holds something else than betas.
        """
        try:
            made = (
                cls._from_h5(path, session)
                if path.suffix == ".hdf5"
                else cls._from_nifti(path, session)
            )
        except (
            OSError,
            RuntimeError,
            KeyError,
            EOFError,
            zlib.error,
            nibabel.filebasedimages.ImageFileError,
            nibabel.spatialimages.HeaderDataError,
        ) as error:
            raise PerceptError(
                f"{path} is damaged, cut off or holds no betas ({error}): fetch it again."
            ) from error
        if len(made.shape) != 4 or not (made.dtype == np.int16 or made.dtype.kind == "f"):
            raise PerceptError(
                f"{path} holds {made.dtype} {made.shape}: betas are int16 (percent signal change x"
                " 300) or float, with four axes."
            )
        return made

    @classmethod
    def _from_h5(cls, path: Path, session: int) -> Betas:
        with h5py.File(path, "r") as file:
            return cls(path, session, "hdf5", file["betas"].shape, file["betas"].dtype)

    @classmethod
    def _from_nifti(cls, path: Path, session: int) -> Betas:
        stored: Any = nibabel.load(path).dataobj  # type: ignore[attr-defined]
        if (stored.slope, stored.inter) != (1.0, 0.0):
            raise PerceptError(
                f"{path} has a scaling of {stored.slope} and {stored.inter} in its header, NSD's"
                " betas have none: fetch it again."
            )
        return cls(path, session, "nii.gz", stored.shape, stored.dtype, stored.offset)

    @property
    def trials(self) -> int:
        """Trials of the session."""
        return self.shape[self.axes.index("t")]

    def settle_axes(self, grid: tuple[int, ...]) -> None:
        """Find the order of the axes from the grid (x, y, z) of the mask; where two fit, the
        documented one is taken.

        Raises:
            PerceptError: if no order fits.
        """
        sizes = dict(zip("xyz", grid, strict=True))
        orders = AXES if self.format == "hdf5" else ("xyzt",)
        fitting = [
            axes
            for axes in orders
            if all(n == sizes[a] for a, n in zip(axes, self.shape, strict=True) if a != "t")
        ]
        if not fitting:
            raise PerceptError(
                f"{self.path} of shape {self.shape} does not fit the mask's grid (x, y, z) ="
                f" {grid}: take betas and mask of the same subject and space."
            )
        self.axes = fitting[0]

    def rows(self, mask: np.ndarray) -> np.ndarray:
        """Betas (trials, voxels) of the mask's voxels in C order of (x, y, z), in the stored dtype.

        Raises:
            PerceptError: if the file is damaged or cut off.
        """
        try:
            return self._from_lines(mask) if self.format == "hdf5" else self._from_stream(mask)
        except (OSError, RuntimeError, EOFError, ValueError, zlib.error) as error:
            raise PerceptError(
                f"{self.path} is damaged or cut off ({error}): fetch it again."
            ) from error

    def _from_lines(self, mask: np.ndarray) -> np.ndarray:
        """Read pieces of lines along the file's fastest spatial axis: NSD keeps the trials of a
        voxel together, so that only the ROI is read.
        """
        spatial = self.axes.replace("t", "")
        places = np.argwhere(mask)[
            :, ["xyz".index(a) for a in spatial]
        ]  # (voxels, 3) in the order of the file's axes
        order = np.lexsort(places.T[::-1])
        sorted_places = places[order]
        steps = np.diff(sorted_places, axis=0)
        breaks = np.flatnonzero((steps[:, :2] != 0).any(1) | (steps[:, 2] > GAP)) + 1
        taken = np.empty((self.trials, len(places)), self.dtype)  # in the order of the file
        with h5py.File(self.path, "r") as file:
            stored = file["betas"]
            for start, stop in itertools.pairwise([0, *breaks.tolist(), len(places)]):
                a, b, first = (int(n) for n in sorted_places[start])
                line = slice(first, int(sorted_places[stop - 1, 2]) + 1)
                block = stored[:, a, b, line] if self.axes[0] == "t" else stored[a, b, line].T
                taken[:, start:stop] = block[:, sorted_places[start:stop, 2] - first]
        return taken[:, np.argsort(order)]

    def _from_stream(self, mask: np.ndarray) -> np.ndarray:
        """Decompress one volume (x, y, z) after the other, which lies in Fortran order, and keep
        the ROI.
        """
        where = np.ravel_multi_index(tuple(np.argwhere(mask).T), mask.shape, order="F")
        taken = np.empty((self.trials, int(mask.sum())), self.dtype)
        size, start, done, held = mask.size * self.dtype.itemsize, self.offset, 0, bytearray()
        for piece in _inflated(
            self.path
        ):  # to the end of the stream, where its checksum is compared
            held += piece
            while done < self.trials and len(held) >= start + size:
                np.take(np.frombuffer(held, self.dtype, mask.size, start), where, out=taken[done])
                del held[: start + size]
                start, done = 0, done + 1
        if done < self.trials:
            raise EOFError(f"it ends after {done} of {self.trials} trials")
        return taken


def _inflated(path: Path) -> Iterator[bytes]:
    """The content of a .gz, of one or more members, piece by piece; gzip.open takes a quarter
    longer.

    Raises:
        EOFError: if it ends too early.
    """
    decoder = zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while data := file.read(1 << 16):
            while data:
                if decoder.eof:
                    decoder = zlib.decompressobj(wbits=31)
                yield decoder.decompress(data)
                data = decoder.unused_data
    if not decoder.eof:
        raise EOFError("the compressed stream ends too early")


def _blocks(files: list[Betas], mask: np.ndarray, voxels: pd.DataFrame) -> Iterator[np.ndarray]:
    """Blocks of rows float32 (rows, voxels) in percent signal change, one session in memory; counts
    flat sessions in `voxels`.
    """
    flat_sessions = np.zeros(len(voxels), np.int64)
    for file in progress(files, "sessions"):
        rows = file.rows(mask)
        flat = (rows.max(0) == rows.min(0)) & (len(rows) > 1)
        flat_sessions += flat
        voxels["flat_sessions"] = flat_sessions
        for block in iterate_row_blocks(rows):
            percent = block.astype(np.float32)
            if rows.dtype == np.int16:
                percent /= SCALE
            percent[:, flat] = 0
            yield percent
        del rows, block, percent  # before the next session is read


def _images(root: Path, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    """Blocks of the images at ascending rows of imgBrick, uint8 (n, height, width, 3), made
    smaller.
    """
    path = require_file(_stimuli(root) / "nsd_stimuli.hdf5", "the stimuli")
    try:
        with h5py.File(path, "r") as file:
            brick = file["imgBrick"]
            if brick.ndim != 4 or len(brick) <= rows.max():
                raise PerceptError(
                    f"imgBrick of {path} has shape {brick.shape}, but a trial showed its row"
                    f" {rows.max()}: fetch it again."
                )
            for start in progress(range(0, len(rows), 64), "images"):
                yield np.stack(
                    [center_crop_resize(brick[row], image_size) for row in rows[start : start + 64]]
                )
    except (OSError, RuntimeError, KeyError) as error:
        raise PerceptError(
            f"{path} is damaged, cut off or has no imgBrick ({error}): fetch it again."
        ) from error


def _captions(root: Path, folder: Path, images: dict[int, int]) -> None:
    """Captions and labels that lie beside the source, else COCO's captions where its annotations
    are there.

    Args:
        root: of NSD.
        folder: of the prepared dataset.
        images: row of imgBrick -> image id.
    """
    for beside in (_experiment(root), root):
        copy_tables(beside, folder, images.values())
    information = _experiment(root) / "nsd_stim_info_merged.csv"
    annotations = [
        root / "annotations" / f"captions_{split}2017.json" for split in ("train", "val")
    ]
    given = any((beside / "captions.parquet").exists() for beside in (_experiment(root), root))
    if given or not all(path.exists() for path in (information, *annotations)):
        return
    table = pd.read_csv(information, usecols=["nsdId", "cocoId", "cocoSplit"])
    table = table[table["nsdId"].isin(images)]
    parts = []
    for split, path in zip(("train2017", "val2017"), annotations, strict=True):
        texts = pd.DataFrame(
            json.loads(path.read_text())["annotations"], columns=["image_id", "id", "caption"]
        ).sort_values("id")
        parts.append(
            table[table["cocoSplit"] == split].merge(texts, left_on="cocoId", right_on="image_id")
        )
    captions = pd.concat(parts).groupby("nsdId").head(5)
    made = pd.DataFrame(
        {
            "image": captions["nsdId"].map(images).astype(np.int64),
            "caption": captions["caption"].str.strip(),
        }
    )
    write_image_table(folder / "captions.parquet", made)
