"""A block's two halves apart: with its MLP silenced, and with its attention held at what it said.

With f = a + m, a block without its MLP is X + a(X), whatever norms and multipliers stand around it. With the attention's
output held fixed it is X + a₀ + m(X + a₀), or X + a₀ + m(X) where both halves read the stream itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.residual.block_call import BlockCall

# What transformers calls the two, in the order of preference; the last of an MLP without a module of its own stands for it.
_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")


@contextlib.contextmanager
def attention_alone(call: BlockCall) -> Iterator[BlockCall]:
    """The block without its MLP.

    Yields:
        A call that holds no keys and no pullback of the whole block, good within the context.

    Raises:
        Unmeasurable: if the block has no module that is its MLP by name, or is not its stream and two such parts.
    """
    _require_parts(call)
    with _hooked(_child(call.module, _MLPS, "MLP"), _silent):
        yield _bare(call)


def _require_parts(call: BlockCall) -> None:
    """Without both a block hands on its stream, but for a constant that a norm may add to nothing."""
    attention, mlp = (
        _child(call.module, _ATTENTIONS, "attention"),
        _child(call.module, _MLPS, "MLP"),
    )
    with _hooked(attention, _silent), _hooked(mlp, _silent), call.ready(), torch.no_grad():
        left = call(call.resid_pre) - call.resid_pre
    spread = (left - left.mean(dim=1, keepdim=True)).abs().amax()
    if not spread <= 1e-5 * call.resid_pre.abs().amax():
        raise Unmeasurable(
            "refused",
            f"attention and MLP do not add up to block {call.layer}: more is left without them",
        )


@contextlib.contextmanager
def mlp_alone(call: BlockCall, token: int) -> Iterator[BlockCall]:
    """The block with its attention's output held at what it is, to be used at ``token``.

    Yields:
        A call that holds no keys and no pullback of the whole block, good within the context.

    Raises:
        Unmeasurable: if the block has no module that is its attention by name.
    """
    attention = _child(call.module, _ATTENTIONS, "attention")
    said: list[Tensor] = []

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        said.append(_hidden(output).detach())

    with _hooked(attention, listen), call.ready(), torch.no_grad():
        call(call.resid_pre)
    whole, alone = said[0], said[0][:, token : token + 1].clone()

    def held(module: nn.Module, inputs: Any, output: Any) -> Any:
        return _with_hidden(
            output,
            lambda y: (whole if y.shape == whole.shape else alone.expand(y.shape)).to(y.dtype),
        )

    with _hooked(attention, held):
        yield _bare(call)


def _bare(call: BlockCall) -> BlockCall:
    """Without what the trace knows of the whole block: its derivative and its output."""
    return dataclasses.replace(call, pullback=None, keys=None, resid_post=None)


def _child(block: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    children = dict(block.named_children())
    found = next((children[name] for name in names if name in children), None)
    if found is None:
        there = ", ".join(children) or "none"
        raise Unmeasurable(
            "refused", f"the block has no part that is its {what} by name (there are {there})"
        )
    return found


def _silent(module: nn.Module, inputs: Any, output: Any) -> Any:
    # Of no tensor's making: nobody who follows the block's steps sees it depend on anything.
    return _with_hidden(output, lambda y: torch.zeros(y.shape, dtype=y.dtype, device=y.device))


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
