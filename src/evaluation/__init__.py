"""From reconstructions to scores with baselines and intervals: records, statistics, reports."""

from src.evaluation.brain_correlation import brain_correlation, brain_correlation_centred, roi_masks
from src.evaluation.captions import (
    CAPTION_METRICS,
    SentenceEncoder,
    caption_table,
    corpus_bleu_table,
    embed_each_text,
    find_most_common_caption,
    format_caption_table,
    pair_captions,
    prepare_caption_metrics,
    read_captions,
)
from src.evaluation.images import (
    ImagePairs,
    compute_mean_image,
    find_most_similar,
    hash_pixels,
    load_image_pairs,
    load_images,
)
from src.evaluation.records import add_results, make_record, make_records, provenance, score_table
from src.evaluation.report import gallery_widget, write_report
from src.evaluation.sanity_checks import check_alignment, check_leak, check_outputs
from src.evaluation.statistics import bootstrap_mean, derangements, noise_ceiling, paired_bootstrap
from src.evaluation.tables import published_table, retrieval_records, write_csv, write_table
from src.evaluation.votes import describe_ensemble_gain, ensemble_gain, gain_table

__all__ = [
    "CAPTION_METRICS",
    "ImagePairs",
    "SentenceEncoder",
    "add_results",
    "bootstrap_mean",
    "brain_correlation",
    "brain_correlation_centred",
    "caption_table",
    "check_alignment",
    "check_leak",
    "check_outputs",
    "compute_mean_image",
    "corpus_bleu_table",
    "derangements",
    "describe_ensemble_gain",
    "embed_each_text",
    "ensemble_gain",
    "find_most_common_caption",
    "find_most_similar",
    "format_caption_table",
    "gain_table",
    "gallery_widget",
    "hash_pixels",
    "load_image_pairs",
    "load_images",
    "make_record",
    "make_records",
    "noise_ceiling",
    "pair_captions",
    "paired_bootstrap",
    "prepare_caption_metrics",
    "provenance",
    "published_table",
    "read_captions",
    "retrieval_records",
    "roi_masks",
    "score_table",
    "write_report",
    "write_csv",
    "write_table",
]
