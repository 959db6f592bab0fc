"""The prepared layout of a data set, and everything read from it.

- One layout for every source: `images.h5`, `captions.parquet` and `labels.parquet` for a dataset,
  `betas.h5`, `trials.parquet` and `voxels.parquet` for each of its subjects. Readers
  (`src.readers`) write it, everything else opens it with `open_subject`.
- Large arrays are contiguous and uncompressed inside HDF5, so that they are memory-mapped at their
  offset: no decoding, no copies, true shuffles.
- A split is a property of an image. `check_trials` refuses an image on both sides, on writing and
  again on opening.
- Everything is written under a temporary name and renamed, so that a failure leaves earlier results
  as they were.
- Which repeat an image shows is a pure function of (seed, epoch, image): independent of batch size,
  workers and resuming.
- Statistics are accumulated in float64 over blocks of rows: 30,000 trials of 15,724 voxels never
  need to fit in memory.
"""

from src.data.batches import BrainDataset
from src.data.draws import choose_repeats
from src.data.files import BLOCK_BYTES, check_space, iterate_row_blocks
from src.data.identity import check_made_from, check_trained_on, format_identity
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
from src.data.rois import ROI_SETS
from src.data.splits import (
    cluster_images,
    open_all_sessions,
    open_training_split,
    record_training_split,
    select_training_split,
)
from src.data.subject import Subject, open_subject
from src.data.targets import (
    AugmentedTargets,
    LatentFile,
    TargetCache,
    cache_augmented_targets,
    cache_encoder_targets,
    cache_targets,
)

__all__ = [
    "AugmentedTargets",
    "BLOCK_BYTES",
    "BrainDataset",
    "ImageStore",
    "LatentFile",
    "Normaliser",
    "ROI_SETS",
    "Subject",
    "TRIAL_COLUMNS",
    "TargetCache",
    "cache_augmented_targets",
    "cache_encoder_targets",
    "cache_targets",
    "check_made_from",
    "check_space",
    "check_trained_on",
    "check_trials",
    "choose_repeats",
    "cluster_images",
    "dataset_folder",
    "estimate_noise_ceiling",
    "format_identity",
    "iterate_row_blocks",
    "number_repeats",
    "open_all_sessions",
    "open_subject",
    "open_training_split",
    "record_training_split",
    "select_training_split",
    "subject_folder",
    "write_image_table",
    "write_images",
    "write_subject",
]
