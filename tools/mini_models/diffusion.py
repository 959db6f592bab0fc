"""Training of the flows: images, vague tokens, texts, one embedding, hidden states of texts."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from src.pretrained import prepare_classifier_input

from .autoencoder import build_vae
from .category_classifier import build_classifier, compute_accuracy
from .clip import load_trained_clip
from .data import draw_indices, get_device, load_descriptions
from .degradation import NoisyTokenEstimator, draw_log_uniform
from .flows import (
    CONDITION_MAPS,
    SCHEDULE,
    STARTING_FLOWS,
    build_null_condition,
    build_unet,
    compute_condition_scale,
    compute_text_tokens,
    draw_timesteps,
    load_flow_data,
    sample_latents,
)
from .training import Options, load_averaged, train

N_JUDGED = 128  # images that the classifier looks at when a stage logs its quality
ROBUST_NOISE = (-3.5, -1.0)  # log10 of the variance of the noise on the robust flow's tokens


def adapt_to_hidden_states(unet: nn.Module, factor: float) -> None:
    """Turn the text flow into a network that reads the hidden states behind its tokens.

    The text flow reads projected tokens; this is Stable Diffusion's start.

    Args:
        unet: the text flow.
        factor: scale of the hidden states, see `compute_condition_scale`.
    """
    clip = load_trained_clip()
    captions = [five[0] for five in load_descriptions("check")[0][:256]]
    projected = clip.text_projection(compute_text_tokens(clip, captions, "stable"))
    ratio = float(compute_text_tokens(clip, captions, "text").norm() / projected.norm())
    scale = compute_condition_scale(load_flow_data("text", "check").condition)
    change = clip.text_projection.weight * ratio * scale / factor  # (projected, hidden)
    for name, parameter in unet.named_parameters():
        if name.endswith(CONDITION_MAPS):
            parameter.data = parameter.data @ change.to(parameter.device)


def begin_with_other_flow(unet: nn.Module, stage: str, factor: float) -> None:
    """Load the weights of the flow that a stage begins with.

    Every flow shares the image flow's convolutions; its transformers begin as copies and are all
    that is trained.
    """
    load_averaged(STARTING_FLOWS[stage], unet).train()
    if stage == "stable":
        adapt_to_hidden_states(unet, factor)
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.requires_grad_(True)


class FlowTraining:
    """The training of one flow on cached latents and conditions.

    Args:
        stage: the diffusion stage.
        options: of the command.
    """

    def __init__(self, stage: str, options: Options):
        self.bf16 = options.bf16
        self.train_data = load_flow_data(stage, "train")
        self.scale = self.train_data.scale
        check_data = load_flow_data(stage, "check")
        self.check_latents, check_condition = (
            torch.from_numpy(values.astype(np.float32)).to(get_device())
            for values in (check_data.latents, check_data.condition)
        )
        has_captions = check_condition.ndim == 4  # the first caption of each image then
        self.check_condition = check_condition[:, 0] if has_captions else check_condition
        self.factor = compute_condition_scale(self.train_data.condition)
        self.unet = build_unet().to(get_device())
        if stage in STARTING_FLOWS:
            begin_with_other_flow(self.unet, stage, self.factor)
        self.null = build_null_condition(stage).to(get_device())
        self.vae = load_averaged("vae", build_vae()).to(get_device())
        self.classifier = load_averaged("judge", build_classifier()).to(get_device())
        self.labels = torch.from_numpy(load_descriptions("check")[1][:N_JUDGED])
        self.alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(get_device())
        self.estimate: NoisyTokenEstimator | None = None
        if stage == "robust":
            self.estimate = NoisyTokenEstimator(self.train_data.condition)

    def compute_loss(self, rng: np.random.Generator, batch_size: int) -> Tensor:
        """Squared error of v on a random batch."""
        latents, condition, scale = self.train_data
        index = draw_indices(rng, len(latents), batch_size)
        x0 = torch.from_numpy(latents[index].astype(np.float32)).to(get_device())
        x0 = x0 * scale
        if condition.ndim == 3:
            rows = condition[index]
        else:  # a random caption of each image
            rows = condition[index, rng.integers(condition.shape[1], size=batch_size)]
        c = torch.from_numpy(rows.astype(np.float32))
        if self.estimate is not None:  # of one in five images the tokens are left as they are
            unchanged = torch.rand(batch_size, 1, 1) < 0.2
            estimated = self.estimate(c, draw_log_uniform(batch_size, ROBUST_NOISE))
            c = torch.where(unchanged, c, estimated)
        c = c.to(get_device())
        dropped = torch.rand(batch_size, 1, 1, device=c.device) < 0.1
        c = torch.where(dropped, self.null, c)
        t = draw_timesteps(batch_size, c.device)
        prediction, target = self.predict(x0, c, t, torch.randn_like(x0))
        return F.mse_loss(prediction.float(), target)

    def predict(self, x0: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true v of latents under noise.

        Args:
            x0: latents (batch, 4, height, width).
            c: conditions (batch, tokens, dim).
            t: timesteps (batch,).
            noise: of the latents' shape.
        """
        a = self.alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        prediction = self.unet(noisy, t, encoder_hidden_states=c * self.factor).sample
        return prediction, a.sqrt() * noise - (1 - a).sqrt() * x0

    def autocast(self) -> AbstractContextManager:
        """The precision of training, for evaluation."""
        return torch.autocast(get_device().type, dtype=torch.bfloat16, enabled=self.bf16)

    def judge(self, latents: Tensor) -> dict[str, float]:
        """Accuracy of the classifier on the images of the first held-out conditions."""
        decoded = self.vae.decode(latents / self.scale).sample
        pixels = (decoded / 2 + 0.5).clamp(0, 1)
        logits = self.classifier(prepare_classifier_input(pixels)).logits
        return compute_accuracy(logits, self.labels)

    def sample(self, condition: Tensor) -> Tensor:
        """Latents sampled from conditions (batch, tokens, dim)."""
        factor = self.factor
        return sample_latents(self.unet, condition * factor, self.null * factor)

    def evaluate(self, model: nn.Module) -> dict:
        """Error on held-out images, and what the classifier sees on images made from them."""
        generator = torch.Generator().manual_seed(1)
        x0, c = self.check_latents * self.scale, self.check_condition
        t = torch.linspace(1, 998, len(x0)).long()
        t = t.to(get_device())
        noise = torch.randn(x0.shape, generator=generator).to(get_device())
        with self.autocast():
            prediction, target = self.predict(x0, c, t, noise)
            sampled = self.sample(c[:N_JUDGED])
        error = (prediction.float() - target) ** 2
        error = error.mean(dim=(1, 2, 3))
        scores: dict = {
            "held_out": round(float(error.mean()), 4),
            "held_out_high_noise": round(float(error[t > 800].mean()), 4),
        }
        if self.estimate is not None:
            with torch.random.fork_rng(), self.autocast():
                torch.manual_seed(2)
                noise_levels = torch.full((N_JUDGED,), 0.02)
                vague = self.estimate(c[:N_JUDGED].cpu(), noise_levels).to(c.device)
                sampled_from_vague = self.sample(vague)
            scores["from_vague_tokens"] = self.judge(sampled_from_vague)
        return scores | self.judge(sampled)


def train_flow(stage: str, options: Options, rank: int = 0) -> None:
    """Train the image flow, the text flow or the one-token network.

    Args:
        stage: the diffusion stage.
        options: of the command.
        rank: of this process.
    """
    torch.set_num_threads(options.threads)
    flow = FlowTraining(stage, options)
    train(
        stage,
        flow.unet,
        flow.compute_loss,
        flow.evaluate,
        options,
        lr=options.lr,
        batch_size=options.batch,
        rank=rank,
    )
