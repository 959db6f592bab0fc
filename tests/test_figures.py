"""Figures are drawn, hold what they were given, and reach the disk as whole PNG files."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from src import figures, retrieval
from src.figures import canvas
from src.utils import PerceptError


def random_images(n=6, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, side, side, generator=generator)


def record(name="pixcorr", better="higher", **change):
    score = {"value": 0.5, "low": 0.45, "high": 0.55}
    floors = {
        "shuffled": {"value": 0.1, "low": 0.05, "high": 0.15},
        "own_control": {"value": 0.2, "low": 0.1, "high": 0.3},
    }
    ceiling = {"value": 0.9, "low": 0.85, "high": 0.95}
    labels = {"name": name, "better": better, "n": 6}
    return {**labels, **score, "floors": floors, "ceiling": ceiling, **change}


def history():
    epochs = np.arange(5)
    validation = [3, np.nan, 1, np.nan, 2]
    training = {"train/loss": 4.0 - epochs, "train/lr": epochs / 10}
    return pd.DataFrame({"epoch": epochs, "val/loss": validation} | training)


def texts(fig):
    return [t.get_text() for t in fig.findobj(plt.Text)]


def pool_table():
    clip = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    return retrieval.compute_retrieval_by_pool_size(
        clip + 0.5 * torch.randn_like(clip), clip, (4, 8)
    )


def voxel_table():
    rng = np.random.default_rng(0)
    flags = {"V1": rng.random(50) < 0.4, "empty": np.zeros(50, bool)}
    return pd.DataFrame({"noise_ceiling": rng.random(50), **flags})


RUNS = ["a_run", "a_run-with-a-long-name-cluster-held-out", *(f"run{i}" for i in range(8))]


def run_table():
    conditions = {"system": 0.5, "ridge": 0.4, "mean_image": 0.1, "ceiling": 0.9}
    better = {"pixcorr": "higher", "mse": "lower"}
    rows = []
    for i, run in enumerate(RUNS):
        for condition, score in conditions.items():
            value = score + i / 100
            for metric in better:
                interval = (value, value - 0.05, value + 0.05)
                rows.append((run, condition, metric, *interval, better[metric]))
    columns = ["run", "row", "metric", "value", "low", "high", "better"]
    return pd.DataFrame(rows, columns=columns)


def bottleneck_table():
    components = dict(zip(RUNS, (3, 30, 0), strict=False))
    table = run_table().query("row != 'ridge'")
    table = table[table["run"].isin(components)]
    table = table.assign(n_components=table["run"].map(components))
    network = table.assign(curve="mindeye/mini, network")
    ridge = table[table["row"] == "system"].assign(curve="mindeye/mini, ridge")
    return pd.concat([network, ridge])


def effect_table():
    changes = {  # value and number of images
        "held-out clusters": (-0.3, 5),
        "kept clusters": (-0.1, 20),
        "effect": (-0.2, 25),
    }
    rows = []
    for metric in ("pixcorr", "mini:judge:kind"):
        for images, (value, n) in changes.items():
            rows.append((metric, images, value, value - 0.05, value + 0.05, n))
    return pd.DataFrame(rows, columns=["metric", "images", "value", "low", "high", "n"])


def draw_hits_and_misses():
    images, candidates = random_images(), np.tile(np.arange(4), (6, 1))
    targets, ranks = np.arange(6), np.arange(1, 7)
    return figures.plot_hits_and_misses(images, images, candidates, targets, ranks, k=4)


def draw_curves_over(table=None):
    table = bottleneck_table() if table is None else table
    return figures.plot_curves_over(table, "n_components", "components of the voxels")


def draw_contact_sheet():
    columns = {"seen": random_images(), "reconstructed": random_images(seed=1)}
    return figures.plot_contact_sheet(columns, n=5)


FIGURES = {
    "comparison": lambda: figures.plot_comparison(run_table(), baseline="a_run"),
    "curves_over": draw_curves_over,
    "held_out": lambda: figures.plot_held_out_effect(effect_table(), "a run against another"),
    "contact_sheet": draw_contact_sheet,
    "hits_and_misses": draw_hits_and_misses,
    "training_curves": lambda: figures.plot_training_curves(history()),
    "score_dots": lambda: figures.plot_score_dots([record(), record("mse", "lower")], "a run"),
    "retrieval_curve": lambda: figures.plot_retrieval_curve(pool_table()),
    "roi_reliability": lambda: figures.plot_roi_reliability(voxel_table()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_closed_and_saved_whole(name, tmp_path):
    before = dict(plt.rcParams)
    fig = FIGURES[name]()
    figures.save_figure(fig, tmp_path / f"{name}.png")
    with Image.open(tmp_path / f"{name}.png") as image:
        assert min(image.size) > 60
        assert np.asarray(image.convert("L")).std() > 1
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.png"]
    assert not plt.get_fignums() and dict(plt.rcParams) == before


def test_contact_sheet_shows_the_first_images_pixel_for_pixel(tmp_path):
    images = random_images(side=112)
    fig = figures.plot_contact_sheet(
        {"seen": images, "low level": random_images(side=8)},
        n=3,
        blocks=1,
        labels=["a", "b", "c", "d", "e", "f"],
    )
    page = fig.axes[0].images[0].get_array()
    first = (images[0] * 255).round().byte()
    first = first.permute(1, 2, 0).numpy()
    rows, columns = (page == first[0, 0]).all(-1).nonzero()
    corners = [
        (y, x)
        for y, x in zip(rows, columns, strict=True)
        if (page[y : y + 112, x : x + 112] == first).all()
    ]
    assert len(corners) == 1
    assert {"seen", "low level", "a", "c"} <= set(texts(fig))
    assert "d" not in texts(fig)
    figures.save_figure(fig, tmp_path / "sheet.png")
    saved = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    y, x = corners[0]
    assert (saved[y : y + 112, x : x + 112] == first).all()


def test_enlargement_by_nearest_keeps_whole_pixels():
    tiles = canvas.make_tiles(random_images(2), 32, "nearest")
    pixels = tiles[:, ::4, ::4]
    assert (pixels.repeat(4, 1).repeat(4, 2) == tiles).all()
    assert canvas.choose_tile_side(random_images(side=32)) % 32 == 0
    assert canvas.choose_tile_side(random_images(side=425)) == 112


def test_hits_and_misses_are_the_first_of_each_in_order_with_the_right_image_framed():
    candidates = [
        [2, 0, 1],
        [1, 0, 2],
        [0, 2, 1],
        [3, 1, 2],
        [4, 1, 2],
    ]
    ranks, images = [2, 1, 2, 1, 1], random_images(5)
    arguments = (images, images, candidates, np.arange(5), ranks)
    fig = figures.plot_hits_and_misses(*arguments, n=2, k=2)
    labels = texts(fig)
    assert labels.count("✓") == 4  # both hits, both misses that have it second
    assert [label for label in labels if label.isdigit()] == ["2", "4", "1", "3"]
    assert "Image from brain: 3 hits and 2 misses among 5 test images" in labels
    assert labels.count("rank 2\nof 5") == 2
    assert labels.count("rank 1\nof 5") == 2


def test_hits_and_misses_say_when_there_are_none_and_refuse_what_does_not_pair():
    images, targets = random_images(3), np.arange(3)
    candidates = np.tile(targets, (3, 1))
    fig = figures.plot_hits_and_misses(images, images, candidates, targets, np.ones(3))
    assert any(text.endswith("there are none") for text in texts(fig))
    with pytest.raises(PerceptError, match="must pair up"):
        figures.plot_hits_and_misses(images, images, candidates, targets, np.ones(2))


def test_training_curves_mark_the_best_validation_epoch_and_skip_gaps():
    fig = figures.plot_training_curves(history())
    assert "best, epoch 2" in texts(fig)
    lines = {line.get_label(): line for line in fig.axes[0].get_lines()}
    assert lines["val"].get_xdata().tolist() == [0, 2, 4]


def test_scores_point_right_when_they_are_better():
    without_ceiling = record("top1", ceiling={"not_applicable": "no generator"})
    fig = figures.plot_score_dots([record(), record("mse", "lower"), without_ceiling])
    assert [ax.xaxis_inverted() for ax in fig.axes] == [False, True, False]
    assert {"own control", "shuffled pairing", "0.500  [0.450, 0.550]"} <= set(texts(fig))
    markers = [[line.get_marker() for line in ax.get_lines()] for ax in fig.axes]
    assert [drawn.count("|") for drawn in markers] == [1, 1, 0]


def test_long_names_of_scores_stay_inside_the_figure():
    fig = figures.plot_score_dots(
        [record("hard_brain_from_image_top1 (ridge)"), record("mse", "lower")]
    )
    FigureCanvasAgg(fig).draw()
    assert all(text.get_window_extent().x0 >= 0 for ax in fig.axes for text in ax.texts)


def test_comparison_names_every_run_and_points_right_when_it_is_better():
    fig = figures.plot_comparison(run_table(), baseline="a_run")
    labels = texts(fig)
    assert {*RUNS, "floors and ceiling", "mean image", "ceiling"} <= set(labels)
    assert "interval of the baseline" in labels and "ridge" not in labels
    inverted = {ax.get_title("left"): ax.xaxis_inverted() for ax in fig.axes}
    assert inverted == {"pixcorr": False, "mse (lower is better)": True}
    first = fig.axes[0]
    dots = [line for line in first.get_lines() if line.get_marker() == "o"]
    scores = [dot.get_xdata()[0] for dot in dots]
    assert scores == pytest.approx([0.5 + i / 100 for i in range(10)])
    FigureCanvasAgg(fig).draw()
    assert all(label.get_window_extent().x0 >= 0 for label in first.get_yticklabels())


def test_bottleneck_curve_ends_with_all_voxels():
    fig = draw_curves_over()
    ticks = [label.get_text() for label in fig.axes[0].get_xticklabels()]
    assert ticks == ["3", "30", "all"]
    assert {
        "mindeye/mini, network, 95 % interval",
        "mindeye/mini, ridge, 95 % interval",
        "mean image",
        "ceiling",
    } <= set(texts(fig))
    assert fig.axes[1].yaxis_inverted() and not fig.axes[0].yaxis_inverted()


def test_held_out_effect_writes_what_is_lost_beyond_the_others():
    labels = texts(figures.plot_held_out_effect(effect_table(), "a run against another"))
    assert labels.count("-0.200  [-0.250, -0.150]") == 2
    assert {
        "a run against another",
        "5 images of held-out clusters",
        "20 images of the others",
        "mini:judge:kind",
    } <= set(labels)


@pytest.mark.slow(reason="compiles UMAP")
def test_umap_shows_brains_filled_and_images_open():
    clip = torch.randn(15, 4, 3, generator=torch.Generator().manual_seed(0))
    categories = ["cat"] * 8 + ["dog"] * 5 + ["fish"] * 2
    fig = figures.plot_embeddings(clip + 0.1, clip, categories, max_categories=2)
    filled, hollow = [], []
    for dots in fig.axes[0].collections:
        counts = filled if len(dots.get_facecolor()) else hollow
        counts.append(len(dots.get_offsets()))
    assert filled == hollow == [8, 5, 2]
    assert {"cat", "dog", "other"} <= set(texts(fig)) and "fish" not in texts(fig)


def test_roi_figure_counts_voxels():
    voxels = voxel_table()
    labels = texts(figures.plot_roi_reliability(voxels))
    assert {"all voxels", "50", "V1", str(voxels["V1"].sum())} <= set(labels)
    assert {"empty", "0", "-"} <= set(labels)


BAD_INPUTS = {
    "columns of different lengths": (
        lambda: figures.plot_contact_sheet({"seen": random_images(3), "other": random_images(2)}),
        "differ in length",
    ),
    "unknown enlargement": (
        lambda: figures.plot_contact_sheet({"seen": random_images(3)}, enlarge="sharp"),
        "choose one of nearest, bicubic",
    ),
    "no channels": (
        lambda: figures.plot_contact_sheet({"seen": torch.rand(3, 8, 8)}),
        "expect",
    ),
    "no history": (
        lambda: figures.plot_training_curves(pd.DataFrame({"epoch": [1]})),
        "train/loss",
    ),
    "no records": (lambda: figures.plot_score_dots([]), "no scores"),
    "unknown condition": (
        lambda: figures.plot_comparison(run_table(), condition="typo"),
        "no scores of 'typo'",
    ),
    "no curves": (
        lambda: draw_curves_over(bottleneck_table()[:0]),
        "no scores by number of components",
    ),
    "no changes": (lambda: figures.plot_held_out_effect(effect_table()[:0]), "no changes"),
    "unpaired embeddings": (
        lambda: figures.plot_embeddings(torch.rand(3, 2), torch.rand(3, 2), ["a"]),
        "pair up",
    ),
    "no noise ceiling": (
        lambda: figures.plot_roi_reliability(pd.DataFrame({"V1": [True]})),
        "noise_ceiling",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name):
    draw, message = BAD_INPUTS[name]
    with pytest.raises(PerceptError, match=message):
        draw()
    assert not plt.get_fignums()
