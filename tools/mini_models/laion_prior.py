"""LAION's prior from text to image embeddings, from which the combined model starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import pretrained
from src.models import DiffusionPriorNetwork
from src.networks import FRESH_IN_LAION
from src.prior import BrainDiffusionPrior

from . import data
from .data import DIM, compute_share, get_device, load_descriptions, load_images, split_images
from .training import Options, load_averaged, train

PRIOR_CONFIG = {
    "dim": DIM,
    "depth": 2,
    "dim_head": 32,
    "heads": 4,
    "num_timesteps": 100,
    "max_text_len": 4,
}
EMBED_SCALE = 0.39  # brings the embeddings to unit variance, as theirs are


def build_laion_prior() -> BrainDiffusionPrior:
    """The prior alone.

    Its null text encodings are left out of the file, as LAION's has none, and so are drawn anew at
    every step.
    """
    prior = BrainDiffusionPrior(
        DiffusionPriorNetwork(**PRIOR_CONFIG),
        image_embed_dim=DIM,
        timesteps=PRIOR_CONFIG["num_timesteps"],
        cond_drop_prob=0.0,
        image_embed_scale=EMBED_SCALE,
    )
    for name in FRESH_IN_LAION:
        prior.get_parameter(name).requires_grad_(False)
    return prior


def load_embedding_pairs(name: str) -> tuple[Tensor, Tensor]:
    """Embeddings of the shipped mini CLIP for a set of images, computed once.

    Returns:
        Those of the captions (images, 5, dim), and of the images (images, dim).
    """
    path = data.WORK / f"laion_{name}.npz"
    if not path.exists():
        clip = pretrained.Clipper("mini", hidden=False, norm_embs=False)
        captions: list[str] = []
        for captions_of_image in load_descriptions(name)[0]:
            captions += captions_of_image
        embeddings = []
        for start in range(0, len(captions), 250):
            embeddings.append(clip.embed_text(captions[start : start + 250]))
        text = torch.cat(embeddings)
        parts = split_images(load_images(name), 500)
        seen = np.concatenate([clip.encode_pixels(part) for part in parts])
        text = text.view(-1, 5, DIM).half().numpy()
        np.savez(path, text=text, seen=seen.astype(np.float16))
    stored = np.load(path)
    text, seen = (torch.from_numpy(stored[name]).float() for name in ("text", "seen"))
    return text, seen


def train_laion_prior(options: Options, rank: int = 0) -> None:
    """Train the prior on captions and images of the shipped mini CLIP."""
    (text, seen), (check_text, check_seen) = (
        load_embedding_pairs(name) for name in ("laion", "check")
    )
    prior = build_laion_prior().to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        prior.net.null_text_encodings.data.normal_()
        index = rng.integers(len(seen), size=batch_size)
        condition = text[index, rng.integers(5, size=batch_size)].to(get_device())
        return prior(text_embed=condition, image_embed=seen[index].to(get_device()))[0]

    def evaluate(model: nn.Module) -> dict[str, Any]:
        """R2 of one step from pure noise (the mean) and of a sample, and top-1 among 512.

        Of held-out combinations, from their first captions.
        """
        condition = check_text[:, 0].to(get_device())
        targets = check_seen.to(get_device())
        last = PRIOR_CONFIG["num_timesteps"] - 1
        times = torch.full((len(targets),), last, device=condition.device)
        mean = model.net(torch.randn_like(targets), times, condition) / model.image_embed_scale
        sample = model.sample(condition, generator=torch.Generator().manual_seed(1))
        queries, gallery = (F.normalize(x, dim=-1) for x in (sample, targets))
        similarity = queries @ gallery.T
        hits = similarity.argmax(1) == torch.arange(len(targets), device=targets.device)
        scores = {}
        for name, predicted in (("r2_mean", mean), ("r2_sample", sample)):
            error = (predicted - targets).square().mean() / targets.var()
            scores[name] = round(1 - float(error), 3)
        return scores | {"top1_of_512": round(compute_share(hits), 3)}

    sizes: dict[str, Any] = {"lr": 1e-3, "batch_size": 256}
    train("laion_prior", prior, compute_loss, evaluate, options, rank=rank, **sizes)


def export_laion_prior() -> None:
    """Write the prior as LAION's file is.

    A bare state dict of the wrapper without the null embeddings, the network in half precision.
    """
    state = load_averaged("laion_prior", build_laion_prior()).state_dict()
    folder = data.OUT / "laion_prior"
    folder.mkdir(parents=True, exist_ok=True)
    exported = {}
    for key, value in state.items():
        if key not in FRESH_IN_LAION:
            exported[key] = value.half() if key.startswith("net.") else value
    torch.save(exported, folder / "best.pth")
