"""Weights of the measuring module tree: shared with the model's, or *absent*.

Weights packed in 4 or 8 bits, or offloaded to the host or the disk, have a stand-in of the right
shape, dtype and device that takes no memory and can be fetched. :func:`upcast` fetches one block's
weights while that block runs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.numerics.randomness import undrawn


def state_of(module: nn.Module) -> list[Tensor]:
    """List parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def upcast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Hold the floating-point ``tensors`` in ``dtype``, then put back what was there."""
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
    """Return whether ``tensor`` stands in for a weight that must be fetched."""
    return hasattr(tensor, "fetch")


def fetched(tensor: Tensor) -> Tensor:
    """Return the numbers of a weight, absent or not."""
    fetch: Any = getattr(tensor, "fetch", None)
    return tensor.data if fetch is None else fetch().to(tensor.device)


def absent(
    template: Tensor,
    fetch: Callable[[], Tensor],
    device: Any = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Make a stand-in for ``template``, on its device unless another is given."""
    device = template.device if device is None else torch.device(device)
    shape = template.shape if shape is None else shape
    stand_in: Any = torch.zeros((), dtype=template.dtype, device=device).expand(shape)
    if isinstance(template, nn.Parameter):
        stand_in = nn.Parameter(stand_in, requires_grad=False)
    stand_in.fetch = fetch
    return stand_in


def sharing(model: nn.Module) -> dict[int, Any]:
    """Return the memo with which ``copy.deepcopy`` shares the weights of ``model``.

    In it packed layers are plain ones, and accelerate's hooks have no effect.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            from accelerate.hooks import ModelHook

            memo[id(hook)] = ModelHook()  # without effect
        if (fetch := _unpacking(module)) is not None:
            memo[id(module)] = _plain_linear(module, fetch, float_dtype(model))
            continue
        for name, tensor in _own(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _stand_in(module, name, tensor)
        for value in vars(module).values():
            if isinstance(value, Tensor):  # pruning and the older weight norm make it anew
                memo[id(value)] = value.detach()
    for module in model.modules():
        for name, source in getattr(module, "all_tied_weights_keys", {}).items():
            tied = module.get_parameter(name)
            if tied.device.type == "meta":  # offloading unties them
                memo[id(tied)] = memo[id(module.get_parameter(source))]
    return memo


def without_hooks(twin: nn.Module) -> nn.Module:
    """Take off what accelerate has put around the forward methods of a copied model."""
    if any(hasattr(module, "_hf_hook") for module in twin.modules()):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(twin)
    return twin


def split_again(
    part: nn.Module, split: Callable[[nn.Module], Sequence[nn.Module]], pieces: Sequence[nn.Module]
) -> None:
    """Make ``pieces``, cut by ``split`` out of ``part``, absent: cut anew for every fetch.

    ``split`` is TransformerLens' own and makes new layers every time, in the order of the pieces.
    """
    away = [t for t in state_of(part) if is_absent(t)]
    cut: dict[tuple[int, str], Tensor] = {}

    def fetch(index: int, name: str, dtype: torch.dtype) -> Tensor:
        if (index, name) not in cut:
            with upcast(away, dtype), undrawn():
                for i, piece in enumerate(split(part)):
                    for name_, p in piece.named_parameters():
                        cut[i, name_] = p.data.clone() if away else p.data
        return cut.pop((index, name))

    for index, piece in enumerate(pieces):
        for name, parameter in list(piece.named_parameters()):
            owner, _, last = name.rpartition(".")
            stand_in = absent(parameter, partial(fetch, index, name, parameter.dtype))
            setattr(piece.get_submodule(owner), last, stand_in)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, packed or not."""
    for prefix, module in _modules(model):
        for name, tensor in _own(module):
            yield prefix + name, tensor


def present(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are numbers on a device, each once, by name."""
    seen = set()
    for prefix, module in _modules(model):
        for name, parameter in [] if _unpacking(module) else module.named_parameters(recurse=False):
            if parameter.device.type != "meta" and id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight once as numbers, unpacked or fetched, in the order of the names."""
    memo = sharing(model)
    weights: dict[str, Tensor] = {}
    for prefix, module in _modules(model):
        owned = (
            memo[id(module)].named_parameters()
            if id(module) in memo
            else module.named_parameters(recurse=False)
        )
        weights |= {prefix + name: memo.get(id(p), p) for name, p in owned}
    distinct = {id(tensor): name for name, tensor in reversed(weights.items())}
    for name in sorted(distinct.values()):
        yield name, fetched(weights[name])


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a checkpoint holds, by name: packed weights, masks, routing biases."""
    for prefix, module in _modules(model):
        if is_packed(module):  # its weight is unpacked
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                hook = _offload_hook(module)
                is_away = buffer.device.type == "meta" and hook is not None
                yield prefix + name, hook.weights_map[name] if is_away else buffer


def is_packed(module: nn.Module) -> bool:
    """Return whether a layer's weight is packed in a way that can be unpacked."""
    return _unpacking(module) is not None


def unreadable(model: nn.Module) -> str | None:
    """Describe the first weight that cannot be read, or forward method that cannot be copied."""
    for prefix, module in _modules(model):
        if isinstance(getattr(module, "weight", None), MethodType):  # torch.ao.quantization
            return f"{prefix}weight packed by {type(module).__module__}"
        if has_replaced_forward(module):
            return f"a forward method replaced on {prefix.removesuffix('.')}, whose weight is away"
        for name, tensor in [] if _unpacking(module) else _own(module):
            if tensor.device.type == "meta" and _offload_hook(module) is None:
                return f"{prefix}{name} on no device"
            if isinstance(tensor, nn.Parameter) and (
                not tensor.is_floating_point() or tensor.element_size() < 2
            ):
                return f"{prefix}{name} packed as {tensor.dtype}"
    return None


def has_replaced_forward(module: nn.Module) -> bool:
    """Return whether somebody replaced the forward method of a packed or offloaded layer.

    The measuring twin has a plain layer in its place, which would run without the replacement.
    Other layers keep their replaced forward in the twin: for them the answer is False.
    """
    forward = vars(module).get("forward")
    hook = getattr(module, "_hf_hook", None)
    if is_packed(module) and hook is None:
        own = getattr(forward, "__func__", None) is type(module).forward
        return forward is not None and not own
    if hook is None or forward is None:
        return False
    # accelerate wraps a layer's own forward by a partial of `new_forward`. A forward that was
    # replaced before accelerate came is kept in an offloaded layer's twin, but not a packed one's.
    wrapper = getattr(forward, "func", forward)
    original = vars(module).get("_old_forward")
    was_replaced = getattr(original, "__func__", None) is not type(module).forward
    is_accelerates = getattr(wrapper, "__name__", "") == "new_forward"
    return not is_accelerates or (is_packed(module) and was_replaced)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with the prefix of its weights' names."""
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
    """Return a tensor over the same memory that autograd follows, if inference mode made it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        usual = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return usual.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first weight in floating point, 8-bit floats left out."""
    return next(
        (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1),
        torch.float32,
    )


# Offloaded by accelerate


def _offload_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that brings this module's weights from elsewhere, or None."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            return part
    return None


# Packed in 4 or 8 bits


def _plain_linear(module: nn.Module, fetch: Callable[[], Tensor], dtype: torch.dtype) -> nn.Module:
    """Make the layer that ``module`` was before packing: its bias shared, its weight absent."""
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
    template = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
    linear.weight = absent(
        template, lambda: fetch().T if transposed else fetch(), shape=linear.weight.shape
    )
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()


def _unpacking(module: nn.Module) -> Callable[[], Tensor] | None:
    """Return what unpacks a linear layer's weight to [out, in]; None if it is not packed."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return None
    layer: Any = module
    # Not ``layer.weight``: an adapter around a packed layer shows that layer's as its own.
    weight = layer._parameters.get("weight")
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
    """Unpack the weight of a bitsandbytes 4-bit layer, in the dtype it was packed from."""
    from bitsandbytes import functional

    # On some CPUs the layer's first pass has rearranged it in place.
    if getattr(state, "packing_format_for_cpu", False):
        state = copy.copy(state)  # the inverse changes it
        state.original_nested, scales = False, state.absmax
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales.T.reshape(-1).float()  # the inverse leaves them rearranged
    return functional.dequantize_4bit(data, state)


def _eight_bit(module: Any) -> Tensor:
    """Unpack the weight of a bitsandbytes 8-bit layer to float32."""
    from bitsandbytes import functional

    if module.weight.is_floating_point():
        return module.weight.data
    # The layer's first pass moves the scales into its state.
    scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return functional.int8_vectorwise_dequant(module.weight.data, scale)


def _scaled_float8(module: Any) -> Tensor:
    """Unpack the weight of a float8 layer, with one scale per tensor or per block, to float32."""
    weight, scale = module.weight.data.float(), module.weight_scale_inv.data.float()
    if scale.dim() == 2 and module.block_size is not None:
        rows, columns = module.block_size
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight * scale
