"""Leading eigenvectors of Gram matrices on the CPU, several matrices at a time.

torch decomposes whole matrices only, which takes half as long again as the few eigenvectors wanted here, and multiplies out
both halves of a Gram matrix; scipy's own wrappers of LAPACK's `?syevr` and BLAS' `?syrk` hold the interpreter lock, so that
matrices wait for each other. scipy publishes the routines themselves as part of its C interface (`scipy.linalg.cython_blas`
and `cython_lapack`); called from there, every core works on a matrix of its own.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import threadpoolctl
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, cython_blas, cython_lapack
from torch import Tensor

_NUMBERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def leading_gram_eigenvectors(J: Float[Tensor, "batch d_model d_model"], k: int) -> Float[Tensor, "batch d_model rank"]:
    """Eigenvectors of the k largest eigenvalues of each JᵀJ, largest first.

    Raises:
        LinAlgError: where LAPACK does not converge.
    """
    rows = J.new_empty(len(J), k, J.shape[-1])
    workers = torch.get_num_threads()
    # One thread for each matrix: BLAS threads inside would spin against torch's.
    with _thread_pools().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        list(pool.map(_decompose, J.contiguous(), rows))
    return rows.flip(-2).mT.contiguous()


def _decompose(J: Float[Tensor, "d_model d_model"], rows: Float[Tensor, "rank d_model"]) -> None:
    k, n = rows.shape
    number = _NUMBERS[J.dtype]
    buffers = {name: np.empty(size, np.dtype(number)) for name, size in (("gram", n * n), ("w", n), ("work", 64 * n))}
    _routine("syrk", J.dtype)(  # J as it lies in memory is Jᵀ to BLAS, which goes by columns
        *(b"U", b"N", _int(n), _int(n), _real(number, 1.0), ctypes.c_void_p(J.data_ptr()), _int(n)),
        *(_real(number), _address(buffers["gram"]), _int(n)),
    )
    support, iwork = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32)
    found, info = ctypes.c_int(), ctypes.c_int()
    _routine("syevr", J.dtype)(
        *(b"V", b"I", b"U", _int(n), _address(buffers["gram"]), _int(n)),
        *(_real(number), _real(number), _int(n - k + 1), _int(n), _real(number), ctypes.byref(found)),  # abstol 0: default
        *(_address(buffers["w"]), ctypes.c_void_p(rows.data_ptr()), _int(n), _address(support)),
        *(_address(buffers["work"]), _int(64 * n), _address(iwork), _int(10 * n), ctypes.byref(info)),
    )
    if info.value or found.value != k:
        raise LinAlgError(f"syevr gave {found.value} of {k} eigenvectors and info = {info.value}")


def _int(value: int):
    return ctypes.byref(ctypes.c_int(value))


def _real(number, value: float = 0.0):
    return ctypes.byref(number(value))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _routine(name: str, dtype: torch.dtype):
    """A routine as a function that releases the interpreter lock; every argument is a pointer."""
    module, arguments = {"syrk": (cython_blas, 10), "syevr": (cython_lapack, 21)}[name]
    capsule = module.__pyx_capi__[("s" if dtype == torch.float32 else "d") + name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(pointer_of(capsule, name_of(capsule)))


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
