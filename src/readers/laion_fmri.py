"""LAION-fMRI (ViCCo group, 2026): single-trial responses at 7 T, five subjects in 30 main sessions.

- `source` is a copy of the public bucket `laion-fmri` (or of a part of it). Taken are, below
  derivatives/glmsingle-tedana/sub-XX/ses-YY/func/, the betas *SingletrialBetas*statmap.nii.gz,
  float32 (x, y, z, trials), and the tables *trials.tsv with the columns label (file name of the
  picture; stimulus_id in early versions), session, run and beta_index, a row a volume. Sessions
  above 30 are not part of the release and are passed over.
- Betas are GLMsingle's type D in percent signal change, shrunk by ridge regression. One volume is
  in memory at a time. A voxel that is NaN in a session (edge, dropout) is 0 in it and is counted in
  the column flat_sessions.
- The voxels are those of `mask`, else of the mask of mean R2 above 15 %, else those where the mean
  R2 is not 0; of these, the regions `rois` (laion-general by default). Regions are the masks
  derivatives/rois/sub-XX/<category>/*_label-<ROI>_mask.nii.gz; names are compared without hyphens,
  as the bucket writes FFA-1 and the package FFA1.
- noise_ceiling is the fraction of variance of a single trial, from the map of 12 repeats (or of 4):
  x / (x + n (1 - x)). Ceilings above 1.5 are percent.
- A picture's id is its row in stimuli/task-images_metadata.csv, from 0. The pictures themselves,
  stimuli/task-images_stimuli.h5 (one JPEG a row) or a folder, need the stimulus agreement.
- Labels may hold spaces, dots and plus signs; tables are split at tabs only.
- The splits are those of the package, see `src.readers.laion_splits`.

Written from the description and the package's code; no array of the data set was seen. Inferred:
the endings of the files of early versions, and that ceilings at or below 1.5 are fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import dataset_folder, number_repeats
from src.files.foreign import load_csv, natural_key
from src.readers.common import (
    check_numbering,
    check_rois,
    choose_validation,
    join_labels,
    list_files,
    load_image_table,
    load_split_column,
    make_roi_columns,
    parse_name_list,
    parse_number_ranges,
    to_integers,
)
from src.readers.laion_splits import (
    Split,
    assign_split,
    check_names,
    find_ood_kind,
    load_split,
)
from src.readers.pictures import Pictures, load_names, open_pictures
from src.readers.places import Places, load_map, load_regions
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.trial_files import (
    JoinedFiles,
    TrialFile,
    find_filled_columns,
    iterate_sessions,
    open_trials,
)
from src.utils import PerceptError, require_file

TERMS = (
    "The fMRI data, derivatives, metadata, embeddings, captions and segmentations of LAION-fMRI are"
    " CC0 1.0. The stimulus images are not: they are for non-commercial research after one has"
    " accepted the stimulus agreement (laion-fmri.hebartlab.com/request), may not be passed on, and"
    " may not train general-purpose models."
)

SUBJECTS = (1, 3, 5, 6, 7)

LAST_SESSION = 30  # of the main experiment; later ones are not released

BETAS_FOLDER = "derivatives/glmsingle-tedana"

CEILINGS = {"NoiseceilingAllrep": 0, "Noiseceiling4rep": 4, "Noiseceiling12rep": 12}

LARGEST_FRACTION = 1.5  # a noise ceiling above it is in percent

DEFAULT_ROI = "laion-general"


@dataclass(frozen=True)
class LaionFolders:
    """Where the files of a subject lie in the bucket."""

    root: Path
    subj: int

    @property
    def label(self) -> str:
        """sub-01."""
        return f"sub-{self.subj:02d}"

    @property
    def betas(self) -> Path:
        """Folder of the sessions and of the maps of the subject."""
        return self.root / BETAS_FOLDER / self.label

    @property
    def metadata(self) -> Path:
        """Table of all images, a row an image."""
        return self.root / "stimuli" / "task-images_metadata.csv"

    @property
    def image_ids(self) -> Path:
        """Image id of each row, where a miniature has ids of its own."""
        return self.root / "stimuli" / "image_ids.csv"

    @property
    def captions(self) -> Path:
        """Captions, several rows an image."""
        return self.root / "stimuli" / "task-images_desc-captions.csv"

    def list_rois(self) -> list[Path]:
        """Masks of the regions on the grid of the betas."""
        folder = self.root / "derivatives" / "rois" / self.label
        paths = [
            path
            for path in sorted(folder.glob("**/*_mask.nii.gz"))
            if "space-T1w" in path.name and not path.name.startswith(".")
        ]
        return paths or list_files(self.root / f"derivatives/atlases/{self.label}/rois", "*.nii.gz")

    def find_map(self, name: str) -> Path | None:
        """A map of the whole subject, such as desc-R2mean."""
        paths = list_files(self.betas, f"*desc-{name}_*.nii.gz")
        return paths[0] if paths else None


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    split_name: str = "tau",
    pool: str = "own",
    splits: str = "",
    split_sha256: str = "",
    ood_types: str = "",
    rois: str = DEFAULT_ROI,
    mask: str = "",
    sessions: str = "",
    images: str = "",
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout.

    Args:
        source: copy of the bucket, or of a part of it.
        dataset: name or folder of the prepared dataset.
        subj: 1, 3, 5, 6 or 7.
        split_name: of a bundled split: tau, random_0 to _4, cluster_k5_0 to _4, ood.
        pool: images that are split: "shared" (1,121 of all subjects), "own" (5,833 of this
            subject) or "pooled".
        splits: folder of the splits, by default `source`/splits.
        split_sha256: beginning of the checksum that the split's file must have, "" for any.
        ood_types: with split_name=ood: kinds of test images, separated by commas, "" for all.
        rois: regions separated by commas, the union of which is kept; "all" for every voxel of the
            mask.
        mask: path of a NIfTI mask on the grid of the betas, see the module for the default.
        sessions: numbers from 1, e.g. "1-10" or "1,2,5"; "" for all that are there.
        images: HDF5 file or folder of the pictures, by default stimuli/task-images_stimuli.h5,
            else stimuli/images.
        image_size: side of the stored images, cut to squares; 0 for the originals.
        val_images: number of validation images, drawn from the training images; not used with
            splits.csv in `source`, which may move training images to val or exclude.
        seed: of that choice.
        protocol: name of the protocol, by default laion-<split_name>@<pool>-<SHA-256>.
        bad_voxels: refuse, drop or keep voxels that hold nothing in any session, see
            `store_recording`; kept ones are 0.
        attributes: what is to be said about the betas where they are not the published ones
            (source, units, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing or cut-off file, rows unlike volumes, an unknown subject,
            session, region or split, a grid that differs, an image without picture, or an image on
            two sides of the split.
    """
    root = require_file(source, "the copy of the bucket laion-fmri").expanduser()
    if subj not in SUBJECTS:
        raise PerceptError(f"subj is {subj}: LAION-fMRI has {', '.join(map(str, SUBJECTS))}.")
    folders = LaionFolders(root, subj)
    files = _find_sessions(folders, sessions)
    betas = [open_trials(paths[0]) for paths in files.values()]
    JoinedFiles.join(betas, folders.betas)  # refuses other grids
    trials = _load_all_trials(files, betas)
    pool = folders.label if pool == "own" else pool
    chosen = load_split(root / Path(splits).expanduser(), split_name, pool, split_sha256)
    pictures = _open_pictures(folders, images)
    if folders.metadata.exists():
        check_names(chosen, pictures.names, folders.metadata)
    trials, names = _number_images(folders, trials, pictures)
    trials["split"] = _split(root, trials, names, (chosen, ood_types), val_images, seed)
    places, columns = _select_mask(folders, betas[0], mask)
    columns, voxels = _select_rois(folders, places, columns, rois, betas[0].path)
    _add_ceilings(folders, places, columns, voxels, betas[0].path)
    published = {
        "source": "LAION-fMRI, GLMsingle after tedana",
        "units": "percent signal change (ridge-shrunk)",
        "normalisation": "none",
        "protocol": protocol or _name_protocol(chosen, ood_types, sessions),
        "rois": rois,
        "sessions": len(files),
        "split_file": f"{chosen.pool}/{chosen.path.name}",
        "split_sha256": chosen.sha256,
    }
    check_numbering(dataset_folder(dataset) / "labels.parquet", names)
    rows, image_ids = names["row"].to_numpy(), names["image"].to_numpy()
    file_columns = columns if places.index is None else places.index[columns]
    blocks = iterate_sessions(betas, file_columns, voxels, dataset_folder(dataset))
    recording = Recording(
        # these blocks count the flat sessions in the table of voxels, which is stored after them
        betas=RowBlocks((len(trials), len(columns)), blocks),
        trials=trials.drop(columns="label"),
        images=pictures.iterate(rows, image_size),
        image_ids=image_ids,
        attributes={**published, **places.list_attributes(), **(attributes or {})},
        voxels=voxels,
        captions=_load_captions(folders, names),
        labels=join_labels(root, _describe_images(folders, names)),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _name_protocol(split: Split, ood_types: str, sessions: str) -> str:
    """The protocol of a split, and what of the data is read."""
    name = split.protocol
    if ood_types:
        name += f"+{ood_types.replace(' ', '')}"
    return f"{name}+sessions-{sessions.replace(' ', '')}" if sessions else name


# ----------------------------------------------------------------------------------------- trials
def _find_sessions(folders: LaionFolders, sessions: str) -> dict[int, tuple[Path, Path]]:
    """Betas and trials of each session, by its number from 1."""
    paths = {}
    for folder in sorted(folders.betas.glob("ses-*")):
        match = re.fullmatch(r"ses-(\d{1,3})", folder.name)
        if match and 1 <= int(match[1]) <= LAST_SESSION:
            betas = list_files(folder / "func", "*[Ss]ingletrial*_statmap.nii.gz")
            tables = list_files(folder / "func", "*[Ss]ingletrial*_trials.tsv")
            tables += list_files(folder / "func", "*_events.tsv")
            if betas and not tables:
                raise PerceptError(
                    f"{folder / 'func'} has no table of trials (*_trials.tsv) of"
                    f" {betas[0].name}: fetch it from the same folder of the bucket."
                )
            if betas:
                paths[int(match[1])] = (betas[0], tables[0])
    if not paths:
        raise PerceptError(
            f"{folders.betas} has no ses-YY/func/*SingletrialBetas*statmap.nii.gz: fetch the betas"
            f" of {folders.label}, or give the folder that holds derivatives/."
        )
    if not sessions:
        return paths
    available = f"the data set has 1 to {LAST_SESSION}"
    selected = parse_number_ranges(sessions, LAST_SESSION, available)
    missing = [number for number in selected if number not in paths]
    if missing:
        raise PerceptError(
            f"Session {missing[0]} of {folders.label} is missing in {folders.betas}, which has"
            f" {', '.join(map(str, paths))}: fetch it, or read those that are there."
        )
    return {number: paths[number] for number in selected}


def _load_all_trials(files: dict[int, tuple[Path, Path]], betas: list[TrialFile]) -> pd.DataFrame:
    """Columns label, session, run and trial of all sessions."""
    tables = []
    for (number, (_, path)), file in zip(files.items(), betas, strict=True):
        table = _load_trials(path, file)
        tables.append(table.assign(session=number - 1))
    trials = pd.concat(tables, ignore_index=True)
    return trials.assign(trial=np.arange(len(trials)))


def _load_trials(path: Path, betas: TrialFile) -> pd.DataFrame:
    """Columns label and run of a session, a row a volume."""
    options: dict[str, Any] = {"sep": "\t", "dtype": str, "keep_default_na": False, "quoting": 3}
    table = load_csv(path, (), **options)
    column = "label" if "label" in table else "stimulus_id"
    if column not in table:
        raise PerceptError(f"{path} has no column label: it has {', '.join(map(str, table))}.")
    if len(table) != betas.n_trials:
        raise PerceptError(
            f"{betas.path} has {betas.n_trials} volumes, {path} has {len(table)} rows: fetch the"
            " two again."
        )
    if "beta_index" in table:
        numbers = pd.to_numeric(table["beta_index"], errors="coerce").to_numpy()
        if not np.array_equal(numbers, np.arange(len(table))):
            raise PerceptError(
                f"Column beta_index of {path} does not count the volumes from 0 on: fetch it again."
            )
    run = pd.Series(-1, index=table.index)
    if "run" in table:
        ordered = sorted(table["run"].unique(), key=natural_key)
        run = table["run"].map({name: number for number, name in enumerate(ordered)})
    return pd.DataFrame({"label": table[column], "run": run})


# ----------------------------------------------------------------------------------------- images
def _open_pictures(folders: LaionFolders, images: str) -> Pictures:
    """The pictures: of the option, else the HDF5 file, else the folder."""
    if images:
        path = folders.root / Path(images).expanduser()
    else:
        stimuli = folders.root / "stimuli"
        stack = stimuli / "task-images_stimuli.h5"
        path = stack if stack.exists() or not (stimuli / "images").exists() else stimuli / "images"
    require_file(
        path,
        "the pictures",
        "accept the stimulus agreement (laion-fmri.hebartlab.com/request) and fetch them, or give"
        " the option images",
    )
    return open_pictures(path, folders.metadata)


def _number_images(
    folders: LaionFolders, trials: pd.DataFrame, pictures: Pictures
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add image and repeat; the pictures shown: row (of the pictures), image (id) and name."""
    labels = trials["label"].unique()
    row_of_label = {label: pictures.find_row(label) for label in labels}
    id_of_label = dict(row_of_label)
    if folders.metadata.exists():
        row_of_name = {name: row for row, name in enumerate(load_names(folders.metadata))}
        unknown = [label for label in labels if label not in row_of_name]
        if unknown:
            raise PerceptError(
                f"{folders.metadata} has no image {unknown[0]!r}, which was shown: fetch it again."
            )
        id_of_label = {label: row_of_name[label] for label in labels}
    if folders.image_ids.exists():
        table = load_csv(folders.image_ids, ("row", "image"), "write the dataset again")
        image_of_row = dict(zip(table["row"], table["image"], strict=True))
        id_of_label = {label: image_of_row[row] for label, row in id_of_label.items()}
    trials = trials.assign(image=trials["label"].map(id_of_label))
    trials["repeat"] = number_repeats(trials)
    names = pd.DataFrame(
        {
            "row": [row_of_label[label] for label in labels],
            "image": [id_of_label[label] for label in labels],
            "name": labels,
        }
    )
    return trials, names.sort_values("row", ignore_index=True)


def _describe_images(folders: LaionFolders, names: pd.DataFrame) -> pd.DataFrame:
    """Name, data set of origin and kind of each image."""
    labels = names.drop(columns="row")
    labels = labels.assign(ood_kind=labels["name"].map(find_ood_kind))
    if not folders.metadata.exists():
        return labels
    table = load_csv(folders.metadata, ("image_name",), dtype=str, keep_default_na=False)
    columns = [name for name in ("dataset", "unique_or_shared", "n_reps") if name in table]
    table = table.drop_duplicates("image_name")[["image_name", *columns]]
    joined = labels.merge(table, left_on="name", right_on="image_name", how="left")
    return joined.drop(columns="image_name")


def _load_captions(folders: LaionFolders, names: pd.DataFrame) -> pd.DataFrame | None:
    """captions.parquet beside the source, else the published captions, people's before AI's."""
    captions = load_image_table("captions", names["image"].to_numpy(), folders.root)
    if captions is not None or not folders.captions.exists():
        return captions
    table = load_csv(folders.captions, ("image_name", "caption_idx", "caption"))
    indices = to_integers(table["caption_idx"].to_numpy(), f"caption_idx of {folders.captions}")
    table = table.assign(caption_idx=indices, is_ai=indices == 0)
    table = table.merge(names, left_on="image_name", right_on="name")
    has_people = ~table.groupby("image")["is_ai"].transform("all")
    table = table[~(table["is_ai"] & has_people)].sort_values(["image", "caption_idx"])
    return table[["image", "caption"]].reset_index(drop=True)


def _split(
    root: Path,
    trials: pd.DataFrame,
    names: pd.DataFrame,
    split: tuple[Split, str],
    val_images: int,
    seed: int,
) -> pd.Series:
    """The column `split`: of the bundled split, with validation images."""
    chosen, ood_types = split
    number_of_name = dict(zip(names["name"], names["image"], strict=True))
    file_split = load_split_column(root, trials, number_of_name)
    column = assign_split(trials["label"], chosen, ood_types, file_split, root / "splits.csv")
    if file_split is not None:
        return column
    return choose_validation(trials.assign(split=column), val_images, seed)


# ----------------------------------------------------------------------------------------- voxels
def _select_mask(folders: LaionFolders, betas: TrialFile, mask: str) -> tuple[Places, np.ndarray]:
    """The places of the voxels of the mask, and their numbers among these."""
    path = folders.find_map("meanR2gt15mask") or folders.find_map("R2mean")
    if mask:
        path = folders.root / Path(mask).expanduser()
    if path is None:
        return betas.places, find_filled_columns(betas)
    values = load_map([path], betas.places, betas.path).values
    index = np.flatnonzero(np.nan_to_num(values, nan=0) > 0)
    if not len(index):
        raise PerceptError(f"{path} has no voxel above 0: give another mask.")
    return replace(betas.places, index=index), np.arange(len(index))


def _select_rois(
    folders: LaionFolders, places: Places, columns: np.ndarray, rois: str, betas_path: Path
) -> tuple[np.ndarray, pd.DataFrame]:
    """The columns of the regions, and the table of their voxels."""
    masks = load_regions(folders.list_rois(), places, betas_path)
    if rois.strip() != "all":
        name_of_key = {_drop_hyphens(name): name for name in masks}
        requested = parse_name_list(rois)
        unknown = [name for name in requested if _drop_hyphens(name) not in name_of_key]
        available = list(masks) or ["none: fetch derivatives/rois of the bucket, or read rois=all"]
        check_rois(unknown, available, f"{folders.label} of LAION-fMRI")
        selected = [masks[name_of_key[_drop_hyphens(name)]] for name in requested]
        columns = columns[np.any(selected, axis=0)[columns]]
    if not len(columns):
        raise PerceptError(
            f"No voxel of the mask of {folders.label} is in {rois}: choose other rois, or another"
            " mask."
        )
    table = make_roi_columns({name: mask[columns] for name, mask in masks.items()}, len(columns))
    return columns, table.join(places.describe(columns)).assign(flat_sessions=0)


def _drop_hyphens(name: str) -> str:
    return name.replace("-", "")


def _add_ceilings(
    folders: LaionFolders,
    places: Places,
    columns: np.ndarray,
    voxels: pd.DataFrame,
    betas_path: Path,
) -> None:
    """Add the noise ceilings that are there, as fractions, and that of a single trial."""
    for name, n_repeats in CEILINGS.items():
        path = folders.find_map(name)
        if path is None:
            continue
        values = load_map([path], places, betas_path).values[columns].astype(np.float64)
        values = np.nan_to_num(values, nan=0).clip(0)
        if values.max() > LARGEST_FRACTION:
            values = values / 100
        values = values.clip(0, 1)
        voxels[f"noise_ceiling_{name.removeprefix('Noiseceiling').lower()}"] = values
        if n_repeats:  # the last, of 12 repeats, is the most exact
            voxels["noise_ceiling"] = values / (values + n_repeats * (1 - values))
