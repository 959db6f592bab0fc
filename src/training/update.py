"""One step of a training: forward, backward, update, and what follows a result that is not finite.

- A non-finite loss or gradient skips the update and is counted.
- Too many in a row go back to the weights of the last state, on the batches to come.
- On one GPU the host does not wait for a step to know: the device itself leaves out the update, and
  the host reads during the next step whether it did. Before the state is saved it reads all.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.training.batches import split_batch
from src.training.interrupt import StopRequest
from src.training.options import Checkpointing
from src.training.processes import StepModule, share_batch
from src.training.session import Session
from src.training.store import StateStore
from src.training.types import Batch, Step, log
from src.utils import PerceptError

PATIENCE = 10  # non-finite steps in a row before going back to the saved weights

ROLLBACKS = 3  # times to go back to one state before giving up


@dataclass(frozen=True)
class Agreement:
    """What all the processes do after a step: save the state, stop."""

    save: bool
    stop: bool


@dataclass(frozen=True)
class _Verdict:
    """Whether the loss and the gradient of a step were not finite, on their way to the host.

    Attributes:
        flags: Boolean (2,) in pinned memory, valid after the event.
        event: that the device reaches when they are there.
    """

    flags: Tensor
    event: torch.cuda.Event

    @classmethod
    def send(cls, finite_loss: Tensor, finite_gradient: Tensor) -> _Verdict:
        """Let the device bring it to the host."""
        bad = ~torch.stack([finite_loss, finite_gradient])
        flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
        flags.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(flags, event)

    def read(self) -> list[bool]:
        """[bad loss, bad gradient], when the step is done."""
        self.event.synchronize()
        bad: list[bool] = self.flags.tolist()
        return bad


class Updater:
    """Trains a session's model, one batch at a time.

    Args:
        session: whose model it trains.
        step: (model, batch, epoch) -> (loss, logs).
        store: where the state is saved and restored from.
        checkpointing: when to save.
        stop: whether to stop.
    """

    def __init__(
        self,
        session: Session,
        step: Step,
        store: StateStore,
        checkpointing: Checkpointing,
        stop: StopRequest,
    ):
        self.session, self.store, self.stop = session, store, stop
        self.checkpointing = checkpointing
        # accelerate's wrappers of the step and of the optimizer
        self.stepper, self.optimizer = session.accelerator.prepare(
            StepModule(session.model, step), session.optimizer
        )
        session.start_average()
        self.trainable = [p for p in session.model.parameters() if p.requires_grad]
        self.finite_gradient = self._say_yes()
        self.finite_loss = self._say_yes()
        self.is_updating = False  # whether the weights are between two steps
        self.runs_ahead = self._can_run_ahead()
        self._verdict: _Verdict | None = None
        if session.execution.step_in_backward:
            self._step_as_gradients_arrive()

    def _can_run_ahead(self) -> bool:
        """Whether the device can leave out an update by itself: with one GPU, and without a scale
        of the loss, which the host looks for.
        """
        session = self.session
        is_fused = all(group.get("fused") for group in session.optimizer.param_groups)
        is_alone = session.processes == 1 and session.accelerator.scaler is None
        return session.device.type == "cuda" and is_alone and is_fused and not session.sharded

    def _say_yes(self) -> Tensor:
        """True, on the device."""
        return torch.ones((), dtype=torch.bool, device=self.session.device)

    def _step_where(self, is_finite: Tensor) -> None:
        """Let the optimizer update all that has a gradient, or nothing: the device decides."""
        optimizer: Any = self.session.optimizer
        optimizer.found_inf = (~is_finite).float()
        optimizer.step()
        del optimizer.found_inf

    def _step_as_gradients_arrive(self) -> None:
        """Update each parameter as soon as its gradient is there and free that: the gradients of
        the whole model are never in memory together.
        """
        refused = {
            "several processes": self.session.processes > 1,
            "clip_grad": bool(self.session.optimisation.clip_grad),
            "accumulate": self.session.batching.accumulate > 1,
        }
        for name, is_set in refused.items():
            if is_set:
                raise PerceptError(
                    f"step_in_backward does not go together with {name}, which needs all the"
                    " gradients at once: leave one of them."
                )

        def update(parameter: Tensor) -> None:
            gradient = parameter.grad
            # unlike isfinite of the gradient, without copies of it
            finite = torch.isfinite(torch.linalg.vector_norm(gradient))
            self.finite_gradient = self.finite_gradient & finite
            # of all parameters this one alone has a gradient now
            if self.runs_ahead:
                self._step_where(finite & self.finite_loss)
            elif finite:
                self.session.optimizer.step()
            parameter.grad = None

        for parameter in self.trainable:
            register: Any = parameter.register_post_accumulate_grad_hook  # torch gives it no types
            register(update)

    def train_step(self, batch: Batch) -> Agreement:
        """Forward, backward, check, update."""
        session, position = self.session, self.session.position
        position.lr = session.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        self.finite_gradient = self._say_yes()
        # an update in the backward pass may end between two parameters
        self.is_updating = session.execution.step_in_backward
        logged = self._run_parts(batch)
        norm = self._gradient_norm()
        finite_gradient = torch.isfinite(norm) & self.finite_gradient
        flags = [self.is_save_due(), bool(self.stop.signal)]
        if self.runs_ahead:
            self._update_ahead(logged, norm, finite_gradient)
            if any(flags):
                self.settle()
            return Agreement(save=flags[0] and not position.bad, stop=flags[1])
        finite = [self.finite_loss, finite_gradient]
        bad_loss, bad_gradient, save, stop = session.agree(finite, flags)
        self.is_updating = True
        if bad_loss or bad_gradient:
            self._skip(bad_loss)
        else:
            self._update(norm)
            for values in logged:
                session.means.add(values, weight=1 / session.batching.accumulate)
        position.step += 1
        self.is_updating = False
        return Agreement(save=save and not position.bad, stop=stop)

    def _update_ahead(
        self, logged: list[dict[str, Any]], norm: Tensor, finite_gradient: Tensor
    ) -> None:
        """Ask the device for an update, then look at how the step before ended."""
        session, before = self.session, self._verdict
        self.is_updating = True
        finite = self.finite_loss & finite_gradient
        self._clip(norm)
        if not session.execution.step_in_backward:
            self._step_where(finite)
        if session.average is not None:
            session.average.update(finite)
        self._verdict = _Verdict.send(self.finite_loss, finite_gradient)
        self._advance_schedule()
        for values in logged:
            session.means.add(values, 1 / session.batching.accumulate, counts=finite)
        session.position.step += 1
        self.is_updating = False
        self._account(before)

    def settle(self) -> None:
        """Wait for the last step, and count it: before its weights are saved or looked at."""
        before, self._verdict = self._verdict, None
        self._account(before)

    def _account(self, verdict: _Verdict | None) -> None:
        """Count a step that was run ahead."""
        if verdict is None:
            return
        if any(verdict.read()):
            self._count_skipped(searching=False)
        else:
            self.session.position.bad = 0

    def _run_parts(self, batch: Batch) -> list[dict[str, Any]]:
        """Forward and backward of every part of a batch: what they logged.

        `finite_loss` says afterwards whether all losses are finite.
        """
        session, parts = self.session, self.session.batching.accumulate
        logged: list[dict[str, Any]] = []
        self.finite_loss = self._say_yes()
        steps_by_itself = session.execution.step_in_backward and not self.runs_ahead
        with share_batch(session.processes):
            for part in split_batch(batch, parts):
                loss, logs = self.stepper(part, session.position.epoch)
                logged.append({"loss": loss.detach(), **logs})
                self.finite_loss = self.finite_loss & torch.isfinite(loss.detach())
                # a backward pass that updates must not see a loss that is not finite
                if not steps_by_itself or bool(self.finite_loss):
                    session.accelerator.backward(loss / parts)
        return logged

    def _gradient_norm(self) -> Tensor:
        if self.session.sharded:
            return self.session.sharded.gradient_norm()
        self.session.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.session.device)
        return nn.utils.get_total_norm(gradients).to(self.session.device)

    def is_save_due(self) -> bool:
        """Whether the state is to be saved after this step."""
        every = self.checkpointing.save_steps
        if every and (self.session.steps_done + 1) % every == 0:
            return True
        elapsed = time.monotonic() - self.store.saved_at
        return self.session.is_main and elapsed > self.checkpointing.save_every

    def _clip(self, norm: Tensor) -> None:
        clip_grad = self.session.optimisation.clip_grad
        if clip_grad:
            nn.utils.clip_grads_with_norm_(self.trainable, clip_grad, norm)

    def _update(self, norm: Tensor) -> None:
        self._clip(norm)
        if not self.session.execution.step_in_backward:
            self.optimizer.step()
        self.session.scheduler.step()
        if self.session.average is not None:
            self.session.average.update()
        self.session.position.bad = 0

    def _skip(self, bad_loss: bool) -> None:
        """No update; the schedule goes on, so that the learning rate depends on the position
        alone.
        """
        scaler = self.session.accelerator.scaler
        # fp16 overflow: the scaler looks for its scale
        searching = scaler is not None and not bad_loss and scaler.get_scale() > 1
        if scaler is not None:
            scaler.update()
        self._advance_schedule()
        self._count_skipped(searching)

    def _advance_schedule(self) -> None:
        with warnings.catch_warnings():
            # torch minds when the very first update is skipped
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            self.session.scheduler.step()

    def _count_skipped(self, searching: bool) -> None:
        """Count a step without an update; after too many in a row go back to the last state."""
        position = self.session.position
        position.skipped += 1
        if not searching:
            position.bad += 1
        if position.bad >= PATIENCE or self._has_broken_buffer():
            self._roll_back()

    def _has_broken_buffer(self) -> bool:
        """Whether e.g. a batch norm's running mean is not finite."""
        for buffer in self.session.model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                return True
        return False

    def _roll_back(self) -> None:
        """Weights of the last state, for the batches to come (to see the same ones again would end
        in the same place).
        """
        position = self.session.position
        position.rollbacks += 1
        if position.rollbacks > ROLLBACKS or not self.store.path.exists():
            raise PerceptError(
                f"Training cannot be kept finite (epoch {position.epoch}, step {position.step}:"
                f" {position.skipped} steps without a finite loss and gradient in this epoch,"
                f" {position.rollbacks - 1} roll-backs): lower max_lr, choose precision 'no', or"
                " look for NaN in the data."
            )
        log.warning(
            "loss or gradient is not finite (epoch %d, step %d): back to the last saved weights",
            position.epoch,
            position.step,
        )
        self.store.roll_back()
        position.bad = 0
