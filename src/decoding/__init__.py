"""From checkpoints to tokens, latents, images and votes."""

from src.decoding.checkpoints import find_decoder, load_decoder, read_decoder_config
from src.decoding.combined import (
    check_combined_parameters,
    check_volumes,
    compute_fid,
    embed_captions,
    embed_variations,
    generate_sample_grid,
)
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.generate import (
    compute_in_chunks,
    compute_sample_spread,
    draw_latent_noise,
    generate_images,
    load_condition,
    load_encoder,
    load_generator,
    load_reconstructions,
    repaint_images,
    select_best,
    set_sampler,
)
from src.decoding.predict import compute_repeat_agreement, predict_latents, predict_tokens
from src.decoding.refine import load_refiner, refine_images
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

__all__ = [
    "DecoderSizes",
    "build_decoder_config",
    "SelectionInputs",
    "VOTES",
    "Voter",
    "embed_captions",
    "check_combined_parameters",
    "check_volumes",
    "read_decoder_config",
    "load_encoder",
    "compute_fid",
    "find_decoder",
    "find_voters",
    "generate_images",
    "load_generator",
    "repaint_images",
    "compute_in_chunks",
    "draw_latent_noise",
    "load_decoder",
    "load_reconstructions",
    "load_condition",
    "open_voter",
    "oracle",
    "select_best",
    "predict_latents",
    "predict_tokens",
    "refine_images",
    "load_refiner",
    "compute_repeat_agreement",
    "generate_sample_grid",
    "compute_sample_spread",
    "set_sampler",
    "embed_variations",
    "vote",
    "parse_voters",
]
