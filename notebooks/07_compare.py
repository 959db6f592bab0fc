# %% [markdown]
# # 07 · Compare: which run is better, and by how much?
#
# **Question.** Scored on the same test images, how do runs differ, how sure is that, how much of
# the brain and how many sessions do they need, and how much do they owe to pretraining on other
# subjects, and to categories that were trained?
#
# **Reads** `results/*/metrics.json` and `scores.parquet` (notebooks 05 and 06), of all runs or of
# those in `runs`. **Writes** `results/compare/`: `comparison.csv` (all scores, floors and
# ceilings), `comparison.tex` (a table for a paper), `differences.csv` (paired), `sessions.csv`,
# `pretraining.csv` and `held_out.csv` where there are such runs, and figures.
#
# Cost: seconds.
#
# Source: paired bootstrap over images (Efron & Tibshirani 1993); components and clusters:
# docs/overlap.md; sessions and pretraining: docs/sweeps.md.

# %% tags=["parameters"]
recipe = ""  # a recipe folder, e.g. mindeye/mini for the embedded mini world
model_name = "compare"  # name of the run, by default made from recipe and subject

# data
runs = ""  # runs under results/, separated by commas, SWEEP/* for a sweep's, by default all
test_set = ""  # id of the test set, by default that of most runs
row = "system"  # condition of each run that is compared, e.g. system or ridge

# optimisation
seed = 0  # of everything random here

# evaluation
metrics = ""  # scores, separated by commas, published: those of the paper
reference_run = ""  # run that the others are compared with in pairs, by default the first

# %%
from src.parameters import configure

run = configure(globals(), "07_compare")
run

# %%
import pandas as pd
from safetensors.torch import load_file

from src import figures
from src.evaluation import compare
from src.utils import HOME, PerceptError, atomic

# %% [markdown]
# ## The runs
# Runs that were scored on other test images cannot be compared: they are left out and named, or
# refused where `runs` asks for them.

# %%
runs_read = compare.read_runs(HOME / "results", runs)
missing = [one.name for one in runs_read if row not in one.conditions]
if missing and (runs or len(missing) == len(runs_read)):
    raise PerceptError(
        f"{', '.join(missing)} has no scores of '{row}': choose another row, or other runs."
    )
scored, alarms = compare.select_same_images(
    [one for one in runs_read if row in one.conditions], test_set, refuse=bool(runs)
)
alarms += compare.setting_differences(scored)
held_against = reference_run or scored[0].name
metrics_shown = compare.choose_metrics(scored, metrics, row)
print("\n".join(alarms or ["All runs were scored on the same test images."]))

# %%
print(
    "\n".join(
        [f"Left out, without scores of '{row}': {name}." for name in missing]
        + ([] if metrics else compare.missing_metrics(scored, metrics_shown, row))
    )
)
pd.DataFrame(
    {
        "run": [one.name for one in scored],
        "protocol": [one.protocol for one in scored],
        "decoder": [one.training.get("decoder", "made elsewhere") for one in scored],
        "components": [one.training.get("n_components", "") or "all voxels" for one in scored],
        "images": [len(one.values(metrics_shown[0], row)) for one in scored],
    }
)

# %% [markdown]
# ## The table
# A score is never without its floors and its ceiling, which stand beneath. Indented: other
# decoders of the same run.

# %%
tidy = compare.comparison(scored, metrics_shown)
table = compare.Table(scored, tidy, metrics_shown, row, seed)
run.record_parameters()
with atomic(run.results / "comparison.csv") as path:
    tidy.to_csv(path, index=False)
with atomic(run.results / "comparison.tex") as path:
    path.write_text(table.latex())
table

# %%
figures.save_figure(
    figures.plot_comparison(tidy, row, held_against), run.results / "figures" / "comparison.png"
)

# %% [markdown]
# ## Paired differences
# The intervals above overlap easily, since some images are hard for every run. The difference
# image by image takes that out. With 95 % intervals, one in twenty differences excludes 0 by
# chance: count how many there are.

# %%
gaps = compare.differences(scored, metrics_shown, held_against, row, seed)
with atomic(run.results / "differences.csv") as path:
    gaps.to_csv(path, index=False)
if len(gaps):
    clear = (gaps["verdict"] != "undecided").sum()
    print(
        f"{clear} of {len(gaps)} differences to {held_against} exclude 0; about"
        f" {0.05 * len(gaps):.0f} would by chance."
    )
    gaps["difference [95 %]"] = [
        f"{v:+.3f} [{low:+.3f}, {high:+.3f}]"
        for v, low, high in gaps[["value", "low", "high"]].to_numpy()
    ]
    gaps["difference [95 %]"] += gaps["verdict"].map(
        {"better": " better", "worse": " worse", "undecided": ""}
    )
else:
    print(
        "There is one run only: train another one to compare it with, e.g. `python run.py mindeye"
        " --mini -p decoder ridge -p model_name ridge`."
    )

# %%
(
    gaps.pivot(index="metric", columns="run", values="difference [95 %]")
    .reindex(metrics_shown)
    .dropna(how="all")
    .fillna("–")
    if len(gaps)
    else None
)

# %% [markdown]
# ## How much of the brain?
# Voxels are replaced by their first principal components. Where few of them do as well as all
# voxels, the rest of the brain is not what makes the picture.

# %%
points = compare.curves(scored, metrics_shown, "n_components")
if len(points):
    figures.save_figure(
        figures.plot_curves_over(points, "n_components", "components of the voxels"),
        run.results / "figures" / "bottleneck.png",
    )
else:
    print(
        "No two runs of a recipe differ in their number of components; this makes one: `python"
        " run.py mindeye --mini -p n_components 30`"
    )

# %%
compare.smallest_sufficient(points, scored, seed) if len(points) else None

# %% [markdown]
# ## How many sessions?
# Trained on the first so many sessions of a subject alone, each run is scored on the whole test
# set. Networks stand beside ridge, and beside a network that was pretrained on other subjects
# where there is one. The floors move, too: with few sessions, the nearest training image is one of
# few. Intervals are over test images; one training a point says nothing of the luck of its seed.

# %%
sessions = compare.curves(scored, metrics_shown, "num_sessions")
if len(sessions):
    with atomic(run.results / "sessions.csv") as path:
        sessions.to_csv(path, index=False)
    figures.save_figure(
        figures.plot_curves_over(sessions, "num_sessions", "training sessions"),
        run.results / "figures" / "sessions.png",
    )
else:
    print(
        "No two runs of a recipe differ in their number of training sessions; this makes one:"
        " `python run.py mindeye --mini -p num_sessions 1`"
    )


# %%
def name_curves(table):
    """What each row of a table of curves is called: the curve, or the baseline."""
    is_system = table["row"] == "system"
    return table["curve"].where(is_system, table["row"].map(compare.display_name))


def format_scores(table):
    """Each value with its interval, as text."""
    numbers = table[["value", "low", "high"]].to_numpy()
    return [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in numbers]


def by_sessions(table):
    """Scores as text, a line a metric and curve, floors and ceiling of the first curve beneath; a
    column a number of sessions.
    """
    plotted = table[(table["row"] == "system") | (table["curve"] == table["curve"].iloc[0])]
    plotted = plotted.assign(text=format_scores(plotted), what=name_curves(plotted))
    wide = plotted.pivot(index=["metric", "what"], columns="num_sessions", values="text")
    lines = plotted[["metric", "what"]].drop_duplicates()
    rank = lines["metric"].map(metrics_shown.index)
    order = lines.assign(rank=rank).sort_values("rank", kind="stable")[["metric", "what"]]
    sessions = list(dict.fromkeys(plotted["num_sessions"]))
    ordered = wide.reindex(index=pd.MultiIndex.from_frame(order), columns=sessions)
    return ordered.rename(columns={0: "all"}).fillna("–")


# %%
(
    by_sessions(sessions.sort_values("num_sessions", key=lambda k: k.replace(0, 10**6)))
    if len(sessions)
    else None
)

# %% [markdown]
# ## What does pretraining on other subjects add?
# A run that started from weights of other subjects against the run that is alike in all but that,
# image by image. Positive is more, for distances worse.

# %%
added = compare.pretraining_gain(scored, metrics_shown, seed)
if len(added):
    with atomic(run.results / "pretraining.csv") as path:
        added.to_csv(path, index=False)
    added["difference [95 %]"] = [
        f"{v:+.3f} [{low:+.3f}, {high:+.3f}]"
        for v, low, high in added[["value", "low", "high"]].to_numpy()
    ]
    added["difference [95 %]"] += added["verdict"].map(
        {"better": " better", "worse": " worse", "undecided": ""}
    )
else:
    print(
        "No run that started from weights of other subjects (multisubject_ckpt) stands beside one"
        " that is alike in all but that (docs/mindeye2.md)."
    )
names = added.assign(num_sessions=added["num_sessions"].replace(0, "all").astype(str) + " sessions")
(
    names.pivot(
        index="metric", columns=["run", "num_sessions"], values="difference [95 %]"
    ).reindex(metrics_shown)
    if len(added)
    else None
)

# %% [markdown]
# ## Categories that were never trained
# A training without a quarter of the clusters of images, against the plain one: the change on test
# images of these clusters, and on the others, which is the control for having trained on fewer
# images. What the first loses beyond the second was owed to relatives among the training images.
# Negative is a loss, also for distances.

# %%
effects = []


# %%
def compare_held_out(held_out_run, its_row, plain, other_row, held_out):
    """What a score loses on held-out clusters beyond what it loses on other images."""
    names = [
        name for name in metrics_shown if name in held_out_run.records and name in plain.records
    ]
    scores = {name: held_out_run.values(name, its_row) for name in names}
    plain_scores = {name: plain.values(name, other_row) for name in names}
    better = {name: held_out_run.records[name]["better"] for name in names}
    effect = compare.held_out_effect(scores, plain_scores, held_out, better, seed=seed)
    return effect.assign(run=held_out_run.name, row=its_row, plain=plain.name)


def draw_held_out(effect, held_out_run, its_row, plain):
    """Draw one such comparison into the run's figures."""
    condition = "" if its_row == "system" else f" ({its_row})"
    title = f"{held_out_run.name}{condition} against {plain.name}"
    file = f"held_out_{held_out_run.name.replace('/', '-')}_{its_row}.png"
    figures.save_figure(figures.plot_held_out_effect(effect, title), run.results / "figures" / file)


# %%
for held_out_run, its_row, plain, other_row in compare.held_out_pairs(scored):
    tensors = load_file(HOME / "results" / held_out_run.name / "reconstructions.safetensors")
    held_out = pd.Series(tensors["held_out"].numpy(), index=tensors["image_ids"].numpy())
    if held_out.all() or not held_out.any():
        print(
            f"{held_out_run.name} was scored on too few images: all or none of them are in held-out"
            " clusters."
        )
        continue
    effects.append(compare_held_out(held_out_run, its_row, plain, other_row, held_out))
    draw_held_out(effects[-1], held_out_run, its_row, plain)

# %%
if effects:
    with atomic(run.results / "held_out.csv") as path:
        pd.concat(effects).to_csv(path, index=False)
else:
    print(
        "There is no run without some clusters beside a plain one; this makes it: `python run.py"
        " mindeye --mini -p split cluster-held-out`"
    )


# %%
def effect_row(part):
    """Changes as text, a line a metric."""
    texts = part.assign(
        text=[
            f"{v:+.3f} [{low:+.3f}, {high:+.3f}]"
            for v, low, high in part[["value", "low", "high"]].to_numpy()
        ]
    )
    return texts.pivot(index=["run", "row", "metric"], columns="images", values="text")[
        ["held-out clusters", "kept clusters", "effect"]
    ]


pd.concat([effect_row(part) for part in effects]) if effects else None

# %% [markdown]
# ## What we saw

# %%
ranked = tidy[tidy["row"] == row].sort_values("value", ascending=False)
for line in ranked.groupby("metric", sort=False).head(1).itertuples():
    print(f"{line.metric}: {line.value:.3f} is the largest value, of {line.run}")
print(f"{len(scored)} runs were compared, {len(alarms)} alarms.")

# %% [markdown]
# First whether a run is better than its floors at all, then the paired difference, then whether it
# is large beside the distance between floor and ceiling. A run that was chosen because it came out
# best on these test images has been chosen on them: say so, or choose on validation images. Where
# ridge is as good as a network, depth adds nothing; where a few components are as good as all
# voxels, neither does most of the brain.
#
# ## Try this next
# Short experiments, after two recipes were run:
# - against the upper bound of another row: `python run.py compare -p row ridge`;
# - some runs alone: `python run.py compare -p runs mindeye*`.
