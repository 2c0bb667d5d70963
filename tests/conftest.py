"""Shared by all tests."""

import torch

torch.set_num_threads(1)  # tiny models: threads cost more than they bring

# Files that take minutes, the longest first, so that no worker is left alone with one at the end.
LONG = ["scores", "jacobians", "real_model", "residual", "prompt", "benchmarks", "demo", "tasks", "statistics", "fit"]
ORDER = {f"test_{name}.py": place for place, name in enumerate(LONG)}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.get(item.path.name, len(ORDER)))
