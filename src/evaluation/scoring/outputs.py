"""What notebook 06 writes: the selection log, figures, published tables and the gallery."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.records import make_records, score_table
from src.evaluation.scoring.captions import CaptionScores
from src.evaluation.scoring.instruments import Instruments
from src.evaluation.scoring.material import Material
from src.evaluation.scoring.parts import Part
from src.evaluation.tables import published_table, retrieval_records, write_table
from src.figures import (
    plot_abstention_curve,
    plot_score_by_distance,
    plot_score_dots,
    save_figure,
)
from src.metrics import METRICS, Metric
from src.parameters import list_decoders
from src.utils import atomic, read_json, resolve

Records = Sequence[Mapping[str, Any]]

DRAWN = 4  # scores that a figure shows

# condition -> its title in the gallery
GALLERY_TITLES = {
    "system": "reconstructed",
    "refined": "refined",
    "retrieved": "found in the pool",
    "nearest_train": "nearest training image",
    "ceiling": "ceiling",
}

# baselines of the refined images that do not depend on them
SHARED_BASELINES = ("mean_image", "untrained", "nearest_train")


def list_choices(material: Material) -> list[dict[str, str]]:
    """The selection log: what was chosen on the way, and on which data, as notebook 03 was told."""
    if material.subject is None:
        chosen = "not known: the reconstructions were made elsewhere"
        return [_make_entry("everything", chosen, "unknown")]
    if "choices" in material.metadata:
        return json.loads(material.metadata["choices"])
    recorded = read_json(material.run.results / "parameters" / "03_reconstruct.json")
    settings = {name: entry["value"] for name, entry in recorded.items()}
    entries, decoders = [], list_decoders(settings["decoder"])
    if "network" in decoders:
        entries += _list_network_choices(settings)
    if "ridge" in decoders:
        what, split = "penalty of the ridge baseline", "cross-validation within train"
        entries.append(_make_entry(what, "by target", split))
    if "kernel" in decoders:
        what = "penalty and width of the kernel decoder"
        entries.append(_make_entry(what, "fixed in advance", "none"))
    return entries


def _make_entry(what: str, chosen: str, split: str) -> dict[str, str]:
    return {"what": what, "chosen": chosen, "split": split}


def _list_network_choices(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was chosen for the network: the epoch, and one of several samples."""
    chosen_on = "none: the last epoch is taken"
    if settings["checkpoint"] == "best":
        chosen_on = "val"
    entries = [_make_entry("epoch", settings["checkpoint"], chosen_on)]
    if settings["recons_per_sample"] > 1:
        what = f"one of {settings['recons_per_sample']} samples an image"
        chosen = "nearest to the tokens predicted from the brain"
        if settings.get("selection") == "brain":
            chosen = "makes the measured voxels most likely, by an encoding model"
        entries.append(_make_entry(what, chosen, "none: no true image is used"))
    return entries


# ------------------------------------------------------------------------------------------ figures
def draw_figures(
    material: Material,
    instruments: Instruments,
    scores: Mapping[Any, np.ndarray],
    records: Records,
) -> None:
    """Draw results/<run>/figures/: all scores with their baselines (scores.png); where it is known,
    scores by the distance to the nearest training image (train_distance.png), and scores of the
    images whose samples differ least (abstain.png).

    Args:
        material: what was scored.
        instruments: with the metrics.
        scores: (images,) by (condition, metric).
        records: of all scores.
    """
    folder, tensors = material.run.results / "figures", material.tensors
    panels = _choose_drawn(material, instruments, scores)
    if "train_distance" in tensors and len(material.seen) >= 5:
        figure = plot_score_by_distance(tensors["train_distance"], panels)
        save_figure(figure, folder / "train_distance.png")
    if "spread" in tensors:
        better = {metric.name: metric.better for metric in instruments.metrics}
        figure = plot_abstention_curve(tensors["spread"], panels, better)
        save_figure(figure, folder / "abstain.png")
    save_figure(plot_score_dots(records), folder / "scores.png")


def _choose_drawn(
    material: Material, instruments: Instruments, scores: Mapping[Any, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores of the system that a figure shows: the first few that there are."""
    prefix, mark = instruments.prefix, material.mark
    wished = ["mini:judge:kind", "pixcorr", f"{prefix}EffNet-B1", f"{prefix}SwAV"]
    registered = [prefix + name if METRICS[name].network else name for name in METRICS]
    judged = [m.name.removesuffix(mark) for m in instruments.metrics if "judge" in m.name]
    names = dict.fromkeys(name + mark for name in [*wished, *registered, *judged])
    available = [name for name in names if ("system", name) in scores]
    return {name: scores["system", name] for name in available[:DRAWN]}


# ------------------------------------------------------------------------------------------- tables
def write_published_tables(
    material: Material,
    instruments: Instruments,
    table: pd.DataFrame,
    records: Records,
    regional: Part,
    captions: CaptionScores,
) -> pd.DataFrame:
    """Write the published tables with the names of the metrics in them, under results/<run>/tables:
    of the reconstructions, of the refined images and of captions, where there are any.

    Args:
        material: what was scored.
        instruments: with the metrics of the images.
        table: of all scores.
        records: of all scores.
        regional: brain correlation.
        captions: scores of captions.

    Returns:
        The table of the reconstructions.
    """
    run = material.run
    folder = run.results / "tables"
    retrieval = retrieval_records(read_json(run.results / "metrics.json"))
    published = published_table([*records, *retrieval])
    write_table(folder / f"{run.name}_all_recons.csv", published)
    if "refined" in material.conditions:
        refined = _score_refined(material, instruments.metrics, table, "refined_ceiling")
        if regional.metrics:
            refined += _score_refined(material, regional.metrics, table, "ceiling")
        enhanced = published_table([*refined, *retrieval])
        write_table(folder / f"{run.name}_all_enhancedrecons.csv", enhanced)
    if len(captions.summary):
        names = captions.summary["metric"] + " " + captions.summary["pairing"]
        columns = ["Metric", "value", "low", "high", "n", "shuffled", "common_caption"]
        named = captions.summary.assign(Metric=names)[columns]
        write_table(
            folder / f"{run.name}_caption_metrics.csv", named.rename(columns={"value": "Value"})
        )
    return published


def _score_refined(
    material: Material, metrics: Sequence[Metric], table: pd.DataFrame, upper_bound: str
) -> list[dict[str, Any]]:
    """Records of the refined images in the system's place, with their own shuffled pairing, and the
    baselines that do not depend on them.

    Args:
        material: what was scored.
        metrics: of these records.
        table: of all scores.
        upper_bound: condition that is theirs.
    """
    conditions = {"system": material.conditions["refined"]}
    own_scores = score_table(material.seen, conditions, metrics, **material.score_options())
    baselines = table[table["row"].isin(SHARED_BASELINES)]
    best = table[table["row"] == upper_bound].assign(row="ceiling")
    reason = "" if len(best) else "the same was not made of the true latents"
    joined = pd.concat([own_scores, baselines, best], ignore_index=True)
    is_asked = joined["metric"].isin([metric.name for metric in metrics])
    return make_records(joined[is_asked], metrics, **material.labels, no_upper_bound=reason)


def list_published_values(
    material: Material, instruments: Instruments, scores: Mapping[Any, np.ndarray]
) -> pd.Series:
    """Mean scores of the reconstructions by metric; of anyone's reconstructions they are also
    written beside the file, as the published script does.
    """
    values = {}
    for metric in instruments.metrics:
        name = metric.name.removeprefix(instruments.prefix).removesuffix(material.mark)
        if name in instruments.names:
            values[metric.name] = f"{scores['system', metric.name].mean():.6f}"
    series = pd.Series(values)
    if material.subject is None:
        file = resolve(str(material.run.parameters["recon_path"])).with_suffix(".csv")
        with atomic(file) as path:
            named = pd.Series(values, name="Value").rename_axis("Metric")
            named.to_csv(path, sep="\t")
    return series


# ------------------------------------------------------------------------------------------ gallery
def make_gallery(
    material: Material,
    instruments: Instruments,
    scores: Mapping[Any, np.ndarray],
    captions: CaptionScores,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """What the report and the gallery show: images by title, and a row of details an image (scores,
    whether retrieval found it, captions).
    """
    ids, subject = material.image_ids, material.subject
    details = pd.DataFrame(
        {metric.name: scores["system", metric.name] for metric in instruments.metrics}, index=ids
    )
    retrieved = material.run.results / "retrieved.parquet"
    if subject is not None and retrieved.exists():
        ranking = pd.read_parquet(retrieved).query("direction == 'image_from_brain'")
        details["hit"] = ranking.set_index("image")["rank"].reindex(ids).to_numpy() == 1
    if subject is not None and subject.captions is not None:
        first = subject.captions.groupby("image")["caption"].first()
        details["caption"] = first.reindex(ids).fillna("").to_numpy()
    if captions.scored and captions.captions is not None:
        table = captions.captions
        details["caption"] = [
            f"{first_caption} | from the brain: {brain} | of the image: {image}"
            for first_caption, brain, image in zip(
                details["caption"], table["brain"], table["git_image"], strict=True
            )
        ]
    titles = {material.low_level_name: "low level"} | GALLERY_TITLES
    images = {"seen": material.seen}
    for condition, title in titles.items():
        if condition in material.conditions:
            images[title] = material.conditions[condition]
    return images, details


def describe_scores(records: Records) -> str:
    """Each score with its interval, its best baseline and its upper bound, in sentences."""
    sentences = []
    for record in records:
        interval = f"{record['value']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"
        text = f"- {record['name']} ({record['better']} is better): {interval}"
        if record["floors"]:
            values = {name: floor["value"] for name, floor in record["floors"].items()}
            choose = max if record["better"] == "higher" else min
            best = choose(values, key=values.__getitem__)
            text += f"; best baseline {best} {values[best]:.3f}"
        if "value" in record["ceiling"]:
            text += f"; upper bound {record['ceiling']['value']:.3f}"
        sentences.append(text)
    return "\n".join(sentences)
