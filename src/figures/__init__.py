"""Every figure of a run: plain matplotlib, one style, returned closed."""

from src.figures.base import COLOURS, CONTROL_MARKS, apply_style, save_figure
from src.figures.brain import plot_glass_brain, plot_trials, plot_voxel_map
from src.figures.comparisons import plot_comparison, plot_curves_over, plot_held_out_effect
from src.figures.embeddings import plot_embeddings, plot_tokens
from src.figures.encoding import (
    choose_regions,
    plot_prediction_accuracy,
    plot_spectra,
    plot_variance_partition,
)
from src.figures.images import (
    draw_vote_sheet,
    plot_contact_sheet,
    plot_hits_and_misses,
    plot_image_grid,
)
from src.figures.regions import plot_region_bars, plot_roi_reliability, plot_roi_sets
from src.figures.scores import (
    plot_abstention_curve,
    plot_retrieval_curve,
    plot_score_by_distance,
    plot_score_dots,
)
from src.figures.sweeps import plot_region_curves, plot_sweep_curves, plot_sweep_levels
from src.figures.training import plot_training_curves

__all__ = [
    "COLOURS",
    "CONTROL_MARKS",
    "apply_style",
    "choose_regions",
    "draw_vote_sheet",
    "plot_abstention_curve",
    "plot_comparison",
    "plot_contact_sheet",
    "plot_curves_over",
    "plot_embeddings",
    "plot_glass_brain",
    "plot_held_out_effect",
    "plot_hits_and_misses",
    "plot_image_grid",
    "plot_prediction_accuracy",
    "plot_region_bars",
    "plot_region_curves",
    "plot_retrieval_curve",
    "plot_roi_reliability",
    "plot_roi_sets",
    "plot_score_by_distance",
    "plot_score_dots",
    "plot_spectra",
    "plot_sweep_curves",
    "plot_sweep_levels",
    "plot_tokens",
    "plot_training_curves",
    "plot_trials",
    "plot_variance_partition",
    "plot_voxel_map",
    "save_figure",
]
