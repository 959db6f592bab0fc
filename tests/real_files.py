"""Published files under their own names and in their own layouts, at tiny size.

What the public repositories hold and nothing beside it: no table of ours that a reader would pick
up. The content is the mini world's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from src.miniworld.cortex import Experiment, simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import mindeye2 as mindeye2_format
from src.readers.mindeye2 import IMAGE_IDS

OURS = ("captions.parquet", "labels.parquet", "splits.csv", IMAGE_IDS)


def write_mindeye2(
    folder: Path,
    subjects: Sequence[int] = (1,),
    n_train: int = 60,
    n_test: int = 12,
    trials_per_session: int = 40,
) -> dict[int, Experiment]:
    """The dataset pscotti/mindeyev2 but for its networks: tars, betas, images, masks, captions.

    Returns:
        The mini world's experiment by subject; its image ids are rows of the file of images in
        ascending order of those that were written first.
    """
    worlds = {}
    for subject in subjects:
        worlds[subject] = simulate(
            subject, n_train, 8, n_test, trials_per_session=trials_per_session
        )
        mindeye2_format.write(folder, subject, SourceData.from_world(worlds[subject]))
    table = pd.read_csv(folder / IMAGE_IDS)
    captions = pd.read_parquet(folder / "captions.parquet").groupby("image")["caption"].agg(list)
    test_ids = {int(i) for w in worlds.values() for i in w.image_ids[-n_test:]}
    write_evaluation_files(folder, table, captions, test_ids)
    for name in (*OURS, *(path.name for path in folder.glob("voxels_*.parquet"))):
        (folder / name).unlink()
    return worlds


def write_evaluation_files(
    folder: Path, rows: pd.DataFrame, captions: pd.Series, test_ids: set[int]
) -> None:
    """Captions of all images, and of the shared ones in the order of their rows.

    Args:
        folder: of the dataset.
        rows: columns coco (row of the file of images) and image (id in the mini world).
        captions: list of sentences by id in the mini world.
        test_ids: ids of the shared images.
    """
    rows = rows.sort_values("coco")
    sentences = [captions.get(image, ["nothing"])[:5] for image in rows["image"]]
    padded = [texts + [""] * (5 - len(texts)) for texts in sentences]
    np.save(folder / "COCO_73k_annots_curated.npy", np.array(padded))
    shared = [n for n, image in enumerate(rows["image"]) if image in test_ids]
    evals = folder / "evals"
    evals.mkdir()
    people = np.array([sentences[n][0] for n in shared])
    torch.save(people, evals / "all_captions.pt", pickle_protocol=2)
    torch.save([f"git sees {text}" for text in people], evals / "all_git_generated_captions.pt")
    import h5py

    with h5py.File(folder / "coco_images_224_float16.hdf5") as file:
        images = torch.from_numpy(np.stack([file["images"][n] for n in shared])).float()
    torch.save(images, evals / "all_images.pt")
