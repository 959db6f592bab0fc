"""The test images of a run, and its trained decoders with the voxels that each of them reads.

- A decoder has a high level, which predicts CLIP tokens, and a low level, which predicts the latent
  of a blurry image. Either may be missing; of MindEye2 and Percept one network predicts both.
- Released networks were trained on the betas as the shards hold them, ours on z-scores: each is
  given what it was trained on (`Normaliser.for_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import utils
from src.data.identity import check_trained_on
from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.decoding.checkpoints import find_decoders, load_decoder
from src.decoding.predict import predicts_both_levels
from src.networks.rebuild import build_decoder
from src.parameters import Run, list_decoders
from src.utils import PerceptError, count_parameters, seed_everything

# settings of a training that all levels of a system must share
SHARED_SETTINGS = ("split", "n_clusters", "num_sessions", "n_components", "rois")


@dataclass(frozen=True)
class SeenImages:
    """The test images that are reconstructed, and which of their repeats are averaged.

    Attributes:
        subject: with its training split.
        image_ids: (images,), ascending.
        pixels: (images, 3, height, width) in [0, 1].
        repeats: number of repeats averaged, 0 for all.
        n_repeats: repeats averaged; of an image that has fewest, where all are.
        fewer_repeats: smaller numbers of repeats that are reconstructed beside.
    """

    subject: Subject
    image_ids: np.ndarray
    pixels: Tensor
    repeats: int
    n_repeats: int
    fewer_repeats: tuple[int, ...]

    @classmethod
    def open(
        cls, subject: Subject, parameters: Mapping[str, Any], decoders: Mapping[str, Decoder]
    ) -> SeenImages:
        """The test images that parameters first_images, test_repeats and fewer_repeats ask for.

        Args:
            subject: with its training split.
            parameters: of notebook 03.
            decoders: the main one first; of a MindEye2 that reads neighbouring trials these are
                read too.

        Raises:
            PerceptError: for fewer repeats that are not fewer.
        """
        image_ids = subject.image_ids("test")[: parameters["first_images"] or None]
        repeats = parameters["test_repeats"]
        n_repeats = repeats or min(len(rows) for rows in subject.rows_by_image("test"))
        text = parameters["fewer_repeats"]
        counts = sorted({part.strip() for part in text.split(",") if part.strip()})
        if any(not (k.isdigit() and 1 <= int(k) < n_repeats) for k in counts):
            raise PerceptError(
                f"fewer_repeats is '{text}', but {n_repeats} repeats are averaged: give numbers"
                f" from 1 to {n_repeats - 1}, or leave it empty."
            )
        main = next(iter(decoders.values()))
        subject = subject.with_adjacent_trials(*main.neighbours)
        pixels = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
        fewer_repeats = tuple(map(int, counts))
        return cls(subject, image_ids, pixels, repeats, n_repeats, fewer_repeats)

    def __len__(self) -> int:
        return len(self.image_ids)

    def average(self, path: Path, repeats: int = 0) -> np.ndarray:
        """Voxels (images, voxels) as the network in a file was trained on them.

        Args:
            path: of its checkpoint.
            repeats: number of repeats averaged; 0: as many as are asked for.
        """
        voxels, _ = self.subject.get_mean_betas(
            "test",
            repeats=repeats or self.repeats or None,
            normaliser=Normaliser.for_checkpoint(path),
        )
        return voxels[: len(self)]

    def read_repeat(self, path: Path, repeat: int) -> np.ndarray:
        """Voxels (images, voxels) of one repeat alone, as `average` gives them."""
        groups = self.subject.rows_by_image("test")[: len(self)]
        rows = [rows[repeat : repeat + 1] for rows in groups]
        return self.subject.average_rows(rows, Normaliser.for_checkpoint(path))

    @property
    def most_repeats(self) -> int:
        """Repeats that are averaged of the image that has most."""
        return self.repeats or max(len(rows) for rows in self.subject.rows_by_image("test"))

    @property
    def test_set(self) -> str:
        """Identity of these images, as results carry it."""
        if len(self) == len(self.subject.image_ids("test")):
            return self.subject.test_set
        return f"{self.subject.test_set}-first{len(self)}"


@dataclass(frozen=True)
class Level:
    """A trained network and what it reads.

    Attributes:
        network: in eval mode.
        config: that its checkpoint carries.
        path: of the checkpoint.
        voxels: (images, voxels) of the test images; empty until `Decoders` fills it.
    """

    network: nn.Module
    config: dict[str, Any]
    path: Path
    voxels: np.ndarray


@dataclass(frozen=True)
class Decoder:
    """One decoder of a run.

    Attributes:
        name: network, ridge or kernel; repeats_1, ... for the first of them on fewer repeats;
            untrained.
        high: voxels -> tokens, or None.
        low: voxels -> latent, or None.
        files: of both levels, whether or not they are there.
        repeats: number of repeats that it reads, 0 for as many as are asked for.
        trained: False for the baseline of untrained networks.
    """

    name: str
    high: Level | None
    low: Level | None
    files: tuple[Path, Path]
    repeats: int = 0
    trained: bool = True

    def describe(self) -> str:
        """Its levels with the voxels that they read and their number of parameters."""
        parts = []
        for name, level in (("high level", self.high), ("low level", self.low)):
            text = "none"
            if level is not None:
                size = count_parameters(level.network)
                text = f"(images, voxels) = {level.voxels.shape}, {size:,} parameters"
            parts.append(f"{name} {text}")
        return f"{self.name}: {'; '.join(parts)}"

    @property
    def levels(self) -> list[Level]:
        """The levels that there are."""
        return [level for level in (self.high, self.low) if level is not None]

    @property
    def neighbours(self) -> tuple[int, int]:
        """Trials before and after each that its high level reads with it."""
        config = {} if self.high is None else self.high.config
        past, future = config.get("neighbours", (0, 0))
        return past, future

    @property
    def training(self) -> Mapping[str, Any] | None:
        """Parameters with which its high level was trained, where they are known."""
        return None if self.high is None else self.high.config.get("training")


def load_decoders(run: Run, subject: Subject) -> dict[str, Decoder]:
    """The decoders that parameter decoder names, without their voxels (`attach_voxels`).

    Args:
        run: with the parameters of notebook 03.
        subject: of `open_training_split`.

    Raises:
        PerceptError: for a missing checkpoint, or levels that were trained on different images.
    """
    p = run.parameters
    low_logs = run.logs
    if p["autoencoder_name"]:
        low_logs = utils.HOME / "train_logs" / str(p["autoencoder_name"])
        check_trained_on(low_logs, subject.key, subject.identity)
    files = find_decoders(run.logs, low_logs, str(p["checkpoint"]))
    needs_high = float(p["img2img_strength"]) > 0
    needs_low = float(p["img2img_strength"]) < 1 and not p["start_run"]
    names = list_decoders(str(p["decoder"]))
    high = {name: _load_level(files[name][0], needs_high, run.device) for name in names}
    for name, level in high.items():
        if level is not None and predicts_both_levels(level.network):
            files[name] = (files[name][0], files[name][0])
    low = {name: _load_level(files[name][1], needs_low, run.device) for name in names}
    decoders = {name: Decoder(name, high[name], low[name], files[name]) for name in names}
    _check_same_training(decoders)
    return decoders


def _load_level(path: Path, needed: bool, device: str) -> Level | None:
    """The network of a file; None where there is none and none is needed."""
    if not (needed or path.exists()):
        return None
    network, config = load_decoder(path, device)
    return Level(network, config, path, np.empty((0, 0), np.float32))


def _check_same_training(decoders: Mapping[str, Decoder]) -> None:
    """Refuse levels that were trained on different images or components."""
    trainings = [
        level.config["training"]
        for decoder in decoders.values()
        for level in decoder.levels
        if "training" in level.config
    ]
    selections = {tuple(training.get(k) or "" for k in SHARED_SETTINGS) for training in trainings}
    if len(selections) > 1:
        raise PerceptError(
            "The networks were trained on different images or components"
            f" {sorted(selections, key=str)}: train all of them with the same"
            f" {', '.join(SHARED_SETTINGS)}."
        )


def attach_voxels(
    decoders: Mapping[str, Decoder], seen: SeenImages, untrained: bool = False, seed: int = 42
) -> dict[str, Decoder]:
    """The decoders with the voxels that they read, and the same on less, by name.

    Beside the decoders themselves: "repeats_<k>", the first of them on fewer repeats, and, if
    asked, "untrained", the network as it is before training.

    Args:
        decoders: from `load_decoders`, the main one first.
        seen: the test images.
        untrained: add the untrained network.
        seed: of its weights.
    """
    complete = {name: _read_voxels(decoder, seen) for name, decoder in decoders.items()}
    main = next(iter(decoders.values()))
    for k in seen.fewer_repeats:
        shortened = replace(main, name=f"repeats_{k}", repeats=k)
        complete[shortened.name] = _read_voxels(shortened, seen)
    if untrained and "network" in decoders:
        network = complete["network"]
        seed_everything(seed)
        high, low = _reset(network.high), _reset(network.low)
        files = main.files
        complete["untrained"] = Decoder("untrained", high, low, files, trained=False)
    return complete


def _read_voxels(decoder: Decoder, seen: SeenImages) -> Decoder:
    high, low = decoder.high, decoder.low
    if high is not None:
        high = replace(high, voxels=seen.average(high.path, decoder.repeats))
    if low is not None:
        low = replace(low, voxels=seen.average(low.path, decoder.repeats))
    return replace(decoder, high=high, low=low)


def _reset(level: Level | None) -> Level | None:
    """The same level with untrained weights."""
    if level is None:
        return None
    device = next(level.network.parameters()).device
    network = build_decoder(level.config["model"]).to(device).eval().requires_grad_(False)
    return replace(level, network=network)


def list_inputs(run: Run, decoder: Decoder, seen: SeenImages) -> list[Any]:
    """What the reconstructions of a decoder depend on, as JSON values: parameters, checkpoints and
    data. Reconstructions that were made of other inputs are made again.
    """
    p = run.parameters
    encoder_run = str(p["encoder_name"] or run.name)
    encoder = utils.HOME / "train_logs" / encoder_run / "encoder.safetensors"
    files = [*decoder.files, *([encoder] if p["selection"] == "brain" else [])]
    changed = [(str(path), path.stat().st_mtime_ns) for path in files if path.exists()]
    return [decoder.name, p, changed, seen.subject.identity]
