# %% [markdown]
# # 02 · Train the basic autoencoder: voxels to pictures through a frozen decoder
#
# **Question.** How far does the smallest thing that could work go: a few linear layers, and an
# error of pixels?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/low_level/` and, for the
# baseline, `train_logs/<run>/low_level_ridge.safetensors`.
#
# Cost: full size about a day on four A40 (published: 1.5 min an epoch, 1000 epochs; not run here);
# mini about one minute on two CPU cores.
#
# Source: FMRI2IMG (github.com/aaalgo/fmri2img). What is kept of it and what is not:
# docs/basic_ae.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)
n_components = 0  # principal components in place of voxels, 0 for the voxels, at least 0
n_train = 9000  # training images, drawn by seed where there are more, 0 for all, at least 0
image_size = 128  # side of the images, 0 for the autoencoder's own, at least 0
repeats = "each"  # one of each, random, mean; what an epoch shows of an image with several trials
use_image_aug = True  # targets of randomly augmented images
num_workers = 0  # processes that read batches, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
encoder = "2048"  # one of 2048, 512; the published sizes
scaled_latents = True  # predict latents times the diffusion model's factor, not as published

# optimisation
latent_mult = 0.0  # weight of the error of latents beside that of pixels, at least 0
batch_size = 64  # images or samples a step over all processes, at least 1
gradient_accumulation_steps = 1  # parts in which a batch is processed to save memory, at least 1
num_epochs = 1000  # passes over the training images, at least 1
learning_rate = 1.0e-3  # peak learning rate, never scaled by the number of processes, more than 0
scale_lr = False  # multiply the learning rate by batch_size
lr_scheduler = "constant"  # one of constant, constant_with_warmup, cycle
warmup_steps = 0  # steps of constant_with_warmup, at least 0
adam_beta1 = 0.9  # decay of AdamW's mean of gradients, at least 0
adam_beta2 = 0.999  # decay of its mean of squares, at least 0
adam_epsilon = 1.0e-8  # what it adds to their root, more than 0
adam_weight_decay = 0.01  # its weight decay, at least 0
precision = "no"  # one of no, bf16, fp16
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
seed = 0  # of everything random here

# evaluation
gallery_images = 128  # training images shown beside their predictions, never scored, at least 0

# logging
ckpt_interval = 0  # epochs between figures and kept checkpoints, 0 for none, at least 0
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "fmri2image"  # project of Weights & Biases

# %%
from src.parameters import configure

run = configure(globals(), "02_train_basic_autoencoder")
run

# %%
import math

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import nn

from src.data import BrainDataset, Normaliser, cache_targets, open_subject
from src.decoding import DecoderSizes, build_decoder_config, predict_latents
from src.figures import plot_contact_sheet, plot_image_grid, plot_training_curves, save_figure
from src.networks import build_decoder
from src.parameters import list_decoders
from src.pipeline.dryrun import plan_stage
from src.pretrained import LatentAutoencoder

# %%
from src.training import (
    CLOSED_FORMS,
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    check_run,
    describe_closed_form,
    describe_history,
    fit,
    fit_closed_form,
    iterate_batches,
    open_tracker,
    record_training,
)
from src.utils import PerceptError, count_parameters, peak_memory

# %% [markdown]
# ## Data
# Voxels are z-scored by session with the mean and spread of training trials alone, and those of
# `rois` taken. The targets are the pictures themselves.

# %%
if warmup_steps and lr_scheduler != "constant_with_warmup":
    raise PerceptError(
        f"lr_scheduler '{lr_scheduler}' has no warmup_steps to set: choose constant_with_warmup, or"
        " leave them at 0."
    )
subject = open_subject(dataset, subj)
subject = subject.subsample_train(n_train, seed) if n_train else subject
decoders = list_decoders(decoder)
print(plan_stage(run.stage, run.parameters) or "No network is trained.")
normaliser = Normaliser.fit(subject, n_components=n_components, rois=rois)
autoencoder = LatentAutoencoder(weights, "stable_diffusion", image_size, run.device)
side, scale = autoencoder.image_size, autoencoder.scale
targets = {}
if latent_mult or decoder != "network":
    made_by = autoencoder.fingerprint()
    targets["latents"] = cache_targets(
        dataset,
        "vae_latents",
        made_by,
        subject.all_images,
        autoencoder.encode_pixels,
        autoencoder.latent_shape,
    )
train = BrainDataset(subject, "train", targets, normaliser, repeats, seed, pixels=True)
val = BrainDataset(subject, "val", {}, normaliser, "mean", seed, pixels=True)

# %%
spread = (
    f"{', '.join(normaliser.rois) or 'all voxels'}, {normaliser.n_features}"
    f" {'components' if n_components else 'voxels'}"
)
print(
    f"{len(train)} training samples of {len(subject.image_ids('train'))} images   {spread}  "
    f" protocol {subject.protocol}"
)
print(
    f"(channels, height, width) of a latent = {autoencoder.latent_shape}, of a picture = (3,"
    f" {side}, {side})"
)

# %% [markdown]
# ## Model
# Linear layers with GELU, then transposed convolutions up to the latent. No norm, no dropout.

# %%
recorded = (
    "rois",
    "n_components",
    "n_train",
    "scaled_latents",
    "repeats",
    "use_image_aug",
    "latent_mult",
    "batch_size",
    "num_epochs",
    "seed",
)
sizes = DecoderSizes((normaliser.n_features,), latent=autoencoder.latent_shape, latent_scale=scale)
config = {
    "model": build_decoder_config(run.stage, run.parameters, sizes),
    "training": {k: run.parameters[k] for k in recorded},
    "latents": list(autoencoder.latent_shape),
    "autoencoder": {"name": "stable_diffusion", "image_size": side},
}
check_run(run.logs, config, [subject], resume_from_ckpt)
begin = record_training(run, subject, normaliser)
model = build_decoder(config["model"])
print(f"{count_parameters(model):,} weights to train")

# %% [markdown]
# ## The step
# The predicted latent goes through the frozen decoder, and the gradient back through it. The loss
# is the mean squared error of pixels in [-1, 1].
#
# In training the target is blurred (standard deviation 0 to 3 at a width of 425 pixels) and
# enlarged by up to 1.2 about its centre.

# %%
source = subject.images(subject.image_ids("val")[:1]).shape[2]  # width of the stored images
widest = 3 * source / 425
blur = K.RandomGaussianBlur((2 * math.ceil(3 * widest) + 1,) * 2, (0.01 * widest, widest), p=1.0)
augment = nn.Sequential(
    blur,
    K.Resize((side, side), antialias=True),
    K.RandomAffine(0, scale=(1.0, 1.2), padding_mode="border", p=1.0),
)
resize = K.Resize((side, side), antialias=True)


@torch.no_grad()
def to_target(pixels, changed=False):
    """uint8 pixels (batch, 3, height, width) -> pictures (batch, 3, side, side) in [-1, 1]."""
    with torch.autocast(pixels.device.type, enabled=False):
        x = pixels.float() / 255
        return 2 * (augment if changed else resize)(x).clamp(0, 1) - 1


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), pixels (batch, 3, height, width), with latent_mult
    latents (batch, channels, h, w).
    """
    latent = model(batch["voxels"])
    picture = autoencoder.model.decode(latent / scale).sample
    losses = {
        "pixels": (1.0, F.mse_loss(picture.float(), to_target(batch["pixels"], use_image_aug)))
    }
    if latent_mult:
        losses["latents"] = (latent_mult, F.l1_loss(latent.float(), batch["latents"]))
    return sum(weight * loss for weight, loss in losses.values()), {
        f"loss_{name}": loss.detach() for name, (_, loss) in losses.items()
    }


# %%
@torch.no_grad()
def validate(model):
    """Mean squared error of the pixels of the validation images, repeats averaged, and its share of
    what the mean picture leaves.
    """
    device = next(model.parameters()).device
    pairs = [
        (
            autoencoder.model.decode(model(b["voxels"]) / scale).sample.float(),
            to_target(b["pixels"]),
        )
        for b in iterate_batches(val, 50, device)
    ]
    predicted, seen = (torch.cat(x) for x in zip(*pairs, strict=True))
    mse = F.mse_loss(predicted, seen)
    return {
        "val/loss": mse.item(),
        "val/r2": 1 - (mse / (seen - seen.mean(0)).square().mean()).item(),
    }


# %%
def pairs(model, split, n):
    """The first n images of a split, seen and predicted, (n, 3, side, side) in [0, 1] each."""
    ids = subject.image_ids(split)[:n]
    seen = torch.from_numpy(subject.images(ids)).permute(0, 3, 1, 2)
    voxels = subject.average_rows(subject.rows_by_image(split)[:n], normaliser)
    latents = predict_latents(
        model, voxels, autoencoder.latent_shape, device=next(model.parameters()).device
    )
    return {"seen": to_target(seen) / 2 + 0.5, "predicted": autoencoder.decode(latents).cpu()}


def draw(model, epoch):
    """The first validation images."""
    figure = plot_image_grid(pairs(model, "val", 12))
    save_figure(figure, run.results / "figures" / f"02_samples_epoch{epoch:03d}.png")
    return {"samples": figure}


# %%
schedules = {"constant": "fixed", "constant_with_warmup": "warmup"}
optimisation = Optimisation(
    learning_rate * (batch_size if scale_lr else 1),
    scheduler=schedules.get(lr_scheduler, lr_scheduler),
    warmup_steps=warmup_steps,
    betas=(adam_beta1, adam_beta2),
    eps=adam_epsilon,
    weight_decay=adam_weight_decay,
)
batching = Batching(num_epochs, batch_size, seed, accumulate=gradient_accumulation_steps)
checkpointing = Checkpointing(
    resume=resume_from_ckpt, ckpt_interval=ckpt_interval, keep_epochs=bool(ckpt_interval)
)

# %%
if "network" in decoders:
    logger = open_tracker(run, wandb_log, wandb_project)
    history = fit(
        model,
        step,
        train,
        folder=run.logs / "low_level",
        config=config,
        batching=batching,
        optimisation=optimisation,
        execution=Execution(run.device, precision, num_workers),
        checkpointing=checkpointing,
        validate=validate,
        reporting=Reporting(logger, draw if ckpt_interval else None),
        begin=begin,
    )
    save_figure(plot_training_curves(history), run.results / "figures" / "02_training.png")
    best_epoch = history.iloc[history["val/loss"].argmin()]
    print(best_epoch[["epoch", "val/loss", "val/r2"]].round(4).to_dict())
    if logger is not None:
        logger.finish()

# %% [markdown]
# ## Ridge and kernel
# One linear map from the same voxels to the latent of the clean picture.
# The kernel decoder (`decoder` kernel or all) has a closed form too, and is nonlinear: it compares
# the voxels, weighed by their reliability, with those of every training image (docs/kernel.md).

# %%
fitted = {"network": model} if "network" in decoders else {}
for name in decoders:
    if name not in CLOSED_FORMS:
        continue
    begin()
    fitted[name] = fit_closed_form(
        name,
        run.logs / f"low_level_{name}.safetensors",
        subject,
        normaliser,
        targets["latents"],
        config,
        run.parameters,
    )
    print(f"{name}: {describe_closed_form(fitted[name])}")

# %% [markdown]
# ## A look at validation images, and the gallery of training images
# Training images are shown to be compared with the others: what is good there and bad here was
# learnt by heart. They are never scored.

# %%
trained = {name: decoder_of.eval().to(run.device) for name, decoder_of in fitted.items()}
rows = {name: pairs(m, "val", 12) for name, m in trained.items()}
save_figure(
    plot_image_grid(
        {"seen": next(iter(rows.values()))["seen"]}
        | {name: row["predicted"] for name, row in rows.items()}
    ),
    run.results / "figures" / "02_validation.png",
)

# %%
if gallery_images:
    examples = pairs(next(iter(trained.values())), "train", gallery_images)
    sheet = plot_contact_sheet(
        {"seen in training": examples["seen"], "predicted (not scored)": examples["predicted"]},
        n=gallery_images,
        blocks=4,
    )
    save_figure(sheet, run.results / "figures" / "training_images_not_scored.png")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "low_level"))

# %% [markdown]
# Blobs of the right colour in the right place are what an error of pixels leaves: their mean over
# everything that the voxels leave open. Where the ridge is as good, depth adds nothing.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py basic_ae --mini --to 00 -p mini_images
# 600`:
# - two epochs: `python run.py basic_ae --mini --from 02 --to 02 -p mini_images 600 -p num_epochs
#   2 -p model_name short`;
# - early visual areas alone: the same with `-p rois V1,V2,V3`;
# - ten components in place of all voxels: the same with `-p n_components 10`.
#
# Next: notebook 03 makes the gallery of test images, and needs no generator for it; 06 scores.
