"""How a structured tangent passes each kind of operation. Nothing here knows a model family.

A rule gets the tangents of a step's arguments from ``of`` and returns that of its ``value``; constants have none. What has
no rule raises :class:`NoRule`: a wrong derivative is never guessed.
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


def _rule(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


T = Tensor


# Rearrangements


@_rule(
    T.view,
    T.reshape,
    torch.reshape,
    T.flatten,
    torch.flatten,
    T.unflatten,
    T.unsqueeze,
    torch.unsqueeze,
    T.squeeze,
)
@_rule(
    torch.squeeze,
    T.view_as,
    T.reshape_as,
    T.contiguous,
    T.clone,
    torch.clone,
    T.to,
    T.float,
    T.double,
    T.type,
    T.type_as,
)
def _same_order(
    run: Any, func: Callable, value: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tangent | None:
    """The entries keep their order."""
    tangent = run.of(x)
    if isinstance(tangent, Dense):
        return tangent.mapped(lambda m: m.reshape(*value.shape, m.shape[-1]), x.shape)
    return tangent


@_rule(F.dropout, F.dropout2d)
def _dropout(
    run: Any, func: Callable, value: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Tangent | None:
    if value is not x and not torch.equal(value, x):
        raise NoRule("dropout is active")
    return run.of(x)


@_rule(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes)
def _transpose(run: Any, func: Callable, value: Any, x: Tensor, dim0: int, dim1: int) -> Tangent:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(run.of(x), x, order)


@_rule(T.permute, torch.permute)
def _permute(run: Any, func: Callable, value: Any, x: Tensor, *dims: Any) -> Tangent:
    order = [
        d % x.dim() for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    ]
    return _permuted(run.of(x), x, order)


def _permuted(tangent: Tangent, x: Tensor, order: list[int]) -> Tangent:
    moved = [d for d in order if x.shape[d] > 1]
    if isinstance(tangent, NearIdentity) and moved == sorted(moved):
        return tangent
    return dense(tangent, x.shape).mapped(lambda m: m.permute(*order, x.dim()), x.shape)


@_rule(T.__getitem__)
def _getitem(run: Any, func: Callable, value: Any, x: Tensor, index: Any) -> Tangent:
    items = index if isinstance(index, tuple) else (index,)
    plain = all(
        item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items
    )
    if plain and value.numel() == x.numel():
        return _same_order(run, func, value, x)
    if any(isinstance(item, Tensor) for item in items):
        raise NoRule("entries are chosen by the data")
    if Ellipsis in items:
        items = (*items, slice(None))
    return dense(run.of(x), x.shape).mapped(lambda m: m[items], x.shape)


@_rule(T.split, torch.split, T.chunk, torch.chunk, T.tensor_split, torch.tensor_split)
def _split(
    run: Any, func: Callable, value: Any, x: Tensor, sections: Any, dim: Any = 0
) -> list[Dense]:
    tangent, axis, start, cut = dense(run.of(x), x.shape), dim % x.dim(), 0, []
    for part in value:
        width = part.shape[axis]
        cut.append(
            tangent.mapped(partial(torch.narrow, dim=axis, start=start, length=width), x.shape)
        )
        start += width
    return cut


@_rule(T.unbind, torch.unbind)
def _unbind(run: Any, func: Callable, value: Any, x: Tensor, dim: Any = 0) -> list[Dense]:
    axis = dim % x.dim()
    tangent = dense(run.of(x), x.shape)
    return [
        tangent.mapped(partial(torch.select, dim=axis, index=i), x.shape)
        for i in range(x.shape[axis])
    ]


@_rule(T.expand, T.expand_as)
def _expand(run: Any, func: Callable, value: Any, x: Tensor, *sizes: Any) -> Tangent:
    return dense(run.of(x), x.shape).mapped(lambda m: m.expand(*value.shape, m.shape[-1]), x.shape)


@_rule(T.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(
    run: Any, func: Callable, value: Any, x: Tensor, repeats: Any, dim: Any = None
) -> Tangent:
    if dim is None or isinstance(repeats, Tensor):
        raise NoRule("repeat_interleave of a flattened tensor")
    return dense(run.of(x), x.shape).mapped(
        lambda m: m.repeat_interleave(repeats, dim=dim % x.dim()), x.shape
    )


@_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(run: Any, func: Callable, value: Any, tensors: Sequence[Tensor], dim: Any = 0) -> Tangent:
    parts = [(t, run.of(t)) for t in tensors]
    if all(isinstance(tangent, Dense) for _, tangent in parts):
        return _joined(parts, dim % value.dim())
    raise NoRule("a constant is joined to what depends on the token")


@_rule(torch.stack)
def _stack(
    run: Any, func: Callable, value: Any, tensors: Sequence[Tensor], dim: Any = 0
) -> Tangent:
    axis = dim % value.dim()
    parts = [(t.unsqueeze(axis), run.of(t)) for t in tensors]
    if not all(isinstance(tangent, Dense) for _, tangent in parts):
        raise NoRule("a constant is joined to what depends on the token")
    shape = tensors[0].shape
    return _joined(
        [(t, tangent.mapped(lambda m: m.unsqueeze(axis), shape)) for t, tangent in parts], axis
    )


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


@_rule(torch.add, T.add, T.__add__, T.__radd__)
def _add(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    return _sum(run, value.shape, a, b)


@_rule(T.add_, T.__iadd__)
def _add_in_place(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if a._is_view():
        raise NoRule("a view is changed in place")
    return _sum(run, value.shape, a, b)


@_rule(torch.sub, T.sub, T.__sub__)
def _sub(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if run.of(b) is None:
        return _sum(run, value.shape, a, b)
    negative = -b
    run.watch(negative, _scaled(run.of(b), b, -1))
    return _sum(run, value.shape, a, negative)


@_rule(T.__rsub__, torch.rsub)
def _rsub(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if run.of(b) is not None:
        raise NoRule("a reversed difference of two things that depend on the token")
    return _scaled(run.of(a), a, -1)


def _sum(run: Any, shape: torch.Size, a: Any, b: Any) -> Tangent:
    parts = [(run.of(x), x) for x in (a, b) if run.of(x) is not None]
    if len(parts) == 1:
        tangent, x = parts[0]
        return (
            tangent
            if isinstance(tangent, Dense) or x.numel() == shape.numel()
            else dense(tangent, x.shape)
        )
    (ta, a), (tb, b) = parts
    return added(ta, tb, a.shape, b.shape, shape)


@_rule(torch.neg, T.neg, T.__neg__)
def _neg(run: Any, func: Callable, value: Any, x: Tensor) -> Tangent:
    return _scaled(run.of(x), x, -1)


@_rule(torch.mul, T.mul, T.__mul__, T.__rmul__)
def _mul(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    return _product(run, value.shape, a, b)


def _product(run: Any, shape: torch.Size, a: Any, b: Any) -> Tangent:
    ta, tb = run.of(a), run.of(b)
    if tb is None:
        return _scaled(ta, a, b)
    if ta is None:
        return _scaled(tb, b, a)
    return added(_scaled(ta, a, b), _scaled(tb, b, a), shape, shape, shape)


def _scaled(tangent: Tangent, x: Tensor, factor: Any) -> Tangent:
    """Tangent of x times ``factor``, a constant."""
    factor = (
        factor if isinstance(factor, Tensor) else x.new_full((), factor)
    )  # no transfer, which would be waited for
    if isinstance(tangent, NearIdentity) and not _fits(factor.shape, x.shape):
        tangent = dense(tangent, x.shape)
    return tangent.scaled(factor, x.shape)


def _fits(small: torch.Size, shape: torch.Size) -> bool:
    """Whether a product with something of shape ``small`` leaves ``shape`` as it is, but for leading ones."""
    extra = len(small) - len(shape)
    if extra > 0:
        return small.numel() == small[extra:].numel() and _fits(small[extra:], shape)
    return all(s in (1, n) for s, n in zip(small, shape[-extra:] if extra else shape, strict=True))


@_rule(torch.div, T.div, T.__truediv__, torch.true_divide)
def _div(run: Any, func: Callable, value: Any, a: Any, b: Any) -> Tangent:
    if run.of(b) is None:
        return _scaled(run.of(a), a, 1 / b)
    inverse = 1 / b
    run.watch(inverse, _scaled(run.of(b), b, -inverse.square()))
    return _product(run, value.shape, a, inverse)


@_rule(T.mean, torch.mean)
def _mean(
    run: Any, func: Callable, value: Any, x: Tensor, dim: Any = None, keepdim: bool = False
) -> Tangent:
    return _scaled(_total(run, x, dim, keepdim, value), value, value.numel() / x.numel())


@_rule(T.sum, torch.sum)
def _sum_over(
    run: Any, func: Callable, value: Any, x: Tensor, dim: Any = None, keepdim: bool = False
) -> Tangent:
    return _total(run, x, dim, keepdim, value)


def _total(run: Any, x: Tensor, dim: Any, keepdim: bool, value: Any) -> Dense:
    tangent = run.of(x)
    axes = tuple(
        d % x.dim()
        for d in (range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim)
    )
    batch = tangent.origin.batch
    if (
        isinstance(tangent, NearIdentity)
        and value.numel() == batch
        and math.prod(x.shape[: min(axes)]) == batch
    ):
        return Dense(tangent.origin, tangent.total().reshape(*value.shape, tangent.origin.width))
    values = dense(tangent, x.shape).values().expand(*x.shape, tangent.origin.width)
    return Dense(tangent.origin, values.sum(axes, keepdim=keepdim))


# Projections


@_rule(F.linear)
def _linear(
    run: Any, func: Callable, value: Any, x: Tensor, weight: Any, bias: Any = None
) -> Tangent:
    return _projected(run, x, weight)


@_rule(torch.addmm)
def _addmm(run: Any, func: Callable, value: Any, bias: Any, x: Tensor, weight: Any) -> Tangent:
    if run.of(bias) is not None:
        raise NoRule("a bias that depends on the token")
    return _projected(run, x, weight.mT)


@_rule(torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm)
def _matmul(run: Any, func: Callable, value: Any, x: Tensor, weight: Any) -> Tangent:
    return _projected(run, x, weight.mT, depends=run.of(weight) is not None)


def _projected(run: Any, x: Tensor, weight: Tensor, depends: bool = False) -> Dense:
    tangent = run.of(x)
    if tangent is None or depends or run.of(weight) is not None or weight.dim() != 2:
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


@_rule(
    F.silu,
    F.gelu,
    F.relu,
    F.leaky_relu,
    F.elu,
    F.mish,
    F.softplus,
    F.hardswish,
    F.relu6,
    F.logsigmoid,
)
@_rule(
    torch.tanh,
    T.tanh,
    torch.sigmoid,
    T.sigmoid,
    F.sigmoid,
    F.tanh,
    torch.relu,
    T.relu,
    torch.erf,
    T.erf,
)
@_rule(torch.exp, T.exp, torch.sqrt, T.sqrt, torch.square, T.square)
@_rule(
    torch.clamp,
    T.clamp,
    torch.clip,
    T.clip,
    torch.abs,
    T.abs,
    torch.reciprocal,
    T.reciprocal,
    torch.log,
    T.log,
)
def _entrywise(run: Any, func: Callable, value: Any, x: Any, *args: Any, **kwargs: Any) -> Tangent:
    """A function of each entry alone."""
    if run.of(x) is None:
        raise NoRule("the second argument of an entrywise function depends on the token")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(func(leaf, *args, **kwargs).sum(), leaf)
    return _scaled(run.of(x), x, slope)


@_rule(torch.pow, T.pow, T.__pow__)
def _pow(run: Any, func: Callable, value: Any, x: Any, exponent: Any) -> Tangent:
    if isinstance(exponent, Tensor) or isinstance(x, (int, float)):
        return _entrywise(run, func, value, x, exponent)
    return _scaled(run.of(x), x, exponent * x ** (exponent - 1))


@_rule(torch.rsqrt, T.rsqrt)
def _rsqrt(run: Any, func: Callable, value: Any, x: Tensor) -> Tangent:
    return _scaled(run.of(x), x, -0.5 * value**3)


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
