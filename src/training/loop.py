"""One training loop for every stage: `fit(model, step, dataset, ...)`.

- The science is in the notebook's `step(model, batch, epoch) -> (loss, logs)`; here is what
  surrounds it: order, optimizer, schedule, checkpoints.
- Resuming is exact: on CPU, a run that was killed and started again ends with bitwise the weights
  of one that was not. The order of an epoch is a pure function of (seed, epoch); state.pt holds
  weights, optimizer, schedule and the random generators of every process.
- Launched with DeepSpeed, the optimizer's state is in pieces, one file a process beside state.pt,
  and such a run is resumed by as many processes.
- `batch_size` is global and the learning rate is what it says: nothing is scaled by the number of
  processes. The whole step runs inside accelerate's wrapper, so it may call any part of the model;
  a loss that compares samples uses `gather`.
- A non-finite loss or gradient skips the update and is counted; too many in a row go back to the
  weights of the last state, on the batches to come.
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from src.training.batches import ORDERS, _collate, _parts, set_epoch
from src.training.optim import SCHEDULERS, _adamw, _choose, group_parameters
from src.training.processes import _accelerator, _Sharded, _share_norms, _shared_batch, _Stepper
from src.training.state import (
    _check_same,
    _Means,
    _Position,
    _random_state,
    _Saving,
    _set_random_state,
    _Settings,
    _Stop,
)
from src.training.types import Batch, Draw, Logger, Step, TrainingData, Validate, log
from src.utils import (
    PerceptError,
    atomic,
    load_checkpoint,
    load_strictly,
    peak_memory,
    save_checkpoint,
    seed_everything,
)

PATIENCE, ROLLBACKS = (
    10,
    3,
)  # non-finite steps in a row before going back; times to go back to one state before giving up


class _Training:
    """One run: what changes while training, and how it is saved together."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        dataset: Any,
        folder: Path,
        config: dict[str, Any],
        settings: _Settings,
        saving: _Saving,
        device: str,
        step_in_backward: bool = False,
    ):
        self.accelerator = _accelerator(device, settings, step_in_backward)
        self.sharded = self.accelerator if isinstance(self.accelerator, _Sharded) else None
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.dataset, self.folder, self.config, self.settings, self.saving = (
            dataset,
            folder,
            config,
            settings,
            saving,
        )
        _choose(ORDERS, settings.order, "order")
        self.steps = self._steps_per_epoch()
        self.model = _share_norms(model.to(self.device), self.accelerator)
        groups = group_parameters(self.model, settings.weight_decay, settings.decay)
        self.raw_optimizer = _adamw(groups, settings.max_lr, settings.betas, settings.eps)
        make = _choose(SCHEDULERS, settings.scheduler, "scheduler")
        if settings.warmup_steps and settings.scheduler != "warmup":
            raise PerceptError(
                f"The schedule '{settings.scheduler}' has no warmup_steps to set: choose 'warmup',"
                " or leave them at 0."
            )
        if settings.cycle_steps and (
            settings.scheduler != "cycle" or settings.cycle_steps < settings.epochs * self.steps
        ):
            raise PerceptError(
                f"cycle_steps is {settings.cycle_steps}: it is for the schedule 'cycle' and at"
                f" least the {settings.epochs * self.steps} steps of the run."
            )
        shape = (settings.epochs, self.steps, settings.warmup_steps, settings.cycle_steps)
        self.scheduler = make(
            self.raw_optimizer, settings.max_lr, *shape
        )  # not prepared: one step a step
        self.stepper, self.optimizer = self.accelerator.prepare(
            _Stepper(self.model, step), self.raw_optimizer
        )
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.at, self.means, self.stop = _Position(), _Means(), _Stop()
        self.saved = self.clock = time.monotonic()
        self.in_backward, self.broken_gradient = step_in_backward, False
        if step_in_backward:
            self._step_as_gradients_arrive()

    def _step_as_gradients_arrive(self) -> None:
        """Update each parameter as soon as its gradient is there and free that: the gradients of
        the whole model are never held together.
        """
        s = self.settings
        for name, there in (
            ("several processes", self.world > 1),
            ("clip_grad", bool(s.clip_grad)),
            ("accumulate", s.accumulate > 1),
        ):
            if there:
                raise PerceptError(
                    f"step_in_backward does not go together with {name}, which needs all the"
                    " gradients at once: leave one of them."
                )

        def update(p: Tensor) -> None:
            # unlike isfinite of the gradient, without copies of it
            if torch.isfinite(torch.linalg.vector_norm(p.grad)):  # type: ignore[arg-type]
                self.raw_optimizer.step()  # of all parameters this one alone has a gradient now
            else:
                self.broken_gradient = True
            p.grad = None

        for p in self.trainable:
            p.register_post_accumulate_grad_hook(update)

    def _steps_per_epoch(self) -> int:
        s = self.settings
        if s.epochs < 1 or s.batch_size < 1:
            raise PerceptError(
                f"Training needs at least one epoch and a batch of one, not {s.epochs} and"
                f" {s.batch_size}."
            )
        if s.batch_size % self.world:
            raise PerceptError(
                f"A batch_size of {s.batch_size} cannot be split over {self.world} processes:"
                f" choose a multiple of {self.world}."
            )
        if s.accumulate < 1 or s.batch_size // self.world % s.accumulate:
            parts = f"{s.accumulate} equal parts" + (
                f" on each of {self.world} processes" if self.world > 1 else ""
            )
            raise PerceptError(
                f"A batch_size of {s.batch_size} cannot be worked through in {parts}: choose a"
                " multiple."
            )
        if s.samples < s.batch_size:
            raise PerceptError(
                f"There are {s.samples} training samples, fewer than one batch of {s.batch_size}:"
                " choose a smaller batch_size."
            )
        return s.samples // s.batch_size

    # ------------------------------------------------------------------------------- state on disk
    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def finished(self) -> bool:
        return self.at.epoch >= self.settings.epochs

    def _identity(self) -> dict[str, Any]:
        try:
            return json.loads(json.dumps({"config": self.config, "fit": self.settings.identity()}))
        except TypeError as error:
            raise PerceptError(
                f"The config cannot be stored as JSON ({error}): keep numbers, texts, lists and"
                " dicts in it."
            ) from error

    def save(self) -> None:
        """Write the state; all processes take part.

        Of a finished run it keeps the history alone, as the weights are in last.safetensors, if
        anywhere.
        """
        self._tick()
        if self.sharded and not self.finished:
            with atomic(self._piece(vars(self.at), self.rank)) as temporary:
                torch.save(self.raw_optimizer.state_dict(), temporary)
        own = {"random": _random_state(self.device), "means": self.means.state()}
        content = {
            "identity": self._identity(),
            "position": vars(self.at),
            "processes": gather_object([own]),
        }
        if self.main:
            if not self.finished:
                scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
                content |= {
                    "model": self.model.state_dict(),
                    "optimizer": None if self.sharded else self.raw_optimizer.state_dict(),
                }
                content |= {
                    "pieces": self.pieces,
                    "scheduler": self.scheduler.state_dict(),
                    "scaler": scaler,
                }
            elif not self.saving.checkpoints:
                content |= {"model": self.model.state_dict()}
            with atomic(self.path) as temporary:
                torch.save(content, temporary)
            self._remove_pieces("" if self.finished else self._piece(vars(self.at), "*").name)
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    @property
    def pieces(self) -> int:
        """In how many files beside state.pt the optimizer's state is; 0 where state.pt holds it."""
        return self.world if self.sharded else 0

    def _piece(self, position: dict[str, Any], rank: int | str) -> Path:
        """The optimizer's state in one process; state.pt is written after those of its step, and
        those of the one before are removed last.
        """
        return self.folder / f"state-{position['epoch'] * self.steps + position['step']}-{rank}.pt"

    def _remove_pieces(self, but: str = "") -> None:
        for old in self.folder.glob("state-*.pt"):
            if not but or not old.match(but):
                old.unlink()

    def _load(self, path: Path) -> dict[str, Any]:
        # mapped for a GPU, whose process then reads only what it copies; the optimizer may keep its
        # piece as it is
        try:
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=self.device.type == "cuda" and path == self.path,
            )
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            state = "it" if path == self.path else self.path
            raise PerceptError(
                f"{path} cannot be read ({str(error).splitlines()[0]}): delete {state}, or set"
                " resume_from_ckpt to False to begin anew."
            ) from error

    def begin(self, resume: bool) -> None:
        """Go on from the state on disk, or begin anew."""
        self.accelerator.wait_for_everyone()
        seed_everything(
            self.settings.seed + self.rank
        )  # dropout and noise differ between processes
        identity = self._identity()
        if resume and self.path.exists():
            content = self._load(self.path)
            _check_same(content["identity"]["config"], identity["config"], self.folder)
            _check_same(content["identity"]["fit"], identity["fit"], self.folder)
            self._restore(content)
        elif not resume and self.main:
            for name in ("state.pt", "history.csv", "best.safetensors", "last.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
            self._remove_pieces()
        self.accelerator.wait_for_everyone()

    def _restore(self, content: dict[str, Any]) -> None:
        self.at = _Position(**content["position"])
        if self.finished:
            return self._restore_finished(content.get("model"))
        if content.get("pieces", 0) != self.pieces:
            before, now = (
                f"by {n} processes under DeepSpeed" if n else "without DeepSpeed"
                for n in (content.get("pieces", 0), self.pieces)
            )
            raise PerceptError(
                f"{self.path} was saved {before} and cannot be resumed {now}: launch as before, or"
                " set resume_from_ckpt to False to begin anew."
            )
        self._restore_weights(content)
        self.scheduler.load_state_dict(content["scheduler"])
        if content["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self._restore_process(content["processes"])
        log.info("resuming %s at epoch %d, step %d", self.folder, self.at.epoch, self.at.step)

    def _restore_finished(self, weights: dict[str, Tensor] | None) -> None:
        last = self.folder / "last.safetensors"
        if weights is None and not last.exists():
            raise PerceptError(
                f"The run in {self.folder} is finished, but its last.safetensors is gone: put it"
                " back, or set resume_from_ckpt to False to train again."
            )
        load_strictly(
            self.model,
            load_checkpoint(last)[0] if weights is None else weights,
            str(last if weights is None else self.path),
        )
        log.info("%s is finished: %d epochs", self.folder, self.at.epoch)

    def _restore_process(self, processes: list[dict[str, Any]]) -> None:
        """Random state and running means of this process, or a fair substitute when their number
        has changed.
        """
        if len(processes) == self.world:
            self.means.load([processes[self.rank]["means"]])
            return _set_random_state(processes[self.rank]["random"], self.device)
        log.warning(
            "%d processes go on with a run of %d: random numbers differ from here",
            self.world,
            len(processes),
        )
        self.means.load([p["means"] for p in processes] if self.main else [])
        seed_everything(
            self.settings.seed + self.rank + 1000 * (self.at.epoch * self.steps + self.at.step)
        )

    def _restore_weights(self, content: dict[str, Any]) -> None:
        load_strictly(self.model, content["model"], str(self.path))
        if self.sharded:
            # what it updates is a copy of the weights
            self.sharded.engine.optimizer.refresh_fp32_params()
        self.raw_optimizer.load_state_dict(
            self._load(self._piece(content["position"], self.rank))
            if self.sharded
            else content["optimizer"]
        )

    def _tick(self) -> None:
        now = time.monotonic()
        self.at.seconds, self.clock = self.at.seconds + now - self.clock, now

    # ------------------------------------------------------------------------------------ one step
    def _train_step(self, batch: Batch) -> tuple[bool, bool]:
        """Forward, backward, check, update.

        Returns what all the processes agree on: whether to save now, and to stop.
        """
        self.at.lr = self.raw_optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        self.broken_gradient = False
        told, parts = [], self.settings.accumulate
        finite = torch.tensor(True, device=self.device)
        with _shared_batch(self.world):
            for part in _parts(batch, parts):
                loss, logs = self.stepper(part, self.at.epoch)
                told.append({"loss": loss.detach(), **logs})
                finite = finite & torch.isfinite(loss.detach())
                if not self.in_backward or bool(finite):
                    self.accelerator.backward(loss / parts)
        norm = self.sharded.gradient_norm() if self.sharded else self._gradient_norm()
        flags = [finite, torch.isfinite(norm) & (not self.broken_gradient)]
        bad_loss, bad_grad, save, stop = self._agree(flags, [self._due(), bool(self.stop.asked)])
        if bad_loss or bad_grad:
            self._skip(bad_loss)
        else:
            self._update(norm)
            for values in told:
                self.means.add(values, weight=1 / parts)
        self.at.step += 1
        return save and not self.at.bad, stop

    def _gradient_norm(self) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None]).to(
            self.device
        )  # of none at all, it is on the CPU

    def _agree(self, finite: list[Tensor], flags: list[bool]) -> list[bool]:
        """What holds in any process: [not finite..., flags...].

        The one place where a step waits for the device.
        """
        bad = (
            torch.stack([~f for f in finite]).float()
            if finite
            else torch.empty(0, device=self.device)
        )
        if self.world == 1:
            return [bool(value) for value in bad.tolist()] + flags
        both = torch.cat([bad, torch.tensor(flags, dtype=torch.float32, device=self.device)])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        return [bool(value) for value in both.tolist()]

    def _due(self) -> bool:
        steps = self.saving.save_steps
        by_steps = bool(steps) and (self.at.epoch * self.steps + self.at.step + 1) % steps == 0
        return by_steps or (self.main and time.monotonic() - self.saved > self.saving.save_every)

    def _update(self, norm: Tensor) -> None:
        if self.settings.clip_grad:
            nn.utils.clip_grads_with_norm_(self.trainable, self.settings.clip_grad, norm)
        if not self.in_backward:
            self.optimizer.step()
        self.scheduler.step()
        self.at.bad = 0

    def _skip(self, bad_loss: bool) -> None:
        """No update; the schedule goes on, so that the learning rate depends on the position alone."""
        scaler = self.accelerator.scaler
        searching = (
            scaler is not None and not bad_loss and scaler.get_scale() > 1
        )  # fp16 overflow: the scaler looks for its scale
        if scaler is not None:
            scaler.update()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*lr_scheduler.step.*"
            )  # torch minds when the very first update is skipped
            self.scheduler.step()
        self.at.skipped += 1
        self.at.bad += not searching
        broken = any(
            b.is_floating_point() and not torch.isfinite(b).all() for b in self.model.buffers()
        )
        if self.at.bad >= PATIENCE or broken:
            self._roll_back()

    def _roll_back(self) -> None:
        """Weights of the last state, for the batches to come (to see the same ones again would end
        in the same place).
        """
        self.at.rollbacks += 1
        if self.at.rollbacks > ROLLBACKS or not self.path.exists():
            raise PerceptError(
                f"Training cannot be kept finite (epoch {self.at.epoch}, step {self.at.step}:"
                f" {self.at.skipped} steps without a finite loss and gradient in this epoch,"
                f" {self.at.rollbacks - 1} roll-backs): lower max_lr, choose precision 'no', or"
                " look for NaN in the data."
            )
        log.warning(
            "loss or gradient is not finite (epoch %d, step %d): back to the last saved weights",
            self.at.epoch,
            self.at.step,
        )
        now = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.raw_optimizer.param_groups
        ]
        self._restore_weights(self._load(self.path))
        for group, values in zip(self.raw_optimizer.param_groups, now, strict=True):
            group.update(values)  # the learning rate belongs to the position, which stays
        self.at.bad = 0

    # ----------------------------------------------------------------------------------- one epoch
    def _loader(self, workers: int) -> DataLoader:
        """What is left of this process's share of the epoch."""
        s, share = self.settings, self.settings.batch_size // self.world
        order = ORDERS[s.order](s.samples, s.seed, self.at.epoch)
        starts = range(
            self.at.step * s.batch_size + self.rank * share, self.steps * s.batch_size, s.batch_size
        )
        own = torch.Generator()  # else the loader would draw from the generator of the steps
        return DataLoader(
            self.dataset,
            batch_sampler=[order[i : i + share].tolist() for i in starts],
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=own,
        )

    def train_epoch(self, workers: int) -> None:
        """Train for the rest of the present epoch."""
        self.model.train()
        set_epoch(self.dataset, self.at.epoch)
        for batch in self._loader(workers):
            save, stop = self._train_step(send_to_device(batch, self.device, non_blocking=True))
            if stop:
                self._leave()
            if save:
                self.at.rollbacks = 0
                self.save()

    def _leave(self) -> None:
        self.save()
        log.warning(
            "stopped at epoch %d, step %d; the same call goes on from %s",
            self.at.epoch,
            self.at.step,
            self.path,
        )
        if self.stop.asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def end_epoch(self, validate: Validate | None) -> dict[str, float]:
        """Validate, write history and checkpoints, move on."""
        row = self._row(validate)
        self.at.history.append(row)
        self._write(row)
        self.at.epoch, self.at.step, self.at.skipped, self.at.seconds = self.at.epoch + 1, 0, 0, 0.0
        self.means = _Means()
        save, stop = self._agree([], [self._due() or self.finished, bool(self.stop.asked)])
        if stop:
            self._leave()
        if save and (self.finished or not self.at.bad):
            self.at.rollbacks = 0
            self.save()
        return row

    def _row(self, validate: Validate | None) -> dict[str, float]:
        everywhere = _Means()
        everywhere.load(gather_object([self.means.state()]))
        row: dict[str, float] = {"epoch": self.at.epoch, "train/loss": math.nan}
        row |= {
            name if "/" in name else f"train/{name}": value
            for name, value in everywhere.values().items()
        }
        row |= {"train/lr": self.at.lr, "train/num_steps": (self.at.epoch + 1) * self.steps}
        if validate is not None:
            row |= {name: float(value) for name, value in self._apart(validate, self.model).items()}
            if self.saving.monitor not in row:
                raise PerceptError(
                    f"validate gives no '{self.saving.monitor}' to choose the best epoch by: it"
                    f" gives {', '.join(row)}."
                )
        self._tick()
        row |= {
            "skipped": self.at.skipped,
            "seconds": round(self.at.seconds, 3),
            "memory": round(peak_memory("cpu") / 1e9, 3),
        }
        return row | (
            {"gpu_memory": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)}
            if self.device.type == "cuda"
            else {}
        )

    def _apart(self, look: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """Look at the model under a seed of its own: the same noise at each epoch, and none taken
        from training.
        """
        before = _random_state(self.device)
        seed_everything(self.settings.seed)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            values = look(*args)
        self.model.train()
        _set_random_state(before, self.device)
        return values

    def _write(self, row: dict[str, float]) -> None:
        if not self.main:
            return
        saving, done = self.saving, self.at.epoch + 1
        last = done == self.settings.epochs
        names = ["last"] if last or not saving.save_at_end else []
        if row.get(saving.monitor, math.nan) < self.at.best:
            self.at.best = row[saving.monitor]
            names += [] if saving.save_at_end else ["best"]
        if (
            saving.keep_epochs
            and saving.ckpt_interval
            and (last or done % saving.ckpt_interval == 0)
        ):
            names.append(f"epoch{done:03d}")  # as published, the number of epochs that are done
        for name in names if saving.checkpoints else []:
            save_checkpoint(
                self.folder / f"{name}.safetensors",
                self.model.state_dict(),
                self.config | {"epoch": self.at.epoch},
            )
        with atomic(self.folder / "history.csv") as temporary:
            pd.DataFrame(self.at.history).to_csv(temporary, index=False)

    def _figures(self, draw: Draw | None) -> dict[str, Any]:
        """What `draw` makes of the epoch that has just ended, where its turn has come."""
        every = self.saving.draw_interval
        if (
            draw is None
            or not self.main
            or not (self.finished or (every and self.at.epoch % every == 0))
        ):
            return {}
        return self._apart(draw, self.model, self.at.epoch - 1)

    def run(
        self, validate: Validate | None, workers: int, logger: Logger | None, draw: Draw | None
    ) -> None:
        """All the epochs that are left, with one bar."""
        bar = tqdm(
            total=self.settings.epochs,
            initial=self.at.epoch,
            desc=f"training {self.folder.name}",
            unit="epoch",
            mininterval=2,
            disable=not self.main,
        )
        self.saved = self.clock = time.monotonic()
        with bar, self.stop:
            while not self.finished:
                self.train_epoch(workers)
                row = self.end_epoch(validate)
                figures = self._figures(draw)
                shown = {
                    k.removeprefix("train/"): f"{row[k]:.4g}"
                    for k in ("train/loss", self.saving.monitor, "train/lr")
                    if k in row
                }
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if logger is not None and self.main:
                    logger(row | figures, int(row["train/num_steps"]))


def fit(
    model: nn.Module,
    step: Step,
    dataset: TrainingData,
    *,
    folder: str | Path,
    config: dict[str, Any],
    epochs: int,
    batch_size: int,
    max_lr: float,
    validate: Validate | None = None,
    seed: int = 42,
    scheduler: str = "cycle",
    warmup_steps: int = 0,
    cycle_steps: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: str = "no_norms",
    accumulate: int = 1,
    precision: str = "no",
    clip_grad: float | None = None,
    resume: bool = True,
    monitor: str = "val/loss",
    save_every: float = 300.0,
    save_steps: int = 0,
    ckpt_interval: int = 5,
    keep_epochs: bool = False,
    save_at_end: bool = False,
    checkpoints: bool = True,
    order: str = "shuffled",
    step_in_backward: bool = False,
    num_workers: int = 0,
    device: str = "auto",
    logger: Logger | None = None,
    draw: Draw | None = None,
    draw_interval: int | None = None,
) -> pd.DataFrame:
    """Train a model; called again after an interruption, it goes on where it was, and for a
    finished run it returns at once.

    Args:
        model: trained in place, moved to the device; afterwards it has the last weights and is in
            eval mode.
        step: (model, batch, epoch) -> (scalar loss, logs); a batch is what `dataset.__getitems__`
            gives, on the device. With several processes a batch is a share of the global one, and a
            loss must be a mean over samples, or be made of `gather`ed tensors.
        dataset: training samples; an epoch shows each once, but for an incomplete last batch.
        folder: for best.safetensors, last.safetensors, history.csv and state.pt.
        config: JSON-like; stored with each checkpoint (with the epoch beside it), and checked when
            resuming.
        epochs: passes over the dataset.
        batch_size: samples a step, over all processes.
        max_lr: peak learning rate; never scaled.
        validate: model -> {"val/loss": ...} on the validation split (never the test split), called
            in eval mode, without gradient, in every process.
        seed: of the order and of everything random in the steps (process n has seed + n).
        scheduler: key of SCHEDULERS: "cycle" (MindEye's), "linear", "fixed", or "warmup" (rises to
            max_lr, then fixed); it advances once a step.
        warmup_steps: of the schedule "warmup".
        cycle_steps: of the whole of the schedule "cycle", where the run shall walk through a part
            of it only; 0: as many as the run has.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        decay: key of DECAYS: what it leaves out.
        accumulate: parts in which a batch is worked through before the one update, to save memory;
            a loss must be a mean over samples.
        precision: "no", "bf16" or "fp16" (the whole step runs under autocast).
        clip_grad: largest norm of the gradient.
        resume: go on from folder/state.pt where there is one; False: remove it and the checkpoints,
            and begin anew.
        monitor: the column whose smallest value makes best.safetensors.
        save_every: seconds between saves of the state: what a crash can cost.
        save_steps: also every so many steps; 0: by the clock only.
        ckpt_interval: epochs between the files epochNNN.safetensors (with `keep_epochs`; NNN are
            done by then) and between figures.
        keep_epochs: keep them; each is as large as the model.
        save_at_end: write last.safetensors at the end only, and no best.safetensors.
        checkpoints: write best, last and epochNNN; the state from which a run is resumed is written
            in any case, and keeps the weights when it is done.
        order: key of ORDERS: "shuffled", or "resampled" (drawn with replacement, as published).
        step_in_backward: update each parameter as its gradient arrives, so that gradients need no
            more memory than the largest of them; the result is the same. A gradient that is not
            finite then keeps its own parameter from the update, not the others.
        num_workers: processes that read batches.
        device: "auto", "cuda" or "cpu".
        logger: called with (row of the history and figures of the epoch, steps so far) after each
            epoch, e.g. a `tracker`.
        draw: (model, epoch) -> figures by name, called as `validate` is, but by the main process
            alone, every `draw_interval` epochs and at the end.
        draw_interval: by default `ckpt_interval`; 0: at the end alone.

    Returns:
        The history, one row an epoch: epoch, train/..., val/..., train/lr, train/num_steps, skipped
            (non-finite steps), seconds, memory (GB, the most that this process has had resident so
            far, with all that it holds beside the training) and, on a GPU, gpu_memory (GB, there).

    Raises:
        PerceptError: for settings that are impossible or that differ from the run on disk, or when
            training cannot be kept finite.
        KeyboardInterrupt: after Ctrl-C, when the step is done and the state saved (SystemExit after
            SIGTERM).
    """
    settings = _Settings(
        epochs,
        batch_size,
        max_lr,
        seed,
        scheduler,
        weight_decay,
        decay,
        precision,
        clip_grad or None,
        len(dataset),
        order,
        warmup_steps,
        (betas[0], betas[1]),
        eps,
        accumulate,
        cycle_steps,
    )
    figures_every = ckpt_interval if draw_interval is None else draw_interval
    saving = _Saving(
        monitor,
        save_every,
        save_steps,
        ckpt_interval,
        keep_epochs,
        save_at_end,
        checkpoints,
        figures_every,
    )
    training = _Training(
        model, step, dataset, Path(folder), config, settings, saving, device, step_in_backward
    )
    training.begin(resume)
    if not training.finished:
        training.run(validate, num_workers, logger, draw)
    if training.sharded:
        training.sharded.engine.destroy()  # takes its hooks off the model
    model.eval()
    return pd.DataFrame(training.at.history)


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
