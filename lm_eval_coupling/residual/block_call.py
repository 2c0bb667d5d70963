"""Blocks with the arguments of one call, ready to be called again, also at one token."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.arguments import (
    CACHES,
    Arguments,
    detached,
    in_dtype,
    join_at_tokens,
)
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.keys import Cache, Keys, cache_before


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """A block with the arguments of one call. Run it again inside :meth:`ready` only.

    Attributes:
        block: the block.
        resid_pre: its input X^{l-1}.
        arguments: everything else that it was called with.
        resid_post: its output X^l.
        pullback: (t, uᵀ ∂F_t / ∂X), taken during the trace along the direction u.
        keys: keys and values that the block handed to its cache, kept for long prompts.
        positional: number of arguments that the model gives by position, the stream included.
    """

    block: Block
    resid_pre: Float[Tensor, "batch seq d_model"]
    arguments: Arguments
    resid_post: Float[Tensor, "batch seq d_model"] | None = None
    pullback: tuple[int, Float[Tensor, "seq d_model"]] | None = None
    keys: Keys | None = None
    positional: int = 1

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""
        return self.block.layer

    @property
    def causal(self) -> bool:
        """True if a token sees only itself and the tokens before it."""
        return self.block.causal

    @property
    def module(self) -> nn.Module:
        """The block's module."""
        return self.block.module

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the call."""
        return self.resid_pre.dtype

    @property
    def seq(self) -> int:
        """Number of tokens."""
        return self.resid_pre.shape[1]

    @property
    def is_verified(self) -> bool:
        """True once the block's outputs have been seen to move as its derivatives say."""
        # Half of a block is called without a trace: what is known of the whole says nothing of it.
        is_known = self.block.is_verified and not self.block.verifies_each
        return is_known and self.resid_post is not None

    def mark_verified(self) -> None:
        """Record that the block's outputs move as its derivatives say."""
        self.block.is_verified = self.block.is_verified or self.resid_post is not None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Hold this block's weights, and no others, in the call's dtype."""
        with self.block.ready(self.dtype):
            yield

    def without_keys(self) -> BlockCall:
        """Return the call without keys: its derivatives are then taken of the whole sequence."""
        return dataclasses.replace(self, keys=None)

    def in_dtype(self, dtype: torch.dtype) -> BlockCall:
        """Cast the call and what the trace kept of it to ``dtype``; drop the pullback."""
        return BlockCall(
            block=self.block,
            resid_pre=self.resid_pre.to(dtype),
            arguments=self.arguments.in_dtype(dtype),
            resid_post=in_dtype(self.resid_post, dtype),
            keys=None if self.keys is None else self.keys.in_dtype(dtype),
            positional=self.positional,
        )

    def with_pullback(self, output_token: int, pulled: Float[Tensor, "seq d_model"]) -> BlockCall:
        """Return the call with uᵀ ∂F_t / ∂X of one output token t filled in."""
        return dataclasses.replace(self, pullback=(output_token, pulled))

    def batch_with(self, others: Sequence[BlockCall]) -> CallBatch:
        """Return this call and other prompts' calls of the same block as one batch."""
        return CallBatch((self, *others))

    def __call__(
        self, resid_pre: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """Compute the block's output F^l(X) = X + f^l(X) for the whole sequence."""
        return self.run(resid_pre, self.arguments)

    def one_token(self, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """Run the block on one vector as if it stood at ``token`` and saw only itself."""
        return CallBatch((self,)).one_token(x[None], [token])[0]

    def one_query(self, token: int) -> Float[Tensor, "1 queries d_model"]:
        """Run the block with masks cut to one query; only row ``token`` of the output is valid."""
        return self.run(self.resid_pre, self.arguments.one_row(token, self.seq))

    def pulled_back(
        self, direction: Float[Tensor, " d_model"], output_token: int
    ) -> Float[Tensor, "seq d_model"]:
        """Return uᵀ ∂F_t / ∂X for every input token, NaN if the output differs from the trace's.

        Costs one backward pass through the block.
        """
        resid_pre = self.resid_pre.detach().requires_grad_(True)
        with torch.enable_grad():
            tokens = torch.full((1,), output_token, device=resid_pre.device)
            output = self(resid_pre)
            pulled = gradient(direction[None], resid_pre, output, tokens)[0]
        if self.resid_post is None:
            return pulled
        rows = (t[0, output_token].detach() for t in (resid_pre, output, self.resid_post))
        return torch.where(_agrees_with_trace(*rows), pulled, torch.nan)

    def run(
        self, x: Tensor, arguments: Arguments, caches: Mapping[str, Cache] | None = None
    ) -> Tensor:
        """Run the module on ``x`` with other arguments, and caches in place of some of them."""
        args, kwargs = detached(arguments.args), detached(arguments.kwargs)
        args, kwargs = self.block.as_called(x, args, kwargs | (caches or {}), self.positional)
        return hidden(self.module(*args, **kwargs))


@dataclasses.dataclass(frozen=True)
class CallBatch:
    """Calls of one block, one for each prompt. ValueError if their arguments cannot be joined."""

    calls: Sequence[BlockCall]

    def one_token(
        self, x: Float[Tensor, "prompt d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Run the block on one vector of each prompt, as if it stood at its token, alone.

        Returns:
            F at that token, skip connection included.
        """
        arguments = self._arguments(tokens, first_keys=tokens)
        return self.calls[0].run(x[:, None], arguments)[:, 0]

    def decode(
        self, x: Float[Tensor, "prompt 1 d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt 1 d_model"]:
        """Return F at one token of each prompt, on the kept keys of the tokens before it.

        This is the step that a model takes when it generates. Shorter prompts have keys put before
        their own, which masks hide. The skip connection is included.

        Raises:
            ValueError: if calls kept no keys, or no mask would hide the keys put in front.
        """
        keys = [call.keys for call in self.calls if call.keys is not None]
        if len(keys) < len(self.calls):
            raise ValueError("calls that kept no keys cannot be decoded")
        arguments = self._arguments(tokens, first_keys=[0] * len(self.calls))
        with torch._C.DisableTorchFunction():
            cache = cache_before(keys, tokens)
        columns, kwargs = max(tokens) + 1, arguments.kwargs
        if len(set(tokens)) > 1 and not any(
            isinstance(value, Tensor) and value.shape[-1:] == (columns,)
            for value in (*arguments.args, *kwargs.values())
        ):
            raise ValueError(
                "prompts of different lengths cannot be decoded together without a mask"
            )
        caches = {name: cache for name in CACHES if name in kwargs}
        return self.calls[0].run(x, arguments, caches)

    def pull_back_decoding(
        self, directions: Sequence[Float[Tensor, " d_model"]], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Compute uᵀ ∂F_t / ∂x_t of every prompt by one step of decoding.

        Returns:
            A row per prompt in the calls' dtype; NaN where the output differs from the trace's.
        """
        x, expected = (
            torch.stack([stream[0, token] for stream, token in zip(streams, tokens, strict=True)])
            for streams in (
                [call.resid_pre for call in self.calls],
                [call.resid_post for call in self.calls],
            )
        )
        x = x[:, None].requires_grad_(True)
        with torch.enable_grad():
            output = self.decode(x, tokens)
            first_rows = x.new_zeros(len(x), dtype=torch.long)
            pulled = gradient(torch.stack(list(directions)), x, output, first_rows)
        agrees = _agrees_with_trace(x.detach()[:, 0], output.detach()[:, 0], expected)
        return torch.where(agrees, pulled[:, 0], torch.nan)

    def _arguments(self, tokens: Sequence[int], first_keys: Sequence[int]) -> Arguments:
        # The tape follows the block itself, not the preparation of its arguments.
        with torch._C.DisableTorchFunction():
            return join_at_tokens(
                [call.arguments for call in self.calls],
                tokens,
                [call.seq for call in self.calls],
                first_keys,
            )


def _agrees_with_trace(
    resid_pre: Float[Tensor, "*prompt d_model"],
    output: Float[Tensor, "*prompt d_model"],
    expected: Float[Tensor, "*prompt d_model"],
) -> Bool[Tensor, "*prompt 1"]:
    """Return whether a block's output is the trace's, relative to what the block adds."""
    added = (expected - resid_pre).abs().amax(-1, keepdim=True)
    return ((output - expected).abs() <= 1e-4 * added + 1e-6 * expected.abs()).all(-1, keepdim=True)


def hidden(output: Any) -> Tensor:
    """Return the stream among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def gradient(
    directions: Float[Tensor, "prompt d_model"],
    resid_pre: Float[Tensor, "prompt seq d_model"],
    output: Float[Tensor, "prompt seq d_model"],
    tokens: Int[Tensor, " prompt"],
    keep: bool = False,
) -> Float[Tensor, "prompt seq d_model"]:
    """Return uᵀ ∂F_t / ∂X of every prompt of a batch, along its own direction at its own token.

    Args:
        directions: u of each prompt.
        resid_pre: input of the block.
        output: output of the block.
        tokens: output token t of each prompt.
        keep: leave the block's graph for another token.

    Raises:
        CouplingError: if no gradient reaches the output: F = X + f(X) always has one.
    """
    if not output.requires_grad:
        raise CouplingError(
            "got a block whose output has no gradient, expected one that autograd follows; "
            "take torch.no_grad or torch.inference_mode out of the model's own code"
        )
    chosen = output[torch.arange(len(tokens), device=output.device), tokens]
    return torch.autograd.grad((chosen * directions).sum(), resid_pre, retain_graph=keep)[0]


def require_stream(layer: int, resid_pre: Tensor, resid_post: Tensor) -> None:
    """Raise CouplingError for feature maps, and if the number of tokens or their width changes."""
    if resid_pre.dim() != 3 or resid_post.shape != resid_pre.shape:
        raise CouplingError(
            f"got block {layer} that hands on a tensor of shape {[*resid_post.shape]} for one of "
            f"shape {[*resid_pre.shape]}, expected one vector for each token"
        )
