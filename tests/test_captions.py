"""Captions: BLIP's miniature through the libraries' own classes, its pixels, its words, and tokens
of CLIP mapped to its own.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

from src import miniworld, pretrained
from src.data.images import ImageStore
from src.data.targets import cache_targets
from src.networks.linear import TokenMap
from src.pretrained.captioners import Captioner, strip_word
from src.utils import PerceptError
from tools.mini_models.captions import compute_naming_accuracy

SEED = 31  # no training and no demo draws with it


@pytest.fixture(scope="module")
def captioner():
    return Captioner("mini")


def scenes(count, split, seed=SEED):
    """uint8 images (count, height, width, 3) and their labels (count, 3): scene, kind, colour."""
    what = [miniworld.compose_image(seed, i, split) for i in range(count)]
    rendered = np.stack([miniworld.render_image(composition, seed) for composition in what])
    return rendered, np.array(
        [
            [composition.scene, composition.objects[-1].category, composition.objects[-1].colour]
            for composition in what
        ]
    )


def as_float(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def samples():
    return scenes(64, "test")


# ------------------------------------------------------------------------- the same as the library
def test_captions_are_those_of_the_librarys_own_generate(captioner, samples):
    model = (
        BlipForConditionalGeneration.from_pretrained(pretrained.MINI_MODELS / "blip").float().eval()
    )
    processor = BlipProcessor.from_pretrained(pretrained.MINI_MODELS / "blip")
    inputs = processor(images=list(samples[0]), return_tensors="pt")
    reference = processor.batch_decode(
        model.generate(**inputs, max_length=pretrained.MAX_LENGTH), skip_special_tokens=True
    )
    images = as_float(samples[0])
    assert captioner.caption(images) == reference
    assert captioner.caption_tokens(captioner.embed_image(images), batch_size=10) == reference
    assert captioner.embed_image(images).shape == (64, *captioner.target_shape) == (64, 17, 128)
    beams = processor.batch_decode(
        model.generate(**inputs, max_length=8, num_beams=3), skip_special_tokens=True
    )
    assert captioner.caption(images, max_length=8, num_beams=3) == beams != reference


@pytest.mark.parametrize("side", [32, 20, 75])
def test_pixels_are_those_of_the_librarys_processor(captioner, side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    reference = BlipProcessor.from_pretrained(pretrained.MINI_MODELS / "blip")(
        images=[image], return_tensors="pt"
    )["pixel_values"]
    result = captioner.preprocess(as_float(image[None]))
    assert result.shape == reference.shape == (1, 3, 32, 32)
    torch.testing.assert_close(
        result, reference, rtol=0, atol=1e-5 if side == 32 else 0.023
    )  # theirs is rounded to whole values, twice


def test_the_published_pixels_are_not_normalised(captioner, samples):
    images = as_float(samples[0])
    assert torch.equal(
        captioner.preprocess(images, published_pixels=True),
        torch.from_numpy(samples[0]).permute(0, 3, 1, 2).float(),
    )
    model = (
        BlipForConditionalGeneration.from_pretrained(pretrained.MINI_MODELS / "blip").float().eval()
    )
    ids = model.generate(
        pixel_values=torch.from_numpy(samples[0]).permute(0, 3, 1, 2).float(),
        max_length=pretrained.MAX_LENGTH,
    )
    reference = captioner.processor.batch_decode(ids, skip_special_tokens=True)
    published = captioner.caption(images, published_pixels=True)
    assert published == reference
    right, mistaken = (
        compute_naming_accuracy(captions, samples[1])
        for captions in (captioner.caption(images), published)
    )
    assert right["kind"] - mistaken["kind"] > 0.3, "the defect costs much"


# ----------------------------------------------------------------------------------- what they say
def test_captions_name_what_is_shown(captioner, samples):
    share = compute_naming_accuracy(captioner.caption(as_float(samples[0])), samples[1])
    assert share["scene"] > 0.9 and share["kind"] > 0.75 and share["colour"] > 0.85, (
        share
    )  # chance .125, .05, .125
    labels_of_next = np.roll(samples[1], 1, axis=0)
    of_next = compute_naming_accuracy(captioner.caption(as_float(samples[0])), labels_of_next)
    assert of_next["kind"] < 0.3, "of the next image they say little"


@pytest.mark.slow(reason="writes captions of many images")
def test_blurry_images_are_called_so_and_the_word_can_be_left_out(captioner, samples):
    blurred = F.interpolate(
        F.interpolate(as_float(samples[0]), (8, 8), mode="bilinear", antialias=True),
        (32, 32),
        mode="bicubic",
    ).clamp(0, 1)
    captions = captioner.caption(blurred)
    assert np.mean(["blurry" in caption for caption in captions]) > 0.9
    assert (
        np.mean(["blurry" in caption for caption in captioner.caption(as_float(samples[0]))]) < 0.1
    )
    assert compute_naming_accuracy(captions, samples[1])["scene"] > 0.8
    cleaned = strip_word(captions)
    assert not any("blurry" in caption for caption in cleaned) and compute_naming_accuracy(
        cleaned, samples[1]
    ) == compute_naming_accuracy(captions, samples[1])


def test_only_the_named_words_are_left_out():
    assert strip_word(["there is a blurry picture of a blurry cat", "a red ball"]) == [
        "there is a picture of a cat",
        "a red ball",
    ]
    assert strip_word(["a blurry"]) == ["a blurry"]  # the published substring ends with a space
    assert (
        strip_word(["a blurry photo"], "photo") == ["a blurry "]
        and strip_word([]) == []
        and strip_word(["a ball"], "") == ["a ball"]
    )


# ------------------------------------------------------------------------------- as a frozen model
def test_hidden_states_can_be_cached_as_targets(captioner, samples, tmp_path):
    from src.data.images import write_images

    write_images(tmp_path / "images.h5", samples[0][:6], np.arange(6))
    targets = cache_targets(
        tmp_path,
        "blip_tokens",
        captioner.fingerprint(),
        np.arange(6),
        captioner.encode_pixels,
        captioner.target_shape,
    )
    rows = torch.from_numpy(targets.rows([4, 1]).astype(np.float32))
    torch.testing.assert_close(
        rows, captioner.embed_image(as_float(samples[0][[4, 1]])), rtol=2e-3, atol=2e-3
    )
    assert len(ImageStore(tmp_path / "images.h5").image_ids) == 6
    assert captioner.caption_tokens(rows) == captioner.caption(as_float(samples[0][[4, 1]]))


def test_the_recorded_features_are_checked(captioner, tmp_path):
    print_of = captioner.fingerprint()
    assert print_of["model"] == "mini:blip" and json.loads(
        (pretrained.MINI_MODELS / "blip" / "golden_features.json").read_text()
    )
    assert print_of == Captioner("mini").fingerprint()


@pytest.mark.slow(reason="writes captions in half precision, which some processors emulate")
def test_half_precision_writes_nearly_the_same(captioner, samples):
    half = Captioner("mini", dtype=torch.bfloat16)
    assert half.embed_image(as_float(samples[0][:2])).dtype == torch.bfloat16
    same = np.array(half.caption(as_float(samples[0]))) == np.array(
        captioner.caption(as_float(samples[0]))
    )
    assert same.mean() > 0.7


def test_tokens_of_another_shape_are_refused(captioner):
    with pytest.raises(
        PerceptError, match=r"writes from tokens \(images, 17, 128\), not \(2, 17, 64\)"
    ):
        captioner.caption_tokens(torch.zeros(2, 17, 64))
    with pytest.raises(PerceptError, match="'blip' is not at"):
        Captioner("nowhere")


def test_the_size_of_the_hubs_network():
    """What the library's classes hold by its own settings of BLIP large: 577 tokens of 1024."""
    vision = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 384,
        "patch_size": 16,
    }
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config={}))
    captioner_shell = Captioner.__new__(Captioner)
    captioner_shell.config, captioner_shell.size = model.config, 384
    assert captioner_shell.target_shape == (577, 1024)


# ------------------------------------------------------------------------------ from CLIP's tokens
@pytest.fixture(scope="module")
def tokens(captioner):
    """Tokens of CLIP and of BLIP for training images, in the order of their ids."""
    images, _ = scenes(1200, "train")
    return pretrained.Clipper("mini").encode_pixels(images), captioner.encode_pixels(images)


def test_captions_through_clips_tokens_name_what_is_shown(captioner, tokens, samples):
    mapped = TokenMap.fit(*tokens)
    assert (mapped.r2 > 0.5).all() and (mapped.alphas > 0).all(), mapped.r2
    with torch.no_grad():
        predicted = mapped(pretrained.Clipper("mini").embed_image(as_float(samples[0])))
    share = compute_naming_accuracy(captioner.caption_tokens(predicted), samples[1])
    assert share["scene"] > 0.85 and share["kind"] > 0.5 and share["colour"] > 0.6, share
    shuffled = TokenMap.fit(tokens[0], np.roll(tokens[1], 1, axis=0))
    with torch.no_grad():
        unrelated = shuffled(pretrained.Clipper("mini").embed_image(as_float(samples[0])))
    assert (
        compute_naming_accuracy(captioner.caption_tokens(unrelated), samples[1])["kind"] < 0.2
        and (shuffled.r2 < 0.3).all()
    )
