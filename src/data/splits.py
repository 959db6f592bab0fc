"""Training splits of a subject: sessions, a share of the images, clusters that are held out."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from src.data.files import disk_errors
from src.data.subject import Subject, open_subject
from src.data.targets import cache_targets, hash_fingerprint
from src.utils import PerceptError, atomic, read_json, write_json

CLUSTERS, SESSIONS = (
    "clusters.parquet",
    "sessions.json",
)  # what a training was given less than everything, in the folder of its run

# share of the clusters, and about that of the images, that a cluster-held-out training is not given
HELD_OUT = 0.25


def cluster_images(
    subject: Subject,
    features: np.ndarray,
    made_by: dict[str, Any],
    n_clusters: int = 20,
    seed: int = 42,
) -> pd.DataFrame:
    """Clusters of a subject's images, a quarter of which is held out; found once and stored as
    data/<dataset>/clusters-<hash>.parquet.

    k-means of the features divided by their length. Of 2000 random quarters of the clusters that
    one is held out which holds most nearly a quarter of the test images and a quarter of the
    training images. Source: Shirakawa et al. 2024, arXiv 2405.10078.

    Args:
        subject: with all its images.
        features: (images, dim), in the order of `subject.all_images`.
        made_by: fingerprint of the model that made them. Other features, images or settings are
            another file.
        n_clusters: number of clusters, at least 4.
        seed: of k-means and of the choice.

    Returns:
        One row an image, ascending: image, cluster (0 to n_clusters - 1), held_out (bool). Its
            `attrs` say how it was made.

    Raises:
        PerceptError: for features of another length, fewer images than clusters, or clusters of
            which no quarter holds test images and leaves some.
    """
    ids, test = subject.all_images, subject.image_ids("test")
    if len(features) != len(ids) or not 4 <= n_clusters <= len(ids):
        raise PerceptError(
            f"{len(features)} features of {len(ids)} images for {n_clusters} clusters: give one an"
            " image, and choose 4 clusters to one an image."
        )
    store = subject.image_store
    shown = hashlib.sha256(np.stack([ids, store.crc[store.positions(ids)]]).tobytes()).hexdigest()[
        :16
    ]
    meta = json.loads(
        json.dumps(
            {
                "fingerprint": made_by,
                "images": shown,
                "test_set": subject.test_set,
                "n_clusters": n_clusters,
                "seed": seed,
            },
            default=str,
        )
    )
    path = subject.folder / f"clusters-{hash_fingerprint(meta)}.parquet"
    with open(subject.folder / ".clusters.lock", "w") as lock, disk_errors(subject.folder):
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that ask at once take turns
        if not path.exists():
            unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            cluster = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(
                unit.astype(np.float32)
            )
            held = _quarter(
                cluster,
                np.isin(ids, test),
                np.isin(ids, subject.image_ids("train")),
                n_clusters,
                seed,
            )
            table = pd.DataFrame(
                {
                    "image": ids,
                    "cluster": cluster.astype(np.int64),
                    "held_out": np.isin(cluster, held),
                }
            )
            table.attrs = meta
            with atomic(path) as temporary:
                table.to_parquet(temporary)
    return pd.read_parquet(path)


def _quarter(
    cluster: np.ndarray, test: np.ndarray, train: np.ndarray, n_clusters: int, seed: int
) -> np.ndarray:
    """A quarter of the clusters with about a quarter of the images.

    Args:
        cluster: (images,) cluster of each.
        test, train: bool (images,).
        n_clusters: number of clusters.
        seed: of the quarters that are tried.
    """
    counts = np.stack(
        [np.bincount(cluster[part], minlength=n_clusters) for part in (test, train)]
    )  # (test and train, clusters)
    rng, best = np.random.default_rng(seed), (np.inf, np.empty(0, np.int64))
    for _ in range(2000):
        chosen = np.sort(rng.permutation(n_clusters)[: round(HELD_OUT * n_clusters)])
        inside = counts[:, chosen].sum(1)
        if (inside > 0).all() and (inside < counts.sum(1)).all():
            miss = float(np.abs(inside / counts.sum(1) - HELD_OUT).sum())
            best = min(best, (miss, chosen), key=lambda each: each[0])
    if not len(best[1]):
        raise PerceptError(
            f"No quarter of the {n_clusters} clusters holds test and training images and leaves"
            " some: ask for more clusters (n_clusters)."
        )
    return best[1]


def make_training_split(
    subject: Subject,
    split: str,
    logs: str | Path,
    encoder: Callable[[], Any],
    n_clusters: int = 20,
    num_sessions: int = 0,
) -> Subject:
    """The subject with the images that a training may see, written down in the run's folder for
    `open_training_split`.

    Args:
        subject: from `open_subject`.
        split: "images" (all of them), or "cluster-held-out" (no training or validation image of a
            quarter of the clusters).
        logs: folder of the run, train_logs/<run>/; receives clusters.parquet where clusters are
            held out, and loses it where they are not; sessions.json likewise, where the first
            sessions alone are used.
        encoder: gives the frozen model whose features are clustered, as `pretrained.Clipper`; not
            called for "images".
        n_clusters: as for `cluster_images`. Clusters are of the images of all sessions, so that
            they are the same however many are used.
        num_sessions: the first so many sessions, as for `Subject.select_first_sessions`, 0 for all.

    Raises:
        PerceptError: for an unknown split, and as `cluster_images`, `Subject.exclude_clusters` and
            `Subject.select_first_sessions`.
    """
    if split not in ("images", "cluster-held-out"):
        raise PerceptError(f"split is {split!r}: choose one of images, cluster-held-out.")
    limited = subject.select_first_sessions(num_sessions)  # refuses before anything is written
    if split == "images":
        (Path(logs) / CLUSTERS).unlink(missing_ok=True)
    else:
        limited = _without_clusters(subject, logs, encoder(), n_clusters).select_first_sessions(
            num_sessions
        )
    if num_sessions:
        write_json(Path(logs) / SESSIONS, {"num_sessions": num_sessions})
    else:
        (Path(logs) / SESSIONS).unlink(missing_ok=True)
    return limited


def _without_clusters(subject: Subject, logs: str | Path, model: Any, n_clusters: int) -> Subject:
    """The subject without a quarter of its clusters, which are written down."""
    ids, made_by = subject.all_images, model.fingerprint()
    targets = cache_targets(
        subject.folder, "clip_tokens", made_by, ids, model.encode_pixels, model.target_shape
    )
    clusters = cluster_images(
        subject, targets.rows(ids).reshape(len(ids), -1).astype(np.float32), made_by, n_clusters
    )
    made = subject.exclude_clusters(clusters)
    with atomic(Path(logs) / CLUSTERS) as temporary:
        clusters.to_parquet(temporary)
    return made


def open_training_split(dataset: str | Path, subj: int, logs: str | Path) -> Subject:
    """Open a prepared subject as the training of a run saw it: `open_subject`, less what
    `make_training_split` has written down in `logs`.

    Args:
        dataset, subj: as for `open_subject`.
        logs: folder of the run, train_logs/<run>/.

    Raises:
        PerceptError: as `open_subject`, or if there is no such folder, or if the clusters are of
            other test images than the subject has, or it has fewer sessions.
    """
    subject, record, told = (
        open_subject(dataset, subj),
        Path(logs) / CLUSTERS,
        Path(logs) / SESSIONS,
    )
    if not record.parent.is_dir():
        raise PerceptError(
            f"There is no run at {record.parent}: give the folder of a run under train_logs/."
        )
    num_sessions = int(read_json(told)["num_sessions"]) if told.exists() else 0
    if not record.exists():
        return subject.select_first_sessions(num_sessions)
    clusters = pd.read_parquet(record)
    if clusters.attrs.get("test_set") != subject.test_set:
        raise PerceptError(
            f"{record} is of other test images than {subject.folder.name} has now: run the training"
            " notebook of this run again."
        )
    return subject.exclude_clusters(clusters).select_first_sessions(num_sessions)


def open_all_sessions(dataset: str | Path, subj: int, subject: Subject) -> Subject:
    """The subject whose pictures teach what needs no brain: with those of all sessions, however few
    of them the decoder saw; clusters held out of training stay out.

    Args:
        dataset, subj: as for `open_subject`.
        subject: of `open_training_split`.
    """
    return subject if subject.clusters is not None else open_subject(dataset, subj)
