"""Scoring: a classifier's answers to the images of a data set, and their accuracy."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lm_eval_coupling.errors import CouplingError, reason_of
from lm_eval_coupling.residual.image_inputs import pixel_digest
from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.images import LabeledImage, LabeledImages

logger = logging.getLogger("lm_eval.coupling")

KEPT = 5  # most likely labels kept of an answer
_NAMED = 3  # undecodable images named in a message


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's answer to one image.

    Attributes:
        number: of the image in the data set.
        name: of the image, for readers.
        target: number of the right one of the model's labels.
        likely: log-probabilities of the ``KEPT`` most likely labels, and of the right one, by
            number, the most likely first.
        doc_hash: identifies image and label.
        prompt_hash: identifies the pixel values.
    """

    number: int
    name: str
    target: int
    likely: dict[int, float]
    doc_hash: str
    prompt_hash: str

    @property
    def right(self) -> bool:
        """Return whether the most likely label is the right one."""
        return next(iter(self.likely)) == self.target


@dataclasses.dataclass(frozen=True)
class Scored:
    """The answers, and (name, reason) of the images that could not be decoded."""

    answers: list[Answer]
    undecodable: list[tuple[str, str]]

    def accuracy(self) -> tuple[float, float]:
        """Return top-1 accuracy with its standard error, which is NaN below two images."""
        n, right = len(self.answers), sum(answer.right for answer in self.answers)
        mean = right / n
        return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan


def score(
    classifier: Classifier,
    images: LabeledImages,
    labels: Sequence[int],
    limit: int | None,
    batch_size: int,
) -> Scored:
    """Classify every image, or the first ``limit`` of them.

    Args:
        classifier: the model.
        images: the data.
        labels: the model's label of each label of the data.
        limit: number of images; None for all.
        batch_size: images in one pass.

    Returns:
        The answers in the order of the images, and what could not be decoded.

    Raises:
        CouplingError: if no image can be decoded.
    """
    total = len(images) if limit is None else min(limit, len(images))
    scored = Scored([], [])
    source = images.first(limit)
    with tqdm(total=total, desc="Classifying images") as bar, ThreadPoolExecutor() as threads:
        while batch := list(islice(source, batch_size)):
            made = list(threads.map(lambda image: _pixels(classifier, image), batch))
            scored.undecodable.extend(
                (i.name, m) for i, m in zip(batch, made, strict=True) if isinstance(m, str)
            )
            decoded = [
                (image, m) for image, m in zip(batch, made, strict=True) if isinstance(m, Tensor)
            ]
            scored.answers.extend(_answers(classifier, decoded, labels))
            bar.update(len(batch))
    if scored.undecodable:
        logger.warning(
            "%d of %d images could not be decoded and are left out: %s",
            *_undecodable(scored, total),
        )
    if not scored.answers:
        raise CouplingError(
            f"got {images.name}, of which no image can be decoded: "
            f"{_undecodable(scored, total)[-1]}"
        )
    return scored


def _pixels(classifier: Classifier, image: LabeledImage) -> Tensor | str:
    """Return pixel values, or the reason for which there are none."""
    try:
        return classifier.pixels(image.decoded())
    except Exception as error:  # Pillow's decoders raise anything
        return " ".join(str(error).split())[:200] or type(error).__name__


def _answers(
    classifier: Classifier, decoded: Sequence[tuple[LabeledImage, Tensor]], labels: Sequence[int]
) -> Iterator[Answer]:
    if not decoded:
        return
    try:
        log_probabilities = classifier.log_probabilities([pixels for _, pixels in decoded])
    except Exception as error:
        if reason_of(error).code != "out_of_memory":
            raise
        raise CouplingError(
            f"got out of memory with {len(decoded)} images in one pass, expected fewer; "
            "choose a smaller --batch_size"
        ) from None
    for (image, pixels), row in zip(decoded, log_probabilities, strict=True):
        target = labels[image.label]
        order = torch.argsort(row, descending=True, stable=True).tolist()
        kept = order[:KEPT] if target in order[:KEPT] else [*order[:KEPT], target]
        yield Answer(
            number=image.number,
            name=image.name,
            target=target,
            likely={i: row[i].item() for i in kept},
            doc_hash=image.digest(),
            prompt_hash=pixel_digest(pixels),
        )


def _undecodable(scored: Scored, total: int) -> tuple[int, int, str]:
    named = [f"{name} ({reason})" for name, reason in scored.undecodable]
    return len(named), total, "; ".join(named[:_NAMED]) + ("; …" if len(named) > _NAMED else "")
