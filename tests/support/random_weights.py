"""Weights that make a tiny model behave like no other: its usual ones leave attention uniform, and
adapters do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Matrices far from zero, so that attention is far from uniform; norms and biases near what
    they were.
    """
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() > 1:
            parameter.normal_(0, 0.2)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def with_lora(model: nn.Module, targets: Sequence[str], **options: Any) -> Any:
    """The model with a LoRA adapter that changes its function, the same every time."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | options
    )
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return adapted
