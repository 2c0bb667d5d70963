"""How a structured tangent passes each kind of operation. Nothing here knows a model family.

A :class:`Differentiation` watches a block run on one token and keeps the tangent of every tensor that depends on it. What
has no rule raises :class:`NoRule`: a wrong derivative is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_eval_coupling.jacobians.attention_core import Watch
from lm_eval_coupling.jacobians.tangent import Dense, NearIdentity, Tangent, added, dense

RULES: dict[Callable, Callable] = {}


class NoRule(RuntimeError):
    """A step of the block has no closed derivative here."""


class Differentiation(Watch):
    """Carries tangents through what runs inside it. ``core`` is the attention core: (q, kᵀ, v) to (z, its tangent)."""

    def __init__(self, core: Callable[[Differentiation, Tensor, Tensor, Tensor], tuple[Tensor, Tangent]]) -> None:
        super().__init__()
        self.core = core
        self.tangents: dict[int, tuple[Tensor, Tangent]] = {}  # keeps the tensors, so that no id is used twice

    def of(self, value: Any) -> Tangent | None:
        """The tangent of ``value``; None for whatever does not depend on the token."""
        found = self.tangents.get(id(value))
        return found[1] if found is not None else None

    def set(self, value: Tensor, tangent: Tangent | None) -> None:
        """Keep the tangent of ``value``."""
        if tangent is not None:
            self.tangents[id(value)] = (value, tangent)

    def _on_scores(self, func, args, kwargs):
        return func(*args, **kwargs)  # what the scores depend on is the core's business

    def _on_softmax(self, func, args, kwargs):
        return func(*args, **kwargs)

    def _on_values(self, func, args, kwargs, weights, values):
        z, tangent = self.core(self, *self.product, values)
        self.set(z, tangent)
        return z

    def _on_other(self, func, args, kwargs):
        if not any(self.of(value) is not None for value in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None:
            value = func(*args, **kwargs)
            if any(out.is_floating_point() for out in _tensors((value,), {})):
                raise NoRule(f"no rule for {getattr(func, '__qualname__', func)}")
            return value
        value, tangent = rule(self, func, *args, **kwargs)
        if isinstance(value, (tuple, list)):
            for part, part_tangent in zip(value, tangent, strict=True):
                self.set(part, part_tangent)
        else:
            self.set(value, tangent)
        return value


def _tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


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
def _same_order(run, func, x, *args, **kwargs):
    """The entries keep their order."""
    value, tangent = func(x, *args, **kwargs), run.of(x)
    if isinstance(tangent, Dense):
        tangent = tangent.mapped(lambda m: m.reshape(*value.shape, m.shape[-1]), x.shape)
    return value, tangent


@_rule(F.dropout, F.dropout2d)
def _dropout(run, func, x, *args, **kwargs):
    value = func(x, *args, **kwargs)
    if value is not x and not torch.equal(value, x):
        raise NoRule("dropout is active")
    return value, run.of(x)


@_rule(T.transpose, torch.transpose, T.swapaxes, torch.swapaxes)
def _transpose(run, func, x, dim0, dim1):
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return func(x, dim0, dim1), _permuted(run.of(x), x, order)


@_rule(T.permute, torch.permute)
def _permute(run, func, x, *dims):
    order = [d % x.dim() for d in (dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)]
    return func(x, *dims), _permuted(run.of(x), x, order)


def _permuted(tangent: Tangent, x: Tensor, order: list[int]) -> Tangent:
    moved = [d for d in order if x.shape[d] > 1]
    if isinstance(tangent, NearIdentity) and moved == sorted(moved):
        return tangent
    return dense(tangent, x.shape).mapped(lambda m: m.permute(*order, x.dim()), x.shape)


@_rule(T.__getitem__)
def _getitem(run, func, x, index):
    items = index if isinstance(index, tuple) else (index,)
    if all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items):
        value = x[index]
        if value.numel() == x.numel():
            return _same_order(run, func, x, index)
    if any(isinstance(item, Tensor) for item in items):
        raise NoRule("entries are chosen by the data")
    if Ellipsis in items:
        items = (*items, slice(None))
    return func(x, index), dense(run.of(x), x.shape).mapped(lambda m: m[items], x.shape)


@_rule(T.split, torch.split, T.chunk, torch.chunk, T.tensor_split, torch.tensor_split)
def _split(run, func, x, sections, dim=0):
    value, tangent = func(x, sections, dim=dim), dense(run.of(x), x.shape)
    edges = [0]
    for part in value:
        edges.append(edges[-1] + part.shape[dim])
    axis = dim % x.dim()
    cut = [
        tangent.mapped(lambda m, i=i: m.narrow(axis, edges[i], edges[i + 1] - edges[i]), x.shape) for i in range(len(value))
    ]
    return value, cut


@_rule(T.unbind, torch.unbind)
def _unbind(run, func, x, dim=0):
    axis = dim % x.dim()
    tangent = dense(run.of(x), x.shape)
    return func(x, dim), [tangent.mapped(lambda m, i=i: m.select(axis, i), x.shape) for i in range(x.shape[axis])]


@_rule(T.expand, T.expand_as)
def _expand(run, func, x, *sizes):
    value = func(x, *sizes)
    return value, dense(run.of(x), x.shape).mapped(lambda m: m.expand(*value.shape, m.shape[-1]), x.shape)


@_rule(T.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(run, func, x, repeats, dim=None):
    if dim is None or isinstance(repeats, Tensor):
        raise NoRule("repeat_interleave of a flattened tensor")
    tangent = dense(run.of(x), x.shape).mapped(lambda m: m.repeat_interleave(repeats, dim=dim % x.dim()), x.shape)
    return func(x, repeats, dim=dim), tangent


@_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(run, func, tensors, dim=0):
    value = func(tensors, dim=dim)
    axis = dim % value.dim()
    parts = [(t, run.of(t)) for t in tensors]
    if all(tangent is not None and isinstance(tangent, Dense) for _, tangent in parts):
        return value, _joined([(t, tangent) for t, tangent in parts], axis)
    raise NoRule("a constant is joined to what depends on the token")


@_rule(torch.stack)
def _stack(run, func, tensors, dim=0):
    value = func(tensors, dim=dim)
    axis = dim % value.dim()
    parts = [(t.unsqueeze(axis), run.of(t)) for t in tensors]
    if not all(isinstance(tangent, Dense) for _, tangent in parts):
        raise NoRule("a constant is joined to what depends on the token")
    shapes = [t.shape for t in tensors]
    moved = [d.mapped(lambda m: m.unsqueeze(axis), shape) for (_, d), shape in zip(parts, shapes, strict=True)]
    return value, _joined([(t, d) for (t, _), d in zip(parts, moved, strict=True)], axis)


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
def _add(run, func, a, b):
    return func(a, b), _sum(run, a, b)


@_rule(T.add_, T.__iadd__)
def _add_in_place(run, func, a, b):
    if a._is_view():
        raise NoRule("a view is changed in place")
    tangent = _sum(run, a, b)
    return func(a, b), tangent


@_rule(torch.sub, T.sub, T.__sub__)
def _sub(run, func, a, b):
    value, negative = func(a, b), -b
    if run.of(b) is not None:
        run.set(negative, _scaled(run.of(b), b, -1))
    return value, _sum(run, a, negative)


@_rule(T.__rsub__, torch.rsub)
def _rsub(run, func, a, b):
    if run.of(b) is not None:
        raise NoRule("a reversed difference of two things that depend on the token")
    return func(a, b), _scaled(run.of(a), a, -1)


def _sum(run, a, b) -> Tangent:
    parts = [(run.of(x), x) for x in (a, b) if run.of(x) is not None]
    shape = torch.broadcast_shapes(*(x.shape for x in (a, b) if isinstance(x, Tensor)))
    if len(parts) == 1:
        tangent, x = parts[0]
        return tangent if isinstance(tangent, Dense) or x.shape.numel() == shape.numel() else dense(tangent, x.shape)
    (ta, a), (tb, b) = parts
    return added(ta, tb, a.shape, b.shape)


@_rule(torch.neg, T.neg, T.__neg__)
def _neg(run, func, x):
    return func(x), _scaled(run.of(x), x, -1)


@_rule(torch.mul, T.mul, T.__mul__, T.__rmul__)
def _mul(run, func, a, b):
    return func(a, b), _product(run, a, b)


def _product(run, a, b) -> Tangent:
    ta, tb = run.of(a), run.of(b)
    if tb is None:
        return _scaled(ta, a, b)
    if ta is None:
        return _scaled(tb, b, a)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return added(_scaled(ta, a, b), _scaled(tb, b, a), shape, shape)


def _scaled(tangent: Tangent | None, x: Any, factor: Any) -> Tangent | None:
    """Tangent of x times ``factor``, a constant."""
    if tangent is None:
        return None
    factor = factor if isinstance(factor, Tensor) else torch.as_tensor(factor, dtype=x.dtype, device=x.device)
    if isinstance(tangent, NearIdentity) and torch.broadcast_shapes(x.shape, factor.shape).numel() != x.numel():
        tangent = dense(tangent, x.shape)
    return tangent.scaled(factor, x.shape)


@_rule(torch.div, T.div, T.__truediv__, torch.true_divide)
def _div(run, func, a, b):
    value = func(a, b)
    if run.of(b) is None:
        return value, _scaled(run.of(a), a, 1 / b)
    inverse = 1 / b
    run.set(inverse, _scaled(run.of(b), b, -inverse.square()))
    return value, _product(run, a, inverse)


@_rule(T.mean, torch.mean)
def _mean(run, func, x, dim=None, keepdim=False):
    value = func(x, dim=dim, keepdim=keepdim)
    return value, _scaled(_total(run, x, dim, keepdim, value), value, value.numel() / x.numel())


@_rule(T.sum, torch.sum)
def _sum_over(run, func, x, dim=None, keepdim=False):
    value = func(x, dim=dim, keepdim=keepdim)
    return value, _total(run, x, dim, keepdim, value)


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
def _linear(run, func, x, weight, bias=None):
    return func(x, weight, bias), _projected(run, x, weight)


@_rule(torch.addmm)
def _addmm(run, func, bias, x, weight):
    if run.of(bias) is not None:
        raise NoRule("a bias that depends on the token")
    return func(bias, x, weight), _projected(run, x, weight.mT)


@_rule(torch.matmul, T.matmul, T.__matmul__, torch.mm, T.mm)
def _matmul(run, func, x, weight):
    return func(x, weight), _projected(run, x, weight.mT)


def _projected(run, x: Tensor, weight: Tensor) -> Dense:
    tangent = run.of(x)
    if tangent is None or run.of(weight) is not None or weight.dim() != 2:
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
@_rule(torch.exp, T.exp, torch.rsqrt, T.rsqrt, torch.sqrt, T.sqrt, torch.square, T.square, torch.pow, T.pow, T.__pow__)
@_rule(torch.clamp, T.clamp, torch.clip, T.clip, torch.abs, T.abs, torch.reciprocal, T.reciprocal, torch.log, T.log)
def _entrywise(run, func, x, *args, **kwargs):
    """A function of each entry alone."""
    if run.of(x) is None:
        raise NoRule("the second argument of an entrywise function depends on the token")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        value = func(leaf, *args, **kwargs)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), _scaled(run.of(x), x, slope)


# Norms


@_rule(F.layer_norm)
def _layer_norm(run, func, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    return func(x, normalized_shape, weight, bias, eps), _normalized(run, x, normalized_shape, weight, eps, centred=True)


@_rule(F.rms_norm, torch.rms_norm)
def _rms_norm(run, func, x, normalized_shape, weight=None, eps=None):
    value = func(x, normalized_shape, weight, eps)
    return value, _normalized(
        run, x, normalized_shape, weight, torch.finfo(x.dtype).eps if eps is None else eps, centred=False
    )


def _normalized(run, x, normalized_shape, weight, eps, centred: bool) -> Tangent:
    """The same norm in steps that have rules."""
    if len(normalized_shape) != 1:
        raise NoRule(f"a norm over {len(normalized_shape)} axes")
    with run:
        centre = x - x.mean(-1, keepdim=True) if centred else x
        result = centre * (centre.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return run.of(result if weight is None else result * weight)
