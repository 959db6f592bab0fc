"""Decoding a small data set: any prepared subject with few images, every image once a test image.

- `data`: rows an image, whatever the number of repeats, the order of trials, the size of images.
- `folds`: by image, stratified by label, one image left out at a time, or the official split.
- `decoders`, `network`: ridge, kernel, Bayesian linear, small network; functions of a problem and a
  setting.
- `nested`: settings, and which decoders enter the mean, chosen within the training images.
- `class_mean`: the baseline that knows the label alone.
"""

from src.small_data.class_mean import are_classes, predict_class_mean
from src.small_data.data import (
    Responses,
    encode_images,
    find_official_split,
    make_pixels,
    make_variants,
    read_responses,
)
from src.small_data.decoders import predict_bayesian, predict_kernel, predict_ridge
from src.small_data.examples import Examples, Problem, pose_problem
from src.small_data.folds import (
    find_labels,
    group_equal_images,
    parse_penalties,
    parse_voxel_counts,
    split_into_folds,
)
from src.small_data.nested import MEAN, Candidate, Decoded, decode_fold
from src.small_data.network import predict_network
from src.small_data.variants import warp_images

__all__ = [
    "Candidate",
    "Decoded",
    "Examples",
    "MEAN",
    "Problem",
    "Responses",
    "are_classes",
    "decode_fold",
    "encode_images",
    "find_labels",
    "find_official_split",
    "group_equal_images",
    "make_pixels",
    "make_variants",
    "parse_penalties",
    "parse_voxel_counts",
    "pose_problem",
    "predict_bayesian",
    "predict_class_mean",
    "predict_kernel",
    "predict_network",
    "predict_ridge",
    "read_responses",
    "split_into_folds",
    "warp_images",
]
