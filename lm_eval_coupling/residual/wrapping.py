"""Two ways into a model: TransformerLens' bridge where it computes what the model does, else the model's own blocks.

Both measure the same module tree, a twin over the model's weights; the bridge replaces the insides of its blocks. Whatever
way is taken, the twin is first held to the model that is scored, and the bridge then to the twin, in float32 arithmetic
whatever the dtype of the weights: an adapter that a bridge leaves out is seen in bf16 too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError, pass_on_lack_of_memory
from lm_eval_coupling.residual import load_checks as checks
from lm_eval_coupling.residual.bridge import put_bridge_into
from lm_eval_coupling.residual.image_inputs import PixelValues, takes_images
from lm_eval_coupling.residual.inputs import Inputs, TokenIds
from lm_eval_coupling.residual.scored import (
    looked_through,
    mixed_dtypes,
    refuse_unsupported,
    without_compilation,
)
from lm_eval_coupling.residual.twin import block_lists, computes_eagerly, runs_as_it_stands, twin_of
from lm_eval_coupling.residual.weights import present

BRIDGE = "bridge"
BLOCKS = "blocks"


def wrapped(kind: type, hf_model: nn.Module, tokenizer: Any) -> Any:
    """A ResidualModel (``kind``) of ``hf_model``; see its ``wrap``."""
    base = looked_through(hf_model)
    refuse_unsupported(base)
    name = type(base).__name__
    try:
        return _Entrance(kind, without_compilation(hf_model), base, tokenizer).taken()
    except CouplingError:
        raise
    except Exception as error:
        pass_on_lack_of_memory(error)
        words = " ".join(str(error).split())[:200]
        if mixed := mixed_dtypes(base):
            raise CouplingError(
                f"got a {name} with {mixed}, which do not run together ({words}), expected one dtype; load it with dtype=…, "
                "or make it one by model.to(dtype)"
            ) from error
        raise CouplingError(
            f"got a {name}, whose blocks cannot be run one by one ({type(error).__name__}: {words}), expected a residual "
            "stream; score it with --model hf, or with coupling_limit=0"
        ) from error


class _Entrance:
    """One model on its way in."""

    def __init__(self, kind: type, scored: nn.Module, base: nn.Module, tokenizer: Any) -> None:
        self.kind, self.scored, self.base, self.tokenizer = kind, scored, base, tokenizer
        self.name = type(base).__name__
        half = next((p.dtype for _, p in present(base) if p.is_floating_point()), None) in (
            torch.bfloat16,
            torch.float16,
        )
        self.rounds = half or "_original_forward" in vars(base)
        self.twin = twin_of(base)
        self.inputs: Inputs = PixelValues(self.twin) if takes_images(base) else TokenIds(self.twin)
        self.n_params = sum(p.numel() for p in self.twin.parameters())
        self.runs = runs_as_it_stands(self.twin)
        self.plain: Any = None

    def taken(self) -> Any:
        """The bridge if it holds, else the model's own blocks."""
        checks.require_shared_weights(self.twin, self.base)
        self._hold_twin_to_scored()
        self.plain = self._own_blocks()
        ended = self._end()  # by the kernels that score
        self._make_eager()
        trace = self._checked(self.plain)
        self._hold_to_scored(trace.resid_final, *ended)
        bridged, reason = self._bridged(trace)
        model = self.plain if bridged is None else bridged
        held = checks.held_fixed(trace)
        model.wrapping_reason = (
            f"{reason}; {', '.join(held)} of earlier blocks are held fixed" if held else reason
        )
        model.remember_scored(
            self.scored if hasattr(self.scored, "config") else self.base, trace.resid_final
        )
        return model

    def _model(self, twin: nn.Module, blocks: list[nn.Module], wrapping: str, reason: str) -> Any:
        options = {
            "inputs": self.inputs,
            "n_params": self.n_params,
            "wrapping": wrapping,
            "wrapping_reason": reason,
        }
        return self.kind(twin, blocks, tokenizer=self.tokenizer, **options)

    def _hold_twin_to_scored(self) -> None:
        """The same kernels in the same dtype: next to nothing may differ, or the model was changed in an unknown way."""
        if not self.runs or self.base.training:  # dropout
            return
        device = next(self.twin.parameters()).device
        expected = checks.answer_of(self.scored, self.inputs, device)
        found = checks.answer_of(self.twin, self.inputs, device)
        tolerance = (
            checks.ROUNDED if "_original_forward" in vars(self.base) else checks.SAME_KERNELS
        )
        checks.require_close(
            "logits", self.name, found, expected, tolerance if self.rounds else checks.SAME
        )

    def _own_blocks(self) -> Any:
        """The list of modules that hands a stream on, found by running through it."""
        failed: Exception | None = None
        for modules in block_lists(self.twin):
            model = self._model(self.twin, modules, BLOCKS, "")
            try:
                checks.require_chain(model.trace(self.inputs.probe))
                return model
            except (
                CouplingError,
                RuntimeError,
                AttributeError,
                TypeError,
                ValueError,
                IndexError,
                KeyError,
            ) as error:
                failed = failed or error
        raise CouplingError(
            f"got a {self.name}, in which no list of blocks hands a residual stream on ({failed}), expected one; score it "
            "with --model hf"
        ) from failed

    def _make_eager(self) -> None:
        """From here on attention is computed in steps that can be watched: it must be the function that it was."""
        try:
            before: Tensor | None = self.plain.trace(self.inputs.probe).resid_final
        except Exception:  # kernels for bf16 and fp16 only
            before = None
        computes_eagerly(self.twin)
        after = self.plain.trace(self.inputs.probe).resid_final
        if before is not None:
            checks.require_close(
                "a stream with eager attention", self.name, after, before, checks.OTHER_KERNELS
            )

    def _checked(self, model: Any) -> Any:
        """The functional checks of a stream; returns its trace of the probe."""
        checks.require_whole_blocks(model.block_list)
        trace = model.trace(self.inputs.probe)
        checks.require_residual_stream(self.name, trace.calls, trace.resid_final)
        return trace

    def _end(self) -> tuple[Tensor | None, Tensor | None]:
        """What the last block hands on in a pass of the twin, and what the twin says in that pass; None in training."""
        if self.base.training:
            return None, None
        last, model = self.plain.blocks[-1], self.twin
        if (
            not self.runs
        ):  # weights elsewhere: only traces run it, and the scored model's own pass stands in
            names = {id(module): name for name, module in self.twin.named_modules()}
            last, model = self.base.get_submodule(names[id(last)]), self.base
        return checks.end_of(model, last, self.inputs, self.plain.device)

    def _hold_to_scored(self, stream: Tensor, scored: Tensor | None, said: Tensor | None) -> None:
        """What is measured, in float32, is the stream that is scored but for rounding, and nothing is added after it."""
        if scored is None or said is None:
            return
        if not self.runs:
            checks.require_close("a residual stream", self.name, stream, scored, checks.PACKED)
            return
        tolerance = checks.ROUNDED if self.rounds else checks.OTHER_KERNELS
        checks.require_close(
            "logits after the last block", self.name, self.plain.answer(scored), said, tolerance
        )
        if self.rounds:
            checks.require_close_somewhere(
                "a residual stream", self.name, stream[0], scored[0], checks.HALF
            )
        else:
            checks.require_close(
                "a residual stream", self.name, stream, scored, checks.OTHER_KERNELS
            )

    def _bridged(self, expected: Any) -> tuple[Any, str]:
        """The model by TransformerLens' bridge, or None, and the reason in words."""
        twin = twin_of(self.base)
        computes_eagerly(twin)
        try:
            bridge = put_bridge_into(twin)
            model = self._model(
                twin, [block.original_component for block in bridge.blocks], BRIDGE, ""
            )
            checks.require_shared_weights(twin, self.base)
            found = self._checked(model)
            error = max(
                checks.off_by(mine.resid_post, theirs.resid_post)
                for mine, theirs in zip(found.calls, expected.calls, strict=True)
            )
            points = expected.resid_final[0]
            error = max(error, checks.off_by(model.logits(points), self.plain.logits(points)))
        except Exception as problem:
            pass_on_lack_of_memory(problem)
            words = " ".join(str(problem).split())[:200]
            return (
                None,
                f"TransformerLens does not bridge {self.name} ({type(problem).__name__}: {words})",
            )
        if not error <= checks.SAME:
            return (
                None,
                f"TransformerLens' bridge of {self.name} is off by {error:.1e} from the model",
            )
        return model, "TransformerLens' bridge computes what the model does"
