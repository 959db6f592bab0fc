"""What a training writes beside its weights, and the check that comes before it.

A run has one normaliser and one training split, which all its decoders share. A training that does
not fit those of the run is refused before anything of the run is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src.data.identity import check_trained_on, list_checkpoints, read_stored_config
from src.data.normaliser import FILE_NAME, Normaliser
from src.data.splits import record_training_split
from src.data.subject import Subject
from src.parameters import Run
from src.utils import PerceptError

# parameters of a training that say what its normaliser and its images are
SHARED = (
    "split",
    "n_clusters",
    "num_sessions",
    "n_components",
    "rois",
    "n_train",
    "masked",
    "train_share",
    "bag_seed",
)


def check_run(
    logs: str | Path, config: dict[str, Any], subjects: Sequence[Subject], resume: bool
) -> None:
    """Refuse a training that does not fit the decoders that its run has, or of damaged betas.

    Args:
        logs: folder of the run, train_logs/<run>/, or of one voter.
        config: of the training; its entry "training" says how images and voxels are chosen.
        subjects: that it is given.
        resume: False where the run is begun anew: then it fits.

    Raises:
        PerceptError: naming the decoder and what differs: the data, or one of SHARED; or if the
            betas are not those that were prepared (`Subject.verify`).
    """
    for subject in subjects:
        subject.verify()
    if not resume:
        return
    training = config.get("training", {})
    for path in list_checkpoints(logs):
        before = read_stored_config(path).get("training", {})
        for name in SHARED:
            if name in before and name in training and before[name] != training[name]:
                raise PerceptError(
                    f"{path} was trained with {name} {before[name]!r}, now it is"
                    f" {training[name]!r}: the decoders of a run share voxels and images, so choose"
                    " another model_name, or set resume_from_ckpt to False to begin anew."
                )
    for subject in subjects:
        check_trained_on(logs, subject.key, subject.identity)


def describe_history(folder: str | Path) -> str:
    """What the history of a training says, in sentences; also where there is none.

    Args:
        folder: of its checkpoints, in which `fit` wrote history.csv.
    """
    path = Path(folder) / "history.csv"
    if not path.exists():
        return "No network was trained."
    history = pd.read_csv(path)
    sentences = [f"The history holds {len(history)} epochs of training."]
    for name in [str(column) for column in history if str(column).startswith("val/")]:
        values = history[name].dropna()
        if len(values):
            best = int(values.argmin() if name.startswith("val/loss") else values.argmax())
            sentences.append(
                f"- {name}: {values.iloc[0]:.3f} after the first epoch, {values.iloc[-1]:.3f} after"
                f" the last, best {values.iloc[best]:.3f} after epoch {best + 1}"
            )
    return "\n".join(sentences)


def record_training(run: Run, subject: Subject, normaliser: Normaliser) -> Callable[[], None]:
    """What writes down the training split, the normaliser and the parameters of a run.

    Returns:
        A function for `fit`, which calls it when the run may be trained, and for stages that fit a
        ridge alone.
    """

    def write() -> None:
        record_training_split(subject, run.logs)
        normaliser.save(run.logs / FILE_NAME)
        run.record_parameters()

    return write
