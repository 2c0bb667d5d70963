"""Tiny images by colour, and tiny classifiers of colours, as files that load without network."""

import numpy as np
import torch
import vision_cases
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def save_images(folder, each=4, side=16, colours=COLOURS):
    """A subfolder for each colour."""
    noise = np.random.default_rng(0)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(
                np.array(colour) + noise.integers(-30, 30, (side, side, 3)), 0, 255
            ).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def save_classifier(folder, case="vit", labels=tuple(COLOURS), side=16):
    """Save a reproducible random model and its image processor; return the folder's path."""
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    vision_cases.tiny_classifier(case, torch.float32, **names).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)
