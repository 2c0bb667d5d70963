"""The softmax attention core of a block, recorded while the block runs, and its closed derivative.

Per head, with weights a = softmax(s), slope g_j = ∂s_j/∂(q·k_j), w = a∘g, output z = Σ_j a_j v_j
and output token t:

    dz = [Σ_j w_j (v_j − z) k_jᵀ] dq + w_t (v_t − z) (qᵀ dk_t) + a_t dv_t     by token t
    dz =                              w_s (v_s − z) (qᵀ dk_s) + a_s dv_s      by token s < t

With attention sinks Σ_j a_j < 1. The formulas then hold as long as the weights are not normalized
again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_eval_coupling.errors import pass_on_lack_of_memory
from lm_eval_coupling.jacobians.protocol import Call
from lm_eval_coupling.jacobians.watch import ADDED_PRODUCTS, Watch, flatten_heads

_MAXIMA = {torch.max, Tensor.max, torch.amax, Tensor.amax}


class NoAttentionCore(RuntimeError):
    """The block ran without a product → softmax → product pattern."""


class _Stop(Exception):
    """Ends a block's run once the attention core has been recorded."""


class _Record(Watch):
    """Mode that keeps what enters the core at one output token, then ends the block's run."""

    def __init__(self, output_token: int, alone: bool) -> None:
        super().__init__()
        self.token, self.alone = output_token, alone

    def _row(self, tensor: Tensor) -> Tensor:
        """Return the row of the output token, which may have come alone or among all."""
        return tensor[..., self.token if tensor.shape[-2] > 1 else 0, :]

    def _on_scores(self, func: Callable, args: Any, kwargs: Any) -> Any:
        q, k_t = self.factors
        self.queries = q.shape[-2]
        self.q = self._row(q)[..., None, :]
        self.raw = torch.matmul(self.q if self.alone else q, k_t).detach().requires_grad_(True)
        if func in ADDED_PRODUCTS:
            return kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * self.raw
        return self.raw * 1  # a leaf must not be changed in place, as some blocks do

    def _on_other(self, func: Callable, args: Any, kwargs: Any) -> Any:
        is_shift = self.product is not None and func in _MAXIMA
        if is_shift and not any(isinstance(other, Tensor) for other in args[1:]):
            # GPT-OSS subtracts the maximum for stability: the shift is no part of the slope.
            args = (args[0].detach(), *args[1:])
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
        raise _Stop


@dataclasses.dataclass(frozen=True)
class AttentionRecord:
    """Queries, keys and values as the attention core of one call sees them, at one output token."""

    q: Float[Tensor, "head d_key"]
    k: Float[Tensor, "head seq d_key"]
    v: Float[Tensor, "head seq d_value"]
    weights: Float[Tensor, "head seq"]
    slope: Float[Tensor, "head seq"]
    z: Float[Tensor, "head d_value"]

    @classmethod
    def of(cls, call: Call, output_token: int) -> AttentionRecord:
        """Run a block up to its attention core and keep row ``output_token``.

        Costs one pass over the keys. Where the call kept none, every token is projected to keys and
        values first.

        Returns:
            The record; of kept keys, those up to the output token.

        Raises:
            NoAttentionCore: if the call holds no softmax attention core.
        """
        return cls.of_each([call], [output_token])[0]

    @classmethod
    def of_each(cls, calls: Sequence[Call], tokens: Sequence[int]) -> list[AttentionRecord]:
        """Record prompts of one block, each at its own token: together if all kept their keys."""
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
        # The heads of one prompt come after those of the other, and the keys of each end at its
        # token. Masks hide what is put before the keys of a shorter prompt.
        at = zip(calls, tokens, strict=True)
        x = torch.stack([call.resid_pre[:, token] for call, token in at])
        watch, batch = _Record(0, alone=True), calls[0].batch_with(calls[1:])
        return cls._watched(watch, lambda: batch.decode(x, tokens), 1, max(tokens) + 1, x.dtype)

    @classmethod
    def _by_whole_sequence(cls, call: Call, output_token: int) -> AttentionRecord:
        try:
            watch, run = _Record(output_token, alone=True), lambda: call.one_query(output_token)
            return cls._watched(watch, run, call.seq, call.seq, call.dtype)
        except (RuntimeError, ValueError) as error:
            # Some blocks (Falcon's with ALiBi, XGLM's) need as many queries as keys.
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
        """Record a run that is expected to have ``queries`` queries and ``columns`` keys."""
        try:
            with torch.enable_grad(), watch:
                run()
        except _Stop:
            pass
        else:
            raise NoAttentionCore(
                f"stopped while looking for the {watch.stage} of an attention core"
            )
        k_t = watch.factors[1]
        batch = watch.q.shape[:-2]
        lengths = [watch.queries, k_t.shape[-1], watch.values.shape[-2]]
        expected = [queries, columns, columns]
        if lengths != expected or watch.weights.shape[-1] < columns:
            raise NoAttentionCore(
                f"got queries, keys and values of lengths {lengths}, expected {expected}"
            )

        def heads(tensor: Tensor) -> Tensor:
            return flatten_heads(tensor, batch).detach().to(dtype)

        # The cut leaves out the column of an attention sink.
        weights, v = heads(watch.weights[..., None, :columns]), heads(watch.values)
        q, z = heads(watch.q)[:, 0], torch.bmm(weights, v)[:, 0]
        k, slope = heads(k_t).transpose(1, 2), heads(watch.slope[..., None, :])[:, 0]
        return cls(q=q, k=k, v=v, weights=weights[:, 0], slope=slope, z=z)

    def split(self, keys: Sequence[int]) -> list[AttentionRecord]:
        """Split into one record per prompt, each with the last ``keys[i]`` of its keys."""
        parts = {
            field.name: getattr(self, field.name).chunk(len(keys))
            for field in dataclasses.fields(self)
        }
        per_key = ("k", "v", "weights", "slope")
        return [
            AttentionRecord(
                **{
                    name: part[i][:, -n:] if name in per_key else part[i]
                    for name, part in parts.items()
                }
            )
            for i, n in enumerate(keys)
        ]


class _HeadProduct(torch.autograd.Function):
    """y[h] = A[h] x[h]. An einsum under vmap would copy the constant A once per direction."""

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
            raise NotImplementedError("the matrix of a linearized core is a constant")
        return torch.bmm(A, x.movedim(in_dims[1], -1)), 2

    @staticmethod
    def jvp(ctx: Any, dA: Any, dx: Tensor) -> Tensor:
        return _HeadProduct.apply(ctx.saved_tensors[0], dx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _HeadProduct.apply(ctx.saved_tensors[0].transpose(1, 2), grad)


@dataclasses.dataclass(frozen=True)
class LinearCore:
    """The core at one output token as an affine function of one input token's q, k and v.

    Exact to first order. The other tokens are summed up in it, so its size does not depend on the
    sequence.

    Attributes:
        query: query of the output token.
        key: key of the input token.
        value: value of the input token.
        weight: attention that the output token pays to the input token.
        z: output of the core.
        dz_dq: derivative by the query; None where the tokens differ.
        dz_dqk: derivative by the product of query and key.
    """

    query: Float[Tensor, "head d_key"]
    key: Float[Tensor, "head d_key"]
    value: Float[Tensor, "head d_value"]
    weight: Float[Tensor, " head"]
    z: Float[Tensor, "head d_value"]
    dz_dq: Float[Tensor, "head d_value d_key"] | None
    dz_dqk: Float[Tensor, "head d_value"]

    @classmethod
    def at(cls, record: AttentionRecord, output_token: int, input_token: int) -> LinearCore:
        """Linearize ``record``, taken at ``output_token``, in q, k and v of ``input_token``."""
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
        """Linearize the core of several prompts, each at its own token as input and output.

        Returns:
            One core, with the heads of one prompt after those of the other.

        Raises:
            NoAttentionCore: if the calls hold no softmax attention core.
            RuntimeError: by the device, if its memory does not hold the prompts together.
        """
        if all(call.keys is not None for call in calls):
            try:
                return cls.at(AttentionRecord._by_decoding(calls, tokens), -1, -1)
            except (RuntimeError, ValueError) as error:
                pass_on_lack_of_memory(error)
        records = AttentionRecord.of_each(calls, tokens)
        at = zip(records, tokens, strict=True)
        return cls.joined([cls.at(record, token, token) for record, token in at])

    @classmethod
    def joined(cls, cores: Sequence[LinearCore]) -> LinearCore:
        """Join the cores of several prompts into one, heads after heads."""
        if len(cores) == 1:
            return cores[0]
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            parts = [getattr(core, field.name) for core in cores]
            joined[field.name] = None if parts[0] is None else torch.cat(parts)
        return cls(**joined)

    @property
    def same_token(self) -> bool:
        """True if the input token is the output token."""
        return self.dz_dq is not None

    def __call__(
        self,
        q: Float[Tensor, "head d_key"],
        k: Float[Tensor, "head d_key"],
        v: Float[Tensor, "head d_value"],
    ) -> Float[Tensor, "head d_value"]:
        """Return the core's output for these projections of the input token."""
        q, k, v = q.to(self.z.dtype), k.to(self.z.dtype), v.to(self.z.dtype)
        key_change = ((k - self.key) * self.query).sum(-1, keepdim=True)
        z = self.z + self.weight[:, None] * (v - self.value) + self.dz_dqk * key_change
        return z + _HeadProduct.apply(self.dz_dq, q - self.query) if self.same_token else z
