"""The networks: sizes and keys of the published checkpoints, values against what the published
systems compute, and the ridge baseline.
"""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from himalaya.backend import get_backend
from sklearn.linear_model import Ridge
from torch import nn

from src.networks.encoders import BrainNetwork
from src.networks.linear import RidgeBaseline, TokenMap
from src.networks.low_level import UPS_MODES, Voxel2StableDiffusionModel
from src.networks.priors import DiffusionPriorNetwork, VersatileDiffusionPriorNetwork
from src.networks.rebuild import build_decoder
from src.networks.registry import MODELS, build_network, rename_published_keys
from src.networks.transformer import CausalTransformer, RelativePositionBias
from src.pipeline.dryrun import NSD_VOXELS
from src.prior import BrainDiffusionPrior
from src.utils import (
    PerceptError,
    count_parameters,
    load_checkpoint,
    load_strictly,
    save_checkpoint,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY_PRIOR = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_tokens": 5}
TINY = {
    "BrainNetwork": {
        "in_dim": 11,
        "out_dim": 24,
        "clip_size": 8,
        "h": 12,
        "n_blocks": 2,
        "projector_dim": 10,
    },
    "VersatileDiffusionPriorNetwork": TINY_PRIOR,
    "DiffusionPriorNetwork": {
        "dim": 16,
        "depth": 2,
        "dim_head": 8,
        "heads": 2,
        "num_timesteps": 10,
        "max_text_len": 4,
    },
    "Voxel2StableDiffusionModel": {
        "in_dim": 11,
        "h": 12,
        "n_blocks": 2,
        "latent_size": 16,
        "block_out_channels": [32, 32, 64],
    },
    "VolumeEncoder": {
        "dims": [6, 5, 7],
        "out_dim": 8,
        "clip_size": 8,
        "channels": [4, 6],
        "strides": [1, 2],
        "attention_width": 4,
        "heads": 2,
    },
    "PriorNetwork": {"dim": 16, "depth": 2, "dim_head": 8, "num_tokens": 5},
    "RidgeRegression": {"input_sizes": [11, 7], "out_features": 6},
    "MixerBrainNetwork": {"h": 11, "out_dim": 24, "n_blocks": 2, "clip_size": 8, "latent_size": 8},
    "ResidualBrainNetwork": {
        "h": 11,
        "out_dim": 24,
        "n_blocks": 2,
        "clip_size": 8,
        "blurry_recon": False,
    },
    "CaptionConverter": {"tokens_in": 5, "tokens_out": 7, "dim_in": 16, "dim_out": 6},
    "BasicEncoder": {"in_dim": 11, "size": "512", "latent_size": 8},
    "RidgeBaseline": {"in_dim": 11, "target_shape": [3, 4]},
    "TokenMap": {"shape_in": [5, 16], "shape_out": [10, 6]},
    "KernelRidge": {"in_dim": 11, "n_features": 6, "n_images": 9, "target_shape": [3, 4]},
    "PerceptDecoder": {
        "in_dim": 11,
        "token_shape": [5, 16],
        "token_components": 7,
        "latent_shape": [2, 3, 3],
        "latent_components": 4,
        "h": 12,
    },
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _tensors(path, prefix=""):
    with np.load(path) as file:
        return {
            k.removeprefix(prefix): torch.from_numpy(file[k])
            for k in file.files
            if k.startswith(prefix)
        }


def _inputs(name):
    tokens, t = torch.randn(2, 5, 16), torch.tensor([1, 7])
    return {
        "VersatileDiffusionPriorNetwork": (tokens, t, torch.randn(2, 5, 16)),
        "PriorNetwork": (tokens, t, torch.randn(2, 5, 16)),
        "CaptionConverter": (tokens,),
        **{
            name: (torch.randn(2, 1, 11),) for name in ("MixerBrainNetwork", "ResidualBrainNetwork")
        },
        "DiffusionPriorNetwork": (tokens[:, 0], t, tokens[:, 1]),
        "VolumeEncoder": (torch.randn(2, 6 * 5 * 7),),
        "TokenMap": (tokens,),
    }.get(name, (torch.randn(2, 11),))


# --------------------------------------------------------------------------------- published sizes
def _full_size(name):
    """The network of that name in full_size_state_shapes.json, on the meta device."""
    vd = {"dim": 768, "depth": 6, "dim_head": 64, "heads": 12, "num_tokens": 257}
    with torch.device("meta"):
        if name == "vd_prior_network":
            return VersatileDiffusionPriorNetwork(**vd)
        if name.startswith("brain_network"):
            return BrainNetwork(in_dim=15724, out_dim=257 * 768 if "257" in name else 768)
        if name.startswith("voxel2sd"):
            return Voxel2StableDiffusionModel(in_dim=15724, use_cont="True" in name)
        if "257" in name:
            return BrainDiffusionPrior(
                VersatileDiffusionPriorNetwork(**vd), BrainNetwork(15724, 257 * 768), timesteps=100
            )
        net = DiffusionPriorNetwork(depth=12, normformer="normformerTrue" in name)
        return BrainDiffusionPrior(net, BrainNetwork(15724, 768), timesteps=1000)


NAMES = [
    "brain_network_257x768_subj01",
    "brain_network_1x768_subj01",
    "vd_prior_network",
    "brain_diffusion_prior_257_subj01",
    "brain_diffusion_prior_1x768_depth12_normformerFalse",
    "brain_diffusion_prior_1x768_depth12_normformerTrue",
    "voxel2sd_4x_contFalse_newdiffuserskeys",
    "voxel2sd_4x_contTrue_newdiffuserskeys",
    "voxel2sd_4x_contTrue_diffusers013_keys",
]


@pytest.fixture(scope="module")
def published(golden):
    return json.loads((golden / "mindeye" / "full_size_state_shapes.json").read_text())


def test_no_published_network_is_forgotten(published):
    assert set(published) - set(NAMES) == {"convnext_xl_vicregl"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_counts_are_the_published_ones(published, name):
    network, expected_values = _full_size(name), published[name]
    state = {key: list(value.shape) for key, value in network.state_dict().items()}
    expected = {
        key: list(value.shape)
        for key, value in rename_published_keys(
            {k: torch.empty(v, device="meta") for k, v in expected_values["state"].items()}
        ).items()
    }
    assert state == expected and len(state) == expected_values["n_state_entries"]
    assert count_parameters(network) == expected_values["params"]
    if "trainable" in expected_values:
        assert (
            sum(p.numel() for p in network.parameters() if p.requires_grad)
            == expected_values["trainable"]
        )


@pytest.mark.parametrize(
    "mode, count", [("4x", 205_505_988), ("8x", 208_901_188), ("16x", 197_510_724)]
)
def test_low_level_sizes_of_the_other_modes(mode, count):
    with torch.device("meta"):
        network = Voxel2StableDiffusionModel(ups_mode=mode)
        assert count_parameters(network) == count
        assert network.eval()(torch.empty(2, 15724)).shape == (2, 4, 64, 64)


def test_low_level_size_for_bold5000():
    """1685 voxels, width 1024, two blocks: only the residual MLP differs from NSD's, and that can
    be counted by hand.
    """

    def mlp(voxels, h, blocks):
        return (
            voxels * h + blocks * h * h + h * 64 * 16 * 16 + (blocks + 1) * 2 * h
        )  # maps, and the gains and biases of the norms

    with torch.device("meta"):
        nsd, bold = Voxel2StableDiffusionModel(15724), Voxel2StableDiffusionModel(1685, 1024, 2)
        assert bold.eval()(torch.empty(2, 1685)).shape == (2, 4, 64, 64)
    assert count_parameters(bold) == 27_447_748
    assert count_parameters(bold) - mlp(1685, 1024, 2) == count_parameters(nsd) - mlp(
        15724, 4096, 4
    )


@pytest.mark.parametrize(
    "subject, voxels, count",
    [(2, 14278, 941_657_088), (5, 13039, 936_582_144), (7, 12682, 935_119_872)],
)
def test_sizes_of_the_other_subjects(subject, voxels, count):
    with torch.device("meta"):
        assert count_parameters(BrainNetwork(voxels)) == count


@pytest.mark.parametrize("subject, voxels", NSD_VOXELS.items())
def test_all_eight_subjects_differ_in_the_first_layer_alone(subject, voxels):
    with torch.device("meta"):
        assert count_parameters(BrainNetwork(voxels)) - count_parameters(
            BrainNetwork(NSD_VOXELS[1])
        ) == 4096 * (voxels - NSD_VOXELS[1])


# ------------------------------------------------------------------------------------ BrainNetwork
def test_brain_network_computes_the_published_values(golden):
    path = golden / "mindeye" / "tiny_brain_network.npz"
    arrays = _tensors(path)
    network = BrainNetwork(
        in_dim=37, out_dim=40, clip_size=8, h=16, n_blocks=4, projector_dim=32
    ).eval()
    load_strictly(network, _tensors(path, "sd/"), "golden")
    backbone, projected = network(arrays["x"])
    torch.testing.assert_close(backbone, arrays["backbone_out"], **CLOSE)
    torch.testing.assert_close(projected, arrays["projector_out"], **CLOSE)
    network.train()
    torch.manual_seed(52)
    backbone, projected = network(arrays["x"])
    torch.testing.assert_close(backbone, arrays["train_seed52_backbone"], **CLOSE)
    torch.testing.assert_close(projected, arrays["train_seed52_projector"], **CLOSE)


def test_brain_network_of_the_combined_system_computes_the_published_values(golden):
    path = golden / "mindeye" / "tiny_brain_network.npz"
    arrays = _tensors(path)
    options = {"norm_type": "bn", "act_first": True, "use_projector": False}
    network = BrainNetwork(in_dim=37, out_dim=8, clip_size=8, h=16, n_blocks=2, **options).eval()
    load_strictly(network, _tensors(path, "bn_sd/"), "golden")
    torch.testing.assert_close(network(arrays["x"]), arrays["bn_relu_actfirst_out"], **CLOSE)


def test_brain_network_flattens_a_volume_and_refuses_other_voxels():
    network, volume = (
        BrainNetwork(**{**TINY["BrainNetwork"], "in_dim": 24}).eval(),
        torch.randn(2, 2, 3, 4),
    )
    torch.testing.assert_close(network(volume)[0], network(volume.reshape(2, 24))[0])
    with pytest.raises(PerceptError, match="reads 24 voxels but was given 25"):
        network(torch.randn(2, 25))


# ---------------------------------------------------------------------------------- prior networks
@pytest.fixture(scope="module")
def prior_arrays(golden):
    return _tensors(golden / "mindeye" / "tiny_vd_prior_net_pos_emb.npz")


@pytest.fixture
def prior_network(golden):
    network = VersatileDiffusionPriorNetwork(**TINY_PRIOR).eval()
    load_strictly(
        network, _tensors(golden / "mindeye" / "tiny_vd_prior_net_pos_emb.npz", "sd/"), "golden"
    )
    return network


def test_prior_network_computes_the_published_values(prior_network, prior_arrays):
    a = prior_arrays
    inputs = a["image_embed"], a["timesteps"]
    torch.testing.assert_close(
        prior_network(*inputs, brain_embed=a["brain_embed"]), a["out"], **CLOSE
    )
    torch.testing.assert_close(
        prior_network(*inputs, text_embed=a["brain_embed"]), a["out"], **CLOSE
    )
    dropped = prior_network(*inputs, brain_embed=a["brain_embed"], brain_cond_drop_prob=1.0)
    torch.testing.assert_close(dropped, a["out_text_dropped"], **CLOSE)
    dropped = prior_network(
        *inputs, brain_embed=a["brain_embed"], brain_cond_drop_prob=1.0, image_cond_drop_prob=1.0
    )
    torch.testing.assert_close(dropped, a["out_both_dropped"], **CLOSE)


def test_parts_of_the_prior_network_compute_the_published_values(prior_network, prior_arrays):
    a, transformer = prior_arrays, prior_network.causal_transformer
    torch.testing.assert_close(
        prior_network.to_time_embeds(a["timesteps"])[:, None], a["time_embed"], **CLOSE
    )
    torch.testing.assert_close(transformer.rel_pos_bias(11), a["rel_pos_bias_11x12"], **CLOSE)
    attention, feed_forward = transformer.layers[0]
    torch.testing.assert_close(
        attention(a["tokens_in"], *transformer._compute_positions(11)),
        a["layer0_attn_out_noresid"],
        **CLOSE,
    )
    torch.testing.assert_close(feed_forward(a["tokens_in"]), a["layer0_ff_out_noresid"], **CLOSE)
    torch.testing.assert_close(transformer.norm(a["tokens_in"]), a["final_stable_norm"], **CLOSE)
    torch.testing.assert_close(transformer(a["tokens_in"]), a["transformer_out"], **CLOSE)


def test_relative_position_buckets_are_the_published_ones(golden):
    arrays = _tensors(golden / "mindeye" / "relpos_buckets.npz")
    bias = RelativePositionBias(1)
    assert torch.equal(
        bias.assign_buckets(torch.arange(515)), arrays["bucket_of_distance_0_to_514"]
    )
    bias.relative_attention_bias.weight.data = torch.arange(32.0)[:, None]
    assert bias(515).double().sum() == arrays["full_515x516_sum"]


def _attention_by_loops(attention, x, bias, causal):
    """One attention layer, position by position, in double precision: an independent reading of the
    specification.
    """
    dim_head = attention.null_kv.shape[1]
    width = min(32, dim_head)
    norm = (
        (x - x.mean(-1, keepdim=True))
        / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        * attention.norm.g
    )

    def turn(vector, position):
        vector = vector.clone()
        for pair in range(width // 2):
            angle = position * 10000 ** (-2 * pair / width)
            a, b = vector[2 * pair].clone(), vector[2 * pair + 1].clone()
            vector[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            vector[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return vector

    out = torch.zeros_like(x)
    for sample in range(len(x)):
        key_value = norm[sample] @ attention.to_kv.weight.T
        rotated = [turn(row[:dim_head], i) for i, row in enumerate(key_value)]
        keys = [attention.null_kv[0], *rotated]
        values = torch.stack([attention.null_kv[1], *key_value[:, dim_head:]])
        queries = norm[sample] @ attention.to_q.weight.T
        for i in range(x.shape[1]):
            heads = []
            for head in range(attention.heads):
                query = turn(queries[i, head * dim_head : (head + 1) * dim_head], i)
                logits = (
                    torch.stack([16 * F.cosine_similarity(query, key, dim=0) for key in keys])
                    + bias[head, i]
                )
                if causal:
                    logits = logits[: i + 2]
                heads.append(logits.softmax(0) @ values[: len(logits)])
            row = attention.to_out[0].weight @ torch.cat(heads)
            std = (row.var(unbiased=False) + 1e-5).sqrt()
            out[sample, i] = (row - row.mean()) / std * attention.to_out[1].g
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim_head", [8, 36])
def test_attention_is_that_of_the_specification(causal, dim_head):
    torch.manual_seed(1)
    transformer = CausalTransformer(12, 1, dim_head, 3, causal).double()
    transformer.rel_pos_bias.relative_attention_bias.weight.data.normal_()
    attention, x = transformer.layers[0][0], torch.randn(2, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = _attention_by_loops(attention, x, transformer.rel_pos_bias(6), causal)
        torch.testing.assert_close(
            attention(x, *transformer._compute_positions(6)), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_last_positions_are_those_of_all(causal):
    transformer, x = CausalTransformer(16, 3, 8, 2, causal), torch.randn(2, 9, 16)
    torch.testing.assert_close(transformer(x, last=4), transformer(x)[:, -4:])


def test_a_causal_transformer_does_not_see_the_future():
    x = torch.randn(1, 6, 16)
    other = x.clone()
    other[:, 4:] += 1
    seeing, causal = (CausalTransformer(16, 2, 8, 2, causal) for causal in (False, True))
    outputs = causal(x), causal(other)
    torch.testing.assert_close(outputs[0][:, :4], outputs[1][:, :4])
    assert not torch.allclose(outputs[0][:, 4:], outputs[1][:, 4:])
    assert not torch.allclose(seeing(x)[:, :4], seeing(other)[:, :4])


@pytest.mark.parametrize(
    "mode, queries", [("none", 0), ("pos_emb", 5), ("token", 5), ("all_pos_emb", 11)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_learned_query_modes(mode, queries, causal):
    network = VersatileDiffusionPriorNetwork(**TINY_PRIOR, learned_query_mode=mode, causal=causal)
    assert ("learned_query" in network.state_dict()) == bool(queries)
    image, t, brain = _inputs("VersatileDiffusionPriorNetwork")
    query = network.state_dict().get("learned_query", torch.zeros(5, 16))
    time = network.to_time_embeds(t)[:, None]
    tokens = {
        "none": lambda: torch.cat((brain, time, image), 1),
        "pos_emb": lambda: torch.cat((brain, time, image + query), 1),
        "token": lambda: torch.cat((brain, time, image, query.expand(2, -1, -1)), 1),
        "all_pos_emb": lambda: torch.cat((brain, time, image), 1) + query,
    }[mode]()
    assert query.shape[0] == (queries or 5)
    torch.testing.assert_close(network(image, t, brain), network.causal_transformer(tokens)[:, -5:])


def test_dropping_draws_the_brain_first_and_nothing_for_0_and_1():
    network = VersatileDiffusionPriorNetwork(**TINY_PRIOR)
    image, brain = torch.randn(8, 5, 16), torch.randn(8, 5, 16)
    t = torch.arange(8)
    torch.manual_seed(0)
    result = network(image, t, brain, brain_cond_drop_prob=0.5, image_cond_drop_prob=0.5)
    torch.manual_seed(0)
    keep_brain, keep_image = torch.rand(8) < 0.5, torch.rand(8) < 0.5
    assert 0 < keep_brain.sum() < 8 and 0 < keep_image.sum() < 8
    brain[~keep_brain], image[~keep_image] = (
        network.null_brain_embeds.detach(),
        network.null_image_embed.detach(),
    )
    state = torch.get_rng_state()
    torch.testing.assert_close(result, network(image, t, brain))
    network(image, t, brain, brain_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_1x768_network_puts_its_tokens_in_the_published_order():
    network = DiffusionPriorNetwork(**TINY["DiffusionPriorNetwork"])
    image, t, text = _inputs("DiffusionPriorNetwork")
    rows = []
    for i in range(2):
        parts = [
            network.null_text_encodings[0],
            text[i : i + 1],
            network.to_time_embeds[0].weight[t[i] : t[i] + 1],
            image[i : i + 1],
        ]
        rows.append(torch.cat([*parts, network.learned_query[None]]))
    expected = network.causal_transformer(torch.stack(rows))[:, -1]
    torch.testing.assert_close(network(image, t, text_embed=text), expected)
    dropped = network(image, t, text_embed=text, brain_cond_drop_prob=1.0)
    torch.testing.assert_close(
        dropped, network(image, t, text_embed=network.null_text_embeds[:, 0].expand(2, -1))
    )


def test_kept_positions_give_the_same_output_and_do_not_outlive_their_context():
    network, inputs = (
        VersatileDiffusionPriorNetwork(**TINY_PRIOR),
        _inputs("VersatileDiffusionPriorNetwork"),
    )
    expected = network(*inputs)
    with torch.no_grad(), network.cache_positions():
        for _ in range(2):
            torch.testing.assert_close(network(*inputs), expected)
        assert list(network.causal_transformer._positions) == [11]
    assert not network.causal_transformer._positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prior_network_runs_in_half_precision(dtype):
    network, inputs = (
        VersatileDiffusionPriorNetwork(**TINY_PRIOR),
        _inputs("VersatileDiffusionPriorNetwork"),
    )
    expected = network(*inputs)
    with torch.autocast("cpu", dtype):
        result = network(*inputs)
    assert (result.float() - expected).abs().max() < 0.1 * expected.abs().max()
    result.float().sum().backward()


def test_gain_norm_has_the_published_epsilons():
    from src.networks.transformer import GainNorm

    norm, x = GainNorm(6), torch.randn(3, 6) * 0.02
    for dtype, eps in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        y = x.to(dtype).double()
        std = (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        expected = (y - y.mean(-1, keepdim=True)) / std
        normed = norm(x.to(dtype)).double()
        torch.testing.assert_close(normed, expected, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------- low level
@pytest.mark.parametrize("mode", UPS_MODES)
@pytest.mark.parametrize("use_cont", [False, True])
def test_low_level_network_at_a_small_size(mode, use_cont):
    widths = [32] * len(UPS_MODES[mode].widths)
    network = Voxel2StableDiffusionModel(
        11,
        h=12,
        n_blocks=1,
        use_cont=use_cont,
        ups_mode=mode,
        latent_size=32,
        block_out_channels=widths,
    )
    out = network(torch.randn(2, 11))
    if use_cont:
        out, maps = out
        assert maps.shape == (2, (32 // UPS_MODES[mode].factor) ** 2, 512)
    assert out.shape == (2, 4, 32, 32)
    out.square().mean().backward()
    assert network.lin0[0].weight.grad.abs().sum() > 0


def test_low_level_miniature_learns():
    network = Voxel2StableDiffusionModel(**TINY["Voxel2StableDiffusionModel"])
    for dropout in (m for m in network.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    voxels = torch.randn(4, 11)
    latents = torch.randn(4, 4, 1, 1).expand(4, 4, 16, 16)
    optimiser, losses = torch.optim.Adam(network.parameters(), 3e-3), []
    for _ in range(30):
        loss = F.l1_loss(network(voxels), latents)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ups_mode": "2x"}, "unknown"),
        ({"latent_size": 18}, "divisible"),
        ({"block_out_channels": [32, 32]}, "3 block_out_channels"),
        ({"block_out_channels": [16, 32, 32]}, "32 groups"),
    ],
)
def test_low_level_refusals(options, message):
    with pytest.raises(PerceptError, match=message):
        Voxel2StableDiffusionModel(**(TINY["Voxel2StableDiffusionModel"] | options))


def test_old_keys_are_renamed_and_nothing_else():
    old = "upsampler.mid_block.attentions.0."
    state = {
        f"module.{old}query.weight": 1,
        f"{old}proj_attn.bias": 2,
        f"{old}group_norm.weight": 3,
        "voxel2clip.temp": 4,
        "lin0.key.weight": 5,
    }
    expected = {
        f"{old}to_q.weight": 1,
        f"{old}to_out.0.bias": 2,
        f"{old}group_norm.weight": 3,
        "lin0.key.weight": 5,
    }
    assert rename_published_keys(state) == expected


# ---------------------------------------------------------------------------------- ridge baseline
def _linear_data(n=60, voxels=9, shape=(2, 3), noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, voxels)).astype(np.float32) + 2
    y = (
        x @ rng.standard_normal((voxels, math.prod(shape)))
        + 5
        + noise * rng.standard_normal((n, math.prod(shape)))
    )
    return x, y.reshape(n, *shape).astype(np.float32)


@pytest.mark.parametrize("backend", ["numpy", "torch", "auto"])
def test_ridge_is_scikit_learns_at_the_chosen_penalties(backend):
    x, y = _linear_data()
    before = get_backend().name
    baseline = RidgeBaseline.fit(x, y, alphas=[0.1, 10.0, 1000.0], backend=backend, chunk=4)
    assert get_backend().name == before
    assert all(
        min(abs(alpha / v - 1) for v in (0.1, 10.0, 1000.0)) < 1e-5
        for alpha in baseline.alphas.tolist()
    )
    reference = Ridge(alpha=baseline.alphas.numpy().astype(float)).fit(
        x.astype(float), y.reshape(60, -1).astype(float)
    )
    expected = reference.predict(x.astype(float)).reshape(y.shape)
    predicted = baseline(torch.from_numpy(x))
    assert predicted.shape == (60, 2, 3)
    np.testing.assert_allclose(predicted.detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_ridge_chooses_a_penalty_a_target_by_cross_validation():
    x, y = _linear_data(n=80, voxels=20, shape=(2,), noise=0.0)
    y[:, 1] = np.random.default_rng(1).standard_normal(80)  # nothing to find in the second target
    baseline = RidgeBaseline.fit(x, y, alphas=[0.01, 1e5])
    np.testing.assert_allclose(baseline.alphas.numpy(), [0.01, 1e5], rtol=1e-5)


def test_ridge_keeps_the_rows_of_a_group_in_one_fold():
    rng = np.random.default_rng(0)
    groups = np.arange(12).repeat(5)
    # the repeats of an image are the same row: memorising pays between them
    x = rng.standard_normal((12, 40))[groups].astype(np.float32)
    y = rng.standard_normal((12, 4))[groups].astype(np.float32)
    options = {"alphas": [1e-3, 1e4], "cv": 4}
    leaking = RidgeBaseline.fit(x, y, **options).alphas
    honest = RidgeBaseline.fit(x, y, **options, groups=groups).alphas
    assert (leaking < 1).all() and (honest > 1).all()


def test_ridge_is_repeatable_and_round_trips_through_a_checkpoint(tmp_path):
    x, y = _linear_data()
    one, two = (RidgeBaseline.fit(x, y, seed=3) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    save_checkpoint(tmp_path / "ridge.safetensors", one.state_dict(), one.config)
    state, config = load_checkpoint(tmp_path / "ridge.safetensors")
    rebuilt = build_network(config)
    load_strictly(rebuilt, state, "ridge")
    assert torch.equal(rebuilt(torch.from_numpy(x)), one(torch.from_numpy(x))) and torch.equal(
        rebuilt.alphas, one.alphas
    )


def test_ridge_refusals():
    x, y = _linear_data()
    with pytest.raises(PerceptError, match="matching rows"):
        RidgeBaseline.fit(x[:-1], y)
    with pytest.raises(PerceptError, match="matching rows"):
        RidgeBaseline.fit(x, y, groups=np.arange(59))
    with pytest.raises(PerceptError, match="not finite"):
        RidgeBaseline.fit(np.where(x == x[3, 3], np.nan, x), y)
    with pytest.raises(PerceptError, match="do not make 5 folds"):
        RidgeBaseline.fit(x[:4], y[:4])
    with pytest.raises(PerceptError, match="reads 9 voxels but was given 8"):
        RidgeBaseline.fit(x, y)(torch.zeros(1, 8))


# ------------------------------------------------------------------------------- the map of tokens
def test_the_map_of_tokens_is_a_ridge_regression_over_images_and_places():
    """Against scikit-learn on all rows at once, with the penalty in its units: alpha x rows x mean
    variance.
    """
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(60, 5, 3)).astype(np.float32) + 2,
        rng.normal(size=(60, 5, 4)).astype(np.float32),
    )
    weight = rng.normal(size=(3, 4)).astype(np.float32)
    y[:, 1:] += x[:, 1:] @ weight
    fitted = TokenMap.fit(x, y, alphas=[0.3], batch_size=7)
    parts = [(slice(0, 1), fitted.token), (slice(1, 5), fitted.patch)]
    for part, linear in parts:
        rows = x[:, part].reshape(-1, 3)
        targets = y[:, part].reshape(-1, 4)
        penalty = 0.3 * len(rows) * rows.var(axis=0).mean()
        expected = Ridge(penalty).fit(rows, targets)
        np.testing.assert_allclose(linear.weight.detach(), expected.coef_, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(linear.bias.detach(), expected.intercept_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fitted.alphas, 0.3)


def test_the_map_of_tokens_chooses_its_penalty_on_images_that_it_was_not_fitted_on():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5, 30)).astype(np.float32)
    noise = rng.normal(size=(40, 5, 4)).astype(np.float32)
    clear, vague = (
        x @ rng.normal(size=(30, 4)).astype(np.float32) * gain + noise * (1 - gain)
        for gain in (1.0, 0.0)
    )
    alphas = [1e-5, 0.1, 1e3]
    fitted = TokenMap.fit(x, clear, alphas=alphas)
    hopeless = TokenMap.fit(x, vague, alphas=alphas)
    assert fitted.alphas[1] == pytest.approx(1e-5)
    assert fitted.r2[1] > 0.99
    assert hopeless.alphas[1] == pytest.approx(1e3)
    assert abs(float(hopeless.r2[1])) < 0.2
    with torch.no_grad():
        mapped = fitted(torch.from_numpy(x))
    np.testing.assert_allclose(mapped[:, 1:], clear[:, 1:], atol=0.05)


def test_the_map_of_tokens_resamples_the_grid():
    """A smooth ramp over 2 x 2 places, with the identity as the map, is a ramp over 4 x 4; the
    class token stays apart.
    """
    network = TokenMap([5, 1], [17, 1])
    for linear in (network.token, network.patch):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    with torch.no_grad():
        tokens = torch.tensor([9.0, 0, 1, 2, 3])
        mapped = network(tokens.view(1, 5, 1)).flatten()
    assert mapped[0] == 9
    grid = mapped[1:].view(4, 4)
    torch.testing.assert_close(grid[0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    torch.testing.assert_close(grid[:, 0], torch.tensor([0.0, 0.5, 1.5, 2.0]))


def test_the_map_of_tokens_reads_blocks_by_image_id():
    rng = np.random.default_rng(2)
    x, y = (
        rng.normal(size=(30, 5, 3)).astype(np.float32),
        rng.normal(size=(30, 10, 4)).astype(np.float32),
    )

    class Stored:
        def __init__(self, rows):
            self.all, self.asked = rows, []

        def rows(self, image_ids):
            self.asked.append(len(image_ids))
            return self.all[np.asarray(image_ids) - 100].astype(np.float16)

    source, target = Stored(x), Stored(y)
    mapped = TokenMap.fit(source, target, np.arange(105, 130), batch_size=4)
    plain = TokenMap.fit(x[5:], y[5:], batch_size=25)
    assert max(source.asked) <= 4 and sum(source.asked) == 25 + 1, (
        "each image is read once, and one for the shapes"
    )
    torch.testing.assert_close(mapped.patch.weight, plain.patch.weight, rtol=0.02, atol=0.02)
    with pytest.raises(PerceptError, match="9 images of which 1 are held out are too few"):
        TokenMap.fit(x[:9], y[:9])
    with pytest.raises(PerceptError, match="not finite"):
        TokenMap.fit(np.full_like(x, np.nan), y)
    with pytest.raises(PerceptError, match="7 tokens are not a class token and a square grid"):
        TokenMap([7, 3], [5, 3])
    with pytest.raises(
        PerceptError, match=r"reads tokens \(batch, 5, 3\) but was given \(2, 10, 3\)"
    ):
        mapped(torch.zeros(2, 10, 3))


# ---------------------------------------------------------------------------------------- registry
def test_importing_the_networks_loads_no_slow_library():
    code = "import sys, src.models; sys.stdout.write(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"diffusers", "transformers", "himalaya", "sklearn"} & set(result.stdout.split())


def test_a_prior_is_rebuilt_from_its_config():
    brain = BrainNetwork(**TINY["BrainNetwork"])
    net = VersatileDiffusionPriorNetwork(**TINY_PRIOR)
    prior = BrainDiffusionPrior(net, brain, 16, 10, cond_drop_prob=0.1)
    rebuilt = build_decoder(prior.config)
    assert rebuilt.config == prior.config
    load_strictly(rebuilt, prior.state_dict(), "the prior")


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_rebuilt_from_its_config_and_checkpoint(name, tmp_path):
    network = MODELS[name](**TINY[name]).eval()
    assert network.config["name"] == name and TINY[name].items() <= network.config["kwargs"].items()
    save_checkpoint(tmp_path / "net.safetensors", network.state_dict(), network.config)
    state, config = load_checkpoint(tmp_path / "net.safetensors")
    rebuilt = build_network(config).eval()
    load_strictly(rebuilt, state, name)
    copied = copy.deepcopy(network)
    assert copied.config == network.config
    inputs = _inputs(name)
    for other in (rebuilt, copied):
        for a, b in zip(_parts(network(*inputs)), _parts(other(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def _parts(out):
    return out if isinstance(out, tuple) else (out,)


def test_arguments_by_position_are_in_the_config():
    network = BrainNetwork(11, 24, clip_size=8, h=12)
    assert network.config["kwargs"] == {
        "in_dim": 11,
        "out_dim": 24,
        "clip_size": 8,
        "h": 12,
        "n_blocks": 4,
        "norm_type": "ln",
        "act_first": False,
        "use_projector": True,
        "projector_dim": 2048,
    }


def test_build_refusals():
    with pytest.raises(PerceptError, match="No network is called 'Nonsense'"):
        build_network({"name": "Nonsense", "kwargs": {}})
    with pytest.raises(PerceptError, match="cannot be built from its config.*'n_layers'"):
        build_network({"name": "BrainNetwork", "kwargs": {"n_layers": 3}})
    with pytest.raises(PerceptError, match="norm_type 'gn'"):
        BrainNetwork(11, norm_type="gn")
    with pytest.raises(PerceptError, match="learned_query_mode"):
        VersatileDiffusionPriorNetwork(**TINY_PRIOR, learned_query_mode="all")


def test_prior_network_refuses_what_does_not_fit():
    network = VersatileDiffusionPriorNetwork(**TINY_PRIOR)
    image, t, brain = _inputs("VersatileDiffusionPriorNetwork")
    with pytest.raises(PerceptError, match="brain_embed"):
        network(image, t)
    with pytest.raises(PerceptError, match=r"brain_embed of shape \(2, 5, 16\), not \(2, 4, 16\)"):
        network(image, t, brain[:, :4])
    assert network(image.flatten(1), t, brain.flatten(1)).shape == (2, 5, 16)
