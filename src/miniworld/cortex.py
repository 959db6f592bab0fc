"""The simulated visual cortex and its experiment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.miniworld.drawing import CATEGORIES, SCENES
from src.miniworld.images import (
    COLOURS,
    IMAGE_SIZE,
    LIGHTS,
    PATTERNS,
    PLACES,
    ImageContent,
    compose_image,
    make_tables,
    render_blocks,
    render_image,
    shared_seed,
)
from src.utils import PerceptError

# Fixed before any decoder was trained on it, and not tuned to a decoder's scores since.
N_VOXELS = {
    1: 1572,
    2: 1428,
    3: 1523,
    4: 1315,
    5: 1304,
    6: 1791,
    7: 1268,
    8: 1439,
}  # a tenth of NSD's nsdgeneral, subjects 1-8

# share of the voxels; receptive field (sd, fraction of the image); cycles a field; mean
# single-trial noise ceiling
AREAS = {
    "V1": (0.20, 0.055, 1.0, 0.23),
    "V2": (0.17, 0.08, 1.0, 0.20),
    "V3": (0.13, 0.11, 0.9, 0.17),
    "hV4": (0.12, 0.15, 0.7, 0.15),
    "LO": (0.14, None, None, 0.12),
    "EBA": (0.06, None, None, 0.12),
    "FFA": (0.06, None, None, 0.11),
    "PPA": (0.07, None, None, 0.13),
    "OPA": (0.05, None, None, 0.11),
}

_TASTES = {  # what the voxels of a higher area care about: weights of the groups of `_semantics`
    "LO": {"kind": 1.0, "place": 0.8, "size": 0.8, "pattern": 0.5, "colour": 0.5, "other": 0.6},
    "EBA": {"kind": 1.2, "other": 0.8, "size": 0.4},
    "FFA": {"kind": 1.2, "colour": 0.6, "other": 0.5},
    "PPA": {"scene": 1.3, "light": 0.7, "kind": 0.3},
    "OPA": {"scene": 1.0, "place": 0.7, "light": 0.5},
}

_CENTRES = {
    "V1": (0, -40, 0),
    "V2": (8, -38, 5),
    "V3": (15, -34, 9),
    "hV4": (20, -28, -8),
    "LO": (30, -30, 2),
    "EBA": (36, -24, 6),
    "FFA": (30, -16, -12),
    "PPA": (22, -12, -10),
    "OPA": (26, -30, 16),
}


def _semantics(everything: list[ImageContent]) -> dict[str, np.ndarray]:
    """What is in each image, as groups of indicator columns (images, columns)."""
    main = [what.objects[-1] for what in everything]
    other = np.zeros((len(everything), len(CATEGORIES)))
    for row, what in enumerate(everything):
        if len(what.objects) == 2:
            other[row, what.objects[0].category] = 0.7
    return {
        "scene": np.eye(len(SCENES))[[what.scene for what in everything]],
        "light": np.eye(len(LIGHTS))[[what.light for what in everything]],
        "kind": np.eye(len(CATEGORIES))[[t.category for t in main]],
        "colour": np.eye(len(COLOURS))[[t.colour for t in main]],
        "pattern": np.eye(len(PATTERNS))[[t.pattern for t in main]],
        "place": np.eye(len(PLACES))[[what.place for what in everything]],
        "size": np.array([[(t.half - 0.35) / 0.05] for t in main]),
        "other": other,
    }


@dataclass(frozen=True)
class Scan:
    """One subject's simulated experiment.

    Attributes:
        betas: float32 (trials, voxels), percent signal change, with trial noise and the drift of
            sessions.
        trials: one row a trial: trial, row (index into the images shown), session, run, repeat.
        voxels: one row a voxel: a Boolean column an area, x, y, z (mm), noise_ceiling (single
            trial, fraction of variance; the simulation's own).
    """

    betas: np.ndarray
    trials: pd.DataFrame
    voxels: pd.DataFrame


class VisualCortex:
    """A simulated visual cortex: image and what is in it -> noiseless responses; `scan` adds
    trials, noise and sessions.

    V1-hV4: quadrature pairs of Gabor filters in a receptive field, on luminance and two
    colour-opponent channels; the response is the square root of the energy (Adelson & Bergen 1985),
    mixed with a rectified response to the field's mean colour that grows from V1 to hV4. Higher
    areas: a random two-layer network with eight rectified conjunctions a voxel over what the image
    shows (scene, kind, colour, place, ...). Noise: independent plus a few shared components an
    area. Single-trial noise ceilings are drawn once a subject.

    Raises:
        PerceptError: for a subject that NSD does not have.
    """

    def __init__(self, subject: int, size: int = IMAGE_SIZE):
        if subject not in N_VOXELS:
            raise PerceptError(
                f"The mini world has subjects 1 to 8, not {subject}: choose subj among them."
            )
        self.rng = np.random.default_rng([69, subject])
        self.size, n = size, N_VOXELS[subject]
        share = np.array([area[0] for area in AREAS.values()])
        counts = np.floor(share * n).astype(int)
        counts[0] += n - counts.sum()
        self.roi = np.repeat(list(AREAS), counts)
        mean = np.array([AREAS[r][3] for r in self.roi])
        ceiling = self.rng.beta(2.5, 2.5 * (1 - mean) / mean).clip(0.005, 0.7)
        xyz = np.array([_CENTRES[r] for r in self.roi]) * self.rng.choice((-1, 1), n)[
            :, None
        ] ** np.array([1, 0, 0])
        xyz = xyz + self.rng.normal(0, 4, (n, 3))
        self.voxels = pd.DataFrame(
            {
                **{area: self.roi == area for area in AREAS},
                "x": xyz[:, 0],
                "y": xyz[:, 1],
                "z": xyz[:, 2],
                "noise_ceiling": ceiling,
            }
        ).round(4)
        self._build_early()
        self._build_higher()
        self.mean, self.sd = np.zeros(n, np.float32), np.ones(n, np.float32)
        self._calibrate()

    def _build_early(self) -> None:
        """Gabor pairs (2, early voxels, 3 * height * width) and colour fields, as matrices over
        opponent-channel pixels.
        """
        early = [r for r in self.roi if AREAS[r][1] is not None]
        n, rng = len(early), self.rng
        radius = 0.5 * np.sqrt(
            rng.random(n)
        )  # more voxels near the fovea than an even spread in area would give
        angle, phase_axis = rng.uniform(0, 2 * np.pi, n), rng.uniform(0, np.pi, n)
        x0, y0 = 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
        sd = np.array([AREAS[r][1] for r in early]) * (0.7 + 1.2 * radius)
        frequency = np.array([AREAS[r][2] for r in early]) / (2.5 * sd) * rng.uniform(0.6, 1.6, n)
        channels = rng.normal(size=(n, 3)) * np.array([1.0, 0.6, 0.6])
        channels /= np.linalg.norm(channels, axis=1, keepdims=True)
        y, x = (np.mgrid[: self.size, : self.size] + 0.5) / self.size
        dx, dy = x[None] - x0[:, None, None], y[None] - y0[:, None, None]
        envelope = np.exp(-(dx**2 + dy**2) / (2 * sd[:, None, None] ** 2))
        envelope /= np.sqrt((envelope**2).sum((1, 2), keepdims=True))
        turned = (
            2
            * np.pi
            * frequency[:, None, None]
            * (dx * np.cos(phase_axis)[:, None, None] + dy * np.sin(phase_axis)[:, None, None])
        )
        spread = lambda field: (
            (channels[:, :, None, None] * field[:, None]).reshape(n, -1).astype(np.float32)
        )  # noqa: E731
        self.even, self.odd = spread(envelope * np.cos(turned)), spread(envelope * np.sin(turned))
        self.even -= self.even.mean(1, keepdims=True)
        self.colour = spread(envelope / envelope.sum((1, 2), keepdims=True))
        self.colour_share = np.array(
            [{"V1": 0.25, "V2": 0.3, "V3": 0.35, "hV4": 0.6}[r] for r in early], np.float32
        )
        self.colour_bias = rng.normal(0, 0.05, n).astype(np.float32)

    def _build_higher(self) -> None:
        """Random conjunctions: weights (higher voxels, 8, columns of `_semantics`), biases and
        read-out (higher voxels, 8).
        """
        groups = _semantics([compose_image(0, 0)])
        higher = [r for r in self.roi if AREAS[r][1] is None]
        taste = np.array(
            [
                np.concatenate(
                    [np.full(v.shape[1], _TASTES[r].get(k, 0.0)) for k, v in groups.items()]
                )
                for r in higher
            ]
        )
        shape = (len(higher), 8, taste.shape[1])
        self.conjunctions = (self.rng.normal(size=shape) * taste[:, None]).astype(np.float32)
        self.threshold = self.rng.normal(0.4, 0.4, shape[:2]).astype(np.float32)
        self.readout = self.rng.normal(size=shape[:2]).astype(np.float32)

    def _calibrate(self) -> None:
        """Mean and sd of every voxel's signal over 600 images of the training split, so that signal
        has unit variance.
        """
        everything = [compose_image(12_345, i) for i in range(600)]
        signal = self.respond(
            np.stack([render_image(what, 12_345, self.size) for what in everything]), everything
        )
        self.mean, self.sd = signal.mean(0), signal.std(0) + 1e-6

    def respond(self, images: np.ndarray, everything: list[ImageContent]) -> np.ndarray:
        """Noiseless responses.

        Args:
            images: uint8 (images, height, width, 3).
            everything: what each of them shows.

        Returns:
            float32 (images, voxels), zero mean and unit variance over images like those of the
            training split.
        """
        rgb = images.reshape(len(images), -1, 3).astype(np.float32) / 255 - 0.5
        red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
        opponent = np.concatenate(
            [(red + green + blue) / 3, (red - green) / 2, (blue - (red + green) / 2) / 2], 1
        )  # (images, 3 * pixels)
        energy = np.sqrt((opponent @ self.even.T) ** 2 + (opponent @ self.odd.T) ** 2)
        colour = np.maximum(opponent @ self.colour.T + self.colour_bias, 0) * 8
        early = (1 - self.colour_share) * energy + self.colour_share * colour
        columns = np.concatenate(list(_semantics(everything).values()), 1).astype(np.float32)
        higher = np.stack(
            [
                (np.maximum(columns @ w.T - t, 0) @ r)
                for w, t, r in zip(self.conjunctions, self.threshold, self.readout, strict=True)
            ],
            1,
        )
        return (np.concatenate([early, higher], 1) - self.mean) / self.sd

    def scan(
        self, signal: np.ndarray, repeats: int = 3, trials_per_session: int = 420, seed: int = 0
    ) -> Scan:
        """Show every image `repeats` times in random order and measure.

        Args:
            signal: noiseless responses (images, voxels) from `respond`.
            repeats: presentations an image.
            trials_per_session: trials a session; the drift of a session is a gain and an offset a
                voxel.
            seed: of the order and of the noise.
        """
        n, v = signal.shape
        rng = np.random.default_rng([seed, v])
        row = rng.permutation(np.repeat(np.arange(n), repeats))
        trial = np.arange(len(row))
        session = trial // trials_per_session
        trials = pd.DataFrame(
            {
                "trial": trial,
                "row": row,
                "session": session,
                "run": trial % trials_per_session // 35,
            }
        )
        trials["repeat"] = trials.groupby("row").cumcount()
        ceiling = self.voxels.noise_ceiling.to_numpy()
        noise_sd = np.sqrt((1 - ceiling) / ceiling).astype(np.float32)
        betas = np.empty((len(row), v), np.float32)
        for s in np.unique(session):
            block = session == s
            gain, offset = 1 + 0.06 * rng.standard_normal(v), 0.4 * rng.standard_normal(v)
            betas[block] = (
                gain * (signal[row[block]] + noise_sd * self._noise(int(block.sum()), rng)) + offset
            )
        return Scan(betas, trials, self.voxels)

    def _noise(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Unit-variance noise (trials, voxels): 70 % independent, 30 % in three components that an
        area shares.
        """
        noise = rng.standard_normal((n, len(self.roi)), dtype=np.float32) * np.float32(np.sqrt(0.7))
        for area in AREAS:
            member = np.flatnonzero(self.roi == area)
            loading = np.random.default_rng([len(member), 3]).standard_normal((3, len(member)))
            loading /= np.linalg.norm(loading, axis=0)
            noise[:, member] += (np.sqrt(0.3) * rng.standard_normal((n, 3)) @ loading).astype(
                np.float32
            )
        return noise


@dataclass(frozen=True)
class Experiment:
    """A whole simulated experiment of one subject.

    Attributes:
        scan: betas, trials (with the columns image and split as well) and voxels.
        images: uint8 (images, height, width, 3), in the order of image_ids.
        image_ids: int64 (images,); training ids differ between subjects, validation and test ids
            are shared by all.
        labels: one row an image.
        captions: five rows an image.
    """

    scan: Scan
    images: np.ndarray
    image_ids: np.ndarray
    labels: pd.DataFrame
    captions: pd.DataFrame


FIRST_ID = {"train": 0, "val": 900_000, "test": 950_000}


def simulate(
    subject: int,
    n_train: int = 5000,
    n_val: int = 300,
    n_test: int = 300,
    seed: int = 0,
    trials_per_session: int = 420,
) -> Experiment:
    """Show a subject its own training images and the shared validation and test images, three times
    each.

    Args:
        subject: 1 to 8.
        n_train: training images of this subject.
        n_val: validation images, the same for every subject.
        n_test: test images, the same for every subject.
        seed: of the images, the order and the noise.
        trials_per_session: trials a session.
    """
    cortex, images, signals, parts, ids, split = VisualCortex(subject), [], [], [], [], []
    for name, count in (("train", n_train), ("val", n_val), ("test", n_test)):
        number = (
            int(np.random.default_rng([seed, subject]).integers(2**31))
            if name == "train"
            else shared_seed(seed)
        )
        everything = [compose_image(number, i, name) for i in range(count)]
        block = np.concatenate(list(render_blocks(number, name, count, cortex.size)))
        images.append(block)
        signals += [
            cortex.respond(block[i : i + 500], everything[i : i + 500])
            for i in range(0, count, 500)
        ]
        first = FIRST_ID[name] + (subject * 100_000 if name == "train" else 0)
        ids.append(first + np.arange(count))
        parts.append(
            [table.assign(image=table.image + first) for table in make_tables(number, name, count)]
        )
        split += [name] * count
    scan = cortex.scan(np.concatenate(signals), 3, trials_per_session, seed)
    image_ids = np.concatenate(ids)
    trials = scan.trials.assign(
        image=image_ids[scan.trials.row], split=np.array(split)[scan.trials.row]
    ).drop(columns="row")
    labels, captions = (pd.concat([part[k] for part in parts], ignore_index=True) for k in (0, 1))
    return Experiment(
        Scan(scan.betas, trials, scan.voxels), np.concatenate(images), image_ids, labels, captions
    )
