"""How a structured tangent passes each kind of operation. Nothing here knows a model family.

A rule gets the tangents of a step's arguments from ``of`` and returns that of its ``value``; constants have none. What has
no rule raises :class:`NoRule`: a wrong derivative is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    def register(rule):
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


T = Tensor


# Rearrangements


@_rule(T.view, T.reshape, torch.reshape, T.flatten, torch.flatten, T.unflatten, T.unsqueeze, torch.unsqueeze, T.squeeze)
@_rule(
    torch.squeeze, T.view_as, T.reshape_as, T.contiguous, T.clone, torch.clone, T.to, T.float, T.double, T.type, T.type_as
)
def _same_order(run, func, value, x, *args, **kwargs):
    """The entries keep their order."""
    tangent = run.of(x)
    if isinstance(tangent, Dense):
        return tangent.mapped(lambda m: m.reshape(*value.shape, m.shape[-1]), x.shape)
    return tangent


@_rule(F.dropout, F.dropout2d)
def _dropout(run, func, value, x, *args, **kwargs):
    if value is not x and not torch.equal(value, x):
        raise NoRule("dropout is active")
    return run.of(x)


@_rule(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes)
def _transpose(run, func, value, x, dim0, dim1):
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(run.of(x), x, order)


@_rule(T.permute, torch.permute)
def _permute(run, func, value, x, *dims):
    order = [d % x.dim() for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)]
    return _permuted(run.of(x), x, order)


def _permuted(tangent: Tangent, x: Tensor, order: list[int]) -> Tangent:
    moved = [d for d in order if x.shape[d] > 1]
    if isinstance(tangent, NearIdentity) and moved == sorted(moved):
        return tangent
    return dense(tangent, x.shape).mapped(lambda m: m.permute(*order, x.dim()), x.shape)


@_rule(T.__getitem__)
def _getitem(run, func, value, x, index):
    items = index if isinstance(index, tuple) else (index,)
    plain = all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)
    if plain and value.numel() == x.numel():
        return _same_order(run, func, value, x)
    if any(isinstance(item, Tensor) for item in items):
        raise NoRule("entries are chosen by the data")
    if Ellipsis in items:
        items = (*items, slice(None))
    return dense(run.of(x), x.shape).mapped(lambda m: m[items], x.shape)


@_rule(T.split, torch.split, T.chunk, torch.chunk, T.tensor_split, torch.tensor_split)
def _split(run, func, value, x, sections, dim=0):
    tangent, axis, start, cut = dense(run.of(x), x.shape), dim % x.dim(), 0, []
    for part in value:
        cut.append(tangent.mapped(lambda m, i=start, n=part.shape[axis]: m.narrow(axis, i, n), x.shape))
        start += part.shape[axis]
    return cut


@_rule(T.unbind, torch.unbind)
def _unbind(run, func, value, x, dim=0):
    axis = dim % x.dim()
    tangent = dense(run.of(x), x.shape)
    return [tangent.mapped(lambda m, i=i: m.select(axis, i), x.shape) for i in range(x.shape[axis])]


@_rule(T.expand, T.expand_as)
def _expand(run, func, value, x, *sizes):
    return dense(run.of(x), x.shape).mapped(lambda m: m.expand(*value.shape, m.shape[-1]), x.shape)


@_rule(T.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(run, func, value, x, repeats, dim=None):
    if dim is None or isinstance(repeats, Tensor):
        raise NoRule("repeat_interleave of a flattened tensor")
    return dense(run.of(x), x.shape).mapped(lambda m: m.repeat_interleave(repeats, dim=dim % x.dim()), x.shape)


@_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(run, func, value, tensors, dim=0):
    parts = [(t, run.of(t)) for t in tensors]
    if all(isinstance(tangent, Dense) for _, tangent in parts):
        return _joined(parts, dim % value.dim())
    raise NoRule("a constant is joined to what depends on the token")


@_rule(torch.stack)
def _stack(run, func, value, tensors, dim=0):
    axis = dim % value.dim()
    parts = [(t.unsqueeze(axis), run.of(t)) for t in tensors]
    if not all(isinstance(tangent, Dense) for _, tangent in parts):
        raise NoRule("a constant is joined to what depends on the token")
    shape = tensors[0].shape
    return _joined([(t, tangent.mapped(lambda m: m.unsqueeze(axis), shape)) for t, tangent in parts], axis)


def _joined(parts: list[tuple[Tensor, Dense]], axis: int) -> Dense:
    origin = parts[0][1].origin
    if any(tangent.origin is not origin for _, tangent in parts):
        raise NoRule("tensors of different origins are joined")
    matrix = torch.cat([d.matrix.expand(*t.shape, origin.width) for t, d in parts], axis)
    if all(d.scale is None for _, d in parts):
        return Dense(origin, matrix)
    scales = [d.matrix.new_ones(1) if d.scale is None else d.scale for _, d in parts]
    return Dense(origin, matrix, torch.cat([s.expand(*t.shape, 1) for (t, _), s in zip(parts, scales, strict=True)], axis))


# Sums and products


@_rule(torch.add, T.add, T.__add__, T.__radd__)
def _add(run, func, value, a, b):
    return _sum(run, value.shape, a, b)


@_rule(T.add_, T.__iadd__)
def _add_in_place(run, func, value, a, b):
    if a._is_view():
        raise NoRule("a view is changed in place")
    return _sum(run, value.shape, a, b)


@_rule(torch.sub, T.sub, T.__sub__)
def _sub(run, func, value, a, b):
    if run.of(b) is None:
        return _sum(run, value.shape, a, b)
    negative = -b
    run.watch(negative, _scaled(run.of(b), b, -1))
    return _sum(run, value.shape, a, negative)


@_rule(T.__rsub__, torch.rsub)
def _rsub(run, func, value, a, b):
    if run.of(b) is not None:
        raise NoRule("a reversed difference of two things that depend on the token")
    return _scaled(run.of(a), a, -1)


def _sum(run, shape: torch.Size, a, b) -> Tangent:
    parts = [(run.of(x), x) for x in (a, b) if run.of(x) is not None]
    if len(parts) == 1:
        tangent, x = parts[0]
        return tangent if isinstance(tangent, Dense) or x.numel() == shape.numel() else dense(tangent, x.shape)
    (ta, a), (tb, b) = parts
    return added(ta, tb, a.shape, b.shape, shape)


@_rule(torch.neg, T.neg, T.__neg__)
def _neg(run, func, value, x):
    return _scaled(run.of(x), x, -1)


@_rule(torch.mul, T.mul, T.__mul__, T.__rmul__)
def _mul(run, func, value, a, b):
    return _product(run, value.shape, a, b)


def _product(run, shape: torch.Size, a, b) -> Tangent:
    ta, tb = run.of(a), run.of(b)
    if tb is None:
        return _scaled(ta, a, b)
    if ta is None:
        return _scaled(tb, b, a)
    return added(_scaled(ta, a, b), _scaled(tb, b, a), shape, shape, shape)


def _scaled(tangent: Tangent, x: Tensor, factor: Any) -> Tangent:
    """Tangent of x times ``factor``, a constant."""
    factor = factor if isinstance(factor, Tensor) else torch.as_tensor(factor, dtype=x.dtype, device=x.device)
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
def _div(run, func, value, a, b):
    if run.of(b) is None:
        return _scaled(run.of(a), a, 1 / b)
    inverse = 1 / b
    run.watch(inverse, _scaled(run.of(b), b, -inverse.square()))
    return _product(run, value.shape, a, inverse)


@_rule(T.mean, torch.mean)
def _mean(run, func, value, x, dim=None, keepdim=False):
    return _scaled(_total(run, x, dim, keepdim, value), value, value.numel() / x.numel())


@_rule(T.sum, torch.sum)
def _sum_over(run, func, value, x, dim=None, keepdim=False):
    return _total(run, x, dim, keepdim, value)


def _total(run, x, dim, keepdim, value) -> Dense:
    tangent = run.of(x)
    axes = tuple(d % x.dim() for d in (range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim))
    batch = tangent.origin.batch
    if isinstance(tangent, NearIdentity) and value.numel() == batch and math.prod(x.shape[: min(axes)]) == batch:
        return Dense(tangent.origin, tangent.total().reshape(*value.shape, tangent.origin.width))
    values = dense(tangent, x.shape).values().expand(*x.shape, tangent.origin.width)
    return Dense(tangent.origin, values.sum(axes, keepdim=keepdim))


# Projections


@_rule(F.linear)
def _linear(run, func, value, x, weight, bias=None):
    return _projected(run, x, weight)


@_rule(torch.addmm)
def _addmm(run, func, value, bias, x, weight):
    if run.of(bias) is not None:
        raise NoRule("a bias that depends on the token")
    return _projected(run, x, weight.mT)


@_rule(torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm)
def _matmul(run, func, value, x, weight):
    return _projected(run, x, weight.mT, depends=run.of(weight) is not None)


def _projected(run, x: Tensor, weight: Tensor, depends: bool = False) -> Dense:
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


@_rule(F.silu, F.gelu, F.relu, F.leaky_relu, F.elu, F.mish, F.softplus, F.hardswish, F.relu6, F.logsigmoid)
@_rule(torch.tanh, T.tanh, torch.sigmoid, T.sigmoid, F.sigmoid, F.tanh, torch.relu, T.relu, torch.erf, T.erf)
@_rule(torch.exp, T.exp, torch.sqrt, T.sqrt, torch.square, T.square)
@_rule(torch.clamp, T.clamp, torch.clip, T.clip, torch.abs, T.abs, torch.reciprocal, T.reciprocal, torch.log, T.log)
def _entrywise(run, func, value, x, *args, **kwargs):
    """A function of each entry alone."""
    if run.of(x) is None:
        raise NoRule("the second argument of an entrywise function depends on the token")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(func(leaf, *args, **kwargs).sum(), leaf)
    return _scaled(run.of(x), x, slope)


@_rule(torch.pow, T.pow, T.__pow__)
def _pow(run, func, value, x, exponent):
    if isinstance(exponent, Tensor) or isinstance(x, (int, float)):
        return _entrywise(run, func, value, x, exponent)
    return _scaled(run.of(x), x, exponent * x ** (exponent - 1))


@_rule(torch.rsqrt, T.rsqrt)
def _rsqrt(run, func, value, x):
    return _scaled(run.of(x), x, -0.5 * value**3)


# Norms


def _composite(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(steps):
        COMPOSITES.update(dict.fromkeys(functions, steps))
        return steps

    return register


@_composite(F.layer_norm)
def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    _check_one_axis(normalized_shape)
    result = _over_root_mean_square(x - x.mean(-1, keepdim=True), eps)
    return result if weight is None else result * weight


@_composite(F.rms_norm, torch.rms_norm)
def _rms_norm(x, normalized_shape, weight=None, eps=None):
    _check_one_axis(normalized_shape)
    result = _over_root_mean_square(x, torch.finfo(x.dtype).eps if eps is None else eps)
    return result if weight is None else result * weight


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def _check_one_axis(normalized_shape) -> None:
    if len(normalized_shape) != 1:
        raise NoRule(f"a norm over {len(normalized_shape)} axes")
