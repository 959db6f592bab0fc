"""Experiment tracking with Weights & Biases."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd

from src.parameters import Run


class Tracker:
    """Sends the history and the figures of a training to Weights & Biases; as its own client does,
    it obeys WANDB_MODE=offline.

    Args:
        run: whose name, stage and parameters are sent along; a run that is resumed goes on under
            the same id.
        project: of Weights & Biases.
        name: shown for this run, by default the run's own.
        notes: about this run.
        host: address of a server of one's own, e.g. https://wandb.example.org; by default what
            `wandb login` or WANDB_BASE_URL say.
    """

    def __init__(self, run: Run, project: str, name: str = "", notes: str = "", host: str = ""):
        self.run, self.project = run, project
        self.name, self.notes, self.host = name or run.name, notes, host
        self._connection: Any = None

    def __call__(self, row: dict[str, Any], step: int) -> None:
        """Log the row and the figures of an epoch, as `fit` passes them."""
        # each takes a second to import
        import wandb
        from matplotlib.figure import Figure

        if self._connection is None:
            self._connection = self._connect()
        logged = {}
        for name, value in row.items():
            logged[name] = wandb.Image(value) if isinstance(value, Figure) else value
        self._connection.log(logged, step=step)

    def _connect(self) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            name=self.name,
            notes=self.notes or None,
            settings=wandb.Settings(base_url=self.host) if self.host else None,
            id=f"{self.run.name}-{self.run.stage}".replace("/", "-"),  # of a sweep: <sweep>/<point>
            resume="allow",
            dir=self.run.logs,
            job_type=self.run.stage,
            config=dict(self.run.parameters),
        )

    def finish(self) -> None:
        """Send what is left."""
        if self._connection is not None:
            self._connection.finish()


def finish_tracking(
    tracker: Tracker | None, history: pd.DataFrame, figures: dict[str, Any]
) -> None:
    """Log the last figures of a training and send what is left; nothing without a tracker."""
    if tracker is not None:
        tracker(figures, int(history["train/num_steps"].iloc[-1]))
        tracker.finish()


def open_tracker(run: Run, wandb_log: bool, project: str, **options: str) -> Tracker | None:
    """A `Tracker` (with its `options`) as the logger of `fit`, or None where there is none: for
    `wandb_log` False, and in all but the first of several processes.
    """
    if not wandb_log or os.environ.get("RANK", "0") != "0":
        return None
    return Tracker(run, project, **options)
