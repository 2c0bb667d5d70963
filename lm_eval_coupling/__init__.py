"""Transformer block coupling, measured while lm-evaluation-harness evaluates a model.

Public names are loaded when they are first used: importing the package imports no torch.
"""

_PUBLIC = {
    "ResidualModel": "residual",
    "BlockJacobians": "jacobians",
    "block_jacobians": "jacobians",
    "SingularTriplets": "spectra",
    "top_singular": "spectra",
    "chance_level": "coupling",
    "coupling_matrix": "coupling",
    "miscoupling": "coupling",
    "miscoupling_to": "coupling",
    "CouplingError": "errors",
    "PromptCoupling": "measure",
    "measure_coupling": "measure",
    "run_coupling_hf": "paper_api",
    "load_records": "records",
    "load_runs": "runs",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # here, because every interpreter start pays for what stands above

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
