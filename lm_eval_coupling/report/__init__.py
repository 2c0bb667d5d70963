"""Saved runs to look at: one HTML page (:mod:`.page`), or the terminal (:mod:`.terminal`)."""
