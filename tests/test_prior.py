"""The diffusion prior: schedule, loss, order of the random draws, and both samplers, against what
the published system computes.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from src.networks.encoders import BrainNetwork
from src.networks.priors import Denoiser, DiffusionPriorNetwork, VersatileDiffusionPriorNetwork
from src.prior import BrainDiffusionPrior, noise_schedule
from src.utils import PerceptError, load_strictly

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BATCH, TOKENS, DIM = 3, 5, 16


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "mindeye" / "tiny_prior_T10.npz") as file:
        return {
            name: torch.from_numpy(file[name]) for name in file.files if name != "prior_state_keys"
        }


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _golden_prior(golden, drop=0.2):
    net = VersatileDiffusionPriorNetwork(dim=DIM, depth=2, dim_head=8, heads=2, num_tokens=TOKENS)
    with np.load(golden / "mindeye" / "tiny_vd_prior_net_pos_emb.npz") as file:
        load_strictly(
            net,
            {k[3:]: torch.from_numpy(file[k]) for k in file.files if k.startswith("sd/")},
            "golden",
        )
    return BrainDiffusionPrior(net, image_embed_dim=DIM, timesteps=10, cond_drop_prob=drop).eval()


def _tiny(timesteps=6, drop=0.2, **kwargs):
    net = VersatileDiffusionPriorNetwork(dim=DIM, depth=1, dim_head=8, heads=2, num_tokens=TOKENS)
    return BrainDiffusionPrior(
        net, image_embed_dim=DIM, timesteps=timesteps, cond_drop_prob=drop, **kwargs
    )


# ------------------------------------------------------------------------------------ as published
@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_schedule_is_the_published_one(golden, timesteps):
    buffers = noise_schedule(timesteps)
    with np.load(golden / "mindeye" / "noise_schedule.npz") as file:
        expected = {
            k.split("/")[1]: torch.from_numpy(file[k])
            for k in file.files
            if k.startswith(f"T{timesteps}/")
        }
    assert set(buffers) == set(expected) and len(buffers) == 13
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_state_keys_are_the_published_ones(golden):
    with np.load(golden / "mindeye" / "tiny_prior_T10.npz") as file:
        expected = file["prior_state_keys"].tolist()
    assert list(_golden_prior(golden).state_dict()) == expected


def test_losses_are_the_published_ones(golden, arrays):
    prior = _golden_prior(golden, drop=0.0)
    assert prior.image_embed_scale == arrays["image_embed_scale"]
    scaled = arrays["target"] * prior.image_embed_scale
    loss, pred = prior.p_losses(scaled, arrays["timesteps"], arrays["text_embed"], arrays["noise"])
    torch.testing.assert_close(loss, arrays["loss_nodrop"], **CLOSE)
    torch.testing.assert_close(pred, arrays["pred_nodrop"], **CLOSE)
    prior.cond_drop_prob = 0.2
    torch.manual_seed(71)
    loss, pred = prior.p_losses(scaled, arrays["timesteps"], arrays["text_embed"], arrays["noise"])
    torch.testing.assert_close(loss, arrays["loss_drop_seed71"], **CLOSE)
    torch.testing.assert_close(pred, arrays["pred_drop_seed71"], **CLOSE)


def test_forward_draws_in_the_published_order(golden, arrays):
    prior, target = _golden_prior(golden), arrays["target"].clone()
    torch.manual_seed(71)
    loss, pred = prior(text_embed=arrays["text_embed"], image_embed=target)
    torch.testing.assert_close(loss, arrays["forward_seed71_loss"], **CLOSE)
    torch.testing.assert_close(pred, arrays["forward_seed71_pred"], **CLOSE)
    assert torch.equal(target, arrays["target"])


def test_ancestral_sample_is_the_published_one(golden, arrays):
    generator = torch.Generator().manual_seed(42)
    draws = torch.stack([torch.randn(BATCH, TOKENS, DIM, generator=generator) for _ in range(11)])
    torch.testing.assert_close(draws, arrays["sample_noise_draws"])
    generator.manual_seed(42)
    samples = _golden_prior(golden).sample(arrays["text_embed"], generator=generator)
    # Ten steps of this network, whose gains are random, blow rounding up: the published array is
    # 3e-4 from the same sample in double precision, and one
    # processor's matrix products as far from another's. A wrong step, or draws in another order,
    # are off by the size of the tokens.
    torch.testing.assert_close(samples, arrays["sample_gen42"], rtol=0, atol=1e-3)


def test_ddim_sample_is_the_published_one_with_and_without_a_generator(golden, arrays):
    prior, expected = _golden_prior(golden), arrays["ddim_half_steps_seed77"]
    torch.manual_seed(77)
    torch.testing.assert_close(prior.sample(arrays["text_embed"], timesteps=5), expected, **CLOSE)
    generator = torch.Generator().manual_seed(77)
    torch.testing.assert_close(
        prior.sample(arrays["text_embed"], timesteps=5, generator=generator), expected, **CLOSE
    )


# ------------------------------------------------------------------------------- by other formulas
def test_schedule_follows_its_formulas():
    total, buffers = 20, noise_schedule(20)
    angles = [(u / total + 0.008) / 1.008 * math.pi / 2 for u in range(total + 1)]
    level = [math.cos(angle) ** 2 for angle in angles]
    bar, previous = 1.0, 1.0
    for t in range(total):
        beta = min(max(1 - level[t + 1] / level[t], 0), 0.999)
        previous, bar = bar, bar * (1 - beta)
        assert buffers["betas"][t].item() == pytest.approx(beta, rel=1e-5)
        assert buffers["alphas_cumprod"][t].item() == pytest.approx(bar, rel=1e-4)
        posterior = beta * (1 - previous) / (1 - bar)
        assert buffers["posterior_variance"][t].item() == pytest.approx(posterior, rel=1e-4)
        # the posterior's mean, of x0 = x_t = 1 without noise, is the level before: c1 + c2
        # sqrt(abar_t) = sqrt(abar_{t-1})
        mean = buffers["posterior_mean_coef1"][t] + buffers["posterior_mean_coef2"][t] * math.sqrt(
            bar
        )
        assert mean.item() == pytest.approx(math.sqrt(previous), rel=1e-4)


class _Oracle(Denoiser):
    """Knows the clean tokens whatever it is given."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.calls = clean, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        image_embed,
        timesteps,
        brain_embed=None,
        brain_cond_drop_prob=0.0,
        image_cond_drop_prob=0.0,
    ):
        self.calls += 1
        return self.clean + 0 * self.weight

    def cache_positions(self):
        return torch.no_grad()


@pytest.mark.parametrize("steps, calls", [(20, 20), (0, 20), (7, 6), (2, 1)])
def test_samplers_reach_the_tokens_that_an_oracle_knows(steps, calls):
    clean = torch.randn(BATCH, TOKENS, DIM)
    oracle = _Oracle(clean * 4)
    samples = BrainDiffusionPrior(oracle, image_embed_dim=DIM, timesteps=20).sample(
        clean, timesteps=steps
    )
    torch.testing.assert_close(samples, clean, rtol=1e-4, atol=1e-4)
    assert oracle.calls == calls


def test_ancestral_steps_follow_the_published_recursion():
    prior = _tiny(timesteps=4).eval()
    condition, generator = torch.randn(BATCH, TOKENS, DIM), torch.Generator().manual_seed(1)
    samples = prior.sample(condition, generator=generator)
    generator.manual_seed(1)
    b, x = noise_schedule(4), torch.randn(BATCH, TOKENS, DIM, generator=generator)
    for t in reversed(range(4)):
        with torch.no_grad():
            x0 = prior.net(x, torch.full((BATCH,), t), condition)
        noise = torch.randn(BATCH, TOKENS, DIM, generator=generator)
        sigma = b["posterior_variance"][t].sqrt() if t else 0.0
        x = b["posterior_mean_coef1"][t] * x0 + b["posterior_mean_coef2"][t] * x + sigma * noise
    torch.testing.assert_close(samples, x / prior.image_embed_scale, **CLOSE)


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone():
    prior, condition = _tiny().eval(), torch.randn(2, TOKENS, DIM)
    for steps in (None, 4):
        state = torch.get_rng_state()
        one, two, other = (
            prior.sample(condition, steps, generator=torch.Generator().manual_seed(s))
            for s in (5, 5, 6)
        )
        assert torch.equal(one, two) and not torch.allclose(one, other)
        assert torch.equal(torch.get_rng_state(), state)


def test_sampling_sees_weights_that_changed_since_the_last_sample():
    prior, condition = _tiny().eval(), torch.randn(2, TOKENS, DIM)
    before = prior.sample(condition, generator=torch.Generator().manual_seed(5))
    table = prior.net.causal_transformer.rel_pos_bias.relative_attention_bias.weight
    table.data = torch.randn_like(table) * 5
    after = prior.sample(condition, generator=torch.Generator().manual_seed(5))
    assert not torch.allclose(before, after)
    assert not prior.net.causal_transformer._positions


def test_guidance_extrapolates_from_the_unconditional_prediction():
    prior = _tiny().eval()
    x = torch.randn(2, TOKENS, DIM)
    t = torch.tensor([1, 4])
    c = torch.randn(2, TOKENS, DIM)
    conditional, null = (
        prior.net(x, t, c),
        prior.net(x, t, c, brain_cond_drop_prob=1.0, image_cond_drop_prob=1.0),
    )
    torch.testing.assert_close(
        prior.net.forward_with_cond_scale(x, t, c, cond_scale=3.0), null + 3 * (conditional - null)
    )
    torch.testing.assert_close(prior.net.forward_with_cond_scale(x, t, text_embed=c), conditional)
    one, three = (
        prior.sample(c, cond_scale=s, generator=torch.Generator().manual_seed(1))
        for s in (1.0, 3.0)
    )
    assert not torch.allclose(one, three)


def test_voxels_run_through_voxel2clip():
    voxel2clip = BrainNetwork(
        in_dim=11, out_dim=TOKENS * DIM, clip_size=DIM, h=8, n_blocks=1, projector_dim=8
    )
    prior = _tiny(voxel2clip=voxel2clip).eval()
    voxels, target = torch.randn(2, 11), torch.randn(2, TOKENS, DIM)
    torch.manual_seed(4)
    loss, pred = prior(voxel=voxels, image_embed=target)
    torch.manual_seed(4)
    other, _ = prior(text_embed=voxel2clip(voxels)[0].view(2, TOKENS, DIM), image_embed=target)
    assert loss == other and pred.shape == target.shape
    loss.backward()
    assert voxel2clip.lin1.weight.grad.abs().sum() > 0
    assert {key.split(".")[0] for key in prior.state_dict()} == {
        "noise_scheduler",
        "net",
        "voxel2clip",
    }


def test_the_1x768_network_fits_the_wrapper():
    net = DiffusionPriorNetwork(
        dim=DIM, depth=1, dim_head=8, heads=2, num_timesteps=4, max_text_len=3
    )
    prior = BrainDiffusionPrior(net, image_embed_dim=DIM, timesteps=4, cond_drop_prob=0.0)
    condition = torch.randn(2, DIM)
    loss, pred = prior(text_embed=condition, image_embed=torch.randn(2, DIM))
    assert loss.ndim == 0 and pred.shape == (2, DIM) and prior.sample(condition).shape == (2, DIM)


def test_the_prior_learns_to_use_its_condition():
    prior = _tiny(timesteps=10, drop=0.0)
    condition = torch.randn(64, TOKENS, DIM)
    target = torch.nn.functional.normalize(condition, dim=-1)
    optimiser = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(200):
        loss, _ = prior(text_embed=condition, image_embed=target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    generator = torch.Generator().manual_seed(0)
    right = (prior.sample(condition, generator=generator) - target).square().mean()
    of_others = prior.sample(condition.roll(1, 0), generator=generator)
    shuffled = (of_others - target).square().mean()
    assert right < 0.7 * shuffled


# ---------------------------------------------------------------------------------------- refusals
def test_refusals():
    prior, x = _tiny(), torch.randn(2, TOKENS, DIM)
    for bad_options in (
        {"image_embed": x},
        {"text_embed": x},
        {"image_embed": x, "text_embed": x, "voxel": x},
    ):
        with pytest.raises(PerceptError, match="exactly one of"):
            prior(**bad_options)
    with pytest.raises(PerceptError, match="no voxel2clip"):
        prior(voxel=torch.randn(2, 11), image_embed=x)
    for steps in (1, 7, -2):
        with pytest.raises(PerceptError, match="noise levels"):
            prior.sample(x, timesteps=steps)


def test_generators_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(PerceptError, match="cannot share"):
        _tiny().sample(
            torch.randn(3, TOKENS, DIM), generator=[torch.Generator(), torch.Generator()]
        )


# ----------------------------------------------------------------- few steps, and draws from seeds
class _Gaussian(Denoiser):
    """The best prediction if clean tokens are normal with a known spread around the condition."""

    spread = 0.3

    def __init__(self, prior_levels):
        super().__init__()
        self.bar, self.calls = prior_levels, 0

    def forward(self, x, t, condition, brain_cond_drop_prob=0.0, image_cond_drop_prob=0.0):
        self.calls += 1
        bar = self.bar[t].view(-1, 1, 1)
        gain = bar.sqrt() * self.spread**2 / (bar * self.spread**2 + 1 - bar)
        return condition + gain * (x - bar.sqrt() * condition)

    def cache_positions(self):
        return torch.no_grad()


def _exact(start, condition, bar, spread):
    """Where the probability-flow ODE ends that starts at `start`: its solution for a Gaussian, by
    ratio of standard deviations.
    """
    begin = (bar * spread**2 + 1 - bar).sqrt()
    return condition + (start - bar.sqrt() * condition) * spread / begin


def _gaussian_prior():
    levels = noise_schedule(100)["alphas_cumprod"]
    return (
        BrainDiffusionPrior(
            _Gaussian(levels), image_embed_dim=DIM, timesteps=100, image_embed_scale=1.0
        ),
        levels,
    )


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_dpm_solver_does_what_diffusers_does(steps):
    from diffusers import DPMSolverMultistepScheduler

    prior, _ = _gaussian_prior()
    betas = noise_schedule(100)["betas"]
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas.numpy(),
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
        num_train_timesteps=100,
    )
    scheduler.set_timesteps(steps)
    condition = torch.randn(BATCH, TOKENS, DIM)
    start = torch.randn(condition.shape, generator=torch.Generator().manual_seed(1))
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(prior.net(x, t.expand(BATCH), condition), t, x).prev_sample
    result = prior.sample(
        condition, timesteps=steps, generator=torch.Generator().manual_seed(1), solver="dpm++"
    )
    torch.testing.assert_close(result, x, rtol=1e-3, atol=1e-4)


def test_dpm_solver_comes_nearer_to_the_exact_solution_with_more_steps():
    prior, levels = _gaussian_prior()
    condition = torch.randn(BATCH, TOKENS, DIM)
    start = torch.randn(condition.shape, generator=torch.Generator().manual_seed(1))
    expected = _exact(start, condition, levels[-1], prior.net.spread)

    def error(steps):
        sampled = prior.sample(
            condition, timesteps=steps, generator=torch.Generator().manual_seed(1), solver="dpm++"
        )
        return float((sampled - expected).square().mean().sqrt())

    errors = [error(steps) for steps in (5, 10, 20, 50)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0] < 0.3
    prior.net.calls = 0
    error(10)
    assert prior.net.calls == 10


@pytest.mark.parametrize("steps", [0, 5, 6])
def test_dpm_solver_takes_every_number_of_steps(steps):
    prior = _tiny(timesteps=6).eval()
    assert prior.sample(torch.randn(2, TOKENS, DIM), steps, solver="dpm++").isfinite().all()


def test_an_unknown_solver_is_refused():
    with pytest.raises(PerceptError, match="no solver 'euler'"):
        _tiny().sample(torch.zeros(1, TOKENS, DIM), solver="euler")


def test_draws_from_seeds_do_not_depend_on_the_batch():
    prior = _tiny(drop=0.5)
    tokens, condition, seeds = (
        torch.randn(6, TOKENS, DIM),
        torch.randn(6, TOKENS, DIM),
        torch.tensor([3, 1, 4, 1, 5, 9]),
    )
    torch.manual_seed(1)
    full_batch = prior(text_embed=condition, image_embed=tokens, seeds=seeds)[1]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1)), (
        "torch's own generator is left alone"
    )
    halves = [
        prior(text_embed=condition[i], image_embed=tokens[i], seeds=seeds[i])[1]
        for i in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(full_batch, torch.cat(halves), rtol=1e-5, atol=1e-5)
    other = prior(text_embed=condition, image_embed=tokens, seeds=seeds + 100)[1]
    assert not torch.allclose(full_batch, other)


def test_draws_from_seeds_are_spread_as_they_should_be():
    prior = _tiny(timesteps=50, drop=0.3)
    draws = prior._draw_from_seeds(torch.zeros(4000, 2, 3), torch.arange(4000))
    assert abs(draws.noise.mean()) < 0.03 and abs(draws.noise.std() - 1) < 0.03
    assert (
        set(draws.times.tolist()) == set(range(50))
        and abs(draws.drop.float().mean(1) - 0.3).max() < 0.03
    )
    assert abs(np.corrcoef(draws.drop.numpy())[0, 1]) < 0.06
