"""The second module tree over a model's weights: it is measured, and may be changed for that."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.residual import rotary
from lm_eval_coupling.residual.arguments import tensors_in
from lm_eval_coupling.residual.attachments import own_hooks, registered_functions, uncompiled
from lm_eval_coupling.residual.object_digest import MODULE_ATTRIBUTES
from lm_eval_coupling.residual.rebinding import Rebinding
from lm_eval_coupling.residual.weights import is_absent, sharing, state_of, without_hooks

_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def twin_of(model: nn.Module) -> nn.Module:
    """Make a second module tree over the same storage, in evaluation mode and without gradients.

    Forward hooks, replaced forward methods, adapters, parametrizations and pruning are part of it.
    Backward hooks are not: they change no output. ``model`` stays untouched.

    Returns:
        Modules of its own over the same parameters and buffers; attention is as in the model.
    """
    memo = sharing(model)
    _share_what_cannot_be_copied(model, memo)
    twin = copy.deepcopy(model, memo).eval()
    twins = {id(module): memo[id(module)] for module in model.modules()}
    rebind = Rebinding(twins)
    for module in model.modules():
        _attach(twins[id(module)], module, rebind)
    twin = without_hooks(twin)
    for part in twin.modules():
        if "_original_forward" in vars(part):  # accelerate's mixed precision: autocast around it
            vars(part).pop("forward", None)
        for name in part._non_persistent_buffers_set:
            buffer = part._buffers.get(name)
            if buffer is not None and buffer.is_floating_point() and not is_absent(buffer):
                part._buffers[name] = buffer.clone()  # passes of some models write to it
    rotary.reset(twin)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def _share_what_cannot_be_copied(model: nn.Module, memo: dict[int, Any]) -> None:
    """Enter functions, hooks, tensors with a history and uncopyable objects into the memo."""
    tried: set[int] = set()

    def share(value: Any) -> None:
        if value is None or isinstance(value, bool | int | float | str):
            return
        if isinstance(value, Tensor):
            memo.setdefault(id(value), value.detach())
        elif isinstance(value, list | tuple | set):
            for item in value:
                share(item)
        elif isinstance(value, dict):
            for item in value.values():
                share(item)
        elif isinstance(value, nn.Module) or id(value) in memo or id(value) in tried:
            return
        elif callable(value):
            memo[id(value)] = value
        else:
            tried.add(id(value))
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # locks, open files, sessions of other runtimes
                memo[id(value)] = value

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES:
                share(value)
            elif name.endswith("hooks") and isinstance(value, dict):
                memo.update({id(hook): hook for hook in value.values()})


def _attach(twin: Any, module: nn.Module, rebind: Rebinding) -> None:
    """Give one module of the twin the hooks and functions of the model's, for the twin's tree."""
    for name in _BACKWARD:
        setattr(twin, name, OrderedDict())
    for name in _FLAGS:
        setattr(twin, name, copy.copy(getattr(module, name)))
    own = [id(hook) for _, hook in own_hooks(module)]
    for name in _FORWARD:
        hooks = OrderedDict()
        for key, hook in getattr(module, name).items():
            other = rebind(hook)
            hooks[key] = _Tolerant(other) if id(hook) in own else other
        setattr(twin, name, hooks)
    for name, value in vars(module).items():
        if name not in MODULE_ATTRIBUTES and callable(value) and not isinstance(value, nn.Module):
            if name in vars(twin) and vars(twin)[name] is value:
                vars(twin)[name] = rebind(uncompiled(value))
    forward = vars(twin).get("forward")
    if getattr(forward, "__self__", None) is twin:
        if getattr(forward, "__func__", None) is type(twin).forward:
            del vars(twin)["forward"]


class _Tolerant:
    """A user's hook that may take its tensors to NumPy, which refuses tensors with a gradient.

    A hook that only looks is called with plain numbers instead. One that returns something else
    then, or writes to them, computes where autograd does not see it: its error is passed on.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = self.__wrapped__ = hook  # by which users' hooks are known

    def __call__(self, module: nn.Module, *call: Any) -> Any:
        try:
            return self.hook(module, *call)
        except Exception as error:
            if not self._only_looks(module, call):
                raise error
            return None

    def _only_looks(self, module: nn.Module, call: tuple[Any, ...]) -> bool:
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                plain = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), call)
                versions = [tensor._version for tensor in tensors_in(plain)]
                result = self.hook(module, *plain)
                after = [tensor._version for tensor in tensors_in(plain)]
        except Exception:
            return False
        return result is None and versions == after


def computes_eagerly(twin: nn.Module) -> None:
    """Switch attention and experts to steps that can be watched and differentiated.

    An attention function that the user registered is kept: there is no other form of it.
    """
    if not any(True for _ in registered_functions(twin)):
        twin.set_attn_implementation("eager")
    module: Any
    for module in twin.modules():
        if getattr(module, "fused_attn", None) is True:  # timm's
            module.fused_attn = False
    if hasattr(twin, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            twin.set_experts_implementation("eager")


def runs_as_it_stands(model: nn.Module) -> bool:
    """Return whether every weight is present, and all are on one device."""
    weights = state_of(model)
    return not any(map(is_absent, weights)) and len({t.device for t in weights}) == 1


def block_lists(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the lists of modules that may be the blocks, those with most weights first.

    Lists inside other lists and those without weights are left out. If some have the number of
    blocks that the configuration gives, the others are left out as well. The caller runs the model
    to learn which list holds the blocks.
    """
    outer: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(
            name.startswith(f"{other}.") for other in outer
        ):
            outer[name] = module
    lists = [list(module) for module in outer.values()]
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [blocks for blocks in lists if len(blocks) == expected] or lists
    sizes = [sum(p.numel() for block in blocks for p in block.parameters()) for blocks in lists]
    order = sorted(range(len(lists)), key=lambda i: -sizes[i])
    yield from (lists[i] for i in order if sizes[i])
