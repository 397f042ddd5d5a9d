"""Picture files: what is in them, and that nothing else is."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from appliance.engine.image import Pixels, encode_jpeg, encode_png, encode_webp

PIXELS: Pixels = np.random.default_rng(5).integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH: Pixels = np.broadcast_to(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], (24, 40, 3)).copy()


def png_chunks(png: bytes) -> list[bytes]:
    """Return the types of a PNG's chunks in order, walking it without Pillow."""
    kinds, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        kinds.append(kind)
        at += 12 + length
    assert at == len(png), "something follows the last chunk"
    return kinds


def jpeg_segments(jpeg: bytes) -> list[int]:
    """Return the markers of a JPEG's segments up to the scan."""
    markers, at = [], 2
    while jpeg[at + 1] != 0xDA:
        assert jpeg[at] == 0xFF
        markers.append(jpeg[at + 1])
        at += 2 + int(struct.unpack_from(">H", jpeg, at + 2)[0])
    return markers


def test_a_png_holds_header_pixels_and_end_and_nothing_else() -> None:
    kinds = png_chunks(encode_png(PIXELS))
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    assert set(kinds[1:-1]) == {b"IDAT"}


def test_a_png_gives_back_every_pixel() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(PIXELS)))), PIXELS)


def test_a_jpeg_holds_the_jfif_header_and_tables_and_nothing_else() -> None:
    markers = jpeg_segments(encode_jpeg(PIXELS))
    assert markers[0] == 0xE0                                   # JFIF
    assert set(markers[1:]) <= {0xDB, 0xC0, 0xC4}               # quantization, frame, Huffman tables
    assert not any(0xE1 <= marker <= 0xEF or marker == 0xFE for marker in markers)      # Exif, ICC, XMP, comments


def test_a_webp_holds_one_chunk() -> None:
    webp = encode_webp(PIXELS)
    assert webp[:4] == b"RIFF"
    assert webp[8:16] == b"WEBPVP8 "
    assert struct.unpack_from("<I", webp, 16)[0] + 20 in (len(webp), len(webp) - 1)     # padded to even


@pytest.mark.parametrize("encode", [encode_jpeg, encode_webp])
def test_lossy_files_look_like_the_picture(encode: Callable[[Pixels], bytes]) -> None:
    seen = np.asarray(Image.open(io.BytesIO(encode(SMOOTH)))).astype(int)
    assert seen.shape == SMOOTH.shape
    assert np.abs(seen - SMOOTH).mean() < 3


@pytest.mark.parametrize("encode", [encode_png, encode_jpeg, encode_webp])
def test_one_picture_gives_one_sequence_of_bytes(encode: Callable[[Pixels], bytes]) -> None:
    assert encode(PIXELS) == encode(PIXELS.copy())


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_array_that_is_no_picture_is_a_mistake_of_the_caller(wrong: Pixels) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(wrong)
