"""The frozen models and the generators on a GPU, pretended or real: what they compute there in
single precision is what the CPU computes, and their half precision, the default, gives pictures.
"""

import numpy as np
import pytest
import torch
from pretend_gpu import pretend_gpu

from src import pretrained
from src.decoding import (
    compute_sample_spread,
    generate_images,
    load_refiner,
    refine_images,
    repaint_images,
    select_best,
)
from src.decoding.combined import compute_fid, embed_variations
from src.decoding.refine import Refinement
from src.pretrained import generators
from src.search import Embeddings, LocalIndex

pytestmark = pytest.mark.slow(reason="loads every frozen model, on the CPU and on the GPU")

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
IDS = np.array([3, 7])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64)


def embed_with(name, **options):
    """A function of device and images that loads a frozen model and embeds the images."""

    def embed(device, images):
        return getattr(pretrained, name)("mini", device=device, **options).embed_image(images)

    return embed


def classify(device, images):
    answers = pretrained.CategoryClassifier("mini", device).classify(images)
    return torch.tensor([len(str(word)) for words in answers.values() for word in words])


EMBEDDERS = {
    "CLIP's tokens": embed_with("Clipper"),
    "CLIP's embedding": embed_with("Clipper", hidden=False, norm_embs=False),
    "CLIP's text": lambda device, images: pretrained.Clipper("mini", device=device).embed_text(
        ["a ring", "a star"]
    ),
    "patch tokens": embed_with("PatchClip"),
    "BLIP": embed_with("Captioner", dtype=torch.float32),
    "GIT": embed_with("BrainCaptioner", dtype=torch.float32),
    "teacher": lambda device, images: pretrained.Teacher("mini", device).embed_locations(images),
    "AlexNet": lambda device, images: torch.as_tensor(
        pretrained.FeatureNetwork("AlexNet(2)", "mini", device)(images)
    ),
    "GNet": lambda device, images: torch.as_tensor(
        pretrained.load_gnet("mini", 1, device).predict(images)
    ),
    "classifier": classify,
    "autoencoder": lambda device, images: pretrained.LatentAutoencoder(
        "mini", device=device
    ).encode(images),
    "autoencoder's pictures": lambda device, images: pretrained.LatentAutoencoder(
        "mini", device=device
    ).decode(torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)),
}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_frozen_models_compute_the_same_on_a_gpu(name, images, gpu):
    expected, ours = (EMBEDDERS[name](device, images) for device in ("cpu", "cuda"))
    torch.testing.assert_close(ours.float().cpu(), expected.float(), **CLOSE)


def test_fingerprints_and_cached_targets_are_made_on_a_gpu(gpu):
    for name in ("Clipper", "LatentAutoencoder", "PatchClip", "Teacher"):
        model = getattr(pretrained, name)("mini", device="cuda")
        assert model.fingerprint()["golden"]
        targets = model.encode_pixels(np.zeros((2, 64, 64, 3), np.uint8))
        assert targets.shape == (2, *model.target_shape) and targets.dtype == np.float32


def test_captions_are_written_on_a_gpu(images, gpu):
    for name in ("Captioner", "BrainCaptioner"):
        captioner = getattr(pretrained, name)("mini", device="cuda", dtype=torch.float32)
        expected = getattr(pretrained, name)("mini", dtype=torch.float32)
        assert captioner.caption(images) == expected.caption(images)
        tokens = captioner.embed_image(images).cpu()
        assert captioner.caption_tokens(tokens) == expected.caption_tokens(tokens)


# -------------------------------------------------------------------------------------- generators
def load_with_condition(name, device, dtype):
    """A generator and what conditions two images (images, tokens, dim)."""
    generator = getattr(pretrained, name)("mini", device=device, dtype=dtype)
    if hasattr(generator, "embed_text"):
        return generator, generator.embed_text(["a ring", "a star"])
    width = generator.unet.config.cross_attention_dim
    condition = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    return generator, condition[:, :1] if name == "ImageVariation" else condition


GENERATORS = (
    *("VersatileDiffusion", "ImageVariation", "StableDiffusion", "VersatileDiffusionText"),
    "UnclipDecoder",
)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_paint_the_same_on_a_gpu(name, gpu):
    pictures = []
    for device in ("cpu", "cuda"):
        generator, condition = load_with_condition(name, device, torch.float32)
        latents = torch.zeros(2, *generator.latent_shape)
        options = {"strength": 0.5, "num_inference_steps": 4}
        pictures.append(
            generate_images(generator, condition[:, None].cpu(), IDS, latents, **options)
        )
    torch.testing.assert_close(*pictures, **CLOSE)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_paint_in_half_precision_by_default(name, gpu):
    generator, condition = load_with_condition(name, "cuda", None)
    assert generator.dtype == torch.float16 and next(generator.unet.parameters()).is_cuda
    pictures = generate_images(
        generator, condition[:, None].float().cpu(), IDS, num_inference_steps=2
    )
    assert pictures.isfinite().all() and pictures.dtype == torch.float32


def test_the_published_start_is_made_on_a_gpu(gpu):
    generator = pretrained.VersatileDiffusion("mini", "cuda")
    latents = torch.zeros(2, *generator.latent_shape)
    start = generator.encode_published_start(latents, torch.randn_like(latents))
    assert start.shape == latents.shape and start.isfinite().all()


def test_pictures_are_repainted_and_refined_on_a_gpu(images, gpu):
    pipeline = pretrained.load_stable_diffusion_pipeline("mini", "cuda", torch.float32)
    expected = pretrained.load_stable_diffusion_pipeline("mini", "cpu", torch.float32)
    words, options = ["a ring", "a star"], {"num_inference_steps": 4}
    torch.testing.assert_close(
        repaint_images(pipeline, words, images, IDS, **options),
        repaint_images(expected, words, images, IDS, **options),
        **CLOSE,
    )
    refined = refine_images(
        load_refiner("mini", "cuda"), words, images, IDS, Refinement(steps=4, run=2)
    )
    assert len(refined) == 2 and refined.isfinite().all()


def test_samples_are_chosen_and_compared_on_a_gpu(images, gpu):
    samples = torch.rand(2, 3, 3, 64, 64)
    results = []
    for device in ("cpu", "cuda"):
        clipper = pretrained.Clipper("mini", device=device)
        brain = clipper.embed_image(images).cpu()
        best, *others = select_best(clipper, brain, samples)
        results.append((best.cpu(), compute_sample_spread(clipper, samples)))
    torch.testing.assert_close(*results, **CLOSE)


def test_image_variations_and_fid_are_made_on_a_gpu(images, gpu):
    clipper = pretrained.Clipper("mini", hidden=False, norm_embs=False, device="cuda")
    diffusion = pretrained.ImageVariation("mini", "cuda", torch.float32)
    condition = clipper.embed_image(images)
    embedded = embed_variations(diffusion, clipper, condition, torch.tensor(IDS), 0, steps=2)
    assert embedded.is_cuda and embedded.shape == condition.shape
    network = pretrained.FeatureNetwork("SwAV", "mini", "cuda")
    assert compute_fid(network, images, images) == pytest.approx(0, abs=1e-2)


def test_an_autoencoder_ignores_the_autocast_around_it(gpu):
    autoencoder = pretrained.LatentAutoencoder("mini", device="cuda")
    latents = torch.randn(1, *autoencoder.latent_shape)
    expected = autoencoder.decode(latents)
    with torch.autocast("cuda", torch.bfloat16):
        decoded = autoencoder.decode(latents)
    assert decoded.dtype == torch.float32 and torch.equal(decoded.cpu(), expected.cpu())


def test_a_step_of_a_generator_does_not_wait_for_the_device():
    with pretend_gpu() as gpu:
        generator, condition = load_with_condition("VersatileDiffusion", "cuda", torch.float32)
        noise = torch.randn(2, *generator.latent_shape)
        counts = []
        for steps in (4, 9):
            gpu.reset()
            generator.generate(condition, noise, num_inference_steps=steps)
            counts.append(gpu.waits.copy())
        assert not counts[1] - counts[0], counts[1] - counts[0]


def test_keys_of_a_condition_are_computed_once_on_a_gpu(gpu):
    generator, condition = load_with_condition("VersatileDiffusion", "cuda", torch.float32)
    layer = next(
        module for name, module in generator.unet.named_modules() if name.endswith("attn2.to_k")
    )
    condition = condition.to("cuda")
    with generators.cache_condition(generator.unet):
        assert layer(condition) is layer(condition)
    assert layer(condition) is not layer(condition)


# ------------------------------------------------------------------------------------------ search
@pytest.fixture
def folder(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float16)
    (tmp_path / "img_emb").mkdir()
    for part, block in enumerate(np.array_split(rows, 3)):
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", block)
    return tmp_path


def test_embeddings_are_searched_on_a_gpu(folder, gpu):
    embeddings, queries = Embeddings(folder), np.random.default_rng(1).normal(size=(4, 16))
    expected = embeddings.search_exact(queries, 5, [2, 7])
    result = embeddings.search_exact(queries, 5, [2, 7], "cuda")
    assert np.array_equal(result.row, expected.row)
    assert np.allclose(result.similarity, expected.similarity, atol=1e-3)


def test_an_index_is_used_on_a_gpu(folder, monkeypatch, gpu):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(16)
    index.add(np.ascontiguousarray(Embeddings(folder).get_rows(np.arange(300)), np.float32))
    faiss.write_index(index, str(folder / "image.index"))
    opened = LocalIndex(folder, "cuda")
    monkeypatch.setattr(Embeddings, "search_exact", None)
    opened.search(np.ones((1, 16), np.float32), 3)
