"""The prepared layout of a data set, and everything read from it: subjects, normaliser, splits, cached targets."""

from src.data.batches import BrainDataset
from src.data.draws import choose_repeats
from src.data.files import BLOCK_BYTES, check_space, disk_errors, iterate_row_blocks
from src.data.images import ImageStore, write_images
from src.data.layout import (
    TRIAL_COLUMNS,
    check_trials,
    dataset_folder,
    number_repeats,
    subject_folder,
    write_image_table,
    write_subject,
)
from src.data.normaliser import Normaliser
from src.data.reliability import estimate_noise_ceiling
from src.data.splits import (
    cluster_images,
    make_training_split,
    open_all_sessions,
    open_training_split,
)
from src.data.subject import ROI_SETS, Subject, open_subject
from src.data.targets import (
    AugmentedTargets,
    LatentFile,
    TargetCache,
    cache_augmented_targets,
    cache_targets,
)

__all__ = [
    "BLOCK_BYTES",
    "BrainDataset",
    "ImageStore",
    "LatentFile",
    "Normaliser",
    "ROI_SETS",
    "Subject",
    "TRIAL_COLUMNS",
    "TargetCache",
    "AugmentedTargets",
    "cache_targets",
    "cache_augmented_targets",
    "check_space",
    "check_trials",
    "choose_repeats",
    "dataset_folder",
    "disk_errors",
    "estimate_noise_ceiling",
    "cluster_images",
    "number_repeats",
    "open_all_sessions",
    "open_training_split",
    "open_subject",
    "iterate_row_blocks",
    "make_training_split",
    "subject_folder",
    "write_image_table",
    "write_images",
    "write_subject",
]
