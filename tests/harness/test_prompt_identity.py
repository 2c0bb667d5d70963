"""What makes prompts and their tokens is told apart by what it does, in every process alike."""

import dataclasses
import functools
import os
import re
import runpy
import subprocess
import sys
import types
from collections import deque
from pathlib import Path

import pytest
import tiny
from lm_eval.config.task import FewshotConfig, TaskConfig
from lm_eval.tasks import TaskManager
from rich.console import Console
from task_sources import sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import CouplingError, load_records, load_runs
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.harness.identity import prompt_identity
from lm_eval_coupling.harness.plain import digest
from lm_eval_coupling.report.data import gather
from lm_eval_coupling.report.terminal import show

ANSWERS = {
    "as it is": "",
    "other answers": 'doc_to_target: "{{(gold + 1) % 4}}"\n',
    "other examples": "fewshot_config:\n  sampler: first_n\n",
    "answers of examples only": 'fewshot_config:\n  doc_to_target: "{{(gold + 1) % 4}}"\n',
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Makes a manager of tiny_choice with lines added at its end, which override earlier ones."""

    def make(lines):
        folder = tmp_path_factory.mktemp("tasks")
        tiny.save_task(folder, "choice")
        file = folder / "tiny_choice.yaml"
        text = file.read_text()
        file.write_text(
            (text.replace("doc_to_target: gold\n", "") if lines.startswith("doc_to") else text)
            + lines
        )
        return TaskManager(include_path=str(folder), include_defaults=False)

    return make


@pytest.fixture(scope="module")
def runs(home, changed, tmp_path_factory):
    """One model and task twice, in every way to answer its examples; the first way of all a second
    time.
    """
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from lm_eval_coupling.harness import plugin

    plugin.install()
    out = tmp_path_factory.mktemp("out")
    digests = []
    for name, lines in [*ANSWERS.items(), ("again", "")]:
        arguments = {
            "pretrained": str(home / "float32"),
            "coupling_ranks": "2",
            "coupling_limit": 2,
            "device": "cpu",
        }
        tracker = EvaluationTracker(output_path=str(out / name))
        found = lm_eval.simple_evaluate(
            model="coupling-hf",
            model_args=arguments | {"coupling_store": str(out / "store.sqlite")},
            tasks=["tiny_choice"],
            task_manager=changed(lines),
            num_fewshot=2,
            bootstrap_iters=2,
            evaluation_tracker=tracker,
        )
        digests.append(found["config"]["coupling"]["prompts"]["tiny_choice"]["digest"])
        tracker.save_results_aggregated(results=found, samples=found.pop("samples"))
    return out, digests


def test_answers_in_the_examples_keep_runs_apart(runs):
    """They stand in every prompt; runs that differ in nothing else were one, the newer."""
    out, digests = runs
    assert len(set(digests)) == len(ANSWERS) and digests[-1] == digests[0]
    assert len(load_runs(out)) == len(ANSWERS) == load_records(out)["prompting"].nunique()
    assert len(gather(out, mixed="keep")["rows"]) == len(ANSWERS)
    with pytest.raises(CouplingError, match="different prompts .*task text"):
        fit_runs(out, resamples=9)
    with Console(width=200, record=True, file=open(os.devnull, "w")) as console:
        show([out], console=console)
    assert console.export_text().count("task text") >= len(ANSWERS)


class Slots:
    __slots__ = ("strength",)

    def __init__(self, strength):
        self.strength = strength


@dataclasses.dataclass
class Field:
    strength: float = dataclasses.field(init=False)


DEFAULTS = [lambda doc, k=k: doc[k] for k in (1, 2)]
KINDS = {
    "default": lambda k: DEFAULTS[k - 1],
    "cached closure": lambda k: functools.lru_cache(lambda doc: doc[k]),
    "keys of two types": lambda k: {1: "a", "1": "b"} if k == 1 else {1: "b", "1": "b"},
    "slots": Slots,
    "long pattern": lambda k: re.compile("a" * 300 + str(k)),
    "queue": lambda k: deque([k]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_setting_counts(kind):
    assert digest([KINDS[kind](1)]) == digest([KINDS[kind](1)]) != digest([KINDS[kind](2)])


def test_folders_are_left_out_in_any_container():
    assert digest(deque([Path("/here/one")])) == digest(deque([Path("/there/one")]))
    assert digest([Field()])  # a field that was never set


def test_functions_are_what_they_say(tmp_path):
    """By its name alone an edited function was the one before, and a function in nested settings
    was where it lay.
    """
    a, b = sources(tmp_path / "a"), sources(tmp_path / "b")
    typed = {}
    exec("def one(doc):\n    return doc['c']\n\ntwo = lambda doc: doc['d']", typed)
    different = [
        a.one,
        a.other,
        a.made("x"),
        a.made("y"),
        functools.partial(a.made, "x"),
        functools.partial(a.made, "y"),
    ]
    different += [
        typed["one"],
        typed["two"],
        str.upper,
        FewshotConfig(),
        FewshotConfig(doc_to_target=a.one),
    ]
    different += ["one", {"one": 1}, {"one", "two"}, None]
    assert len({digest([value]) for value in different}) == len(different)
    assert digest([a.one, a.made({"x"})]) == digest([b.one, b.made({"x"})])
    assert digest(FewshotConfig(doc_to_target=a.one)) == digest(FewshotConfig(doc_to_target=b.one))
    assert digest([Path("/here/one")]) == digest([Path("/there/one")])
    knot = []
    knot.append(knot)
    assert digest(knot)


PROCESS = """
from pathlib import Path
from lm_eval.config.task import FewshotConfig
from lm_eval_coupling.harness.plain import digest
from task_sources import sources
found = sources(Path(__file__).with_suffix(""))
values = [FewshotConfig(doc_to_target=found.one), {"c", "b", "a"}]
print(digest([*values, found.made(frozenset("abc")), lambda doc: doc]))
"""


def test_digests_are_the_same_in_every_process(tmp_path, capsys):
    """Neither the order of a set nor where an object lies is part of them."""
    here, there = (tmp_path / name for name in ("here.py", "there.py"))
    for script in (here, there):
        script.write_text(PROCESS)
    runpy.run_path(str(here), run_name="__main__")
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]
    # Sets have another order there than here, where the seed is random.
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, there],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    digests = [out.strip().splitlines()[-1] for out in (capsys.readouterr().out, done.stdout)]
    assert digests[0] == digests[1] and len(digests[0]) == 16


@pytest.fixture(scope="module")
def encoding(home):
    from lm_eval_coupling.harness.lm import CouplingLM

    folder = str(home / "float32")
    model = AutoModelForCausalLM.from_pretrained(folder)

    def made(change=None, pretrained=model):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if change is not None:
            change(tokenizer)
        return CouplingLM(pretrained, tokenizer=tokenizer, device="cpu", coupling_limit=0).encoding

    return made


def _with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )


def _with_template(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"


def test_a_tokenizer_object_is_what_it_makes_of_texts(home, encoding):
    """Prompts of one more token went under the same name: any object counted as the model's own."""
    assert encoding() == encoding(pretrained=str(home / "float32")) == []
    others = {
        change: encoding(change)
        for change in (_with_bos, _with_template, lambda t: t.add_tokens(["sky"]))
    }
    assert all(
        len(words) == 1 and words[0].startswith("tokenizer=") and "/" not in words[0]
        for words in others.values()
    )
    assert len({words[0] for words in others.values()}) == 3
    assert encoding(_with_bos) == others[_with_bos]


def facts(metadata, output_type="multiple_choice", generation=None, **arguments):
    """What is recorded of a task with this metadata, on a model with these arguments."""
    lm = types.SimpleNamespace(
        encoding=[], max_gen_toks=64, argument_names={"pretrained", *arguments}
    )
    config = TaskConfig(
        task="t", metadata=metadata, output_type=output_type, generation_kwargs=generation
    )
    task = types.SimpleNamespace(config=config, VERSION=(metadata or {}).get("version", 0))
    return prompt_identity(lm, task, None, {})


def test_metadata_that_makes_documents_tells_runs_apart():
    """RULER's lengths come from --metadata: runs of several lengths were one, the newest."""
    short, long = (facts({"max_seq_lengths": [n]}) for n in (4096, 8192))
    assert short["metadata"] == {"max_seq_lengths": [4096]}
    assert short["digest"] != long["digest"] != facts(None)["digest"]
    first, second = (facts({"version": version}) for version in ("1.0.0", "2.0.0"))
    assert first["digest"] != second["digest"] and first["metadata"] is None


def test_a_models_arguments_in_the_metadata_are_not_the_tasks():
    """lm-eval adds them to every task's metadata; two models would have no prompt in common."""
    first, second = (
        facts(
            {"pretrained": name, "dtype": "auto", "coupling_ranks": 4, "my_own": name, "n": 3},
            my_own=name,
        )
        for name in ("org/a", "org/b")
    )
    assert first == second and first["metadata"] == {"n": 3}


def test_room_for_generation_cuts_contexts():
    one, other = (
        facts(None, "generate_until", {"until": ["\n"], "max_gen_toks": n}) for n in (8, 256)
    )
    assert (one["room_for_generation"], other["room_for_generation"]) == (8, 256)
    assert one["digest"] != other["digest"]
    assert facts(None, "generate_until", {})["room_for_generation"] == 64
    assert facts(None)["room_for_generation"] is None
