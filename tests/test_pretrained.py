"""The frozen models: real classes with the committed miniature weights, against the libraries' own
pipelines and recorded features.
"""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from library_pipelines import load_image_variation_pipeline, load_versatile_pipeline
from PIL import Image
from transformers import CLIPModel

from src import miniworld, pretrained
from src.pretrained import generators, teacher
from src.utils import PerceptError


def test_the_package_hands_on_each_name_from_the_module_that_defines_it():
    names = [name for exported in pretrained._EXPORTS.values() for name in exported]
    assert sorted(names) == sorted(pretrained.__all__)
    assert pretrained.Clipper.__module__ == "src.pretrained.clip"
    with pytest.raises(AttributeError, match="no attribute 'Clip'"):
        pretrained.Clip  # noqa: B018


@pytest.fixture(scope="module")
def images():
    rendered = [miniworld.render_image(miniworld.compose_image(0, i, "test")) for i in range(24)]
    return np.stack(rendered)


def as_float(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def diffusion():
    return pretrained.VersatileDiffusion("mini")


def test_hidden_tokens_are_the_librarys_projection_of_every_token(images):
    clip = CLIPModel.from_pretrained(pretrained.MINI_MODELS / "clip").float().eval()
    tokens = pretrained.Clipper("mini", hidden=True, norm_embs=False).embed_image(as_float(images))
    pixels = pretrained.Clipper("mini").preprocess(as_float(images))
    pooled = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    assert tokens.shape == (24, 17, 128)
    torch.testing.assert_close(tokens[:, 0], pooled, rtol=1e-4, atol=1e-4)
    final = pretrained.Clipper("mini", hidden=False, norm_embs=False).embed_image(as_float(images))
    torch.testing.assert_close(final, pooled, rtol=1e-4, atol=1e-4)


def test_norm_embs_divides_by_the_cls_token(images):
    tokens = pretrained.Clipper("mini").embed_image(as_float(images))
    torch.testing.assert_close(tokens[:, 0].norm(dim=-1), torch.ones(24))
    raw = pretrained.Clipper("mini", norm_embs=False).embed_image(as_float(images))
    torch.testing.assert_close(tokens, raw / raw[:, :1].norm(dim=-1, keepdim=True))


def test_preprocess_resizes_crops_and_normalises():
    clipper = pretrained.Clipper("mini")
    flat = torch.full((1, 3, 64, 48), 0.5)
    out = clipper.preprocess(flat)
    assert out.shape == (1, 3, 32, 32)
    expected = (0.5 - torch.tensor(pretrained.CLIP_MEAN)) / torch.tensor(pretrained.CLIP_STD)
    torch.testing.assert_close(out[0].mean((1, 2)), expected)


def test_captions_find_their_images():
    compositions = [miniworld.compose_image(5, i, "val") for i in range(100)]
    clipper = pretrained.Clipper("mini", hidden=False)
    image = clipper.embed_image(
        as_float(np.stack([miniworld.render_image(what, 5) for what in compositions]))
    )
    text = clipper.embed_text([miniworld.write_captions(what)[1] for what in compositions])
    is_right = (text @ image.T).argmax(1) == torch.arange(100)
    assert is_right.float().mean() > 0.5  # chance .01


def test_autoencoder_round_trip_keeps_the_image(images):
    vae = pretrained.LatentAutoencoder("mini")
    latents = vae.encode(as_float(images))
    assert latents.shape == (24, *vae.latent_shape)
    assert 0.7 < latents.std() < 1.4  # the scaling factor gives latents about unit variance
    difference = vae.decode(latents) - as_float(images)
    error = (difference**2).mean((1, 2, 3))
    assert float(-10 * torch.log10(error).mean()) > 26


def test_few_images_at_a_time_give_the_same(images, monkeypatch):
    vae = pretrained.LatentAutoencoder("mini")
    latents = vae.encode(as_float(images))
    decoded = vae.decode(latents)
    assert vae._batch_size == 1024
    monkeypatch.setattr(pretrained.LatentAutoencoder, "_batch_size", 7)
    torch.testing.assert_close(vae.encode(as_float(images)), latents)
    torch.testing.assert_close(vae.decode(latents), decoded)


def test_image_flow_equals_the_dual_guided_pipeline_with_mix_ratio_zero(images, diffusion):
    """The published way: the dual network, mix ratio 0, text condition of zeros before the image
    tokens.
    """
    pipeline = load_versatile_pipeline("mini", dual=True)
    for module in pipeline.image_unet.modules():
        if isinstance(module, DualTransformer2DModel):
            module.mix_ratio, module.condition_lengths, module.transformer_index_for_condition = (
                0.0,
                [7, 17],
                [1, 0],
            )
    tokens = pretrained.Clipper("mini").embed_image(as_float(images[:2]))
    latents, t = (
        torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor(500),
    )
    with torch.no_grad():
        mixed = pipeline.image_unet(
            latents, t, encoder_hidden_states=torch.cat([torch.zeros(2, 7, 128), tokens], 1)
        ).sample
        generator = diffusion.unet(latents, t, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(mixed, generator, rtol=1e-3, atol=1e-4)


def test_the_librarys_own_dual_pipeline_runs_on_the_miniature(images):
    pipeline = load_versatile_pipeline("mini", dual=True)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        prompt="a red ball on the sea",
        image=Image.fromarray(images[0]),
        text_to_image_strength=0.5,
        num_inference_steps=2,
        output_type="np",
    ).images
    assert out.shape == (1, 32, 32, 3) and np.isfinite(out).all()


def quiet(pipeline, scheduler=None):
    """Without a progress bar; with the sampler that our own loop uses."""
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    return pipeline


def generate_images(pipeline, *args, **options):
    """A pipeline's images as (images, 3, height, width) in [0, 1]."""
    images = pipeline(*args, **options, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


PROMPTS = ["a red ball on the sea", "a green car in the snow at night"]


def noise_for(generator, n, seed=0):
    return torch.randn(n, *generator.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_text_flow_equals_the_librarys_text_to_image_pipeline():
    generator = pretrained.VersatileDiffusionText("mini")
    reference = quiet(load_versatile_pipeline("mini"), generator.scheduler)
    noise = noise_for(generator, 2)
    pipeline_images = generate_images(
        reference.text_to_image,
        PROMPTS,
        latents=noise.clone(),
        num_inference_steps=6,
        guidance_scale=4.0,
    )
    expected = generator.generate(
        generator.embed_text(PROMPTS), noise, guidance_scale=4.0, num_inference_steps=6
    )
    torch.testing.assert_close(pipeline_images, expected, rtol=0, atol=2e-3)


def test_image_flow_equals_the_librarys_image_variation_of_versatile_diffusion(images, diffusion):
    reference = quiet(load_versatile_pipeline("mini"), diffusion.scheduler)
    noise = noise_for(diffusion, 2)
    options = {"num_inference_steps": 6, "guidance_scale": 4.0}
    # the library's null image is a mid-grey one's tokens, ours zeros as in MindEye: without
    # guidance they agree
    pipeline_images = generate_images(
        reference.image_variation,
        [Image.fromarray(i) for i in images[:2]],
        latents=noise.clone(),
        **options | {"guidance_scale": 1.0},
    )
    expected = diffusion.generate(
        pretrained.Clipper("mini").embed_image(as_float(images[:2])),
        noise,
        **options | {"guidance_scale": 1.0},
    )
    torch.testing.assert_close(pipeline_images, expected, rtol=0, atol=2e-3)


def test_image_variation_equals_the_librarys_pipeline(images):
    generator = pretrained.ImageVariation("mini")
    reference = quiet(load_image_variation_pipeline("mini"), generator.scheduler)
    noise = noise_for(generator, 2)
    expected = generate_images(
        reference,
        [Image.fromarray(i) for i in images[:2]],
        latents=noise.clone(),
        num_inference_steps=6,
        guidance_scale=4.0,
    )
    embeds = pretrained.Clipper("mini", hidden=False, norm_embs=False).embed_image(
        as_float(images[:2])
    )[:, None]
    torch.testing.assert_close(
        expected,
        generator.generate(embeds, noise, guidance_scale=4.0, num_inference_steps=6),
        rtol=0,
        atol=2e-3,
    )


def test_stable_diffusion_equals_the_librarys_img2img_pipeline(images):
    generator = pretrained.StableDiffusion("mini")
    reference = quiet(pretrained.load_stable_diffusion_pipeline("mini"), generator.scheduler)
    start = generator.encode(as_float(images[:2]))
    options = {"strength": 0.75, "guidance_scale": 4.0, "num_inference_steps": 8}
    expected = generate_images(
        reference,
        PROMPTS,
        image=start.clone(),
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    torch.testing.assert_close(
        expected,
        generator.generate(
            generator.embed_text(PROMPTS), noise_for(generator, 2), start, **options
        ),
        rtol=0,
        atol=2e-3,
    )


@pytest.fixture(scope="module")
def held_out():
    """Forty images of test combinations with their labels and captions, and the judge."""
    what = [miniworld.compose_image(5, i, "test") for i in range(40)]
    seen = as_float(np.stack([miniworld.render_image(w, 5) for w in what]))
    labels = {
        q: np.array([miniworld.make_label_row(w)[q] for w in what])
        for q in ("scene", "kind", "colour")
    }
    return (
        seen,
        labels,
        [miniworld.write_captions(w)[1] for w in what],
        pretrained.CategoryClassifier("mini"),
    )


def true_condition(generator, seen, captions):
    if isinstance(generator, pretrained.TextGenerator):
        return generator.embed_text(captions)
    if isinstance(generator, pretrained.ImageVariation):
        return pretrained.Clipper("mini", hidden=False, norm_embs=False).embed_image(seen)[:, None]
    return pretrained.Clipper("mini").embed_image(seen)


def test_the_judge_is_right_about_images_and_about_their_round_trip(held_out):
    seen, labels, _, judge = held_out
    vae = pretrained.LatentAutoencoder("mini")
    for shown_images in (seen, vae.decode(vae.encode(seen))):
        answers = judge.classify(shown_images)
        assert all((answers[q] == truth).mean() >= 0.95 for q, truth in labels.items())
    assert judge.chance_accuracy == {"scene": 1 / 8, "kind": 1 / 20, "colour": 1 / 8}
    assert (judge.classify(torch.full((4, 3, 32, 32), 0.5))["kind"] == "car").mean() in (
        0,
        1,
    )  # alike images, alike answers


@pytest.mark.slow(reason="generates many images")
@pytest.mark.parametrize("strength", [1.0, 0.75])
@pytest.mark.parametrize(
    "cls",
    [
        pretrained.VersatileDiffusion,
        pretrained.VersatileDiffusionText,
        pretrained.ImageVariation,
        pretrained.StableDiffusion,
    ],
    ids=lambda c: c.__name__,
)
def test_every_generator_shows_what_its_true_condition_says(cls, strength, held_out):
    """From noise alone, and from another image's latents at a strength that leaves three quarters
    of the steps to the condition.
    """
    seen, labels, captions, judge = held_out
    generator = cls("mini")
    start = generator.encode(
        torch.nn.functional.interpolate(
            torch.nn.functional.avg_pool2d(seen, 8), (32, 32), mode="bilinear"
        )
    )
    generated = generator.generate(
        true_condition(generator, seen, captions),
        noise_for(generator, len(seen)),
        start,
        strength,
        num_inference_steps=12,
    )
    answers = judge.classify(generated)
    share = {q: (answers[q] == truth).mean() for q, truth in labels.items()}
    assert share["scene"] >= 0.9 and share["kind"] >= 0.6 and share["colour"] >= 0.6, (
        share
    )  # chance .125, .05, .125


def test_the_judge_is_for_the_mini_world():
    with pytest.raises(PerceptError, match="mini world alone"):
        pretrained.CategoryClassifier("hub")


@pytest.mark.slow(reason="generates many images")
def test_true_tokens_give_images_nearer_to_their_own_than_to_others(images, diffusion):
    tokens = pretrained.Clipper("mini").embed_image(as_float(images))
    noise = torch.randn(24, *diffusion.latent_shape, generator=torch.Generator().manual_seed(1))
    generated = diffusion.generate(tokens, noise, num_inference_steps=10)
    seen = as_float(images)
    distance = ((generated[:, None] - seen[None]) ** 2).mean((2, 3, 4))  # (made, seen)
    assert (distance.argmin(1) == torch.arange(24)).float().mean() > 0.5  # chance 1/24


def test_strength_zero_is_the_decoded_latent(images, diffusion):
    latents = diffusion.encode(as_float(images[:2]))
    tokens = torch.zeros(2, 17, 128)
    torch.testing.assert_close(
        diffusion.generate(tokens, torch.zeros_like(latents), latents, strength=0.0),
        diffusion.decode(latents),
    )


def test_low_strength_stays_near_the_initial_latent(images, diffusion):
    latents = diffusion.encode(as_float(images[:4]))
    tokens = pretrained.Clipper("mini").embed_image(as_float(images[:4]))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    error = [
        (
            (diffusion.generate(tokens, noise, latents, strength=s) - as_float(images[:4])) ** 2
        ).mean()
        for s in (0.3, 1.0)
    ]
    assert error[0] < error[1]


def test_timesteps_are_the_published_ones(diffusion):
    diffusion.scheduler.set_timesteps(20)
    assert diffusion.scheduler.timesteps.tolist() == [
        999,
        *range(949, 548, -50),
        *range(500, 49, -50),
    ]


def test_schedule_and_img2img_start_are_the_published_ones(golden, diffusion):
    """Versatile Diffusion's schedule: noise levels, the 17 of 20 steps that strength .85 leaves,
    and the noised start.
    """
    stored = np.load(golden / "mindeye" / "unipc.npz")
    scheduler = diffusion.scheduler
    np.testing.assert_allclose(scheduler.alphas_cumprod, stored["alphas_cumprod"], rtol=1e-5)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == stored["timesteps20"].tolist()
    left = scheduler.timesteps[20 - min(int(20 * 0.85), 20) :]
    assert left.tolist() == stored["img2img085_timesteps"].tolist()
    noised = scheduler.add_noise(
        torch.from_numpy(stored["x0"]), torch.from_numpy(stored["noise"]), left[:1]
    )
    np.testing.assert_allclose(noised, stored["add_noise_t3"], rtol=1e-4, atol=1e-5)


def test_fingerprint_tells_drift(tmp_path, monkeypatch):
    clipper = pretrained.Clipper("mini")
    assert (
        clipper.fingerprint()["model"] == "mini:clip"
        and len(clipper.compute_golden_features()) == 8
    )
    shutil.copytree(pretrained.MINI_MODELS / "clip", tmp_path / "clip")
    recorded = json.loads((tmp_path / "clip" / "golden_features.json").read_text())
    spoiled = {key: [v + 1 for v in values] for key, values in recorded.items()}
    (tmp_path / "clip" / "golden_features.json").write_text(json.dumps(spoiled))
    with pytest.raises(PerceptError, match="no longer gives the features"):
        pretrained.Clipper(str(tmp_path)).fingerprint()


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(PerceptError, match="is not at"):
        pretrained.Clipper(str(tmp_path / "nowhere"))
    with pytest.raises(PerceptError, match="choose one of"):
        pretrained.locate_model("resnet", "mini")
    (tmp_path / "clip").mkdir()
    with pytest.raises(PerceptError, match="Could not load"):
        pretrained.Clipper(str(tmp_path))


# ---------------------------------------------------------------------------- the variants of CLIP
@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    """A folder with RN50.pt: the real architecture at a small width, as a plain state dict."""
    pytest.importorskip("clip")
    from clip.model import CLIP

    torch.manual_seed(0)
    original = CLIP(1024, 224, (3, 4, 6, 3), 8, None, 77, 49408, 64, 1, 1)
    folder = tmp_path_factory.mktemp("openai")
    torch.save(original.eval().state_dict(), folder / "RN50.pt")
    return folder, original


def test_a_resnet_clip_is_openais_own(resnet_folder):
    folder, original = resnet_folder
    clipper = pretrained.Clipper(str(folder), hidden=False, norm_embs=False, variant="RN50")
    images = pretrained.make_fixed_image(256)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    small = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=False)
    with torch.no_grad():
        expected = original.float().encode_image((small - mean) / std)
    assert clipper.embed_image(images).shape == (1, 1024) and (
        clipper.size,
        clipper.dim,
        clipper.n_tokens,
    ) == (224, 1024, 1)
    assert torch.allclose(
        clipper.embed_image(images), expected, atol=1e-2 * expected.abs().max()
    )  # the package rounds weights to half precision on loading
    unit = pretrained.Clipper(str(folder), hidden=False, variant="RN50").embed_text(
        ["a red cat", ""]
    )
    assert torch.allclose(unit.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert clipper.fingerprint()["variant"] == "RN50"


def test_the_largest_resnet_reads_448_pixels():
    from clip.model import CLIP

    with torch.device("meta"):
        visual = CLIP(1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12).visual
    assert visual.input_resolution == 448 and visual.output_dim == 1024


def test_vit_b_32_lies_under_its_own_name(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=32,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip-ViT-B-32")
    clipper = pretrained.Clipper(str(tmp_path), variant="ViT-B/32")
    assert clipper.embed_image(pretrained.make_fixed_image(224)).shape == (
        1,
        50,
        12,
    ) and clipper.target_shape == (50, 12)
    with pytest.raises(PerceptError, match="'clip' is not at"):
        pretrained.Clipper(str(tmp_path))


def test_embeddings_can_be_limited_before_they_are_normalised():
    free, limited = (
        pretrained.Clipper("mini", hidden=False, norm_embs=False, clamp_embs=clamp)
        for clamp in (False, True)
    )
    x = pretrained.make_fixed_image(32)
    assert (
        torch.equal(limited.embed_image(x), free.embed_image(x).clamp(-1.5, 1.5))
        and free.embed_image(x).abs().max() > 1.5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ViT-B/16"}, "no CLIP variant 'ViT-B/16'"),
        ({"variant": "RN50"}, "without hidden tokens"),
        ({"variant": "RN50", "hidden": False}, "one miniature of CLIP"),
        ({"variant": "RN50x64", "hidden": False, "weights": "nowhere"}, "put OpenAI's file there"),
    ],
)
def test_variants_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(PerceptError, match=message):
        pretrained.Clipper(**{"weights": "mini"} | options)


# ------------------------------------------------------------------------- the low level's teacher
TINY_TEACHER = {"dims": [8, 12, 16, 20], "depths": [1, 2, 1, 1], "maps": [10, 14, 6]}


def test_the_released_teacher_has_these_keys_and_shapes(golden):
    described = json.loads((golden / "mindeye" / "full_size_state_shapes.json").read_text())[
        "convnext_xl_vicregl"
    ]
    with torch.device("meta"):
        state = pretrained.ConvNeXtMaps().state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == dict(described["state"])
    assert sum(value.numel() for value in state.values()) == described["params"] == 349_687_808


@pytest.fixture
def released_teacher(tmp_path):
    """A folder with the authors' kind of file, of a tiny network: prefixed keys under "model", and
    heads that nobody needs.
    """
    torch.manual_seed(0)
    network, folder = pretrained.ConvNeXtMaps(**TINY_TEACHER).eval(), tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_TEACHER | {"image_size": 64}))
    state = {f"module.{key}": value for key, value in network.state_dict().items()} | {
        "module.projector.0.weight": torch.zeros(3)
    }
    torch.save({"epoch": 400, "model": state, "optimizer": {}}, folder / pretrained.TEACHER_FILE)
    return tmp_path, network, state


def test_the_teacher_reads_its_authors_file(released_teacher):
    folder, network, _ = released_teacher
    teacher, x = pretrained.Teacher(str(folder)), pretrained.make_fixed_image(64)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
    )
    with torch.no_grad():
        torch.testing.assert_close(teacher.embed_locations(x), network((x - mean) / std))
    assert teacher.target_shape == (4, 6) and teacher.encode_pixels(
        np.zeros((2, 32, 32, 3), np.uint8)
    ).shape == (2, 4, 6)


def test_a_teacher_without_all_its_weights_is_refused(released_teacher):
    folder, _, state = released_teacher
    del state["module.maps_projector.6.weight"]
    torch.save({"model": state}, folder / "teacher" / pretrained.TEACHER_FILE)
    with pytest.raises(PerceptError, match="maps_projector.6.weight"):
        pretrained.Teacher(str(folder))
    (folder / "teacher" / pretrained.TEACHER_FILE).unlink()
    with pytest.raises(PerceptError, match="set use_cont to False"):
        pretrained.Teacher(str(folder))


def test_a_convnext_block_is_what_its_paper_says():
    block = teacher._ConvNeXtBlock(6).double()
    x = torch.randn(1, 6, 9, 9, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=6)
    mean, var = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
    y = ((y - mean) / (var + 1e-6).sqrt()).permute(0, 2, 3, 1)
    y = y * block.norm.weight + block.norm.bias
    y = y @ block.pwconv1.weight.T + block.pwconv1.bias
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))  # GELU
    y = y @ block.pwconv2.weight.T + block.pwconv2.bias
    torch.testing.assert_close(block(x), x + y.permute(0, 3, 1, 2))


def test_the_mini_teacher_looks_at_each_place():
    """Four by four places, row by row: a patch changed in one corner changes the embeddings of that
    corner most.
    """
    teacher = pretrained.Teacher("mini")
    x = pretrained.make_fixed_image(32)
    plain = teacher.embed_locations(x)
    assert plain.shape == (1, 16, 512) == (1, *teacher.target_shape)
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    corners = {0: (0, 0), 3: (0, 24), 12: (24, 0), 15: (24, 24)}
    for location, (row, column) in corners.items():
        changed = x.clone()
        changed[:, :, row : row + 8, column : column + 8] = red
        change = teacher.embed_locations(changed) - plain
        assert int(change.square().sum(-1).argmax()) == location


# ------------------------------------------------------------- what does not change over the steps
def test_keys_and_values_of_the_condition_are_computed_once_and_change_nothing(monkeypatch):
    diffusion = pretrained.VersatileDiffusion("mini")
    condition = (
        pretrained.Clipper("mini").embed_image(pretrained.make_fixed_image(32)).expand(2, -1, -1)
    )
    noise = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    layers = [
        module for name, module in diffusion.unet.named_modules() if name.endswith("attn2.to_k")
    ]
    calls, compute = [], torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear,
        "forward",
        lambda self, x: (calls.append(1) if self in layers else None, compute(self, x))[1],
    )
    cached = diffusion.generate(condition, noise, num_inference_steps=5)
    assert layers and len(calls) == len(layers)
    monkeypatch.setattr(generators, "cache_condition", lambda unet: contextlib.nullcontext())
    assert torch.equal(cached, diffusion.generate(condition, noise, num_inference_steps=5)) and len(
        calls
    ) == 6 * len(layers)
    monkeypatch.undo()
    with pretrained.cache_condition(diffusion.unet):
        first, second = (
            diffusion.unet(noise, 10, encoder_hidden_states=c).sample
            for c in (condition, 2 * condition)
        )
    assert not torch.allclose(first, second), "another condition is computed anew"
    assert "forward" not in layers[0].__dict__


def test_without_guidance_the_null_half_is_not_run():
    diffusion, seen = pretrained.VersatileDiffusion("mini"), []
    condition = pretrained.Clipper("mini").embed_image(pretrained.make_fixed_image(32))
    noise = torch.randn(1, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    diffusion.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    alone = diffusion.generate(condition, noise, guidance_scale=1.0, num_inference_steps=3)
    nearly = diffusion.generate(condition, noise, guidance_scale=1.0 + 1e-6, num_inference_steps=3)
    assert seen == [1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(alone, nearly, atol=1e-3, rtol=0)


def test_guidance_is_the_published_one_unless_said_otherwise():
    assert (pretrained.VersatileDiffusion.guidance, pretrained.ImageVariation.guidance) == (
        3.5,
        7.5,
    )
    diffusion = pretrained.ImageVariation("mini")
    condition = pretrained.Clipper("mini", hidden=False, norm_embs=False).embed_image(
        pretrained.make_fixed_image(32)
    )[:, None]
    noise = torch.randn(1, *diffusion.latent_shape, generator=torch.Generator().manual_seed(0))
    generated = [
        diffusion.generate(condition, noise, num_inference_steps=3, **more)
        for more in ({}, {"guidance_scale": 7.5}, {"guidance_scale": 3.5})
    ]
    assert torch.equal(generated[0], generated[1]) and not torch.allclose(
        generated[0], generated[2]
    )


def test_the_published_start_takes_its_detour():
    """Decode, normalise as for CLIP, encode, draw: against the autoencoder's own calls."""
    diffusion = pretrained.VersatileDiffusion("mini")
    latents = diffusion.encode(pretrained.make_fixed_image(32))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = diffusion.model.decode(latents / diffusion.scale).sample / 2 + 0.5
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )
        posterior = diffusion.model.encode((image - mean) / std).latent_dist
    torch.testing.assert_close(
        diffusion.encode_published_start(latents, noise),
        (posterior.mean + posterior.std * noise) * diffusion.scale,
    )
    assert (diffusion.encode_published_start(latents, noise) - latents).abs().mean() > 0.1
