"""A measure in a file of its own, as if it stood in the package."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lm_eval_coupling import measures as package
from lm_eval_coupling.measures import registry


@contextlib.contextmanager
def toy_measure(folder: Path, monkeypatch, source: str) -> Iterator[None]:
    """The measure that ``source`` declares is known for as long as the context lasts."""
    (folder / "measures").mkdir()
    (folder / "measures" / "toy.py").write_text(source)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / "measures")])
    importlib.invalidate_caches()
    registry.registered_measures.cache_clear()
    yield
    registry.registered_measures.cache_clear()
    sys.modules.pop(f"{package.__name__}.toy", None)
