"""Images as prompts: pixel values, and the numbers that stand for them in place of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.residual.inputs import Batch

_FEW = 8  # tokens of a stand-in for a stream: more than any head reads by their place


class ImageTokens(tuple):
    """An image as a prompt: as many numbers as it has tokens, with its pixel values.

    The numbers are drawn from a hash of the pixel values: equal images are equal prompts, in a
    store and in a table, and others are not.
    """

    pixels: Callable[[], Tensor]

    def __new__(cls, digest: str, length: int, pixels: Callable[[], Tensor]) -> ImageTokens:
        """Draw numbers below 2⁶³ from ``digest``.

        ``pixels`` is called for the pixel values [channel, height, width].
        """
        hashes = (hashlib.sha256(f"{digest} {place}".encode()).digest() for place in range(length))
        tokens = super().__new__(cls, (int.from_bytes(h[:8], "big") >> 1 for h in hashes))
        tokens.pixels = pixels
        return tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as plain token ids: the function that loads the pixels may hold a data set."""
        return tuple, (list(self),)


def pixel_digest(pixels: Float[Tensor, "channel height width"]) -> str:
    """Return the SHA-256 of pixel values in float32 and of their shape."""
    numbers = pixels.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(str(numbers.shape).encode() + numbers.tobytes()).hexdigest()


class PixelValues:
    """Prompts of an image classifier: pixel values [channel, height, width], or [1, …].

    :class:`ImageTokens` are images too. Every token sees all others: nothing can be padded.
    """

    causal = False

    def __init__(self, model: nn.Module) -> None:
        """Read the size of an image from the model's configuration."""
        generator = torch.Generator().manual_seed(0)
        self.several = list(torch.randn(2, *_image_shape(model), generator=generator))
        self.probe = self.several[0]

    def batch(self, prompts: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Batch:
        """Stack images of one size."""
        images = [pixels_of(prompt).to(device, dtype) for prompt in prompts]
        if len(shapes := {tuple(image.shape) for image in images}) > 1:
            raise CouplingError(
                f"got images of shapes {sorted(shapes)} together, expected one shape "
                "[channel, height, width]"
            )
        return Batch({"pixel_values": torch.stack(images)}, None)

    def as_scored(self, arguments: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the pixel values by name."""
        return (), arguments

    def standing_for(self, resid: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Build placeholder images whose final tokens all equal the given vector.

        A class token, or a mean over tokens, is the vector then.

        Returns:
            Arguments of the pass, and a stream [image, token, d_model].
        """
        images = self.probe.to(device, resid.dtype).expand(len(resid), *self.probe.shape)
        return {"pixel_values": images}, resid[:, None].expand(-1, _FEW, -1)

    def ending_as(self, stream: Tensor, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Take the stream itself."""
        return {"pixel_values": self.probe[None].to(device, stream.dtype)}, stream

    def read(self, output: Any) -> Tensor:
        """Return the logits [image, label]."""
        return output.logits


def takes_images(model: nn.Module) -> bool:
    """Return whether a model is run on pixel values and gives logits of labels."""
    return (
        getattr(model, "main_input_name", "") == "pixel_values"
        and "ImageClassification" in type(model).__name__
    )


def pixels_of(prompt: Any) -> Float[Tensor, "channel height width"]:
    """Return the pixel values of one image, as floating-point numbers on their device.

    Raises:
        CouplingError: if the prompt is no image.
    """
    pixels = prompt.pixels() if isinstance(prompt, ImageTokens) else prompt
    if (
        not isinstance(pixels, Tensor)
        or not pixels.is_floating_point()
        or pixels.dim() not in (3, 4)
    ):
        what = (
            f"a tensor {list(pixels.shape)} of {pixels.dtype}"
            if isinstance(pixels, Tensor)
            else f"a {type(pixels).__name__}"
        )
        raise CouplingError(
            f"got {what} as an image, expected pixel values [channel, height, width] of one image"
        )
    return pixels.reshape(pixels.shape[-3:])


def _image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of an image on which the model can be run."""
    if (timm := getattr(model, "timm_model", None)) is not None:
        channels, *sides = (getattr(timm, "pretrained_cfg", None) or {}).get(
            "input_size", (3, 224, 224)
        )
        height, width = getattr(getattr(timm, "patch_embed", None), "img_size", None) or sides
        return channels, height, width
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return getattr(config, "num_channels", 3), height, width
