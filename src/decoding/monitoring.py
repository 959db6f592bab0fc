"""Figures of a training while it runs, and what the prior adds to the backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import TargetCache
from src.decoding.generate import generate_images, load_generator
from src.decoding.predict import PriorSampling, predict_tokens
from src.figures import plot_embeddings, plot_image_grid, save_figure
from src.parameters import Run


class TrainingFigures:
    """Figures of an epoch, for `fit`: a UMAP of predicted and true tokens, and reconstructions of
    the first validation images.

    Args:
        run: with parameters plot_umap, umap_label, n_samples_save, weights, prior and seed.
        subject: with its training split.
        normaliser: of its voxels.
        token_shape: (tokens, dim).
        predict: model -> projected and true tokens (images, tokens, dim) of the validation images,
            and more.
    """

    def __init__(
        self,
        run: Run,
        subject: Subject,
        normaliser: Normaliser,
        token_shape: tuple[int, int],
        predict: Callable[[nn.Module], Any],
    ):
        self.run, self.subject, self.normaliser = run, subject, normaliser
        self.token_shape, self.predict = token_shape, predict
        self.parameters: Any = run.parameters
        self.generator = None
        if self.parameters["n_samples_save"]:
            weights = str(self.parameters["weights"])
            self.generator = load_generator(token_shape[0], weights, run.device)

    @property
    def draw(self) -> Callable[[nn.Module, int], dict[str, Figure]] | None:
        """(model, epoch) -> figures by name; None where none is asked for."""
        p = self.parameters
        return self._draw if p["plot_umap"] or p["n_samples_save"] else None

    def _draw(self, model: nn.Module, epoch: int) -> dict[str, Figure]:
        figures = {}
        if self.parameters["plot_umap"]:
            figures["umap"] = self._draw_umap(model)
        if self.generator is not None:
            figures["samples"] = self._draw_samples(model, epoch)
        for name, figure in figures.items():
            file = f"01_{name}_epoch{epoch:03d}.png"
            save_figure(figure, self.run.results / "figures" / file)
        return figures

    def _draw_umap(self, model: nn.Module) -> Figure:
        projected, target, *_ = self.predict(model)
        label, ids = self.parameters["umap_label"], self.subject.image_ids("val")
        labels = self.subject.categories(ids, label) if label else ["image"] * len(ids)
        return plot_embeddings(projected, target, labels, seed=self.parameters["seed"])

    def _draw_samples(self, model: nn.Module, epoch: int) -> Figure:
        p, n = self.parameters, self.parameters["n_samples_save"]
        voxels, ids = self.subject.get_mean_betas("val", normaliser=self.normaliser)
        voxels, ids = voxels[:n], ids[:n]
        sampling = PriorSampling(use_prior=p["prior"], seed=p["seed"])
        device = self.run.device
        tokens, _ = predict_tokens(model, voxels, self.token_shape, sampling, ids, device=device)
        seen = torch.from_numpy(self.subject.images(ids)).permute(0, 3, 1, 2) / 255
        assert self.generator is not None
        images = generate_images(self.generator, tokens, ids, seed=p["seed"])[:, 0]
        return plot_image_grid({"seen": seen, f"epoch {epoch}": images}, n=len(ids))


def compare_prior_with_backbone(
    model: Any,
    subject: Subject,
    normaliser: Normaliser,
    targets: TargetCache,
    token_shape: tuple[int, int],
    seed: int = 42,
    device: str = "cpu",
    n_images: int = 100,
) -> dict[str, float]:
    """Share of the variance of true tokens (R2) that the backbone predicts, and that one sample of
    the prior predicts, of the first validation images.
    """
    voxels, ids = subject.get_mean_betas("val", normaliser=normaliser)
    rows = targets.rows(ids[:n_images]).astype(np.float32)
    truth = torch.from_numpy(rows).view(-1, *token_shape)
    steps = min(20, model.noise_scheduler.num_timesteps)
    shares = {}
    for name, use_prior in (("backbone", False), ("one sample of the prior", True)):
        sampling = PriorSampling(use_prior=use_prior, timesteps=steps, seed=seed)
        tokens, _ = predict_tokens(
            model.eval(), voxels[:n_images], token_shape, sampling, device=device
        )
        shares[name] = float(1 - ((tokens[:, 0] - truth) ** 2).mean() / truth.var())
    return shares
