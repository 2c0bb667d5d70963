"""Every command of the pages is one that its parser takes, and the README's Python code runs."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import tiny
from saved_runs import record, save, task_summary

from lm_eval_coupling import cli
from lm_eval_coupling.runs.options import Options

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "analysis").glob("*.md")),
]
TEXT = {page: page.read_text("utf-8") for page in PAGES}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(name):
    """Words of the commands of one program, each once, as its shell hands them over."""
    lines = []
    for text in TEXT.values():
        for block in blocks(text, "bash"):
            lines += block.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(lm-eval-coupling \w+ [^`…]+)`", text)
    split = (tuple(shlex.split(line, comments=True)) for line in lines)
    return sorted({words[1:] for words in split if words[:1] == (name,)})


@pytest.mark.parametrize("words", commands("lm-eval-coupling"), ids=" ".join)
def test_our_command_takes_it(words, capsys):
    """Placeholders such as MODEL stay; nothing is run."""
    try:
        assert callable(cli.command_parser().parse_args(words).command)
    except SystemExit as ended:
        assert words == ("--version",) and ended.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", commands("lm_eval"), ids=" ".join)
def test_lm_evals_command_takes_it(words, monkeypatch):
    from lm_eval._cli.harness import HarnessCLI

    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    options = HarnessCLI().parse_args()
    rest = dict(options.model_args)
    Options.take_from(rest)
    assert [*rest] == ["pretrained"] and options.model in ("hf", "coupling-hf")


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {words[0] for words in commands("make")}
    assert named <= targets and {"test", "quick", "bounds"} <= named


def test_the_python_code_of_the_readme(tmp_path, monkeypatch):
    """With a folder in place of the model's name on the hub."""
    monkeypatch.chdir(tmp_path)
    rows = [record(doc_id=i) for i in range(3)]
    save(tmp_path / "results", {"arc": task_summary()}, rows=rows)
    model = tiny.save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    (code,) = blocks(TEXT[ROOT / "README.md"], "python")
    names: dict = {}
    exec(code.replace('"EleutherAI/pythia-410m"', repr(model)), names)
    assert names["record"].reason is None and 0 < names["record"].coupling(10) < 1
    expressions = [line.split("  #")[0] for line in code.splitlines() if "  #" in line]
    values = [eval(line, names) for line in expressions]
    assert values[0][1] == (3, 2, 2) and values[1].shape == (2, 64, 64)
    assert isinstance(values[2], pd.DataFrame) and len(values[2]) == 3 and len(values[3]) == 1
