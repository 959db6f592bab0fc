"""Likelihood, centred cosine, hubs: against independent formulas, and one query at a time."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from src.retrieval import rank_by_similarity, rank_each, rerank_second_order
from src.similarity import (
    BrainLikelihood,
    combine_similarities,
    compute_centred_cosine,
    correct_hubs,
)
from src.utils import PerceptError

VOXELS, IMAGES = 8, 30


@pytest.fixture
def measured():
    """Predicted and measured voxels (images, voxels), and the covariance of their difference."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(VOXELS, VOXELS))
    covariance = mixing @ mixing.T + 0.5 * np.eye(VOXELS)
    predicted = rng.normal(size=(IMAGES, VOXELS)) * 2 + 1
    residuals = rng.multivariate_normal(np.zeros(VOXELS), covariance, IMAGES)
    return predicted, predicted + residuals, covariance


@pytest.fixture
def likelihood(measured):
    predicted, brains, covariance = measured
    return BrainLikelihood.from_covariance(covariance, brains.mean(0), predicted.mean(0))


def test_comparison_is_the_correlation_of_whitened_responses(measured, likelihood):
    predicted, brains, covariance = measured
    inverse = np.linalg.inv(0.4 * covariance + 0.6 * np.diag(np.diag(covariance)))
    x, f = brains - brains.mean(0), predicted - predicted.mean(0)
    products = x @ inverse @ f.T
    lengths = np.sqrt(np.outer(np.diag(x @ inverse @ x.T), np.diag(f @ inverse @ f.T)))
    np.testing.assert_allclose(
        likelihood.compare(brains, predicted).numpy(), products / lengths, atol=1e-5
    )


def test_samples_are_scored_by_a_gaussian(measured):
    predicted, brains, covariance = measured
    means = np.full(VOXELS, 0.3), np.full(VOXELS, 0.1)
    judge = BrainLikelihood.from_covariance(covariance, *means)
    candidates = np.stack([predicted, predicted[::-1]], 1)
    scores = judge.score_samples(torch.from_numpy(brains), torch.from_numpy(candidates)).numpy()
    gaussian = multivariate_normal(
        np.zeros(VOXELS), 0.4 * covariance + 0.6 * np.diag(np.diag(covariance))
    )
    expected = gaussian.logpdf(brains[:, None] - means[0] - (candidates - means[1]))
    differences = expected[:, 0] - expected[:, 1]
    np.testing.assert_allclose(scores[:, 0] - scores[:, 1], differences, rtol=1e-3, atol=1e-2)


def test_no_query_looks_at_another_one(measured, likelihood):
    predicted, brains, _ = measured
    together = likelihood.compare(brains, predicted)
    alone = torch.cat([likelihood.compare(brains[i : i + 1], predicted) for i in range(IMAGES)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    held_out = torch.randn(20, IMAGES)
    corrected = correct_hubs(together, held_out, 5)
    torch.testing.assert_close(correct_hubs(together[3:4], held_out, 5), corrected[3:4])
    joined = combine_similarities([together, corrected], [held_out, 2 * held_out])
    one = combine_similarities([together[3:4], corrected[3:4]], [held_out, 2 * held_out])
    torch.testing.assert_close(one, joined[3:4])


def test_centering_over_queries_is_transductive(measured, likelihood):
    predicted, brains, _ = measured
    other_mean = BrainLikelihood(
        likelihood.factor, likelihood.measured_mean + 1, likelihood.predicted_mean - 1
    )
    given = [judge.compare(brains, predicted, "queries") for judge in (likelihood, other_mean)]
    torch.testing.assert_close(*given)
    shifted = likelihood.compare(brains[:5] + 3, predicted, "queries")
    torch.testing.assert_close(shifted, likelihood.compare(brains[:5], predicted, "queries"))


def test_centred_cosine_is_the_cosine_once_the_mean_is_taken_off():
    rng = np.random.default_rng(1)
    brain, images, mean = rng.normal(size=(4, 2, 3)), rng.normal(size=(5, 2, 3)), np.ones((2, 3))
    similarity = compute_centred_cosine(brain, images, mean).numpy()
    a, b = (brain[1] - 1).ravel(), (images[3] - 1).ravel()
    assert similarity.shape == (4, 5)
    assert similarity[1, 3] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_hub_loses_what_it_resembles():
    similarity = torch.tensor([[0.9, 0.8], [0.9, 0.2]])  # image 0 is near every brain
    reference = torch.tensor([[0.9, 0.1], [0.7, 0.3], [-1.0, -1.0]])
    corrected = correct_hubs(similarity, reference, k=2, share=1)
    torch.testing.assert_close(corrected, torch.tensor([[0.1, 0.6], [0.1, 0.0]]))
    halved = correct_hubs(similarity, reference, k=2)
    csls = 2 * similarity - reference.topk(2, 0).values.mean(0)
    torch.testing.assert_close(2 * halved, csls)


def test_similarities_are_joined_in_their_own_deviations():
    rng = np.random.default_rng(2)
    first, second, held_out = (torch.from_numpy(rng.normal(size=(6, 6))) for _ in range(3))
    joined = combine_similarities([100 * first + 7, second], [100 * held_out + 7, held_out])
    deviations = [(part - held_out.mean()) / held_out.std() for part in (first, second)]
    torch.testing.assert_close(joined, sum(deviations).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["image_from_brain", "brain_from_image"])
def test_ranks_by_a_similarity_are_those_of_its_embeddings(direction):
    generator = torch.Generator().manual_seed(3)
    brain = torch.randn(20, 4, generator=generator)
    clip = brain + torch.randn(20, 4, generator=generator)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (brain, clip)]
    cosine = unit[0] @ unit[1].T
    expected = rank_each(brain, clip, direction)
    np.testing.assert_array_equal(rank_by_similarity(cosine, direction), expected)
    first = torch.randn(20, 3, generator=generator), torch.randn(20, 3, generator=generator)
    by_cosine = rerank_second_order(brain, clip, *first, k=5, direction=direction)
    by_matrix = rerank_second_order(
        -brain, clip, *first, k=5, direction=direction, similarity=cosine
    )
    np.testing.assert_array_equal(by_matrix.final_ranks, by_cosine.final_ranks)
    np.testing.assert_array_equal(by_matrix.second_ranks, expected)
    assert (rank_by_similarity(torch.ones(5, 5), direction) == 5).all()  # a tie is lost


def test_what_does_not_belong_together_is_refused(measured, likelihood):
    predicted, brains, covariance = measured
    mean = np.zeros(VOXELS)
    cases = [
        (lambda: likelihood.compare(brains[:, :5], predicted), "5 and 8 features"),
        (lambda: likelihood.compare(brains * np.nan, predicted), "NaN"),
        (lambda: likelihood.compare(brains, predicted, "test"), "choose one of training, queries"),
        (lambda: BrainLikelihood.from_covariance(covariance, mean[:3], mean), "do not belong"),
        (lambda: BrainLikelihood.from_covariance(-covariance, mean, mean), "not positive definite"),
        (lambda: correct_hubs(torch.ones(3, 4), torch.ones(5, 3)), "same candidates"),
        (lambda: correct_hubs(torch.ones(3, 4), torch.ones(5, 4)), "10 neighbours"),
        (lambda: combine_similarities([torch.ones(3, 3)], []), "1 similarities came with 0"),
        (
            lambda: combine_similarities([torch.ones(3, 3)], [torch.ones(3, 3)]),
            "same for all held-out pairs",
        ),
        (lambda: rank_by_similarity(torch.ones(3, 4)), "cannot be ranked"),
        (lambda: compute_centred_cosine(brains, predicted, mean[:3]), "8 and 3 features"),
    ]
    for call, message in cases:
        with pytest.raises(PerceptError, match=message):
            call()
