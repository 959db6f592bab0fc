"""Captions of a run, the pairings in which they are scored, and the tables of their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.captions.word_metrics import corpus_bleu
from src.evaluation.statistics import Interval, bootstrap_mean, percentile_interval
from src.files.foreign import load_parquet, shorten
from src.utils import PerceptError

PAIRINGS = {  # as published: which column is scored against which
    "img_ref": ("git_image", "reference"),
    "brain_ref": ("brain", "reference"),
    "brain_img": ("brain", "git_image"),
}

CAPTION_BASELINES = ("shuffled", "common_caption")  # of captions from the brain

REQUIRED_COLUMNS = {"image", "brain", "git_image", "reference", "references"}

PAIRING_HEADS = {
    "brain_ref": "brain's to people's",
    "img_ref": "image's to people's",
    "brain_img": "brain's to image's",
    "relative": "relative",
}
BASELINE_HEADS = {
    "shuffled": "brain's to other people's",
    "common_caption": "one sentence to people's",
}


def read_captions(path: str | Path, image_ids: Any, references: str = "one") -> pd.DataFrame:
    """The captions that notebook 04 wrote, in the order of the test images.

    Args:
        path: of captions_brain.parquet, columns image, brain, git_image, reference and references
            (a JSON list each).
        image_ids: (n,) ids of the test images.
        references: "one" (as published) or "all"; what the column `reference` holds afterwards, a
            text or a list of texts.

    Returns:
        [brain, git_image, reference, ...] indexed by image; without the columns reference and
        references where people wrote of no image.

    Raises:
        PerceptError: columns are missing, the captions are of other images, or some images have no
            reference.
    """
    table = load_parquet(path, "run notebook 04 again")
    missing = sorted(REQUIRED_COLUMNS - set(table.columns))
    if missing:
        raise PerceptError(f"{path} lacks the columns {', '.join(missing)}: run notebook 04 again.")
    if sorted(table["image"]) != sorted(image_ids):
        raise PerceptError(
            f"{path} holds captions of other images than those that were reconstructed: run"
            " notebook 04 again, after notebook 03."
        )
    table = table.set_index("image").loc[list(image_ids)]
    is_bare = table["reference"] == ""
    if is_bare.all():
        return table.drop(columns=["reference", "references"])
    if is_bare.any():
        raise PerceptError(
            f"{is_bare.sum()} of {len(table)} test images have no caption written by a person:"
            " captions.parquet of the dataset must have one for each."
        )
    if references == "all":
        texts: list[Any] = [_parse_texts(entry, path) for entry in table["references"]]
        return table.assign(reference=texts)
    return table


def _parse_texts(texts: str, path: str | Path) -> list[str]:
    """The texts of a JSON list in a table."""
    try:
        parsed = json.loads(texts)
    except (TypeError, ValueError) as error:
        raise PerceptError(
            f"{path} holds references that are no JSON list ({shorten(error)}): run notebook 04"
            " again."
        ) from error
    if not isinstance(parsed, list) or not all(isinstance(text, str) for text in parsed):
        raise PerceptError(f"{path} holds references that are no list of texts: run 04 again.")
    return parsed


def find_most_common_caption(captions: Sequence[str]) -> str:
    """The caption that occurs most often, of several the first in alphabetical order."""
    counts = pd.Series(list(captions)).value_counts()
    return str(min(counts.index[counts == counts.max()]))


def list_pairings(captions: pd.DataFrame) -> list[str]:
    """The pairings of `PAIRINGS` whose columns there are."""
    return [name for name, pair in PAIRINGS.items() if set(pair) <= set(captions.columns)]


def pair_captions(
    captions: pd.DataFrame, common: str
) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """What `records.score_table` takes, for the captions from the brain: {pairing: (references,
    conditions)}.

    Conditions: "system" the captions from the brain; "common_caption" the same sentence for every
    image; "ceiling" the captions that were written while looking at the images themselves (against
    themselves in "brain_img"); "true_tokens", where known, those of the true tokens.

    Args:
        captions: of `read_captions`; without people's captions the only pairing is "brain_img".
        common: of `find_most_common_caption`, of training captions.
    """
    conditions = {
        "system": list(captions["brain"]),
        "common_caption": [common] * len(captions),
        "ceiling": list(captions["git_image"]),
    }
    if "ceiling" in captions:
        conditions["true_tokens"] = list(captions["ceiling"])
    pairs = {}
    for name in [name for name in list_pairings(captions) if name != "img_ref"]:
        references = list(captions[PAIRINGS[name][1]])
        pairs[name] = (references, conditions)
    return pairs


def relative_score(brain_img: Any, img_ref: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of brain_img (n,) over mean of img_ref (n,), with a 95 % bootstrap interval over the
    images.

    How near captions from the brain come to those of the image, in units of how near these come to
    a person's.

    Raises:
        PerceptError: the captions of the images score 0.
    """
    a = np.asarray(brain_img, np.float64)
    b = np.asarray(img_ref, np.float64)
    if b.mean() <= 0:
        raise PerceptError(
            "The captions of the images score 0 against the references: nothing can be taken"
            " relative to that."
        )
    n = len(a)
    picks = np.random.default_rng(seed).integers(0, n, (n_boot, n))
    denominators = b[picks].mean(1)
    is_positive = denominators > 0
    ratios = a[picks].mean(1)[is_positive] / denominators[is_positive]
    low, high = percentile_interval(ratios)
    return Interval(float(a.mean() / b.mean()), low, high)


def caption_table(scored: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Scores of captions in the published pairings, beside their baselines.

    Args:
        scored: `score_table` of each entry of `pair_captions`.

    Returns:
        [metric, pairing, value, low, high, n, shuffled, common_caption], for each metric the lines
        img_ref (what the captioner says of the image itself, against people), brain_ref, brain_img
        (the brain's against what the captioner says of the image) and relative (brain_img over
        img_ref; no baselines). Without people's captions there is brain_img alone.
    """
    values = {pairing: _collect_values(table) for pairing, table in scored.items()}
    lines: list[dict[str, Any]] = []
    for metric in scored["brain_img"]["metric"].unique():
        brain_img = values["brain_img"][metric, "system"]
        pairings = {"brain_img": brain_img}
        if "brain_ref" in scored:
            pairings = {
                "img_ref": values["brain_ref"][metric, "ceiling"],
                "brain_ref": values["brain_ref"][metric, "system"],
                "brain_img": brain_img,
            }
        for pairing, scores in pairings.items():
            line = _summarise(metric, pairing, bootstrap_mean(scores), len(scores))
            if pairing in values:
                for name in CAPTION_BASELINES:
                    line[name] = values[pairing][metric, name].mean()
            lines.append(line)
        if "img_ref" in pairings:
            relative = relative_score(brain_img, pairings["img_ref"])
            lines.append(_summarise(metric, "relative", relative, len(brain_img)))
    return pd.DataFrame(lines)


def _collect_values(table: pd.DataFrame) -> dict[Any, np.ndarray]:
    """Scores of a `score_table` by (metric, condition)."""
    groups = table.groupby(["metric", "row"], sort=False)
    return {key: part["value"].to_numpy() for key, part in groups}


def _summarise(metric: str, pairing: str, interval: Interval, n: int) -> dict[str, Any]:
    return {"metric": metric, "pairing": pairing, **interval._asdict(), "n": n}


def corpus_bleu_table(captions: pd.DataFrame, common: str, order: Any) -> pd.DataFrame:
    """`corpus_bleu` in the published pairings as `caption_table` gives the other scores, without
    intervals; `order` (n,) is the shuffled pairing.
    """
    lines = []
    for pairing in list_pairings(captions):
        scored_column, reference_column = PAIRINGS[pairing]
        references = list(captions[reference_column])
        scored = list(captions[scored_column])
        baselines = {
            "shuffled": corpus_bleu(references, scored, order),
            "common_caption": corpus_bleu(references, [common] * len(scored)),
        }
        for name, value in corpus_bleu(references, scored).items():
            line = {
                "metric": f"corpus {name}",
                "pairing": pairing,
                "value": value,
                "n": len(scored),
            }
            line |= {baseline: scores[name] for baseline, scores in baselines.items()}
            lines.append(line)
    return pd.DataFrame(lines).sort_values("metric", kind="stable", ignore_index=True)


def format_caption_table(table: pd.DataFrame) -> list[dict[str, str]]:
    """`caption_table` and `corpus_bleu_table` for a reader: a row a metric, a column a pairing, the
    baselines of the captions from the brain at the end.
    """
    rows = []
    for metric, part in table.groupby("metric", sort=False):
        indexed = part.set_index("pairing")
        lines: dict[str, Any] = {str(name): line.to_dict() for name, line in indexed.iterrows()}
        row = {"metric": str(metric)}
        for pairing, head in PAIRING_HEADS.items():
            if pairing in lines:
                row[head] = _format_score(lines[pairing])
        for baseline, head in BASELINE_HEADS.items():
            if "brain_ref" in lines:
                row[head] = f"{lines['brain_ref'][baseline]:.3f}"
        rows.append(row)
    return rows


def _format_score(line: Mapping[str, Any]) -> str:
    """A value with its interval, where it has one."""
    text = f"{line['value']:.3f}"
    if pd.notna(line.get("low")):
        text += f" [{line['low']:.3f}, {line['high']:.3f}]"
    return text
