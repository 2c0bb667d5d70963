"""What is wrapped around lm-eval for coupling-hf: values, tables, tasks and plain errors."""

import argparse
import errno
import importlib
import json
import logging
import os
import re
import sys
import types
from pathlib import Path

import pytest
import tiny

from lm_eval_coupling import load_records
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import command_line, hooks, lm_eval_internals, plugin
from lm_eval_coupling.saved.atomic import require_writable

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def installed():
    plugin.install()
    import lm_eval._cli.harness  # noqa: F401
    import lm_eval.evaluator  # noqa: F401
    import lm_eval.loggers.evaluation_tracker  # noqa: F401

    return lm_eval


def step(name, module):
    """Replace the functions of a stand-in for a module of lm-eval."""
    module.__name__ = name
    hooks.after_import(module)


def test_an_unwritable_folder_is_told(tmp_path, monkeypatch):
    require_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            CouplingError,
            match=rf"got output folder {folder}, which cannot be written .*choose another",
        ):
            require_writable(folder)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CouplingError, match="Permission denied"):
        require_writable(tmp_path)


@pytest.mark.parametrize("output", ["file/out", "file/out.json"])
def test_an_unwritable_output_path_is_told_before_any_work(installed, tmp_path, output):
    (tmp_path / "file").touch()
    tracker = types.SimpleNamespace(output_path=str(tmp_path / output))
    with pytest.raises(CouplingError, match="cannot be written"):
        installed.evaluator.simple_evaluate(
            model="coupling-hf",
            model_args="pretrained=/nowhere",
            tasks=["none"],
            evaluation_tracker=tracker,
        )


class Manager:
    """Stands for lm-eval's task manager; remembers what it was asked for."""

    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.include_path = self.seen = include_path
        self.rest = verbosity, include_defaults, metadata


@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        (None, []),
        ("a", ["a"]),
        (Path("a"), [Path("a")]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([], []),
    ],
)
def test_our_tasks_come_before_the_users(given, theirs):
    manager = types.SimpleNamespace(TaskManager=type("TaskManager", (Manager,), {}))
    step("lm_eval.tasks.manager", manager)
    made = manager.TaskManager("INFO", given, metadata={"a": 1})
    assert made.seen == [plugin.tasks_folder(), *theirs] and made.include_path == given
    assert made.rest == ("INFO", True, {"a": 1})
    assert manager.TaskManager(include_path=given, include_defaults=False).seen == theirs


@pytest.fixture
def no_defaults(installed, tmp_path, monkeypatch):
    """The real task manager without upstream's tasks, which take ten seconds to index."""
    from lm_eval.tasks import manager

    (tmp_path / "defaults").mkdir()
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "defaults" / "manager.py"))
    return manager


def test_the_users_task_wins_over_ours(no_defaults, tmp_path):
    manager = no_defaults
    name = tiny.save_task(tmp_path / "theirs", "choice")
    ours = manager.TaskManager(include_path=str(tmp_path / "theirs"))
    assert {"arc", name} <= {*ours.all_tasks} and "arc" in ours.all_groups
    (tmp_path / "theirs" / "arc.yaml").write_text(f"group: arc\ntask:\n  - {name}\n")
    loaded = manager.TaskManager(include_path=str(tmp_path / "theirs")).load(["arc"])
    assert [*loaded["tasks"]] == [name]


def test_a_mistake_is_one_sentence(installed, capsys):
    def fail(_):
        raise CouplingError("got K = 0, expected 1 or more; choose another")

    with pytest.raises(SystemExit) as ended:
        installed._cli.harness.HarnessCLI().execute(argparse.Namespace(func=fail))
    assert ended.value.code == 2 and ended.value.__suppress_context__
    assert capsys.readouterr() == (
        "",
        "lm-eval-coupling: got K = 0, expected 1 or more; choose another\n",
    )


def test_who_waits_for_an_interrupted_run_is_told(installed):
    """It ended as if all had been measured, and a loop over models went on."""
    harness = installed._cli.harness.HarnessCLI()

    def interrupted(_):
        results = carrying(lambda *_: None)
        results["config"]["coupling"]["interrupted"] = True
        lm = types.SimpleNamespace(record_coupling=lambda *_: None)
        assert evaluator(results).evaluate(lm, {}) is results

    with pytest.raises(SystemExit) as ended:
        harness.execute(argparse.Namespace(func=interrupted))
    assert ended.value.code == 130
    harness.execute(argparse.Namespace(func=lambda _: None))  # a run after it is one of its own


def command(installed, run, model="coupling-hf"):
    """Call lm-eval's command line with ``run`` in place of an evaluation; return its exit code."""
    harness = installed._cli.harness.HarnessCLI()
    with pytest.raises(SystemExit) as ended:
        harness.execute(argparse.Namespace(func=run, model=model))
    return ended.value.code


def test_ctrl_c_anywhere_in_lm_eval_is_one_line(installed, capsys):
    """While lm-eval scored or looked for a batch size, a traceback of a hundred lines."""

    def interrupted(_):
        raise KeyboardInterrupt

    assert command(installed, interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1
    harness = installed._cli.harness.HarnessCLI()
    with pytest.raises(KeyboardInterrupt):
        harness.execute(argparse.Namespace(func=interrupted, model="hf"))


def test_a_closed_output_is_no_error_and_a_full_one_is_a_sentence(installed, capsys):
    """`lm_eval … | head` ended in a traceback after everything had been saved."""

    def closed(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def incomplete(_):
        command_line.current_command().problems.append("tables were not written")
        closed(_)

    harness = installed._cli.harness.HarnessCLI()
    harness.execute(argparse.Namespace(func=closed, model="coupling-hf"))
    assert command(installed, incomplete) == 1
    assert command(installed, full) == 2
    assert "No space left on device" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError):
        harness.execute(argparse.Namespace(func=closed, model="hf"))


def test_one_process_of_several_speaks(installed, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    assert command(installed, interrupted) == 130 and capsys.readouterr().err == ""


def test_an_unknown_task_is_one_sentence_with_the_nearest_name(installed, capsys):
    """lm-eval's own traceback, which names no task that there is."""

    def evaluate(_):
        manager = types.SimpleNamespace(TaskManager=type("TaskManager", (Manager,), {}))
        manager.TaskManager.all_tasks = ["arc_easy", "winogrande"]
        step("lm_eval.tasks.manager", manager)
        manager.TaskManager()
        raise ValueError("Tasks not found: arc_eazy, winogrande_")

    assert command(installed, evaluate) == 2
    assert capsys.readouterr().err == (
        "lm-eval-coupling: got --tasks arc_eazy, winogrande_, which lm-eval does not know; "
        "did you mean arc_easy, winogrande?\n"
    )
    with pytest.raises(ValueError, match="Tasks not found"):
        harness = installed._cli.harness.HarnessCLI()
        harness.execute(argparse.Namespace(func=evaluate, model="hf"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model coupling-fh", "got --model coupling-fh, .*; did you mean coupling-hf"),
        ("--model coupling-hf --device cuda:7", "got device='cuda:7', which this machine does not"),
        ("--model coupling-hf --device gpu", "got device='gpu', which torch does not know"),
        (
            "--model_args pretrained=org/m,coupling_ranks=10,30",
            "by a plus sign, as in coupling_ran",
        ),
        (
            "--model_args pretrained=org/m,coupling_untrained=0",
            "write coupling_untrained_seed=0, or",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_refused_at_once(
    installed, monkeypatch, capfd, words, sentence
):
    """`--device cuda` took 46 s to be refused; a misspelt model gave lm-eval's own traceback."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import manager

    def never(*_, **__):
        raise AssertionError("tasks were indexed")

    monkeypatch.setattr(manager.TaskManager, "__init__", never)
    given = ["--model", "coupling-hf", "--model_args", "pretrained=org/m", *words.split()]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--tasks", "arc", *given])
    with pytest.raises(SystemExit) as ended:
        cli_evaluate()
    told = capfd.readouterr().err
    last = told.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("lm-eval-coupling: ")
    assert re.search(sentence, last)


def test_tables_that_are_not_written_end_the_command_with_an_error(
    installed, tracker, tmp_path, capsys
):
    """With a full disk the command ended as if all was well."""

    def full(*_):
        raise OSError(28, "No space left on device")

    def evaluate(_):
        tracker(tmp_path).save_results_aggregated(carrying(full))

    assert command(installed, evaluate) == 1
    assert "coupling tables were not written ([Errno 28] No space" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["out", "out/all.json"])
@pytest.mark.parametrize("what", ["results", "samples", None])
def test_files_of_lm_eval_that_are_cut_short_end_the_command_with_an_error(
    installed, tracker, tmp_path, capsys, monkeypatch, what, output
):
    """lm-eval logs a warning, and goes on."""
    right_text = Path.write_text

    def short(self, text, **options):
        return right_text(self, text[: len(text) // 2], **options)

    def evaluate(_):
        made = tracker(tmp_path / output)
        with monkeypatch.context() as patch:
            if what == "results":
                patch.setattr(Path, "write_text", short)
            made.save_results_aggregated(carrying(lambda *_: None), {})
        sample = {"arguments": [], "resps": [], "filtered_resps": [], "target": ""}
        samples = [dict(sample) for _ in range(3)]
        if what == "samples":
            samples[1]["arguments"] = None  # an error in the middle of the file
        made.save_results_samples("t", samples)

    if what is None:
        installed._cli.harness.HarnessCLI().execute(
            argparse.Namespace(func=evaluate, model="coupling-hf")
        )
        return
    assert command(installed, evaluate) == 1
    kind = "samples_t_" if what == "samples" else "all_" if "json" in output else "results_"
    assert re.search(
        f"got .*{kind}.*, which lm-eval could not write completely", capsys.readouterr().err
    )


@pytest.mark.parametrize("by_file", [False, True])
def test_a_wrong_argument_on_lm_evals_command_line(
    installed, tmp_path, monkeypatch, capfd, by_file
):
    """Before lm-eval indexes its tasks, which takes ten seconds, and whether it stands on the line
    or in a file.
    """
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import manager

    def never(*_, **__):
        raise AssertionError("tasks were indexed")

    monkeypatch.setattr(manager.TaskManager, "__init__", never)
    words = [
        "--model",
        "coupling-hf",
        "--model_args",
        "pretrained=/nowhere,coupling_rank=4",
        "--tasks",
        "arc",
    ]
    if by_file:
        (tmp_path / "run.yaml").write_text(
            "model: coupling-hf\nmodel_args: {coupling_rank: 4}\ntasks: [arc]\n"
        )
        words = ["--config", str(tmp_path / "run.yaml")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])

    with pytest.raises(SystemExit) as ended:
        cli_evaluate()
    told = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in told
    assert told.splitlines()[-1].startswith(
        "lm-eval-coupling: got unknown argument coupling_rank, did you mean coupling_ra"
    )


def test_other_errors_and_results_pass_through(installed):
    harness = installed._cli.harness.HarnessCLI()
    with pytest.raises(ZeroDivisionError):
        harness.execute(argparse.Namespace(func=lambda _: 1 / 0))
    seen = []
    harness.execute(argparse.Namespace(func=seen.append))
    assert len(seen) == 1


def evaluator(results):
    """Stands for lm-eval's module `evaluator`, wrapped."""
    module = types.SimpleNamespace(
        evaluate=lambda *_, **__: results, simple_evaluate=lambda *_, **__: results
    )
    step("lm_eval.evaluator", module)
    return module


@pytest.mark.parametrize("cached", [False, True])
def test_coupling_is_recorded_after_scoring(cached):
    seen = []
    lm = types.SimpleNamespace(record_coupling=lambda *given: seen.append(given))
    lm = types.SimpleNamespace(lm=lm) if cached else lm
    results, tasks = {"results": {}}, {"tasks": {}}
    assert evaluator(results).evaluate(lm=lm, task_dict=tasks, limit=1) is results
    assert [given[:2] for given in seen] == [(tasks, results)]
    assert (
        evaluator(None).evaluate(lm, tasks) is None and len(seen) == 2
    )  # any process but the first
    assert evaluator(results).evaluate(object(), tasks) is results and len(seen) == 2


def test_how_it_was_asked_is_known(installed):
    """What makes the prompts, defaults included, whether it was given by place or by name."""
    seen = []

    def evaluate(lm, task_dict, limit=None, samples=None, system_instruction=None):
        return {}

    module = types.SimpleNamespace(evaluate=evaluate, simple_evaluate=evaluate)
    step("lm_eval.evaluator", module)
    module.evaluate(
        types.SimpleNamespace(record_coupling=lambda *given: seen.append(given[2])),
        {},
        3,
        samples={"a": [1]},
    )
    assert {name: seen[0][name] for name in ("limit", "samples", "system_instruction")} == {
        "limit": 3,
        "samples": {"a": [1]},
        "system_instruction": None,
    }


def test_a_reloaded_module_records_again(installed):
    """A notebook's autoreload lost the recording without a word, because the module was still
    marked as done.
    """
    before = installed.evaluator.evaluate
    importlib.reload(installed.evaluator)
    once = installed.evaluator.evaluate
    assert (
        once is not before
        and once._of_coupling
        and installed.evaluator.simple_evaluate._of_coupling
    )
    plugin.install()
    assert installed.evaluator.evaluate is once


def test_a_name_that_was_bound_before_us_records():
    """After ``from lm_eval import evaluate``, then this package: scores without coupling, and not a
    word.
    """
    from lm_eval.utils import positional_deprecated

    module = types.SimpleNamespace(
        evaluate=positional_deprecated(lambda lm, task_dict: {}), simple_evaluate=lambda: {}
    )
    bound, seen = module.evaluate, []
    for _ in range(2):
        step("lm_eval.evaluator", module)
    for evaluate in (bound, module.evaluate):
        evaluate(types.SimpleNamespace(record_coupling=lambda *given: seen.append(given)), {})
        assert len(seen) == 1
        seen.clear()


def test_a_failure_to_record_keeps_the_scores(caplog):
    def fail(*_):
        raise MemoryError("out of it")

    results = {"results": {"a": 1}}
    assert evaluator(results).evaluate(types.SimpleNamespace(record_coupling=fail), {}) is results
    assert (
        "coupling was not recorded; the scores are complete" in caplog.text
        and "out of it" in caplog.text
    )


@pytest.fixture
def tracker(installed):
    def make(output_path):
        made = installed.loggers.evaluation_tracker.EvaluationTracker(
            output_path=output_path and str(output_path)
        )
        made.general_config_tracker.model_name_sanitized = "some__model"
        return made

    return make


class Info(dict):
    """Stands for what results of ours carry."""

    unstored = ""

    def __init__(self, write):
        self.write_tables = write


def carrying(write):
    return {"results": {}, "config": {"coupling": Info(write)}}


@pytest.mark.parametrize(
    ("output", "folder"), [("out", "out/some__model"), ("out/all.json", "out"), (None, None)]
)
def test_tables_are_written_where_the_results_are(tracker, tmp_path, output, folder):
    seen = []
    results = carrying(lambda *given: seen.append(given))
    tracker(output and tmp_path / output).save_results_aggregated(results)
    ((where, date),) = seen
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+", date)
    assert where == (folder and tmp_path / folder)
    assert [p.parent for p in tmp_path.rglob(f"*_{date}.json")] == ([where] if where else [])


def test_a_real_run_leaves_a_table_beside_its_results(installed, tmp_path):
    name = tiny.save_task(tmp_path / "tasks", "choice")
    arguments = {
        "pretrained": tiny.save_model(tmp_path / "model", num_hidden_layers=2),
        "coupling_ranks": "4+8",
        "coupling_limit": 3,
        "coupling_store": str(tmp_path / "store.sqlite"),
    }
    made = installed.loggers.evaluation_tracker.EvaluationTracker(output_path=str(tmp_path / "out"))
    results = installed.evaluator.simple_evaluate(
        model="coupling-hf",
        model_args=arguments,
        tasks=[name],
        task_manager=installed.tasks.TaskManager(
            include_path=str(tmp_path / "tasks"), include_defaults=False
        ),
        evaluation_tracker=made,
        device="cpu",
        limit=5,
        bootstrap_iters=0,
    )
    samples = results.pop("samples")
    made.save_results_aggregated(results, samples)
    (table,) = (tmp_path / "out").rglob("*.parquet")
    (saved_results,) = (tmp_path / "out").rglob("results_*.json")
    date = saved_results.stem.removeprefix("results_")
    assert table == saved_results.parent / f"coupling_{name}_{date}.parquet"
    measured = {
        sample["doc_hash"]: sample["coupling"]
        for sample in samples[name]
        if sample["coupling"] is not None
    }
    assert len(samples[name]) == 5 and len(measured) == 3
    assert {*load_records(tmp_path / "out").doc_hash} == {*measured}
    about = json.loads(saved_results.read_text())
    assert about["config"]["coupling"]["measured"] == 3
    assert about["results"][name]["coupling,none"] == pytest.approx(sum(measured.values()) / 3)


def test_tables_that_cannot_be_written_are_told_and_results_kept(tracker, tmp_path, caplog):
    def fail(*_):
        raise OSError("disk full")

    tracker(tmp_path).save_results_aggregated(carrying(fail))
    assert "coupling tables were not written" in caplog.text and "disk full" in caplog.text
    assert len([*tmp_path.rglob("results_*.json")]) == 1


@pytest.mark.parametrize(
    "results", [None, {}, {"config": None}, {"config": {"coupling": {"run_id": "from a file"}}}]
)
def test_results_of_others_write_no_tables(tracker, tmp_path, results):
    tracker(tmp_path).save_results_aggregated(results)
    assert not [*tmp_path.rglob("*.parquet")]


def test_an_lm_eval_that_does_not_fit_is_a_warning(caplog):
    module = types.ModuleType("lm_eval._cli.harness")
    with caplog.at_level(logging.WARNING):
        hooks.after_import(module)
    for name, without in lm_eval_internals.WRAPPED["lm_eval._cli.harness"].items():
        assert f"this lm-eval has no {name}; {without}" in caplog.text
