"""The one decoder of image files: every kind of pixels, hostile sizes, and what is no image."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from src.files.foreign import natural_key, walk_files
from src.files.images import decode_image
from src.utils import PerceptError

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # (48, 64)
COLOURS = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_array(pixels, kind="PNG", **options):
    return encode(Image.fromarray(pixels), kind, **options)


def declare_png(width, height):
    """A PNG of a few bytes whose head announces a size."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("8 bits", encode_array(RAMP)),
        ("16 bits", encode_array(RAMP.astype(np.uint16) * 257)),
        ("16 bits, TIFF", encode_array(RAMP.astype(np.uint16) * 257, "TIFF")),
        ("16 bits, big-endian", encode_array((RAMP.astype(np.uint16) * 257).astype(">u2"), "TIFF")),
        ("16 bits, PGM", encode_array(RAMP.astype(np.uint16) * 257, "PPM")),
        ("32 bits of 8", encode_array(RAMP.astype(np.int32), "TIFF")),
        ("32 bits of 16", encode_array(RAMP.astype(np.int32) * 257, "TIFF")),
        ("shares", encode_array(RAMP.astype(np.float32) / 255, "TIFF")),
        ("float levels", encode_array(RAMP.astype(np.float32), "TIFF")),
        ("grey and alpha", encode(Image.fromarray(RAMP).convert("LA"))),
        ("as colours", encode_array(np.repeat(RAMP[..., None], 3, axis=-1))),
    ],
)
def test_grey_levels_are_kept(name, content):
    pixels = decode_image(content, name)
    assert pixels.dtype == np.uint8 and pixels.shape == (48, 64, 3)
    assert (pixels == RAMP[..., None]).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("16 bits of 8", encode_array(RAMP.astype(np.uint16))),
        ("negative", encode_array(RAMP.astype(np.int32) - 9, "TIFF")),
        ("huge integers", encode_array(RAMP.astype(np.int32) << 20, "TIFF")),
        ("NaN", encode_array(np.full((8, 8), np.nan, np.float32), "TIFF")),
        ("neither share nor level", encode_array(RAMP.astype(np.float32) / 170, "TIFF")),
        ("floats beyond", encode_array(RAMP.astype(np.float32) * 9, "TIFF")),
        ("transparent", encode_array(np.zeros((8, 8, 4), np.uint8))),
    ],
)
def test_values_that_tell_no_colours_are_refused(name, content):
    with pytest.raises(PerceptError, match=f"^{name} .*: save it|^{name} .*so save it"):
        decode_image(content, name)


def test_colours_of_other_modes():
    image = Image.fromarray(COLOURS)
    expected = COLOURS.astype(int)
    for mode, kind, tolerance in (
        ("CMYK", "TIFF", 1),
        ("CMYK", "JPEG", 60),
        ("YCbCr", "TIFF", 3),
        ("RGBA", "PNG", 0),
        ("RGBA", "WEBP", 60),
    ):
        pixels = decode_image(encode(image.convert(mode), kind), mode)
        assert np.abs(pixels - expected).max() <= tolerance, (mode, kind)
    palette = image.quantize(64)
    assert (decode_image(encode(palette), "P") == np.asarray(palette.convert("RGB"))).all()
    binary = decode_image(encode(Image.fromarray(RAMP > 99)), "1")
    assert (binary == np.where(RAMP > 99, 255, 0)[..., None]).all()


def test_transparency_is_laid_on_white():
    drawing = np.zeros((8, 8, 4), np.uint8)  # black lines on nothing, which would be all black
    drawing[2:4, :, 3] = 255
    drawing[6:, :, 3] = 128
    pixels = decode_image(encode_array(drawing), "a drawing")
    assert (pixels[2:4] == 0).all() and (pixels[:2] == 255).all() and (pixels[4:6] == 255).all()
    assert (pixels[6:] == 127).all()
    keyed = COLOURS.copy()
    keyed[:5] = (1, 2, 3)
    pixels = decode_image(encode_array(keyed, transparency=(1, 2, 3)), "one colour of it")
    assert (pixels[:5] == 255).all() and (pixels[5:] == COLOURS[5:]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    pixels = decode_image(encode_array(COLOURS, kind, **options), kind)
    assert np.abs(pixels.astype(int) - np.rot90(COLOURS, -1)).max() <= (60 if kind == "JPEG" else 0)
    broken = decode_image(encode_array(COLOURS, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "b")
    assert broken.shape == COLOURS.shape


def test_sizes_are_compared_before_anything_is_unpacked():
    for width, height in ((14_000, 14_000), (50_000, 50_000), (9_000, 9_000)):
        with pytest.raises(PerceptError, match="^a bomb is an image of .* pixels"):
            decode_image(declare_png(width, height), "a bomb")
    strip = declare_png(1, 100_000)
    with pytest.raises(PerceptError, match="^a strip .* so narrow .*crop it"):
        decode_image(strip, "a strip", shorter_side=224)
    with pytest.raises(PerceptError, match="the limit is 0.001 million"):
        decode_image(encode_array(COLOURS), "small", max_pixels=1000)
    drafted = decode_image(encode(Image.new("RGB", (800, 640)), "JPEG"), "x", shorter_side=50)
    assert drafted.shape == (80, 100, 3)  # a JPEG is decoded no larger than needed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x00\x05\x16\x07" + bytes(90), "AppleDouble"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"some text", "is none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of"),  # no Ghostscript
        (encode_array(COLOURS)[:-40], "truncated"),
        (encode_array(COLOURS, "JPEG")[:600], "cannot be decoded"),
    ],
)
def test_what_is_no_image(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, io.BytesIO(content), tmp_path / "a.png"):
        with pytest.raises(PerceptError) as error:
            decode_image(source, "The seventh")
        text = str(error.value)
        assert text.startswith("The seventh ") and "\n" not in text and len(text) < 700
        assert words in text or isinstance(source, type(tmp_path))
    for name, cause in (("gone.png", "is missing"), (".", "is a folder")):
        with pytest.raises(PerceptError, match=f"The seventh {cause}"):
            decode_image(tmp_path / name, "The seventh")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(PerceptError, match="The seventh is a link to .*nowhere.png"):
        decode_image(tmp_path / "link.png", "The seventh")


# ------------------------------------------------------------------------------------- folders
def test_linked_folders_are_searched_once(tmp_path):
    disk, root = tmp_path / "disk", tmp_path / "root"
    for name in ("root/b/2.png", "root/b/10.png", "disk/deep/5.png", "root/b/._2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (root / "a").symlink_to(disk)
    (root / "again").symlink_to(disk / "deep")
    (disk / "back").symlink_to(root)  # in a circle
    (root / "c.png").symlink_to(root / "b" / "2.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [str(path.relative_to(root)) for path in walk_files(root)]
    assert names == ["a/deep/5.png", "b/10.png", "b/2.png", "c.png"]
    (root / "lost").symlink_to(tmp_path / "no disk")
    with pytest.warns(UserWarning, match="1 links below .* lead nowhere .*lost"):
        walk_files(root)
    with pytest.raises(PerceptError, match="is missing"):
        walk_files(tmp_path / "nothing")


def test_names_are_sorted_by_their_numbers():
    names = ["recon_10.png", "recon_9b.png", "b.png", "recon_9.png", "7.png", "².png"]
    ordered = sorted(names, key=natural_key)
    assert [name for name in ordered if "recon" in name] == [
        "recon_9.png",
        "recon_9b.png",
        "recon_10.png",
    ]
