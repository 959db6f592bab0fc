"""The training loop and its parts."""

from src.training.augment import augmented, clip_augmentation, teacher_augmentation
from src.training.batches import ORDERS, FirstSamples, batches, epoch_order, evaluate
from src.training.converter import fit_converter
from src.training.loop import PATIENCE, fit, load_best
from src.training.optim import DECAYS, SCHEDULERS, parameter_groups
from src.training.processes import PRECISIONS, check_precision, gather, own_rows
from src.training.subjects import SeveralSubjects, check_gradients, start_from
from src.training.tracker import tracker

__all__ = [
    "DECAYS",
    "FirstSamples",
    "ORDERS",
    "PATIENCE",
    "PRECISIONS",
    "SCHEDULERS",
    "SeveralSubjects",
    "augmented",
    "batches",
    "check_gradients",
    "check_precision",
    "clip_augmentation",
    "epoch_order",
    "evaluate",
    "fit",
    "fit_converter",
    "gather",
    "load_best",
    "own_rows",
    "parameter_groups",
    "start_from",
    "teacher_augmentation",
    "tracker",
]
