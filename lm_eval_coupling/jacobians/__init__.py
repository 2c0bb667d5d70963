"""Exact block Jacobians: see :mod:`.engine` for what is differentiated and how it is certified."""
