# %% [markdown]
# # 08 · Small data: every image is once a test image
#
# **Question.** With twenty images, or a hundred, or a thousand, there is no test set worth the
# name. What do four decoders and their mean reach when every image is once a test image, **and**
# on the official split if the data came with one, beside what needs little or no brain?
#
# **Reads** `data/<dataset>/` (notebook 00): any prepared subject, with or without repeats and
# labels. **Writes** `results/<run>/`: `small_data.csv` (the table), `choices.csv` (what was chosen
# in each fold), `scores.parquet`, `metrics.json`, and a sheet of reconstructions.
#
# Cost: the pixels of 100 images of 28 pixels, 3,000 voxels, 10 folds: about 12 minutes on one CPU
# core. Larger data were not timed; fewer `folds` or `networks` take less.
#
# Source: kernels of Cho & Saul 2009; the Bayesian decoder after Naselaris et al. 2009 and
# Schoenmakers et al. 2013; how each is built, and what it is worth: docs/small_data.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "small_data"  # prepared data set under data/
subj = 1  # subject, at least 1
folds = 10  # folds over all images, at least 0; 0 leaves one image out at a time
image_size = 64  # longer side of what is decoded, larger images are shrunk, at least 1
targets = "pixels,clip"  # what is decoded, separated by commas

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoders = "ridge,kernel,bayesian,network"  # separated by commas; ridge is compared with
voxels_kept = "400,800,1600"  # candidate numbers of voxels, separated by commas
alphas = "100,300,1000,3000"  # candidate ridge penalties, separated by commas
h = 256  # width of the network's hidden layers, at least 1
network_voxels = 800  # voxels that the network reads, at least 1
networks = 8  # networks whose outputs are averaged, at least 1

# optimisation
inner_folds = 5  # folds within the training images in which all is chosen, at least 2
num_epochs = 72  # passes over the training images, at least 1
batch_size = 16  # images or samples a step over all processes, at least 1
max_lr = 1.0e-3  # peak learning rate, never scaled by the number of processes, more than 0
seed = 42  # of everything random here

# %%
from src.parameters import configure

run = configure(globals(), "08_small_data")
run

# %%
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from src import small_data
from src.data import open_subject
from src.evaluation import write_csv, write_report
from src.evaluation.small_data import (
    add_small_data_results,
    as_images,
    compare_with_ridge,
    score_embeddings,
    score_pixels,
    summarise,
)
from src.figures import plot_contact_sheet, save_figure
from src.parameters import parse_names
from src.pretrained import Clipper
from src.small_data import Candidate, Examples
from src.utils import progress

# %% [markdown]
# ## Data
# Trials may come in any order and number: those of an image are averaged. Images are shrunk to
# `image_size`, and have one channel where all of them are grey. For the high level each image has
# its CLIP embedding.

# %%
subject = open_subject(dataset, subj)
responses, ids = small_data.read_responses(subject)
images = subject.images(ids)  # (images, height, width, 3)
pixels = small_data.make_pixels(images, image_size)  # (images, channels, height, width)
shape = pixels.shape[1:]
labels = small_data.find_labels(subject, ids)  # (images,), or None
pictures = small_data.group_equal_images(images)  # (images,), equal ones have the same number
repeats = np.bincount(responses.image_rows)
print(
    f"(trials, voxels) = {responses.betas.shape}   (images, channels, height, width) ="
    f" {pixels.shape}\n{repeats.min()} to {repeats.max()} repeats an image,"
    f" {len(np.unique(pictures))} different pictures, protocol {subject.protocol}"
)

# %%
chosen_targets = parse_names(targets, ["pixels", "clip"], "targets")
truth = {}
variants = {}
if "pixels" in chosen_targets:
    truth["pixels"] = pixels.reshape(len(ids), -1)  # (images, pixels)
    variants["pixels"] = small_data.make_variants(pixels, seed)
if "clip" in chosen_targets:
    clipper = Clipper(weights, hidden=False, norm_embs=False, device=run.device)
    truth["clip"] = small_data.encode_images(clipper, images)  # (images, dim)

# %% [markdown]
# ## Splits
# Folds are cut by picture: all trials of an image, and all images with the same pixels, are on one
# side. Labels are spread over the folds evenly. A split that we drew ourselves is not official.

# %%
name = f"{folds}-fold" if folds else "leave-one-out"
splits = {name: small_data.split_into_folds(pictures, labels, folds, seed)}
official = small_data.find_official_split(subject, ids)
if official is not None:
    splits["official"] = [official]
{split: [len(test) for _, test in parts] for split, parts in splits.items()}

# %% [markdown]
# ## Four decoders
# All read the same voxels: z-scored, and ranked by how much they covary with the targets, in the
# training images of the fold. **Ridge** is a penalised linear map. **Kernel** compares the test
# pattern with every training pattern. **Bayesian** turns a linear encoding model round, with a
# prior over images of one or several Gaussians (for pixels: the training images and slightly moved
# copies of them).
# **Network** is the mean of several small networks with dropout and noise on the voxels.

# %%
counts = small_data.parse_voxel_counts(voxels_kept, responses.betas.shape[1])
penalties = small_data.parse_penalties(alphas)
ridge = [{"voxels": v, "alpha": a} for v, a in product(counts, penalties)]
kernel = [
    {"kernel": k, "voxels": v, "alpha": a}
    for k, v, a in product(("arc-cosine", "rbf"), counts, (0.03, 0.1, 0.3))
]
bayesian = [
    {"voxels": v, "strength": s, "clusters": c, "evidence": b, "penalty": 10, "shrinkage": 0.8}
    for v, s, c, b in product(counts[:2], (0.5, 1.0), (1, 2, 4), (0.3, 0.5, 0.8))
]
network = {
    "voxels": min(network_voxels, responses.betas.shape[1]),
    "width": h,
    "dropout": 0.5,
    "noise": 0.7,  # standard deviation, of voxels that are z-scored
    "epochs": num_epochs,
    "batch_size": batch_size,
    "max_lr": max_lr,
    "networks": networks,
    "seed": seed,
}

# %%
available = {
    "ridge": Candidate(small_data.predict_ridge, ridge),
    "kernel": Candidate(small_data.predict_kernel, kernel),
    "bayesian": Candidate(small_data.predict_bayesian, bayesian),
    "network": Candidate(small_data.predict_network, [network], {"networks": min(2, networks)}),
}
used = parse_names(decoders, list(available), "decoders") | {"ridge"}
candidates = {name: candidate for name, candidate in available.items() if name in used}


# %% [markdown]
# ## Every fold
# Each setting, and which of the decoders enter the **mean**, is chosen by cross-validation **within
# the training images of the fold**; test images play no part. Beside them: the mean training
# image, and the mean image of the class that a classifier decodes from the brain, which knows the
# class and nothing else; images without classes have no such row.

# %%
def decode(target, fold):
    """Predictions of one fold's test images: {row: (test images, targets)}, and what was chosen."""
    train, test = fold
    voxels = responses.average(train)  # (images, voxels)
    examples = Examples(voxels, truth[target], variants.get(target, {}))
    train_labels = None if labels is None else labels[train]
    n_inner = min(inner_folds, len(np.unique(pictures[train])))
    inner = small_data.split_into_folds(pictures[train], train_labels, n_inner, seed)
    decoded = small_data.decode_fold(examples, fold, inner, candidates)
    predictions = dict(decoded.predictions)
    if small_data.are_classes(labels):
        predictions["class_mean"] = small_data.predict_class_mean(examples, fold, labels)
    mean = truth[target][train].mean(0)
    predictions["mean_image"] = np.repeat(mean[None], len(test), 0)
    return predictions, decoded


# %%
reconstructed, choices = {}, []
for target, split in product(truth, splits):
    rows = {}
    for number, fold in enumerate(progress(splits[split], f"{target}, {split}")):
        predictions, decoded = decode(target, fold)
        for row, predicted in predictions.items():
            rows.setdefault(row, []).append(predicted)
        where = {"target": target, "split": split, "fold": number}
        choices.append(where | decoded.describe())
    reconstructed[target, split] = {row: np.concatenate(parts) for row, parts in rows.items()}
run.record_parameters()
write_csv(run.results / "choices.csv", pd.DataFrame(choices))
pd.DataFrame(choices).head(12)

# %% [markdown]
# ## Score
# Low level: correlation, SSIM and squared error of the pixels, clipped to what an image can be.
# High level: two-way identification and top-1 in CLIP's embedding, centred on the mean of all
# embeddings. "shuffled" scores the mean decoder's reconstructions against other images.

# %%
tested = {split: np.concatenate([test for _, test in parts]) for split, parts in splits.items()}
score = {"pixels": partial(score_pixels, shape=shape, seed=seed), "clip": score_embeddings}
scores = pd.concat(
    [
        score[target](truth[target], predictions, tested[split], ids).assign(split=split)
        for (target, split), predictions in reconstructed.items()
    ],
    ignore_index=True,
)

# %% [markdown]
# ## The table
# Mean and 95 % bootstrap interval over test images; every split, decoder and baseline.

# %%
summary = summarise(scores)
write_csv(run.results / "small_data.csv", summary.round(4))
text = [f"{line.value:.3f} [{line.low:.3f}, {line.high:.3f}]" for line in summary.itertuples()]
summary.assign(score=text).pivot_table(
    index=["split", "metric"], columns="row", values="score", aggfunc="first", sort=False
)

# %% [markdown]
# ## Against ridge
# Paired over the same images; positive where the other decoder is better. An interval that holds
# zero says that these images do not tell them apart.

# %%
differences = compare_with_ridge(scores)
differences.round(4)

# %%
add_small_data_results(run, subject, scores, summary, differences)

# %%
if "pixels" in truth:
    first = next(iter(splits))
    predictions = reconstructed["pixels", first]
    columns = {"seen": as_images(truth["pixels"][tested[first]], shape)} | {
        row.replace("_", " "): as_images(predicted, shape) for row, predicted in predictions.items()
    }
    sheet = plot_contact_sheet(columns, n=16, enlarge="nearest")
    save_figure(sheet, run.results / "contact_sheet.png")
print(write_report(run.results))

# %% [markdown]
# ## What we saw

# %%
for line in summary.itertuples():
    print(f"{line.split}, {line.metric}, {line.row}: {line.value:.3f}", end=" ")
    print(f"[{line.low:.3f}, {line.high:.3f}]")

# %% [markdown]
# Compare differences with the baselines, not scores with zero: on the official split of digits69
# the mean image alone correlates .65 with the test digits. SSIM rewards sharpness; the class mean,
# which only knows six from nine, is a hard baseline for it. Read the folds first: an official
# split of ten images is an easy or a hard one by chance. Digits69 was provided (in part) by the
# Donders Institute for Brain, Cognition and Behaviour, Radboud University Nijmegen.
#
# ## Try this next
# Short experiments, with the command in docs/small_data.md:
# - one decoder: `--decoders ridge`;
# - another seed of the folds: `--seed 7`.
