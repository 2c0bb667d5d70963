"""Checks of a plan's models before any is loaded, their sizes, and their download."""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, nearest, shown
from lm_eval_coupling.runs.model_arguments import has_revisions, names_a_folder
from lm_eval_coupling.runs.options import PREFIX, Options

# Arguments of `from_pretrained` besides those that the model class of lm-eval names itself.
_FROM_PRETRAINED = [
    *("attn_implementation", "torch_dtype", "quantization_config", "load_in_4bit", "load_in_8bit"),
    *("low_cpu_mem_usage", "device_map", "max_memory", "offload_folder", "variant"),
    *("use_safetensors", "token", "experts_implementation"),
]
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_LEFT_OUT = (
    *("original/*", "onnx/*", "consolidated*", "training_args.bin"),
    *("*.msgpack", "*.h5", "*.ot", "*.onnx", "*.tflite"),
)


def check(
    models: Sequence[Mapping[str, Any]], coupling: Mapping[str, Any], *, offline: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return facts by model, and sentences on what is wrong with any.

    Args:
        models: each with ``model``, ``revisions`` and ``arguments``.
        coupling: the plan's coupling settings.
        offline: True if the hub is switched off.
    """
    problems: list[str] = []
    facts: dict[str, Any] = {}
    with ThreadPoolExecutor(8) as pool:
        looks = pool.map(lambda request: _look(request, coupling, offline), models)
        for request, (about, wrong) in zip(models, looks, strict=True):
            problems += wrong
            if about:
                facts[request["model"]] = about
    return facts, problems


def _look(
    request: Mapping[str, Any], coupling: Mapping[str, Any], offline: bool
) -> tuple[dict[str, Any], list[str]]:
    model, arguments = request["model"], request["arguments"]
    wrong = [*_problem_of_place(model, arguments)]
    wrong = [*_arguments(model, arguments, coupling, exists=not wrong), *wrong]
    if not wrong and Path(model).expanduser().is_dir():
        if not has_revisions(model, arguments.get("peft"), arguments.get("delta")):
            wrong += _of_folder(model, request["revisions"])
    elif not wrong:
        wrong += _revisions(model, request["revisions"], offline)
    if wrong:
        return {}, wrong
    try:
        config = _config(model, request["revisions"][0], arguments)
    except Exception as error:  # transformers, the hub and the model's own code raise anything
        return {}, [f"got the model {model}, which transformers cannot load: {_first_line(error)}"]
    text = config.get_text_config()
    width, depth = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    wrong = [*_shape(model, config, width, depth, coupling)]
    return {
        "d_model": width,
        "n_layers": depth,
        "n_params": _parameters(config),
        "vocab_size": getattr(text, "vocab_size", None),
        "dtype": str(_dtype(config, arguments)),
    }, wrong


def _arguments(
    model: str, arguments: Mapping[str, Any], coupling: Mapping[str, Any], exists: bool
) -> Iterator[str]:
    """Check the arguments of a model; one that does not exist is reported elsewhere."""
    from lm_eval.models.huggingface import HFLM

    parameters = inspect.signature(HFLM.__init__).parameters
    accepted = [*list(parameters)[1:], *_FROM_PRETRAINED]
    accepted = [name for name in accepted if name != "kwargs"]
    for name in [name for name in arguments if name in parameters]:
        if expected := _wrong_type(name, str(parameters[name].annotation), arguments[name]):
            yield f"got {name}={shown(arguments[name])} of {model}, expected {expected}"
    for name in arguments:
        if (
            name not in accepted
            and not name.startswith("coupling_")
            and SequenceMatcher(None, name, nearest(name, accepted)).ratio() >= 0.75
        ):
            yield f"got the argument {name} of {model}, did you mean {nearest(name, accepted)}?"
    try:
        Options.parse(**coupling)
    except (CouplingError, TypeError):
        coupling = {"limit": 0}  # reported once, for all models
    given = {f"{PREFIX}{name}": value for name, value in coupling.items()}
    try:
        Options.take_from({"pretrained": model if exists else "-", **given, **arguments})
    except CouplingError as error:
        yield f"{model}: {error}"


def _wrong_type(name: str, annotation: str, value: Any) -> str | None:
    """Return what is expected of a switch or a number of lm-eval's ``hf``, None if it is right.

    Python takes any text for true, also the `no` of YAML 1.2.
    """
    if value is None or "str" in annotation:
        return None
    if "bool" in annotation:
        return None if isinstance(value, bool) else "true or false"
    least = 0 if name.endswith("_id") else 1  # ids of tokens begin at 0
    is_right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return f"a whole number of {least} or more" if "int" in annotation and not is_right else None


def _problem_of_place(model: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence if a folder holds no model, or if a path leads to no folder.

    A name that may be one on the hub is not looked up here.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        inner = folder / str(arguments.get("subfolder") or "")
        gguf = arguments.get("gguf_file")
        if gguf and not (inner / str(gguf)).is_file():
            yield f"got gguf_file={gguf} of {model}, a folder without such a file"
        elif not gguf and not (inner / "config.json").is_file():
            yield f"got the model {model}, a folder without config.json"
        elif not any(any(inner.glob(pattern)) for pattern in _WEIGHTS):
            yield f"got the model {model}, a folder without weights ({', '.join(_WEIGHTS)})"
    elif names_a_folder(model):
        yield f"got the model {model}, which is no folder here and no name on the hub"


def _of_folder(model: str, revisions: Sequence[str]) -> Iterator[str]:
    """Refuse revisions of a folder, which holds one checkpoint."""
    if named := [revision for revision in revisions if revision != "main"]:
        yield (
            f"got revision {named[0]} of the folder {model}, where transformers looks for none; "
            "name the folder of each checkpoint as a model"
        )


def _revisions(model: str, revisions: Sequence[str], offline: bool) -> Iterator[str]:
    from lm_eval_coupling.sweep.source import snapshot

    unseen = [revision for revision in revisions if snapshot(model, revision, {}) is None]
    if not unseen:
        return
    if offline:
        missing = ", ".join(unseen[:3]) + (
            f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        )
        yield (
            f"got the model {model}, of which {missing} is not in the cache, with the hub "
            "switched off; --download first"
        )
        return
    if unseen == ["main"]:
        return  # its configuration is loaded next
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(model)
    except Exception as error:
        yield f"got the model {model}, whose revisions cannot be looked up: {_first_line(error)}"
        return
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    for revision in unseen:
        if revision not in names and not (
            len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        ):
            yield (
                f"got revision {revision} of {model}, which it does not have; "
                f"did you mean {nearest(revision, names)}?"
            )


def _config(model: str, revision: str, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    further = {
        name: arguments[name]
        for name in ("trust_remote_code", "subfolder", "gguf_file", "token")
        if name in arguments
    }
    return AutoConfig.from_pretrained(model, revision=revision, **further)


def _shape(
    model: str, config: Any, width: Any, depth: Any, coupling: Mapping[str, Any]
) -> Iterator[str]:
    if getattr(config, "is_encoder_decoder", False):
        yield f"got the model {model}, an encoder-decoder, expected a decoder-only one"
        return
    try:
        options = Options.parse(**coupling)
    except (CouplingError, TypeError):
        return  # reported already
    if options.measures_anything and width and depth:
        try:
            options.settings.check_shape(width, depth)
        except CouplingError as error:
            yield f"{model}: {error}"


def _parameters(config: Any) -> int | None:
    """Count the parameters of a model without storage; None if it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:  # an estimate is not worth a failure
        return None


def _dtype(config: Any, arguments: Mapping[str, Any]) -> Any:
    given = arguments.get("dtype", "auto")
    dtype = getattr(config, "dtype", None) if given == "auto" else given
    return str(dtype or "float32").removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def download(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Fetch every revision of every model of the hub into the cache.

    Yields:
        A sentence for each revision that cannot be fetched; the others are fetched all the same.
    """
    from huggingface_hub import HfApi, snapshot_download

    for request in models:
        model = request["model"]
        if Path(model).is_dir():
            continue
        for revision in request["revisions"]:
            print(f"{model} {revision} …", file=sys.stderr, flush=True)
            try:
                names = HfApi().list_repo_files(model, revision=revision)
                snapshot_download(model, revision=revision, allow_patterns=needed(names))
            except Exception as error:
                reason = _first_line(error)
                yield f"got the model {model} at {revision}, which cannot be fetched: {reason}"


def needed(names: Sequence[str]) -> list[str]:
    """Select the files that transformers loads: safetensors if there are any, else others."""
    kept = [
        name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _LEFT_OUT)
    ]
    if any(name.endswith(".safetensors") for name in kept):
        kept = [name for name in kept if not name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    return kept
