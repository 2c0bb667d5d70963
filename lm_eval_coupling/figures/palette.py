"""Colours of every picture and of the report: told apart without colour vision, in grey and on dark ground."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

SCALE = "viridis"  # dark where layers are coupled, as `show` has it
UNDEFINED = "0.85"  # grey, which the scale does not have
CATEGORIES = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c8c8c",
)  # Okabe and Ito, grey for black
SCALE_STOPS = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)  # of viridis, in equal steps


def on_scale(place: float) -> tuple[int, int, int]:
    """Red, green and blue of the scale at a place from 0 to 1."""
    at = min(max(place, 0.0), 1.0) * (len(SCALE_STOPS) - 1)
    low = min(int(at), len(SCALE_STOPS) - 2)
    mixed = [
        round(a + (b - a) * (at - low))
        for a, b in zip(SCALE_STOPS[low], SCALE_STOPS[low + 1], strict=True)
    ]
    return mixed[0], mixed[1], mixed[2]


def colours(names: Iterable[Hashable]) -> dict[Hashable, str]:
    """A colour for every name: one of a few told apart by everybody; of more than these, places on the scale."""
    names = list(dict.fromkeys(names))
    if len(names) <= len(CATEGORIES):
        return dict(zip(names, CATEGORIES, strict=False))
    return {
        name: "#{:02x}{:02x}{:02x}".format(*on_scale(0.92 * i / (len(names) - 1)))
        for i, name in enumerate(names)
    }
