"""From checkpoints to tokens, latents, images and votes."""

from src.decoding.checkpoints import decoder_config, find_decoder, load_decoder
from src.decoding.combined import (
    caption_targets,
    check_choices,
    check_volumes,
    fid,
    sample_rows,
    variation_embeddings,
)
from src.decoding.configs import (
    basic_config,
    combined_config,
    high_level_config,
    low_level_config,
    mindeye2_config,
)
from src.decoding.generate import (
    encoder_for,
    generate_images,
    generator_for,
    guided_images,
    in_chunks,
    latent_noise,
    load_reconstructions,
    load_row,
    pick_best,
    sample_spread,
    sampled_by,
)
from src.decoding.predict import predict_latents, predict_tokens, repeat_agreement
from src.decoding.refine import refine_images, refiner
from src.decoding.voting import (
    VOTES,
    Ballot,
    Voter,
    find_voters,
    open_voter,
    oracle,
    vote,
    voters_of,
)

__all__ = [
    "Ballot",
    "VOTES",
    "Voter",
    "basic_config",
    "caption_targets",
    "check_choices",
    "check_volumes",
    "combined_config",
    "decoder_config",
    "encoder_for",
    "fid",
    "find_decoder",
    "find_voters",
    "generate_images",
    "generator_for",
    "guided_images",
    "high_level_config",
    "in_chunks",
    "latent_noise",
    "load_decoder",
    "load_reconstructions",
    "load_row",
    "low_level_config",
    "mindeye2_config",
    "open_voter",
    "oracle",
    "pick_best",
    "predict_latents",
    "predict_tokens",
    "refine_images",
    "refiner",
    "repeat_agreement",
    "sample_rows",
    "sample_spread",
    "sampled_by",
    "variation_embeddings",
    "vote",
    "voters_of",
]
