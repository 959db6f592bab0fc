# %% [markdown]
# # 01 · Train the high level: voxels to CLIP tokens
#
# **Question.** Can brain activity be mapped into the space in which CLIP describes images, well enough to find the image that was
# seen (contrastive loss) and to condition a diffusion model on it (diffusion prior)?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/high_level/` (best and last checkpoint, history) and, for the ridge
# baseline, `train_logs/<run>/high_level_ridge.safetensors`.
#
# Cost: full size about 30 h on one A100 and 13 GB of checkpoints (published figures, not run here); mini about 1.5 minutes on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, sections 2.1-2.3.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run under train_logs/ and results/, by default made from recipe and subject
dataset = "nsd"  # prepared dataset under data/
subj = 1  # subject
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, both
batch_size = 32  # images a step over all processes
num_epochs = 240  # passes over the training images
mixup_pct = 0.33  # share of the epochs with BiMixCo before SoftCLIP
max_lr = 3.0e-4  # peak learning rate, never scaled by the number of processes
lr_scheduler_type = "cycle"  # one of cycle, linear, fixed
norm_embs = True  # divide the CLIP tokens by the norm of their CLS token
prior = True  # train the diffusion prior
v2c = True  # train with the contrastive losses
use_projector = True  # a separate head for the contrastive losses
h = 4096  # width of the residual MLP
n_blocks = 4  # its residual blocks
projector_dim = 2048  # width of the projector
prior_depth = 6  # layers of the prior's transformer
prior_heads = 12  # its attention heads
prior_dim_head = 64  # width of a head
timesteps = 100  # noise levels of the prior
prior_mult = 30.0  # weight of the prior's loss
mse_mult = 0.0  # ours, weight of a direct regression of the tokens by the backbone, which helps where training is short; not in the paper
resume_from_ckpt = True  # go on where an interrupted run stopped
ckpt_interval = 5  # epochs between back-up checkpoints
save_at_end = False  # choose no best epoch, keep the last one only
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty
precision = "no"  # one of no, bf16, fp16
seed = 42  # of everything random

# %%
from src.utils import configure

run = configure(globals(), "01_train_high_level")
run

# %% [markdown]
# ## Data
# Voxels are z-scored per session with the statistics of training trials. A training step sees one random repeat of an image, validation
# the mean of its repeats. Targets are CLIP's tokens, computed once and cached with a fingerprint of the model that made them.

# %%
import numpy as np
import torch
import torch.nn.functional as F

from src.data import BrainDataset, Normaliser, cached_targets, open_subject
from src.figures import save, training_curves
from src.losses import cosine_anneal, mixco, mixco_nce, soft_clip_loss
from src.models import RidgeBaseline
from src.pretrained import Clipper
from src.reconstruct import build_decoder, predict_tokens
from src.training import fit
from src.utils import count_parameters, save_checkpoint

# %%
subject = open_subject(dataset, subj)
normaliser = Normaliser.fit(subject)
normaliser.save(run.logs / "normaliser.safetensors")
clipper = Clipper(weights, hidden=True, norm_embs=norm_embs, device=run.device)
clip_tokens = cached_targets(dataset, "clip_tokens", clipper.fingerprint(), subject.all_images, clipper.encode_pixels, clipper.target_shape)
n_tokens, dim = clipper.tokens, clipper.dim
data = {s: BrainDataset(subject, s, {"tokens": clip_tokens}, normaliser, repeats=r, seed=seed) for s, r in (("train", "random"), ("val", "mean"))}
print(f"(train images, voxels) = ({len(data['train'])}, {subject.betas.shape[1]})   (val images) = ({len(data['val'])})")
print(f"(tokens, dim) = ({n_tokens}, {dim})")

# %% [markdown]
# ## Model
# `voxel2clip`: a residual MLP from voxels to all tokens, with a projector on which the contrastive losses act, so that they and the
# prior do not pull on the same vector. The diffusion prior turns the backbone's output into tokens as CLIP would give them.

# %%
sizes = {"in_dim": subject.betas.shape[1], "out_dim": n_tokens * dim, "clip_size": dim, "h": h, "n_blocks": n_blocks}
net = {"dim": dim, "depth": prior_depth, "dim_head": prior_dim_head, "heads": prior_heads, "num_tokens": n_tokens, "learned_query_mode": "pos_emb"}
config = {
    "model": {
        "name": "BrainDiffusionPrior",
        "kwargs": {"image_embed_dim": dim, "timesteps": timesteps, "cond_drop_prob": 0.2},
        "voxel2clip": {"name": "BrainNetwork", "kwargs": sizes | {"use_projector": use_projector, "projector_dim": projector_dim}},
        "net": {"name": "VersatileDiffusionPriorNetwork", "kwargs": net},
    },
    "training": {k: run.parameters[k] for k in ("batch_size", "num_epochs", "mixup_pct", "max_lr", "prior", "v2c", "prior_mult", "mse_mult", "seed")},
    "tokens": [n_tokens, dim],
}
model = build_decoder(config["model"])
print(f"{count_parameters(model.voxel2clip):,} parameters in voxel2clip, {count_parameters(model.net):,} in the prior")

# %% [markdown]
# ## The step
# BiMixCo for the first third of the epochs (voxels of two images are mixed and both are to be found), SoftCLIP afterwards (the
# target is how similar the batch's images are to each other), and the prior's loss throughout.

# %%
mix_epochs = int(mixup_pct * num_epochs)
soft_temps = cosine_anneal(0.004, 0.0075, num_epochs - mix_epochs)


def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), tokens (batch, tokens, dim)."""
    voxels, target = batch["voxels"], batch["tokens"]
    mixing = epoch < mix_epochs and v2c
    if mixing:
        voxels, perm, betas, select = mixco(voxels)
    backbone, projected = model.voxel2clip(voxels)
    backbone = backbone.view(target.shape)  # (batch, tokens, dim)
    brain = F.normalize((projected if use_projector else backbone).flatten(1), dim=-1)
    image = F.normalize(target.flatten(1), dim=-1)
    loss, logs = voxels.new_zeros(()), {}
    if v2c:
        nce = mixco_nce(brain, image, 0.006, perm, betas, select) if mixing else soft_clip_loss(brain, image, soft_temps[epoch - mix_epochs])
        loss, logs["loss_nce"] = loss + nce, nce.detach()
    if prior:
        mse, _ = model(text_embed=backbone, image_embed=target)
        loss, logs["loss_prior"] = loss + prior_mult * mse, mse.detach()
    if mse_mult:
        direct = F.mse_loss(backbone, target * dim**0.5)  # in the prior's units
        loss, logs["loss_mse"] = loss + mse_mult * direct, direct.detach()
    return loss, logs


# %% [markdown]
# Validation looks at images of the validation split only: the same losses on averaged repeats, and how often the right image is the nearest.

# %%
@torch.no_grad()
def validate(model):
    """Losses and retrieval over the whole validation split, with the prior's noise drawn from a fixed seed."""
    batch = data["val"].__getitems__(list(range(len(data["val"]))))
    device = next(model.parameters()).device
    voxels, target = batch["voxels"].to(device), batch["tokens"].to(device)
    backbone, projected = model.voxel2clip(voxels)
    brain, image = F.normalize(projected.flatten(1), dim=-1), F.normalize(target.flatten(1), dim=-1)
    right = torch.arange(len(brain), device=device)
    found = (brain @ image.T).argmax(1) == right
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mse = model(text_embed=backbone.view(target.shape), image_embed=target)[0] if prior else voxels.new_zeros(())
    nce = soft_clip_loss(brain, image, 0.006) if v2c else voxels.new_zeros(())
    direct = F.mse_loss(backbone.view(target.shape), target * dim**0.5)
    loss, r2 = nce + prior_mult * mse + mse_mult * direct, 1 - direct / (target.var() * dim)
    return {"val/loss": loss.item(), "val/loss_prior": mse.item(), "val/token_r2": r2.item(), "val/top1": found.float().mean().item()}


# %%
if decoder != "ridge":
    history = fit(
        model, step, data["train"], folder=run.logs / "high_level", config=config, epochs=num_epochs, batch_size=batch_size, max_lr=max_lr,
        validate=validate, seed=seed, scheduler=lr_scheduler_type, precision=precision, resume=resume_from_ckpt,
        ckpt_interval=ckpt_interval, save_at_end=save_at_end, device=run.device,
    )  # fmt: skip
    save(training_curves(history), run.results / "figures" / "01_training.png")

# %% [markdown]
# ## Does the prior earn its place?
# Tokens of validation images from the backbone itself and from one sample of the prior, as the share of the true tokens' variance. A faithful sample
# cannot win here: where the mean has R2 = r, a draw from all that the brain leaves open has 2r - 1. What counts is what the generator makes of
# either; on the mini world it makes more of the mean (docs/prior.md), and the mini recipe sets `prior: false` in notebook 03.

# %%
if decoder != "ridge" and prior:
    x, ids = subject.averaged("val", normaliser=normaliser)
    truth = torch.from_numpy(clip_tokens.rows(ids[:100]).astype(np.float32))
    for name, use in (("backbone", False), ("one sample of the prior", True)):
        tokens, _ = predict_tokens(model.eval(), x[:100], (n_tokens, dim), use_prior=use, timesteps=min(20, timesteps), seed=seed, device=run.device)
        print(f"validation token R2, {name}: {1 - ((tokens[:, 0] - truth) ** 2).mean() / truth.var():.3f}")

# %% [markdown]
# ## The ridge baseline
# One linear map from the averaged voxels to the same tokens, its penalty chosen by cross-validation within the training images.
# A network that is not better than this has learnt nothing that needs a network.

# %%
if decoder != "network":
    x, ids = subject.averaged("train", normaliser=normaliser)
    ridge = RidgeBaseline.fit(x, clip_tokens.rows(ids).astype(np.float32), cv=ridge_folds, seed=seed)
    ridge_config = {"model": ridge.config, "tokens": [n_tokens, dim]}
    save_checkpoint(run.logs / "high_level_ridge.safetensors", ridge.state_dict(), ridge_config)
    print(f"ridge: {count_parameters(ridge):,} weights, median penalty {np.median(ridge.alphas.numpy()):.3g}")

# %% [markdown]
# ## What to look at
# The validation loss should fall in both phases, with a jump where BiMixCo gives way to SoftCLIP (they are different losses). `val/top1` is
# retrieval among the validation images. Next: notebook 02 trains the low level.
