"""Image classifiers: random tiny configurations of every family, and images for them."""

from __future__ import annotations

import copy

import torch
from random_weights import draw_weights
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

_PLAIN = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_DINO = _PLAIN | {"mlp_ratio": 2, "layerscale_value": 0.5}

# family: model type, configuration, and whether the classifier reads a class token
CASES: dict[str, tuple[str, dict, bool]] = {
    "vit": ("vit", _PLAIN, True),
    "deit": ("deit", _PLAIN, True),
    "dinov2": ("dinov2", _DINO, True),
    "dinov2-registers": ("dinov2_with_registers", _DINO | {"num_register_tokens": 3}, True),
    "beit": (
        "beit",
        _PLAIN | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        False,
    ),
    "data2vec-vision": (
        "data2vec-vision",
        _PLAIN | {"use_shared_relative_position_bias": True},
        False,
    ),
    "vit-msn": ("vit_msn", _PLAIN, True),
    "ijepa": ("ijepa", _PLAIN, False),
    "siglip": ("siglip", {"vision_config": _PLAIN, "num_labels": 5}, False),
    "clip": ("clip", {"vision_config": _PLAIN, "num_labels": 5}, False),
}

NO_STREAM = {
    "resnet": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "embedding_size": 8},
    "convnext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32},
    "swin": {
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 32,
        "window_size": 4,
    },
}


def level(case: str) -> str:
    """The level that the layers of a family are served by."""
    return (
        "autodiff" if case == "data2vec-vision" else "closed"
    )  # its attention is fused, whatever it is told


def class_name(model_type: str) -> str:
    names = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    return names if isinstance(names, str) else names[0]


def tiny_classifier(case: str, dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    """Make a deterministic random model, with weights so large that attention is not uniform."""
    import transformers

    model_type, config = CASES[case][:2] if case in CASES else (case, NO_STREAM[case])
    config = copy.deepcopy(config | changes)
    if "id2label" in config:
        config.pop("num_labels", None)  # which would number them
    torch.manual_seed(0)
    model = getattr(transformers, class_name(model_type))(
        AutoConfig.for_model(model_type, **config)
    )
    draw_weights(model)
    return model.to(dtype).eval()


def tiny_images(count: int = 1, side: int = 16, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Pixel values, the same every time."""
    return torch.randn(
        count, 3, side, side, generator=torch.Generator().manual_seed(count), dtype=torch.float64
    ).to(dtype)
