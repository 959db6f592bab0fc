"""The product on a GPU: a pretended one on every machine (pretend_gpu.py), a real one where there
is one (`python tools/gpu_check.py` runs these tests there first).

What is computed on the GPU is what the CPU computes; nothing mixes devices; random states are kept.
"""

import copy
import importlib
import inspect
import re
import signal
import textwrap

import numpy as np
import pytest
import torch
from pretend_gpu import CudaRefusal, pretend_gpu
from test_mindeye2 import a_batch, small, step_of
from test_models import TINY, _inputs
from test_training import call_at, same, train
from torch import nn

from src import utils
from src.decoding import DecoderSizes, PriorSampling, build_decoder_config, predict_tokens
from src.decoding.checkpoints import load_decoder
from src.decoding.predict import predict_latents
from src.losses import l2_normalize, mixco, mixco_nce, soft_clip_loss
from src.metrics import METRICS, two_way_identification
from src.networks import MODELS, KernelRidge, RepeatNoise, RidgeBaseline, TokenMap, build_decoder
from src.networks import transformer as transformers
from src.prior import SOLVERS
from src.retrieval import find_nearest, rank_each, top1_image_from_brain
from src.training import (
    Batching,
    Checkpointing,
    Execution,
    Optimisation,
    Reporting,
    checkpoints,
    fit,
)
from src.utils import (
    ROOT,
    PerceptError,
    allow_tf32,
    exact_products,
    load_checkpoint,
    save_checkpoint,
)

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
VOXELS, TOKENS, DIM = 11, 5, 16
TINY_MINDEYE = {
    "hidden": True,
    "h": 12,
    "n_blocks": 1,
    "use_projector": True,
    "projector_dim": 10,
    "prior_depth": 1,
    "prior_heads": 2,
    "prior_dim_head": 8,
    "timesteps": 6,
    "max_text_len": 4,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mindeye(hidden=True) -> nn.Module:
    """MindEye's decoder: all tokens, or one embedding."""
    sizes = DecoderSizes((VOXELS,), TOKENS if hidden else 1, DIM)
    config = build_decoder_config("01_train_high_level", TINY_MINDEYE | {"hidden": hidden}, sizes)
    return build_decoder(config)


def without_dropout(model) -> nn.Module:
    """The same model; each device would drop other numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Brains:
    """Random voxels and tokens."""

    def __init__(self, samples=16):
        generator = torch.Generator().manual_seed(1)
        self.voxels = torch.randn(samples, VOXELS, generator=generator)
        self.tokens = torch.randn(samples, TOKENS, DIM, generator=generator)

    def __len__(self):
        return len(self.voxels)

    def set_epoch(self, epoch):
        """Nothing depends on the epoch."""

    def __getitems__(self, indices):
        return {
            "voxels": self.voxels[indices],
            "tokens": self.tokens[indices],
            "seed": torch.tensor(indices),
        }


def contrast(model, batch, epoch):
    """The contrastive losses of notebook 01."""
    voxels, *mix = mixco(batch["voxels"])
    _, projected = model.voxel2clip.predict_tokens(voxels if epoch == 0 else batch["voxels"])
    brain, image = l2_normalize(projected), l2_normalize(batch["tokens"])
    if epoch == 0:
        return mixco_nce(brain, image, 0.006, *mix), {}
    return soft_clip_loss(brain, image, 0.006), {}


def denoise(model, batch, epoch):
    """The prior's loss of notebook 01."""
    backbone, _ = model.voxel2clip.predict_tokens(batch["voxels"])
    loss, _ = model(text_embed=backbone, image_embed=batch["tokens"], seeds=batch["seed"])
    return loss, {"loss_prior": loss.detach()}


def learn(
    folder, device, step=contrast, model=None, epochs=2, dataset=None, save_steps=0, **options
):
    """A short training: the model and its history."""
    torch.manual_seed(0)
    model = without_dropout(mindeye()) if model is None else model
    history = fit(
        model,
        step,
        dataset or Brains(),
        folder=folder,
        config={},
        batching=Batching(epochs, 4),
        optimisation=Optimisation(1e-3),
        execution=Execution(device, **options),
        checkpointing=Checkpointing(save_at_end=True, save_steps=save_steps),
    )
    return model.cpu(), history


# ---------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("name", TINY)
def test_networks_compute_the_same_on_a_gpu(name, gpu):
    network, inputs = MODELS[name](**TINY[name]).eval(), _inputs(name)
    moved = copy.deepcopy(network).to("cuda")
    outputs = []
    for module, values in ((network, inputs), (moved, [x.to("cuda") for x in inputs])):
        output = module(*values)
        parts = output if isinstance(output, tuple) else (output,)
        parts = [part for part in parts if isinstance(part, torch.Tensor)]
        total = sum(part.square().mean() for part in parts)
        if total.requires_grad:  # closed forms have nothing to train
            total.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        outputs.append([x.detach().cpu() for x in (*parts, *gradients)])
    assert all(p.is_cuda for p in moved.parameters())
    for expected, value in zip(*outputs, strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def test_mindeye2_computes_the_same_on_a_gpu(gpu):
    model, batch = small().eval(), a_batch()
    moved = copy.deepcopy(model).to("cuda")
    expected = model(batch["voxels"], batch["subject"])
    result = moved(batch["voxels"].to("cuda"), batch["subject"].to("cuda"))
    for a, b in zip((*expected[:2], *expected[2]), (*result[:2], *result[2]), strict=True):
        torch.testing.assert_close(b.cpu(), a, **CLOSE)


# ---------------------------------------------------------------------------------------- training
def test_a_training_gives_the_same_on_a_gpu(tmp_path, gpu):
    ours, history = learn(tmp_path / "gpu", "cuda")
    expected, expected_history = learn(tmp_path / "cpu", "cpu")
    assert np.allclose(history["train/loss"], expected_history["train/loss"], rtol=1e-3)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_the_priors_training_noise_is_the_same_on_every_device(tmp_path, gpu):
    _, history = learn(tmp_path / "gpu", "cuda", denoise)
    _, expected = learn(tmp_path / "cpu", "cpu", denoise)
    assert np.allclose(history["train/loss"], expected["train/loss"], rtol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_mindeye2_trains_on_a_gpu_in_every_precision(tmp_path, precision, gpu):
    _, history = learn(tmp_path, "cuda", step_of, small(), dataset=Subjects(), precision=precision)
    assert np.isfinite(history["train/loss"]).all() and "gpu_memory" in history


def test_updates_as_gradients_arrive_are_the_same_updates(tmp_path, gpu):
    plain, _ = learn(tmp_path / "plain", "cuda")
    stepped, _ = learn(tmp_path / "stepped", "cuda", step_in_backward=True)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(stepped.state_dict()[name], value, **CLOSE)


def test_an_interrupted_training_goes_on_with_the_gpus_random_numbers(tmp_path, gpu):
    """The device's generator decides the dropout, so its state must be kept, too."""

    def step(model, batch, epoch):
        dropped = nn.functional.dropout(batch["voxels"], 0.5)
        return (model(dropped) - batch["target"]).square().mean(), {}

    whole, _ = train(tmp_path / "whole", do=step, device="cuda")
    stop = call_at(9, lambda: signal.raise_signal(signal.SIGINT), step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", do=stop, device="cuda")
    resumed, _ = train(tmp_path / "stopped", do=step, device="cuda")
    close = all(
        torch.allclose(a, b, **CLOSE)
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert close and (gpu is None or same(whole, resumed))


STEPS = {
    "plain": lambda *args: plain_step(*args),
    "contrastive": contrast,
    "prior": denoise,
    "MindEye2": step_of,
}


class Subjects(Brains):
    """A batch of two subjects' brains, the same one again and again."""

    def __getitems__(self, indices):
        return {name: x[: len(indices)] for name, x in a_batch(16).items()}


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"step_in_backward": True}], ids=str
)
@pytest.mark.parametrize("step", STEPS)
def test_no_step_waits_for_the_device(tmp_path, step, options):
    """Neither for a number of the step, nor for a copy of its batch, its noise or its weights."""
    with pretend_gpu() as gpu:
        counts = []
        for samples in (16, 56):
            gpu.reset()
            model, data = (None, Brains) if step != "MindEye2" else (small(), Subjects)
            learn(tmp_path / f"{samples}", "cuda", STEPS[step], model, 1, data(samples), **options)
            counts.append(gpu.waits + gpu.copies)
    assert not counts[1] - counts[0], (counts[1] - counts[0]).most_common(8)


@pytest.mark.parametrize("options", [{}, {"step_in_backward": True}], ids=str)
def test_what_is_not_finite_is_left_out_on_a_gpu_as_on_the_cpu(tmp_path, options, gpu):
    """Loss and gradient; the device leaves the update out, and the host counts it later."""

    def step(model, batch, epoch):
        first = batch["seed"][0] % 16
        loss = model(batch["voxels"]).square().mean()
        if epoch and first % 3 == 0:
            loss = loss * float("nan")
        elif epoch and first % 3 == 1:  # the loss is finite, its gradient is not
            loss = loss + (0 * model.weight.sum()).abs().sqrt()
        return loss, {"seen": loss.detach()}

    results = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Linear(VOXELS, DIM)
        results[device] = learn(tmp_path / device, device, step, model, 3, Brains(24), **options)
    (expected, history), (ours, gpu_history) = results["cpu"], results["cuda"]
    assert history["skipped"].sum() > 2
    assert gpu_history["skipped"].tolist() == history["skipped"].tolist()
    for name in ("train/loss", "train/seen", "train/lr"):
        np.testing.assert_allclose(gpu_history[name], history[name], rtol=1e-5)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_too_many_steps_that_are_not_finite_go_back_to_the_last_state_on_a_gpu(tmp_path, gpu):
    def step(model, batch, epoch):
        bad = epoch == 1
        return model(batch["voxels"]).square().mean() * (float("nan") if bad else 1.0), {}

    model, data = nn.Linear(VOXELS, DIM), Brains(48)
    model, history = learn(tmp_path, "cuda", step, model, 3, data, save_steps=6)
    assert history["skipped"].tolist() == [0, 12, 0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def plain_step(model, batch, epoch):
    if isinstance(model, nn.Linear):
        return (model(batch["voxels"]) - batch["tokens"][:, 0]).square().mean(), {}
    return model.voxel2clip.predict_tokens(batch["voxels"])[0].square().mean(), {}


def test_a_training_leaves_the_precision_of_matrix_products_alone(tmp_path, gpu):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        learn(tmp_path, "cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_frozen_models_do_not_run_in_the_precision_of_a_training(tmp_path, gpu):
    seen = []

    def draw(model, epoch):
        frozen = nn.Linear(3, 3).to("cuda")
        seen.append(frozen(torch.ones(2, 3, device="cuda")).dtype)
        return {}

    fit(
        nn.Linear(VOXELS, DIM),
        plain_step,
        Brains(),
        folder=tmp_path,
        config={},
        batching=Batching(1, 4),
        optimisation=Optimisation(1e-3),
        execution=Execution("cuda", "bf16"),
        reporting=Reporting(draw=draw),
    )
    assert seen == [torch.float32]


# --------------------------------------------------------------------------------------- inference
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("hidden", [True, False])
def test_the_prior_samples_on_a_gpu_what_the_cpu_samples(solver, steps, hidden, gpu):
    prior = mindeye(hidden).eval()
    shape = (4, TOKENS, DIM) if hidden else (4, DIM)
    condition = torch.randn(shape)
    samples, states = [], []
    for device in ("cpu", "cuda"):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        options = {"timesteps": steps, "generator": generators, "solver": solver}
        samples.append(prior.to(device).sample(condition.to(device), **options))
        states.append([generator.get_state() for generator in generators])
    assert samples[1].is_cuda
    torch.testing.assert_close(samples[1].cpu(), samples[0], **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))  # none is drawn ahead


def predict(model, device, shared_noise=False):
    voxels = np.random.default_rng(0).normal(size=(5, VOXELS)).astype(np.float32)
    sampling = PriorSampling(2, shared_noise=shared_noise)
    model = model.eval().to(device)
    return predict_tokens(model, voxels, (TOKENS, DIM), sampling, batch_size=3, device=device)


def test_tokens_are_predicted_on_a_gpu(gpu):
    model = mindeye()
    tokens, projected = predict(model, "cuda")
    assert tokens.shape == (5, 2, TOKENS, DIM) and not tokens.is_cuda and tokens.isfinite().all()
    torch.testing.assert_close(projected, predict(model, "cpu")[1], **CLOSE)


@pytest.mark.parametrize("shared_noise", [False, True])
def test_a_seed_gives_the_same_tokens_on_every_device(shared_noise, gpu):
    model = mindeye()
    tokens, _ = predict(model, "cuda", shared_noise)
    torch.testing.assert_close(tokens, predict(model, "cpu", shared_noise)[0], **CLOSE)


def test_latents_are_predicted_on_a_gpu(gpu):
    voxels = np.random.default_rng(0).normal(size=(5, VOXELS)).astype(np.float32)
    network = MODELS["Voxel2StableDiffusionModel"](**TINY["Voxel2StableDiffusionModel"]).eval()
    shape = tuple(network(torch.zeros(1, VOXELS))[0].shape[-3:])
    expected = predict_latents(network, voxels, shape)
    latents = predict_latents(network.to("cuda"), voxels, shape, 3, "cuda")
    torch.testing.assert_close(latents, expected, **CLOSE)


def test_a_decoder_is_loaded_to_a_gpu(tmp_path, gpu):
    model = mindeye()
    save_checkpoint(tmp_path / "last.safetensors", model.state_dict(), {"model": model.config})
    loaded, _ = load_decoder(tmp_path / "last.safetensors", "cuda")
    assert all(x.is_cuda for x in (*loaded.parameters(), *loaded.buffers()))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name])


def test_weights_go_straight_to_where_they_are_used(tmp_path):
    model = mindeye()
    save_checkpoint(tmp_path / "last.safetensors", model.state_dict(), {"model": model.config})
    with pretend_gpu() as gpu:
        load_decoder(tmp_path / "last.safetensors", "cuda")
        assert not [place for place in gpu.waits if place.endswith((" copy_", " copy to cpu"))]


def test_metrics_take_what_lies_on_a_gpu(gpu):
    images, recons = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    for name in ("pixcorr", "ssim", "ssim_columns", "mse", "pcc"):
        score = METRICS[name].score
        assert np.allclose(score(images.to("cuda"), recons.to("cuda")), score(images, recons))
    features, others = torch.rand(6, 20), torch.rand(6, 20)
    expected = two_way_identification(features, others)
    assert two_way_identification(features.to("cuda"), others.to("cuda")) == expected


def test_retrieval_takes_what_lies_on_a_gpu(gpu):
    brain, clip = torch.randn(20, TOKENS, DIM), torch.randn(20, TOKENS, DIM)
    clip += brain
    for direction in ("image_from_brain", "brain_from_image"):
        expected = rank_each(brain, clip, direction)
        assert np.array_equal(rank_each(brain.to("cuda"), clip.to("cuda"), direction), expected)
    score = top1_image_from_brain(brain.to("cuda"), clip.to("cuda"))
    assert score == top1_image_from_brain(brain, clip)


def test_nearest_rows_are_found_on_a_gpu(gpu):
    brain, clip = torch.randn(20, DIM), torch.randn(20, DIM)
    expected = find_nearest(brain, clip, k=3)
    for index in (clip.numpy(), clip.to("cuda")):
        for ours, right in zip(find_nearest(brain.to("cuda"), index, 3), expected, strict=True):
            assert np.allclose(ours.cpu(), right, atol=1e-5)


def test_the_ridge_is_solved_on_a_gpu(gpu):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype(np.float32)
    y = x @ rng.normal(size=(8, 5)) + 0.1 * rng.normal(size=(60, 5))
    ours = RidgeBaseline.fit(x, y, cv=3)
    expected = RidgeBaseline.fit(x, y, cv=3, backend="torch")
    if gpu is not None:
        assert any(name.startswith("linalg") for name in gpu.operations)
    assert ours.weight.device.type == "cpu" and torch.equal(ours.alphas, expected.alphas)
    torch.testing.assert_close(ours.weight, expected.weight, **CLOSE)


@pytest.mark.parametrize("kernel", ["arc-cosine", "rbf"])
def test_the_kernel_decoder_is_solved_on_a_gpu(gpu, kernel):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype(np.float32)
    y = np.abs(x @ rng.normal(size=(8, 5))).astype(np.float32)
    noise = RepeatNoise(0.3 * torch.eye(8), 1 / 3)
    ours, expected = (KernelRidge.fit(x, y, noise, kernel, device=d) for d in ("auto", "cpu"))
    if gpu is not None:
        assert any(name.startswith("linalg") for name in gpu.operations)
    assert ours.coefficients.device.type == "cpu"
    voxels = torch.from_numpy(x[:9])
    torch.testing.assert_close(ours(voxels), expected(voxels), rtol=1e-3, atol=1e-3)
    on_gpu = ours.to("cuda")(voxels.to("cuda")).cpu()
    torch.testing.assert_close(on_gpu, expected(voxels), rtol=1e-3, atol=1e-3)


def test_a_map_between_tokens_is_fitted_on_a_gpu(gpu):
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(40, 5, 6)), rng.normal(size=(40, 5, 4))
    source, target = source.astype(np.float32), target.astype(np.float32)
    ours, expected = (TokenMap.fit(source, target, device=d) for d in ("cuda", "cpu"))
    assert ours.token.weight.device.type == "cpu"
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------------------- attention
def test_the_width_of_a_head_suits_fused_kernels_in_half_precision(monkeypatch, gpu):
    widths, attend = [], nn.functional.scaled_dot_product_attention

    def watch(q, *args, **kwargs):
        widths.append(q.shape[-1])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(transformers.F, "scaled_dot_product_attention", watch)
    model, batch = small(prior_dim_head=12).to("cuda"), a_batch()
    tokens = batch["tokens"].to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model.diffusion_prior(text_embed=tokens, image_embed=tokens, seeds=batch["seed"].to("cuda"))
    assert widths and all(width % 8 == 0 for width in widths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU, whose kernels count")
@pytest.mark.parametrize("width", [52, 64])
def test_fused_attention_is_fused(width):
    q = torch.randn(2, 12, 257, width, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(2, 258, width, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(12, 257, 258, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile() as profile:
        transformers._attend_fused(q, k, k, bias)
    names = {event.key for event in profile.key_averages()}
    assert any(re.search("efficient_attention|flash|cudnn", name) for name in names), names


# ------------------------------------------------------------------------------------ what is said
def test_no_device_is_compared_with_a_bare_name():
    bare = re.compile(r"""device\s*(==|!=|in)\s*\(?["']cuda["']""")
    paths = [*ROOT.glob("src/**/*.py"), *ROOT.glob("notebooks/*.py")]
    assert not [str(path.relative_to(ROOT)) for path in paths if bare.search(path.read_text())]


def test_files_of_torch_are_opened_on_the_cpu_or_where_it_is_said():
    """A file that a GPU wrote opens on a machine without one."""
    for path in ROOT.glob("src/**/*.py"):
        for call in re.finditer(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "map_location" in call[0], (path, call[0])


# ----------------------------------------------------------------------------------- planted slips
def sample_prior():
    prior = mindeye().to("cuda")
    condition = torch.randn(2, TOKENS, DIM, device="cuda")
    prior.sample(condition, generator=torch.Generator())


def train_prior():
    prior = mindeye().to("cuda")
    tokens = torch.randn(2, TOKENS, DIM, device="cuda")
    prior(text_embed=tokens, image_embed=tokens)


def fit_map():
    tokens = np.random.default_rng(0).normal(size=(30, 5, 6)).astype(np.float32)
    TokenMap.fit(tokens, tokens, device="cuda")


def run_mixco():
    importlib.import_module("src.losses").mixco(torch.randn(4, 3, device="cuda"))


def run_nce():
    nce = importlib.import_module("src.losses").mixco_nce
    nce(torch.randn(3, 4, device="cuda"), torch.randn(3, 4, device="cuda"))


# module, function, what stands there, what the slip leaves of it, how it is run
PLANTED = [
    ("src.losses", "mixco", "_send(select, voxels.device)", "select", lambda path: run_mixco()),
    ("src.losses", "mixco_nce", "device=preds.device, ", "", lambda path: run_nce()),
    (
        "src.prior",
        "_NoiseSource._finish",
        "self._buffer.to(self.x.device, non_blocking=True)",
        "self._buffer",
        lambda path: sample_prior(),
    ),
    (
        "src.prior",
        "BrainDiffusionPrior._sample_ddpm",
        ", device=x.device",
        "",
        lambda path: sample_prior(),
    ),
    (
        "src.networks.priors",
        "_draw_keep_mask",
        ", device=device",
        "",
        lambda path: train_prior(),
    ),
    (
        "src.decoding.predict",
        "predict_tokens",
        ", device=device",
        "",
        lambda path: importlib.import_module("src.decoding.predict").predict_tokens(
            mindeye().to("cuda"), np.zeros((2, VOXELS)), (TOKENS, DIM), device="cuda"
        ),
    ),
    (
        "src.retrieval",
        "_compute_ranks",
        ".cpu()",
        "",
        lambda path: rank_each(*torch.rand(2, 4, 3, device="cuda")),
    ),
    (
        "src.networks.linear",
        "TokenMap._sum_moments",
        "_read_tokens(source, block).to(device)",
        "_read_tokens(source, block)",
        lambda path: fit_map(),
    ),
    (
        "src.training.loop",
        "_Training._train_epoch",
        "iterate_ahead(self._build_loader(), session.device)",
        "self._build_loader()",
        lambda path: learn(path, "cuda"),
    ),
    (
        "src.training.state",
        "RunningMeans.state",
        "float(total)",
        "np.asarray(total)",
        lambda path: learn(path, "cuda"),
    ),
]


@pytest.mark.parametrize("slip", PLANTED, ids=lambda slip: slip[1])
def test_a_slip_in_the_sources_is_found(slip, monkeypatch, tmp_path):
    module_name, name, before, after, run = slip
    owner = module = importlib.import_module(module_name)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    source = textwrap.dedent(inspect.getsource(getattr(owner, last)))
    assert before in source, f"{name} no longer holds {before!r}: plant the slip elsewhere"
    namespace = {}
    exec(source.replace(before, after), vars(module), namespace)
    with pretend_gpu():
        run(tmp_path / "right")
        monkeypatch.setattr(owner, last, namespace[last])
        with pytest.raises((CudaRefusal, TypeError), match="device"):
            run(tmp_path / "wrong")


# ------------------------------------------------------------------------------------- checkpoints
def validate_by(values):
    """A validation that gives one value after the other."""
    losses = iter(values)
    return lambda model: {"val/loss": next(losses)}


def train_with_checkpoints(folder, device, step=plain_step, epochs=4):
    torch.manual_seed(0)
    fit(
        nn.Linear(VOXELS, DIM),
        step,
        Brains(),
        folder=folder,
        config={"a": 1},
        batching=Batching(epochs, 4),
        optimisation=Optimisation(1e-3),
        execution=Execution(device),
        validate=validate_by((3.0, 1.0, 2.0, 4.0)),
    )


@pytest.mark.parametrize("write_every", [0.0, 1e9])
def test_checkpoints_of_a_gpu_are_those_of_their_epochs(tmp_path, write_every, monkeypatch, gpu):
    """They are written late, in a thread, while the weights change."""
    init = checkpoints.CheckpointWriter.__init__
    monkeypatch.setattr(
        checkpoints.CheckpointWriter,
        "__init__",
        lambda writer, folder, device: init(writer, folder, device, write_every),
    )
    for device in ("cpu", "cuda"):
        train_with_checkpoints(tmp_path / device, device)
    for name in ("best", "last"):
        expected, config = load_checkpoint(tmp_path / "cpu" / f"{name}.safetensors")
        weights, gpu_config = load_checkpoint(tmp_path / "cuda" / f"{name}.safetensors")
        assert gpu_config == config and config["epoch"] == {"best": 1, "last": 3}[name]
        torch.testing.assert_close(weights, expected, **CLOSE)


def test_a_checkpoint_is_written_before_the_state_that_goes_on_after_it(tmp_path, gpu):
    """A crash costs neither the best nor the last epoch of which the state knows."""

    def crash(model, batch, epoch):
        if epoch == 3:
            raise ValueError("the power is gone")
        return plain_step(model, batch, epoch)

    with pytest.raises(ValueError, match="power"):
        train_with_checkpoints(tmp_path, "cuda", crash)
    assert load_checkpoint(tmp_path / "best.safetensors")[1]["epoch"] == 1
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["epoch"] == 2


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path, monkeypatch, gpu):
    def fail(path, weights, config):
        raise PerceptError("the disk is full")

    monkeypatch.setattr(checkpoints, "save_checkpoint", fail)
    with pytest.raises(PerceptError, match="the disk is full"):
        train_with_checkpoints(tmp_path, "cuda")
    assert not (tmp_path / "state.pt").exists()


# ------------------------------------------------------------------------- precision, older drivers
def test_tf32_is_set_in_one_place_and_left_out_where_digits_count(gpu):
    before = torch.get_float32_matmul_precision()
    try:
        allow_tf32()
        assert torch.get_float32_matmul_precision() == "high"
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    places = [path.name for path in ROOT.glob("src/**/*.py") if "allow_tf32()" in path.read_text()]
    assert sorted(places) == ["parameters.py", "utils.py"]


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024"


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_take_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(utils, "NVIDIA_DRIVER", tmp_path / "version")
    utils.check_gpu_is_usable()  # no driver, no GPU
    (tmp_path / "version").write_text(DRIVER)
    with pytest.raises(PerceptError, match=r"535\.183\.01.*update the driver"):
        utils.check_gpu_is_usable()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    utils.check_gpu_is_usable()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pretend_gpu():
        utils.check_gpu_is_usable()
