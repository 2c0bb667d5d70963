"""`lm-eval-coupling vision`: accuracy of a classifier on labeled images, and coupling of some."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lm_eval_coupling.errors import CouplingError, message_of
from lm_eval_coupling.numerics.devices import device_named
from lm_eval_coupling.runs.announcement import announce
from lm_eval_coupling.runs.closing import closing_lines
from lm_eval_coupling.runs.options import Options, parse_settings
from lm_eval_coupling.runs.results import CouplingInfo, save_run
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt
from lm_eval_coupling.runs.run import (
    ScoredModel,
    describe,
    dry_run_lines,
    measure_documents,
    open_session,
    open_store,
    warn_of_failures,
)
from lm_eval_coupling.runs.sampling import choose
from lm_eval_coupling.runs.session import Session
from lm_eval_coupling.vision.accuracy import results_of
from lm_eval_coupling.vision.arguments import check_arguments
from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.images import LabeledImages, load_images
from lm_eval_coupling.vision.labels import model_labels
from lm_eval_coupling.vision.pictures import picture
from lm_eval_coupling.vision.scoring import score
from lm_eval_coupling.vision.summary_token import summary_token

logger = logging.getLogger("lm_eval.coupling")


class VisionRun(NamedTuple):
    """A finished run.

    Attributes:
        file: the results; None after a dry run.
        summary: a few lines on what is in it.
        interrupted: True if Ctrl-C ended the measuring early.
        problem: why something that was asked for was not written; empty if all was.
    """

    file: Path | None
    summary: str
    interrupted: bool = False
    problem: str = ""


def run_vision(
    model: str,
    data: str,
    out: Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    coupling: str = "",
) -> VisionRun:
    """Score a classifier, measure its coupling, and leave what an evaluation of lm-eval leaves.

    Unless a position is given, the measured token is the one that the classifier reads: the class
    token, or a patch in the middle of the image if it pools all tokens. The results say which.

    Args:
        model: an image classifier that transformers can load.
        data: a folder of images, Parquet, or a data set's name.
        out: folder of the results.
        split: of the data; ``test``, or the only one there is.
        limit: images to score; all by default.
        batch_size: images in one pass.
        device: such as ``cuda``; the best there is by default.
        coupling: settings as ``name=value`` joined by commas, such as ``ranks=10+30,limit=50``.

    Returns:
        The file of results and a summary.

    Raises:
        CouplingError: if this is no image classifier of transformer blocks, there are no labeled
            images, or a setting is wrong.
    """
    options = check_arguments(model, out, limit=limit, batch_size=batch_size, coupling=coupling)
    device_named(device)  # refused before anything is loaded
    images = load_images(data, split)
    classifier = Classifier.load(model, device)
    labels = model_labels(images.classes, images.count_labels(), classifier.id2label)
    session, place = None, ""
    if options.measures_anything:
        options, session, place = _open_session(
            classifier, options, position_given="coupling_position" in parse_settings(coupling)
        )
    if session is not None and options.dry_run:
        return VisionRun(None, _dry_run(classifier, images, limit, options, session))
    if session is not None:
        n_images = len(images) if limit is None else min(limit, len(images))
        announce(session, options, model, {images.name: n_images})
    scored = score(classifier, images, labels, limit, batch_size)
    results = results_of(classifier, images, scored, measured=session is not None)
    info, problem = None, ""
    if session is not None:
        targets = {
            DocumentKey(images.name, answer.doc_hash, answer.prompt_hash): (
                answer.number,
                classifier.id2label[answer.target],
            )
            for answer in scored.answers
        }
        try:
            info = _measure(classifier, images, targets, options, session, place)
        except Exception as failure:
            logger.exception("coupling was not recorded; the scores are complete")
            problem = f"coupling was not recorded ({message_of(failure)})"
    file = save_run(results, info, out)
    accuracy, error = scored.accuracy()
    summary = (
        f"{images.name}: accuracy {accuracy:.4f} ± {error:.4f} over {len(scored.answers)} images"
    )
    if scored.undecodable:
        summary += f", {len(scored.undecodable)} undecodable ones left out"
    if info is None:
        return VisionRun(file, summary, problem=problem)
    summary += f"\nMeasured at {place}\n{closing_lines(info, results)}"
    return VisionRun(file, summary, info["interrupted"], info.unstored)


def _open_session(
    classifier: Classifier, options: Options, position_given: bool
) -> tuple[Options, Session, str]:
    """Open a session at the token that the classifier reads; the text names that token."""
    try:
        session = open_session(options, classifier.model, open_store(options))
    except CouplingError as error:
        # The advice after the semicolon is for users of lm-eval.
        reason, scoring, _ = str(error).partition("; score it")
        if not scoring:
            raise
        raise CouplingError(f"{reason}; to only score it, give --coupling limit=0") from error
    if position_given:
        place = f"token {options.position}, as asked for"
    else:
        position, place = summary_token(session.trained.model)
        options = replace(options, position=position)
        session = replace(session, position=position)
    logger.info("coupling: measured at %s", place)
    return options, session, place


def _measure(
    classifier: Classifier,
    images: LabeledImages,
    targets: Mapping[DocumentKey, tuple[int, str]],
    options: Options,
    session: Session,
    place: str,
) -> CouplingInfo:
    """Measure the chosen images, the same ones for every model.

    Args:
        classifier: the scored model.
        images: the data.
        targets: number and label of every scored image.
        options: how to measure.
        session: which weights to measure.
        place: the measured token, for a reader.

    Returns:
        What results and tables record.
    """
    chosen = choose(targets, [images.name], options.limit, options.seed)
    prompts = [
        _prompt(classifier, images, session, key, number, label)
        for key, (number, label) in targets.items()
        if key in chosen
    ]
    run = measure_documents(session, prompts)
    model = ScoredModel(classifier.name, classifier.revision, classifier.model.config)
    info = describe(run, session, options, model, [images.name], measured_at=place)
    warn_of_failures(info, len(chosen))
    return info


def _prompt(
    classifier: Classifier,
    images: LabeledImages,
    session: Session,
    key: DocumentKey,
    number: int,
    label: str,
) -> DocumentPrompt:
    image = images[number]

    def pixels() -> torch.Tensor:
        # Decoded again when they are needed: the pixels of all images would fill the memory.
        return classifier.pixels(images[number].decoded())

    return DocumentPrompt(
        document=key,
        doc_id=number,
        index=0,
        kind="image",
        tokens=session.trained.model.image(pixels(), pixels),
        text=f"image {image.name}, labelled {label}",
        columns={"picture": picture(image.decoded())},
    )


def _dry_run(
    classifier: Classifier,
    images: LabeledImages,
    limit: int | None,
    options: Options,
    session: Session,
) -> str:
    """Estimate the cost of measuring, without scoring."""
    numbers = {
        DocumentKey(images.name, image.digest(), ""): image.number for image in images.first(limit)
    }
    chosen = choose(numbers, [images.name], options.limit, options.seed)
    prompts = [
        _prompt(classifier, images, session, key, numbers[key], label="") for key in sorted(chosen)
    ]
    heading = f"Dry run: {len(chosen)} images would be measured; nothing is written"
    return "\n".join([heading, *dry_run_lines(session, prompts)])
