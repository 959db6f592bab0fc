# %% [markdown]
# # 06 · Metrics: what is a reconstruction worth?
#
# **Question.** How alike are seen and reconstructed images, and how much of that would one get without the brain, or with a perfect decoder?
#
# **Reads** `results/<run>/reconstructions.safetensors` and `retrieval.json`. **Writes** `results/<run>/metrics.json` (a record a metric),
# `scores.parquet` (a row per image, metric and system) and `report.html`.
#
# Cost: 1000 images about 10 minutes on a CPU; mini about 1 minute on two CPU cores.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run under train_logs/ and results/, by default made from recipe and subject
dataset = "nsd"  # prepared dataset under data/
subj = 1  # subject, at least 1
weights = "hub"  # pretrained models, hub or mini or a folder that holds them
decoder = "network"  # one of network, ridge, both
checkpoint = "last"  # the checkpoint that notebook 03 used, one of last, best
metrics = "pixcorr,ssim,ssim_columns"  # pixel metrics, separated by commas
shuffles = 3  # random pairings of the shuffled floor, at least 1
seed = 42  # of these pairings and of the bootstrap

# %%
from src.utils import configure

run = configure(globals(), "06_metrics")
run

# %%
import pandas as pd
from safetensors.torch import load_file

from src.data import open_subject
from src.figures import save, score_dots
from src.metrics import METRICS, answer_metrics, two_way_metric
from src.pretrained import Clipper, Judge
from src.report import write_report
from src.results import Evaluator, check_alignment, check_outputs, make_records, paired_bootstrap, provenance, score_table, write_metrics, write_scores
from src.utils import PerceptError, read_json

# %%
subject = open_subject(dataset, subj)
path = run.results / "reconstructions.safetensors"
if not path.exists():
    raise PerceptError(f"{path} is missing: run notebook 03 for this run first.")
made = load_file(path)
main = "ridge" if decoder == "ridge" else "network"
seen, recons = made["seen"], made[main]
print(f"(test images, channels, height, width) = {tuple(seen.shape)} seen, {tuple(recons.shape)} reconstructed")
alarms = check_outputs(recons)
alarms

# %% [markdown]
# ## The metrics
# Pixel metrics after resizing to 425 x 425, as the field does; two-way identification in CLIP's final embedding. With the mini weights this is the
# mini CLIP, and is called so: it made the targets too, so it flatters, and it is near 1 long before a person recognises anything.
# Therefore the mini world has a judge besides: a classifier that was trained on images of its own, that no decoder and no generator was ever
# trained towards, and that says what a picture shows: the scene, the kind of the main object, its colour.

# %%
clipper = Clipper(weights, hidden=False, norm_embs=True, device=run.device)
prefix = "mini:" if weights == "mini" else ""
chosen = [METRICS[name.strip()] for name in metrics.split(",")]
chosen.append(two_way_metric(f"{prefix}CLIP", lambda images: clipper.embed_image(images).cpu()))
labels = subject.labels
judge = Judge(weights, run.device) if weights == "mini" and labels is not None else None
if judge is not None and set(judge.answers) <= set(labels.columns):
    labels = labels.set_index("image").loc[made["image_ids"].numpy()]
    chosen += answer_metrics("mini:judge", judge.ask, {q: labels[q].to_numpy() for q in judge.answers}, judge.chance)
    said = judge.ask(seen)
    print("the judge is right about the images that were shown:", {q: round(float((said[q] == labels[q]).mean()), 3) for q in said})

# %% [markdown]
# ## Score, floors and ceiling
# Every row is scored in the same way on the same images. "shuffled" pairs each reconstruction with the wrong images; "low_level" is
# the low-level image alone; "autoencoder" would be the ceiling of a perfect low level.

# %%
controls = {"mean_image": made["mean_image"], "nearest_train": made["nearest_train"]}
table = score_table(seen, recons, controls, made["ceiling"], chosen, draws=shuffles, seed=seed)
records = make_records(table, chosen, protocol=subject.protocol, test_set=subject.test_set)
others = [key for key in ("ridge", "low_level_network", "low_level_ridge", "autoencoder") if key in made and key != main]
evaluator = Evaluator(seen, chosen)
table = pd.concat([table, *(evaluator.score(made[key], key) for key in others)], ignore_index=True)
write_scores(run.results / "scores.parquet", table)

# %%
summary = table.groupby(["row", "metric"], sort=False)["value"].mean().unstack().round(3)
summary

# %%
each = {key: part.sort_values("image")["value"].to_numpy() for key, part in table.groupby(["row", "metric"])}
if "pixcorr" in summary:
    alarms += check_alignment(each["system", f"{prefix}CLIP"], each["system", "pixcorr"], summary.loc["shuffled", "pixcorr"])
problems = [
    f"{r['name']}: not above its floor '{floor}' ({r['value']:.3f} against {entry['value']:.3f})"
    for r in records
    for floor, entry in r["floors"].items()
    if floor in ("shuffled", "mean_image") and (r["value"] - entry["value"]) * (1 if r["better"] == "higher" else -1) <= 0
]
alarms + problems

# %% [markdown]
# ## Network against ridge
# Paired bootstrap of the difference over the test images, positive where the network is better.

# %%
differences = []
if decoder == "both":
    for metric in chosen:
        sign = 1 if metric.better == "higher" else -1
        result = paired_bootstrap(sign * each["system", metric.name], sign * each["ridge", metric.name])
        better = "network" if result.low > 0 else "ridge" if result.high < 0 else "undecided"
        differences.append({"metric": metric.name, **result._asdict(), "better": better})
retrieved = read_json(run.results / "retrieval.json") if (run.results / "retrieval.json").exists() else {"metrics": [], "differences": []}
differences += retrieved["differences"]
worse = [d["metric"] for d in differences if d["better"] == "ridge"]
print("The network is worse than the ridge baseline on: " + ", ".join(worse) if worse else "The network is nowhere significantly worse than the ridge.")
pd.DataFrame(differences)

# %%
selection = [
    {"what": "epoch", "chosen": checkpoint, "split": "val" if checkpoint == "best" else "none: the last epoch is taken"},
    {"what": "ridge penalty", "chosen": "by target", "split": "cross-validation within train"},
    {"what": "one of several samples, where there are", "chosen": "nearest to the tokens predicted from the brain", "split": "none: no true image is used"},
]
about = provenance(
    run.recipe or run.name, {"all": seed}, selection, subject=subj, dataset=dataset, alarms=alarms + problems, differences=differences,
    parameters={key: str(value) for key, value in run.parameters.items()}, models=clipper.fingerprint(),
)  # fmt: skip
write_metrics(run.results / "metrics.json", records + retrieved["metrics"], about)

# %%
save(score_dots(records + retrieved["metrics"]), run.results / "figures" / "scores.png")

# %%
report = write_report(run.results)
print(f"Report: {report}")

# %% [markdown]
# ## What to look at
# A score means something only between its floors and its ceiling. Where "nearest_train" is as good as the system, the generator adds nothing to a
# lookup. Where ridge is as good as the network, depth adds nothing.
