# %% [markdown]
# # 02 · Train the low level: voxels to the latents of an autoencoder
#
# **Question.** How much of an image's layout and colour can be read from the brain without knowing what the image shows?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/low_level/` and, for the baseline, `train_logs/<run>/low_level_ridge.safetensors`.
#
# Cost: full size about 10 h on one A100 (published figure, not run here); mini about one minute on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, section 2.5.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run under train_logs/ and results/, by default made from recipe and subject
dataset = "nsd"  # prepared dataset under data/
subj = 1  # subject
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, both
batch_size = 8  # images a step over all processes
num_epochs = 120  # passes over the training images
max_lr = 5.0e-4  # peak learning rate, never scaled by the number of processes
h = 4096  # width of the residual MLP
n_blocks = 4  # its residual blocks
ups_mode = "4x"  # one of 4x, 8x, 16x
latent_size = 64  # height and width of the latents
block_out_channels = ""  # widths of the upsampler separated by commas, by default the published ones
voxel_select = True  # train on random mixtures of an image's repeats, otherwise on one random repeat
resume_from_ckpt = True  # go on where an interrupted run stopped
ckpt_interval = 24  # epochs between kept checkpoints
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty
precision = "no"  # one of no, bf16, fp16
seed = 0  # of everything random

# %%
from src.utils import configure

run = configure(globals(), "02_train_autoencoder")
run

# %%
import numpy as np
import torch
import torch.nn.functional as F

from src.data import BrainDataset, Normaliser, cached_targets, open_subject
from src.figures import image_grid, save, training_curves
from src.models import RidgeBaseline
from src.pretrained import LatentAutoencoder
from src.reconstruct import build_decoder, predict_latents
from src.training import fit
from src.utils import count_parameters, save_checkpoint

# %% [markdown]
# ## Data
# The target of an image is the latent that the frozen autoencoder gives it, times the scaling factor of its diffusion model. It is computed once.

# %%
subject = open_subject(dataset, subj)
normaliser = Normaliser.fit(subject)
normaliser.save(run.logs / "normaliser.safetensors")
autoencoder = LatentAutoencoder(weights, device=run.device)
latents = cached_targets(dataset, "vae_latents", autoencoder.fingerprint(), subject.all_images, autoencoder.encode_pixels, autoencoder.latent_shape)
repeats = "all" if voxel_select else "random"
data = {s: BrainDataset(subject, s, {"latents": latents}, normaliser, repeats=r, seed=seed) for s, r in (("train", repeats), ("val", "mean"))}
print(f"(train images, voxels) = ({len(data['train'])}, {subject.betas.shape[1]})")
print(f"(channels, height, width) of a latent = {autoencoder.latent_shape}")

# %% [markdown]
# ## Model
# A residual MLP without biases, then the decoder half of an autoencoder as upsampler.

# %%
kwargs = {"in_dim": subject.betas.shape[1], "h": h, "n_blocks": n_blocks, "use_cont": False, "ups_mode": ups_mode, "latent_size": latent_size}
if block_out_channels:
    kwargs["block_out_channels"] = [int(width) for width in block_out_channels.split(",")]
config = {
    "model": {"name": "Voxel2StableDiffusionModel", "kwargs": kwargs},
    "training": {k: run.parameters[k] for k in ("batch_size", "num_epochs", "max_lr", "voxel_select", "seed")},
    "latents": list(autoencoder.latent_shape),
}
model = build_decoder(config["model"])
print(f"{count_parameters(model):,} parameters")

# %% [markdown]
# ## The step
# The published mixture of repeats: with probability .5 a random convex combination of an image's repeats, with .3 their mean, with .2 one of
# them. The loss is the mean absolute error of the unscaled latents.

# %%
scale = autoencoder.scale


def mix_repeats(voxels):
    """(batch, repeats, voxels) -> (batch, voxels)."""
    draw, n = torch.rand(()), voxels.shape[1]
    if draw < 0.5:
        weight = torch.rand(*voxels.shape[:2], 1, device=voxels.device)
        return (voxels * weight / weight.sum(1, keepdim=True)).sum(1)
    return voxels.mean(1) if draw < 0.8 else voxels[:, torch.randint(n, ())]


def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, [repeats,] voxels), latents (batch, channels, h, w)."""
    voxels = mix_repeats(batch["voxels"]) if voxel_select else batch["voxels"]
    loss = F.l1_loss(model(voxels), batch["latents"]) / scale
    return loss, {"loss_l1": loss.detach()}


# %%
@torch.no_grad()
def validate(model):
    """Mean squared error of the latents of the validation images, repeats averaged."""
    batch = data["val"].__getitems__(list(range(len(data["val"]))))
    device = next(model.parameters()).device
    predicted, target = model(batch["voxels"].to(device)), batch["latents"].to(device)
    mse = F.mse_loss(predicted, target)
    return {"val/loss": mse.item(), "val/r2": 1 - (mse / target.var()).item()}


# %%
if decoder != "ridge":
    history = fit(
        model, step, data["train"], folder=run.logs / "low_level", config=config, epochs=num_epochs, batch_size=batch_size, max_lr=max_lr,
        validate=validate, seed=seed, precision=precision, resume=resume_from_ckpt, ckpt_interval=ckpt_interval, device=run.device,
    )  # fmt: skip
    save(training_curves(history), run.results / "figures" / "02_training.png")

# %% [markdown]
# ## The ridge baseline

# %%
if decoder != "network":
    x, ids = subject.averaged("train", normaliser=normaliser)
    ridge = RidgeBaseline.fit(x, latents.rows(ids).astype(np.float32), cv=ridge_folds, seed=seed)
    save_checkpoint(run.logs / "low_level_ridge.safetensors", ridge.state_dict(), {"model": ridge.config, "latents": list(autoencoder.latent_shape)})
    print(f"ridge: {count_parameters(ridge):,} weights, median penalty {np.median(ridge.alphas.numpy()):.3g}")

# %% [markdown]
# ## A look at validation images
# Seen, what the autoencoder itself keeps of it, and what is read from the brain.

# %%
x, ids = subject.averaged("val", normaliser=normaliser)
x, ids = x[:12], ids[:12]
seen = torch.from_numpy(subject.images(ids)).permute(0, 3, 1, 2) / 255
rows = {"seen": seen, "autoencoder": autoencoder.decode(torch.from_numpy(latents.rows(ids).astype(np.float32))).cpu()}
for name, trained in {"network": model if decoder != "ridge" else None, "ridge": ridge if decoder != "network" else None}.items():
    if trained is not None:
        found = predict_latents(trained.eval().cpu(), x, autoencoder.latent_shape)
        rows[name] = autoencoder.decode(found).cpu()
save(image_grid(rows), run.results / "figures" / "02_validation.png")

# %% [markdown]
# ## What to look at
# Colours and the horizon should be right, objects soft: a mean over everything that the voxels leave open is blurry by nature. Next: notebook 03
# reconstructs images from both levels.
