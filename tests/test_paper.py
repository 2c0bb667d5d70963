"""`run_coupling_hf` against the release's procedure, done naively: autograd through transformers'
own hidden states.
"""

from __future__ import annotations

import copy
import inspect

import cases
import numpy as np
import pytest
import reference
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm_eval_coupling
from lm_eval_coupling import paper as paper_api
from lm_eval_coupling import run_coupling_hf
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual import TrueDtype

PROMPTS = ["The sky is", "Name a colour", "Snow"]
RANKS = (3, 7)
VARIANTS, NORMS = ("coupling_ujv", "coupling_vju"), ("norm", "trace")
FINAL_NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gemma2": "model.norm",
    "cohere": "model.norm",
}
FLOAT32_ROUNDING = 1e-6  # of the result; computed and compared in float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def everything(folder, tokenizer):
    """All prompts measured in one call."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return run_coupling_hf(model, tokenizer, "tiny", PROMPTS, ranks=[4])


def family(case, tokenizer):
    return cases.tiny_model(case, torch.float64, num_hidden_layers=3, vocab_size=len(tokenizer))


def oracle_jacobians(model, tokenizer, prompt, final_norm=None):
    """∂(hidden_states[l+1] − hidden_states[l])/∂hidden_states[l] at the last token, one backward
    pass per row.

    transformers' last hidden state is behind the final norm; where that norm is named, what enters
    it is taken instead.
    """
    entered = []
    if final_norm:
        model.get_submodule(final_norm).register_forward_pre_hook(
            lambda module, args: entered.append(args[0])
        )
    with TrueDtype(torch.float64), torch.enable_grad():
        hidden = [
            *model(
                **tokenizer(prompt, return_tensors="pt"), output_hidden_states=True
            ).hidden_states
        ]
        if final_norm:
            hidden[-1] = entered[0]
        jacobians = []
        for x, y in zip(hidden[:-1], hidden[1:], strict=True):
            rows = [
                torch.autograd.grad(value, x, retain_graph=True)[0][0, -1]
                for value in (y - x)[0, -1]
            ]
            jacobians.append(torch.stack(rows).double())
    return jacobians


def oracle_coupling(jacobians, ranks):
    """The nested result by loops over pairs of blocks, from full singular value decompositions."""
    found = {
        variant: {K: {norm: np.zeros([len(jacobians)] * 2) for norm in NORMS} for K in ranks}
        for variant in VARIANTS
    }
    for K in ranks:
        triplets = [reference.top_singular(J, K) for J in jacobians]
        for a, J in enumerate(jacobians):
            for b, (U, _, V) in enumerate(triplets):
                for variant, (left, right) in zip(VARIANTS, ((U, V), (V, U)), strict=True):
                    A, S = reference.coupling_matrix(J, left, right), triplets[a][1]
                    for norm, kind in (("norm", "p"), ("trace", "trace")):
                        found[variant][K][norm][a, b] = reference.miscoupling_to(
                            A, S, absolute=True, norm=kind
                        )
    return found


def worst(found, expected, ranks=RANKS):
    return max(
        np.abs(
            np.asarray(found[v][K][n], dtype=np.float64)
            - np.asarray(expected[v][K][n], dtype=np.float64)
        ).max()
        for v in VARIANTS
        for K in ranks
        for n in NORMS
    )


@pytest.mark.parametrize("last_layer_norm", [False, True], ids=["residual-stream", "release"])
@pytest.mark.parametrize("case", FINAL_NORMS)
def test_it_is_the_naive_procedure_on_transformers_hidden_states(
    case, last_layer_norm, tokenizer, float64_device
):
    model = family(case, tokenizer)
    there = copy.deepcopy(model).to(float64_device)
    out = run_coupling_hf(
        there,
        tokenizer,
        case,
        PROMPTS[:1],
        ranks=RANKS,
        last_layer_norm=last_layer_norm,
        dtype="float64",
    )
    assert list(out) == [0] and out[0]["prompt"] == PROMPTS[0]
    final_norm = None if last_layer_norm else FINAL_NORMS[case]
    expected = oracle_coupling(oracle_jacobians(model, tokenizer, PROMPTS[0], final_norm), RANKS)
    assert worst(out[0], expected) < FLOAT32_ROUNDING
    # No other reading of the definition comes near.
    for variant in VARIANTS:
        for norm in NORMS:
            M = expected[variant][7][norm]
            assert np.abs(M - M.T).max() > 0.01
            assert np.abs(M - expected[VARIANTS[variant == VARIANTS[0]]][7][norm]).max() > 0.01
        assert (
            np.diag(expected["coupling_ujv"][7][norm]).max()
            < 1e-6
            < np.diag(expected["coupling_vju"][7][norm]).min()
        )


def test_the_conventions_differ_in_the_last_block_only(model, tokenizer):
    ours, release = (
        run_coupling_hf(model, tokenizer, "tiny", PROMPTS[:1], ranks=[8], last_layer_norm=norm)[0][
            "coupling_ujv"
        ][8]["norm"]
        for norm in (False, True)
    )
    differ = (ours - release).abs() > 1e-3
    assert not differ[:-1, :-1].any() and differ[-1, :-1].all() and differ[:-1, -1].all()


@pytest.mark.parametrize("last_layer_norm", [False, True], ids=["residual-stream", "release"])
@pytest.mark.parametrize(
    "case", ["llama", "gpt2"]
)  # RMSNorm takes weights of another dtype, LayerNorm does not
def test_half_precision_weights_are_measured_in_float32(case, last_layer_norm, tokenizer):
    half = family(case, tokenizer).to(torch.bfloat16)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    found = run_coupling_hf(
        half, tokenizer, case, PROMPTS[:1], ranks=RANKS, last_layer_norm=last_layer_norm
    )[0]
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
    same = run_coupling_hf(
        half.float(), tokenizer, case, PROMPTS[:1], ranks=RANKS, last_layer_norm=last_layer_norm
    )[0]
    assert worst(found, same) < 1e-4


def test_the_page_calls_it_like_this(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_coupling_hf(model, tokenizer, "tiny", PROMPTS[:1], save=True, verbose=True)
    assert list(out[0]) == ["prompt", "coupling_ujv", "coupling_vju"]
    for variant in VARIANTS:
        assert list(out[0][variant]) == [10, 30]  # 50 is more than its width of 32
        for K in (10, 30):
            assert set(out[0][variant][K]) == set(NORMS)
            for values in out[0][variant][K].values():
                assert (
                    values.shape == (4, 4)
                    and values.dtype == torch.float32
                    and values.device.type == "cpu"
                )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny_coupling.npz",
        "tiny_coupling.pt",
    ]
    names = [*inspect.signature(run_coupling_hf).parameters]
    assert (
        " ".join(names[:10])
        == "model tokenizer model_name prompts start end save out_path device verbose"
    )


def test_the_public_name_stays_the_function():
    assert lm_eval_coupling.run_coupling_hf is paper_api.run_coupling_hf is run_coupling_hf


def test_saved_files_load_without_pickle(model, tokenizer, tmp_path):
    folder = tmp_path / "a" / "b"
    out = run_coupling_hf(
        model, tokenizer, "../some/model 1", PROMPTS[:2], 5, 7, True, folder, ranks=[4]
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "some_model_1_coupling.npz",
        "some_model_1_coupling.pt",
    ]
    tensors = torch.load(folder / "some_model_1_coupling.pt", weights_only=True)
    arrays = np.load(folder / "some_model_1_coupling.npz", allow_pickle=False)
    assert list(tensors) == list(out) == [5, 6] and len(arrays.files) == 2 * (1 + 4)
    for i in out:
        assert (
            str(arrays[f"{i}/prompt"]) == tensors[i]["prompt"] == out[i]["prompt"] == PROMPTS[i - 5]
        )
        for variant in VARIANTS:
            for norm in NORMS:
                values = out[i][variant][4][norm]
                assert torch.equal(tensors[i][variant][4][norm], values)
                assert np.array_equal(arrays[f"{i}/{variant}/4/{norm}"], values.numpy())


def test_nothing_is_saved_unasked(model, tokenizer, tmp_path):
    run_coupling_hf(model, tokenizer, "tiny", PROMPTS[:1], out_path=tmp_path / "out", ranks=[4])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, {0: 0, 1: 1, 2: 2}),
        (10, 13, {10: 0, 11: 1, 12: 2}),
        (10, 99, {10: 0, 11: 1, 12: 2}),
        (None, 2, {0: 0, 1: 1}),
        (1, None, {1: 0, 2: 1}),
        (3, None, {}),
    ],
)
def test_start_and_end_number_the_prompts_as_in_the_release(
    model, tokenizer, everything, start, end, expected, recwarn
):
    recwarn.clear()
    out = run_coupling_hf(model, tokenizer, "tiny", PROMPTS, start, end, ranks=[4])
    assert {i: PROMPTS.index(found["prompt"]) for i, found in out.items()} == expected
    for i, j in expected.items():
        assert worst(out[i], everything[j], ranks=[4]) == 0
    left_out = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert len(left_out) == (len(expected) < 3)


def test_pairs_without_a_basis_are_undefined(model, tokenizer):
    layer = model.model.layers[1]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)
    values = run_coupling_hf(model, tokenizer, "tiny", PROMPTS[:1], ranks=[4])[0]["coupling_ujv"][
        4
    ]["norm"]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, :] = expected[:, 1] = True
    assert torch.equal(values.isnan(), expected)


def test_mistakes_are_said(model, tokenizer, tmp_path):
    def run(prompts=PROMPTS, **words):
        return run_coupling_hf(model, tokenizer, "tiny", prompts, **words)

    with pytest.raises(CouplingError, match="one string as prompts"):
        run("The sky is")
    with pytest.raises(CouplingError, match="rank 33 for a model with d_model = 32"):
        run(ranks=[4, 33])
    with pytest.raises(CouplingError, match="expected positive whole numbers"):
        run(ranks=[])
    with pytest.raises(CouplingError, match="got device='meta' for a model on cpu"):
        run(device="meta")
    with pytest.raises(CouplingError, match="coupling_dtype='bfloat16'"):
        run(dtype="bfloat16")
    with pytest.raises(CouplingError, match="prompt 8: got a prompt without any token"):
        run(["Snow", ""], start=7, end=9, ranks=[4])
    (tmp_path / "file").touch()
    with pytest.raises(CouplingError, match="expected a folder that can be written"):
        run(save=True, out_path=tmp_path / "file", ranks=[4])
    torch.nn.init.constant_(model.model.layers[2].mlp.down_proj.weight, torch.nan)
    with pytest.raises(
        CouplingError, match="prompt 0: got a Jacobian of block 2 that is off by nan"
    ):
        run(ranks=[4])


def test_the_models_own_device_may_be_named(model, tokenizer):
    assert run_coupling_hf(model, tokenizer, "tiny", PROMPTS[2:], device="cpu", ranks=[4])


def test_a_device_without_an_index_is_the_models():
    paper_api._check_device("cuda", torch.device("cuda:1"))
    paper_api._check_device("cuda:1", torch.device("cuda:1"))
    with pytest.raises(CouplingError, match="got device='cuda:0' for a model on cuda:1"):
        paper_api._check_device("cuda:0", torch.device("cuda:1"))


def test_a_model_too_narrow_for_the_usual_ranks(tokenizer):
    narrow = cases.tiny_model("llama", torch.float32, hidden_size=8, vocab_size=len(tokenizer))
    with pytest.raises(CouplingError, match="d_model = 8, too narrow for K = 10"):
        run_coupling_hf(narrow, tokenizer, "narrow", PROMPTS[:1])
    assert list(
        run_coupling_hf(narrow, tokenizer, "narrow", PROMPTS[:1], ranks=[8])[0]["coupling_ujv"]
    ) == [8]
