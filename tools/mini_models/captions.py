"""What captions name, and the words that the captioners' tokenizers know."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizer

from src import miniworld

from .data import ANSWERS, SEED

NAMING_CAPTIONS = (0, 1, 3, 4)  # those of the five captions that name category, colour and scene

# A word that tells the scene without being its name; every other caption has the name itself.
SCENE_WORDS = {"sandy": "beach"}


def build_vocabulary(*extra: str, last: tuple[str, ...] = ()) -> dict[str, int]:
    """Ids of BERT's special tokens, of every word of the mini captions and of some more.

    Args:
        extra: further words, sorted among the others.
        last: tokens that come after all words.
    """
    vocabulary = set(extra)
    for i in range(2_000):  # their captions have every word many times
        for caption in miniworld.write_captions(miniworld.compose_image(SEED, i, "train")):
            vocabulary.update(caption.split())
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *sorted(vocabulary), *last]
    return {token: i for i, token in enumerate(tokens)}


def find_named_attributes(caption: str) -> tuple[str, ...]:
    """Scene, category and colour that a caption names, "" where it names none.

    The main object comes first in every caption.
    """
    candidates = [SCENE_WORDS.get(word, word) for word in caption.split()]
    named = []
    for answers in ANSWERS.values():
        named.append(next((word for word in candidates if word in answers), ""))
    return tuple(named)


def compute_naming_accuracy(captions: list[str], labels: np.ndarray) -> dict[str, float]:
    """Share of captions that name what is on the image, by question.

    Args:
        captions: one an image.
        labels: (images, 3 or more) as indices: scene, category, colour.
    """
    named = np.array([find_named_attributes(caption) for caption in captions])
    accuracy = {}
    for i, (question, answers) in enumerate(ANSWERS.items()):
        hits = named[:, i] == np.array(answers)[labels[:, i]]
        accuracy[question] = round(float(hits.mean()), 4)
    return accuracy


def mask_padding(ids: Tensor, tokenizer: BertTokenizer) -> dict[str, Tensor]:
    """A captioner's arguments for token ids (batch, positions): mask, labels without padding."""
    mask = (ids != tokenizer.pad_token_id).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def write_captions(model: torch.nn.Module, tokenizer: BertTokenizer, pixels: Tensor) -> list[str]:
    """Captions of at most 20 tokens that a captioner generates from its input."""
    ids = model.generate(pixel_values=pixels, max_length=20)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
