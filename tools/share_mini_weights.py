"""Store the weights that several miniatures have in common once, or give every file its own again.

    python tools/share_mini_weights.py              # after training and exporting miniatures
    python tools/share_mini_weights.py --complete   # before training one of them again

How files with shared weights are read: src/pretrained/shared_weights.py.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.pretrained.shared_weights import (
    MANIFEST,
    complete_file,
    compute_sha256,
    read_tensors,
)
from src.utils import ROOT, atomic, read_json, write_json

MIN_BYTES = 4096  # smaller tensors are not worth an entry
KEEPERS = ("clip", "versatile_diffusion")  # the models of `make demo`, which stay complete


def share_weights(root: Path) -> int:
    """Leave tensors out of files where an earlier file has the same; returns the bytes saved.

    The models of KEEPERS come first and keep what others share, then the others by their paths.
    """
    complete_weights(root)
    first_places: dict[str, tuple[str, str]] = {}
    manifest: dict[str, Any] = {}
    n_saved = 0
    for name in sorted(list_weights(root), key=rank_model):
        path = root / name
        is_kept = name.split("/")[0] in KEEPERS
        remaining: dict[str, Tensor] = {}
        left_out: dict[str, tuple[str, str]] = {}
        for key, tensor in read_tensors(path).items():
            place = first_places.setdefault(fingerprint_tensor(tensor), (name, key))
            if place[0] != name and tensor.nbytes >= MIN_BYTES and not is_kept:
                left_out[key] = place
            else:
                remaining[key] = tensor
        if left_out:
            manifest[name] = {"sha256": compute_sha256(path), "tensors": left_out}
            n_saved += replace_tensors(path, remaining)
    write_json(root / MANIFEST, manifest)
    return n_saved


def list_weights(root: Path) -> list[str]:
    """Paths below `root` of all files of weights."""
    return [path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")]


def rank_model(name: str) -> tuple[int, str]:
    """The order in which files are taken."""
    model = name.split("/")[0]
    rank = KEEPERS.index(model) if model in KEEPERS else len(KEEPERS)
    return rank, name


def complete_weights(root: Path) -> None:
    """Put back what was left out of files, and remove the manifest."""
    manifest = root / MANIFEST
    if not manifest.exists():
        return
    for name, entry in read_json(manifest).items():
        with atomic(root / name) as temporary:
            complete_file(root, root / name, entry, temporary)
    manifest.unlink()


def replace_tensors(path: Path, tensors: dict[str, Tensor]) -> int:
    """Rewrite a file with these tensors alone; returns the bytes by which it became smaller."""
    n_before = path.stat().st_size
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return n_before - path.stat().st_size


def fingerprint_tensor(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(content.tobytes())
    return digest.hexdigest()


def main() -> None:
    """Parse the command line and rewrite the files of data/mini_models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--complete", action="store_true", help="give every file its own weights")
    parser.add_argument("--root", type=Path, default=ROOT / "data" / "mini_models")
    arguments = parser.parse_args()
    if arguments.complete:
        complete_weights(arguments.root)
        return
    print(f"{share_weights(arguments.root) / 1e6:.1f} MB less")


if __name__ == "__main__":
    main()
