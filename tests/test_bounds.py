"""Packages older than the bounds are refused by name; newer ones are warned of."""

import logging
import subprocess
import sys

import pytest

from lm_eval_coupling import versions
from lm_eval_coupling.errors import CouplingError

REQUIREMENTS = [
    "lm-eval[hf]<0.6,>=0.4.13",
    "transformers<6,>=5.9",
    "plotly>=6; extra == 'analysis'",
]


@pytest.fixture
def installed(monkeypatch):
    """Installed versions, by name; those of a test are put here."""
    known = {"lm-eval": "0.4.13", "transformers": "5.24.0", "plotly": "1.0"}
    monkeypatch.setattr(versions, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.setattr(versions, "version", known.__getitem__)
    return known


def test_tested_versions_pass(installed, caplog):
    versions.require_versions("lm-eval", "transformers", "plotly")
    assert not caplog.records


@pytest.mark.parametrize("old", ["0.4.9", "0.4.13.dev0"])
def test_an_older_version_is_refused_with_the_command_that_mends_it(installed, old):
    installed["lm-eval"] = old
    sentence = rf'expected lm-eval<0.6,>=0.4.13, got {old}; run: pip install "lm-eval<0.6,>=0.4.13"'
    with pytest.raises(CouplingError, match=sentence):
        versions.require_versions("lm-eval", "transformers")


def test_a_newer_version_is_warned_of(installed, caplog):
    installed["transformers"] = "6.0.1"
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        for _ in range(2):
            versions.require_versions("transformers")
    (record,) = caplog.records
    assert "transformers 6.0.1 is newer than any that was tested" in record.getMessage()


def test_a_prerelease_within_the_bounds_passes(installed, caplog):
    installed["lm-eval"] = "0.5.0.dev1"
    versions.require_versions("lm-eval")
    assert not caplog.records


def test_a_folder_without_metadata_is_not_checked(installed, monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", missing)
    installed["lm-eval"] = "0.1"
    versions.require_versions("lm-eval")


IMPORT = """
import importlib, importlib.metadata, sys
name, old, module = sys.argv[1:]
version = importlib.metadata.version
importlib.metadata.version = lambda package: old if package == name else version(package)
from lm_eval_coupling import CouplingError
try:
    importlib.import_module(module)
except CouplingError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "package", "old"),
    [
        ("lm_eval_coupling.harness.lm", "lm-eval", "0.4.9"),
        ("lm_eval_coupling.harness.lm", "transformers", "4.57.1"),
        ("lm_eval_coupling.harness.lm", "transformer-lens", "3.0.0"),
        ("lm_eval_coupling.residual.model", "transformers", "4.57.1"),
        ("lm_eval_coupling.residual.model", "transformer-lens", "3.0.0"),
    ],
)
def test_the_class_is_not_imported_with_an_older_version(module, package, old):
    """The interpreter sees a stand-in for the version; what is installed stays as it is."""
    if versions.installed_version("lm-eval-coupling") is None:
        pytest.skip("a folder without metadata is not checked")
    command = [sys.executable, "-c", IMPORT, package, old, module]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sentence = done.stdout.strip()
    bound = sentence.removeprefix(f"expected {package}").partition(", got ")[0]
    assert sentence == (
        f'expected {package}{bound}, got {old}; run: pip install "{package}{bound}"'
    )
    assert ">=" in bound
