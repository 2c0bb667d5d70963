"""Loads `in_each_worker` in the processes that run tests.

With ``-n``, pytest's own process runs none: it need not load torch and transformers.
"""

import os

import forked


def pytest_addoption(pluginmanager):
    arguments = pluginmanager.getplugin("pytestconfig").known_args_namespace
    if "PYTEST_XDIST_WORKER" in os.environ or not getattr(arguments, "numprocesses", None):
        pluginmanager.import_plugin("in_each_worker")
    else:
        forked.forked_python()  # one for all workers; it loads nothing until a test asks for it
