"""The matrix products that each stage contains, for a block of Llama's kind: its floor, whatever is
done around them.

Only what grows with d_model² or with the sequence is counted; norms, activations and sums are not
products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Operands are taken from so many sets in turn, so that none is still in a cache from its last use.
SETS = 4


@dataclass(frozen=True)
class Product:
    """``count`` products of [batch, rows, inner] and [batch, inner, columns], per layer of the
    model.
    """

    rows: int
    inner: int
    columns: int
    batch: int = 1
    count: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True)
class Shape:
    """What the products of a model depend on."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    d_head: int

    @classmethod
    def of(cls, config) -> Shape:
        """From a Llama configuration."""
        heads = config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            config.num_key_value_heads,
            d_head,
        )


def forward(s: Shape, n: int) -> list[Product]:
    """Every projection of every token, scores and values of every head."""
    return [
        Product(n, s.d_model, s.heads * s.d_head, count=2),  # queries, output
        Product(n, s.d_model, s.kv_heads * s.d_head, count=2),  # keys, values
        Product(n, s.d_model, s.d_ff, count=2),
        Product(n, s.d_ff, s.d_model),
        Product(n, s.d_head, n, batch=s.heads),
        Product(n, n, s.d_head, batch=s.heads),
    ]


def certificate(s: Shape, n: int) -> list[Product]:
    """One backward pass to the block's input: each projection once more, each product of the
    attention twice.
    """
    return [
        Product(n, s.heads * s.d_head, s.d_model, count=2),
        Product(n, s.kv_heads * s.d_head, s.d_model, count=2),
        Product(n, s.d_ff, s.d_model, count=2),
        Product(n, s.d_model, s.d_ff),
        Product(n, s.d_head, n, batch=s.heads, count=2),
        Product(n, n, s.d_head, batch=s.heads, count=2),
    ]


def jacobians(s: Shape, n: int) -> list[Product]:
    """J_tt in closed form: the core's matrix and its use in every head, W_o, W_out, and the two
    halves of the block.
    """
    return [
        Product(s.d_head, n, s.d_head, batch=s.heads),
        Product(s.d_head, s.d_head, s.d_model, batch=s.heads),
        Product(1, s.d_head, s.d_model, batch=s.heads),
        Product(s.d_model, s.heads * s.d_head, s.d_model),
        Product(s.d_model, s.d_ff, s.d_model),
        Product(s.d_model, s.d_model, s.d_model),
    ]


def spectra(s: Shape, rank: int) -> list[Product]:
    """The Gram matrix, J times the basis, its rotation, and the residuals of J and Jᵀ. The
    decomposition is no product.
    """
    return [
        Product(s.d_model, s.d_model, s.d_model),
        Product(s.d_model, s.d_model, rank, count=3),
        Product(s.d_model, rank, rank, count=2),
    ]


def pairs(s: Shape, rank: int) -> list[Product]:
    """J [V_1 … V_L] and J [U_1 … U_L], each met by the other basis of every layer; the overlaps of
    U and of V.
    """
    every = s.layers * rank
    return [
        Product(s.d_model, s.d_model, every, count=2),
        Product(rank, s.d_model, rank, batch=s.layers, count=2),
        Product(rank, s.d_model, every, count=2),
    ]


def runner(products: list[Product], layers: int, device: str = "cpu") -> Callable[[], None]:
    """All products of all layers in float32, on operands and into results that exist already."""
    steps = [_operands(p, device) for p in products]

    def run() -> None:
        for layer in range(layers):
            for product, sets in zip(products, steps, strict=True):
                a, b, out = sets[layer % SETS]
                for _ in range(product.count):
                    torch.matmul(a, b, out=out)

    return run


def _operands(p: Product, device: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    batch = (p.batch,) if p.batch > 1 else ()

    def matrices(rows, columns):
        return [torch.randn(*batch, rows, columns, device=device) for _ in range(SETS)]

    return list(
        zip(
            matrices(p.rows, p.inner),
            matrices(p.inner, p.columns),
            matrices(p.rows, p.columns),
            strict=True,
        )
    )
