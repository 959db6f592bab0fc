"""What notebook 03 leaves of a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.data.identity import format_identity
from src.decoding.systems import System
from src.parameters import Run
from src.utils import atomic


def write_reconstructions(run: Run, system: System, tensors: Mapping[str, Tensor]) -> None:
    """Write results/<run>/reconstructions.safetensors, and the two published files beside it.

    Images are in half precision, which a screen's 256 steps do not show.

    Args:
        run: of notebook 03.
        system: that reconstructed them.
        tensors: (images, ...) by name, the images of the main decoder under its name.
    """
    seen, main = system.seen, system.main.name
    subject = seen.subject
    about = {}
    if run.parameters["start_run"]:
        about["begun"] = f"at the pictures that {run.parameters['start_run']} retrieved"
    about |= {
        "data": format_identity(subject.identity),
        "main": main,
        "repeats": str(seen.most_repeats),
        "compared": f"{system.compared}_{main}",
        "protocol": subject.protocol,
        "test_set": seen.test_set,
    }
    stored = {
        "seen": seen.pixels.half(),
        **tensors,
        "image_ids": torch.from_numpy(seen.image_ids.astype(np.int64)),
        "held_out": torch.from_numpy(subject.in_excluded_clusters(seen.image_ids)),
    }
    with atomic(run.results / "reconstructions.safetensors") as path:
        contiguous = {name: tensor.contiguous() for name, tensor in stored.items()}
        save_file(contiguous, path, metadata=about)
    _write_published(run, seen.pixels, tensors[main].float())


def _write_published(run: Run, seen: Tensor, recons: Tensor) -> None:
    """Write seen images and reconstructions (images, 3, height, width) as MindEye's scripts do."""
    strength, samples = (run.parameters[k] for k in ("img2img_strength", "recons_per_sample"))
    name = f"{run.name}_recons_img2img{strength}_{samples}samples.pt"
    for file, tensor in {"all_images.pt": seen, name: recons}.items():
        with atomic(run.results / file) as path:
            torch.save(tensor, path)
