"""Which documents are measured: seeded, spread over a group's members, whoever asks and in whatever
order.
"""

import random
from collections import Counter

import pytest

from lm_eval_coupling.runs.rows import DocumentKey
from lm_eval_coupling.runs.sampling import choose


def documents(task, number, prompt="p"):
    return [DocumentKey(task, f"{task}-{i}", f"{prompt}-{i}") for i in range(number)]


def per_task(chosen):
    return dict(Counter(key.task for key in chosen))


def test_no_more_than_the_limit_of_each_root():
    keys = documents("a", 20) + documents("b", 3) + documents("c", 20)
    assert per_task(choose(keys, ["a", "b", "c"], 5, seed=0)) == {"a": 5, "b": 3, "c": 5}


@pytest.mark.parametrize(("limit", "expected"), [(None, 7), (7, 7), (100, 7), (0, 0)])
def test_all_and_none(limit, expected):
    assert len(choose(documents("a", 7), ["a"], limit, seed=0)) == expected


@pytest.mark.parametrize(
    "root", [[["t1", "t2"], ["t1", "t3"]], [["t1"], ["t1"], ["t2", ["t1", "t3"]]], ["t1", "t1"]]
)
def test_a_task_in_two_groups_costs_no_document(root):
    """Of twelve documents nine were measured: those of the shared task were drawn twice."""
    keys = [key for task in ("t1", "t2", "t3") for key in documents(task, 20)]
    assert len(choose(keys, [root], 12, seed=0)) == 12
    assert len(choose(keys, [root], 100, seed=0)) == 20 * len({*str(root)} & {*"123"})


def test_a_groups_documents_come_evenly_from_its_members():
    keys = [key for i in range(57) for key in documents(f"subject{i}", 30)]
    found = per_task(choose(keys, [[f"subject{i}" for i in range(57)]], 100, seed=3))
    assert sum(found.values()) == 100 and len(found) == 57 and set(found.values()) == {1, 2}


def test_short_members_leave_their_share_to_the_others():
    keys = documents("short", 2) + documents("long", 50) + documents("longer", 60)
    assert per_task(choose(keys, [["short", "long", "longer"]], 20, 0)) == {
        "short": 2,
        "long": 9,
        "longer": 9,
    }


def test_groups_in_groups_share_as_members_do():
    keys = documents("a", 50) + documents("b", 50) + documents("c", 50)
    assert per_task(choose(keys, [[["a", "b"], "c"]], 20, 0)) == {"a": 5, "b": 5, "c": 10}


def test_a_group_and_a_task_beside_it_have_a_limit_each():
    keys = documents("a", 50) + documents("b", 50) + documents("c", 50)
    assert per_task(choose(keys, [["a", "b"], "c"], 10, 0)) == {"a": 5, "b": 5, "c": 10}


def test_order_and_repetition_do_not_matter():
    keys = documents("a", 40) + documents("b", 40)
    expected = choose(keys, [["a", "b"]], 11, seed=5)
    for shuffle in range(5):
        mixed = keys + keys[:7]
        random.Random(shuffle).shuffle(mixed)
        assert choose(iter(mixed), [["a", "b"]], 11, seed=5) == expected


def test_the_sample_is_not_the_beginning_and_follows_the_seed():
    keys = documents("a", 200)
    samples = [choose(keys, ["a"], 20, seed) for seed in range(4)]
    assert len({frozenset(sample) for sample in [*samples, set(keys[:20])]}) == 5


def test_every_document_is_as_likely():
    """Chosen 4 times of 20, over 400 seeds: 80 ± 8 each."""
    keys = documents("a", 20)
    times = Counter(key for seed in range(400) for key in choose(keys, ["a"], 4, seed))
    assert set(times) == set(keys)
    assert all(abs(times[key] - 80) < 40 for key in keys)


def test_a_larger_limit_keeps_the_documents_of_a_smaller_one():
    keys = documents("a", 40) + documents("b", 9)
    assert choose(keys, [["a", "b"]], 8, 1) < choose(keys, [["a", "b"]], 25, 1)


def test_the_same_documents_whatever_the_prompt():
    """Few-shot examples and chat templates change the prompt of a document, not whether it is
    measured.
    """
    plain, templated = (
        choose(documents("a", 60, prompt), ["a"], 10, 0) for prompt in ("plain", "templated")
    )
    assert {key.doc_hash for key in plain} == {key.doc_hash for key in templated}


def test_one_task_does_not_depend_on_what_else_is_evaluated():
    a, b = documents("a", 30), documents("b", 30)
    assert choose(a, ["a"], 6, 0) == {
        key for key in choose(a + b, ["b", "a"], 6, 0) if key.task == "a"
    }


def test_tasks_that_ask_the_same_documents_are_measured_on_the_same_ones():
    """Paired studies had few pairs: each task drew a sample of its own."""
    plain = [DocumentKey("gsm8k", f"d{i}", f"p{i}") for i in range(40)]
    thinking = [DocumentKey("gsm8k_cot", f"d{i}", f"q{i}") for i in range(40)]
    chosen = choose(plain + thinking, ["gsm8k", "gsm8k_cot"], 10, seed=0)
    by_task = [
        {key.doc_hash for key in chosen if key.task == task} for task in ("gsm8k", "gsm8k_cot")
    ]
    assert by_task[0] == by_task[1] and len(by_task[0]) == 10
