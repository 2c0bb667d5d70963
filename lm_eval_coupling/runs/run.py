"""One run: documents with prompts in, measured rows and their description out.

The doors (:mod:`~lm_eval_coupling.harness.lm`, :mod:`~lm_eval_coupling.texts`,
:mod:`~lm_eval_coupling.vision.evaluate`) score and make prompts. Whatever comes after that is here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lm_eval_coupling.errors import CouplingError, Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measures.formulas.choices import PROMPT_PART
from lm_eval_coupling.measuring.record import PromptCoupling
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.device_eigh import choices
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.untrained import untrained_twin
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.places import all_places
from lm_eval_coupling.runs.provenance import about_measurement, about_model, about_software
from lm_eval_coupling.runs.results import CouplingInfo
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt, Row, reasons
from lm_eval_coupling.runs.session import Measured, Session, Spot, Subject
from lm_eval_coupling.runs.store import MeasurementStore, default_store_path
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED

# Below lm-eval's own logger, so that its verbosity and handler apply.
logger = logging.getLogger("lm_eval.coupling")


@dataclass(frozen=True)
class Run:
    """Measured rows, those of the trained weights first.

    Attributes:
        rows: one per prompt, measured token and set of weights.
        reused: number of prompts whose record comes from the store.
        interrupted: True if Ctrl-C ended the measuring early.
        unstored: why the store lacks some of the records; empty if it has all.
    """

    rows: list[Row]
    reused: int
    interrupted: bool
    unstored: str = ""

    @classmethod
    def join(cls, runs: Iterable[Run]) -> Run:
        """Join the runs of several processes over one set of documents."""
        runs = list(runs)
        return cls(
            rows=[row for run in runs for row in run.rows],
            reused=sum(run.reused for run in runs),
            interrupted=any(run.interrupted for run in runs),
            unstored=next((run.unstored for run in runs if run.unstored), ""),
        )


@dataclass(frozen=True)
class ScoredModel:
    """The scored model's name, revision and transformers configuration, as results record them."""

    name: str
    revision: str
    config: Any


def open_store(options: Options) -> MeasurementStore:
    """Open the store that the options name, or the user's own."""
    return MeasurementStore(options.store or default_store_path())


def open_session(
    options: Options,
    model: nn.Module,
    store: MeasurementStore,
    tokenizer: Any = None,
    quiet: bool = False,
) -> Session:
    """Return a session on the scored model, and on its untrained twin if one is asked for.

    Args:
        options: what to measure.
        model: the scored model; it stays untouched.
        store: where measurements are kept.
        tokenizer: the model's own; None for an image classifier.
        quiet: True for every process except the one that reports.

    Raises:
        CouplingError: if the model cannot be measured with these options.
    """
    device = next(model.parameters()).device
    if device.type == "mps" and options.settings.dtype == "float64":
        raise CouplingError(
            "got coupling_dtype=float64 on MPS, which has no float64; use float32 or device=cpu"
        )
    trained = ResidualModel.wrap(model, tokenizer)
    options.settings.check_shape(trained.d_model, trained.n_layers)
    subjects = [Subject(TRAINED, trained)]
    if options.untrained is not None:
        twin = untrained_twin(model, options.untrained)
        subjects.append(Subject(UNTRAINED, ResidualModel.wrap(twin, tokenizer)))
    return Session(
        subjects=subjects,
        settings=options.settings,
        position=options.position,
        store=store,
        quiet=quiet,
    )


def measure_documents(session: Session, prompts: Sequence[DocumentPrompt]) -> Run:
    """Measure the prompts at every token that the session names, on every set of weights.

    A document counts only if all of its prompts are measured: the mean over some of them would be
    a value of another document. Ctrl-C is not raised; the store keeps what was measured.

    Returns:
        The rows of complete documents.
    """
    places = all_places(session.position)
    first_of = {place.part: place.number for place in reversed(places)}
    empty = Reason("too_short", "an empty prompt has no token to measure")
    prompts = [p if p.tokens else replace(p, problem=p.problem or empty) for p in prompts]
    rows = [
        Row(
            replace(prompt, span=None),
            subject.weights,
            _unmeasured(prompt, session.settings),
            place=first_of.get(prompt.part, 0),
        )
        for subject in session.subjects
        for prompt in prompts
        if prompt.problem is not None
    ]
    prompts = [prompt for prompt in prompts if prompt.problem is None]
    interrupted, unstored = False, ""
    # Tokens of one text share its forward pass. Prompts go apart from texts that go on after them,
    # so that their records are the same with and without those.
    for of_prompts in (True, False):
        spots = {
            place: [
                (prompt, spot)
                for prompt in prompts
                if prompt.part == place.part and (spot := place.spot(prompt)) is not None
            ]
            for place in places
            if (place.part == PROMPT_PART) == of_prompts
        }
        if interrupted or not any(spots.values()):
            continue
        measured = session.measure([spot for of_place in spots.values() for _, spot in of_place])
        for place, of_place in spots.items():
            for subject in session.subjects:
                rows += _complete_rows(of_place, measured, subject.weights, place.number)
        interrupted, unstored = measured.interrupted, measured.unstored
    rows.sort(key=lambda row: row.weights != TRAINED)  # stable: places keep their order
    reused = sum(row.reused for row in rows if row.weights == TRAINED and row.place == 0)
    return Run(rows, reused, interrupted, unstored)


def _unmeasured(prompt: DocumentPrompt, settings: Settings) -> PromptCoupling:
    assert prompt.problem is not None
    nothing = MeasureResult({}, (prompt.problem,))
    results = dict.fromkeys(settings.measures, nothing)
    return PromptCoupling(prompt.tokens, position=-1, ranks=settings.ranks, results=results)


def _complete_rows(
    spots: Sequence[tuple[DocumentPrompt, Spot]], measured: Measured, weights: str, place: int
) -> list[Row]:
    records, reused = measured.of(weights), measured.reused.get(weights, ())
    unfinished: set[DocumentKey] = {p.document for p, spot in spots if spot not in records}
    return [
        Row(prompt, weights, records[spot], reused=spot in reused, place=place)
        for prompt, spot in spots
        if prompt.document not in unfinished
    ]


def describe(
    run: Run,
    session: Session,
    options: Options,
    model: ScoredModel,
    tasks: Iterable[str],
    **further: Any,
) -> CouplingInfo:
    """Return what results and tables record of a run.

    Args:
        run: the measured rows, of all processes.
        session: which weights were measured.
        options: how they were measured.
        model: the scored model.
        tasks: names of the evaluated tasks.
        **further: facts that only one kind of run has.
    """
    facts = about_software() | {
        "settings": options.as_dict(),
        "model": model.name,
        "revision": model.revision,
    }
    facts |= further | about_model(session, model.config)
    facts |= about_measurement(run.rows, tasks, options.settings.ranks)
    if UNTRAINED in facts:
        facts[UNTRAINED]["seed"] = options.untrained
    facts |= {"reused": run.reused, "interrupted": run.interrupted}
    if eigensolvers := choices():
        facts["eigensolvers"] = eigensolvers
    info = CouplingInfo(facts, run.rows, options.out)
    # The user's own store is a cache, which nobody asked for.
    info.unstored = run.unstored if options.store is not None else ""
    return info


def warn_of_failures(info: CouplingInfo, n_chosen: int) -> None:
    """Log how many of the chosen documents could not be measured, and why."""
    if info["interrupted"]:
        return
    if n_chosen and not info["measured"]:
        logger.error(
            "coupling: none of %d documents could be measured: %s", n_chosen, reasons(info.rows)
        )
    elif info["failed"]:
        logger.warning(
            "coupling: %d documents were not measured: %s", info["failed"], reasons(info.rows)
        )


def dry_run_lines(session: Session, prompts: Sequence[DocumentPrompt]) -> list[str]:
    """Measure one prompt on each set of weights and estimate the cost of all."""
    first, *_ = all_places(session.position)
    spots = [
        (first.spot(prompt) if prompt.part == first.part else None) or Spot.at(prompt.tokens, -1)
        for prompt in prompts
        if prompt.tokens and prompt.problem is None
    ]
    return session.try_one(spots) if spots else []
