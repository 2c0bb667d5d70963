"""Does coupling predict the score? Statistics of numbers that are already in a table: no file is read, no model run.

The libraries (scipy, statsmodels) do the statistics; here is the assembly and its honesty: what was dropped is counted,
what is undefined is NaN with a ``reason``, what a reader must bear in mind is in ``notes``, and ``in_words`` claims no
more than the numbers do. Every result is a frozen dataclass with ``to_dict()``; ``as_frame(results)`` is their table.
Regressions need statsmodels, the extra ``analysis``.
"""

from typing import Any

_PUBLIC = {
    "Estimate": "estimates",
    "as_frame": "estimates",
    "Correlation": "correlations",
    "CorrelationDifference": "correlations",
    "compare_correlations": "correlations",
    "correlation": "correlations",
    "correlation_within": "correlations",
    "partial_correlation": "correlations",
    "Fit": "curves",
    "exponential_fit": "curves",
    "line_fit": "curves",
    "proportion_error": "curves",
    "FamilyEffect": "regression",
    "Model": "regression",
    "NestedModels": "regression",
    "adjust_p_values": "regression",
    "collinearity": "regression",
    "family_effect": "regression",
    "left_out": "regression",
    "nested_models": "regression",
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
    "simultaneous_p_values": "multiple_tests",
    "in_words": "sentences",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # here, because correlations are wanted where statsmodels is not installed

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
