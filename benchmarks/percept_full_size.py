"""What Percept's decoder costs at the size of NSD, on arrays of that size: 257 x 768 tokens, 15,724
voxels.

    python benchmarks/percept_full_size.py basis 400    # one pass over the tokens of so many images
    python benchmarks/percept_full_size.py step 5       # so many steps of training

Principal components of the tokens read all images `iterations` + 2 = 6 times: multiply.
"""

import sys
import time

import numpy as np
import torch

from src.encoding.target_pca import TargetSet, fit_target_basis
from src.networks import PerceptDecoder
from src.utils import count_parameters, peak_memory

TOKENS, LATENT, VOXELS, BATCH = (257, 768), (4, 64, 64), 15724, 128
N_OUTPUTS = (400, 300)


class RandomRows:
    """Tokens in half precision, of which any image has some."""

    def __init__(self, stored):
        self.stored = stored

    def rows(self, image_ids):
        """Tokens by image id, (n, 257, 768)."""
        return self.stored[image_ids % len(self.stored)]


def measure_basis(n_images):
    """Principal components of the tokens of so many images, with one iteration."""
    stored = np.random.default_rng(0).standard_normal((64, *TOKENS), np.float32).astype(np.float16)
    start, cpu = time.perf_counter(), time.process_time()
    images = TargetSet(RandomRows(stored), np.arange(n_images))
    fit_target_basis(images, n_components=min(N_OUTPUTS[0], n_images - 1), iterations=1)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"3 passes over {n_images} images and 1 QR: {seconds:.1f} s ({cpu:.1f} CPU s), peak memory"
        f" {peak_memory() / 1e9:.2f} GB"
    )


def measure_steps(count):
    """Steps of the decoder in single precision."""
    model = PerceptDecoder(VOXELS, TOKENS, N_OUTPUTS[0], LATENT, N_OUTPUTS[1])
    print(f"{count_parameters(model):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    voxels, target = torch.randn(BATCH, VOXELS), torch.randn(BATCH, sum(N_OUTPUTS))
    for number in range(count):
        start, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        model.compute_loss(model(voxels), target).backward()
        optimizer.step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"step {number + 1}: {seconds:.2f} s ({cpu:.2f} CPU s)")
    print(f"peak memory {peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    {"basis": measure_basis, "step": measure_steps}[sys.argv[1]](int(sys.argv[2]))
