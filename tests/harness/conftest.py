"""A tiny model and tiny tasks, and lm-eval run on them in this process."""

import pytest
import tiny
from evaluations import KINDS

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        tiny.save_task(folder / "tasks", kind)
    tiny.save_model(folder / "float32")
    tiny.save_model(folder / "bfloat16", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def manager(home):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(home / "tasks"), include_defaults=False)


@pytest.fixture
def wandb_logger(tmp_path, monkeypatch):
    """lm-eval's logger, offline as with ``--wandb_args mode=offline``."""
    pytest.importorskip("wandb")
    from lm_eval.loggers import WandbLogger
    from wandb.sdk.wandb_run import Run

    # It looks for what a launched job was given, for which it loads many packages.
    monkeypatch.setattr(Run, "_detect_and_apply_job_inputs", lambda self: None, raising=False)
    logger = WandbLogger({"mode": "offline", "dir": str(tmp_path), "project": "tiny"})
    yield logger
    logger.run.finish()


@pytest.fixture
def evaluate(home, manager, tmp_path):
    """Run lm-eval in this process."""

    def run(
        model="coupling-hf",
        kinds=("choice", "generate"),
        pretrained=None,
        arguments=None,
        manager=manager,
        **options,
    ):
        from lm_eval_coupling.harness import plugin

        plugin.install()
        given = {"pretrained": str(pretrained or home / "float32"), "device": "cpu"} | (
            arguments or {}
        )
        if model == "coupling-hf":
            defaults = {
                "coupling_ranks": "2+4",
                "coupling_limit": 2,
                "coupling_store": str(tmp_path / "store.sqlite"),
            }
            given = defaults | given
        names = [f"tiny_{kind}" for kind in kinds]
        return lm_eval.simple_evaluate(
            model=model,
            model_args=given,
            tasks=names,
            task_manager=manager,
            bootstrap_iters=2,
            **options,
        )

    return run
