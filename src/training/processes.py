"""Training in several processes: gathering, sharding, precision."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from src.training.state import _Settings
from src.training.types import Batch, Step
from src.utils import PerceptError, to_device

PRECISIONS = ("no", "bf16", "fp16")


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward adds up what all processes want of the own rows."""

    active = False  # only within a training step does a process hold a share of the batch

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (batch / processes, ...) -> (batch, ...)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather(x: Tensor, rows: bool = False) -> Tensor:
    """Rows of all processes, (batch / processes, ...) -> (batch, ...), with gradient: for losses
    that compare the samples of a batch.

    Every process then computes the loss of the whole batch, and as `fit` averages gradients, 1 and
    n processes agree. With one process, and outside a training step (in validation each process has
    all the samples), `x` comes back as it is.

    Args:
        x: what this process has, with the same shape in each.
        rows: `x` holds numbers of rows of this process's share, such as a permutation; they become
            numbers of rows of the whole batch.
    """
    if not _Gather.active or torch.distributed.get_world_size() == 1:
        return x
    if rows:
        x = x + torch.distributed.get_rank() * len(x)
    return _Gather.apply(x)


@contextmanager
def _shared_batch(processes: int) -> Iterator[None]:
    _Gather.active = processes > 1
    try:
        yield
    finally:
        _Gather.active = False


def select_local_rows(x: Tensor) -> Tensor:
    """The rows of this process in a tensor of the whole batch, (batch, ...) -> (batch / processes,
    ...): undoes `gather`.
    """
    if not _Gather.active or torch.distributed.get_world_size() == 1:
        return x
    return x.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


class _Stepper(nn.Module):
    """Makes a module of model and step, so that accelerate wraps all that a step does, and not just
    the model's forward.
    """

    def __init__(self, model: nn.Module, step: Step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Any]]:
        return self.step(self.model, batch, epoch)


def check_precision(device: str, precision: str, step_in_backward: bool = False) -> str:
    """The kind of a device, "cuda" or "cpu", when precision and device go together: to be asked
    before long work, as `fit` asks, too.

    Raises:
        PerceptError: for an unknown or impossible combination.
    """
    kind = to_device(str(device)).split(":")[0]
    if precision not in PRECISIONS:
        raise PerceptError(
            f"There is no precision '{precision}': choose one of {', '.join(PRECISIONS)}."
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise PerceptError("The device 'cuda' is not there: choose device 'cpu' or 'auto'.")
    if kind == "cpu" and precision == "fp16":
        raise PerceptError("Precision 'fp16' needs a GPU: choose 'no' or 'bf16' on the CPU.")
    if step_in_backward and precision == "fp16":
        raise PerceptError(
            "step_in_backward does not go together with precision 'fp16', which needs all the"
            " gradients at once: leave one of them."
        )
    return kind


class _Sharded(Accelerator):
    """Accelerate where it was launched with DeepSpeed: each process keeps and updates its piece of
    the optimizer's state (ZeRO stages 1 and 2).

    The weights stay whole, and in single precision: precision "bf16" is autocast, as elsewhere. A
    parameter without a gradient counts as one with zeros.
    """

    def __init__(self, settings: _Settings):
        self.settings = settings
        super().__init__(mixed_precision="no", gradient_accumulation_steps=settings.accumulate)
        stage = self.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise PerceptError(
                f"DeepSpeed's ZeRO stage {stage} is not supported: choose stage 1 or 2 in its"
                " config, as launch/deepspeed_zero2_offload.json has."
            )

    def autocast(self, autocast_handler: Any = None) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
        )

    def prepare(self, stepper: _Stepper, optimizer: Optimizer) -> Any:  # type: ignore[override]
        s = self.settings
        self.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": s.batch_size // self.num_processes // s.accumulate,
            "gradient_accumulation_steps": s.accumulate,
            "gradient_clipping": s.clip_grad or 0.0,
        }
        stepper.step = self.autocast()(stepper.step)
        self.own = optimizer  # its groups become this process's pieces
        self.engine, idle = super().prepare(stepper, optimizer)
        self.engine.optimizer.check_grad_overflow = True  # by default not in single precision
        return self.engine, idle

    def backward(self, loss: Tensor, **other: Any) -> None:
        """Of one part of a batch; that of the last part updates the weights, unless a loss or
        gradient of any process is not finite.
        """
        spoil = torch.where(
            torch.isfinite(loss.detach()), 1.0, math.nan
        )  # also the gradients: these are what the processes agree about
        self.engine.backward(loss * spoil, scale_wrt_gas=False)
        self.engine.step()

    def gradient_norm(self) -> Tensor:
        """Of the batch whose backward is done; infinite where there was no update."""
        self.own.zero_grad(
            set_to_none=False
        )  # else a parameter without a gradient would find that of the step before
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else math.inf
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)


def _accelerator(device: str, settings: _Settings, step_in_backward: bool) -> Accelerator:
    """Accelerate's handle on device, precision and processes; each `fit` gets a fresh one."""
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    for name, there in (
        ("step_in_backward", step_in_backward),
        ("precision 'fp16'", settings.precision == "fp16"),
    ):
        if sharded and there:
            raise PerceptError(
                f"DeepSpeed does not go together with {name}: leave that, or launch with a plain"
                " multi-GPU config."
            )
    kind = check_precision(device, settings.precision, step_in_backward)
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as published
    AcceleratorState._reset_state(
        reset_partial_state=not torch.distributed.is_initialized()
    )  # else a second precision is refused
    if sharded:
        if kind == "cpu":
            PartialState(
                cpu=True
                # else accelerate, which knows DeepSpeed on GPUs alone, would take each process for
                # the
                # only one
            )
        return _Sharded(settings)
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # a phase of training may leave parts of a model alone
    accelerator = Accelerator(
        mixed_precision=settings.precision, cpu=kind == "cpu", kwargs_handlers=[ddp]
    )
    if accelerator.distributed_type.value in ("FSDP", "MEGATRON_LM"):
        raise PerceptError(
            f"Sharded training ({accelerator.distributed_type.value}) is not supported: launch with"
            " a plain multi-GPU config, or DeepSpeed's."
        )
    return accelerator


def _share_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let batch norms see the whole batch, also when it is spread over processes."""
    found = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if accelerator.num_processes == 1 or not found:
        return model
    if accelerator.device.type == "cpu":
        raise PerceptError(
            "Batch norms cannot be shared by several CPU processes: use one process, or GPUs."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
