"""The pretended GPU: what it refuses and counts, and every path of the product under it.

No line of Percept has run on a real GPU here. These tests show what can be shown without one: that
no operation mixes devices, that nothing reads the device's memory as the host's, that random states
are kept, and where the host would wait.
"""

import copy
import threading

import numpy as np
import pytest
import torch
from pretend_gpu import CPU, GPU, CudaRefusal, get_device, pretend_gpu
from torch import nn

# ------------------------------------------------------------------------------- what is refused
SLIPS = {
    "two devices": lambda host, gpu: gpu + host,
    "a weight that stayed": lambda host, gpu: nn.functional.linear(gpu, host),
    "the GPU's number beside the CPU's tensor": lambda host, gpu: host * gpu.sum(),
    "a number of the CPU in a stack": lambda host, gpu: torch.stack([gpu.sum(), host.sum()]),
    "an index of the GPU": lambda host, gpu: host[torch.tensor([0], device="cuda")],
    "rows chosen by an index of the CPU": lambda host, gpu: gpu.index_select(0, torch.tensor([0])),
    "a value of the CPU at an index": lambda host, gpu: gpu.index_put_(
        (torch.tensor([0], device="cuda"),), host[:1]
    ),
    "in place": lambda host, gpu: gpu.add_(host),
    "pinned memory": lambda host, gpu: gpu.pin_memory(),
    "a generator of the CPU": lambda host, gpu: torch.randn(
        2, device="cuda", generator=torch.Generator()
    ),
    "a generator of the GPU": lambda host, gpu: torch.randperm(
        3, generator=torch.Generator("cuda")
    ),
    "a gradient of the CPU": lambda host, gpu: setattr(gpu, "grad", host),
    "a scatter": lambda host, gpu: gpu.scatter_(0, torch.zeros(2, 2, dtype=torch.long), 1.0),
    "an embedding": lambda host, gpu: nn.functional.embedding(torch.tensor([0]), gpu),
    "a loss": lambda host, gpu: nn.functional.cross_entropy(gpu, torch.tensor([0, 1])),
    "a where": lambda host, gpu: torch.where(host > 0, gpu, 0.0),
    "gradients that differ": lambda host, gpu: nn.utils.get_total_norm([gpu, host]),
    "another thread": lambda host, gpu: run_in_thread(lambda: gpu + host),
}


def run_in_thread(function):
    """What a thread raises is raised here."""
    errors = []

    def run():
        try:
            function()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("slip", SLIPS)
def test_what_cuda_refuses_is_refused(slip):
    with pretend_gpu():
        host = torch.rand(2, 2)
        with pytest.raises(CudaRefusal):
            SLIPS[slip](host, host.to("cuda"))


@pytest.mark.parametrize("read", [lambda x: x.numpy(), np.asarray, lambda x: x.detach().numpy()])
def test_memory_of_the_gpu_is_no_array(read):
    with pretend_gpu(), pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        read(torch.zeros(3, device="cuda"))


def test_what_cuda_allows_is_allowed():
    with pretend_gpu():
        host, gpu = torch.rand(3, 2), torch.ones(3, 2, device="cuda")
        assert get_device(gpu * torch.tensor(2.0)) == GPU  # a number of the CPU
        assert get_device(gpu[torch.tensor([2, 0])]) == GPU  # an index of the CPU
        gpu[0] = host[0]
        gpu.copy_(host)
        assert get_device(gpu) == GPU and torch.equal(gpu.cpu(), host)
        assert np.array_equal(gpu.cpu().numpy(), host.numpy())
        assert get_device(torch.stack([gpu, gpu]).view(4, 3)[1:].T) == GPU
        assert get_device(torch.zeros_like(gpu)) == get_device(gpu.new_zeros(2)) == GPU
        assert get_device(torch.zeros(2)) == get_device(host.to(gpu).cpu()) == CPU
        assert host.device.type == "cpu" and gpu.is_cuda and str(gpu.device) == "cuda:0"
        assert gpu.get_device() == 0 and host.get_device() == -1
        assert get_device(copy.deepcopy(nn.Linear(2, 2).to("cuda")).weight) == GPU
        assert get_device(torch.from_numpy(np.zeros(2))) == CPU
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "a pretended GPU"


def test_a_slip_in_backward_is_seen_by_a_hook_and_gradients_lie_with_their_parameters():
    with pretend_gpu():
        model = nn.Linear(3, 2).to("cuda")
        model(torch.ones(4, 3, device="cuda")).sum().backward()
        assert get_device(model.weight.grad) == GPU
        (gradient,) = torch.autograd.grad(model(torch.ones(4, 3, device="cuda")).sum(), model.bias)
        assert get_device(gradient) == GPU
        host = torch.zeros(2, 3)
        model.weight.register_post_accumulate_grad_hook(lambda p: p.grad + host)
        with pytest.raises(CudaRefusal):
            model(torch.ones(4, 3, device="cuda")).sum().backward()


def test_an_optimizer_whose_state_stayed_on_the_cpu():
    with pretend_gpu():
        model = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.ones(4, 3, device="cuda")).sum().backward()
        optimizer.step()
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].cpu()
        model(torch.ones(4, 3, device="cuda")).sum().backward()
        with pytest.raises(CudaRefusal):
            optimizer.step()


# -------------------------------------------------------------------------------- what is counted
WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "__float__": lambda x: float(x[0, 0]),
    "__bool__": lambda x: bool(torch.isfinite(x).all()),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "unique": lambda x: torch.unique(x),
    "copy to cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor([x.sum(), 1.0]),
    "linalg_solve": lambda x: torch.linalg.solve(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted_by_line(name):
    with pretend_gpu() as gpu:
        x = torch.eye(2, device="cuda")
        gpu.reset()
        WAITS[name](x)
        ((place, times),) = gpu.waits.items()
        line = WAITS[name].__code__.co_firstlineno
        assert place == f"tests/test_pretend_gpu.py:{line} {name}" and times == 1


def test_copies_count_unless_the_memory_is_pinned_and_arithmetic_counts_as_nothing():
    with pretend_gpu() as gpu:
        host = torch.rand(2, 2)
        for copies, move in (
            (1, lambda: host.to("cuda")),
            (1, lambda: host.to("cuda", non_blocking=True)),
            (1, lambda: torch.as_tensor(host, device="cuda")),
            (1, lambda: torch.tensor([1.0], device="cuda")),
            (1, lambda: torch.ones(2, device="cuda")[torch.tensor([0])]),
            (0, lambda: host.pin_memory().to("cuda", non_blocking=True)),
            (0, lambda: torch.ones(2, device="cuda") @ torch.ones(2, device="cuda") + 1),
        ):
            gpu.reset()
            move()
            assert gpu.copies.total() == copies and not gpu.waits


def test_the_device_has_random_numbers_of_its_own():
    with pretend_gpu():
        torch.manual_seed(3)
        state = torch.cuda.get_rng_state()
        host, device = torch.rand(4), torch.rand(4, device="cuda")
        torch.rand(9)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4, device="cuda").cpu(), device.cpu())
        assert torch.equal(torch.Generator("cuda").manual_seed(3).get_state(), state)
        torch.manual_seed(3)
        torch.rand(9, device="cuda")
        assert torch.equal(torch.rand(4), host)
