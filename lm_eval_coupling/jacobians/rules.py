"""Rules for how a structured tangent passes each kind of operation. No model family is known.

A rule gets the tape, the operation, its value and its arguments, and returns the tangent of the
value. ``tape.of`` gives the tangents of the arguments; constants have none. An operation without a
rule raises :class:`NoRule`: a derivative is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_eval_coupling.jacobians.tangent import Dense, NearIdentity, Tangent, added, dense

RULES: dict[Callable, Callable] = {}
COMPOSITES: dict[Callable, Callable] = {}  # the same function in steps that have rules


class NoRule(RuntimeError):
    """A step of the block has no closed derivative here."""


def _rule(names: str, *namespaces: Any) -> Callable[[Callable], Callable]:
    """Register a rule for the functions ``names`` of each namespace: torch, Tensor or F."""

    def register(rule: Callable) -> Callable:
        for namespace in namespaces:
            RULES.update({getattr(namespace, name): rule for name in names.split()})
        return rule

    return register


T = Tensor


# Rearrangements


@_rule("view unflatten view_as reshape_as contiguous to float double type type_as", T)
@_rule("reshape flatten unsqueeze squeeze clone", T, torch)
def _same_order(
    tape: Any, func: Callable, value: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tangent | None:
    """Operations that keep the order of the entries."""
    tangent = tape.of(x)
    if isinstance(tangent, Dense):
        return tangent.mapped(lambda m: m.reshape(*value.shape, m.shape[-1]), x.shape)
    return tangent


@_rule("dropout dropout2d", F)
def _dropout(
    tape: Any, func: Callable, value: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tangent | None:
    if value is not x and not torch.equal(value, x):
        raise NoRule("dropout is active")
    return tape.of(x)


@_rule("transpose swapaxes", T, torch)
def _transpose(tape: Any, func: Callable, value: Any, x: Tensor, dim0: int, dim1: int) -> Tangent:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(tape.of(x), x, order)


@_rule("permute", T, torch)
def _permute(tape: Any, func: Callable, value: Any, x: Tensor, *dims: Any) -> Tangent:
    given = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _permuted(tape.of(x), x, [d % x.dim() for d in given])


def _permuted(tangent: Tangent, x: Tensor, order: list[int]) -> Tangent:
    moved = [d for d in order if x.shape[d] > 1]
    if isinstance(tangent, NearIdentity) and moved == sorted(moved):
        return tangent
    return dense(tangent, x.shape).mapped(lambda m: m.permute(*order, x.dim()), x.shape)


@_rule("__getitem__", T)
def _getitem(tape: Any, func: Callable, value: Any, x: Tensor, index: Any) -> Tangent:
    items = index if isinstance(index, tuple) else (index,)
    is_plain = all(
        item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items
    )
    if is_plain and value.numel() == x.numel():
        return _same_order(tape, func, value, x)
    if any(isinstance(item, Tensor) for item in items):
        raise NoRule("entries are chosen by the data")
    if Ellipsis in items:
        items = (*items, slice(None))
    return dense(tape.of(x), x.shape).mapped(lambda m: m[items], x.shape)


@_rule("split chunk tensor_split", T, torch)
def _split(
    tape: Any, func: Callable, value: Any, x: Tensor, sections: Any, dim: Any = 0
) -> list[Dense]:
    tangent, axis, start, parts = dense(tape.of(x), x.shape), dim % x.dim(), 0, []
    for part in value:
        width = part.shape[axis]
        narrow = partial(torch.narrow, dim=axis, start=start, length=width)
        parts.append(tangent.mapped(narrow, x.shape))
        start += width
    return parts


@_rule("unbind", T, torch)
def _unbind(tape: Any, func: Callable, value: Any, x: Tensor, dim: Any = 0) -> list[Dense]:
    tangent, axis = dense(tape.of(x), x.shape), dim % x.dim()
    selections = (partial(torch.select, dim=axis, index=i) for i in range(x.shape[axis]))
    return [tangent.mapped(select, x.shape) for select in selections]


@_rule("expand expand_as", T)
def _expand(tape: Any, func: Callable, value: Any, x: Tensor, *sizes: Any) -> Tangent:
    return dense(tape.of(x), x.shape).mapped(lambda m: m.expand(*value.shape, m.shape[-1]), x.shape)


@_rule("repeat_interleave", T, torch)
def _repeat_interleave(
    tape: Any, func: Callable, value: Any, x: Tensor, repeats: Any, dim: Any = None
) -> Tangent:
    if dim is None or isinstance(repeats, Tensor):
        raise NoRule("repeat_interleave of a flattened tensor")
    return dense(tape.of(x), x.shape).mapped(
        lambda m: m.repeat_interleave(repeats, dim=dim % x.dim()), x.shape
    )


@_rule("cat concat concatenate", torch)
def _cat(tape: Any, func: Callable, value: Any, tensors: Sequence[Tensor], dim: Any = 0) -> Tangent:
    return _joined([(t, _dense_part(tape, t)) for t in tensors], dim % value.dim())


@_rule("stack", torch)
def _stack(
    tape: Any, func: Callable, value: Any, tensors: Sequence[Tensor], dim: Any = 0
) -> Tangent:
    axis, shape = dim % value.dim(), tensors[0].shape
    tangents = [_dense_part(tape, t).mapped(lambda m: m.unsqueeze(axis), shape) for t in tensors]
    return _joined([(t.unsqueeze(axis), d) for t, d in zip(tensors, tangents, strict=True)], axis)


def _dense_part(tape: Any, x: Tensor) -> Dense:
    if isinstance(tangent := tape.of(x), Dense):
        return tangent
    raise NoRule("a constant is joined to what depends on the token")


def _joined(parts: list[tuple[Tensor, Dense]], axis: int) -> Dense:
    origin = parts[0][1].origin
    if any(tangent.origin is not origin for _, tangent in parts):
        raise NoRule("tensors of different origins are joined")
    matrix = torch.cat([d.matrix.expand(*t.shape, origin.width) for t, d in parts], axis)
    if all(d.scale is None for _, d in parts):
        return Dense(origin, matrix)
    scales = [d.matrix.new_ones(1) if d.scale is None else d.scale for _, d in parts]
    return Dense(
        origin,
        matrix,
        torch.cat([s.expand(*t.shape, 1) for (t, _), s in zip(parts, scales, strict=True)], axis),
    )


# Sums and products


@_rule("add", T, torch)
@_rule("__add__ __radd__", T)
def _add(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    return _sum(tape, value.shape, a, b)


@_rule("add_ __iadd__", T)
def _add_in_place(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if a._is_view():
        raise NoRule("a view is changed in place")
    return _sum(tape, value.shape, a, b)


@_rule("sub", T, torch)
@_rule("__sub__", T)
def _sub(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if tape.of(b) is None:
        return _sum(tape, value.shape, a, b)
    negative = -b
    tape.watch(negative, _scaled(tape.of(b), b, -1))
    return _sum(tape, value.shape, a, negative)


@_rule("__rsub__", T)
@_rule("rsub", torch)
def _rsub(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if tape.of(b) is not None:
        raise NoRule("a reversed difference of two things that depend on the token")
    return _scaled(tape.of(a), a, -1)


def _sum(tape: Any, shape: torch.Size, a: Any, b: Any) -> Tangent:
    parts = [(tape.of(x), x) for x in (a, b) if tape.of(x) is not None]
    if len(parts) == 1:
        tangent, x = parts[0]
        keeps_form = isinstance(tangent, Dense) or x.numel() == shape.numel()
        return tangent if keeps_form else dense(tangent, x.shape)
    (ta, a), (tb, b) = parts
    return added(ta, tb, a.shape, b.shape, shape)


@_rule("neg", T, torch)
@_rule("__neg__", T)
def _neg(tape: Any, func: Callable, value: Any, x: Tensor) -> Tangent:
    return _scaled(tape.of(x), x, -1)


@_rule("mul", T, torch)
@_rule("__mul__ __rmul__", T)
def _mul(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    return _product(tape, value.shape, a, b)


def _product(tape: Any, shape: torch.Size, a: Any, b: Any) -> Tangent:
    ta, tb = tape.of(a), tape.of(b)
    if tb is None:
        return _scaled(ta, a, b)
    if ta is None:
        return _scaled(tb, b, a)
    return added(_scaled(ta, a, b), _scaled(tb, b, a), shape, shape, shape)


def _scaled(tangent: Tangent, x: Tensor, factor: Any) -> Tangent:
    """Return the tangent of x times ``factor``, a constant."""
    if not isinstance(factor, Tensor):
        factor = x.new_full((), factor)  # filled on the device, which would wait for a transfer
    if isinstance(tangent, NearIdentity) and not _fits(factor.shape, x.shape):
        tangent = dense(tangent, x.shape)
    return tangent.scaled(factor, x.shape)


def _fits(small: torch.Size, shape: torch.Size) -> bool:
    """Return whether a product with a tensor of shape ``small`` keeps ``shape``."""
    extra = len(small) - len(shape)
    if extra > 0:
        return small.numel() == small[extra:].numel() and _fits(small[extra:], shape)
    return all(s in (1, n) for s, n in zip(small, shape[-extra:] if extra else shape, strict=True))


@_rule("div", T, torch)
@_rule("true_divide", torch)
@_rule("__truediv__", T)
def _div(tape: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if tape.of(b) is None:
        return _scaled(tape.of(a), a, 1 / b)
    inverse = 1 / b
    tape.watch(inverse, _scaled(tape.of(b), b, -inverse.square()))
    return _product(tape, value.shape, a, inverse)


@_rule("mean", T, torch)
def _mean(
    tape: Any, func: Callable, value: Any, x: Tensor, dim: Any = None, keepdim: bool = False
) -> Tangent:
    return _scaled(_total(tape, x, dim, keepdim, value), value, value.numel() / x.numel())


@_rule("sum", T, torch)
def _sum_over(
    tape: Any, func: Callable, value: Any, x: Tensor, dim: Any = None, keepdim: bool = False
) -> Tangent:
    return _total(tape, x, dim, keepdim, value)


def _total(tape: Any, x: Tensor, dim: Any, keepdim: bool, value: Any) -> Dense:
    tangent = tape.of(x)
    given = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    axes = tuple(d % x.dim() for d in given)
    if isinstance(tangent, NearIdentity):
        batch = tangent.origin.batch
        if value.numel() == batch and math.prod(x.shape[: min(axes)]) == batch:
            total = tangent.total()
            return Dense(tangent.origin, total.reshape(*value.shape, tangent.origin.width))
    values = dense(tangent, x.shape).values().expand(*x.shape, tangent.origin.width)
    return Dense(tangent.origin, values.sum(axes, keepdim=keepdim))


# Projections


@_rule("linear", F)
def _linear(
    tape: Any, func: Callable, value: Any, x: Tensor, weight: Any, bias: Any = None
) -> Tangent:
    return _projected(tape, x, weight)


@_rule("addmm", torch)
def _addmm(tape: Any, func: Callable, value: Any, bias: Any, x: Tensor, weight: Any) -> Tangent:
    if tape.of(bias) is not None:
        raise NoRule("a bias that depends on the token")
    return _projected(tape, x, weight.mT)


@_rule("matmul mm", T, torch)
@_rule("__matmul__", T)
def _matmul(tape: Any, func: Callable, value: Any, x: Tensor, weight: Any) -> Tangent:
    return _projected(tape, x, weight.mT, depends=tape.of(weight) is not None)


def _projected(tape: Any, x: Tensor, weight: Tensor, depends: bool = False) -> Dense:
    tangent = tape.of(x)
    if tangent is None or depends or tape.of(weight) is not None or weight.dim() != 2:
        raise NoRule("a product of two things that depend on the token")
    weight = weight.to(x.dtype)
    if isinstance(tangent, NearIdentity) and x.shape[-1] == tangent.origin.width:
        return Dense(tangent.as_origin, weight)
    rows = dense(tangent, x.shape).values().expand(*x.shape, tangent.origin.width)
    if x.numel() == x.shape[-1]:
        product = weight @ rows.reshape(x.shape[-1], -1)
        return Dense(tangent.origin, product.reshape(*x.shape[:-1], *product.shape))
    return Dense(tangent.origin, weight @ rows)


# Entry by entry


@_rule("silu gelu leaky_relu elu mish softplus hardswish relu6 logsigmoid", F)
@_rule("relu tanh sigmoid", T, torch, F)
@_rule("erf exp sqrt square clamp clip abs reciprocal log", T, torch)
def _entrywise(tape: Any, func: Callable, value: Any, x: Any, *args: Any, **kwargs: Any) -> Tangent:
    """Functions of each entry alone."""
    if tape.of(x) is None:
        raise NoRule("the second argument of an entrywise function depends on the token")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(func(leaf, *args, **kwargs).sum(), leaf)
    return _scaled(tape.of(x), x, slope)


@_rule("pow", T, torch)
@_rule("__pow__", T)
def _pow(tape: Any, func: Callable, value: Any, x: Any, exponent: Any) -> Tangent:
    if isinstance(exponent, Tensor) or isinstance(x, (int, float)):
        return _entrywise(tape, func, value, x, exponent)
    return _scaled(tape.of(x), x, exponent * x ** (exponent - 1))


@_rule("rsqrt", T, torch)
def _rsqrt(tape: Any, func: Callable, value: Any, x: Tensor) -> Tangent:
    return _scaled(tape.of(x), x, -0.5 * value**3)


# Norms


def _composite(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(steps: Callable) -> Callable:
        COMPOSITES.update(dict.fromkeys(functions, steps))
        return steps

    return register


@_composite(F.layer_norm)
def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:
    _check_one_axis(normalized_shape)
    result = _over_root_mean_square(x - x.mean(-1, keepdim=True), eps)
    return result if weight is None else result * weight


@_composite(F.rms_norm, torch.rms_norm)
def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    _check_one_axis(normalized_shape)
    result = _over_root_mean_square(x, torch.finfo(x.dtype).eps if eps is None else eps)
    return result if weight is None else result * weight


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def _check_one_axis(normalized_shape: Sequence[int]) -> None:
    if len(normalized_shape) != 1:
        raise NoRule(f"a norm over {len(normalized_shape)} axes")
