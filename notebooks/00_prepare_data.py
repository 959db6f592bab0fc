# %% [markdown]
# # 00 · Prepare data: any source into one layout
#
# **Question.** What was measured, on which images, how reliably, and which trials may be used for what?
#
# **Reads** a source of data: MindEye's webdataset shards, the digits69 file, plain arrays (npz), or the embedded mini world, which is first
# written as MindEye shards and then read like them. **Writes** `data/<dataset>/`: images, betas, trials, voxels (see data/README.md).
#
# Cost: about the time of copying the files (NSD subject 1: 30 GB); mini about 30 seconds.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run under train_logs/ and results/, by default made from recipe and subject
dataset = "nsd"  # name of the prepared dataset, a folder under data/
source = "mindeye"  # one of mindeye, digits69, npz, mini
data_path = "data/nsd_source"  # where the source's files lie
subj = 1  # subject, at least 1
folds = ""  # digits69 only, the official split by default, or e.g. fold-3-of-10
trials_per_session = 750  # needed to know the session of a trial in MindEye's shards, at least 1
mini_images = 5000  # mini world only, training images of this subject, at least 1
overwrite = False  # prepare again although the prepared data are there
seed = 42  # of splits that the source leaves open

# %%
from src.utils import configure

run = configure(globals(), "00_prepare_data")
run

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from src import miniworld
from src.data import dataset_folder, open_subject
from src.figures import image_grid, roi_figure, save
from src.readers import READERS, mindeye
from src.utils import resolve

# %% [markdown]
# ## The mini world plays COCO and the scanner
# Only for `source = "mini"`: draw images, let a simulated visual cortex look at them, and write the result as MindEye's webdataset shards,
# so that the same reader reads both.

# %%
folder, prepared = resolve(data_path), dataset_folder(dataset) / f"subj{subj:02d}"
if source == "mini" and (overwrite or not prepared.exists()):
    world = miniworld.simulate(subj, mini_images, trials_per_session=trials_per_session)
    mindeye.write(
        folder, subj, world.scan.betas, world.scan.trials, world.images, world.image_ids,
        voxels=world.scan.voxels, captions=world.captions, labels=world.labels,
    )  # fmt: skip
    print(f"(trials, voxels) = {world.scan.betas.shape}   (images, height, width, channels) = {world.images.shape}")

# %% [markdown]
# ## Read
# Whatever the source, this leaves the same files. An image is in one split only; this is checked, and refused otherwise.

# %%
options = {
    "mindeye": {"trials_per_session": trials_per_session},
    "mini": {
        "trials_per_session": trials_per_session, "protocol": "mini-300",
        "attributes": {"source": "mini world (simulated)", "units": "percent signal change (simulated)", "normalisation": "none"},
    },
    "digits69": {"split": folds or "official", "seed": seed},
    "npz": {},
}  # fmt: skip
if overwrite or not prepared.exists():
    reader = READERS["mindeye" if source == "mini" else source]
    reader.read(folder, dataset, subj, **options[source])
subject = open_subject(dataset, subj)
subject

# %% [markdown]
# ## What came in

# %%
trials = subject.trials
counts = trials.groupby("split").agg(trials=("trial", "size"), images=("image", "nunique"), sessions=("session", "nunique"))
counts["repeats an image"] = (counts.trials / counts.images).round(2)
print(f"protocol {subject.protocol}, test set {subject.test_set}; (trials, voxels) = {subject.betas.shape}")
counts

# %%
for split in ("train", "test"):
    ids = subject.image_ids(split)[:12]
    grid = image_grid({split: np.moveaxis(subject.images(ids), 3, 1) / 255})
    save(grid, run.results / "figures" / f"00_{split}_images.png")

# %%
labels, captions = subject.labels, subject.captions
if captions is not None:
    print(captions[captions.image == subject.image_ids("test")[0]].caption.to_string(index=False))
labels.head() if labels is not None else "this source has no labels"

# %% [markdown]
# ## How reliable is it?
# The noise ceiling of a single trial: the share of a voxel's variance that the image explains, estimated from the repeats of training images
# (Allen et al. 2022). It is estimated here, not taken from the source.

# %%
repeated = (trials[trials.split == "train"].groupby("image").size() > 1).any()
if repeated:
    voxels = subject.voxels.assign(noise_ceiling=subject.noise_ceiling().noise_ceiling.to_numpy())
    print(f"median single-trial noise ceiling {voxels.noise_ceiling.median():.3f}, of the mean of three {subject.noise_ceiling(3).noise_ceiling.median():.3f}")
    if len(voxels.select_dtypes("bool").columns):
        save(roi_figure(voxels), run.results / "figures" / "rois.png")

# %% [markdown]
# ## A check of the design
# Over the sessions: does every session hold training trials (the normaliser needs them), and does the level of the signal drift?

# %%
drift = pd.DataFrame({s: subject.betas[np.flatnonzero(trials.session == s)].astype(np.float32).mean(0) for s in np.unique(trials.session)}).T
fig, ax = plt.subplots(figsize=(7, 2.5), layout="constrained")
ax.plot(drift.index, drift.iloc[:, :: max(1, drift.shape[1] // 8)].to_numpy(), lw=1)
ax.set(xlabel="session", ylabel="mean beta", title="Level of a few voxels over the sessions")
save(fig, run.results / "figures" / "00_drift.png")
train_share = trials.assign(train=trials.split == "train").groupby("session").train.mean()
print(f"share of training trials in a session: {train_share.min():.2f} to {train_share.max():.2f}")

# %% [markdown]
# ## What to look at
# Early areas should have higher noise ceilings than higher ones; a ceiling near zero everywhere means that betas and images do not belong together. Next:
# notebook 01 trains the high level.
