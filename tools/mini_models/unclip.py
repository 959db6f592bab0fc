"""unCLIP: MindEye2's decoder, from patch tokens instead of all projected tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from src import miniworld, pretrained
from src.pretrained import prepare_classifier_input, unclip
from src.pretrained.base import locate_model

from . import data
from .category_classifier import build_classifier, compute_accuracy
from .data import (
    draw_indices,
    load_descriptions,
    load_images,
    normalize_for_clip,
    split_images,
    to_pixels,
)
from .degradation import NoisyTokenEstimator, draw_log_uniform
from .diffusion import N_JUDGED
from .flows import (
    CONDITION_MAPS,
    LATENT_SIDE,
    SCHEDULE,
    build_unet,
    compute_condition_scale,
    draw_timesteps,
    fold_scale,
)
from .golden import write_golden_features
from .training import Options, load_averaged, train

VECTOR_SIZE = 64  # four numbers, size and crop, of 16 each: 1024 in the real network

# log10 of the variance of the noise on tokens, as a share of theirs, as in the stage `robust`.
TOKEN_NOISE = (-0.5, 1.85)


def build_unclip() -> UNet2DConditionModel:
    """The image flow's network with a vector beside its tokens, SDXL's size and crop."""
    return build_unet(
        class_embed_type="projection", projection_class_embeddings_input_dim=VECTOR_SIZE
    )


def build_unclip_scheduler() -> EulerDiscreteScheduler:
    """The schedule of the other flows, with the noise predicted by way of v."""
    return EulerDiscreteScheduler(**{key: SCHEDULE[key] for key in unclip.SCHEDULER})


def build_unclip_vector() -> Tensor:
    """The vector of an image that is as large as it was painted, with nothing cut off."""
    return unclip.embed_size_and_crop((miniworld.IMAGE_SIZE,) * 2, (0, 0), VECTOR_SIZE)


@torch.no_grad()
def begin_as_image_flow(unet: UNet2DConditionModel, factor: float) -> None:
    """Begin with the shipped image flow.

    CLIP's projection and the mean norm of its class token are folded into the maps that read the
    tokens.

    Args:
        unet: whose weights are set.
        factor: of the tokens, see `compute_condition_scale`.
    """
    image_flow = pretrained.VersatileDiffusion("mini").unet.state_dict()
    clip = pretrained.Clipper("mini", norm_embs=False)
    class_tokens = clip.embed_image(to_pixels(load_images("check"))[:250])[:, 0]
    norm = class_tokens.norm(dim=-1).mean()
    change = clip.model.model.visual_projection.weight / norm / factor  # (projected, hidden)
    weights = {}
    for name, value in image_flow.items():
        weights[name] = value @ change if name.endswith(CONDITION_MAPS) else value
    nn.init.zeros_(unet.class_embedding.linear_2.weight)  # at first the vector says nothing
    nn.init.zeros_(unet.class_embedding.linear_2.bias)
    for name, value in unet.state_dict().items():
        if name.startswith("class_embedding."):
            weights[name] = value
    unet.load_state_dict(weights)


@torch.no_grad()
def load_patch_tokens(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What the decoder learns from, of the shipped models; computed once.

    Returns:
        Scaled latents (images, 4, height, width), and patch tokens before CLIP's projection
        (images, tokens, dim).
    """
    path = data.WORK / f"cache_unclip_{name}.npz"
    if not path.exists():
        vae = pretrained.LatentAutoencoder("mini")
        vision = pretrained.Clipper("mini").model.model.vision_model
        latents, tokens = [], []
        for part in split_images(load_images(name), 250):
            x = to_pixels(part)
            latents.append(vae.encode(x).half().numpy())
            hidden = vision(pixel_values=normalize_for_clip(x)).last_hidden_state
            tokens.append(vision.post_layernorm(hidden[:, 1:]).half().numpy())
        np.savez(path, latents=np.concatenate(latents), tokens=np.concatenate(tokens))
    stored = np.load(path)
    return stored["latents"], stored["tokens"]


def sample_images(unet: nn.Module, tokens: Tensor, factor: float, steps: int = 10) -> Tensor:
    """Images (batch, 3, 32, 32) from tokens, sampled as `src.pretrained.unclip` does.

    The noise is always the same.

    Args:
        unet: the network.
        tokens: (batch, tokens, dim).
        factor: by which the network's tokens are multiplied.
        steps: of Euler's method.
    """
    generator = torch.Generator().manual_seed(3)
    shape = (len(tokens), 4, LATENT_SIDE, LATENT_SIDE)
    noise = torch.randn(shape, generator=generator)
    null = torch.randn(tokens.shape, generator=generator)
    scheduler = build_unclip_scheduler()
    scheduler.set_timesteps(timesteps=unclip.compute_euler_timesteps(steps))
    start = noise * (1 + scheduler.sigmas[0] ** 2).sqrt()
    conditions = (tokens * factor, null * factor, build_unclip_vector())
    latents = unclip.denoise(unet, scheduler, start, *conditions)
    return pretrained.LatentAutoencoder("mini").decode(latents)


class UnclipTraining:
    """The training of the decoder on cached latents and patch tokens.

    Args:
        options: of the command.
    """

    def __init__(self, options: Options):
        self.bf16 = options.bf16
        self.latents, self.tokens = load_patch_tokens("train")
        self.check_latents, self.check_tokens = (
            torch.from_numpy(values).float() for values in load_patch_tokens("check")
        )
        self.factor = compute_condition_scale(self.tokens)
        self.unet = build_unclip()
        self.estimate = NoisyTokenEstimator(self.tokens)
        self.alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.vector = build_unclip_vector()
        begin_as_image_flow(self.unet, self.factor)
        self.classifier = build_classifier()
        self.labels = torch.from_numpy(load_descriptions("check")[1][: N_JUDGED // 2])
        shipped = pretrained.CategoryClassifier("mini").model
        self.classifier.load_state_dict(shipped.state_dict())
        self.classifier.eval()

    def compute_errors(self, x0: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """Squared error (batch,) of v, of latents and tokens at timesteps t."""
        noise = torch.randn_like(x0)
        a = self.alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
        conditions = {
            "encoder_hidden_states": c * self.factor,
            "class_labels": self.vector.expand(len(x), -1),
        }
        predicted = self.unet(x, t, **conditions).sample.float()
        return (predicted - target).square().mean((1, 2, 3))

    def compute_loss(self, rng: np.random.Generator, batch_size: int) -> Tensor:
        """Loss of a random batch.

        A fifth of the tokens are as they are, half as a regression gives them, the others as a
        diffusion prior samples them.
        """
        index = draw_indices(rng, len(self.latents), batch_size)
        x0 = torch.from_numpy(self.latents[index]).float()
        c = torch.from_numpy(self.tokens[index]).float()
        noise = c.var() * draw_log_uniform(batch_size, TOKEN_NOISE)
        way = torch.rand(batch_size, 1, 1)
        guessed, sampled = self.estimate(c, noise), self.estimate(c, noise, sample=True)
        c = torch.where(way < 0.2, c, torch.where(way < 0.7, guessed, sampled))
        dropped = torch.rand(batch_size, 1, 1) < 0.1
        c = torch.where(dropped, torch.randn_like(c), c)  # noise stands for "no condition"
        return self.compute_errors(x0, c, draw_timesteps(batch_size)).mean()

    def evaluate(self, model: nn.Module) -> dict:
        """Error on held-out images, and what the classifier sees on images made from tokens."""
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)
        with torch.random.fork_rng(), autocast:
            torch.manual_seed(1)
            t = torch.linspace(1, 998, len(self.check_latents)).long()
            error = self.compute_errors(self.check_latents, self.check_tokens, t)
            c = self.check_tokens[: len(self.labels)]
            noise = torch.full((len(c),), 4.0)  # R2 .71 of the guess, .43 of a sample
            tokens = {
                "": c,
                "from_vague_tokens": self.estimate(c, noise),
                "from_sampled_tokens": self.estimate(c, noise, sample=True),
            }
            shares = {name: self.judge(model, value) for name, value in tokens.items()}
        scores: dict = {
            "held_out": round(float(error.mean()), 4),
            "held_out_high_noise": round(float(error[t > 800].mean()), 4),
        }
        return scores | shares.pop("") | shares

    def judge(self, model: nn.Module, tokens: Tensor) -> dict[str, float]:
        """Accuracy of the classifier on images made from tokens (batch, tokens, dim)."""
        images = sample_images(model, tokens, self.factor)
        logits = self.classifier(prepare_classifier_input(images)).logits
        return compute_accuracy(logits, self.labels)


def train_unclip(options: Options, rank: int = 0) -> None:
    """Train from patch tokens: true ones, vague ones and samples of what these leave open."""
    decoder = UnclipTraining(options)
    train(
        "unclip",
        decoder.unet,
        decoder.compute_loss,
        decoder.evaluate,
        options,
        lr=options.lr,
        batch_size=options.batch,
        rank=rank,
    )


def export_unclip() -> None:
    """Write the decoder as `unclip.UnclipDecoder` reads it; its VAE is that of the other flows."""
    folder = data.OUT / "unclip"
    factor = compute_condition_scale(load_patch_tokens("train")[1])
    unet = fold_scale(load_averaged("unclip", build_unclip()), factor).half()
    unet.save_pretrained(folder / "unet")
    vae = Path(locate_model("versatile_diffusion", "mini")) / "vae"
    shutil.copytree(vae, folder / "vae", dirs_exist_ok=True)
    build_unclip_scheduler().save_pretrained(folder / "scheduler")
    write_golden_features("unclip", [unclip.UnclipDecoder(str(data.OUT))])
