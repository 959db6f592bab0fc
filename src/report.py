"""The page of a finished run: results/<run>/report.html, one file with everything inside it.

- It only reads what the stages left in the folder: metrics.json, retrieval.parquet when there is one, and
  every PNG.
- Pictures are embedded and nothing is fetched, so the page can be mailed or archived; all text is escaped.
- A score is shown in one line with its interval, floors and ceiling, and with a plain sentence on whether it
  beats the floors.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from src.results import CONTROLS
from src.utils import PerceptError, atomic, read_json

FIGURES = {  # file name without .png: (heading, what to look at), in the order of the page
    "contact_sheet": (
        "What was seen, and what was reconstructed",
        "The first test images, unselected. Compare with the nearest training image: a lookup would show "
        "that one. The ceiling shows what this generator can draw at all.",
    ),
    "scores": (
        "Scores between floor and ceiling",
        "Right is better in every strip. Crosses, squares and diamonds are what needs no decoding.",
    ),
    "image_from_brain": (
        "Images found from brain activity: the first hits and the first misses",
        "The seen image, then the candidates that the brain points to, best first; the right one is framed.",
    ),
    "brain_from_image": (
        "Brain activity found from images: the first hits and the first misses",
        "The image, then the recordings that it points to, each shown as the image that was seen in it.",
    ),
    "retrieval_curve": (
        "Retrieval by number of candidates",
        "Accuracy falls with the pool; how fast says more than one number.",
    ),
    "umap": (
        "Embeddings",
        "Do brain embeddings lie where those of their images lie? Distances between clusters mean little.",
    ),
    "training_curves": (
        "Training",
        "A validation curve that rises while training falls is overfitting; the star is the best epoch.",
    ),
    "rois": ("Voxels", "Which regions went in, and how much of their signal repeats."),
}
ALPHA = 0.05

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - Percept</title>
<style>
:root { --ink: #1f2430; --soft: #5b6472; --line: #e3e6eb; --tint: #f6f7f9; --accent: #0072b2;
  --warn: #b45309; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { margin: 0 0 .3rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.8rem 0 .3rem; font-size: 1.25rem; }
p { max-width: 74ch; margin: .3rem 0 .9rem; }
.soft, figcaption, td small { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: .9rem 0 0; list-style: none; }
.facts li { padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 1rem;
  background: var(--tint); font-size: .9rem; }
.alarm { margin: 1.4rem 0; padding: .7rem 1rem; border-left: 5px solid var(--warn); background: #fef6e7; }
.alarm p { margin: .25rem 0; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; text-align: left; vertical-align: bottom; }
th, td { padding: .5rem .7rem .5rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
td small { display: block; font-size: .82rem; line-height: 1.35; }
td:first-child { min-width: 9.5rem; }
td.number { white-space: nowrap; }
td.score { font-weight: 650; color: var(--accent); }
td.score small { font-weight: 400; }
figure { margin: .8rem 0 0; }
figure img { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
dd ul { margin: 0; padding: 0; list-style: none; }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
</style></head><body><main>
<h1>{{ title }}</h1>
<p class="soft">What a person saw, reconstructed and retrieved from brain activity.</p>
<ul class="facts">{% for fact in facts %}<li>{{ fact }}</li>{% endfor %}</ul>
{% if alarms %}<div class="alarm" role="alert"><strong>Look at this before the scores</strong>
{% for alarm in alarms %}<p>{{ alarm }}</p>{% endfor %}</div>{% endif %}

{% macro picture(figure) %}<h2>{{ figure.heading }}</h2>
{% if figure.note %}<p class="soft">{{ figure.note }}</p>{% endif %}
<figure><img alt="{{ figure.heading }}" src="data:image/png;base64,{{ figure.data }}"></figure>{% endmacro %}
{% for figure in figures if figure.name == "contact_sheet" %}{{ picture(figure) }}{% endfor %}

<h2>Scores</h2>
<p class="soft">Mean over the test images, below it the 95 % bootstrap interval over images.
A score means something only between its floors and its ceiling.</p>
<div class="wide"><table id="scores"><thead><tr><th>metric</th><th>this system</th>
{% for name in floors %}<th>{{ name | words }}</th>{% endfor %}
<th>ceiling</th><th>reading</th></tr></thead><tbody>
{% for record in records %}<tr>
<td><strong>{{ record.name | words }}</strong>
<span class="soft">{{ "lower is better" if record.better == "lower" else "" }}</span>
<small>{{ record.description }}{% if record.source %} ({{ record.source }}){% endif %}</small></td>
<td class="number score">{{ record | score }}</td>
{% for name in floors %}<td class="number">{{ record.floors.get(name) | score }}</td>{% endfor %}
{% if record.ceiling.not_applicable %}<td><small>none: {{ record.ceiling.not_applicable }}</small></td>
{% else %}<td class="number">{{ record.ceiling | score }}</td>{% endif %}
<td><small>{{ record | reading }}</small></td></tr>
{% endfor %}</tbody></table></div>
<dl>{% for name, meaning in meanings.items() %}
<dt>{{ name | words }}</dt><dd class="soft">{{ meaning }}</dd>{% endfor %}</dl>
{% for figure in figures if figure.name == "scores" %}{{ picture(figure) }}{% endfor %}

{% if retrieval %}<h2>Retrieval</h2>
<p class="soft">Image from brain: given the brain response, find the image among the candidates.
Brain from image: given the image, find the brain response. The MindEye scripts name the two the other way
round; their names stand beside ours. The intervals are over random pools of candidates, as in the papers.</p>
<div class="wide"><table id="retrieval"><thead><tr>
{% for column in retrieval[0] %}<th>{{ column | words }}</th>{% endfor %}</tr></thead><tbody>
{% for row in retrieval %}<tr>
{% for value in row.values() %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% for figure in figures if figure.name not in ("contact_sheet", "scores") %}{{ picture(figure) }}{% endfor %}

<h2>What was chosen, and on which data</h2>
{% if selection %}
<p class="soft">Every choice between alternatives. Nothing may be chosen on the test images.</p>
<div class="wide"><table id="selection"><thead><tr>
{% for key in selection_keys %}<th>{{ key | words }}</th>{% endfor %}</tr></thead><tbody>
{% for choice in selection %}<tr>
{% for key in selection_keys %}<td>{{ choice.get(key, "") }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% else %}<p>Nothing was chosen: the run was scored as configured.</p>{% endif %}
{% if differences %}
<h2>Network against ridge</h2>
<p class="soft">Paired differences over the same test images, positive where the network is better, with their 95 % bootstrap intervals.</p>
<div class="wide"><table id="differences"><thead><tr><th>metric</th><th>difference</th><th>p</th><th>better</th></tr></thead><tbody>
{% for d in differences %}<tr><td>{{ d.get("split", "") }} {{ d.metric | words }}</td>
<td>{{ "%+.3f" | format(d.value) }} <small>[{{ "%+.3f" | format(d.low) }}, {{ "%+.3f" | format(d.high) }}]</small></td>
<td>{{ "%.3f" | format(d.p) }}</td><td>{{ d.better }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}

<h2>Provenance</h2>
<dl>{% for key, value in provenance.items() %}<dt>{{ key | words }}</dt><dd>{% if value is mapping %}<ul>
{% for k, v in value.items() %}<li>{{ k }}: {{ v }}</li>{% endfor %}</ul>
{% else %}{{ value }}{% endif %}</dd>{% endfor %}</dl>
</main></body></html>
"""


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _score(entry: dict[str, Any] | None) -> Markup:
    """A value over its interval."""
    if not entry:
        return Markup("-")
    value, low, high = (f"{entry[key]:.3f}" for key in ("value", "low", "high"))
    return Markup("{}<small>[{}, {}]</small>").format(value, low, high)


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


def _figures(folder: Path) -> list[dict[str, str]]:
    """The PNG files of a folder with heading, note and base64 data.

    Known ones first, in their order, then the others by name.
    """
    paths = {path.stem: path for path in sorted([*folder.glob("figures/*.png"), *folder.glob("*.png")])}
    order = [name for name in FIGURES if name in paths] + [name for name in paths if name not in FIGURES]
    figures = []
    for name in order:
        heading, note = FIGURES.get(name, (_words(name), ""))
        data = base64.b64encode(paths[name].read_bytes()).decode()
        figures.append({"name": name, "heading": heading, "note": note, "data": data})
    return figures


def _retrieval(folder: Path) -> list[dict[str, str]]:
    """The rows of retrieval.parquet as text, none without the file."""
    path = folder / "retrieval.parquet"
    if not path.exists():
        return []
    rows = []
    for row in pd.read_parquet(path).to_dict("records"):
        rows.append({str(k): f"{v:.3f}" if isinstance(v, float) else _words(v) for k, v in row.items()})
    return rows


def _facts(records: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> list[str]:
    """One-line facts of the head of the page."""
    tests = dict.fromkeys((r["protocol"], r["test_set"], r["n"]) for r in records)
    facts = [f"recipe {provenance['recipe']}"]
    return facts + [
        f"protocol {protocol}, test set {test_set}, {n} images" for protocol, test_set, n in tests
    ]


def write_report(results_folder: str | Path) -> Path:
    """Write report.html beside the metrics.json of a run.

    Args:
        results_folder: results/<run>; reads metrics.json, retrieval.parquet if there is one (the table of
            `retrieval.published_protocol` or `retrieval_by_pool_size`), and every PNG; the names in `FIGURES`
            get a place and a note, others follow.

    Returns:
        Path of the page.

    Raises:
        PerceptError: there is no metrics.json.
    """
    folder = Path(results_folder)
    if not (folder / "metrics.json").exists():
        raise PerceptError(
            f"There is no metrics.json in {folder}; run the metrics stage (06) of this run first."
        )
    content = read_json(folder / "metrics.json")
    records, provenance = content["metrics"], dict(content["provenance"])
    selection, alarms = provenance.pop("selection", []), provenance.pop("alarms", [])
    differences = provenance.pop("differences", [])
    floors = list(dict.fromkeys(name for record in records for name in record["floors"]))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"words": _words, "score": _score, "reading": _reading}
    page = environment.from_string(_PAGE).render(
        title=provenance.get("run", folder.resolve().name),
        facts=_facts(records, provenance),
        alarms=alarms,
        figures=_figures(folder),
        records=records,
        floors=floors,
        meanings={name: CONTROLS[name] for name in [*floors, "ceiling"] if name in CONTROLS},
        retrieval=_retrieval(folder),
        selection=selection,
        differences=differences,
        selection_keys=list(dict.fromkeys(key for choice in selection for key in choice)),
        provenance=provenance,
    )
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"
