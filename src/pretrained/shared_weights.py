"""Weights that several of the committed miniatures have in common are stored once.

The miniatures share tensors to the bit: four pipelines one autoencoder, three networks their
convolutions, several models CLIP's encoders. In a folder of models, `shared_weights.json` says
which tensors a file leaves out and where they lie. `complete_model` puts them back into a folder of
its own, which the libraries then read as if nothing had been left out.
`tools/share_mini_weights.py` writes it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from src.files.ownership import lock_folder, replace_folder
from src.utils import PerceptError, atomic, open_tensors, read_json

MANIFEST = "shared_weights.json"
REMEDY = "restore data/mini_models from git"


def complete_model(folder: Path, cache: Path) -> Path:
    """The folder of a model with all of its weights.

    Args:
        folder: of the model; the folder above it may hold shared weights.
        cache: where complete models are kept; the name of the copy holds the hash of its weights.

    Returns:
        `folder` itself where nothing was left out of it, else a folder in `cache`.

    Raises:
        PerceptError: if shared weights are missing or are not those that were left out.
    """
    entries = read_entries(folder)
    if not entries:
        return folder
    hashes = "".join(entry["sha256"] for entry in entries.values())
    target = cache / f"{folder.name}-{hashlib.sha256(hashes.encode()).hexdigest()[:12]}"
    if target.is_dir() and _is_whole(folder, entries, target):
        return target
    with lock_folder(target, f"completing {folder.name}", wait=True, as_sibling=True):
        if not target.is_dir() or not _is_whole(folder, entries, target):  # missing or damaged
            with replace_folder(target) as temporary:
                _assemble(folder, entries, temporary)
    return target


def _is_whole(folder: Path, entries: Mapping[str, Any], target: Path) -> bool:
    """Whether a complete copy of a model has all its files, none of them cut off."""
    for source in folder.rglob("*"):
        name = source.relative_to(folder).as_posix()
        copy = target / name
        if name in entries or source.is_dir():
            continue
        if not copy.is_file() or copy.stat().st_size != source.stat().st_size:
            return False
    try:
        for path in entries:
            with open_tensors(target / path):
                pass  # its head is compared with its size
    except PerceptError:
        return False
    return True


def read_entries(folder: Path) -> dict[str, Any]:
    """What was left out of a model's files.

    Returns:
        By the file's path below `folder`: `sha256` of the complete file, and `tensors`, by name the
        file (below the folder above) and the name there.
    """
    manifest = folder.parent / MANIFEST
    if not manifest.exists():
        return {}
    prefix = f"{folder.name}/"
    entries = {
        path.removeprefix(prefix): entry
        for path, entry in read_json(manifest, keys=(), remedy=REMEDY).items()
        if path.startswith(prefix)
    }
    for entry in entries.values():
        if not isinstance(entry, dict) or not {"sha256", "tensors"} <= entry.keys():
            raise PerceptError(f"{manifest} lists weights without their sha256: {REMEDY}.")
    return entries


def read_tensors(path: Path, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all of them or some under other names.

    Args:
        path: the file.
        names: by the name that a tensor gets, its name in the file.
    """
    with open_tensors(path, remedy=REMEDY) as file:
        if names is None:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: file.get_tensor(stored) for name, stored in names.items()}


def complete_file(root: Path, path: Path, entry: Mapping[str, Any], target: Path) -> None:
    """Write a file with the tensors that were left out of it.

    Args:
        root: folder of all models.
        path: the file as it is stored.
        entry: of the manifest.
        target: where the complete file is written.

    Raises:
        PerceptError: if the result is not the file that tensors were left out of.
    """
    tensors = read_tensors(path)
    sources: dict[str, dict[str, str]] = {}
    for name, (source, stored) in entry["tensors"].items():
        sources.setdefault(source, {})[name] = stored
    for source, names in sources.items():
        tensors |= read_tensors(root / source, names)
    with open_tensors(path, remedy=REMEDY) as file:
        metadata = file.metadata()
    with atomic(target) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    if compute_sha256(target) != entry["sha256"]:
        raise PerceptError(
            f"The weights that {path} shares with others have changed since they were left out of"
            f" it: {REMEDY}."
        )


def compute_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _assemble(folder: Path, entries: Mapping[str, Any], target: Path) -> None:
    """Copy a model's folder, its files completed; it may be one that nobody may write."""
    for source in sorted(folder.rglob("*")):
        copy = target / source.relative_to(folder)
        if source.is_dir():
            copy.mkdir()
        else:
            shutil.copyfile(source, copy)
    for path, entry in entries.items():
        try:
            complete_file(folder.parent, folder / path, entry, target / path)
        except (OSError, KeyError, ValueError) as error:
            raise PerceptError(
                f"{folder / path} shares weights that cannot be read ({error}): {REMEDY}."
            ) from error
