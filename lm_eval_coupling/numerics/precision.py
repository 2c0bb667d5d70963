"""Arithmetic as it is written down, whatever the caller has switched on around it.

A derivative taken inside ``torch.inference_mode()`` or ``no_grad`` is zero, a product under autocast is rounded to 8 or 11
bits, and float32 products are rounded to 11 bits (TensorFloat32) or 8 where the process allows it: NVIDIA's containers and
many training scripts do. Whatever measures enters :func:`exact_arithmetic`; functions of tensors alone, which their caller
may want to differentiate, enter :func:`true_float32`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

# Settings of torch's newer way, general ones first: what is not set takes the value of the more general one.
_NEWER = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]
_AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "privateuseone")


# What is set here is the whole process's, and a block's weights are held in another dtype while it is measured.
_ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ONE_AT_A_TIME._at_fork_reinit)  # type: ignore[attr-defined]


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, derivatives can be taken, and float32 is float32; afterwards all is as before, also after an exception.

    Gradients are on (leave them off with ``torch.no_grad`` where none is wanted), inference mode and autocast are off, new
    tensors lie on the host unless they say where. Works as a decorator too. The precision of products is a setting of the
    whole process: other threads have it as well meanwhile, and wait where they enter this.
    """
    with torch.inference_mode(False), torch.enable_grad(), true_float32(), made_on_host():
        yield


@contextlib.contextmanager
def made_on_host() -> Iterator[None]:
    """Inside, a tensor that does not say where it is to lie lies on the host, whatever ``torch.set_default_device`` says.

    A generator of random numbers that are the same on every machine is one of the host, and draws nothing elsewhere.
    """
    if (
        torch.get_default_device().type == "cpu"
    ):  # the usual one; a device's context costs a little at every call of torch
        yield
        return
    with torch.device("cpu"):
        yield


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Inside, float32 products and convolutions have float32 factors on every device, and nothing is autocast."""
    with _ONE_AT_A_TIME:
        casting = [device for device in _AUTOCAST if _is_autocast(device)]
        saved = _taken_off()
        try:
            for device in casting:
                torch.set_autocast_enabled(device, False)
            _pin()
            yield
        finally:
            _put_back(saved)
            for device in casting:
                torch.set_autocast_enabled(device, True)


def _is_autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a kind of device that this torch does not know
        return False


# torch has two ways to set the precision: an older one of two switches, and one of settings by backend and operation. Each
# writes some of the other's; reading the older one fails where they disagree. So the newer settings are read and taken off
# from the general to the particular (a reader gets the general value where there is none), which leaves the older switches
# alone and readable.


def _has_newer_way() -> bool:
    return hasattr(torch._C, "_set_fp32_precision_setter")


def _taken_off() -> tuple[dict[tuple[str, str], str], str, bool]:
    """What is set in both ways; nothing of the newer one stays set."""
    newer = {}
    for place in _NEWER if _has_newer_way() else ():
        newer[place] = torch._C._get_fp32_precision_getter(*place)
        torch._C._set_fp32_precision_setter(*place, "none")
    return newer, torch.get_float32_matmul_precision(), _convolutions_round()


def _convolutions_round() -> bool:
    """The older switch of convolutions, which can only be read while the newer setting agrees with it."""
    if not _has_newer_way():
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
    for place in _NEWER if _has_newer_way() else ():
        torch._C._set_fp32_precision_setter(*place, "ieee")


def _put_back(saved: tuple[dict[tuple[str, str], str], str, bool]) -> None:
    newer, products, convolutions = saved
    torch.set_float32_matmul_precision(products)
    torch._C._set_cudnn_allow_tf32(convolutions)
    for place, value in newer.items():
        torch._C._set_fp32_precision_setter(*place, value)
