"""The kinds of input that a model is run on: prompts become arguments of a forward pass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, require_token_ids

_EXPECTED = (
    "expected the ids of one prompt, [seq] or [1, seq]; encode text with the model's tokenizer, "
    "give prompts one by one"
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Keyword arguments of one pass, and the number of tokens of each prompt.

    ``lengths`` is None where all prompts have the same number, which the pass itself gives.
    """

    arguments: dict[str, Any]
    lengths: list[int] | None


@runtime_checkable
class Inputs(Protocol):
    """A kind of input."""

    @property
    def causal(self) -> bool:
        """True if a token sees only itself and the tokens before it."""

    @property
    def probe(self) -> Any:
        """A prompt on which any model of the kind can be run."""

    @property
    def several(self) -> list[Any]:
        """Prompts with which a pass of several is tried."""

    def batch(self, prompts: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Batch:
        """Make the arguments of one pass over several prompts, for weights in ``dtype``."""

    def as_scored(self, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of a batch by position and by name, as scoring gives them."""

    def standing_for(self, resid: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Make the arguments of a pass without blocks, and the stream that replaces theirs.

        ``resid`` are vectors [point, d_model] of the stream.
        """

    def ending_as(self, stream: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Make the same for a stream [1, seq, d_model] that the probe ended with."""

    def read(self, output: Any) -> Tensor:
        """Return the logits of each point or prompt among what a pass returns."""


class TokenIds:
    """Prompts of a causal language model: token ids, padded on the right, unseen by any token."""

    causal = True

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
        if "output_router_logits" in parameters:  # its loss asks for the logits of every block
            self.options["output_router_logits"] = False
        table = model.get_input_embeddings()
        words = getattr(table, "num_embeddings", None) or model.config.get_text_config().vocab_size
        self.words = words
        self.probe = [word % words for word in (5, 3, 7, 2, 11, 13, 6)]
        self.several = [[word % words for word in prompt] for prompt in ([1, 2, 3], [4] * 21)]

    def batch(self, prompts: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Batch:
        """Return token ids padded to [prompt, seq], of sequences or of tensors [seq] or [1, seq].

        Raises:
            CouplingError: for anything else. A GPU that looks up a row beyond its embeddings is
                lost to the process.
        """
        rows = [self._row(tokens).to("cpu", torch.long) for tokens in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # in one transfer
        return Batch({"input_ids": ids, **self.options}, [len(row) for row in rows])

    def _row(self, tokens: Any) -> Tensor:
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise CouplingError(
                f"got {str(tokens)[:80]!r} as the tokens of a prompt, {_EXPECTED}"
            ) from None
        several = ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1)
        if (
            several
            or not ids.numel()
            or ids.is_floating_point()
            or ids.is_complex()
            or ids.dtype == torch.bool
        ):
            raise CouplingError(
                f"got a {ids.dtype} of shape {[*ids.shape]} as the tokens of a prompt, {_EXPECTED}"
            )
        require_token_ids(ids.flatten().tolist(), self.words)
        return ids.flatten()

    def as_scored(self, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the ids by position and nothing else, as lm-eval gives them."""
        return (arguments["input_ids"],), {}

    def standing_for(self, resid: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Take the vectors as one prompt; [prompt, point, d_model] as several prompts."""
        stream = resid if resid.dim() == 3 else resid[None]
        ids = torch.zeros(stream.shape[:2], dtype=torch.long, device=device)
        return {"input_ids": ids, **self.options}, stream

    def ending_as(self, stream: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Take its vectors as one prompt."""
        return self.standing_for(stream[0], device)

    def read(self, output: Any) -> Tensor:
        """Return the logits [seq, vocabulary] of the first prompt."""
        return output.logits[0]
