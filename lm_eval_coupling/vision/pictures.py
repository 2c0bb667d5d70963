"""Small pictures of measured images for a run's table and the report."""

from __future__ import annotations

import io

from PIL import Image

SIDE = 160  # pixels at most
_EXACT = 64  # up to this side without loss


def picture(image: Image.Image) -> bytes:
    """Encode a small picture: PNG for a small image, reduced JPEG for a larger one.

    Returns:
        Bytes of pixels alone; metadata of the original file is not handed on.
    """
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if max(small.size) <= _EXACT:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
