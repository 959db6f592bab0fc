"""MindEye2's decoder: the sampler against its formula, the converter at full size without memory,
the miniature's images.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn

from src import miniworld, pretrained, utils
from src.decoding import generate
from src.pretrained import unclip
from src.utils import PerceptError

TINY_UNET = unclip.UNET | {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 12,
    "projection_class_embeddings_input_dim": 16,
}
TINY_VAE = unclip.VAE | {"block_out_channels": (32, 32, 64, 64), "sample_size": 64}


# ---------------------------------------------------------------------------------------- sampling
def reference_sigmas(steps):
    """Legacy DDPM discretisation, in double precision."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    times = [int(999 * (steps - k) / steps) for k in range(steps)]
    return times, [*np.sqrt((1 - alphas[times]) / alphas[times]), 0.0]


class Toy(nn.Module):
    """Predicts some noise; remembers what it was given."""

    def forward(self, x, t, encoder_hidden_states, class_labels):
        shift = encoder_hidden_states.mean((1, 2)) + class_labels.mean(1)
        return SimpleNamespace(sample=torch.tanh(0.7 * x + shift[:, None, None, None] + t / 1000))


def test_the_schedule_is_the_published_one():
    for steps in (38, 25, 10):
        times, sigmas = reference_sigmas(steps)
        scheduler = EulerDiscreteScheduler(**unclip.SCHEDULER)
        scheduler.set_timesteps(timesteps=unclip.compute_euler_timesteps(steps))
        assert scheduler.timesteps.tolist() == times and len(scheduler.sigmas) == steps + 1
        np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas, rtol=1e-4)
        assert scheduler.sigmas[0] == pytest.approx(14.6146, abs=1e-3)


@pytest.mark.parametrize(("guidance", "first"), [(5.0, 0), (1.0, 0), (3.0, 4)])
def test_sampling_is_eulers_method_with_guidance(guidance, first):
    torch.manual_seed(0)
    x, condition, null, vector = (
        torch.randn(3, 4, 2, 2),
        torch.randn(3, 5, 6),
        torch.randn(3, 5, 6),
        torch.randn(1, 8),
    )
    scheduler = EulerDiscreteScheduler(**unclip.SCHEDULER)
    scheduler.set_timesteps(timesteps=unclip.compute_euler_timesteps(10))
    sampled = unclip.denoise(Toy(), scheduler, 10 * x, condition, null, vector, guidance, first)
    y, (times, sigmas) = 10 * x.double().numpy(), reference_sigmas(10)
    shifts = [
        (tokens.double().mean((1, 2)) + vector.double().mean()).numpy()[:, None, None, None]
        for tokens in (null, condition)
    ]
    for time, sigma, following in list(zip(times, sigmas, sigmas[1:], strict=False))[first:]:
        null_pred, conditional_pred = (
            np.tanh(0.7 * y / np.sqrt(1 + sigma**2) + shift + time / 1000) for shift in shifts
        )
        denoised = y - sigma * (null_pred + guidance * (conditional_pred - null_pred))
        y = y + (following - sigma) * (y - denoised) / sigma
    np.testing.assert_allclose(sampled.numpy(), y, rtol=1e-3, atol=1e-3)


def test_the_vector_tells_size_and_crop():
    vector = unclip.embed_size_and_crop((768, 512), (0, 5), 32)[0].double().numpy()
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate(
        [
            np.r_[np.cos(value * frequencies), np.sin(value * frequencies)]
            for value in (768, 512, 0, 5)
        ]
    )
    np.testing.assert_allclose(vector, expected, atol=1e-3)
    assert unclip.embed_size_and_crop((768, 768), (0, 0), 1024).shape == (1, 1024)


# ----------------------------------------------------------------------------------- the miniature
@pytest.fixture(scope="module")
def decoder():
    return unclip.UnclipDecoder("mini")


def sample_images(count, split="val", seed=5):
    compositions = [miniworld.compose_image(seed, i, split) for i in range(count)]
    rendered = np.stack([miniworld.render_image(what, seed) for what in compositions])
    labels = [
        (
            list(miniworld.CATEGORIES)[what.objects[-1].category],
            list(miniworld.COLOURS)[what.objects[-1].colour],
            miniworld.SCENES[what.scene],
        )
        for what in compositions
    ]
    return torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 255, np.array(labels)


@torch.no_grad()
def patch_tokens(images):
    vision = pretrained.Clipper("mini").model.model.vision_model
    return vision.post_layernorm(
        vision(pixel_values=pretrained.normalise_for_clip(images)).last_hidden_state[:, 1:]
    )


def noise_for(decoder, count, seed=0):
    return torch.randn(count, *decoder.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow(reason="generates many images")
def test_it_paints_what_the_tokens_of_unseen_combinations_show(decoder):
    images, labels = sample_images(48)
    generated = decoder.generate(
        patch_tokens(images), noise_for(decoder, 48), num_inference_steps=10
    )
    assert (
        generated.shape == images.shape
        and 0 <= float(generated.min())
        and float(generated.max()) <= 1
    )
    answers = pretrained.CategoryClassifier("mini").classify(generated)
    shares = {
        question: float((answers[question] == labels[:, i]).mean())
        for i, question in enumerate(("kind", "colour", "scene"))
    }
    assert shares["scene"] > 0.9 and shares["kind"] > 0.6 and shares["colour"] > 0.6, (
        shares
    )  # chance about .05 to .13


@pytest.mark.slow(reason="generates many images")
def test_an_image_does_not_depend_on_its_batch_but_on_its_noise(decoder):
    tokens, noise = patch_tokens(sample_images(3)[0]), noise_for(decoder, 3)
    together = decoder.generate(tokens, noise, num_inference_steps=3)
    alone = torch.cat(
        [
            decoder.generate(tokens[i : i + 1], noise[i : i + 1], num_inference_steps=3)
            for i in range(3)
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    other = decoder.generate(tokens, noise_for(decoder, 3, seed=1), num_inference_steps=3)
    assert float((other - together).abs().mean()) > 0.01
    ids = np.array([5, 2, 9])
    generated = generate.generate_images(
        decoder, tokens[:, None], ids, n_samples=2, batch_size=4, num_inference_steps=2
    )
    last = generate.generate_images(
        decoder, tokens[2:, None], ids[2:], n_samples=2, batch_size=1, num_inference_steps=2
    )
    assert (
        generated.shape == (3, 2, 3, 32, 32)
        and float((generated[:, 0] - generated[:, 1]).abs().mean()) > 0.01
    )
    torch.testing.assert_close(generated[2:], last, rtol=1e-3, atol=1e-3)


def test_no_condition_is_noise_of_each_images_own(decoder):
    tokens, noise = torch.zeros(40, 16, 128), noise_for(decoder, 40)
    null = decoder.get_null_condition(tokens, noise)
    assert (
        null.shape == tokens.shape
        and abs(float(null.mean())) < 0.02
        and float(null.std()) == pytest.approx(1, abs=0.02)
    )
    assert len({float(row[0, 0]) for row in null}) == 40
    alone = decoder.get_null_condition(tokens[5:6], noise[5:6])[0]
    torch.testing.assert_close(alone, null[5])
    torch.testing.assert_close(
        decoder.get_null_condition(tokens + 1), decoder.get_null_condition(tokens + 1)
    )


def test_it_begins_as_published(decoder, monkeypatch):
    starts = {}
    monkeypatch.setattr(
        unclip,
        "denoise",
        lambda unet, scheduler, latents, *rest: (
            starts.update(latents=latents, sigma=scheduler.sigmas[rest[-1]]) or latents
        ),
    )
    noise = noise_for(decoder, 400)
    decoder.generate(torch.zeros(400, 16, 128), noise, num_inference_steps=38)
    rest = (
        starts["latents"] - starts["sigma"] * noise
    )  # a standard normal start, and what all places of an image share
    shared = rest.mean((1, 2, 3)) / starts["sigma"]
    assert float(starts["sigma"]) == pytest.approx(14.6146, abs=1e-3)
    assert float(shared.std()) == pytest.approx(0.04, rel=0.2)
    assert float((rest - rest.mean((1, 2, 3), keepdim=True)).std()) == pytest.approx(1, rel=0.02)
    assert abs(float((rest * noise).mean())) < 0.01


def test_img2img_and_the_squeezed_colours(decoder):
    images, noise = sample_images(4)[0], noise_for(decoder, 4)
    latents, tokens = decoder.encode(images), patch_tokens(images)
    assert tuple(latents.shape[1:]) == decoder.latent_shape
    unchanged = decoder.generate(tokens, noise, latents, strength=0.0)
    torch.testing.assert_close(unchanged, decoder.decode(latents))
    slightly_changed = decoder.generate(
        tokens, noise, latents, strength=0.3, num_inference_steps=10
    )
    assert 0 < float((slightly_changed - images).abs().mean()) < 0.1
    squeezed = unclip.UnclipDecoder("mini", squeezed=True).generate(
        tokens, noise, latents, strength=0.0
    )
    decoded = decoder.model.decode(latents / decoder.scale).sample  # in [-1, 1] and a little beyond
    torch.testing.assert_close(squeezed, (0.8 * decoded + 0.2).clamp(0, 1))


def test_fingerprint_is_the_recorded_one_and_wrong_tokens_are_refused(decoder):
    mark = decoder.fingerprint()
    assert mark["model"] == "mini:unclip" and len(mark["golden"]) == 8 and mark["image_size"] == 32
    with pytest.raises(PerceptError, match="dim 128, not 768"):
        decoder.generate(torch.zeros(1, 49, 768), noise_for(decoder, 1))


# ------------------------------------------------------------------------ the released file's keys
def add_pair(old, new, shape):
    """One layer with weight and bias: (key of sgm, key of diffusers, shape) each."""
    return [(f"{old}.weight", f"{new}.weight", shape), (f"{old}.bias", f"{new}.bias", shape[:1])]


def resnet(old, new, cin, cout, embedding):
    rows = add_pair(f"{old}.in_layers.0", f"{new}.norm1", (cin,)) + add_pair(
        f"{old}.in_layers.2", f"{new}.conv1", (cout, cin, 3, 3)
    )
    rows += add_pair(f"{old}.emb_layers.1", f"{new}.time_emb_proj", (cout, embedding))
    rows += add_pair(f"{old}.out_layers.0", f"{new}.norm2", (cout,)) + add_pair(
        f"{old}.out_layers.3", f"{new}.conv2", (cout, cout, 3, 3)
    )
    return rows + (
        add_pair(f"{old}.skip_connection", f"{new}.conv_shortcut", (cout, cin, 1, 1))
        if cin != cout
        else []
    )


def transformer(old, new, dim, depth, context):
    rows = [
        row
        for name in ("proj_in", "proj_out")
        for row in add_pair(f"{old}.{name}", f"{new}.{name}", (dim, dim))
    ]
    rows += add_pair(f"{old}.norm", f"{new}.norm", (dim,))
    for k in range(depth):
        a, b = f"{old}.transformer_blocks.{k}", f"{new}.transformer_blocks.{k}"
        for attention, width in (("attn1", dim), ("attn2", context)):
            sizes = {"to_q": dim, "to_k": width, "to_v": width}
            rows += [
                (f"{a}.{attention}.{name}.weight", f"{b}.{attention}.{name}.weight", (dim, size))
                for name, size in sizes.items()
            ]
            rows += add_pair(f"{a}.{attention}.to_out.0", f"{b}.{attention}.to_out.0", (dim, dim))
        rows += add_pair(f"{a}.ff.net.0.proj", f"{b}.ff.net.0.proj", (8 * dim, dim)) + add_pair(
            f"{a}.ff.net.2", f"{b}.ff.net.2", (dim, 4 * dim)
        )
        rows += [row for n in (1, 2, 3) for row in add_pair(f"{a}.norm{n}", f"{b}.norm{n}", (dim,))]
    return rows


def network_keys(channels, depths, context, adm):
    """SDXL's network by hand: three levels of two resnets, transformers in the lower two, four
    channels in and out.
    """
    emb = 4 * channels[0]
    rows = add_pair("input_blocks.0.0", "conv_in", (channels[0], 4, 3, 3)) + add_pair(
        "out.0", "conv_norm_out", (channels[0],)
    )
    rows += add_pair("out.2", "conv_out", (4, channels[0], 3, 3))
    for old, new, width in (
        ("time_embed.{}", "time_embedding", channels[0]),
        ("label_emb.0.{}", "class_embedding", adm),
    ):
        rows += add_pair(old.format(0), f"{new}.linear_1", (emb, width)) + add_pair(
            old.format(2), f"{new}.linear_2", (emb, emb)
        )
    skips, width = [channels[0]], channels[0]
    for level, out in enumerate(channels):
        for j in range(2):
            i, new = 1 + 3 * level + j, f"down_blocks.{level}"
            rows += resnet(f"input_blocks.{i}.0", f"{new}.resnets.{j}", width, out, emb)
            rows += (
                transformer(
                    f"input_blocks.{i}.1", f"{new}.attentions.{j}", out, depths[level], context
                )
                if level
                else []
            )
            width = out
            skips.append(out)
        if level < 2:
            rows += add_pair(
                f"input_blocks.{3 * level + 3}.0.op",
                f"down_blocks.{level}.downsamplers.0.conv",
                (out, out, 3, 3),
            )
            skips.append(out)
    for n, j in ((0, 0), (2, 1)):
        rows += resnet(f"middle_block.{n}", f"mid_block.resnets.{j}", width, width, emb)
    rows += transformer("middle_block.1", "mid_block.attentions.0", width, depths[-1], context)
    for up, level in enumerate((2, 1, 0)):
        for j in range(3):
            i, out, new = 3 * up + j, channels[level], f"up_blocks.{up}"
            rows += resnet(
                f"output_blocks.{i}.0", f"{new}.resnets.{j}", width + skips.pop(), out, emb
            )
            rows += (
                transformer(
                    f"output_blocks.{i}.1", f"{new}.attentions.{j}", out, depths[level], context
                )
                if level
                else []
            )
            width = out
        if level:
            rows += add_pair(
                f"output_blocks.{3 * up + 2}.2.conv",
                f"up_blocks.{up}.upsamplers.0.conv",
                (width, width, 3, 3),
            )
    return [(f"model.diffusion_model.{old}", new, shape) for old, new, shape in rows]


def vae_block(old, new, cin, cout):
    rows = add_pair(f"{old}.norm1", f"{new}.norm1", (cin,)) + add_pair(
        f"{old}.conv1", f"{new}.conv1", (cout, cin, 3, 3)
    )
    rows += add_pair(f"{old}.norm2", f"{new}.norm2", (cout,)) + add_pair(
        f"{old}.conv2", f"{new}.conv2", (cout, cout, 3, 3)
    )
    return rows + (
        add_pair(f"{old}.nin_shortcut", f"{new}.conv_shortcut", (cout, cin, 1, 1))
        if cin != cout
        else []
    )


def vae_keys(channels):
    """The first stage by hand; its attention is of 1 x 1 convolutions there and of linear maps
    here.
    """
    rows = add_pair("quant_conv", "quant_conv", (8, 8, 1, 1)) + add_pair(
        "post_quant_conv", "post_quant_conv", (4, 4, 1, 1)
    )
    last, width = channels[-1], channels[0]
    rows += add_pair("encoder.conv_in", "encoder.conv_in", (width, 3, 3, 3)) + add_pair(
        "decoder.conv_in", "decoder.conv_in", (last, 4, 3, 3)
    )
    rows += add_pair("encoder.norm_out", "encoder.conv_norm_out", (last,)) + add_pair(
        "decoder.norm_out", "decoder.conv_norm_out", (width,)
    )
    rows += add_pair("encoder.conv_out", "encoder.conv_out", (8, last, 3, 3)) + add_pair(
        "decoder.conv_out", "decoder.conv_out", (3, width, 3, 3)
    )
    for half in ("encoder", "decoder"):
        for n in (1, 2):
            rows += vae_block(
                f"{half}.mid.block_{n}", f"{half}.mid_block.resnets.{n - 1}", last, last
            )
        a, b = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
        rows += add_pair(f"{a}.norm", f"{b}.group_norm", (last,))
        for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rows += add_pair(f"{a}.{old}", f"{b}.{new}", (last, last, 1, 1))
    for i, out in enumerate(channels):
        for j in range(2):
            rows += vae_block(
                f"encoder.down.{i}.block.{j}",
                f"encoder.down_blocks.{i}.resnets.{j}",
                width if j == 0 else out,
                out,
            )
        width = out
        rows += (
            add_pair(
                f"encoder.down.{i}.downsample.conv",
                f"encoder.down_blocks.{i}.downsamplers.0.conv",
                (out, out, 3, 3),
            )
            if i < 3
            else []
        )
    for up, i in enumerate((3, 2, 1, 0)):
        for j in range(3):
            rows += vae_block(
                f"decoder.up.{i}.block.{j}",
                f"decoder.up_blocks.{up}.resnets.{j}",
                width if j == 0 else channels[i],
                channels[i],
            )
        width = channels[i]
        rows += (
            add_pair(
                f"decoder.up.{i}.upsample.conv",
                f"decoder.up_blocks.{up}.upsamplers.0.conv",
                (width, width, 3, 3),
            )
            if i
            else []
        )
    return [(f"first_stage_model.{old}", new, shape) for old, new, shape in rows]


def released(unet_rows, vae_rows, weights=None):
    """A state dict with the released keys, without memory or with the `weights` of (network,
    autoencoder).
    """
    state = {
        "conditioner.embedders.0.model.visual.proj": torch.zeros(2),
        "denoiser.sigmas": torch.zeros(3),
    }
    for rows, source in ((unet_rows, weights and weights[0]), (vae_rows, weights and weights[1])):
        state |= {
            old: source[new].reshape(shape) if source else torch.empty(shape, device="meta")
            for old, new, shape in rows
        }
    return state


def test_the_converter_fits_the_full_networks_key_for_key():
    unet_rows = network_keys((320, 640, 1280), (0, 2, 10), 1664, 1024)
    rows = unet_rows, vae_keys((128, 256, 512, 512))
    state = released(*rows)
    converted = unclip.convert_unclip_weights(state)
    with torch.device("meta"):
        models = UNet2DConditionModel(**unclip.UNET), AutoencoderKL(**unclip.VAE)
    assert 2.4e9 < sum(p.numel() for p in models[0].parameters()) < 2.7e9
    for converted_state, model, expected in zip(converted, models, rows, strict=True):
        reference = model.state_dict()
        assert set(converted_state) == set(reference) == {new for _, new, _ in expected}
        assert {key: value.shape for key, value in converted_state.items()} == {
            key: value.shape for key, value in reference.items()
        }
        for old, new, shape in expected:
            same = (
                converted_state[new] is state[old]
                or len(shape) == 4
                and converted_state[new].shape == shape[:2]
            )  # 1 x 1 convolutions become linear maps
            assert same, (old, new)


def test_averaged_weights_are_preferred_and_gaps_are_named():
    rows = network_keys((32, 64, 64), (0, 1, 2), 12, 16), vae_keys((32, 32, 64, 64))
    state = released(*rows)
    mean = {
        "model_ema." + "".join(key.split(".")[1:]): torch.empty(value.shape, device="meta")
        for key, value in state.items()
        if key.startswith("model.")
    }
    unet, _ = unclip.convert_unclip_weights(state | mean)
    assert unet["conv_in.weight"] is mean["model_ema.diffusion_modelinput_blocks00weight"]
    assert {id(value) for value in unet.values()} == {id(value) for value in mean.values()}
    with pytest.raises(PerceptError, match="of no unCLIP network"):
        unclip.convert_unclip_weights(
            {key: value for key, value in state.items() if not key.startswith("first_stage")}
        )
    with pytest.raises(PerceptError, match="lack"):
        unclip.convert_unclip_weights(
            {key: value for key, value in state.items() if "label_emb" not in key}
        )


@pytest.fixture
def tiny_file(tmp_path, monkeypatch):
    """A small network and autoencoder, and a checkpoint that holds both as the released one."""
    monkeypatch.setattr(unclip, "UNET", TINY_UNET)
    monkeypatch.setattr(unclip, "VAE", TINY_VAE)
    torch.manual_seed(0)
    models = UNet2DConditionModel(**TINY_UNET).eval(), AutoencoderKL(**TINY_VAE).eval()
    rows = network_keys((32, 64, 64), (0, 1, 2), 12, 16), vae_keys((32, 32, 64, 64))
    path = tmp_path / "data" / "mindeye2_models" / unclip.CHECKPOINT
    path.parent.mkdir(parents=True)
    torch.save(
        {
            "state_dict": released(*rows, [model.state_dict() for model in models]),
            "callbacks": SimpleNamespace(best=1),
        },
        path,
    )
    monkeypatch.setattr(utils, "HOME", tmp_path)
    return path, models


def test_the_released_file_is_rewritten_once_and_used(tiny_file):
    path, (unet, vae) = tiny_file
    decoder = unclip.UnclipDecoder("hub")
    folder = path.parents[1] / "unclip"
    assert (
        {part.name for part in folder.iterdir()} == {"unet", "vae", "scheduler"}
        and decoder.latent_shape == (4, 8, 8)
        and decoder.vector.shape == (1, 16)
    )
    x = torch.randn(2, 4, 8, 8)
    tokens = torch.randn(2, 5, 12)
    vector = torch.randn(2, 16)
    with torch.no_grad():
        expected = unet(x, 300, encoder_hidden_states=tokens, class_labels=vector).sample
        torch.testing.assert_close(
            decoder.unet(x, 300, encoder_hidden_states=tokens, class_labels=vector).sample,
            expected,
            rtol=2e-2,
            atol=5e-3,
        )
        torch.testing.assert_close(
            decoder.decode(x), (vae.decode(x / 0.13025).sample / 2 + 0.5).clamp(0, 1)
        )
    path.unlink()
    reloaded = unclip.UnclipDecoder(str(folder.parent)).generate(tokens, x, num_inference_steps=2)
    torch.testing.assert_close(
        reloaded, unclip.UnclipDecoder("hub").generate(tokens, x, num_inference_steps=2)
    )
    assert reloaded.shape == (2, 3, 64, 64)


def test_a_file_that_does_not_fit_leaves_nothing_behind(tiny_file, tmp_path):
    path, _ = tiny_file
    content = torch.load(path, weights_only=False)
    content["state_dict"]["first_stage_model.encoder.conv_in.weight"] = torch.zeros(32, 5, 3, 3)
    torch.save(content, path)
    with pytest.raises(PerceptError, match="does not fit AutoencoderKL"):
        unclip.UnclipDecoder("hub")
    assert [part.name for part in (tmp_path / "data").iterdir()] == ["mindeye2_models"]
    path.unlink()
    with pytest.raises(PerceptError, match="download unclip"):
        unclip.UnclipDecoder("hub")
    (tmp_path / "there").mkdir()
    with pytest.raises(PerceptError, match="exists already"):
        unclip.convert_unclip_checkpoint(path, tmp_path / "there")
