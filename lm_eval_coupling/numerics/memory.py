"""Memory of a measurement, known before it starts: its size, its place, and the prompts per batch.

All Jacobians of a prompt are needed at once, for the pairs of layers: n_layers · d_model² numbers,
21 GB for 80 layers of width 8192. They lie on the model's device if they take at most half of its
free memory, else on the host by the same rule, else in a temporary file. Code that uses them brings
one layer at a time to the device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics import limits
from lm_eval_coupling.numerics.subspace import GRAM, block_of
from lm_eval_coupling.numerics.workers import workers

SPECTRA = 2 << 30  # bytes of all decompositions on a CPU, unless every worker has only one
ROOM = 0.8  # of the free memory of a device; libraries and gaps of the allocator take the rest
# Prompts per batch on a CPU, their tokens, and bytes of their Jacobians: more gain nothing there.
PROMPTS, TOKENS, BYTES = 8, 2048, 1 << 30
PROMPTS_ON_DEVICE = 256
SPECTRA_ON_DEVICE = 16 << 30  # bytes; a thousand matrices of a small model, more gain nothing
COUPLED_AT_ONCE = 1 << 30  # bytes of the pairs of several prompts on a device
PAIRS_AT_ONCE = 1 << 27  # bytes of J V of several layers on a device
POINTS = 512  # vectors of the stream whose logits are decoded together
_DECOMPOSITION = 6  # matrices of the size of J in memory while it is decomposed on a CPU


def place(size: int, device: torch.device, held: int = 0) -> str:
    """Return where ``size`` bytes of Jacobians go: ``device``, ``host`` or ``disk``.

    ``held`` bytes of the device will be taken by other tensors.
    """
    if device.type != "cpu":
        if size <= (limits.free(device) - held) // 2:
            return "device"
        held = 0
    return "host" if size <= (limits.free_on_host() - held) // 2 else "disk"


def jacobian_stack(
    layers: int, stream: Tensor, on_host: bool = False
) -> Float[Tensor, "layer d_model d_model"]:
    """Allocate memory for the Jacobians of ``layers`` blocks where it is free.

    Args:
        layers: number of Jacobians.
        stream: a tensor with the width, dtype and device of the residual stream.
        on_host: whether to leave out the device.

    Returns:
        Numbers yet to be written: on the device, on the host, or in a temporary file.

    Raises:
        CouplingError: if they must go to the disk and it has no room.
    """
    d_model = stream.shape[-1]
    shape = (layers, d_model, d_model)
    size = layers * d_model**2 * stream.element_size()
    where = place(size, torch.device("cpu") if on_host else stream.device)
    if where == "disk":
        return _in_file(size, stream.dtype).view(shape)
    return stream.new_empty(shape, device=stream.device if where == "device" else "cpu")


def spectra_workers(d_model: int, itemsize: int, reserved: int = 0) -> int:
    """Return how many workers of a CPU decompose Jacobians side by side.

    ``reserved`` bytes of the free memory will be taken by something else.
    """
    return workers(_DECOMPOSITION * d_model**2 * itemsize, reserved)


def layers_at_once(d_model: int, itemsize: int, device: torch.device, rank: int = 64) -> int:
    """Return how many Jacobians a device, or each worker of a CPU, decomposes at once."""
    if device.type == "cpu":
        room = min(SPECTRA, limits.free_on_host() // 2) // spectra_workers(d_model, itemsize)
        most, each = 4, _DECOMPOSITION * d_model**2
    else:
        # Some may be repeated in float64, a quarter at a time, from a copy of twice the size.
        room = min(limits.free(device) // 3, SPECTRA_ON_DEVICE)
        most, each = 4096, 4 * _by_products(d_model, rank) + d_model**2
    return max(1, min(most, room // (each * itemsize)))


def _by_products(d_model: int, rank: int) -> int:
    """Return the numbers held beside a matrix: its Gram matrix twice, a dozen column blocks."""
    columns = block_of(min(rank, d_model), d_model)
    return (2 * d_model**2 if d_model <= GRAM else 0) + 12 * columns * (d_model + columns)


def together(
    lengths: Sequence[int], fits: Callable[[int, int], bool], most: int
) -> list[list[int]]:
    """Return batches of prompts of similar length, as indices, as large as they fit; short first.

    Args:
        lengths: tokens of each prompt.
        fits: returns whether a number of prompts of a number of tokens fit; unused for one prompt.
        most: largest number of prompts in a batch.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = groups[-1] if groups else []
        # Prompts are padded to the longest of their batch.
        is_similar = bool(batch) and lengths[i] <= 1.5 * lengths[batch[0]] + 32
        if is_similar and len(batch) < most and fits(len(batch) + 1, lengths[i]):
            batch.append(i)
        else:
            groups.append([i])
    return groups


def batches(model: Any, lengths: Sequence[int], *, rank: int, itemsize: int = 4) -> list[list[int]]:
    """Group prompts by :func:`together`, within the free memory of a ResidualModel's devices."""
    shape = shape_of(model, itemsize)
    if shape["device"].type == "cpu":
        jacobians = model.n_layers * model.d_model**2 * itemsize
        most = max(1, min(PROMPTS, BYTES // jacobians))
        return together(lengths, lambda prompts, seq: prompts * seq <= TOKENS, most)
    room = ROOM * min(map(limits.free, model.devices))
    where = "host" if shape["scattered"] else "device"

    def fits(prompts: int, seq: int) -> bool:
        needed = memory(**shape, rank=rank, seq=seq, prompts=prompts)
        return needed.where == where and needed.on_device <= room

    return together(lengths, fits, PROMPTS_ON_DEVICE)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = (1 << 31) - 1  # free bytes at the end of the heap, the largest C int
_LARGEST_IN_HEAP = 32 << 20  # bytes, the largest value that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for its next use, for the rest of the process.

    On Linux its allocator returns large blocks to the system at once. The system then fills every
    new block with zeros, page by page, while other threads wait: a sixth of the time of a Jacobian
    on a CPU. Blocks of up to 32 MiB are kept, and up to 2 GiB at the end of the heap.

    Returns:
        True if the allocator is glibc's and the user has not configured it.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
            and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        )
    except (OSError, AttributeError):
        return False


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that measuring takes beside the model.

    Attributes:
        jacobians: Jacobians of a batch.
        where: their place, ``device``, ``host`` or ``disk``.
        bases: singular vectors.
        working: the largest need of a step of the computation.
        workers: number of workers that compute blocks side by side, each with memory of its own.
    """

    jacobians: int
    where: str
    bases: int
    working: int
    workers: int = 1

    @property
    def total(self) -> int:
        """Sum of all parts, wherever they lie."""
        return self.jacobians + self.bases + self.working

    @property
    def on_device(self) -> int:
        """Bytes of it on a device that the model computes on."""
        return self.total - (0 if self.where == "device" else self.jacobians)

    def __str__(self) -> str:
        where = {
            "device": "on the device",
            "host": "on the host",
            "disk": f"in a file in {tempfile.gettempdir()}",
        }
        jacobians = f"{_bytes(self.jacobians)} of Jacobians {where[self.where]}"
        parts = f"{_bytes(self.bases)} of singular vectors, {_bytes(self.working)} while at work"
        by = f" on {self.workers} blocks side by side" if self.workers > 1 else ""
        return f"{jacobians}, {parts}{by}"


def memory(
    *,
    n_layers: int,
    d_model: int,
    n_heads: int,
    block_params: int,
    rank: int,
    seq: int,
    prompts: int = 1,
    itemsize: int = 4,
    device: str | torch.device = "cpu",
    largest_weight: int | None = None,
    cast: bool = True,
    d_head: int | None = None,
    vocabulary: int = 0,
    scattered: bool = False,
    independent: bool = True,
) -> Memory:
    """Return an upper estimate of the memory of a measurement; heads that share keys take less.

    Args:
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: attention heads of a block.
        block_params: weights of the largest block.
        rank: largest number K of singular vectors.
        seq: tokens of the longest prompt.
        prompts: number of prompts in a batch.
        itemsize: bytes of a number.
        device: where the model computes.
        largest_weight: numbers of the block's largest matrix; a third of its weights unless given.
        cast: whether the weights have another dtype, so that those of a block are copied meanwhile.
        d_head: width of an attention head; ``d_model / n_heads`` unless given.
        vocabulary: number of token types, for the logits that are decoded at every depth.
        scattered: whether blocks lie on several devices, so that their Jacobians go to the host.
        independent: whether workers of a CPU may compute blocks side by side.
    """
    device = torch.device(device)
    tokens, square, basis = prompts * seq, d_model**2, prompts * n_layers * d_model * (rank + 1)
    largest = block_params // 3 if largest_weight is None else largest_weight
    copied, scores = block_params if cast else 0, n_heads * prompts * seq**2
    # Inputs, keys and values of every block, and a mask.
    trace = 3 * n_layers * tokens * d_model + prompts * seq**2
    per_token = (3 if seq >= 64 else 8) * (largest // d_model + d_model)
    forward = copied + 2 * scores + tokens * per_token
    # Once per block its passes are compared with its derivative, in float64. Long prompts keep keys
    # and are compared by steps of decoding.
    verified = copied
    if itemsize == 4:
        verified += 2 * (block_params + (tokens * per_token if seq < 64 else 0))
    size = prompts * n_layers * square * itemsize
    held = 0 if scattered else trace * itemsize
    where = place(size, torch.device("cpu") if scattered else device, held)
    wide = max(d_model, n_heads * (d_head or d_model // n_heads))
    closed = max(13 * d_model * wide // 2, 5 * square // 2 + largest)
    jacobian = copied + prompts * closed
    at_once = layers_at_once(d_model, itemsize, device, rank)
    side_by_side = 1
    # All bases times one J, and all pairs of some prompts.
    pairs = 3 * basis // prompts + square
    if device.type == "cpu":
        reserved = size if where == "host" else 0  # it is taken only when it is written
        if independent and not scattered:
            side_by_side = min(n_layers, workers(jacobian * itemsize, reserved))
        decomposed = min(prompts * n_layers, at_once * spectra_workers(d_model, itemsize, reserved))
        spectra = decomposed * _DECOMPOSITION * square
        coupled = min(prompts, workers(_pairs(n_layers, rank) * itemsize, reserved))
    else:
        spectra = min(prompts * n_layers, at_once) * _by_products(d_model, rank)
        coupled = min(prompts, prompts_at_once(n_layers, rank, itemsize, device))
        pairs += min(n_layers * basis // prompts, PAIRS_AT_ONCE // itemsize)
    pairs += coupled * _pairs(n_layers, rank)
    logits = 3 * min(prompts * (n_layers + 1), max(POINTS, n_layers + 1)) * vocabulary
    step = max(forward, verified, side_by_side * jacobian, spectra, pairs, logits)
    return Memory(
        jacobians=size,
        where=where,
        bases=2 * basis * itemsize,
        working=(trace + step) * itemsize,
        workers=side_by_side,
    )


def block_workers(model: Any, prompts: int, itemsize: int = 4) -> int:
    """Return how many blocks of a ResidualModel to compute side by side for a batch of prompts.

    It is 1 on a device, and where blocks share something that a pass may change.
    """
    return memory_of(model, rank=1, seq=1, prompts=prompts, itemsize=itemsize).workers


def pair_workers(model: Any, rank: int, itemsize: int = 4) -> int:
    """Return for how many prompts pairs of blocks are computed side by side; 1 on a device."""
    if model.device.type != "cpu":
        return 1
    return workers(_pairs(model.n_layers, rank) * itemsize)


def prompts_at_once(n_layers: int, rank: int, itemsize: int, device: str | torch.device) -> int:
    """Return for how many prompts pairs of blocks are computed at once: many on a device."""
    if torch.device(device).type == "cpu":
        return 1
    return max(1, COUPLED_AT_ONCE // (_pairs(n_layers, rank) * itemsize))


def _pairs(n_layers: int, rank: int) -> int:
    """Return the numbers that all pairs of one prompt take, some of them in float64."""
    return 10 * (n_layers * rank) ** 2


def memory_of(model: Any, *, rank: int, seq: int, prompts: int = 1, itemsize: int = 4) -> Memory:
    """Return :func:`memory` for a :class:`~lm_eval_coupling.residual.ResidualModel`."""
    return memory(**shape_of(model, itemsize), rank=rank, seq=seq, prompts=prompts)


def shape_of(model: Any, itemsize: int) -> dict[str, Any]:
    """Return the arguments of :func:`memory` that follow from the model and the bytes a number."""
    block_params, largest = model.block_sizes
    return {
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "d_head": model.d_head,
        "vocabulary": model.vocabulary,
        "block_params": block_params,
        "itemsize": itemsize,
        "device": model.device,
        "largest_weight": largest,
        "cast": model.dtype.itemsize != itemsize,
        "scattered": len(model.devices) > 1,
        "independent": model.has_independent_blocks,
    }


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _in_file(size: int, dtype: torch.dtype) -> Tensor:
    """Return a vector in a temporary file without a name, which is removed with the vector."""
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < size:
        raise CouplingError(
            f"got {_bytes(size)} of Jacobians, more than half of the free memory, and only "
            f"{_bytes(free)} free in {folder}, expected room for them; set TMPDIR to a folder "
            "that has it"
        )
    descriptor, name = tempfile.mkstemp(prefix="lm_eval_coupling_")
    try:
        # A full disk is an error now then, not a crash while the vector is written.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
