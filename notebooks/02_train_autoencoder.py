# %% [markdown]
# # 02 · Train the low level: voxels to the latents of an autoencoder
#
# **Question.** How much of an image's layout and colour can be read from the brain without knowing
# what the image shows?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/low_level/` and, for the
# baseline, `train_logs/<run>/low_level_ridge.safetensors`.
#
# Cost: full size not measured; mini about two minutes on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, section 2.5.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
split = "images"  # one of images, cluster-held-out; docs/overlap.md explains the latter
n_clusters = 20  # clusters of which a quarter is held out, at least 4
num_sessions = 0  # training sessions, the first so many, 0 for all, at least 0
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)
n_components = 0  # principal components in place of voxels, 0 for the voxels, at least 0
cached_views = 0  # augmented versions of an image made once, 0 augments every step, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
h = 4096  # width of the hidden layers, at least 1
n_blocks = 4  # residual or mixer blocks, at least 0
ups_mode = "4x"  # one of 4x, 8x, 16x
latent_size = 64  # height and width of the latents, at least 1
block_out_channels = ""  # widths of the upsampler, separated by commas, by default as published
use_cont = True  # contrastive loss against local embeddings of a frozen teacher
cont_model = "cnx"  # one of cnx; the teacher, VICRegL's ConvNeXt

# optimisation
batch_size = 8  # images or samples a step over all processes, at least 1
num_epochs = 120  # passes over the training images, at least 1
max_lr = 5.0e-4  # peak learning rate, never scaled by the number of processes, more than 0
mixup_pct = -1.0  # share of the epochs that mix voxels of two images, negative for none, at most 1
voxel_select = True  # train on random mixtures of an image's repeats, otherwise on one repeat
use_reconst = False  # loss on the decoded image, at half size
use_blurred_training = False  # median-filter the target of that loss
use_sobel_loss = False  # loss on the edges of the decoded image, needs use_reconst
resume_from_ckpt = True  # go on where an interrupted run stopped
ridge_folds = 5  # folds of the cross-validation that chooses the ridge penalty, at least 2
kernel = "arc-cosine"  # one of arc-cosine, rbf; what the kernel decoder compares by
use_mp = False  # mixed precision, fp16 on a GPU and bf16 on a CPU, unless precision says otherwise
precision = "no"  # one of no, bf16, fp16
seed = 0  # of everything random here

# evaluation
best_by = "loss"  # one of loss, ssim; what chooses the best epoch on validation images

# logging
ckpt_interval = 24  # epochs between figures and kept checkpoints, 0 for none, at least 0
wandb_log = False  # send history and figures to Weights & Biases
wandb_project = "stability"  # project of Weights & Biases

# %%
from src.parameters import configure

run = configure(globals(), "02_train_autoencoder")
run

# %%
import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import median_blur

from src.data import (
    BrainDataset,
    Normaliser,
    cache_augmented_targets,
    cache_targets,
    open_subject,
    select_training_split,
)
from src.decoding import DecoderSizes, build_decoder_config, predict_latents
from src.figures import plot_image_grid, plot_training_curves, save_figure
from src.losses import mixco, sobel_loss, soft_cont_loss
from src.metrics import ssim
from src.networks import build_decoder
from src.parameters import list_decoders
from src.pipeline.dryrun import plan_stage
from src.pretrained import Clipper, LatentAutoencoder, Teacher

# %%
from src.training import (
    CLOSED_FORMS,
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    apply_augmentation,
    build_teacher_augmentation,
    check_run,
    describe_closed_form,
    describe_history,
    fit,
    fit_closed_form,
    gather,
    open_tracker,
    record_training,
)
from src.utils import PerceptError, mixed_precision, peak_memory

# %% [markdown]
# ## Data
# The target of an image is the latent that the frozen autoencoder gives it, times the scaling
# factor of its diffusion model. It is computed once, as are the teacher's embeddings of the image.
# `split`, `num_sessions` and `n_components` are those of notebook 01, and have to be the same.

# %%
if use_sobel_loss and not use_reconst:
    raise PerceptError(
        "use_sobel_loss looks at the decoded picture, which is not made: set use_reconst to True,"
        " too."
    )
all_trials = open_subject(dataset, subj)
subject = select_training_split(
    all_trials,
    split,
    lambda: Clipper(weights, hidden=False, norm_embs=False, device=run.device),
    n_clusters,
    num_sessions,
)
print(plan_stage(run.stage, run.parameters) or "No network is trained.")
normaliser = Normaliser.fit(subject, n_components=n_components, rois=rois)
autoencoder = LatentAutoencoder(weights, device=run.device)

# %%
latents = cache_targets(
    dataset,
    "vae_latents",
    autoencoder.fingerprint(),
    subject.all_images,
    autoencoder.encode_pixels,
    autoencoder.latent_shape,
)
print(f"(channels, height, width) of a latent = {autoencoder.latent_shape}")
decoders = list_decoders(decoder)
if "network" in decoders and latent_size != autoencoder.latent_shape[1]:
    raise PerceptError(
        f"latent_size is {latent_size}, but this autoencoder's latents are"
        f" {autoencoder.latent_shape[1]} high: set it to that."
    )

# %%
targets, train_ids = {"latents": latents}, subject.image_ids("train")
if use_cont:
    teacher = Teacher(weights, device=run.device)
    augment, made_by = build_teacher_augmentation(teacher.image_size), teacher.fingerprint()
    targets["maps"] = cache_targets(
        dataset, "teacher_maps", made_by, train_ids, teacher.encode_pixels, teacher.target_shape
    )
    print(f"(locations, dim) of the teacher = {teacher.target_shape}")


def encode_view(images, view_seed):
    """uint8 images (batch, height, width, 3), augmented -> the teacher's embeddings (batch,
    locations, dim).
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return teacher.embed_locations(apply_augmentation(augment, x, view_seed)).float().cpu().numpy()


if use_cont and cached_views:
    made_by = made_by | {"augmentation": repr(augment)}
    targets["maps_aug"] = cache_augmented_targets(
        dataset, "teacher_maps", made_by, train_ids, encode_view, teacher.target_shape, cached_views
    )
needs_pixels = use_reconst or (use_cont and not cached_views)

# %%
train = BrainDataset(
    subject,
    "train",
    targets,
    normaliser,
    "all" if voxel_select else "random",
    seed,
    pixels=needs_pixels,
)
val = BrainDataset(subject, "val", {"latents": latents}, normaliser, "mean", seed, pixels=True)
print(
    f"(train images, {'components' if n_components else 'voxels'}) = ({len(train)},"
    f" {normaliser.n_features})   protocol {subject.protocol}"
)

# %% [markdown]
# ## Model
# A residual MLP without biases, then the decoder half of an autoencoder as upsampler.

# %%
recorded = (
    "batch_size",
    "num_epochs",
    "max_lr",
    "mixup_pct",
    "voxel_select",
    "use_reconst",
    "use_blurred_training",
    "use_sobel_loss",
    "cached_views",
    "best_by",
    "seed",
)
recorded += ("split", "n_clusters", "num_sessions", "n_components", "rois")
sizes = DecoderSizes((normaliser.n_features,))
config = {
    "model": build_decoder_config(run.stage, run.parameters, sizes),
    "training": {k: run.parameters[k] for k in recorded},
    "latents": list(autoencoder.latent_shape),
}
check_run(run.logs, config, [subject], resume_from_ckpt)
begin = record_training(run, subject, normaliser)
model = build_decoder(config["model"])

# %% [markdown]
# ## The step
# - **latents**: mean absolute error of the unscaled latents.
# - **contrastive** (weight .1): at every place the network's embedding should be as similar to the
#   teacher's embeddings of augmented images, over all places of the batch, as the teacher's
#   embedding of the clean image is.
# - **picture** (weight 2) and **edges** (16), optional: of the latents decoded at half size, in
#   single precision, of a quarter of the batch.
#
# Repeats are mixed as published: with probability .5 a random convex combination of an image's
# repeats, with .3 their mean, with .2 one of them.

# %%
scale, mix_epochs = autoencoder.scale, int(mixup_pct * num_epochs)


def mix_repeats(voxels):
    """(batch, repeats, voxels) -> (batch, voxels)."""
    draw, n = torch.rand(()), voxels.shape[1]
    if draw < 0.5:
        weight = torch.rand(*voxels.shape[:2], 1, device=voxels.device)
        return (voxels * weight / weight.sum(1, keepdim=True)).sum(1)
    return voxels.mean(1) if draw < 0.8 else voxels[:, torch.randint(n, ())]


def places(maps, like=None):
    """Embeddings (batch, locations, dim) -> unit rows (batch * locations, dim), averaged over as
    many locations as `like` has.
    """
    if like is not None and like.shape[1] < maps.shape[1]:
        side, target_side = (int(m.shape[1] ** 0.5) for m in (maps, like))
        maps = F.adaptive_avg_pool2d(maps.mT.unflatten(2, (side, side)), target_side).flatten(2).mT
    return F.normalize(maps.flatten(0, 1).float(), dim=-1)


# %%
def picture_losses(latent, pixels):
    """Differences of the decoded picture and of its edges, for latents (batch, channels, h, w) and
    uint8 pixels (batch, 3, height, width).
    """
    n_decoded = max(1, len(latent) // 4)
    with torch.autocast(latent.device.type, enabled=False):
        small = F.interpolate(latent[:n_decoded].float(), scale_factor=0.5, mode="bilinear")
        decoded = autoencoder.model.decode(small / scale).sample / 2 + 0.5
        target = F.interpolate(
            pixels[:n_decoded].float() / 255, decoded.shape[-2:], mode="bilinear", antialias=True
        )
        seen = target
        if use_blurred_training:
            seen = median_blur(target, (7, 7))
        losses = {
            "reconst": (2.0, 2 * F.l1_loss(decoded, seen).nan_to_num())
        }  # twice, as pictures from -1 to 1 are published
        if use_sobel_loss:
            losses["sobel"] = (16.0, sobel_loss(decoded, target))
    return losses


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, [repeats,] voxels), latents (batch, channels, h, w), maps
    (batch, locations, dim), pixels.
    """
    voxels = mix_repeats(batch["voxels"]) if voxel_select else batch["voxels"]
    target, mixing = batch["latents"], epoch < mix_epochs
    if mixing:
        voxels, perm, betas, _ = mixco(voxels)
        target = torch.lerp(target[perm], target, betas[:, None, None, None])
    latent, maps = out if isinstance(out := model(voxels), tuple) else (out, None)
    losses = {"l1": (1 / scale, F.l1_loss(latent, target))}
    if use_cont and not mixing:  # of a mixture the teacher has seen no picture
        augmented_maps = (
            batch["maps_aug"]
            if cached_views
            else teacher.embed_locations(augment(batch["pixels"].float() / 255))
        )
        rows = [gather(places(m, maps)) for m in (maps, batch["maps"], augmented_maps)]
        losses["cont"] = (0.1, soft_cont_loss(*rows, temp=0.075))
    if use_reconst and not mixing:
        losses |= picture_losses(latent, batch["pixels"])
    return sum(weight * loss for weight, loss in losses.values()), {
        f"loss_{name}": loss.detach() for name, (_, loss) in losses.items()
    }


# %%
def decoded(model):
    """Predicted latents of the validation images (images, channels, h, w)."""
    batch, device = val.__getitems__(list(range(len(val)))), next(model.parameters()).device
    out = model(batch["voxels"].to(device))
    return (out[0] if isinstance(out, tuple) else out), batch


# %%
@torch.no_grad()
def validate(model):
    """Mean squared error of the latents of the validation images, repeats averaged, and similarity
    of their pictures where that chooses.
    """
    predicted, batch = decoded(model)
    target = batch["latents"].to(predicted.device)
    mse = F.mse_loss(predicted, target)
    values = {
        "val/mse": mse.item(),
        "val/r2": 1 - (mse / target.var()).item(),
        "val/loss": mse.item(),
    }
    if best_by == "ssim":
        similarity = ssim(
            batch["pixels"].float() / 255, autoencoder.decode(predicted.float()).cpu()
        ).mean()
        values |= {"val/ssim": float(similarity), "val/loss": 1 - float(similarity)}
    return values


# %%
def draw(model, epoch):
    """The first validation images: seen, kept by the autoencoder, read from the brain."""
    predicted, batch = decoded(model)
    pictures = {
        name: autoencoder.decode(x[:12].float()).cpu()
        for name, x in (("autoencoder", batch["latents"]), (f"epoch {epoch}", predicted))
    }
    figure = plot_image_grid({"seen": batch["pixels"][:12].float() / 255} | pictures)
    save_figure(figure, run.results / "figures" / f"02_samples_epoch{epoch:03d}.png")
    return {"samples": figure}


# %%
if "network" in decoders:
    logger = open_tracker(run, wandb_log, wandb_project)
    history = fit(
        model,
        step,
        train,
        folder=run.logs / "low_level",
        config=config,
        batching=Batching(num_epochs, batch_size, seed),
        optimisation=Optimisation(max_lr),
        execution=Execution(run.device, mixed_precision(use_mp, precision)),
        checkpointing=Checkpointing(
            resume=resume_from_ckpt,
            ckpt_interval=ckpt_interval,
            keep_epochs=bool(ckpt_interval),
        ),
        validate=validate,
        reporting=Reporting(logger, draw if ckpt_interval else None),
        begin=begin,
    )
    save_figure(plot_training_curves(history), run.results / "figures" / "02_training.png")
    if logger is not None:
        logger.finish()

# %% [markdown]
# ## Ridge and kernel
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
        latents,
        config,
        run.parameters,
    )
    print(f"{name}: {describe_closed_form(fitted[name])}")

# %% [markdown]
# ## A look at validation images
# Seen, what the autoencoder itself keeps of it, and what is read from the brain.

# %%
x, ids = subject.get_mean_betas("val", normaliser=normaliser)
x, ids = x[:12], ids[:12]
seen = torch.from_numpy(subject.images(ids)).permute(0, 3, 1, 2) / 255
rows = {
    "seen": seen,
    "autoencoder": autoencoder.decode(torch.from_numpy(latents.rows(ids).astype(np.float32))).cpu(),
}
for name, trained in fitted.items():
    predicted = predict_latents(trained.eval().cpu(), x, autoencoder.latent_shape)
    rows[name] = autoencoder.decode(predicted).cpu()
save_figure(plot_image_grid(rows), run.results / "figures" / "02_validation.png")

# %%
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "low_level"))

# %% [markdown]
# Colours and the horizon should be right, objects soft: a mean over everything that the voxels
# leave open is blurry by nature.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye --mini --to 00 -p mini_images
# 600`:
# - two epochs: `python run.py mindeye --mini --from 02 --to 02 -p mini_images 600 -p num_epochs 2
#   -p model_name low`;
# - early visual areas alone: the same with `-p rois V1,V2,V3`;
# - ten components in place of all voxels: the same with `-p n_components 10`.
#
# Next: notebook 03 reconstructs images from both levels.
