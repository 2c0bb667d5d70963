"""The processes that share a run's documents, and how results pass between them."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lm_eval_coupling.errors import CouplingError

logger = logging.getLogger("lm_eval.coupling")


@dataclass(frozen=True)
class Part:
    """The result of a step in one process, or the message of the error in it."""

    value: Any = None
    error: str | None = None


@dataclass
class Ranks:
    """Steps that every process takes together; usable as a context manager.

    An error in one process reaches all of them instead of leaving them waiting. Results pass
    through the host: lm-eval's own backend would take device memory for them.
    """

    rank: int = 0
    size: int = 1
    _group: Any = field(default=None, repr=False)
    _exchanged: list[Tensor] = field(default_factory=list, repr=False)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections.

        A thread of Gloo's that releases tensors while Python ends would abort the process
        (pytorch issue 190489).
        """
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
            self._exchanged.clear()

    def everywhere(self, step: Callable[[], Any]) -> list[Any]:
        """Return in every process the results of ``step`` in all of them, in their order.

        Raises:
            CouplingError: in every process, if it failed in one.
        """
        if self.size == 1:
            return [step()]
        parts = self._gather(_attempt(step), to_all=True)
        if failed := [
            f"process {rank}: {part.error}" for rank, part in enumerate(parts) if part.error
        ]:
            raise CouplingError(
                f"got an error in {'; '.join(failed)}; "
                "run again with fewer processes or report this"
            )
        return [part.value for part in parts]

    def at_first(self, step: Callable[[], Any]) -> list[Part] | None:
        """Return every process's result or error in process 0, and ``None`` in the others."""
        if self.size == 1:
            return [Part(value=step())]
        parts = self._gather(_attempt(step), to_all=False)
        return parts if self.rank == 0 else None

    def _gather(self, part: Part, *, to_all: bool) -> list[Part]:
        """Return every process's part, in all processes or in process 0; in the others none.

        The exchanged tensors are kept until the group is closed. Gloo's threads drop them too, and
        dropping the last reference takes Python's lock. torch before 2.8 waits for these threads
        with that lock held, without end (pytorch pull request 154976).
        """
        group, distributed = self._on_host(), torch.distributed
        data = torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8)
        size = torch.tensor([len(data)], device="cpu")
        sizes = [torch.zeros_like(size) for _ in range(self.size)]
        distributed.all_gather(sizes, size, group=group)
        sent = torch.zeros(int(max(sizes)), dtype=torch.uint8, device="cpu")
        sent[: len(data)] = data
        receives = to_all or self.rank == 0
        received = [torch.empty_like(sent) for _ in range(self.size if receives else 0)]
        if to_all:
            distributed.all_gather(received, sent, group=group)
        else:
            distributed.gather(sent, received or None, dst=0, group=group)
        self._exchanged += [size, *sizes, sent, *received]
        pairs = zip(received, sizes, strict=receives)
        return [pickle.loads(data[: int(n)].numpy().tobytes()) for data, n in pairs]

    def _on_host(self) -> Any:
        if self._group is None:
            # With a shorter limit a process would give up while another one measures.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(weeks=52))
        return self._group


def _attempt(step: Callable[[], Any]) -> Part:
    try:
        return Part(value=step())
    except Exception as error:
        logger.exception("coupling: an error in this process")
        return Part(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
