"""A simulated subject in the prepared layout, without a source format in between."""

from __future__ import annotations

from src.data.identity import Preparation, preparing
from src.data.layout import subject_folder
from src.data.subject import Subject, open_subject
from src.miniworld.cortex import simulate
from src.readers.recording import Recording, store_recording
from src.utils import PerceptError

ATTRIBUTES = {
    "source": "mini world (simulated)",
    "units": "percent signal change (simulated)",
    "normalisation": "none",
    "protocol": "mini-300",
}


def open_mini_subject(
    n_train: int = 1500, dataset: str = "quickstart", subj: int = 1, overwrite: bool = False
) -> Subject:
    """Open a subject of the mini world; the first call simulates it.

    Args:
        n_train: training images; 300 validation and 300 test images are added. Each is shown three
            times.
        dataset: name of the folder under HOME/data in which it is stored.
        subj: 1 to 8.
        overwrite: simulate again, although the subject is there.

    Raises:
        PerceptError: if the stored subject has another number of training images.
    """
    if overwrite or not subject_folder(dataset, subj).exists():
        world = simulate(subj, n_train)
        recording = Recording(
            betas=world.scan.betas,
            trials=world.scan.trials,
            images=world.images,
            image_ids=world.image_ids,
            attributes=ATTRIBUTES,
            voxels=world.scan.voxels,
            captions=world.captions,
            labels=world.labels,
        )
        with preparing(Preparation("mini", "", {}, {"mini_images": n_train})):
            store_recording(recording, dataset, subj)
    subject = open_subject(dataset, subj)
    n_stored = len(subject.image_ids("train"))
    if n_stored != n_train:
        raise PerceptError(
            f"Subject {subj} of {dataset} is stored with {n_stored} training images, and {n_train}"
            " are asked for: set overwrite to True, or choose another dataset."
        )
    return subject
