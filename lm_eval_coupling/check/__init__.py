"""Check of exactness and cost on this machine: ``lm-eval-coupling check``."""
