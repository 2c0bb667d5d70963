"""The cache folder belongs to this user alone, wherever it has to be."""

import os
import tempfile
from pathlib import Path

import pytest

from lm_eval_coupling import cache

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX systems")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A system without home folders, whose temporary folder is ``tmp_path``."""
    import platformdirs

    def no_home(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(platformdirs, "user_cache_path", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._folder_of_this_process.cache_clear()
    return tmp_path


def test_a_folder_in_the_temporary_folder_is_closed_to_others(temporary):
    folder = cache.cache_folder()
    assert folder.parent == temporary and folder == cache.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["writable", "link", "file", "owner"])
def test_a_folder_that_another_user_could_have_filled_is_not_used(temporary, planted, monkeypatch):
    """A planted store was read as ours: coupling 0.99 with a perfect certificate."""
    name = temporary / f"lm-eval-coupling-{os.getuid()}"
    if planted == "link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(temporary / "elsewhere")
        temporary.chmod(0o777)
    elif planted == "file":
        name.write_text("")
    else:
        name.mkdir()
        name.chmod(0o777 if planted == "writable" else 0o700)
    if planted == "owner":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        name.rename(name.with_name(f"lm-eval-coupling-{os.getuid()}"))
    folder = cache.cache_folder()
    assert folder != name and Path(folder).stat().st_mode & 0o777 == 0o700
    assert not list(folder.iterdir())


def test_a_home_folder_shared_with_everybody_is_not_trusted_either(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tmp_path.chmod(0o777)
    (tmp_path / "lm-eval-coupling").mkdir()
    (tmp_path / "lm-eval-coupling").chmod(0o777)
    assert cache.cache_folder() != tmp_path / "lm-eval-coupling"
    (tmp_path / "lm-eval-coupling").chmod(0o755)
    assert cache.cache_folder() == tmp_path / "lm-eval-coupling"
