"""Plans: everything wrong is told at once, and what is right is read as its writer meant it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import plan as plans
from lm_eval_coupling.sweep import yaml12
from lm_eval_coupling.sweep.units import Unit

PLAN = """
models:
  - model: EleutherAI/pythia-410m
    revisions: [step1000, step143000]
    args: "dtype=bfloat16,max_memory={0: 10,1: 20},parallelize=True"
    facts: {family: pythia, training_tokens: 300e9, released: 2023-07-02}
  - some/other
tasks: [arc_easy, {task: gsm8k, num_fewshot: 5}]
coupling: {ranks: 10+30+50, limit: 100}
lm_eval: {batch_size: 8, limit: 20}
output: OUT
run: {on: local, workers: 2}
"""


def read(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return plans.read(file)


def problems(tmp_path, text):
    with pytest.raises(plans.PlanError) as error:
        read(tmp_path, text)
    return error.value.problems


def test_a_plan_is_read(tmp_path):
    plan = read(tmp_path, PLAN)
    assert [(unit.model, unit.revision) for unit in plan.units] == [
        ("EleutherAI/pythia-410m", "step1000"),
        ("EleutherAI/pythia-410m", "step143000"),
        ("some/other", "main"),
    ]
    assert plan.units[0].arguments == {
        "dtype": "bfloat16",
        "max_memory": {0: 10, 1: 20},
        "parallelize": True,
    }
    assert plan.units[0].facts == {
        "family": "pythia",
        "training_tokens": 3e11,
        "released": 2023.499,
    }
    assert [(task.name, task.num_fewshot) for task in plan.tasks] == [
        ("arc_easy", None),
        ("gsm8k", 5),
    ]
    assert plan.run == plans.Local(workers=2)


def test_everything_wrong_is_told_at_once(tmp_path):
    text = """
models:
  - {model: a, revision: x, facts: {tokens: 1, famly: b, model: c}}
  - {model: b, args: foo}
  - {model: c, args: {pretrained: d}}
  - {model: e, args: "dtype=float32,dtype=float16"}
  - c/d
  - c/d
taks: [arc_easy]
coupling: {coupling_ranks: 3}
lm_eval: {use_cache: x, tasks: y}
run: {on: slurm, parttition: x}
"""
    found = "\n".join(problems(tmp_path, text))
    for part in (
        "unknown key models[0].revision, did you mean revisions?",
        "models[0].facts.tokens, did you mean training_tokens?",
        "models[0].facts.famly, did you mean family?",
        "models[0].facts.model, which results have themselves",
        "models[1].args: 'foo'",
        "pretrained among models[2].args; use model",
        "got dtype twice in models[3].args",
        "c/d at revision main twice",
        "unknown key taks, did you mean tasks?",
        "got no tasks",
        "expected it without its prefix: ranks",
        "use run.keep_scores, because lm-eval's cache does not know",
        "lm_eval.tasks, which is not for lm_eval here",
        "got no output",
        "unknown key run.parttition, did you mean partition?",
        "got no run.hours",
    ):
        assert part in found, part
    assert found.count("\n") == 15


@pytest.mark.parametrize(
    ("run", "part"),
    [
        ("{on: cloud}", "run.on: 'cloud', expected local or slurm"),
        ("{workers: 0}", "run.workers: 0, expected a whole number of 1 or more"),
        ("{workers: true}", "run.workers: True"),
        ("{partition: debug}", "unknown key run.partition"),
        ("{on: slurm, hours: -1}", "run.hours: -1, expected a number above 0"),
        ("{keep_scores: 3}", "run.keep_scores: 3, expected true or false"),
        ("[1]", "got [1] for run"),
    ],
)
def test_run_is_checked(tmp_path, run, part):
    assert part in "\n".join(problems(tmp_path, f"models: a\ntasks: b\noutput: c\nrun: {run}"))


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("coupling: {limit: -5}", "coupling_limit=-5, expected a number of documents"),
        ("coupling: {limit: 1.5}", "coupling_limit=1.5"),
        ("coupling: {limit: yes}", "coupling_limit='yes'"),
        ("coupling: {ranks: [0]}", "expected positive whole numbers"),
        ("coupling: {ranks: 10+-3}", "expected positive whole numbers"),
        ("coupling: {ranks: [2.5]}", "coupling_ranks=2.5"),
        ("coupling: {ranks: [true]}", "coupling_ranks=True"),
        ("coupling: {seed: 1e-3}", "coupling_seed=0.001"),
        ("coupling: {window: 0}", "coupling_window=0"),
        ("coupling: {trajectories: no}", "coupling_trajectories='no', expected 1 or 0"),
        ("coupling: {untrained: 0}", "write coupling_untrained_seed=0"),
        ("coupling: {position: 1.5}", "coupling_position=1.5"),
        ("coupling: {layers: middle}", "coupling_layers=middle"),
        ("coupling: {layers: [0, true]}", "coupling_layers=0+True"),
        ("coupling: {tokens: [last0]}", "coupling_tokens=last0"),
        ("coupling: {measures: [deepth]}", "unknown measure 'deepth'"),
        ("coupling: {limt: 3}", "unknown key coupling.limt, did you mean limit?"),
        ("lm_eval: {limit: -5}", "lm_eval.limit: -5, expected a number above 0"),
        ("lm_eval: {limit: '3'}", "lm_eval.limit: '3'"),
        ("lm_eval: {limit: true}", "lm_eval.limit: True"),
        ("lm_eval: {num_fewshot: -1}", "expected a whole number of 0 or more"),
        ("lm_eval: {num_fewshot: 2.5}", "expected a whole number of 0 or more"),
        ("lm_eval: {batch_size: 0}", "expected a whole number of 1 or more, or auto"),
        ("lm_eval: {batch_size: many}", "expected a whole number of 1 or more, or auto"),
        ("lm_eval: {batch_size: auto:0}", "expected a whole number of 1 or more, or auto"),
        ("lm_eval: {max_batch_size: -1}", "expected a whole number of 1 or more"),
        ("lm_eval: {seed: -1}", "expected a whole number of 0 or more, or 4 of them"),
        ("lm_eval: {seed: [1, 2]}", "expected a whole number of 0 or more, or 4 of them"),
        ("lm_eval: {trust_remote_code: no}", "trust_remote_code: 'no', expected true or false"),
        ("lm_eval: {log_samples: 0}", "log_samples: 0, expected true or false"),
        ("lm_eval: {apply_chat_template: off}", "expected true, false or the name"),
    ],
)
def test_numbers_and_switches_are_checked_when_a_plan_is_read(tmp_path, where, part):
    """They were accepted by `sweep --check`, and refused by every unit, or taken for true."""
    (problem,) = problems(tmp_path, f"models: a\ntasks: b\noutput: c\n{where}")
    assert part in problem


@pytest.mark.parametrize(
    "where",
    [
        "coupling: {limit: 0}",
        "coupling: {limit: all, ranks: 10+30, seed: -3, layers: [0, -1], tokens: [0, -1]}",
        "coupling: {untrained_seed: 0, trajectories: false, position: [-1, last4], window: 3}",
        "lm_eval: {limit: 0.5, num_fewshot: 0, batch_size: auto:4, seed: [0, 1, 2, 3]}",
        "lm_eval: {apply_chat_template: true, fewshot_as_multiturn: false, seed: 0}",
    ],
)
def test_numbers_and_switches_that_are_right(tmp_path, where):
    read(tmp_path, f"models: a\ntasks: b\noutput: c\n{where}")


def test_settings_of_a_model_are_checked_when_a_plan_is_read(tmp_path):
    """Those of the plan count for every model: each may be right and both together not."""
    model = "{model: m, args: {coupling_limit: -5, coupling_rnks: 3, dtype: float32}}"
    told = problems(tmp_path, f"models: [{model}, b]\ntasks: b\noutput: c")
    assert len(told) == 2 and "did you mean coupling_ranks?" in told[0]
    assert "args of m: got coupling_limit=-5" in told[1]
    text = "models: [{model: m, args: 'coupling_untrained_seed=1'}]\ntasks: b\noutput: c\n"
    (together,) = problems(tmp_path, text + "coupling: {untrained: seed0}")
    assert "args of m: got coupling_untrained=seed0" in together


def test_yaml_means_what_people_mean(tmp_path):
    """In PyYAML's YAML 1.1 `on` is true, 300e9 a text, 0001 the number one, and keys may repeat."""
    assert yaml12.load(
        "{on: local, a: 300e9, b: 0001, c: no, d: 1e-3, e: -2, f: true, g: ~, h: 12:30}"
    ) == {
        "on": "local",
        "a": 3e11,
        "b": "0001",
        "c": "no",
        "d": 1e-3,
        "e": -2,
        "f": True,
        "g": None,
        "h": "12:30",
    }
    with pytest.raises(yaml.YAMLError, match="stands twice"):
        yaml12.load("{a: 1, a: 2}")
    with pytest.raises(CouplingError, match="cannot be read as a plan"):
        read(tmp_path, "models: [")
    with pytest.raises(CouplingError, match="cannot be read"):
        plans.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "value",
    [
        *('!!int ""', '!!int "+"', '!!int "0x"', "!!int 0x10", "!!int 1:x", '!!float ""', "!!int"),
        *("!!float 1_0", "!!bool maybe", "!!bool yes", "!!null x", "!!timestamp x", "2024-13-45"),
        *("!!map [1]", "!!map ab", "!!map", "!!seq {b: 1}", "!!seq x", "!!str [x]", "!!null {}"),
        *("!!int {!!value x: 5}", "{<<: !!map x}", "{!!merge x: {b: 1}}", "{!!value x: 1}"),
        *(
            "!!set {b}",
            "!!binary x",
            '"\\UFFFFFFFF"',
            '"\\U00110000"',
            "!<tag:yaml.org,2002:int> x",
        ),
    ],
)
def test_a_value_that_is_not_of_its_tag_is_refused_with_its_line(tmp_path, value):
    """Each was a traceback, an error without a line, or a value of YAML 1.1."""
    with pytest.raises(CouplingError, match=r"cannot be read as a plan \(.* at line 2, column"):
        read(tmp_path, f"tasks: t\nmodels: {value}\n")


def test_a_value_may_have_the_tag_of_its_type(tmp_path):
    assert yaml12.load(
        "{a: !!int 5, b: !!float 1, c: !!str 5, d: !!bool true, e: !!null ~, f: !!seq [!!map {}]}"
    ) == {"a": 5, "b": 1.0, "c": "5", "d": True, "e": None, "f": [{}]}


def test_a_revision_that_became_a_number_is_refused(tmp_path):
    """A commit such as 12e45678 is an infinite number in YAML and would name another revision."""
    assert "put numbers in quotes" in "\n".join(
        problems(tmp_path, "models: [{model: a, revisions: [12e45678]}]\ntasks: b\noutput: c")
    )
    plan = read(tmp_path, "models: [{model: a, revisions: ['12e45678', 20]}]\ntasks: b\noutput: c")
    assert [unit.revision for unit in plan.units] == ["12e45678", "20"]


def test_revisions_may_have_facts_of_their_own(tmp_path):
    model = "{model: a, facts: {family: x}, revisions: {s1: {training_tokens: 2e6}, s2: }}"
    text = f"models: [{model}]\ntasks: b\noutput: c"
    assert [unit.facts for unit in read(tmp_path, text).units] == [
        {"family": "x", "training_tokens": 2e6},
        {"family": "x"},
    ]


def test_folders_of_a_pattern_are_models_in_order_of_their_numbers(tmp_path):
    for step in (0, 10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    plan = read(tmp_path, f"models: '{tmp_path}/checkpoint-*'\ntasks: b\noutput: c")
    assert [unit.model.split("-")[-1] for unit in plan.units] == ["0", "9", "10", "100"]
    assert (
        "there is none"
        in problems(tmp_path, f"models: '{tmp_path}/nothing-*'\ntasks: b\noutput: c")[0]
    )


@pytest.mark.parametrize("name", ["lr[0.1]", "a[b]c", "[0]", "x?y", "st*r"])
def test_brackets_of_a_folders_name_are_no_pattern(tmp_path, name):
    folder = tmp_path / "runs" / name
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
    (folder / "config.json").write_text("{}")

    def models(model):
        return [
            unit.model for unit in read(tmp_path, f"models: '{model}'\ntasks: b\noutput: c").units
        ]

    assert models(folder) == [str(folder)]
    steps = [str(folder / f"checkpoint-{step}") for step in (2, 10)]
    assert models(folder / "checkpoint-*") == steps


def test_a_pattern_with_brackets_is_one_where_no_folder_has_that_name(tmp_path):
    for name in ("seed1", "seed2", "seed9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    plan = read(tmp_path, f"models: '{tmp_path}/seed[12]'\ntasks: b\noutput: c")
    assert [unit.label.split("/")[-1] for unit in plan.units] == ["seed1", "seed2"]


def test_a_home_folder_is_written_out(tmp_path, monkeypatch):
    """transformers does not know `~`, so that a plan passed its check and every unit failed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plan = read(tmp_path, "models: ~/model\ntasks: b\noutput: ~/out")
    assert plan.units[0].model == str(tmp_path / "model") and plan.output == tmp_path / "out"


def test_a_long_label_is_cut_and_stays_unique():
    first, second = (
        Unit(model="/".join(["x" * 200, end * 150]), arguments={}, facts={}) for end in "yz"
    )
    assert len(first.name) < 200 and first.name != second.name


def test_a_unit_keeps_its_name(tmp_path):
    """Results lie under it: other models of a plan, and their order, must not change it."""
    first = Unit(model="a/b", revision="main", arguments={"x": 1, "y": 2}, facts={})
    again = Unit(model="a/b", revision="main", arguments={"y": 2, "x": 1}, facts={"family": "z"})
    others = [
        Unit(model=m, revision=r, arguments=a, facts={})
        for m, r, a in (("a-b", "main", {}), ("a/b", "s", {}), ("a/b", "main", {}))
    ]
    assert first.name == again.name == "a--b-e91a70ad"
    assert len({unit.name for unit in [first, *others]}) == 4
    assert all("/" not in unit.name for unit in [first, *others])


def test_fewshot_for_all_and_for_one_are_refused_together(tmp_path):
    text = "models: a\ntasks: [{task: b, num_fewshot: 5}]\nlm_eval: {num_fewshot: 3}\noutput: c"
    assert "which it would override" in problems(tmp_path, text)[0]


@pytest.mark.parametrize(("name", "units"), [("laptop", 3), ("pythia", 42), ("paper", 43)])
def test_plans_of_the_documentation_can_be_read(name, units):
    assert (
        len(plans.read(Path(__file__).parents[2] / "docs" / "plans" / f"{name}.yaml").units)
        == units
    )


def test_the_sweep_itself_is_light():
    """It waits on login nodes for days: what measures and what evaluates is loaded by the runs."""
    code = "import sys, lm_eval_coupling.sweep.command; "
    code += "print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ("torch", "lm_eval", "transformers", "numpy", "pandas", "submitit", "huggingface_hub")
    found = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_a_dry_run_of_the_measuring_is_no_sweep(tmp_path):
    assert (
        "leaves no results"
        in problems(tmp_path, "models: a\ntasks: b\ncoupling: {dry_run: true}\noutput: c")[0]
    )
