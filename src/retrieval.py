"""Retrieval among the test images, in both directions, and exact nearest neighbours in an index of
images.

- Functions are named by what they do. `top1_image_from_brain`: for each BRAIN sample, is the most
  similar of all IMAGES its own? `top1_brain_from_image`: for each IMAGE, is the most similar of all
  BRAIN samples its own?
- The MindEye scripts print the two the other way round: their cosine function returns the
  transposed matrix, so what they call "fwd" (given the brain, find the image; "image retrieval" in
  tables) is `top1_brain_from_image`, and their "bwd" ("brain retrieval") is
  `top1_image_from_brain`. `REFERENCE_NAMES` maps ours to theirs; compare published numbers through
  it. The earlier, combined system used the same two names the right way round.
- Similarity is the cosine of flattened embeddings. A tie is lost, so a collapsed embedding cannot
  score.
- 300 candidates are saturated by good systems: show the accuracy by pool size and among hard
  negatives too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from src.utils import PerceptError

CHUNK = 256  # queries compared at once
REFERENCE_NAMES = {
    "image_from_brain": "bwd, 'brain retrieval'",
    "brain_from_image": "fwd, 'image retrieval'",
}


def _embeddings(brain: Any, clip: Any) -> tuple[Tensor, Tensor]:
    """Both as (n, features) float tensors of length one, after checking that they pair up."""
    brain, clip = (torch.as_tensor(x).detach().flatten(1) for x in (brain, clip))
    if brain.shape != clip.shape:
        raise PerceptError(
            f"Brain embeddings {tuple(brain.shape)} and image embeddings {tuple(clip.shape)} differ"
            " once flattened; retrieval needs one of each per test image, of the same size."
        )
    for name, rows in (("brain", brain), ("image", clip)):
        if not torch.isfinite(rows).all():
            raise PerceptError(f"The {name} embeddings hold NaN or infinite values.")
    return F.normalize(brain.float(), dim=1), F.normalize(clip.float(), dim=1)


def _ranks(queries: Tensor, candidates: Tensor) -> np.ndarray:
    """Rank (n,) of candidate i for query i, 1 the best.

    Candidates as similar as the right one come before it.
    """
    ranks = []
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK] @ candidates.T  # (chunk, n candidates)
        own = part[torch.arange(len(part)), torch.arange(start, start + len(part))]
        ranks.append((part >= own[:, None]).sum(1))
    return torch.cat(ranks).cpu().numpy()


def _turned(brain: Any, clip: Any, direction: str) -> tuple[Tensor, Tensor]:
    """(queries, candidates) of a direction."""
    if direction not in REFERENCE_NAMES:
        raise PerceptError(
            f"The direction {direction!r} is unknown; choose one of {', '.join(REFERENCE_NAMES)}."
        )
    brain, clip = _embeddings(brain, clip)
    return (brain, clip) if direction == "image_from_brain" else (clip, brain)


def rank_each(brain: Any, clip: Any, direction: str = "image_from_brain") -> np.ndarray:
    """Rank of the right candidate for every query, 1 the best.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim); further axes are
            flattened.
        clip: embeddings of the images that were seen, same shape, same order.
        direction: "image_from_brain" (queries are brains, candidates images) or "brain_from_image".

    Returns:
        (n,) integers from 1 to n.
    """
    return _ranks(*_turned(brain, clip, direction))


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
    """Share of images whose own brain sample is the most similar of all n brain samples; chance 1 /
    n.

    The MindEye scripts print this as "fwd" and call it image retrieval.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
    """
    return float(top1_brain_from_image_each(brain, clip).mean())


def top_k(brain: Any, clip: Any, k: int, direction: str = "image_from_brain") -> float:
    """Share of queries whose right candidate is among the k most similar.

    Chance k / n. Arguments as `rank_each`.
    """
    return float((rank_each(brain, clip, direction) <= k).mean())


# ------------------------------------------------------------------------------------------- pools
def _random_pools(n: int, pool: int, shards: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end: `pool` different samples of n, each pool anew."""
    while True:
        yield rng.choice(n, pool, replace=False)


def _consecutive_pools(
    n: int, pool: int, shards: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Without end: the next `pool` samples of a stream of shards, which are drawn with replacement
    and each read from its first sample to its last.
    """
    parts, stream = np.array_split(np.arange(n), shards), np.empty(0, int)
    while True:
        while len(stream) < pool:
            stream = np.concatenate([stream, parts[rng.integers(shards)]])
        yield stream[:pool]
        stream = stream[pool:]


POOLS: dict[str, Callable[[int, int, int, np.random.Generator], Iterator[np.ndarray]]] = {
    "random": _random_pools,
    "consecutive": _consecutive_pools,
}


def evaluate_published_protocol(
    brain: Any,
    clip: Any,
    pool_size: int = 300,
    n_pools: int = 30,
    seed: int = 0,
    sampling: str = "random",
    shards: int = 2,
) -> pd.DataFrame:
    """Top-1 among `pool` test samples, repeated, as the papers report it (MindEye, arXiv
    2305.18274).

    The interval is the papers' mean +- 1.96 sd / sqrt(draws), cut at 0 and 1: it speaks of the
    pools, not of other images or subjects, and has no width where the pool is the whole test set.
    For an interval over images take the bootstrap of the per-image values.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
        pool: candidates, at most n.
        draws: pools.
        seed: of the pools.
        sampling: "random": pools are drawn without replacement, as in MindEye2. "consecutive": as
            in MindEye's scripts, whose loader resamples the test shards: a pool is a run of
            consecutive samples, so pools are few and overlap, and a sample can be in one twice
            (where a shard is smaller than the pool), of which copies, as after a stable sort, the
            last one can be found.
        shards: equal parts of the rows, in their order, that stand for the test shards (NSD has 2);
            used by "consecutive" only.

    Returns:
        One row a direction: [direction, reference_name, pool, draws, value, low, high, chance].

    Raises:
        PerceptError: the test set is smaller than the pool or than the number of shards, or the
            sampling is unknown.
    """
    brain, clip = _embeddings(brain, clip)
    if not 1 <= pool_size <= len(brain):
        raise PerceptError(
            f"A pool of {pool_size} was asked for, but the test set has {len(brain)} images; choose a"
            " pool up to that."
        )
    if sampling not in POOLS or not 1 <= shards <= len(brain):
        raise PerceptError(
            f"Pools cannot be drawn {sampling!r} from {shards} shards; choose one of"
            f" {', '.join(POOLS)}, and 1 to {len(brain)} shards."
        )
    similarity = brain @ clip.T  # (n brains, n images)
    pools = POOLS[sampling](len(brain), pool_size, shards, np.random.default_rng(seed))
    hits: dict[str, list[float]] = {direction: [] for direction in REFERENCE_NAMES}
    for _ in range(n_pools):
        chosen = torch.as_tensor(next(pools), device=similarity.device)
        block = similarity[chosen][:, chosen]  # (pool brains, pool images)
        own = torch.tril(chosen == chosen[:, None])  # itself, and copies of it before it
        for direction, matrix in (("image_from_brain", block), ("brain_from_image", block.T)):
            lost = ((matrix >= matrix.diagonal()[:, None]) & ~own).any(1)
            hits[direction].append((~lost).double().mean().item())
    rows = []
    for direction, values in hits.items():
        mean, half = float(np.mean(values)), 1.96 * float(np.std(values)) / np.sqrt(n_pools)
        interval = (max(mean - half, 0.0), min(mean + half, 1.0))
        rows.append(
            (
                direction,
                REFERENCE_NAMES[direction],
                pool_size,
                n_pools,
                mean,
                *interval,
                1 / pool_size,
            )
        )
    names = ["direction", "reference_name", "pool", "draws", "value", "low", "high", "chance"]
    return pd.DataFrame(rows, columns=names)


def compute_retrieval_by_pool_size(
    brain: Any,
    clip: Any,
    pool_sizes: Sequence[int] = (10, 30, 100, 300, 1000),
    n_pools: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """`evaluate_published_protocol` at every pool size that the test set allows, and at the whole test set.

    The same table, longer.
    """
    n = len(brain)
    sizes = sorted({size for size in pool_sizes if size < n} | {n})
    return pd.concat(
        [evaluate_published_protocol(brain, clip, size, n_pools, seed) for size in sizes],
        ignore_index=True,
    )


# -------------------------------------------------------------------------------------- two models
class SecondOrderResult(NamedTuple):
    """What re-ranking found.

    first, reranked, alone: rank (n,) of the right candidate, 1 the best: by the first embedding,
    after re-ranking its k best, and by the second embedding among all; found: (n, k) candidates,
    re-ranked, best first.
    """

    first_ranks: np.ndarray
    final_ranks: np.ndarray
    second_ranks: np.ndarray
    candidates: np.ndarray


def rerank_second_order(
    brain: Any,
    clip: Any,
    first_brain: Any,
    first_clip: Any,
    k: int = 16,
    direction: str = "image_from_brain",
) -> SecondOrderResult:
    """The k nearest candidates by one embedding, re-ranked by another one.

    A right candidate that is not among the k keeps its first rank, as re-ranking cannot bring it
    back: the share with `first <= k` is the most that re-ranking can reach.

    Args:
        brain: all tokens predicted from the brain (n, tokens, dim): they re-rank.
        clip: all tokens of the images, same shape, same order.
        first_brain: single embedding predicted from the brain (n, 1, dim) or (n, dim): it finds the
            k.
        first_clip: single embedding of the images, same shape, same order of images as `clip`.
        k: candidates that are re-ranked, at most n.
        direction: as in `rank_each`.

    Raises:
        PerceptError: the two embeddings are not of equally many images, or there are not k of them.

    Source: MindEye, section 3.2 and appendix A.7, which chooses so among 16 images found in
    LAION-5B.
    """
    queries, candidates = _turned(brain, clip, direction)
    first_queries, first_candidates = _turned(first_brain, first_clip, direction)
    n = len(queries)
    if len(first_queries) != n or not 1 <= k <= n:
        raise PerceptError(
            f"{k} of {len(first_queries)} candidates cannot be re-ranked by embeddings of {n}; give"
            " the same images to both, and k up to their number."
        )
    first, reranked, found = np.empty(n, int), np.empty(n, int), np.empty((n, k), int)
    for rows in np.array_split(np.arange(n), -(-n // CHUNK)):
        order = _best_first(
            first_queries[rows] @ first_candidates.T, np.arange(n)[None] == rows[:, None]
        )  # (chunk, n)
        near = order[:, :k]
        scores = np.take_along_axis(
            (queries[rows] @ candidates.T).cpu().numpy(), near, 1
        )  # (chunk, k)
        again = np.take_along_axis(near, _best_first(scores, near == rows[:, None]), 1)
        first[rows] = 1 + (order == rows[:, None]).argmax(1)
        inside = again == rows[:, None]
        reranked[rows] = np.where(inside.any(1), 1 + inside.argmax(1), first[rows])
        found[rows] = again
    return SecondOrderResult(first, reranked, _ranks(queries, candidates), found)


def _best_first(scores: Any, own: np.ndarray) -> np.ndarray:
    """Columns of (queries, candidates), best first; among equals the right candidate, where `own`
    is true, comes last.
    """
    return np.lexsort((own, -np.asarray(torch.as_tensor(scores).cpu())), axis=1)


def load_run_embeddings(folder: str | Path, image_ids: Any) -> tuple[Tensor, Tensor]:
    """The embeddings that another run predicted for the same test images.

    Args:
        folder: results/<run> of that run, which notebook 03 has filled.
        image_ids: of this run's test images (n,).

    Returns:
        predicted from the brain, and of the images: (n, tokens, dim) each.

    Raises:
        PerceptError: the run has no reconstructions, none of its network, or of other images.
    """
    path = Path(folder) / "reconstructions.safetensors"
    if not path.exists():
        raise PerceptError(
            f"{path} is missing: run notebook 03 for the run {path.parent.name} first, or correct"
            " its name."
        )
    with safe_open(path, framework="pt") as file:
        wanted = ("projected_network", "true_tokens", "image_ids")
        if missing := sorted(set(wanted) - set(file.keys())):
            raise PerceptError(
                f"{path} has no {', '.join(missing)}: run notebook 03 for the run"
                f" {path.parent.name} with decoder = network or both."
            )
        brain, clip, others = (file.get_tensor(name) for name in wanted)
    ids = np.asarray(image_ids)
    if not np.array_equal(ids, others.numpy()):
        shared = len(np.intersect1d(ids, others.numpy()))
        what = (
            "the same ones in another order"
            if shared == len(ids) == len(others)
            else f"{shared} of them the same"
        )
        raise PerceptError(
            f"This run has {len(ids)} test images and {path.parent.name} has {len(others)}, {what}:"
            " reconstruct both with the same dataset, subj and first_images."
        )
    return brain, clip


# --------------------------------------------------------------------------- hard negatives, index
class HardNegativeScores(NamedTuple):
    """Top-1 among samples of the same group.

    value: mean over the queries that have company; chance: mean of 1 / group size over them; each:
    (n,) of 0 or 1, NaN where a sample is alone in its group; chance_each: (n,), NaN likewise; n:
    number of queries that count.
    """

    value: float
    chance: float
    scores: np.ndarray
    chance_levels: np.ndarray
    n: int


def compute_hard_negative_top1(
    brain: Any, clip: Any, groups: Any, direction: str = "image_from_brain"
) -> HardNegativeScores:
    """Retrieval among images that resemble each other: candidates are only those of the query's own
    group.

    Telling a zebra from a pizza is easy; this asks for one zebra among the zebras.

    Args:
        brain: embeddings predicted from the brain (n, dim) or (n, tokens, dim).
        clip: embeddings of the images, same shape, same order.
        groups: label of every image (n,), e.g. its category or its cluster.
        direction: "image_from_brain" or "brain_from_image".

    Raises:
        PerceptError: there is not one label an image, or no group has two images.
    """
    queries, candidates = _turned(brain, clip, direction)
    codes, _ = pd.factorize(np.asarray(groups))
    if len(codes) != len(queries):
        raise PerceptError(
            f"{len(codes)} group labels were given for {len(queries)} images; give one an image."
        )
    each, chance = np.full(len(codes), np.nan), np.full(len(codes), np.nan)
    for code in np.unique(codes[codes >= 0]):  # a missing label belongs to no group
        members = np.flatnonzero(codes == code)
        if len(members) > 1:
            each[members] = _ranks(queries[members], candidates[members]) == 1
            chance[members] = 1 / len(members)
    counted = np.isfinite(each)
    if not counted.any():
        raise PerceptError(
            "No two images share a group, so there are no hard negatives; use coarser groups."
        )
    return HardNegativeScores(
        float(each[counted].mean()), float(chance[counted].mean()), each, chance, int(counted.sum())
    )


def find_nearest(queries: Any, index_features: Any, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k most similar rows of an index by cosine, exactly.

    Args:
        queries: (q, dim) or (q, tokens, dim); flattened.
        index_features: (m, dim) or (m, tokens, dim), same size once flattened.
        k: neighbours, at most m.

    Returns:
        similarities (q, k), best first, and row numbers in the index (q, k).
    """
    queries, size = (
        torch.as_tensor(queries).detach().flatten(1).float(),
        int(np.prod(index_features.shape[1:])),
    )
    if queries.shape[1] != size:
        raise PerceptError(
            f"Queries have {queries.shape[1]} features and the index {size}; both must come from "
            "the same encoder."
        )
    if not 1 <= k <= len(index_features):
        raise PerceptError(
            f"{k} neighbours were asked for, but the index holds {len(index_features)} rows."
        )
    queries = F.normalize(queries, dim=1)
    # the index may be a mapped file, or in half precision: a block of it is turned into floats at a
    # time
    parts = []
    for start in range(0, len(index_features), CHUNK):
        block = torch.as_tensor(np.array(index_features[start : start + CHUNK])).flatten(1).float()
        parts.append(queries @ F.normalize(block, dim=1).T)  # (q, block)
    found = torch.cat(parts, 1).topk(k, dim=1)
    return found.values, found.indices
