"""Command line of lm-eval without its own tasks, whose index takes longer than a tiny model."""

import sys

from torch.utils import collect_env

from lm_eval_coupling import cli
from lm_eval_coupling.harness import plugin

# lm-eval describes the machine, for which torch starts eleven programs.
collect_env.get_pretty_env_info = lambda: ""
plugin.install()
from lm_eval.tasks import TaskManager  # noqa: E402 (after the plugin, which wraps what it imports)

built = TaskManager.__init__


def without_defaults(self, verbosity=None, include_path=None, include_defaults=True, **further):
    built(self, verbosity, include_path, False, **further)


TaskManager.__init__ = without_defaults
sys.exit(cli.main(["run", *sys.argv[1:]]))
