"""CLIP: its tokenizer, learnt from the mini captions, and its two encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from src import miniworld

from . import data
from .data import (
    CONTEXT_LENGTH,
    DIM,
    PATCH_SIZE,
    compute_share,
    draw_indices,
    draw_per_image,
    get_device,
    load_descriptions,
    load_images,
    normalize_for_clip,
    to_pixels,
)
from .training import Options, load_averaged, train

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
WORD_END = "</w>"


# --------------------------------------------------------------------------------------- tokenizer
@cache
def build_clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer learnt from the mini captions, in CLIP's own file format."""
    folder = data.WORK / "tokenizer"
    if not (folder / "vocab.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _learn_tokenizer(folder)
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return CLIPTokenizer(*files, model_max_length=CONTEXT_LENGTH)


def _learn_tokenizer(folder: Path) -> None:
    """Learn byte pairs from captions and write vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        end_of_word_suffix=WORD_END,
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    captions: list[str] = []
    for captions_of_image in load_descriptions("train")[0][:4000]:
        captions += captions_of_image
    tokenizer.train_from_iterator(iter(captions), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(learnt["vocab"], key=learnt["vocab"].get)
    letters = [letter + WORD_END for letter in ALPHABET]
    vocabulary += [letter for letter in letters if letter not in vocabulary]
    vocabulary = [token for token in vocabulary if not token.startswith("<|")]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the end token has the highest id
    merges = learnt["merges"]
    if isinstance(merges[0], list):  # pairs of tokens, in newer versions of the library
        merges = [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))


def tokenize(texts: Sequence[str]) -> Tensor:
    """Token ids (texts, context length) of texts, padded and cut to the context length."""
    options: dict[str, Any] = {"padding": "max_length", "max_length": CONTEXT_LENGTH}
    encoded = build_clip_tokenizer()(texts, truncation=True, return_tensors="pt", **options)
    return encoded.input_ids


# -------------------------------------------------------------------------------------------- model
def build_clip() -> CLIPModel:
    """An untrained CLIP of the transformers library: 4 layers for images, 2 for texts."""
    tokenizer = build_clip_tokenizer()
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    shared = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_attention_heads": 4,
        "projection_dim": DIM,
    }
    text = {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": eos,
        "bos_token_id": bos,
        "pad_token_id": eos,
    }
    vision = {
        "num_hidden_layers": 4,
        "image_size": miniworld.IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    config = CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=DIM
    )
    return CLIPModel(config)


def compute_image_tokens(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """All projected tokens (batch, 1 + patches, dim) of images in [0, 1], the class token first."""
    inputs = normalize_for_clip(pixels.cpu()).to(pixels.device)
    hidden = clip.vision_model(pixel_values=inputs).last_hidden_state
    return clip.visual_projection(clip.vision_model.post_layernorm(hidden))


class ClipTrainer(nn.Module):
    """CLIP with the heads that help to train it.

    Labels from the pooled vector, and each patch's own pixels from its token.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        sizes = [
            len(miniworld.SCENES),
            len(miniworld.CATEGORIES),
            len(miniworld.COLOURS),
            len(miniworld.PATTERNS),
            len(miniworld.LIGHTS),
            3,  # places
        ]
        self.heads = nn.ModuleList(nn.Linear(DIM, n) for n in sizes)
        self.pixels = nn.Linear(DIM, 3 * PATCH_SIZE * PATCH_SIZE)

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (batch, 1 + patches, dim) and text embeddings (batch, dim)."""
        tokens = compute_image_tokens(self.clip, pixels)
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return tokens, text


def load_trained_clip() -> CLIPModel:
    """The CLIP that the stage `clip` left behind."""
    return load_averaged("clip", ClipTrainer(build_clip())).clip


def extract_patches(pixels: Tensor) -> Tensor:
    """(batch, 3, height, width) -> (batch, patches, 3 * patch * patch)."""
    return F.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)


# ----------------------------------------------------------------------------------------- training
def compute_contrastive_loss(pooled: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021) of embeddings (batch, dim), both directions."""
    pooled = F.normalize(pooled.float(), dim=-1)
    text = F.normalize(text.float(), dim=-1)
    logits = pooled @ text.T * logit_scale.exp().clamp(max=50)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(options: Options, rank: int = 0) -> None:
    """Train CLIP on captions, with labels and pixels as further targets."""
    images, check_pixels = load_images("train"), to_pixels(load_images("check"))
    (captions, labels), (check_captions, check_labels) = (
        load_descriptions(name) for name in ("train", "check")
    )
    columns = zip(*captions, strict=True)  # the first captions of all images, the second, ...
    ids = torch.stack([tokenize(list(column)) for column in columns], 1)
    model = ClipTrainer(build_clip()).to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = draw_indices(rng, len(images), batch_size)
        x = to_pixels(images[index])
        tint = draw_per_image(batch_size, 0.92, 1.08, channels=3)
        x = x * tint + 0.02 * torch.randn_like(x)
        x = x.clamp(0, 1).to(get_device())
        chosen_ids = ids[index, rng.integers(5, size=batch_size)]
        tokens, text = model(x, chosen_ids.to(get_device()))
        contrast = compute_contrastive_loss(tokens[:, 0], text, model.clip.logit_scale)
        targets = torch.from_numpy(labels[index]).to(x.device)
        naming = sum(
            F.cross_entropy(head(tokens[:, 0]).float(), targets[:, i])
            for i, head in enumerate(model.heads)
        )
        predicted = model.pixels(tokens[:, 1:]).float()
        return contrast + 0.7 * naming + 3 * F.mse_loss(predicted, extract_patches(2 * x - 1))

    def evaluate(model: nn.Module) -> dict[str, Any]:
        x = check_pixels.to(get_device())
        first_captions = [five[0] for five in check_captions]
        tokens, text = model(x, tokenize(first_captions).to(get_device()))
        pooled, text = F.normalize(tokens[:, 0], dim=-1), F.normalize(text, dim=-1)
        similarity = pooled @ text.T
        target = torch.arange(len(x))
        top1 = [compute_share(similarity.argmax(d).cpu() == target) for d in (1, 0)]
        accuracy = {}
        names = ("scene", "kind", "colour", "pattern", "light", "place")
        for i, (name, head) in enumerate(zip(names, model.heads, strict=True)):
            answers = head(tokens[:, 0]).argmax(1).cpu()
            hits = answers == torch.from_numpy(check_labels[:, i])
            accuracy[name] = round(compute_share(hits), 3)
        patches = extract_patches(2 * x - 1)
        predicted = model.pixels(tokens[:, 1:])
        error = F.mse_loss(predicted, patches) / patches.var()
        return {
            "top1_of_512": [round(share, 3) for share in top1],
            "pixel_r2": round(1 - float(error), 3),
            **accuracy,
        }

    train("clip", model, compute_loss, evaluate, options, lr=1e-3, batch_size=128, rank=rank)
