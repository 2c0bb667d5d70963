"""The arguments of `coupling-hf`: what is wrong is refused in one sentence."""

import pytest
import tiny

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.residual import ResidualModel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coupling_rank": "4"}, "unknown argument coupling_rank, did you mean coupling_ranks"),
        ({"coupling_ranks": "4+64"}, "rank 64 for a model with d_model = 32"),
        ({"coupling_ranks": "some"}, "coupling_ranks='some', expected a whole number"),
        ({"coupling_measures": "depht"}, "unknown measure 'depht', expected any of depth"),
        ({"coupling_dtype": "float16"}, "expected one of float32, float64"),
        ({"coupling_limit": -1}, "coupling_limit=-1"),
        ({"coupling_method": "guess"}, "expected one of auto, closed"),
        ({"tp_plan": "auto"}, "got tp_plan, which splits every weight over processes"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(home, tmp_path, arguments, message):
    with pytest.raises(CouplingError, match=message):
        given = {"coupling_ranks": "2+4", "coupling_store": str(tmp_path / "s.sqlite")} | arguments
        CouplingLM(str(home / "float32"), device="cpu", **given)


@pytest.fixture
def hub(home, tmp_path, monkeypatch):
    """A cache with one model of the hub, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--someone--tiny"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / SHA).symlink_to(home / "float32")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


SHA = "0123456789" * 4


def test_a_revision_is_recorded(evaluate, hub):
    found = evaluate(kinds=("choice",), pretrained="someone/tiny", arguments={"revision": SHA})
    assert found["config"]["coupling"]["revision"] == SHA
    assert found["config"]["coupling"]["measured"] == 2


@pytest.mark.parametrize(
    ("pretrained", "arguments", "message"),
    [
        ("someone/tiny", {"revision": "v2"}, "got model 'someone/tiny', revision 'v2', which transformers cannot load"),
        ("someone/else", {}, "got model 'someone/else', revision 'main', which transformers cannot load"),
    ],
    ids=["revision", "model"],
)
def test_what_is_not_there_is_said_in_one_sentence(evaluate, hub, pretrained, arguments, message):
    with pytest.raises(CouplingError, match=message) as caught:
        evaluate(pretrained=pretrained, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_refused(home, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=0
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny._tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(CouplingError, match="got a Bert.*, an encoder, expected a decoder-only language model"):
        CouplingLM(
            str(tmp_path / "bert"), device="cpu", backend="causal", coupling_ranks="2", coupling_store=str(tmp_path / "s")
        )


def test_text_needs_a_tokenizer(home):
    from transformers import AutoModelForCausalLM

    model = ResidualModel.wrap(AutoModelForCausalLM.from_pretrained(home / "float32"))
    with pytest.raises(CouplingError, match="without a tokenizer"):
        measure.measure_coupling(model, ["some text"], ranks=(2,))
