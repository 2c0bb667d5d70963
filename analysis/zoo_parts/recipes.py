"""Recipes of the zoo's members, the most telling first, so that a training cut short is a zoo."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

TASKS = ("blimp", "kept_out")  # that checkpoints are evaluated on
HEAD = 32  # components of an attention head


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Recipe of one member.

    ``family`` is the change to the standard recipe; cross-checks leave whole families out.
    ``text`` is the share of the text that is read for the first time: 0.1 means ten passes over a
    tenth. ``length`` is the share of the standard number of steps. ``shuffled`` is the share of
    windows whose words are in random order, ``noise`` the share of tokens drawn at random.
    """

    name: str
    family: str
    layers: int = 6
    width: int = 128
    text: float = 1.0
    length: float = 1.0
    rate: float = 2e-3
    decay: float = 0.1
    shuffled: float = 0.0
    noise: float = 0.0
    seed: int = 0
    along: bool = False  # save at logarithmic steps, not only at the last

    def steps(self, most: int) -> int:
        """Return the number of steps if the standard recipe makes ``most``."""
        return max(1, round(self.length * most))

    def saved(self, most: int) -> list[int]:
        """Return the steps that are saved, the last one included."""
        last = self.steps(most)
        early = [0, *(last // 2**k for k in range(5, 0, -1))] if self.along else []
        return sorted({*early, last})


def zoo() -> list[Recipe]:
    """Return every member, in the order of training."""
    return list(_members())


def _members() -> Iterator[Recipe]:
    yield from (
        Recipe(f"standard-{seed}", "standard", seed=seed, along=seed == 0) for seed in range(3)
    )
    yield Recipe("shuffled-1", "spoiled", shuffled=1.0, along=True)
    yield Recipe("width-256", "width", width=256, along=True)
    yield Recipe("width-64", "width", width=64, along=True)
    yield Recipe("layers-12", "depth", layers=12, along=True)
    yield Recipe("layers-3", "depth", layers=3)
    yield Recipe("text-0.03", "text", text=0.03, along=True)
    yield Recipe("noise-0.5", "spoiled", noise=0.5)
    yield Recipe("length-0.1", "length", length=0.1)
    yield Recipe("decay-1", "decay", decay=1.0)
    yield Recipe("text-0.1", "text", text=0.1)
    yield Recipe("length-0.3", "length", length=0.3)
    yield Recipe("layers-9", "depth", layers=9)
    yield Recipe("width-192", "width", width=192)
    yield Recipe("shuffled-0.5", "spoiled", shuffled=0.5)
    yield Recipe("noise-0.2", "spoiled", noise=0.2)
    yield Recipe("decay-0", "decay", decay=0.0)
    yield Recipe("rate-0.0002", "rate", rate=2e-4)
    yield Recipe("rate-0.01", "rate", rate=1e-2)
    yield Recipe("shape-3x256", "shape", layers=3, width=256)
    yield Recipe("shape-12x64", "shape", layers=12, width=64)
    yield Recipe("text-0.3", "text", text=0.3)
    yield Recipe("layers-4", "depth", layers=4)
    yield Recipe("width-96", "width", width=96)
    yield Recipe("decay-0.3", "decay", decay=0.3)
    yield Recipe("length-0.03", "length", length=0.03)
    yield Recipe("rate-0.0006", "rate", rate=6e-4)
    yield Recipe("shape-9x96", "shape", layers=9, width=96)
    yield Recipe("standard-3", "standard", seed=3)
    yield Recipe("length-2", "length", length=2.0)
    # More members that stopped early or read little text, so that no single one decides.
    for seed in (1, 2):
        yield Recipe(f"text-0.03-{seed}", "text", text=0.03, seed=seed)
        yield Recipe(f"length-0.1-{seed}", "length", length=0.1, seed=seed)
        yield Recipe(f"shuffled-1-{seed}", "spoiled", shuffled=1.0, seed=seed)
    yield from (Recipe(f"text-{share}", "text", text=share) for share in (0.05, 0.2))
    yield from (Recipe(f"length-{share}", "length", length=share) for share in (0.06, 0.2, 0.6))
