"""The ``coupling_`` arguments of a run, read as lm-eval hands them over: strings, numbers or lists."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, nearest
from lm_eval_coupling.harness import plugin
from lm_eval_coupling.harness.prompts import READINGS
from lm_eval_coupling.measures.formulas.choices import positions_at_most
from lm_eval_coupling.measuring.settings import Settings

PREFIX = "coupling_"
_DTYPES = ("float32", "float16", "bfloat16", "float64")
DOCUMENTS = "a number of documents, 0 (only score) or all"


@dataclass(frozen=True)
class Options:
    """The ``coupling_`` arguments of a run, checked."""

    settings: Settings
    limit: int | None
    seed: int
    position: int | str
    prompt: str
    untrained: int | None
    store: Path | None
    out: Path | None
    dry_run: bool

    @classmethod
    def parse(
        cls,
        *,
        ranks: Any = "10+30+50",
        limit: Any = 100,
        seed: Any = 0,
        measures: Any = "depth+regularity",
        position: Any = -1,
        prompt: str = "scored",
        dtype: str = "float32",
        method: str = "auto",
        window: Any = None,
        tokens: Any = "last8",
        layers: Any = "spaced4",
        trajectories: Any = False,
        untrained: Any = None,
        store: Any = None,
        out: Any = None,
        dry_run: Any = False,
    ) -> Options:
        """Check every argument, without its prefix.

        Returns:
            Values of the types that the fields have.

        Raises:
            CouplingError: naming the argument that is wrong.
        """
        options = cls(
            settings=Settings(
                ranks=tuple(_whole("ranks", k) for k in _several(ranks)),
                measures=tuple(map(str, _several(measures))),
                dtype=dtype,
                method=method,
                window=None if window is None else _whole("window", window),
                tokens=str(tokens),
                layers=str(layers),
                trajectories=_yes("trajectories", trajectories),
            ),
            limit=None if limit == "all" else _whole("limit", limit, DOCUMENTS),
            seed=_whole("seed", seed),
            position=_positions(position),
            prompt=_one_of("prompt", prompt, READINGS),
            untrained=None if untrained is None else _whole("untrained", untrained),
            store=_path("store", store),
            out=_path("out", out),
            dry_run=_yes("dry_run", dry_run),
        )
        if options.limit is not None and options.limit < 0:
            raise CouplingError(f"got coupling_limit={options.limit}, expected {DOCUMENTS}")
        if options.dry_run and options.limit == 0:
            raise CouplingError(
                "got coupling_dry_run with coupling_limit=0, which measures nothing; leave out one of them"
            )
        if options.out is not None:
            plugin.require_writable(options.out)
        return options

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> Options:
        """Remove the ``coupling_`` arguments from those of a model and check them, and what rules out measuring at all.

        Returns:
            The checked arguments; ``arguments`` keeps the others.

        Raises:
            CouplingError: naming the argument that is wrong, and for one that is not known the nearest that is.
        """
        taken = {
            name: arguments.pop(name) for name in list(arguments) if name.startswith("coupling")
        }
        _refuse_unknown(taken)
        options = cls.parse(**{name.removeprefix(PREFIX): value for name, value in taken.items()})
        if arguments.get("pretrained") is None:
            raise CouplingError(
                "got no pretrained, expected a transformers folder, a name on the hub or a model object"
            )
        _require_there(arguments["pretrained"], arguments)
        for name in ("peft", "tokenizer", "delta"):
            _require_folder(name, arguments.get(name))
        _require_dtype(arguments.get("dtype"))
        if options.store and Path(options.store).is_dir():
            raise CouplingError(
                f"got the folder {options.store} as the store, expected a file; choose one in it"
            )
        if options.measures_anything and (
            shape := _shape_on_disk(arguments["pretrained"], arguments.get("subfolder"))
        ):
            options.settings.check_shape(*shape)
        if arguments.get("tp_plan"):
            raise CouplingError(
                "got tp_plan, which splits every weight over processes; use --model hf to only score"
            )
        return options

    @property
    def measures_anything(self) -> bool:
        """False where the run is only to score."""
        return self.limit != 0

    def as_dict(self) -> dict[str, Any]:
        """Every setting that a reader of the results must know."""
        return (
            self.settings.as_dict()
            | {
                "limit": "all" if self.limit is None else self.limit,
                "seed": self.seed,
                "position": self.position
                if positions_at_most(self.position) == 1
                else _first(self.position),
                "prompt": self.prompt,
            }
            | ({"positions": self.position} if positions_at_most(self.position) > 1 else {})
        )


def has_revisions(model: str, peft: Any = None, delta: Any = None) -> bool:
    """Whether a revision names weights: not of a folder, but of an adapter or a delta that goes with it."""
    return bool(peft or delta) or not Path(model).expanduser().is_dir()


def settings_of(words: str, option: str = "--coupling") -> dict[str, str]:
    """The arguments of the model that ``name=value,name=value`` on a command line stand for, with their prefix.

    Returns:
        Texts by name, not checked yet.

    Raises:
        CouplingError: if it is not of this form.
    """
    pairs = [part.partition("=") for part in words.split(",") if part.strip()]
    if wrong := [name for name, equals, value in pairs if not equals or not value]:
        raise CouplingError(
            f"got {option} with {wrong[0]!r}, expected name=value,name=value such as ranks=10+30,limit=50"
        )
    return {
        f"{PREFIX}{name.strip().removeprefix(PREFIX)}": value.strip() for name, _, value in pairs
    }


def _refuse_unknown(taken: Mapping[str, Any]) -> None:
    known = [f"{PREFIX}{name}" for name in inspect.signature(Options.parse).parameters]
    for name in taken:
        if name not in known:
            raise CouplingError(
                f"got unknown argument {name}, did you mean {nearest(name, known)}? There are {', '.join(known)}"
            )


def names_a_folder(model: str) -> bool:
    """Whether a model's name can only be a folder: the hub's are NAME or ORGANISATION/NAME."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def _require_there(pretrained: Any, arguments: Mapping[str, Any]) -> None:
    """What transformers would only find out once it is loaded, which takes long."""
    if not isinstance(pretrained, str | Path):
        return
    folder = Path(pretrained) / str(arguments.get("subfolder") or "")
    _require_folder("pretrained", pretrained)
    kinds = ("config.json", "adapter_config.json")
    if (
        folder.is_dir()
        and not arguments.get("gguf_file")
        and not any((folder / kind).is_file() for kind in kinds)
    ):
        raise CouplingError(
            f"got pretrained={pretrained}, a folder without config.json, which every model has"
        )


def _require_folder(name: str, value: Any) -> None:
    if isinstance(value, str | Path) and not Path(value).exists() and names_a_folder(str(value)):
        raise CouplingError(f"got {name}={value}, which is no folder here and no name on the hub")


def _require_dtype(dtype: Any) -> None:
    """A name that torch does not have; torch is only asked, which takes long, for one that is not a usual one."""
    if not isinstance(dtype, str) or dtype in ("auto", *_DTYPES):
        return
    import torch

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CouplingError(
            f"got dtype={dtype}, which torch does not have, did you mean {nearest(dtype, _DTYPES)}?"
        )


def _shape_on_disk(pretrained: Any, subfolder: Any) -> tuple[int, int] | None:
    """Width and depth of a model in a folder, read without transformers; anything unusual is left to be seen later."""
    try:
        about = json.loads(
            (Path(pretrained) / str(subfolder or "") / "config.json").read_text(encoding="utf-8")
        )
        about = about.get("text_config") or about
        width = next(about[name] for name in ("hidden_size", "n_embd", "d_model") if name in about)
        depth = next(
            about[name]
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if name in about
        )
        return int(width), int(depth)
    except Exception:
        return None


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [
            part.strip()
            for part in value.strip("[]() ").replace("+", ",").split(",")
            if part.strip()
        ]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(name: str, value: Any, expected: str = "a whole number") -> int:
    """A whole number, also as lm-eval's command line hands over a negative one: as -2.0."""
    try:
        number = float(value) if isinstance(value, str) else value
        if not isinstance(value, bool) and int(number) == number:
            return int(value) if isinstance(value, int) else int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise CouplingError(f"got {PREFIX}{name}={value!r}, expected {expected}")


def _positions(value: Any) -> int | str:
    """One token as a number, several as they are written, such as ``-1+0+last4``."""
    parts = [
        str(part) if re.fullmatch(r"[a-z]+[0-9]+", str(part)) else _whole("position", part)
        for part in _several(value)
    ]
    choice = parts[0] if len(parts) == 1 else "+".join(map(str, parts))
    positions_at_most(choice)
    return choice


def _first(choice: int | str) -> int | str:
    """The token that the headline is of: runs with the same one compare, whatever was measured besides."""
    first = str(choice).split("+")[0]
    return int(first) if first.lstrip("-").isdigit() else first


def _yes(name: str, value: Any) -> bool:
    if str(value).lower() in ("true", "1", "1.0"):
        return True
    if str(value).lower() in ("false", "0", "0.0", "none"):
        return False
    raise CouplingError(f"got {PREFIX}{name}={value!r}, expected 1 or 0")


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise CouplingError(f"got {PREFIX}{name}={value!r}, expected one of {', '.join(known)}")
    return value


def _path(name: str, value: Any) -> Path | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool | float) or not isinstance(value, str | int | Path):
        raise CouplingError(
            f"got {PREFIX}{name}={value!r}, expected a path; write one that looks like a number as ./PATH"
        )
    try:
        return Path(str(value)).expanduser()
    except RuntimeError:
        raise CouplingError(
            f"got {PREFIX}{name}={value}, but there is no home folder; write the whole path"
        ) from None
