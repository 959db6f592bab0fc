"""Voters: low-level models of different regions and different images, and what may be made of
several predictions for one image.

- A voter is a folder train_logs/<run>/ with a low level, its normaliser, and voter.json, which
  tells its regions, its share of the images and the seed of that draw. Which voxels it was trained
  on is read from there, never from a list in another order (`open_voter`).
- A rule of VOTES chooses one candidate an image from what the brain alone has told. `oracle` is no
  rule: it looks at the image that was shown, and bounds what any rule could choose.

Source: the 2023 ROI project (docs/roi_voting.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.decoding.checkpoints import load_decoder
from src.utils import PerceptError, read_json


@dataclass(frozen=True)
class Voter:
    """What one model of a bag is trained with.

    Attributes: name, of its folder; rois, its set of regions (`Subject.select_rois`); bag_seed, of
    the draw of its training images; batch_size.
    """

    name: str
    rois: str
    bag_seed: int
    batch_size: int


def parse_voters(
    names: str, rois: str, bag_seeds: str, batch_sizes: str, seed: int = 0
) -> list[Voter]:
    """The voters that a notebook's parameters describe.

    Args:
        names: separated by commas.
        rois: sets of regions, separated by semicolons; one for all voters, or one each.
        bag_seeds: whole numbers separated by commas, likewise; "" counts up from `seed`.
        batch_sizes: whole numbers separated by commas, likewise.
        seed: the first voter's bag seed where none are given.

    Raises:
        PerceptError: if a name is no name of a folder or comes twice, or there are neither one nor
            as many of the others.
    """
    called = [name.strip() for name in names.split(",") if name.strip()]
    if (
        not called
        or len(set(called)) < len(called)
        or any(name in (".", "..") or "/" in name for name in called)
    ):
        raise PerceptError(
            f"voters is '{names}': give names of folders, different ones, separated by commas, e.g."
            " 92,94,97,100."
        )

    def each(text: str, parameter: str, separator: str) -> list[str]:
        parts = [part.strip() for part in text.split(separator)]
        if len(parts) not in (1, len(called)):
            raise PerceptError(
                f"{parameter} has {len(parts)} entries for {len(called)} voters: give one for all,"
                f" or one each, separated by '{separator}'."
            )
        return parts * (len(called) // len(parts))

    def numbers(text: str, parameter: str) -> list[int]:
        parts = each(text, parameter, ",")
        if not all(part.isdigit() for part in parts):
            raise PerceptError(f"{parameter} is '{text}': give whole numbers separated by commas.")
        return [int(part) for part in parts]

    seeds = (
        numbers(bag_seeds, "bag_seeds")
        if bag_seeds.strip()
        else [seed + k for k in range(len(called))]
    )
    return [
        Voter(*row)
        for row in zip(
            called, each(rois, "rois", ";"), seeds, numbers(batch_sizes, "batch_sizes"), strict=True
        )
    ]


def find_voters(logs: Path, voters: str = "") -> dict[str, Path]:
    """Folders of the voters by name: of those in `logs` the folder's name, of others the run's,
    with dashes for slashes.

    Args:
        logs: folder of the run that asks, train_logs/<run>/.
        voters: names of folders in `logs`, or of runs under train_logs/, separated by commas, by
            default all that lie in `logs`.

    Raises:
        PerceptError: naming a folder that holds no low level, or if there is none at all.
    """
    home = next(folder for folder in (logs, *logs.parents) if folder.name == "train_logs")
    own = sorted(
        (path.parent for path in logs.glob("*/voter.json")),
        key=lambda folder: read_json(folder / "voter.json")["place"],
    )
    named = [name.strip() for name in voters.split(",") if name.strip()]
    found = {
        name.replace("/", "-"): logs / name if (logs / name).is_dir() else home / name
        for name in named
    } or {folder.name: folder for folder in own}
    if not found:
        raise PerceptError(
            f"There are no voters under {logs}: run notebook 02_train_roi_models first, or name"
            " runs in `voters`."
        )
    for folder in found.values():
        if not (folder / "normaliser.safetensors").exists():
            raise PerceptError(
                f"The voter {folder} is not there or not trained (no normaliser.safetensors): train"
                " it first, or leave it out of `voters`."
            )
    return found


def open_voter(
    folder: Path, subject: Subject, file: str, device: str = "cpu"
) -> tuple[nn.Module, dict[str, Any], Normaliser]:
    """A voter's decoder, its config and its normaliser, after a check that all three are of the
    same voxels.

    Args:
        folder: train_logs/<run>/.
        subject: whose betas it will be given.
        file: the decoder's file in the folder, e.g. "low_level/best.safetensors".
        device: torch device.

    Raises:
        PerceptError: if the regions that the checkpoint names are not the voxels that its
            normaliser selects in this subject.
    """
    decoder, config = load_decoder(folder / file, device)
    normaliser = Normaliser.load(folder / "normaliser.safetensors")
    rois = str(config.get("training", {}).get("rois", ""))
    columns = (
        np.arange(subject.betas.shape[1])
        if rois.strip() in ("", "-")
        else subject.select_rois(rois)[0]
    )
    selected = np.arange(normaliser.n_voxels) if normaliser.columns is None else normaliser.columns
    if not np.array_equal(columns, selected):
        raise PerceptError(
            f"{folder / file} was trained on the regions '{rois}', which are other voxels of"
            f" subject {subject.subj} of {subject.folder.name} than the {len(selected)} that its"
            " normaliser selects: train it again on this data set."
        )
    return decoder, config, normaliser


@dataclass(frozen=True)
class SelectionInputs:
    """What a rule may look at: embeddings of pictures, and what the brain has told.

    Attributes:
        candidates: CLIP's final embedding of each voter's reconstruction (images, voters, dim).
        low_level: the same of each voter's low-level picture (images, voters, dim).
        tokens: the candidates' tokens in the space of `brain` (images, voters, features), or None.
        brain: the tokens that the brain predicts (images, features), or None where no high level
            was trained.
    """

    candidates: Tensor
    low_level: Tensor
    tokens: Tensor | None = None
    brain: Tensor | None = None


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last axis; a picture whose embedding is no number is like none."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).nan_to_num(-2.0)


def published(ballot: SelectionInputs) -> Tensor:
    """The candidate most like its own low-level picture.

    It needs no truth, but favours what stays near its blurry beginning: a candidate that the
    generator has hardly changed wins.
    """
    return _alike(ballot.candidates, ballot.low_level)


def medoid(ballot: SelectionInputs) -> Tensor:
    """The candidate most like the other candidates, on average: what the voters agree on."""
    unit = F.normalize(ballot.candidates.float(), dim=-1).nan_to_num()  # (images, voters, dim)
    voters = unit.shape[1]
    alike = ((unit @ unit.mT).sum(-1) - unit.square().sum(-1)) / max(1, voters - 1)
    return alike.masked_fill(ballot.candidates.isnan().any(-1), -2.0)


def agreement(ballot: SelectionInputs) -> Tensor:
    """The candidate whose tokens are nearest to those that the brain predicts, by a model that took
    no part in making the candidates.
    """
    if ballot.tokens is None or ballot.brain is None:
        raise PerceptError(
            "The rule 'agreement' needs tokens predicted from the brain: train a high level"
            " (notebook 01), or choose published or medoid."
        )
    return _alike(ballot.tokens, ballot.brain[:, None])


VOTES: dict[str, Callable[[SelectionInputs], Tensor]] = {
    "published": published,
    "medoid": medoid,
    "agreement": agreement,
}


def vote(rule: str, ballot: SelectionInputs) -> Tensor:
    """Which candidate a rule of VOTES chooses, int64 (images,); among equals the first.

    Raises:
        PerceptError: for an unknown rule, or one that needs what the ballot lacks.
    """
    if rule not in VOTES:
        raise PerceptError(f"There is no rule '{rule}': choose one of {', '.join(VOTES)}.")
    return VOTES[rule](ballot).argmax(1)


def oracle(candidates: Tensor, seen: Tensor) -> Tensor:
    """The candidate most like the image that was shown, int64 (images,): the most that choosing
    could give, not a result.

    Args:
        candidates: CLIP's final embedding (images, voters, dim).
        seen: of the images that were shown (images, dim).
    """
    return _alike(candidates, seen[:, None]).argmax(1)
