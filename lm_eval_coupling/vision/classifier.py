"""An image classifier with its image processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.devices import device_named


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A transformers image classifier in evaluation mode.

    Attributes:
        name: as given to ``from_pretrained``.
        revision: of a model on the Hub.
        model: the network.
        processor: makes pixel values of images.
    """

    name: str
    revision: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: str | None = None, revision: str = "main") -> Classifier:
        """Load a classifier from the Hub or from a folder, in the dtype of the saved weights.

        Where the processor can, Pillow and NumPy make the pixel values, the same on every machine.

        Args:
            name: as ``AutoModelForImageClassification.from_pretrained`` takes it.
            device: such as ``cuda``; by default the best there is.
            revision: of a model on the Hub.

        Returns:
            The classifier, in evaluation mode on its device.

        Raises:
            CouplingError: if there is no such device, or no such image classifier.
        """
        where = device_named(device)
        from transformers import AutoModelForImageClassification

        try:
            model = AutoModelForImageClassification.from_pretrained(
                name, revision=revision, dtype="auto"
            )
            processor = _processor(name, revision)
            model = model.eval().to(where)
        except Exception as error:  # the libraries below raise anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CouplingError(
                f"got model {name!r}, revision {revision!r}, which transformers cannot load as an "
                f"image classifier with its image processor: {reason[0][:300]}"
            ) from error
        return cls(name, revision, model, processor)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the labels."""
        return {int(i): str(label) for i, label in self.model.config.id2label.items()}

    def pixels(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        """Return the pixel values of one image, prepared as in training; float32 on the CPU."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0].float()

    @torch.no_grad()
    def log_probabilities(self, pixels: Sequence[Tensor]) -> Float[Tensor, "image label"]:
        """Return the log-probability of every label, float32 on the CPU.

        One pass, unless the processor leaves images their sizes.
        """
        together = len({image.shape for image in pixels}) == 1
        batches = [torch.stack(list(pixels))] if together else [image[None] for image in pixels]
        logits = [
            self.model(pixel_values=batch.to(self.device, self.dtype)).logits for batch in batches
        ]
        return torch.cat(logits).float().log_softmax(-1).cpu()


def _processor(name: str, revision: str) -> Any:
    """Load the image processor that computes with Pillow and NumPy."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(
            name, revision=revision, backend="pil"
        )
    except ImportError:  # older automatic classes ask for torchvision
        about, _ = transformers.ImageProcessingMixin.get_image_processor_dict(
            name, revision=revision
        )
        kind = about["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
        return getattr(transformers, f"{kind}Pil").from_pretrained(name, revision=revision)
