"""Choices that a study is asked for: one model, one document, some layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.names import ends_with


def select_model(records: pd.DataFrame, name: str) -> pd.DataFrame:
    """Select the records of the model with this name, or whose name ends with it, or the reverse.

    Records have the shortest ends of names that tell models apart.

    Returns:
        At least one record.

    Raises:
        CouplingError: if there is none, or the name fits several models.
    """
    models = sorted(records["model"].unique())
    fitting = [model for model in models if model == name]
    fitting = fitting or [model for model in models if ends_with(model, name)]
    # The end of another's name is a model's whole name, which a longer one does not mean.
    fitting = fitting or [
        model
        for model in models
        if ends_with(name, model) and sum(ends_with(other, model) for other in models) == 1
    ]
    if not fitting:
        raise CouplingError(
            f"got records of {', '.join(models)}, none of {name}; give the folder of a run that "
            "measured this model"
        )
    if len(fitting) > 1:
        listed = " or ".join(fitting)
        raise CouplingError(f"got {name}, which may be {listed}; give more of its path")
    return records[records["model"] == fitting[0]]


def select_document(records: pd.DataFrame, doc: int | None) -> pd.DataFrame:
    """Select the records of the document with this ``doc_id``; all of them for None.

    Returns:
        At least one record.

    Raises:
        CouplingError: if there is no such document.
    """
    if doc is None:
        return records
    documents = sorted(records["doc_id"].unique())
    if doc not in documents:
        listed = ", ".join(map(str, documents[:20])) + (", …" if len(documents) > 20 else "")
        raise CouplingError(f"got document {doc}, which has no such record; choose among {listed}")
    return records[records["doc_id"] == doc]


def choose_layers(requested: Sequence[int] | None, layers: Sequence[int], number: int) -> list[int]:
    """Return the layers asked for, or by default ``number`` of ``layers``, spread evenly.

    Returns:
        Layers, numbered as in ``layers``.

    Raises:
        CouplingError: if a layer that is asked for is not among them.
    """
    if unknown := [layer for layer in requested or () if layer not in layers]:
        raise CouplingError(
            f"got layer {unknown[0]}, expected one of {', '.join(map(str, layers))}"
        )
    places = np.linspace(0, len(layers) - 1, number).round().astype(int)
    return list(requested or dict.fromkeys(layers[i] for i in places))
