"""Plans that somebody made to break the reader: a plan or one sentence, within a second."""

import json
import random
import time

import pytest
import yaml

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import plan as plans
from lm_eval_coupling.sweep.done import done
from lm_eval_coupling.sweep.request import configuration
from lm_eval_coupling.sweep.slurm import parameters

PLAN = """\
models:
  - org/first
  - model: org/second
    revisions: {step1: {training_tokens: 2e9}, step2: }
    args: {dtype: bfloat16, max_memory: {0: 10}}
    facts: {family: x, tuned: yes, released: 2023-04-03, n_params: 100, own: 3.5}
tasks: [one, {task: two, num_fewshot: 5}]
coupling: {ranks: 10+30, limit: 100, layers: -1, store: store.sqlite}
lm_eval: {batch_size: 8, limit: 0.5, include_path: tasks, gen_kwargs: {temperature: 0}}
output: OUT
run: {on: slurm, hours: 1, partition: p, memory_gb: 2, at_once: 2, setup: [a, b],
      options: {nice: 100}, environment: {HF_HUB_OFFLINE: 1, HF_TOKEN: secret}}
"""
LOCAL = "{on: local, workers: 2, devices: [0, 1], threads: 3, keep_scores: true}"
NASTY = [
    *("", "~", "~nouser/x", "null", "true", "yes", "-1", "0", "1e400", ".nan", ".inf", "9" * 5000),
    *("[]", "{}", "[[]]", "[1, [2]]", "{a: {b: c}}", "{1: 2}", "{[1]: 2}", "? [a]", "a: b: c"),
    *("*a", "&a [*a]", "&a {b: *a}", "<<: *a", "!!set {a}", "!!int x"),
    "!!python/object:os.system x",
    *('"\\0"', '"\\ud800"', '"\\x1b]0;x\\x07"', '"a\\nb"', '"#SBATCH\\n--x"', f"'{'x' * 3000}'"),
    *("2023-04-03", "2023-13-45", "12:30:45", "0x10", "0o7", "1_000", "1,000", "..", "../../etc"),
    *("/", "/dev/null", "/dev/zero", "[" * 500, "{a: " * 500, "- " * 500, "|", ">-", "---"),
    "%YAML 9",
    *("\t", "\x00", "\x1b", "\x85", "\u2028", "é", "日本", "𝔘", "a" * 300, "$(id)", "`id`"),
    "a" * 300 + "/" + "b" * 300,
    *("org/[1]*", "**", "[!a]", "a@b", "a,b", "=x", "x=", "a=[1,b=2", "{a=1}", "None", "on", "off"),
]  # fmt: skip


def mutated(rng):
    """One plan with up to four faults: values replaced, lines moved, characters changed."""
    text = PLAN if rng.random() < 0.7 else PLAN[: PLAN.index("run:")] + f"run: {LOCAL}\n"
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(6)
        if kind <= 1:  # a scalar, or what stands after a colon, becomes something else
            places = [i for i, letter in enumerate(text) if letter in ":[,"]
            start = rng.choice(places) + 1
            end = min((text.find(c, start) for c in ",]}\n" if text.find(c, start) > 0), default=-1)
            text = f"{text[:start]} {rng.choice(NASTY)}{text[end:]}"
        elif kind == 2:
            lines = text.splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines)), lines[rng.randrange(len(lines))])
            text = "".join(lines)
        elif kind == 3:
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(NASTY) + text[place:]
        elif kind == 4:
            place = rng.randrange(len(text))
            text = text[:place] + chr(rng.randrange(256)) + text[place + 1 :]
        else:
            start = rng.randrange(len(text))
            text = text[:start] + text[start + rng.randrange(30) :]
    return text


def refusal(text, folder):
    """Read a plan; return the sentence that refuses it, or None after using all of it."""
    file = folder / "plan.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        plan = plans.read(file)
    except CouplingError as error:
        return str(error)
    for unit in plan.units:
        made = configuration(plan, unit, plan.tasks, 2)
        assert yaml.safe_load(yaml.safe_dump(made)) == made
        json.dumps(made["metadata"])
        assert not done(plan, unit).complete
    if isinstance(plan.run, plans.Slurm):
        assert all("\n" not in str(v) for k, v in parameters(plan.run, 2).items() if k != "setup")
    return None


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_ends_in_a_traceback_or_takes_long(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng, outcomes = random.Random(seed), []
    for number in range(150):
        text = mutated(rng)
        start = time.process_time()
        words = refusal(text, tmp_path)
        assert time.process_time() - start < 5, text
        outcomes.append(words is None)
        if words is not None:
            assert "plan.yaml" in words and len(words) < 20_000, (number, text)
            assert all(letter.isprintable() or letter == "\n" for letter in words), words
    assert 5 < sum(outcomes) < 145  # neither everything nor nothing is taken


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("output: ~nouser/x\nmodels: a\ntasks: b", "no such home folder"),
        ("models: ~nouser/x\noutput: o\ntasks: b", "no such home folder"),
        ("output: o\nmodels: a\ntasks: b\nrun: {workers: " + "9" * 5000 + "}", "5000 digits"),
        ("[" * 100_000, "levels deep"),
        ("{a: " * 100_000, "cannot be read as a plan"),
        ("models: &a [*a]", "contains itself"),
        ("models: &a {model: *a}", "contains itself"),
        (BOMB, "more than 8000 values"),
        ("".join(f"k{i}: 1\n" for i in range(30_000)), "cannot be read as a plan"),
        ("".join(f"k{i}: 1\n" for i in range(3_000)), "2990 more unknown keys"),
        ("models: a\ntasks: b\noutput: o\nrun: {on: slurm, hours: 1, partition: \"x\\n#SBATCH y\"}",
         "run.partition"),
        ("models: a\ntasks: b\noutput: o\nrun: {on: slurm, hours: 1, options: {nice: \"1\\nx\"}}",
         "run.options.nice"),
        ("models: a\ntasks: b\noutput: o\nrun: {on: slurm, hours: 1, options: {\"a b\": 1}}",
         "long name of an option"),
        ("models: a\ntasks: b\noutput: o\nrun: {on: slurm, hours: 1, options: {array: 0-9}}",
         "which the sweep sets itself"),
        ("models: a\ntasks: b\noutput: o\nrun: {on: slurm, hours: .inf}", "a number above 0"),
        ("models: a\ntasks: b\noutput: o\nrun: {workers: 1000000000000}", "a whole number"),
        ("models: a\ntasks: b\noutput: o\nrun: {environment: {A: 1.50}}", "put it in quotes"),
        ("models: a\ntasks: b\noutput: o\nrun: {environment: {A=B: c}}", "the name of a variable"),
        ("models: a\ntasks: b\noutput: o\nrun: {environment: {A: [b]}}", "put it in quotes"),
        ('models: "a\\nb"\ntasks: b\noutput: o', "a list of models"),
        ("models: a\ntasks: b\noutput: " + "/".join(["x" * 90] * 6), "with a shorter path"),
        ("models: " + "/".join(["x" * 90] * 4) + "\ntasks: b\noutput: o", "by a shorter path"),
        ("models: a\ntasks: " + "x" * 230 + "\noutput: o", "give it a shorter one"),
    ],
)  # fmt: skip
def test_plans_that_were_made_to_do_harm_are_refused_at_once(tmp_path, text, part):
    start = time.process_time()
    assert part in refusal(text, tmp_path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ("tuned: yes", {"tuned": True}),
        ("tuned: No", {"tuned": False}),
        ("tuned: 1", {"tuned": True}),
        ("tuned: maybe", "expected true or false"),
        ("tuned: 2", "expected true or false"),
        ("training_tokens: 300e9", {"training_tokens": 3e11}),
        ("training_tokens: 300B", "expected a number"),
        ("training_tokens: 300_000", "expected a number"),
        ("training_tokens: true", "expected a number"),
        ("training_tokens: .nan", "expected a number"),
        ("n_layers: 12.5", "expected a positive whole number"),
        ("n_layers: 0", "expected a positive whole number"),
        ("n_params: -7e9", "expected a positive whole number"),
        ("training_tokens: 0", {"training_tokens": 0}),
        ("training_tokens: -1", "expected a number of 0 or more"),
        ("n_params: 1.5e9", {"n_params": 1.5e9}),
        ("released: 2023", {"released": 2023}),
        ("released: 20230401", "expected a date"),
        ("released: 2023-04", "expected a date"),
        ("released: 2023-02-30", "cannot be read as a plan"),
        ("family: 3", "expected a text"),
        ("own: 2024-01-01", {"own": 2024.0}),
        ("own: [1]", "expected a number"),
        ("own: '300,000'", "without separators"),
        ("own: 'a, b'", {"own": "a, b"}),
        ("Tuned: true", "did you mean tuned"),
        ("Training Tokens: 3", "did you mean training_tokens"),
        ("N-Params: 3", "did you mean n_params"),
        ("own: .inf", "expected a number"),
    ],
)
def test_facts_have_types(tmp_path, facts, expected):
    """`tuned: yes` was the text yes, and `fit` ended in a TypeError."""
    file = tmp_path / "plan.yaml"
    file.write_text(f"models: [{{model: a, facts: {{{facts}}}}}]\ntasks: b\noutput: c")
    if isinstance(expected, dict):
        assert plans.read(file).units[0].facts == expected
    else:
        with pytest.raises(CouplingError, match=expected):
            plans.read(file)


def test_arguments_keep_their_types(tmp_path):
    """Keys and numbers became text on the way through JSON."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        "models:\n  - model: a\n"
        "    args: {coupling_layers: -1, max_memory: {0: 10}, revised: 2024-01-01}\n"
        "  - {model: b, args: 'coupling_layers=-1,coupling_tokens=\"01\",x=0001,y=1e3,z=None'}\n"
        "tasks: t\noutput: o\ncoupling: {ranks: [2, 4], layers: [0, -1], seed: 3}\n"
    )
    plan = plans.read(file)
    first, second = (
        yaml.safe_load(yaml.safe_dump(configuration(plan, unit, plan.tasks)))["model_args"]
        for unit in plan.units
    )
    assert first["coupling_layers"] == -1 and type(first["coupling_layers"]) is int
    assert first["max_memory"] == {0: 10} and first["revised"] == "2024-01-01"
    assert first["coupling_ranks"] == [2, 4] and first["coupling_seed"] == 3
    expected = {"coupling_layers": -1, "coupling_tokens": "01", "x": "0001", "y": 1000.0, "z": None}
    assert {name: second[name] for name in expected} == expected
