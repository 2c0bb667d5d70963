"""Names of the methods and arithmetics that Jacobians can be computed with. No torch."""

METHODS = ("auto", "closed", "token-local", "autodiff")
BYTES = {"float32": 4, "float64": 8}  # of a number
