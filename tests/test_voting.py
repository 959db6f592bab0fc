"""src.voting: what voters are trained with, which voxels they are given, rules that do not look at
the truth, and what a vote is worth.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch.optim import AdamW

from src import figures, models
from src.data.images import write_images
from src.data.layout import write_subject
from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.decoding import voting
from src.decoding.generate import repaint_images
from src.decoding.voting import (
    VOTES,
    SelectionInputs,
    Voter,
    find_voters,
    oracle,
    parse_voters,
    vote,
)
from src.evaluation import votes
from src.networks.rebuild import build_decoder
from src.training.optim import SCHEDULERS
from src.utils import PerceptError, save_checkpoint, write_json

V = 12
FLAGS = {"V1": range(0, 4), "V2": range(4, 7), "FFA": range(8, 10)}


# --------------------------------------------------------------------------- the published figures
def test_the_published_network():
    with torch.device("meta"):
        model = models.Voxel2StableDiffusionModel(39_548, h=2048, dropout=0.3)
        counts = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("all", model), ("upsampler", model.upsampler))
        }
        assert model(torch.zeros(2, 39_548)).shape == (2, 4, 64, 64)
    assert (
        counts == {"all": 138_188_228, "upsampler": 6_841_668}
        and counts["all"] - counts["upsampler"] == 131_346_560
    )
    assert {m.p for m in model.mlp.modules() if isinstance(m, torch.nn.Dropout)} == {
        0.3
    } and model.lin0[-1].p == 0.5


@pytest.mark.parametrize(
    ("batch", "epochs", "total", "walked", "last"),
    [(64, 50, 3900, 2750, 1.0765e-4), (16, 200, 62_400, 43_800, 1.0376e-4)],
)
def test_the_published_cycle_is_not_walked_to_its_end(batch, epochs, total, walked, last):
    images, trained = 5000, 3500
    assert epochs * (images // batch) == total and epochs * -(-trained // batch) == walked
    optimizer = AdamW(
        [torch.nn.Parameter(torch.zeros(1))], lr=1e-4
    )  # inert: the cycle sets its own
    schedule, rates = SCHEDULERS["cycle"](optimizer, 5e-4, epochs, walked // epochs, 0, total), []
    for _ in range(walked):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (
        rates[0] == pytest.approx(2e-5)
        and max(rates) == pytest.approx(5e-4)
        and rates[-1] == pytest.approx(last, rel=1e-4)
    )
    assert np.argmax(rates) == pytest.approx(2 * (images // batch), abs=1)


def test_the_published_share_of_steps_is_run():
    class Pipeline:
        unet = torch.nn.Module()

        def __call__(self, **asked):
            self.asked = asked
            return type("Out", (), {"images": asked["image"] + 1})()

    pipeline, pictures = Pipeline(), torch.rand(3, 3, 4, 4)
    assert int(50 * 0.75) == 37
    outputs = repaint_images(
        pipeline,
        ["a", "b", "c"],
        pictures,
        np.array([7, 8, 9]),
        batch_size=2,
        guidance_scale=6.0,
        num_inference_steps=50,
    )
    assert (
        pipeline.asked["strength"] == 0.75
        and pipeline.asked["prompt"] == ["c"]
        and torch.equal(outputs, torch.ones(3, 3, 4, 4))
    )
    torch.testing.assert_close(
        repaint_images(
            pipeline, ["a"] * 3, pictures, np.arange(3), strength=0.0, num_inference_steps=50
        ),
        pictures,
    )


# ------------------------------------------------------------------------------------------ voters
def test_voters_are_read_from_parameters():
    published = parse_voters("92,94,97,100", "set3;set1;set3;set3", "3,2423,849,1921", "16,16,32,4")
    assert published[1] == Voter("94", "set1", 2423, 16) and [v.batch_size for v in published] == [
        16,
        16,
        32,
        4,
    ]
    assert parse_voters("a, b", "V1,V2", "", "8", seed=5) == [
        Voter("a", "V1,V2", 5, 8),
        Voter("b", "V1,V2", 6, 8),
    ]
    for names, rois, seeds, sizes, message in (
        ("a,a", "-", "", "8", "different ones"),
        ("", "-", "", "8", "different ones"),
        ("../x", "-", "", "8", "different ones"),
        ("a,b,c", "V1;V2", "", "8", "rois has 2 entries for 3 voters"),
        ("a", "-", "x", "8", "bag_seeds is 'x'"),
        ("a,b", "-", "", "8,-1", "batch_sizes is"),
    ):
        with pytest.raises(PerceptError, match=message):
            parse_voters(names, rois, seeds, sizes)


@pytest.fixture
def trained(tmp_path):
    """A subject with regions, and train_logs/run/ with two voters of one linear layer."""
    rng = np.random.default_rng(0)
    trials = pd.DataFrame(
        {
            "trial": np.arange(40),
            "image": np.arange(40) % 20,
            "session": 0,
            "run": 0,
            "repeat": np.arange(40) // 20,
        }
    )
    trials["split"] = np.select(
        [trials["image"] >= 17, trials["image"] >= 14], ["test", "val"], "train"
    )
    table = pd.DataFrame(
        {name: np.isin(np.arange(V), list(columns)) for name, columns in FLAGS.items()}
    )
    attributes = {"source": "test", "units": "a.u.", "normalisation": "none", "protocol": "toy"}
    write_images(
        tmp_path / "toy" / "images.h5",
        rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8),
        np.arange(20),
    )
    write_subject(
        tmp_path / "toy" / "subj01",
        rng.standard_normal((40, V)).astype(np.float32),
        trials,
        table,
        attributes,
    )
    subject, logs = open_subject(tmp_path / "toy", 1), tmp_path / "train_logs" / "run"
    for place, (name, rois) in enumerate({"late": "FFA", "early": "V1,V2"}.items()):
        bagged = subject.bootstrap_split(0.7, seed=place)
        normaliser = Normaliser.fit(bagged, rois=rois)
        (logs / name / "low_level").mkdir(parents=True)
        normaliser.save(logs / name / "normaliser.safetensors")
        config = {
            "name": "RidgeBaseline",
            "kwargs": {"in_dim": normaliser.n_features, "target_shape": [4, 2, 2]},
        }
        save_checkpoint(
            logs / name / "low_level" / "best.safetensors",
            build_decoder(config).state_dict(),
            {"model": config, "training": {"rois": rois}},
        )
        write_json(logs / name / "voter.json", {"place": place})
    return subject, logs


def test_voters_are_found_by_place_or_by_name(trained):
    _, logs = trained
    assert list(find_voters(logs)) == ["late", "early"]
    assert find_voters(logs.parent / "other", "run/early") == {"run-early": logs / "early"}
    with pytest.raises(PerceptError, match="The voter .*absent is not there"):
        find_voters(logs, "run/early,absent")
    with pytest.raises(PerceptError, match="no voters under"):
        find_voters(logs.parent / "nothing")


def test_a_voter_is_given_the_voxels_that_it_was_trained_on(trained):
    subject, logs = trained
    _, _, normaliser = voting.open_voter(logs / "early", subject, "low_level/best.safetensors")
    assert normaliser.columns.tolist() == [*FLAGS["V1"], *FLAGS["V2"]] and normaliser.rois == (
        "V1",
        "V2",
    )


def test_a_wrongly_indexed_set_of_regions_is_refused(trained):
    """The published inference took its set of regions from a list in another order than the
    training: here the voxels are part of what is checked.
    """
    subject, logs = trained
    for name, other in (("early", "late"), ("late", "early")):
        folder = logs / f"{name}_with_{other}"
        (folder / "low_level").mkdir(parents=True)
        (folder / "low_level" / "best.safetensors").write_bytes(
            (logs / name / "low_level" / "best.safetensors").read_bytes()
        )
        (folder / "normaliser.safetensors").write_bytes(
            (logs / other / "normaliser.safetensors").read_bytes()
        )
        with pytest.raises(
            PerceptError,
            match=(
                f"trained on the regions '{'V1,V2' if name == 'early' else 'FFA'}', which are other"
                " voxels"
            ),
        ):
            voting.open_voter(folder, subject, "low_level/best.safetensors")
    stored = load_file(logs / "early" / "normaliser.safetensors")  # and one voxel too far
    stored["columns"] = stored["columns"] + 1
    save_file(
        stored,
        logs / "early" / "normaliser.safetensors",
        metadata={"rois": "V1,V2", "n_voxels": str(V)},
    )
    with pytest.raises(PerceptError, match="other voxels"):
        voting.open_voter(logs / "early", subject, "low_level/best.safetensors")


# ------------------------------------------------------------------------------------------- rules
def ballots(images=6, voters=4, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return SelectionInputs(
        draw(images, voters, dim),
        draw(images, voters, dim),
        draw(images, voters, 7),
        draw(images, 7),
    )


def by_hand(rule, ballot, i):
    """The choice for image i, written out."""
    cosine = lambda a, b: float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))  # noqa: E731
    c, low, tokens, brain = (
        x[i].double().numpy()
        for x in (ballot.candidates, ballot.low_level, ballot.tokens, ballot.brain)
    )
    scores = {
        "published": lambda k: cosine(c[k], low[k]),
        "medoid": lambda k: np.mean([cosine(c[k], c[j]) for j in range(len(c)) if j != k]),
        "agreement": lambda k: cosine(tokens[k], brain),
    }[rule]
    return int(np.argmax([scores(k) for k in range(len(c))]))


@pytest.mark.parametrize("rule", VOTES)
def test_rules_against_the_formula(rule):
    ballot = ballots()
    assert vote(rule, ballot).tolist() == [by_hand(rule, ballot, i) for i in range(6)]


@pytest.mark.parametrize("rule", VOTES)
def test_rules_follow_the_voters_and_ignore_broken_pictures(rule):
    ballot, order = ballots(), torch.tensor([2, 0, 3, 1])
    rotated = SelectionInputs(
        ballot.candidates[:, order],
        ballot.low_level[:, order],
        ballot.tokens[:, order],
        ballot.brain,
    )
    assert torch.equal(order[vote(rule, rotated)], vote(rule, ballot))
    broken = SelectionInputs(
        *(x.clone() for x in (ballot.candidates, ballot.low_level, ballot.tokens, ballot.brain))
    )
    chosen = vote(rule, ballot)
    for x in (broken.candidates, broken.tokens):
        x[torch.arange(6), chosen] = float("nan")
    assert (vote(rule, broken) != chosen).all()


def test_the_published_rule_favours_the_unchanged_and_the_oracle_does_not():
    ballot = ballots()
    lazy = SelectionInputs(
        torch.cat([ballot.candidates[:, :3], ballot.low_level[:, 3:]], 1),
        ballot.low_level,
        ballot.tokens,
        ballot.brain,
    )
    assert (
        vote("published", lazy).tolist() == [3] * 6
    )  # the fourth voter's generator did nothing at all
    seen = ballot.candidates[:, 1] + 0.01 * torch.randn(6, 5)
    assert oracle(ballot.candidates, seen).tolist() == [1] * 6


def test_rules_that_cannot_be():
    with pytest.raises(
        PerceptError, match="no rule 'best': choose one of published, medoid, agreement"
    ):
        vote("best", ballots())
    inputs = ballots()
    with pytest.raises(PerceptError, match="needs tokens predicted from the brain"):
        vote("agreement", SelectionInputs(inputs.candidates, inputs.low_level))


# -------------------------------------------------------------------------------- what it is worth
def test_worth_is_told_by_paired_differences():
    rng = np.random.default_rng(0)
    voters = ["voter_a", "voter_b"]
    hard = rng.standard_normal(200)  # what makes an image hard for all of them
    each = {(row, "up"): hard + rng.standard_normal(200) * 0.1 for row in voters}
    each |= {
        ("system", "up"): np.maximum(each["voter_a", "up"], each["voter_b", "up"]),
        ("latent_mean", "up"): hard - 1,
    }
    each |= {(row, "down"): -values for (row, _), values in list(each.items())}
    up, down = votes.ensemble_gain(each, {"up": "higher", "down": "lower"}, voters, "voter_a")
    assert up["gain"].low > 0 and up["share"] == pytest.approx(1.0) and up["mean_gain"].high < -0.9
    assert up["gain"].value == pytest.approx(
        (each["system", "up"] - (each["voter_a", "up"] + each["voter_b", "up"]) / 2).mean()
    )
    for key in ("gain", "over_best", "mean_gain"):
        assert down[key] == up[key]  # better is positive, whichever way the metric goes
    assert down["vote"].value == pytest.approx(-up["vote"].value) and up["oracle"] == up["vote"]
    text = votes.describe_ensemble_gain([up, down])
    assert (
        "better than its average voter in 2 of 2 scores and worse in 0" in text
        and "better than the vote in 0 of 2 scores and worse in 2" in text
        and "100%" in text
    )
    rows = votes.gain_table([up, down])
    assert (
        rows[0]["metric"] == "up"
        and rows[0]["latent mean - vote"].startswith("-1.0")
        and set(rows[0]) == set(rows[1])
    )


def test_worth_without_difference_claims_nothing():
    values = np.random.default_rng(1).standard_normal(50)
    each = {(row, "m"): values for row in ("system", "voter_a", "voter_b")}
    row = votes.ensemble_gain(each, {"m": "higher"}, ["voter_a", "voter_b"])[0]
    assert row["gain"].value == 0 and row["share"] is None and "mean_gain" not in row
    assert votes.describe_ensemble_gain([row]).endswith(
        "better than its average voter in 0 of 1 scores and worse in 0."
    )


def test_the_sheet_is_as_published():
    picture = torch.rand(3, 512, 512)
    sheet = figures.draw_vote_sheet(
        picture, picture * 0, torch.stack([picture, picture, picture * 0, picture])
    )
    assert sheet.shape == (552, 3272, 3) and sheet.dtype == np.uint8
    assert (
        (sheet[:20] == 255).all()
        and (sheet[:, :20] == 255).all()
        and not sheet[20:-20, 552:1064].any()
        and (sheet[:, 1064:1144] == 255).all()
    )
    np.testing.assert_allclose(
        sheet[20:-20, 1144 : 1144 + 512] / 255, picture.permute(1, 2, 0), atol=0.01
    )


def test_the_matrix_of_regions_shows_shares(tmp_path):
    table = pd.DataFrame(
        {name: np.isin(np.arange(V), list(columns)) for name, columns in FLAGS.items()}
    )
    figure = figures.plot_roi_sets(table, {"all": None, "half of V1": np.array([0, 1])})
    recorded = [text.get_text() for text in figure.axes[0].texts]
    assert recorded == ["100%"] * 4 + ["17%", "50%", "0%", "0%"]


def test_cosine_is_of_the_last_axis():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(
        voting.compare_embeddings(a, b), (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
    )
    assert Path(voting.__file__).name == "voting.py"
