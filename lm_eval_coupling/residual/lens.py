"""The model with its blocks left out, applied to vectors of its stream (logit lens)."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.devices import as_tensor
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.bridge import innermost
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.vocabulary import head_in_parts, rows_only
from lm_eval_coupling.residual.weights import upcast

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _HeadReached(Exception):
    """The head was reached; nothing after it is needed."""


class Lens:
    """Final norm, scales, soft-caps and head of a model, whatever they are."""

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
        """Return the model's logits for vectors after its last block, in their dtype.

        Args:
            resid: the vectors.
            outputs: number of things that a block returns as a tuple, 0 for a plain tensor.
        """
        arguments, stream = self.inputs.standing_for(resid, self.device)
        with self._without_blocks(stream, outputs):
            output = self.model(**arguments)
            return output.logits if resid.dim() == 3 else self.inputs.read(output)

    def answer(self, stream: Float[Tensor, "1 seq d_model"], outputs: int) -> Tensor:
        """Return the model's logits for a probe that ended as ``stream``."""
        arguments, stream = self.inputs.ending_as(stream, self.device)
        with self._without_blocks(stream, outputs):
            return self.inputs.read(self.model(**arguments))

    def norm_jacobian(
        self, resid: Float[Tensor, " d_model"], outputs: int
    ) -> Float[Tensor, "d_model d_model"]:
        """Differentiate the head's input by ``resid``; the identity where no norm is between."""
        arguments, stream = self.inputs.standing_for(resid[None], self.device)
        head_inputs: list[Tensor] = []

        def stop(module: nn.Module, args: tuple) -> None:
            head_inputs.append(args[0])
            raise _HeadReached

        if self.head is None:
            raise CouplingError(
                f"got a {type(self.model).__name__}, expected a language model's head"
            )
        leaf = stream.detach().requires_grad_(True)
        with torch.enable_grad(), self._without_blocks(leaf, outputs) as start:
            with self.head.register_forward_pre_hook(stop), contextlib.suppress(_HeadReached):
                self.model(**arguments)
            output = head_inputs[0].reshape(-1)
            eye = torch.eye(resid.numel(), dtype=resid.dtype, device=output.device)
            (rows,) = torch.autograd.grad(output, start, eye, is_grads_batched=True)
        return rows.reshape(len(eye), len(eye)).to(resid.device)

    @property
    def head(self) -> nn.Module | None:
        """A language model's head; a classifier's is one of the small things outside the blocks."""
        return self.model.get_output_embeddings() if self.inputs.causal else None

    @contextlib.contextmanager
    def _without_blocks(self, stream: Tensor, outputs: int) -> Iterator[Tensor]:
        """Let every block hand on ``stream``, which is yielded on the head's device."""
        head = None if self.head is None else innermost(self.head)
        stream = stream.to(self.device if head is None else cast(Tensor, head.weight).device)
        output: Any = (stream, *[None] * (outputs - 1)) if outputs else stream
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
                hook = module.register_forward_pre_hook(_move_inputs, with_kwargs=True)
                stack.callback(hook.remove)
            for block in self.blocks:
                stack.enter_context(_silent(block, output))
            yield stream

    def _outside_modules(self) -> list[nn.Module]:
        """List the modules outside the blocks that have weights of their own."""
        inside = {id(part) for block in self.blocks for part in block.modules()}
        return [
            part
            for part in self.model.modules()
            if id(part) not in inside and _own_device(part) is not None
        ]


@contextlib.contextmanager
def _silent(block: nn.Module, output: Any) -> Iterator[None]:
    """Let a block return ``output``, without its hooks: the vectors have passed them already."""
    own: Any = vars(block)
    names = ("forward", *_HOOKS)
    kept = {name: own[name] for name in names if name in own}
    own["forward"] = lambda *args, **kwargs: output
    own.update({name: OrderedDict() for name in _HOOKS})
    try:
        yield
    finally:
        del own["forward"]
        own.update(kept)


def _own_device(module: nn.Module) -> torch.device | None:
    """Return the device of the innermost module's own tensors."""
    inner = innermost(module)
    tensors = (*inner.parameters(recurse=False), *inner.buffers(recurse=False))
    return next((t.device for t in tensors), None)


def _move_inputs(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Move a module's inputs to its device (pre-hook)."""
    # Where the head is tied to the embeddings, the norm before it may lie on another device.
    device = _own_device(module)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))


def require_vectors(resid: Any, d_model: int, alone: bool = False) -> Tensor:
    """Return vectors of the stream (one if ``alone``), or raise CouplingError for anything else."""
    tensor = as_tensor("resid", resid)
    is_wide = tensor.ndim > 0 and tensor.shape[-1] == d_model and tensor.is_floating_point()
    if not is_wide or (alone and tensor.ndim > 1):
        what = "one vector" if alone else "vectors"
        raise CouplingError(
            f"got resid of shape {[*tensor.shape]} and {tensor.dtype}, expected {what} of "
            f"{d_model} numbers"
        )
    return tensor
