"""The diffusion prior: denoises CLIP tokens, given tokens that were predicted from the brain.

- `BrainDiffusionPrior` wraps a prior network (src/models.py): cosine noise schedule, prediction of
  x0, mean squared error, ancestral (DDPM), DDIM and DPM-Solver++ sampling.
- State-dict keys are the published ones: noise_scheduler.*, net.*, voxel2clip.*; random numbers are
  drawn in the published order.
- Source: Ramesh et al. 2022 (arXiv 2204.06125), as MindEye uses it (section 2.3).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.utils import PerceptError


def noise_schedule(timesteps: int) -> dict[str, Tensor]:
    """The 13 buffers (timesteps,) of a cosine schedule (Nichol & Dhariwal 2021).

    They are computed in double precision and returned in single.
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

    def gather(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Buffer `name` at timesteps t (batch,), in a shape that multiplies x (batch, ...)."""
        trailing = [1] * (x.ndim - 1)
        return getattr(self, name)[t].view(-1, *trailing)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 (batch, tokens, dim) with the noise of timesteps t (batch,)."""
        signal = self.gather("sqrt_alphas_cumprod", t, x0) * x0
        return signal + self.gather("sqrt_one_minus_alphas_cumprod", t, x0) * noise


Generators = torch.Generator | Sequence[torch.Generator] | None


class _NoiseSource:
    """Standard normal noise, one draw after the other, drawn on the generator's device and moved to
    where it is used: a seed gives the same numbers on every device.

    For a GPU, threads draw on the CPU what comes next while the GPU computes, from pinned memory.

    Args:
        x: of whose shape, dtype and device the noise is.
        generator: as `BrainDiffusionPrior.sample`.
        draws: how often noise will be drawn; no number beyond is taken from a generator.

    Raises:
        PerceptError: for generators that cannot share the batch evenly.
    """

    def __init__(self, x: Tensor, generator: Generators, draws: int):
        self.x, self.remaining = x, draws
        self.generators: Sequence[torch.Generator | None] = (
            list(generator) if isinstance(generator, Sequence) else [generator]
        )
        if len(x) % len(self.generators):
            raise PerceptError(
                f"{len(self.generators)} generators cannot share {len(x)} samples evenly: pass one,"
                " or one for each group of samples."
            )
        sources = [source for source in self.generators if source is not None]
        self.is_ahead = x.device.type == "cuda" and all(s.device.type == "cpu" for s in sources)
        self.is_ahead &= bool(sources)
        self._next: list[Future[None]] = []
        self._buffer: Tensor | None = None

    def draw(self) -> Tensor:
        """The next noise, of the shape of x."""
        self.remaining -= 1
        if not self.is_ahead:
            chunks = zip(self.x.chunk(len(self.generators)), self.generators, strict=True)
            return torch.cat([_randn_like(chunk, source) for chunk, source in chunks])
        if self._buffer is None:
            self._begin()
        noise = self._finish()
        if self.remaining > 0:
            self._begin()
        return noise

    def _begin(self) -> None:
        """Let the threads fill the next buffer, each part by its own generator."""
        self._buffer = torch.empty(self.x.shape, dtype=self.x.dtype, pin_memory=True)
        parts = zip(self._buffer.chunk(len(self.generators)), self.generators, strict=True)
        self._next = [
            _get_threads().submit(_fill_normal, part, generator_) for part, generator_ in parts
        ]

    def _finish(self) -> Tensor:
        assert self._buffer is not None
        for part in self._next:
            part.result()
        noise = self._buffer.to(self.x.device, non_blocking=True)
        self._buffer = None
        return noise


@cache
def _get_threads() -> ThreadPoolExecutor:
    """Threads that draw random numbers for a GPU, which is faster than one of them."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "noise")


def _fill_normal(part: Tensor, generator: torch.Generator | None) -> None:
    """Fill a contiguous part of a buffer with what `torch.randn` gives."""
    torch.randn(part.shape, dtype=part.dtype, generator=generator, out=part)


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal of the shape of x, drawn on the generator's device and moved to that of x."""
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, device=device, dtype=x.dtype, generator=generator)
    return noise.to(x.device)


@dataclass(frozen=True)
class _Draws:
    """What `p_losses` draws for each sample.

    Attributes:
        times: timesteps (batch,).
        noise: standard normal (batch, tokens, dim).
        drop: whether the brain's and the image's condition are dropped, Boolean (2, batch).
    """

    times: Tensor
    noise: Tensor
    drop: Tensor


class BrainDiffusionPrior(nn.Module):
    """Diffusion prior from brain-predicted tokens to CLIP tokens.

    Args:
        net: prior network (`src.models.Denoiser`): predicts clean tokens from noisy ones, the
            timestep and the condition.
        voxel2clip: optional backbone that is trained and saved with the prior.
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
        self.image_embed_dim = image_embed_dim
        if image_embed_scale is None:
            image_embed_scale = math.sqrt(image_embed_dim)
        self.image_embed_scale = image_embed_scale

    @property
    def config(self) -> dict[str, Any]:
        """How it was made, of which `src.networks.build_decoder` makes it again."""
        kwargs = {
            "image_embed_dim": self.image_embed_dim,
            "timesteps": self.noise_scheduler.num_timesteps,
            "cond_drop_prob": self.cond_drop_prob,
            "image_embed_scale": self.image_embed_scale,
        }
        return {
            "name": type(self).__name__,
            "kwargs": kwargs,
            "net": self.net.config,
            "voxel2clip": getattr(self.voxel2clip, "config", None),
        }

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
            drop: where the learned null tokens replace the brain's and the image's, Boolean
                (2, batch); drawn if absent.

        Returns:
            loss (scalar) and prediction of the scaled tokens (same shape as image_embed).
        """
        noise = torch.randn_like(image_embed) if noise is None else noise
        noisy = self.noise_scheduler.q_sample(image_embed, times, noise)
        drop_brain: float | Tensor = self.cond_drop_prob
        drop_image: float | Tensor = self.cond_drop_prob
        if drop is not None:
            drop_brain, drop_image = drop
        pred = self.net(
            noisy,
            times,
            text_embed,
            brain_cond_drop_prob=drop_brain,
            image_cond_drop_prob=drop_image,
        )
        return F.mse_loss(pred, image_embed), pred

    def _draw_from_seeds(self, x: Tensor, seeds: Tensor) -> _Draws:
        """Timesteps, noise and dropped conditions of the samples x, each from its seed (batch,).

        They are drawn on the CPU, so that a seed gives the same numbers on every device.
        """
        is_pinned = x.device.type == "cuda"
        batch, total = len(x), self.noise_scheduler.num_timesteps
        noise = torch.empty(x.shape, dtype=x.dtype, pin_memory=is_pinned)
        times = torch.empty(batch, dtype=torch.long, pin_memory=is_pinned)
        drop = torch.empty(2, batch, dtype=torch.bool, pin_memory=is_pinned)

        def draw(row: int, seed: int) -> None:
            source = torch.Generator().manual_seed(seed)
            times[row] = torch.randint(0, total, (), generator=source)
            _fill_normal(noise[row], source)
            drop[:, row] = torch.rand(2, generator=source) < self.cond_drop_prob

        if is_pinned:
            list(_get_threads().map(draw, range(batch), seeds.tolist()))
        else:
            for row, seed in enumerate(seeds.tolist()):
                draw(row, seed)
        return _Draws(*(part.to(x.device, non_blocking=True) for part in (times, noise, drop)))

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
                sample are drawn, so that a loss depends neither on the other samples of the batch
                nor on the number of processes; without them torch's own generator is used, in the
                published order.

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
            output = self.voxel2clip(voxel)
            backbone = output[0] if isinstance(output, tuple) else output
            text_embed = backbone.view_as(image_embed)
        assert text_embed is not None
        scaled = image_embed * self.image_embed_scale
        if seeds is not None:
            draws = self._draw_from_seeds(scaled, seeds)
            return self.p_losses(scaled, draws.times, text_embed, draws.noise, draws.drop)
        total, batch = self.noise_scheduler.num_timesteps, len(image_embed)
        times = torch.randint(0, total, (batch,), device=image_embed.device)
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
            generator: source of all random numbers, drawn on its own device (T + 1 draws of the
                condition's shape for ancestral sampling). Of several, each draws for its share of
                the batch, in order, so that a sample does not depend on its neighbours.
            solver: key of SOLVERS. "published": ancestral sampling with all steps, DDIM with eta 1
                with fewer; "dpm++": DPM-Solver++(2M), for few steps, random in its start alone.

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
        denoise = SOLVERS[solver](self, steps)
        # of DPM-Solver++ the start alone; of DDIM neither at the last step nor at the one before
        draws = 1 if solver == "dpm++" else steps + (1 if steps == total else -1)
        source = _NoiseSource(text_embed, generator, draws)
        with self.net.cache_positions():
            tokens = denoise(source.draw(), text_embed, steps, cond_scale, source)
        return tokens / self.image_embed_scale

    def _predict_x0(self, x: Tensor, t: Tensor, condition: Tensor, cond_scale: float) -> Tensor:
        """Clean tokens, predicted from noisy ones x at timesteps t (batch,)."""
        return self.net.forward_with_cond_scale(x, t, condition, cond_scale=cond_scale)

    def _sample_ddpm(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, source: _NoiseSource
    ) -> Tensor:
        """Ancestral sampling: Ho et al. 2020, algorithm 2."""
        schedule = self.noise_scheduler
        for step in reversed(range(steps)):
            t = torch.full((len(x),), step, device=x.device)
            x0 = self._predict_x0(x, t, condition, cond_scale)
            x0_part = schedule.gather("posterior_mean_coef1", t, x) * x0
            mean = x0_part + schedule.gather("posterior_mean_coef2", t, x) * x
            noise = source.draw()  # drawn in the last step too, as published
            std = (0.5 * schedule.gather("posterior_log_variance_clipped", t, x)).exp()
            x = mean + std * noise if step > 0 else mean
        return x

    def _sample_ddim(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, source: _NoiseSource
    ) -> Tensor:
        """DDIM with eta 1: Song et al. 2021, equation 12."""
        schedule = self.noise_scheduler
        levels = torch.linspace(-1, schedule.num_timesteps, steps + 1)[:-1]
        grid = [int(level) for level in levels][::-1]
        x0 = x
        for step, next_step in zip(grid[:-1], grid[1:], strict=True):
            alpha = schedule.alphas_cumprod_prev[step]
            alpha_next = schedule.alphas_cumprod_prev[next_step]
            t = torch.full((len(x),), step, device=x.device)
            x0 = self._predict_x0(x, t, condition, cond_scale)
            scaled = schedule.gather("sqrt_recip_alphas_cumprod", t, x) * x
            noise_pred = (scaled - x0) / schedule.gather("sqrt_recipm1_alphas_cumprod", t, x)
            if next_step < 0:
                return x0
            sigma = ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
            noise = source.draw()
            direction = (1 - alpha_next - sigma**2).sqrt() * noise_pred
            x = x0 * alpha_next.sqrt() + sigma * noise + direction
        return x0

    def _sample_dpm(
        self, x: Tensor, condition: Tensor, steps: int, cond_scale: float, source: _NoiseSource
    ) -> Tensor:
        """DPM-Solver++(2M): Lu et al. 2022, arXiv 2211.01095, algorithm 2."""
        bar = self.noise_scheduler.alphas_cumprod.double().cpu()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        log_snr = (alpha / sigma).log()
        # from noise to the level next to clean, or with as many steps as levels to the cleanest
        first = int(steps < len(bar))
        grid = torch.linspace(0, len(bar) - 1, steps + first).round().long()[first:].flip(0)
        previous_x0 = x
        for i, step in enumerate(grid):
            t = torch.full((len(x),), int(step), device=x.device)
            x0 = self._predict_x0(x, t, condition, cond_scale)
            if i == steps - 1:
                return x0
            next_step = grid[i + 1]
            width = log_snr[next_step] - log_snr[step]
            slope = x0
            if i:  # straight line through this prediction and the previous one
                ratio = (log_snr[step] - log_snr[grid[i - 1]]) / width
                slope = x0 + float(1 / (2 * ratio)) * (x0 - previous_x0)
            shrinkage = float(sigma[next_step] / sigma[step])
            x = shrinkage * x - float(alpha[next_step] * torch.expm1(-width)) * slope
            previous_x0 = x0
        return x


def _choose_published_solver(prior: BrainDiffusionPrior, steps: int) -> Callable[..., Tensor]:
    """Ancestral sampling with all steps, DDIM with fewer."""
    if steps == prior.noise_scheduler.num_timesteps:
        return prior._sample_ddpm
    return prior._sample_ddim


# solver -> the loop that it runs for a prior and a number of steps
SOLVERS: dict[str, Callable[[BrainDiffusionPrior, int], Callable[..., Tensor]]] = {
    "published": _choose_published_solver,
    "dpm++": lambda prior, steps: prior._sample_dpm,
}
