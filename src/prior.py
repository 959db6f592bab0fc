"""The diffusion prior: denoises CLIP tokens, given tokens that were predicted from the brain.

- The wrapper around a prior network (src/models.py): cosine noise schedule, prediction of x0, mean
  squared error, ancestral (DDPM) and DDIM sampling.
- State-dict keys are the published ones: noise_scheduler.*, net.*, voxel2clip.*; random numbers are
  drawn in the published order.
- Source: Ramesh et al. 2022 (arXiv 2204.06125), as MindEye uses it (section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.utils import PerceptError


def noise_schedule(timesteps: int) -> dict[str, Tensor]:
    """The 13 buffers (timesteps,) of a cosine schedule, computed in double precision and kept in
    single (Nichol & Dhariwal 2021).
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    levels = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    levels = levels / levels[0]
    betas = (1 - levels[1:] / levels[:-1]).clamp(0, 0.999)
    alphas = 1 - betas
    bar = alphas.cumprod(0)
    bar_prev = F.pad(bar[:-1], (1, 0), value=1.0)
    variance = betas * (1 - bar_prev) / (1 - bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": bar_prev,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * bar_prev.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - bar_prev) * alphas.sqrt() / (1 - bar),
        "p2_loss_weight": torch.ones_like(betas),
    }
    return {name: value.float() for name, value in buffers.items()}


class NoiseScheduler(nn.Module):
    """The buffers of `noise_schedule` and the two formulas that use them."""

    def __init__(self, timesteps: int):
        super().__init__()
        self.num_timesteps = timesteps
        self.alphas_cumprod: Tensor
        self.alphas_cumprod_prev: Tensor
        for name, value in noise_schedule(timesteps).items():
            self.register_buffer(name, value)

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Buffer `name` at timesteps t (batch,), shaped to multiply `like` (batch, ...)."""
        return getattr(self, name)[t].view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 (batch, tokens, dim) with the noise of timesteps t (batch,)."""
        return (
            self.at("sqrt_alphas_cumprod", t, x0) * x0
            + self.at("sqrt_one_minus_alphas_cumprod", t, x0) * noise
        )


Generators = torch.Generator | Sequence[torch.Generator] | None


def _randn(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal of the shape of `like`, drawn where the generator lives (so one seed gives
    the same numbers on any device).
    """
    if isinstance(generator, Sequence):
        if len(like) % len(generator):
            raise PerceptError(
                f"{len(generator)} generators cannot share {len(like)} samples evenly: pass one, or"
                " one for each group of samples."
            )
        return torch.cat(
            [
                _randn(part, one)
                for part, one in zip(like.chunk(len(generator)), generator, strict=True)
            ]
        )
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, device=device, dtype=like.dtype, generator=generator).to(
        like.device
    )


class BrainDiffusionPrior(nn.Module):
    """Diffusion prior from brain-predicted tokens to CLIP tokens.

    Args:
        net: prior network (`src.models.Denoiser`): predicts clean tokens from noisy ones, the
            timestep and the condition.
        voxel2clip: optional backbone that is kept, trained and saved with the prior.
        image_embed_dim: dim of a token.
        timesteps: noise levels T.
        cond_drop_prob: probability of dropping the brain condition, and independently the image
            condition, in training.
        image_embed_scale: factor on the tokens before noise is added; sqrt(dim) by default.
    """

    def __init__(
        self,
        net: nn.Module,
        voxel2clip: nn.Module | None = None,
        image_embed_dim: int = 768,
        timesteps: int = 100,
        cond_drop_prob: float = 0.2,
        image_embed_scale: float | None = None,
    ):
        super().__init__()
        self.noise_scheduler = NoiseScheduler(timesteps)
        self.net: Any = net
        self.voxel2clip = voxel2clip
        self.cond_drop_prob = cond_drop_prob
        self.image_embed_scale = (
            math.sqrt(image_embed_dim) if image_embed_scale is None else image_embed_scale
        )

    def p_losses(
        self,
        image_embed: Tensor,
        times: Tensor,
        text_embed: Tensor,
        noise: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the predicted tokens.

        Args:
            image_embed: scaled tokens (batch, tokens, dim) or (batch, dim).
            times: timesteps (batch,).
            text_embed: condition, same shape as image_embed.
            noise: standard normal, same shape; drawn if absent.
            drop: where the brain's and where the image's tokens give way to the learned null ones,
                Boolean (2, batch); drawn if absent.

        Returns:
            loss (scalar) and prediction of the scaled tokens (same shape as image_embed).
        """
        noise = torch.randn_like(image_embed) if noise is None else noise
        noisy = self.noise_scheduler.q_sample(image_embed, times, noise)
        brain, image = (self.cond_drop_prob, self.cond_drop_prob) if drop is None else drop
        pred = self.net(
            noisy, times, text_embed, brain_cond_drop_prob=brain, image_cond_drop_prob=image
        )
        return F.mse_loss(pred, image_embed), pred

    def _draws(self, like: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        """What `p_losses` needs, each sample's drawn from its own seed (batch,): timesteps, noise
        like `like`, and what to drop.
        """
        sources = [torch.Generator(like.device).manual_seed(seed) for seed in seeds.tolist()]
        total, device = self.noise_scheduler.num_timesteps, like.device
        times = torch.stack(
            [torch.randint(0, total, (), device=device, generator=g) for g in sources]
        )
        noise = torch.stack(
            [
                torch.randn(like.shape[1:], device=device, dtype=like.dtype, generator=g)
                for g in sources
            ]
        )
        drop = (
            torch.stack([torch.rand(2, device=device, generator=g) for g in sources], 1)
            < self.cond_drop_prob
        )  # (2, batch)
        return {"times": times, "noise": noise, "drop": drop}

    def forward(
        self,
        text_embed: Tensor | None = None,
        image_embed: Tensor | None = None,
        voxel: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and prediction for tokens (batch, tokens, dim) at random timesteps.

        Args:
            text_embed: condition from the brain, same shape as image_embed.
            image_embed: CLIP tokens, unscaled; left as they are.
            voxel: (batch, voxels) instead of text_embed, run through voxel2clip.
            seeds: (batch,) integers from which timestep, noise and dropped conditions of each
                sample are drawn, so that a loss does not depend on who else is in the batch, or in
                which process; without them torch's own generator is used, in the published order.

        Raises:
            PerceptError: if there is no target, or not exactly one condition.
        """
        if image_embed is None or (text_embed is None) == (voxel is None):
            raise PerceptError(
                "The prior needs image_embed and exactly one of text_embed and voxel: pass these"
                " two."
            )
        if voxel is not None:
            if self.voxel2clip is None:
                raise PerceptError(
                    "The prior was given voxels but has no voxel2clip: make it with one, or pass"
                    " text_embed."
                )
            out = self.voxel2clip(voxel)
            text_embed = (out[0] if isinstance(out, tuple) else out).view_as(image_embed)
        assert text_embed is not None
        scaled = image_embed * self.image_embed_scale
        if seeds is not None:
            return self.p_losses(scaled, text_embed=text_embed, **self._draws(scaled, seeds))
        times = torch.randint(
            0, self.noise_scheduler.num_timesteps, (len(image_embed),), device=image_embed.device
        )
        return self.p_losses(scaled, times, text_embed)

    @torch.no_grad()
    def sample(
        self,
        text_embed: Tensor,
        timesteps: int | None = None,
        cond_scale: float = 1.0,
        generator: Generators = None,
        solver: str = "published",
    ) -> Tensor:
        """Sample CLIP tokens.

        Args:
            text_embed: condition (batch, tokens, dim) or (batch, dim).
            timesteps: steps; None or 0: all T.
            cond_scale: classifier-free guidance.
            solver: key of SOLVERS. "published": ancestral sampling with all steps, DDIM with eta 1
                with fewer; "dpm++": DPM-Solver++(2M), for few steps, random in its start alone.
            generator: source of all random numbers, drawn on its own device (T + 1 draws of the
                condition's shape for ancestral sampling); of several, each draws for its share of
                the batch, in order, so that a sample does not depend on its neighbours.

        Returns:
            Tokens of the same shape, already divided by the scale.

        Raises:
            PerceptError: if there are not that many noise levels, or no such solver.

        Source: Ho et al. 2020, algorithm 2; Song et al. 2021, equation 12, with the levels that
        dalle2-pytorch pairs; Lu et al. 2022, arXiv 2211.01095, algorithm 2.
        """
        if solver not in SOLVERS:
            raise PerceptError(
                f"There is no solver '{solver}' for the prior: choose one of {', '.join(SOLVERS)}."
            )
        total = self.noise_scheduler.num_timesteps
        steps = timesteps or total
        if steps != total and not 2 <= steps < total:
            raise PerceptError(
                f"The prior has {total} noise levels and cannot be sampled in {steps} steps: choose"
                f" timesteps from 2 to {total}."
            )
        x = _randn(text_embed, generator)
        loop = SOLVERS[solver](self, steps)
        with self.net.cache_positions():
            return loop(x, text_embed, steps, cond_scale, generator) / self.image_embed_scale

    def _ddpm(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, generator: Generators
    ) -> Tensor:
        s = self.noise_scheduler
        for step in reversed(range(steps)):
            t = torch.full((len(x),), step, device=x.device)
            x0 = self.net.forward_with_cond_scale(x, t, condition, cond_scale=cond_scale)
            mean = s.at("posterior_mean_coef1", t, x) * x0 + s.at("posterior_mean_coef2", t, x) * x
            noise = _randn(x, generator)  # drawn in the last step too, as published
            x = (
                mean
                + (step > 0) * (0.5 * s.at("posterior_log_variance_clipped", t, x)).exp() * noise
            )
        return x

    def _ddim(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, generator: Generators
    ) -> Tensor:
        s, total = self.noise_scheduler, self.noise_scheduler.num_timesteps
        grid = [int(v) for v in torch.linspace(-1, total, steps + 1)[:-1]][::-1]
        x0 = x
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            alpha, alpha_next = s.alphas_cumprod_prev[now], s.alphas_cumprod_prev[then]
            t = torch.full((len(x),), now, device=x.device)
            x0 = self.net.forward_with_cond_scale(x, t, condition, cond_scale=cond_scale)
            noise_pred = (s.at("sqrt_recip_alphas_cumprod", t, x) * x - x0) / s.at(
                "sqrt_recipm1_alphas_cumprod", t, x
            )
            if then < 0:
                return x0
            sigma = ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
            noise = _randn(x, generator)
            x = (
                x0 * alpha_next.sqrt()
                + sigma * noise
                + (1 - alpha_next - sigma**2).sqrt() * noise_pred
            )
        return x0

    def _dpm(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, generator: Generators
    ) -> Tensor:
        bar = self.noise_scheduler.alphas_cumprod.double().cpu()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        snr = (alpha / sigma).log()
        grid = (
            torch.linspace(0, len(bar) - 1, steps + 1).round().long()[1:].flip(0)
        )  # from noise to the level next to clean
        before = x
        for i, now in enumerate(grid):
            x0 = self.net.forward_with_cond_scale(
                x, now.expand(len(x)).to(x.device), condition, cond_scale=cond_scale
            )
            if i == steps - 1:
                return x0
            then = grid[i + 1]
            width, slope = snr[then] - snr[now], x0
            if i:  # straight line through this prediction and the one before
                ratio = (snr[now] - snr[grid[i - 1]]) / width
                slope = x0 + float(1 / (2 * ratio)) * (x0 - before)
            x = (
                float(sigma[then] / sigma[now]) * x
                - float(alpha[then] * torch.expm1(-width)) * slope
            )
            before = x0
        return x


SOLVERS: dict[str, Callable[[BrainDiffusionPrior, int], Callable[..., Tensor]]] = {
    "published": lambda prior, steps: (
        prior._ddpm if steps == prior.noise_scheduler.num_timesteps else prior._ddim
    ),
    "dpm++": lambda prior, steps: prior._dpm,
}
