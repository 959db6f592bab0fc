"""The training loop and its parts."""

from src.training.augment import (
    apply_augmentation,
    build_clip_augmentation,
    build_teacher_augmentation,
)
from src.training.batches import ORDERS, draw_epoch_order, evaluate, iterate_batches
from src.training.closed_form import CLOSED_FORMS, describe_closed_form, fit_closed_form
from src.training.converter import TokenPairs, fit_converter, fit_patch_converter
from src.training.epochs import append_row
from src.training.kernel import describe_kernel, estimate_repeat_noise, fit_kernel_decoder
from src.training.loop import fit, load_best
from src.training.optim import DECAYS, SCHEDULERS, group_parameters
from src.training.options import Batching, Checkpointing, Execution, Optimisation, Reporting
from src.training.processes import PRECISIONS, check_precision, gather, select_local_rows
from src.training.records import check_run, describe_history, record_training
from src.training.ridge import describe_ridge, fit_ridge_baseline
from src.training.subjects import MultiSubjectDataset, check_gradients, load_pretrained
from src.training.tracker import finish_tracking, open_tracker
from src.training.update import PATIENCE

__all__ = [
    "Batching",
    "CLOSED_FORMS",
    "Checkpointing",
    "DECAYS",
    "Execution",
    "MultiSubjectDataset",
    "ORDERS",
    "Optimisation",
    "PATIENCE",
    "PRECISIONS",
    "Reporting",
    "SCHEDULERS",
    "TokenPairs",
    "append_row",
    "apply_augmentation",
    "build_clip_augmentation",
    "build_teacher_augmentation",
    "check_gradients",
    "check_precision",
    "check_run",
    "describe_closed_form",
    "describe_history",
    "describe_kernel",
    "describe_ridge",
    "estimate_repeat_noise",
    "draw_epoch_order",
    "evaluate",
    "finish_tracking",
    "fit",
    "fit_closed_form",
    "fit_converter",
    "fit_patch_converter",
    "fit_kernel_decoder",
    "fit_ridge_baseline",
    "gather",
    "group_parameters",
    "iterate_batches",
    "load_best",
    "load_pretrained",
    "record_training",
    "open_tracker",
    "select_local_rows",
]
