"""Leading eigenvectors of symmetric matrices on the CPU, several matrices at a time.

torch decomposes whole matrices only, which takes half as long again as the few eigenvectors wanted here; scipy's own wrapper
of LAPACK's `?syevr` holds the interpreter lock, so that matrices wait for each other. scipy publishes the routine itself as
part of its C interface (`scipy.linalg.cython_lapack`); called from there, every core decomposes a matrix of its own.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import threadpoolctl
import torch
from jaxtyping import Float
from scipy.linalg import LinAlgError, cython_lapack
from torch import Tensor

_ROUTINES = {torch.float32: "ssyevr", torch.float64: "dsyevr"}
_NUMBERS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def leading_eigenvectors(G: Float[Tensor, "batch d_model d_model"], k: int) -> Float[Tensor, "batch d_model rank"]:
    """Eigenvectors of the k largest eigenvalues of each symmetric matrix, largest first. G is overwritten.

    Raises:
        LinAlgError: where LAPACK does not converge.
    """
    rows = G.new_empty(len(G), k, G.shape[-1])
    workers = torch.get_num_threads()
    # One thread for each matrix: BLAS threads inside would spin against torch's.
    with _thread_pools().limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        list(pool.map(_decompose, G.contiguous(), rows))
    return rows.flip(-2).mT.contiguous()


def _decompose(matrix: Float[Tensor, "d_model d_model"], rows: Float[Tensor, "rank d_model"]) -> None:
    k, n = rows.shape
    number = _NUMBERS[matrix.dtype]
    buffers = {name: np.empty(size, np.dtype(number)) for name, size in (("w", n), ("work", 64 * n))}
    support, iwork = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32)
    found, info = ctypes.c_int(), ctypes.c_int()
    _routine(matrix.dtype)(
        *(b"V", b"I", b"U", _int(n), ctypes.c_void_p(matrix.data_ptr()), _int(n)),
        *(_real(number), _real(number), _int(n - k + 1), _int(n), _real(number), ctypes.byref(found)),  # abstol 0: default
        *(_address(buffers["w"]), ctypes.c_void_p(rows.data_ptr()), _int(n), _address(support)),
        *(_address(buffers["work"]), _int(64 * n), _address(iwork), _int(10 * n), ctypes.byref(info)),
    )
    if info.value or found.value != k:
        raise LinAlgError(f"syevr gave {found.value} of {k} eigenvectors and info = {info.value}")


def _int(value: int):
    return ctypes.byref(ctypes.c_int(value))


def _real(number):
    return ctypes.byref(number(0))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _routine(dtype: torch.dtype):
    """The routine as a function that releases the interpreter lock; every argument is a pointer."""
    capsule = cython_lapack.__pyx_capi__[_ROUTINES[dtype]]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = [ctypes.c_char_p] * 3 + [ctypes.c_void_p] * 18
    return ctypes.CFUNCTYPE(None, *signature)(pointer_of(capsule, name_of(capsule)))


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
