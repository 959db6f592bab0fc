"""GNet: the encoder from images to the voxels of the demo's simulated subjects."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from src import miniworld
from src.evaluation import brain_correlation
from src.pretrained import gnet

from . import data
from .data import draw_indices, get_device
from .training import Options, train

TRUNK_CONFIG: dict[str, Any] = {
    "input_size": 96,
    "stem": 24,
    "width": 48,
    "dim": 32,
    "trunk_width": 8,
    "pass_through": 24,
    "drop": 0.1,
}
SUBJECTS = (1, 2, 3, 4)  # the demo's
N_IMAGES = 5_000  # training images that notebook 00 shows each subject
VOXELS_PER_STEP = 384  # of each subject, whose error a step looks at
LABEL_VALUES = {  # what the trunk learns to name, by column of the mini world's labels
    "scene": miniworld.SCENES,
    "kind": miniworld.CATEGORIES,
    "colour": miniworld.COLOURS,
    "pattern": miniworld.PATTERNS,
    "light": miniworld.LIGHTS,
}


# --------------------------------------------------------------------------------------- responses
def load_responses(subj: int) -> dict[str, np.ndarray]:
    """The demo's experiment of a subject, without its test set; simulated once.

    Returns:
        For "train" and "val" the mean response over repeats, float16 (images, voxels), z-scored by
        session with training trials; as "train_seen" the images, uint8 (images, 3, side, side); as
        "train_labels" the labels (images, 5).
    """
    path = data.WORK / f"gnet_subj{subj:02d}.npz"
    if not path.exists():
        world = miniworld.simulate(subj, N_IMAGES)
        betas = _normalize_sessions(world.scan.betas, world.scan.trials)
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "val"):
            arrays |= _average_repeats(world, betas, split)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.rename(path)
    return dict(np.load(path))


def _normalize_sessions(betas: np.ndarray, trials: Any) -> np.ndarray:
    """Betas (trials, voxels) z-scored by session with the training trials."""
    z = betas.copy()
    is_training = (trials["split"] == "train").to_numpy()
    for session in trials["session"].unique():
        in_session = (trials["session"] == session).to_numpy()
        training = betas[in_session & is_training]
        z[in_session] = (z[in_session] - training.mean(0)) / training.std(0)
    return z


def _average_repeats(world: Any, betas: np.ndarray, split: str) -> dict[str, np.ndarray]:
    """Mean responses, images and labels of a split, with the names of `load_responses`."""
    trials = world.scan.trials
    rows = np.flatnonzero(trials["split"] == split)
    ids, image = np.unique(trials["image"].to_numpy()[rows], return_inverse=True)
    total = np.zeros((len(ids), betas.shape[1]), np.float32)
    np.add.at(total, image, betas[rows])
    mean = total / np.bincount(image)[:, None]
    images = world.images[np.searchsorted(world.image_ids, ids)]
    images = images.transpose(0, 3, 1, 2)
    blocks = []
    for part in data.split_images(images, 250):
        scaled = gnet.prepare_gnet_images(part, TRUNK_CONFIG["input_size"])
        blocks.append(scaled.mul(255).byte().numpy())
    labels = world.labels.set_index("image")
    codes = []
    for name, values in LABEL_VALUES.items():
        codes.append(labels.loc[ids, name].map(list(values).index))
    return {
        split: mean.astype(np.float16),
        f"{split}_seen": np.concatenate(blocks),
        f"{split}_labels": np.stack(codes, 1),
    }


# ----------------------------------------------------------------------------------------- training
class GNetTrainer(nn.Module):
    """The trunk with a readout for each subject.

    Also heads that name what the images show, which are left behind.

    Args:
        n_voxels: of each subject.
    """

    def __init__(self, n_voxels: dict[int, int]):
        super().__init__()
        self.trunk = gnet.GNetTrunk(**TRUNK_CONFIG)
        channels, sides = self.trunk.channels, self.trunk.sides
        self.readouts = nn.ModuleDict()
        for subj, n in n_voxels.items():
            self.readouts[str(subj)] = gnet.GNetReadout(n, channels, sides)
        self.heads = nn.ModuleList(
            nn.Linear(sum(channels), len(values)) for values in LABEL_VALUES.values()
        )

    def compute_naming_loss(self, maps: list[Tensor], labels: Tensor) -> Tensor:
        """Mean cross-entropy of the heads on the trunk's maps; labels (batch, 5)."""
        pooled = torch.cat([m.amax((2, 3)) for m in maps], 1)
        pairs = zip(self.heads, labels.T, strict=True)
        total = sum(F.cross_entropy(head(pooled), column) for head, column in pairs)
        return total / len(self.heads)


def train_gnet(options: Options, rank: int = 0) -> None:
    """Train the encoder that stands for one fitted to the subjects' training data by its authors.

    The trunk learns from all subjects at once. It also learns to name what the training images
    show; the published trunk began with the convolutions of AlexNet, which had learnt to name
    photographs.
    """
    responses = {subj: load_responses(subj) for subj in SUBJECTS}
    n_voxels = {subj: arrays["train"].shape[1] for subj, arrays in responses.items()}
    model = GNetTrainer(n_voxels).to(get_device())
    means = []
    for arrays in responses.values():
        means.append(arrays["train_seen"].mean((0, 2, 3)) / 255)
    mean_colour = torch.from_numpy(np.mean(means, 0))
    model.trunk.mu.data.copy_(mean_colour.view(1, 3, 1, 1))
    masks = {}
    for subj in SUBJECTS:
        masks[subj] = brain_correlation.roi_masks(miniworld.VisualCortex(subj).voxels)

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = {}
        for subj, arrays in responses.items():
            index[subj] = draw_indices(rng, len(arrays["train"]), batch_size)

        def take(name: str) -> list[Tensor]:
            rows = (arrays[name][index[subj]] for subj, arrays in responses.items())
            return [torch.from_numpy(values) for values in rows]

        seen = torch.cat(take("train_seen")).to(get_device()).float() / 255
        maps = model.trunk(seen)
        labels = torch.cat(take("train_labels")).to(get_device())
        loss = 0.1 * model.compute_naming_loss(maps, labels)
        betas_of_subjects = zip(responses, take("train"), strict=True)
        for i, (subj, betas) in enumerate(betas_of_subjects):
            choice = rng.choice(betas.shape[1], VOXELS_PER_STEP, replace=False)
            voxels = torch.from_numpy(np.sort(choice))
            maps_of_subject = [m[i * batch_size : (i + 1) * batch_size] for m in maps]
            readout = model.readouts[str(subj)]
            predicted = readout(maps_of_subject, voxels.to(get_device()))
            targets = betas[:, voxels].to(get_device()).float()
            loss = loss + F.mse_loss(predicted, targets) / len(responses)
        return loss

    def evaluate(model: nn.Module) -> dict[str, float]:
        # every subject has the same validation images
        seen = torch.from_numpy(responses[1]["val_seen"]).to(get_device())
        maps = model.trunk(seen.float() / 255)
        scores = {}
        for subj, arrays in responses.items():
            predicted = model.readouts[str(subj)](maps)
            correlations = brain_correlation.brain_correlation(
                predicted, arrays["val"], masks[subj]
            )
            for name, correlation in correlations.items():
                if subj == 1 or name == "nsd_general":
                    scores[f"subj{subj:02d} {name}"] = round(float(correlation.mean()), 4)
        return scores

    train("gnet", model, compute_loss, evaluate, options, lr=5e-3, batch_size=16, rank=rank)


def export_gnet() -> None:
    """Write the encoders as `gnet.load_gnet` reads them."""
    stored = torch.load(data.WORK / "gnet.pt", map_location="cpu", weights_only=True)
    exported_names = {"trunk.": "enc.", "readouts.": "fwrfs."}
    state = {}
    for key, value in stored["average"].items():
        for prefix, exported in exported_names.items():
            if key.startswith(prefix):
                half = value.half() if value.is_floating_point() else value
                state[exported + key.removeprefix(prefix)] = half
    folder = data.OUT / "gnet"
    folder.mkdir(exist_ok=True, parents=True)
    save_file(state, folder / "model.safetensors")
    config = {"trunk": TRUNK_CONFIG, "subjects": list(SUBJECTS)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
