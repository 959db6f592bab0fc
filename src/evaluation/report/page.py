"""Writing report.html: what the stages left in the folder of a run, on one page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment
from PIL import Image

from src.evaluation.records import CONTROLS, read_metrics
from src.evaluation.report.chart import (
    Record,
    assign_marks,
    describe_reading,
    get_chance,
    group_records,
    list_upper_bounds,
)
from src.evaluation.report.gallery import (
    FALLBACK,
    SIDE,
    build_gallery,
    encode_images,
    make_static_table,
)
from src.evaluation.report.labels import (
    format_entry,
    format_provenance,
    format_score,
    make_heading,
)
from src.evaluation.tables import display_name
from src.files.foreign import load_parquet
from src.utils import PerceptError, atomic


class FigureText(NamedTuple):
    """Heading of a figure, and what to look at."""

    heading: str
    note: str = ""


FIGURES = {  # by file name without .png, in the order of the page
    "contact_sheet": FigureText(
        "What was seen, and what was reconstructed",
        "The first test images, unselected. Compare with the nearest training image: a lookup"
        " would show that one. The ceiling shows what this generator can draw at all.",
    ),
    "image_from_brain": FigureText(
        "Images found from brain activity",
        "The seen image, then the candidates that the brain points to, best first; the right"
        " one is framed.",
    ),
    "brain_from_image": FigureText(
        "Brain activity found from images",
        "The image, then the recordings that it points to, each shown as the image that was"
        " seen in it; the right one is framed.",
    ),
    "retrieval_curve": FigureText(
        "Retrieval by number of candidates",
        "Accuracy falls with the pool; how fast says more than one number.",
    ),
    "umap": FigureText(
        "Embeddings",
        "Do brain embeddings lie where those of their images lie? Distances between clusters"
        " mean little.",
    ),
    "train_distance": FigureText(
        "Scores by distance to the nearest training image",
        "A score that falls to the right is owed, in part, to look-alikes that were trained.",
    ),
    "abstain": FigureText(
        "Leaving out what is uncertain",
        "Are images whose samples differ much worse? Then the line rises to the left; where it"
        " is flat, it says nothing.",
    ),
    "01_training": FigureText(
        "Training of the high level",
        "A validation curve that rises while training falls is overfitting; the star is the"
        " best one.",
    ),
    "02_training": FigureText(
        "Training of the low level",
        "The low-level image of the reconstruction comes from this model.",
    ),
    "02_validation": FigureText("Low-level images of validation"),
    "rois": FigureText("Voxels", "Which regions went in, and how much of their signal repeats."),
}

DIRECTIONS = ("image_from_brain", "brain_from_image")

PANEL_ROWS = 5  # hits and misses of a retrieval panel


def write_report(
    results_folder: str | Path,
    images: Mapping[str, Any] | None = None,
    details: pd.DataFrame | None = None,
    samples: Any = None,
    max_images: int = 300,
) -> Path:
    """Write report.html beside the metrics.json of a run.

    Args:
        results_folder: results/<run>; reads metrics.json (its "tables" too), every PNG, and
            retrieved.parquet if there is one [direction, image (id of the query), rank (of the
            right one), candidates (ids, best first)].
        images: (images, 3, height, width) in [0, 1] by name of the row, among them "seen"; without
            them the page has no gallery, and shows the contact sheet.
        details: one row a test image, in the order of the images, indexed by image id: numeric
            columns are scores by metric, to sort by; "hit" (bool, retrieved first) and "caption"
            may stand beside them.
        samples: (images, samples, 3, height, width) in [0, 1], shown when a card is opened.
        max_images: in the gallery, the first ones of the test set.

    Returns:
        Path of the page.

    Raises:
        PerceptError: there is no metrics.json, no row "seen", or images, details and samples do
            not pair up.
    """
    folder = Path(results_folder)
    if not (folder / "metrics.json").exists():
        raise PerceptError(
            f"There is no metrics.json in {folder}; run the metrics stage (06) of this run first."
        )
    if images is None and (details is not None or samples is not None):
        raise PerceptError(
            "Details or samples were given without images; give the images they belong to."
        )
    content = read_metrics(folder / "metrics.json")
    replaced = {"scores"}  # figures that the page shows in another way
    sections: dict[str, Any] = {"gallery": None, "static": "", "panels": []}
    if images is not None:
        lower = [metric["name"] for metric in content["metrics"] if metric["better"] == "lower"]
        gallery = build_gallery(images, details, samples, max_images, lower)
        sections["gallery"] = gallery
        sections["static"] = make_static_table(gallery, range(min(FALLBACK, len(gallery["ids"]))))
        sections["panels"] = _collect_panels(folder, images, details)
        replaced |= {"contact_sheet", *(panel["name"] for panel in sections["panels"])}
    sections |= _collect_scores(content["metrics"])
    sections |= _collect_origin(folder, content)
    sections["tables"] = _format_tables(content.get("tables", []))
    sections["figures"] = _collect_figures(folder, replaced)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = _make_environment().from_string(template).render(sections)
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _make_environment() -> Environment:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "words": lambda name: display_name(str(name)),
        "score": format_score,
        "reading": describe_reading,
        "plain": format_provenance,
    }
    # without `sort_keys`, which is the default: the order of keys stays
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _collect_scores(records: Sequence[Record]) -> dict[str, Any]:
    """The section of scores: strips by stage, marks, and what the controls mean."""
    marks = assign_marks(records)
    controls = [*marks, "ceiling"]
    return {
        "groups": group_records(records),
        "marks": marks,
        "bars": list_upper_bounds(records),
        "has_chance": any(get_chance(record) is not None for record in records),
        "meanings": {name: CONTROLS[name] for name in controls if name in CONTROLS},
    }


def _collect_origin(folder: Path, content: Record) -> dict[str, Any]:
    """Title, alarms, choices and provenance."""
    provenance = dict(content["provenance"])
    selection = provenance.pop("selection", [])
    alarms = provenance.pop("alarms", [])
    keys: dict[str, None] = {}
    for choice in selection:
        keys |= dict.fromkeys(choice)
    return {
        "title": provenance.get("run", folder.resolve().name),
        "facts": _list_facts(content["metrics"], provenance),
        "alarms": alarms,
        "selection": selection,
        "selection_keys": list(keys),
        "provenance": provenance,
    }


def _list_facts(records: Sequence[Record], provenance: Record) -> list[str]:
    """The line under the title; records of a subset of the images do not repeat their test set."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for record in records:
        key = (record["protocol"], record["test_set"])
        sizes.setdefault(key, set()).add(record["n"])
    facts = [f"recipe {provenance['recipe']}"]
    for (protocol, test_set), counts in sizes.items():
        largest = max(counts)
        smaller = sorted(counts - {largest}, reverse=True)
        number = f"{largest} images"
        if smaller:
            number += f" ({', '.join(map(str, smaller))} for some scores)"
        facts += [f"protocol {protocol}", f"test set {test_set}", number]
    return facts


def _format_tables(tables: Sequence[Record]) -> list[dict[str, Any]]:
    """Title, note, columns and rows of text of the further tables, of those that have rows."""
    formatted = []
    for table in tables:
        if not table["rows"]:
            continue
        keys: dict[str, None] = {}
        for row in table["rows"]:
            keys |= dict.fromkeys(row)
        rows = [[format_entry(row.get(key)) for key in keys] for row in table["rows"]]
        note = table.get("note", "")
        formatted.append(
            {"title": table["title"], "note": note, "columns": list(keys), "rows": rows}
        )
    return formatted


def _collect_figures(folder: Path, replaced: set[str]) -> list[dict[str, Any]]:
    """The PNG files of a folder with heading, note and base64 data: known ones first, in their
    order, then the others by name.
    """
    files = sorted([*folder.glob("figures/*.png"), *folder.glob("*.png")])
    paths = {path.stem: path for path in files}
    names = [name for name in FIGURES if name in paths]
    names += [name for name in paths if name not in FIGURES]
    figures = []
    for name in names:
        if name in replaced:
            continue
        text = FIGURES.get(name, FigureText(make_heading(name)))
        # the size keeps the page from jumping when the image is decoded
        with Image.open(paths[name]) as image:
            width, height = image.size
        figures.append(
            {
                "name": name,
                "heading": text.heading,
                "note": text.note,
                "data": base64.b64encode(paths[name].read_bytes()).decode(),
                "width": width,
                "height": height,
            }
        )
    return figures


# ---------------------------------------------------------------------------------------- retrieved
def _collect_panels(
    folder: Path, images: Mapping[str, Any], details: pd.DataFrame | None
) -> list[dict[str, Any]]:
    """First hits and first misses of retrieved.parquet, in the order of the test set, with the seen
    images of all that is shown; none where nothing was retrieved.
    """
    if not (folder / "retrieved.parquet").exists():
        return []
    path = folder / "retrieved.parquet"
    columns = ("direction", "image", "rank", "candidates")
    table = load_parquet(path, "delete it, and run notebook 05 again", columns)
    ids = range(1, len(images["seen"]) + 1) if details is None else details.index
    tiles = _Tiles(images["seen"], ids)
    places = [tiles.places.get(str(image), -1) for image in table["image"]]
    table = table.assign(place=places).query("place >= 0").sort_values("place", kind="stable")
    panels = []
    for direction in DIRECTIONS:
        queries = table[table["direction"] == direction]
        if not len(queries):
            continue
        is_hit = queries["rank"] == 1
        parts = {"hits": queries[is_hit], "misses": queries[~is_hit]}
        panels.append(
            {
                "name": direction,
                **FIGURES[direction]._asdict(),
                "groups": [_make_panel_group(name, part, tiles) for name, part in parts.items()],
                "total": len(queries),
            }
        )
    return panels


class _Tiles:
    """Seen images as tiles of a panel, by image id.

    Args:
        seen: (n, 3, height, width) in [0, 1].
        ids: n image ids.
    """

    def __init__(self, seen: Any, ids: Any):
        self.seen = seen
        self.places = {str(key): place for place, key in enumerate(ids)}

    def make(self, key: Any) -> dict[str, Any]:
        """Id, data URI and number of an image; the last two are None outside the test set."""
        place = self.places.get(str(key))
        if place is None:
            return {"id": str(key), "uri": None, "place": None}
        uri = encode_images(self.seen[place : place + 1], SIDE // 2)[0]
        return {"id": str(key), "uri": uri, "place": place + 1}


def _make_panel_group(name: str, part: pd.DataFrame, tiles: _Tiles) -> dict[str, Any]:
    """The first hits or misses of a direction."""
    rows = []
    for row in part.head(PANEL_ROWS).to_dict("records"):
        candidates = [tiles.make(key) for key in row["candidates"]]
        query = tiles.make(row["image"])
        rows.append({**query, "rank": int(row["rank"]), "candidates": candidates})
    return {"name": name, "count": len(part), "rows": rows}
