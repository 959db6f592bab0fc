"""What stands beside a score, and how scores are stored: intervals, floors, ceilings, provenance
and alarms.

- Statistics are taken over images: a mean with its bootstrap interval, paired differences,
  permutations.
- One format for all scores (`add_results`): `scores.parquet`, a row per stage, metric, row of the
  table, image, sample and draw, and `metrics.json`, a record a metric. Every stage that scores adds
  its own part and leaves the others'.
- A score is not written without its floors and its ceiling.
- Alarms are sentences: what looks wrong, and why it matters.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.statistics import (
    _values,
    bootstrap_mean,
    derangements,
    paired_bootstrap,
    permutation_p,
)
from src.metrics import RESIZING, SIZE, Metric
from src.utils import PerceptError, atomic, progress, read_json, write_json

FLOORS = {
    "shuffled": (
        "the same reconstructions against other test images: what any plausible pictures score"
    ),
    "mean_image": "the mean training image for every test image: what one blurred picture scores",
    "mean_seen": (
        "the mean of the seen images themselves for every test image: one blurred picture that"
        " knows the truth"
    ),
    "other_recon": (
        "for each image the other reconstruction that looks most like its own: what knowing the"
        " sort of picture scores"
    ),
    "untrained": (
        "the same networks before any training: what their build and the generator give without"
        " learning"
    ),
    "class_mean": "the mean training image of the class that was decoded",
    "nearest_train": (
        "the training image whose features are nearest to the prediction: what a lookup scores"
    ),
    "common_caption": (
        "the most common training caption for every test image: what one sentence scores that fits"
        " many"
    ),
}

CONTROLS = (
    {"system": "the reconstructions themselves"}
    | FLOORS
    | {
        "ceiling": (
            "the generator fed with the true latents: the most this generator could score (brain"
            " correlation: the seen images; captions: those of the seen images)"
        ),
    }
)

COLUMNS = ["stage", "metric", "row", "image", "sample", "draw", "value"]  # of scores.parquet


def score_table(
    images: Any,
    rows: Mapping[str, Any],
    metrics: Sequence[Metric],
    draws: int = 5,
    seed: int = 0,
    image_ids: Any = None,
) -> pd.DataFrame:
    """Score a system, its controls and whatever else on the same images, one line an image.

    The pictures of a row are prepared once for all metrics that look through the same network, and
    the true images once for all rows.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        rows: pictures (n, 3, height, width) by name, "system" among them; those named in `FLOORS`
            are its floors, "ceiling" is its ceiling.
        metrics: e.g. of `METRICS`.
        draws: random pairings of the "shuffled" floor, which is always computed from "system".
        seed: of these pairings.
        image_ids: (n,), by default the position.

    Returns:
        Tidy table [metric, row, image, draw, value]. In the row "shuffled", `image` names the
        reconstruction, so that its scores stand beside the one against its own image.

    Raises:
        PerceptError: no row "system", one called "shuffled", or rows that do not pair up with the
            images.
    """
    if "system" not in rows or "shuffled" in rows:
        raise PerceptError(
            "The rows to score need one called 'system'; 'shuffled' is made from it and cannot be"
            " given."
        )
    for name, pictures in rows.items():
        if len(pictures) != len(images):
            raise PerceptError(
                f"{len(pictures)} pictures of '{name}' were given for {len(images)} true images:"
                " give one each, in the same order."
            )
    ids = np.arange(len(images)) if image_ids is None else np.asarray(image_ids)
    pairings = [(0, None), *enumerate(derangements(len(images), draws, seed))]
    truth: dict[Any, Any] = {}
    for metric in metrics:
        if metric.prepare not in truth:
            truth[metric.prepare] = metric.prepare_true(images)
    tables: dict[str, list[pd.DataFrame]] = {metric.name: [] for metric in metrics}
    for name, pictures in progress(rows.items(), "scoring"):
        made: dict[Any, Any] = {}
        for metric in metrics:
            if metric.prepare not in made:
                made = {metric.prepare: metric.prepare(pictures)}  # that of the network before goes
            for i, (draw, pairing) in enumerate(pairings if name == "system" else pairings[:1]):
                options = {} if pairing is None else {"pairing": pairing}
                try:
                    values = metric.compare(truth[metric.prepare], made[metric.prepare], **options)
                except PerceptError as error:
                    raise PerceptError(f"{metric.name} of the row '{name}': {error}") from None
                tables[metric.name].append(
                    pd.DataFrame(
                        {
                            "metric": metric.name,
                            "row": "shuffled" if i else name,
                            "image": ids,
                            "draw": draw,
                            "value": values,
                        }
                    )
                )
    return pd.concat([part for parts in tables.values() for part in parts], ignore_index=True)


def make_record(
    name: str,
    values: Any,
    *,
    floors: dict[str, Any],
    ceiling: Any,
    better: str,
    protocol: str,
    test_set: str,
    **more: Any,
) -> dict[str, Any]:
    """One record of metrics.json from per-image values.

    Args:
        name: the metric.
        values: (n,) of the system.
        floors: per-image values (n,) by control; "shuffled" may be (n, draws), and then gives
            `p_shuffled`.
        ceiling: per-image values (n,), or a sentence saying why there is no ceiling.
        better: "higher" or "lower".
        protocol: name of the data protocol, e.g. "nsd-1000".
        test_set: id of the test images, `Subject.test_set`.
        **more: further entries, e.g. description, source, chance.

    Returns: {name, value, low, high, n, better, protocol, test_set, floors: {control: {value, low,
    high, p}},
        ceiling, p_shuffled, ...}; the p of a floor is that of `paired_bootstrap` against the
        system.
    """
    values = _values(values)
    record: dict[str, Any] = {
        "name": name,
        **bootstrap_mean(values)._asdict(),
        "n": len(values),
        "better": better,
    }
    record |= {"protocol": protocol, "test_set": test_set, "floors": {}}
    for control, scores in floors.items():
        scores = np.asarray(scores, dtype=np.float64)
        if control == "shuffled" and scores.ndim == 2:
            record["p_shuffled"] = permutation_p(values, scores, better)
            scores = scores.mean(1)
        p = paired_bootstrap(values, scores).p
        record["floors"][control] = {**bootstrap_mean(scores)._asdict(), "p": p}
    has_reason = isinstance(ceiling, str)
    record["ceiling"] = (
        {"not_applicable": ceiling} if has_reason else bootstrap_mean(ceiling)._asdict()
    )
    return record | more


def make_records(
    table: pd.DataFrame,
    metrics: Sequence[Metric],
    *,
    protocol: str,
    test_set: str,
    no_ceiling: str = "",
) -> list[dict[str, Any]]:
    """Summarise a `score_table` into the records of metrics.json.

    Args:
        table: [metric, row, image, draw, value].
        metrics: those of the table.
        protocol: name of the data protocol.
        test_set: id of the test images.
        no_ceiling: why the table has no "ceiling" row, where it has none.

    Returns:
        Records as `make_record`; rows that are neither the system, nor a floor, nor the ceiling
        stand under "others", with the paired difference of the system to them.

    Raises:
        PerceptError: there is neither a ceiling nor a reason.
    """
    records = []
    for metric in metrics:
        mine = table[table["metric"] == metric.name]
        rows = {
            str(row): part.pivot(index="image", columns="draw", values="value").to_numpy()
            for row, part in mine.groupby("row", sort=False)
        }
        if "ceiling" not in rows and not no_ceiling:
            raise PerceptError(
                f"{metric.name} has no ceiling row; give one to score_table, or the reason in"
                " no_ceiling."
            )
        system = rows.pop("system")[:, 0]
        ceiling = rows.pop("ceiling")[:, 0] if "ceiling" in rows else no_ceiling
        floors = {
            row: rows[row] if row == "shuffled" else rows[row][:, 0]
            for row in FLOORS
            if row in rows
        }
        others = {
            row: (
                bootstrap_mean(scores[:, 0])._asdict()
                | {"difference": paired_bootstrap(system, scores[:, 0])._asdict()}
            )
            for row, scores in rows.items()
            if row not in FLOORS
        }
        records.append(
            make_record(
                metric.name,
                system,
                floors=floors,
                better=metric.better,
                protocol=protocol,
                test_set=test_set,
                ceiling=ceiling,
                chance=metric.chance,
                description=metric.description,
                source=metric.source,
                others=others,
            )
        )
    return records


def provenance(
    recipe: str, seeds: dict[str, int], selection: Sequence[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a reader must know to repeat a table.

    Args:
        recipe: name of the recipe or run.
        seeds: seed by purpose.
        selection: one dict a choice that was made, e.g. {"what": "epoch", "chosen": 37, "split":
            "val", "candidates": 60}.
        **more: further entries, e.g. parameters, subject, alarms.
    """
    packages = (
        "numpy",
        "scipy",
        "scikit-image",
        "torch",
        "torchvision",
        "transformers",
        "diffusers",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    settings = {
        "pixel metrics": f"compared at {SIZE} pixels, bilinear",
        "grey": ".2125 red + .7154 green + .0721 blue",
        "intervals": "95 % percentile bootstrap over test images, 2000 resamples",
    }
    if more.get("resizing") in RESIZING:
        settings["resizing"] = f"{more['resizing']}: {RESIZING[more.pop('resizing')]}"
    return {
        "recipe": recipe,
        "seeds": dict(seeds),
        "selection": list(selection),
        "versions": versions,
        "settings": settings,
        **more,
    }


def _is_score(entry: Any) -> bool:
    """Whether an entry of a record holds a finite value and interval."""
    numbers = (
        [entry.get(key) for key in ("value", "low", "high")] if isinstance(entry, dict) else [None]
    )
    return all(isinstance(number, float | int) and math.isfinite(number) for number in numbers)


def _check_record(record: dict[str, Any]) -> None:
    needed = ("name", "value", "low", "high", "n", "better", "protocol", "test_set")
    missing = [key for key in needed if record.get(key) in (None, "")]
    if missing:
        raise PerceptError(
            f"The record of {record.get('name', 'a metric')!r} lacks {', '.join(missing)}; make it"
            " with make_record."
        )

    name, floors, ceiling = record["name"], record.get("floors"), record.get("ceiling")
    if not _is_score(record):
        raise PerceptError(f"The score {name!r} is not finite; it is not written.")
    if not floors or not all(_is_score(floor) for floor in floors.values()):
        raise PerceptError(
            f"The score {name!r} has no floor; a score is only shown beside what no decoding would"
            " give (score_table adds a shuffled pairing, pass mean_image and nearest_train as"
            " rows)."
        )
    if not _is_score(ceiling) and not (isinstance(ceiling, dict) and ceiling.get("not_applicable")):
        raise PerceptError(
            f"The score {name!r} has no ceiling; score the generator on the true latents, "
            'or say why there is none with {"not_applicable": "the reason"}.'
        )


def write_metrics(
    path: str | Path,
    records: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    tables: Sequence[dict[str, Any]] = (),
) -> None:
    """Write metrics.json: {"metrics": [one record a metric], "tables": [...], "provenance": {...}}.

    Raises:
        PerceptError: a record lacks its floors, its ceiling (or the reason why there is none), its
            interval, protocol or test set; or the provenance lacks recipe, seeds or selection.
    """
    for record in records:
        _check_record(record)
    _check_provenance(provenance)
    write_json(
        Path(path),
        _plain({"metrics": list(records), "tables": list(tables), "provenance": provenance}),
    )


def _check_provenance(provenance: dict[str, Any]) -> None:
    missing = [key for key in ("recipe", "seeds", "selection") if key not in provenance]
    if missing:
        raise PerceptError(
            f"The provenance lacks {', '.join(missing)}; make it with results.provenance(...)."
        )


def _plain(value: Any) -> Any:
    """A value as JSON knows it: numpy's numbers as Python's, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_results(
    folder: str | Path,
    stage: str,
    scores: pd.DataFrame,
    records: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    tables: Sequence[dict[str, Any]] = (),
) -> None:
    """Add what a stage scored to the results of a run, in place of what it wrote there before;
    other stages' results stay.

    Args:
        folder: results/<run>; `scores.parquet` and `metrics.json` are written there.
        stage: name of the notebook, e.g. "06_metrics".
        scores: [metric, row, image, value] and optionally [sample, draw], one line an image; images
            by id.
        records: of `make_record`.
        provenance: of `provenance`; its selection log and seeds are kept by stage.
        tables: further tables for a reader, each {"title", "note", "rows": [one dict a row]}.

    Raises:
        PerceptError: as `write_metrics`, or a stage before was scored on other test images.
    """
    folder, marked = Path(folder), [record | {"stage": stage} for record in records]
    old = (
        read_json(folder / "metrics.json")
        if (folder / "metrics.json").exists()
        else {"metrics": [], "tables": [], "provenance": {}}
    )
    kept = [record for record in old["metrics"] if record.get("stage") not in (stage, None)]
    for record in marked:
        _check_record(record)
    _check_provenance(provenance)
    before, now = ({r["test_set"] for r in some} for some in (kept, marked))
    if kept and before != now:
        raise PerceptError(
            f"{folder} has scores on the test set {', '.join(sorted(before))}, these are on"
            f" {', '.join(sorted(now))}: scores of different test images do not belong together;"
            " run all stages of the run again, or give this run another model_name."
        )
    earlier = old["provenance"]
    both = earlier | provenance
    both["seeds"] = {
        **earlier.get("seeds", {}),
        **{f"{stage}: {k}": v for k, v in provenance["seeds"].items()},
    }
    others = [c for c in earlier.get("selection", []) if c.get("stage") not in (stage, None)]
    both["selection"] = sorted(
        [*others, *({**choice, "stage": stage} for choice in provenance["selection"])],
        key=lambda c: c["stage"],
    )
    more = [t for t in old.get("tables", []) if t.get("stage") not in (stage, None)] + [
        {**table, "stage": stage} for table in tables
    ]
    everything = sorted([*kept, *marked], key=lambda r: r["stage"])
    _add_scores(folder / "scores.parquet", stage, scores)
    write_metrics(folder / "metrics.json", everything, both, sorted(more, key=lambda t: t["stage"]))


def _add_scores(path: Path, stage: str, scores: pd.DataFrame) -> None:
    """Put a stage's per-image scores into the parquet file, in place of its old ones."""
    mine = scores.assign(
        stage=stage, **{name: 0 for name in ("sample", "draw") if name not in scores}
    )[COLUMNS]
    others = pd.read_parquet(path) if path.exists() else None
    if (
        others is not None and list(others.columns) == COLUMNS
    ):  # else it is of an earlier format, which had no stages
        mine = pd.concat([others[others["stage"] != stage], mine], ignore_index=True)
    with atomic(path) as temporary:
        mine.sort_values("stage", kind="stable").to_parquet(temporary, index=False)
