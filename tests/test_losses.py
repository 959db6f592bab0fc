"""The losses: against the published system's values, and against formulas written out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.losses import (
    cosine_anneal,
    cosine_similarity,
    l2_normalize,
    mixco,
    mixco_nce,
    sobel_loss,
    soft_clip_loss,
    soft_cont_loss,
)
from src.utils import PerceptError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "mindeye" / "losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _mix(arrays):
    return arrays["perm"], arrays["betas"], arrays["select"]


def _vectors(n=9, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, dim, generator=generator), dim=-1) for _ in range(3)]


# ------------------------------------------------------------------------------------ as published
def test_mixco_draws_what_the_published_code_draws(arrays):
    before = arrays["voxels_in"].clone()
    torch.manual_seed(123)
    mixed, perm, betas, select = mixco(arrays["voxels_in"])
    torch.testing.assert_close(mixed, arrays["voxels_mixed"], **CLOSE)
    torch.testing.assert_close(betas, arrays["betas"], **CLOSE)
    assert torch.equal(perm, arrays["perm"]) and torch.equal(select, arrays["select"])
    assert torch.equal(arrays["voxels_in"], before)


@pytest.mark.parametrize("temp", [0.006, 0.1])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_mixco_nce_is_the_published_loss(arrays, temp, bidirectional):
    preds, targs, way = arrays["preds"], arrays["targs"], "bi" if bidirectional else "uni"
    mixed = mixco_nce(preds, targs, temp, *_mix(arrays), bidirectional=bidirectional, faithful=True)
    plain = mixco_nce(preds, targs, temp, bidirectional=bidirectional)
    torch.testing.assert_close(mixed, arrays[f"mixco_nce_{way}_T{temp}"], **CLOSE)
    torch.testing.assert_close(plain, arrays[f"nce_{way}_nomix_T{temp}"], **CLOSE)


@pytest.mark.parametrize("temp", [0.004, 0.0075, 0.125])
def test_soft_clip_is_the_published_loss(arrays, temp):
    torch.testing.assert_close(
        soft_clip_loss(arrays["preds"], arrays["targs"], temp),
        arrays[f"soft_clip_T{temp}"],
        **CLOSE,
    )


@pytest.mark.parametrize("temp", [0.075, 0.125])
def test_soft_cont_is_the_published_loss(arrays, temp):
    loss = soft_cont_loss(arrays["preds"], arrays["targs"], arrays["targs_aug"], temp)
    torch.testing.assert_close(loss, arrays[f"soft_cont_T{temp}"], **CLOSE)


def test_gradients_are_the_published_ones(arrays):
    losses = {
        "grad_preds_mixco_bi_T0.006": lambda preds: mixco_nce(
            preds, arrays["targs"], 0.006, *_mix(arrays), faithful=True
        ),
        "grad_preds_soft_clip_T0.004": lambda preds: soft_clip_loss(preds, arrays["targs"], 0.004),
    }
    for name, loss in losses.items():
        preds = arrays["preds"].clone().requires_grad_()
        loss(preds).backward()
        torch.testing.assert_close(preds.grad, arrays[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mixed_precision_does_not_touch_the_losses(dtype):
    preds, targs, augmented = (x.to(dtype) for x in _vectors(16))
    wide = [x if dtype == torch.float64 else x.float() for x in (preds, targs, augmented)]
    for loss in (
        lambda p, t, a: mixco_nce(l2_normalize(p), l2_normalize(t), 0.006),
        lambda p, t, a: soft_clip_loss(preds=l2_normalize(p), targs=l2_normalize(t), temp=0.004),
        lambda p, t, a: soft_cont_loss(
            l2_normalize(p), l2_normalize(t), l2_normalize(a), temp=0.075
        ),
        lambda p, t, a: cosine_similarity(l2_normalize(p), l2_normalize(t)).sum(),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(preds, targs, augmented)
        expected = loss(*wide)
        assert value.dtype == expected.dtype == wide[0].dtype and torch.equal(value, expected)


@pytest.mark.parametrize("epochs, mixup_pct", [(240, 0.33), (60, 0.5)])
def test_temperatures_are_the_published_schedule(arrays, epochs, mixup_pct):
    expected = arrays[f"soft_loss_temps_{epochs}_mix{mixup_pct}"].double()
    schedule = cosine_anneal(0.004, 0.0075, epochs - int(mixup_pct * epochs))
    torch.testing.assert_close(
        torch.tensor(schedule, dtype=torch.float64), expected, rtol=1e-5, atol=1e-8
    )


# ------------------------------------------------------------------------------- by other formulas
def test_mixco_leaves_its_input_and_mixes_the_selected_rows():
    torch.manual_seed(3)
    voxels = torch.randn(40, 2, 5)
    before = voxels.clone()
    mixed, perm, betas, select = mixco(voxels)
    assert torch.equal(voxels, before)
    assert 0 < select.sum() < 40 and (betas[~select] == 1).all()
    for i in range(40):
        expected = (
            betas[i] * voxels[i] + (1 - betas[i]) * voxels[perm[i]] if select[i] else voxels[i]
        )
        torch.testing.assert_close(mixed[i], expected)


def test_labels_sum_to_one_where_a_sample_is_its_own_partner():
    preds, targs, _ = _vectors(4)
    perm = torch.tensor([0, 2, 1, 3])
    betas = torch.tensor([0.3, 0.8, 0.6, 1.0])
    labels = torch.tensor([[1, 0, 0, 0], [0, 0.8, 0.2, 0], [0, 0.4, 0.6, 0], [0, 0, 0, 1.0]])
    faithful = torch.tensor([[0.7, 0, 0, 0], [0, 0.8, 0.2, 0], [0, 0.4, 0.6, 0], [0, 0, 0, 0.0]])
    for flag, expected_labels in ((False, labels), (True, faithful)):
        logits = preds @ targs.T / 0.2
        expected = (
            sum(
                -(expected_labels * (logits - logits.logsumexp(axis, keepdim=True))).sum() / 4
                for axis in (0, 1)
            )
            / 2
        )
        torch.testing.assert_close(
            mixco_nce(preds, targs, 0.2, perm, betas, faithful=flag), expected
        )


def test_without_fixed_points_faithful_and_ours_agree():
    preds, targs, _ = _vectors(6)
    perm, betas = torch.arange(6).roll(1), torch.rand(6)
    corrected, published = (
        mixco_nce(preds, targs, 0.1, perm, betas, faithful=flag) for flag in (False, True)
    )
    torch.testing.assert_close(corrected, published)


def test_plain_nce_is_cross_entropy():
    preds, targs, _ = _vectors()
    logits, right = preds @ targs.T / 0.1, torch.arange(len(preds))
    torch.testing.assert_close(
        mixco_nce(preds, targs, bidirectional=False), F.cross_entropy(logits, right)
    )
    torch.testing.assert_close(
        mixco_nce(preds, targs),
        (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2,
    )


def test_soft_losses_are_cross_entropies_with_soft_labels():
    student, teacher, augmented = _vectors()
    among = torch.softmax(teacher @ teacher.T / 0.2, -1)
    expected = (
        F.cross_entropy(student @ teacher.T / 0.2, among)
        + F.cross_entropy(teacher @ student.T / 0.2, among)
    ) / 2
    torch.testing.assert_close(soft_clip_loss(student, teacher, 0.2), expected)
    rows, columns = (
        torch.softmax(teacher @ augmented.T / 0.2, -1),
        torch.softmax(augmented @ teacher.T / 0.2, -1),
    )
    expected = (
        F.cross_entropy(student @ augmented.T / 0.2, rows)
        + F.cross_entropy(augmented @ student.T / 0.2, columns)
    ) / 2
    torch.testing.assert_close(soft_cont_loss(student, teacher, augmented, 0.2), expected)


def test_soft_clip_is_least_at_the_targets():
    _, targs, _ = _vectors()
    targs.requires_grad_()
    preds = targs.detach().clone().requires_grad_()
    loss = soft_clip_loss(preds, targs.detach(), 0.1)
    loss.backward()
    assert (
        soft_clip_loss(
            F.normalize(preds + 0.1 * torch.randn(preds.shape), dim=-1), targs.detach(), 0.1
        )
        > loss
    )
    torch.testing.assert_close(preds.grad, torch.zeros_like(preds), rtol=0, atol=1e-5)


def test_cosine_anneal_runs_from_start_to_end():
    values = cosine_anneal(1.0, 3.0, 5)
    assert values == pytest.approx([2 - math.cos(math.pi * k / 4) for k in range(5)])
    assert cosine_anneal(1.0, 3.0, 1) == [1.0] and cosine_anneal(1.0, 3.0, 0) == []


def test_unit_flattens_and_normalises():
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(
        l2_normalize(x), x.reshape(3, 20) / x.reshape(3, 20).pow(2).sum(1, keepdim=True).sqrt()
    )


def test_half_of_the_mix_is_refused():
    preds, targs, _ = _vectors()
    with pytest.raises(PerceptError, match="both perm and betas"):
        mixco_nce(preds, targs, perm=torch.arange(len(preds)))


def test_sobel_loss_compares_edges_only():
    g = torch.Generator().manual_seed(0)
    flat = torch.rand(2, 3, 1, 1, generator=g).expand(2, 3, 16, 16)
    assert sobel_loss(flat, torch.zeros(2, 3, 16, 16)) < 1e-2  # brightness alone makes no edge
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1.0
    # a step of one: Sobel's kernel over 8 gives half a step in each of the two columns beside it
    assert sobel_loss(step, torch.zeros_like(step)).item() == pytest.approx(2 * 0.5 / 16, abs=2e-3)
    assert sobel_loss(step, step) < 1e-6
    speck = torch.zeros(1, 3, 16, 16)
    speck[..., 4, 4] = 1.0
    assert (
        sobel_loss(torch.zeros_like(speck), speck) < 2e-3
    )  # the median takes single points out of the target
