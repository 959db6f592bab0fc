"""Caption metrics: the libraries' numbers against the formulas of the papers, what identical and
shuffled captions score, the mini twin, and the tables.
"""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from src import miniworld
from src.evaluation import captions, tables
from src.evaluation.captions import (
    CAPTION_METRICS,
    SentenceEncoder,
    embed_each_text,
    prepare_caption_metrics,
    wordnet,
)
from src.evaluation.records import add_results, make_record, make_records, provenance, score_table
from src.evaluation.statistics import derangements
from src.utils import ROOT, PerceptError, read_json

SEED = 41  # no training and no demo draws with it
BY_WORDS = [
    name for name, metric in CAPTION_METRICS.items() if not metric.network and name != "METEOR"
]
needs_wordnet = pytest.mark.skipif(
    captions.find_wordnet_folder() is None,
    reason="WordNet is not installed (apt-get install wordnet-base)",
)
PAIRS = [
    (
        "a red ball in a forest at night",
        ["a red ball in the forest", "there is a small red ball on the grass of a forest"],
    ),
    (
        "the cat sat on the mat the cat sat",
        ["on the mat sat the cat", "a cat is sitting on its mat"],
    ),
    ("two dogs run", ["three dogs are running along the beach", "two dogs run and play"]),
    ("a city scene with a blue car", ["a blue car", "blue car parked in the city"]),
]
SAID, WANTED = [said for said, _ in PAIRS], [wanted for _, wanted in PAIRS]


@pytest.fixture(scope="module")
def written():
    """Captions (120, 5) of test images of the mini world."""
    return [miniworld.write_captions(miniworld.compose_image(SEED, i, "test")) for i in range(120)]


@pytest.fixture(scope="module")
def ready():
    """Every metric that can be computed here, with the mini networks."""
    return prepare_caption_metrics(",".join(CAPTION_METRICS), "mini")[0]


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


# ---------------------------------------------------------------------------- the papers' formulas
def subsequence(a, b):
    longest = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1, j + 1] = (
                longest[i, j] + 1 if x == y else max(longest[i, j + 1], longest[i + 1, j])
            )
    return longest[-1, -1]


def f1(shared, said, wanted):
    return 2 * shared / (said + wanted) if shared else 0.0


@pytest.mark.parametrize(("name", "n"), [("ROUGE-1", 1), ("ROUGE-2", 2)])
def test_rouge_is_the_f1_of_shared_words(name, n):
    expected = [
        max(
            f1((grams(s, n) & grams(w, n)).total(), grams(s, n).total(), grams(w, n).total())
            for w in wanted
        )
        for s, wanted in PAIRS
    ]
    np.testing.assert_allclose(CAPTION_METRICS[name].score(WANTED, SAID), expected, atol=1e-12)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    expected = [
        max(f1(subsequence(s.split(), w.split()), len(s.split()), len(w.split())) for w in wanted)
        for s, wanted in PAIRS
    ]
    np.testing.assert_allclose(CAPTION_METRICS["ROUGE-L"].score(WANTED, SAID), expected, atol=1e-12)


def bleu(pairs, n, smoothed):
    """BLEU over some (caption, references): product of clipped precisions, each of the same weight,
    times the brevity penalty.
    """
    shared, made = np.zeros(n), np.zeros(n)
    length = wanted_length = 0
    for said, wanted in pairs:
        size = len(said.split())
        length += size
        wanted_length += min((abs(len(w.split()) - size), len(w.split())) for w in wanted)[1]
        for k in range(n):
            most = Counter()
            for w in wanted:
                most |= grams(w, k + 1)
            shared[k] += (grams(said, k + 1) & most).total()
            made[k] += grams(said, k + 1).total()
    if smoothed:
        shared[1:], made[1:] = shared[1:] + 1, np.maximum(made[1:], 1) + 1
    if not shared.all():
        return 0.0
    return float(
        min(1.0, math.exp(1 - wanted_length / length)) * np.exp(np.log(shared / made).mean())
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_is_papinenis_with_one_added_from_pairs_on(n):
    np.testing.assert_allclose(
        CAPTION_METRICS[f"BLEU-{n}"].score(WANTED, SAID),
        [bleu([pair], n, True) for pair in PAIRS],
        atol=1e-12,
    )
    assert captions.corpus_bleu(WANTED, SAID)[f"BLEU-{n}"] == pytest.approx(
        bleu(PAIRS, n, False), abs=1e-8
    )


def test_corpus_bleu_is_that_of_another_library(written):
    from nltk.translate.bleu_score import corpus_bleu

    wanted, said = (
        [[five[0], five[4]] for five in written],
        [five[3] for five in written],
    )  # of more than four words all, on which the libraries agree
    for n, ours in enumerate(captions.corpus_bleu(wanted, said).values(), 1):
        assert ours == pytest.approx(
            corpus_bleu(
                [[w.split() for w in some] for some in wanted],
                [s.split() for s in said],
                (1 / n,) * n,
            ),
            rel=1e-6,
        )


def cider_d(wanted, said):
    """CIDEr-D by the formulas of Vedantam et al. 2015: clipped cosine of tf-idf vectors, a Gaussian
    of the difference in length, mean over 1 to 4 words, times 10.
    """
    scores = np.zeros((len(said), 4))
    for n in range(1, 5):
        known = Counter(
            gram for some in wanted for gram in set().union(*(grams(w, n) for w in some))
        )

        def weigh(text, n=n, known=known):
            return {
                g: c * (math.log(len(said)) - math.log(max(1, known[g])))
                for g, c in grams(text, n).items()
            }

        norm = lambda v: math.sqrt(sum(x * x for x in v.values()))  # noqa: E731
        for i, (text, some) in enumerate(zip(said, wanted, strict=True)):
            mine = weigh(text)
            for w in some:
                theirs = weigh(w)
                product = sum(
                    min(x, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, x in mine.items()
                )
                apart = len(text.split()) - len(w.split())
                if norm(mine) and norm(theirs):
                    scores[i, n - 1] += (
                        math.exp(-(apart**2) / 72) * product / norm(mine) / norm(theirs) / len(some)
                    )
    return 10 * scores.mean(1)


def test_cider_is_the_papers_cider_d(written):
    wanted, said = [five[:3] for five in written[:40]], [five[4] for five in written[1:41]]
    np.testing.assert_allclose(
        CAPTION_METRICS["CIDEr"].score(wanted, said), cider_d(wanted, said), atol=1e-9
    )
    np.testing.assert_allclose(
        CAPTION_METRICS["CIDEr"].score(WANTED, SAID), cider_d(WANTED, SAID), atol=1e-9
    )
    with pytest.raises(PerceptError, match="at least two images"):
        CAPTION_METRICS["CIDEr"].score(WANTED[:1], SAID[:1])


@needs_wordnet
@pytest.mark.parametrize(
    ("said", "wanted", "shared", "chunks"),
    [
        ("a red ball lies here", "a red ball", 3, 1),
        ("the mat under a cat", "a cat under the mat", 5, 3),
        ("balls in trees", "ball in tree", 3, 1),
        ("an auto at night", "a car at night", 3, 1),
        ("one two", "three four", 0, 0),
    ],
)
def test_meteor_is_banerjees_and_lavies(said, wanted, shared, chunks):
    """Words in common (also by stem: balls and ball; and by synonym: auto and car), recall nine
    times as heavy, and a penalty for words in pieces.
    """
    precision, recall = shared / len(said.split()), shared / len(wanted.split())
    expected = (
        10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / shared) ** 3)
        if shared
        else 0.0
    )
    assert CAPTION_METRICS["METEOR"].score([wanted], [said])[0] == pytest.approx(expected)


@needs_wordnet
def test_meteor_takes_the_reference_that_fits_best(written):
    one = np.stack(
        [
            CAPTION_METRICS["METEOR"].score(
                [five[k] for five in written], [five[3] for five in written]
            )
            for k in (0, 2)
        ]
    )
    both = CAPTION_METRICS["METEOR"].score(
        [[five[0], five[2]] for five in written], [five[3] for five in written]
    )
    np.testing.assert_allclose(both, one.max(0))


@needs_wordnet
def test_wordnet_is_found_where_it_is_said_to_be(monkeypatch, tmp_path):
    found = captions.find_wordnet_folder()
    (tmp_path / "elsewhere").symlink_to(found)
    monkeypatch.setenv("PERCEPT_WORDNET", str(tmp_path / "elsewhere"))
    assert captions.find_wordnet_folder() == tmp_path / "elsewhere"
    names = {
        lemma.name()
        for synset in captions.load_wordnet().synsets("car")
        for lemma in synset.lemmas()
    }
    assert {"auto", "automobile"} <= names


def test_without_wordnet_meteor_is_left_out_and_nothing_takes_its_place(monkeypatch, tmp_path):
    import nltk

    monkeypatch.delenv("PERCEPT_WORDNET", raising=False)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(wordnet, "DEBIAN_FOLDER", tmp_path / "nowhere")
    made, missing, _ = prepare_caption_metrics("METEOR,ROUGE-1", "mini")
    assert [m.name for m in made] == ["ROUGE-1"] and "apt-get install wordnet-base" in missing[
        "METEOR"
    ]
    with pytest.raises(PerceptError, match="METEOR needs WordNet"):
        CAPTION_METRICS["METEOR"].score(WANTED, SAID)
    monkeypatch.setenv("PERCEPT_WORDNET", str(tmp_path))
    with pytest.raises(PerceptError, match="holds no WordNet"):
        captions.find_wordnet_folder()


def test_words():
    assert captions.tokenize_words("A man's dog. It barks, twice!") == [
        "A",
        "man",
        "'s",
        "dog",
        ".",
        "It",
        "barks",
        ",",
        "twice",
        "!",
    ]
    assert captions.tokenize_lowercase("A man's dog. It barks, twice!") == [
        "a",
        "man",
        "'s",
        "dog",
        "it",
        "barks",
        "twice",
    ]
    assert captions.tokenize_lowercase("") == []


# ----------------------------------------------------------------------------- what all of them do
def test_every_metric_is_there(ready):
    expected = {*BY_WORDS, "mini:Sentence", "mini:CLIP-L text"} | (
        {"METEOR"} if captions.find_wordnet_folder() else set()
    )
    assert {m.name for m in ready} == expected and all(
        m.better == "higher" and m.description and m.source for m in ready
    )


def test_identical_captions_score_the_most_and_shuffled_ones_less(ready, written):
    wanted, said = [five[0] for five in written], [five[3] for five in written]
    order = next(derangements(len(said), 1, 0))
    for metric in ready:
        own, same = metric.score(wanted, said), metric.score(wanted, wanted)
        shuffled = metric.compare(metric.prepare(wanted), metric.prepare(said), pairing=order)
        np.testing.assert_allclose(
            shuffled, metric.score([wanted[i] for i in order], said), atol=1e-6
        )
        most = 10.0 if metric.name == "CIDEr" else 1.0
        np.testing.assert_allclose(
            same, most, atol=0.01 if metric.name == "METEOR" else 1e-6
        )  # METEOR's penalty for one piece is small, not 0
        assert (
            own.shape == (len(said),) and shuffled.mean() < 0.75 * own.mean() < own.mean() < most
        ), metric.name
        assert metric.score(wanted, [""] * len(said)).mean() < shuffled.mean() + 0.1, (
            metric.name
        )  # an empty caption is no error, and worth nothing


def test_several_references_are_at_least_as_kind_as_one(ready, written):
    said = [five[3] for five in written]
    for metric in ready:
        one = metric.score([five[0] for five in written], said)
        several = metric.score([[five[0], five[1]] for five in written], said)
        assert (several >= one - 1e-6).all() or metric.name.startswith(("BLEU", "CIDEr")), (
            metric.name
        )
        assert several.mean() > one.mean(), metric.name


@pytest.mark.parametrize(
    "name",
    [name for name in CAPTION_METRICS if not CAPTION_METRICS[name].network and name != "METEOR"],
)
def test_what_does_not_pair_up_is_refused(name):
    metric = CAPTION_METRICS[name]
    bare = [[], *WANTED[1:]]
    for wanted, said, words in (
        (WANTED[:3], SAID, "4 captions were given for 3"),
        (bare, SAID, "captions of image 0"),
        (WANTED, WANTED, "2 captions to be scored"),
    ):
        with pytest.raises(PerceptError, match=words):
            metric.score(wanted, said)
    with pytest.raises(PerceptError, match="pairing of 2"):
        metric.compare(WANTED, captions.to_text_lists(SAID), pairing=[0, 1])


def test_a_metric_without_its_network_says_so_and_names_are_checked():
    with pytest.raises(PerceptError, match="CLIP ViT-B/32, which it was not given"):
        CAPTION_METRICS["CLIP-B text"].score(SAID, SAID)
    with pytest.raises(PerceptError, match="caption_metrics names SPICE"):
        prepare_caption_metrics("SPICE", "mini")
    assert "one CLIP" in prepare_caption_metrics("CLIP-B text", "mini")[1]["CLIP-B text"]
    with pytest.raises(PerceptError, match="no sentence embeddings at"):
        SentenceEncoder("nowhere")


def test_cosines_take_the_nearest_reference_and_look_at_each_sentence_once():
    vectors, asked = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 3.0]}, []

    def embed(texts):
        asked.extend(texts)
        return np.array([vectors[text] for text in texts])

    metric = CAPTION_METRICS["Sentence"].through(embed_each_text(embed), "mini:")
    half = math.sqrt(0.5)
    np.testing.assert_allclose(
        metric.score([["a", "b"], "b", "a"], ["c", "a", "a"]), [half, 0, 1], atol=1e-12
    )
    assert metric.name == "mini:Sentence" and sorted(asked) == [
        "a",
        "a",
        "b",
        "c",
    ]  # once among the references, once among the captions


# ---------------------------------------------------------------------------------------- the twin
def test_the_twin_is_read_by_the_library_and_tells_contents_apart(written):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceEncoder("mini")
    theirs = SentenceTransformer(
        encoder.location, local_files_only=True, model_kwargs={"dtype": torch.float32}
    ).encode(SAID, show_progress_bar=False)
    np.testing.assert_allclose(encoder.embed(SAID), theirs, atol=1e-6)
    assert (
        encoder.fingerprint()["model"] == "mini:sentence"
        and encoder.fingerprint() == SentenceEncoder("mini").fingerprint()
    )
    metric = CAPTION_METRICS["Sentence"].through(embed_each_text(encoder.embed))
    said = [
        "there is a red ball in the middle of the picture in a forest",
        "a blue ball in a forest",
        "a blue car in the city",
    ]
    near, far, farther = metric.score(["a red ball in a forest"] * 3, said)
    assert near > 0.9 > far > farther + 0.2
    what = [miniworld.compose_image(SEED, i, "test") for i in range(len(written))]
    labels = np.array([[w.scene, w.objects[-1].category, w.objects[-1].colour] for w in what])
    first, second = (
        np.stack([row[0] for row in embed_each_text(encoder.embed)([five[k] for five in written])])
        for k in (0, 4)
    )
    cosine, shared = first @ second.T, (labels[:, None] == labels).sum(-1)
    assert np.corrcoef(cosine.ravel(), shared.ravel())[0, 1] > 0.85
    by_shared = [cosine[shared == k].mean() for k in range(4)]
    assert by_shared == sorted(by_shared) and by_shared[3] > 0.9, by_shared


# -------------------------------------------------------------------------------- a run's captions
@pytest.fixture
def stored(tmp_path, written):
    """captions_brain.parquet as notebook 04 writes it: from the brain half of the captions are
    those of the next image.
    """
    n = len(written)
    brain = [written[i if i % 2 else (i + 1) % n][4] for i in range(n)]
    table = pd.DataFrame(
        {
            "image": 100 + np.arange(n),
            "brain": brain,
            "ceiling": [five[2] for five in written],
            "git_image": [five[1] for five in written],
            "reference": [five[0] for five in written],
            "references": [json.dumps(five) for five in written],
        }
    )
    table.sample(frac=1, random_state=0).to_parquet(tmp_path / "captions_brain.parquet")
    return tmp_path / "captions_brain.parquet"


def test_captions_are_read_in_the_order_of_the_test_images(stored, written):
    ids = 100 + np.arange(len(written))
    table = captions.read_captions(stored, ids[::-1])
    assert table["reference"].tolist() == [five[0] for five in written[::-1]]
    assert captions.read_captions(stored, ids, "all")["reference"].tolist() == written
    with pytest.raises(PerceptError, match="other images"):
        captions.read_captions(stored, ids[1:])
    whole = pd.read_parquet(stored)
    whole.assign(reference=["", *whole["reference"][1:]]).to_parquet(stored)
    with pytest.raises(PerceptError, match="1 of 120 test images have no caption"):
        captions.read_captions(stored, ids)
    whole.drop(columns="brain").to_parquet(stored)
    with pytest.raises(PerceptError, match="lacks the columns brain"):
        captions.read_captions(stored, ids)


def test_without_people_the_brain_is_held_against_git_alone(stored, written):
    pd.read_parquet(stored).assign(reference="", references="[]").to_parquet(stored)
    table = captions.read_captions(stored, 100 + np.arange(len(written)))
    assert "reference" not in table
    pairings = captions.pair_captions(table, "a ball")
    assert list(pairings) == ["brain_img"]
    metrics = [CAPTION_METRICS["ROUGE-L"]]
    scored = {name: score_table(*pair, metrics, draws=2) for name, pair in pairings.items()}
    lines = pd.concat(
        [
            captions.caption_table(scored),
            captions.corpus_bleu_table(table, "a ball", np.roll(np.arange(len(table)), 1)),
        ]
    )
    assert set(lines["pairing"]) == {"brain_img"}
    (row, *_) = captions.format_caption_table(lines)
    assert list(row) == ["metric", "brain's to image's"]


def test_the_three_pairings_with_floors_ceiling_and_what_is_relative(stored, written, tmp_path):
    ids, metrics = (
        100 + np.arange(len(written)),
        [CAPTION_METRICS[name] for name in ("ROUGE-L", "CIDEr")],
    )
    table = captions.read_captions(stored, ids)
    common = captions.find_most_common_caption(["b", "a ball", "a ball", "b", "c"])
    assert common == "a ball"
    pairings = captions.pair_captions(table, common)
    scored = {
        name: score_table(wanted, rows, metrics, draws=2, image_ids=ids)
        for name, (wanted, rows) in pairings.items()
    }
    records = make_records(scored["brain_ref"], metrics, protocol="mini", test_set="x")
    add_results(
        tmp_path / "run", "06_captions", scored["brain_ref"], records, provenance("mini", {}, [])
    )
    read = {
        record["name"]: record for record in read_json(tmp_path / "run" / "metrics.json")["metrics"]
    }
    assert set(read["CIDEr"]["floors"]) == {"shuffled", "common_caption"} and set(
        read["CIDEr"]["others"]
    ) == {"true_tokens"}
    lines = captions.caption_table(scored).set_index(["metric", "pairing"])
    rouge = {
        pairing: lines.loc["ROUGE-L", pairing]
        for pairing in ("img_ref", "brain_ref", "brain_img", "relative")
    }
    score = CAPTION_METRICS["ROUGE-L"].score
    assert (
        rouge["img_ref"]["value"]
        == pytest.approx(score(table["reference"], table["git_image"]).mean())
        == pytest.approx(read["ROUGE-L"]["ceiling"]["value"])
    )
    assert (
        rouge["brain_ref"]["value"]
        == pytest.approx(score(table["reference"], table["brain"]).mean())
        == pytest.approx(read["ROUGE-L"]["value"])
    )
    assert rouge["brain_img"]["value"] == pytest.approx(
        score(table["git_image"], table["brain"]).mean()
    )
    assert rouge["relative"]["value"] == pytest.approx(
        rouge["brain_img"]["value"] / rouge["img_ref"]["value"]
    )
    assert rouge["relative"]["low"] < rouge["relative"]["value"] < rouge["relative"]["high"]
    assert rouge["brain_ref"]["shuffled"] < rouge["brain_ref"]["value"] < rouge["img_ref"]["value"]
    corpus = captions.corpus_bleu_table(table, common, next(derangements(len(ids), 1, 0)))
    shown = captions.format_caption_table(
        pd.concat([lines.reset_index(), corpus], ignore_index=True)
    )
    assert [row["metric"] for row in shown] == [
        "ROUGE-L",
        "CIDEr",
        *(f"corpus BLEU-{n}" for n in range(1, 5)),
    ]
    assert shown[0]["relative"].startswith(f"{rouge['relative']['value']:.3f} [") and all(
        "relative" not in row for row in shown[2:]
    )
    with pytest.raises(PerceptError, match="score 0"):
        captions.relative_score(np.ones(4), np.zeros(4))


# ------------------------------------------------------------------------------------------ tables
def test_tables_hold_the_published_metrics_first_under_their_names(tmp_path):
    def record(name, floors, ceiling):
        return make_record(
            name,
            np.linspace(0, 1, 9),
            baselines=floors,
            upper_bound=ceiling,
            better="higher",
            protocol="p",
            test_set="t",
        )

    names = [
        "mini:judge:kind",
        "brain_correlation V1",
        "mini:SwAV",
        "ssim",
        "CLIP within scene",
        "mini:EffNet-B1",
        "brain_correlation nsd_general",
        "pixcorr",
    ]
    records = [
        record(name, {"shuffled": np.zeros(9)}, np.ones(9) if name == "ssim" else "none is known")
        for name in names
    ]
    pools = [
        {
            "direction": d,
            "decoder": m,
            "value": v,
            "low": v,
            "high": v,
            "pool": 300,
            "draws": 30,
            "chance": 1 / 300,
        }
        for m in ("network", "ridge")
        for d, v in (("image_from_brain", 0.7), ("brain_from_image", 0.8))
    ]
    found = tables.retrieval_records({"tables": [{"title": "Retrieval in pools", "rows": pools}]})
    path = tables.write_table(
        tmp_path / "tables" / "run_all_recons.csv", tables.published_table([*records, *found])
    )
    read = pd.read_csv(path, sep="\t")
    assert read["Metric"].tolist() == [
        "PixCorr",
        "SSIM",
        "mini:EffNet-B",
        "mini:SwAV",
        "FwdRetrieval",
        "BwdRetrieval",
        "BrainCorr nsd_general",
        "BrainCorr V1",
        "mini:judge:kind",
        "CLIP within scene",
    ]
    assert list(read.columns) == [
        "Metric",
        "Value",
        "low",
        "high",
        "n",
        "shuffled",
        "chance",
        "ceiling",
    ]
    by = read.set_index("Metric")
    assert (
        by.loc["SSIM", "ceiling"] == 1
        and np.isnan(by.loc["PixCorr", "ceiling"])
        and by.loc["PixCorr", "n"] == 9
    )
    assert by.loc["FwdRetrieval", "Value"] == 0.8 and by.loc["BwdRetrieval", "Value"] == 0.7, (
        "the published names are the other way round"
    )
    assert (
        tables.published_name("mini:CLIP, blend 0.25") == (5, "mini:CLIP, blend 0.25")
        and tables.published_name("pixcorr, blend 0.25")[1] == "PixCorr, blend 0.25"
    )
    assert tables.retrieval_records({"tables": []}) == []


# ------------------------------------------------------------------------------- optional packages
OPTIONAL = (
    "captum",
    "nilearn",
    "nltk",
    "rouge_score",
    "pycocoevalcap",
    "sentence_transformers",
)


@pytest.mark.slow(reason="imports everything in a fresh process")
def test_the_evaluation_needs_no_optional_package_until_it_is_used():
    code = (
        "import sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import src.evaluation\n"
        "from src.evaluation import attribution, compare, sweeps\n"
        "from src.evaluation.captions import CAPTION_METRICS\n"
        "print(CAPTION_METRICS['ROUGE-1'].description)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "single words" in done.stdout


@pytest.mark.parametrize("package", ["rouge_score", "pycocoevalcap"])
def test_a_missing_package_is_named_with_the_command_before_anything_is_scored(
    package, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PerceptError, match=f"needs the package {package}.*--extra captions"):
        prepare_caption_metrics("ROUGE-1", "mini")
