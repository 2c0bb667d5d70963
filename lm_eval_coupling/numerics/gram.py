"""Symmetric eigendecompositions on the host, several matrices at a time.

torch decomposes whole matrices only, one after the other, and computes both halves of a Gram
matrix. scipy's wrappers of LAPACK's `?syevr` and `?syevd` and BLAS' `?syrk` hold the interpreter
lock, so that matrices wait for each other. scipy publishes the routines as part of its C interface
(`scipy.linalg.cython_blas` and `cython_lapack`). Called from there, every core works on a matrix of
its own. Where scipy was built with integers of 64 bits, torch decomposes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import cython_blas, cython_lapack
from torch import Tensor

from lm_eval_coupling.numerics.cores import usable_cores
from lm_eval_coupling.numerics.device_eigh import device_eigh, has_fast_float64
from lm_eval_coupling.numerics.workers import one_blas_thread, run_each, workers

MANY = 16  # small matrices per core of the host above which a GPU is faster
ROUGH = 1e-4  # relative accuracy for which float32 is enough
_NUMBERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_ROUTINES = {"syrk": (cython_blas, 10), "syevr": (cython_lapack, 21), "syevd": (cython_lapack, 11)}


def leading_gram_eigenvectors(
    J: Float[Tensor, "batch d_model d_model"], k: int
) -> Float[Tensor, "batch d_model rank"]:
    """Return eigenvectors of the k largest eigenvalues of each JᵀJ on the CPU, largest first.

    They are NaN where LAPACK does not converge.
    """
    if not _usable():
        return _each_by_torch(J.mT @ J)[1][..., :k]
    rows = J.new_empty(len(J), k, J.shape[-1])
    _on_every_core(_leading, list(zip(J.contiguous(), rows, strict=True)), workers())
    return rows.flip(-2).mT.contiguous()


def small_eigh(
    H: Float[Tensor, "batch n n"], settled_at: float = 1e-13
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Return eigenvalues and eigenvectors of small symmetric matrices, largest first.

    A few are decomposed on the host, whose cores are as fast as a GPU with one matrix of 128
    columns. Many are decomposed together on the GPU.

    Args:
        H: symmetric, in float64.
        settled_at: ‖off-diagonal part‖ / ‖H‖ that is small enough; float32 is used where it does.

    Returns:
        In float64, on the device of H; vectors are columns. NaN where LAPACK does not converge.
    """
    if has_fast_float64(H.device) and len(H) >= MANY * usable_cores():
        values, vectors = device_eigh(H.float() if settled_at >= ROUGH else H, settled_at)
        return values.double(), vectors.double()
    host = H.cpu()
    if not _usable():
        values, vectors = _each_by_torch(host)
        return values.to(H.device), vectors.to(H.device)
    rows = host.clone(memory_format=torch.contiguous_format)
    values = host.new_empty(host.shape[:-1])
    # Beside a GPU the cores of the host are idle, whatever number of threads torch was given.
    count = workers() if H.device.type == "cpu" else usable_cores()
    _on_every_core(_whole, list(zip(rows, values, strict=True)), count)
    return values.flip(-1).to(H.device), rows.flip(-2).mT.to(H.device)


def _on_every_core(
    work: Callable[[Tensor, Tensor], None], items: list[tuple[Tensor, Tensor]], count: int
) -> None:
    """Call ``work`` on every pair of tensors, by BLAS with one thread for each matrix."""
    with one_blas_thread():  # more threads of BLAS would spin against torch's
        run_each(lambda pair: work(*pair), items, count)


def _leading(J: Float[Tensor, "d_model d_model"], rows: Float[Tensor, "rank d_model"]) -> None:
    k, n = rows.shape
    number = _NUMBERS[J.dtype]
    sizes = {"gram": n * n, "w": n, "work": 64 * n}
    buffers = {name: np.empty(size, np.dtype(number)) for name, size in sizes.items()}
    # BLAS stores by columns: it reads J, stored by rows, as Jᵀ.
    _routine("syrk", J.dtype)(
        *(b"U", b"N", _int(n), _int(n), _real(number, 1.0), ctypes.c_void_p(J.data_ptr()), _int(n)),
        *(_real(number), _address(buffers["gram"]), _int(n)),
    )
    support, iwork = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32)
    count, info = ctypes.c_int(), ctypes.c_int()
    _routine("syevr", J.dtype)(
        *(b"V", b"I", b"U", _int(n), _address(buffers["gram"]), _int(n)),
        *(_real(number), _real(number), _int(n - k + 1), _int(n)),
        *(_real(number), ctypes.byref(count)),  # an abstol of 0 is the default
        *(_address(buffers["w"]), ctypes.c_void_p(rows.data_ptr()), _int(n), _address(support)),
        *(_address(buffers["work"]), _int(64 * n), _address(iwork), _int(10 * n)),
        ctypes.byref(info),
    )
    if info.value or count.value != k:
        rows.fill_(torch.nan)


def _whole(rows: Float[Tensor, "n n"], values: Float[Tensor, " n"]) -> None:
    """Replace a symmetric matrix by its eigenvectors, one per row."""
    n = len(values)
    size, isize, info = 1 + 6 * n + 2 * n * n, 3 + 5 * n, ctypes.c_int()
    work, iwork = np.empty(size, np.dtype(_NUMBERS[rows.dtype])), np.empty(isize, np.int32)
    _routine("syevd", rows.dtype)(
        *(b"V", b"U", _int(n), ctypes.c_void_p(rows.data_ptr()), _int(n)),
        ctypes.c_void_p(values.data_ptr()),
        *(_address(work), _int(size), _address(iwork), _int(isize), ctypes.byref(info)),
    )
    if info.value:
        rows.fill_(torch.nan)
        values.fill_(torch.nan)


def _each_by_torch(
    gram: Float[Tensor, "batch n n"],
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Decompose by torch, largest first: one call per matrix, since a failure ends the call."""
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
    """Return whether every routine takes integers of 32 bits; others would write beyond ours."""
    return all(
        _takes_plain_integers(_signature(_capsule(name, dtype)))
        for name in _ROUTINES
        for dtype in (torch.float32, torch.float64)
    )


def _takes_plain_integers(signature: bytes) -> bool:
    """Return whether all integers of a C signature ``void (char *, int *, …)`` are ``int``."""
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
    """Return a routine as a function that releases the interpreter lock and takes pointers."""
    capsule, (_, arguments) = _capsule(name, dtype), _ROUTINES[name]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(
        pointer_of(capsule, _signature(capsule))
    )
