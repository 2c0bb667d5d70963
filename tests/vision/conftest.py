"""A folder of tiny images by colour, and a tiny classifier of colours, as files that load without
network.
"""

import datasets
import pytest
from coloured_images import save_classifier, save_images

from lm_eval_coupling.vision.evaluate import run_vision


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` makes of a folder stays out of the user's cache."""
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "colour-vit")


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store.sqlite"
    return f"ranks=4+8,limit=5,untrained=seed1,store={store}"


@pytest.fixture(scope="session")
def saved(images, classifier, settings, tmp_path_factory):
    """The file of results of one run."""
    out = tmp_path_factory.mktemp("run")
    run = run_vision(classifier, str(images), out, batch_size=5, device="cpu", coupling=settings)
    return run.file
