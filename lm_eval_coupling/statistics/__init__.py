"""Statistics of whether coupling predicts a score: no file is read and no model is run.

Dropped observations are counted, undefined numbers are NaN with a ``reason``, and ``in_words``
claims no more than the numbers do. Every result is a frozen dataclass with ``to_dict()``;
``as_frame(results)`` is their table. Regressions need statsmodels, the extra ``analysis``.
"""

from typing import Any

_PUBLIC = {
    "Estimate": "estimates",
    "as_frame": "estimates",
    "Correlation": "correlations",
    "correlation": "correlations",
    "correlation_within": "correlations",
    "partial_correlation": "correlations",
    "CorrelationDifference": "strengths",
    "compare_correlations": "strengths",
    "Influence": "influence_tables",
    "influence": "influence_tables",
    "Fit": "curves",
    "exponential_fit": "curves",
    "line_fit": "curves",
    "proportion_error": "curves",
    "FamilyEffect": "family_effects",
    "family_effect": "family_effects",
    "Model": "nested_regression",
    "NestedModels": "nested_regression",
    "collinearity": "nested_regression",
    "left_out": "nested_regression",
    "nested_models": "nested_regression",
    "Auroc": "right_answers",
    "LogisticEffect": "right_answers",
    "accuracy_by_bin": "right_answers",
    "auroc": "right_answers",
    "auroc_within": "right_answers",
    "logistic_effect": "right_answers",
    "auroc_together": "pooled_models",
    "logistic_together": "pooled_models",
    "Corrected": "reliability",
    "Reliability": "reliability",
    "corrected_for_attenuation": "reliability",
    "document_reliability": "reliability",
    "reliability_from_errors": "reliability",
    "adjust_p_values": "multiple_tests",
    "simultaneous_p_values": "multiple_tests",
    "in_words": "sentences",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on demand, because correlations must work without statsmodels.
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
