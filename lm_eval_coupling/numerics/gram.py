"""Symmetric eigendecompositions on the host, several matrices at a time.

torch decomposes whole matrices only, one after the other, and multiplies out both halves of a Gram matrix; scipy's own
wrappers of LAPACK's `?syevr` and `?syevd` and BLAS' `?syrk` hold the interpreter lock, so that matrices wait for each other.
scipy publishes the routines themselves as part of its C interface (`scipy.linalg.cython_blas` and `cython_lapack`); called
from there, every core works on a matrix of its own. Where scipy was built with integers of 64 bits, torch does it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import threadpoolctl
import torch
from jaxtyping import Float
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

from lm_eval_coupling.numerics.cores import cores
from lm_eval_coupling.numerics.rotations import eigh_by_rotations

ROTATED = 16  # small problems for each core of the host from which on a GPU is faster
ROUGH = 1e-4  # relative, from which float32 is near enough
_DOUBLES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # NVIDIA P100, V100, A100, H100 and H200, B200
_NUMBERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_ROUTINES = {"syrk": (cython_blas, 10), "syevr": (cython_lapack, 21), "syevd": (cython_lapack, 11)}


def leading_gram_eigenvectors(
    J: Float[Tensor, "batch d_model d_model"], k: int
) -> Float[Tensor, "batch d_model rank"]:
    """Eigenvectors of the k largest eigenvalues of each JᵀJ on the CPU, largest first; NaN where LAPACK finds none."""
    if not _usable():
        return _each_by_torch(J.mT @ J)[1][..., :k]
    rows = J.new_empty(len(J), k, J.shape[-1])
    _on_every_core(_leading, list(zip(J.contiguous(), rows, strict=True)), torch.get_num_threads())
    return rows.flip(-2).mT.contiguous()


def small_eigh(
    H: Float[Tensor, "batch n n"], settled_at: float = 1e-13
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Eigenvalues and eigenvectors of small symmetric matrices, largest first, on the device of H, decomposed on the host.

    A GPU takes as long for one of 128 columns as a core of the host, and does one after the other: it rotates them all at
    once instead where they are many. NaN as above.

    Args:
        H: symmetric, in float64.
        settled_at: ‖off-diagonal part‖ / ‖H‖ at which rotations may stop; they take float32 where that is enough.

    Returns:
        In float64; vectors are columns.
    """
    if len(H) >= ROTATED * cores() and _doubles_at_full_speed(H.device):
        values, vectors = eigh_by_rotations(H.float() if settled_at >= ROUGH else H, settled_at)
        return values.double(), vectors.double()
    host = H.cpu()
    if not _usable():
        values, vectors = _each_by_torch(host)
        return values.to(H.device), vectors.to(H.device)
    rows, values = (
        host.clone(memory_format=torch.contiguous_format),
        host.new_empty(host.shape[:-1]),
    )
    # Beside a GPU the host's cores are idle, whatever number of threads torch was given.
    workers = torch.get_num_threads() if H.device.type == "cpu" else cores()
    _on_every_core(_whole, list(zip(rows, values, strict=True)), workers)
    return values.flip(-1).to(H.device), rows.flip(-2).mT.to(H.device)


def _doubles_at_full_speed(device: torch.device) -> bool:
    """Whether float64 is not a token gesture of the card's: 1/2 of float32, where others have 1/32 or 1/64."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _DOUBLES


def _on_every_core(
    work: Callable[..., None], items: list[tuple[Tensor, Tensor]], workers: int
) -> None:
    def several(part: list[tuple[Tensor, Tensor]]) -> None:
        for one in part:
            work(*one)

    if len(items) <= 1 or workers <= 1:
        with _thread_pools().limit(limits=1, user_api="blas"):
            return several(items)
    # One thread for each matrix: BLAS threads inside would spin against torch's.
    with _thread_pools().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        parts = min(len(items), 4 * workers)
        list(pool.map(several, [items[i::parts] for i in range(parts)]))
    return None


def _leading(J: Float[Tensor, "d_model d_model"], rows: Float[Tensor, "rank d_model"]) -> None:
    k, n = rows.shape
    number = _NUMBERS[J.dtype]
    buffers = {
        name: np.empty(size, np.dtype(number))
        for name, size in (("gram", n * n), ("w", n), ("work", 64 * n))
    }
    _routine("syrk", J.dtype)(  # J as it lies in memory is Jᵀ to BLAS, which goes by columns
        *(b"U", b"N", _int(n), _int(n), _real(number, 1.0), ctypes.c_void_p(J.data_ptr()), _int(n)),
        *(_real(number), _address(buffers["gram"]), _int(n)),
    )
    support, iwork = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32)
    found, info = ctypes.c_int(), ctypes.c_int()
    _routine("syevr", J.dtype)(
        *(b"V", b"I", b"U", _int(n), _address(buffers["gram"]), _int(n)),
        *(
            _real(number),
            _real(number),
            _int(n - k + 1),
            _int(n),
            _real(number),
            ctypes.byref(found),
        ),  # abstol 0: default
        *(_address(buffers["w"]), ctypes.c_void_p(rows.data_ptr()), _int(n), _address(support)),
        *(
            _address(buffers["work"]),
            _int(64 * n),
            _address(iwork),
            _int(10 * n),
            ctypes.byref(info),
        ),
    )
    if info.value or found.value != k:
        rows.fill_(torch.nan)


def _whole(rows: Float[Tensor, "n n"], values: Float[Tensor, " n"]) -> None:
    """In place: the symmetric matrix gives way to its eigenvectors, one a row."""
    n = len(values)
    size, isize, info = 1 + 6 * n + 2 * n * n, 3 + 5 * n, ctypes.c_int()
    work, iwork = np.empty(size, np.dtype(_NUMBERS[rows.dtype])), np.empty(isize, np.int32)
    _routine("syevd", rows.dtype)(
        *(
            b"V",
            b"U",
            _int(n),
            ctypes.c_void_p(rows.data_ptr()),
            _int(n),
            ctypes.c_void_p(values.data_ptr()),
        ),
        *(_address(work), _int(size), _address(iwork), _int(isize), ctypes.byref(info)),
    )
    if info.value:
        rows.fill_(torch.nan)
        values.fill_(torch.nan)


def _each_by_torch(
    gram: Float[Tensor, "batch n n"],
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Largest first; torch gives up on a whole batch at once, so that each matrix is a call of its own."""
    values, vectors = gram.new_full(gram.shape[:-1], torch.nan), torch.full_like(gram, torch.nan)
    for i, matrix in enumerate(gram):
        try:
            values[i], vectors[i] = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:
            continue
    return values.flip(-1), vectors.flip(-1)


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


def _real(number: Callable[[float], Any], value: float = 0.0) -> Any:
    return ctypes.byref(number(value))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _usable() -> bool:
    """Whether every routine takes integers of 32 bits, as those handed over here are: other builds write beyond them."""
    return all(
        _takes_plain_integers(_signature(_capsule(name, dtype)))
        for name in _ROUTINES
        for dtype in (torch.float32, torch.float64)
    )


def _takes_plain_integers(signature: bytes) -> bool:
    """Of a C signature such as ``void (char *, int *, …)``: its integers are ``int``, not ``long`` or ``int64_t``."""
    kinds = {
        part.strip() for part in signature.decode().removeprefix("void (").rstrip(")").split(",")
    }
    return "int *" in kinds and all(
        kind in ("char *", "int *") or kind.startswith("__pyx_t_") for kind in kinds
    )


def _capsule(name: str, dtype: torch.dtype) -> Any:
    module, _ = _ROUTINES[name]
    return module.__pyx_capi__[("s" if dtype == torch.float32 else "d") + name]


def _signature(capsule: Any) -> bytes:
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    return name_of(capsule)


@functools.cache
def _routine(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """A routine as a function that releases the interpreter lock; every argument is a pointer."""
    capsule, (_, arguments) = _capsule(name, dtype), _ROUTINES[name]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(
        pointer_of(capsule, _signature(capsule))
    )


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
