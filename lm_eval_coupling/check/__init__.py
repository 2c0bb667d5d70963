"""Is a model measured exactly here, on this machine's devices and in these dtypes? What `lm-eval-coupling check` asks."""
