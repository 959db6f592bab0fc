"""The page of a run is one file that holds everything, escapes everything, and says how to read a
score.
"""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor
from PIL import Image

from src.evaluation import report
from src.evaluation.records import make_record, provenance, write_metrics
from src.evaluation.report import widget
from src.evaluation.report.chart import assign_marks, describe_reading, place_scores
from src.utils import PerceptError, read_json, write_json

VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "</script><b>&\u2028name"
ROWS = ("seen", "reconstructed", "nearest training image")


class Checked(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def score(values, floors, name="pixcorr", **change):
    options = {
        "upper_bound": np.ones(len(values)),
        "better": "higher",
        "protocol": "mini",
        "test_set": "20-ab",
    }
    return make_record(name, values, baselines=floors, **(options | change))


@pytest.fixture
def run(tmp_path):
    """A results folder with one clear and one doubtful score, further tables, images and hostile
    names.
    """
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.05, 20)
    records = [
        score(
            values,
            {"shuffled": rng.normal(0, 0.05, (20, 4)), "mean_image": values - 0.2},
            stage="06_metrics",
            noise_ceiling={"value": 0.9, "low": 0.8, "high": 1.0},
        ),
        score(
            values[:15],
            {"nearest_train": values[:15] + 0.2, "mean_image": values[:15]},
            "top1",
            upper_bound="<b>no generator</b>",
            stage="05_retrieve",
            chance=0.05,
        ),
    ]
    selection = [
        {"what": "<script>alert(1)</script>", "split": "val"},
        {"what": "sample", "chosen": "second order"},
    ]
    origin = provenance(
        "a&b",
        {"training": 42},
        selection,
        alarms=["2 of 20 are <black>."],
        parameters={f"p{i}": i for i in range(9)},
    )
    write_metrics(tmp_path / "metrics.json", records, origin)
    tables = [
        {
            "title": "Pools <i>",
            "note": "of 10",
            "rows": [
                {"direction": "image_from_brain", "value": 0.12345, "pool": 10},
                {"value": -1e-9},
            ],
        }
    ]
    write_json(tmp_path / "metrics.json", read_json(tmp_path / "metrics.json") | {"tables": tables})
    for name in ("contact_sheet", "scores", "image_from_brain", "own_picture"):
        Image.new("RGB", (4, 3), "red").save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def shown():
    """Images by row, details and samples of 20 test images."""
    rng = np.random.default_rng(1)
    images = {row: torch.rand(20, 3, 16, 16) for row in ROWS}
    details = pd.DataFrame(
        {"pixcorr": rng.normal(size=20), HOSTILE: rng.normal(size=20)}, index=1000 + np.arange(20)
    )
    details.iloc[3, 0] = np.nan
    details["hit"], details["caption"] = np.arange(20) % 3 > 0, "a <b>red</b> ball"
    return images, details, torch.rand(20, 4, 3, 16, 16)


def data_of(page):
    return json.loads(
        re.search(r'id="gallery-data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    )


def test_page_is_whole_and_self_contained(run):
    page = report.write_report(run)
    assert page == run / "report.html"
    content = Checked(page.read_text())
    images = [
        base64.b64decode(source.split(",", 1)[1])
        for source in content.sources
        if source.startswith("data:image/")
    ]
    names = (
        "contact_sheet",
        "image_from_brain",
        "own_picture",
    )  # the chart is drawn in the page, so scores.png is not
    assert images == [(run / f"{name}.png").read_bytes() for name in names]
    assert all(source.startswith("data:") for source in content.sources)
    assert not re.search(r"https?://|@import|url\(", page.read_text())
    assert content.tags.count("table") == 4 and "dialog" not in content.tags


def test_everything_is_escaped(run, shown):
    for page in (report.write_report(run), report.write_report(run, *shown)):
        content = Checked(page.read_text())
        assert not {"b", "i", "black"} & (set(content.tags) - {"b"}) and page.read_text().count(
            "<b>"
        ) == page.read_text().count("</b>")
        text = "".join(content.text)
        assert (
            "<script>alert(1)</script>" in text
            and "none: <b>no generator</b>" in text
            and "2 of 20 are <black>." in text
            and "recipe a&b" in text
        )
        assert (
            "Pools <i>" in text and "<i>" not in page.read_text() and "<b>&" not in page.read_text()
        )
    assert (
        data_of(page)["scores"][1]["name"] == HOSTILE
        and data_of(page)["captions"][0] == "a <b>red</b> ball"
    )
    assert "\u2028" not in re.search(r'id="gallery-data">(.*)</script>', page.read_text())[1]


def test_scores_stand_between_floors_and_ceiling(run):
    text = "".join(Checked(report.write_report(run).read_text()).text)
    first = read_json(run / "metrics.json")["metrics"][0]
    for entry in (first, first["floors"]["shuffled"], first["ceiling"]):
        assert f"{entry['value']:.3f}[{entry['low']:.3f}, {entry['high']:.3f}]" in text
    assert (
        "better than every floor (p of the pairing 0.0005)" in text
        and "noise ceiling 0.900" in text
    )
    assert "worse than nearest train; not distinguishable from mean image" in text
    assert (
        text.index("Reconstruction") < text.index("Retrieval")
        and "20 images (15 for some scores)" in text
    )


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_reading_follows_the_direction(better):
    values = np.linspace(0.4, 0.6, 20)
    record = score(values, {"mean_image": values - 0.1}, better=better)
    expected = {"higher": "better than every floor", "lower": "worse than mean image"}
    assert describe_reading(record) == expected[better]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_right_is_better_in_the_chart(better):
    sign = 1 if better == "higher" else -1
    record = score(
        np.linspace(0.4, 0.6, 20),
        {"mean_image": np.full(20, 0.5 - 0.2 * sign)},
        upper_bound=np.full(20, 0.5 + 0.3 * sign),
        better=better,
        chance=0.5,
    )
    strip = place_scores(record)
    assert (
        0
        <= strip["floors"]["mean_image"]["at"]
        < strip["score"]["from"]
        < strip["score"]["at"]
        < strip["score"]["to"]
        < strip["ceiling"]["at"]
        <= 100
    )
    assert (
        strip["chance"] == pytest.approx(strip["score"]["at"], abs=0.1)
        and all(0 <= at <= 100 for at, _ in strip["ticks"])
        and len(strip["ticks"]) > 2
    )


def test_every_floor_has_a_mark_of_its_own():
    record = {
        "floors": {
            name: {}
            for name in (
                "shuffled",
                "mean_image",
                "nearest_train",
                "other_recon",
                "another run alone",
                "chance",
            )
        }
    }
    looks = [(look["path"], look["colour"]) for look in assign_marks([record]).values()]
    assert len(set(looks)) == 6 and all(path for path, _ in looks)


def test_further_tables_are_text_to_three_decimals(run):
    text = " ".join(Checked(report.write_report(run).read_text()).text)
    assert (
        "image from brain" in text
        and "0.123" in text
        and "0.1234" not in text
        and "-0.000" not in text
    )


def test_gallery_holds_every_image(run, shown):
    images, details, samples = shown
    data = data_of(report.write_report(run, images, details, samples))
    assert [row["name"] for row in data["rows"]] == list(ROWS) and data["ids"] == [
        str(i) for i in details.index
    ]
    assert data["hits"] == details["hit"].tolist() and data["total"] == 20
    assert data["scores"][0]["values"][3] is None and data["scores"][0]["values"][
        4
    ] == pytest.approx(details["pixcorr"].iloc[4], rel=1e-5)
    for row, name in zip(data["rows"], ROWS, strict=True):
        for uri, pixels in zip(row["images"], images[name], strict=True):
            decoded = np.asarray(
                Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
            )
            np.testing.assert_array_equal(
                decoded, (pixels * 255).round().byte().permute(1, 2, 0).numpy()
            )  # small images lose nothing
    assert [len(each) for each in data["samples"]] == [4] * 20
    assert (
        "contact_sheet" not in run.joinpath("report.html").read_text()
        and "first 24" not in run.joinpath("report.html").read_text()
    )


def test_only_the_first_images_of_a_large_set(run, shown):
    images, details, _ = shown
    page = report.write_report(
        run, images | {"seen": torch.rand(20, 3, 300, 300)}, details, max_images=5
    )
    data = data_of(page)
    assert (
        "The first 5 of 20 test images, unselected." in page.read_text() and len(data["ids"]) == 5
    )
    first = Image.open(io.BytesIO(base64.b64decode(data["rows"][0]["images"][0].split(",")[1])))
    assert first.size == (256, 256)


def test_retrieved_images_replace_their_figures(run, shown):
    rows = [
        {
            "direction": "image_from_brain",
            "image": 1000 + i,
            "rank": 1 + i % 2,
            "candidates": [1000 + i, 1001 + i] if i % 2 == 0 else [999, 1000 + i],
        }
        for i in range(19)
    ]
    pd.DataFrame(rows).to_parquet(run / "retrieved.parquet")
    text = report.write_report(run, *shown).read_text()
    panel = text[text.index('<section id="retrieved">') : text.index('<section id="figures">')]
    assert (
        panel.count('class="found"') == 10
        and panel.count('picture right"') == 10
        and ">999</span>" in panel
    )
    assert "10 of 19 came first" in panel and "9 of 19 did not come first" in panel
    assert (
        base64.b64encode((run / "image_from_brain.png").read_bytes()).decode() in text
    )  # equal to the bytes of own_picture.png, which stays
    assert text.count('class="plate"') == 1


def test_page_needs_only_the_metrics(run):
    for path in run.glob("*.png"):
        path.unlink()
    content = Checked(report.write_report(run).read_text())
    assert "img" not in content.tags


def test_errors_are_one_sentence(run, shown, tmp_path):
    images, details, samples = shown
    with pytest.raises(PerceptError, match="metrics stage"):
        report.write_report(tmp_path / "absent")
    for call, message in (
        (
            lambda: report.write_report(run, {"ceiling": images["seen"]}, details),
            "needs the row 'seen'",
        ),
        (lambda: report.write_report(run, images, details[:19]), "do not pair up.*details 19"),
        (
            lambda: report.write_report(run, images | {"ceiling": images["seen"][:7]}, details),
            "ceiling 7",
        ),
        (lambda: report.write_report(run, images, details, samples[:3]), "samples 3"),
        (
            lambda: report.write_report(run, images, details, samples[0]),
            "samples, 3, height, width",
        ),
        (
            lambda: report.write_report(run, images | {"ceiling": torch.rand(20, 16, 16)}, details),
            "ceiling",
        ),
        (lambda: report.write_report(run, None, details), "without images"),
        (lambda: report.gallery_widget({}, details), "needs the row 'seen'"),
    ):
        with pytest.raises(PerceptError, match=message):
            call()
    assert not (run / "report.html").exists()


def test_widget_sorts_filters_and_turns_pages(shown):
    images, details, samples = shown
    sort, direction, which = (
        (box := report.gallery_widget(images, details, samples, page_size=6).widget)
        .children[0]
        .children
    )
    page, table, chosen, large = box.children[1:]
    assert (
        page.max == 4
        and [i for _, i in chosen.options] == list(range(6))
        and "sample 4" in large.value
    )
    page.value = 4
    sort.value = 0
    order = details["pixcorr"].reset_index(drop=True).sort_values(ascending=False).index.tolist()
    assert page.value == 1 and [i for _, i in chosen.options] == order[:6]
    direction.value = False
    assert [i for _, i in chosen.options] == order[:-1][::-1][:6]
    which.value = "misses"
    assert (
        page.max == 2
        and all(not details["hit"].iloc[i] for _, i in chosen.options)
        and table.value.count("miss)") == 6
    )
    chosen.value = chosen.options[2][1]
    assert f"id {details.index[chosen.value]}" in large.value and "a &lt;b&gt;red" in large.value


def test_widget_without_ipywidgets_is_a_table(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = report.gallery_widget(*shown)._repr_mimebundle_()
    assert (
        set(bundle) == {"text/plain", "text/html"}
        and Checked(bundle["text/html"]).tags.count("img") == 60
    )


def test_live_widget_carries_both(shown, monkeypatch):
    monkeypatch.setattr(widget, "_is_live", lambda: True)
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(
        report.gallery_widget(*shown)._repr_mimebundle_()
    )


@pytest.mark.slow(reason="starts a kernel")
def test_executed_notebook_shows_the_table():
    code = (
        "import pandas as pd, torch\nfrom src.evaluation.report import gallery_widget\n"
        "gallery_widget({'seen':"
        " torch.rand(30, 3, 8, 8), 'mine': torch.rand(30, 3, 8, 8)}, pd.DataFrame({'score':"
        " range(30)}))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    ExecutePreprocessor(timeout=120).preprocess(notebook)
    page = HTMLExporter().from_notebook_node(notebook)[0]
    shown = page[page.index("<body") :]
    assert shown.count("data:image/webp") == 48 and "widget-view+json" not in shown
