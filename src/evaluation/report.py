"""The page of a finished run: results/<run>/report.html, one file with everything inside it.

- It reads what the stages left in the folder: metrics.json, retrieved.parquet when there is one,
  and every PNG. The pictures of the test set and their scores are handed over.
- Pictures are embedded and nothing is fetched, so the page can be mailed or archived; all text is
  escaped.
- A score is shown with its interval, floors and ceiling, and with a plain sentence on whether it
  beats the floors.
- `gallery_widget` browses the same pictures in a notebook.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.core.getipython import get_ipython
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from PIL import Image

from src.evaluation.records import CONTROLS
from src.figures.base import COLOURS, CONTROL_MARKS
from src.utils import PerceptError, atomic, read_json

FIGURES = {  # file name without .png: (heading, what to look at), in the order of the page
    "contact_sheet": (
        "What was seen, and what was reconstructed",
        (
            "The first test images, unselected. Compare with the nearest training image: a lookup"
            " would show that one. The ceiling shows what this generator can draw at all."
        ),
    ),
    "image_from_brain": (
        "Images found from brain activity",
        (
            "The seen image, then the candidates that the brain points to, best first; the right"
            " one is framed."
        ),
    ),
    "brain_from_image": (
        "Brain activity found from images",
        (
            "The image, then the recordings that it points to, each shown as the image that was"
            " seen in it; the right one is framed."
        ),
    ),
    "retrieval_curve": (
        "Retrieval by number of candidates",
        "Accuracy falls with the pool; how fast says more than one number.",
    ),
    "umap": (
        "Embeddings",
        (
            "Do brain embeddings lie where those of their images lie? Distances between clusters"
            " mean little."
        ),
    ),
    "train_distance": (
        "Scores by distance to the nearest training image",
        "A score that falls to the right is owed, in part, to look-alikes that were trained.",
    ),
    "abstain": (
        "Leaving out what is uncertain",
        (
            "Are images whose samples differ much worse? Then the line rises to the left; where it"
            " is flat, it says nothing."
        ),
    ),
    "01_training": (
        "Training of the high level",
        (
            "A validation curve that rises while training falls is overfitting; the star is the"
            " best one."
        ),
    ),
    "02_training": (
        "Training of the low level",
        "The low-level image of the reconstruction comes from this model.",
    ),
    "02_validation": ("Low-level images of validation", ""),
    "rois": ("Voxels", "Which regions went in, and how much of their signal repeats."),
}

DIRECTIONS = ("image_from_brain", "brain_from_image")

STAGES = {
    "06_metrics": "Reconstruction",
    "05_retrieve": "Retrieval",
}  # headings, in the order of the page

PATHS = {  # marks of the chart, about 10 pixels across
    "x": "M-4-4L4 4M-4 4L4-4",
    "s": "M-4-4h8v8h-8z",
    "D": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "^": "M0-5L5 4H-5z",
    "v": "M0 5L5-4H-5z",
    "P": "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    "h": "M-2.7-4.7h5.4L5.4 0L2.7 4.7h-5.4L-5.4 0z",
    "<": "M-5 0L4-5V5z",
    ">": "M5 0L-4-5V5z",
}

OTHER_MARKS = [
    ("^", COLOURS[1]),
    ("h", COLOURS[7]),
    ("<", COLOURS[5]),
    (">", COLOURS[3]),
]  # of floors that have no mark of their own

ALPHA = 0.05

SIDE, SAMPLE_SIDE = 256, 128  # larger pictures and samples are shrunk to this

SMALL = 64  # pictures up to this size are stored without loss

PANEL_ROWS = 5  # hits and misses of a retrieval panel

FALLBACK = 24  # images of the table that stands in where nothing can be pressed


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _heading(name: str) -> str:
    """A file's or stage's name as a heading: without its number, in words."""
    words = _words(re.sub(r"^\d+_", "", name))
    return words[:1].upper() + words[1:]


def _score(entry: dict[str, Any] | None) -> Markup:
    """A value over its interval."""
    if not entry:
        return Markup("-")
    value, low, high = (f"{entry[key]:.3f}" for key in ("value", "low", "high"))
    return Markup("{}<small>[{}, {}]</small>").format(value, low, high)


def _cell(value: Any) -> str:
    """A table's entry as text, numbers to three decimals."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{round(value, 3) + 0.0:.3f}"  # without a minus before zero
    return _words(value) if isinstance(value, str) else str(value)


def _plain(value: Any) -> str:
    """A value of the provenance in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _reading(record: dict[str, Any]) -> str:
    """Whether a score beats its floors, in words."""
    sign = -1 if record["better"] == "lower" else 1
    beaten: list[str] = []
    level: list[str] = []
    lost: list[str] = []
    for name, floor in record["floors"].items():
        gain = sign * (record["value"] - floor["value"])
        certain = floor.get("p", 1.0) < ALPHA
        (level if not certain else beaten if gain > 0 else lost).append(_words(name))
    pairing = f" (p of the pairing {record['p_shuffled']:.2g})" if "p_shuffled" in record else ""
    if not level and not lost:
        return "better than every floor" + pairing
    parts = [("worse than", lost), ("not distinguishable from", level), ("better than", beaten)]
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts if names) + pairing


def _facts(records: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> list[str]:
    """The line under the title; records of a subset of the images do not repeat their test set."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for record in records:
        sizes.setdefault((record["protocol"], record["test_set"]), set()).add(record["n"])
    facts = [f"recipe {provenance['recipe']}"]
    for (protocol, test_set), counts in sizes.items():
        few = ", ".join(map(str, sorted(counts - {max(counts)}, reverse=True)))
        facts += [
            f"protocol {protocol}",
            f"test set {test_set}",
            f"{max(counts)} images" + (f" ({few} for some scores)" if few else ""),
        ]
    return facts


def _marks(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Path, colour and label of every floor that occurs; names without a mark of their own take the
    next free one.
    """
    names = list(dict.fromkeys(name for record in records for name in record["floors"]))
    free = iter(OTHER_MARKS * len(names))
    marks = {}
    for name in names:
        shape, colour, label = (
            CONTROL_MARKS[name] if name in CONTROL_MARKS else (*next(free), _words(name))
        )
        marks[name] = {
            "path": PATHS.get(shape, PATHS["v"]),
            "colour": colour,
            "label": label,
            "line": shape == "x",
        }
    return marks


def _chance(record: dict[str, Any]) -> float | None:
    """The chance level of a score, where it is known and not a floor already."""
    chance = record.get("chance")
    known = isinstance(chance, int | float) and math.isfinite(chance)
    return chance if known and "chance" not in record["floors"] else None


def _strip(record: dict[str, Any]) -> dict[str, Any]:
    """Where everything of one score stands in its strip, in percent from the left; right is better."""
    bars = {
        key: record[key]
        for key in ("ceiling", "noise_ceiling")
        if (record.get(key) or {}).get("value") is not None
    }
    entries = {"score": record, **record["floors"], **bars}
    ends = [entry[key] for entry in entries.values() for key in ("low", "high", "value")]
    chance = _chance(record)
    ends += [] if chance is None else [chance]
    pad = 0.04 * ((max(ends) - min(ends)) or 1.0)
    low, high = min(ends) - pad, max(ends) + pad

    def place(value: float) -> float:
        share = (value - low) / (high - low)
        return round(100 * (1 - share if record["better"] == "lower" else share), 2)

    def span(entry: dict[str, Any]) -> dict[str, Any]:
        edges = sorted((place(entry["low"]), place(entry["high"])))
        text = f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
        return {"at": place(entry["value"]), "from": edges[0], "to": edges[1], "text": text}

    ticks = [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]
    return {
        "score": span(record),
        "floors": {name: span(floor) for name, floor in record["floors"].items()},
        **{key: span(entry) for key, entry in bars.items()},
        "chance": None if chance is None else place(chance),
        "ticks": [(place(tick), f"{round(tick, 6):g}") for tick in ticks],
    }


def _groups(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records by stage: reconstruction, retrieval, then the others as they come."""
    stages = list(dict.fromkeys(record.get("stage") or "" for record in records))
    most = max(record["n"] for record in records)
    groups = []
    for stage in sorted(
        stages, key=lambda stage: list(STAGES).index(stage) if stage in STAGES else len(STAGES)
    ):
        mine = [record for record in records if (record.get("stage") or "") == stage]
        floors = list(dict.fromkeys(name for record in mine for name in record["floors"]))
        rows = [
            {**record, "strip": _strip(record), "subset": record["n"] != most} for record in mine
        ]
        groups.append(
            {"heading": STAGES.get(stage, _heading(stage)), "records": rows, "floors": floors}
        )
    return groups


def _uris(images: Any, side: int = SIDE) -> list[str]:
    """Pictures (n, 3 or 1, height, width) in [0, 1] as data URIs of WebP, none larger than `side`."""
    pixels = torch.nan_to_num(torch.as_tensor(images).detach().float().cpu()).clamp(0, 1)
    array = (
        (pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    )  # (n, height, width, 3)
    small = max(array.shape[1:3]) <= SMALL
    # small samples may be many: they are stored with a loss that does not show, at a third of the
    # size
    options: dict[str, Any] = {"lossless": True} if small and side == SIDE else {"quality": 84}
    uris = []
    for tile in array:
        picture, stream = Image.fromarray(tile), io.BytesIO()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(stream, "WEBP", method=2, **options)
        uris.append("data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode())
    return uris


def _check_pictures(pictures: Mapping[str, Any], details: pd.DataFrame | None, samples: Any) -> int:
    """The number of test images, once everything is found to pair up."""
    if "seen" not in pictures:
        raise PerceptError(
            "The gallery needs the row 'seen'; it was given"
            f" {', '.join(map(repr, pictures)) or 'no pictures'}."
        )
    shapes = {name: tuple(np.shape(images)) for name, images in pictures.items()}
    wrong = [name for name, shape in shapes.items() if len(shape) != 4 or shape[1] not in (1, 3)]
    if wrong:
        raise PerceptError(
            f"The row '{wrong[0]}' has shape {shapes[wrong[0]]}; pictures are (images, 3, height,"
            " width) in [0, 1]."
        )
    counts = {name: shape[0] for name, shape in shapes.items()}
    counts |= {"details": len(details)} if details is not None else {}
    if samples is not None:
        shape = tuple(np.shape(samples))
        if len(shape) != 5:
            raise PerceptError(
                f"The samples have shape {shape}; they are (images, samples, 3, height, width) in"
                " [0, 1]."
            )
        counts["samples"] = shape[0]
    if len(set(counts.values())) != 1:
        raise PerceptError(
            "Pictures and details do not pair up:"
            f" {', '.join(f'{name} {count}' for name, count in counts.items())}; give one each a"
            " test image."
        )
    return counts["seen"]


def _gallery(
    pictures: Mapping[str, Any],
    details: pd.DataFrame | None,
    samples: Any = None,
    most: int | None = None,
    lower: Sequence[str] = (),
) -> dict[str, Any]:
    """What the gallery shows, as plain lists in the order of the test set.

    Args:
        pictures: (n, 3, height, width) in [0, 1] by row, among them "seen".
        details: n rows indexed by image id: per-image scores, "hit", "caption"; places in the test
            set serve as ids without it.
        samples: (n, samples, 3, height, width) or None.
        most: only the first so many images, all by default.
        lower: names of the metrics that are better when lower.

    Returns: {total, ids, rows: [{name, pictures}], scores: [{name, lower, values}], hits, captions,
    samples}; the last three may be None.
    """
    total = _check_pictures(pictures, details, samples)
    details = pd.DataFrame(index=pd.RangeIndex(1, total + 1)) if details is None else details
    table, count = details.iloc[:most], min(total, most or total)
    names = ["seen", *(name for name in pictures if name != "seen")]
    numeric = [name for name in table.select_dtypes(["number", "bool"]) if name != "hit"]
    finite = {
        name: [float(f"{v:.6g}") if math.isfinite(v) else None for v in table[name].astype(float)]
        for name in numeric
    }
    return {
        "total": total,
        "ids": [str(key) for key in table.index],
        "rows": [
            {"name": _words(name), "pictures": _uris(pictures[name][:count])} for name in names
        ],
        "scores": [
            {"name": _words(name), "lower": name in lower, "values": values}
            for name, values in finite.items()
        ],
        "hits": [bool(hit) for hit in table["hit"]] if "hit" in table else None,
        "captions": (
            ["" if pd.isna(text) else str(text) for text in table["caption"]]
            if "caption" in table
            else None
        ),
        "samples": (
            None if samples is None else [_uris(each, SAMPLE_SIDE) for each in samples[:count]]
        ),
    }


def _image(uri: str, alt: str, side: int = 88) -> Markup:
    return Markup('<img src="{}" alt="{}" width="{}" style="height:auto">').format(uri, alt, side)


def _static(gallery: dict[str, Any], places: Sequence[int]) -> Markup:
    """A plain HTML table of the images at these places of the test set: what is seen where nothing
    can be pressed.
    """
    cell = Markup('<td style="text-align:left;padding:2px 6px">{}</td>')
    style = "text-align:left;padding:2px 6px;max-width:88px;font-size:11px;font-weight:500"
    head = Markup("").join(
        Markup('<th style="{}">{}</th>').format(style, row["name"]) for row in gallery["rows"]
    )
    lines = []
    for i in places:
        hit = "" if gallery["hits"] is None else ", hit" if gallery["hits"][i] else ", miss"
        shown = [
            cell.format(_image(row["pictures"][i], f"{row['name']}, test image {i + 1}"))
            for row in gallery["rows"]
        ]
        lines.append(
            Markup("<tr>{}{}</tr>").format(
                cell.format(f"{i + 1} (id {gallery['ids'][i]}{hit})"), Markup("").join(shown)
            )
        )
    table = (
        '<table style="border-collapse:collapse"><thead><tr><th>test'
        " image</th>{}</tr></thead><tbody>{}</tbody></table>"
    )
    return Markup(table).format(head, Markup("").join(lines))


def _figures(folder: Path, without: set[str]) -> list[dict[str, Any]]:
    """The PNG files of a folder with heading, note and base64 data: known ones first, in their
    order, then the others by name.
    """
    paths = {
        path.stem: path for path in sorted([*folder.glob("figures/*.png"), *folder.glob("*.png")])
    }
    order = [name for name in FIGURES if name in paths] + [
        name for name in paths if name not in FIGURES
    ]
    figures = []
    for name in order:
        if name not in without:
            heading, note = FIGURES.get(name, (_heading(name), ""))
            data = base64.b64encode(paths[name].read_bytes()).decode()
            with Image.open(
                paths[name]
            ) as picture:  # its size keeps the page from jumping when it is decoded
                width, height = picture.size
            figures.append(
                {
                    "name": name,
                    "heading": heading,
                    "note": note,
                    "data": data,
                    "width": width,
                    "height": height,
                }
            )
    return figures


def _panels(path: Path, pictures: Mapping[str, Any], ids: Sequence[str]) -> list[dict[str, Any]]:
    """First hits and first misses of retrieved.parquet, in the order of the test set, with the seen
    pictures of all that is shown.
    """
    table = pd.read_parquet(path)
    places = {key: place for place, key in enumerate(ids)}
    table = (
        table.assign(place=[places.get(str(image), -1) for image in table["image"]])
        .query("place >= 0")
        .sort_values("place", kind="stable")
    )

    def tile(key: Any) -> dict[str, Any]:
        place = places.get(str(key))
        uri = None if place is None else _uris(pictures["seen"][place : place + 1], SIDE // 2)[0]
        return {"id": str(key), "uri": uri, "place": None if place is None else place + 1}

    panels = []
    for direction in DIRECTIONS:
        mine, groups = table[table["direction"] == direction], []
        for name, part in (("hits", mine[mine["rank"] == 1]), ("misses", mine[mine["rank"] != 1])):
            rows = [
                {
                    **tile(row["image"]),
                    "rank": int(row["rank"]),
                    "candidates": [tile(key) for key in row["candidates"]],
                }
                for row in part.head(PANEL_ROWS).to_dict("records")
            ]
            groups.append({"name": name, "count": len(part), "rows": rows})
        if len(mine):
            panels.append(
                {
                    "name": direction,
                    "heading": FIGURES[direction][0],
                    "note": FIGURES[direction][1],
                    "groups": groups,
                    "total": len(mine),
                }
            )
    return panels


def _tables(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, note, columns and rows of text of the further tables; those without rows are left out."""
    shown = []
    for table in tables:
        columns = list(dict.fromkeys(key for row in table["rows"] for key in row))
        rows = [[_cell(row.get(column)) for column in columns] for row in table["rows"]]
        shown += (
            [
                {
                    "title": table["title"],
                    "note": table.get("note", ""),
                    "columns": columns,
                    "rows": rows,
                }
            ]
            if rows
            else []
        )
    return shown


def _environment() -> Environment:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"words": _words, "score": _score, "reading": _reading, "plain": _plain}
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "separators": (",", ":"),
    }  # keeps the order of keys
    return environment


def write_report(
    results_folder: str | Path,
    pictures: Mapping[str, Any] | None = None,
    details: pd.DataFrame | None = None,
    samples: Any = None,
    most: int = 300,
) -> Path:
    """Write report.html beside the metrics.json of a run.

    Args:
        results_folder: results/<run>; reads metrics.json (its "tables" too), every PNG, and
            retrieved.parquet if there is one [direction, image (id of the query), rank (of the
            right one), candidates (ids, best first)].
        pictures: (images, 3, height, width) in [0, 1] by name of the row, among them "seen";
            without them the page has no gallery, and shows the contact sheet.
        details: one row a test image, in the order of the pictures, indexed by image id: numeric
            columns are scores by metric, to sort by; "hit" (bool, retrieved first) and "caption"
            may stand beside them.
        samples: (images, samples, 3, height, width) in [0, 1], shown when a card is opened.
        most: images in the gallery, the first ones of the test set.

    Returns:
        Path of the page.

    Raises:
        PerceptError: there is no metrics.json, no row "seen", or pictures, details and samples do
            not pair up.
    """
    folder = Path(results_folder)
    if not (folder / "metrics.json").exists():
        raise PerceptError(
            f"There is no metrics.json in {folder}; run the metrics stage (06) of this run first."
        )
    if pictures is None and (details is not None or samples is not None):
        raise PerceptError(
            "Details or samples were given without pictures; give the pictures they belong to."
        )
    content = read_json(folder / "metrics.json")
    records, provenance = content["metrics"], dict(content["provenance"])
    selection, alarms = provenance.pop("selection", []), provenance.pop("alarms", [])
    marks, without = _marks(records), {"scores"}
    gallery, panels = None, []
    if pictures is not None:
        lower = [record["name"] for record in records if record["better"] == "lower"]
        gallery = _gallery(pictures, details, samples, most, lower)
        without.add("contact_sheet")
        if (folder / "retrieved.parquet").exists():
            ids = range(1, gallery["total"] + 1) if details is None else details.index
            panels = _panels(folder / "retrieved.parquet", pictures, [str(key) for key in ids])
            without |= {panel["name"] for panel in panels}
    page = (
        _environment()
        .from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
        .render(
            title=provenance.get("run", folder.resolve().name),
            facts=_facts(records, provenance),
            alarms=alarms,
            gallery=gallery,
            static=_static(gallery, range(min(FALLBACK, len(gallery["ids"])))) if gallery else "",
            groups=_groups(records),
            marks=marks,
            panels=panels,
            tables=_tables(content.get("tables", [])),
            bars=[
                key
                for key in ("ceiling", "noise_ceiling")
                if any((r.get(key) or {}).get("value") is not None for r in records)
            ],
            has_chance=any(_chance(record) is not None for record in records),
            meanings={name: CONTROLS[name] for name in [*marks, "ceiling"] if name in CONTROLS},
            figures=_figures(folder, without),
            selection=selection,
            selection_keys=list(dict.fromkeys(key for choice in selection for key in choice)),
            provenance=provenance,
        )
    )
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


class _Shown:
    """A widget beside its static stand-in.

    A live front end shows the widget. Where a notebook is only executed there is none, and an
    executed page that carried the widget would ask the network for the scripts that draw it: there
    the stand-in alone is given.
    """

    def __init__(self, widget: Any, static: Markup):
        self.widget, self.static = widget, static

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {
            "text/plain": "the gallery of reconstructions",
            "text/html": str(self.static),
        }
        widget = self.widget._repr_mimebundle_() if self.widget is not None and _is_live() else {}
        return {key: value for key, value in widget.items() if key != "text/plain"} | bundle


def _is_live() -> bool:
    """Whether a front end with a person before it runs this cell: it says which cell it is, a mere
    execution says nothing.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent().get("metadata"))


def _enlarged(gallery: dict[str, Any], i: int) -> Markup:
    """One test image large, with its caption, scores and samples."""
    figure = Markup(
        '<figure style="display:inline-block;margin:4px">{}<figcaption>{}</figcaption></figure>'
    )
    rows = [
        figure.format(_image(row["pictures"][i], row["name"], 176), row["name"])
        for row in gallery["rows"]
    ]
    caption = (
        Markup("<p>{}</p>").format(gallery["captions"][i]) if gallery["captions"] else Markup("")
    )
    scores = ", ".join(
        f"{score['name']} {_cell(score['values'][i])}" for score in gallery["scores"]
    )
    samples = (
        [
            figure.format(_image(uri, f"sample {k}", 96), f"sample {k}")
            for k, uri in enumerate(gallery["samples"][i], 1)
        ]
        if gallery["samples"]
        else []
    )
    parts = [
        Markup("<h4>Test image {}, id {}</h4>").format(i + 1, gallery["ids"][i]),
        *rows,
        caption,
        Markup("<p>{}</p>").format(scores),
        *samples,
    ]
    return Markup("").join(parts)


def _ordered(gallery: dict[str, Any], score: int, descending: bool, which: str) -> list[int]:
    """Places in the test set, filtered ("all", "hits", "misses") and sorted by a score (-1: test
    order); images without a score last.
    """
    places = [
        i
        for i in range(len(gallery["ids"]))
        if which == "all" or gallery["hits"][i] == (which == "hits")
    ]
    if score < 0:
        return places
    values = gallery["scores"][score]["values"]
    return sorted(
        places, key=lambda i: (values[i] is None, (-1 if descending else 1) * (values[i] or 0.0), i)
    )


def gallery_widget(
    pictures: Mapping[str, Any], details: pd.DataFrame, samples: Any = None, on_page: int = 12
) -> Any:
    """The gallery of `write_report`, browsable in JupyterLab: sort, filter, turn pages, and look at
    one image large.

    Args:
        pictures: (images, 3, height, width) in [0, 1] by name of the row, among them "seen".
        details: one row a test image as for `write_report`.
        samples: (images, samples, 3, height, width) in [0, 1], shown with the large image.
        on_page: images on a page.

    Returns:
        An object to end a cell with. Without a live front end (papermill, nbconvert) or without
        ipywidgets it shows a table of the first images.

    Raises:
        PerceptError: there is no row "seen", or pictures, details and samples do not pair up.
    """
    gallery = _gallery(pictures, details, samples)
    static = _static(gallery, range(min(FALLBACK, gallery["total"])))
    try:
        import ipywidgets
    except ImportError:  # the table is then all there is
        return _Shown(None, static)
    return _Shown(_browser(ipywidgets, gallery, on_page), static)


def _browser(widgets: Any, gallery: dict[str, Any], on_page: int) -> Any:
    """The controls and the pictures as one ipywidgets box."""
    sort = widgets.Dropdown(
        options=[
            ("test order", -1),
            *((score["name"], i) for i, score in enumerate(gallery["scores"])),
        ],
        description="Sort by",
    )
    direction = widgets.Dropdown(
        options=[("highest first", True), ("lowest first", False)], description="Order"
    )
    which = widgets.ToggleButtons(
        options=["all", "hits", "misses"] if gallery["hits"] else ["all"], description="Show"
    )
    page = widgets.IntSlider(min=1, max=1, description="Page", continuous_update=False)
    chosen = widgets.Dropdown(options=[], description="Look at")
    table, large = widgets.HTML(), widgets.HTML()

    def turn(_: Any = None) -> None:
        order = _ordered(gallery, sort.value, direction.value, which.value)
        page.max = max(1, -(-len(order) // on_page))  # this bounds the value too
        places = order[(page.value - 1) * on_page : page.value * on_page]
        table.value = (
            str(_static(gallery, places)) if places else "No image is left by this filter."
        )
        chosen.options = [(f"test image {i + 1}, id {gallery['ids'][i]}", i) for i in places]
        chosen.value = places[0] if places else None
        look()

    def look(_: Any = None) -> None:
        large.value = "" if chosen.value is None else str(_enlarged(gallery, chosen.value))

    def restart(_: Any) -> None:
        page.value = 1
        turn()

    for control in (sort, direction, which):
        control.observe(restart, "value")
    page.observe(turn, "value")
    chosen.observe(look, "value")
    turn()
    return widgets.VBox([widgets.HBox([sort, direction, which]), page, table, chosen, large])
