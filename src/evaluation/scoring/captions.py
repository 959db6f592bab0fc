"""Captions from the brain, against what people wrote and what the captioner says of the image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from src.evaluation.captions import (
    caption_table,
    corpus_bleu_table,
    find_most_common_caption,
    format_caption_table,
    pair_captions,
    prepare_caption_metrics,
    read_captions,
)
from src.evaluation.records import add_results, make_records, score_table
from src.evaluation.scoring.instruments import Instruments
from src.evaluation.scoring.material import Material
from src.evaluation.statistics import derangements
from src.metrics import Metric

# by pairing, what its scores are called beside the name of the metric
ENDINGS = {"brain_ref": "", "brain_img": " to image's caption"}

HELD_AGAINST = {
    "one": "one sentence of a person an image, as published",
    "all": "all sentences that people wrote of an image",
}

NO_CAPTIONS = "There are no captions."


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions; all empty where there are none.

    Attributes:
        captions: of `read_captions`, or None.
        records: of `make_record`.
        scored: `score_table` by pairing.
        summary: of `caption_table` and the score of all captions together.
        left_out: why a metric could not be computed, by its name.
        sentences: for a reader.
    """

    captions: pd.DataFrame | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    scored: dict[str, pd.DataFrame] = field(default_factory=dict)
    summary: pd.DataFrame = field(default_factory=pd.DataFrame)
    left_out: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    def show(self) -> Any:
        """A table for a reader: a line a metric, a column a pairing."""
        if not len(self.summary):
            return NO_CAPTIONS
        pivoted = self.summary.pivot(index="metric", columns="pairing", values="value")
        return pivoted.reindex(self.summary["metric"].unique()).round(3)

    def make_table(self, references: str) -> list[dict[str, Any]]:
        """The table of the report, as a list of one; of none where there are no scores."""
        if not len(self.summary):
            return []
        texts = [
            f"Held against {HELD_AGAINST[references]}; relative is the third column over the"
            " second.",
            *(f"{name} is left out. {why}" for name, why in self.left_out.items()),
        ]
        rows = format_caption_table(self.summary)
        return [{"title": "Captions from the brain", "note": " ".join(texts), "rows": rows}]

    def add_to_results(self, material: Material, provenance: dict[str, Any]) -> None:
        """Write the scores as a part of their own, "06_captions"."""
        if not self.scored:
            return
        tables = [
            table.assign(metric=table["metric"] + ENDINGS[pairing])
            for pairing, table in self.scored.items()
        ]
        scores = pd.concat(tables, ignore_index=True)
        folder = material.run.results
        add_results(folder, "06_captions", scores, self.records, provenance | {"selection": []})


def score_captions(material: Material, instruments: Instruments) -> CaptionScores:
    """Score what notebook 04 read from the brain, where it has.

    Floors: the same captions for wrong images, and one sentence for all images, the most common one
    of training. The captioner looking at the image is the upper bound.
    """
    run, p = material.run, material.run.parameters
    file = run.results / "captions_brain.parquet"
    if material.subject is None or not p["caption_metrics"]:
        return CaptionScores()
    if not file.exists():
        sentence = f"No captions are scored: notebook 04 has written no {file.name} for this run."
        return CaptionScores(sentences=[sentence])
    captions = read_captions(file, material.image_ids, str(p["references"]))
    common, sentences = _find_common(material, captions)
    metrics, left_out, networks = prepare_caption_metrics(
        str(p["caption_metrics"]), str(p["weights"]), run.device, instruments.clipper
    )
    instruments.models.update(networks)
    sentences.append(f"held against every image: '{common}'")
    sentences += [f"{name} is left out. {why}" for name, why in left_out.items()]
    scores = CaptionScores(captions=captions, left_out=left_out, sentences=sentences)
    if not metrics:
        return scores
    for pairing, (references, conditions) in pair_captions(captions, common).items():
        table = score_table(references, conditions, metrics, **material.score_options())
        scores.scored[pairing] = table
        renamed = table.assign(metric=table["metric"] + ENDINGS[pairing])
        named = [_rename(metric, ENDINGS[pairing]) for metric in metrics]
        scores.records.extend(make_records(renamed, named, **material.labels))
    order = next(derangements(len(material.seen), 1, int(p["seed"])))
    tables = [caption_table(scores.scored), corpus_bleu_table(captions, common, order)]
    return replace(scores, summary=pd.concat(tables, ignore_index=True))


def _find_common(material: Material, captions: pd.DataFrame) -> tuple[str, list[str]]:
    """The most common sentence, of people's of the training images where there are any, and what a
    reader is told.
    """
    subject = material.subject
    assert subject is not None
    if "reference" not in captions or subject.captions is None:
        sentence = (
            "People wrote of no test image: captions are held against GIT's of the image alone."
        )
        return find_most_common_caption(list(captions["git_image"])), [sentence]
    trained = subject.captions["image"].isin(subject.image_ids("train"))
    sentences = subject.captions["caption"]
    if trained.any():
        sentences = sentences[trained]
    return find_most_common_caption(list(sentences)), []


def _rename(metric: Metric, ending: str) -> Metric:
    """A caption metric under the name that it has in one pairing."""
    description = f"{metric.description}; ceiling: the captioner looking at the image"
    return replace(metric, name=metric.name + ending, description=description)
