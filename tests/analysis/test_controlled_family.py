"""The script that makes a family of one model: its weights, members that load, no work twice."""

import json
import types
from pathlib import Path

import pytest
import tiny
import torch
from studied import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D


@pytest.fixture(scope="module")
def script():
    return load_script("controlled_family")


@pytest.fixture
def run(script, monkeypatch):
    """Call the script with these words; lm-eval is not run, but its commands are returned."""

    def call(*words, fail=()):
        commands = []

        def stand_in(command, **_):
            commands.append(command)
            member = (
                next(word for word in command if word.startswith("pretrained="))
                .split(",")[0]
                .rpartition("/")[2]
            )
            if member not in fail:
                out = Path(command[command.index("--output_path") + 1]) / "model"
                out.mkdir(parents=True, exist_ok=True)
                limit = int(command[command.index("--limit") + 1]) if "--limit" in command else None
                saved = {"results": {"arc": {}}, "config": {"limit": limit}}
                (out / f"results_{len(list(out.iterdir()))}.json").write_text(json.dumps(saved))
            return types.SimpleNamespace(returncode=int(member in fail))

        monkeypatch.setattr(script.subprocess, "run", stand_in)
        monkeypatch.setattr("sys.argv", ["controlled_family.py", *map(str, words)])
        script.main()
        return commands

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "tiny-1m", tie_word_embeddings=True)


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_blending_keeps_the_size_of_the_random_part(script):
    torch.manual_seed(0)
    weight, random = (
        torch.randn(6, 4, dtype=torch.float64),
        100 * torch.randn(6, 4, dtype=torch.float64),
    )
    assert torch.equal(script.blend(weight, random, 0.0), weight)
    replaced = script.blend(weight, random, 1.0)
    torch.testing.assert_close(replaced.norm(), weight.norm())
    torch.testing.assert_close(replaced / replaced.norm(), random / random.norm())
    torch.testing.assert_close(script.blend(weight, random, 0.25), 0.75 * weight + 0.25 * replaced)
    assert torch.equal(script.blend(weight, torch.zeros_like(weight), 0.5), 0.5 * weight)


@pytest.mark.parametrize("channel", [0, 1])
def test_rounding_by_hand(script, channel):
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.0], [0.7, 0.31, -0.26, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # 4 bits: 15 values from −7 to 7 steps of 1 in the first channel, of 0.1 in the second.
    expected = torch.tensor([[7.0, -3.0, 0.0, 0.0], [0.7, 0.3, -0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    if channel == 1:
        weight, expected = weight.T, expected.T
    torch.testing.assert_close(script.round_to_bits(weight, 4, channel), expected)


def test_rounding_takes_the_output_channel_of_each_kind_of_layer(script):
    inner = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), Conv1D(5, 3))
    holder = torch.nn.Module()
    holder.base_model = inner
    for layer in inner:
        torch.nn.init.normal_(layer.weight)
    linear, conv = (layer.weight for layer in script.rounded(holder, 2).base_model)
    # 2 bits: −1, 0 and 1 times the largest of each of the five output channels.
    for weight, channels in ((linear, linear), (conv, conv.T)):
        assert weight.shape in ((5, 3), (3, 5))
        for channel in channels:
            assert len(channel.abs().unique()) <= 2


def test_members_are_ordinary_models(run, model, tmp_path):
    out = tmp_path / "family"
    run("--model", model, "--out", out, "--blend", 0.25, 1, "--bits", 4)
    names = ["intact", "blend-0.25", "blend-1", "bits-4"]
    about = json.loads((out / "family.json").read_text())
    assert [member["name"] for member in about["members"]] == names and about["model"] == "tiny-1m"
    intact, replaced, rounded = (weights(out / name) for name in ("intact", "blend-1", "bits-4"))
    original = weights(model)
    assert all(torch.equal(intact[name], original[name]) for name in original)
    mixed = weights(out / "blend-0.25")
    for name, weight in original.items():
        torch.testing.assert_close(mixed[name], 0.75 * weight + 0.25 * replaced[name])
    changed = {name for name in original if not torch.equal(rounded[name], original[name])}
    assert changed == {name for name in original if "proj" in name}
    assert AutoTokenizer.from_pretrained(out / "bits-4").encode(
        "sky"
    ) == AutoTokenizer.from_pretrained(model).encode("sky")
    rows = (out / "facts.csv").read_text().splitlines()
    assert rows[0] == "model,family,kind,strength,loss" and rows[2].startswith(
        "blend-0.25,tiny-1m,blend,0.25,"
    )


def test_random_weights_are_those_of_the_seed(run, model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--model", model, "--out", tmp_path / name, "--blend", 1, "--seed", seed)
    a, b, c = (
        weights(tmp_path / name / "blend-1")["model.layers.0.mlp.up_proj.weight"] for name in "abc"
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_nothing_is_made_or_evaluated_twice(run, model, tmp_path, capsys):
    words = [
        "--model",
        model,
        "--out",
        tmp_path / "f",
        "--bits",
        8,
        "--run",
        "arc",
        "--output-path",
        tmp_path / "r",
    ]
    with pytest.raises(SystemExit, match="no results of bits-8; the same command tries them again"):
        run(*words, "--limit", 10, fail=["bits-8"])
    made = (tmp_path / "f" / "intact" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    again = run(*words, "--limit", 10)
    assert (
        len(again) == 1 and f"pretrained={tmp_path / 'f' / 'bits-8'},coupling_limit=100" in again[0]
    )
    assert (tmp_path / "f" / "intact" / "model.safetensors").stat().st_mtime_ns == made
    assert capsys.readouterr().out.splitlines() == ["intact: has results", "bits-8: arc"]
    assert run(*words, "--limit", 10) == [] and len(run(*words, "--limit", 20)) == 2


def test_a_family_of_another_model_is_not_added_to(run, model, tmp_path):
    run("--model", model, "--out", tmp_path / "f")
    with pytest.raises(SystemExit, match="made from tiny-1m with seed 0; choose another folder"):
        run("--model", model, "--out", tmp_path / "f", "--seed", 1)


def test_a_model_that_is_not_there_is_one_sentence(run, tmp_path):
    """Regression: the traces of four exceptions."""
    with pytest.raises(SystemExit, match="got .*nowhere, which transformers cannot load"):
        run("--model", tmp_path / "nowhere", "--out", tmp_path / "f")


def test_strengths_are_tried_without_writing(run, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--model", model, "--blend", 0.5, "--bits", 4)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "intact",
        "blend-0.5",
        "bits-4",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--blend", 1.5], ["--bits", 1], ["--run", "arc"]])
def test_what_cannot_be_is_refused(run, model, words, capsys):
    with pytest.raises(SystemExit):
        run("--model", model, *words)
    assert "error: " in capsys.readouterr().err
