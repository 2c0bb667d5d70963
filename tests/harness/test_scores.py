"""Scores are those of `hf`, bit for bit, whatever the model, the task and the options."""

import json

import cases
import pytest
import tiny
import torch
from evaluations import KINDS, scores
from lm_eval.models.huggingface import HFLM
from random_weights import with_lora

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.residual import ResidualModel


def adapter(home, folder):
    """A LoRA adapter that changes the model's function."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "float32")
    with_lora(base, ["q_proj", "v_proj", "down_proj"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("pretrained", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"batch_size": 3}),
        ("bfloat16", {"batch_size": "auto", "max_batch_size": 4}),
        ("float32", {"limit": 3}),
        ("float32", {"samples": {"tiny_choice": [1, 5], "tiny_generate": [0, 2, 6]}}),
        ("float32", {"num_fewshot": 1, "kinds": ("choice",)}),
        ("float32", {"apply_chat_template": True}),
        ("float32", {"kinds": KINDS}),
    ],
    ids=lambda value: str(value),
)
def test_scores_are_those_of_hf(evaluate, home, pretrained, options):
    expected = evaluate("hf", pretrained=home / pretrained, **options)
    found = evaluate("coupling-hf", pretrained=home / pretrained, **options)
    assert scores(found) == scores(expected)
    assert found["config"]["coupling"]["failed"] == 0
    size = {
        name: found["config"]["coupling"][name]
        for name in ("n_layers", "d_model", "n_heads", "vocab_size")
    }
    assert size == {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 259}
    for row in found["results"].values():
        assert 0 < row["coupling,none"] < 1


def test_requests_answered_from_the_cache_are_measured_all_the_same(evaluate, tmp_path):
    first = evaluate(use_cache=str(tmp_path / "cache"))
    again = evaluate(
        use_cache=str(tmp_path / "cache"),
        arguments={"coupling_store": str(tmp_path / "other.sqlite")},
    )
    assert scores(again) == scores(first)
    assert again["config"]["coupling"]["reused"] == first["config"]["coupling"]["reused"]
    for task, row in first["results"].items():
        assert again["results"][task]["coupling,none"] == pytest.approx(
            row["coupling,none"], rel=1e-6
        )


def test_an_adapter_is_scored_and_measured(evaluate, home, tmp_path):
    arguments = {"peft": adapter(home, tmp_path / "adapter")}
    expected, found = (
        evaluate(model, arguments=arguments, kinds=("choice",)) for model in ("hf", "coupling-hf")
    )
    plain = evaluate(kinds=("choice",))
    assert scores(found) == scores(expected)
    assert scores(found) != scores(plain)
    value, without = (r["results"]["tiny_choice"]["coupling,none"] for r in (found, plain))
    assert value != pytest.approx(without, rel=1e-3)


def test_an_adapters_jacobians_are_those_of_the_merged_weights(home, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "float32").eval()
    model = peft.PeftModel.from_pretrained(base, adapter(home, tmp_path / "adapter")).eval()
    tokens = cases.tiny_tokens(7)
    found = block_jacobians(ResidualModel.wrap(model), tokens).jacobians
    merged = ResidualModel.wrap(model.merge_and_unload())
    assert torch.allclose(found, block_jacobians(merged, tokens).jacobians, atol=1e-5)


def test_a_model_split_over_devices_is_scored_and_measured(evaluate, home, tmp_path):
    """Without a GPU, accelerate splits over the host and the disk."""
    arguments = {"parallelize": True, "offload_folder": str(tmp_path / "offload")}
    pretrained, device = str(home / "float32"), "cpu"
    if not hasattr(HFLM(pretrained, device=device, **arguments).model, "_hf_hook"):
        # transformers 5.9 runs no model that lies on the disk alone, with `hf` neither.
        with pytest.raises(CouplingError, match="on no device"):
            CouplingLM(pretrained, device=device, coupling_ranks="2", **arguments)
        return
    expected, found = (
        evaluate(model, kinds=("choice",), arguments=dict(arguments))
        for model in ("hf", "coupling-hf")
    )
    assert scores(found) == scores(expected)
    plain = evaluate(kinds=("choice",))
    assert plain["config"]["coupling"]["fingerprint"] == found["config"]["coupling"]["fingerprint"]
    assert plain["config"]["coupling"]["reused"] == found["config"]["coupling"]["measured"] == 2
    elsewhere = arguments | {"coupling_store": str(tmp_path / "other.sqlite")}
    if not torch.cuda.is_available():
        lm = CouplingLM(str(home / "float32"), device="cpu", coupling_ranks="2", **elsewhere)
        assert all(p.device.type == "meta" for p in lm.model.parameters())
    again = evaluate(kinds=("choice",), arguments=elsewhere)["results"]["tiny_choice"][
        "coupling,none"
    ]
    assert again == pytest.approx(plain["results"]["tiny_choice"]["coupling,none"], abs=1e-5)


def test_a_packed_checkpoint_is_scored_and_measured(evaluate, home, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    wide = tiny.save_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=config, device_map={"": "cpu"}
    )
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(wide).save_pretrained(tmp_path / "packed")
    expected, found, dense = (
        evaluate(model, kinds=("choice",), pretrained=pretrained)
        for model, pretrained in (
            ("hf", tmp_path / "packed"),
            ("coupling-hf", tmp_path / "packed"),
            ("coupling-hf", wide),
        )
    )
    assert scores(found) == scores(expected)
    info = found["config"]["coupling"]
    assert (info["measured"], info["failed"]) == (2, 0) and info["worst_certificate"] < 1e-5
    assert info["fingerprint"] != dense["config"]["coupling"]["fingerprint"]
    assert info["n_params"] == dense["config"]["coupling"]["n_params"]


def test_limit_zero_only_scores(evaluate):
    found = evaluate(arguments={"coupling_limit": 0})
    assert scores(found) == scores(evaluate("hf"))
    assert "coupling" not in json.dumps(found["results"])


def test_a_prompt_too_long_for_the_model_is_cut_as_for_scoring(evaluate):
    found = evaluate(kinds=("rolling", "choice"), arguments={"max_length": 24})
    assert scores(found) == scores(
        evaluate("hf", kinds=("rolling", "choice"), arguments={"max_length": 24})
    )
    assert found["config"]["coupling"]["failed"] == 0
