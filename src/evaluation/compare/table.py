"""The table of a comparison for a reader: as text, as HTML in a notebook, and in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from src.evaluation.compare.differences import COLUMNS, clear_best
from src.evaluation.compare.runs import HELD_OUT, NO_BRAIN, ScoredRun
from src.evaluation.records import BASELINES
from src.evaluation.statistics import Interval
from src.evaluation.tables import display_name

BLOCK = 6  # metrics side by side in a table

ALL = slice(None)

Scores = Mapping[tuple[str, str, str], Interval]  # by run, condition and metric

HTML_NOTE = (
    "Bold: better than the second best, paired. Italic: floors and the ceiling, each from"
    " the run where it is strongest. ↓ lower is better."
)
LATEX_NOTE = (
    "Bold: the paired difference to the second best excludes 0. Floors and the ceiling are those"
    " of the run where they are strongest."
)

CELL_STYLE = 'style="text-align:right;vertical-align:top;white-space:nowrap"'
HEAD_STYLE = 'style="text-align:right;vertical-align:bottom"'
LABEL_STYLE = "text-align:left;white-space:nowrap;vertical-align:top;"
RULE_STYLE = 'style="border-top:1px solid #6b7280;padding:0"'

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$\dagger$",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        label: what it is a line of.
        cells: scores (metrics,), none where there is no score.
        bold: (metrics,), whether a score is clearly the best.
        is_first: whether it is the first line of a run.
    """

    label: str
    cells: list[Interval | None]
    bold: list[bool]
    is_first: bool = False


class Table:
    """The table for a reader: a line a run, beneath each its other decoders, beneath all the
    baselines and the upper bound; a column a metric.

    Baselines and upper bounds that differ between runs are those of the run where they are
    strongest: what any score here must pass, and the most that any generator here could give. All
    of them stand in the tidy table.

    Args:
        runs: comparable ones.
        tidy: of `comparison`.
        metrics: columns, in order.
        condition: the one of each run that stands first.
        seed: of the bootstrap that decides what is bold.
    """

    def __init__(
        self,
        runs: Sequence[ScoredRun],
        tidy: pd.DataFrame,
        metrics: Sequence[str],
        condition: str = "system",
        seed: int = 0,
    ):
        self.metrics = list(metrics)
        self.better = dict(zip(tidy["metric"], tidy["better"], strict=True))
        scores = _index_scores(tidy)
        self.body = self._make_body(runs, scores, condition, seed)
        self.controls = self._make_controls(runs, scores, condition)
        self.caption = _write_caption(runs, tidy, self.metrics)

    def _make_body(
        self, runs: Sequence[ScoredRun], scores: Scores, condition: str, seed: int
    ) -> list[Line]:
        """The lines of the runs and of their other decoders."""
        conditions = {}
        for run in runs:
            further = [name for name in ("system", *run.decoders) if name != condition]
            conditions[run.name] = [condition, *further]
        best = {metric: clear_best(runs, metric, conditions, seed) for metric in self.metrics}
        body = []
        for run in runs:
            for name in conditions[run.name]:
                is_first = name == condition
                label = _label_run(run, condition) if is_first else display_name(name)
                cells = [scores.get((run.name, name, metric)) for metric in self.metrics]
                bold = [best[metric] == (run.name, name) for metric in self.metrics]
                body.append(Line(label, cells, bold, is_first))
        return body

    def _make_controls(
        self, runs: Sequence[ScoredRun], scores: Scores, condition: str
    ) -> list[Line]:
        """The lines of baselines and upper bound."""
        lines = []
        for name in (*BASELINES, "chance", *NO_BRAIN, "ceiling"):
            if name != condition:
                cells = [self._find_strongest(runs, scores, name, m) for m in self.metrics]
                lines.append(Line(display_name(name), cells, [False] * len(cells)))
        return lines

    def _find_strongest(
        self, runs: Sequence[ScoredRun], scores: Scores, condition: str, metric: str
    ) -> Interval | None:
        """The best score of a control among the runs."""
        keys = [(run.name, condition, metric) for run in runs]
        cells = [scores[key] for key in keys if key in scores]
        sign = 1 if self.better.get(metric) == "higher" else -1
        return max(cells, key=lambda cell: sign * cell.value) if cells else None

    def _list_blocks(self) -> Iterator[slice]:
        return (slice(start, start + BLOCK) for start in range(0, len(self.metrics), BLOCK))

    def _list_controls(self, block: slice) -> list[Line]:
        """Baselines and upper bound that a block of metrics has."""
        return [line for line in self.controls if any(line.cells[block])]

    def _list_heads(self, block: slice) -> list[str]:
        """Names of the metrics of a block, with an arrow where lower is better."""
        heads = []
        for metric in self.metrics[block]:
            arrow = " ↓" if self.better[metric] == "lower" else ""
            heads.append(display_name(metric) + arrow)
        return heads

    def __repr__(self) -> str:
        rows = []
        for line in self.body:
            label = line.label if line.is_first else f"  {line.label}"
            rows.append([label, *map(format_cell, line.cells)])
        for line in self._list_controls(ALL):
            rows.append([line.label, *map(format_cell, line.cells)])
        table = pd.DataFrame(rows, columns=["", *self._list_heads(ALL)])
        return f"{table.to_string(index=False)}\n{self.caption}"

    def _repr_html_(self) -> str:
        tables = "".join(self._format_html_block(block) for block in self._list_blocks())
        return f"{tables}<p><small>{escape(self.caption)} {HTML_NOTE}</small></p>"

    def _format_html_block(self, block: slice) -> str:
        heads = self._list_heads(block)
        cells = "".join(f"<th {HEAD_STYLE}>{escape(head)}</th>" for head in heads)
        lines = []
        for line in self.body:
            look = "font-weight:600" if line.is_first else "padding-left:1.6em"
            lines.append(_format_html_line(line, block, look))
        lines.append(f'<tr><td colspan="{1 + len(heads)}" {RULE_STYLE}></td></tr>')
        for line in self._list_controls(block):
            lines.append(_format_html_line(line, block, "font-style:italic"))
        head = f"<thead><tr><th></th>{cells}</tr></thead>"
        return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"

    def latex(self) -> str:
        """The table in LaTeX, for the package booktabs; blocks of `BLOCK` metrics stand one below
        the other.
        """
        lines = [r"% needs \usepackage{booktabs}", r"\begin{table*}", r"\centering\small"]
        for block in self._list_blocks():
            lines += self._format_latex_block(block)
        caption = tex(f"{self.caption} {LATEX_NOTE}")
        return "\n".join([*lines[:-2], rf"\caption{{{caption}}}", r"\end{table*}", ""])

    def _format_latex_block(self, block: slice) -> list[str]:
        heads = []
        for metric in self.metrics[block]:
            arrow = r" $\downarrow$" if self.better[metric] == "lower" else ""
            heads.append(tex(display_name(metric)) + arrow)
        lines = [
            rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
            r"\toprule",
            _join_latex(["", *heads]),
            r"\midrule",
        ]
        for line in self.body:
            label = tex(line.label) if line.is_first else r"\quad " + tex(line.label)
            lines.append(_join_latex([label, *_format_latex_cells(line, block)]))
        lines.append(r"\midrule")
        for line in self._list_controls(block):
            label = rf"\textit{{{tex(line.label)}}}"
            lines.append(_join_latex([label, *_format_latex_cells(line, block)]))
        return [*lines, r"\bottomrule", r"\end{tabular}", "", r"\medskip"]


def _index_scores(tidy: pd.DataFrame) -> Scores:
    """Value and interval by run, condition and metric."""
    scores = {}
    for run, condition, metric, *numbers in tidy[COLUMNS[:6]].itertuples(index=False):
        scores[run, condition, metric] = Interval(*numbers)
    return scores


def _label_run(run: ScoredRun, condition: str) -> str:
    """The name of a run, with the condition that is shown and a dagger for held-out clusters."""
    label = run.name
    if condition != "system":
        label += f" ({display_name(condition)})"
    if run.protocol.endswith(HELD_OUT):
        label += " †"
    return label


def _write_caption(runs: Sequence[ScoredRun], tidy: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Protocol, test set and number of images, and what the lines and dashes mean."""
    counts = sorted(set(tidy["n"]))
    number = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    protocols = ", ".join(dict.fromkeys(run.protocol for run in runs))
    caption = (
        f"Protocol {protocols}; test set {runs[0].test_set}; {number} images; mean and 95 %"
        " bootstrap interval over images."
    )
    if any(run.protocol.endswith(HELD_OUT) for run in runs):
        caption += " † trained without a quarter of the clusters of images."
    if any(set(NO_BRAIN) & set(run.conditions) for run in runs):
        caption += " Autoencoder: the true low-level latents, decoded."
    for reason, names in _collect_reasons(runs, metrics).items():
        caption += f" No ceiling of {', '.join(names)}: {reason}."
    return caption


def _collect_reasons(
    runs: Sequence[ScoredRun], metrics: Sequence[str]
) -> dict[str, dict[str, None]]:
    """Names of the metrics without an upper bound, by the reason for that, in order."""
    reasons: dict[str, dict[str, None]] = {}
    for metric in metrics:
        for run in runs:
            ceiling = run.records[metric]["ceiling"] if metric in run.records else {}
            reason = ceiling.get("not_applicable")
            if reason:
                reasons.setdefault(reason, {})[display_name(metric)] = None
    return reasons


def format_cell(cell: Interval | None) -> str:
    """ "0.844 [0.839, 0.850]", or a dash."""
    return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]" if cell else "–"


def _format_html_line(line: Line, block: slice, look: str) -> str:
    cells = "".join(
        f"<td {CELL_STYLE}>{_format_html_cell(cell, bold)}</td>"
        for cell, bold in zip(line.cells[block], line.bold[block], strict=True)
    )
    label = f'<td style="{LABEL_STYLE}{look}">{escape(line.label)}</td>'
    return f"<tr>{label}{cells}</tr>"


def _format_html_cell(cell: Interval | None, bold: bool) -> str:
    if not cell:
        return "–"
    value = f"<b>{cell.value:.3f}</b>" if bold else f"{cell.value:.3f}"
    interval = f"[{cell.low:.3f}, {cell.high:.3f}]"
    return f'{value}<br><small style="color:#6b7280">{interval}</small>'


def _join_latex(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _format_latex_cells(line: Line, block: slice) -> list[str]:
    pairs = zip(line.cells[block], line.bold[block], strict=True)
    return [_format_latex_cell(cell, bold) for cell, bold in pairs]


def _format_latex_cell(cell: Interval | None, bold: bool) -> str:
    if not cell:
        return "--"
    value = rf"\textbf{{{cell.value:.3f}}}" if bold else f"{cell.value:.3f}"
    return rf"{value} {{\scriptsize [{cell.low:.3f}, {cell.high:.3f}]}}"


def tex(text: str) -> str:
    """Text with everything escaped that LaTeX would read as a command."""
    pattern = "|".join(map(re.escape, LATEX_ESCAPES))
    return re.sub(pattern, lambda match: LATEX_ESCAPES[match.group()], text)
