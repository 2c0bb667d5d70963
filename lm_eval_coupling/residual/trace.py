"""What one forward pass leaves of every block, and how it is caught on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory
from lm_eval_coupling.residual.argument import CACHES, carried, tensors_in
from lm_eval_coupling.residual.arguments import OnePass
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.block_call import BlockCall, gradient, hidden, require_stream
from lm_eval_coupling.residual.keys import Cache, Keys

Direction = Callable[
    [int, Tensor], Tensor
]  # (layer, vectors like those of the stream) → u [d_model]


@dataclasses.dataclass(frozen=True)
class ResidualTrace:
    """Every block call of one forward pass, and the stream after the last block."""

    calls: tuple[BlockCall, ...]
    resid_final: Float[Tensor, "1 seq d_model"]

    def trajectory(self, token: int) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x_t^0 … x_t^L: the residual stream at one token, after every block."""
        stream = [call.resid_pre[0, token].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, token]])

    def trajectories(self, tokens: slice) -> Float[Tensor, "token layer_plus_1 d_model"]:
        """:meth:`trajectory` of several tokens."""
        stream = [call.resid_pre[0, tokens].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, tokens]], dim=1)


class TracedBlock:
    """One block during a trace: its weights are upcast while it runs, its call is kept, and it is pulled back if wanted.

    It is pulled back along ``direction`` from ``tokens``, one index for each prompt of the batch, if both are given. Its
    arguments are brought to the device that the block's weights lie on. What it has in common with the other blocks of the
    pass is in ``shared``; in ``cache`` it leaves its keys and values.
    """

    def __init__(
        self,
        block: Block,
        dtype: torch.dtype,
        tokens: Sequence[int] | None,
        direction: Direction | None,
        shared: OnePass,
        cache: Cache | None,
    ) -> None:
        self.block, self.dtype, self.shared, self.cache = block, dtype, shared, cache
        self.tokens, self.direction = tokens, direction
        self.gradient: Tensor | None = None
        self.call: BlockCall | None = None
        self.open = contextlib.ExitStack()
        self.close = self.open.close

    def enter(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: remember the call, and make its input a leaf where a derivative is wanted."""
        if self.call is not None:
            raise CouplingError(
                f"got a model that runs block {self.block.layer} more than once, expected a residual stream"
            )
        bring = partial(self.shared.brought, device=self.block.device)
        args = tuple(_each_brought(value, bring) for value in args)
        kwargs = {name: _each_brought(value, bring) for name, value in kwargs.items()}
        self.open.enter_context(self.block.upcast(self.dtype))
        resid_pre, args, kwargs = self.block.by_name(args, kwargs)
        require_stream(self.block.layer, resid_pre, resid_pre)
        stream = resid_pre.detach()
        self.call = BlockCall(self.block, stream, self.shared.arguments(args, kwargs))
        if self.cache is not None:
            kwargs = kwargs | {name: self.cache for name in CACHES if name in kwargs}
        if self.direction is not None and self.tokens is not None:
            stream = self.leaf = stream.clone().requires_grad_(True)
            self.open.enter_context(torch.enable_grad())
        return (stream, *args), kwargs

    def leave(self, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: pull back, and hand on an output without history."""
        assert self.call is not None  # it was entered
        require_stream(self.block.layer, self.call.resid_pre, hidden(output))
        if self.direction is not None and self.tokens is not None:
            u = self.direction(self.block.layer, self.leaf)
            at = self.shared.rows(self.tokens, self.leaf.device)
            self.gradient = gradient(u.expand(len(at), -1), self.leaf, hidden(output), at)
            del self.leaf
        self.open.close()
        _without_history(kwargs)
        self.resid_post = hidden(output).detach()
        if not isinstance(output, (tuple, list)):
            return self.resid_post
        parts = (self.resid_post, *carried(tuple(output[1:])))
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    def of_prompt(self, prompt: int, seq: int) -> BlockCall:
        """The call as it would have been of one prompt alone, ``seq`` tokens long."""
        call, row = self.call, slice(prompt, prompt + 1)
        assert call is not None  # the model has run
        given = None if self.cache is None else self.cache.given
        return dataclasses.replace(
            call,
            resid_pre=call.resid_pre[row, :seq],
            arguments=call.arguments.of_prompt(prompt, seq, call.seq)
            if len(call.resid_pre) > 1
            else call.arguments,
            resid_post=self.resid_post[row, :seq],
            pullback=None
            if self.gradient is None or self.tokens is None
            else (self.tokens[prompt], self.gradient[prompt, :seq]),
            keys=None if given is None else Keys(given, prompt, seq, self.shared),
        )


def _each_brought(value: Any, bring: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor in nested arguments where it is to be; what blocks write to for each other stays the same object."""
    if isinstance(value, Tensor):
        return bring(value)
    if isinstance(value, (dict, UserDict)):
        for key, item in value.items():
            value[key] = _each_brought(item, bring)
    elif isinstance(value, (tuple, list)) and any(
        bring(tensor) is not tensor for tensor in tensors_in(value)
    ):
        return tree_map_only(Tensor, bring, value)
    return value


def _without_history(kwargs: dict[str, Any]) -> None:
    """What a block has written for later ones is held fixed in their derivatives."""
    for value in kwargs.values():
        if isinstance(value, (dict, UserDict)):
            for key, item in value.items():
                value[key] = carried(item)


@contextlib.contextmanager
def told_if_refused(arguments: dict[str, Any], first: TracedBlock) -> Iterator[None]:
    """Inside, an error of the model before its ``first`` block says what the model was given: an image of another size."""
    try:
        yield
    except CouplingError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        pass_on_lack_of_memory(error)
        if first.call is not None:
            raise
        given = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        )
        words = " ".join(str(error).split())[:200]
        raise CouplingError(
            f"got {given}, which the model does not take ({words}); expected what it is made for"
        ) from error
