"""Which files of a source an index holds already, also where they were replaced or moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from src.search.embeddings import MAKE_AGAIN, read_checked
from src.search.images import SourceFiles, describe_file
from src.search.records import forget_parts, list_visible, metadata_path
from src.utils import atomic


def adopt_parts(folder: Path) -> list[dict[str, Any]]:
    """Return the record of the parts that an earlier version wrote without one."""
    parts = []
    for path in list_visible(folder / "img_emb", "img_emb_*.npy"):
        number = int(path.stem.removeprefix("img_emb_"))
        table = _read_columns(metadata_path(folder, number), ("image_path", "tar"))
        part = {"number": number, "rows": len(table), "name": table["image_path"][0]}
        if "tar" in table:
            part["tar"] = table["tar"][0]
        parts.append(part)
    return parts


def compare_parts(
    folder: Path, state: dict[str, Any], files: SourceFiles
) -> tuple[dict[str, Any], set[str]]:
    """Compare the recorded parts with the files of a source.

    Where a source was moved as a whole, the metadata of its parts is written anew with the place
    where it lies now. Parts of which a file was replaced are taken out of the record, as a whole.

    Args:
        folder: of the index, which the caller owns.
        state: its record, which is changed, and not written.
        files: of the source.

    Returns:
        The record, and the names, relative to the source, of the files that are in the index.
    """
    finished = set(state.get("done", []))
    replaced = []
    for part in state["parts"]:
        _follow_move(folder, part, files.root)
        names, is_replaced = _compare_part(folder, part, files)
        if is_replaced:
            replaced.append(part)
            finished -= set(names)
        else:
            finished |= set(names)
    forget_parts(state, [part["number"] for part in replaced if part["number"] is not None])
    state["parts"] = [part for part in state["parts"] if part not in replaced]
    return state, finished


def _compare_part(folder: Path, part: dict[str, Any], files: SourceFiles) -> tuple[list[str], bool]:
    """Return names of the files of a part, relative to the source, and whether any was replaced.

    Files of another source, or that are gone, are not replaced.
    """
    if "tar" in part:
        sizes, times = [part.get("file_size")], [part.get("file_time")]
        return _compare_files(files.root, [part["tar"]], sizes, times)
    table = _read_columns(
        metadata_path(folder, part["number"]), ("image_path", "file_size", "file_time")
    )
    unknown = [None] * len(table)
    sizes = list(table.get("file_size", unknown))
    times = list(table.get("file_time", unknown))
    return _compare_files(files.root, list(table["image_path"]), sizes, times)


def _compare_files(
    root: Path, paths: Sequence[str], sizes: Sequence[Any], times: Sequence[Any]
) -> tuple[list[str], bool]:
    names, is_replaced = [], False
    for path, size, time in zip(paths, sizes, times, strict=True):
        if not Path(path).is_relative_to(root):
            continue
        names.append(str(Path(path).relative_to(root)))
        current = describe_file(Path(path))
        if size is not None and current["file_size"] >= 0:
            is_replaced |= (current["file_size"], current["file_time"]) != (size, time)
    return names, is_replaced


def _read_columns(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """Read those of some columns that a file of metadata has."""
    schema = read_checked(path, MAKE_AGAIN, pq.read_schema)
    columns = [name for name in names if name in schema.names]
    return read_checked(path, MAKE_AGAIN, pq.read_table, columns=columns).to_pandas()


# ----------------------------------------------------------------------------------- moved sources
def _follow_move(folder: Path, part: dict[str, Any], root: Path) -> None:
    """Write where the images of a part are now, if all of its source was moved to `root`.

    It was, if nothing is left where it lay, and every file of the part is at the same place below
    `root`, with the same size.
    """
    old_root = Path(part.get("source", root))
    if old_root == root or old_root.exists():
        return
    if "tar" in part:
        tar = _move_path(part["tar"], old_root, root)
        if tar is None or describe_file(tar)["file_size"] != part["file_size"]:
            return
        part |= {"tar": str(tar)} | describe_file(tar)
    if part["number"] is not None and not _rewrite_metadata(folder, part, old_root, root):
        return
    part["source"] = str(root)


def _rewrite_metadata(folder: Path, part: dict[str, Any], old_root: Path, root: Path) -> bool:
    path = metadata_path(folder, part["number"])
    table = read_checked(path, MAKE_AGAIN, pq.read_table).to_pandas()
    if "tar" in part:
        table["tar"] = part["tar"]
    else:
        moved = [_move_path(file, old_root, root) for file in table["image_path"]]
        described = [describe_file(file) if file else {"file_size": -1} for file in moved]
        if [file["file_size"] for file in described] != list(table["file_size"]):
            return False
        table["image_path"] = list(map(str, moved))
        table["file_time"] = [file["file_time"] for file in described]
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)
    return True


def _move_path(path: str, old_root: Path, root: Path) -> Path | None:
    """Path below the new root; None for one that lay below neither."""
    if Path(path).is_relative_to(root):  # a call before this one was killed
        return Path(path)
    return root / Path(path).relative_to(old_root) if Path(path).is_relative_to(old_root) else None
