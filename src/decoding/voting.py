"""Voters: low-level models of different regions and different images, and rules that choose among
their predictions for one image.

- A voter is a folder train_logs/<run>/ with a low level, its normaliser, and voter.json, which
  names its regions, its share of the images and the seed of that draw. Which voxels it was trained
  on is read from there, never from a list in another order (`open_voter`).
- A rule of VOTES chooses one candidate an image from what the brain alone predicts. `oracle` is no
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

from src.data.identity import check_trained_on
from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.decoding.checkpoints import load_decoder
from src.utils import PerceptError, check_name, read_json


@dataclass(frozen=True)
class Voter:
    """What one model of a bag is trained with.

    Attributes:
        name: of its folder.
        rois: its set of regions (`Subject.select_rois`).
        bag_seed: of the draw of its training images.
        batch_size: samples a step.
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
        seed: the first voter's bag seed where `bag_seeds` is empty.

    Raises:
        PerceptError: if a name is no name of a folder or comes twice, or there are neither one nor
            as many of the others.
    """
    folders = _parse_names(names)
    voters = len(folders)
    seeds = [seed + position for position in range(voters)]
    if bag_seeds.strip():
        seeds = _parse_integers(bag_seeds, "bag_seeds", voters)
    columns = (
        folders,
        _split_entries(rois, "rois", ";", voters),
        seeds,
        _parse_integers(batch_sizes, "batch_sizes", voters),
    )
    return [Voter(*row) for row in zip(*columns, strict=True)]


def _parse_names(names: str) -> list[str]:
    folders = [name.strip() for name in names.split(",") if name.strip()]
    are_names = all(name not in (".", "..") and "/" not in name for name in folders)
    if not folders or len(set(folders)) < len(folders) or not are_names:
        raise PerceptError(
            f"voters is '{names}': give names of folders, different ones, separated by commas, e.g."
            " 92,94,97,100."
        )
    return folders


def _split_entries(text: str, parameter: str, separator: str, voters: int) -> list[str]:
    """One entry a voter, of a parameter that has one for all or one each."""
    entries = [entry.strip() for entry in text.split(separator)]
    if len(entries) not in (1, voters):
        raise PerceptError(
            f"{parameter} has {len(entries)} entries for {voters} voters: give one for all,"
            f" or one each, separated by '{separator}'."
        )
    return entries * (voters // len(entries))


def _parse_integers(text: str, parameter: str, voters: int) -> list[int]:
    entries = _split_entries(text, parameter, ",", voters)
    if not all(entry.isdigit() for entry in entries):
        raise PerceptError(f"{parameter} is '{text}': give whole numbers separated by commas.")
    return [int(entry) for entry in entries]


def find_voters(logs: Path, voters: str = "") -> dict[str, Path]:
    """Folders of the voters by name: of those in `logs` the folder's name, of others the run's,
    with dashes for slashes.

    Args:
        logs: folder of the run, train_logs/<run>/.
        voters: names of folders in `logs`, or of runs under train_logs/, separated by commas, by
            default all that lie in `logs`.

    Raises:
        PerceptError: naming a folder that holds no low level, or if there is none at all.
    """
    all_logs = next(folder for folder in (logs, *logs.parents) if folder.name == "train_logs")
    folders: dict[str, Path] = {}
    for name in filter(None, (name.strip() for name in voters.split(","))):
        check_name(name, "A name in voters", parts=3)
        is_local = (logs / name).is_dir()
        folders[name.replace("/", "-")] = logs / name if is_local else all_logs / name
    if not folders:
        folders = {folder.name: folder for folder in _list_voters(logs)}
    if not folders:
        raise PerceptError(
            f"There are no voters under {logs}: run notebook 02_train_roi_models first, or name"
            " runs in `voters`."
        )
    for folder in folders.values():
        if not (folder / "normaliser.safetensors").exists():
            raise PerceptError(
                f"The voter {folder} is not there or not trained (no normaliser.safetensors): train"
                " it first, or leave it out of `voters`."
            )
    return folders


def _list_voters(logs: Path) -> list[Path]:
    """Folders of a run's own voters, in the order in which its parameters name them."""
    folders = [path.parent for path in logs.glob("*/voter.json")]
    return sorted(folders, key=lambda folder: read_json(folder / "voter.json")["place"])


def open_voter(
    folder: Path, subject: Subject, file: str, device: str = "cpu"
) -> tuple[nn.Module, dict[str, Any], Normaliser]:
    """A voter's decoder, its config and its normaliser, after a check that all three are of the
    same voxels.

    Args:
        folder: train_logs/<run>/.
        subject: whose betas it will read.
        file: the decoder's file in the folder, e.g. "low_level/best.safetensors".
        device: torch device.

    Raises:
        PerceptError: if the regions that the checkpoint names are not the voxels that its
            normaliser selects in this subject, or it was trained on other data.
    """
    check_trained_on(folder, subject.key, subject.identity)
    decoder, config = load_decoder(folder / file, device)
    normaliser = Normaliser.load(folder / "normaliser.safetensors")
    rois = str(config.get("training", {}).get("rois", ""))
    if rois.strip() in ("", "-"):
        columns = np.arange(subject.betas.shape[1])
    else:
        columns = subject.select_rois(rois)[0]
    selected = normaliser.columns
    if selected is None:
        selected = np.arange(normaliser.n_voxels)
    if not np.array_equal(columns, selected):
        raise PerceptError(
            f"{folder / file} was trained on the regions '{rois}', which are other voxels of"
            f" subject {subject.subj} of {subject.folder.name} than the {len(selected)} that its"
            " normaliser selects: train it again on this data set."
        )
    return decoder, config, normaliser


@dataclass(frozen=True)
class SelectionInputs:
    """What a rule may look at: embeddings of images, and what the brain predicts.

    Attributes:
        candidates: CLIP's final embedding of each voter's reconstruction (images, voters, dim).
        low_level: the same of each voter's low-level image (images, voters, dim).
        tokens: the candidates' tokens in the space of `brain` (images, voters, features), or None.
        brain: the tokens that the brain predicts (images, features), or None where no high level
            was trained.
    """

    candidates: Tensor
    low_level: Tensor
    tokens: Tensor | None = None
    brain: Tensor | None = None


def compare_embeddings(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last axis; -2 for an image whose embedding is not finite."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).nan_to_num(-2.0)


def published(inputs: SelectionInputs) -> Tensor:
    """Scores (images, voters): similarity of a candidate to its own low-level image.

    It needs no truth, but favours what stays near its blurry beginning: a candidate that the
    generator has hardly changed wins.
    """
    return compare_embeddings(inputs.candidates, inputs.low_level)


def medoid(inputs: SelectionInputs) -> Tensor:
    """Scores (images, voters): mean similarity of a candidate to the other candidates, that is how
    far the voters agree on it.
    """
    unit = F.normalize(inputs.candidates.float(), dim=-1).nan_to_num()  # (images, voters, dim)
    voters = unit.shape[1]
    to_itself = unit.square().sum(-1)
    to_others = (unit @ unit.mT).sum(-1) - to_itself
    similarity = to_others / max(1, voters - 1)
    return similarity.masked_fill(inputs.candidates.isnan().any(-1), -2.0)


def agreement(inputs: SelectionInputs) -> Tensor:
    """Scores (images, voters): similarity of a candidate's tokens to those that the brain predicts,
    by a model that took no part in generating the candidates.
    """
    if inputs.tokens is None or inputs.brain is None:
        raise PerceptError(
            "The rule 'agreement' needs tokens predicted from the brain: train a high level"
            " (notebook 01), or choose published or medoid."
        )
    return compare_embeddings(inputs.tokens, inputs.brain[:, None])


VOTES: dict[str, Callable[[SelectionInputs], Tensor]] = {
    "published": published,
    "medoid": medoid,
    "agreement": agreement,
}


def vote(rule: str, inputs: SelectionInputs) -> Tensor:
    """Which candidate a rule of VOTES chooses, int64 (images,); among equals the first.

    Raises:
        PerceptError: for an unknown rule, or one that needs what the inputs lack.
    """
    if rule not in VOTES:
        raise PerceptError(f"There is no rule '{rule}': choose one of {', '.join(VOTES)}.")
    return VOTES[rule](inputs).argmax(1)


def oracle(candidates: Tensor, seen: Tensor) -> Tensor:
    """The candidate nearest to the image that was shown, int64 (images,): the most that choosing
    could give, not a result.

    Args:
        candidates: CLIP's final embedding (images, voters, dim).
        seen: of the images that were shown (images, dim).
    """
    return compare_embeddings(candidates, seen[:, None]).argmax(1)
