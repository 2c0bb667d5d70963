"""Settings and fixtures of every process that runs tests."""

import functools
import gc
import importlib
import logging
import sys

import pytest
import tiny
import torch
from shape_checks import check_shapes_in
from torch.utils import collect_env

check_shapes_in("lm_eval_coupling", "coupling_analysis")
gc.set_threshold(100_000, 20, 100)  # collections took a tenth of the time
torch.set_num_threads(1)  # tiny models: threads cost more than they bring
# Scripts outside of the tests get models and answers of twice this size.
tiny.CONFIG["num_hidden_layers"] = 2
tiny.TASKS["generate"] = tiny.TASKS["generate"].replace("max_gen_toks: 8", "max_gen_toks: 4")
# lm-eval describes the machine at every evaluation, for which torch starts eleven programs.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)
importlib.import_module("lm_eval_coupling.runs.announcement")._SECONDS = 0.005  # for an estimate

# Files that take longest, the longest first, so that no worker is left alone with one at the end.
LONG = [
    "sweep_real",  # which waits for SLURM most of the time, while two other workers work
    "real_model",
    "jacobians",
    "benchmarks",
    "scored",
    "processes",
    "more_families",
    "callback",
    "decoding",
    "results",
    "versions",
    "fuzz",
    "sweep_of_samples",
    "packaging",
    "notebook",
    "failures",
    "scores",
    "weights",
    "paper",
    "measure_samples",
    "tasks",
    "demo",
]
ORDER = {f"test_{name}.py": place for place, name in enumerate(LONG)}
# Not in `make quick`: whole evaluations and sweeps, all model families, damaged files.
SLOW_FILES = ("jacobians", "more_families", "scored", "decoding", "fuzz", "local")
SLOW = {f"test_{name}.py" for name in SLOW_FILES}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: ORDER.get(item.path.name, len(ORDER)))


def pytest_collection_finish():
    gc.freeze()  # no collection need look at the million objects of imported modules


def _name_hooks(bridge, module, prefix=""):
    from transformer_lens.hook_points import HookPoint

    named = module.named_modules(prefix=prefix)
    bridge._hook_registry |= {name: part for name, part in named if isinstance(part, HookPoint)}


@pytest.fixture(autouse=True)
def _less_work():
    """Change modules that only some tests load."""
    if (module := sys.modules.get("transformer_lens.model_bridge.bridge")) is not None:
        # It reads every attribute twice for names that nobody here asks for: a fifth of wrapping.
        module.TransformerBridge._scan_existing_hooks = _name_hooks
    if (module := sys.modules.get("lm_eval_coupling.figures.canvas")) is not None:
        module.DPI = 40


@pytest.fixture(autouse=True)
def _logger_of_lm_eval():
    """Undo what lm-eval's command does to its logger in this process.

    It adds a handler for the standard error stream of the first caller, and stops propagation:
    before pytest 9 `caplog` then sees no record of ours.
    """
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


DEVICES = [
    name
    for name, there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    )
    if there
]


@pytest.fixture(scope="session", params=["cpu", *DEVICES])
def device(request) -> torch.device:
    """Each kind of device that this machine has: tests of models go over them all."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=["cpu", *(name for name in DEVICES if name != "mps")])
def float64_device(request) -> torch.device:
    """Of these the ones that have float64, as Apple's have not."""
    return torch.device(request.param)
