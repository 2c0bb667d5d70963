"""Full precision, whatever modes the caller has switched on.

A derivative taken inside ``torch.inference_mode()`` or ``no_grad`` is zero. Products under autocast
are rounded to 8 or 11 bits. Where the process allows it, as NVIDIA's containers and many training
scripts do, float32 products are rounded to 11 bits (TensorFloat32) or 8. Code that measures enters
:func:`exact_arithmetic`. Functions of tensors alone, which the caller may differentiate, enter
:func:`true_float32`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

# Settings of torch's newer interface, general ones first: an unset one has the value of the more
# general one.
_NEWER = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]
_AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "privateuseone")


# Precision is a setting of the whole process, and so is the dtype of a block that is being
# measured.
_ONE_AT_A_TIME = threading.RLock()
_THREAD = threading.local()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ONE_AT_A_TIME._at_fork_reinit)  # type: ignore[attr-defined]


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Allow derivatives and full float32 inside; restore every setting afterwards.

    Gradients are on, inference mode and autocast are off, and new tensors lie on the host by
    default. The precision of products is a setting of the whole process: other threads have it too
    meanwhile, and wait if they enter this themselves. Works as a decorator.
    """
    with torch.inference_mode(False), torch.enable_grad(), true_float32(), made_on_host():
        yield


@contextlib.contextmanager
def made_on_host() -> Iterator[None]:
    """Create tensors on the host by default inside, despite ``torch.set_default_device``.

    Random numbers that are the same on every machine come from a generator of the host.
    """
    # The context of a device costs a little at every call of torch, and is rarely needed.
    # torch.get_default_device does not know of ``with torch.device(…)`` in torch 2.6.
    if torch.empty(0).device.type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Compute float32 products and convolutions from float32 factors inside, without autocast."""
    if is_worker():  # the thread that waits for this one is inside, and holds the lock
        yield
        return
    with _ONE_AT_A_TIME:
        casting = [device for device in _AUTOCAST if _is_autocast(device)]
        saved = _take_off()
        try:
            for device in casting:
                torch.set_autocast_enabled(device, False)
            _pin()
            yield
        finally:
            _put_back(saved)
            for device in casting:
                torch.set_autocast_enabled(device, True)


def is_worker() -> bool:
    """Return whether this thread works for one that has entered :func:`true_float32` and waits."""
    return getattr(_THREAD, "is_worker", False)


def become_worker() -> None:
    """Declare that this thread works for one that has entered :func:`true_float32` and waits."""
    _THREAD.is_worker = True


def _is_autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # this torch does not know the kind of device
        return False


# torch has two interfaces for the precision: an older one of two switches, and a newer one of
# settings by backend and operation. Each writes some values of the other, and reading the older one
# fails where they disagree. So the newer settings are read and removed first, from the general to
# the particular (an unset one reads as the general one), which leaves the older switches readable.


def _has_newer_interface() -> bool:
    return hasattr(torch._C, "_set_fp32_precision_setter")


def _take_off() -> tuple[dict[tuple[str, str], str], str, bool]:
    """Return the settings of both interfaces, and remove those of the newer one."""
    newer = {}
    for place in _NEWER if _has_newer_interface() else ():
        newer[place] = torch._C._get_fp32_precision_getter(*place)
        torch._C._set_fp32_precision_setter(*place, "none")
    return newer, torch.get_float32_matmul_precision(), _convolutions_allow_tf32()


def _convolutions_allow_tf32() -> bool:
    """Return whether the older switch allows TensorFloat32 in convolutions.

    Newer versions of torch refuse to read that switch unless the newer settings agree with it. So
    these are set to tf32, and a refusal means that the switch is off. The caller restores them.
    """
    if not _has_newer_interface():
        return torch.backends.cudnn.allow_tf32
    for op in ("conv", "rnn"):
        torch._C._set_fp32_precision_setter("cuda", op, "tf32")
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return False
    finally:
        for op in ("conv", "rnn"):
            torch._C._set_fp32_precision_setter("cuda", op, "none")


def _pin() -> None:
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(False)
    for place in _NEWER if _has_newer_interface() else ():
        torch._C._set_fp32_precision_setter(*place, "ieee")


def _put_back(saved: tuple[dict[tuple[str, str], str], str, bool]) -> None:
    newer, products, convolutions = saved
    torch.set_float32_matmul_precision(products)
    torch._C._set_cudnn_allow_tf32(convolutions)
    for place, value in newer.items():
        torch._C._set_fp32_precision_setter(*place, value)
