"""The simulated visual cortex of the mini world, and the experiment that measures it.

The cortex is not linear in any embedding that decoders use: early areas measure Gabor energy in a
receptive field, higher areas respond to conjunctions of what the image shows.
"""

from __future__ import annotations

from collections.abc import Sequence
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

# Voxels of subjects 1 to 8, a tenth of NSD's nsdgeneral. Everything here was fixed before any
# decoder was trained on it, and not tuned to a decoder's scores since.
N_VOXELS = {1: 1572, 2: 1428, 3: 1523, 4: 1315, 5: 1304, 6: 1791, 7: 1268, 8: 1439}

CORTEX_SEED = 69
CALIBRATION_SEED = 12_345
N_CALIBRATION_IMAGES = 600
N_CONJUNCTIONS = 8  # of a voxel of a higher area
TRIALS_PER_RUN = 35
RESPONSE_BLOCK = 500  # images whose responses are computed at a time


@dataclass(frozen=True)
class Area:
    """A visual area.

    Attributes:
        share: of the voxels.
        noise_ceiling: mean of a single trial, fraction of variance.
        centre: x, y, z of the right hemisphere, mm.
        field_sd: of the receptive field, fraction of the image; 0 for higher areas.
        cycles: of the Gabor filter within a field.
        colour_share: of the response to the field's mean colour.
        selectivity: of higher areas: weights of the groups of `encode_content`.
    """

    share: float
    noise_ceiling: float
    centre: tuple[int, int, int]
    field_sd: float = 0.0
    cycles: float = 0.0
    colour_share: float = 0.0
    selectivity: dict[str, float] | None = None

    @property
    def is_early(self) -> bool:
        """Whether the area measures Gabor energy."""
        return self.selectivity is None


AREAS = {
    "V1": Area(0.20, 0.23, (0, -40, 0), 0.055, 1.0, 0.25),
    "V2": Area(0.17, 0.20, (8, -38, 5), 0.08, 1.0, 0.3),
    "V3": Area(0.13, 0.17, (15, -34, 9), 0.11, 0.9, 0.35),
    "hV4": Area(0.12, 0.15, (20, -28, -8), 0.15, 0.7, 0.6),
    "LO": Area(
        share=0.14,
        noise_ceiling=0.12,
        centre=(30, -30, 2),
        selectivity={
            "category": 1.0,
            "place": 0.8,
            "size": 0.8,
            "pattern": 0.5,
            "colour": 0.5,
            "background_object": 0.6,
        },
    ),
    "EBA": Area(
        share=0.06,
        noise_ceiling=0.12,
        centre=(36, -24, 6),
        selectivity={"category": 1.2, "background_object": 0.8, "size": 0.4},
    ),
    "FFA": Area(
        share=0.06,
        noise_ceiling=0.11,
        centre=(30, -16, -12),
        selectivity={"category": 1.2, "colour": 0.6, "background_object": 0.5},
    ),
    "PPA": Area(
        share=0.07,
        noise_ceiling=0.13,
        centre=(22, -12, -10),
        selectivity={"scene": 1.3, "light": 0.7, "category": 0.3},
    ),
    "OPA": Area(
        share=0.05,
        noise_ceiling=0.11,
        centre=(26, -30, 16),
        selectivity={"scene": 1.0, "place": 0.7, "light": 0.5},
    ),
}


def encode_content(contents: Sequence[ImageContent]) -> dict[str, np.ndarray]:
    """Encode what each image shows as groups of indicator columns (images, columns)."""
    main = [content.main for content in contents]
    background = np.zeros((len(contents), len(CATEGORIES)))
    for row, content in enumerate(contents):
        if content.background_object is not None:
            background[row, content.background_object.category] = 0.7
    return {
        "scene": np.eye(len(SCENES))[[content.scene for content in contents]],
        "light": np.eye(len(LIGHTS))[[content.light for content in contents]],
        "category": np.eye(len(CATEGORIES))[[thing.category for thing in main]],
        "colour": np.eye(len(COLOURS))[[thing.colour for thing in main]],
        "pattern": np.eye(len(PATTERNS))[[thing.pattern for thing in main]],
        "place": np.eye(len(PLACES))[[content.place for content in contents]],
        "size": np.array([[(thing.half_size - 0.35) / 0.05] for thing in main]),
        "background_object": background,
    }


# ------------------------------------------------------------------------------------------- cortex
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
    """A simulated visual cortex: `respond` gives noiseless responses, `scan` measures them.

    V1-hV4: quadrature pairs of Gabor filters in a receptive field, on luminance and two
    colour-opponent channels; the response is the square root of the energy (Adelson & Bergen 1985),
    mixed with a rectified response to the field's mean colour that grows from V1 to hV4. Higher
    areas: a random two-layer network with eight rectified conjunctions a voxel over what the image
    shows (scene, category, colour, place, ...). Noise: independent plus a few shared components an
    area. Single-trial noise ceilings are drawn once a subject.

    Raises:
        PerceptError: for a subject that NSD does not have.
    """

    def __init__(self, subject: int, size: int = IMAGE_SIZE):
        if subject not in N_VOXELS:
            raise PerceptError(
                f"The mini world has subjects 1 to 8, not {subject}: choose subj among them."
            )
        self.rng = np.random.default_rng([CORTEX_SEED, subject])
        self.size, n = size, N_VOXELS[subject]
        shares = np.array([area.share for area in AREAS.values()])
        counts = np.floor(shares * n).astype(int)
        counts[0] += n - counts.sum()
        self.roi = np.repeat(list(AREAS), counts)
        self.area_of_voxel = [AREAS[name] for name in self.roi]
        self.voxels = self._make_voxels()
        self._build_early()
        self._build_higher()
        self.mean = np.zeros(n, np.float32)
        self.sd = np.ones(n, np.float32)
        self._calibrate()

    def _make_voxels(self) -> pd.DataFrame:
        """Draw noise ceilings and places of all voxels."""
        n, rng = len(self.roi), self.rng
        mean = np.array([area.noise_ceiling for area in self.area_of_voxel])
        ceiling = rng.beta(2.5, 2.5 * (1 - mean) / mean).clip(0.005, 0.7)
        side = rng.choice((-1, 1), n)  # left or right hemisphere
        xyz = np.array([area.centre for area in self.area_of_voxel])
        xyz[:, 0] *= side
        xyz = xyz + rng.normal(0, 4, (n, 3))
        columns = {name: self.roi == name for name in AREAS}
        for axis, name in enumerate(("x", "y", "z")):
            columns[name] = xyz[:, axis]
        columns["noise_ceiling"] = ceiling
        return pd.DataFrame(columns).round(4)

    def _build_early(self) -> None:
        """Make the filters of early voxels: matrices (voxels, 3 * height * width).

        They act on opponent-channel pixels: an even and an odd Gabor filter, and a colour field.
        """
        areas = [area for area in self.area_of_voxel if area.is_early]
        n, rng = len(areas), self.rng
        # more voxels near the fovea than an even spread in area would give
        radius = 0.5 * np.sqrt(rng.random(n))
        angle = rng.uniform(0, 2 * np.pi, n)
        orientation = rng.uniform(0, np.pi, n)
        x0, y0 = 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
        sd = np.array([area.field_sd for area in areas]) * (0.7 + 1.2 * radius)
        cycles = np.array([area.cycles for area in areas])
        frequency = cycles / (2.5 * sd) * rng.uniform(0.6, 1.6, n)
        channels = rng.normal(size=(n, 3))
        channels *= np.array([1.0, 0.6, 0.6])
        channels /= np.linalg.norm(channels, axis=1, keepdims=True)

        y, x = (np.mgrid[: self.size, : self.size] + 0.5) / self.size
        dx, dy = x[None] - _to_maps(x0), y[None] - _to_maps(y0)  # (voxels, height, width)
        distance = dx**2 + dy**2
        envelope = np.exp(-distance / (2 * _to_maps(sd) ** 2))
        envelope /= np.sqrt((envelope**2).sum((1, 2), keepdims=True))
        along = dx * _to_maps(np.cos(orientation)) + dy * _to_maps(np.sin(orientation))
        phase = 2 * np.pi * _to_maps(frequency) * along

        def to_filters(field: np.ndarray) -> np.ndarray:
            weights = channels[:, :, None, None] * field[:, None]
            return weights.reshape(n, -1).astype(np.float32)

        self.even = to_filters(envelope * np.cos(phase))
        self.odd = to_filters(envelope * np.sin(phase))
        self.even -= self.even.mean(1, keepdims=True)
        self.colour = to_filters(envelope / envelope.sum((1, 2), keepdims=True))
        self.colour_share = np.array([area.colour_share for area in areas], np.float32)
        self.colour_bias = rng.normal(0, 0.05, n).astype(np.float32)

    def _build_higher(self) -> None:
        """Make the conjunctions of higher voxels.

        Weights (voxels, 8, columns of `encode_content`), thresholds and read-out (voxels, 8).
        """
        groups = encode_content([compose_image(0, 0)])
        selectivity = []
        for area in self.area_of_voxel:
            if area.selectivity is not None:
                weights = [
                    np.full(columns.shape[1], area.selectivity.get(group, 0.0))
                    for group, columns in groups.items()
                ]
                selectivity.append(np.concatenate(weights))
        column_weights = np.array(selectivity)
        shape = (len(column_weights), N_CONJUNCTIONS, column_weights.shape[1])
        conjunctions = self.rng.normal(size=shape) * column_weights[:, None]
        self.conjunctions = conjunctions.astype(np.float32)
        threshold = self.rng.normal(0.4, 0.4, shape[:2])
        self.threshold = threshold.astype(np.float32)
        readout = self.rng.normal(size=shape[:2])
        self.readout = readout.astype(np.float32)

    def _calibrate(self) -> None:
        """Measure mean and sd of every voxel, so that its signal has unit variance.

        They are taken over 600 images of the training split.
        """
        contents = [compose_image(CALIBRATION_SEED, i) for i in range(N_CALIBRATION_IMAGES)]
        images = [render_image(content, CALIBRATION_SEED, self.size) for content in contents]
        signal = self.respond(np.stack(images), contents)
        self.mean, self.sd = signal.mean(0), signal.std(0) + 1e-6

    def respond(self, images: np.ndarray, contents: Sequence[ImageContent]) -> np.ndarray:
        """Compute noiseless responses.

        Args:
            images: uint8 (images, height, width, 3).
            contents: what each of them shows.

        Returns:
            float32 (images, voxels), zero mean and unit variance over images like those of the
            training split.
        """
        pixels = images.reshape(len(images), -1, 3).astype(np.float32)
        red, green, blue = np.moveaxis(pixels / 255 - 0.5, 2, 0)
        luminance = (red + green + blue) / 3
        red_green = (red - green) / 2
        blue_yellow = (blue - (red + green) / 2) / 2
        opponent = np.concatenate([luminance, red_green, blue_yellow], 1)  # (images, 3 * pixels)
        even, odd = opponent @ self.even.T, opponent @ self.odd.T
        energy = np.sqrt(even**2 + odd**2)
        colour = np.maximum(opponent @ self.colour.T + self.colour_bias, 0) * 8
        early = (1 - self.colour_share) * energy + self.colour_share * colour

        groups = encode_content(contents)
        columns = np.concatenate(list(groups.values()), 1).astype(np.float32)
        higher = np.stack(
            [
                np.maximum(columns @ weights.T - threshold, 0) @ readout
                for weights, threshold, readout in zip(
                    self.conjunctions, self.threshold, self.readout, strict=True
                )
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
        n_images, n_voxels = signal.shape
        rng = np.random.default_rng([seed, n_voxels])
        row = rng.permutation(np.repeat(np.arange(n_images), repeats))
        trial = np.arange(len(row))
        session = trial // trials_per_session
        run = trial % trials_per_session // TRIALS_PER_RUN
        trials = pd.DataFrame({"trial": trial, "row": row, "session": session, "run": run})
        trials["repeat"] = trials.groupby("row").cumcount()
        ceiling = self.voxels.noise_ceiling.to_numpy()
        noise_sd = np.sqrt((1 - ceiling) / ceiling).astype(np.float32)
        betas = np.empty((len(row), n_voxels), np.float32)
        for number in np.unique(session):
            in_session = session == number
            gain = 1 + 0.06 * rng.standard_normal(n_voxels)
            offset = 0.4 * rng.standard_normal(n_voxels)
            noise = noise_sd * self._draw_noise(int(in_session.sum()), rng)
            betas[in_session] = gain * (signal[row[in_session]] + noise) + offset
        return Scan(betas, trials, self.voxels)

    def _draw_noise(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw noise of unit variance (trials, voxels).

        70 % are independent, 30 % lie in three components that an area shares.
        """
        noise = rng.standard_normal((n, len(self.roi)), dtype=np.float32)
        noise *= np.float32(np.sqrt(0.7))
        for name in AREAS:
            members = np.flatnonzero(self.roi == name)
            loading_rng = np.random.default_rng([len(members), 3])
            loading = loading_rng.standard_normal((3, len(members)))
            loading /= np.linalg.norm(loading, axis=0)
            shared = np.sqrt(0.3) * rng.standard_normal((n, 3)) @ loading
            noise[:, members] += shared.astype(np.float32)
        return noise


def _to_maps(values: np.ndarray) -> np.ndarray:
    """(voxels,) -> (voxels, 1, 1), to broadcast over the pixels of a field."""
    return values[:, None, None]


# --------------------------------------------------------------------------------------- experiment
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
    """Simulate the experiment of a subject.

    It sees its own training images and the shared validation and test images, three times each.

    Args:
        subject: 1 to 8.
        n_train: training images of this subject.
        n_val: validation images, the same for every subject.
        n_test: test images, the same for every subject.
        seed: of the images, the order and the noise.
        trials_per_session: trials a session.
    """
    cortex = VisualCortex(subject)
    own_seed = int(np.random.default_rng([seed, subject]).integers(2**31))
    own_first_id = FIRST_ID["train"] + subject * 100_000
    parts = [
        _show_images(cortex, own_seed, "train", n_train, own_first_id),
        _show_images(cortex, shared_seed(seed), "val", n_val, FIRST_ID["val"]),
        _show_images(cortex, shared_seed(seed), "test", n_test, FIRST_ID["test"]),
    ]
    signal = np.concatenate([part.signal for part in parts])
    scan = cortex.scan(signal, 3, trials_per_session, seed)
    image_ids = np.concatenate([part.image_ids for part in parts])
    counts = [len(part.image_ids) for part in parts]
    splits = np.repeat([part.split for part in parts], counts)
    rows = scan.trials.row
    trials = scan.trials.assign(image=image_ids[rows], split=splits[rows])
    return Experiment(
        scan=Scan(scan.betas, trials.drop(columns="row"), scan.voxels),
        images=np.concatenate([part.images for part in parts]),
        image_ids=image_ids,
        labels=pd.concat([part.labels for part in parts], ignore_index=True),
        captions=pd.concat([part.captions for part in parts], ignore_index=True),
    )


@dataclass(frozen=True)
class _SplitImages:
    """Images of a split, as in `Experiment`, and the noiseless responses (images, voxels)."""

    split: str
    images: np.ndarray
    image_ids: np.ndarray
    signal: np.ndarray
    labels: pd.DataFrame
    captions: pd.DataFrame


def _show_images(
    cortex: VisualCortex, seed: int, split: str, count: int, first_id: int
) -> _SplitImages:
    """Render images 0..count-1 of a split, and compute the responses of the cortex."""
    contents = [compose_image(seed, i, split) for i in range(count)]
    images = np.concatenate(list(render_blocks(seed, split, count, cortex.size)))
    responses = []
    for start in range(0, count, RESPONSE_BLOCK):
        block = slice(start, start + RESPONSE_BLOCK)
        responses.append(cortex.respond(images[block], contents[block]))
    labels, captions = make_tables(seed, split, count)
    return _SplitImages(
        split=split,
        images=images,
        image_ids=first_id + np.arange(count),
        signal=np.concatenate(responses),
        labels=labels.assign(image=labels.image + first_id),
        captions=captions.assign(image=captions.image + first_id),
    )
