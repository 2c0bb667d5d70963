"""The processes of a run that share its documents: what each has found goes to the others through the host."""

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
    """What a step found in one process, or the words of the error that it ended with there."""

    found: Any = None
    error: str | None = None


@dataclass
class Ranks:
    """Every process must take the same steps. An error in one of them reaches all instead of leaving them waiting.

    lm-eval gathers with the backend that scores, which on GPUs takes device memory for what lies on the host. A context
    manager: on leaving, the connections are closed.
    """

    rank: int = 0
    size: int = 1
    _group: Any = field(default=None, repr=False)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """Gloo's threads release tensors; one that does so while Python ends aborts the process (pytorch issue 190489)."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def everywhere(self, step: Callable[[], Any]) -> list[Any]:
        """What ``step`` found in every process, in their order, in all of them.

        Returns:
            One result per process.

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
                f"got an error in {'; '.join(failed)}; run again with fewer processes or report this"
            )
        return [part.found for part in parts]

    def at_first(self, step: Callable[[], Any]) -> list[Part] | None:
        """In process 0 what ``step`` found in every process, or how it failed there; ``None`` in the others."""
        if self.size == 1:
            return [Part(found=step())]
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(_attempt(step), parts, dst=0, group=self._on_host())
        return parts

    def _on_host(self) -> Any:
        if (
            self._group is None
        ):  # without a time limit some process would give up while another measures
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(weeks=52))
        return self._group


def _attempt(step: Callable[[], Any]) -> Part:
    try:
        return Part(found=step())
    except Exception as error:
        logger.exception("coupling: an error in this process")
        return Part(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
