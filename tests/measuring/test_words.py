"""Words of directions, for a head of signed unit rows under blocks that write known words."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from coupling_analysis import prompt_matrices
from coupling_analysis.direction_words import (
    DirectionWords,
    chance_kept,
    direction_words,
    kept_words,
    nearest_words,
)
from saved_runs import record, save, task_summary
from transformers import LlamaConfig, LlamaForCausalLM

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.saved.words import read_words, tokens_hash

ANALYSIS = Path(__file__).parents[2] / "analysis"
D = 16
SIGNED = torch.cat([torch.eye(D), -torch.eye(D)])  # word i is e_i, word D + i is −e_i


class LayerNormHead:
    """A final LayerNorm with a bias and a head with a bias, both large."""

    d_model = D

    def __init__(self):
        draws = torch.Generator().manual_seed(0)
        self.weight, self.bias = torch.ones(D), 5 * torch.randn(D, generator=draws)
        self.head_bias, self.device = 9 * torch.randn(2 * D, generator=draws), torch.device("cpu")

    def logits(self, resid):
        return (
            torch.nn.functional.layer_norm(resid, (D,), self.weight, self.bias) @ SIGNED.T
            + self.head_bias
        )


def test_biases_have_no_say():
    """The bias of a norm or a head is left out: it would give all directions the same words."""
    directions = torch.linalg.qr(torch.randn(D, 4, generator=torch.Generator().manual_seed(1))).Q.mT
    ids = nearest_words(LayerNormHead(), directions, 3)
    for direction, (plus, minus) in zip(directions, ids.tolist(), strict=True):
        values = SIGNED @ (direction - direction.mean())
        assert (
            plus == values.topk(3).indices.tolist() and minus == (-values).topk(3).indices.tolist()
        )
        assert [(i + D) % (2 * D) for i in plus] == minus


def test_kept_words_by_hand():
    ids = torch.tensor(
        [[[[1, 2], [3, 4]]], [[[4, 1], [9, 8]]], [[[2, 1], [3, 9]]]]
    )  # 3 layers, K = 1
    kept = kept_words(ids)
    assert (
        kept[0, 1].tolist() == [[0.5, 0.5]]
        and kept[0, 2].tolist() == [[1.0, 0.5]]
        and kept[1, 2].tolist() == [[0.5, 0.5]]
    )
    assert kept[1, 0].tolist() == [[0.5, 0.0]] and (kept[range(3), range(3)] == 1).all()


def test_lives_end_at_the_first_layer_that_lost_half_the_words():
    kept = np.zeros((4, 4, 1, 2))
    kept[0, 1:, 0, 0] = [0.6, 0.4, 0.9]
    kept[0, 1:, 0, 1] = [0.5, 0.5, 0.5]
    kept[1, 2:, 0, 0] = [0.4, 1.0]
    life = DirectionWords(np.zeros((4, 1, 2, 3), int), kept, np.ones((4, 1))).life
    assert life[:, 0].tolist() == [[1, 3], [0, 0], [0, 0], [0, 0]]


@pytest.fixture(scope="module")
def writer(device):
    """A Llama whose blocks each write along one word: 5, 5 and 7."""
    config = LlamaConfig(
        vocab_size=2 * D,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(SIGNED)
        for block, word in zip(model.model.layers, (5, 5, 7), strict=True):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.gate_proj.weight.normal_()
            block.mlp.up_proj.weight.normal_()
            block.mlp.down_proj.weight.zero_()
            block.mlp.down_proj.weight[word] = 1.0
    return ResidualModel.wrap(model.to(device))


def test_blocks_that_write_words(writer):
    found = direction_words(writer, [3, 1, 4, 1, 5], rank=1, words=1)
    assert [set(pair) for pair in found.ids[:, 0, :, 0].tolist()] == [
        {5, 5 + D},
        {5, 5 + D},
        {7, 7 + D},
    ]
    assert found.kept[0, :, 0].tolist() == [[1, 1], [1, 1], [0, 0]] and found.life[
        :, 0
    ].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert (found.singular_values > 0).all()
    with pytest.raises(
        CouplingError, match="got rank 17 and 1 words for a model with d_model = 16"
    ):
        direction_words(writer, [1, 2], rank=17, words=1)


def test_chance_is_that_of_random_directions(writer):
    everything = chance_kept(writer, rank=2, words=2 * D)
    assert everything == 1.0  # all words there are
    one = [chance_kept(writer, rank=1, words=1, seed=seed) for seed in range(40)]
    # Of 32 equally likely words, that of another direction is nearest to u or −u 2 times in 32.
    assert np.mean(one) == pytest.approx(2 / (2 * D), abs=4 * math.sqrt(0.06 * 0.94 / (40 * 6)))
    assert chance_kept(writer, rank=1, words=4) == chance_kept(writer, rank=1, words=4)


@pytest.fixture
def words(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(ANALYSIS)
    sys.modules.pop("words", None)
    import words

    return words


def test_the_script_leaves_tables_and_a_picture(words, tmp_path, capsys):
    model = tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    words.main(
        [
            model,
            "--prompt",
            "The sky is",
            "The sea",
            "--rank",
            "3",
            "--words",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows, kept = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("words", "words_kept"))
    assert (
        len(rows) == 2 * 4 * 3 * 2
        and set(rows["layer"]) == {1, 2, 3, 4}
        and rows["life"].max() <= 3
    )
    assert rows["kept_next"].isna().equals(rows["layer"] == 4)
    assert (
        kept["distance"].tolist() == [1, 2, 3]
        and kept["n"].tolist() == [6, 4, 2]
        and kept["chance"].nunique() == 1
    )
    assert kept["mean"][0] == pytest.approx(rows["kept_next"].mean())
    assert (
        tmp_path / "out" / "words_kept.png"
    ).exists() and "tiny: The sky is" in capsys.readouterr().out
    assert set(rows["model"]) == {"tiny"} and set(rows["fingerprint"]) == {
        prompt_matrices.load_model(model).fingerprint
    }
    assert rows["doc_hash"].isna().all() and rows["tokens_hash"].nunique() == 2


@pytest.fixture
def measured(tmp_path):
    """Return a model and a run of it, with documents 0 and 1 measured at the last but one token."""
    model = tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    rows = [
        record("arc", i) | {"tokens": (3, 4 + i, 5, 9), "position": 2, "n_tokens": 4}
        for i in range(2)
    ]
    save(
        tmp_path / "out",
        {"arc": task_summary()},
        rows=rows,
        fingerprint=prompt_matrices.load_model(model).fingerprint,
    )
    return model, str(tmp_path / "out")


def test_prompts_of_a_run_are_read_where_they_were_measured(words, measured, tmp_path):
    """The file has the key of a document, and the words of the measured token."""
    model, results = measured
    size = ["--rank", "2", "--words", "3"]
    words.main(
        [
            model,
            "--results",
            results,
            "--task",
            "arc",
            "--doc",
            "1",
            "0",
            *size,
            "--out",
            str(tmp_path),
        ]
    )
    rows = pd.read_csv(tmp_path / "words.csv")
    assert (
        list(rows["doc_hash"].unique()) == ["d1", "d0"]
        and set(rows["position"]) == {2}
        and set(rows["task"]) == {"arc"}
    )
    wrapped = prompt_matrices.load_model(model)
    told = read_words(tmp_path / "words.csv")
    document = {"doc_hash": "d1", "prompt_hash": "p1", "tokens": (3, 5, 5, 9), "position": 2}
    shown = told.of(wrapped.fingerprint, document)
    expected = direction_words(wrapped, [3, 5, 5, 9], position=2, rank=2, words=3)
    assert [(one["layer"], one["k"]) for one in shown] == [
        (layer, k) for layer in (1, 2, 3, 4) for k in (1, 2)
    ]
    np.testing.assert_allclose(
        [one["sigma"] for one in shown], expected.singular_values.ravel(), rtol=1e-5
    )
    decoded = [
        " ".join(repr(wrapped.tokenizer.decode([i])) for i in ids)
        for ids in expected.ids[:, :, 0].reshape(-1, 3)
    ]
    assert [one["words"] for one in shown] == decoded
    assert tokens_hash((3, 5, 5, 9)) == tokens_hash([3, 5, 5, 9]) != tokens_hash((35, 5, 9))


@pytest.mark.parametrize(
    "given, told",
    [
        (["--results", "OUT", "--task", "arc"], "got --results without --doc"),
        (["--doc", "0"], "got --doc without --results"),
        (
            ["--results", "OUT", "--task", "arc", "--doc", "0", "--token", "0"],
            "got --token with --results",
        ),
        (
            ["--results", "OUT", "--task", "arc", "--doc", "0", "--untrained", "0"],
            "got --untrained with --results",
        ),
        (
            ["--results", "OUT", "--task", "arc", "--doc", "7"],
            "got document 7, .* choose among 0, 1",
        ),
        (["--results", "OUT", "--task", "gsm", "--doc", "0"], "got task gsm, .* choose among arc"),
        (
            ["--results", "OUT", "--task", "arc", "--doc", "0", "--dtype", "bfloat16"],
            "got weights of the fingerprint .* expected those that .* measured: tiny",
        ),
    ],
)
def test_prompts_that_no_run_measured_are_refused(words, measured, tmp_path, given, told):
    model, results = measured
    with pytest.raises(CouplingError, match=told):
        words.main(
            [model, *(results if one == "OUT" else one for one in given), "--out", str(tmp_path)]
        )
