"""MindEye2: sizes, keys and values of the published networks, the mixer that does nothing, batches
of several subjects, starts from others.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src.data.batches import BrainDataset
from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.decoding.checkpoints import load_decoder
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.decoding.generate import load_encoder
from src.decoding.predict import PriorSampling, predict_latents, predict_tokens
from src.losses import mixco
from src.networks.linear import CaptionConverter
from src.networks.mindeye2 import MindEye2, MixerBrainNetwork, ResidualBrainNetwork, RidgeRegression
from src.networks.priors import PriorNetwork
from src.networks.rebuild import build_decoder, infer_published_config
from src.networks.released import load_published, read_published, write_published
from src.pretrained.clip import PatchClip
from src.prior import BrainDiffusionPrior
from src.training.converter import TokenPairs, fit_converter
from src.training.options import Batching, Execution, Optimisation
from src.training.subjects import MultiSubjectDataset, check_gradients, load_pretrained
from src.utils import PerceptError, save_checkpoint
from tests.toy_data import prepare

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
VOXELS = (15724, 14278, 15226, 13153, 13039, 17907, 12682, 14386)
SMALL = {
    "hidden_dim": 12,
    "n_blocks": 2,
    "backbone": "mixer",
    "blurry_recon": True,
    "clip_scale": 1.0,
    "seq_past": 0,
    "seq_future": 0,
    "prior": True,
    "prior_depth": 1,
    "prior_dim_head": 8,
    "timesteps": 10,
    "faithful": "",
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mindeye2_config(parameters, voxels, tokens, dim, latent):
    sizes = DecoderSizes(tuple(voxels), tokens, dim, (4, latent, latent))
    return build_decoder_config("01_train_mindeye2", parameters, sizes)


def small(voxels=(9, 7), tokens=4, dim=16, latent=8, **changes):
    return build_decoder(mindeye2_config(SMALL | changes, voxels, tokens, dim, latent))


def size(module):
    return sum(p.numel() for p in module.parameters())


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def arrays(path):
    with np.load(path) as file:
        results = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    return results, {
        name.removeprefix("sd/"): value for name, value in results.items() if name.startswith("sd/")
    }


# --------------------------------------------------------------------------------- published sizes
def full(h, tokens, dim, voxels, blurry, n_blocks=4):
    p = SMALL | {
        "hidden_dim": h,
        "n_blocks": n_blocks,
        "blurry_recon": blurry,
        "prior_depth": 6,
        "prior_dim_head": 52,
        "timesteps": 100,
    }
    with torch.device("meta"):
        return build_decoder(mindeye2_config(p, voxels, tokens, dim, 28))


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        ((4096, 256, 1664, VOXELS[:1], True), 2_227_294_844),
        ((4096, 256, 1664, VOXELS[:1], False), 2_212_136_216),
        ((4096, 256, 1664, VOXELS[1:], True), 2_575_262_332),
        ((1024, 256, 1664, VOXELS[:1], False), 729_327_896),
        ((1024, 256, 1664, VOXELS[1:], False), 816_319_768),
        ((1024, 49, 768, VOXELS[:1], True), 125_478_076),
        ((1024, 49, 768, VOXELS[:1], False), 119_953_240),
        ((1024, 49, 768, VOXELS[:1], True, 2), 121_275_568),
    ],
)
def test_parameter_counts_are_the_published_ones(arguments, total):
    assert size(full(*arguments)) == total


def test_counts_by_part(golden):
    recorded = json.loads((golden / "mindeye2" / "param_counts.json").read_text())[
        "full_4096_bigG_blur_s1"
    ]
    model = full(4096, 256, 1664, VOXELS[:1], True)
    for name, count in recorded.items():
        if name.startswith("backbone."):
            assert size(getattr(model.backbone, name.removeprefix("backbone."))) == count, name
    assert [size(model.diffusion_prior.net), trainable(model.diffusion_prior.net)] == recorded[
        "prior_net"
    ]


@pytest.mark.parametrize(
    ("size", "arguments"), [("full", (4096, 256, 1664)), ("low", (1024, 49, 768))]
)
def test_keys_and_shapes_are_the_published_ones(golden, size, arguments):
    recorded = json.loads((golden / "mindeye2" / "state_dict_keys.json").read_text())[size]
    local = {
        name: list(value.shape)
        for name, value in full(*arguments, VOXELS[:1], True).state_dict().items()
        if "noise_scheduler" not in name
    }
    assert local == recorded


# -------------------------------------------------------------------------------- published values
def test_ridge_layers_give_the_published_values(golden):
    results, state = arrays(golden / "mindeye2" / "ridge_tiny.npz")
    ridge = RidgeRegression([11, 7], 16)
    ridge.load_state_dict(state)
    for number in (0, 1):
        torch.testing.assert_close(
            ridge(results[f"x{number}"], number), results[f"y{number}"], **CLOSE
        )
    x = torch.cat(
        [results["x0"], F.pad(results["x1"], (0, 4))]
    )  # both subjects in one batch, in a mixed order
    whose, order = torch.tensor([0] * 5 + [1] * 5), torch.randperm(10)
    torch.testing.assert_close(
        ridge(x[order], whose[order]), torch.cat([results["y0"], results["y1"]])[order], **CLOSE
    )


@pytest.mark.parametrize("folded", [True, False])
def test_backbone_gives_the_published_values_and_gradients(golden, folded):
    results, state = arrays(golden / "mindeye2" / "brainnet_tiny_seq1.npz")
    network = MixerBrainNetwork(
        h=16, out_dim=40, seq_len=1, n_blocks=2, clip_size=8, blurry_recon=False, folded=folded
    )
    network.load_state_dict(state)
    x = results["x"].requires_grad_()
    backbone, clip, blurry = network.eval()(x)
    torch.testing.assert_close(backbone, results["backbone"], **CLOSE)
    torch.testing.assert_close(clip, results["clip"], **CLOSE)
    assert torch.equal(blurry, results["blur_placeholder"])
    ((backbone * results["cot_backbone"]).sum() + (clip * results["cot_clip"]).sum()).backward()
    torch.testing.assert_close(
        x.grad, results["grad_x"], rtol=1e-4, atol=5e-4
    )  # the published backward leaks rounding noise through the dead norm
    for name, p in network.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            gradient,
            results[f"grad/{name}"],
            rtol=1e-3,
            atol=5e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_head_wider_than_a_token_is_refused():
    with pytest.raises(PerceptError, match="52 wide, which is more than the 16 of a token"):
        PriorNetwork(dim=16, dim_head=52)


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "out"), ({"learned_query_mode": "token"}, "out_token"), ({"causal": True}, "out_causal")],
)
def test_prior_network_gives_the_published_values(golden, options, name):
    results, state = arrays(golden / "mindeye2" / "prior_net_tiny.npz")
    network = PriorNetwork(dim=104, depth=2, num_tokens=4, **options).eval()
    network.load_state_dict(state)
    inputs = (results["x"], results["t"], results["brain"])
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), results[name], **CLOSE)
        if not options:
            dropped = {"brain_cond_drop_prob": 1.0, "image_cond_drop_prob": 1.0}
            torch.testing.assert_close(network(*inputs, **dropped), results["out_null"], **CLOSE)
            torch.testing.assert_close(
                network.forward_with_cond_scale(*inputs, cond_scale=2.5),
                results["out_cfg2.5"],
                **CLOSE,
            )


def test_published_grid_calls_the_prior_nineteen_times():
    prior, calls = (
        BrainDiffusionPrior(
            PriorNetwork(dim=16, depth=1, dim_head=8, num_tokens=3).eval(),
            image_embed_dim=16,
            image_embed_scale=1.0,
        ),
        [],
    )
    prior.net.register_forward_hook(lambda module, given, out: calls.append(int(given[1][0])))
    prior.sample(torch.randn(2, 3, 16), timesteps=20)
    assert calls == list(range(94, 3, -5))


def test_converter_gives_the_published_values(golden):
    results, state = arrays(golden / "mindeye2" / "clip_converter_tiny.npz")
    converter = CaptionConverter(5, 6, 8, 7)
    converter.load_state_dict(state)
    torch.testing.assert_close(converter(results["x"]), results["y"], **CLOSE)


# --------------------------------------------------------------------------------------- the mixer
def backbone(folded=True, cls=MixerBrainNetwork, drop=0.0, **options):
    torch.manual_seed(3)
    network = cls(
        h=12,
        out_dim=32,
        n_blocks=3,
        clip_size=8,
        latent_size=8,
        drop=drop,
        folded=folded,
        **options,
    )
    with torch.no_grad():
        for p in network.mixer_blocks2.parameters():
            p.add_(
                0.3 * torch.randn_like(p)
            )  # else gains and biases of the norms are as at the start
    return network


def test_what_the_mixer_adds_does_not_depend_on_the_dead_weights():
    network, x = backbone(folded=False).double().eval(), torch.randn(5, 1, 12).double()
    before = network._mix(x) - x
    assert torch.allclose(
        before, before[:1, :, :1].expand_as(before), atol=1e-12
    )  # one number for all samples and channels
    with torch.no_grad():
        for p in network.mixer_blocks1.parameters():
            p.normal_()
    assert torch.equal(network._mix(x) - x, before)


def test_folded_and_unfolded_are_the_same_network():
    folded, unfolded = backbone(True).eval(), backbone(False).eval()
    assert folded.state_dict().keys() == unfolded.state_dict().keys()
    x = torch.randn(5, 1, 12)
    for output, reference in zip(folded(x)[:2], unfolded(x)[:2], strict=True):
        assert (output - reference).abs().max() < 1e-6
    assert (
        folded.unused_parameters() == list(folded.mixer_blocks1.parameters())
        and not unfolded.unused_parameters()
    )


def test_folded_and_unfolded_train_alike():
    # In double precision: in single, the published backward leaks rounding noise through the dead
    # norm, which the optimizer blows up.
    data = [(torch.randn(6, 1, 12).double(), torch.randn(6, 4, 8).double()) for _ in range(15)]
    losses = []
    for network in (backbone(True).double(), backbone(False).double()):
        network.eval()  # no dropout in the blurry branch either
        dead = {id(p) for p in network.mixer_blocks1.parameters()}
        optimizer = torch.optim.AdamW(
            [p for p in network.parameters() if id(p) not in dead], lr=1e-2
        )
        mine = []
        for x, y in data:
            out, clip, (latent, maps) = network(x)
            loss = (
                F.mse_loss(out, y)
                + F.mse_loss(clip, y)
                + latent.abs().mean()
                + 0.1 * maps.abs().mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mine.append(loss.item())
        losses.append(mine)
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-6 * max(losses[1]))


def test_dead_weights_stay_out_of_the_optimizer_and_in_the_checkpoint():
    model = small()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.mixer_blocks1") for name in trained) and any(
        name.startswith("backbone.mixer_blocks2") for name in trained
    )
    assert "backbone.mixer_blocks1.0.1.3.weight" in model.state_dict()


def test_with_two_tokens_the_mixer_mixes():
    network, x = backbone(seq_len=2), torch.randn(3, 2, 12)
    assert not network.unused_parameters()
    first, second = x, x.transpose(1, 2)
    y = x
    with torch.no_grad():
        for one, two in zip(
            network.mixer_blocks1, network.mixer_blocks2, strict=True
        ):  # the published order of residuals, written out
            first = one(y) + first
            second = two(first.transpose(1, 2)) + second
            y = second.transpose(1, 2)
        expected = network.backbone_linear(y.reshape(3, -1)).view(3, 4, 8)
        torch.testing.assert_close(network.eval()(x)[0], expected)
    with pytest.raises(PerceptError, match="reads 2 trials together but was given 1"):
        network(torch.randn(3, 1, 12))


def test_the_residual_backbone_uses_its_blocks():
    network, x = backbone(cls=ResidualBrainNetwork).eval(), torch.randn(3, 1, 12)
    before = network(x)[0]
    with torch.no_grad():
        network.mixer_blocks1[0][1][3].weight.normal_()
    assert (network(x)[0] - before).abs().max() > 1e-2
    assert network.unused_parameters() == list(network.mixer_blocks2.parameters())
    assert network.state_dict().keys() == backbone().state_dict().keys()


def test_blurry_branch_is_in_single_precision_and_of_the_size_asked_for():
    network = backbone().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, (latent, maps) = network(torch.randn(2, 1, 12))
    assert out.dtype == torch.bfloat16 and latent.dtype == maps.dtype == torch.float32
    assert latent.shape == (2, 4, 8, 8) and maps.shape == (2, 4, 512)
    with pytest.raises(PerceptError, match="divisible by 4"):
        MixerBrainNetwork(h=8, out_dim=16, clip_size=8, latent_size=10)


def test_checkpointing_changes_nothing_but_memory():
    prior = BrainDiffusionPrior(
        PriorNetwork(dim=16, depth=2, dim_head=8, num_tokens=4),
        image_embed_dim=16,
        image_embed_scale=1.0,
    )
    inputs = {
        "text_embed": torch.randn(3, 4, 16),
        "image_embed": torch.randn(3, 4, 16),
        "seeds": torch.arange(3),
    }
    grads = []
    for on in (False, True):
        prior.net.causal_transformer.checkpointing = on
        prior.zero_grad()
        prior(**inputs)[0].backward()
        grads.append(
            {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys() and all(
        torch.equal(grads[0][name], grads[1][name]) for name in grads[0]
    )


# ---------------------------------------------------------------------------------- released files
@pytest.mark.parametrize(("blurry", "subjects"), [(True, (9,)), (False, (9, 7, 5))])
def test_released_files_are_read_strictly(tmp_path, blurry, subjects):
    model = small(subjects, blurry_recon=blurry)
    write_published(tmp_path / "last.pth", model, epoch=3)
    repeated, config = load_decoder(tmp_path / "last.pth")
    assert (
        isinstance(repeated, MindEye2)
        and config["tokens"] == [4, 16]
        and config["clip"]["squeezed"]
    )
    for name, value in model.state_dict().items():
        assert torch.equal(repeated.state_dict()[name], value), name
    with pytest.raises(PerceptError, match="does not fit MindEye2"):
        load_published(tmp_path / "last.pth", small(subjects, blurry_recon=not blurry))


def test_a_residual_backbone_is_not_written_as_released(tmp_path):
    with pytest.raises(PerceptError, match="a ResidualBrainNetwork"):
        write_published(tmp_path / "last.pth", small(backbone="residual"))


def deepspeed_folder(folder, model, processes=3):
    """A folder as ZeRO stage 2 leaves it: half-precision weights, and the optimizer's
    single-precision ones in pieces.
    """
    (folder / "tag").mkdir(parents=True)
    (folder / "latest").write_text("tag\n")
    weights = {name: value.half() for name, value in model.state_dict().items()}
    groups = [
        [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and ("bias" in name) == with_bias
        ]
        for with_bias in (False, True)
    ]
    named = dict(model.named_parameters())
    content = {
        "module": weights,
        "param_shapes": [{name: named[name].shape for name in group} for group in groups],
    }
    torch.save(content, folder / "tag" / "mp_rank_00_model_states.pt")
    flats = [torch.cat([named[name].detach().flatten() for name in group]) for group in groups]
    padded = [F.pad(flat, (0, -len(flat) % processes)).chunk(processes) for flat in flats]
    for rank in range(processes):
        pieces = {
            "optimizer_state_dict": {
                "single_partition_of_fp32_groups": [parts[rank].clone() for parts in padded]
            }
        }
        torch.save(pieces, folder / "tag" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_folders_of_deepspeed_are_put_together(tmp_path):
    model = small()
    deepspeed_folder(tmp_path / "last", model)
    state = read_published(tmp_path / "last")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        expected = value if name in trained else value.half()
        assert torch.equal(state[name], expected), name
    assert isinstance(load_decoder(tmp_path / "last")[0], MindEye2)
    with pytest.raises(PerceptError, match="not one"):
        read_published(tmp_path)


# -------------------------------------------------------------------------------- several subjects
@pytest.fixture
def people(tmp_path):
    results = []
    for subj, seed in ((1, 0), (2, 5)):
        prepare(tmp_path, subj=subj, seed=seed)
        subject = open_subject(tmp_path, subj)
        targets = {
            "tokens": (
                np.arange(len(subject.image_ids("train")), dtype=np.float32)[:, None].repeat(3, 1)
            )
        }
        results.append(BrainDataset(subject, "train", targets, Normaliser.fit(subject)))
    return results


def test_batches_mix_subjects_in_the_order_asked_for(people):
    combined = MultiSubjectDataset(people)
    n = len(people[0])
    assert len(combined) == 2 * n
    batch = combined.__getitems__([n + 1, 0, n, 2])
    assert batch["subject"].tolist() == [1, 0, 1, 0]
    for row, (number, index) in enumerate([(1, 1), (0, 0), (1, 0), (0, 2)]):
        alone = people[number].__getitems__([index])
        assert torch.equal(batch["voxels"][row], alone["voxels"][0]) and torch.equal(
            batch["tokens"][row], alone["tokens"][0]
        )
    assert set(combined.preview_batch(2)["subject"].tolist()) == {0, 1}


def test_smaller_brains_are_filled_up_with_zeros(people):
    columns = copy.copy(people[1])
    columns.normaliser = Normaliser.fit(columns.subject, n_components=3)
    combined = MultiSubjectDataset([people[0], columns])
    batch = combined.__getitems__([len(people[0])])
    assert (
        batch["voxels"].shape[1] == people[0].subject.betas.shape[1]
        and not batch["voxels"][:, 3:].any()
    )


def test_voxels_are_mixed_within_subjects_and_labels_point_at_the_partner():
    subject = torch.tensor([0, 1, 1, 0, 1, 0, 2])
    voxels = torch.randn(7, 5)
    mixed, perm, betas, select = mixco(voxels, groups=subject)
    assert torch.equal(subject[perm], subject) and sorted(perm.tolist()) == list(range(7))
    expected = betas[:, None] * voxels + (1 - betas[:, None]) * voxels[perm]
    torch.testing.assert_close(mixed, expected)
    assert any((mixco(voxels, groups=subject)[1] != torch.arange(7)).any() for _ in range(5))


def test_a_new_subject_starts_from_others_without_their_ridge(tmp_path):
    pretrained, new = small((9, 7)), small((6,))
    before = copy.deepcopy(new.state_dict())
    save_checkpoint(tmp_path / "last.safetensors", pretrained.state_dict(), {"model": {}})
    assert load_pretrained(tmp_path / "last.safetensors", new) == [
        "ridge.linears.0.weight",
        "ridge.linears.0.bias",
    ]
    for name, value in new.state_dict().items():
        expected = before[name] if name.startswith("ridge.") else pretrained.state_dict()[name]
        assert torch.equal(value, expected), name
    load_pretrained(tmp_path / "last.safetensors", new, "inherited_bias")
    assert torch.equal(new.ridge.linears[0].bias, pretrained.ridge.linears[0].bias)
    with pytest.raises(PerceptError, match="pretrain with the same networks"):
        load_pretrained(tmp_path / "last.safetensors", small((6,), n_blocks=3))
    with pytest.raises(PerceptError, match="which has no backbone.b"):
        load_pretrained(tmp_path / "last.safetensors", small((6,), blurry_recon=False))


# -------------------------------------------------------------------------------- before long work
def step_of(model, batch, epoch):
    backbone, clip, (latent, maps) = model(batch["voxels"], batch["subject"])
    loss = clip.square().mean() + latent.abs().mean() + maps.square().mean()
    return (
        loss
        + model.diffusion_prior(
            text_embed=backbone, image_embed=batch["tokens"], seeds=batch["seed"]
        )[0],
        {},
    )


def a_batch(n=6):
    whose = torch.arange(n) % 2
    return {
        "voxels": torch.randn(n, 9),
        "subject": whose,
        "tokens": torch.randn(n, 4, 16),
        "seed": torch.arange(n),
    }


def test_gradients_are_checked_before_training():
    model, batch = small(), a_batch()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert check_gradients(model, step_of, batch) == trainable(model)
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    ) and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_gradient_and_values_that_are_not_finite_are_named():
    model = small((9, 7, 5))
    with pytest.raises(PerceptError, match=r"No gradient reaches ridge.linears.2.weight \(2 of"):
        check_gradients(model, step_of, a_batch())
    batch = a_batch()
    batch["voxels"][0, 0] = math.nan
    with pytest.raises(PerceptError, match="loss of the first batch is nan"):
        check_gradients(small(), step_of, batch)


# --------------------------------------------------------------------------------------------- use
def test_tokens_and_latents_are_predicted_whatever_the_batch():
    model = small().eval()
    voxels = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    sampling = PriorSampling(2, timesteps=5)
    tokens, projected = predict_tokens(model, voxels, (4, 16), sampling, batch_size=5)
    repeated, _ = predict_tokens(model, voxels, (4, 16), sampling, batch_size=2)
    torch.testing.assert_close(tokens, repeated, **CLOSE)
    assert tokens.shape == (5, 2, 4, 16) and projected.shape == (5, 4, 16)
    assert predict_latents(model, voxels, (4, 8, 8)).shape == (5, 4, 8, 8)
    direct, _ = predict_tokens(model, voxels, (4, 16), PriorSampling(use_prior=False))
    torch.testing.assert_close(direct[:, 0], model(torch.from_numpy(voxels))[0], **CLOSE)


def test_patch_tokens_of_the_mini_clip():
    x = torch.rand(3, 3, 32, 32)
    clip = PatchClip("mini")
    tokens = clip.embed_image(x)
    assert tokens.shape == (3, *clip.target_shape) == (3, 16, 128)
    vision = clip.model.model.vision_model
    local = vision.post_layernorm(
        vision(
            pixel_values=(x - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
            / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        ).last_hidden_state
    )[:, 1:]
    torch.testing.assert_close(tokens, local, **CLOSE)
    squeezed = PatchClip("mini", squeezed=True)
    torch.testing.assert_close(squeezed.embed_image(x), clip.embed_image((x + 1) / 2), **CLOSE)
    subset = PatchClip("mini", patches=4)
    torch.testing.assert_close(
        subset.embed_image(x)[:, 0], tokens[:, [0, 1, 4, 5]].mean(1), **CLOSE
    )
    with pytest.raises(PerceptError, match="square of a divisor"):
        PatchClip("mini", patches=9)
    kinds = {json.dumps(encoder.fingerprint()) for encoder in (clip, squeezed, subset)}
    assert len(kinds) == 3
    assert isinstance(
        load_encoder(
            {"tokens": [4, 128], "clip": {"patch_tokens": True, "variant": "bigG", "patches": 4}},
            "mini",
        ),
        PatchClip,
    )


def test_converter_learns_a_map_of_its_kind_on_training_images_alone(tmp_path):
    class Stored:
        def __init__(self, rows):
            self.stored, self.shape = rows, rows.shape[1:]

        def rows(self, ids):
            return self.stored[ids]

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 4, 6)).astype(np.float32)
    along, across = np.abs(rng.normal(size=(5, 4))), rng.normal(size=(3, 6))
    wanted = np.einsum("ot,ntd,ed->noe", along, inputs, across).astype(np.float32) / 5
    train, val = np.arange(300), np.arange(300, 400)
    spoilt = wanted.copy()
    spoilt[350:] = np.nan  # of images that are in neither split
    converter, history = fit_converter(
        TokenPairs(Stored(inputs), Stored(spoilt), train),
        TokenPairs(Stored(inputs), Stored(spoilt), val[:50]),
        tmp_path,
        {"of": "this test"},
        Batching(epochs=60, batch_size=50),
        Optimisation(max_lr=2e-2),
        Execution("cpu"),
    )
    assert history["val/r2"].max() > 0.95
    expected = torch.from_numpy(wanted[350:])
    assert (
        1 - F.mse_loss(converter(torch.from_numpy(inputs[350:])), expected) / expected.var() > 0.9
    )


def test_config_is_read_back_from_weights():
    model = small((9, 7), seq_past=1, seq_future=2)
    config = infer_published_config(model.state_dict())
    assert config["backbone"]["kwargs"]["seq_len"] == 4 and config["ridge"]["kwargs"][
        "input_sizes"
    ] == [9, 7]
    assert build_decoder(config).state_dict().keys() == model.state_dict().keys()
