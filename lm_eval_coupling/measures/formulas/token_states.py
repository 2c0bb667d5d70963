"""Steps of the blocks, and geometry of the states of a prompt's tokens at each depth.

X holds the states of all tokens of a prompt, [token, d_model]. Everything is float64; undefined
values are NaN.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

_ZERO = 1e-12  # Share of the largest eigenvalue below which an eigenvalue is rounding.


def block_influence(x: Float[Tensor, "points d_model"]) -> Float[Tensor, " steps"]:
    """Return 1 − cos(x^{l−1}, x^l) for l = 1 … L."""
    return 1 - _cosine(x[:-1].double(), x[1:].double())


def relative_contribution(x: Float[Tensor, "points d_model"]) -> Float[Tensor, " steps"]:
    """Return ‖x^l − x^{l−1}‖ / ‖x^{l−1}‖ for l = 1 … L."""
    x = x.double()
    return _norm(x.diff(dim=0)) / _nonzero(_norm(x[:-1]))


def contribution_cosine(x: Float[Tensor, "points d_model"]) -> Float[Tensor, " steps"]:
    """Return cos(x^l − x^{l−1}, x^{l−1}) for l = 1 … L."""
    x = x.double()
    return _cosine(x.diff(dim=0), x[:-1])


def massive_activation(x: Float[Tensor, "points d_model"]) -> Float[Tensor, " points"]:
    """Return max |x_i| / median |x_i| over the coordinates of each point.

    The median of an even number of coordinates is the mean of the middle two.
    """
    size = x.double().abs()
    return size.amax(dim=-1) / _nonzero(size.quantile(0.5, dim=-1))


class States:
    """States X of a prompt's tokens at one depth, with products that several numbers share.

    With fewer tokens than dimensions, everything comes from the inner products of the states;
    otherwise from those of the coordinates.
    """

    def __init__(
        self, X: Float[Tensor, "token d_model"], gram: Float[Tensor, "token token"] | None = None
    ) -> None:
        """Keep ``X``; ``gram`` is X Xᵀ where that is known."""
        self.X = X.double()
        self.few = len(X) <= X.shape[1]
        self._gram = gram

    @functools.cached_property
    def gram(self) -> Float[Tensor, "token token"]:
        """X Xᵀ."""
        return self.X @ self.X.T if self._gram is None else self._gram

    def minus(self, before: States) -> States:
        """Return the differences X − X' of the states of two depths."""
        if not self.few:
            return States(self.X - before.X)
        cross = self.X @ before.X.T
        return States(self.X - before.X, self.gram - cross - cross.T + before.gram)

    @functools.cached_property
    def centered(self) -> Float[Tensor, "token size"]:
        """Centered rows over their norm; for few tokens the Gram matrix of these rows."""
        if not self.few:
            X = self.X - self.X.mean(dim=0)
            return X / _nonzero(torch.linalg.vector_norm(X))
        means = self.gram.mean(dim=0)
        gram = self.gram - means[:, None] - means + means.mean()
        return gram / _nonzero(gram.trace().clamp(min=0))

    @functools.cached_property
    def root(self) -> Float[Tensor, "token token"]:
        """Symmetric square root of :attr:`centered`, for few tokens."""
        if not self.centered.isfinite().all():
            return self.centered
        values, vectors = torch.linalg.eigh(self.centered)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def spectrum(self) -> Float[Tensor, " values"]:
        """Return the shares of the squared singular values of X, ascending."""
        return _shares(self.gram if self.few else self.X.T @ self.X)

    def spectrum_normalized(self) -> Float[Tensor, " values"]:
        """Return the same shares for centered rows, each of norm 1."""
        if self.few:
            size = _nonzero(self.centered.diagonal().clamp(min=0)).sqrt()
            return _shares(self.centered / size / size[:, None])
        rows = self.centered / _nonzero(_norm(self.centered))[:, None]
        return _shares(rows.T @ rows)


def _shares(gram: Float[Tensor, "size size"]) -> Float[Tensor, " size"]:
    values = _eigenvalues(gram).clamp(min=0)
    return values / _nonzero(values.sum())


def entropy_of(shares: Float[Tensor, " values"]) -> Float[Tensor, ""]:
    """Return −Σ p log p in nats; its exponential is the effective rank (Roy and Vetterli, 2007)."""
    return torch.special.entr(shares).sum()


def token_curvature(X: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Return the mean angle in radians between successive differences x_{t+1} − x_t.

    NaN where a difference is zero.
    """
    steps = X.double().diff(dim=0)
    return _cosine(steps[:-1], steps[1:]).clamp(-1, 1).arccos().mean()


def procrustes_similarity(before: States, after: States) -> Float[Tensor, ""]:
    """Return 1 − min ‖s X Q − Y‖² over scales s and orthogonal Q: 1 for a rotation of X.

    X and Y are centered and of norm 1, so it is (Σ singular values of XᵀY)². A free linear map in
    place of Q would fit every Y of fewer tokens than dimensions.
    """
    if before.few:
        squares = _eigenvalues(before.root @ after.centered @ before.root)
    else:
        product = before.centered.T @ after.centered
        squares = _eigenvalues(product.T @ product)
    # Rounding of an exact zero would count with its root.
    squares = torch.where(squares < _ZERO * squares.amax(), 0, squares)
    return squares.sqrt().sum().square()


def matrix_nuclear_norm(X: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """Return the sum of the min(T, d) largest column norms of X over T, with rows of norm 1."""
    rows = X.double() / _nonzero(_norm(X.double()))[:, None]
    columns = torch.linalg.vector_norm(rows, dim=0)
    return columns.topk(min(rows.shape)).values.sum() / len(rows)


def _eigenvalues(gram: Float[Tensor, "size size"]) -> Float[Tensor, " size"]:
    """Return the eigenvalues, ascending; NaN for a matrix that is not finite."""
    return (
        torch.linalg.eigvalsh(gram)
        if gram.isfinite().all()
        else torch.full_like(gram[0], torch.nan)
    )


def _cosine(
    a: Float[Tensor, "*batch d_model"], b: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    return (a * b).sum(dim=-1) / _nonzero(_norm(a) * _norm(b))


def _norm(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    return torch.linalg.vector_norm(x, dim=-1)


def _nonzero(divisor: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Replace 0 by NaN."""
    return torch.where(divisor == 0, torch.nan, divisor)
