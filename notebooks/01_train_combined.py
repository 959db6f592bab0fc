# %% [markdown]
# # 01 · Train the combined model: voxels and diffusion prior end to end
#
# **Question.** What does a prior that already knows how captions become images make of brain
# activity, when both are trained as one network?
#
# **Reads** `data/<dataset>/` (notebook 00), or fetches the published shards (`remote_data`).
# **Writes** `train_logs/<run>/high_level/` (best and last checkpoint, history), for the ridge
# baseline `train_logs/<run>/high_level_ridge.safetensors`, and samples to
# `results/<run>/figures/`.
#
# The early system: voxel2clip predicts CLIP's one final embedding, LAION's text to image prior
# takes it in place of a caption's, Stable Diffusion image variations paint the result. Parameters
# have the published names; docs/combined.md says where ours differs from the published code and
# why.
#
# Cost: full size not measured; mini about two minutes on two CPU cores.
#
# Source: the combined model that preceded MindEye (arXiv 2305.18274), February to May 2023.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
remote_data = False  # fetch what data_path lacks first (docs/downloads.md)
data_commit = "9947586218b6b7c8cab804009ddca5045249a38d"  # their revision
cache_dir = ""  # where they are kept, by default percept-shards in the system's temporary folder
subj = 1  # subject, at least 1
modality = "image"  # one of image, text; text learns the embeddings of captions instead of images
voxel_dims = 1  # 1 for (trials, voxels), 3 for whole volumes, at least 1, at most 3
use_image_aug = False  # targets of randomly augmented images

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
clip_variant = "ViT-L/14"  # one of RN50, ViT-L/14, ViT-B/32, RN50x64, bigG; CLIP of the targets
clamp_embs = False  # limit CLIP's embeddings to [-1.5, 1.5]
arch = "brainnet"  # voxel2clip, one of brainnet, 3dconv, 3dconv-simple; the last two read volumes
h = 4096  # width of the hidden layers, at least 1
n_blocks = 4  # residual or mixer blocks, at least 0
conv_channels = ""  # channels of the convolutions, e.g. 64,128,256,64, by default as published
conv_strides = ""  # their strides, by default 1,2,3,3
combine_models = True  # train voxel2clip with the prior, otherwise it is frozen (voxel2clip_path)
voxel2clip_path = ""  # weights of voxel2clip, a released .pth or a checkpoint of ours
laion_prior = ""  # checkpoint of LAION's text-to-image prior, from which the 1x768 prior starts
prior_depth = 12  # layers of the prior's transformer, at least 0
prior_heads = 12  # attention heads of the prior, at least 1
prior_dim_head = 64  # width of an attention head of the prior, at least 1
timesteps = 1000  # noise levels of the prior, at least 0
max_text_len = 256  # slots for text encodings of the 1x768 prior, at least 1
image_embed_scale = 0.0  # factor on embeddings before noise, 0 for sqrt(dim), at least 0
num_inference_steps = 50  # steps of the image generator's schedule, at least 1

# optimisation
combine_losses = True  # add the contrastive loss, otherwise the prior's squared error alone
loss_form = "run"  # one of run, stated; how the two losses are weighed (docs/combined.md)
alpha = 0.01  # weight of the squared error, at least 0, at most 1
alpha_schedule = "constant"  # one of constant, linear
alpha_end = 0.05  # what the linear schedule ends with, at least 0, at most 1
use_mixco = False  # MixCo, then SoftCLIP, instead of InfoNCE
mixup_pct = 0.5  # share of the epochs that mix voxels of two images, negative for none, at most 1
clip_aug_mode = "none"  # one of none, x, y; image variations as conditions (x) or targets (y)
clip_aug_prob = 0.03  # share of the batches in which clip_aug_mode acts, at least 0, at most 1
faithful = ""  # published behaviours instead of ours, separated by commas (docs/faithful.md)
batch_size = 64  # images or samples a step over all processes, at least 1
num_epochs = 60  # passes over the training images, at least 1
lr_scheduler_type = "cycle"  # one of cycle, linear, fixed
max_lr = 3.0e-4  # peak learning rate, never scaled by the number of processes, more than 0
initial_lr = 1.0e-3  # learning rate of the schedule fixed, more than 0
precision = "no"  # one of no, bf16, fp16
first_batch = False  # train on the first batch alone, which must then be learnt by heart
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
seed = 0  # of everything random here

# logging
ckpt_saving = True  # write checkpoints
ckpt_interval = 0  # epochs between figures and kept checkpoints, 0 for none, at least 0
save_at_end = False  # choose no best epoch, keep the last one only
n_samples_save = 8  # validation images reconstructed for monitoring, 0 for none, at least 0
sample_interval = 1  # epochs between these reconstructions, at least 1
sd_scheduler = "unipcm"  # how these are sampled, one of pndms, unipcm
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "fMRI-reconstruction-NSD"  # project of Weights & Biases
wandb_run_name = ""  # name of the run there, by default the run's
wandb_notes = ""  # notes on the run there
wandb_host = ""  # address of a server of one's own, by default that of the login

# %%
from src.parameters import configure

run = configure(globals(), "01_train_combined")
run

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from src.data import BrainDataset, Normaliser, cache_targets, open_subject, subject_folder
from src.decoding import (
    DecoderSizes,
    PriorSampling,
    build_decoder_config,
    check_combined_parameters,
    check_volumes,
    compute_fid,
    embed_captions,
    embed_variations,
    generate_sample_grid,
    load_generator,
    predict_tokens,
    set_sampler,
)
from src.figures import plot_image_grid, plot_training_curves, save_figure

# %%
from src.losses import (
    combined_loss,
    compute_alpha,
    cosine_anneal,
    cosine_similarity,
    info_nce,
    l2_normalize,
    mixco,
    mixco_nce,
    soft_clip_loss,
)
from src.networks import build_decoder, load_laion_prior, load_voxel2clip
from src.parameters import list_decoders, parse_names
from src.pipeline.dryrun import plan_stage
from src.pretrained import Clipper, FeatureNetwork
from src.readers import prepare_if_missing

# %%
from src.training import (
    CLOSED_FORMS,
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    append_row,
    build_clip_augmentation,
    check_precision,
    check_run,
    describe_closed_form,
    describe_history,
    fit,
    fit_closed_form,
    gather,
    iterate_batches,
    open_tracker,
    record_training,
    select_local_rows,
)
from src.utils import PerceptError, count_parameters, peak_memory, resolve, seeded

# %% [markdown]
# ## Data
# Voxels are z-scored per session with the statistics of training trials. A training step sees one
# random repeat of an image, validation the mean of its repeats.

# %%
published = parse_names(faithful, ("mixed_targets", "mixco_labels", "norm_decay"), "faithful")
combine_losses = combine_losses and combine_models  # a frozen voxel2clip has no loss of its own
check_combined_parameters(run.parameters | {"combine_losses": combine_losses})
if laion_prior and not resolve(laion_prior).is_file():
    raise PerceptError(
        f"laion_prior is '{laion_prior}', where there is no file: fetch LAION's prior, or leave it"
        " empty to begin with a fresh one."
    )
decoders = list_decoders(decoder)
if "network" in decoders:
    check_precision(run.device, precision)
source = data_path
if remote_data and not subject_folder(dataset, subj).exists():
    from src.pipeline.download import fetch

    source = cache_dir or str(Path(tempfile.gettempdir()) / "percept-shards")
    fetch("mindeye_early", source, subj=subj, revision=data_commit)

# %%
prepare_if_missing("mindeye", source, dataset, subj)
subject = open_subject(dataset, subj)
check_volumes(voxel_dims, subject.volume_shape)
print(plan_stage(run.stage, run.parameters) or "No network is trained.")
normaliser = Normaliser.fit(subject)
print(
    f"(train images, voxels) = ({len(subject.image_ids('train'))}, {normaliser.n_features})  "
    f" volume {subject.volume_shape}"
)

# %% [markdown]
# ## Targets
# CLIP's final embedding, not normalised, of the image or of one of its captions: in training a
# random one, in validation the first.

# %%
clipper = Clipper(
    weights,
    hidden=False,
    norm_embs=False,
    device=run.device,
    variant=clip_variant,
    clamp_embs=clamp_embs,
)
images = cache_targets(
    dataset,
    "clip_tokens",
    clipper.fingerprint(),
    subject.all_images,
    clipper.encode_pixels,
    clipper.target_shape,
)
augment = build_clip_augmentation(clipper.size)
trained_on, validated_on = ({} if use_image_aug else {"embedding": images}), {"embedding": images}
if modality == "text":
    captions = embed_captions(dataset, subject.captions, clipper)
    trained_on, validated_on = (
        {"embedding": captions},
        {"embedding": captions.first(subject.image_ids("val"))},
    )
train = BrainDataset(subject, "train", trained_on, normaliser, "random", seed, pixels=use_image_aug)

# %%
val = BrainDataset(subject, "val", validated_on, normaliser, "mean", seed)
print(
    f"dim = {clipper.dim}   targets:"
    f" {modality}{', augmented at every step' if use_image_aug else ''}"
)

# %% [markdown]
# ## Model
# voxel2clip inside the prior: the prior's loss reaches the voxels. Frozen (`combine_models =
# False`), it is what it was, and the prior alone learns.

# %%
recorded = (
    "combine_models",
    "combine_losses",
    "loss_form",
    "alpha",
    "alpha_schedule",
    "alpha_end",
    "use_mixco",
    "mixup_pct",
    "modality",
    "use_image_aug",
)
recorded += (
    "clip_aug_mode",
    "clip_aug_prob",
    "faithful",
    "voxel2clip_path",
    "laion_prior",
    "batch_size",
    "num_epochs",
    "max_lr",
    "initial_lr",
    "first_batch",
    "seed",
)

# %%
sizes = DecoderSizes((normaliser.n_features,), dim=clipper.dim, volume=subject.volume_shape)
config = {
    "model": build_decoder_config(run.stage, run.parameters, sizes),
    "training": {name: run.parameters[name] for name in recorded},
    "tokens": [1, clipper.dim],
    "clip": {
        "variant": clip_variant,
        "hidden": False,
        "norm_embs": False,
        "clamp_embs": clamp_embs,
    },
}
check_run(run.logs, config, [subject], resume_from_ckpt)
record_run = record_training(run, subject, normaliser)
model = build_decoder(config["model"])
if laion_prior:
    fresh = load_laion_prior(resolve(laion_prior), model)
    print(
        "the prior starts as LAION's; fresh are"
        f" {', '.join(key for key in fresh if not key.startswith('voxel2clip.'))} and voxel2clip"
    )
if voxel2clip_path:
    load_voxel2clip(resolve(voxel2clip_path), model.voxel2clip)

# %%
model.voxel2clip.requires_grad_(combine_models)
print(
    f"voxel2clip {count_parameters(model.voxel2clip):,} parameters, together with the prior"
    f" {count_parameters(model):,}"
)

# %% [markdown]
# ## The step
# The contrastive loss makes the predicted embedding point to its image, the prior's squared error
# makes it a condition from which that image's embedding can be denoised. `alpha` weighs the two;
# `gather` brings in the samples of other processes.

# %%
mix_epochs = 0
if use_mixco:
    mix_epochs = int(mixup_pct * num_epochs)
soft_temps = cosine_anneal(0.004, 0.0075, num_epochs - mix_epochs)


def contrast(brain, image, epoch, mix):
    """Contrastive loss of brain and target embeddings (batch, 1, dim) over all processes."""
    brain, image = gather(l2_normalize(brain)), gather(l2_normalize(image))
    if mix:
        return mixco_nce(brain, image, 0.006, *mix, faithful="mixco_labels" in published)
    return (
        soft_clip_loss(brain, image, soft_temps[epoch - mix_epochs])
        if use_mixco
        else info_nce(brain, image)
    )


# %%
def target_of(batch):
    """Target embeddings (batch, 1, dim): from the cache, or of images that are augmented now."""
    embeddings = (
        batch["embedding"]
        if "embedding" in batch
        else clipper.embed_image(augment(batch["pixels"].float() / 255)).float()
    )
    return embeddings[:, None]


# %%
diffusion = None
if n_samples_save or clip_aug_mode != "none":
    diffusion = set_sampler(load_generator(1, weights, run.device), sd_scheduler)


# %%
def embed_variation(embedding, batch, noise_seed):
    """CLIP's embedding (batch, 1, dim) of the images that the generator makes of an embedding."""
    variation = embed_variations(diffusion, clipper, embedding[:, 0], batch["image"], noise_seed)
    return variation[:, None]


def vary(model, brain, target, batch):
    """Condition and target (batch, 1, dim), for some batches with an image variation in the place
    of one of them; and whether it is one of these.
    """
    chance = np.random.default_rng([seed, int(gather(batch["seed"])[0])])
    if clip_aug_mode == "none" or chance.random() >= clip_aug_prob:
        return brain, target, False
    noise_seed = int(chance.integers(2**31))
    if clip_aug_mode == "x":  # what CLIP sees in the image, in place of what the brain says of it
        variation = embed_variation(target, batch, noise_seed)
        direction = variation / variation.norm(dim=-1, keepdim=True)
        return direction * brain.norm(dim=-1, keepdim=True), target, True
    with torch.no_grad():  # the image of what the prior predicts is to be predicted
        scaled = model(text_embed=brain, image_embed=target, seeds=batch["seed"])[1]
    return brain, embed_variation(scaled / model.image_embed_scale, batch, noise_seed), True


# %%
def mix_batch(voxels, target, batch):
    """Voxels mixed in pairs (MixCo), the target, mixed too where that is asked for, and the mix."""
    with seeded(int(gather(batch["seed"])[0])):
        mixed, *mix = mixco(gather(voxels))
    if "mixed_targets" in published:  # the labels of the contrastive loss mix, too
        perm, betas, _ = mix
        share, every_target = betas[:, None, None], gather(target)
        target = select_local_rows(share * every_target + (1 - share) * every_target[perm])
    return select_local_rows(mixed), target, mix


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), embedding (batch, dim) or pixels, seed and image
    (batch,).
    """
    voxels, target, mix = batch["voxels"], target_of(batch), ()
    if epoch < mix_epochs:
        voxels, target, mix = mix_batch(voxels, target, batch)
    if not combine_models:
        model.voxel2clip.eval()  # frozen are its dropout and the statistics of its norms, too
    brain, _ = model.voxel2clip.predict_tokens(voxels)  # (batch, 1, dim)
    condition, goal, changed = vary(model, brain, target, batch)
    mse = model(text_embed=condition, image_embed=goal, seeds=batch["seed"])[0]
    logs = {"loss_mse": mse.detach()}
    if clip_aug_mode != "none":
        logs[f"loss_{'on' if changed else 'off'}_aug"] = mse.detach()
    if not combine_losses:
        return mse, logs
    weight = compute_alpha(epoch, num_epochs, alpha_schedule, alpha, alpha_end)
    nce = contrast(brain, target, epoch, mix)
    logs |= {"loss_nce": nce.detach(), "alpha": weight}
    return combined_loss(mse, nce, weight, loss_form), logs


# %% [markdown]
# Validation looks at the validation split only, all of it at once, on averaged repeats: InfoNCE
# and the first `alpha` throughout, so that epochs can be compared. `cosine_sim_base` is the
# similarity to the embedding of another image.

# %%
def predict_batch(model, batch):
    """Of one batch: the brain's embeddings, the true ones (batch, 1, dim), and the errors of the
    prior (batch,).
    """
    brain, _ = model.voxel2clip.predict_tokens(batch["voxels"])
    target = target_of(batch)
    guess = model(text_embed=brain, image_embed=target, seeds=batch["seed"])[1]
    return brain, target, (guess - target * model.image_embed_scale).square().mean((1, 2))


# %%
@torch.no_grad()
def validate(model):
    """Losses and retrieval over the whole validation split."""
    device = next(model.parameters()).device
    outputs = [predict_batch(model, batch) for batch in iterate_batches(val, batch_size, device)]
    brains, targets, errors = (torch.cat(parts).float() for parts in zip(*outputs, strict=True))
    brain, image = l2_normalize(brains), l2_normalize(targets)
    similar = cosine_similarity(brain, image)
    right = torch.arange(len(brain), device=brain.device)
    mse, nce = errors.mean(), info_nce(brain, image)
    values = {
        "loss": combined_loss(mse, nce, alpha, loss_form) if combine_losses else mse,
        "loss_mse": mse,
        "loss_nce": nce,
        "cosine_sim": similar.diagonal().mean(),
        "cosine_sim_base": similar.diagonal(1).mean(),
        "image_from_brain": (similar.argmax(1) == right).float().mean(),
        "brain_from_image": (similar.argmax(0) == right).float().mean(),
    }
    return {f"val/{name}": value.item() for name, value in values.items()}


# %% [markdown]
# Samples while training, of training and of validation images: what was seen, what the generator
# makes of its true embedding, and four samples from the brain. FID between the samples and what
# was seen needs two images and says little of so few.

# %%
def begin():
    """Write down what the run is trained with, once it is found to be of these settings."""
    record_run()
    if "network" in decoders and not resume_from_ckpt:
        distances.unlink(missing_ok=True)


eye = None
if n_samples_save >= 2:
    eye = FeatureNetwork("InceptionV3", weights, run.device)
distances = run.results / "fid.csv"


# %%
def draw_split(model, split, n_images):
    """Rows of images of a split by name: seen ones, and those made from brain and image."""
    ids = subject.image_ids(split)[:n_images]
    voxels = subject.average_rows(subject.rows_by_image(split)[: len(ids)], normaliser)
    truth = captions.first(ids) if modality == "text" else images.rows(ids)
    seen = torch.from_numpy(subject.images(ids)).permute(0, 3, 1, 2) / 255
    rows = generate_sample_grid(
        model, diffusion, voxels, truth, ids, steps=num_inference_steps, seed=42
    )
    return {"seen": seen} | rows


# %%
def draw(model, epoch):
    """Grids of samples and FID of an epoch by name."""
    figures, distances_now = {}, {}
    for split, n_images in (("train", n_samples_save // 2), ("val", n_samples_save)):
        n_images = min(n_images, len(subject.image_ids(split)))
        if not n_images:
            continue
        rows = draw_split(model, split, n_images)
        figures[f"{split}/samples"] = plot_image_grid(rows, n=n_images)
        file = run.results / "figures" / f"01_samples_{split}_epoch{epoch:03d}.png"
        save_figure(figures[f"{split}/samples"], file)
        if n_images > 1:
            from_brain = [images for name, images in rows.items() if name.startswith("brain")]
            distances_now[f"{split}/FID"] = compute_fid(eye, rows["seen"], torch.cat(from_brain))
    if distances_now:
        append_row(distances, {"epoch": epoch} | distances_now)
    return figures | distances_now


# %%
batching = Batching(num_epochs, batch_size, seed)
optimisation = Optimisation(
    max_lr if lr_scheduler_type == "cycle" else initial_lr,
    scheduler=lr_scheduler_type,
    decay="published" if "norm_decay" in published else "no_norms",
)
checkpointing = Checkpointing(
    resume=resume_from_ckpt,
    checkpoints=ckpt_saving,
    ckpt_interval=ckpt_interval,
    keep_epochs=True,
    save_at_end=save_at_end,
)
samples = train
if first_batch:
    samples = Subset(train, range(min(batch_size, len(train))))

# %%
if "network" in decoders:
    logger = open_tracker(
        run, wandb_log, wandb_project, name=wandb_run_name, notes=wandb_notes, host=wandb_host
    )
    history = fit(
        model,
        step,
        samples,
        folder=run.logs / "high_level",
        config=config,
        batching=batching,
        optimisation=optimisation,
        execution=Execution(run.device, precision),
        checkpointing=checkpointing,
        validate=validate,
        reporting=Reporting(logger, draw if n_samples_save else None, sample_interval),
        begin=begin,
    )
    figure = plot_training_curves(history)
    save_figure(figure, run.results / "figures" / "01_training.png")
    if logger is not None:
        logger({"training_curves": figure}, int(history["train/num_steps"].iloc[-1]))
        logger.finish()

# %% [markdown]
# ## Does the prior earn its place?
# Validation images, repeats averaged: how near one sample of the prior comes to the true
# embedding, and how near the mean of eight, as the share of its variance. Where the mean of what
# the brain leaves open has R2 = r, a faithful sample has 2r - 1 (docs/prior.md).

# %%
if "network" in decoders:
    x, ids = subject.get_mean_betas("val", normaliser=normaliser)
    truth = captions.first(ids) if modality == "text" else images.rows(ids)
    truth, steps = torch.from_numpy(truth[:100].astype(np.float32))[:, None], min(100, timesteps)
    tokens, _ = predict_tokens(
        model,
        x[:100],
        (1, clipper.dim),
        PriorSampling(8, timesteps=steps, seed=seed),
        ids[:100],
        device=run.device,
    )
    for name, predicted in (
        ("one sample of the prior", tokens[:, 0]),
        ("mean of eight samples", tokens.mean(1)),
    ):
        print(
            f"validation embedding R2, {name}: {1 - F.mse_loss(predicted, truth) / truth.var():.3f}"
        )

# %% [markdown]
# ## Ridge and kernel
# One linear map from the averaged voxels to the image's embedding, its penalty chosen by
# cross-validation within the training images. A network that is not better than this has learnt
# nothing that needs a network.
# The kernel decoder (`decoder` kernel or all) has a closed form too, and is nonlinear: it compares
# the voxels, weighed by their reliability, with those of every training image (docs/kernel.md).

# %%
for name in decoders:
    if name not in CLOSED_FORMS:
        continue
    record_run()
    solved = fit_closed_form(
        name,
        run.logs / f"high_level_{name}.safetensors",
        subject,
        normaliser,
        images,
        config,
        run.parameters,
        (1, clipper.dim),
    )
    print(f"{name}: {describe_closed_form(solved)}")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "high_level"))

# %% [markdown]
# In the grids, "true embedding" is the best that the generator can do; samples from the brain of
# training images may be better than those of validation images, which is overfitting.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py combined --mini --to 00 -p mini_images
# 600`:
# - fewer passes, to see when retrieval begins to rise: `python run.py combined --mini --from 01
#   --to 01 -p mini_images 600 -p num_epochs 2 -p model_name short`;
# - a prior with fewer noise levels: the same with `-p timesteps 50`;
# - the contrast weighed less: the same with `-p alpha 1.0`.
#
# Next: notebook 03 reconstructs the test images.
