"""Results of several runs on the same test images, compared image by image."""

from src.evaluation.compare.curves import curves, pretraining_gain, smallest_sufficient
from src.evaluation.compare.differences import (
    classify_difference,
    clear_best,
    comparison,
    differences,
    is_paired,
    paired_difference,
)
from src.evaluation.compare.held_out import HeldOutPair, held_out_effect, held_out_pairs
from src.evaluation.compare.runs import (
    ScoredRun,
    choose_metrics,
    missing_metrics,
    read_runs,
    select_same_images,
    setting_differences,
)
from src.evaluation.compare.table import Table, format_cell, tex
from src.evaluation.tables import display_name

__all__ = [
    "HeldOutPair",
    "ScoredRun",
    "Table",
    "choose_metrics",
    "classify_difference",
    "clear_best",
    "comparison",
    "curves",
    "differences",
    "display_name",
    "format_cell",
    "held_out_effect",
    "held_out_pairs",
    "is_paired",
    "missing_metrics",
    "paired_difference",
    "pretraining_gain",
    "read_runs",
    "select_same_images",
    "setting_differences",
    "smallest_sufficient",
    "tex",
]
