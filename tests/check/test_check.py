"""Command check: exact and wrong models, and one sentence for models that cannot be checked."""

import json

import cases
import pytest
import tiny
import torch

from lm_eval_coupling.check import oracle as module
from lm_eval_coupling.check.free_memory import require_room
from lm_eval_coupling.check.oracle import check_blocks, kinds
from lm_eval_coupling.cli import main
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.residual import ResidualModel

KINDS = ["llama", "gemma2", "gpt2", "bloom", "falcon-alibi", "mixtral", "deepseek-v3", "qwen3-next"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def test_a_model_that_is_exact(model, tmp_path, capsys):
    out = tmp_path / "new" / "check.json"
    assert (
        main(
            ["check", model, "--device", "cpu", "--dtype", "float32", "bfloat16", "--out", str(out)]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert (
        found["ok"]
        and list(found["dtypes"]) == ["float32", "bfloat16"]
        and found["software"]["versions"]["torch"]
    )
    for dtype in found["dtypes"].values():
        (block,) = dtype["blocks"]
        assert (
            block["blocks"] == 2
            and block["level"] == "closed"
            and block["rows"] == 32
            and 0 < block["error"] < 1e-5
        )
        assert dtype["scores_equal"] and [cost["together"] for cost in dtype["costs"]] == [1, 8]
        assert all(cost["seconds"] > 0 and cost["announced"] > 0 for cost in dtype["costs"])
    shown = capsys.readouterr().out
    assert "LlamaDecoderLayer" in shown and "FAILED" not in shown


def test_a_wrong_jacobian_fails_though_its_certificate_is_fine(
    model, monkeypatch, tmp_path, capsys
):
    right = module.jacobians_of_traces

    def wrong(*args, **options):
        (found,) = right(*args, **options)
        found.jacobians[..., 3] *= 1.01
        return [found]

    monkeypatch.setattr(module, "jacobians_of_traces", wrong)
    assert main(["check", model, "--device", "cpu", "--out", str(tmp_path / "check.json")]) == 1
    assert (
        "FAILED" in capsys.readouterr().out
        and not json.loads((tmp_path / "check.json").read_text())["ok"]
    )


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_block(case, device):
    """Compare with the unmodified blocks: windows, ALiBi, experts, latent and linear attention."""
    plain = cases.tiny_model(case, torch.float32).to(device)
    found = check_blocks(ResidualModel.wrap(plain), plain, cases.tiny_tokens(9)[0].tolist())
    assert [one.level for one in found] == list(dict.fromkeys(cases.levels(case))) or len(
        found
    ) == 2
    assert all(one.ok for one in found), found
    assert sum(one.blocks for one in found) == 2
    assert all((one.why is None) is (one.level == "closed") for one in found)


def test_blocks_of_other_shapes_are_another_kind():
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), torch.nn.Linear(3, 5), torch.nn.ReLU()]
    assert kinds(layers) == {"Linear": [0, 1], "Linear, from 2": [2], "ReLU": [3]}
    assert kinds(layers[:2], ["full", "sliding"]) == {"Linear (full)": [0], "Linear (sliding)": [1]}


def test_what_cannot_be_compared_is_no_success(monkeypatch):
    def fails(*args):
        raise RuntimeError("no float64 here")

    monkeypatch.setattr(module, "oracle", fails)
    plain = cases.tiny_model("llama", torch.float32)
    (found,) = check_blocks(ResidualModel.wrap(plain), plain, [1, 2, 3])
    assert not found.ok and found.problem == "RuntimeError: no float64 here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "abacus"],
            "got device='abacus', which torch does not know, expected one of: cpu",
        ),
        (
            ["--device", "cuda:99"],
            "got device='cuda:99', which this machine does not have, expected one of: cpu",
        ),
        (["--device", "cpu", "--dtype", "int3"], "got dtype='int3', expected auto"),
    ],
)
def test_what_there_is_not(model, arguments, message, capsys):
    assert main(["check", model, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"lm-eval-coupling: {message}")


def test_a_device_too_small_for_one_jacobian(monkeypatch):
    wrapped = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    require_room(wrapped, rank=4, seq=9)
    monkeypatch.setattr(limits, "free", lambda device: 1000)
    with pytest.raises(
        CouplingError, match=r"got cpu with 0.0 GB free beside the model, expected .* width 24; use"
    ):
        require_room(wrapped, rank=4, seq=9)


def test_the_best_device_is_taken():
    assert device_named(None).type == (
        "cuda" if torch.cuda.is_available() else device_named(None).type
    )
    assert device_named("cpu") == torch.device("cpu")
