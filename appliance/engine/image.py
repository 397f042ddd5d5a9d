"""Arrays to the bytes of picture files that say nothing but the picture.

No text, time, program, colour profile or thumbnail: a PNG is IHDR, IDAT and IEND, a JPEG has the JFIF header and the tables
that decoding needs, a WebP one chunk. Pixels are uint8 (height, width, 3), sRGB.

>>> encode_png(np.zeros((8, 8, 3), np.uint8))[:4]
b'\\x89PNG'
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]      # (height, width, 3)


def encode_png(pixels: Pixels) -> bytes:
    """Return a PNG, lossless."""
    return _encoded(pixels, "PNG", compress_level=6)


def encode_jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """Return a baseline JPEG; `quality` from 1 to 95."""
    return _encoded(pixels, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)


def encode_webp(pixels: Pixels, quality: int = 90) -> bytes:
    """Return a lossy WebP; `quality` from 1 to 100."""
    return _encoded(pixels, "WEBP", quality=quality, method=4)


def _encoded(pixels: Pixels, kind: str, **options: Any) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are uint8 (height, width, 3), and these are {pixels.dtype} {pixels.shape}")
    file = io.BytesIO()
    # A picture made from an array has no `info`, from which Pillow would take metadata.
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, kind, **options)
    return file.getvalue()
