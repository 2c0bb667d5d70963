"""Which of the model's labels a label of the data set is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lm_eval_coupling.errors import CouplingError

_NUMBERED = re.compile(r"(label[ _]?)?\d+")


def model_labels(
    classes: Sequence[str] | None, count: int, id2label: Mapping[int, str]
) -> list[int]:
    """The model's label of each label of the data set.

    Names are compared without case, underscores and, as in ImageNet's "tench, Tinca tinca", one by one. Where one of the two
    sides has only numbers, the numbers are compared.

    Args:
        classes: names of the data set's labels; ``None`` where it only has numbers.
        count: one more than the largest number of a label that occurs.
        id2label: names of the model's labels, as in its configuration.

    Returns:
        As many numbers of the model's labels as the data set has labels.

    Raises:
        CouplingError: if the model does not know a label, or knows two by that name.
    """
    known = [str(id2label[i]) for i in range(len(id2label))]
    if classes is None or all(map(_is_numbered, known)) or all(map(_is_numbered, classes)):
        if (wanted := count if classes is None else max(len(classes), count)) > len(known):
            raise CouplingError(
                f"got data with {wanted} labels and a model with {len(known)}, expected one that knows them all"
            )
        return list(range(count if classes is None else len(classes)))
    if len(classes) == len(known) and all(
        _names(a) & _names(b) for a, b in zip(classes, known, strict=True)
    ):
        return list(range(len(known)))
    found = {
        name: [i for i, other in enumerate(known) if _names(name) & _names(other)]
        for name in classes
    }
    if unknown := [name for name in classes if not found[name]]:
        raise CouplingError(
            f"got {_several(unknown)} that the model does not know, expected labels of its own: {_several(known)}"
        )
    if twice := [name for name in classes if len(found[name]) > 1]:
        raise CouplingError(
            f"got the label {twice[0]!r}, by which the model knows {len(found[twice[0]])}, expected one"
        )
    return [found[name][0] for name in classes]


def _is_numbered(name: str) -> bool:
    return bool(_NUMBERED.fullmatch(name.casefold()))


def _names(label: str) -> set[str]:
    return {
        " ".join(part.casefold().replace("_", " ").split()) for part in (label, *label.split(","))
    }


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{len(names)} labels ({shown}{', …' if len(names) > 4 else ''})"
