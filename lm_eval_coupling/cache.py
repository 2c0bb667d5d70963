"""Where measurements and fetched models are kept between runs."""

from __future__ import annotations

import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """This user's; in the system's folder for temporary files where there is no home, as in many containers."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("lm-eval-coupling")
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lm-eval-coupling"
