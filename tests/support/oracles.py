"""Oracles of measurements: plain automatic differentiation of unmodified models."""

import torch


def decoder_layers(model):
    """The blocks of an unmodified transformers model: its longest ModuleList."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def oracle(model, tokens, layer, t_out, t_in):
    """∂(block − identity)/∂x of one pair of tokens."""
    return oracle_by_input(model, tokens, layer, t_out)[:, t_in]


def oracle_by_input(model, tokens, layer, t_out):
    """Return [d_out, t_in, d_in], each row from a copy of the prompt of its own.

    Prompts of a batch do not meet: one backward pass from coordinate i of copy i has all rows.
    """
    seen = {}

    def before(module, args, kwargs):
        name = "hidden_states" if "hidden_states" in kwargs else None
        x = (kwargs[name] if name else args[0]).detach().requires_grad_(True)
        seen["x"] = x
        return (args, kwargs | {name: x}) if name else ((x, *args[1:]), kwargs)

    def after(module, args, output):
        seen["y"] = output[0] if isinstance(output, tuple) else output

    block = decoder_layers(model)[layer]
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    width = getattr(model.config, "vision_config", model.config).hidden_size
    copies = tokens.expand(width, *tokens.shape[1:])
    with torch.enable_grad():
        model(pixel_values=copies) if tokens.is_floating_point() else model(copies, use_cache=False)
    for handle in handles:
        handle.remove()
    contribution = (seen["y"] - seen["x"])[:, t_out]
    assert contribution.shape == (width, width)
    (gradients,) = torch.autograd.grad(contribution.diagonal().sum(), seen["x"])
    return gradients


def worst(found, expected):
    """Return the relative error; a norm below 1e-3 counts as 1e-3."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-3)).item()
