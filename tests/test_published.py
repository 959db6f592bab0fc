"""Released checkpoints: synthetic files in the published layout, with everything that the real ones
carry along.
"""

import collections
import io
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from src import safe_pickle
from src.decoding.checkpoints import load_decoder
from src.networks import released as released_files
from src.networks.encoders import BrainNetwork
from src.networks.linear import RidgeBaseline
from src.networks.low_level import Voxel2StableDiffusionModel
from src.networks.mismatch import describe_mismatch
from src.networks.priors import DiffusionPriorNetwork, VersatileDiffusionPriorNetwork
from src.networks.rebuild import build_decoder, infer_published_config
from src.networks.registry import rename_published_keys
from src.networks.released import (
    load_laion_prior,
    load_published,
    read_history,
    read_published,
    write_published,
)
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def networks():
    vd = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_tokens": 5}
    brain = {"clip_size": 16, "h": 12, "n_blocks": 3, "projector_dim": 20}
    return {
        "257-style": BrainDiffusionPrior(
            VersatileDiffusionPriorNetwork(**vd),
            BrainNetwork(30, 5 * 16, **brain),
            image_embed_dim=16,
            timesteps=10,
        ),
        "1-token": BrainDiffusionPrior(
            DiffusionPriorNetwork(
                dim=16, depth=2, dim_head=8, heads=2, num_timesteps=20, max_text_len=4
            ),
            BrainNetwork(30, 16, **brain),
            image_embed_dim=16,
            timesteps=20,
        ),
        "voxel2clip alone": BrainNetwork(30, 5 * 16, **brain),
        "low level with maps": Voxel2StableDiffusionModel(
            30, 12, 2, use_cont=True, latent_size=16, block_out_channels=(32, 32, 64)
        ),
        "low level 16x": Voxel2StableDiffusionModel(
            30, 12, 1, ups_mode="16x", latent_size=32, block_out_channels=(32, 32, 32, 32, 64)
        ),
    }


def as_released(network):
    """The keys of the time: old attention names, the prefix of data parallelism, and the stray
    temperature.
    """
    state = collections.OrderedDict()
    for key, value in network.state_dict().items():
        for new, old in OLD.items():
            key = key.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        state[f"module.{key}"] = value
    if any("voxel2clip" in key for key in state):
        state["module.voxel2clip.temp"] = torch.tensor(0.006)
    return state


RAN = []


def spy(word):
    RAN.append(word)


class Payload:
    """What a malicious file would hold: a function to be called while the file is read."""

    def __reduce__(self):
        return (spy, ("ran",))


@pytest.fixture
def released(tmp_path):
    def write(network):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10)
        content = {
            "epoch": 239,
            "model_state_dict": as_released(network),
            "optimizer_state_dict": optimizer.state_dict(),
            "train_losses": [np.float64(0.5)],
            "lr_scheduler": schedule,
            "stranger": Payload(),
            "filled": [collections.deque([1, 2]), collections.defaultdict(list, a=[1]), {3}],
        }
        torch.save(content, tmp_path / "last.pth")
        return tmp_path / "last.pth"

    return write


@pytest.mark.parametrize("name", networks())
def test_a_released_file_rebuilds_its_network_and_computes_the_same(name, released):
    torch.manual_seed(0)
    network = networks()[name].eval()
    decoder, config = load_decoder(released(network))
    assert type(decoder) is type(network) and not decoder.training
    for key, value in network.state_dict().items():
        torch.testing.assert_close(decoder.state_dict()[key], value)
    voxels = torch.randn(3, 30)
    loaded, original = (getattr(m, "voxel2clip", None) or m for m in (decoder, network))
    torch.testing.assert_close(loaded(voxels), original(voxels))
    if name == "257-style":
        assert config["tokens"] == [5, 16]
        decoder.sample(torch.randn(2, 5, 16), timesteps=4)
    if name == "1-token":
        assert config["tokens"] == [1, 16]


def test_a_network_made_at_will_takes_a_released_file_or_says_what_differs(released):
    network = networks()["low level with maps"]
    path = released(network)
    load_published(path, networks()["low level with maps"])
    plain = Voxel2StableDiffusionModel(30, 12, 2, latent_size=16, block_out_channels=(32, 32, 64))
    with pytest.raises(
        PerceptError,
        match=(
            r"8 unexpected \(maps_projector.0.weight, .* and 5 more\); make the network with"
            r" use_cont=True"
        ),
    ):
        load_published(path, plain)


def test_reading_runs_no_code_of_the_file(released):
    path = released(networks()["voxel2clip alone"])
    read_published(path)
    assert not RAN
    torch.load(path, weights_only=False)  # what a plain load does
    assert RAN == ["ran"]


def test_the_laion_prior_leaves_the_null_embeddings_and_voxel2clip_fresh(tmp_path):
    donor, taker = networks()["1-token"], networks()["1-token"]
    fresh_keys = {"net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed"}
    bare = {
        k: v
        for k, v in donor.state_dict().items()
        if not k.startswith("voxel2clip.") and k not in fresh_keys
    }
    torch.save(bare, tmp_path / "best.pth")
    before = {k: v.clone() for k, v in taker.state_dict().items()}
    fresh = load_laion_prior(tmp_path / "best.pth", taker)
    after = taker.state_dict()
    assert fresh_keys < set(fresh) and all(
        k in fresh_keys or k.startswith("voxel2clip.") for k in fresh
    )
    assert all(
        torch.equal(after[k], before[k] if k in fresh else donor.state_dict()[k]) for k in after
    )
    del bare["net.learned_query"]
    torch.save(bare, tmp_path / "best.pth")
    with pytest.raises(PerceptError, match=r"1 missing \(net.learned_query\)"):
        load_laion_prior(tmp_path / "best.pth", taker)


# entry of the published lists: what the network is, voxels, and its tokens or channels
RELEASED = {
    "brain_network_257x768_subj01": ("BrainNetwork", 257 * 768),
    "brain_network_1x768_subj01": ("BrainNetwork", 768),
    "brain_diffusion_prior_257_subj01": ("VersatileDiffusionPriorNetwork", 257 * 768),
    "brain_diffusion_prior_1x768_depth12_normformerTrue": ("DiffusionPriorNetwork", 768),
    "brain_diffusion_prior_1x768_depth12_normformerFalse": ("DiffusionPriorNetwork", 768),
    "voxel2sd_4x_contFalse_newdiffuserskeys": ("Voxel2StableDiffusionModel", False),
    "voxel2sd_4x_contTrue_newdiffuserskeys": ("Voxel2StableDiffusionModel", True),
    "voxel2sd_4x_contTrue_diffusers013_keys": ("Voxel2StableDiffusionModel", True),
}


def published_shapes(golden, name):
    return json.loads((golden / "mindeye" / "full_size_state_shapes.json").read_text())[name][
        "state"
    ]


def hollow(shapes):
    """Tensors of the published size that take the memory of one number: every element is the same
    one. Files of others may not hold such tensors, see the fixture `hollow_files`.
    """
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.fixture
def hollow_files(monkeypatch):
    """Read files of hollow tensors, which are refused otherwise: a full-size file has gigabytes."""
    name = ("torch._utils", "_rebuild_tensor_v2")
    monkeypatch.setitem(safe_pickle._TRUSTED, name, torch._utils._rebuild_tensor_v2)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", RELEASED)
def test_the_published_lists_of_keys_make_their_network_at_full_size(
    name, prefix, golden, tmp_path, hollow_files
):
    shapes, (kind, size) = published_shapes(golden, name), RELEASED[name]
    stray = (
        {"voxel2clip.temp": torch.tensor(0.006)}
        if "prior" in name
        else {"temp": torch.tensor(0.006)}
        if "brain" in name
        else {}
    )
    torch.save(
        {"model_state_dict": {prefix + k: v for k, v in (hollow(shapes) | stray).items()}},
        tmp_path / "last.pth",
    )
    state = read_published(tmp_path / "last.pth")
    assert len(state) == len(shapes) and ("013" in name) == (
        set(state) != set(shapes)
    )  # without the stray number; only the old names change
    config = infer_published_config(state)
    brain = config.get("voxel2clip", config)["kwargs"]
    assert config.get("net", config)["name"] == kind and brain["in_dim"] == 15724
    assert size == (brain["use_cont"] if kind.startswith("Voxel") else brain["out_dim"])
    with torch.device("meta"):
        network = build_decoder(config)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == {
        k: list(v.shape) for k, v in state.items()
    }
    assert not describe_mismatch(state, network)


@pytest.mark.parametrize("name", RELEASED)
def test_nothing_else_is_forgiven(name, golden):
    state = rename_published_keys(
        {k: torch.empty(v, device="meta") for k, v in published_shapes(golden, name).items()}
    )
    with torch.device("meta"):
        network = build_decoder(infer_published_config(state))
    for key, value in state.items():
        less = {k: v for k, v in state.items() if k != key}
        assert describe_mismatch(less, network) == {"missing": [key]}
        assert describe_mismatch(less | {f"ema.{key}": value}, network) == {
            "missing": [key],
            "unexpected": [f"ema.{key}"],
        }
        assert describe_mismatch(less | {key: value[None]}, network) == {"of another shape": [key]}
    for key in list(state)[:: len(state) // 8]:  # and so says what reads them
        for broken in (
            {k: v for k, v in state.items() if k != key},
            state | {f"x.{key}": state[key]},
            state | {key: state[key][None]},
        ):
            with pytest.raises(
                PerceptError, match="^The file (does not fit|is of a released|holds)"
            ):
                infer_published_config(broken, "The file")


@pytest.mark.parametrize("name", ["vd_prior_network", "convnext_xl_vicregl"])
def test_networks_that_are_no_decoder_are_refused(name, golden):
    with pytest.raises(PerceptError, match="holds no released MindEye network"):
        infer_published_config(
            {k: torch.empty(v, device="meta") for k, v in published_shapes(golden, name).items()}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"voxel2clip.temp": torch.zeros(3)}, r"1 unexpected \(voxel2clip.temp\)"),
        (
            lambda s: s | {"voxel2clip.module.lin1.bias": torch.zeros(3)},
            r"1 unexpected \(voxel2clip.module.lin1.bias\)",
        ),
        (lambda s: s | {"module.net.learned_query": torch.zeros(3)}, "some of them twice"),
        (
            lambda s: {("lin0" if "lin0" in k else k): v for k, v in s.items()},
            "has no lin0.0.weight, so its sizes cannot be read",
        ),
        (
            lambda s: s | {"voxel2clip.lin0.0.weight": torch.zeros(3)},
            "of a shape that no such network has",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "mlp.1" not in k},
            r"4 missing \(voxel2clip.mlp.1.0.weight, .* and 1 more\); take the file",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, message, tmp_path):
    torch.save(change(networks()["257-style"].state_dict()), tmp_path / "last.pth")
    with pytest.raises(PerceptError, match=message):
        load_decoder(tmp_path / "last.pth")


def test_the_advice_fits_the_difference(released, tmp_path):
    another = networks()["257-style"]
    path = released(
        BrainDiffusionPrior(
            another.net,
            BrainNetwork(31, 5 * 16, clip_size=16, h=12, n_blocks=3, projector_dim=20),
            16,
            10,
        )
    )
    with pytest.raises(
        PerceptError,
        match=(
            r"1 of another shape \(voxel2clip.lin0.0.weight 12 x 31 for 12 x 30\); it was trained"
            r" on other voxels"
        ),
    ):
        load_published(path, another)
    for name, message in (
        ("257-style", "30 missing .* and 27 more.*make it without voxel2clip"),
        ("1-token", "33 missing .*use load_laion_prior"),
    ):
        network = networks()[name]
        keys = [
            k
            for k in network.state_dict()
            if "voxel2clip" not in k
            and (name == "257-style" or k not in released_files.FRESH_IN_LAION)
        ]
        torch.save({k: network.state_dict()[k] for k in keys}, tmp_path / "best.pth")
        with pytest.raises(PerceptError, match=message):
            load_published(tmp_path / "best.pth", network)
    with pytest.raises(PerceptError, match="30 unexpected .*make the prior with its voxel2clip"):
        load_published(released(another), BrainDiffusionPrior(another.net, None, 16, 10))


@pytest.mark.parametrize("old_attention", [False, True])
@pytest.mark.parametrize("name", networks())
def test_what_is_written_as_released_reads_back_bit_by_bit(name, old_attention, released, tmp_path):
    first, _ = load_decoder(released(networks()[name].half().float()))
    write_published(tmp_path / "again.pth", first, epoch=17, old_attention=old_attention)
    reread, _ = load_decoder(tmp_path / "again.pth")
    bits = [
        {k: v.numpy().tobytes() for k, v in network.state_dict().items()}
        for network in (first, reread)
    ]
    assert bits[0] == bits[1] and type(reread) is type(first)
    content = torch.load(tmp_path / "again.pth", weights_only=True)  # as anyone reads it
    old = {
        key
        for key in content["model_state_dict"]
        if any(f"attentions.0.{word}." in key for word in OLD.values())
    }
    assert (
        len(old) == (8 if old_attention and "low" in name else 0)
        and content["epoch"] == 17 == read_history(tmp_path / "again.pth")["epoch"]
    )
    assert [p.name for p in tmp_path.glob("again*")] == ["again.pth"]


def test_the_old_names_are_the_published_ones(golden):
    new, old = (
        published_shapes(golden, f"voxel2sd_4x_contTrue_{keys}")
        for keys in ("newdiffuserskeys", "diffusers013_keys")
    )
    assert {released_files.to_old_key(key): shape for key, shape in new.items()} == old


def test_networks_that_a_released_file_cannot_tell_are_not_written(tmp_path):
    vd = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_tokens": 5}
    brain = BrainNetwork(30, 80, clip_size=16, h=12, n_blocks=1, projector_dim=20)
    refused = {
        "has causal=True": BrainDiffusionPrior(
            VersatileDiffusionPriorNetwork(**vd, causal=True), brain, 16, 10
        ),
        "has learned_query_mode=token": BrainDiffusionPrior(
            VersatileDiffusionPriorNetwork(**vd, learned_query_mode="token"), brain, 16, 10
        ),
        "has image_embed_scale=2": BrainDiffusionPrior(
            VersatileDiffusionPriorNetwork(**vd), brain, 16, 10, image_embed_scale=2.0
        ),
        "has clip_size=16": BrainNetwork(
            30, 80, clip_size=16, h=12, n_blocks=1, use_projector=False
        ),
        "This RidgeBaseline cannot be written": RidgeBaseline(30, (5, 16)),
        "This BrainDiffusionPrior cannot be written": BrainDiffusionPrior(
            VersatileDiffusionPriorNetwork(**vd), None, 16, 10
        ),
    }
    for message, network in refused.items():
        with pytest.raises(PerceptError, match=message):
            write_published(tmp_path / "last.pth", network)
    assert not list(tmp_path.iterdir())


NUMBERS = [
    np.float64(0.1),
    np.float32(0.5),
    np.int64(-3),
    np.float64("nan"),
    np.float64(-np.inf),
    np.bool_(True),
    2,
    0.25,
]


def test_numbers_of_numpy_are_read(tmp_path):
    lists = {
        "train_losses": NUMBERS,
        "val_losses": [torch.tensor(1.5), np.float64(3)],
        "lrs": [[3e-4], "late"],
    }
    torch.save(
        {"epoch": 239, "model_state_dict": networks()["voxel2clip alone"].state_dict(), **lists},
        tmp_path / "last.pth",
    )
    history = read_history(tmp_path / "last.pth")
    np.testing.assert_array_equal(history["train_losses"], [float(v) for v in NUMBERS])
    assert all(type(v) is float for v in history["train_losses"]) and history["epoch"] == 239
    assert history["val_losses"] == [1.5, 3.0] and history["lrs"] == []
    assert len(read_published(tmp_path / "last.pth")) == len(
        networks()["voxel2clip alone"].state_dict()
    )
    torch.save(networks()["voxel2clip alone"].state_dict(), tmp_path / "bare.pth")
    assert read_history(tmp_path / "bare.pth") == {
        "epoch": None,
        "train_losses": [],
        "val_losses": [],
        "lrs": [],
    }


class BigEndian:
    """The number 1.5 as a machine of the other byte order writes it."""

    def __reduce__(self):
        return np.float64(1.5).__reduce__()[0], (np.dtype(">f8"), struct.pack(">d", 1.5))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "module", ["numpy.core.multiarray", "numpy._core.multiarray"]
)  # numpy 1, as the released files have it, and numpy 2
def test_numbers_of_either_numpy_are_read_and_all_else_of_it_is_inert(module, protocol):
    rejected = [
        np.dtype("O"),
        np.arange(3),
        np.complex128(1j),
        np.datetime64("2023-05-29"),
        np.void(b"ab"),
        np.random.default_rng(0),
    ]
    data = pickle.dumps([*NUMBERS, BigEndian(), *rejected], protocol)
    if protocol < 4:  # later ones count the letters
        data = data.replace(b"numpy._core.multiarray", module.encode())
    read = safe_pickle.TensorsOnlyUnpickler(io.BytesIO(data)).load()
    np.testing.assert_array_equal(read[: len(NUMBERS) + 1], [*[float(v) for v in NUMBERS], 1.5])
    assert all(isinstance(value, safe_pickle.InertObject) for value in read[len(NUMBERS) + 1 :])


CHILD = """
import sys, torch
from src.models import build_network
from src.networks.rebuild import infer_published_config
from src.networks.released import load_published, read_history, read_published

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

def load(path):
    network = build_network(infer_published_config(read_published(path), path))
    load_published(path, network)
    return network

torch.set_num_threads(1)
load(sys.argv[2])  # the same network without a burden: what code and libraries take
before = peak()
network = load(sys.argv[1])
assert read_history(sys.argv[1])["train_losses"] == [0.5]
mapped = peak() - before
torch.load(sys.argv[1], weights_only=False)
sys.stdout.write(f"{mapped:.1f} {peak() - before:.1f}")
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="the peak of a process's memory is read from /proc",
)
def test_the_optimizer_of_a_big_file_is_not_read_into_memory(tmp_path):
    network = BrainNetwork(2000, 16 * 8, clip_size=8, h=1000, n_blocks=2, projector_dim=20)  # 16 MB
    state, burden = (
        network.state_dict(),
        {i: {"exp_avg": torch.ones(2**20), "exp_avg_sq": torch.ones(2**20)} for i in range(35)},
    )  # 280 MB
    content = {
        "model_state_dict": {f"module.{k}": v for k, v in state.items()},
        "train_losses": [np.float64(0.5)],
    }
    torch.save(
        content | {"optimizer_state_dict": {"state": burden, "param_groups": []}},
        tmp_path / "last.pth",
    )
    torch.save(state, tmp_path / "bare.pth")
    assert (tmp_path / "last.pth").stat().st_size > 290e6
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "last.pth", tmp_path / "bare.pth"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    mapped, plain = map(float, done.stdout.split())  # MB above what the bare file took
    (tmp_path / "last.pth").unlink()
    assert mapped < 60 < 250 < plain, (mapped, plain)


def test_files_that_are_something_else_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(PerceptError, match="no checkpoint at"):
        read_published(tmp_path / "last.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(PerceptError, match="cannot be read"):
        read_published(tmp_path / "half.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(PerceptError, match="holds no state dict"):
        read_published(tmp_path / "empty.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(PerceptError, match="other.pth holds no released MindEye network"):
        load_decoder(tmp_path / "other.pth")
