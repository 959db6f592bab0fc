"""Single-trial betas of any laboratory: BIDS derivatives, GLMsingle's output, or plain arrays.

- `source` is a folder; every file is found below it by a pattern, in which {subj} stands for the
  participant (01, else 1 or 001) and {session} for any session. What is read is listed by
  `src.readers.trial_files` and `src.readers.glmsingle`: NIfTI, a folder of 3D NIfTI files, GIFTI,
  MGH, CIFTI, .npy, and GLMsingle's .npy, .hdf5 and .mat.
- The entities ses- and run- of names (and folders) order the files, as numbers: run-2 goes before
  run-10. Files of one session follow one another; those of the two hemispheres lie side by side.
- The trials are a table with a row a volume: BIDS events, or a table of trials that belongs to the
  betas. Several tables of a session (one a run) follow one another. Rows without a stimulus (empty,
  n/a, or listed in `skip`) have no volume, and are left out before rows and volumes are compared.
  GLMsingle's output needs no table where `conditions` says which image each condition is.
- Betas stay as they are (`units` says what they are, `scale` divides them). A voxel that does not
  vary in a session, or is NaN or infinite in it, is 0 in that session and is counted in the column
  flat_sessions.
- Nothing is resampled: a mask, a region or an atlas of another shape or affine is refused.
- Sessions and runs are numbered from 0 in the order of their names, which the attribute
  session_labels keeps.

BIDS defines no single-trial betas yet: the names of columns and entities are those that fMRIPrep,
nilearn, GLMsingle and published data sets use.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.data.layout import dataset_folder, number_repeats
from src.files.foreign import load_csv, natural_key, shorten
from src.readers.common import (
    check_numbering,
    check_rois,
    choose_validation,
    default_split_size,
    join_labels,
    load_image_table,
    load_split_column,
    make_roi_columns,
    parse_name_list,
    to_integers,
)
from src.readers.glmsingle import Design, is_glmsingle, load_design, open_glmsingle
from src.readers.pictures import Pictures, list_keys, open_pictures
from src.readers.places import (
    MAP_SUFFIXES,
    Places,
    find_hemisphere,
    load_coordinates,
    load_map,
    load_regions,
)
from src.readers.recording import Recording, RowBlocks, store_recording
from src.readers.trial_files import (
    SUFFIXES,
    HemisphereFiles,
    JoinedFiles,
    TrialFile,
    find_filled_columns,
    iterate_sessions,
    open_trials,
)
from src.utils import PerceptError, require_file

TERMS = (
    "These data are your own, or another laboratory's: keep to what the participants agreed to and"
    " to the terms under which data and pictures were given. What is prepared here, and every"
    " reconstruction, is personal data of the participants as much as the source is."
)

BETAS = (  # patterns, of which the first that finds something is taken
    "**/sub-{subj}_*[Bb]etas*",
    "**/sub-{subj}/**/TYPED_FITHRF_GLMDENOISE_RR.*",
)

EVENTS = ("**/sub-{subj}_*_trials.tsv", "**/sub-{subj}_*_events.tsv")

REGIONS = ("**/sub-{subj}_*label-*_mask.*",)

STIMULUS_COLUMNS = (
    "label",
    "stim_file",
    "stimulus",
    "stimulus_id",
    "image",
    "image_name",
    "trial_type",
)

# the entities of a path that say its session and its run
SESSION = re.compile(r"(?:^|[_/])(?:ses-|session[-_]?(?=\d))([A-Za-z0-9]+)(?=[_./]|$)")
RUN = re.compile(r"(?:^|[_/])run[-_]?(\d+)(?=[_./]|$)")

NO_STIMULUS = ("", "n/a", "nan")

TEST_CHOICES = ("auto", "repeated", "random")


@dataclass(frozen=True)
class SessionFiles:
    """The files of one session.

    Attributes:
        label: what the names call it, "" where they have no ses-.
        betas: open, in the order of the runs.
        events: tables of the trials in the order of the runs.
    """

    label: str
    betas: TrialFile
    events: list[Path]


def read(
    source: str | Path,
    dataset: str | Path,
    subj: int,
    *,
    betas: str = "",
    events: str = "",
    stimulus: str = "",
    conditions: str = "",
    skip: str = "blank,rest,fixation",
    images: str = "stimuli",
    image_names: str = "",
    mask: str = "",
    regions: str = "",
    mesh: str = "",
    rois: str = "",
    sessions: str = "",
    participant: str = "",
    units: str = "as in the file",
    scale: float = 1.0,
    test: str = "auto",
    test_images: int = 300,
    image_size: int = 256,
    val_images: int = 300,
    seed: int = 42,
    protocol: str = "",
    bad_voxels: str = "keep",
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Read one subject into the prepared layout; a block of trials is in memory at a time.

    Args:
        source: folder that holds everything.
        dataset: name or folder of the prepared dataset.
        subj: number of the subject.
        betas: pattern of the files of betas below `source`, by default
            **/sub-{subj}_*[Bb]etas* or GLMsingle's TYPED output in a folder of the subject.
        events: pattern of the tables of trials, by default *_trials.tsv, else *_events.tsv.
        stimulus: column that names the picture, by default the first of label, stim_file, stimulus,
            stimulus_id, image, image_name, trial_type that names any.
        conditions: table (columns condition and image, .tsv or .csv) for GLMsingle's output without
            events; conditions count from 0.
        skip: names in that column that are no stimuli, separated by commas.
        images: folder of the pictures, or HDF5 file with the dataset images.
        image_names: table of the names of that HDF5 file, where it has none itself.
        mask: file, or pattern of one file a hemisphere, of the voxels to read (value > 0), by
            default those that are finite and not 0 in the first trial.
        regions: pattern of masks of regions and of atlases (_dseg with its table, .label.gii,
            .annot), by default **/sub-{subj}_*label-*_mask.*.
        mesh: pattern of one GIFTI surface a hemisphere, whose coordinates become x, y, z.
        rois: names of regions, separated by commas, to keep only their voxels.
        sessions: labels of the sessions to read, separated by commas, "" for all.
        participant: label of the subject after sub-, where it is not its number.
        units: of the betas.
        scale: what betas are divided by, e.g. 300 for integers of percent signal change x 300.
        test: where there is no splits.csv: "repeated" (the images that were shown most often),
            "random" (test_images of them), or "auto": the former if there are at least test_images
            of them.
        test_images: number of test images, or of those that "auto" asks for.
        image_size: side of the stored images, cut to squares; 0 for the originals.
        val_images: number of validation images, drawn from the training images; not used with
            splits.csv.
        seed: of both choices.
        protocol: name of the protocol, by default <folder>-splits, -repeated<n> or
            -random<n>-seed<seed>.
        bad_voxels: refuse, drop or keep voxels that hold nothing in any session, see
            `store_recording`; kept ones are 0.
        attributes: what is to be said about the betas where it differs (source, normalisation).

    Returns:
        The folder of the subject.

    Raises:
        PerceptError: for a missing, damaged or cut-off file, rows unlike volumes, a stimulus
            without picture, an unknown region, another grid or affine, or an image on two sides of
            the split.
    """
    root = require_file(source, "the folder of the data").expanduser()
    _check_options(test, scale, image_size)
    label = participant or _find_participant(root, subj, betas)
    files = _find_sessions(root, label, betas, events, parse_name_list(sessions))
    pictures = open_pictures(_resolve(root, images), _resolve_or_none(root, image_names))
    condition_table = _load_conditions(_resolve_or_none(root, conditions))
    skipped = {*NO_STIMULUS, *parse_name_list(skip)}
    tables = [_load_trials(session, stimulus, condition_table, skipped) for session in files]
    trials, names = _number_trials(tables, pictures)
    split, kind = _split(root, trials, names, (test, test_images), val_images, seed)
    trials["split"] = split
    session_betas = [session.betas for session in files]
    first = session_betas[0]
    places, columns = _select_columns(root, label, first, mask)
    region_paths = _find_maps(root, label, regions, REGIONS)
    columns, voxels = _make_voxels(places, columns, region_paths, rois, first.path)
    if mesh:
        paths = _find_maps(root, label, mesh, ())
        voxels[["x", "y", "z"]] = load_coordinates(paths, places, first.path)[columns]
    published = {
        "source": f"BIDS {root.name}, {first.path.name}",
        "units": units,
        "normalisation": "none",
        "protocol": protocol or f"{root.name}-{kind}",
        "rois": rois,
        "participant": label,
        "session_labels": json.dumps([session.label for session in files]),
    }
    check_numbering(dataset_folder(dataset) / "labels.parquet", names)
    rows, image_ids = names["row"].to_numpy(), names["image"].to_numpy()
    blocks = iterate_sessions(session_betas, columns, voxels, dataset_folder(dataset), scale)
    recording = Recording(
        # these blocks count the flat sessions in the table of voxels, which is stored after them
        betas=RowBlocks((len(trials), len(columns)), blocks),
        trials=trials,
        images=pictures.iterate(rows, image_size),
        image_ids=image_ids,
        attributes={**published, **places.list_attributes(), **(attributes or {})},
        voxels=voxels,
        captions=load_image_table("captions", image_ids, root),
        labels=join_labels(root, names.drop(columns="row")),
    )
    return store_recording(recording, dataset, subj, bad_voxels)


def _check_options(test: str, scale: float, image_size: int) -> None:
    if test not in TEST_CHOICES:
        raise PerceptError(f"test is {test!r}: choose one of {', '.join(TEST_CHOICES)}.")
    if not scale > 0 or image_size < 0:
        raise PerceptError(
            f"scale is {scale} and image_size {image_size}: betas are divided by scale, so it must"
            " be above 0, and image_size is the side of the images in pixels, or 0."
        )


# ------------------------------------------------------------------------------------------ files
def _resolve(root: Path, text: str) -> Path:
    """A path of the options: absolute, or below the source."""
    return root / Path(text).expanduser()


def _resolve_or_none(root: Path, text: str) -> Path | None:
    return _resolve(root, text) if text else None


def _find_participant(root: Path, subj: int, betas: str) -> str:
    """The participant whose files are there: the number with two digits, else with one or three."""
    candidates = [f"{subj:02d}", str(subj), f"{subj:03d}"]
    for label in candidates:
        if _find_files(root, label, [betas] if betas else BETAS, _holds_betas):
            return label
    return candidates[0]


def _find_files(
    root: Path, label: str, patterns: Sequence[str], accept: Callable[[Path], bool] = bool
) -> list[Path]:
    """Files of a participant, of the first pattern that finds any, in the order of their names."""
    for pattern in patterns:
        text = pattern.replace("{subj}", label).replace("{session}", "*")
        names = glob.glob(text, root_dir=root, recursive=True)
        paths = [root / name for name in names if _belongs_to(Path(name), label)]
        accepted = [path for path in paths if accept(path)]
        if accepted:
            return sorted(accepted, key=lambda path: natural_key(str(path)))
    return []


def _belongs_to(path: Path, label: str) -> bool:
    """Whether a file is not of another participant, as sub-1* also finds sub-10."""
    owner = re.search(r"sub-([A-Za-z0-9]+)", path.name)
    return owner is None or owner[1] == label


def _find_entity(path: Path, entity: re.Pattern[str]) -> str:
    """The label of a session or run in a file name, or else in its folders; "" for none."""
    labels = entity.findall(path.as_posix())
    return labels[-1] if labels else ""


def _unpad(label: str) -> str:
    """A label without the zeros before a number: ses-01 and ses-1 are the same session."""
    return str(int(label)) if label.isdecimal() else label


def _find_sessions(
    root: Path, label: str, betas: str, events: str, selected: list[str]
) -> list[SessionFiles]:
    """The files of each session, in the order of their labels as numbers."""
    patterns = [betas] if betas else BETAS
    paths = _find_files(root, label, patterns, _holds_betas)
    paths = [path for path in paths if path.parent not in paths]  # of a folder, its files are part
    if not paths:
        raise PerceptError(
            f"{root} has no betas of sub-{label} by {' or '.join(patterns)}: give their pattern"
            " with the option betas, and the label of the subject with participant."
        )
    betas_of_session = _group_by_session(paths, root)
    events_paths = _find_files(root, label, [events] if events else EVENTS)
    events_of_session = _group_by_session(events_paths, root)
    selected = [_unpad(name) for name in selected]
    unknown = [name for name in selected if name not in betas_of_session]
    if unknown:
        raise PerceptError(
            f"There are no betas of session {unknown[0]} of sub-{label}: choose from"
            f" {', '.join(betas_of_session)}."
        )
    files = []
    for name in sorted(betas_of_session, key=natural_key):
        if not selected or name in selected:
            session_betas = _open_session(betas_of_session[name])
            label_in_name = _find_entity(betas_of_session[name][0], SESSION)
            tables = events_of_session.get(name, [])
            files.append(SessionFiles(label_in_name, session_betas, tables))
    JoinedFiles.join([session.betas for session in files], root)  # refuses other places
    return files


def _holds_betas(path: Path) -> bool:
    """Whether a path is a file of betas by its name, or a folder of NIfTI files."""
    if path.is_dir():
        return any(path.glob("*.nii")) or any(path.glob("*.nii.gz"))
    return is_glmsingle(path) or path.name.endswith(SUFFIXES)


def _group_by_session(paths: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the label of their session, those of a session in the order of their runs."""
    sessions: dict[str, list[Path]] = {}
    for path in paths:
        inner = path.relative_to(root) if path.is_relative_to(root) else path
        sessions.setdefault(_unpad(_find_entity(inner, SESSION)), []).append(path)
    return {
        name: sorted(members, key=lambda path: (natural_key(_find_entity(path, RUN)), path.name))
        for name, members in sessions.items()
    }


def _open_session(paths: list[Path]) -> TrialFile:
    """The betas of a session: files of one run side by side, runs one after the other."""
    runs: dict[str, list[TrialFile]] = {}
    for path in paths:
        file = open_glmsingle(path) if is_glmsingle(path) else open_trials(path)
        runs.setdefault(_find_entity(path, RUN), []).append(file)
    parts: list[TrialFile] = []
    for members in runs.values():
        if len(members) == 1:
            parts += members
            continue
        if not all(find_hemisphere(file.path) for file in members):
            raise PerceptError(
                f"{members[0].path} and {members[1].path} are of the same session and run: narrow"
                " the pattern `betas` to one space and one map."
            )
        parts.append(HemisphereFiles.join(members))
    return parts[0] if len(parts) == 1 else JoinedFiles.join(parts, paths[0].parent)


def _find_maps(root: Path, label: str, pattern: str, default: Sequence[str]) -> list[Path]:
    """Masks and maps by a pattern, which must find some where it is given."""
    patterns = parse_name_list(pattern)
    paths = [path for one in patterns for path in _find_files(root, label, [one])]
    if not patterns:
        paths = _find_files(root, label, default)
    paths = [path for path in paths if path.name.endswith(MAP_SUFFIXES)]
    if patterns and not paths:
        raise PerceptError(
            f"{root} has no file {pattern} of sub-{label}: correct the pattern, or put it there."
        )
    return paths


# ----------------------------------------------------------------------------------------- trials
def _load_conditions(path: Path | None) -> dict[int, str] | None:
    """Name of the picture of each condition."""
    if path is None:
        return None
    separator = "\t" if path.suffix == ".tsv" else ","
    table = load_csv(
        require_file(path, "the pictures of the conditions"),
        ("condition", "image"),
        sep=separator,
        dtype={"image": str},
    )
    numbers = to_integers(table["condition"].to_numpy(), f"Column condition of {path}")
    return dict(zip(numbers.tolist(), table["image"], strict=True))


def _load_trials(
    session: SessionFiles, stimulus: str, conditions: dict[int, str] | None, skipped: set[str]
) -> pd.DataFrame:
    """Columns name and run of the trials of a session, a row a volume."""
    if conditions is not None:
        design = load_design(session.betas.path.parent)
        if design is None:
            raise PerceptError(
                f"{session.betas.path.parent} has no DESIGNINFO, which says the condition of each"
                " trial: copy it there, or give tables with the option events."
            )
        table = _apply_conditions(design, conditions)
        origins = str(design.path)
    else:
        table = _load_events(session, stimulus, skipped)
        origins = ", ".join(path.name for path in session.events)
    if len(table) != session.betas.n_trials:
        raise PerceptError(
            f"{session.betas.path} has {session.betas.n_trials} volumes, {shorten(origins)} has"
            f" {len(table)} rows with a stimulus: name what is no stimulus with the option skip, or"
            " give the table that belongs to these betas."
        )
    return table


def _apply_conditions(design: Design, conditions: dict[int, str]) -> pd.DataFrame:
    unknown = sorted(set(design.conditions.tolist()) - set(conditions))
    if unknown:
        raise PerceptError(
            f"{design.path} has condition {unknown[0]} (counted from 0), which the table of"
            " conditions does not name: complete it."
        )
    names = [conditions[condition] for condition in design.conditions.tolist()]
    return pd.DataFrame({"name": names, "run": design.runs})


def _load_events(session: SessionFiles, stimulus: str, skipped: set[str]) -> pd.DataFrame:
    """The trials of the tables of a session, one after the other."""
    if not session.events:
        raise PerceptError(
            f"There is no table of the trials of {session.betas.path}: give its pattern with the"
            " option events, or for GLMsingle's output a table of conditions."
        )
    tables = []
    for number, path in enumerate(session.events):
        separator = "," if path.suffix == ".csv" else "\t"
        options = {"sep": separator, "dtype": str, "keep_default_na": False}
        table = load_csv(path, (), "save it as text separated by tabs", **options)
        column = _choose_column(table, stimulus, skipped, path)
        is_stimulus = ~table[column].str.strip().isin(skipped)
        is_run = len(session.events) > 1 or _find_entity(path, RUN) != ""
        run = pd.Series(number if is_run else -1, index=table.index)
        if "run" in table and len(session.events) == 1:
            run = _rank_runs(table["run"])
        tables.append(pd.DataFrame({"name": table[column], "run": run})[is_stimulus])
    return pd.concat(tables, ignore_index=True)


def _choose_column(table: pd.DataFrame, stimulus: str, skipped: set[str], path: Path) -> str:
    """The column that names the picture."""
    if stimulus and stimulus not in table:
        raise PerceptError(f"{path} has no column {stimulus}: it has {', '.join(map(str, table))}.")
    candidates = [stimulus] if stimulus else STIMULUS_COLUMNS
    for name in candidates:
        if name in table and (~table[name].str.strip().isin(skipped)).any():
            return name
    raise PerceptError(
        f"{path} names no stimulus in {' or '.join(candidates)} (it has"
        f" {', '.join(map(str, table))}): give the column with the option stimulus."
    )


def _rank_runs(runs: pd.Series) -> pd.Series:
    """Runs numbered from 0 in the order of their names as numbers."""
    ordered = sorted(runs.unique(), key=natural_key)
    return runs.map({name: number for number, name in enumerate(ordered)})


def _number_trials(
    tables: list[pd.DataFrame], pictures: Pictures
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of trials, and the pictures that were shown: row, image (id) and name."""
    parts = [table.assign(session=number) for number, table in enumerate(tables)]
    trials = pd.concat(parts, ignore_index=True)
    row_of_name = {name: pictures.find_row(name) for name in trials["name"].unique()}
    shown_rows = sorted(set(row_of_name.values()))
    image_of_row = {row: pictures.number(row) for row in shown_rows}
    rows = trials["name"].map(row_of_name)
    trials = trials.assign(trial=np.arange(len(trials)), image=rows.map(image_of_row))
    trials["repeat"] = number_repeats(trials)
    names = pd.DataFrame(
        {
            "row": shown_rows,
            "image": [image_of_row[row] for row in shown_rows],
            "name": [pictures.names[row] for row in shown_rows],
        }
    )
    return trials.drop(columns="name"), names


# ----------------------------------------------------------------------------------------- splits
def _split(
    root: Path,
    trials: pd.DataFrame,
    names: pd.DataFrame,
    test: tuple[str, int],
    val_images: int,
    seed: int,
) -> tuple[pd.Series, str]:
    """The column `split`, and what the protocol is called after it."""
    number_of_name = {
        key: image
        for name, image in zip(names["name"], names["image"], strict=True)
        for key in list_keys(name)
    }
    split = load_split_column(root, trials, number_of_name)
    if split is not None:
        return split, "splits"
    choice, n_test = test
    counts = trials["image"].value_counts()
    repeated = np.sort(counts.index[counts == counts.max()].to_numpy())
    has_repeated = len(repeated) < len(counts)
    if choice == "repeated" and not has_repeated:
        raise PerceptError(
            f"All images were shown {counts.max()} times, so that none is shown most often: choose"
            " test=random, or write splits.csv."
        )
    is_repeated = choice == "repeated" or (
        choice == "auto" and has_repeated and len(repeated) >= n_test
    )
    if is_repeated:
        test_ids, kind = repeated, f"repeated{len(repeated)}"
    else:
        test_ids = _draw_test(counts.index.to_numpy(), n_test, seed)
        kind = f"random{len(test_ids)}-seed{seed}"
    split = pd.Series(np.where(trials["image"].isin(test_ids), "test", "train"), trials.index)
    return choose_validation(trials.assign(split=split), val_images, seed), kind


def _draw_test(images: np.ndarray, n_test: int, seed: int) -> np.ndarray:
    """Test images drawn at random; a tenth where the default is more than half of them."""
    n_test = default_split_size(n_test, len(images), "test")
    if not 0 < n_test < len(images) - 1:
        raise PerceptError(
            f"test_images is {n_test}, but there are {len(images)} images: choose from 1 to"
            f" {max(1, len(images) - 2)}."
        )
    return np.random.default_rng([seed, 1]).choice(np.sort(images), n_test, replace=False)


# ----------------------------------------------------------------------------------------- voxels
def _select_columns(
    root: Path, label: str, betas: TrialFile, mask: str
) -> tuple[Places, np.ndarray]:
    """The places of the betas, and the columns that are read."""
    places = betas.places
    if not mask:
        columns = find_filled_columns(betas)
        if not len(columns):
            raise PerceptError(
                f"The first trial of {betas.path} is 0 or NaN everywhere: give the voxels to read"
                " with the option mask."
            )
        return places, columns
    paths = _find_maps(root, label, mask, ())
    if places.kind == "columns":
        places = _place_in_mask(places, paths, betas.path)
        if places.index is not None:
            return places, np.arange(places.size)
    values = load_map(paths, places, betas.path).values
    columns = np.flatnonzero(np.nan_to_num(values, nan=0) > 0)
    if not len(columns):
        raise PerceptError(f"{paths[0]} has no voxel above 0: give the voxels to read.")
    return places, columns


def _place_in_mask(places: Places, paths: list[Path], betas_path: Path) -> Places:
    """Betas of masked voxels, in C order, get the voxels of their mask as places."""
    if not paths[0].name.endswith((".nii", ".nii.gz")):
        return places
    grid = _read_grid(paths[0])
    values = load_map(paths, grid, paths[0]).values
    index = np.flatnonzero(np.nan_to_num(values, nan=0) > 0)
    if len(index) != places.size:
        raise PerceptError(
            f"{betas_path} has {places.size} columns, {paths[0]} has {len(index)} voxels above 0:"
            " give the mask with which these betas were made."
        )
    return replace(grid, index=index)


def _read_grid(path: Path) -> Places:
    return open_trials(path).places


def _make_voxels(
    places: Places, columns: np.ndarray, paths: list[Path], rois: str, betas_path: Path
) -> tuple[np.ndarray, pd.DataFrame]:
    """The columns that are kept, and their table: regions and coordinates."""
    masks = load_regions(paths, places, betas_path)
    selected = parse_name_list(rois)
    check_rois(selected, masks, f"The subject of {betas_path}")
    if selected:
        is_selected = np.any([masks[name] for name in selected], axis=0)
        columns = columns[is_selected[columns]]
    if not len(columns):
        raise PerceptError(f"No voxel of the mask is in {rois}: choose other rois.")
    table = make_roi_columns({name: mask[columns] for name, mask in masks.items()}, len(columns))
    return columns, table.join(places.describe(columns)).assign(flat_sessions=0)
