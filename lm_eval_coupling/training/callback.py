"""`CouplingCallback`: coupling in transformers' Trainer, logged and saved while a model trains."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from lm_eval_coupling.errors import CouplingError, path, require_token_ids, whole
from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.measuring.settings import chosen_measures, chosen_ranks
from lm_eval_coupling.measuring.token_ids import token_ids
from lm_eval_coupling.residual.scored import evaluation_mode, looked_through
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.prompt_results import prompt_results, sample_of
from lm_eval_coupling.runs.results import CouplingInfo, save_run
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt
from lm_eval_coupling.runs.run import (
    Run,
    ScoredModel,
    describe,
    measure_documents,
    open_session,
)
from lm_eval_coupling.runs.session import Session
from lm_eval_coupling.runs.store import MeasurementStore

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("lm_eval.coupling")

TASK = "training"


class CouplingCallback(TrainerCallback):
    """Measures the coupling of a model every so many steps of its training.

    Changes nothing of the training: losses and weights are the same to the last bit. Values are
    those of the checkpoint that is saved at the same step. Process 0 measures; the others go on to
    the next exchange of gradients and wait there. An error while measuring is logged, and the
    training goes on.

    The trainer's log history gets ``coupling@K``, ``coupling@K_chance`` and ``coupling@K_excess``
    for every rank K and, if ``regularity`` is measured, ``line_shape_score``, as means over the
    prompts, and the ``coupling_seconds`` of the whole measurement. So does what the trainer reports
    to, such as W&B or TensorBoard, after :meth:`set_trainer`. The folder ``out`` gets a run for
    every measured step, which ``show``, ``fit``, ``report`` and the studies read as checkpoints of
    one training.
    """

    def __init__(
        self,
        prompts: Any,
        *,
        every: int = 500,
        ranks: Any = (10,),
        measures: Sequence[str] | str = ("depth", "regularity"),
        position: int | str = -1,
        dtype: str = "float32",
        out: Path | str = "runs/coupling",
    ) -> None:
        """Check the settings; the model is checked when the training begins.

        Args:
            prompts: as for :func:`~lm_eval_coupling.measuring.prompt.measure_coupling`. Texts need
                a Trainer with a tokenizer as its ``processing_class``.
            every: steps from one measurement to the next; step 0 is measured too.
            ranks: numbers K of top singular vectors.
            measures: names from docs/measures.md.
            position: token to measure at; of several, the log gets the first.
            dtype: arithmetic of the measurement.
            out: folder of the runs. Its name is that of the training in tables and pictures.

        Raises:
            CouplingError: for a setting that no prompt could be measured with.
        """
        self.prompts = prompts
        self.every = whole("every", every, 1)
        self.out = path("out", out)
        self.options = Options.parse(
            ranks=list(chosen_ranks(ranks)),
            measures="+".join(chosen_measures(measures)),
            position=position,
            dtype=dtype,
            limit="all",
        )
        self.options.require_positions_in_prompts("the prompts of a training")
        self._trainer: Trainer | None = None
        self._documents: list[DocumentPrompt] = []
        self._unsaved: tuple[int, CouplingInfo] | None = None

    def set_trainer(self, trainer: Trainer) -> None:
        """Report values to what ``trainer`` reports to.

        A Trainer hands its callbacks no way to its reporters, so it has to be named here.

        Args:
            trainer: the Trainer that this callback was given to.
        """
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that prompts and model can be measured, and measure step 0.

        Raises:
            CouplingError: if they cannot, in every process and before the first step.
        """
        self._encode_prompts(model, processing_class)
        if self._trainer is None and args.report_to and state.is_world_process_zero:
            logger.warning(
                "coupling: %s gets no coupling, because set_trainer was not called; the log "
                "history of the trainer and %s have it",
                *(", ".join(args.report_to), self.out),
            )
        if state.global_step == 0:
            self._measure(args, state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure if it is time to."""
        if state.global_step % self.every == 0:
            self._measure(args, state, control, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the run of this step with the loss, which the trainer logs after the step."""
        if logs and "loss" in logs and self._unsaved and self._unsaved[0] == state.global_step:
            self._save(float(logs["loss"]))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save what is not saved yet."""
        self._save()

    def _encode_prompts(self, model: nn.Module, tokenizer: Any) -> None:
        """Make the prompts' token ids, and refuse what could not be measured at any step."""
        if _has_texts(self.prompts) and not callable(getattr(tokenizer, "encode", None)):
            raise CouplingError(
                "got prompts as texts and a Trainer without a tokenizer, expected token ids; "
                "or give the Trainer processing_class=tokenizer"
            )
        inner: Any = looked_through(model)
        config = inner.config.get_text_config()
        encoder = _Encoder(tokenizer)
        prompts = [tuple(ids) for ids in token_ids(encoder, self.prompts)]
        longest = getattr(config, "max_position_embeddings", None) or math.inf
        for tokens in prompts:
            if len(tokens) > longest:
                raise CouplingError(
                    f"got a prompt of {len(tokens)} tokens for a model of {longest} positions, "
                    "expected at most as many; shorten it"
                )
            require_token_ids(tokens, config.vocab_size)
        if not prompts:
            raise CouplingError("got no prompts to measure, expected at least one")
        self.options.settings.check_shape(config.hidden_size, config.num_hidden_layers)
        self._documents = [
            DocumentPrompt(
                document=DocumentKey(TASK, _digest([number, *tokens]), _digest(tokens)),
                doc_id=number,
                index=0,
                kind="text",
                tokens=tokens,
                text=encoder.decode(tokens),
            )
            for number, tokens in enumerate(prompts)
        ]

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        """Measure this step in process 0, and log the means over the prompts.

        The step is saved once the trainer has logged its loss, or else before the next measurement
        or at the end. An error of the measurement is logged and not raised.

        Raises:
            KeyboardInterrupt: if Ctrl-C ended the measuring.
        """
        if not state.is_world_process_zero:
            return
        self._save()  # the step before, if the trainer logged no loss for it
        start = time.perf_counter()
        try:
            # Gradients, random state and modes stay as they are.
            with evaluation_mode(model), MeasurementStore(self.out / "store.sqlite") as store:
                session = open_session(self.options, model, store, quiet=True)
                run = measure_documents(session, self._documents)
                info = self._describe(args, state, session, run)
        except Exception as error:  # the training is worth more
            logger.warning(
                "coupling: step %d is not measured (%s); the training goes on",
                *(state.global_step, " ".join(str(error).split())),
            )
            return
        if run.interrupted:
            raise KeyboardInterrupt
        self._unsaved = (state.global_step, info)
        logs = self._means(run) | {"coupling_seconds": time.perf_counter() - start}
        self._log(args, state, control, logs)

    def _log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
    ) -> None:
        """Log as `Trainer.log` does, and leave the trainer's own next log as it would have been.

        Not by `Trainer.log` itself: subclasses empty their own metrics there.
        """
        if state.epoch is not None:
            logs = logs | {"epoch": state.epoch}
        state.log_history.append(logs | {"step": state.global_step})
        if self._trainer is not None:
            should_log = control.should_log  # the handler clears it
            self._trainer.callback_handler.on_log(args, state, control, logs)
            control.should_log = should_log

    def _means(self, run: Run) -> dict[str, float]:
        """Return the means over the prompts that the trainer's log gets."""
        records = [row.measured for row in run.rows if row.place == 0]
        logs: dict[str, float] = {}
        for rank in self.options.settings.ranks:
            mean = mean_and_error(record.coupling(rank) for record in records)["mean"]
            chance = chance_coupling(rank)
            logs[f"coupling@{rank}"] = mean
            logs[f"coupling@{rank}_chance"] = chance
            logs[f"coupling@{rank}_excess"] = mean - chance
        if "regularity" in self.options.settings.measures:
            scores = (record.line_shape_score for record in records)
            logs["line_shape_score"] = mean_and_error(scores)["mean"]
        return logs

    def _describe(
        self, args: TrainingArguments, state: TrainerState, session: Session, run: Run
    ) -> CouplingInfo:
        """Describe a measured step as a revision of the training."""
        revision = f"step{state.global_step}"
        if args.include_num_input_tokens_seen != "no" and state.global_step:
            revision += f"-tokens{state.num_input_tokens_seen / 1000}k"
        model = ScoredModel(str(self.out), revision, session.trained.model.model.config)
        return describe(run, session, self.options, model, [TASK], prompts={TASK: None})

    def _save(self, loss: float = math.nan) -> None:
        """Write the measured step as a run; it has no loss if the trainer did not log one."""
        if self._unsaved is None:
            return
        (step, info), self._unsaved = self._unsaved, None
        results = prompt_results(
            TASK,
            [sample_of(prompt.document, prompt.doc_id) for prompt in self._documents],
            model_name=info["model"],
            config={"model": TASK, "model_args": {}, "model_revision": info["revision"]},
        )
        if math.isfinite(loss):
            results["results"][TASK] |= {"loss,none": loss, "loss_stderr,none": "N/A"}
            results["higher_is_better"][TASK]["loss"] = False
        try:
            save_run(results, info, self.out)
        except (CouplingError, OSError) as error:
            logger.warning("coupling: step %d is measured and not saved (%s)", step, error)


class _Encoder:
    """The tokenizer of a Trainer as `token_ids` and tables need it; there may be none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: Any) -> list[int]:
        return list(self.tokenizer.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        decode = getattr(self.tokenizer, "decode", None)
        return decode(list(tokens)) if callable(decode) else ""


def _has_texts(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, list | tuple) and any(isinstance(part, str) for part in prompts)


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()
