"""A measured image as it is kept in a run's table and shown in the report: made anew, small, and nothing but pixels."""

from __future__ import annotations

import io

from PIL import Image

SIDE = 160  # pixels at most
_EXACT = 64  # up to this side without loss


def picture(image: Image.Image) -> bytes:
    """PNG of a small image, JPEG of a reduced larger one. The file that the data came in is not handed on."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if max(small.size) <= _EXACT:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
