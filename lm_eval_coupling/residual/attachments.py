"""Everything that changes a forward pass and is no weight: hooks, replaced methods, attributes.

A model is compared with a fresh one of its class and configuration, made without memory. Only the
differences count, so that an ordinary model has none, whatever version of transformers loads it.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.residual.function_variables import is_library_module, is_of_framework
from lm_eval_coupling.residual.object_digest import (
    MODULE_ATTRIBUTES,
    Digester,
    is_among,
    is_of_python,
    is_of_user,
)
from lm_eval_coupling.residual.patched_functions import patched_functions
from lm_eval_coupling.residual.rotary import edited_tables, recomputed_names
from lm_eval_coupling.residual.scored import looked_through
from lm_eval_coupling.residual.weights import is_packed

# Attributes that evaluating or loading may set.
_OF_RUNS = {"training", "_is_hf_initialized", "gradient_checkpointing"}
# What accelerate and torch.compile put around a forward method; the function is the same.
_AROUND_FORWARD = {"_hf_hook", "_old_forward", "_original_forward", "forward"}
_OWN = "forward class"  # of a module that the model's own class does not make
_OWN_CLASS = "class "


class Attachments(dict[str, str]):
    """Digests by a description of the place: ``module model.layers.1, forward hook steer, v``.

    Attributes:
        unreadable: a sentence on each value whose state cannot be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: list[str] = []


@torch.no_grad()
def attachments_of(model: nn.Module, ignored: Collection[str] = ()) -> Attachments:
    """Digest what is attached to a model, apart from its parameters and persistent buffers.

    Args:
        model: any model, with wrappers around it or not.
        ignored: places that are left out, such as those that a pass itself changes.

    Returns:
        The digests; none for a model that is as its class and configuration make it.
    """
    base = looked_through(model)
    named, fresh = _named_modules(model, base), _fresh(base)
    digester = Digester({id(module): name for name, module in named})
    attachments = Attachments()

    def add(place: str, value: Any) -> None:
        if not is_among(place, ignored):
            attachments[place] = digester.digest(value)
            _tell(place)

    def add_callable(place: str, function: Any) -> None:
        for name, digits in digester.parts(function):
            if not is_among(part := f"{place}, {name}", ignored):
                attachments[part] = digits
                _tell(place)

    def _tell(place: str) -> None:
        attachments.unreadable += [f"{place} holds a {kind}" for kind in digester.unreadable]
        digester.unreadable.clear()

    # Functions first: their code names the notes on the model that they read.
    for place, hook in _hooks(named):
        add_callable(place, hook)
    for name, module in named:
        if not is_packed(module) and (forward := replaced_forward(module)) is not None:
            add_callable(f"module {name or 'itself'}, forward method", forward)
    for place, function in (*registered_functions(base), *patched_functions(named)):
        add_callable(place, function)
    for name, module in named:
        place, reference, kind = f"module {name or 'itself'}", fresh.get(name), type(module)
        if reference is not None and type(reference) is not kind:
            reference = None
        if is_packed(module):  # counts as the weight that it stands for
            continue
        if reference is None:
            add(f"{place}, {'class' if is_library_module(kind.__module__) else _OWN}", kind)
        elif not is_library_module(kind.__module__):
            # Not by `add`: what branches for training read, such as random numbers, is no matter.
            own = f"{_OWN_CLASS}{kind.__module__}.{kind.__qualname__}"
            if own not in attachments:
                attachments[own] = Digester(digester.names).digest(kind)
        if name.startswith("around ") and is_library_module(kind.__module__):
            continue  # its choices, such as the active adapter, are in the layers as well
        for attribute, value in _attributes(module, reference, digester.names_read):
            add(f"{place}, {attribute}", value)
        for buffer, tensor in (*_computed_buffers(module, base), *edited_tables(module)):
            add(f"{place}, buffer {buffer}", tensor)
    return attachments


def _named_modules(model: nn.Module, base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of the inner model by name, then those of wrappers around it."""
    inside = {id(module) for module in base.modules()}
    around = [(f"around {n}", m) for n, m in model.named_modules() if id(m) not in inside]
    return [*base.named_modules(), *around]


def has_own_functions(places: Iterable[str]) -> bool:
    """Return whether hooks or other functions of the user are among the places of attachments."""
    return any("forward" in place or "registered" in place for place in places)


def has_own_classes(places: Iterable[str]) -> bool:
    """Return whether modules are of a class that no library defines, such as remote code."""
    return any(place.startswith(_OWN_CLASS) for place in places)


def own_hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's forward hooks, with their kinds, that no library has put there."""
    for kind, hooks in (
        ("forward hook", module._forward_hooks),
        ("forward pre-hook", module._forward_pre_hooks),
    ):
        for hook in hooks.values():
            if not is_of_framework(hook):
                yield kind, hook


def _hooks(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    from torch.nn.modules import module as everywhere

    for name, module in named:
        for number, (kind, hook) in enumerate(own_hooks(module)):
            label = getattr(hook, "__name__", type(hook).__name__)
            yield f"module {name or 'itself'}, {kind} {label} {number}", hook
    for kind, hooks in (
        ("forward hook", everywhere._global_forward_hooks),
        ("forward pre-hook", everywhere._global_forward_pre_hooks),
    ):
        for number, hook in enumerate(hooks.values()):
            yield f"every module, {kind} {number}", hook


def replaced_forward(module: nn.Module) -> Any:
    """Return a forward method that was put on the object by hand, or None.

    What accelerate and torch.compile put there runs the module's own method, or a replaced one.
    """
    forward = uncompiled(vars(module).get("forward"))
    if getattr(getattr(forward, "func", None), "__name__", "") == "new_forward":
        forward = uncompiled(vars(module).get("_old_forward"))  # inside accelerate's hook
    if "_original_forward" in vars(module):  # accelerate's mixed precision
        forward = vars(module)["_original_forward"]
    if forward is None:
        return None
    function = getattr(forward, "__func__", None)
    is_own = getattr(forward, "__self__", None) is module and function is type(module).forward
    return None if is_own else forward


def uncompiled(function: Any) -> Any:
    """Return the function that torch.compile has wrapped, or the function itself."""
    while (inner := getattr(function, "_torchdynamo_orig_callable", None)) is not None:
        function = inner
    return function


def registered_functions(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attention and mask functions of a model that transformers did not define."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(getattr(base, "config", None), "_attn_implementation", None)
    for kind, table in (
        ("attention", ALL_ATTENTION_FUNCTIONS),
        ("attention mask", ALL_MASK_ATTENTION_FUNCTIONS),
    ):
        function = table[name] if isinstance(name, str) and name in table else None
        if function is not None and not is_of_framework(function):
            yield f"registered {kind} function {name}", function


# By model: its class and configuration when it was last looked at, and the modules they make.
_FRESH: MutableMapping[nn.Module, tuple[type, Any, dict[str, nn.Module]]] = WeakKeyDictionary()


def _fresh(base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a new model of the same class and configuration, without memory."""
    kind: Any = type(base)
    config = getattr(base, "config", None)
    if base in _FRESH and _FRESH[base][0] is kind and _is_same(_FRESH[base][1], config):
        return _FRESH[base][2]
    try:
        before = copy.deepcopy(config)
        with seeded(0), torch.device("meta"):
            modules = dict(kind(copy.deepcopy(config)).named_modules())
    except Exception:  # classes of remote code that cannot be made without memory
        return {}
    _FRESH[base] = kind, before, modules
    return modules


def _is_same(config: Any, other: Any) -> bool:
    """Return whether two configurations hold the same; False where values cannot be compared."""
    try:
        return type(config) is type(other) and vars(config) == vars(other)
    except Exception:  # values without a truth, such as arrays
        return False


def _attributes(
    module: nn.Module, reference: nn.Module | None, names_read: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that may change a pass and differ from the fresh module's."""
    skipped = MODULE_ATTRIBUTES | _OF_RUNS | _AROUND_FORWARD | recomputed_names(module)
    library = type(module).__module__.startswith("peft.")
    # Loading writes notes to a model: its class would define in __init__ what its passes use.
    is_noted = reference is not None and hasattr(module, "from_pretrained")
    for name, value in vars(module).items():
        is_new = reference is None or name not in vars(reference)
        if name in skipped or not (_counts(value) or (not is_new and _is_function(value))):
            continue
        if is_noted and name not in names_read:
            if name.startswith("_") or (is_new and _is_plain(value)):
                continue
        if library and not _is_plain(value):
            continue
        if not is_new:
            other = vars(reference)[name]
            if value is other or (_is_plain(value) and _is_plain(other) and value == other):
                continue
            if Digester({}).digest(value) == Digester({}).digest(other):
                continue
        yield name, value


def _counts(value: Any) -> bool:
    """Return whether an attribute can change a pass.

    Tensors, arrays, Python's own values, and the user's functions and objects can, and so can
    containers of these.
    """
    if isinstance(value, Mapping):
        return any(map(_counts, value.values()))
    if isinstance(value, Set | list | tuple | deque):
        return any(map(_counts, value))
    if _is_function(value):
        return not is_of_framework(value)
    if isinstance(value, Tensor) or hasattr(value, "__array__") or is_of_python(value):
        return True
    return is_of_user(value) and not hasattr(value, "to_dict")


def _is_function(value: Any) -> bool:
    return isinstance(
        value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | functools.partial
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _computed_buffers(module: nn.Module, base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that no checkpoint holds and that the configuration does not give."""
    skipped = recomputed_names(module)
    buffers = {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
        and name not in skipped
        and buffer.device.type != "meta"  # no numbers: the model was moved there
    }
    if not buffers:
        return
    again = _initialized_again(module, buffers, base)
    for name, buffer in buffers.items():
        made = again.get(name)
        if made is None or made.shape != buffer.shape or not _agree(buffer, made):
            yield name, buffer


def _agree(buffer: Tensor, made: Tensor) -> bool:
    if not buffer.is_floating_point():
        return torch.equal(buffer.cpu(), made)
    return torch.allclose(buffer.cpu().double(), made.double(), rtol=1e-5, atol=1e-12)


def _initialized_again(
    module: nn.Module, buffers: dict[str, Tensor], base: nn.Module
) -> dict[str, Tensor]:
    """Return what the model's own initialization puts into these buffers; less if it fails.

    The powers in a rotary table differ in their last bits between processors: compared with what
    this machine computes, a table is the same everywhere.
    """
    bare = object.__new__(type(module))
    bare.__dict__.update(vars(module))
    empty = {
        name: torch.full_like(b, 1 if b.dtype == torch.bool else 77, device="cpu")
        for name, b in buffers.items()
    }
    vars(bare)["_buffers"] = {name: b.clone() for name, b in empty.items()}
    vars(bare)["_modules"] = {}
    vars(bare)["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), False)
        for name, p in module._parameters.items()
    }
    initialize: Any = getattr(base, "_init_weights", None)
    if initialize is None:
        return {}
    try:
        with seeded(0):
            initialize(bare)
    except Exception:  # it expects parameters or children of the module
        return {}
    made = {name: b for name, b in bare._buffers.items() if b is not None and name in empty}
    return {
        name: b
        for name, b in made.items()
        if b.dtype == torch.bool or not torch.equal(b, empty[name])
    }
