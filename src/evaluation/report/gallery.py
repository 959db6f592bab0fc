"""The gallery of a run: its test images, reconstructions, scores and captions."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from PIL import Image

from src.evaluation.report.labels import format_entry
from src.evaluation.tables import display_name
from src.utils import PerceptError

SIDE, SAMPLE_SIDE = 256, 128  # larger images and samples are shrunk to this

SMALL = 64  # images up to this size are stored without loss

QUALITY = 84  # of WebP, a loss that does not show

FALLBACK = 24  # images of the table that stands in where nothing can be pressed

CELL = Markup('<td style="text-align:left;padding:2px 6px">{}</td>')
HEAD = Markup(
    '<th style="text-align:left;padding:2px 6px;max-width:88px;font-size:11px;font-weight:500">'
    "{}</th>"
)
TABLE = Markup(
    '<table style="border-collapse:collapse"><thead><tr><th>test'
    " image</th>{}</tr></thead><tbody>{}</tbody></table>"
)
FIGURE = Markup(
    '<figure style="display:inline-block;margin:4px">{}<figcaption>{}</figcaption></figure>'
)
IMAGE = Markup('<img src="{}" alt="{}" width="{}" style="height:auto">')


def encode_images(images: Any, side: int = SIDE) -> list[str]:
    """Images (n, 3 or 1, height, width) in [0, 1] as data URIs of WebP, none larger than `side`."""
    floats = torch.as_tensor(images).detach().float().cpu()
    pixels = torch.nan_to_num(floats).clamp(0, 1)
    colours = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (n, height, width, 3)
    array = (colours * 255).round().to(torch.uint8).numpy()
    # small samples may be many: they are stored with a loss that does not show, at a third of the
    # size
    options: dict[str, Any] = {"quality": QUALITY}
    if max(array.shape[1:3]) <= SMALL and side == SIDE:
        options = {"lossless": True}
    uris = []
    for tile in array:
        image = Image.fromarray(tile)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", method=2, **options)
        uris.append("data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode())
    return uris


def _check_pairing(images: Mapping[str, Any], details: pd.DataFrame | None, samples: Any) -> int:
    """The number of test images, after checking that images, details and samples pair up."""
    if "seen" not in images:
        raise PerceptError(
            "The gallery needs the row 'seen'; it was given"
            f" {', '.join(map(repr, images)) or 'no images'}."
        )
    counts = {}
    for name, row in images.items():
        shape = tuple(np.shape(row))
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise PerceptError(
                f"The row '{name}' has shape {shape}; images are (images, 3, height,"
                " width) in [0, 1]."
            )
        counts[name] = shape[0]
    if details is not None:
        counts["details"] = len(details)
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
            "Images and details do not pair up:"
            f" {', '.join(f'{name} {count}' for name, count in counts.items())}; give one each a"
            " test image."
        )
    return counts["seen"]


def build_gallery(
    images: Mapping[str, Any],
    details: pd.DataFrame | None,
    samples: Any = None,
    max_images: int | None = None,
    lower: Sequence[str] = (),
) -> dict[str, Any]:
    """What the gallery shows, as plain lists in the order of the test set.

    Args:
        images: (n, 3, height, width) in [0, 1] by row, among them "seen".
        details: n rows indexed by image id: per-image scores, "hit", "caption"; places in the test
            set serve as ids without it.
        samples: (n, samples, 3, height, width) or None.
        max_images: only the first so many images, all by default.
        lower: names of the metrics that are better when lower.

    Returns:
        {total, ids, rows: [{name, images}], scores: [{name, lower, values}], hits, captions,
        samples}; the last three may be None.

    Raises:
        PerceptError: there is no row "seen", or images, details and samples do not pair up.
    """
    total = _check_pairing(images, details, samples)
    if details is None:
        details = pd.DataFrame(index=pd.RangeIndex(1, total + 1))
    table = details.iloc[:max_images]
    count = min(total, max_images or total)
    rows = []
    for name in ["seen", *(name for name in images if name != "seen")]:
        uris = encode_images(images[name][:count])
        rows.append({"name": display_name(str(name)), "images": uris})
    encoded_samples = None
    if samples is not None:
        encoded_samples = [encode_images(part, SAMPLE_SIDE) for part in samples[:count]]
    return {
        "total": total,
        "ids": [str(key) for key in table.index],
        "rows": rows,
        "scores": _list_scores(table, lower),
        "hits": [bool(hit) for hit in table["hit"]] if "hit" in table else None,
        "captions": _list_captions(table),
        "samples": encoded_samples,
    }


def _list_scores(table: pd.DataFrame, lower: Sequence[str]) -> list[dict[str, Any]]:
    """The numeric columns of the details to six digits, none where a value is not finite."""
    scores = []
    for name in table.select_dtypes(["number", "bool"]):
        if name == "hit":
            continue
        values = [
            float(f"{value:.6g}") if math.isfinite(value) else None
            for value in table[name].astype(float)
        ]
        label = display_name(str(name))
        scores.append({"name": label, "lower": name in lower, "values": values})
    return scores


def _list_captions(table: pd.DataFrame) -> list[str] | None:
    if "caption" not in table:
        return None
    return ["" if pd.isna(text) else str(text) for text in table["caption"]]


def make_static_table(gallery: Mapping[str, Any], places: Sequence[int]) -> Markup:
    """A plain HTML table of the images at these places of the test set, for where nothing can be
    pressed.
    """
    rows = gallery["rows"]
    heads = Markup("").join(HEAD.format(row["name"]) for row in rows)
    lines = []
    for i in places:
        cells = [CELL.format(f"{i + 1} (id {gallery['ids'][i]}{_describe_hit(gallery, i)})")]
        for row in rows:
            alt = f"{row['name']}, test image {i + 1}"
            cells.append(CELL.format(IMAGE.format(row["images"][i], alt, 88)))
        lines.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    return TABLE.format(heads, Markup("").join(lines))


def _describe_hit(gallery: Mapping[str, Any], i: int) -> str:
    if gallery["hits"] is None:
        return ""
    return ", hit" if gallery["hits"][i] else ", miss"


def make_enlarged(gallery: Mapping[str, Any], i: int) -> Markup:
    """One test image large, with its caption, scores and samples."""
    parts = [Markup("<h4>Test image {}, id {}</h4>").format(i + 1, gallery["ids"][i])]
    for row in gallery["rows"]:
        image = IMAGE.format(row["images"][i], row["name"], 176)
        parts.append(FIGURE.format(image, row["name"]))
    if gallery["captions"]:
        parts.append(Markup("<p>{}</p>").format(gallery["captions"][i]))
    scores = [f"{score['name']} {format_entry(score['values'][i])}" for score in gallery["scores"]]
    parts.append(Markup("<p>{}</p>").format(", ".join(scores)))
    if gallery["samples"]:
        for k, uri in enumerate(gallery["samples"][i], 1):
            label = f"sample {k}"
            parts.append(FIGURE.format(IMAGE.format(uri, label, 96), label))
    return Markup("").join(parts)


def order_images(
    gallery: Mapping[str, Any], score: int, descending: bool, selection: str
) -> list[int]:
    """Places in the test set, filtered ("all", "hits", "misses") and sorted by a score (-1: test
    order); images without a score last.
    """
    places = list(range(len(gallery["ids"])))
    if selection != "all":
        places = [i for i in places if gallery["hits"][i] == (selection == "hits")]
    if score < 0:
        return places
    values = gallery["scores"][score]["values"]
    sign = -1 if descending else 1

    def sort_key(i: int) -> tuple[bool, float, int]:
        return values[i] is None, sign * (values[i] or 0.0), i

    return sorted(places, key=sort_key)
