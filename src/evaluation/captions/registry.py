"""The metrics of captions by name, and those that can be computed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from src.evaluation.captions.sentences import SentenceEncoder, compare_nearest, embed_each_text
from src.evaluation.captions.text import to_text_lists
from src.evaluation.captions.word_metrics import cider, make_bleu, make_rouge, meteor
from src.evaluation.captions.wordnet import load_wordnet
from src.evaluation.records import installed_version
from src.metrics import Metric
from src.pretrained.clip import Clipper
from src.utils import PerceptError, require_extra

LIBRARIES = ("nltk", "rouge_score", "pycocoevalcap")

CLIPS = {"CLIP-B text": "ViT-B/32", "CLIP-L text": "ViT-L/14"}

_PUBLISHED = "MindEye2, arXiv 2403.11207, evaluation of captions"


def _word_metric(
    name: str, compare: Callable[..., np.ndarray], library: str, text: str, source: str
) -> Metric:
    """A metric of shared words; its description names the version of the library."""
    description = f"{text} ({library} {installed_version(library)})"
    return Metric(name, compare, "higher", None, description, source, to_text_lists)


def _rouge_metric(name: str, variant: str, text: str, source: str) -> Metric:
    description = f"F1 of {text}, no stemming"
    return _word_metric(name, make_rouge(variant), "rouge-score", description, source)


def _bleu_metric(n: int) -> Metric:
    text = f"sentence BLEU of 1 to {n} words, one added to each count from pairs on"
    source = "Papineni et al. 2002; Lin & Och 2004"
    return _word_metric(f"BLEU-{n}", make_bleu(n), "nltk", text, source)


def _network_metric(name: str, network: str, source: str) -> Metric:
    """A metric of embeddings that has to be given its network before it can be computed."""

    def embed(texts: Any) -> Any:
        raise PerceptError(
            f"The metric {name} looks through {network}, which it was not given: use"
            f" CAPTION_METRICS['{name}'].through(embed_each_text(embed))."
        )

    text = f"cosine of the embeddings of caption and reference ({network})"
    return Metric(name, compare_nearest, "higher", None, text, source, embed, network=network)


_METEOR_TEXT = "words, stems and WordNet's synonyms in common, and their order"
_CIDER_TEXT = "CIDEr-D; rarity of phrases counted in the references of the test set"
_CIDER_SOURCE = "Vedantam et al. 2015, arXiv 1411.5726"
_LIN = f"Lin 2004; {_PUBLISHED}"

_REGISTERED = (
    _word_metric("METEOR", meteor, "nltk", _METEOR_TEXT, f"Banerjee & Lavie 2005; {_PUBLISHED}"),
    _rouge_metric("ROUGE-1", "rouge1", "single words", _LIN),
    _rouge_metric("ROUGE-2", "rouge2", "pairs of words", "Lin 2004"),
    _rouge_metric("ROUGE-L", "rougeL", "the longest common subsequence", _LIN),
    _network_metric("Sentence", "all-MiniLM-L6-v2", f"Reimers & Gurevych 2019; {_PUBLISHED}"),
    _network_metric("CLIP-B text", "CLIP ViT-B/32", _PUBLISHED),
    _network_metric("CLIP-L text", "CLIP ViT-L/14", _PUBLISHED),
    *(_bleu_metric(n) for n in range(1, 5)),
    _word_metric("CIDEr", cider, "pycocoevalcap", _CIDER_TEXT, _CIDER_SOURCE),
)
CAPTION_METRICS: dict[str, Metric] = {metric.name: metric for metric in _REGISTERED}


class PreparedMetrics(NamedTuple):
    """Metrics of captions that can be computed here.

    Attributes:
        metrics: with their networks.
        missing: why others cannot be computed, a sentence by name.
        networks: fingerprints of the networks by name of the metric.
    """

    metrics: list[Metric]
    missing: dict[str, str]
    networks: dict[str, Any]


def prepare_caption_metrics(
    names: str, weights: str, device: str = "cpu", clipper: Clipper | None = None
) -> PreparedMetrics:
    """The metrics of some names, with their networks.

    Args:
        names: of `CAPTION_METRICS`, separated by commas, or "all".
        weights: "hub", "mini" or a folder, of the networks; with "mini" their metrics are called
            "mini:".
        device: torch device of these.
        clipper: CLIP ViT-L/14 (or the mini one) where it is loaded already.

    Raises:
        PerceptError: an unknown name, a library that is not installed, or weights that are not to
            be had.
    """
    if names == "all":
        names = ",".join(CAPTION_METRICS)
    requested = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in requested if name not in CAPTION_METRICS]
    if unknown:
        raise PerceptError(
            f"caption_metrics names {', '.join(unknown)}: choose among"
            f" {', '.join(CAPTION_METRICS)}."
        )
    for library in LIBRARIES if requested else ():
        require_extra(library, "captions")  # before anything is computed
    prepared = PreparedMetrics([], {}, {})
    for name in requested:
        reason = _explain_missing(name, weights)
        if reason:
            prepared.missing[name] = reason
            continue
        metric = CAPTION_METRICS[name]
        if metric.network:
            network, embed = _load_network(name, weights, device, clipper)
            prepared.networks[name] = network.fingerprint()
            prefix = "mini:" if weights == "mini" else ""
            metric = metric.through(embed_each_text(embed), prefix)
        prepared.metrics.append(metric)
    return prepared


def _explain_missing(name: str, weights: str) -> str:
    """Why a metric cannot be computed here, "" where it can."""
    if name == "METEOR":
        try:
            load_wordnet()
        except PerceptError as error:
            return str(error)
    if name == "CLIP-B text" and weights == "mini":
        return "The mini world has one CLIP, which stands for ViT-L/14."
    return ""


def _load_network(
    name: str, weights: str, device: str, clipper: Clipper | None
) -> tuple[Any, Callable[..., Any]]:
    """The network of a metric, and its function that embeds captions."""
    if name == "Sentence":
        encoder = SentenceEncoder(weights, device)
        return encoder, encoder.embed
    variant = CLIPS[name]
    if clipper is None or clipper.variant != variant:
        clipper = Clipper(weights, hidden=False, norm_embs=True, device=device, variant=variant)
    return clipper, clipper.embed_text
