"""Every figure."""

from src.figures.base import COLOURS, CONTROL_MARKS, save, style
from src.figures.brain import (
    glass_brain,
    region_bars,
    roi_figure,
    roi_sets,
    trials_figure,
    voxel_map,
)
from src.figures.images import contact_sheet, hits_and_misses, image_grid, vote_sheet
from src.figures.scores import (
    abstain_curve,
    compare_dots,
    curves_over,
    held_out_effect,
    retrieval_curve,
    score_by_distance,
    score_dots,
    umap_scatter,
)
from src.figures.sweeps import region_curves, sweep_curves, sweep_look
from src.figures.training import training_curves

__all__ = [
    "COLOURS",
    "CONTROL_MARKS",
    "abstain_curve",
    "compare_dots",
    "contact_sheet",
    "curves_over",
    "glass_brain",
    "held_out_effect",
    "hits_and_misses",
    "image_grid",
    "region_bars",
    "region_curves",
    "retrieval_curve",
    "roi_figure",
    "roi_sets",
    "save",
    "score_by_distance",
    "score_dots",
    "style",
    "sweep_curves",
    "sweep_look",
    "training_curves",
    "trials_figure",
    "umap_scatter",
    "vote_sheet",
    "voxel_map",
]
