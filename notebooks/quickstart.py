# %% [markdown]
# # Quickstart · From brain activity to an image, in ten minutes
#
# **Question.** Someone looks at an image while a scanner measures their brain. Can we tell from the
# measurement which image it was, and make an image like it?
#
# **Reads** nothing: the subject is simulated. **Writes** the simulated subject to
# `data/quickstart/`, a few megabytes.
#
# The method here is the simplest one that works, and the large systems of this repository are
# refinements of it:
#
# 1. a frozen network, CLIP, describes each image by a table of numbers (its *tokens*);
# 2. a linear map (*ridge regression*) learns to predict these tokens from brain activity;
# 3. the predicted tokens are compared with those of candidate images (*retrieval*), or given to a
#    frozen image generator that makes an image of what they describe (*reconstruction*).
#
# Everything runs on the **mini world**, because neither brain scans nor large models can be shipped
# with a repository. Its images are drawn by a program, its brain is simulated, and its CLIP and its
# generator are small networks of the same kind as the real ones. So the code is real, and the
# scores say nothing about real brains.
#
# Cost: about two minutes of one CPU core, no GPU, no download.

# %%
import numpy as np
import pandas as pd
import torch

from src.data import Normaliser, estimate_noise_ceiling
from src.decoding import generate_images
from src.evaluation import bootstrap_mean
from src.figures import (
    plot_contact_sheet,
    plot_hits_and_misses,
    plot_image_grid,
    plot_roi_reliability,
    plot_trials,
)
from src.metrics import pixcorr, two_way_each
from src.miniworld import open_mini_subject
from src.pretrained import CategoryClassifier, Clipper, VersatileDiffusion
from src.retrieval import find_nearest, rank_each

# %% [markdown]
# ## 1. A subject
#
# A *subject* is one person: the images that they saw, and what the scanner measured. An image is
# shown three times, and each showing is a *trial*. For each trial and each *voxel* (a small cube of
# brain tissue) the measurement is summarised by one number, its *beta*: how strongly the voxel
# responded.
#
# Images are split into three groups. We fit on `train`, choose settings on `val`, and touch `test`
# only at the end.

# %%
subject = open_mini_subject(n_train=1500)
print(f"(trials, voxels) = {subject.betas.shape}")
subject


# %%
def load_images(image_ids):
    """Images (images, 3, height, width) with values from 0 to 1."""
    return torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255


test_ids = subject.image_ids("test")
seen = load_images(test_ids)
print(f"(test images, colours, height, width) = {tuple(seen.shape)}")
plot_image_grid({"test images": seen})

# %% [markdown]
# Betas drift from one scanning session to the next. We therefore bring each voxel to mean 0 and
# standard deviation 1 within each session (*z-scoring*), with statistics of training trials only.
#
# The figure shows five images, and beside each the responses of the same 200 voxels, one row for
# each time that the image was shown. If voxels carried no information about the image, the rows of
# one image would be no more alike than rows of different images. They are alike, but noisy:
# that is why repeated trials are averaged.

# %%
normaliser = Normaliser.fit(subject)
reliability = estimate_noise_ceiling(subject)["noise_ceiling"].to_numpy()
best_voxels = np.argsort(-reliability, kind="stable")[:200]
rows = subject.rows_by_image("test")[:5]
responses = [subject.get_betas(trials, normaliser)[:, best_voxels] for trials in rows]
plot_trials(seen[:5], responses)

# %% [markdown]
# ## 2. Regions of interest
#
# The visual cortex has areas. Early ones (V1, V2, V3) respond to edges and colours at one place
# of the image, later ones to what the image shows: a *region of interest* (ROI) is the set of
# voxels of one area. The *noise ceiling* of a voxel is the share of its variance that the image
# can explain at all; the rest is noise, which no model can predict.

# %%
voxels = subject.voxels.assign(noise_ceiling=reliability)
plot_roi_reliability(voxels)

# %% [markdown]
# ## 3. What we want to predict
#
# CLIP turns an image into tokens: one that describes the whole image and one for each of its
# patches. The tokens of two images are similar when the images show similar things, which pixels do
# not offer.

# %%
clip = Clipper("mini")
train_ids = subject.image_ids("train")
train_tokens = torch.cat(
    [clip.embed_image(load_images(ids)) for ids in np.array_split(train_ids, 8)]
)
test_tokens = clip.embed_image(seen)
print(f"(train images, tokens, dim) = {tuple(train_tokens.shape)}")
print(f"(test images, tokens, dim) = {tuple(test_tokens.shape)}")

# %% [markdown]
# ## 4. The decoder: ridge regression in five lines
#
# With `X` the voxels of the training images and `Y` their tokens, ridge regression looks for the
# weights `W` that make `X W` close to `Y` while they stay small:
#
# $$\min_W \; \|X W - Y\|^2 + \alpha \|W\|^2
# \quad\Rightarrow\quad W = X^\top (X X^\top + \alpha I)^{-1}\, Y .$$
#
# The *penalty* `alpha` keeps the map from learning noise by heart. The formula is the whole
# training: no epochs, no learning rate. (The value below is a round number that we did not tune.)

# %%
X = subject.get_mean_betas("train", normaliser=normaliser)[0]  # (train images, voxels)
X_test = subject.get_mean_betas("test", normaliser=normaliser)[0]  # (test images, voxels)
Y = train_tokens.flatten(1).numpy()  # (train images, tokens * dim)
print(f"X {X.shape}, Y {Y.shape}")

# %%
alpha = 3000.0
mean = Y.mean(0)  # the tokens of the average image
dual = np.linalg.solve(X @ X.T + alpha * np.eye(len(X)), Y - mean)
weights = X.T @ dual  # (voxels, tokens * dim)
predicted = torch.from_numpy(X_test @ weights + mean).float().view(test_tokens.shape)

# %% [markdown]
# How good is the prediction? R2 is the share of the variance of the true tokens that is
# predicted: 1 is perfect, 0 is what the average image alone would reach.

# %%
error = (predicted - test_tokens).square().mean()
variance = (test_tokens - torch.from_numpy(mean).view(1, *test_tokens.shape[1:])).square().mean()
token_r2 = float(1 - error / variance)
print(f"{weights.size:,} weights; R2 of the test tokens: {token_r2:.2f}")

# %% [markdown]
# ## 5. Retrieval: which image was it?
#
# The predicted tokens of each brain measurement are compared with the true tokens of all 300 test
# images. If the most similar one belongs to the image that was seen, it is a hit. Guessing would be
# right once in 300 times.

# %%
centred_prediction = predicted.flatten(1) - torch.from_numpy(mean)
centred_truth = test_tokens.flatten(1) - torch.from_numpy(mean)
ranks = rank_each(centred_prediction, centred_truth)
similarity, candidates = find_nearest(centred_prediction, centred_truth, k=6)
top1 = (ranks == 1).mean()
print(f"the right image comes first for {top1:.0%} of the test images; chance {1 / len(ranks):.1%}")

# %%
plot_hits_and_misses(seen, seen, candidates, np.arange(len(seen)), ranks, n=3)

# %% [markdown]
# Each row begins with the image that was seen; then come the candidates, the most similar first,
# the right one framed. Look at the misses: the wrong images usually show the same kind of thing,
# or have the same scene or colour.
#
# ## 6. Reconstruction: generate what the tokens describe
#
# A diffusion model begins with noise and removes it step by step. At each step the tokens
# say what the image should show. It was trained with the tokens of true images; we give it the
# predicted ones. It
# never saw a brain.

# %%
generator = VersatileDiffusion("mini")
n_scored = 60


def generate(tokens):
    """Images (images, 3, height, width) of tokens (images, tokens, dim)."""
    return generate_images(
        generator, tokens[:, None], test_ids[: len(tokens)], num_inference_steps=10
    )[:, 0]


reconstructed = generate(predicted[:n_scored])
upper_bound = generate(test_tokens[:n_scored])
print(f"(images, colours, height, width) = {tuple(reconstructed.shape)}")

# %% [markdown]
# A reconstruction can look good for the wrong reasons, so we put others beside it:
#
# - **nearest training image**: the training image whose tokens are most similar to the predicted
#   ones. It is a real image, so it looks sharp. A generator that is not better is only a lookup.
# - **mean image**: the average of the training images, the same for every brain.
# - **upper bound**: what the generator makes from the *true* tokens. A perfect decoder could not
#   do better with this generator.

# %%
nearest = find_nearest(predicted[:n_scored].flatten(1) - torch.from_numpy(mean), Y - mean, k=1)[1]
mean_image = torch.from_numpy(subject.mean_image("train")).permute(2, 0, 1).float() / 255
conditions = {
    "reconstructed": reconstructed,
    "nearest training image": load_images(train_ids[np.asarray(nearest[:, 0])]),
    "mean image": mean_image.expand(n_scored, -1, -1, -1),
    "upper bound": upper_bound,
}
plot_contact_sheet({"seen": seen[:n_scored]} | conditions, n=5, blocks=1)

# %% [markdown]
# These are the first five test images; nothing was selected. The test images of the mini world show
# combinations of object, colour and scene that no training image shows, so the nearest training
# image can never be quite right.
#
# ## 7. Scores, beside their baselines
#
# Three questions, each asked of every condition on the same 60 images:
#
# - **pixel correlation**: are light and colour at the right places? 0 is chance.
# - **two-way identification**: does CLIP find the reconstruction more similar to the seen image
#   than to another test image? .5 is chance. This CLIP also made the targets, so it flatters.
# - **kind named**: does a separate classifier, which nothing was trained towards, recognise in
#   the reconstruction the kind of object that was seen? One of 20 kinds is right by chance.
#
# *Shuffled* compares each seen image with the reconstruction of another one. It shows what one gets
# with good images and no information about the brain.

# %%
judge = CategoryClassifier("mini")
kinds = subject.labels.set_index("image").loc[test_ids[:n_scored], "kind"].to_numpy()
seen_scored = seen[:n_scored]
clip_seen = clip.embed_image(seen_scored)[:, 0]  # the token of the whole image


def score(images):
    """Per-image scores (images,) by name."""
    return {
        "pixel correlation": pixcorr(seen_scored, images),
        "two-way identification": two_way_each(clip_seen, clip.embed_image(images)[:, 0]),
        "kind named": judge.classify(images)["kind"] == kinds,
    }


# %%
conditions["shuffled"] = reconstructed.roll(1, 0)
scores = {name: score(images) for name, images in conditions.items()}


def describe(values):
    """Mean of per-image scores (images,) and its 95 % interval over images, as text."""
    interval = bootstrap_mean(values.astype(float))
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


table = pd.DataFrame(
    {
        condition: {metric: describe(values) for metric, values in values_by_metric.items()}
        for condition, values_by_metric in scores.items()
    }
).T
table

# %% [markdown]
# In brackets stands the 95 % interval: had we drawn other test images, the mean would probably
# lie in it. Sixty images make it wide.
#
# ## What we saw

# %%
kind = {name: values["kind named"].mean() for name, values in scores.items()}
advantage = (
    scores["reconstructed"]["kind named"] * 1.0 - scores["nearest training image"]["kind named"]
)
print(
    f"A linear map from {X.shape[1]:,} voxels predicts {token_r2:.0%} of the variance of CLIP's"
    f" tokens.\nIt finds the image that was seen among {len(ranks)} in {top1:.0%} of the cases"
    f" (chance {1 / len(ranks):.1%}).\nA classifier recognises the kind of object in"
    f" {kind['reconstructed']:.0%} of the reconstructions; shuffled {kind['shuffled']:.0%}, upper"
    f" bound {kind['upper bound']:.0%}.\nReconstruction minus nearest training image:"
    f" {describe(advantage)}."
)

# %% [markdown]
# ## Try this next
#
# Change a line, then run the cells from there on. The whole notebook took less than two
# minutes of one core.
#
# - Less noise or more: `X_test = subject.get_mean_betas("test", 1, normaliser)[0]` reads one trial
#   of each test image instead of the mean of three.
# - A part of the brain: put `normaliser = Normaliser.fit(subject, rois="V1,V2,V3")` before the line
#   that makes `X`. Only early visual areas are left. Which of the three scores suffers most?
# - Another penalty: `alpha = 30.0`, or `alpha = 300000.0`. Choose it on `val`, not on `test`.
#
# Then open notebook `00_prepare_data` and the stages that follow it. They do the same with networks
# in place of the ridge, which also predict the blurry layout, and they read real data. `make demo`
# runs those of the recipe `percept` on the mini world; `mindeye` adds a diffusion prior.
