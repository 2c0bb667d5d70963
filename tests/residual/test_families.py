"""The table of model families says what the tests show."""

import cases
import make_families


def test_the_table_is_up_to_date():
    assert make_families.PAGE.read_text() == make_families.page(), "run python tests/make_families.py"


def test_every_family_is_in_it_with_its_level():
    rows = [line.split(" | ") for line in make_families.page().splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == list(cases.CASES)
    by_family = {row[0].removeprefix("| "): row for row in rows}
    assert by_family["llama"][1:3] == ["LlamaForCausalLM", "`closed`"]
    assert by_family["qwen3-next"][2] == "`autodiff`, then `token-local`"
    assert by_family["mistral"][3] == "grouped-query attention, sliding window |"
