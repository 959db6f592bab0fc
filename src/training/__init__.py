"""The training loop and its parts."""

from src.training.augment import (
    apply_augmentation,
    build_clip_augmentation,
    build_teacher_augmentation,
)
from src.training.batches import ORDERS, draw_epoch_order, evaluate, iterate_batches
from src.training.converter import fit_converter
from src.training.loop import PATIENCE, fit, load_best
from src.training.optim import DECAYS, SCHEDULERS, group_parameters
from src.training.processes import PRECISIONS, check_precision, gather, select_local_rows
from src.training.subjects import MultiSubjectDataset, check_gradients, load_pretrained
from src.training.tracker import open_tracker

__all__ = [
    "DECAYS",
    "ORDERS",
    "PATIENCE",
    "PRECISIONS",
    "SCHEDULERS",
    "MultiSubjectDataset",
    "apply_augmentation",
    "iterate_batches",
    "check_gradients",
    "check_precision",
    "build_clip_augmentation",
    "draw_epoch_order",
    "evaluate",
    "fit",
    "fit_converter",
    "gather",
    "load_best",
    "select_local_rows",
    "group_parameters",
    "load_pretrained",
    "build_teacher_augmentation",
    "open_tracker",
]
