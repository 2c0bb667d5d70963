"""One block together with the arguments it was called with, ready to be called again, whole or at one token."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.argument import CACHES, carried, in_dtype
from lm_eval_coupling.residual.arguments import Arguments
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.keys import Cache, Keys


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """One block together with the arguments it was called with, ready to be called again.

    ``resid_pre`` and ``resid_post`` are the block's input X^{l-1} and output X^l, shape [1, seq, d_model]. ``pullback`` is
    uᵀ ∂F_t / ∂X, taken on the way for the token t and the direction u that the trace was told of; ``keys`` are the keys
    and values that the block handed to its cache, in long prompts instead. Calls must be made inside :meth:`ready`.
    """

    block: Block
    resid_pre: Float[Tensor, "batch seq d_model"]
    arguments: Arguments
    resid_post: Float[Tensor, "batch seq d_model"] | None = None
    pullback: tuple[int, Float[Tensor, "seq d_model"]] | None = None
    keys: Keys | None = None

    def without_keys(self) -> BlockCall:
        """The same call, whose derivatives are all taken of the whole sequence."""
        return dataclasses.replace(self, keys=None)

    def in_dtype(self, dtype: torch.dtype) -> BlockCall:
        """The same call in another arithmetic: what was kept of the trace is cast, and no derivative is known of it."""
        return BlockCall(
            block=self.block,
            resid_pre=self.resid_pre.to(dtype),
            arguments=self.arguments.in_dtype(dtype),
            resid_post=in_dtype(self.resid_post, dtype),
            keys=None if self.keys is None else self.keys.in_dtype(dtype),
        )

    def with_pullback(self, output_token: int, pulled: Float[Tensor, "seq d_model"]) -> BlockCall:
        """The same call, which knows uᵀ ∂F_t / ∂X of one output token t already."""
        return dataclasses.replace(self, pullback=(output_token, pulled))

    def pulled_back(
        self, direction: Float[Tensor, " d_model"], output_token: int
    ) -> Float[Tensor, "seq d_model"]:
        """uᵀ ∂F_{output} / ∂X along ``direction`` u, for every input token: one backward pass through the whole block.

        Returns:
            NaN where the block gives another output than it did in the trace.
        """
        resid_pre = self.resid_pre.detach().requires_grad_(True)
        with torch.enable_grad():
            at = torch.full((1,), output_token, device=resid_pre.device)
            output = self(resid_pre)
            pulled = gradient(direction[None], resid_pre, output, at)[0]
        if self.resid_post is None:
            return pulled
        entering, found, expected = (
            of[0, output_token].detach() for of in (resid_pre, output, self.resid_post)
        )
        return torch.where(_as_traced(entering, found, expected), pulled, torch.nan)

    @staticmethod
    def pulled_back_decoding(
        calls: Sequence[BlockCall],
        directions: Sequence[Float[Tensor, " d_model"]],
        tokens: Sequence[int],
    ) -> Float[Tensor, "prompt d_model"]:
        """uᵀ ∂F_t / ∂x_t of several prompts by one step of decoding; NaN where it gives another output than the trace.

        Returns:
            A row per prompt, in the calls' dtype.

        Raises:
            ValueError: if the calls' arguments cannot be joined.
        """
        at = list(zip(calls, tokens, strict=True))
        x = torch.stack([call.resid_pre[0, token] for call, token in at])[:, None].requires_grad_(
            True
        )
        with torch.enable_grad():
            output = BlockCall.decoded(calls, x, tokens)
            pulled = gradient(
                torch.stack(list(directions)), x, output, x.new_zeros(len(calls), dtype=torch.long)
            )
        expected = torch.stack([call.resid_post[0, token] for call, token in at])
        return torch.where(
            _as_traced(x.detach()[:, 0], output.detach()[:, 0], expected), pulled[:, 0], torch.nan
        )

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""
        return self.block.layer

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and those before it."""
        return self.block.causal

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self.block.module

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the call."""
        return self.resid_pre.dtype

    @property
    def seq(self) -> int:
        """Number of tokens."""
        return self.resid_pre.shape[1]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Upcast this block's weights, and only them, for as long as the context lasts."""
        with self.block.ready(self.dtype):
            yield

    def __call__(
        self, resid_pre: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The block's output F^l(X) = X + f^l(X) for the whole sequence."""
        return self._run(resid_pre, self.arguments)

    def one_token(self, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """Run the block on the single vector ``x`` as if it stood at position ``token`` and saw only itself."""
        return self.one_token_each([self], x[None], [token])[0]

    @staticmethod
    def one_token_each(
        calls: Sequence[BlockCall], x: Float[Tensor, "prompt d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Run one block on one vector of each prompt, as if it stood at that prompt's token and saw only itself.

        Returns:
            F at that token, a row per prompt, skip connection included.

        Raises:
            ValueError: if the calls' arguments cannot be joined.
        """
        with (
            torch._C.DisableTorchFunction()
        ):  # whoever follows the block need not follow its arguments' preparation
            arguments = _at_tokens(calls, tokens, firsts=tokens)
        return calls[0]._run(x[:, None], arguments)[:, 0]

    def one_query(self, token: int) -> Float[Tensor, "1 queries d_model"]:
        """Run the block with masks cut to one query row: only row ``token`` of the output may be used."""
        return self._run(self.resid_pre, self.arguments.one_row(token, self.seq))

    @staticmethod
    def decoded(
        calls: Sequence[BlockCall], x: Float[Tensor, "prompt 1 d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt 1 d_model"]:
        """One block's output at one token of each prompt: the other tokens enter it by their kept keys and values alone.

        As when the model generates. Shorter prompts have keys put before their own, which masks hide.

        Returns:
            F at that token, skip connection included.

        Raises:
            ValueError: if the calls' arguments cannot be joined, kept no keys, or nothing would hide those before.
        """
        kept = [call.keys for call in calls if call.keys is not None]
        if len(kept) < len(calls):
            raise ValueError("calls that kept no keys cannot be decoded")
        with torch._C.DisableTorchFunction():
            arguments = _at_tokens(calls, tokens, firsts=[0] * len(calls))
            cache = Keys.before_each(kept, tokens)
        columns, kwargs = max(tokens) + 1, arguments.kwargs
        if len(set(tokens)) > 1 and not any(
            isinstance(value, Tensor) and value.shape[-1:] == (columns,)
            for value in (*arguments.args, *kwargs.values())
        ):
            raise ValueError(
                "prompts of different lengths cannot be decoded together without a mask"
            )
        return calls[0]._run(x, arguments, {name: cache for name in CACHES if name in kwargs})

    def _run(
        self, x: Tensor, arguments: Arguments, caches: Mapping[str, Cache] | None = None
    ) -> Tensor:
        args, kwargs = carried(arguments.args), carried(arguments.kwargs)
        return hidden(self.module(x, *args, **kwargs | (caches or {})))


def _at_tokens(
    calls: Sequence[BlockCall], tokens: Sequence[int], firsts: Sequence[int]
) -> Arguments:
    return Arguments.at_tokens(
        [call.arguments for call in calls], tokens, [call.seq for call in calls], firsts
    )


def _as_traced(
    entering: Float[Tensor, "*prompt d_model"],
    found: Float[Tensor, "*prompt d_model"],
    expected: Float[Tensor, "*prompt d_model"],
) -> Bool[Tensor, "*prompt 1"]:
    """Whether a block gives the output that it gave in the trace; what it adds may be little beside the stream."""
    added = (expected - entering).abs().amax(-1, keepdim=True)
    return ((found - expected).abs() <= 1e-4 * added + 1e-6 * expected.abs()).all(-1, keepdim=True)


def hidden(output: Any) -> Tensor:
    """The stream among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def gradient(
    directions: Float[Tensor, "prompt d_model"],
    resid_pre: Float[Tensor, "prompt seq d_model"],
    output: Float[Tensor, "prompt seq d_model"],
    tokens: Int[Tensor, " prompt"],
) -> Float[Tensor, "prompt seq d_model"]:
    """uᵀ ∂F_t / ∂X of every prompt of a batch, each along its own direction u at its own token t.

    Returns:
        In the shape of ``resid_pre``.

    Raises:
        CouplingError: if no gradient reaches the output: F = X + f(X) always has one.
    """
    if not output.requires_grad:
        raise CouplingError(
            "got a block whose output has no gradient, expected one that autograd follows; "
            "take torch.no_grad or torch.inference_mode out of the model's own code"
        )
    chosen = output[torch.arange(len(tokens), device=output.device), tokens]
    return torch.autograd.grad((chosen * directions).sum(), resid_pre)[0]


def require_stream(layer: int, entering: Tensor, leaving: Tensor) -> None:
    """Refuse feature maps, and blocks that change the number of tokens or their width.

    Raises:
        CouplingError: for both.
    """
    if entering.dim() != 3 or leaving.shape != entering.shape:
        raise CouplingError(
            f"got block {layer} that hands on a tensor of shape {[*leaving.shape]} for one of shape {[*entering.shape]}, "
            "expected one vector for each token"
        )
