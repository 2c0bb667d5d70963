"""The model class `coupling-hf` and what else lm-eval learns about this package."""
