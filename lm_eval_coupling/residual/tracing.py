"""Forward passes of the measuring module tree that keep every block's call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory, shown
from lm_eval_coupling.numerics.devices import has_float64
from lm_eval_coupling.numerics.pass_threads import PassThreads
from lm_eval_coupling.residual.arguments import SharedArguments, tensors_in
from lm_eval_coupling.residual.arithmetic import arithmetic
from lm_eval_coupling.residual.block import Block, PassState
from lm_eval_coupling.residual.block_call import BlockCall
from lm_eval_coupling.residual.inputs import Inputs
from lm_eval_coupling.residual.keys import Cache
from lm_eval_coupling.residual.trace import (
    Direction,
    ResidualTrace,
    TracedBlock,
    explain_refused_inputs,
)
from lm_eval_coupling.residual.vocabulary import rows_only
from lm_eval_coupling.residual.weights import upcast

# Tensor arguments of blocks whose layout in a padded batch is known.
_BATCHABLE = {
    "attention_mask",
    "position_ids",
    "cache_position",
    "position_embeddings",
    "relative_position_bias",
}
LONG = 64  # tokens from which on a block is pulled back by a step of decoding after the pass


class _LastBlockDone(Exception):
    """The last block has run; nothing after it is needed."""


class Tracer:
    """Runs prompts through the blocks, several in one padded pass where that changes nothing.

    Attributes:
        outputs: number of things that a block returns as a tuple, 0 for a plain tensor.
        d_model: width of the stream, known after the first pass.
        pads: whether prompts may share a pass; None until it was tried.
        decodes: whether a step of decoding is the block at one token; None until it was tried.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        *,
        inputs: Inputs,
        tables: dict[nn.Module, nn.Embedding],
        outside: Sequence[Tensor],
    ) -> None:
        self.model, self.blocks, self.inputs = model, list(blocks), inputs
        self.tables, self.outside = tables, outside
        inside = {id(part) for block in self.blocks for part in block.module.modules()}
        self.before = PassState(part for part in model.modules() if id(part) not in inside)
        self.outputs = self.d_model = 0
        self.pads: bool | None = None
        self.first_input: Callable[[Tensor], Tensor] | None = None
        self.decodes: bool | None = None
        self.pass_threads = PassThreads()

    @property
    def device(self) -> torch.device:
        """Device of the first weight: the stream begins there."""
        return next(itertools.chain(self.model.parameters(), self.model.buffers())).device

    def trace(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype,
        output_tokens: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> list[ResidualTrace]:
        """Return a trace per prompt: of one padded pass if the model allows it, else one by one.

        Equal prompts at several output tokens are run once.
        """
        equal = equal_prompts(prompts)
        together = len(equal) > 1 and self._pads_on_the_right(dtype)
        traces: dict[int, ResidualTrace] = {}
        for group in [equal] if together else [[indices] for indices in equal]:
            tokens = None
            if output_tokens is not None:
                tokens = [[output_tokens[i] for i in indices] for indices in group]
            of_group = self.run([prompts[i[0]] for i in group], dtype, tokens, direction)
            for indices, of_prompt in zip(group, of_group, strict=True):
                traces |= dict(zip(indices, itertools.cycle(of_prompt), strict=False))
        return [traces[i] for i in range(len(prompts))]

    def _pads_on_the_right(self, dtype: torch.dtype) -> bool:
        if self.pads is None:
            self.pads = self._succeeds(self._padding_agrees, dtype)
        return self.pads

    def _is_decoding(self, dtype: torch.dtype) -> bool:
        """Return whether a step of decoding has every block's derivative by its own token."""
        if self.decodes is None:
            self.decodes = self.inputs.causal and self._succeeds(self._decoding_agrees, dtype)
        return self.decodes

    def _succeeds(self, trial: Callable[[torch.dtype], bool], dtype: torch.dtype) -> bool:
        """Run a trial on prompts of its own; False if it fails."""
        # The changed first input may be meant for prompts of one length only.
        first_input, self.first_input = self.first_input, None
        try:
            return trial(dtype)
        except Exception as error:
            pass_on_lack_of_memory(error)
            return False
        finally:
            self.first_input = first_input

    def _padding_agrees(self, dtype: torch.dtype) -> bool:
        prompts = self.inputs.several
        padded = [trace for (trace,) in self.run(prompts, dtype)]
        if any(set(_tensors_by_name(call)) - _BATCHABLE for call in padded[0].calls):
            return False
        alone = [self.run([prompt], dtype)[0][0] for prompt in prompts]
        streams = [(a.trajectory(-1), b.trajectory(-1)) for a, b in zip(padded, alone, strict=True)]
        return all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in streams
        )

    def _decoding_agrees(self, dtype: torch.dtype) -> bool:
        calls = self.run([[*range(1, 8)]], dtype, keep_keys=True)[0][0].calls
        return all(map(_decodes_rightly, calls))

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Any],
        dtype: torch.dtype,
        output_tokens: Sequence[Sequence[int]] | None = None,
        direction: Direction | None = None,
        keep_keys: bool = False,
    ) -> list[list[ResidualTrace]]:
        """Return a trace per prompt and output token (or one), from a pass padded on the right.

        Raises:
            CouplingError: if the model leaves out a block, or does not take the prompts.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CouplingError(
                f"got dtype={shown(dtype)}, expected torch.float32 or torch.float64"
            )
        batch = self.inputs.batch(prompts, self.device, dtype)
        keep_keys = keep_keys or (output_tokens is not None and self._is_decoding(dtype))
        seq, turns = max(batch.lengths or [0]), _by_turns(output_tokens or ())
        # The pullbacks of several tokens are held together: no more of them than Jacobians.
        is_much = len(turns) > 1 and len(turns) * seq > self.d_model
        if is_much or (keep_keys and seq >= LONG):
            direction = None
        shared = SharedArguments()
        counts = [len(tokens) for tokens in output_tokens or ([0] for _ in prompts)]
        traced = [
            TracedBlock(
                block,
                dtype,
                tokens=turns,
                direction=direction,
                shared=shared,
                cache=Cache() if keep_keys else None,
            )
            for block in self.blocks
        ]
        with self._hooked(traced, dtype), self._threads(direction):
            with contextlib.suppress(_LastBlockDone):
                with explain_refused_inputs(batch.arguments, traced[0]):
                    self.model(**batch.arguments)
        if missed := [block.block.layer for block in traced if block.call is None]:
            raise CouplingError(
                f"got a model that leaves out block {missed[0]}, expected a stream through every "
                "block"
            )
        final = traced[-1].resid_post
        self.d_model = final.shape[-1]
        lengths = batch.lengths or [final.shape[1]] * len(final)
        return [
            [
                ResidualTrace(
                    tuple(block.of_prompt(prompt, length, number) for block in traced),
                    final[prompt : prompt + 1, :length],
                )
                for number in range(count)
            ]
            for prompt, (length, count) in enumerate(zip(lengths, counts, strict=True))
        ]

    def _threads(self, direction: Direction | None) -> contextlib.AbstractContextManager[None]:
        """Watch how busy the machine is, and limit the threads of a pass without derivatives."""
        if self.device.type != "cpu":
            return contextlib.nullcontext()
        # Other threads would round derivatives in another order. Long prompts alone go without:
        # their values have the same bits with any number of threads.
        alone = direction is not None
        return self.pass_threads.watched() if alone else self.pass_threads.limited()

    @contextlib.contextmanager
    def _hooked(self, traced: Sequence[TracedBlock], dtype: torch.dtype) -> Iterator[None]:
        """Hold what lies outside the blocks in ``dtype``, and hook every block."""

        def after(
            block: TracedBlock, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
        ) -> Any:
            output = block.leave(args, kwargs, output)
            self.outputs = len(output) if isinstance(output, tuple | list) else 0
            if block is traced[-1]:
                raise _LastBlockDone
            return output

        with contextlib.ExitStack() as stack:
            stack.callback(self._restore)
            stack.enter_context(upcast(self.outside, dtype))
            stack.enter_context(rows_only(self.tables, dtype))
            stack.enter_context(arithmetic(dtype))
            self._remove_hooks()  # Ctrl-C may have ended an earlier pass while it added them.
            stack.callback(self._remove_hooks)
            for block in traced:
                module = block.block.module
                stack.callback(block.close)
                # Before the user's own hooks: they belong to the block, and run in every replay.
                module.register_forward_pre_hook(block.enter, prepend=True, with_kwargs=True)
                module.register_forward_hook(partial(after, block), with_kwargs=True)
            self.blocks[0].module.register_forward_pre_hook(
                self._change_first_input, prepend=True, with_kwargs=True
            )
            yield

    def _remove_hooks(self) -> None:
        """Take the hooks of a pass off the blocks, however it has ended."""
        for block in self.blocks:
            module = block.module
            for hooks, with_kwargs in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
                (module._forward_hooks, module._forward_hooks_with_kwargs),
            ):
                for key in [key for key, hook in hooks.items() if _is_of_a_pass(hook)]:
                    del hooks[key]
                    with_kwargs.pop(key, None)

    def _restore(self) -> None:
        if self.before.restore():  # what one prompt leaves there, another one would find
            self.pads = False

    def _change_first_input(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Change the first block's input; calls replayed later have the change in their input."""
        if self.first_input is None:
            return None
        if args:
            return (self.first_input(args[0]), *args[1:]), kwargs
        name = self.blocks[0].stream_name
        return args, kwargs | {name: self.first_input(kwargs[name])}


def _is_of_a_pass(hook: Any) -> bool:
    owner = hook.args[0] if isinstance(hook, partial) and hook.args else None
    return isinstance(getattr(hook, "__self__", owner), TracedBlock | Tracer)


def equal_prompts(prompts: Sequence[Any]) -> list[list[int]]:
    """Return groups of indices of equal lists of token ids, in the order of their first prompts.

    Any other prompt is equal only to itself.
    """
    groups: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        # Not `isinstance(…, int)`: True equals 1, and is refused as a token id.
        plain = isinstance(prompt, list | tuple) and all(type(token) is int for token in prompt)
        key = tuple(prompt) if plain else id(prompt)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _by_turns(tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return lists with one token of each prompt: its first, its second; its last where it ends."""
    most = max(map(len, tokens), default=0)
    return [[own[min(turn, len(own) - 1)] for own in tokens] for turn in range(most)]


def _decodes_rightly(call: BlockCall) -> bool:
    token = call.seq // 2
    u = torch.randn(call.resid_pre.shape[-1], generator=torch.Generator().manual_seed(0))
    if has_float64(call.resid_pre.device):
        # Beside the identity little may be left of what a block adds.
        call = call.in_dtype(torch.float64)
    u = u.to(call.resid_pre)
    with call.ready():
        decoded = call.batch_with([]).pull_back_decoding([u], [token])[0] - u
        expected = call.pulled_back(u, token)[token] - u
    return torch.allclose(decoded, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def _tensors_by_name(call: BlockCall) -> list[str]:
    """Name the tensors among a call's arguments; of unnamed ones only a square mask is known."""
    unnamed = [
        "" if t.dim() > 1 and t.shape[-1] == t.shape[-2] else "?"
        for t in tensors_in(call.arguments.args)
    ]
    named = [name for name, value in call.arguments.kwargs.items() if tensors_in(value)]
    return [*(name for name in unnamed if name), *named]
