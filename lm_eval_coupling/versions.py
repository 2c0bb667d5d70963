"""Versions of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """Of a package by the name it is installed under; None where it is run from a folder, or is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
