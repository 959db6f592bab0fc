"""The one decoder of image files, for stimuli, pools of images, fetched and sent images, and
anyone's reconstructions.

What becomes of pixels that are not 8-bit RGB (`decode_image` has one rule for each):

- 1 bit, palette, grey, CMYK and YCbCr are converted to RGB; colour profiles are not applied.
- 16-bit grey keeps its upper 8 bits. An image of 16 bits all of whose values are below 256 would be
  black, so it is refused; 12-bit TIFF is scaled by its own range.
- Integers of 32 bits are grey levels of 8 bits if none is above 255, of 16 bits if none is above
  65535. Other values are refused.
- Floats from 0 to 1 are shares of white, floats from 0 to 255 grey levels. Others are refused.
- Transparency is laid on white, as a browser shows it. An image that is transparent everywhere, or
  of which nothing would be seen on white, is refused.
- EXIF orientation is applied. Of several frames the first is taken.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from src.files.errors import PerceptError
from src.files.foreign import explain_head, find_cause, shorten

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# decoders of other formats, which few test with hostile files, stay shut
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

MAX_PIXELS = 80e6  # of an image, 240 MB as RGB; Pillow warns from 89 million on

BITS_PER_SAMPLE = 258  # tag of TIFF

ORIENTATION = 0x0112  # tag of EXIF


def decode_image(
    content_or_path: bytes | str | Path | BinaryIO,
    origin: str,
    max_pixels: float = MAX_PIXELS,
    shorter_side: int = 0,
    formats: tuple[str, ...] = FORMATS,
) -> np.ndarray:
    """Decode an image file into RGB, see the module for each kind of pixels.

    Args:
        content_or_path: bytes of the file, the file, or its open content.
        origin: name of the image in errors, e.g. its path.
        max_pixels: largest width * height, compared before anything is unpacked.
        shorter_side: what the shorter side will be resized to, 0 if it will not be. The image after
            that is compared with max_pixels too, and a JPEG is decoded no larger than needed.
        formats: names of Pillow's decoders that may be used.

    Returns:
        uint8 (height, width, 3), read-only.

    Raises:
        PerceptError: naming the origin, if it is missing, empty, damaged, too large, or holds
            values that tell no colours.
    """
    source = io.BytesIO(content_or_path) if isinstance(content_or_path, bytes) else content_or_path
    try:
        with Image.open(source, formats=formats) as image:
            _check_size(image.size, origin, max_pixels, shorter_side)
            if shorter_side:
                image.draft("RGB", (shorter_side, shorter_side))
            return _to_rgb(_turn_upright(image), origin)
    except PerceptError:
        raise
    except Image.DecompressionBombError as error:
        raise PerceptError(
            f"{origin} is an image of far too many pixels ({shorten(error)}): make it smaller."
        ) from error
    except Exception as error:  # a decoder may raise anything over a file made to break it
        raise _explain_failure(content_or_path, origin, error) from error


def _check_size(size: tuple[int, int], origin: str, max_pixels: float, shorter_side: int) -> None:
    width, height = size
    longer, shorter = max(size), max(1, min(size))
    limit = f"{max_pixels / 1e6:g} million pixels"
    if width * height > max_pixels:
        raise PerceptError(
            f"{origin} is an image of {width} x {height} pixels, the limit is {limit}: make it"
            " smaller."
        )
    if shorter_side**2 * longer / shorter > max_pixels:
        raise PerceptError(
            f"{origin} is an image of {width} x {height} pixels, so narrow that it would have more"
            f" than {limit} with a shorter side of {shorter_side}: crop it."
        )


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the orientation of EXIF; what cannot be read as EXIF tells none."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OverflowError):
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, origin: str) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        return _repeat_grey(_scale_16_bits(np.asarray(image), _count_bits(image), origin))
    if image.mode == "I":
        return _repeat_grey(_scale_integers(np.asarray(image), origin))
    if image.mode == "F":
        return _repeat_grey(_scale_floats(np.asarray(image), origin))
    if image.has_transparency_data:
        return _lay_on_white(image, origin)
    return np.asarray(image.convert("RGB"))


def _count_bits(image: Image.Image) -> int:
    """Bits of a sample as a TIFF tells them, which may keep 12 bits in 16."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))
    return int(bits[0]) if 8 < int(bits[0]) <= 16 else 16


def _scale_16_bits(levels: np.ndarray, bits: int, origin: str) -> np.ndarray:
    largest = int(levels.max())
    if 0 < largest < 256:
        raise PerceptError(
            f"{origin} has 16 bits a pixel and no value above {largest}, so that it would be black:"
            " save it with 8 bits."
        )
    return (levels >> (bits - 8)).clip(0, 255).astype(np.uint8)


def _scale_integers(levels: np.ndarray, origin: str) -> np.ndarray:
    lowest, largest = int(levels.min()), int(levels.max())
    if lowest < 0 or largest > 65535:
        raise PerceptError(
            f"{origin} has integers from {lowest} to {largest} as pixels, of which grey levels"
            " cannot be told: save it with 8 or 16 bits."
        )
    return (levels if largest < 256 else levels >> 8).astype(np.uint8)


def _scale_floats(levels: np.ndarray, origin: str) -> np.ndarray:
    lowest, largest = float(levels.min()), float(levels.max())
    is_share = lowest >= 0 and largest <= 1
    is_level = lowest >= 0 and 2 <= largest <= 255  # what lies between may be either
    if not (is_share or is_level):
        raise PerceptError(
            f"{origin} has floats from {lowest:g} to {largest:g} as pixels: they must be from 0 to"
            " 1 or from 0 to 255, so save it with 8 bits."
        )
    scaled: np.ndarray = np.rint(levels * 255 if is_share else levels)
    return scaled.astype(np.uint8)


def _repeat_grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _lay_on_white(image: Image.Image, origin: str) -> np.ndarray:
    layers = image.convert("RGBA")
    opacity = np.asarray(layers.getchannel("A"))
    if opacity.min() == 255:
        return np.asarray(layers.convert("RGB"))
    white = Image.new("RGBA", layers.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, layers).convert("RGB"))
    if (pixels == 255).all():
        raise PerceptError(
            f"{origin} is transparent, or white on transparency, so that nothing of it would be"
            " seen: save it with a background."
        )
    return pixels


def _explain_failure(
    content_or_path: bytes | str | Path | BinaryIO, origin: str, error: Exception
) -> PerceptError:
    """The error to raise over an image that could not be decoded."""
    if isinstance(content_or_path, str | Path):
        cause = find_cause(content_or_path, error)
    elif isinstance(content_or_path, bytes):
        cause = explain_head(content_or_path[:512])
    else:
        content_or_path.seek(0)
        cause = explain_head(content_or_path.read(512))
    if cause is None:
        is_unknown = isinstance(error, UnidentifiedImageError)
        text = f"it is none of {', '.join(FORMATS)}" if is_unknown else shorten(error)
        cause = f"cannot be decoded as an image ({text}): fetch it again"
    return PerceptError(f"{origin} {cause}.")
