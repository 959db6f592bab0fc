"""What each stage needs: parameters, memory and disk, from its parameters and the sizes of data and
frozen models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.voting import VOTES, parse_voters
from src.encoding.features import FEATURE_SPACES
from src.encoding.gabor import GaborPyramid
from src.encoding.model import PCA_IMAGES
from src.encoding.pool import MINI_POOL_IMAGES
from src.losses import combined_loss, info_nce, l2_normalize, soft_clip_loss
from src.networks.rebuild import build_decoder
from src.parameters import list_decoders
from src.pipeline.dryrun.memory import estimate_training_memory
from src.pipeline.dryrun.sizes import (
    FLOAT_BYTES,
    HALF_BYTES,
    DataSizes,
    Sizes,
    count_inputs,
    count_voxels,
    find_sizes,
    find_volume,
)
from src.pretrained.autoencoder import make_untrained_vae
from src.prior import BrainDiffusionPrior
from src.utils import count_parameters, mixed_precision

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Needs:
    """What a stage needs.

    Attributes:
        parameters: number of trainable ones, by network.
        memory: bytes by what they are for.
        disk: bytes by what they are for.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


def _count_on_meta(build: Callable[[], nn.Module]) -> dict[str, int]:
    """Parameters of a network's parts, without making them."""
    with torch.device("meta"):
        model = build()
    return {name: count_parameters(part) for name, part in model.named_children()}


def _count_prior_on_meta(build: Callable[[], nn.Module]) -> dict[str, int]:
    """Parameters of a prior's two networks."""
    counts = _count_on_meta(build)
    return {name: counts[name] for name in ("voxel2clip", "net")}


def _compute_prior_loss(prior: nn.Module, target: Tensor, brain: Tensor) -> Tensor:
    """The loss of a diffusion prior at the first timestep, without noise."""
    n = len(target)
    times, drop = torch.zeros(n, dtype=torch.long), torch.zeros(2, n, dtype=torch.bool)
    noise = torch.zeros_like(target)
    return prior.p_losses(target, times, brain, noise, drop)[0]  # type: ignore[operator]


def _compute_contrast(embedding: Tensor, target: Tensor) -> Tensor:
    """SoftCLIP's loss of an embedding."""
    return soft_clip_loss(l2_normalize(embedding), l2_normalize(target))


def estimate_high_level(p: Parameters, sizes: Sizes) -> Needs:
    """01_train_high_level: MindEye's backbone with its prior."""
    data, models = sizes.data, sizes.models
    n, width = p["batch_size"], count_inputs(p, data)
    decoder_sizes = DecoderSizes((width,), models.tokens, models.dim)
    config = build_decoder_config("01_train_high_level", p, decoder_sizes)

    def build() -> nn.Module:
        return build_decoder(config)

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, BrainDiffusionPrior)
        target = torch.zeros(n, models.tokens, models.dim)
        voxels = torch.zeros(n, width)
        backbone, projected = model.voxel2clip.predict_tokens(voxels)  # type: ignore[union-attr, operator]
        total = backbone.new_zeros(())
        if p["v2c"]:
            total = _compute_contrast(projected, target)
        if p["prior"]:
            total = total + _compute_prior_loss(model, target, backbone)
        if p["mse_mult"]:
            total = total + F.mse_loss(backbone, target)
        return total

    memory = estimate_training_memory(build, loss, p["precision"], p["step_in_backward"])
    views = p["cached_views"] if p["use_image_aug"] else 0
    cached = models.embedding_bytes * (data.all_images + views * data.train_images)
    memory["frozen CLIP"] = models.frozen_bytes["CLIP"]
    memory["mapped data"] = data.betas_bytes + cached
    return Needs(_count_prior_on_meta(build), memory, {"cached targets": cached})


def estimate_combined(p: Parameters, sizes: Sizes) -> Needs:
    """01_train_combined: encoder and prior end to end."""
    data, models = sizes.data, sizes.models
    n, volume = p["batch_size"], find_volume(p)
    decoder_sizes = DecoderSizes((data.voxels,), dim=models.dim, volume=volume)
    config = build_decoder_config("01_train_combined", p, decoder_sizes)
    width = math.prod(volume) if p["voxel_dims"] == 3 else data.voxels

    def build() -> nn.Module:
        model = build_decoder(config)
        model.voxel2clip.requires_grad_(p["combine_models"])  # type: ignore[union-attr, operator]
        return model

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, BrainDiffusionPrior)
        target = torch.zeros(n, 1, models.dim)
        voxels = torch.zeros(n, width)
        brain, _ = model.voxel2clip.predict_tokens(voxels)  # type: ignore[union-attr, operator]
        mse = _compute_prior_loss(model, target, brain)
        if not p["combine_losses"]:
            return mse
        contrast = info_nce(l2_normalize(brain), l2_normalize(target))
        return combined_loss(mse, contrast, p["alpha"])

    memory = estimate_training_memory(build, loss, p["precision"])
    cached = HALF_BYTES * models.dim * data.all_images
    memory["frozen CLIP"] = models.frozen_bytes["CLIP"]
    memory["mapped data"] = data.betas_bytes + cached
    return Needs(_count_prior_on_meta(build), memory, {"cached targets": cached})


def estimate_mindeye2(p: Parameters, sizes: Sizes) -> Needs:
    """01_train_mindeye2: the backbone that subjects share, with its prior."""
    data, models = sizes.data, sizes.models
    subjects, widths = [data], [count_voxels(p, data)]
    other_subjects = _list_other_subjects(p)
    if other_subjects:
        subjects = [find_sizes({**p, "subj": number}).data for number in other_subjects]
        widths = [subject.voxels for subject in subjects]
    settings = {**p, "prior": p["prior"] and p["use_prior"]}
    decoder_sizes = DecoderSizes(tuple(widths), models.tokens, models.dim, models.latent)
    config = build_decoder_config("01_train_mindeye2", settings, decoder_sizes)
    n, trials = p["batch_size"], 1 + p["seq_past"] + p["seq_future"]

    def build() -> nn.Module:
        model = build_decoder(config)
        if model.diffusion_prior is not None:
            transformer = model.diffusion_prior.net.causal_transformer  # type: ignore[union-attr]
            transformer.checkpointing = p["gradient_checkpointing"]  # type: ignore[union-attr]
        return model

    def loss(model: nn.Module) -> Tensor:
        target = torch.zeros(n, models.tokens, models.dim)
        backbone, clip, blurry = model(torch.zeros(n, trials, widths[0]), 0)
        total = backbone.mean()
        if p["clip_scale"]:
            total = total + _compute_contrast(clip, target)
        if p["blurry_recon"]:
            total = total + blurry[0].abs().mean() + blurry[1].square().mean()
        if model.diffusion_prior is not None:
            total = total + _compute_prior_loss(model.diffusion_prior, target, backbone)  # type: ignore[arg-type]
        return total

    memory = estimate_training_memory(build, loss, p["precision"], p["step_in_backward"])
    views = p["cached_views"] if p["blurry_recon"] and p["use_cont"] else 0
    all_images = sum(subject.all_images for subject in subjects)
    cached = all_images * (models.embedding_bytes + models.latent_bytes)
    frozen = models.frozen_bytes["CLIP"] + models.frozen_bytes["autoencoder"]
    if views:  # the teacher's maps of each image and of its views
        train_images = sum(subject.train_images for subject in subjects)
        cached += models.map_bytes * train_images * (1 + views)
        frozen += models.frozen_bytes["teacher"]
    memory["frozen models"] = frozen
    memory["mapped data"] = sum(subject.betas_bytes for subject in subjects) + cached
    return Needs(_count_on_meta(build), memory, {"cached targets": cached})


def _list_other_subjects(p: Parameters) -> list[int]:
    """The subjects that are trained on beside the one that is decoded, where there are several."""
    if not p["multi_subject"]:
        return []
    numbers = [int(number) for number in p["subjects"].split(",")]
    return [number for number in numbers if number != p["subj"]]


def estimate_low_level(p: Parameters, sizes: Sizes) -> Needs:
    """02_train_autoencoder: voxels to latents of the autoencoder."""
    data, models = sizes.data, sizes.models
    width = count_inputs(p, data)
    config = build_decoder_config("02_train_autoencoder", p, DecoderSizes((width,)))

    def build() -> nn.Module:
        return build_decoder(config)

    def loss(model: nn.Module) -> Tensor:
        output = model(torch.zeros(p["batch_size"], width))
        latent, maps = output if isinstance(output, tuple) else (output, None)
        total = F.l1_loss(latent, torch.zeros_like(latent))
        if maps is not None:
            maps = maps.flatten(0, 1)
            total = total + soft_clip_loss(F.normalize(maps, dim=-1), torch.zeros_like(maps))
        return total

    precision = mixed_precision(p["use_mp"], p["precision"])
    memory = estimate_training_memory(build, loss, precision)
    cached, frozen = models.latent_bytes * data.all_images, models.frozen_bytes["autoencoder"]
    if p["use_cont"]:
        cached += models.map_bytes * data.train_images * (1 + p["cached_views"])
        frozen += models.frozen_bytes["teacher"]
    memory["frozen models"] = frozen
    memory["mapped data"] = data.betas_bytes + cached
    return Needs({"network": _count_all_on_meta(build)}, memory, {"cached targets": cached})


def estimate_basic(p: Parameters, sizes: Sizes) -> Needs:
    """02_train_basic_autoencoder: voxels to images through the autoencoder's frozen decoder."""
    data = sizes.data
    width = count_inputs(p, data)
    vae = make_untrained_vae(p["weights"])
    side, channels = p["image_size"] or vae.config.sample_size, vae.config.latent_channels
    latent_side = side // 2 ** (len(vae.config.block_out_channels) - 1)
    latent, scale = (channels, latent_side), vae.config.scaling_factor
    decoder_sizes = DecoderSizes((width,), latent=latent, latent_scale=scale)
    config = build_decoder_config("02_train_basic_autoencoder", p, decoder_sizes)
    n = p["batch_size"] // p["gradient_accumulation_steps"]

    def build() -> nn.Module:
        frozen = make_untrained_vae(p["weights"]).requires_grad_(False)
        return nn.ModuleDict({"encoder": build_decoder(config), "vae": frozen})

    def loss(models: nn.Module) -> Tensor:
        latent = models["encoder"](torch.zeros(n, width))  # type: ignore[index]
        image = models["vae"].decode(latent).sample  # type: ignore[index]
        return F.mse_loss(image, torch.zeros(n, 3, side, side))

    memory = estimate_training_memory(build, loss, p["precision"])
    cached = 0.0
    if p["latent_mult"] or p["decoder"] == "both":
        cached = HALF_BYTES * channels * latent_side**2 * data.all_images
    images = data.image_bytes * data.train_images
    memory["mapped data"] = data.betas_bytes + images + cached
    counts = {"encoder": _count_all_on_meta(lambda: build_decoder(config))}
    return Needs(counts, memory, {"cached targets": cached})


def estimate_roi_models(p: Parameters, sizes: Sizes) -> Needs:
    """02_train_roi_models: a low-level model for each set of ROIs, one after the other."""
    data, models = sizes.data, sizes.models
    counts: dict[str, int] = {}
    memory: dict[str, float] = {}
    voters = parse_voters(p["voters"], p["rois"], p["bag_seeds"], p["batch_sizes"], p["seed"])
    for voter in voters:
        width = data.voxels
        if not p["masked"]:
            width = count_voxels({**p, "rois": voter.rois}, data)
        settings = {**p, "latent_size": models.latent[1], "use_cont": False}
        count, needed = _estimate_voter(settings, width, voter.batch_size)
        counts[f"voter {voter.name}"] = count
        if sum(needed.values()) > sum(memory.values()):
            memory = needed
    cached = 0.0 if p["latents_file"] else models.latent_bytes * data.all_images
    memory["frozen models"] = models.frozen_bytes["autoencoder"]
    memory["mapped data"] = data.betas_bytes + cached
    return Needs(counts, memory, {"cached targets": cached})


def _estimate_voter(p: Parameters, width: int, batch_size: int) -> tuple[int, dict[str, float]]:
    """Parameters of one voter, and memory of its training."""
    config = build_decoder_config("02_train_roi_models", p, DecoderSizes((width,)))

    def build() -> nn.Module:
        return build_decoder(config)

    def loss(model: nn.Module) -> Tensor:
        return model(torch.zeros(batch_size, width)).abs().mean()

    memory = estimate_training_memory(build, loss, p["precision"])
    return _count_all_on_meta(build), memory


def estimate_encoder(p: Parameters, sizes: Sizes) -> Needs:
    """01_train_encoder: a closed form, whose memory is that of features and responses."""
    data, models = sizes.data, sizes.models
    width, images = count_voxels(p, data), data.train_images
    features = models.tokens * models.dim + GaborPyramid().n_features
    responses = FLOAT_BYTES * images * width
    memory = {
        "features": FLOAT_BYTES * features * (images + min(images, PCA_IMAGES)),
        "responses, predictions and residuals": 3 * responses,
        "single trials": FLOAT_BYTES * data.train_trials * width,
        "frozen CLIP": models.frozen_bytes["CLIP"],
    }
    weights = sum(space.n_components for space in FEATURE_SPACES.values())
    disk = {
        "encoding model": FLOAT_BYTES * weights * (width + features),
        "residuals": responses,
        "cached targets": models.embedding_bytes * data.all_images,
    }
    return Needs({}, memory, disk)


def estimate_percept(p: Parameters, sizes: Sizes) -> Needs:
    """02_train_percept: components of tokens and latents, from measured and simulated trials."""
    data, models = sizes.data, sizes.models
    width = count_inputs(p, data)
    counts = {"clip_tokens": p["token_components"], "vae_latents": p["latent_components"]}
    decoder_sizes = DecoderSizes(
        (width,), models.tokens, models.dim, models.latent, components=counts
    )
    config = build_decoder_config("02_train_percept", p, decoder_sizes)

    def build() -> nn.Module:
        return build_decoder(config)

    def loss(model: nn.Module) -> Tensor:
        return model(torch.zeros(p["batch_size"], width)).square().mean()

    memory = estimate_training_memory(build, loss, p["precision"])
    count = _count_all_on_meta(build)
    outputs = sum(counts.values())
    pool = _count_pool_images(p, data)
    numbers = models.tokens * models.dim + (math.prod(models.latent) if outputs else 0)
    memory["average of the weights"] = FLOAT_BYTES * count if p["weight_average"] else 0.0
    memory["bases of the components"] = FLOAT_BYTES * numbers * max(counts.values())
    memory["simulated responses and noise"] = HALF_BYTES * width * (pool + p["n_draws"])
    memory["components of targets"] = FLOAT_BYTES * outputs * (pool + data.train_trials)
    memory["frozen models"] = models.frozen_bytes["CLIP"] + models.frozen_bytes["autoencoder"]
    own_pool = 0 if p["pool"] == "train" else pool
    targets = models.embedding_bytes + models.latent_bytes
    cached = targets * (data.all_images + own_pool)
    memory["mapped data"] = data.betas_bytes + cached
    disk = {"cached targets": cached, "images of the pool": float(data.image_bytes * own_pool)}
    return Needs({"network": count}, memory, disk)


def _count_pool_images(p: Parameters, data: DataSizes) -> int:
    """Images of the pool: as many as are asked for, all of one that is known; of a folder that
    nobody has counted yet, as many as the mini models were trained on.
    """
    n_known = data.train_images if p["pool"] == "train" else MINI_POOL_IMAGES
    return min(n_known, p["pool_images"] or n_known)


def estimate_prepared_data(p: Parameters, sizes: Sizes) -> Needs:
    """00_prepare_data: the prepared layout."""
    data = sizes.data
    images = float(data.image_bytes * data.all_images)
    return Needs(disk={"betas": data.betas_bytes, "images": images})


def estimate_reconstructions(p: Parameters, sizes: Sizes) -> Needs:
    """03_reconstruct: images of all decoders and baselines, tokens, and the published files."""
    data, models = sizes.data, sizes.models
    n = p["first_images"] or data.test_images
    names = list_decoders(p["decoder"])
    decoders = len(names)
    # at most: of each decoder its low level; an untrained network; fewer repeats; stored samples;
    # the oracle and the autoencoder
    rows = decoders + 2 + p["keep_samples"]
    rows += len([part for part in p["fewer_repeats"].split(",") if part.strip()])
    if p["img2img_strength"] < 1:
        rows += decoders
    if p["recons_per_sample"] > 1:  # the first sample, and what the tokens choose
        rows += 1 + (p["selection"] == "brain")
    if p["untrained"] and "network" in names:
        rows += 1
    image = _count_image_bytes(p, sizes)
    originals = 3 * HALF_BYTES * data.image_bytes  # seen, mean image, nearest training image
    tokens = 0.0
    if p["img2img_strength"]:  # else of the low level alone
        tokens = FLOAT_BYTES * n * models.tokens * models.dim * (2 * decoders + 1)
    disk = {
        "images": n * (rows * image + originals),
        "tokens": tokens,
        "published files": n * (2 * image + FLOAT_BYTES * data.image_bytes),
    }
    return Needs(disk=disk)


def estimate_refinement(p: Parameters, sizes: Sizes) -> Needs:
    """04_refine: refined images, and the published files of pictures and tokens."""
    data, models = sizes.data, sizes.models
    n = data.test_images
    rows = (1 + p["refine_ceiling"]) if p["refine"] else 0
    tokens = FLOAT_BYTES * n * models.tokens * models.dim
    return Needs(
        disk={
            "images": n * rows * _count_image_bytes(p, sizes),
            "published files": 3 * n * FLOAT_BYTES * 3 * 256**2 + 3 * tokens,
        }
    )


def estimate_votes(p: Parameters, sizes: Sizes) -> Needs:
    """03_vote: images of all voters, votes and baselines."""
    data = sizes.data
    n = (p["image_to"] or data.test_images) - p["image_from"]
    voters = max(1, p["voters"].count(",") + 1)
    # and the best voter of each image, the mean latent, the oracle, two low levels
    rows = voters + len(VOTES) + 5 + p["untrained"]
    rows += len(list_decoders(p["decoder"])) - 1
    originals = 3 * HALF_BYTES * data.image_bytes  # seen, mean image, nearest training image
    return Needs(disk={"images": n * (rows * _count_image_bytes(p, sizes) + originals)})


def _count_image_bytes(p: Parameters, sizes: Sizes) -> float:
    """Bytes of an image that a generator makes, in half precision."""
    if p["weights"] == "hub":
        return HALF_BYTES * 3 * (8 * sizes.models.latent[1]) ** 2
    return HALF_BYTES * sizes.data.image_bytes


def estimate_ridge_memory(stage: str, sizes: Sizes, width: int) -> float:
    """Bytes of fitting the ridge baseline: voxels, targets and weights, and the copies that
    centring, folds and predictions make of them.

    Args:
        stage: name of the notebook; 01 and Percept's predict embeddings, 02 latents.
        sizes: of the data and the frozen models.
        width: number of inputs.
    """
    n, targets = sizes.data.train_images, _count_targets(stage, sizes)
    # the numbers of copies are measured
    inputs_size = 6 * n * width
    targets_size = 5 * n * targets
    weights_size = 4 * width * targets + 4 * width * width
    return FLOAT_BYTES * (inputs_size + targets_size + weights_size)


def estimate_kernel_memory(stage: str, sizes: Sizes, width: int) -> float:
    """Bytes of fitting the kernel decoder: voxels, targets and coefficients, the covariances of
    signal and noise, and the kernel of the training images, each with its copies.

    Args:
        stage: name of the notebook; 01 and Percept's predict embeddings, 02 latents.
        sizes: of the data and the frozen models.
        width: number of inputs.
    """
    n, targets = sizes.data.train_images, _count_targets(stage, sizes)
    inputs_size = 4 * n * width
    targets_size = 4 * n * targets
    return FLOAT_BYTES * (inputs_size + targets_size + 5 * width * width + 6 * n * n)


def _count_targets(stage: str, sizes: Sizes) -> int:
    """Numbers that a closed form predicts of an image."""
    if stage.startswith("01") or stage == "02_train_percept":
        return sizes.models.tokens * sizes.models.dim
    return math.prod(sizes.models.latent)


def _count_all_on_meta(build: Callable[[], nn.Module]) -> int:
    """Parameters of a whole network, without making them."""
    with torch.device("meta"):
        return count_parameters(build())


NEEDS: dict[str, Callable[[Parameters, Sizes], Needs]] = {
    "00_prepare_data": estimate_prepared_data,
    "01_train_high_level": estimate_high_level,
    "01_train_combined": estimate_combined,
    "01_train_mindeye2": estimate_mindeye2,
    "02_train_autoencoder": estimate_low_level,
    "02_train_basic_autoencoder": estimate_basic,
    "01_train_encoder": estimate_encoder,
    "02_train_percept": estimate_percept,
    "02_train_roi_models": estimate_roi_models,
    "03_reconstruct": estimate_reconstructions,
    "03_vote": estimate_votes,
    "04_refine": estimate_refinement,
}
