# %% [markdown]
# # 08 · Cross-validate: small data, ridge and network side by side
#
# **Question.** With a hundred images there is no test set worth the name. What do ridge and
# network reach on the official split, **and** when every image is once a test image, beside what
# needs little or no brain?
#
# **Reads** `data/<dataset>/` (notebook 00). **Writes** `results/<run>/`: `cross_validation.csv`
# (the table), `scores.parquet`, `metrics.json` of the cross-validation, and a sheet of
# reconstructions.
#
# Cost: digits69 about 4 minutes on two CPU cores.
#
# Source: van Gerven, de Lange & Heskes 2010 for the data. The official split is an easy one; read
# the cross-validation first.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# data
dataset = "digits69"  # prepared data set under data/
subj = 1  # subject, at least 1
folds = 10  # folds over all images, stratified by label, at least 2

# model
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
h = 256  # width of the hidden layers, at least 1
n_blocks = 1  # residual or mixer blocks, at least 0

# optimisation
inner_folds = 5  # folds within the training images that choose voxels and penalty, at least 2
voxels_kept = "400,800,1600"  # candidate numbers of voxels, separated by commas
alphas = "100,300,1000"  # candidate ridge penalties, separated by commas
num_epochs = 60  # passes over the training images, at least 1
batch_size = 16  # images or samples a step over all processes, at least 1
max_lr = 1.0e-3  # peak learning rate, never scaled by the number of processes, more than 0
seed = 42  # of everything random here

# %%
from src.parameters import configure

run = configure(globals(), "08_cross_validate")
run

# %%
import numpy as np
import pandas as pd
import torch
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from src import metrics, retrieval
from src.data import open_subject
from src.evaluation import records, statistics, write_csv, write_report
from src.evaluation.folds import find_labels, parse_voxel_counts, split_into_folds
from src.figures import plot_contact_sheet, save_figure
from src.models import BrainNetwork
from src.pretrained import Clipper
from src.training import Batching, Execution, Optimisation, fit
from src.utils import progress

# %% [markdown]
# ## Data
# The brain data of an image are the mean over its repeats. Pixels are grey; for the high level each
# image has its CLIP embedding. The official split is the one of the prepared data.

# %%
subject = open_subject(dataset, subj)
voxels, ids = subject.get_mean_betas("train+val+test")
x = voxels.astype(np.float64)  # (images, voxels), rows in the order of ids
images = subject.images(ids)
height, width = images.shape[1:3]
pixels = images.mean(-1).reshape(len(ids), -1) / 255.0  # (images, pixels)
clipper = Clipper(weights, hidden=False, norm_embs=False, device=run.device)
embeds = clipper.encode_pixels(images).astype(np.float64)  # (images, dim)
labels = find_labels(subject, ids)  # (images,), or None
print(
    f"(images, voxels) = {x.shape}   (images, pixels) = {pixels.shape}   (images, dim) ="
    f" {embeds.shape}   protocol {subject.protocol}"
)

# %%
is_test = np.isin(ids, subject.image_ids("test"))
splits = {
    "official": [(np.flatnonzero(~is_test), np.flatnonzero(is_test))],
    f"{folds}-fold": split_into_folds(len(ids), labels, folds, seed),
}


# %% [markdown]
# ## Ridge
# Voxels are z-scored, those that covary most with the targets are kept, and a penalised linear map
# is fitted. How many voxels and how much penalty is chosen by cross-validation **within the
# training images of each fold**; test images play no part.

# %%
def relevance(voxels, targets):
    """Summed squared covariance of each standardised voxel with all targets: (images, voxels),
    (images, targets) -> (voxels,).
    """
    centred = targets - targets.mean(0)
    return ((voxels.T @ centred / len(voxels)) ** 2).sum(1)


def mean_correlation(model, voxels, targets):
    """Mean correlation of predicted and true rows; what the inner cross-validation maximises."""
    return metrics.pcc(targets, model.predict(voxels)).mean()


def ridge(train_x, train_y):
    """The fitted pipeline, its settings chosen inside the training images."""
    pipeline = make_pipeline(StandardScaler(), SelectKBest(relevance), Ridge())
    grid = {
        "selectkbest__k": parse_voxel_counts(voxels_kept, train_x.shape[1]),
        "ridge__alpha": [float(a) for a in alphas.split(",")],
    }
    inner = KFold(inner_folds, shuffle=True, random_state=seed)
    return GridSearchCV(pipeline, grid, scoring=mean_correlation, cv=inner).fit(train_x, train_y)


# %% [markdown]
# ## Network
# The residual MLP of MindEye at small size, on the voxels that ridge's selection kept, so that
# both see the same.

# %%
class Rows(torch.utils.data.Dataset):
    """Training rows as `fit` asks for them."""

    identity = {subject.key: subject.identity}  # compared where a training goes on

    def __init__(self, voxels, targets):
        self.voxels, self.targets = (
            torch.as_tensor(voxels, dtype=torch.float32),
            torch.as_tensor(targets, dtype=torch.float32),
        )

    def __len__(self):
        return len(self.voxels)

    def __getitems__(self, indices):
        return {"voxels": self.voxels[indices], "targets": self.targets[indices]}

    def set_epoch(self, epoch):
        pass


def step(model, batch, epoch):
    """Mean squared error of the predicted targets (batch, targets)."""
    return torch.nn.functional.mse_loss(model(batch["voxels"]), batch["targets"]), {}


# %%
def build_network(n_voxels, n_targets):
    """A network that begins as the mean, and its config."""
    kwargs = {
        "in_dim": n_voxels,
        "out_dim": n_targets,
        "h": h,
        "n_blocks": n_blocks,
        "use_projector": False,
    }
    torch.manual_seed(seed)
    model = BrainNetwork(**kwargs)
    torch.nn.init.zeros_(model.lin1.weight)
    return model, {"model": {"name": "BrainNetwork", "kwargs": kwargs}, "epochs": num_epochs}


# %%
def network(train_x, train_y, folder):
    """Train on standardised, selected voxels and standardised targets; returns a function from
    voxels to targets.
    """
    select_voxels = ridge(train_x, train_y).best_estimator_[:-1]
    mean, sd = train_y.mean(0), train_y.std() + 1e-9
    data = Rows(select_voxels.transform(train_x), (train_y - mean) / sd)
    model, config = build_network(data.voxels.shape[1], train_y.shape[1])
    fit(
        model,
        step,
        data,
        folder=folder,
        config=config,
        batching=Batching(num_epochs, min(batch_size, len(data)), seed),
        optimisation=Optimisation(max_lr),
        execution=Execution("cpu"),
    )

    def predict(voxels):
        inputs = torch.as_tensor(select_voxels.transform(voxels), dtype=torch.float32)
        with torch.no_grad():
            return model.cpu()(inputs).numpy() * sd + mean

    return predict


# %% [markdown]
# ## Every fold
# For both targets and both decoders. Beside them: the mean training image, and the mean image of
# the class that a classifier decodes from the brain, which knows which class it was and nothing
# else; images without labels have no such row.

# %%
def predict_class_mean(train, test, targets):
    """Mean target of the class that a classifier decodes from the brain: (test images, targets)."""
    scaler = StandardScaler().fit(x[train])
    classifier = LogisticRegression(C=1e-3, max_iter=500)
    classifier.fit(scaler.transform(x[train]), labels[train])
    decoded = classifier.predict(scaler.transform(x[test]))
    return np.stack([targets[train][labels[train] == label].mean(0) for label in decoded])


def predict_fold(train, test, targets, folder):
    """Predicted targets of one fold's test images: {decoder: (test images, targets)}."""
    predictions = {"ridge": ridge(x[train], targets[train]).predict(x[test])}
    predictions["network"] = network(x[train], targets[train], folder)(x[test])
    if labels is not None:
        predictions["class_mean"] = predict_class_mean(train, test, targets)
    predictions["mean_image"] = np.repeat(targets[train].mean(0)[None], len(test), 0)
    return predictions


# %%
def decode(split, targets, name):
    """Predictions of all folds of a split: {decoder: (test images, targets)}, and the test rows."""
    folds_done = []
    for number, (train, test) in enumerate(progress(splits[split], f"{name}, {split}")):
        folder = run.logs / f"{name}_{split}_{number}"
        folds_done.append(predict_fold(train, test, targets, folder))
    test_rows = np.concatenate([test for _, test in splits[split]])
    predictions = {
        decoder: np.concatenate([fold[decoder] for fold in folds_done]) for decoder in folds_done[0]
    }
    return predictions, test_rows


# %%
low = {split: decode(split, pixels, "pixels") for split in splits}
high = {split: decode(split, embeds, "clip") for split in splits}


# %% [markdown]
# ## Score
# Low level: correlation, SSIM and squared error of the pixels, clipped to what an image can be.
# High level: two-way identification and top-1 in CLIP's embedding, centred on the mean of all
# embeddings. "shuffled" scores ridge's reconstructions against other images.

# %%
def as_images(flat):
    """(images, pixels) -> (images, 3, height, width) in [0, 1]."""
    return (
        torch.as_tensor(np.clip(flat, 0, 1), dtype=torch.float32)
        .view(-1, 1, height, width)
        .expand(-1, 3, -1, -1)
        .contiguous()
    )


chosen = [metrics.METRICS[name] for name in ("pcc", "ssim", "mse")]
tables, rows = [], []

# %%
for split, (predictions, test) in low.items():
    reconstructions = {"system": as_images(predictions["ridge"])}
    for decoder in ("class_mean", "mean_image", "network"):
        if decoder in predictions:
            reconstructions[decoder] = as_images(predictions[decoder])
    table = records.score_table(
        as_images(pixels[test]), reconstructions, chosen, seed=seed, image_ids=ids[test]
    )
    tables.append(table.replace({"row": {"system": "ridge"}}).assign(split=split))
    reason = "pixels are decoded directly, without a generator"
    floors = table[table.row != "network"]
    protocol = subject.protocol if split == "official" else f"{dataset}-{split}"
    ridge_records = records.make_records(
        floors,
        chosen,
        protocol=protocol,
        test_set=f"{len(test)} images, {split}",
        no_upper_bound=reason,
    )
    rows += [r | {"name": f"{r['name']} (ridge, {split})"} for r in ridge_records]

# %%
for split, (predictions, test) in high.items():
    for row, predicted in predictions.items():
        true = embeds[test] - embeds.mean(0)
        guess = predicted - embeds.mean(0)
        scores = {
            "clip two-way": metrics.two_way_each(true, guess),
            "clip top-1": retrieval.top1_image_from_brain_each(guess, true).astype(float),
        }
        tables += [
            pd.DataFrame(
                {"metric": m, "row": row, "image": ids[test], "draw": 0, "value": v, "split": split}
            )
            for m, v in scores.items()
        ]
scores = pd.concat(tables, ignore_index=True)

# %% [markdown]
# ## The table
# Mean and 95 % bootstrap interval over test images; both splits, every decoder and every floor in
# one place.

# %%
per_image = (
    scores.groupby(["split", "metric", "row", "image"], sort=False)["value"].mean().reset_index()
)
lines = [
    {
        "split": s,
        "metric": m,
        "row": r,
        **statistics.bootstrap_mean(part.value.to_numpy())._asdict(),
        "n": len(part),
    }
    for (s, m, r), part in per_image.groupby(["split", "metric", "row"], sort=False)
]
summary = pd.DataFrame(lines).round(4)
run.record_parameters()
write_csv(run.results / "cross_validation.csv", summary)
text = summary.assign(
    score=[
        f"{v:.3f} [{lo:.3f}, {hi:.3f}]"
        for v, lo, hi in zip(summary.value, summary.low, summary.high, strict=True)
    ]
)
text.pivot_table(
    index=["split", "metric"], columns="row", values="score", aggfunc="first", sort=False
)

# %% [markdown]
# ## Network against ridge
# Paired over the same images; positive where the network is better.

# %%
differences = []
for (split, metric), part in per_image.groupby(["split", "metric"], sort=False):
    value = {
        row: rows.sort_values("image")["value"].to_numpy() for row, rows in part.groupby("row")
    }
    sign = 1
    if metric == "mse":
        sign = -1
    result = statistics.paired_bootstrap(sign * value["network"], sign * value["ridge"])
    better = "network" if result.low > 0 else "ridge" if result.high < 0 else "undecided"
    differences.append({"split": split, "metric": metric, **result._asdict(), "better": better})
pd.DataFrame(differences).round(4)

# %%
selection = [
    {
        "what": "voxels kept, ridge penalty",
        "chosen": "in each fold",
        "split": f"{inner_folds}-fold cross-validation within the fold's training images",
    }
]
about = records.provenance(
    run.recipe or run.name,
    {"all": seed},
    selection,
    dataset=dataset,
    data=subject.identity,
    acknowledgement=subject.attributes.get("acknowledgement", ""),
)
note = "Paired over the same images, positive where the network is better."
more = [
    {"title": "Network against ridge", "note": note, "rows": differences},
    {"title": "Every row of both splits", "note": "", "rows": lines},
]
one_table = scores.assign(metric=scores["metric"] + " (" + scores["split"] + ")")
records.add_results(run.results, run.stage, one_table, rows, about, more)

# %%
predictions, test = low[f"{folds}-fold"]
columns = {"seen": as_images(pixels[test])} | {
    name.replace("_", " "): as_images(predicted) for name, predicted in predictions.items()
}
save_figure(plot_contact_sheet(columns, n=16, enlarge="nearest"), run.results / "contact_sheet.png")
print(write_report(run.results))

# %% [markdown]
# ## What to look at
# On the official split of digits69 the mean image alone already correlates .65 with the test
# digits: compare differences with the floors, not scores with zero. SSIM rewards sharpness; the
# class mean, which only knows six from nine, is a hard floor for it. Data were provided (in part)
# by the Donders Institute for Brain, Cognition and Behaviour, Radboud University Nijmegen.
