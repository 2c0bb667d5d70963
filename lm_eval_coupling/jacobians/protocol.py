"""Interface of a model to the mathematics: blocks that can be run again, whole or at one token.

No framework is known here. :mod:`lm_eval_coupling.residual` implements it for transformers models;
a test may implement it by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Callable[[int, Tensor], Tensor]
"""(layer, vectors of the stream) → direction u [d_model] to pull a block's output back along."""


@runtime_checkable
class Call(Protocol):
    """Call of a block for one prompt, which can be repeated inside :meth:`ready`.

    F is the block as a map of the stream, skip connection included: X^{l-1} → X^l, shapes
    [1, seq, d_model].
    """

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the call."""

    @property
    def seq(self) -> int:
        """Number of tokens."""

    @property
    def causal(self) -> bool:
        """True if a token sees only itself and earlier ones, so that J_{t2 t1} = 0 for t1 > t2."""

    @property
    def resid_pre(self) -> Float[Tensor, "1 seq d_model"]:
        """The block's input X^{l-1}."""

    @property
    def pullback(self) -> tuple[int, Float[Tensor, "seq d_model"]] | None:
        """(t, uᵀ ∂F_t/∂X) for the layer's direction u, if the trace took it."""

    @property
    def keys(self) -> Any | None:
        """Kept keys and values, if a step of decoding is known to equal the block."""

    @property
    def is_verified(self) -> bool:
        """True once the block's outputs have been seen to move as its derivatives say."""

    def mark_verified(self) -> None:
        """Record that the block's outputs move as its derivatives say."""

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Hold the block's weights, and only them, in the call's dtype."""

    def without_keys(self) -> Call:
        """Return the call without kept keys: derivatives are taken through the whole sequence."""

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """Return the call in another arithmetic, without its pullback; kept tensors are cast."""

    def with_pullback(self, output_token: int, pulled: Float[Tensor, "seq d_model"]) -> Call:
        """Return the call with uᵀ ∂F_t/∂X of one output token t."""

    def __call__(self, resid_pre: Float[Tensor, "1 seq d_model"]) -> Float[Tensor, "1 seq d_model"]:
        """Return F(X) of the whole sequence."""

    def one_token(self, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """Run the block on one vector, as if it stood at ``token`` and saw only itself."""

    def one_query(self, token: int) -> Float[Tensor, "1 queries d_model"]:
        """Return F(X), of which only row ``token`` is right."""

    def pulled_back(
        self, direction: Float[Tensor, " d_model"], output_token: int
    ) -> Float[Tensor, "seq d_model"]:
        """Return uᵀ ∂F_t/∂X by one backward pass through the whole sequence."""

    def batch_with(self, others: Sequence[Any]) -> CallBatch:
        """Return this call and other prompts' calls of the same block, to be run together."""


@runtime_checkable
class CallBatch(Protocol):
    """Calls of a block for several prompts. ValueError where their arguments cannot be joined."""

    def one_token(
        self, x: Float[Tensor, "prompt d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Run :meth:`Call.one_token` of every prompt."""

    def decode(
        self, x: Float[Tensor, "prompt 1 d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt 1 d_model"]:
        """Run the block at one token of each prompt; the other tokens enter by their kept keys."""

    def pull_back_decoding(
        self, directions: Sequence[Float[Tensor, " d_model"]], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Return uᵀ ∂F_t/∂x_t by a step of decoding; NaN where that is not the block."""


@runtime_checkable
class Trace(Protocol):
    """Pass of one prompt through a model: every block's call, and the stream after the last."""

    @property
    def calls(self) -> Sequence[Call]:
        """Calls in the order of the blocks."""

    @property
    def resid_final(self) -> Float[Tensor, "1 seq d_model"]:
        """The stream X^L after the last block."""

    def trajectory(self, token: int) -> Float[Tensor, "layer_plus_1 d_model"]:
        """Return x_t^0 … x_t^L."""


@runtime_checkable
class Model(Protocol):
    """A model as a residual stream."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""

    @property
    def d_model(self) -> int:
        """Width of the stream."""

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""

    @property
    def has_independent_blocks(self) -> bool:
        """True if passes through different blocks may run at the same time."""

    def encode(self, prompt: Any) -> Sequence[int]:
        """Return token ids of a text, or numbers of the tokens of an image, for :meth:`traces`."""

    def traces(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> Sequence[Trace]:
        """Run several prompts and keep what derivatives at ``output_tokens`` need."""
