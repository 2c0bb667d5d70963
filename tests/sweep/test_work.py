"""One unit: lm-eval in a process of its own, memory that runs out, locks, kept answers, stops."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stand_in import STAND_IN, calls, wait_for

from lm_eval_coupling.sweep import state
from lm_eval_coupling.sweep.lock import held, lock
from lm_eval_coupling.sweep.reasons import out_of_memory, reason
from lm_eval_coupling.sweep.request import configuration, store_file
from lm_eval_coupling.sweep.shared_store import locks_work
from lm_eval_coupling.sweep.work import Worker, half


def work(plan, **options):
    return Worker(plan, command=STAND_IN).run(plan.units[0], **options)


def test_lm_eval_gets_one_of_its_own_files(folder_of, make_plan):
    model = folder_of("a")
    plan = make_plan(
        [{"model": model, "args": {"dtype": "bfloat16"}}],
        coupling={"ranks": [2, 4], "position": -2},
    )
    made = configuration(plan, plan.units[0], plan.tasks, 3)
    store = str(store_file(plan.folder(plan.units[0])))
    arguments = {
        "pretrained": model,
        "revision": "main",
        "dtype": "bfloat16",
        "coupling_store": store,
    }
    assert (
        made["model"] == "coupling-hf" and made["batch_size"] == 3 and made["log_samples"] is True
    )
    assert made["model_args"] == arguments | {"coupling_ranks": [2, 4], "coupling_position": -2}


def test_memory_that_runs_out_is_tried_again_with_half_the_batch_once(folder_of, make_plan):
    fits = make_plan([folder_of("fits", most=2)])
    assert work(fits).state == "done"
    assert [call["batch_size"] for call in calls(fits.units[0].model)] == [4, 2]
    never = make_plan([folder_of("never", most=0)])
    outcome = work(never)
    assert outcome.state == "failed" and "out of memory with batch size 2" in outcome.reason
    assert len(calls(never.units[0].model)) == 2
    one = make_plan([folder_of("one", most=0)], lm_eval={"batch_size": 1})
    assert work(one).state == "failed" and len(calls(one.units[0].model)) == 1


@pytest.mark.parametrize(
    ("size", "smaller"), [(8, 4), (3, 1), (1, None), ("16", 8), ("auto", 1), ("auto:4", 1)]
)
def test_half_a_batch(size, smaller):
    assert half(size) == smaller


def test_a_failure_has_a_reason_and_is_tried_again_by_the_next_sweep(folder_of, make_plan):
    model = folder_of("a", fail="Traceback …\nValueError: no such thing\n")
    plan = make_plan([model])
    assert work(plan).reason == "ValueError: no such thing"
    assert state.read(plan.folder(plan.units[0]))["reason"] == "ValueError: no such thing"
    Path(model, "behaviour.json").write_text("{}")
    assert work(plan).state == "done"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("x\nlm-eval-coupling: got a, expected b\nValueError: x\n", 2, "got a, expected b"),
        (
            "x\n  10%|#\r 20%|##\ntorch.OutOfMemoryError: CUDA out of memory\n",
            1,
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("loading\n", -9, "ended with signal SIGKILL: loading"),
        ("", 3, "ended with exit code 3"),
    ],
)
def test_reasons(text, code, said):
    assert reason(text, code) == said


def test_what_counts_as_memory():
    assert (
        out_of_memory("", -9)
        and out_of_memory("", 137)
        and out_of_memory("RuntimeError: CUDA out of memory.", 1)
    )
    assert out_of_memory("DefaultCPUAllocator: can't allocate memory: you tried", 1)
    assert not out_of_memory("ValueError: room", 1)


def test_only_one_worker_at_a_time_on_a_unit(folder_of, make_plan):
    plan = make_plan([folder_of("a")])
    folder = plan.folder(plan.units[0])
    assert not held(folder / state.LOCK)
    with lock(folder / state.LOCK):
        assert held(folder / state.LOCK)
        assert work(plan).state == "busy"
    assert calls(plan.units[0].model) == [] and work(plan).state == "done"


def test_somebody_who_looks_keeps_no_worker_out(tmp_path):
    """To see whether a lock is held is to hold it for a moment."""

    def hold():
        with lock(tmp_path / "lock", patience=10.0):
            pass

    waiting = threading.Thread(target=hold)
    with lock(tmp_path / "lock"):
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


@pytest.mark.skipif(os.name != "posix", reason="locks are of POSIX systems")
def test_a_killed_sweep_leaves_its_run_in_peace(folder_of, make_plan, tmp_path):
    """After kill -9 of the sweep lm-eval goes on and holds the unit, so that no other begins."""
    plan = make_plan([folder_of("a", seconds=3)])
    code = "import sys; from lm_eval_coupling.sweep import plan, work; p = plan.read(sys.argv[1]);"
    code += "work.Worker(p, command=sys.argv[2:]).run(p.units[0])"
    head = subprocess.Popen([sys.executable, "-c", code, str(plan.file), *STAND_IN])
    wait_for(lambda: calls(plan.units[0].model))
    head.kill()
    head.wait()
    assert work(plan).state == "busy"
    wait_for(lambda: work(plan).state == "done")
    assert len(calls(plan.units[0].model)) == 1


def test_a_stop_ends_the_run_and_the_next_one_goes_on(folder_of, make_plan):
    model = folder_of("a", seconds=60)
    plan = make_plan([model])
    worker, outcome = Worker(plan, command=STAND_IN), []
    thread = threading.Thread(target=lambda: outcome.append(worker.run(plan.units[0])))
    thread.start()
    wait_for(lambda: calls(model))
    start = time.monotonic()
    worker.stop()
    thread.join()
    assert outcome[0].state == "stopped" and time.monotonic() - start < 20
    assert not alive(calls(model)[0]["pid"])
    Path(model, "behaviour.json").write_text("{}")
    assert work(plan).state == "done"


def test_answers_are_kept_for_the_same_model_and_settings_only(folder_of, make_plan):
    """lm-eval's cache knows requests only: answers of other weights would become this model's."""
    model = folder_of("a", fail="no")
    keep = {"run": {"keep_scores": True}}
    plan = make_plan([model], **keep)
    kept = plan.folder(plan.units[0]) / "scores_rank0.db"
    work(plan)
    kept.write_text("old")
    Path(model, "behaviour.json").write_text(json.dumps({"fail": "no", "most": 0}))
    Path(model, "calls.jsonl").touch()
    other = make_plan([model], coupling={"limit": 3}, **keep)
    work(other)
    assert (
        not kept.exists() or kept.read_text() != "old"
    )  # behaviour.json is one of the model's files
    kept.write_text("older")
    work(make_plan([model], coupling={"limit": 2}, run={"keep_scores": False}))
    assert kept.read_text() == "older"  # other coupling settings: the same answers
    work(make_plan([model], lm_eval={"batch_size": 4, "limit": 2}, run={"keep_scores": False}))
    assert not kept.exists()


def test_answers_are_forgotten_when_the_unit_is_done(folder_of, make_plan):
    plan = make_plan([folder_of("a")], run={"keep_scores": True})
    assert work(plan).state == "done"
    assert not list(plan.folder(plan.units[0]).glob("scores*"))


def test_an_output_that_cannot_be_used_is_a_failure_of_the_unit(folder_of, make_plan, tmp_path):
    (tmp_path / "file").write_text("")
    plan = make_plan([folder_of("a")], output=str(tmp_path / "file"))
    assert work(plan).state == "failed"


def test_locks_hold_here_and_are_seen_not_to(tmp_path, monkeypatch):
    from lm_eval_coupling.sweep import shared_store

    assert locks_work(tmp_path / "new") and not (tmp_path / "new").exists()
    monkeypatch.setattr(
        shared_store, "_HOLD", "print('held', flush=True); import sys; sys.stdin.read()"
    )  # holds nothing
    assert not locks_work(tmp_path)


def alive(pid):
    try:
        os.kill(pid, 0 if os.name == "posix" else signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True
