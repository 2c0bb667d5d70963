"""Checks of a model's arguments that need neither transformers nor the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, nearest

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_CONFIGURATIONS = ("config.json", "adapter_config.json")


def require_loadable(arguments: Mapping[str, Any]) -> None:
    """Refuse model arguments that would fail only after a long import or a download.

    Args:
        arguments: those of lm-eval's ``hf``, such as ``pretrained``, ``dtype``, ``peft``.

    Raises:
        CouplingError: naming the argument that is wrong.
    """
    pretrained = arguments.get("pretrained")
    if pretrained is None:
        raise CouplingError(
            "got no pretrained, expected a transformers folder, a name on the hub or a model object"
        )
    for name in ("pretrained", "peft", "tokenizer", "delta"):
        _require_folder(name, arguments.get(name))
    _require_configuration(pretrained, arguments)
    _require_dtype(arguments.get("dtype"))
    if arguments.get("tp_plan"):
        raise CouplingError(
            "got tp_plan, which splits every weight over processes; use --model hf to only score"
        )


def has_revisions(model: str, peft: Any = None, delta: Any = None) -> bool:
    """Return whether a revision selects weights.

    A folder has no revisions, but an adapter or a delta of it may have.
    """
    return bool(peft or delta) or not Path(model).expanduser().is_dir()


def names_a_folder(model: str) -> bool:
    """Return whether a model's name can only be a folder; the hub has NAME or OWNER/NAME."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def shape_on_disk(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (d_model, n_layers) of a model in a folder; None if that is not simply read."""
    try:
        config = json.loads((_folder(arguments) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        widths = ("hidden_size", "n_embd", "d_model")
        depths = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        width = next(config[name] for name in widths if name in config)
        depth = next(config[name] for name in depths if name in config)
        return int(width), int(depth)
    except Exception:  # anything unusual is checked again on the loaded model
        return None


def _folder(arguments: Mapping[str, Any]) -> Path:
    return Path(arguments["pretrained"]) / str(arguments.get("subfolder") or "")


def _require_folder(name: str, value: Any) -> None:
    if isinstance(value, str | Path) and not Path(value).exists() and names_a_folder(str(value)):
        raise CouplingError(f"got {name}={value}, which is no folder here and no name on the hub")


def _require_configuration(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(pretrained, str | Path) or arguments.get("gguf_file"):
        return
    folder = _folder(arguments)
    if folder.is_dir() and not any((folder / name).is_file() for name in _CONFIGURATIONS):
        raise CouplingError(
            f"got pretrained={pretrained}, a folder without config.json, which every model has"
        )


def _require_dtype(dtype: Any) -> None:
    """Refuse a dtype that torch does not have; torch is slow to import, so usual names pass."""
    if not isinstance(dtype, str) or dtype in ("auto", *_DTYPES):
        return
    import torch

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CouplingError(
            f"got dtype={dtype}, which torch does not have, did you mean {nearest(dtype, _DTYPES)}?"
        )
