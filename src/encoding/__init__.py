"""Encoding models: what a brain would answer to an image.

- An image becomes features in named spaces (`compute_features`): its CLIP tokens, Gabor energies,
  layers of any frozen network, embeddings of its categories or captions.
- A banded ridge maps them to z-scored voxels (`fit_encoding_model`): a penalty for each space and
  voxel, chosen by cross-validation. Predictions of left-out images say how good it is.
- What it does not predict is noise (`NoiseModel`): drawn with exactly the covariance of the
  out-of-fold residuals. With repeats, signal and noise can be told apart
  (`estimate_signal_and_noise`).
- An encoder and a draw of noise are a simulated measurement of an image that nobody has seen in
  the scanner: decoders are trained on such, and retrieval asks which image makes the measured
  voxels most likely.
"""

from src.encoding.banded_ridge import (
    EncodingFit,
    explained_variance,
    fit_encoding_model,
    partition_variance,
)
from src.encoding.features import (
    FEATURE_SPACES,
    FeatureSpace,
    build_gnet_extractor,
    build_layer_extractor,
    compute_features,
    embed_captions,
    embed_categories,
    extract_gabor,
)
from src.encoding.gabor import GaborPyramid
from src.encoding.model import EncodingModel, FeatureProjection
from src.encoding.noise import NoiseModel, SignalAndNoise, estimate_signal_and_noise
from src.encoding.store import load_encoder, read_encoder_config, save_encoder

__all__ = [
    "EncodingFit",
    "EncodingModel",
    "FEATURE_SPACES",
    "FeatureProjection",
    "FeatureSpace",
    "GaborPyramid",
    "NoiseModel",
    "SignalAndNoise",
    "build_gnet_extractor",
    "build_layer_extractor",
    "compute_features",
    "embed_captions",
    "embed_categories",
    "estimate_signal_and_noise",
    "explained_variance",
    "extract_gabor",
    "fit_encoding_model",
    "load_encoder",
    "partition_variance",
    "read_encoder_config",
    "save_encoder",
]
