"""A file is complete or as it was before."""

import os
import threading
from pathlib import Path

import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.atomic import write_text, writing


def test_a_file_is_replaced(tmp_path):
    file = write_text(tmp_path / "a.html", "one")
    assert write_text(file, "two ü").read_text(encoding="utf-8") == "two ü"
    assert os.listdir(tmp_path) == ["a.html"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file(tmp_path, error):
    """`report -o` destroyed the page that was there before it wrote half of the new one."""
    file = write_text(tmp_path / "a.html", "old")
    expected = CouplingError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), writing(file) as temporary:
        temporary.write_text("hal")
        raise error
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.html"]


def test_the_sentence_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(
        CouplingError, match=r"got .*none/a\.csv, which cannot be written \(there is no"
    ):
        write_text(tmp_path / "none" / "a.csv", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        CouplingError, match=r"got .*folder, which cannot be written \(it is a folder"
    ):
        write_text(tmp_path / "folder", "x")


def test_links_stay_and_pipes_are_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    write_text(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real" / "a.txt").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_device_that_takes_nothing_is_a_sentence():
    with pytest.raises(CouplingError, match="got /dev/full, which cannot be written .No space"):
        write_text(Path("/dev/full"), "x" * 10**6)
