"""The Natural Scenes Dataset as its authors publish it: betas, ROIs, design and stimuli, all eight
subjects.

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

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import dataset_folder, number_repeats
from src.files.foreign import load_csv, load_json, read_errors
from src.readers.common import (
    center_crop_resize,
    choose_validation,
    load_image_table,
    load_split_column,
)
from src.readers.hdf5 import open_dataset
from src.readers.nsd_betas import SessionBetas, iterate_betas
from src.readers.nsd_files import (
    SURFACES,
    Design,
    NsdFolders,
    check_options,
    find_last_session,
    find_session_files,
    load_design,
    load_image_ids,
    load_responses,
    select_sessions,
)
from src.readers.nsd_surfaces import SurfaceSession, open_surface_sessions, select_vertices
from src.readers.nsd_voxels import load_mask, select_voxels
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.trial_files import iterate_sessions
from src.utils import PerceptError, progress, require_file

TERMS = (
    "NSD belongs to its authors (Allen et al. 2022): fill in and accept the NSD Data Access"
    " Agreement before use, and do not pass on the data or anything that contains them. The stimuli"
    " are COCO images, which are under the terms of COCO and of the photographers."
)

SHARED = 1000  # 10KIDs up to this are the shared images

TRIALS_PER_SESSION = 750

COCO_FIELDS = ["image_id", "id", "caption"]  # of an annotation

BLOCK_IMAGES = 64  # images that are in memory at a time


Session = SessionBetas | SurfaceSession


@dataclass(frozen=True)
class OpenBetas:
    """The betas of some sessions, opened but not read.

    Attributes:
        sessions: in their order.
        voxels: table of the voxels or vertices.
        blocks: of betas (trials, voxels), which can be read once.
        attributes: that say where the voxels lie.
    """

    sessions: Sequence[Session]
    voxels: pd.DataFrame
    blocks: Iterator[np.ndarray]
    attributes: dict[str, str]


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
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject of NSD into the prepared layout; one session is in memory at a time.

    Args:
        source: NSD root, with nsddata/, nsddata_betas/ and nsddata_stimuli/.
        dataset: name or folder of the prepared dataset.
        subj: 1 to 8.
        roi: the voxels: a file of the roi folder (value > 0), "anat:<name>" for a ROI of the
            anatomical grid brought to the functional one, or the path of a NIfTI mask of one's own
            on the functional grid. On a surface: a file of the labels (value > 0), or "all".
        rois: names of labels in the ROI files, comma-separated, to keep only their voxels within
            `roi`.
        space: func1pt8mm, func1mm, fsaverage, or nativesurface (the subject's own), see
            `src.readers.nsd_surfaces`.
        betas_version: betas_assumehrf, betas_fithrf or betas_fithrf_GLMdenoise_RR.
        file_format: hdf5, nii.gz, or auto for what is there (hdf5 first, of which only the ROI is
            read); fsaverage has mgh.
        protocol: nsd-1000 (all sessions), nsd-982 (those released before August 2023), or a name of
            one's own for all the sessions that are there.
        sessions: other sessions than the protocol's, counted from 1, e.g. "1-10" or "1,2,5"; the
            protocol is then called <protocol>+sessions-<these>.
        image_size: side of the images, 0 for the 425 pixels of the source.
        val_images: training images set aside for validation, where there is no splits.csv in
            `source`.
        seed: of that choice.
        bad_voxels: refuse, drop or keep voxels that are constant over all trials, see
            `store_recording`; kept ones are 0.
        attributes: what is to be said about the betas where they are not NSD's (source, units,
            normalisation, protocol).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, damaged or unfitting file (naming it), an unknown option,
            session or ROI, a design that contradicts itself (naming the trial), or data that
            `store_recording` refuses.

    Warns:
        UserWarning: with the number of voxels that are constant in every session; they are 0.
    """
    root = require_file(source, "the root of NSD")
    protocol = (attributes or {}).get("protocol", protocol)
    check_options(subj, space, betas_version, file_format)
    if image_size < 0:
        raise PerceptError(
            f"image_size is {image_size}: give the side of the images in pixels, or 0 for the whole"
            " size."
        )
    folders = NsdFolders(root, subj, space, betas_version)
    responses, design = load_responses(folders), load_design(folders)
    numbers = select_sessions(protocol, sessions, subj, find_last_session(folders, responses))
    open_betas = _open_surface if space in SURFACES else _open_volume
    betas = open_betas(folders, numbers, file_format, (roi, rois), dataset_folder(dataset))
    files, voxels = betas.sessions, betas.voxels
    trials = _add_images(_trials(files, responses, design), load_image_ids(folders))
    trials["split"] = _split(root, trials, val_images, seed)
    published = {
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
        **betas.attributes,
    }
    stimuli = trials.drop_duplicates("row").sort_values("row")
    rows, image_ids = stimuli["row"].to_numpy(), stimuli["image"].to_numpy()
    image_of_row = dict(zip(rows.tolist(), image_ids.tolist(), strict=True))
    tables = (folders.experiment, root)
    captions = load_image_table("captions", image_ids, *tables)
    recording = Recording(
        # these blocks count the flat sessions in the table of voxels, which is stored after them
        betas=RowBlocks((len(trials), len(voxels)), betas.blocks),
        trials=trials,
        images=_iterate_images(folders.stimuli, rows, image_size),
        image_ids=image_ids,
        attributes={**published, **(attributes or {})},
        voxels=voxels,
        captions=_load_coco_captions(folders, image_of_row) if captions is None else captions,
        labels=load_image_table("labels", image_ids, *tables),
    )
    folder = store_recording(recording, dataset, subj, bad_voxels)
    _warn_of_flat_voxels(voxels, len(files), subj)
    return folder


# ------------------------------------------------------------------------------------------ betas
def _open_volume(
    folders: NsdFolders, numbers: list[int], file_format: str, regions: tuple[str, str], _: Path
) -> OpenBetas:
    """The betas of voxels of a functional grid."""
    roi, rois = regions
    paths = find_session_files(folders.betas, numbers, file_format)
    files = [SessionBetas.open(path, session) for session, path in paths.items()]
    voxels, mask = select_voxels(folders, load_mask(folders, roi), rois)
    for file in files:
        file.settle_axes(mask.voxels.shape)
    affine = json.dumps(np.asarray(mask.affine, float).tolist())
    attributes = {"space_kind": "volume", "grid": json.dumps(mask.voxels.shape), "affine": affine}
    return OpenBetas(files, voxels, iterate_betas(files, mask.voxels, voxels), attributes)


def _open_surface(
    folders: NsdFolders,
    numbers: list[int],
    file_format: str,
    regions: tuple[str, str],
    folder: Path,
) -> OpenBetas:
    """The betas of vertices of a surface; a session goes by way of a file in `folder`."""
    sessions = open_surface_sessions(folders, numbers, file_format)
    betas = [session.betas for session in sessions]
    columns, voxels = select_vertices(folders, betas[0], *regions)
    attributes = betas[0].places.list_attributes()
    return OpenBetas(sessions, voxels, iterate_sessions(betas, columns, voxels, folder), attributes)


def _warn_of_flat_voxels(voxels: pd.DataFrame, n_sessions: int, subj: int) -> None:
    n_flat = int((voxels["flat_sessions"] == n_sessions).sum())
    if n_flat:
        warnings.warn(
            f"{n_flat} of {len(voxels)} voxels of subject {subj} do not vary in any session: they"
            " are 0.",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------ trials
def _trials(
    files: Sequence[Session], responses: pd.DataFrame | None, design: Design | None
) -> pd.DataFrame:
    """Columns trial, session, run, row (of imgBrick) and is_shared of the sessions read."""
    if responses is not None:
        sessions = [_session_of_responses(file, responses) for file in files]
    elif design is not None:
        longest = max(file.n_trials for file in files)
        is_last = [file is files[-1] for file in files]
        sessions = [
            _session_of_design(file, design, longest, last)
            for file, last in zip(files, is_last, strict=True)
        ]
    else:
        raise PerceptError(
            "Neither nsd_expdesign.mat nor responses.tsv is there, so what was stimuli in"
            f" {files[0].path} is unknown: fetch one of them."
        )
    trials = pd.concat(sessions, ignore_index=True)
    if design is not None:
        trials["is_shared"] = np.isin(trials["row"], design.shared)
    else:
        trials["is_shared"] = _find_shared(responses, trials["trial"].to_numpy())
    if responses is not None and design is not None:
        _check_agreement(trials, design)
    return trials


def _session_of_responses(file: Session, responses: pd.DataFrame) -> pd.DataFrame:
    """The trials of a session as responses.tsv has them."""
    numbers = np.flatnonzero(responses["SESSION"] == file.session)
    if len(numbers) != file.n_trials:
        raise PerceptError(
            f"{file.path} has {file.n_trials} trials, responses.tsv has {len(numbers)} of session"
            f" {file.session}: fetch the two again."
        )
    return pd.DataFrame(
        {
            "trial": numbers,
            "session": file.session - 1,
            "run": responses["RUN"].to_numpy()[numbers] - 1,
            "row": responses["73KID"].to_numpy()[numbers] - 1,
        }
    )


def _session_of_design(file: Session, design: Design, longest: int, is_last: bool) -> pd.DataFrame:
    """The trials of a session as the design has them; all sessions but the last are as long."""
    numbers = (file.session - 1) * longest + np.arange(file.n_trials)
    if file.n_trials < longest and not is_last:
        raise PerceptError(
            f"{file.path} has {file.n_trials} trials where others have {longest}: fetch it again."
        )
    return pd.DataFrame(
        {
            "trial": numbers,
            "session": file.session - 1,
            "run": _number_runs(file.n_trials),
            "row": _look_up_rows(design, numbers),
        }
    )


def _number_runs(n_trials: int) -> np.ndarray:
    """Run of each trial of a session, from 0; -1 for a session of another length than NSD's."""
    if n_trials != TRIALS_PER_SESSION:
        return np.full(n_trials, -1)
    return np.repeat(np.arange(12), [63, 62] * 6)  # 12 runs of 63 and 62 trials in turn


def _look_up_rows(design: Design, numbers: np.ndarray) -> np.ndarray:
    """Rows of imgBrick that some trials showed."""
    has_all = numbers.max() < len(design.rows)
    if not has_all or (design.rows[numbers] < 0).any():
        raise PerceptError(
            f"nsd_expdesign.mat does not say what trial {numbers.max()} showed: fetch it again, and"
            " the betas of this subject."
        )
    return design.rows[numbers]


def _find_shared(responses: pd.DataFrame | None, numbers: np.ndarray) -> np.ndarray:
    """Whether some trials showed a shared image, by responses.tsv."""
    if responses is None or "10KID" not in responses:
        raise PerceptError(
            "responses.tsv has no column 10KID and nsd_expdesign.mat is absent, so the shared"
            " images are unknown: fetch the latter."
        )
    return responses["10KID"].to_numpy()[numbers] <= SHARED


def _check_agreement(trials: pd.DataFrame, design: Design) -> None:
    """Refuse a responses.tsv that contradicts the design."""
    rows = _look_up_rows(design, trials["trial"].to_numpy())
    _check_column(trials, trials["row"] + 1, rows + 1, "73KID")
    for _, session in trials.groupby("session"):
        if len(session) == TRIALS_PER_SESSION:
            _check_column(session, session["run"] + 1, _number_runs(len(session)) + 1, "run")


def _check_column(
    trials: pd.DataFrame, recorded: pd.Series, designed: np.ndarray, name: str
) -> None:
    different = np.flatnonzero(recorded.to_numpy() != designed)
    if len(different):
        first = different[0]
        trial = trials.iloc[first]
        raise PerceptError(
            f"Trial {trial['trial']} (from 0, session {trial['session'] + 1}) has {name}"
            f" {recorded.iloc[first]} in responses.tsv and {designed[first]} by nsd_expdesign.mat:"
            " fetch the two again."
        )


def _add_images(trials: pd.DataFrame, ids: pd.Series | None) -> pd.DataFrame:
    """Add image, repeat and the published split (test for the shared images)."""
    images = trials["row"]
    if ids is not None:
        images = trials["row"].map(ids).fillna(-1).astype(np.int64)
    unnamed = trials.loc[images < 0, "row"]
    if len(unnamed):
        raise PerceptError(
            f"image_ids.csv does not name row {unnamed.iloc[0]} of imgBrick: write the dataset"
            " again."
        )
    trials = trials.assign(image=images, split=np.where(trials["is_shared"], "test", "train"))
    return trials.assign(repeat=number_repeats(trials))


def _split(root: Path, trials: pd.DataFrame, val_images: int, seed: int) -> pd.Series:
    """The column `split`, of splits.csv where there is one."""
    split = load_split_column(root, trials)
    if split is None:
        return choose_validation(trials, val_images, seed)
    is_leaked = trials["is_shared"] & split.isin(("train", "val"))
    if is_leaked.any():
        image = trials.loc[is_leaked, "image"].iloc[0]
        raise PerceptError(
            f"{root / 'splits.csv'} puts image {image} of the shared test images into training"
            " or validation: take it out."
        )
    return split


# ----------------------------------------------------------------------------- images and captions
def _iterate_images(folder: Path, rows: np.ndarray, image_size: int) -> Iterator[np.ndarray]:
    """Blocks of the images at ascending rows of imgBrick, uint8 (n, height, width, 3)."""
    path = require_file(folder / "nsd_stimuli.hdf5", "the stimuli")
    with open_dataset(path, "imgBrick", "the stimuli", rows) as brick:
        has_axes = brick.ndim == 4 and brick.shape[-1] == 3 and brick.dtype == np.uint8
        if not has_axes or len(brick) <= rows.max():
            raise PerceptError(
                f"imgBrick of {path} is {brick.dtype} {brick.shape}, but must be uint8 (images,"
                f" height, width, 3), and a trial showed its row {rows.max()}: fetch it again."
            )
        for start in progress(range(0, len(rows), BLOCK_IMAGES), "images"):
            with read_errors(path):
                block = [brick[row] for row in rows[start : start + BLOCK_IMAGES]]
            yield np.stack([center_crop_resize(image, image_size) for image in block])


def _load_coco_captions(folders: NsdFolders, image_of_row: dict[int, int]) -> pd.DataFrame | None:
    """Captions of COCO's annotations, up to five an image, or None where these are not there.

    Args:
        folders: of the subject.
        image_of_row: image id of each row of imgBrick.
    """
    information = folders.experiment / "nsd_stim_info_merged.csv"
    annotations = {
        split: folders.root / "annotations" / f"captions_{split}.json"
        for split in ("train2017", "val2017")
    }
    if not all(path.exists() for path in (information, *annotations.values())):
        return None
    table = load_csv(information, ("nsdId", "cocoId", "cocoSplit"))
    table = table[table["nsdId"].isin(image_of_row)]
    parts = []
    for split, path in annotations.items():
        content = load_json(path)
        with read_errors(path):
            annotated = [[entry[name] for name in COCO_FIELDS] for entry in content["annotations"]]
            texts = pd.DataFrame(annotated, columns=COCO_FIELDS).sort_values("id")
        stimuli = table[table["cocoSplit"] == split]
        parts.append(stimuli.merge(texts, left_on="cocoId", right_on="image_id"))
    captions = pd.concat(parts).groupby("nsdId").head(5)
    images = captions["nsdId"].map(image_of_row).astype(np.int64)
    return pd.DataFrame({"image": images, "caption": captions["caption"].str.strip()})
