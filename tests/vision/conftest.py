"""A folder of tiny images by colour, and a tiny classifier of colours, as files that load without network."""

import datasets
import pytest
from coloured_images import save_classifier, save_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What `datasets` makes of a folder stays out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "colour-vit")
