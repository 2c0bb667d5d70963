"""Modes that follow a block, while it runs, through scores → softmax → values.

No model family is known. A product, elementwise steps, a softmax and a second product are taken for
an attention core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


@no_type_check
def _operands(func, args, kwargs) -> tuple[Tensor, Tensor] | None:
    """Return the factors of a batched matrix product, or None if ``func`` is another operation."""
    if func in ADDED_PRODUCTS:
        left = args[1] if len(args) > 1 else kwargs["batch1"]
        right = args[2] if len(args) > 2 else kwargs["batch2"]
    elif func in _PRODUCTS:
        left = args[0]
        right = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    else:
        return None
    return (left, right) if left.dim() >= 3 and right.dim() >= 3 else None


def flatten_heads(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Reshape […, rows, columns] to [head, rows, columns]; keys shared by queries are repeated."""
    return tensor.expand(*batch, *tensor.shape[-2:]).reshape(batch.numel(), *tensor.shape[-2:])


class Watch(TorchFunctionMode):
    """Base class of the modes: finds the three stages and hands each to a method of its own.

    ``stage`` is what it looks for next: ``scores`` (and their softmax), ``values``, or ``done``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = "scores"
        self.product: tuple[Tensor, Tensor] | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Queries and transposed keys, once their product has been seen."""
        assert self.product is not None
        return self.product

    @no_type_check  # runs for every operation
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # The last product before a softmax is that of queries and keys.
        if self.stage == "scores" and (factors := _operands(func, args, kwargs)) is not None:
            self.product = factors
            return self._on_scores(func, args, kwargs)
        if self.stage == "scores" and self.product is not None and func in _SOFTMAXES:
            self.stage = "values"
            return self._on_softmax(func, args, kwargs)
        if self.stage == "values" and (factors := _operands(func, args, kwargs)) is not None:
            self.stage = "done"
            return self._on_values(func, args, kwargs, *factors)
        return self._on_other(func, args, kwargs)

    def _on_scores(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _on_softmax(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        raise NotImplementedError

    def _on_other(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class Substitute(Watch):
    """Mode that replaces the attention core of a run on one token.

    ``answer`` gets its q, k and v, each [head, d_head]; what it returns takes the core's place.
    """

    def __init__(self, answer: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        q, k_t = self.factors
        batch = q.shape[:-2]
        z = self.answer(
            flatten_heads(q, batch)[:, 0],
            flatten_heads(k_t, batch)[:, :, 0],
            flatten_heads(values, batch)[:, 0],
        )
        return z.reshape(*weights.shape[:-1], values.shape[-1]).to(values.dtype)
