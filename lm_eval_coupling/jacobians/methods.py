"""Names of what Jacobians can be computed with: levels, fastest first, and arithmetics. No torch."""

METHODS = ("auto", "closed", "token-local", "autodiff")
BYTES = {"float32": 4, "float64": 8}  # of a number
