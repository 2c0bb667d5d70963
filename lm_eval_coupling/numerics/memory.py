"""How much memory a measurement takes, known before it starts; where its Jacobians lie; how many prompts go together.

All Jacobians of a prompt are needed at once, one for every pair of layers: n_layers · d_model² numbers, 21 GB for 80 layers
of width 8192. They lie on the model's device up to half of what is free there, else on the host up to half of what is free
there, else in a temporary file; whatever works on them takes one layer at a time to the device.
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

SPECTRA = 2 << 30  # bytes that the decompositions going on at the same time on a CPU may take
ROOM = 0.8  # of what is free on a device: the rest is for what libraries take, and for what allocators leave unused
PROMPTS, TOKENS, BYTES = (
    8,
    2048,
    1 << 30,
)  # together on a CPU: more of them, of their tokens or Jacobians gain nothing there
PROMPTS_ON_DEVICE = 256
SPECTRA_ON_DEVICE = (
    16 << 30
)  # the same there: a thousand matrices of a small model, beyond which nothing is gained
COUPLED_AT_ONCE = 1 << 30  # bytes that the pairs of several prompts may take on a device
PAIRS_AT_ONCE = 1 << 27  # bytes of J V that a device may hold for several layers
POINTS = 512  # of the stream, whose logits are decoded together
_DECOMPOSITION = 6  # matrices of the size of J that its decomposition holds on a CPU


def place(size: int, device: torch.device, held: int = 0) -> str:
    """Where ``size`` bytes of Jacobians go, ``device``, ``host`` or ``disk``, once ``held`` more are taken on the device."""
    if device.type != "cpu":
        if size <= (limits.free(device) - held) // 2:
            return "device"
        held = 0
    return "host" if size <= (limits.free_on_host() - held) // 2 else "disk"


def jacobian_stack(
    layers: int, like: Tensor, on_host: bool = False
) -> Float[Tensor, "layer d_model d_model"]:
    """Room for the Jacobians of ``layers`` blocks whose stream is ``like``, where they fit; not on a device if ``on_host``.

    Returns:
        Numbers yet to be written, in the dtype of ``like``: on its device, on the host, or in a temporary file.

    Raises:
        CouplingError: if they must go to the disk and it has no room.
    """
    d_model = like.shape[-1]
    shape = (layers, d_model, d_model)
    size = layers * d_model**2 * like.element_size()
    where = place(size, torch.device("cpu") if on_host else like.device)
    if where == "disk":
        return _in_file(size, like.dtype).view(shape)
    return like.new_empty(shape, device=like.device if where == "device" else "cpu")


def layers_at_once(d_model: int, itemsize: int, device: torch.device, rank: int = 64) -> int:
    """How many Jacobians to decompose at once: on a CPU a few for each thread, elsewhere as many as there is room for."""
    if device.type == "cpu":
        most, room, each = 4 * torch.get_num_threads(), SPECTRA, _DECOMPOSITION * d_model**2
    else:
        # Some may be done again in float64, a quarter at a time, from a copy of twice the size.
        room = min(limits.free(device) // 3, SPECTRA_ON_DEVICE)
        most, each = 4096, 4 * _by_products(d_model, rank) + d_model**2
    return max(1, min(most, room // (each * itemsize)))


def _by_products(d_model: int, rank: int) -> int:
    """Numbers that a matrix's decomposition holds beside it: its Gram matrix twice, a dozen blocks of columns."""
    columns = block_of(min(rank, d_model), d_model)
    return (2 * d_model**2 if d_model <= GRAM else 0) + 12 * columns * (d_model + columns)


def together(
    lengths: Sequence[int], fits: Callable[[int, int], bool], most: int
) -> list[list[int]]:
    """Indices of the prompts to measure together: of like length, as many as fit.

    Args:
        lengths: tokens of each prompt.
        fits: whether so many prompts of so many tokens may be measured together; one alone is never asked about.
        most: prompts of a batch at most.

    Returns:
        Every index once, short prompts first.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = found[-1] if found else []
        alike = (
            bool(batch) and lengths[i] <= 1.5 * lengths[batch[0]] + 32
        )  # shorter ones are padded to the longest
        if alike and len(batch) < most and fits(len(batch) + 1, lengths[i]):
            batch.append(i)
        else:
            found.append([i])
    return found


def batches(model: Any, lengths: Sequence[int], *, rank: int, itemsize: int = 4) -> list[list[int]]:
    """:func:`together` for a :class:`~lm_eval_coupling.residual.ResidualModel`, within what its device has free now."""
    shape = shape_of(model, itemsize)
    if shape["device"].type == "cpu":
        jacobians = model.n_layers * model.d_model**2 * itemsize
        most = max(1, min(PROMPTS, BYTES // jacobians))
        return together(lengths, lambda prompts, seq: prompts * seq <= TOKENS, most)
    room = ROOM * min(map(limits.free, model.devices))
    where = "host" if shape["scattered"] else "device"

    def fits(prompts: int, seq: int) -> bool:
        found = memory(**shape, rank=rank, seq=seq, prompts=prompts)
        return found.where == where and found.on_device <= room

    return together(lengths, fits, PROMPTS_ON_DEVICE)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = (1 << 31) - 1  # bytes at the end of the heap, the largest C int
_LARGEST_IN_HEAP = 32 << 20  # bytes, the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library's allocator to keep what is freed for the next use, for the rest of the process.

    On Linux it hands large blocks back to the system at once, and every block taken again is filled with zeros page by page
    while the other threads wait: a sixth of the time of a Jacobian on a CPU. Blocks of up to 32 MiB are kept, where they are
    free at the end of the heap up to 2 GiB of them.

    Returns:
        Whether it was told so: no, where it is another allocator or the user set it up.
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
    """Bytes that measuring takes beside the model: what lies where, and the largest step on the way."""

    jacobians: int
    where: str
    bases: int
    working: int

    @property
    def total(self) -> int:
        """All of it together, wherever it lies."""
        return self.jacobians + self.bases + self.working

    @property
    def on_device(self) -> int:
        """What of it lies on a device that the model computes on."""
        return self.total - (0 if self.where == "device" else self.jacobians)

    def __str__(self) -> str:
        where = {
            "device": "on the device",
            "host": "on the host",
            "disk": f"in a file in {tempfile.gettempdir()}",
        }
        jacobians = f"{_in_words(self.jacobians)} of Jacobians {where[self.where]}"
        return f"{jacobians}, {_in_words(self.bases)} of singular vectors, {_in_words(self.working)} while at work"


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
) -> Memory:
    """What measuring takes; measured peaks lie below, the more so the more heads share keys.

    Args:
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: attention heads of a block.
        block_params: weights of the largest block.
        rank: largest number K of singular vectors.
        seq: tokens of the longest prompt.
        prompts: measured together.
        itemsize: bytes of a number.
        device: where the model computes.
        largest_weight: numbers of the block's largest matrix; a third of its weights unless given.
        cast: whether the weights come in another dtype, so that a block's are copied while it is at work.
        d_head: width of an attention head; ``d_model / n_heads`` unless given.
        vocabulary: number of words, for the logits that are decoded at every depth.
        scattered: whether the blocks lie on several devices, so that their Jacobians go to the host.

    Returns:
        Bytes, and where the Jacobians will lie.
    """
    device = torch.device(device)
    tokens, square, basis = prompts * seq, d_model**2, prompts * n_layers * d_model * (rank + 1)
    largest = block_params // 3 if largest_weight is None else largest_weight
    copied, scores = block_params if cast else 0, n_heads * prompts * seq**2
    trace = (
        3 * n_layers * tokens * d_model + prompts * seq**2
    )  # inputs, keys and values of every block; a mask
    forward = (
        copied + 2 * scores + (3 if seq >= 64 else 8) * tokens * (largest // d_model + d_model)
    )
    wide = max(d_model, n_heads * (d_head or d_model // n_heads))
    jacobian = copied + prompts * max(13 * d_model * wide // 2, 5 * square // 2 + largest)
    at_once = min(prompts * n_layers, layers_at_once(d_model, itemsize, device, rank))
    spectra = at_once * (
        _DECOMPOSITION * square if device.type == "cpu" else _by_products(d_model, rank)
    )
    coupled = min(prompts, prompts_at_once(n_layers, rank, itemsize, device))
    pairs = (
        3 * basis // prompts + coupled * _pairs(n_layers, rank) + square
    )  # all bases times one J
    if device.type != "cpu":
        pairs += min(n_layers * basis // prompts, PAIRS_AT_ONCE // itemsize)
    logits = 3 * min(prompts * (n_layers + 1), max(POINTS, n_layers + 1)) * vocabulary
    size = prompts * n_layers * square * itemsize
    working = (trace + max(forward, jacobian, spectra, pairs, logits)) * itemsize
    where = place(
        size, torch.device("cpu") if scattered else device, 0 if scattered else trace * itemsize
    )
    return Memory(size, where, 2 * basis * itemsize, working)


def prompts_at_once(n_layers: int, rank: int, itemsize: int, device: str | torch.device) -> int:
    """Prompts whose pairs of blocks are looked at in the same operations: on a device many, as launches count there."""
    if torch.device(device).type == "cpu":
        return 1
    return max(1, COUPLED_AT_ONCE // (_pairs(n_layers, rank) * itemsize))


def _pairs(n_layers: int, rank: int) -> int:
    """Numbers that all pairs of one prompt take, some of them in float64."""
    return 10 * (n_layers * rank) ** 2


def memory_of(model: Any, *, rank: int, seq: int, prompts: int = 1, itemsize: int = 4) -> Memory:
    """:func:`memory` for a :class:`~lm_eval_coupling.residual.ResidualModel`."""
    return memory(**shape_of(model, itemsize), rank=rank, seq=seq, prompts=prompts)


def shape_of(model: Any, itemsize: int) -> dict[str, Any]:
    """What :func:`memory` asks of a model; its weights are looked through for it."""
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
    }


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _in_file(size: int, dtype: torch.dtype) -> Tensor:
    """A vector in a temporary file, which has no name any more and goes when the vector does."""
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < size:
        raise CouplingError(
            f"got {_in_words(size)} of Jacobians, more than half of the free memory, and only {_in_words(free)} free in "
            f"{folder}, expected room for them; set TMPDIR to a folder that has it"
        )
    descriptor, name = tempfile.mkstemp(prefix="lm_eval_coupling_")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(
                descriptor, 0, size
            )  # a full disk is an error now, not a crash while writing
        return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
