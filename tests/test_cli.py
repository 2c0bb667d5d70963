"""The command: quick help, one sentence for a mistake, lm-eval's own arguments untouched."""

import errno
import importlib
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import types

import pytest
from saved_runs import record, save, task_summary

import lm_eval_coupling.harness
from lm_eval_coupling import cli
from lm_eval_coupling.console import log_safely
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.model_request import Measured
from lm_eval_coupling.vision.evaluate import VisionRun


def stand_in(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lm_eval_coupling", *words],
        capture_output=True,
        env=os.environ | environment,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        check=False,
    )


def test_help_names_the_commands_and_loads_nothing_heavy():
    found = command("--help")
    assert found.returncode == 0 and all(name in found.stdout for name in ("run", "demo", "show"))
    code = "import sys, lm_eval_coupling.cli as c; c.command_parser(); "
    code += "sys.exit(any(m in sys.modules for m in sys.argv[1:]))"
    heavy = ("torch", "lm_eval", "pandas", "numpy", "rich", "pyarrow")
    assert subprocess.run([sys.executable, "-c", code, *heavy], check=False).returncode == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_any_encoding_of_the_output_will_do(encoding):
    """An ellipsis in the help ended the command where the output was redirected on Windows."""
    for words in (["fit", "--help"], ["sweep", "--help"], ["show", "/nowhere/×→…"]):
        found = command(*words, PYTHONIOENCODING=encoding)
        assert "Traceback" not in found.stderr and found.returncode == (2 if "show" in words else 0)
        assert found.stdout + found.stderr


def test_no_command_is_an_error():
    assert command().returncode == 2 and command("dance").returncode == 2


def test_show(tmp_path, capsys):
    save(tmp_path, {"arc": task_summary()}, rows=[record()])
    assert cli.main(["show", str(tmp_path), "--task", "arc", "--doc", "0"]) == 0
    assert "Document 0" in capsys.readouterr().out


def test_a_mistake_is_one_sentence(tmp_path):
    found = command("show", str(tmp_path / "nowhere"))
    assert found.returncode == 2 and found.stdout == ""
    assert (
        found.stderr.count("\n") == 1
        and "does not exist" in found.stderr
        and "Traceback" not in found.stderr
    )


@pytest.fixture
def bad(tmp_path):
    """Paths that are not what a command takes, by what they are."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text("")
    (tmp_path / "junk").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize("kind", ["none", "folder", "empty", "junk", "columns.csv", "loop"])
@pytest.mark.parametrize(
    "words",
    [
        "show BAD",
        "fit BAD --out HERE/out",
        "fit RUN --facts BAD --out HERE/out",
        "report BAD -o OUT",
        "sweep BAD --dry-run",
        "measure BAD RUN/prompts.txt --out HERE/out",
        "check BAD",
    ],
)
def test_a_path_that_is_something_else_is_one_sentence(
    words, kind, bad, tmp_path, capsys, monkeypatch
):
    """Regression: `[Errno 2] No such file or directory: …` and other people's words for it."""
    # transformers logs to the standard error of the test that imported it first, closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    run = tmp_path / "run"
    save(run, {"arc": task_summary()}, rows=[record()])
    (run / "prompts.txt").write_text("The sky is")
    path = str(bad / kind)
    places = {
        "BAD": path,
        "RUN": str(run),
        "OUT": str(bad / "out"),
        "RUN/prompts.txt": str(run / "prompts.txt"),
    }
    code = cli.main([places.get(word, word) for word in words.split()])
    told = capsys.readouterr().err
    assert code == 2 and path in told
    assert "Errno" not in told and "Traceback" not in told and "char 0" not in told
    assert told.count("\n") == 1 or words.startswith(
        "sweep"
    )  # which tells everything that is wrong


SIGNS = "\x1b]0;title\x07\x9b2J"


def test_names_in_messages_cannot_command_the_terminal(tmp_path, capsys, monkeypatch):
    """They were escaped in tables, but not in errors and warnings."""
    assert cli.main(["show", str(tmp_path / SIGNS)]) == 2
    told = capsys.readouterr().err
    assert r"\x1b]0;title\x07\x9b2J" in told and SIGNS not in told
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "passed over: %s", (SIGNS,), None)
    assert logging.lastResort.format(record) == r"passed over: \x1b]0;title\x07\x9b2J"
    monkeypatch.setattr(logging, "lastResort", None)
    log_safely()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (None, 2, "got an output, which cannot be used (No space left on device)"),
        ("/x/\x1b", 2, r"got /x/\x1b, which cannot be used (No space left on device)"),
    ],
)
def test_an_error_of_the_file_system_is_a_sentence(monkeypatch, capfd, name, code, message):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", name)

    monkeypatch.setattr("lm_eval_coupling.report.terminal.show", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert cli.main(["show", "/"]) == code
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("columns", ["0", "", "00", "abc"])
def test_a_width_of_nothing_is_none(monkeypatch, capsys, saved, columns):
    """With COLUMNS=0, as some launchers set it, `show` printed nothing and ended with 0."""
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["show", str(saved)]) == 0
    assert "arc" in capsys.readouterr().out


CLOSED = """
import os, sys
os.close(1)
sys.stdout = None
from lm_eval_coupling import cli
assert cli.main(["show", sys.argv[1]]) == 0
assert os.readlink("/proc/self/fd/1") == os.devnull
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_a_closed_output_is_no_place_for_files(saved):
    """The next file that was opened had its number, and what libraries print went into it."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, saved], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_behind_the_output_is_told(saved):
    """The exit code was 120, with an exception that was ignored."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval_coupling", "show", saved],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "got an output, which cannot be used (No space left" in done.stderr


@pytest.mark.parametrize("words", ["show RUN", "fit RUN --out HERE/out", "show RUN --json"])
def test_a_reader_that_ends_early_is_no_error(saved, words, tmp_path, monkeypatch):
    """`fit … | head` ended with code 1, which rich sets."""

    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    for number in range(3):
        summary = {"arc": task_summary(0.2 + number / 9)}
        save(tmp_path / "runs", summary, model=f"m{number}", rows=[record()], run_id=f"r{number}")
    monkeypatch.setattr("sys.stdout", Closed())
    places = {"RUN": str(tmp_path / "runs"), "HERE/out": str(tmp_path / "out")}
    assert cli.main([places.get(word, word) for word in words.split()]) == 0


@pytest.mark.parametrize("words", ["measure m p.txt --out o", "check m", "sweep plan.yaml"])
def test_a_working_directory_that_was_deleted_is_told(words, tmp_path, monkeypatch, capsys):
    """MKL ended the process: "Cannot load libtorch_cpu.so"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(words.split()) == 2
    assert "got a working directory that cannot be used" in capsys.readouterr().err


def test_no_folder_for_temporary_files_is_told(tmp_path, monkeypatch, capsys):
    """A library of lm-eval ended in a traceback of forty lines."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    assert cli.main(["check", "model"]) == 2
    assert "got no folder in which temporary files" in capsys.readouterr().err


def test_run_hands_everything_to_lm_eval(monkeypatch):
    seen = []
    plugin = stand_in(
        monkeypatch, "lm_eval_coupling.harness.plugin", install=lambda: seen.append("installed")
    )
    monkeypatch.setattr(lm_eval_coupling.harness, "plugin", plugin, raising=False)
    stand_in(monkeypatch, "lm_eval")
    stand_in(monkeypatch, "lm_eval.__main__", cli_evaluate=lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["lm-eval-coupling"])
    rest = ["--model", "coupling-hf", "--tasks", "arc", "--help", "--out", "x"]
    assert cli.main(["run", *rest]) == 0
    assert seen == ["installed", ["lm_eval", *rest]]


def test_run_reports_a_mistake(monkeypatch, capsys):
    def refuse():
        raise CouplingError("got K = 0, expected 1 or more; choose another")

    plugin = stand_in(monkeypatch, "lm_eval_coupling.harness.plugin", install=refuse)
    monkeypatch.setattr(lm_eval_coupling.harness, "plugin", plugin, raising=False)
    assert cli.main(["run", "--model", "coupling-hf"]) == 2
    assert (
        capsys.readouterr().err
        == "lm-eval-coupling: got K = 0, expected 1 or more; choose another\n"
    )


@pytest.mark.parametrize("out", [None, "somewhere"])
def test_demo(monkeypatch, out):
    seen = []
    demo = stand_in(
        monkeypatch, "lm_eval_coupling.demo", main=lambda out: seen.append(out and str(out))
    )
    monkeypatch.setattr(lm_eval_coupling, "demo", demo, raising=False)
    assert cli.main(["demo", *(["--out", out] if out else [])]) == 0
    assert seen == [out]


@pytest.mark.parametrize(
    ("words", "module", "name", "answer"),
    [
        (
            ["measure", "M", "p.txt", "--out", "o"],
            "lm_eval_coupling.texts",
            "measure_texts",
            lambda interrupted, problem: Measured("a table", interrupted, problem),
        ),
        (
            ["vision", "--model", "M", "--data", "D", "--out", "o"],
            "lm_eval_coupling.vision.evaluate",
            "run_vision",
            lambda interrupted, problem: VisionRun("f", "words", interrupted, problem),
        ),
        (["demo"], "lm_eval_coupling.demo", "main", lambda interrupted, _: interrupted),
    ],
    ids=["measure", "vision", "demo"],
)
def test_what_ctrl_c_cut_short_does_not_end_as_if_whole(
    monkeypatch, tmp_path, words, module, name, answer
):
    """What was measured is kept and told, but a loop over models is to know."""
    monkeypatch.chdir(tmp_path)
    endings = [(True, "", 130), (False, "", 0)]
    if name != "main":
        endings.append((False, "the store is full", 1))
    for interrupted, problem, code in endings:
        returned = answer(interrupted, problem)
        monkeypatch.setattr(
            importlib.import_module(module), name, lambda *_, returned=returned, **__: returned
        )
        assert cli.main(words) == code


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("lm-eval-coupling ")


@pytest.mark.parametrize(
    "backend", ["module://nowhere.backend_inline", "module://", "foo", "", "agg"]
)
def test_a_notebooks_backend_that_is_not_installed_is_forgotten(monkeypatch, backend):
    """A cell's `!lm-eval-coupling fit` in another environment ended in matplotlib's ValueError."""
    monkeypatch.setenv("MPLBACKEND", backend)
    assert cli.main(["show", "/nowhere"]) == 2
    assert os.environ.get("MPLBACKEND") == ("agg" if backend == "agg" else None)


EVALUATES = ("torch", "transformers", "lm_eval", "datasets", "accelerate")
DRAWS = ("matplotlib", "plotly", "scipy", "statsmodels")
READS = ("pandas", "pyarrow", "numpy", "rich")
LOADED = """
import sys
from lm_eval_coupling.cli import main
split = sys.argv.index("--")
try:
    code = main(sys.argv[1:split])
except SystemExit as ended:
    code = ended.code
print("CODE", code, *[name for name in sys.argv[split + 1:] if name in sys.modules])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder, {"arc": task_summary()}, rows=[record()])
    return folder


@pytest.mark.parametrize(
    ("words", "expected", "not_loaded"),
    [
        ("--help", 0, (*EVALUATES, *DRAWS, *READS)),
        ("--version", 0, (*EVALUATES, *DRAWS, *READS)),
        ("show --help", 0, (*EVALUATES, *DRAWS, *READS)),
        ("dance", 2, (*EVALUATES, *DRAWS, *READS)),
        ("show", 2, (*EVALUATES, *DRAWS, *READS)),
        ("measure MODEL --out HERE/out", 2, (*EVALUATES, *DRAWS, *READS)),
        ("show SAVED", 0, (*EVALUATES, *DRAWS)),
        ("show SAVED --task arc --doc 0", 0, (*EVALUATES, *DRAWS)),
        ("show SAVED SAVED --compare", 2, (*EVALUATES, *DRAWS)),  # one run alone
        ("show HERE/nowhere", 2, (*EVALUATES, *DRAWS, *READS)),
        ("report HERE/nowhere", 2, (*EVALUATES, *DRAWS, *READS)),
        ("fit HERE/nowhere", 2, (*EVALUATES, *DRAWS, *READS)),
        ("sweep HERE/nowhere.yaml", 2, (*EVALUATES, *DRAWS, "pandas")),
        ("demo --out HERE/prompts/under", 2, (*EVALUATES, *DRAWS, *READS)),
        ("check HERE/nowhere", 2, (*EVALUATES, *DRAWS)),
        ("vision --model a --data b --out HERE/out --coupling rank=3", 2, (*EVALUATES, *DRAWS)),
        ("vision --model a --data b --out HERE/out --batch_size 0", 2, (*EVALUATES, *DRAWS)),
        ("measure HERE/nowhere HERE/prompts --out HERE/out", 2, (*EVALUATES, *DRAWS)),
    ],
)
def test_a_command_loads_only_what_it_needs(saved, tmp_path, words, expected, not_loaded):
    """Torch and lm-eval take ten seconds to load, and scipy's statistics one."""
    (tmp_path / "prompts").write_text("a\n")
    for name, path in {"SAVED": saved, "HERE": tmp_path}.items():
        words = words.replace(name, str(path))
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words.split(), "--", *not_loaded],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"CODE {expected}", done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_command_starts_gives_up_its_core_soon(monkeypatch):
    """Set before torch is loaded; the runs of a sweep are commands that set it themselves."""
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # restored after the test
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert cli.main(["sweep", "/nowhere.yaml"]) == 2
    assert "GOMP_SPINCOUNT" not in os.environ  # it would override a plan's OMP_WAIT_POLICY
    assert cli.main(["show", "/nowhere"]) == 2
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_shtab_completes_every_command():
    shtab = pytest.importorskip("shtab")
    completions = shtab.complete(cli.command_parser(), "bash")
    (commands,) = re.findall(r"pos_0_choices=\((.*)\)", completions)
    assert {"run", "demo", "show", "fit", "sweep", "measure", "check"} <= {*commands.split()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "x.yaml", "model", "prompts.txt"], "got --config beside MODEL"),
        (["model", "prompts.txt", "--out", "o", "--same-model"], "got --same-model with PROMPTS"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(words, expected, capsys):
    assert cli.main(["measure", *words]) == 2
    assert expected in capsys.readouterr().err
