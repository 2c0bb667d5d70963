"""A block's halves alone: with its MLP silenced, or with its attention's output held fixed.

With f = a + m, a block without its MLP is X + a(X), with all norms and multipliers around it. With
the attention's output held fixed it is X + a₀ + m(X + a₀), or X + a₀ + m(X) where both halves read
the stream itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.residual.block_call import BlockCall, hidden

# Names in transformers, in the order of preference; ``fc2`` ends an MLP without its own module.
_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")


@contextlib.contextmanager
def attention_alone(call: BlockCall) -> Iterator[BlockCall]:
    """Silence the block's MLP.

    Yields:
        A call without keys and pullback, valid within the context.

    Raises:
        Unmeasurable: if no module is the MLP by its name, or the block is more than two such parts.
    """
    _require_parts(call)
    with _child(call.module, _MLPS, "MLP").register_forward_hook(_silent):
        yield _bare(call)


def _require_parts(call: BlockCall) -> None:
    """Require that a block without both parts hands on its stream, plus a norm's constant."""
    attention = _child(call.module, _ATTENTIONS, "attention")
    mlp = _child(call.module, _MLPS, "MLP")
    with attention.register_forward_hook(_silent), mlp.register_forward_hook(_silent):
        with call.ready(), torch.no_grad():
            left = call(call.resid_pre) - call.resid_pre
    spread = (left - left.mean(dim=1, keepdim=True)).abs().amax()
    if not spread <= 1e-5 * call.resid_pre.abs().amax():
        raise Unmeasurable(
            "refused",
            f"attention and MLP do not add up to block {call.layer}: more is left without them",
        )


@contextlib.contextmanager
def mlp_alone(call: BlockCall, token: int) -> Iterator[BlockCall]:
    """Hold the output of the block's attention fixed, for use at ``token``.

    Yields:
        A call without keys and pullback, valid within the context.

    Raises:
        Unmeasurable: if no module is the attention by its name.
    """
    attention = _child(call.module, _ATTENTIONS, "attention")
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(hidden(output).detach())

    with attention.register_forward_hook(keep), call.ready(), torch.no_grad():
        call(call.resid_pre)
    sequence, row = outputs[0], outputs[0][:, token : token + 1].clone()

    def hold(module: nn.Module, inputs: Any, output: Any) -> Any:
        return _with_hidden(
            output,
            lambda y: (sequence if y.shape == sequence.shape else row.expand(y.shape)).to(y.dtype),
        )

    with attention.register_forward_hook(hold):
        yield _bare(call)


def _bare(call: BlockCall) -> BlockCall:
    """Drop what the trace keeps of the complete block: its derivative and its output."""
    return dataclasses.replace(call, pullback=None, keys=None, resid_post=None)


def _child(block: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    children = dict(block.named_children())
    for name in names:
        if name in children:
            return children[name]
    listed = ", ".join(children) or "none"
    raise Unmeasurable(
        "refused", f"the block has no part that is its {what} by name (its parts: {listed})"
    )


def _silent(module: nn.Module, inputs: Any, output: Any) -> Any:
    # A new tensor, not 0 * y: the tape must not see it depend on anything.
    return _with_hidden(output, lambda y: torch.zeros(y.shape, dtype=y.dtype, device=y.device))


def _with_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
