"""A language model or an image classifier as a stream of residual blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, Unmeasurable, shown
from lm_eval_coupling.numerics.precision import exact_arithmetic, made_on_host
from lm_eval_coupling.residual.agreement import ScoredModel
from lm_eval_coupling.residual.block import Block
from lm_eval_coupling.residual.block_independence import are_independent
from lm_eval_coupling.residual.fingerprint import Fingerprint, digest, read_fingerprint
from lm_eval_coupling.residual.image_inputs import ImageTokens, pixel_digest, pixels_of
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.lens import Lens, require_vectors
from lm_eval_coupling.residual.trace import Direction, ResidualTrace
from lm_eval_coupling.residual.tracing import Tracer, equal_prompts
from lm_eval_coupling.residual.vocabulary import looked_up
from lm_eval_coupling.residual.weights import state_of


class ResidualModel:
    """A model as a stack of residual blocks; build one with :meth:`wrap`.

    Attributes:
        model: the twin, a second module tree over the scored model's weights.
        blocks: its modules that are blocks, in order.
        block_list: the same as :class:`Block`, which knows how to run one by itself.
        wrapping: ``bridge`` or ``blocks``.
        wrapping_reason: why the model is wrapped that way.
        inputs: what the model is run on.
        tokenizer: may be None.
        n_params: number of parameters.
        n_layers: number of blocks.
        n_heads: number of attention heads.
        d_head: width of a head, None if the configuration does not give it.
        vocabulary: number of tokens that it knows, 0 for an image classifier.
        block_sizes: number of weights in the largest block, and in the largest matrix of a block.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        inputs: Inputs,
        n_params: int,
        wrapping: str,
        wrapping_reason: str,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.blocks = model, list(blocks)
        self.inputs, self.tokenizer, self.n_params = inputs, tokenizer, n_params
        self.wrapping, self.wrapping_reason = wrapping, wrapping_reason
        self.n_layers = len(self.blocks)
        self.n_heads, self.d_head, self.vocabulary = _sizes_in(model.config, inputs.causal)
        self.block_sizes = _block_sizes(self.blocks)
        self.block_list = [Block(n, block, inputs.causal) for n, block in enumerate(self.blocks)]
        tables = looked_up(model)
        outside = self._weights_outside_blocks(tables)
        self.tracer = Tracer(model, self.block_list, inputs=inputs, tables=tables, outside=outside)
        self._lens = Lens(
            model, self.blocks, inputs=inputs, tables=tables, outside=outside, device=self.device
        )
        self._scored: ScoredModel | None = None
        self._compares_all, self._longest_compared = False, 0
        self._seq_of: dict[torch.Size, int] = {}  # number of an image's tokens by its shape

    def __repr__(self) -> str:
        """Return one line, in which the wrapped model's class and size stand."""
        name = type(self.model).__name__
        return f"<ResidualModel of a {name}, {self.n_layers} blocks, by {self.wrapping}>"

    @classmethod
    @exact_arithmetic()
    def wrap(cls, hf_model: nn.Module, tokenizer: Any = None) -> ResidualModel:
        """Make a second module tree over the weights of ``hf_model``, which stays untouched.

        Costs three passes over a few tokens and some megabytes.

        Args:
            hf_model: a causal language model or an image classifier of transformers. It may be
                compiled, adapted by PEFT, pruned, packed, offloaded, and have hooks.
            tokenizer: needed only where prompts are given as strings.

        Returns:
            The wrapped model in evaluation mode: bridged by TransformerLens if the bridge computes
            what the model does, else with the model's own blocks.

        Raises:
            CouplingError: if its blocks are no residual stream, or if what is scored is not what
                would be measured.
        """
        from lm_eval_coupling.residual.wrapping import wrap

        if tokenizer is not None and (
            isinstance(tokenizer, str | bytes) or not hasattr(tokenizer, "encode")
        ):
            raise CouplingError(
                f"got tokenizer={shown(tokenizer)}, expected a tokenizer of transformers, or None"
            )
        return wrap(cls, hf_model, tokenizer)

    def remember_scored(self, scored: ScoredModel) -> None:
        """Remember the model that this one was made of, to follow it from now on."""
        self._scored = scored
        self._compares_all = scored.has_own_code
        if scored.has_own_functions:
            # Hooks may go by places in the batch, such as the last one or those from the tenth on.
            self.tracer.pads = self.tracer.decodes = False
            for block in self.block_list:
                block.verifies_each = True

    @made_on_host()
    def describe_change(self) -> str | None:
        """Return the first change since wrapping, such as ``the weight norm.weight``, or None.

        Ask before every evaluation: a changed model needs another fingerprint and another twin, so
        wrap it anew. Costs a look at every module and, once the fingerprint has been taken, one
        read of the weights.
        """
        if (scored := self._scored) is None:
            return None
        if (change := scored.stamp.change_in(scored.model)) is not None:
            return change
        taken: Fingerprint | None = vars(self).get("_fingerprint")
        if taken is None:
            return None
        if taken.unreadable:
            return "something that cannot be read"
        # A few entries written through ``p.data`` leave no trace in the stamp.
        current = read_fingerprint(scored.model, scored.stamp.attached)
        return None if current == taken else "a part of a weight"

    def require_unchanged(self) -> None:
        """Raise CouplingError if weights, modules or hooks were replaced since wrapping.

        Numbers that are no weights, such as the epsilon of a norm, may have changed as well: the
        next prompt is compared with the scored model's own pass again, whatever its length.
        """
        self._longest_compared = 0
        if self._scored is not None:
            self._scored.require_unchanged()

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        # Attachments as they were when the model was wrapped: an adapter may be off by now.
        return read_fingerprint(self.scored.model, self.scored.stamp.attached)

    @property
    def unreadable(self) -> str | None:
        """The first attachment whose state cannot be read: measurements are this run's own then."""
        return next(iter(self._fingerprint.unreadable), None)

    @cached_property
    def fingerprint(self) -> str:
        """The model's :func:`~lm_eval_coupling.residual.fingerprint.fingerprint`."""
        return self._fingerprint.own()

    @cached_property
    @made_on_host()
    def identity(self) -> str:
        """The model's key in the store: :attr:`fingerprint` and a digest of the probe's stream."""
        return f"{self.fingerprint}-{digest(self.scored.probed)}"

    @property
    def scored(self) -> ScoredModel:
        """The model that this one was made of."""
        if self._scored is None:
            raise CouplingError(
                "got a model that was not made by ResidualModel.wrap, expected one with known "
                "weights"
            )
        return self._scored

    @property
    def d_model(self) -> int:
        """Width of the stream, 0 before the first trace."""
        return self.tracer.d_model

    @property
    def device(self) -> torch.device:
        """Device of the first weight, that of the embeddings: the stream begins there."""
        return self.tracer.device

    @property
    def devices(self) -> list[torch.device]:
        """Devices of the blocks, each once."""
        return list(dict.fromkeys(block.device for block in self.block_list))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def encode(self, prompt: str | Tensor) -> Sequence[int]:
        """Encode a text with the tokenizer's special tokens, or name the tokens of an image.

        Args:
            prompt: text, or for an image classifier pixel values, [channel, height, width] or with
                a 1 before.

        Returns:
            Token ids; those of an image stand for it wherever token ids are asked for.

        Raises:
            CouplingError: if the model was wrapped without a tokenizer.
        """
        if isinstance(prompt, Tensor):
            return self.image(prompt)
        if self.tokenizer is None:
            raise CouplingError(
                "got a prompt given as text and a model wrapped without a tokenizer; "
                "pass tokenizer=… to ResidualModel.wrap, or give the prompt as token ids"
            )
        return list(self.tokenizer.encode(prompt))

    def image(self, pixels: Tensor, load: Callable[[], Tensor] | None = None) -> ImageTokens:
        """Make a prompt of an image; one pass gives the number of tokens of images of its size.

        Args:
            pixels: pixel values [channel, height, width], floating point.
            load: called for them when they are needed; without it they are kept.

        Returns:
            A stand-in for the image wherever token ids are asked for.
        """
        pixels = pixels_of(pixels)
        if (shape := pixels.shape) not in self._seq_of:
            self._seq_of[shape] = self.trace(pixels).resid_final.shape[1]
        return ImageTokens(pixel_digest(pixels), self._seq_of[shape], load or (lambda: pixels))

    def trace(
        self,
        tokens: Sequence[int] | Tensor,
        dtype: torch.dtype = torch.float32,
        output_token: int | None = None,
        direction: Direction | None = None,
    ) -> ResidualTrace:
        """Run one forward pass in ``dtype``, upcasting half precision one block at a time.

        Args:
            tokens: token ids of one prompt, [seq] or [1, seq].
            dtype: ``torch.float32`` or ``torch.float64``.
            output_token: token t whose Jacobians will be wanted; blocks then keep what a step of
                decoding needs of them.
            direction: (layer, vectors of the stream) → u; blocks are then pulled back, uᵀ ∂F_t/∂X,
                during the pass of a short prompt.

        Returns:
            Every block's call and the stream after the last block; the head is not run.

        Raises:
            Unmeasurable: if the scored model computes another stream for this prompt.
        """
        output_tokens = None if output_token is None else [output_token]
        return self.traces([tokens], dtype, output_tokens, direction)[0]

    @exact_arithmetic()
    def traces(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> list[ResidualTrace]:
        """Return a :meth:`trace` of each of several prompts, from one pass padded on the right.

        Prompts are traced one by one if the padding of the model's arguments is not known. So they
        are if a padded pass gives another stream, or if hooks are attached to the model.

        Raises:
            Unmeasurable: if the scored model computes another stream for one of the prompts.
        """
        if self._scored is not None:
            self._scored.require_unchanged()
        traces = self.tracer.trace(prompts, dtype, output_tokens, direction)
        if self._scored is None or self.tracer.first_input is not None:
            return traces
        try:
            self._compare(prompts, traces, output_tokens)
        except Unmeasurable:
            if len(equal_prompts(prompts)) == 1 or not self.tracer.pads:
                raise
            # The prompts' company made the difference: from now on each is traced alone.
            self.tracer.pads, self._compares_all = False, True
            traces = self.tracer.trace(prompts, dtype, output_tokens, direction)
            self._compare(prompts, traces, output_tokens)
        return traces

    def _compare(
        self,
        prompts: Sequence[Any],
        traces: Sequence[ResidualTrace],
        output_tokens: Sequence[int] | None,
    ) -> None:
        """Hold traces to the scored model's own passes.

        With code of the user in the model, every prompt is compared. Else one prompt of every
        padded batch, the shortest, and prompts alone that are longer than those before.
        """
        equal = equal_prompts(prompts)
        if not self._compares_all:
            shortest = min(equal, key=lambda indices: traces[indices[0]].resid_final.shape[1])
            seq = traces[shortest[0]].resid_final.shape[1]
            if len(equal) == 1 and seq <= self._longest_compared:
                return
            equal = [shortest]
            self._longest_compared = max(self._longest_compared, seq)
        for indices in equal:
            tokens = [-1] if output_tokens is None else [output_tokens[i] for i in indices]
            self.scored.require_agreement(prompts[indices[0]], tokens, traces[indices[0]])

    @exact_arithmetic()
    def require_same_when_generated(self, tokens: Sequence[int], start: int) -> None:
        """Refuse a response that functions of the user changed while it was generated.

        Args:
            tokens: of prompt and response.
            start: index of the response's first token.

        Raises:
            Unmeasurable: if one pass over the text computes another stream for the response.
        """
        if self.scored.has_own_functions:
            self.scored.require_same_when_generated(tokens, start)

    @contextlib.contextmanager
    def first_block_given(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Give the first block ``change(X)`` for its input X [prompt, seq, d_model] in traces."""
        self.tracer.first_input = change
        try:
            yield
        finally:
            self.tracer.first_input = None

    @exact_arithmetic()
    @torch.no_grad()
    def logits(
        self, resid: Float[Tensor, "*prompt points d_model"]
    ) -> Float[Tensor, "*prompt points vocabulary"]:
        """Apply the model's final norm and head to vectors of its stream (logit lens).

        The model runs with its blocks left out, with whatever scales and soft-caps it has. Vectors
        of several prompts of a language model take one pass.

        Returns:
            Logits in the dtype of ``resid``; a head of another dtype is cast a part at a time.
        """
        return self._lens.logits(require_vectors(resid, self.d_model), self.tracer.outputs)

    @exact_arithmetic()
    def norm_jacobian(self, resid: Float[Tensor, " d_model"]) -> Float[Tensor, "d_model d_model"]:
        """Compute ∂norm(x)/∂x, norm being all that is between the last block and the head."""
        vector = require_vectors(resid, self.d_model, alone=True)
        return self._lens.norm_jacobian(vector, self.tracer.outputs)

    @property
    def has_independent_blocks(self) -> bool:
        """True if blocks share no module or tensor and call no hook of the user's."""
        return are_independent(self.block_list)

    def answer(self, stream: Float[Tensor, "1 seq d_model"]) -> Tensor:
        """Return the logits of ``inputs.probe``, had it ended as ``stream``; differentiable."""
        return self._lens.answer(stream, self.tracer.outputs)

    def _weights_outside_blocks(self, tables: dict[nn.Module, nn.Embedding]) -> list[Tensor]:
        """Return what is used whole before the first block: neither word tables nor the head."""
        inside = {id(t) for block in self.block_list for t in block.weights}
        rows = {id(table.weight) for table in tables.values()}
        of_words = state_of(self.model.get_input_embeddings()) if self.inputs.causal else ()
        words = {id(t) for t in of_words} - rows
        head = self.model.get_output_embeddings() if self.inputs.causal else None
        inside |= rows | ({id(t) for t in state_of(head)} - words if head is not None else set())
        return [t for t in state_of(self.model) if id(t) not in inside]


def _sizes_in(config: Any, causal: bool) -> tuple[int, int | None, int]:
    """Return the number of heads, their width, and the number of words of a configuration."""
    text = config.get_text_config()
    words = getattr(text, "vocab_size", None) if causal else None
    heads = getattr(text, "num_attention_heads", None)
    # A network of several stages has a list of them, and is refused for its stream.
    heads = heads if isinstance(heads, int) and heads else 1
    return heads, getattr(text, "head_dim", None), words or 0


def _block_sizes(blocks: Sequence[nn.Module]) -> tuple[int, int]:
    """Return the numbers in the largest block, and in its largest matrix (one expert's)."""
    weights = [list(block.parameters()) for block in blocks]
    matrices = [p.shape[-1] * p.shape[-2] for block in weights for p in block if p.dim() > 1]
    return max(sum(p.numel() for p in block) for block in weights), max(matrices, default=0)
