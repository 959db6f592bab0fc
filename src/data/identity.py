"""What prepared data are, so that nothing made of other data is used again.

- `Subject.identity` says what a subject's data are: source, options, protocol, sessions, and the
  checksums of betas, trials, voxels and images. The checksums of betas and images are computed
  while they are written, the tables are small, so that it is cheap to read. Trainings, results and
  the stamps of run.py hold it.
- prepared.json, beside the betas, says how they were prepared (`Preparation`): by which reader,
  from which files, with which options, and what these files were. `explain_difference` compares it
  with what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from src.utils import PerceptError, write_json

RECORD_NAME = "prepared.json"

MAX_FILES = 200_000  # of a source; the first so many are looked at

# a file that names a subject, e.g. train_subj01_0.tar, sub-01/, Subject1.h5, CSI1_GLMbetas.mat
SUBJECT_NUMBER = re.compile(r"(?:subj|subject|sub-|csi)[_-]?0*(\d+)", re.IGNORECASE)

# what lies in the folder of a prepared data set
PREPARED_NAME = re.compile(
    r"subj\d+|targets|images\.h5|(captions|git_captions|labels|clusters-\w+)\.parquet"
)

Identity = dict[str, Any]


# --------------------------------------------------------------------------------- what data hold
def hash_table(table: pd.DataFrame) -> str:
    """Hash of a table: names, types and values of its columns, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in table.columns:
        values = table[name].to_numpy()
        digest.update(f"{name} {len(values)} ".encode())
        if values.dtype == object:
            digest.update("\0".join(map(str, values)).encode())
        else:
            digest.update(values.dtype.str.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def hash_images(image_ids: np.ndarray, checksums: np.ndarray) -> str:
    """Hash of images by their ids (images,) and the checksums of their pixels (images,)."""
    pairs = np.stack([np.asarray(image_ids, np.int64), np.asarray(checksums, np.int64)])
    return hashlib.blake2b(np.ascontiguousarray(pairs).tobytes(), digest_size=16).hexdigest()


def compare_identities(before: Identity, now: Identity) -> str:
    """Say in which entries two identities of data differ, "" where they are the same."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)


def find_identity(samples: Any) -> Identity:
    """What training samples are of: {"subj01": identity} of each subject.

    Args:
        samples: has an attribute `identity` (`BrainDataset`), or is a `Subset` of such; {} for any
            others.
    """
    identity = getattr(samples, "identity", None)
    if identity is None and hasattr(samples, "dataset"):
        return find_identity(samples.dataset)
    return dict(identity or {})


# ------------------------------------------------------------------------- what decoders stand on
def list_checkpoints(logs: str | Path) -> list[Path]:
    """The checkpoints in the folder of a run, and one folder below it."""
    folder = Path(logs)
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")])


def read_stored_config(checkpoint: Path) -> dict[str, Any]:
    """The config that is stored with a checkpoint.

    {} where there is none: whoever loads the file says what is wrong with it.
    """
    try:
        with safe_open(checkpoint, framework="np") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def check_trained_on(logs: str | Path, name: str, identity: Identity) -> None:
    """Refuse a run whose decoders were trained on other data than are prepared now.

    Args:
        logs: folder of the run, or of one voter.
        name: of the subject in the checkpoints, "subj01".
        identity: of the prepared subject.

    Raises:
        PerceptError: naming the checkpoint and what differs.
    """
    for path in list_checkpoints(logs):
        data = read_stored_config(path).get("data", {})
        trained_on = data.get(name) if isinstance(data, dict) else None
        if trained_on and (difference := compare_identities(trained_on, identity)):
            raise PerceptError(
                f"{path} was trained on other data than are prepared now ({difference}): train this"
                " run again with resume_from_ckpt False, or prepare the data of that training."
            )


def format_identity(identity: Identity) -> str:
    """An identity as one text, for the metadata of a file of tensors."""
    return json.dumps(identity, sort_keys=True)


def check_made_from(metadata: Mapping[str, str], identity: Identity, run: str) -> None:
    """Refuse reconstructions that were made from other data than are prepared now.

    Args:
        metadata: that is stored with them, "data" being of `format_identity`; those of an earlier
            version do not have it, and are taken as they are.
        identity: of the prepared subject.
        run: name of the run, for the message.

    Raises:
        PerceptError: saying what differs.
    """
    if "data" not in metadata:
        return
    if difference := compare_identities(json.loads(metadata["data"]), identity):
        raise PerceptError(
            f"The reconstructions of {run} were made from other data than are prepared now"
            f" ({difference}): run notebook 03 of this run again."
        )


# -------------------------------------------------------------------------- how data were prepared
@dataclass(frozen=True)
class Preparation:
    """How a subject was prepared, or is asked to be.

    Attributes:
        reader: of `READERS`, e.g. "mindeye".
        source: file or folder that was read.
        options: those of the reader that are not its defaults, as JSON values.
        world: size of the mini world that was simulated, {} for any other source.
        files: what the files of the source were, see `survey_files`.
    """

    reader: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)

    def describe(self) -> str:
        """In words, as it is said in messages."""
        if self.world:
            return f"the mini world ({_format_options(self.world)})"
        return f"{self.source} read by {self.reader}"


_current: ContextVar[Preparation | None] = ContextVar("current preparation", default=None)


@contextmanager
def preparing(preparation: Preparation) -> Iterator[None]:
    """Let subjects that are written within this context be recorded as prepared in this way."""
    token = _current.set(preparation)
    try:
        yield
    finally:
        _current.reset(token)


def write_preparation(folder: Path) -> None:
    """Write prepared.json into the folder of a subject that is being written, where a reader was
    called with `preparing`.
    """
    preparation = _current.get()
    if preparation is not None:
        write_json(folder / RECORD_NAME, asdict(preparation))


def read_preparation(folder: Path) -> Preparation | None:
    """How the subject in a folder was prepared; None where that is not known."""
    try:
        content = json.loads((folder / RECORD_NAME).read_text())
        return Preparation(**content)
    except (OSError, ValueError, TypeError):
        return None


def survey_files(
    source: str | Path, subj: int | None = None, dataset: Path | None = None
) -> dict[str, list[Any]]:
    """Size and time of the files of a source, as far as they concern a subject.

    Files that name another subject are passed over, where a subject is given. Names that differ in
    numbers alone (the shards of a data set, the sessions of a subject) are counted together. What
    is prepared in `dataset`, where that lies in the source, is no part of it.

    Returns:
        [number of files, hash of names, sizes and times] by name without its numbers; {} where
        there is nothing.
    """
    groups: dict[str, list[str]] = {}
    root = Path(source)
    for path in _iterate_files(root):
        name = path.name if path == root else path.relative_to(root).as_posix()
        if dataset is not None and _is_prepared(path, dataset):
            continue
        numbers = {int(number) for number in SUBJECT_NUMBER.findall(name)}
        if subj is not None and numbers and subj not in numbers:
            continue
        try:
            status = path.stat()
        except OSError:
            continue
        line = f"{name} {status.st_size} {status.st_mtime_ns}"
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(line)
    return {
        name: [len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]]
        for name, lines in sorted(groups.items())
    }


def _is_prepared(path: Path, dataset: Path) -> bool:
    """Whether a file belongs to the prepared layout of a data set."""
    if not path.is_relative_to(dataset):
        return False
    first = path.relative_to(dataset).parts[0]
    return PREPARED_NAME.fullmatch(first) is not None


def _iterate_files(root: Path) -> Iterator[Path]:
    """A file itself, or the files below a folder, through links, none that is hidden."""
    if root.is_file():
        yield root
        return
    n_files, seen = 0, set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                n_files += 1
                yield Path(folder, name)
        if n_files >= MAX_FILES:
            return


def find_changed_files(prepared: Preparation, source: str | Path, subj: int) -> str:
    """Which files of a source are others than when the subject was prepared, "" for none.

    Files that are gone are no others: data may be prepared on one machine and used on another. A
    further file counts where it is one of a numbered series that was read, such as a session.
    """
    current = survey_files(source, subj)
    for name, recorded in prepared.files.items():
        if name in current and current[name] != recorded:
            n_before, n_now = recorded[0], current[name][0]
            return name if n_before == n_now else f"{name} ({n_before} files then, {n_now} now)"
    if current and prepared.files and not set(current) & set(prepared.files):
        return next(iter(current))
    return ""


def explain_difference(prepared: Preparation | None, requested: Preparation, subj: int) -> str:
    """Say in what a preparation that is asked for differs from the one that is there, "" if not.

    Args:
        prepared: of `read_preparation`.
        asked: without its files, which are looked at here.
        subj: number of the subject.
    """
    if prepared is None:
        return "how they were prepared is not recorded"
    description = f"they are {prepared.describe()}"
    if (prepared.reader, bool(prepared.world)) != (requested.reader, bool(requested.world)):
        return f"{description}, and {requested.describe()} is asked for"
    before = prepared.options | prepared.world
    now = requested.options | requested.world
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        holds, wants = (
            _format_options({name: options.get(name, "its default") for name in names})
            for options in (before, now)
        )
        return f"{description} with {holds}, and {wants} is asked for"
    if not requested.world and (changed := find_changed_files(prepared, requested.source, subj)):
        return f"{description}, and {requested.source} has other files now: {changed}"
    return ""


def _format_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))


def describe_options(prepared: Preparation | None) -> str:
    """The options of a preparation in one line, e.g. "sessions=1"; "" where none is known."""
    if prepared is None:
        return ""
    options = {**prepared.options, **prepared.world}
    options.pop("attributes", None)  # source and protocol, which stand beside them
    return _format_options(options)
