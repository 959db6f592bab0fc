# %% [markdown]
# # 05 · Retrieve: which of these images was seen?
#
# **Question.** Given brain activity, is the image that was seen nearer than all the others, and
# given an image, is the right brain activity nearest? Is it still so among images that resemble
# each other, and does a second model, which re-ranks what the first one found, help?
#
# **Reads** `results/<run>/reconstructions.safetensors` (notebook 03: tokens predicted from the
# brain, true tokens). **Writes** its part of `results/<run>/metrics.json` and `scores.parquet`,
# `retrieved.parquet` (which candidates came first) and figures. With `model_name2`, it also reads
# that run's reconstructions.
#
# Cost: seconds, and half a minute for the UMAP where it is asked for.
#
# Source: MindEye, arXiv 2305.18274, section 3.2.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
data_path = ""  # files of the source, read here if they are not prepared yet
subj = 1  # subject, at least 1

# model
decoder = "network"  # one of network, ridge, kernel, both, all; both is network and ridge
model_name2 = ""  # run of the 1x768 model, whose candidates this run's tokens re-rank
likelihood = False  # also retrieve by the likelihood of an encoding model (01_train_encoder)
encoder_name = ""  # run of that encoding model, by default this one
weights = "hub"  # pretrained models of the encoding model, hub or mini or a folder

# optimisation
seed = 42  # of everything random here

# evaluation
pool_size = 300  # candidates in a pool of the published protocol, at least 2
n_pools = 30  # pools of the published protocol, at least 1
pool_sampling = "random"  # one of random, consecutive; consecutive is as in MindEye's scripts
rerank_k = 16  # candidates that are re-ranked, at least 1
transductive = False  # also report, apart, the likelihood centred over the test queries
hard_negatives = ""  # columns of image labels that hard negatives share, separated by commas
plot_umap = False  # draw a UMAP of brain and image embeddings
umap_label = ""  # column of the image labels that colours the UMAP

# %%
from src.parameters import configure

run = configure(globals(), "05_retrieve")
run

# %%
import numpy as np
import pandas as pd

from src import retrieval
from src.data import check_made_from, open_training_split
from src.decoding import load_reconstructions
from src.encoding import open_brain_agreement
from src.evaluation import add_results, derangements, make_record, paired_bootstrap, provenance
from src.evaluation.likeness import (
    compare_by_likelihood,
    compare_embeddings,
    compare_transductively,
    load_held_out,
)

# %%
from src.figures import plot_embeddings, plot_hits_and_misses, plot_retrieval_curve, save_figure
from src.parameters import list_decoders
from src.readers import prepare_if_missing
from src.utils import HOME, PerceptError, atomic

# %%
prepare_if_missing("mindeye", data_path, dataset, subj)
subject = open_training_split(dataset, subj, run.logs)
tensors, metadata = load_reconstructions(run.results)
check_made_from(metadata, subject.identity, run.name)
names = list_decoders(decoder)
if model_name2 == run.name:
    raise PerceptError(
        f"model_name2 is this very run, '{run.name}': name another run, whose single embedding"
        " finds the candidates."
    )
brain = {name: tensors[f"projected_{name}"] for name in names}
clip, image_ids = tensors["true_tokens"], tensors["image_ids"].numpy()
groups = None
if hard_negatives:
    groups = subject.categories(image_ids, hard_negatives)
categories = subject.categories(image_ids, umap_label) if umap_label else ["test image"] * len(clip)
print(f"(test images, tokens, dim) = {tuple(clip.shape)}")

# %% [markdown]
# ## Top-1 both ways
# *Image from brain*: the brain is the query, images are the candidates. *Brain from image*: the
# other way round. The published scripts name them the other way round (see `src/retrieval.py`).
# The floor pairs brains with the wrong images.

# %%
directions = {
    "image_from_brain": retrieval.top1_image_from_brain_each,
    "brain_from_image": retrieval.top1_brain_from_image_each,
}
shuffles = list(derangements(len(clip), 3, seed))
ranks = {
    (name, d): top1(brain[name], clip).astype(float)
    for name in names
    for d, top1 in directions.items()
}
common = {
    "better": "higher",
    "protocol": metadata["protocol"],
    "test_set": metadata["test_set"],
    "upper_bound": "the true image is among the candidates, so 1",
}

# %%
records = [
    make_record(
        f"{d}_top1" + ("" if name == names[0] else f" ({name})"),
        ranks[name, d],
        baselines={
            "shuffled": np.stack([directions[d](brain[name], clip[order]) for order in shuffles], 1)
        },
        chance=1 / len(clip),
        description=f"top-1 of {len(clip)} test images, {name}",
        source="MindEye, section 3.2",
        **common,
    )
    for name, d in ranks
]
pd.DataFrame(records)[["name", "value", "low", "high", "n", "chance"]]

# %% [markdown]
# ## The published protocol
# Pools, repeated; its interval speaks of the pools, not of the images. The curve has every image
# as a candidate at its right end.

# %%
size = min(pool_size, len(clip))
if size < pool_size:
    print(
        f"Pools of {size}, as there are no {pool_size} test images: every pool is the whole"
        " test set, and the intervals have no width."
    )
pools = pd.concat(
    [
        retrieval.evaluate_published_protocol(
            brain[n], clip, size, n_pools, seed, pool_sampling
        ).assign(decoder=n)
        for n in names
    ]
)
curve = retrieval.compute_retrieval_by_pool_size(brain[names[0]], clip, n_pools=n_pools, seed=seed)
run.record_parameters()
save_figure(plot_retrieval_curve(curve), run.results / "figures" / "retrieval_curve.png")
pools

# %% [markdown]
# ## Hard negatives
# Candidates are only images that share the given labels with the one that was seen, e.g. the same
# object in the same scene.

# %%
hard_of = {}  # which images have a hard negative
if hard_negatives:
    for name in names:
        for d in directions:
            hard = retrieval.compute_hard_negative_top1(brain[name], clip, groups, d)
            keep = hard_of[name] = np.isfinite(hard.scores)
            ranks[name, f"hard_{d}"] = hard.scores[keep]
            records.append(
                make_record(
                    f"hard_{d}_top1" + ("" if name == names[0] else f" ({name})"),
                    hard.scores[keep],
                    baselines={"chance": hard.chance_levels[keep]},
                    chance=hard.chance,
                    description=f"top-1 among test images with the same {hard_negatives}, {name}",
                    source="hard negatives",
                    **common,
                )
            )
pd.DataFrame(records)[["name", "value", "low", "high", "n", "chance"]]

# %% [markdown]
# ## Other measures of likeness
# The cosine counts what all images share as likeness, so it is also taken after the mean of the
# training images is taken off (*centred*), and with a penalty for images that are near everything
# (*CSLS*; who is such a hub is judged by validation images). With `likelihood` an encoding model
# predicts the response to each image, and what is measured beside it is judged by the covariance of
# its residuals: the *likelihood*, alone and added to the centred cosine. No answer here depends on
# another test query; `transductive` adds one that does, in a table of its own.

# %%
measures, apart = {}, {}
held_out = load_held_out(run.results, names[:1])
system = names[0]
if held_out is not None:
    measures = compare_embeddings(brain[system], clip, held_out, system)
if likelihood and held_out is None:
    raise PerceptError(
        "The likelihood takes its scale from validation images, and this run has none predicted:"
        " run notebook 03 again."
    )
if likelihood:
    encoder_logs = HOME / "train_logs" / encoder_name if encoder_name else run.logs
    agreement = open_brain_agreement(encoder_logs, subject, weights, run.device)
    repeats, cosine = int(metadata["repeats"]), measures["centred cosine", "image_from_brain"]
    measures |= compare_by_likelihood(
        agreement, subject, image_ids, repeats, cosine, held_out, system
    )
    if transductive:
        apart = compare_transductively(agreement, subject, image_ids, repeats)


# %%
def find_first(similarity, d):
    """Whether the right one comes first (n,), by similarities (brains, images)."""
    return (retrieval.rank_by_similarity(similarity, d) == 1).astype(float)


for (measure, d), similarity in measures.items():
    values = ranks[measure, d] = find_first(similarity, d)
    shuffled = [find_first(similarity[:, order], d) for order in shuffles]
    records.append(
        make_record(
            f"{d}_top1 ({measure})",
            values,
            baselines={"shuffled": np.stack(shuffled, 1)},
            chance=1 / len(clip),
            description=f"top-1 of {len(clip)} test images, {system}, by {measure}",
            source="docs/retrieval.md",
            **common,
        )
    )

# %%
compared = [
    {"measure": measure, "direction": d, "cosine": ranks[system, d].mean()}
    | {"top-1": (values := find_first(similarity, d)).mean()}
    | paired_bootstrap(values, ranks[system, d])._asdict()
    for (measure, d), similarity in (measures | apart).items()
]
pd.DataFrame(compared)

# %% [markdown]
# ## Two models
# The single embedding of the other run finds the nearest candidates; all the tokens of this run
# choose among them (as the paper does for images of LAION-5B). It can find no more than the other
# run has among its `rerank_k` nearest: that share is the ceiling.

# %%
second = []


# %%
def score_reranking(result, direction, chooser):
    """The record of two-model retrieval: first the 1x768 model's candidates, then the chooser."""
    mark = "" if chooser == "all tokens" else f" ({chooser})"
    return make_record(
        f"second_order_{direction}_top1{mark}",
        (result.final_ranks == 1).astype(float),
        baselines={f"{model_name2} alone": (result.first_ranks == 1).astype(float)},
        chance=1 / len(clip),
        description=f"top-1 of {len(clip)}: {k} found by {model_name2}, re-ranked by {chooser}",
        source="MindEye, appendix A.7",
        **common | {"upper_bound": (result.first_ranks <= k).astype(float)},
    )


def compare_reranking(result, direction, chooser, name, ranks):
    """A row of the table: re-ranked against one model alone, a paired difference."""
    change = paired_bootstrap(result.final_ranks == 1, ranks == 1)
    return {
        "direction": direction,
        "chosen by": chooser,
        "re-ranked against": name,
        "re-ranked": (result.final_ranks == 1).mean(),
        "alone": (ranks == 1).mean(),
        **change._asdict(),
    }


# %%
if model_name2:
    first = retrieval.load_run_embeddings(HOME / "results" / model_name2, image_ids)
    k = min(rerank_k, len(clip))
    choosers = [(d, "all tokens", None) for d in directions]
    choosers += [(d, m, s) for (m, d), s in measures.items() if m.startswith("likelihood")]
    for direction, chooser, similarity in choosers:
        result = retrieval.rerank_second_order(
            brain[names[0]], clip, *first, k=k, direction=direction, similarity=similarity
        )
        records.append(score_reranking(result, direction, chooser))
        alone = {f"{model_name2} alone": result.first_ranks}
        alone[f"{run.name} alone, {chooser}"] = result.second_ranks
        second += [
            compare_reranking(result, direction, chooser, name, alone_ranks)
            for name, alone_ranks in alone.items()
        ]

# %%
pd.DataFrame(second)

# %% [markdown]
# ## The network against ridge and kernel
# A paired bootstrap over the test images: the same images, the same candidates.

# %%
differences = []
for other in names[1:]:
    for d in sorted({d for name, d in ranks if name == other}):
        result = paired_bootstrap(ranks[names[0], d], ranks[other, d])
        better = names[0] if result.low > 0 else "undecided"
        if result.high < 0:
            better = other
        row = {"metric": f"{d}_top1", "against": other}
        differences.append(row | result._asdict() | {"better": better})
pd.DataFrame(differences)

# %% [markdown]
# ## Into the results of the run
# A row an image in `scores.parquet`, a record a score in `metrics.json`, and which candidates came
# first in `retrieved.parquet`.

# %%
scores = pd.concat(
    [
        pd.DataFrame(
            {
                "metric": f"{d}_top1",
                "row": "system" if n == names[0] else n,
                "image": image_ids[hard_of[n] if d.startswith("hard") else slice(None)],
                "value": v,
            }
        )
        for (n, d), v in ranks.items()
    ],
    ignore_index=True,
)
note = f"{n_pools} pools of {size} candidates, as in the papers; the interval speaks of the pools."
tables = [{"title": "Retrieval in pools", "note": note, "rows": pools.to_dict("records")}]

# %%
tables.append(
    {
        "title": "Retrieval by number of candidates",
        "note": "Chance falls with the pool.",
        "rows": curve.to_dict("records"),
    }
)
if differences:
    note = f"Paired differences over the same images, positive where the {names[0]} is better."
    title = f"Retrieval: {names[0]} against other decoders"
    tables.append({"title": title, "note": note, "rows": differences})
if second:
    tables.append(
        {
            "title": "Retrieval with two models",
            "note": f"{model_name2} finds, another measure chooses.",
            "rows": second,
        }
    )

# %%
if measures:
    note = "Measures of likeness beside the cosine; differences to it are paired."
    rows = [row for row in compared if (row["measure"], row["direction"]) in measures]
    tables.append({"title": "Retrieval by other measures", "note": note, "rows": rows})
if apart:
    note = "TRANSDUCTIVE: centred over the test queries, so that each answer depends on them all."
    rows = [row for row in compared if (row["measure"], row["direction"]) in apart]
    tables.append({"title": "Retrieval, transductive", "note": note, "rows": rows})

# %%
origin = {"subject": subj, "dataset": dataset, "data": subject.identity}
about = provenance(run.recipe or run.name, {"all": seed}, [], **origin)
add_results(run.results, run.stage, scores, records, about, tables)

# %%
directions = {
    "image_from_brain": (brain[names[0]], clip),
    "brain_from_image": (clip, brain[names[0]]),
}
first = []
for d, (queries, candidates) in directions.items():
    nearest_ids = image_ids[
        retrieval.find_nearest(queries, candidates, k=min(8, len(clip)))[1].numpy()
    ]
    first.append(
        pd.DataFrame(
            {
                "direction": d,
                "image": image_ids,
                "rank": retrieval.rank_each(brain[names[0]], clip, d),
                "candidates": list(nearest_ids),
            }
        )
    )
with atomic(run.results / "retrieved.parquet") as path:
    pd.concat(first, ignore_index=True).to_parquet(path, index=False)

# %% [markdown]
# ## Hits and misses
# The first ones in the order of the test set. Brain activity is shown as the image that it was
# recorded for.

# %%
seen, main = tensors["seen"].float(), brain[names[0]]
sides = {
    "image_from_brain": (main, clip, "Image from brain"),
    "brain_from_image": (clip, main, "Brain from image"),
}
for d, (queries, candidates, title) in sides.items():
    ranks = retrieval.rank_each(main, clip, d)
    figure = plot_hits_and_misses(
        seen,
        seen,
        retrieval.find_nearest(queries, candidates, k=min(8, len(clip)))[1],
        np.arange(len(seen)),
        ranks,
        n=5,
        k=min(8, len(clip)),
        title=title,
    )
    save_figure(figure, run.results / "figures" / f"{d}.png")

# %%
if plot_umap:
    save_figure(
        plot_embeddings(brain[names[0]], clip, categories, seed=seed),
        run.results / "figures" / "umap.png",
    )

# %% [markdown]
# ## What we saw

# %%
for direction in sides:
    ranks = retrieval.rank_each(main, clip, direction)
    print(
        f"{direction}: the right one came first in {(ranks == 1).mean():.1%} of {len(ranks)} cases"
        f" (chance {1 / len(ranks):.1%}), its median rank was {np.median(ranks):.0f}"
    )

# %% [markdown]
# Where the seen image is not first, do the first ones share its scene, colour or object? In the
# UMAP, brain and image embeddings of one category should lie together; two separate clouds would
# mean that the two spaces have not been joined.
#
# ## Try this next
# Short experiments on the mini world, after `python run.py mindeye --mini`:
# - harder distractors: `python run.py mindeye --mini --from 05 --to 05 -p hard_negatives
#   scene,kind,colour`;
# - the ridge alone: the same with `-p decoder ridge`.
#
# Next: notebook 06 scores the reconstructions.
