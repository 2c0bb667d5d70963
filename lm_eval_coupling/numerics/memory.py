"""How much memory a measurement takes, known before it starts, and where its Jacobians lie.

All Jacobians of a prompt are needed at once, one for every pair of layers: n_layers · d_model² numbers, 21 GB for 80 layers
of width 8192. They lie on the model's device up to 4 GiB, else on the host up to half of what is free there, else in a
temporary file; whatever works on them takes one layer at a time to the device.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import CouplingError

ON_DEVICE = 4 << 30  # bytes of Jacobians that may lie on an accelerator
SPECTRA = 2 << 30  # bytes that the decompositions going on at the same time may take
_CGROUP = Path("/sys/fs/cgroup")


def place(size: int, device: torch.device) -> str:
    """Where ``size`` bytes of Jacobians go: ``device``, ``host`` or ``disk``."""
    if device.type != "cpu" and size <= ON_DEVICE:
        return "device"
    return "host" if size <= _free_on_host() // 2 else "disk"


def jacobian_stack(layers: int, like: Tensor) -> Float[Tensor, "layer d_model d_model"]:
    """Room for the Jacobians of ``layers`` blocks whose stream is ``like``, where they fit.

    Raises:
        CouplingError: if they must go to the disk and it has no room.
    """
    d_model = like.shape[-1]
    shape = (layers, d_model, d_model)
    size = layers * d_model**2 * like.element_size()
    where = place(size, like.device)
    if where == "disk":
        return _in_file(size, like.dtype).view(shape)
    return like.new_empty(shape, device=like.device if where == "device" else "cpu")


def layers_at_once(d_model: int, itemsize: int, device: torch.device) -> int:
    """How many Jacobians to decompose at once: a few for each thread, as far as memory allows."""
    most = 4 * torch.get_num_threads() if device.type == "cpu" else 4
    return max(1, min(most, SPECTRA // (_DECOMPOSITION * d_model**2 * itemsize)))


_DECOMPOSITION = 6  # matrices of the size of J that its decomposition holds


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

    def __str__(self) -> str:
        where = {"device": "on the device", "host": "on the host", "disk": f"in a file in {tempfile.gettempdir()}"}
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
    """
    device = torch.device(device)
    tokens, square, basis = prompts * seq, d_model**2, n_layers * d_model * (rank + 1)
    trace = 3 * n_layers * tokens * d_model  # inputs, keys and values of every block
    activations = 2 * tokens * block_params // d_model + 3 * n_heads * tokens * seq
    forward = block_params + activations
    jacobian = block_params * (1 + 3 * prompts) + 4 * prompts * square
    spectra = layers_at_once(d_model, itemsize, device) * _DECOMPOSITION * square
    pairs = 3 * basis + 10 * (n_layers * rank) ** 2 + square  # all bases times one J; all pairs, some in float64
    size = prompts * n_layers * square * itemsize
    working = (trace + max(forward, jacobian, spectra, pairs)) * itemsize
    return Memory(size, place(size, device), 2 * basis * itemsize, working)


def memory_of(model, *, rank: int, seq: int, prompts: int = 1, itemsize: int = 4) -> Memory:
    """:func:`memory` for a :class:`~lm_eval_coupling.residual.ResidualModel`."""
    return memory(
        n_layers=model.n_layers,
        d_model=model.d_model,
        n_heads=model.n_heads,
        block_params=max(sum(p.numel() for p in block.parameters()) for block in model.blocks),
        rank=rank,
        seq=seq,
        prompts=prompts,
        itemsize=itemsize,
        device=model.device,
    )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _free_on_host() -> int:
    """Bytes that this process may still take, within the limit of its container where there is one."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or "max"
        return free


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
            os.posix_fallocate(descriptor, 0, size)  # a full disk is an error now, not a crash while writing
        return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
