"""How much a correlation depends on each model and each family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lm_eval_coupling.statistics.correlations import MANY, Correlation, correlation
from lm_eval_coupling.statistics.estimates import CONFIDENCE, Result, Values
from lm_eval_coupling.statistics.resampling import Families

_DROP = 0.5  # of the strength; more than that, and one member decides
_LEAST_DROP = 0.1  # of r


@dataclasses.dataclass(frozen=True)
class Influence(Result):
    """The correlation without one model or one family; ``decides`` if the finding hangs on it.

    A member decides if the correlation is weaker by 0.1 without it, and either loses half of its
    strength or is no longer beyond chance.
    """

    without: str
    kind: str
    coefficient: float
    p: float
    n: int
    all_models: float
    decides: bool


def influence(
    x: Values,
    y: Values,
    labels: Sequence[str],
    *,
    family: Families | None = None,
    all_models: Correlation | None = None,
    resamples: int = 999,
) -> list[Influence]:
    """Correlate (Pearson) without each model, and without each family of several models.

    Args:
        x: One number per model.
        y: As many numbers.
        labels: Names of the models.
        family: Their families, if they come in families.
        all_models: The correlation of all models, if it is there already.
        resamples: Permutations of each test.

    Returns:
        One result per model and per family; none for fewer than 4 or more than 200 models.

    Raises:
        CouplingError: If the columns differ in length or are not numeric.
    """
    frame = pd.DataFrame({"x": np.asarray(x, float), "y": np.asarray(y, float)})
    frame["label"] = list(labels)
    frame["family"] = list(labels if family is None else family)
    frame = frame.dropna(subset=["x", "y"]).reset_index(drop=True)
    if not 4 <= len(frame) <= MANY:
        return []
    every = all_models or correlation(frame["x"], frame["y"], family=frame["family"])
    results = []
    for kind, name, kept in _left_out(frame):
        rest = frame[kept]
        without = correlation(rest["x"], rest["y"], family=rest["family"], resamples=resamples)
        results.append(
            Influence(
                without=name,
                kind=kind,
                coefficient=without.coefficient,
                p=without.p,
                n=without.n,
                all_models=every.coefficient,
                decides=_decides(every, without),
            )
        )
    return results


def _left_out(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.Series]]:
    for label in dict.fromkeys(frame["label"]):
        yield "model", label, frame["label"] != label
    families = frame["family"].value_counts(sort=False)
    if len(families) > 1:
        for name in families.index[families > 1]:
            yield "family", str(name), frame["family"] != name


def _decides(every: Correlation, without: Correlation) -> bool:
    r, rest = every.coefficient, without.coefficient
    if np.isnan(rest) or np.isnan(r):
        return False
    level = 1 - CONFIDENCE
    drop = abs(r) - rest * np.sign(r)
    # A p that crosses the level while r hardly changes is no matter of one member.
    is_lost = every.p < level <= without.p or drop > _DROP * abs(r)
    return bool(is_lost and drop > _LEAST_DROP)
