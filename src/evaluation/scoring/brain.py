"""Brain correlation: what an encoder says that the brain would answer to a reconstruction."""

from __future__ import annotations

from typing import Any

import numpy as np

from src.data.normaliser import Normaliser
from src.evaluation.brain_correlation import brain_correlation, roi_masks
from src.evaluation.records import make_records, score_table
from src.evaluation.scoring.material import Material
from src.evaluation.scoring.parts import Part
from src.metrics import Metric
from src.pretrained.gnet import load_gnet
from src.utils import PerceptError

CONDITIONS = ("system", "refined", "mean_image", "other_recon", "untrained", "nearest_train")


def score_brain_correlation(material: Material) -> Part:
    """Correlation, across the voxels of each region, of what GNet predicts from the reconstructions
    and what was measured. Nothing unless parameter brain_corr asks for it.

    The seen images themselves, through the encoder, are the upper bound; the generator's images of
    the true latents stand beside.

    Raises:
        PerceptError: for anyone's reconstructions, which come without brain data.
    """
    run, subject = material.run, material.subject
    if not run.parameters["brain_corr"]:
        return Part()
    if subject is None:
        raise PerceptError(
            "brain_corr needs what was measured while the images were seen, which recon_path comes"
            " without: set it to False."
        )
    encoder = load_gnet(str(run.parameters["weights"]), int(run.parameters["subj"]), run.device)
    masks = roi_masks(subject.voxels)
    measured, order = subject.get_mean_betas("test", normaliser=Normaliser.fit(subject))
    positions = [list(order).index(image) for image in material.image_ids]
    measured = measured[positions]  # (images, voxels), z-scored
    metrics = [
        _make_metric(name, mask, encoder, measured, material.mark) for name, mask in masks.items()
    ]
    conditions = {k: material.conditions[k] for k in CONDITIONS if k in material.conditions}
    conditions["ceiling"] = material.seen
    if "ceiling" in material.conditions:
        conditions["true_latents"] = material.conditions["ceiling"]
    table = score_table(material.seen, conditions, metrics, **material.score_options())
    records = make_records(table, metrics, **material.labels)
    return Part(records, table, metrics=metrics)


def _make_metric(
    name: str, mask: np.ndarray, encoder: Any, measured: np.ndarray, mark: str
) -> Metric:
    """The brain correlation of one region as a metric: images are prepared by the encoder, the
    truth is what was measured.
    """

    def correlate(true: Any, reconstructed: Any, pairing: Any = slice(None)) -> np.ndarray:
        return brain_correlation(reconstructed, true[pairing], {name: mask})[name]

    text = (
        f"correlation across the voxels of {name} of what GNet says of the reconstruction and what"
        " was measured; ceiling: the seen images"
    )
    return Metric(
        f"brain_correlation {name}{mark}",
        correlate,
        "higher",
        None,
        text,
        "MindEye2, arXiv 2403.11207, brain correlation",
        encoder.predict,
        measured,
    )
