"""Features that an exported model computes for one fixed image, stored beside it.

A library that computes something else is noticed when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from src import pretrained

from . import data


def write_golden_features(name: str, models: Sequence[pretrained.FrozenModel]) -> None:
    """Write golden_features.json into the folder of a model.

    Args:
        name: of the folder under data/mini_models.
        models: the model with all the options in which it is used.
    """
    golden = {}
    for model in models:
        key = json.dumps([type(model).__name__, model.get_options()], sort_keys=True)
        golden[key] = model.compute_golden_features()
    path = data.OUT / name / "golden_features.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")
