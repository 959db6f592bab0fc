"""Scores of captions by the embeddings of whole sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from src.evaluation.captions.text import iterate_pairs, to_text_lists
from src.pretrained.base import prefer_cache
from src.utils import ROOT, PerceptError, require_extra

MINI = ROOT / "data" / "mini_models"

SENTENCE_HUB = "sentence-transformers/all-MiniLM-L6-v2"

BATCH = 64  # sentences that are embedded at once


def embed_each_text(embed: Callable[[list[str]], Any]) -> Callable[[Any], list[np.ndarray]]:
    """What `Metric.through` takes, from a function that embeds sentences: texts (n,) or n lists ->
    n arrays (texts, dim) of unit length.

    Every sentence is embedded once, however often it occurs.
    """

    def prepare(texts: Any) -> list[np.ndarray]:
        lists = to_text_lists(texts)
        places: dict[str, int] = {}
        for captions in lists:
            for text in captions:
                places.setdefault(text, len(places))
        sentences = list(places)
        batches = []
        for start in range(0, len(sentences), BATCH):
            batch = torch.as_tensor(embed(sentences[start : start + BATCH]))
            batches.append(batch.detach().float().cpu())
        rows = F.normalize(torch.cat(batches).double(), dim=1)
        return [rows[[places[text] for text in captions]].numpy() for captions in lists]

    return prepare


def compare_nearest(references: Any, captions: Any, pairing: Any = None) -> np.ndarray:
    """Cosine of each caption's embedding (1, dim) with that of the nearest reference, (n,)."""
    pairs = iterate_pairs(references, [[rows] for rows in captions], pairing)
    return np.array([(rows @ caption[0]).max() for rows, caption in pairs])


class SentenceEncoder:
    """Sentence embeddings: all-MiniLM-L6-v2, or the mini world's twin, through
    sentence_transformers.

    Args:
        weights: "hub", "mini" or a folder that holds `sentence/`, as `SentenceTransformer.save`
            writes it.
        device: torch device.

    Raises:
        PerceptError: the model is not there, or the hub cannot be reached.

    Source: Reimers & Gurevych 2019, arXiv 1908.10084.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu"):
        self.weights = weights
        self.location = _find_model(weights)
        library = require_extra("sentence_transformers", "captions")
        options = {"device": device, "model_kwargs": {"dtype": torch.float32}}
        try:
            model = prefer_cache(library.SentenceTransformer, self.location, **options)
            self.model: Any = model.eval()
        except (OSError, ValueError) as error:
            raise PerceptError(
                f"The sentence embeddings could not be loaded from '{self.location}'"
                f" ({str(error).splitlines()[0]}): check the connection to the hub, leave"
                " 'Sentence' out of caption_metrics, or set weights to 'mini' or to a folder that"
                " holds them."
            ) from error

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> (captions, dim) float32."""
        embeddings = self.model.encode(
            list(captions), show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(embeddings, np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Model, a hash of its weights where they lie here, and versions, for provenance."""
        digest = "as the hub has it"
        files = sorted(Path(self.location).rglob("*.safetensors")) if self.weights != "hub" else []
        if files:
            content = b"".join(file.read_bytes() for file in files)
            digest = hashlib.sha256(content).hexdigest()[:12]
        packages = ("sentence-transformers", "transformers", "torch")
        return {
            "model": "mini:sentence" if self.weights == "mini" else self.location,
            "hash": digest,
            "versions": {package: version(package) for package in packages},
        }


def _find_model(weights: str) -> str:
    """The hub's name of the model, or the folder that holds it."""
    if weights == "hub":
        return SENTENCE_HUB
    parent = MINI if weights == "mini" else Path(weights)
    folder = parent / "sentence"
    if not (folder / "modules.json").exists():
        hint = f"put {SENTENCE_HUB} there, or set weights to 'hub' or 'mini'"
        if weights == "mini":
            hint = "restore data/mini_models from git"
        raise PerceptError(f"There are no sentence embeddings at {folder}: {hint}.")
    return str(folder)
