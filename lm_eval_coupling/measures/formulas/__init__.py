"""Formulas of the measures: pure functions. ``headline`` needs NumPy alone, the others torch."""
