"""Packages older than the bounds are refused by name; newer ones are warned of."""

import logging

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
        versions.require_versions("transformers")
    assert "transformers 6.0.1 is newer than any that was tested" in caplog.text


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
