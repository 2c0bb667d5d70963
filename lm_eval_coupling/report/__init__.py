"""Saved runs as pages to look at: one HTML file (:mod:`.page`) or the terminal (:mod:`.terminal`)."""
