"""Arithmetic that knows neither models nor prompts: decompositions, precision, memory."""
