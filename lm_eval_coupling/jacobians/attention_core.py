"""The softmax attention core of a block, found by watching the block run, and its derivative in closed form.

Per head, with weights a = softmax(s), slope g_j = ∂s_j/∂(q·k_j), w = a∘g and output z = Σ_j a_j v_j:

    dz = [Σ_j w_j (v_j − z) k_jᵀ] dq + w_t (v_t − z) (qᵀ dk_t) + a_t dv_t         input token = output token = t
    dz =                              w_s (v_s − z) (qᵀ dk_s) + a_s dv_s          input token s < output token

No fact about any model family is used: a product, elementwise steps, a softmax and a second product are an attention core.
With attention sinks Σ_j a_j < 1; the formulas hold unchanged as long as the weights are not renormalised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.protocol import Call

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
_MAXIMA = {torch.max, Tensor.max, torch.amax, Tensor.amax}


class NoAttentionCore(RuntimeError):
    """The block ran without a product → softmax → product pattern."""


class _Abort(Exception):
    """Raised inside a block once everything wanted of it is known."""


@no_type_check
def _operands(func, args, kwargs) -> tuple[Tensor, Tensor] | None:
    """The two factors of a batched matrix product, or None if ``func`` is none."""
    if func in _ADDED_PRODUCTS:
        left = args[1] if len(args) > 1 else kwargs["batch1"]
        right = args[2] if len(args) > 2 else kwargs["batch2"]
    elif func in _PRODUCTS:
        left = args[0]
        right = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    else:
        return None
    return (left, right) if left.dim() >= 3 and right.dim() >= 3 else None


def _heads(tensor: Tensor, batch: torch.Size) -> Tensor:
    """[…, rows, columns] -> [head, rows, columns], keys shared by several queries repeated."""
    return tensor.expand(*batch, *tensor.shape[-2:]).reshape(batch.numel(), *tensor.shape[-2:])


class Watch(TorchFunctionMode):
    """Follows a block through scores → softmax → values; what it does there is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "scores"
        self.product: tuple[Tensor, Tensor] | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Queries and transposed keys, once their product has been seen."""
        assert self.product is not None
        return self.product

    @no_type_check  # runs for every operation
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.stage == "scores" and (factors := _operands(func, args, kwargs)) is not None:
            self.product = factors
            return self._on_scores(func, args, kwargs)
        if self.stage == "scores" and self.product is not None and func in _SOFTMAXES:
            self.stage = "values"
            return self._on_softmax(func, args, kwargs)
        if self.stage == "values" and (factors := _operands(func, args, kwargs)) is not None:
            self.stage = "done"
            return self._on_values(func, args, kwargs, *factors)
        return self._on_other(func, args, kwargs)

    def _on_scores(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _on_softmax(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        raise NotImplementedError

    def _on_other(self, func: Callable, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Record(Watch):
    """Keeps queries, keys, values, weights and the slope of the scores at one output token, then stops the block."""

    def __init__(self, output_token: int, alone: bool) -> None:
        super().__init__()
        self.token, self.alone = output_token, alone

    def _row(self, tensor: Tensor) -> Tensor:
        """Row of the output token, whether it came alone or among all."""
        return tensor[..., self.token if tensor.shape[-2] > 1 else 0, :]

    def _on_scores(self, func: Callable, args: Any, kwargs: Any) -> Any:
        q, k_t = self.factors
        self.queries = q.shape[-2]
        self.q = self._row(q)[..., None, :]
        self.raw = torch.matmul(self.q if self.alone else q, k_t).detach().requires_grad_(True)
        if func in _ADDED_PRODUCTS:
            return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * self.raw
        return self.raw * 1  # in-place steps are not allowed on a leaf

    def _on_other(self, func: Callable, args: Any, kwargs: Any) -> Any:
        if (
            self.product is not None
            and func in _MAXIMA
            and not any(isinstance(other, Tensor) for other in args[1:])
        ):
            args = (
                args[0].detach(),
                *args[1:],
            )  # a stabilising shift is no part of the slope (GPT-OSS)
        return func(*args, **kwargs)

    def _on_softmax(self, func: Callable, args: Any, kwargs: Any) -> Any:
        scores = args[0] if args else kwargs.pop("input")
        (slope,) = torch.autograd.grad(self._row(scores).sum(), self.raw)
        self.slope = self._row(slope)
        return func(scores.detach(), *args[1:], **kwargs)

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        self.weights, self.values = self._row(weights), values
        raise _Abort


class Substitute(Watch):
    """Hands the core's (q, k, v) of a one-token call, each [head, d_head], to ``answer``, whose reply takes their place."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def _on_values(
        self, func: Callable, args: Any, kwargs: Any, weights: Tensor, values: Tensor
    ) -> Any:
        q, k_t = self.factors
        batch = q.shape[:-2]
        z = self.answer(
            _heads(q, batch)[:, 0],
            _heads(k_t, batch)[:, :, 0],
            _heads(values, batch)[:, 0],
        )
        return z.reshape(*weights.shape[:-1], values.shape[-1]).to(values.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionRecord:
    """What reaches the attention core in one call of a block: q, k, v as the core sees them, at one output token."""

    q: Float[Tensor, "head d_key"]
    k: Float[Tensor, "head seq d_key"]
    v: Float[Tensor, "head seq d_value"]
    weights: Float[Tensor, "head seq"]
    slope: Float[Tensor, "head seq"]
    z: Float[Tensor, "head d_value"]

    @classmethod
    def of(cls, call: Call, output_token: int) -> AttentionRecord:
        """Run a block up to its attention core, keeping row ``output_token``.

        Costs one pass over the keys, and where the call did not keep them the projections of every token to keys and values.
        Kept ones are those up to the output token.

        Returns:
            The block's query, keys and values as the core sees them.

        Raises:
            NoAttentionCore: if the call holds no softmax attention core.
        """
        return cls.of_each([call], [output_token])[0]

    @classmethod
    def of_each(cls, calls: Sequence[Call], tokens: Sequence[int]) -> list[AttentionRecord]:
        """:meth:`of` several prompts of one block, each at its own token: at once where they kept their keys."""
        if all(call.keys is not None for call in calls):
            try:
                return cls._by_decoding(calls, tokens).split([token + 1 for token in tokens])
            except (RuntimeError, ValueError) as error:
                pass_on_lack_of_memory(error)
                if len(calls) > 1:
                    return [cls.of(call, token) for call, token in zip(calls, tokens, strict=True)]
        return [
            cls._by_whole_sequence(call, token) for call, token in zip(calls, tokens, strict=True)
        ]

    @classmethod
    def _by_decoding(cls, calls: Sequence[Call], tokens: Sequence[int]) -> AttentionRecord:
        """Of all prompts, their heads one after the other; each ends at its own token, what stands before is unseen."""
        x = torch.stack(
            [call.resid_pre[:, token] for call, token in zip(calls, tokens, strict=True)]
        )
        watch = _Record(0, alone=True)
        batch = calls[0].batch_with(calls[1:])
        return cls._watched(watch, lambda: batch.decode(x, tokens), 1, max(tokens) + 1, x.dtype)

    @classmethod
    def _by_whole_sequence(cls, call: Call, output_token: int) -> AttentionRecord:
        try:
            watch = _Record(output_token, alone=True)
            return cls._watched(
                watch, lambda: call.one_query(output_token), call.seq, call.seq, call.dtype
            )
        except (
            RuntimeError,
            ValueError,
        ) as error:  # some blocks (Falcon's with ALiBi, XGLM's) want as many queries as keys
            pass_on_lack_of_memory(error)
            watch = _Record(output_token, alone=False)
            return cls._watched(watch, lambda: call(call.resid_pre), call.seq, call.seq, call.dtype)

    @classmethod
    def _watched(
        cls,
        watch: _Record,
        run: Callable[[], object],
        queries: int,
        columns: int,
        dtype: torch.dtype,
    ) -> AttentionRecord:
        """What is recorded of a run that should have so many queries and keys."""
        try:
            with torch.enable_grad(), watch:
                run()
        except _Abort:
            pass
        else:
            raise NoAttentionCore(
                f"stopped while looking for the {watch.stage} of an attention core"
            )
        k_t = watch.factors[1]
        batch = watch.q.shape[:-2]
        found, expected = (
            [watch.queries, k_t.shape[-1], watch.values.shape[-2]],
            [queries, columns, columns],
        )
        if found != expected or watch.weights.shape[-1] < columns:
            raise NoAttentionCore(
                f"got queries, keys and values of lengths {found}, expected {expected}"
            )

        def heads(tensor: Tensor) -> Tensor:
            return _heads(tensor, batch).detach().to(dtype)

        weights, v = (
            heads(watch.weights[..., None, :columns]),
            heads(watch.values),
        )  # an attention sink's column is left out
        q, z = heads(watch.q)[:, 0], torch.bmm(weights, v)[:, 0]
        k, slope = heads(k_t).transpose(1, 2), heads(watch.slope[..., None, :])[:, 0]
        return cls(q=q, k=k, v=v, weights=weights[:, 0], slope=slope, z=z)

    def split(self, keys: Sequence[int]) -> list[AttentionRecord]:
        """Of each prompt, with the last so many of its keys."""
        parts = {
            field.name: getattr(self, field.name).chunk(len(keys))
            for field in dataclasses.fields(self)
        }
        own = [{name: part[i] for name, part in parts.items()} for i in range(len(keys))]
        of_keys = ("k", "v", "weights", "slope")
        return [
            dataclasses.replace(self, **one | {name: one[name][:, -n:] for name in of_keys})
            for n, one in zip(keys, own, strict=True)
        ]


class _HeadProduct(torch.autograd.Function):
    """y[h] = A[h] x[h]. Written out because vmap over an einsum copies the constant A once per direction."""

    @staticmethod
    def forward(A: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(A, x.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int], A: Tensor, x: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[0] is not None:
            raise NotImplementedError("the matrix of a linearised core is a constant")
        return torch.bmm(A, x.movedim(in_dims[1], -1)), 2

    @staticmethod
    def jvp(ctx: Any, dA: Any, dx: Tensor) -> Tensor:
        return _HeadProduct.apply(ctx.saved_tensors[0], dx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _HeadProduct.apply(ctx.saved_tensors[0].transpose(1, 2), grad)


@dataclasses.dataclass(frozen=True)
class LinearCore:
    """The core at one output token as an affine function of one input token's (q, k, v); exact to first order.

    All it takes from the other tokens is in here, so its size does not depend on the sequence. ``query``, ``key``, ``value``
    are where it is linearised: the query of the output token, the key and value of the input token; ``weight`` is the
    attention that the first pays to the second.
    """

    query: Float[Tensor, "head d_key"]
    key: Float[Tensor, "head d_key"]
    value: Float[Tensor, "head d_value"]
    weight: Float[Tensor, " head"]
    z: Float[Tensor, "head d_value"]
    dz_dq: Float[Tensor, "head d_value d_key"] | None  # None where the input token is another one
    dz_dqk: Float[Tensor, "head d_value"]

    @classmethod
    def at(cls, record: AttentionRecord, output_token: int, input_token: int) -> LinearCore:
        """Linearise ``record`` (taken at ``output_token``) in the query, key and value of ``input_token``."""
        w = record.weights * record.slope
        spread = record.v - record.z[:, None]
        same = output_token == input_token
        return cls(
            query=record.q,
            key=record.k[:, input_token],
            value=record.v[:, input_token],
            weight=record.weights[:, input_token],
            z=record.z,
            dz_dq=torch.bmm((w[..., None] * spread).transpose(1, 2), record.k) if same else None,
            dz_dqk=w[:, input_token, None] * spread[:, input_token],
        )

    @classmethod
    def of_each(cls, calls: Sequence[Call], tokens: Sequence[int]) -> LinearCore:
        """At each prompt's own token, as input and output; the heads of all prompts one after the other.

        Returns:
            One core, with as many times the heads.

        Raises:
            NoAttentionCore: if the calls hold no softmax attention core.
            RuntimeError: as the device has it, if the prompts take more memory together than there is.
        """
        if all(call.keys is not None for call in calls):
            try:
                return cls.at(AttentionRecord._by_decoding(calls, tokens), -1, -1)
            except (RuntimeError, ValueError) as error:
                pass_on_lack_of_memory(error)
        records = AttentionRecord.of_each(calls, tokens)
        return cls.joined(
            [cls.at(record, token, token) for record, token in zip(records, tokens, strict=True)]
        )

    @classmethod
    def joined(cls, cores: Sequence[LinearCore]) -> LinearCore:
        """The cores of several prompts as one with as many times the heads."""
        if len(cores) == 1:
            return cores[0]
        parts: dict[str, Any] = {
            field.name: [getattr(core, field.name) for core in cores]
            for field in dataclasses.fields(cls)
        }
        joined: dict[str, Any] = {
            name: None if of[0] is None else torch.cat(of) for name, of in parts.items()
        }
        return cls(**joined)

    @property
    def same_token(self) -> bool:
        """Whether the input token is the output token."""
        return self.dz_dq is not None

    def __call__(
        self,
        q: Float[Tensor, "head d_key"],
        k: Float[Tensor, "head d_key"],
        v: Float[Tensor, "head d_value"],
    ) -> Float[Tensor, "head d_value"]:
        """The core's output for these projections of the input token."""
        q, k, v = q.to(self.z.dtype), k.to(self.z.dtype), v.to(self.z.dtype)
        key_change = ((k - self.key) * self.query).sum(-1, keepdim=True)
        z = self.z + self.weight[:, None] * (v - self.value) + self.dz_dqk * key_change
        return z + _HeadProduct.apply(self.dz_dq, q - self.query) if self.same_token else z
