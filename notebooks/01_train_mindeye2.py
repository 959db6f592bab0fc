# %% [markdown]
# # 01 · Train MindEye2: several subjects, one space, little data
#
# **Question.** If others have already lain in the scanner for forty hours, is one hour enough for
# someone new?
#
# **Reads** `data/<dataset>/` (notebook 00, or MindEye2's files at `data_path`). **Writes**
# `train_logs/<run>/high_level/` (best and last checkpoint, history) and, for the ridge baseline,
# `high_level_ridge.safetensors` and `low_level_ridge.safetensors`.
#
# Three uses: pretraining on all subjects but `subj` (`multi_subject`), fine-tuning on `subj` from
# there (`multisubject_ckpt` names that run), or training on `subj` alone. `num_sessions` says how
# many hours of the new subject there are. Flags have the published names; docs/mindeye2.md says
# where a default differs and why, and derives that the published mixer does nothing.
#
# Cost: full size about a day on one A100 for each of the two trainings, low compute 48 minutes on
# one L4 (published figures, not run here); mini one session about a minute, pretraining about
# four, on two CPU cores.
#
# Source: MindEye2, arXiv 2403.11207.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1
multi_subject = False  # train on all subjects of `subjects` but subj
subjects = "1,2,3,4,5,6,7,8"  # subjects that there are, separated by commas
num_sessions = 0  # training sessions, the first so many, 0 for all, at least 0
new_test = True  # test trials of all sessions (nsd-1000), otherwise of all but the last three
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)
seq_past = 0  # trials before each trial that are read with it, at least 0
seq_future = 0  # trials after each trial that are read with it, at least 0
cached_views = 1  # augmented versions of an image made once, 0 augments every step, at least 0
use_image_aug = False  # targets of randomly augmented images

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
vd_cache_dir = ""  # where models from the hub are kept, by default the hub's own cache
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
multisubject_ckpt = ""  # run or checkpoint, pretrained on other subjects, to start from
clip_variant = "bigG"  # one of RN50, ViT-L/14, ViT-B/32, RN50x64, bigG; CLIP of the targets
clip_seq_dim = 0  # tokens an image, fewer are means of patches, 0 for all, at least 0
clip_emb_dim = 0  # dim of a token, 0 for that CLIP's, at least 0
hidden_dim = 4096  # width of the space that subjects share, at least 1
n_blocks = 4  # residual or mixer blocks, at least 0
backbone = "mixer"  # one of mixer, residual; the published one, or ours
prior = True  # use the diffusion prior
use_prior = True  # published name of prior, which is trained when both are on
prior_depth = 6  # layers of the prior's transformer, at least 0
prior_dim_head = 52  # width of an attention head of the prior, at least 1
timesteps = 100  # noise levels of the prior, at least 0
blurry_recon = True  # train the branch that predicts a blurry image
use_cont = True  # contrastive loss against local embeddings of a frozen teacher

# optimisation
clip_scale = 1.0  # weight of the contrastive losses, at least 0
prior_scale = 30.0  # weight of the prior's loss, at least 0
blur_scale = 0.5  # weight of the blurry image's losses, at least 0
mse_scale = 0.0  # ours, weight of a direct regression of the tokens by the backbone, at least 0
batch_size = 16  # images or samples a step over all processes, at least 1
num_epochs = 150  # passes over the training images, at least 1
mixup_pct = 0.33  # share of the epochs that mix voxels of two images, negative for none, at most 1
max_lr = 3.0e-4  # peak learning rate, never scaled by the number of processes, more than 0
lr_scheduler_type = "cycle"  # one of cycle, linear, fixed
clip_grad = 1.0  # largest norm of the gradient, 0 for none, at least 0
gradient_checkpointing = False  # compute the prior's activations twice, to save memory
step_in_backward = False  # update each parameter as its gradient arrives, which saves memory
precision = "no"  # one of no, bf16, fp16
faithful = ""  # published behaviours instead of ours, separated by commas (docs/faithful.md)
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
seed = 42  # of everything random here

# logging
ckpt_saving = True  # write checkpoints
ckpt_interval = 5  # epochs between figures and kept checkpoints, 0 for none, at least 0
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "mindeye"  # project of Weights & Biases

# %%
from src.parameters import configure

run = configure(globals(), "01_train_mindeye2")
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
)
from src.decoding import DecoderSizes, build_decoder_config, find_decoder
from src.figures import plot_training_curves, save_figure
from src.losses import (
    cosine_anneal,
    cosine_similarity,
    l2_normalize,
    mixco,
    mixco_nce,
    normalize_locations,
    soft_clip_loss,
    soft_cont_loss,
)
from src.networks import build_decoder
from src.parameters import list_decoders, parse_names

# %%
from src.pretrained import LatentAutoencoder, PatchClip, Teacher, find_patch_variant
from src.readers import check_protocol, prepare_if_missing

# %%
from src.training import (
    CLOSED_FORMS,
    Batching,
    Checkpointing,
    Execution,
    MultiSubjectDataset,
    Optimisation,
    Reporting,
    apply_augmentation,
    build_clip_augmentation,
    build_teacher_augmentation,
    check_gradients,
    check_precision,
    check_run,
    describe_closed_form,
    describe_history,
    fit,
    fit_closed_form,
    gather,
    iterate_batches,
    load_pretrained,
    open_tracker,
    record_training,
    select_local_rows,
)

# %%
from src.pipeline.dryrun import plan_stage
from src.utils import (
    HOME,
    PerceptError,
    count_parameters,
    peak_memory,
    resolve,
    seeded,
)

# %%
choices = (
    "mixco_labels",
    "mixing_offsets",
    "inherited_bias",
    "norm_decay",
    "dead_mixer",
    "squeezed_images",
    "resampled_epochs",
    "train_on_val",
)
clip_variant = find_patch_variant(clip_variant, clip_seq_dim, clip_emb_dim)
published, prior = parse_names(faithful, choices, "faithful"), prior and use_prior
if not (prior or clip_scale or mse_scale):
    raise PerceptError("Nothing teaches the tokens: leave prior, clip_scale or mse_scale on.")
if multi_subject and (multisubject_ckpt or num_sessions or decoder != "network"):
    raise PerceptError(
        "multi_subject pretrains on all sessions of the others: leave multisubject_ckpt and"
        " num_sessions empty, and decoder at network."
    )
decoders = list_decoders(decoder)
if "network" in decoders:
    check_precision(run.device, precision, step_in_backward)
listed = [int(s) for s in subjects.split(",")]
training_subjects = [s for s in listed if s != subj] if multi_subject else [subj]


# %% [markdown]
# ## Data
# Each subject has its own voxels and its own normaliser (z-scores per session with the statistics
# of its training trials). A step sees one random repeat of an image, validation the mean of its
# repeats. Trials before and after may be read along (`seq_past`, `seq_future`); those of test
# images are not shown in training.

# %%
def opened(number):
    """A subject, its normaliser fitted on the sessions that it has."""
    protocol = "nsd-1000" if new_test else "nsd-982"
    needed = {"protocol": protocol, "min_sessions": num_sessions}
    prepare_if_missing("mindeye2", data_path, dataset, number, **needed)
    subject = open_subject(dataset, number)
    check_protocol(subject, protocol, ("nsd-1000", "nsd-982"))
    subject = subject.select_first_sessions(num_sessions)
    return subject.with_adjacent_trials(seq_past, seq_future), Normaliser.fit(subject, rois=rois)


people = [opened(number) for number in training_subjects]
images = np.unique(np.concatenate([subject.all_images for subject, _ in people]))
train_split = "train"
if "train_on_val" in published:
    train_split = "train+val"
for number, (subject, normaliser) in zip(training_subjects, people, strict=True):
    print(
        f"subject {number}: (train images, voxels) = ({len(subject.image_ids(train_split))},"
        f" {normaliser.n_features})   sessions {num_sessions or 'all'}"
    )
print(plan_stage(run.stage, run.parameters) or "No network is trained.")

# %% [markdown]
# ## Targets
# CLIP's patch tokens, and of the blurry branch the latent of an autoencoder and the embeddings of
# a teacher, all computed once. Neither a picture nor a frozen network is needed after that.

# %%
clip = PatchClip(
    weights, clip_variant, run.device, squeezed="squeezed_images" in published, patches=clip_seq_dim
)
n_tokens, dim = clip.target_shape
if clip_emb_dim not in (0, dim):
    raise PerceptError(
        f"clip_emb_dim is {clip_emb_dim}, but the tokens of CLIP {clip_variant} have {dim} numbers:"
        " leave it at 0, or choose another clip_variant."
    )
tokens = cache_targets(
    dataset, "patch_tokens", clip.fingerprint(), images, clip.encode_pixels, clip.target_shape
)
autoencoder = LatentAutoencoder(
    weights, "image_variation", 0 if weights == "mini" else 224, run.device
)
latents = cache_targets(
    dataset,
    "vae_latents",
    autoencoder.fingerprint(),
    images,
    autoencoder.encode_pixels,
    autoencoder.latent_shape,
)
targets, validation_targets = {"tokens": tokens}, {"tokens": tokens}

# %%
if blurry_recon:
    targets, validation_targets = (
        targets | {"latents": latents},
        validation_targets | {"latents": latents},
    )
train_ids = np.unique(np.concatenate([subject.image_ids(train_split) for subject, _ in people]))
print(
    f"(tokens, dim) = {clip.target_shape}   (channels, height, width) of a blurry latent ="
    f" {autoencoder.latent_shape}"
)


# %%
def views_of(name, network, augment, encode):
    """Targets of augmented training images, `cached_views` versions of each."""

    def encode_view(pixels, view_seed):
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return encode(apply_augmentation(augment, x, view_seed)).float().cpu().numpy()

    made_by = network.fingerprint() | {"augmentation": repr(augment)}
    return cache_augmented_targets(
        dataset, name, made_by, train_ids, encode_view, network.target_shape, cached_views
    )


if use_image_aug:
    targets["tokens"] = views_of(
        "patch_tokens", clip, build_clip_augmentation(clip.size), clip.embed_image
    )

# %%
if blurry_recon and use_cont:
    teacher = Teacher(weights, device=run.device)
    targets["maps"] = cache_targets(
        dataset,
        "teacher_maps",
        teacher.fingerprint(),
        train_ids,
        teacher.encode_pixels,
        teacher.target_shape,
    )
    targets["maps_aug"] = views_of(
        "teacher_maps",
        teacher,
        build_teacher_augmentation(teacher.image_size),
        teacher.embed_locations,
    )

# %%
train = MultiSubjectDataset(
    [
        BrainDataset(subject, train_split, targets, normaliser, "random", seed)
        for subject, normaliser in people
    ]
)
val = MultiSubjectDataset(
    [
        BrainDataset(subject, "val", validation_targets, normaliser, "mean", seed)
        for subject, normaliser in people
    ]
)
print(
    f"an epoch has {len(train)} samples in {len(train) // batch_size} steps; validation images:"
    f" {len(val)}"
)

# %% [markdown]
# ## Model
# A linear layer a subject into the shared space, a backbone from there to tokens, a prior that
# turns what the backbone says into tokens as CLIP would give them. With one token the published
# mixer amounts to adding one number: it is computed as that, and its weights are neither trained
# nor used.

# %%
recorded = (
    "batch_size",
    "num_epochs",
    "mixup_pct",
    "max_lr",
    "prior_scale",
    "clip_scale",
    "blur_scale",
    "mse_scale",
    "use_cont",
    "use_image_aug",
    "faithful",
)
recorded += ("multi_subject", "multisubject_ckpt", "num_sessions", "rois", "seed")
parameters = run.parameters | {"prior": prior, "faithful": published}
voxels = tuple(normaliser.n_features for _, normaliser in people)
sizes = DecoderSizes(voxels, n_tokens, dim, autoencoder.latent_shape)

# %%
config = {
    "model": build_decoder_config(run.stage, parameters, sizes),
    "training": {name: run.parameters[name] for name in recorded} | {"subjects": training_subjects},
    "tokens": [n_tokens, dim],
    "clip": {
        "patch_tokens": True,
        "variant": clip_variant,
        "squeezed": "squeezed_images" in published,
        "patches": clip_seq_dim,
    },
    "latents": list(autoencoder.latent_shape),
    "neighbours": [seq_past, seq_future],
}
check_run(run.logs, config, [subject for subject, _ in people], resume_from_ckpt)
begin = record_training(run, *people[0])
model = build_decoder(config["model"])
if blurry_recon:
    model.backbone.b_maps_projector.requires_grad_(use_cont)
if prior:
    model.diffusion_prior.net.causal_transformer.checkpointing = gradient_checkpointing

# %%
if multisubject_ckpt:
    pretrained = resolve(multisubject_ckpt)
    pretrained = (
        pretrained
        if pretrained.is_file()
        else find_decoder(HOME / "train_logs" / multisubject_ckpt, "high_level")
    )
    fresh = load_pretrained(
        pretrained, model, "inherited_bias" if "inherited_bias" in published else "ridge"
    )
    print(f"starts from {multisubject_ckpt}; fresh are {', '.join(fresh)}")
counts = {name: count_parameters(part) for name, part in model.named_children()}
idle = sum(p.numel() for p in model.parameters() if not p.requires_grad)
print("   ".join(f"{name} {count:,}" for name, count in counts.items()), f"  not trained: {idle:,}")

# %% [markdown]
# ## The step
# BiMixCo for the first third of the epochs, SoftCLIP afterwards; the prior's loss throughout; of
# the blurry branch the absolute error of the latent and a contrastive loss, in single precision.
# Voxels are mixed within a subject, and the labels say with whom.

# %%
mix_epochs = int(mixup_pct * num_epochs)
soft_temps = cosine_anneal(0.004, 0.0075, num_epochs - mix_epochs)


def mixed(batch):
    """Voxels (batch, [trials,] voxels) of two images of a subject mixed, and who was mixed with
    whom.
    """
    voxels, subject = gather(batch["voxels"]), gather(batch["subject"])
    with seeded(int(gather(batch["seed"])[0])):
        voxels, perm, betas, select = mixco(voxels, groups=subject)
    if "mixing_offsets" in published:  # counted within each subject, as if all were the first
        perm = torch.stack([(subject[:p] == subject[p]).sum() for p in perm])
    return select_local_rows(voxels), (perm, betas, select)


def contrast(brain, image, epoch, mix):
    """Contrastive loss of brain and image tokens (batch, tokens, dim) over all processes."""
    brain, image = gather(l2_normalize(brain)), gather(l2_normalize(image))
    if mix:
        return mixco_nce(brain, image, 0.006, *mix, faithful="mixco_labels" in published)
    return soft_clip_loss(brain, image, soft_temps[epoch - mix_epochs])


# %%
def blurry_losses(blurry, batch):
    """Of the blurry branch: error of the latent (batch, 4, h, w), and contrastive loss of the maps
    (batch, locations, 512).
    """
    latent, maps = blurry
    losses = {"blur": (blur_scale, F.l1_loss(latent.float(), batch["latents"]))}
    if use_cont:
        rows = [
            gather(normalize_locations(m, maps)) for m in (maps, batch["maps"], batch["maps_aug"])
        ]
        losses["blur_cont"] = (0.1 * blur_scale, soft_cont_loss(*rows, temp=0.2))
    return losses


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, [trials,] voxels), subject, seed (batch,), tokens (batch,
    tokens, dim), latents, maps.
    """
    voxels, mix = mixed(batch) if clip_scale and epoch < mix_epochs else (batch["voxels"], ())
    backbone, projected, blurry = model(voxels, batch["subject"])
    losses = {}
    if clip_scale:
        losses["clip"] = (clip_scale, contrast(projected, batch["tokens"], epoch, mix))
    if prior:
        losses["prior"] = (
            prior_scale,
            model.diffusion_prior(
                text_embed=backbone, image_embed=batch["tokens"], seeds=batch["seed"]
            )[0],
        )
    if mse_scale:
        losses["mse"] = (mse_scale, F.mse_loss(backbone, batch["tokens"]))
    if blurry_recon:
        losses |= blurry_losses(blurry, batch)
    return sum(weight * loss for weight, loss in losses.values()), {
        f"loss_{name}": loss.detach() for name, (_, loss) in losses.items()
    }


# %% [markdown]
# Validation looks at all validation images of each subject, repeats averaged: SoftCLIP at one
# temperature throughout, the prior's loss, the blurry latent's error, and how often the right
# image is the nearest.

# %%
def predict_batch(model, batch, number):
    """Of one batch of one subject: backbone's and projected tokens, targets, and the errors of the
    prior and of the blurry latent (batch,).
    """
    backbone, projected, blurry = model(batch["voxels"], number)
    guess = target = batch["tokens"]
    if prior:
        guess = model.diffusion_prior(text_embed=backbone, image_embed=target, seeds=batch["seed"])[
            1
        ]
    blur_error = backbone.new_zeros(len(backbone))
    if blurry_recon:
        blur_error = (blurry[0].float() - batch["latents"]).abs().mean((1, 2, 3))
    prior_error = (guess - target).square().mean((1, 2))
    return backbone, projected if clip_scale else backbone, target, prior_error, blur_error


def predicted(model, number):
    """What `predict_batch` gives for all validation images of one subject."""
    device = next(model.parameters()).device
    loader = iterate_batches(val.datasets[number], batch_size, device)
    outputs = [predict_batch(model, batch, number) for batch in loader]
    return [torch.cat(parts).float() for parts in zip(*outputs, strict=True)]


# %%
def looked_at(model, number):
    """Losses and retrieval over one subject's validation images."""
    backbone, projected, target, of_prior, blur = predicted(model, number)
    brain, image = l2_normalize(projected), l2_normalize(target)
    right, similar = torch.arange(len(brain), device=brain.device), cosine_similarity(brain, image)
    direct = F.mse_loss(backbone, target)
    nce = soft_clip_loss(brain, image, 0.006) if clip_scale else brain.new_zeros(())
    loss = (
        clip_scale * nce
        + prior * prior_scale * of_prior.mean()
        + mse_scale * direct
        + blurry_recon * blur_scale * blur.mean()
    )
    return {
        "loss": loss,
        "loss_clip": nce,
        "loss_prior": of_prior.mean(),
        "loss_blur": blur.mean(),
        **({"token_r2": 1 - direct / target.var()} if mse_scale else {}),
        "prior_r2": 1 - of_prior.mean() / target.var(),
        "image_from_brain": (similar.argmax(1) == right).float().mean(),
        "brain_from_image": (similar.argmax(0) == right).float().mean(),
    }


# %%
@torch.no_grad()
def validate(model):
    """The same, averaged over subjects."""
    per_subject = [looked_at(model, number) for number in range(len(people))]
    return {
        f"val/{name}": float(np.mean([values[name].item() for values in per_subject]))
        for name in per_subject[0]
    }


# %% [markdown]
# Before anything long: does every weight that is to be trained get a finite gradient, on this
# device and in this precision?

# %%
if "network" in decoders:
    model.to(run.device)
    with torch.autocast(
        torch.device(run.device).type,
        torch.float16 if precision == "fp16" else torch.bfloat16,
        enabled=precision != "no",
    ):
        reached = check_gradients(
            model, step, train.preview_batch(min(batch_size, 32)), sorted({0, num_epochs - 1})
        )
    print(f"device {run.device}: gradients reach {reached:,} parameters")

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
    clip_grad=0 if step_in_backward else clip_grad,
)
checkpointing = Checkpointing(
    resume=resume_from_ckpt, checkpoints=ckpt_saving, ckpt_interval=ckpt_interval
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
        reporting=Reporting(logger),
        begin=begin,
    )
    figure = plot_training_curves(history)
    save_figure(figure, run.results / "figures" / "01_training.png")
    if logger is not None:
        logger({"training_curves": figure}, int(history["train/num_steps"].iloc[-1]))
        logger.finish()

# %% [markdown]
# ## Ridge and kernel
# One linear map from the averaged voxels to the tokens, and one to the blurry latent, their
# penalties chosen by cross-validation within the training images. A network that is not better
# than this has learnt nothing that needs a network.
# The kernel decoder (`decoder` kernel or all) has a closed form too, and is nonlinear: it compares
# the voxels, weighed by their reliability, with those of every training image (docs/kernel.md).

# %%
subject, normaliser = people[0]
own_config = {name: value for name, value in config.items() if name != "model"}
for name in decoders:
    if name not in CLOSED_FORMS:
        continue
    begin()
    for level, target in (("high_level", tokens), ("low_level", latents)):
        solved = fit_closed_form(
            name,
            run.logs / f"{level}_{name}.safetensors",
            subject,
            normaliser,
            target,
            own_config,
            run.parameters,
        )
        print(f"{name} of the {level.replace('_', ' ')}: {describe_closed_form(solved)}")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "high_level"))

# %% [markdown]
# `val/image_from_brain` should rise above chance within the first epochs, and jump where mixing
# stops. With one session the validation loss of the prior turns early; compare with the same run
# from a pretrained start.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye2_small --mini --to 00 -p
# mini_images 600`:
# - two epochs, without the blurry branch: `python run.py mindeye2_small --mini --from 01 --to 01
#   -p mini_images 600 -p num_epochs 2 -p blurry_recon False -p model_name no_blur`;
# - without the prior: the same with `-p prior False`;
# - a residual MLP in place of the mixer: the same with `-p backbone residual`.
#
# Next: notebook 03 reconstructs the test images.
