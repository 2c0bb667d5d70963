"""Weights of the measuring module tree: shared with the model's where they are numbers on a device, *absent* elsewhere.

Weights packed in 4 or 8 bits, or offloaded to the host or the disk, have a stand-in of the right shape, dtype and device
that takes no memory and knows how to be fetched. :func:`upcast` fetches one block's, for as long as that block is at work.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.numerics.randomness import undrawn


def state_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def upcast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Hold the floating-point ``tensors`` in ``dtype`` for the time of the context, then put back what was there."""
    saved = [
        (t, t.data) for t in tensors if t.is_floating_point() and (t.dtype != dtype or is_absent(t))
    ]
    try:
        for tensor, _ in saved:
            tensor.data = fetched(tensor).to(dtype)
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


def is_absent(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands in for a weight that must be fetched."""
    return hasattr(tensor, "fetch")


def fetched(tensor: Tensor) -> Tensor:
    """The numbers of a weight, absent or not."""
    fetch: Any = getattr(tensor, "fetch", None)
    return tensor.data if fetch is None else fetch().to(tensor.device)


def absent(
    like: Tensor,
    fetch: Callable[[], Tensor],
    device: Any = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Stand-in for ``like``, on its device unless another is given."""
    device = like.device if device is None else torch.device(device)
    nothing = torch.zeros((), dtype=like.dtype, device=device).expand(
        like.shape if shape is None else shape
    )
    tensor = (
        nn.Parameter(nothing, requires_grad=False) if isinstance(like, nn.Parameter) else nothing
    )
    stand_in: Any = tensor
    stand_in.fetch = fetch
    return tensor


def sharing(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` must not copy: its memo for a second module tree of ``model``, without accelerate's hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            memo[id(hook)] = _without_effect()
        if (fetch := _unpacking(module)) is not None:
            memo[id(module)] = _plain_linear(module, fetch, _float_dtype(model))
            continue
        for name, tensor in _own(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(module, name, tensor)
        for value in vars(module).values():
            if isinstance(
                value, Tensor
            ):  # which pruning and the older weight norm make anew at every call
                memo[id(value)] = value.detach()
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo.update(
                {id(hook): hook for hook in hooks.values()}
            )  # the user's own, and what they write to
    for module in model.modules():
        for one, other in getattr(module, "all_tied_weights_keys", {}).items():
            if (tied := module.get_parameter(one)).device.type == "meta":  # offloading unties them
                memo[id(tied)] = memo[id(module.get_parameter(other))]
    return memo


def without_hooks(twin: nn.Module) -> nn.Module:
    """Take off what accelerate has put around the forward methods of a model that was copied with :func:`sharing`."""
    if any(hasattr(module, "_hf_hook") for module in twin.modules()):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(twin)
    return twin


def split_again(
    part: nn.Module, split: Callable[[nn.Module], Sequence[nn.Module]], pieces: Sequence[nn.Module]
) -> None:
    """Make ``pieces``, cut by ``split`` out of ``part``, absent: cut anew whenever they are fetched, never kept.

    ``split`` is TransformerLens' own, which makes new layers every time; the pieces' order is that of its result.
    """
    away = [t for t in state_of(part) if is_absent(t)]
    cut: dict[tuple[int, str], Tensor] = {}

    def fetch(index: int, name: str, dtype: torch.dtype) -> Tensor:
        if (index, name) not in cut:
            with upcast(away, dtype), undrawn():
                parts = [dict(one.named_parameters()) for one in split(part)]
                cut.update(
                    {
                        (i, n): p.data.clone() if away else p.data
                        for i, one in enumerate(parts)
                        for n, p in one.items()
                    }
                )
        return cut.pop((index, name))

    for index, piece in enumerate(pieces):
        for name, parameter in list(piece.named_parameters()):
            owner, _, last = name.rpartition(".")
            stand_in = absent(parameter, partial(fetch, index, name, parameter.dtype))
            setattr(piece.get_submodule(owner), last, stand_in)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers as they lie there, packed or not, by name."""
    for prefix, module in _modules(model):
        for name, tensor in _own(module):
            yield prefix + name, tensor


def present(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are numbers on a device, each once, by name."""
    seen = set()
    for prefix, module in _modules(model):
        for name, parameter in [] if _unpacking(module) else module.named_parameters(recurse=False):
            if parameter.device.type != "meta" and id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight, each once, in the order of their names and as numbers: unpacked or fetched, one at a time."""
    memo = sharing(model)
    found: dict[str, Tensor] = {}
    for prefix, module in _modules(model):
        owned = (
            memo[id(module)].named_parameters()
            if id(module) in memo
            else module.named_parameters(recurse=False)
        )
        found |= {prefix + name: memo.get(id(p), p) for name, p in owned}
    distinct = {id(tensor): name for name, tensor in reversed(found.items())}
    for name in sorted(distinct.values()):
        yield name, fetched(found[name])


def unreadable(model: nn.Module) -> str | None:
    """In words, the first weight that is packed or elsewhere in a way that is not known here."""
    for prefix, module in _modules(model):
        for name, tensor in [] if _unpacking(module) else _own(module):
            if tensor.device.type == "meta" and _offload_hook(module) is None:
                return f"{prefix}{name} on no device"
            if isinstance(tensor, nn.Parameter) and (
                not tensor.is_floating_point() or tensor.element_size() < 2
            ):
                return f"{prefix}{name} packed as {tensor.dtype}"
    return None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with the prefix of its weights' names."""
    return ((f"{name}." if name else "", module) for name, module in model.named_modules())


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _stand_in(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    hook = _offload_hook(module)
    if tensor.device.type == "meta" and hook is not None:
        return absent(
            tensor, lambda: hook.weights_map[name].to(tensor.dtype), hook.execution_device
        )
    shared = _without_inference(tensor.detach())
    return nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared


def _without_inference(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor that derivatives can pass, where they were made inside ``torch.inference_mode``."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next(
        (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1),
        torch.float32,
    )


# Offloaded by accelerate


def _offload_hook(module: nn.Module) -> Any:
    """The hook of accelerate that brings this module's weights from the host or the disk, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one
    return None


def _without_effect() -> Any:
    from accelerate.hooks import ModelHook

    return ModelHook()


# Packed in 4 or 8 bits


def _plain_linear(module: nn.Module, fetch: Callable[[], Tensor], dtype: torch.dtype) -> nn.Module:
    """The layer that ``module`` was before its weight was packed, its bias shared and its weight absent."""
    from transformers.pytorch_utils import Conv1D

    transposed = getattr(module, "source_cls", None) is Conv1D
    layer: Any = module
    rows, columns, bias = layer.out_features, layer.in_features, layer.bias
    with torch.device("meta"):
        linear: Any = (
            Conv1D(rows, columns) if transposed else nn.Linear(columns, rows, bias=bias is not None)
        )
    device = next(
        (t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu")
    )
    like = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
    linear.weight = absent(
        like, lambda: fetch().T if transposed else fetch(), shape=linear.weight.shape
    )
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()


def _unpacking(module: nn.Module) -> Callable[[], Tensor] | None:
    """How the dense weight [out, in] of a linear layer comes out of its packed form; ``None`` if it has no packed weight."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return None
    layer: Any = module
    weight = layer._parameters.get(
        "weight"
    )  # an adapter around a packed layer shows that layer's as its own
    if weight is None:
        return None
    if type(weight).__name__ == "Params4bit":
        return lambda: _four_bit(layer.weight.data, layer.weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        return lambda: _eight_bit(module)
    if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
        return lambda: layer.weight.dequantize()
    if weight.is_floating_point() and weight.element_size() == 1:
        return lambda: _scaled_float8(module)
    return None


def _four_bit(data: Tensor, state: Any) -> Tensor:
    """Dense weight of a bitsandbytes 4-bit layer, in the dtype it was packed from."""
    from bitsandbytes import functional

    if getattr(
        state, "packing_format_for_cpu", False
    ):  # rearranged in place by the layer's first forward on some CPUs
        state = copy.copy(state)  # which the inverse changes
        state.original_nested, scales = False, state.absmax
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales.T.reshape(-1).float()  # which the inverse leaves as they are
    return functional.dequantize_4bit(data, state)


def _eight_bit(module: Any) -> Tensor:
    """Dense weight of a bitsandbytes 8-bit layer, float32."""
    from bitsandbytes import functional

    if module.weight.is_floating_point():
        return module.weight.data
    scale = (
        module.weight.SCB if module.state.SCB is None else module.state.SCB
    )  # moved by the layer's first forward
    return functional.int8_vectorwise_dequant(module.weight.data, scale)


def _scaled_float8(module: Any) -> Tensor:
    """Dense float32 weight of a float8 layer with one scale per tensor or per block."""
    weight, scale = module.weight.data.float(), module.weight_scale_inv.data.float()
    if scale.dim() == 2 and module.block_size is not None:
        rows, columns = module.block_size
        scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[
            :, : weight.shape[1]
        ]
    return weight * scale
