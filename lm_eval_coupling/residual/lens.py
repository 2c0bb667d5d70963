"""What a model makes of vectors after its last block: the model itself with its blocks left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.devices import as_tensor
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.vocabulary import head_in_parts, innermost, rows_only
from lm_eval_coupling.residual.weights import upcast


class _HeadReached(Exception):
    """The head was reached; nothing after it is needed."""


class Lens:
    """Final norm, scales, soft-caps and head of a model, whatever they are, applied to any vectors of its stream."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        inputs: Inputs,
        tables: dict[nn.Module, nn.Embedding],
        outside: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.model, self.blocks, self.inputs = model, blocks, inputs
        self.tables, self.outside, self.device = tables, outside, device

    def logits(
        self, resid: Float[Tensor, "*prompt points d_model"], outputs: int
    ) -> Float[Tensor, "*prompt points vocabulary"]:
        """What the model would predict, in the dtype of ``resid``; ``outputs``: things that a block returns as a tuple."""
        if resid.dim() == 3:
            arguments, stream = self.inputs.standing_for(resid, self.device)
            with self._without_blocks(stream, outputs):
                return self.model(**arguments).logits
        return self._said(*self.inputs.standing_for(resid, self.device), outputs)

    def answer(self, stream: Float[Tensor, "1 seq d_model"], outputs: int) -> Tensor:
        """What the model says of a probe that ended as ``stream``."""
        return self._said(*self.inputs.ending_as(stream, self.device), outputs)

    def _said(self, arguments: dict[str, Any], stream: Tensor, outputs: int) -> Tensor:
        with self._without_blocks(stream, outputs):
            return self.inputs.read(self.model(**arguments))

    def norm_jacobian(
        self, resid: Float[Tensor, " d_model"], outputs: int
    ) -> Float[Tensor, "d_model d_model"]:
        """Derivative of what the head is given, the final norm of ``resid``; the identity where there is none."""
        arguments, stream = self.inputs.standing_for(resid[None], self.device)
        seen: list[Tensor] = []

        def reached(module: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise _HeadReached

        if self.head is None:
            raise CouplingError(
                f"got a {type(self.model).__name__}, expected a language model's head"
            )
        handle = self.head.register_forward_pre_hook(reached)
        try:
            with (
                torch.enable_grad(),
                self._without_blocks(stream.detach().requires_grad_(True), outputs) as start,
            ):
                with contextlib.suppress(_HeadReached):
                    self.model(**arguments)
                eye = torch.eye(resid.numel(), dtype=resid.dtype, device=seen[0].device)
                rows = torch.autograd.grad(seen[0].reshape(-1), start, eye, is_grads_batched=True)[
                    0
                ]
        finally:
            handle.remove()
        return rows.reshape(len(eye), len(eye)).to(resid.device)

    @property
    def head(self) -> nn.Module | None:
        """A language model's head; a classifier's is one of the small things outside the blocks."""
        return self.model.get_output_embeddings() if self.inputs.causal else None

    @contextlib.contextmanager
    def _without_blocks(self, stream: Tensor, outputs: int) -> Iterator[Tensor]:
        """Inside, blocks hand on ``stream``, which is yielded as it is on their device."""
        head = None if self.head is None else innermost(self.head)
        stream = stream.to(self.device if head is None else cast(Tensor, head.weight).device)
        stand_in: Any = (stream, *[None] * (outputs - 1)) if outputs else stream
        with contextlib.ExitStack() as stack:
            rest = [] if head is None else stack.enter_context(head_in_parts(head, stream.dtype))
            weights = {id(t): t for t in [*self.outside, *rest]}
            stack.enter_context(upcast([*weights.values()], stream.dtype))
            tables = {
                module: table
                for module, table in self.tables.items()
                if id(table.weight) not in weights
            }
            stack.enter_context(rows_only(tables, stream.dtype))
            stack.enter_context(arithmetic(stream.dtype))
            outside = self._outside_modules()
            for module in outside if len({*map(_own_device, outside)}) > 1 else ():
                stack.callback(
                    module.register_forward_pre_hook(_bring_inputs, with_kwargs=True).remove
                )
            for block in self.blocks:
                stack.callback(
                    vars(block).update, {k: v for k, v in vars(block).items() if k == "forward"}
                )
                stack.callback(vars(block).pop, "forward")
                block.forward = lambda *args, **kwargs: stand_in
            yield stream

    def _outside_modules(self) -> list[nn.Module]:
        """Those outside the blocks that have weights of their own."""
        inside = {id(part) for block in self.blocks for part in block.modules()}
        return [
            part
            for part in self.model.modules()
            if id(part) not in inside and _own_device(part) is not None
        ]


def _own_device(module: nn.Module) -> torch.device | None:
    """Of its own weights, or of those of the module that it stands for and does not call."""
    inner = innermost(module)
    return next(
        (t.device for t in (*inner.parameters(recurse=False), *inner.buffers(recurse=False))), None
    )


def _bring_inputs(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: where the head is tied to the embeddings, the norm before it may lie on another device."""
    device = _own_device(module)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))


def vectors(resid: Any, d_model: int, alone: bool = False) -> Tensor:
    """Return vectors of the stream, ``alone`` only one, as they were given.

    Raises:
        CouplingError: for anything else.
    """
    found = as_tensor("resid", resid)
    if (
        not found.ndim
        or found.shape[-1] != d_model
        or not found.is_floating_point()
        or (alone and found.ndim > 1)
    ):
        what = "one vector" if alone else "vectors"
        raise CouplingError(
            f"got resid of shape {[*found.shape]} and {found.dtype}, expected {what} of {d_model} numbers"
        )
    return found
