"""Measures, one file each: their columns, the function that fills them, and their readings."""
