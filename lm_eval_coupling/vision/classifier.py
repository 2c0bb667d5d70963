"""An image classifier with its image processor: what it says of images, a batch at a time."""

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
    """A transformers image classifier in evaluation mode, and what makes pixel values of images for it."""

    name: str
    revision: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: str | None = None, revision: str = "main") -> Classifier:
        """Load from the Hub or from a folder, in the dtype of the saved weights.

        Images are made into pixel values by Pillow and NumPy on every machine, wherever the processor can.

        Args:
            name: what ``AutoModelForImageClassification.from_pretrained`` takes, timm's models among them.
            device: such as ``cuda``; by default the best there is.
            revision: of a model on the Hub.

        Returns:
            The classifier, in evaluation mode on its device.

        Raises:
            CouplingError: if there is no such device or model, or transformers cannot load it as an image classifier.
        """
        where = device_named(device)
        from transformers import AutoModelForImageClassification

        try:
            model = AutoModelForImageClassification.from_pretrained(
                name, revision=revision, dtype="auto"
            )
            processor = _processor(name, revision)
        except Exception as error:  # the libraries below raise anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CouplingError(
                f"got model {name!r}, revision {revision!r}, which transformers cannot load as an image classifier with its "
                f"image processor: {reason[0][:300]}"
            ) from error
        return cls(name, revision, model.eval().to(where), processor)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
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
        """Pixel values of one image, float32 on the CPU: resized, cut and normalised as the model was trained."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0].float()

    @torch.inference_mode()
    def log_probabilities(self, pixels: Sequence[Tensor]) -> Float[Tensor, "image label"]:
        """Log-probability of every label, float32 on the CPU; one pass, unless the processor leaves images their sizes."""
        together = len({image.shape for image in pixels}) == 1
        batches = [torch.stack(list(pixels))] if together else [image[None] for image in pixels]
        logits = [
            self.model(pixel_values=batch.to(self.device, self.dtype)).logits for batch in batches
        ]
        return torch.cat(logits).float().log_softmax(-1).cpu()


def _processor(name: str, revision: str) -> Any:
    """The image processor that computes with Pillow and NumPy; older automatic classes ask for torchvision."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(
            name, revision=revision, backend="pil"
        )
    except ImportError:
        about, _ = transformers.ImageProcessingMixin.get_image_processor_dict(
            name, revision=revision
        )
        kind = about["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
        return getattr(transformers, f"{kind}Pil").from_pretrained(name, revision=revision)
