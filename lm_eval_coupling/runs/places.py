"""Places of a run: the measured tokens of every document, in the order of ``coupling_position``."""

from __future__ import annotations

from typing import NamedTuple

from lm_eval_coupling.measures.formulas.choices import (
    PROMPT_PART,
    choices_by_part,
    chosen_in_part,
    chosen_positions,
    positions_at_most,
)
from lm_eval_coupling.runs.rows import DocumentPrompt
from lm_eval_coupling.runs.session import Spot


class Place(NamedTuple):
    """Token that ``coupling_position`` names.

    Attributes:
        number: from 0; the headline value of a run is of place 0.
        part: part of a document's text that holds the token.
        choice: tokens that are measured in this part.
        offset: number of the token among those of ``choice``.
    """

    number: int
    part: str
    choice: str
    offset: int

    def spot(self, prompt: DocumentPrompt) -> Spot | None:
        """Return the measured token of a prompt of this part; None if the prompt has fewer."""
        if prompt.span is None:
            positions = chosen_positions(self.choice, len(prompt.tokens))
        else:
            positions = [prompt.span[i] for i in chosen_in_part(self.choice, len(prompt.span))]
        if self.offset >= len(positions):
            return None
        return Spot.at(prompt.tokens, positions[self.offset])


def all_places(position: int | str) -> list[Place]:
    """Return every place that ``position`` names where texts are long."""
    places: list[Place] = []
    for part, choice in choices_by_part(position).items():
        named = choice if part == PROMPT_PART else f"{part}-" + choice.replace("+", f"+{part}-")
        places += [
            Place(len(places) + offset, part, choice, offset)
            for offset in range(positions_at_most(named))
        ]
    return places
