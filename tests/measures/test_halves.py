"""Attention and MLP apart, against automatic differentiation of the unmodified model's parts."""

import cases
import numpy as np
import pytest
import reference
import torch
from oracles import decoder_layers
from wrapping import wrapped_on

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.measures.registry import readings
from lm_eval_coupling.measuring.prompt import measure_coupling
from lm_eval_coupling.residual import ResidualModel, TrueDtype
from lm_eval_coupling.residual.sublayers import attention_alone

SEQ, RANKS = 6, (2, 4)


def llama(block, x, attend):
    after = x + attend(block.input_layernorm(x))
    return after, lambda y: block.mlp(block.post_attention_layernorm(y))


def gemma2(block, x, attend):
    after = x + block.post_attention_layernorm(attend(block.input_layernorm(x)))
    return after, lambda y: block.post_feedforward_layernorm(
        block.mlp(block.pre_feedforward_layernorm(y))
    )


def gpt2(block, x, attend):
    return x + attend(block.ln_1(x)), lambda y: block.mlp(block.ln_2(y))


def gpt_neox(block, x, attend):
    return x + attend(block.input_layernorm(x)), lambda y: block.mlp(
        block.post_attention_layernorm(y)
    )


def opt(block, x, attend):
    after = x + attend(block.self_attn_layer_norm(x))
    return after, lambda y: block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(y))))


FAMILIES = {
    "llama": (llama, "self_attn"),
    "gemma2": (gemma2, "self_attn"),
    "gpt2": (gpt2, "attn"),
    "gpt-neox": (gpt_neox, "attention"),  # both halves read the stream
    "opt": (opt, "self_attn"),
    "mixtral": (llama, "self_attn"),
}


def oracles(case, model, tokens):
    """∂a/∂x and ∂m/∂(its own input) of every block at the last token, row by row of autograd."""
    parts, name = FAMILIES[case]
    seen = []
    handles = [
        getattr(block, name).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        for block in decoder_layers(model)
    ]
    streams = []
    handles += [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: streams.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for block in decoder_layers(model)
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for block, (args, kwargs), X in zip(decoder_layers(model), seen, streams, strict=True):

        def attend(h, block=block, args=args, kwargs=kwargs):
            given = kwargs | {"hidden_states": h} if "hidden_states" in kwargs else kwargs
            rest = args[1:] if args else ()
            output = getattr(block, name)(*((h, *rest) if args else ()), **given)
            return output[0] if isinstance(output, tuple) else output

        def attention(x, block=block, X=X, attend=attend):
            whole = torch.cat([X[:, :-1].detach(), x[None, None]], dim=1)
            return (parts(block, whole, attend)[0] - whole)[0, -1]

        x = X[0, -1].detach()
        after, mlp = parts(block, X.detach(), attend)
        own_input = x if case == "gpt-neox" else after[0, -1].detach()

        def second(y, mlp=mlp):
            out = mlp(y[None, None])
            return (out[0] if isinstance(out, tuple) else out).reshape(-1)

        found.append(
            [
                torch.autograd.functional.jacobian(f, at).numpy()
                for f, at in ((attention, x), (second, own_input))
            ]
        )
    return zip(*found, strict=True)


@pytest.mark.parametrize("case", FAMILIES)
def test_halves_are_the_oracles(case, float64_device):
    model, tokens = cases.tiny_model(case), cases.tiny_tokens(SEQ)
    options = {"measures": ["halves"], "ranks": RANKS, "dtype": "float64", "progress": False}
    (found,) = measure_coupling(wrapped_on(float64_device, model), [tokens[0].tolist()], **options)
    assert found.reason is None, found.reason
    assert found.halves_certificate.shape == (2, 2) and found.halves_certificate.max() < 1e-10
    with TrueDtype(torch.float64):
        expected = dict(zip(("attention", "mlp"), oracles(case, model, tokens), strict=True))
    for half, J in expected.items():
        for layer in (0, 1):
            values = np.linalg.svd(J[layer], compute_uv=False)[: RANKS[-1]]
            np.testing.assert_allclose(
                found[f"{half}_singular_values"][layer], values, rtol=1e-5, err_msg=half
            )
        for r, k in enumerate(RANKS):
            U, _, V = zip(*(reference.top_singular(j, k) for j in J), strict=True)
            for a in (0, 1):
                for b in (0, 1):
                    A = reference.coupling_matrix(J[a], U[b], V[b])
                    m = reference.miscoupling(A, normalized=True)
                    assert found[f"{half}_miscoupling"][r, a, b] == pytest.approx(
                        m, rel=1e-5, abs=1e-6
                    ), (half, k, a, b)
            off = (
                found[f"{half}_miscoupling"][r, 0, 1] + found[f"{half}_miscoupling"][r, 1, 0]
            ) / 2
            assert readings()[f"{half}_coupling"].read(found, k) == pytest.approx(1 - off, rel=1e-6)


def test_a_block_whose_parts_do_not_add_up_has_a_reason():
    """BLOOM's attention and MLP add the stream themselves: silencing them silences it, too."""
    model = ResidualModel.wrap(cases.tiny_model("bloom"))
    (found,) = measure_coupling(
        model, [[1, 2, 3]], measures=["halves", "depth"], ranks=[2], dtype="float64", progress=False
    )
    assert "no halves: attention and MLP do not add up to block 0" in found.reason
    assert (
        found.reason_codes == ("refused",)
        and found.attention_miscoupling is None
        and found.coupling(2) > 0
    )


def test_a_block_without_such_parts_has_a_reason():
    model = ResidualModel.wrap(cases.tiny_model("llama"))
    call = model.trace([1, 2, 3]).calls[0]
    del call.module.mlp
    with (
        pytest.raises(Unmeasurable, match="no part that is its MLP by name"),
        attention_alone(call),
    ):
        pass
