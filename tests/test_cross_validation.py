"""The cross-validation of notebook 08 for real: on digits that are drawn here, and on the real ones
where they lie.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_stages import launch

from src.miniworld.formats import digits69 as digits69_format

pytestmark = pytest.mark.slow(reason="runs notebook 08 over all folds")


def cross_validate(home: Path, source: Path, *more: str) -> pd.DataFrame:
    prepared = launch(
        home,
        "notebooks/00_prepare_data.py",
        "-f",
        "recipes/digits69/00_prepare_data.yaml",
        "--data_path",
        str(source),
    )
    assert prepared.returncode == 0, prepared.stderr
    toy = ("--folds", "2", "--inner_folds", "3", "--num_epochs", "1", *more)
    done = launch(
        home,
        "notebooks/08_cross_validate.py",
        "-f",
        "recipes/digits69/08_cross_validate.yaml",
        *toy,
    )
    assert done.returncode == 0, done.stderr
    return pd.read_csv(home / "results" / "digits69-subj01" / "cross_validation.csv")


def test_cross_validation_puts_both_splits_decoders_and_floors_into_one_table(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 28, 28), dtype=np.uint8)
    labels = np.tile([1, 2], 20)
    images[labels == 1, :14] //= 8  # two classes that differ
    betas = images.reshape(40, -1)[:, :60] / 255 + rng.normal(0, 0.05, (40, 60))
    digits69_format.write(tmp_path / "digits.mat", betas, images, labels, n_test=8)
    table = cross_validate(tmp_path, tmp_path / "digits.mat", "--voxels_kept", "20,60")
    assert set(table["split"]) == {"official", "2-fold"}
    pcc = table[(table.metric == "pcc") & (table.split == "2-fold")].set_index("row")["value"]
    assert {"ridge", "network", "class_mean", "mean_image", "shuffled"} <= set(pcc.index)
    assert pcc["ridge"] > pcc["mean_image"] and pcc["ridge"] > pcc["shuffled"]
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert set(table[table.split == "2-fold"].n) == {40}


@pytest.mark.filterwarnings("ignore")
def test_ridge_on_real_digits_beats_every_floor_on_the_official_split(tmp_path, digits69_path):
    table = cross_validate(tmp_path, digits69_path)
    pcc = table[(table.metric == "pcc") & (table.split == "official")].set_index("row")["value"]
    assert (
        pcc["ridge"] > 0.79
        and pcc["mean_image"] == pytest.approx(0.655, abs=2e-3)
        and pcc["class_mean"] == pytest.approx(0.736, abs=5e-3)
    )
