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

import hashlib
import math
import platform
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src.metrics import CHUNK, RESIZING, SIZE, TOLERANCE, Metric, as_compared, resize
from src.utils import PerceptError, atomic, progress, read_json, write_json

CONFIDENCE = 0.95
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


class Interval(NamedTuple):
    """A mean over images and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, its 95 % bootstrap interval and its two-sided p."""

    value: float
    low: float
    high: float
    p: float


def _values(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise PerceptError(
            f"Statistics are taken over images: expected values (n,), got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise PerceptError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} per-image values are NaN or infinite;"
            " no mean is given."
        )
    return values


def _bootstrap(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means (n_boot,) of resamples of the images."""
    return values[np.random.default_rng(seed).integers(0, len(values), (n_boot, len(values)))].mean(
        1
    )


def bootstrap_mean(values: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-image values (n,) with its 95 % percentile interval over resamples of the images
    (Efron & Tibshirani 1993).
    """
    values = _values(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_bootstrap(values, n_boot, seed), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(a: Any, b: Any, n_boot: int = 2000, seed: int = 0) -> Difference:
    """Mean of a - b over the same images, (n,) and (n,), with its interval and the two-sided
    bootstrap p of no difference.

    The p is twice the smaller share of resampled means on either side of 0, counting the observed
    one, so it is never 0.
    """
    a, b = _values(a), _values(b)
    if a.shape != b.shape:
        raise PerceptError(
            f"A paired difference needs the same images on both sides; got {len(a)} and {len(b)}"
            " values."
        )
    means = _bootstrap(a - b, n_boot, seed)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + n_boot)
    return Difference(float((a - b).mean()), float(low), float(high), float(min(p, 1.0)))


def permutation_p(
    own: Any, others: Any, better: str = "higher", n_permutations: int = 2000, seed: int = 0
) -> float:
    """One-sided p that reconstructions fit their own images better than other ones.

    If the pairing carried nothing, the own image would be exchangeable with the others,
    reconstruction by reconstruction: the null distribution takes, for each, one of its 1 + draws
    scores at random. The smallest p is 1 / (1 + n_permutations).

    Args:
        own: (n,) scores against the own image.
        others: (n, draws) scores of the same reconstructions against other images.
        better: "higher" or "lower".
        n_permutations: random draws from the null.
        seed: of these draws.
    """
    sign = {"higher": 1.0, "lower": -1.0}[better]
    own, others = sign * _values(own), sign * np.asarray(others, dtype=np.float64)
    if others.ndim != 2 or len(others) != len(own):
        raise PerceptError(
            f"Expected shuffled scores (n, draws) for n = {len(own)} images, got shape"
            f" {others.shape}."
        )
    scores = np.column_stack([own, others])  # (n, 1 + draws)
    pick = np.random.default_rng(seed).integers(0, scores.shape[1], (n_permutations, len(own)))
    null = scores[np.arange(len(own)), pick].mean(1)  # (n_permutations,)
    return float((1 + (null >= own.mean() - 1e-12).sum()) / (1 + n_permutations))


def derangements(n: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield `draws` random permutations (n,) in which nothing stays in its place."""
    if n < 2:
        raise PerceptError("A shuffled pairing needs at least two images.")
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        order = rng.permutation(n)
        while (order == np.arange(n)).any():  # about e tries
            order = rng.permutation(n)
        yield order


# ---------------------------------------------------------------------------------------- pictures
def _number(path: Path) -> list[Any]:
    """Files in the order of the numbers in their names."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def load_pictures(path: str | Path) -> Tensor:
    """Pictures of anyone: (n, 3, height, width), uint8 or floats in [0, 1], as they are stored;
    large files are mapped, not read.

    Args:
        path: a .pt file that holds one tensor (as the published repositories write), an .npz or
            .npy file that holds one array, or a folder of PNG or JPEG files, read in the order of
            the numbers in their names. Axes (n, 3, height, width) or (n, height, width, 3); bytes,
            or floats in [0, 1].

    Raises:
        PerceptError: the file is missing, holds something else, or pictures of several sizes.
    """
    path = Path(path)
    if not path.exists():
        raise PerceptError(
            f"There are no pictures at {path}: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    if path.is_dir():
        files = sorted(
            (f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg")),
            key=_number,
        )
        arrays = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        if len({array.shape for array in arrays}) != 1:
            what = "no PNG or JPEG files" if not arrays else "pictures of several sizes"
            raise PerceptError(
                f"The folder {path} holds {what}: put all pictures there, numbered, in one size."
            )
        found = np.stack(arrays)
    else:
        found = _stored(path)
    pictures = torch.as_tensor(found)
    if pictures.ndim == 4 and pictures.shape[1] != 3 and pictures.shape[3] == 3:
        pictures = pictures.permute(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise PerceptError(
            f"{path} holds an array of shape {tuple(pictures.shape)}: pictures are (n, 3, height,"
            " width) or (n, height, width, 3)."
        )
    return pictures


def _stored(path: Path) -> Any:
    """The one array of a file."""
    if path.suffix not in (".pt", ".pth", ".npz", ".npy"):
        raise PerceptError(
            f"{path} cannot be read as pictures: give a .pt, .npz or .npy file, or a folder of PNG"
            " files."
        )
    try:
        if path.suffix in (".pt", ".pth"):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )  # the older format cannot be mapped
        else:
            content = np.load(
                path, allow_pickle=False, mmap_mode="c" if path.suffix == ".npy" else None
            )
        arrays = list(content.values()) if isinstance(content, Mapping) else [content]
    except Exception as error:
        raise PerceptError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it must hold plain numbers, no"
            " Python objects."
        ) from error
    if len(arrays) != 1 or not hasattr(arrays[0], "shape"):
        raise PerceptError(
            f"{path} holds {len(arrays)} entries where one array of pictures is expected."
        )
    return arrays[0]


def pixel_hash(images: Any) -> str:
    """Identity of pictures (n, 3, height, width) in [0, 1], whoever stored them: number, size, and
    a hash of their bytes at 8 bits.
    """
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for start in range(0, len(images), CHUNK):
        part = torch.as_tensor(images[start : start + CHUNK])
        part = (
            part
            if part.dtype == torch.uint8
            else (part.float() * 255).round().clamp(0, 255).to(torch.uint8)
        )
        digest.update(part.contiguous().numpy().tobytes())
    return f"{len(images)}-pixels-{digest.hexdigest()[:12]}"


def mean_picture(images: Any) -> Tensor:
    """The mean of pictures (n, 3, height, width), once for each of them (a view); float32, bytes
    become [0, 1].
    """
    floats = as_compared(images, "straight")
    total: Any = sum(floats[i : i + CHUNK].double().sum(0) for i in range(0, len(images), CHUNK))
    return (total / len(images)).float().expand(len(images), -1, -1, -1)


def most_alike(pictures: Any) -> np.ndarray:
    """For each picture (n, 3, height, width) the other one that looks most like it, (n,):
    correlation of all pixels at 32 x 32.
    """
    if len(pictures) < 2:
        raise PerceptError("One picture has no other that could look like it: score at least two.")
    floats = as_compared(pictures, "straight")
    small = torch.cat(
        [
            resize(floats[i : i + CHUNK], 32, antialias=True).flatten(1)
            for i in range(0, len(pictures), CHUNK)
        ]
    )
    small = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    return torch.cat([_others(small, slice(i, i + 512)) for i in range(0, len(small), 512)]).numpy()


def _others(rows: Tensor, mine: slice) -> Tensor:
    alike = rows[mine] @ rows.T
    alike[
        torch.arange(len(alike)), torch.arange(mine.start, mine.start + len(alike))
    ] = -2.0  # not itself
    return alike.argmax(1)


# ------------------------------------------------------------------------------------------ tables
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


def noise_ceiling(
    between_repeats: Any, repeats: int, n_boot: int = 2000, seed: int = 0
) -> Interval:
    """The most that a prediction from the mean of some repeats can correlate with the truth, from
    how repeats agree with each other.

    With r the correlation of predictions from two single repeats, the mean of k has reliability k r
    / (1 + (k - 1) r) (Spearman 1910, Brown 1910), and its correlation with anything is at most the
    square root of that.

    Args:
        between_repeats: (n,) per test image, the mean correlation of its predictions from pairs of
            single repeats.
        repeats: k.
        n_boot: resamples of the images.
        seed: of these.
    """
    values = _values(between_repeats)

    def ceiling(r: Any) -> np.ndarray:
        r = np.clip(r, 0, 1)
        return np.sqrt(repeats * r / (1 + (repeats - 1) * r))

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ceiling(_bootstrap(values, n_boot, seed)), [tail, 1 - tail])
    return Interval(float(ceiling(values.mean())), float(low), float(high))


# ---------------------------------------------------------------------------- the results of a run
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


# ------------------------------------------------------------------------------------------ alarms
def check_outputs(recons: Any) -> list[str]:
    """Say what is wrong with reconstructions (n, 3, height, width) in [0, 1] before anyone scores
    them.

    Returns: Sentences, none when all is well: values that are not finite or out of range, black
    images,
        images of one colour, all alike.
    """
    n, alarms = len(recons), []
    found: list[Tensor] = []
    total: Any = 0.0
    square: Any = 0.0
    for start in range(0, n, CHUNK):  # a chunk at a time: 10,000 pictures fit
        rows = torch.as_tensor(recons[start : start + CHUNK]).detach().cpu()
        rows = (rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()).flatten(1)
        finite = torch.isfinite(rows).all(1)
        rows = torch.where(finite[:, None], rows, 0.0)
        colours = (
            rows.unflatten(1, (3, -1)).std(2).amax(1)
        )  # spread of the colour that varies most over the picture
        found.append(torch.stack([finite, rows.amin(1), rows.amax(1), rows.std(1), colours], 1))
        total, square = total + rows.double().sum(0), square + rows.double().square().sum(0)
    finite, least, most, spread, colours = torch.cat(found).T
    finite = finite.bool()

    def say(which: Tensor, what: str) -> None:
        if which.any():
            first = ", ".join(str(i) for i in which.nonzero()[:5, 0].tolist())
            alarms.append(f"{int(which.sum())} of {n} reconstructions {what} (first: {first}).")

    say(~finite, "hold NaN or infinite values; half precision in the decoder is the usual cause")
    say((least < -TOLERANCE) | (most > 1 + TOLERANCE), "leave the range [0, 1]; clamp them")
    black = finite & (most < 0.02)
    say(black, "are black; a safety checker or a half-precision overflow is the usual cause")
    say(finite & ~black & (colours < 0.01), "are of one flat colour")
    between = (
        (square / n - (total / n) ** 2).clamp_min(0).sqrt().mean()
    )  # how much a pixel differs between pictures
    if n > 1 and between < 0.1 * spread.mean():
        alarms.append(
            f"The {n} reconstructions are nearly alike (they differ less than a tenth of what one "
            "picture's pixels do): "
            "the decoder ignores the brain, or the generator its condition."
        )
    return alarms


def check_alignment(
    two_way: Any, pixcorr: Any, pixcorr_shuffled: float = 0.0, ceiling: Any = None
) -> list[str]:
    """Say when scores look like rows of brain data and images that do not belong together.

    Args:
        two_way: (n,) of any two-way metric of the system.
        pixcorr: (n,) of the system.
        pixcorr_shuffled: mean pixel correlation of the shuffled pairing.
        ceiling: (n,) of the same two-way metric with the true latents, where known: it tells rows
            that do not belong together from a generator that cannot draw.

    Returns: One sentence when the interval of two-way identification reaches 50 % and the pixel
    correlation
        no better than shuffled, else none.
    """
    identification, pixels = bootstrap_mean(two_way), bootstrap_mean(pixcorr)
    if identification.low > 0.5 or pixels.low > pixcorr_shuffled + 0.02:
        return []
    found = (
        f"Two-way identification is {identification.value:.1%} and the pixel correlation"
        f" {pixels.value:.3f}, as for a random pairing"
    )
    if ceiling is None:
        return [
            f"{found}: your rows are probably misaligned (brain rows in another order than the"
            " images), or nothing was learned."
        ]
    best = bootstrap_mean(ceiling)
    if best.low <= 0.6:
        return [
            f"{found}, but true latents score {best.value:.1%} too: the generator, or the ceiling's"
            " latents, are at fault before the decoder is."
        ]
    return [
        f"{found}, while true latents reach {best.value:.1%}: your rows are probably misaligned"
        " (brain rows in another order than the images), or nothing was learned."
    ]


def check_leak(test_images: Any, train_images: Any) -> list[str]:
    """Say when pictures of the test set are among the training images, whatever their ids.

    Args:
        test_images: uint8 (n, height, width, 3).
        train_images: the same of the training images, or an iterable of such blocks.

    Returns: One sentence with the number of test images that are, byte for byte, training images,
    else none.
    """
    wanted: dict[bytes, list[int]] = {}
    for i, image in enumerate(np.asarray(test_images)):
        wanted.setdefault(
            hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest(), []
        ).append(i)
    blocks = [train_images] if isinstance(train_images, np.ndarray) else train_images
    seen = {
        hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
        for block in blocks
        for image in block
    }
    leaked = sorted(i for key, rows in wanted.items() if key in seen for i in rows)
    if not leaked:
        return []
    first = ", ".join(map(str, leaked[:5]))
    return [
        f"{len(leaked)} of {len(test_images)} test images are also training images (first:"
        f" {first}): their scores are memory, not decoding; split by image."
    ]


def check_same_test(test_sets: Mapping[str, str]) -> list[str]:
    """Say when runs are to be compared that were not scored on the same images.

    Args:
        test_sets: test-set id by run.

    Returns: One sentence naming the ids and their runs, else none.
    """
    by_id: dict[str, list[str]] = {}
    for run, test_set in test_sets.items():
        by_id.setdefault(test_set, []).append(run)
    if len(by_id) < 2:
        return []
    groups = "; ".join(f"{test_set}: {', '.join(runs)}" for test_set, runs in by_id.items())
    return [
        f"These runs were scored on {len(by_id)} different test sets, whose scores cannot be"
        f" compared ({groups})."
    ]
