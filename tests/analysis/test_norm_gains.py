"""Gains folded into the weights that follow leave a model as it was; equal gains do not."""

import cases
import pandas as pd
import pytest
import tiny
import torch
from coupling_analysis.norm_gains import change_gains
from studied import record, save, script

from lm_eval_coupling.errors import CouplingError

pytestmark = pytest.mark.usefixtures("elsewhere")


def with_gains(case):
    model = cases.tiny_model(case, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
    return model


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
def test_folding_changes_no_logit_and_equal_gains_do(case):
    tokens = cases.tiny_tokens(9)
    logits = {}
    for kind in ("as trained", "folded", "equal"):
        torch.manual_seed(0)
        model = with_gains(case)
        change_gains(model, kind)
        logits[kind] = model(tokens).logits.detach()
        norm = model.get_submodule("model.layers.0.input_layernorm")
        gain = norm(torch.ones_like(norm.weight)).detach()
        if kind == "folded":
            torch.testing.assert_close(gain, torch.ones_like(gain))
        else:
            assert (gain.std() < 1e-6) == (kind == "equal")
    torch.testing.assert_close(logits["folded"], logits["as trained"], rtol=1e-4, atol=1e-5)
    assert (logits["equal"] - logits["as trained"]).abs().max() > 1e-2


def test_models_without_such_norms_are_refused():
    with pytest.raises(CouplingError, match="got a GPT2LMHeadModel, expected blocks with input_l"):
        change_gains(cases.tiny_model("gpt2", torch.float32), "folded")


def test_the_script(tmp_path):
    folder = tiny.save_model(tmp_path / "models" / "tiny")
    save(tmp_path / "out", [record(n, tokens=(5, 7, 9, 11, 5 + n)) for n in range(3)])
    words = [str(tmp_path / "out"), folder, "--prompts", "2", "--rank", "4"]
    script("norm_gains")([*words, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "norm_gains.csv").set_index(["gains", "prompt"])
    assert len(rows) == 6 and (tmp_path / "norm_gains.png").exists()
    trained, folded, equal = (rows.xs(kind) for kind in ("as trained", "folded", "equal"))
    for column in ("coupling", "loss"):
        assert folded[column].to_numpy() == pytest.approx(trained[column].to_numpy(), abs=1e-5)
        assert (equal[column] - trained[column]).abs().min() > 1e-4
