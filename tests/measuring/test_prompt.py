"""One prompt from token ids to its record, against naive float64 oracles; and its failures."""

import copy
import math
import pickle

import cases
import numpy as np
import pytest
import reference
import torch
from oracles import decoder_layers, oracle
from wrapping import wrapped_on

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians import levels as jacobians
from lm_eval_coupling.measures.registry import measured_columns, record_columns
from lm_eval_coupling.measuring import batch
from lm_eval_coupling.measuring.prompt import measure_coupling, measure_prompt
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel, TrueDtype

RANKS = (2, 5)
OTHERS = ("self_", "context_", "attention_", "mlp_")  # of measures that are not taken here
MEASURES = ("depth", "regularity", "swapped")
PAIRS = [
    name for name in measured_columns() if "miscoupling" in name and not name.startswith(OTHERS)
]


@pytest.fixture(scope="module")
def llama():
    return cases.tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(llama, float64_device):
    return wrapped_on(float64_device, llama)


def tokens(seq=7):
    return cases.tiny_tokens(seq)[0].tolist()


def measured(model, prompt=None, **options):
    given = {"ranks": RANKS, "measures": MEASURES, "dtype": "float64", "progress": False} | options
    (found,) = measure_coupling(model, [tokens() if prompt is None else prompt], **given)
    return found


def same(one, other):
    """Equal in everything but the time it took; NaN equals NaN."""
    assert one.to_columns().keys() == other.to_columns().keys()
    for name, value in one.to_columns().items():
        if name != "seconds":
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def trajectory(model, ids, token):
    """x^0 … x^L by hooks on the unmodified model's own blocks."""
    points = []

    def before(module, args, kwargs):
        points.append((args[0] if args else kwargs["hidden_states"])[0, token].detach())

    def after(module, args, output):
        points.append((output[0] if isinstance(output, tuple) else output)[0, token].detach())

    blocks = decoder_layers(model)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(points)


@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "gpt-neox"])
def test_a_record_is_the_oracles(case, position, float64_device):
    """Compare every field with plain backward passes, full SVDs and loops over numbers."""
    plain = cases.tiny_model(case)
    found = measured(wrapped_on(float64_device, plain), position=position)
    token = position % 7
    with TrueDtype(torch.float64):
        J = [oracle(plain, torch.tensor([tokens()]), layer, token, token) for layer in range(2)]
        x = trajectory(plain, tokens(), token)
    layers = range(2)
    for i, k in enumerate(RANKS):
        U, S, V = zip(*(reference.top_singular(j, k) for j in J), strict=True)
        for a in layers:
            for b in layers:
                A = reference.coupling_matrix(J[a], U[b], V[b])
                A_vju = reference.coupling_matrix(J[a], V[b], U[b])
                expected = {
                    "normalized_miscoupling": reference.miscoupling(A, normalized=True),
                    "miscoupling": reference.miscoupling(A),
                    "miscoupling_to": reference.miscoupling_to(A, S[a]),
                    "miscoupling_to_absolute": reference.miscoupling_to(A, S[a], absolute=True),
                    "miscoupling_to_trace": reference.miscoupling_to(A, S[a], norm="trace"),
                    "miscoupling_to_vju": reference.miscoupling_to(A_vju, S[a]),
                    "miscoupling_to_absolute_vju": reference.miscoupling_to(
                        A_vju, S[a], absolute=True
                    ),
                }
                assert set(expected) == set(PAIRS)
                for name, value in expected.items():
                    assert getattr(found, name)[i, a, b] == pytest.approx(
                        value, rel=1e-5, abs=1e-6
                    ), (name, k, a, b)
                overlap = [reference.subspace_overlap(basis[a], basis[b]) for basis in (U, V)]
                assert found.subspace_overlap[i, :, a, b] == pytest.approx(overlap, rel=1e-5)
            values = np.linalg.svd(J[a].numpy(), compute_uv=False)
            assert found.gap[i, a] == pytest.approx(reference.relative_gap(values, k), rel=1e-4)
            assert found.singular_values[a] == pytest.approx(values[: RANKS[-1]], rel=1e-5)
        off = found.normalized_miscoupling[i]
        assert found.coupling(k) == pytest.approx(1 - reference.mean_over_pairs(off), abs=1e-6)
        assert found.coupling(k, diagonal=True) == pytest.approx(
            1 - reference.mean_over_pairs(off, diagonal=True), abs=1e-6
        )
    assert found.norms == pytest.approx(reference.norms(x), rel=1e-6)
    assert found.line_shape_score == pytest.approx(reference.line_shape_score(x), rel=1e-9)
    assert found.expodistance == pytest.approx(reference.expodistance(x), rel=1e-6)
    assert (found.tokens, found.position, found.ranks) == (tuple(tokens()), token, RANKS)
    assert found.method == tuple(cases.levels(case)) and found.reason is None and found.seconds > 0
    assert found.certificate.max() < 1e-10 and found.svd_residual.max() < 1e-10


def test_shapes_and_dtypes(model):
    found = measured(model)
    shapes = {name: (2, 3, 3) for name in PAIRS} | {
        "rotated": (2, 3, 3),
        "one_pair": (2, 3, 3),
        "rotated_coupling": (2,),
        "mean_one_pair": (2,),
        "subspace_overlap": (2, 2, 3, 3),
        "singular_values": (3, 5),
        "gap": (2, 3),
        "angle_bound": (2, 3),
        **dict.fromkeys(
            (
                "jacobian_norm",
                "jacobian_frobenius",
                "stable_rank",
                "non_normality",
                "symmetric_share",
            ),
            (3,),
        ),
        "svd_residual": (3,),
        "certificate": (3,),
        "norms": (4,),
        "line_shape_scores": (7,),
        "windowed_line_shape": (1,),
        "windowed_expodistance": (1,),
        "step_lengths": (3,),
        "entropy": (4,),
    }
    arrays = {
        name: value for name, value in found.to_columns().items() if isinstance(value, np.ndarray)
    }
    assert {name: value.shape for name, value in arrays.items()} == shapes
    assert {value.dtype for value in arrays.values()} == {np.dtype("float32")}
    assert all(np.isfinite(value).all() for value in arrays.values())


def test_a_smaller_rank_is_cut_from_the_largest(model):
    """Values at a rank depend neither on the other ranks nor on their order."""
    alone, together = measured(model, ranks=(2,)), measured(model, ranks=[5, 2, 2])
    assert together.ranks == (2, 5)
    for name in [*PAIRS, "subspace_overlap", "gap"]:
        np.testing.assert_allclose(
            getattr(alone, name)[0], getattr(together, name)[0], rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_the_largest_possible_rank(model):
    found = measured(model, ranks=(24,))
    assert found.singular_values.shape == (3, 24)
    assert np.isnan(found.gap).all() and np.isfinite(found.angle_bound).all()  # there is no σ_25
    assert found.subspace_overlap == pytest.approx(np.ones((1, 2, 3, 3)), rel=1e-5)
    assert 0 < found.coupling(24) < 1


def test_float32_is_float64_but_for_rounding(model):
    single, double = measured(model, dtype="float32"), measured(model)
    assert single.certificate.max() < 1e-4 and double.certificate.max() < 1e-10
    np.testing.assert_allclose(single.singular_values, double.singular_values, rtol=1e-4)
    for k in RANKS:
        assert single.coupling(k) == pytest.approx(double.coupling(k), abs=1e-3)


def test_a_record_does_not_depend_on_its_neighbours(model):
    prompts = [tokens(5), tokens(), tokens(12)]
    (_, among, _) = measure_coupling(
        model, prompts, ranks=RANKS, measures=MEASURES, dtype="float64", progress=False
    )
    alone = measured(model)
    same(alone, measured(model))
    for name in [
        *PAIRS,
        "norms",
        "singular_values",
        "subspace_overlap",
    ]:  # beyond rounding: a batch has its own products
        np.testing.assert_allclose(
            getattr(among, name), getattr(alone, name), rtol=1e-6, atol=1e-9, err_msg=name
        )


def test_only_what_is_before_the_token_counts(model):
    at = measured(model, tokens(7)[:5])
    inside = measured(model, tokens(7), position=4)
    for name in [*PAIRS, "norms"]:
        np.testing.assert_allclose(
            getattr(inside, name), getattr(at, name), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(("position", "absolute"), [(-1, 6), (6, 6), (0, 0), (-7, 0)])
def test_positions(model, position, absolute):
    found = measured(model, position=position)
    assert found.position == absolute and found.reason is None


def test_a_prompt_of_one_token(model):
    found = measured(model, tokens()[:1])
    assert (
        found.reason is None
        and np.isfinite(found.normalized_miscoupling).all()
        and found.certificate.max() < 1e-10
    )


@pytest.mark.parametrize(("position", "prompt"), [(7, None), (-8, None), (-1, [])])
def test_a_token_that_is_not_there_is_a_reason(model, position, prompt):
    found = measured(model, prompt, position=position)
    assert (
        "got a prompt of no tokens" in found.reason
        if prompt == []
        else f"got token {position} of a prompt of" in found.reason
    )
    assert (
        found.normalized_miscoupling is None
        and math.isnan(found.coupling(2))
        and math.isnan(found.line_shape_score)
    )


def test_text_is_tokenised_with_the_tokenizers_own_special_tokens(llama, model):
    class Tokenizer:
        def encode(self, text):
            return [1, *map(int, text.split())]

    same(
        measured(wrapped_on(model.device, llama, Tokenizer()), "5 6 7"),
        measured(model, [1, 5, 6, 7]),
    )
    with pytest.raises(CouplingError, match="without a tokenizer"):
        measured(model, "5 6 7")


def test_measures_are_independent(model):
    both, depth, regularity = (
        measured(model, measures=m) for m in (("depth", "regularity"), ("depth",), ("regularity",))
    )
    assert both.coupling(2) == depth.coupling(2) and math.isnan(regularity.coupling(2))
    assert both.line_shape_score == regularity.line_shape_score and math.isnan(
        depth.line_shape_score
    )
    assert (
        depth.norms is None
        and regularity.normalized_miscoupling is None
        and regularity.certificate is None
    )
    assert depth.reason is regularity.reason is None


@pytest.mark.parametrize("method", jacobians.LEVELS)
def test_methods_agree(model, method):
    found = measured(model, method=method)
    assert found.method == (method,) * 3
    assert found.coupling(5) == pytest.approx(measured(model).coupling(5), abs=1e-6)


def test_measures_as_on_the_command_line(model):
    assert measured(model, measures="regularity+depth").line_shape_score is not None


def test_a_rank_that_was_not_measured_is_named(model):
    with pytest.raises(CouplingError, match=r"rank 3, expected one of the measured ranks \[2, 5\]"):
        measured(model).coupling(3)


def test_a_record_gives_every_column_by_name(model):
    for record in (
        measured(model),
        measured(model, position=99),
        measured(model, measures=("regularity",)),
    ):
        columns = record.to_columns()
        assert list(columns) == list(record_columns())
        for name, value in columns.items():
            np.testing.assert_array_equal(value, record[name], err_msg=name)


def silenced(layer):
    """A llama whose one block adds nothing."""
    silent = cases.tiny_model("llama", num_hidden_layers=3)
    for weight in (
        silent.model.layers[layer].self_attn.o_proj.weight,
        silent.model.layers[layer].mlp.down_proj.weight,
    ):
        weight.data.zero_()
    return ResidualModel.wrap(silent)


def test_pairs_with_a_block_that_adds_nothing_are_undefined_and_said_so():
    found = measured(silenced(1))
    assert "5 of 9 layer pairs are undefined" in found.reason
    undefined = np.isnan(found.normalized_miscoupling[0])
    assert undefined[1].all() and undefined[:, 1].all() and undefined.sum() == 5
    assert np.isfinite(found.coupling(2)) and math.isnan(found.line_shape_score)
    assert "undefined line-shape-score:" in found.reason and np.isfinite(found.expodistance)
    assert measured(silenced(1), measures=("regularity",)).reason.startswith(
        "undefined line-shape-score:"
    )


def test_weights_that_are_not_finite_are_a_reason():
    broken = cases.tiny_model("llama", num_hidden_layers=3)
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    assert measured(ResidualModel.wrap(broken)).reason == "the output of block 1 is not finite"
    broken.model.embed_tokens.weight.data.fill_(math.inf)
    assert measured(ResidualModel.wrap(broken)).reason == "the embeddings are not finite"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"
            ),
            "out of memory",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory"),
        (RuntimeError("line one\nline two " + "x" * 400), "RuntimeError: line one line two x"),
        (CouplingError("got this, expected that"), "got this, expected that"),
    ],
)
def test_what_goes_wrong_in_one_prompt_is_its_reason(model, monkeypatch, error, reason):
    def failing(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(batch, "jacobians_of_traces", failing)
        found = measured(model)
    assert found.reason.startswith(reason) and "\n" not in found.reason and len(found.reason) < 350
    assert found.tokens == tuple(tokens()) and found.normalized_miscoupling is None
    assert measured(model).reason is None


def test_ctrl_c_is_no_reason(model, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "jacobians_of_traces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_prompt(model, tokens(), -1, Settings(RANKS))


@pytest.mark.parametrize("error", [0.3, math.nan])
def test_a_jacobian_that_fails_its_certificate_is_not_used(model, monkeypatch, error):
    monkeypatch.setattr(jacobians.Truth, "error", lambda *args: error)
    monkeypatch.setattr(
        jacobians,
        "certify_each",
        lambda calls, *args: calls[0].resid_pre.new_full((len(calls),), error),
    )
    found = measured(model)
    assert (
        found.reason.startswith("the Jacobian of block 0 (autodiff) is off by")
        and "own derivative" in found.reason
    )
    assert found.normalized_miscoupling is None and math.isnan(found.coupling(2))
    assert found.method == ("autodiff",) * 3 and found.certificate.shape == (3,)
    assert found.line_shape_score > 1  # the trajectory is not in doubt


def test_regularity_of_a_record_is_that_of_its_trajectory(model, llama):
    """Compare every number with its definition, from the unmodified model's hidden states."""
    found = measured(model, window=2)
    with torch.no_grad(), TrueDtype(torch.float64):
        double = copy.deepcopy(llama).double()
        seen = []
        layers = decoder_layers(double)
        handles = [
            layers[0].register_forward_pre_hook(
                lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            )
        ]
        handles += [
            layer.register_forward_hook(
                lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in layers
        ]
        double(torch.tensor([tokens()]), use_cache=False)
        x = torch.stack([h[0] for h in seen], dim=1)  # token, point, d_model
        decoded = double.lm_head(double.model.norm(x[-1])).log_softmax(-1)
    steps = x.diff(dim=1)
    units = steps / steps.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(found.line_shape_scores, 3 / units.sum(1).norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(found.line_shape_scores[-1], found.line_shape_score, rtol=1e-5)
    np.testing.assert_allclose(
        found.windowed_line_shape,
        [2 / (units[-1, i] + units[-1, i + 1]).norm() for i in (0, 1)],
        rtol=1e-5,
    )
    growth = x[-1].norm(dim=-1).log().diff()
    expected = [growth[i : i + 2].var(correction=0) / growth[i : i + 2].mean() ** 2 for i in (0, 1)]
    np.testing.assert_allclose(found.windowed_expodistance, expected, rtol=1e-4)
    lengths = steps[-1].norm(dim=-1)
    np.testing.assert_allclose(found.step_lengths, lengths, rtol=1e-6)
    assert found.equidistance == pytest.approx(
        (lengths.std(correction=0) / lengths.mean()).item(), rel=1e-6
    )
    np.testing.assert_allclose(found.entropy, -(decoded.exp() * decoded).sum(-1), rtol=1e-6)
    assert found.window == 2 and measured(model).window == 3  # eleven, or all of fewer blocks


def test_a_window_longer_than_the_model_is_named(model):
    with pytest.raises(CouplingError, match="got a window of 4 blocks for a model of 3"):
        measured(model, window=4)
    with pytest.raises(CouplingError, match="coupling_window=0, expected a whole number from 1"):
        measured(model, window=0)


def test_a_head_that_fails_costs_the_entropy_only(model, monkeypatch):
    def failing(self, resid):
        raise RuntimeError("no head")

    monkeypatch.setattr(ResidualModel, "logits", failing)
    found = measured(model)
    assert found.entropy is None and found.reason == "no entropy: RuntimeError: no head"
    assert found.normalized_miscoupling is not None and found.line_shape_score > 1


def test_records_and_models_are_shown_in_a_line():
    """Their arrays filled a screen."""
    model = ResidualModel.wrap(cases.tiny_model("llama", torch.float32))
    (record,) = measure_coupling(model, [[5, 3, 7]], ranks=(2, 4), progress=False)
    assert repr(record).startswith(
        f"<PromptCoupling at token 2 of 3, coupling@2 {record.coupling(2):.4f}"
    )
    assert "LlamaForCausalLM, 2 blocks" in repr(model) and "\n" not in repr(record) + repr(model)


def test_records_are_compared_and_survive_a_pickle(model):
    """`==` of two records ended in an error of NumPy's about the truth of arrays."""
    (record,) = measure_coupling(model, [tokens()], ranks=(2,), progress=False)
    again = pickle.loads(pickle.dumps(record))
    assert again == record and copy.deepcopy(record) == record and [again].index(record) == 0
    (other,) = measure_coupling(model, [tokens(6)], ranks=(2,), progress=False)
    assert other != record and record != "a record"
    name = next(n for n, r in again.results.items() if "normalized_miscoupling" in r.columns)
    again.results[name].columns["normalized_miscoupling"][0, 0, 1] += 1e-6
    assert again != record
