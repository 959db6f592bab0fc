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
subj = 1  # subject
folds = ""  # digits69 only, the official split by default, or e.g. fold-3-of-10
trials_per_session = 750  # needed to know the session of a trial in MindEye's shards
mini_images = 5000  # mini world only, training images of this subject
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
from src.figures import image_grid, noise_ceiling_by_roi, save
from src.readers import READERS, mindeye
from src.utils import resolve
