"""Batches of a subject's trials with their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from src.data.draws import choose_repeats, hash_images
from src.data.files import Ids
from src.data.identity import Identity
from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import AugmentedTargets
from src.utils import PerceptError

if TYPE_CHECKING:
    import torch

REPEATS = ("random", "batch", "mean", "all", "each")

RESERVED = ("voxels", "image", "seed", "pixels")  # names in a batch that no target may have


@runtime_checkable
class TargetsById(Protocol):
    """Targets that are looked up by image id, as `TargetCache` and `LatentFile`."""

    def check(self, image_ids: Ids) -> None:
        """Raise PerceptError if the target of one of these images is missing."""

    def rows(self, image_ids: Ids) -> np.ndarray:
        """Targets (n, ...) by image id."""


Target = AugmentedTargets | TargetsById | np.ndarray


class BrainDataset:
    """Map-style dataset of PyTorch over the images of a split.

    Item i is image `image_ids[i]`, or with repeats="each" a trial of it. `__getitems__` reads a
    whole batch at once: {"voxels": float32 (batch, voxels), or (batch, repeats, voxels) for
    repeats="all"; "image": int64 (batch,); "seed": int64 (batch,), for whatever a step draws for a
    sample, a pure function of (seed, epoch, image); "pixels": uint8 (batch, 3, height, width), with
    pixels=True; each target: float32 (batch, ...)}. In a DataLoader pass `collate_fn=lambda batch:
    batch`.

    Args:
        subject: from `open_subject`.
        split: train, val or test, or several joined by "+".
        targets: for each name what `cache_targets` or `cache_augmented_targets` gives, or an array
            whose rows are in the order of the samples, `dataset.image_ids`.
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
        targets: Mapping[str, Target] | None = None,
        normaliser: Normaliser | None = None,
        repeats: str = "random",
        seed: int = 42,
        pixels: bool = False,
    ):
        if repeats not in REPEATS:
            raise PerceptError(f"repeats is {repeats!r}: choose one of {list(REPEATS)}.")
        self.subject, self.split, self.normaliser = subject, split, normaliser
        self.repeats, self.pixels, self.seed = repeats, pixels, seed
        self.epoch = 0
        self.targets: dict[str, Target] = dict(targets or {})
        groups, self.image_ids = subject.rows_by_image(split), subject.image_ids(split)
        if repeats == "each":
            self.image_ids = np.repeat(self.image_ids, [len(rows) for rows in groups])
            groups = list(np.concatenate(groups)[:, None])
        self._groups = groups
        self.counts = np.array([len(rows) for rows in groups])
        # (samples, repeats), rows of the betas; samples with fewer repeats start over
        self._cycled = np.stack([np.resize(rows, self.counts.max()) for rows in groups])
        self._check_targets()

    def _check_targets(self) -> None:
        for name, target in self.targets.items():
            if name in RESERVED:
                raise PerceptError(f"A target cannot be called {name}: the batch has that already.")
            if isinstance(target, AugmentedTargets | TargetsById):
                target.check(self.image_ids)
            elif len(target) != len(self):
                raise PerceptError(
                    f"Target {name} has {len(target)} rows for the {len(self)} images of split"
                    f" {self.split}."
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def identity(self) -> Identity:
        """What the prepared data are: {"subj01": `Subject.identity`}."""
        return {self.subject.key: self.subject.identity}

    def set_epoch(self, epoch: int) -> None:
        """Draw other repeats, views and seeds from now on."""
        self.epoch = int(epoch)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch of images by their positions in the split."""
        import torch

        positions = np.asarray(indices, dtype=np.int64)
        ids = self.image_ids[positions]
        hashes = hash_images(self.seed + 1, self.epoch, ids)
        seeds = (hashes >> np.uint64(1)).astype(np.int64)
        batch = {
            "voxels": torch.from_numpy(self._read_voxels(positions)),
            "image": torch.from_numpy(ids),
            "seed": torch.from_numpy(seeds),
        }
        if self.pixels:
            batch["pixels"] = torch.from_numpy(self.subject.images(ids)).permute(0, 3, 1, 2)
        for name, target in self.targets.items():
            rows = self._read_target(target, positions)
            # torch makes single of half precision in a tenth of the time of numpy
            batch[name] = torch.as_tensor(rows).float()
        return batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One image, without the batch axis."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def _read_target(self, target: Target, positions: np.ndarray) -> np.ndarray:
        ids = self.image_ids[positions]
        if isinstance(target, AugmentedTargets):
            return target.rows(ids, self.seed, self.epoch)
        if isinstance(target, TargetsById):
            return target.rows(ids)
        return np.asarray(target[positions])

    def _read_voxels(self, positions: np.ndarray) -> np.ndarray:
        if self.repeats == "mean":
            groups = [self._groups[position] for position in positions]
            return self.subject.average_rows(groups, self.normaliser)
        if self.repeats == "all":
            rows = self._cycled[positions]  # (batch, repeats)
            betas = self.subject.get_betas(rows.ravel(), self.normaliser)
            return betas.reshape(*rows.shape, *betas.shape[1:])
        ids = self.image_ids[positions]
        if self.repeats != "random":  # as for the first image of the batch
            ids = np.full(len(positions), ids[0])
        chosen = choose_repeats(self.seed, self.epoch, ids, self.counts[positions])
        return self.subject.get_betas(self._cycled[positions, chosen], self.normaliser)
