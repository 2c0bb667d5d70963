"""Arguments of blocks that a pass changes in place, such as a mask that all blocks share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.residual.arguments import CACHES, tensors_in
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.load_checks import answer_of


def edited_argument(
    model: nn.Module, blocks: Sequence[Block], inputs: Inputs, device: torch.device
) -> tuple[int, str] | None:
    """Run a model on the probe, and find the first argument of a block that is changed in place.

    Returns:
        The block's number and the argument's name, or None. Caches are written to by design.
    """
    edited: list[tuple[int, str]] = []
    given: list[tuple[str, Tensor, int]] = []

    def enter(block: Block, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream, unnamed, named = block.by_name(args, kwargs)
        given.clear()
        values = {block.stream_name: stream, "an unnamed argument": unnamed} | named
        for name, value in values.items():
            if name not in CACHES:
                given.extend((name, tensor, tensor._version) for tensor in tensors_in(value))

    def leave(block: Block, *_: Any) -> None:
        names = [name for name, tensor, version in given if tensor._version != version]
        edited.extend((block.layer, name) for name in names)

    with contextlib.ExitStack() as stack:
        for block in blocks:
            before = block.module.register_forward_pre_hook(
                partial(enter, block), prepend=True, with_kwargs=True
            )
            stack.enter_context(before)
            stack.enter_context(block.module.register_forward_hook(partial(leave, block)))
        # A pass that fails has the error that is being explained.
        with contextlib.suppress(Exception):
            answer_of(model, inputs, device)
    return next(iter(edited), None)
