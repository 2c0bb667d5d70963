"""How a model is wrapped: by TransformerLens' bridge if that computes the same, or by its blocks.

Both measure one module tree, a twin over the model's weights; the bridge replaces the insides of
its blocks. The twin is first held to the model that is scored, and then the bridge to the twin.
The arithmetic is float32: an adapter that a bridge leaves out is seen for bf16 weights too.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_coupling.errors import (
    CouplingError,
    Unmeasurable,
    message_of,
    pass_on_lack_of_memory,
)
from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.residual import load_checks as checks
from lm_eval_coupling.residual.agreement import ScoredModel
from lm_eval_coupling.residual.attachments import attachments_of, has_own_functions
from lm_eval_coupling.residual.bridge import bridged_blocks, put_bridge_into
from lm_eval_coupling.residual.edited_arguments import edited_argument
from lm_eval_coupling.residual.image_inputs import PixelValues, takes_images
from lm_eval_coupling.residual.inputs import Inputs, TokenIds
from lm_eval_coupling.residual.scored import (
    evaluation_mode,
    looked_through,
    mixed_dtypes,
    refuse_unsupported,
    without_compilation,
    without_dropout,
)
from lm_eval_coupling.residual.scored_passes import uncompiled_forwards
from lm_eval_coupling.residual.stamp import Glance, Stamp
from lm_eval_coupling.residual.twin import block_lists, computes_eagerly, runs_as_it_stands, twin_of
from lm_eval_coupling.residual.weights import state_of

logger = logging.getLogger("lm_eval.coupling")

BRIDGE = "bridge"
BLOCKS = "blocks"


def wrap(kind: type, hf_model: nn.Module, tokenizer: Any) -> Any:
    """Make a ResidualModel (``kind``) of ``hf_model``; see its ``wrap``."""
    base = looked_through(hf_model)
    refuse_unsupported(base)
    name = type(base).__name__
    scored = without_compilation(hf_model)
    wrapping: _Wrapping | None = None
    try:
        with uncompiled_forwards(scored):
            wrapping = _Wrapping(kind, scored, base, tokenizer)
            return wrapping.wrap()
    except CouplingError:
        if wrapping is not None:
            wrapping.refuse_edited_arguments()
        raise
    except Exception as error:
        pass_on_lack_of_memory(error)
        words = message_of(error, 200)
        if mixed := mixed_dtypes(base):
            raise CouplingError(
                f"got a {name} with {mixed}, which do not run together ({words}), expected one "
                "dtype; load it with dtype=…, or make it one by model.to(dtype)"
            ) from error
        raise CouplingError(
            f"got a {name}, whose blocks cannot be run one by one ({type(error).__name__}: "
            f"{words}), expected a residual stream; score it with --model hf, or with "
            "coupling_limit=0"
        ) from error


class _Wrapping:
    """The steps by which one model is wrapped."""

    def __init__(self, kind: type, scored: nn.Module, base: nn.Module, tokenizer: Any) -> None:
        self.kind, self.base, self.tokenizer = kind, base, tokenizer
        self.scored = scored if hasattr(scored, "config") else base
        self.name = type(base).__name__
        self.has_autocast = "_original_forward" in vars(base)
        dtypes = {tensor.dtype for tensor in state_of(base)}
        self.rounds = self.has_autocast or not dtypes.isdisjoint((torch.bfloat16, torch.float16))
        self.twin = twin_of(base)
        self.inputs: Inputs = PixelValues(self.twin) if takes_images(base) else TokenIds(self.twin)
        self.n_params = sum(p.numel() for p in self.twin.parameters())
        self.runs = runs_as_it_stands(self.twin)
        self.plain: Any = None

    def wrap(self) -> Any:
        """Return the bridge if it computes the same, else the model's own blocks."""
        before = self.attached = attachments_of(self.scored)
        checks.require_shared_weights(self.twin, self.base)
        self._hold_twin_to_scored()
        self.plain = self._own_blocks()
        names = {id(module): name for name, module in self.twin.named_modules()}
        block_names = [names[id(block)] for block in self.plain.blocks]
        last_name = block_names[-1]
        ends = self._ends(last_name)  # by the kernels that score
        self._make_eager()
        trace = self._check(self.plain)
        self._hold_to_scored(trace.resid_final, *ends)
        bridged, reason = self._bridge(trace)
        model = self.plain if bridged is None else bridged
        if fixed := checks.held_fixed(trace):
            reason = f"{reason}; {', '.join(fixed)} of earlier blocks are held fixed"
        model.wrapping_reason = reason
        changed_by_passes = _differences(before, after := attachments_of(self.scored))
        if changed_by_passes and self.runs:
            what, again = "logits after other passes", self._scored_logits()
            checks.require_close(what, self.name, again, self.expected, self.tolerance)
        scored = ScoredModel(
            name=self.name,
            model=self.scored,
            stamp=Stamp.of(self.scored, changed_by_passes, None if changed_by_passes else after),
            glance=Glance.at(self.scored, changed_by_passes, with_weights=self.runs),
            probed=trace.resid_final,
            blocks=[self.base.get_submodule(name) for name in block_names],
            last_name=last_name,
            inputs=self.inputs,
            device=self.plain.device,
            retraced=self._by_scoring_kernels,
            rounds=self.rounds,
            is_present=self.runs,
        )
        model.remember_scored(scored)
        if scored.has_own_code:
            self._require_same_in_every_mode(scored)
        if self.base.training or any(map(_drops, self.base.modules())):
            logger.warning(
                "coupling: the model is in training mode, so that dropout acts on what it is "
                "scored by; coupling is measured without dropout: call model.eval()"
            )
        if before.unreadable:
            logger.warning(
                "coupling: %s, whose state cannot be read: what is measured is kept for this run "
                "alone, and counts as a model of its own",
                before.unreadable[0],
            )
        return model

    def _require_same_in_every_mode(self, scored: ScoredModel) -> None:
        (stream,) = scored.final([self.inputs.probe])
        try:
            scored.require_same_in_every_mode(self.inputs.probe, range(len(stream)), stream)
        except Unmeasurable as refusal:
            raise CouplingError(f"got a {self.name} that cannot be measured: {refusal}") from None

    def refuse_edited_arguments(self) -> None:
        """Explain a refused model by an argument that a hook changes in place.

        Raises:
            CouplingError: if there is one; blocks share it, and are run one by one.
        """
        if self.plain is None or not self.runs or not has_own_functions(self.attached):
            return
        blocks, device = self.plain.block_list, self.plain.device
        if edited := edited_argument(self.twin, blocks, self.inputs, device):
            layer, argument = edited
            raise CouplingError(
                f"got a {self.name} with a hook at block {layer} that changes {argument} in place, "
                "which other blocks are given as well; expected a hook that returns a changed copy"
            )

    def _model(self, twin: nn.Module, blocks: list[nn.Module], wrapping: str) -> Any:
        return self.kind(
            twin,
            blocks,
            tokenizer=self.tokenizer,
            inputs=self.inputs,
            n_params=self.n_params,
            wrapping=wrapping,
            wrapping_reason="",
        )

    def _hold_twin_to_scored(self) -> None:
        """Compare logits by the same kernels in the same dtype: next to nothing may differ."""
        if not self.runs:
            return
        self.expected = self._scored_logits()
        logits = checks.answer_of(self.twin, self.inputs, next(self.twin.parameters()).device)
        self.tolerance = checks.SAME
        if self.rounds:
            self.tolerance = checks.ROUNDED if self.has_autocast else checks.SAME_KERNELS
        checks.require_close("logits", self.name, logits, self.expected, self.tolerance)
        if has_own_functions(self.attached) and any(m.training for m in self.scored.modules()):
            self._require_no_other_training_mode()

    def _require_no_other_training_mode(self) -> None:
        """Refuse hooks and functions that act otherwise in training mode, in which is scored."""
        device = next(self.twin.parameters()).device
        with without_dropout(), seeded(0):
            logits = checks.answer_of(self.scored, self.inputs, device)
        if not (error := checks.off_by(self.expected, logits)) <= self.tolerance:
            raise CouplingError(
                f"got a {self.name} in training mode, in which hooks or functions give other "
                f"logits (off by {error:.1e}), expected those of evaluation mode, which is "
                "measured; call model.eval()"
            )

    def _scored_logits(self) -> Tensor:
        device = next(self.twin.parameters()).device
        with evaluation_mode(self.scored):  # dropout
            return checks.answer_of(self.scored, self.inputs, device)

    def _own_blocks(self) -> Any:
        """Find the list of modules that hands a stream on, by running through it."""
        first_error: Exception | None = None
        for modules in block_lists(self.twin):
            try:
                model = self._model(self.twin, modules, BLOCKS)
                checks.require_chain(model.trace(self.inputs.probe))
                return model
            except (
                *(CouplingError, RuntimeError, AttributeError, TypeError),
                *(ValueError, IndexError, KeyError),
            ) as error:
                first_error = first_error or error
        raise CouplingError(
            f"got a {self.name}, in which no list of blocks hands a residual stream on "
            f"({first_error}), expected one; score it with --model hf"
        ) from first_error

    def _make_eager(self) -> None:
        """Compute attention in steps that can be watched; it must stay the same function."""
        try:
            before: Tensor | None = self.plain.trace(self.inputs.probe).resid_final
        except Exception:  # kernels for bf16 and fp16 only
            before = None
        computes_eagerly(self.twin)
        # Made again: its blocks put back the attributes that they were made with.
        self.plain = self._model(self.twin, self.plain.blocks, BLOCKS)
        after = self.plain.trace(self.inputs.probe).resid_final
        if before is not None:
            checks.require_close(
                "a stream with eager attention", self.name, after, before, checks.OTHER_KERNELS
            )

    def _check(self, model: Any) -> Any:
        """Run the functional checks of a stream, and return its trace of the probe."""
        checks.require_whole_blocks(model.block_list)
        trace = model.trace(self.inputs.probe)
        checks.require_residual_stream(self.name, trace.calls, trace.resid_final)
        return trace

    def _ends(self, last_name: str) -> tuple[Tensor, Tensor]:
        """Return the stream after the last block and the logits, of one pass."""
        last, model = self.plain.blocks[-1], self.twin
        if not self.runs:
            # Weights lie elsewhere: only traces run the twin, and the scored model runs itself.
            last, model = self.base.get_submodule(last_name), self.base
        with evaluation_mode(model):
            return checks.end_of(model, last, self.inputs, self.plain.device)

    def _by_scoring_kernels(self) -> Any:
        """Make another model of the blocks, in which attention is as in the scored one."""
        twin = twin_of(self.base)
        names = {id(module): name for name, module in self.twin.named_modules()}
        blocks = [twin.get_submodule(names[id(block)]) for block in self.plain.blocks]
        return self._model(twin, blocks, BLOCKS)

    def _hold_to_scored(self, stream: Tensor, scored: Tensor, logits: Tensor) -> None:
        """Hold the float32 stream to the scored one, and refuse anything added after it."""
        if not self.runs:
            checks.require_close("a residual stream", self.name, stream, scored, checks.PACKED)
            return
        tolerance = checks.ROUNDED if self.rounds else checks.OTHER_KERNELS
        checks.require_close(
            "logits after the last block", self.name, self.plain.answer(scored), logits, tolerance
        )
        if self.rounds:
            checks.require_close_somewhere(
                "a residual stream", self.name, stream[0], scored[0], checks.HALF
            )
        else:
            checks.require_close(
                "a residual stream", self.name, stream, scored, checks.OTHER_KERNELS
            )

    def _bridge(self, expected: Any) -> tuple[Any, str]:
        """Return the model by TransformerLens' bridge or None, and the reason."""
        if has_own_functions(self.attached):
            # The bridge may leave out what acts on later tokens than the probe's.
            return None, "hooks or functions of the user are part of the model"
        twin = twin_of(self.base)
        computes_eagerly(twin)
        try:
            bridge = put_bridge_into(twin)
            model = self._model(twin, bridged_blocks(bridge), BRIDGE)
            checks.require_shared_weights(twin, self.base)
            trace = self._check(model)
            points = expected.resid_final[0]
            pairs = [(model.logits(points), self.plain.logits(points))]
            for mine, theirs in zip(trace.calls, expected.calls, strict=True):
                pairs.append((mine.resid_post, theirs.resid_post))
            error = checks.largest(checks.off_by(*pair) for pair in pairs)
        except Exception as problem:
            pass_on_lack_of_memory(problem)
            words = f"{type(problem).__name__}: {message_of(problem, 200)}"
            return None, f"TransformerLens does not bridge {self.name} ({words})"
        if not error <= checks.SAME:
            reason = f"TransformerLens' bridge of {self.name} is off by {error:.1e} from the model"
            return None, reason
        return model, "TransformerLens' bridge computes what the model does"


def _drops(module: nn.Module) -> bool:
    """Return whether a module is a dropout in training mode, as some estimates of doubt set it."""
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the places whose digests differ: a pass itself changes them."""
    return {place for place in before | after if before.get(place) != after.get(place)}
