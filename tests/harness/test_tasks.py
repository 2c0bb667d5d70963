"""The bundled tasks: lm-eval finds and loads them wherever it is started, and their documents and
scoring are right.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from lean_lm_eval import lean_lm_eval

from lm_eval_coupling.harness import plugin

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.config.task import TaskConfig  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT.parent / "shared" / "hf"
LEAVES = {"coupling_demo_choice", "coupling_demo_generate"}
NAMES = LEAVES | {"arc", "coupling_demo", "open_llm_leaderboard_v1"}

# Number of few-shot examples of the Open LLM Leaderboard v1; MMLU has 57 subjects.
LEADERBOARD = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "truthfulqa_mc2": 0,
    "mmlu": 5,
    "winogrande": 5,
    "gsm8k": 5,
}


@pytest.fixture(scope="module")
def demo():
    return TaskManager(include_path=plugin.tasks_folder(), include_defaults=False).load(
        "coupling_demo"
    )["tasks"]


@pytest.fixture(scope="module")
def choice(demo):
    return demo["coupling_demo_choice"]


@pytest.fixture(scope="module")
def generate(demo):
    return demo["coupling_demo_generate"]


LOAD = f"""
import site
site.addsitedir({str(ROOT / "hook")!r})
import json, os, sys
from lm_eval.tasks import TaskManager

manager = TaskManager()
tasks = manager.load("coupling_demo")["tasks"]
paths = {{name: str(entry.yaml_path) for name, entry in manager.task_index.items()}}
found = {{"paths": paths, "documents": {{k: list(t.eval_docs) for k, t in tasks.items()}}}}
if benchmarks := sys.argv[1]:
    os.chdir(benchmarks)
    tasks, found["prompts"] = manager.load("open_llm_leaderboard_v1")["tasks"], {{}}
    for name in {[name.replace("mmlu", "mmlu_anatomy") for name in LEADERBOARD]!r}:
        task = tasks[name]
        task.set_fewshot_seed(0)
        task.build_all_requests(limit=1)
        found["prompts"][name] = task.instances[0].args[0]
    found["leaves"] = len(tasks)
    found["arc"] = {{k: len(task.eval_docs) for k, task in manager.load("arc")["tasks"].items()}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a fresh interpreter with the hook loads beside lm-eval's tasks, off line."""
    folder = tmp_path_factory.mktemp("anywhere")
    inherited = {k: v for k, v in os.environ.items() if k != "LM_EVAL_COUPLING_NO_HOOK"}
    path = os.pathsep.join([lean_lm_eval(), str(ROOT)])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": path}
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(BENCHMARKS) if BENCHMARKS.is_dir() else ""],
        env=inherited | offline | {"HF_HOME": str(folder / "cache")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
def test_found_without_include_path_and_loaded_from_any_folder(loaded, demo):
    ours = plugin.tasks_folder().resolve()
    assert {
        name for name, path in loaded["paths"].items() if ours in Path(path).resolve().parents
    } == NAMES
    assert loaded["documents"] == {name: list(task.eval_docs) for name, task in demo.items()}
    assert set(demo) == LEAVES


def test_no_task_of_lm_eval_has_a_name_of_ours():
    """Of two entries of one name lm-eval keeps one; its index of all takes ten seconds."""
    names = "|".join(NAMES)
    defined = re.compile(rf"^(- *)?((task|group|tag): *)?['\"]?({names})['\"]?$", re.MULTILINE)
    upstream = Path(lm_eval.tasks.__file__).parent
    files = [*upstream.rglob("*.yaml")]
    assert len(files) > 1000
    assert not [file for file in files if defined.search(file.read_text("utf-8"))]


def test_documents_are_read_beside_the_task_files(tmp_path, monkeypatch, demo):
    shutil.copytree(plugin.tasks_folder(), tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    for name in LEAVES:
        data = (
            tmp_path
            / "installed"
            / "coupling_demo"
            / f"{name.removeprefix('coupling_demo_')}.jsonl"
        )
        data.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
        moved = TaskManager(include_path="installed", include_defaults=False).load(name)["tasks"][
            name
        ]
        assert list(moved.eval_docs) == list(demo[name].eval_docs)[:3]


class TestChoice:
    def test_documents_are_well_formed(self, choice):
        documents = list(choice.eval_docs)
        assert len(documents) == 200
        assert len({document["question"].casefold() for document in documents}) == 200
        for document in documents:
            choices = document["choices"]
            assert document["question"].strip() == document["question"] and document[
                "question"
            ].endswith("?")
            assert all(text and text == text.strip() for text in choices), document
            assert len({text.casefold() for text in choices}) == len(choices) == 4, document
            assert document["answer"] in range(4), document

    def test_every_four_documents_have_each_gold_position_once(self, choice):
        """So that neither a position nor a ``--limit`` gives the answers away."""
        golds = [document["answer"] for document in choice.eval_docs]
        assert all(sorted(golds[i : i + 4]) == [0, 1, 2, 3] for i in range(0, len(golds), 4))

    @pytest.mark.parametrize("extreme", [min, max])
    def test_length_does_not_give_the_answer_away(self, choice, extreme):
        """Choosing by length, where ties share a point, comes out near chance: 0.25, standard error
        0.03.
        """
        points = []
        for document in choice.eval_docs:
            lengths = [len(text) for text in document["choices"]]
            points.append(
                (lengths[document["answer"]] == extreme(lengths)) / lengths.count(extreme(lengths))
            )
        assert sum(points) / len(points) < 0.35

    def test_is_asked_and_scored_as_written(self, choice):
        for document in choice.eval_docs:
            assert choice.doc_to_text(document) == f"Question: {document['question']}\nAnswer:"
            assert choice.doc_to_choice(document) == document["choices"]
            for preferred in range(4):
                likelihoods = [(-1.0 if i == preferred else -50.0, False) for i in range(4)]
                right = float(preferred == document["answer"])
                assert choice.process_results(document, likelihoods) == {
                    "acc": right,
                    "acc_norm": right,
                }


class TestGenerate:
    def test_documents_are_well_formed(self, generate):
        documents = list(generate.eval_docs)
        assert len(documents) == 102
        assert len({document["question"].casefold() for document in documents}) == 102
        for document in documents:
            assert document["question"] == document["question"].strip() != ""
            assert re.fullmatch(r"\w+", document["answer"]), document
            assert document["answer"].casefold() not in re.findall(
                r"\w+", document["question"].casefold()
            ), document

    def test_continues_the_sentence_for_a_few_tokens(self, generate):
        document = generate.eval_docs[0]
        assert generate.doc_to_text(document) == document["question"]
        assert generate.doc_to_target(document) == document["answer"]
        assert generate.config.generation_kwargs["max_gen_toks"] <= 8

    @pytest.mark.parametrize(
        "output",
        [
            "{}",
            " {}.",
            " {}, as is",
            ' "{}"',
            " **{}**",
            " the {}",
            " and {}",
            "It is {}",
            "The answer is {}",
            " {} is it",
        ],
    )
    def test_every_answer_scores(self, generate, output):
        for document in generate.eval_docs:
            for answer in (
                document["answer"],
                document["answer"].lower(),
                document["answer"].upper(),
            ):
                assert score(generate, document, output.format(answer)) == 1.0, document

    @pytest.mark.parametrize(
        ("output", "expected"),
        [
            ("Paris", 1.0),
            (" paris.", 1.0),
            ("The capital is Paris", 1.0),
            (" The capital of France is Paris.", 1.0),
            (" Paris, a city on the Seine, and Lyon", 1.0),
            ("", 0.0),
            (" ...", 0.0),
            (" Lyon", 0.0),
            (" Lyon or Paris", 0.0),
            ("The capital is Lyon, not Paris", 0.0),
            (" Parisian", 0.0),
            (" the capital of France.", 0.0),
        ],
    )
    def test_what_a_model_may_say_of_the_capital_of_france(self, generate, output, expected):
        (document,) = (
            d for d in generate.eval_docs if d["question"].endswith("the capital of France is")
        )
        assert score(generate, document, output) == expected


def score(task, document, output):
    """Through the task's own filter, as lm-eval does it."""
    instance = Instance(
        "generate_until", document, (task.doc_to_text(document), {}), 0, resps=[output]
    )
    task._instances = [instance]
    task.apply_filters()
    (filtered,) = instance.filtered_resps.values()
    return task.process_results(document, [filtered])["exact_match"]


@pytest.fixture(scope="module")
def manager():
    """Ours beside some of upstream's tasks: to index them all takes ten seconds."""
    upstream = Path(lean_lm_eval()) / "lm_eval" / "tasks"
    return TaskManager(include_path=[upstream, plugin.tasks_folder()], include_defaults=False)


@pytest.fixture
def without_data(monkeypatch):
    """Tasks are configured but read no documents."""

    def configure(self, config):
        config = {k: v for k, v in config.items() if k != "include"}
        self._config = TaskConfig(**config)

    monkeypatch.setattr(ConfigurableTask, "__init__", configure)


def shots(loaded):
    return {name: task.config.num_fewshot for name, task in loaded["tasks"].items()}


@pytest.mark.usefixtures("without_data")
class TestGroups:
    def test_leaderboard_has_six_benchmarks_with_its_numbers_of_examples(self, manager):
        loaded = manager.load("open_llm_leaderboard_v1")
        assert loaded["group_map"]["open_llm_leaderboard_v1"] == list(LEADERBOARD)
        found = Counter(
            (re.sub("^mmlu_.*", "mmlu", name), count) for name, count in shots(loaded).items()
        )
        assert found == {
            (name, count): 57 if name == "mmlu" else 1 for name, count in LEADERBOARD.items()
        }

    def test_leaderboard_leaves_upstreams_tasks_alone(self, manager):
        names = ["arc_challenge", "hellaswag", "winogrande", "mmlu_anatomy"]
        before = shots(manager.load(names))
        manager.load("open_llm_leaderboard_v1")
        assert shots(manager.load(names)) == before == dict.fromkeys(names)

    def test_leaderboard_mixes_no_metrics(self, manager):
        """A mean over leaf tasks would be MMLU's 57 subjects and little else."""
        groups = manager.load("open_llm_leaderboard_v1")["groups"]
        assert not groups["open_llm_leaderboard_v1"].has_aggregation
        assert groups["mmlu"].has_aggregation

    def test_arc_weighs_its_two_parts_by_size(self, manager):
        loaded = manager.load("arc")
        assert set(loaded["tasks"]) == {"arc_easy", "arc_challenge"}
        scores = {
            "arc_easy": {"acc,none": 0.75, "acc_norm,none": 0.5, "sample_len": 300},
            "arc_challenge": {"acc,none": 0.35, "acc_norm,none": 0.3, "sample_len": 100},
        }
        found = loaded["groups"]["arc"].aggregate(scores)
        assert found["acc,none"] == pytest.approx(0.65)
        assert found["acc_norm,none"] == pytest.approx(0.45)


@pytest.mark.slow
@pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="needs local copies of the benchmarks in ../shared/hf"
)
def test_groups_load_their_data(loaded):
    """The first prompt of each benchmark holds its own few-shot examples and question."""
    assert loaded["leaves"] == 62
    assert loaded["arc"] == {"arc_easy": 2376, "arc_challenge": 1172}
    prompts = loaded["prompts"]
    assert prompts["arc_challenge"].count("Question:") == 26
    assert prompts["hellaswag"].count("\n\n") == 10
    assert (
        prompts["truthfulqa_mc2"].count("Q:") == 7
    )  # six of them belong to the benchmark's own prompt
    assert prompts["mmlu_anatomy"].count("Answer:") == 6
    assert prompts["winogrande"].count("\n\n") == 5
    assert prompts["gsm8k"].count("Question:") == 6
