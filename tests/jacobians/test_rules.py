"""Every rule against forward-mode differentiation of the same function, and what has no rule."""

import pytest
import torch
from torch.nn import functional as F

from lm_eval_coupling.jacobians.rules import RULES, NoRule
from lm_eval_coupling.jacobians.tangent import NearIdentity, Origin, dense, lifted
from lm_eval_coupling.jacobians.tape import Tape

BATCH, WIDTH = 2, 6


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W, SQUARE, ROW = random(4, WIDTH), random(WIDTH, WIDTH), random(WIDTH)
FUNCTIONS = {
    # rearrangements
    "view": lambda x: x.view(BATCH, 2, 3) * 1,
    "reshape": lambda x: (x @ SQUARE).reshape(BATCH, 3, 2),
    "flatten": lambda x: (x @ SQUARE).unflatten(-1, (2, 3)).flatten(1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1) * 2,
    "to": lambda x: x.clone().contiguous().to(torch.float64).double() * 1,
    "transpose": lambda x: (x @ SQUARE).view(BATCH, 2, 3).transpose(1, 2),
    "transpose negative": lambda x: (x @ SQUARE).view(BATCH, 2, 3).transpose(-1, -2),
    "permute": lambda x: (x @ SQUARE).view(BATCH, 2, 3).permute(0, 2, 1),
    "permute tuple": lambda x: torch.permute((x @ SQUARE).view(BATCH, 2, 3), (0, -1, 1)),
    "getitem": lambda x: (x @ SQUARE)[..., 1:4],
    "getitem none": lambda x: x[:, None],
    "getitem integer": lambda x: (x @ SQUARE)[:, 2],
    "split": lambda x: torch.cat((x @ SQUARE).split(2, dim=-1)[::-1], dim=-1),
    "split sizes": lambda x: (x @ SQUARE).split([1, 5], dim=-1)[1],
    "chunk": lambda x: (x @ SQUARE).chunk(3, dim=-1)[2],
    "unbind": lambda x: torch.stack((x @ SQUARE).view(BATCH, 2, 3).unbind(1)[::-1], dim=1),
    "expand": lambda x: (x @ SQUARE)[:, None].expand(BATCH, 3, WIDTH),
    "repeat_interleave": lambda x: (x @ SQUARE).repeat_interleave(2, dim=-1),
    "cat": lambda x: torch.cat([x @ SQUARE, (x @ SQUARE) * 2], dim=-1),
    "stack": lambda x: torch.stack([x @ SQUARE, (x @ SQUARE) * ROW], dim=-1),
    # sums and products
    "add": lambda x: x + F.linear(x, SQUARE) + 1.5,
    "add constant first": lambda x: 2.0 + x,
    "add in place": lambda x: (x * 2).add_(F.linear(x, SQUARE)) * 1,
    "sub": lambda x: x * ROW - F.linear(x, SQUARE),
    "rsub": lambda x: 1 - x,
    "neg": lambda x: -F.linear(x, SQUARE),
    "mul": lambda x: x * F.linear(x, SQUARE),
    "mul by itself": lambda x: x * x,
    "mul broadcast": lambda x: x * F.linear(x, SQUARE)[:, :1],
    "div": lambda x: x / F.linear(x, SQUARE).square().add(1),
    "div number": lambda x: F.linear(x, W) / 3,
    "rtruediv": lambda x: torch.div(x, ROW),
    "mean": lambda x: x * x.mean(-1, keepdim=True),
    "mean dense": lambda x: F.linear(x, W).mean(-1, keepdim=True) * x,
    "sum": lambda x: x * x.sum(-1, keepdim=True),
    "sum all": lambda x: F.linear(x, W).view(BATCH, 2, 2).sum(dim=(1, 2)),
    # projections
    "linear": lambda x: F.linear(x, W, random(4)),
    "linear twice": lambda x: F.linear(torch.tanh(F.linear(x, W)), W.mT),
    "addmm": lambda x: torch.addmm(random(4), x, W.mT),
    "matmul": lambda x: (x * ROW) @ W.mT,
    # entry by entry
    **{
        name: (lambda x, f=getattr(F, name): f(F.linear(x, SQUARE)))  # noqa: B008
        for name in "silu gelu relu leaky_relu elu mish softplus hardswish relu6 logsigmoid".split()
    },
    **{
        name: (lambda x, f=getattr(torch, name): f(F.linear(x, SQUARE)))  # noqa: B008
        for name in "tanh sigmoid erf exp square abs reciprocal".split()
    },
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sqrt log": lambda x: torch.sqrt(x.square() + 1) + torch.log(x.square() + 2),
    "clamp": lambda x: F.linear(x, SQUARE).clamp(-0.5, 0.7),
    "pow": lambda x: x.pow(3) + x.square().add(1) ** 1.5,
    "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
    # norms
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), ROW, ROW, 1e-3),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), ROW, 1e-3),
    "rms_norm by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * ROW,
    "block": lambda x: x + F.linear(F.silu(F.linear(F.rms_norm(x, (WIDTH,), ROW), W)), W.mT),
    "two blocks": lambda x: FUNCTIONS["block"](FUNCTIONS["block"](x)),
}


def by_rules(function, x):
    """[batch, entries, width] by the rules, the steps kept on a tape."""
    tape, root = Tape(lambda *parts: None), Origin(*x.shape)
    tape.watch(x, NearIdentity.identity(root, x))
    with tape:
        y = function(x)
    return dense(lifted(tape.differentiate(y), y.shape, root), y.shape).rows(y.shape)


def by_forward_mode(function, x):
    columns = []
    for j in range(WIDTH):
        direction = torch.zeros_like(x)
        direction[:, j] = 1
        columns.append(torch.func.jvp(function, (x,), (direction,))[1].reshape(BATCH, -1))
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_is_the_derivative(name):
    x = random(BATCH, WIDTH, seed=3)
    function = FUNCTIONS[name]
    expected = by_forward_mode(lambda x: function(x.clone()), x)
    assert torch.allclose(by_rules(function, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.cumsum(x, -1), "no rule for .*cumsum"),
        (lambda x: x[:, torch.tensor([0, 2])], "chosen by the data"),
        (lambda x: torch.cat([x @ SQUARE, ROW.expand(BATCH, -1)], -1), "a constant is joined"),
        (lambda x: torch.stack([x @ SQUARE, ROW.expand(BATCH, -1)]), "a constant is joined"),
        (
            lambda x: (x @ SQUARE) @ (x @ SQUARE).transpose(0, 1),
            "two things that depend on the token",
        ),
        (lambda x: F.linear(ROW, x), "two things that depend on the token"),
        (lambda x: torch.addmm(x, SQUARE[:BATCH], SQUARE), "a bias that depends on the token"),
        (lambda x: torch.rsub(x, x * 2), "a reversed difference"),
        (lambda x: 2**x, "no rule for|second argument"),
        (lambda x: x.repeat_interleave(2), "flattened"),
        (lambda x: F.layer_norm(x.view(BATCH, 2, 3), (2, 3)), "a norm over 2 axes"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout is active"),
        (lambda x: (x @ SQUARE).view(BATCH, 2, 3)[:, 0].add_(x[:, :3] @ W[:3, :3]), "in place"),
    ],
)
def test_what_has_no_rule_is_not_guessed(function, message):
    with pytest.raises(NoRule, match=message):
        by_rules(function, random(BATCH, WIDTH, seed=3))


def test_dropout_that_is_off_changes_nothing():
    x = random(BATCH, WIDTH)
    identity = torch.eye(WIDTH, dtype=torch.float64).expand(BATCH, -1, -1)
    assert torch.equal(by_rules(lambda x: F.dropout(x, 0.5, training=False) * 1, x), identity)


def test_every_rule_is_of_a_function_of_torch():
    assert len(RULES) == 118 and all(callable(function) for function in RULES)
