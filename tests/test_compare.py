"""Comparing runs: who may be compared, that tables hold what the runs hold, and the notebook on
small results.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from src import utils
from src.evaluation import compare
from src.evaluation.records import add_results, make_record, provenance
from src.evaluation.statistics import bootstrap_mean, paired_bootstrap
from src.pipeline import recipes, stages
from src.utils import ROOT, PerceptError, write_json

IDS = np.array([3, 7, 11, 20, 21, 30, 44, 45, 46, 47, 50, 61])
NOTEBOOK = ROOT / "notebooks" / "07_compare.py"


def scores(level, seed, lower=False):
    found = np.clip(level + np.random.default_rng(seed).normal(0, 0.05, len(IDS)), 0, 1)
    return 1 - found if lower else found


def add_run(
    home,
    name,
    level,
    test_set="12-ours",
    pixels="12-pixels-abc",
    ids=IDS,
    trained=None,
    rows=("ridge",),
    metrics=("pixcorr", "mini:EffNet-B1"),
):
    """A run with scores about `level` (between 0, worst, and 1), through the format that stages
    write.
    """
    tables, records = [], []
    for i, metric in enumerate(metrics):
        lower = metric.endswith("B1")
        each = {
            "system": scores(level, i, lower),
            "mean_image": scores(0.1, 8, lower),
            "ceiling": scores(0.95, 9, lower),
        }
        each |= {row: scores(level - 0.05, 20 + i, lower) for row in rows}
        tables += [
            pd.DataFrame({"metric": metric, "row": row, "image": ids, "draw": 0, "value": values})
            for row, values in each.items()
        ]
        better = "lower" if lower else "higher"
        floors = {"mean_image": each["mean_image"]}
        protocol = "mini-12" + (
            "+cluster-held-out" if (trained or {}).get("split") == "cluster-held-out" else ""
        )
        records.append(
            make_record(
                metric,
                each["system"],
                baselines=floors,
                upper_bound=each["ceiling"],
                better=better,
                protocol=protocol,
                test_set=test_set,
            )
        )
    about = provenance(
        "mindeye/mini",
        {"all": 0},
        [],
        test_set={"id": test_set, "images": len(ids), "pixels": pixels},
    )
    folder = home / "results" / name
    folder.mkdir(parents=True)
    add_results(folder, "06_metrics", pd.concat(tables, ignore_index=True), records, about)
    if trained is not None:
        told = {
            "recipe": "mindeye/mini",
            "decoder": "network",
            "n_components": 0,
            "split": "images",
        } | trained
        write_json(
            folder / "parameters" / "01_train_high_level.json",
            {key: {"value": value, "from": "cell"} for key, value in told.items()},
        )
    return folder


def hold_out(folder):
    out = torch.arange(len(IDS)) < 5
    save_file(
        {"held_out": out, "image_ids": torch.as_tensor(IDS)}, folder / "reconstructions.safetensors"
    )


@pytest.fixture
def home(tmp_path):
    add_run(tmp_path, "all_voxels", 0.8, trained={})
    add_run(tmp_path, "pca3", 0.5, trained={"n_components": 3})
    hold_out(add_run(tmp_path, "held-out", 0.6, trained={"split": "cluster-held-out"}))
    add_run(tmp_path, "another", 0.7, test_set="12-other", pixels="12-pixels-def")
    return tmp_path


def notebook(home, *arguments):
    environment = os.environ | {"PERCEPT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(NOTEBOOK), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@pytest.mark.slow(reason="executes notebook 07")
def test_notebook_compares_what_can_be_compared_and_names_the_rest(home):
    done = notebook(home)
    assert done.returncode == 0, done.stderr
    assert "Left out: another" in done.stdout and "different test sets" in done.stdout
    made = home / "results" / "compare"
    tidy = pd.read_csv(made / "comparison.csv")
    assert set(tidy["run"]) == {"all_voxels", "pca3", "held-out"}
    for name in set(tidy["run"]):
        for record in json.loads((home / "results" / name / "metrics.json").read_text())["metrics"]:
            mine = tidy[(tidy["run"] == name) & (tidy["metric"] == record["name"])].set_index("row")
            for row, entry in {
                "system": record,
                "mean_image": record["floors"]["mean_image"],
                "ceiling": record["ceiling"],
            }.items():
                assert mine.loc[row, ["value", "low", "high"]].tolist() == pytest.approx(
                    [entry["value"], entry["low"], entry["high"]]
                )
            assert (
                set(mine["protocol"]) == {record["protocol"]}
                and set(mine["n"]) == {12}
                and set(mine["test_set"]) == {"12-ours"}
            )
    gaps = (
        pd.read_csv(made / "differences.csv").query("run == 'pca3' and metric == 'pixcorr'").iloc[0]
    )
    expected = paired_bootstrap(scores(0.5, 0), scores(0.8, 0))
    assert (
        gaps[["value", "low", "high", "p"]].tolist() == pytest.approx(list(expected))
        and gaps["verdict"] == "worse"
    )
    assert {path.name for path in (made / "figures").iterdir()} == {
        "comparison.png",
        "bottleneck.png",
        "held_out_held-out_system.png",
    }
    effects = pd.read_csv(made / "held_out.csv")
    assert set(effects["images"]) == {"held-out clusters", "kept clusters", "effect"} and set(
        effects["plain"]
    ) == {"all_voxels"}


@pytest.mark.slow(reason="executes notebook 07")
def test_notebook_refuses_named_runs_of_other_images_and_names_commands_for_what_is_missing(home):
    refused = notebook(home, "--runs", "all_voxels,another")
    assert refused.returncode != 0
    assert re.search(
        r"error: These runs were scored on 2 different test sets.*12-ours: all_voxels; 12-other:"
        r" another",
        refused.stderr,
    )
    one = notebook(home, "--runs", "all_voxels")
    assert one.returncode == 0, one.stderr
    assert all(
        words in one.stdout
        for words in ("There is one run only", "-p n_components 30", "-p split cluster-held-out")
    )


def test_same_pictures_under_other_ids_are_paired_by_place(tmp_path):
    add_run(tmp_path, "ours", 0.8)
    add_run(tmp_path, "foreign", 0.6, test_set="12-pixels-abc", ids=np.arange(12))
    add_run(tmp_path, "other", 0.6, test_set="12-x", pixels="12-pixels-x")
    kept, alarms = compare.select_same_images(compare.read_runs(tmp_path / "results"))
    assert {run.name for run in kept} == {"ours", "foreign"} and "Left out: other" in alarms[0]
    found = compare.differences(kept, ["pixcorr"], "ours").iloc[0]
    assert found[["value", "low", "high", "p"]].tolist() == pytest.approx(
        list(paired_bootstrap(scores(0.6, 0), scores(0.8, 0)))
    )


def test_test_set_can_be_chosen_and_must_exist(home):
    runs = compare.read_runs(home / "results")
    assert [run.name for run in compare.select_same_images(runs, "12-other")[0]] == ["another"]
    with pytest.raises(PerceptError, match="No run was scored on the test set 5-no"):
        compare.select_same_images(runs, "5-no")


def test_runs_without_scores_and_unknown_names_are_refused(home):
    with pytest.raises(PerceptError, match="holds no scores.*all_voxels"):
        compare.read_runs(home / "results", "all_voxels,typo")
    with pytest.raises(PerceptError, match="no scores under"):
        compare.read_runs(home)
    kept = compare.read_runs(home / "results", "all_voxels,pca3")
    with pytest.raises(PerceptError, match="choose one of all_voxels, pca3"):
        compare.differences(kept, ["pixcorr"], "typo")
    with pytest.raises(PerceptError, match="No run has the metric 'SwAV'"):
        compare.choose_metrics(kept, "SwAV")


def test_metrics_are_those_in_common_and_the_others_are_named(tmp_path):
    add_run(tmp_path, "a", 0.8, metrics=("pixcorr", "ssim"))
    add_run(tmp_path, "b", 0.8, metrics=("pixcorr",))
    runs = compare.read_runs(tmp_path / "results")
    assert compare.choose_metrics(runs) == ["pixcorr"] and compare.choose_metrics(runs, "ssim") == [
        "ssim"
    ]
    assert compare.missing_metrics(runs, ["pixcorr"]) == [
        "Not shown, as not every run has them: ssim (b lacks 1)."
    ]
    assert compare.missing_metrics(runs, ["pixcorr", "ssim"]) == []
    table = compare.Table(runs, compare.comparison(runs, ["ssim"]), ["ssim"])
    assert "–" in repr(table) and " -- " in table.latex() + " "


def test_different_resizing_is_an_alarm(tmp_path):
    for name, resizing in (("a", "straight"), ("b", "published")):
        path = add_run(tmp_path, name, 0.8) / "metrics.json"
        content = json.loads(path.read_text())
        content["provenance"]["settings"]["resizing"] = f"{resizing}: as it is"
        path.write_text(json.dumps(content))
    runs = compare.read_runs(tmp_path / "results")
    assert (
        "resized in 2 ways" in compare.setting_differences(runs)[0]
        and "straight: a; published: b" in compare.setting_differences(runs)[0]
    )
    assert compare.setting_differences(runs[:1]) == []


def test_other_decoders_have_the_interval_of_bootstrap_mean(home):
    runs = compare.read_runs(home / "results", "all_voxels")
    told = (
        compare.comparison(runs, ["pixcorr"])
        .set_index("row")
        .loc["ridge", ["value", "low", "high"]]
    )
    assert told.tolist() == pytest.approx(list(bootstrap_mean(scores(0.75, 20))))


def test_latex_is_balanced_and_escaped_and_bold_only_where_clear(home):
    runs, _ = compare.select_same_images(compare.read_runs(home / "results"))
    metrics = ["pixcorr", "mini:EffNet-B1"]
    text = compare.Table(runs, compare.comparison(runs, metrics), metrics).latex()
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert re.findall(r"\\begin\{(\w+\*?)\}", text) == list(
        reversed(re.findall(r"\\end\{(\w+\*?)\}", text))
    )
    assert (
        r"all\_voxels" in text
        and not re.search(r"(?<!\\)[_#&]", text.replace(" & ", ""))
        and r"held-out $\dagger$" in text
    )
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows and all(line.count(" & ") + line.startswith(" & ") >= 2 for line in rows)
    bold = re.findall(r"\\textbf\{([\d.]+)\}", text)
    assert bold and bold[0] == f"{scores(0.8, 0).mean():.3f}"
    assert "mean image" in text and "ceiling" in text and "12-ours" in text


def test_nothing_is_bold_where_the_best_two_are_alike(tmp_path):
    add_run(tmp_path, "a", 0.8, rows=())
    add_run(tmp_path, "b", 0.8, rows=())
    runs = compare.read_runs(tmp_path / "results")
    assert compare.clear_best(runs, "pixcorr", {"a": ["system"], "b": ["system"]}) is None
    add_run(tmp_path, "c", 0.9, rows=())
    runs = compare.read_runs(tmp_path / "results")
    for metric in ("pixcorr", "mini:EffNet-B1"):
        assert compare.clear_best(runs, metric, dict.fromkeys("abc", ["system"])) == ("c", "system")


def test_page_escapes_names_and_shows_floors_beneath(tmp_path):
    add_run(tmp_path, "a<b", 0.8)
    runs = compare.read_runs(tmp_path / "results")
    page = compare.Table(runs, compare.comparison(runs, ["pixcorr"]), ["pixcorr"])._repr_html_()
    assert "a&lt;b" in page and "a<b" not in page and page.index("mean image") > page.index("ridge")


def test_bottleneck_takes_the_decoder_of_a_run_of_both(tmp_path):
    add_run(tmp_path, "both", 0.8, trained={"decoder": "both"})
    assert compare.curves(
        compare.read_runs(tmp_path / "results"), ["pixcorr"], "n_components"
    ).empty
    for k in (30, 3):
        add_run(tmp_path, f"ridge{k}", 0.5, trained={"decoder": "ridge", "n_components": k})
    add_run(
        tmp_path,
        "held",
        0.5,
        trained={"decoder": "ridge", "n_components": 5, "split": "cluster-held-out"},
    )
    table = compare.curves(compare.read_runs(tmp_path / "results"), ["pixcorr"], "n_components")
    system = table[table["row"] == "system"]
    assert (
        set(table["curve"]) == {"mindeye/mini, ridge"}
        and system["n_components"].tolist() == [3, 30, 0]
        and system["run"].tolist()[-1] == "both"
    )
    assert system["value"].iloc[-1] == pytest.approx(
        scores(0.75, 20).mean()
    )  # the row ridge of that run
    assert {"mean_image", "ceiling"} <= set(table["row"])
    add_run(tmp_path, "ridge100", 0.75, trained={"decoder": "ridge", "n_components": 100})
    runs = compare.read_runs(tmp_path / "results")
    table = compare.curves(runs, ["pixcorr"], "n_components")
    assert compare.smallest_sufficient(table, runs).iloc[0].tolist() == [
        "mindeye/mini, ridge",
        "pixcorr",
        "100 components",
    ]
    assert (
        compare.smallest_sufficient(
            table[~((table["n_components"] == 100) & (table["row"] == "system"))], runs
        ).iloc[0, 2]
        == "more than 30"
    )
    assert compare.smallest_sufficient(table[table["n_components"] > 0], runs).empty


def test_held_out_effect_is_the_difference_of_changes_and_negative_for_a_loss():
    rng, n = np.random.default_rng(0), 400
    ids = rng.permutation(n)
    held_out = pd.Series(np.arange(n) < 100, index=np.arange(n))
    plain = pd.Series(rng.normal(0.5, 0.2, n), index=np.arange(n))
    loss = np.where(held_out, 0.3, 0.1) + rng.normal(0, 0.05, n)
    for better, sign in (("higher", -1), ("lower", 1)):
        without = (plain + sign * loss).loc[ids]
        table = compare.held_out_effect(
            {"m": without}, {"m": plain}, held_out, {"m": better}
        ).set_index("images")
        assert table.loc["held-out clusters", "value"] == pytest.approx(-loss[:100].mean())
        assert table.loc["effect", "value"] == pytest.approx(-loss[:100].mean() + loss[100:].mean())
        width = 1.96 * np.sqrt(loss[:100].var() / 100 + loss[100:].var() / 300)
        assert table.loc["effect", "high"] - table.loc["effect", "value"] == pytest.approx(
            width, rel=0.15
        )
        assert table["n"].tolist() == [100, 300, 400]
    with pytest.raises(PerceptError, match="all or none"):
        compare.held_out_effect({"m": plain}, {"m": plain}, held_out | True, {"m": "higher"})


def test_recipe_is_run_again_when_there_are_new_scores(home, monkeypatch):
    monkeypatch.setattr(utils, "HOME", home)
    values = recipes.read_stage_parameters("07_compare", "compare", {"model_name": "compare"})
    assert recipes.name_run("compare", ["07_compare"], {}) == "compare" and "runs" in values
    before = stages.fingerprint_stage("07_compare", values, "")
    assert before == stages.fingerprint_stage("07_compare", values, "")
    add_run(home, "new", 0.9)
    assert before != stages.fingerprint_stage("07_compare", values, "")


def grow(home, sessions=(1, 2, 5, 10, 0)):
    """Runs of two systems over sessions: mindeye with its ridge, mindeye2_small with and without
    pretraining.
    """
    for k in sessions:
        level = 0.3 + 0.06 * (min(k, 12) or 12) ** 0.8
        of = {"num_sessions": k}
        add_run(home, f"mindeye{k}", level, trained=of | {"decoder": "both"})
        small = of | {"recipe": "small/mini", "multisubject_ckpt": "", "model_name": f"small{k}"}
        add_run(home, f"sweep/small{k}", level - 0.02, trained=small)
        pretrained = small | {
            "recipe": "finetune/mini",
            "multisubject_ckpt": "others",
            "model_name": f"pretrained{k}",
        }
        add_run(home, f"sweep/pretrained{k}", level + 0.05 / (k or 12), trained=pretrained)


def test_curves_over_sessions_hold_systems_ridge_and_pretraining_apart(tmp_path):
    grow(tmp_path)
    add_run(tmp_path, "pca", 0.5, trained={"n_components": 3, "num_sessions": 4})
    add_run(
        tmp_path,
        "others",
        0.5,
        trained={"multi_subject": True, "num_sessions": 0, "recipe": "small/mini"},
    )
    runs = compare.read_runs(tmp_path / "results", "mindeye*, sweep/*,pca,others")
    assert len(runs) == 17 and "sweep/small1" in {run.name for run in runs}
    table = compare.curves(runs, ["pixcorr"], "num_sessions")
    system = table[table["row"] == "system"]
    expected = {f"mindeye/mini, {d}" for d in ("network", "ridge")} | {
        "small/mini, network",
        "finetune/mini, pretrained network",
    }
    assert set(system["curve"]) == expected
    for curve, part in system.groupby("curve"):
        assert (
            part["num_sessions"].tolist() == [1, 2, 5, 10, 0]
            and part["value"].is_monotonic_increasing
        ), curve
    at = system.set_index(["curve", "num_sessions"])["run"]
    assert (
        at["finetune/mini, pretrained network", 5] == "sweep/pretrained5"
        and at["mindeye/mini, ridge", 0] == "mindeye0"
    )
    floors = table[(table["row"] == "mean_image") & (table["curve"] == "mindeye/mini, network")]
    assert floors["num_sessions"].tolist() == [1, 2, 5, 10, 0]
    assert compare.curves(
        runs, ["pixcorr"], "n_components"
    ).empty  # that one has fewer sessions, too


def test_pretraining_is_held_against_the_run_that_is_alike(tmp_path):
    grow(tmp_path, (1, 2))
    add_run(
        tmp_path,
        "wider",
        0.9,
        trained={
            "multisubject_ckpt": "others",
            "hidden_dim": 9,
            "recipe": "small/mini",
            "num_sessions": 1,
        },
    )
    runs = compare.read_runs(tmp_path / "results", "sweep/*,wider")
    table = compare.pretraining_gain(runs, ["pixcorr", "mini:EffNet-B1"])
    assert table[["run", "plain", "num_sessions"]].drop_duplicates().values.tolist() == [
        [f"sweep/pretrained{k}", f"sweep/small{k}", k] for k in (1, 2)
    ]
    by_name = {run.name: run for run in runs}
    first = table.iloc[0]
    mine, other = (
        by_name[name].values("pixcorr").sort_index().to_numpy()
        for name in ("sweep/pretrained1", "sweep/small1")
    )
    assert (
        first[["value", "low", "high", "p"]].tolist()
        == pytest.approx(list(paired_bootstrap(mine, other)))
        and first["verdict"] == "better"
    )
    assert table.set_index("metric").loc["mini:EffNet-B1", "value"].lt(0).all() and set(
        table["verdict"]
    ) <= {"better", "undecided"}
    assert compare.pretraining_gain(runs[:1], ["pixcorr"]).empty


@pytest.mark.slow(reason="executes notebook 07")
def test_notebook_shows_sessions_and_pretraining(tmp_path):
    grow(tmp_path)
    done = notebook(tmp_path, "--runs", "mindeye*,sweep/*")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "results" / "compare"
    assert (made / "figures" / "sessions.png").exists() and len(
        pd.read_csv(made / "sessions.csv").query("row == 'system'")
    ) == 4 * 5 * 2
    assert pd.read_csv(made / "pretraining.csv")["num_sessions"].tolist() == [
        1,
        1,
        2,
        2,
        5,
        5,
        10,
        10,
        0,
        0,
    ]


def test_runs_of_a_sweep_are_named_with_it(tmp_path):
    grow(tmp_path, (1,))
    found = compare.read_runs(tmp_path / "results", "sweep/small1, mindeye1,sweep/small1")
    assert [run.name for run in found] == ["sweep/small1", "mindeye1"]
    assert [run.name for run in compare.read_runs(tmp_path / "results")] == ["mindeye1"]
    for name in ("sweep/none*", "/sweep/none"):
        with pytest.raises(PerceptError, match="holds no scores"):
            compare.read_runs(tmp_path / "results", name)
