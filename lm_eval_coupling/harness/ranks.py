"""The processes that share a run's documents, and how results pass between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

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

    def everywhere(self, step: Callable[[], Any]) -> list[Any]:
        """Return the result of ``step`` in every process, in all of them.

        Returns:
            One result per process, in their order.

        Raises:
            CouplingError: in every process, if it failed in one.
        """
        if self.size == 1:
            return [step()]
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, _attempt(step), group=self._on_host())
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
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(_attempt(step), parts, dst=0, group=self._on_host())
        return parts

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
