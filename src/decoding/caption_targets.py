"""Embeddings of captions as training targets, for modality text of the combined system."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from src.data.draws import choose_repeats
from src.data.layout import dataset_folder
from src.data.targets import AugmentedTargets
from src.files.foreign import load_npy
from src.pretrained.clip import Clipper
from src.utils import PerceptError, atomic

log = logging.getLogger(__name__)


class CaptionTargets(AugmentedTargets):
    """Embeddings of the captions of images, as `src.data.BrainDataset` takes them: an epoch shows
    one caption of each image.

    Args:
        table: columns image and caption; empty captions are left out.
        embeddings: (captions, dim), in the order of the captions that are left.
    """

    def __init__(self, table: pd.DataFrame, embeddings: np.ndarray):
        self.table = select_captions(table)
        if len(embeddings) != len(self.table):
            raise PerceptError(
                f"There are {len(embeddings)} embeddings for {len(self.table)} captions: embed them"
                " again."
            )
        ids = self.table["image"].to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self.image_ids, self._first, self._counts = np.unique(
            ids[self._order], return_index=True, return_counts=True
        )
        self.embeddings = embeddings

    def check(self, image_ids: Sequence[int] | np.ndarray) -> None:
        """Raise PerceptError if one of these images has no caption."""
        missing = np.setdiff1d(image_ids, self.image_ids)
        if len(missing):
            raise PerceptError(
                f"{len(missing)} images have no caption, the first is {missing[0]}: add some to"
                " captions.parquet, or set modality to image."
            )

    def rows(self, image_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Of each image the caption that (seed, epoch, image) choose, (n, dim)."""
        positions = np.searchsorted(self.image_ids, image_ids)
        counts = self._counts[positions]
        chosen = choose_repeats(seed + 3, epoch, np.asarray(image_ids), counts)
        return self.embeddings[self._order[self._first[positions] + chosen]]

    def first(self, image_ids: np.ndarray) -> np.ndarray:
        """Of each image its first caption, (n, dim)."""
        self.check(image_ids)
        positions = np.searchsorted(self.image_ids, image_ids)
        return self.embeddings[self._order[self._first[positions]]]


def select_captions(table: pd.DataFrame | None) -> pd.DataFrame:
    """The captions that are not empty, columns image and caption.

    Raises:
        PerceptError: there is none.
    """
    captions = pd.DataFrame({"image": [], "caption": []})
    if table is not None:
        captions = table[table["caption"].fillna("").str.strip() != ""]
    if not len(captions):
        raise PerceptError(
            "This dataset has no captions (captions.parquet): prepare it with some, or set modality"
            " to image."
        )
    return captions.reset_index(drop=True)


def embed_captions(
    dataset: str | Path, table: pd.DataFrame | None, clipper: Clipper
) -> CaptionTargets:
    """The embedding of every caption of a dataset, computed once and stored beside its other
    targets.

    Args:
        dataset: as for `src.data.open_subject`.
        table: `Subject.captions`.
        clipper: whose text half embeds them.
    """
    captions = select_captions(table)
    texts = captions["caption"].tolist()
    # golden features differ in their last digits between devices
    fingerprint = {k: v for k, v in clipper.fingerprint().items() if k != "golden"}
    described = json.dumps([fingerprint, texts], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    path = dataset_folder(dataset) / "targets" / f"captions-{key}.npy"
    embeddings = _read_embeddings(path, len(texts)) if path.exists() else None
    if embeddings is None:
        parts = []
        for start in range(0, len(texts), 256):
            embedded = clipper.embed_text(texts[start : start + 256])
            parts.append(embedded.half().cpu().numpy())
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(parts))
        embeddings = load_npy(path, mode="r")
    return CaptionTargets(captions, embeddings)


def _read_embeddings(path: Path, captions: int) -> np.ndarray | None:
    """Stored embeddings of so many captions; None where the file is damaged or of others."""
    try:
        embeddings = load_npy(path, "they are computed again", mode="r")
    except PerceptError as error:
        log.warning("%s", error)
        return None
    return embeddings if embeddings.ndim == 2 and len(embeddings) == captions else None
