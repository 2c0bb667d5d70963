"""The store keeps what it was given: through kills, beside other processes, and next to damaged
entries.
"""

import contextlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lm_eval_coupling.errors import CouplingError, Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.runs import store as store_module
from lm_eval_coupling.runs.store import MeasurementStore, default_store_path

SETTINGS = {"ranks": [10, 30], "dtype": "float32", "method": "auto"}

WRITER = """
import sys
import numpy as np
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.runs.store import MeasurementStore
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with MeasurementStore(path) as store:
    for i in range(count):
        columns = {"values": np.full((40, 40), i, np.float32), "tokens": [i]}
        store.put({f"{name}-{i}": MeasureResult(columns)})
        print(f"{name}-{i}", flush=True)
"""


def writer(path, name, count=10**9):
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def columns():
    generator = np.random.default_rng(0)
    matrix = generator.random((2, 3, 3), dtype=np.float32)
    matrix[0, 0, 1] = np.nan
    return {
        "tokens": (1, 2, 3),
        "position": 2,
        "text": "naïve 🧪 \x00 \u202e",
        "normalized_miscoupling": matrix,
        "singular_values": generator.random((3, 5)),
        "gap": np.zeros((0, 3), np.float32),
        "miscoupling": None,
        "method": ("closed", "closed", "autodiff"),
        "line_shape_score": np.float64(0.1) + 0.2,
        "expodistance": math.nan,
        "seconds": np.float32(1.5),
        "reason": None,
    }


def test_round_trip(tmp_path):
    kept, reasons = columns(), (Reason("undefined", "undefined expodistance"),)
    with MeasurementStore(tmp_path / "deep" / "er" / "s.sqlite") as store:
        assert len(store) == 0 and store.get("a") is None and store
        store.put({"a": MeasureResult(kept, reasons, 1.5)})
    with MeasurementStore(tmp_path / "deep" / "er" / "s.sqlite") as store:
        got = store.get("a")
        assert len(store) == 1
    found = got.columns
    assert list(found) == list(kept) and got.reasons == reasons and got.seconds == 1.5
    for name, value in kept.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes()
            assert found[name].shape == value.shape
        elif isinstance(value, tuple):
            assert found[name] == list(value)
        else:
            assert found[name] == value or (math.isnan(found[name]) and math.isnan(value))


def test_last_one_wins(tmp_path):
    with MeasurementStore(tmp_path / "s.sqlite") as store:
        store.put({"a": MeasureResult({"x": 1})})
        store.put({"a": MeasureResult({"x": 2})})
        assert store.get("a") == MeasureResult({"x": 2}) and len(store) == 1


def test_objects_are_never_pickled(tmp_path):
    with (
        MeasurementStore(tmp_path / "s.sqlite") as store,
        pytest.raises(ValueError, match="allow_pickle"),
    ):
        store.put({"a": MeasureResult({"x": np.array([{}], dtype=object)})})


def test_key_depends_on_everything_and_on_nothing_else():
    base = MeasurementStore.key("f", "depth", SETTINGS, [1, 2], 1)
    others = [
        MeasurementStore.key("g", "depth", SETTINGS, [1, 2], 1),
        MeasurementStore.key("f", "swapped", SETTINGS, [1, 2], 1),
        MeasurementStore.key("f", "depth", SETTINGS | {"dtype": "float64"}, [1, 2], 1),
        MeasurementStore.key("f", "depth", SETTINGS, [1, 3], 1),
        MeasurementStore.key("f", "depth", SETTINGS, [12], 1),
        MeasurementStore.key("f", "depth", SETTINGS, [1, 2], 0),
    ]
    assert len({base, *others}) == 7
    reordered = dict(reversed(SETTINGS.items()))
    assert MeasurementStore.key("f", "depth", reordered, (1, 2), 1) == base


def test_kill_loses_nothing_that_was_put(tmp_path):
    """SIGKILL in the middle of writing, several times over the same file."""
    path = tmp_path / "s.sqlite"
    written = []
    for round_ in range(4):
        with writer(path, f"round{round_}") as process:
            for _ in range(3 + 4 * round_):
                written.append(process.stdout.readline().strip())
            os.kill(process.pid, signal.SIGKILL)
            written += process.stdout.read().split()
        with MeasurementStore(path) as store:
            for key in written:
                i = int(key.split("-")[1])
                found = store.get(key).columns
                assert (
                    found["tokens"] == [i]
                    and (found["values"] == i).all()
                    and found["values"].shape == (40, 40)
                )
            assert (
                len(store) - len(written) <= round_ + 1
            )  # a put may be durable before its return was reported
    assert len(written) >= 36


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "s.sqlite"  # does not exist: they race to create it, too
    processes = [writer(path, name, 25) for name in "abc"]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with MeasurementStore(path) as store:
        assert len(store) == 75
        assert all(
            store.get(f"{name}-{i}").columns["tokens"] == [i] for name in "abc" for i in range(25)
        )


def test_another_schema_version_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    MeasurementStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET schema_version = 7")
    connection.close()
    message = rf"{path}.* schema version 7, expected version 2; move it away or choose another file"
    message += " with coupling_store"
    with pytest.raises(CouplingError, match=message):
        MeasurementStore(path)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to have a header " * 50)
    with pytest.raises(CouplingError, match=r"notes.txt.*no readable store.*coupling_store"):
        MeasurementStore(path)
    assert path.read_text().startswith("not a database")


def test_a_database_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(CouplingError, match="something else"):
        MeasurementStore(path)


def test_unusable_places_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CouplingError, match="folder cannot be made"):
        MeasurementStore(tmp_path / "file" / "s.sqlite")
    with pytest.raises(CouplingError, match="expected a file"):
        MeasurementStore(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", os.devnull):  # one was waited for, the other kept nothing
        with pytest.raises(CouplingError, match="got the device or pipe .* expected a file"):
            MeasurementStore(place)
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # permissions do not bind root
    with pytest.raises(CouplingError, match="not writable"):
        MeasurementStore(tmp_path / "s.sqlite")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 rubbish", None])
def test_a_damaged_entry_counts_as_missing(tmp_path, damage):
    path = tmp_path / "s.sqlite"
    with MeasurementStore(path) as store:
        store.put({"a": MeasureResult(columns())})
        store.put({"b": MeasureResult({"x": 1})})
    with sqlite3.connect(path) as connection:
        blob = connection.execute("SELECT columns FROM measurements WHERE key = 'a'").fetchone()[0]
        damaged = blob[: len(blob) // 2] if damage is None else damage
        connection.execute("UPDATE measurements SET columns = ? WHERE key = 'a'", (damaged,))
    connection.close()
    with MeasurementStore(path) as store:
        assert store.get("a") is None
        assert store.get("b") == MeasureResult({"x": 1})
        store.put({"a": MeasureResult({"x": 3})})
        assert store.get("a") == MeasureResult({"x": 3})


def test_the_default_is_a_file_of_the_user():
    path = default_store_path()
    assert path.name == "measurements.sqlite" and "lm-eval-coupling" in str(path)


def test_nothing_heavy_is_imported():
    code = "import sys, lm_eval_coupling.runs.store\n"
    code += "sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_store_whose_tables_words_are_damaged_is_told(tmp_path):
    """SQLite hands them on as they are; a UnicodeDecodeError said nothing of the store."""
    path = tmp_path / "store.sqlite"
    MeasurementStore(path).close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE meta", b"CREAT\xfa TABLE meta"))
    with pytest.raises(CouplingError, match="no readable store"):
        MeasurementStore(path)


def test_a_commit_that_finds_readers_is_rolled_back(tmp_path, monkeypatch):
    """Every later put failed, 2 of 48 entries were kept, and other processes were locked out."""
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.5)
    path = tmp_path / "s.sqlite"
    with MeasurementStore(path) as store, MeasurementStore(path) as other:
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM meta").fetchone()  # holds a lock until it ends
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            store.put({"a": MeasureResult({"x": 1})})
        started = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.put({"b": MeasureResult({"x": 2})})
        assert time.monotonic() - started < 10
        reader.execute("COMMIT")
        reader.close()
        other.put({"c": MeasureResult({"x": 3})})
        store.put({"d": MeasureResult({"x": 4})})
        assert [store.get(key).columns["x"] for key in "abcd"] == [1, 2, 3, 4]


def test_a_reader_that_ends_in_time_costs_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    with MeasurementStore(path) as store:
        reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM meta").fetchone()
        timer = threading.Timer(1.5, lambda: reader.execute("COMMIT"))
        timer.start()
        store.put({"a": MeasureResult({"x": 1})})
        timer.join()
        assert store.get("a") == MeasureResult({"x": 1})


def test_a_locked_store_is_to_be_waited_for(tmp_path, monkeypatch):
    """The advice was to delete it, with all that others had measured."""
    path = tmp_path / "s.sqlite"
    MeasurementStore(path).close()
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CouplingError, match="wait until it is done, or choose another") as told:
            MeasurementStore(path)
    assert "delete" not in str(told.value)
    assert len(MeasurementStore(path)) == 0


@pytest.mark.parametrize("table", ["meta", "measurements"])
def test_a_store_without_its_rows_is_refused_in_a_sentence(tmp_path, table):
    path = tmp_path / "s.sqlite"
    MeasurementStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM meta" if table == "meta" else "DROP TABLE measurements")
        connection.commit()
    with pytest.raises(CouplingError, match="schema version None|something else"):
        MeasurementStore(path)


def emptied(path):
    os.truncate(path, 0)


def renamed(path):
    path.rename(path.with_name("elsewhere"))


def replaced(path):
    other = path.with_name("other")
    with MeasurementStore(other) as store:
        store.put({"theirs": MeasureResult({"x": 9})})
    other.replace(path)


def without_folder(path):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("change", [os.unlink, emptied, renamed, replaced, without_folder])
def test_a_store_that_is_removed_or_replaced_is_opened_anew(tmp_path, change, caplog):
    """Every later put failed with "attempt to write a readonly database"."""
    path = tmp_path / "folder" / "s.sqlite"
    with MeasurementStore(path) as store:
        store.put({"before": MeasureResult({"x": 1})})
        change(path)
        store.put({"a": MeasureResult({"x": 2})})
        store.put({"b": MeasureResult({"x": 3})})
    with MeasurementStore(path) as store:
        assert store.get("a").columns["x"] == 2 and store.get("b").columns["x"] == 3
        assert store.get("before") is None
        assert (store.get("theirs") is not None) == (change is replaced)
    assert caplog.text.count("was removed, emptied or replaced while in use") == 1


def test_a_store_whose_place_is_taken_by_another_file_is_left_alone(tmp_path):
    path = tmp_path / "s.sqlite"
    with MeasurementStore(path) as store:
        store.put({"before": MeasureResult({"x": 1})})
        path.unlink()
        path.write_text("notes of somebody")
        with pytest.raises(sqlite3.Error):
            store.put({"a": MeasureResult({"x": 2})})
    assert path.read_text() == "notes of somebody"


def test_threads_that_put_at_once_lose_nothing(tmp_path, monkeypatch):
    """What one thread put while another was writing was forgotten with that one's entries."""
    write, started, may_end = MeasurementStore._write, threading.Event(), threading.Event()

    def slowly(self, rows):
        rows = list(rows)
        if rows[0][0] == "first":
            started.set()
            assert may_end.wait(30)
        write(self, rows)

    monkeypatch.setattr(MeasurementStore, "_write", slowly)
    with MeasurementStore(tmp_path / "s.sqlite") as store:
        thread = threading.Thread(target=store.put, args=({"first": MeasureResult({"x": 1})},))
        thread.start()
        assert started.wait(30)
        store._unwritten |= {
            "second": ("second", store_module._encode(MeasureResult({}), "second"), "")
        }
        may_end.set()
        thread.join()
        store.flush()
        assert store.get("first") is not None and store.get("second") is not None
