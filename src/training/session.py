"""What one process of a training works with: device, model, optimizer, schedule and position."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from src.training.average import WeightAverage
from src.training.batches import ORDERS
from src.training.optim import build_adamw, build_scheduler, find_entry, group_parameters
from src.training.options import Batching, Execution, Optimisation, count_steps
from src.training.processes import ShardedAccelerator, build_accelerator, share_norms
from src.training.state import Position, RunningMeans
from src.utils import PerceptError


class Session:
    """One process of one training, and all that changes in it.

    Attributes:
        accelerator: accelerate's handle on device, precision and processes.
        sharded: the same where it was launched with DeepSpeed, else None.
        model: on its device.
        optimizer: AdamW itself, not wrapped.
        scheduler: not wrapped, so that it advances once a step.
        position: where the run stands.
        average: of the weights, where one is asked for.
        means: of what the steps of the epoch logged.
        steps_per_epoch: without an incomplete last batch.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        batching: Batching,
        optimisation: Optimisation,
        execution: Execution,
    ):
        self.batching, self.optimisation, self.execution = batching, optimisation, execution
        self.accelerator = build_accelerator(batching, optimisation, execution)
        self.sharded: ShardedAccelerator | None = None
        if isinstance(self.accelerator, ShardedAccelerator):
            self.sharded = self.accelerator
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.processes: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.draw_order = find_entry(ORDERS, batching.order, "order")
        self.samples = samples
        self.steps_per_epoch = count_steps(batching, samples, self.processes)
        self.model = share_norms(model.to(self.device), self.accelerator)
        groups = group_parameters(self.model, optimisation.weight_decay, optimisation.decay)
        self.optimizer = build_adamw(groups, optimisation)
        self.scheduler = build_scheduler(
            self.optimizer, optimisation, batching.epochs, self.steps_per_epoch
        )
        self.average: WeightAverage | None = None
        self.position, self.means = Position(), RunningMeans()
        self._clock = time.monotonic()

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch >= self.batching.epochs

    @property
    def steps_done(self) -> int:
        """Steps since the run began."""
        return self.position.epoch * self.steps_per_epoch + self.position.step

    def start_average(self) -> None:
        """Begin to average the weights, if that is asked for: when all processes have the same.

        Raises:
            PerceptError: under DeepSpeed, or for a decay that is none.
        """
        decay = self.optimisation.weight_average
        if not decay:
            return
        if not 0 < decay < 1:
            raise PerceptError(
                f"weight_average is {decay}: choose a decay between 0 and 1, or 0 for none."
            )
        if self.sharded:
            raise PerceptError(
                "weight_average does not go together with DeepSpeed, which holds the weights in"
                " pieces: leave one of them."
            )
        self.average = WeightAverage(self.model, decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the model has its averaged weights, where there are any."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def start_clock(self) -> None:
        """Count the seconds of the epoch from now on."""
        self._clock = time.monotonic()

    def update_clock(self) -> None:
        """Add the seconds since the last look at the clock to those of the epoch."""
        now = time.monotonic()
        self.position.seconds += now - self._clock
        self._clock = now

    def agree(self, finite: list[Tensor], flags: list[bool]) -> list[bool]:
        """What holds in any process: [not finite..., flags...].

        Here a step waits for the device, where it is not ahead of it (see `Updater`).
        """
        bad = torch.empty(0, device=self.device)
        if finite:
            bad = torch.stack([~is_finite for is_finite in finite]).float()
        if self.processes == 1:
            return [bool(value) for value in bad.tolist()] + flags
        flagged = torch.tensor(flags, dtype=torch.float32, device=self.device)
        votes = torch.cat([bad, flagged])
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return [bool(value) for value in votes.tolist()]
