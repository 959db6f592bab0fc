# %% [markdown]
# # 06 · Metrics: what is a reconstruction worth?
#
# **Question.** How alike are seen and reconstructed images, and how much of that would one get
# without the brain, without training, from a lookup, or with a perfect decoder? And how near do
# captions from the brain come to what people wrote?
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
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans

from src.data import Normaliser, check_made_from, open_training_split
from src.decoding import load_reconstructions

# %%
from src.evaluation import (
    add_results,
    bootstrap_mean,
    check_alignment,
    check_leak,
    check_outputs,
    compute_mean_image,
    derangements,
    find_most_similar,
    hash_pixels,
    load_image_pairs,
    make_record,
    make_records,
    noise_ceiling,
    provenance,
)

# %%
from src.evaluation import (
    brain_correlation,
    caption_table,
    corpus_bleu_table,
    describe_ensemble_gain,
    ensemble_gain,
    find_most_common_caption,
    format_caption_table,
    gain_table,
    gallery_widget,
    pair_captions,
    prepare_caption_metrics,
    published_table,
    read_captions,
    retrieval_records,
    roi_masks,
    score_table,
    write_report,
    write_table,
)

# %%
from src.figures import plot_abstention_curve, plot_score_by_distance, plot_score_dots, save_figure
from src.metrics import (
    METRICS,
    PUBLISHED_METRICS,
    Metric,
    answer_metrics,
    apply_resizing,
    pcc,
    reorder_lazily,
    resize,
    two_way_within,
)
from src.parameters import list_decoders
from src.pretrained import CategoryClassifier, Clipper, FeatureNetwork, load_gnet
from src.utils import HOME, PerceptError, atomic, read_json, resolve

# %% [markdown]
# ## The pictures
# "system" is what is scored. Its floors: the mean image, the networks before training, the nearest
# training image, and for each image the other reconstruction that looks most like its own. The
# ceiling is the generator with the true latents. Other rows (ridge, the low level alone, fewer
# repeats) are scored beside.

# %%
is_own_run = not recon_path
if is_own_run:
    subject = open_training_split(dataset, subj, run.logs)
    tensors, metadata = load_reconstructions(run.results)
    image_ids, main = tensors["image_ids"].numpy(), metadata["main"]
    pictures = {name: tensors[name] for name in tensors if tensors[name].ndim == 4}
    pictures = {"system": pictures.pop(main)} | pictures
else:
    if not (all_images_path and model_name):
        raise PerceptError(
            "recon_path needs all_images_path (the images that were seen) and model_name (a name"
            " for the results)."
        )
    pairs = load_image_pairs(resolve(all_images_path), resolve(recon_path))
    pictures = {"seen": pairs.seen, "system": pairs.recons}
    pictures["mean_seen"] = compute_mean_image(pictures["seen"])
    image_ids, metadata, tensors, subject = (
        np.arange(len(pictures["seen"])),
        {"protocol": "as given", "test_set": hash_pixels(pictures["seen"])},
        {},
        None,
    )
seen, recons = pictures.pop("seen"), pictures["system"]

# %%
if is_own_run:
    check_made_from(metadata, subject.identity, run.name)
if not 2 <= len(seen) == len(recons):
    raise PerceptError(
        f"{len(seen)} seen and {len(recons)} reconstructed pictures were given: give as many of"
        " both, in the same order, and at least two."
    )
print(
    f"(test images, channels, height, width) = {tuple(seen.shape)} seen, {tuple(recons.shape)}"
    f" reconstructed; other rows: {', '.join(list(pictures)[1:])}"
)

# %% [markdown]
# ## With the blurry picture in it
# The published evaluation of MindEye2 scores three parts of a reconstruction and one of the low
# level's blurry picture (`blend` .25), which is kinder to pixel metrics than what the generator
# painted. Here nothing is blended in unless it is asked for, and then the names of the scores say
# so.

# %%
mark = ""
if blend:
    mark = f", blend {blend:g}"
if blend:
    blurry = None
    if is_own_run:
        blurry = pictures.get(f"low_level_{main}")
    if blurry is None:
        raise PerceptError(
            "blend needs the blurry pictures of a low level, which these reconstructions come"
            " without: set it to 0."
        )
    for row in {"system", "refined"} & set(pictures):
        pictures[row] = (1 - blend) * pictures[row].float() + blend * resize(
            blurry.float(), pictures[row].shape[-1]
        )
    recons = pictures["system"]

# %% [markdown]
# ## Alarms before scores
# Black, flat or identical pictures, values that are no numbers, and test images that were trained
# on.

# %%
alarms = check_outputs(recons)
if refused := [alarm for alarm in alarms if "NaN" in alarm or "leave the range" in alarm]:
    raise PerceptError(f"These reconstructions cannot be scored: {refused[0]}")
if is_own_run:
    train_ids = subject.image_ids("train")
    blocks = (
        block
        for ids in np.array_split(train_ids, max(1, len(train_ids) // 500))
        for block in [subject.images(ids)]
    )
    alarms += check_leak(subject.images(image_ids), blocks)
pictures["other_recon"] = reorder_lazily(recons, find_most_similar(recons))
alarms

# %% [markdown]
# ## The metrics
# Pixel metrics at 425 x 425, and how alike frozen networks find the pictures: two-way
# identification (AlexNet's second and fifth convolution, Inception, CLIP; chance is .5) or
# correlation distance (EfficientNet, SwAV; lower is better). With the mini weights the networks
# are miniature twins, and are called so. The mini CLIP made the targets too, so it flatters, and
# is near 1 long before a person recognises anything. Therefore the mini world has a judge besides:
# a classifier that was trained on images of its own, that no decoder and no generator was ever
# trained towards.

# %%
clipper = Clipper(weights, hidden=False, norm_embs=True, device=run.device)
prefix = ""
if weights == "mini":
    prefix = "mini:"
listed = PUBLISHED_METRICS if metrics == "published" else metrics.split(",")
metric_names = [name.strip() for name in listed if name.strip()]
if unknown := [name for name in metric_names if name not in METRICS]:
    raise PerceptError(f"metrics names {', '.join(unknown)}: choose among {', '.join(METRICS)}.")
run.record_parameters()

# %%
at_one_size = partial(apply_resizing, resizing=resizing)
looked_through = {"CLIP": clipper.fingerprint()}


def clip_features(images):
    """CLIP's final embedding (n, dim) of pictures (n, 3, height, width), resized bilinearly as the
    published evaluation does.
    """
    first = at_one_size(images)
    parts = (
        resize(first[i : i + 64].float(), clipper.size, antialias=resizing == "antialias")
        for i in range(0, len(first), 64)
    )
    return torch.cat([clipper.embed_image(part).float().cpu() for part in parts])


# %%
def looking(name):
    """A metric with the network it looks through; features of the seen images are kept for other
    runs.
    """
    metric = METRICS[name]
    if not metric.network:
        return (
            metric if name in ("pcc", "mse") else metric.through(at_one_size)
        )  # those two are of pictures at their own size
    if metric.network.startswith("CLIP"):
        return metric.through(clip_features, prefix, clip_seen)
    network = FeatureNetwork(name, weights, run.device, resizing)
    looked_through[name] = network.fingerprint()
    return metric.through(
        network, prefix, network.features(seen, cache=HOME / "results" / ".features")
    )


# %%
clip_seen = clip_features(seen)
chosen = [looking(name) for name in metric_names]
labels = None
if is_own_run:
    labels = subject.labels
judge = None
if weights == "mini" and labels is not None:
    judge = CategoryClassifier(weights, run.device)
if judge is not None and set(judge.categories) <= set(labels.columns):
    labels = labels.set_index("image").loc[image_ids]
    chosen += answer_metrics(
        "mini:judge",
        judge.classify,
        {q: labels[q].to_numpy() for q in judge.categories},
        judge.chance_accuracy,
    )
    labels_named = judge.classify(seen)
    print(
        "the judge is right about the images that were shown:",
        {q: round(float((labels_named[q] == labels[q]).mean()), 3) for q in labels_named},
    )
chosen = [replace(metric, name=metric.name + mark) for metric in chosen]

# %% [markdown]
# ## Score, floors and ceiling
# Every row is scored in the same way on the same images. "shuffled" pairs each reconstruction with
# wrong images.

# %%
table = score_table(seen, pictures, chosen, draws=shuffles, seed=seed, image_ids=image_ids)
reason = "the generator of these reconstructions is not known here"
if "ceiling" in pictures:
    reason = ""
records = make_records(
    table,
    chosen,
    protocol=metadata["protocol"],
    test_set=metadata["test_set"],
    no_upper_bound=reason,
)
per_image = {
    key: part["value"].to_numpy()
    for key, part in table[table["draw"] == 0].groupby(["row", "metric"], sort=False)
}
summary = table.groupby(["metric", "row"], sort=False)["value"].mean().unstack()
summary.round(3)

# %% [markdown]
# ## More alarms
# Rows of brain data and images that do not belong together, and scores that no floor is below.

# %%
two_way, pixels = f"{prefix}CLIP{mark}", f"pixcorr{mark}"
if {two_way, pixels} <= set(summary.index):
    alarms += check_alignment(
        per_image["system", two_way],
        per_image["system", pixels],
        summary.loc[pixels, "shuffled"],
        per_image.get(("ceiling", two_way)),
    )


def beneath_floors(records):
    """A sentence for every score that is not better than one of its floors."""
    for record in records:
        sign = 1 if record["better"] == "higher" else -1
        for floor in [
            name
            for name in ("shuffled", "mean_image", "mean_seen", "common_caption")
            if name in record["floors"]
        ]:
            under = record["floors"][floor]["value"]
            if sign * (record["value"] - under) <= 0:
                yield (
                    f"{record['name']} is {record['value']:.3f}, not better than its floor"
                    f" '{floor.replace('_', ' ')}' ({under:.3f})."
                )


# %%
alarms += beneath_floors(records)
alarms

# %% [markdown]
# ## Among images of the same kind
# Two-way identification is easy when any other image may be the distractor. Here the distractors
# share labels or a cluster with the image that was seen.

# %%
if hard_negatives and is_own_run:
    groups, kind = (
        subject.categories(image_ids, hard_negatives),
        hard_negatives.replace(",", " and "),
    )
else:
    groups, kind = (
        KMeans(max(2, len(seen) // 20), n_init=4, random_state=seed).fit_predict(clip_seen),
        "cluster",
    )
within_scores = {}

# %%
for row in [
    name
    for name in (
        "system",
        "mean_image",
        "mean_seen",
        "other_recon",
        "untrained",
        "nearest_train",
        "ceiling",
        "ridge",
        "kernel",
    )
    if name in pictures
]:
    within_scores[row] = two_way_within(clip_seen, clip_features(pictures[row]), groups)
has_group = np.isfinite(within_scores["system"])

# %%
if has_group.any():
    within_scores = {row: values[has_group] for row, values in within_scores.items()}
    not_baselines = ("system", "ceiling", "ridge", "kernel")
    group_record = make_record(
        f"{prefix}CLIP within {kind}{mark}",
        within_scores["system"],
        baselines={r: v for r, v in within_scores.items() if r not in not_baselines},
        upper_bound=within_scores.get("ceiling", reason),
        better="higher",
        protocol=metadata["protocol"],
        test_set=metadata["test_set"],
        chance=0.5,
        description=f"two-way identification among test images of the same {kind}",
        source="hard distractors",
    )
    records.append(group_record)

# %%
if has_group.any():
    about_images = {"metric": group_record["name"], "image": image_ids[has_group], "draw": 0}
    parts = [
        pd.DataFrame(about_images | {"row": row, "value": values})
        for row, values in within_scores.items()
    ]
    table = pd.concat([table, *parts], ignore_index=True)

# %%
print(f"{has_group.sum()} of {len(has_group)} images share their {kind} with another one")


# %% [markdown]
# ## The noise ceiling
# What the brain's predicted tokens correlate with the true ones, image by image after the mean
# over images is taken off, and the most that the mean of this decoder's predictions from single
# repeats could correlate with anything, from how these agree with each other (Spearman-Brown).

# %%
def centre(tokens):
    """Tokens (images, features) less their mean over images."""
    flat = tokens.float().flatten(1)
    return flat - flat.mean(0)


if "repeat_agreement" in tensors:
    true_centred = centre(tensors["true_tokens"])
    predicted_centred = centre(tensors[metadata["compared"]])
    token_correlation = pcc(true_centred, predicted_centred)
    noise = noise_ceiling(tensors["repeat_agreement"], int(metadata["repeats"]))
    pairings = derangements(len(token_correlation), shuffles, seed)
    shuffled_correlation = np.stack(
        [pcc(true_centred, predicted_centred, pairing=order) for order in pairings], 1
    )

# %%
if "repeat_agreement" in tensors:
    share = None
    if noise.value > 0:
        share = token_correlation.mean() / noise.value
    records.append(
        make_record(
            "token_correlation",
            token_correlation,
            baselines={"shuffled": shuffled_correlation},
            upper_bound="the noise ceiling stands in its place",
            better="higher",
            protocol=metadata["protocol"],
            test_set=metadata["test_set"],
            chance=0.0,
            description="correlation of predicted and true CLIP tokens, image by image",
            source="docs/metrics.md",
            noise_ceiling=noise._asdict(),
            share_of_noise_ceiling=share,
        )
    )

# %%
if "repeat_agreement" in tensors:
    about_images = {"metric": "token_correlation", "row": "system", "image": image_ids, "draw": 0}
    part = pd.DataFrame(about_images | {"value": token_correlation})
    table = pd.concat([table, part], ignore_index=True)
    print(
        f"predicted tokens correlate by {token_correlation.mean():.3f} with the true ones; noise"
        f" ceiling {noise.value:.3f} [{noise.low:.3f}, {noise.high:.3f}]"
    )

# %% [markdown]
# ## Brain correlation
# What would this subject's voxels have answered to the reconstruction? GNet, an encoder from
# images to voxels, says so, and is held against what was measured, across the voxels of a region.
# The seen images themselves, through the encoder, are the ceiling; the generator's pictures of the
# true latents stand beside.

# %%
def in_region(name, mask):
    """The brain correlation of one region as a metric: pictures are prepared by the encoder, the
    truth is what was measured.
    """

    def correlate(true, reconstructed, pairing=slice(None)):
        return brain_correlation(reconstructed, true[pairing], {name: mask})[name]

    text = (
        f"correlation across the voxels of {name} of what GNet says of the reconstruction and what"
        " was measured; ceiling: the seen images"
    )
    return Metric(
        f"brain_correlation {name}{mark}",
        correlate,
        "higher",
        None,
        text,
        "MindEye2, arXiv 2403.11207, brain correlation",
        encoder.predict,
        measured,
    )


regional = []

# %%
if brain_corr and subject is None:
    raise PerceptError(
        "brain_corr needs what was measured while the images were seen, which recon_path comes"
        " without: set it to False."
    )

# %%
if brain_corr:
    encoder, masks = load_gnet(weights, subj, run.device), roi_masks(subject.voxels)
    measured, order = subject.get_mean_betas(
        "test", normaliser=Normaliser.fit(subject)
    )  # (images, voxels), z-scored
    measured = measured[[list(order).index(image) for image in image_ids]]
    regional = [in_region(name, mask) for name, mask in masks.items()]
    rows = {
        name: pictures[name]
        for name in ("system", "refined", "mean_image", "other_recon", "untrained", "nearest_train")
        if name in pictures
    }
    rows |= {"ceiling": seen} | (
        {"true_latents": pictures["ceiling"]} if "ceiling" in pictures else {}
    )
    answers = score_table(seen, rows, regional, draws=shuffles, seed=seed, image_ids=image_ids)
    records += (
        answered := make_records(
            answers, regional, protocol=metadata["protocol"], test_set=metadata["test_set"]
        )
    )
    alarms += beneath_floors(answered)
    table = pd.concat([table, answers], ignore_index=True)
pd.DataFrame(records).tail(len(regional))[["name", "value", "low", "high"]]

# %% [markdown]
# ## Captions
# What notebook 04 read from the brain, against what people wrote of the image and against what the
# same captioner says of the image itself, as published. The last, held against people, is the
# ceiling; "relative" is the share of it that captions from the brain reach. Floors: the same
# captions for wrong images, and one sentence for all images, the most common one of training.

# %%
file, captions, speech = run.results / "captions_brain.parquet", None, []
if is_own_run and caption_metrics and not file.exists():
    print(f"No captions are scored: notebook 04 has written no {file.name} for this run.")
if is_own_run and file.exists() and caption_metrics:
    captions = read_captions(file, image_ids, references)
    sentences = pd.Series(captions["git_image"].tolist())
    if "reference" in captions:
        trained = subject.captions["image"].isin(train_ids)
        sentences = subject.captions["caption"][trained if trained.any() else slice(None)]
    else:
        print("People wrote of no test image: captions are held against GIT's of the image alone.")
    common = find_most_common_caption(sentences)
    speech, unsaid, networks = prepare_caption_metrics(
        caption_metrics, weights, run.device, clipper
    )
    looked_through |= networks
    print(
        f"held against every image: '{common}'",
        *(f"{name} is left out. {why}" for name, why in unsaid.items()),
        sep="\n",
    )

# %%
caption_tables, spoken_records, caption_scores = {}, [], pd.DataFrame()

# %%
endings = {"brain_ref": "", "brain_img": " to image's caption"}


def rename_metric(metric, ending):
    """A caption metric under the name that it has in one pairing."""
    description = f"{metric.description}; ceiling: the captioner looking at the image"
    return replace(metric, name=metric.name + ending, description=description)


if speech:
    on = {"protocol": metadata["protocol"], "test_set": metadata["test_set"]}
    for pairing, (wanted_captions, rows) in pair_captions(captions, common).items():
        scores = score_table(
            wanted_captions, rows, speech, draws=shuffles, seed=seed, image_ids=image_ids
        )
        caption_tables[pairing] = scores
        renamed = scores.assign(metric=scores["metric"] + endings[pairing])
        called = [rename_metric(metric, endings[pairing]) for metric in speech]
        spoken_records += make_records(renamed, called, **on)

# %%
if speech:
    alarms += beneath_floors(spoken_records)
    order = next(derangements(len(seen), 1, seed))
    caption_scores = pd.concat(
        [caption_table(caption_tables), corpus_bleu_table(captions, common, order)],
        ignore_index=True,
    )

# %%
(
    caption_scores.pivot(index="metric", columns="pairing", values="value")
    .reindex(caption_scores["metric"].unique())
    .round(3)
    if len(caption_scores)
    else "There are no captions."
)

# %% [markdown]
# ## Tables beside the scores
# One, two and three repeats; every row with its paired difference to the system; images that are
# far from all training images; images in held-out clusters.

# %%
def format_interval(values):
    """Mean and interval of some images' values, as text."""
    interval = bootstrap_mean(values)
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


repeats = sorted(row for row in pictures if row.startswith("repeats_"))
tables = []

# %%
if repeats:
    rows = [
        {"metric": m.name}
        | {
            row.replace("repeats_", "")
            + (" repeat" if row == "repeats_1" else " repeats"): format_interval(
                per_image[row, m.name]
            )
            for row in repeats
        }
        | {f"{metadata['repeats']} repeats": format_interval(per_image["system", m.name])}
        for m in chosen
    ]
    tables.append(
        {
            "title": "Fewer repeats of the test images",
            "note": "Published tables average three repeats; life offers one.",
            "rows": rows,
        }
    )

# %%
other_rows = []
for record in records:
    cells = {}
    for row, entry in record.get("others", {}).items():
        gain = [
            entry["difference"][k] if record["better"] == "higher" else -entry["difference"][k]
            for k in ("value", "low", "high")
        ]
        if row not in repeats:
            cells[row] = (
                f"{entry['value']:.3f} ({gain[0]:+.3f} [{min(gain[1:]):+.3f},"
                f" {max(gain[1:]):+.3f}])"
            )
    other_rows += [{"metric": record["name"]} | cells] if cells else []
pool = {}
if "retrieved" in metadata:
    pool = json.loads(metadata["retrieved"])
if other_rows:
    note = ""
    if pool:
        note = (
            f"Retrieved: from {pool['pool']}; exact image in pool: {pool['exact image in pool']}. "
        )
    note += "In brackets what the system is better by, paired by image, with its 95 % interval."
    tables.append({"title": "Other decoders on the same images", "note": note, "rows": other_rows})

# %%
if "train_distance" in tensors and len(seen) >= 5:
    fifths = np.array_split(np.argsort(tensors["train_distance"].numpy(), kind="stable"), 5)
    names = ("nearest fifth", "second", "third", "fourth", "farthest fifth")
    rows = [
        {"metric": m.name}
        | {
            name: format_interval(per_image["system", m.name][part])
            for name, part in zip(names, fifths, strict=True)
        }
        for m in chosen
    ]
    tables.append(
        {
            "title": "By distance to the nearest training image",
            "note": "In CLIP's tokens: is a score owed to look-alikes that were trained?",
            "rows": rows,
        }
    )

# %%
if "held_out" in tensors and 0 < tensors["held_out"].sum() < len(seen):
    out = tensors["held_out"].numpy()
    rows = [
        {
            "metric": m.name,
            "held-out clusters": format_interval(per_image["system", m.name][out]),
            "kept clusters": format_interval(per_image["system", m.name][~out]),
        }
        for m in chosen
    ]
    note = (
        f"No training image was like the {out.sum()} test images of the held-out clusters; notebook"
        " 07 compares with the plain run, pair by pair."
    )
    tables.append({"title": "Held-out clusters", "note": note, "rows": rows})

# %% [markdown]
# Where several models voted (notebook 03_vote): the vote beside the single models, the mean of
# their latents, and the oracle, which takes the best voter of each image by the very score of its
# line.

# %%
if "voters" in metadata:
    gains = ensemble_gain(
        per_image,
        {m.name: m.better for m in chosen},
        metadata["voters"].split(","),
        metadata["best_voter"],
        seed,
    )
    tables.append(
        {
            "title": "What the vote is worth",
            "note": describe_ensemble_gain(gains),
            "rows": gain_table(gains),
        }
    )
    print(describe_ensemble_gain(gains))

# %%
if len(caption_scores):
    which = {
        "one": "one sentence of a person an image, as published",
        "all": "all sentences that people wrote of an image",
    }[references]
    note = " ".join(
        [
            f"Held against {which}; relative is the third column over the second.",
            *(f"{name} is left out. {why}" for name, why in unsaid.items()),
        ]
    )
    tables.append(
        {
            "title": "Captions from the brain",
            "note": note,
            "rows": format_caption_table(caption_scores),
        }
    )


# %%
def lines_of(title):
    """The table of that title, or a sentence."""
    return next(
        (pd.DataFrame(t["rows"]).set_index("metric") for t in tables if t["title"] == title),
        "There is none for this run.",
    )


lines_of("Fewer repeats of the test images")

# %%
lines_of("Other decoders on the same images")

# %%
lines_of("What the vote is worth")

# %%
lines_of("By distance to the nearest training image")

# %%
def choose_drawn(wished):
    """Scores of the system that a figure shows: the first four there are."""
    names = [prefix + name if METRICS[name].network else name for name in METRICS] + [
        m.name.removesuffix(mark) for m in chosen if "judge" in m.name
    ]
    candidates = [name + mark for name in (*wished, *names) if ("system", name + mark) in per_image]
    return {name: per_image["system", name] for name in list(dict.fromkeys(candidates))[:4]}


drawn_scores = choose_drawn(("mini:judge:kind", "pixcorr", f"{prefix}EffNet-B1", f"{prefix}SwAV"))
if "train_distance" in tensors and len(seen) >= 5:
    save_figure(
        plot_score_by_distance(tensors["train_distance"], drawn_scores),
        run.results / "figures" / "train_distance.png",
    )

# %% [markdown]
# ## Would it know when it does not know?
# Samples of one image that differ much should be worse. The curve leaves out the images whose
# samples differ most; where it is flat, the spread says nothing.

# %%
if "spread" in tensors:
    save_figure(
        plot_abstention_curve(tensors["spread"], drawn_scores, {m.name: m.better for m in chosen}),
        run.results / "figures" / "abstain.png",
    )

# %% [markdown]
# ## Into the results of the run
# With the choices that were made on the way, as notebook 03 was told.

# %%
def log_choice(what, chosen, split):
    """An entry of the selection log."""
    return {"what": what, "chosen": chosen, "split": split}


def list_network_choices(settings):
    """What was chosen for the network: the epoch, and one of several samples."""
    chosen_on = "none: the last epoch is taken"
    if settings["checkpoint"] == "best":
        chosen_on = "val"
    entries = [log_choice("epoch", settings["checkpoint"], chosen_on)]
    if settings["recons_per_sample"] > 1:
        what = f"one of {settings['recons_per_sample']} samples an image"
        chosen = "nearest to the tokens predicted from the brain"
        if settings.get("selection") == "brain":
            chosen = "makes the measured voxels most likely, by an encoding model"
        entries.append(log_choice(what, chosen, "none: no true image is used"))
    return entries

# %%
def list_choices():
    """The selection log: what was chosen, and on which data."""
    if not is_own_run:
        chosen = "not known: the reconstructions were made elsewhere"
        return [log_choice("everything", chosen, "unknown")]
    if "choices" in metadata:
        return json.loads(metadata["choices"])
    recorded = read_json(run.results / "parameters" / "03_reconstruct.json")
    settings = {name: entry["value"] for name, entry in recorded.items()}
    entries = []
    decoders = list_decoders(settings["decoder"])
    if "network" in decoders:
        entries += list_network_choices(settings)
    if "ridge" in decoders:
        what, split = "penalty of the ridge baseline", "cross-validation within train"
        entries.append(log_choice(what, "by target", split))
    if "kernel" in decoders:
        what = "penalty and width of the kernel decoder"
        entries.append(log_choice(what, "fixed in advance", "none"))
    return entries

# %%
about = provenance(
    run.recipe or run.name,
    {"all": seed},
    list_choices(),
    subject=subj if is_own_run else "unknown",
    dataset=dataset if is_own_run else recon_path,
    data=subject.identity if is_own_run else {},
    alarms=alarms,
    protocol=metadata["protocol"],
    test_set={"id": metadata["test_set"], "images": len(seen), "pixels": hash_pixels(seen)},
    resizing=resizing,
    parameters={key: str(value) for key, value in run.parameters.items()},
    models=looked_through,
)
add_results(run.results, run.stage, table, records, about, tables)

# %%
save_figure(plot_score_dots(records), run.results / "figures" / "scores.png")
if speech:
    endless = [
        t.assign(metric=t["metric"] + endings[pairing]) for pairing, t in caption_tables.items()
    ]
    add_results(
        run.results,
        "06_captions",
        pd.concat(endless, ignore_index=True),
        spoken_records,
        about | {"selection": []},
    )

# %% [markdown]
# ## The published tables, with names
# A line a metric, the published ones first and in their order, beside floors and ceiling. The
# refined pictures have their own, as the published evaluation has.

# %%
def as_system(row, metrics, scored):
    """Records of another row in the system's place, with its own shuffled pairing, and the floors
    that do not depend on it.
    """
    own_scores = score_table(
        seen, {"system": pictures[row]}, metrics, draws=shuffles, seed=seed, image_ids=image_ids
    )
    floors = scored[scored["row"].isin(("mean_image", "untrained", "nearest_train"))]
    limit = "ceiling" if metrics is regional else f"{row}_ceiling"
    best = scored[scored["row"] == limit].assign(row="ceiling")
    none = "the same was not made of the true latents"
    if len(best):
        none = ""
    joined_scores = pd.concat([own_scores, floors, best], ignore_index=True)
    return make_records(
        joined_scores[joined_scores["metric"].isin([m.name for m in metrics])],
        metrics,
        protocol=metadata["protocol"],
        test_set=metadata["test_set"],
        no_upper_bound=none,
    )


# %%
written_tables, retrieval = (
    run.results / "tables",
    retrieval_records(read_json(run.results / "metrics.json")),
)

# %%
write_table(written_tables / f"{run.name}_all_recons.csv", published_table([*records, *retrieval]))
if "refined" in pictures:
    refined = as_system("refined", chosen, table) + (
        as_system("refined", regional, table) if regional else []
    )
    write_table(
        written_tables / f"{run.name}_all_enhancedrecons.csv",
        published_table([*refined, *retrieval]),
    )
if len(caption_scores):
    named = caption_scores.assign(
        Metric=caption_scores["metric"] + " " + caption_scores["pairing"]
    )[["Metric", "value", "low", "high", "n", "shuffled", "common_caption"]]
    write_table(
        written_tables / f"{run.name}_caption_metrics.csv", named.rename(columns={"value": "Value"})
    )
published_table([*records, *retrieval])

# %%
published = {
    m.name: f"{summary.loc[m.name, 'system']:.6f}"
    for m in chosen
    if m.name.removeprefix(prefix).removesuffix(mark) in metric_names
}
if not is_own_run:
    with atomic(resolve(recon_path).with_suffix(".csv")) as path:
        pd.Series(published, name="Value").rename_axis("Metric").to_csv(path, sep="\t")
pd.Series(published)

# %% [markdown]
# ## The report and the gallery
# One page that holds everything. Below, the same gallery in this notebook: sorted by any score,
# hits or misses of the retrieval.

# %%
details = pd.DataFrame({m.name: per_image["system", m.name] for m in chosen}, index=image_ids)
retrieved_file = run.results / "retrieved.parquet"
if is_own_run and retrieved_file.exists():
    ranks = (
        pd.read_parquet(retrieved_file)
        .query("direction == 'image_from_brain'")
        .set_index("image")["rank"]
    )
    details["hit"] = ranks.reindex(image_ids).to_numpy() == 1
if is_own_run and subject.captions is not None:
    details["caption"] = (
        subject.captions.groupby("image")["caption"]
        .first()
        .reindex(image_ids)
        .fillna("")
        .to_numpy()
    )
if speech:
    details["caption"] = [
        f"{a} | from the brain: {b} | of the image: {c}"
        for a, b, c in zip(
            details["caption"], captions["brain"], captions["git_image"], strict=True
        )
    ]

# %%
names = {
    f"low_level_{main}" if is_own_run else "": "low level",
    "system": "reconstructed",
    "refined": "refined",
    "retrieved": "found in the pool",
}
names |= {"nearest_train": "nearest training image", "ceiling": "ceiling"}
gallery_images = {"seen": seen} | {
    label: pictures[row] for row, label in names.items() if row in pictures
}
print(f"Report: {write_report(run.results, gallery_images, details, tensors.get('samples'))}")

# %%
gallery_widget(gallery_images, details, tensors.get("samples"))

# %% [markdown]
# ## What to look at
# A score means something only between its floors and its ceiling. Where "nearest_train" is as good
# as the system, the generator adds nothing to a lookup; where "other_recon" is, the sort of
# picture is right and the picture is not. Where ridge is as good as the network, depth adds
# nothing. Next: notebook 07 compares runs.
