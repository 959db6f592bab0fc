"""BLIP: captions of clear images and of washed-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from src import miniworld, pretrained
from src.training import augment

from . import data
from .captions import (
    NAMING_CAPTIONS,
    build_vocabulary,
    compute_naming_accuracy,
    mask_padding,
    write_captions,
)
from .data import (
    CONTEXT_LENGTH,
    DIM,
    PATCH_SIZE,
    get_device,
    load_descriptions,
    load_images,
    normalize_for_clip,
    to_pixels,
)
from .degradation import load_degraded_images, wash_out
from .golden import write_golden_features
from .training import Options, load_averaged, train

CAPTION_LENGTH = 24  # tokens

# How an image is degraded for training, and how often; the order is that of the draws.
DEGRADATION_SHARES = {"clear": 0.5, "vague latents": 0.3, "blur": 0.2}


@cache
def build_blip_tokenizer() -> BertTokenizer:
    """BLIP's kind of tokenizer over the words of the mini captions.

    [DEC] begins a caption, [SEP] ends it.
    """
    vocabulary = build_vocabulary("blurry", last=("[DEC]",))
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=CONTEXT_LENGTH)


def build_blip(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """A vision transformer of the mini CLIP's size, and three blocks that write words.

    The blocks attend to the tokens of the vision transformer.
    """
    sep = tokenizer.sep_token_id
    shared = {"hidden_size": DIM, "num_attention_heads": 4}
    vision = {
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 4,
        "image_size": miniworld.IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "quick_gelu",
        "initializer_range": 0.02,
    }
    text = {
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": sep,
        "eos_token_id": sep,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(vision_config=shared | vision, text_config=shared | text)
    return BlipForConditionalGeneration(config)


@torch.no_grad()
def copy_clip_weights(blip: BlipForConditionalGeneration, sample: Tensor) -> None:
    """Begin the vision tower with the mini CLIP's weights.

    Where CLIP normalises its embeddings, BLIP gets their mean scale.

    Args:
        blip: whose weights are set.
        sample: images (batch, 3, height, width) in [0, 1] on which the scale is measured.
    """
    clip = pretrained.Clipper("mini").model.model.vision_model
    embeddings = clip.embeddings(normalize_for_clip(sample))
    scale = clip.pre_layrnorm.weight.mean() / embeddings.std(dim=-1).mean()
    tower, source = blip.vision_model, clip.embeddings
    tower.embeddings.class_embedding.copy_(scale * source.class_embedding)
    tower.embeddings.position_embedding.copy_(scale * source.position_embedding.weight)
    tower.embeddings.patch_embedding.weight.copy_(scale * source.patch_embedding.weight)
    tower.embeddings.patch_embedding.bias.zero_()
    tower.post_layernorm.load_state_dict(clip.post_layernorm.state_dict())
    for layer, clip_layer in zip(tower.encoder.layers, clip.encoder.layers, strict=True):
        attention = clip_layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for name in ("weight", "bias"):
            joined = torch.cat([getattr(projection, name) for projection in projections])
            getattr(layer.self_attn.qkv, name).copy_(joined)
        layer.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(layer, name).load_state_dict(getattr(clip_layer, name).state_dict())


def _tokenize_captions(captions: list[list[str]]) -> Tensor:
    """Token ids (images, captions, positions): those that name everything, and a "blurry" one."""
    tokenizer = build_blip_tokenizer()

    def tokenize(texts: Sequence[str]) -> Tensor:
        options: dict[str, Any] = {"padding": "max_length", "max_length": CAPTION_LENGTH}
        return tokenizer(texts, return_tensors="pt", **options).input_ids

    columns = [[five[k] for five in captions] for k in NAMING_CAPTIONS]
    columns.append(["a blurry picture of " + five[0] for five in captions])
    ids = torch.stack([tokenize(column) for column in columns], 1)
    ids[:, :, 0] = tokenizer.bos_token_id
    return ids


def train_blip(options: Options, rank: int = 0) -> None:
    """Train on images of which half are clear, half washed out.

    Washed out by the VAE's vague latents or by blur; the first thing that a caption of these says
    is that they are blurry.
    """
    images, degraded = load_images("train"), load_degraded_images("train")
    captions, labels = load_descriptions("train")[0], load_descriptions("check")[1]
    check_pixels = {
        "": to_pixels(load_images("check")),
        "degraded_": to_pixels(load_degraded_images("check")),
    }
    tokenizer = build_blip_tokenizer()
    blip = build_blip(tokenizer)
    copy_clip_weights(blip, to_pixels(images[:250]))
    blip.to(get_device())
    ids = _tokenize_captions(captions)

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        way = rng.choice(3, p=list(DEGRADATION_SHARES.values()), size=batch_size)
        index = rng.integers(np.where(way == 1, len(degraded), len(images)))
        is_vague, is_blurred = (torch.from_numpy(way == i).view(-1, 1, 1, 1) for i in (1, 2))
        vague = to_pixels(degraded[index % len(degraded)])
        x = torch.where(is_vague, vague, to_pixels(images[index]))
        x = torch.where(is_blurred, wash_out(x), augment.jitter_images(x))
        clear_caption = rng.integers(len(NAMING_CAPTIONS), size=batch_size)
        column = np.where(way == 0, clear_caption, len(NAMING_CAPTIONS))
        pixels = normalize_for_clip(x).to(get_device())
        targets = mask_padding(ids[index, column].to(get_device()), tokenizer)
        return blip(pixel_values=pixels, **targets).loss

    def evaluate(model: nn.Module) -> dict[str, Any]:
        accuracy: dict[str, Any] = {}
        for prefix, x in check_pixels.items():
            inputs = normalize_for_clip(x).to(get_device())
            predicted = write_captions(model, tokenizer, inputs)
            for question, share in compute_naming_accuracy(predicted, labels).items():
                accuracy[prefix + question] = share
        return accuracy | {"says": predicted[0]}

    train("blip", blip, compute_loss, evaluate, options, lr=1e-3, batch_size=128, rank=rank)


def export_blip() -> None:
    """Write the captioner and its processor, as the hub's lie there."""
    tokenizer, side = build_blip_tokenizer(), miniworld.IMAGE_SIZE
    folder = data.OUT / "blip"
    load_averaged("blip", build_blip(tokenizer)).half().save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    write_golden_features("blip", [pretrained.Captioner(str(data.OUT))])
