"""A language model as a stream of residual blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.precision import exact_arithmetic
from lm_eval_coupling.residual.arguments import Keys
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.block_call import BlockCall, hidden
from lm_eval_coupling.residual.trace import Direction, ResidualTrace, Visit
from lm_eval_coupling.residual.twin import (
    PROBE,
    logits_of,
    output_of,
    refuse_unsupported,
    require_close,
    runs_as_it_stands,
    split_joints_again,
    state_of,
    take_caches_as_named_now,
    twin_of,
)
from lm_eval_coupling.residual.weights import present, upcast

# Tensors that a block takes, "" for those without a name, of which it is known what they are in a padded batch.
_BATCHABLE = {"", "attention_mask", "position_ids", "cache_position", "position_embeddings"}
_LONG = 64  # tokens from which on a block is pulled back by one more step of decoding, not on the way through the sequence


class _LastBlockDone(Exception):
    pass


class ResidualModel:
    """A language model as a stack of residual blocks (build one with :meth:`wrap`).

    Attributes: ``bridge`` (the TransformerBridge), ``blocks`` (the bridged transformers blocks), ``n_layers``, ``d_model``,
    ``n_heads``, ``n_params``, ``device``, ``dtype`` (of the weights), ``tokenizer`` (may be ``None``).
    """

    def __init__(self, bridge: nn.Module, n_params: int, tokenizer: Any = None) -> None:
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.model = bridge.original_model
        self.blocks = [block.original_component for block in bridge.blocks]
        self.n_layers = len(self.blocks)
        self.d_model = bridge.cfg.d_model
        self.n_heads = bridge.cfg.n_heads
        self._block_weights = [state_of(block) for block in self.blocks]
        self._outside_weights = self._outside_blocks()
        self.n_params = n_params
        self._change: Callable[[Tensor], Tensor] | None = None
        self._padding_is_harmless: bool | None = None  # not tried yet
        self._outputs = 0  # how many things a block returns as a tuple, 0 for a plain tensor; every trace tells
        self._decodes: bool | None = None

    @classmethod
    @exact_arithmetic()
    def wrap(cls, hf_model: nn.Module, tokenizer: Any = None) -> ResidualModel:
        """Boot a TransformerBridge on a copy of ``hf_model``'s module tree over the same weights.

        Args:
            hf_model: a causal transformers model (a PEFT wrapper is looked through); it stays untouched.
            tokenizer: needed only where prompts are given as strings.

        Returns:
            The wrapped model, in evaluation mode. Costs under a second and some megabytes.

        Raises:
            CouplingError: if TransformerLens has no adapter for the architecture, or its blocks are no residual stream.
        """
        base = hf_model.get_base_model() if hasattr(hf_model, "peft_config") else hf_model
        refuse_unsupported(base)
        twin = twin_of(base)
        name, runs = type(twin).__name__, runs_as_it_stands(twin)
        n_params = sum(p.numel() for p in twin.parameters())  # the bridge adds the parts of joint projections
        names = {id(module): name for name, module in twin.named_modules()}
        eager = logits_of(twin) if runs else None
        if runs and not base.training:  # dropout; other attention kernels round differently, Falcon's ALiBi by 3e-3
            require_close("logits", name, eager, logits_of(base), tolerance=5e-2)
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        try:
            bridge = build_bridge_from_module(twin, name, hf_config=twin.config, tokenizer=None)
        except Exception as error:
            raise CouplingError(
                f"got a {name}, which TransformerLens cannot bridge ({type(error).__name__}: {error}); "
                "score it with --model hf, or with coupling_limit=0"
            ) from error
        split_joints_again(bridge)
        take_caches_as_named_now(bridge)
        model = cls(bridge, n_params, tokenizer)
        if runs:
            low_precision = model.dtype not in (torch.float32, torch.float64)
            require_close("logits", name, logits_of(model.model), eager, tolerance=5e-2 if low_precision else 1e-3)
        stream = model._check(base)
        if not runs and not base.training:  # packed layers may also round what they are given
            last = base.get_submodule(names[id(model.blocks[-1])])
            require_close("a residual stream", name, stream, output_of(base, last, model.device), tolerance=0.25)
        return model

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` with the tokenizer's own special tokens.

        Raises:
            CouplingError: if the model was wrapped without a tokenizer.
        """
        if self.tokenizer is None:
            raise CouplingError(
                "got a prompt given as text and a model wrapped without a tokenizer; "
                "pass tokenizer=… to ResidualModel.wrap, or give the prompt as token ids"
            )
        return list(self.tokenizer.encode(text))

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
        return self._traces([tokens], dtype, None if output_token is None else [output_token], direction)[0]

    @exact_arithmetic()
    def traces(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        dtype: torch.dtype = torch.float32,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> list[ResidualTrace]:
        """:meth:`trace` of several prompts in one pass, padded on the right, where no token of a causal model sees it.

        Prompts are traced one by one where the model takes arguments that are not known to be padded that way, or where a
        padded pass, tried once, gives another stream than a plain one.
        """
        if len(prompts) > 1 and self._pads_on_the_right(dtype):
            return self._traces(prompts, dtype, output_tokens, direction)
        tokens = [None] * len(prompts) if output_tokens is None else output_tokens
        return [self.trace(prompt, dtype, token, direction) for prompt, token in zip(prompts, tokens, strict=True)]

    def _pads_on_the_right(self, dtype: torch.dtype) -> bool:
        if self._padding_is_harmless is None:
            self._padding_is_harmless = self._succeeds(self._padding_agrees, dtype)
        return self._padding_is_harmless

    def _is_decoding(self, dtype: torch.dtype) -> bool:
        """Whether every block's derivative by its own token is also that of a step of decoding, which is tried once."""
        if self._decodes is None:
            self._decodes = self._succeeds(self._decoding_agrees, dtype)
        return self._decodes

    def _succeeds(self, trial: Callable[[torch.dtype], bool], dtype: torch.dtype) -> bool:
        """What a trial on prompts of its own says, False where it fails, whatever the first block is given meanwhile."""
        change, self._change = self._change, None  # which may be meant for prompts of one length only
        try:
            return trial(dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        finally:
            self._change = change

    def _padding_agrees(self, dtype: torch.dtype) -> bool:
        prompts = [[1, 2, 3], [4] * 21]
        padded = self._traces(prompts, dtype)
        if any(set(_tensors_by_name(call)) - _BATCHABLE for call in padded[0].calls):
            return False
        alone = [self.trace(prompt, dtype) for prompt in prompts]
        streams = [(a.trajectory(-1), b.trajectory(-1)) for a, b in zip(padded, alone, strict=True)]
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max()) for a, b in streams)

    def _decoding_agrees(self, dtype: torch.dtype) -> bool:
        calls = self._traces([[*range(1, 8)]], dtype, keep_keys=True)[0].calls
        return all(map(_decodes_rightly, calls))

    @torch.no_grad()
    def _traces(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        dtype: torch.dtype,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
        keep_keys: bool = False,
    ) -> list[ResidualTrace]:
        rows = [torch.as_tensor(tokens, dtype=torch.long, device=self.device).flatten() for tokens in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        keep_keys = keep_keys or (output_tokens is not None and self._is_decoding(dtype))
        if keep_keys and ids.shape[1] >= _LONG:
            direction = None
        visits = [
            Visit(layer, self._block_weights[layer], dtype, output_tokens, direction, Keys() if keep_keys else None)
            for layer in range(self.n_layers)
        ]
        final: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(upcast(self._outside_weights, dtype))
            stack.enter_context(arithmetic(dtype))
            stack.callback(self.blocks[0].register_forward_pre_hook(self._changed, with_kwargs=True).remove)
            for block, visit in zip(self.blocks, visits, strict=True):

                def after(module, args, kwargs, output, visit=visit):
                    output = visit.leave(output)
                    self._outputs = len(output) if isinstance(output, tuple) else 0
                    if visit.layer == self.n_layers - 1:
                        final.append(hidden(output))
                        raise _LastBlockDone
                    return output

                stack.callback(visit.close)
                stack.callback(block.register_forward_pre_hook(visit.enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            with contextlib.suppress(_LastBlockDone):
                self.model(ids, use_cache=False)
        return [
            ResidualTrace(
                tuple(visit.of_prompt(prompt, len(row)) for visit in visits), final[0][prompt : prompt + 1, : len(row)]
            )
            for prompt, row in enumerate(rows)
        ]

    @contextlib.contextmanager
    def first_block_given(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, traces give the first block ``change(X)`` in place of its input X [prompt, seq, d_model]."""
        self._change = change
        try:
            yield
        finally:
            self._change = None

    def _changed(self, module, args, kwargs):
        """Forward pre-hook of the first block during a trace: calls replayed later have the change in their input."""
        if self._change is None:
            return None
        if args:
            return (self._change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._change(kwargs["hidden_states"])}

    @exact_arithmetic()
    @torch.no_grad()
    def logits(self, resid: Float[Tensor, "points d_model"]) -> Float[Tensor, "points vocabulary"]:
        """What the model would predict from these vectors after its last block (logit lens): its own final norm and head.

        The model runs with its blocks left out, so that scales and soft-caps are whatever it does with them. In the dtype
        of ``resid``; a head of another dtype is upcast for the time of the call.
        """
        head = self.model.get_output_embeddings()
        hidden = resid[None].to(head.weight.device)
        stand_in = (hidden, *[None] * (self._outputs - 1)) if self._outputs else hidden
        weights = {id(t): t for t in [*self._outside_weights, *state_of(head)]}
        with contextlib.ExitStack() as stack:
            stack.enter_context(upcast([*weights.values()], resid.dtype))
            stack.enter_context(arithmetic(resid.dtype))
            for block in self.blocks:
                stack.callback(vars(block).update, {k: v for k, v in vars(block).items() if k == "forward"})
                stack.callback(vars(block).pop, "forward")
                block.forward = lambda *args, **kwargs: stand_in
            ids = torch.zeros(1, len(resid), dtype=torch.long, device=self.device)
            return self.model(ids, use_cache=False).logits[0]

    def _outside_blocks(self) -> list[Tensor]:
        """Embeddings and position tables, but not an untied head: it is never run."""
        inside = {id(t) for weights in self._block_weights for t in weights}
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:
            inside |= {id(t) for t in state_of(head)}
        return [t for t in state_of(self.model) if id(t) not in inside]

    def _check(self, original: nn.Module) -> Tensor:
        """Load-time checks: weights still shared, and a stream that is carried from block to block; returns its end."""
        shared = {p.data_ptr() for p in self.model.parameters()}
        processed = [name for name, p in present(original) if p.data_ptr() not in shared]
        if processed:
            raise CouplingError(
                f"got {len(processed)} weights that the bridge replaced (first: {processed[0]}), expected shared storage; "
                "do not fold norms or use compatibility mode"
            )
        for layer, block in enumerate(self.blocks):
            if len(devices := {p.device for p in block.parameters()}) > 1:
                raise CouplingError(
                    f"got block {layer} spread over {sorted(map(str, devices))}, expected each block on one device; "
                    "keep blocks whole in the device_map"
                )
        trace = self.trace(PROBE, torch.float32)
        streams = [call.resid_pre for call in trace.calls] + [trace.resid_final]
        for call, following in zip(trace.calls, streams[1:], strict=True):
            with torch.no_grad(), call.ready():
                output = call(call.resid_pre)
            if not torch.isfinite(output).all():
                break  # weights that are not finite are reported prompt by prompt, the score is kept
            if output.shape != call.resid_pre.shape or not torch.allclose(
                output, following.to(output), rtol=1e-3, atol=1e-4
            ):
                raise CouplingError(
                    f"got a {type(original).__name__} whose block {call.layer} does not hand its output on as the next "
                    "block's input, expected a residual stream; score it with --model hf"
                )
        return trace.resid_final


def _decodes_rightly(call: BlockCall) -> bool:
    token, u = call.seq // 2, torch.randn(call.resid_pre.shape[-1], generator=torch.Generator().manual_seed(0))
    u = u.to(call.resid_pre)
    with call.ready():
        (found,), expected = call.pulled_back_decoding([call], [u], [token]), call.pulled_back(u, token)[token]
    return found is not None and torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def _tensors_by_name(call: BlockCall) -> list[str]:
    """Names of the tensors among a call's arguments; of those without a name, only a square mask is known."""
    unnamed = ["" if value.shape[-1] == value.shape[-2] else "?" for value in call.args if isinstance(value, Tensor)]
    return [*unnamed, *(name for name, value in call.kwargs.items() if isinstance(value, Tensor))]
