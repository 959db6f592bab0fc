# %% [markdown]
# # 00 · Prepare data: any source into one layout
#
# **Question.** What was measured, on which images, how reliably, and which trials may be used for
# what?
#
# **Reads** a source of data: MindEye's webdataset shards, MindEye2's shards, raw NSD, Algonauts
# 2023, BOLD5000, GOD, THINGS-fMRI, the digits69 file, plain arrays (npz), or the embedded mini
# world, which is first written in one of these formats and then read like it. **Writes**
# `data/<dataset>/`: images, betas, trials, voxels (see data/README.md). Formats, options and terms
# of use: docs/data.md.
#
# Cost: about the time of copying the files (NSD subject 1: 30 GB as shards, 42 GB of raw betas);
# mini about 30 seconds.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "nsd"  # prepared data set under data/
source = "mindeye"  # one of mindeye,mindeye2,nsd,algonauts,bold5000,god,things,digits69,npz,mini
source_format = "mindeye"  # one of mindeye,mindeye2,nsd,algonauts,bold5000,god,things; of mini
data_path = "data/nsd_source"  # files of the source, read here if they are not prepared yet
remote_data = False  # fetch what data_path lacks first (docs/downloads.md)
subj = 1  # subject, at least 1
num_sessions = 0  # training sessions that must be there, MindEye2's files only, 0 for all
also = ""  # further subjects that are prepared, separated by commas, e.g. 2,3,4 to pretrain on
options = ""  # more for the reader, as YAML, e.g. {protocol: nsd-982}; docs/data.md lists them
digits_fold = ""  # digits69 only, by default the official split, or e.g. fold-3-of-10
trials_per_session = 750  # of the mini world and of MindEye's shards, at least 1
mini_images = 5000  # mini world only, training images of this subject, at least 1
overwrite = False  # prepare again although the prepared data are there

# optimisation
seed = 42  # of everything random here

# %%
from src.parameters import configure

run = configure(globals(), "00_prepare_data")
run

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from src import miniworld
from src.data import Normaliser, estimate_noise_ceiling, open_subject
from src.figures import plot_image_grid, plot_roi_reliability, plot_trials, save_figure
from src.miniworld.formats import WRITERS, SourceData
from src.readers import (
    READERS,
    default_options,
    describe_preparation,
    needs_preparing,
    parse_options,
    read_source,
)
from src.utils import resolve

# %% [markdown]
# ## What is asked for
# A subject that is prepared is used as it is, if it is what is asked for: the same source, files
# and options. Otherwise it is refused; `overwrite` prepares it again, another `dataset` beside it.

# %%
folder, played, world = resolve(data_path), source, {}
reader_options = {
    "trials_per_session": trials_per_session,
    "min_sessions": num_sessions,
    "seed": seed,
    "split": digits_fold or "official",
}
if source == "mini":
    played = source_format
    world = {"mini_images": mini_images, "trials_per_session": trials_per_session}
    reader_options["attributes"] = {
        "source": "mini world (simulated)",
        "units": "percent signal change (simulated)",
        "normalisation": "none",
        "protocol": "mini-300",
    }
subjects = sorted({subj, *(int(s) for s in also.split(",") if s.strip())})
preparation = describe_preparation(played, folder, options, world, **reader_options)
missing = [s for s in subjects if needs_preparing(preparation, dataset, s, overwrite)]

# %% [markdown]
# ## The mini world plays COCO and the scanner
# Only for `source = "mini"`: draw images, let a simulated visual cortex look at them, and write
# the result in the format of a real source, so that the same reader reads both.

# %%
for number in missing if source == "mini" else []:
    simulated = miniworld.simulate(number, mini_images, trials_per_session=trials_per_session)
    WRITERS[played](folder, number, SourceData.from_world(simulated))
    print(
        f"(trials, voxels) = {simulated.scan.betas.shape}   (images, height, width, channels) ="
        f" {simulated.images.shape}"
    )

# %% [markdown]
# ## Read
# Whatever the source, this leaves the same files. An image is in one split only; this is checked,
# and refused otherwise.

# %%
if remote_data and missing:
    from src.pipeline.download import fetch

    release = {"webdataset_avg_new": "mindeye_new", "webdataset": "mindeye_early"}
    for number in missing:
        bundle = release.get(parse_options(played, options).get("layout", ""), source)
        counted = {"num_sessions": num_sessions} if bundle in ("mindeye2", "nsd") else {}
        fetch(bundle, folder, subj=number, **counted)

# %%
print(
    f"options of the reader '{played}' and their defaults: {default_options(played)}\n\n"
    f"terms of use: {READERS[played].TERMS}"
)
for number in missing:
    read_source(played, folder, dataset, number, options, world, **reader_options)
subject = open_subject(dataset, subj)
run.record_parameters()
subject

# %% [markdown]
# ## What came in

# %%
trials = subject.trials
counts = trials.groupby("split").agg(
    trials=("trial", "size"), images=("image", "nunique"), sessions=("session", "nunique")
)
repeats = trials.groupby(["split", "image"]).size().groupby("split")
counts["repeats an image"] = repeats.agg(lambda n: f"{n.min()} to {n.max()}, mean {n.mean():.2f}")
print(
    f"protocol {subject.protocol}, test set {subject.test_set}; (trials, voxels) ="
    f" {subject.betas.shape}"
)
counts

# %%
for split in ("train", "test"):
    ids = subject.image_ids(split)[:12]
    grid = plot_image_grid({split: np.moveaxis(subject.images(ids), 3, 1) / 255})
    save_figure(grid, run.results / "figures" / f"00_{split}_images.png")

# %%
labels, captions = subject.labels, subject.captions
if captions is not None:
    print(captions[captions.image == subject.image_ids("test")[0]].caption.to_string(index=False))
labels.head() if labels is not None else "this source has no labels"

# %% [markdown]
# ## How reliable is it?
# The noise ceiling: the share of a voxel's variance that the image explains, of a single trial and
# of the mean of three, estimated from the repeats of training images (Allen et al. 2022). It is
# estimated here, not taken from the source.

# %%
repeated = (trials[trials.split == "train"].groupby("image").size() > 1).any()
voxels = subject.voxels.assign(
    noise_ceiling=estimate_noise_ceiling(subject).noise_ceiling.to_numpy() if repeated else np.nan
)
voxels["of three trials"] = (
    estimate_noise_ceiling(subject, 3).noise_ceiling.to_numpy() if repeated else np.nan
)
regions = {"all voxels": np.ones(len(voxels), bool)} | {
    name: voxels[name].to_numpy() for name in voxels.select_dtypes("bool").columns
}
table = {
    name: (
        {"voxels": mask.sum()}
        | voxels.loc[mask, ["noise_ceiling", "of three trials"]].median().round(3).to_dict()
    )
    for name, mask in regions.items()
}
if repeated and len(regions) > 1:
    largest = sorted(regions, key=lambda name: -regions[name].sum())[1:21]
    save_figure(
        plot_roi_reliability(voxels, rois=largest),
        run.results / "figures" / "rois.png",
    )

# %%
pd.DataFrame(table).T.astype({"voxels": int}).rename(
    columns={"noise_ceiling": "median noise ceiling of a trial"}
)

# %% [markdown]
# ## A few trials
# The voxels that are most reliable in training, at each presentation of a few images: of the test
# set where it was shown repeatedly, else of training.

# %%
normaliser = Normaliser.fit(subject)
shown_split = "train"
if (trials[trials.split == "test"].groupby("image").size() > 1).any():
    shown_split = "test"
example_rows = [
    rows for rows in subject.rows_by_image(shown_split) if len(rows) > 1 or not repeated
][:6]
order = np.argsort(-voxels.noise_ceiling.fillna(0).to_numpy(), kind="stable")[:200]
ids = [trials.image.iloc[rows[0]] for rows in example_rows]
figure = plot_trials(
    np.moveaxis(subject.images(ids), 3, 1) / 255,
    [subject.get_betas(rows[:10], normaliser)[:, order] for rows in example_rows],
)
save_figure(figure, run.results / "figures" / "00_trials.png")

# %% [markdown]
# ## A check of the design
# Does every session hold training trials (the normaliser needs them)? Are repeats of an image
# spread over sessions, or do they share one and its drift? Does the level of the signal drift?

# %%
design = trials.assign(train=trials.split == "train", test=trials.split == "test").groupby(
    "session"
)
design = design.agg(
    trials=("trial", "size"),
    runs=("run", "nunique"),
    images=("image", "nunique"),
    train=("train", "mean"),
    test=("test", "mean"),
).round(3)
spread = trials.groupby("image").session.agg(["size", "nunique"])
spread = spread[spread["size"] > 1]
if len(spread):
    print(
        f"{(spread['nunique'] > 1).mean():.0%} of the repeated images were shown in more than one"
        " session"
    )
if (design.train == 0).any():
    print(
        f"sessions without a training trial: {design.index[design.train == 0].tolist()}; their"
        " trials are z-scored with the training trials of all sessions"
    )
design

# %%
drift = pd.DataFrame(
    {
        s: subject.betas[np.flatnonzero(trials.session == s)].astype(np.float32).mean(0).ravel()
        for s in design.index
    }
).T
fig, ax = plt.subplots(figsize=(7, 2.5), layout="constrained")
ax.plot(
    drift.index,
    drift.iloc[:, :: max(1, drift.shape[1] // 8)].to_numpy(),
    lw=1,
    marker="." if len(drift) < 3 else None,
)
ax.set(xlabel="session", ylabel="mean beta", title="Level of a few voxels over the sessions")
save_figure(fig, run.results / "figures" / "00_drift.png")

# %% [markdown]
# ## What we saw

# %%
n_images, n_voxels = len(subject.all_images), subject.betas.shape[1]
print(f"{len(trials):,} trials, in which {n_images:,} images were shown; {n_voxels:,} voxels.")
ceilings = voxels["noise_ceiling"].dropna()
print(f"The noise ceiling of a trial is known of {len(ceilings):,} voxels:")
print(f"median {ceilings.median():.2f}, best tenth above {ceilings.quantile(0.9):.2f}.")

# %% [markdown]
# Early areas should have higher noise ceilings than higher ones; a ceiling near zero everywhere
# means that betas and images do not belong together. Repeats of an image should look alike in the
# trials figure.
#
# ## Try this next
# Short experiments on the mini world:
# - another person, whose simulated brain differs: `python run.py mindeye --mini --to 00 -p subj 2
#   -p mini_images 600 -p dataset second`;
# - the same world in another file format: `python run.py mindeye --mini --to 00 -p source_format
#   bold5000 -p data_path data/bold/source -p mini_images 600 -p dataset bold`;
# - shorter sessions, z-scored with less data each: the first with `-p trials_per_session 100`.
#
# Next: notebook 01 trains the high level.
