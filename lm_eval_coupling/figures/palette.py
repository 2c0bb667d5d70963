"""Colors of pictures, terminal and report, distinct without color vision and in gray."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

SCALE = "viridis"  # bright where layers are coupled
UNDEFINED = "0.85"  # gray, which the scale does not contain
# Okabe and Ito's colors, with gray for black.
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
# Viridis in equal steps, as red, green and blue.
SCALE_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def scale_color(place: float) -> tuple[int, int, int]:
    """Return red, green and blue of the scale at a place from 0 to 1."""
    at = min(max(place, 0.0), 1.0) * (len(SCALE_STOPS) - 1)
    low = min(int(at), len(SCALE_STOPS) - 2)
    stops = zip(SCALE_STOPS[low], SCALE_STOPS[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in stops)
    return red, green, blue


def assign_colors(names: Iterable[Hashable]) -> dict[Hashable, str]:
    """Give each name a color: distinct categories for a few names, else places on the scale."""
    names = list(dict.fromkeys(names))
    if len(names) <= len(CATEGORIES):
        return dict(zip(names, CATEGORIES, strict=False))
    return {
        name: "#{:02x}{:02x}{:02x}".format(*scale_color(0.92 * i / (len(names) - 1)))
        for i, name in enumerate(names)
    }
