"""Embeddings and head used in another dtype without a copy of these large tables in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_coupling.residual.bridge import innermost
from lm_eval_coupling.residual.weights import fetched, is_absent, upcast

AT_ONCE = 1 << 24  # entries of a head that are cast at a time


def looked_up(model: nn.Module) -> dict[nn.Module, nn.Embedding]:
    """Return the embeddings that look token ids up, by the module that is called for them."""
    tables: dict[nn.Module, nn.Embedding] = {}
    modules = list(model.modules())  # the outer ones come first
    # PEFT's trainable tokens look up a merged weight of their own.
    merged = {id(part.base_layer) for part in modules if hasattr(part, "trainable_tokens_delta")}
    for module in modules:
        table = innermost(module)
        if not isinstance(table, nn.Embedding) or table in tables.values() or id(table) in merged:
            continue
        first = next(iter(inspect.signature(table.forward).parameters), "")
        if [*table.parameters()] == [table.weight] and first in ("input", "input_ids"):
            tables[module] = table
    return tables


@contextlib.contextmanager
def rows_only(tables: dict[nn.Module, nn.Embedding], dtype: torch.dtype) -> Iterator[None]:
    """While active, each embedding holds only the rows being looked up, in ``dtype``.

    The rows stay until the end: TransformerLens asks the weight for its dtype after the call too.
    A table with a forward method of the user's is held whole: that method may go by token ids.
    """
    with contextlib.ExitStack() as stack:
        for module, table in tables.items():
            if table.weight.dtype == dtype and not is_absent(table.weight):
                continue
            if "forward" in vars(table):
                stack.enter_context(upcast([table.weight], dtype))
                continue
            rows = _Rows(table, dtype)
            vars(table)["forward"] = rows.look_up
            stack.callback(delattr, table, "forward")
            stack.callback(rows.put_back)
            stack.callback(module.register_forward_pre_hook(rows.take).remove)
        yield


class _Rows:
    """The rows of one table that a pass looks up; hooks on the table still see the token ids."""

    def __init__(self, table: nn.Embedding, dtype: torch.dtype) -> None:
        self.table, self.dtype = table, dtype
        self.kept: tuple[Tensor, int | None] | None = None
        self.ids, self.forward = torch.empty(0), table.forward

    def take(self, module: nn.Module, args: tuple) -> None:
        """Put the rows of these ids into the table (pre-hook)."""
        self.put_back()
        weight: Any = self.table.weight
        ids = self.ids = torch.unique(args[0])
        source = weight.fetch() if is_absent(weight) else weight.data
        self.kept = (weight.data, self.table.padding_idx)
        weight.data = source[ids.to(source.device)].to(weight.device, self.dtype)
        self.table.padding_idx = None  # it affects gradients only, and may be beyond these rows

    def put_back(self) -> None:
        if self.kept is not None:
            self.table.weight.data, self.table.padding_idx = self.kept
            self.kept = None

    def look_up(self, ids: Tensor, *args: Any) -> Tensor:
        """Run the table on places among its rows; the module's hooks have seen the ids."""
        return self.forward(torch.searchsorted(self.ids, ids), *args)


@contextlib.contextmanager
def head_in_parts(head: nn.Module, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Let a linear head multiply some rows at a time; yield the weights that must be upcast."""
    if type(head) is not nn.Linear or head.weight.dtype == dtype and not is_absent(head.weight):
        yield [*head.parameters(), *head.buffers()]
        return
    weight = head.weight.data
    before = {name: value for name, value in vars(head).items() if name == "forward"}

    def forward(hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocabulary"]:
        rows = max(1, AT_ONCE // head.in_features)
        stored: Any = head.weight
        source = stored.fetch() if is_absent(stored) else weight
        parts = [F.linear(hidden, part.to(hidden.device, dtype)) for part in source.split(rows)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + fetched(head.bias).to(dtype)

    vars(head)["forward"] = forward
    # TransformerLens asks the weight for its dtype.
    head.weight.data = torch.zeros((), dtype=dtype, device=weight.device).expand(weight.shape)
    try:
        yield []
    finally:
        head.weight.data = weight
        del head.forward
        vars(head).update(before)
