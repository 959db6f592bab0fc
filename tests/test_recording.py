"""src.readers.recording: what a Recording refuses, and that blocks are stored like one array."""

import numpy as np
import pandas as pd
import pytest

from src.data.layout import number_repeats
from src.data.subject import open_subject
from src.readers.recording import Recording, RowBlocks, store_recording
from src.utils import PerceptError

ATTRIBUTES = {"source": "a", "units": "b", "normalisation": "c", "protocol": "d"}


def make_parts():
    """Arguments of a Recording: six trials of four images, three voxels."""
    rng = np.random.default_rng(0)
    image = np.array([7, 8, 9, 7, 5, 8])
    trials = pd.DataFrame({"trial": np.arange(6), "image": image, "session": 0, "run": 0})
    trials["repeat"] = number_repeats(trials)
    trials["split"] = trials["image"].map({7: "train", 8: "train", 9: "test", 5: "val"})
    return {
        "betas": rng.standard_normal((6, 3)).astype(np.float32),
        "trials": trials,
        "images": rng.integers(0, 256, (4, 5, 5, 3), dtype=np.uint8),
        "image_ids": np.array([5, 7, 8, 9]),
        "attributes": ATTRIBUTES,
        "voxels": pd.DataFrame({"V1": [True, False, True]}),
        "captions": pd.DataFrame({"image": [5, 7], "caption": ["a five", "a seven"]}),
    }


def test_blocks_and_arrays_are_stored_alike(tmp_path):
    parts = make_parts()
    store_recording(Recording(**parts), tmp_path / "arrays", 1)
    blocks = parts | {
        "betas": RowBlocks((6, 3), iter([parts["betas"][:4], parts["betas"][4:]])),
        "images": iter([parts["images"][:1], parts["images"][1:]]),
    }
    folder = store_recording(Recording(**blocks), tmp_path / "blocks", 1)
    assert folder == tmp_path / "blocks" / "subj01"
    arrays, blockwise = (open_subject(tmp_path / name, 1) for name in ("arrays", "blocks"))
    np.testing.assert_array_equal(arrays.betas, parts["betas"])
    np.testing.assert_array_equal(blockwise.betas, parts["betas"])
    np.testing.assert_array_equal(blockwise.images([5, 7, 8, 9]), parts["images"])
    pd.testing.assert_frame_equal(arrays.trials, blockwise.trials)
    assert arrays.attributes == blockwise.attributes
    assert blockwise.captions["caption"].tolist() == ["a five", "a seven"]
    assert blockwise.labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: {"betas": parts["betas"][:5]}, "5 rows of betas for 6 trials"),
        (lambda parts: {"betas": RowBlocks((6, 4), [])}, "4 voxels, the table of voxels has 3"),
        (lambda parts: {"images": parts["images"][:3]}, "3 images for 4 image ids"),
        (lambda parts: {"image_ids": np.array([5, 7, 8, 10])}, "Image 9 of the trials"),
        (lambda parts: {"trials": parts["trials"].drop(columns="run")}, "lacks the columns"),
        (lambda parts: {"labels": pd.DataFrame({"kind": ["a"]})}, "labels has no column image"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, message):
    parts = make_parts()
    with pytest.raises(PerceptError, match=message):
        Recording(**parts | change(parts))
