"""Results of several runs on the same test images, held against each other.

- Only what was scored on the same pictures is compared (`select_same_images`); differences are taken
  image by image.
- One tidy table of all scores (`comparison`), from which the table for a reader, LaTeX and the
  figures are made.
- Questions that need runs trained for them: scores by the number of voxel components, and what is
  lost on images whose relatives were not trained (docs/overlap.md); scores by the number of
  training sessions, and what pretraining on other subjects adds (docs/sweeps.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.records import BASELINES, CONTROLS
from src.evaluation.sanity_checks import check_same_test
from src.evaluation.statistics import CONFIDENCE, Difference, bootstrap_mean, paired_bootstrap
from src.utils import PerceptError, read_json

COLUMNS = [
    "run",
    "row",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "protocol",
    "test_set",
    "better",
]  # of comparison.csv

BLOCK = 6  # metrics side by side in a table

BESIDE = ("autoencoder",)  # a row that no brain takes part in: the low level's own ceiling

TRAININGS = (
    "02_train_roi_models",
    "01_train_high_level",
    "01_train_mindeye2",
    "01_train_combined",
    "02_train_basic_autoencoder",
)  # one tells of the training

SWEPT = (
    "n_components",
    "num_sessions",
)  # parameters of a training that curves are drawn over, 0 for all there is

HELD_OUT = "+cluster-held-out"  # what the protocol of such a run ends in


@dataclass(frozen=True)
class Scored:
    """A run with its scores.

    Attributes: name; records of metrics.json by metric; scores, the table of scores.parquet;
    pixels, identity of the test pictures ("" where
        not recorded); trained, parameters of its training by name (none for reconstructions made
        elsewhere); resizing, of pictures before scoring.
    """

    name: str
    records: dict[str, dict[str, Any]]
    scores: pd.DataFrame
    pixels: str
    trained: dict[str, Any]
    resizing: str = ""

    @property
    def test_set(self) -> str:
        """Id of the test set."""
        return str(next(iter(self.records.values()))["test_set"])

    @property
    def protocol(self) -> str:
        """Name of the data protocol."""
        return str(next(iter(self.records.values()))["protocol"])

    @property
    def rows(self) -> list[str]:
        """Rows of the scores, e.g. system, ridge, shuffled."""
        return list(dict.fromkeys(self.scores["row"]))

    @property
    def decoders(self) -> list[str]:
        """Rows that decode the brain in another way: neither the system, nor a control, nor the
        system with fewer repeats.
        """
        return [
            row
            for row in self.rows
            if row not in CONTROLS and row not in BESIDE and not row.startswith("repeats_")
        ]

    def values(self, metric: str, row: str = "system") -> pd.Series:
        """Scores (n,) indexed by image; those of several draws are averaged.

        Empty where there are none.
        """
        mine = self.scores[(self.scores["metric"] == metric) & (self.scores["row"] == row)]
        return mine.groupby("image", sort=False)["value"].mean()

    def decoded(self) -> dict[str, str]:
        """Row of the scores by decoder that was trained: {"network": "system", "ridge": "ridge"},
        or {"ridge": "system"}.
        """
        decoder = str(self.trained.get("decoder", ""))
        return (
            {"network": "system", "ridge": "ridge"}
            if decoder == "both"
            else {decoder: "system"}
            if decoder
            else {}
        )


def _scored(folder: Path, name: str) -> Scored | None:
    """The scores of a run; none where it has not been scored."""
    if not (folder / "metrics.json").exists() or not (folder / "scores.parquet").exists():
        return None
    content, scores = read_json(folder / "metrics.json"), pd.read_parquet(folder / "scores.parquet")
    if not {"metric", "row", "image", "value"} <= set(scores.columns):
        return None
    known = set(scores["metric"])
    records = {
        record["name"]: record for record in content["metrics"] if record["name"] in known
    }  # "top1 (ridge)" is a row of top1
    if not records:
        return None
    told = [
        path
        for path in (folder / "parameters" / f"{stage}.json" for stage in TRAININGS)
        if path.exists()
    ]
    trained = {name: entry["value"] for name, entry in read_json(told[0]).items()} if told else {}
    about = content["provenance"]
    tested, resizing = (
        about.get("test_set"),
        str(about.get("settings", {}).get("resizing", "")).split(":")[0],
    )
    return Scored(
        name,
        records,
        scores,
        str(tested.get("pixels", "")) if isinstance(tested, dict) else "",
        trained,
        resizing,
    )


def read_runs(results: str | Path, runs: str = "") -> list[Scored]:
    """All runs under results/ that have scores, by name, or those that are named, in that order.

    Args:
        results: the folder that holds a folder a run.
        runs: names separated by commas, "" for all. A point of a sweep is <sweep>/<label>; * stands
            for any letters, so that <sweep>/* are its points.

    Raises:
        PerceptError: a named run has no scores, or nothing has.
    """
    results = Path(results)
    names = list(dict.fromkeys(part.strip(" /") for part in runs.split(",") if part.strip(" /")))
    found: dict[str, Scored] = {}
    for wanted in names or ["*"]:
        scored = {
            (own := folder.relative_to(results).as_posix()): _scored(folder, own)
            for folder in sorted(results.glob(f"{wanted}/"))
        }
        if names and not any(scored.values()):
            known = (
                ", ".join(sorted(folder.parent.name for folder in results.glob("*/metrics.json")))
                or "none"
            )
            raise PerceptError(
                f"{results / wanted} holds no scores (metrics.json and scores.parquet of notebook"
                f" 06); runs with scores: {known}."
            )
        found |= {own: run for own, run in scored.items() if run and own not in found}
    if not found:
        raise PerceptError(
            f"There are no scores under {results} to compare: run `python run.py mindeye --mini`"
            " first."
        )
    return list(found.values())


def select_same_images(
    runs: Sequence[Scored], test_set: str = "", refuse: bool = False
) -> tuple[list[Scored], list[str]]:
    """The runs that were scored on one test set, with images numbered alike.

    Test sets are the same where their ids are, or where the pictures are: reconstructions that were
    made elsewhere number their images by place, and take the ids of the run whose pictures they
    share.

    Args:
        runs: of `read_runs`.
        test_set: id of the test set, "" for that of most runs.
        refuse: whether runs of another test set are an error; otherwise they are left out.

    Returns:
        The comparable runs, and a sentence that names those left out, none when all are kept.

    Raises:
        PerceptError: no run has the test set; or, with refuse, test sets differ.
    """
    own = {
        run.pixels: run.test_set
        for run in reversed(runs)
        if run.pixels and run.test_set != run.pixels
    }
    ids = {run.name: own.get(run.pixels or run.test_set, run.test_set) for run in runs}
    wanted = own.get(test_set, test_set) or max(
        dict.fromkeys(ids.values()), key=list(ids.values()).count
    )
    alarms = check_same_test(ids)
    if wanted not in ids.values():
        raise PerceptError(
            f"No run was scored on the test set {wanted}: choose among"
            f" {', '.join(dict.fromkeys(ids.values()))}."
        )
    if alarms and refuse:
        raise PerceptError(alarms[0])
    kept, out = (
        [run for run in runs if ids[run.name] == wanted],
        [run.name for run in runs if ids[run.name] != wanted],
    )
    if out:
        alarms = [f"{alarms[0]} Left out: {', '.join(out)}; compared are those of {wanted}."]
    first = next((run for run in kept if run.test_set == wanted), kept[0])
    return [run if run.test_set == wanted else _renumbered(run, first) for run in kept], (
        alarms if out else []
    )


def _order(run: Scored) -> np.ndarray:
    """Image ids in the order of the pictures: that in which a metric of all images was written."""
    per_metric = [
        part["image"].to_numpy()
        for _, part in run.scores[run.scores["row"] == "system"].groupby(
            ["stage", "metric"], sort=False
        )
    ]
    return max(reversed(per_metric), key=len)  # the pictures' stage is the last


def _renumbered(run: Scored, like: Scored) -> Scored:
    """A run of the same pictures under other ids, with the ids of `like`."""
    theirs, ours = _order(run), _order(like)
    if len(theirs) != len(ours):
        raise PerceptError(
            f"{run.name} and {like.name} are said to have the same pictures, but have {len(theirs)}"
            f" and {len(ours)}: score both again."
        )
    scores = run.scores.assign(image=run.scores["image"].map(dict(zip(theirs, ours, strict=True))))
    return replace(run, scores=scores)


def choose_metrics(runs: Sequence[Scored], metrics: str = "", row: str = "system") -> list[str]:
    """The metrics to show: those named (separated by commas), else all that every run has.

    Raises:
        PerceptError: no run has one that is named, or the runs have none in common.
    """
    has = [[name for name in run.records if len(run.values(name, row))] for run in runs]
    everything = list(dict.fromkeys(name for names in has for name in names))
    wanted = [part.strip() for part in metrics.split(",") if part.strip()]
    if unknown := [name for name in wanted if name not in everything]:
        raise PerceptError(
            f"No run has the metric {unknown[0]!r} of '{row}': choose among"
            f" {', '.join(everything) or 'none'}."
        )
    common = wanted or [name for name in everything if all(name in names for names in has)]
    if not common:
        raise PerceptError(
            f"The runs {', '.join(run.name for run in runs)} have no metric of '{row}' in common:"
            " name some in `metrics`, or fewer runs."
        )
    return common


def missing_metrics(
    runs: Sequence[Scored], metrics: Sequence[str], row: str = "system"
) -> list[str]:
    """A sentence for each run that has fewer metrics than others, so that a run that was not
    finished does not shorten the table unseen.
    """
    everything = list(
        dict.fromkeys(name for run in runs for name in run.records if len(run.values(name, row)))
    )
    out = [name for name in everything if name not in metrics]
    gaps = {
        run.name: [name for name in everything if not len(run.values(name, row))] for run in runs
    }
    told = [f"{run} lacks {len(names)}" for run, names in gaps.items() if names]
    return (
        [f"Not shown, as not every run has them: {', '.join(out)} ({', '.join(told)})."]
        if out and told
        else []
    )


def setting_differences(runs: Sequence[Scored]) -> list[str]:
    """A sentence where runs were scored under different settings, e.g. of resizing, which moves
    scores by itself; else none.
    """
    by_setting: dict[str, list[str]] = {}
    for run in runs:
        by_setting.setdefault(run.resizing or "not recorded", []).append(run.name)
    if len(by_setting) < 2:
        return []
    groups = "; ".join(f"{setting}: {', '.join(names)}" for setting, names in by_setting.items())
    return [
        f"These runs' pictures were resized in {len(by_setting)} ways before they were scored"
        f" ({groups}): score them again with one `resizing`."
    ]


def comparison(runs: Sequence[Scored], metrics: Sequence[str]) -> pd.DataFrame:
    """All scores of some metrics, one line a run, row and metric: `COLUMNS`.

    Values and intervals of the system, its floors and its ceiling are those of metrics.json; those
    of other rows are computed in the same way from scores.parquet (`results.bootstrap_mean`).
    """
    lines = []
    for run in runs:
        for metric in (name for name in metrics if name in run.records):
            record = run.records[metric]
            entries = {"system": record} | record["floors"] | {"ceiling": record["ceiling"]}
            entries |= {
                row: bootstrap_mean(values)._asdict()
                for row in run.rows
                if row not in entries and len(values := run.values(metric, row))
            }
            known = {
                row: [entry[k] for k in ("value", "low", "high")]
                for row, entry in entries.items()
                if "value" in entry
            }
            more = [record["n"], run.protocol, run.test_set, record["better"]]
            lines += [[run.name, row, metric, *numbers, *more] for row, numbers in known.items()]
    return pd.DataFrame(lines, columns=COLUMNS)


def is_paired(a: pd.Series, b: pd.Series) -> bool:
    """Whether two series of scores (n,) are of the same images."""
    return len(a) > 0 and len(a) == len(b) and set(a.index) == set(b.index)


def paired_difference(a: pd.Series, b: pd.Series, seed: int = 0) -> Difference:
    """`results.paired_bootstrap` of a - b, both (n,) indexed by image, over the same images in the
    order of their ids.
    """
    a = a.sort_index()
    return paired_bootstrap(a.to_numpy(), b.loc[a.index].to_numpy(), seed=seed)


def classify_difference(found: Difference, better: str) -> str:
    """ "better", "worse", or "undecided" where the interval includes 0."""
    if found.low <= 0 <= found.high:
        return "undecided"
    return "better" if (found.low > 0) == (better == "higher") else "worse"


def differences(
    runs: Sequence[Scored],
    metrics: Sequence[str],
    baseline: str,
    row: str = "system",
    seed: int = 0,
) -> pd.DataFrame:
    """Paired differences of every run to the baseline on the same images.

    Returns: [run, baseline, row, metric, value, low, high, p, n, verdict], value being run -
    baseline; a metric that two runs have on
        different images has no line.

    Raises:
        PerceptError: there is no such baseline.
    """
    by_name = {run.name: run for run in runs}
    if baseline not in by_name:
        raise PerceptError(
            f"The baseline {baseline!r} is not among the runs that are compared: choose one of"
            f" {', '.join(by_name)}."
        )
    lines = []
    for run in (run for run in runs if run.name != baseline):
        for metric in metrics:
            mine, other = run.values(metric, row), by_name[baseline].values(metric, row)
            if is_paired(mine, other):
                found = paired_difference(mine, other, seed)
                lines.append(
                    [
                        run.name,
                        baseline,
                        row,
                        metric,
                        *found,
                        len(mine),
                        classify_difference(found, run.records[metric]["better"]),
                    ]
                )
    return pd.DataFrame(
        lines,
        columns=["run", "baseline", "row", "metric", "value", "low", "high", "p", "n", "verdict"],
    )


def clear_best(
    runs: Sequence[Scored], metric: str, rows: Mapping[str, Sequence[str]], seed: int = 0
) -> tuple[str, str] | None:
    """The (run, row) with the best mean, if its paired difference to the second best excludes 0.

    Args:
        runs: comparable ones.
        metric: of these.
        rows: rows by run that take part.
        seed: of the bootstrap.
    """
    found = [(run.name, row, run.values(metric, row)) for run in runs for row in rows[run.name]]
    found = [entry for entry in found if len(entry[2])]
    higher = (
        next(run.records[metric]["better"] for run in runs if metric in run.records) == "higher"
    )
    found.sort(key=lambda entry: entry[2].mean(), reverse=higher)
    if len(found) < 2 or not is_paired(found[0][2], found[1][2]):
        return None
    told = paired_difference(found[0][2], found[1][2], seed)
    return None if told.low <= 0 <= told.high else found[0][:2]


def display_name(name: str) -> str:
    """A row's name for a reader."""
    return name.replace("_", " ")


class Table:
    """The table for a reader: a line a run, beneath each its other decoders, beneath all the floors
    and the ceiling; a column a metric.

    Floors and ceilings that differ between runs are given from the run where they are strongest:
    what any score here must pass, and the most that any generator here could give. All of them
    stand in the tidy table.

    Args:
        runs: comparable ones.
        tidy: of `comparison`.
        metrics: columns, in order.
        row: the row of each run that stands first.
        seed: of the bootstrap that decides what is bold.
    """

    def __init__(
        self,
        runs: Sequence[Scored],
        tidy: pd.DataFrame,
        metrics: Sequence[str],
        row: str = "system",
        seed: int = 0,
    ):
        self.metrics, self.better = (
            list(metrics),
            dict(zip(tidy["metric"], tidy["better"], strict=True)),
        )
        first = runs[0]
        counts = sorted(set(tidy["n"]))
        number = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
        protocols = ", ".join(dict.fromkeys(run.protocol for run in runs))
        self.caption = (
            f"Protocol {protocols}; test set {first.test_set}; {number} images; mean and 95 %"
            " bootstrap interval over images."
        )
        cells = {
            (r, w, m): (v, low, high)
            for r, w, m, v, low, high in tidy[COLUMNS[:6]].itertuples(index=False)
        }
        rows = {
            run.name: [row, *(w for w in ("system", *run.decoders) if w != row)] for run in runs
        }
        best = {metric: clear_best(runs, metric, rows, seed) for metric in metrics}
        self.body: list[
            tuple[str, bool, list[Any], list[bool]]
        ] = []  # label, whether it is a run's first line, cells, bold
        for run in runs:
            for w in rows[run.name]:
                mark = ("" if row == "system" else f" ({display_name(row)})") + (
                    " †" if run.protocol.endswith(HELD_OUT) else ""
                )
                label = run.name + mark if w == row else display_name(w)
                self.body.append(
                    (
                        label,
                        w == row,
                        [cells.get((run.name, w, m)) for m in metrics],
                        [best[m] == (run.name, w) for m in metrics],
                    )
                )
        if any(run.protocol.endswith(HELD_OUT) for run in runs):
            self.caption += " † trained without a quarter of the clusters of images."
        if any(set(BESIDE) & set(run.rows) for run in runs):
            self.caption += " Autoencoder: the true low-level latents, decoded."
        self.controls = [
            (display_name(w), [self._strongest(cells, runs, w, m) for m in metrics])
            for w in (*BASELINES, "chance", *BESIDE, "ceiling")
            if w != row
        ]
        reasons: dict[str, list[str]] = {}
        for metric in metrics:
            for run in (run for run in runs if metric in run.records):
                if why := run.records[metric]["ceiling"].get("not_applicable"):
                    reasons[why] = list(
                        dict.fromkeys([*reasons.get(why, []), display_name(metric)])
                    )
        self.caption += "".join(
            f" No ceiling of {', '.join(names)}: {why}." for why, names in reasons.items()
        )

    def _strongest(
        self, cells: Mapping[Any, Any], runs: Sequence[Scored], row: str, metric: str
    ) -> Any:
        found = [cells[run.name, row, metric] for run in runs if (run.name, row, metric) in cells]
        sign = 1 if self.better.get(metric) == "higher" else -1
        return max(found, key=lambda cell: sign * cell[0]) if found else None

    def _blocks(self) -> Iterable[slice]:
        return (slice(i, i + BLOCK) for i in range(0, len(self.metrics), BLOCK))

    def _beneath(self, part: slice) -> list[tuple[str, list[Any]]]:
        """Floors and ceiling that a block has."""
        return [(label, cells[part]) for label, cells in self.controls if any(cells[part])]

    def _heads(self, part: slice) -> list[str]:
        return [
            display_name(name) + (" ↓" if self.better[name] == "lower" else "")
            for name in self.metrics[part]
        ]

    def __repr__(self) -> str:
        lines = [
            [label if head else f"  {label}", *map(format_cell, cells)]
            for label, head, cells, _ in self.body
        ]
        lines += [[label, *map(format_cell, cells)] for label, cells in self._beneath(slice(None))]
        return (
            pd.DataFrame(lines, columns=["", *self._heads(slice(None))]).to_string(index=False)
            + f"\n{self.caption}"
        )

    def _repr_html_(self) -> str:
        cell_style, head_style = (
            f'style="text-align:right;vertical-align:{place}"'
            for place in ("top;white-space:nowrap", "bottom")
        )

        def line(label: str, cells: Sequence[Any], bold: Sequence[bool], look: str) -> str:
            shown = "".join(
                f"<td {cell_style}>{_html(cell, strong)}</td>"
                for cell, strong in zip(cells, bold, strict=True)
            )
            return (
                "<tr><td"
                f' style="text-align:left;white-space:nowrap;vertical-align:top;{look}">{escape(label)}</td>{shown}</tr>'
            )

        parts = []
        for part in self._blocks():
            heads = "".join(f"<th {head_style}>{escape(head)}</th>" for head in self._heads(part))
            lines = [
                line(
                    label,
                    cells[part],
                    bold[part],
                    "font-weight:600" if head else "padding-left:1.6em",
                )
                for label, head, cells, bold in self.body
            ]
            plain = [False] * len(self.metrics[part])
            rule = (
                f'<tr><td colspan="{1 + len(self.metrics[part])}" style="border-top:1px solid'
                ' #6b7280;padding:0"></td></tr>'
            )
            lines += [
                rule,
                *(
                    line(label, cells, plain, "font-style:italic")
                    for label, cells in self._beneath(part)
                ),
            ]
            parts.append(
                f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
            )
        note = (
            "Bold: better than the second best, paired. Italic: floors and the ceiling, each from"
            " the run where it is strongest. ↓ lower is better."
        )
        return "".join(parts) + f"<p><small>{escape(self.caption)} {note}</small></p>"

    def latex(self) -> str:
        """The table in LaTeX, for the package booktabs; blocks of `BLOCK` metrics stand one below
        the other.
        """
        lines = [r"% needs \usepackage{booktabs}", r"\begin{table*}", r"\centering\small"]
        for part in self._blocks():
            count = len(self.metrics[part])
            heads = [
                tex(display_name(name)) + (r" $\downarrow$" if self.better[name] == "lower" else "")
                for name in self.metrics[part]
            ]
            lines += [
                rf"\begin{{tabular}}{{l{'r' * count}}}",
                r"\toprule",
                " & ".join(["", *heads]) + r" \\",
                r"\midrule",
            ]
            for label, head, cells, bold in self.body:
                told = [
                    _latex(cell, strong)
                    for cell, strong in zip(cells[part], bold[part], strict=True)
                ]
                lines.append(" & ".join([("" if head else r"\quad ") + tex(label), *told]) + r" \\")
            lines.append(r"\midrule")
            lines += [
                " & ".join([rf"\textit{{{tex(label)}}}", *(_latex(cell, False) for cell in cells)])
                + r" \\"
                for label, cells in self._beneath(part)
            ]
            lines += [r"\bottomrule", r"\end{tabular}", "", r"\medskip"]
        caption = (
            f"{self.caption} Bold: the paired difference to the second best excludes 0. Floors and"
            " the ceiling are those of the run where they are strongest."
        )
        return "\n".join([*lines[:-2], rf"\caption{{{tex(caption)}}}", r"\end{table*}", ""])


def format_cell(cell: Any) -> str:
    """ "0.844 [0.839, 0.850]", or a dash."""
    return f"{cell[0]:.3f} [{cell[1]:.3f}, {cell[2]:.3f}]" if cell else "–"


def _html(cell: Any, bold: bool) -> str:
    if not cell:
        return "–"
    value = f"<b>{cell[0]:.3f}</b>" if bold else f"{cell[0]:.3f}"
    return f'{value}<br><small style="color:#6b7280">[{cell[1]:.3f}, {cell[2]:.3f}]</small>'


def _latex(cell: Any, bold: bool) -> str:
    if not cell:
        return "--"
    value = rf"\textbf{{{cell[0]:.3f}}}" if bold else f"{cell[0]:.3f}"
    return rf"{value} {{\scriptsize [{cell[1]:.3f}, {cell[2]:.3f}]}}"


TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$\dagger$",
    "–": "--",
}

TEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def tex(text: str) -> str:
    """Text with everything escaped that LaTeX would read as a command."""
    return re.sub("|".join(map(re.escape, TEX)), lambda found: TEX[found.group()], text)


def curves(runs: Sequence[Scored], metrics: Sequence[str], by: str) -> pd.DataFrame:
    """Scores by the number of principal components that replaced the voxels, or of training
    sessions, for recipes and decoders with at least two such numbers.

    Runs that differ in another of `SWEPT` from what is usual, or that pretrain for others, take no
    part; of several runs of one curve and number the first speaks.

    Args:
        runs: comparable ones.
        metrics: of these.
        by: one of `SWEPT`.

    Returns: [curve, run, row, metric, `by`, value, low, high, better] of the decoders and of their
    runs' floors and ceilings (row, where "system" is the
        decoder); 0 stands for all voxels or sessions; ascending, these last. Empty where there is
        no such curve.
    """
    lines, seen = [], set()
    for run in sorted(
        runs, key=lambda run: run.trained.get("decoder") == "both"
    ):  # a run of one decoder speaks for it, before one of both
        for decoder, row in run.decoded().items():
            k, start = (
                int(run.trained.get(by, 0)),
                (
                    "pretrained "
                    if decoder == "network" and run.trained.get("multisubject_ckpt")
                    else ""
                ),
            )
            curve = f"{run.trained.get('recipe', '')}, {start}{decoder}"
            unusual = [run.trained.get(name) for name in (*SWEPT, "multi_subject") if name != by]
            if (
                run.trained.get("split", "images") != "images"
                or any(unusual)
                or (curve, k) in seen
                or row not in run.rows
            ):
                continue
            seen.add((curve, k))
            told = comparison([run], metrics)
            told = told[
                (told["row"] == row)
                | (told["row"].isin([*BASELINES, "chance", "ceiling"]) & (row == "system"))
            ]
            lines.append(
                told.assign(curve=curve, row=told["row"].replace(row, "system")).assign(**{by: k})
            )
    table = (
        pd.concat(lines, ignore_index=True)
        if lines
        else pd.DataFrame(columns=[*COLUMNS, "curve", by])
    )
    numbers = table.groupby("curve")[by].nunique()
    table = table[table["curve"].isin(numbers[numbers > 1].index)]
    table = table.iloc[
        np.lexsort(
            (table[by].replace(0, np.iinfo(np.int32).max).to_numpy(dtype=np.int64), table["curve"])
        )
    ]
    return table[
        ["curve", "run", "row", "metric", by, "value", "low", "high", "better"]
    ].reset_index(drop=True)


def smallest_sufficient(
    points: pd.DataFrame, runs: Sequence[Scored], seed: int = 0
) -> pd.DataFrame:
    """The fewest components from which on no number of them is worse than all voxels, in paired
    differences.

    Args:
        points: of `curves` by n_components.
        runs: those it was made of.
        seed: of the bootstrap.

    Returns: [curve, metric, not clearly worse than all voxels from]; curves without a run of all
    voxels are absent.
    """
    by_name, lines = {run.name: run for run in runs}, []
    for (curve, metric), part in points[points["row"] == "system"].groupby(
        ["curve", "metric"], sort=False
    ):
        decoder = str(curve).rsplit(", ", 1)[1]
        each = {
            k: by_name[name].values(str(metric), by_name[name].decoded()[decoder])
            for k, name in zip(part["n_components"], part["run"], strict=True)
        }
        few = sorted(
            (k for k in each if k and 0 in each and is_paired(each[k], each[0])), reverse=True
        )
        least = 0
        for k in few:
            if (
                classify_difference(
                    paired_difference(each[k], each[0], seed), part["better"].iloc[0]
                )
                == "worse"
            ):
                break
            least = k
        if few:
            lines.append([curve, metric, f"{least} components" if least else f"more than {few[0]}"])
    return pd.DataFrame(
        lines, columns=["curve", "metric", "not clearly worse than all voxels from"]
    )


def pretraining_gain(runs: Sequence[Scored], metrics: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """What a start from weights that were pretrained on other subjects adds: paired differences, on
    the same images, to the run that is alike in all but that.

    Alike are runs with the same values of all parameters of their training but `multisubject_ckpt`
    and the names of run and recipe.

    Args:
        runs: comparable ones.
        metrics: of these.
        seed: of the bootstrap.

    Returns: [run, plain, num_sessions, metric, value, low, high, p, n, verdict], value being run -
    plain; all sessions are 0, and last.
    """
    free, lines = ("multisubject_ckpt", "model_name", "recipe"), []
    for run in (run for run in runs if run.trained.get("multisubject_ckpt")):
        alike = {name: value for name, value in run.trained.items() if name not in free}
        plain = [
            other
            for other in runs
            if not other.trained.get("multisubject_ckpt")
            and {k: v for k, v in other.trained.items() if k not in free} == alike
        ]
        for other in plain[:1]:
            told = differences(
                [other, run],
                [name for name in metrics if name in run.records and name in other.records],
                other.name,
                seed=seed,
            )
            lines.append(
                told.assign(num_sessions=int(run.trained.get("num_sessions", 0))).rename(
                    columns={"baseline": "plain"}
                )
            )
    columns = [
        "run",
        "plain",
        "num_sessions",
        "metric",
        "value",
        "low",
        "high",
        "p",
        "n",
        "verdict",
    ]
    table = pd.concat(lines, ignore_index=True)[columns] if lines else pd.DataFrame(columns=columns)
    return table.sort_values(
        "num_sessions", key=lambda k: k.replace(0, np.iinfo(np.int32).max), kind="stable"
    ).reset_index(drop=True)


def held_out_pairs(runs: Sequence[Scored]) -> list[tuple[Scored, str, Scored, str]]:
    """(run without some clusters, row, plain run, row) of the same recipe, decoder and number of
    components.
    """
    pairs = []
    for run in (run for run in runs if run.trained.get("split") == "cluster-held-out"):
        for decoder, row in run.decoded().items():
            plain = [
                other
                for other in runs
                if other.trained.get("split", "") == "images"
                and decoder in other.decoded()
                and all(
                    other.trained.get(name) == run.trained.get(name)
                    for name in ("recipe", "n_components")
                )
            ]
            plain.sort(key=lambda other: other.trained["decoder"] != run.trained["decoder"])
            pairs += [
                (run, row, other, other.decoded()[decoder])
                for other in plain[:1]
                if row in run.rows and other.decoded()[decoder] in other.rows
            ]
    return pairs


def held_out_effect(
    without: Mapping[str, pd.Series],
    plain: Mapping[str, pd.Series],
    held_out: pd.Series,
    better: Mapping[str, str],
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a training without some clusters changes on test images of these clusters, and on the
    others.

    Changes are paired by image and signed so that a negative one is a loss, also for distances. The
    others are the control, since the training without clusters has fewer images; `effect` is the
    change on held-out clusters beyond that on kept ones (Shirakawa et al., arXiv 2405.10078, hold
    out clusters; the difference of differences is ours), its interval from resamples of either
    group of images.

    Args:
        without: scores (n,) by metric of the run trained without the clusters, indexed by image.
        plain: the same of the plain run.
        held_out: (n,) bool indexed by image, whether its cluster was held out.
        better: "higher" or "lower" by metric.
        n_boot: resamples.
        seed: of these.

    Returns: [metric, images, value, low, high, n] with images in held-out clusters, kept clusters,
    effect; metrics that are not paired are absent.

    Raises:
        PerceptError: all images are of one group.
    """
    if held_out.all() or not held_out.any():
        raise PerceptError(
            "Of these test images all or none are in held-out clusters: there is nothing to hold"
            " the change against."
        )
    lines, rng, tail = [], np.random.default_rng(seed), (1 - CONFIDENCE) / 2
    for metric, mine in without.items():
        if not is_paired(mine, plain[metric]) or not set(mine.index) <= set(held_out.index):
            continue
        mine = mine.sort_index()
        gain = (mine - plain[metric].loc[mine.index]).to_numpy() * (
            1 if better[metric] == "higher" else -1
        )  # (n,)
        out = held_out.loc[mine.index].to_numpy()
        if out.all() or not out.any():
            continue
        means = [
            gain[part][rng.integers(0, part.sum(), (n_boot, part.sum()))].mean(1)
            for part in (out, ~out)
        ]  # groups are resampled independently
        lines += [
            [metric, name, *bootstrap_mean(gain[part], n_boot, seed), int(part.sum())]
            for name, part in (("held-out clusters", out), ("kept clusters", ~out))
        ]
        low, high = np.quantile(means[0] - means[1], [tail, 1 - tail])
        lines.append(
            [
                metric,
                "effect",
                gain[out].mean() - gain[~out].mean(),
                float(low),
                float(high),
                len(gain),
            ]
        )
    return pd.DataFrame(lines, columns=["metric", "images", "value", "low", "high", "n"])
