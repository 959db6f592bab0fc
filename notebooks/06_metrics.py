# %% [markdown]
# # 06 · Metrics: what is a reconstruction worth?
#
# **Question.** How alike are seen and reconstructed images, and how much of that would one get
# without the brain, without training, from a lookup, or with a perfect decoder?
#
# **Reads** `results/<run>/reconstructions.safetensors` (notebook 03, and the refined images of 04)
# and `captions_brain.parquet` (04) where there are any, or anyone's reconstructions:
# `recon_path` and `all_images_path` (the published `.pt` tensors, `.npz` or `.npy`, or folders of
# PNG files). **Writes** its part of `results/<run>/metrics.json` (a record a score) and
# `scores.parquet` (a row per image, metric and system), `report.html`, and under `tables/` the
# published tables with the names of the metrics in them.
#
# Cost: 1000 images about half an hour on a CPU, minutes on a GPU, and 0.5 GB of networks to
# download; mini about two minutes on two CPU cores.
#
# Source: MindEye, arXiv 2305.18274, Table 1; MindEye2, arXiv 2403.11207 (captions, brain
# correlation); what stands beside the scores: docs/metrics.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
subj = 1  # subject, at least 1
recon_path = ""  # other reconstructions to score, a .pt, .npz or .npy file or a folder of PNG files
all_images_path = ""  # with recon_path, the images that were seen; folders are paired by file name

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them

# optimisation
seed = 42  # of everything random here

# evaluation
metrics = "published"  # scores, separated by commas, published: those of the paper
resizing = "published"  # one of published, antialias, straight; of images (docs/metrics.md)
hard_negatives = ""  # columns of image labels that hard negatives share, separated by commas
blend = 0.0  # share of the blurry image in what is scored, published .25, at least 0, at most 1
brain_corr = False  # also compute brain correlation, with GNet's predicted responses
caption_metrics = "all"  # caption scores, separated by commas, or all
references = "one"  # one of one, all; human captions that a caption is compared with
shuffles = 3  # random pairings of the shuffled baseline, at least 1

# %%
from src.parameters import configure

run = configure(globals(), "06_metrics")
run

# %%
import pandas as pd

from src.evaluation import (
    add_results,
    check_alignment,
    gallery_widget,
    hash_pixels,
    make_records,
    provenance,
    score_table,
    write_report,
)

# %%
from src.evaluation.scoring import (
    add_other_recon,
    describe_scores,
    draw_figures,
    find_table,
    list_beneath_baselines,
    list_choices,
    list_published_values,
    load_material,
    make_gallery,
    make_tables,
    open_instruments,
    score_brain_correlation,
    score_captions,
    score_token_correlation,
    score_within_groups,
    split_by_condition,
    write_published_tables,
)

# %% [markdown]
# ## The images
# "system" is what is scored. Its baselines ("floors"): the mean image, the networks before
# training, the nearest training image, and for each image the other reconstruction that looks most
# like its own. The upper bound ("ceiling") is the generator with the true latents. Other conditions
# (ridge, the low level alone, fewer repeats) are scored beside.
#
# The published evaluation of MindEye2 scores three parts of a reconstruction and one of the low
# level's blurry image (`blend` .25), which is kinder to pixel metrics than what the generator
# painted. Here nothing is blended in unless it is asked for, and then the names of the scores say
# so.

# %%
material = load_material(run)
print(material.describe())

# %% [markdown]
# ## Alarms before scores
# Black, flat or identical images, values that are no numbers, and test images that were trained on.

# %%
alarms = material.find_alarms()
add_other_recon(material)
alarms

# %% [markdown]
# ## The metrics
# Pixel metrics at 425 x 425, and how alike frozen networks find the images: two-way identification
# (AlexNet's second and fifth convolution, Inception, CLIP; chance is .5) or correlation distance
# (EfficientNet, SwAV; lower is better). With the mini weights the networks are miniature twins, and
# are called so. The mini CLIP made the targets too, so it flatters, and is near 1 long before a
# person recognises anything. Therefore the mini world has a judge besides: a classifier that was
# trained on images of its own, that no decoder and no generator was ever trained towards.

# %%
instruments = open_instruments(material)
run.record_parameters()
print(*instruments.sentences, sep="\n")
pd.DataFrame(
    {"better": m.better, "chance": m.chance, "what it is": m.description} | {"metric": m.name}
    for m in instruments.metrics
).set_index("metric")

# %% [markdown]
# ## Score, baselines and upper bound
# Every condition is scored in the same way on the same images. "shuffled" pairs each reconstruction
# with wrong images. Each score becomes a record: mean, 95 % interval over images, baselines, upper
# bound, and the paired difference to other decoders.

# %%
metrics, options = instruments.metrics, material.score_options()
table = score_table(material.seen, material.conditions, metrics, **options)
records = make_records(table, metrics, **material.labels, no_upper_bound=material.no_upper_bound)
scores = split_by_condition(table)  # (images,) by (condition, metric)
summary = table.groupby(["metric", "row"], sort=False)["value"].mean().unstack()
summary.round(3)

# %% [markdown]
# ## More alarms
# Brain data and images that do not belong together, and scores that no baseline is below.

# %%
two_way, pixels = instruments.get_network_name("CLIP", material.mark), f"pixcorr{material.mark}"
if {two_way, pixels} <= set(summary.index):
    alarms += check_alignment(
        scores["system", two_way],
        scores["system", pixels],
        summary.loc[pixels, "shuffled"],
        scores.get(("ceiling", two_way)),
    )
alarms += list_beneath_baselines(records)
alarms

# %% [markdown]
# ## Among images of the same kind
# Two-way identification is easy when any other image may be the distractor. Here the distractors
# share labels or a cluster with the image that was seen.

# %%
same_kind = score_within_groups(material, instruments)
print(same_kind.sentence)

# %% [markdown]
# ## The noise ceiling
# What the brain's predicted tokens correlate with the true ones, and the most that the mean of this
# decoder's predictions from single repeats could correlate with anything, from how these agree with
# each other. Where notebook 03 wrote no tokens there is none.

# %%
correlation = score_token_correlation(material)
print(correlation.sentence)

# %% [markdown]
# ## Beside the images: brain correlation and captions
# Both are scored where a run has them, by the same rules. `brain_corr`: what would this subject's
# voxels have answered to the reconstruction, as GNet, an encoder from images to voxels, predicts
# it? Captions (notebook 04): how near does a sentence that was read from the brain come to what
# people wrote? docs/metrics.md explains both.

# %%
regional = score_brain_correlation(material)
alarms += list_beneath_baselines(regional.records)
captions = score_captions(material, instruments)
alarms += list_beneath_baselines(captions.records)
print(*captions.sentences, sep="\n")
captions.show()

# %%
parts = (same_kind, correlation, regional)
for part in parts:
    records += part.records
table = pd.concat([table, *(part.table for part in parts)], ignore_index=True)
pd.DataFrame(records)[["name", "value", "low", "high"]]

# %% [markdown]
# ## Tables beside the scores
# One, two and three repeats; every condition with its paired difference to the system; images that
# are far from all training images; images in held-out clusters; and, where several models voted,
# what the vote is worth.

# %%
tables = make_tables(material, metrics, scores, records)
tables += captions.make_table(references)
for entry in tables:
    print(entry["title"], entry["note"], sep=": ")
find_table(tables, "Other decoders on the same images")

# %%
find_table(tables, "Fewer repeats of the test images")

# %%
find_table(tables, "By distance to the nearest training image")

# %%
find_table(tables, "What the vote is worth")

# %% [markdown]
# ## Into the results of the run
# With the choices that were made on the way, as notebook 03 was told, and the versions of the
# networks that were looked through.

# %%
identity = {"id": material.metadata["test_set"], "images": len(material.seen)}
about = provenance(
    run.recipe or run.name,
    {"all": seed},
    list_choices(material),
    **material.describe_data(),
    alarms=alarms,
    protocol=material.metadata["protocol"],
    test_set=identity | {"pixels": hash_pixels(material.seen)},
    resizing=resizing,
    parameters={key: str(value) for key, value in run.parameters.items()},
    models=instruments.models,
)
add_results(run.results, run.stage, table, records, about, tables)
captions.add_to_results(material, about)

# %% [markdown]
# ## Figures
# The first shows every score (dot) with its interval, its baselines and its upper bound. Would the
# system know when it does not know? Samples of one image that differ much should be worse: the
# curve leaves out the images whose samples differ most. Where it is flat, the spread says nothing.

# %%
draw_figures(material, instruments, scores, records)

# %% [markdown]
# ## The published tables, with names
# A line a metric, the published ones first and in their order, beside baselines and upper bound.
# The refined images have their own, as the published evaluation has.

# %%
write_published_tables(material, instruments, table, records, regional, captions)

# %%
list_published_values(material, instruments, scores)

# %% [markdown]
# ## The report and the gallery
# One page that holds everything. Below, the same gallery in this notebook: sorted by any score,
# hits or misses of the retrieval.

# %%
images, details = make_gallery(material, instruments, scores, captions)
samples = material.tensors.get("samples")
print(f"Report: {write_report(run.results, images, details, samples)}")

# %%
gallery_widget(images, details, samples)

# %% [markdown]
# ## What we saw

# %%
print(f"{len(material.seen)} images, {len(alarms)} alarms.")
print(describe_scores(records))

# %% [markdown]
# A score means something only between its baselines and its upper bound. Where "nearest_train" is
# as good as the system, the generator adds nothing to a lookup; where "other_recon" is, the sort of
# image is right and the image is not. Where ridge is as good as the network, depth adds nothing.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye --mini`:
# - two metrics alone: `python run.py mindeye --mini --from 06 -p metrics pixcorr,CLIP`;
# - harder distractors, which share the scene as well: the same with `-p hard_negatives
#   scene,kind,colour`;
# - how sure is a baseline? More random pairings of "shuffled": the same with `-p shuffles 20`.
#
# Next: notebook 07 compares runs.
