"""src.attribution: gradients against an independent integral, regions that must and must not
matter, and what is known of the mini world.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from src import figures
from src.data.images import write_images
from src.data.layout import write_image_table, write_subject
from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.evaluation import attribution
from src.miniworld.cortex import simulate
from src.networks.linear import RidgeBaseline
from src.networks.rebuild import build_decoder
from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.clip import Clipper
from src.utils import PerceptError, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ATTRIBUTES = {
    "source": "mini world (simulated)",
    "units": "percent signal change (simulated)",
    "normalisation": "none",
    "protocol": "mini",
}


# ----------------------------------------------------------------------------- a synthetic decoder
def table_of(sizes):
    """A table of voxels with regions of so many voxels one after the other."""
    owner = np.repeat(list(sizes), list(sizes.values()))
    return pd.DataFrame({name: owner == name for name in sizes})


def level_of(
    decoder,
    n=40,
    selected=12,
    features=(6,),
    columns=None,
    kind="high_level",
    components=None,
    seed=0,
):
    rng = np.random.default_rng(seed)
    voxels = rng.standard_normal((n, selected)).astype(np.float32)
    truth = torch.from_numpy(rng.standard_normal((n, *features)).astype(np.float32))
    columns = np.arange(selected) if columns is None else columns
    return attribution.Level(
        kind, decoder, voxels, columns, np.zeros(selected, np.float32), truth, components
    )


def network(selected=12, features=6, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(selected, 8), torch.nn.Tanh(), torch.nn.Linear(8, features)
    ).requires_grad_(False)


def reads_only(positions, selected, features=6, seed=0):
    """A linear decoder whose weights are zero everywhere but at some positions."""
    ridge, rng = RidgeBaseline(selected, (features,)), np.random.default_rng(seed)
    ridge.weight.data[positions] = torch.from_numpy(
        rng.standard_normal((len(positions), features)).astype(np.float32)
    )
    ridge.bias.data = torch.from_numpy(
        rng.standard_normal(features).astype(np.float32)
    )  # without it the baseline's prediction would have no direction
    return ridge.requires_grad_(False)


SIZES = {"V1": 6, "LO": 5, "PPA": 4}
COLUMNS = np.array(
    [1, 2, 4, 5, 7, 8, 10, 12, 13, 14]
)  # the voxels that this decoder was given: 4 of V1, 3 of LO, 3 of PPA
SIMILARITY = {
    "similarity": (
        lambda found: F.cosine_similarity(
            found.flatten(1), found.new_tensor(np.eye(6)[np.arange(len(found)) % 6])
        ).numpy()
    )
}


def drops_of(regions, used):
    level = level_of(reads_only(used, len(COLUMNS)), selected=len(COLUMNS), columns=COLUMNS)
    found = attribution.permutation_importance(level, regions, SIMILARITY, draws=3)
    return (
        {name: np.abs(found.drop("similarity", name)).max() for name in regions},
        found,
        attribution.integrated_gradients(level).values,
    )


def test_only_the_region_that_the_decoder_reads_matters():
    regions = attribution.partition_voxels(table_of(SIZES), COLUMNS)
    assert {name: at.tolist() for name, at in regions.items()} == {
        "V1": [0, 1, 2, 3],
        "LO": [4, 5, 6],
        "PPA": [7, 8, 9],
    }
    used = np.flatnonzero((COLUMNS >= 6) & (COLUMNS < 11))  # LO, found without `partition`
    drops, found, values = drops_of(regions, used)
    assert drops["LO"] > 0.1 and max(drops["V1"], drops["PPA"]) < 1e-6
    np.testing.assert_allclose(
        found.permuted["similarity", "LO"], found.permuted["similarity", "all"], atol=1e-6
    )
    np.testing.assert_allclose(
        found.isolated["similarity", "LO"], found.intact["similarity"], atol=1e-6
    )
    assert (
        np.abs(values[:, used]).max() > 0 and not values[:, np.setdiff1d(np.arange(10), used)].any()
    )


@pytest.mark.parametrize("wrong", ["shifted", "of the subject", "another order"])
def test_wrongly_indexed_regions_are_noticed(wrong):
    """What the test above asserts is false for these three mistakes: it can fail."""
    table = table_of(SIZES)
    columns = {
        "shifted": np.roll(COLUMNS, 1),
        "of the subject": np.arange(10),
        "another order": COLUMNS,
    }[wrong]
    regions = attribution.partition_voxels(
        table.set_axis(["LO", "PPA", "V1"], axis=1) if wrong == "another order" else table, columns
    )
    drops, _, _ = drops_of(regions, np.array([4, 5, 6]))
    assert max(drop for name, drop in drops.items() if name != "LO") > 0.1


# ---------------------------------------------------------------------------- integrated gradients
@pytest.mark.parametrize("kind", ["high_level", "low_level"])
def test_integrated_gradients_are_the_integral(kind):
    level = level_of(network(), kind=kind)
    found = attribution.integrated_gradients(level, steps=24)
    assert found.relative_error < 1e-4 and np.abs(found.change).mean() > 0.05
    x, total, steps, h = level.voxels[:3].astype(np.float64), np.zeros((3, 12)), 200, 1e-4
    decoder = network().double()

    def similarity(at):
        a, b = decoder(torch.from_numpy(at)).numpy(), level.truth[:3].double().numpy()
        if kind == "low_level":
            return np.array([np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)])
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    for alpha in (np.arange(steps) + 0.5) / steps:
        for voxel in range(12):
            step = h * np.eye(12)[voxel]
            total[:, voxel] += (
                (similarity(alpha * x + step) - similarity(alpha * x - step)) / (2 * h) / steps
            )
    np.testing.assert_allclose(found.values[:3], total * x, atol=2e-4)
    np.testing.assert_allclose(found.change[:3], similarity(x) - similarity(0 * x), atol=1e-5)


def test_too_few_steps_are_told_and_nonsense_is_refused():
    level = level_of(network())
    level.decoder[0].weight *= 40
    with pytest.warns(UserWarning, match="more than 2 steps"):
        attribution.integrated_gradients(level, steps=2)
    for options in ({"target": "other"}, {"steps": 1}):
        with pytest.raises(PerceptError, match="choose seen or predicted"):
            attribution.integrated_gradients(level, **options)


def test_the_predictions_own_direction_needs_no_truth():
    level = level_of(network())
    other = attribution.Level(
        level.kind, level.decoder, level.voxels, level.columns, level.baseline, -level.truth
    )
    mine, same = (attribution.integrated_gradients(each, "predicted") for each in (level, other))
    np.testing.assert_array_equal(mine.values, same.values)
    at_zero = F.cosine_similarity(
        level.predict(level.voxels), level.predict(0 * level.voxels)
    ).numpy()
    np.testing.assert_allclose(mine.change, 1 - at_zero, atol=1e-5)
    seen, unseen = (attribution.integrated_gradients(each) for each in (level, other))
    np.testing.assert_allclose(seen.values, -unseen.values, atol=1e-5)


def test_components_are_followed_back_to_voxels():
    components = torch.from_numpy(
        np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)
    )
    through, plain = RidgeBaseline(5, (6,)), RidgeBaseline(12, (6,))
    through.weight.data = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plain.weight.data = components @ through.weight.data
    through.bias.data = plain.bias.data = torch.ones(6)
    a, b = (
        attribution.integrated_gradients(level_of(d.requires_grad_(False), components=c)).values
        for d, c in ((through, components), (plain, None))
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(a).max() > 0.01


# -------------------------------------------------------------------- regions, permutation, shares
def test_regions_are_disjoint_and_the_first_has_the_voxel():
    table = pd.DataFrame(
        {
            "left": [True] * 5,
            "A": [True, True, False, False, False],
            "B": [False, True, True, False, False],
            "x": range(5),
        }
    )
    assert {
        k: v.tolist() for k, v in attribution.partition_voxels(table, np.arange(5)).items()
    } == {
        "A": [0, 1],
        "B": [2],
        "no region": [3, 4],
    }
    assert {
        k: v.tolist()
        for k, v in attribution.partition_voxels(table, np.array([1, 4]), "B, A").items()
    } == {"B": [0], "no region": [1]}
    for names, columns, words in (("C", [0], "no region C"), ("", [5], "different subjects")):
        with pytest.raises(PerceptError, match=words):
            attribution.partition_voxels(table, np.array(columns), names)
    with pytest.raises(PerceptError, match="no Boolean column"):
        attribution.partition_voxels(table[["x"]], np.arange(5))
    assert attribution.group_regions({"V1": [], "LO": [], "no region": []}) == {
        "early areas": ["V1"],
        "higher areas": ["LO"],
    }


def test_without_captum_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(PerceptError, match="needs the package captum.*--extra attribution"):
        attribution.integrated_gradients(level_of(network()))


def test_a_region_is_moved_as_one_and_draws_are_seeded():
    seen, regions = [], {"A": np.array([0, 3]), "B": np.array([1, 2])}
    level = level_of(torch.nn.Identity(), selected=4, features=(4,))
    scores = {
        "one": lambda found: seen.append(found.numpy()) or found[:, 0].numpy(),
        "rare": lambda found: found[:, 0].numpy(),
    }
    found = attribution.permutation_importance(
        level, regions, scores, {"both": ["A", "B"]}, draws=2, slow_draws={"rare": 1}
    )
    x = level.voxels
    intact, without_a = seen[0], seen[1]
    np.testing.assert_array_equal(intact, x)
    order = [int(np.flatnonzero(x[:, 0] == value)[0]) for value in without_a[:, 0]]
    assert sorted(order) == list(range(40)) and not any(i == k for k, i in enumerate(order))
    np.testing.assert_array_equal(
        without_a, np.stack([x[order, 0], x[:, 1], x[:, 2], x[order, 3]], 1)
    )
    np.testing.assert_array_equal(found.permuted["rare", "A"], without_a[:, 0])
    np.testing.assert_array_equal(found.permuted["one", "A"], (seen[1] + seen[2])[:, 0] / 2)
    np.testing.assert_array_equal(found.isolated["one", "A"], x[:, 0])  # its own voxels stay
    again = attribution.permutation_importance(level, regions, scores, draws=2)
    np.testing.assert_array_equal(again.permuted["one", "A"], found.permuted["one", "A"])
    with pytest.raises(PerceptError, match="at least once"):
        attribution.permutation_importance(level, regions, scores, draws=0)


def test_shares_are_those_of_the_sum_and_of_nothing_there_are_none():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(m, 0.1, 50) for m in (1.0, 2.0, 1.0)])
    share = attribution.bootstrap_share(values, np.array([False, True, False]))
    assert (
        share[0] == pytest.approx(values[1].mean() / values.mean(1).sum())
        and share[1:].std() < 0.02
        and abs(share[1:].mean() - share[0]) < 0.01
    )
    assert np.isnan(
        attribution.bootstrap_share(values - values.mean(), np.array([True, False, False]))
    ).all()


def importance(kind, drops, n=60, noise=0.05):
    rng, scores = np.random.default_rng(1), list(drops)
    regions, groups = ("V1", "LO"), {"early areas": "V1", "higher areas": "LO"}
    intact = {s: np.full(n, 0.9) for s in scores}
    without = {(s, r): 0.9 - rng.normal(drops[s][r], noise, n) for s in scores for r in regions}
    without |= {(s, g): without[s, r] for s in scores for g, r in groups.items()} | {
        (s, "all"): np.zeros(n) for s in scores
    }
    sizes = {"V1": 200, "LO": 50, "early areas": 200, "higher areas": 50, "all": 250}
    return attribution.Importance(
        kind,
        sizes,
        intact,
        without,
        {(s, r): np.zeros(n) for s in scores for r in (*regions, *groups)},
    )


def test_the_sentences_say_what_the_table_says():
    both = [
        importance("low_level", {"pixcorr": {"V1": 0.4, "LO": 0.1}}),
        importance("high_level", {"kind": {"V1": 0.1, "LO": 0.3}, "flat": {"V1": 0.0, "LO": 0.0}}),
    ]
    groups = dict.fromkeys(
        attribution.SIMILARITIES, {"early areas": ["V1"], "higher areas": ["LO"]}
    )
    table, shares = (
        pd.concat([attribution.importance_table(f) for f in both]),
        attribution.share_of_higher(both, groups),
    )
    of = shares[
        (shares["permuted"] == "one region") & (shares["measure"] == "share of higher areas")
    ].set_index("score")["value"]
    assert (
        of["pixcorr"] == pytest.approx(0.2, abs=0.03)
        and of["kind"] == pytest.approx(0.75, abs=0.04)
        and np.isnan(of["flat"])
    )
    said = " ".join(attribution.describe_importance(table, shares))
    assert (
        "pixcorr falls most without V1" in said
        and "kind falls most without LO" in said
        and "flat does not clearly fall" in said
    )
    assert (
        "higher areas carry more of kind than of pixcorr" in said
        and "flat and pixcorr cannot be compared" in said
    )
    turned = [
        importance("low_level", {"pixcorr": {"V1": 0.1, "LO": 0.4}}),
        importance("high_level", {"kind": {"V1": 0.3, "LO": 0.1}}),
    ]
    said = " ".join(
        attribution.describe_importance(
            pd.concat([attribution.importance_table(f) for f in turned]),
            attribution.share_of_higher(turned, groups),
        )
    )
    assert "higher areas carry less of kind than of pixcorr" in said
    row = table[
        (table["score"] == "pixcorr") & (table["measure"] == "drop") & (table["region"] == "V1")
    ].iloc[0]
    assert (
        row["per_100_voxels"] == pytest.approx(row["value"] / 2)
        and row["low"] < row["value"] < row["high"]
    )
    assert isinstance(figures.plot_region_bars(table), Figure)
    alone = attribution.share_of_higher(both[:1], groups)
    assert (
        set(alone["measure"]) == {"share of higher areas"}
        and len(attribution.describe_importance(attribution.importance_table(both[0]), alone)) == 1
    )


def test_a_probe_names_what_can_be_told_apart():
    rng = np.random.default_rng(0)
    centres, labels = rng.standard_normal((3, 20)), np.array(["a", "b", "c"])[np.arange(90) % 3]
    tokens = centres[np.arange(90) % 3] + 0.2 * rng.standard_normal((90, 20))
    probe = attribution.fit_probes(tokens[:60], {"letter": labels[:60]})["letter"]
    right = attribution.naming_score(probe, labels[60:])(torch.from_numpy(tokens[60:]))
    assert right.shape == (30,) and right.mean() > 0.9
    assert (
        attribution.naming_score(probe, np.roll(labels[60:], 1))(
            torch.from_numpy(tokens[60:])
        ).mean()
        < 0.1
    )
    with pytest.raises(PerceptError, match="at least two labels"):
        attribution.fit_probes(tokens, {"one": ["same"] * 90})


# ---------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small simulated experiment, prepared, with ridge baselines of both levels in
    train_logs/small.
    """
    home = tmp_path_factory.mktemp("home")
    made, folder, logs = (
        simulate(1, 500, 20, 100),
        home / "data" / "small",
        home / "train_logs" / "small",
    )
    logs.mkdir(parents=True)
    write_subject(
        folder / "subj01", made.scan.betas, made.scan.trials, made.scan.voxels, ATTRIBUTES
    )
    write_images(folder / "images.h5", made.images, made.image_ids)
    write_image_table(folder / "labels.parquet", made.labels)
    subject = open_subject(folder, 1)
    normaliser, frozen = (
        Normaliser.fit(subject),
        {"high_level": Clipper("mini"), "low_level": LatentAutoencoder("mini")},
    )
    normaliser.save(logs / "normaliser.safetensors")
    x, ids = subject.get_mean_betas("train", normaliser=normaliser)
    test_ids = subject.image_ids("test")
    targets = {
        kind: {
            part: model.encode_pixels(subject.images(some))
            for part, some in (("train", ids), ("test", test_ids))
        }
        for kind, model in frozen.items()
    }
    ridges = {
        kind: RidgeBaseline.fit(x, both["train"], cv=3).requires_grad_(False)
        for kind, both in targets.items()
    }
    config = {"high_level": {"tokens": list(frozen["high_level"].target_shape)}, "low_level": {}}
    for kind, ridge in ridges.items():
        save_checkpoint(
            logs / f"{kind}_ridge.safetensors",
            ridge.state_dict(),
            {"model": ridge.config} | config[kind],
        )
    return SimpleNamespace(
        home=home,
        subject=subject,
        logs=logs,
        targets=targets,
        ridges=ridges,
        ids=ids,
        test_ids=test_ids,
    )


def level_in(world, kind, **options):
    return attribution.open_level(
        world.subject,
        kind,
        world.ridges[kind],
        world.logs / f"{kind}_ridge.safetensors",
        world.targets[kind]["test"],
        **options,
    )


@pytest.mark.slow(reason="attributes every voxel of a subject")
def test_higher_areas_carry_the_meaning_and_early_areas_the_look(world):
    """The simulated truth (src/miniworld): V1 to hV4 measure Gabor energy and colour, LO to OPA
    what is in the picture.
    """
    levels = {kind: level_in(world, kind) for kind in world.ridges}
    labels = {
        part: {c: world.subject.categories(ids, c) for c in ("kind", "scene")}
        for part, ids in (("train", world.ids), ("test", world.test_ids))
    }
    probes = attribution.fit_probes(world.targets["high_level"]["train"], labels["train"])
    true = levels["low_level"].truth.flatten(1)
    scores = {
        "low_level": {
            "latent": (
                lambda found: (
                    attribution.SIMILARITIES["low_level"].compute(found.flatten(1), true).numpy()
                )
            )
        },
        "high_level": {
            c: attribution.naming_score(probe, labels["test"][c]) for c, probe in probes.items()
        },
    }
    regions = attribution.partition_voxels(world.subject.voxels, levels["low_level"].columns)
    groups = attribution.group_regions(regions)
    assert groups == {
        "early areas": ["V1", "V2", "V3", "hV4"],
        "higher areas": ["LO", "EBA", "FFA", "PPA", "OPA"],
    }
    found = [
        attribution.permutation_importance(level, regions, scores[kind], groups, draws=5)
        for kind, level in levels.items()
    ]
    shares = attribution.share_of_higher(found, dict.fromkeys(levels, groups)).set_index(
        ["measure", "permuted", "score"]
    )
    assert (shares.loc[("difference of shares", "group"), "low"] > 0.1).all()
    assert (
        shares.loc[("share of higher areas", "group", "latent"), "high"] < 0.3
        and shares.loc[("share of higher areas", "group", "kind"), "low"] > 0.6
    )
    values = {kind: attribution.integrated_gradients(level) for kind, level in levels.items()}
    tables = {
        kind: attribution.attribution_table(kind, each, regions).set_index("region")
        for kind, each in values.items()
    }
    higher = {
        kind: table.loc[groups["higher areas"], "value"].sum() for kind, table in tables.items()
    }
    assert higher["high_level"] > higher["low_level"] + 0.1 and all(
        each.relative_error < 1e-3 for each in values.values()
    )
    assert all(table["value"].sum() == pytest.approx(1) for table in tables.values())
    table = attribution.voxel_table(
        world.subject.voxels, {kind: (levels[kind].columns, each) for kind, each in values.items()}
    )
    assert len(table) == len(world.subject.voxels) and table["low_level_mean"].notna().all()
    assert isinstance(
        figures.plot_voxel_map(
            table, {"low level": table["low_level_mean"], "high level": table["high_level_mean"]}
        ),
        Figure,
    )


def test_a_level_has_the_voxels_that_its_decoder_was_trained_on(world, tmp_path):
    plain = level_in(world, "low_level", first=30)
    assert (
        plain.voxels.shape == (30, world.subject.betas.shape[1])
        and len(plain.truth) == 30
        and not plain.baseline.any()
    )
    (tmp_path / "low_level").mkdir()
    Normaliser.fit(world.subject, rois="V2,FFA").save(tmp_path / "normaliser.safetensors")
    some = attribution.open_level(
        world.subject,
        "low_level",
        world.ridges["low_level"],
        tmp_path / "low_level" / "last.safetensors",
        plain.truth,
        30,
    )
    np.testing.assert_allclose(some.voxels, plain.voxels[:, some.columns], rtol=1e-5)
    regions = attribution.partition_voxels(world.subject.voxels, some.columns)
    assert (
        set(regions) == {"V2", "FFA"}
        and world.subject.voxels["FFA"].to_numpy()[some.columns[regions["FFA"]]].all()
    )
    Normaliser.fit(world.subject, rois="V2,FFA", masked=True).save(
        tmp_path / "normaliser.safetensors"
    )
    masked = attribution.open_level(
        world.subject,
        "low_level",
        world.ridges["low_level"],
        tmp_path / "low_level" / "last.safetensors",
        plain.truth,
        30,
    )
    np.testing.assert_allclose(masked.voxels[:, some.columns], some.voxels, rtol=1e-5)
    left_out = np.setdiff1d(masked.columns, some.columns)
    assert (
        masked.columns.tolist() == plain.columns.tolist()
        and not masked.voxels[:, left_out].any()
        and not masked.baseline.any()
    )
    found = attribution.integrated_gradients(masked, steps=4).values
    assert not found[:, left_out].any() and np.abs(found[:, some.columns]).max() > 0
    normaliser = Normaliser.fit(world.subject, n_components=7)
    normaliser.save(tmp_path / "normaliser.safetensors")
    few = attribution.open_level(
        world.subject,
        "low_level",
        world.ridges["low_level"],
        tmp_path / "low_level" / "last.safetensors",
        plain.truth,
        30,
    )
    projected = world.subject.get_mean_betas("test", normaliser=normaliser)[0][:30]
    np.testing.assert_allclose(few.voxels @ few.components.numpy(), projected, atol=1e-4)
    trained = level_in(world, "low_level", baseline="train").baseline
    assert 0 < np.abs(trained).max() < 1e-3  # z-scored training trials have the mean 0
    released = attribution.open_level(
        world.subject,
        "low_level",
        world.ridges["low_level"],
        tmp_path / "last.pth",
        plain.truth,
        baseline="train",
    )
    np.testing.assert_allclose(
        released.baseline, world.subject.get_mean_betas("train")[0].mean(0), rtol=1e-4
    )  # of betas as they are
    Normaliser(np.zeros((1, 5), np.float32), np.ones((1, 5), np.float32), None).save(
        tmp_path / "normaliser.safetensors"
    )
    for options, words in (
        ({}, "rows of 5 voxels"),
        ({"baseline": "mean"}, "choose one of zero, train"),
    ):
        with pytest.raises(PerceptError, match=words):
            attribution.open_level(
                world.subject,
                "low_level",
                world.ridges["low_level"],
                tmp_path / "x.safetensors",
                plain.truth,
                **options,
            )


def test_a_glass_brain_is_drawn_by_the_affine_and_charts_need_places():
    rng, affine = np.random.default_rng(0), np.diag([1.8, 1.8, 1.8, 1.0])
    affine[:3, 3] = (-72, -100, -60)
    voxels = pd.DataFrame(rng.integers(10, 60, (50, 3)), columns=["i", "j", "k"]).assign(V1=True)
    values = rng.standard_normal(50)
    values[:5] = np.nan
    fig = figures.plot_glass_brain(voxels, values, affine, "native space")
    assert isinstance(fig, Figure) and any("native space" in text.get_text() for text in fig.texts)
    with pytest.raises(PerceptError, match="indices i, j, k"):
        figures.plot_glass_brain(voxels[["V1"]], values, affine)
    with pytest.raises(PerceptError, match="no x, y and z"):
        figures.plot_voxel_map(voxels, {"a": values})


def launch(world, *flags):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(world.home),
        "MPLBACKEND": "agg",
    }
    common = [
        "notebooks/05_attribution.py",
        "--dataset",
        "small",
        "--weights",
        "mini",
        "--n_permutations",
        "2",
        "--first_images",
        "25",
        "--steps",
        "8",
    ]
    return subprocess.run(
        [sys.executable, *common, *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow(reason="executes notebook 05")
def test_the_notebook_reads_a_run_with_either_level(world):
    done = launch(world, "--model_name", "small", "--explained_decoder", "ridge")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "higher areas carry" in done.stdout and "completeness error" in done.stdout
    results = world.home / "results" / "small"
    table, voxels = (
        pd.read_csv(results / "region_importance.csv"),
        pd.read_parquet(results / "attribution.parquet"),
    )
    assert set(table["measure"]) == {
        "attribution",
        "intact",
        "drop",
        "only",
        "share of higher areas",
        "difference of shares",
    }
    assert {"pixcorr", "latent correlation", "top-1", "similarity", "kind", "scene"} <= set(
        table["score"]
    )
    assert len(voxels) == len(world.subject.voxels) and {
        "low_level_mean",
        "high_level_absolute",
        "V1",
        "x",
    } <= set(voxels)
    assert {"05_voxels.png", "05_regions.png"} <= {
        path.name for path in (results / "figures").iterdir()
    }
    logs = world.home / "train_logs" / "network" / "high_level"
    logs.mkdir(parents=True)
    (world.logs / "normaliser.safetensors").rename(logs.parent / "normaliser.safetensors")
    brain = {
        "in_dim": world.subject.betas.shape[1],
        "out_dim": 17 * 128,
        "clip_size": 128,
        "h": 16,
        "n_blocks": 1,
        "projector_dim": 16,
    }
    net = {
        "dim": 128,
        "depth": 1,
        "dim_head": 16,
        "heads": 2,
        "num_tokens": 17,
        "learned_query_mode": "pos_emb",
    }
    model = {
        "name": "BrainDiffusionPrior",
        "kwargs": {"image_embed_dim": 128, "timesteps": 10},
        "voxel2clip": {"name": "BrainNetwork", "kwargs": brain},
        "net": {"name": "VersatileDiffusionPriorNetwork", "kwargs": net},
    }
    save_checkpoint(
        logs / "last.safetensors",
        build_decoder(model).state_dict(),
        {"model": model, "tokens": [17, 128]},
    )
    done = launch(world, "--model_name", "network", "--target", "predicted", "--labels", "scene")
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(world.home / "results" / "network" / "region_importance.csv")
    assert set(table["level"].dropna()) == {"high_level"} and "scene" in set(table["score"])
    refused = launch(world, "--model_name", "nothing")
    assert refused.returncode != 0 and "has no network of either level" in refused.stderr
