"""Loads `in_each_worker` in the processes that run tests.

With ``-n``, pytest's own process runs none: it need not load torch and transformers. Those that do
are forked from one that has loaded them.
"""

import os

import forked
import pytest


def pytest_addoption(pluginmanager):
    arguments = pluginmanager.getplugin("pytestconfig").known_args_namespace
    if "PYTEST_XDIST_WORKER" in os.environ or not getattr(arguments, "numprocesses", None):
        pluginmanager.import_plugin("in_each_worker")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    for spec in specs:
        spec.python = forked.forked_python()  # one for all workers
