"""What the mathematics needs of a model: blocks that can be run again, whole or at one token. No framework is known here.

:mod:`lm_eval_coupling.residual` serves these for transformers models; a test may serve them by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Callable[[int, Tensor], Tensor]
"""(layer, vectors like those of the stream) → the direction u [d_model] that a block's output is differentiated along."""


@runtime_checkable
class Call(Protocol):
    """One block with the arguments that it was called with for one prompt. It is run again inside :meth:`ready` only.

    F is the block as a map of the stream, skip connection included: X^{l-1} → X^l, shapes [1, seq, d_model].
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
        """Whether a token sees only itself and those before it: J is zero then where the input token is the later one."""

    @property
    def resid_pre(self) -> Float[Tensor, "1 seq d_model"]:
        """The block's input X^{l-1}."""

    @property
    def pullback(self) -> tuple[int, Float[Tensor, "seq d_model"]] | None:
        """(t, uᵀ ∂F_t/∂X), where the trace took it on the way along the layer's direction u."""

    @property
    def keys(self) -> Any | None:
        """The keys and values that the block kept, where a step of decoding is known to be the block at one token."""

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Hold the block's weights, and only them, in the call's dtype."""

    def without_keys(self) -> Call:
        """The same call, whose derivatives are all taken of the whole sequence."""

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same call in another arithmetic: what was kept of the trace is cast, and no derivative is known of it."""

    def with_pullback(self, output_token: int, pulled: Float[Tensor, "seq d_model"]) -> Call:
        """The same call, which knows uᵀ ∂F_t/∂X of one output token t already."""

    def __call__(self, resid_pre: Float[Tensor, "1 seq d_model"]) -> Float[Tensor, "1 seq d_model"]:
        """F(X) of the whole sequence."""

    def one_token(self, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """The block on one vector, as if it stood at ``token`` and saw only itself."""

    def one_query(self, token: int) -> Float[Tensor, "1 queries d_model"]:
        """F(X) of which only row ``token`` may be used."""

    def pulled_back(
        self, direction: Float[Tensor, " d_model"], output_token: int
    ) -> Float[Tensor, "seq d_model"]:
        """uᵀ ∂F_t/∂X by one backward pass through the whole sequence."""

    def batch_with(self, others: Sequence[Any]) -> CallBatch:
        """Return this call and other prompts' calls of the same block, to be run together."""


@runtime_checkable
class CallBatch(Protocol):
    """One block's calls for several prompts. ValueError where their arguments cannot be joined."""

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
    """One prompt's pass through a model: every block's call, and the stream after the last block."""

    @property
    def calls(self) -> Sequence[Call]:
        """In the order of the blocks."""

    @property
    def resid_final(self) -> Float[Tensor, "1 seq d_model"]:
        """X^L."""

    def trajectory(self, token: int) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x_t^0 … x_t^L."""


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
        """Where the stream begins."""

    def encode(self, prompt: Any) -> Sequence[int]:
        """Token ids of a text, or the numbers that name the tokens of an image: what :meth:`traces` takes."""

    def traces(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> Sequence[Trace]:
        """Passes of several prompts, whose blocks keep what their derivatives at ``output_tokens`` need."""
