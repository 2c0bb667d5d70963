"""Matching of a data set's labels to a model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lm_eval_coupling.errors import CouplingError

_NUMBERED = re.compile(r"(label[ _]?)?\d+")


def model_labels(
    classes: Sequence[str] | None, count: int, id2label: Mapping[int, str]
) -> list[int]:
    """Find the model's label for each label of the data set.

    Names are compared without case and underscores, and one by one in ImageNet's "tench, Tinca
    tinca". If one of the two sides has only numbers, the numbers are compared.

    Args:
        classes: names of the data set's labels; None if it has only numbers.
        count: one more than the largest number of a label that occurs.
        id2label: names of the model's labels, as in its configuration.

    Returns:
        As many numbers of the model's labels as the data set has labels.

    Raises:
        CouplingError: if the model does not know a label, or knows two by that name.
    """
    available = [str(id2label[i]) for i in range(len(id2label))]
    if classes is None or all(map(_is_numbered, available)) or all(map(_is_numbered, classes)):
        needed = count if classes is None else max(len(classes), count)
        if needed > len(available):
            raise CouplingError(
                f"got data with {needed} labels and a model with {len(available)}, "
                "expected one that knows them all"
            )
        return list(range(count if classes is None else len(classes)))
    if len(classes) == len(available) and all(
        _names(a) & _names(b) for a, b in zip(classes, available, strict=True)
    ):
        return list(range(len(available)))
    matches = {
        name: [i for i, other in enumerate(available) if _names(name) & _names(other)]
        for name in classes
    }
    if unknown := [name for name in classes if not matches[name]]:
        raise CouplingError(
            f"got {_several(unknown)} that the model does not know, "
            f"expected labels of its own: {_several(available)}"
        )
    if twice := [name for name in classes if len(matches[name]) > 1]:
        raise CouplingError(
            f"got the label {twice[0]!r}, by which the model knows {len(matches[twice[0]])}, "
            "expected one"
        )
    return [matches[name][0] for name in classes]


def _is_numbered(name: str) -> bool:
    return bool(_NUMBERED.fullmatch(name.casefold()))


def _names(label: str) -> set[str]:
    return {
        " ".join(part.casefold().replace("_", " ").split()) for part in (label, *label.split(","))
    }


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{len(names)} labels ({shown}{', …' if len(names) > 4 else ''})"
