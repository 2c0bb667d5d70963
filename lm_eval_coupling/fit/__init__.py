"""Regressions of scores on coupling: from saved runs to a finding in words."""
