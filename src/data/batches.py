"""Batches of a subject's trials with their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from src.data.draws import choose_repeats, hash_images
from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import AugmentedTargets
from src.utils import PerceptError

REPEATS = ("random", "batch", "mean", "all", "each")


class BrainDataset(Dataset):
    """Map-style dataset over the images of a split.

    Item i is image `image_ids[i]`, or with repeats="each" a trial of it. `__getitems__` reads a
    whole batch at once: {"voxels": float32 (batch, voxels), or (batch, repeats, voxels) for
    repeats="all"; "image": int64 (batch,); "seed": int64 (batch,), for whatever a step draws for a
    sample, a pure function of (seed, epoch, image); "pixels": uint8 (batch, 3, height, width), with
    pixels=True; each target: float32 (batch, ...)}. In a DataLoader pass `collate_fn=lambda batch:
    batch`.

    Args:
        subject: from `open_subject`.
        split: train, val or test, or several joined by "+".
        targets: for each name what `cache_targets` or `cache_augmented_targets` gives, or an array whose rows
            are in the order of the samples, `dataset.image_ids`.
        normaliser: fitted on training trials, or None for the betas as they are.
        repeats: "random" (one, chosen by seed, epoch and image), "batch" (the published way: one
            number of repeat for all images of a batch), "mean", "all" (images with fewer than the
            most repeats start over), or "each" (every trial is a sample by itself, with the image
            that it shows).
        seed: of everything random.
        pixels: also read the images themselves.

    Raises:
        PerceptError: for an unknown option, an empty split, or targets of another length.
    """

    def __init__(
        self,
        subject: Subject,
        split: str,
        targets: dict[str, Any] | None = None,
        normaliser: Normaliser | None = None,
        repeats: str = "random",
        seed: int = 42,
        pixels: bool = False,
    ):
        if repeats not in REPEATS:
            raise PerceptError(f"repeats is {repeats!r}: choose one of {list(REPEATS)}.")
        self.subject, self.split, self.normaliser, self.repeats = (
            subject,
            split,
            normaliser,
            repeats,
        )
        self.pixels = pixels
        self.seed, self.epoch, self.targets = seed, 0, dict(targets or {})
        self._rows, self.image_ids = subject.rows_by_image(split), subject.image_ids(split)
        if repeats == "each":
            self.image_ids = np.repeat(self.image_ids, [len(rows) for rows in self._rows])
            self._rows = [row[None] for rows in self._rows for row in rows]
        self.counts = np.array([len(rows) for rows in self._rows])
        self._table = np.stack(
            [np.resize(rows, self.counts.max()) for rows in self._rows]
        )  # (images, repeats), cycled
        for name, target in self.targets.items():
            if name in ("voxels", "image", "seed", "pixels"):
                raise PerceptError(f"A target cannot be called {name}: the batch has that already.")
            if hasattr(target, "check"):
                target.check(self.image_ids)
            elif len(target) != len(self):
                raise PerceptError(
                    f"Target {name} has {len(target)} rows for the {len(self)} images of split"
                    f" {split}."
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw other repeats, views and seeds from now on."""
        self.epoch = int(epoch)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch of images by their positions in the split."""
        at = np.asarray(indices, dtype=np.int64)
        ids = self.image_ids[at]
        seeds = (hash_images(self.seed + 1, self.epoch, ids) >> np.uint64(1)).astype(np.int64)
        batch = {
            "voxels": torch.from_numpy(self._voxels(at)),
            "image": torch.from_numpy(ids),
            "seed": torch.from_numpy(seeds),
        }
        if self.pixels:
            batch["pixels"] = torch.from_numpy(self.subject.images(ids)).permute(0, 3, 1, 2)
        for name, target in self.targets.items():
            if isinstance(target, AugmentedTargets):
                rows = target.rows(ids, self.seed, self.epoch)
            else:
                rows = target.rows(ids) if hasattr(target, "rows") else target[at]
            batch[name] = torch.as_tensor(np.asarray(rows, dtype=np.float32))
        return batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One image, without the batch axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def _voxels(self, at: np.ndarray) -> np.ndarray:
        if self.repeats == "mean":
            return self.subject.average_rows([self._rows[i] for i in at], self.normaliser)
        if self.repeats == "all":
            rows = self._table[at]  # (batch, repeats)
            read = self.subject.get_betas(rows.ravel(), self.normaliser)
            return read.reshape(*rows.shape, *read.shape[1:])
        ids = (
            self.image_ids[at]
            if self.repeats == "random"
            else np.full(len(at), self.image_ids[at[0]])
        )
        chosen = choose_repeats(self.seed, self.epoch, ids, self.counts[at])
        return self.subject.get_betas(self._table[at, chosen], self.normaliser)
