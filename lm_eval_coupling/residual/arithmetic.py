"""Arithmetic of a measurement, in place of the dtypes that transformers casts to."""

from __future__ import annotations

import contextlib
from typing import Any, no_type_check

import torch
from torch.overrides import TorchFunctionMode


class TrueDtype(TorchFunctionMode):
    """A mode in which hard-coded float32 steps (norms, softmax, rotary tables) are in ``dtype``.

    transformers casts these steps to float32 for any dtype of the model: a "float64" derivative of
    an unmodified model is off by up to 3e-7. Needed for float64 only.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    @no_type_check  # runs for every operation
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0] if args[0].is_floating_point() else args[0].to(self.dtype)
        if kwargs and kwargs.get("dtype") is torch.float32:
            kwargs = kwargs | {"dtype": self.dtype}
        for argument in args:  # not by `in`, which compares tensors
            if argument is torch.float32:
                args = tuple(self.dtype if a is torch.float32 else a for a in args)
                break
        return func(*args, **(kwargs or {}))


def arithmetic(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context in which a pass in ``dtype`` runs."""
    return TrueDtype(dtype) if dtype == torch.float64 else contextlib.nullcontext()
