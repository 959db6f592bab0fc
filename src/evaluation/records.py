"""Score records: every score with its interval, its baselines and its upper bound, and how scores
are stored.

- `score_table` scores a system and its controls on the same images; `make_records` summarises the
  table.
- One format for all scores (`add_results`): `scores.parquet`, a row per stage, metric, condition,
  image, sample and draw, and `metrics.json`, a record a metric. Every stage that scores adds its
  own part and leaves that of the others.
- A score is not written without its baselines ("floors" in metrics.json) and its upper bound
  ("ceiling").
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.data.identity import compare_identities
from src.evaluation.statistics import (
    bootstrap_mean,
    check_values,
    derangements,
    paired_bootstrap,
    permutation_p,
)
from src.files.foreign import load_parquet
from src.files.ownership import lock_folder
from src.metrics import RESIZING, SIZE, Metric
from src.utils import PerceptError, atomic, progress, read_json, write_json

log = logging.getLogger(__name__)

BASELINES = {  # what a score has to beat; the floors of metrics.json
    "shuffled": (
        "the same reconstructions against other test images: what any plausible images score"
    ),
    "mean_image": "the mean training image for every test image: what one blurred image scores",
    "mean_seen": (
        "the mean of the seen images themselves for every test image: one blurred image that"
        " knows the truth"
    ),
    "other_recon": (
        "for each image the other reconstruction that looks most like its own: what knowing the"
        " sort of image scores"
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

UPPER_BOUND = (
    "the generator fed with the true latents: the most this generator could score (brain"
    " correlation: the seen images; captions: those of the seen images)"
)

CONTROLS = {
    "system": "the reconstructions themselves",
    **BASELINES,
    "ceiling": UPPER_BOUND,
}

COLUMNS = ["stage", "metric", "row", "image", "sample", "draw", "value"]  # of scores.parquet

REQUIRED = ("name", "value", "low", "high", "n", "better", "protocol", "test_set")  # of a record

# of a record that is read again
NEEDED_TO_COMPARE = ("name", "value", "better", "protocol", "test_set", "floors", "ceiling")

REMEDY = "delete it, and run the stages that scored this run again (05, 06)"

PACKAGES = (  # whose versions the provenance records
    "numpy",
    "scipy",
    "scikit-image",
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
)

Entry = dict[str, Any]  # of JSON: a record, a table, a choice


# ------------------------------------------------------------------------------------------ scoring
def score_table(
    images: Any,
    conditions: Mapping[str, Any],
    metrics: Sequence[Metric],
    draws: int = 5,
    seed: int = 0,
    image_ids: Any = None,
) -> pd.DataFrame:
    """Score a system, its controls and other decoders on the same images, one line an image.

    The images of a condition are prepared once for all metrics that look through the same network,
    and the true images once for all conditions.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        conditions: images (n, 3, height, width) by name, "system" among them; those named in
            `BASELINES` are its baselines, "ceiling" is its upper bound.
        metrics: e.g. of `METRICS`.
        draws: random pairings of the baseline "shuffled", which is always computed from "system".
        seed: of these pairings.
        image_ids: (n,), by default the position.

    Returns:
        Tidy table [metric, row, image, draw, value], row being the condition. In the condition
        "shuffled", `image` names the reconstruction, so that its scores stand beside the one
        against its own image.

    Raises:
        PerceptError: no condition "system", one called "shuffled", or conditions that do not pair
            up with the images.
    """
    _check_conditions(images, conditions)
    ids = np.arange(len(images)) if image_ids is None else np.asarray(image_ids)
    pairings = list(derangements(len(images), draws, seed))
    truth: dict[Any, Any] = {}
    for metric in metrics:
        if metric.prepare not in truth:
            truth[metric.prepare] = metric.prepare_true(images)
    tables: dict[str, list[pd.DataFrame]] = {metric.name: [] for metric in metrics}

    for condition, recons in progress(conditions.items(), "scoring"):
        prepared: dict[Any, Any] = {}
        for metric in metrics:
            if metric.prepare not in prepared:
                # only the newest is stored: features of the network before are released
                prepared = {metric.prepare: metric.prepare(recons)}
            true_side, recon_side = truth[metric.prepare], prepared[metric.prepare]
            values = _compare(metric, condition, true_side, recon_side)
            parts = tables[metric.name]
            parts.append(_tidy(metric.name, condition, ids, 0, values))
            if condition != "system":
                continue
            for draw, pairing in enumerate(pairings):
                values = _compare(metric, condition, true_side, recon_side, pairing=pairing)
                parts.append(_tidy(metric.name, "shuffled", ids, draw, values))
    return pd.concat([part for parts in tables.values() for part in parts], ignore_index=True)


def _check_conditions(images: Any, conditions: Mapping[str, Any]) -> None:
    if "system" not in conditions or "shuffled" in conditions:
        raise PerceptError(
            "The rows to score need one called 'system'; 'shuffled' is made from it and cannot be"
            " given."
        )
    for name, recons in conditions.items():
        if len(recons) != len(images):
            raise PerceptError(
                f"{len(recons)} images of '{name}' were given for {len(images)} true images:"
                " give one each, in the same order."
            )


def _compare(
    metric: Metric, condition: str, true_side: Any, recon_side: Any, **options: Any
) -> np.ndarray:
    """Scores (n,) of one metric; an error names the metric and the condition."""
    try:
        return metric.compare(true_side, recon_side, **options)
    except PerceptError as error:
        raise PerceptError(f"{metric.name} of the row '{condition}': {error}") from None


def _tidy(metric: str, condition: str, ids: Any, draw: int, values: Any) -> pd.DataFrame:
    columns = {"metric": metric, "row": condition, "image": ids, "draw": draw, "value": values}
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------ records
def make_record(
    name: str,
    values: Any,
    *,
    baselines: dict[str, Any],
    upper_bound: Any,
    better: str,
    protocol: str,
    test_set: str,
    **entries: Any,
) -> Entry:
    """One record of metrics.json from per-image values.

    Args:
        name: the metric.
        values: (n,) of the system.
        baselines: per-image values (n,) by control; "shuffled" may be (n, draws), and then gives
            `p_shuffled`.
        upper_bound: per-image values (n,), or a sentence saying why there is none.
        better: "higher" or "lower".
        protocol: name of the data protocol, e.g. "nsd-1000".
        test_set: id of the test images, `Subject.test_set`.
        **entries: further entries, e.g. description, source, chance.

    Returns:
        {name, value, low, high, n, better, protocol, test_set, floors: {control: {value, low, high,
        p}}, ceiling, p_shuffled, ...}; the p of a floor is that of `paired_bootstrap` against the
        system.
    """
    values = check_values(values)
    record: Entry = {
        "name": name,
        **bootstrap_mean(values)._asdict(),
        "n": len(values),
        "better": better,
        "protocol": protocol,
        "test_set": test_set,
        "floors": {},
    }
    for control, control_scores in baselines.items():
        scores = np.asarray(control_scores, dtype=np.float64)
        if control == "shuffled" and scores.ndim == 2:
            record["p_shuffled"] = permutation_p(values, scores, better)
            scores = scores.mean(1)
        p = paired_bootstrap(values, scores).p
        record["floors"][control] = {**bootstrap_mean(scores)._asdict(), "p": p}
    if isinstance(upper_bound, str):
        record["ceiling"] = {"not_applicable": upper_bound}
    else:
        record["ceiling"] = bootstrap_mean(upper_bound)._asdict()
    return record | entries


def make_records(
    table: pd.DataFrame,
    metrics: Sequence[Metric],
    *,
    protocol: str,
    test_set: str,
    no_upper_bound: str = "",
) -> list[Entry]:
    """Summarise a `score_table` into the records of metrics.json.

    Args:
        table: [metric, row, image, draw, value].
        metrics: those of the table.
        protocol: name of the data protocol.
        test_set: id of the test images.
        no_upper_bound: why the table has no condition "ceiling", where it has none.

    Returns:
        Records as of `make_record`; conditions that are neither the system, nor a baseline, nor the
        upper bound stand under "others", with the paired difference of the system to them.

    Raises:
        PerceptError: there is neither an upper bound nor a reason.
    """
    records = []
    for metric in metrics:
        scores = _pivot_conditions(table[table["metric"] == metric.name])
        if "ceiling" not in scores and not no_upper_bound:
            raise PerceptError(
                f"{metric.name} has no ceiling row; give one to score_table, or the reason in"
                " no_upper_bound."
            )
        system = scores.pop("system")[:, 0]
        upper_bound: Any = no_upper_bound
        if "ceiling" in scores:
            upper_bound = scores.pop("ceiling")[:, 0]
        baselines = {}
        for name in BASELINES:
            if name in scores:
                baselines[name] = scores[name] if name == "shuffled" else scores[name][:, 0]
        decoders = {}
        for name, values in scores.items():
            if name not in BASELINES:
                decoders[name] = _compare_with_system(system, values[:, 0])
        records.append(
            make_record(
                metric.name,
                system,
                baselines=baselines,
                upper_bound=upper_bound,
                better=metric.better,
                protocol=protocol,
                test_set=test_set,
                chance=metric.chance,
                description=metric.description,
                source=metric.source,
                others=decoders,
            )
        )
    return records


def _pivot_conditions(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Scores (n, draws) of one metric by condition."""
    scores = {}
    for condition, part in table.groupby("row", sort=False):
        wide = part.pivot(index="image", columns="draw", values="value")
        scores[str(condition)] = wide.to_numpy()
    return scores


def _compare_with_system(system: np.ndarray, values: np.ndarray) -> Entry:
    """The score of another decoder, and the paired difference of the system to it."""
    score = bootstrap_mean(values)._asdict()
    return score | {"difference": paired_bootstrap(system, values)._asdict()}


def provenance(
    recipe: str, seeds: dict[str, int], selection: Sequence[Entry], **entries: Any
) -> Entry:
    """What a reader must know to repeat a table.

    Args:
        recipe: name of the recipe or run.
        seeds: seed by purpose.
        selection: one dict a choice that was made, e.g. {"what": "epoch", "chosen": 37, "split":
            "val", "candidates": 60}.
        **entries: further entries, e.g. parameters, subject, alarms.
    """
    versions = {"python": platform.python_version()}
    versions |= {package: installed_version(package) for package in PACKAGES}
    settings = {
        "pixel metrics": f"compared at {SIZE} pixels, bilinear",
        "grey": ".2125 red + .7154 green + .0721 blue",
        "intervals": "95 % percentile bootstrap over test images, 2000 resamples",
    }
    if entries.get("resizing") in RESIZING:
        settings["resizing"] = f"{entries['resizing']}: {RESIZING[entries.pop('resizing')]}"
    return {
        "recipe": recipe,
        "seeds": dict(seeds),
        "selection": list(selection),
        "versions": versions,
        # sums over another number of threads differ in their last digits
        "threads": torch.get_num_threads(),
        "settings": settings,
        **entries,
    }


def installed_version(package: str) -> str:
    """The version of an installed package, "not installed" where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------------------------ writing
def write_metrics(
    path: str | Path,
    records: Sequence[Entry],
    provenance: Entry,
    tables: Sequence[Entry] = (),
) -> None:
    """Write metrics.json: {"metrics": [one record a metric], "tables": [...], "provenance": {...}}.

    Raises:
        PerceptError: a record lacks its floors, its ceiling (or the reason why there is none), its
            interval, protocol or test set; or the provenance lacks recipe, seeds or selection.
    """
    for record in records:
        _check_record(record)
    _check_provenance(provenance)
    content = {"metrics": list(records), "tables": list(tables), "provenance": provenance}
    write_json(Path(path), _to_json(content))


def read_metrics(path: str | Path) -> Entry:
    """Read the metrics.json of a run.

    Raises:
        PerceptError: naming the file, if it is missing, damaged or of something else.
    """
    content: Entry = read_json(path, ("metrics", "provenance"), REMEDY)
    records, about = content["metrics"], content["provenance"]
    lists = (records, content.get("tables", []))
    is_list = all(isinstance(entries, list) for entries in lists)
    if not is_list or not all(isinstance(entry, dict) for entries in lists for entry in entries):
        raise PerceptError(f"{path} holds no list of scores: {REMEDY}.")
    if not isinstance(about, dict):
        raise PerceptError(f"{path} holds no provenance of its scores: {REMEDY}.")
    for record in records:
        missing = [name for name in NEEDED_TO_COMPARE if name not in record]
        if missing:
            name = record.get("name", "a score")
            raise PerceptError(f"{path} gives no {', '.join(missing)} of {name}: {REMEDY}.")
    return content


def _check_record(record: Entry) -> None:
    missing = [key for key in REQUIRED if record.get(key) in (None, "")]
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
            " conditions)."
        )
    has_reason = isinstance(ceiling, dict) and ceiling.get("not_applicable")
    if not _is_score(ceiling) and not has_reason:
        raise PerceptError(
            f"The score {name!r} has no ceiling; score the generator on the true latents, "
            'or say why there is none with {"not_applicable": "the reason"}.'
        )


def _is_score(entry: Any) -> bool:
    """Whether an entry of a record holds a finite value and interval."""
    if not isinstance(entry, dict):
        return False
    numbers = [entry.get(key) for key in ("value", "low", "high")]
    return all(isinstance(number, float | int) and math.isfinite(number) for number in numbers)


def _check_provenance(provenance: Entry) -> None:
    missing = [key for key in ("recipe", "seeds", "selection") if key not in provenance]
    if missing:
        raise PerceptError(
            f"The provenance lacks {', '.join(missing)}; make it with records.provenance(...)."
        )


def _to_json(value: Any) -> Any:
    """A value as JSON knows it: numpy's numbers as Python's, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_results(
    folder: str | Path,
    stage: str,
    scores: pd.DataFrame,
    records: Sequence[Entry],
    provenance: Entry,
    tables: Sequence[Entry] = (),
) -> None:
    """Add what a stage scored to the results of a run, in place of what it wrote there before;
    other stages' results stay, unless they are of other data.

    Args:
        folder: results/<run>; `scores.parquet` and `metrics.json` are written there.
        stage: name of the notebook, e.g. "06_metrics".
        scores: [metric, row, image, value] and optionally [sample, draw], one line an image; images
            by id.
        records: of `make_record`.
        provenance: of `provenance`; its selection log and seeds are stored by stage.
        tables: further tables for a reader, each {"title", "note", "rows": [one dict a row]}.

    Processes that add results to a run at once take turns.

    Raises:
        PerceptError: as `write_metrics`, or a stage before was scored on other test images.
    """
    folder = Path(folder)
    with lock_folder(
        folder / "metrics.json", f"adding the scores of {stage}", wait=True, as_sibling=True
    ):
        _add_results(folder, stage, scores, records, provenance, tables)


def _add_results(
    folder: Path,
    stage: str,
    scores: pd.DataFrame,
    records: Sequence[Entry],
    provenance: Entry,
    tables: Sequence[Entry],
) -> None:
    stored: dict[str, Any] = {"metrics": [], "tables": [], "provenance": {}}
    if (folder / "metrics.json").exists():
        stored = read_metrics(folder / "metrics.json")
    is_same_data = _is_same_data(stored["provenance"], provenance, folder)
    if not is_same_data:
        stored = {"metrics": [], "tables": [], "provenance": {}}
    new_records = _mark_stage(records, stage)
    old_records = _drop_stage(stored["metrics"], stage)
    for record in new_records:
        _check_record(record)
    _check_provenance(provenance)
    _check_test_sets(folder, old_records, new_records)

    all_records = [*old_records, *new_records]
    all_tables = [*_drop_stage(stored.get("tables", []), stage), *_mark_stage(tables, stage)]
    all_scores = _merge_scores(folder / "scores.parquet", stage, scores, is_same_data)
    # both are written before either of them takes its place
    with atomic(folder / "metrics.json") as metrics, atomic(folder / "scores.parquet") as parquet:
        all_scores.to_parquet(parquet, index=False)
        write_metrics(
            metrics,
            _sort_by_stage(all_records),
            _merge_provenance(stored["provenance"], provenance, stage),
            _sort_by_stage(all_tables),
        )


def _is_same_data(old: Entry, new: Entry, folder: Path) -> bool:
    """Whether two provenances are of the same prepared data, as far as both say so."""
    before, now = old.get("data"), new.get("data")
    if not before or not now or before == now:
        return True
    difference = compare_identities(before, now)
    log.warning(
        "the scores of other stages in %s were of other data (%s) and are left out",
        folder,
        difference,
    )
    return False


def _check_test_sets(
    folder: Path, old_records: Iterable[Entry], new_records: Iterable[Entry]
) -> None:
    before = {record["test_set"] for record in old_records}
    now = {record["test_set"] for record in new_records}
    if before and before != now:
        raise PerceptError(
            f"{folder} has scores on the test set {', '.join(sorted(before))}, these are on"
            f" {', '.join(sorted(now))}: scores of different test images do not belong together;"
            " run all stages of the run again, or give this run another model_name."
        )


def _merge_provenance(old: Entry, new: Entry, stage: str) -> Entry:
    """The provenance of a run with that of a stage: seeds and choices by stage, else the newest."""
    seeds = {f"{stage}: {purpose}": seed for purpose, seed in new["seeds"].items()}
    choices = _drop_stage(old.get("selection", []), stage)
    choices += [{**choice, "stage": stage} for choice in new["selection"]]
    return {
        **old,
        **new,
        "seeds": {**old.get("seeds", {}), **seeds},
        "selection": _sort_by_stage(choices),
    }


def _mark_stage(entries: Iterable[Entry], stage: str) -> list[Entry]:
    return [{**entry, "stage": stage} for entry in entries]


def _drop_stage(entries: Iterable[Entry], stage: str) -> list[Entry]:
    """Entries of other stages; those without a stage are of an earlier format and go."""
    return [entry for entry in entries if entry.get("stage") not in (stage, None)]


def _sort_by_stage(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry["stage"])


def _merge_scores(path: Path, stage: str, scores: pd.DataFrame, keep_others: bool) -> pd.DataFrame:
    """A stage's per-image scores with those in the parquet file, in place of its old ones."""
    missing = {name: 0 for name in ("sample", "draw") if name not in scores}
    table = scores.assign(stage=stage, **missing)[COLUMNS]
    stored = load_parquet(path, REMEDY) if path.exists() and keep_others else None
    # a table with other columns is of an earlier format, which had no stages
    if stored is not None and list(stored.columns) == COLUMNS:
        table = pd.concat([stored[stored["stage"] != stage], table], ignore_index=True)
    return table.sort_values("stage", kind="stable")
