"""Scores of captions: how well one caption fits what people wrote of the same image.

- Every metric is a `Metric` of src/metrics.py that compares sentences instead of images, so
  intervals, shuffled pairings and baselines are computed as everywhere (`records.score_table` with
  references for images and captions for reconstructions).
- The numbers come from the field's libraries, and what each does is in its description: nltk
  (METEOR, BLEU), rouge_score (ROUGE), pycocoevalcap (CIDEr, and BLEU of all captions together; only
  what needs no Java), sentence_transformers, and CLIP's text encoder. Only the two that look
  through a network download anything, with `weights` "hub". The libraries are optional (`bash
  setup.sh --extra captions`) and imported where they are used.
- With several references METEOR, ROUGE and the cosines take the one that fits best, BLEU and CIDEr
  have rules of their own for them. The published evaluation (MindEye2, arXiv 2403.11207) has one
  reference an image.
- METEOR needs WordNet, which no package of PyPI holds. Without it METEOR is not computed, as
  without synonyms it would be another score under the same name.
"""

from src.evaluation.captions.registry import (
    CAPTION_METRICS,
    PreparedMetrics,
    prepare_caption_metrics,
)
from src.evaluation.captions.sentences import SentenceEncoder, embed_each_text
from src.evaluation.captions.tables import (
    caption_table,
    corpus_bleu_table,
    find_most_common_caption,
    format_caption_table,
    pair_captions,
    read_captions,
    relative_score,
)
from src.evaluation.captions.text import to_text_lists, tokenize_lowercase, tokenize_words
from src.evaluation.captions.word_metrics import cider, corpus_bleu, meteor
from src.evaluation.captions.wordnet import find_wordnet_folder, load_wordnet

__all__ = [
    "CAPTION_METRICS",
    "PreparedMetrics",
    "SentenceEncoder",
    "caption_table",
    "cider",
    "corpus_bleu",
    "corpus_bleu_table",
    "embed_each_text",
    "find_most_common_caption",
    "find_wordnet_folder",
    "format_caption_table",
    "load_wordnet",
    "meteor",
    "pair_captions",
    "prepare_caption_metrics",
    "read_captions",
    "relative_score",
    "to_text_lists",
    "tokenize_lowercase",
    "tokenize_words",
]
