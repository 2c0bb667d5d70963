"""Measures over tokens against naive float64 autograd Jacobians, and their formulas by hand."""

import math

import cases
import numpy as np
import pytest
import reference
import torch
from oracles import oracle, oracle_by_input, worst
from wrapping import wrapped_on

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.token_pairs import jacobians_of_pairs
from lm_eval_coupling.measures.formulas.choices import chosen_layers, chosen_tokens
from lm_eval_coupling.measures.formulas.spectrum import (
    effective_rank,
    inverse_against_depth,
    participation_ratio,
)
from lm_eval_coupling.measures.registry import registered_measures
from lm_eval_coupling.measuring.prompt import measure_coupling, measure_prompt
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import TrueDtype

SEQ, RANKS = 6, (2, 4)
PAIRS = [(5, 5), (5, 0), (2, 2), (5, 3), (2, 4), (4, 1)]


@pytest.fixture(scope="module")
def llama():
    return cases.tiny_model("llama")


@pytest.fixture(scope="module")
def wrapped(llama, float64_device):
    return wrapped_on(float64_device, llama)


def tokens():
    return cases.tiny_tokens(SEQ)


def exact(model, layer, t_out, t_in):
    with TrueDtype(torch.float64):
        return oracle(model, tokens(), layer, t_out, t_in)


def measured(wrapped, *measures, **options):
    given = {"ranks": RANKS, "dtype": "float64", "progress": False, "layers": "all"} | options
    (found,) = measure_coupling(wrapped, [tokens().flatten().tolist()], measures=measures, **given)
    return found


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "gpt-oss", "qwen3-next"])
def test_jacobians_of_many_pairs_are_the_oracles(case, float64_device):
    """Whatever the level; exactly zero from a later token to an earlier one."""
    model = cases.tiny_model(case)
    wrapped = wrapped_on(float64_device, model)
    trace = wrapped.trace(tokens(), torch.float64)
    for layer, call in enumerate(trace.calls):
        with torch.no_grad():
            found, errors = jacobians_of_pairs(call, PAIRS)
        assert errors.max() < 1e-10
        with TrueDtype(torch.float64):
            outputs = {t_out for t_out, _ in PAIRS}
            by_input = {t: oracle_by_input(model, tokens(), layer, t) for t in outputs}
        for (t_out, t_in), J in zip(PAIRS, found.cpu(), strict=True):
            assert worst(J, by_input[t_out][:, t_in]) < 1e-12, (layer, t_out, t_in)
            assert t_in <= t_out or not J.any()


@pytest.mark.parametrize("case", ["llama", "gpt-oss"])
def test_a_row_by_autodiff_is_the_oracles(case, float64_device, monkeypatch):
    """Take one backward pass per coordinate for all tokens, not one for each token."""
    from lm_eval_coupling.jacobians import token_pairs as pairs

    alone, right = [], pairs.certified_jacobian
    monkeypatch.setattr(
        pairs, "certified_jacobian", lambda *args: alone.append(args) or right(*args)
    )
    model = cases.tiny_model(case)
    wrapped = wrapped_on(float64_device, model)
    with torch.no_grad():
        found, errors = jacobians_of_pairs(
            wrapped.trace(tokens(), torch.float64).calls[1], [(5, t) for t in range(5)], "autodiff"
        )
    assert errors.max() < 1e-10 and len(alone) == 1
    for t, J in enumerate(found.cpu()):
        assert worst(J, exact(model, 1, 5, t)) < 1e-12


def test_a_broken_row_by_autodiff_is_caught_by_its_certificate(wrapped, llama, monkeypatch):
    from lm_eval_coupling.jacobians import token_pairs as pairs

    right = pairs.autodiff_row
    monkeypatch.setattr(pairs, "autodiff_row", lambda *args: right(*args) * 1.001)
    trace = wrapped.trace(tokens(), torch.float64)
    with torch.no_grad():
        found, errors = jacobians_of_pairs(trace.calls[0], [(5, 1), (5, 2)], "autodiff")
    assert errors.max() < 1e-10 and worst(found[1].cpu(), exact(llama, 0, 5, 2)) < 1e-12


def test_a_broken_row_is_caught_by_its_certificate(wrapped, llama, monkeypatch):
    from lm_eval_coupling.jacobians import token_pairs as pairs

    right = pairs.closed_row
    monkeypatch.setattr(pairs, "closed_row", lambda *args: right(*args) * 1.001)
    trace = wrapped.trace(tokens(), torch.float64)
    with torch.no_grad():
        found, errors = jacobians_of_pairs(trace.calls[0], [(5, 1)])
    assert errors[0] < 1e-10 and worst(found[0].cpu(), exact(llama, 0, 5, 1)) < 1e-12


def miscoupling(J1, J2, k):
    U, _, V = reference.top_singular(J2.numpy(), k)
    return reference.miscoupling(reference.coupling_matrix(J1.numpy(), U, V), normalized=True)


def test_self_coupling_is_the_oracles(wrapped, llama):
    found = measured(wrapped, "self", tokens="0+2+-1")
    assert found.self_tokens == (0, 2, 5) and found.self_layers == (0, 1) and found.reason is None
    J = {(layer, t): exact(llama, layer, t, t) for layer in (0, 1) for t in (0, 2, 5)}
    for r, k in enumerate(RANKS):
        for a in (0, 1):
            for b in (0, 1):
                for i, t in enumerate((0, 2, 5)):
                    for j, s in enumerate((0, 2, 5)):
                        expected = miscoupling(J[a, t], J[b, s], k)
                        assert found.self_miscoupling[r, a, b, i, j] == pytest.approx(
                            expected, rel=1e-5, abs=1e-6
                        )


def test_context_coupling_is_the_oracles(wrapped, llama):
    found = measured(wrapped, "context", tokens="1+3+4", layers="1")
    assert found.context_tokens == (1, 3, 4) and found.context_layers == (1,)
    from_first = [exact(llama, 1, t, 1) for t in (1, 3, 4)]
    to_last = [exact(llama, 1, 5, t) for t in (1, 3, 4)]
    for r, k in enumerate(RANKS):
        for i in range(3):
            for j in range(3):
                for J, name in (
                    (from_first, "context_input_miscoupling"),
                    (to_last, "context_output_miscoupling"),
                ):
                    expected = miscoupling(J[i], J[j], k)
                    assert getattr(found, name)[r, 0, 0, i, j] == pytest.approx(
                        expected, rel=1e-5, abs=1e-6
                    ), name


def test_what_is_zero_is_undefined_and_counted(float64_device):
    """With a sliding window of 5 tokens, the first token does not reach the last."""
    wrapped = wrapped_on(float64_device, cases.tiny_model("mistral"))
    prompt = cases.tiny_tokens(9).flatten().tolist()
    (found,) = measure_coupling(
        wrapped,
        [prompt],
        ranks=(2,),
        measures=("context",),
        tokens="0+8",
        layers="0",
        dtype="float64",
        progress=False,
    )
    assert (
        found.reason
        == "6 of 8 context couplings are undefined: a Jacobian is zero or of too low a rank"
    )
    expected = [[True, True], [True, False]]
    assert np.isnan(found.context_output_miscoupling[0, 0, 0]).tolist() == expected
    assert np.isnan(found.context_input_miscoupling[0, 0, 0]).tolist() == [
        [False, True],
        [True, True],
    ]


def test_spectra_are_the_oracles(wrapped, llama):
    found = measured(wrapped, "spectra")
    assert found.frobenius_norms.shape == found.spectral_norms.shape == (2, SEQ)
    for layer in (0, 1):
        for t in range(SEQ):
            J = exact(llama, layer, SEQ - 1, t)
            assert found.frobenius_norms[layer, t] == pytest.approx(J.norm().item(), rel=1e-6)
            assert found.spectral_norms[layer, t] == pytest.approx(
                torch.linalg.matrix_norm(J, 2).item(), rel=1e-5
            )
        S = torch.linalg.svdvals(exact(llama, layer, SEQ - 1, SEQ - 1)).numpy()
        p = S / S.sum()
        assert found.effective_rank[layer] == pytest.approx(
            math.exp(-(p * np.log(p)).sum()), rel=1e-6
        )
        assert found.participation_ratio[layer] == pytest.approx(
            (S**2).sum() ** 2 / (S**4).sum(), rel=1e-6
        )
    assert (
        found.depth_slope.shape == (4,) and np.isnan(found.depth_slope).all()
    )  # two blocks make no line


def test_shapes_of_spectra_by_hand():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)) == pytest.approx(
        3
    )
    assert participation_ratio(
        torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    ) == pytest.approx(3)
    assert participation_ratio(torch.tensor([2.0, 1.0], dtype=torch.float64)) == pytest.approx(
        25 / 17
    )
    slope, r2 = inverse_against_depth(
        np.array([[1.0, 1.0, 1.0], [1 / 2, 1.0, 0.0], [1 / 3, 1.0, 1.0], [1 / 5, 1.0, 1.0]])
    )
    depth, inverse = np.arange(1, 5), np.array([1, 2, 3, 5])
    assert (
        slope[0] == pytest.approx(np.polyfit(depth, inverse, 1)[0])
        and slope[1] == 0
        and math.isnan(slope[2])
    )
    assert (
        r2[0] == pytest.approx(np.corrcoef(depth, inverse)[0, 1] ** 2)
        and math.isnan(r2[1])
        and math.isnan(r2[2])
    )


def test_principal_trajectories_by_hand(wrapped):
    from lm_eval_coupling.measures.formulas.trajectory import principal_trajectories

    x = torch.tensor(
        [
            [[0.0, 0.0, 7.0], [4.0, 1.0, 7.0]],
            [[1.0, 1.0, 7.0], [-4.0, -1.0, 7.0]],
            [[2.0, 0, 7], [4, -1, 7]],
        ]
    )
    x = torch.cat([x, torch.tensor([[[0.0, 0.0, 0.0], [-4.0, 1.0, 7.0]]])])
    points, share = principal_trajectories(x, components=2)
    assert torch.allclose(
        points[:, 1].abs(), torch.tensor([[4.0, 1.0]], dtype=torch.float64).expand(4, 2)
    )
    assert torch.allclose(share, torch.tensor([16 / 17, 1 / 17], dtype=torch.float64))
    assert torch.allclose(points[1, 0], torch.tensor([1.0, 1.0], dtype=torch.float64))
    found = measured(wrapped, "regularity", trajectories=True)
    assert found.trajectories.shape == (SEQ, 3, 3) and 0 < found.trajectory_variance.sum() <= 1
    np.testing.assert_allclose(found.trajectories[:, -1].mean(axis=0), 0, atol=1e-6)
    alone = measure_prompt(wrapped, [3], -1, Settings((2,), ("regularity",), trajectories=True))
    assert alone.trajectories.shape == (1, 3, 0)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last2", [3, 4]),
        ("first3", [0, 1, 2]),
        ("last9", [0, 1, 2, 3, 4]),
        ("3+0", [0, 3]),
        ("-1+4+0", [0, 4]),
        ("[1,2]", [1, 2]),
    ],
)
def test_choosing_tokens(choice, expected):
    assert chosen_tokens(choice, 4) == expected


def test_random_tokens_are_the_same_every_time():
    assert chosen_tokens("random16", 99) == chosen_tokens("random16", 99)
    assert len(set(chosen_tokens("random16", 99))) == 16 and chosen_tokens("random16", 9) == list(
        range(10)
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("spaced3", [0, 2, 4]), ("spaced1", [0]), ("0+-1", [0, 4])],
)
def test_choosing_layers(choice, expected):
    assert chosen_layers(choice, 5) == expected


@pytest.mark.parametrize("choice", ["last", "last0", "some", "", "1.5"])
def test_a_choice_that_cannot_be_read(choice):
    with pytest.raises(CouplingError, match="got coupling_tokens=.*expected all, lastN"):
        Settings(tokens=choice)
    with pytest.raises(CouplingError, match="got coupling_layers=.*expected all, spacedN"):
        chosen_layers(choice, 5)


def test_a_token_outside_the_prompt_costs_that_measure_only(wrapped):
    found = measured(wrapped, "regularity", "self", tokens="0+9")
    assert (
        found.reason
        == "no self: got token 9 of a prompt whose measured token is number 5, expected -6 to 5"
    )
    assert found.line_shape_score > 1 and found.self_miscoupling is None
    with pytest.raises(CouplingError, match="got layer 7 of a model of 2 blocks"):
        measured(wrapped, "self", layers="7")


def test_records_of_these_measures_round_trip(wrapped, tmp_path):
    from lm_eval_coupling.saved.records import load_records
    from lm_eval_coupling.saved.tables import write_tables

    found = measured(wrapped, *registered_measures(), tokens="last2", trajectories=True)
    about = {
        "task": "t",
        "doc_id": 0,
        "doc_hash": "d",
        "prompt_hash": "p",
        "prompt_index": 0,
        "weights": "trained",
    }
    (path,) = write_tables([about | found.to_columns()], tmp_path, "2026-01-01", {})
    again = load_records(path).to_dict("records")[0]
    for name, value in found.to_columns().items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(again[name], value)
        else:
            assert again[name] == value, name


def test_cost_is_counted():
    settings = Settings((2,), ("self", "context", "spectra"), tokens="last8", layers="spaced4")
    assert settings.extra(30, 1000, 39) == (4 * 8 + 2 * 4 * 8 + 30 * 40, 40 * 4.0)
    assert Settings().extra(30, 1000, 39) == (0, 0.0)
    assert (
        Settings((2,), ("self",)).as_dict()["tokens"] == "last8"
        and "tokens" not in Settings().as_dict()
    )
