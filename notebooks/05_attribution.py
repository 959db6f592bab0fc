# %% [markdown]
# # 05 · Attribution: which voxels drive a reconstruction?
#
# **Question.** Where in the voxels does a decoder find what it predicts: do early visual regions
# carry the low-level scores, and higher areas the semantic ones? What is explained is the decoder.
# A region that it does not need may still know the same (docs/attribution.md).
#
# **Reads** a run of notebooks 01 and 02, or of one of them: its decoders, normaliser and split.
# **Writes** `results/<run>/`: `attribution.parquet` (one row a voxel), `region_importance.csv`
# (one row a score, region and measure) and figures.
#
# Cost: mini three and a half minutes of one CPU core's time, most of it decoding pictures; full
# size not run here: `steps` passes forwards and back for each test image, and `picture_draws`
# times twice the number of regions decodings of all test images.
#
# Source: integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365; permutation importance,
# Breiman 2001, Machine Learning 45.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1
regions = ""  # regions, by default all; a voxel of several belongs to the first
early = ""  # regions that count as early visual areas, by default V1 to V4 and their parts
labels = "kind,scene"  # columns of the image labels that a probe predicts from predicted tokens
first_images = 0  # only the first so many test images, 0 for all, at least 0

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
explained_decoder = "network"  # one of network, ridge, kernel
checkpoint = "last"  # one of last, best; best is chosen on validation images
autoencoder_name = ""  # run of the low-level network, by default this one (of voters: run/voter)
target = "seen"  # one of seen, predicted; explain similarity to the true or to the predicted image
attribution_baseline = "zero"  # one of zero, train; where the path of integrated gradients starts
steps = 32  # gradients an image, at least 2

# optimisation
seed = 42  # of everything random here

# evaluation
n_permutations = 10  # permutations of each region, at least 1
n_image_permutations = 1  # permutations whose latents are also decoded, the slow part, at least 1

# %%
from src.parameters import configure

run = configure(globals(), "05_attribution")
run

# %%
import json

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from src.data import cache_targets, check_trained_on, open_training_split
from src.decoding import find_decoder, load_decoder
from src.evaluation import attribution
from src.figures import plot_glass_brain, plot_region_bars, plot_voxel_map, save_figure
from src.metrics import pixcorr
from src.pretrained import Clipper, LatentAutoencoder
from src.readers import prepare_if_missing
from src.retrieval import top1_image_from_brain_each
from src.utils import HOME, PerceptError, atomic

# %% [markdown]
# ## The decoders, and what they should have said
# A level that was not trained is left out. Voxels are z-scored by the decoder's own normaliser,
# and the repeats of a test image averaged.

# %%
prepare_if_missing("mindeye", data_path, dataset, subj)
subject = open_training_split(dataset, subj, run.logs)
low_logs = run.logs
if autoencoder_name:
    low_logs = HOME / "train_logs" / autoencoder_name
    check_trained_on(low_logs, subject.key, subject.identity)
if explained_decoder == "network":
    files = {
        "low_level": find_decoder(low_logs, "low_level", checkpoint),
        "high_level": find_decoder(run.logs, "high_level", checkpoint),
    }
else:
    files = {
        "low_level": low_logs / f"low_level_{explained_decoder}.safetensors",
        "high_level": run.logs / f"high_level_{explained_decoder}.safetensors",
    }
files = {kind: path for kind, path in files.items() if path.exists()}
if not files:
    raise PerceptError(
        f"{run.logs} has no {explained_decoder} of either level: run notebook 01 or 02 first, or"
        " name another decoder or checkpoint."
    )
image_ids = subject.image_ids("test")[: first_images or None]
seen = torch.from_numpy(subject.images(image_ids)).permute(0, 3, 1, 2).float() / 255
trained = {kind: load_decoder(path, run.device) for kind, path in files.items()}

# %%
frozen, targets, levels = {}, {}, {}
if "low_level" in trained:
    frozen["low_level"] = LatentAutoencoder(
        weights, device=run.device, **trained["low_level"][1].get("autoencoder", {})
    )
if "high_level" in trained:
    hidden = trained["high_level"][1]["tokens"][0] > 1
    made_for = {"variant": "ViT-L/14", "hidden": hidden, "norm_embs": hidden} | trained[
        "high_level"
    ][1].get("clip", {})
    frozen["high_level"] = Clipper(weights, device=run.device, **made_for)

# %%
for kind, model in frozen.items():
    name = {"low_level": "vae_latents", "high_level": "clip_tokens"}[kind]
    targets[kind] = cache_targets(
        dataset,
        name,
        model.fingerprint(),
        subject.all_images,
        model.encode_pixels,
        model.target_shape,
    )
    truth = targets[kind].rows(image_ids)
    levels[kind] = attribution.open_level(
        subject,
        kind,
        trained[kind][0],
        files[kind],
        truth,
        first_images,
        attribution_baseline,
        run.device,
    )
    print(
        f"{kind}: (test images, voxels) = {levels[kind].voxels.shape} -> {tuple(truth.shape[1:])};"
        f" explained: the {attribution.SIMILARITIES[kind].description}"
    )

# %% [markdown]
# ## Integrated gradients
# For each test image, what each voxel adds to the similarity of the prediction and the target, on
# the way from the baseline to what was measured. With `target = "seen"` the true image's embedding
# is the direction that is explained, so the truth takes part; with "predicted" it is the decoder's
# own prediction. The values of all voxels must add up to the change of the similarity
# (completeness): the error says how well they do.

# %%
explained = {
    kind: attribution.integrated_gradients(level, target, steps) for kind, level in levels.items()
}
for kind, result in explained.items():
    worst = np.abs(result.error).max()
    print(
        f"{kind}: similarity changes by {result.change.mean():+.3f} on average; completeness error"
        f" {result.relative_error:.2%} of that (largest {worst:.1e})"
    )
voxels = attribution.voxel_table(
    subject.voxels, {kind: (level.columns, explained[kind]) for kind, level in levels.items()}
)
run.record_parameters()
with atomic(run.results / "attribution.parquet") as path:
    voxels.to_parquet(path, index=False)

# %%
titles = {"low_level": "low level", "high_level": "high level"}
if {"x", "y", "z"} <= set(voxels):
    named = [
        name
        for name in attribution.partition_voxels(subject.voxels, np.arange(len(voxels)), regions)
        if name != attribution.NO_REGION
    ]
    save_figure(
        plot_voxel_map(voxels, {titles[kind]: voxels[f"{kind}_mean"] for kind in levels}, named),
        run.results / "figures" / "05_voxels.png",
    )

# %%
if "affine" in subject.attributes:
    space = subject.attributes.get("space", "the subject's own space")
    note = (
        ""
        if "mni" in space.lower()
        else f" ({space}: not the template's space, its outline is for orientation only)"
    )
    for kind in levels:
        figure = plot_glass_brain(
            voxels,
            voxels[f"{kind}_mean"],
            json.loads(subject.attributes["affine"]),
            f"{titles[kind]}{note}",
        )
        save_figure(figure, run.results / "figures" / f"05_glass_brain_{kind}.png")

# %% [markdown]
# ## Scores
# Low level: pixel correlation of the decoded picture, and correlation of the latent. High level:
# similarity, retrieval among the test images (image from brain), and whether a linear probe names
# the labels from the predicted tokens. The probe is fitted on the true tokens of training images;
# its ceiling is its accuracy on the true tokens of the test images.

# %%
scores = {kind: {} for kind in levels}
if "low_level" in levels:
    true_latents, vae = levels["low_level"].truth.flatten(1), frozen["low_level"]
    scores["low_level"]["pixcorr"] = lambda predicted: pixcorr(seen, vae.decode(predicted).cpu())
    scores["low_level"]["latent correlation"] = lambda predicted: attribution.SIMILARITIES[
        "low_level"
    ][1](predicted.flatten(1), true_latents).numpy()

# %%
if "high_level" in levels:
    true_tokens, train_ids = levels["high_level"].truth, subject.image_ids("train")
    scores["high_level"]["top-1"] = lambda predicted: top1_image_from_brain_each(
        predicted, true_tokens
    )
    scores["high_level"]["similarity"] = lambda predicted: F.cosine_similarity(
        predicted.flatten(1), true_tokens.flatten(1)
    ).numpy()

# %%
if "high_level" in levels:
    listed = []
    if subject.labels is not None:
        listed = [name.strip() for name in labels.split(",")]
    probe_columns = [name for name in listed if name in subject.labels]
    of_test = {name: subject.categories(image_ids, name) for name in probe_columns}
    of_train = {name: subject.categories(train_ids, name) for name in probe_columns}
    # a label that no training image has cannot be named
    probed = [name for name in probe_columns if set(of_test[name]) <= set(of_train[name])]
    probes = {}
    if probed:
        train_tokens = targets["high_level"].rows(train_ids)
        train_labels = {name: of_train[name] for name in probed}
        probes = attribution.fit_probes(train_tokens, train_labels, seed=seed)
    for name, probe in probes.items():
        scores["high_level"][name] = attribution.naming_score(probe, of_test[name])
    ceilings = {name: f"{scores['high_level'][name](true_tokens).mean():.2f}" for name in probed}
    print(f"labels that a probe names, with its accuracy on true tokens: {ceilings or 'none'}")

# %% [markdown]
# ## Regions permuted
# A region's voxels are given those of another test image, all of them those of the same one: the
# decoder sees as plausible a pattern as ever, of the wrong image. What a score loses is owed to
# the region alone; what other regions know as well is not lost. Therefore all early and all higher
# areas are also permuted together, and each region is left as the only right one ("only").

# %%
parts = {
    kind: attribution.partition_voxels(subject.voxels, level.columns, regions)
    for kind, level in levels.items()
}
groups = {
    kind: attribution.group_regions(part, early or attribution.EARLY_AREAS)
    for kind, part in parts.items()
}
importance = {
    kind: attribution.permutation_importance(
        level,
        parts[kind],
        scores[kind],
        groups[kind],
        n_permutations,
        seed,
        {"pixcorr": n_image_permutations},
    )
    for kind, level in levels.items()
}
tables = [attribution.attribution_table(kind, explained[kind], parts[kind]) for kind in levels]
table = pd.concat(
    [*tables, *(attribution.importance_table(importances) for importances in importance.values())],
    ignore_index=True,
)

# %%
shares = attribution.share_of_higher(list(importance.values()), groups)
with atomic(run.results / "region_importance.csv") as path:
    pd.concat([table, shares], ignore_index=True).to_csv(path, index=False)
save_figure(plot_region_bars(table), run.results / "figures" / "05_regions.png")

# %%
drops = table[table["measure"].isin(["intact", "drop"])].pivot_table(
    index=["measure", "region"], columns="score", values="value", sort=False
)
print(drops.round(3).to_string())
shares.round(3)

# %% [markdown]
# ## What we saw

# %%
for sentence in attribution.describe_importance(table, shares):
    print(sentence)

# %% [markdown]
# A region with a small drop may be redundant: compare the drops of single regions with those of
# the groups below the dotted line, and with "only". Larger regions lose more: `per_100_voxels` in
# the table. Gradients of a decoder are not a map of where information is encoded:
# docs/attribution.md.
#
# ## Try this next
# Short experiments on the mini world, with the command in docs/attribution.md:
# - more permutations, and so narrower intervals: `--n_permutations 20`;
# - other early areas: `--early V1,V2`.
#
# Next: notebook 06 scores the reconstructions.
