"""The residual stream of a transformers model, block by block, through TransformerLens.

A :class:`ResidualModel` is a `TransformerBridge` booted on a *second module tree* that shares the weights of the model it
wraps: the wrapped model keeps its own attention implementation and its outputs stay bit-identical. Only this module knows
TransformerLens and, with weights.py, transformers; the mathematics sees :class:`BlockCall` objects.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.weights import is_absent, present, sharing, split_again, unreadable, upcast, without_hooks

# Tensors that a block takes, "" for those without a name, of which it is known what they are in a padded batch.
_BATCHABLE = {"", "attention_mask", "position_ids", "cache_position", "position_embeddings"}
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_LONG = 64  # tokens from which on a block is differentiated as one more step of decoding, not through the whole sequence


class TrueDtype(TorchFunctionMode):
    """Turns hard-coded float32 steps (norms, softmax, rotary embeddings) into ``dtype``.

    transformers casts these steps to float32 whatever the model's dtype, so that a "float64" derivative of an unmodified
    model is off by up to 3e-7. Needed only for float64: float32 arithmetic is what the casts ask for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0] if args[0].is_floating_point() else args[0].to(self.dtype)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = self.dtype
        return func(*(self.dtype if a is torch.float32 else a for a in args), **kwargs)


def _arithmetic(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return TrueDtype(dtype) if dtype == torch.float64 else contextlib.nullcontext()


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """One block together with the arguments it was called with, ready to be called again.

    ``resid_pre`` is the block's input X^{l-1}, shape [1, seq, d_model]. ``pullback`` is uᵀ ∂F_t / ∂X, taken on the way for
    the token t that the trace was told of, u being :attr:`probe`; in long prompts, ``keys`` are the keys and values that
    the block handed to its cache instead. Calls must be made inside :meth:`ready`.
    """

    layer: int
    module: nn.Module
    weights: Sequence[Tensor]
    resid_pre: Float[Tensor, "1 seq d_model"]
    args: tuple
    kwargs: dict[str, Any]
    pullback: tuple[int, Float[Tensor, "seq d_model"]] | None = None
    keys: _Keys | None = None

    @property
    def probe(self) -> Float[Tensor, " d_model"]:
        """The fixed random direction u that this layer's Jacobian is checked along."""
        generator = torch.Generator().manual_seed(self.layer)
        u = torch.randn(self.resid_pre.shape[-1], generator=generator, dtype=torch.float64)
        return u.to(self.resid_pre)

    def pulled_back(self, output_token: int, input_token: int) -> Float[Tensor, " d_model"]:
        """uᵀ ∂F_{output} / ∂x_{input}: reverse mode through the whole block."""
        if self.pullback is not None and self.pullback[0] == output_token:
            return self.pullback[1][input_token]
        if self.keys is not None and output_token == input_token:
            return self._pulled_back_decoding(output_token)
        return self.pulled_back_to_all(output_token)[input_token]

    def pulled_back_to_all(self, output_token: int) -> Float[Tensor, "seq d_model"]:
        """uᵀ ∂F_{output} / ∂X: :meth:`pulled_back` for every input token, in one pass through the whole sequence."""
        resid_pre = self.resid_pre.detach().requires_grad_(True)
        with torch.enable_grad():
            return _gradient(self, resid_pre, self(resid_pre), [output_token])[0]

    def _pulled_back_decoding(self, token: int) -> Float[Tensor, " d_model"]:
        """uᵀ ∂F_t / ∂x_t: the other tokens enter F_t by their keys and values alone, as when the model generates."""
        x = self.resid_pre[:, token : token + 1].detach().requires_grad_(True)
        args = tuple(_cut("", value, token, self.seq, first=0) for value in self.args)
        kwargs = {name: _cut(name, value, token, self.seq, first=0) for name, value in self.kwargs.items()}
        with torch.enable_grad():
            output = self._run(x, args, kwargs | {name: self.keys.before(token) for name in _CACHES if name in kwargs})
            return _gradient(self, x, output, [0])[0, 0]

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the call."""
        return self.resid_pre.dtype

    @property
    def seq(self) -> int:
        """Number of tokens."""
        return self.resid_pre.shape[1]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Upcast this block's weights, and only them, for as long as the context lasts."""
        with upcast(self.weights, self.dtype), _arithmetic(self.dtype):
            yield

    def __call__(self, resid_pre: Float[Tensor, "1 seq d_model"]) -> Float[Tensor, "1 seq d_model"]:
        """The block's output F^l(X) = X + f^l(X) for the whole sequence."""
        return self._run(resid_pre, self.args, self.kwargs)

    def one_token(self, x: Float[Tensor, " d_model"], token: int) -> Float[Tensor, " d_model"]:
        """Run the block on the single vector ``x`` as if it stood at position ``token`` and saw only itself."""
        return self.one_token_each([self], x[None], [token])[0]

    @staticmethod
    def one_token_each(
        calls: Sequence[BlockCall], x: Float[Tensor, "prompt d_model"], tokens: Sequence[int]
    ) -> Float[Tensor, "prompt d_model"]:
        """Run one block on one vector of each prompt, as if it stood at that prompt's token and saw only itself.

        Raises:
            ValueError: if the calls' arguments cannot be joined.
        """
        cut = [
            (
                [_cut("", value, token, call.seq) for value in call.args],
                {name: _cut(name, value, token, call.seq) for name, value in call.kwargs.items()},
            )
            for call, token in zip(calls, tokens, strict=True)
        ]
        args = [_joined(values) for values in zip(*(args for args, _ in cut), strict=True)]
        kwargs = {name: _joined([kwargs[name] for _, kwargs in cut]) for name in cut[0][1]}
        return calls[0]._run(x[:, None], tuple(args), kwargs)[:, 0]

    def one_query(self, token: int) -> Float[Tensor, "1 seq d_model"]:
        """Run the block on the whole sequence with masks cut to one query row: only row ``token`` of it may be used."""
        args = tuple(_cut_row(value, token, self.seq) for value in self.args)
        kwargs = {name: _cut_row(value, token, self.seq) for name, value in self.kwargs.items()}
        return self._run(self.resid_pre, args, kwargs)

    def _run(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return _hidden(self.module(hidden, *args, **kwargs))


def _joined(values: Sequence[Any]) -> Any:
    """The same argument of several calls as one: stacked where it differs."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(items) for items in zip(*values, strict=True))
    if not isinstance(first, Tensor):
        if any(value != first for value in values):
            raise ValueError("calls with different arguments cannot be joined")
        return first
    if first.dim() > 1 and first.shape[0] == 1:
        return torch.cat(list(values))
    if any(not torch.equal(value, first) for value in values):
        raise ValueError("calls with different arguments cannot be joined")
    return first


def _gradient(call: BlockCall, resid_pre: Tensor, output: Tensor, tokens: Sequence[int]) -> Tensor:
    """uᵀ ∂F_t / ∂X of every prompt of a batch, each at its own token t."""
    if not output.requires_grad:
        return torch.zeros_like(resid_pre)
    chosen = output[torch.arange(len(tokens)), torch.as_tensor(tokens)]
    return torch.autograd.grad((chosen * call.probe).sum(), resid_pre)[0]


def _cut(name: str, value: Any, t: int, n: int, first: int | None = None) -> Any:
    """Cut one argument of a block down to position ``t`` of ``n``, which sees the keys from ``first`` on, or itself only.

    The only table about block arguments.
    """
    first = t if first is None else first
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(name, item, t, n, first) for item in value)
    if not isinstance(value, Tensor):
        return value
    if name == "position_embeddings":
        return value[..., t : t + 1, :]
    if name in ("position_ids", "cache_position"):
        return value[..., t : t + 1]
    if name in ("alibi", "position_bias"):
        return value[..., -1:]
    if value.dim() >= 2 and value.shape[-2:] == (n, n):
        return value[..., t : t + 1, first : t + 1]
    return value


def _cut_row(value: Any, t: int, n: int) -> Any:
    square = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-2:] == (n, n)
    return value[..., t : t + 1, :] if square else value


class _Keys:
    """In place of a block's key-value cache: keeps the keys and values that it is given, or puts kept ones before them."""

    def __init__(self, kept: tuple[Tensor, Tensor] | None = None) -> None:
        self.kept, self.given = kept, None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            return tuple(torch.cat([old, new], dim=-2) for old, new in zip(self.kept, (key, value), strict=True))
        self.given = (key, value)
        return key, value

    def before(self, token: int) -> _Keys:
        return _Keys(tuple(tensor[..., :token, :] for tensor in self.given))

    def of_prompt(self, prompt: int, seq: int) -> _Keys:
        one = _Keys()
        one.given = tuple(tensor[prompt : prompt + 1, ..., :seq, :] for tensor in self.given)
        return one


def _of_prompt(name: str, value: Any, prompt: int, seq: int, padded: int) -> Any:
    """One argument of a call with a batch of prompts, ``padded`` tokens long on the right, as it is for one of them."""
    if isinstance(value, (tuple, list)):
        return type(value)(_of_prompt(name, item, prompt, seq, padded) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() > 1 and value.shape[0] > 1:
        value = value[prompt : prompt + 1]
    if name == "position_embeddings":
        return value[..., :seq, :]
    if name in ("position_ids", "cache_position"):
        return value[..., :seq]
    if value.dim() >= 2 and value.shape[-2:] == (padded, padded):
        return value[..., :seq, :seq]
    return value


def _replayable(name: str, value: Any) -> Any:
    """A block argument without side effects: replaying a call must not append to a key-value cache."""
    if name in _CACHES:
        return None
    if name == "use_cache":
        return False
    if value is None or isinstance(value, (Tensor, bool, int, float, str, tuple, list)):
        return value
    return None


@dataclasses.dataclass(frozen=True)
class ResidualTrace:
    """Every block call of one forward pass, and the stream after the last block."""

    calls: tuple[BlockCall, ...]
    resid_final: Float[Tensor, "1 seq d_model"]

    def trajectory(self, token: int) -> Float[Tensor, "layer_plus_1 d_model"]:
        """x_t^0 … x_t^L: the residual stream at one token, after every block."""
        stream = [call.resid_pre[0, token].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, token]])

    def trajectories(self, tokens: slice) -> Float[Tensor, "token layer_plus_1 d_model"]:
        """:meth:`trajectory` of several tokens."""
        stream = [call.resid_pre[0, tokens].to(self.resid_final.device) for call in self.calls]
        return torch.stack([*stream, self.resid_final[0, tokens]], dim=1)


class _Visit:
    """One block during a trace: its weights are upcast while it runs, its call is kept, and it is pulled back if wanted.

    The call and its pullback are those of the whole batch, ``tokens`` one index for each prompt of it. Its arguments are
    brought to the device that the block's weights lie on. With ``keys`` it is not pulled back: they are kept for that.
    """

    def __init__(
        self,
        layer: int,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        tokens: Sequence[int] | None,
        keys: _Keys | None = None,
    ) -> None:
        self.layer, self.weights, self.dtype, self.keys = layer, weights, dtype, keys
        self.tokens = tokens if keys is None else None
        self.gradient: Tensor | None = None
        self.open = contextlib.ExitStack()
        self.close = self.open.close

    def enter(self, module, args, kwargs):
        """Forward pre-hook: remember the call, and make its input a leaf where a derivative is wanted."""
        args, kwargs = _brought_to(self.weights[0].device, (args, kwargs))
        self.open.enter_context(upcast(self.weights, self.dtype))
        self.call = _block_call(self.layer, module, self.weights, args, kwargs)
        if self.keys is not None:
            kwargs = kwargs | {name: self.keys for name in _CACHES if name in kwargs}
        if self.tokens is None:
            return args, kwargs
        self.leaf = self.call.resid_pre.clone().requires_grad_(True)
        self.open.enter_context(torch.enable_grad())
        return ((self.leaf, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": self.leaf})

    def leave(self, output):
        """Forward hook: pull back, and hand on an output without history."""
        if self.tokens is not None:
            self.gradient = _gradient(self.call, self.leaf, _hidden(output), self.tokens)
            del self.leaf
        self.open.close()
        if isinstance(output, tuple):
            return (output[0].detach(), *output[1:])
        return output.detach()

    def of_prompt(self, prompt: int, seq: int) -> BlockCall:
        """The call as it would have been of one prompt alone, ``seq`` tokens long."""
        padded, prompts = self.call.seq, len(self.call.resid_pre)
        if prompts == 1:
            one = self.call
        else:
            one = dataclasses.replace(
                self.call,
                resid_pre=self.call.resid_pre[prompt : prompt + 1, :seq],
                args=tuple(_of_prompt("", value, prompt, seq, padded) for value in self.call.args),
                kwargs={name: _of_prompt(name, value, prompt, seq, padded) for name, value in self.call.kwargs.items()},
            )
        if self.keys is not None:
            return dataclasses.replace(one, keys=self.keys.of_prompt(prompt, seq))
        if self.tokens is None:
            return one
        return dataclasses.replace(one, pullback=(self.tokens[prompt], self.gradient[prompt, :seq]))


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
        self._block_weights = [_state(block) for block in self.blocks]
        self._outside_weights = self._outside_blocks()
        self.n_params = n_params
        self._change: Callable[[Tensor], Tensor] | None = None
        self._padding_is_harmless: bool | None = None  # not tried yet
        self._outputs = 0  # how many things a block returns as a tuple, 0 for a plain tensor; every trace tells
        self._decodes: bool | None = None

    @classmethod
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
        _refuse_unsupported(base)
        twin = _twin(base)
        name, in_place = type(twin).__name__, _in_place(twin)
        n_params = sum(p.numel() for p in twin.parameters())  # the bridge adds the parts of joint projections
        names = {id(module): name for name, module in twin.named_modules()}
        eager = _logits(twin) if in_place else None
        if in_place and not base.training:  # dropout; other attention kernels round differently, Falcon's ALiBi by 3e-3
            _close("logits", name, eager, _logits(base), tolerance=5e-2)
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        try:
            bridge = build_bridge_from_module(twin, name, hf_config=twin.config, tokenizer=None)
        except Exception as error:
            raise CouplingError(
                f"got a {name}, which TransformerLens cannot bridge ({type(error).__name__}: {error}); "
                "score it with --model hf, or with coupling_limit=0"
            ) from error
        _split_again(bridge)
        model = cls(bridge, n_params, tokenizer)
        if in_place:
            low_precision = model.dtype not in (torch.float32, torch.float64)
            _close("logits", name, _logits(model.model), eager, tolerance=5e-2 if low_precision else 1e-3)
        stream = model._check(base)
        if not in_place and not base.training:  # packed layers may also round what they are given
            last = base.get_submodule(names[id(model.blocks[-1])])
            _close("a residual stream", name, stream, _output(base, last, model.device), tolerance=0.25)
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

    def trace(
        self, tokens: Sequence[int] | Tensor, dtype: torch.dtype = torch.float32, output_token: int | None = None
    ) -> ResidualTrace:
        """One forward pass in ``dtype``, upcasting bf16 or fp16 weights one block at a time.

        Args:
            tokens: token ids of one prompt, [seq] or [1, seq].
            dtype: ``torch.float32`` or ``torch.float64``.
            output_token: token whose Jacobians will be certified; each block is then pulled back on the way.

        Returns:
            Every block's call and the stream after the last block; the language-model head is not run.
        """
        return self._traces([tokens], dtype, None if output_token is None else [output_token])[0]

    def traces(
        self,
        prompts: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        output_tokens: Sequence[int] | None = None,
    ) -> list[ResidualTrace]:
        """:meth:`trace` of several prompts in one pass, padded on the right, where no token of a causal model sees it.

        Prompts are traced one by one where the model takes arguments that are not known to be padded that way, or where a
        padded pass, tried once, gives another stream than a plain one.
        """
        if len(prompts) > 1 and self._pads_on_the_right(dtype):
            return self._traces(prompts, dtype, output_tokens)
        tokens = [None] * len(prompts) if output_tokens is None else output_tokens
        return [self.trace(prompt, dtype, token) for prompt, token in zip(prompts, tokens, strict=True)]

    def _pads_on_the_right(self, dtype: torch.dtype) -> bool:
        if self._padding_is_harmless is None:
            self._padding_is_harmless = self._try_padding(dtype)
        return self._padding_is_harmless

    def _try_padding(self, dtype: torch.dtype) -> bool:
        prompts = [[1, 2, 3], [4] * 21]
        try:
            padded = self._traces(prompts, dtype, None)
        except Exception:
            return False
        if any(set(_tensors_by_name(call)) - _BATCHABLE for call in padded[0].calls):
            return False
        alone = [self.trace(prompt, dtype) for prompt in prompts]
        streams = [(a.trajectory(-1), b.trajectory(-1)) for a, b in zip(padded, alone, strict=True)]
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max()) for a, b in streams)

    def _is_decoding(self, dtype: torch.dtype) -> bool:
        """Whether every block's derivative by its own token is also that of a step of decoding, which is tried once."""
        if self._decodes is None:
            try:
                calls = self._traces([[*range(1, 8)]], dtype, None, keep_keys=True)[0].calls
                self._decodes = all(map(_decodes_rightly, calls))
            except Exception:
                self._decodes = False
        return self._decodes

    @torch.no_grad()
    def _traces(
        self, prompts, dtype: torch.dtype, output_tokens: Sequence[int] | None, keep_keys: bool = False
    ) -> list[ResidualTrace]:
        rows = [torch.as_tensor(tokens, dtype=torch.long, device=self.device).flatten() for tokens in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        keep_keys = keep_keys or (output_tokens is not None and ids.shape[1] >= _LONG and self._is_decoding(dtype))
        visits = [
            _Visit(layer, self._block_weights[layer], dtype, output_tokens, _Keys() if keep_keys else None)
            for layer in range(self.n_layers)
        ]
        final: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(upcast(self._outside_weights, dtype))
            stack.enter_context(_arithmetic(dtype))
            stack.callback(self.blocks[0].register_forward_pre_hook(self._changed, with_kwargs=True).remove)
            for block, visit in zip(self.blocks, visits, strict=True):

                def after(module, args, kwargs, output, visit=visit):
                    output = visit.leave(output)
                    self._outputs = len(output) if isinstance(output, tuple) else 0
                    if visit.layer == self.n_layers - 1:
                        final.append(_hidden(output))
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

    @torch.no_grad()
    def logits(self, resid: Float[Tensor, "points d_model"]) -> Float[Tensor, "points vocabulary"]:
        """What the model would predict from these vectors after its last block (logit lens): its own final norm and head.

        The model runs with its blocks left out, so that scales and soft-caps are whatever it does with them. In the dtype
        of ``resid``; a head of another dtype is upcast for the time of the call.
        """
        head = self.model.get_output_embeddings()
        hidden = resid[None].to(head.weight.device)
        stand_in = (hidden, *[None] * (self._outputs - 1)) if self._outputs else hidden
        weights = {id(t): t for t in [*self._outside_weights, *_state(head)]}
        with contextlib.ExitStack() as stack:
            stack.enter_context(upcast([*weights.values()], resid.dtype))
            stack.enter_context(_arithmetic(resid.dtype))
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
            inside |= {id(t) for t in _state(head)}
        return [t for t in _state(self.model) if id(t) not in inside]

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
        trace = self.trace(_PROBE, torch.float32)
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


_PROBE = [1, 2]


def _close(what: str, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The bridge splits joint projections into copies of its own: what counts is that it computes the same function."""
    if not torch.isfinite(expected).all():
        return  # weights that are not finite are reported prompt by prompt, the score is kept
    error = ((found - expected.to(found)).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise CouplingError(
            f"got {what} off by {error:.1e} from TransformerLens' bridge of {name}, expected the model's own; "
            "score it with --model hf, or with coupling_limit=0"
        )


@torch.no_grad()
def _logits(model: nn.Module, device: torch.device | None = None) -> Tensor:
    device = device or model.get_input_embeddings().weight.device
    return model(torch.tensor([_PROBE], device=device), use_cache=False).logits.float()


def _decodes_rightly(call: BlockCall) -> bool:
    without = dataclasses.replace(call, keys=None)
    token = call.seq // 2
    with call.ready():
        found, expected = call.pulled_back(token, token), without.pulled_back(token, token)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def _tensors_by_name(call: BlockCall) -> list[str]:
    """Names of the tensors among a call's arguments; of those without a name, only a square mask is known."""
    unnamed = ["" if value.shape[-1] == value.shape[-2] else "?" for value in call.args if isinstance(value, Tensor)]
    return [*unnamed, *(name for name, value in call.kwargs.items() if isinstance(value, Tensor))]


def _output(model: nn.Module, module: nn.Module, device: torch.device) -> Tensor:
    """What ``module`` hands on in a pass of ``model``."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(_hidden(output)))
    try:
        _logits(model, device)
    finally:
        handle.remove()
    return seen[0]


def _block_call(layer: int, module: nn.Module, weights: Sequence[Tensor], args: tuple, kwargs: dict[str, Any]) -> BlockCall:
    kwargs = {name: _replayable(name, value) for name, value in kwargs.items()}
    hidden = args[0] if args else kwargs.pop("hidden_states")
    rest = tuple(_replayable("", value) for value in args[1:])
    return BlockCall(layer, module, weights, hidden.detach(), rest, kwargs)


def _twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same storage: bridging changes modules in place, scores must not move."""
    twin = without_hooks(copy.deepcopy(model, sharing(model)).eval())
    twin.config.architectures = [type(model).__name__]
    twin.set_attn_implementation("eager")
    if hasattr(twin, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            twin.set_experts_implementation("eager")
    return twin


def _refuse_unsupported(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_output_embeddings"):
        raise CouplingError(f"got a {name}, expected a decoder-only transformers language model; score it with --model hf")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise CouplingError(f"got a {name}, an encoder, expected a decoder-only language model; score it with --model hf")
    if model.get_output_embeddings() is None:
        raise CouplingError(f"got a {name} without a language-model head, expected a causal language model (…ForCausalLM)")
    if reason := unreadable(model):
        raise CouplingError(
            f"got a {name} with {reason}, expected floating-point weights, such as bitsandbytes, torchao or quanto pack, or "
            "such as accelerate offloads; use --model hf, or coupling_limit=0, to only score"
        )


def _in_place(model: nn.Module) -> bool:
    """Whether the model runs as it stands: every weight present, and on one device."""
    weights = _state(model)
    return not any(map(is_absent, weights)) and len({t.device for t in weights}) == 1


def _split_again(bridge: nn.Module) -> None:
    """TransformerLens splits joint projections once; those of absent weights must be split whenever they are fetched."""
    joints = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
    for module in bridge.modules():
        for split, names in joints.items():
            if (cut := getattr(module, split, None)) is not None:
                split_again(module.original_component, cut, [getattr(module, name).original_component for name in names])


def _brought_to(device: torch.device, arguments: Any) -> Any:
    """Every tensor in nested arguments on ``device``; one that is there already stays as it is."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
