# %% [markdown]
# # 02 · Train Percept's decoder: voxels to tokens and latents, on simulated measurements
#
# **Question.** A few thousand images with three noisy measurements each are little to learn a
# nonlinear map from. Does it help to let the encoding model of notebook 01 measure images as often
# as we like?
#
# **Reads** `data/<dataset>/` (notebook 00) and the encoding model of notebook 01_train_encoder
# (`train_logs/<run>/encoder.safetensors` and its residuals). **Writes**
# `train_logs/<run>/high_level/` (best and last checkpoint, history): one network that predicts CLIP
# tokens and latents, which notebook 03 uses for both levels; and, for the ridge baseline,
# `high_level_ridge.safetensors` and `low_level_ridge.safetensors`.
#
# Cost: mini one to five minutes on two CPU cores, by `num_epochs`; memory and time at the size of
# NSD are in docs/percept.md.
#
# Source: docs/percept.md; the idea of training on simulated measurements is that of Brain-IT (arXiv
# 2510.25976).

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. percept/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
split = "images"  # one of images, cluster-held-out; docs/overlap.md explains the latter
n_clusters = 20  # clusters of which a quarter is held out, at least 4
num_sessions = 0  # training sessions, the first so many, 0 for all, at least 0
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)
pool = "train"  # images to measure: train, mini (its models' training images), or a folder
pool_images = 0  # the first so many images of the pool, 0 for all, at least 0
pool_overlap = "refuse"  # one of refuse, drop; what is done with test images in the pool
near_duplicate = 0.94  # cosine from which a pool image counts as a test image, at most 1
held_out_combination = ""  # labels whose combinations are held out, e.g. scene,kind,colour
measured_share = 0.3  # share of the samples that are measured, at least 0, at most 1
n_draws = 16000  # draws of noise, made once and used again at random, at least 1
encoder_name = ""  # run whose encoding model measures the pool, by default this one

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, both
clip_variant = "ViT-L/14"  # one of RN50, ViT-L/14, ViT-B/32, RN50x64, bigG; CLIP of the targets
norm_embs = True  # divide the CLIP tokens by the norm of their CLS token
token_components = 400  # principal components of the tokens that are predicted, at least 1
latent_components = 300  # of the latents, 0 for tokens alone, at least 0
basis_images = 20000  # images of the pool that the components are also of, at least 0
h = 1024  # width of the hidden layers, at least 1
n_blocks = 2  # residual or mixer blocks, at least 0
dropout = 0.1  # probability of dropout, at least 0, at most 1

# optimisation
batch_size = 128  # images or samples a step over all processes, at least 1
num_epochs = 22  # passes of epoch_steps steps each, at least 1
epoch_steps = 250  # steps of an epoch, at least 1
max_lr = 1.0e-3  # peak learning rate, never scaled by the number of processes, more than 0
warmup_share = 0.15  # share of the steps in which the rate rises, at least 0, at most 0.9
weight_decay = 0.05  # of AdamW, at least 0
weight_average = 0.998  # decay of the average of the weights that is used, 0 for none, at most 1
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
precision = "no"  # one of no, bf16, fp16
seed = 42  # of everything random here

# logging
ckpt_interval = 0  # epochs between figures and kept checkpoints, 0 for none, at least 0
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "stability"  # project of Weights & Biases

# %%
from src.parameters import configure

run = configure(globals(), "02_train_percept")
run

# %%
import numpy as np
import torch

from src.data import (
    BrainDataset,
    Normaliser,
    cache_targets,
    open_subject,
    select_training_split,
)
from src.decoding import DecoderSizes, build_decoder_config
from src.encoding import (
    MeasuredAndSimulated,
    TargetSet,
    check_pool,
    draw_noise_bank,
    encode_rows,
    fit_target_basis,
    open_pool,
    open_run_encoder,
    simulate_responses,
)

# %%
from src.figures import plot_image_grid, plot_training_curves, save_figure
from src.losses import cosine_similarity
from src.networks import build_decoder
from src.pipeline.dryrun import plan_stage
from src.pretrained import Clipper, LatentAutoencoder
from src.training import (
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    check_run,
    describe_history,
    describe_ridge,
    fit,
    fit_ridge_baseline,
    open_tracker,
    record_training,
)
from src.utils import HOME, peak_memory

# %% [markdown]
# ## Data
# What is read at test is the mean of all repeats; what is trained on is single trials. Their noise
# is larger, and that is what helps: a network that sees every image in three noisy versions cannot
# learn the noise of a mean by heart (docs/percept.md, ablation).

# %%
all_trials = open_subject(dataset, subj)
subject = select_training_split(
    all_trials,
    split,
    lambda: Clipper(weights, hidden=False, norm_embs=False, device=run.device),
    n_clusters,
    num_sessions,
)
print(plan_stage(run.stage, run.parameters) or "The ridge baseline alone is fitted.")
normaliser = Normaliser.fit(subject, rois=rois)
trials = BrainDataset(subject, "train", {}, normaliser, "each", seed)
val = BrainDataset(subject, "val", {}, normaliser, "mean", seed)
print(
    f"(training trials, voxels) = ({len(trials)}, {normaliser.n_features})   protocol"
    f" {subject.protocol}"
)

# %% [markdown]
# ## The pool
# Images that the encoding model measures: by default the training images themselves, of which it
# then makes as many measurements as we like. Any others must hold no validation or test image, no
# near-duplicate of one (by pixels and by embedding), and no combination that is held out; nothing
# but their pixels is used.

# %%
clipper = Clipper(
    weights, hidden=True, norm_embs=norm_embs, device=run.device, variant=clip_variant
)
autoencoder = LatentAutoencoder(weights, device=run.device)


def embed(images):
    """uint8 images (n, height, width, 3) -> CLIP's tokens, flat (n, tokens * dim)."""
    return clipper.encode_pixels(images).reshape(len(images), -1)


image_pool = check_pool(
    open_pool(pool, subject, pool_images),
    subject,
    embed,
    near_duplicate,
    held_out_combination,
    pool_overlap,
)
print(f"pool '{pool}': {len(image_pool)} images")


# %% [markdown]
# ## Targets
# CLIP's tokens and the autoencoder's latents, of training, validation and pool images, computed
# once. The network predicts their principal components about the mean of the training images. What
# the components leave out is lost, but on the mini world no decoder could read it from voxels.

# %%
def cache(folder, ids, name, frozen):
    """Targets of images, by a frozen model."""
    return cache_targets(
        folder, name, frozen.fingerprint(), ids, frozen.encode_pixels, frozen.target_shape
    )


frozen_models = {"clip_tokens": clipper}
if latent_components or decoder != "network":
    frozen_models["vae_latents"] = autoencoder
targets = {name: cache(dataset, subject.all_images, name, m) for name, m in frozen_models.items()}
pool_targets = {
    name: cache(image_pool.folder, image_pool.image_ids, name, m)
    for name, m in frozen_models.items()
}

# %%
components, bases = {"clip_tokens": token_components, "vae_latents": latent_components}, {}
train_ids, further_ids = subject.image_ids("train"), image_pool.image_ids[:basis_images]
for name in [name for name in frozen_models if components[name]]:
    further = []
    if pool != "train" and basis_images:
        further = [TargetSet(pool_targets[name], further_ids)]
    bases[name] = fit_target_basis(
        TargetSet(targets[name], train_ids), further, components[name], seed=seed
    )
    print(
        f"{name} {frozen_models[name].target_shape}: {len(bases[name].components)} components,"
        f" {bases[name].explained:.1%} of the variance"
    )

# %% [markdown]
# ## Model
# A plain MLP with two residual blocks, and a linear path beside it that learns at a tenth of the
# rate. Its last layer begins at zero: at the mean of all images.

# %%
recorded = ("batch_size", "num_epochs", "epoch_steps", "max_lr", "warmup_share", "weight_decay")
recorded += ("weight_average", "measured_share", "n_draws", "encoder_name", "seed")
recorded += ("split", "n_clusters", "num_sessions", "rois")
n_tokens, dim = clipper.target_shape
counts = {name: len(basis.components) for name, basis in bases.items()}
sizes = DecoderSizes(
    (normaliser.n_features,), n_tokens, dim, autoencoder.latent_shape, components=counts
)
config = {
    "model": build_decoder_config(run.stage, run.parameters, sizes),
    "training": {name: run.parameters[name] for name in recorded},
    "pool": image_pool.identity,
    "tokens": [n_tokens, dim],
    "latents": list(autoencoder.latent_shape),
    "clip": {"variant": clip_variant, "hidden": True, "norm_embs": norm_embs},
}

# %%
encoder, noise = None, None
if decoder != "ridge":
    logs = HOME / "train_logs" / encoder_name if encoder_name else run.logs
    encoder, noise = open_run_encoder(logs, subject, normaliser, run.parameters, run.device)
    print(f"the encoding model reads {', '.join(encoder.spaces)}")
check_run(run.logs, config, [subject], resume_from_ckpt)
begin = record_training(run, subject, normaliser)
model = build_decoder(config["model"])
model.set_bases(*[(basis.mean, basis.components, basis.variances) for basis in bases.values()])


# %% [markdown]
# ## Measuring the pool
# The encoding model predicts the response to each image; a draw of noise with the covariance of its
# out-of-fold residuals makes a measurement of it. These residuals hold what the encoder does not
# know and a third of the noise of a trial, as they are of means over three repeats.

# %%
def respond(ids):
    """Image ids of the pool (n,) -> responses without noise (n, voxels)."""
    return encoder.measure(image_pool.images(ids), pool_targets["clip_tokens"].rows(ids))


def encode(sources, ids):
    """Components (n, outputs) of the targets of images."""
    return encode_rows(model.encode_targets, [sources[name] for name in bases], ids)


# %%
if decoder != "ridge":
    samples = MeasuredAndSimulated(
        trials,
        encode(targets, trials.image_ids),
        simulate_responses(respond, image_pool.image_ids),
        encode(pool_targets, image_pool.image_ids),
        draw_noise_bank(noise, n_draws, seed),
        batch_size * epoch_steps,
        measured_share,
        seed,
    )
    print(
        f"an epoch: {samples.n_measured} measured trials,"
        f" {len(samples) - samples.n_measured} simulated of {len(samples.responses)} images"
    )


# %% [markdown]
# ## The step
# Squared error of the components, in units of the variance of the tokens'. What minimises it is the
# posterior mean, given everything that voxels tell.

# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), components (batch, outputs), simulated or not
    (batch,).
    """
    errors = model(batch["voxels"]) - batch["components"]
    errors = errors.square().sum(1) / model.token_variance  # (batch,)
    simulated = batch["simulated"]
    logs = {}
    for name, rows in (("simulated", simulated), ("measured", ~simulated)):
        if rows.any():
            logs[f"loss_{name}"] = errors[rows].mean().detach()
    return errors.mean(), logs


# %% [markdown]
# Validation looks at images of the validation split, on averaged repeats: the share of the tokens'
# and latents' variance that is explained, and how often the right image is the nearest, by the
# cosine of tokens about their mean.

# %%
R2_NAMES = {"clip_tokens": "token_r2", "vae_latents": "latent_r2"}
val_voxels = torch.from_numpy(subject.get_mean_betas("val", normaliser=normaliser)[0])
true = {
    name: torch.from_numpy(targets[name].rows(val.image_ids).astype(np.float32)) for name in bases
}


@torch.no_grad()
def predict(model):
    """Components, tokens and latents of the validation images."""
    device = model.token_mean.device
    parts = [model(block.to(device)).float() for block in val_voxels.split(100)]
    predicted = torch.cat(parts)
    outputs = {"clip_tokens": model.decode_tokens(predicted).cpu()}
    if "vae_latents" in bases:
        outputs["vae_latents"] = model.decode_latents(predicted).cpu()
    return predicted, outputs


# %%
def validate(model):
    """Loss, explained shares and retrieval over the whole validation split."""
    predicted, outputs = predict(model)
    right = [x.to(predicted.device) for x in true.values()]
    values = {"loss": model.compute_loss(predicted, model.encode_targets(*right)).item()}
    for name, output in outputs.items():
        error = (output.view_as(true[name]) - true[name]).square().mean()
        values[R2_NAMES[name]] = 1 - (error / true[name].var()).item()
    mean = model.token_mean.cpu()
    brain, image = (x.flatten(1) - mean for x in (outputs["clip_tokens"], true["clip_tokens"]))
    similar = cosine_similarity(brain, image)
    positions = torch.arange(len(similar))
    values["image_from_brain"] = (similar.argmax(1) == positions).float().mean().item()
    values["brain_from_image"] = (similar.argmax(0) == positions).float().mean().item()
    return {f"val/{name}": value for name, value in values.items()}


# %%
if decoder != "ridge":
    logger = open_tracker(run, wandb_log, wandb_project)
    steps = num_epochs * epoch_steps
    history = fit(
        model,
        step,
        samples,
        folder=run.logs / "high_level",
        config=config,
        batching=Batching(num_epochs, batch_size, seed),
        optimisation=Optimisation(
            max_lr,
            warmup_steps=round(warmup_share * steps),
            weight_decay=weight_decay,
            weight_average=weight_average,
        ),
        execution=Execution(run.device, precision),
        checkpointing=Checkpointing(resume=resume_from_ckpt, ckpt_interval=ckpt_interval),
        validate=validate,
        reporting=Reporting(logger),
        begin=begin,
    )

# %%
if decoder != "ridge":
    last = history.iloc[-1]
    print(
        f"validation: token R2 {last['val/token_r2']:.3f}, image from brain"
        f" {last['val/image_from_brain']:.3f}, brain from image {last['val/brain_from_image']:.3f}"
    )
    figure = plot_training_curves(history)
    save_figure(figure, run.results / "figures" / "02_training.png")
    if logger is not None:
        logger({"training_curves": figure}, int(last["train/num_steps"]))
        logger.finish()

# %% [markdown]
# The loss of simulated samples is below that of measured ones as far as the mean over repeats has
# less noise than a single trial. Both fall together: where that of measured trials rises while the
# other falls, the encoding model is learnt and no longer the brain.
#
# ## The ridge baselines
# One linear map from the averaged voxels to the tokens, one to the latents, as in the notebooks of
# MindEye. What is above them is what this notebook is worth.

# %%
if decoder != "network":
    begin()
    for level, name in (("high_level", "clip_tokens"), ("low_level", "vae_latents")):
        ridge = fit_ridge_baseline(
            run.logs / f"{level}_ridge.safetensors",
            subject,
            normaliser,
            targets[name],
            config,
            target_shape=frozen_models[name].target_shape,
            folds=ridge_folds,
            seed=seed,
        )
        print(f"ridge, {level}: {describe_ridge(ridge)}")

# %% [markdown]
# ## A look at validation images
# Seen, what the autoencoder itself keeps of it, and the latent that is read from the brain: the
# posterior mean, blurry where voxels leave much open. The generator of notebook 03 begins there.

# %%
if decoder != "ridge" and latent_components:
    first = val.image_ids[:12]
    rows = {
        "seen": torch.from_numpy(subject.images(first)).permute(0, 3, 1, 2) / 255,
        "autoencoder": autoencoder.decode(true["vae_latents"][:12]).cpu(),
        "network": autoencoder.decode(predict(model)[1]["vae_latents"][:12]).cpu(),
    }
    save_figure(plot_image_grid(rows), run.results / "figures" / "02_validation.png")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "high_level"))

# %% [markdown]
# Look whether `val/token_r2` still rises in the last epochs: then a longer training, or more
# images, pay. With `decoder` both, compare it with the ridge regression above. It is the share of
# the variance about one number, the mean of all entries, so that the mean image alone is above 0.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py percept --mini --to 01 -p mini_images
# 600`:
# - one epoch: `python run.py percept --mini --from 02 --to 02 -p mini_images 600 -p num_epochs
#   1`;
# - no simulated measurements, only real trials: the same with `-p measured_share 1.0`;
# - early visual areas alone: the same with `-p rois V1,V2,V3`.
#
# Next: notebook 03 reconstructs images from both outputs of this one network.
