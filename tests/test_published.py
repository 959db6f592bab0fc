"""Released checkpoints: synthetic files in the published layout, with everything that the real ones carry along."""

import collections
import json

import numpy as np
import pytest
import torch

from src.models import BrainNetwork, DiffusionPriorNetwork, VersatileDiffusionPriorNetwork, Voxel2StableDiffusionModel
from src.prior import BrainDiffusionPrior
from src.published import load_laion_prior, load_published, published_config, read_published
from src.reconstruct import build_decoder, load_decoder
from src.utils import PerceptError

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def networks():
    vd = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_tokens": 5}
    brain = {"clip_size": 16, "h": 12, "n_blocks": 3, "projector_dim": 20}
    return {
        "257-style": BrainDiffusionPrior(VersatileDiffusionPriorNetwork(**vd), BrainNetwork(30, 5 * 16, **brain), image_embed_dim=16, timesteps=10),
        "1-token": BrainDiffusionPrior(
            DiffusionPriorNetwork(dim=16, depth=2, dim_head=8, heads=2, num_timesteps=20, max_text_len=4),
            BrainNetwork(30, 16, **brain), image_embed_dim=16, timesteps=20,
        ),
        "voxel2clip alone": BrainNetwork(30, 5 * 16, **brain),
        "low level with maps": Voxel2StableDiffusionModel(30, 12, 2, use_cont=True, latent_size=16, block_out_channels=(32, 32, 64)),
        "low level 16x": Voxel2StableDiffusionModel(30, 12, 1, ups_mode="16x", latent_size=32, block_out_channels=(32, 32, 32, 32, 64)),
    }  # fmt: skip


def as_released(network):
    """The keys of the time: old attention names, the prefix of data parallelism, and the stray temperature."""
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
            "epoch": 239, "model_state_dict": as_released(network), "optimizer_state_dict": optimizer.state_dict(), "train_losses": [np.float64(0.5)],
            "lr_scheduler": schedule, "stranger": Payload(),
        }  # fmt: skip
        torch.save(content, tmp_path / "last.pth")
        return tmp_path / "last.pth"

    return write


@pytest.mark.parametrize("name", networks())
def test_a_released_file_rebuilds_its_network_and_computes_the_same(name, released):
    torch.manual_seed(0)
    network = networks()[name].eval()
    made, config = load_decoder(released(network))
    assert type(made) is type(network) and not made.training
    for key, value in network.state_dict().items():
        torch.testing.assert_close(made.state_dict()[key], value)
    voxels = torch.randn(3, 30)
    ours, theirs = (getattr(m, "voxel2clip", None) or m for m in (made, network))
    torch.testing.assert_close(ours(voxels), theirs(voxels))
    if name == "257-style":
        assert config["tokens"] == [5, 16]
        made.sample(torch.randn(2, 5, 16), timesteps=4)
    if name == "1-token":
        assert config["tokens"] == [1, 16]


def test_a_network_made_at_will_takes_a_released_file_or_says_what_differs(released):
    network = networks()["low level with maps"]
    path = released(network)
    load_published(path, networks()["low level with maps"])
    without = Voxel2StableDiffusionModel(30, 12, 2, latent_size=16, block_out_channels=(32, 32, 64))
    with pytest.raises(PerceptError, match=r"unexpected \['maps_projector"):
        load_published(path, without)


def test_reading_runs_no_code_of_the_file(released):
    path = released(networks()["voxel2clip alone"])
    read_published(path)
    assert not RAN
    torch.load(path, weights_only=False)  # what a plain load does
    assert RAN == ["ran"]


def test_the_laion_prior_leaves_the_null_embeddings_and_voxel2clip_fresh(tmp_path):
    donor, taker = networks()["1-token"], networks()["1-token"]
    fresh_keys = {"net.null_text_encodings", "net.null_text_embeds", "net.null_image_embed"}
    bare = {k: v for k, v in donor.state_dict().items() if not k.startswith("voxel2clip.") and k not in fresh_keys}
    torch.save(bare, tmp_path / "best.pth")
    before = {k: v.clone() for k, v in taker.state_dict().items()}
    fresh = load_laion_prior(tmp_path / "best.pth", taker)
    after = taker.state_dict()
    assert fresh_keys < set(fresh) and all(k in fresh_keys or k.startswith("voxel2clip.") for k in fresh)
    assert all(torch.equal(after[k], before[k] if k in fresh else donor.state_dict()[k]) for k in after)
    del bare["net.learned_query"]
    torch.save(bare, tmp_path / "best.pth")
    with pytest.raises(PerceptError, match=r"missing \['net.learned_query'\]"):
        load_laion_prior(tmp_path / "best.pth", taker)


def test_full_sizes_are_read_from_the_published_shapes(golden):
    shapes = json.loads((golden / "mindeye" / "full_size_state_shapes.json").read_text())
    sizes = {
        "brain_diffusion_prior_257_subj01": ("VersatileDiffusionPriorNetwork", 15724),
        "brain_diffusion_prior_1x768_depth12_normformerTrue": ("DiffusionPriorNetwork", 15724),
    }
    for name, (kind, voxels) in sizes.items():
        state = {k: torch.empty(v, device="meta") for k, v in shapes[name]["state"].items()}
        config = published_config(state)
        assert config["net"]["name"] == kind and config["voxel2clip"]["kwargs"]["in_dim"] == voxels
        with torch.device("meta"):
            assert {k: list(v.shape) for k, v in build_decoder(config).state_dict().items()} == shapes[name]["state"]


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
