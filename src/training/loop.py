"""One training loop for every stage: `fit(model, step, dataset, ...)`.

- The science is in the notebook's `step(model, batch, epoch) -> (loss, logs)`; here is what
  surrounds it: order, optimizer, schedule, checkpoints.
- Resuming is exact: on CPU, with as many threads, a run that was killed and started again ends with
  bitwise the weights of one that was not. Another number of threads adds numbers in another order,
  so it is recorded, and a change is said. The order of an epoch is a pure function of (seed,
  epoch); state.pt holds weights, optimizer, schedule and the random generators of every process
  (store.py).
- Where memory ends, one sentence says what to lower, and the state is saved if it is whole. Random
  numbers then differ from those of a run that had memory enough.
- `batch_size` is global and the learning rate is what it says: nothing is scaled by the number of
  processes. The whole step runs inside accelerate's wrapper, so it may call any part of the model;
  a loss that compares samples uses `gather` (processes.py).
- A step whose loss or gradient is not finite is skipped and counted (update.py).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from src.data.identity import find_identity
from src.training.batches import collate, set_epoch
from src.training.checkpoints import CheckpointWriter
from src.training.epochs import draw_figures, summarise_epoch, write_epoch
from src.training.feed import iterate_ahead
from src.training.interrupt import StopRequest
from src.training.memory import explain_out_of_memory
from src.training.options import (
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    describe_run,
)
from src.training.owner import own_training
from src.training.session import Session
from src.training.state import RunningMeans
from src.training.store import StateStore
from src.training.types import Step, TrainingData, Validate, log
from src.training.update import Updater
from src.utils import (
    PerceptError,
    check_writable,
    is_out_of_memory,
    load_checkpoint,
    load_strictly,
    memory_errors,
)


class _Training:
    """The epochs of one run.

    Args:
        session: model, optimizer, schedule and position.
        store: where its state is saved.
        updater: one step.
        dataset: training samples.
        checkpointing: what to write, and when.
    """

    def __init__(
        self,
        session: Session,
        store: StateStore,
        updater: Updater,
        dataset: Any,
        checkpointing: Checkpointing,
    ):
        self.session, self.store, self.updater = session, store, updater
        self.dataset, self.checkpointing = dataset, checkpointing
        self.writer = CheckpointWriter(store.folder, session.device)
        self.stop = updater.stop
        self.doing = "a step"  # key of `REMEDIES`, for the message where memory ends

    def run(self, validate: Validate | None, reporting: Reporting) -> None:
        """All the epochs that are left, with one bar."""
        session = self.session
        bar = tqdm(
            total=session.batching.epochs,
            initial=session.position.epoch,
            desc=f"training {self.store.folder.name}",
            unit="epoch",
            mininterval=2,
            disable=not session.is_main,
        )
        session.start_clock()
        self.store.saved_at = time.monotonic()
        with bar, self.stop, self.writer:
            while not session.is_finished:
                row, figures = self._run_epoch(validate, reporting)
                bar.set_postfix(self._summarise(row), refresh=False)
                bar.update()
                if reporting.logger is not None and session.is_main:
                    reporting.logger(row | figures, int(row["train/num_steps"]))

    def _run_epoch(
        self, validate: Validate | None, reporting: Reporting
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The rest of an epoch and its end: the row of its history, and its figures."""
        try:
            self.doing = "a step"
            self._train_epoch()
            row = self._end_epoch(validate)
            self.doing = "the figures"
            return row, draw_figures(self.session, reporting, self.checkpointing)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory(self.session, self.doing, self._keep_state()) from error

    def _save(self) -> None:
        """Save the state, after the checkpoints that are older than it."""
        self.writer.finish()
        self.store.save()

    def _keep_state(self) -> str:
        """Save the state when memory has ended, if it is whole; says what is on the disk."""
        session, path = self.session, self.store.path
        session.optimizer.zero_grad(set_to_none=True)
        # of several processes the others wait for this one; an update is not half done
        if session.processes == 1 and not self.updater.is_updating:
            try:
                self.updater.settle()
                self._save()
                return f"the state is saved in {path}"
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        if path.exists():
            return f"the state of the last save is kept in {path}"
        return "there is no state to go on from yet"

    def _summarise(self, row: dict[str, float]) -> dict[str, str]:
        """Loss, monitored column and learning rate for the bar."""
        names = ("train/loss", self.checkpointing.monitor, "train/lr")
        return {name.removeprefix("train/"): f"{row[name]:.4g}" for name in names if name in row}

    def _build_loader(self) -> DataLoader[Any]:
        """What is left of this process's share of the epoch."""
        session, batch_size = self.session, self.session.batching.batch_size
        position, share = session.position, batch_size // session.processes
        order = session.draw_order(session.samples, session.batching.seed, position.epoch)
        first = position.step * batch_size + session.rank * share
        starts = range(first, session.steps_per_epoch * batch_size, batch_size)
        return DataLoader(
            self.dataset,
            batch_sampler=[order[start : start + share].tolist() for start in starts],
            collate_fn=collate,
            num_workers=session.execution.num_workers,
            pin_memory=session.device.type == "cuda",
            # else the loader would draw from the generator of the steps
            generator=torch.Generator(),
        )

    def _train_epoch(self) -> None:
        """Train for the rest of the epoch."""
        session = self.session
        session.model.train()
        set_epoch(self.dataset, session.position.epoch)
        for batch in iterate_ahead(self._build_loader(), session.device):
            agreement = self.updater.train_step(batch)
            if agreement.stop:
                self._leave()
            if agreement.save:
                session.position.rollbacks = 0
                self._save()
        self.updater.settle()

    def _end_epoch(self, validate: Validate | None) -> dict[str, float]:
        """Validate, write history and checkpoints, move on."""
        session, position = self.session, self.session.position
        self._check_skipped()
        self.doing = "the validation"
        row = summarise_epoch(session, validate, self.checkpointing.monitor)
        self.doing = "saving"
        position.history.append(row)
        if session.is_main:
            write_epoch(session, self.writer, self.store.config, self.checkpointing, row)
        position.epoch += 1
        position.step, position.skipped, position.seconds = 0, 0, 0.0
        session.means = RunningMeans()
        save_due = self.updater.is_save_due() or session.is_finished
        save, stop = session.agree([], [save_due, bool(self.stop.signal)])
        if stop:
            self._leave()
        if save and (session.is_finished or not position.bad):
            position.rollbacks = 0
            self._save()
        return row

    def _check_skipped(self) -> None:
        """Do not let a run end as finished when most of its updates were skipped.

        Raises:
            PerceptError: at the end of such a run; its state is saved, and it stays unfinished.
        """
        session, position = self.session, self.session.position
        if position.epoch + 1 < session.batching.epochs:
            return
        skipped = position.skipped + sum(int(row.get("skipped", 0)) for row in position.history)
        steps = session.batching.epochs * session.steps_per_epoch
        if 2 * skipped <= steps:
            return
        self._save()
        raise PerceptError(
            f"{skipped} of the {steps} updates of {self.store.folder} were skipped, as loss or"
            " gradient were not finite, so that this training does not count as finished: lower"
            " max_lr, choose precision 'no', or look for NaN in the data, and set resume_from_ckpt"
            f" to False to begin anew (its state is kept in {self.store.path})."
        )

    def _leave(self) -> None:
        """Save the state and end as the signal asks for."""
        self._save()
        position = self.session.position
        log.warning(
            "stopped at epoch %d, step %d; the same call goes on from %s",
            position.epoch,
            position.step,
            self.store.path,
        )
        if self.stop.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def fit(
    model: nn.Module,
    step: Step,
    dataset: TrainingData | Subset[Any],
    *,
    folder: str | Path,
    config: dict[str, Any],
    batching: Batching,
    optimisation: Optimisation,
    execution: Execution | None = None,
    checkpointing: Checkpointing | None = None,
    validate: Validate | None = None,
    reporting: Reporting | None = None,
    begin: Callable[[], None] | None = None,
) -> pd.DataFrame:
    """Train a model; called again after an interruption, it goes on where it was, and for a
    finished run it returns at once.

    Args:
        model: trained in place, moved to the device; afterwards it has the last weights and is in
            eval mode.
        step: (model, batch, epoch) -> (scalar loss, logs); a batch is what `dataset.__getitems__`
            gives, on the device. With several processes a batch is a share of the global one, and a
            loss must be a mean over samples, or be computed from `gather`ed tensors.
        dataset: training samples, or a `Subset` of them; an epoch shows each once, but for an
            incomplete last batch.
        folder: for best.safetensors, last.safetensors, history.csv and state.pt.
        config: JSON-like; stored with each checkpoint (with the epoch beside it), and checked when
            resuming; so are the data of the samples, as its entry "data" (`find_identity`).
        batching: epochs, batch size, seed, order.
        optimisation: AdamW and its learning rate.
        execution: device, precision, workers.
        checkpointing: what to write and when, and whether to resume.
        validate: model -> {"val/loss": ...} on the validation split (never the test split), called
            in eval mode, without gradient, in every process.
        reporting: logger and figures.
        begin: called by the main process when the run is found to be of these settings, before the
            first step: writes what belongs to the run beside its weights.

    Returns:
        The history, one row an epoch: epoch, train/..., val/..., train/lr, train/num_steps, skipped
            (non-finite steps), seconds, memory (GB, the most that this process has had resident so
            far, with all that it holds beside the training) and, on a GPU, gpu_memory (GB, there).

    Raises:
        PerceptError: for settings that are impossible or that differ from the run on disk, for a
            folder that cannot be written or that another training is writing, or when training
            cannot be kept finite.
        KeyboardInterrupt: after Ctrl-C, when the step is done and the state saved (SystemExit after
            SIGTERM).
    """
    execution, checkpointing = execution or Execution(), checkpointing or Checkpointing()
    settings = describe_run(batching, optimisation, execution, len(dataset))
    if data := find_identity(dataset):
        config = config | {"data": data}
    with memory_errors("setting up the training", "choose a smaller network, or free memory"):
        session = Session(model, len(dataset), batching, optimisation, execution)
    store = StateStore(
        session, Path(folder), config, settings, keep_weights=not checkpointing.checkpoints
    )
    updater = Updater(session, step, store, checkpointing, StopRequest())
    with own_training(session, store.folder):
        with memory_errors("reading the state", "choose a smaller network, or free memory"):
            store.open(checkpointing.resume)
        if session.is_main and not session.is_finished:
            check_writable(store.folder)
        if begin is not None and session.is_main:
            begin()
        if not session.is_finished:
            training = _Training(session, store, updater, dataset, checkpointing)
            training.run(validate, reporting or Reporting())
            if session.average is not None:
                session.average.apply()
    if session.sharded:
        session.sharded.engine.destroy()  # takes its hooks off the model
    model.eval()
    return pd.DataFrame(session.position.history)


def load_best(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a model the weights of the best validation epoch in a folder of `fit`.

    Raises:
        PerceptError: if there are none, or they do not fit.
    """
    path = Path(folder) / "best.safetensors"
    if not path.exists():
        raise PerceptError(
            f"There is no {path}: train with a validate function and without save_at_end."
        )
    load_strictly(model, load_checkpoint(path)[0], str(path))
    return model.eval()
