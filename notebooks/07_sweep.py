# %% [markdown]
# # 07 · Sweep: which setting wins, and is that more than luck of the seed?
#
# **Question.** Of the values that a parameter took, which is best, by how much, would another seed
# have said the same, and what did each cost?
#
# **Reads** `results/<sweep>/points.json` (`run.py sweep`), and of every point its histories and
# its scores on the test images. **Writes** `results/<sweep>/sweep.csv` (a line a point),
# `levels.csv` (a line a level and score), `costs.csv` (a line a point: scores, memory, time) and
# figures.
#
# Cost: seconds.
#
# Source: levels are held against each other within pairs, with Student's t over seeds; what is
# paired and why: docs/sweeps.md. Regions alone and left out: docs/roi_voting.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = ""  # name of the run, by default made from recipe and subject

# evaluation
metrics = ""  # scores, separated by commas, published: those of the paper
factor = ""  # varied parameter to compare, by default the first of the grid that is no seed
seed_name = ""  # varied parameter that is the seed, by default seed or bag_seeds
by = "val/loss"  # column of the histories to compare; with loss or mse in its name, lower is better

# %%
from src.parameters import configure

run = configure(globals(), "07_sweep")
run

# %%
import pandas as pd

from src import figures
from src.evaluation import sweeps
from src.utils import HOME, atomic

# %% [markdown]
# ## What is there
# Points that failed or were not run are missing below, and so is, from every comparison, whatever
# would have been their pair.

# %%
ledger, points = sweeps.read_points(run.results)
varied = ledger["factors"]
factor, seed_name = sweeps.choose_factor(varied, factor, seed_name)
other_factors = [
    name
    for name in varied
    if name not in (factor, seed_name) and points.groupby(factor)[name].nunique().max() > 1
]  # the rest goes with the factor
finished = points[points["state"] == "finished"]
pairs = " and ".join([*other_factors, *([seed_name] if seed_name else [])])
run.record_parameters()

# %%
print(
    f"{ledger['recipe']}: {len(finished)} of {len(points)} points are finished; {factor} is"
    " compared" + (f", in pairs of equal {pairs}" if pairs else "")
)
if len(finished) < len(points):
    print(
        points.loc[points["state"] != "finished", ["number", "label", "state"]].to_string(
            index=False
        )
    )
points.groupby([factor, "state"], sort=False).size().unstack(fill_value=0)

# %%
labels = list(finished["label"])
settings = points[["label", *varied]]  # in the order of the grid
histories = settings.merge(
    sweeps.read_histories(HOME / "train_logs" / run.name, labels), on="label"
)
losses = settings.merge(sweeps.select_best_epoch(histories, by), on="label")
scores = settings.merge(sweeps.read_scores(run.results, labels, metrics), on="label")
metric_names = list(dict.fromkeys(scores["metric"]))
if len(scores):
    first = scores.iloc[0]
    print(
        f"protocol {first['protocol']}, test set {first['test_set']}, {scores['n'].max():.0f}"
        f" images, which no model of a bag saw; scores: {', '.join(metric_names)}"
    )
print(
    f"{histories['model'].nunique()} models a point, in"
    f" {', '.join(dict.fromkeys(histories['kind'])) or 'no training with a history'}"
)

# %% [markdown]
# ## Losses
# Each thin line is a run. Where validation turns up while training goes on down, the epoch is
# chosen there, and more epochs buy nothing.

# %%
if len(histories):
    figure = figures.plot_sweep_curves(histories, factor)
    figures.save_figure(figure, run.results / "figures" / "curves.png")
else:
    print("No point left a history (closed-form decoders have none).")


# %% [markdown]
# ## Which level is best?
# The verdict is on validation images, at the epoch that validation chose. The scores on test
# images stand beside it and choose nothing. A difference is taken between runs that differ in
# nothing else, averaged over the other parameters, and its interval is over seeds: a hundred test
# images are not a hundred trainings. "More than seed noise" needs the intervals to all other
# levels to exclude 0.

# %%
def tables_of(table, value):
    """Runs that have a pair at every level, the table of levels, and the standard deviation over
    seeds.
    """
    paired = sweeps.select_complete_cells(
        table.dropna(subset=value), factor, [*other_factors, *([seed_name] if seed_name else [])]
    )
    paired = paired.assign(value=paired[value])
    return (
        paired,
        sweeps.level_table(paired, factor, seed_name),
        sweeps.seed_sd(paired, factor, seed_name),
    )


better = "higher"
if any(word in by for word in ("loss", "mse", "mae")):
    better = "lower"
value_name = by.replace("val/", "validation ").replace("train/", "training ")
verdicts, tables_by_kind, gaps = {}, {}, {}

# %%
comparable = by in losses and factor not in sweeps.VALIDATION_FACTORS
parts = ()
if comparable:
    parts = losses.dropna(subset=by).groupby("kind", sort=False)
paired_by = [*other_factors, *([seed_name] if seed_name else [])]
for kind, part in parts:
    tables_by_kind[kind] = tables_of(part, by)
    complete, _, seed_sd = tables_by_kind[kind]
    what = value_name
    if losses["kind"].nunique() > 1:
        what = f"{value_name} of the {kind.replace('_', ' ')}"
    gaps[kind] = []
    if factor in sweeps.SEEDS:  # no seed is better than another
        verdicts[kind] = sweeps.describe_seeds(complete["value"], what)
    else:
        if len(complete):
            gaps[kind] = sweeps.gaps_to_best(complete, factor, seed_name, better)
        verdicts[kind] = sweeps.describe_gaps(gaps[kind], seed_sd, what, paired_by)
    dropped = len(part) - len(complete)
    remark = ""
    if dropped:
        remark = f" {dropped} runs without a pair at every level are left out."
    print(f"{verdicts[kind]}.{remark}")

# %%
if not verdicts:
    why = (
        f"with another {factor} the validation images are others, too"
        if factor in sweeps.VALIDATION_FACTORS
        else f"no training left the column {by}"
    )
    print(f"No level is named the best: {why}, and nothing is chosen on test images.")

# %%
panels = [
    {
        "name": value_name
        + (f" of the {kind.replace('_', ' ')}" if len(tables_by_kind) > 1 else ""),
        "better": better,
        "runs": runs,
        "levels": levels,
        "sd": sd,
    }
    for kind, (runs, levels, sd) in tables_by_kind.items()
    if len(runs)
]

# %%
for metric in metric_names[: max(1, (3 if points[factor].nunique() <= 10 else 2) - len(panels))]:
    runs, levels, sd = tables_of(scores[scores["metric"] == metric], "value")
    floor, ceiling = (runs[name].astype(float).mean() for name in ("shuffled", "ceiling"))
    references = {
        "floor": (floor, "shuffled pairing"),
        "ceiling": (ceiling, "ceiling (true latents)"),
    }
    panels += (
        [
            {
                "name": f"{metric}, test images",
                "better": runs["better"].iloc[0],
                "runs": runs,
                "levels": levels,
                "sd": sd,
            }
            | references
        ]
        if len(runs)
        else []
    )
decides = next(iter(gaps.values()), [])

# %%
for panel in panels[len(tables_by_kind) :] if decides else ():
    rows = panel["levels"].set_index(factor)["value"]
    reference_texts = [
        f"{label} {value:.3f}"
        for value, label in (panel["floor"], panel["ceiling"])
        if pd.notna(value)
    ]
    print(
        f"{decides[0].best}: {panel['name']} {rows.get(decides[0].best, float('nan')):.3f}"
        f" ({', '.join(reference_texts) or 'no floor known'})"
    )
title = "; ".join(verdicts.values()) or f"{factor}: no validation score to name a winner by"
if panels:
    figures.save_figure(
        figures.plot_sweep_levels(
            panels, factor, other_factors[0] if other_factors else "", title, decides
        ),
        run.results / "figures" / "look.png",
    )

# %% [markdown]
# ## The tables
# A line a level: the mean over everything else, with its 95 % interval over seeds. Floors (chance,
# shuffled pairing, the mean image) and the ceiling stand beside.

# %%
per_score = [
    (f"{name}, {kind}" if losses["kind"].nunique() > 1 else name, part, name)
    for name in ("train/loss", "val/loss", by)
    if name in losses
    for kind, part in losses.groupby("kind", sort=False)
]
per_score += [
    (f"{metric}, test", scores[scores["metric"] == metric], "value") for metric in metric_names
]
rows = []
for name, part, value in per_score:
    runs, levels, sd = tables_of(part, value)
    controls = {
        c: runs[c].astype(float).mean()
        for c in ("chance", "shuffled", "mean_image", "ceiling")
        if c in runs
    }
    rows += [{"score": name} | row | controls for row in levels.to_dict("records")]
by_level = (
    pd.DataFrame(rows).drop_duplicates(["score", factor])
    if rows
    else pd.DataFrame(columns=["score", factor])
)
with atomic(run.results / "levels.csv") as path:
    by_level.to_csv(path, index=False)

# %%
shown_as = by_level.assign(
    text=[
        (
            f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            if r["seeds"] > 1
            else f"{r['value']:.3f}"
        )
        for _, r in by_level.iterrows()
    ]
)
wide = shown_as.pivot(index="score", columns=factor, values="text").reindex(
    index=list(dict.fromkeys(by_level["score"])), columns=list(dict.fromkeys(points[factor]))
)
table_columns = (
    by_level.groupby("score", sort=False)[
        [c for c in ("chance", "shuffled", "mean_image", "ceiling") if c in by_level]
    ]
    .first()
    .round(3)
)
wide.join(table_columns).astype(object).fillna("–").rename(
    columns=lambda name: name.replace("_", " ")
)

# %% [markdown]
# A line a point.

# %%
sheet = points.set_index("label")
for kind, part in losses.groupby("kind", sort=False):
    numbers = part.set_index("label")[
        [c for c in ("epoch", "train/loss", "val/loss", by) if c in part]
    ]
    sheet = sheet.join(
        numbers.loc[:, ~numbers.columns.duplicated()].add_suffix(
            f", {kind}" if losses["kind"].nunique() > 1 else ""
        )
    )
for metric in metric_names:
    part = scores[scores["metric"] == metric].set_index("label")
    names = {"value": metric} | {
        c: f"{metric}, {c.replace('_', ' ')}"
        for c in ("chance", "shuffled", "mean_image", "nearest_train", "ceiling")
        if part[c].notna().any()
    }
    sheet = sheet.join(part[list(names)].rename(columns=names))
with atomic(run.results / "sweep.csv") as path:
    sheet.reset_index().set_index("number").to_csv(path)
sheet[[c for c in sheet if "," not in c or c.split(", ")[-1] in set(losses["kind"])]].reset_index(
    drop=True
).set_index("number").round(4)

# %% [markdown]
# ## Scores, memory, time
# What each point took, beside what it gave. `weights` counts the numbers in the checkpoints of its
# networks; `memory` and `gpu_memory` are the most, in GB, that the process of a training held;
# times are in seconds, as the stages ran here last, side by side with other points where several
# ran at a time. Where a training was launched by itself, its stage also counts the notebook that
# shows it.

# %%
costs = sheet.reset_index()[
    ["label", *varied, *(name for name in (by, *metric_names) if name in sheet)]
].merge(sweeps.read_costs(run.results, HOME / "train_logs" / run.name, labels), on="label")
with atomic(run.results / "costs.csv") as path:
    costs.to_csv(path, index=False)
for metric, part in scores.groupby("metric", sort=False):
    best_values = {
        name.replace("_", " "): part[name].astype(float).mean()
        for name in ("chance", "shuffled", "mean_image", "nearest_train", "ceiling")
    }
    print(
        f"{metric}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in best_values.items() if pd.notna(value))
    )
costs.set_index("label").round(4)

# %% [markdown]
# ## Regions alone and left out
# A region that does well alone carries much; one whose absence costs nothing carries little that
# others do not. The two need not agree.

# %%
values = {
    p["levels"][factor]: str(p["overrides"].get(factor, p["levels"][factor]))
    for p in ledger["points"]
}
region_scores = scores[scores["metric"].isin(metric_names[:3])]
regions = sweeps.region_table(region_scores, values, factor, seed_name)
if len(regions):
    figure = figures.plot_region_curves(regions)
    figures.save_figure(figure, run.results / "figures" / "regions.png")
else:
    print(
        'For this figure let `rois` be regions by themselves ("V1"), all but one ("!V1") and all'
        ' ("-"), as in launch/sweeps/rois_alone_mini.yaml.'
    )

# %% [markdown]
# ## What we saw

# %%
print(f"{len(ledger['points'])} points were run; what varied: {', '.join(map(str, varied))}.")
for metric, part in scores.groupby("metric", sort=False):
    values = part["value"]
    print(f"{metric}: from {values.min():.3f} to {values.max():.3f} between points")

# %% [markdown]
# First the bar of the seeds: a difference that is shorter is luck. Then whether the floor is far
# below: where it is not, nothing was read from the brain that could differ. A level that won here
# won on validation images; its test score is an estimate for it, but the best of the test scores
# would not be. Last what a level costs: a difference that is no more than luck need not be paid
# for.
#
# ## Try this next
# Short experiments on the mini world:
# - another grid: copy `launch/sweeps/roi_sets_mini.yaml`, change one value, and run `python
#   run.py sweep` with it;
# - its plan alone: the same with `--dry-run`.
