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

from src.encoding.agreement import (
    BrainAgreement,
    BrainSelection,
    open_brain_agreement,
    open_brain_selection,
)
from src.encoding.banded_ridge import (
    EncodingFit,
    explained_variance,
    fit_encoding_model,
    partition_variance,
)
from src.encoding.features import (
    FEATURE_SPACES,
    FeatureSpace,
    build_extractors,
    build_gnet_extractor,
    build_layer_extractor,
    compute_features,
    embed_captions,
    embed_categories,
    extract_gabor,
    look_up_features,
)
from src.encoding.gabor import GaborPyramid
from src.encoding.measuring import Instrument, open_run_encoder
from src.encoding.model import EncodingModel, FeatureProjection
from src.encoding.noise import NoiseModel, SignalAndNoise, estimate_signal_and_noise
from src.encoding.pool import ImagePool, check_pool, open_pool
from src.encoding.simulation import (
    MeasuredAndSimulated,
    draw_noise_bank,
    simulate_responses,
)
from src.encoding.store import load_encoder, read_encoder_config, save_encoder
from src.encoding.target_pca import TargetBasis, TargetSet, encode_rows, fit_target_basis

__all__ = [
    "BrainAgreement",
    "BrainSelection",
    "EncodingFit",
    "EncodingModel",
    "FEATURE_SPACES",
    "FeatureProjection",
    "FeatureSpace",
    "GaborPyramid",
    "ImagePool",
    "Instrument",
    "MeasuredAndSimulated",
    "NoiseModel",
    "SignalAndNoise",
    "TargetBasis",
    "TargetSet",
    "build_extractors",
    "build_gnet_extractor",
    "build_layer_extractor",
    "check_pool",
    "compute_features",
    "draw_noise_bank",
    "embed_captions",
    "embed_categories",
    "encode_rows",
    "estimate_signal_and_noise",
    "explained_variance",
    "extract_gabor",
    "fit_encoding_model",
    "fit_target_basis",
    "load_encoder",
    "look_up_features",
    "open_brain_agreement",
    "open_brain_selection",
    "open_pool",
    "open_run_encoder",
    "partition_variance",
    "read_encoder_config",
    "save_encoder",
    "simulate_responses",
]
