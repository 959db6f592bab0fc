"""What notebook 01_train_high_level does around its model and its step: checks of its parameters,
CLIP's tokens as targets, and the validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.data.batches import BrainDataset
from src.data.normaliser import Normaliser
from src.data.splits import select_training_split
from src.data.subject import Subject, open_subject
from src.data.targets import TargetCache, cache_augmented_targets, cache_encoder_targets
from src.losses import cosine_similarity, l2_normalize, soft_clip_loss
from src.networks.released import load_laion_prior
from src.parameters import list_decoders, parse_names
from src.pretrained.clip import Clipper
from src.prior import BrainDiffusionPrior
from src.readers import prepare_if_missing
from src.training.augment import apply_augmentation, build_clip_augmentation
from src.training.batches import iterate_batches
from src.training.options import Batching, Checkpointing, Execution, Optimisation
from src.training.processes import check_precision
from src.utils import PerceptError, resolve

Parameters = Mapping[str, Any]

# published behaviours that parameter faithful brings back (docs/faithful.md)
FAITHFUL = ("mixco_labels", "norm_decay", "batch_repeats", "resampled_epochs", "train_on_val")

# parameters that are stored with the checkpoint
RECORDED = (
    "batch_size",
    "num_epochs",
    "mixup_pct",
    "max_lr",
    "prior",
    "v2c",
    "mse_mult",
    "use_image_aug",
    "cached_views",
    "faithful",
    "laion_prior",
    "seed",
    "split",
    "n_clusters",
    "num_sessions",
    "n_components",
    "rois",
)


def check_parameters(parameters: Parameters, device: str) -> set[str]:
    """Refuse parameters of notebook 01_train_high_level that do not go together.

    Returns:
        The published behaviours that parameter faithful asks for.

    Raises:
        PerceptError: naming the parameters, and what to do.
    """
    p = parameters
    published = parse_names(p["faithful"], FAITHFUL, "faithful")
    if not (p["prior"] or p["v2c"]):
        raise PerceptError("Neither prior nor v2c is trained: leave at least one of them on.")
    if p["laion_prior"] and (p["hidden"] or not resolve(p["laion_prior"]).is_file()):
        raise PerceptError(
            f"laion_prior is '{p['laion_prior']}': it must be a file, and begins the 1x768 model"
            " alone (hidden False, norm_embs False)."
        )
    if p["timesteps"] == 1:
        raise PerceptError(
            "timesteps is 1: a prior needs at least 2 noise levels, or 0 for the published number."
        )
    if "network" in list_decoders(p["decoder"]):
        check_precision(device, p["precision"], p["step_in_backward"])
    return published


def build_fit_options(
    parameters: Parameters, device: str, published: set[str]
) -> dict[str, Batching | Optimisation | Execution | Checkpointing]:
    """The options of `fit` by name, from the parameters of a training notebook."""
    p = parameters
    order = "resampled" if "resampled_epochs" in published else "shuffled"
    decay = "published" if "norm_decay" in published else "no_norms"
    return {
        "batching": Batching(p["num_epochs"], p["batch_size"], seed=p["seed"], order=order),
        "optimisation": Optimisation(p["max_lr"], scheduler=p["lr_scheduler_type"], decay=decay),
        "execution": Execution(device, p["precision"], step_in_backward=p["step_in_backward"]),
        "checkpointing": Checkpointing(
            resume=p["resume_from_ckpt"],
            checkpoints=p["ckpt_saving"],
            ckpt_interval=p["ckpt_interval"],
            save_at_end=p["save_at_end"] or "train_on_val" in published,
        ),
    }


def open_training_images(parameters: Parameters, device: str) -> tuple[Subject, str]:
    """The subject with the images that a training may see, and what these are, as a sentence.

    Data that are not prepared are read from parameter data_path first.
    """
    p = parameters
    prepare_if_missing("mindeye", p["data_path"], p["dataset"], p["subj"])
    all_trials = open_subject(p["dataset"], p["subj"])
    subject = select_training_split(
        all_trials,
        p["split"],
        lambda: Clipper(p["weights"], hidden=False, norm_embs=False, device=device),
        p["n_clusters"],
        p["num_sessions"],
    )
    if subject is all_trials:
        return subject, f"all training images are used, protocol {subject.protocol}"
    remaining = {
        part: f"{len(subject.image_ids(part))} of {len(all_trials.image_ids(part))}"
        for part in ("train", "val")
    }
    n_held_out = subject.in_excluded_clusters(subject.image_ids("test")).sum()
    return subject, (
        f"images kept: {remaining}; test images in held-out clusters: {n_held_out}, protocol"
        f" {subject.protocol}"
    )


def start_from_laion(prior: BrainDiffusionPrior, laion_prior: str) -> str:
    """Give the prior LAION's weights where parameter laion_prior names a file; returns what its
    weights begin as.
    """
    if not laion_prior:
        return "the weights begin at random"
    fresh = load_laion_prior(resolve(laion_prior), prior)
    names = ", ".join(key for key in fresh if not key.startswith("voxel2clip."))
    return f"the prior starts as LAION's; fresh are {names} and voxel2clip"


@dataclass(frozen=True)
class ClipTargets:
    """CLIP's tokens of the images, computed once, or anew of images that are augmented now.

    Attributes:
        clipper: the frozen CLIP.
        cached: tokens of all images, not augmented.
        train: tokens of the training images, augmented or not; None: made at every step.
        split: of the images that are trained on.
        repeats: how a training step chooses the repeat of an image, see `BrainDataset`.
        augment: images (batch, 3, height, width) -> augmented ones (batch, 3, size, size).
    """

    clipper: Clipper
    cached: TargetCache
    train: Any
    split: str
    repeats: str
    augment: nn.Module

    @classmethod
    def open(
        cls, clipper: Clipper, subject: Subject, parameters: Parameters, published: set[str]
    ) -> ClipTargets:
        """Compute the tokens that are not cached yet."""
        cached = cache_encoder_targets(subject.folder, "clip_tokens", clipper, subject.all_images)
        split = "train+val" if "train_on_val" in published else "train"
        repeats = "batch" if "batch_repeats" in published else "random"
        augment = build_clip_augmentation(clipper.size)
        train: Any = cached
        if parameters["use_image_aug"]:
            train = _cache_views(clipper, augment, subject, split, parameters["cached_views"])
        return cls(clipper, cached, train, split, repeats, augment)

    def describe(self) -> str:
        """(tokens, dim), and where the targets of training come from."""
        kind = "cached"
        if self.train is None:
            kind = "of augmented images, made at every step"
        elif self.train is not self.cached:
            kind = "of augmented images, cached"
        return f"(tokens, dim) = ({self.clipper.n_tokens}, {self.clipper.dim})   targets: {kind}"

    def make_datasets(
        self, subject: Subject, normaliser: Normaliser, seed: int
    ) -> tuple[BrainDataset, BrainDataset]:
        """The training images, one random repeat a step, and the validation images, the mean of
        their repeats and never augmented.
        """
        train_targets = {} if self.train is None else {"tokens": self.train}
        is_made_now = self.train is None
        train = BrainDataset(
            subject, self.split, train_targets, normaliser, self.repeats, seed, pixels=is_made_now
        )
        return train, BrainDataset(
            subject, "val", {"tokens": self.cached}, normaliser, "mean", seed
        )

    def get(self, batch: Mapping[str, Tensor]) -> Tensor:
        """CLIP tokens (batch, tokens, dim): from the cache, or of images that are augmented now."""
        tokens = batch.get("tokens")
        if tokens is None:
            tokens = self.clipper.embed_image(self.augment(batch["pixels"].float() / 255)).float()
        return tokens.view(len(tokens), self.clipper.n_tokens, self.clipper.dim)


def _cache_views(
    clipper: Clipper, augment: nn.Module, subject: Subject, split: str, views: int
) -> Any:
    """Tokens of some augmented versions of each training image; None for no versions."""
    if not views:
        return None

    def encode_view(images: np.ndarray, view_seed: int) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        augmented = apply_augmentation(augment, x, view_seed)
        return clipper.embed_image(augmented).float().cpu().numpy()

    return cache_augmented_targets(
        subject.folder,
        "clip_tokens",
        clipper.fingerprint() | {"augmentation": repr(augment)},
        subject.image_ids(split),
        encode_view,
        clipper.target_shape,
        views,
    )


@dataclass(frozen=True)
class Validation:
    """Losses and retrieval over the whole validation split.

    SoftCLIP at one temperature throughout, so that epochs can be compared, the prior's loss, and
    how often the right one is the nearest.

    Attributes:
        dataset: the validation images, repeats averaged.
        targets: CLIP's tokens.
        prior_weight: of the prior's loss, 0 where no prior is trained.
        parameters: v2c, mse_mult and batch_size; batches are as large as in training, so that
            memory does not grow.
    """

    dataset: BrainDataset
    targets: ClipTargets
    prior_weight: float
    parameters: Parameters

    def predict(self, model: Any) -> list[Tensor]:
        """Of all validation images: projected and true tokens (images, tokens, dim), and the errors
        of the prior and of the backbone (images,).
        """
        device, outputs = next(model.parameters()).device, []
        dim = self.targets.clipper.dim
        for batch in iterate_batches(self.dataset, self.parameters["batch_size"], device):
            target = self.targets.get(batch)
            backbone, projected = model.voxel2clip.predict_tokens(batch["voxels"])
            direct = (backbone - target * dim**0.5).square().mean((1, 2))
            guess = 0 * target
            if self.parameters["prior"]:
                guess = model(text_embed=backbone, image_embed=target, seeds=batch["seed"])[1]
            of_prior = (guess - target * model.image_embed_scale).square().mean((1, 2))
            outputs.append((projected, target, of_prior, direct))
        return [torch.cat(parts).float() for parts in zip(*outputs, strict=True)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The columns val/... of the history."""
        p, dim = self.parameters, self.targets.clipper.dim
        projected, target, of_prior, of_backbone = self.predict(model)
        brain, image = l2_normalize(projected), l2_normalize(target)
        right = torch.arange(len(brain), device=brain.device)
        similar = cosine_similarity(brain, image)
        nce = soft_clip_loss(brain, image, 0.006) if p["v2c"] else brain.new_zeros(())
        mse = of_prior.mean() if p["prior"] else brain.new_zeros(())
        direct = of_backbone.mean()
        values = {
            "loss": nce + self.prior_weight * mse + p["mse_mult"] * direct,
            "loss_nce": nce,
            "loss_prior": mse,
            "token_r2": 1 - direct / (target.var() * dim),
            "cosine_sim": similar.diagonal().mean(),
            "image_from_brain": (similar.argmax(1) == right).float().mean(),
            "brain_from_image": (similar.argmax(0) == right).float().mean(),
        }
        return {f"val/{name}": value.item() for name, value in values.items()}
