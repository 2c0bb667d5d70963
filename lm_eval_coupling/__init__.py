"""Transformer block coupling, measured while lm-evaluation-harness evaluates a model.

Public names are loaded when they are first used: importing the package imports no torch.
"""

# Not imported from `typing`, for which every start of the interpreter would pay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PUBLIC = {
    "ResidualModel": "residual",
    "BlockJacobians": "jacobians.engine",
    "block_jacobians": "jacobians.engine",
    "SingularTriplets": "numerics.spectra",
    "top_singular": "numerics.spectra",
    "chance_level": "measures.formulas.headline",
    "coupling_matrix": "measures.formulas.miscoupling",
    "miscoupling": "measures.formulas.miscoupling",
    "miscoupling_to": "measures.formulas.miscoupling",
    "CouplingError": "errors",
    "PromptCoupling": "measuring.record",
    "measure_coupling": "measuring.prompt",
    "run_coupling_hf": "paper",
    "load_records": "saved.records",
    "load_runs": "saved.scores_table",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> "Any":
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # Imported here, because every interpreter start pays for the lines above.

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
