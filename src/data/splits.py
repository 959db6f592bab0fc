"""Training splits of a subject: sessions, a share of the images, clusters that are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from src.data.identity import check_trained_on
from src.data.subject import Subject, open_subject
from src.data.targets import cache_targets, hash_fingerprint
from src.files.ownership import lock_folder
from src.utils import PerceptError, atomic, read_json, write_json

# what a training was given less than everything, in the folder of its run
CLUSTERS_FILE, SESSIONS_FILE = "clusters.parquet", "sessions.json"

# share of the clusters, and about that of the images, that a cluster-held-out training is not given
HELD_OUT_SHARE = 0.25

N_CANDIDATES = 2000  # random choices of clusters, of which the best is taken


class ImageEncoder(Protocol):
    """A frozen model whose features are clustered, as `pretrained.Clipper`."""

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of the features of one image."""

    def fingerprint(self) -> dict[str, Any]:
        """All that the features depend on."""

    def encode_pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (batch, height, width, 3) -> features (batch, *target_shape)."""


# ------------------------------------------------------------------------------ clusters of images
def cluster_images(
    subject: Subject,
    features: np.ndarray,
    fingerprint: dict[str, Any],
    n_clusters: int = 20,
    seed: int = 42,
) -> pd.DataFrame:
    """Cluster a subject's images, and hold out a quarter of the clusters.

    Clusters are found once and stored as data/<dataset>/clusters-<hash>.parquet. They are those of
    k-means of the features divided by their length. Of 2000 random quarters of the clusters that
    one is held out which holds most nearly a quarter of the test images and a quarter of the
    training images. Source: Shirakawa et al. 2024, arXiv 2405.10078.

    Args:
        subject: with all its images.
        features: (images, dim), in the order of `subject.all_images`.
        fingerprint: of the model that made them. Other features, images or settings are another
            file.
        n_clusters: number of clusters, at least 4.
        seed: of k-means and of the choice.

    Returns:
        One row an image, ascending: image, cluster (0 to n_clusters - 1), held_out (bool). Its
        `attrs` say how it was made.

    Raises:
        PerceptError: for features of another length, fewer images than clusters, or clusters of
            which no quarter holds test images and leaves some.
    """
    ids = subject.all_images
    if len(features) != len(ids) or not 4 <= n_clusters <= len(ids):
        raise PerceptError(
            f"{len(features)} features of {len(ids)} images for {n_clusters} clusters: give one an"
            " image, and choose 4 clusters to one an image."
        )
    record = {
        "fingerprint": fingerprint,
        "images": _hash_pixels(subject, ids),
        "test_set": subject.test_set,
        "n_clusters": n_clusters,
        "seed": seed,
    }
    meta = json.loads(json.dumps(record, default=str))
    path = subject.folder / f"clusters-{hash_fingerprint(meta)}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    with lock_folder(path, "clustering images", wait=True, as_sibling=True):
        if not path.exists():
            table = _find_clusters(subject, features, n_clusters, seed)
            table.attrs = meta
            with atomic(path) as temporary:
                table.to_parquet(temporary)
    return pd.read_parquet(path)


def _hash_pixels(subject: Subject, ids: np.ndarray) -> str:
    """Hash of images: their ids and the checksums of their pixels."""
    store = subject.image_store
    checksums = store.crc[store.positions(ids)]
    return hashlib.sha256(np.stack([ids, checksums]).tobytes()).hexdigest()[:16]


def _find_clusters(
    subject: Subject, features: np.ndarray, n_clusters: int, seed: int
) -> pd.DataFrame:
    """Table of `cluster_images`, see there."""
    from sklearn.cluster import KMeans

    ids = subject.all_images
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    normalized = (features / np.maximum(norms, 1e-12)).astype(np.float32)
    cluster = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(normalized)
    members = [np.isin(ids, subject.image_ids(split)) for split in ("test", "train")]
    counts = np.stack([np.bincount(cluster[part], minlength=n_clusters) for part in members])
    held_out = np.isin(cluster, _choose_held_out(counts, seed))
    return pd.DataFrame({"image": ids, "cluster": cluster.astype(np.int64), "held_out": held_out})


def _choose_held_out(counts: np.ndarray, seed: int) -> np.ndarray:
    """Choose a quarter of the clusters that holds about a quarter of the images.

    Args:
        counts: number of images (test and train, clusters).
        seed: of the quarters that are tried.

    Raises:
        PerceptError: if no quarter holds images of both kinds and leaves some.
    """
    rng, n_clusters = np.random.default_rng(seed), counts.shape[1]
    best, smallest_error = np.empty(0, np.int64), np.inf
    for _ in range(N_CANDIDATES):
        shuffled = rng.permutation(n_clusters)
        candidate = np.sort(shuffled[: round(HELD_OUT_SHARE * n_clusters)])
        inside, total = counts[:, candidate].sum(1), counts.sum(1)
        if (inside > 0).all() and (inside < total).all():
            error = float(np.abs(inside / total - HELD_OUT_SHARE).sum())
            if error < smallest_error:
                best, smallest_error = candidate, error
    if not len(best):
        raise PerceptError(
            f"No quarter of the {n_clusters} clusters holds test and training images and leaves"
            " some: ask for more clusters (n_clusters)."
        )
    return best


# ------------------------------------------------------------------------- what a training is given
def select_training_split(
    subject: Subject,
    split: str,
    encoder: Callable[[], ImageEncoder],
    n_clusters: int = 20,
    num_sessions: int = 0,
) -> Subject:
    """Select the images that a training may see. Nothing is written into the folder of its run:
    `record_training_split` does that, when the training has begun.

    Args:
        subject: from `open_subject`.
        split: "images" (all of them), or "cluster-held-out" (no training or validation image of a
            quarter of the clusters).
        encoder: gives the frozen model whose features are clustered; not called for "images".
        n_clusters: as for `cluster_images`. Clusters are of the images of all sessions, so that
            they are the same however many are used.
        num_sessions: the first so many sessions, as for `Subject.select_first_sessions`, 0 for all.

    Returns:
        The subject with these images.

    Raises:
        PerceptError: for an unknown split, and as `cluster_images`, `Subject.exclude_clusters` and
            `Subject.select_first_sessions`.
    """
    if split not in ("images", "cluster-held-out"):
        raise PerceptError(f"split is {split!r}: choose one of images, cluster-held-out.")
    selected = subject.select_first_sessions(num_sessions)  # refuses before anything is clustered
    if split == "images":
        return selected
    clusters = _cluster_encoded_images(subject, encoder(), n_clusters)
    return subject.exclude_clusters(clusters).select_first_sessions(num_sessions)


def record_training_split(subject: Subject, logs: str | Path) -> None:
    """Record what a training is given less than everything; `open_training_split` reads it.

    Args:
        subject: of `select_training_split`.
        logs: folder of the run, train_logs/<run>/; receives clusters.parquet where clusters are
            held out, and loses it where they are not; sessions.json likewise, where the first
            sessions alone are used.
    """
    clusters_file, sessions_file = Path(logs) / CLUSTERS_FILE, Path(logs) / SESSIONS_FILE
    if subject.clusters is None:
        clusters_file.unlink(missing_ok=True)
    else:
        with atomic(clusters_file) as temporary:
            subject.clusters.to_parquet(temporary)
    if subject.num_sessions:
        write_json(sessions_file, {"num_sessions": subject.num_sessions})
    else:
        sessions_file.unlink(missing_ok=True)


def _cluster_encoded_images(
    subject: Subject, encoder: ImageEncoder, n_clusters: int
) -> pd.DataFrame:
    """Clusters of a subject's images by the features of a frozen model, which are cached."""
    ids, fingerprint = subject.all_images, encoder.fingerprint()
    targets = cache_targets(
        subject.folder,
        "clip_tokens",
        fingerprint,
        ids,
        encoder.encode_pixels,
        encoder.target_shape,
    )
    features = targets.rows(ids).reshape(len(ids), -1).astype(np.float32)
    return cluster_images(subject, features, fingerprint, n_clusters)


def open_training_split(dataset: str | Path, subj: int, logs: str | Path) -> Subject:
    """Open a prepared subject as the training of a run saw it.

    That is `open_subject`, less what `record_training_split` has recorded in `logs`.

    Args:
        dataset, subj: as for `open_subject`.
        logs: folder of the run, train_logs/<run>/.

    Raises:
        PerceptError: as `open_subject`, or if there is no such folder, or if the run was trained on
            other data than are prepared now, or the clusters are of other test images than the
            subject has, or it has fewer sessions.
    """
    subject = open_subject(dataset, subj)
    check_trained_on(logs, subject.key, subject.identity)
    clusters_file, sessions_file = Path(logs) / CLUSTERS_FILE, Path(logs) / SESSIONS_FILE
    if not Path(logs).is_dir():
        raise PerceptError(
            f"There is no run at {Path(logs)}: give the folder of a run under train_logs/."
        )
    num_sessions = 0
    if sessions_file.exists():
        num_sessions = int(read_json(sessions_file)["num_sessions"])
    if not clusters_file.exists():
        return subject.select_first_sessions(num_sessions)
    clusters = pd.read_parquet(clusters_file)
    if clusters.attrs.get("test_set") != subject.test_set:
        raise PerceptError(
            f"{clusters_file} is of other test images than {subject.folder.name} has now: run the"
            " training notebook of this run again."
        )
    return subject.exclude_clusters(clusters).select_first_sessions(num_sessions)


def open_all_sessions(dataset: str | Path, subj: int, subject: Subject) -> Subject:
    """Open the subject whose images teach what needs no brain.

    It has the images of all sessions, however few of them the decoder saw; clusters held out of
    training stay out.

    Args:
        dataset, subj: as for `open_subject`.
        subject: of `open_training_split`.
    """
    return subject if subject.clusters is not None else open_subject(dataset, subj)
