"""The script that trains a small model: checkpoints, a falling loss, equal weights."""

import json
import shutil

import pandas as pd
import pytest
import torch
from studied import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling.errors import CouplingError

TINY = "--layers 2 --width 32 --heads 2 --mlp 48 --context 16 --vocabulary 300".split()
TINY += "--windows 4 --rate 0.02 --steps 0 5 25".split()


@pytest.fixture(scope="module")
def script():
    return load_script("small_training")


@pytest.fixture(scope="module")
def trained(script, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "sky"
    script.main([str(text), "--out", str(out), *TINY])
    return out


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def same(item, other):
    return all(torch.equal(weight, weights(other)[name]) for name, weight in weights(item).items())


def test_checkpoints_are_ordinary_models(trained):
    names = {"checkpoint-0", "checkpoint-5", "checkpoint-25", "training.csv", "training.json"}
    assert {file.name for file in trained.iterdir()} == names
    tokenizer = AutoTokenizer.from_pretrained(trained / "checkpoint-25")
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-25")
    tokens = tokenizer("The grass is", return_tensors="pt").input_ids
    assert (
        tokenizer.decode(tokens[0]) == "The grass is" and len(tokenizer) == model.config.vocab_size
    )
    assert model(tokens).logits.isfinite().all() and model.config.max_position_embeddings == 16
    assert tokenizer.eos_token_id == model.config.eos_token_id == tokenizer.bos_token_id
    assert not same(trained / "checkpoint-0", trained / "checkpoint-5")


def test_the_loss_falls(trained):
    rows = pd.read_csv(trained / "training.csv")
    assert rows["step"].tolist() == list(range(26)) and rows["tokens"].iloc[-1] == 25 * 4 * 16
    kept_out = rows.set_index("step")["loss_kept_out"].dropna()
    assert kept_out.index.tolist() == [0, 5, 25]
    assert rows["loss"].iloc[0] > 5 and rows["loss"].iloc[-1] < rows["loss"].iloc[0] / 2
    assert kept_out.is_monotonic_decreasing


def test_the_seed_decides(script, text, trained, tmp_path):
    for seed in (0, 1):
        script.main([str(text), "--out", str(tmp_path / str(seed)), *TINY, "--seed", str(seed)])
    assert same(tmp_path / "0" / "checkpoint-25", trained / "checkpoint-25")
    assert not same(tmp_path / "1" / "checkpoint-0", trained / "checkpoint-0")


def test_a_stopped_training_goes_on(script, text, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "sky")
    shutil.rmtree(out / "checkpoint-25")
    (out / "unfinished").mkdir()
    script.main([str(text), "--out", str(out), *TINY])
    assert same(out / "checkpoint-25", trained / "checkpoint-25")
    assert (out / "training.csv").read_text() == (trained / "training.csv").read_text()
    capsys.readouterr()
    written = (out / "checkpoint-25" / "model.safetensors").stat().st_mtime_ns
    script.main([str(text), "--out", str(out), *TINY])
    assert capsys.readouterr().out.endswith("all checkpoints are there\n")
    assert (out / "checkpoint-25" / "model.safetensors").stat().st_mtime_ns == written


def test_a_checkpoint_that_is_missing_in_between_is_made_again(script, text, trained, tmp_path):
    """It was never made: the training went on from the last one."""
    out = shutil.copytree(trained, tmp_path / "sky")
    for name in ("checkpoint-0", "checkpoint-5"):
        shutil.rmtree(out / name)
        script.main([str(text), "--out", str(out), *TINY])
        assert same(out / name, trained / name)
    assert (out / "training.csv").read_text() == (trained / "training.csv").read_text()


def test_other_texts_of_the_same_file_are_another_training(script, text, trained, tmp_path):
    """Two trainings were joined in one table."""
    out, file = shutil.copytree(trained, tmp_path / "sky"), tmp_path / text.name
    file.write_text(text.read_text())
    recipe = json.loads((out / "training.json").read_text())
    recipe["texts"] = {str(file): [*recipe["texts"].values()][0]}
    (out / "training.json").write_text(json.dumps(recipe))
    script.main([str(file), "--out", str(out), *TINY])
    file.write_text(text.read_text() + "Another end.")
    with pytest.raises(CouplingError, match="a training of other data"):
        script.main([str(file), "--out", str(out), *TINY])
    (out / "training.json").write_text('{"te')
    with pytest.raises(CouplingError, match="training.json, which cannot be read"):
        script.main([str(file), "--out", str(out), *TINY])


def test_tables_of_several_columns(script, tmp_path):
    rows = [
        {"question": "How many?", "answer": "#### 7", "id": 3},
        {"question": "Why?", "answer": "12", "id": 4},
    ]
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(table)
    expected = ["How many?\n#### 7", "Why?\n12"]
    assert [script.documents(file, ["page", "question", "answer"]) for file in (lines, table)] == [
        expected,
        expected,
    ]
    with pytest.raises(
        CouplingError, match="with question, answer, id, expected page or text; .* with --column"
    ):
        script.documents(lines, ["page", "text"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "got 1 tokens, expected two contexts of 16; give more text or a smaller --context"),
        ("The sky is blue.", "expected two contexts of 16; give more text or a smaller --context"),
        (None, "got .*none.txt, expected readable plain text, .jsonl or .parquet"),
    ],
)
def test_too_little_text(script, tmp_path, content, message):
    if content is not None:
        (tmp_path / "none.txt").write_text(content)
    with pytest.raises(CouplingError, match=message):
        script.main([str(tmp_path / "none.txt"), "--out", str(tmp_path / "out"), *TINY])
    assert not (tmp_path / "out").exists()


def test_another_training_is_not_added_to(script, text, trained):
    with pytest.raises(
        CouplingError, match="a training of other data or settings .*; choose another --out"
    ):
        script.main([str(text), "--out", str(trained), *TINY, "--rate", "0.1"])


def test_impossible_steps(script, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(text), "--out", str(tmp_path), "--steps", "0"])
    assert "expected none below 0 and a last one of 1 or more" in capsys.readouterr().err


def test_every_checkpoint_is_evaluated(script, text, trained, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        "controlled_family.evaluate",
        lambda name, options: commands.append((name, options.run)) or True,
    )
    script.main(
        [
            str(text),
            "--out",
            str(trained),
            *TINY,
            "--run",
            "wikitext",
            "--output-path",
            str(tmp_path),
        ]
    )
    assert commands == [(f"checkpoint-{step}", "wikitext") for step in (0, 5, 25)]
