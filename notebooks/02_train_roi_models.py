# %% [markdown]
# # 02 · Train low-level models of regions: a bag of voters
#
# **Question.** Which regions of the brain say how an image looks, and do models of different
# regions, trained on different images, see different things?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** for each voter `train_logs/<run>/<voter>/`:
# `low_level/` (checkpoints, history), for the baseline `low_level_ridge.safetensors`,
# `normaliser.safetensors` with the regions' voxels, `split.parquet` and `voter.json` (which images
# it saw, and by which seed).
#
# Cost: full size about 50 min a voter on a laptop's RTX 4060 (published: 15.3 s an epoch, 200
# epochs; not run here); mini about three minutes on two CPU cores, ridge baselines included.
#
# Source: the 2023 ROI project (github.com/Koios1143/Machine-Learning-Final). What is kept of it
# and what is not: docs/roi_voting.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
voters = "92,94,97,100"  # names of the voters, separated by commas, by default all of this run
rois = "set3;set1;set3;set3"  # regions whose voxels are used, by default all (docs/roi_voting.md)
bag_seeds = "3,2423,849,1921"  # seeds of the voters' bags, by default from seed on
train_share = 0.7  # share of the training images in a voter's bag, more than 0, at most 1
masked = False  # keep voxels of other regions as zeros, as published, instead of leaving them out
latents_file = ""  # latents that others computed, a row an image, by default from our autoencoder
repeats = "random"  # one of each, random, mean; what an epoch shows of an image with several trials

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
h = 2048  # width of the hidden layers, at least 1
n_blocks = 4  # residual or mixer blocks, at least 0
dropout = 0.3  # of the residual blocks, at least 0, at most 1
ups_mode = "4x"  # one of 4x, 8x, 16x
block_out_channels = ""  # widths of the upsampler, separated by commas, by default as published
checkpoint = "best"  # one of last, best; best is chosen on validation images

# optimisation
batch_sizes = "16,16,32,4"  # samples a step of each voter, or one for all, separated by commas
num_epochs = 200  # passes over the training images, at least 1
max_lr = 5.0e-4  # peak learning rate, never scaled by the number of processes, more than 0
voter_schedule = "cycle"  # one of cycle, published_cycle, fixed (docs/roi_voting.md)
precision = "no"  # one of no, bf16, fp16
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
seed = 0  # of everything random here

# logging
ckpt_interval = 0  # epochs between figures and kept checkpoints, 0 for none, at least 0

# %%
from src.parameters import configure

run = configure(globals(), "02_train_roi_models")
run

# %%
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from src.data import BrainDataset, LatentFile, Normaliser, cache_targets, open_subject
from src.decoding import (
    DecoderSizes,
    build_decoder_config,
    load_decoder,
    parse_voters,
    predict_latents,
)
from src.figures import plot_image_grid, plot_roi_sets, plot_training_curves, save_figure
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
    check_run,
    describe_closed_form,
    fit,
    fit_closed_form,
    iterate_batches,
)
from src.utils import atomic, count_parameters, peak_memory, resolve, write_json

# %% [markdown]
# ## Data
# The target of an image is the latent that the frozen autoencoder gives it, times the scaling
# factor of its diffusion model. Each voter draws its own bag of the training images; those that it
# does not draw validate it. The prepared validation and test images are in no bag.

# %%
subject = open_subject(dataset, subj)
all_voters = parse_voters(voters, rois, bag_seeds, batch_sizes, seed)
decoders = list_decoders(decoder)
print(plan_stage(run.stage, run.parameters) or "No network is trained.")
autoencoder = LatentAutoencoder(weights, "stable_diffusion", device=run.device)
shape, ids = autoencoder.latent_shape, subject.image_ids("train+val")
if latents_file:
    latents = LatentFile(resolve(latents_file), shape)
else:
    latents = cache_targets(
        dataset,
        "vae_latents",
        autoencoder.fingerprint(),
        subject.all_images,
        autoencoder.encode_pixels,
        shape,
    )
print(
    f"(channels, height, width) of a latent = {shape}   {len(subject.image_ids('train'))} training"
    f" images   protocol {subject.protocol}"
)


# %%
def prepare_voter(voter):
    """What one voter is trained with: its folder, the subject as its bag splits it, the normaliser
    that holds its voxels.
    """
    bag = subject.bootstrap_split(train_share, voter.bag_seed)
    return run.logs / voter.name, bag, Normaliser.fit(bag, rois=voter.rois, masked=masked)


# %%
def record_voter(voter):
    """Write down what one voter is trained with, and with the last one the parameters of all."""
    folder, bag, normaliser = at[voter.name]
    normaliser.save(folder / "normaliser.safetensors")
    table = bag.trials[["image", "split"]].drop_duplicates().sort_values("image", ignore_index=True)
    with atomic(folder / "split.parquet") as path:
        table.to_parquet(path)
    description = {
        "regions": list(normaliser.rois),
        "voxels": len(normaliser.mean[0]),
        "inputs": normaliser.n_features,
        "train_share": train_share,
        "test_set": subject.test_set,
        "images": table["split"].value_counts().to_dict(),
    }
    place = all_voters.index(voter)
    write_json(folder / "voter.json", {"place": place} | vars(voter) | description)
    if voter == all_voters[-1]:
        run.record_parameters()


# %%
at = {voter.name: prepare_voter(voter) for voter in all_voters}
pd.DataFrame(
    [
        {
            "voter": v.name,
            "rois": v.rois,
            "voxels": len(n.mean[0]),
            "inputs": n.n_features,
            "bag seed": v.bag_seed,
            "batch": v.batch_size,
            "training images": len(s.image_ids("train")),
        }
        for v in all_voters
        for _, s, n in [at[v.name]]
    ]
)

# %% [markdown]
# Which voxels each voter is given.

# %%
save_figure(
    plot_roi_sets(subject.voxels, {v.name: at[v.name][2].columns for v in all_voters}),
    run.results / "figures" / "02_regions.png",
)


# %% [markdown]
# ## The step
# Mean absolute error of the scaled latents.

# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), latents (batch, channels, h, w)."""
    return F.l1_loss(model(batch["voxels"]).float(), batch["latents"]), {}


def validation(val):
    """The same error over the validation images of one voter, repeats averaged."""

    @torch.no_grad()
    def validate(model):
        sums = [
            (
                F.l1_loss(model(b["voxels"]), b["latents"], reduction="sum").item(),
                b["latents"].numel(),
            )
            for b in iterate_batches(val, 100, next(model.parameters()).device)
        ]
        return {"val/loss": sum(total for total, _ in sums) / sum(n for _, n in sums)}

    return validate


# %%
RECORDED = (
    "train_share",
    "masked",
    "repeats",
    "num_epochs",
    "max_lr",
    "voter_schedule",
    "latents_file",
    "seed",
)


def configure_voter(voter, normaliser):
    """The config of one voter's checkpoint: its network and what it is trained with."""
    parameters = run.parameters | {"latent_size": shape[1], "use_cont": False}
    sizes = DecoderSizes((normaliser.n_features,))
    return {
        "model": build_decoder_config(run.stage, parameters, sizes),
        "latents": list(shape),
        "autoencoder": {"name": "stable_diffusion", "image_size": autoencoder.image_size},
        "training": vars(voter) | {name: run.parameters[name] for name in RECORDED},
    }


# %%
for voter in all_voters:
    folder, bag, normaliser = at[voter.name]
    check_run(folder, configure_voter(voter, normaliser), [bag], resume_from_ckpt)


# %%
def build_voter(voter, normaliser, config):
    """One voter's network; every voter begins alike, whatever came before it."""
    torch.manual_seed(seed)
    model = build_decoder(config["model"])
    regions = ", ".join(normaliser.rois) or "all voxels"
    print(f"{voter.name}: {count_parameters(model):,} weights to train on {regions}")
    return model


def optimise_voter(voter, bag):
    """How one voter is optimised; the published cycle counts all images of the bag."""
    n_cycle_steps = 0
    if voter_schedule == "published_cycle":
        n_cycle_steps = num_epochs * (len(bag.image_ids("train+val")) // voter.batch_size)
    schedule = voter_schedule.removeprefix("published_")
    return Optimisation(max_lr, scheduler=schedule, cycle_steps=n_cycle_steps, decay="published")


# %%
def train(voter):
    """Fit one voter's network, or go on with it; returns its history."""
    folder, bag, normaliser = at[voter.name]
    data = BrainDataset(bag, "train", {"latents": latents}, normaliser, repeats, seed)
    held_out = BrainDataset(bag, "val", {"latents": latents}, normaliser, "mean", seed)
    config = configure_voter(voter, normaliser)
    checkpointing = Checkpointing(
        resume=resume_from_ckpt, ckpt_interval=ckpt_interval, keep_epochs=bool(ckpt_interval)
    )
    return fit(
        build_voter(voter, normaliser, config),
        step,
        data,
        folder=folder / "low_level",
        config=config,
        batching=Batching(num_epochs, voter.batch_size, seed),
        optimisation=optimise_voter(voter, bag),
        execution=Execution(run.device, precision),
        checkpointing=checkpointing,
        validate=validation(held_out),
        begin=lambda: record_voter(voter),
    )


# %%
if "network" in decoders:
    histories = {voter.name: train(voter) for voter in all_voters}
    curves = pd.concat(
        [
            h[["train/loss", "val/loss"]].rename(columns=lambda c, v=v: c.replace("loss", v))
            for v, h in histories.items()
        ],
        axis=1,
    )
    save_figure(plot_training_curves(curves), run.results / "figures" / "02_training.png")

# %% [markdown]
# ## Ridge and kernel
# One linear map a voter, from the same voxels of the same images.
# The kernel decoder (`decoder` kernel or all) has a closed form too, and is nonlinear: it compares
# the voxels, weighed by their reliability, with those of every training image (docs/kernel.md).

# %%
closed_forms = [name for name in decoders if name in CLOSED_FORMS]
for voter in all_voters if closed_forms else []:
    record_voter(voter)
    folder, bag, normaliser = at[voter.name]
    config = {
        "model": None,  # the decoder's own
        "latents": list(shape),
        "autoencoder": {"name": "stable_diffusion", "image_size": autoencoder.image_size},
        "training": vars(voter) | {"train_share": train_share, "masked": masked},
    }
    for name in closed_forms:
        path = folder / f"low_level_{name}.safetensors"
        solved = fit_closed_form(name, path, bag, normaliser, latents, config, run.parameters)
        print(f"{voter.name}, {name}: {describe_closed_form(solved)}")


# %% [markdown]
# ## How well do they predict?
# Mean absolute error of the latents, repeats averaged: on the images of the voter's own bag, on
# those of the training images that it did not draw, and on the prepared validation images, which
# no voter saw. Beside it what it costs to know nothing: the mean latent of the bag, and the
# predictions of other images.

# %%
def errors(voter, name):
    """Errors of one decoder of a voter, a row of the table."""
    folder, bag, normaliser = at[voter.name]
    model = load_decoder(folder / files[name], run.device)[0]
    row_values = {"voter": voter.name, "decoder": name}
    for title, images_of, split in (
        ("its own images", bag, "train"),
        ("not drawn", bag, "val"),
        ("seen by none", subject, "val"),
    ):
        x, image_ids = images_of.get_mean_betas(split, normaliser=normaliser)
        true = torch.from_numpy(latents.rows(image_ids).astype(np.float32))
        row_values[title] = F.l1_loss(
            predict_latents(model, x, shape, device=run.device), true
        ).item()
    predicted = predict_latents(model, x, shape, device=run.device)
    mean = torch.from_numpy(latents.rows(bag.image_ids("train")[:2000]).astype(np.float32)).mean(0)
    return row_values | {
        "mean latent": (mean - true).abs().mean().item(),
        "wrong image": F.l1_loss(predicted.roll(1, 0), true).item(),
    }


# %%
files = {name: f"low_level_{name}.safetensors" for name in closed_forms}
files["network"] = f"low_level/{checkpoint}.safetensors"

# %%
table = pd.DataFrame([errors(voter, name) for voter in all_voters for name in decoders])
with atomic(run.results / "voters.csv") as path:
    table.to_csv(path, index=False)
table.round(4)

# %% [markdown]
# ## A look at validation images that no voter saw

# %%
example_ids = subject.image_ids("val")[:12]
rows = {"seen": torch.from_numpy(subject.images(example_ids)).permute(0, 3, 1, 2) / 255}
for voter in all_voters:
    folder, _, normaliser = at[voter.name]
    x = subject.average_rows(subject.rows_by_image("val")[:12], normaliser)
    predicted = predict_latents(
        load_decoder(folder / decoder_files[0], run.device)[0], x, shape, device=run.device
    )
    rows[f"voter {voter.name}"] = autoencoder.decode(predicted).cpu()
save_figure(plot_image_grid(rows), run.results / "figures" / "02_validation.png")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
for line in table.sort_values("seen by none").itertuples(index=False):
    print(f"voter {line[0]}, {line[1]}: mean absolute error of images that no voter saw", end=" ")
    print(f"{line[4]:.4f}; the mean latent {line[5]:.4f}, a wrong image {line[6]:.4f}")

# %% [markdown]
# An error on its own images far below the others is what a voter has learnt by heart. Regions
# whose voter is near "mean latent" say nothing about how an image looks. The published report
# gives errors of about .65 on images that were not drawn, without saying what the mean latent
# costs.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py roi_voting --mini --to 01 -p
# mini_images 600`:
# - two epochs: `python run.py roi_voting --mini --from 02 --to 02 -p mini_images 600 -p
#   num_epochs 2`;
# - another draw of training images for each voter: the same with `-p seed 7`;
# - voters that are given half of the images: the same with `-p train_share 0.5`.
#
# Next: notebook 03_vote.
