"""Workers side by side on this machine, and the command around them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from stand_in import STAND_IN, calls, wait_for

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import checks, local, state
from lm_eval_coupling.sweep.board import Board, matrix
from lm_eval_coupling.sweep.cluster import Job
from lm_eval_coupling.sweep.command import survey, sweep
from lm_eval_coupling.sweep.forecast import gigabytes
from lm_eval_coupling.sweep.lock import lock
from lm_eval_coupling.sweep.plan import Local, PlanError
from lm_eval_coupling.sweep.status import look

SWEEP = """
import sys
from lm_eval_coupling.sweep import command
from lm_eval_coupling.sweep import checks
checks.check = lambda plan, **options: {}
sys.exit(command.sweep(sys.argv[1], command=sys.argv[2:]))
"""


@pytest.fixture
def unchecked(monkeypatch):
    """Tasks and models of the stand-in are none that lm-eval knows."""
    monkeypatch.setattr(checks, "check", lambda plan, **options: {})


def run(plan):
    board = Board(plan, survey(plan), Console(file=open(os.devnull, "w")))
    local.run(plan, plan.units, board, STAND_IN)
    return {unit.label.split("/")[-1]: look(plan, unit, {}) for unit in plan.units}


def command(plan):
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(plan.file), *STAND_IN], stdout=subprocess.PIPE, text=True
    )


def test_a_unit_that_fails_does_not_stop_the_others(folder_of, make_plan):
    plan = make_plan(
        [folder_of("bad", fail="ValueError: no"), folder_of("good"), folder_of("fine")]
    )
    found = run(plan)
    assert {name: status.state for name, status in found.items()} == {
        "bad": "failed",
        "good": "done",
        "fine": "done",
    }
    assert found["bad"].detail == "ValueError: no" and found["bad"].log.exists()


def test_a_fault_of_ours_does_not_stop_the_others_either(folder_of, make_plan, monkeypatch):
    plan = make_plan([folder_of("a"), folder_of("b")])
    work = local.Worker.run

    def fail_for_a(self, unit):
        return 1 / 0 if unit is plan.units[0] else work(self, unit)

    monkeypatch.setattr(local.Worker, "run", fail_for_a)
    assert {name: status.state for name, status in run(plan).items()} == {
        "a": "missing",
        "b": "done",
    }


def test_workers_share_the_threads_and_work_side_by_side(folder_of, make_plan):
    models = [folder_of(name, seconds=1) for name in "abcd"]
    start = time.monotonic()
    run(make_plan(models, run={"workers": 4, "threads": 3}))
    assert time.monotonic() - start < 3.5
    assert {calls(model)[0]["threads"] for model in models} == {"3"}


def test_one_worker_a_device(folder_of, make_plan):
    models = [folder_of(name, seconds=0.5) for name in "abcd"]
    run(make_plan(models, run={"devices": [1, 3]}))
    assert sorted(calls(model)[0]["device"] for model in models) == ["1", "1", "3", "3"]


def test_slots(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 8)
    monkeypatch.setattr(local, "visible_devices", lambda: [])
    assert local.slots(Local()) == [{}]  # devices of other makers stay visible
    assert local.slots(Local(devices=("cpu",))) == [{"CUDA_VISIBLE_DEVICES": ""}]
    two = local.slots(Local(workers=2))
    assert [slot["OMP_NUM_THREADS"] for slot in two] == ["4", "4"] and len(two) == 2
    monkeypatch.setattr(local, "visible_devices", lambda: ["0", "1"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots(Local())] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots(Local(workers=3))] == [
        "0",
        "1",
        "0",
    ]
    assert [
        slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots(Local(devices=("0,1", "2,3")))
    ] == ["0,1", "2,3"]
    assert (
        "OMP_NUM_THREADS"
        not in local.slots(Local(workers=2, environment={"OMP_NUM_THREADS": "1"}))[0]
    )


def test_devices_that_are_hidden_are_not_used(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert local.visible_devices() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_devices() == []


def test_exit_codes_and_what_is_said(folder_of, make_plan, unchecked, capsys):
    good, bad = folder_of("good"), folder_of("bad", fail="ValueError: no")
    plan = make_plan([good, bad])
    assert sweep(plan.file, check=True) == 1
    assert sweep(plan.file, command=STAND_IN) == 1
    said = capsys.readouterr().out
    assert "models/bad is failed: ValueError: no\n" in said and "1 of 2 units are done" in said
    assert f"    {plan.folder(plan.units[1]) / 'log.txt'}\n" in said
    Path(bad, "behaviour.json").write_text("{}")
    assert sweep(plan.file, command=STAND_IN) == 0 and sweep(plan.file, check=True) == 0
    assert [len(calls(model)) for model in (good, bad)] == [1, 2]


def test_when_all_is_there_nothing_is_loaded_or_checked(
    folder_of, make_plan, unchecked, monkeypatch
):
    plan = make_plan([folder_of("a")])
    assert sweep(plan.file, command=STAND_IN) == 0
    monkeypatch.setattr(checks, "check", lambda plan: pytest.fail("there was nothing to be done"))
    assert sweep(plan.file, command=["false"]) == 0


def test_facts_lie_beside_the_results_and_follow_the_plan(folder_of, make_plan, unchecked):
    model = folder_of("a")
    for facts in ({"family": "x", "training_tokens": 1e9}, {"family": "y"}):
        plan = make_plan([{"model": model, "facts": facts}])
        assert sweep(plan.file, command=STAND_IN) == 0
        assert state.read_json(plan.folder(plan.units[0]) / "facts.json") == facts
    assert len(calls(model)) == 1


def test_what_is_wrong_with_the_text_and_add_checks_is_told_at_once(
    folder_of, make_plan, tmp_path, monkeypatch
):
    """An impossible output hid all other problems, and so did a slip in the plan's text."""
    (tmp_path / "file").write_text("")
    plan = make_plan([folder_of("a")], output=str(tmp_path / "file" / "out"))
    monkeypatch.setattr(
        checks, "_ask", lambda plan, question: {"problems": ["no such task"], "models": {}}
    )
    with pytest.raises(PlanError) as wrong:
        sweep(plan.file, command=STAND_IN)
    assert len(wrong.value.problems) == 2 and "cannot be written" in str(wrong.value)
    plan.file.write_text(plan.file.read_text().replace("lm_eval:", "lm_evil:"))
    with pytest.raises(PlanError) as wrong:
        sweep(plan.file, command=STAND_IN)
    assert len(wrong.value.problems) == 3 and "did you mean lm_eval" in str(wrong.value)
    with pytest.raises(PlanError) as wrong:
        sweep(plan.file, check=True)  # which looks at the text only
    assert len(wrong.value.problems) == 1


@pytest.mark.parametrize("wrong", ["text", "check", "store"])
@pytest.mark.parametrize("options", [{}, {"dry_run": True}])
def test_a_plan_that_is_refused_leaves_no_folder(
    folder_of, make_plan, tmp_path, monkeypatch, wrong, options
):
    store = tmp_path / "stores" / "deep" / "store.sqlite"
    output = tmp_path / "new" / "out"
    plan = make_plan([folder_of("a")], output=str(output), coupling={"store": str(store)})
    if wrong == "text":
        plan.file.write_text(plan.file.read_text().replace("lm_eval:", "lm_evil:"))
    if wrong == "store":
        plan.file.write_text(plan.file.read_text() + "run: {on: slurm, hours: 1}\n")
        monkeypatch.setattr("lm_eval_coupling.sweep.cluster.require", lambda: None)
        monkeypatch.setattr("lm_eval_coupling.sweep.cluster.jobs", dict)
    questions = []

    def answer(plan, question):
        questions.append(question)
        return {"problems": ["no such task"] if wrong == "check" else [], "models": {}}

    monkeypatch.setattr(checks, "_ask", answer)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PlanError):
        sweep(plan.file, command=STAND_IN, **options)
    assert sorted(tmp_path.iterdir()) == before
    # The folder into which the asked process writes tasks; it writes none if it finds a problem.
    assert [q["overrides"] is None for q in questions] == [wrong != "check"]


@pytest.mark.parametrize("name", ["file", "file/out", "link", "x" * 300, "new/" + "x" * 300, "\0"])
def test_an_output_that_cannot_be_a_folder_is_refused(make_plan, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    plan = make_plan(["a"])
    before = sorted(tmp_path.iterdir())
    assert not checks.writable(dataclasses.replace(plan, output=tmp_path / name))
    assert checks.writable(dataclasses.replace(plan, output=tmp_path / "new" / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_two_sweeps_in_one_folder_are_refused(folder_of, make_plan, unchecked):
    plan = make_plan([folder_of("a")])
    with (
        lock(plan.output / ".lock"),
        pytest.raises(CouplingError, match="another sweep is at work"),
    ):
        sweep(plan.file, command=STAND_IN)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_runs_and_loses_nothing(folder_of, make_plan, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"this process and its children ignore signal {number}, as under nohup")
    model, done = folder_of("a", seconds=60), folder_of("b")
    plan = make_plan([done, model])
    head = command(plan)
    wait_for(lambda: calls(model))
    head.send_signal(number)
    head.communicate(timeout=30)
    assert head.returncode != 0
    assert [status.state for status in survey(plan)] == ["done", "stopped"]
    with pytest.raises(ProcessLookupError):
        os.kill(calls(model)[0]["pid"], 0)
    Path(model, "behaviour.json").write_text("{}")
    assert command(plan).wait(30) == 0 and len(calls(done)) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_a_sweep_in_the_background_of_a_script_ends_its_runs_as_well(folder_of, make_plan):
    """Its runs inherited the ignored Ctrl-C and were killed after half a minute."""
    model = folder_of("a", seconds=60)
    plan = make_plan([model])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        head = command(plan)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: calls(model))
    head.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert head.poll() is None  # still ignored by the sweep itself
    head.terminate()
    head.communicate(timeout=20)
    assert survey(plan)[0].state == "stopped"


@pytest.mark.skipif(os.name != "posix", reason="locks are of POSIX systems")
def test_after_kill_9_the_next_sweep_waits_for_what_still_runs(folder_of, make_plan):
    model = folder_of("a", seconds=4)
    plan = make_plan([model])
    head = command(plan)
    wait_for(lambda: calls(model))
    head.kill()
    head.wait()
    assert look(plan, plan.units[0], {}).state == "running"
    assert command(plan).wait(30) == 0 and len(calls(model)) == 1


def test_states_in_words(folder_of, make_plan):
    plan = make_plan([folder_of("a", seconds=60)])
    (unit,) = plan.units
    folder = plan.folder(unit)
    assert look(plan, unit, {}).state == "missing"
    with lock(folder / state.LOCK):
        (folder / state.LOG).write_text(
            "x\rMeasuring coupling:  40%|####      | 4/10 [00:01<00:01]\r"
        )
        assert (look(plan, unit, {}).state, look(plan, unit, {}).detail) == (
            "running",
            "measuring coupling 40 %",
        )
    state.write(folder, state="running")
    assert "ended before it was done" in look(plan, unit, {}).detail
    state.write(folder, state="waiting", job="7_0")
    waiting = look(plan, unit, {"7_0": Job("PENDING", "Resources")})
    assert (waiting.state, waiting.detail) == ("waiting", "job 7_0 PENDING (Resources)")
    assert look(plan, unit, {"7_0": Job("RUNNING")}).state == "running"
    assert look(plan, unit, {}).state == "stopped"
    silent = look(plan, unit, None)  # a controller that does not answer says nothing of the job
    assert silent.state == "waiting" and "does not answer" in silent.detail


def test_the_table_shows_those_in_trouble_first_where_there_is_no_room(folder_of, make_plan):
    plan = make_plan([folder_of(f"m{n}") for n in range(30)])
    board = Board(plan, survey(plan), Console(width=100, height=12, file=open(os.devnull, "w")))
    board.set(plan.units[20], "failed", "ValueError: [red] no")
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(board.table())
    shown = console.export_text()
    assert (
        "m20" in shown
        and "ValueError: [red] no" in shown
        and "and 24 more" in shown
        and "1 failed, 29 missing" in shown
    )


LONG = "a-name-of-a-model-that-is-longer-than-any-column-" * 3


def test_names_are_not_cut(folder_of, make_plan):
    plan = make_plan([folder_of(LONG)], tasks=["a-task-with-a-long-name" * 3, "two", "three"])
    board = Board(plan, survey(plan), Console(width=60, height=30, file=open(os.devnull, "w")))
    console = Console(width=60, record=True, file=open(os.devnull, "w"))
    console.print(board.table())
    rows = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert LONG in "".join(cells[1].strip() for cells in rows)
    console = Console(record=True, width=60, file=open(os.devnull, "w"))
    console.print(matrix(plan, survey(plan), {}, console))
    shown = console.export_text()
    assert LONG in shown and plan.tasks[0].name in shown and "…" not in shown


def test_a_narrow_terminal_counts_tasks(folder_of, make_plan):
    plan = make_plan([folder_of("a")], tasks=[f"task-number-{n}" for n in range(20)])
    console = Console(width=80, record=True, force_terminal=True, file=open(os.devnull, "w"))
    console.print(matrix(plan, survey(plan), {}, console))
    assert "0 of 20" in console.export_text() and "…" not in console.export_text()


def test_between_running_and_done_the_progress_is_printed(folder_of, make_plan, monkeypatch):
    monkeypatch.setattr("lm_eval_coupling.sweep.board._REPORT_SECONDS", 0.2)
    plan = make_plan([folder_of("a", seconds=1)])
    console = Console(record=True, width=300, file=open(os.devnull, "w"))
    local.run(plan, plan.units, Board(plan, survey(plan), console), STAND_IN)
    words = console.export_text()
    assert words.index("running") < words.index("measuring coupling 40 %") < words.index("done")
    assert words.count("40 %") == 1  # the same state is printed once


def test_memory_is_forecast_near_what_runs_take(folder_of, make_plan):
    """It was 1.13 GB where 3.7 were used: no logits, no batch of prompts, no process."""
    smollm = {"n_params": 134.5e6, "n_layers": 30, "d_model": 576, "vocab_size": 49152}
    qwen = {"n_params": 494e6, "n_layers": 24, "d_model": 896, "vocab_size": 151936}
    plan = make_plan([folder_of("a")], coupling={"untrained_seed": 0}, lm_eval={"batch_size": 8})
    assert gigabytes(plan, smollm | {"dtype": "bfloat16"}) == pytest.approx(2.36, rel=0.2)
    plan = make_plan([folder_of("a")], lm_eval={"batch_size": 8})
    assert gigabytes(plan, qwen | {"dtype": "bfloat16"}) == pytest.approx(3.7, rel=0.2)
    only_scores = make_plan([folder_of("a")], coupling={"limit": 0})
    assert gigabytes(only_scores, smollm | {"dtype": "float32"}) == pytest.approx(1.84, rel=0.02)
    assert gigabytes(plan, {"n_params": None}) is None


def test_no_results_of_the_stand_in_are_mistaken(folder_of, make_plan):
    """The stand-in writes what lm-eval writes, as far as it is read."""
    plan = make_plan([folder_of("a")])
    run(plan)
    (file,) = plan.folder(plan.units[0]).glob("*/results_*.json")
    assert json.loads(file.read_text())["configs"]["one"]["metadata"]["coupling_sweep"][
        "tasks"
    ] == {
        "one": None,
        "two": None,
    }
