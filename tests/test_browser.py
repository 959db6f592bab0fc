"""The report in a real browser: light and dark, wide and narrow, by mouse and by keyboard alone."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from src.evaluation import report
from src.evaluation.records import make_record, provenance, write_metrics
from src.evaluation.report.gallery import FALLBACK
from src.evaluation.report.page import DIRECTIONS
from src.utils import read_json, write_json

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'percept[dev]'"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow(reason="draws the report in a browser"),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no browser: install chromium to test the report in it"
    ),
]
N, SAMPLES = 60, 4
ROWS = ("seen", "low level", "reconstructed", "nearest training image", "ceiling")
HOSTILE = "</script><img src=x onerror=console.error(1)>"


@pytest.fixture(scope="module")
def details():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"pixcorr": rng.normal(size=N).round(2), "mse": rng.random(N), HOSTILE: rng.random(N)},
        index=950000 + np.arange(N),
    )
    table.iloc[7, 0] = np.nan
    table["hit"], table["caption"] = rng.random(N) > 0.4, [f"a red ball, {i}" for i in range(N)]
    return table


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, details):
    """A report with gallery, samples, two stages, further tables, retrieved images and hostile
    names.
    """
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    common = {
        "protocol": "mini",
        "test_set": "60-ab",
        "description": "a description of some length that has to wrap on a phone",
        "source": "a paper",
    }
    records = []
    for name, better, stage in (
        ("pixcorr", "higher", "06_metrics"),
        ("mse", "lower", "06_metrics"),
        ("image_from_brain_top1", "higher", "05_retrieve"),
    ):
        values, step = rng.random(N), 0.3 if better == "lower" else -0.3
        floors = {
            "shuffled": rng.random((N, 3)),
            "mean_image": values + step,
            "a_run_with_quite_a_long_name-mini-subj01 alone": values + step / 2,
        }
        records.append(
            make_record(
                name,
                values,
                baselines=floors,
                upper_bound=values - step,
                better=better,
                stage=stage,
                chance=0.4,
                **common,
            )
        )
    origin = provenance(
        "mindeye/mini",
        {"all": 1},
        [{"what": HOSTILE, "split": "val"}],
        alarms=["an alarm"],
        parameters={f"p{i}": "x" * 60 for i in range(9)},
    )
    write_metrics(folder / "metrics.json", records, origin)
    content = read_json(folder / "metrics.json")
    content["tables"] = [
        {"title": "Wide", "note": "a note", "rows": [{f"column_{i}": 1 / 3 for i in range(14)}]}
    ]
    write_json(folder / "metrics.json", content)
    ids = details.index
    found = [
        {
            "direction": direction,
            "image": ids[i],
            "rank": 1 if details["hit"].iloc[i] else 2,
            "candidates": list(np.roll(ids, -i)[:8]),
        }
        for direction in DIRECTIONS
        for i in range(N)
    ]
    pd.DataFrame(found).to_parquet(folder / "retrieved.parquet")
    images = {row: torch.rand(N, 3, 32, 32) for row in ROWS}
    Image.new("RGB", (900, 300), "red").save(folder / "umap.png")
    return report.write_report(folder, images, details, torch.rand(N, SAMPLES, 3, 32, 32))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = (
            ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        )  # root has no sandbox
        running = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture(
    params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def page(request, browser, page_file):
    """The opened page; in the end nothing may have been complained about or fetched."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened, trouble = context.new_page(), []
    opened.set_default_timeout(10_000)
    opened.on("console", lambda message: trouble.append(message.text))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on(
        "request",
        lambda sent: None if sent.url.startswith(("file:", "data:")) else trouble.append(sent.url),
    )
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert not trouble


def order(page) -> list[int]:
    """Places in the test set of the cards of every page, as shown."""
    places: list[int] = []
    on = page.locator(".pager [data-step='1']").first
    while True:
        places += page.eval_on_selector_all(
            ".card", "cards => cards.map(card => Number(card.dataset.place))"
        )
        if on.get_attribute("aria-disabled") == "true":
            return places
        on.click()


def focused(page, expression: str):
    return page.evaluate(f"document.activeElement.{expression}")


def wait_for_card(page, place: int) -> None:
    """Until this card has the focus: a dialog says that it was closed a moment after."""
    page.locator(f".card[data-place='{place}']:focus").wait_for()


def test_everything_is_seen(page):
    undecoded = """async () => {
      await Promise.all([...document.images].map(image => image.decode()));
      return [...document.images].filter(image => !image.naturalWidth || !image.alt).length; }"""
    assert page.evaluate(undecoded) == 0 and page.locator(".card img").count() == 24 * len(ROWS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (
        page.locator("svg.chart").count() == 3
        and page.locator(".found").count() == 20
        and page.locator(".plate").count() == 1
    )
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#numbers td.score").first.is_visible()


def test_text_has_contrast(page):
    """At least 4.5 : 1 between text and page (WCAG 2.1, 1.4.3), in both colour schemes."""
    contrast = """names => { const css = getComputedStyle(document.documentElement);
      const light = name => {
        const hex = css.getPropertyValue(name).trim();
        const full = hex.length === 4 ? hex.replace(/[0-9a-f]/gi, "$&$&") : hex;
        const part = i => {
          const v = parseInt(full.slice(1 + 2 * i, 3 + 2 * i), 16) / 255;
          return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
        return .2126 * part(0) + .7152 * part(1) + .0722 * part(2); };
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      return Math.min(...names.map(([ink, paper]) => ratio(light(ink), light(paper)))); }"""
    pairs = [
        [ink, paper]
        for ink in ("--ink", "--soft", "--accent", "--warn")
        for paper in ("--paper", "--tint")
    ]
    assert (
        page.evaluate(contrast, [*pairs, ["--on-accent", "--accent"], ["--ink", "--warn-tint"]])
        >= 4.5
    )


@pytest.mark.parametrize("name", ["pixcorr", "mse", HOSTILE], ids=["pixcorr", "mse", "hostile"])
def test_sorting_orders_the_cards(page, details, name):
    assert order(page) == list(range(N))
    for label, ascending in (("highest first", False), ("lowest first", True)):
        page.select_option("#sort", index=1 + list(details).index(name))
        page.select_option("#direction", label)
        column = details[name].reset_index(drop=True)
        assert order(page) == column.sort_values(ascending=ascending, kind="stable").index.tolist()
    page.select_option("#sort", label="test order")
    assert order(page) == list(range(N))


def test_filter_shows_exactly_the_hits_or_misses(page, details):
    hit = details["hit"].to_numpy()
    for label, wanted in (
        ("Hits", np.flatnonzero(hit)),
        ("Misses", np.flatnonzero(~hit)),
        ("All", np.arange(N)),
    ):
        page.locator("fieldset label", has_text=label).click()
        assert order(page) == wanted.tolist()
    page.select_option("#size", "96")
    assert page.locator(".card").count() == N


def test_keyboard_alone(page, details):
    for _ in range(30):
        page.keyboard.press("Tab")
        if focused(page, "id") == "sort":
            break
    assert (
        focused(page, "id") == "sort"
        and page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )
    page.keyboard.press("ArrowDown")  # the first score
    best = (
        details["pixcorr"]
        .reset_index(drop=True)
        .sort_values(ascending=False, kind="stable")
        .index.tolist()
    )
    while "card" not in focused(page, "className"):
        page.keyboard.press("Tab")
    assert focused(page, "dataset.place") == str(best[0])
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert (
        dialog.is_visible()
        and f"Test image {best[0] + 1}, id {950000 + best[0]}"
        in page.locator("#large-title").inner_text()
    )
    assert page.locator("dialog .samples img").count() == SAMPLES and page.locator(
        "dialog .large img"
    ).count() == len(ROWS)
    assert page.locator("dialog .caption").inner_text() == f"a red ball, {best[0]}"
    assert f"{details['mse'].iloc[best[0]]:.3f}" in page.locator("dialog .values").inner_text()
    page.keyboard.press("ArrowLeft")  # there is none before the first
    page.keyboard.press("ArrowRight")
    assert f"Test image {best[1] + 1}," in page.locator("#large-title").inner_text()
    page.keyboard.press("Escape")
    wait_for_card(page, best[1])
    assert not dialog.is_visible()
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")  # the card shown last is on the second page by now
    wait_for_card(page, best[31])


def test_without_scripts_the_first_images_are_there(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page_file.as_uri())
    assert (
        opened.locator("#gallery noscript img").count() == FALLBACK * len(ROWS)
        and not opened.locator(".controls").is_visible()
    )
    context.close()


def test_print_has_no_controls(browser, page_file):
    opened = browser.new_page(color_scheme="dark")
    opened.goto(page_file.as_uri())
    opened.emulate_media(media="print")
    assert (
        not opened.locator(".controls").is_visible() and opened.locator(".card").first.is_visible()
    )
    assert (
        opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    opened.close()
