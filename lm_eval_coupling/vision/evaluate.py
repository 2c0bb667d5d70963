"""`lm-eval-coupling vision`: a classifier scored on labelled images, the coupling of a sample of them measured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.harness.plugin import require_writable
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.untrained import untrained_twin
from lm_eval_coupling.runs.options import Options, settings_of
from lm_eval_coupling.runs.provenance import about_measurement, about_model, about_software
from lm_eval_coupling.runs.results import CouplingInfo
from lm_eval_coupling.runs.rows import DocumentKey, Row, reasons
from lm_eval_coupling.runs.sampling import choose
from lm_eval_coupling.runs.session import Measured, Session, Subject
from lm_eval_coupling.runs.store import MeasurementStore, default_store_path
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED
from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.images import LabelledImage, LabelledImages, load_images
from lm_eval_coupling.vision.labels import model_labels
from lm_eval_coupling.vision.pictures import picture
from lm_eval_coupling.vision.saving import results_of, save
from lm_eval_coupling.vision.scoring import Answer, score
from lm_eval_coupling.vision.summary_token import summary_token

logger = logging.getLogger("lm_eval.coupling")


@dataclasses.dataclass(frozen=True)
class ImageRow(Row):
    """A measured image, with a small picture of it."""

    picture: bytes

    def to_columns(self) -> dict[str, Any]:
        """As it is written."""
        return super().to_columns() | {"picture": self.picture}


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
) -> tuple[Path, str]:
    """Score a classifier and measure its coupling; leaves what an evaluation of lm-eval leaves.

    The token that is measured is the one that the classifier reads: the class token, or, where it pools all tokens, a patch
    in the middle of the image, which the results say.

    Args:
        model: an image classifier that transformers can load.
        data: a folder of images, Parquet, or a data set's name.
        out: folder of the results.
        split: of the data; ``test``, or the only one there is.
        limit: images to score; all by default.
        batch_size: images in one pass.
        device: such as ``cuda``; the best there is by default.
        coupling: settings as ``name=value`` with commas between them, such as ``ranks=10+30,limit=50``.

    Returns:
        The file of results, and a few lines on what is in it.

    Raises:
        CouplingError: for what is no image classifier of transformer blocks, no labelled images, or a wrong setting.
    """
    settings = settings_of(coupling)
    options = Options.take_from({"pretrained": model} | settings)
    require_writable(out)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise CouplingError(
            f"got a batch size of {batch_size} and a limit of {limit}, expected whole numbers above 0"
        )
    images = load_images(data, split)
    classifier = Classifier.load(model, device)
    if classifier.device.type == "mps" and options.settings.dtype == "float64":
        raise CouplingError(
            "got coupling dtype=float64 on MPS, which has no float64; use float32 or --device cpu"
        )
    labels = model_labels(images.classes, images.count_labels(), classifier.id2label)
    measuring = None
    if options.measures_anything:
        measuring = _Measuring.of(classifier, options, "coupling_position" in settings)
    scored = score(classifier, images, labels, limit, batch_size)
    results = results_of(classifier, images, scored)
    info = None
    if measuring is not None:
        try:
            info = measuring.info(images, scored.answers)
        except Exception:
            logger.exception("coupling was not recorded; the scores are complete")
    file = save(results, info, out)
    accuracy, error = scored.accuracy()
    words = (
        f"{images.name}: accuracy {accuracy:.4f} ± {error:.4f} over {len(scored.answers)} images"
    )
    words += f", {len(scored.undecodable)} undecodable ones left out" if scored.undecodable else ""
    if measuring is not None and info is not None:
        words += f"\nMeasured at {measuring.what}\n{info.closing(results)}"
    return file, words


def _wrapped(model: nn.Module) -> ResidualModel:
    try:
        return ResidualModel.wrap(model)
    except CouplingError as error:  # whose advice is for users of lm-eval
        what = str(error).partition("; score it")[0]
        raise CouplingError(f"{what}; to only score it, give --coupling limit=0") from error


@dataclasses.dataclass(frozen=True)
class _Measuring:
    """The measuring half of a run."""

    classifier: Classifier
    options: Options
    session: Session
    what: str
    """In words, which token is measured."""

    @classmethod
    def of(cls, classifier: Classifier, options: Options, position_given: bool) -> _Measuring:
        store = MeasurementStore(options.store or default_store_path())
        trained = _wrapped(classifier.model)
        options.settings.check_shape(trained.d_model, trained.n_layers)
        subjects = [Subject(TRAINED, trained)]
        if options.untrained is not None:
            twin = untrained_twin(classifier.model, options.untrained)
            subjects.append(Subject(UNTRAINED, ResidualModel.wrap(twin)))
        position, what = summary_token(trained)
        if position_given:
            what = f"token {options.position}, as asked for"
        else:
            options = dataclasses.replace(options, position=position)
        logger.info("coupling: measured at %s", what)
        session = Session(
            subjects=subjects, settings=options.settings, position=options.position, store=store
        )
        return cls(classifier, options, session, what)

    def info(self, images: LabelledImages, answers: Sequence[Answer]) -> CouplingInfo:
        """Measure the chosen images: as many as the limit, the same ones for every model."""
        keys = {
            DocumentKey(images.name, answer.doc_hash, answer.prompt_hash): answer
            for answer in answers
        }
        chosen = choose(keys, [images.name], self.options.limit, self.options.seed)
        tokens = {
            key: self._prompt(images[answer.number])
            for key, answer in keys.items()
            if key in chosen
        }
        plugin.interrupted.clear()
        rows, interrupted = self._rows(images, keys, tokens)
        reused = sum(row.reused for row in rows if row.weights == TRAINED and row.place == 0)
        facts = self._facts(rows, images) | {"reused": reused, "interrupted": interrupted}
        if interrupted:
            plugin.interrupted.set()
        elif chosen and not facts["measured"]:
            logger.error(
                "coupling: none of %d images could be measured: %s", len(chosen), reasons(rows)
            )
        elif facts["failed"]:
            logger.warning(
                "coupling: %d images were not measured: %s", facts["failed"], reasons(rows)
            )
        return CouplingInfo(facts, rows, self.options.out)

    def _rows(
        self,
        images: LabelledImages,
        answers: Mapping[DocumentKey, Answer],
        tokens: Mapping[DocumentKey, Any],
    ) -> tuple[list[Row], bool]:
        """Of every image, set of weights and token asked for, those of the trained weights first; whether Ctrl-C cut in."""
        rows: list[Row] = []
        interrupted = False
        for session in self.session.at_every_place():
            asked = {key: image for key, image in tokens.items() if session.has(image)}
            measured = session.measure([*asked.values()])
            rows += [
                self._row(
                    images, key, answers[key], subject.weights, image, measured, session.place
                )
                for subject in session.subjects
                for key, image in asked.items()
                if image in measured.of(subject.weights)
            ]
            if interrupted := measured.interrupted:
                break
        return sorted(rows, key=lambda row: row.weights != TRAINED), interrupted

    def _prompt(self, image: LabelledImage) -> tuple[int, ...]:
        """The image as a prompt; its pixel values are made again when they are needed."""

        def load() -> torch.Tensor:
            return self.classifier.pixels(image.decoded())

        return self.session.trained.model.image(load(), load)

    def _row(
        self,
        images: LabelledImages,
        key: DocumentKey,
        answer: Answer,
        weights: str,
        image: Any,
        measured: Measured,
        place: int,
    ) -> Row:
        label = self.classifier.id2label[answer.target]
        return ImageRow(
            document=key,
            doc_id=answer.number,
            prompt_index=0,
            kind="image",
            text=f"image {answer.name}, labelled {label}",
            weights=weights,
            measured=measured.of(weights)[image],
            reused=image in measured.reused.get(weights, ()),
            place=place,
            picture=picture(images[answer.number].decoded()),
        )

    def _facts(self, rows: list[Row], images: LabelledImages) -> dict[str, Any]:
        facts = about_software() | {
            "settings": self.options.as_dict(),
            "model": self.classifier.name,
            "revision": self.classifier.revision,
            "measured_at": self.what,
        }
        facts |= about_model(self.session, self.classifier.model.config)
        facts |= about_measurement(rows, [images.name], self.options.settings.ranks)
        if UNTRAINED in facts:
            facts[UNTRAINED]["seed"] = self.options.untrained
        return facts
