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
import torch.nn.functional as F

from src import losses, models
from src.data import Normaliser
from src.decoding import TrainingFigures, compare_prior_with_backbone
from src.figures import plot_training_curves, save_figure
from src.parameters import list_closed_forms, list_decoders
from src.pipeline.dryrun import plan_stage
from src.pretrained import Clipper
from src.prior import BrainDiffusionPrior

# %%
from src.training import (
    Reporting,
    check_run,
    describe_closed_form,
    describe_history,
    finish_tracking,
    fit,
    fit_closed_form,
    gather,
    high_level,
    open_tracker,
    record_training,
    select_local_rows,
)
from src.utils import count_parameters, peak_memory, seeded

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
published = high_level.check_parameters(run.parameters, run.device)
subject, selection = high_level.open_training_images(run.parameters, run.device)
print(selection)
print(plan_stage(run.stage, run.parameters) or "No network is trained.")

# %%
normaliser = Normaliser.fit(subject, n_components=n_components, rois=rois)
n_voxels = normaliser.n_features
print(f"(train images, voxels or components) = ({len(subject.image_ids('train'))}, {n_voxels})")

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
targets = high_level.ClipTargets.open(clipper, subject, run.parameters, published)
train, val = targets.make_datasets(subject, normaliser, seed)
print(targets.describe())

# %% [markdown]
# ## The prior's network
# It is given noisy tokens, how noisy they are, and what the brain says, and predicts the clean
# tokens. For all 257 tokens it reads the brain's tokens beside the noisy ones; the network of the
# one embedding (1x768) is that of DALL-E 2, where the brain takes the place of the text.
# (It is built first so that a seed gives the same weights as in earlier versions.)

# %%
size = {"dim": dim, "dim_head": prior_dim_head, "heads": prior_heads}
if hidden:
    n_levels, cond_drop_prob, published_weight = timesteps or 100, 0.2, 30.0
    size |= {"depth": prior_depth or 6, "num_tokens": n_tokens}
    net = models.VersatileDiffusionPriorNetwork(**size, learned_query_mode="pos_emb")
else:
    n_levels, cond_drop_prob, published_weight = timesteps or 1000, 0.0, 0.03
    size |= {"depth": prior_depth or 12, "max_text_len": max_text_len}
    net = models.DiffusionPriorNetwork(**size, num_timesteps=n_levels, normformer=True)
print(f"{type(net).__name__}: {count_parameters(net):,} parameters")
print(f"(batch, {n_tokens}, {dim}) noisy tokens, noise level, brain -> (batch, {n_tokens}, {dim})")

# %% [markdown]
# ## From voxels to tokens
# `voxel2clip` is a residual MLP from voxels to all tokens, with a projector on which the
# contrastive losses act, so that they and the prior do not pull on the same vector.

# %%
voxel2clip = models.BrainNetwork(
    in_dim=n_voxels,
    out_dim=n_tokens * dim,
    clip_size=dim,
    h=h,
    n_blocks=n_blocks,
    use_projector=use_projector,
    projector_dim=projector_dim,
)
print(f"{type(voxel2clip).__name__}: {count_parameters(voxel2clip):,} parameters")
print(f"(batch, {n_voxels}) -> (batch, {n_tokens}, {dim}) backbone, and the same projected")

# %% [markdown]
# ## The whole model
# The diffusion prior turns the backbone's output into tokens as CLIP would give them. In training
# the brain is hidden from its network now and then (`cond_drop_prob`), so that it also learns what
# tokens look like at all. The checkpoint's config is read from the objects.

# %%
model = BrainDiffusionPrior(
    net,
    voxel2clip=voxel2clip,
    image_embed_dim=dim,
    timesteps=n_levels,
    cond_drop_prob=cond_drop_prob,
)
print(f"{count_parameters(model):,} parameters; {high_level.start_from_laion(model, laion_prior)}")

# %%
prior_weight = prior_mult or published_weight
config = {
    "model": model.config,
    "training": {k: run.parameters[k] for k in high_level.RECORDED} | {"prior_mult": prior_weight},
    "tokens": [n_tokens, dim],
    "clip": {"variant": clip_variant, "hidden": hidden, "norm_embs": norm_embs},
}
check_run(run.logs, config, [subject], resume_from_ckpt)
begin = record_training(run, subject, normaliser)

# %% [markdown]
# ## The step
# BiMixCo for the first third of the epochs (voxels of two images are mixed and both are to be
# found), SoftCLIP afterwards (the target is how similar the batch's images are to each other), and
# the prior's loss throughout. `gather` brings in the samples of the other processes, so that one
# process and several train alike. **To try another loss, change this cell.**

# %%
mix_epochs = int(mixup_pct * num_epochs)
soft_temps = losses.cosine_anneal(0.004, 0.0075, num_epochs - mix_epochs)


def contrast(brain, image, epoch, mix):
    """Contrastive loss of brain and image embeddings (batch, features) over all processes."""
    brain, image = (gather(losses.l2_normalize(rows)) for rows in (brain, image))
    if mix:
        faithful_labels = "mixco_labels" in published
        return losses.mixco_nce(brain, image, 0.006, *mix, faithful=faithful_labels)
    return losses.soft_clip_loss(brain, image, soft_temps[epoch - mix_epochs])


# %%
def step(model, batch, epoch):
    """Loss of one batch: voxels (batch, voxels), tokens (batch, tokens, dim) or pixels, seed
    (batch,).
    """
    voxels, target, mix = batch["voxels"], targets.get(batch), ()
    if v2c and epoch < mix_epochs:
        with seeded(int(gather(batch["seed"])[0])):
            voxels, *mix = losses.mixco(gather(voxels))
        voxels = select_local_rows(voxels)
    backbone, projected = model.voxel2clip.predict_tokens(voxels)  # (batch, tokens, dim) each
    terms = {}
    if v2c:
        terms["nce"] = (1.0, contrast(projected, target, epoch, mix))
    if prior:
        loss, _ = model(text_embed=backbone, image_embed=target, seeds=batch["seed"])
        terms["prior"] = (prior_weight, loss)
    if mse_mult:
        terms["mse"] = (mse_mult, F.mse_loss(backbone, target * dim**0.5))  # in the prior's units
    logs = {f"loss_{name}": loss.detach() for name, (_, loss) in terms.items()}
    return sum(weight * loss for weight, loss in terms.values()), logs


# %% [markdown]
# ## Training
# Validation looks at images of the validation split only, on averaged repeats: SoftCLIP at one
# temperature throughout, so that epochs can be compared, the prior's loss, and how often the right
# one is the nearest. Figures while training (`plot_umap`, `n_samples_save`) cost time and are off
# by default.

# %%
validate = high_level.Validation(val, targets, prior_weight, run.parameters)
monitor = TrainingFigures(run, subject, normaliser, (n_tokens, dim), validate.predict)
if "network" in list_decoders(decoder):
    logger = open_tracker(run, wandb_log, wandb_project)
    history = fit(
        model,
        step,
        train,
        folder=run.logs / "high_level",
        config=config,
        **high_level.build_fit_options(run.parameters, run.device, published),
        validate=validate,
        reporting=Reporting(logger, monitor.draw),
        begin=begin,
    )
    figure = plot_training_curves(history)
    save_figure(figure, run.results / "figures" / "01_training.png")
    finish_tracking(logger, history, {"training_curves": figure})

# %% [markdown]
# The training loss jumps where BiMixCo gives way to SoftCLIP (they are different losses); the
# validation loss, one measure throughout, should fall in both phases. `image_from_brain` and
# `brain_from_image` are retrieval among the validation images.
#
# ## Does the prior earn its place?
# Tokens of validation images from the backbone itself and from one sample of the prior, as the
# share of the true tokens' variance (R2). A sample has a lower R2 than the mean by construction:
# where the mean has R2 = r, a draw from all that the brain leaves open has 2r - 1. What counts is
# what the generator makes of either; on the mini world it makes more of the mean (docs/prior.md),
# and the mini recipe sets `prior: false` in notebook 03.

# %%
token_r2 = {}
if prior and "network" in list_decoders(decoder):
    token_r2 = compare_prior_with_backbone(
        model, subject, normaliser, targets.cached, (n_tokens, dim), seed, run.device
    )
for name, share in token_r2.items():
    print(f"validation token R2, {name}: {share:.3f}")

# %% [markdown]
# ## Ridge and kernel
# One linear map from the averaged voxels to the same tokens, its penalty chosen by
# cross-validation within the training images. A network that is not better than this has learnt
# nothing that needs a network. The kernel decoder (`decoder` kernel or all) has a closed form too,
# and is nonlinear: it compares the voxels, weighed by their reliability, with those of every
# training image (docs/kernel.md).

# %%
for name in list_closed_forms(decoder):
    begin()
    solved = fit_closed_form(
        name,
        run.logs / f"high_level_{name}.safetensors",
        subject,
        normaliser,
        targets.cached,
        config,
        run.parameters,
        (n_tokens, dim),
    )
    print(f"{name}: {describe_closed_form(solved)}")

# %% [markdown]
# ## What we saw

# %%
print(describe_history(run.logs / "high_level"))
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %% [markdown]
# ## Try this next
# Short experiments on the mini world (600 images, two epochs: the stage took two and a half minutes
# on one core of a busy machine), after `python run.py mindeye --mini --to 00 -p mini_images 600`.
# Give a `model_name` of your own, and compare `val/image_from_brain` in
# `train_logs/<run>/high_level/history.csv`:
# - without the mixing of voxels: `python run.py mindeye --mini --from 01 --to 01 -p mini_images
#   600 -p num_epochs 2 -p mixup_pct -1 -p model_name no_mix`;
# - without the contrastive losses: the same with `-p v2c False`;
# - a loss of your own: add a line to `terms` in the cell of the step, e.g. `terms["cosine"] =
#   (1.0, 1 - F.cosine_similarity(backbone, target, dim=-1).mean())`.
#
# Next: notebook 02 trains the low level.
