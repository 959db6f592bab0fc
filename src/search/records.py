"""index.json: the record of what we wrote into the folder of an index.

A folder may hold files of clip-retrieval, or of anyone. What counts as ours is what index.json
lists; nothing else is changed, moved or removed.

    encoder    what made the embeddings that we wrote
    parts      the files img_emb/img_emb_<number>.npy and metadata/metadata_<number>.parquet that we
               wrote, with the tar file or the images that they are of
    unwritten  numbers of parts whose files do not count: they are being written, or were replaced
    unread     images that could not be read, and their names (the first ones)
    index      type and folder of the faiss index that we built (`src.search.building`)
    shards     rows [start, stop) of each of its files

A part is written in three steps: its number is recorded as unwritten, its two files are written,
and it is recorded among the parts. So a call that is killed leaves files that do not count, and
that the next call removes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.utils import PerceptError, read_json

# The sections of index.json and their types. A file without any of the first four is not ours.
SECTIONS: dict[str, type] = {
    "parts": list,
    "done": list,  # of earlier versions: tar files that are embedded
    "index": dict,
    "encoder": dict,
    "unwritten": list,
    "unread": int,
    "shards": list,
}
OWN_SECTIONS = ("parts", "done", "index", "encoder")

# folders of a faiss index: clip-retrieval's name, and ours where that one is taken by others
INDEX_FOLDERS = ("image.index", "percept.index")

REMEDY = (
    "copy it again, or take it away, after which the folder counts as one whose encoder is unknown"
)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read the record of a folder; {} where there is none, or an index.json that is not ours.

    Raises:
        PerceptError: naming index.json, if it cannot be read or is damaged.
    """
    path = Path(folder) / "index.json"
    if not path.exists():
        return {}
    state = read_json(path, remedy=REMEDY)
    if not _is_ours(state):
        return {}
    for name, kind in SECTIONS.items():
        if name in state and not isinstance(state[name], kind):
            raise _describe_damage(path, f"{name} is no {kind.__name__}")
    if not all(_is_part(part) for part in state.get("parts", [])):
        raise _describe_damage(path, "a part has no number of rows, or no number")
    if not all(_is_range(shard) for shard in state.get("shards", [])):
        raise _describe_damage(path, "a shard is no pair of rows")
    return dict(state)


def check_writable(folder: str | Path) -> None:
    """Refuse a folder whose index.json somebody else wrote.

    Raises:
        PerceptError: naming index.json.
    """
    path = Path(folder) / "index.json"
    if path.exists() and not _is_ours(read_json(path, remedy=REMEDY)):
        raise PerceptError(
            f"{path} was not written by this program, and is not replaced: give another folder for"
            " the index."
        )


def _is_ours(state: Any) -> bool:
    return isinstance(state, dict) and any(name in state for name in OWN_SECTIONS)


def _describe_damage(path: Path, damage: str) -> PerceptError:
    return PerceptError(f"{path} is damaged ({damage}): {REMEDY}.")


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or type(part.get("rows")) is not int or part["rows"] < 0:
        return False
    number = part.get("number")
    return type(number) is int if part["rows"] else number is None or type(number) is int


def _is_range(shard: Any) -> bool:
    is_pair = isinstance(shard, list) and len(shard) == 2 and all(type(i) is int for i in shard)
    return is_pair and 0 <= shard[0] < shard[1]


# ------------------------------------------------------------------------------------------- files
def embeddings_path(folder: Path, number: int) -> Path:
    """Path of the embeddings of one of our parts."""
    return folder / "img_emb" / f"img_emb_{number:06d}.npy"


def metadata_path(folder: Path, number: int) -> Path:
    """Path of the metadata of one of our parts."""
    return folder / "metadata" / f"metadata_{number:06d}.parquet"


def list_visible(folder: Path, pattern: str) -> list[Path]:
    """List the files of a pattern, sorted, without hidden ones such as a Mac's ._ files."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def list_embeddings(folder: str | Path) -> list[Path]:
    """List the files of embeddings that count, in the order of their rows.

    Those are the recorded parts where there is a record of parts, else all of img_emb/.

    Raises:
        PerceptError: a recorded file is missing, or one lies beside them that is not recorded.
    """
    folder = Path(folder)
    files = list_visible(folder / "img_emb", "*.npy")  # before the record, which only grows
    return _choose_files(folder, files, embeddings_path)


def list_metadata(folder: str | Path) -> list[Path]:
    """List the files of metadata that count, in the order of their rows, as `list_embeddings`."""
    folder = Path(folder)
    files = list_visible(folder / "metadata", "*.parquet")
    return _choose_files(folder, files, metadata_path)


def _choose_files(folder: Path, existing: list[Path], name_file: Any) -> list[Path]:
    state = read_state(folder)
    if "parts" not in state:
        return existing
    recorded = [name_file(folder, number) for number in list_numbers(state)]
    uncounted = {name_file(folder, number) for number in state.get("unwritten", [])}
    missing = [path for path in recorded if not path.exists()]
    if missing:
        raise PerceptError(
            f"{missing[0]} is missing, which {folder / 'index.json'} records: copy it again, or"
            " make the index in another folder."
        )
    foreign = sorted(set(existing) - set(recorded) - uncounted)
    if foreign:
        raise PerceptError(
            f"{foreign[0]} is not among the files that {folder / 'index.json'} records, so that"
            " nobody knows whether its rows count: take it away."
        )
    return recorded


def list_numbers(state: dict[str, Any]) -> list[int]:
    """Numbers of the recorded parts that have files, in the order of their rows."""
    return sorted(part["number"] for part in state["parts"] if part["number"] is not None)


def remove_unwritten(folder: Path, state: dict[str, Any]) -> None:
    """Remove the files of parts that do not count; the caller owns the folder and records it."""
    for number in state.get("unwritten", []):
        for path in (embeddings_path(folder, number), metadata_path(folder, number)):
            path.unlink(missing_ok=True)
    state["unwritten"] = []


def prepare_folder(folder: Path) -> None:
    """Make a folder, or remove the half-written files that a killed call left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.tmp"):
        unfinished.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- faiss index
def find_own_index(folder: Path, state: dict[str, Any]) -> Path | None:
    """Return the folder of the faiss index that we built, if there is one."""
    if "index" not in state:
        return None
    name = state["index"].get("folder", INDEX_FOLDERS[0])
    path = folder / name
    return path if name in INDEX_FOLDERS and path.is_dir() else None


def list_own_shards(folder: Path, state: dict[str, Any]) -> list[Path]:
    """List the files of our faiss index that are recorded as built, in the order of their rows."""
    own_index = find_own_index(folder, state)
    if own_index is None:
        return []
    starts = sorted(shard[0] for shard in state.get("shards", []))
    shard_rows = max(1, state["index"].get("shard_rows", 1))
    return [own_index / f"{start // shard_rows:04d}.index" for start in starts]


def choose_index_folder(folder: Path, state: dict[str, Any]) -> Path:
    """Choose where our faiss index lies: image.index, or percept.index beside one of others."""
    own_index = find_own_index(folder, state)
    if own_index is not None:
        return own_index
    is_taken = os.path.lexists(folder / INDEX_FOLDERS[0])
    return folder / INDEX_FOLDERS[1 if is_taken else 0]


def find_foreign_index(folder: str | Path) -> Path | None:
    """Return the image.index of a folder that we did not build, if there is one."""
    folder = Path(folder)
    path = folder / INDEX_FOLDERS[0]
    if not path.exists() or find_own_index(folder, read_state(folder)) == path:
        return None
    if path.is_dir() and not list_visible(path, "*.index"):
        return None
    return path


def needs_building(folder: str | Path, kind: str = "auto") -> bool:
    """Whether a folder needs a faiss index of ours before it can be searched.

    A folder with an index that somebody else built is searched as it is, unless a kind is asked
    for.

    Args:
        folder: of an index.
        kind: "auto", or one of INDEX_KINDS.
    """
    folder = Path(folder)
    if not (folder / "img_emb").is_dir():
        return False
    own_index = find_own_index(folder, read_state(folder))
    return own_index is not None or kind != "auto" or find_foreign_index(folder) is None


def first_rows(state: dict[str, Any]) -> dict[int, int]:
    """Number of the first row of each recorded part, by the number of the part."""
    rows = {part["number"]: part["rows"] for part in state["parts"]}
    starts, start = {}, 0
    for number in list_numbers(state):
        starts[number] = start
        start += rows[number]
    return starts


def forget_parts(state: dict[str, Any], numbers: Iterable[int]) -> None:
    """Take parts out of the record, and with them the shards that hold their rows or later ones."""
    numbers = set(numbers)
    starts = first_rows(state)
    kept_rows = min((starts[number] for number in numbers if number in starts), default=None)
    state["parts"] = [part for part in state["parts"] if part["number"] not in numbers]
    state["unwritten"] = sorted({*state.get("unwritten", []), *numbers})
    if kept_rows is not None and "shards" in state:
        state["shards"] = [shard for shard in state["shards"] if shard[1] <= kept_rows]
