"""The arguments of `coupling-hf`: what is wrong is refused in one sentence."""

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny
import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.store import default_store_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coupling_rank": "4"}, "unknown argument coupling_rank, did you mean coupling_ranks"),
        ({"coupling_ranks": "4+64"}, "rank 64 for a model with d_model = 32"),
        ({"coupling_ranks": "some"}, "coupling_ranks='some', expected a whole number"),
        ({"coupling_position": -1.5}, "coupling_position=-1.5, expected a whole number"),
        ({"coupling_position": True}, "coupling_position=True, expected a whole number"),
        ({"coupling_seed": float("inf")}, "coupling_seed=inf, expected a whole number"),
        ({"coupling_prompt": "last"}, "coupling_prompt='last', expected one of scored, rendered"),
        ({"coupling_trajectories": "perhaps"}, "coupling_trajectories='perhaps', expected 1 or 0"),
        (
            {"coupling_out": 1e5},
            "coupling_out=100000.0, expected a path; write one that looks like a number as ./PATH",
        ),
        ({"coupling_untrained": 0}, "coupling_untrained=0.*; write coupling_untrained_seed=0, or"),
        ({"coupling_untrained": 3.0}, "write coupling_untrained_seed=3, or leave it out"),
        ({"coupling_untrained": True}, "coupling_untrained=True, expected the seed"),
        ({"coupling_untrained": "seed1", "coupling_untrained_seed": 2}, "coupling_untrained=seed1"),
        ({"30": ""}, "got 30 as an argument.* a plus sign, as in coupling_ranks=10\\+30"),
        ({"coupling_layers": -9.0}, "got layer -9 of a model of 2 blocks"),
        ({"coupling_measures": "depht"}, "unknown measure 'depht', expected any of depth"),
        ({"coupling_dtype": "float16"}, "expected one of float32, float64"),
        ({"coupling_limit": -1}, "coupling_limit=-1"),
        ({"coupling_method": "guess"}, "expected one of auto, closed"),
        ({"tp_plan": "auto"}, "got tp_plan, which splits every weight over processes"),
        (
            {"dtype": "float31"},
            "got dtype=float31, which torch does not have, did you mean float32",
        ),
        ({"peft": "./adapter"}, "got peft=./adapter, which is no folder here"),
        ({"tokenizer": "/not/there"}, "got tokenizer=/not/there, which is no folder here"),
        (
            {"device": "cuda:99"},
            "got device='cuda:99', which this machine does not have, expected one of: cpu",
        ),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(home, tmp_path, arguments, message):
    with pytest.raises(CouplingError, match=message):
        given = {"coupling_ranks": "2+4", "coupling_store": str(tmp_path / "s.sqlite")} | arguments
        CouplingLM(str(home / "float32"), **{"device": "cpu"} | given)


def test_the_best_device_is_taken_if_none_is_given(home, tmp_path):
    """HFLM's own default is a GPU, there or not; that of lm-eval's command is the first one, and
    the CPU without any.
    """
    given = {"coupling_ranks": "2", "coupling_store": str(tmp_path / "s.sqlite")}
    assert CouplingLM(str(home / "float32"), **given).device == device_named(None)
    there = device_named(None) if device_named(None).type == "cuda" else torch.device("cpu")
    assert CouplingLM(str(home / "float32"), device="cuda:0", **given).device.type == there.type


def test_no_model_is_said_in_one_sentence():
    with pytest.raises(CouplingError, match="got no pretrained, expected"):
        CouplingLM(coupling_ranks="2")


COMMAND_LINE = """
position=-2 seed=7.0 ranks=[10,30] limit=1e2
trajectories=true out=2024 untrained=None prompt=rendered
""".split()


def test_numbers_and_lists_as_the_command_line_hands_them_over(tmp_path, monkeypatch):
    """A negative position came as -2.0 and was refused, and so was the documented default of -1
    written out.
    """
    from lm_eval._cli.utils import key_val_to_dict

    monkeypatch.chdir(tmp_path)
    given = {"pretrained": "x"} | key_val_to_dict(
        ",".join(f"coupling_{word}" for word in COMMAND_LINE)
    )
    found = Options.take_from(given)
    assert given == {"pretrained": "x"}
    assert (found.position, found.seed, found.limit, found.untrained, found.prompt) == (
        -2,
        7,
        100,
        None,
        "rendered",
    )
    assert found.settings.ranks == (10, 30) and found.settings.trajectories
    assert found.out == Path("2024") and {type(found.position), type(found.limit)} == {int}
    assert Options.parse(position=-1.0) == Options.parse()


@pytest.mark.parametrize(
    "given",
    [
        {"untrained": "seed3"},
        {"untrained_seed": 3},
        {"untrained_seed": 3.0},
        {"untrained_seed": "3"},
        {"untrained": "seed3", "untrained_seed": 3},
    ],
)
def test_the_twins_seed_has_a_name_that_says_so(given):
    """`coupling_untrained=0` switched the twin on."""
    assert Options.parse(**given).untrained == 3
    assert Options.parse(untrained=False).untrained is Options.parse().untrained is None


@pytest.mark.parametrize("given", [-1, -1.0, "-1", [-1.0], "-1.0"])
def test_negative_layers_and_tokens_count_from_the_end(given):
    """`coupling_layers=-1` arrived as -1.0 and was refused, while positions take it."""
    settings = Options.parse(layers=given, tokens=given).settings
    assert settings.layers == settings.tokens == "-1"
    assert Options.parse(layers=[0, -1.0], tokens="last4").settings.layers == "0+-1"


@pytest.fixture
def homeless(monkeypatch):
    """A user id that the system does not know, and no HOME: as in many containers."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(Path, "expanduser", unknown)


def test_without_a_home_there_is_still_a_store(homeless, tmp_path, monkeypatch):
    """It was a traceback, even where only scores were asked for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Options.parse(limit=0).store is None
    assert tmp_path in default_store_path().parents
    with pytest.raises(CouplingError, match="coupling_store=~/s, but there is no such home folder"):
        Options.parse(store="~/s")


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
        (
            "someone/tiny",
            {"revision": "v2"},
            "got model 'someone/tiny', revision 'v2', which transformers cannot load",
        ),
        (
            "someone/else",
            {},
            "got model 'someone/else', revision 'main', which transformers cannot load",
        ),
    ],
    ids=["revision", "model"],
)
def test_what_is_not_there_is_said_in_one_sentence(evaluate, hub, pretrained, arguments, message):
    with pytest.raises(CouplingError, match=message) as caught:
        evaluate(pretrained=pretrained, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_the_whole_error_is_shown(home, tmp_path):
    """The remedy stands in the last lines of what transformers says, and was cut off."""
    folder = tmp_path / "remote"
    shutil.copytree(home / "float32", folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "not_in_transformers", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(CouplingError, match="trust_remote_code=True") as caught:
        CouplingLM(
            str(folder), device="cpu", coupling_store=str(tmp_path / "s"), coupling_ranks="2"
        )
    assert "\n" not in str(caught.value)


def test_an_encoder_is_refused(home, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny._tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(
        CouplingError, match="got a Bert.*, an encoder, expected a decoder-only language model"
    ):
        CouplingLM(
            str(tmp_path / "bert"),
            device="cpu",
            backend="causal",
            coupling_ranks="2",
            coupling_store=str(tmp_path / "s"),
        )


def test_text_needs_a_tokenizer(home):
    from transformers import AutoModelForCausalLM

    model = ResidualModel.wrap(AutoModelForCausalLM.from_pretrained(home / "float32"))
    with pytest.raises(CouplingError, match="without a tokenizer"):
        measure.measure_coupling(model, ["some text"], ranks=(2,))


@pytest.mark.parametrize("cached", [False, True])
def test_a_dry_run_says_the_cost_and_scores_nothing(
    evaluate, tmp_path, capsys, monkeypatch, cached
):
    def never(*_, **__):
        raise AssertionError("something was scored")

    for name in ("_model_call", "_model_generate"):
        monkeypatch.setattr(CouplingLM, name, never)
    store = tmp_path / "s.sqlite"
    arguments = {
        "coupling_dry_run": True,
        "coupling_limit": 3,
        "coupling_untrained_seed": 1,
        "coupling_store": str(store),
    }
    with pytest.raises(SystemExit) as ended:
        evaluate(arguments=arguments, use_cache=str(tmp_path / "cache") if cached else None)
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert (
        "Dry run: 6 documents would be measured; on this process\n"
        "trained weights: 6 prompts, 6 of them distinct" in told
    )
    assert told.count("; the other 5 take up to ") == 2 and "untrained weights: 6 prompts" in told


def test_every_argument_is_explained():
    """With its default, where that is a value."""
    page = (Path(__file__).parents[2] / "docs" / "arguments.md").read_text(encoding="utf-8")
    for name, parameter in inspect.signature(Options.parse).parameters.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `coupling_{name}` |")]
        if parameter.default not in (None, True, False):
            assert f"| `{parameter.default}` |" in line
