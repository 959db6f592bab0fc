"""Scores of captions by the words that they share with the references."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from src.evaluation.captions.text import (
    iterate_pairs,
    to_text_lists,
    tokenize_lowercase,
    tokenize_words,
)
from src.evaluation.captions.wordnet import load_wordnet
from src.utils import PerceptError, require_extra


def meteor(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """METEOR by exact words, stems and synonyms, alpha .9, beta 3, gamma .5: nltk's `meteor_score`,
    as the package `evaluate` calls it, (n,) in [0, 1].
    """
    meteor_score = require_extra("nltk.translate.meteor_score", "captions").meteor_score
    reader = load_wordnet()
    tokenize = lru_cache(maxsize=None)(tokenize_words)
    scores = []
    for texts, caption in iterate_pairs(references, captions, pairing):
        tokens = [tokenize(text) for text in texts]
        scores.append(meteor_score(tokens, tokenize(caption), wordnet=reader))
    return np.array(scores)


def make_rouge(variant: str) -> Callable[..., np.ndarray]:
    """ROUGE's F1 without stemming, as a function of references, captions and a pairing -> (n,).

    Args:
        variant: "rouge1", "rouge2" or "rougeL".
    """

    def compare(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
        rouge_scorer = require_extra("rouge_score.rouge_scorer", "captions")
        scorer = rouge_scorer.RougeScorer([variant], use_stemmer=False)
        pairs = iterate_pairs(references, captions, pairing)
        scores = [scorer.score_multi(texts, caption)[variant] for texts, caption in pairs]
        return np.array([score.fmeasure for score in scores])

    return compare


def make_bleu(n: int) -> Callable[..., np.ndarray]:
    """Sentence BLEU of 1 to n words, a function of references, captions and a pairing -> (n,)."""

    def compare(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
        bleu_score = require_extra("nltk.translate.bleu_score", "captions")
        smooth = bleu_score.SmoothingFunction().method2
        weights = (1 / n,) * n
        tokenize = lru_cache(maxsize=None)(tokenize_lowercase)
        scores = []
        for texts, caption in iterate_pairs(references, captions, pairing):
            tokens = [tokenize(text) for text in texts]
            score = bleu_score.sentence_bleu(
                tokens, tokenize(caption), weights, smoothing_function=smooth
            )
            scores.append(score)
        return np.array(scores, np.float64)

    return compare


def corpus_bleu(references: Any, captions: Any, pairing: Any = None) -> dict[str, float]:
    """BLEU-1 to BLEU-4 of all captions together, without smoothing (Papineni et al. 2002):
    pycocoevalcap's `BleuScorer`, as COCO's evaluation.

    Args:
        references: (n,) texts, or lists of them.
        captions: (n,) texts.
        pairing: (n,) the image whose references each caption is compared with; its own by default.

    Returns:
        {"BLEU-1": ..., "BLEU-4": ...} in [0, 1].
    """
    bleu_scorer = require_extra("pycocoevalcap.bleu.bleu_scorer", "captions")
    scorer = bleu_scorer.BleuScorer(n=4)
    pairs = iterate_pairs(to_text_lists(references), to_text_lists(captions), pairing)
    _add_pairs(scorer, pairs)
    scores = scorer.compute_score(option="closest", verbose=0)[0]
    return {f"BLEU-{n}": float(score) for n, score in enumerate(scores, 1)}


def cider(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """CIDEr-D of each caption, (n,) in [0, 10]: pycocoevalcap's `CiderScorer`, sigma 6, 1 to 4
    words.

    How rare a phrase is, is counted in the references of these very images: the score depends on
    the test set, and on how many references an image has.

    Raises:
        PerceptError: fewer than two images, of which no phrase could be called rare.
    """
    cider_scorer = require_extra("pycocoevalcap.cider.cider_scorer", "captions")
    if len(captions) < 2:
        raise PerceptError(
            "CIDEr weighs phrases by how rare they are among the images' references: it needs at"
            " least two images."
        )
    scorer = cider_scorer.CiderScorer()
    _add_pairs(scorer, iterate_pairs(references, captions, pairing))
    with np.errstate(invalid="ignore"):
        return np.asarray(scorer.compute_score()[1], np.float64)


def _add_pairs(scorer: Any, pairs: Any) -> None:
    """Hand captions and references to a scorer of pycocoevalcap, tokens joined by spaces."""

    @cache
    def join_tokens(text: str) -> str:
        return " ".join(tokenize_lowercase(text))

    for texts, caption in pairs:
        scorer.cook_append(join_tokens(caption), [join_tokens(text) for text in texts])
