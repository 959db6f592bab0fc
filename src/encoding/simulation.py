"""Simulated measurements: what a brain would have answered to images that nobody saw in a scanner.

A simulated trial is the response that the encoding model predicts to an image, and a draw of noise
with the covariance of that model's out-of-fold residuals. `MeasuredAndSimulated` mixes such trials
with measured ones, and is what `fit` trains a decoder on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from src.data.batches import BrainDataset
from src.data.identity import Identity
from src.encoding.noise import NoiseModel
from src.utils import PerceptError, progress

IMAGES_AT_ONCE = 1024

# what distinguishes the random numbers of one purpose from those of another
ORDER_OF_IMAGES, ORDER_OF_TRIALS, CHOICE_OF_NOISE = range(3)


def simulate_responses(
    predict: Callable[[np.ndarray], Tensor], image_ids: np.ndarray, what: str = "measuring images"
) -> np.ndarray:
    """Responses of an encoding model to images, without noise.

    Args:
        predict: image ids (n,) -> responses (n, voxels).
        image_ids: (images,).
        what: name of the progress bar.

    Returns:
        float16 (images, voxels): half precision, as the noise is a thousand times its rounding.

    Raises:
        PerceptError: if a response is not finite in half precision.
    """
    blocks = []
    for start in progress(range(0, len(image_ids), IMAGES_AT_ONCE), what):
        block = predict(image_ids[start : start + IMAGES_AT_ONCE])
        blocks.append(block.half().cpu().numpy())
    responses = np.concatenate(blocks)
    if not np.isfinite(responses).all():
        raise PerceptError(
            "The encoding model predicts responses that are not finite in half precision: train it"
            " again (notebook 01_train_encoder) on z-scored voxels."
        )
    return responses


def draw_noise_bank(noise: NoiseModel, count: int, seed: int = 42) -> np.ndarray:
    """Draws of noise that are made once and used again at random, float16 (count, voxels).

    Raises:
        PerceptError: for no draw at all.
    """
    if count < 1:
        raise PerceptError(f"{count} draws of noise were asked for: make at least 1.")
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in progress(range(0, count, IMAGES_AT_ONCE), "drawing noise"):
        size = min(IMAGES_AT_ONCE, count - start)
        blocks.append(noise.draw(size, generator).half().cpu().numpy())
    return np.concatenate(blocks)


class MeasuredAndSimulated:
    """Single trials to train on, some measured and some simulated, as `fit` takes them.

    `__getitems__` gives {"voxels": float32 (batch, voxels), "components": float32 (batch,
    components), "simulated": bool (batch,)}. Samples 0 to n_measured - 1 of an epoch are measured
    trials, the others are simulated; the order of `fit` mixes them. Both walk through their trials
    or images in random order, and begin the next round where an epoch ends, so that all are shown
    equally often whatever the length of an epoch.

    Args:
        measured: training trials, each a sample by itself (repeats="each").
        measured_components: of the target of each of these trials, float32 (trials, components).
        responses: of the encoding model to the images of the pool, (images, voxels).
        pool_components: of the targets of these images, float32 (images, components).
        noise: draws (draws, voxels), one of which is added to each response.
        samples: of an epoch.
        measured_share: share of the samples that are measured, from 0 to 1.
        seed: of everything random.

    Raises:
        PerceptError: for arrays that do not match, or a share that leaves nothing to train on.
    """

    def __init__(
        self,
        measured: BrainDataset,
        measured_components: np.ndarray,
        responses: np.ndarray,
        pool_components: np.ndarray,
        noise: np.ndarray,
        samples: int,
        measured_share: float = 0.3,
        seed: int = 42,
    ):
        if not 0 <= measured_share <= 1:
            raise PerceptError(f"The measured share is {measured_share}: choose it from 0 to 1.")
        self.measured, self.measured_components = measured, measured_components
        self.responses, self.pool_components = responses, pool_components
        self.noise, self.samples, self.seed = noise, samples, seed
        self.n_measured = round(measured_share * samples)
        self.epoch = 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._check_sizes()

    def _check_sizes(self) -> None:
        pairs = {
            "measured trials": (len(self.measured), len(self.measured_components)),
            "images of the pool": (len(self.responses), len(self.pool_components)),
        }
        for name, (n_inputs, n_targets) in pairs.items():
            if n_inputs != n_targets:
                raise PerceptError(f"There are {n_inputs} {name} and targets of {n_targets}.")
        if self.n_measured < self.samples and not (len(self.responses) and len(self.noise)):
            raise PerceptError(
                "Nothing can be simulated without images and noise: give a pool and draws, or set"
                " the measured share to 1."
            )

    def __len__(self) -> int:
        return self.samples

    @property
    def identity(self) -> Identity:
        """What the prepared data are, as of `BrainDataset`."""
        return self.measured.identity

    def set_epoch(self, epoch: int) -> None:
        """Go on to the trials and images of that epoch."""
        self.epoch = int(epoch)
        self.measured.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch by positions in the epoch; measured trials come first in it."""
        positions = np.asarray(indices, np.int64)
        is_measured = positions < self.n_measured
        real, imagined = positions[is_measured], positions[~is_measured] - self.n_measured
        parts = [self._read_measured(real), self._simulate(imagined)]
        voxels = torch.cat([part[0] for part in parts])
        components = torch.cat([part[1] for part in parts])
        simulated = torch.arange(len(positions)) >= len(real)
        return {"voxels": voxels, "components": components, "simulated": simulated}

    def _read_measured(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = self._walk(positions, self.n_measured, len(self.measured), ORDER_OF_TRIALS)
        components = torch.from_numpy(self.measured_components[rows])
        if not len(rows):
            return torch.empty(0, self.responses.shape[1]), components
        return self.measured.__getitems__(rows.tolist())["voxels"], components

    def _simulate(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        per_epoch = self.samples - self.n_measured
        rows = self._walk(positions, per_epoch, len(self.responses), ORDER_OF_IMAGES)
        order = self._get_order(CHOICE_OF_NOISE, self.epoch, per_epoch, len(self.noise))
        responses = torch.from_numpy(self.responses[rows]).float()
        draws = torch.from_numpy(self.noise[order[positions]]).float()
        return responses + draws, torch.from_numpy(self.pool_components[rows])

    def _walk(self, positions: np.ndarray, per_epoch: int, count: int, purpose: int) -> np.ndarray:
        """Rows (n,) of `count` that stand at positions (n,) of this epoch, when round after round
        of random permutations is walked through.
        """
        steps = self.epoch * per_epoch + positions
        rows = np.empty(len(steps), np.int64)
        if not len(steps):
            return rows
        rounds = steps // count
        for number in np.unique(rounds):
            order = self._get_order(purpose, int(number), count, 0)
            is_in_round = rounds == number
            rows[is_in_round] = order[steps[is_in_round] % count]
        return rows

    def _get_order(self, purpose: int, number: int, count: int, below: int) -> np.ndarray:
        """Random numbers (count,), a pure function of its arguments and the seed: a permutation, or
        with `below` draws from 0 to below - 1. Those of the last rounds are kept.
        """
        key = (purpose, number)
        if key not in self._orders:
            generator = np.random.default_rng([self.seed, purpose, number])
            for old in [k for k in self._orders if k[0] == purpose and k[1] < number - 1]:
                del self._orders[old]
            self._orders[key] = (
                generator.integers(0, below, count) if below else generator.permutation(count)
            )
        return self._orders[key]
