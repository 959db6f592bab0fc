"""From checkpoints to tokens, latents, images and votes."""

from src.decoding.baselines import make_lookup_baselines, predict_held_out_tokens
from src.decoding.caption_targets import embed_captions
from src.decoding.checkpoints import (
    find_decoder,
    find_decoders,
    load_decoder,
    read_decoder_config,
)
from src.decoding.combined import (
    check_combined_parameters,
    check_volumes,
    compute_fid,
    embed_variations,
    generate_sample_grid,
)
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.generate import (
    draw_latent_noise,
    generate_images,
    load_encoder,
    load_generator,
    repaint_images,
    set_sampler,
)
from src.decoding.levels import SeenImages, attach_voxels, list_inputs, load_decoders
from src.decoding.monitoring import TrainingFigures, compare_prior_with_backbone
from src.decoding.predict import (
    PriorSampling,
    compute_repeat_agreement,
    predict_latents,
    predict_tokens,
    predicts_both_levels,
)
from src.decoding.reconstructions import (
    compute_in_chunks,
    load_condition,
    load_reconstructions,
)
from src.decoding.refine import Refinement, refine_images
from src.decoding.selection import compute_sample_spread, select_best
from src.decoding.storing import write_reconstructions
from src.decoding.systems import open_system
from src.decoding.voting import (
    VOTES,
    SelectionInputs,
    Voter,
    find_voters,
    open_voter,
    oracle,
    parse_voters,
    vote,
)
from src.pretrained.refiner import load_refiner

__all__ = [
    "DecoderSizes",
    "PriorSampling",
    "Refinement",
    "SeenImages",
    "SelectionInputs",
    "VOTES",
    "TrainingFigures",
    "Voter",
    "attach_voxels",
    "build_decoder_config",
    "check_combined_parameters",
    "check_volumes",
    "compare_prior_with_backbone",
    "compute_fid",
    "compute_in_chunks",
    "compute_repeat_agreement",
    "compute_sample_spread",
    "draw_latent_noise",
    "embed_captions",
    "embed_variations",
    "find_decoder",
    "find_decoders",
    "find_voters",
    "generate_images",
    "generate_sample_grid",
    "list_inputs",
    "load_condition",
    "load_decoder",
    "load_decoders",
    "load_encoder",
    "load_generator",
    "load_reconstructions",
    "load_refiner",
    "make_lookup_baselines",
    "open_system",
    "open_voter",
    "oracle",
    "parse_voters",
    "predict_held_out_tokens",
    "predict_latents",
    "predict_tokens",
    "predicts_both_levels",
    "read_decoder_config",
    "refine_images",
    "repaint_images",
    "select_best",
    "set_sampler",
    "vote",
    "write_reconstructions",
]
