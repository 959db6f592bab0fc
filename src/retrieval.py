"""Retrieval among the test images, in both directions, and exact nearest neighbours.

- Functions are named by what they do. `top1_image_from_brain`: for each BRAIN sample, is the most
  similar of all IMAGES its own? `top1_brain_from_image`: for each IMAGE, is the most similar of all
  BRAIN samples its own?
- The MindEye scripts print the two the other way round: their cosine function returns the
  transposed matrix, so what they call "fwd" (given the brain, find the image; "image retrieval" in
  tables) is `top1_brain_from_image`, and their "bwd" ("brain retrieval") is
  `top1_image_from_brain`. `REFERENCE_NAMES` maps our names to theirs; compare published numbers
  through it. The earlier, combined system used the same two names the right way round.
- Similarity is the cosine of flattened embeddings. A tie is lost, so a collapsed embedding cannot
  score.
- With 300 candidates good systems are near the upper bound: show the accuracy by pool size and
  among hard negatives too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from src.utils import PerceptError, exact_products, is_finite, open_tensors

CHUNK = 256  # queries compared at once

REFERENCE_NAMES = {
    "image_from_brain": "bwd, 'brain retrieval'",
    "brain_from_image": "fwd, 'image retrieval'",
}


def _normalize_pair(brain: Any, clip: Any) -> tuple[Tensor, Tensor]:
    """Return both as (n, features) float tensors of length one, after checking that they match."""
    brain = torch.as_tensor(brain).detach().flatten(1)
    clip = torch.as_tensor(clip).detach().flatten(1)
    if brain.shape != clip.shape:
        raise PerceptError(
            f"Brain embeddings {tuple(brain.shape)} and image embeddings {tuple(clip.shape)} differ"
            " once flattened; retrieval needs one of each per test image, of the same size."
        )
    for name, rows in (("brain", brain), ("image", clip)):
        _check_finite(rows, f"{name} embeddings")
    return F.normalize(brain.float(), dim=1), F.normalize(clip.float(), dim=1)


def _check_finite(rows: Tensor, name: str) -> None:
    if not torch.isfinite(rows).all():
        raise PerceptError(
            f"The {name} hold NaN or infinite values: see what made them, and make them again."
        )


def _split_roles(brain: Any, clip: Any, direction: str) -> tuple[Tensor, Tensor]:
    """Return (queries, candidates) of a direction, (n, features) each."""
    if direction not in REFERENCE_NAMES:
        raise PerceptError(
            f"The direction {direction!r} is unknown; choose one of {', '.join(REFERENCE_NAMES)}."
        )
    brain, clip = _normalize_pair(brain, clip)
    return (brain, clip) if direction == "image_from_brain" else (clip, brain)


@exact_products()
def _compute_ranks(queries: Tensor, candidates: Tensor) -> np.ndarray:
    """Rank (n,) of candidate i for query i, 1 the best.

    Candidates as similar as the correct one come before it.
    """
    ranks = []
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ candidates.T  # (chunk, n candidates)
        rows = torch.arange(len(similarity))
        correct = similarity[rows, rows + start]
        ranks.append((similarity >= correct[:, None]).sum(1))
    return torch.cat(ranks).cpu().numpy()


# --------------------------------------------------------------------------------- all test images
def rank_each(brain: Any, clip: Any, direction: str = "image_from_brain") -> np.ndarray:
    """Rank of the correct candidate for every query, 1 the best.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim); further axes are
            flattened.
        clip: embeddings of the images that were seen, same shape, same order.
        direction: "image_from_brain" (queries are brains, candidates images) or "brain_from_image".

    Returns:
        (n,) integers from 1 to n.
    """
    return _compute_ranks(*_split_roles(brain, clip, direction))


def rank_by_similarity(similarity: Any, direction: str = "image_from_brain") -> np.ndarray:
    """Rank of the correct candidate for every query, 1 the best, by any measure of likeness.

    Args:
        similarity: (brains, images), larger the more alike, both in the same order
            (`src.similarity`).
        direction: as `rank_each`.

    Returns:
        (n,) integers from 1 to n. Candidates as similar as the correct one come before it.

    Raises:
        PerceptError: for an unknown direction, a matrix that is not square, or values that are not
            finite.
    """
    values = torch.as_tensor(similarity)
    if direction not in REFERENCE_NAMES or values.shape != (len(values), len(values)):
        raise PerceptError(
            f"Similarities {tuple(values.shape)} cannot be ranked {direction!r}: give one row a"
            f" brain and one column an image, and one of {', '.join(REFERENCE_NAMES)}."
        )
    _check_finite(values, "similarities")
    if direction == "brain_from_image":
        values = values.T
    return (values >= values.diagonal()[:, None]).sum(1).cpu().numpy()


def top1_image_from_brain_each(brain: Any, clip: Any) -> np.ndarray:
    """For each brain sample 1 if its own image is the most similar of all images, else 0.

    (n, ...), (n, ...) -> (n,).
    """
    return (rank_each(brain, clip, "image_from_brain") == 1).astype(float)


def top1_brain_from_image_each(brain: Any, clip: Any) -> np.ndarray:
    """For each image 1 if its own brain sample is the most similar of all brain samples, else 0.

    (n, ...), (n, ...) -> (n,).
    """
    return (rank_each(brain, clip, "brain_from_image") == 1).astype(float)


def top1_image_from_brain(brain: Any, clip: Any) -> float:
    """Share of brain samples whose own image is the most similar of all n images; chance 1 / n.

    The MindEye scripts print this as "bwd" and call it brain retrieval.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
    """
    return float(top1_image_from_brain_each(brain, clip).mean())


def top1_brain_from_image(brain: Any, clip: Any) -> float:
    """Share of images whose own brain sample is the most similar of all n; chance 1 / n.

    The MindEye scripts print this as "fwd" and call it image retrieval.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
    """
    return float(top1_brain_from_image_each(brain, clip).mean())


# ------------------------------------------------------------------------------------------- pools
def _sample_random_pools(
    n: int, pool_size: int, shards: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield without end: `pool_size` different samples of n, each pool sampled anew."""
    while True:
        yield rng.choice(n, pool_size, replace=False)


def _sample_consecutive_pools(
    n: int, pool_size: int, shards: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield without end: the next `pool_size` samples of a stream of shards.

    Shards are drawn with replacement, and each is read from its first sample to its last.
    """
    shard_rows = np.array_split(np.arange(n), shards)
    stream = np.empty(0, int)
    while True:
        while len(stream) < pool_size:
            stream = np.concatenate([stream, shard_rows[rng.integers(shards)]])
        yield stream[:pool_size]
        stream = stream[pool_size:]


PoolSampler = Callable[[int, int, int, np.random.Generator], Iterator[np.ndarray]]

POOL_SAMPLERS: dict[str, PoolSampler] = {
    "random": _sample_random_pools,
    "consecutive": _sample_consecutive_pools,
}


@exact_products()
def evaluate_published_protocol(
    brain: Any,
    clip: Any,
    pool_size: int = 300,
    n_pools: int = 30,
    seed: int = 0,
    sampling: str = "random",
    shards: int = 2,
) -> pd.DataFrame:
    """Top-1 in pools of test samples, as the papers report it (MindEye, arXiv 2305.18274).

    The interval is the papers' mean +- 1.96 sd / sqrt(n_pools), cut at 0 and 1. It describes the
    variation of pools, not that of other images or subjects, and has no width if the pool is the
    whole test set. For an interval over images take the bootstrap of the per-image values.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
        pool_size: candidates, at most n.
        n_pools: pools over which the score is averaged.
        seed: of the pools.
        sampling: "random": pools are drawn without replacement, as in MindEye2. "consecutive": as
            in MindEye's scripts, whose loader resamples the test shards. Then a pool is a run of
            consecutive samples, so pools are few and overlap. If a shard is smaller than the pool,
            a sample can be in a pool twice; of its copies only the last can be found, as after a
            stable sort.
        shards: equal parts of the rows, in their order, that stand for the test shards (NSD has 2);
            used by "consecutive" only.

    Returns:
        One row a direction: [direction, reference_name, pool, draws, value, low, high, chance].

    Raises:
        PerceptError: the test set is smaller than the pool or than the number of shards, or the
            sampling is unknown.
    """
    brain, clip = _normalize_pair(brain, clip)
    return _score_pools(brain @ clip.T, pool_size, n_pools, seed, sampling, shards)


def _score_pools(
    similarity: Tensor, pool_size: int, n_pools: int, seed: int, sampling: str, shards: int
) -> pd.DataFrame:
    """`evaluate_published_protocol` of similarities (n brains, n images)."""
    n = len(similarity)
    if not 1 <= pool_size <= n:
        raise PerceptError(
            f"A pool of {pool_size} was asked for, but the test set has {n} images;"
            " choose a pool up to that."
        )
    if sampling not in POOL_SAMPLERS or not 1 <= shards <= n:
        raise PerceptError(
            f"Pools cannot be drawn {sampling!r} from {shards} shards; choose one of"
            f" {', '.join(POOL_SAMPLERS)}, and 1 to {n} shards."
        )
    pools = POOL_SAMPLERS[sampling](n, pool_size, shards, np.random.default_rng(seed))
    scores: dict[str, list[float]] = {direction: [] for direction in REFERENCE_NAMES}
    for _ in range(n_pools):
        pool = torch.as_tensor(next(pools), device=similarity.device)
        block = similarity[pool][:, pool]  # (pool brains, pool images)
        same_sample = torch.tril(pool == pool[:, None])  # itself, and copies of it before it
        scores["image_from_brain"].append(_compute_pool_top1(block, same_sample))
        scores["brain_from_image"].append(_compute_pool_top1(block.T, same_sample))
    rows = []
    for direction, values in scores.items():
        mean = float(np.mean(values))
        half_width = 1.96 * float(np.std(values)) / np.sqrt(n_pools)
        rows.append(
            {
                "direction": direction,
                "reference_name": REFERENCE_NAMES[direction],
                "pool": pool_size,
                "draws": n_pools,
                "value": mean,
                "low": max(mean - half_width, 0.0),
                "high": min(mean + half_width, 1.0),
                "chance": 1 / pool_size,
            }
        )
    return pd.DataFrame(rows)


def _compute_pool_top1(similarity: Tensor, same_sample: Tensor) -> float:
    """Share of queries (rows) whose own candidate (diagonal) beats every other sample.

    Args:
        similarity: (pool, pool).
        same_sample: (pool, pool) bool, candidates that do not compete with the query's own.
    """
    competes = (similarity >= similarity.diagonal()[:, None]) & ~same_sample
    return (~competes.any(1)).double().mean().item()


@exact_products()
def compute_retrieval_by_pool_size(
    brain: Any,
    clip: Any,
    pool_sizes: Sequence[int] = (10, 30, 100, 300, 1000),
    n_pools: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """Table of `evaluate_published_protocol` for several pool sizes.

    Sizes are those that the test set allows, and the whole test set.
    """
    n = len(brain)
    sizes = sorted({size for size in pool_sizes if size < n} | {n})
    brain, clip = _normalize_pair(brain, clip)
    similarity = brain @ clip.T  # (n brains, n images), of all pools
    tables = [_score_pools(similarity, size, n_pools, seed, "random", 2) for size in sizes]
    return pd.concat(tables, ignore_index=True)


# -------------------------------------------------------------------------------------- two models
@dataclass(frozen=True)
class SecondOrderResult:
    """Ranks of the correct candidate before and after re-ranking, 1 the best.

    Attributes:
        first_ranks: (n,) by the first embedding.
        final_ranks: (n,) after the k best by the first embedding are re-ranked by the second.
        second_ranks: (n,) by the second embedding among all candidates.
        candidates: (n, k) re-ranked candidates, best first.
    """

    first_ranks: np.ndarray
    final_ranks: np.ndarray
    second_ranks: np.ndarray
    candidates: np.ndarray


@exact_products()
def rerank_second_order(
    brain: Any,
    clip: Any,
    first_brain: Any,
    first_clip: Any,
    k: int = 16,
    direction: str = "image_from_brain",
    similarity: Any = None,
) -> SecondOrderResult:
    """Find the k nearest candidates by one embedding, and re-rank them by another one.

    A correct candidate that is not among the k keeps its first rank, as re-ranking cannot bring it
    back: the share with `first_ranks <= k` is the upper bound of re-ranking.

    Args:
        brain: all tokens predicted from the brain (n, tokens, dim): they re-rank.
        clip: all tokens of the images, same shape, same order.
        first_brain: single embedding predicted from the brain (n, 1, dim) or (n, dim): it finds the
            k.
        first_clip: single embedding of the images, same shape, same order of images as `clip`.
        k: candidates that are re-ranked, at most n.
        direction: as in `rank_each`.
        similarity: (brains, images) by any other measure (`src.similarity`), which re-ranks in
            place of the cosine of `brain` and `clip`.

    Raises:
        PerceptError: the two embeddings are not of equally many images, or there are not k of them;
            or the similarity is not of these.

    Source: MindEye, section 3.2 and appendix A.7, which chooses so among 16 images found in
    LAION-5B.
    """
    queries, candidates = _split_roles(brain, clip, direction)
    first_queries, first_candidates = _split_roles(first_brain, first_clip, direction)
    n = len(queries)
    if len(first_queries) != n or not 1 <= k <= n:
        raise PerceptError(
            f"{k} of {len(first_queries)} candidates cannot be re-ranked by embeddings of {n}; give"
            " the same images to both, and k up to their number."
        )
    second_ranks = _compute_ranks(queries, candidates)
    measure = None
    if similarity is not None:
        second_ranks = rank_by_similarity(similarity, direction)
        measure = _orient(similarity, n, direction)
    first_ranks, final_ranks = np.empty(n, int), np.empty(n, int)
    reranked = np.empty((n, k), int)
    for rows in np.array_split(np.arange(n), -(-n // CHUNK)):
        correct = rows[:, None]
        first_scores = first_queries[rows] @ first_candidates.T  # (chunk, n)
        order = _sort_best_first(first_scores, np.arange(n)[None] == correct)
        first_ranks[rows] = 1 + (order == correct).argmax(1)
        nearest = order[:, :k]
        second = queries[rows] @ candidates.T if measure is None else measure[rows]
        nearest_scores = np.take_along_axis(second.cpu().numpy(), nearest, 1)  # (chunk, k)
        second_order = _sort_best_first(nearest_scores, nearest == correct)
        reranked[rows] = np.take_along_axis(nearest, second_order, 1)
        is_correct = reranked[rows] == correct
        ranks = 1 + is_correct.argmax(1)
        final_ranks[rows] = np.where(is_correct.any(1), ranks, first_ranks[rows])
    return SecondOrderResult(first_ranks, final_ranks, second_ranks, reranked)


def _orient(similarity: Any, n: int, direction: str) -> Tensor:
    """Similarities (queries, candidates) of (brains, images), of n each."""
    measure = torch.as_tensor(similarity)
    if len(measure) != n:
        raise PerceptError(
            f"The similarity is of {len(measure)} images and the embeddings of {n}: give the same"
            " images to both."
        )
    return measure if direction == "image_from_brain" else measure.T


def _sort_best_first(scores: Any, is_correct: np.ndarray) -> np.ndarray:
    """Sort the columns of scores (queries, candidates), best first.

    Among equal ones the correct candidate comes last.
    """
    scores = np.asarray(torch.as_tensor(scores).cpu())
    return np.lexsort((is_correct, -scores), axis=1)


def load_run_embeddings(folder: str | Path, image_ids: Any) -> tuple[Tensor, Tensor]:
    """Load the embeddings that another run predicted for the same test images.

    Args:
        folder: results/<run> of that run, which notebook 03 has filled.
        image_ids: of this run's test images (n,).

    Returns:
        Embeddings predicted from the brain, and of the images: (n, tokens, dim) each.

    Raises:
        PerceptError: the run has no reconstructions, none of its network, or of other images.
    """
    path = Path(folder) / "reconstructions.safetensors"
    run = path.parent.name
    if not path.exists():
        raise PerceptError(
            f"{path} is missing: run notebook 03 for the run {run} first, or correct its name."
        )
    remedy = f"run notebook 03 for the run {run} again"
    with open_tensors(path, remedy=remedy) as file:
        names = ("projected_network", "true_tokens", "image_ids")
        missing = sorted(set(names) - set(file.keys()))
        if missing:
            raise PerceptError(
                f"{path} has no {', '.join(missing)}: run notebook 03 for the run {run} with"
                " decoder = network or both."
            )
        brain, clip, run_ids = (file.get_tensor(name) for name in names)
    if brain.shape != clip.shape or run_ids.shape != brain.shape[:1]:
        raise PerceptError(
            f"{path} has {tuple(brain.shape)} predicted and {tuple(clip.shape)} true embeddings for"
            f" {tuple(run_ids.shape)} images: {remedy}."
        )
    for name, tensor in {"projected_network": brain, "true_tokens": clip}.items():
        if not is_finite(tensor):
            raise PerceptError(f"{path} has NaN or infinity in {name}: {remedy}.")
    _check_same_images(np.asarray(image_ids), run_ids.numpy(), run)
    return brain, clip


def _check_same_images(image_ids: np.ndarray, other_ids: np.ndarray, run: str) -> None:
    if np.array_equal(image_ids, other_ids):
        return
    n_shared = len(np.intersect1d(image_ids, other_ids))
    difference = f"{n_shared} of them the same"
    if n_shared == len(image_ids) == len(other_ids):
        difference = "the same ones in another order"
    raise PerceptError(
        f"This run has {len(image_ids)} test images and {run} has {len(other_ids)}, {difference}:"
        " reconstruct both with the same dataset, subj and first_images."
    )


# --------------------------------------------------------------------------- hard negatives, index
@dataclass(frozen=True)
class HardNegativeScores:
    """Top-1 among samples of the same group.

    Attributes:
        value: mean over the queries that are not alone in their group.
        chance: mean of 1 / group size over them.
        scores: (n,) 0 or 1, NaN for a sample that is alone in its group.
        chance_levels: (n,) 1 / group size, NaN likewise.
        n: number of queries that count.
    """

    value: float
    chance: float
    scores: np.ndarray
    chance_levels: np.ndarray
    n: int


def compute_hard_negative_top1(
    brain: Any, clip: Any, groups: Any, direction: str = "image_from_brain"
) -> HardNegativeScores:
    """Retrieval among images that resemble each other: candidates are of the query's own group.

    Telling a zebra from a pizza is easy; this asks for one zebra among the zebras.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
        groups: label of every image (n,), e.g. its category or its cluster.
        direction: "image_from_brain" or "brain_from_image".

    Raises:
        PerceptError: there is not one label an image, or no group has two images.
    """
    queries, candidates = _split_roles(brain, clip, direction)
    codes, _ = pd.factorize(np.asarray(groups))
    if len(codes) != len(queries):
        raise PerceptError(
            f"{len(codes)} group labels were given for {len(queries)} images; give one an image."
        )
    scores = np.full(len(codes), np.nan)
    chance_levels = np.full(len(codes), np.nan)
    for code in np.unique(codes[codes >= 0]):  # a missing label belongs to no group
        members = np.flatnonzero(codes == code)
        if len(members) > 1:
            scores[members] = _compute_ranks(queries[members], candidates[members]) == 1
            chance_levels[members] = 1 / len(members)
    counted = np.isfinite(scores)
    if not counted.any():
        raise PerceptError(
            "No two images share a group, so there are no hard negatives; use coarser groups."
        )
    value = float(scores[counted].mean())
    chance = float(chance_levels[counted].mean())
    return HardNegativeScores(value, chance, scores, chance_levels, int(counted.sum()))


@exact_products()
def find_nearest(queries: Any, index_features: Any, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the k most similar rows of an index by cosine, exactly.

    Args:
        queries: (q, dim) or (q, tokens, dim); flattened.
        index_features: (m, dim) or (m, tokens, dim), same size once flattened.
        k: neighbours, at most m.

    Returns:
        Similarities (q, k), best first, and row numbers in the index (q, k).
    """
    queries = torch.as_tensor(queries).detach().flatten(1).float()
    n_features = int(np.prod(index_features.shape[1:]))
    if queries.shape[1] != n_features:
        raise PerceptError(
            f"Queries have {queries.shape[1]} features and the index {n_features}; both must come"
            " from the same encoder."
        )
    if not 1 <= k <= len(index_features):
        raise PerceptError(
            f"{k} neighbours were asked for, but the index holds {len(index_features)} rows."
        )
    _check_finite(queries, "queries")
    queries = F.normalize(queries, dim=1)
    # The index may be a mapped file, or in half precision: a block of it is turned into floats at a
    # time.
    similarities = []
    for start in range(0, len(index_features), CHUNK):
        rows = index_features[start : start + CHUNK]
        if not isinstance(rows, Tensor):
            rows = torch.as_tensor(np.array(rows))
        block = rows.detach().to(queries.device).flatten(1).float()
        _check_finite(block, f"rows from {start} on of the index")
        similarities.append(queries @ F.normalize(block, dim=1).T)  # (q, block)
    top = torch.cat(similarities, 1).topk(k, dim=1)
    return top.values, top.indices
