"""A small picture of a picture, for the contact sheet.

A PNG comes from the engine, which may have been taken over by what it loaded, and is decoded here in a process that holds the
key. So Pillow is told to accept PNG and nothing else, the size is looked at before a pixel is decoded, and whatever it makes of
damaged bytes is no thumbnail.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Final

SIDE: Final = 192           # pixels, the longer one: 76 of the page's on a screen of 2.5 device pixels each
_MOST_PIXELS: Final = 1 << 24
_HEADER: Final = struct.Struct(">8sI4sII")      # signature, then IHDR's length, type, width and height (PNG, third edition, 5.2)


def thumbnail_of(png: bytes) -> bytes | None:
    """Return a JPEG whose longer side is at most `SIDE`, None for what is no PNG or too large."""
    if len(png) < _HEADER.size:
        return None
    signature, _, kind, width, height = _HEADER.unpack_from(png)
    if signature != b"\x89PNG\r\n\x1a\n" or kind != b"IHDR" or not 0 < width * height <= _MOST_PIXELS:
        return None
    # Here, because the pages start faster without it, and most sessions of one picture never ask.
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError):
        return None
    return out.getvalue()
