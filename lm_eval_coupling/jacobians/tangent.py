"""Derivatives kept in their structure: near-identity, rows of a weight matrix, or a product.

A tangent is the derivative of a tensor with respect to an :class:`Origin`, a vector of ``width``
numbers for each row of a batch. An origin is the variable itself, or a vector inside the block
whose derivative by an earlier origin is known. Origins are placed where a norm ends and where a
residual is added, which makes the derivative cheap. A weight matrix is then the derivative of its
output, without any product, and the factors in between are multiplied once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Vector that tangents are taken with respect to.

    ``operator`` is its own tangent over an earlier origin; the root, which is the variable, has
    none.
    """

    batch: int
    width: int
    operator: Tangent | None = None

    @property
    def ancestors(self) -> list[Origin]:
        """The origin itself and the earlier ones it depends on, nearest first."""
        return [self, *(self.operator.origin.ancestors if self.operator is not None else [])]


@dataclasses.dataclass(frozen=True, eq=False)
class NearIdentity:
    """Tangent diag(d) + L Rᵀ + M of a vector as wide as its origin, as left by residuals and norms.

    What a block adds to the stream is in M, apart from the 1 beside which its digits would be lost.

    Attributes:
        origin: the vector it is taken with respect to.
        diagonal: d.
        left: L, or None if there is no low-rank part.
        right: R, or None likewise.
        rest: M, or None if it is zero.
        exact: whether this is the identity itself.
    """

    origin: Origin
    diagonal: Float[Tensor, "batch width"]
    left: Float[Tensor, "batch width rank"] | None = None
    right: Float[Tensor, "batch width rank"] | None = None
    rest: Float[Tensor, "batch width width"] | None = None
    exact: bool = False

    @classmethod
    def identity(cls, origin: Origin, x: Tensor) -> NearIdentity:
        """Return the derivative of an origin by itself, in the dtype and on the device of ``x``."""
        return cls(origin, x.new_ones(()).expand(origin.batch, origin.width), exact=True)

    @cached_property
    def as_origin(self) -> Origin:
        """The vector itself as an origin, the same for every weight that is applied to it."""
        if self.exact:
            return self.origin
        # The copy breaks a reference cycle, which would hold a matrix per prompt until collected.
        return Origin(self.origin.batch, self.origin.width, dataclasses.replace(self))

    def scaled(self, factor: Tensor, shape: torch.Size) -> NearIdentity:
        """Return the tangent of the vector, of ``shape``, times ``factor``, entry by entry."""
        f = factor.expand(shape).reshape(self.origin.batch, self.origin.width)
        left = None if self.left is None else self.left * f[..., None]
        rest = None if self.rest is None else self.rest * f[..., None]
        return NearIdentity(self.origin, self.diagonal * f, left=left, right=self.right, rest=rest)

    def plus(
        self,
        left: Tensor | None = None,
        right: Tensor | None = None,
        diagonal: Tensor | float = 0,
        rest: Tensor | None = None,
    ) -> NearIdentity:
        """Return the sum with diag(d) + L Rᵀ + M."""
        if left is None or right is None:
            left, right = self.left, self.right
        elif self.left is not None and self.right is not None:
            left, right = torch.cat([self.left, left], -1), torch.cat([self.right, right], -1)
        if self.rest is not None:
            rest = self.rest if rest is None else self.rest + rest
        return NearIdentity(
            self.origin, self.diagonal + diagonal, left=left, right=right, rest=rest
        )

    def after(self, matrix: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows width"]:
        """Return ``matrix`` @ (diag(d) + L Rᵀ + M)."""
        product = matrix * self.diagonal[:, None]
        if self.left is not None and self.right is not None:
            product = product.baddbmm_(matrix @ self.left, self.right.mT)
        return product if self.rest is None else product.baddbmm_(matrix, self.rest)

    def over(self, operator: NearIdentity) -> NearIdentity:
        """Return the product with ``operator``, the tangent of this origin over an earlier one."""
        product = NearIdentity(operator.origin, self.diagonal * operator.diagonal)
        by_row = self.diagonal[..., None]
        if operator.left is not None:
            product = product.plus(by_row * operator.left, operator.right)
        if operator.rest is not None:
            product = product.plus(rest=by_row * operator.rest)
        if self.left is not None and self.right is not None:
            product = product.plus(self.left, operator.after(self.right.mT).mT)
        return product if self.rest is None else product.plus(rest=operator.after(self.rest))

    def total(self) -> Float[Tensor, "batch width"]:
        """Return the tangent of the sum of the vector's entries."""
        total = self.diagonal
        if self.left is not None and self.right is not None:
            total = total + (self.right @ self.left.sum(1)[..., None])[..., 0]
        return total if self.rest is None else total + self.rest.sum(1)

    def matrix(self, less: float = 0.0) -> Float[Tensor, "batch width width"]:
        """Multiply out, and subtract ``less`` times the identity."""
        diagonal = self.diagonal - less
        if self.rest is None:
            product = torch.diag_embed(diagonal)
        else:
            product = self.rest.clone()
            product.diagonal(dim1=1, dim2=2).add_(diagonal)
        if self.left is None or self.right is None:
            return product
        return product.baddbmm_(self.left, self.right.mT)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """Tangent ``scale`` * ``matrix`` of a tensor of any shape: a row of numbers per entry.

    Both broadcast to [*shape of the tensor, width]. A weight matrix is used in place, and not
    copied to be scaled.
    """

    origin: Origin
    matrix: Float[Tensor, "*#shape width"]
    scale: Float[Tensor, "*#shape 1"] | None = None

    def scaled(self, factor: Tensor, shape: torch.Size) -> Dense:
        """Return the tangent of the tensor times ``factor``, entry by entry."""
        del shape
        factor = factor[..., None]
        return dataclasses.replace(
            self, scale=factor if self.scale is None else self.scale * factor
        )

    def mapped(self, function: Callable[[Tensor], Tensor], shape: torch.Size) -> Dense:
        """Return the tangent once ``function`` has rearranged the tensor of ``shape``."""
        matrix = function(self.matrix.expand(*shape, self.origin.width))
        scale = None if self.scale is None else function(self.scale.expand(*shape, 1))
        return Dense(self.origin, matrix, scale)

    def values(self) -> Float[Tensor, "*#shape width"]:
        """Return the product of scale and matrix."""
        return self.matrix if self.scale is None else self.matrix * self.scale

    def rows(self, shape: torch.Size) -> Float[Tensor, "batch rows width"]:
        """Multiply out for a tensor of ``shape``: one matrix per row of the batch."""
        return (
            self.values()
            .expand(*shape, self.origin.width)
            .reshape(self.origin.batch, -1, self.origin.width)
        )

    def outer(self, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Return factors L, R [batch, width, 1] if L Rᵀ is the tangent of a tensor of ``shape``.

        It is if the tensor is as wide as the origin and all of its rows are multiples of one. None
        otherwise.
        """
        batch, width = self.origin.batch, self.origin.width
        if self.matrix.numel() != batch * width or math.prod(shape) != batch * width:
            return None
        ones = self.matrix.new_ones(1) if self.scale is None else self.scale[..., 0]
        return ones.expand(shape).reshape(batch, width, 1), self.matrix.reshape(batch, width, 1)


Tangent = NearIdentity | Dense


def dense(tangent: Tangent, shape: torch.Size) -> Dense:
    """Return the tangent of a tensor of ``shape`` as one row per entry."""
    if isinstance(tangent, Dense):
        return tangent
    return Dense(tangent.origin, tangent.matrix().reshape(*shape, tangent.origin.width))


def lifted(tangent: Tangent, shape: torch.Size, origin: Origin) -> Tangent:
    """Return the tangent of a tensor of ``shape`` over ``origin``, an ancestor of its own."""
    while tangent.origin is not origin:
        operator = tangent.origin.operator
        assert operator is not None  # only the root has none, and it is the last ancestor of all
        if isinstance(tangent, NearIdentity) and isinstance(operator, NearIdentity):
            tangent = operator if tangent.exact else tangent.over(operator)
            continue
        if isinstance(tangent, NearIdentity) and tangent.exact:
            assert isinstance(operator, Dense)  # two near-identities are multiplied above
            rows = operator.matrix
        else:
            rows = dense(tangent, shape).rows(shape)
            if isinstance(operator, NearIdentity):
                rows = operator.after(rows)
            else:
                rows = rows @ operator.matrix
        tangent = Dense(operator.origin, rows.reshape(*shape, operator.origin.width))
    return tangent


def common_origin(tangents: Sequence[Tangent]) -> Origin:
    """Return the nearest origin that all tangents depend on."""
    lines = [tangent.origin.ancestors for tangent in tangents]
    return next(origin for origin in lines[0] if all(origin in line for line in lines[1:]))


def added(
    a: Tangent, b: Tangent, a_shape: torch.Size, b_shape: torch.Size, shape: torch.Size
) -> Tangent:
    """Return the tangent of the sum a + b, a tensor of ``shape``, over their nearest common origin.

    A near-identity plus a dense tangent is one near-identity with that tangent in its M. As later
    products with M would cost as much as with the dense one, the sum becomes a new origin, and the
    result is the identity over it.
    """
    origin = common_origin([a, b])
    a, b = lifted(a, a_shape, origin), lifted(b, b_shape, origin)
    if isinstance(a, Dense) and isinstance(b, Dense):
        return _sum_of_dense(a, b, shape)
    if isinstance(a, Dense):
        a, b = b, a
    assert isinstance(a, NearIdentity)  # two dense tangents are added above
    if isinstance(b, NearIdentity):
        return a.plus(b.left, b.right, b.diagonal, b.rest)
    if (factors := b.outer(shape)) is not None:
        return a.plus(*factors)
    rows = b.rows(shape)
    return NearIdentity.identity(Origin(origin.batch, origin.width, a.plus(rest=rows)), rows)


def _sum_of_dense(a: Dense, b: Dense, shape: torch.Size) -> Dense:
    """Return the tangent of a + b, a tensor of ``shape``, from tangents over one origin."""
    if a.scale is None:
        a, b = b, a
    full = (*shape, a.origin.width)
    if a.scale is None:
        return Dense(a.origin, (a.matrix + b.matrix).expand(full))
    product = a.matrix * a.scale
    if b.scale is None:
        total = product + b.matrix
    elif product.shape == torch.broadcast_shapes(product.shape, b.matrix.shape, b.scale.shape):
        # In place: one more tensor may be as large as a matrix of weights.
        total = product.addcmul_(b.matrix, b.scale)
    else:
        total = torch.addcmul(product, b.matrix, b.scale)
    return Dense(a.origin, total.expand(full))
