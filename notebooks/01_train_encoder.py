# %% [markdown]
# # 01 · Train an encoding model: images to voxels
#
# **Question.** What would the brain answer to an image? How much of each voxel's response can be
# predicted from features of the image, how close is that to what noise allows, and which features
# does it take?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `train_logs/<run>/encoder.safetensors` (the
# model) and `encoder_residuals.safetensors` (what it leaves open), and in `results/<run>/`
# `encoding.parquet` (one row a voxel) and figures.
#
# Encoding models are a field of their own: read this notebook alone, or as the first half of
# `percept`, whose decoder (notebook 02_train_percept) learns from what this model would have
# measured.
#
# Cost: mini about two minutes of one CPU core; memory and time at the size of NSD are in
# docs/percept.md.
#
# Source: Naselaris et al. 2011; Nunez-Elizalde et al. 2019 and Dupré la Tour et al. 2022 (banded
# ridge); Kay et al. 2024 (signal and noise).

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. percept/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1
split = "images"  # one of images, cluster-held-out; docs/overlap.md explains the latter
n_clusters = 20  # clusters of which a quarter is held out, at least 4
num_sessions = 0  # training sessions, the first so many, 0 for all, at least 0
rois = ""  # regions whose voxels are used, by default all (docs/roi_voting.md)

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
clip_variant = "ViT-L/14"  # one of RN50, ViT-L/14, ViT-B/32, RN50x64; CLIP of the tokens
norm_embs = True  # divide the CLIP tokens by the norm of their CLS token
feature_spaces = "gabor,tokens"  # of gabor, tokens, captions, categories, gnet, AlexNet(5), SwAV
readout = "linear"  # one of linear, kernel, mlp; the map from features to voxels

# optimisation
n_mixtures = 10  # ways to share a voxel's penalty among feature spaces, 1 for equal, at least 1
penalty_folds = 2  # of the choice of the penalties, at least 2
folds = 4  # of the out-of-fold predictions, at least 2
resume_from_ckpt = True  # False gives up what the run has trained on other data or voxels
seed = 42  # of everything random here

# evaluation
variance_partitioning = True  # also fit each space alone, and all but one
spectrum_voxels = 500  # most reliable voxels of the figure of signal and noise, at least 2

# %%
from src.parameters import configure

run = configure(globals(), "01_train_encoder")
run

# %%
import numpy as np
import pandas as pd
import torch

from src.data import (
    Normaliser,
    cache_targets,
    estimate_noise_ceiling,
    open_subject,
    select_training_split,
)
from src.encoding import (
    FEATURE_SPACES,
    FeatureSpace,
    NoiseModel,
    build_extractors,
    compute_features,
    estimate_signal_and_noise,
    explained_variance,
    fit_encoding_model,
    look_up_features,
    partition_variance,
    save_encoder,
)

# %%
from src.figures import (
    choose_regions,
    plot_prediction_accuracy,
    plot_spectra,
    plot_variance_partition,
    plot_voxel_map,
    save_figure,
)
from src.parameters import parse_names
from src.pretrained import METRIC_NETWORKS, Clipper
from src.readers import prepare_if_missing
from src.training import check_run, record_training
from src.utils import atomic, peak_memory

# %% [markdown]
# ## Data
# Voxels are z-scored with training trials. The model is fitted to the mean over the repeats of each
# training image. The test images are not touched here.

# %%
choices = ("gabor", "tokens", "captions", "categories", "gnet", *METRIC_NETWORKS)
named_spaces = parse_names(feature_spaces, choices, "feature_spaces")
spaces = [name for name in choices if name in named_spaces]
prepare_if_missing("mindeye", data_path, dataset, subj)
subject = select_training_split(
    open_subject(dataset, subj),
    split,
    lambda: Clipper(weights, hidden=False, norm_embs=False, device=run.device),
    n_clusters,
    num_sessions,
)
normaliser = Normaliser.fit(subject, rois=rois)
voxels, train_ids = subject.get_mean_betas("train", normaliser=normaliser)
val_voxels, val_ids = subject.get_mean_betas("val", normaliser=normaliser)
columns = np.arange(subject.n_features())
if rois:
    columns = normaliser.columns
table = subject.voxels.iloc[columns].reset_index(drop=True)
regions = choose_regions(table)
print(f"(training images, voxels) = {voxels.shape}, {len(val_ids)} validation images")

# %% [markdown]
# ## How good could any model be?
# The same image gives another response each time. What differs between repeats is noise, which no
# feature of the image can predict; the share of variance that is left is the noise ceiling of the
# mean over repeats. Where no image was repeated it is not known.

# %%
rows_by_image = subject.rows_by_image("train")
repeats = round(np.mean([len(rows) for rows in rows_by_image]))
ceiling = None
if max(len(rows) for rows in rows_by_image) > 1:
    ceiling = estimate_noise_ceiling(subject, repeats, normaliser)["noise_ceiling"].to_numpy()
    print(f"noise ceiling of the mean of {repeats} repeats: median {np.median(ceiling):.3f}")

# %% [markdown]
# ## Feature spaces
# What an image is described by. `gabor`: the energy of local waves of a few sizes and orientations,
# and local colour, as early visual cortex is known to measure it. `tokens`: what CLIP sees at every
# patch, which higher areas are known to follow. Each space becomes its first principal components,
# at the same total variance, so that none weighs more for being large.

# %%
clipper = Clipper(
    weights, hidden=True, norm_embs=norm_embs, device=run.device, variant=clip_variant
)
tokens = cache_targets(
    dataset,
    "clip_tokens",
    clipper.fingerprint(),
    subject.all_images,
    clipper.encode_pixels,
    clipper.target_shape,
)
extractors = build_extractors(spaces, weights, subj, run.device)


def describe(image_ids):
    """Images -> features (n, features) in each space, by name."""
    stored = look_up_features(subject, spaces, image_ids, tokens, clipper.embed_text)
    return compute_features(spaces, subject.images(image_ids), stored, extractors)


features, val_features = describe(train_ids), describe(val_ids)
for name, rows in features.items():
    n_components = FEATURE_SPACES.get(name, FeatureSpace()).n_components or "all"
    print(f"{name}: (images, features) = {rows.shape}, at most {n_components} components")

# %% [markdown]
# ## The fit
# Ridge regression: for each voxel the weights that predict it best, held small by a penalty. In a
# *banded* ridge each feature space has a penalty of its own, so that a voxel of V1 can listen to
# Gabor energies and leave CLIP alone. himalaya tries `n_mixtures` ways to share the penalty for all
# voxels at once, and keeps for each voxel what predicts left-out images best.

# %%
config = {
    "training": {
        name: run.parameters[name]
        for name in ("split", "n_clusters", "num_sessions", "rois", "feature_spaces", "readout")
    },
    "clip": {"variant": clip_variant, "hidden": True, "norm_embs": norm_embs},
    "data": {subject.key: subject.identity},
}
check_run(run.logs, config, [subject], resume_from_ckpt)
options = {
    "n_mixtures": n_mixtures,
    "penalty_folds": penalty_folds,
    "folds": folds,
    "seed": seed,
    "device": run.device,
}
fit = fit_encoding_model(features, voxels, readout=readout, **options)
model = fit.model
val_score = explained_variance(val_voxels, model.predict(val_features).cpu().numpy())
print(
    f"explained variance, out of fold: {fit.total_score:.3f} of all voxels together, mean over"
    f" voxels {fit.score.mean():.3f}; on validation images {val_score.mean():.3f}"
)

# %% [markdown]
# The score out of fold and that on validation images should agree: then the choice of penalties,
# which the former took part in, has not flattered it.
#
# ## Accuracy against the noise ceiling
# Each dot is a voxel. Those on the line are predicted as well as they can be.

# %%
save_figure(
    plot_prediction_accuracy(regions, fit.score, ceiling),
    run.results / "figures" / "01_accuracy.png",
)

# %%
maps = {"explained variance": fit.score}
if ceiling is not None:
    reliable = ceiling > 0.05
    maps["noise ceiling"] = ceiling
    maps["share of the ceiling"] = np.where(reliable, fit.score / ceiling.clip(0.05), np.nan)
if {"x", "y", "z"} <= set(table):
    figure = plot_voxel_map(table, maps, label="share of variance", limits=(0, 1))
    save_figure(figure, run.results / "figures" / "01_voxels.png")

# %% [markdown]
# Where the map of the explained variance is darker than that of the ceiling, there is something in
# the response that these features do not hold: a better feature space is what is missing there, not
# a better measurement. Voxels below a ceiling of .05 are grey in the third row.
#
# ## Who explains what
# Two feature spaces can explain the same: an image's edges tell of its content. So the model is
# fitted again without each space. What is lost is the unique part of that space, the rest is
# shared. Correlation between spaces never shows in a single model's weights.

# %%
partition = pd.DataFrame({"all": fit.score})
if variance_partitioning and len(spaces) > 1 and readout == "linear":
    partition = partition_variance(fit, features, voxels, **options)
    save_figure(
        plot_variance_partition(regions, partition, ceiling),
        run.results / "figures" / "01_variance_partition.png",
    )

# %%
if f"{spaces[-1]} unique" in partition and {"x", "y", "z"} <= set(table):
    first, last = spaces[0], spaces[-1]
    difference = partition[f"{first} unique"] - partition[f"{last} unique"]
    figure = plot_voxel_map(
        table, {f"{first} (red) against {last} (blue)": difference}, label="unique variance"
    )
    save_figure(figure, run.results / "figures" / "01_feature_spaces.png")

# %% [markdown]
# Most of it is shared: CLIP's patches know of edges, and edges tell of content. Only the unique
# parts say what one space adds to the other: red voxels need local energies, blue ones what CLIP
# sees. A bar that ends far before the ceiling is a region for which no space here is the right one.
#
# ## What is left open: noise and ignorance
# The residual of an image is what noise added and what the model does not know. Its covariance
# between voxels is kept as it is: a draw of the noise model is a random mixture of the residuals,
# with exactly that covariance. With repeats the noise alone can be estimated, and with it the
# signal: the covariance that responses to images would have if there were no noise.

# %%
noise = NoiseModel(fit.residuals)
draws = noise.draw(2000, torch.Generator().manual_seed(seed))
print(
    f"residual variance: {fit.residuals.var(0).mean():.3f}, of draws"
    f" {draws.var(0).mean().item():.3f}"
)
chosen = np.argsort(-fit.score)[:spectrum_voxels]
covariances = {"residuals": noise.covariance()[chosen][:, chosen]}
if ceiling is not None:
    trials, trial_ids = subject.get_trials("train", normaliser)
    parts = estimate_signal_and_noise(trials[:, chosen], trial_ids)
    covariances["signal"] = parts.signal
    covariances[f"noise of the mean of {repeats}"] = parts.noise / repeats
    unknown = 1 - (parts.noise / repeats).trace() / covariances["residuals"].trace().item()
    print(f"share of the residual variance that is no noise, but not known: {unknown:.2f}")
save_figure(plot_spectra(covariances), run.results / "figures" / "01_signal_and_noise.png")

# %% [markdown]
# Signal has a few strong patterns; noise has them too, as neighbours share it. If noise were
# independent, its spectrum would be flat. Simulated measurements with independent noise would be
# too easy to read.

# %%
record_training(run, subject, normaliser)()
save_encoder(run.logs, model, noise, config)
results = table.assign(**{f"r2 {name}": values for name, values in partition.items()})
results["r2 validation"] = val_score
if ceiling is not None:
    results["ceiling"] = ceiling
with atomic(run.results / "encoding.parquet") as path:
    results.to_parquet(path, index=False)
print(f"peak memory {peak_memory() / 1e9:.2f} GB")

# %%
means = {name: results.loc[mask].mean(numeric_only=True) for name, mask in regions.items()}
summary = pd.DataFrame(means).T
score_columns = [name for name in summary if name == "ceiling" or name.startswith("r2 ")]
summary[score_columns].round(3)

# %% [markdown]
# ## What we saw

# %%
for name, region in summary.iterrows():
    print(f"{name}: R2 {region['r2 all']:.3f}", end="")
    print(f" of at most {region.get('ceiling', float('nan')):.3f}")

# %% [markdown]
# The distance of `r2 all` from `ceiling` by region: it says which areas need better features
# (`feature_spaces`) or a nonlinear `readout`. Compare models on validation images.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py percept --mini --to 00 -p mini_images
# 600`:
# - CLIP's tokens alone: `python run.py percept --mini --from 01 --to 01 -p mini_images 600 -p
#   feature_spaces tokens`;
# - early visual areas alone: the same with `-p rois V1,V2,V3`.
#
# Next: notebook 02_train_percept lets this model measure images that nobody saw in a scanner.
