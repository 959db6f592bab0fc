"""Loss curves of the mini recipe's high level trained by one process and by two, same global batch,
drawn over each other.

    python benchmarks/processes.py [epochs]

Writes docs/processes.png; a few minutes on two cores. In double precision and without dropout both
give the same losses (tests/test_distributed.py: 1e-8 over 20 steps). Here it is the recipe as it
is: single and half precision, and dropout, which every process draws for itself. What is left
between the curves is that noise; a second seed shows its size.
"""

from __future__ import annotations

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd

from src.figures import COLOURS, apply_style, save_figure
from src.utils import HOME, ROOT

FILES = [
    "-f",
    "recipes/mindeye/01_train_high_level.yaml",
    "-f",
    "recipes/mindeye/mini/01_train_high_level.yaml",
]


def read_history(name: str, processes: int, epochs: int, seed: int = 42) -> pd.DataFrame:
    """History of one training."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc_per_node={processes}")
    flags = ["--model_name", name, "--decoder", "network", "--precision", "no"]
    flags += ["--num_epochs", str(epochs), "--seed", str(seed)]
    environment = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": str(2 // processes)}
    subprocess.run(
        [*launcher, "notebooks/01_train_high_level.py", *FILES, *flags],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    return pd.read_csv(HOME / "train_logs" / name / "high_level" / "history.csv")


def main(epochs: int = 6) -> None:
    """Train three times and draw."""
    runs = {
        "1 process": read_history("processes-1", 1, epochs),
        "2 processes": read_history("processes-2", 2, epochs),
        "1 process, another seed": read_history("processes-1-seed", 1, epochs, seed=7),
    }
    with apply_style():
        fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
        for ax, column in zip(axes, ("train/loss", "val/loss", "val/token_r2"), strict=True):
            for i, (name, history) in enumerate(runs.items()):
                ax.plot(
                    history["epoch"],
                    history[column],
                    color=COLOURS[i],
                    ls=("-", "--", ":")[i],
                    lw=2,
                    label=name,
                )
            ax.set(title=column, xlabel="epoch")
        axes[0].legend(fontsize=8)
        save_figure(fig, ROOT / "docs" / "processes.png")
    first = runs["1 process"]
    for name, history in list(runs.items())[1:]:
        difference = (history["train/loss"] / first["train/loss"] - 1).abs()
        print(
            f"{name}: training loss differs by {100 * difference.mean():.2f} % on average,"
            f" {100 * difference.max():.2f} % at most"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
