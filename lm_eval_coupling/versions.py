"""Versions of installed packages, and whether they are those that this package was tested with."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lm_eval_coupling.errors import CouplingError

logger = logging.getLogger("lm_eval.coupling")
_warned: set[str] = set()  # Names of packages.


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed (or is run from a folder)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_versions(*packages: str) -> None:
    """Refuse packages older than this package's own requirements, and warn once of newer ones.

    Does nothing where this package is run from a folder and has no metadata to read.

    Args:
        *packages: distribution names, such as ``lm-eval``.

    Raises:
        CouplingError: naming the first package that is too old, with the command that mends it.
    """
    try:
        requirements = [Requirement(line) for line in requires("lm-eval-coupling") or ()]
    except PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.name not in packages or requirement.marker:
            continue
        installed = installed_version(requirement.name)
        if installed is None or requirement.specifier.contains(installed, prereleases=True):
            continue
        if _is_too_old(requirement.specifier, installed):
            raise CouplingError(
                f"expected {requirement.name}{requirement.specifier}, got {installed}; "
                f'run: pip install "{requirement.name}{requirement.specifier}"'
            )
        if requirement.name not in _warned:
            _warned.add(requirement.name)
            logger.warning(
                "coupling: %s %s is newer than any that was tested (%s)",
                *(requirement.name, installed, requirement.specifier),
            )


def _is_too_old(specifier: SpecifierSet, installed: str) -> bool:
    """Return whether a version is below a lower bound."""
    lower = [bound for bound in specifier if bound.operator in (">=", ">", "==", "~=")]
    return not all(bound.contains(installed, prereleases=True) for bound in lower)
