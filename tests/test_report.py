"""The page of a run is one file that holds everything, escapes everything, and says how to read a score."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from src import report, results, retrieval
from src.utils import PerceptError

VOID = {"meta", "img", "br", "link"}


class Checked(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def score(values, floors, **change):
    options = {"ceiling": np.ones(len(values)), "better": "higher", "protocol": "mini", "test_set": "20-ab"}
    return results.make_record("pixcorr", values, floors=floors, **(options | change))


@pytest.fixture
def run(tmp_path):
    """A results folder with one clear and one doubtful score, a retrieval table, two pictures and hostile
    names.
    """
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.05, 20)
    records = [
        score(values, {"shuffled": rng.normal(0, 0.05, (20, 4)), "mean_image": values - 0.2}),
        score(values, {"nearest_train": values + 0.2, "mean_image": values}, ceiling="<b>no generator</b>"),
    ]
    selection = [
        {"what": "<script>alert(1)</script>", "split": "val"},
        {"what": "sample", "chosen": "second order"},
    ]
    origin = results.provenance("a&b", {"training": 42}, selection, alarms=["2 of 20 are <black>."])
    results.write_metrics(tmp_path / "metrics.json", records, origin)
    clip = torch.randn(20, 4)
    retrieval.published_protocol(clip, clip, pool=10).to_parquet(tmp_path / "retrieval.parquet")
    for name in ("contact_sheet", "own_picture"):
        Image.new("RGB", (4, 3), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def test_page_is_whole_and_self_contained(run):
    page = report.write_report(run)
    assert page == run / "report.html"
    content = Checked(page.read_text())
    pictures = [base64.b64decode(source.split(",", 1)[1]) for source in content.sources]
    assert pictures == [(run / "contact_sheet.png").read_bytes(), (run / "own_picture.png").read_bytes()]
    assert all(source.startswith("data:image/png;base64,") for source in content.sources)
    assert not re.search(r"https?://|@import|url\(", page.read_text())
    assert content.tags.count("table") == 3 and {path.suffix for path in run.iterdir()} == {
        ".json",
        ".parquet",
        ".png",
        ".html",
    }


def test_everything_is_escaped(run):
    page = report.write_report(run).read_text()
    content = Checked(page)
    assert "script" not in content.tags and "b" not in content.tags and "black" not in content.tags
    text = "".join(content.text)
    assert (
        "<script>alert(1)</script>" in text
        and "none: <b>no generator</b>" in text
        and "2 of 20 are <black>." in text
    )
    assert "recipe a&b" in text


def test_scores_stand_between_floors_and_ceiling(run):
    content = metrics_of(run)
    text = "".join(Checked(report.write_report(run).read_text()).text)
    first = content[0]
    for entry in (first, first["floors"]["shuffled"], first["ceiling"]):
        assert f"{entry['value']:.3f}[{entry['low']:.3f}, {entry['high']:.3f}]" in text
    assert "better than every floor (p of the pairing 0.0005)" in text
    assert "worse than nearest train; not distinguishable from mean image" in text
    assert "image from brain" in text and "bwd, 'brain retrieval'" in text


def metrics_of(run):
    return report.read_json(run / "metrics.json")["metrics"]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_reading_follows_the_direction(better):
    values = np.linspace(0.4, 0.6, 20)
    record = score(values, {"mean_image": values - 0.1}, better=better)
    expected = {"higher": "better than every floor", "lower": "worse than mean image"}
    assert report._reading(record) == expected[better]


def test_page_needs_only_the_metrics(run):
    for path in (*run.glob("*.png"), run / "retrieval.parquet"):
        path.unlink()
    content = Checked(report.write_report(run).read_text())
    assert content.tags.count("table") == 2 and not content.sources


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(PerceptError, match="metrics stage"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())
