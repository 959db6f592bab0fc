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

from src.training.options import Batching, Execution, Optimisation
from src.training.types import Batch, Step, log
from src.utils import PerceptError, to_device

PRECISIONS = ("no", "bf16", "fp16")


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward sums the gradients that all processes have of this one's
    rows.
    """

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
    gathered: Tensor
    if x.device.type == "cpu" and torch.distributed.get_backend() == "nccl":
        gathered = _Gather.apply(x.cuda())  # of GPUs alone
        return gathered.cpu()
    gathered = _Gather.apply(x)
    return gathered


@contextmanager
def share_batch(processes: int) -> Iterator[None]:
    """Within this context each of several processes has a share of the batch: `gather` gathers."""
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


class StepModule(nn.Module):
    """Makes a module of model and step, so that accelerate wraps all that a step does, and not just
    the model's forward.
    """

    def __init__(self, model: nn.Module, step: Step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss and logs of a batch."""
        return self.step(self.model, batch, epoch)


def check_precision(device: str, precision: str, step_in_backward: bool = False) -> str:
    """The kind of a device, "cuda" or "cpu", when precision and device go together: to be called
    before long work, as `fit` does, too.

    Raises:
        PerceptError: for an unknown or impossible combination.
    """
    device_type = to_device(str(device)).split(":")[0]
    if precision not in PRECISIONS:
        raise PerceptError(
            f"There is no precision '{precision}': choose one of {', '.join(PRECISIONS)}."
        )
    if device_type == "cuda" and not torch.cuda.is_available():
        raise PerceptError("The device 'cuda' is not there: choose device 'cpu' or 'auto'.")
    if device_type == "cpu" and precision == "fp16":
        raise PerceptError("Precision 'fp16' needs a GPU: choose 'no' or 'bf16' on the CPU.")
    if step_in_backward and precision == "fp16":
        raise PerceptError(
            "step_in_backward does not go together with precision 'fp16', which needs all the"
            " gradients at once: leave one of them."
        )
    return device_type


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 by itself.

    Others (those without AVX-512) emulate it: one matrix product took 69 times as long as in
    single precision.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_cpu_precision(precision: str) -> str:
    """The precision that a training on this CPU has, of PRECISIONS: single where bf16 is slow."""
    if precision == "bf16" and not has_fast_bf16():
        log.warning(
            "This CPU has no bf16 of its own and would take many times as long with it: training"
            " in single precision instead (precision 'no'). Scores differ in the last digits."
        )
        return "no"
    return precision


class ShardedAccelerator(Accelerator):  # type: ignore[misc]  # accelerate has no types
    """Accelerate where it was launched with DeepSpeed: each process keeps and updates its piece of
    the optimizer's state (ZeRO stages 1 and 2).

    The weights stay whole, and in single precision: precision "bf16" is autocast, as elsewhere. A
    parameter without a gradient counts as one with zeros.
    """

    def __init__(self, batching: Batching, clip_grad: float | None, precision: str):
        self.batching, self.clip_grad = batching, clip_grad
        self.in_bf16 = precision == "bf16"
        super().__init__(mixed_precision="no", gradient_accumulation_steps=batching.accumulate)
        stage = self.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise PerceptError(
                f"DeepSpeed's ZeRO stage {stage} is not supported: choose stage 1 or 2 in its"
                " config, as launch/deepspeed_zero2_offload.json has."
            )

    def autocast(self, autocast_handler: Any = None) -> Any:
        """The context in which a step runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16)

    def prepare(self, stepper: StepModule, optimizer: Optimizer) -> Any:
        """DeepSpeed's engine of a step, and an optimizer that does nothing: the engine updates."""
        parts = self.batching.accumulate
        self.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": (
                self.batching.batch_size // self.num_processes // parts
            ),
            "gradient_accumulation_steps": parts,
            "gradient_clipping": self.clip_grad or 0.0,
        }
        stepper.step = self.autocast()(stepper.step)
        self.piece_optimizer = optimizer  # its groups become this process's pieces
        self.engine, idle = super().prepare(stepper, optimizer)
        self.engine.optimizer.check_grad_overflow = True  # by default not in single precision
        return self.engine, idle

    def backward(self, loss: Tensor, **other: Any) -> None:
        """Of one part of a batch; that of the last part updates the weights, unless a loss or
        gradient of any process is not finite.
        """
        # NaN spoils the gradients, too: these are what the processes agree about
        spoil = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        self.engine.backward(loss * spoil, scale_wrt_gas=False)
        self.engine.step()

    def gradient_norm(self) -> Tensor:
        """Of the batch whose backward is done; infinite where there was no update."""
        # else a parameter without a gradient would find that of the step before
        self.piece_optimizer.zero_grad(set_to_none=False)
        norm = math.inf
        if self.engine.was_step_applied():
            norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)


def build_accelerator(
    batching: Batching, optimisation: Optimisation, execution: Execution
) -> Accelerator:
    """Accelerate's handle on device, precision and processes; each `fit` gets a fresh one.

    Raises:
        PerceptError: for options that do not go together with the device or the launcher.
    """
    precision = execution.precision
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if sharded:
        _check_deepspeed(execution)
    device_type = check_precision(execution.device, precision, execution.step_in_backward)
    if device_type == "cpu":
        precision = choose_cpu_precision(precision)
    # else accelerate refuses a second precision in one process
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    if sharded:
        if device_type == "cpu":
            # else accelerate, which knows DeepSpeed on GPUs alone, would take each process for the
            # only one
            PartialState(cpu=True)
        return ShardedAccelerator(batching, optimisation.clip_grad, precision)
    # a phase of training may leave parts of a model alone
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=precision, cpu=device_type == "cpu", kwargs_handlers=[ddp]
    )
    launcher = accelerator.distributed_type.value
    if launcher in ("FSDP", "MEGATRON_LM"):
        raise PerceptError(
            f"Sharded training ({launcher}) is not supported: launch with a plain multi-GPU config,"
            " or DeepSpeed's."
        )
    return accelerator


def _check_deepspeed(execution: Execution) -> None:
    """Refuse what does not go together with DeepSpeed."""
    refused = {
        "step_in_backward": execution.step_in_backward,
        "precision 'fp16'": execution.precision == "fp16",
    }
    for name, is_set in refused.items():
        if is_set:
            raise PerceptError(
                f"DeepSpeed does not go together with {name}: leave that, or launch with a plain"
                " multi-GPU config."
            )


def share_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let batch norms see the whole batch, also when it is spread over processes."""
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if accelerator.num_processes == 1 or not has_norms:
        return model
    if accelerator.device.type == "cpu":
        raise PerceptError(
            "Batch norms cannot be shared by several CPU processes: use one process, or GPUs."
        )
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm  # torch gives it no types
    shared: nn.Module = convert(model)
    return shared
