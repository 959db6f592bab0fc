"""The end of an epoch: validation, the row of the history, checkpoints, figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object

from src.training.checkpoints import CheckpointWriter
from src.training.options import Checkpointing, Reporting
from src.training.session import Session
from src.training.state import RunningMeans, get_random_state, set_random_state
from src.training.types import Validate
from src.utils import PerceptError, atomic, peak_memory, seed_everything


def call_isolated(
    session: Session, function: Callable[..., dict[str, Any]], *args: Any, exact: bool = False
) -> dict[str, Any]:
    """Look at the model under a fixed seed: the same noise at each epoch, and none taken from
    training. `exact`: in single precision, whatever that of the training is.
    """
    before = get_random_state(session.device)
    seed_everything(session.batching.seed)
    session.model.eval()
    try:
        precision = nullcontext() if exact else session.accelerator.autocast()
        with torch.no_grad(), session.averaged_weights(), precision:
            return function(*args)
    finally:  # the state may be saved after an error
        session.model.train()
        set_random_state(before, session.device)


def summarise_epoch(session: Session, validate: Validate | None, monitor: str) -> dict[str, float]:
    """The row of the history of the epoch that ends; all processes take part.

    Raises:
        PerceptError: if `validate` does not return the monitored column.
    """
    position = session.position
    row: dict[str, float] = {"epoch": position.epoch, "train/loss": math.nan}
    row |= _gather_logs(session)
    steps_done = (position.epoch + 1) * session.steps_per_epoch
    row |= {"train/lr": position.lr, "train/num_steps": steps_done}
    if validate is not None:
        validated = call_isolated(session, validate, session.model)
        row |= {name: float(value) for name, value in validated.items()}
        if monitor not in row:
            raise PerceptError(
                f"validate gives no '{monitor}' to choose the best epoch by: it gives"
                f" {', '.join(row)}."
            )
    session.update_clock()
    return (
        row
        | {"skipped": position.skipped, "seconds": round(position.seconds, 3)}
        | _memory(session)
    )


def _gather_logs(session: Session) -> dict[str, float]:
    """Means over all processes of what the steps logged."""
    means = RunningMeans()
    means.load(gather_object([session.means.state()]))
    logs = {}
    for name, value in means.values().items():
        logs[name if "/" in name else f"train/{name}"] = value
    return logs


def _memory(session: Session) -> dict[str, float]:
    """Peak memory in GB."""
    memory = {"memory": round(peak_memory("cpu") / 1e9, 3)}
    if session.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(session.device)
        memory["gpu_memory"] = round(peak / 1e9, 3)
    return memory


def write_epoch(
    session: Session,
    writer: CheckpointWriter,
    config: dict[str, Any],
    checkpointing: Checkpointing,
    row: dict[str, float],
) -> None:
    """Write history.csv and the checkpoints of the epoch that ends."""
    names = _select_checkpoints(session, checkpointing, row)
    if checkpointing.checkpoints:
        about = {"epoch": session.position.epoch, "threads": torch.get_num_threads()}
        with session.averaged_weights():
            writer.put(names, session.model.state_dict(), config | about)
    with atomic(writer.folder / "history.csv") as temporary:
        pd.DataFrame(session.position.history).to_csv(temporary, index=False)


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table of comma-separated values, which is made where it is missing."""
    rows = [pd.DataFrame([row])]
    if Path(path).exists():
        rows.insert(0, pd.read_csv(path))
    with atomic(path) as temporary:
        pd.concat(rows, ignore_index=True).to_csv(temporary, index=False)


def _select_checkpoints(
    session: Session, checkpointing: Checkpointing, row: dict[str, float]
) -> list[str]:
    """Names of the checkpoints that are due; the best value so far is kept in the position."""
    position, only_at_end = session.position, checkpointing.save_at_end
    epochs_done = position.epoch + 1
    is_last = epochs_done == session.batching.epochs
    names = []
    if is_last or not only_at_end:
        names.append("last")
    if row.get(checkpointing.monitor, math.nan) < position.best:
        position.best = row[checkpointing.monitor]
        if not only_at_end:
            names.append("best")
    interval = checkpointing.ckpt_interval
    if checkpointing.keep_epochs and interval and (is_last or epochs_done % interval == 0):
        names.append(f"epoch{epochs_done:03d}")  # as published, the number of epochs that are done
    return names


def draw_figures(
    session: Session, reporting: Reporting, checkpointing: Checkpointing
) -> dict[str, Any]:
    """Figures of the epoch that has just ended, where their turn has come."""
    interval = reporting.draw_interval
    if interval is None:
        interval = checkpointing.ckpt_interval
    if reporting.draw is None or not session.is_main:
        return {}
    epochs_done = session.position.epoch
    if session.is_finished or (interval and epochs_done % interval == 0):
        # frozen models, which make the figures, do not take part in mixed precision
        epoch = epochs_done - 1
        return call_isolated(session, reporting.draw, session.model, epoch, exact=True)
    return {}
