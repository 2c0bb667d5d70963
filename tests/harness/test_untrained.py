"""The same architecture before any training, beside the weights that are scored."""

import numpy as np
import pytest
import torch
from evaluations import scores

from lm_eval_coupling import load_records
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.residual.untrained import untrained_twin


def test_the_untrained_twin_is_measured_on_the_same_prompts(evaluate, tmp_path):
    """Beside the trained weights, never among them; the same for the same seed and found again in
    the store.
    """
    arguments = {
        "coupling_limit": "all",
        "coupling_untrained_seed": 3,
        "coupling_out": str(tmp_path / "tables"),
    }
    found = evaluate(kinds=("choice",), arguments=arguments)
    plain = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    info = found["config"]["coupling"]
    assert info["untrained"]["seed"] == 3 and info["reused"] == 0
    assert info["tasks"] == plain["config"]["coupling"]["tasks"]
    assert (
        found["results"]["tiny_choice"]["coupling,none"]
        == plain["results"]["tiny_choice"]["coupling,none"]
    )
    both = load_records(tmp_path / "tables", weights="all").set_index(["weights", "doc_hash"])
    trained, untrained = both.loc["trained"], both.loc["untrained"]
    assert set(trained.index) == set(untrained.index) and len(trained) == len(untrained) == 8
    mean = info["untrained"]["tasks"]["tiny_choice"]["measures"]["coupling"][2]["mean"]
    values = [readings()["coupling"].read(row, 2) for row in untrained.to_dict("records")]
    assert mean == pytest.approx(np.mean(values), rel=1e-6)
    assert not np.allclose(
        trained.singular_values.iloc[0], untrained.singular_values.loc[trained.index[0]], rtol=0.1
    )
    again = evaluate(kinds=("choice",), arguments=arguments)["config"]["coupling"]
    assert again["reused"] == 8 and again["untrained"]["tasks"] == info["untrained"]["tasks"]


def test_untrained_weights_are_those_of_the_seed_alone(home):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "float32")
    torch.manual_seed(1)
    one = untrained_twin(model, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two, three = untrained_twin(model, 3), untrained_twin(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True)
    )
    assert [p.shape for p in one.parameters()] == [p.shape for p in model.parameters()]


def test_sampled_texts_are_those_of_hf(evaluate):
    """Fresh weights are drawn between lm-eval's seeding and its sampling; nobody may notice."""
    options = {
        "kinds": ("generate",),
        "gen_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8},
    }
    expected, other = evaluate("hf", **options), evaluate("hf", **options, torch_random_seed=7)
    found = evaluate(arguments={"coupling_untrained_seed": 3}, **options)
    assert scores(found) == scores(expected)
    assert scores(other) != scores(expected), "this model does not sample"
