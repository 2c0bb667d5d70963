"""Damaged stores give no traceback, no hang and no other number: an entry is whole or missing.

Each damage is chosen by a seed that the failure names.
"""

import contextlib
import random
import sqlite3

import numpy as np
import pytest

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.runs.store import MeasurementStore

ENTRIES, FLIPS, OVERWRITES = 40, 400, 15


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Bytes of a store whose index has several pages' worth of keys, and its entries."""
    file = tmp_path_factory.mktemp("store") / "s.sqlite"
    generator = np.random.default_rng(0)
    entries = {
        MeasurementStore.key("weights", "depth", {}, [number], 0): MeasureResult(
            {"values": generator.random((3, 4), np.float32), "mean": float(number)}
        )
        for number in range(ENTRIES)
    }
    with MeasurementStore(file) as store:
        store.put(entries)
    return file.read_bytes(), entries


def check(file, entries, *, writes=True):
    """Return how many entries are there; each is as it was put."""
    there = 0
    try:
        with MeasurementStore(file) as store:
            for key, expected in entries.items():
                if (result := store.get(key)) is None:
                    continue
                there += 1
                assert result.columns["mean"] == expected.columns["mean"]
                assert np.array_equal(result.columns["values"], expected.columns["values"])
            with contextlib.suppress(sqlite3.Error):  # documented: the caller goes on without it
                if writes:
                    store.put({"new": MeasureResult({"x": 1})})
                    assert store.get("new") in (None, MeasureResult({"x": 1}))
    except CouplingError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    return there


def test_a_flipped_bit_changes_no_entry(intact, tmp_path):
    """In the index of keys it led from one prompt to the numbers of another."""
    content, entries = intact
    generator, there = random.Random(0), []
    places = [generator.randrange(8 * len(content)) for _ in range(FLIPS // 2)]
    # Half of them in what points at entries: beside every key in the index stands a row.
    keys = [key.encode() for key in entries]
    for _ in range(FLIPS // 2):
        key = generator.choice(keys)
        at = generator.choice([content.find(key), content.rfind(key)])
        places.append(8 * (at + generator.randrange(-8, len(key) + 8)) + generator.randrange(8))
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file = tmp_path / "s.sqlite"
        file.write_bytes(damaged)
        try:
            there.append(check(file, entries, writes=number % 10 == 0))  # to write takes longest
        except Exception as error:
            raise AssertionError(f"bit {place}") from error
    assert np.mean(there) > ENTRIES / 2


@pytest.mark.parametrize("how", ["cut", "junk", "zeros", "swapped"])
def test_a_store_that_was_cut_or_overwritten(intact, tmp_path, how):
    content, entries = intact
    for seed in range(OVERWRITES):
        generator = random.Random(f"{how} {seed}")
        at, other = (generator.randrange(0, len(content) - 4096, 512) for _ in range(2))
        size = generator.choice([1, 60, 512, 4096])
        damaged = {
            "cut": content[: at + size],
            "junk": content[:at] + generator.randbytes(size) + content[at + size :],
            "zeros": content[:at] + bytes(size) + content[at + size :],
            "swapped": content[:at] + content[other : other + size] + content[at + size :],
        }[how]
        file = tmp_path / "s.sqlite"
        file.write_bytes(damaged)
        try:
            check(file, entries)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
