"""Sentence embeddings, by which captions are compared."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from . import data
from .captions import build_vocabulary
from .data import CONTEXT_LENGTH, compute_share, get_device, load_descriptions
from .training import Options, load_averaged, train

SENTENCE_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
}

# Weights of the labels in the similarity of images: scene, category, colour, pattern, light, place.
LABEL_WEIGHTS = torch.tensor([0.25, 0.4, 0.2, 0.05, 0.05, 0.05])


@cache
def build_sentence_tokenizer() -> BertTokenizer:
    """A tokenizer over the words of the mini captions."""
    return BertTokenizer(vocab=build_vocabulary("blurry"), model_max_length=CONTEXT_LENGTH)


def build_sentence_config() -> BertConfig:
    """Sizes of the encoder and of its vocabulary."""
    tokenizer = build_sentence_tokenizer()
    padding = tokenizer.pad_token_id
    return BertConfig(vocab_size=len(tokenizer), pad_token_id=padding, **SENTENCE_CONFIG)


def build_sentence_encoder() -> BertModel:
    """An untrained encoder, without a pooler."""
    return BertModel(build_sentence_config(), add_pooling_layer=False)


def embed_sentences(bert: BertModel, captions: list[str]) -> Tensor:
    """Embeddings (captions, dim) of length one.

    The mean over the words, as sentence_transformers pools by default.
    """
    tokenizer = build_sentence_tokenizer()
    encoded = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    encoded = encoded.to(bert.device)
    mask = encoded["attention_mask"][..., None].float()
    total = (bert(**encoded).last_hidden_state.float() * mask).sum(1)
    return F.normalize(total / mask.sum(1), dim=-1)


def compute_similarity(labels: Tensor) -> Tensor:
    """Similarity of images (images, images) in [0, 1]: the labels (images, 6) that they share."""
    return ((labels[:, None] == labels[None]) * LABEL_WEIGHTS).sum(-1)


def train_sentence(options: Options, rank: int = 0) -> None:
    """Train the cosine of two captions to be the similarity of their images.

    Regression on graded pairs, the way of the first sentence transformers.
    """
    (captions, labels), (check_captions, check_labels) = (
        load_descriptions(name) for name in ("judge", "judge_check")
    )
    labels, check_labels = torch.from_numpy(labels), torch.from_numpy(check_labels)
    bert = build_sentence_encoder().to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = np.repeat(rng.integers(len(captions), size=batch_size), 2)  # two captions an image
        columns = rng.integers(5, size=2 * batch_size)
        places = zip(index, columns, strict=True)
        vectors = embed_sentences(bert, [captions[i][k] for i, k in places])
        targets = compute_similarity(labels[index]).to(vectors.device)
        return F.mse_loss(vectors @ vectors.T, targets)

    def evaluate(model: nn.Module) -> dict[str, float]:
        columns = ([five[k] for five in check_captions[:500]] for k in (0, 3))
        first, second = (embed_sentences(model, column).cpu() for column in columns)
        cosine = first @ second.T
        similarity = compute_similarity(check_labels[:500])
        top1 = compute_share(cosine.argmax(1) == torch.arange(500))
        pairs = torch.stack([cosine.flatten(), similarity.flatten()])
        correlation = float(torch.corrcoef(pairs)[0, 1])
        return {
            "correlation_with_likeness": round(correlation, 4),
            "top1_of_500": round(top1, 3),
            "same": round(float(cosine.diagonal().mean()), 3),
            "other": round(float(cosine.mean()), 3),
        }

    train("sentence", bert, compute_loss, evaluate, options, lr=2e-3, batch_size=64, rank=rank)


def export_sentence() -> None:
    """Write the encoder as sentence_transformers saves a model: `SentenceTransformer(folder)`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        encoder = load_averaged("sentence", build_sentence_encoder())
        # The library's class has a pooler, which nothing here reads: zeros, so that the file has
        # all weights that the class expects.
        with_pooler = BertModel(encoder.config)
        for parameter in with_pooler.pooler.parameters():
            nn.init.zeros_(parameter)
        with_pooler.load_state_dict(with_pooler.state_dict() | encoder.state_dict())
        with_pooler.half().save_pretrained(folder)
        build_sentence_tokenizer().save_pretrained(folder)
        modules: list[Any] = [
            Transformer(folder, max_seq_length=CONTEXT_LENGTH),
            Pooling(SENTENCE_CONFIG["hidden_size"]),
            Normalize(),
        ]
        model = SentenceTransformer(modules=modules, device="cpu")
        model.save(str(data.OUT / "sentence"), create_model_card=False)
