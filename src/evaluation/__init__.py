"""From reconstructions to scores with their baselines and intervals: records, statistics, comparison, report."""

from src.evaluation.alarms import check_alignment, check_leak, check_outputs
from src.evaluation.brain_correlation import brain_correlation, brain_correlation_centred, roi_masks
from src.evaluation.captions import (
    CAPTION_METRICS,
    SentenceEncoder,
    by_text,
    caption_lines,
    caption_rows,
    corpus_lines,
    most_common,
    read_captions,
    ready_metrics,
    scored_pairings,
)
from src.evaluation.pictures import load_pictures, mean_picture, most_alike, pixel_hash
from src.evaluation.records import add_results, make_record, make_records, provenance, score_table
from src.evaluation.report import gallery_widget, write_report
from src.evaluation.statistics import bootstrap_mean, derangements, noise_ceiling, paired_bootstrap
from src.evaluation.tables import retrieval_rows, score_lines, write_lines
from src.evaluation.votes import told, verdict, worth

__all__ = [
    "CAPTION_METRICS",
    "SentenceEncoder",
    "add_results",
    "bootstrap_mean",
    "brain_correlation",
    "brain_correlation_centred",
    "by_text",
    "caption_lines",
    "caption_rows",
    "check_alignment",
    "check_leak",
    "check_outputs",
    "corpus_lines",
    "derangements",
    "gallery_widget",
    "load_pictures",
    "make_record",
    "make_records",
    "mean_picture",
    "most_alike",
    "most_common",
    "noise_ceiling",
    "paired_bootstrap",
    "pixel_hash",
    "provenance",
    "read_captions",
    "ready_metrics",
    "retrieval_rows",
    "roi_masks",
    "score_lines",
    "score_table",
    "scored_pairings",
    "told",
    "verdict",
    "worth",
    "write_lines",
    "write_report",
]
