"""Captions as lists, in pairs with their references, and as tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from src.utils import PerceptError, require_extra

# tokens that COCO's evaluation leaves out
PUNCTUATION = set("'' ' `` ` \" . ? ! , : - -- ... ; ( ) [ ] { }".split())


def to_text_lists(texts: Any) -> list[list[str]]:
    """Captions (n,), or several for each image, as n lists.

    Raises:
        PerceptError: an image without any, or something that is no text.
    """
    lists = [[entry] if isinstance(entry, str) else list(entry) for entry in texts]
    for i, captions in enumerate(lists):
        if not captions or not all(isinstance(text, str) for text in captions):
            raise PerceptError(
                f"The captions of image {i} are {captions!r}: give each image one text or a list of"
                " texts, at least one."
            )
    return lists


def iterate_pairs(references: Any, captions: Any, pairing: Any = None) -> Iterator[tuple[Any, Any]]:
    """(references, caption) of each image; with a pairing (n,) the references of the image that it
    names.

    Raises:
        PerceptError: references, captions and pairing differ in number, or an image has several
            captions.
    """
    n = len(captions)
    if len(references) != n:
        raise PerceptError(
            f"{n} captions were given for {len(references)} images: give one each, in"
            " the same order."
        )
    order = np.arange(n) if pairing is None else np.asarray(pairing)
    if len(order) != n:
        raise PerceptError(
            f"A pairing of {len(order)} was given for {n} captions; give each the"
            " number of one image."
        )
    for i, entry in enumerate(captions):
        if len(entry) != 1:
            raise PerceptError(
                f"Image {i} has {len(entry)} captions to be scored: give one; several may only"
                " stand among the references."
            )
        yield references[order[i]], entry[0]


def tokenize_words(text: str) -> list[str]:
    """Tokens of the Penn Treebank with punctuation and capitals, as METEOR's published evaluation
    takes them.

    nltk's `word_tokenize` finds sentences first, with data that no package holds; here a sentence
    ends at a mark before a space, which differs for abbreviations only.
    """
    nltk_tokenize = require_extra("nltk.tokenize", "captions")
    tokenizer = nltk_tokenize.NLTKWordTokenizer()
    tokens: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        tokens += tokenizer.tokenize(sentence)
    return tokens


def tokenize_lowercase(text: str) -> list[str]:
    """Tokens of the Penn Treebank in lower case without punctuation: what COCO's evaluation gives
    BLEU and CIDEr (there by a Java program).
    """
    return [word for word in tokenize_words(text.lower()) if word not in PUNCTUATION]
