"""Coupling of evaluations that are already there, from the samples that lm-eval logged."""
