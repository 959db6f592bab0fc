"""GIT: captions from an image encoder's tokens, clear ones and those that a decoder would give."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
)

from src import miniworld, pretrained
from src.models import CaptionConverter

from . import data
from .captions import (
    NAMING_CAPTIONS,
    build_vocabulary,
    compute_naming_accuracy,
    mask_padding,
    write_captions,
)
from .data import (
    CLIP_MEAN,
    CLIP_STD,
    CONTEXT_LENGTH,
    DIM,
    SEED,
    get_device,
    load_descriptions,
    load_images,
    normalize_for_clip,
    split_images,
    to_pixels,
)
from .degradation import NoisyTokenEstimator, draw_log_uniform, load_degraded_images
from .golden import write_golden_features
from .training import Options, load_averaged, train

# log10 of the variance of the noise on the tokens, in units of the variance of the patch tokens.
VIEW_NOISE = (-1.0, 2.0)

# How tokens are degraded for training, and how often.
VIEW_SHARES = {
    "clear": 0.2,
    "degraded": 0.1,
    "converted": 0.2,
    "guessed": 0.25,
    "sampled": 0.25,
}


@cache
def build_git_tokenizer() -> BertTokenizer:
    """GIT's kind of tokenizer over the words of the mini captions.

    [CLS] begins a caption, [SEP] ends it.
    """
    options = {"bos_token": "[CLS]", "eos_token": "[SEP]", "model_max_length": CONTEXT_LENGTH}
    return BertTokenizer(vocab=build_vocabulary(), **options)


def build_git(tokenizer: BertTokenizer) -> GitForCausalLM:
    """GIT with the mini CLIP's vision tower, frozen, and three blocks that write words.

    The blocks read the words after the tokens of the image.
    """
    clip = pretrained.Clipper("mini").model.model.vision_model
    text = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
    )
    vision = {name: getattr(clip.config, name) for name in names}
    git = GitForCausalLM(GitConfig(vision_config=vision, **text))
    git.git.image_encoder.vision_model.load_state_dict(clip.state_dict())
    git.git.image_encoder.requires_grad_(False)
    return git


def detach_encoder(git: GitForCausalLM) -> nn.Module:
    """Take the image encoder out of GIT, which reads precomputed tokens from then on."""
    encoder = git.git.image_encoder
    git.git.image_encoder = pretrained.PrecomputedTokens()
    return encoder


# ------------------------------------------------------------------------------------------- tokens
@torch.no_grad()
def compute_git_tokens(encoder: nn.Module, images: np.ndarray) -> Tensor:
    """Tokens of GIT's image encoder, float16 (images, 1 + patches, dim).

    Args:
        encoder: GIT's image encoder.
        images: uint8 (images, height, width, 3).
    """
    parts = []
    for part in split_images(images, 500):
        inputs = normalize_for_clip(to_pixels(part))
        parts.append(encoder(inputs).last_hidden_state.half())
    return torch.cat(parts)


def fit_converter(
    patches: Tensor, targets: Tensor, steps: int = 500, lr: float = 1e-2
) -> CaptionConverter:
    """The map from CLIP's patch tokens to GIT's tokens that notebook 04 trains.

    Args:
        patches: CLIP's patch tokens (images, patches, dim).
        targets: GIT's tokens (images, 1 + patches, dim).
        steps: of Adam, 128 images each.
        lr: learning rate, falling linearly to 0.
    """
    _, n_patches, patch_dim = patches.shape
    _, n_tokens, token_dim = targets.shape
    converter = CaptionConverter(n_patches, n_tokens, patch_dim, token_dim)
    # Both encoders began as one; from a random start some patches end with the wrong sign.
    nn.init.eye_(converter.linear2.weight)
    optimizer = torch.optim.Adam(converter.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(patches), (128,))
        loss = F.mse_loss(converter(patches[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    variance = (targets - targets.mean(0)).square().mean()
    print(f"converter: R2 {1 - loss.item() / float(variance):.3f}", flush=True)
    return converter.requires_grad_(False)


def replace_class_token(x: Tensor) -> Tensor:
    """Put a random mixture of the patches in the place of the class token, in half of the images.

    Patches say nothing about the class token, so every converter puts something else there:
    captions have to be read from the patches.

    Args:
        x: tokens (batch, 1 + patches, dim).
    """
    n, patches = len(x), x[:, 1:]
    weights = torch.randn(n, 1, patches.shape[1]) * torch.rand(n, 1, 1)
    replaced = torch.cat([weights @ patches, patches], 1)
    return torch.where(torch.rand(n, 1, 1) < 0.5, replaced, x)


def make_git_views(
    encoder: nn.Module, name: str, noise: tuple[float, float], n_guesses: int
) -> dict[str, Tensor]:
    """Tokens (images, 1 + patches, dim) of a set of images, by the way they are degraded.

    As a decoder gives them are the patch tokens: the estimate with the least error (see
    `NoisyTokenEstimator`), or a sample of what is still possible, as a diffusion prior draws it.
    Both reach GIT through the converter, as in notebook 04.

    Args:
        encoder: GIT's image encoder.
        name: of one of `IMAGE_SETS`.
        noise: limits of the log10 of the noise, see `VIEW_NOISE`.
        n_guesses: images of which there are tokens as a decoder gives them, the first ones.
    """
    reference = compute_git_tokens(encoder, load_images("train")[:6000]).float()
    converter = fit_converter(reference[:, 1:], reference)
    estimate = NoisyTokenEstimator(reference[:, 1:].numpy())
    clear = compute_git_tokens(encoder, load_images(name))
    views = {"clear": clear}
    views["degraded"] = compute_git_tokens(encoder, load_degraded_images(name))
    parts = clear[:, 1:].split(500)
    views["converted"] = torch.cat([converter(part.float()).half() for part in parts])
    for way in ("guessed", "sampled"):
        parts = []
        for part in clear[:n_guesses, 1:].float().split(500):
            variances = reference.var() * draw_log_uniform(len(part), noise)
            guess = estimate(part, variances, sample=way == "sampled")
            parts.append(converter(guess).half())
        views[way] = torch.cat(parts)
    return views


# ----------------------------------------------------------------------------------------- training
def _tokenize_captions(captions: list[list[str]]) -> Tensor:
    """Token ids (images, captions, positions) of the captions that name everything."""
    tokenizer = build_git_tokenizer()
    options: dict[str, Any] = {"padding": "max_length", "max_length": CONTEXT_LENGTH}
    columns = []
    for k in NAMING_CAPTIONS:
        texts = [five[k] for five in captions]
        columns.append(tokenizer(texts, return_tensors="pt", **options).input_ids)
    ids = torch.stack(columns, 1)
    longest = int((ids != tokenizer.pad_token_id).sum(-1).max())
    return ids[:, :, :longest]


def train_git(options: Options, rank: int = 0) -> None:
    """Train the words alone: the image encoder stays the mini CLIP's.

    Its tokens are computed once, in all the ways they are degraded (see `make_git_views`). What a
    caption says does not depend on the way.
    """
    captions, labels = load_descriptions("train")[0], load_descriptions("check")[1]
    tokenizer = build_git_tokenizer()
    git = build_git(tokenizer)
    encoder = detach_encoder(git)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        views = make_git_views(encoder, "train", VIEW_NOISE, 20_000)
        check_views = make_git_views(encoder, "check", (1.0, 1.0), len(labels))
    ids = _tokenize_captions(captions)
    git.to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        inputs, targets = [], []
        counts = rng.multinomial(batch_size, list(VIEW_SHARES.values()))
        for way, count in zip(VIEW_SHARES, counts, strict=True):
            index = rng.integers(len(views[way]), size=count)
            x = views[way][index].float()
            if way in ("converted", "guessed", "sampled"):
                x = replace_class_token(x)
            inputs.append(x)
            targets.append(ids[index, rng.integers(len(NAMING_CAPTIONS), size=count)])
        tokens = torch.cat(inputs).to(get_device())
        batch = mask_padding(torch.cat(targets).to(get_device()), tokenizer)
        return git(pixel_values=tokens[:, None], **batch).loss

    def evaluate(model: nn.Module) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for way, x in check_views.items():
            inputs = x[:, None].float().to(get_device())
            predicted = write_captions(model, tokenizer, inputs)
            for question, share in compute_naming_accuracy(predicted, labels).items():
                scores[f"{way}_{question}"] = share
            scores[way] = predicted[0]
        return scores

    train("git", git, compute_loss, evaluate, options, lr=1e-3, batch_size=128, rank=rank)


def export_git() -> None:
    """Write GIT and its processor, as the hub's lie there."""
    tokenizer, side = build_git_tokenizer(), miniworld.IMAGE_SIZE
    git = build_git(tokenizer)
    encoder = detach_encoder(git)
    load_averaged("git", git).git.image_encoder = encoder
    git.half().save_pretrained(data.OUT / "git")
    size: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    image_processor = CLIPImageProcessor(image_mean=CLIP_MEAN, image_std=CLIP_STD, **size)
    GitProcessor(image_processor, tokenizer).save_pretrained(data.OUT / "git")
    write_golden_features("git", [pretrained.BrainCaptioner(str(data.OUT))])
