"""src.evaluation.small_pools: chance of small test sets, against counting by hand."""

import itertools

import numpy as np
import pytest

from src.evaluation.small_pools import permute_two_way, to_benchmark_two_way
from src.metrics import two_way_identification
from src.utils import PerceptError


def correlate(real, recon):
    n = len(real)
    return np.corrcoef(real, recon)[:n, n:]


def test_the_score_is_that_of_the_metric_and_the_benchmark_is_lower():
    rng = np.random.default_rng(0)
    real, recon = rng.standard_normal((12, 40)), rng.standard_normal((12, 40))
    result = permute_two_way(correlate(real, recon), np.repeat([0, 1], 6), n_draws=200)
    assert result.value == pytest.approx(two_way_identification(real, recon))
    assert result.benchmark_value == pytest.approx(result.value - 1 / 11)
    assert to_benchmark_two_way(1.0, 12) == pytest.approx(10 / 11)
    assert result.n_assignments == 200 and result.low < result.chance < result.high


def test_all_assignments_of_a_small_pool_are_counted():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((5, 5)) + np.eye(5)
    scores = []
    for order in itertools.permutations(range(5)):  # by hand: pair by pair
        wins = [
            matrix[i, j] < matrix[order[j], j] for j in range(5) for i in range(5) if i != order[j]
        ]
        scores.append(np.mean(wins))
    result = permute_two_way(matrix)
    assert result.n_assignments == 120 and result.value == pytest.approx(scores[0])
    assert result.chance == pytest.approx(np.mean(scores)) == pytest.approx(0.5)
    assert result.p == pytest.approx(np.mean(np.array(scores) >= scores[0] - 1e-12))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_a_difference_of_groups_alone_is_no_evidence():
    """Reconstructions that tell the two sets apart and nothing else score high, with a high p."""
    rng = np.random.default_rng(2)
    sets = np.repeat([0, 1], 6)
    matrix = (sets[:, None] == sets[None]) * 5 + rng.standard_normal((12, 12))
    within = permute_two_way(matrix, sets, n_draws=2000)
    across = permute_two_way(matrix, None, n_draws=2000)
    assert within.value > 0.65 and across.p < 0.01 and within.p > 0.05
    assert within.chance > 0.7 and across.chance == pytest.approx(0.5, abs=0.02)


def test_refusals():
    with pytest.raises(PerceptError, match="finite, .images, images."):
        permute_two_way(np.zeros((3, 4)))
    with pytest.raises(PerceptError, match="one label to at least two"):
        permute_two_way(np.eye(3), [0, 1, 2])
    with pytest.raises(PerceptError, match="at least two images"):
        to_benchmark_two_way(1.0, 1)
