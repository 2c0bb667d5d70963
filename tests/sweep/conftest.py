"""Plans over models that are mere folders, for lm-eval's stand-in; and over real tiny ones."""

import json
import signal

import pytest
import yaml

from lm_eval_coupling.sweep import plan as plans


@pytest.fixture(autouse=True)
def obeyed_interrupts():
    """Let children obey SIGINT, which shells switch off for background jobs of scripts."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder_of(tmp_path):
    """Make a folder that looks like a model, which behaves as told."""

    def make(name, **behaviour):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(name)
        (folder / "behaviour.json").write_text(json.dumps(behaviour))
        return str(folder)

    return make


@pytest.fixture
def make_plan(tmp_path):
    """Write a plan and read it."""

    def make(models, **parts):
        made = {
            "models": models,
            "tasks": ["one", "two"],
            "coupling": {"limit": 4},
            "lm_eval": {"batch_size": 4},
        }
        made |= {"output": str(tmp_path / "out")} | parts
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(made))
        return plans.read(file)

    return make
