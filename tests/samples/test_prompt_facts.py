"""What results tell of prompts is the same whenever an evaluation was made."""

import pytest

from lm_eval_coupling.harness.plain import digest
from lm_eval_coupling.samples.prompt_facts import prompt_facts
from lm_eval_coupling.saved.prompting import TEXTS


def results(**config):
    return {"configs": {"task": config}, "n-shot": {"task": 0}, "versions": {"task": 1.0}}


def printed(address):
    """As lm-eval's results of hellaswag and winogrande have them."""
    function = f"<function process_docs at {address}>"
    return {
        "doc_to_text": "{{query}}",
        "doc_to_choice": function,
        "fewshot_config": {"sampler": "default", "process_docs": function},
    }


def test_addresses_of_functions_are_no_part_of_a_prompt():
    one, other = (prompt_facts("task", results(**printed(a))) for a in ("0x7f7e52", "0x7f2a21"))
    assert one == other


@pytest.mark.parametrize(
    "change", [{"doc_to_text": "{{question}}"}, {"doc_to_choice": "<function f>"}]
)
def test_other_texts_are(change):
    one, other = (prompt_facts("task", results(**printed("0x1") | c)) for c in ({}, change))
    assert one["task_texts"] != other["task_texts"] and one["digest"] != other["digest"]


def test_texts_without_functions_have_the_digest_of_before():
    facts = prompt_facts("task", results(doc_to_text="{{query}}"))
    texts = dict.fromkeys(TEXTS) | {"doc_to_text": "{{query}}"}
    assert facts["task_texts"] == digest(texts)
