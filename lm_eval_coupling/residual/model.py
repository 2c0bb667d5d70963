"""A language model as a stream of residual blocks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory, shown
from lm_eval_coupling.numerics.devices import has_float64
from lm_eval_coupling.numerics.precision import exact_arithmetic, made_on_host
from lm_eval_coupling.residual.argument import tensors_in
from lm_eval_coupling.residual.arguments import OnePass
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.block import Block, LeftBehind
from lm_eval_coupling.residual.block_call import BlockCall, hidden
from lm_eval_coupling.residual.block_independence import are_independent
from lm_eval_coupling.residual.fingerprint import digest, fingerprint
from lm_eval_coupling.residual.image_inputs import ImageTokens, pixel_digest, pixels_of
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.keys import Cache
from lm_eval_coupling.residual.lens import Lens, vectors
from lm_eval_coupling.residual.sizes import block_sizes, sizes_told
from lm_eval_coupling.residual.stamp import Stamp
from lm_eval_coupling.residual.trace import Direction, ResidualTrace, TracedBlock, told_if_refused
from lm_eval_coupling.residual.vocabulary import looked_up, rows_only
from lm_eval_coupling.residual.weights import state_of, upcast

# Tensors that a block takes, of which it is known what they are in a padded batch.
_BATCHABLE = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "position_embeddings",
    "relative_position_bias",
}
_LONG = 64  # tokens from which on a block is pulled back by one more step of decoding, not on the way through the sequence


class _LastBlockDone(Exception):
    pass


class ResidualModel:
    """A model as a stack of residual blocks (build one with :meth:`wrap`).

    Attributes: ``model`` (the measuring module tree), ``blocks`` (modules of it; ``block_list`` with their weights),
    ``wrapping`` (``bridge`` or ``blocks``) and ``wrapping_reason`` (why, in words), ``n_layers``, ``d_model``, ``n_heads``,
    ``d_head`` (None where the configuration does not say), ``vocabulary`` (its size),
    ``n_params``, ``block_sizes`` (numbers of the largest block, and of its largest matrix), ``inputs`` (what it is run on),
    ``device``, ``dtype`` (of the weights), ``tokenizer`` (may be ``None``).
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
        self.n_heads, self.d_head, self.vocabulary = sizes_told(model.config, inputs.causal)
        self.d_model = 0  # the first trace tells
        self.block_list = [
            Block(layer, module, inputs.causal) for layer, module in enumerate(self.blocks)
        ]
        inside = {id(part) for module in self.blocks for part in module.modules()}
        self._left_behind = LeftBehind(part for part in model.modules() if id(part) not in inside)
        self._tables = looked_up(model)
        self._outside_weights = self._outside_blocks()
        self._lens = Lens(
            model,
            self.blocks,
            inputs=inputs,
            tables=self._tables,
            outside=self._outside_weights,
            device=self.device,
        )
        self.block_sizes = block_sizes(self.blocks)
        self._change: Callable[[Tensor], Tensor] | None = None
        self._padding_is_harmless: bool | None = None  # not tried yet
        self._outputs = (
            0  # how many things a block returns as a tuple, 0 for a plain tensor; every trace tells
        )
        self._decodes: bool | None = None
        self._scored: tuple[nn.Module, Stamp, Tensor] | None = None
        self._seq_of: dict[torch.Size, int] = {}  # tokens of an image by its shape

    @classmethod
    @exact_arithmetic()
    def wrap(cls, hf_model: nn.Module, tokenizer: Any = None) -> ResidualModel:
        """A second module tree over the weights of ``hf_model``, which stays untouched, as a stack of residual blocks.

        Args:
            hf_model: a causal language model or an image classifier of transformers, compiled, adapted by PEFT, pruned or
                packed as it may be.
            tokenizer: needed only where prompts are given as strings.

        Returns:
            The wrapped model, in evaluation mode: bridged by TransformerLens where its bridge computes what the model does,
            with the model's own blocks where not. Costs three passes over a few tokens and some megabytes.

        Raises:
            CouplingError: if its blocks are no residual stream, or if what is scored is not what would be measured.
        """
        from lm_eval_coupling.residual.wrapping import wrapped

        if tokenizer is not None and (
            isinstance(tokenizer, str | bytes) or not hasattr(tokenizer, "encode")
        ):
            raise CouplingError(
                f"got tokenizer={shown(tokenizer)}, expected a tokenizer of transformers, or None"
            )
        return wrapped(cls, hf_model, tokenizer)

    def remember_scored(self, scored: nn.Module, probed: Float[Tensor, "1 seq d_model"]) -> None:
        """Remember which model this one was made of, as it stands now, and the stream after the last block for the probe."""
        self._scored = (scored, Stamp.of(scored), probed)

    @made_on_host()
    def describe_change(self) -> str | None:
        """In words, the first thing in which the wrapped model is no longer what it was when it was wrapped, None if it is.

        To be asked before every evaluation: a changed model needs another fingerprint, one of new storage another twin, so
        wrap it anew. Costs a look at every module and, once the fingerprint has been taken, one read of the weights.

        Returns:
            Such as ``a part of a weight``.
        """
        if self._scored is None:
            return None
        scored, stamp, _ = self._scored
        if (seen := stamp.change_in(scored)) is not None:
            return seen
        # A few entries written through ``p.data`` leave no trace: one neuron that is switched off, one fact that is edited.
        taken = vars(self).get("fingerprint")
        return "a part of a weight" if taken is not None and fingerprint(scored) != taken else None

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, see :func:`~lm_eval_coupling.residual.fingerprint.fingerprint`."""
        return fingerprint(self._wrapped()[0])

    @cached_property
    @made_on_host()
    def identity(self) -> str:
        """What measurements of this model are kept under: :attr:`fingerprint`, and what the model gives for the probe."""
        return f"{self.fingerprint}-{digest(self._wrapped()[2])}"

    def _wrapped(self) -> tuple[nn.Module, Stamp, Tensor]:
        if self._scored is None:
            raise CouplingError(
                "got a model that was not made by ResidualModel.wrap, expected one with known weights"
            )
        return self._scored

    @property
    def device(self) -> torch.device:
        """Where the stream begins: the device of the first weight, that of the embeddings."""
        return next(
            t.device for t in itertools.chain(self.model.parameters(), self.model.buffers())
        )

    @property
    def devices(self) -> list[torch.device]:
        """Those that the blocks lie on, each once."""
        return list(dict.fromkeys(block.device for block in self.block_list))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def encode(self, prompt: str | Tensor) -> Sequence[int]:
        """Token ids of a text with the tokenizer's own special tokens; the numbers that name the tokens of an image.

        Args:
            prompt: text, or of an image classifier pixel values, [channel, height, width] or with a 1 before.

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
        """An image as a prompt; one forward pass tells how many tokens images of its size have.

        Args:
            pixels: pixel values [channel, height, width], floating point.
            load: called for them when they are needed; without it they are kept.

        Returns:
            What stands for the image wherever token ids are asked for.
        """
        pixels = pixels_of(pixels)
        if (shape := pixels.shape) not in self._seq_of:
            self._seq_of[shape] = self.trace(pixels).resid_final.shape[1]
        return ImageTokens(pixel_digest(pixels), self._seq_of[shape], load or (lambda: pixels))

    @exact_arithmetic()
    def trace(
        self,
        tokens: Sequence[int] | Tensor,
        dtype: torch.dtype = torch.float32,
        output_token: int | None = None,
        direction: Direction | None = None,
    ) -> ResidualTrace:
        """One forward pass in ``dtype``, upcasting bf16 or fp16 weights one block at a time.

        Args:
            tokens: token ids of one prompt, [seq] or [1, seq].
            dtype: ``torch.float32`` or ``torch.float64``.
            output_token: token t whose Jacobians will be wanted; blocks then keep what a step of decoding needs of them.
            direction: (layer, like) → u; blocks are then pulled back, uᵀ ∂F_t/∂X, on the way through a short prompt.

        Returns:
            Every block's call and the stream after the last block; the language-model head is not run.
        """
        return self._traces(
            [tokens], dtype, None if output_token is None else [output_token], direction
        )[0]

    @exact_arithmetic()
    def traces(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> list[ResidualTrace]:
        """:meth:`trace` of several prompts in one pass, padded on the right, where no token of a causal model sees it.

        Prompts are traced one by one where the model takes arguments that are not known to be padded that way, or where a
        padded pass, tried once, gives another stream than a plain one.

        Returns:
            One for each prompt, in order, without the padding.
        """
        if len(prompts) > 1 and self._pads_on_the_right(dtype):
            return self._traces(prompts, dtype, output_tokens, direction)
        tokens = [None] * len(prompts) if output_tokens is None else output_tokens
        return [
            self.trace(prompt, dtype, token, direction)
            for prompt, token in zip(prompts, tokens, strict=True)
        ]

    def _pads_on_the_right(self, dtype: torch.dtype) -> bool:
        if self._padding_is_harmless is None:
            self._padding_is_harmless = self._succeeds(self._padding_agrees, dtype)
        return self._padding_is_harmless

    def _is_decoding(self, dtype: torch.dtype) -> bool:
        """Whether every block's derivative by its own token is also that of a step of decoding, which is tried once."""
        if self._decodes is None:
            self._decodes = self.inputs.causal and self._succeeds(self._decoding_agrees, dtype)
        return self._decodes

    def _succeeds(self, trial: Callable[[torch.dtype], bool], dtype: torch.dtype) -> bool:
        """What a trial on prompts of its own says, False where it fails, whatever the first block is given meanwhile."""
        change, self._change = (
            self._change,
            None,
        )  # which may be meant for prompts of one length only
        try:
            return trial(dtype)
        except Exception as error:
            pass_on_lack_of_memory(error)
            return False
        finally:
            self._change = change

    def _padding_agrees(self, dtype: torch.dtype) -> bool:
        prompts = self.inputs.several
        padded = self._traces(prompts, dtype)
        if any(set(_tensors_by_name(call)) - _BATCHABLE for call in padded[0].calls):
            return False
        alone = [self.trace(prompt, dtype) for prompt in prompts]
        streams = [(a.trajectory(-1), b.trajectory(-1)) for a, b in zip(padded, alone, strict=True)]
        return all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in streams
        )

    def _decoding_agrees(self, dtype: torch.dtype) -> bool:
        calls = self._traces([[*range(1, 8)]], dtype, keep_keys=True)[0].calls
        return all(map(_decodes_rightly, calls))

    @torch.no_grad()
    def _traces(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
        keep_keys: bool = False,
    ) -> list[ResidualTrace]:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CouplingError(
                f"got dtype={shown(dtype)}, expected torch.float32 or torch.float64"
            )
        batch = self.inputs.batch(prompts, self.device, dtype)
        keep_keys = keep_keys or (output_tokens is not None and self._is_decoding(dtype))
        if keep_keys and max(batch.lengths or [0]) >= _LONG:
            direction = None
        wanted: dict[str, Any] = {
            "tokens": output_tokens,
            "direction": direction,
            "shared": OnePass(),
        }
        traced = [
            TracedBlock(block, dtype, cache=Cache() if keep_keys else None, **wanted)
            for block in self.block_list
        ]
        final: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._left_behind.clear)
            stack.enter_context(upcast(self._outside_weights, dtype))
            stack.enter_context(rows_only(self._tables, dtype))
            stack.enter_context(arithmetic(dtype))
            stack.callback(
                self.blocks[0].register_forward_pre_hook(self._changed, with_kwargs=True).remove
            )
            for block, one in zip(self.blocks, traced, strict=True):

                def after(
                    module: nn.Module,
                    args: tuple,
                    kwargs: dict[str, Any],
                    output: Any,
                    one: TracedBlock = one,
                ) -> Any:
                    output = one.leave(kwargs, output)
                    self._outputs = len(output) if isinstance(output, (tuple, list)) else 0
                    if one.block.layer == self.n_layers - 1:
                        final.append(hidden(output))
                        raise _LastBlockDone
                    return output

                stack.callback(one.close)
                stack.callback(block.register_forward_pre_hook(one.enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            with contextlib.suppress(_LastBlockDone), told_if_refused(batch.arguments, traced[0]):
                self.model(**batch.arguments)
        if missed := [one.block.layer for one in traced if one.call is None]:
            raise CouplingError(
                f"got a model that leaves out block {missed[0]}, expected a stream through every block"
            )
        self.d_model = final[0].shape[-1]
        lengths = batch.lengths or [final[0].shape[1]] * len(final[0])
        return [
            ResidualTrace(
                tuple(one.of_prompt(prompt, length) for one in traced),
                final[0][prompt : prompt + 1, :length],
            )
            for prompt, length in enumerate(lengths)
        ]

    @contextlib.contextmanager
    def first_block_given(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, traces give the first block ``change(X)`` in place of its input X [prompt, seq, d_model]."""
        self._change = change
        try:
            yield
        finally:
            self._change = None

    def _changed(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the first block during a trace: calls replayed later have the change in their input."""
        if self._change is None:
            return None
        if args:
            return (self._change(args[0]), *args[1:]), kwargs
        name = self.block_list[0].stream_name
        return args, kwargs | {name: self._change(kwargs[name])}

    @exact_arithmetic()
    @torch.no_grad()
    def logits(
        self, resid: Float[Tensor, "*prompt points d_model"]
    ) -> Float[Tensor, "*prompt points vocabulary"]:
        """What the model would predict from these vectors after its last block (logit lens): its own final norm and head.

        Vectors of several prompts of a language model take one pass.

        The model runs with its blocks left out, so that scales and soft-caps are whatever it does with them. In the dtype
        of ``resid``; a head of another dtype is cast a part at a time.

        Returns:
            In the dtype of ``resid``.
        """
        return self._lens.logits(vectors(resid, self.d_model), self._outputs)

    @exact_arithmetic()
    def norm_jacobian(self, resid: Float[Tensor, " d_model"]) -> Float[Tensor, "d_model d_model"]:
        """∂norm(x)/∂x, norm being all that the model does between its last block and its head; I where that is nothing."""
        return self._lens.norm_jacobian(vectors(resid, self.d_model, alone=True), self._outputs)

    @property
    def has_independent_blocks(self) -> bool:
        """True if blocks share no module or tensor and call no hook of the user's."""
        return are_independent(self.block_list)

    def answer(self, stream: Float[Tensor, "1 seq d_model"]) -> Tensor:
        """What the model says of ``inputs.probe`` once it has ended as ``stream``; it can be differentiated."""
        return self._lens.answer(stream, self._outputs)

    def _outside_blocks(self) -> list[Tensor]:
        """What is used whole before the first block: position tables, but no table of words, and not the head."""
        inside = {id(t) for block in self.block_list for t in block.weights}
        tables = {id(table.weight) for table in self._tables.values()}
        words = (
            {id(t) for t in state_of(self.model.get_input_embeddings())} - tables
            if self.inputs.causal
            else set()
        )
        head = self.model.get_output_embeddings() if self.inputs.causal else None
        inside |= tables | ({id(t) for t in state_of(head)} - words if head is not None else set())
        return [t for t in state_of(self.model) if id(t) not in inside]


def _decodes_rightly(call: BlockCall) -> bool:
    token, u = (
        call.seq // 2,
        torch.randn(call.resid_pre.shape[-1], generator=torch.Generator().manual_seed(0)),
    )
    if has_float64(
        call.resid_pre.device
    ):  # beside the identity little may be left of what a block adds
        call = call.in_dtype(torch.float64)
    u = u.to(call.resid_pre)
    with call.ready():
        (found,), expected = (
            call.batch_with([]).pull_back_decoding([u], [token]),
            call.pulled_back(u, token)[token] - u,
        )
    return torch.allclose(found - u, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def _tensors_by_name(call: BlockCall) -> list[str]:
    """Names of the tensors among a call's arguments; of those without a name, only a square mask is known."""
    unnamed = [
        "" if t.dim() > 1 and t.shape[-1] == t.shape[-2] else "?"
        for t in tensors_in(call.arguments.args)
    ]
    by_name = [name for name, value in call.arguments.kwargs.items() if tensors_in(value)]
    return [*(name for name in unnamed if name), *by_name]
