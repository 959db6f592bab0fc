"""Experiment tracking with Weights & Biases."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.figure import Figure

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
        self.run, self.project, self.name, self.notes, self.host = (
            run,
            project,
            name or run.name,
            notes,
            host,
        )
        self._open: Any = None

    def __call__(self, row: dict[str, Any], step: int) -> None:
        """Log what `fit` gives after an epoch."""
        import wandb  # takes a second to import: only where it is used

        if self._open is None:
            settings = wandb.Settings(base_url=self.host) if self.host else None
            self._open = wandb.init(
                project=self.project,
                name=self.name,
                notes=self.notes or None,
                settings=settings,
                id=f"{self.run.name}-{self.run.stage}",
                resume="allow",
                dir=self.run.logs,
                job_type=self.run.stage,
                config=dict(self.run.parameters),
            )
        self._open.log(
            {k: wandb.Image(v) if isinstance(v, Figure) else v for k, v in row.items()}, step=step
        )

    def finish(self) -> None:
        """Send what is left."""
        if self._open is not None:
            self._open.finish()


def open_tracker(run: Run, wandb_log: bool, project: str, **options: str) -> Tracker | None:
    """A `Tracker` (with its `options`) for `fit`'s `logger`, or None where none is wanted: not at
    all, or not in this one of several processes.
    """
    return (
        Tracker(run, project, **options)
        if wandb_log and os.environ.get("RANK", "0") == "0"
        else None
    )
