# %% [markdown]
# # 01 · Train the high level: voxels to CLIP tokens
#
# **Question.** Can brain activity be mapped into the space in which CLIP describes images, well
# enough to find the image that was seen (contrastive loss) and to condition a diffusion model on
# it (diffusion prior)?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/high_level/` (best and
# last checkpoint, history) and, for the ridge baseline,
# `train_logs/<run>/high_level_ridge.safetensors`.
#
# Two models: all 257 tokens of CLIP's last layer (`hidden`, for Versatile Diffusion), or its one
# final embedding (`--no-hidden --no-norm_embs`, recipe `mindeye_retrieval`, for large indexes and
# Stable Diffusion image variations). Flags have the published names; docs/faithful.md says where a
# default differs and why.
#
# Cost: full size not measured (predicted, not run: one to two hours on one H200), 20 GB of
# checkpoints and state; mini about four minutes on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, sections 2.1-2.3.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1
split = "images"  # one of images, cluster-held-out; docs/overlap.md explains the latter
n_clusters = 20  # clusters of which a quarter is held out, at least 4
num_sessions = 0  # training sessions, the first so many, 0 for all, at least 0
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)
n_components = 0  # principal components in place of voxels, 0 for the voxels, at least 0
use_image_aug = True  # targets of randomly augmented images
cached_views = 0  # augmented versions of an image made once, 0 augments every step, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
hidden = True  # all tokens of CLIP's last layer (257x768), otherwise its final embedding (1x768)
clip_variant = "ViT-L/14"  # one of RN50, ViT-L/14, ViT-B/32, RN50x64, bigG; CLIP of the targets
norm_embs = True  # divide the CLIP tokens by the norm of their CLS token
prior = True  # use the diffusion prior
v2c = True  # train with the contrastive losses
use_projector = True  # a separate head for the contrastive losses
h = 4096  # width of the hidden layers, at least 1
n_blocks = 4  # residual or mixer blocks, at least 0
projector_dim = 2048  # width of the projector, at least 1
prior_depth = 0  # layers of the prior's transformer, at least 0
prior_heads = 12  # attention heads of the prior, at least 1
prior_dim_head = 64  # width of an attention head of the prior, at least 1
timesteps = 0  # noise levels of the prior, at least 0
max_text_len = 256  # slots for text encodings of the 1x768 prior, at least 1
laion_prior = ""  # checkpoint of LAION's text-to-image prior, from which the 1x768 prior starts

# optimisation
batch_size = 32  # images or samples a step over all processes, at least 1
num_epochs = 240  # passes over the training images, at least 1
mixup_pct = 0.33  # share of the epochs that mix voxels of two images, negative for none, at most 1
max_lr = 3.0e-4  # peak learning rate, never scaled by the number of processes, more than 0
lr_scheduler_type = "cycle"  # one of cycle, linear, fixed
prior_mult = 0.0  # weight of the prior's loss, 0 for the published 30 (hidden) or .03, at least 0
mse_mult = 0.0  # ours, weight of a direct regression of the tokens by the backbone, at least 0
faithful = ""  # published behaviours instead of ours, separated by commas (docs/faithful.md)
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
precision = "no"  # one of no, bf16, fp16
step_in_backward = False  # update each parameter as its gradient arrives, which saves memory
seed = 42  # of everything random here

# evaluation
plot_umap = False  # draw a UMAP of brain and image embeddings
umap_label = ""  # column of the image labels that colours the UMAP

# logging
ckpt_saving = True  # write checkpoints
ckpt_interval = 5  # epochs between figures and kept checkpoints, 0 for none, at least 0
save_at_end = False  # choose no best epoch, keep the last one only
n_samples_save = 0  # validation images reconstructed for monitoring, 0 for none, at least 0
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "stability"  # project of Weights & Biases

# %%
from src.parameters import configure

run = configure(globals(), "01_train_high_level")
run

# %%
import numpy as np
import torch
import torch.nn.functional as F

from src.data import (
    BrainDataset,
    Normaliser,
    cache_augmented_targets,
    cache_targets,
    open_subject,
    select_training_split,
)
from src.decoding import DecoderSizes, PriorSampling, build_decoder_config, predict_tokens
from src.figures import plot_embeddings, plot_image_grid, plot_training_curves, save_figure
from src.losses import (
    cosine_anneal,
    cosine_similarity,
    l2_normalize,
    mixco,
    mixco_nce,
    soft_clip_loss,
)
from src.networks import build_decoder, load_laion_prior
from src.parameters import list_decoders, parse_names
from src.pipeline.dryrun import plan_stage

# %%
from src.pretrained import Clipper
from src.readers import prepare_if_missing
from src.training import (
    CLOSED_FORMS,
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    apply_augmentation,
    build_clip_augmentation,
    check_precision,
    check_run,
    describe_closed_form,
    fit,
    fit_closed_form,
    gather,
    iterate_batches,
    open_tracker,
    record_training,
    select_local_rows,
)
from src.utils import PerceptError, peak_memory, resolve, seeded

# %% [markdown]
# ## Data
# Voxels are z-scored per session with the statistics of training trials. A training step sees one
# random repeat of an image, validation the mean of its repeats.
#
# Three tests need a training of their own (docs/overlap.md). With `split = "cluster-held-out"` no
# training or validation image is like the test images of a quarter of the clusters: is an image
# recognised, or a category that was trained? With `n_components` the networks see that many
# principal components of the voxels in place of the voxels: how much of the brain do they need?
# With `num_sessions` they are trained on the first so many sessions alone, and tested on the whole
# test set (docs/sweeps.md): how long has someone to lie in the scanner?

# %%
published = parse_names(
    faithful,
    ("mixco_labels", "norm_decay", "batch_repeats", "resampled_epochs", "train_on_val"),
    "faithful",
)
if not (prior or v2c):
    raise PerceptError("Neither prior nor v2c is trained: leave at least one of them on.")
if laion_prior and (hidden or not resolve(laion_prior).is_file()):
    raise PerceptError(
        f"laion_prior is '{laion_prior}': it must be a file, and begins the 1x768 model alone"
        " (hidden False, norm_embs False)."
    )
if timesteps == 1:
    raise PerceptError(
        "timesteps is 1: a prior needs at least 2 noise levels, or 0 for the published number."
    )
decoders = list_decoders(decoder)
if "network" in decoders:
    check_precision(run.device, precision, step_in_backward)

# %%
prepare_if_missing("mindeye", data_path, dataset, subj)
all_trials = open_subject(dataset, subj)
subject = select_training_split(
    all_trials,
    split,
    lambda: Clipper(weights, hidden=False, norm_embs=False, device=run.device),
    n_clusters,
    num_sessions,
)
if subject is not all_trials:
    remaining = {
        part: f"{len(subject.image_ids(part))} of {len(all_trials.image_ids(part))}"
        for part in ("train", "val")
    }
    print(
        f"images kept: {remaining}; test images in held-out clusters:"
        f" {subject.in_excluded_clusters(subject.image_ids('test')).sum()}, protocol"
        f" {subject.protocol}"
    )
print(plan_stage(run.stage, run.parameters) or "No network is trained.")
normaliser = Normaliser.fit(subject, n_components=n_components, rois=rois)
train_split = "train"

# %%
if "train_on_val" in published:
    train_split = "train+val"

# %%
print(
    f"(train images, {'components' if n_components else 'voxels'}) ="
    f" ({len(subject.image_ids(train_split))}, {normaliser.n_features})"
)

# %% [markdown]
# ## Targets
# CLIP's tokens, computed once and cached with a fingerprint of the model that made them. With
# augmentation the training targets are those of augmented images: of a few cached versions, or
# made anew at every step. Validation images are never augmented.

# %%
clipper = Clipper(
    weights, hidden=hidden, norm_embs=norm_embs, device=run.device, variant=clip_variant
)
n_tokens, dim = clipper.n_tokens, clipper.dim
clip_tokens = cache_targets(
    dataset,
    "clip_tokens",
    clipper.fingerprint(),
    subject.all_images,
    clipper.encode_pixels,
    clipper.target_shape,
)
augment = build_clip_augmentation(clipper.size)


def encode_view(images, view_seed):
    """uint8 images (batch, height, width, 3), augmented -> CLIP tokens (batch, *target_shape)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return clipper.embed_image(apply_augmentation(augment, x, view_seed)).float().cpu().numpy()


# %%
targets = {"tokens": clip_tokens}
if use_image_aug and cached_views:
    made_by = clipper.fingerprint() | {"augmentation": repr(augment)}
    views = cache_augmented_targets(
        dataset,
        "clip_tokens",
        made_by,
        subject.image_ids(train_split),
        encode_view,
        clipper.target_shape,
        cached_views,
    )
    targets = {"tokens": views}
elif use_image_aug:
    targets = {}
repeats = "random"
if "batch_repeats" in published:
    repeats = "batch"
train = BrainDataset(subject, train_split, targets, normaliser, repeats, seed, pixels=not targets)
val = BrainDataset(subject, "val", {"tokens": clip_tokens}, normaliser, "mean", seed)
print(
    f"(tokens, dim) = ({n_tokens}, {dim})   targets:"
    f" {'of augmented images, ' if use_image_aug else ''}"
    f"{'cached' if targets else 'made at every step'}"
)

# %% [markdown]
# ## Model
# `voxel2clip`: a residual MLP from voxels to all tokens, with a projector on which the contrastive
# losses act, so that they and the prior do not pull on the same vector. The diffusion prior turns
# the backbone's output into tokens as CLIP would give them.

# %%
prior_weight = prior_mult or (30.0 if hidden else 0.03)
recorded = (
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
)
recorded += ("split", "n_clusters", "num_sessions", "n_components", "rois")
sizes = DecoderSizes((normaliser.n_features,), n_tokens, dim)
config = {
    "model": build_decoder_config(run.stage, run.parameters, sizes),
    "training": {k: run.parameters[k] for k in recorded} | {"prior_mult": prior_weight},
    "tokens": [n_tokens, dim],
    "clip": {"variant": clip_variant, "hidden": hidden, "norm_embs": norm_embs},
}
check_run(run.logs, config, [subject], resume_from_ckpt)
model = build_decoder(config["model"])

# %%
begin = record_training(run, subject, normaliser)
if laion_prior:
    fresh = load_laion_prior(resolve(laion_prior), model)
    print(
        "the prior starts as LAION's; fresh are"
        f" {', '.join(key for key in fresh if not key.startswith('voxel2clip.'))} and voxel2clip"
    )

# %% [markdown]
# ## The step
# BiMixCo for the first third of the epochs (voxels of two images are mixed and both are to be
# found), SoftCLIP afterwards (the target is how similar the batch's images are to each other), and
# the prior's loss throughout. `gather` brings in the samples of the other processes, so that one
# process and several train alike.

# %%
mix_epochs = int(mixup_pct * num_epochs)
soft_temps = cosine_anneal(0.004, 0.0075, num_epochs - mix_epochs)


def contrast(brain, image, epoch, mix):
    """Contrastive loss of brain and image embeddings (batch, features) over all processes."""
    brain, image = gather(l2_normalize(brain)), gather(l2_normalize(image))
    if mix:
        return mixco_nce(brain, image, 0.006, *mix, faithful="mixco_labels" in published)
    return soft_clip_loss(brain, image, soft_temps[epoch - mix_epochs])


def target_of(batch):
    """CLIP tokens (batch, tokens, dim): from the cache, or of images that are augmented now."""
    embeddings = (
        batch["tokens"]
        if "tokens" in batch
        else clipper.embed_image(augment(batch["pixels"].float() / 255)).float()
    )
    return embeddings.view(len(embeddings), n_tokens, dim)


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), tokens (batch, tokens, dim) or pixels, seed
    (batch,).
    """
    voxels, target, mix = batch["voxels"], target_of(batch), ()
    if v2c and epoch < mix_epochs:
        with seeded(int(gather(batch["seed"])[0])):
            voxels, *mix = mixco(gather(voxels))
        voxels = select_local_rows(voxels)
    backbone, projected = model.voxel2clip.predict_tokens(voxels)  # (batch, tokens, dim) each
    losses = {}
    if v2c:
        losses["nce"] = (1.0, contrast(projected, target, epoch, mix))
    if prior:
        losses["prior"] = (
            prior_weight,
            model(text_embed=backbone, image_embed=target, seeds=batch["seed"])[0],
        )
    if mse_mult:
        losses["mse"] = (mse_mult, F.mse_loss(backbone, target * dim**0.5))  # in the prior's units
    return sum(weight * loss for weight, loss in losses.values()), {
        f"loss_{name}": loss.detach() for name, (_, loss) in losses.items()
    }


# %% [markdown]
# Validation looks at images of the validation split only, on averaged repeats: SoftCLIP at one
# temperature throughout, so that epochs can be compared, the prior's loss, and how often the right
# one is the nearest.

# %%
def predicted(model):
    """Of all validation images: projected and true tokens (images, tokens, dim), and the errors of
    the prior and of the backbone (images,).
    """
    outputs = []
    for batch in iterate_batches(
        val, batch_size, next(model.parameters()).device
    ):  # as large as in training, so that memory does not grow
        target = target_of(batch)
        backbone, projected = model.voxel2clip.predict_tokens(batch["voxels"])
        direct = (backbone - target * dim**0.5).square().mean((1, 2))
        guess = (
            model(text_embed=backbone, image_embed=target, seeds=batch["seed"])[1]
            if prior
            else 0 * target
        )
        outputs.append(
            (
                projected,
                target,
                (guess - target * model.image_embed_scale).square().mean((1, 2)),
                direct,
            )
        )
    return [torch.cat(parts).float() for parts in zip(*outputs, strict=True)]


# %%
@torch.no_grad()
def validate(model):
    """Losses and retrieval over the whole validation split."""
    projected, target, of_prior, of_backbone = predicted(model)
    brain, image = l2_normalize(projected), l2_normalize(target)
    right, similar = torch.arange(len(brain), device=brain.device), cosine_similarity(brain, image)
    nce = soft_clip_loss(brain, image, 0.006) if v2c else brain.new_zeros(())
    mse, direct = of_prior.mean() if prior else brain.new_zeros(()), of_backbone.mean()
    values = {
        "loss": nce + prior_weight * mse + mse_mult * direct,
        "loss_nce": nce,
        "loss_prior": mse,
        "token_r2": 1 - direct / (target.var() * dim),
        "cosine_sim": similar.diagonal().mean(),
        "image_from_brain": (similar.argmax(1) == right).float().mean(),
        "brain_from_image": (similar.argmax(0) == right).float().mean(),
    }
    return {f"val/{name}": value.item() for name, value in values.items()}


# %% [markdown]
# Figures while training, every `ckpt_interval` epochs: a UMAP of what is predicted and what is to
# be predicted, and reconstructions of the first validation images. Both cost time and are off by
# default.

# %%
if n_samples_save:
    from src.decoding import generate_images, load_generator

    diffusion = load_generator(n_tokens, weights, run.device)


# %%
def draw_umap(model):
    """A UMAP of the validation images: projected tokens beside true ones."""
    projected, target, *_ = predicted(model)
    labels = ["image"] * len(val)
    if umap_label:
        labels = subject.categories(val.image_ids, umap_label)
    return plot_embeddings(projected, target, labels, seed=seed)


def draw_samples(model, epoch):
    """The first validation images beside what is reconstructed of them."""
    voxels, ids = subject.get_mean_betas("val", normaliser=normaliser)
    voxels, ids = voxels[:n_samples_save], ids[:n_samples_save]
    sampling = PriorSampling(use_prior=prior, seed=seed)
    tokens, _ = predict_tokens(model, voxels, (n_tokens, dim), sampling, ids, device=run.device)
    seen = torch.from_numpy(subject.images(ids)).permute(0, 3, 1, 2) / 255
    images = generate_images(diffusion, tokens, ids, seed=seed)[:, 0]
    return plot_image_grid({"seen": seen, f"epoch {epoch}": images}, n=len(ids))


# %%
def draw(model, epoch):
    """Figures of an epoch by name."""
    figures = {}
    if plot_umap:
        figures["umap"] = draw_umap(model)
    if n_samples_save:
        figures["samples"] = draw_samples(model, epoch)
    for name, figure in figures.items():
        save_figure(figure, run.results / "figures" / f"01_{name}_epoch{epoch:03d}.png")
    return figures


# %%
batching = Batching(
    num_epochs,
    batch_size,
    seed,
    order="resampled" if "resampled_epochs" in published else "shuffled",
)
optimisation = Optimisation(
    max_lr,
    scheduler=lr_scheduler_type,
    decay="published" if "norm_decay" in published else "no_norms",
)
checkpointing = Checkpointing(
    resume=resume_from_ckpt,
    checkpoints=ckpt_saving,
    ckpt_interval=ckpt_interval,
    save_at_end=save_at_end or "train_on_val" in published,
)

# %%
if "network" in decoders:
    logger = open_tracker(run, wandb_log, wandb_project)
    history = fit(
        model,
        step,
        train,
        folder=run.logs / "high_level",
        config=config,
        batching=batching,
        optimisation=optimisation,
        execution=Execution(run.device, precision, step_in_backward=step_in_backward),
        checkpointing=checkpointing,
        validate=validate,
        reporting=Reporting(logger, draw if plot_umap or n_samples_save else None),
        begin=begin,
    )
    figure = plot_training_curves(history)
    save_figure(figure, run.results / "figures" / "01_training.png")
    if logger is not None:
        logger({"training_curves": figure}, int(history["train/num_steps"].iloc[-1]))
        logger.finish()

# %% [markdown]
# ## Does the prior earn its place?
# Tokens of validation images from the backbone itself and from one sample of the prior, as the
# share of the true tokens' variance. A faithful sample cannot win here: where the mean has R2 = r,
# a draw from all that the brain leaves open has 2r - 1. What counts is what the generator makes of
# either; on the mini world it makes more of the mean (docs/prior.md), and the mini recipe sets
# `prior: false` in notebook 03.

# %%
if "network" in decoders and prior:
    x, ids = subject.get_mean_betas("val", normaliser=normaliser)
    truth = torch.from_numpy(clip_tokens.rows(ids[:100]).astype(np.float32)).view(-1, n_tokens, dim)
    for name, use in (("backbone", False), ("one sample of the prior", True)):
        steps = min(20, model.noise_scheduler.num_timesteps)
        tokens, _ = predict_tokens(
            model.eval(),
            x[:100],
            (n_tokens, dim),
            PriorSampling(use_prior=use, timesteps=steps, seed=seed),
            device=run.device,
        )
        print(
            f"validation token R2, {name}:"
            f" {1 - ((tokens[:, 0] - truth) ** 2).mean() / truth.var():.3f}"
        )

# %% [markdown]
# ## Ridge and kernel
# One linear map from the averaged voxels to the same tokens, its penalty chosen by
# cross-validation within the training images. A network that is not better than this has learnt
# nothing that needs a network.
# The kernel decoder (`decoder` kernel or all) has a closed form too, and is nonlinear: it compares
# the voxels, weighed by their reliability, with those of every training image (docs/kernel.md).

# %%
for name in decoders:
    if name not in CLOSED_FORMS:
        continue
    begin()
    solved = fit_closed_form(
        name,
        run.logs / f"high_level_{name}.safetensors",
        subject,
        normaliser,
        clip_tokens,
        config,
        run.parameters,
        (n_tokens, dim),
    )
    print(f"{name}: {describe_closed_form(solved)}")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What to look at
# The training loss jumps where BiMixCo gives way to SoftCLIP (they are different losses); the
# validation loss, one measure throughout, should fall in both phases. `image_from_brain` and
# `brain_from_image` are retrieval among the validation images. Next: notebook 02 trains the low
# level.
